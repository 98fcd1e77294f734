"""Rewards by rules: exact, and a number in bounded time whatever a model may write."""

import itertools
from fractions import Fraction

import pytest
from helpers import MEGABYTES, random_strings, seconds

from nanollm.metrics import majority, pass_at_k
from nanollm.rewards import (
    accuracy,
    check_answer,
    final_answer,
    last_number,
    reft_reward,
    think_format,
)

NUMBER = {"answer": "42", "check": "number"}
WORD = {"answer": "Mira", "check": "contains", "not": ["Trino"]}


@pytest.mark.parametrize(
    "completion, answer",
    [
        ("", ""), ("42", "42"), ("<think>6 * 7 = 42</think>It is 42.", "It is 42."),
        ("<think>a</think>b<think>c</think>d", "d"), ("a</think>b", "b"), ("<think>42", ""),
        ("42<think>43", ""), ("<think>a</think>42<think>", ""), ("<tool_call>42", ""),
        ("<tool_call>c(1)</tool_call><tool_result>1</tool_result>One.", "One."),
        ("<tool_call>c(1)</tool_call><tool_result>42", ""), ("<tool_call>c(42)</tool_call>42", ""),
        ("a<tool_call>b</tool_call><tool_result>c</tool_result>d<tool_call>42", ""),
        ("<think>a</think><tool_call>b</tool_call><tool_result>c</tool_result>d", "d"),
        ("<think>a<tool_call>b</tool_call><tool_result>c</tool_result></think>d", "d"),
        ("<tool_call>b</tool_call><tool_result>c</tool_result><think>a</think>d", "d"),
        ("<think>a<tool_call>b</tool_call><tool_result>c</tool_result>42", ""),
        ("a</tool_call>42", "a</tool_call>42"),
    ],
)  # fmt: skip
def test_the_final_answer_is_what_follows_thoughts_and_results(completion, answer):
    assert final_answer(completion) == answer


@pytest.mark.parametrize(
    "example, completion, reward",
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
    "example, completion, reward",
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
    assert pass_at_k(1000, 1, 100) == pytest.approx(0.1)  # without large factorials


@pytest.mark.parametrize(
    "example, completions, winner",
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


MANY = ("1", "1 ", "1.", "-1", "-", ",", "a", "<", "<think> ", "</think>", "<think>1</think>")


@pytest.mark.parametrize("part", [*MANY, "<tool_call></tool_result>"])
def test_ten_megabytes_are_judged_in_bounded_time(part):
    text = MEGABYTES // len(part) * part

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
