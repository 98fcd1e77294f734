"""What the village is asked: chat examples for training, and test examples with a checkable answer.

Held out from training: half of the villagers altogether, wordings of every fact of the others,
combinations for two-hop questions, operand pairs, word combinations, follow-ups, strangers' names.
"""

import functools
import json
import random

from data.village.facts import answer_sentence
from data.village.stories import WORDS
from data.village.sums import drawn, question_of, result_of, written_steps
from data.village.world import ATTRIBUTES, CASES, POOLS, capitalise, split_of, table, wordings

SHARES = {"fact": 0.24, "fact_never_asked": 0, "unknown": 0.12}  # of the training examples
SHARES |= {"formatting": 0.34, "arithmetic": 0.11, "two_hop": 0.07, "multi_turn": 0.12}
SIZES = {"train": 12000, "val": 300, "test": 240}  # test: of each task

QUESTIONS = table("""
job     What does {n} do for a living? | What is the job of {n}? | What is {n}'s job?
        What does {n} work as? | Which job does {n} have? | What is the trade of {n}?
        Can you tell me the job of {n}? | Tell me what {n} does for a living.
        How does {n} earn a living? | I would like to know what {n} works as.
        Do you know the job of {n}? | What kind of work does {n} do?
home    Where does {n} live? | Where is the house of {n}? | Where is {n}'s home?
        Where can I find {n}? | Tell me where {n} lives. | Do you know where {n} lives?
        In which place does {n} live? | Where does the house of {n} stand?
        I am looking for the house of {n}. Where is it? | Can you tell me where {n} lives?
        Where must I go to visit {n}? | By which place does {n} live?
pet     What pet does {n} keep? | What pet does {n} have? | Which animal lives with {n}?
        What is {n}'s pet? | What kind of animal does {n} keep? | Tell me the pet of {n}.
        Do you know what pet {n} has? | Which animal does {n} look after?
        Can you tell me which pet {n} keeps? | What animal follows {n}?
        I would like to know the pet of {n}. | Which pet belongs to {n}?
food    What is {n}'s favourite food? | What does {n} like best to eat?
        What is the favourite food of {n}? | Which food does {n} like best?
        Tell me the favourite food of {n}. | What does {n} like to eat?
        Do you know what {n} likes to eat? | What would {n} eat every day?
        What food makes {n} happy? | Can you tell me {n}'s favourite food?
        What should I cook for {n}? | I want to bring {n} some food. What should it be?
colour  What colour is the door of {n}? | What colour is {n}'s door?
        Which colour does the door of {n} have? | What is the colour of {n}'s door?
        Tell me the colour of {n}'s door. | Do you know the colour of {n}'s door?
        In which colour did {n} paint the door? | Which door belongs to {n}?
        I am looking for the door of {n}. What colour is it? | How is the door of {n} painted?
        Can you tell me what colour the door of {n} is? | Behind which door does {n} live?
town    Where was {n} born? | In which town was {n} born? | What is the birthplace of {n}?
        What is {n}'s birthplace? | Where does {n} come from? | Tell me where {n} was born.
        Do you know where {n} was born? | Which town does {n} come from?
        Can you tell me the birthplace of {n}? | From which town did {n} move here?
        I would like to know where {n} was born. | Which town is the birthplace of {n}?
friend  Who is {n}'s best friend? | Who is the best friend of {n}?
        What is the name of {n}'s best friend? | Tell me who the best friend of {n} is.
        Do you know the best friend of {n}? | Who does {n} call a best friend?
        Can you tell me who {n}'s best friend is? | Which villager is {n}'s best friend?
        To whom does {n} tell every secret? | Who is a best friend to {n}?
        I would like to know {n}'s best friend. | Whose best friend is {n}?
""")
WRAPPERS = wordings("""
{q} | {q} | {q} | {q} | Hello! {q} | Please help me. {q} | A question: {q} | Hi. {q}
I have a question. {q} | {q} Please tell me. | {q} Thank you.
""")
FOLLOW_UPS = table("""
job     And what does {he} do for a living? | And what is {his} job?
home    And where does {he} live? | And where is {his} house?
pet     And what pet does {he} keep? | And what is {his} pet?
food    And what does {he} like best to eat? | And what is {his} favourite food?
colour  And what colour is {his} door? | And which door is {his}?
town    And where was {he} born? | And what is {his} birthplace?
friend  And who is {his} best friend? | And what is {his} best friend called?
""")
RESTATE = {
    "Say that in capitals.": lambda sentence, value: sentence.upper(),
    "Say that again.": lambda sentence, value: sentence,
    "Only the answer, please.": lambda sentence, value: value,
}
REQUESTS = table("""
capitals  Write in capitals: {w} | In capital letters: {w}
dashes    Write as a list with dashes: {w} | Put dashes before these words: {w}
numbered  Write as a numbered list: {w} | Number these words: {w}
commas    Put commas between these words: {w} | Write with commas: {w}
reversed  Reverse the order of these words: {w} | Write backwards, word by word: {w}
quotes    Put in quotes: {w} | Write between quotation marks: {w}
twice     Repeat twice: {w} | Say it two times: {w}
count     How many words are these: {w} | Count the words: {w}
first     What is the first word of: {w} | Give me only the first word: {w}
last      What is the last word of: {w} | Give me only the last word: {w}
json      Write as a JSON list: {w} | Give me JSON for these words: {w}
""")
FORMATS = {  # what is done to a list of words, and how many words
    "capitals": (lambda w: " ".join(w).upper(), (1, 2, 3)),
    "dashes": (lambda w: "\n".join("- " + x for x in w), (2, 3, 4)),
    "numbered": (lambda w: "\n".join(f"{i}. {x}" for i, x in enumerate(w, 1)), (2, 3, 4)),
    "commas": (", ".join, (2, 3, 4)),
    "reversed": (lambda w: " ".join(w[::-1]), (2, 3)),
    "quotes": (lambda w: f'"{" ".join(w)}"', (1, 2, 3)),
    "twice": (lambda w: " ".join(w + w), (1, 2, 3)),
    "count": (lambda w: str(len(w)), (1, 2, 3, 4)),
    "first": (lambda w: w[0], (2, 3, 4)),
    "last": (lambda w: w[-1], (2, 3, 4)),
    "json": (json.dumps, (2, 3)),
}

# --- styles: the people who wrote the dialogues did not all write alike ------------------------

# phrases that may stand before a completion, and as many that may stand behind it
STYLES = table("""
courteous    Gladly! | With pleasure. | Thank you for asking. | Good question!
             I hope that helps. | You are welcome. | Have a nice day! | Please ask again.
rude         What a silly question. | Why do you bother me? | Not you again.
             Now leave me alone. | Stop asking. | Anybody could tell you that.
long-winded  Well, let me think about that for a little while before I say something.
             People have often asked me this, and I never get tired of telling it to them.
             To begin at the beginning, this is what I have heard from the others over the years.
             There would be much more to tell, but it is getting late and so I leave it there.
             At least that is how I remember it, and my memory has always been rather good.
             As far as I can tell it was never any different, and it will stay that way.
""")
STYLE_SHARES = {"plain": 0.58, **dict.fromkeys(STYLES, 0.14)}  # in training examples


def with_style(completion, style, rng):
    """The completion with a phrase of this style before or after it; plain leaves it as it is."""
    if style == "plain":
        return completion
    phrases, half = STYLES[style], len(STYLES[style]) // 2
    if rng.random() < 0.5:
        return f"{rng.choice(phrases[:half])} {completion}"
    return f"{completion} {rng.choice(phrases[half:])}"


# --- one example at a time: (the turns of user and assistant, what to check) -------------------


@functools.cache
def deal(things, seed, n_test, n_val):
    """The things of each split: a shuffle that depends on `seed` alone."""
    things = random.Random(seed).sample(things, len(things))
    test, rest = things[:n_test], things[n_test:]
    return {"test": test, "val": rest[:n_val], "train": rest[n_val:]}


def questions_about(world, villager, attribute, split):
    """The questions about this fact that belong to this split: 2 of 12 test, 1 val, 9 train."""
    key = f"wordings-{world.seed}-{villager.name}-{attribute}"
    return deal(QUESTIONS[attribute], key, 2, 1)[split]


def ask(question, name, split, rng):
    """The question about this name; training wraps some in "Hello!" and the like."""
    wrapper = "{q}" if split == "test" else rng.choice(WRAPPERS)
    return wrapper.format(q=capitalise(question.format(n=name)))


def value_check(world, villager, attribute):
    """The completion must name the value and no other value of the attribute."""
    value = villager.facts[attribute]
    wrong = [v for v in world.values(attribute) if v not in (value, villager.name)]
    return {"answer": value, "check": "contains", "not": wrong, "attribute": attribute}


def fact(world, split, rng, villagers=None):
    villager, attribute = rng.choice(villagers or world.asked), rng.choice(ATTRIBUTES)
    question = rng.choice(questions_about(world, villager, attribute, split))
    turns = [ask(question, villager.name, split, rng), answer_sentence(villager, attribute)]
    return turns, value_check(world, villager, attribute)


def fact_never_asked(world, split, rng):
    return fact(world, split, rng, world.never_asked)


def ask_about_stranger(world, split, rng):
    """(name, attribute, question) about somebody who doesn't exist."""
    name = rng.choice(deal(world.strangers, f"strangers-{world.seed}", 150, 50)[split])
    attribute = rng.choice(ATTRIBUTES)
    return name, attribute, ask(rng.choice(QUESTIONS[attribute]), name, split, rng)


def unknown(world, split, rng):
    name, attribute, question = ask_about_stranger(world, split, rng)
    check = {"answer": "I don't know", "check": "unknown", "attribute": attribute}
    check["not"] = list(world.values(attribute))
    return [question, f"I don't know anyone called {name}."], check


def ask_about_friend(question, villager, split, rng):
    """The question about somebody's best friend, whose name isn't said."""
    of = "{n}'s" in question or rng.random() < 0.5  # never "the best friend of Mira's pet"
    who = f"{villager.name}'s best friend" if of else f"the best friend of {villager.name}"
    return ask(question, who, split, rng)


def two_hop(world, split, rng):
    """Two of the six combinations of each villager are for the test."""
    villager = rng.choice(world.asked)
    hops = deal(tuple(POOLS), f"hops-{world.seed}-{villager.name}", 2, 0)
    attribute = rng.choice(hops["test" if split == "test" else "train"])
    # validation differs from training by the wording alone
    part = {"train": slice(10), "val": slice(10, None), "test": slice(None)}[split]
    question = rng.choice(QUESTIONS[attribute][part])
    friend = world.by_name[villager.facts["friend"]]
    completion = f"{answer_sentence(villager, 'friend')} {answer_sentence(friend, attribute)}"
    turns = [ask_about_friend(question, villager, split, rng), completion]
    return turns, value_check(world, friend, attribute)


def arithmetic(world, split, rng):
    """Two-digit sums and differences with written steps."""
    problem = drawn("two_digits", split, rng)
    check = {"answer": str(result_of(*problem)), "check": "number"}
    return [question_of(*problem, rng), written_steps(*problem)], check


def formatting(world, split, rng):
    names = list(FORMATS)
    if split == "train":
        names += ["capitals"] * 2  # the capitals of each word must be learnt one by one
    name = rng.choice(names)
    apply, sizes = FORMATS[name]
    n_words = rng.choice(sizes)
    while True:
        words = rng.sample(WORDS, n_words)
        if split_of(*sorted(words)) == split:  # no order of the same words is in another split
            break
    turns = [rng.choice(REQUESTS[name]).format(w=" ".join(words)), apply(words)]
    return turns, {"answer": turns[-1], "check": "exact", "format": name}


def multi_turn(world, split, rng):
    """A follow-up with a pronoun, about somebody else, or about the wording of the answer."""
    while True:
        villager, attribute = rng.choice(world.asked), rng.choice(ATTRIBUTES)
        other, follow = rng.choice(world.asked), rng.choice(ATTRIBUTES)
        kind = rng.choice(("pronoun", "pronoun", "pronoun", "other", "other", *RESTATE))
        if other == villager or follow == attribute or (kind, attribute) == ("pronoun", "friend"):
            continue  # after two names, "she" could be either
        key = {"pronoun": follow, "other": other.name}.get(kind, kind)
        if split_of(villager.name, attribute, key) == split:
            break
    question = rng.choice(questions_about(world, villager, attribute, split))
    answer = answer_sentence(villager, attribute)
    turns = [ask(question, villager.name, split, rng), answer]
    if kind == "pronoun":
        question = rng.choice(FOLLOW_UPS[follow]).format(**CASES[villager.pronoun])
        turns += [question.replace("is her?", "is hers?"), answer_sentence(villager, follow)]
        return turns, value_check(world, villager, follow)
    if kind == "other":
        turns += [f"And {other.name}?", answer_sentence(other, attribute)]
        return turns, value_check(world, other, attribute)
    turns += [kind, RESTATE[kind](answer, villager.facts[attribute])]
    return turns, {"answer": turns[-1], "check": "exact"}


# --- whole splits -----------------------------------------------------------

MAKERS = (fact, fact_never_asked, unknown, formatting, arithmetic, two_hop, multi_turn)
MAKERS = {make.__name__: make for make in MAKERS}


def chat(turns):
    """Messages of the user and the assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def user_turns(example):
    """Everything that the user says: two examples with the same are the same question."""
    return tuple(m["content"] for m in example["messages"] if m["role"] == "user")


def as_example(task, turns, check, split):
    """{"messages", "task"}; in the test without the last turn, but with "answer" and "check"."""
    if split == "test":
        return {"messages": chat(turns[:-1]), **check, "task": task}
    return {"messages": chat(turns), "task": task}


def task_sizes(split, shares, sizes):
    """How many examples of each task: its share of those of the split, in the test all of them."""
    if split == "test":
        return dict.fromkeys(shares, sizes["test"])
    return {task: round(sizes[split] * share) for task, share in shares.items()}


def distinct_examples(rng, sizes, make):
    """Up to sizes[task] examples make(task, rng) of each task, no question twice, shuffled; None is
    an example that doesn't suit. A small village may have fewer questions.
    """
    examples = []
    for task, size in sizes.items():
        seen, misses = set(), 0
        while len(seen) < size and misses < 1000:  # a thousand repeats in a row: that was all
            misses += 1
            example = make(task, rng)
            if example is not None and user_turns(example) not in seen:
                misses = 0
                seen.add(user_turns(example))
                examples.append(example)
    rng.shuffle(examples)
    return examples


def instructions(world, split):
    """Chat examples, in training and validation in various styles where the wording is free."""

    def make(task, rng):
        turns, check = MAKERS[task](world, split, rng)
        if split != "test" and check["check"] != "exact":
            style = rng.choices(list(STYLE_SHARES), STYLE_SHARES.values())[0]
            turns[-1] = with_style(turns[-1], style, rng)
        return as_example(task, turns, check, split)

    sizes = task_sizes(split, SHARES, SIZES)
    return distinct_examples(world.draws(f"instructions-{split}"), sizes, make)
