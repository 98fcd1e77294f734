"""A dataclass becomes a command line: every field is a --flag, and its comment the flag's --help.

    @dataclass
    class Config(TrainConfig):                  # the fields of TrainConfig are flags, too
        # -- Data                                 (starts a group in --help)
        init: str | None = None                 # folder to start from
        rank: Whole[1] = 16                     # a whole number of at least 1
        steps: int = 300                        # another default than TrainConfig's

    if __name__ == "__main__": cli(main, Config, PRESETS)

Who wins, weakest first: the default, the preset, the resumed run's own value, the typed flag.
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import inspect
import json
import math
import os
import re
import shutil
import sys
import traceback
import types
import typing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

TO_FIX = {errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENOSPC, errno.EROFS, errno.EISDIR}
TO_FIX |= {getattr(errno, "EDQUOT", errno.ENOSPC)}  # Windows has none
# what the presets for downloaded models have in common; each script adds the rates of its papers
LARGE = dict(optimizer="adamw", schedule="cosine", checkpoint_activations=True)
BEGAN_FROM = "began_from"  # in train_config.json, beside the settings: those of an earlier run


class UserError(Exception):
    """A mistake that the user can fix. The message is one line: what is wrong and what to do."""


# --- the types of fields -------------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """Bounds of a number: least <= value <= most, the ends left out where `open`."""

    least: float = -math.inf
    most: float = math.inf
    open: bool = False

    def holds(self, value):
        if self.open:
            return self.least < value < self.most
        return self.least <= value <= self.most

    def __str__(self):
        if self.most == math.inf:
            return f"more than {self.least}" if self.open else f"at least {self.least}"
        return f"between {self.least} and {self.most}" + ", both excluded" * self.open


class Whole:
    """Whole[1]: an int of at least 1; Whole[0, 9]: between 0 and 9."""

    def __class_getitem__(cls, bounds):
        return Annotated[int, Range(*bounds if isinstance(bounds, tuple) else (bounds,))]


Share = Annotated[float, Range(0, 1)]
OpenShare = Annotated[float, Range(0, 1, open=True)]
ErrorRate = Annotated[float, Range(0, 0.5, open=True)]
Positive = Annotated[float, Range(0, open=True)]
NotNegative = Annotated[float, Range(0)]


@dataclass
class TrainConfig:
    """Options common to all training scripts; each adds its own flags, and its own defaults."""

    # smoke: seconds, to see that it runs; tiny: a laptop CPU; gpu: one GPU; downloaded: for a model
    # of 0.1 to 1B parameters
    preset: str = "tiny"
    # -- Training
    out: str = "runs/out"  # run folder to write
    steps: Whole[1] = 300  # optimizer steps
    batch_size: Whole[1] = 16  # rows per optimizer step, over all processes
    accumulate: Whole[1] = 1  # parts that a process splits its rows into, to save memory
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: matrices by Muon, the rest by AdamW
    lr: NotNegative = 1e-3  # learning rate of AdamW
    muon_lr: NotNegative = 0.01  # learning rate of Muon
    weight_decay: NotNegative = 0.0  # on matrices and embeddings
    schedule: Literal["trapezoid", "cosine", "constant"] = "trapezoid"  # learning rate over steps
    warmup: Whole[0] = 20  # steps of linear warm-up
    grad_clip: NotNegative = 1.0  # largest norm of the gradient; 0 for no clipping
    eval_every: Whole[1] = 100  # steps between evaluations, each followed by a checkpoint
    # -- Machine
    seed: Whole[0, 2**40] = 0  # of weights, order of data and samples
    device: str = "auto"  # auto, cpu, cuda, cuda:N, or another that torch knows, such as mps
    # precision of the layers; weights stay fp32; auto: what the machine multiplies fastest
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    compile: bool = False  # torch.compile: about half a minute to start, then faster
    # recompute activations in backward: less memory, a third more time
    checkpoint_activations: bool = False
    resume: bool = False  # continue the run in --out from its last checkpoint


@dataclass
class ModelConfig:
    """Options common to commands that open a model."""

    # run folder or model folder
    model: str = dataclasses.field(default="runs/sft", metadata={"positional": True})
    seed: Whole[0, 2**40] = 0  # of the sampling
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # precision of the layers


@dataclass
class AdapterConfig:
    """Train an adapter instead of all weights."""

    # -- Adapter
    # freeze the model and train an adapter only: lora, dora, qlora, bottleneck, prefix, ptuning
    # or prompt (nanollm/peft/), or two such as lora+prompt; none: all weights are trained
    adapter: str | None = None
    rank: Whole[1] = 16  # r of lora, dora and qlora; width of a bottleneck adapter
    alpha: Positive = 32.0  # lora, dora, qlora: what they learn counts alpha / r


# --- from fields to flags ------------------------------------------------------------------------


def whole(text):
    """An int, of 1000, 1_000 or 1e3."""
    value = Fraction(text)
    if value.denominator > 1:
        raise ValueError
    return int(value)


def number(text):
    if math.isnan(float(text)):
        raise ValueError
    return float(text)


READERS = {str: str, int: whole, float: number}
NAMES = {str: "text", int: "a whole number", float: "a number"}


def reader_of(field, hint):
    """(read, shown): what makes a value of a flag's text, and what --help says of it. The hint is
    str, int, float or a Literal, also with a Range, also with None.
    """
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = set(typing.get_args(hint)) if union else {hint}
    optional = type(None) in kinds or field.default is None
    [kind], bounds = kinds - {type(None)}, None
    if typing.get_origin(kind) is Annotated:
        kind, bounds = typing.get_args(kind)
    choices = {str(choice): choice for choice in typing.get_args(kind)}
    takes = f"one of {', '.join(choices)}" if choices else NAMES[kind]
    convert = choices.__getitem__ if choices else READERS[kind]

    def read(text):
        if optional and text.lower() == "none":
            return None
        try:
            value = convert(text)
        except (ValueError, KeyError):
            wanted = takes + " or none" * optional
            raise UserError(f"--{field.name} must be {wanted}, got {text!r}") from None
        if bounds and not bounds.holds(value):
            raise UserError(f"--{field.name} must be {bounds}, not {value}")
        return value

    return read, "|".join(choices) or kind.__name__


def comments_of(config_class):
    """{field: (comment, group)}: the comment lines right above a field, and behind it. Fields of a
    base class keep its comments where the class itself says nothing.
    """
    found = {}
    for base in reversed(config_class.__mro__[:-1]):
        group, above, before = None, [], None
        try:
            lines = inspect.getsource(base).splitlines()
        except (OSError, TypeError):  # a class typed at a prompt has no source to read
            continue
        for line in lines:
            code, _, comment = map(str.strip, line.partition("  # "))
            name = code.partition(":")[0]
            if comment.startswith("-- "):
                group, above = comment.strip("- "), []
            elif before and comment:  # a value on a line of its own, with the comment behind it
                found[before] = f"{found[before][0]} {comment}".strip(), found[before][1]
            elif name in base.__annotations__:
                known = found.get(name, ("", "settings"))
                text = " ".join([*above, comment]).strip()
                found[name], above = (text or known[0], group or known[1]), []
            else:
                above = [] if code or not comment else [*above, comment]
            before = name if name in base.__annotations__ and code.endswith("(") else None
    return found


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line, and a hint where a flag is misspelt."""
        flag = re.search(r"unrecognized arguments: (--\w+)", message)
        close = flag and difflib.get_close_matches(flag[1], self._option_string_actions, 1)
        hint = f"did you mean {close[0]}?" if close else "see --help"
        raise UserError(f"{message.removeprefix('argument ')}; {hint}")


def parser_of(config_class, presets):
    """An argparse parser with a group for each "# -- Group" of the class."""
    comments, groups, hints = comments_of(config_class), {}, {}
    for base in config_class.__mro__[-2::-1]:  # another default keeps the type that its field has
        hints = typing.get_type_hints(base, include_extras=True) | hints
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    parser = Parser(
        usage="%(prog)s [--flag value ...]",
        allow_abbrev=False,
        description=sys.modules[config_class.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if presets:
        hints["preset"] = Literal[(*presets, fields["preset"].default)]
    own = [*vars(config_class).get("__annotations__", {})]  # first what the script itself adds
    for name in dict.fromkeys(["preset"] * bool(presets) + own + [*fields]):
        field, (comment, group) = fields[name], comments.get(name, ("", "settings"))
        groups[group] = groups.get(group) or parser.add_argument_group(group)
        values = {"default": field.default}
        values |= {preset: sets[name] for preset, sets in presets.items() if name in sets}
        values = ", ".join(f"{who}: {value}" for who, value in values.items() if value != "")
        text = (comment + f" ({values})" * bool(values)).replace("%", "%%")
        how = {"default": field.default, "help": text}
        add = groups[group].add_argument
        if hints[name] is bool:
            add(f"--{name}", action="store_true", **how)
            add(f"--no_{name}", dest=name, action="store_false", help=argparse.SUPPRESS)
            continue
        how["type"], how["metavar"] = reader_of(field, hints[name])
        if field.metadata.get("positional"):
            parser.usage = f"%(prog)s [{name}] [--flag value ...]"
            add(
                name, nargs="?", type=how["type"], default=argparse.SUPPRESS, help=argparse.SUPPRESS
            )
        add(f"--{name}", **how)
    return parser


def as_flags(values):
    """The words of a command line that set these values."""
    yes_or_no = {True: "--{}", False: "--no_{}"}
    return [
        yes_or_no[value].format(name) if isinstance(value, bool) else f"--{name}={value}"
        for name, value in values.items()
    ]


def saved_settings(path, known):
    """What the run to resume was started with."""
    if not path.exists():
        raise UserError(f"nothing to resume in {path.parent}; start without --resume")
    saved = read_json(path)
    if gone := sorted(saved.keys() - known - {BEGAN_FROM}):
        raise UserError(
            f"{path} was written by another version: it sets {', '.join(gone)}, which this "
            "script doesn't know; start anew, without --resume"
        )
    return {name: saved[name] for name in saved if name not in (BEGAN_FROM, "resume", "out")}


def parse(config_class, presets=None, argv=None):
    """An instance of config_class, read from the command line. A preset, and what the run to resume
    was started with, count as typed before the rest. Raises UserError.
    """
    presets, typed = presets or {}, sys.argv[1:] if argv is None else argv
    parser = parser_of(config_class, presets)
    preset = getattr(parser.parse_args(typed), "preset", None)
    values = vars(parser.parse_args([*as_flags(presets.get(preset, {})), *typed]))
    if values.get("resume"):
        path = Path(values["out"]) / "train_config.json"
        saved = saved_settings(path, values.keys())
        kept = {"preset": saved.pop("preset", preset)}
        try:
            values = vars(parser.parse_args([*as_flags(saved), *typed])) | kept
        except UserError as error:
            raise UserError(f"{path}: {error}; fix it or start without --resume") from None
        if kept["preset"] != preset and any(word.startswith("--preset") for word in typed):
            say(f"note: a resumed run keeps its preset, {kept['preset']}")
        for name in sorted(saved):
            if values[name] != saved[name]:
                say(f"note: --{name} was {saved[name]}, and the run goes on with {values[name]}")
    return config_class(**values)


# --- the edge of the program: errors become one line, and files are written whole --------------


def say(message, file=None):
    """Prints once, however many processes torchrun started."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=file)


def alone():
    """False for one of several processes that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", 1)) == 1


def leave(code):
    """Ends the process. One of several ends at once, without the interpreter's own end: there torch
    frees a gloo group while it holds Python's lock and its threads still run, and then may abort,
    or wait for ever (pytorch/pytorch, pull request 154976), so that torchrun never learns of it.
    """
    unlock()
    if alone():
        raise SystemExit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def cli(main, config_class, presets=None, argv=None):
    """Runs main(config). A mistake of the user becomes one line on stderr and exit code 2; a bug
    keeps its traceback.
    """
    try:
        main(parse(config_class, presets, argv))
        return sys.stdout.flush()
    except UserError as error:
        code, message = 2, f"error: {error}"
    except KeyboardInterrupt:
        code, message = 130, "stopped by Ctrl-C"
    except BrokenPipeError:  # `| head` has read enough: Python must not flush into it once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        leave(141)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in TO_FIX:
            code, message = 2, f"error: {error.filename or 'cannot write'}: {error.strerror}"
        elif alone():
            raise
        else:
            traceback.print_exc()
            leave(1)
    say(" ".join(message.split()), sys.stderr)
    leave(code)


@contextlib.contextmanager
def atomic_file(path):
    """A binary file to write to. It takes the place of `path` once it is complete and on disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_folder(folder):
    """A new directory to fill. It takes the place of `folder` once that has gone well, unless
    another process was faster, with the same bytes.
    """
    folder = Path(folder)
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a killed process with the same number
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        try:
            os.replace(unfinished, folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # gone already where all went well


def atomic_write(path, data):
    with atomic_file(path) as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)


def save_config(config, path, **more):
    """Writes the settings as JSON: <out>/train_config.json is what --resume reads."""
    atomic_write(path, json.dumps(dataclasses.asdict(config) | more, indent=2) + "\n")


def parse_json(text, where, kind=dict):
    """The JSON object, or array, in a text of a model's or a run's file; raises UserError."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where} is not valid JSON ({e})") from None
    if not isinstance(value, kind):
        raise UserError(f"{where} must hold a JSON {'object' if kind is dict else 'array'}")
    return value


def read_json(path, kind=dict):
    """The JSON object, or array, in a file; raises UserError."""
    try:
        return parse_json(Path(path).read_bytes(), path, kind)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None


LOCKS = {}  # open files by their paths; the system gives up a lock when its process ends


def lock_of(folder):
    folder = Path(folder).resolve()
    return folder.with_name(f".{folder.name}.lock")


def lock(folder):
    """Keep other processes from writing to a directory until `unlock`, or until this one ends.
    Raises UserError where another one writes.
    """
    path = lock_of(folder)
    if path in LOCKS:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a", encoding="utf-8")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        file.close()
        raise UserError(
            f"{folder} is being written by another process; wait for it, or name another directory"
        ) from None
    except OSError:  # a file system that knows no locks
        pass
    LOCKS[path] = file


def unlock(*folders):
    """Give back these locks, or all."""
    for path in list(map(lock_of, folders)) or list(LOCKS):
        if file := LOCKS.pop(path, None):
            file.close()
            with contextlib.suppress(PermissionError):  # on Windows another process has it open
                path.unlink(missing_ok=True)
