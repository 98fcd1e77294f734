"""Runs side by side, of any scripts: what they reached, and what that took.

    python -m nanollm.compare runs/a runs/b ...

All is read from the run folders: effects, seconds and peak memory from result.json, the numbers of
parameters from the headers of the files of weights. Runs whose names and settings differ in the
seed alone (runs/soft_0, runs/soft_1) make one row: their mean, and the range.
"""

import re
import sys
from dataclasses import dataclass
from math import prod

from nanollm.checkpoint import bases_of, existing_folder, is_adapter
from nanollm.config import BEGAN_FROM, UserError, cli, read_json
from nanollm.metrics import table
from nanollm.run import format_value
from nanollm.safetensors import read_header

OWN = ("seed", "out", "resume", "dtype", BEGAN_FROM)  # settings in which runs of one row may differ


def settings_of(folder):
    """(name, settings) without what runs of one row may differ in: the seed, also in paths."""
    settings = read_json(folder / "train_config.json")
    common = {name: value for name, value in settings.items() if name not in OWN}
    texts = str(folder), repr(sorted(common.items()))
    return tuple(re.sub(r"_\d+(?=[/'\"]|$)", "", text) for text in texts)


def parameters(folder):
    """(trained, all) parameters in a run folder. Those of an adapter are trained, those of its
    bases not; of a whole model all are, unless result.json says so under "trained_parameters".
    """

    def stored(place):
        name = "adapter_model*.safetensors" if is_adapter(place) else "model*.safetensors"
        headers = [read_header(path)[0] for path in place.glob(name)]
        return sum(prod(entry.shape) for header in headers for entry in header.values())

    own = stored(folder)
    trained = read_json(folder / "result.json").get("trained_parameters", own)
    return trained, own + sum(map(stored, bases_of(folder)))


def mean(values, unit=""):
    """The mean of a value of several runs, and its range, as text."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    least, most = (format_value(end, unit) for end in (min(values), max(values)))
    mean = format_value(sum(values) / len(values), unit)
    return mean if least == most else f"{mean} ({least} to {most})"


def row_of(name, folders, names):
    """A row of the table: {column: text}; `names`: (name, unit) of all effects that a run has."""
    results = [read_json(folder / "result.json") for folder in folders]
    row = {"run": name if len(folders) > 1 else str(folders[0]), "runs": str(len(folders))}
    for effect, unit in names:
        found = [e for result in results for e in result.get("effects", ()) if e["name"] == effect]
        before, after = (mean([e[side] for e in found], unit) for side in ("before", "after"))
        column = effect if unit in ("", "share") else f"{effect}, {unit}"
        row[column] = after if before == "-" else f"{before} -> {after}"
    trained, every = zip(*map(parameters, folders))
    row |= {"trained": f"{max(trained):,}", "parameters": f"{max(every):,}"}
    row["seconds"] = mean([round(result["seconds"]) for result in results])
    memory = [result.get("peak_memory_bytes") for result in results]
    return row | {"memory, GB": mean([m and round(m / 1e9, 2) for m in memory])}


def main(words):
    if not words:
        raise UserError("name the run folders to compare: python -m nanollm.compare runs/a runs/b")
    groups, names = {}, {}
    for folder in map(existing_folder, words):
        groups.setdefault(settings_of(folder), []).append(folder)
        effects = read_json(folder / "result.json").get("effects", ())
        names |= dict.fromkeys((effect["name"], effect["unit"]) for effect in effects)
    rows = [row_of(name, folders, names) for (name, _), folders in groups.items()]
    print(table(list(rows[0]), [list(row.values()) for row in rows]))


@dataclass
class Config:
    """No settings."""


if __name__ == "__main__":
    folders = [word for word in sys.argv[1:] if not word.startswith("--")]
    cli(lambda cfg: main(folders), Config, argv=[w for w in sys.argv[1:] if w not in folders])
