"""Rewards that rules give: small functions of an example and the text of a completion.

`example` has "answer" and "check" (data/README.md). Whatever the text holds, they return a number,
in time that grows with its length only.
"""

import re
from fractions import Fraction

# --- numbers -------------------------------------------------------------------------------------

# How numbers are read, in answers, completions and votes: exactly, and from ASCII digits.
#   sign        - − or –, glued to digits or their currency, and not behind a word, a digit or a
#               bracket: COVID-19 is 19, and the difference 5-3 and the range 3–5 end with 3 and 5;
#               Chinese and the like have no blanks: 答案是-5 is -5
#   thousands   groups of three behind a comma, apostrophe, underscore or blank: 1,000, 1 000, 1'000
#   decimals    behind a point: .5, 0.50, 5.; a comma never begins decimals
#   fractions   3/4, 1 1/2, 1 and 1/2, \frac{3}{4}
#   powers      1e3, 10^3, 2.5 x 10^3
#   units       are left out: $5, 5 EUR and 5% are 5
# Dates, times and versions (2024-05-12, 10:30, 1.2.3) are no numbers, and passed over, as is what
# belongs to a word or unit (H2O, m2, cm^2). What may mean two things (1,5 and 1,2,3), is written
# otherwise (10³, 4½, 42k) or still to be worked out (2√3, (-2)^2, x/2, \boxed{2 + 3}) is unclear,
# and never right.
LONGEST = 2000  # characters at a text's end in which its answer is looked for
DIGITS = 100  # that a number may have
BLANK = r"[ \xa0\u2009\u202f]"
GROUPS = "|".join(f"(?:{mark}[0-9]{{3}})+" for mark in (",", "['’]", "_", BLANK))
DECIMAL = rf"(?:(?:[0-9]{{1,3}}(?:{GROUPS})|[0-9]+)(?![0-9])(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
CURRENCY = r"(?:(?:[A-Z]{0,2}\\?[$€£¥₹]|\b(?:USD|EUR|GBP|JPY|CHF|CNY|INR)\b) ?)"
EXPONENT = r"[+−-]?[0-9]+"
NUMBER = (
    rf"(?:(?<![^\W\u2e80-\uffff])(?<![)\]}}%−–-])(?P<sign>[−–-])|\+)?{CURRENCY}?"
    rf"(?:(?P<whole>[0-9]+)(?:{BLANK}| and )(?=[0-9]+ ?/))?(?P<above>{DECIMAL})"
    rf"(?: ?/ ?(?P<below>{DECIMAL})|[eE](?P<e>{EXPONENT})(?!\w)|"
    rf"(?P<ten> ?(?:[x×*·]|\\times|\\cdot) ?10)? ?(?:\^|\*\*) ?\{{?(?P<power>{EXPONENT})\}}?)?"
    r"(?![0-9⁰¹²³⁴-⁹¼-¾⅐-⅞]|[.,][0-9]|[kKMB](?!\w)|x(?![A-Za-z])|\^\{?[a-z](?![a-z])|"
    r" ?(?:\\sqrt|\\pi|[√π]))"
)
OTHER = r"[0-9]+(?:(?::[0-9]+)+|(?:-[0-9]+){2,}|(?:/[0-9]+){2,}|(?:\.[0-9]+){2,})(?:[.,][0-9]+)*"
OTHER += r"|(?:(?<=[A-Za-z])|(?<=[A-Za-z}$]\^)[+−-]?|(?<=[A-Za-z}$]\^\{)[+−-]?)[0-9][0-9.,]*"
ROOT = r"(?:\\[dt]?frac ?\{)?[0-9.]*(?:\\sqrt|\\pi(?![a-z])|[√π])[^\s$=]*(?: [+−*/-] [^\s$=]+)*"
UNCLEAR = rf"{ROOT}|[)\]] ?(?:\^|\*\*)\{{?[0-9a-z+−-]+|(?<=[A-Za-z)}}]/)[0-9.]+"
BEGINS = r"(?=[0-9.+−–A-Z\\$€£¥₹√π)\]-])"  # quick, for nowhere else need be tried
IN_TEXT = rf"{BEGINS}(?:(?P<other>{OTHER})|{UNCLEAR}|(?P<number>{NUMBER})|[0-9](?:[0-9.,]*[0-9])?)"
IN_TEXT = re.compile(IN_TEXT)
ALONE = re.compile(rf"{CURRENCY}?{NUMBER} ?(?:\\?%|{CURRENCY})?\.?")


def last_number(text):
    r"""The number that a text ends with, a Fraction: that of its last \boxed{}, of a last line
    "#### 42" (GSM8K), or else its last one. None without any, and where it is unclear.
    """
    whole, text = text, boxed(text)
    _, mark, line = text.rpartition("####")
    if mark and (value := as_number(line.partition("\n")[0])) is not None:  # else it's a heading
        return value
    found = [m for m in IN_TEXT.finditer(_plain(text[-LONGEST:])) if not m["other"]]
    several = len(found) > 1 and text != whole and "=" not in text  # in a box
    return _value(found[-1]) if found and found[-1]["number"] and not several else None


def as_number(text):
    """The number that a whole text is, a Fraction; else None."""
    match = ALONE.fullmatch(_plain(boxed(text).strip())) if len(text) <= LONGEST else None
    return _value(match) if match else None


def boxed(text):
    r"""What stands in the last \boxed{}, as many models write their answer; else the text."""
    _, begun, inside = text.rpartition("\\boxed{")
    depth = 1
    for brace in re.finditer("[{}]", inside[:LONGEST] if begun else ""):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return inside[: brace.start()]
    return text


def _plain(text):
    """LaTeX's thousands and fractions as plain text has them."""
    text = re.sub(r"\\[ ,;:]", "\u2009", text.replace("{,}", ",").replace("\\!", ""))
    text = re.sub(r"(?<=[0-9]) ?(?=\\[dt]?frac)", " ", text)  # 1\frac{1}{2} is 1 1/2
    fraction = r"\\[dt]?frac ?(?:\{([^{}]*)\} ?\{([^{}]*)\}|([0-9]) ?([0-9]))"
    return re.sub(fraction, r"\1\3/\2\4", text)


def _value(match):
    """The Fraction that a match of NUMBER stands for, or None."""
    if len(re.findall("[0-9]", match[0])) > DIGITS:
        return None
    above, below = (Fraction(re.sub("[^0-9.]", "", match[x] or "1")) for x in ("above", "below"))
    exponent = int((match["e"] or match["power"] or "1").replace("−", "-"))
    if below == 0 or abs(exponent) > DIGITS or above == 0 and exponent < 0:
        return None
    if match["e"] or match["ten"]:
        value = above * Fraction(10) ** exponent
    else:
        value = above**exponent / below + int(match["whole"] or 0)
    return -value if match["sign"] else value


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
