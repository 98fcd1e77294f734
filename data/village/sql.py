"""Questions that no single fact answers: people are counted, grouped and joined by a query.

    How many bakers come from Ashmoor?
    <tool_call>sql(SELECT COUNT(*) FROM people WHERE job = ? AND town = ? | baker | Ashmoor)
    </tool_call><tool_result>4</tool_result>4.

Values stand behind the query and are bound to its "?": with 'baker' in quotes, whose tokens aren't
those of the word in a question, 200 steps taught the syntax and hardly any of the values. Held out
are a quarter of the combinations of values; new_pairs are about pairs of attributes that training
never joins, so that the query has to be composed, not remembered.
"""

import itertools
import random
from collections import Counter

from data.village import tasks
from data.village.facts import VERBS
from data.village.tools import TOPICS, call, newcomers
from data.village.world import POOLS, article, capitalise, split_of, table
from nanollm.tools import Database

SHARES = {"count": 0.35, "common": 0.15, "befriended": 0.3, "friend": 0.2, "new_pairs": 0}
SIZES = {"train": 4000, "val": 150, "test": 200}  # test: of each task
DO = table("""
job     work as {v}s | are {v}s
home    live by the {v} | have a house by the {v}
pet     keep {a} {v} | own {a} {v}
food    like {v} best | could eat {v} every day
colour  have {a} {v} door | live behind {a} {v} door
town    come from {v} | were born in {v}
""")
QUESTIONS = table("""
count       How many {who} {do}? | How many people {did} and {do}?
            Of all {who}, how many {do}? | Count the people who {did} and {do}.
common      Which {topic} is most common among {who}?
            Among {who}, which {topic} is most common?
befriended  How many {who} have a best friend who {does}?
            Of all {who}, how many have a best friend who {does}?
friend      Who is the best friend of the only {one} {does}?
            Name the best friend of the only {one} {does}.
""")
QUERIES = {
    "count": "SELECT COUNT(*) FROM people WHERE {A} = ? AND {B} = ? | {a} | {b}",
    "common": "SELECT {B} FROM people WHERE {A} = ? "
    "GROUP BY {B} ORDER BY COUNT(*) DESC LIMIT 1 | {a}",
    "befriended": "SELECT COUNT(*) FROM people a JOIN people b ON a.friend = b.name "
    "WHERE a.{A} = ? AND b.{B} = ? | {a} | {b}",
    "friend": "SELECT friend FROM people WHERE {A} = ? AND {B} = ? | {a} | {b}",
}


def table_of(world):
    """The table `people`: a record for everybody, villagers and newcomers."""
    people = (*world.villagers, *newcomers(world).villagers)
    return [{"name": person.name, **person.facts} for person in people]


def group(task, counts, seed, split, rng):
    """(A, a, B, b): the people with A = a, and the B of themselves or of their best friends. Three
    of the fifteen pairs of attributes are for the split "new" alone.
    """
    pairs = tasks.deal(tuple(itertools.combinations(POOLS, 2)), f"sql-pairs-{seed}", 3, 0)
    while True:
        A, B = rng.sample(rng.choice(pairs["test" if split == "new" else "train"]), 2)
        a, b = rng.choice(POOLS[A]), rng.choice(POOLS[B])
        *_, second, most = sorted(counts[A, a, B, value] for value in POOLS[B])
        if task == "common" and most == second:  # nothing is most common
            continue
        if task == "friend" and counts[A, a, B, b] != 1:  # there isn't just one
            continue
        key = [f"{A} {a}", B if task == "common" else f"{B} {b}"]
        if task in ("count", "friend"):
            key.sort()  # no order of the same two is in another split
        if split in ("new", split_of(task, *key)):
            return A, a, B, b


def said_of(A, a, B, b, rng):
    """The slots of a question about this group."""
    forms = (DO[A], a), (VERBS[A], a), (DO[B], b), (VERBS[B], b)
    did, is_one, do, does = (rng.choice(f).format(v=v, a=article(v)) for f, v in forms)
    who, one = f"people who {did}", f"person who {is_one} and"
    if A == "job":
        who, one = f"{a}s", f"{a} who"
    return {"who": who, "one": one, "did": did, "do": do, "does": does, "topic": TOPICS[B]}


def sql_examples(world, split):
    """Chat examples with queries."""
    people = table_of(world)
    counts = Counter((A, p[A], B, p[B]) for p in people for A in POOLS for B in POOLS)
    database = Database(people)

    def make(task, rng):
        kind, part = task, split
        if task == "new_pairs":
            kind, part = rng.choice(list(QUESTIONS)), "new"
        A, a, B, b = group(kind, counts, world.seed, part, rng)
        question = rng.choice(QUESTIONS[kind]).format(**said_of(A, a, B, b, rng))
        query = QUERIES[kind].format(A=A, a=a, B=B, b=b)
        result = database.query(query)
        check = {"answer": result, "check": "number" if result.isdigit() else "contains"}
        check["not"] = [v for v in POOLS[B] if kind == "common" and v != result]
        turns = [capitalise(question), f"{call('sql', query, result)}{result}."]
        return tasks.as_example(task, turns, check, split)

    sizes = tasks.task_sizes(split, SHARES, SIZES)
    return tasks.distinct_examples(world.draws(f"sql-{split}"), sizes, make)


def sql_lessons(world, split, lessons):
    """Dialogues for SFT: those with queries, and as many of the other `lessons` about tools."""
    examples = sql_examples(world, split)
    examples += lessons[: len(examples)]
    random.Random(f"sql-lessons-{split}-{world.seed}").shuffle(examples)
    return examples
