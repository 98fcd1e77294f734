"""Annotating: what a person is shown, what is kept of the choices, and where it goes on."""

import io
import re
import sys
from pathlib import Path

import pytest
from helpers import Typed, refused, turns
from scripted_person import WORTH, answers

from nanollm import annotate
from nanollm.formats import read_records, write_jsonl
from nanollm.hub import save_model
from nanollm.records import read_preferences

NAMES = "owl fox hen cow pig".split()


@pytest.fixture
def person(random_model, tokenizer, tmp_path, monkeypatch):
    """person(keys) answers about NAMES, the model's two completions to each being "owl one" and
    "owl two", or what `says` has for it; returns the lines of the file of choices.
    """
    monkeypatch.chdir(tmp_path)
    save_model(random_model(), tokenizer, "model")
    write_jsonl("prompts.jsonl", [{"prompt": name} for name in NAMES])

    def person(keys, says={}, stdin=io.StringIO, **settings):  # noqa: B006
        def sample_completions(model, tokenizer, prompts, room, samples, generator):
            said = (tokenizer.decode(ids) for ids in prompts)
            names = [next(name for name in NAMES if name in text) for text in said]
            texts = [says.get(name, (f"{name} one", f"{name} two")) for name in names]
            ids = (tokenizer.encode(text) for both in texts for text in both)
            return [i if i[-1:] == tokenizer.encode("~") else [*i, tokenizer.end_id] for i in ids]

        monkeypatch.setattr(annotate, "sample_completions", sample_completions)
        monkeypatch.setattr("sys.stdin", stdin(keys))
        settings = {"prompts": "prompts.jsonl", "dtype": "fp32", "device": "cpu", **settings}
        annotate.main(annotate.Config(model="model", **settings))
        path = Path("choices.jsonl")
        return read_records(path) if path.exists() else []

    return person


def test_choices_are_kept_as_they_were_shown_and_another_call_goes_on(person, capsys):
    first = [
        {"prompt": "owl", "a": "owl one", "b": "owl two", "label": "a"},
        {"prompt": "fox", "a": "fox one", "b": "fox two", "label": "b"},
    ]
    assert person("1\nno\n\n 2 \ns\nq\n1\n") == first
    shown = capsys.readouterr().out
    assert "[user] owl\n\n1  owl one\n\n2  owl two\n" in shown
    assert shown.count("s: skip") == 6 and "choices.jsonl: 2 choices" in shown
    assert [each["prompt"] for each in person("1\n1\n1\n")] == NAMES  # the skipped one is asked
    capsys.readouterr()
    assert len(person("1\n")) == 5 and "s: skip" not in capsys.readouterr().out
    assert [each["completions"] for each in read_preferences("choices.jsonl")][:2] == [
        ["owl one", "owl two"],
        ["fox two", "fox one"],
    ]


@pytest.mark.parametrize("keys, stdin", [("1\n^C\n", Typed), ("1\n", io.StringIO)])
def test_ctrl_c_and_the_end_of_a_pipe_keep_what_was_chosen(keys, stdin, person, capsys):
    assert len(person(keys, stdin=stdin)) == 1
    assert "choices.jsonl: 1 choices" in capsys.readouterr().out


def test_what_leaves_nothing_to_choose_is_not_shown(person):
    says = {"owl": ("same", " same"), "fox": ("", "text"), "hen": ("cut short~", "text")}
    assert [each["prompt"] for each in person("1\n1\n1\n", says)] == ["cow", "pig"]


def test_a_dialogue_keeps_its_turns(person, capsys):
    before = turns("hello", "good day", "owl")
    write_jsonl("prompts.jsonl", [{"messages": before}])
    [choice] = person("2\n")
    assert choice["prompt"] == before
    assert "[user] hello\n[assistant] good day\n[user] owl\n" in capsys.readouterr().out
    assert person("2\n") == [choice]  # which is known again


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--out", "model"], "is a directory"),
        (["--out", "prompts.jsonl"], "would replace"),
        (["--out", "other.jsonl"], 'it needs "chosen" and'),
        (["--prompts", "none.jsonl"], "does not exist"),
        (["--prompts", "images.jsonl"], "has images"),
        (["--prompts", "long.jsonl"], "no room"),
    ],
)
def test_refusals(flags, said, person, capsys, monkeypatch):
    person("q\n")
    write_jsonl("other.jsonl", [{"text": "not of preferences"}])
    write_jsonl("images.jsonl", [{"prompt": "<image>\nowl", "image": "model/config.json"}])
    write_jsonl("long.jsonl", [{"prompt": "owl " * 40}])
    before = Path("other.jsonl").read_bytes()
    monkeypatch.setattr("sys.stdin", io.StringIO("1\n"))
    flags = ["model", "--dtype", "fp32", "--prompts", "prompts.jsonl", *flags]
    assert said in refused(capsys, annotate, *flags)
    assert not Path("choices.jsonl").exists() and Path("other.jsonl").read_bytes() == before


def test_the_scripted_person_presses_the_key_of_its_taste():
    show = "print('\\n[user] q\\n\\n1  {}\\n\\n2  {}\\n'); key = input('q: end > '); print(key)"
    pairs = [("Gladly! a b", "a"), ("a", "a I hope that helps."), ("a", "b"), ("Gladly! a", "a")]
    program = "\n".join(show.format(*pair) for pair in pairs) + "\ninput('q: end > ')"
    for taste, keys in {"courteous": "12s1", "shorter": "21s2"}.items():
        said = answers([sys.executable, "-c", program], WORTH[taste], 3)
        assert "".join(re.findall("q: end > (.)", said)) == keys
