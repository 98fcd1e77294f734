"""GRPO, run for real on small data: what it learns, resume, share, refuse."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

import train_grpo
from nanollm import evaluate
from nanollm.config import parse
from nanollm.hub import load_model
from nanollm.run import read_metrics
from tests.test_train import (
    command,
    kill_and_resume,
    moments_of_two_processes,
    pretrain,
    refused,
    same,
    sft,
)

OWN = (
    "--dtype fp32 --device cpu --init runs/sft --data problems.jsonl --max_new_tokens 12 "
    "--batch_size 4 --samples 4 --accumulate 2 --eval_examples 4 --eval_samples 2"
).split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a model fine-tuned to say one of four letters, and problems that want b."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("text.txt").write_text("the cat sat on the mat. the dog sat on the log. " * 150)
        turns = [
            [{"role": "user", "content": f"say {n % 20}"}, {"role": "assistant", "content": c}]
            for n, c in enumerate("abcd" * 15)
        ]
        problems = [{"prompt": f"say {n}", "answer": "b", "check": "exact"} for n in range(40)]
        files = {"chats": [{"messages": t} for t in turns], "problems": problems}
        for name, records in files.items():
            Path(f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        pretrain("--steps", 40, "--eval_every", 40, "--context", 64)
        sft("--steps", 200, "--eval_every", 200, "--replay", 0)
    return folder


@pytest.fixture
def here(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return trained


def grpo(*flags, out="runs/grpo"):
    arguments = [*OWN, "--out", out, *map(str, flags)]
    train_grpo.main(parse(train_grpo.Config, train_grpo.PRESETS, arguments))
    return read_metrics(out)


@pytest.mark.parametrize("loss", train_grpo.VARIANTS)
def test_every_loss_makes_right_answers_more_likely(loss, here):
    flags = ["--loss", loss, "--steps", 14, "--eval_every", 14, "--lr", 1e-3, "--warmup", 2]
    metrics = grpo(*flags, "--batch_size", 16, "--kl_coef", 0.01)
    right = [m["accuracy"] for m in metrics if "accuracy" in m]
    assert sum(right[-3:]) / 3 > right[0] + 0.15
    first = next(m for m in metrics if "kl" in m)
    assert first["kl"] == 0.0 and first["clip_fraction"] == 0.0  # still the reference
    wanted = "reward accuracy equal_groups length truncated entropy grad_norm"
    assert set(wanted.split()) <= set(first)


def test_inner_updates_leave_the_policy_that_sampled(here):
    one, two = (
        grpo("--steps", 1, "--inner_updates", n, "--lr", 0.01, "--warmup", 0)[-2:] for n in (1, 3)
    )
    assert one[0]["clip_fraction"] == 0 and two[0]["clip_fraction"] > 0


def test_groups_with_equal_rewards_are_sampled_again(here):
    flags = ["--steps", 2, "--dynamic_sampling", "--temperature", 0.7]
    metrics = [m for m in grpo(*flags) if "equal_groups" in m]
    assert metrics and all(m["grad_norm"] > 0 for m in metrics if m["equal_groups"] < 1)


def test_long_answers_cost_where_a_buffer_is_set(here):
    plain = [m for m in grpo("--steps", 1, "--max_new_tokens", 8) if "reward" in m][0]
    dear = grpo("--steps", 1, "--max_new_tokens", 8, "--overlong_buffer", 8)
    assert [m for m in dear if "reward" in m][0]["reward"] < plain["reward"]


def test_the_same_problem_is_answered_all_through_training(here):
    grpo("--steps", 4, "--eval_every", 2, out="runs/seen")
    samples = Path("runs/seen/samples.txt").read_text()
    assert samples.count("--- step") == 3 and samples.count("say ") == 3
    result = json.loads(Path("runs/seen/result.json").read_text())
    assert {"greedy", "sampled", "maj", "pass"} <= set(result["before"]["all"])


def test_evaluate_counts_votes_and_passes(here, capsys):
    flags = ["runs/sft", "--data", "problems.jsonl", "--samples", "4", "--dtype", "fp32"]
    evaluate.main(parse(evaluate.Config, None, [*flags, "--out", "evaluation.json"]))
    said, found = capsys.readouterr().out, json.loads(Path("evaluation.json").read_text())
    assert "maj@4" in said and "pass@4" in said
    figures = found["sampled"]["all"]
    assert figures["sampled"] <= figures["pass"] and figures["n"] == 40


# --- kill and resume, several processes ----------------------------------------------------------


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(here):
    flags = [*OWN, "--steps", "12", "--eval_every", "2", "--kl_coef", "0.1", "--inner_updates", "2"]
    whole, killed = "runs/whole", "runs/killed"
    start = command("train_grpo.py", *flags, "--out", whole)
    subprocess.run(**start, check=True, capture_output=True)
    kill_and_resume("train_grpo.py", flags, killed, (2, 4, 5, 6, 8))
    states = [torch.load(f"{n}/state.pt", weights_only=True)["model"] for n in (whole, killed)]
    assert same(*states)
    figures = [
        [{k: v for k, v in m.items() if "second" not in k} for m in read_metrics(n)]
        for n in (whole, killed)
    ]
    assert figures[0] == figures[1]


@pytest.mark.parametrize("loss", ["grpo", "reinforce_pp"])
def test_two_processes_give_the_gradients_of_one(loss, here):
    """After one step the optimizer's first moments are the gradients, up to a constant factor."""
    flags = [*OWN, "--steps", "1", "--grad_clip", "0", "--loss", loss, "--kl_coef", "0.1"]
    moments = moments_of_two_processes("train_grpo.py", flags, "runs/one", "runs/two")
    assert len(moments[0]) > 5
    for a, b in zip(*moments):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)


# --- bad input -----------------------------------------------------------------------------------

REFUSED = {
    "prompt too long": (["--max_new_tokens", 60], "don't fit the model's context of 64"),
    "a group of one": (["--samples", 1], "makes no group"),
    "no answers": (["--data", "chats.jsonl"], 'problems with an "answer"'),
    "tasks that don't exist": (["--tasks", "riddles"], "no problems of riddles"),
    "an endless temperature": (["--temperature", "inf"], "--temperature must be finite"),
    "a temperature of none": (["--temperature", 0], "--temperature 0 gives a group of equal"),
    "tasks of other data": (["--preset", "zero"], "only of all; choose with --tasks, or --f"),
    "images for a model without eyes": (["--data", "images"], "this model reads text only"),
    "no such model": (["--init", "runs/none"], "runs/none"),
    "an unknown loss": (["--loss", "ppo"], "--loss"),
    "a negative clip": (["--clip_low", -1], "--clip_low must be at least 0"),
    "itself": (["--out", "runs/sft"], "would replace"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_grpo_cannot_do_is_refused(name, here, capsys):
    flags, sentence = REFUSED[name]
    said = refused(capsys, train_grpo, *OWN, "--out", "runs/refused", *flags)
    assert sentence in said and not Path("runs/refused").exists()
    assert not list(Path("data/cache").glob("images*"))  # nothing was painted for it


def test_without_rewards_nothing_begins(here, capsys, monkeypatch):
    monkeypatch.setattr(train_grpo, "REWARDS", ())
    assert "REWARDS in train_grpo.py is empty" in refused(capsys, train_grpo, *OWN)


def test_a_bad_problem_leaves_the_run_in_its_place(here, capsys):
    grpo("--steps", 1, "--eval_every", 1, out="runs/kept")
    good = Path("problems.jsonl").read_text()
    Path("bad.jsonl").write_text(good + json.dumps({"prompt": "a", "answer": "b", "not": 5}))
    capsys.readouterr()
    said = refused(capsys, train_grpo, *OWN, "--out", "runs/kept", "--data", "bad.jsonl")
    assert 'bad.jsonl, line 41: "not" must be a list of texts' in said
    assert not Path("runs/kept.previous").exists() and Path("runs/kept/state.pt").exists()


def test_a_completion_can_be_made_to_begin_as_asked(here):
    model, tokenizer = load_model("runs/sft")
    examples = evaluate.read_examples("problems.jsonl")[:2]
    free = evaluate.accuracy_by_task(model, tokenizer, examples, 4)[1]
    begun = evaluate.accuracy_by_task(model, tokenizer, examples, 4, begin="b")[1]
    assert all(completion.startswith("b") for completion in begun) and len(free) == len(begun)


def test_gsm8k_is_read_as_test_examples(tmp_path):
    answer = "2 * 600 = <<2*600=1200>>1200\n#### 1,200"
    record = {"question": "2 eggs at 600 each?", "answer": answer}
    (tmp_path / "gsm.jsonl").write_text(json.dumps(record) + "\n")
    (example,) = evaluate.read_examples(tmp_path / "gsm.jsonl")
    assert example["messages"] == [{"role": "user", "content": "2 eggs at 600 each?"}]
    assert example["answer"] == "1200" and example["check"] == "number"
    assert evaluate.is_right(example, "<think>2 * 600 = 1200.</think>It costs 1,200.")
    assert not evaluate.is_right(example, "It costs 1,20.")


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--overlong_buffer", 13], "--overlong_buffer 13"),
        (["--knowledge", "people.jsonl"], "add --tools"),
    ],
)
def test_settings_that_could_mean_nothing_are_refused(flags, said, here, capsys):
    assert said in refused(capsys, train_grpo, *OWN, *flags)
