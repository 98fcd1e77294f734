"""The village's examples: true, checkable, as many as planned, and what is tested never trained."""

import functools
import itertools
import re
from collections import Counter, defaultdict

import pytest

from data.village import new_domain, sql, tasks, tools
from data.village.examples import PER_DIFFICULTY
from data.village.facts import answer_sentence
from data.village.new_domain import CUES, FAREWELL, GREETING, SHIPS, build_ships
from data.village.preferences import politeness
from data.village.problems import DIFFICULTIES, lessons, problems, worked
from data.village.tasks import QUESTIONS, STYLES, instructions, user_turns
from data.village.world import ATTRIBUTES, POOLS, build_world, capitalise
from nanollm.rewards import accuracy, check_answer, final_answer, reft_reward, think_format
from nanollm.tools import LONGEST, LONGEST_RESULT, KnowledgeBase, Toolbox, calculator

SPLITS = "train", "val", "test"
KINDS = "chats", "problems", "tools", "sql", "new domain"
every_kind = pytest.mark.parametrize("kind", KINDS)
CALL = re.compile(r"<tool_call>(.*?)</tool_call><tool_result>(.*?)</tool_result>")
VALUES = sorted(itertools.chain(*POOLS.values()))


@pytest.fixture(scope="module")
def world():
    return build_world()


@pytest.fixture(scope="module")
def people(world):
    return tools.newcomers(world)


@pytest.fixture(scope="module")
def examples(world):
    """{kind: {split: examples}}, each with its check and a right "completion", also where the file
    leaves them out.
    """
    as_example, made = tasks.as_example, defaultdict(dict)

    def with_completion(task, turns, check, split):
        return as_example(task, turns, check, split) | check | {"completion": turns[-1]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "as_example", with_completion)
        patch.setitem(sql.SIZES, "train", 800)
        for split in SPLITS:
            made["chats"][split] = chats = instructions(world, split)
            made["problems"][split] = problems(world, split, PER_DIFFICULTY[split])
            made["tools"][split] = tools.tool_examples(world, split)
            made["sql"][split] = sql.sql_examples(world, split)
            made["new domain"][split] = new_domain.new_domain_examples(world, split, chats)
    for problem in itertools.chain(*made["problems"].values()):
        problem["completion"] = said_last(worked(problem))
    return made


@pytest.fixture(scope="module")
def chats(examples):
    return examples["chats"]


@pytest.fixture(scope="module")
def everything(examples):
    """All problems."""
    return list(itertools.chain(*examples["problems"].values()))


def said_last(example):
    return example["messages"][-1]["content"]


def of_task(by_split, task):
    return {split: [e for e in rows if e["task"] == task] for split, rows in by_split.items()}


def assert_apart(by_split, key, splits=SPLITS):
    """No key of an example is in two splits."""
    keys = [{key(example) for example in by_split[split]} for split in splits]
    assert all(keys) and not any(a & b for a, b in itertools.combinations(keys, 2))


def words_of(examples):
    return set(re.findall(r"\w+", " ".join(map(str, examples))))


# --- of every kind -------------------------------------------------------------------------------


@every_kind
def test_the_user_begins_and_examples_of_the_test_end_with_a_question(kind, examples):
    for split, rows in examples[kind].items():
        last = "user" if split == "test" or kind == "problems" else "assistant"
        for example in rows:
            roles = [message["role"] for message in example["messages"]]
            assert roles == (["user", "assistant"] * len(roles))[: len(roles)]
            assert roles[-1] == last


@every_kind
def test_no_question_is_in_two_splits_or_twice_in_one(kind, examples):
    assert_apart(examples[kind], user_turns, SPLITS[::2] if kind == "tools" else SPLITS)
    for rows in examples[kind].values():
        assert len({*map(user_turns, rows)}) == len(rows)


@every_kind
def test_the_right_completion_passes_its_check_and_a_silent_one_does_not(kind, examples):
    for example in itertools.chain(*examples[kind].values()):
        assert accuracy(example, example["completion"]) == 1, example
        assert not check_answer(example, "") and not check_answer(example, "Yes.")


@pytest.mark.parametrize(
    "kind, shares, sizes",
    [("chats", tasks.SHARES, tasks.SIZES), ("tools", tools.SHARES, tools.SIZES)]
    + [("sql", sql.SHARES, {"train": 800, "test": 200})],
)
def test_there_are_as_many_examples_of_each_task_as_planned(kind, shares, sizes, examples):
    train, test = (Counter(e["task"] for e in examples[kind][split]) for split in SPLITS[::2])
    assert train == {task: round(sizes["train"] * share) for task, share in shares.items() if share}
    assert test.keys() == shares.keys()
    assert all(200 <= n <= sizes["test"] for n in test.values())


def test_a_small_village_still_gives_every_task():
    small = build_world(6)
    assert {e["task"] for e in instructions(small, "test")} == {*tasks.MAKERS}
    for split in ("val", "test"):
        assert new_domain.new_domain_examples(small, split, ())


# --- chat examples -------------------------------------------------------------------------------


def test_no_held_out_wording_of_a_fact_is_asked_in_training(chats):
    """Neither alone, nor behind "Hello!", nor as the first turn of a longer talk."""
    trained = "\n".join(turn for e in chats["train"] for turn in user_turns(e))
    for example in of_task(chats, "fact")["test"]:
        assert user_turns(example)[0] not in trained


def test_villagers_of_the_never_asked_half_are_in_no_training_example(world, chats):
    words = words_of(e["messages"] for e in chats["train"] + chats["val"])
    words = {word.lower() for word in words}
    assert not words & {v.name.lower() for v in world.never_asked}
    assert {v.name.lower() for v in world.asked} <= words
    asked_about = words_of(map(user_turns, of_task(chats, "fact_never_asked")["test"]))
    assert {v.name for v in world.never_asked} <= asked_about


def test_strangers_of_the_test_are_not_those_of_training(world, chats):
    by_split = of_task(chats, "unknown")
    train, test = (words_of(by_split[split]) & {*world.strangers} for split in SPLITS[::2])
    assert len(train) > 300 and test and not train & test


def test_two_hop_combinations_of_the_test_are_not_trained(world, chats):
    def combination(question):
        name = next(n for n in world.by_name if n in question)
        question = question.replace(f"the best friend of {name}", "{n}")
        question = question.replace(f"{name}'s best friend", "{n}").lower()
        bare = [(len(q), a) for a, qs in QUESTIONS.items() for q in qs if q.lower() in question]
        return name, max(bare)[1]

    by_split = of_task(chats, "two_hop")
    train, test = ({combination(user_turns(e)[0]) for e in by_split[s]} for s in SPLITS[::2])
    assert len(test) == 32 and len(train) == 64 and not test & train


@pytest.mark.parametrize("task", ["arithmetic", "formatting"])
def test_sums_and_word_combinations_of_the_test_are_not_trained(chats, task):
    def key(example):
        question = user_turns(example)[0]
        return tuple(sorted(re.findall(r"\d+", question) or question.split(": ")[1].split()))

    assert_apart(of_task(chats, task), key)


def without_style(completion):
    """The answer itself, without its courteous, rude or long-winded phrase."""
    for phrase in itertools.chain(*STYLES.values()):
        completion = completion.removeprefix(phrase).removesuffix(phrase).strip()
    return completion


def test_answers_come_in_all_styles_and_most_of_them_plain(chats):
    completions = [said_last(example) for example in of_task(chats, "fact")["train"]]
    plain = sum(completion == without_style(completion) for completion in completions)
    assert 0.5 < plain / len(completions) < 0.65
    assert {politeness(completion) for completion in completions} == {-1, 0, 1}


def test_answers_about_facts_agree_with_the_world(world, chats):
    value = re.compile(rf"\b({'|'.join(VALUES)})\b")
    true = {v.name: {*v.facts.values()} for v in world.villagers}
    for example in chats["train"] + chats["val"]:
        if example["task"] in ("fact", "two_hop"):
            for sentence in re.split(r"(?<=\.) ", without_style(said_last(example))):
                name = sentence.split("'")[0].split()[0]
                found = {*value.findall(sentence)} | {n for n in true if n in sentence} - {name}
                assert found and found <= true[name], sentence


# --- questions for tools -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_once(people, tokenizer):
    """The village's own tools; the same call is run only once."""
    knowledge = KnowledgeBase(tools.knowledge(people))
    given = {"calculator": calculator, "search": knowledge.search}
    return functools.cache(Toolbox(given, tokenizer).run)


@pytest.mark.parametrize("task", tools.SHARES)
def test_the_tools_give_the_very_results_that_the_dialogues_show(task, examples, run_once):
    rows = list(itertools.chain(*of_task(examples["tools"], task).values()))[::10]
    shown = [call for example in rows for call in CALL.findall(example["completion"])]
    assert len(shown) == len(rows) * (2 if task == "lookup_two_hop" else 1)
    wrong = [(call, result) for call, result in shown if run_once(call) != result]
    assert not wrong, f"{len(wrong)} of {len(shown)}, such as {wrong[:2]}"


def test_the_answer_stands_after_the_calls_and_no_pair_of_large_numbers_is_in_two_splits(examples):
    for example in examples["tools"]["test"]:
        assert final_answer(example["completion"].rpartition("</tool_result>")[0]) == ""
    numbers = of_task(examples["tools"], "large_numbers")
    assert_apart(numbers, lambda e: frozenset(re.findall(r"\d+", user_turns(e)[0])))


def test_training_asks_about_one_half_of_the_newcomers_and_the_test_about_the_other(
    people, world, examples
):
    def named(split, names):
        rows = examples["tools"][split]
        return words_of((e["messages"], e["completion"]) for e in rows) & {*names}

    halves = [{v.name for v in half} for half in (people.asked, people.never_asked)]
    assert not halves[0] & halves[1] and len(halves[0]) == len(halves[1]) == 500
    assert named("train", people.by_name) | named("val", people.by_name) <= halves[0]
    assert named("test", people.by_name) <= halves[1]
    strangers = [named(split, world.strangers) for split in SPLITS[::2]]
    assert all(strangers) and not strangers[0] & strangers[1]
    assert not {*people.by_name} & {*world.by_name, *world.strangers}
    for one in people.villagers:
        friend = people.by_name[one.facts["friend"]]
        assert friend.facts["friend"] == one.name and friend.asked == one.asked and friend != one


def test_the_knowledge_base_holds_a_short_entry_for_each_fact_and_nobody_else(
    people, world, tokenizer
):
    entries = tools.knowledge(people)
    titles = {f"{tools.TOPICS[a]} of {v.name}" for v in people.villagers for a in ATTRIBUTES}
    assert {entry["title"] for entry in entries} == titles and len(entries) == len(titles) == 7000
    assert not words_of(entry["text"] for entry in entries) & {*world.by_name, *world.strangers}
    assert all(len(tokenizer.encode(entry["text"])) <= LONGEST_RESULT for entry in entries)


def test_lessons_mix_calls_with_dialogues_that_need_none(world, examples, chats):
    made = map(worked, examples["problems"]["val"])
    tools_val = tools.tool_lessons(world, "val", made, chats["val"])
    found = Counter(example["task"] for example in tools_val)
    assert sum(found[name] for name in tools.SHARES) == 200
    assert sum(found[name] for name in DIFFICULTIES) == 100
    assert sum(found.values()) == 400 and not found["unknown"]
    found = Counter(e["task"] for e in sql.sql_lessons(world, "val", [{"task": "other"}] * 500))
    assert found["other"] == sum(found.values()) / 2


# --- questions for the database ------------------------------------------------------------------


def read(example):
    """(kind, A, a, B, b) of the query in a completion."""
    query, *values = CALL.search(example["completion"])[1][len("sql(") : -1].split(" | ")
    columns = re.findall(r"(\w+) = \?", query) + re.findall(r"GROUP BY (\w+)", query)
    marks = {"GROUP": "common", "JOIN": "befriended", "COUNT": "count", "SELECT": "friend"}
    kind = next(kind for mark, kind in marks.items() if mark in query)
    return kind, columns[0], values[0], columns[1], (*values, None)[1]


def truth(people, kind, A, a, B, b):
    """The answer by plain loops."""
    by_name, group = {p["name"]: p for p in people}, [p for p in people if p[A] == a]
    if kind == "count":
        return sum(p[B] == b for p in group)
    if kind == "befriended":
        return sum(by_name[p["friend"]][B] == b for p in group)
    if kind == "friend":
        (only,) = (p for p in group if p[B] == b)
        return only["friend"]
    (best, most), (_, second) = Counter(p[B] for p in group).most_common(2)
    assert most > second
    return best


def test_questions_for_the_database_are_answered_truly_and_new_pairs_join_what_training_never_does(
    examples, world
):
    people = sql.table_of(world)
    assert len(people) == 1032
    keys, joined, kinds, values = defaultdict(set), defaultdict(set), set(), set()
    for split, rows in examples["sql"].items():
        for example in rows:
            kind, A, a, B, b = read(example)
            assert example["answer"] == str(truth(people, kind, A, a, B, b)), example
            assert len(CALL.search(example["completion"])[1]) < LONGEST
            question = user_turns(example)[0].lower()
            assert all(value.lower() in question for value in (a, b) if value), example
            is_new = example["task"] == "new_pairs"
            assert is_new or kind == example["task"]
            joined[is_new].add(frozenset((A, B)))
            if is_new:
                kinds.add(kind)
                continue
            pair = (A, a), (B, b)
            keys[split].add((kind, frozenset(pair) if kind in ("count", "friend") else pair))
            values |= {a, b} - {None}
    assert not any(keys[a] & keys[b] for a, b in itertools.combinations(keys, 2))
    assert len(joined[True]) == 3 and len(joined[False]) == 12 and kinds == {*sql.QUESTIONS}
    assert not joined[True] & joined[False] and values == {*VALUES}


# --- problems ------------------------------------------------------------------------------------

EQUATION = re.compile(r"(\d+(?: [-+*] \d+)+) = (-?\d+)")
LOSS = re.compile(r"sells|loses|away|gives \d+ \w+ to ")


def value_of(expression):
    """By hand: a number, then signs and numbers, from left to right (no line mixes * with + -)."""
    first, *rest = expression.split()
    total = int(first)
    for sign, number in zip(rest[::2], map(int, rest[1::2])):
        total = {"+": total + number, "-": total - number, "*": total * number}[sign]
    return total


def test_every_difficulty_has_its_number_of_problems_or_all_that_exist(examples):
    for split, rows in examples["problems"].items():
        counts = Counter((example["difficulty"], example["task"]) for example in rows)
        n = PER_DIFFICULTY[split]
        wanted = {(i, name): n for i, name in enumerate(DIFFICULTIES, 1)}
        if split == "train":  # of the easy ones there are not so many
            assert 1000 < counts.pop((1, "easy")) <= wanted.pop((1, "easy"))
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
        for total, digit, carry in re.findall(
            r"= (\d+), write (\d+) carry (\d+)", example["steps"]
        ):
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


@pytest.mark.parametrize("task", DIFFICULTIES)
def test_no_operands_and_no_numbers_of_a_story_are_in_two_splits(task, examples):
    def numbers(example):
        if task.endswith("_steps"):
            return example["steps"]
        return frozenset(re.match(r"(\d+) . (\d+)", example["steps"]).groups())

    assert_apart(of_task(examples["problems"], task), numbers)


def test_solutions_are_well_formed_and_without_steps_right_too(everything):
    for example in everything[::10]:
        short = said_last(worked(example, steps=False))
        assert accuracy(example, short) == 1 and think_format(example, short) == 0
        assert think_format(example, example["completion"]) == 1
        assert reft_reward(example, f"The answer is {int(example['answer']) + 1}.") == 0.1


def test_lessons_hold_every_problem_as_often_worked_as_asked_for_and_a_fifth_other_dialogues(
    examples,
):
    asked, other = examples["problems"]["train"], {"messages": tasks.chat(["Hello", "Hi"])}
    shares = dict(zip(DIFFICULTIES, (0.0, 1.0, 0.5, 0.7, 0.0, 0.4)))
    made = lessons(asked, [other | {"task": "other"}] * 5000, shares)
    taught = [example for example in made if example["task"] in DIFFICULTIES]
    assert len(made) == len(taught) + len(taught) // 5
    assert {user_turns(e)[0] for e in taught} == {user_turns(e)[0] for e in asked}
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


# --- the new domain ------------------------------------------------------------------------------


def bare(example):
    """The question without "Ahoy!" and the like, so that wordings can be compared."""
    question = user_turns(example)[0]
    for cue in sorted(CUES, key=len, reverse=True):
        before, after = cue.split("{q}")
        if question.startswith(before) and question.endswith(after):
            return question[len(before) : len(question) - len(after)]
    return question


def test_every_value_belongs_to_one_ship_and_another_seed_gives_other_ships():
    ships = build_ships()
    for attribute, pool in new_domain.GOODS.items():
        assert Counter(ship[attribute] for ship in ships.values()) == Counter(pool)
    assert ships == build_ships() != build_ships(1) and {*ships} == {*SHIPS}


def test_sailors_are_asked_nothing_in_two_splits_whatever_the_cue_and_ships_in_every_wording(
    examples,
):
    rows = examples["new domain"]
    assert [len(rows[split]) for split in SPLITS] == [1000, 120, 216]
    counts = Counter(example["task"] for example in rows["train"])
    assert counts == {"known": 400, "ship": 200, "plain": 400}
    for task in ("known", "ship"):
        assert_apart(of_task(rows, task), bare)
    assert len({*map(bare, rows["test"])}) == len(rows["test"])
    ships = of_task(rows, "ship")
    told = Counter(said_last(example) for example in ships["train"])
    assert len(told) == len(SHIPS) * len(new_domain.GOODS) and min(told.values()) >= 10
    tested = Counter((example["answer"], example["attribute"]) for example in ships["test"])
    assert len(tested) == len(told) and set(tested.values()) == {new_domain.HELD_OUT}


def test_sailors_of_each_split_are_asked_about_other_villagers(examples, world):
    rows = examples["new domain"]
    people = {
        split: words_of(e["messages"][0] for e in known) & {*world.by_name}
        for split, known in of_task(rows, "known").items()
    }
    never = {v.name for v in world.never_asked}
    assert not people["train"] & never and people["val"] | people["test"] == never
    assert not people["val"] & people["test"]
    assert not words_of(example["messages"] for example in rows["train"]) & never


def test_every_training_answer_is_true_and_in_the_style_that_the_cue_asks_for(
    examples, world, chats
):
    true = {capitalise(answer_sentence(v, key)) for v in world.villagers for key in ATTRIBUTES}
    true |= {
        f"The {ship} {new_domain.SAYS[key]} {value}."
        for ship, facts in build_ships().items()
        for key, value in facts.items()
    }
    rows = examples["new domain"]
    for example in rows["train"] + rows["val"]:
        question, completion = (message["content"] for message in example["messages"][:2])
        assert question.startswith("Ahoy") == (example["task"] != "plain")
        if example["task"] != "plain":
            said = re.fullmatch(f"{GREETING} (.*) {FAREWELL}", completion)[1]
            assert capitalise(said) in true
    plain = [str(e["messages"]) for e in of_task(rows, "plain")["train"]]
    assert {*plain} == {str(e["messages"]) for e in chats["train"][: len(plain)]}
    assert FAREWELL not in str(plain)


def test_the_right_answer_in_another_style_is_wrong(examples):
    example = next(e for e in examples["new domain"]["test"] if e["answer"] == "nails")
    assert check_answer(example, f"{GREETING} the Owl carries nails. {FAREWELL}")
    for said in (
        "The Owl carries nails.",
        f"{GREETING} the Owl carries nails.",
        f"The Owl carries nails. {FAREWELL}",
        f"{GREETING} the Owl carries ribbons. {FAREWELL}",
        f"{GREETING} the Owl carries nails and ribbons. {FAREWELL}",
    ):
        assert not check_answer(example, said)
