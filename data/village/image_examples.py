"""Which questions to ask about which picture: dialogues, test items and problems.

An answer that somebody could guess without looking proves nothing, so answers are balanced: yes and
no, every number, colour and place are about equally often right.
"""

from collections import Counter, defaultdict

from data.village.captions import DESCRIBE, description
from data.village.image_questions import (
    FAMILIES,
    STEPS,
    SUMS,
    WORDINGS,
    Question,
    ask,
    check_of,
    completion,
    read,
    truth,
    worked,
)
from data.village.scenes import HELD_OUT, KINDS, PLACES, kinds_of, row_of

COUNTING = ("count", "sum", "total")
TURNS = 4  # in a dialogue: so it fits, with its picture, into a row of 256 tokens
READER = "Here is a picture in words: {c}\nAsk a question about it, and answer it."

# --- which questions to ask --------------------------------------------------------


def candidates(scene, wording, task, about=None):
    """Questions in this wording that may suit the scene; with `about`, those about that kind, or,
    where what isn't there can be asked for, about what would stand in its row.
    """
    there = [group.kind for group in scene.groups]
    if task in ("season", "total"):
        found = [(None, None)]
    elif task in ("colour", "place"):
        found = [(kind, None) for kind in there]
    elif task in ("existence", "count"):
        kinds = KINDS if about is None else kinds_of(row_of(about))
        return [Question(task, wording, kind) for kind in kinds]
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
        """A Question of the family, or None where the scene has none."""
        wordings = WORDINGS[task]
        for wording in rng.sample(wordings, len(wordings)):
            by_answer = defaultdict(list)
            for question in candidates(scene, wording, task, about):
                answer = truth(scene, question)
                if answer is not None:
                    by_answer[answer].append(question)
            if by_answer:
                used = self.used[wording]
                rarest = min(rng.sample(sorted(by_answer), len(by_answer)), key=used.__getitem__)
                used[rarest] += 1
                return rng.choice(by_answer[rarest])
        return None


def blind_guess(examples):
    """{family: how many of the test items the most frequent answer to each wording gets right}."""
    answers = defaultdict(Counter)
    for example in examples:
        question = read(example["messages"][0]["content"])
        answers[question.task, question.wording][example["answer"]] += 1
    right, asked = Counter(), Counter()
    for (task, _), counts in answers.items():
        right[task] += max(counts.values())
        asked[task] += counts.total()
    return {task: right[task] / asked[task] for task in FAMILIES if asked[task]}


# --- dialogues and items -----------------------------------------------------


def chat(turns):
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def describe_example(image, scene, rng):
    return {
        "image": image,
        "messages": chat([f"<image>\n{rng.choice(DESCRIBE)}", description(scene)]),
    }


def dialogue(image, scene, balance, rng):
    """Up to TURNS questions about one picture, of different families; in every fourth dialogue the
    first asks for a description. Three of four answers that need steps have them.
    """
    turns = [rng.choice(DESCRIBE), description(scene)] if rng.random() < 0.25 else []
    for task in rng.sample(FAMILIES, len(FAMILIES)):
        question = balance.choose(scene, task, rng) if len(turns) < 2 * TURNS else None
        if question is not None:
            with_steps = task in STEPS and rng.random() < 0.75
            turns += [ask(question, scene), (worked if with_steps else completion)(scene, question)]
    turns[0] = f"<image>\n{turns[0]}"
    return {"image": image, "messages": chat(turns)}


def question_example(image, scene, question):
    return {
        "image": image,
        "messages": chat([f"<image>\n{ask(question, scene)}"]),
        **check_of(truth(scene, question)),
        "task": question.task,
    }


def question_examples(images, tasks, per_task, rng, held_out=False):
    """Up to `per_family` questions of each family, one to a picture; if `held_out`, each about the
    object whose colour and kind were never together in training.
    """
    examples, balance = [], Balance()
    for task in tasks:
        made = []
        for image, scene in rng.sample(images, len(images)):
            about = pair_of(scene) if held_out else None
            question = balance.choose(scene, task, rng, about)
            if question is not None:
                made.append(question_example(image, scene, question))
        examples += made[:per_task]
    rng.shuffle(examples)
    return examples


def pair_of(scene):
    """The kind that has its held-out colour here."""
    return next(g.kind for g in scene.groups if HELD_OUT.get(g.kind) == g.colour)


def problems(images, rng):
    """A counting question about each picture, for reinforcement learning."""
    balance, examples = Balance(), []
    for i, (image, scene) in enumerate(images):
        task = COUNTING[i % len(COUNTING)]
        question = balance.choose(scene, task, rng) or balance.choose(scene, "total", rng)
        examples.append(question_example(image, scene, question))
    return examples


def reader_dialogues(scenes, captions, rng):
    """Text alone: a caption, then a question that it answers, and the answer. So a text model
    learns to write questions about pictures it never sees (Liu et al. 2023, 2304.08485).
    """
    balance, examples = Balance(), []
    for scene, text in zip(scenes, captions, strict=True):
        for task in rng.sample(FAMILIES, len(FAMILIES)):
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
