r"""Cleaning: what of a corpus is mended, and what is left out, before a model is pretrained on it.

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
of sqrt(J (1 - J) / 100). Minima are kept modulo 2^16 (Li & Koenig 2010, 0910.3349), so that a text
takes about 300 bytes of memory. A word is a run of letters and digits, or one Chinese or Japanese
character. Differences: no stop words and no shortest mean length of words, which suit English only;
10 words are enough, not 50; one line for all repetitions, 30%, where Gopher draws several.

Run     python data/clean.py                      # a dirty village: precision and recall
        python data/clean.py crawl.jsonl --against gsm8k/test.jsonl --out cleaned
        python data/clean.py --villagers 8; D=data/cache/cleaned; for t in dirty clean truth; do
        python train_pretrain.py --preset short --data $D/$t.jsonl --val_data $D/val.jsonl \
        --out runs/$t; done
Needs   UTF-8: a .txt, a folder of them, or JSONL of {"text"}, all of any size; of other records,
        as data/README.md shows them, only copies and test texts are left out.
Writes  OUT/clean.jsonl; OUT/dropped.jsonl, which names the rule of each record as "dropped"
Expect  of the village's faults (seed 0) exact copies, pages, lost characters, mojibake and leaks
        are found in 99.8% or more, near copies in 95.9%, shuffled words in 90.4%, lines below a
        text in 71.2%, for the others look like sentences. False facts: 0%, as no rule could tell
        them from true ones. Of what has no fault 0.2% is lost, word games that repeat themselves.
        Eight villagers, 600 steps, --seed 0, 1 and 2 (AMD EPYC, AVX2, fp32):
                                          dirty                cleaned              the truth
            bits per byte, held-out text  0.619, 0.617, 0.619  0.585, 0.581, 0.590  0.554, 0.572,
                                                                                    0.564
            facts known                   36%, 25%, 22%        26%, 26%, 22%        74%, 27%, 61%
            leaked questions, of 24,      +21, 0, +21          -8, -17, -8          -13, -25, 0
            less 24 others, in points
        (bf16, seed 0: 0.620 and 0.581; 28% and 42%; +4 and +17: so few questions, at the edge of
        what 600 steps learn, say little.) False facts, which no rule finds, are still in.
        1 GB of JSONL (428,090 texts): about 170 MiB of memory, 43 in each of two more processes,
        731 s of a core. GSM8K's training problems --against its test: 10 of 7,473 share 13 words
        with a test problem; with --ngram 8 it is 812.
"""

import functools
import itertools
import json
import multiprocessing
import os
import re
import sys
import tempfile
import unicodedata
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

if not __package__:  # run as a file: the repository root holds the package
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.village.dirty import RATES, write_dirty
from nanollm.config import Positive, Share, Whole, atomic_file, cli, say
from nanollm.formats import need, read_records, stream_pieces, stream_records

BANDS, ROWS, SHINGLE = 20, 5, 3
BATCH, CHARACTERS = 64, 1_000_000  # records per task; about the longest piece of a .txt
DRAWN = np.random.default_rng(0).integers(2**63, size=(2, BANDS * ROWS), dtype=np.uint64)
DRAWN[0] |= np.uint64(1)
ODD = np.random.default_rng(1).integers(2**63, size=64, dtype=np.uint64) * 2 + 1
CJK = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
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
    skip: str = ""  # rules of quality that are not applied, separated by commas
    processes: Whole[0] = 0  # 0: one for each core
    villagers: Whole[2] = 32  # people in the village
    megabytes: Positive = 2.0  # size of its corpus, before it is made dirty
    seed: int = 0  # of the village and its dirt


# --- texts ---------------------------------------------------------------------------------------


def records_of(path):
    """The records of a file, one after the other; of a .txt or a folder its texts, as records."""
    if not Path(path).is_dir() and ".txt" not in Path(path).suffixes:
        yield from stream_records(path)
        return
    text = ""
    for piece, begins in stream_pieces(path):
        if text and (begins or len(text) > CHARACTERS):
            yield {"text": text}
            text = ""
        text += piece
    yield {"text": text}


def strings(value):
    """Every text in a record, however deep."""
    if isinstance(value, str):
        return [value]
    inside = value.values() if isinstance(value, dict) else value
    return [s for v in inside for s in strings(v)] if isinstance(value, (dict, list)) else []


def text_of(record):
    text = record.get("text")
    return text if isinstance(text, str) else "\n".join(strings(record))


BYTES = {chr(b): b for b in range(128, 256)}
BYTES |= {bytes([b]).decode("cp1252", "ignore"): b for b in range(128, 256)}
INVISIBLE = re.compile("[\0-\x08\x0e-\x1f\x7f-\x9f\u00ad\u200b\u2060\ufeff]")


def misread(run):
    """What a run of characters was before UTF-8 was read as Windows-1252; as it is, where not."""
    try:
        return bytes(BYTES[c] for c in run[0]).decode("utf-8")
    except (KeyError, UnicodeDecodeError):
        return run[0]


def mend(text):
    """The text in NFC, mojibake read rightly, without control and invisible characters."""
    text = "\n".join(re.sub(r"[^\0-\x7f]+", misread, text).splitlines())
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
    "word length": lambda m, n, t, words: len("".join(words)) > 10 * len(words),
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
    return np.fromiter((zlib.crc32(word.encode()) for word in words or [""]), np.uint64)


def runs(ids, n):
    """Hashes (W - n + 1,) of the runs of n words in ids (W,)."""
    total = sum(ids[i : len(ids) - n + 1 + i] * ODD[i] for i in range(n))
    return (total ^ (total >> 32)) * ODD[-1]


def signature(words):
    """Minima (BANDS * ROWS,), modulo 2^16, of a x + b mod 2^64 over the shingles x of a text."""
    shingles = runs(np.append(word_ids(words), np.zeros(SHINGLE - 1, np.uint64)), SHINGLE)  # (W,)
    minima = np.full(BANDS * ROWS, ~np.uint64(0))
    for part in np.array_split(shingles, len(shingles) // 100 + 1):  # fits the cache
        minima = np.minimum(minima, (part[:, None] * DRAWN[0] + DRAWN[1]).min(0))
    return (minima >> 24).astype(np.uint16)  # the highest bits of minima are zeros


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
    for text in (text for path in paths for r in records_of(path) for text in strings(r)):
        ids = word_ids(words_of(mend(text)))
        if len(ids) >= 4:
            k = min(n, len(ids))
            found.setdefault(k, []).append(runs(ids, k))
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


def judge(record, skip, tests):
    """(rule or None, record as mended, words of its text)."""
    rule, text = None, text_of(record)
    if isinstance(record.get("text"), str):
        mended = mend(text)
        noticed, text = cut(mended, skip)
        record, found = record | {"text": text}, (mended, noticed, text, words_of(text))
        rules = (name for name in QUALITY if name not in skip and QUALITY[name](*found))
        rule = next(rules, None)
    words = words_of(text)
    return rule or ("test" if leaks(words, tests) else None), record, words


def examine(batch, skip, tests):
    """[(rule or None, was it mended?, line)] of records, and the signatures of those without a rule
    as bytes.
    """
    judged, minima = [], b""
    for before in batch:
        rule, after, words = judge(before, skip, tests)
        line = as_line(before | {"dropped": rule} if rule else after)
        judged.append((rule, after != before, line))
        minima += b"" if rule else signature(words).tobytes()
    return judged, minima


def as_line(record):
    return f"{json.dumps(record, ensure_ascii=False)}\n".encode()


def spread(work, records, processes):
    """work(BATCH of the records) for each, in order, by several processes; few are in memory."""
    records = iter(records)
    batches = iter(lambda: [*itertools.islice(records, BATCH)], [])
    if processes == 1:
        yield from map(work, batches)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        while some := [*itertools.islice(batches, 4 * processes)]:
            yield from pool.map(work, some, chunksize=1)


def clean(source, out, skip, tests, threshold=0.7, processes=1):
    """Write what is kept of a source, and what is not. Returns ({rule: documents}, {rule: the first
    of their lines}); None is the rule of what is kept, "mended" of what was before copies went.
    """
    counts, examples, minima, seen = Counter(), {}, bytearray(), set()

    def count(rule, line):
        counts[rule] += 1
        examples.setdefault(rule, line)

    work, out = functools.partial(examine, skip=skip, tests=tests), Path(out)
    with (
        atomic_file(out / "clean.jsonl") as kept,
        atomic_file(out / "dropped.jsonl") as dropped,
        tempfile.TemporaryFile(dir=out) as candidates,
        tqdm(unit=" documents", disable=None) as bar,
    ):
        for judged, new in spread(work, records_of(source), processes):
            bar.update(len(judged))
            minima += new
            for rule, mended, line in judged:
                (dropped if rule else candidates).write(line)
                if rule or mended:
                    count(rule or "mended", line)
        near = copies(np.frombuffer(minima, np.uint16).reshape(-1, BANDS * ROWS), threshold)
        candidates.seek(0)
        for line, is_near in zip(candidates, near):
            record = json.loads(line)
            same = hash(" ".join(text_of(record).split()))
            rule = "exact" if same in seen else "near" if is_near else None
            seen.add(same)
            count(rule, line)
            if rule:
                dropped.write(as_line(record | {"dropped": rule}))
            else:
                kept.write(line)
    return counts, examples


# --- tables --------------------------------------------------------------------------------------


def print_counts(counts, examples):
    """What was left out, why, and the first example of each."""
    total = sum(n for rule, n in counts.items() if rule != "mended")
    for rule in (*RULES, "mended", None):
        if counts[rule]:
            text = " ".join(text_of(json.loads(examples[rule])).split())
            say(f"{rule or 'kept':18}{counts[rule]:9,} {counts[rule] / total:6.1%}  {text:.54}")


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
    skip, against = ({*names.split(",")} - {""} for names in (cfg.skip, cfg.against))
    need(skip <= {*QUALITY}, "--skip", f"there are the rules {', '.join(QUALITY)}")
    source = cfg.source
    if source == "village":
        paths = write_dirty(cfg.out, cfg.villagers, cfg.megabytes, cfg.seed)
        source, against = paths["dirty"], against | {paths["test"]}
    tests = runs_of_tests(against, cfg.ngram)
    how = {"threshold": cfg.threshold, "processes": cfg.processes or os.cpu_count()}
    print_counts(*clean(source, cfg.out, skip, tests, **how))
    if cfg.source == "village":
        print_scores(cfg.out)
    say(f"\nnext: python train_pretrain.py --data {Path(cfg.out, 'clean.jsonl')}")


if __name__ == "__main__":
    cli(main, Config)
