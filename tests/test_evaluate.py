"""Test items as training reads problems; samples, votes and templates; tables that say of how many."""

import json
from pathlib import Path

import pytest

from nanollm import chat, effects, evaluate
from nanollm.config import UserError, parse
from nanollm.formats import read_examples, read_prompts
from nanollm.hub import save_model
from nanollm.metrics import counts, majority, sampled_metrics, table
from nanollm.report import Section
from nanollm.rewards import is_right
from nanollm.rollouts import TEMPLATES, prompt_of, template_of
from tests.test_train import refused


def write(path, *records):
    Path(path).write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def here(tmp_path, monkeypatch, random_model, tokenizer):
    """An empty folder with a model of random weights in runs/model."""
    monkeypatch.chdir(tmp_path)
    save_model(random_model(max_position_embeddings=160), tokenizer, "runs/model")
    return tmp_path


def evaluated(*flags):
    """What evaluate writes of runs/model."""
    flags = ["runs/model", "--dtype", "fp32", "--max_new_tokens", "6", "--out", "e.json", *flags]
    evaluate.main(parse(evaluate.Config, None, flags))
    return json.loads(Path("e.json").read_text())


def watched(monkeypatch):
    """(prompts, settings) of each batch that evaluate generates from now on."""
    calls, generate = [], evaluate.generate

    def watch(model, prompts, *rest, **settings):
        calls.append((prompts, settings))
        return generate(model, prompts, *rest, **settings)

    monkeypatch.setattr(evaluate, "generate", watch)
    return calls


# --- items ---------------------------------------------------------------------------------------

ASKED = [{"role": "user", "content": "How many?"}]
HAND_MADE = [
    {"prompt": "How many?", "answer": "62"},
    {"prompt": "How many?", "answer": 62},
    {"prompt": "How many?", "answer": " 1,062 ", "check": "exact"},
    {"prompt": "How many?", "answer": "two of them"},
    {"prompt": ASKED, "answer": "62"},
    {"messages": [*ASKED, {"role": "assistant", "content": "62."}], "answer": "62"},
    {"question": "How many?", "answer": "60 + 2\n#### 62"},
]


@pytest.mark.parametrize("record", HAND_MADE)
def test_a_test_example_is_what_training_reads(record, tmp_path):
    path = write(tmp_path / "items.jsonl", record)
    (example,), (prompt,) = read_examples(path), read_prompts(path)
    assert example == {"task": "all", **prompt} and example["messages"] == ASKED
    assert example["answer"] == example["answer"].strip()


def test_a_number_is_compared_as_a_number(tmp_path):
    (example,) = read_examples(
        write(tmp_path / "items.jsonl", {"prompt": "How many?", "answer": "62"})
    )
    assert is_right(example, "There are 62.") and not is_right(example, "Of 62 only 61.")


@pytest.mark.parametrize(
    "record, sentence",
    [
        ({"prompt": "a", "answer": ""}, '"answer" must be text or a number'),
        ({"prompt": "a"}, 'needs an "answer"'),
        ({"messages": ["hi"], "answer": "b"}, 'message 0 has no "role"'),
        ({"prompt": "a", "answer": "b", "check": "regex"}, "unknown check 'regex'"),
    ],
)
def test_a_bad_example_is_refused_with_its_line(record, sentence, tmp_path):
    path = write(tmp_path / "items.jsonl", {"prompt": "a", "answer": "b"}, record)
    with pytest.raises(UserError, match=f"items.jsonl, line 2: .*{sentence}"):
        read_examples(path)


def test_a_task_may_be_called_cloze(here, random_model, tokenizer):
    write("items.jsonl", {"messages": ASKED, "answer": "62", "task": "cloze"})
    (example,) = read_examples("items.jsonl")
    assert prompt_of(example, None, tokenizer) == TEMPLATES["chat"](example, tokenizer)
    assert is_right(example, "It is 62.")
    found = evaluated("--data", "items.jsonl", "--samples", "2")
    assert found["sampled"]["cloze"]["n"] == 1


def test_of_prompts_too_long_the_longest_is_named(here, capsys):
    texts = "short", "x" * 160, "y" * 170
    write("items.jsonl", *({"prompt": text, "answer": "1"} for text in texts))
    said = refused(capsys, evaluate, "runs/model", "--data", "items.jsonl", "--device", "cpu")
    assert "2 of 3 prompts" in said and repr("y" * 40) in said


def test_a_model_without_eyes_is_refused_before_images_are_painted(here, capsys):
    for name in "images", "combos", "counting":
        said = refused(capsys, evaluate, "runs/model", "--data", name, "--device", "cpu")
        assert "this model reads text only" in said
    assert not Path("data").exists()


# --- samples and votes ---------------------------------------------------------------------------

CLOZE = {"prompt": "Nora is a", "answer": " miller", "task": "cloze"}


def test_the_village_is_evaluated_with_samples(here, monkeypatch):
    monkeypatch.setattr(evaluate, "village.of_run", lambda folder: Path("village"))
    Path("village").mkdir()
    write("village/cloze.jsonl", CLOZE)
    write("village/sft_test.jsonl", {"messages": ASKED, "answer": "62", "task": "arithmetic"})
    write("village/corpus_val.jsonl", {"text": "Nora is a miller. " * 40})
    found = evaluated("--samples", "2")
    assert {name: row["n"] for name, row in found["sampled"].items()} == {
        "cloze": 1,
        "arithmetic": 1,
        "all": 2,
    }


def test_cloze_completions_vote_with_the_rest_of_their_sentence():
    completions = " baker. So it is.", " miller. She is old.", " miller. She has a hen."
    assert majority(CLOZE, completions) == completions[1]
    assert sampled_metrics([CLOZE], [completions[0]], completions)["cloze"] == {
        "n": 1,
        "k": 3,
        "greedy": 0.0,
        "sampled": 2 / 3,
        "maj": 1.0,
        "pass": 1.0,
    }


@pytest.mark.parametrize(
    "flags, temperatures",
    [
        ([], [0.0]),
        (["--temperature", "0.5"], [0.5]),
        (["--samples", "2"], [0.0, 1.0]),
        (["--samples", "2", "--temperature", "0.5"], [0.0, 0.5]),
    ],
)
def test_with_samples_the_temperature_is_theirs_alone(flags, temperatures, here, monkeypatch):
    write("items.jsonl", {"messages": ASKED, "answer": "62"})
    calls = watched(monkeypatch)
    evaluated("--data", "items.jsonl", *flags)
    assert [settings["temperature"] for _, settings in calls] == temperatures


PREFERENCES = "goes with questions that have an answer, not with --data preferences"


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--data", "preferences", "--samples", 8], f"--samples {PREFERENCES}"),
        (["--data", "preferences", "--temperature", 0.5], f"--temperature {PREFERENCES}"),
        (["--data", "preferences", "--begin", "<think>"], f"--begin {PREFERENCES}"),
        (["--samples", 8, "--temperature", 0], "--temperature 0 makes all --samples alike"),
        (["--temperature", "inf"], "--temperature must be finite"),
        (["--out", "."], "--out . is a folder"),
    ],
)
def test_flags_that_could_mean_nothing_are_refused(flags, sentence, capsys):
    assert sentence in refused(capsys, evaluate, *flags)


# --- templates -----------------------------------------------------------------------------------


def test_a_run_is_asked_as_it_was_trained(here, monkeypatch, tokenizer, capsys):
    write("items.jsonl", {"messages": ASKED, "answer": "62"})
    (example,), calls = read_examples("items.jsonl"), watched(monkeypatch)
    evaluated("--data", "items.jsonl")
    write("runs/model/train_config.json", {"template": "zero"})
    evaluated("--data", "items.jsonl")
    assert "by the template zero" in capsys.readouterr().out
    evaluated("--data", "items.jsonl", "--template", "think")
    asked = [prompts[0] for prompts, _ in calls]
    assert asked == [TEMPLATES[name](example, tokenizer) for name in ("chat", "zero", "think")]


def test_a_run_that_was_not_trained_on_a_template_chats(here):
    assert template_of("runs/model") == template_of("runs/none") == "chat"
    write("runs/model/train_config.json", {"template": "riddle"})
    assert template_of("runs/model") == "chat"


def test_chat_says_that_a_model_has_not_learnt_to(here, capsys):
    flags = ["runs/model", "--prompt", "Hi", "--dtype", "fp32", "--max_new_tokens", "4"]
    chat.main(parse(chat.Config, None, flags))
    assert not capsys.readouterr().err
    write("runs/model/train_config.json", {"template": "zero"})
    chat.main(parse(chat.Config, None, flags))
    assert "was trained with --template zero, not on chats" in capsys.readouterr().err


def test_chat_and_evaluate_let_an_answer_be_equally_long():
    """The village's longest worked solution has 108 tokens."""
    assert chat.Config().max_new_tokens == evaluate.Config().max_new_tokens == 128


# --- tables --------------------------------------------------------------------------------------


def cells(*numbers):
    return [n and {"accuracy": 0.5, "n": n} for n in numbers]


@pytest.mark.parametrize(
    "numbers, said",
    [((64,), "64"), ((64, 64), "64"), ((64, None), "64"), ((64, 64, 200), "64, 64, 200"),
     ((64, None, 200), "64, -, 200")],
)  # fmt: skip
def test_a_row_says_of_how_many_examples_each_cell_is(numbers, said):
    assert counts(cells(*numbers)) == said


def test_both_tables_say_so():
    before, after = ({"sum": cell} for cell in cells(64, 200))
    assert table({"before": before, "after": after}).endswith("64, 200")
    section = Section("Tools")
    effects.accuracy_table(section, "questions", {"sum": "sums"}, before=before, with_tools=after)
    [(_, (header, rows))] = section.parts
    assert header == ["questions", "before", "with tools", "n"]
    assert rows == [["sums", "50.0%", "50.0%", "64, 200"]]
