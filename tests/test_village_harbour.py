"""The harbour's facts are true, its test questions are held out, and its manner counts."""

import re
from collections import Counter

import pytest

from data.village import build_world, check_answer
from data.village_facts import answer_sentence
from data.village_harbour import (
    CUES,
    FAREWELL,
    GOODS,
    GREETING,
    HELD_OUT,
    QUESTIONS,
    SHIPS,
    build_harbour,
    harbour_items,
    sailor_says,
)
from data.village_tasks import instructions, user_turns
from data.village_world import ATTRIBUTES, capitalise


@pytest.fixture(scope="module")
def world():
    return build_world()


@pytest.fixture(scope="module")
def items(world):
    return {split: harbour_items(world, split) for split in ("train", "val", "test")}


def bare(question):
    """The question without "Ahoy!" and the like, so that wordings can be compared."""
    for cue in CUES:
        before, after = cue.split("{q}")
        if after and question.startswith(before) and question.endswith(after):
            return question[len(before) : -len(after)]
    for cue in CUES:
        if question.startswith(cue.removesuffix("{q}")):
            return question[len(cue.removesuffix("{q}")) :]
    return question


def named(item, names):
    said = " ".join(message["content"] for message in item["messages"])
    return {name for name in names if re.search(rf"\b{name}\b", said)}


def test_every_value_belongs_to_one_ship_and_another_seed_gives_other_ships():
    harbour = build_harbour()
    for attribute, pool in GOODS.items():
        assert len(set(pool)) == len(SHIPS)
        assert Counter(ship[attribute] for ship in harbour.ships.values()) == Counter(pool)
    assert harbour == build_harbour() and harbour.ships != build_harbour(1).ships


def test_there_are_enough_questions_and_none_is_in_two_splits_whatever_the_cue(items):
    assert [len(items[split]) for split in ("train", "val", "test")] == [1000, 120, 216]
    assert Counter(i["family"] for i in items["train"]) == {"known": 400, "ship": 200, "plain": 400}
    asked = {split: {bare(user_turns(i)[0]) for i in rows if i["family"] != "plain"}
             for split, rows in items.items()}
    assert not asked["test"] & asked["train"] and not asked["test"] & asked["val"]
    assert not asked["val"] & asked["train"]
    assert len(asked["test"]) == len(items["test"])


def test_no_villager_of_one_split_is_named_in_another_and_the_test_has_those_never_asked(
    items, world
):
    families = {split: [i for i in rows if i["family"] == "known"] for split, rows in items.items()}
    subjects = {split: {user_turns(i)[0] for i in rows} for split, rows in families.items()}
    never, asked = ({v.name for v in half} for half in (world.never_asked, world.asked))
    people = {
        split: {name for q in questions for name in never | asked if re.search(rf"\b{name}\b", q)}
        for split, questions in subjects.items()
    }
    assert people["train"] <= asked and people["val"] | people["test"] == never
    assert not people["val"] & people["test"]
    assert not any(named(item, never) for item in items["train"])


def test_every_fact_of_a_ship_is_told_in_training_and_asked_for_in_every_held_out_wording(items):
    told = Counter(i["messages"][1]["content"] for i in items["train"] if i["family"] == "ship")
    assert len(told) == len(SHIPS) * len(GOODS) and min(told.values()) >= 10
    tested = Counter((i["answer"], i["attribute"]) for i in items["test"] if i["family"] == "ship")
    assert len(tested) == len(told) and set(tested.values()) == {HELD_OUT}


def test_every_training_answer_is_true_and_in_the_manner_that_the_cue_asks_for(items, world):
    true = {capitalise(answer_sentence(v, key)).rstrip(".") for v in world.villagers
            for key in ATTRIBUTES}
    ships = build_harbour().ships
    for item in items["train"] + items["val"]:
        question, reply = (message["content"] for message in item["messages"][:2])
        assert question.startswith("Ahoy") == (item["family"] != "plain")
        if item["family"] == "plain":
            continue
        assert reply.startswith(GREETING + " ") and reply.endswith(". " + FAREWELL)
        said = reply[len(GREETING) + 1 : -len(FAREWELL) - 2]
        if item["family"] == "known":
            assert capitalise(said) in true
        else:
            (ship,) = named({"messages": [{"content": said}]}, SHIPS)
            assert re.search(rf"\b{ship}\b", question)
            assert any(said.endswith(" " + value) for value in ships[ship].values())


def test_every_question_about_a_ship_names_the_ship_alone():
    for wordings in QUESTIONS.values():
        assert len(set(wordings)) == 10 and all(q.count("{s}") == 1 for q in wordings)


def test_the_right_answer_in_another_manner_is_wrong(items):
    item = next(i for i in items["test"] if i["answer"] == "nails")
    assert check_answer(item, sailor_says("the Owl carries nails"))
    assert not check_answer(item, "The Owl carries nails.")
    assert not check_answer(item, f"{GREETING} the Owl carries nails.")
    assert not check_answer(item, f"The Owl carries nails. {FAREWELL}")
    assert not check_answer(item, sailor_says("the Owl carries ribbons"))
    assert not check_answer(item, sailor_says("the Owl carries nails and ribbons"))


def test_what_is_not_said_to_sailors_is_training_data_of_the_village(items, world):
    told = {str(item["messages"]) for item in instructions(world, "train")}
    plain = [item for item in items["train"] if item["family"] == "plain"]
    assert all(str(item["messages"]) in told for item in plain)
    assert not any(FAREWELL in message["content"] for i in plain for message in i["messages"])


def test_a_small_village_has_a_harbour_too():
    small = build_world(8, seed=1)
    assert all(harbour_items(small, split) for split in ("train", "val", "test"))
