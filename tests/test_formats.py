"""Files: a file is what it holds, each mistake has its line, and a corpus is its documents."""

import gzip
import json

import pytest

import train_pretrain
from nanollm.batches import documents_of
from nanollm.config import UserError
from nanollm.formats import identity, read_documents, read_records, read_text, split_documents
from nanollm.records import read_chats

LINES = b'{"text": "a"}\n{"text": "b"}\n'
PRETTY = b'{\n  "text": "a"\n}\n{\n  "text":\n    "b"\n}\n'
ARRAY = b'[\n{"text": "a"}, {"text": "b"}]'
CSV = b'id,text\r\n1,a\r\n2,"b"\r\n'
QUOTED = b'text,n\n"a, ""b""\nc",1\n'
STORIES = b"a\n<|endoftext|>\n\nb\nc\n<|endoftext|>\n"
SEPARATORS = '{"text": "\u00e9\u2028b\x85c"}\n{"text": "b", "n": 1}'.encode()
FILES = [  # (name, bytes, the documents or what is said)
    *((f"a{end}", LINES, ["a", "b"]) for end in (".jsonl", ".JSONL", ".json", ".txt", "", ".csv")),
    *((f"a{end}", gzip.compress(LINES), ["a", "b"]) for end in (".jsonl.gz", ".jsonl", ".GZ")),
    *((f"a{end}", PRETTY, ["a", "b"]) for end in (".json", ".jsonl", ".txt")),
    *((f"a{end}", ARRAY, ["a", "b"]) for end in (".json", ".jsonl", ".txt")),
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
    ("a.json", b'{\n  "text": "a",\n  oops\n}', "line 1: broken JSON (Expecting property name"),
    ("a.json", b'[{"text": "a"},\noops]', "broken JSON (Expecting value: line 2"),
    ("a.jsonl", LINES + b"[1]", "line 3: a record must be a JSON object, not list"),
    ("a.jsonl", LINES + b'{"text": "a\\ud800"}', "line 3: half of a surrogate pair"),
    ("a.jsonl", LINES + b'\n{"txt": "b"}', 'line 4: a corpus record needs a "text"'),
    ("a.jsonl", LINES + b'{"text": 3}', 'line 3: a corpus record needs a "text"'),
    ("a.json", b'[{"text": "a"}, {"txt": "b"}]', "record 2: a corpus record needs a"),
    ("a.json", PRETTY + b'{\n "txt": 3}', "line 8: a corpus record needs a"),
    ("a.json", b"[]", "there is no record in it"),
    ("a.csv", b"text\n", "there is no record in it"),
    ("a.csv", b"text,text\na,b\n", "line 1: the first line must name the columns, each once"),
    ("a.csv", b"text,n\na,1\nb\n", "line 3: 1 cells, but 2 columns"),
    ("a.csv", b'text\n"a\n', "broken table"),
    ("a.parquet", b"PAR1\x15\x04", "pandas.read_parquet('"),
    ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x04", "convert it first: zstd -d "),
    ("a.zip", b"PK\x03\x04..", "convert it first: unzip "),
    ("a.jsonl.gz", gzip.compress(LINES)[:-9], "is a damaged gzip file"),
    ("a.gz", gzip.compress(b"PAR1\x15\x04"), "pandas.read_parquet('"),
    ("a.jsonl", b"abc\xff", "is not UTF-8 text (byte 3)"),
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
        read_text(tmp_path / name)


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
    parts = [documents_of(*source) for source in train_pretrain.sources(cfg)]
    assert parts == [["1", "3"], ["2", "4"]]
    before = identity(tmp_path)
    (tmp_path / "b" / "c.txt").write_text("changed")
    assert identity(tmp_path) != before


@pytest.mark.parametrize(
    "documents, train, val",
    [
        (["0123456789"], ["01234567"], ["89"]),
        (["a", "b", "c", "d", "e"], ["a", "b", "c", "d"], ["e"]),
        ([{"n": 1}], [], [{"n": 1}]),
    ],
)
def test_a_corpus_is_split_by_hand(documents, train, val):
    assert split_documents(documents, "train", 0.2) == train
    assert split_documents(documents, "val", 0.2) == val


def test_a_changed_file_has_another_identity(tmp_path):
    known = []
    for name, text in (("a", "abc"), ("a", "abcd"), ("b", "abc")):
        (tmp_path / name).write_text(text)
        known.append(json.dumps(identity(tmp_path / name), default=str))
    assert len(set(known)) == 3
