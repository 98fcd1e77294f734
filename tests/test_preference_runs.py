"""Reward model, PPO and DPO, run for real on small data: what they learn, resume, share, refuse."""

import re
from pathlib import Path

import pytest
from helpers import (
    ON_CPU,
    TINY,
    WORDS,
    as_two_processes,
    assert_resumes,
    close,
    first_moments,
    in_new_folder,
    logged,
    refused,
    result,
    say,
    weights,
)
from helpers import run as run_module

import train_dpo
import train_ppo
import train_pretrain
import train_rm
import train_sft
from nanollm import preferences
from nanollm.config import UserError
from nanollm.formats import write_jsonl
from nanollm.gpt import GPT
from nanollm.hub import load_model, load_scalar
from nanollm.peft.adapters import reference

PAIRS = [{"prompt": f"say {w}", "chosen": f"{w} please", "rejected": w} for w in WORDS * 3]
RANKINGS = [  # of three or two completions, so that parts of a batch hold unequal numbers of pairs
    {"prompt": f"say {w}", "ranking": [f"{w} please", w, f"no {w}"][: 2 + n % 2]}
    for n, w in enumerate(WORDS * 3)
]
RM = [*ON_CPU, *"--init runs/sft --data pairs.jsonl --prompts 4".split()]
DPO = [*RM, "--eval_prompts", 4]
PPO = [*ON_CPU, *"--init runs/sft --data problems.jsonl --max_new_tokens 16".split()]
PPO += "--eval_prompts 2 --reward_model runs/rm".split()
SCRIPTS = {
    "train_rm.py": (train_rm, RM),
    "train_dpo.py": (train_dpo, DPO),
    "train_ppo.py": (train_ppo, PPO),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A directory with a model fine-tuned to repeat a word, and a reward model."""
    with in_new_folder(tmp_path_factory) as folder:
        files = {
            "chats": [say(w, w + " please" * (n % 2)) for n, w in enumerate(WORDS * 3)],
            "pairs": PAIRS,
            "rankings": RANKINGS,
            "problems": [{"prompt": f"say {w}", "answer": w} for w in WORDS * 3],
            "margins": [pair | {"margin": 0.5} for pair in PAIRS],
        }
        for name, records in files.items():
            write_jsonl(f"{name}.jsonl", records)
        run_module(train_pretrain, *TINY, "--steps", 40, "--eval_every", 40, out="runs/pretrain")
        sft("--init", "runs/pretrain", "--steps", 120, "--eval_every", 120, out="runs/sft")
        run("train_rm.py", "--steps", 30, "--eval_every", 30, "--muon_lr", 0.01, out="runs/rm")
    return folder


def sft(*flags, out):
    flags = [*"--context 48 --replay 0 --replay_data text.txt --data chats.jsonl".split(), *flags]
    return run_module(train_sft, *ON_CPU, *flags, out=out)


def run(script, *flags, out):
    module, own = SCRIPTS[script]
    return run_module(module, *own, *flags, out=out)


# --- learning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["ranking", "bradley_terry", "margin"])
def test_the_reward_model_learns_which_completion_is_better(loss, here):
    data = ["--data", "margins.jsonl"] if loss == "margin" else []
    steps = ["--steps", 30, "--eval_every", 30, "--muon_lr", 0.01]
    metrics = run("train_rm.py", "--loss", loss, *steps, *data, out="runs/rm_loss")
    assert metrics[-1]["accuracy"] == 1.0 and metrics[-1]["log_loss"] < 0.4
    found = result("runs/rm_loss")
    assert found["before"]["log_loss"] > found["after"]["log_loss"] == metrics[-1]["log_loss"]
    assert [effect["after"] for effect in found["effects"]] == [1.0]
    assert load_scalar("runs/rm_loss")[0].shift != 0  # to mean 0 on the reference's samples


def test_a_judge_ranks_what_is_trained_on_and_people_what_is_held_out(here, monkeypatch, capsys):
    def shorter(records, folder, rt):
        texts = [record["completions"] for record in records]
        return [[[float(len(a) < len(b)) for b in each] for a in each] for each in texts]

    monkeypatch.setattr(preferences, "ask_judge", shorter)  # people prefer the longer one
    flags = ["--judge", "runs/pretrain", "--steps", 30, "--eval_every", 30, "--muon_lr", 0.01]
    metrics = run("train_rm.py", *flags, out="runs/rm_judged")
    assert metrics[-1]["accuracy"] == 0.0
    assert re.search(r"annotators, ranking +0\.0%", capsys.readouterr().out)


@pytest.mark.parametrize("loss", train_dpo.LOSSES)
def test_every_dpo_loss_makes_the_chosen_completion_win(loss, here):
    beta = 2 if loss == "simpo" else 0.1
    flags = ["--loss", loss, "--beta", beta, "--steps", 20, "--eval_every", 20, "--warmup", 2]
    metrics = run("train_dpo.py", *flags, out="runs/dpo")
    assert metrics[-1]["val_accuracy"] > 0.9 and metrics[-1]["val_margin"] > 0
    if loss == "sigmoid":  # policy and reference are the same at first
        assert metrics[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)  # log 2
    assert weights("runs/sft").keys() == weights("runs/dpo").keys()


@pytest.mark.parametrize("loss", train_dpo.WITHOUT_REFERENCE)
def test_a_loss_without_a_reference_runs_none(loss, here, monkeypatch):
    def silent(model):
        ref = reference(model)
        ref.forward = ref.hidden = None
        return ref

    monkeypatch.setattr(train_dpo, "reference", silent)
    run("train_dpo.py", "--loss", loss, "--steps", 1, out="runs/dpo_alone")
    with pytest.raises(TypeError):
        run("train_dpo.py", "--steps", 1, out="runs/dpo_with")


@pytest.mark.parametrize("critic", ["separate", "shared", "none"])
def test_ppo_raises_the_learned_reward(critic, here):
    flags = ["--critic", critic, "--steps", 12, "--eval_every", 12, "--lr", 3e-3]
    more = ["--batch_size", 16, "--kl_coef", 0.02, "--eval_prompts", 16, "--val_fraction", 0.3]
    metrics = run("train_ppo.py", *flags, *more, out="runs/ppo")
    rewards = [m["reward"] for m in metrics if "reward" in m]
    assert sum(rewards[-3:]) / 3 > rewards[0] + 1  # above all, completions end now
    assert metrics[-1]["val_ended"] > metrics[0]["val_ended"]
    assert metrics[1]["kl"] == 0.0  # the policy is the reference still
    wanted = "reward kl entropy length ended policy_loss value_loss clip_fraction approximate_kl"
    assert set(wanted.split()) <= set(metrics[1])


def test_rules_reward_the_right_answer(here):
    flags = ["--reward", "rules", "--critic", "shared", "--steps", 2, "--eval_every", 2]
    metrics = run("train_ppo.py", *flags, out="runs/ppo_rules")
    assert 0 <= metrics[-1]["val_reward"] <= 1
    [effect] = result("runs/ppo_rules")["effects"]
    assert effect["after"] == metrics[-1]["val_accuracy"]


def test_a_policy_that_never_ends_its_turn_is_penalised_and_visible(here):
    flags = "--max_new_tokens 1 --steps 1 --truncation_reward -7 --epochs 1 --minibatches 1".split()
    metrics = run("train_ppo.py", *flags, out="runs/ppo_cut")
    update = [m for m in metrics if "ended" in m][0]
    assert update["ended"] == 0 and update["reward"] == -7
    assert update["approximate_kl"] == update["clip_fraction"] == 0  # with one minibatch
    assert update["policy_loss"] == pytest.approx(0.0, abs=1e-6)  # minus the mean of white noise


def test_the_separate_critic_recomputes_its_activations_too(here, monkeypatch):
    def stop(model, *_, **__):
        built.extend([model.policy, model.critic])
        raise InterruptedError

    built = []
    monkeypatch.setattr(train_ppo, "build_optimizer", stop)
    with pytest.raises(InterruptedError):
        run("train_ppo.py", "--checkpoint_activations", out="runs/ppo_built")
    assert [model.model.checkpoint_activations for model in built] == [True, True]


# --- kill and resume, several parts and processes ------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(script, here):
    assert_resumes(script, [*SCRIPTS[script][1], "--steps", 8, "--eval_every", 2], last=5)


WHOLE_BATCH = {  # losses in which more than a sum over rows is of the whole batch
    "centred rankings": ("train_rm.py", "--data rankings.jsonl --centering 1"),
    "kto": ("train_dpo.py", "--loss kto --data rankings.jsonl"),
    "ppo": ("train_ppo.py", "--epochs 1 --minibatches 1"),
}


@pytest.mark.parametrize("name", WHOLE_BATCH)
def test_parts_and_processes_change_neither_the_gradients_nor_what_is_logged(name, here):
    """After one step the optimizers' first moments are the gradients, up to a constant factor."""
    script, flags = WHOLE_BATCH[name]
    flags = [*flags.split(), "--steps", 1, "--grad_clip", 0]
    run(script, *flags, out="runs/one")
    run(script, *flags, "--accumulate", 2, out="runs/parts")
    as_two_processes(script, *SCRIPTS[script][1], *flags, "--out", "runs/two")
    wanted = first_moments("runs/one")
    assert len(wanted) > 5
    for out in ("runs/parts", "runs/two"):
        for got, want in zip(first_moments(out), wanted, strict=True):
            close(got, want, 1e-6, 1e-3)
        for got, want in zip(logged(out), logged("runs/one"), strict=True):
            assert got == pytest.approx(want, rel=1e-3, abs=2e-6)


# --- bad input -----------------------------------------------------------------------------------


def turned_down(capsys, script, *flags):
    """What a script says that refuses these flags, before it writes anything."""
    module, own = SCRIPTS[script]
    said = refused(capsys, module, *own, "--out", "runs/refused", *flags)
    assert not Path("runs/refused").exists()
    return said


REFUSED = [
    ("train_rm.py", "--loss margin", "pairs.jsonl, line 1: --loss margin needs"),
    ("train_rm.py", "--disagreement 0.5", "--disagreement must be"),
    ("train_rm.py", "--judge runs/sft", "of the comparisons with A or B; --preset judge"),
    ("train_rm.py", "--judge runs/none", "runs/none is not a folder"),
    ("train_rm.py", "--judge runs/rm", "writes none"),
    ("train_dpo.py", "--judge runs/sft --out runs", "would replace runs/sft"),
    ("train_ppo.py", "--max_new_tokens 60", "the model's context of 64"),
    ("train_ppo.py", "--reward_model runs/sft", "it is no reward model"),
    ("train_ppo.py", "--reward_model runs/none", "runs/none"),
    ("train_ppo.py", "--reward rules --data pairs.jsonl", 'needs an "answer"'),
]


@pytest.mark.parametrize("script, flags, sentence", REFUSED)
def test_what_cannot_be_done_is_refused(script, flags, sentence, here, capsys):
    assert sentence in turned_down(capsys, script, *flags.split())


def test_ppo_refuses_a_model_that_looks_at_images(here, capsys, monkeypatch):
    monkeypatch.setattr(GPT, "tokens_per_image", 4)
    assert "PPO reads no images" in turned_down(capsys, "train_ppo.py")


def test_a_reward_model_with_another_tokenizer_is_refused(here, capsys):
    other = ["--steps", 1, "--tokenizer", "train", "--vocab_size", 280]
    run_module(train_pretrain, *TINY, *other, out="runs/other")
    sft("--init", "runs/other", "--steps", 1, out="runs/other_sft")
    run("train_rm.py", "--init", "runs/other_sft", "--steps", 1, out="runs/other_rm")
    said = turned_down(capsys, "train_ppo.py", "--reward_model", "runs/other_rm")
    assert "another tokenizer" in said


def test_a_reward_model_is_not_opened_as_a_language_model(here):
    with pytest.raises(UserError, match="writes none"):
        load_model("runs/rm")
