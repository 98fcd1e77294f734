"""Masked language modelling: what is blanked out, the loss, attention to both sides, filling in."""

import json

import pytest
import torch
from conftest import SMALL
from helpers import TINY, close, in_new_folder, moments_of_two_processes, refused, run
from transformers import AutoModelForCausalLM
from transformers.loss.loss_utils import ForMaskedLMLoss

import train_pretrain
import train_sft
from nanollm.checkpoint import load_gpt, save_gpt
from nanollm.config import UserError
from nanollm.gpt import GPT, GPTConfig
from train_pretrain import blank_out, facts_known, fill_blanks, masked_loss

MASK_ID, V = 270, 280
ORDINARY = torch.arange(V) < 256
MLM = [*TINY, "--objective", "mlm"]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    with in_new_folder(tmp_path_factory) as folder:
        flags = ["--context", 32, "--steps", 300, "--eval_every", 300, "--lr", 0.01]
        run(train_pretrain, *MLM, *flags, out="runs/mlm")
        yield folder


def bidirectional(randomise, **changes):
    return randomise(GPT(GPTConfig(**SMALL | {"vocab_size": V, "is_causal": False} | changes)))


def test_of_fifteen_percent_eight_tenths_are_masked_one_is_replaced_and_one_stays():
    tokens = torch.randint(0, 256, (400, 100))
    tokens[:, :10] = 260  # special
    shown, same, chosen = blank_out(tokens, 0, ORDINARY, MASK_ID).unbind(1)
    assert torch.equal(same, tokens) and chosen.sum(1).tolist() == [15] * 400
    assert not chosen[:, :10].any() and torch.equal(shown[chosen == 0], tokens[chosen == 0])
    asked, now = tokens[chosen == 1], shown[chosen == 1]
    masked, kept = (now == MASK_ID).float().mean(), (now == asked).float().mean()
    assert masked == pytest.approx(0.8, abs=0.02) and kept == pytest.approx(0.1, abs=0.02)
    assert (now[now != MASK_ID] < 256).all() and 0 < chosen[:, 10:].sum(0).min()
    again = blank_out(tokens, 0, ORDINARY, MASK_ID)[:, 0], blank_out(tokens, 1, ORDINARY, MASK_ID)
    assert torch.equal(again[0], shown) and not torch.equal(again[1][:, 0], shown)


def test_the_loss_equals_a_slow_loops_and_transformers(randomised, tmp_path, tokenizer):
    model = bidirectional(randomised)
    tokens = torch.randint(0, 256, (3, 40))
    tokens[:, [0, 17]] = 257  # two documents a row
    rows = blank_out(tokens, 0, ORDINARY, MASK_ID)
    losses = []
    for shown, true, chosen in rows:
        for part in slice(0, 17), slice(17, 40):  # alone, and so with positions of its own
            logits = model(shown[None, part])[0]
            at = chosen[part].nonzero()[:, 0].tolist()
            losses += [-logits[t].log_softmax(-1)[true[part][t]] for t in at]
    close(masked_loss(model, rows, 257), torch.stack(losses).mean())
    save_gpt(model, tokenizer, tmp_path)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    shown, true, chosen = rows.unbind(1)
    labels = true.where(chosen == 1, -100)
    theirs = ForMaskedLMLoss(peer(shown).logits, labels, V)
    close(masked_loss(model, rows, None), theirs)


def test_attention_sees_both_sides_and_stays_inside_the_document(randomised):
    model, tokens = bidirectional(randomised), torch.randint(0, 256, (1, 20))
    changed = tokens.clone()
    changed[0, 12] = (tokens[0, 12] + 1) % 256
    moved = (model(tokens) - model(changed)).abs().amax(-1)[0]
    assert (moved > 1e-4).all()


def test_blanks_are_filled_the_most_certain_first():
    class Sure:
        """At 1 it is surer than at 2, where it says what 1 holds."""

        def __call__(self, tokens, mask=None):
            logits = torch.zeros(*tokens.shape, V)
            logits[:, 1, 7] = 9.0
            logits[torch.arange(len(tokens)), 2, tokens[:, 1]] = 5.0
            return logits

    tokens = torch.tensor([[1, MASK_ID, MASK_ID], [1, 3, MASK_ID], [1, 2, 3]])
    assert fill_blanks(Sure(), tokens, MASK_ID).tolist() == [[1, 7, 7], [1, 3, 3], [1, 2, 3]]


def test_it_learns_a_repeated_sentence_and_fills_in_what_is_missing(here):
    model, tokenizer = load_gpt("runs/mlm", causal=False)
    text = (here / "text.txt").read_text(encoding="utf-8").split("\n")[0]
    ids = torch.tensor([tokenizer.encode(text)[:32]])
    blanked = ids.clone()
    blanked[0, [5, 9, 14]] = tokenizer.special["<|mask|>"]
    assert torch.equal(fill_blanks(model, blanked, tokenizer.special["<|mask|>"]), ids)
    logged = [json.loads(line) for line in open("runs/mlm/metrics.jsonl")]
    assert logged[0]["loss"] > 3 and logged[-1]["val_loss"] < 0.5
    assert "[" in (here / "runs/mlm/samples.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("causal", [True, False])
def test_a_fact_is_known_where_all_of_its_value_is_written(causal, tokenizer):
    right = {"prompt": "a b", "answer": " cd"}

    class Knows:
        """Says the same token everywhere, but in the row of `right` what stands there."""

        cfg, device = GPTConfig(is_causal=causal), torch.device("cpu")

        def __call__(self, tokens, mask=None):
            truth = [*tokenizer.begin, *tokenizer.encode("a b cd.")]
            said = torch.full(tokens.shape, 65)
            said[0, : len(truth)] = torch.tensor(truth)
            said = said.roll(-1, 1) if causal else said
            return torch.nn.functional.one_hot(said, tokenizer.vocab_size).float()

    tokenizer = tokenizer.with_tokens(["<|mask|>"])
    assert facts_known(Knows(), tokenizer, [right, {"prompt": "a b", "answer": " ce"}]) == 0.5


def test_a_model_that_fills_in_blanks_is_refused_where_one_that_writes_on_is_wanted(here, capsys):
    said = refused(capsys, train_sft, "--init", "runs/mlm", "--data", "chats.jsonl")
    assert "is_causal is False, but a model that predicts the next token" in said
    with pytest.raises(UserError, match="is_causal is False"):
        load_gpt("runs/mlm")


def test_two_processes_compute_the_gradients_of_one(here):
    flags = [*MLM, "--context", 32, "--steps", 1, "--eval_every", 1]
    one, two = moments_of_two_processes("train_pretrain.py", flags, "runs/one", "runs/two")
    for ours, theirs in zip(one, two, strict=True):
        close(ours, theirs)
