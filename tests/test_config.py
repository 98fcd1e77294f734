"""The command line, made from a dataclass: what is read, what is refused, and which value wins.

    loss = -log p

This docstring is the description in --help, with its layout.
"""

import errno
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest

from nanollm.config import (
    AdapterConfig,
    NotNegative,
    OpenShare,
    Range,
    TrainConfig,
    UserError,
    Whole,
    atomic_file,
    atomic_write,
    cli,
    comments_of,
    parse,
    save_config,
)

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Config:
    """steps: this line is no field."""

    # -- Run
    preset: str = "tiny"  # how large everything is
    out: str = "runs/test"  # run folder to write
    resume: bool = False  # go on where the run in --out stopped

    # -- Training ------
    # optimizer steps,
    # 100% of them
    steps: Whole[1] = 300
    lr: NotNegative = 1e-3  # learning rate
    dtype: Literal["auto", "bf16"] = "auto"  # precision
    groups: Literal[1, 2] = 1
    init: str | None = None  # folder to start from
    clip: NotNegative | None = 1.0  # largest gradient norm
    held_out: OpenShare = 0.1
    eval_every: Annotated[int, Range(2, 8)] = 4
    compile: bool = True  # torch.compile

    @property
    def double(self):
        # a comment of no field
        return 2 * self.steps


PRESETS = {"smoke": {"steps": 4, "out": "runs/smoke"}, "gpu": {"dtype": "bf16"}}


@dataclass
class Chat:
    model: str | None = field(default=None, metadata={"positional": True})  # run folder
    verbose: bool = False
    prompt: str = ""


def read(line, config_class=Config, presets=PRESETS):
    return parse(config_class, presets, line.split())


# --- what is read --------------------------------------------------------------------------------


READ = [
    ("--steps 5", "steps", 5), ("--steps 1_000", "steps", 1000), ("--steps 1e6", "steps", 10**6),
    ("--steps 1 --steps 2", "steps", 2),
    ("--eval_every 2", "eval_every", 2), ("--lr 3e-4", "lr", 3e-4), ("--lr 1", "lr", 1.0),
    ("--clip none", "clip", None), ("--clip=0.5", "clip", 0.5), ("--init None", "init", None),
    ("--init=--odd=name", "init", "--odd=name"),
    ("--out none", "out", "none"), ("--dtype bf16", "dtype", "bf16"),
    ("--groups 2", "groups", 2),
    ("--compile", "compile", True), ("--no_compile", "compile", False),
    ("--no_compile --compile", "compile", True),
]  # fmt: skip


@pytest.mark.parametrize("line, name, value", READ)
def test_a_flag_sets_its_field(line, name, value):
    config = read(line)
    assert getattr(config, name) == value and type(getattr(config, name)) is type(value)
    assert asdict(config) == asdict(Config()) | {name: value}


def test_a_preset_wins_over_defaults_and_a_flag_over_the_preset(monkeypatch):
    assert read("") == read("--preset tiny") == Config()
    config = read("--steps 5 --preset smoke")
    assert (config.preset, config.out, config.steps, config.lr) == ("smoke", "runs/smoke", 5, 1e-3)
    monkeypatch.setattr(sys, "argv", ["train.py", "--steps", "7"])
    assert parse(Config).steps == 7


def test_a_field_is_an_argument_without_a_flag_where_the_class_says_so():
    assert read("", Chat, None) == Chat()
    assert read("--verbose runs/a --prompt hi", Chat, None) == Chat("runs/a", True, "hi")
    for unknown in ("runs/b", "--preset smoke"):
        with pytest.raises(UserError, match="unrecognized arguments"):
            read(f"runs/a {unknown}", Chat, None)


# --- what is refused -----------------------------------------------------------------------------


REFUSED = [
    ("--step 4", "unrecognized arguments: --step 4"),
    ("runs/sft", "unrecognized arguments: runs/sft"),
    ("--compile true", "unrecognized arguments: true"),
    ("--steps", "--steps: expected one argument"),
    ("--steps --lr 1", "--steps: expected one argument"),
    *((f"--steps={x}", f"--steps: invalid int value: '{x}'")
      for x in ("abc", "1.5", "nan", "none", "")),
    ("--steps -5", "--steps must be at least 1, not -5"),
    ("--eval_every 9", "--eval_every must be between 2 and 8, not 9"),
    ("--lr=-3e-4", "--lr must be at least 0, not -0.0003"),
    ("--lr nan", "--lr must be at least 0, not nan"),
    ("--held_out 1", "--held_out must be between 0 and 1, both excluded, not 1.0"),
    ("--clip x", "--clip: invalid float value: 'x'"),
    ("--clip -1", "--clip must be at least 0, not -1.0"),
    ("--dtype fp8", "--dtype: invalid choice: 'fp8' (choose from 'auto', 'bf16')"),
    ("--preset huge", "--preset: invalid choice: 'huge' (choose from 'smoke', 'gpu', 'tiny')"),
]  # fmt: skip


@pytest.mark.parametrize("line, says", REFUSED)
def test_bad_input_is_refused_with_the_sentence_that_helps(line, says):
    with pytest.raises(UserError) as refusal:
        read(line)
    assert str(refusal.value) == f"{says}; see --help"


# --- inheritance ---------------------------------------------------------------------------------


@dataclass
class Script(AdapterConfig, TrainConfig):
    # -- Data
    data: str = "village"  # what to learn from
    # -- Training
    steps: int = 7
    lr: float = 0.5  # another comment
    loss: Literal["one", "two"] = (
        "one"  # a comment that the formatter has moved: it stands behind a value on its own line
    )


def test_a_script_inherits_flags_and_another_default_keeps_bounds():
    config = read("--batch_size 3 --rank 2", Script, None)
    assert (config.steps, config.lr, config.batch_size, config.rank) == (7, 0.5, 3, 2)
    for line in ("--steps 0", "--lr -1", "--seed -1", "--seed 20000000000000"):
        with pytest.raises(UserError, match="must be"):
            read(line, Script, None)


def test_a_class_inside_a_function_has_comments_and_one_typed_at_a_prompt_needs_none():
    @dataclass
    class Inner:
        size: int = 3  # how large

    assert comments_of(Inner) == {"size": ("how large", "settings")}
    typed = {"__name__": "__main__", "dataclass": dataclass}
    exec("@dataclass\nclass Typed:\n    size: int = 3", typed)
    assert comments_of(typed["Typed"]) == {}


def test_a_field_keeps_the_comment_and_the_group_of_the_class_that_it_is_from():
    comments = comments_of(Script)
    assert comments["steps"] == ("optimizer steps", "Training")
    assert comments["lr"] == ("another comment", "Training")
    assert comments["data"] == ("what to learn from", "Data")
    assert comments["loss"][0].endswith("it stands behind a value on its own line")
    assert comments["rank"][1] == "Adapter" and comments["seed"][1] == "Machine"


# --- which value wins ----------------------------------------------------------------------------


SAVED = {"steps": 77, "clip": None, "compile": False, "lr": 0.5, "preset": "gpu", "out": "runs/old"}


@pytest.mark.parametrize(
    "line, changed, says",
    [
        ("", {}, ""),
        ("--steps 100 --lr 0.5", {"steps": 100}, "--steps was 77, and the run goes on with 100"),
        ("--preset smoke", {}, "a resumed run keeps its preset, gpu"),
    ],
)
def test_a_resumed_run_keeps_its_settings_save_typed_ones_and_says_so(
    line, changed, says, tmp_path, capsys
):
    save_config(Config(**SAVED), tmp_path / "train_config.json")
    assert json.loads((tmp_path / "train_config.json").read_text()) == asdict(Config(**SAVED))
    config = read(f"--resume --out {tmp_path} {line}")
    moved = {"resume": True, "out": str(tmp_path)}  # the folder may have moved
    assert config == Config(**SAVED | moved | changed)
    assert capsys.readouterr().out == (f"note: {says}\n" if says else "")
    assert read(f"--out {tmp_path}").steps == 300  # without --resume it isn't read


MISFITS = [
    (None, "^nothing to resume in .*; start without --resume"),
    ("{", "train_config.json is not valid JSON"),
    ('{"adam_lr": 1e-3}', "sets adam_lr, which this script doesn't know: another version wrote it"),
]


@pytest.mark.parametrize("text, says", MISFITS)
def test_a_saved_config_that_does_not_fit_is_refused(text, says, tmp_path):
    if text is not None:
        (tmp_path / "train_config.json").write_text(text)
    with pytest.raises(UserError, match=says):
        read(f"--resume --out {tmp_path}")
    (tmp_path / "train_config.json").write_text('{"steps": 7, "preset": "old"}')
    assert read(f"--resume --out {tmp_path}") == Config("old", str(tmp_path), True, steps=7)


# --- help ----------------------------------------------------------------------------------------


HELP = (
    "\n    loss = -log p\n\nThis docstring",
    "\nRun:\n",
    "\nTraining:\n",
    "how large everything is (default: tiny)",
    "--preset smoke|gpu|tiny",
    "run folder to write (default: runs/test, smoke: runs/smoke)",
    "--steps int",
    "optimizer steps, 100% of them (default: 300, smoke: 4)",
    "--dtype auto|bf16",
    "precision (default: auto, gpu: bf16)",
    "folder to start from (default: None)",
)


def test_help_shows_groups_comments_defaults_and_presets(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as leaving:
        read("--nonsense --help")
    shown = capsys.readouterr().out
    assert leaving.value.code == 0 and "of no field" not in shown
    assert [text for text in HELP if text not in shown] == []
    with pytest.raises(SystemExit):
        read("-h", Chat, None)
    assert "[model] [--flag value ...]" in capsys.readouterr().out


# --- the edge of the program ---------------------------------------------------------------------


def fail(mistake):
    def main(config):
        raise mistake

    return main


MISTAKES = [
    (UserError("data.jsonl:3: no\n  messages"), "0", 2, "error: data.jsonl:3: no messages\n"),
    (UserError("no"), "1", 2, ""),  # of many processes only the first speaks
    (KeyboardInterrupt(), "0", 130, "stopped by Ctrl-C\n"),
    (PermissionError(errno.EACCES, "Denied", "/x"), "0", 2, "error: [Errno 13] Denied: '/x'\n"),
]


@pytest.mark.parametrize("mistake, rank, code, says", MISTAKES)
def test_a_mistake_becomes_one_line(capsys, monkeypatch, mistake, rank, code, says):
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as leaving:
        cli(fail(mistake), Config, PRESETS, [])
    assert (leaving.value.code, *capsys.readouterr()) == (code, "", says)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ValueError, match="bug"):
        cli(fail(ValueError("bug")), Config, PRESETS, [])


SCRIPT = """
import atexit
from dataclasses import dataclass
from nanollm.config import UserError, cli
@dataclass
class Config:
    lines: int = 1
    fails: str = ""
def main(config):
    atexit.register(print, "end")
    for line in range(config.lines):
        print("a line of some length, so that the pipe is soon full")
    errors = {"user": UserError("no"), "bug": ValueError()}
    if config.fails:
        raise errors[config.fails]
cli(main, Config)
"""


@pytest.fixture
def executed(tmp_path):
    """Runs a command with SCRIPT in the file script.py."""
    (tmp_path / "script.py").write_text(SCRIPT)

    def run(*command, **env):
        env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)

    return run


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell")
def test_a_pipe_that_is_closed_ends_the_program_without_a_word(executed):
    shell = f"'{sys.executable}' script.py --lines 100000 | true; exit ${{PIPESTATUS[0]}}"
    done = executed("bash", "-c", shell)
    assert (done.returncode, done.stdout, done.stderr) == (141, "", "")


@pytest.mark.parametrize(
    "fails, processes, code, err",
    [
        ("user", "1", 2, "error: no\n"),
        ("user", "2", 2, "error: no\n"),
        ("bug", "2", 1, "Traceback"),
    ],
)
def test_one_of_several_processes_that_fails_does_not_wait_for_the_interpreters_end(
    fails, processes, code, err, executed
):
    command = sys.executable, "script.py", "--fails", fails
    done = executed(*command, RANK="0", WORLD_SIZE=processes)
    assert done.returncode == code and done.stderr.startswith(err)
    assert done.stdout.endswith("end\n") == (processes == "1")


# --- files ---------------------------------------------------------------------------------------


def test_a_write_replaces_the_file_or_fails_and_leaves_the_old_one(tmp_path):
    for data, written in ("ä", "ä".encode()), (b"\0\r\n", b"\0\r\n"):
        atomic_write(tmp_path / "a", data)
        assert (tmp_path / "a").read_bytes() == written
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "a") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert (tmp_path / "a").read_bytes() == written and os.listdir(tmp_path) == ["a"]
