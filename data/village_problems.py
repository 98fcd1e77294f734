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

from data.village_corpus import GOODS, WARES, count, held_out, result_of, written_steps
from data.village_tasks import SUMS, distinct_items
from data.village_world import CASES, capitalise, split_of

STARTS = ("{n} has {A}.", "In the basket of {n} there {are} {A}.", "{n} picks {A}.",
          "{n} comes to the market with {A}.")
FULL_STARTS = ("{n} has {k} baskets with {A} each.", "{n} fills {k} bags with {A} each.",
               "{n} buys {k} boxes of {A} each.")
GAINS = ("{He} buys {B} more.", "{m} gives {him} {B}.", "Then {he} finds {B} more.",
         "{He} gets {B} from {m}.")
LOSSES = ("{He} sells {B}.", "{He} gives {B} to {m}.", "Then {he} loses {B}.",
          "{m} takes {B} away.")
ASKS = ("How many {goods} does {n} have now?", "How many {goods} are left to {n}?",
        "How many {goods} does {n} have in the end?")
FINAL = ("Give the final answer.", "Only the number, please.", "So what is the result?",
         "Now the answer alone.")

# --- worked solutions --------------------------------------------------------


def written_product(a, b):
    """a times one digit b, from the ones on, in the form

    34 * 6: 4 * 6 = 24, write 4 carry 2; 3 * 6 = 18, 18 + 2 = 20, write 20; so 34 * 6 = 204.
    """
    digits, lines, carry = [int(digit) for digit in reversed(str(a))], [], 0
    for i, digit in enumerate(digits):
        total = digit * b + carry
        step = f"{digit} * {b} = {digit * b}" + (f", {digit * b} + {carry} = {total}" if i else "")
        carry, last = total // 10, i == len(digits) - 1
        lines.append(f"{step}, write " + (str(total) if last else f"{total % 10} carry {carry}"))
    return f"{a} * {b}: " + "; ".join(lines) + f"; so {a} * {b} = {a * b}."


# --- one problem at a time: (question, steps, answer) ------------------------


def easy(world, split, rng):
    while True:
        a, b, sign = rng.randint(1, 20), rng.randint(1, 9), rng.choice("+-")
        result = result_of(a, sign, b)
        if 0 <= result <= 20 and split_of("easy", *sorted((a, b))) == split:
            break
    return rng.choice(SUMS[sign]).format(a=a, b=b), f"{a} {sign} {b} = {result}.", result


def two_digits(world, split, rng):
    """The operands that the corpus and the chat items hold out, too."""
    residue = {"train": 0, "val": 5, "test": 3}[split]
    while True:
        a, b, sign = rng.randint(10, 99), rng.randint(10, 99), rng.choice("+-")
        if held_out(a, b) == residue:
            break
    return column_problem(a, sign, b, rng)


def three_digits(world, split, rng):
    while True:
        a, b, sign = rng.randint(100, 999), rng.randint(100, 999), rng.choice("+-")
        if split_of("three", *sorted((a, b))) == split:
            break
    return column_problem(a, sign, b, rng)


def column_problem(a, sign, b, rng):
    a, b = (max(a, b), min(a, b)) if sign == "-" else (a, b)
    question = rng.choice(SUMS[sign]).format(a=a, b=b)
    return question, written_steps(a, sign, b), result_of(a, sign, b)


def products(world, split, rng):
    while True:
        a, b = rng.randint(*rng.choice(((11, 99), (100, 999)))), rng.randint(2, 9)
        if split_of("product", a, b) == split:
            break
    return rng.choice(SUMS["*"]).format(a=a, b=b), written_product(a, b), a * b


def two_steps(world, split, rng):
    return story(world, split, rng, 2)


def three_steps(world, split, rng):
    return story(world, split, rng, 3)


def story(world, split, rng, n_steps):
    """A story of two or three equations, no number in it above 30."""
    while True:
        filled = rng.random() < 0.4  # begins with a product: baskets of so many
        a, k = (rng.randint(2, 6), rng.randint(2, 5)) if filled else (rng.randint(2, 20), 1)
        equations, total = ([("*", k, a)], k * a) if filled else ([], a)
        while len(equations) < n_steps:
            sign, b = rng.choice("+-"), rng.randint(2, 10)
            equations.append((sign, total, b))
            total = result_of(total, sign, b)
        totals = [result_of(x, sign, y) for sign, x, y in equations]
        if min(totals) > 0 and max(totals) <= 30 and \
                split_of("story", a, k, *(n for sign, _, b in equations for n in (sign, b))) \
                == split:
            break
    who, other = rng.sample(world.villagers, 2)
    ware = rng.choice(WARES)
    said = {"n": who.name, "m": other.name, "goods": GOODS[ware], "k": k, "A": count(a, ware),
            "are": "are" if a > 1 else "is", **CASES[who.pronoun]}
    said["He"] = capitalise(said["he"])
    sentences = [rng.choice(FULL_STARTS if filled else STARTS).format(**said)]
    for sign, _, b in equations[filled:]:
        sentence = rng.choice(GAINS if sign == "+" else LOSSES)
        sentences.append(sentence.format(**said, B=count(b, ware)))
    sentences.append(rng.choice(ASKS).format(**said))
    steps = [f"{x} {sign} {y} = {result_of(x, sign, y)}." for sign, x, y in equations]
    return " ".join(sentences), " ".join(steps), total


# --- whole splits -------------------------------------------------------------

GRADES = {"easy": easy, "two_digits": two_digits, "three_digits": three_digits,
          "products": products, "two_steps": two_steps, "three_steps": three_steps}


def problems(world, split, per_grade, seed=0):
    """`per_grade` problems of each grade, no question twice, shuffled: prompts with "answer",
    "check", "family" (the name of the grade), "grade" (1 to 6) and "steps" (the worked solution).
    """
    rng = random.Random(f"problems-{split}-{world.seed}-{seed}")

    def make(family):
        question, steps, answer = GRADES[family](world, split, rng)
        return {"messages": [{"role": "user", "content": question}], "answer": str(answer),
                "check": "number", "family": family, "grade": 1 + list(GRADES).index(family),
                "steps": steps}

    return distinct_items(dict.fromkeys(GRADES, per_grade), make, rng)


def answer_of(problem):
    return f"The answer is {problem['answer']}."


def worked(problem):
    """The dialogue that teaches to think first: chain of thought (Wei et al. 2022, 2201.11903)."""
    reply = f"<think>{problem['steps']}</think>{answer_of(problem)}"
    return as_chat(problem, reply)


def answered(problem):
    """The same dialogue without steps."""
    return as_chat(problem, answer_of(problem))


def worked_then_answered(problem, rng):
    """Two turns: the reasoning, then "give the final answer"."""
    first, second = worked(problem)["messages"], rng.choice(FINAL)
    turns = ({"role": "user", "content": second},
             {"role": "assistant", "content": problem["answer"]})
    return {"messages": [*first, *turns], "family": problem["family"]}


def as_chat(problem, reply):
    turns = [*problem["messages"], {"role": "assistant", "content": reply}]
    return {"messages": turns, "family": problem["family"]}


# How many solutions people write out: the longer, the fewer.
SHARES_WORKED = {"easy": 0.7, "two_digits": 0.7, "two_steps": 0.7, "three_digits": 0.45,
                 "products": 0.4, "three_steps": 0.4}


def lessons(problems, chats, shares, seed=0):
    """Dialogues for SFT from problems, of which the share of their family in `shares` is worked
    (one in ten of those goes on with "give the final answer"), and the others have the answer
    alone. A fifth as many other dialogues (`chats`) keep old abilities alive.
    """
    rng = random.Random(f"lessons-{seed}")
    items = []
    for problem in problems:
        if rng.random() >= shares[problem["family"]]:
            items.append(answered(problem))
        else:
            two_turns = rng.random() < 0.1
            items.append(worked_then_answered(problem, rng) if two_turns else worked(problem))
    items += chats[:len(problems) // 5]
    rng.shuffle(items)
    return items
