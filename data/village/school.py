"""Lessons of the village school: words said again, copied, counted, and read backwards.

A model that has met few words twice in a row answers with the words it knows best. These games hold
arbitrary words, invented ones too, so that it learns to copy whatever stands before it: induction
(Olsson et al. 2022, arXiv:2209.11895), on which every later answer about a name builds.
"""

from data.village.files import table, wordings
from data.village.stories import OBJECTS
from data.village.sums import GOODS
from data.village.world import split_of

OTHERS = (
    "circle square triangle star sun rain wind snow storm river forest garden road barn village "
    "house door table fire feast song story summer winter morning evening money picture paper "
    "friend child"
)
WORDS = sorted({*OBJECTS["thing"], *OBJECTS["animal"], *GOODS.values(), *OTHERS.split()})
CONSONANTS, VOWELS = "bdfgklmnprstvwz", "aeiou"
# {w} the words, {W} in capitals, {c} with commas, {r} backwards, {first} {last} {k} how many
GAMES = table("""
echo      {n} says: "{w}". {m} says it again: "{w}". | The teacher writes {w}. {n} copies it: {w}.
          First {n} calls "{w}", then the echo calls "{w}". | Say after me: {w}. {n} says: {w}.
          The parrot of {n} has learned to say {w}. It says "{w}" all day.
          {n} whispers "{w}" to {m}, and {m} whispers "{w}" to the next child.
          Write this down: {w}. {n} has written {w}. | The song of {n} goes {w}, {w}, {w}.
          {n} reads {c}, and {m} reads {c}. | The list of {n}: {c}. {m} has the same list: {c}.
question  What does {m} write? {m} writes {w}.
          "What has {m} found?" asks {n}. "{m} has found {w}."
          The teacher asks what {m} sings. {m} sings {w}.
          Tell me what {m} draws. {m} draws {w}.
          Can you see what {m} has in the bag? {m} has {w}.
          "Do you know the words of {m}?" asks {n}. "{m} says {w}."
change    {n} says {w}. Backwards that is {r}. | Read it backwards, {n}: {w}. {n} reads "{r}".
          The words on the wall are {w}. The first is {first}, the last is {last}.
          {n} thinks of {w}. First comes {first}, last comes {last}.
          {n} has written {w}. Count the words: {k}. | With commas, {w} is {c}.
capitals  In capitals, {w} is {W}. | {n} writes {w} with large letters: {W}.
          The sign says {W}. That means {w}. | {n} paints {w} on the wall: {W}.
""")
WORD_LESSONS = wordings("""
The magic word is {x}, and {n} says {x}. | Nobody knows what {x} means. {n} asks: "What is {x}?"
{n} has dreamed of the word {x}. Now all children say {x}.
A stranger asked for {x}. {n} said: "Who is {x}?"
""")
OPENINGS = wordings("""
At school: | In the school of the village the children learn words. | A word game.
It is raining, so the children play with words. | The teacher rings the bell. | Second lesson.
{n} is the teacher today.
""")


def invented_word(rng):
    """A word that nobody has seen: two or three syllables."""
    return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.randint(2, 3)))


def some_words(rng, names):
    """One to five words, whose combination is not held out for tests of formatting."""
    while True:
        words = rng.sample(WORDS, rng.choice((1, 2, 2, 3, 3, 4, 5)))
        if rng.random() < 0.3:
            words[rng.randrange(len(words))] = rng.choice([invented_word(rng), rng.choice(names)])
        if split_of(*sorted(words)) == "train":
            return words


def lesson(words, names, rng):
    """One sentence or two of a game with these words."""
    n, m = rng.sample(names, 2)
    together = " ".join(words)
    slots = {"n": n, "m": m, "w": together, "W": together.upper(), "c": ", ".join(words)}
    slots |= {"r": " ".join(words[::-1]), "first": words[0], "last": words[-1], "k": len(words)}
    game = rng.choices(list(GAMES), (4, 2, 2, 2))[0]
    return rng.choice(GAMES[game]).format(**slots)


def school(world, rng):
    """Three to six lines of games with the same few words, or about a word that nobody knows."""
    names = [v.name for v in world.villagers]
    if rng.random() < 0.15:
        word = invented_word(rng)
        lines = [line.format(n=rng.choice(names), x=word) for line in rng.sample(WORD_LESSONS, 3)]
    else:
        words = some_words(rng, names)
        lines = [lesson(words, names, rng) for _ in range(rng.randint(3, 6))]
    if rng.random() < 0.4:
        lines.insert(0, rng.choice(OPENINGS).format(n=rng.choice(names)))
    return " ".join(lines)
