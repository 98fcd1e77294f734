"""lora.py, run for real on small data: every method learns, what is saved opens, resume, refuse."""

import json
from pathlib import Path

import pytest
import torch
from helpers import interrupted_and_resumed, moments_of_two_processes, refused, result, same
from helpers import run as run_script

import lora
import train_pretrain
import train_sft
from nanollm.formats import read_examples
from nanollm.hub import load_model
from nanollm.metrics import accuracy_by_task
from nanollm.peft.adapters import METHODS
from nanollm.run import read_metrics

MACHINE = "--dtype fp32 --device cpu --batch_size 4".split()
OWN = (
    MACHINE
    + (
        "--init runs/sft --data new.jsonl --test_data new_test.jsonl --other_data old_test.jsonl "
        "--other_text text.txt --context 48 --warmup 2 --virtual_tokens 4 --hidden 16 --rank 4 "
        "--alpha 8"
    ).split()
)
RATES = {"prefix": 0.02, "ptuning": 0.1, "prompt": 0.1, "none": 0.003}  # of the others: 0.02


def examples_of(pairs):
    return [
        {"prompt": f"say {letter} {n}", "answer": answer, "check": "exact", "task": "say"}
        for n in range(15)
        for letter, answer in pairs
    ]


def dialogues(examples):
    turns = [(("user", e["prompt"]), ("assistant", e["answer"])) for e in examples]
    return [{"messages": [{"role": r, "content": c} for r, c in each]} for each in turns]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model that says the letter that it is told, and a new domain in which it says d."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("text.txt").write_text("the cat sat on the mat. the dog sat on the log. " * 150)
        old, new = examples_of(["aa", "bb", "cc", "dd"]), examples_of(["ed", "fd", "gd", "hd"])
        files = {"chats": dialogues(old), "new": dialogues(new)}
        files |= {"old_test": old[:16], "new_test": new[:16]}
        for name, records in files.items():
            Path(f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        flags = "--layers 1 --channels 32 --heads 2 --tokenizer bytes --data text.txt".split()
        flags += "--context 64 --sample_tokens 8 --steps 40 --eval_every 40".split()
        run_script(train_pretrain, *MACHINE, *flags, out="runs/pretrain")
        flags = "--data chats.jsonl --init runs/pretrain --context 48 --replay 0".split()
        flags += "--steps 250 --eval_every 250".split()
        run_script(train_sft, *MACHINE, *flags, out="runs/sft")
    return folder


@pytest.fixture
def here(trained, monkeypatch):
    monkeypatch.chdir(trained)


def run(*flags, out="runs/new"):
    run_script(lora, *OWN, *flags, out=out)
    return result(out)


@pytest.mark.parametrize("method", [*METHODS, "none"])
def test_every_method_learns_a_new_answer_and_what_it_saves_answers_so(method, here):
    base = Path("runs/sft/model.safetensors").read_bytes()
    out, rate = f"runs/{method}", RATES.get(method, 0.02)
    flags = ["--adapter", method, "--lr", rate, "--steps", 120, "--eval_every", 120]
    found = run(*flags, out=out)
    assert found["before"]["accuracy"] < 0.3 and found["after"]["accuracy"] >= 0.95
    model, tokenizer = load_model(out)
    tasks, _ = accuracy_by_task(model, tokenizer, read_examples("new_test.jsonl"))
    assert tasks["say"]["accuracy"] == pytest.approx(found["after"]["accuracy"], abs=0.07)
    weights = "model.safetensors" if method == "none" else "adapter_model.safetensors"
    assert [path.name for path in Path(out).glob("*.safetensors")] == [weights]
    assert found["file_bytes"] == Path(out, weights).stat().st_size
    all_parameters = sum(p.numel() for p in load_model("runs/sft")[0].parameters())
    assert found["trained_share"] == found["trained_parameters"] / all_parameters
    assert (found["trained_share"] < 1) == (method != "none")
    assert Path("runs/sft/model.safetensors").read_bytes() == base


def test_the_effects_say_what_was_gained_and_what_was_forgotten(here):
    found = run("--steps", 2, "--eval_every", 2)
    before, after = found["before"], found["after"]
    names = ["accuracy", "elsewhere", "bits_per_byte"]
    pairs = [(each["before"], each["after"]) for each in found["effects"]]
    assert pairs == [(before[name], after[name]) for name in names]


def test_training_holds_the_weights_and_of_what_is_trained_gradients_and_two_moments(here):
    found = run("--steps", 1, "--adapter", "none")
    steps = found["state_bytes"] - 4 * (4 * found["trained_parameters"])
    assert 0 < steps < 100_000  # tables of angles, and the counters of AdamW
    assert run("--steps", 1)["state_bytes"] < found["state_bytes"] / 2


def test_each_method_has_rates_of_its_own_unless_they_are_given(here):
    def rates(*flags):
        run("--steps", 1, "--eval_every", 1, *flags)
        saved = json.loads(Path("runs/new/train_config.json").read_text())
        return saved["lr"], saved["weight_decay"]

    assert rates() == (5e-3, 6.0)
    assert rates("--adapter", "prefix", "--lr", 1e-5) == (1e-5, 0.0)
    assert rates("--weight_decay", 0) == (5e-3, 0.0)


# --- resume, several processes -------------------------------------------------------------------


@pytest.mark.parametrize("method", ["qlora", "prefix"])
def test_an_interrupted_and_resumed_run_equals_a_whole_one_bit_for_bit(method, here):
    flags = [*OWN, "--adapter", method, "--steps", 8, "--eval_every", 2]
    folders = whole, killed = f"runs/whole-{method}", f"runs/killed-{method}"
    run_script(lora, *flags, out=whole)
    interrupted_and_resumed(lora, *flags, out=killed, last=5)  # a step after the checkpoint
    assert same(*(torch.load(f"{f}/state.pt", weights_only=True)["model"] for f in folders))
    first, second = map(result, folders)
    assert all(first[name] == second[name] for name in ("before", "after", "effects"))
    assert [m["step"] for m in read_metrics(whole)] == [m["step"] for m in read_metrics(killed)]


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_two_processes_give_the_gradients_of_one(method, here):
    """After one step the optimizer's first moments are the gradients, up to a constant factor."""
    flags = [*OWN, "--adapter", method, "--steps", "1", "--grad_clip", "0"]
    moments = moments_of_two_processes("lora.py", flags, "runs/one", "runs/two")
    assert moments[0]
    for a, b in zip(*moments):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)


# --- bad input -----------------------------------------------------------------------------------

REFUSED = {
    "rank 0": (["--rank", 0], "--rank must be at least 1"),
    "alpha 0": (["--alpha", 0], "--alpha must be more than 0"),
    "no virtual tokens": (["--virtual_tokens", 0], "--virtual_tokens must be at least 1"),
    "targets that match nothing": (["--targets", "magic"], "--targets magic matches no linear"),
    "an unknown method": (["--adapter", "magic"], "--adapter must be one of lora, dora"),
    "no test examples": (["--test_data", "none"], "needs --test_data"),
    "no such model": (["--init", "runs/missing"], "runs/missing"),
    "itself": (["--out", "runs/sft"], "would replace"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_do_is_refused_in_one_line(case, here, capsys):
    flags, sentence = REFUSED[case]
    said = refused(capsys, lora, *OWN, "--out", "runs/refused", *flags)
    assert sentence in said and not Path("runs/refused").exists()


def test_a_gradient_that_is_no_number_ends_the_run_and_the_last_checkpoint_stays(here, capsys):
    run("--steps", 2, "--eval_every", 2, out="runs/finite")
    before = Path("runs/finite/adapter_model.safetensors").read_bytes()
    flags = ["--out", "runs/finite", "--resume", "--steps", 20, "--eval_every", 20]
    said = refused(capsys, lora, *flags, "--lr", 1e30, "--weight_decay", 0)
    assert "became" in said
    assert Path("runs/finite/adapter_model.safetensors").read_bytes() == before
