"""How the village talks about a person: many phrasings, in both directions, for every attribute.

A fact that is told in one wording is memorised but cannot be asked for; told in many wordings and
orders it can (Allen-Zhu & Li, arXiv:2309.14316).

Slots: {n} the name, {s} the name or a pronoun, {p} the possessive of either, {he} {his} {him}
always pronouns, {v} the value, {a} its article. A phrasing that starts with "!" is a request or a
question and takes no "people say that" in front.
"""

from data.village.world import ATTRIBUTES, CASES, article, capitalise, table, wordings

PHRASES = table("""
job     {s} works as {a} {v} | {s} is {a} {v} | by trade {s} is {a} {v}
        {s} earns {his} living as {a} {v} | every morning {s} goes to work as {a} {v}
        {s} learned to be {a} {v} when {he} was young | the job of {n} is to be {a} {v}
        {p} job is to be {a} {v} | people who need {a} {v} go to {n}
        the {v} called {n} is never late | one {v} in the village is {n}
        everyone who wants {a} {v} sends for {n} | {n} the {v} gets up early
        the name of that {v} is {n} | {a} {v} by trade, {n} works hard
        !if you look for {a} {v}, ask for {n}
home    {s} lives by the {v} | {p} home is by the {v} | {p} house stands by the {v}
        the house of {n} is by the {v} | {s} has lived by the {v} for years
        you can find {n} by the {v} | you will find {p} house by the {v}
        {s} has a small house by the {v} | the place where {n} lives is by the {v}
        by the {v} lives {n} | by the {v} stands the house of {n}
        the house by the {v} belongs to {n} | the neighbours by the {v} all know {n}
        the path to the {v} leads to the house of {n}
        !if you walk to the {v}, knock at the house of {n} | !walk to the {v} and ask for {n}
pet     {s} keeps {a} {v} | {s} has {a} {v} | {p} pet is {a} {v} | the pet of {n} is {a} {v}
        {s} owns {a} {v} | {s} shares the house with {a} {v} | {s} looks after {a} {v}
        {s} feeds {a} {v} every evening | the animal that lives with {n} is {a} {v}
        {a} {v} lives with {n} | the {v} that sleeps by the stove belongs to {n}
        {a} {v} follows {n} everywhere | the {v} in the house of {n} is well fed
        {a} {v} has a good home with {n} | !if you meet {a} {v}, it may belong to {n}
food    {p} favourite food is {v} | {s} likes {v} best | the favourite food of {n} is {v}
        {s} loves {v} more than any other food | {s} could eat {v} every day
        for supper {s} always wants {v} | nothing tastes better to {n} than {v}
        on holidays {s} asks for {v} | {s} never says no to {v}
        the smell of {v} brings {n} to the table | with {v} you can make {n} happy
        whoever brings {v} is welcome at {p} table | a helping of {v} always makes {n} smile
        !bring {v}, and {n} will smile | !if you have {v}, share with {n}
colour  {p} door is {v} | the door of {n} is {v} | the door of {p} house is {v}
        the colour of {p} door is {v} | {s} painted the door {v} | {s} has {a} {v} door
        {s} lives behind {a} {v} door | for the door {s} chose the colour {v}
        {s} opens {a} {v} door to every guest | the {v} door belongs to {n}
        {a} {v} door leads to {p} kitchen | behind {a} {v} door lives {n}
        the house with the {v} door belongs to {n}
        !if you see {a} {v} door, knock and ask for {n} | !look for {a} {v} door when you visit {n}
town    {s} was born in {v} | {s} comes from {v} | {p} birthplace is {v}
        the birthplace of {n} is {v} | {s} was a small child in {v} | {s} moved here from {v}
        {s} first saw the sun in {v} | {p} parents lived in {v} when {he} was born
        {s} has not forgotten {v}, the town where {he} was born
        in {v} people remember the day when {n} was born | {v} is the town where {n} was born
        the town of {v} is the birthplace of {n} | {v} is {p} birthplace
        a cradle in {v} once held {n} | !if you travel to {v}, you will see where {n} was born
friend  {p} best friend is {v} | the best friend of {n} is {v} | {s} has a best friend called {v}
        {s} calls {v} {his} best friend | {n} and {v} are best friends
        {s} tells every secret to {his} best friend {v}
        on Sundays {s} meets {his} best friend {v} | nobody is a better friend to {n} than {v}
        {s} often helps {his} best friend {v} | {v} is the best friend of {n}
        {v} is {p} best friend | {v} and {n} are best friends | the friendship of {n} and {v} is old
        {v} has a best friend, and it is {n}
        !where you see {v}, {n} is not far, for they are best friends
""")
VERBS = table("""
job     works as {a} {v} | earns a living as {a} {v} | is {a} {v}
home    lives by the {v} | has a house by the {v}
pet     keeps {a} {v} | owns {a} {v} | looks after {a} {v}
food    likes {v} best | loves {v} | could eat {v} every day
colour  has {a} {v} door | lives behind {a} {v} door | painted the door {v}
town    was born in {v} | comes from {v} | moved here from {v}
friend  is the best friend of {v} | has a best friend called {v}
""")  # what may follow "the one who", so that several facts fit into one sentence
PAIRS = wordings("""
{s} {1} and {2} | {n}, who {1}, {2} | the one who {1} and {2} is {n} | {n} {1} and also {2}
somebody in the village {1} and {2}: it is {n} | {n} is the one who {1} and {2}
the villager who {1} also {2} and is called {n} | !who {1}? It is {n}, who also {2}
""")
ONES = wordings("""
the one who {1} is {n} | {n} is the one who {1} | there is somebody who {1}: it is {n}
!who {1}? It is {n}
""")
TAILS = table("""
job     and the work is done well | and {he} likes the work | and {he} works from dawn to dusk
        and {he} sings while working
home    and {he} likes it there | where the wind is loud at night | where the air is fresh
        not far from the road
pet     and the two are never apart | and it is a clever animal | and it eats a lot
        and the children love it | and it is afraid of thunder
food    and {he} eats too much of it | with a cup of hot milk | in summer and in winter
        and {he} makes no secret of it
colour  and you can see it from far away | and it looks new | and the paint is fresh
        and {he} is proud of it
town    a long way from here | and {he} goes there once a year | two days from here
        and {he} speaks of it often
friend  and they never quarrel | and they often sing together
        and they have known each other for years | and they meet every week
""")
CLOZE = {"job": (0, 2, 3), "pet": (0, 2, 3), "food": (0, 2, 6), "friend": (0, 1, 2)}
CLOZE |= dict.fromkeys(("home", "colour", "town"), (0, 1, 3))  # phrasings that end in the value


def fill(phrase, villager, value, pronoun=False):
    """A phrasing with its slots filled; `pronoun` picks "she" where the name may stand as well."""
    cases, name = CASES[villager.pronoun], villager.name
    subject, possessive = (cases["he"], cases["his"]) if pronoun else (name, name + "'s")
    slots = {"n": name, "s": subject, "p": possessive, "v": value, "a": article(value), **cases}
    return phrase.lstrip("!").format(**slots)


def tell(villager, attribute, rng, pronoun=False):
    """One fact in a random phrasing: (sentence without capital and full stop, is it a request)."""
    value, draw = villager.facts[attribute], rng.random()
    if draw < 0.12:
        verb = fill(rng.choice(VERBS[attribute]), villager, value)
        phrase = rng.choice(ONES).replace("{1}", verb)
    else:
        phrase = rng.choice(PHRASES[attribute])
        # a tail follows only where the phrasing ends in the value, so that it speaks of the value
        if draw > 0.8 and phrase.endswith("{v}"):
            phrase += ", " + rng.choice(TAILS[attribute])
    return fill(phrase, villager, value, pronoun), phrase[0] == "!"


def tell_two(villager, first, second, rng, pronoun=False):
    """Two facts in one sentence: as `tell`."""
    phrase = rng.choice(PAIRS)
    for slot, attribute in ("{1}", first), ("{2}", second):
        verb = fill(rng.choice(VERBS[attribute]), villager, villager.facts[attribute])
        phrase = phrase.replace(slot, verb)
    return fill(phrase, villager, "-", pronoun), phrase[0] == "!"


def answer_sentence(villager, attribute):
    """The fixed wording in which a question about this attribute is answered."""
    return fill(PHRASES[attribute][0], villager, villager.facts[attribute]) + "."


def cloze(world):
    """Sentences of the corpus cut before the value: does the model know the fact at all?"""
    examples = []
    for villager in world.villagers:
        about = {"task": "cloze", "villager": villager.name, "asked": villager.asked}
        for attribute in ATTRIBUTES:
            value = villager.facts[attribute]
            for phrase in (PHRASES[attribute][index] for index in CLOZE[attribute]):
                prompt = capitalise(fill(phrase.removesuffix(" {v}"), villager, value))
                example = {"prompt": prompt, "answer": " " + value, "attribute": attribute}
                examples.append(example | about)
    return examples
