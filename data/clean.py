"""Cleaning: what of a corpus is mended, and what is left out, before a model is pretrained on it.

    mended   UTF-8 that was read as Windows-1252; control characters; then Unicode's NFC
    cut out  lines of menus and notices, and lines that end no sentence: C4 (1910.10683)
    quality  texts of which these were more than half, or that a rule of QUALITY finds: C4, Gopher
             (Rae et al. 2021, 2112.11446)
    test     texts that share n words in a row with a test file, or hold a shorter test text whole
             (decontamination; Brown et al. 2020, 2005.14165)
    exact    texts that equal an earlier one
    near     texts whose shingles (runs of 3 words) A are mostly those of an earlier one, B: MinHash

        J(A, B) = |A & B| / |A | B| = P(min h(A) = min h(B))    over hash functions h (Broder 1997)
        two texts meet in one of b bands of r minima with probability    1 - (1 - J^r)^b

Texts that meet are compared by the share of their 100 minima that agree: J, with a standard error
of sqrt(J (1 - J) / 100). Minima are kept modulo 2^16 (Li & Koenig 2010, 0910.3349): a text of any
length takes 208 bytes of memory. A word is a run of letters and digits, or one Chinese or Japanese
character. Differences: no stop words, which are English; documents of 10 words, not 50 (the
village's are short); words of 2 letters on average, not 3 (Korean); repetitions of up to 30%, where
Gopher draws several lines between 10% and 30%.

Run     python data/clean.py                      # a dirty village: precision and recall
        python data/clean.py crawl.jsonl --against gsm8k/test.jsonl --out cleaned
        D=data/cache/cleaned; for t in dirty clean truth; do python train_pretrain.py --preset smoke
        --steps 600 --data $D/$t.jsonl --val_data $D/val.jsonl --out runs/$t; done
Needs   .txt or records of {"text"}, as data/README.md shows them. From records without "text", of
        chats for example, only copies and test texts are left out.
Writes  OUT/clean.jsonl; OUT/dropped.jsonl, which names the rule of each record as "dropped"
Expect  of the village's faults (seed 0) exact copies, pages, lost characters, mojibake and leaks
        are found in 99.8% or more, near copies in 95.9%, shuffled words in 90.4%, lines below a
        text in 71.2%, for the others look like sentences. False facts: 0%, as no rule could tell
        them from true ones. Of what has no fault 0.2% is lost, word games that repeat themselves.
        Bits per byte of held-out text after the same 600 steps, --seed 0 and 1 (2 cores AMD EPYC,
        AVX2, fp32): dirty 0.831, 0.822; cleaned 0.772, 0.770; the truth 0.766, 0.758. Of leaked
        test texts less that of the other half (--init runs/X --steps 1 --lr 0 --muon_lr 0, with
        leaked.jsonl or not_leaked.jsonl as --data and --val_data): dirty -0.10, -0.14; cleaned
        0.06, 0.10: a leak flatters the score.
        200 MB of random words in 112,000 texts: 101 MB of memory at most (--processes 1), 2 MB per
        second of a core; 50 MB: 62 MB. GSM8K's training problems --against its test: 10 of 7,473
        share 13 words with a test problem; with --ngram 8 it is 812.
"""

import gzip
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import sys
import tempfile
import unicodedata
import zlib
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

if not __package__:  # run as a file: the repository root holds the package
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.village.dirty import RATES, write_dirty
from nanollm.config import Positive, Share, UserError, Whole, atomic_file, cli, parse_json, say
from nanollm.formats import DOCUMENT_END, ending, need, read_records, texts_in

BANDS, ROWS, SHINGLE = 20, 5, 3
BATCH, PIECE = 256, 1_000_000  # documents per task; characters after which a .txt is divided
DRAWN = np.random.default_rng(0).integers(2**63, size=(2, BANDS * ROWS), dtype=np.uint64)
ODD = np.random.default_rng(1).integers(2**63, size=64, dtype=np.uint64) * 2 + 1
TABULAR = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".jsonlines")
CJK = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
LETTERS = re.compile(rf"[^\W\d_{CJK}]+")
WORD = re.compile(rf"[{CJK}]|[^\W_{CJK}]+")


@dataclass
class Config:
    # a file, a folder of .txt files, or village: its dirty copy is written to --out first
    source: str = field(default="village", metadata={"positional": True})
    out: str = "data/cache/cleaned"
    against: str = ""  # test files, separated by commas; texts that share words with them go
    # so many words in a row (GPT-3: 13; PaLM: 8, which many innocent phrases share)
    ngram: Whole[4, 64] = 13
    threshold: Share = 0.7  # from this share of agreeing minima on a text is a copy
    skip: str = ""  # rules that are not applied, separated by commas; the table names them
    processes: Whole[0] = 0  # 0: one for each core
    megabytes: Positive = 2.0  # size of the village's corpus before it is made dirty
    seed: int = 0  # of the village and its dirt


# --- texts ---------------------------------------------------------------------------------------


def records_of(path):
    """(place, record, or a line that holds one) of a file or folder. Lines of JSON and .txt files
    of any size are never in memory whole. Bytes that are no UTF-8 become U+FFFD.
    """
    if Path(path).is_dir():
        for file in texts_in(path):
            yield from records_of(file)
        return
    with open(path, "rb") as file:
        opened = gzip.open if file.read(2) == b"\x1f\x8b" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", errors="replace") as file:
            head = file.read(4096)
            file.seek(0)
            need("\0" not in head, path, "this is no text file")
            if re.match(r'\s*\{\s*"[^"\n]*"\s*:', head):
                found = ((f"line {n}", line) for n, line in enumerate(file, 1) if line.strip())
            elif re.match(r'\s*\[\s*\{\s*"', head) or ending(path) in TABULAR:
                found = ((f"record {n}", record) for n, record in enumerate(read_records(path), 1))
            else:
                found = ((f"text {n}", {"text": text}) for n, text in enumerate(pieces(file), 1))
            yield from ((f"{path}, {place}", record) for place, record in found)
    except (EOFError, OSError, zlib.error) as e:
        raise UserError(f"{path} can't be read ({e})") from None


def pieces(lines):
    """The texts that lines of <|endoftext|> divide; one that is too long ends at a blank line."""
    piece, size = [], 0
    for line in itertools.chain(lines, [DOCUMENT_END]):
        end = line.strip() == DOCUMENT_END
        piece.append("" if end else line)
        size += len(line)
        if end or size > (PIECE if not line.strip() else 2 * PIECE):
            text, piece, size = "".join(piece).strip(), [], 0
            yield from [text] if text else []


def parsed(place, record):
    """The record of a line."""
    return parse_json(record, place) if isinstance(record, str) else record


def strings(value):
    """Every text in a record, however deep."""
    if isinstance(value, str):
        return [value]
    inside = value.values() if isinstance(value, dict) else value
    return [s for v in inside for s in strings(v)] if isinstance(value, (dict, list)) else []


# --- mending -------------------------------------------------------------------------------------

BYTES = {chr(b): b for b in range(128, 256)}
BYTES |= {bytes([b]).decode("cp1252", "ignore"): b for b in range(128, 256)}
LINE_END = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
INVISIBLE = re.compile("[\0-\x08\x0e-\x1f\x7f-\x9f\u00ad\u200b\u2060\ufeff]")


def misread(run):
    """What a run of characters was before UTF-8 was read as Windows-1252; as it is, where not."""
    try:
        return bytes(BYTES[c] for c in run[0]).decode("utf-8")
    except (KeyError, UnicodeDecodeError):
        return run[0]


def mend(text):
    """The text in NFC, mojibake read rightly, without control and invisible characters."""
    text = LINE_END.sub("\n", re.sub(r"[^\0-\x7f]+", misread, text))
    return unicodedata.normalize("NFC", INVISIBLE.sub("", text)).strip()


NOTICE = re.compile(
    "javascript|lorem ipsum|terms of use|privacy policy|use cookies|cookie policy|版权所有|隐私政策"
    "|使用条款|免责声明|点击这里|网站地图",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(r"[.!?…。！？।؟۔][\"'”’»）)」』\]]*$")


def cut(text, skip=()):
    """(text without notices, text also without what ends no sentence). That is a paragraph where
    blank lines divide the text, else a line. Nothing is cut for a rule that is skipped.
    """
    noticed = text
    if "notices" not in skip and NOTICE.search(text):
        noticed = "\n".join(line for line in text.split("\n") if not NOTICE.search(line))
    between = "\n\n" if re.search(r"\S\n\s*\n", noticed) else "\n"
    blocks = re.split(r"\n\s*\n" if between == "\n\n" else "\n", noticed)
    ends = (x for x in blocks if SENTENCE_END.search(x.rstrip()[-20:]))
    return noticed, noticed if "no sentences" in skip else between.join(ends).strip()


# --- rules ---------------------------------------------------------------------------------------


def mean_length(text):
    """Mean length of words of letters; 5 where these are few, as in Chinese or among sums."""
    words = LETTERS.findall(text)
    return len("".join(words)) / len(words) if len(words) >= 10 else 5


def lines(text, holds=None):
    """The lines of a text that are not blank; of a rule for lines the share for which it holds."""
    found = [line.strip() for line in text.split("\n") if line.strip()]
    return sum(map(holds, found)) / max(1, len(found)) if holds else found


def repeated(parts, n=1):
    """Share of the parts of a text that lie in a run of n parts that was there before."""
    seen, again, found = set(), set(), [*zip(*(parts[i:] for i in range(n)))]
    if len(found) > len({*found}):
        for i, run in enumerate(found):
            again.update(range(i, i + n) if run in seen else ())
            seen.add(run)
    return len(again) / max(1, len(parts))


QUALITY = {  # does a rule find a text? m as mended, n without notices, t as it would be kept; words
    "broken characters": lambda m, n, t, words: m.count("\ufffd") > len(m) / 200,
    "notices": lambda m, n, t, words: len(n) < len(m) / 2,
    "no sentences": lambda m, n, t, words: len(t) < len(n) / 2,
    "few words": lambda m, n, t, words: len(words) < 10,
    "word length": lambda m, n, t, words: not 2 <= mean_length(t) <= 10,
    "few letters": lambda m, n, t, words: len("".join(words)) < len("".join(t.split())) / 2,
    "bullets": lambda m, n, t, words: lines(t, lambda x: x[0] in "•●*-·▪") > 0.9,
    "ellipses": lambda m, n, t, words: lines(t, lambda x: x.endswith(("...", "…"))) > 0.3,
    "repeated lines": lambda m, n, t, words: repeated(lines(t)) > 0.3,
    "repeated words": lambda m, n, t, words: repeated(words, 10) > 0.3,
}
RULES = [*QUALITY, "test", "exact", "near"]


# --- shingles and MinHash ------------------------------------------------------------------------


def words_of(text):
    return WORD.findall(text.lower())


def word_ids(words):
    """Checksums of words (W,); of none, one zero."""
    encoded = "\n".join(words).encode("utf-8", "replace").split(b"\n")
    return np.fromiter(map(zlib.crc32, encoded), np.uint64)


def runs(ids, n):
    """Hashes (W - n + 1,) of the runs of n words in ids (W,)."""
    total = sum(ids[i : len(ids) - n + 1 + i] * ODD[i] for i in range(n))
    return (total ^ (total >> 32)) * ODD[-1]


def signatures(texts):
    """Minima (N, BANDS * ROWS), modulo 2^16, of a x + b mod 2^64 over the shingles x of N lists of
    words. Behind each list stand zeros, so that no shingle reaches into the next.
    """
    if not texts:
        return np.empty((0, BANDS * ROWS), np.uint16)
    pad = np.zeros(SHINGLE, np.uint64)
    ids = [np.append(word_ids(words), pad) for words in texts]
    begins = np.cumsum([0, *map(len, ids[:-1])])
    ids = np.concatenate(ids)
    shingles, empty = runs(np.append(ids, pad[1:]), SHINGLE), ids == 0
    found = np.empty((len(texts), BANDS * ROWS), np.uint16)
    for i, (a, b) in enumerate(DRAWN.T):
        hashed = shingles * (a | np.uint64(1)) + b
        hashed[empty] = ~np.uint64(0)
        found[:, i] = np.minimum.reduceat(hashed, begins) >> 24  # higher bits of minima are zeros
    return found


def equals(hashes):
    """Which of N hashes were there before: (N,) bool."""
    first, which = np.unique(hashes, return_index=True, return_inverse=True)[1:]
    return first[which] != np.arange(len(hashes))


def copies(signatures, threshold):
    """Which of N signatures are much like an earlier one: (N,) bool. Those that meet in a band are
    compared, each with the one before it.
    """
    found = np.zeros(len(signatures), bool)
    for band in range(0, BANDS * ROWS, ROWS):
        keys = sum(signatures[:, band + i] * ODD[i] for i in range(ROWS))  # (N,) uint64
        order = np.argsort(keys, kind="stable")
        meet = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
        for part in np.array_split(meet, len(meet) // 100_000 + 1):
            a, b = order[part], order[part + 1]
            found[b] |= (signatures[a] == signatures[b]).mean(1) >= threshold
    return found


def runs_of_tests(paths, n):
    """{k: sorted hashes}: runs of n words of the test files' texts; shorter texts as a whole, where
    they have four words at least.
    """
    found = {}
    for path in paths:
        texts = (strings(parsed(*record)) for record in records_of(path))
        for text in itertools.chain.from_iterable(texts):
            ids = word_ids(words_of(mend(text)))
            if len(ids) >= 4:
                found.setdefault(min(n, len(ids)), []).append(runs(ids, min(n, len(ids))))
    return {k: np.unique(np.concatenate(hashes)) for k, hashes in found.items()}


def leaks(words, tests):
    """Does a text share a run of words with the tests?"""
    ids = word_ids(words)
    for k, known in tests.items():
        hashes = runs(ids, k) if len(ids) >= k else ids[:0]
        at = np.searchsorted(known, hashes).clip(max=len(known) - 1)
        if (known[at] == hashes).any():
            return True
    return False


# --- the work of one process, and of all ---------------------------------------------------------

SHARED = {}  # in each process: what `set_up` was given


def set_up(skip, tests):
    SHARED.update(skip=skip, tests=tests)


def judge(record, skip, tests):
    """(rule or None, record as mended, its text, words of that)."""
    text, rule = record.get("text"), None
    if isinstance(text, str):
        mended = mend(text)
        noticed, text = cut(mended, skip)
        record, words = record | {"text": text}, words_of(text)
        applied = (name for name in QUALITY if name not in skip)
        broken = (name for name in applied if QUALITY[name](mended, noticed, text, words))
        rule = next(broken, None)
    else:
        text = "\n".join(strings(record))
        words = words_of(text)
    if not rule and "test" not in skip and leaks(words, tests):
        rule = "test"
    return rule, record, text, words


def examine(batch):
    """[(rule or None, was it mended?, line)] of (place, record) pairs; bytes of the hashes (8 each)
    and of the signatures of those without a rule.
    """
    judged, hashes, texts = [], b"", []
    for place, record in batch:
        before = parsed(place, record)
        rule, after, text, words = judge(before, **SHARED)
        line = as_line(before | {"dropped": rule} if rule else after)
        judged.append((rule, after != before, line))
        if not rule:
            plain = " ".join(text.split()).encode("utf-8", "replace")
            hashes += hashlib.blake2b(plain, digest_size=8).digest()
            texts.append(words)
    return judged, hashes, signatures(texts).tobytes()


def as_line(record):
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def batches(records):
    """Lists of records, of bounded number and length."""
    batch, size = [], 0
    for place, record in records:
        batch.append((place, record))
        size += len(str(record))
        if len(batch) == BATCH or size > PIECE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def spread(items, processes, *shared):
    """examine(item) for each, in order, by several processes; few items wait at any time."""
    set_up(*shared)
    if processes == 1:
        yield from map(examine, items)
        return
    with multiprocessing.get_context("spawn").Pool(processes, set_up, shared) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.apply_async(examine, (item,)))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().get()
        while waiting:
            yield waiting.popleft().get()


def clean(source, out, skip, tests, threshold=0.7, processes=1):
    """Write what is kept of a source, and what is not. Returns ({rule: documents}, {rule: the first
    of their texts}); the rules None and "mended" are of what is kept.
    """
    counts, examples = Counter(), {}
    hashes, minima, bar = bytearray(), bytearray(), tqdm(unit=" documents", disable=None)

    def leave_out(rule, line):
        counts[rule] += 1
        examples.setdefault(rule, line)
        dropped.write(line)

    need(Path(source).exists(), source, "there is no such file")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with (
        atomic_file(out / "clean.jsonl") as kept,
        atomic_file(out / "dropped.jsonl") as dropped,
        tempfile.TemporaryFile(dir=out) as candidates,
        bar,
    ):
        for judged, *found in spread(batches(records_of(source)), processes, skip, tests):
            bar.update(len(judged))
            hashes += found[0]
            minima += found[1]
            for rule, changed, line in judged:
                if rule:
                    leave_out(rule, line)
                else:
                    candidates.write(bytes([changed]) + line)
        found = {"exact": equals(np.frombuffer(hashes, np.uint64))}
        minima = np.frombuffer(minima, np.uint16).reshape(-1, BANDS * ROWS)
        found["near"] = copies(minima, threshold)
        candidates.seek(0)
        for number, line in enumerate(candidates):
            rules = (rule for rule in found if rule not in skip and found[rule][number])
            if rule := next(rules, None):
                leave_out(rule, as_line(json.loads(line[1:]) | {"dropped": rule}))
                continue
            counts[None] += 1
            if line[0]:
                counts["mended"] += 1
                examples.setdefault("mended", line[1:])
            kept.write(line[1:])
        need(counts[None], source, f"nothing is left of it: {dict(counts)}")
    return counts, examples


# --- tables --------------------------------------------------------------------------------------


def print_counts(counts, examples):
    """What was left out, why, and the first example of each."""
    total = sum(n for rule, n in counts.items() if rule != "mended")
    for rule in (*RULES, "mended", None):
        if counts[rule]:
            record = json.loads(examples.get(rule, b"{}"))
            text = record.get("text") or " ".join(strings(record))
            how_many = f"{counts[rule]:9,} {counts[rule] / total:6.1%}"
            say(f"{rule or 'kept':18}{how_many}  {' '.join(text.split())[:54]}".rstrip())


def print_scores(out):
    """Of the village: the recall of each fault, and which rules found it; each rule's precision."""
    cells = Counter((r["planted"], r["dropped"]) for r in read_records(Path(out, "dropped.jsonl")))
    for r in read_records(Path(out, "clean.jsonl")):
        cells[r["planted"], "mended" if r.get("was") == r["text"] else None] += 1
    say("\nplanted      documents   found  by")
    for kind in RATES:
        found = Counter({rule: n for (k, rule), n in cells.items() if k == kind})
        n, missed = max(1, found.total()), found.pop(None, 0)
        by = ", ".join(f"{rule} {count:,}" for rule, count in found.most_common())
        say(f"{kind or 'nothing':12}{n:10,}{1 - missed / n:8.1%}  {by}")
    say("\nrule                 found  of it planted")
    for rule in RULES:
        if n := sum(n for (_, r), n in cells.items() if r == rule):
            say(f"{rule:18}{n:8,}{1 - cells['', rule] / n:15.1%}")


def main(cfg):
    named = (cfg.skip.split(","), cfg.against.split(","))
    skip, against = ({name.strip() for name in names if name.strip()} for names in named)
    need(skip <= {*RULES}, "--skip", f"there are the rules {', '.join(RULES)}")
    source = cfg.source
    if source == "village":
        paths = write_dirty(cfg.out, cfg.megabytes, cfg.seed)
        source, against = paths["dirty"], against | {paths["leaked"], paths["not_leaked"]}
    tests = runs_of_tests(sorted(map(str, against)), cfg.ngram)
    how = {"threshold": cfg.threshold, "processes": cfg.processes or os.cpu_count()}
    print_counts(*clean(source, cfg.out, skip, tests, **how))
    if cfg.source == "village":
        print_scores(cfg.out)
    say(f"\nnext: python train_pretrain.py --data {Path(cfg.out, 'clean.jsonl')}")


if __name__ == "__main__":
    cli(main, Config)
