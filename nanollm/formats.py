"""Reading files: text, records of JSON or tables, corpora. What records mean is in records.py.

Text is read line by line and a corpus document by document, a long one in pieces, so that one of
any size takes little memory.

data/README.md documents the formats. Two things may be wrong with a record, in every reader alike:

    UserError   it isn't of the format: reading stops, with file and line
    Unusable    it is, but nothing can be learnt from it: it is dropped, counted, and named
"""

import csv
import functools
import gzip
import io
import itertools
import json
import re
import string
import zlib
from collections import defaultdict
from pathlib import Path

from nanollm.config import UserError, atomic_write, say

DEFAULT_VAL_FRACTION = 0.1
IMAGE = "<image>"
JSON = (".json", ".jsonl", ".ndjson", ".jsonlines")  # endings of files of records
DOCUMENT_END = "<|endoftext|>"  # between the texts of a .txt, alone on its line
PIECE = 2**16  # characters of a long text that are made into tokens at a time
# Where a long text can be cut without changing its tokens: behind a line and before a word, or
# between two words. No tokenizer's pattern that we know joins what is on both sides.
SAFE_CUT = re.compile(r"(?<=\S\n)(?=\w)|(?<=\w)(?= [^\W\d_])")
DECODE, BETWEEN = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
# how JSON writes half of a character beyond U+FFFF, and such a half without the other
HALF, LONE = re.compile(r"\\u[dD][89a-fA-F]"), re.compile("[\ud800-\udfff]")
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
    """Nothing can be learnt from a well-formed record; the message says why."""


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
    """[use(record) for each record], without those for which that raises Unusable. They are counted
    by reason, the first three of each named; UserError where they are most.
    """
    return list(stream_usable(records, use, name, advice))


def stream_usable(records, use, name, advice="mend or drop them"):
    """As `usable`, one after the other; that too many can't be used shows at the end."""
    used, dropped = 0, defaultdict(list)  # reason -> places
    for record in records:
        try:
            made = use(record)
        except Unusable as e:
            dropped[str(e)].append(place_of(record).removeprefix(f"{name}, "))
        except UserError as e:
            raise UserError(f"{place_of(record)}: {e}") from None
        else:
            used += 1
            yield made
    if not dropped:
        return
    reasons = []
    for reason, places in dropped.items():
        more = ", ..." if len(places) > 3 else ""
        reasons.append(f"{reason} ({len(places):,}: {', '.join(places[:3])}{more})")
    count = sum(map(len, dropped.values()))
    told = f"{count:,} of {used + count:,} records can't be used: {'; '.join(reasons)}"
    if count > used:
        raise UserError(f"{name}: {told}: {advice}")
    say(f"{name}: {told}; dropped")


# --- text and records ----------------------------------------------------------------------------


def stream_text(path, most=-1):
    """The lines of a UTF-8 text file, unpacked where it is gzip, each with "\\n" as its end, one of
    more than `most` characters in parts. Missing, empty or other files raise UserError.
    """
    if Path(path).is_dir():
        raise UserError(f"{path} is a directory; name a file")
    blank = True
    try:
        with open(path, "rb") as file:
            file = gzip.open(file) if file.peek(2).startswith(b"\x1f\x8b") else file
            for magic, command in PACKED.items():
                if file.peek(4).startswith(magic):
                    command = command.format(path)
                    raise UserError(f"{path} is no text file; convert it first: {command}")
            text = io.TextIOWrapper(file, encoding="utf-8-sig")
            while line := text.readline(most):
                if "\0" in line:
                    raise UserError(f"{path} is not text: it holds the byte 0")
                blank = blank and not line.strip()
                yield line
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist") from None
    except UnicodeDecodeError as e:
        wrong = e.object[max(0, e.start - 20) : e.start + 1]
        raise UserError(f"{path} is not UTF-8 text, but holds {wrong!r}") from None
    except (EOFError, OSError, zlib.error) as e:
        raise UserError(f"{path} is a damaged gzip file ({e}); fetch it anew") from None
    if blank:
        raise UserError(f"{path} is empty")


def beginning(path):
    """How the text of a file begins: enough of it to see what the file holds."""
    return "".join(itertools.islice(stream_text(path, 1024), 64)).lstrip()


def ending(path):
    """The ending of a file's name in small letters, that of .gz aside."""
    return Path(Path(path).name.lower().removesuffix(".gz")).suffix


def read_records(path):
    """The records of a file: objects of JSON (one per line, one array, or printed over several
    lines), or the lines of a .csv or .tsv, whose first one names their keys.
    """
    return list(stream_records(path))


def stream_records(path):
    """The records of a file one after the other."""
    place = None
    if ending(path) in (".csv", ".tsv") and not beginning(path).startswith(("[", "{")):
        values = _rows_of_table(stream_text(path), path)
    else:
        values = json_values(stream_text(path, PIECE), path)
    for place, value in values:
        where, kind = f"{path}, {place}", type(value).__name__
        need(isinstance(value, dict), where, f"a record must be a JSON object, not {kind}")
        yield Record(value, where)
    need(place, path, "there is no record in it")


def json_values(parts, path):
    """(place, value) of the values that stand one after the other in a text, or in an array. The
    text comes in parts, of which no more is kept than the next value needs.
    """
    text, line, n, unfinished = "", 1, None, 0  # n: values of an array so far
    for part in itertools.chain(parts, [""]):  # "" is the end
        text += part
        if part and len(text) < 2 * unfinished:
            continue  # it is tried again once there is as much again
        at = unfinished = 0
        while True:
            begin = BETWEEN.match(text, at).end()
            line, at = line + text.count("\n", at, begin), begin
            if at == len(text):
                break
            if n is None and text[at] == "[":
                at, n = at + 1, 0
                continue
            if n is not None and text[at] == "]":
                at, n = at + 1, None
                continue
            try:
                value, end = DECODE(text, at)
            except json.JSONDecodeError as e:
                if part and (e.pos > len(text) - 16 or e.msg.startswith("Unterminated")):
                    unfinished = len(text) - at
                    break
                line += text[at : e.pos].rstrip().count("\n")  # that of what it stops behind
                raise UserError(f"{path}, line {line}: broken JSON ({e.msg})") from None
            n = None if n is None else n + 1
            place = f"line {line}" if n is None else f"line {line}, record {n}"
            if HALF.search(text, at, end) and LONE.search(json.dumps(value, ensure_ascii=False)):
                raise UserError(f"{path}, {place}: half of a surrogate pair is no character")
            yield place, value
            line, at = line + text.count("\n", at, end), end
        text = text[at:]
    if n is not None:
        raise UserError(f"{path}, line {line}: broken JSON (an array that doesn't end)")


def _rows_of_table(lines, path):
    """(place, {column: cell}) of the lines of a .csv or .tsv file behind the first."""
    csv.field_size_limit(2**31 - 1)
    delimiter, columns = "\t" if ending(path) == ".tsv" else ",", None
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        for cells in filter(None, rows):
            where = f"line {rows.line_num}"
            columns = columns or choice_columns(cells)
            if columns is None:
                columns = [cell.strip() for cell in cells]
                if not all(columns) or len({*columns}) < len(columns):
                    raise UserError(f"{path}, {where}: it must name the columns, each once")
                continue
            if len(cells) != len(columns):
                found = f"{len(cells)} cells, but {len(columns)} columns"
                raise UserError(f"{path}, {where}: {found}")
            yield where, dict(zip(columns, cells))
    except csv.Error as e:
        raise UserError(f"{path}, line {rows.line_num}: a broken table ({e})") from None


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
    """Records: what convert(record) makes of each of a file, where it is usable."""
    return usable(read_records(path), lambda r: Record(convert(r), r.where), path)


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


def read_parts(read, path, val_path=None, val_fraction=DEFAULT_VAL_FRACTION, most=None):
    """[training, held-out] records of a file, of its first `most`; the latter are in another file,
    or its last part. UserError where one of them would be empty.
    """
    records = read(path)[:most]
    if val_path:
        return [records, read(val_path)]
    cut = int(len(records) * (1 - val_fraction))
    parts = [records[:cut], records[cut:]]
    few = f"{len(records)} records leave none to train on, or none to hold out; more are needed"
    need(all(parts), path, few)
    return parts


# --- corpora -------------------------------------------------------------------------------------


def mixture(data):
    """{file: its share} of --data a.jsonl:0.7,b.txt:0.3, scaled such that the shares sum to 1; what
    names no shares is one file, whatever colons and commas it holds.
    """
    parts = [re.fullmatch(r"(.+):(\d*\.?\d+)", part.strip()) for part in data.split(",")]
    if not any(parts) or Path(data).exists():
        return {data: 1.0}
    shares = {part[1]: float(part[2]) for part in parts if part}
    if len(shares) < len(parts) or 0 in shares.values():
        wanted = "name each file once, with a share of more than 0, as in a.jsonl:0.7,b.txt:0.3"
        raise UserError(f"--data {data}: {wanted}")
    total = sum(shares.values())
    return {file: share / total for file, share in shares.items()}


def texts_in(folder):
    """The .txt files in a folder and below it, in the order of their names."""
    return sorted(file for file in Path(folder).rglob("*") if ending(file) == ".txt")


def stream_pieces(path, part=None, fraction=DEFAULT_VAL_FRACTION):
    """(text, does a document begin with it?) of a corpus, piece after piece: each is a document, or
    a piece of one that is too long.

    Documents are the "text" of each record, or a whole text file; where lines say <|endoftext|> and
    nothing else, what stands between these. Of a folder: its .txt files. `part`: the last
    `fraction` of the documents, "val", or what comes before, "train"; a lone text is cut inside.
    """
    if not part:
        yield from _all_pieces(path)
        return
    documents, characters = _size(path, tuple(identity(path)))
    alone = documents == 1
    cut = int((characters if alone else documents) * (1 - fraction))
    at, found = 0, False
    for text, begins in _all_pieces(path):
        if alone:  # of one text its characters are counted
            here, at = max(0, cut - at), at + len(text)
        else:
            at += begins
            here = len(text) if at <= cut else 0
        if text := text[:here] if part == "train" else text[here:]:
            yield text, begins or not found
            found = True
    need(found, path, "there are too few texts to hold some out; more are needed")


@functools.lru_cache
def _size(path, identity):
    """(documents, characters) of a corpus, which has to be read for it."""
    documents = characters = 0
    for text, first in _all_pieces(path):
        documents, characters = documents + first, characters + len(text)
    return documents, characters


def _all_pieces(path):
    """(text, does a document begin with it?) of a corpus."""
    if Path(path).is_dir():
        files = texts_in(path)
        need(files, path, "this directory has no .txt files")
        for file in files:
            yield from _all_pieces(file)
        return
    tabular = ending(path) in (".csv", ".tsv", *JSON)
    if tabular or re.match(r'(\[\s*)?\{\s*"[^"\n]*"\s*:', beginning(path)):
        for text in stream_usable(stream_records(path), _document, path):
            yield from _pieces([text])
        return
    lines = stream_text(path, PIECE)
    alone = {line.strip() == DOCUMENT_END for line in lines if DOCUMENT_END in line}
    if True in alone:
        for text in divided(stream_text(path)):
            yield from _pieces([text])
        return
    if alone:
        say(f"note: {path} is one document; {DOCUMENT_END} divides only where it has its own line")
    yield from _pieces(stream_text(path, PIECE))


def divided(lines):
    """The texts between lines that say <|endoftext|>."""
    text = []
    for line in itertools.chain(lines, [DOCUMENT_END]):
        if line.strip() != DOCUMENT_END:
            text.append(line)
        elif whole := "".join(text).strip():
            yield whole
            text = []


def _pieces(parts):
    """(piece, is it the first?) of a text that comes in parts, cut where that changes no token."""
    rest, first = "", True
    for part in parts:
        begin, known = 0, len(rest) - 2  # no cut in what has been searched
        rest += part
        while found := SAFE_CUT.search(rest, max(begin + PIECE, known)):
            yield rest[begin : found.start()], first
            begin, first = found.start(), False
        rest = rest[begin:]
    yield rest, first


def read_documents(path, part=None, fraction=DEFAULT_VAL_FRACTION):
    """All documents of a corpus, or of a part of it, as a list."""
    documents = []
    for text, first in stream_pieces(path, part, fraction):
        documents.append(text if first else documents.pop() + text)
    return documents


def _document(record):
    text = record.get("text", 0) or ""  # null is empty
    if "text" not in record or not isinstance(text, str):
        raise UserError('a corpus record needs a "text", as in {"text": "Once upon..."}')
    if not text.strip():
        raise Unusable("the text is empty")
    return text


def images_in(messages):
    """How many images the text of these messages has."""
    return sum(message["content"].count(IMAGE) for message in messages)
