"""A judge in the annotators' place: what it learns from, and the ranking that it gives."""

import itertools
import math
import re

import pytest
import torch

import nanollm.preferences as preferences
from data.village.preferences import comparisons, gold_parts, preference_prompts
from data.village.world import build_world
from nanollm.config import UserError
from nanollm.formats import write_jsonl
from nanollm.preferences import agreement, ask_judge, judged
from nanollm.records import comparison, read_chats
from nanollm.runtime import Runtime

CPU = Runtime(torch.device("cpu"), torch.float32)
WORLD = build_world(32, 0)


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
def judge(tmp_path, monkeypatch, random_model, tokenizer):
    """make(logit) lets a model be the judge that says A with this logit of what it is asked."""
    monkeypatch.setattr(preferences, "CACHE", tmp_path)
    monkeypatch.setattr(preferences, "weights_hash", lambda folder: folder)

    def make(logit, label="A", context=256):
        model, opened = random_model(max_position_embeddings=context), []
        says_a, says_b = (tokenizer.encode(each)[0] for each in (label, "B"))

        def forward(tokens, *_, **__):
            logits = torch.zeros(len(tokens), 270)
            logits[:, says_b] = 20.0
            for row, asked in zip(logits, map(tokenizer.decode, tokens.tolist())):
                row[says_a] = 20 + logit(re.findall(r"(\w+) \[[AB]]", asked))
            return logits

        def load(folder):
            opened.append(folder)
            return model, tokenizer

        model.forward = forward
        monkeypatch.setattr(preferences, "load_model", load)
        return opened

    return make


def test_the_judge_ranks_by_what_it_says_in_both_orders(judge):
    """It prefers the longer one by 0.4 per letter, and the first by 1: asked once, of "good" and
    "bad" it always names the first.
    """
    opened = judge(lambda two: 0.4 * (len(two[0]) - len(two[1])) + 1)
    people = [ranked(*TEXTS, gold=[3, 1, 2]), ranked("a", "bb", task="x")]
    found, again = judged(people, "runs/judge", CPU), judged(people, "runs/judge", CPU)
    assert opened == ["runs/judge"] and again == found  # asked once, and kept
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
    [first] = ask_judge([(ASKED["messages"], TEXTS)], "runs/judge", CPU)
    for i, j in itertools.permutations(range(3), 2):
        messages = comparison(ASKED["messages"], TEXTS[i], TEXTS[j])
        ids, _ = tokenizer.render(messages, generation_prompt=True)
        p = model(torch.tensor([ids]))[0, -1].softmax(-1)
        a, b = (p[ord(label)].item() for label in "AB")
        assert first[i][j] == pytest.approx(a / (a + b), abs=1e-5)


def test_who_is_no_judge_is_refused(judge, tmp_path):
    judge(lambda two: 30.0, label="C")
    with pytest.raises(
        UserError, match="--judge runs/sft: it answers 0% of the comparisons with A"
    ):
        judged([ranked("a", "bb")], "runs/sft", CPU)
    judge(lambda two: 0.0, context=40)
    with pytest.raises(UserError, match="a comparison of .* tokens is longer than its context"):
        judged([ranked("a", "bb")], "runs/sft", CPU)
    assert not [*tmp_path.iterdir()]  # nothing half-written
