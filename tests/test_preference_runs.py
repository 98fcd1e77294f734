"""Reward model, PPO and DPO, run for real on small data: what they learn, resume, share, refuse."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
import transformers

import train_dpo
import train_ppo
import train_rm
import train_sft
from nanollm import chat
from nanollm.config import parse
from nanollm.hub import load_scalar
from nanollm.run import read_metrics
from tests.test_train import (
    command,
    kill_and_resume,
    moments_of_two_processes,
    pretrain,
    refused,
    same,
    sft,
    weights,
)

WORDS = "owl fox hen cow pig bee ant elk yak emu eel cod bat rat cat dog".split()
SMALL = "--dtype fp32 --device cpu --init runs/sft".split()
PAIRS = [{"prompt": f"say {w}", "chosen": f"{w} please", "rejected": w} for w in WORDS * 3]
RM = [*SMALL, *"--data pairs.jsonl --batch_size 4 --prompts 4".split()]
DPO = [*RM, "--eval_prompts", "4"]
PPO = [*SMALL, *"--data problems.jsonl --max_new_tokens 16 --batch_size 4 --eval_prompts 2".split()]
SCRIPTS = {
    "train_rm.py": (train_rm, RM),
    "train_dpo.py": (train_dpo, DPO),
    "train_ppo.py": (train_ppo, [*PPO, "--reward_model", "runs/rm"]),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a model fine-tuned to repeat a word, and a reward model."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("text.txt").write_text("the cat sat on the mat. the dog sat on the log. " * 150)
        chats = [
            [("user", f"say {w}"), ("assistant", w + " please" * (i % 2))]
            for i, w in enumerate(WORDS * 3)
        ]
        as_json = [{"messages": [{"role": r, "content": c} for r, c in chat]} for chat in chats]
        problems = [{"prompt": f"say {w}", "answer": w} for w in WORDS * 3]
        for name, records in ("chats", as_json), ("pairs", PAIRS), ("problems", problems):
            Path(f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        pretrain("--steps", 40, "--eval_every", 40, "--context", 64)
        sft("--steps", 120, "--eval_every", 120, "--replay", 0)
        run("train_rm.py", "--steps", 30, "--eval_every", 30, "--muon_lr", 0.01, out="runs/rm")
    return folder


@pytest.fixture
def here(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return trained


def run(script, *flags, out):
    module, own = SCRIPTS[script]
    module.main(parse(module.Config, module.PRESETS, [*own, "--out", out, *map(str, flags)]))
    return read_metrics(out)


def result(out):
    return json.loads(Path(out, "result.json").read_text())


# --- learning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["ranking", "bradley_terry", "margin"])
def test_the_reward_model_learns_which_completion_is_better(loss, here):
    if loss == "margin":
        lines = "".join(json.dumps(p | {"margin": 0.5}) + "\n" for p in PAIRS)
        Path("margins.jsonl").write_text(lines)
    data = ["--data", "margins.jsonl"] if loss == "margin" else []
    steps = ["--steps", 30, "--eval_every", 30, "--muon_lr", 0.01]
    metrics = run("train_rm.py", "--loss", loss, *steps, *data, out="runs/rm_loss")
    assert metrics[-1]["accuracy"] == 1.0 and metrics[-1]["log_loss"] < 0.4


def test_rewards_have_mean_zero_on_the_references_samples_and_open_in_transformers(here):
    model, tokenizer = load_scalar("runs/rm")
    assert model.shift != 0
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        "runs/rm", dtype=torch.float32
    )
    ids = tokenizer.render([{"role": "user", "content": "say owl"}], generation_prompt=True)[0]
    tokens = torch.tensor([[*ids, *tokenizer.encode("owl please"), tokenizer.end_id]])
    ours = model(tokens)[:, -1] + model.shift
    torch.testing.assert_close(ours, theirs(tokens).logits[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("loss", "sigmoid cdpo robust hinge ipo simpo orpo kto".split())
def test_every_dpo_loss_makes_the_chosen_completion_win(loss, here):
    beta = 2 if loss == "simpo" else 0.1
    flags = ["--loss", loss, "--beta", beta, "--steps", 20, "--eval_every", 20, "--warmup", 2]
    metrics = run("train_dpo.py", *flags, out="runs/dpo")
    assert metrics[-1]["val_accuracy"] > 0.9 and metrics[-1]["val_margin"] > 0


def test_at_the_first_step_the_dpo_loss_is_log_two(here):
    flags = ["--steps", 1, "--nll_coef", 0]
    assert run("train_dpo.py", *flags, out="runs/dpo")[0]["loss"] == pytest.approx(
        0.6931472, abs=1e-6
    )


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


def test_with_one_minibatch_the_first_ratio_is_one(here):
    flags = ["--steps", 1, "--epochs", 1, "--minibatches", 1]
    first = [m for m in run("train_ppo.py", *flags, out="runs/ppo") if "approximate_kl" in m][0]
    assert first["approximate_kl"] == 0.0 and first["clip_fraction"] == 0.0
    assert first["policy_loss"] == pytest.approx(0.0, abs=1e-6)  # minus the mean of white noise


def test_rules_reward_the_right_answer(here):
    flags = ["--reward", "rules", "--critic", "shared", "--steps", 2, "--eval_every", 2]
    metrics = run("train_ppo.py", *flags, out="runs/ppo_rules")
    assert 0 <= metrics[-1]["val_reward"] <= 1


def test_a_policy_that_never_ends_its_turn_is_penalised_and_visible(here):
    flags = ["--max_new_tokens", 1, "--steps", 1, "--truncation_reward", -7]
    metrics = run("train_ppo.py", *flags, out="runs/ppo_cut")
    update = [m for m in metrics if "ended" in m][0]
    assert update["ended"] == 0 and update["reward"] == -7


# --- kill and resume, several processes ----------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(script, here):
    flags = ["--steps", 12, "--eval_every", 2]
    whole, killed = f"runs/whole_{script[6:-3]}", f"runs/killed_{script[6:-3]}"
    _, own = SCRIPTS[script]
    subprocess.run(**command(script, *own, *flags, "--out", whole), check=True, capture_output=True)
    kill_and_resume(script, [*own, *flags], killed, (2, 4, 5, 6, 8))
    states = [torch.load(f"{n}/state.pt", weights_only=True)["model"] for n in (whole, killed)]
    assert same(*states)
    figures = [
        [{k: v for k, v in m.items() if "second" not in k} for m in read_metrics(n)]
        for n in (whole, killed)
    ]
    assert figures[0] == figures[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_give_the_gradients_of_one(script, here):
    """After one step the optimizers' first moments are the gradients, up to a constant factor."""
    _, own = SCRIPTS[script]
    flags = [*own, "--steps", 1, "--grad_clip", 0]
    if script == "train_ppo.py":
        flags += ["--epochs", 1, "--minibatches", 1]
    one, two = f"runs/one_{script[6:-3]}", f"runs/two_{script[6:-3]}"
    moments = moments_of_two_processes(script, flags, one, two)
    assert len(moments[0]) > 5
    for a, b in zip(*moments):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)


# --- bad input -----------------------------------------------------------------------------------

BAD_PREFERENCES = {
    "equal completions": (
        '{"prompt": "a", "chosen": "b", "rejected": "b "}',
        "completions are equal",
    ),
    "ranking of one": ('{"prompt": "a", "ranking": ["b"]}', "two completions or more"),
    "empty completion": (
        '{"prompt": "a", "chosen": "b", "rejected": " "}',
        "a completion is empty",
    ),
    "prompt too long": (
        json.dumps({"prompt": "a" * 200, "chosen": "b", "rejected": "c"}),
        "the model reads 64",
    ),
}


@pytest.mark.parametrize("name", BAD_PREFERENCES)
@pytest.mark.parametrize("script", ["train_rm.py", "train_dpo.py"])
def test_wrong_preferences_are_refused(script, name, here, capsys):
    Path("bad.jsonl").write_text((json.dumps(PAIRS[0]) + "\n") * 30 + BAD_PREFERENCES[name][0])
    module, own = SCRIPTS[script]
    said = refused(capsys, module, *own, "--data", "bad.jsonl", "--out", "runs/refused")
    assert BAD_PREFERENCES[name][1] in said
    assert not Path("runs/refused").exists()


def test_a_missing_margin_is_refused(here, capsys):
    assert "needs a margin" in refused(capsys, train_rm, *RM, "--loss", "margin", "--out", "runs/x")


def test_a_reward_model_with_another_tokenizer_is_refused(here, capsys):
    pretrain(
        "--steps", 1, "--context", 64, "--tokenizer", "train", "--vocab_size", 280, out="runs/other"
    )
    train_sft.main(
        parse(
            train_sft.Config,
            train_sft.PRESETS,
            [
                *"--batch_size 4 --dtype fp32 --device cpu --context 48 --replay_data text.txt".split(),
                *"--data chats.jsonl --init runs/other --out runs/other_sft --steps 1".split(),
            ],
        )
    )
    run("train_rm.py", "--init", "runs/other_sft", "--steps", 1, out="runs/other_rm")
    capsys.readouterr()
    said = refused(capsys, train_ppo, *PPO, "--reward_model", "runs/other_rm", "--out", "runs/x")
    assert "another tokenizer" in said


PPO_REFUSES = {
    "prompt too long": (["--max_new_tokens", 60], "don't fit the model's context of 64"),
    "a model that isn't one of rewards": (["--reward_model", "runs/sft"], "is no reward model"),
    "no such reward model": (["--reward_model", "runs/none"], "runs/none"),
    "rules without answers": (["--reward", "rules", "--data", "pairs.jsonl"], 'needs an "answer"'),
    "a temperature of none": (["--temperature", 0], "--temperature 0 samples one completion only"),
    "a negative KL weight": (["--kl_coef", -1], "--kl_coef must be at least 0"),
}


@pytest.mark.parametrize("name", PPO_REFUSES)
def test_what_ppo_cannot_do_is_refused(name, here, capsys):
    flags, sentence = PPO_REFUSES[name]
    said = refused(
        capsys, train_ppo, *PPO, "--reward_model", "runs/rm", "--out", "runs/refused", *flags
    )
    assert sentence in said and not Path("runs/refused").exists()


def test_talking_with_a_reward_model_is_refused(here, capsys):
    assert "writes none" in refused(capsys, chat, "runs/rm", "--prompt", "hi")


def test_every_finished_run_shows_what_it_reached(here):
    assert result("runs/rm")["accuracy"] <= 1
    assert weights("runs/sft").keys() == weights("runs/whole_dpo").keys()
