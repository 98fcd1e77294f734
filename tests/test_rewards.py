"""Rewards by rules: exact, and a number in bounded time whatever a model may write."""

import json
from fractions import Fraction
from pathlib import Path

import pytest
from helpers import random_strings, seconds

from nanollm.config import UserError
from nanollm.formats import choice_columns
from nanollm.metrics import majority
from nanollm.records import as_prompt, read_prompts
from nanollm.rewards import (
    accuracy,
    as_number,
    check_answer,
    chosen,
    final_answer,
    last_number,
    reft_reward,
    says,
    think_format,
)

NUMBER = {"answer": "42", "check": "number"}
WORD = {"answer": "Mira", "check": "contains", "not": ["Trino"]}
CITIES = ["London", "Paris", "Paris, Texas", "A city in Asia"]
CHOICE = {"answer": "B", "check": "choice", "choices": CITIES}


@pytest.mark.parametrize(
    "completion, answer",
    [
        ("42", "42"), ("<think>6 * 7 = 42</think>It is 42.", "It is 42."),
        ("<think>a</think>b<think>c</think>d", "d"), ("a</think>b", "b"), ("42<think>43", ""),
        ("<tool_call>c(42)</tool_call>42", ""),
        ("<tool_call>c(1)</tool_call><tool_result>1</tool_result>One.", "One."),
        ("a<tool_call>b</tool_call><tool_result>c</tool_result>d<tool_call>42", ""),
        ("<think>a<tool_call>b</tool_call><tool_result>c</tool_result></think>d", "d"),
        ("<think>a<tool_call>b</tool_call><tool_result>c</tool_result>42", ""),
    ],
)  # fmt: skip
def test_the_final_answer_is_what_follows_thoughts_and_results(completion, answer):
    assert final_answer(completion) == answer


@pytest.mark.parametrize(
    "example, completion, reward",
    [
        (NUMBER, "The answer is 42.", 1), (NUMBER, "42.0", 1), (NUMBER, "It is 42, not 43.", 0),
        (NUMBER, "-42", 0), (NUMBER, "", 0), (NUMBER, "<think>43</think>42", 1),
        (NUMBER, "<tool_call>c(42)</tool_call><tool_result>42</tool_result>", 0),
        (WORD, "It is Mira.", 1), (WORD, "It is Mira or Trino.", 0),
        (WORD, "<think>Trino?</think>It is Mira.", 1), (WORD, "<think>Mira</think>", 0),
        (WORD, r"Trino? No: \boxed{Mira}, so not Trino.", 1), (WORD, r"Mira? \boxed{Trino}", 0),
        (WORD | {"check": "exact"}, r"It is \boxed{Mira}.", 1),
        (WORD | {"begins": "Ahoy"}, r"Ahoy, \boxed{Mira}", 1),
        (WORD | {"begins": "Ahoy"}, "Mira", 0),
    ],
)  # fmt: skip
def test_accuracy_is_that_of_the_final_answer(example, completion, reward):
    assert accuracy(example, completion) == reward


@pytest.mark.parametrize(
    "completion, reward",
    [
        ("  <think> a\nb </think> c\nd \n", 1), ("<think>a</think> \n", 0),
        ("<think> </think>b", 0), ("<think>a", 0), ("x<think>a</think>b", 0),
        ("</think>a<think>b", 0), ("<think><think>a</think>b", 0), ("<think>a</think></think>b", 0),
        ("<think>a</think>b<think>", 0),
    ],
)  # fmt: skip
def test_the_format_reward_wants_one_thought_and_then_an_answer(completion, reward):
    assert think_format(NUMBER, completion) == reward


@pytest.mark.parametrize(
    "example, completion, reward",
    [
        (NUMBER, "It is 42.", 1), (NUMBER, "It is 41.", 0.1), (NUMBER, "<think>41</think>Hm.", 0),
        (WORD, "Mira", 1), (WORD, "Trino", 0.1), (WORD, "<think>Mira</think> ", 0),
        (CHOICE, "B", 1), (CHOICE, "A", 0.1), (CHOICE, "A or B", 0),
    ],
)  # fmt: skip
def test_the_reward_of_reft_gives_a_tenth_for_an_answer_of_the_right_kind(
    example, completion, reward
):
    assert reft_reward(example, completion) == reward


@pytest.mark.parametrize(
    "example, completions, winner",
    [
        (NUMBER, ["41", "42", "so 42"], "42"), (NUMBER, ["41", "42"], "41"),
        (NUMBER, ["no idea", "none", "42"], "42"), (NUMBER, ["a", "b"], ""), (NUMBER, [], ""),
        (NUMBER, ["<think>1</think>42", "<think>41</think>7", "42.0"], "<think>1</think>42"),
        (NUMBER, ["<think>7", "<think>7", "42"], "42"), (NUMBER, ["1/2", "0.5", "7"], "1/2"),
        (NUMBER, ["0", "0", "42"], "0"), (NUMBER, ["1,5", "1,5", "7"], "7"),
        (WORD, ["Mira", "trino", "Trino "], "trino"), (WORD, ["", " ", "Mira"], "Mira"),
        (WORD, ["Trino", r"So \boxed{Mira}", "mira"], r"So \boxed{Mira}"),
        (CHOICE, ["A", "(B)", "Paris", "A or C", "A or C"], "(B)"),
    ],
)  # fmt: skip
def test_the_majority_is_the_first_completion_with_the_answer_of_most(example, completions, winner):
    assert majority(example, completions) == winner


# What is written alone -> its value, the same at the end of a sentence
VALUES = [
    ("42", 42), ("-42", -42), ("−42", -42), ("–42", -42), ("+42", 42), ("007", 7), ("0", 0),
    ("1,000", 1000), ("1,234,567", 1234567), ("1 234 567", 1234567), ("1\u202f234", 1234),
    ("1\xa0234.5", "1234.5"), ("1\u2009000", 1000), ("1'000'000", 10**6), ("1’000", 1000),
    ("1_000", 1000), ("1{,}000", 1000), (r"1\,000", 1000), (r"1,\!000", 1000),
    ("-1,000.25", "-1000.25"),
    (".5", "1/2"), ("-.5", "-1/2"), ("0.50", "1/2"), ("2.50", "5/2"), ("5.", 5), ("0.1", "1/10"),
    ("3/4", "3/4"), ("-3/4", "-3/4"), ("3 / 4", "3/4"), ("1 1/2", "3/2"), ("-1 1/2", "-3/2"),
    ("6/3", 2),
    (r"\frac{3}{4}", "3/4"), (r"\dfrac{-3}{4}", "-3/4"), (r"-\frac{3}{4}", "-3/4"),
    (r"1\frac{1}{2}", "3/2"), (r"\frac34", "3/4"), ("1e3", 1000), ("2.5E-3", "1/400"),
    ("$5", 5), ("-$5", -5), ("$-5", -5), ("−€3.50", "-7/2"), ("$.50", "1/2"), (r"\$1,200", 1200),
    ("US$5", 5), ("5 €", 5), ("£ 7", 7), ("$42$", 42),
    ("50%", 50), ("12.5 %", "12.5"), (r"50\%", 50), ("-3%", -3), (r"90^\circ", 90),
    (100 * "9", 10**100 - 1),
]  # fmt: skip
# What a text that is no number as a whole ends with
LAST = [
    ("1 and 2", 2), ("5 - 3", 3), ("5 -3", -3), ("x-5", 5), ("(-5)", -5), ("x=-5", -5),
    ("COVID-19", 19), ("a well-known 5", 5), ("5%-10%", 10), ("(2)-5", 5), ("5 EUR", 5),
    ("--5", 5), ("- 5", 5), ("It is 7.", 7), ("It is 7.Then", 7), ("x7y", None), ("**42**", 42),
    ("12 m²", 12), ("4 or ٣", 4), ("6 * 7 = 42", 42), ("5-3=2", 2), ("1, 5", 5), ("答案是-5", -5),
    ("It is 1,000, not", 1000), ("In 2019,2 was", None), ("7 123 4567", 4567), ("2/3 of 9", 9),
    # words and units are passed over
    ("42 m2", 42), ("42 cm^2", 42), (r"\boxed{42 \text{ cm}^2}", 42), ("42 m s^{-2}", 42),
    ("42 cm$^2$", 42), ("42kg", 42), ("42nd", 42), ("5m^2", 5),
    ("3 CO2", 3), ("1.5 m2", Fraction(3, 2)), ("A4", None), ("m1,000", None),
    (r"\boxed{1\ 000}", 1000), ("**(42)**", 42), ("x/2", None),
    # unclear, not worked out, or not to be had
    ("42 on 2024-05-12", None), ("10:30", None), ("1.2.3", None), ("1:1,000", None),
    ("12/05/2024", None), ("5-3", None), ("3–4", None), ("10^3", None), ("10^{-2}", None),
    ("2**10", None), ("2.5 x 10^3", None),
    (r"\boxed{5, 6}", None), (r"\boxed{(3+4)*2}", None), (r"\boxed{5-3}", None),
    (r"\boxed{3 + 4 = 7}", 7), (r"\boxed{x=5}", 5),
    ("7 is 42k", None), ("4.5K.", None), ("5M", None), ("3x", None), ("2x3", None), ("2x3=6", 6),
    ("7 is (-2)^2", None), ("(-2)**2", None), ("(-2)^2 = 4", 4), ("2^n", None),
    (r"\boxed{2\sqrt{3}} of 8", None), (r"\boxed{3\pi}", None), (r"\sqrt{16} - 3 = 1", 1),
    (r"\frac{\sqrt{3}}{2}", None), (r"\frac{1}{\sqrt{2}}", None), (r"\frac{\pi}{2}", None),
    ("3√2", None), ("2π", None), ("2π = 6.28", Fraction("6.28")),
    ("1,5", None), ("1,2,3", None), ("(3,4)", None), ("12,34", None), ("1,0000", None),
    ("1.234,56", None), ("10³", None), ("4½", None), ("5/0", None), ("1e999", None), ("0^-1", None),
    (101 * "9", None), ("7 then " + 101 * "9", None), ("7 then 1,5", None), ("", None),
    ("none", None), ("-", None), ("٣", None), ("１２", None), ("²", None), ("½", None),
    # what counts as the final answer
    (r"So \boxed{42}, as 6 * 7 = 42 in base 10.", 42), (r"\boxed{1} or \boxed{2} of 3", 2),
    (r"\boxed{\frac{3}{4}} of 8", Fraction(3, 4)), (r"\boxed{42\text{ dollars}} of 50", 42),
    (r"\boxed{42}", 42), (r"\boxed{} of 8", None), (r"7 is \boxed{none}", None),
    ("3 + 4 = 7\n#### 1,072\nThis took 3 steps.", 1072),
    ("#### Step 3\nIt is 42.", 42), ("#### 7\n\n#### Step 2: 42", 42), ("#### $5", 5),
]  # fmt: skip


@pytest.mark.parametrize("text, value", VALUES)
def test_a_number_has_one_value_alone_in_a_sentence_in_an_answer_and_in_a_vote(text, value):
    value = Fraction(value)
    assert as_number(f" {text}\n") == last_number(text) == value
    assert last_number(f"Of 7 it is {text}") == last_number(f"It is ({text}).") == value
    problem = as_prompt({"prompt": "How many?", "answer": text})
    assert problem["check"] == "number" and as_number(problem["answer"]) == value
    right = [f"It is {text}", str(value)]
    assert all(accuracy(problem, each) == 1 for each in right)
    wrong = [f"It is {text}, not 11", f"{-value or 1}", f"{value + 1}", f"{value / 10 + 1}", "none"]
    assert not any(accuracy(problem, each) for each in wrong)
    assert majority(problem, ["11", *right]) == right[0]


@pytest.mark.parametrize("text, value", LAST)
def test_the_last_number_of_a_text_is_exact_or_none(text, value):
    found = last_number(text)
    assert found == value and (found is None or isinstance(found, Fraction))
    assert as_number(text) is None or "####" in text or "boxed" in text
    if value is None:  # unclear is never right, not even where the answer is unclear, too
        assert not check_answer({"answer": text, "check": "number"}, text)


SAMPLES = Path(__file__).parents[2] / "shared/data/gsm8k"


@pytest.mark.skipif(not SAMPLES.exists(), reason="the real samples are not here")
def test_every_real_gsm8k_answer_is_what_stands_behind_its_marks():
    answers = [
        json.loads(line)["answer"].rpartition("####")
        for name in ("train", "test")
        for line in (SAMPLES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    for steps, mark, answer in answers:
        value = int(answer.replace(",", ""))
        problem = as_prompt({"question": "?", "answer": steps + mark + answer})
        assert (problem["answer"], problem["check"]) == (str(value), "number")
        assert as_number(answer) == last_number(steps + mark + answer) == value
    assert len(answers) == 8792


# --- multiple choice -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "completion, letter",
    [
        ("B", "B"), ("(B)", "B"), ("B.", "B"), ("B)", "B"), ("**B**", "B"), ("B. Paris", "B"),
        ("b", "B"), ("(b)", "B"), ("b) Paris", "B"), ("option (b)", "B"), ("The answer is B", "B"),
        ("The answer is (B).", "B"), ("Answer: b", "B"), ("The answer is:\nB", "B"), ("Paris", "B"),
        ("It is paris.", "B"), (r"\boxed{B}", "B"), (r"A? No: \boxed{\text{B}}, not C.", "B"),
        ("A is wrong, C too.\nThe answer is B.", "B"), ("The answer is A. The answer is B", "B"),
        ("The answer is B.\nA is a trap.", "B"), ("B is right because I know it.", "B"),
        ("A dog told me: B", "B"), ("Choose B: it is a city.", "B"),
        ("C", "C"), ("Paris, Texas", "C"), ("C. Paris, Texas", "C"), ("A", "A"), ("A or so", "A"),
        ("A is right", "A"), ("A city in Asia", "D"), ("The answer is a city in Asia.", "D"),
        ("A or B", None), ("A and B", None), ("A, B", None), ("B. London", None),
        ("Paris (A)", None), ("Paris or London", None), ("not B but C", None), ("E", None),
        ("BC", None), ("Parisian", None), ("vitamin-B", None), ("B's", None), ("I think so", None),
        ("A dog", None), ("The answer is", None), ("The answer is B or C", None),
        (r"B \boxed{}", None), ("B" + 3000 * " ", None), ("", None), ("Rome", None),
    ],
)  # fmt: skip
def test_a_completion_chooses_what_it_names_alone(completion, letter):
    assert chosen(CITIES, completion) == letter
    for wanted in "ABCD":
        assert accuracy(CHOICE | {"answer": wanted}, completion) == (wanted == letter)


def test_a_letter_without_choices_is_that_of_a_choice_and_no_word():
    problem = as_prompt({"prompt": "Which? A) hen B) goat", "answer": "A"})
    right, wrong = ["A", "(a)", "It is A.", "A) hen"], ["It is a goat, so B.", "A or B", "A hen"]
    assert [accuracy(problem, said) for said in right + wrong] == [1, 1, 1, 1, 0, 0, 0]
    assert majority(problem, ["B", "(A)", "A."]) == "(A)"
    assert not check_answer({"answer": "A", "check": "contains"}, "It is a goat, so B.")


def test_choices_that_are_numbers_or_letters_are_told_apart():
    numbers = ["4", "-4", "4.5", "14"]
    for said, letter in zip((*numbers, "1.4", "-4.5"), (*"ABCD", None, None)):
        assert chosen(numbers, said) == chosen(numbers, f"It is {said}.") == letter, said
    blood = ["B", "A", "AB", "O"]
    assert [chosen(blood, said) for said in ("A", "B", "AB", "O")] == [*"ABCD"]
    assert says("It is 4.", "4") and not any(says(text, "4") for text in ("-4", "4.5", "1,4", "14"))


LISTED = "Which pet?\nA. a cow\nB. a cat\nAnswer with the letter of the right choice."
PET, PETS = {"question": "Which pet?"}, ["a cow", "a cat"]
FORMS = [  # as published: MMLU, its table, ScienceQA, ARC's two, and with the answer as text
    PET | {"subject": "pets", "choices": PETS, "answer": 1},
    dict(zip(choice_columns(["Which pet?", *PETS, "B"]), ["Which pet?", *PETS, "B"])),
    PET | {"choices": PETS, "answer": 1, "hint": "", "image": None, "task": "closed choice"},
    {"id": "x", "question": {"stem": "Which pet?", "choices": [
        {"text": "a cow", "label": "1"}, {"text": "a cat", "label": "2"}]}, "answerKey": "2"},
    PET | {"id": "x", "choices": {"text": PETS, "label": ["A", "B"]}, "answerKey": "B"},
    PET | {"choices": PETS, "answer": "a cat"},
    PET | {"options": PETS, "answer": "B", "answer_index": 1},
    PET | {"options": {"A": "a cow", "B": "a cat"}, "answer": "B"},
    PET | {"A": "a cow", "B": "", "C": "a cat", "D": "", "answer": "C"},
    {"id": "x", "question": {"stem": "Which pet?", "choices": [
        {"text": "a cow", "label": "1"}, {"text": "a cat", "label": "2"}]}, "answerKey": 2},
    {"prompt": "Which pet?", "choices": {"text": PETS}, "answer": "B"},
    {"instruction": "Which pet?", "options": PETS, "answer": "B"},
    {"messages": [{"role": "user", "content": LISTED}], "choices": PETS, "answer": "B"},
]  # fmt: skip


@pytest.mark.parametrize("record", FORMS)
def test_a_question_with_choices_is_asked_with_letters_and_checked_by_them(record):
    problem = as_prompt(record)
    assert problem["messages"] == [{"role": "user", "content": LISTED}]
    assert (problem["answer"], problem["check"], problem["choices"]) == ("B", "choice", PETS)
    assert problem.get("task") == record.get("task", record.get("subject"))
    assert accuracy(problem, "(B)") == accuracy(problem, "A cat.") == 1
    assert accuracy(problem, "A or B") == accuracy(problem, "A") == 0
    assert as_prompt(problem) == problem


def test_a_hint_and_an_image_stand_before_the_question_and_no_answer_is_a_prompt():
    record = PET | {"choices": PETS, "hint": "One meows.", "image": "a.png", "answer": ""}
    problem = as_prompt(record)
    assert problem["messages"][0]["content"] == f"<image>\nOne meows.\n{LISTED}"
    assert "answer" not in problem


@pytest.mark.parametrize(
    "record, sentence",
    [
        *((PET | {"choices": PETS, "answer": answer}, "none of the 2 choices")
          for answer in (2, -1, True, "C", "a dog", 1.0, ["B"])),
        *((PET | {"choices": choices, "answer": 0}, "2 to 26")
          for choices in ("ab", ["a"], 27 * ["a"], {"label": PETS})),
        (PET | {"choices": ["a", None], "answer": 0}, "must be texts"),
        ({"question": 7, "choices": PETS, "answer": 0}, "must be text"),
        ({"prompt": "a", "check": "choice", "answer": "hen"}, "letter of one of"),
        (PET | {"choices": PETS, "options": ["a", "b"], "answer": 0}, "is said twice"),
    ],
)  # fmt: skip
def test_choices_that_are_none_are_refused(record, sentence):
    with pytest.raises(UserError, match=sentence):
        as_prompt(record)


MANY = ("1 ", "1.", "-1", "-", ",", "a", "<think> ", "</think>", "1,000,", "1 000 ", "1/", "1e")
MANY += ("\\frac{", "\\boxed{", "{", "$", "#### ", "B ", "answer is ")


@pytest.mark.parametrize("part", [*MANY, "<tool_call></tool_result>"])
def test_two_megabytes_are_judged_in_bounded_time(part):
    text = 2 * 2**20 // len(part) * part

    def judge():
        last_number(text)
        for reward in (accuracy, think_format, reft_reward):
            assert 0 <= reward(NUMBER, text) <= 1
        assert 0 <= accuracy(CHOICE, text) <= 1
        majority(NUMBER, [text])

    assert seconds(judge) < 0.4


def test_random_completions_are_judged_without_exception():
    for text in random_strings(2_000, seed=3):
        answer, number = final_answer(text), last_number(text)
        assert text.endswith(answer) and "<think>" not in answer and "<tool_call>" not in answer
        assert number is None or isinstance(number, Fraction)
        assert think_format(NUMBER, text) in (0, 1)
        for example in (NUMBER, WORD, CHOICE):
            assert reft_reward(example, text) in (0, 0.1, 1)
            assert accuracy(example, text) == (reft_reward(example, text) == 1)
            assert majority(example, [text]) in ("", text)


def test_a_table_of_choices_needs_no_line_that_names_its_columns(tmp_path):
    path = tmp_path / "mmlu.csv"
    path.write_text('"Two, or three?",1,2,3,4,B\nFour?,4,5,6,7,A\n', encoding="utf-8")
    assert [p["answer"] for p in read_prompts(path)] == ["B", "A"]
    for cells in (["question", *"ABCD", "answer"], ["Q?", "x", "y", "C"], ["a", "A"], [], ["x"]):
        assert choice_columns(cells) is None
