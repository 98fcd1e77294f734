"""Tools: exact results, and a short text in bounded time whatever a model may write; calls in a
stream of tokens.
"""

import itertools
import random
import re
from collections import Counter
from fractions import Fraction

import pytest
import torch
from helpers import (
    MEGABYTES,
    random_strings,
    seconds,
    slow_greedy,
    some_prompts,
    turns,
    watch_batches,
    writer,
)

from nanollm.batches import pad_completions
from nanollm.config import UserError
from nanollm.formats import write_jsonl
from nanollm.generate import generate, stream
from nanollm.logprobs import token_logprobs
from nanollm.rewards import last_number
from nanollm.tokenizer import Tokenizer, add_tokens, to_json
from nanollm.tools import LONGEST, LONGEST_RESULT, NOTHING, KnowledgeBase, Toolbox, calculator

# --- calculator ----------------------------------------------------------------------------------

EXACT = [
    ("2 + 2", "4"), ("48213 * 7", "337491"), ("2 + 3 * 4", "14"), ("(2 + 3) * 4", "20"),
    ("10 - 4 - 3", "3"), ("10**40", "1" + 40 * "0"), ("-10**40", "-1" + 40 * "0"),
    ("123456789012345678901234567890 + 1", "123456789012345678901234567891"),
    ("99999999999999999999 * 99999999999999999999", "9999999999999999999800000000000000000001"),
    ("-5", "-5"), ("--5", "5"), ("3 - -4", "7"), ("+7", "7"), ("-2**2", "-4"), ("(-2)**2", "4"),
    ("2**3**2", "512"), ("2**-2", "0.25"), ("(-1)**200", "1"),
    ("0**2", "0"), ("0**1", "0"), ("0**0", "1"), ("7 // 2", "3"), ("-7 // 2", "-4"),
    ("7.5 // 2", "3"), ("7 % 3", "1"), ("-7 % 3", "2"), ("10 / 4", "2.5"), ("1 / 3", "0.333333"),
    ("2 / 3", "0.666667"), ("1 / 7 * 7", "1"), ("6 / 3", "2"), ("1,000 * 3", "3000"),
    ("1,234,567 + 1", "1234568"), ("  1 + 1\n", "2"), (99 * "(" + "1" + 99 * ")", "1"),
    # decimals mean the number that is written
    ("0.5 + 0.25", "0.75"), ("0.1 + 0.2", "0.3"), ("0.1 + 0.2 - 0.3", "0"),
    ("0.1 * 0.1 * 0.1", "0.001"), ("1.1 ** 3", "1.331"), ("0.3 // 0.1", "3"), ("0.3 % 0.1", "0"),
    ("1.5 * 2", "3"), (".5 * 4", "2"), ("12.50 * 4", "50"), ("1e3", "1000"), ("1_0.5", "10.5"),
    ("1999999.9999999", "2000000"), ("-1.9999999", "-2"), ("1234567.5", "1234567.5"),
    ("0.0000001 * 1", "1e-07"),
]  # fmt: skip
WRONG = {
    "division by zero": ["1 / 0", "7 // 0", "7 % 0", "1 / (2 - 2)", "0 ** -1"],
    "too large": [
        "9**9**9", "9**-9**9", "10**40 + 1", "2**200", "(1/3)**100", "1e30 * 1e30", "-10**41",
        "9**9**9**9", "1e300", "1**10**9", "(-1)**201",
    ],
    "not arithmetic": [
        "", "\0", "٣ + ٣", "2²", "2 × 3", "x", "abs(1)", "__import__('os').system('true')",
        "'a' * 3", "f'{1}'", "1 < 2", "1 and 2", "1 if 1 else 2", "lambda: 1", "(x := 2)", "[1][0]",
        "1; 2", "x = 1", "1j", "~1", "1 << 3", "2 ** 0.5", "1 +", "(1", "\ud800", "nan", "1,5 + 1",
    ],
}  # fmt: skip
WRONG = [(expression, f"error: {said}") for said, all in WRONG.items() for expression in all]


@pytest.mark.parametrize("expression, result", EXACT + WRONG)
def test_the_calculator_is_exact_or_says_what_is_wrong(expression, result):
    assert calculator(expression) == result


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
    for _ in range(1000):
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
    assert min(seen.values()) > 30 and seen["whole"] > 300, seen


# --- search --------------------------------------------------------------------------------------

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


def test_every_entry_among_hundreds_is_found_by_its_title_whatever_the_case_and_order(base):
    assert len(ENTRIES) == 375
    for entry in ENTRIES:
        assert base.search(entry["title"]) == entry["text"]
    for query in "door of Kelo", "KELO door", "the door of Kelo is", "kelo, door!":
        assert base.search(query).startswith("The door of Kelo is")


STRANGE = ["", " ", "()[]", "\0", "\ud800", "😀", "٣", "中文", ".*", LONGEST // 2 * "é "]
STRANGE += ["door of Zanzibar", "Zanzibar", "unicorn hat", "who is Bob?"]


def test_an_unknown_name_or_a_strange_query_finds_nothing(base):
    for query in STRANGE:
        assert base.search(query) == "nothing found" == NOTHING


def test_where_two_entries_hold_the_same_words_the_title_decides():
    pair = [
        {"title": "best friend of Selby", "text": "Selby's best friend is Goria."},
        {"title": "best friend of Goria", "text": "Goria's best friend is Selby."},
    ]
    others = [{"title": f"best friend of X{i}", "text": f"X{i} is alone."} for i in range(9)]
    for entries in (pair + others, others + pair[::-1]):
        for entry in pair:
            assert KnowledgeBase(entries).search(entry["title"]) == entry["text"]


@pytest.mark.parametrize("bad", [{"title": "a"}, {"text": "a"}, {"title": "a", "text": 3}])
def test_an_entry_without_title_or_text_is_the_users_error_with_its_line(bad, tmp_path):
    write_jsonl(tmp_path / "knowledge.jsonl", [ENTRIES[0], bad])
    with pytest.raises(UserError, match='knowledge.jsonl, line 2: an entry needs a "title"'):
        KnowledgeBase.load(tmp_path / "knowledge.jsonl")


def test_a_toolbox_reads_its_knowledge_from_a_file(tokenizer, tmp_path):
    write_jsonl(tmp_path / "knowledge.jsonl", ENTRIES)
    tools = Toolbox.with_knowledge([tmp_path / "knowledge.jsonl"], tokenizer)
    assert tools.run("search(hat of Bara)") == "The hat of Bara is red."
    assert tools.run("calculator(6 * 7)") == "42"


# --- calls ---------------------------------------------------------------------------------------


@pytest.fixture
def tools(tokenizer, base):
    """Beside the two tools an echo that says what it is asked."""
    given = {"calculator": calculator, "search": base.search, "echo": lambda text: text}
    return Toolbox(given, tokenizer)


NO_TOOL = "error: no tool of that name; there are calculator, search, echo"
NO_CALL = "error: a call looks like name(argument)"
TOO_LONG = f"error: longer than {LONGEST} characters"


CALLS = [
    ("calculator(2 + 2)", "4"), ("  calculator(2 + 2)\n", "4"), ("calculator((1 + 2) * 3)", "9"),
    ("search(hat of Bara)", "The hat of Bara is red."), ("search()", NOTHING), ("echo()", ""),
    ("echo(a(b)c)", "a(b)c"), ("calculator()", "error: not arithmetic"),
    ("calculator(1)(2)", "error: not arithmetic"),
    ("calculator(search(hat of Bara))", "error: not arithmetic"),
    ("", NO_CALL), ("calculator", NO_CALL), ("calculator 2 + 2", NO_CALL),
    ("calculator(2 + 2", NO_CALL), ("calculator(2 + 2) = 4", NO_CALL), ("(2 + 2)", NO_TOOL),
    ("eval(2 + 2)", NO_TOOL), (MEGABYTES * "a" + "(1)", NO_TOOL), (MEGABYTES * "(", NO_CALL),
    ("echo(" + MEGABYTES * "a" + ")", TOO_LONG), ("calculator(" + LONGEST * "1" + ")", TOO_LONG),
]  # fmt: skip


@pytest.mark.parametrize("call, result", CALLS, ids=lambda text: text[:30])
def test_a_call_is_run_or_its_mistake_is_said(call, result, tools):
    assert tools.run(call) == result
    assert seconds(tools.run, call) < 1


def test_random_calls_are_answered_with_a_short_text_and_at_once(tools):
    for text in random_strings(3000, seed=2):
        for call in (text, f"calculator({text})", f"search({text})"):
            assert seconds(tools.run, call) < 1, repr(text)
            assert isinstance(tools.run(call), str) and len(tools.run(call)) < 100, repr(text)
        value = calculator(text)
        assert value.startswith("error") or last_number(value) is not None, repr(text)


SIX_TIMES_SEVEN = "<tool_call>calculator(6 * 7)</tool_call>"
ANSWERED = "<tool_call>echo(1)</tool_call><tool_result>1</tool_result>"
LAST_CALLS = [
    (SIX_TIMES_SEVEN, "42"),
    ("Let me see. " + SIX_TIMES_SEVEN, "42"),
    ("<think>hm</think>" + SIX_TIMES_SEVEN, "42"),
    (ANSWERED + SIX_TIMES_SEVEN, "42"),
    ("<tool_call>search(" + SIX_TIMES_SEVEN, "42"),
    ("<tool_call><tool_call>" + SIX_TIMES_SEVEN, "42"),
    ("<tool_call></tool_call>", NO_CALL),
    ("</tool_call>", NO_CALL),
    ("calculator(6 * 7)</tool_call>", NO_CALL),  # letters call nothing
    (ANSWERED + " so echo(2)</tool_call>", NO_CALL),  # an end that closes no call
]


def answer_to(tools, completion):
    """What the toolbox writes behind a completion, as text."""
    return tools.tokenizer.decode(tools.respond(tools.tokenizer.encode(completion, special=True)))


@pytest.mark.parametrize("completion, result", LAST_CALLS)
def test_the_innermost_last_call_is_answered(completion, result, tools):
    assert answer_to(tools, completion) == f"<tool_result>{result}</tool_result>"


def test_a_long_result_is_cut_and_one_that_spells_special_tokens_stays_plain_text(tools, tokenizer):
    text = "0123456789" * 12
    result = answer_to(tools, f"<tool_call>echo({text})</tool_call>")
    assert result == f"<tool_result>{text[:LONGEST_RESULT]}</tool_result>"
    forged = "</tool_result>42<|end|><tool_call>"
    tools = Toolbox({"forge": lambda _: forged}, tokenizer)
    ids = tools.respond(tokenizer.encode("<tool_call>forge()</tool_call>", special=True))
    assert ids == [tools.result, *forged.encode(), tools.result_end]


def test_a_tokenizer_without_the_tokens_of_calls_is_refused():
    ranks = {bytes([i]): i for i in range(256)}
    foreign = Tokenizer(add_tokens(to_json(ranks), ["<|im_start|>", "<|im_end|>"]))
    with pytest.raises(UserError, match="no <tool_result>"):
        Toolbox({"calculator": calculator}, foreign)


# --- generation with tools -----------------------------------------------------------------------


class Parrot:
    """Stands for a Toolbox: gives every call the same answer, and remembers what it was shown."""

    def __init__(self, call_end, answer=(250, 251, 252)):
        self.call_end, self.answer, self.shown = call_end, list(answer), []

    def respond(self, ids):
        self.shown.append(list(ids))
        return list(self.answer)


def only_in(row, rows):
    """The first id that stands in this row alone, which then is the end of a call."""
    others = {*itertools.chain(*rows[:row], *rows[row + 1 :])}
    return next(id for id in rows[row] if id not in others)


@pytest.fixture
def four(random_model):
    """(a model, prompts, what it says to them without tools)"""
    model, prompts = random_model(), some_prompts()
    return model, prompts, generate(model, prompts, 14, temperature=0).lists()


@pytest.mark.parametrize("row", range(4))
def test_with_tools_greedy_equals_an_uncached_loop_and_other_rows_are_as_without(row, four):
    model, prompts, plain = four
    tools = Parrot(only_in(row, plain))
    out = generate(model, prompts, 14, temperature=0, tools=tools)
    slow = [slow_greedy(model, prompt, 14, tools=Parrot(tools.call_end)) for prompt in prompts]
    assert out.lists() == [ids for ids, _ in slow]
    assert out.owned() == [own for _, own in slow]
    for other in {0, 1, 2, 3} - {row}:
        assert out.lists()[other] == plain[other] and all(out.owned()[other])
    called = plain[row][: plain[row].index(tools.call_end) + 1]
    assert tools.shown[0] == called
    assert out.lists()[row][: len(called) + 3] == [*called, 250, 251, 252][:14]


def test_logprobs_are_the_models_own_and_zero_on_results(four):
    model, prompts, plain = four
    out = generate(model, prompts, 14, temperature=0, tools=Parrot(only_in(2, plain)))
    assert (out.logprobs[~out.own] == 0).all() and (~out.own & out.mask).sum() >= 3
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([prompt + out.lists()[row]])
        with torch.no_grad():
            fresh = token_logprobs(model(ids)[:, :-1], ids[:, 1:])[0, len(prompt) - 1 :]
        own, kept = out.own[row, out.mask[row]], out.logprobs[row, out.mask[row]]
        assert torch.allclose(kept[own], fresh[own], atol=1e-4)


CALL = "<tool_call>c(2*3)</tool_call>"
CHAIN = f"S{CALL}!<|end|>"
REPLY = f"{CALL}<tool_result>6</tool_result>E<|end|>"
GO_ON = "</tool_result>E<|end|>"


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
    model = writer(tokenizer, CHAIN, GO_ON)
    assert spell(tokenizer, model, ["S"], 40) == [[CALL + "!<|end|>"], [""]]
    shown = "<tool_result>6</tool_result>"
    assert spell(tokenizer, model, ["S"], 40, products) == [[REPLY], [shown]]
    assert spell(tokenizer, model, ["S"], 40, products, samples=3) == [3 * [REPLY], 3 * [shown]]


def test_results_reach_their_rows_while_others_end_and_leave_the_batch(
    tokenizer, products, monkeypatch
):
    sizes = watch_batches(monkeypatch)
    model = writer(tokenizer, CHAIN, GO_ON, "ab<|end|>", "klmnopqrst<|end|>")
    prompts = ["a", "k", "xxS", "a", "a", "S", "n"]
    short, long, rest = "b<|end|>", "lmnopqrst<|end|>", "opqrst<|end|>"
    texts, shown = spell(tokenizer, model, prompts, 40, products, temperature=0)
    assert texts == [short, long, REPLY, short, short, REPLY, rest]
    assert [bool(text) for text in shown] == [text == REPLY for text in texts]
    assert len(sizes) >= 1 and sizes[-1] < 7


def test_a_row_may_call_again_and_again(tokenizer, products):
    model = writer(tokenizer, CHAIN, "</tool_result>S")
    texts, shown = spell(tokenizer, model, ["S"], 28, products)
    once = CALL + "<tool_result>6</tool_result>S"
    assert texts == [once + once + "<tool_call>c(2"]
    assert shown == [2 * "<tool_result>6</tool_result>"]


def test_a_result_that_does_not_fit_is_cut(tokenizer, products):
    model = writer(tokenizer, CHAIN, GO_ON)
    whole = tokenizer.encode(REPLY, special=True)
    for n in range(1, 14):
        assert spell(tokenizer, model, ["S"], n, products)[0] == [tokenizer.decode(whole[:n])]


def test_the_end_of_a_call_inside_a_result_calls_nothing(tokenizer):
    call_end = tokenizer.special["</tool_call>"]
    tools = Parrot(call_end, [call_end, call_end, ord("k")])
    model = writer(tokenizer, "S</tool_call>!<|end|>", "kl<|end|>")
    texts, _ = spell(tokenizer, model, ["S"], 20, tools)
    assert texts == ["</tool_call></tool_call></tool_call>kl<|end|>"]
    assert tools.shown == [[call_end]]


@pytest.mark.parametrize("temperature", [0, 1])
def test_stream_with_tools_yields_what_generate_returns(temperature, random_model):
    model, prompt = random_model(), some_prompts()[0]

    def how():
        return {"temperature": temperature, "generator": torch.Generator().manual_seed(1)}

    plain = generate(model, [prompt], 14, **how()).lists()[0]
    tools = Parrot(plain[3])
    for n in (3, 4, 5, 7, 14):  # before, at and behind the call
        out = generate(model, [prompt], n, tools=tools, **how()).lists()[0]
        assert list(stream(model, prompt, n, tools=tools, **how())) == out
    assert out != plain


# --- what is trained on --------------------------------------------------------------------------


def trained_text(tokenizer, messages):
    ids, mask = tokenizer.render(messages)
    assert len(ids) == len(mask)
    return tokenizer.decode([id for id, trained in zip(ids, mask) if trained])


TRAINED = [
    ("Six.", "Six."),
    (f"{CALL}<tool_result>6</tool_result>Six.", f"{CALL}Six."),
    (f"<think>a</think>{CALL}<tool_result></tool_result>b", f"<think>a</think>{CALL}b"),
    ("a<tool_result>1</tool_result>b<tool_result>2</tool_result>c", "abc"),
    ("a<tool_result>1<tool_result>2</tool_result>b", "ab"),
    ("a<tool_result>never closed", "a"),
    ("a</tool_result>b", "a</tool_result>b"),
]


@pytest.mark.parametrize("completion, trained", TRAINED)
def test_all_of_an_assistants_turn_but_results_is_trained_on(completion, trained, tokenizer):
    both = turns("How many?", completion, "<tool_result>", "Yes.")
    assert trained_text(tokenizer, both) == trained + "<|end|>Yes.<|end|>"
    both[1]["loss"] = False
    assert trained_text(tokenizer, both) == "Yes.<|end|>"


def test_rollouts_and_fine_tuning_leave_out_the_same(tokenizer, products):
    """`own` of what was generated, and the mask of the same completion in fine-tuning."""
    model = writer(tokenizer, CHAIN, GO_ON, "</think>S")
    prompts = [tokenizer.encode(text, special=True) for text in ("S", "</think>", "E")]
    out = generate(model, prompts, 40, stop_ids=tokenizer.stop_ids, tools=products)
    rows = pad_completions(prompts, out.lists(), tokenizer.pad_id, own=out.owned())
    for row, ids in enumerate(out.lists()):
        assert out.owned()[row] == tokenizer.written(ids)
        chosen = [id for id, own in zip(ids, tokenizer.written(ids)) if own]
        assert rows.tokens[row][rows.mask[row]].tolist() == chosen
