"""Problems with checkable answers, in six difficulties, and their worked solutions.

    1  easy           sums and differences up to 20
    2  two_digits     sums and differences, digit by digit
    3  three_digits   the same with another column
    4  products       two or three digits times one
    5  two_steps      stories in which two things happen
    6  three_steps    stories in which three things happen

A worked solution writes its steps between <think> and </think>, then the answer; its equations are
all true. Held out for the test: numbers that occur together in no training problem.
"""

import random

from data.village.files import wordings
from data.village.sums import (
    DRAWN,
    drawn,
    equation,
    question_of,
    result_of,
    story_of_goods,
    written_steps,
)
from data.village.tasks import chat, distinct_examples, user_turns

ASKS = wordings("""
How many {goods} does {n} have now? | How many {goods} are left to {n}?
How many {goods} does {n} have in the end?
""")
FINAL = wordings("""
Give the final answer. | Only the number, please. | So what is the result? | Now the answer alone.
""")

DIFFICULTIES = ("easy", *DRAWN, "two_steps", "three_steps")
# How many solutions people write out: the longer, the fewer.
SHARES_WORKED = {"easy": 0.7, "two_digits": 0.7, "three_digits": 0.45}
SHARES_WORKED |= {"products": 0.4, "two_steps": 0.7, "three_steps": 0.4}


def problem_of(difficulty, world, split, rng):
    """(question, steps, answer)."""
    if not difficulty.endswith("_steps"):
        numbers = drawn(difficulty, split, rng)
        steps = (equation if difficulty == "easy" else written_steps)(*numbers)
        return question_of(*numbers, rng), steps, result_of(*numbers)
    n_steps = 2 if difficulty == "two_steps" else 3
    said, sentences, equations = story_of_goods(world, split, rng, n_steps)
    question = " ".join([*sentences, rng.choice(ASKS).format(**said)])
    return question, " ".join(equation(*each) for each in equations), result_of(*equations[-1])


def problems(world, split, n_each, seed=0):
    """n_each problems of each difficulty, no question twice, shuffled: prompts with "answer",
    "check", "task" (the name of the difficulty), "difficulty" (1 to 6) and "steps" (the worked
    solution).
    """
    rng = random.Random(f"problems-{split}-{world.seed}-{seed}")

    def make(task):
        question, steps, answer = problem_of(task, world, split, rng)
        example = {"messages": chat([question]), "answer": str(answer), "check": "number"}
        difficulty = 1 + DIFFICULTIES.index(task)
        return {**example, "task": task, "difficulty": difficulty, "steps": steps}

    return distinct_examples(dict.fromkeys(DIFFICULTIES, n_each), make, rng)


def answer_of(problem):
    return f"The answer is {problem['answer']}."


def as_chat(problem, *completions):
    return {"messages": chat([*user_turns(problem), *completions]), "task": problem["task"]}


def worked(problem):
    """The dialogue that teaches to think first: chain of thought (Wei et al. 2022, 2201.11903)."""
    return as_chat(problem, f"<think>{problem['steps']}</think>{answer_of(problem)}")


def answered(problem):
    """The same dialogue without steps."""
    return as_chat(problem, answer_of(problem))


def lessons(problems, chats, shares, seed=0):
    """Dialogues for SFT from problems, of which the share of their task in `shares` is worked
    (one in ten of those goes on with "give the final answer"), and the others have the answer
    alone. A fifth as many other dialogues (`chats`) keep old abilities alive.
    """
    rng = random.Random(f"lessons-{seed}")
    examples = []
    for problem in problems:
        if rng.random() >= shares[problem["task"]]:
            examples.append(answered(problem))
            continue
        example = worked(problem)
        if rng.random() < 0.1:
            turns = [message["content"] for message in example["messages"]]
            example["messages"] = chat([*turns, rng.choice(FINAL), problem["answer"]])
        examples.append(example)
    examples += chats[: len(problems) // 5]
    rng.shuffle(examples)
    return examples
