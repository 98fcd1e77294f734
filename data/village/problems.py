"""Problems with checkable answers, sums and stories of six difficulties, and their solutions.

A worked solution writes its steps between <think> and </think>, then the answer. Held out for the
test: numbers that occur together in no training problem.
"""

import random

from data.village import sums
from data.village.tasks import chat, distinct_examples, user_turns
from data.village.world import wordings

ASKS = wordings("""
How many {goods} does {n} have now? | How many {goods} are left to {n}?
How many {goods} does {n} have in the end?
""")
FINAL = wordings("""
Give the final answer. | Only the number, please. | So what is the result? | Now the answer alone.
""")

DIFFICULTIES = ("easy", *sums.DRAWN, "two_steps", "three_steps")
# How many solutions people write out: the longer, the fewer.
SHARES_WORKED = {"easy": 0.7, "two_digits": 0.7, "three_digits": 0.45}
SHARES_WORKED |= {"products": 0.4, "two_steps": 0.7, "three_steps": 0.4}


def problems(world, split, n_each):
    """n_each problems of each difficulty, no question twice, shuffled: prompts with "answer",
    "check", "task" (the name of the difficulty), "difficulty" (1 to 6) and "steps" (the worked
    solution).
    """

    def make(task, rng):
        if task.endswith("_steps"):
            n_steps = 2 if task == "two_steps" else 3
            said, sentences, equations = sums.story_of_goods(world, split, rng, n_steps)
            question = " ".join([*sentences, rng.choice(ASKS).format(**said)])
            steps = " ".join(sums.equation(*each) for each in equations)
            answer = sums.result_of(*equations[-1])
        else:
            numbers = sums.drawn(task, split, rng)
            steps = (sums.equation if task == "easy" else sums.written_steps)(*numbers)
            question, answer = sums.question_of(*numbers, rng), sums.result_of(*numbers)
        example = {"messages": chat([question]), "answer": str(answer), "check": "number"}
        return {**example, "task": task, "difficulty": 1 + DIFFICULTIES.index(task), "steps": steps}

    sizes = dict.fromkeys(DIFFICULTIES, n_each)
    return distinct_examples(world.draws(f"problems-{split}"), sizes, make)


def answer_of(problem):
    return f"The answer is {problem['answer']}."


def worked(problem, steps=True):
    """The dialogue that teaches to think first: chain of thought (Wei et al. 2022, 2201.11903); or
    the same without steps.
    """
    thought = f"<think>{problem['steps']}</think>" if steps else ""
    turns = [*user_turns(problem), f"{thought}{answer_of(problem)}"]
    return {"messages": chat(turns), "task": problem["task"]}


def lessons(problems, chats, shares, seed=0):
    """Dialogues for SFT from problems, of which the share of their task in `shares` is worked
    (one in ten of those goes on with "give the final answer"), and the others have the answer
    alone. A fifth as many other dialogues (`chats`) keep old abilities alive.
    """
    rng = random.Random(f"lessons-{seed}")
    examples = []
    for problem in problems:
        steps = rng.random() < shares[problem["task"]]
        example = worked(problem, steps)
        if steps and rng.random() < 0.1:
            turns = [message["content"] for message in example["messages"]]
            example["messages"] = chat([*turns, rng.choice(FINAL), problem["answer"]])
        examples.append(example)
    examples += chats[: len(problems) // 5]
    rng.shuffle(examples)
    return examples
