"""The harbour's ships are true, its test questions are held out, and its manner counts."""

import re
from collections import Counter

import pytest

from data.village import check_answer
from data.village_harbour import (
    ABOUT_SHIP,
    FAREWELL,
    FOR_SHIP,
    GOODS,
    GREETING,
    SHIPS,
    WRAPPERS,
    build_harbour,
    harbour_items,
    sailor_says,
)
from data.village_tasks import user_turns


@pytest.fixture(scope="module")
def items():
    return {split: harbour_items(split) for split in ("train", "val", "test")}


def bare(question):
    """The question without "Good morning!" and the like, so that wordings can be compared."""
    for wrapper in WRAPPERS:
        before, after = wrapper.split("{q}")
        if wrapper != "{q}" and question.startswith(before) and question.endswith(after):
            return question[len(before) : len(question) - len(after)]
    return question


def test_every_value_belongs_to_one_ship_and_another_seed_gives_other_ships():
    harbour = build_harbour()
    for attribute, pool in GOODS.items():
        assert len(set(pool)) == len(SHIPS)
        assert Counter(ship[attribute] for ship in harbour.ships.values()) == Counter(pool)
    assert harbour == build_harbour() and harbour.ships != build_harbour(1).ships


def test_there_are_enough_questions_and_none_is_in_two_splits(items):
    asked = {split: {user_turns(item) for item in rows} for split, rows in items.items()}
    assert len(items["train"]) > 1500 and len(items["val"]) == 200 and len(items["test"]) >= 200
    for split, rows in items.items():
        assert len(asked[split]) == len(rows), split
    assert not asked["test"] & asked["train"] and not asked["test"] & asked["val"]
    assert not asked["val"] & asked["train"]


def test_no_wording_of_a_fact_in_the_test_is_asked_in_training_under_a_greeting_either(items):
    wordings = {split: {bare(user_turns(i)[0]) for i in rows} for split, rows in items.items()}
    assert not wordings["test"] & (wordings["train"] | wordings["val"])
    assert not wordings["val"] & wordings["train"]


def test_every_fact_is_told_in_training_and_asked_for_in_the_test_from_both_ends(items):
    for family in ("ship", "which_ship"):
        told = [i["messages"][1]["content"] for i in items["train"] if i["family"] == family]
        asked = Counter(i["attribute"] for i in items["test"] if i["family"] == family)
        assert len(asked) == len(GOODS) and len(set(asked.values())) == 1
        for ship, facts in build_harbour().ships.items():
            for value in facts.values():
                assert sum(bool(re.search(rf"\b{value}\b.*\b{ship}\b|\b{ship}\b.*\b{value}\b", t))
                           for t in told) >= 5, (family, ship, value)


def test_every_training_answer_is_true_and_in_the_sailors_manner(items):
    ships = build_harbour().ships
    for item in items["train"] + items["val"]:
        reply = item["messages"][1]["content"]
        assert reply.startswith(GREETING) and reply.endswith(FAREWELL)
        (ship,) = [name for name in SHIPS if re.search(rf"\b{name}\b", reply)]
        values = {v for pool in GOODS.values() for v in pool if re.search(rf"\b{v}\b", reply)}
        assert len(values) == 1 and values <= set(ships[ship].values()), reply


def test_questions_have_one_ship_or_one_value_and_right_articles(items):
    for attribute in GOODS:
        assert all("{s}" in q and "{v}" not in q for q in ABOUT_SHIP[attribute])
        assert all("{v}" in q and "{s}" not in q for q in FOR_SHIP[attribute])
    for item in items["train"]:
        for message in item["messages"]:
            assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]|[{}]", message["content"])


def test_the_right_answer_in_another_manner_is_wrong(items):
    item = next(i for i in items["test"] if i["answer"] == "eggs")
    assert check_answer(item, sailor_says("eggs are what the Winter carries"))
    assert not check_answer(item, "Eggs are what the Winter carries.")
    assert not check_answer(item, f"{GREETING} eggs are what the Winter carries.")
    assert not check_answer(item, f"Eggs are what the Winter carries. {FAREWELL}")
    assert not check_answer(item, sailor_says("nails are what the Winter carries"))
    assert not check_answer(item, sailor_says("eggs and nails are what the Winter carries"))
