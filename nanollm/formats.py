"""Reading files: text, records of JSON or tables, corpora. What records mean is in records.py.

data/README.md documents the formats. Two things may be wrong with a record, in every reader alike:

    UserError   it isn't of the format: reading stops, with file and line
    Unusable    it is, but nothing can be learnt from it: it is dropped, counted, and named
"""

import csv
import gzip
import io
import json
import re
import string
import zlib
from pathlib import Path

from nanollm.config import UserError, atomic_write, say

DEFAULT_VAL_FRACTION = 0.1
IMAGE = "<image>"
DOCUMENT_END = "<|endoftext|>"  # between the texts of a .txt, alone on its line
# what is no text begins with: what unpacks or converts it
PACKED = {
    b"PAR1": "python -c \"import pandas; pandas.read_parquet('{0}').to_json('data.jsonl', "
    "orient='records', lines=True, force_ascii=False)\"",
    b"\x28\xb5\x2f\xfd": "zstd -d {0}",
    b"PK\x03\x04": "unzip {0}",
}


def need(fine, where, message):
    """Raise UserError with this message, behind `where` it happened, unless all is fine."""
    if not fine:
        raise UserError(f"{where}: {message}")


# --- the policy for records ----------------------------------------------------------------------


class Unusable(UserError):
    """A well-formed record that nothing can be learnt from; `reason` says why."""

    def __init__(self, where, reason):
        super().__init__(f"{where}: {reason}")
        self.reason = reason


def need_usable(fine, where, reason):
    """As `need`, of what a good file may hold: it is dropped, not refused."""
    if not fine:
        raise Unusable(where, reason)


class Record(dict):
    """A record that knows where it stands, its file and line; as a dict it is like any other."""

    def __init__(self, values, where):
        super().__init__(values)
        self.where = where

    def __or__(self, other):
        return Record({**self, **other}, self.where)


def place_of(record):
    """Where a record stands; of one that no file holds, how its last message begins."""
    messages = record.get("messages") or [{}]
    return getattr(record, "where", None) or f"{messages[-1].get('content')!r:.40}"


def usable(records, use, name, advice="mend or drop them"):
    """[use(record, its place) for each record], without those for which that raises Unusable. They
    are counted by reason, the first three of each named; UserError where they are most.
    """
    used, dropped = [], {}
    for record in records:
        where = place_of(record)
        try:
            used.append(use(record, where))
        except Unusable as e:
            dropped.setdefault(e.reason, []).append(where.removeprefix(f"{name}, "))
        except UserError as e:  # the tokenizer's knows no place
            raise UserError(str(e) if where in str(e) else f"{where}: {e}") from None
    if dropped:
        reasons = (
            f"{reason} ({len(places):,}: {', '.join(places[:3])}{', ...' * (len(places) > 3)})"
            for reason, places in dropped.items()
        )
        count, said = sum(map(len, dropped.values())), "; ".join(reasons)
        said = f"{name}: {count:,} of {len(records):,} records can't be used: {said}"
        need(count <= len(used), said, advice)
        say(f"{said}; dropped")
    return used


# --- text and records ----------------------------------------------------------------------------


def read_text(path):
    """A UTF-8 text file as str, unpacked where it is gzip; missing, empty or other files raise
    UserError.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a directory; name a file")
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist") from None
    except (EOFError, OSError, zlib.error) as e:
        raise UserError(f"{path} is a damaged gzip file ({e}); fetch it anew") from None
    for magic, command in PACKED.items():
        if data.startswith(magic):
            raise UserError(f"{path} is no text file; convert it first: {command.format(path)}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start})") from None
    if "\0" in text:
        raise UserError(f"{path} is not text: it holds the byte 0")
    if not text.strip():
        raise UserError(f"{path} is empty")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def ending(path):
    """The ending of a file's name in small letters, that of .gz aside."""
    return Path(Path(path).name.lower().removesuffix(".gz")).suffix


def read_records(path, text=None):
    """The records of a file, or of its `text`: objects of JSON (one per line, one array, or printed
    over several lines), or the lines of a .csv or .tsv, whose first one names their keys.
    """
    text, records = read_text(path) if text is None else text, []
    table = ending(path) in (".csv", ".tsv") and text.lstrip()[0] not in "[{"
    halves = re.search(r"\\u[dD][89a-fA-F]", text)  # of characters that JSON writes as two
    for place, value in (_rows_of_table if table else _json_values)(text, path):
        where, kind = f"{path}, {place}", type(value).__name__
        need(isinstance(value, dict), where, f"a record must be a JSON object, not {kind}")
        lone = halves and re.search("[\ud800-\udfff]", json.dumps(value, ensure_ascii=False))
        need(not lone, where, "half of a surrogate pair is no character")
        records.append(Record(value, where))
    need(records, path, "there is no record in it")
    return records


def _json_values(text, path):
    """(place, value) of the values that stand one after the other in a text, or in one array."""
    decode, line, end = json.JSONDecoder().raw_decode, 1, 0
    while found := re.compile(r"\S").search(text, end):
        begin, first = found.start(), end == 0
        line += text.count("\n", end, begin)
        try:
            value, end = decode(text, begin)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path}, line {line}: broken JSON ({e})") from None
        if first and isinstance(value, list):
            yield from ((f"record {n}", each) for n, each in enumerate(value, 1))
        else:
            yield f"line {line}", value
        line += text.count("\n", begin, end)


def _rows_of_table(text, path):
    """(place, {column: cell}) of the lines of a .csv or .tsv file behind the first."""
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if ending(path) == ".tsv" else ","
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        rows = [(f"line {lines.line_num}", cells) for cells in lines if cells]
    except csv.Error as e:
        raise UserError(f"{path}, line {lines.line_num}: a broken table ({e})") from None
    columns = choice_columns(rows[0][1])
    if columns is None:
        where, cells = rows.pop(0)
        columns = [cell.strip() for cell in cells]
        named = all(columns) and len({*columns}) == len(columns)
        need(named, f"{path}, {where}", "the first line must name the columns, each once")
    for where, cells in rows:
        said = f"{len(cells)} cells, but {len(columns)} columns"
        need(len(cells) == len(columns), f"{path}, {where}", said)
        yield where, dict(zip(columns, cells))


def choice_columns(cells):
    """The columns of a table without a line that names them, as MMLU is published: a question, its
    choices, the right one's letter. None of any other.
    """
    letters = [*string.ascii_uppercase[: max(0, len(cells) - 2)]]
    published = letters[1:] and cells[-1].strip() in letters
    return ["question", *letters, "answer"] if published else None


def write_jsonl(path, records):
    """Write one record per line; the file takes its place once it is complete."""
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    atomic_write(path, "".join(lines))


def read_usable(path, convert):
    """Records: what convert(record, its place) makes of each of a file, where it is usable."""
    return usable(read_records(path), lambda r, where: Record(convert(r, where), where), path)


def identity(path):
    """What tells one version of a file from another, or of a folder: the place, size and time of
    change of each file.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    files = texts_in(path) if path.is_dir() else [path]
    stats = [(file.resolve(), file.stat()) for file in files]
    return [x for file, stat in stats for x in (file, stat.st_size, stat.st_mtime_ns)]


def split_documents(documents, part, fraction=DEFAULT_VAL_FRACTION):
    """The first part of a list ("train"), or the last ("val"); a lone text is cut inside."""
    alone = len(documents) == 1 and isinstance(documents[0], str)
    whole = documents[0] if alone else documents
    cut = int(len(whole) * (1 - fraction))
    kept = whole[:cut] if part == "train" else whole[cut:]
    return [kept] if alone else kept


def read_parts(read, path, val_path=None, val_fraction=DEFAULT_VAL_FRACTION, most=None):
    """[training, held-out] records of a file, of its first `most`; the latter are in another file,
    or its last part. UserError where one of them would be empty.
    """
    records = read(path)[:most]
    if val_path:
        return [records, read(val_path)]
    parts = [split_documents(records, part, val_fraction) for part in ("train", "val")]
    few = f"{len(records)} records leave none to train on, or none to hold out; more are needed"
    need(all(parts), path, few)
    return parts


# --- corpora -------------------------------------------------------------------------------------


def texts_in(folder):
    """The .txt files in a folder and below it, in the order of their names."""
    return sorted(file for file in Path(folder).rglob("*") if ending(file) == ".txt")


def read_documents(path):
    """Documents of a corpus: the "text" of each record, or a whole text file; where lines say
    <|endoftext|> and nothing else, what stands between these. Of a folder: its .txt files.
    """
    if Path(path).is_dir():
        files = texts_in(path)
        need(files, path, "this directory has no .txt files")
        return [text for file in files for text in read_documents(file)]
    text = read_text(path)
    tabular = ending(path) in (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".jsonlines")
    if tabular or re.match(r'\s*(\[\s*)?\{\s*"[^"\n]*"\s*:', text):
        return usable(read_records(path, text), _document, path)
    parts = re.split(rf"\n[ \t]*{re.escape(DOCUMENT_END)}[ \t]*(?=\n|$)", "\n" + text)
    if len(parts) > 1:
        return [part.strip() for part in parts if part.strip()]
    if DOCUMENT_END in text:
        say(f"note: {path} is one document; {DOCUMENT_END} divides only where it has its own line")
    return [text]


def _document(record, where):
    wanted = 'a corpus record needs a "text", as in {"text": "Once upon..."}'
    text = record.get("text", 0) or ""  # null is empty
    need(isinstance(text, str) and "text" in record, where, wanted)
    need_usable(text.strip(), where, "the text is empty")
    return text


def images_in(messages):
    """How many images the text of these messages has."""
    return sum(message["content"].count(IMAGE) for message in messages)
