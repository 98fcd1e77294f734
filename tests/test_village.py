"""The village is what it says: deterministic, true, varied, and its test questions are held out."""

import hashlib
import json
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from data.village import corpus, prepare
from data.village.corpus import SHARES, documents
from data.village.facts import PHRASES, cloze
from data.village.styles import MANNERS, politeness
from data.village.sums import SUMS, held_out, written_steps
from data.village.tasks import FAMILIES, MAKERS, QUESTIONS, instructions, user_turns
from data.village.world import POOLS, build_world, split_of
from nanollm.rewards import check_answer

ROOT = Path(__file__).resolve().parent.parent
ATTRIBUTE_OF = {value.lower(): attribute for attribute, pool in POOLS.items() for value in pool}
CASED = {value.lower(): value for pool in POOLS.values() for value in pool}
ANY_VALUE = re.compile(rf"\b(?:{'|'.join(CASED)})\b", re.IGNORECASE)


@pytest.fixture(scope="module")
def world():
    return build_world()


@pytest.fixture(scope="module")
def texts(world):
    """2 MB of training documents by kind."""
    by_kind = defaultdict(list)
    for kind, text in documents(world, approx_bytes=2_000_000):
        by_kind[kind].append(text)
    return by_kind


@pytest.fixture(scope="module")
def chat(world):
    return {split: instructions(world, split) for split in ("train", "val", "test")}


def sentences(text):
    return re.split(r"(?<=[.!])\s+", text.replace("\n", " "))


def values_in(text):
    """The (attribute, value) pairs of the pools that stand in the text as whole words."""
    found = (value.lower() for value in ANY_VALUE.findall(text))
    return {(ATTRIBUTE_OF[value], CASED[value]) for value in found}


def names_in(text, world):
    """The villagers named in the text, in the order of their first mention."""
    words = dict.fromkeys(re.findall(r"[A-Z][a-z]+", text))
    return [world.by_name[word] for word in words if word in world.by_name]


# --- the world --------------------------------------------------------------


def test_the_same_seed_gives_the_same_world_and_another_seed_another(world):
    assert build_world() == world
    assert build_world(seed=1) != world


def test_text_does_not_depend_on_the_hash_seed():
    code = (
        "import hashlib; from data.village import *; w = build_world(8, 3);"
        "rows = [*corpus(w, n_documents=60), *map(str, instructions(w, 'train', n_items=60))];"
        "print(hashlib.sha256('\\n'.join(rows).encode()).hexdigest())"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            check=True,
            text=True,
            capture_output=True,
            env={"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]


def test_names_are_unique_and_nobody_shares_a_name_with_a_stranger(world):
    names = [v.name for v in world.villagers]
    assert len(set(names)) == 32 and len(set(world.strangers)) == 600
    assert not set(names) & set(world.strangers)


def test_no_value_belongs_to_two_attributes():
    values = [value.lower() for pool in POOLS.values() for value in pool]
    assert len(values) == len(set(values)) == 16 * 6


def test_each_half_holds_every_value_once_so_that_habit_helps_nobody(world):
    for half in (world.asked, world.never_asked):
        assert len(half) == 16
        for attribute, pool in POOLS.items():
            assert Counter(v.facts[attribute] for v in half) == Counter(pool)


@pytest.mark.parametrize("n", [4, 6, 10, 32, 80])
def test_best_friends_are_each_others_and_of_the_same_half(n):
    world = build_world(n)
    for villager in world.villagers:
        friend = world.by_name[villager.facts["friend"]]
        assert friend != villager and friend.facts["friend"] == villager.name
        assert friend.asked == villager.asked


def test_too_small_odd_and_too_large_villages_are_refused():
    for n in (2, 7):
        with pytest.raises(ValueError, match="even number of at least 4"):
            build_world(n)
    with pytest.raises(ValueError, match="fewer villagers"):
        build_world(10_000)


# --- the corpus -------------------------------------------------------------


def test_the_kinds_have_their_shares_of_bytes(texts):
    total = sum(len(t) for kind in texts.values() for t in kind)
    for kind, share in SHARES.items():
        assert sum(map(len, texts[kind])) / total == pytest.approx(share, abs=0.01)


def test_the_corpus_is_deterministic_and_val_shares_no_document_with_train(world, texts):
    train = {text for kind in texts.values() for text in kind}
    val = list(corpus(world, "val", approx_bytes=50_000))
    assert val == list(corpus(world, "val", approx_bytes=50_000))
    assert len(val) > 100 and not train & set(val)
    assert len(train) == sum(map(len, texts.values()))  # no document twice


def test_every_kind_has_thousands_of_distinct_sentences(texts):
    for kind in SHARES:
        distinct = {s for text in texts[kind] for s in sentences(text)}
        assert len(distinct) > 2000, (kind, len(distinct))


def test_every_attribute_has_at_least_twelve_phrasings_in_both_directions():
    for attribute, phrases in PHRASES.items():
        assert len(phrases) >= 12
        subject = re.compile(r"\{[nsp]\}")
        value_first = [p for p in phrases if p.index("{v}") < subject.search(p).start()]
        assert len(value_first) >= 4, attribute


def test_biographies_say_nothing_untrue(world, texts):
    for text in texts["biography"]:
        about = names_in(text, world)[:1]
        for sentence in [text] if text.startswith("Name:") else sentences(text):
            continued = about if re.search(r"\b(he|she|his|her)\b", sentence, re.I) else []
            named = names_in(sentence, world)
            about = named + [v for v in continued if v not in named] or about
            if len(about) > 1:
                assert all(v.facts["friend"] in [w.name for w in about] for v in about), sentence
            for attribute, value in values_in(sentence):
                assert value in [v.facts[attribute] for v in about], sentence


def test_a_pronoun_fits_the_villager(world, texts):
    wrong = {"she": re.compile(r"\b(he|his|him)\b", re.I), "he": re.compile(r"\b(she|her)\b", re.I)}
    for text in texts["biography"]:
        about = names_in(text, world)
        if len(about) == 1:
            assert not wrong[about[0].pronoun].search(text), text


def test_a_pronoun_never_comes_before_the_name(texts):
    for text in texts["biography"]:
        assert not re.match(r'"?(He|She|His|Her)\b', text), text


def test_after_two_names_the_next_sentence_says_which_one_it_means(world, texts):
    for text in texts["biography"]:
        parts = sentences(text)
        for before, after in zip(parts, parts[1:]):
            assert (
                text.startswith("Name:")
                or len(names_in(before, world)) < 2
                or names_in(after, world)
            ), text


def test_stories_give_values_only_to_the_villager_they_are_true_of(world, texts):
    for text in texts["story"]:
        values, people = values_in(text), names_in(text, world)
        assert not values or any(all(v.facts[a] == x for a, x in values) for v in people), text


def test_stories_have_four_to_eight_sentences_or_a_short_talk_more(texts):
    for text in texts["story"]:
        assert 4 <= len(sentences(text)) <= 10, text


def test_strangers_do_not_occur_in_the_corpus(world, texts):
    words = {word for kind in texts.values() for text in kind for word in re.findall(r"\w+", text)}
    assert not words & set(world.strangers)


N, P = r"(\d+)", r"penn(?:y|ies)"
TRUTHS = [
    (rf"{N} \w+ at {N} {P} each(?: and pays|: \w+ counts out) {N} {P}", "*"),
    (rf"One (?:\w+) costs {N} {P}, so {N} \w+ cost {N} {P}", "*"),
    (rf"needs {N} \w+\. Each one costs {N} {P}\. That makes {N} {P}", "*"),
    (rf"has {N} \w+ and gets {N} \w+ more\. Now \w+ has {N}", "+"),
    (rf"holds {N} \w+, the other holds {N} \w+\. Together they hold {N}", "+"),
    (rf"sells {N} \w+ in the morning and {N} \w+ in the evening\. That is {N}", "+"),
    (rf"{N} plus {N} is {N}, so \w+ carries \3 ", "+"),
    (rf"brings {N} \w+, \w+ brings {N} \w+, and they have {N}", "+"),
    (rf"has {N} \w+ and sells {N} \w+\. There (?:is|are) {N}", "-"),
    (rf"has {N} {P} and spends {N} {P}\. \w+ has {N} {P} left", "-"),
    (rf"{N} minus {N} is {N}, so \w+ keeps \3 ", "-"),
    (rf"with {N} {P} for something that costs {N} {P} and gets {N} {P} back", "-"),
    (rf"Of {N} \w+, \w+ gives {N} \w+ to \w+\. \w+ keeps {N}", "-"),
    (rf"wants {N} {P} for a basket, \w+ offers {N} {P}\. The difference is {N} {P}", "-"),
    (rf"finds {N} \w+, and \w+ finds {N} more than \w+\. So \w+ has {N}", "+"),
    (rf"has {N} \w+\. \w+ has {N} more, that is {N}", "+"),
]
OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


LEDGER = re.compile(r" has (\d+) now\.$", re.M)  # the end of a story with its sums
COPYBOOK = r"(\d+) ([+*-]) (\d+) = (\d+)\."
ASKED = "|".join(  # every wording of a sum's question
    re.escape(words).replace(r"\{a\}", r"\d+").replace(r"\{b\}", r"\d+")
    for wordings in SUMS.values()
    for words in wordings
)


def test_every_number_in_market_prose_belongs_to_a_true_statement(texts):
    matched = Counter()
    for text in texts["market"]:
        if LEDGER.search(text):
            continue
        rest = re.sub(r"\d+ [+*-] \d+: .*?; so .*? = \d+\.", "", text)
        for a, sign, b, result in re.findall(COPYBOOK, rest):
            assert OPERATIONS[sign](int(a), int(b)) == int(result)
            matched["copybook"] += 1
        rest = re.sub(COPYBOOK, "", rest)
        for question in re.findall(ASKED, rest):  # answered on the page, and by no test
            a, b = sorted(map(int, re.findall(r"\d+", question)))
            assert split_of("easy", a, b) == "train"
        rest = re.sub(ASKED, "", rest)
        for pattern, sign in TRUTHS:
            for found in re.finditer(pattern, rest):
                a, b, result = map(int, found.groups())
                assert OPERATIONS[sign](a, b) == result, found[0]
                matched[pattern] += 1
            rest = re.sub(pattern, "", rest)
        assert not re.search(r"\d", rest), rest
    assert min(matched[pattern] for pattern, _ in TRUTHS) > 30 and matched["copybook"] > 1000


def test_every_story_of_the_market_adds_up(texts):
    stories = [line for text in texts["market"] if LEDGER.search(text) for line in text.split("\n")]
    for line in stories:
        total, told = None, r"([^:.]*\.[^:.]*|[^:.]*)"
        parts = re.findall(told + r": (\d+) ([+*-]) (\d+) = (\d+)\.", line)
        for told, a, sign, b, result in parts:
            assert OPERATIONS[sign](int(a), int(b)) == int(result), line
            assert total in (None, int(a)), line  # goes on from the last
            assert b in re.findall(r"\d+", told), line
            total = int(result)
        assert parts and int(LEDGER.search(line)[1]) == total, line
        assert split_of("story", *story_key(line, parts)) == "train", line
    assert len(stories) > 300


def story_key(line, parts):
    """What splits stories: the first amount, the number of baskets, then signs and numbers."""
    (_, a, sign, b, _), *rest = parts
    happened = [n for _, _, s, x, _ in rest for n in (s, int(x))]
    first = (int(b), int(a)) if sign == "*" else (int(a), 1)
    return *first, sign, int(b), *happened


def test_every_written_step_is_right(texts):
    lines = [
        line
        for text in texts["market"]
        for line in re.findall(r"\d+ [+*-] \d+: .*", text)
        if "write" in line
    ]
    kinds = Counter()
    for line in lines:
        a, sign, b, steps, again, result = re.fullmatch(
            r"(\d+) ([+*-]) (\d+): (.*); so (.*) = (\d+)\.", line
        ).groups()
        assert again == f"{a} {sign} {b}" and OPERATIONS[sign](int(a), int(b)) == int(result), line
        for left, right in re.findall(r"(\d+(?: [+*-] \d+)+) = (\d+)", steps):
            first, *more = re.findall(r"([+*-]?) ?(\d+)", left)
            total = int(first[1])
            for do, number in more:
                total = OPERATIONS[do](total, int(number))
            assert total == int(right), line
        written = re.findall(r"write (\d+)", steps)
        assert int("".join(reversed(written))) == int(result), line
        kinds[sign, len(a)] += 1
    assert min(kinds["+", 2], kinds["-", 2], kinds["+", 3], kinds["*", 2], kinds["*", 3]) > 50


def test_written_steps_read_like_this():
    assert (
        written_steps(27, "+", 35)
        == "27 + 35: 7 + 5 = 12, write 2 carry 1; 2 + 3 + 1 = 6, write 6; so 27 + 35 = 62."
    )
    assert (
        written_steps(62, "-", 35)
        == "62 - 35: 12 - 5 = 7, write 7 borrow 1; 6 - 3 - 1 = 2, write 2; so 62 - 35 = 27."
    )


def test_no_test_sum_occurs_in_the_corpus(texts):
    for text in texts["market"]:
        for a, b in re.findall(r"(\d+) (?:[+-]|plus|minus) (\d+)", text):
            if len(a) < 3 and len(b) < 3:  # three digits are split on their own
                assert held_out(int(a), int(b)) != 3, text
        for a, b in re.findall(r"(\d{3}) [+-] (\d{3}):", text):
            assert split_of("three", *sorted((int(a), int(b)))) == "train", text
        for a, b in re.findall(r"(\d+) \* (\d): \d+ \*", text):
            assert split_of("product", int(a), int(b)) == "train", text


def test_images_count_their_shapes_right(texts):
    number = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
    group = re.compile(
        r"\b(an?|one|two|three|four|five) ((?:small |large )?\w+ (?:circle|square|"
        r"triangle|star))s?\b"
    )
    for text in texts["image"]:
        counts = {kind: number[n] for n, kind in group.findall(text.split(".")[0])}
        assert 2 <= len(counts) <= 3, text
        for total in re.findall(r"Together there are (\d+) shapes", text):
            assert int(total) == sum(counts.values()), text
        for more, fewer in re.findall(r"There are more ([\w ]+)s than ([\w ]+)s\.", text):
            assert counts[more] > counts[fewer], text
        for one, other in re.findall(r"There are as many ([\w ]+)s as ([\w ]+)s\.", text):
            assert counts[one] == counts[other], text


def test_articles_and_sentence_beginnings_are_right(texts):
    for kind in texts.values():
        for text in kind:
            assert not re.search(r"\b[Aa] [aeiou]\w", text), text
            assert not re.search(r"\b[Aa]n [^aeiou]", text), text
            assert not re.search(r"(^|[.!?] )[a-z]", re.sub(r'[!?]"? \w+', "", text)), text
            assert not re.search(r"\b1 (?!is |plus |minus |times )[a-z]+s\b", text), text
            assert "  " not in text and "{" not in text


# --- cloze ------------------------------------------------------------------


def test_cloze_asks_for_every_fact_at_least_twice(world):
    examples = cloze(world)
    per_fact = Counter((i["villager"], i["attribute"]) for i in examples)
    assert len(examples) == 32 * 7 * 3 and len(per_fact) == 32 * 7 and min(per_fact.values()) >= 2
    for example in examples:
        assert example["villager"] in example["prompt"] and not example["prompt"].endswith(" ")
        assert (
            example["answer"]
            == " " + world.by_name[example["villager"]].facts[example["attribute"]]
        )
    assert len({i["prompt"] for i in examples}) == len(examples)


def test_cloze_sentences_occur_in_the_corpus(world, texts):
    everything = "\n".join(texts["biography"])
    told = sum(i["prompt"] + i["answer"] in everything for i in cloze(world))
    assert told > 0.85 * len(cloze(world))


# --- chat items -------------------------------------------------------------


def test_the_tasks_have_their_sizes(chat):
    train = Counter(i["task"] for i in chat["train"])
    assert train == {task: round(12000 * share) for task, share in FAMILIES.items()}
    test = Counter(i["task"] for i in chat["test"])
    assert set(test) == set(MAKERS) and min(test.values()) >= 200
    assert len(chat["val"]) == 300


def test_no_question_is_in_two_splits(chat):
    asked = {split: [user_turns(i) for i in examples] for split, examples in chat.items()}
    for split, turns in asked.items():
        assert len(set(turns)) == len(turns), split
    assert not set(asked["test"]) & set(asked["train"])
    assert not set(asked["test"]) & set(asked["val"])
    assert not set(asked["val"]) & set(asked["train"])


def test_no_held_out_wording_of_a_fact_is_asked_in_training(chat):
    """Neither alone, nor behind "Hello!", nor as the first turn of a longer talk."""
    questions = [i["messages"][0]["content"] for i in chat["test"] if i["task"] == "fact"]
    trained = "\n".join(turn for i in chat["train"] for turn in user_turns(i))
    for question in questions:
        assert question not in trained


def test_villagers_of_the_never_asked_half_are_in_no_training_example(world, chat):
    said = " ".join(
        m["content"] for split in ("train", "val") for i in chat[split] for m in i["messages"]
    ).lower()
    words = set(re.findall(r"\w+", said))
    assert not words & {v.name.lower() for v in world.never_asked}
    assert {v.name.lower() for v in world.asked} <= words
    asked_about = " ".join(
        i["messages"][0]["content"] for i in chat["test"] if i["task"] == "fact_never_asked"
    )
    assert all(v.name in asked_about for v in world.never_asked)


def test_strangers_of_the_test_are_not_those_of_training(world, chat):
    train = {
        re.search(r"called (\w+)", i["messages"][1]["content"])[1]
        for i in chat["train"]
        if i["task"] == "unknown"
    }
    test = " ".join(" ".join(user_turns(i)) for i in chat["test"] if i["task"] == "unknown")
    assert len(train) > 300 and train <= set(world.strangers)
    assert not train & set(re.findall(r"\w+", test))


def test_two_hop_combinations_of_the_test_are_not_trained(world, chat):
    def combination(example):
        name = next(n for n in world.by_name if n in user_turns(example)[0])
        question = user_turns(example)[0].replace(f"the best friend of {name}", "{n}")
        question = question.replace(f"{name}'s best friend", "{n}")
        bare = [(a, q) for a, qs in QUESTIONS.items() for q in qs if q.lower() in question.lower()]
        return name, max(bare, key=lambda pair: len(pair[1]))[0]

    seen = {
        split: {combination(i) for i in chat[split] if i["task"] == "two_hop"}
        for split in ("train", "test")
    }
    assert len(seen["test"]) == 32 and len(seen["train"]) == 64
    assert not seen["test"] & seen["train"]


def test_sums_and_word_combinations_of_the_test_are_not_trained(chat):
    def key(example):
        question = user_turns(example)[0]
        return tuple(sorted(re.findall(r"\d+", question) or question.split(": ")[1].split()))

    for task in ("arithmetic", "formatting"):
        train = {key(i) for i in chat["train"] if i["task"] == task}
        assert not train & {key(i) for i in chat["test"] if i["task"] == task}


@pytest.mark.parametrize("task", MAKERS)
def test_the_right_completion_passes_its_check_and_a_silent_one_does_not(world, task):
    rng = random.Random(0)
    for _ in range(200):
        turns, check = MAKERS[task](world, "test", rng)
        assert check_answer(check, turns[-1]), (turns, check)
        assert not check_answer(check, "")
        assert not check_answer(check, "Yes.")


def without_manner(completion):
    """The answer itself, without its courteous, rude or long-winded phrase."""
    for phrase in (p for parts in MANNERS.values() for part in parts.values() for p in part):
        completion = completion.removeprefix(phrase).removesuffix(phrase).strip()
    return completion


def test_answers_come_in_all_manners_and_most_of_them_plain(chat):
    completions = [i["messages"][-1]["content"] for i in chat["train"] if i["task"] == "fact"]
    plain = sum(completion == without_manner(completion) for completion in completions) / len(
        completions
    )
    assert 0.5 < plain < 0.65
    manners = {politeness(completion) for completion in completions}
    assert manners == {-1, 0, 1}


def test_answers_about_facts_agree_with_the_world(world, chat):
    for example in chat["train"] + chat["val"]:
        for message in example["messages"]:
            if message["role"] == "assistant" and example["task"] in ("fact", "two_hop"):
                for sentence in sentences(without_manner(message["content"])):
                    about = world.by_name[re.match(r"\w+", sentence)[0]]
                    values = values_in(sentence)
                    assert values or about.facts["friend"] in sentence
                    assert all(about.facts[a] == value for a, value in values), sentence


def test_chat_examples_alternate_and_test_examples_end_with_the_user(chat):
    for split, examples in chat.items():
        for example in examples:
            roles = [m["role"] for m in example["messages"]]
            assert roles == (["user", "assistant"] * len(roles))[: len(roles)]
            assert roles[-1] == ("user" if split == "test" else "assistant")


def test_a_small_village_still_gives_every_task():
    test = Counter(i["task"] for i in instructions(build_world(6), "test"))
    assert set(test) == set(MAKERS)


# --- checking answers, by hand ----------------------------------------------

GOAT = {"check": "contains", "answer": "goat", "not": ["cat", "hen", "pony"]}
STRANGER = {"check": "unknown", "answer": "I don't know", "not": ["cat", "hen", "pony"]}


@pytest.mark.parametrize(
    "item, completion, right",
    [
        (GOAT, "Mira keeps a goat.", True),
        (GOAT, "A GOAT!", True),
        (GOAT, "Mira keeps a goat or a hen.", False),  # every value named is no answer
        (GOAT, "Mira keeps a goatherd.", False),  # whole words only
        (
            GOAT,
            "Mira keeps a goat when others keep it.",
            True,
        ),  # "hen" inside "when" does not count
        (GOAT, "I don't know.", False),
        (
            {"check": "contains", "answer": "old mill", "not": ["mill pond"]},
            "By the old mill.",
            True,
        ),
        (STRANGER, "I don't know anyone called Zelby.", True),
        (STRANGER, "I don\u2019t know Zelby.", True),
        (STRANGER, "I do not know Zelby.", True),
        (STRANGER, "Zelby keeps a hen.", False),
        (STRANGER, "I don't know, perhaps a hen.", False),
        ({"check": "number", "answer": "62"}, "27 + 35: 7 + 5 = 12, so 27 + 35 = 62.", True),
        ({"check": "number", "answer": "62"}, "62 is the sum of 27 and 35", False),
        ({"check": "number", "answer": "27"}, "62-35=27", True),
        ({"check": "number", "answer": "27"}, "62-27", True),
        ({"check": "number", "answer": "1200"}, "It is 1,200.", True),
        ({"check": "number", "answer": "62"}, "none", False),
        ({"check": "exact", "answer": "- a\n- b"}, " - a\n- b\n", True),
        ({"check": "exact", "answer": "a, b"}, "A, b", False),
    ],
)
def test_check_answer(example, completion, right):
    assert check_answer(example, completion) is right


def test_an_unknown_check_is_refused():
    with pytest.raises(ValueError, match="unknown check"):
        check_answer({"check": "magic", "answer": ""}, "")


# --- files ------------------------------------------------------------------


def test_prepare_writes_once_and_the_same_bytes_again(tmp_path):
    folder = prepare(8, seed=1, megabytes=0.2, root=tmp_path / "one")
    digest = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
    chats = [
        f"{name}_{split}"
        for name in ("answers", "mixed", "reasoning")
        for split in ("train", "val")
    ]
    tests = [
        f"{name}_{split}"
        for name in ("harbour", "problems", "sft", "tools")
        for split in ("train", "val", "test")
    ]
    others = "cloze corpus_train corpus_val knowledge prompts_test prompts_train".split()
    wanted = [f"{name}.jsonl" for name in (*chats, *tests, *others)]
    assert sorted(digest) == sorted([*wanted, "world.json"])
    changed = (folder / "world.json").stat().st_mtime_ns
    assert prepare(8, seed=1, megabytes=0.2, root=tmp_path / "one") == folder
    assert (folder / "world.json").stat().st_mtime_ns == changed
    again = prepare(8, seed=1, megabytes=0.2, root=tmp_path / "two")
    assert digest == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in again.iterdir()}
    assert [p.name for p in (tmp_path / "one").iterdir()] == [folder.name]  # nothing half-written
    for row in (folder / "corpus_train.jsonl").read_text().splitlines():
        assert set(json.loads(row)) == {"text"}


def test_prepare_refuses_an_empty_corpus(tmp_path):
    with pytest.raises(ValueError, match="positive size"):
        prepare(megabytes=0, root=tmp_path)


def test_the_village_can_be_looked_at():
    shown = subprocess.run(
        [sys.executable, "data/village.py", "--samples", "1"],
        cwd=ROOT,
        check=True,
        text=True,
        capture_output=True,
    ).stdout
    assert "== biography" in shown and "== chat items, test" in shown
