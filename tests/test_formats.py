"""Files: each format by hand, each refusal with its line, and the real samples."""

import json
from pathlib import Path

import pytest

from nanollm.config import UserError
from nanollm.formats import identity, read_documents, read_records, read_text, split_documents
from nanollm.records import (
    read_captions,
    read_chats,
    read_examples,
    read_image_chats,
    read_preferences,
    read_prompts,
)

SAMPLES = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def write(tmp_path):
    """write(record, ...): the path of a JSONL file of these lines; text and bytes as they are."""
    (tmp_path / "a.png").write_bytes(b"")

    def make(*records, name="file.jsonl"):
        path = tmp_path / name
        if isinstance(records[0], bytes):
            path.write_bytes(records[0])
        else:
            lines = (r if isinstance(r, str) else json.dumps(r) for r in records)
            path.write_bytes("\n".join(lines).encode())
        return path

    return make


def turns(*contents):
    """Messages by turns of the user and the assistant, the user first."""
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": text} for role, text in zip(roles, contents)]


def answer(text):
    return [{"role": "assistant", "content": text}]


def sharegpt(*turns):
    return {"conversations": [{"from": who, "value": text} for who, text in turns]}


def pair(chosen, rejected):
    return {"chosen": chosen, "rejected": rejected}


def hh(*contents):
    whos = ("\n\nHuman: ", "\n\nAssistant: ") * len(contents)
    return "".join(who + text for who, text in zip(whos, contents))


# --- text and JSON -------------------------------------------------------------------------------

TEXT = {"text": "a"}


@pytest.mark.parametrize(
    "content, sentence",
    [(b"", "is empty"), (b" \n\t\n", "is empty"), (b"abc\xff", r"is not UTF-8 text \(byte 3\)")],
)
def test_a_file_without_text_is_refused(content, sentence, write):
    with pytest.raises(UserError, match=sentence):
        read_text(write(content))


@pytest.mark.parametrize("name, sentence", [("no.txt", "does not exist"), ("", "is a directory")])
def test_a_path_without_file_is_refused(name, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        read_text(tmp_path / name)


@pytest.mark.parametrize(
    "content, documents",
    [
        (b'{"text": "a"}\r\n{"text": "b"}\r\n', ["a", "b"]),
        (b'\xef\xbb\xbf{"text": "a"}\n\n', ["a"]),
        ('{"text": "\u00e9\u2028b\x85c"}\n{"text": "b", "n": 1}'.encode(), ["é\u2028b\x85c", "b"]),
        (b'[{"text": "a"},\n {"text": "b"}]', ["a", "b"]),
        (b'{"text": "\\ud83d\\ude00"}', ["\U0001f600"]),  # both halves of a surrogate pair
    ],
)
def test_records_are_lines_or_one_array(content, documents, write):
    assert read_documents(write(content)) == documents


def test_blank_lines_count(write):
    path = write(TEXT, "", {"text": "b"})
    assert [r.where for r in read_records(path)] == [f"{path}, line 1", f"{path}, line 3"]


def test_a_text_file_is_one_document(write):
    assert read_documents(write(b"Once.\nTwice.\n", name="a.txt")) == ["Once.\nTwice.\n"]


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


def test_a_changed_file_has_another_identity(write):
    before = identity(write(b"abc"))
    assert identity(write(b"abcd")) != before != identity(write(b"abc", name="b.txt"))


# --- what is read --------------------------------------------------------------------------------

HI, PET = turns("Hi", "Hello"), turns("What pet?")
CHATS = [  # (record, its messages)
    ({"messages": HI}, HI),
    (sharegpt(("human", "Hi"), ("gpt", "Hello")), HI),
    (
        sharegpt(("system", "Be kind"), ("user", "Hi"), ("assistant", "Hello"), ("tool", "4")),
        [{"role": "system", "content": "Be kind"}, *HI, {"role": "tool", "content": "4"}],
    ),
    ({"instruction": "Hi", "output": "Hello"}, HI),
    ({"instruction": "Hi", "input": "", "output": "Hello"}, HI),
    ({"instruction": "Add", "input": "1 2", "output": "3"}, turns("Add\n\n1 2", "3")),
]


@pytest.mark.parametrize("record, messages", CHATS)
def test_chats_of_three_shapes_become_messages_and_keep_other_keys(record, messages, write):
    assert read_chats(write(record | {"kind": "x"})) == [{"messages": messages, "kind": "x"}]


PAIR = {"prompt": "What pet?", "chosen": "A goat.", "rejected": "A hen."}
TALK, GOATS = turns("Hi", "Hello", "Where?"), ["A goat.", "A hen."]
BLANKS = hh("One\n\ntwo, said\nHuman: three")
PREFERENCES = [  # (record, its messages, its completions)
    (PAIR, PET, GOATS),
    ({"messages": TALK, "chosen": "Here.", "rejected": "No."}, TALK, ["Here.", "No."]),
    (PAIR | {"prompt": PET}, PET, GOATS),
    ({"messages": PET, "chosen": answer("A goat."), "rejected": answer("A hen.")}, PET, GOATS),
    ({"prompt": PET, "chosen": answer("A goat."), "rejected": answer("A hen.")}, PET, GOATS),
    (pair([*TALK, *answer("Here.")], [*TALK, *answer("No.")]), TALK, ["Here.", "No."]),
    ({"prompt": "What pet?", "ranking": ["A goat.", "Goat", "No"]}, PET, ["A goat.", "Goat", "No"]),
    ({"messages": TALK, "ranking": ["Here.", "No."]}, TALK, ["Here.", "No."]),
    (PAIR | pair(" def f():\n", "\tpass"), PET, [" def f():\n", "\tpass"]),
    (pair(hh("Hi", "A"), hh("Hi", "B")), turns("Hi"), ["A", "B"]),
    (pair(hh("Hi", "Hello", "Where?", "A"), hh("Hi", "Hello", "Where?", "B")), TALK, ["A", "B"]),
    (
        {
            "chosen": BLANKS + "\n\nAssistant: A\n\nB",
            "rejected": BLANKS + "\n\nAssistant: Human: B",
        },
        turns("One\n\ntwo, said\nHuman: three"),
        ["A\n\nB", "Human: B"],
    ),
]


@pytest.mark.parametrize("record, messages, completions", PREFERENCES)
def test_a_preference_is_a_prompt_and_its_completions_the_best_first(
    record, messages, completions, write
):
    wanted = {"messages": messages, "completions": completions, "margin": None}
    more = {"gold": [2] * len(completions), "ratings": [1.5] * len(completions), "task": "fact"}
    assert read_preferences(write(record, record | more)) == [wanted, wanted | more]
    as_array = write(json.dumps([record, record | more]), name="array.json")
    assert read_preferences(as_array) == [wanted, wanted | more]


@pytest.mark.parametrize("margin, read", [(0, 0.0), (2, 2.0), (0.5, 0.5), (None, None)])
def test_a_margin_is_a_float_or_none(margin, read, write):
    [record] = read_preferences(write(PAIR | {"margin": margin}))
    assert record["margin"] == read and type(record["margin"]) is type(read)


ALPACA = {"instruction": "What pet?", "output": "A goat."}
PROMPTS = [  # (record, what is read)
    ({"prompt": "What pet?"}, {"messages": PET}),
    ({"messages": PET}, {"messages": PET}),
    ({"prompt": "What pet?", "task": "fact"}, {"messages": PET, "task": "fact"}),
    ({"messages": [*TALK, *answer("Here.")]}, {"messages": TALK}),
    ({"messages": PET + answer("A goat.") + answer("Or two.")}, {"messages": PET}),
    (ALPACA, {"messages": PET}),
    ({"messages": PET, "instruction": "x"}, {"messages": PET, "instruction": "x"}),
    (PAIR, {"messages": PET}),
    ({"prompt": "What pet?", "ranking": ["b", "c"]}, {"messages": PET}),
    (pair(hh("Hi", "A"), hh("Hi", "B")), {"messages": turns("Hi")}),
    (PAIR | {"answer": "goat"}, {"messages": PET, "answer": "goat", "check": "contains"}),
    (
        {"question": "3 + 4?", "answer": "3 + 4 = <<3+4=7>>7\n#### 1,072", "id": 1},  # GSM8K
        {"messages": turns("3 + 4?"), "answer": "1072", "check": "number", "id": 1},
    ),
    ({"prompt": "What pet?", "question": "x"}, {"messages": PET, "question": "x"}),
]


@pytest.mark.parametrize("record, prompt", PROMPTS)
def test_a_prompt_ends_before_the_answer(record, prompt, write):
    assert read_prompts(write(record)) == [prompt]


def test_a_sharegpt_dialogue_gives_its_prompt(write):
    talk = sharegpt(("human", "What pet?"), ("gpt", "A goat."))
    assert read_prompts(write(talk))[0]["messages"] == PET


@pytest.mark.parametrize(
    "given, text, check",
    [
        ("62", "62", "number"),
        (62, "62", "number"),
        ("-3", "-3", "number"),
        (" 0.5 ", "0.5", "number"),
        ("1,072", "1072", "number"),
        (" a goat\n", "a goat", "contains"),
        ("1,2,3", "1,2,3", "contains"),
        (",", ",", "contains"),
        ("7 goats", "7 goats", "contains"),
    ],
)
def test_an_answer_says_how_it_is_checked(given, text, check, write):
    plain, exact = {"prompt": "How many?", "answer": given}, {"check": "exact", "task": "sum"}
    first, second = read_examples(write(plain, plain | exact))
    assert (first["answer"], first["check"], first["task"]) == (text, check, "all")
    assert (second["answer"], second["check"]) == (str(given).strip(), "exact")


def test_images_are_found_beside_the_file(write, tmp_path):
    shown = {"image": "a.png", "messages": turns("<image>What?", "A cat.")}
    text, path = {"messages": HI}, str(tmp_path / "a.png")
    chats = read_image_chats(write(shown, text))
    assert [chat["images"] for chat in chats] == [[path], []]
    assert read_prompts(write(shown))[0]["images"] == [path]
    captions = read_captions(write(shown, {"image": "a.png", "caption": "A dog."}))
    assert captions == [{"image": path, "caption": text} for text in ("A cat.", "A dog.")]


# --- what is refused -----------------------------------------------------------------------------

RECORDS = {
    "broken JSON": '{"prompt": ',
    "a record must be a JSON object, not list": "[1]",
    "half of a surrogate pair": {"text": "a\ud800"},
}
CORPUS = 'a corpus record needs a "text"'
BAD_DOCUMENTS = [({"txt": "b"}, CORPUS), ({"text": 3}, CORPUS)]
CONTENT, CHAT = 'has no text in "content"', 'a chat record needs "messages"'
BAD_CHATS = [
    ({}, CHAT),
    ({"messages": []}, CHAT),
    ({"messages": "hi"}, CHAT),
    ({"messages": ["hi"]}, 'message 0 has no "role"'),
    ({"messages": [{"content": "a"}]}, 'message 0 has no "role"'),
    (
        {"messages": [*PET, {"role": "bot", "content": "b"}]},
        "message 1 has the unknown role 'bot'; roles are system, user, assistant, tool",
    ),
    ({"messages": [{"role": ["user"], "content": "a"}]}, "unknown role ['user']"),
    ({"messages": [{"role": "user"}]}, CONTENT),
    ({"messages": [{"role": "user", "content": None}]}, CONTENT),
    ({"conversations": "hi"}, CHAT),
    ({"conversations": ["hi"]}, 'message 0 has no "role"'),
    ({"prompt": "hi", "answer": "7"}, CHAT),
    (sharegpt(("cat", "miau")), "message 0 has the unknown role 'cat'"),
    (sharegpt((["cat"], "miau")), "message 0 has the unknown role"),
    ({"conversations": [{"from": "human"}]}, CONTENT),
    ({"instruction": "Sing.", "output": None}, "message 1 " + CONTENT),
]
NEEDS = 'needs "chosen" and "rejected", or a "ranking"'
TEXTUAL, ONE = "every completion must be text", "one message of the assistant"
PROMPT = 'a "prompt" (text) or "messages" are wanted'
BAD_PREFERENCES = [
    ({"prompt": "a", "ranking": "bc"}, NEEDS),
    ({"prompt": "a", "ranking": [1, 2]}, TEXTUAL),
    ({"prompt": "a", "chosen": "b"}, NEEDS),
    ({"prompt": "a"}, NEEDS),
    (PAIR | {"rejected": None}, TEXTUAL),
    (PAIR | {"rejected": 5}, TEXTUAL),
    (PAIR | {"chosen": [{"role": "assistant"}]}, CONTENT),
    (PAIR | {"chosen": turns("b")}, ONE),
    (PAIR | {"chosen": []}, ONE),
    (PAIR | pair(turns("a", "b"), turns("a", "c")), "don't answer the prompt"),
    (pair(hh("Hi", "A"), answer("b")), "both be text, or both messages"),
    ({"ranking": ["b", "c"]}, PROMPT),
    (PAIR | {"prompt": 5}, CONTENT),
    (PAIR | {"prompt": []}, PROMPT),
    ({"messages": "a", "ranking": ["b", "c"]}, PROMPT),
    ({"messages": HI, "ranking": ["c", "d"]}, "the prompt ends with an answer"),
    ({"messages": [{"role": "bot", "content": "a"}], "ranking": ["b", "c"]}, "unknown role 'bot'"),
    (pair("b", "c"), r"\n\nHuman: ...\n\nAssistant:"),
    (pair("So" + hh("a", "b"), "So" + hh("a", "c")), "a dialogue is wanted"),
    ({"prompt": "a", "ranking": ["b", "c"], "ratings": [1]}, '"ratings" must hold a number'),
    *(
        (json.dumps(PAIR | {"margin": None}).replace("null", margin), '"margin" must be a number')
        for margin in ("-1", "NaN", "Infinity", "1" + "0" * 400, "true", '"2"', "[]")
    ),
]
TEXT_OR_NUMBER, MARKS = '"answer" must be text or a number', "must end with ####"
BAD_PROMPTS = [
    ({}, PROMPT),
    ({"messages": []}, PROMPT),
    ({"prompt": "a", "answer": ["7"]}, TEXT_OR_NUMBER),
    ({"prompt": "a", "answer": True}, TEXT_OR_NUMBER),
    ({"prompt": "a", "answer": "goat", "check": "number"}, "must be a number, not 'goat'"),
    ({"prompt": "a", "answer": "b", "check": "regex"}, "unknown check 'regex'"),
    ({"prompt": "a", "answer": "b", "check": []}, "unknown check []"),
    *(
        ({"prompt": "a", "answer": "b", "not": wrong}, '"not" must be a list')
        for wrong in (5, [5], "banana", None, ["c", ""])
    ),
    ({"prompt": "a", "answer": "b", "begins": 5}, '"begins" must be text'),
    ({"prompt": "a", "answer": "b", "ends": ["c"]}, '"ends" must be text'),
    ({"prompt": "a", "task": ["b"]}, '"task" must be text'),
    ({"prompt": "a", "task": None}, '"task" must be text'),
    ({"question": "3 + 4?", "answer": "7"}, MARKS),
    ({"question": "3 + 4?"}, MARKS),
    ({"question": "3 + 4?", "answer": "#### seven"}, "must be a number, not 'seven'"),
    ({"question": 3, "answer": "#### 7"}, CONTENT),
]
SHOWN, GOOD = {"image": "a.png"}, {"image": "a.png", "messages": turns("<image>What?", "A cat.")}
BAD_IMAGES = [
    (GOOD | {"image": 5}, '"image" must be a file name or a list of them'),
    (GOOD | {"image": "b.png"}, "b.png does not exist"),
    ({"messages": turns("<image>What?", "A cat.")}, "1 times <image>, but 0 images"),
    (SHOWN | {"messages": turns("What?", "A cat.")}, "0 times <image>, but 1 images"),
    (SHOWN | {"messages": turns("What?", "<image>")}, "only users show images"),
]
BAD_CAPTIONS = [
    ({"caption": "A cat."}, "a caption belongs to one image, not to 0"),
    (SHOWN | {"messages": turns("<image>What?")}, 'a "caption" is wanted, as text'),
]
READERS = [  # (read, a good record, the bad ones)
    (read_records, TEXT, [(record, words) for words, record in RECORDS.items()]),
    (read_documents, TEXT, BAD_DOCUMENTS),
    (read_chats, {"messages": PET}, BAD_CHATS),
    (read_preferences, PAIR, BAD_PREFERENCES),
    (read_prompts, {"prompt": "a"}, BAD_PROMPTS),
    (read_image_chats, GOOD, BAD_IMAGES),
    (read_prompts, GOOD, BAD_IMAGES[:2]),
    (read_captions, GOOD, BAD_CAPTIONS),
]


@pytest.mark.parametrize(
    "read, good, record, words",
    [(read, good, *bad) for read, good, bads in READERS for bad in bads],
    ids=lambda value: getattr(value, "__name__", value if isinstance(value, str) else ""),
)
def test_what_does_not_fit_is_refused_with_its_line(read, good, record, words, write):
    path = write(good, "", record)  # empty lines count too
    with pytest.raises(UserError) as caught:
        read(path)
    said = str(caught.value)
    assert said.startswith(f"{path}, line 3: ") and words in said and "\n" not in said
    assert len(said) < 2 * len(str(path)) + 200  # a sentence, however long the value is


def test_in_an_array_the_place_of_the_record_is_told(write):
    path = write(json.dumps([PAIR, PAIR | {"chosen": 5}]), name="array.json")
    with pytest.raises(UserError, match="array.json, record 2: every completion must be text"):
        read_preferences(path)
    with pytest.raises(UserError, match="line 3: broken JSON"):
        read_records(write("[", '{"text": "a"},', "oops]"))


# --- the real samples ----------------------------------------------------------------------------


def sample(name):
    if not (SAMPLES / name).exists():
        pytest.skip("the real samples are not here")
    return SAMPLES / name


def test_of_the_real_hh_rlhf_pairs_nine_are_dropped_and_the_others_split_into_turns(capsys):
    read = read_preferences(sample("hh_harmless_test.jsonl.gz"))
    assert len(read) == 2303 and all(len(r["completions"]) == 2 for r in read)
    assert all(r["messages"][-1]["role"] == "user" for r in read)
    assert capsys.readouterr().out.endswith(
        "9 of 2,312 records can't be used: a completion is empty (4: line 87, line 517, line 926, "
        "...); chosen and rejected answer different prompts (5: line 1255, line 1689, line 1951, "
        "...); dropped\n"
    )


@pytest.mark.parametrize("name, count", [("train", 7473), ("test", 1319)])
def test_every_real_gsm8k_answer_is_a_number(name, count):
    problems = read_prompts(sample(f"gsm8k/{name}.jsonl"))
    assert len(problems) == count and {p["check"] for p in problems} == {"number"}
    assert all(float(p["answer"]) == int(p["answer"]) for p in problems)


def test_the_real_alpaca_instructions_are_chats_and_prompts():
    prompts, chats = (read(sample("instructions.json")) for read in (read_prompts, read_chats))
    assert chats and [p["messages"] for p in prompts] == [c["messages"][:-1] for c in chats]
    assert read_documents(sample("tinystories.txt"))
