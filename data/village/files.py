"""What the village's modules share: wordings in blocks of text, and the settings of a run."""

import json
from pathlib import Path


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
    the first of them: this one, or one that it began from; {} where none did.
    """
    path = Path(run_folder) / "train_config.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if next(iter(names.values())) in known:
        return {argument: known[name] for argument, name in names.items() if name in known}
    return settings_of(known["init"], **names) if known.get("init") else {}
