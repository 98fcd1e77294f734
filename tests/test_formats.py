"""Files: a file is what it holds, each mistake has its line, and a corpus is its documents."""

import gzip
import json
import tracemalloc

import pytest

import train_pretrain
from nanollm import formats
from nanollm.config import UserError
from nanollm.formats import (
    identity,
    json_values,
    mixture,
    read_documents,
    read_records,
    stream_pieces,
    stream_text,
)
from nanollm.records import read_chats

LINES = b'{"text": "a"}\n{"text": "b"}\n'
PRETTY = b'{\n  "text": "a"\n}\n{\n  "text":\n    "b"\n}\n'
ARRAY = b'[\n{"text": "a"}, {"text": "b"}]'
CSV = b'id,text\r\n1,a\r\n2,"b"\r\n'
QUOTED = b'text,n\n"a, ""b""\nc",1\n'
STORIES = b"a\n<|endoftext|>\n\nb\nc\n<|endoftext|>\n"
SEPARATORS = '{"text": "\u00e9\u2028b\x85c"}\n{"text": "b", "n": 1}'.encode()
FILES = [  # (name, bytes, the documents or what is said)
    *((f"a{end}", LINES, ["a", "b"]) for end in (".JSONL", ".txt", "", ".csv")),
    *((f"a{end}", gzip.compress(LINES), ["a", "b"]) for end in (".jsonl", ".GZ")),
    *((f"a{end}", data, ["a", "b"]) for end in (".json", ".txt") for data in (PRETTY, ARRAY)),
    ("a.jsonl", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\n"), ["a", "b"]),
    ("a.jsonl", SEPARATORS, ["é\u2028b\x85c", "b"]),
    ("a.jsonl", b'{"text": "\\ud83d\\ude00"}', ["\U0001f600"]),  # both halves of a surrogate pair
    ("a.jsonl", LINES + b'{"text": null}', ["a", "b"]),
    ("a.csv", CSV, ["a", "b"]),
    ("a.CSV.gz", gzip.compress(CSV), ["a", "b"]),
    ("a.csv", QUOTED, ['a, "b"\nc']),
    ("a.tsv", CSV.replace(b",", b"\t"), ["a", "b"]),
    ("a.txt", b"a\nb\n", ["a\nb\n"]),
    ("a.txt", b"[a] {b}", ["[a] {b}"]),
    ("a.txt", STORIES, ["a", "b\nc"]),
    ("a.txt.gz", gzip.compress(STORIES.replace(b"\n", b"\r\n")), ["a", "b\nc"]),
    ("a.jsonl", b" \n\t\n", "is empty"),
    ("a.jsonl", LINES + b'{"text": ', "line 3: broken JSON"),
    ("a.jsonl", b'{"text": "a"\n' + LINES, "line 1: broken JSON"),
    ("a.json", b'[{"text": "a"},\noops]', "line 2: broken JSON (Expecting value)"),
    ("a.jsonl", LINES + b"[1]", "line 3, record 1: a record must be a JSON object, not int"),
    ("a.jsonl", LINES + b'{"text": "a\\ud800"}', "line 3: half of a surrogate pair"),
    ("a.jsonl", LINES + b'\n{"txt": "b"}', 'line 4: a corpus record needs a "text"'),
    ("a.json", b'[{"text": "a"}, {"text": 3}]', "record 2: a corpus record needs a"),
    ("a.json", PRETTY + b'{\n "txt": 3}', "line 8: a corpus record needs a"),
    ("a.json", b"[]", "there is no record in it"),
    ("a.json", ARRAY[:-1], "line 2: broken JSON (an array that doesn't end)"),
    ("a.json", b'[{"text": "a"}, {"text": "b', "line 1: broken JSON (Unterminated string"),
    ("a.json", ARRAY + b'\n{"text": "c"}', ["a", "b", "c"]),
    ("a.txt", b"a\r\n <|endoftext|>\t\r\n\r\nb <|endoftext|>\r\nc", ["a", "b <|endoftext|>\nc"]),
    ("a.csv", b"text\n", "there is no record in it"),
    ("a.csv", b"text,text\na,b\n", "line 1: it must name the columns, each once"),
    ("a.csv", b"text,n\na,1\nb\n", "line 3: 1 cells, but 2 columns"),
    ("a.csv", b'text\n"a\n', "broken table"),
    ("a.parquet", b"PAR1\x15\x04", "pandas.read_parquet('"),
    ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x04", "convert it first: zstd -d "),
    ("a.zip", b"PK\x03\x04..", "convert it first: unzip "),
    ("a.jsonl.gz", gzip.compress(LINES)[:-9], "is a damaged gzip file"),
    ("a.jsonl", b"abc\xff", "is not UTF-8 text, but holds b'abc\\xff'"),
    ("a.tar.gz", gzip.compress(b"a.txt\0\0\0hello"), "is not text: it holds the byte 0"),
]


@pytest.mark.parametrize("name, data, outcome", FILES)
def test_a_file_is_what_it_holds(name, data, outcome, tmp_path):
    (tmp_path / name).write_bytes(data)
    if isinstance(outcome, list):
        assert read_documents(tmp_path / name) == outcome
        return
    with pytest.raises(UserError) as caught:
        read_documents(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and outcome in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, sentence", [("no.txt", "does not exist"), ("", "is a directory")])
def test_a_path_without_file_is_refused(name, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        list(stream_text(tmp_path / name))


@pytest.mark.parametrize("size", [1, 2, 7, 100, 10**6])
def test_json_reads_the_same_in_parts_of_any_size(size):
    values = [{"n": -1.5e-3, "deep": [{"a": "]"}, "},{", None]}, {"ünï": '\\"[七\u2028'}, {}]
    lines = "\n\n".join(json.dumps(value) for value in values)
    for text in (json.dumps(values), json.dumps(values, indent=2, ensure_ascii=False), lines):
        parts = [text[i : i + size] for i in range(0, len(text), size)]
        places, found = zip(*json_values(parts, ""))
        assert [*found] == values and (text != lines or places == ("line 1", "line 3", "line 5"))


def test_blank_lines_count_and_a_record_keeps_its_place_when_a_key_is_added(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}')
    first, second = read_records(path)
    assert (first.where, second.where) == (f"{path}, line 1", f"{path}, line 3")
    assert (second | {"task": "x"}).where == second.where and second == {"text": "b"}


def test_a_table_has_the_columns_as_keys_and_every_line_its_place(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'instruction,output\nHi,"Yo\nyo"\n\nHo,Ya\n')
    first, second = read_chats(path)
    said = [message["content"] for message in first["messages"] + second["messages"]]
    assert said == ["Hi", "Yo\nyo", "Ho", "Ya"] and second.where == f"{path}, line 5"


def test_a_separator_inside_a_line_divides_nothing_and_is_said(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one<|endoftext|>two", encoding="utf-8")
    assert len(read_documents(tmp_path / "a.txt")) == 1
    assert "is one document" in capsys.readouterr().out


def test_a_folder_is_the_texts_in_it(tmp_path):
    with pytest.raises(UserError, match="has no .txt files"):
        read_documents(tmp_path)
    (tmp_path / "b").mkdir()
    for name, text in {"b/c.txt": "3", "a.TXT": "1", "b.txt": "2\n<|endoftext|>\n4"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "README.md").write_text("about")
    assert read_documents(tmp_path) == ["1", "3", "2", "4"]
    cfg = train_pretrain.Config(data=str(tmp_path), val_fraction=0.5)
    parts = [read_documents(*source) for [source] in train_pretrain.sources(cfg)]
    assert parts == [["1", "3"], ["2", "4"]]
    before = identity(tmp_path)
    (tmp_path / "b" / "c.txt").write_text("changed")
    assert identity(tmp_path) != before


@pytest.mark.parametrize(
    "text, train, val",
    [
        ("0123456789", ["01234567"], ["89"]),
        ('{"text": "0123456789"}', ["01234567"], ["89"]),
        ("a\n<|endoftext|>\nb\n<|endoftext|>\nc", ["a", "b"], ["c"]),
    ],
)
def test_a_corpus_is_split_by_hand(text, train, val, tmp_path):
    (tmp_path / "a.txt").write_text(text)
    assert read_documents(tmp_path / "a.txt", "train", 0.2) == train
    assert read_documents(tmp_path / "a.txt", "val", 0.2) == val


@pytest.mark.parametrize("part", [None, "train", "val"])
@pytest.mark.parametrize("name", ["lone.txt", "stories.txt", "records.jsonl", "records.jsonl.gz"])
def test_a_large_corpus_is_read_in_little_memory(name, part, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "PIECE", 2**14)
    text = "Mira keeps a goat. She lives by the old mill, and greets who comes.\n" * 80
    texts = {"lone.txt": text, "stories.txt": text + "<|endoftext|>\n"}
    data = texts.get(name, json.dumps({"text": text}) + "\n").encode() * 400
    (tmp_path / name).write_bytes(gzip.compress(data, 1) if name.endswith("gz") else data)
    size = len(data)
    del data
    tracemalloc.start()
    characters = sum(len(text) for text, _ in stream_pieces(tmp_path / name, part, 0.5))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 2_000_000 and characters > 0.45 * size and most < 250_000


@pytest.mark.parametrize(
    "data, sources",
    [
        ("a.jsonl:0.7,b.txt:0.3", {"a.jsonl": 0.7, "b.txt": 0.3}),
        ("a:3, b:1", {"a": 0.75, "b": 0.25}),
        (r"C:\x\a.jsonl:0.5,D:\b.txt:.5", {r"C:\x\a.jsonl": 0.5, r"D:\b.txt": 0.5}),
        (r"C:\x\a.jsonl", {r"C:\x\a.jsonl": 1.0}),
        ("a.jsonl:2", {"a.jsonl": 1.0}),
        ("a, b.txt", {"a, b.txt": 1.0}),
        ("notes:1,b:2", {"notes:1,b:2": 1.0}),  # a file that is there
        *((data, "name each file once") for data in "a:1,b.txt a:1,b:0 a:1,:2 a:1,a:2".split()),
    ],
)
def test_several_files_have_shares_and_a_path_may_hold_colons(data, sources, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes:1,b:2").write_text("text")
    if isinstance(sources, str):
        with pytest.raises(UserError, match=sources):
            mixture(data)
    else:
        assert mixture(data) == sources


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_tokenizer_is_trained_on_every_nth_document_or_piece(name, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "PIECE", 10)
    lines = [f"{n:09}\n" for n in range(100)]
    records = "".join(json.dumps({"text": line}) + "\n" for line in lines)
    (tmp_path / name).write_text(records if name == "a.jsonl" else "".join(lines))
    cfg = train_pretrain.Config(data=str(tmp_path / name))
    assert list(train_pretrain.sample_of_text(cfg, 10**6)) == lines[:90]
    assert list(train_pretrain.sample_of_text(cfg, 300)) == lines[:90:3]
