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
import ast
import contextlib
import dataclasses
import inspect
import json
import math
import os
import shutil
import sys
import textwrap
import traceback
import typing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

try:
    import fcntl
except ImportError:  # Windows, where directories are not locked
    fcntl = None

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


def type_and_choices(hint):
    """What argparse makes a value of a flag's text with, and the values that it takes, or None. The
    hint is str, int, float or a Literal of one kind, also with a Range, also with None.
    """
    optional = type(None) in typing.get_args(hint)
    if optional:
        [hint] = set(typing.get_args(hint)) - {type(None)}
    bounds = None
    if typing.get_origin(hint) is Annotated:
        hint, bounds = typing.get_args(hint)
    choices = typing.get_args(hint)  # of a Literal
    kind = type(choices[0]) if choices else hint
    convert = whole if kind is int else kind

    def read(text):
        if optional and text.lower() == "none":
            return None
        value = convert(text)  # argparse makes a message of a ValueError
        if bounds and not bounds.holds(value):
            raise argparse.ArgumentTypeError(f"must be {bounds}, not {value}")
        return value

    read.__name__ = kind.__name__  # which --help and argparse's messages say
    if choices and optional:
        choices = *choices, None
    return read, choices or None


def comments_of(config_class):
    """{field: (comment, group)}: the comment above a field and behind it, and the last "# -- Group"
    before it. Fields of a base class keep theirs where the class itself says nothing.
    """
    found = {}
    for base in reversed(config_class.__mro__[:-1]):
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):  # a class typed at a prompt has no source to read
            continue
        lines, end, group = source.splitlines(), 0, None
        for node in ast.parse(source).body[0].body:
            if isinstance(node, ast.AnnAssign):
                own = [line for line in lines[end : node.end_lineno] if "# " in line]
                texts = [line.partition("# ")[2] for line in own]
                for text in texts:
                    group = text.strip("- ") if text.startswith("-- ") else group
                text = " ".join(text for text in texts if not text.startswith("-- "))
                known_text, known_group = found.get(node.target.id, ("", "settings"))
                found[node.target.id] = text or known_text, group or known_group
            end = node.end_lineno
    return found


class Parser(argparse.ArgumentParser):
    def error(self, message):
        message = message.removeprefix("argument ").replace(": must be", " must be")
        raise UserError(f"{message}; see --help")


def parser_of(config_class, presets):
    """An argparse parser with a group for each "# -- Group" of the class."""
    hints = {}
    for base in config_class.__mro__[-2::-1]:  # another default keeps the type that its field has
        hints = typing.get_type_hints(base, include_extras=True) | hints
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    if presets:
        hints["preset"] = Literal[(*presets, fields["preset"].default)]
    parser = Parser(
        allow_abbrev=False,
        description=sys.modules[config_class.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    positional = [f"[{name}]" for name, field in fields.items() if field.metadata]
    parser.usage = " ".join(["%(prog)s", *positional, "[--flag value ...]"])
    comments, groups = comments_of(config_class), {}
    first = ["preset"] if presets else []
    first += vars(config_class).get("__annotations__", ())  # what the script itself adds
    for name in dict.fromkeys([*first, *fields]):
        comment, group = comments.get(name, ("", "settings"))
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        values = {"default": fields[name].default}
        values |= {preset: sets[name] for preset, sets in presets.items() if name in sets}
        values = ", ".join(f"{who}: {value}" for who, value in values.items())
        help = f"{comment} ({values})".replace("%", "%%")
        add_flag(groups[group], fields[name], hints[name], help)
    return parser


def add_flag(group, field, hint, help):
    """Add a field to a group of an argparse parser."""
    how = {"default": field.default, "help": help}
    if hint is bool:
        group.add_argument(f"--{field.name}", action="store_true", **how)
        no = {"dest": field.name, "action": "store_false", "help": argparse.SUPPRESS}
        group.add_argument(f"--no_{field.name}", **no)
        return
    how["type"], how["choices"] = type_and_choices(hint)
    if field.metadata.get("positional"):
        group.add_argument(field.name, nargs="?", **how)
    else:
        metavar = "|".join(map(str, how["choices"] or [how["type"].__name__]))
        group.add_argument(f"--{field.name}", metavar=metavar, **how)


def parse(config_class, presets=None, argv=None):
    """An instance of config_class, read from the command line. Raises UserError."""
    presets, typed = presets or {}, sys.argv[1:] if argv is None else argv
    parser = parser_of(config_class, presets)
    values = vars(parser.parse_args(typed))
    parser.set_defaults(**presets.get(values.get("preset"), {}))
    values = vars(parser.parse_args(typed))
    if values.get("resume"):
        preset, saved = values["preset"], saved_settings(values)
        parser.set_defaults(**saved)
        values = vars(parser.parse_args(typed)) | {"preset": saved["preset"]}
        if preset not in (saved["preset"], config_class.preset):
            say(f"note: a resumed run keeps its preset, {saved['preset']}")
        for name in saved:
            if values[name] != saved[name]:
                say(f"note: --{name} was {saved[name]}, and the run goes on with {values[name]}")
    return config_class(**values)


def saved_settings(values):
    """What the run to resume was started with."""
    path = Path(values["out"]) / "train_config.json"
    if not path.exists():
        raise UserError(f"nothing to resume in {path.parent}; start without --resume")
    saved = read_json(path)
    if unknown := saved.keys() - values.keys() - {BEGAN_FROM}:
        what = f"sets {', '.join(sorted(unknown))}, which this script doesn't know"
        raise UserError(f"{path} {what}: another version wrote it; start without --resume")
    return {name: saved[name] for name in saved if name not in (BEGAN_FROM, "resume", "out")}


# --- the edge of the program: errors become one line ---------------------------------------------


def say(message, file=None):
    """Prints once, however many processes torchrun started."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=file)


def alone():
    """False for one of several processes that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", 1)) == 1


def leave(code):
    """Ends the process. One of several ends at once, without the interpreter's own end, in which
    torch may wait for ever for the threads of a gloo group (pytorch/pytorch, pull request 154976).
    """
    unlock()
    if alone():
        raise SystemExit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def cli(main, config_class, presets=None, argv=None):
    """Runs main(config). A mistake of the user, or what the system refuses, becomes one line on
    stderr and exit code 2; a bug keeps its traceback.
    """
    try:
        main(parse(config_class, presets, argv))
        return sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough: Python must not flush into it once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        leave(141)
    except (UserError, OSError) as error:
        code, message = 2, f"error: {error}"
    except KeyboardInterrupt:
        code, message = 130, "stopped by Ctrl-C"
    except Exception:
        if alone():
            raise
        traceback.print_exc()
        leave(1)
    say(" ".join(message.split()), sys.stderr)
    leave(code)


# --- files are written whole, and by one process -------------------------------------------------


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


def read_json(path):
    """What a file of JSON holds; raises UserError."""
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON ({e})") from None


LOCKS = {}  # open files by their paths; the system gives up a lock when its process ends


def lock_of(folder):
    folder = Path(folder).resolve()
    return folder.with_name(f".{folder.name}.lock")


def lock(folder):
    """Keep other processes from writing to a directory until `unlock`, or until this one ends.
    Raises UserError where another one writes.
    """
    path = lock_of(folder)
    if path in LOCKS or not fcntl:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder} is being written by another process; wait for it") from None
    except OSError:  # a file system that knows no locks
        pass
    LOCKS[path] = file


def unlock(*folders):
    """Give back these locks, or all."""
    for path in list(map(lock_of, folders)) or list(LOCKS):
        if file := LOCKS.pop(path, None):
            file.close()
            path.unlink(missing_ok=True)
