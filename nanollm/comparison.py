"""Several runs of one script, one after the other, and a table of them."""

import dataclasses
import subprocess
import sys
from pathlib import Path

from nanollm.checkpoint import read_json
from nanollm.config import UserError, save_config, say


def named(text, known):
    """The names in `text`, separated by commas, or all that are `known`; --compare."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in known and name != "all"]
    if unknown or not names:
        wrong = unknown[0] if unknown else text
        raise UserError(f"--compare {wrong}: it takes {', '.join(known)}, or all")
    return [name for name in known if name in names or "all" in names]


def start_comparison(cfg):
    """Keep the settings in --out, so that --compare ... --resume goes on with them."""
    out = Path(cfg.out)
    if (out / "metrics.jsonl").exists():
        raise UserError(f"{out} holds a run; choose another --out for a comparison")
    save_config(cfg, out / "train_config.json")


def run_each(cfg, runs, train):
    """{name: result.json} of `runs` {name: {flag: value}}, each in its own folder of --out.

    train(cfg) trains one. With --resume those that are done stay, and one cut short goes on.
    """
    results = {}
    for name, changes in runs.items():
        folder = Path(cfg.out) / name
        if not (cfg.resume and (folder / "result.json").exists()):
            own = {"compare": "", "out": str(folder)} | changes
            own["resume"] = cfg.resume and (folder / "state.pt").exists()
            say(f"\n--- {name}")
            sys.stdout.flush()  # before what another process prints
            train(dataclasses.replace(cfg, **own))
        results[name] = read_json(folder / "result.json")
    return results


def in_own_process(script):
    """A `train` for run_each that calls the script, so that a run's memory is its own."""

    def train(cfg):
        values = dataclasses.asdict(cfg).items()
        words = [f"--{flag}={'none' if v is None else v}" for flag, v in values]
        if code := subprocess.call([sys.executable, script, *words]):
            raise UserError(f"{cfg.out} ended with exit code {code}; mend it and compare again")

    return train


def markdown(rows):
    """A table from lists of cells; the first is its head."""
    head, *rest = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rest))
