"""Reading files: text, JSONL, corpora and dialogues, strictly.

data/README.md documents the formats. Wrong input raises UserError with file and line number.
"""

import json
from pathlib import Path

from nanollm.config import UserError

DEFAULT_VAL_FRACTION = 0.1


def read_text(path):
    """A UTF-8 text file as str; missing, empty or other encodings raise UserError."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.is_dir():
        raise UserError(f"{path} is a folder, a file is wanted")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start})") from None
    if not text.strip():
        raise UserError(f"{path} is empty")
    return text


def read_jsonl(path):
    """The records of a JSONL file (or of one JSON array) with their line numbers: [(line, dict),
    ...].
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise UserError(
                f"{path}, line {getattr(e, 'lineno', '?')}: broken JSON ({getattr(e, 'msg', e)})"
            ) from None
        numbered = list(enumerate(records, 1))
    else:
        numbered = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    numbered.append((number, json.loads(line)))
                except (ValueError, RecursionError) as e:
                    raise UserError(
                        f"{path}, line {number}: broken JSON ({getattr(e, 'msg', e)})"
                    ) from None
    for number, record in numbered:
        if not isinstance(record, dict):
            raise UserError(
                f"{path}, line {number}: a JSON object is wanted, not {type(record).__name__}"
            )
    return numbered


def read_documents(path):
    """Documents of a corpus: the whole of a .txt file, or the "text" of every record of a .jsonl
    file.
    """
    if Path(path).suffix not in (".jsonl", ".json"):
        return [read_text(path)]
    documents = []
    for line, record in read_jsonl(path):
        if not isinstance(record.get("text"), str):
            raise UserError(
                f'{path}, line {line}: a corpus record needs a "text", as in '
                f'{{"text": "Once upon..."}}'
            )
        documents.append(record["text"])
    return documents


SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
ROLES = ("system", "user", "assistant", "tool")


def read_chats(path):
    """Chat records as dicts with "messages"; ShareGPT's and Alpaca's records are turned into that
    form.
    """
    return [_as_chat(record, f"{path}, line {line}") for line, record in read_jsonl(path)]


def _as_chat(record, where):
    if "conversations" in record:  # ShareGPT
        turns = record["conversations"]
        if not isinstance(turns, list) or not all(isinstance(t, dict) for t in turns):
            raise UserError(f'{where}: "conversations" must be a list of {{"from", "value"}}')
        messages = [
            {
                "role": SHAREGPT_ROLES.get(str(t.get("from")), t.get("from")),
                "content": t.get("value"),
            }
            for t in turns
        ]
    elif "instruction" in record:  # Alpaca
        prompt = "\n\n".join(
            str(record[key]) for key in ("instruction", "input") if record.get(key)
        )
        messages = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": record.get("output")},
        ]
    else:
        messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UserError(f'{where}: a chat record needs "messages", a list of {{"role", "content"}}')
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message:
            raise UserError(f'{where}: message {i} has no "role"')
        if message["role"] not in ROLES:
            raise UserError(
                f"{where}: message {i} has the unknown role {message['role']!r}; roles are "
                f"{', '.join(ROLES)}"
            )
        if not isinstance(message.get("content"), str):
            raise UserError(f'{where}: message {i} has no text in "content"')
    return {**record, "messages": messages}


def split_documents(documents, part, fraction=DEFAULT_VAL_FRACTION):
    """The first or last part of a corpus: a single document is cut by characters, several are
    counted.
    """
    alone = len(documents) == 1 and isinstance(documents[0], str)
    whole = documents[0] if alone else documents
    cut = int(len(whole) * (1 - fraction))
    kept = whole[:cut] if part == "train" else whole[cut:]
    return [kept] if isinstance(kept, str) else kept


def identity(path):
    """What tells one version of a file from another: its place, size and time of change."""
    if not Path(path).exists():
        raise UserError(f"{path} does not exist")
    stat = Path(path).stat()
    return [Path(path).resolve(), stat.st_size, stat.st_mtime_ns]
