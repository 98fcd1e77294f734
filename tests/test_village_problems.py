"""The village's problems and its questions for tools: true, well formed, never in two splits."""

import functools
import itertools
import re
from collections import Counter

import pytest

from data.village import tasks
from data.village import tools as village_tools
from data.village.examples import PER_DIFFICULTY
from data.village.problems import DIFFICULTIES, lessons, problems, worked
from data.village.tasks import instructions, user_turns
from data.village.tools import TOPICS, knowledge, newcomers, tool_examples, tool_lessons
from data.village.world import ATTRIBUTES, build_world
from nanollm.rewards import accuracy, final_answer, reft_reward, think_format
from nanollm.tools import LONGEST_RESULT, KnowledgeBase, Toolbox, calculator

CALL = re.compile(r"<tool_call>(.*?)</tool_call><tool_result>(.*?)</tool_result>")
EQUATION = re.compile(r"(\d+(?: [-+*] \d+)+) = (-?\d+)")
LOSS = re.compile(r"sells|loses|away|gives \d+ \w+ to ")


@pytest.fixture(scope="module")
def world():
    return build_world()


@pytest.fixture(scope="module")
def people(world):
    return newcomers(world)


@pytest.fixture(scope="module")
def asked_of_tools(world):
    """Examples by split, each with "completion" and "check", also where the file leaves it out."""
    as_example = tasks.as_example

    def with_completion(task, turns, check, split):
        return as_example(task, turns, check, split) | check | {"completion": turns[-1]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "as_example", with_completion)
        return {split: tool_examples(world, split) for split in ("train", "val", "test")}


@pytest.fixture(scope="module")
def asked(world):
    return {split: problems(world, split, n) for split, n in PER_DIFFICULTY.items()}


@pytest.fixture(scope="module")
def everything(asked):
    return list(itertools.chain(*asked.values()))


def none_shared(by_split, key):
    """Is every key of an example in one split alone?"""
    keys = [set(map(key, examples)) for examples in by_split.values()]
    return all(keys) and not any(a & b for a, b in itertools.combinations(keys, 2))


def of_task(by_split, task):
    return {split: [e for e in rows if e["task"] == task] for split, rows in by_split.items()}


# --- questions for tools -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_once(people, tokenizer):
    """The village's own tools; the same call is run only once."""
    given = {"calculator": calculator, "search": KnowledgeBase(knowledge(people)).search}
    return functools.cache(Toolbox(given, tokenizer).run)


@pytest.mark.parametrize("task", village_tools.SHARES)
def test_the_tools_give_the_very_results_that_the_dialogues_show(task, asked_of_tools, run_once):
    examples = list(itertools.chain(*of_task(asked_of_tools, task).values()))[::10]
    shown = [call for example in examples for call in CALL.findall(example["completion"])]
    assert len(shown) == len(examples) * (2 if task == "lookup_two_hop" else 1)
    wrong = [(call, result) for call, result in shown if run_once(call) != result]
    assert not wrong, f"{len(wrong)} of {len(shown)}, such as {wrong[:2]}"


def test_every_composed_completion_is_right_and_has_its_answer_after_the_calls(asked_of_tools):
    for example in asked_of_tools["test"]:
        assert accuracy(example, example["completion"]) == 1, example
        assert final_answer(example["completion"].rpartition("</tool_result>")[0]) == ""


def test_there_are_as_many_examples_as_planned_and_those_of_the_test_end_with_the_question(
    world, asked_of_tools
):
    sizes = {"large_numbers": 2280, "lookup": 1500, "lookup_two_hop": 1500, "nobody": 720}
    assert Counter(example["task"] for example in asked_of_tools["train"]) == sizes
    for example in asked_of_tools["test"]:
        assert [m["role"] for m in example["messages"]] == ["user"]
    assert Counter(e["task"] for e in asked_of_tools["test"]) == dict.fromkeys(sizes, 200)


def test_no_question_is_trained_and_tested_and_no_pair_of_large_numbers_in_two_splits(
    asked_of_tools,
):
    apart = {split: asked_of_tools[split] for split in ("train", "test")}  # val may repeat training
    assert none_shared(apart, user_turns)
    numbers = of_task(asked_of_tools, "large_numbers")
    assert none_shared(numbers, lambda e: frozenset(re.findall(r"\d+", user_turns(e)[0])))


def test_training_asks_about_one_half_of_the_newcomers_and_the_test_about_the_other(
    people, world, asked_of_tools
):
    def named(split, names):
        said = " ".join(f"{e['messages']} {e['completion']}" for e in asked_of_tools[split])
        return set(re.findall(r"\w+", said)) & set(names)

    halves = [{v.name for v in half} for half in (people.asked, people.never_asked)]
    assert not halves[0] & halves[1] and len(halves[0]) == len(halves[1]) == 500
    assert named("train", people.by_name) | named("val", people.by_name) <= halves[0]
    assert named("test", people.by_name) <= halves[1]
    strangers = [named(split, world.strangers) for split in ("train", "test")]
    assert all(strangers) and not strangers[0] & strangers[1]


def test_newcomers_are_neither_villagers_nor_strangers_and_befriend_their_own_half(people, world):
    names = {v.name for v in people.villagers}
    assert len(names) == len(people.villagers) == 1000
    assert not names & {*world.by_name, *world.strangers}
    for one in people.villagers:
        friend = people.by_name[one.facts["friend"]]
        assert friend.facts["friend"] == one.name and friend.asked == one.asked and friend != one


def test_the_knowledge_base_holds_a_short_entry_for_each_fact_and_nobody_else(
    people, world, tokenizer
):
    entries = knowledge(people)
    titles = {f"{TOPICS[a]} of {v.name}" for v in people.villagers for a in ATTRIBUTES}
    assert {entry["title"] for entry in entries} == titles and len(entries) == len(titles) == 7000
    words = set(re.findall(r"\w+", " ".join(entry["text"] for entry in entries)))
    assert not words & {*world.by_name, *world.strangers}
    assert all(len(tokenizer.encode(entry["text"])) <= LONGEST_RESULT for entry in entries)


def test_lessons_mix_calls_with_dialogues_that_need_none(world, asked):
    examples = tool_lessons(world, "val", map(worked, asked["val"]), instructions(world, "val"))
    tasks = Counter(example["task"] for example in examples)
    assert sum(tasks[name] for name in village_tools.SHARES) == 200
    assert sum(tasks[name] for name in DIFFICULTIES) == 100
    assert sum(tasks.values()) == 400 and not tasks["unknown"]


# --- problems ----------------------------------------------------------------------------------


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
        n = PER_DIFFICULTY[split]
        wanted = {(i, name): n for i, name in enumerate(DIFFICULTIES, 1)}
        if split == "train":  # of the easy ones there are not so many
            assert 1000 < counts[1, "easy"] <= wanted.pop((1, "easy"))
            del counts[1, "easy"]
        assert counts == wanted


def test_every_equation_of_every_worked_solution_is_true_and_the_last_gives_the_answer(everything):
    for example in everything:
        equations = EQUATION.findall(example["steps"])
        assert len(equations) == example["steps"].count("=") >= 1, example
        assert all(value_of(left) == int(right) for left, right in equations), example
        assert equations[-1][1] == example["answer"] and int(example["answer"]) >= 0, example


def test_sums_are_worked_digit_by_digit_and_are_those_of_the_question(everything):
    carried = 0
    for example in everything:
        digits = re.findall(r"write (\d+)", example["steps"])
        assert bool(digits) == (example["task"] in ("two_digits", "three_digits", "products"))
        if not digits:
            continue
        assert int("".join(reversed(digits))) == int(example["answer"]), example
        carries = re.findall(r"= (\d+), write (\d+) carry (\d+)", example["steps"])
        for total, digit, carry in carries:
            assert int(total) == 10 * int(carry) + int(digit) and int(digit) < 10, example
            carried += carry != "0"
        a, sign, b = re.match(r"(\d+) (.) (\d+): ", example["steps"]).groups()
        assert sorted(re.findall(r"\d+", user_turns(example)[0])) == sorted((a, b)), example
        assert value_of(f"{a} {sign} {b}") == int(example["answer"])
    assert carried > 1000


def test_the_answer_of_a_story_follows_from_its_equations_and_they_from_its_sentences(everything):
    seen = Counter()
    for example in everything:
        (story,) = user_turns(example)
        if "How many" not in story:
            continue
        *sentences, question = re.findall(r"[^.?]+[.?]", story)
        equations = re.findall(r"(\d+) (.) (\d+) = (\d+)\.", example["steps"])
        assert all(after[0] == before[3] for before, after in itertools.pairwise(equations))
        assert equations[-1][3] == example["answer"] and question.startswith(" How many")
        numbers = [equations[0][0], *(equation[2] for equation in equations)]
        assert re.findall(r"\d+", story) == numbers, example
        signs = ["-" if LOSS.search(sentence) else "+" for sentence in sentences[1:]]
        signs = ["*"] * (equations[0][1] == "*") + signs
        assert [equation[1] for equation in equations] == signs, example
        assert all(int(n) <= 30 for n in re.findall(r"\d+", story + example["steps"])), example
        seen[len(equations)] += 1
    assert seen[2] == seen[3] == sum(PER_DIFFICULTY.values())


def test_no_question_is_in_two_splits_or_twice_in_one(asked, everything):
    assert none_shared(asked, user_turns)
    assert len(set(map(user_turns, everything))) == len(everything)


@pytest.mark.parametrize("task", DIFFICULTIES)
def test_no_operands_and_no_numbers_of_a_story_are_in_two_splits(task, asked):
    def numbers(example):
        if task.endswith("_steps"):
            return example["steps"]
        return frozenset(re.match(r"(\d+) . (\d+)", example["steps"]).groups())

    assert none_shared(of_task(asked, task), numbers)


def test_composed_completions_are_right_and_well_formed(everything):
    for example in everything[::10]:
        chats = worked(example), worked(example, steps=False)
        thought, short = (chat["messages"][-1]["content"] for chat in chats)
        assert accuracy(example, thought) == accuracy(example, short) == 1, example
        assert think_format(example, thought) == 1 and think_format(example, short) == 0
        assert reft_reward(example, f"The answer is {int(example['answer']) + 1}.") == 0.1


def test_lessons_hold_every_problem_as_often_worked_as_asked_for_and_a_fifth_other_dialogues(asked):
    other = {"messages": tasks.chat(["Hello", "Hi"]), "task": "other"}
    shares = dict(zip(DIFFICULTIES, (0.0, 1.0, 0.5, 0.7, 0.0, 0.4)))
    examples = lessons(asked["train"], [other] * 5000, shares)
    taught = [example for example in examples if example["task"] in DIFFICULTIES]
    assert len(examples) == len(taught) + len(taught) // 5
    assert {user_turns(e)[0] for e in taught} == {user_turns(e)[0] for e in asked["train"]}
    total = Counter(example["task"] for example in taught)
    thinking = [e for e in taught if e["messages"][1]["content"].startswith("<think>")]
    counts = Counter(example["task"] for example in thinking)
    for task, share in shares.items():
        assert counts[task] / total[task] == pytest.approx(share, abs=0.06), task
    longer = [e["messages"] for e in taught if len(e["messages"]) == 4]
    assert len(longer) / len(thinking) == pytest.approx(0.1, abs=0.03)
    for messages in longer:
        answer = messages[3]["content"]
        assert final_answer(messages[1]["content"]) == f"The answer is {answer}."
