"""Problems with checkable answers, in six grades, and their worked solutions.

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

from data.village.sums import (
    equation,
    product_operands,
    question_of,
    result_of,
    small_sum,
    story_of_goods,
    three_digit_operands,
    two_digit_operands,
    written_product,
    written_steps,
)
from data.village.tasks import distinct_examples
from data.village.world import split_of

ASKS = (
    "How many {goods} does {n} have now?",
    "How many {goods} are left to {n}?",
    "How many {goods} does {n} have in the end?",
)
FINAL = (
    "Give the final answer.",
    "Only the number, please.",
    "So what is the result?",
    "Now the answer alone.",
)

# --- one problem at a time: (question, steps, answer) ------------------------


def easy(world, split, rng):
    while True:
        a, sign, b = small_sum(rng)
        if split_of("easy", *sorted((a, b))) == split:
            break
    return question_of(a, sign, b, rng), equation(a, sign, b), result_of(a, sign, b)


def two_digits(world, split, rng):
    """The operands that the corpus and the chat items hold out, too."""
    return column_problem(*two_digit_operands(split, rng), rng)


def three_digits(world, split, rng):
    return column_problem(*three_digit_operands(split, rng), rng)


def column_problem(a, b, rng):
    sign = rng.choice("+-")
    a, b = (max(a, b), min(a, b)) if sign == "-" else (a, b)
    return question_of(a, sign, b, rng), written_steps(a, sign, b), result_of(a, sign, b)


def products(world, split, rng):
    a, b = product_operands(split, rng)
    return question_of(a, "*", b, rng), written_product(a, b), a * b


def two_steps(world, split, rng):
    return story(world, split, rng, 2)


def three_steps(world, split, rng):
    return story(world, split, rng, 3)


def story(world, split, rng, n_steps):
    said, sentences, equations = story_of_goods(world, split, rng, n_steps)
    sentences.append(rng.choice(ASKS).format(**said))
    steps = [equation(*each) for each in equations]
    return " ".join(sentences), " ".join(steps), result_of(*equations[-1])


# --- whole splits -------------------------------------------------------------

GRADES = {
    "easy": easy,
    "two_digits": two_digits,
    "three_digits": three_digits,
    "products": products,
    "two_steps": two_steps,
    "three_steps": three_steps,
}


def problems(world, split, per_grade, seed=0):
    """`per_grade` problems of each grade, no question twice, shuffled: prompts with "answer",
    "check", "family" (the name of the grade), "grade" (1 to 6) and "steps" (the worked solution).
    """
    rng = random.Random(f"problems-{split}-{world.seed}-{seed}")

    def make(task):
        question, steps, answer = GRADES[task](world, split, rng)
        return {
            "messages": [{"role": "user", "content": question}],
            "answer": str(answer),
            "check": "number",
            "task": task,
            "grade": 1 + list(GRADES).index(task),
            "steps": steps,
        }

    return distinct_examples(dict.fromkeys(GRADES, per_grade), make, rng)


def answer_of(problem):
    return f"The answer is {problem['answer']}."


def worked(problem):
    """The dialogue that teaches to think first: chain of thought (Wei et al. 2022, 2201.11903)."""
    completion = f"<think>{problem['steps']}</think>{answer_of(problem)}"
    return as_chat(problem, completion)


def answered(problem):
    """The same dialogue without steps."""
    return as_chat(problem, answer_of(problem))


def worked_then_answered(problem, rng):
    """Two turns: the reasoning, then "give the final answer"."""
    first, second = worked(problem)["messages"], rng.choice(FINAL)
    turns = (
        {"role": "user", "content": second},
        {"role": "assistant", "content": problem["answer"]},
    )
    return {"messages": [*first, *turns], "task": problem["task"]}


def as_chat(problem, completion):
    turns = [*problem["messages"], {"role": "assistant", "content": completion}]
    return {"messages": turns, "task": problem["task"]}


# How many solutions people write out: the longer, the fewer.
SHARES_WORKED = {
    "easy": 0.7,
    "two_digits": 0.7,
    "two_steps": 0.7,
    "three_digits": 0.45,
    "products": 0.4,
    "three_steps": 0.4,
}


def lessons(problems, chats, shares, seed=0):
    """Dialogues for SFT from problems, of which the share of their family in `shares` is worked
    (one in ten of those goes on with "give the final answer"), and the others have the answer
    alone. A fifth as many other dialogues (`chats`) keep old abilities alive.
    """
    rng = random.Random(f"lessons-{seed}")
    examples = []
    for problem in problems:
        if rng.random() >= shares[problem["task"]]:
            examples.append(answered(problem))
        else:
            two_turns = rng.random() < 0.1
            examples.append(worked_then_answered(problem, rng) if two_turns else worked(problem))
    examples += chats[: len(problems) // 5]
    rng.shuffle(examples)
    return examples
