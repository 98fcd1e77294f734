"""Reading files: text, records of JSON or tables, corpora. What records mean is in records.py.

Text is read part by part, and a corpus document by document, so that one of any size takes little
memory: that of its longest document, or where it is all one text, of some millions of characters.

data/README.md documents the formats. Two things may be wrong with a record, in every reader alike:

    UserError   it isn't of the format: reading stops, with file and line
    Unusable    it is, but nothing can be learnt from it: it is dropped, counted, and named
"""

import codecs
import csv
import functools
import gzip
import io
import itertools
import json
import math
import re
import string
import zlib
from pathlib import Path

from nanollm.config import UserError, atomic_write, say

DEFAULT_VAL_FRACTION = 0.1
IMAGE = "<image>"
DOCUMENT_END = "<|endoftext|>"  # between the texts of a .txt, alone on its line
SEPARATOR = re.compile(rf"\n[ \t]*{re.escape(DOCUMENT_END)}[ \t]*(?=\n|$)")
CHUNK = 2**20  # bytes of a file that are read at a time
HEAD = 2**16  # characters in which a file shows what it holds
PIECE = 2**20  # characters of a long text that are made into tokens at a time
# Where a long text can be cut without changing its tokens: behind a line and before a word, or
# between two words. No tokenizer's pattern that we know joins what is on both sides.
SAFE_CUT = re.compile(r"(?<=\S\n)(?=\w)|(?<=\w)(?= [^\W\d_])")
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
    return list(stream_usable(records, use, name, advice))


def stream_usable(records, use, name, advice="mend or drop them"):
    """As `usable`, one after the other; that too many can't be used shows at the end."""
    used, dropped = 0, {}
    for record in records:
        where = place_of(record)
        try:
            made = use(record, where)
        except Unusable as e:
            dropped.setdefault(e.reason, []).append(where.removeprefix(f"{name}, "))
        except UserError as e:  # the tokenizer's knows no place
            raise UserError(str(e) if where in str(e) else f"{where}: {e}") from None
        else:
            used += 1
            yield made
    if dropped:
        reasons = (
            f"{reason} ({len(places):,}: {', '.join(places[:3])}{', ...' * (len(places) > 3)})"
            for reason, places in dropped.items()
        )
        count, said = sum(map(len, dropped.values())), "; ".join(reasons)
        said = f"{name}: {count:,} of {used + count:,} records can't be used: {said}"
        need(count <= used, said, advice)
        say(f"{said}; dropped")


# --- text and records ----------------------------------------------------------------------------


def stream_text(path):
    """The parts of a UTF-8 text file, unpacked where it is gzip, all line ends the same; missing,
    empty or other files raise UserError.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a directory; name a file")
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    decoder, size, blank = io.IncrementalNewlineDecoder(utf8, translate=True), 0, True
    try:
        with open(path, "rb") as file:
            file = gzip.open(file) if file.peek(2).startswith(b"\x1f\x8b") else file
            while data := file.read(CHUNK):
                for magic, command in PACKED.items():
                    if not size and data.startswith(magic):
                        command = command.format(path)
                        raise UserError(f"{path} is no text file; convert it first: {command}")
                size += len(data)
                text = decoder.decode(data)
                if "\0" in text:
                    raise UserError(f"{path} is not text: it holds the byte 0")
                blank = blank and not text.strip()
                yield text
            yield decoder.decode(b"", final=True)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist") from None
    except UnicodeDecodeError as e:
        at = size - len(e.object) + e.start
        raise UserError(f"{path} is not UTF-8 text (byte {at})") from None
    except (EOFError, OSError, zlib.error) as e:
        raise UserError(f"{path} is a damaged gzip file ({e}); fetch it anew") from None
    if blank:
        raise UserError(f"{path} is empty")


def head_and_parts(path):
    """(how the text of a file begins, all of its parts)."""
    parts, head = stream_text(path), ""
    while len(head.lstrip()) < HEAD and (part := next(parts, None)) is not None:
        head += part
    return head, itertools.chain([head], parts)


def ending(path):
    """The ending of a file's name in small letters, that of .gz aside."""
    return Path(Path(path).name.lower().removesuffix(".gz")).suffix


def read_records(path):
    """The records of a file: objects of JSON (one per line, one array, or printed over several
    lines), or the lines of a .csv or .tsv, whose first one names their keys.
    """
    return list(stream_records(path, *head_and_parts(path)))


def stream_records(path, head, parts):
    """The records of a file one after the other."""
    table, place = ending(path) in (".csv", ".tsv") and head.lstrip()[0] not in "[{", None
    for place, value in (_rows_of_table if table else _json_values)(parts, path):
        where, kind = f"{path}, {place}", type(value).__name__
        need(isinstance(value, dict), where, f"a record must be a JSON object, not {kind}")
        yield Record(value, where)
    need(place, path, "there is no record in it")


def _json_values(parts, path):
    """(place, value) of the values that stand one after the other in a text, or in one array. No
    more of the text is kept than the value at hand, and what was read with it.
    """
    decode, blanks = json.JSONDecoder().raw_decode, re.compile(r"\s*")
    halves = re.compile(r"\\u[dD][89a-fA-F]")  # of characters that JSON writes as two
    text, at, line, first = "", 0, 1, True
    number, comma = None, True  # of values in the array, if one is open; may a value follow?
    while True:
        begin = blanks.match(text, at).end()
        line, at, sign = line + text.count("\n", at, begin), begin, text[begin : begin + 1]
        if sign == "[" and first or sign == "]" and (number == 0 or not comma):
            number, comma, at, first = 0 if first else None, True, at + 1, False
            continue
        if sign == "," and not comma:
            at, comma = at + 1, True
            continue
        try:
            if not comma:
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
            value, end = decode(text, at)
        except (ValueError, RecursionError) as e:
            why, pos = getattr(e, "msg", str(e)), getattr(e, "pos", at)
            # it may be broken only because the rest hasn't been read
            cut_off = pos > len(text) - 16 or why.startswith("Unterminated string")
            more = itertools.islice(parts, 1 + (len(text) - at) // CHUNK) if cut_off else ()
            if more := "".join(more):
                text, at = text[at:] + more, 0
                continue
            if not sign and number is None:
                return
            last = line + text.count("\n", at, pos)
            raise UserError(f"{path}, line {line}: broken JSON ({why}: line {last})") from None
        place, first = f"line {line}", False
        if number is not None:
            number, comma = number + 1, False
            place = f"record {number}"
        lone = halves.search(text, at, end) and json.dumps(value, ensure_ascii=False)
        lone = lone and re.search("[\ud800-\udfff]", lone)
        need(not lone, f"{path}, {place}", "half of a surrogate pair is no character")
        yield place, value
        line, at = line + text.count("\n", at, end), end


def _lines(parts):
    """The lines of a text that comes in parts, each with its end."""
    rest = ""
    for part in parts:
        *lines, rest = (rest + part).split("\n")
        yield from (line + "\n" for line in lines)
    if rest:
        yield rest


def _rows_of_table(parts, path):
    """(place, {column: cell}) of the lines of a .csv or .tsv file behind the first."""
    csv.field_size_limit(2**31 - 1)
    delimiter, columns = "\t" if ending(path) == ".tsv" else ",", None
    lines = csv.reader(_lines(parts), delimiter=delimiter, strict=True)
    try:
        for cells in filter(None, lines):
            where = f"line {lines.line_num}"
            columns = columns or choice_columns(cells)
            if columns is None:
                columns = [cell.strip() for cell in cells]
                named = all(columns) and len({*columns}) == len(columns)
                need(named, f"{path}, {where}", "the first line must name the columns, each once")
                continue
            said = f"{len(cells)} cells, but {len(columns)} columns"
            need(len(cells) == len(columns), f"{path}, {where}", said)
            yield where, dict(zip(columns, cells))
    except csv.Error as e:
        raise UserError(f"{path}, line {lines.line_num}: a broken table ({e})") from None


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
    """[(file, its share)] of --data a.jsonl:0.7,b.txt:0.3, scaled such that the shares sum to 1;
    what names no shares is one file, whatever colons and commas it holds.
    """
    parts = [re.fullmatch(r"(.*?):(\d+\.?\d*|\.\d+)", part.strip()) for part in data.split(",")]
    drive = len(parts) == 1 and parts[0] and len(parts[0][1]) == 1  # C:7 of Windows
    if not any(parts) or drive or Path(data).exists():
        return [(data, 1.0)]
    wanted = "each of several files needs a share of more than 0, as in a.jsonl:0.7,b.txt:0.3"
    need(all(part and part[1] and float(part[2]) for part in parts), f"--data {data}", wanted)
    total = sum(float(part[2]) for part in parts)
    return [(part[1], float(part[2]) / total) for part in parts]


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
    alone, begin, end = False, 0, math.inf  # counted in documents, or in characters
    if part:
        documents, characters = _size(path, tuple(identity(path)))
        alone = documents == 1
        whole = characters if alone else documents
        cut = int(whole * (1 - fraction))
        begin, end = (0, cut) if part == "train" else (cut, whole)
    at, found = 0, False
    for text, first in _all_pieces(path):
        if alone:
            text, start, at = text[max(0, begin - at) : max(0, end - at)], at, at + len(text)
            first, kept = not found, begin < at and start < end
        else:
            at += first
            kept = begin < at <= end
        if kept:
            found = True
            yield text, first
        elif at > end:
            break
    few = "there are too few texts to hold some out; more are needed"
    need(found or alone, path, few)
    if not found:
        yield "", True


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
    head, parts = head_and_parts(path)
    tabular = ending(path) in (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".jsonlines")
    if tabular or re.match(r'\s*(\[\s*)?\{\s*"[^"\n]*"\s*:', head):
        for text in stream_usable(stream_records(path, head, parts), _document, path):
            yield text, True
        return
    mentions = divides = False
    for block in _blocks(parts):
        mentions = mentions or DOCUMENT_END in block
        if divides := mentions and bool(SEPARATOR.search(block)):
            break
    if divides:
        parts = []
        for block in itertools.chain(_blocks(stream_text(path)), [f"\n{DOCUMENT_END}"]):
            part, *others = SEPARATOR.split(block)
            parts.append(part)
            for other in others:
                if text := "".join(parts).strip():
                    yield text, True
                parts = [other]
        return
    if mentions:
        say(f"note: {path} is one document; {DOCUMENT_END} divides only where it has its own line")
    yield from _cut(stream_text(path))


def _blocks(parts):
    """A text that comes in parts, a line end before it, cut before line ends and in long lines."""
    rest = "\n"
    for part in parts:
        rest += part
        cut = rest.rfind("\n", 1)
        cut = len(rest) if cut < 0 and len(rest) > HEAD else cut
        if cut > 0:
            yield rest[:cut]
            rest = rest[cut:]
    yield rest


def _cut(parts):
    """(piece, is it the first?) of a long text. A text without a place for a cut isn't cut."""
    rest, first = "", True
    for part in parts:
        rest += part
        if len(rest) >= PIECE:
            cut = 0
            for found in SAFE_CUT.finditer(rest, max(1, len(rest) - 2**12)):
                cut = found.start()
            if cut:
                yield rest[:cut], first
                rest, first = rest[cut:], False
    yield rest, first


def read_documents(path, part=None, fraction=DEFAULT_VAL_FRACTION):
    """All documents of a corpus, or of a part of it, as a list."""
    documents = []
    for text, first in stream_pieces(path, part, fraction):
        documents.append([text]) if first else documents[-1].append(text)
    return ["".join(pieces) for pieces in documents]


def _document(record, where):
    wanted = 'a corpus record needs a "text", as in {"text": "Once upon..."}'
    text = record.get("text", 0) or ""  # null is empty
    need(isinstance(text, str) and "text" in record, where, wanted)
    need_usable(text.strip(), where, "the text is empty")
    return text


def images_in(messages):
    """How many images the text of these messages has."""
    return sum(message["content"].count(IMAGE) for message in messages)
