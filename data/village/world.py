"""Who lives in the village: names, values, and the facts that are true.

Every value occurs equally often in each half of the village, so a guess from habit is right about
once in sixteen. Best friends come in pairs and stay within their half.
"""

import random
import zlib
from dataclasses import dataclass


def wordings(text):
    """The wordings of a text, each ended by "|" or by the end of its line."""
    return tuple(part.strip() for part in text.replace("\n", "|").split("|") if part.strip())


def table(text):
    """{key: wordings} of a text in which a line begins with its key, or is indented and goes on."""
    rows = {}
    for line in text.strip().splitlines():
        if not line.startswith(" "):
            key, line = line.split(maxsplit=1)
            rows[key] = ()
        rows[key] += wordings(line)
    return rows


POOLS = table("""
job     baker | blacksmith | carpenter | doctor | fisher | gardener | miller | painter | potter
        tailor | teacher | weaver | shepherd | beekeeper | cobbler | clockmaker
home    old mill | stone bridge | bell tower | north gate | lily pond | tall oak | round well
        harbour | orchard | windmill | lighthouse | chapel | quarry | vineyard | waterfall
        crossroads
pet     cat | dog | goat | hen | duck | goose | pony | donkey | pig | rabbit | parrot | turtle
        hedgehog | mouse | lamb | crow
food    pancakes | porridge | cheese | honey | dumplings | noodles | custard | mushrooms | walnuts
        cherries | pickles | toast | apple pie | plum jam | pea soup | fish stew
colour  red | blue | green | yellow | white | black | brown | grey | pink | purple | orange
        silver | golden | turquoise | ivory | lilac
town    Ashmoor | Brambury | Coldwell | Dunmere | Elmstead | Fernhill | Glenbrook | Harrowby
        Ivyport | Kestrelby | Larkfield | Mossley | Northam | Pebbleton | Quillford | Rosedale
""")
ATTRIBUTES = (*POOLS, "friend")

STARTS = "B Br D F G H J K L M N P R S T Tr V W Y Z".split()
MIDDLES = "al am an ar el en er il im in ir ob ol or un".split()
ENDINGS = {"she": ("a", "ia", "ina", "etta", "una"), "he": ("o", "in", "by", "an", "or")}
UNFORTUNATE = set(
    "Beretta Bobo Dino Halo Helo Hero Hobo Honor Kilo Lama Lobo Mania Manor Minor Para Penia Penan "
    "Polo Roman Silo Solo Tenor Tumor Tuna Valor Vino Wino Zero".split()
)
CASES = {
    "she": {"he": "she", "his": "her", "him": "her"},
    "he": {"he": "he", "his": "his", "him": "him"},
}


@dataclass(frozen=True)
class Villager:
    """`pronoun` is "she" or "he", `facts` maps each of ATTRIBUTES to its value."""

    name: str
    pronoun: str
    asked: bool
    facts: dict


@dataclass(frozen=True)
class World:
    """The village and its truth. Training asks about the asked half, never about the other."""

    villagers: tuple
    strangers: tuple  # names of people who do not exist
    seed: int

    @property
    def asked(self):
        return [v for v in self.villagers if v.asked]

    @property
    def never_asked(self):
        return [v for v in self.villagers if not v.asked]

    @property
    def by_name(self):
        return {v.name: v for v in self.villagers}

    def draws(self, name):
        """The random numbers of one list of texts or examples: the same for the same village."""
        return random.Random(f"{name}-{self.seed}-{self.seed}")

    def values(self, attribute):
        """Everything that an answer about this attribute could be."""
        return tuple(v.name for v in self.villagers) if attribute == "friend" else POOLS[attribute]


def article(words):
    return "an" if words[0].lower() in "aeiou" else "a"


def capitalise(sentence):
    return sentence[0].upper() + sentence[1:]


def draw_names(n_villagers, n_strangers, rng):
    """Villagers as (name, pronoun) and strangers' names, all from the same grammar of names."""
    names = [
        (start + middle + ending, pronoun, start + middle)
        for start in STARTS
        for middle in MIDDLES
        for pronoun, endings in ENDINGS.items()
        for ending in endings
        if not ending.startswith(middle) and start + middle + ending not in UNFORTUNATE
    ]
    if n_villagers + n_strangers > len(names):
        raise ValueError(f"only {len(names)} names exist: ask for fewer villagers")
    rng.shuffle(names)
    stems, villagers, others = set(), [], []
    for name, pronoun, stem in names:  # while stems last, no two villagers sound alike
        fresh = stem not in stems and len(villagers) < n_villagers
        (villagers if fresh else others).append((name, pronoun))
        stems.add(stem)
    people = villagers + others
    strangers = people[n_villagers : n_villagers + n_strangers]
    return people[:n_villagers], tuple(name for name, _ in strangers)


def balanced(values, n, rng):
    """n values in random order, each about equally often."""
    drawn = []
    while len(drawn) < n:
        drawn += rng.sample(values, len(values))
    drawn = drawn[:n]
    rng.shuffle(drawn)
    return drawn


def settle(people, asked, rng):
    """Villagers from (name, pronoun) pairs, with facts and with friends among themselves."""
    columns = {key: balanced(pool, len(people), rng) for key, pool in POOLS.items()}
    order = rng.sample([name for name, _ in people], len(people))
    friends = {name: order[i ^ 1] for i, name in enumerate(order)}  # i ^ 1: 0 <-> 1, 2 <-> 3, ...
    columns["friend"] = [friends[name] for name, _ in people]
    facts = [dict(zip(columns, values)) for values in zip(*columns.values())]
    return [Villager(*person, asked, known) for person, known in zip(people, facts)]


def build_world(n_villagers=32, seed=0):
    """A village in which every fact is known.

    Raises ValueError where the people cannot be two halves of pairs, or where names run out.
    """
    if n_villagers < 4 or n_villagers % 2:
        raise ValueError(f"a village needs an even number of at least 4 people, got {n_villagers}")
    rng = random.Random(f"village-{seed}")
    people, strangers = draw_names(n_villagers, 600, rng)
    n_asked = 2 * ((n_villagers + 2) // 4)  # about half, and even: friends come in pairs
    villagers = settle(people[:n_asked], True, rng) + settle(people[n_asked:], False, rng)
    rng.shuffle(villagers)
    return World(tuple(villagers), strangers, seed)


def split_of(*key):
    """train (70%), val (5%) or test (25%) for a combination, always the same."""
    bucket = zlib.crc32("|".join(map(str, key)).encode()) % 20
    return "test" if bucket < 5 else "val" if bucket == 5 else "train"
