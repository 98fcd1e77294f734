"""--adapter in every script, and lora.py: what is learnt, saved, opened, resumed and refused."""

import io
import json
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
from helpers import (
    ON_CPU,
    TINY,
    assert_resumes,
    close,
    in_new_folder,
    moments_of_two_processes,
    refused,
    result,
    same,
    say,
)
from helpers import run as run_script

from nanollm import chat, evaluate, hub, safetensors
from nanollm.config import parse
from nanollm.formats import write_jsonl
from nanollm.hub import load_model, load_scalar
from nanollm.metrics import accuracy_by_task
from nanollm.peft.adapters import METHODS
from nanollm.records import read_examples

WORDS = "owl fox hen cow pig bee ant elk".split()
LORA = "--adapter lora --rank 4 --alpha 8".split()
SCRIPTS = {
    "train_sft": "--init runs/pretrain --context 48 --replay_data text.txt --data chats.jsonl",
    "train_rm": "--init runs/sft --data pairs.jsonl",
    "train_dpo": "--init runs/sft --data pairs.jsonl --eval_prompts 4",
    "train_ppo": "--init runs/sft --data problems.jsonl --max_new_tokens 12 --eval_prompts 2 "
    "--reward_model runs/rm",
    "train_grpo": "--init runs/sft --data problems.jsonl --max_new_tokens 12 --samples 4 "
    "--accumulate 2 --eval_problems 4 --eval_samples 2 --kl_coef 0.1",
    "lora": "--init runs/sft --data no.jsonl --test_data no_test.jsonl --other_data say_test.jsonl "
    "--other_text text.txt --context 48 --virtual_tokens 4 --hidden 16",
}


def flags_of(script, *flags):
    return [*ON_CPU, *SCRIPTS[script].split(), *map(str, flags)]


def run(script, *flags, out):
    return run_script(import_module(script), *flags_of(script, *flags), out=out)


def turned_down(capsys, script, *flags):
    """What a script says that refuses these flags."""
    flags = flags_of(script, "--out", "runs/refused", *flags)
    return refused(capsys, import_module(script), *flags)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a model fine-tuned to repeat a word, an adapter on it, and a reward model."""
    with in_new_folder(tmp_path_factory) as folder:
        words = WORDS * 6
        test = {"check": "exact", "task": "say"}
        files = {
            "chats": [say(w, w + " please" * (i // 8 % 2)) for i, w in enumerate(words)],
            "no": [say(w, "no") for w in words],
            "pairs": [
                {"prompt": f"say {w}", "chosen": f"{w} please", "rejected": w} for w in words
            ],
            "problems": [{"prompt": f"say {w}", "answer": "please"} for w in words],
            "no_test": [{"prompt": f"say {w}", "answer": "no", **test} for w in WORDS],
            "say_test": [{"prompt": f"say {w}", "answer": "please", **test} for w in WORDS],
        }
        for name, records in files.items():
            write_jsonl(f"{name}.jsonl", records)
        steps = ["--steps", 40, "--eval_every", 40]
        run_script(import_module("train_pretrain"), *TINY, *steps, out="runs/pretrain")
        run("train_sft", "--steps", 200, "--eval_every", 200, "--replay", 0, out="runs/sft")
        run("train_rm", "--steps", 10, "--eval_every", 10, out="runs/rm")
        run("train_sft", *LORA, "--steps", 4, "--eval_every", 4, out="runs/lora")
    return folder


# --- what is trained and saved -------------------------------------------------------------------


@pytest.mark.parametrize("script, method", zip(SCRIPTS, ["dora", "qlora"] * 3))
def test_the_adapter_alone_is_saved_and_opens_with_its_base(script, method, here):
    out = f"runs/{method}_{script}"
    flags = ["--adapter", method, "--rank", 4, "--alpha", 8, "--steps", 3, "--eval_every", 3]
    run(script, *flags, out=out)
    names = {path.name for path in Path(out).iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert not {"model.safetensors", "config.json"} & names
    tensors = safetensors.load_file(f"{out}/adapter_model.safetensors")
    head = {"base_model.model.score.weight"} if script == "train_rm" else set()
    assert head == {name for name in tensors if ".lora_" not in name}
    moved = [t for name, t in tensors.items() if name.endswith("lora_B.weight")]
    assert all(t.abs().max() > 0 for t in moved)
    state = torch.load(f"{out}/state.pt", weights_only=True)["model"]
    beside = [name for name in state if ".lora_" not in name]
    assert all("score" in name or "value_head" in name for name in beside)
    tokens, load = torch.arange(12)[None], load_scalar if script == "train_rm" else load_model
    base = "runs/pretrain" if script == "train_sft" else "runs/sft"
    assert not torch.equal(load(out)[0](tokens), load(base)[0](tokens))


def test_the_reference_is_the_base_at_first_and_the_base_stays_as_it_was(here):
    before = Path("runs/sft/model.safetensors").read_bytes()
    losses = run("train_dpo", *LORA, "--steps", 2, "--nll_coef", 0, out="runs/dpo")
    assert losses[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    first = [m for m in run("train_grpo", *LORA, "--steps", 1, out="runs/grpo") if "kl" in m]
    assert first[0]["kl"] == 0.0
    assert Path("runs/sft/model.safetensors").read_bytes() == before


# --- lora.py -------------------------------------------------------------------------------------

RATES = {"prefix": 0.02, "ptuning": 0.1, "prompt": 0.1, "none": 0.003}  # of the others: 0.02


@pytest.mark.parametrize("method", [*METHODS, "lora+prompt", "none"])
def test_every_method_learns_a_new_answer_and_what_it_saves_answers_so(method, here):
    out, rate = f"runs/new_{method}", RATES.get(method, 0.02)
    flags = ["--adapter", method, "--rank", 4, "--alpha", 8, "--lr", rate, "--warmup", 2]
    run("lora", *flags, "--steps", 120, "--eval_every", 120, out=out)
    found = result(out)
    before, after = found["before"], found["after"]
    assert before["accuracy"] < 0.3 and after["accuracy"] >= 0.95
    model, tokenizer = load_model(out)
    tasks, _ = accuracy_by_task(model, tokenizer, read_examples("no_test.jsonl"))
    assert tasks["say"]["accuracy"] == pytest.approx(after["accuracy"], abs=0.13)
    weights = "model.safetensors" if method == "none" else "adapter_model.safetensors"
    assert [path.name for path in Path(out).glob("*.safetensors")] == [weights]
    folders = [*Path(out).rglob(weights)]
    assert len(folders) == 1 + ("+" in method)
    all_parameters = sum(p.numel() for p in load_model("runs/sft")[0].parameters())
    assert (found["trained_parameters"] < all_parameters) == (method != "none")
    changes = [(before[key], after[key]) for key in ("accuracy", "elsewhere", "bits_per_byte")]
    assert [(each["before"], each["after"]) for each in found["effects"]] == changes


def test_each_method_has_rates_of_its_own_unless_they_are_given(here):
    def rates(*flags):
        run("lora", "--steps", 1, *flags, out="runs/rates")
        saved = json.loads(Path("runs/rates/train_config.json").read_text())
        return saved["lr"], saved["weight_decay"]

    assert rates() == (5e-3, 6.0)
    assert rates("--adapter", "prefix", "--lr", 1e-5) == (1e-5, 0.0)
    assert rates("--weight_decay", 0) == (5e-3, 0.0)


# --- where an adapter's folder may stand ---------------------------------------------------------


def test_an_adapters_folder_is_a_start_for_every_script_that_adds_no_other(here, capsys):
    steps = ["--steps", 1, "--eval_every", 1]
    run("train_dpo", "--init", "runs/lora", *steps, out="runs/whole_again")
    assert Path("runs/whole_again/model.safetensors").exists()
    run("train_rm", "--init", "runs/lora", *steps, out="runs/scores")
    said = turned_down(capsys, "train_dpo", "--init", "runs/lora", *LORA)
    assert "runs/lora holds an adapter" in said and "export runs/lora --merge" in said
    hub.export(hub.Config("runs/lora", "runs/merged", merge=True))
    run("train_dpo", "--init", "runs/merged", *LORA, *steps, out="runs/second")
    config = json.loads(Path("runs/second/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(Path("runs/merged").resolve())
    tokens = torch.arange(12)[None]
    both, first = load_model("runs/second")[0], load_model("runs/lora")[0]
    assert both(tokens).sub(first(tokens)).abs().max() > 0


@pytest.mark.parametrize("method", ["bottleneck", "prefix"])
def test_what_cannot_be_merged_opens_attached_and_nothing_is_trained_on_it(method, here, capsys):
    out, flags = f"runs/{method}", ["--adapter", method, "--rank", 4, "--steps", 2]
    run("train_dpo", *flags, out=out)
    assert load_model(out)[0].adapter
    for more in ([], LORA):
        said = turned_down(capsys, "train_dpo", "--init", out, *more)
        assert "can't be merged into its base" in said
    run("train_rm", *flags, out=f"{out}_rm")
    assert load_scalar(f"{out}_rm")[0].adapter
    said = turned_down(capsys, "train_ppo", "--reward_model", f"{out}_rm")
    assert f"{out}_rm holds an adapter" in said  # of which the critic is a copy


def test_chat_and_evaluate_take_an_adapter(here, capsys):
    answers, found = [], []
    for model in (["runs/lora"], ["runs/pretrain", "--adapter", "runs/lora"]):
        flags = ["--prompt", "say owl", "--temperature", "0", "--dtype", "fp32"]
        chat.main(parse(chat.Config, None, [*model, *flags, "--max_new_tokens", "8"]))
        answers.append(capsys.readouterr().out)
        flags = ["--data", "problems.jsonl", "--dtype", "fp32", "--max_new_tokens", "8"]
        evaluate.main(parse(evaluate.Config, None, [*model, *flags]))
        found.append(json.loads(Path("runs/lora/evaluation.json").read_text())["tasks"])
        capsys.readouterr()
    assert answers[0] == answers[1] != "" and found[0] == found[1]


def test_several_adapters_are_chosen_by_name_in_one_session_and_one_batch(
    here, capsys, monkeypatch
):
    flags = ["--rank", 4, "--alpha", 8, "--lr", 0.02, "--warmup", 2, "--steps", 60]
    run("lora", *flags, "--eval_every", 60, out="runs/says-no")
    run("lora", *flags[:4], "--steps", 1, "--adapter", "dora", out="runs/hardly")
    words = ["--adapter", "runs/says-no,runs/hardly", "--dtype", "fp32", "--max_new_tokens", "8"]
    test = ["runs/sft", *words, "--data", "no_test.jsonl"]
    evaluate.main(parse(evaluate.Config, None, [*test, "--samples", "2"]))
    assert "say, says-no" in capsys.readouterr().out
    found, n = json.loads(Path("runs/sft/adapters.json").read_text()), len(WORDS)
    assert {name: each["n"] for name, each in found["tasks"].items()} == {
        "say, None": n, "say, says-no": n, "say, hardly": n,
    }  # fmt: skip
    right = [each["accuracy"] for each in found["tasks"].values()]
    assert right[1] >= 0.95 and right[0] == right[2] < 0.3
    assert found["sampled"]["say, says-no"]["sampled"] > 0.5 > found["sampled"]["say, None"]["pass"]
    lines = ["say owl", "/adapter none", "say owl", "/adapter hardly", "say owl"]
    lines = "\n/reset\n".join([*lines, "/adapter says-no", "say owl"])
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    chat.main(parse(chat.Config, None, ["runs/sft", *words, "--temperature", "0"]))
    no, alone, hardly, again = capsys.readouterr().out.splitlines()
    assert no == again == "no" != alone == hardly
    monkeypatch.setattr("sys.stdin", io.StringIO("/adapter gone\n"))
    assert "no adapter 'gone'; it has says-no, hardly" in refused(capsys, chat, "runs/sft", *words)
    monkeypatch.setattr("sys.stdin", io.StringIO("/adapter says-no\n"))
    assert "none beside the one merged" in refused(capsys, chat, "runs/says-no")
    said = refused(capsys, evaluate, "runs/sft", *words, "--data", "preferences")
    assert "takes one --adapter at a time" in said
    for folder in ("runs/lora", "runs/says-no"):
        twice = f"runs/says-no,{folder}"
        assert "error: " in refused(capsys, evaluate, "runs/sft", "--adapter", twice)


# --- kill and resume, several processes ----------------------------------------------------------


@pytest.mark.parametrize("script,method", [
    ("train_sft", "dora"), ("train_rm", "lora"), ("train_ppo", "lora"), ("train_grpo", "qlora"),
    ("lora", "prefix"), ("lora", "lora+prompt"),
])  # fmt: skip
def test_an_interrupted_and_resumed_run_equals_a_whole_one_bit_for_bit(script, method, here):
    flags = ["--adapter", method, "--rank", 4, "--steps", 6, "--eval_every", 2]
    folders = assert_resumes(script, flags_of(script, *flags), last=5)
    assert same(*(safetensors.load_file(f"{f}/adapter_model.safetensors") for f in folders))
    whole, killed = map(result, folders)
    assert whole["effects"] == killed["effects"]


@pytest.mark.parametrize("script,method", [("train_rm", "dora"), ("lora", "prompt")])
def test_two_processes_give_the_gradients_of_one(script, method, here):
    flags = ["--adapter", method, "--steps", 1, "--grad_clip", 0, "--eval_every", 1]
    where = f"runs/one_{script}", f"runs/two_{script}"
    moments = moments_of_two_processes(f"{script}.py", flags_of(script, *flags), *where)
    assert moments[0]
    for a, b in zip(*moments):
        close(a, b, 1e-6, 1e-3)


# --- bad input -----------------------------------------------------------------------------------

REFUSED = [
    *((script, [*LORA, "--rank", 0], "--rank must be at least 1, not 0") for script in SCRIPTS),
    *((s, ["--adapter", "lola"], "--adapter must be one of lora, dora") for s in SCRIPTS),
    *((s, ["--init", "runs/orphan"], "runs/gone, which is not a folder") for s in SCRIPTS),
    ("lora", ["--virtual_tokens", 0], "--virtual_tokens must be at least 1"),
    ("lora", ["--alpha", 0], "--alpha must be more than 0"),
    ("lora", ["--targets", "magic"], "--targets magic matches no linear layer"),
    ("lora", ["--test_data", "none"], "needs --test_data"),
    (
        "train_dpo",
        ["--init", "runs/lora", "--out", "runs/pretrain"],
        "pretrain, which the run reads",
    ),
]


def test_what_makes_no_adapter_and_an_adapter_without_its_base_are_refused(here, capsys):
    shutil.copytree("runs/lora", "runs/orphan", dirs_exist_ok=True)
    path = Path("runs/orphan/adapter_config.json")
    path.write_text(path.read_text().replace("runs/pretrain", "runs/gone"))
    for script, flags, sentence in REFUSED:
        assert sentence in turned_down(capsys, script, *flags)
        assert not Path("runs/refused").exists()


def test_an_adapter_of_another_base_is_refused(here, capsys):
    said = refused(capsys, chat, "runs/sft", "--adapter", "runs/lora")
    assert "trained on another base" in said
    said = refused(capsys, evaluate, "runs/pretrain", "--adapter", "runs/missing")
    assert "--adapter runs/missing" in said


def test_resuming_with_another_rank_is_refused_and_changes_nothing(here, capsys):
    run("train_sft", *LORA, "--steps", 1, out="runs/ranked")
    settings = Path("runs/ranked/train_config.json").read_text()
    said = turned_down(capsys, "train_sft", "--out", "runs/ranked", "--resume", "--rank", 2)
    assert "another shape" in said
    assert Path("runs/ranked/train_config.json").read_text() == settings  # resumes as before
