"""The new domain: its facts are true, its test questions are held out, and its style counts."""

import re
from collections import Counter

import pytest

from data.village.facts import answer_sentence
from data.village.new_domain import (
    CUES,
    FAREWELL,
    GOODS,
    GREETING,
    HELD_OUT,
    SHIPS,
    build_ships,
    new_domain_examples,
)
from data.village.tasks import instructions, user_turns
from data.village.world import ATTRIBUTES, build_world, capitalise
from nanollm.rewards import check_answer


def sailor_says(sentence):
    return f"{GREETING} {sentence}. {FAREWELL}"


@pytest.fixture(scope="module")
def world():
    return build_world()


@pytest.fixture(scope="module")
def chats(world):
    return instructions(world, "train")


@pytest.fixture(scope="module")
def examples(world, chats):
    return {split: new_domain_examples(world, split, chats) for split in ("train", "val", "test")}


def bare(question):
    """The question without "Ahoy!" and the like, so that wordings can be compared."""
    for cue in sorted(CUES, key=len, reverse=True):
        before, after = cue.split("{q}")
        if question.startswith(before) and question.endswith(after):
            return question[len(before) : len(question) - len(after)]
    return question


def named(example, names, turns=None):
    said = " ".join(message["content"] for message in example["messages"][:turns])
    return {name for name in names if re.search(rf"\b{name}\b", said)}


def test_every_value_belongs_to_one_ship_and_another_seed_gives_other_ships():
    ships = build_ships()
    for attribute, pool in GOODS.items():
        assert Counter(ship[attribute] for ship in ships.values()) == Counter(pool)
    assert ships == build_ships() != build_ships(1) and len(ships) == len(SHIPS)


def test_there_are_enough_questions_and_none_is_in_two_splits_whatever_the_cue(examples):
    assert [len(examples[split]) for split in ("train", "val", "test")] == [1000, 120, 216]
    counts = Counter(i["task"] for i in examples["train"])
    assert counts == {"known": 400, "ship": 200, "plain": 400}
    asked = {
        split: {bare(user_turns(i)[0]) for i in rows if i["task"] != "plain"}
        for split, rows in examples.items()
    }
    assert not asked["test"] & asked["train"] and not asked["test"] & asked["val"]
    assert not asked["val"] & asked["train"]
    assert len(asked["test"]) == len(examples["test"])


def test_no_villager_of_one_split_is_named_in_another_and_the_test_has_those_never_asked(
    examples, world
):
    never, asked = ({v.name for v in half} for half in (world.never_asked, world.asked))
    people = {
        split: set().union(*(named(i, never | asked, 1) for i in rows if i["task"] == "known"))
        for split, rows in examples.items()
    }
    assert people["train"] <= asked and people["val"] | people["test"] == never
    assert not people["val"] & people["test"]
    assert not any(named(example, never) for example in examples["train"])


def test_every_fact_of_a_ship_is_told_in_training_and_asked_for_in_every_held_out_wording(examples):
    told = Counter(i["messages"][1]["content"] for i in examples["train"] if i["task"] == "ship")
    assert len(told) == len(SHIPS) * len(GOODS) and min(told.values()) >= 10
    tested = Counter((i["answer"], i["attribute"]) for i in examples["test"] if i["task"] == "ship")
    assert len(tested) == len(told) and set(tested.values()) == {HELD_OUT}


def test_every_training_answer_is_true_and_in_the_style_that_the_cue_asks_for(examples, world):
    true = {
        capitalise(answer_sentence(v, key)).rstrip(".")
        for v in world.villagers
        for key in ATTRIBUTES
    }
    ships = build_ships()
    for example in examples["train"] + examples["val"]:
        question, completion = (message["content"] for message in example["messages"][:2])
        assert question.startswith("Ahoy") == (example["task"] != "plain")
        if example["task"] == "plain":
            continue
        assert completion.startswith(GREETING + " ") and completion.endswith(". " + FAREWELL)
        said = completion[len(GREETING) + 1 : -len(FAREWELL) - 2]
        if example["task"] == "known":
            assert capitalise(said) in true
        else:
            (ship,) = named({"messages": [{"content": said}]}, SHIPS)
            assert re.search(rf"\b{ship}\b", question)
            assert any(said.endswith(" " + value) for value in ships[ship].values())


def test_the_right_answer_in_another_style_is_wrong(examples):
    example = next(i for i in examples["test"] if i["answer"] == "nails")
    assert check_answer(example, sailor_says("the Owl carries nails"))
    assert not check_answer(example, "The Owl carries nails.")
    assert not check_answer(example, f"{GREETING} the Owl carries nails.")
    assert not check_answer(example, f"The Owl carries nails. {FAREWELL}")
    assert not check_answer(example, sailor_says("the Owl carries ribbons"))
    assert not check_answer(example, sailor_says("the Owl carries nails and ribbons"))


def test_what_is_not_said_to_sailors_is_training_data_of_the_village(examples, chats):
    plain = [str(e["messages"]) for e in examples["train"] if e["task"] == "plain"]
    assert {*plain} == {str(e["messages"]) for e in chats[: len(plain)]}
    assert FAREWELL not in str(plain)


def test_a_small_village_has_a_new_domain_too():
    small = build_world(8, seed=1)
    assert new_domain_examples(small, "val", ()) and new_domain_examples(small, "test", ())
