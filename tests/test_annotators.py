"""Several annotators: how far they agree, and the ranking that is made of what they say."""

import hashlib
import itertools
import json
import math
import random

import pytest

from data.village.preferences import preference_prompts, rank_completions
from data.village.world import build_world
from nanollm.metrics import cohens_kappa
from nanollm.preferences import agreement

WORLD = build_world(32, 0)


# --- agreement -----------------------------------------------------------------------------------


def labels(table):
    """Pairs of labels, of which the table {(first, second): count} has so many."""
    return [pair for pair, count in table.items() for _ in range(count)]


@pytest.mark.parametrize(
    "table, kappa",
    [
        ({"yy": 20, "yn": 5, "ny": 10, "nn": 15}, 0.4),  # p_o 0.7, p_e 0.5 * 0.6 + 0.5 * 0.4
        ({"aa": 3, "bb": 3}, 1.0),
        ({"ab": 3, "ba": 3}, -1.0),
        ({"aa": 1, "ab": 1, "ba": 1, "bb": 1}, 0.0),
        ({"aa": 2, "ac": 1, "bb": 2, "cc": 1}, 0.75),  # p_o 5/6, p_e (3*2 + 2*2 + 1*2) / 36
    ],
)
def test_cohens_kappa_by_hand(table, kappa):
    assert cohens_kappa(labels(table)) == pytest.approx(kappa)


def test_cohens_kappa_is_what_every_pair_of_labels_gives():
    """p_e counted over all n^2 ways to put a label of the one beside a label of the other."""
    rng = random.Random(0)
    found = [(rng.choice("abc"), rng.choice("abcd")) for _ in range(60)]
    by_chance = [a == b for (a, _), (_, b) in itertools.product(found, found)]
    observed, expected = sum(a == b for a, b in found) / 60, sum(by_chance) / 60**2
    assert cohens_kappa(found) == pytest.approx((observed - expected) / (1 - expected))
    assert math.isnan(cohens_kappa(["aa"] * 3))  # who knows but one label


def test_agreement_by_hand():
    """Of y, z, x (the ranking) the first annotator says y > z > x, the second y > x > z."""
    record = {"completions": ["y", "z", "x"], "orders": [[0, 1, 2], [0, 2, 1]], "gold": [1, 0, 0]}
    rows = {name: share for name, share, _ in agreement([record, {"completions": ["a", "b"]}])}
    assert rows == {
        "two annotators": pytest.approx(2 / 3),
        "annotators, ranking": pytest.approx(5 / 6),
        "annotators, gold": 1.0,
        "ranking, gold": 1.0,
    }


# --- several annotators --------------------------------------------------------------------------


def rankings(annotators, n=300):
    prompts = preference_prompts(WORLD, "test", n)
    return rank_completions(prompts, [[]] * n, 4, 0.25, "seed", annotators)


def test_the_mean_of_several_annotators_is_nearer_to_the_gold_than_one():
    one, three = rankings(1), rankings(3)
    assert [{*r["ranking"]} for r in one] == [{*r["ranking"]} for r in three]  # only the order
    assert all("orders" not in r for r in one) and one == rankings(1)
    rows = {name: share for name, share, _ in agreement([as_read(r) for r in three])}
    assert rows["annotators, gold"] == pytest.approx(0.75, abs=0.03)
    assert rows["ranking, gold"] > rows["annotators, gold"] + 0.05
    assert 0.6 < rows["two annotators"] < 0.75
    for record in three:
        places = [sum(order.index(i) for order in record["orders"]) for i in range(4)]
        assert places == sorted(places) and all(sorted(o) == [0, 1, 2, 3] for o in record["orders"])


def as_read(record):
    return record | {"completions": record["ranking"]}


def test_one_annotator_ranks_as_before_there_were_several():
    """Their order, ratings and random draws: a digest of what was made then."""
    prompts = preference_prompts(WORLD, "test", 40)
    found = rank_completions(prompts, [[p["reference"], "so"] for p in prompts], 4, 0.15, "seed")
    digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()
    assert digest.startswith("aa5d638ed5b2e631")
