"""What the village's modules share: wordings in blocks of text, and the settings of a run."""

import json
from pathlib import Path

from nanollm.config import BEGAN_FROM, UserError


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


def settings_of(run_folder, **names):
    """{argument: setting} for the names {argument: name of the setting}, as the run says that chose
    the first of them: this one, or one that it began from, as it was then; {} where none did.
    Raises UserError where that one isn't known.
    """
    path, first = Path(run_folder) / "train_config.json", next(iter(names.values()))
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    while first not in known and known.get(BEGAN_FROM):
        known = known[BEGAN_FROM]
    if first in known:
        return {argument: known[name] for argument, name in names.items() if name in known}
    init = known.get("init")
    if BEGAN_FROM in known or not init:  # it began from nothing, or from a downloaded model
        return {}
    if not Path(init).is_dir():
        raise UserError(
            f"{run_folder} began from {init}, which isn't there, so nobody knows which village it "
            f'was trained on; correct "init" in {path}'
        )
    return settings_of(init, **names)
