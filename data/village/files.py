"""What the village's modules share: wordings in blocks of text, records in files."""

import json
from collections import Counter
from pathlib import Path

from nanollm.config import BEGAN_FROM, UserError

# --- wordings --------------------------------------------------------------------------------


def wordings(text):
    """The wordings of a text, each ended by "|" or by the end of its line."""
    return tuple(part.strip() for part in text.replace("\n", "|").split("|") if part.strip())


def table(text):
    """{key: wordings} of a text in which a line begins with its key, or is indented and goes on."""
    rows = {}
    for line in text.strip().splitlines():
        if not line.startswith(" "):
            key, line = line.split(maxsplit=1)
            rows[key] = ()
        rows[key] += wordings(line)
    return rows


# --- files -----------------------------------------------------------------------------------


def show(name, records, n_samples, rng):
    """Print how many records there are, of each task, and some of them."""
    print(f"\n== {name}: {len(records)} records", *Counter(r.get("task") for r in records).items())
    for record in rng.sample(records, n_samples):
        said = "  ".join(f"[{m['role']}] {m['content']}" for m in record.get("messages", ()))
        print("*", record.get("image", ""), said or record, said and record.get("answer", ""))


def settings_with(name, run_folder):
    """Settings of the run that chose `name`: this one, or one that it began from, as it was then;
    {} for none. Raises UserError where that one isn't known.
    """
    path = Path(run_folder) / "train_config.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    while name not in known and known.get(BEGAN_FROM):
        known = known[BEGAN_FROM]
    if name in known:
        return known
    init = known.get("init")
    if BEGAN_FROM in known or not init:  # it began from nothing, or from a downloaded model
        return {}
    if not Path(init).is_dir():
        raise UserError(
            f"{run_folder} began from {init}, which isn't there, so nobody knows which village it "
            f'was trained on; correct "init" in {path}'
        )
    return settings_with(name, init)
