"""Rewards that rules give: small functions of an example and the text of a completion.

`example` has "answer" and "check" (data/README.md). Whatever the text holds, they return a number,
in time that grows with its length only.
"""

import re
from fractions import Fraction

# --- is it right? --------------------------------------------------------------------------------


def says(completion, words):
    """Does the completion hold these words, as whole words, in upper or lower case?"""
    if words.lower() not in completion.lower():  # quick, for there may be a thousand to look for
        return False
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", completion, re.IGNORECASE) is not None


def last_number(text):
    """The last number in a text as a Fraction, so that large ones are compared digit by digit;
    None without any, or with one of more than 100 digits. Looks at the last 2,000 characters only.
    """
    numbers = re.findall(r"(?<![0-9])-?[0-9]+(?:\.[0-9]+)?", text[-2000:].replace(",", ""))
    return Fraction(numbers[-1]) if numbers and len(numbers[-1]) <= 100 else None


def in_style(example, completion):
    """Does the completion begin and end as the example wants?"""
    said = completion.strip()
    return said.startswith(example.get("begins", "")) and said.endswith(example.get("ends", ""))


def check_answer(example, completion):
    """Is the completion right? By example["check"]:

    exact     equals the answer, blanks around it aside
    number    its last number equals the answer
    contains  holds the answer as whole words, and no value of example["not"]
    unknown   says "I don't know", and holds no value of example["not"]

    With example["begins"] or example["ends"] it must also begin or end so: a style that counts.
    """
    if not in_style(example, completion):
        return False
    check, answer = example["check"], example["answer"]
    if check == "exact":
        return completion.strip() == answer.strip()
    if check == "number":
        return last_number(completion) == Fraction(answer)
    if check not in ("contains", "unknown"):
        raise ValueError(f"unknown check {check!r}: exact, number, contains or unknown")
    if any(says(completion, wrong) for wrong in example.get("not", ())):
        return False
    if check == "contains":
        return says(completion, answer)
    completion = completion.replace("\u2019", "'")
    return says(completion, "don't know") or says(completion, "do not know")


def final_answer(completion):
    """What a completion says after thinking and calling: the text behind the last </think> or
    </tool_result>; "" where one of them was begun and never closed.
    """
    for begin, end in ("<think>", "</think>"), ("<tool_call>", "</tool_result>"):
        before, closed, after = completion.rpartition(end)
        completion = after if closed else before + after
        if begin in completion:
            return ""
    return completion


def accuracy(example, completion):
    """1 for a right final answer, else 0."""
    return float(check_answer(example, final_answer(completion)))


def is_right(example, completion):
    """Is the completion of a test example right? That of a cloze example, which has no "check", has
    to begin with the answer, and the answer's last word must end there.
    """
    if "check" in example:
        return bool(accuracy(example, completion))
    follows = completion[len(example["answer"]) :][:1]
    return completion.startswith(example["answer"]) and not follows.isalpha()


def think_format(example, completion):
    """1 for <think>, some text, </think>, some text, once and in this order; else 0.

    The format reward of DeepSeek-R1 (Guo et al. 2025, arXiv:2501.12948), section 2.2.2.
    """
    thought, closed, answer = completion.strip().removeprefix("<think>").partition("</think>")
    once = "<think>" not in thought + answer and "</think>" not in answer
    begins = completion.strip().startswith("<think>")
    return float(begins and once and bool(closed and thought.strip() and answer.strip()))


def reft_reward(example, completion):
    """1 for a right answer, 0.1 where an answer could at least be extracted, else 0.

    Luong et al. 2024 (ReFT, arXiv:2401.08967), section 3.2.
    """
    if accuracy(example, completion):
        return 1.0
    answer = final_answer(completion)
    given = last_number(answer) is not None if example["check"] == "number" else answer.strip()
    return 0.1 if given else 0.0
