"""lora.py, run for real on small data: every method learns, what is saved opens, resume, refuse."""

import json
import sys
from pathlib import Path

import pytest
import torch

import lora
from nanollm import comparison
from nanollm.config import parse
from nanollm.formats import read_examples
from nanollm.hub import load_model
from nanollm.metrics import accuracy_by_task
from nanollm.run import read_metrics
from tests.test_adapter_runs import Killed, interrupt
from tests.test_train import moments_of_two_processes, pretrain, refused, same, sft

OWN = (
    "--dtype fp32 --device cpu --init runs/sft --data new.jsonl --test_data new_test.jsonl "
    "--other_data old_test.jsonl --other_text text.txt --batch_size 4 --context 48 --warmup 2 "
    "--targets all --optimizer adamw --virtual_tokens 4 --hidden 16"
).split()
RATES = {"prefix": 0.02, "ptuning": 0.1, "prompt": 0.1, "full": 0.003}


def examples_of(pairs, n):
    return [
        {"prompt": f"say {c} {k}", "answer": answer, "check": "exact", "task": "say"}
        for k in range(n)
        for c, answer in pairs
    ]


def dialogues(examples):
    return [
        {
            "messages": [
                {"role": "user", "content": i["prompt"]},
                {"role": "assistant", "content": i["answer"]},
            ]
        }
        for i in examples
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model that says the letter that it is told, and a new domain in which it says d."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("text.txt").write_text("the cat sat on the mat. the dog sat on the log. " * 150)
        old, new = (
            examples_of(["aa", "bb", "cc", "dd"], 15),
            examples_of(["ed", "fd", "gd", "hd"], 15),
        )
        files = {"chats": dialogues(old), "new": dialogues(new)}
        files |= {"old_test": old[:16], "new_test": new[:16]}
        for name, records in files.items():
            Path(f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        pretrain("--steps", 40, "--eval_every", 40, "--context", 64)
        sft("--steps", 250, "--eval_every", 250, "--replay", 0)
    return folder


@pytest.fixture
def here(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return trained


def run(*flags, out="runs/new"):
    lora.main(parse(lora.Config, lora.PRESETS, [*OWN, "--out", out, *map(str, flags)]))
    return json.loads(Path(out, "result.json").read_text())


@pytest.mark.parametrize("method", lora.RATES)
def test_every_method_learns_a_new_answer_and_what_it_saves_answers_so(method, here):
    rate = RATES.get(method, 0.02)
    flags = ["--method", method, "--rank", 4, "--alpha", 8, "--lr", rate]
    result = run(*flags, "--steps", 120, "--eval_every", 120, out=f"runs/{method}")
    assert result["before"]["accuracy"] < 0.3
    assert result["after"]["accuracy"] >= 0.95
    assert (result["trained_share"] < 0.9) == (method != "full")
    model, tokenizer = load_model(f"runs/{method}")
    tasks, _ = accuracy_by_task(model, tokenizer, read_examples("new_test.jsonl"))
    assert tasks["say"]["accuracy"] == pytest.approx(result["after"]["accuracy"], abs=0.07)
    saved = {p.name for p in Path(f"runs/{method}").glob("*.safetensors")}
    weights = "model" if method == "full" else "adapter_model"
    assert saved == {f"{weights}.safetensors"}
    assert result["file_bytes"] == Path(f"runs/{method}/{weights}.safetensors").stat().st_size


def test_the_base_is_left_as_it_was(here):
    before = Path("runs/sft/model.safetensors").read_bytes()
    run("--steps", 2, "--eval_every", 2)
    assert Path("runs/sft/model.safetensors").read_bytes() == before
    assert not Path("runs/new/model.safetensors").exists()


def test_several_methods_and_ranks_make_a_table(here, monkeypatch):
    """Each run gets a process; here it gets the same words in this one."""
    words = []

    def call(arguments):
        words.append(arguments[:2])
        lora.main(parse(lora.Config, lora.PRESETS, arguments[2:]))
        return 0

    monkeypatch.setattr(comparison.subprocess, "call", call)
    flags = ["--compare", "full,lora,prefix", "--ranks", "1,4", "--steps", 2, "--eval_every", 2]
    flags = [*OWN, "--out", "runs/table", *map(str, flags)]
    lora.main(parse(lora.Config, lora.PRESETS, flags))
    assert words == [[sys.executable, lora.__file__]] * 4
    lines = Path("runs/table/table.md").read_text().splitlines()
    assert [line.split()[1] for line in lines[3:]] == ["full", "lora-1", "lora-4", "prefix"]
    table = json.loads(Path("runs/table/table.json").read_text())
    assert table["lora-4"]["trained_parameters"] == 4 * table["lora-1"]["trained_parameters"]
    assert table["lora-1"]["state_bytes"] < table["full"]["state_bytes"]


# --- resume, several processes -------------------------------------------------------------------


@pytest.mark.parametrize("method", ["qlora", "prefix"])
def test_an_interrupted_and_resumed_run_equals_a_whole_one_bit_for_bit(method, here, monkeypatch):
    flags = ["--method", method, "--steps", 8, "--eval_every", 2]
    whole, killed = f"runs/whole-{method}", f"runs/killed-{method}"
    run(*flags, out=whole)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        interrupt(patch, 5)  # a step after the checkpoint
        run(*flags, out=killed)
    torch.manual_seed(99)
    lora.main(parse(lora.Config, lora.PRESETS, ["--out", killed, "--resume"]))
    states = [torch.load(f"{n}/state.pt", weights_only=True)["model"] for n in (whole, killed)]
    assert same(*states)
    results = [json.loads(Path(n, "result.json").read_text()) for n in (whole, killed)]
    assert results[0]["before"] == results[1]["before"]
    assert results[0]["after"] == results[1]["after"]
    assert [m["step"] for m in read_metrics(whole)] == [m["step"] for m in read_metrics(killed)]


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_two_processes_give_the_gradients_of_one(method, here):
    """After one step the optimizer's first moments are the gradients, up to a constant factor."""
    flags = [*OWN, "--method", method, "--steps", "1", "--grad_clip", "0"]
    moments = moments_of_two_processes("lora.py", flags, "runs/one", "runs/two")
    assert moments[0]
    for a, b in zip(*moments):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)


# --- bad input -----------------------------------------------------------------------------------

REFUSED = {
    "rank 0": (["--rank", 0], "--rank must be at least 1"),
    "an adapter of width 0": (["--method", "adapter", "--rank", 0], "--rank must be at least 1"),
    "targets that match nothing": (["--targets", "magic"], "magic"),
    "no virtual tokens": (["--method", "prompt", "--virtual_tokens", 0], "--virtual_tokens"),
    "virtual tokens beyond the context": (
        ["--method", "prefix", "--virtual_tokens", 5000],
        "--virtual_tokens 5000 fill the model's context",
    ),
    "alpha 0": (["--alpha", 0], "--alpha must be more than 0"),
    "an unknown method": (["--method", "magic"], "--method"),
    "an unknown method to compare": (["--compare", "full,magic"], "--compare magic"),
    "ranks that are no numbers": (["--compare", "lora", "--ranks", "a"], "--ranks wants"),
    "no test examples": (["--test_data", "none"], "needs --test_data"),
    "no such model": (["--init", "runs/none"], "runs/none"),
    "itself": (["--out", "runs/sft"], "would replace"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_do_is_refused_in_one_line(name, here, capsys):
    flags, sentence = REFUSED[name]
    said = refused(capsys, lora, *OWN, "--out", "runs/refused", *flags)
    assert sentence in said and not Path("runs/refused").exists()
