"""A dataclass becomes a command line: every field is a --flag, and its comment the flag's --help.

    @dataclass
    class Config:
        # -- Training                             (starts a group in --help)
        steps: int = 300                        # optimizer steps
        dtype: Literal["bf16", "fp32"] = "bf16"
        init: str | None = None                 # folder to start from

    if __name__ == "__main__": cli(main, Config, PRESETS)

Who wins, weakest first: the default, the preset, the resumed run's own value, the typed flag.
"""
import argparse
import ast
import contextlib
import dataclasses
import difflib
import errno
import inspect
import io
import json
import os
import sys
import textwrap
import tokenize
import traceback
import types
import typing
from pathlib import Path

WANTS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
MENDABLE = {errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT, errno.EROFS,
            errno.EISDIR}
AT_LEAST_ONE = {"steps", "batch_size", "accumulate", "eval_every", "eval_tokens", "layers",
                "channels", "heads", "kv_heads", "mlp", "context", "vocab_size", "repeats",
                "max_new_tokens", "prompts", "prompt_tokens", "new_tokens", "samples", "epochs",
                "minibatches", "eval_prompts", "best_of", "inner_updates", "eval_items",
                "eval_samples", "rank", "labels", "seeds", "pictures", "picture_size", "patch_size",
                "vision_layers", "vision_channels", "alike"}
NOT_NEGATIVE = {"lr", "adam_lr", "weight_decay", "warmup", "clip", "patience", "sample_tokens",
                "seed", "limit", "show", "test_items", "layer_decay", "top_k", "temperature",
                "centering", "gamma", "orpo_lambda", "nll_coef", "desirable_weight",
                "undesirable_weight", "kl_coef", "kl_target", "clip_range", "value_clip",
                "value_coef", "lam", "clip_low", "clip_high", "overlong_buffer", "threshold",
                "unlabelled", "sample_temperature", "rationale_weight", "cosine_weight",
                "cache_top_k"}
ABOVE_ZERO = {"beta", "kl_horizon", "megabytes"}


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: what is wrong and what to do."""


@dataclasses.dataclass
class Flag:
    """One flag: what it takes, and how the text behind it becomes a value."""
    name: str
    kind: type | None  # str, int, float or bool; None where there are choices
    choices: tuple
    default: object
    optional: bool = False
    positional: bool = False

    @property
    def wants(self):
        wants = WANTS[self.kind] if self.kind else "one of " + ", ".join(map(str, self.choices))
        return wants + " or none" * self.optional

    def convert(self, text):
        if self.optional and text.lower() == "none":
            return None
        with contextlib.suppress(ValueError, KeyError):
            if self.choices:
                return {str(choice): choice for choice in self.choices}[text]
            if self.kind is bool:
                return WORDS[text.lower()]
            if self.kind is int and text.lower().strip("+-_0123456789"):
                if float(text).is_integer():  # 1e6 is a whole number too
                    return int(float(text))
            elif self.kind is not float or float(text) == float(text):  # NaN is no setting
                return self.kind(text)
        raise UserError(f"--{self.name} wants {self.wants}, got {text!r}")

    def holds(self, value):
        if value is None or self.choices:
            return self.optional if value is None else value in self.choices
        return type(value) is self.kind or (self.kind is float and type(value) is int)


def flags_of(config_class, presets):
    """{name: Flag}, one for each field of the dataclass, and --preset where there are presets."""
    hints, flags = typing.get_type_hints(config_class), {}
    for field in dataclasses.fields(config_class):
        kinds, choices = {hints[field.name]}, ()
        if typing.get_origin(hints[field.name]) in (typing.Union, types.UnionType):
            kinds = set(typing.get_args(hints[field.name]))
        kind, *more = kinds - {type(None)}
        if typing.get_origin(kind) is typing.Literal:
            kind, choices = None, typing.get_args(kind)
        if more or not (choices or kind in WANTS):
            raise TypeError(f"{config_class.__name__}.{field.name}: no flag has this type")
        flags[field.name] = Flag(field.name, kind, choices, field.default, type(None) in kinds,
                                 field.metadata.get("positional", False))
    if presets:
        default = flags["preset"].default if "preset" in flags else "tiny"
        names = [*presets] + [default] * (default not in presets)  # no such preset: the defaults
        flags["preset"] = Flag("preset", None, tuple(names), default)
    for preset, values in presets.items():
        for name, value in values.items():
            if name not in flags or not flags[name].holds(value):
                raise ValueError(f"preset {preset!r}: {name} = {value!r} fits no field")
    return flags


def comments_of(config_class):
    """{field: (comment, group)}: the comment lines right above a field, behind it, and below."""
    try:
        source = textwrap.dedent(inspect.getsource(config_class))
    except (OSError, TypeError):  # a class typed at a prompt has no source to read
        return {}
    comments = {token.start[0]: token.string.lstrip("# ").rstrip()
                for token in tokenize.generate_tokens(io.StringIO(source).readline)
                if token.type == tokenize.COMMENT}
    fields = {node.lineno: node for node in ast.parse(source).body[0].body
              if isinstance(node, ast.AnnAssign)}
    found, group, above, node = {}, "settings", [], None
    for number, line in enumerate(source.splitlines(), 1):
        text, code = comments.get(number), line.partition("#")[0]
        if number in fields:
            node = fields[number]
            found[node.target.id], above = (above + [text] * bool(text), group), []
        elif text and node and (code.strip() or len(code) > node.col_offset):
            found[node.target.id][0].append(text)  # goes on below, further right than the field
        elif text and text.startswith("--"):
            group, above, node = text.strip("- "), [], None
        elif not code.strip():
            above, node = above + [text] if text else [], None
    return {name: (" ".join(lines), group) for name, (lines, group) in found.items()}


def print_help(config_class, flags, presets):
    comments, groups = comments_of(config_class), {}
    positional = "".join(f"[{name}] " for name, flag in flags.items() if flag.positional)
    parser = argparse.ArgumentParser(
        usage=f"%(prog)s {positional}[--flag value ...]", allow_abbrev=False,
        description=sys.modules[config_class.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, flag in flags.items():
        comment, group = comments.get(name, ("", "settings"))
        groups[group] = groups.get(group) or parser.add_argument_group(group)
        values = {"default": flag.default} if flag.default is not dataclasses.MISSING else {}
        values |= {preset: sets[name] for preset, sets in presets.items() if name in sets}
        values = ", ".join(f"{who}: {value}" for who, value in values.items() if value != "")
        groups[group].add_argument(
            *[f"--{name}"] + [f"--no_{name}"] * (flag.kind is bool),
            nargs="?" if flag.kind is bool else None,
            metavar="|".join(map(str, flag.choices)) or flag.kind.__name__,
            help=f"{comment} ({values})".strip().replace("%", "%%"))
    parser.print_help()


def read_argv(flags, argv):
    """{name: value} of the flags that were typed."""
    typed, words = {}, list(argv)
    free = [flag for flag in flags.values() if flag.positional]
    while words:
        word = words.pop(0)
        dashed, equals, text = word.partition("=")
        name = dashed.lstrip("-").replace("-", "_")
        flag = flags.get(name) if dashed.startswith("--") else None
        opposite = flags.get(name.removeprefix("no_"))
        if not word.startswith("-"):
            if not free:
                raise UserError(f"what is {word!r} for? every setting is written --name value")
            flag = free.pop(0)
            typed[flag.name] = flag.convert(word)
        elif flag:
            follows = bool(words) and not words[0].startswith("--")
            if flag.kind is bool and free:  # in `--flag FOLDER` the folder is not the flag's value
                follows = follows and words[0].lower() in WORDS
            if not equals and not follows and flag.kind is not bool:
                raise UserError(f"--{name} wants {flag.wants}; write --{name} VALUE")
            text = text if equals else words.pop(0) if follows else "true"
            typed[name] = flag.convert(text)
        elif opposite and opposite.kind is bool and not equals:
            typed[opposite.name] = False
        else:
            close = difflib.get_close_matches(name, flags, 1)
            raise UserError(f"unknown flag {dashed}; "
                            + (f"did you mean --{close[0]}?" if close else "see --help"))
    return typed


def saved_values(path, flags, typed):
    """What the run to resume was started with, as far as it is not typed anew."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"nothing to resume in {path.parent}; start without --resume") from None
    except ValueError:
        saved = None
    if not isinstance(saved, dict):
        raise UserError(f"{path} is not a JSON object; mend it or start without --resume")
    if gone := sorted(saved.keys() - flags.keys()):
        say(f"note: {path} holds settings that no longer exist, ignored: {', '.join(gone)}")
    if typed.get("preset", saved.get("preset")) != saved.get("preset"):
        say(f"note: a resumed run keeps its preset, {saved.get('preset')}")
    for name in sorted(typed.keys() & saved.keys() - {"preset", "resume", "out"}):
        if typed[name] != saved[name]:
            say(f"note: the run was started with --{name} {saved[name]}, and goes on with "
                f"{typed[name]}")
    saved = {name: saved[name] for name in saved.keys() & flags.keys() - {"resume", "out"}
             if name == "preset" or name not in typed}
    for name, value in saved.items():
        if name != "preset" and not flags[name].holds(value):  # an old preset's name is a mere note
            raise UserError(f"{path}: {name} wants {flags[name].wants}, got {value!r}; "
                            f"mend it or add --{name} VALUE")
    return saved


def parse(config_class, presets=None, argv=None):
    """An instance of config_class, read from the command line. Raises UserError."""
    presets, argv = presets or {}, sys.argv[1:] if argv is None else argv
    flags = flags_of(config_class, presets)
    if {"-h", "--help"} & {*argv}:
        print_help(config_class, flags, presets)
        raise SystemExit(0)
    typed = read_argv(flags, argv)
    values = {name: flag.default for name, flag in flags.items()} | typed
    values |= presets.get(values.get("preset"), {}) | typed
    if values.get("resume") and "out" in values:
        values |= saved_values(Path(values["out"] or ".") / "train_config.json", flags, typed)
    values = {field.name: values[field.name] for field in dataclasses.fields(config_class)}
    for name, value in values.items():
        if value is dataclasses.MISSING:
            raise UserError(f"--{name} is needed; it has no default")
    check_ranges(values)
    return config_class(**values)


def check_ranges(values):
    """Flags of these names mean the same in every script, and below these bounds nothing."""
    for name, value in values.items():
        least = 1 if name in AT_LEAST_ONE else 0 if name in NOT_NEGATIVE else None
        if least is not None and isinstance(value, (int, float)) and value < least:
            raise UserError(f"--{name} must be at least {least}, not {value}")
    if values.get("temperature") == float("inf"):
        raise UserError("--temperature must be finite, not inf")
    if values.get("seed", 0) >= 2**63:
        raise UserError("--seed must be less than 2^63")
    if not 0 < values.get("val_fraction", 0.5) < 1:
        raise UserError(f"--val_fraction must lie between 0 and 1, not {values['val_fraction']}")
    for name in ABOVE_ZERO & values.keys():
        if values[name] <= 0:
            raise UserError(f"--{name} must be more than 0, not {values[name]}")
    for name in {"label_smoothing", "disagreement"} & values.keys():
        if not 0 <= values[name] < 0.5:
            raise UserError(f"--{name} lies between 0 and 0.5, not at {values[name]}")


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
        if isinstance(error, OSError) and error.errno in MENDABLE:
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


def atomic_write(path, data):
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def save_config(config, path):
    """Writes the settings as JSON: <out>/train_config.json is what --resume reads."""
    atomic_write(path, json.dumps(dataclasses.asdict(config), indent=2) + "\n")
