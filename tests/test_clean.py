"""Cleaning: each rule on texts a person can judge, MinHash against exact Jaccard, and the village,
whose faults are known.
"""

import gzip
import json
import random
from collections import Counter

import numpy as np
import pytest
from helpers import WORDS

from data.clean import (
    BANDS,
    QUALITY,
    ROWS,
    SHINGLE,
    Config,
    clean,
    copies,
    cut,
    judge,
    leaks,
    main,
    mend,
    repeated,
    runs_of_tests,
    signature,
    words_of,
)
from data.village.dirty import RATES, dirty
from data.village.world import build_world
from nanollm.config import UserError, parse

GOOD = "Mira keeps a goat, and the goat keeps her company by the old mill."
CHINESE = "米拉养了一只山羊，她住在老磨坊旁边。每天早上她都去市场卖奶酪。"


def shingles(words):
    padded = [*words, "", ""]
    return {tuple(padded[i : i + SHINGLE]) for i in range(len(words))}


def jaccard(a, b):
    a, b = shingles(a), shingles(b)
    return len(a & b) / len(a | b)


def signatures(texts):
    return np.stack([*map(signature, texts)])


# --- MinHash -------------------------------------------------------------------------------------


def test_the_share_of_equal_minima_estimates_jaccard():
    """Its error has the standard deviation of a mean of 100 draws, and no bias."""
    rng, texts, others = random.Random(0), [], []
    for i in range(300):  # pairs of which ever more words differ
        texts.append([f"{rng.choice(WORDS)}{rng.randrange(99)}" for _ in range(100)])
        others.append([w if rng.random() > 0.001 * i else rng.choice(WORDS) for w in texts[-1]])
    exact = np.array([jaccard(a, b) for a, b in zip(texts, others)])
    a, b = signatures(texts), signatures(others)
    error = (a == b).mean(1) - exact
    expected = np.sqrt((exact * (1 - exact)).mean() / (BANDS * ROWS))
    assert exact.min() < 0.4 and exact.max() > 0.9
    assert abs(error.mean()) < 4 * expected / len(exact) ** 0.5
    assert 0.8 * expected < error.std() < 1.2 * expected


@pytest.mark.parametrize("n_shared", [100, 130, 160])
def test_texts_meet_in_a_band_as_often_as_the_formula_says(n_shared):
    a, b, n_pairs = [], [], 300
    for pair in range(n_pairs):
        shared = [f"{pair}-{i}" for i in range(n_shared)]
        for side, texts in ("a", a), ("b", b):
            texts.append(shared + [f"{side}{pair}-{i}" for i in range(210 - n_shared)])
    j = np.mean([jaccard(x, y) for x, y in zip(a, b)])
    met = copies(signatures(a + b), threshold=0.0)
    assert not met[:n_pairs].any()
    p = 1 - (1 - j**ROWS) ** BANDS
    assert abs(met.mean() * 2 - p) < 4 * (p * (1 - p) / n_pairs) ** 0.5 + 0.003


def test_copies_equals_comparing_every_pair_where_texts_are_far_or_close():
    rng = random.Random(0)
    texts = [[f"{rng.choice(WORDS)}{rng.randrange(50)}" for _ in range(60)] for _ in range(40)]
    for i in range(20):
        again = list(texts[i])
        again[rng.randrange(60)] = "changed"
        texts.append(again)
    slow = [any(jaccard(texts[i], texts[j]) > 0.7 for j in range(i)) for i in range(len(texts))]
    assert copies(signatures(texts), 0.7).tolist() == slow == [False] * 40 + [True] * 20


# --- mending, cutting, rules ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, mended",
    [
        ("donâ€™t", "don’t"),
        ("donâ\x80\x99t", "don’t"),  # read as Latin-1
        ("cafÃ©", "café"),
        ("ä¸\xadæ–‡", "中文"),
        ("cafe\u0301", "café"),
        ("Ångström, ça va, É", "Ångström, ça va, É"),
        (CHINESE, CHINESE),
        ("a\0b\x07c\u200bd\ufeff", "abcd"),
        ("a\r\nb\rc\x0cd", "a\nb\nc\nd"),
        ("\ta  b\t", "a  b"),
    ],
)
def test_mend(text, mended):
    assert mend(text) == mended


@pytest.mark.parametrize(
    "text, kept",
    [
        (f"Home - Shop\n{GOOD}\nWe use cookies.\nTags: goat", GOOD),
        (f"{CHINESE}\n版权所有 2021。\n首页 关于", CHINESE),
        ("A wrapped line,\nthat ends here.\n\nA heading", "A wrapped line,\nthat ends here."),
        ('"Who?" she said. "You!"', '"Who?" she said. "You!"'),
        ("A fox ran\nAn owl flew", ""),
    ],
)
def test_cut_leaves_sentences(text, kept):
    assert cut(text)[1] == kept


def test_repeated_counts_what_lies_in_a_run_that_was_there_before():
    assert repeated("a b c a b d".split(), 2) == 2 / 6
    assert repeated(["x", "y", "x", "x"]) == 2 / 4
    assert repeated([]) == repeated(["a"], 10) == 0


LONG = " ".join(f"{a} {b}" for a, b in zip(WORDS, WORDS[::-1]))
CASES = {
    GOOD: None,
    CHINESE: None,
    "27 + 35 = 62. 12 - 3 = 9. 1 + 2 = 3. 4 * 5 = 20.": None,
    GOOD.replace("e", "\ufffd"): "broken characters",
    f"Please enable JavaScript to read what is on this page, reader.\n{GOOD[:30]}.": "notices",
    " ".join(sorted(GOOD.split())): "no sentences",
    "首页 新闻 关于我们 联系方式 网站 导航 登录 注册": "no sentences",
    "A goat.": "few words",
    "她养山羊。": "few words",
    " ".join([*["donaudampfschifffahrt"] * 12]) + ".": "word length",
    f"=== {'-+*/ ' * 20} one two three four five six seven eight nine ten.": "few letters",
    "\n".join(f"- {GOOD[i:]}" for i in range(5)): "bullets",
    "\n".join(f"{word} {LONG}..." for word in WORDS[:2]) + f"\n{GOOD}": "ellipses",
    "\n".join([GOOD, GOOD, f"But {GOOD}"]): "repeated lines",
    f"{LONG} {LONG} {LONG}.": "repeated words",
}


@pytest.mark.parametrize("text, rule", CASES.items(), ids=[*map(str, CASES.values())])
def test_each_rule_on_a_text_that_it_is_for(text, rule):
    found, record, *_ = judge({"text": text, "url": "x"}, set(), {})
    assert found == rule and record["url"] == "x"
    if rule:
        assert judge({"text": text}, {*QUALITY} - {rule}, {})[0] == rule
        assert judge({"text": text}, {*QUALITY}, {})[0] is None


def test_every_quality_rule_has_its_text():
    assert {*CASES.values()} == {None, *QUALITY}


# --- decontamination -----------------------------------------------------------------------------


def test_texts_that_share_words_with_a_test_are_found(tmp_path):
    tests = [
        {"messages": [{"role": "user", "content": "Where does Mira live?"}], "answer": "the mill"},
        {"question": "one two three four five six seven eight nine", "choices": ["ten eleven"]},
        {"question": "米拉养了什么动物在家里？"},
    ]
    path = tmp_path / "test.jsonl"
    path.write_text("\n".join(json.dumps(t) for t in tests), encoding="utf-8")
    known = runs_of_tests([path], 8)
    assert {k: len(hashes) for k, hashes in known.items()} == {4: 1, 8: 2 + 4}
    for text, found in {
        'They ask: "WHERE does Mira live" - nobody knows.': True,
        "Where does the goat of Mira live?": False,
        "the mill": False,  # answers alone are too short
        "Zero, one two three four five six seven, eight!": True,
        "one two three four five six seven": False,
        "问：米拉养了动物？": False,
        "米拉养了什么动物在家": True,
    }.items():
        assert leaks(words_of(text), known) == found, text


# --- files ---------------------------------------------------------------------------------------


def cleaned(tmp_path, name, data, processes=1):
    """(texts or records kept, counts) of a file of this name that holds this."""
    (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    counts, _ = clean(tmp_path / name, tmp_path / "out", set(), {}, processes=processes)
    lines = (tmp_path / "out/clean.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines], counts


def test_records_keep_their_keys_and_what_is_dropped_says_why(tmp_path):
    first, again = {"id": 1, "text": f"{GOOD}\nTags: goat"}, {"id": 2, "text": GOOD}
    data = "\n".join(map(json.dumps, [first, again, {"text": "A fox."}]))
    kept, counts = cleaned(tmp_path, "a.jsonl", data)
    assert kept == [{"id": 1, "text": GOOD}]
    assert counts == {None: 1, "mended": 1, "exact": 1, "few words": 1}
    dropped = (tmp_path / "out/dropped.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(dropped[1]) == {"id": 2, "text": GOOD, "dropped": "exact"}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["clean.jsonl", "dropped.jsonl"]


def test_text_files_archives_folders_tables_and_chats(tmp_path):
    text = f"{GOOD}\n<|endoftext|>\n{CHINESE}\n \n<|endoftext|>\n"
    wanted = [{"text": GOOD}, {"text": CHINESE}]
    assert cleaned(tmp_path, "a.txt", text)[0] == wanted
    assert cleaned(tmp_path, "a.txt.gz", gzip.compress(text.encode()))[0] == wanted
    assert clean(tmp_path, tmp_path / "out", set(), {})[0] == {None: 2, "exact": 2}
    assert cleaned(tmp_path, "c.csv", f'url,text\nx,"{GOOD}"\n')[0] == [{"url": "x", "text": GOOD}]
    chats = [{"prompt": "Who?", "completion": c} for c in ("Mira.", "Mira.", "Bima.")]
    assert cleaned(tmp_path, "b.jsonl", "\n".join(map(json.dumps, chats)))[0] == chats[1:]


def test_what_cannot_be_read_leaves_no_file(tmp_path):
    with pytest.raises(UserError, match="line 2"):
        cleaned(tmp_path, "a.jsonl", '{"text": "x"}\n{"text": ')
    assert [*(tmp_path / "out").iterdir()] == []


def test_unknown_rules_are_refused():
    with pytest.raises(UserError, match="few words"):
        main(parse(Config, argv=["--skip", "nonsense"]))


def test_several_processes_write_what_one_writes(tmp_path):
    rng = random.Random(0)
    texts = (rng.choices(WORDS, k=rng.randint(5, 30)) for _ in range(700))
    data = "\n".join(json.dumps({"text": f"{' '.join(text)}."}) for text in texts)
    one, counts = cleaned(tmp_path, "a.jsonl", data)
    assert counts["few words"] > 0 and len(one) > 500
    assert cleaned(tmp_path, "a.jsonl", data, processes=2) == (one, counts)


# --- the dirty village ---------------------------------------------------------------------------


def test_faults_are_planted_at_their_rates_and_the_truth_holds_none():
    made = dirty(build_world(), 300_000)
    n, kinds = len(made["dirty"]), Counter(r["planted"] for r in made["dirty"])
    for kind, rate in RATES.items():
        spare = 0.05 if kind in ("", "false") else 0  # only a biography can be made false
        assert abs(kinds[kind] / n - rate) < spare + 4 * (rate * (1 - rate) / n) ** 0.5, kind
    fine = (r for r in made["dirty"] if not r["planted"] or "was" in r)
    assert made["truth"] == [r.get("was", r["text"]) for r in fine]
    assert {r["text"] for r in made["dirty"] if r["planted"] == "leak"} <= {*made["test"][::2]}
    asked = [r for r in made["cloze"] if r["task"] != "cloze"]
    assert [f"{r['prompt']}{r['answer']}." for r in asked] == made["test"]


def test_the_village_is_cleaned(tmp_path, capsys):
    """Nearly every fault is found but the false facts, and next to nothing else is left out."""
    main(parse(Config, argv=f"--out {tmp_path} --megabytes 0.4 --processes 1".split()))
    rows = capsys.readouterr().out.split("planted")[1].splitlines()[1:11]
    found = {kind: float(share.rstrip("%")) / 100 for kind, _, share, *_ in map(str.split, rows)}
    assert {*found} == {"nothing", *RATES} - {""}
    assert found.pop("nothing") < 0.01 and found.pop("false") < 0.02
    assert found.pop("footer") > 0.6  # C4's notices are not all that there are
    assert found.pop("shuffled") > 0.8 and min(found.values()) > 0.93, found
