"""Both training scripts, run for real on small data: what they learn, resume, refuse and share
between processes.
"""

import contextlib
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

import train_dpo
import train_ppo
import train_pretrain
import train_rm
import train_sft
from nanollm import chat, evaluate
from nanollm.config import cli, parse
from nanollm.hub import load_model
from nanollm.run import read_metrics

ROOT = Path(__file__).resolve().parents[1]
SMALL = "--batch_size 4 --dtype fp32 --device cpu".split()
TINY = [*SMALL, *"--layers 1 --channels 32 --heads 2 --context 32 --tokenizer bytes".split()]
SFT = [*SMALL, *"--context 48 --replay_data text.txt --data chats.jsonl".split()]
CHATS = [
    {"messages": [{"role": "user", "content": f"say {w}"}, {"role": "assistant", "content": w}]}
    for w in ("owl fox hen cow pig bee ant elk yak emu eel cod bat rat cat dog".split() * 3)
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with a text and some dialogues in it."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("the cat sat on the mat. the dog sat on the log. " * 150)
    Path("chats.jsonl").write_text("".join(json.dumps(c) + "\n" for c in CHATS))
    return tmp_path


def pretrain(*flags, out="runs/pretrain"):
    """Train in this process; returns the metrics."""
    flags = [*TINY, "--data", "text.txt", "--out", out, "--sample_tokens", "8", *map(str, flags)]
    train_pretrain.main(parse(train_pretrain.Config, train_pretrain.PRESETS, flags))
    return read_metrics(out)


def sft(*flags, out="runs/sft"):
    flags = [*SFT, "--init", "runs/pretrain", "--out", out, *map(str, flags)]
    train_sft.main(parse(train_sft.Config, train_sft.PRESETS, flags))
    return read_metrics(out)


def command(script, *flags):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return {"args": [sys.executable, str(ROOT / script), *map(str, flags)], "env": env}


def weights(folder):
    return dict(load_model(folder)[0].state_dict())


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def kill_and_resume(script, flags, out, steps):
    """Run a script, kill it once it has passed one of `steps` and a checkpoint, and resume it."""
    process = subprocess.Popen(**command(script, *flags, "--out", out), stdout=subprocess.DEVNULL)
    random_step, last = random.choice(steps), 0
    while process.poll() is None and (last < random_step or not Path(out, "state.pt").exists()):
        last = max([m["step"] for m in read_metrics(out)], default=0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(
        **command(script, "--out", out, "--resume"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def moments_of_two_processes(script, flags, one, two):
    """First moments of the optimizers after a run with one process and a run with two."""
    subprocess.run(**command(script, *flags, "--out", one), check=True, capture_output=True)
    as_two_processes(script, *flags, "--out", two)
    return [first_moments(torch.load(f"{n}/state.pt", weights_only=True)) for n in (one, two)]


def as_two_processes(script, *flags, timeout=120):
    """Run a script as two processes; returns what they said. Where they hang, the failure tells
    what each thread was doing.
    """
    both = command(script, *flags)
    both["env"]["PYTHONFAULTHANDLER"] = "1"
    where = ["--master_addr", "127.0.0.1", "--master_port", free_port()]
    both["args"][1:1] = ["-m", "torch.distributed.run", "--nproc_per_node", "2", *where]
    # a file, because a pipe is at its end only when every process has left
    with open("said.txt", "w+") as said:
        parent = subprocess.Popen(**both, stdout=said, stderr=said)
        hung = False
        try:
            parent.wait(timeout)
        except subprocess.TimeoutExpired:
            hung = True
            for pid in (parent.pid, *children(parent.pid)):
                with contextlib.suppress(ProcessLookupError):  # it has left meanwhile
                    os.kill(pid, signal.SIGABRT)
                time.sleep(0.5)  # until it has told, before the next one does
            parent.wait()
        said.seek(0)
        text = said.read()
    assert not hung, f"{script} hung for {timeout} s:\n{text}"
    assert parent.returncode == 0, text
    return text


def children(pid):
    """Processes that a process has started, and those that they have."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    own = [int(child) for task in tasks for child in task.read_text().split()]
    return [each for child in own for each in (child, *children(child))]


# --- learning ------------------------------------------------------------------------------------


def test_pretraining_learns_a_repeated_sentence_by_heart(here):
    metrics = pretrain("--steps", 120, "--eval_every", 120, "--lr", 0.01)
    assert metrics[0]["loss"] > 3 and metrics[-1]["bits_per_byte"] < 0.4


def test_fine_tuning_learns_to_say_what_it_is_told(here):
    pretrain("--steps", 60, "--eval_every", 60, "--context", 64)
    metrics = sft("--steps", 150, "--eval_every", 150, "--replay", 0)
    assert metrics[-1]["val_loss"] < 0.1 * math.log(256)


def test_a_run_folder_opens_in_transformers_with_our_logits_and_ids(here):
    pretrain("--steps", 3, "--context", 64)
    sft("--steps", 3)
    ours, tokenizer = load_model("runs/sft")
    theirs = transformers.AutoModelForCausalLM.from_pretrained("runs/sft", dtype=torch.float32)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained("runs/sft")
    messages = [{"role": "user", "content": "say owl"}]
    ids, _ = tokenizer.render(messages, generation_prompt=True)
    got = their_tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert got == ids
    tokens = torch.tensor([ids])
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)


def test_early_stopping_keeps_the_best_weights(here, capsys):
    metrics = pretrain(
        "--steps", 60, "--eval_every", 2, "--patience", 2, "--lr", 0.5, "--muon_lr", 1.0
    )
    assert "stopped early" in capsys.readouterr().out
    losses = [m["bits_per_byte"] for m in metrics if "bits_per_byte" in m]
    assert json.loads(Path("runs/pretrain/result.json").read_text())[
        "bits_per_byte"
    ] == pytest.approx(min(losses))


def test_a_second_run_moves_the_first_out_of_the_way(here):
    pretrain("--steps", 2)
    before = weights("runs/pretrain")
    pretrain("--steps", 2, "--seed", 1)
    assert same(before, weights("runs/pretrain.previous"))


def test_the_preset_gives_way_to_typed_flags():
    cfg = parse(
        train_pretrain.Config, train_pretrain.PRESETS, ["--preset", "smoke", "--steps", "7"]
    )
    assert (cfg.steps, cfg.layers, cfg.heads) == (7, 2, 2)


# --- kill and resume -----------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["train_pretrain.py", "train_sft.py"])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(script, here):
    steps = ["--steps", 24, "--eval_every", 4]
    pretrain("--context", 64, *steps)
    if script == "train_pretrain.py":
        flags = [*TINY, "--data", "text.txt", "--sample_tokens", 8, "--context", 64, *steps]
        whole = "runs/pretrain"
    else:
        sft(*steps)
        flags, whole = [*SFT, "--init", "runs/pretrain", *steps], "runs/sft"
    kill_and_resume(script, flags, "runs/killed", (4, 8, 10, 12, 16, 20))
    assert same(weights(whole), weights("runs/killed"))
    assert [m["step"] for m in read_metrics("runs/killed")] == [
        m["step"] for m in read_metrics(whole)
    ]


def test_a_finished_run_resumes_to_itself(here):
    pretrain("--steps", 4)
    before = weights("runs/pretrain")
    pretrain("--steps", 4, "--resume")
    assert same(before, weights("runs/pretrain"))


# --- several processes ---------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["train_pretrain.py", "train_sft.py"])
def test_two_processes_give_the_gradients_of_one(script, here):
    """After one step the optimizers' first moments are the gradients, up to a constant factor."""
    flags = [*TINY, "--context", 64, "--data", "text.txt"]
    if script == "train_sft.py":
        pretrain("--steps", 1, "--context", 64)
        flags = [*SFT, "--init", "runs/pretrain"]
    flags += ["--steps", 1, "--grad_clip", 0]
    subprocess.run(
        **command(script, *flags, "--accumulate", 2, "--out", "runs/one"),
        check=True,
        capture_output=True,
    )
    as_two_processes(script, *flags, "--out", "runs/two")
    moments = [
        first_moments(torch.load(f"runs/{n}/state.pt", weights_only=True)) for n in ("one", "two")
    ]
    assert len(moments[0]) > 5
    for one, other in zip(*moments):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-4)


def test_processes_that_torchrun_started_end_where_a_run_closes(here):
    """What torch frees after that may block the end of the interpreter."""
    Path("closing.py").write_text(
        "import torch\nfrom nanollm.runtime import start\n"
        "rt = start('cpu')\n"
        "called = rt.prepare(torch.nn.Linear(2, 2))\n"
        "called(torch.ones(1, 2)).sum().backward()\n"
        "print('before', end=' ')\n"
        "rt.close()\n"
        "print('after')\n"
    )
    said = as_two_processes(here / "closing.py")
    assert said.count("before") == 2 and "after" not in said


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def first_moments(state):
    return [
        s[name]
        for optimizer in state["optimizers"]
        for s in optimizer["state"].values()
        for name in ("momentum", "exp_avg")
        if name in s
    ]


# --- bad input -----------------------------------------------------------------------------------


def refused(capsys, module, *flags):
    """The one line on stderr with which a script refuses; its exit code must be 2."""
    with pytest.raises(SystemExit) as stop:
        cli(module.main, module.Config, getattr(module, "PRESETS", None), list(map(str, flags)))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


GOOD = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
BAD_CHATS = {
    "broken JSON": (GOOD + '{"messages": [', "line 2: broken JSON"),
    "no messages": (GOOD + GOOD + '{"text": "a"}', 'line 3: a chat record needs "messages"'),
    "message without role": ('{"messages": [{"content": "a"}]}', 'line 1: message 0 has no "role"'),
    "unknown role": ('{"messages": [{"role": "judge", "content": "a"}]}', "unknown role 'judge'"),
    "content is no text": (
        '{"messages": [{"role": "user", "content": 3}]}',
        "message 0 has no text",
    ),
    "no answer": (
        '{"messages": [{"role": "user", "content": "a"}]}\n' * 40,
        "has an answer within",
    ),
    "empty": ("", "is empty"),
}


@pytest.mark.parametrize("name", BAD_CHATS)
def test_wrong_dialogues_are_refused_with_their_line(name, here, capsys):
    pretrain("--steps", 1)
    Path("bad.jsonl").write_text(BAD_CHATS[name][0])
    capsys.readouterr()
    said = refused(
        capsys, train_sft, *SFT, "--context", 32, "--init", "runs/pretrain", "--data", "bad.jsonl"
    )
    assert BAD_CHATS[name][1] in said
    assert not Path("runs/sft").exists()


BAD_PRETRAINING = {
    "unknown flag": (["--setps", 3], "did you mean --steps?"),
    "wrong type": (["--steps", "many"], "--steps wants a whole number, got 'many'"),
    "unknown preset": (["--preset", "huge"], "huge"),
    "missing file": (["--data", "nowhere.txt"], "nowhere.txt does not exist"),
    "empty file": (["--data", "empty.txt"], "empty.txt is empty"),
    "broken JSON": (["--data", "broken.jsonl"], "broken.jsonl, line 2: broken JSON"),
    "record without text": (["--data", "chats.jsonl"], 'needs a "text"'),
    "no UTF-8": (["--data", "latin.txt"], "not UTF-8"),
    "too little text": (["--data", "short.txt"], "too few for one row"),
    "unknown tokenizer": (["--tokenizer", "nothing"], "nothing"),
    "heads don't divide": (["--heads", 3], "no multiple of --heads 3"),
    "output is a file": (["--out", "text.txt/run"], "text.txt/run"),
    "output can't be made": (["--out", "/proc/nowhere/run"], "/proc/nowhere/run"),
    "output holds other files": (["--out", "mine"], "choose another --out"),
    "nothing to resume": (["--out", "runs/none", "--resume"], "nothing to resume"),
    "no such device": (["--device", "abacus"], "abacus"),
    "init is missing": (["--init", "runs/none"], "runs/none"),
}


@pytest.mark.parametrize("name", BAD_PRETRAINING)
def test_wrong_pretraining_input_is_refused(name, here, capsys):
    Path("empty.txt").write_text("")
    Path("short.txt").write_text("too short")
    Path("broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    Path("latin.txt").write_bytes("é".encode("latin-1") * 50)
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    flags, sentence = BAD_PRETRAINING[name]
    assert sentence in refused(capsys, train_pretrain, *TINY, "--data", "text.txt", *flags)
    assert Path("mine/thesis.txt").read_text() == "years of work"


def damaged(folder, name, capsys, *flags):
    pretrain("--steps", 1, "--context", 64)
    capsys.readouterr()
    return Path(folder) / name


def test_a_truncated_checkpoint_is_refused(here, capsys):
    path = damaged("runs/pretrain", "model.safetensors", capsys)
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors" in refused(capsys, train_sft, *SFT, "--init", "runs/pretrain")


def test_a_checkpoint_of_another_shape_is_refused(here, capsys):
    path = damaged("runs/pretrain", "config.json", capsys)
    path.write_text(path.read_text().replace('"hidden_size": 32', '"hidden_size": 64'))
    assert "shape" in refused(capsys, evaluate, "runs/pretrain")


def test_a_tokenizer_that_does_not_belong_is_refused(here, capsys):
    path = damaged("runs/pretrain", "config.json", capsys)
    text = path.read_text()
    path.write_text(
        text.replace(f'"vocab_size": {json.loads(text)["vocab_size"]}', '"vocab_size": 100')
    )
    assert refused(capsys, chat, "runs/pretrain", "--prompt", "hi")


def test_resuming_with_another_shape_is_refused_and_the_checkpoint_stays(here, capsys):
    pretrain("--steps", 2)
    state = Path("runs/pretrain/state.pt").read_bytes()
    capsys.readouterr()
    assert "another shape" in refused(
        capsys, train_pretrain, "--out", "runs/pretrain", "--layers", 2, "--resume"
    )
    assert Path("runs/pretrain/state.pt").read_bytes() == state


def test_a_prompt_beyond_the_context_is_refused(here, capsys):
    pretrain("--steps", 1, "--context", 64)
    capsys.readouterr()
    assert "shorten" in refused(
        capsys, chat, "runs/pretrain", "--prompt", "a" * 90, "--max_new_tokens", 8
    )


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_last_checkpoint(here, capsys):
    pretrain("--steps", 2)
    state = Path("runs/pretrain/state.pt").read_bytes()
    capsys.readouterr()
    said = refused(
        capsys,
        train_pretrain,
        "--out",
        "runs/pretrain",
        "--resume",
        "--steps",
        50,
        "--muon_lr",
        1e30,
        "--grad_clip",
        0,
        "--eval_every",
        100,
    )
    assert "the loss became nan" in said and "--resume" in said
    assert Path("runs/pretrain/state.pt").read_bytes() == state
    load_model("runs/pretrain")


def test_weights_that_are_no_numbers_never_replace_a_checkpoint(here, capsys):
    pretrain("--steps", 2)
    capsys.readouterr()
    rates = ["--muon_lr", 1e38, "--lr", 1e38, "--grad_clip", 0]
    flags = ["--out", "runs/pretrain", "--resume", "--steps", 9, "--eval_every", 1, *rates]
    assert "became nan" in refused(capsys, train_pretrain, *flags)
    assert all(p.isfinite().all() for p in weights("runs/pretrain").values())
    state = torch.load("runs/pretrain/state.pt", weights_only=True)
    assert all(p.isfinite().all() for p in state["model"].values())


def test_an_attempt_that_fails_leaves_the_finished_run_alone(here, capsys):
    pretrain("--steps", 2)
    before = weights("runs/pretrain")
    capsys.readouterr()
    for flags in (["--batch_size", 0], ["--eval_every", 0], ["--data", "nowhere.txt"]):
        refused(capsys, train_pretrain, *TINY, "--data", "text.txt", *flags)
    assert same(before, weights("runs/pretrain"))


@pytest.mark.parametrize("init", ["runs/pretrain", "runs/pretrain.previous"])
def test_the_folder_to_start_from_is_never_replaced(init, here, capsys):
    pretrain("--steps", 1)
    pretrain("--steps", 1)
    capsys.readouterr()
    assert f"would replace {init}, which the run reads" in refused(
        capsys, train_pretrain, *TINY, "--data", "text.txt", "--init", init
    )


KNOWLEDGE = "--knowledge is what tools search in; add --tools"
MEANINGLESS = [
    (chat, ["--knowledge", "people.jsonl"], KNOWLEDGE),
    (evaluate, ["--data", "tools", "--knowledge", "people.jsonl"], KNOWLEDGE),
    (evaluate, ["--reward_model", "runs/rm"], "--reward_model goes with --data preferences"),
    (evaluate, ["--data", "tools", "--against", "runs/sft"], "--against goes with --data pref"),
    (evaluate, ["--best_of", 4], "--best_of needs a --reward_model"),
]


@pytest.mark.parametrize("module, flags, sentence", MEANINGLESS)
def test_flags_that_would_change_nothing_are_refused(module, flags, sentence, capsys):
    assert sentence in refused(capsys, module, *flags)


def test_questions_for_tools_without_tools_are_answered_and_that_is_said(capsys):
    evaluate.check_flags(evaluate.Config(data="tools", tools=True))
    assert not capsys.readouterr().out
    evaluate.check_flags(evaluate.Config(data="tools"))
    assert "without --tools" in capsys.readouterr().out


# --- what scripts share --------------------------------------------------------------------------


def test_every_flag_has_a_help_text(capsys):
    for module in (train_pretrain, train_sft, train_rm, train_ppo, train_dpo, evaluate, chat):
        with pytest.raises(SystemExit):
            parse(module.Config, getattr(module, "PRESETS", None), ["--help"])
        assert "--device" in capsys.readouterr().out
