"""What a run is made of: one process writes to its folder, it knows what it began from, and it goes
on only with the data and the models that it had. A refused --resume changes nothing, and a
downloaded model is itself after every script: template, ids, stops and logits stay.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import WORDS, command, in_new_folder, refused, run, turns
from test_downloaded import qwen3, transformers
from test_templates import base, theirs  # noqa: F401

import distill
import lora
import train_dpo
import train_grpo
import train_ppo
import train_pretrain
import train_rm
import train_sft
import train_vlm
from data.village import examples
from nanollm import evaluate, safetensors
from nanollm.checkpoint import is_adapter, is_scalar
from nanollm.config import lock_of, parse, save_config
from nanollm.formats import write_jsonl
from nanollm.hub import load_model, load_scalar, save_model
from nanollm.optim import build_optimizer
from nanollm.run import content_hash
from nanollm.tokenizer import Tokenizer

SMALL = "--batch_size 3 --dtype fp32 --device cpu --steps 2 --eval_every 2 --warmup 1 "
SHAPE = "--layers 1 --channels 32 --heads 2 "
INIT = SMALL + "--init runs/base "
LISTED = "--data asked.jsonl --max_new_tokens 8 "
SCRIPTS = {  # run -> (script, its flags)
    "pretrain": (train_pretrain, f"{INIT} --data text.txt --val_data val.txt --context 64"),
    "sft": (train_sft, f"{INIT} --data chats.jsonl --replay_data text.txt --context 96"),
    "rm": (train_rm, f"{INIT} --data pairs.jsonl"),
    "ppo": (train_ppo, f"{INIT} {LISTED} --reward_model runs/rm --eval_prompts 2"),
    "dpo": (train_dpo, f"{INIT} --data pairs.jsonl --eval_prompts 2 --adapter lora"),
    "grpo": (train_grpo, f"{INIT} {LISTED} --samples 2 --eval_samples 1"),
    "distill": (
        distill,
        f"{SMALL} {SHAPE} --mlp 32 --teacher runs/base --data chats.jsonl --max_new_tokens 4 "
        "--unlabelled 4 --test_data asked.jsonl",
    ),
    "lora": (
        lora,
        f"{INIT} --data chats.jsonl --context 96 --test_data asked.jsonl --other_data asked.jsonl "
        "--other_text text.txt",
    ),
}
SCRIPTS = {name: (module, flags.split()) for name, (module, flags) in SCRIPTS.items()}
READS = ("pretrain val_data", "sft init", "sft data", "sft replay_data", "ppo reward_model")
READS += ("distill teacher", "distill test_data")


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):  # noqa: F811
    """A directory with data, a downloaded model, and a run of each script from it."""
    with in_new_folder(tmp_path_factory) as folder:
        Path("val.txt").write_text("the cat sat on the log. " * 20)
        said = [turns(f"say {word}", word) for word in WORDS * 3]
        write_jsonl("chats.jsonl", [{"messages": messages} for messages in said])
        pairs = [{"prompt": f"say {w}", "chosen": f"{w} please", "rejected": w} for w in WORDS * 3]
        write_jsonl("pairs.jsonl", pairs)
        write_jsonl("asked.jsonl", [{"prompt": f"say {w}", "answer": w} for w in WORDS * 3])
        qwen3("runs/base", base)
        cfg = parse(train_pretrain.Config, None, ["--villagers", "64"])
        save_config(cfg, "runs/base/train_config.json")
        for name, (module, flags) in SCRIPTS.items():
            run(module, *flags, out=f"runs/{name}")
    return folder


def snapshot():
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def refused_without_a_trace(capsys, module, *flags):
    before = snapshot()
    capsys.readouterr()
    said = refused(capsys, module, *flags)
    assert snapshot() == before
    return said


@contextlib.contextmanager
def changed(path):
    """Inside, a file or model holds something else, of the same size, age and form."""
    path = Path(path)
    path = next(path.glob("*.bin"), path / "model.safetensors") if path.is_dir() else path
    before, stat = path.read_bytes(), path.stat()
    if path.suffix == ".safetensors":
        tensors = {name: x + 0.5 for name, x in safetensors.load_file(path).items()}
        safetensors.save_file(tensors, path)
    elif path.suffix == ".bin":
        path.write_bytes(before[:-2] + b"a\0")
    else:
        path.write_bytes(before.replace(b"cat", b"cow", 1).replace(b'"ant"', b'"yak"', 1))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.read_bytes() != before and path.stat().st_size == stat.st_size
    try:
        yield
    finally:
        path.write_bytes(before)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


# --- models stay themselves ----------------------------------------------------------------------

CHAT = turns("what is 2 + 3?", "5")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_downloaded_model_is_itself_after_every_script(here, name):
    out, known = Path("runs", name), Tokenizer.load("runs/base")
    model, tokenizer = (load_scalar if is_scalar(out) else load_model)(out)
    assert tokenizer == known and tokenizer.stop_ids == known.stop_ids
    if name == "distill":
        return  # whose student is new
    assert theirs(out, CHAT[:1], True) == theirs("runs/base", CHAT[:1], True)
    if is_adapter(out):
        return  # opened by peft: see test_lora.py
    kind = "SequenceClassification" if is_scalar(out) else "CausalLM"
    peer = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(out).eval()
    assert {*peer.config.eos_token_id} >= tokenizer.stop_ids
    ids = torch.tensor([theirs("runs/base", CHAT)])
    with torch.no_grad():
        ours, wanted = model(ids), peer(ids).logits
    if is_scalar(out):
        ours, wanted = ours[:, -1], wanted[:, 0] - model.shift
    assert torch.allclose(ours, wanted, atol=1e-5)


# --- a refused --resume --------------------------------------------------------------------------


@pytest.mark.parametrize("name, setting", map(str.split, READS))
def test_a_resume_with_other_data_or_another_model_is_refused(here, capsys, name, setting):
    module, flags = SCRIPTS[name]
    named = flags[flags.index(f"--{setting}") + 1]
    with changed(named):
        said = refused_without_a_trace(capsys, module, "--out", f"runs/{name}", "--resume")
    assert f"--{setting} {named} holds something else than when the checkpoint" in said


def test_a_model_is_known_by_its_weights_and_a_folder_of_texts_by_all_of_them(here, tmp_path):
    copied = shutil.copytree("runs/base", tmp_path / "base")
    (copied / "evaluation.json").write_text("{}")
    assert content_hash(copied) == content_hash(Path("runs/base"))
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("a")
    known = content_hash(texts)
    (texts / "a.txt").write_text("b")
    assert content_hash(texts) != known


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_refused_resume_changes_nothing_on_disk(here, capsys, name):
    (module, _), folder = SCRIPTS[name], Path("runs", name)
    used = json.loads((folder / "train_config.json").read_text())["optimizer"]
    for flags, why in (
        (["--optimizer", "muon" if used == "adamw" else "adamw"], "another shape than the flags"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    ):
        said = refused_without_a_trace(capsys, module, "--out", folder, "--resume", *flags)
        assert why in said
    run(module, "--resume", out=folder)  # the right command is not refused


# --- one process for a folder --------------------------------------------------------------------


@contextlib.contextmanager
def held(folder):
    """Inside, another process writes to the folder; it is killed, and so leaves its lock."""
    code = f"from nanollm.config import lock; lock({str(folder)!r}); print(flush=True); input()"
    how = command("", "-c", code) | {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    how["args"] = [sys.executable, "-c", code]
    process = subprocess.Popen(**how)
    process.stdout.readline()
    yield
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_folder_that_another_process_writes_is_refused(here, capsys):
    module, flags = SCRIPTS["pretrain"]
    with held("runs/pretrain"):
        for more in (["--resume"], flags):
            said = refused_without_a_trace(capsys, module, "--out", "runs/pretrain", *more)
            assert "is being written by another process" in said
    assert lock_of("runs/pretrain").exists()
    run(module, "--resume", out="runs/pretrain")  # the lock counts for nothing any more
    assert not lock_of("runs/pretrain").exists()


# --- where a run comes from ----------------------------------------------------------------------


@pytest.fixture
def of_run(monkeypatch):
    """examples.of_run, which gives (villagers, seed, megabytes) of what it would make."""

    def prepare(n_villagers=32, seed=0, megabytes=8.0):
        return n_villagers, seed, megabytes

    monkeypatch.setattr(examples, "prepare", prepare)
    return examples.of_run


OF_64 = {"villagers": 64, "seed": 3, "megabytes": 1.0, "init": None}
CHAINS = {  # settings of a run -> the village
    "it says so itself": (OF_64, (64, 3, 1.0)),
    "as the earlier run was then": ({"init": "runs/gone", "began_from": OF_64}, (64, 3, 1.0)),
    "two runs ago": ({"init": "x", "began_from": {"init": "y", "began_from": OF_64}}, (64, 3, 1.0)),
    "a downloaded model": ({"init": "owner/name", "began_from": None}, (32, 0, 8.0)),
    "nothing": ({"init": None}, (32, 0, 8.0)),
}


@pytest.mark.parametrize("settings, village", CHAINS.values(), ids=CHAINS)
def test_a_run_is_asked_about_its_own_village(tmp_path, of_run, settings, village):
    (tmp_path / "train_config.json").write_text(json.dumps(settings))
    assert of_run(tmp_path) == village


@pytest.mark.parametrize("name, origin", [("sft", "init"), ("distill", "teacher")])
def test_a_run_keeps_the_settings_of_the_one_it_began_from(here, of_run, name, origin):
    then = json.loads(Path("runs/base/train_config.json").read_text())
    now = json.loads(Path(f"runs/{name}/train_config.json").read_text())
    assert now[origin] == "runs/base" and now["began_from"] == then
    os.rename("runs/base", "runs/elsewhere")
    asked = of_run(f"runs/{name}")
    os.rename("runs/elsewhere", "runs/base")
    assert asked == (then["villagers"], then["seed"], then["megabytes"])


# --- what is evaluated stays as it is ------------------------------------------------------------


def test_a_downloaded_folder_is_not_written_to(here, capsys):
    save_model(*load_model("runs/base"), "mine")
    flags = ["--data", "asked.jsonl", "--max_new_tokens", "4", "--dtype", "fp32"]
    for model, more, written in (
        ("mine", [], set()),
        ("mine", ["--out", "found.json"], {Path("found.json")}),
        ("runs/sft", [], {Path("runs/sft/evaluation.json")}),
    ):
        before = snapshot()
        evaluate.main(parse(evaluate.Config, None, [model, *flags, *more]))
        assert snapshot().keys() - before.keys() == written
        assert ("--out FILE keeps the result" in capsys.readouterr().out) == (not written)
        for path in written:
            path.unlink()


# --- rates for models that others have trained ----------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_preset_for_downloaded_models_has_rates_for_them(name):
    module, _ = SCRIPTS[name]
    cfg = parse(module.Config, module.PRESETS, ["--preset", "downloaded"])
    assert cfg.optimizer == "adamw" and cfg.lr <= 2e-4 and cfg.checkpoint_activations


def test_rates_of_a_tiny_model_for_a_large_one_are_said(here, capsys, monkeypatch):
    monkeypatch.setattr("nanollm.run.LARGE_MODEL", 1000)
    module, flags = SCRIPTS["sft"]
    for more, noted in ([], True), (["--optimizer", "adamw", "--lr", "1e-5"], False):
        capsys.readouterr()
        run(module, *flags, *more, out="runs/rates")
        assert ("--preset downloaded" in capsys.readouterr().out) == noted


def test_the_projector_of_a_downloaded_model_learns_at_the_papers_rate():
    flags = "--preset downloaded --stage align --vision tower".split()
    cfg = train_vlm.complete_settings(parse(train_vlm.Config, train_vlm.PRESETS, flags))
    model = torch.nn.ModuleDict({"projector": torch.nn.Linear(2, 2)})
    rates = [group["lr"] for group in build_optimizer(model, cfg).groups()]
    assert rates == pytest.approx([1e-3, 1e-3]) and cfg.optimizer == "adamw"
    flags = "--preset downloaded --stage instruct --lr 1e-5".split()
    cfg = train_vlm.complete_settings(parse(train_vlm.Config, train_vlm.PRESETS, flags))
    assert cfg.lr == 1e-5 and cfg.batch_size == 128  # what is typed wins
