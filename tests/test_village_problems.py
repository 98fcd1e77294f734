"""The village's problems and its questions for tools: true, well formed, in one split only."""

import functools
import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from data import village
from data.village import tools as village_tools
from data.village.problems import DIFFICULTIES, answered, lessons, problems, worked
from data.village.sums import written_steps
from data.village.tasks import user_turns
from data.village.tools import TOPICS, knowledge, newcomers, tool_examples, tool_lessons
from data.village.world import ATTRIBUTES, build_world
from nanollm import tools as tools_module
from nanollm.rewards import accuracy, final_answer, reft_reward, think_format
from nanollm.tools import LONGEST_RESULT, KnowledgeBase, Toolbox, calculator

ROOT = Path(__file__).parents[1]

# --- what the village's dialogues show ---------------------------------------------------------
CALL = re.compile(r"<tool_call>(.*?)</tool_call><tool_result>(.*?)</tool_result>")


@pytest.fixture(scope="module")
def world():
    return build_world()


@pytest.fixture(scope="module")
def people(world):
    return newcomers(world)


@pytest.fixture(scope="module")
def asked_of_tools(world):
    """All examples by split, each with its "completion", also where the file leaves it out."""
    as_example = village_tools.as_example

    def with_completion(task, turns, check, split):
        return as_example(task, turns, check, split) | check | {"completion": turns[-1]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(village_tools, "as_example", with_completion)
        return {split: tool_examples(world, split) for split in ("train", "val", "test")}


@pytest.fixture(scope="module")
def run_once(people, tokenizer):
    """The village's own tools; the same call is run only once."""
    given = {"calculator": calculator, "search": KnowledgeBase(knowledge(people)).search}
    return functools.cache(Toolbox(given, tokenizer).run)


@pytest.mark.parametrize("task", village_tools.SHARES)
def test_the_tools_give_the_very_results_that_the_dialogues_show(task, asked_of_tools, run_once):
    examples = [i for i in itertools.chain(*asked_of_tools.values()) if i["task"] == task]
    shown = [call for example in examples for call in CALL.findall(example["completion"])]
    assert len(shown) == len(examples) * (2 if task == "lookup_two_hop" else 1)
    wrong = [(call, result) for call, result in shown if run_once(call) != result]
    assert not wrong, f"{len(wrong)} of {len(shown)}, such as {wrong[:2]}"


def test_no_result_of_the_village_needs_cutting(people, tokenizer):
    assert all(len(tokenizer.encode(e["text"])) <= LONGEST_RESULT for e in knowledge(people))


def test_every_composed_completion_is_right_and_has_its_answer_after_the_calls(asked_of_tools):
    for example in asked_of_tools["test"]:
        assert accuracy(example, example["completion"]) == 1, example
        assert final_answer(example["completion"].rpartition("</tool_result>")[0]) == ""


def test_there_are_as_many_examples_of_each_task_as_planned(asked_of_tools):
    sizes = {"large_numbers": 2280, "lookup": 1500, "lookup_two_hop": 1500, "nobody": 720}
    assert Counter(example["task"] for example in asked_of_tools["train"]) == sizes
    assert set(Counter(example["task"] for example in asked_of_tools["test"]).values()) == {200}


def test_test_examples_end_with_the_question(world):
    for example in tool_examples(world, "test", n_examples=5):
        assert [m["role"] for m in example["messages"]] == ["user"]
        assert {"answer", "check", "task"} < set(example) and "completion" not in example


def test_no_question_to_the_tools_is_both_trained_on_and_tested(asked_of_tools):
    questions = {
        split: set(map(user_turns, examples)) for split, examples in asked_of_tools.items()
    }
    assert not questions["train"] & questions["test"]
    assert all(len(questions[split]) == len(examples) for split, examples in asked_of_tools.items())


def test_no_pair_of_large_numbers_is_both_trained_on_and_tested(asked_of_tools):
    pairs = {
        split: {
            frozenset(re.findall(r"\d+", example["messages"][0]["content"]))
            for example in examples
            if example["task"] == "large_numbers"
        }
        for split, examples in asked_of_tools.items()
    }
    assert not pairs["train"] & pairs["test"] and not pairs["val"] & pairs["test"]


def names_in(examples, names):
    words = (set(re.findall(r"\w+", f"{i['messages']} {i['completion']}")) for i in examples)
    return set().union(*words) & set(names)


def test_training_asks_about_one_half_of_the_newcomers_and_the_test_about_the_other(
    people, world, asked_of_tools
):
    halves = [{v.name for v in half} for half in (people.asked, people.never_asked)]
    assert not halves[0] & halves[1] and len(halves[0]) == len(halves[1]) == 500
    named = {
        split: names_in(examples, people.by_name) for split, examples in asked_of_tools.items()
    }
    assert named["train"] | named["val"] <= halves[0] and named["test"] <= halves[1]
    strangers = {s: names_in(examples, world.strangers) for s, examples in asked_of_tools.items()}
    assert strangers["train"] and strangers["test"] and not strangers["train"] & strangers["test"]


def test_newcomers_are_neither_villagers_nor_strangers_and_befriend_their_own_half(people, world):
    names = [v.name for v in people.villagers]
    assert len(set(names)) == 1000
    assert not set(names) & ({v.name for v in world.villagers} | set(world.strangers))
    for one in people.villagers:
        friend = people.by_name[one.facts["friend"]]
        assert friend.facts["friend"] == one.name and friend.asked == one.asked and friend != one


def test_the_knowledge_base_holds_one_entry_for_each_fact_and_nobody_else(people, world):
    entries = knowledge(people)
    titles = {f"{TOPICS[a]} of {v.name}" for v in people.villagers for a in ATTRIBUTES}
    assert {entry["title"] for entry in entries} == titles and len(entries) == len(titles) == 7000
    words = set(re.findall(r"\w+", " ".join(entry["text"] for entry in entries)))
    assert not words & ({v.name for v in world.villagers} | set(world.strangers))


def test_the_examples_of_the_documentation_are_of_the_kind_that_is_trained(people):
    documents = (ROOT / "data/README.md").read_text(), village_tools.__doc__, tools_module.__doc__
    for text in documents:
        for factors, result in re.findall(
            r"calculator\((.*?)\)</tool_call>(?:<tool_result>(\d+))?", text
        ):
            assert sorted(map(len, factors.split(" * "))) == [3, 4]
            assert result in ("", calculator(factors))
    (entry,) = re.findall(r'\{"title": "pet .*?\}', documents[0])
    assert json.loads(entry) in knowledge(people)
    assert sum("tool_call" in text for text in documents) == 3


def test_lessons_mix_calls_with_dialogues_that_need_none(world):
    chats = village.instructions(world, "val")
    worked_problems = [worked(p) for p in problems(world, "val", 40)]
    examples = tool_lessons(world, "val", worked_problems, chats)
    tasks = Counter(example["task"] for example in examples)
    assert sum(tasks[name] for name in village_tools.SHARES) == 200
    assert sum(tasks[name] for name in DIFFICULTIES) == 100
    assert sum(tasks.values()) == 400 and not tasks["unknown"]


# --- problems ----------------------------------------------------------------------------------
EQUATION = re.compile(r"(\d+(?: [-+*] \d+)+) = (-?\d+)")
STORIES = ("two_steps", "three_steps")


@pytest.fixture(scope="module")
def asked(world):
    return {split: problems(world, split, n) for split, n in village.PER_DIFFICULTY.items()}


def value_of(expression):
    """By hand: a number, then signs and numbers, from left to right (no line mixes * with + -)."""
    first, *rest = expression.split()
    total = int(first)
    for sign, number in zip(rest[::2], map(int, rest[1::2])):
        total = {"+": total + number, "-": total - number, "*": total * number}[sign]
    return total


def test_every_difficulty_has_its_number_of_problems_or_all_that_exist(asked):
    for split, examples in asked.items():
        counts = Counter((example["difficulty"], example["task"]) for example in examples)
        wanted = {
            (i, name): village.PER_DIFFICULTY[split] for i, name in enumerate(DIFFICULTIES, 1)
        }
        if split == "train":  # of the easy ones there are not so many
            wanted[1, "easy"] = min(counts[1, "easy"], 1500)
            assert counts[1, "easy"] > 1000
        assert counts == wanted


def test_every_equation_of_every_worked_solution_is_true(asked):
    for example in itertools.chain(*asked.values()):
        equations = EQUATION.findall(example["steps"])
        assert len(equations) == example["steps"].count("=") >= 1, example
        for left, right in equations:
            assert value_of(left) == int(right), example
        assert equations[-1][1] == example["answer"], example
        assert int(example["answer"]) >= 0


def test_the_digits_that_are_written_make_up_the_answer(asked):
    for example in itertools.chain(*asked.values()):
        digits = re.findall(r"write (\d+)", example["steps"])
        assert bool(digits) == (example["task"] in ("two_digits", "three_digits", "products"))
        if digits:
            assert int("".join(reversed(digits))) == int(example["answer"]), example


def test_what_is_carried_and_what_is_written_is_the_sum(asked):
    carried = 0
    for example in itertools.chain(*asked.values()):
        for total, digit, carry in re.findall(
            r"= (\d+), write (\d+) carry (\d+)", example["steps"]
        ):
            assert int(total) == 10 * int(carry) + int(digit) and int(digit) < 10, example
            carried += carry != "0"
    assert carried > 1000


def test_a_problem_asks_for_what_its_solution_works_out(asked):
    for example in itertools.chain(*asked.values()):
        if example["task"] in ("two_digits", "three_digits", "products"):
            question = list(map(int, re.findall(r"\d+", example["messages"][0]["content"])))
            a, sign, b = re.match(r"(\d+) (.) (\d+): ", example["steps"]).groups()
            assert sorted(question) == sorted((int(a), int(b))), example
            assert value_of(f"{a} {sign} {b}") == int(example["answer"])


LOSS = re.compile(r"sells|loses|away|gives \d+ \w+ to ")


def story_equations(example):
    return [re.fullmatch(r"(\d+) (.) (\d+) = (\d+)", step).groups()
            for step in example["steps"].rstrip(".").split(". ")]  # fmt: skip


def test_the_answer_of_a_story_follows_from_its_equations_and_they_from_its_sentences(asked):
    seen = Counter()
    for example in itertools.chain(*asked.values()):
        story = example["messages"][0]["content"]
        if "How many" not in story:
            continue
        *sentences, question = re.findall(r"[^.?]+[.?]", story)
        equations = story_equations(example)
        for before, after in itertools.pairwise(equations):
            assert after[0] == before[3], example
        assert equations[-1][3] == example["answer"] and question.startswith(" How many")
        numbers = [equations[0][0], *(equation[2] for equation in equations)]
        assert re.findall(r"\d+", story) == numbers, example
        signs = ["-" if LOSS.search(sentence) else "+" for sentence in sentences[1:]]
        if equations[0][1] == "*":
            signs.insert(0, "*")
        assert [equation[1] for equation in equations] == signs, example
        assert all(int(n) <= 30 for n in re.findall(r"\d+", story + example["steps"])), example
        seen[len(equations)] += 1
    per_difficulty = sum(village.PER_DIFFICULTY.values())
    assert seen[2] == seen[3] == per_difficulty


def test_no_question_is_in_two_splits(asked):
    questions = {split: set(map(user_turns, examples)) for split, examples in asked.items()}
    for one, other in itertools.combinations(questions.values(), 2):
        assert not one & other


def test_no_question_is_in_a_split_twice(asked):
    for examples in asked.values():
        assert [q for q, n in Counter(map(user_turns, examples)).items() if n > 1] == []


@pytest.mark.parametrize("task", ["easy", "two_digits", "three_digits", "products"])
def test_no_pair_of_operands_is_in_two_splits(task, asked):
    pairs = {
        split: {
            frozenset(re.match(r"(\d+) . (\d+)", example["steps"]).groups())
            for example in examples
            if example["task"] == task
        }
        for split, examples in asked.items()
    }
    for one, other in itertools.combinations(pairs.values(), 2):
        assert one and other and not one & other


@pytest.mark.parametrize("task", STORIES)
def test_no_story_of_the_test_has_the_numbers_of_a_trained_one(task, asked):
    told = {
        split: {example["steps"] for example in examples if example["task"] == task}
        for split, examples in asked.items()
    }
    assert not told["train"] & told["test"]


def two_columns(a, sign, b):
    """The written steps of two digits, each spelled out."""
    (a10, a1), (b10, b1) = divmod(a, 10), divmod(b, 10)
    if sign == "+":
        carry, digit = divmod(a1 + b1, 10)
        tens, result = a10 + b10 + carry, a + b
        ones = f"{a1} + {b1} = {a1 + b1}, write {digit} carry {carry}"
    else:
        carry = int(a1 < b1)
        digit = a1 + 10 * carry - b1
        tens, result = a10 - b10 - carry, a - b
        ones = f"{a1 + 10 * carry} - {b1} = {digit}, write {digit} borrow {carry}"
    last = f"{a10} {sign} {b10} {sign} {carry} = {tens}, write {tens}"
    return f"{a} {sign} {b}: {ones}; {last}; so {a} {sign} {b} = {result}."


def test_columns_of_two_digits_are_written_as_in_the_corpus():
    for a, b in itertools.product(range(10, 100), repeat=2):
        assert written_steps(a, "+", b) == two_columns(a, "+", b)
        if a >= b:
            assert written_steps(a, "-", b) == two_columns(a, "-", b)


def test_three_worked_solutions_word_by_word():
    assert written_steps(274, "+", 358) == (
        "274 + 358: 4 + 8 = 12, write 2 carry 1; 7 + 5 + 1 = 13, write 3 carry 1; "
        "2 + 3 + 1 = 6, write 6; so 274 + 358 = 632."
    )
    assert written_steps(502, "-", 135) == (
        "502 - 135: 12 - 5 = 7, write 7 borrow 1; 10 - 3 - 1 = 6, write 6 borrow 1; "
        "5 - 1 - 1 = 3, write 3; so 502 - 135 = 367."
    )
    assert written_steps(34, "*", 6) == (
        "34 * 6: 4 * 6 = 24, write 4 carry 2; 3 * 6 = 18, 18 + 2 = 20, write 20; so 34 * 6 = 204."
    )


def test_composed_completions_are_right_and_well_formed(asked):
    for example in itertools.chain(*asked.values()):
        thought, short = (chat(example)["messages"][-1]["content"] for chat in (worked, answered))
        assert accuracy(example, thought) == accuracy(example, short) == 1, example
        assert think_format(example, thought) == 1 and think_format(example, short) == 0
        assert reft_reward(example, f"The answer is {int(example['answer']) + 1}.") == 0.1


def test_lessons_hold_every_problem_and_a_fifth_as_many_other_dialogues(asked, world):
    chats = village.instructions(world, "val")
    examples = lessons(asked["val"], chats, dict.fromkeys(DIFFICULTIES, 1.0))
    assert len(examples) == 240 + 48
    taught = [example for example in examples if example["task"] in DIFFICULTIES]
    questions = {example["messages"][0]["content"] for example in taught}
    assert questions == {example["messages"][0]["content"] for example in asked["val"]}
    assert all(example["messages"][1]["content"].startswith("<think>") for example in taught)
    longer = [example for example in taught if len(example["messages"]) == 4]
    assert 10 <= len(longer) <= 40
    for example in longer:
        answer = example["messages"][3]["content"]
        assert final_answer(example["messages"][1]["content"]) == f"The answer is {answer}."


def test_of_each_difficulty_the_share_that_is_asked_for_is_worked(asked):
    shares = dict(zip(DIFFICULTIES, (0.0, 1.0, 0.5, 0.7, 0.0, 0.4)))
    examples = lessons(asked["train"], [], shares)
    worked_out = Counter(example["task"] for example in examples if "<think>" in str(example))
    total = Counter(example["task"] for example in examples)
    assert total == Counter(example["task"] for example in asked["train"])
    for task, share in shares.items():
        assert worked_out[task] / total[task] == pytest.approx(share, abs=0.06), task


def test_in_dialogues_with_calls_all_of_the_answer_but_results_is_trained_on(world, tokenizer):
    for example in tool_examples(world, "val"):
        ids, mask = tokenizer.render(example["messages"])
        said = example["messages"][1]["content"]
        expected = re.sub(r"<tool_result>.*?</tool_result>", "", said) + "<|end|>"
        assert tokenizer.decode([id for id, own in zip(ids, mask) if own]) == expected
