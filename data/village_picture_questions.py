"""Questions about a scene, their answers, and what reads a question and says whether an answer is
true.

    existence   count   colour   place   comparison       plain: one look is enough
    sum         more    all      season                   steps: look, then conclude

A question is a wording with slots, for example "How many {objects} are there?". `ask` fills the
slots; `read` goes back, by a regular expression made of the same wording. So whatever can be asked
can be checked, no matter who asked: `answer_of` and `is_true` filter what a teacher model writes.
"""
import re
from typing import NamedTuple

from data.village_scenes import COLOURS, HELD_OUT, KINDS, PLACES, SEASONS
from data.village_tasks import check_answer

PLAIN = ("existence", "count", "colour", "place", "comparison")
STEPS = ("sum", "more", "all", "season")
WORDINGS = {
    "existence": (
        "Is there a {object}?", "Is there a {object} in the picture?", "Do you see a {object}?",
        "Can you see a {object} anywhere?", "Does the picture show a {object}?",
        "Are there any {objects}?"),
    "count": (
        "How many {objects} are there?", "How many {objects} do you see?", "Count the {objects}.",
        "How many {objects} are in the picture?", "What is the number of {objects}?",
        "Tell me how many {objects} you can see."),
    "colour": (
        "What colour {be}?", "Which colour {be}?", "What is the colour of {the}?",
        "Tell me the colour of {the}.", "Which colour do you see on {the}?",
        "In which colour did somebody paint {the}?"),
    "place": (
        "Where {be}?", "Where in the picture {be}?", "Where can I find {the}?",
        "In which part of the picture {be}?", "Where do you see {the}?",
        "Where must I look for {the}: left, middle or right?"),
    "comparison": (
        "Are there more {objects} than {others}?", "Do you see more {objects} than {others}?",
        "Are there fewer {objects} than {others}?",
        "Which is bigger here, a {object} or a {other}?",
        "What is bigger in the picture: a {object} or a {other}?"),
    "sum": (
        "How many {objects} and {others} are there together?",
        "Count the {objects} and the {others}. How many are they together?",
        "If you add the {objects} to the {others}, how many are they?",
        "What is the number of {objects} and {others} in all?"),
    "more": (
        "Which are more, {objects} or {others}, and by how many?",
        "What is the difference between the numbers of {objects} and {others}?",
        "By how many do the numbers of {objects} and {others} differ?",
        "How many more or fewer {objects} than {others} are there?"),
    "all": (
        "How many things are there in all, not counting the trees?",
        "Without the trees, how many things do you see altogether?",
        "Count everything but the trees. How many things are there?",
        "How many things does the picture show, trees left out?"),
    "season": (
        "Which season is it?", "What season does the picture show?",
        "In which season was this painted?", "Is it spring, summer, autumn or winter?",
        "What time of the year is it here?"),
}
FAMILIES = tuple(WORDINGS)
LOOKS = {
    "spring": "The trees are pink with blossoms, and the grass is pale green.",
    "summer": "The trees are full of green leaves, and the grass is green.",
    "autumn": "The leaves of the trees are orange, and the ground is brown with fallen leaves.",
    "winter": "The trees are bare, and snow covers the ground."}


class Question(NamedTuple):
    """A question about one kind (of this colour, if one is named), perhaps beside another kind."""
    family: str
    wording: str
    kind: str = None
    colour: str = None
    other: str = None


# --- from a question to words, and back ------------------------------------------------


def number_of(number, kind, colour=None):
    """2, "bell", "red" -> "2 red bells"."""
    return f"{number} {named(kind, colour, number)}"


def named(kind, colour=None, number=1):
    """The noun, with its colour if one is given: "red bell", "bells"."""
    noun = kind if number == 1 else KINDS[kind]
    return f"{colour} {noun}" if colour else noun


def ask(question, scene):
    """The question in words."""
    kind, colour, other = question[2:]
    slots = {}
    if kind:
        alone = scene.count(kind) == 1
        the = f"the {named(kind, None, 1 if alone else 2)}"
        slots = {"object": named(kind, colour), "objects": named(kind, colour, 2), "the": the,
                 "be": f"{'is' if alone else 'are'} {the}"}
    if other:
        slots |= {"other": other, "others": KINDS[other]}
    return question.wording.format(**slots)


KIND_OF = {word: kind for kind, plural in KINDS.items() for word in (kind, plural)}
ANY_KIND = "|".join(sorted(KIND_OF, key=len, reverse=True))
OBJECT = rf"(?:(?P<colour>{'|'.join(COLOURS)}) )?(?P<kind>{ANY_KIND})"
OTHER = rf"(?P<other>{ANY_KIND})"
SLOTS = {"object": OBJECT, "objects": OBJECT, "the": f"the {OBJECT}",
         "be": f"(?:is|are) the {OBJECT}", "other": OTHER, "others": OTHER}


def pattern_of(wording):
    parts = re.split(r"\{(\w+)\}", wording)  # literal text and slots in turn
    return re.compile("".join(SLOTS[part] if i % 2 else re.escape(part)
                              for i, part in enumerate(parts)), re.IGNORECASE)


PATTERNS = [(family, wording, pattern_of(wording))
            for family, wordings in WORDINGS.items() for wording in wordings]


def read(text):
    """The Question that these words ask, or None."""
    text = " ".join(text.replace("<image>", "").split())
    for family, wording, pattern in PATTERNS:
        found = pattern.fullmatch(text)
        if found:
            said = {key: word.lower() for key, word in found.groupdict().items() if word}
            kind, other = KIND_OF.get(said.get("kind")), KIND_OF.get(said.get("other"))
            return Question(family, wording, kind, said.get("colour"), other)
    return None


# --- what is true ------------------------------------------------------------------


def truth(scene, question):
    """The answer, as short as it can be: "yes", "3", "red", "left", "cup", "autumn".

    None where the question has no answer, such as the colour of what isn't there.
    """
    family, wording, kind, colour, other = question
    group, rest = scene.group(kind), scene.group(other)
    if kind is not None and kind == other:
        return None
    if family == "existence":
        return "yes" if scene.count(kind, colour) else "no"
    if family == "count":
        return str(scene.count(kind, colour))
    if family in ("colour", "place"):
        suits = group and colour in (None, group.colour)
        return getattr(group, family) if suits else None
    if family == "season":
        return scene.season
    if family == "all":
        return str(sum(group.number for group in scene.groups))
    if "bigger" in wording:
        if not group or not rest or group.size == rest.size or colour not in (None, group.colour):
            return None
        return kind if group.size == "big" else other
    a, b = scene.count(kind, colour), scene.count(other)
    if family == "comparison":
        return "yes" if (a < b if "fewer" in wording else a > b) else "no"
    return str(a + b if family == "sum" else abs(a - b))


def check_of(question, answer):
    """What `check_answer` needs: "answer", "check" and, beside "contains", "not"."""
    if answer.isdigit():
        return {"answer": answer, "check": "number", "not": []}
    for answers in (("yes", "no"), tuple(COLOURS), PLACES, SEASONS):
        if answer in answers:
            wrong = [a for a in answers if a != answer]
            break
    else:  # the bigger of two kinds
        loser = question.other if answer == question.kind else question.kind
        wrong = [loser, KINDS[loser]]
    return {"answer": answer, "check": "contains", "not": wrong}


def reply(scene, question):
    """The answer in a sentence."""
    family, wording, kind, colour, other = question
    answer, group = truth(scene, question), scene.group(kind)
    if family in ("sum", "more", "all"):
        return f"The answer is {answer}."
    if family == "season":
        return f"It is {answer}."
    if family == "count":
        return f"There {'is' if answer == '1' else 'are'} {number_of(int(answer), kind, colour)}."
    if family == "existence":  # what is there first, then whether it is what was asked for
        there = number_of(group.number, kind, group.colour) if group else f"no {KINDS[kind]}"
        verb = "is" if group and group.number == 1 else "are"
        return f"There {verb} {there}. {answer.capitalize()}."
    if "bigger" in wording:
        return f"A {answer} is bigger."
    if family == "comparison":
        counts = {kind: scene.count(kind, colour), other: scene.count(other)}
        return f"{seen(counts)} {answer.capitalize()}."
    verb = "is" if group.number == 1 else "are"
    where = answer if family == "colour" else {"middle": "in the middle"}.get(answer,
                                                                              f"on the {answer}")
    return f"The {named(kind, None, group.number)} {verb} {where}."


def worked(scene, question):
    """The answer after its steps; every number and every sum in them is true."""
    kind, other = question.kind, question.other
    if question.family == "season":
        steps = LOOKS[scene.season]
    elif question.family == "all":
        in_order = sorted(scene.groups, key=lambda group: PLACES.index(group.place))
        counts = {group.kind: group.number for group in in_order}
        steps = seen(counts)
        total, *rest = counts.values()
        for number in rest:
            steps += f" {total} + {number} = {total + number}."
            total += number
    else:
        a, b = scene.count(kind), scene.count(other)
        steps = seen({kind: a, other: b})
        if question.family == "sum":
            steps += f" {a} + {b} = {a + b}."
        elif a == b:
            steps += f" They are as many. {a} - {b} = 0."
        else:
            steps += f" There are more {KINDS[kind if a > b else other]}."
            steps += f" {max(a, b)} - {min(a, b)} = {abs(a - b)}."
    return f"<think>{steps}</think>{reply(scene, question)}"


def seen(counts):
    """{"bell": 3, "basket": 1} -> "There are 3 bells and 1 basket."."""
    verb = "is" if next(iter(counts.values())) == 1 else "are"
    return f"There {verb} {listed([number_of(n, kind) for kind, n in counts.items()])}."


def listed(parts):
    """"a, b and c"."""
    return " and ".join([", ".join(parts[:-1])] * (len(parts) > 1) + parts[-1:])


# --- is an answer true? --------------------------------------------------------------

OPPOSITES = {"more": "fewer", "fewer": "more", "bigger": "smaller"}


def answer_of(scene, text):
    """The shortest answer to a question in words; None where it can't be read, or has no answer."""
    question = read(text)
    return truth(scene, question) if question else None


def is_true(scene, question, answer_text):
    """Does this text answer the question, and is every number and every sum in it true?

    Stricter than `check_answer`: "Yes, there is a blue bell." doesn't answer whether there is a
    red one. False, too, where the question can't be read or has no answer.
    """
    asked = read(question)
    answer = truth(scene, asked) if asked else None
    if answer is None or not (numbers_true(scene, answer_text) and sums_true(answer_text)):
        return False
    said = answer_text.rsplit("</think>", 1)[-1]
    if said.strip() == reply(scene, asked):
        return True
    words = re.findall(r"[a-z']+", said.lower())
    kinds = {KIND_OF[word] for word in words if word in KIND_OF}
    if asked.kind and not kinds <= {asked.kind, asked.other}:
        return False
    colours = {asked.colour, answer}
    if asked.family != "existence":  # 2 red bells, where only the number was asked for
        colours |= {group.colour for group in scene.groups if group.kind in asked[2:]}
    if not {word for word in words if word in COLOURS} <= colours:
        return False
    if answer not in ("yes", "no") and any(w in ("no", "not") or w.endswith("n't") for w in words):
        return False
    if any(there in asked.wording and opposite in words for there, opposite in OPPOSITES.items()):
        return False
    return check_answer(check_of(asked, answer), said)


def numbers_true(scene, text):
    """Is everything like "3 red bells" as it is in the scene?"""
    return all(scene.count(KIND_OF[kind.lower()], colour.lower() or None) == int(number)
               for number, colour, kind in re.findall(
                   rf"\b(\d+) (?:({'|'.join(COLOURS)}) )?({ANY_KIND})\b", text, re.IGNORECASE))


def sums_true(text):
    """Is every a + b = c and a - b = c right?"""
    return all(int(a) + (int(b) if sign == "+" else -int(b)) == int(c)
               for a, sign, b, c in re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", text))


def names_held_out(text):
    """Does it name a pair of HELD_OUT, such as a red basket? Training never does."""
    return any(found["colour"] and found["colour"] == HELD_OUT.get(KIND_OF[found["kind"]])
               for found in re.finditer(rf"\b{OBJECT}\b", text.lower()))
