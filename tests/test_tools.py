"""Tools, the dialogues that teach them, and rewards by rules: exact results, and a short text or a
number in bounded time whatever a model may write.
"""

import contextlib
import functools
import itertools
import json
import random
import re
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data import village
from data.village import tools as village_tools
from data.village.problems import DIFFICULTIES, answered, lessons, problems, worked
from data.village.sums import written_steps
from data.village.tasks import user_turns
from data.village.tools import NOTHING, TOPICS, knowledge, newcomers, tool_examples, tool_lessons
from data.village.world import ATTRIBUTES, build_world
from nanollm import generate as engine
from nanollm import toolformer
from nanollm import tools as tools_module
from nanollm.batches import pad_completions
from nanollm.config import UserError
from nanollm.generate import generate, stream
from nanollm.gpt import GPT, GPTConfig
from nanollm.metrics import majority, pass_at_k
from nanollm.rewards import (
    accuracy,
    check_answer,
    final_answer,
    last_number,
    reft_reward,
    think_format,
)
from nanollm.tokenizer import Tokenizer
from nanollm.toolformer import answer_losses, filter_calls, sampled_calls
from nanollm.tools import LONGEST, LONGEST_RESULT, KnowledgeBase, Toolbox, calculator

ROOT = Path(__file__).parents[1]
MEGABYTES = 10 * 2**20
MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_result>", "</tool_result>")
ALPHABETS = (
    "0123456789+-*/%(). ,",
    "12()**//%",
    [chr(i) for i in range(128)],
    [*"٣１²½∞−×÷πéßǅ中0+(", "\0", "\ud800", "\udfff", "\u202e", "\u2028", "\xa0", "😀", "e\u0301"],
    ["9**", "(", ")", "lambda", "__import__", "'", '"""', "0x", "1e9", "1e999", ":=", "[", "{",
     "if", "else", "for x in", "1j", "_", "~", "<<", "@", "f'{", "#", "\n", "not", " ", "0", "\\"],
    [*MARKS, "4", "-", ".", ",", " ", "The answer is ", "\n", "<", "think>", "search(", ")"],
)  # fmt: skip


def random_strings(n, seed):
    """Mostly short ones, some around the longest that is allowed."""
    rng = random.Random(seed)
    for _ in range(n):
        length = rng.choice((rng.randint(0, 8), rng.randint(0, 40), rng.randint(0, 250)))
        yield "".join(rng.choices(rng.choice(ALPHABETS), k=length))


def seconds(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


# --- calculator --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "expression, result",
    [
        ("2 + 2", "4"), ("48213 * 7", "337491"), ("2 + 3 * 4", "14"), ("(2 + 3) * 4", "20"),
        ("10 - 4 - 3", "3"),
        ("123456789012345678901234567890 + 1", "123456789012345678901234567891"),
        ("99999999999999999999 * 99999999999999999999", "9999999999999999999800000000000000000001"),
        ("10**40", "1" + 40 * "0"), ("-10**40", "-1" + 40 * "0"), ("-5", "-5"), ("--5", "5"),
        ("3 - -4", "7"), ("+7", "7"), ("-2**2", "-4"), ("(-2)**2", "4"), ("2**3**2", "512"),
        ("2**-2", "0.25"), ("(-1)**(10**30 + 1)", "-1"), ("1**10**9", "1"), ("7 // 2", "3"),
        ("-7 // 2", "-4"), ("7.5 // 2", "3"), ("7 % 3", "1"), ("-7 % 3", "2"), ("10 / 4", "2.5"),
        ("1 / 3", "0.333333"), ("2 / 3", "0.666667"), ("1 / 7 * 7", "1"), ("6 / 3", "2"),
        ("1,000 * 3", "3000"), ("1,234,567 + 1", "1234568"), ("  1 + 1\n", "2"),
        (99 * "(" + "1" + 99 * ")", "1"),
    ],
)  # fmt: skip
def test_the_calculator_is_exact(expression, result):
    assert calculator(expression) == result


@pytest.mark.parametrize("expression, result", [("0**2", "0"), ("0**1", "0"), ("0**0", "1")])
def test_zero_to_any_power_is_zero_but_to_the_zeroth(expression, result):
    assert calculator(expression) == result


@pytest.mark.parametrize(
    "expression, result",
    [
        ("0.5 + 0.25", "0.75"), ("0.1 + 0.2", "0.3"), ("0.1 + 0.2 - 0.3", "0"),
        ("0.1 * 0.1 * 0.1", "0.001"), ("1.1 ** 3", "1.331"), ("0.3 // 0.1", "3"),
        ("0.3 % 0.1", "0"), ("1.5 * 2", "3"), (".5 * 4", "2"), ("12.50 * 4", "50"),
    ],
)  # fmt: skip
def test_decimals_mean_the_number_that_is_written(expression, result):
    assert calculator(expression) == result


@pytest.mark.parametrize(
    "expression, result",
    [
        ("10**39 / 3", "3" * 39 + ".333333"),
        ("-10**20 / 7", "-14285714285714285714.285714"),
        ("12345678901234567.25", "12345678901234567.25"),
        ("1.2345678901234567e17", "123456789012345670"),
        ("0.1234567890123456789 * 10**19", "1234567890123456789"),
        ("1999999.9999999", "2000000"), ("-1.9999999", "-2"), ("1e3", "1000"), ("1_0.5", "10.5"),
        ("1e999999999", "error: too large"), ("0e999999999", "error: too large"),
    ],
)  # fmt: skip
def test_no_digit_is_made_up(expression, result):
    assert calculator(expression) == result


@pytest.mark.parametrize("value", [1234567.5, 99999999.25])
def test_a_large_fraction_can_be_read_as_a_number(value):
    assert abs(last_number(calculator(str(value))) - Fraction(value)) < 1e-4 * value


@pytest.mark.parametrize("expression", ["1 / 0", "7 // 0", "7 % 0", "1 / (2 - 2)", "0 ** -1"])
def test_a_division_by_zero_is_said_to_be_one(expression):
    assert calculator(expression) == "error: division by zero"


@pytest.mark.parametrize(
    "expression",
    [
        "9**9**9",
        "9**-9**9",
        "10**40 + 1",
        "2**200",
        "(1/3)**100",
        "1e30 * 1e30",
        "-10**41",
        "9**9**9**9",
    ],
)
def test_a_number_too_large_is_said_to_be_one(expression):
    assert calculator(expression) == "error: too large"


@pytest.mark.parametrize(
    "expression",
    [
        "", " ", "\0", "1 + \0", "٣ + ٣", "１ + １", "2²", "½", "2 × 3", "x", "pi", "None", "True",
        "1 + True", "abs(1)", "__import__('os')", "__import__('os').system('true')", "().__class__",
        "'a'", "'a' * 3", "b'1'", "f'{1}'", "1 < 2", "1 == 1", "1 and 2", "not 1", "1 if 1 else 2",
        "lambda: 1", "(x := 2)", "[1][0]", "{1}", "1; 2", "1\n2", "x = 1", "1j", "~1", "1 << 3",
        "1 | 2", "1 @ 2", "2 ** 0.5", "(-8) ** (1/3)", "1 +", "* 2", "1 2", "(1", "1)", "...",
        "\ud800", "nan", "inf", "2 + 2 =",
    ],
)  # fmt: skip
def test_what_is_no_arithmetic_is_said_to_be_none(expression):
    assert calculator(expression) == "error: not arithmetic"


@pytest.mark.parametrize(
    "expression",
    [
        10_000 * "(" + "1" + 10_000 * ")",
        10_000 * "-" + "1",
        MEGABYTES * "9",
        MEGABYTES // 2 * "9*" + "9",
        MEGABYTES * "é",
        (LONGEST + 1) * "1",
    ],
    ids=["parentheses", "signs", "digits", "products", "words", "a little too long"],
)
def test_a_long_text_is_refused_at_once(expression):
    assert calculator(expression) == f"error: longer than {LONGEST} characters"
    assert seconds(calculator, expression) < 1


def test_the_calculator_answers_ten_thousand_random_strings_with_a_short_text_and_at_once():
    for text in random_strings(10_000, seed=0):
        start = time.perf_counter()
        result = calculator(text)
        assert time.perf_counter() - start < 1, repr(text)
        assert isinstance(result, str) and 0 < len(result) < 60, repr(text)
        assert result.startswith("error") or last_number(result) is not None, repr(text)


def random_expression(rng, depth=3):
    """Whole numbers, operators and parentheses, a few of them needless, many of them missing."""
    if depth == 0 or rng.random() < 0.2:
        power = f"**{rng.randint(0, 3)}" if rng.random() < 0.2 else ""
        return f"{rng.choice(('', '', '-'))}{rng.randint(0, 99)}{power}"
    sides = (random_expression(rng, depth - 1) for _ in range(2))
    left, right = (f"({side})" if rng.random() < 0.5 else side for side in sides)
    return f"{left} {rng.choice(('+', '-', '*', '*', '//', '%', '/'))} {right}"


def test_random_expressions_have_the_value_that_exact_fractions_give():
    rng, seen = random.Random(0), Counter()
    for _ in range(3000):
        text = random_expression(rng)
        try:
            value = Fraction(eval(re.sub(r"(?<!\*\*)\b\d+", r"Fraction(\g<0>)", text)))
        except ZeroDivisionError:
            seen["by zero"] += 1
            assert calculator(text) == "error: division by zero", text
            continue
        if value.denominator == 1:
            seen["whole"] += 1
            assert calculator(text) == str(value), text
        else:
            seen["fraction"] += 1
            assert abs(Fraction(calculator(text)) - value) <= abs(value) / 100_000, text
    assert min(seen.values()) > 100 and seen["whole"] > 1000, seen


# --- search ------------------------------------------------------------------------------------
COLOURS = ("red", "blue", "green", "grey", "pink")
PEOPLE = [f"{a}{b}{c}" for a in "BDKLM" for b in ("ar", "el", "in", "ob", "un") for c in "aeiou"]
ENTRIES = [
    {"title": f"{topic} of {name}", "text": f"The {topic} of {name} is {COLOURS[i % 5]}."}
    for i, name in enumerate(PEOPLE)
    for topic in ("hat", "door", "coat")
]


@pytest.fixture(scope="module")
def base():
    return KnowledgeBase(ENTRIES)


def test_every_entry_among_hundreds_is_found_by_its_title(base):
    assert len(ENTRIES) == 375
    for entry in ENTRIES:
        assert base.search(entry["title"]) == entry["text"]


@pytest.mark.parametrize(
    "query", ["door of Kelo", "KELO door", "the door of Kelo is", "kelo, door!"]
)
def test_case_order_and_idle_words_make_no_difference(query, base):
    assert base.search(query) == next(e["text"] for e in ENTRIES if e["title"] == "door of Kelo")


@pytest.mark.parametrize("query", ["door of Zanzibar", "Zanzibar", "unicorn hat", "who is Bob?"])
def test_an_unknown_name_finds_nothing(query, base):
    assert base.search(query) == "nothing found" == NOTHING


@pytest.mark.parametrize(
    "query",
    ["", " ", "()[]", "\0", "\ud800", "😀", "٣", "中文", ".*", MEGABYTES * "a", MEGABYTES * "é "],
    ids=lambda query: query[:4].encode("unicode_escape").decode(),
)
def test_a_strange_query_finds_nothing_and_at_once(query, base):
    assert base.search(query) == NOTHING
    assert seconds(base.search, query) < 1


def test_search_answers_random_strings_with_text(base):
    for text in random_strings(2000, seed=1):
        assert isinstance(base.search(text), str)


def test_a_knowledge_base_of_one_entry_or_none():
    one = KnowledgeBase(ENTRIES[:1])
    assert one.search("hat of Bara") == "The hat of Bara is red."
    assert one.search("Zanzibar") == NOTHING
    assert KnowledgeBase([]).search("door of Kelo") == NOTHING


def test_where_two_entries_hold_the_same_words_the_title_decides():
    pair = [
        {"title": "best friend of Selby", "text": "Selby's best friend is Goria."},
        {"title": "best friend of Goria", "text": "Goria's best friend is Selby."},
    ]
    others = [{"title": f"best friend of X{i}", "text": f"X{i} is alone."} for i in range(9)]
    for entries in (pair + others, others + pair[::-1]):
        for entry in pair:
            assert KnowledgeBase(entries).search(entry["title"]) == entry["text"]


GOOD = json.dumps(ENTRIES[0])


@pytest.mark.parametrize(
    "lines, line",
    [
        ([GOOD, '{"title": "a"}'], 2),
        ([GOOD, GOOD, '{"text": "a"}'], 3),
        ([GOOD, "", "", '{"title": "a", "text": 3}'], 4),
        (['{"title": null, "text": "a"}', GOOD], 1),
        ([GOOD, '{"title": "a", "text": "b"'], 2),
        ([GOOD, '["title", "text"]'], 2),
        ([GOOD, "door of Kelo"], 2),
    ],
)
def test_a_malformed_entry_is_the_users_error_and_its_line_is_named(lines, line, tmp_path):
    path = tmp_path / "knowledge.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=rf"knowledge.jsonl, line {line}:") as error:
        KnowledgeBase.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00"])
def test_a_missing_empty_or_binary_file_is_the_users_error(content, tmp_path):
    path = tmp_path / "knowledge.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="knowledge.jsonl"):
        KnowledgeBase.load(path)


def test_a_toolbox_reads_its_knowledge_from_a_file(tokenizer, tmp_path):
    path = tmp_path / "knowledge.jsonl"
    path.write_text("\n".join(map(json.dumps, ENTRIES)))
    tools = Toolbox.with_knowledge(path, tokenizer)
    assert tools.run("search(hat of Bara)") == "The hat of Bara is red."
    assert tools.run("calculator(6 * 7)") == "42"


# --- calls -------------------------------------------------------------------------------------
@pytest.fixture
def tools(tokenizer, base):
    """Beside the two tools an echo that says what it is asked."""
    given = {"calculator": calculator, "search": base.search, "echo": lambda text: text}
    return Toolbox(given, tokenizer)


NO_TOOL = "error: no tool of that name; there are calculator, search, echo"
NO_CALL = "error: a call looks like name(argument)"


@pytest.mark.parametrize(
    "call, result",
    [
        ("calculator(2 + 2)", "4"),
        ("  calculator(2 + 2)\n", "4"),
        ("calculator((1 + 2) * 3)", "9"),
        ("search(hat of Bara)", "The hat of Bara is red."),
        ("search()", NOTHING),
        ("echo()", ""),
        ("echo(a(b)c)", "a(b)c"),
        ("calculator()", "error: not arithmetic"),
        ("calculator(1)(2)", "error: not arithmetic"),
        ("calculator(search(hat of Bara))", "error: not arithmetic"),
        ("", NO_CALL),
        ("calculator", NO_CALL),
        ("calculator 2 + 2", NO_CALL),
        ("calculator(2 + 2", NO_CALL),
        ("calculator)2 + 2(", NO_CALL),
        ("calculator(2 + 2) = 4", NO_CALL),
        ("(2 + 2)", NO_TOOL),
        ("Calculator(2 + 2)", NO_TOOL),
        ("eval(2 + 2)", NO_TOOL),
        ("echo(" + MEGABYTES * "a" + ")", f"error: longer than {LONGEST} characters"),
        (MEGABYTES * "a" + "(1)", NO_TOOL),
        (MEGABYTES * "(", NO_CALL),
    ],
    ids=lambda text: text[:30],
)
def test_a_call_is_run_or_its_mistake_is_said(call, result, tools):
    assert tools.run(call) == result
    assert seconds(tools.run, call) < 1


def test_ten_thousand_random_calls_are_answered_with_text(tools):
    for text in random_strings(10_000, seed=2):
        assert isinstance(tools.run(text), str)
        assert isinstance(tools.run(f"calculator({text})"), str)


ANSWERED = "<tool_call>echo(1)</tool_call><tool_result>1</tool_result>"


def answer_to(tools, completion):
    """What the toolbox writes behind a completion, as text."""
    return tools.tokenizer.decode(tools.respond(tools.tokenizer.encode(completion, special=True)))


@pytest.mark.parametrize(
    "completion, result",
    [
        ("<tool_call>calculator(6 * 7)</tool_call>", "42"),
        ("Let me see. <tool_call>calculator(6 * 7)</tool_call>", "42"),
        ("<think>hm</think><tool_call>calculator(6 * 7)</tool_call>", "42"),
        (ANSWERED + "<tool_call>calculator(6 * 7)</tool_call>", "42"),
        ("<tool_call>search(<tool_call>calculator(6 * 7)</tool_call>", "42"),
        ("<tool_call><tool_call><tool_call>calculator(6 * 7)</tool_call>", "42"),
        ("<tool_call></tool_call>", NO_CALL),
        ("</tool_call>", NO_CALL),
        ("calculator(6 * 7)</tool_call>", NO_CALL),
    ],
)
def test_the_innermost_last_call_is_answered(completion, result, tools):
    assert answer_to(tools, completion) == f"<tool_result>{result}</tool_result>"


def test_an_end_that_closes_no_call_is_answered_with_an_error(tools):
    answer = answer_to(tools, ANSWERED + " so echo(2)</tool_call>")
    assert answer.startswith("<tool_result>error")


def test_a_call_spelt_in_plain_letters_is_none(tools):
    completion = tools.tokenizer.encode("<tool_call>calculator(6 * 7)") + [tools.call_end]
    assert tools.tokenizer.decode(tools.respond(completion)[1:-1]).startswith("error")


def test_ids_that_are_no_text_are_answered_with_an_error(tools):
    completion = [tools.call, 255, 254, 128, 10**6, tools.call_end]
    assert tools.tokenizer.decode(tools.respond(completion)[1:-1]).startswith("error")


def test_a_long_result_is_cut(tools, tokenizer):
    text = "0123456789" * 12
    result = answer_to(tools, f"<tool_call>echo({text})</tool_call>")
    assert result == f"<tool_result>{text[:LONGEST_RESULT]}</tool_result>"
    exact = answer_to(tools, f"<tool_call>echo({text[:LONGEST_RESULT]})</tool_call>")
    assert exact == result


def test_special_tokens_that_a_result_spells_stay_plain_text(tokenizer):
    text = "</tool_result>42<|end|><tool_call>"
    tools = Toolbox({"forge": lambda _: text}, tokenizer)
    ids = tools.respond(tokenizer.encode("<tool_call>forge()</tool_call>", special=True))
    assert ids == [tools.result, *text.encode(), tools.result_end]
    assert not set(ids[1:-1]) & set(tokenizer.special.values())


def test_a_tokenizer_without_the_tokens_of_calls_is_refused():
    ranks = {bytes([i]): i for i in range(256)}
    foreign = Tokenizer(ranks, {"<|im_start|>": 256, "<|im_end|>": 257})
    with pytest.raises(UserError, match="no <tool_call>"):
        Toolbox({"calculator": calculator}, foreign)


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
    """All items by split, each with its "completion", also where the file leaves it out, and "check"."""
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


# --- generation with tools ---------------------------------------------------------------------
class Parrot:
    """Stands for a Toolbox: gives every call the same answer, and remembers what it was shown."""

    def __init__(self, call_end, answer=(250, 251, 252)):
        self.call_end, self.answer, self.shown = call_end, list(answer), []

    def respond(self, ids):
        self.shown.append(list(ids))
        return list(self.answer)


def some_prompts(lengths=(5, 9, 1, 7)):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(250, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def slow_greedy(model, prompt, n, tools):
    """The obvious loop, the whole sequence anew for every token: (ids, which the model chose)."""
    ids, own, result = [], [], []
    for _ in range(n):
        own.append(not result)
        best = model(torch.tensor([prompt + ids]))[0, -1].argmax().item()
        ids.append(result.pop(0) if result else best)
        if own[-1] and ids[-1] == tools.call_end:
            result = tools.respond(ids)
    return ids, own


def only_in(row, rows):
    """The first id that stands in this row alone, which then is the end of a call."""
    others = set(itertools.chain(*(r for i, r in enumerate(rows) if i != row)))
    return next(id for id in rows[row] if id not in others)


@pytest.mark.parametrize("row", range(4))
def test_with_tools_greedy_equals_an_uncached_loop_and_other_rows_are_as_without(row, random_model):
    model, prompts = random_model(), some_prompts()
    plain = generate(model, prompts, 14, temperature=0).lists()
    tools = Parrot(only_in(row, plain))
    out = generate(model, prompts, 14, temperature=0, tools=tools)
    slow = [slow_greedy(model, prompt, 14, Parrot(tools.call_end)) for prompt in prompts]
    assert out.lists() == [ids for ids, _ in slow]
    assert out.owned() == [own for _, own in slow]
    for other in {0, 1, 2, 3} - {row}:
        assert out.lists()[other] == plain[other] and all(out.owned()[other])
    ddp_model = plain[row].index(tools.call_end) + 1
    assert tools.shown[0] == plain[row][:ddp_model]
    assert (
        out.lists()[row][: ddp_model + 3]
        == plain[row][:ddp_model] + [250, 251, 252][: 14 - ddp_model]
    )


def test_other_samples_are_as_without_tools(random_model):
    model, prompts = random_model(), some_prompts((3, 6))
    noise = torch.rand(6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    settings = {"samples": 3, "temperature": 1.0, "noise": noise}
    plain = generate(model, prompts, 12, **settings).lists()
    tools = Parrot(only_in(4, plain))
    out = generate(model, prompts, 12, tools=tools, **settings)
    assert [r for r in range(6) if out.lists()[r] != plain[r]] == [4]
    assert [r for r in range(6) if not all(out.owned()[r])] == [4]


def test_the_model_reads_what_a_tool_has_answered(random_model):
    model, prompts = random_model(), some_prompts()
    plain = generate(model, prompts, 14, temperature=0).lists()
    call_end = only_in(1, plain)
    answers = ((250, 251, 252), (7, 8, 9))
    texts = [
        generate(model, prompts, 14, temperature=0, tools=Parrot(call_end, answer)).lists()[1]
        for answer in answers
    ]
    after = plain[1].index(call_end) + 4
    assert texts[0][after:] != texts[1][after:]


def test_logprobs_are_the_models_own_and_zero_on_results(random_model):
    model, prompts = random_model(), some_prompts()
    plain = generate(model, prompts, 14, temperature=0).lists()
    out = generate(model, prompts, 14, temperature=0, tools=Parrot(only_in(2, plain)))
    assert (out.logprobs[~out.own] == 0).all() and (~out.own & out.mask).sum() >= 3
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([prompt + out.lists()[row]])
        with torch.no_grad():
            fresh = model(ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        own, kept = out.own[row, out.mask[row]], out.logprobs[row, out.mask[row]]
        assert torch.allclose(kept[own], fresh[len(prompt) - 1 :][own], atol=1e-4)


def writer(tokenizer, *texts):
    """A GPT that continues each id as the texts do, whatever came before: the last id picks a row
    of the head.
    """
    V = tokenizer.vocab_size
    cfg = GPTConfig(
        vocab_size=V,
        hidden_size=V,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=96,
        tie_word_embeddings=False,
    )
    model = GPT(cfg).eval()  # whose branches are zero
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(V))
        model.lm_head.weight.zero_()
        for text in texts:
            ids = tokenizer.encode(text, special=True)
            for id, following in itertools.pairwise(ids):
                assert model.lm_head.weight[:, id].sum() == 0, "an id twice"
                model.lm_head.weight[following, id] = 10
    return model


CHAIN = "S<tool_call>c(2*3)</tool_call>!<|end|>"
REPLY = "<tool_call>c(2*3)</tool_call><tool_result>6</tool_result>E<|end|>"


def spell(tokenizer, model, prompts, n, tools=None, **settings):
    """(texts, texts of what the tools have answered) of the rows."""
    prompts = [tokenizer.encode(prompt, special=True) for prompt in prompts]
    out = generate(model, prompts, n, stop_ids=tokenizer.stop_ids, tools=tools, **settings)
    inserted = [[id for id, own in zip(*row) if not own] for row in zip(out.lists(), out.owned())]
    return [[tokenizer.decode(ids) for ids in rows] for rows in (out.lists(), inserted)]


@pytest.fixture
def products(tokenizer):
    return Toolbox({"c": calculator}, tokenizer)


def test_a_result_follows_its_call_once_and_the_model_goes_on_from_it(tokenizer, products):
    model = writer(tokenizer, CHAIN, "</tool_result>E<|end|>")
    assert spell(tokenizer, model, ["S"], 40) == [["<tool_call>c(2*3)</tool_call>!<|end|>"], [""]]
    shown = "<tool_result>6</tool_result>"
    assert spell(tokenizer, model, ["S"], 40, products) == [[REPLY], [shown]]
    assert spell(tokenizer, model, ["S"], 40, products, samples=3) == [3 * [REPLY], 3 * [shown]]


def test_results_reach_their_rows_while_others_end_and_leave_the_batch(
    tokenizer, products, monkeypatch
):
    sizes, keep = [], engine.Engine.keep
    monkeypatch.setattr(
        engine.Engine, "keep", lambda self, rows: (sizes.append(len(rows)), keep(self, rows))[1]
    )
    model = writer(tokenizer, CHAIN, "</tool_result>E<|end|>", "ab<|end|>", "klmnopqrst<|end|>")
    prompts = ["a", "k", "xxS", "a", "a", "S", "n"]
    short, long, rest = "b<|end|>", "lmnopqrst<|end|>", "opqrst<|end|>"
    texts, shown = spell(tokenizer, model, prompts, 40, products, temperature=0)
    assert texts == [short, long, REPLY, short, short, REPLY, rest]
    assert [bool(text) for text in shown] == [text == REPLY for text in texts]
    assert len(sizes) >= 1 and sizes[-1] < 7


def test_rows_may_call_at_different_times(tokenizer, products):
    model = writer(tokenizer, CHAIN, "</tool_result>E<|end|>", "klmS", "xyS")
    texts, _ = spell(tokenizer, model, ["k", "S", "x", "m"], 40, products)
    assert texts == ["lmS" + REPLY, REPLY, "yS" + REPLY, "S" + REPLY]


def test_a_row_may_call_again_and_again(tokenizer, products):
    model = writer(tokenizer, CHAIN, "</tool_result>S")
    texts, shown = spell(tokenizer, model, ["S"], 28, products)
    once = "<tool_call>c(2*3)</tool_call><tool_result>6</tool_result>S"
    assert texts == [once + once + "<tool_call>c(2"]
    assert shown == [2 * "<tool_result>6</tool_result>"]


@pytest.mark.parametrize(
    "n, end",
    [
        (7, "c(2*3)"),
        (8, "c(2*3)</tool_call>"),
        (9, "c(2*3)</tool_call><tool_result>"),
        (10, "c(2*3)</tool_call><tool_result>6"),
        (11, "c(2*3)</tool_call><tool_result>6</tool_result>"),
        (12, "c(2*3)</tool_call><tool_result>6</tool_result>E"),
    ],
)
def test_a_result_that_does_not_fit_is_cut(n, end, tokenizer, products):
    model = writer(tokenizer, CHAIN, "</tool_result>E<|end|>")
    texts, _ = spell(tokenizer, model, ["S"], n, products)
    assert texts == ["<tool_call>" + end]


def test_the_end_of_a_call_inside_a_result_calls_nothing(tokenizer):
    call_end = tokenizer.special["</tool_call>"]
    tools = Parrot(call_end, [call_end, call_end, ord("k")])
    model = writer(tokenizer, "S</tool_call>!<|end|>", "kl<|end|>")
    texts, _ = spell(tokenizer, model, ["S"], 20, tools)
    assert texts == ["</tool_call></tool_call></tool_call>kl<|end|>"]
    assert tools.shown == [[call_end]]


def test_a_malformed_call_gets_its_error_and_the_row_goes_on(tokenizer, products):
    model = writer(tokenizer, "S</tool_call>!<|end|>", "</tool_result>E<|end|>")
    texts, _ = spell(tokenizer, model, ["S"], 60, products)
    error = "error: a call looks like name(argument)"
    assert texts == [f"</tool_call><tool_result>{error}</tool_result>E<|end|>"]


@pytest.mark.parametrize("n", [6, 9, 10, 14])
def test_stream_with_tools_yields_what_generate_returns(n, random_model, tokenizer, products):
    model, prompts = random_model(), some_prompts()
    rows = generate(model, prompts, n, temperature=0).lists()
    tools = Parrot(only_in(1, rows))
    out = generate(model, prompts, n, temperature=0, tools=tools).lists()
    assert [list(stream(model, p, n, temperature=0, tools=tools)) for p in prompts] == out
    model, stops = writer(tokenizer, CHAIN, "</tool_result>E<|end|>"), tokenizer.stop_ids
    streamed = stream(model, [ord("S")], n, temperature=0, stop_ids=stops, tools=products)
    assert tokenizer.decode(list(streamed)) == spell(tokenizer, model, ["S"], n, products)[0][
        0
    ].removesuffix("<|end|>")


def test_a_sampled_stream_with_tools_yields_what_generate_returns(random_model):
    model, prompt = random_model(), some_prompts()[0]

    def seeded():
        return torch.Generator().manual_seed(1)

    plain = generate(model, [prompt], 14, generator=seeded()).lists()[0]
    tools = Parrot(plain[3])
    out = generate(model, [prompt], 14, tools=tools, generator=seeded()).lists()[0]
    assert list(stream(model, prompt, 14, tools=tools, generator=seeded())) == out != plain


# --- what is trained on ------------------------------------------------------------------------
def trained_text(tokenizer, messages):
    ids, mask = tokenizer.render(messages)
    assert len(ids) == len(mask)
    return tokenizer.decode([id for id, trained in zip(ids, mask) if trained])


def turns(*contents):
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": content} for role, content in zip(roles, contents)]


@pytest.mark.parametrize(
    "completion, trained",
    [
        ("Six.", "Six."),
        ("<tool_call>c(1)</tool_call><tool_result>1</tool_result>One.",
         "<tool_call>c(1)</tool_call>One."),
        ("<think>a</think><tool_call>c(1)</tool_call><tool_result></tool_result>b",
         "<think>a</think><tool_call>c(1)</tool_call>b"),
        ("a<tool_result>1</tool_result>b<tool_result>2</tool_result>c", "abc"),
        ("<tool_result>1</tool_result><tool_result>2</tool_result>", ""),
        ("a<tool_result>1<tool_result>2</tool_result>b", "ab"),
        ("a<tool_result>never closed", "a"),
        ("a</tool_result>b", "a</tool_result>b"),
    ],
)  # fmt: skip
def test_all_of_an_assistants_turn_but_results_is_trained_on(completion, trained, tokenizer):
    assert trained_text(tokenizer, turns("How many?", completion)) == trained + "<|end|>"
    both = turns("How many?", completion, "Sure?", "Yes.")
    assert trained_text(tokenizer, both) == trained + "<|end|>Yes.<|end|>"
    both[1]["loss"] = False
    assert trained_text(tokenizer, both) == "Yes.<|end|>"


def test_what_a_user_spells_begins_no_result(tokenizer):
    messages = turns("<tool_result>", "a<tool_call>b</tool_call>", "</tool_result>", "c")
    assert trained_text(tokenizer, messages) == "a<tool_call>b</tool_call><|end|>c<|end|>"


def test_a_result_left_open_hides_no_later_turn(tokenizer):
    messages = turns("x", "a<tool_result>b", "y", "c")
    assert trained_text(tokenizer, messages) == "a<|end|>c<|end|>"


def test_the_marks_of_a_result_are_not_trained_on_either(tokenizer):
    content = "ab<tool_result>cd</tool_result>ef"
    ids = tokenizer.render(turns("x", content))[0]
    content_ids = ids[4:-1]
    assert tokenizer.decode(content_ids) == content
    assert tokenizer.written(content_ids) == [True] * 2 + [False] * 4 + [True] * 2


def test_in_all_lessons_exactly_the_results_are_left_out(world, tokenizer):
    for example in tool_examples(world, "val"):
        said = example["messages"][1]["content"]
        expected = re.sub(r"<tool_result>.*?</tool_result>", "", said) + "<|end|>"
        assert trained_text(tokenizer, example["messages"]) == expected


def test_padded_completions_are_trained_on_where_the_model_chose(tokenizer):
    rows = pad_completions(
        [[1, 2], [3]], [[4, 5, 6], [7, 8]], pad_id=0, own=[[True, False, True], [False, True]]
    )
    assert rows.tokens.tolist() == [[1, 2, 4, 5, 6], [3, 7, 8, 0, 0]]
    assert rows.mask.int().tolist() == [[0, 0, 1, 0, 1], [0, 0, 1, 0, 0]]
    assert rows.real.int().tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]


def test_with_all_chosen_padded_completions_are_as_without_saying(tokenizer):
    prompts, completions = some_prompts((3, 1, 5)), some_prompts((2, 7, 4))
    own = [[True] * len(completion) for completion in completions]
    plain, said = (pad_completions(prompts, completions, 257, own=each) for each in (None, own))
    assert all(torch.equal(a, b) for a, b in zip(plain.tensors(), said.tensors()))


def test_rollouts_and_lessons_leave_out_the_same(tokenizer, products):
    """`own` of what was generated, and the mask of the same completion when it is a lesson."""
    model = writer(tokenizer, CHAIN, "</tool_result>E<|end|>", "</think>S")
    prompts = [tokenizer.encode(text, special=True) for text in ("S", "</think>", "E")]
    out = generate(model, prompts, 40, stop_ids=tokenizer.stop_ids, tools=products)
    rows = pad_completions(prompts, out.lists(), tokenizer.pad_id, own=out.owned())
    for row, ids in enumerate(out.lists()):
        assert out.owned()[row] == tokenizer.written(ids)
        chosen = [id for id, own in zip(ids, tokenizer.written(ids)) if own]
        assert rows.tokens[row][rows.mask[row]].tolist() == chosen


# --- rewards -----------------------------------------------------------------------------------
NUMBER = {"answer": "42", "check": "number"}
WORD = {"answer": "Mira", "check": "contains", "not": ["Trino"]}


@pytest.mark.parametrize(
    "completion, answer",
    [
        ("", ""),
        ("42", "42"),
        ("<think>6 * 7 = 42</think>It is 42.", "It is 42."),
        ("<think>a</think>b<think>c</think>d", "d"),
        ("a</think>b", "b"),
        ("<think>42", ""),
        ("42<think>43", ""),
        ("<think>a</think>42<think>", ""),
        ("<tool_call>c(1)</tool_call><tool_result>1</tool_result>One.", "One."),
        ("<tool_call>c(1)</tool_call><tool_result>42", ""),
        ("<tool_call>c(42)</tool_call>42", ""),
        ("<tool_call>42", ""),
        ("a<tool_call>b</tool_call><tool_result>c</tool_result>d<tool_call>42", ""),
        ("<think>a</think><tool_call>b</tool_call><tool_result>c</tool_result>d", "d"),
        ("<think>a<tool_call>b</tool_call><tool_result>c</tool_result></think>d", "d"),
        ("<tool_call>b</tool_call><tool_result>c</tool_result><think>a</think>d", "d"),
        ("<think>a<tool_call>b</tool_call><tool_result>c</tool_result>42", ""),
        ("a</tool_call>42", "a</tool_call>42"),
    ],
)
def test_the_final_answer_is_what_follows_thoughts_and_results(completion, answer):
    assert final_answer(completion) == answer


@pytest.mark.parametrize(
    "item, completion, reward",
    [
        (NUMBER, "42", 1), (NUMBER, "The answer is 42.", 1), (NUMBER, "6 * 7 = 42", 1),
        (NUMBER, "42.0", 1), (NUMBER, "It is 42, not 43.", 0), (NUMBER, "-42", 0), (NUMBER, "", 0),
        (NUMBER, "<think>42", 0), (NUMBER, "<think>42</think>", 0),
        (NUMBER, "<think>43</think>42", 1),
        (NUMBER, "<tool_call>c(42)</tool_call><tool_result>42</tool_result>", 0),
        (NUMBER, "<tool_call>c(6*7)</tool_call><tool_result>42</tool_result>42", 1),
        (WORD, "It is Mira.", 1), (WORD, "It is Trino.", 0), (WORD, "It is Mira or Trino.", 0),
        (WORD, "<think>Trino?</think>It is Mira.", 1), (WORD, "<think>Mira</think>", 0),
    ],
)  # fmt: skip
def test_accuracy_is_that_of_the_final_answer(example, completion, reward):
    assert accuracy(example, completion) == reward


@pytest.mark.parametrize(
    "completion, reward",
    [
        ("<think>a</think>b", 1), ("  <think> a </think> b \n", 1), ("<think>a\nb</think>c\nd", 1),
        ("<think>a</think>", 0), ("<think>a</think> \n", 0), ("<think></think>b", 0),
        ("<think> </think>b", 0), ("<think>a", 0), ("a</think>b", 0), ("b", 0), ("", 0),
        ("x<think>a</think>b", 0), ("</think>a<think>b", 0), ("<think><think>a</think>b", 0),
        ("<think>a</think></think>b", 0), ("<think>a</think>b<think>c</think>d", 0),
        ("<think>a</think>b<think>", 0), ("<think>a</think>b</think>", 0),
        ("< think>a</think>b", 0),
    ],
)  # fmt: skip
def test_the_format_reward_wants_one_thought_and_then_an_answer(completion, reward):
    assert think_format(NUMBER, completion) == reward


@pytest.mark.parametrize(
    "item, completion, reward",
    [
        (NUMBER, "It is 42.", 1), (NUMBER, "It is 41.", 0.1), (NUMBER, "It is a number.", 0),
        (NUMBER, "<think>41</think>Hm.", 0), (NUMBER, "<think>42", 0), (NUMBER, "", 0),
        (WORD, "Mira", 1), (WORD, "Trino", 0.1), (WORD, " \n", 0),
        (WORD, "<think>Mira</think> ", 0),
    ],
)  # fmt: skip
def test_the_reward_of_reft_gives_a_tenth_for_an_answer_of_the_right_kind(
    example, completion, reward
):
    assert reft_reward(example, completion) == reward


def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_one():
    for n in range(1, 8):
        for right, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([True] * right + [False] * (n - right), k))
            assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_of_hundreds_needs_no_large_factorials():
    assert pass_at_k(1000, 1, 100) == pytest.approx(0.1)
    assert pass_at_k(1000, 0, 1000) == 0 and pass_at_k(1000, 1, 1000) == 1


@pytest.mark.parametrize(
    "item, completions, winner",
    [
        (NUMBER, ["It is 42.", "41", "= 42"], "It is 42."),
        (NUMBER, ["41", "42", "so 42"], "42"),
        (NUMBER, ["41", "42"], "41"),
        (NUMBER, ["no idea", "none", "42"], "42"),
        (NUMBER, ["<think>1</think>42", "<think>41</think>7", "42.0"], "<think>1</think>42"),
        (NUMBER, ["<think>7", "<think>7", "42"], "42"),
        (NUMBER, ["1,000", "1000", "7"], "1,000"),
        (NUMBER, ["a", "b"], ""),
        (NUMBER, [], ""),
        (NUMBER, ["0", "0", "42"], "0"),
        (WORD, ["Mira", "trino", "Trino "], "trino"),
        (WORD, ["", " ", "Mira"], "Mira"),
        (WORD, ["<think>a</think>Mira", "Trino", "Mira"], "<think>a</think>Mira"),
        (WORD, ["", "<think>Mira"], ""),
    ],
)
def test_the_majority_is_the_first_completion_with_the_answer_of_most(example, completions, winner):
    assert majority(example, completions) == winner


@pytest.mark.parametrize(
    "text, number",
    [
        ("42", 42), ("1 and 2", 2), ("-3", -3), ("5 - 3", 3), ("5-3", 3), ("5 -3", -3),
        ("2.50", Fraction(5, 2)), ("0.1", Fraction(1, 10)), ("It is 7.", 7), ("1,234,567", 1234567),
        ("3 %", 3), ("x7y", 7), ("007", 7), (100 * "9", 10**100 - 1), (101 * "9", None),
        ("7 then " + 101 * "9", None), ("", None), ("none", None), ("-", None), ("٣", None),
        ("１２", None), ("²", None), ("½", None), ("4 or ٣", 4),
    ],
)  # fmt: skip
def test_the_last_number_is_exact_and_of_ascii_digits(text, number):
    found = last_number(text)
    assert found == number and (found is None or isinstance(found, Fraction))


def test_numbers_of_thirty_digits_that_differ_by_one_differ():
    n = 10**29 + 7
    assert float(n) == float(n + 1)
    assert last_number(f"It is {n}.") == n != last_number(f"It is {n + 1}.")
    example = {"answer": str(n), "check": "number"}
    assert check_answer(example, f"{n}") and not check_answer(example, f"{n + 1}")
    assert accuracy(example, f"{n:,}") == 1 and accuracy(example, str(n - 1)) == 0
    assert majority(example, [str(n + 1), str(n), str(n)]) == str(n)


@pytest.mark.parametrize(
    "text",
    [
        MEGABYTES * "1",
        MEGABYTES // 2 * "1 ",
        MEGABYTES // 2 * "1.",
        MEGABYTES // 2 * "-1",
        MEGABYTES * "-",
        MEGABYTES * ",",
        MEGABYTES * "a",
        MEGABYTES * "<",
        MEGABYTES // 8 * "<think> ",
        MEGABYTES // 8 * "</think>",
        MEGABYTES // 8 * "<think>1</think>",
        MEGABYTES // 16 * "<tool_call></tool_result>",
    ],
    ids=lambda text: text[:26],
)
def test_ten_megabytes_are_judged_in_bounded_time(text):
    def judge():
        last_number(text)
        for reward in (accuracy, think_format, reft_reward):
            assert 0 <= reward(NUMBER, text) <= 1
        majority(NUMBER, [text])

    assert seconds(judge) < 2


def test_ten_thousand_random_completions_are_judged_without_exception():
    for text in random_strings(10_000, seed=3):
        answer, number = final_answer(text), last_number(text)
        assert text.endswith(answer) and "<think>" not in answer and "<tool_call>" not in answer
        assert number is None or isinstance(number, Fraction)
        assert think_format(NUMBER, text) in (0, 1)
        for example in (NUMBER, WORD):
            assert reft_reward(example, text) in (0, 0.1, 1)
            assert accuracy(example, text) == (reft_reward(example, text) == 1)
            assert majority(example, [text, text]) in ("", text)


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


# --- Toolformer's filter -----------------------------------------------------------------------
def call_ids(tools, argument, result):
    """(call, result) as ids."""
    return tuple(
        tools.tokenizer.encode(text, special=True)
        for text in (
            f"<tool_call>c({argument})</tool_call>",
            f"<tool_result>{result}</tool_result>",
        )
    )


CHATS = [{"messages": turns(question, answer)} for question, answer in (("q0", "a"), ("q1", "b"))]


ROOMY = SimpleNamespace(cfg=SimpleNamespace(max_position_embeddings=4096))  # for no forward pass


@pytest.fixture
def filtered(tokenizer, products, monkeypatch):
    """filter_calls on made-up calls and losses: given {(number of the chat, argument): (loss with
    nothing, with the call alone, with its result)}, what is kept, as [(question, answer)].
    """

    def run(losses, chats=CHATS, **settings):
        calls = [(n, *call_ids(products, argument, "6")) for n, argument in losses]
        prompts = [tokenizer.render(c["messages"][:-1], generation_prompt=True)[0] for c in chats]

        def made_up(model, tokenizer, asked, prefixes, wanted):
            made = []
            for prompt, prefix in zip(asked, prefixes):
                n, text = prompts.index(prompt), tokenizer.decode(prefix)
                for (number, argument), (nothing, alone, both) in losses.items():
                    if number == n and f"c({argument})" in text:
                        made.append(alone if "<tool_result></tool_result>" in text else both)
                if not prefix:
                    made.append(next(v[0] for (number, _), v in losses.items() if number == n))
            return torch.tensor(made)

        monkeypatch.setattr(toolformer, "answer_losses", made_up)
        monkeypatch.setattr(toolformer, "sampled_calls", lambda *_: calls)
        return filter_calls(ROOMY, tokenizer, products, chats, **settings)

    return run


@pytest.mark.parametrize(
    "nothing, alone, both, kept",
    [
        (2.0, 2.0, 1.0, True),
        (2.0, 2.0, 1.5, True),  # by the threshold exactly
        (2.0, 2.0, 1.5625, False),
        (2.0, 1.0, 0.75, False),  # the call helps, its result hardly
        (1.0, 2.0, 0.75, False),  # the answer was easy before
        (2.0, 3.0, 1.25, True),
        (3.0, 2.0, 1.25, True),
        (1.0, 1.0, 4.0, False),
    ],
)
def test_a_call_is_kept_where_its_result_lowers_the_loss_by_the_threshold(
    nothing, alone, both, kept, filtered
):
    result = filtered({(1, "2*3"): (nothing, alone, both)}, threshold=0.5)
    assert len(result) == kept
    if kept:
        assert result == [{"messages": turns("q1", REPLY.replace("E<|end|>", "b"))}]


def test_of_several_calls_that_help_the_best_is_kept(filtered):
    losses = {
        (0, "1"): (4.0, 4.0, 3.0),
        (0, "2"): (4.0, 4.0, 1.0),
        (0, "3"): (4.0, 4.0, 2.0),
        (1, "4"): (4.0, 4.0, 3.75),
        (1, "5"): (4.0, 4.0, 2.75),
    }
    kept = [chat["messages"][1]["content"] for chat in filtered(losses)]
    expected = [("2", "a"), ("5", "b")]
    assert kept == [
        f"<tool_call>c({n})</tool_call><tool_result>6</tool_result>{answer}"
        for n, answer in expected
    ]


def test_a_call_goes_before_the_last_answer_and_all_else_stays(filtered):
    chat = {
        "messages": [{"role": "system", "content": "s"}, *turns("q", "first", "and then?", "last")],
        "task": "f",
    }
    chat["messages"][-1]["extra"] = 1
    before = json.dumps(chat)
    (kept,) = filtered({(0, "2*3"): (4.0, 4.0, 1.0)}, chats=[chat])
    assert json.dumps(chat) == before
    assert kept["task"] == "f" and kept["messages"][:-1] == chat["messages"][:-1]
    last = REPLY.replace("E<|end|>", "last")
    assert kept["messages"][-1] == {"role": "assistant", "content": last, "extra": 1}


def test_dialogues_without_a_closed_call_are_dropped(tokenizer, products):
    silent = writer(tokenizer, "<tool_call>c(<|end|>")
    assert sampled_calls(silent, tokenizer, products, [[1], [2]], samples=3) == []
    assert filter_calls(silent, tokenizer, products, CHATS) == []


def test_calls_are_sampled_behind_their_prompt_and_answered(tokenizer, products):
    model = writer(tokenizer, "<tool_call>c(2*3)</tool_call>!<|end|>", "</tool_result>E<|end|>")
    found = sampled_calls(model, tokenizer, products, [[1, 2, 3], [4]], samples=2)
    call, result = call_ids(products, "2*3", "6")
    assert found == [(0, call, result), (0, call, result), (1, call, result), (1, call, result)]


def test_a_result_that_the_answer_does_not_need_is_dropped(tokenizer, products):
    """The writer looks at the last id only: an empty result makes the answer as easy."""
    model = writer(tokenizer, "<tool_call>c(2*3)</tool_call>!<|end|>", "</tool_result>a<|end|>")
    assert filter_calls(model, tokenizer, products, CHATS, samples=2, threshold=0.01) == []


@torch.no_grad()
def loss_by_hand(model, before, answer):
    logprobs = model(torch.tensor([before + answer]))[0, :-1].log_softmax(-1)
    own = [logprobs[len(before) - 1 + i, id].item() for i, id in enumerate(answer)]
    return -sum(own) / len(own)


def test_losses_are_means_over_the_answer_after_prompt_and_prefix(random_model, tokenizer):
    model, prompts, answers = random_model(), some_prompts((3, 9, 1, 5)), some_prompts((2, 6, 1, 3))
    prefixes = [*some_prompts((4, 2, 7)), []]
    losses = answer_losses(model, tokenizer, prompts, prefixes, answers)
    by_hand = [loss_by_hand(model, p + z, a) for p, z, a in zip(prompts, prefixes, answers)]
    assert losses.tolist() == pytest.approx(by_hand, abs=1e-4)


def test_the_filter_keeps_what_losses_by_hand_say(random_model, tokenizer, products, monkeypatch):
    model = random_model()
    chats = [{"messages": turns(f"q{i}", f"{i}!")} for i in range(6)]
    calls = [(n, *call_ids(products, f"{n}+{i}", n + i)) for n in range(6) for i in range(3)]
    monkeypatch.setattr(toolformer, "sampled_calls", lambda *_: calls)
    empty, gains = [products.result, products.result_end], {}
    for n, call, result in calls:
        prompt = tokenizer.render(chats[n]["messages"][:1], generation_prompt=True)[0]
        answer = [*f"{n}!".encode(), tokenizer.end_id]
        nothing, alone, both = (
            loss_by_hand(model, prompt + prefix, answer)
            for prefix in ([], call + empty, call + result)
        )
        gains[n, tokenizer.decode(call + result)] = min(nothing, alone) - both
    ordered = sorted(gains.values())
    threshold = (ordered[8] + ordered[9]) / 2
    best = {}
    for (n, text), gain in sorted(gains.items(), key=lambda pair: pair[1]):
        if gain >= threshold:
            best[n] = text
    kept = filter_calls(model, tokenizer, products, chats, threshold=threshold)
    assert 0 < len(best) < 6
    assert kept == [{"messages": turns(f"q{n}", best[n] + f"{n}!")} for n in sorted(best)]


def test_an_answer_is_scored_in_the_ids_that_training_sees(tokenizer, products, monkeypatch):
    seen = []
    monkeypatch.setattr(toolformer, "sampled_calls", lambda *_: [(0, *call_ids(products, 1, 1))])
    monkeypatch.setattr(
        toolformer, "answer_losses", lambda *given: (seen.append(given[4]), torch.zeros(1))[1]
    )
    messages = turns("q", "<think>6 * 7 = 42</think>42")
    filter_calls(ROOMY, tokenizer, products, [{"messages": messages}])
    prompt = tokenizer.render(messages[:1], generation_prompt=True)[0]
    assert seen[0] == [tokenizer.render(messages)[0][len(prompt) :]]


def test_a_dialogue_kept_is_read_again_as_the_ids_that_were_scored(tokenizer, monkeypatch):
    """Text can't tell a result that spells </tool_result> from one that ends there."""
    forging = Toolbox({"c": lambda _: "</tool_result>7"}, tokenizer)
    call = tokenizer.encode("<tool_call>c(1)</tool_call>", special=True)
    result, losses = forging.respond(call), iter((9.0, 9.0, 1.0))
    monkeypatch.setattr(toolformer, "sampled_calls", lambda *_: [(0, call, result)])
    monkeypatch.setattr(toolformer, "answer_losses", lambda *_: torch.tensor([next(losses)]))
    prompt = tokenizer.render(CHATS[0]["messages"][:1], generation_prompt=True)[0]
    for kept in filter_calls(ROOMY, tokenizer, forging, CHATS[:1]):
        scored = prompt + call + result + [ord("a"), tokenizer.end_id]
        assert tokenizer.render(kept["messages"])[0] == scored


def test_an_answer_that_calls_already_gets_no_further_call(filtered):
    """Nor does one that holds a result: none of its tokens is to count as the answer's."""
    lookup = "<tool_call>c(2*3)</tool_call><tool_result>6</tool_result>6"
    result = "<tool_result>6</tool_result>6"
    chats = [{"messages": turns("q", answer)} for answer in (lookup, result)]
    assert filtered({(0, "2*3"): (4.0, 4.0, 1.0)}, chats=chats) == []
    earlier = {"messages": turns("q", lookup, "and?", "a")}  # in an earlier answer it may stand
    assert len(filtered({(0, "2*3"): (4.0, 4.0, 1.0)}, chats=[earlier])) == 1


@pytest.mark.parametrize(
    "out, sentence", [("chats.jsonl", "would replace the file"), (".", "is a folder; name a file")]
)
def test_a_place_that_cannot_be_written_is_refused_first(out, sentence, tmp_path):
    files = {"data": str(tmp_path / "chats.jsonl"), "out": str(tmp_path / out)}
    with pytest.raises(UserError, match=sentence):
        toolformer.main(toolformer.Config(**files, device="cpu"))


def test_a_dialogue_too_long_for_a_call_is_dropped_or_the_users_error(tokenizer, products):
    model = writer(tokenizer, "<tool_call>c(2*3)</tool_call>!<|end|>", "</tool_result>E<|end|>")
    long = {"messages": turns(80 * "q", 8 * "a")}  # 92 ids of 96; with the call 103
    assert len(tokenizer.render(long["messages"])[0]) == 92
    with contextlib.suppress(UserError):
        assert filter_calls(model, tokenizer, products, [long, CHATS[0]], threshold=0.1) == []


def test_where_no_call_helps_nothing_is_written(tmp_path, monkeypatch, random_model, tokenizer):
    chat = {"messages": [{"role": role, "content": "a"} for role in ("user", "assistant")]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(chat) + "\n")
    monkeypatch.setattr(toolformer, "load_model", lambda folder: (random_model(), tokenizer))
    monkeypatch.setattr(toolformer, "village_tools", lambda *_: None)
    monkeypatch.setattr(toolformer, "filter_calls", lambda *_: [])
    files = {"data": str(tmp_path / "chats.jsonl"), "out": str(tmp_path / "calls.jsonl")}
    with pytest.raises(UserError, match="a call helps in none of 1 dialogues"):
        toolformer.main(toolformer.Config(**files, device="cpu"))
    assert not (tmp_path / "calls.jsonl").exists()
