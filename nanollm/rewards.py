"""Rewards that rules give: small functions of an example and the text of a completion.

`example` has "answer" and "check" (data/README.md). Whatever the text holds, they return a number,
in time that grows with its length only.
"""

import re
from fractions import Fraction

# --- numbers -------------------------------------------------------------------------------------

# How numbers are read, in answers, completions and votes: exactly, and from ASCII digits.
#   sign        - − or –, not behind a word, a digit or a bracket: COVID-19 is 19, 答案是-5 is -5
#   thousands   groups of three behind a comma, apostrophe, underscore or blank: 1,000, 1 000, 1'000
#   decimals    behind a point: .5, 0.50, 5.; a comma never begins decimals
#   fractions   3/4, 1 1/2, \frac{3}{4}; exponents: 1e3
#   units       are left out: $5, 5 EUR, 5% and 5kg are 5
# Whatever begins with a letter is skipped (H2O, m2, cm^2). A number that could mean two things
# (1,5), is written in another way (10^3, 4½, 42k, 10:30, 2024-05-12) or has still to be worked out
# (2√3, 5-3, \boxed{2 + 3}) is unclear, and never right.
LONGEST = 2000  # characters at a text's end in which its answer is looked for
DIGITS = 100  # characters that a number may have
MARK = "[,'’_ \xa0\u2009\u202f]"  # between thousands
NUMBER = re.compile(
    r"(?P<sign>[+−–-]?)(?:(?P<whole>[0-9]+) (?=[0-9]+/))?"
    rf"(?P<value>(?:[0-9]{{1,3}}(?:{MARK}[0-9]{{3}})+|[0-9]*)(?:\.[0-9]*)?"
    r"(?:[eE][+-]?[0-9]{1,2}|/[0-9]+)?)"
)
UNIT = r"(?<=[0-9.])(?![kKMB]$|x)[A-Za-z]+(?:\^[23])?$"
ODD = "√π⁰¹²³⁴-⁹¼-¾⅐-⅞"
RUN = re.compile(  # of letters and digits, and of what joins these
    rf"(?:(?<![A-Za-z0-9)\]}}%^{ODD}−–-])[+−–-](?=\.?[0-9]))?"
    rf"(?:[A-Za-z0-9{ODD}]|\.(?=[0-9])|\^[−-]?|(?<=[0-9][eE])[+-](?=[0-9])"
    rf"|(?<=[A-Za-z0-9{ODD}])/(?=[0-9{ODD}])|(?<=[0-9{ODD}])[,:'’_+−–-](?=[0-9{ODD}])"
    rf"|(?<=[0-9]){MARK}(?=[0-9]{{3}}(?![0-9])|[0-9]+/[0-9]))+"
)
PLAIN = (  # what LaTeX and currencies become, in this order
    (r"\\!", ""),
    (r"\{,\}", ","),
    (r"\\[ ,;:]", "\u2009"),
    (r"\\sqrt ?\{([^{}]*)\}", r"√\1"),
    (r"\\pi(?![a-z])", "π"),
    (r"(?<=[0-9]) ?(?=\\[dt]?frac)", " "),  # 1\frac{1}{2} is 1 1/2
    (r"\\[dt]?frac ?\{([^{}]*)\} ?\{([^{}]*)\}", r"\1/\2"),
    (r"\\[dt]?frac ?([0-9]) ?([0-9])", r"\1/\2"),
    (r"(?<=[0-9]) ?/ ?(?=[0-9])", "/"),
    (r"[A-Z]{0,2}\\?[$€£¥₹]", ""),
    (r"[{}]", ""),
    (r"\^\\circ", ""),
    (r"(?<=[0-9)])\*\*(?=[0-9−-])", "^"),
)


def last_number(text):
    r"""The number that a text ends with, a Fraction: that of its last \boxed{}, of a last line
    "#### 42" (GSM8K), or else its last one. None without any, and where it is unclear.
    """
    inside = boxed(text)
    _, mark, line = inside.rpartition("####")
    if mark and (value := as_number(line.partition("\n")[0])) is not None:  # else it's a heading
        return value
    runs = [match[0] for match in RUN.finditer(_plain(inside[-LONGEST:]))]
    found = [run for run in runs if not re.fullmatch("[A-Za-z][^/]*", run)]
    if not found or inside != text and len(found) > 1 and "=" not in inside:
        return None  # no number, or several in a box
    return _value(re.sub(UNIT, "", found[-1]))


def as_number(text):
    """The number that a whole text is, a Fraction; else None."""
    if len(text) > LONGEST:
        return None
    return _value(_plain(boxed(text)).strip().rstrip("\\%. "))


def _plain(text):
    """A text without LaTeX and currencies."""
    for pattern, plain in PLAIN:
        text = re.sub(pattern, plain, text)
    return text


def _value(text):
    """The Fraction that a text, which is a number as a whole, stands for; else None."""
    match = NUMBER.fullmatch(text)
    if not match or len(text) > DIGITS:
        return None
    try:
        value = Fraction(re.sub(MARK, "", match["value"])) + int(match["whole"] or 0)
    except (ValueError, ZeroDivisionError):
        return None
    return value if match["sign"] in ("", "+") else -value


def boxed(text):
    r"""What stands in the last \boxed{}, as many models write their answer; else the text."""
    _, begun, inside = text.rpartition("\\boxed{")
    depth = 1
    for brace in re.finditer("[{}]", inside[:LONGEST] if begun else ""):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return inside[: brace.start()]
    return text


# --- is it right? --------------------------------------------------------------------------------


def says(completion, words):
    """Does the completion hold these words, as whole words? The case counts for one letter only."""
    if words.lower() not in completion.lower():  # quick, for there may be a thousand to look for
        return False
    return re.search(_whole(words), completion, re.IGNORECASE * (len(words) > 1)) is not None


def _whole(words):
    """Pattern of words that are no part of a longer word or number: 4 is neither in -4 nor 4.5."""
    number = r"(?<![0-9][.,])(?<![−-])" if words[:1].isdecimal() else ""
    return rf"(?<!\w){number}{re.escape(words)}(?!\w|[.,][0-9])"


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # of choices, in the order in which they are listed
CAPITAL = r"(?<![\w'’-])[A-Z](?![\w'’-])"
SMALL = r"^\W*[a-z](?=\W*$|[).:])|\([a-z]\)"  # b, b) Paris, option (b)
VERB = r"(?:or|and|is|was|would|because|since|as|for|but|due)\b"
WORD = rf"(?m:(?:^|(?<=[.!?] ))A|\bI) (?!{VERB})(?=[a-z])"  # A dog barks: no letter of a choice


def chosen(choices, completion):
    """The letter of the one choice that a completion names, by letter (B, (B), B., b) or in its own
    words; None where it names none, or several. If it says "answer is" or "answer:", only the rest
    of that line counts, the last time.
    """
    *before, text = re.split(r"(?i)\banswer\s*(?:is|:)", boxed(completion)[-LONGEST:])
    text = text.strip(" *:\n").partition("\n")[0] if before else text
    text = re.sub(SMALL, lambda match: match[0].upper(), text)
    named, listed = set(), LETTERS[: len(choices)]
    words = {letter: choice.strip(" .") for letter, choice in zip(listed, choices)}
    for letter in sorted(words, key=lambda letter: -len(words[letter])):  # Paris, Texas; Paris
        if words[letter] not in ("", *listed) and says(text, words[letter]):
            named.add(letter)
            text = re.sub(_whole(words[letter]), " ", text, flags=re.IGNORECASE)
    named |= {each for each in re.findall(CAPITAL, re.sub(WORD, " ", text)) if each in listed}
    return named.pop() if len(named) == 1 else None


def in_style(example, completion):
    """Does the completion begin and end as the example wants?"""
    said = completion.strip()
    return said.startswith(example.get("begins", "")) and said.endswith(example.get("ends", ""))


def check_answer(example, completion):
    r"""Is the completion right? By example["check"]:

    exact     equals the answer, blanks around it aside
    number    its last number equals the answer
    choice    names one of example["choices"], where there are any, the answer's, and no other
    contains  holds the answer as whole words, and no value of example["not"]
    unknown   says "I don't know", and holds no value of example["not"]

    Of a completion with \boxed{} only that counts. With example["begins"] or example["ends"] it
    must also begin or end so: a style that counts.
    """
    if not in_style(example, completion):
        return False
    check, answer, completion = example["check"], example["answer"], boxed(completion)
    if check in ("exact", "number", "choice"):
        wanted = as_number(answer) if check == "number" else answer.strip()
        return wanted is not None and extracted(example, completion) == wanted
    if check not in ("contains", "unknown"):
        raise ValueError(f"unknown check {check!r}: exact, number, choice, contains or unknown")
    if any(says(completion, wrong) for wrong in example.get("not", ())):
        return False
    if check == "contains":
        return says(completion, answer)
    completion = completion.replace("\u2019", "'")
    return says(completion, "don't know") or says(completion, "do not know")


def extracted(example, completion):
    """What a completion answers, in the form that is compared: a Fraction, the letter of a choice,
    or text; None where nothing was found.
    """
    if example["check"] == "number":
        return last_number(completion)
    if example["check"] == "choice":
        several = max(8, LETTERS.find(example["answer"]) + 1)  # I is mostly a word
        return chosen(example.get("choices", [""] * several), completion)
    return boxed(completion).strip() or None


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
    return 0.0 if extracted(example, final_answer(completion)) is None else 0.1
