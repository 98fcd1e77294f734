"""What cannot be done in the head: large numbers, and questions about people whom no text tells of.

Newcomers have moved to the village after the corpus was written. What is known of them stands in a
small knowledge base, which a search tool reads; a calculator works out large numbers. The model
writes <tool_call>calculator(4821 * 736)</tool_call>, the result follows between <tool_result> and
</tool_result>, which isn't trained on, and then the answer.
"""

import random

from data.village import tasks
from data.village.facts import answer_sentence
from data.village.sums import question_of, result_of
from data.village.world import ATTRIBUTES, POOLS, World, draw_names, settle, split_of
from nanollm.tools import NOTHING

SHARES = {"large_numbers": 0.38, "lookup": 0.25, "lookup_two_hop": 0.25, "nobody": 0.12}
SIZES = {"train": 6000, "val": 200, "test": 200}  # test: of each task
TOPICS = {key: key for key in ATTRIBUTES} | {"food": "favourite food", "colour": "door colour"}
TOPICS |= {"town": "birthplace", "friend": "best friend"}


def newcomers(world, n=1000):
    """A World of people absent from the corpus: training asks about its asked half."""
    rng = random.Random(f"newcomers-{world.seed}")
    known = len(world.villagers), len(world.strangers)
    _, names = draw_names(known[0], known[1] + n, random.Random(f"village-{world.seed}"))
    people = [(name, "she" if name.endswith("a") else "he") for name in names[known[1] :]]
    halves = settle(people[: n // 2], True, rng) + settle(people[n // 2 :], False, rng)
    return World(tuple(halves), world.strangers, world.seed)


def query(person, attribute):
    return f"{TOPICS[attribute]} of {person.name}"


def knowledge(people):
    """The entries of the knowledge base: {"title", "text"}, one for each fact."""
    return [
        {"title": query(person, attribute), "text": answer_sentence(person, attribute)}
        for person in people.villagers
        for attribute in ATTRIBUTES
    ]


def call(tool, argument, result):
    """How a call and its result stand in a completion."""
    return f"<tool_call>{tool}({argument})</tool_call><tool_result>{result}</tool_result>"


def large_numbers(people, split, rng):
    """Sums and differences of five to seven digits, products of three and four."""
    sign = rng.choice("+-*")
    digits = (3, 4) if sign == "*" else (5, 6, 7)
    while True:
        a, b = (rng.randint(10 ** (n - 1), 10**n - 1) for n in rng.choices(digits, k=2))
        a, b = max(a, b), min(a, b)
        if split_of("large", a, b) == split:
            break
    result = result_of(a, sign, b)
    completion = f"{call('calculator', f'{a} {sign} {b}', result)}The answer is {result}."
    return question_of(a, sign, b, rng), completion, {"answer": str(result), "check": "number"}


def half_of(people, split, rng):
    """Somebody to ask about: validation shares its people with training."""
    return rng.choice(people.never_asked if split == "test" else people.asked)


def looked_up(people, question, *facts):
    """A completion that looks up facts (person, attribute), of which the last is asked for."""
    calls = [call("search", query(*fact), answer_sentence(*fact)) for fact in facts]
    completion = "".join(calls) + " ".join(answer_sentence(*fact) for fact in facts)
    return question, completion, tasks.value_check(people, *facts[-1])


def lookup(people, split, rng):
    person, attribute = half_of(people, split, rng), rng.choice(ATTRIBUTES)
    question = tasks.ask(rng.choice(tasks.QUESTIONS[attribute]), person.name, split, rng)
    return looked_up(people, question, (person, attribute))


def lookup_two_hop(people, split, rng):
    person, attribute = half_of(people, split, rng), rng.choice(list(POOLS))
    question = rng.choice(tasks.QUESTIONS[attribute])
    question = tasks.ask_about_friend(question, person, split, rng)
    friend = people.by_name[person.facts["friend"]]
    return looked_up(people, question, (person, "friend"), (friend, attribute))


def nobody(people, split, rng):
    """Strangers are in no text and in no knowledge base either."""
    name, attribute, question = tasks.ask_about_stranger(people, split, rng)
    completion = call("search", f"{TOPICS[attribute]} of {name}", NOTHING)
    check = {"answer": "I don't know", "check": "unknown", "not": people.values(attribute)}
    return question, f"{completion}I don't know anyone called {name}.", check


MAKERS = (large_numbers, lookup, lookup_two_hop, nobody)
MAKERS = {make.__name__: make for make in MAKERS}


def tool_examples(world, split):
    """Chat examples with calls, with "answer" and "check" in every split."""
    people = newcomers(world)

    def make(task, rng):
        question, completion, check = MAKERS[task](people, split, rng)
        if len(check.get("not", ())) > 40:  # of a thousand names
            check["not"] = rng.sample(check["not"], 40)
        return {**tasks.as_example(task, [question, completion], check, split), **check}

    sizes = tasks.task_sizes(split, SHARES, SIZES)
    return tasks.distinct_examples(world.draws(f"tools-{split}"), sizes, make)


def tool_lessons(world, split, problems, chats):
    """Dialogues for SFT: those with calls, half as many worked problems and as many other chats,
    which show when no tool is needed.
    """
    examples = tool_examples(world, split)
    known = [c for c in chats if c["task"] != "unknown"]  # strangers are looked up now
    examples += list(problems)[: len(examples) // 2] + known[: len(examples) // 2]
    random.Random(f"tool-lessons-{split}-{world.seed}").shuffle(examples)
    return examples
