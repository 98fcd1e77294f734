"""data/prepare.py against a server on 127.0.0.1 that holds small files in the true formats."""

import gzip
import json
from pathlib import Path

import pytest
from helpers import Answering, serving, turns

from data import prepare as module
from data.prepare import DATASETS, Config, main, prepare
from nanollm.config import UserError, cli
from nanollm.formats import read_documents, read_records
from nanollm.records import read_chats, read_image_chats, read_preferences, read_prompts

ROOT = Path(__file__).parents[1]

PLAY = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n"
STORIES = "\n\nOne day, Tom ran.\n\nHe fell.\n<|endoftext|>\nLily sang.\n<|endoftext|>\n"
STEPS = "Half is 48/2 = <<48/2=24>>24.\nTogether 48+24 = <<48+24=72>>72."
GSM8K = {"question": "48 clips in April, half as many in May. How many clips?"}
GSM8K["answer"] = f"{STEPS}\n#### 1,072"
DIALOGUE = "\n\nHuman: Hello?\n\nAssistant: {}\n\nHuman: Why?\n\nAssistant: {}"
PAIR = {"chosen": DIALOGUE.format("Hi!", "Ask away."), "rejected": DIALOGUE.format("Hi!", "Go.")}
ALPACA = {"instruction": "Write in capitals.", "input": "goat", "output": "GOAT"}
DOLLY = {"instruction": "Which is a fish?", "context": "", "response": "Tope", "category": "qa"}


def shared(*values):
    """A dialogue as ShareGPT has it; before an odd number of turns stands the system's."""
    names = ["system"] * (len(values) % 2) + ["human", "gpt"] * 2
    return {"conversations": [{"from": n, "value": v} for n, v in zip(names, values)]}


HERMES = {"source": "x"} | shared("Be brief.", "Is 7 prime?", "Yes. “七”")
HERMES["conversations"][0]["weight"] = None
BUS = "What colour is the bus?", "White and red.", "Does it move?", "It is parked."
LLAVA = {"image": "000000033471.jpg"} | shared("<image>\n" + BUS[0], *BUS[1:])


def jsonl(*records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def array(*records):
    return json.dumps(records, indent=4).encode()


FILES = {  # dataset -> what each of its files holds, as its publisher packs it
    "tinyshakespeare": PLAY.encode(),
    "tinystories": STORIES.encode(),
    "alpaca": array(ALPACA, ALPACA | {"input": ""}),
    "dolly": jsonl(DOLLY, DOLLY),
    "openhermes": array(HERMES),
    "hh-harmless": gzip.compress(jsonl(PAIR)),
    "hh-helpful": gzip.compress(jsonl(PAIR, PAIR)),
    "gsm8k": jsonl(GSM8K),
    "llava-instruct": array(LLAVA),
}


class Handler(Answering):
    """Answers with `body`, whatever the path. `claimed` is its Content-Length."""

    def do_GET(self):
        self.server.asked.append(self.path)
        self.answer(self.server.body, self.server.status, self.server.claimed)


@pytest.fixture
def server():
    with serving(Handler, body=b"", status=200, claimed=None) as server:
        yield server


@pytest.fixture
def get(server, tmp_path):
    """get(name, body) is prepare(name) where the server answers with that body."""

    def get(name, body=None, limit=None, **answer):
        vars(server).update(answer, body=FILES[name] if body is None else body)
        return prepare(name, tmp_path / "out", limit, server.url)

    return get


@pytest.fixture
def refuses(get, tmp_path):
    """refuses(words, ...): get raises one line with these words, and leaves no file."""

    def refuses(words, *args, **answer):
        with pytest.raises(UserError, match=words) as caught:
            get(*args, **answer)
        assert "\n" not in str(caught.value)
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]

    return refuses


# --- each dataset, as its publisher wrote it and its stage reads it ----------------------------

TOM, LILY = {"text": "One day, Tom ran.\n\nHe fell."}, {"text": "Lily sang."}
RECORDS = {  # dataset -> (the records of its training file, what its stage makes of the first)
    "alpaca": ([ALPACA, ALPACA | {"input": ""}], turns("Write in capitals.\n\ngoat", "GOAT")),
    "dolly": ([DOLLY, DOLLY], turns("Which is a fish?", "Tope")),
    "openhermes": (
        [HERMES],
        [{"role": "system", "content": "Be brief."}, *turns("Is 7 prime?", "Yes. “七”")],
    ),
    "hh-harmless": ([PAIR], turns("Hello?", "Hi!", "Why?")),
    "hh-helpful": ([PAIR, PAIR], turns("Hello?", "Hi!", "Why?")),
    "gsm8k": ([GSM8K], turns(GSM8K["question"])),
    "llava-instruct": ([LLAVA], turns("<image>\n" + BUS[0], *BUS[1:])),
}
READERS = {"chat": read_chats, "preferences": read_preferences, "problems": read_prompts}
READERS["images"] = read_image_chats


@pytest.mark.parametrize("name", RECORDS)
def test_the_records_of_each_dataset_stay_as_they_are_and_its_stage_reads_them(get, name):
    path, (published, messages) = get(name)["train"], RECORDS[name]
    assert read_records(path) == published
    path.with_name(LLAVA["image"]).touch()
    record = READERS[DATASETS[name].about.partition(":")[0]](path)[0]
    assert record["messages"] == messages
    assert name != "gsm8k" or record["answer"] == "1072"


def test_a_text_stays_as_it_is_and_stories_are_divided(get):
    assert read_documents(get("tinyshakespeare")["train"]) == [PLAY]
    assert read_records(get("tinystories", STORIES[:-15].encode())["train"]) == [TOM, LILY]


# --- what may go wrong ------------------------------------------------------------------------


def test_a_missing_file_and_one_that_ends_early_are_refused(refuses):
    refuses("404: Not Found.*--base_url", "gsm8k", status=404)
    for name in ("tinyshakespeare", "alpaca", "hh-helpful"):
        refuses(r"broke after [\d,]+ of 3000 bytes", name, status=200, claimed=3000)


def damaged(at):
    body = FILES["hh-helpful"]
    return body[:at] + bytes([body[at] ^ 0xFF]) + body[at:][1:]


PAGES = b"<!DOCTYPE html><p>Log in", b"\n<html>Sorry", b"version https://git-lfs.github.com/spec/v1"
REFUSED = {  # words of the refusal: dataset and body of its file
    "line 1: broken JSON": [("gsm8k", b'{"question": "1?", "answer'), ("gsm8k", b"404: Not Found")],
    "an array that doesn't end": [("alpaca", array(ALPACA)[:-2])],
    "web page, or a pointer": [("hh-harmless", page) for page in PAGES],
    "damaged": [
        *(("hh-helpful", damaged(at)) for at in (0, -5)),  # the last in its checksum
        ("hh-helpful", FILES["hh-helpful"][:-12]),
    ],
    "not the data": [
        *(("gsm8k", body) for body in (b"", jsonl({"q": 1}))),
        ("tinyshakespeare", b"caf\xe9"),
        ("tinystories", b"\n"),
        *(("alpaca", body) for body in (b"{}", array(ALPACA, "text", 5))),
        ("llava-instruct", array(HERMES)),
    ],
}
REFUSED = [(words, *case) for words, cases in REFUSED.items() for case in cases]


@pytest.mark.parametrize("words, name, body", REFUSED)
def test_pages_damaged_files_and_other_data_than_expected_are_refused(refuses, words, name, body):
    refuses(words, name, body)


HELLO = "\n\nHuman: Hello?\n\nAssistant: Hi!"
MISFITS = [
    ("dolly", DOLLY, DOLLY | {"response": " "}, "an answer is empty"),
    ("hh-helpful", PAIR, {"chosen": HELLO, "rejected": HELLO + " "}, "two completions are equal"),
    ("gsm8k", GSM8K, GSM8K | {"question": " "}, "the prompt is empty"),
]


@pytest.mark.parametrize("name, good, misfit, why", MISFITS)
def test_records_that_the_stage_could_not_use_are_left_out_and_counted(
    get, capsys, name, good, misfit, why
):
    body = jsonl(good, misfit, good, misfit, good)
    path = get(name, gzip.compress(body) if name == "hh-helpful" else body)["train"]
    assert read_records(path) == [good] * 3
    said = capsys.readouterr().out
    assert "3 records" in said and "left out 2, the first being record 2: " in said and why in said


def test_an_unknown_name_lists_the_names(tmp_path):
    with pytest.raises(UserError, match="no dataset 'gsm'.*tinystories.*gsm8k"):
        prepare("gsm", tmp_path)


# --- what is fetched, and how much ------------------------------------------------------------


def test_only_what_is_missing_is_fetched(get, server, capsys):
    first = get("gsm8k")
    assert get("gsm8k", b"something else") == first and len(server.asked) == 2
    assert capsys.readouterr().out.count("there already") == 2
    first["test"].unlink()
    get("gsm8k")
    assert server.asked[2:] == server.asked[1:2] and server.asked[1].endswith("data/test.jsonl")


@pytest.mark.parametrize("name", DATASETS)
def test_a_mirror_is_asked_for_the_paths_of_the_original(get, server, name):
    get(name)
    assert ["https:/" + path for path in server.asked] == [
        url.replace("//huggingface.co", "/").replace("//raw.githubusercontent.com", "/")
        for url in DATASETS[name].files.values()
    ]


def test_a_limit_ends_the_download_early_and_gives_a_file_of_its_own(get, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 1000)
    body = array(*[ALPACA | {"input": str(n)} for n in range(100)])
    path = get("alpaca", body, limit=3, claimed=10**9)["train"]  # the rest never comes
    assert path.name == "train_3.jsonl"
    assert [record["input"] for record in read_records(path)] == ["0", "1", "2"]
    assert len(read_records(get("alpaca", body, claimed=None)["train"])) == 100


# --- the command ------------------------------------------------------------------------------


def test_without_a_name_the_datasets_are_listed_with_their_commands(capsys):
    cli(main, Config, argv=[])
    shown = capsys.readouterr().out
    for name, dataset in DATASETS.items():
        assert f"{name} " in shown and dataset.licence in shown and dataset.size in shown
        assert dataset.command({"train": "X"}).split()[1] in shown
    assert max(map(len, shown.splitlines())) <= 120


def test_the_end_of_the_output_is_the_next_command(server, tmp_path, capsys):
    server.body = FILES["tinystories"]
    flags = f"--out {tmp_path} --base_url {server.url} --limit 1"
    cli(main, Config, argv=["tinystories", *flags.split()])
    files = f"--data {tmp_path}/train_1.jsonl --val_data {tmp_path}/val_1.jsonl"
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == f"next: python train_pretrain.py {files}"


def test_the_readme_lists_each_dataset():
    readme = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    rows = [line for line in readme.splitlines() if line.startswith("| `")]
    for name, dataset in DATASETS.items():
        wanted = f"`{name}`", dataset.licence, dataset.size
        assert any(all(text in row for text in wanted) for row in rows), name
