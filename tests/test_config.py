"""The command line, made from a dataclass: what is read, what is refused, and which value wins.

    loss = -log p

This docstring is the description in --help, with its layout.
"""

import errno
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from nanollm.config import UserError, atomic_file, atomic_write, cli, parse, save_config


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
    steps: int = 300
    lr: float = 1e-3  # learning rate,
    # at its peak
    dtype: Literal["auto", "bf16"] = "auto"  # precision
    layers: Literal[2, 4] = 2
    init: str | None = None  # folder to start from
    clip: float | None = 1.0  # largest gradient norm
    compile: bool = True  # torch.compile

    @property
    def double(self):
        # a comment of no field
        return 2 * self.steps


PRESETS = {"smoke": {"steps": 4, "out": "runs/smoke"}, "tiny": {}, "gpu": {"dtype": "bf16"}}


@dataclass
class Chat:
    model: str | None = field(default=None, metadata={"positional": True})  # run folder
    verbose: bool = False
    prompt: str = ""


def read(line, config_class=Config, presets=PRESETS):
    return parse(config_class, presets, line.split())


# --- what is read ------------------------------------------------------------------------------
def test_without_flags_everything_has_its_default():
    assert read("") == Config()


@pytest.mark.parametrize(
    "line, name, value",
    [
        ("--steps 5", "steps", 5),
        ("--steps=5", "steps", 5),
        ("--steps 1_000", "steps", 1000),
        ("--steps 1e6", "steps", 1_000_000),
        ("--steps 2.5E3", "steps", 2500),
        ("--steps 9007199254740993", "steps", 2**53 + 1),
        ("--steps 1 --steps 2", "steps", 2),
        ("--muon_lr 3e-4", "lr", 3e-4),
        ("--muon_lr 1", "lr", 1.0),
        ("--muon_lr inf", "lr", float("inf")),
        ("--grad_clip none", "clip", None),
        ("--grad_clip 0.5", "clip", 0.5),
        ("--init None", "init", None),
        ("--init runs/sft", "init", "runs/sft"),
        ("--init=--odd=name", "init", "--odd=name"),
        ("--init=", "init", ""),
        ("--out none", "out", "none"),
        ("--dtype bf16", "dtype", "bf16"),
        ("--layers 4", "layers", 4),
        ("--resume false", "resume", False),
        ("--compile", "compile", True),
        ("--compile false", "compile", False),
        ("--compile=False", "compile", False),
        ("--no_compile", "compile", False),
        ("--no-compile", "compile", False),
        ("--no_compile --compile true", "compile", True),
    ],
)
def test_a_flag_sets_its_field(line, name, value):
    config = read(line)
    assert getattr(config, name) == value and type(getattr(config, name)) is type(value)
    assert asdict(config) == asdict(Config()) | {name: value}


def test_dashes_may_stand_for_underscores():
    @dataclass
    class Dashed:
        eval_every: int = 1

    assert read("--eval-every 2", Dashed, None) == read("--eval_every 2", Dashed, None) == Dashed(2)


def test_an_argument_may_stand_for_a_flag_where_the_class_says_so():
    assert read("runs/sft", Chat, None) == Chat("runs/sft")
    assert read("--model runs/sft", Chat, None) == Chat("runs/sft")
    assert read("--verbose runs/sft --prompt hi", Chat, None) == Chat("runs/sft", True, "hi")
    assert read("--verbose false runs/sft", Chat, None) == Chat("runs/sft")


def test_the_command_line_itself_is_the_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--steps", "7"])
    assert parse(Config).steps == 7


# --- what is refused ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    "line, says",
    [
        ("--step 4", "unknown flag --step; did you mean --steps?"),
        ("--no_compil", "unknown flag --no_compil; did you mean --compile?"),
        ("--zzz=4", "unknown flag --zzz; see --help"),
        ("-s 4", "unknown flag -s; see --help"),
        ("--", "unknown flag --; see --help"),
        ("--no_steps", "unknown flag --no_steps; did you mean --steps?"),
        ("--no_compile=true", "unknown flag --no_compile; did you mean --compile?"),
        ("--steps abc", "--steps wants a whole number, got 'abc'"),
        ("--steps 1.5", "--steps wants a whole number, got '1.5'"),
        ("--steps 1e400", "--steps wants a whole number, got '1e400'"),
        ("--steps nan", "--steps wants a whole number, got 'nan'"),
        ("--steps=", "--steps wants a whole number, got ''"),
        ("--steps none", "--steps wants a whole number, got 'none'"),
        ("--muon_lr fast", "--muon_lr wants a number, got 'fast'"),
        ("--muon_lr nan", "--muon_lr wants a number, got 'nan'"),
        ("--grad_clip x", "--grad_clip wants a number or none, got 'x'"),
        ("--compile maybe", "--compile wants true or false, got 'maybe'"),
        ("--dtype fp8", "--dtype wants one of auto, bf16, got 'fp8'"),
        ("--layers 3", "--layers wants one of 2, 4, got '3'"),
        ("--preset huge", "--preset wants one of smoke, tiny, gpu, got 'huge'"),
        ("--steps", "--steps wants a whole number; write --steps VALUE"),
        ("--steps --muon_lr 1", "--steps wants a whole number; write --steps VALUE"),
        ("runs/sft", "what is 'runs/sft' for? every setting is written --name value"),
    ],
)
def test_bad_input_is_refused_with_the_sentence_that_helps(line, says):
    with pytest.raises(UserError) as refusal:
        read(line)
    assert str(refusal.value) == says


def test_a_second_argument_is_refused():
    with pytest.raises(UserError, match="what is 'runs/b' for"):
        read("runs/a runs/b", Chat, None)


def test_a_setting_without_default_must_be_given():
    @dataclass
    class Needy:
        data: str

    assert read("--data x", Needy, None).data == "x"
    with pytest.raises(UserError, match="--data is needed"):
        read("", Needy, None)


def test_without_presets_there_is_no_preset_flag():
    with pytest.raises(UserError, match="unknown flag --preset"):
        read("--preset smoke", Chat, None)


@pytest.mark.parametrize("values", [{"step": 3}, {"steps": "three"}, {"steps": 1.5}])
def test_a_preset_that_fits_no_field_is_the_programs_mistake(values):
    with pytest.raises(ValueError, match="preset 'bad': step"):
        read("", Config, {"bad": values})


@pytest.mark.parametrize("kind", [list, int | str, dict[str, int] | None])
def test_a_type_that_no_flag_can_have_is_the_programs_mistake(kind):
    with pytest.raises(TypeError, match="no flag has this type"):
        read("", dataclass(type("Odd", (), {"__annotations__": {"x": kind}})), None)


# --- which value wins --------------------------------------------------------------------------
def test_a_preset_wins_over_defaults_and_a_flag_over_the_preset():
    config = read("--steps 5 --preset smoke")
    assert (config.preset, config.out, config.steps, config.lr) == ("smoke", "runs/smoke", 5, 1e-3)


def test_a_class_without_a_preset_field_can_have_presets():
    assert read("--preset gpu", Chat, {"gpu": {"prompt": "hi"}}).prompt == "hi"
    assert read("", Chat, {"tiny": {"prompt": "hi"}}).prompt == "hi"


def test_the_default_preset_need_not_be_spelled_out():
    assert read("--preset tiny", Config, {"smoke": {"steps": 4}}) == Config()


def started(folder, **values):
    save_config(Config(**values), folder / "train_config.json")
    return f"--resume --out {folder}"


def test_a_resumed_run_keeps_its_settings(tmp_path):
    line = started(tmp_path, steps=77, clip=None, compile=False, out="runs/elsewhere")
    config = read(line)
    assert (config.steps, config.clip, config.compile) == (77, None, False)
    assert (config.resume, config.out) == (True, str(tmp_path))  # the folder may have moved


def test_a_typed_flag_wins_over_the_resumed_run(tmp_path):
    config = read(started(tmp_path, steps=77, lr=0.5) + " --steps 100")
    assert (config.steps, config.lr) == (100, 0.5)


def test_a_resumed_run_says_what_goes_on_otherwise(tmp_path, capsys):
    read(started(tmp_path, steps=77, lr=0.5) + " --steps 100 --muon_lr 0.5")
    said = capsys.readouterr().out
    assert said == "note: the run was started with --steps 77, and goes on with 100\n"


def test_the_resumed_run_wins_over_the_preset_and_keeps_its_name(tmp_path, capsys):
    config = read(started(tmp_path, steps=77, preset="gpu") + " --preset smoke")
    assert (config.steps, config.preset) == (77, "gpu")
    assert capsys.readouterr().out == "note: a resumed run keeps its preset, gpu\n"


def test_a_resumed_run_may_lack_settings_or_have_old_ones(tmp_path, capsys):
    (tmp_path / "train_config.json").write_text('{"steps": 7, "momentum": 1, "preset": "old"}')
    assert read(f"--resume --out {tmp_path}").lr == 1e-3
    assert "no longer exist, ignored: momentum" in capsys.readouterr().out


def test_without_resume_the_folder_is_not_read(tmp_path):
    started(tmp_path, steps=77)
    assert read(f"--out {tmp_path}").steps == 300


def test_there_must_be_something_to_resume(tmp_path):
    with pytest.raises(UserError, match=f"^nothing to resume in {tmp_path}; start without --resum"):
        read(f"--resume --out {tmp_path}")


@pytest.mark.parametrize(
    "text, says",
    [
        ("{", "is not a JSON object"),
        ("[]", "is not a JSON object"),
        ('{"steps": "x"}', "steps wants a whole number, got 'x'; mend it or add --steps VALUE"),
        ('{"steps": true}', "steps wants a whole number, got True"),
        ('{"dtype": "fp8"}', "dtype wants one of auto, bf16, got 'fp8'"),
        ('{"out": 3, "lr": null}', "lr wants a number, got None"),
    ],
)
def test_a_damaged_saved_config_is_refused(tmp_path, text, says):
    (tmp_path / "train_config.json").write_text(text)
    with pytest.raises(UserError, match=says):
        read(f"--resume --out {tmp_path}")


def test_a_typed_flag_mends_a_damaged_saved_value(tmp_path):
    (tmp_path / "train_config.json").write_text('{"steps": "x"}')
    assert read(f"--resume --out {tmp_path} --steps 3").steps == 3


# --- help --------------------------------------------------------------------------------------
@pytest.fixture
def help_text(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as leaving:
        read("--nonsense --help")
    assert leaving.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        "\n    loss = -log p\n\nThis docstring",
        "\nRun:\n",
        "\nTraining:\n",
        "how large everything is (default: tiny)",
        "--preset smoke|tiny|gpu",
        "run folder to write (default: runs/test, smoke: runs/smoke)",
        "--steps int",
        "optimizer steps, 100% of them (default: 300, smoke: 4)",
        "--muon_lr float",
        "learning rate, at its peak (default: 0.001)",
        "--dtype auto|bf16",
        "precision (default: auto, gpu: bf16)",
        "--init str",
        "folder to start from (default: None)",
        "--no_compile [bool]",
    ],
)
def test_help_shows(text, help_text):
    assert text in help_text


def test_help_shows_no_comment_from_elsewhere(help_text):
    assert "of no field" not in help_text


def test_help_names_the_argument(capsys):
    with pytest.raises(SystemExit):
        read("-h", Chat, None)
    assert "[model] [--flag value ...]" in capsys.readouterr().out


# --- the edge of the program -------------------------------------------------------------------
def leave(capsys, mistake=None, argv=()):
    def main(config):
        raise mistake

    with pytest.raises(SystemExit) as leaving:
        cli(main, Config, PRESETS, list(argv))
    shown = capsys.readouterr()
    assert shown.out == ""
    return leaving.value.code, shown.err


@pytest.mark.parametrize(
    "mistake, code, says",
    [
        (UserError("data.jsonl:3: no\n  messages"), 2, "error: data.jsonl:3: no messages\n"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C\n"),
        (OSError(errno.ENOSPC, "No space left"), 2, "error: cannot write: No space left\n"),
        (OSError(errno.EROFS, "Read-only", "/x"), 2, "error: /x: Read-only\n"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/x"),
            2,
            "error: /x: Permission denied\n",
        ),
        (
            NotADirectoryError(errno.ENOTDIR, "Not a directory", "/x"),
            2,
            "error: /x: Not a directory\n",
        ),
    ],
)
def test_a_mistake_becomes_one_line(capsys, monkeypatch, mistake, code, says):
    monkeypatch.delenv("RANK", raising=False)
    assert leave(capsys, mistake) == (code, says)


def test_a_wrong_flag_becomes_one_line(capsys):
    assert leave(capsys, argv=["--steps", "x"]) == (
        2,
        "error: --steps wants a whole number, got 'x'\n",
    )


@pytest.mark.parametrize("rank, says", [("0", "error: no\n"), ("1", "")])
def test_of_many_processes_only_the_first_speaks(capsys, monkeypatch, rank, says):
    monkeypatch.setenv("RANK", rank)
    assert leave(capsys, UserError("no")) == (2, says)


@pytest.mark.parametrize("mistake", [ValueError("bug"), FileNotFoundError(errno.ENOENT, "bug")])
def test_a_bug_keeps_its_traceback(mistake):
    def main(config):
        raise mistake

    with pytest.raises(type(mistake), match="bug"):
        cli(main, Config, PRESETS, [])


def test_main_gets_the_config():
    seen = []
    cli(seen.append, Config, PRESETS, ["--steps", "5"])
    assert seen == [Config(steps=5)]


SCRIPT = """
from dataclasses import dataclass
from nanollm.config import cli
@dataclass
class Config:
    lines: int = 1
def main(config):
    for line in range(config.lines):
        print("a line of some length, so that the pipe is soon full")
cli(main, Config)
"""


@pytest.mark.parametrize(
    "line, code, out, err",
    [
        ("python -c '{}' | wc -l", 0, "1", ""),
        ("python -c '{}' --lines x", 2, "", "error: --lines wants a whole number, got 'x'\n"),
        ("python -c '{}' --lines 100000 | true; exit ${{PIPESTATUS[0]}}", 141, "", ""),
        ("python -c '{}' | true; exit ${{PIPESTATUS[0]}}", None, "", ""),  # 0 or 141: a race
    ],
)
def test_the_shell_sees(line, code, out, err):
    line = line.format(SCRIPT).replace("python", f"'{sys.executable}'", 1)
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert (done.stdout.strip(), done.stderr) == (out, err)
    assert done.returncode == code or code is None


FAILING = """
import atexit
from dataclasses import dataclass
from nanollm.config import UserError, cli
@dataclass
class Config:
    steps: int = 1
def main(config):
    atexit.register(print, "interpreter's end")
    print("begun")
    raise {}
cli(main, Config)
"""


@pytest.mark.parametrize("processes, out", [("1", "begun\ninterpreter's end\n"), ("2", "begun\n")])
@pytest.mark.parametrize(
    "mistake, code, err",
    [
        ("UserError('no')", 2, "error: no\n"),
        ("KeyboardInterrupt", 130, "stopped by Ctrl-C\n"),
        ("ValueError('bug')", 1, "Traceback"),
    ],
)
def test_one_of_several_processes_that_fails_does_not_wait_for_the_interpreters_end(
    processes, out, mistake, code, err
):
    done = subprocess.run(
        [sys.executable, "-c", FAILING.format(mistake)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "RANK": "0", "WORLD_SIZE": processes},
    )
    assert (done.returncode, done.stdout) == (code, out)
    assert done.stderr.startswith(err)


# --- files -------------------------------------------------------------------------------------
def test_a_saved_config_is_json_of_every_field(tmp_path):
    save_config(Config(steps=5), tmp_path / "new" / "train_config.json")
    saved = json.loads((tmp_path / "new" / "train_config.json").read_text())
    assert saved == asdict(Config(steps=5))


@pytest.mark.parametrize("data, written", [("ä", "ä".encode()), (b"\0\r\n", b"\0\r\n")])
def test_an_atomic_write_replaces_the_file(tmp_path, data, written):
    atomic_write(tmp_path / "a", "old")
    atomic_write(str(tmp_path / "a"), data)
    assert (tmp_path / "a").read_bytes() == written
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, failure):
    atomic_write(tmp_path / "a", "old")
    with pytest.raises(failure), atomic_file(tmp_path / "a") as file:
        file.write(b"half")
        raise failure
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("--steps -5", "--steps must be at least 1, not -5"),
        ("--steps=0", "--steps must be at least 1, not 0"),
        ("--muon_lr -3e-4", "--muon_lr must be at least 0, not -0.0003"),
        ("--grad_clip -1", "--grad_clip must be at least 0, not -1.0"),
    ],
)
def test_a_value_below_its_least_is_refused(flags, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        parse(Config, argv=flags.split())
