"""GRPO, run for real on small data: what it learns, resumes, shares between processes, refuses."""

import json
from pathlib import Path

import pytest
import torch
from helpers import assert_resumes, in_new_folder, moments_of_two_processes, refused, result, run

import train_grpo
import train_pretrain
import train_sft
from nanollm.formats import write_jsonl
from nanollm.hub import load_model
from nanollm.runtime import Runtime

SMALL = "--dtype fp32 --device cpu --batch_size 4".split()
OWN = [*SMALL, *"--init runs/sft --data problems.jsonl --max_new_tokens 12 --samples 4".split()]
OWN += "--accumulate 2 --eval_problems 4 --eval_samples 2".split()
TINY = [*SMALL, *"--layers 1 --channels 32 --heads 2 --tokenizer bytes --context 64".split()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A directory with a model fine-tuned to say one of four letters, and problems that want b."""
    with in_new_folder(tmp_path_factory) as folder:
        turns = [
            [{"role": "user", "content": f"say {n % 20}"}, {"role": "assistant", "content": c}]
            for n, c in enumerate("abcd" * 15)
        ]
        problems = [{"prompt": f"say {n}", "answer": "b", "check": "exact"} for n in range(40)]
        files = {"chats": [{"messages": t} for t in turns], "problems": problems}
        for name, records in files.items():
            write_jsonl(f"{name}.jsonl", records)
        steps = "--steps 40 --eval_every 40 --data text.txt".split()
        run(train_pretrain, *TINY, *steps, out="runs/pretrain")
        steps = "--steps 200 --eval_every 200 --data chats.jsonl --replay 0 --context 48".split()
        run(train_sft, *SMALL, *steps, "--init", "runs/pretrain", out="runs/sft")
    return folder


def grpo(*flags, out="runs/grpo"):
    """The metrics of the updates."""
    return [m for m in run(train_grpo, *OWN, *flags, out=out) if "reward" in m]


@pytest.mark.parametrize("loss", train_grpo.VARIANTS)
def test_every_loss_makes_right_completions_more_likely(loss, here):
    flags = ["--loss", loss, "--steps", 14, "--eval_every", 14, "--lr", 1e-3, "--warmup", 2]
    metrics = grpo(*flags, "--batch_size", 16, "--kl_coef", 0.01)
    right = [m["accuracy"] for m in metrics]
    assert sum(right[-3:]) / 3 > right[0] + 0.15
    assert metrics[0]["kl"] == 0.0 and metrics[0]["clip_fraction"] == 0.0  # still the reference
    wanted = "reward accuracy equal_groups length truncated entropy grad_norm"
    assert set(wanted.split()) <= set(metrics[0])
    assert result("runs/grpo")["effects"][0]["after"] > result("runs/grpo")["effects"][0]["before"]


def test_long_completions_cost_where_a_buffer_is_set(here):
    flags = ["--steps", 1, "--max_new_tokens", 8]
    rewards = [grpo(*flags, "--overlong_buffer", buffer)[0]["reward"] for buffer in (0, 8)]
    assert rewards[1] < rewards[0]


def test_the_same_problem_is_answered_all_through_training(here):
    grpo("--steps", 4, "--eval_every", 2, out="runs/seen")
    samples = Path("runs/seen/samples.txt").read_text()
    assert samples.count("--- step") == 3 and samples.count("say ") == 3
    assert {"accuracy", "sampled", "maj", "pass"} <= set(result("runs/seen")["before"]["all"])


# --- dynamic sampling ----------------------------------------------------------------------------


def rounds(monkeypatch, *rewards):
    """sample_batch with completions of these rewards, a round each, of one problem and G = 2."""
    left = list(rewards)

    def rollout(cfg, prompts, problems):
        values = torch.tensor(left.pop(0))
        tokens = torch.full((len(values), 3), len(left))
        mask = torch.tensor([[False, True, True]] * len(values))
        rows = train_grpo.Completions(tokens, mask, torch.ones_like(mask))
        return train_grpo.Rollout(rows, values, values, torch.ones(len(values), dtype=torch.bool))

    monkeypatch.setattr(train_grpo, "sample_rollout", rollout)
    cfg = train_grpo.Config(samples=2, batch_size=1, dynamic_sampling=True)
    rt, sampler = Runtime(torch.device("cpu"), torch.float32), train_grpo.Sampler(4)
    return train_grpo.sample_batch(cfg, rt, None, range(4), sampler), left


def test_an_unequal_group_is_looked_for_in_every_round_and_equal_ones_leave(monkeypatch):
    (rollout, stats), left = rounds(monkeypatch, [1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0])
    assert rollout.rewards.tolist() == [1.0, 0.0] and len(left) == 1
    assert stats["equal_groups"] == pytest.approx(2 / 3)  # of all that was sampled


def test_where_all_groups_are_equal_one_stays_that_teaches_nothing(monkeypatch):
    (rollout, stats), left = rounds(monkeypatch, *[[1.0, 1.0]] * 4)
    assert rollout.rewards.tolist() == [1.0, 1.0] and not left and stats["equal_groups"] == 1


# --- kill and resume, several processes ----------------------------------------------------------


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(here):
    flags = [*OWN, "--steps", 8, "--eval_every", 2, "--kl_coef", 0.1, "--inner_updates", 2]
    assert_resumes("train_grpo.py", flags, last=5)


@pytest.mark.parametrize("loss", ["grpo", "reinforce_pp"])
def test_two_processes_give_the_gradients_of_one(loss, here):
    """After one step the optimizer's first moments are the gradients, up to a constant factor."""
    flags = [*OWN, "--steps", "1", "--grad_clip", "0", "--loss", loss, "--kl_coef", "0.1"]
    moments = moments_of_two_processes("train_grpo.py", flags, "runs/one", "runs/two")
    assert len(moments[0]) > 5
    for a, b in zip(*moments):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)


# --- bad input -----------------------------------------------------------------------------------

REFUSED = [
    (["--max_new_tokens", 60], "no room for 60 more in the model's context of 64"),
    (["--samples", 1], "--samples must be at least 2"),
    (["--data", "chats.jsonl"], '60 of 60 records can\'t be used: it needs an "answer"'),
    (["--tasks", "riddles"], "--tasks riddles: problems.jsonl has only all"),
    (["--data", "images"], "this model reads text only"),
    (["--init", "runs/none"], "runs/none"),
    (["--loss", "ppo"], "--loss"),
    (["--out", "runs/sft"], "would replace"),
    (["--data", "bad.jsonl"], 'bad.jsonl, line 41: "not" must be a list'),
]


@pytest.mark.parametrize("flags, sentence", REFUSED)
def test_what_grpo_cannot_do_is_refused_and_leaves_runs_in_their_place(
    flags, sentence, here, capsys
):
    good = Path("problems.jsonl").read_text()
    Path("bad.jsonl").write_text(good + json.dumps({"prompt": "a", "answer": "b", "not": 5}))
    said = refused(capsys, train_grpo, *OWN, "--out", "runs/refused", *flags)
    assert sentence in said and not Path("runs/refused").exists()
    assert not list(Path("data/cache").glob("images*"))  # nothing was painted for it
    load_model("runs/sft")
