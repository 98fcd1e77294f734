"""Preferences and prompts from files: each format by hand, each refusal, and the real samples."""

import gzip
import json
from pathlib import Path

import pytest

from nanollm.config import UserError
from nanollm.formats import read_chats, read_preferences, read_prompts

SAMPLES = Path(__file__).parents[2] / "shared" / "data"


def turns(*contents):
    """Messages by turns of the user and the assistant, the user first."""
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": text} for role, text in zip(roles, contents)]


def answer(text):
    return [{"role": "assistant", "content": text}]


PET = turns("What pet?")
PAIR = {"prompt": "What pet?", "chosen": "A goat.", "rejected": "A hen."}
HELLO = "\n\nHuman: Hello\n\nAssistant: Good day!"
HALLO = "\n\nHuman: Hello\n\nAssistant: What?"


@pytest.fixture
def write(tmp_path):
    """write(record, ...) is the path of a JSONL file that holds them; text stays as it is."""

    def write(*records):
        path = tmp_path / "file.jsonl"
        lines = (r if isinstance(r, str) else json.dumps(r) for r in records)
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write


# --- preferences ------------------------------------------------------------------------------

PREFERENCES = {  # name: (record, its messages, its completions)
    "a pair": (PAIR, PET, ["A goat.", "A hen."]),
    "a pair in a talk": (
        {"messages": turns("Hi", "Hello", "Where?"), "chosen": "Here.", "rejected": "No."},
        turns("Hi", "Hello", "Where?"),
        ["Here.", "No."],
    ),
    "a prompt that is messages": (PAIR | {"prompt": PET}, PET, ["A goat.", "A hen."]),
    "completions that are messages": (
        {"messages": PET, "chosen": answer("A goat."), "rejected": answer("A hen.")},
        PET,
        ["A goat.", "A hen."],
    ),
    "prompt and completions that are messages": (
        {"prompt": PET, "chosen": answer("A goat."), "rejected": answer("A hen.")},
        PET,
        ["A goat.", "A hen."],
    ),
    "whole dialogues": (
        {
            "chosen": turns("Hi", "Hello", "Where?", "Here."),
            "rejected": turns("Hi", "Hello", "Where?", "No."),
        },
        turns("Hi", "Hello", "Where?"),
        ["Here.", "No."],
    ),
    "a ranking": (
        {"prompt": "What pet?", "ranking": ["A goat.", "Goat", "A hen."]},
        PET,
        ["A goat.", "Goat", "A hen."],
    ),
    "a ranking in a talk": (
        {"messages": turns("Hi", "Hello", "Where?"), "ranking": ["Here.", "No."]},
        turns("Hi", "Hello", "Where?"),
        ["Here.", "No."],
    ),
    "a system prompt first": (
        PAIR | {"prompt": [{"role": "system", "content": "Be brief."}, *PET]},
        [{"role": "system", "content": "Be brief."}, *PET],
        ["A goat.", "A hen."],
    ),
    "HH-RLHF": ({"chosen": HELLO, "rejected": HALLO}, turns("Hello"), ["Good day!", "What?"]),
    "HH-RLHF with several turns": (
        {
            "chosen": HELLO + "\n\nHuman: Why?\n\nAssistant: So.",
            "rejected": HELLO + "\n\nHuman: Why?\n\nAssistant: No.",
        },
        turns("Hello", "Good day!", "Why?"),
        ["So.", "No."],
    ),
    "HH-RLHF with empty lines and roles in its texts": (
        {
            "chosen": "\n\nHuman: One\n\ntwo, said\nHuman: three\n\nAssistant: A\n\nB",
            "rejected": "\n\nHuman: One\n\ntwo, said\nHuman: three\n\nAssistant: A Human: B",
        },
        turns("One\n\ntwo, said\nHuman: three"),
        ["A\n\nB", "A Human: B"],
    ),
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_a_preference_becomes_a_prompt_and_its_completions_the_best_first(name, write):
    record, messages, completions = PREFERENCES[name]
    assert read_preferences(write(record)) == [
        {"messages": messages, "completions": completions, "margin": None}
    ]


def test_a_json_array_of_preferences_reads_like_their_lines(write, tmp_path):
    (tmp_path / "array.json").write_text(json.dumps([PAIR, PAIR | {"margin": 1}]))
    lines = read_preferences(write(PAIR, "", PAIR | {"margin": 1}))
    assert read_preferences(tmp_path / "array.json") == lines and len(lines) == 2


@pytest.mark.parametrize("margin, read", [(0, 0.0), (2, 2.0), (0.5, 0.5), (None, None)])
def test_a_margin_is_a_float_or_none(margin, read, write):
    [record] = read_preferences(write(PAIR | {"margin": margin}))
    assert record["margin"] == read and type(record["margin"]) is type(read)


def test_other_keys_of_a_preference_are_kept(write):
    more = {
        "gold": [1, 0.5],
        "ratings": [3, -1.5],
        "answer": "goat",
        "check": "contains",
        "not": ["hen"],
        "task": "fact",
        "reference": "A goat.",
        "instruction": "x",
    }
    [record] = read_preferences(write({"messages": PET, "ranking": ["A goat.", "A hen."]} | more))
    assert record == more | {"messages": PET, "completions": ["A goat.", "A hen."], "margin": None}


def test_completions_keep_their_white_space(write):
    [record] = read_preferences(write(PAIR | {"chosen": " def f():\n", "rejected": "\tpass"}))
    assert record["completions"] == [" def f():\n", "\tpass"]


# --- prompts ----------------------------------------------------------------------------------

PROMPTS = {  # name: (record, what is read)
    "a prompt": ({"prompt": "What pet?"}, {"messages": PET}),
    "messages": ({"messages": PET}, {"messages": PET}),
    "other keys": ({"prompt": "What pet?", "task": "fact"}, {"messages": PET, "task": "fact"}),
    "a dialogue without its answer": (
        {"messages": turns("Hi", "Hello", "What?", "A goat.")},
        {"messages": turns("Hi", "Hello", "What?")},
    ),
    "a dialogue without its last two answers": (
        {"messages": turns("What pet?", "A goat.") + answer("Or two.")},
        {"messages": PET},
    ),
    "Alpaca": (
        {"instruction": "What pet?", "output": "A goat."},
        {"messages": PET, "instruction": "What pet?", "output": "A goat."},
    ),
    "messages beside an instruction": (
        {"messages": PET, "instruction": "x"},
        {"messages": PET, "instruction": "x"},
    ),
    "a pair": (PAIR, {"messages": PET}),
    "a ranking": ({"prompt": "What pet?", "ranking": ["b", "c"]}, {"messages": PET}),
    "HH-RLHF": ({"chosen": HELLO, "rejected": HALLO}, {"messages": turns("Hello")}),
    "a pair with an answer": (
        PAIR | {"answer": "goat"},
        {"messages": PET, "answer": "goat", "check": "contains"},
    ),
    "GSM8K": (
        {"question": "3 + 4?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7", "id": 1},
        {"messages": turns("3 + 4?"), "answer": "7", "check": "number", "id": 1},
    ),
    "GSM8K with a comma": (
        {"question": "1 + 1071?", "answer": "#### 1,072"},
        {"messages": turns("1 + 1071?"), "answer": "1072", "check": "number"},
    ),
    "a prompt beside a question": (
        {"prompt": "What pet?", "question": "x"},
        {"messages": PET, "question": "x"},
    ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_ends_before_the_answer(name, write):
    record, prompt = PROMPTS[name]
    assert read_prompts(write(record)) == [prompt]


def test_a_sharegpt_dialogue_gives_its_prompt(write):
    talk = [{"from": "human", "value": "What pet?"}, {"from": "gpt", "value": "A goat."}]
    assert read_prompts(write({"conversations": talk}))[0]["messages"] == PET


@pytest.mark.parametrize(
    "given, text, check",
    [
        ("62", "62", "number"),
        (62, "62", "number"),
        ("-3", "-3", "number"),
        (" 0.5 ", "0.5", "number"),
        (" a goat\n", "a goat", "contains"),
        ("1,072", "1072", "number"),
        ("1,2,3", "1,2,3", "contains"),
        (",", ",", "contains"),
        ("a goat", "a goat", "contains"),
        ("7 goats", "7 goats", "contains"),
    ],
)
def test_an_answer_says_how_it_is_checked(given, text, check, write):
    [problem] = read_prompts(write({"prompt": "How many?", "answer": given}))
    assert (problem["answer"], problem["check"]) == (text, check)


def test_both_halves_of_a_surrogate_pair_are_a_character(write):
    assert read_prompts(write({"prompt": "\U0001f600"}))[0]["messages"] == turns("\U0001f600")


def test_a_check_that_is_given_stays(write):
    [problem] = read_prompts(write({"prompt": "How many?", "answer": "1,072", "check": "exact"}))
    assert (problem["answer"], problem["check"]) == ("1,072", "exact")


# --- what is refused --------------------------------------------------------------------------

BAD_PREFERENCES = {  # name: (what stands in line 3, a part of the sentence)
    "equal completions": (PAIR | {"rejected": "A goat.\n"}, "two completions are equal"),
    "a completion twice": (
        {"prompt": "a", "ranking": ["b", "c", "b"]},
        "two completions are equal",
    ),
    "equal HH-RLHF completions": (
        {"chosen": HELLO, "rejected": HELLO + " "},
        "two completions are equal",
    ),
    "a ranking of one": ({"prompt": "a", "ranking": ["b"]}, "two completions or more, not 1"),
    "a ranking of none": ({"prompt": "a", "ranking": []}, "two completions or more, not 0"),
    "a ranking that is text": ({"prompt": "a", "ranking": "bc"}, '"ranking" must be a list'),
    "a ranking of numbers": ({"prompt": "a", "ranking": [1, 2]}, "every completion must be text"),
    "an empty completion": (PAIR | {"chosen": " \n"}, "a completion is empty"),
    "an empty HH-RLHF completion": (
        {"chosen": HELLO, "rejected": "\n\nHuman: Hello\n\nAssistant:"},
        "a completion is empty",
    ),
    "no rejected completion": ({"prompt": "a", "chosen": "b"}, 'needs "chosen" and "rejected"'),
    "no completion": ({"prompt": "a"}, 'needs "chosen" and "rejected", or a "ranking"'),
    "a completion that is null": (PAIR | {"rejected": None}, "every completion must be text"),
    "a completion that is a number": (PAIR | {"rejected": 5}, "every completion must be text"),
    "a completion without content": (PAIR | {"chosen": [{"role": "assistant"}]}, "must be text"),
    "a completion of the user": (PAIR | {"chosen": turns("b")}, "one message of the assistant"),
    "a completion of no message": (PAIR | {"chosen": []}, "one message of the assistant"),
    "whole dialogues beside a prompt": (
        PAIR | {"chosen": turns("a", "b"), "rejected": turns("a", "c")},
        "leave the prompt out",
    ),
    "messages against text": (
        {"chosen": HELLO, "rejected": answer("b")},
        "both be text, or both messages",
    ),
    "dialogues with different prompts": (
        {"chosen": turns("a", "b"), "rejected": turns("x", "c")},
        "answer different prompts",
    ),
    "dialogues of one answer": (
        {"chosen": answer("a"), "rejected": answer("b")},
        "the prompt is empty",
    ),
    "no prompt": ({"ranking": ["b", "c"]}, 'a "prompt" (text) or "messages" are wanted'),
    "a prompt that is a number": (PAIR | {"prompt": 5}, 'a "prompt" (text) or "messages"'),
    "an empty prompt": (PAIR | {"prompt": " "}, "the prompt is empty"),
    "a prompt of no messages": (PAIR | {"prompt": []}, "the prompt is empty"),
    "empty messages": ({"messages": turns(" "), "ranking": ["b", "c"]}, "the prompt is empty"),
    "messages that are text": ({"messages": "a", "ranking": ["b", "c"]}, 'needs "messages"'),
    "a prompt with an answer": (
        {"messages": turns("a", "b"), "ranking": ["c", "d"]},
        "the prompt ends with an answer",
    ),
    "an unknown role": (
        {"messages": [{"role": "robot", "content": "a"}], "ranking": ["b", "c"]},
        "unknown role 'robot'; roles are system, user, assistant, tool",
    ),
    "different HH-RLHF prompts": (
        {"chosen": HELLO, "rejected": HALLO.replace("Hello", "Hi")},
        "answer different prompts",
    ),
    "HH-RLHF that ends with Human": (
        {"chosen": HELLO + "\n\nHuman: Bye", "rejected": HALLO + "\n\nHuman: Bye!"},
        "must end with the assistant's answer",
    ),
    "HH-RLHF with an empty prompt": (
        {"chosen": HELLO.replace("Hello", ""), "rejected": HALLO.replace("Hello", "")},
        "the prompt is empty",
    ),
    "text that is no dialogue": ({"chosen": "b", "rejected": "c"}, r"\n\nHuman: ...\n\nAssistant:"),
    "text before the dialogue": (
        {"chosen": "So" + HELLO, "rejected": "So" + HALLO},
        "a dialogue is wanted",
    ),
    "a rating too few": (
        {"prompt": "a", "ranking": ["b", "c"], "ratings": [1]},
        '"ratings" must hold a number',
    ),
    "a list": ("[1]", "a JSON object is wanted, not list"),
    "broken JSON": ('{"prompt": ', "broken JSON"),
}
for margin in ("-1", "NaN", "Infinity", "1" + "0" * 400, "true", '"2"', "[]"):
    text = json.dumps(PAIR | {"margin": None}).replace("null", margin)
    BAD_PREFERENCES[f"the margin {margin:.9}"] = (text, '"margin" must be a number of at least 0')

BAD_PROMPTS = {
    "nothing": ({}, 'a "prompt" (text) or "messages" are wanted'),
    "an empty prompt": ({"prompt": "\n"}, "the prompt is empty"),
    "an answer to nothing": ({"messages": answer("b")}, "the prompt is empty"),
    "no messages": ({"messages": []}, 'needs "messages"'),
    "an unknown role": ({"messages": [{"role": "robot", "content": "a"}]}, "unknown role 'robot'"),
    "a pair of equals": (PAIR | {"rejected": "A goat."}, "two completions are equal"),
    "an empty answer": ({"prompt": "a", "answer": " "}, '"answer" must be text or a number'),
    "an answer that is a list": ({"prompt": "a", "answer": ["7"]}, '"answer" must be text'),
    "an answer that is true": ({"prompt": "a", "answer": True}, '"answer" must be text'),
    "a number that is none": (
        {"prompt": "a", "answer": "goat", "check": "number"},
        "must be a number, not 'goat'",
    ),
    "an unknown check": ({"prompt": "a", "answer": "b", "check": "regex"}, "unknown check 'regex'"),
    "a check that is a list": ({"prompt": "a", "answer": "b", "check": []}, "unknown check []"),
    **{
        f'"not" {wrong}': ({"prompt": "a", "answer": "b", "not": wrong}, '"not" must be a list')
        for wrong in (5, [5], "banana", None, ["c", ""])
    },
    "a beginning that is a number": ({"prompt": "a", "answer": "b", "begins": 5}, '"begins" must'),
    "an end that is a list": ({"prompt": "a", "answer": "b", "ends": ["c"]}, '"ends" must be text'),
    "a task that is a list": ({"prompt": "a", "task": ["b"]}, '"task" must be text'),
    "a task that is null": ({"prompt": "a", "task": None}, '"task" must be text'),
    "half of a surrogate pair": ({"prompt": "a\ud800"}, "half of a surrogate pair"),
    "GSM8K without ####": ({"question": "3 + 4?", "answer": "7"}, "must end with ####"),
    "GSM8K without an answer": ({"question": "3 + 4?"}, "must end with ####"),
    "GSM8K with nothing behind ####": ({"question": "3 + 4?", "answer": "####"}, '"answer" must'),
    "GSM8K with words behind ####": (
        {"question": "3 + 4?", "answer": "#### seven"},
        "must be a number, not 'seven'",
    ),
    "a question that is no text": (
        {"question": 3, "answer": "#### 7"},
        'a "prompt" (text) or "messages" are wanted',
    ),
}


@pytest.mark.parametrize(
    "read, good, record, words",
    [(read_preferences, PAIR, *bad) for bad in BAD_PREFERENCES.values()]
    + [(read_prompts, {"prompt": "a"}, *bad) for bad in BAD_PROMPTS.values()],
    ids=[*BAD_PREFERENCES, *(f"prompts: {name}" for name in BAD_PROMPTS)],
)
def test_what_does_not_fit_is_refused_with_its_line(read, good, record, words, write):
    path = write(good, "", record)  # empty lines count too
    with pytest.raises(UserError) as caught:
        read(path)
    said = str(caught.value)
    assert said.startswith(f"{path}, line 3: ") and words in said and "\n" not in said
    assert len(said) < len(str(path)) + 200  # a sentence, however long the value is


def test_in_an_array_the_place_of_the_record_is_told(tmp_path):
    (tmp_path / "array.json").write_text(json.dumps([PAIR, PAIR | {"chosen": ""}]))
    with pytest.raises(UserError, match="array.json, line 2: a completion is empty"):
        read_preferences(tmp_path / "array.json")


# --- the real samples -------------------------------------------------------------------------


def sample(name):
    if not (SAMPLES / name).exists():
        pytest.skip("the real samples are not here")
    return SAMPLES / name


def test_of_the_real_hh_rlhf_pairs_nine_are_refused_and_the_others_split_into_turns(write):
    lines = gzip.decompress(sample("hh_harmless_test.jsonl.gz").read_bytes()).decode().split("\n")
    read, refused = [], {}
    for number, line in enumerate(filter(None, lines), 1):
        try:
            read += read_preferences(write(line))
        except UserError as error:
            refused[number] = str(error).partition("line 1: ")[2]
    assert len(read) == 2303 and all(len(r["completions"]) == 2 for r in read)
    assert all(r["messages"][-1]["role"] == "user" for r in read)
    assert [n for n, why in refused.items() if "completion is empty" in why] == [87, 517, 926, 1104]
    assert [n for n, why in refused.items() if "different prompts" in why] == [
        1255,
        1689,
        1951,
        1953,
        2037,
    ]


@pytest.mark.parametrize("name, count", [("train", 7473), ("test", 1319)])
def test_every_real_gsm8k_answer_is_a_number(name, count):
    problems = read_prompts(sample(f"gsm8k/{name}.jsonl"))
    assert len(problems) == count and {p["check"] for p in problems} == {"number"}
    assert all(float(p["answer"]) == int(p["answer"]) for p in problems)


def test_the_real_alpaca_instructions_are_prompts_too():
    prompts, chats = (read(sample("instructions.json")) for read in (read_prompts, read_chats))
    assert [p["messages"] for p in prompts] == [chat["messages"][:-1] for chat in chats]
