"""Questions about a scene, their answers, and a checker: it reads a question and says whether an
answer is true.

    existence   coloured   count    colour   place   comparison   plain: one look is enough
    sum         more       total    season                        steps: `steps_of` writes them

A question is a wording with slots, for example "How many {objects} are there?". `ask` fills the
slots; `read` goes back, by a regular expression made of the same wording. So whatever can be asked
can be checked, no matter who asked: `is_true` filters what a teacher model writes.
"""

import re
from itertools import accumulate, product
from typing import NamedTuple

from data.village.scenes import COLOURS, HELD_OUT, KINDS, PLACES, ROWS, SEASONS, SIZES, row_of
from data.village.world import table
from nanollm.rewards import check_answer

WORDINGS = table("""
existence   Are there any {objects}? | Are there {objects} in the picture?
            Do you see any {objects}? | Can you see {objects} anywhere?
            Does the picture show any {objects}? | Look for {objects}: are there any?
count       How many {objects} are there? | How many {objects} do you see? | Count the {objects}.
            How many {objects} are in the picture? | What is the number of {objects}?
            Tell me how many {objects} you can see.
colour      What colour {be}? | Which colour {be}? | What is the colour of {the}?
            Tell me the colour of {the}. | Which colour do you see on {the}?
            In which colour did somebody paint {the}?
place       Where {be}? | Where in the picture {be}? | Where can I find {the}?
            Where do you see {the}? | In which part of the picture {be}?
            Where must I look for {the}: left, middle or right?
comparison  Are there more {objects} than {others}? | Do you see more {objects} than {others}?
            Are there fewer {objects} than {others}? | Is a {object} bigger here than a {other}?
            Are the {objects} bigger than the {others}?
sum         How many {objects} and {others} are there together?
            Count the {objects} and the {others}. How many are they together?
            If you add the {objects} to the {others}, how many are they?
            What is the number of {objects} and {others} in all?
more        Which are more, {objects} or {others}, and by how many?
            What is the difference between the numbers of {objects} and {others}?
            By how many do the numbers of {objects} and {others} differ?
            How many more or fewer {objects} than {others} are there?
total       How many things are there in all, not counting the trees?
            Without the trees, how many things do you see altogether?
            Count everything but the trees. How many things are there?
            How many things does the picture show, trees left out?
season      Which season is it? | What season does the picture show?
            In which season was this painted? | Is it spring, summer, autumn or winter?
            What time of the year is it here?
""")
WORDINGS["coloured"] = WORDINGS["existence"]  # "Are there any blue bells?"
TASKS = tuple(WORDINGS)
SUMS = ("sum", "more", "total")
STEPS = (*SUMS, "season")
WHERE = table("""
left    on the left | on the left side | on the left of the picture
middle  in the middle | in the middle of the picture
right   on the right | on the right side | on the right of the picture
""")
IN_ROW = {"sky": "In the sky", "ground": "On the ground"}
LOOKS = {
    "spring": "The trees are pink with blossoms, and the grass is pale green.",
    "summer": "The trees are full of green leaves, and the grass is green.",
    "autumn": "The leaves of the trees are orange, and the ground is brown with fallen leaves.",
    "winter": "The trees are bare, and snow covers the ground.",
}

# --- from a question to words, and back ------------------------------------------------


class Question(NamedTuple):
    """A question about one kind (of this colour, if one is named), perhaps beside another kind."""

    task: str
    wording: str
    kind: str = None
    colour: str = None
    other: str = None


def named(kind, colour=None, number=1):
    """The noun, with its colour if one is given: "red bell", "bells"."""
    noun = kind if number == 1 else KINDS.get(kind)
    return f"{colour} {noun}" if colour else noun


def ask(question, scene):
    """The question in words."""
    kind, colour, other = question[2:]
    the = f"the {named(kind, number=scene.count(kind))}"
    slots = {"the": the, "be": f"{'is' if scene.count(kind) == 1 else 'are'} {the}"}
    slots |= {"object": named(kind, colour), "objects": named(kind, colour, 2)}
    return question.wording.format(**slots, other=other, others=KINDS.get(other))


KIND_OF = {word: kind for kind, plural in KINDS.items() for word in (kind, plural)}
ANY_KIND = "|".join(sorted(KIND_OF, key=len, reverse=True))
OBJECT = rf"(?:(?P<colour>{'|'.join(COLOURS)}) )?(?P<kind>{ANY_KIND})"
SLOTS = {"the": f"the {OBJECT}", "be": f"(?:is|are) the {OBJECT}"}
SLOTS |= dict.fromkeys(("object", "objects"), OBJECT)
SLOTS |= dict.fromkeys(("other", "others"), rf"(?P<other>{ANY_KIND})")


def pattern_of(wording):
    parts = re.split(r"\{(\w+)\}", wording)  # literal text and slots in turn
    pattern = "".join(SLOTS[part] if i % 2 else re.escape(part) for i, part in enumerate(parts))
    return re.compile(pattern, re.IGNORECASE)


PATTERNS = [(pattern_of(each), task, each) for task in TASKS for each in WORDINGS[task]]


def read(text):
    """The Question that these words ask, or None."""
    text = " ".join(text.replace("<image>", "").split())
    for pattern, task, wording in PATTERNS:
        found = pattern.fullmatch(text)
        if found:
            said = {key: word.lower() for key, word in found.groupdict().items() if word}
            kind, other = KIND_OF.get(said.get("kind")), KIND_OF.get(said.get("other"))
            task = "coloured" if task == "existence" and "colour" in said else task
            return Question(task, wording, kind, said.get("colour"), other)
    return None


# --- what is true ------------------------------------------------------------------


def truth(scene, question):
    """The answer, as short as it can be: "yes", "3", "red", "left", "cup", "autumn".

    None where the question has no answer, such as the colour of what isn't there.
    """
    task, wording, kind, colour, other = question
    group, rest = scene.group(kind), scene.group(other)
    a, b = scene.count(kind, colour), scene.count(other)
    if kind is not None and kind == other:
        return None
    if task == "season":
        return scene.season
    if task in ("colour", "place"):
        return getattr(group, task) if a else None
    if "bigger" in wording:
        if not a or not b or group.size == rest.size:
            return None
        return "yes" if group.size == "big" else "no"
    if task in ("existence", "coloured", "comparison"):
        return "yes" if (a < b if "fewer" in wording else a > b) else "no"
    total = sum(group.number for group in scene.groups)
    return str({"count": a, "sum": a + b, "more": abs(a - b), "total": total}[task])


def check_of(answer):
    """What `check_answer` needs: "answer", "check" and, beside "contains", "not"."""
    if answer.isdigit():
        return {"answer": answer, "check": "number", "not": []}
    (answers,) = (each for each in (("yes", "no"), COLOURS, PLACES, SEASONS) if answer in each)
    return {"answer": answer, "check": "contains", "not": [a for a in answers if a != answer]}


def look(scene, row, kind=None, size=False, colour=False):
    """What is in the sky or on the ground (of this kind alone, if it is there), in words with size
    and colour where wanted: "In the sky I see stars: 3, on the left."
    """
    found = [group for group in scene.in_row(row) if group.kind == kind] or scene.in_row(row)
    told = [
        " ".join([g.size] * size + [g.colour] * colour + [f"{KINDS[g.kind]}:"])
        + f" {g.number}, {WHERE[g.place][0]}"
        for g in found
    ]
    return f"{IN_ROW[row]} I see {'; '.join(told) or 'nothing'}."


def looked_up(asked, holds):
    """Which of these words hold, and so whether the one asked for does: a small model can't see
    whether two words are the same, but it can look one up.
    """
    said = {word: "yes" if true else "no" for word, true in holds.items()}
    return f"{', '.join(map(' '.join, said.items()))}. So {asked} {said[asked]}."


def completion(scene, question, steps=False):
    """The answer, mostly after a look at what was asked for: two easy steps instead of a hard one.

    Of STEPS the result alone, or behind its steps; every number and every sum in them is true.
    """
    task, wording, kind, colour, other = question
    answer = truth(scene, question)
    if task in STEPS:
        thought = f"<think>{steps_of(scene, question)}</think>" if steps else ""
        return f"{thought}{'It is' if task == 'season' else 'The answer is'} {answer}."
    row = row_of(kind)
    if task in ("colour", "place"):
        return look(scene, row, kind, colour=True)
    if task in ("count", "existence", "coloured"):
        # to look a number up by its kind is easier than to see whether two kinds are the same
        numbers = ", ".join(f"{KINDS[each]} {scene.count(each)}" for each in ROWS[row])
        thought = f"{IN_ROW[row]}: {numbers}. So {KINDS[kind]} {scene.count(kind)}."
        if task == "coloured" and scene.count(kind):  # and so with its colour
            seen = scene.group(kind).colour
            thought += f" They are {seen}: {looked_up(colour, {c: c == seen for c in COLOURS})}"
        if task == "count":
            verb = "is" if answer == "1" else "are"
            answer = f"there {verb} {answer} {named(kind, colour, int(answer))}"
        return f"<think>{thought}</think>{answer.capitalize()}."
    bigger = "bigger" in wording
    seen = " ".join(look(scene, row_of(each), each, size=bigger) for each in (kind, other))
    if bigger:
        return f"{seen} {answer.capitalize()}."
    a, b = scene.count(kind, colour), scene.count(other)
    than = "more than" if a > b else "fewer than" if a < b else "as many as"
    asked = "fewer" if "fewer" in wording else "more"
    thought = f"{seen} {a} is {than} {b}: {looked_up(asked, {'more': a > b, 'fewer': a < b})}"
    return f"<think>{thought}</think>{answer.capitalize()}."


def steps_of(scene, question):
    """What leads to the answer of a question of STEPS."""
    task, _, kind, _, other = question
    if task == "season":
        return LOOKS[scene.season]
    asked = [(row_of(k), k) for k in (kind, other)] if kind else [(row, None) for row in ROWS]
    looks = [look(scene, *each) for each in asked]
    found = [[g.number for g in scene.in_row(row) if k in (None, g.kind)] for row, k in asked]
    numbers = [number for each in found for number in each or [0]]
    if task == "more":
        low, high = sorted(numbers)
        sums = [f"{high} - {low} = {high - low}."]
    else:
        so_far = [*accumulate(numbers)]
        sums = [f"{a} + {b} = {c}." for a, b, c in zip(so_far, numbers[1:], so_far[1:])]
    return " ".join(looks + sums)


# --- is an answer true? --------------------------------------------------------------

OPPOSITES = {"more": "fewer", "fewer": "more", "bigger": "smaller"}
VOCABULARY = {*KIND_OF, *COLOURS, *PLACES, *ROWS}


def answer_of(scene, text):
    """The shortest answer to a question in words; None where it can't be read, or has no answer."""
    question = read(text)
    return truth(scene, question) if question else None


def is_true(scene, question, answer_text):
    """Does this text answer the question, and is every number, every sum, and all that it says to
    see true?

    Stricter than `check_answer`: "Yes, there is a blue bell." doesn't answer whether there is a
    red one. False, too, where the question can't be read or has no answer.
    """
    answer, asked = answer_of(scene, question), read(question)
    if answer is None or not claims_true(scene, answer_text):
        return False
    said = answer_text.rsplit("</think>", 1)[-1]
    if said.strip() == completion(scene, asked).rsplit("</think>", 1)[-1]:
        return True
    kinds = [kind for kind in (asked.kind, asked.other) if kind] or list(KINDS)
    allowed = {answer, asked.colour, *map(row_of, kinds), *kinds, *(KINDS[kind] for kind in kinds)}
    for group in filter(None, map(scene.group, kinds)):
        allowed.add(group.place)
        if asked.task not in ("existence", "coloured"):
            allowed.add(group.colour)
    words = set(re.findall(r"[a-z']+", said.lower()))
    denied = words & {"no", "not", "but"} or any(word.endswith("n't") for word in words)
    if words & VOCABULARY - allowed or (denied and answer not in ("yes", "no")):
        return False
    if any(there in asked.wording and opposite in words for there, opposite in OPPOSITES.items()):
        return False
    return check_answer(check_of(answer), said)


def claims_true(scene, text):
    """Are all numbers of things, like "3 red bells", "red bells: 3" or "bells 3", those of the
    scene, all sums right, and each "In the sky I see ..." what is there, all of it or one group?
    Does no season look like another?
    """
    what = rf"(?:(?:{'|'.join(SIZES)}) )?(?:({'|'.join(COLOURS)}) )?({ANY_KIND})"
    numbers = re.findall(rf"\b(\d+) {what}\b", text, re.IGNORECASE)
    behind = re.findall(rf"\b{what}:? (\d+)\b", text, re.IGNORECASE)
    for number, colour, kind in numbers + [(n, *rest) for *rest, n in behind]:
        if scene.count(KIND_OF[kind.lower()], colour.lower() or None) != int(number):
            return False
    for a, sign, b, result in re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", text):
        if int(a) + int(sign + b) != int(result):
            return False
    for row, words in IN_ROW.items():
        how = product((None, *ROWS[row]), (False, True), (False, True))
        true = {look(scene, row, *each) for each in how}
        if not set(re.findall(rf"{words} I see [^.]*\.", text)) <= true:
            return False
    return not any(looks in text for season, looks in LOOKS.items() if season != scene.season)


def names_held_out(text):
    """Does it name a pair of HELD_OUT, such as a red basket? Training never does."""
    found = re.findall(rf"\b{OBJECT}\b", text.lower())
    return any(colour and colour == HELD_OUT.get(KIND_OF[kind]) for colour, kind in found)
