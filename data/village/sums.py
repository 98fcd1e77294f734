"""Arithmetic that the corpus tells of and the problems ask about: written steps, stories of goods.

Numbers that occur together in a test problem occur together in no text: every operand is drawn for
a split.
"""

from data.village.world import CASES, capitalise, split_of, table, wordings

SUMS = table("""
+  What is {a} + {b}? | Add {a} and {b}. | How much is {a} plus {b}? | {a} + {b} = ?
   Please work out {a} + {b}. | What is the sum of {a} and {b}?
-  What is {a} - {b}? | Take {b} from {a}. | How much is {a} minus {b}? | {a} - {b} = ?
   Please work out {a} - {b}. | What is the difference of {a} and {b}?
*  What is {a} * {b}? | Multiply {a} by {b}. | How much is {a} times {b}? | {a} * {b} = ?
   Please work out {a} * {b}. | What is the product of {a} and {b}?
""")
WARES = wordings(
    "apple | pear | egg | carrot | onion | turnip | bun | candle | ribbon | button | nail | jar | "
    "rope | lemon | cabbage | peach | potato | loaf | cup | spoon | bell | brush"
)
GOODS = {ware: ware + "s" for ware in WARES} | {"peach": "peaches", "potato": "potatoes"}
GOODS |= {"loaf": "loaves", "penny": "pennies", "brush": "brushes"}
STORY = table("""
start  {n} has {A}. | In the basket of {n} there {are} {A}. | {n} picks {A}.
       {n} comes to the market with {A}.
many   {n} has {k} baskets with {A} each. | {n} fills {k} bags with {A} each.
       {n} buys {k} boxes of {A} each.
+      {He} buys {B} more. | {m} gives {him} {B}. | Then {he} finds {B} more.
       {He} gets {B} from {m}.
-      {He} sells {B}. | {He} gives {B} to {m}. | Then {he} loses {B}. | {m} takes {B} away.
""")


def count(number, word):
    """3, "apple" -> "3 apples"."""
    return f"{number} {word if number == 1 else GOODS[word]}"


def held_out(a, b):
    """Is this pair of two-digit operands kept for the test (3) or validation (5)? 0: for training.

    A prime modulus, so that every pair of last digits also occurs in training.
    """
    low, high = sorted((a, b))
    rest = (low * 31 + high * 17) % 11
    return rest if low > 9 and rest in (3, 5) else 0


def small_sum(rng):
    """(a, sign, b) up to 20, as texts tell of; no split."""
    while True:
        a, b, sign = rng.randint(1, 20), rng.randint(1, 9), rng.choice("+-")
        if 0 <= result_of(a, sign, b) <= 20:
            return a, sign, b


DRAWN = {  # difficulty: signs, and from where to where the two numbers go
    "two_digits": ("+-", (10, 99), (10, 99)),
    "three_digits": ("+-", (100, 999), (100, 999)),
    "products": ("*", (11, 999), (2, 9)),
}


def drawn(difficulty, split, rng):
    """A sum (a, sign, b) of this difficulty, whose numbers belong to this split; never negative."""
    while True:
        if difficulty == "easy":
            a, sign, b = small_sum(rng)
        else:
            signs, first, second = DRAWN[difficulty]
            a, sign, b = rng.randint(*first), rng.choice(signs), rng.randint(*second)
        if difficulty == "products" and rng.random() < 0.5:
            a = rng.randint(11, 99)
        if difficulty == "two_digits":
            fits = held_out(a, b) == {"train": 0, "val": 5, "test": 3}[split]
        else:
            fits = split_of(difficulty, *sorted((a, b))) == split
        if fits:
            return (max(a, b), sign, min(a, b)) if sign == "-" else (a, sign, b)


def question_of(a, sign, b, rng):
    return rng.choice(SUMS[sign]).format(a=a, b=b)


def result_of(a, sign, b):
    return {"+": a + b, "-": a - b, "*": a * b}[sign]


def equation(a, sign, b):
    return f"{a} {sign} {b} = {result_of(a, sign, b)}."


def written_steps(a, sign, b):
    """The sum digit by digit, from the ones on, in one of these forms. For "+" and "-" both numbers
    have as many digits, and a >= b; in products b has one digit.

    27 + 35: 7 + 5 = 12, write 2 carry 1; 2 + 3 + 1 = 6, write 6; so 27 + 35 = 62.
    62 - 35: 12 - 5 = 7, write 7 borrow 1; 6 - 3 - 1 = 2, write 2; so 62 - 35 = 27.
    34 * 6: 4 * 6 = 24, write 4 carry 2; 3 * 6 = 18, 18 + 2 = 20, write 20; so 34 * 6 = 204.
    """
    tops = [int(digit) for digit in reversed(str(a))]
    bottoms = [b] * len(tops) if sign == "*" else [int(digit) for digit in reversed(str(b))]
    steps, carry = [], 0
    for i, (top, bottom) in enumerate(zip(tops, bottoms)):
        borrowed = sign == "-" and top < bottom + carry
        if borrowed:
            top += 10
        if sign == "*":
            total = top * bottom + carry
            more = f", {top * bottom} + {carry} = {total}" if i else ""
            said = f"{top} * {bottom} = {top * bottom}{more}"
        else:
            total = result_of(result_of(top, sign, bottom), sign, carry)
            more = f" {sign} {carry}" if i else ""
            said = f"{top} {sign} {bottom}{more} = {total}"
        carry = int(borrowed) if sign == "-" else total // 10
        if i < len(tops) - 1:
            word = "borrow" if sign == "-" else "carry"
            steps.append(f"{said}, write {total % 10} {word} {carry}")
        else:
            steps.append(f"{said}, write {total}")
    return f"{a} {sign} {b}: {'; '.join(steps)}; so {equation(a, sign, b)}"


def story_of_goods(world, split, rng, n_steps):
    """(names and words of the story, its sentences, its equations (a, sign, b)): what somebody has,
    and two or three things that happen to it. The last equation gives what is left; no number is
    above 30.
    """
    while True:
        filled = rng.random() < 0.4  # begins with a product: baskets of so many
        if filled:
            a, k = rng.randint(2, 6), rng.randint(2, 5)
            equations = [(k, "*", a)]
        else:
            a, k, equations = rng.randint(2, 20), 1, []
        total = k * a
        while len(equations) < n_steps:
            equations.append((total, rng.choice("+-"), rng.randint(2, 9)))
            total = result_of(*equations[-1])
        totals = [result_of(*equation) for equation in equations]
        numbers = [n for _, sign, b in equations for n in (sign, b)]
        if min(totals) > 0 and max(totals) <= 30 and split_of("story", a, k, *numbers) == split:
            break
    who, other = rng.sample(world.villagers, 2)
    ware = rng.choice(WARES)
    said = {"n": who.name, "m": other.name, "goods": GOODS[ware], "k": k, "A": count(a, ware)}
    said |= {"are": "are" if a > 1 else "is", **CASES[who.pronoun]}
    said["He"] = capitalise(said["he"])
    sentences = [rng.choice(STORY["many" if filled else "start"]).format(**said)]
    for _, sign, b in equations[filled:]:
        sentences.append(rng.choice(STORY[sign]).format(**said, B=count(b, ware)))
    return said, sentences, equations
