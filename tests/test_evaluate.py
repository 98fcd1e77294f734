"""The command evaluate: examples as training reads them, samples, votes, tables."""

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
from helpers import refused, turns

from nanollm import evaluate, metrics
from nanollm.config import parse
from nanollm.formats import write_jsonl
from nanollm.hub import load_model, save_model
from nanollm.metrics import accuracy_by_task, accuracy_table, majority, sampled_metrics, table
from nanollm.records import read_examples
from nanollm.rollouts import TEMPLATES, prompt_of, template_of


def write(path, *records):
    write_jsonl(path, records)
    return path


@pytest.fixture
def here(tmp_path, monkeypatch, random_model, tokenizer):
    """An empty directory with a model of random weights in runs/model."""
    monkeypatch.chdir(tmp_path)
    save_model(random_model(max_position_embeddings=160), tokenizer, "runs/model")
    return tmp_path


def evaluated(*flags):
    """What evaluate writes of runs/model."""
    flags = ["runs/model", "--dtype", "fp32", "--max_new_tokens", "6", "--out", "e.json", *flags]
    evaluate.main(parse(evaluate.Config, None, flags))
    return json.loads(Path("e.json").read_text())


@pytest.fixture
def complete(monkeypatch):
    """What evaluate samples with, watched."""
    complete = Mock(wraps=metrics.complete)
    monkeypatch.setattr(metrics, "complete", complete)
    return complete


# --- examples ------------------------------------------------------------------------------------

ASKED = turns("How many?")


def test_a_task_may_be_called_cloze(here, tokenizer):
    write("e.jsonl", {"messages": ASKED, "answer": "62", "task": "cloze"})
    (example,) = read_examples("e.jsonl")
    assert prompt_of(example, None, tokenizer) == TEMPLATES["chat"](example, tokenizer)
    assert evaluated("--data", "e.jsonl", "--samples", "2")["sampled"]["cloze"]["n"] == 1


def test_what_evaluate_cannot_do_is_refused(here, capsys):
    texts = "short", "x" * 160, "y" * 170
    write("long.jsonl", *({"prompt": text, "answer": "1"} for text in texts))
    for flags, sentences in (
        (["--data", "long.jsonl"], ["2 of 3 records", "line 2, line 3): shorten or drop them"]),
        *((["--data", name], ["this model reads text only"]) for name in ("images", "combos")),
        (["--out", "."], ["--out . is a directory"]),
        (["--reward_model", "runs/rm"], ["go with --data preferences alone"]),
        (["--data", "tools", "--against", "runs/a"], ["go with --data preferences alone"]),
        (["--best_of", 4], ["--best_of needs a --reward_model"]),
    ):
        said = refused(capsys, evaluate, "runs/model", *flags)
        assert all(sentence in said for sentence in sentences), said
    assert not Path("data").exists()  # no image was painted


def test_a_question_that_does_not_fit_is_dropped_and_counted(here, capsys):
    write("long.jsonl", *({"prompt": text, "answer": "1"} for text in ("a", "b", "c " * 90)))
    assert evaluated("--data", "long.jsonl")["tasks"]["all"]["n"] == 2
    assert "1 of 3 records can't be used: no room for 1 more" in capsys.readouterr().out


def test_questions_for_tools_without_tools_are_answered_and_that_is_said(capsys):
    evaluate.check_flags(evaluate.Config(data="tools", tools=True))
    assert not capsys.readouterr().out
    evaluate.check_flags(evaluate.Config(data="tools"))
    assert "without --tools" in capsys.readouterr().out


# --- samples and votes ---------------------------------------------------------------------------

CLOZE = {"prompt": "Nora is a", "answer": " miller", "task": "cloze"}


def test_the_village_is_evaluated_with_samples(here, monkeypatch, capsys):
    monkeypatch.setattr(evaluate.village, "of_run", lambda folder: Path("village"))
    Path("village").mkdir()
    write("village/cloze.jsonl", CLOZE)
    write("village/sft_test.jsonl", {"messages": ASKED, "answer": "62", "task": "arithmetic"})
    write("village/corpus_val.jsonl", {"text": "Nora is a miller. " * 40})
    found = evaluated("--samples", "2")
    counts = {name: row["n"] for name, row in found["sampled"].items()}
    assert counts == {"cloze": 1, "arithmetic": 1, "all": 2}
    assert [each["name"] for each in found["effects"]] == ["cloze", "arithmetic"]
    assert "maj@2 and pass@2" in capsys.readouterr().out


def test_cloze_completions_vote_with_the_rest_of_their_sentence():
    completions = " baker. So it is.", " miller. She is old.", " miller. She has a hen."
    assert majority(CLOZE, completions) == completions[1]
    found = sampled_metrics([CLOZE], [completions[0]], completions)["cloze"]
    assert found == {"n": 1, "k": 3, "accuracy": 0, "sampled": 2 / 3, "maj": 1, "pass": 1}


@pytest.mark.parametrize(
    "flags, temperatures",
    [
        ([], [0.0]),
        (["--temperature", "0.5"], [0.5]),
        (["--samples", "2"], [0.0, 1.0]),
        (["--samples", "2", "--temperature", "0.5"], [0.0, 0.5]),
    ],
)
def test_with_samples_the_temperature_is_theirs_alone(flags, temperatures, here, complete):
    write("e.jsonl", {"messages": ASKED, "answer": "62"})
    evaluated("--data", "e.jsonl", *flags)
    assert [call.kwargs["temperature"] for call in complete.call_args_list] == temperatures


def test_a_completion_can_be_made_to_begin_as_asked(here):
    model, tokenizer = load_model("runs/model")
    write("e.jsonl", {"messages": ASKED, "answer": "62"})
    begun = accuracy_by_task(model, tokenizer, read_examples("e.jsonl"), 4, begin="b")[1]
    assert all(completion.startswith("b") for completion in begun)


# --- templates -----------------------------------------------------------------------------------


def test_a_run_is_asked_as_it_was_trained(here, complete, tokenizer, capsys):
    write("e.jsonl", {"messages": ASKED, "answer": "62"})
    (example,) = read_examples("e.jsonl")
    assert template_of("runs/model") == template_of("runs/none") == "chat"
    evaluated("--data", "e.jsonl")
    write("runs/model/train_config.json", {"template": "zero"})
    evaluated("--data", "e.jsonl")
    assert "by the template zero" in capsys.readouterr().out
    evaluated("--data", "e.jsonl", "--template", "think")
    asked = [call.args[2][0] for call in complete.call_args_list]
    assert asked == [TEMPLATES[name](example, tokenizer) for name in ("chat", "zero", "think")]
    write("runs/model/train_config.json", {"template": "riddle"})
    assert template_of("runs/model") == "chat"


# --- tables --------------------------------------------------------------------------------------


def test_a_table_lines_up_and_shows_shares_in_percent():
    said = table(["task", "share", "n"], [["sums", 0.5, 64], ["facts", None, 200]])
    assert said == "task   share    n\nsums   50.0%   64\nfacts      -  200"


def test_a_row_says_of_how_many_examples_its_cells_are():
    before = {"sum": {"accuracy": 0.5, "n": 64}, "more": {"accuracy": 1.0, "n": 3}}
    after = {"sum": {"accuracy": 1.0, "n": 200}}
    lines = accuracy_table({"before": before, "after": after}).splitlines()
    assert lines[1].split() == ["sum", "50.0%", "100.0%", "64,", "200"]
    assert lines[2].split() == ["more", "100.0%", "-", "3"]
