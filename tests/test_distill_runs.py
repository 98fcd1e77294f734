"""Distillation, run for real on small data: what it learns, resume, share, refuse."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import distill
import train_sft
from nanollm.config import parse
from nanollm.formats import read_chats
from nanollm.hub import load_model
from nanollm.run import read_metrics
from tests.test_train import kill_and_resume, moments_of_two_processes, pretrain, refused, same, sft

WORDS = "owl fox hen cow pig bee ant elk yak emu eel cod bat rat cat dog".split()
OWN = (
    "--dtype fp32 --device cpu --teacher runs/sft --data lessons.jsonl --test_data test.jsonl "
    "--labels 4 --max_new_tokens 24 --context 48 --layers 1 --channels 32 --heads 2 --mlp 64 "
    "--batch_size 4 --cache_top_k 8 --eval_every 400 --sample_temperature 0.5 --temperature 1"
).split()
FAST = "--muon_lr 0.02 --lr 0.01".split()
METHODS = ("soft", "hard", "both", "on_policy", "step_by_step", "compress", "labels")


def spelt(word):
    return f"<think>{'-'.join(word)}</think>{word.upper()}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a teacher that spells sixteen words and then says them in capitals."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("text.txt").write_text("the cat sat on the mat. the dog sat on the log. " * 150)
        turns = [
            [{"role": "user", "content": f"say {w}"}, {"role": "assistant", "content": spelt(w)}]
            for w in WORDS
        ]
        known = [{"answer": w.upper(), "check": "contains"} for w in WORDS]
        lessons = [{"messages": t, **each} for t, each in zip(turns, known)]
        files = {
            "chats": [{"messages": t} for t in turns * 4],
            "lessons": [*lessons, lessons[5]],  # the last is held out, to measure the loss
            "test": [{"messages": t[:1], **each} for t, each in zip(turns, known)],
        }
        for name, records in files.items():
            Path(f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        pretrain("--steps", 40, "--eval_every", 40, "--context", 64, "--layers", 2)
        sft("--steps", 300, "--eval_every", 300, "--replay", 0, *FAST)
    return folder


@pytest.fixture
def here(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return trained


def distil(*flags, out="runs/distill"):
    arguments = [*OWN, "--out", out, *map(str, flags)]
    distill.main(parse(distill.Config, distill.PRESETS, arguments))
    return json.loads(Path(out, "result.json").read_text())


def right(result, when="after"):
    return result[when]["figures"]["all"]["greedy"]


# --- learning ------------------------------------------------------------------------------------


def test_a_student_says_words_that_only_the_teacher_knows(here):
    """Four of the sixteen words have a label, so labels alone can't give more than a quarter."""
    labels = distil("--method", "labels", "--steps", 150)
    assert right(labels, "teacher") == 1.0 and right(labels) <= 0.3
    taught = distil("--method", "hard", "--steps", 150, "--samples", 2)
    assert right(taught) >= 0.9


@pytest.mark.parametrize("method", METHODS)
def test_every_method_lowers_its_loss(method, here):
    result = distil("--method", method, "--steps", 40, "--on_policy_start", 0.25)
    metrics = [m for m in read_metrics("runs/distill") if "loss" in m]
    assert metrics[-1]["loss"] < 0.7 * metrics[0]["loss"]
    if method not in ("labels", "step_by_step"):  # those have not seen the held-out word
        assert result["after"]["val_loss"] < result["before"]["val_loss"]
    assert result["method"] == method and Path("runs/distill/curves.svg").exists()


@pytest.mark.parametrize("beta", [0, 0.5, 1])
def test_every_divergence_draws_the_student_to_the_teacher(beta, here):
    flags = ["--jsd_beta", beta, "--alpha", 1, "--cache_top_k", 0, "--steps", 60]
    result = distil(*flags)
    assert result["after"]["val_loss"] < 0.6 * result["before"]["val_loss"]


def test_a_cache_of_the_most_likely_tokens_trains_almost_as_well_as_all(here):
    for K in (0, 8):
        assert right(distil("--cache_top_k", K, "--steps", 150, "--samples", 2)) >= 0.9


def test_a_compressed_student_has_half_the_teachers_layers(here):
    result = distil("--method", "compress", "--steps", 30)
    student, _ = load_model("runs/distill")
    assert student.cfg.num_hidden_layers == 1 and student.cfg.hidden_size == 32
    assert result["student_parameters"] < result["teacher_parameters"]


def test_the_teachers_answers_are_dialogues_that_fine_tuning_reads(here, capsys):
    distil("--method", "hard", "--steps", 2, "--samples", 3)
    said = capsys.readouterr().out
    kept = read_chats("runs/distill/teacher.jsonl")
    assert f"{len(kept)} kept" in said and "found wrong by the checker" in said
    assert all(chat["right"] for chat in kept)
    flags = "--init runs/pretrain --data runs/distill/teacher.jsonl --val_data chats.jsonl".split()
    more = ["--steps", 1, "--replay_data", "text.txt", "--context", 48, "--out", "runs/again"]
    train_sft.main(parse(train_sft.Config, train_sft.PRESETS, [*flags, *map(str, more)]))


def test_it_is_said_how_many_answers_have_a_rationale(here, capsys):
    distil("--method", "step_by_step", "--steps", 1)
    assert "4 of the teacher's 4 answers that were kept have a rationale" in capsys.readouterr().out


def test_a_student_that_exists_goes_on_from_where_it_is(here):
    distil("--steps", 60, out="runs/first")
    result = distil("--init", "runs/first", "--steps", 2)
    first = json.loads(Path("runs/first/result.json").read_text())
    assert result["before"]["val_loss"] == pytest.approx(first["after"]["val_loss"])


def test_a_comparison_makes_a_table_and_continues_where_it_was(here, capsys):
    flags = ["--compare", "soft,hard,labels", "--seeds", 2, "--steps", 4, "--eval_every", 2]
    arguments = [*OWN, *map(str, flags), "--out", "runs/table"]
    distill.main(parse(distill.Config, distill.PRESETS, arguments))
    table = json.loads(Path("runs/table/table.json").read_text())
    assert [row["student"] for row in table] == ["teacher", "labels", "soft", "hard"]
    assert table[0]["all"] == "100.0%" and "| soft |" in Path("runs/table/table.md").read_text()
    assert capsys.readouterr().out.count("teacher answers 12 prompts") == 1  # for all students
    shutil.rmtree("runs/table/hard_1")
    again = ["--resume", "--out", "runs/table"]
    distill.main(parse(distill.Config, distill.PRESETS, again))
    said = capsys.readouterr().out
    assert "--- hard_1" in said and "--- soft_1" not in said and "teacher answers 12" not in said
    again = json.loads(Path("runs/table/table.json").read_text())
    assert [row["all"] for row in again] == [row["all"] for row in table]


# --- kill and resume, several processes ----------------------------------------------------------


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(here):
    """With on_policy, which has most to remember: cache, noise, whose turn it is to answer."""
    flags = ["--method", "on_policy", "--on_policy_start", "0.2", "--steps", "24"]
    flags += ["--eval_every", "4"]
    distil(*flags, out="runs/whole")
    kill_and_resume("distill.py", [*OWN, *flags], "runs/killed", (4, 8, 12, 16, 20))
    states = [torch.load(f"runs/{n}/state.pt", weights_only=True) for n in ("whole", "killed")]
    assert same(*(state["model"] for state in states))
    losses = [
        [m["loss"] for m in read_metrics(f"runs/{n}") if "loss" in m] for n in ("whole", "killed")
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("method", ["on_policy", "both"])
def test_two_processes_give_the_gradients_of_one(method, here):
    """With on_policy of a step on given answers and one on the student's own: at a learning rate of
    zero the optimizer's first moments are a weighted sum of their gradients.
    """
    flags = [*OWN, "--method", method, "--steps", "2", "--grad_clip", "0", "--on_policy_share", "1"]
    flags += ["--optimizer", "adamw", "--lr", "0"]
    moments = moments_of_two_processes("distill.py", flags, "runs/one", "runs/two")
    assert len(moments[0]) > 5
    for a, b in zip(*moments):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)


# --- bad input -----------------------------------------------------------------------------------

REFUSED = {
    "prompts longer than the context": (["--max_new_tokens", 60], "don't fit the model's context"),
    "answers longer than the rows": (["--context", 8], "raise --context"),
    "a student with another tokenizer": (["--init", "runs/other"], "another tokenizer"),
    "a teacher that isn't there": (["--teacher", "runs/none"], "runs/none"),
    "no half of one layer": (["--method", "compress", "--teacher", "runs/other"], "has one layer"),
    "labels that aren't there": (["--data", "prompts.jsonl"], "record 1 has no label"),
    "a cache of everything": (["--cache_top_k", 1000], "must be below the vocabulary"),
    "alpha is a share": (["--alpha", 1.5], "--alpha lies between 0 and 1"),
    "no temperature": (["--temperature", 0], "--temperature lies from 0.01 on"),
    "heads that don't divide": (["--heads", 5], "--heads 5"),
    "an unknown row of the table": (["--compare", "labels,osmosis"], "--compare osmosis"),
    "answers that don't end": (
        ["--method", "step_by_step", "--max_new_tokens", 2],
        "raise --max_new_tokens 2",
    ),
    "a comparison that can't be made": (
        ["--compare", "answers,step_by_step", "--max_new_tokens", 2],
        "raise --max_new_tokens 2",
    ),
    "dialogues without rationales": (
        ["--method", "step_by_step", "--answers", "plain.jsonl"],
        "gives no rationale, <think>...</think>",
    ),
    "steps that the village's dialogues don't have": (
        ["--compare", "labels,answers", "--data", "village"],
        "--compare answers wants problems that are worked step by step",
    ),
    "an unknown method": (["--method", "osmosis"], "--method"),
    "itself": (["--out", "runs/sft"], "would replace"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_distillation_cannot_do_is_refused(name, here, capsys):
    Path("prompts.jsonl").write_text('{"prompt": "say owl"}\n' * 40)
    turns = [{"role": "user", "content": "say owl"}, {"role": "assistant", "content": "OWL"}]
    Path("plain.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    if not Path("runs/other").exists():
        flags = ["--steps", 1, "--context", 64, "--tokenizer", "train", "--vocab_size", 280]
        pretrain(*flags, out="runs/other")
    capsys.readouterr()
    flags, sentence = REFUSED[name]
    said = refused(capsys, distill, *OWN, "--out", "runs/refused", *flags)
    assert sentence in said and not Path("runs/refused").exists()
