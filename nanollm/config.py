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
import atexit
import contextlib
import dataclasses
import difflib
import errno
import inspect
import io
import json
import math
import os
import shutil
import socket
import sys
import textwrap
import tokenize
import traceback
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

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
class AdapterConfig:
    """Train an adapter instead of all weights."""

    # -- Adapter
    # freeze the model and train an adapter only: lora, dora, qlora, bottleneck, prefix, ptuning
    # or prompt (nanollm/peft/); none: all weights are trained
    adapter: str | None = None
    rank: Whole[1] = 16  # r of lora, dora and qlora; width of a bottleneck adapter
    alpha: Positive = 32.0  # lora, dora, qlora: what they learn counts alpha / r


# --- from fields to flags ------------------------------------------------------------------------


@dataclass
class Flag:
    """One flag: what it takes, and how the text behind it becomes a value."""

    name: str
    kind: type | None  # str, int, float or bool; None where there are choices
    choices: tuple
    range: Range | None
    default: object
    optional: bool = False
    positional: bool = False

    @property
    def takes(self):
        names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
        takes = names[self.kind] if self.kind else "one of " + ", ".join(map(str, self.choices))
        return takes + " or none" * self.optional

    def convert(self, text):
        """The value that the text means; raises UserError."""
        if self.optional and text.lower() == "none":
            return None
        with contextlib.suppress(ValueError, KeyError, OverflowError):
            if self.choices:
                return {str(choice): choice for choice in self.choices}[text]
            if self.kind is int and text.lower().strip("+-_0123456789"):
                value = int(float(text)) if float(text).is_integer() else None  # 1e6 is whole too
            else:
                value = self.kind(text)
            if value is not None and value == value:  # NaN equals not even itself
                self.check(value)
                return value
        raise UserError(f"--{self.name} must be {self.takes}, got {text!r}")

    def check(self, value):
        """Raise UserError where a value, of a file or a preset, doesn't fit the field."""
        if value is None or self.choices:
            fits = self.optional if value is None else value in self.choices
        else:
            fits = type(value) is self.kind or (self.kind is float and type(value) is int)
        if not fits:
            raise UserError(f"--{self.name} must be {self.takes}, got {value!r}")
        if self.range and value is not None and not self.range.holds(value):
            raise UserError(f"--{self.name} must be {self.range}, not {value}")


def flag_of(field, hints):
    """The Flag of a dataclass field. hints: its types in the class and in its bases, from which it
    has its bounds where it only sets another default. TypeError where no flag has this type.
    """
    flag = Flag(field.name, None, (), None, field.default)
    flag.positional = field.metadata.get("positional", False)
    for hint in reversed(hints):
        kinds = {hint}
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            kinds = set(typing.get_args(hint))
        flag.optional = type(None) in kinds
        flag.kind, *more = kinds - {type(None)}
        if typing.get_origin(flag.kind) is Annotated:
            flag.kind, flag.range = typing.get_args(flag.kind)
        if typing.get_origin(flag.kind) is Literal:
            flag.kind, flag.choices = None, typing.get_args(flag.kind)
        if more or not (flag.choices or flag.kind in (str, int, float, bool)):
            raise TypeError(f"{field.name}: no flag has this type")
    return flag


def flags_of(config_class, presets):
    """{name: Flag}, one for each field of the dataclass; `preset` takes the names of presets."""
    bases = [typing.get_type_hints(c, include_extras=True) for c in config_class.__mro__[:-1]]
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    flags = {
        name: flag_of(field, [hints[name] for hints in bases if name in hints])
        for name, field in fields.items()
    }
    if presets:
        default = fields["preset"].default
        names = tuple(dict.fromkeys([*presets, default]))  # no such preset: the defaults
        flags["preset"] = Flag("preset", None, names, None, default)
    for preset, values in presets.items():
        for name, value in values.items():
            if name not in flags:
                raise ValueError(f"preset {preset!r}: there is no field {name}")
            flags[name].check(value)
    return flags


def comments_of(config_class):
    """{field: (comment, group)}: the comment lines right above a field, and behind it. Fields of a
    base class keep its comments where the class itself says nothing.
    """
    found = {}
    for base in reversed(config_class.__mro__[:-1]):
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):  # a class typed at a prompt has no source to read
            continue
        for name, (comment, group) in comments_in(source).items():
            known = found.get(name, ("", "settings"))
            group = known[1] if group is None else group
            found[name] = comment or known[0], group
    return found


def comments_in(source):
    """{field: (comment, group or None)} of one class."""
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ").rstrip()
    body = ast.parse(source).body[0].body
    fields = {node.lineno: node.target.id for node in body if isinstance(node, ast.AnnAssign)}
    ends = {node.end_lineno: node.target.id for node in body if isinstance(node, ast.AnnAssign)}
    found, group, above = {}, None, []
    for number, line in enumerate(source.splitlines(), 1):
        text = comments.get(number)
        if number in fields:
            found[fields[number]], above = (above, group), []
        if number in ends and text:  # behind the field, which may take several lines
            found[ends[number]][0].append(text)
        elif text and text.startswith("--"):
            group, above = text.strip("- "), []
        elif number not in fields:
            above = above + [text] if text and line.lstrip().startswith("#") else []
    return {name: (" ".join(lines), group) for name, (lines, group) in found.items()}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        flag = message.removeprefix("argument ").partition(":")[0]
        raise UserError(f"{flag} needs a value; write {flag} VALUE")


def parser_of(config_class, flags, presets):
    """An argparse parser with a group for each "# -- Group" of the class."""
    comments, groups = comments_of(config_class), {}
    positional = "".join(f"[{name}] " for name, flag in flags.items() if flag.positional)
    parser = Parser(
        usage=f"%(prog)s {positional}[--flag value ...]",
        allow_abbrev=False,
        description=sys.modules[config_class.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    own = [*vars(config_class).get("__annotations__", {})]  # first what the script itself adds
    for name in dict.fromkeys(["preset"] * ("preset" in flags) + own + [*flags]):
        flag, (comment, group) = flags[name], comments.get(name, ("", "settings"))
        groups[group] = groups.get(group) or parser.add_argument_group(group)
        values = {"default": flag.default} if flag.default is not dataclasses.MISSING else {}
        values |= {preset: sets[name] for preset, sets in presets.items() if name in sets}
        values = ", ".join(f"{who}: {value}" for who, value in values.items() if value != "")
        text = f"{comment} ({values})".strip().replace("%", "%%")
        add = groups[group].add_argument
        if flag.positional:
            add("__positional", nargs="?", metavar=name, help=argparse.SUPPRESS)
        if flag.kind is bool:
            add(f"--{name}", dest=name, action="store_true", help=text)
            add(f"--no_{name}", dest=name, action="store_false", help=argparse.SUPPRESS)
        else:
            shown = "|".join(map(str, flag.choices)) or flag.kind.__name__
            add(f"--{name}", metavar=shown, help=text)
    return parser


def read_argv(config_class, flags, presets, argv):
    """{name: value} of the flags that were typed."""
    words = []
    for word in argv:
        name, equals, text = word.partition("=")
        if word.startswith("--"):  # --batch-size is --batch_size
            word = "--" + name[2:].replace("-", "_") + equals + text
        elif word.startswith("-") and is_number(word) and words and "=" not in words[-1]:
            word = f"{words.pop()}={word}"  # which argparse would take for a flag
        words.append(word)
    given, unknown = parser_of(config_class, flags, presets).parse_known_args(words)
    for word in unknown:
        name = word.partition("=")[0]
        if not word.startswith("--"):
            raise UserError(f"what is {word!r} for? every setting is written --name value")
        close = difflib.get_close_matches(name.lstrip("-"), flags, 1)
        hint = f"did you mean --{close[0]}?" if close else "see --help"
        raise UserError(f"unknown flag {name}; {hint}")
    typed = vars(given)
    if (first := typed.pop("__positional", None)) is not None:
        typed[next(name for name, flag in flags.items() if flag.positional)] = first
    return {
        name: flags[name].convert(value) if isinstance(value, str) else value
        for name, value in typed.items()
    }


def is_number(text):
    with contextlib.suppress(ValueError):
        return isinstance(float(text), float)
    return False


def saved_values(path, flags, typed):
    """What the run to resume was started with, as far as it is not typed anew."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"nothing to resume in {path.parent}; start without --resume") from None
    except ValueError:
        saved = None
    if not isinstance(saved, dict):
        raise UserError(f"{path} must be a JSON object; fix it or start without --resume")
    if gone := sorted(saved.keys() - flags.keys() - {BEGAN_FROM}):
        raise UserError(
            f"{path} was written by another version: it sets {', '.join(gone)}, which this "
            "script doesn't know; start anew, without --resume"
        )
    if typed.get("preset", saved.get("preset")) != saved.get("preset"):
        say(f"note: a resumed run keeps its preset, {saved.get('preset')}")
    for name in sorted(typed.keys() & saved.keys() - {"preset", "resume", "out"}):
        if typed[name] != saved[name]:
            say(f"note: --{name} was {saved[name]}, and the run goes on with {typed[name]}")
    saved = {
        name: saved[name]
        for name in saved.keys() & flags.keys() - {"resume", "out"}
        if name == "preset" or name not in typed
    }
    for name, value in saved.items():
        if name != "preset":  # an old preset's name is a mere note
            try:
                flags[name].check(value)
            except UserError as error:
                raise UserError(f"{path}: {error}; fix it or add --{name} VALUE") from None
    return saved


def parse(config_class, presets=None, argv=None):
    """An instance of config_class, read from the command line. Raises UserError."""
    presets, argv = presets or {}, sys.argv[1:] if argv is None else argv
    flags = flags_of(config_class, presets)
    typed = read_argv(config_class, flags, presets, argv)
    values = {name: flag.default for name, flag in flags.items()} | typed
    values |= presets.get(values.get("preset"), {}) | typed
    if values.get("resume") and "out" in values:
        values |= saved_values(Path(values["out"] or ".") / "train_config.json", flags, typed)
    for name, value in values.items():
        if value is dataclasses.MISSING:
            raise UserError(f"--{name} must be given; it has no default")
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


LOCKS = {}  # lock files of this process, held open: Windows then lets nobody delete them


def lock_of(folder):
    folder = Path(folder).resolve()
    return folder.with_name(f".{folder.name}.lock")


def lock(folder):
    """Keep other processes from writing to a directory until `unlock`, or until this one ends; a
    lock whose process is gone counts for nothing. Raises UserError where another one writes.
    """
    path = lock_of(folder)
    if path in LOCKS:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        owner = path.read_text(encoding="utf-8") if path.exists() else ""
        if owner and is_gone(owner):
            path.unlink(missing_ok=True)
        LOCKS[path] = open(path, "x", encoding="utf-8")
    except (FileExistsError, PermissionError):
        if not path.exists():  # the directory can't be written to
            raise
        raise UserError(
            f"{folder} is being written by {owner or 'another process'}; wait for it, or name "
            f"another directory (if that process does something else, delete {path})"
        ) from None
    LOCKS[path].write(f"process {os.getpid()} on {socket.gethostname()}")
    LOCKS[path].flush()


def is_gone(owner):
    """Has the process ended that a lock names? On another machine nobody knows."""
    pid, _, host = owner.removeprefix("process ").partition(" on ")
    if host != socket.gethostname() or not pid.isdecimal():
        return False
    if os.name == "nt" or int(pid) == os.getpid():  # there a lock that is held can't be deleted
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # somebody else's
        pass
    return False


def unlock(*folders):
    """Give back these locks, or all."""
    for path in list(map(lock_of, folders)) or list(LOCKS):
        if file := LOCKS.pop(path, None):
            file.close()
            path.unlink(missing_ok=True)


atexit.register(unlock)
