"""What is said about images: captions, dialogues, test examples and problems.

An answer that somebody could guess without looking proves nothing, so answers are balanced: yes and
no, every number, colour and place are about equally often right.
"""

from collections import Counter, defaultdict

from data.village.files import table, wordings
from data.village.image_questions import (
    STEPS,
    SUMS,
    TASKS,
    WHERE,
    WORDINGS,
    Question,
    ask,
    check_of,
    completion,
    named,
    number_of,
    survey,
    truth,
    worked,
)
from data.village.scenes import KINDS, PLACES, ROWS, row_of
from data.village.tasks import chat
from data.village.world import capitalise

COUNTING = ("count", "sum", "total")  # for reinforcement learning
TURNS = 4  # questions in a dialogue: so it fits, with its image, into a row of 256 tokens
READER = "Here is a picture in words: {c}\nAsk a question about it, and answer it."

# --- captions ----------------------------------------------------------------------------------

DOES = {"bell": "lie", "candle": "burn", "lantern": "hang", "star": "shine"}  # the others stand
LISTS = wordings("""
The picture shows {x}. | You can see {x}. | There {be} {x}. | I see {x}. | Look: {x}. | {x}.
This is a picture of {x}. | In the picture there {be} {x}.
""")
SENTENCES = wordings("""
{x} {does} {place}. | {place} {does} {x}. | {place} there {be} {x}. | there {be} {x} {place}.
""")
SEASON_SAID = wordings("""
It is {s}. | The season is {s}. | It is {s} in the village. | The trees look like {s}.
""")
TIME_SAID = table("""
day      The sun is high. | It is day.
evening  It is evening. | The evening comes.
""")
DESCRIBE = wordings("""
Describe the picture. | What do you see? | What is in the picture? | What does the picture show?
Tell me what the picture shows. | Say what is in this picture. | Please describe what you see.
Write a caption for this picture.
""")


def caption(scene, rng):
    """What is in the image: of each group always the number, colour and kind, mostly the place
    (of all groups or of none), often the size, and perhaps the season and the time.
    """
    with_size, with_place = rng.random() < 0.7, rng.random() < 0.9
    parts = []
    for group in rng.sample(scene.groups, len(scene.groups)):
        one = group.number == 1
        looks = f"{group.size} {group.colour}" if with_size else group.colour
        a = rng.random() < 0.7 and one
        x = f"a {named(group.kind, looks)}" if a else number_of(group.number, group.kind, looks)
        does = DOES.get(group.kind, "stand") + "s" * one
        place = rng.choice(WHERE[group.place]) if with_place else ""
        parts.append({"x": x, "does": does, "be": "is" if one else "are", "place": place})
    if with_place and rng.random() < 0.33:
        said = " ".join(capitalise(rng.choice(SENTENCES).format(**slots)) for slots in parts)
    else:
        x = " and ".join(f"{slots['x']} {slots['place']}".strip() for slots in parts)
        said = capitalise(rng.choice(LISTS).format(x=x, be=parts[0]["be"]))
    around = [rng.choice(SEASON_SAID).format(s=scene.season)] * (rng.random() < 0.6)
    around += [rng.choice(TIME_SAID[scene.time])] * (rng.random() < 0.25)
    return " ".join([*around, said] if rng.random() < 0.3 else [said, *around])


def description(scene):
    """Everything but the time, the sky first."""
    seen = [words for number, words in survey(scene, size=True, colour=True) if number]
    return " ".join([f"It is {scene.season}.", *seen])


# --- which questions to ask --------------------------------------------------------


def candidates(scene, wording, task, about=None):
    """Questions in this wording that may suit the scene; with `about`, those about that kind, or,
    where what isn't there can be asked for, about what would stand in its row.
    """
    there = [group.kind for group in scene.groups]
    if task in ("existence", "count"):
        return [Question(task, wording, kind) for kind in (ROWS[row_of(about)] if about else KINDS)]
    if task in ("season", "total"):
        return [Question(task, wording)]
    if task in ("colour", "place"):
        found = [(kind, None) for kind in there]
    else:
        found = [(kind, other) for kind in there for other in there if kind != other]
    return [
        Question(task, wording, kind, other=other)
        for kind, other in found
        if about is None or about in (kind, other)
    ]


class Balance:
    """Chooses questions so that no answer is more frequent than need be: who guesses, fails."""

    def __init__(self):
        self.used = defaultdict(Counter)

    def choose(self, scene, task, rng, about=None):
        """A Question of the task, or None where the scene has none."""
        for wording in rng.sample(WORDINGS[task], len(WORDINGS[task])):
            by_answer = defaultdict(list)
            for question in candidates(scene, wording, task, about):
                by_answer[truth(scene, question)].append(question)
            by_answer.pop(None, None)
            if by_answer:
                used = self.used[wording]
                rarest = min(rng.sample(sorted(by_answer), len(by_answer)), key=used.__getitem__)
                used[rarest] += 1
                return rng.choice(by_answer[rarest])
        return None


# --- dialogues and test examples -----------------------------------------------------


def describe_example(image, scene, rng):
    return {
        "image": image,
        "messages": chat([f"<image>\n{rng.choice(DESCRIBE)}", description(scene)]),
    }


def dialogue(image, scene, balance, rng):
    """Up to TURNS questions about one image, of different tasks; in every fourth dialogue the
    first asks for a description. Three of four answers that need steps have them.
    """
    turns = [rng.choice(DESCRIBE), description(scene)] if rng.random() < 0.25 else []
    for task in rng.sample(TASKS, len(TASKS)):
        question = balance.choose(scene, task, rng) if len(turns) < 2 * TURNS else None
        if question is not None:
            with_steps = task in STEPS and rng.random() < 0.75
            turns += [ask(question, scene), (worked if with_steps else completion)(scene, question)]
    turns[0] = f"<image>\n{turns[0]}"
    return {"image": image, "messages": chat(turns)}


def question_example(image, scene, question):
    messages = chat([f"<image>\n{ask(question, scene)}"])
    check = check_of(truth(scene, question))
    return {"image": image, "messages": messages, **check, "task": question.task}


def question_examples(images, tasks, n_each, rng):
    """Up to n_each questions of each task, one to an image; about the object whose colour and kind
    were never together in training, where one is.
    """
    examples, balance = [], Balance()
    for task in tasks:
        made = []
        for image, scene in rng.sample(images, len(images)):
            about = next((group.kind for group in scene.groups if group.held_out), None)
            question = balance.choose(scene, task, rng, about)
            if question is not None:
                made.append(question_example(image, scene, question))
        examples += made[:n_each]
    rng.shuffle(examples)
    return examples


def problems(images, rng):
    """A counting question about each image, for reinforcement learning."""
    balance, examples = Balance(), []
    for i, (image, scene) in enumerate(images):
        task = COUNTING[i % len(COUNTING)]
        question = balance.choose(scene, task, rng) or balance.choose(scene, "total", rng)
        examples.append(question_example(image, scene, question))
    return examples


def reader_dialogues(scenes, captions, rng):
    """Text alone: a caption, then a question that it answers, and the answer. So a text model
    learns to write questions about images it never sees (Liu et al. 2023, 2304.08485).
    """
    balance, examples = Balance(), []
    for scene, text in zip(scenes, captions, strict=True):
        for task in rng.sample(TASKS, len(TASKS)):
            question = balance.choose(scene, task, rng)
            if question is not None and tells(text, scene, question):
                answer = (worked if task in SUMS else completion)(scene, question)
                said = f"Question: {ask(question, scene)}\nAnswer: {answer}"
                examples.append({"messages": chat([READER.format(c=text), said])})
                break
    return examples


def tells(text, scene, question):
    """Does the caption say what the answer tells?"""
    if question.task == "season":
        return scene.season in text
    if question.task in ("existence", "count"):
        return True
    sizes = "bigger" not in question.wording or ("small" in text and "big" in text)
    return sizes and any(place in text for place in PLACES)
