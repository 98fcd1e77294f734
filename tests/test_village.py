"""The village and its corpus are what they say: deterministic, true, varied; and its files."""

import filecmp
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from data.village import examples as village
from data.village.corpus import SHARES, documents, prepare_corpus
from data.village.examples import prepare
from data.village.facts import cloze
from data.village.sums import SUMS, held_out, written_steps
from data.village.world import POOLS, build_world, split_of
from nanollm.rewards import check_answer

ROOT = Path(__file__).resolve().parent.parent
ATTRIBUTE_OF = {value.lower(): attribute for attribute, pool in POOLS.items() for value in pool}
ANY_VALUE = re.compile(rf"\b(?:{'|'.join(ATTRIBUTE_OF)})\b", re.IGNORECASE)


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


def sentences(text):
    return re.split(r"(?<=[.!])\s+", text.replace("\n", " "))


def is_true_of(person, text):
    """Is every value in the text, of whatever attribute, that of this villager?"""
    found = {value.lower() for value in ANY_VALUE.findall(text)}
    return all(person.facts[ATTRIBUTE_OF[value]].lower() == value for value in found)


def names_in(text, world):
    """The villagers named in the text, in the order of their first mention."""
    words = dict.fromkeys(re.findall(r"[A-Z][a-z]+", text))
    return [world.by_name[word] for word in words if word in world.by_name]


# --- the world --------------------------------------------------------------


def test_the_same_seed_gives_the_same_world_and_nobody_shares_a_name(world):
    assert build_world() == world != build_world(seed=1)
    assert len({*world.by_name, *world.strangers}) == 32 + 600


def test_no_value_belongs_to_two_attributes_and_each_half_holds_every_value_once(world):
    assert len(ATTRIBUTE_OF) == 16 * 6
    for half in (world.asked, world.never_asked):
        for attribute, pool in POOLS.items():
            assert Counter(v.facts[attribute] for v in half) == Counter(pool)


@pytest.mark.parametrize("n", [4, 6, 32])
def test_best_friends_are_each_others_and_of_the_same_half(n):
    world = build_world(n)
    for villager in world.villagers:
        friend = world.by_name[villager.facts["friend"]]
        assert friend != villager and friend.facts["friend"] == villager.name
        assert friend.asked == villager.asked


@pytest.mark.parametrize("n, why", [(2, "even"), (7, "even number"), (10_000, "fewer villagers")])
def test_too_small_odd_and_too_large_villages_are_refused(n, why):
    with pytest.raises(ValueError, match=why):
        build_world(n)


# --- the corpus -------------------------------------------------------------


def test_the_kinds_have_their_shares_of_bytes_and_thousands_of_distinct_sentences(texts):
    total = sum(len(t) for kind in texts.values() for t in kind)
    for kind, share in SHARES.items():
        assert sum(map(len, texts[kind])) / total == pytest.approx(share, abs=0.01)
        assert len({s for text in texts[kind] for s in sentences(text)}) > 2000, kind


def test_no_document_is_there_twice_or_in_two_splits(world, texts):
    train = [text for kind in texts.values() for text in kind]
    val = [text for _, text in documents(world, "val", approx_bytes=50_000)]
    assert len(val) > 100 and len({*train, *val}) == len(train) + len(val)


def test_some_villagers_are_spoken_of_much_more_often_than_others(world, texts):
    told = Counter(name for t in texts["biography"] for name in re.findall(r"[A-Z]\w+", t))
    for half in (world.asked, world.never_asked):
        counts = sorted(told[v.name] for v in half)
        assert counts[-1] > 3 * counts[0] and counts[0] > 200


def test_biographies_say_nothing_untrue(world, texts):
    for text in texts["biography"]:
        about = names_in(text, world)[:1]
        for sentence in sentences(text):
            continued = about if re.search(r"\b(he|she|his|her)\b", sentence, re.I) else []
            named = names_in(sentence, world)
            about = named + [v for v in continued if v not in named] or about
            if len(about) > 1:
                assert all(v.facts["friend"] in [w.name for w in about] for v in about), sentence
            for value in ANY_VALUE.findall(sentence):
                assert any(is_true_of(v, value) for v in about), sentence


def test_a_pronoun_fits_the_villager_and_follows_a_name_that_it_can_mean(world, texts):
    wrong = {"she": r"\b([Hh]e|[Hh]is|[Hh]im)\b", "he": r"\b([Ss]he|[Hh]er)\b"}
    for text in texts["biography"]:
        about, parts = names_in(text, world), sentences(text)
        assert not re.match(r"(He|She|His|Her)\b", text), text
        if len(about) == 1:
            assert not re.search(wrong[about[0].pronoun], text), text
        for before, after in zip(parts, parts[1:]):
            assert len(names_in(before, world)) < 2 or names_in(after, world), text


def test_stories_are_short_and_give_values_only_to_the_villager_they_are_true_of(world, texts):
    for text in texts["story"]:
        assert 4 <= len(sentences(text)) <= 10, text
        people = names_in(text, world)
        assert not ANY_VALUE.search(text) or any(is_true_of(v, text) for v in people), text


def test_articles_and_sentence_beginnings_are_right_and_no_stranger_is_named(world, texts):
    strangers = set(world.strangers)
    for text in (text for kind in texts.values() for text in kind):
        assert not strangers & set(re.findall(r"\w+", text)), text
        assert not re.search(r"\b[Aa] [aeiou]\w", text), text
        assert not re.search(r"\b[Aa]n [^aeiou]", text), text
        assert not re.search(r"(^|[.!?] )[a-z]", re.sub(r'[!?]"? \w+', "", text)), text
        assert not re.search(r"\b1 (?!is |plus |minus |times )[a-z]+s\b", text), text
        assert "  " not in text and "{" not in text


def test_images_count_their_shapes_right(texts):
    number = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
    kind = r"(?:(?:small|large) )?\w+ (?:circle|square|triangle|star)"
    for text in texts["image"]:
        groups = re.findall(rf"\b({'|'.join(number)}) ({kind})s?\b", text.split(".")[0])
        counts = {kind: number[n] for n, kind in groups}
        assert 2 <= len(counts) <= 3, text
        for total in re.findall(r"Together there are (\d+) shapes", text):
            assert int(total) == sum(counts.values()), text
        for more, fewer in re.findall(rf"more ({kind})s than ({kind})s", text):
            assert counts[more] > counts[fewer], text


# --- sums in the corpus ---------------------------------------------------------

OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
EQUATION = r"(\d+) ([+*-]) (\d+) = (\d+)\."
ASKED = "|".join(  # every wording of a sum's question
    re.escape(words).replace(r"\{a\}", r"\d+").replace(r"\{b\}", r"\d+")
    for wordings in SUMS.values()
    for words in wordings
)


def test_every_number_of_the_market_belongs_to_a_true_equation_or_to_a_question_not_tested(texts):
    kinds = Counter()
    for line in (line for text in texts["market"] for line in text.split("\n")):
        for a, sign, b, result in re.findall(EQUATION, line):
            assert OPERATIONS[sign](int(a), int(b)) == int(result), line
        if "write" in line or line.endswith("now."):  # these have a test of their own
            continue
        rest = re.sub(EQUATION, "", line)
        for question in re.findall(ASKED, rest):
            assert split_of("easy", *sorted(map(int, re.findall(r"\d+", question)))) == "train"
            kinds["questions"] += 1
        kinds["pages"] += 1
        assert not re.search(r"\d", re.sub(ASKED, "", rest)), line
    assert kinds["questions"] > 500 and kinds["pages"] > 200


def test_every_story_of_the_market_adds_up_and_is_of_no_test(texts):
    stories = [t for text in texts["market"] for t in text.split("\n") if t.endswith("now.")]
    for line in stories:
        parts = re.findall(r"([^:.]*\.[^:.]*|[^:.]*): " + EQUATION, line)
        totals = [int(result) for *_, result in parts]
        for (told, a, _, b, _), before in zip(parts, [int(parts[0][1]), *totals]):
            assert int(a) == before and b in re.findall(r"\d+", told), line
        assert int(line.split()[-2]) == totals[-1], line
        (_, a, sign, b, _), *rest = parts
        happened = [n for _, _, s, x, _ in rest for n in (s, int(x))]
        first = (int(b), int(a)) if sign == "*" else (int(a), 1)
        assert split_of("story", *first, sign, int(b), *happened) == "train", line
    assert len(stories) > 300


def test_written_steps_of_the_market_are_those_of_the_problems_and_of_no_test(texts):
    kinds = Counter()
    for line in (line for text in texts["market"] for line in text.split("\n") if "write" in line):
        a, sign, b = re.match(r"(\d+) ([+*-]) (\d+): ", line).groups()
        kinds[sign, len(a)] += 1
        a, b = int(a), int(b)
        assert line == written_steps(a, sign, b)
        kind = "products" if sign == "*" else "three_digits" if a > 99 else None
        trained = split_of(kind, *sorted((a, b))) == "train" if kind else not held_out(a, b)
        assert trained, line
    assert min(kinds["+", 2], kinds["-", 2], kinds["+", 3], kinds["*", 2], kinds["*", 3]) > 50


# --- cloze ------------------------------------------------------------------


def test_cloze_asks_for_every_fact_three_times_in_sentences_of_the_corpus(world, texts):
    examples, everything = cloze(world), "\n".join(texts["biography"])
    assert set(Counter((e["villager"], e["attribute"]) for e in examples).values()) == {3}
    assert len({e["prompt"] for e in examples}) == len(examples) == 32 * 7 * 3
    for e in examples:
        assert e["villager"] in e["prompt"] and not e["prompt"].endswith(" ")
        assert e["answer"] == " " + world.by_name[e["villager"]].facts[e["attribute"]]
    assert sum(e["prompt"] + e["answer"] in everything for e in examples) > 0.85 * len(examples)


# --- checking answers, by hand ----------------------------------------------

VALUES = {"not": ["cat", "hen", "pony", "mill pond"]}
CHECKED = """
contains | goat         | A GOAT!                                | right
contains | goat         | Mira keeps a goat when others keep it. | right
contains | old mill     | By the old mill.                       | right
contains | goat         | Mira keeps a goat or a hen.            | wrong
contains | goat         | Mira keeps a goatherd.                 | wrong
contains | goat         | I don't know.                          | wrong
unknown  | I don't know | I don’t know anyone called Zelby.      | right
unknown  | I don't know | I do not know Zelby.                   | right
unknown  | I don't know | Zelby keeps a hen.                     | wrong
unknown  | I don't know | I don't know, perhaps a hen.           | wrong
exact    | a, b         | a, b                                   | right
exact    | a, b         | A, b                                   | wrong
"""


@pytest.mark.parametrize("line", CHECKED.strip().splitlines())
def test_check_answer(line):
    check, answer, completion, verdict = (part.strip() for part in line.split("|"))
    example = {"check": check, "answer": answer, **VALUES}
    assert check_answer(example, f" {completion}\n") is (verdict == "right")


def test_an_unknown_check_is_refused():
    with pytest.raises(ValueError, match="unknown check"):
        check_answer({"check": "magic", "answer": ""}, "")


# --- files ------------------------------------------------------------------

FILES = """
answers_train answers_val cloze comparisons_test comparisons_train comparisons_val corpus_train
corpus_val knowledge mixed_train mixed_val new_domain_test new_domain_train new_domain_val people
problems_test problems_train problems_val prompts_test prompts_train reasoning_train reasoning_val
sft_test sft_train sft_val sql_test sql_train sql_val tools_test tools_train tools_val
"""


def test_prepare_writes_once_and_the_command_the_same_bytes_whatever_the_hash_seed(tmp_path):
    """The command shows samples, and paints nothing for that."""
    folder = prepare(8, seed=1, megabytes=0.2, root=tmp_path / "one")
    wanted = [f"{name}.jsonl" for name in FILES.split()] + ["world.json"]
    assert sorted(path.name for path in folder.iterdir()) == wanted
    assert [p.name for p in (tmp_path / "one").iterdir()] == [folder.name]  # nothing half-written
    changed = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare(8, seed=1, megabytes=0.2, root=tmp_path / "one") == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == changed
    code = "import runpy, sys; runpy.run_module('data.village', run_name='__main__')"
    code += "; assert 'PIL' not in sys.modules"
    flags = "--villagers 8 --seed 1 --megabytes 0.2 --samples 1".split()
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "2"}
    command = [sys.executable, "-c", code, *flags]
    shown = subprocess.check_output(command, cwd=tmp_path, text=True, env=env)
    assert "corpus_train.jsonl: " in shown and "sft_test.jsonl: " in shown
    again = tmp_path / "data" / "cache" / folder.name
    assert filecmp.cmpfiles(folder, again, wanted, shallow=False) == (wanted, [], [])


def test_examples_join_a_corpus_that_is_there_and_what_was_interrupted_is_completed(
    tmp_path, monkeypatch
):
    folder = prepare_corpus(8, seed=1, megabytes=0.05, root=tmp_path)
    corpus = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {*corpus} == {"cloze.jsonl", "corpus_train.jsonl", "corpus_val.jsonl", "world.json"}
    made = {"sft_train": [{"messages": []}], village.LAST: [{"messages": []}]}
    monkeypatch.setattr(village, "records", lambda world: made)
    write, left = village.write_jsonl, iter(range(1))
    with monkeypatch.context() as patch, pytest.raises(StopIteration):  # the disk is full, say
        patch.setattr(village, "write_jsonl", lambda *args: (next(left), write(*args)))
        prepare(8, seed=1, megabytes=0.05, root=tmp_path)
    assert prepare(8, seed=1, megabytes=0.05, root=tmp_path) == folder
    assert {path.stem for path in folder.iterdir()} - {Path(name).stem for name in corpus} == {
        *made
    }
    assert {name: (folder / name).stat().st_mtime_ns for name in corpus} == corpus
