"""Several annotators, and a judge in their place: how far they agree, and the ranking that is made
of what they say.
"""

import hashlib
import itertools
import json
import math
import random
import re

import pytest
import torch

import nanollm.preferences as preferences
from data.village.preferences import comparisons, gold_parts, preference_prompts, rank_completions
from data.village.world import build_world
from nanollm.config import UserError
from nanollm.formats import write_jsonl
from nanollm.metrics import cohens_kappa
from nanollm.preferences import agreement, ask_judge, judged
from nanollm.records import comparison, read_chats
from nanollm.runtime import Runtime

CPU = Runtime(torch.device("cpu"), torch.float32)
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


# --- comparisons ---------------------------------------------------------------------------------


def test_comparisons_are_labelled_by_annotators_who_err_and_the_test_by_the_gold(tmp_path):
    prompts, right = preference_prompts(WORLD, "train", 1000), []
    known = {str(prompt["messages"]): prompt for prompt in prompts}
    made = [*comparisons(prompts * 2, "train")]
    for each in made:
        a, b = (gold_parts(known[str(each["messages"])], each[key])["gold"] for key in "ab")
        right += [(each["label"] == "a") == (a > b)] if a != b else []
    assert sum(right) / len(right) == pytest.approx(0.85, abs=0.02)
    write_jsonl(tmp_path / "a.jsonl", made)
    chat, said = read_chats(tmp_path / "a.jsonl")[0], made[0]
    wanted = comparison(said["messages"], said["a"], said["b"])
    assert chat["messages"] == [*wanted, {"role": "assistant", "content": said["label"].upper()}]
    for each in comparisons(prompts[:100], "test"):
        (*before, asked), answer = each["messages"], each["answer"]
        [question, a, b] = re.match(
            r"(.*)\n\n(.*) \[A\]\n(.*) \[B\]\n\n", asked["content"]
        ).groups()
        prompt = known[str([*before, asked | {"content": question}])]
        golds = {label: gold_parts(prompt, text)["gold"] for label, text in (("A", a), ("B", b))}
        assert golds[answer] > min(golds.values())


# --- a judge -------------------------------------------------------------------------------------

ASKED = {"messages": [{"role": "user", "content": "Hi"}]}
TEXTS = ["good", "bad", "worst"]


def ranked(*texts, **more):
    """A record of read_preferences in which people have ranked these completions."""
    return ASKED | {"completions": list(texts), "margin": 1.0, "ratings": [3, 2, 1], **more}


@pytest.fixture
def judge(monkeypatch, random_model, tokenizer):
    """make(logit) lets a model be the judge that says A with this logit of what it is asked."""

    def make(logit, label="A", context=256):
        model = random_model(max_position_embeddings=context)
        says_a, says_b = (tokenizer.encode(each)[0] for each in (label, "B"))

        def forward(tokens, *_, **__):
            logits = torch.zeros(len(tokens), 270)
            logits[:, says_b] = 20.0
            for row, asked in zip(logits, map(tokenizer.decode, tokens.tolist())):
                row[says_a] = 20 + logit(re.findall(r"(\w+) \[[AB]]", asked))
            return logits

        model.forward = forward
        monkeypatch.setattr(preferences, "load_model", lambda folder: (model, tokenizer))

    return make


def test_the_judge_ranks_by_what_it_says_in_both_orders(judge):
    """It prefers the longer one by 0.4 per letter, and the first by 1: asked once, of "good" and
    "bad" it always names the first.
    """
    judge(lambda two: 0.4 * (len(two[0]) - len(two[1])) + 1)
    people = [ranked(*TEXTS, gold=[3, 1, 2]), ranked("a", "bb", task="x")]
    found = judged(people, "runs/judge", CPU)
    assert [each["completions"] for each in found] == [["worst", "good", "bad"], ["bb", "a"]]
    assert (found[0]["gold"], found[0]["orders"], found[1]["task"]) == ([2, 3, 1], [[1, 2, 0]], "x")
    assert all(each["margin"] is each["ratings"] is None for each in found)  # the people's
    for i, j in itertools.permutations(range(3), 2):
        lengths = [len(found[0]["completions"][k]) for k in (i, j)]
        p = 1 / (1 + math.exp(-0.4 * (lengths[0] - lengths[1]) - 1))
        assert found[0]["first"][i][j] == pytest.approx(p, abs=1e-5)
    rows = {name: share for name, share, _ in agreement(found)}
    assert rows["judge, both places"] == 0 and rows["annotators, ranking"] == pytest.approx(1 / 4)
    assert (rows["judge, gold"], rows["ranking, gold"]) == (0.5, pytest.approx(2 / 3))


def test_its_probabilities_are_those_of_a_slow_loop(random_model, tokenizer, monkeypatch):
    model = random_model(max_position_embeddings=256)
    monkeypatch.setattr(preferences, "load_model", lambda folder: (model, tokenizer))
    monkeypatch.setattr(preferences, "need", lambda *_: None)  # it says neither label
    [first] = ask_judge([ranked(*TEXTS)], "runs/judge", CPU)
    for i, j in itertools.permutations(range(3), 2):
        messages = comparison(ASKED["messages"], TEXTS[i], TEXTS[j])
        ids, _ = tokenizer.render(messages, generation_prompt=True)
        p = model(torch.tensor([ids]))[0, -1].softmax(-1)
        a, b = (p[ord(label)].item() for label in "AB")
        assert first[i][j] == pytest.approx(a / (a + b), abs=1e-5)


def test_who_is_no_judge_is_refused(judge):
    judge(lambda two: 30.0, label="C")
    with pytest.raises(
        UserError, match="--judge runs/sft: it answers 0% of the comparisons with A"
    ):
        judged([ranked("a", "bb")], "runs/sft", CPU)
    judge(lambda two: 0.0, context=40)
    with pytest.raises(UserError, match="a comparison of .* tokens is longer than its context"):
        judged([ranked("a", "bb")], "runs/sft", CPU)
