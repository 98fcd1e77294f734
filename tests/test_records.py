"""Records and files as people publish them, and what becomes of each: the text that is read and,
in brackets, what is trained on; or the reason for which it is dropped, or refused.
"""

import gzip
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import distill
import train_dpo
import train_grpo
import train_ppo
import train_pretrain
import train_sft
import train_vlm
from nanollm.batches import pack_chats
from nanollm.config import UserError
from nanollm.distillation import read_completions, tokenize
from nanollm.formats import Unusable, read_documents, read_parts, read_records, write_jsonl
from nanollm.preferences import completion_rows, load_preferences
from nanollm.records import (
    read_chats,
    read_examples,
    read_image_chats,
    read_preferences,
    read_prompts,
)
from nanollm.runtime import Runtime

CPU = Runtime(torch.device("cpu"), torch.float32)
SHARED = Path(__file__).parents[2] / "shared"


def marked(tokenizer, ids, mask):
    """The text of these ids, the trained ones in brackets, by the first letters of the roles."""
    text, before = "", False
    for token, trained in [*zip(ids, mask), (None, False)]:
        text += "[" * (trained and not before) + "]" * (before and not trained)
        text += "" if token is None else tokenizer.decode([token])
        before = trained
    for role in ("system", "user", "assistant", "tool"):
        text = text.replace(f"<|{role}|>", f" {role[0].upper()} ")
    return text.replace("<|end|>", ".").strip()


def as_chat(record, tokenizer):
    return marked(tokenizer, *tokenizer.render(record["messages"]))


def as_preference(record, tokenizer):
    rows, _ = completion_rows([record], tokenizer)
    first = marked(tokenizer, rows.tokens[0][rows.real[0]], rows.mask[0][rows.real[0]])
    others = [f" | {text}" for text in record["completions"][1:]]
    note = [f" {record[key]}" for key in ("margin", "label") if record.get(key) is not None]
    return first + "".join(others + note)


def as_prompt(record, tokenizer):
    text = as_chat(record, tokenizer)
    return f"{text} -> {record['answer']}" if "answer" in record else text


def as_completion(record, tokenizer):
    if "completion" not in record:
        return as_prompt(record, tokenizer)
    [(prompt, ids, _)] = tokenize([record], True, tokenizer, 512)
    return marked(tokenizer, prompt + ids, [False] * len(prompt) + [True] * len(ids))


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def chat(*messages, **more):
    return {"messages": list(messages), **more}


def sharegpt(*turns, **more):
    return {"conversations": [{"from": who, "value": text} for who, text in turns], **more}


U, A = said("user", "Hi"), said("assistant", "Yo")
S, T = said("system", "Be"), said("tool", "4")
CALL = {"function": {"name": "add", "arguments": '{"x": "1+2"}'}, "type": "function", "id": "c1"}
HI = "U Hi. A [Yo.]"
PART, PAINTED = {"type": "text", "text": "Hi"}, {"type": "image_url", "image_url": {"url": "a.png"}}
CALLED = "A [<tool_call>add(1+2)</tool_call>.] T 4. A [Yo.]"
ALPACA, PAIR = {"instruction": "Hi", "output": "Yo"}, {"prompt": "Hi", "completion": "Yo"}
THINK = "U Hi. A [<think>hm</think>Yo.]"

CHATS = [
    # shapes
    (chat(U, A), HI),
    (sharegpt(("human", "Hi"), ("gpt", "Yo")), HI),
    (sharegpt(("user", "Hi"), ("assistant", "Yo")), HI),
    ({"conversations": [U, A]}, HI),
    (chat({"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}), HI),
    (ALPACA, HI),
    (ALPACA | {"input": "now"}, "U Hi\n\nnow. A [Yo.]"),
    ({"instruction": "Hi", "context": "now", "response": "Yo"}, "U Hi\n\nnow. A [Yo.]"),
    (ALPACA | {"prompt": "### Instruction: Hi"}, HI),
    (PAIR, HI),
    ({"prompt": [S, U], "completion": [A]}, "S Be. U Hi. A [Yo.]"),
    (PAIR | {"label": True}, HI),
    (PAIR | {"label": 0}, "dropped: its label says that it isn't wanted"),
    (PAIR | {"label": "cat"}, 'refused: "label" must be true or false'),
    (chat(U, A, id=7, source="x", score=0.5, category="y"), HI),
    ({}, 'refused: a chat record needs "messages"'),
    ({"dialogue": [U, A]}, 'refused: a chat record needs "messages"'),
    ({"prompt": "Hi", "answer": "7"}, 'refused: a chat record needs "messages"'),
    # what stands beside them
    (sharegpt(("human", "Hi"), ("gpt", "Yo"), system="Be"), "S Be. U Hi. A [Yo.]"),
    (chat(S, U, A, system="Be"), "S Be. U Hi. A [Yo.]"),
    (chat(S, U, A, system="No"), "refused: different system prompts"),
    (ALPACA | {"system": ["Be"]}, 'refused: "system" must be text'),
    (ALPACA | {"system": "", "history": []}, HI),
    (ALPACA | {"system": "Be", "history": [["a", "b"]]}, "S Be. U a. A [b.] U Hi. A [Yo.]"),
    (chat(S, U, A, history=[["a", "b"]]), "S Be. U a. A [b.] U Hi. A [Yo.]"),
    (ALPACA | {"history": "a: b"}, 'refused: "history" must be a list of [question, answer]'),
    (ALPACA | {"history": [["a"]]}, 'refused: "history" must be a list of [question, answer]'),
    (ALPACA | {"history": [["a", None]]}, "refused: message 1 of the history has no text"),
    (chat(U, A, tools=[{"name": "add"}]), 'refused: the model would not see the "tools"'),
    (chat(U, A, tools=None), HI),
    (chat(U, A, image="a.png"), "refused: train_vlm.py looks at images"),
    (chat(U, A, images=["a.png"]), "refused: train_vlm.py looks at images"),
    # roles
    (chat(said("developer", "Be"), U, A), "S Be. U Hi. A [Yo.]"),
    (sharegpt(("system", "Be"), ("human", "Hi"), ("gpt", "Yo")), "S Be. U Hi. A [Yo.]"),
    (sharegpt(("human", "Hi"), ("gpt", "Yo"), ("observation", "4")), "U Hi. A [Yo.] T 4."),
    (sharegpt(("human", "Hi"), ("function_call", "{}")), "refused: message 1 has the unknown role"),
    (chat({"content": "Hi"}, A), 'refused: message 0 has no "role"'),
    ({"conversations": [{"value": "Hi"}]}, 'refused: message 0 has no "role"'),
    (chat(said(None, "Hi"), A), "refused: message 0 has the unknown role None"),
    (chat("Hi", A), 'refused: message 0 has no "role"'),
    # contents
    (chat(said("user", [PART]), A), HI),
    (chat(said("user", [PART, PART]), said("assistant", [PART])), "U HiHi. A [Hi.]"),
    (chat(said("user", [PAINTED, PART]), A), "refused: message 0 shows an image"),
    (chat(said("user", [{"type": "audio"}]), A), "refused: neither text nor an image"),
    (chat(said("user", ["Hi"]), A), "refused: neither text nor an image"),
    (chat(said("user", None), A), "refused: message 0 has no text"),
    (chat(U, said("assistant", {"text": "Yo"})), "refused: message 1 has no text"),
    (chat(U, A | {"audio": {"id": "x"}}), 'refused: message 1 has "audio", which would be'),
    (chat(U, A | {"audio": None, "refusal": None}), HI),
    (chat(U, A | {"name": "Bo", "tool_call_id": None}), HI),
    # thoughts and calls
    (chat(U, A | {"reasoning_content": "hm"}), THINK),
    (chat(U, A | {"reasoning": "hm"}), THINK),
    (chat(U, A | {"thinking": "hm"}), THINK),
    (chat(U, A | {"reasoning_content": None}), HI),
    (chat(U, A | {"reasoning_content": ["hm"]}), "refused: its thoughts must be text"),
    (chat(U | {"reasoning_content": "hm"}, A), "refused: only the assistant thinks"),
    (chat(U, said("assistant", None, tool_calls=[CALL]), T, A), "U Hi. " + CALLED),
    (chat(U, said("assistant", "", tool_calls=[CALL]), T, A), "U Hi. " + CALLED),
    (chat(U, {"role": "assistant", "tool_calls": [CALL]}, T, A), "U Hi. " + CALLED),
    (chat(U, said("assistant", None, function_call=CALL["function"]), T, A), "U Hi. " + CALLED),
    (chat(U, A | {"tool_calls": []}), HI),
    (chat(U, A | {"tool_calls": "add"}), 'refused: "tool_calls" must be a list'),
    (chat(U | {"tool_calls": [CALL]}, A), "refused: only the assistant thinks, and calls"),
    # what is learnt
    *(
        (chat(U, A | {key: no}, U, A), "U Hi. A Yo. U Hi. A [Yo.]")
        for key, no in {"loss": 0, "train": False, "weight": 0, "training": "false"}.items()
    ),
    *(
        (chat(U, A | {"loss": no}, U, A), "U Hi. A Yo. U Hi. A [Yo.]")
        for no in (0.0, "False", "no")
    ),
    *((chat(U, A | {"loss": yes}), HI) for yes in (True, 1, "true", None)),
    (chat(U | {"loss": False}, A), HI),
    (chat(U, A | {"loss": 0.5}), 'refused: "loss" must be true or false, not 0.5'),
    (chat(U, A | {"weight": "high"}), "refused: \"weight\" must be true or false, not 'high'"),
    (chat(U | {"train": True}, A), 'refused: "train" is true of a message that the assistant'),
    (
        {
            "conversations": [
                *sharegpt(("human", "Hi"))["conversations"],
                *({"from": "gpt", "value": "Yo", "loss": no} for no in (False, True)),
            ]
        },
        "U Hi. A Yo. A [Yo.]",
    ),
    (chat(U, A, weight=0), "dropped: no answer that is trained on"),
    (chat(U, A | {"loss": False}), "dropped: no answer that is trained on"),
    (chat(U), "dropped: no answer"),
    (chat(U, said("assistant", " \n")), "dropped: an answer is empty"),
    (chat(U, said("assistant", ""), U, A), "dropped: an answer is empty"),
    (chat(U, said("assistant", "", loss=False), U, A), "U Hi. A . U Hi. A [Yo.]"),
    (PAIR | {"completion": ""}, "dropped: an answer is empty"),
    ({"instruction": "Hi"}, "dropped: no answer"),
    # a text that spells a marker
    (chat(said("user", "<think>Hi"), A), "U <think>Hi. A [Yo.]"),
]

TWO = {"prompt": "Hi", "chosen": "Yo", "rejected": "No"}
BEST = "U Hi. A [Yo.] | No"
SCORES = {"score_chosen": 8, "score_rejected": 6.5}
WHOLE = {"chosen": [U, A], "rejected": [U, said("assistant", "No")]}
PREFERENCES = [
    (TWO, BEST),
    (TWO | {"system": "Be"}, "S Be. U Hi. A [Yo.] | No"),
    (TWO | {"history": [["a", "b"]]}, "U a. A b. U Hi. A [Yo.] | No"),
    ({"instruction": "Hi", "input": "", "chosen": "Yo", "rejected": "No"}, BEST),
    (
        sharegpt(("human", "Hi"), chosen={"from": "gpt", "value": "Yo"}, rejected="No"),
        BEST,
    ),
    (WHOLE, BEST),
    (WHOLE | {"system": "Be"}, "S Be. U Hi. A [Yo.] | No"),
    # UltraFeedback
    (WHOLE | {"prompt": "Hi", "messages": [U, A]} | SCORES, BEST + " 1.5"),
    (WHOLE | {"prompt": "Ho"}, "refused: don't answer the prompt that stands beside them"),
    (TWO | {"chosen": "<think>hm</think>Yo"}, "U Hi. A [<think>hm</think>Yo.] | No"),
    (TWO | {"chosen": [A | {"reasoning_content": "hm"}]}, "refused: without reasoning_content"),
    (TWO | {"chosen": [A | {"tool_calls": [CALL]}]}, "refused: without tool_calls"),
    (TWO | {"chosen": [A | {"loss": False}]}, "refused: without loss"),
    (TWO | {"image": "a.png"}, "refused: its image would be ignored"),
    (TWO | {"tools": [CALL]}, 'refused: the model would not see the "tools"'),
    (TWO | {"weight": 0.5}, 'refused: "weight" must be true or false, not 0.5'),
    (TWO | {"weight": 0}, "dropped: it is marked as not trained on"),
    (TWO | {"chosen": " "}, "dropped: a completion is empty"),
    (TWO | {"chosen": "No\n"}, "dropped: two completions are equal"),
    (TWO | {"prompt": ""}, "dropped: the prompt is empty"),
    ({"prompt": "Hi", "ranking": ["Yo"]}, "dropped: two completions or more, not 1"),
    (WHOLE | {"chosen": [said("user", "Ho"), A]}, "dropped: answer different prompts"),
    (WHOLE | {"chosen": [U, A, U]}, "dropped: must end with the assistant's answer"),
    ({"chosen": "\n\nHuman: Hi\n\nAssistant: Yo", "rejected": "\n\nHuman: Hi\n\nAssistant:"},
     "dropped: a completion is empty"),
    # KTO
    (PAIR | {"label": True}, "U Hi. A [Yo.] True"),
    (PAIR | {"label": "false", "system": "Be"}, "S Be. U Hi. A [Yo.] False"),
    (PAIR | {"label": None}, 'refused: "label" must be true or false'),
    (PAIR | {"completion": "", "label": True}, "dropped: a completion is empty"),
    (PAIR, 'refused: needs "chosen" and "rejected"'),
]  # fmt: skip

PROMPTS = [
    ({"prompt": "Hi"}, "U Hi."),
    ({"prompt": "Hi", "system": "Be", "history": [["a", "b"]]}, "S Be. U a. A [b.] U Hi."),
    (PAIR, "U Hi."),
    (TWO | {"system": "Be"}, "S Be. U Hi."),
    (chat(S, U, A), "S Be. U Hi."),
    (chat(U, said("assistant", "")), "U Hi."),
    ({"prompt": "Hi", "answer": None}, "U Hi."),
    ({"prompt": "Hi", "answer": 0}, "U Hi. -> 0"),
    ({"question": "Hi", "answer": "3\n#### 3", "system": "Be"}, "S Be. U Hi. -> 3"),
    ({"question": "Hi"}, "refused: must end with ####"),
    (chat(A), "dropped: the prompt is empty"),
]
EXAMPLES = [
    ({"prompt": "Hi", "answer": "7"}, "U Hi. -> 7"),
    ({"prompt": "Hi"}, 'dropped: needs an "answer"'),
    ({"prompt": "Hi", "answer": " "}, 'dropped: needs an "answer"'),
]
COMPLETIONS = [
    (chat(U, A), HI),
    (PAIR, HI),
    (ALPACA | {"system": "Be"}, "S Be. U Hi. A [Yo.]"),
    (chat(U, said("assistant", "<think>hm</think>Yo")), THINK),
    (chat(U, A, U, A | {"loss": False}), "U Hi. A [Yo.] U Hi."),  # a prompt, as chats read it
    (chat(U, A | {"reasoning_content": "hm"}), "refused: without reasoning_content"),
    (chat(U, said("assistant", " ")), "dropped: an answer is empty"),
    (PAIR | {"label": False}, "dropped: its label says that it isn't wanted"),
    ({"prompt": "Hi", "answer": "7"}, "U Hi. -> 7"),
]
READERS = [
    (read_chats, as_chat, {"messages": [U, A]}, CHATS),
    (read_preferences, as_preference, TWO, PREFERENCES),
    (read_prompts, as_prompt, {"prompt": "Hi"}, PROMPTS),
    (read_examples, as_prompt, {"prompt": "Hi", "answer": "7"}, EXAMPLES),
    (read_completions, as_completion, PAIR, COMPLETIONS),
]


@pytest.mark.parametrize(
    "read, shown, good, record, outcome",
    [(*reader, *row) for *reader, rows in READERS for row in rows],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""),
)
def test_what_becomes_of_a_record(read, shown, good, record, outcome, tokenizer, tmp_path, capsys):
    path, (kind, _, words) = tmp_path / "a.jsonl", outcome.partition(": ")
    write_jsonl(path, [good, record, good])
    if kind == "refused":
        with pytest.raises(UserError) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}, line 2: ") and words in str(caught.value)
        return
    found = read(path)
    assert [found[0].where, found[-1].where] == [f"{path}, line {n}" for n in (1, 3)]
    out = capsys.readouterr().out
    if kind == "dropped":
        assert len(found) == 2 and words in out and "1 of 3 records" in out and "line 2" in out
    else:
        assert len(found) == 3 and not out and shown(found[1], tokenizer) == outcome


def test_a_part_that_is_an_image_is_its_marker_where_images_are_looked_at(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    record = chat(said("user", [PAINTED, PART]), A, images=["a.png"])
    write_jsonl(tmp_path / "a.jsonl", [record])
    [found] = read_image_chats(tmp_path / "a.jsonl")
    assert found["messages"][0]["content"] == "<image>Hi"
    assert found["images"] == [str(tmp_path / "a.png")]


def test_a_file_of_which_most_is_unusable_is_refused_with_the_reasons(tmp_path):
    path, empty = tmp_path / "a.jsonl", chat(U, said("assistant", ""))
    write_jsonl(path, [chat(U, A), empty, chat(U), empty, empty, chat(U, A), empty])
    said_of_it = (
        f"{path}: 5 of 7 records can't be used: an answer is empty (4: line 2, line 4, line 5, ...)"
        "; no answer (1: line 3): mend or drop them"
    )
    with pytest.raises(UserError) as caught:
        read_chats(path)
    assert str(caught.value) == said_of_it


# --- files ---------------------------------------------------------------------------------------

LINES = b'{"text": "a"}\n{"text": "b"}\n'
PRETTY = b'{\n  "text": "a"\n}\n{\n  "text":\n    "b"\n}\n'
ARRAY = b'[\n{"text": "a"}, {"text": "b"}]'
CSV = b'id,text\r\n1,a\r\n2,"b"\r\n'
QUOTED = b'text,n\n"a, ""b""\nc",1\n'
STORIES = b"a\n<|endoftext|>\n\nb\nc\n<|endoftext|>\n"
FILES = [  # (name, bytes, the documents or what is said)
    *((f"a{end}", LINES, ["a", "b"]) for end in (".jsonl", ".JSONL", ".ndjson", ".jsonlines")),
    *((f"a{end}", gzip.compress(LINES), ["a", "b"]) for end in (".jsonl.gz", ".jsonl", ".GZ")),
    *((f"a{end}", LINES, ["a", "b"]) for end in (".json", ".txt", "", ".jsonl.gz")),
    *((f"a{end}", PRETTY, ["a", "b"]) for end in (".json", ".jsonl", ".txt")),
    *((f"a{end}", ARRAY, ["a", "b"]) for end in (".json", ".jsonl", ".txt")),
    ("a.json", gzip.compress(ARRAY), ["a", "b"]),
    ("a.csv", CSV, ["a", "b"]),
    ("a.CSV.gz", gzip.compress(CSV), ["a", "b"]),
    ("a.csv", QUOTED, ['a, "b"\nc']),
    ("a.csv", LINES, ["a", "b"]),
    ("a.tsv", CSV.replace(b",", b"\t"), ["a", "b"]),
    ("a.txt", b"a\nb\n", ["a\nb\n"]),
    ("a.txt", b"[a] {b}", ["[a] {b}"]),
    ("a.txt", b"One <|endoftext|> in a line\n", ["One <|endoftext|> in a line\n"]),
    ("a.txt", STORIES, ["a", "b\nc"]),
    ("a.txt.gz", gzip.compress(STORIES.replace(b"\n", b"\r\n")), ["a", "b\nc"]),
    ("a.csv", b"text,text\na,b\n", "line 1: the first line must name the columns, each once"),
    ("a.csv", b"text,n\na,1\nb\n", "line 3: 1 cells, but 2 columns"),
    ("a.csv", b'text\n"a\n', "broken table"),
    ("a.csv", b"text\n", "there is no record in it"),
    ("a.json", b"[]", "there is no record in it"),
    ("a.json", b'{\n  "text": "a",\n  oops\n}', "line 3: broken JSON"),
    ("a.json", b'[{"text": "a"}, {"txt": "b"}]', "record 2: a corpus record needs a"),
    ("a.json", PRETTY + b'{\n "txt": 3}', "line 8: a corpus record needs a"),
    ("a.parquet", b"PAR1\x15\x04", "pandas.read_parquet('"),
    ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x04", "convert it first: zstd -d "),
    ("a.zip", b"PK\x03\x04..", "convert it first: unzip "),
    ("a.jsonl.gz", gzip.compress(LINES)[:-9], "is a damaged gzip file"),
    ("a.gz", gzip.compress(b"PAR1\x15\x04"), "pandas.read_parquet('"),
    ("a.jsonl", b"\x89PNG\r\n\x1a\n\x00", "is not UTF-8 text (byte 0)"),
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
    assert name in str(caught.value) and outcome in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_table_has_the_columns_as_keys_and_every_line_its_place(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'instruction,output\nHi,"Yo\nyo"\n\nHo,Ya\n')
    first, second = read_chats(path)
    assert [m["content"] for m in first["messages"] + second["messages"]] == [
        *("Hi", "Yo\nyo"),
        *("Ho", "Ya"),
    ]
    assert second.where == f"{path}, line 5"


def test_a_folder_is_the_texts_in_it(tmp_path):
    (tmp_path / "b").mkdir()
    for name, text in {"b/c.txt": "3", "a.TXT": "1", "b.txt": "2\n<|endoftext|>\n4"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "README.md").write_text("about")
    assert read_documents(tmp_path) == ["1", "3", "2", "4"]
    cfg = train_pretrain.Config(data=str(tmp_path), val_fraction=0.5)
    assert [texts() for texts, _ in train_pretrain.load_corpus(cfg)] == [["1", "3"], ["2", "4"]]
    before = train_pretrain.load_corpus(cfg)[0][1]
    (tmp_path / "b" / "c.txt").write_text("changed")
    assert train_pretrain.load_corpus(cfg)[0][1] != before


def test_a_folder_without_texts_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither .txt files nor token shards"):
        read_documents(tmp_path)


# --- scripts -------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path):
    def make(*records):
        write_jsonl(tmp_path / "data.jsonl", records)
        return str(tmp_path / "data.jsonl")

    return make


PROBLEM = {"prompt": "Hi", "answer": "7"}
NEEDS, ASKED = 'needs an "answer"', {"prompt": "Hi"}
LOADERS = [  # (script, its loader, flags, a good record, one that can't be used, the reason)
    (train_sft, "load_chats", {}, chat(U, A), chat(U), "no answer"),
    (train_ppo, "load_prompts", {}, TWO, TWO | {"prompt": ""}, "empty"),
    (train_ppo, "load_prompts", {"reward": "rules"}, PROBLEM, ASKED, NEEDS),
    (train_grpo, "load_problems", {}, PROBLEM, ASKED, NEEDS),
    (distill, "load_examples", {}, PAIR, PAIR | {"completion": ""}, "empty"),
]


@pytest.mark.parametrize("script, name, flags, good, bad, reason", LOADERS)
def test_every_script_drops_what_it_cannot_use_and_refuses_what_is_no_record(
    script, name, flags, good, bad, reason, write, capsys
):
    def load(*records):
        getattr(script, name)(script.Config(data=write(*records), **flags))

    load(good, bad, good)
    assert "1 of 3 records can't be used: " in (out := capsys.readouterr().out) and reason in out
    for records, words in (
        ([good, good, {"x": 1}], "line 3: "),
        ([good, bad, bad], "2 of 3 records can't be used"),
        ([good], "1 records leave none to train on, or none to hold out"),
    ):
        with pytest.raises(UserError, match=words):
            load(*records)


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_rankings_that_are_too_long_are_dropped_with_their_line(
    loss, write, tokenizer, random_model, capsys
):
    path = write(TWO, TWO | {"rejected": "o" * 60}, TWO, TWO)
    cfg = train_dpo.Config(data=path, val_fraction=0.25, loss=loss)
    train, val = load_preferences(cfg, random_model(), tokenizer, CPU, None, None)
    assert (len(train), len(val)) == (2, 1)
    assert f"longer than the model's 64 tokens (1: {path}, line 2)" in capsys.readouterr().out


def test_completions_with_a_label_are_paired_by_it_for_kto(write, tokenizer, random_model):
    labelled = [PAIR | {"label": n == 1} for n in range(4)]
    cfg = train_dpo.Config(data=write(*labelled, *labelled), val_fraction=0.5, loss="kto")
    model = random_model()
    train, _ = load_preferences(cfg, model, tokenizer, CPU, None, None)
    pairs = train_dpo.open_pairs(train, cfg, tokenizer, model)
    assert pairs.index.tolist() == [[1, 0], [1, 2], [1, 3]]
    assert len(pairs.mismatched) == len(pairs.rows) == 4
    with pytest.raises(UserError, match="line 1: one completion and its label are for --loss kto"):
        load_preferences(replace(cfg, loss="ipo"), model, tokenizer, CPU, None, None)
    with pytest.raises(UserError, match="both true and false"):
        train_dpo.open_pairs(train[:1], cfg, tokenizer, model)


def test_what_the_tokenizer_refuses_is_told_with_its_line(write, tokenizer):
    two = {"function": {"name": "add", "arguments": {"x": 1, "y": 2}}}
    path = write(chat(U, A), chat(U, said("assistant", "", tool_calls=[two])))
    with pytest.raises(
        UserError, match="data.jsonl, line 2: .*a tool call needs a name and one argument"
    ):
        pack_chats(read_chats(path), tokenizer, 64, "training", CPU)


def test_one_content_in_two_shapes_trains_on_the_same_tokens(tokenizer):
    if not (SHARED / "cases").exists():
        pytest.skip("the cases are not here")
    for name in ("mess", "share"):
        train, _ = read_parts(read_chats, SHARED / "cases" / f"{name}.jsonl", None, 0.05)
        assert pack_chats(train, tokenizer, 256, name, CPU).mask.sum() == 95


def test_records_keep_their_place_when_a_key_is_added(write):
    [record] = read_records(write(PAIR))
    assert (record | {"task": "x"}).where == record.where and record == PAIR


def test_a_separator_inside_a_line_divides_nothing_and_is_said(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one<|endoftext|>two", encoding="utf-8")
    assert len(read_documents(tmp_path / "a.txt")) == 1
    assert "is one document" in capsys.readouterr().out


def test_a_caption_that_is_too_long_for_clip_is_dropped(tokenizer):
    record = {"caption": "a " * train_vlm.CAPTION}
    with pytest.raises(Unusable, match="line 1: more than 128 tokens"):
        train_vlm.short_caption(tokenizer, record, "line 1")
