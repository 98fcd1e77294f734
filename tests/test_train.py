"""Pretraining and fine-tuning, run for real on small data: what they learn, resume, refuse, and
share between processes.
"""

import errno
import importlib
import json
import math
import random
import subprocess
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import transformers
from helpers import (
    ON_CPU,
    TINY,
    WORDS,
    assert_resumes,
    begin,
    close,
    command,
    free_port,
    in_new_folder,
    moments_of_two_processes,
    refused,
    result,
    run,
    same,
    say,
    turns,
    weights,
)

import train_pretrain
import train_sft
from nanollm import chat, runtime
from nanollm.config import UserError, comments_of, parse
from nanollm.formats import mixture, write_jsonl
from nanollm.hub import load_model
from nanollm.run import effect, effect_line, read_metrics
from nanollm.runtime import Runtime, peak_memory, start

SFT = [*ON_CPU, *"--context 48 --replay_data text.txt --data chats.jsonl".split()]
SFT += "--init runs/pretrain".split()


@pytest.fixture
def here(tmp_path_factory):
    """An empty directory with a text and some dialogues in it."""
    with in_new_folder(tmp_path_factory) as folder:
        write_jsonl("chats.jsonl", [say(w, w) for w in WORDS * 3])
        yield folder


def pretrain(*flags, out="runs/pretrain"):
    return run(train_pretrain, *TINY, *flags, out=out)


def sft(*flags, out="runs/sft"):
    return run(train_sft, *SFT, *flags, out=out)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# --- learning ------------------------------------------------------------------------------------


def test_pretraining_learns_a_repeated_sentence_by_heart(here):
    flags = ["--context", 32, "--steps", 120, "--eval_every", 120, "--lr", 0.01]
    metrics = pretrain(*flags)
    assert metrics[0]["loss"] > 3 and metrics[-1]["bits_per_byte"] < 0.4


def test_fine_tuning_learns_to_say_what_it_is_told(here):
    pretrain("--steps", 60, "--eval_every", 60)
    metrics = sft("--steps", 150, "--eval_every", 150, "--replay", 0)
    assert metrics[-1]["val_loss"] < 0.1 * math.log(256)


def test_a_run_folder_names_its_effects_and_opens_in_transformers_with_our_logits_and_ids(here):
    pretrain("--steps", 3)
    sft("--steps", 3)
    for each in result("runs/pretrain")["effects"] + result("runs/sft")["effects"]:
        assert each.keys() == effect("", None, 0.0).keys() and each["after"] is not None
    ours, tokenizer = load_model("runs/sft")
    theirs = transformers.AutoModelForCausalLM.from_pretrained("runs/sft", dtype=torch.float32)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained("runs/sft")
    ids, _ = tokenizer.render(turns("say owl"), generation_prompt=True)
    how = {"add_generation_prompt": True, "return_dict": False}
    assert their_tokenizer.apply_chat_template(turns("say owl"), **how) == ids
    close(ours(torch.tensor([ids])), theirs(torch.tensor([ids])).logits)


def test_without_replay_no_text_is_read_unless_it_is_named(here, monkeypatch):
    """Neither the village nor its held-out text: a foreign model has nothing to do with it."""
    pretrain("--steps", 2)
    monkeypatch.setattr(train_sft.village, "prepare", lambda *args: pytest.fail("a village"))
    flags = "--context 48 --data chats.jsonl --init runs/pretrain --replay 0 --steps 2".split()
    run(train_sft, *ON_CPU, *flags, out="runs/sft")
    assert result("runs/sft")["after"]["bits_per_byte"] is None
    sft("--replay", 0, "--steps", 2, out="runs/named")
    assert result("runs/named")["after"]["bits_per_byte"] > 0


def test_an_effect_is_a_line_of_text():
    assert effect_line(effect("gold score", 0.681, 0.94)) == "gold score: 0.681 -> 0.94"
    assert effect_line(effect("right", None, 0.5, "share")) == "right: 50.0%"


# --- kill and resume -----------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["train_pretrain.py", "train_sft.py"])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(script, here):
    pretrain("--steps", 24, "--eval_every", 24)
    flags = [*(SFT if script == "train_sft.py" else TINY), "--steps", 24, "--eval_every", 4]
    assert_resumes(script, flags, last=22)  # two steps after a checkpoint


@pytest.mark.parametrize("script", ["train_pretrain.py", "train_sft.py"])
def test_a_mixture_of_files_resumes_bit_for_bit_unless_one_has_changed(script, here, capsys):
    Path("b.txt").write_text("a goat by the mill. " * 300)
    write_jsonl("b.jsonl", [say(w, w.upper()) for w in WORDS * 3])
    pretrain("--steps", 4)
    sft = script == "train_sft.py"
    data = "chats.jsonl:0.6,b.jsonl:0.4" if sft else "text.txt:3,b.txt:1"
    flags = [*(SFT if sft else TINY), "--steps", 12, "--eval_every", 4]
    _, killed = assert_resumes(script, [*flags, "--data", data, "--accumulate", 2], last=10)
    last, shares = read_metrics(killed)[-1], mixture(data)
    each = sum(share * last[f"val_loss of {name}"] for name, share in shares.items())
    assert last["val_loss"] == pytest.approx(each)
    changed = Path("b.jsonl" if sft else "b.txt")
    changed.write_text(changed.read_text().replace("mill", "pond").replace("OWL", "owl"))
    with pytest.raises(UserError, match="holds something else"):
        run(importlib.import_module(Path(script).stem), "--resume", out=killed)


def test_a_process_that_was_killed_is_resumed_to_the_same_weights(here):
    flags = ["--steps", 24, "--eval_every", 4]
    pretrain(*flags)
    process = begin("train_pretrain.py", *TINY, *flags, "--out", "runs/killed_process")
    while process.is_alive() and not Path("runs/killed_process/state.pt").exists():
        time.sleep(0.005)
    process.kill()
    process.join()
    run(train_pretrain, "--resume", out="runs/killed_process")
    assert same(weights("runs/pretrain"), weights("runs/killed_process"))


def test_a_finished_run_resumes_to_itself_and_another_one_moves_it_out_of_the_way(here):
    pretrain("--steps", 4)
    before = weights("runs/pretrain")
    pretrain("--steps", 4, "--resume")
    assert same(before, weights("runs/pretrain"))
    pretrain("--steps", 2, "--seed", 1)
    assert same(before, weights("runs/pretrain.previous"))


def test_the_precision_that_was_measured_is_kept_for_resuming(here, monkeypatch):
    for faster, name in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr("nanollm.runtime.bf16_is_faster", lambda device, f=faster: f)
        pretrain("--steps", 2, "--dtype", "auto", out=name)
        settings = json.loads(Path(name, "train_config.json").read_text())
        assert settings["dtype"] == name
    run(train_pretrain, "--steps", 3, "--resume", out="bf16")  # on a machine that is slow in bf16
    assert json.loads(Path("bf16/train_config.json").read_text())["dtype"] == "bf16"


def test_a_full_disk_ends_in_one_line_and_leaves_the_last_checkpoint(here, capsys, monkeypatch):
    pretrain("--steps", 2)
    before = Path("runs/pretrain/state.pt").read_bytes()
    for error in (OSError(errno.ENOSPC, "No space left"), RuntimeError("PytorchStreamWriter")):

        def save(state, file, error=error):
            file.write(b"half")
            raise error

        monkeypatch.setattr(torch, "save", save)
        flags = [*TINY, "--steps", 4, "--resume", "--out", "runs/pretrain"]
        assert refused(capsys, train_pretrain, *flags)
        assert Path("runs/pretrain/state.pt").read_bytes() == before
    Path("runs/pretrain/state.pt").write_bytes(before[:-99])
    assert "is damaged" in refused(capsys, train_pretrain, *flags)


# --- several processes ---------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["train_pretrain.py", "train_sft.py"])
def test_two_processes_and_parts_give_the_gradients_of_one(script, here):
    """After one step the optimizers' first moments are the gradients, up to a constant factor."""
    pretrain("--steps", 1)
    flags = [*(SFT if script == "train_sft.py" else TINY), "--steps", 1, "--grad_clip", 0]
    flags += ["--accumulate", 2]
    one, two = moments_of_two_processes(script, flags, "runs/one", "runs/two")
    assert len(one) > 5
    for a, b in zip(one, two):
        close(a, b, 1e-7, 1e-4)


def test_processes_that_torchrun_started_end_where_a_run_closes(here):
    """What torch frees after that may block the end of the interpreter."""
    Path("closing.py").write_text(
        "import torch\nfrom nanollm.runtime import start\n"
        "rt = start('cpu')\n"
        "ddp_model = rt.prepare(torch.nn.Linear(2, 2))\n"
        "ddp_model(torch.ones(1, 2)).sum().backward()\n"
        "print('before', end=' ')\n"
        "rt.close()\n"
        "print('after')\n"
    )
    both = command(here / "closing.py")
    where = ["--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", free_port()]
    both["args"][1:1] = ["-m", "torch.distributed.run", *where]
    said = subprocess.check_output(**both, text=True, timeout=120)
    assert said.count("before") == 2 and "after" not in said


def test_shares_of_several_processes_cover_all_rows_once():
    for world in (1, 2, 3):
        ranks = [Runtime(torch.device("cpu"), torch.float32, rank, world) for rank in range(world)]
        assert [i for rt in ranks for i in range(7)[rt.mine(7)]] == list(range(7))
    with pytest.raises(UserError, match="7 rows per step can't be shared by 3 processes"):
        ranks[0].share(7)


# --- any machine ---------------------------------------------------------------------------------


def test_peak_memory_is_in_bytes_and_unknown_without_the_module_resource(monkeypatch):
    assert 2**26 < peak_memory(torch.device("cpu")) < 2**38
    monkeypatch.setitem(__import__("sys").modules, "resource", None)  # as on Windows
    assert peak_memory(torch.device("cpu")) is None


def test_precision_is_what_the_machine_multiplies_fastest(monkeypatch):
    for ratio, dtype in ((3.0, torch.bfloat16), (0.02, torch.float32)):
        monkeypatch.setattr(runtime, "speed_up_of_bf16", lambda device, r=ratio: r)
        runtime.bf16_is_faster.cache_clear()
        assert start("cpu").dtype == dtype
    runtime.bf16_is_faster.cache_clear()


# --- bad input -----------------------------------------------------------------------------------

BAD_PRETRAINING = [
    (["--batch_size", 0], "--batch_size must be at least 1"),
    (["--data", "nowhere.txt"], "nowhere.txt does not exist"),
    (["--data", "broken.jsonl"], "broken.jsonl, line 2: broken JSON"),
    (["--data", "short.txt"], "too few for one row"),
    (["--data", "text.txt:0.5,nowhere.txt:0.5"], "nowhere.txt does not exist"),
    (["--data", "text.txt:0.5,text.txt"], "name each file once"),
    (["--tokenizer", "nothing"], "nothing"),
    (["--heads", 3], "must be an even multiple of --heads 3"),
    (["--out", "/proc/nowhere/run"], "/proc/nowhere"),
    (["--out", "mine"], "choose another --out"),
    (["--out", "runs/none", "--resume"], "nothing to resume"),
    (["--device", "abacus"], "abacus"),
    (["--init", "runs/none"], "runs/none"),
]


def test_wrong_pretraining_input_is_refused_and_a_finished_run_stays(here, capsys):
    pretrain("--steps", 2, out="runs/out")
    Path("short.txt").write_text("too short")
    Path("broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    before = contents("runs/out")
    for flags, sentence in BAD_PRETRAINING:
        said = refused(capsys, train_pretrain, *TINY, "--out", "runs/out", *flags)
        assert sentence in said, flags
    assert Path("mine/thesis.txt").read_text() == "years of work"
    assert before == contents("runs/out")


def test_a_prompt_beyond_the_context_and_a_damaged_model_folder_are_refused(here, capsys):
    pretrain("--steps", 1)
    flags = ["runs/pretrain", "--max_new_tokens", 8, "--prompt", "a" * 90]
    assert "shorten" in refused(capsys, chat, *flags)
    path = Path("runs/pretrain/model.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors" in refused(capsys, train_sft, *SFT)


def test_numbers_that_are_none_end_the_run_and_never_replace_a_checkpoint(here, capsys):
    pretrain("--steps", 2)
    state = Path("runs/pretrain/state.pt").read_bytes()
    resume = ["--out", "runs/pretrain", "--resume", "--grad_clip", 0]
    for flags in (
        ["--steps", 50, "--muon_lr", 1e30, "--eval_every", 100],
        ["--steps", 9, "--muon_lr", 1e38, "--lr", 1e38, "--eval_every", 1],
    ):
        said = refused(capsys, train_pretrain, *resume, *flags)
        assert "became nan" in said and "--resume" in said
        assert (Path("runs/pretrain/state.pt").read_bytes() == state) == (100 in flags)
        saved = torch.load("runs/pretrain/state.pt", weights_only=True)["model"]
        for p in [*weights("runs/pretrain").values(), *saved.values()]:
            assert p.isfinite().all()


@pytest.mark.parametrize("init", ["runs/pretrain", "runs/pretrain.previous"])
def test_the_folder_to_start_from_is_never_replaced(init, here, capsys):
    pretrain("--steps", 1)
    pretrain("--steps", 1)
    said = refused(capsys, train_pretrain, *TINY, "--out", "runs/pretrain", "--init", init)
    assert f"would replace {init}, which the run reads" in said


def test_xz_needs_nothing_for_what_it_has_seen_and_four_bits_for_one_of_sixteen_letters():
    letters = random.Random(0).choices("abcdefghijklmnop", k=40_000)
    seen, unseen = "".join(letters[:20_000]), "".join(letters[20_000:])
    assert train_pretrain.xz_bits_per_byte([seen], [seen]) < 0.1
    assert 4.0 <= train_pretrain.xz_bits_per_byte([seen], [unseen]) < 4.6


# --- what scripts share --------------------------------------------------------------------------


SCRIPTS = "train_pretrain train_sft train_rm train_ppo train_dpo train_grpo distill lora train_vlm"


@pytest.mark.parametrize("name", [*SCRIPTS.split(), "nanollm.evaluate", "nanollm.chat"])
def test_every_flag_has_a_help_text(name, capsys):
    module = importlib.import_module(name)
    with pytest.raises(SystemExit):
        parse(module.Config, getattr(module, "PRESETS", None), ["--help"])
    assert "--device" in capsys.readouterr().out
    comments = comments_of(module.Config)
    assert [f.name for f in fields(module.Config) if not comments[f.name][0]] == []
