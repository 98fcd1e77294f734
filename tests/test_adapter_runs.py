"""--adapter in every script: what is trained, saved, opened, resumed, shared and refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import train_dpo
import train_grpo
import train_ppo
import train_rm
import train_sft
from nanollm import chat, evaluate, safetensors
from nanollm.batches import pack_chats
from nanollm.config import parse
from nanollm.hub import load_model, load_scalar
from nanollm.run import Run, read_metrics
from tests.test_train import (
    SFT,
    kill_and_resume,
    moments_of_two_processes,
    pretrain,
    refused,
    same,
    sft,
)

WORDS = "owl fox hen cow pig bee ant elk".split()
LORA = "--adapter lora --rank 4 --alpha 8".split()
COMMON = "--dtype fp32 --device cpu --init runs/sft --batch_size 4".split()
SCRIPTS = {
    "train_sft.py": (train_sft, [*SFT, "--init", "runs/pretrain"]),
    "train_rm.py": (train_rm, [*COMMON, "--data", "pairs.jsonl"]),
    "train_dpo.py": (train_dpo, [*COMMON, *"--data pairs.jsonl --eval_prompts 4".split()]),
    "train_ppo.py": (
        train_ppo,
        [*COMMON, *"--data problems.jsonl --max_new_tokens 12 --eval_prompts 2".split(),
         *"--reward_model runs/rm".split()],
    ),
    "train_grpo.py": (
        train_grpo,
        [*COMMON, *"--data problems.jsonl --max_new_tokens 12 --samples 4 --accumulate 2".split(),
         *"--eval_examples 4 --eval_samples 2 --kl_coef 0.1".split()],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a model fine-tuned to repeat a word, and a reward model."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("text.txt").write_text("the cat sat on the mat. the dog sat on the log. " * 150)
        turns = [
            [("user", f"say {w}"), ("assistant", w + " please" * (i // 8 % 2))]
            for i, w in enumerate(WORDS * 6)
        ]
        files = {
            "chats": [{"messages": [{"role": r, "content": c} for r, c in t]} for t in turns],
            "pairs": [{"prompt": f"say {w}", "chosen": f"{w} please", "rejected": w}
                      for w in WORDS * 6],
            "problems": [{"prompt": f"say {w}", "answer": "please"} for w in WORDS * 6],
            "no": [{"messages": [{"role": "user", "content": f"say {w}"},
                                    {"role": "assistant", "content": "no"}]}
                      for w in WORDS * 6],
        }  # fmt: skip
        for name, records in files.items():
            Path(f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        pretrain("--steps", 40, "--eval_every", 40, "--context", 64)
        sft("--steps", 200, "--eval_every", 200, "--replay", 0)
        run("train_rm.py", "--steps", 10, "--eval_every", 10, out="runs/rm")
        run("train_sft.py", *LORA, "--steps", 4, "--eval_every", 4, out="runs/lora")
    return folder


@pytest.fixture
def here(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return trained


def run(script, *flags, out):
    module, own = SCRIPTS[script]
    module.main(parse(module.Config, module.PRESETS, [*own, "--out", out, *map(str, flags)]))
    return read_metrics(out)


def loaded(script, folder):
    return (load_scalar if script == "train_rm.py" else load_model)(folder)[0]


# --- what is trained and saved -------------------------------------------------------------------


def test_fine_tuning_with_an_adapter_learns(here):
    flags = ["--init", "runs/sft", "--data", "no.jsonl", "--steps", 100, "--eval_every", 100]
    metrics = run(
        "train_sft.py", *LORA, *flags, "--replay", 0, "--muon_lr", 0.02, out="runs/learnt"
    )
    losses = [m["val_loss"] for m in metrics if "val_loss" in m]
    first = next(m["loss"] for m in metrics if "loss" in m)
    assert first > 2 and losses[-1] < 0.3  # the head is frozen, too


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("method", ["dora", "qlora"])
def test_the_adapter_alone_is_saved_and_opens_with_its_base(script, method, here):
    out = f"runs/{method}_{script}"
    flags = ["--adapter", method, "--rank", 4, "--alpha", 8, "--steps", 3, "--eval_every", 3]
    run(script, *flags, out=out)
    names = {path.name for path in Path(out).iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert not {"model.safetensors", "config.json"} & names
    tensors = safetensors.load_file(f"{out}/adapter_model.safetensors")
    head = {"base_model.model.score.weight"} if script == "train_rm.py" else set()
    assert head == {name for name in tensors if ".lora_" not in name}
    moved = [t for name, t in tensors.items() if name.endswith("lora_B.weight")]
    assert all(t.abs().max() > 0 for t in moved)
    state = torch.load(f"{out}/state.pt", weights_only=True)["model"]
    frozen = [n for n in state if ".lora_" not in n and ".magnitude." not in n]
    allowed = ("score", "critic", "value_head")
    assert all(any(word in name for word in allowed) for name in frozen)
    tokens = torch.arange(12)[None]
    base = loaded(script, "runs/pretrain" if script == "train_sft.py" else "runs/sft")
    assert not torch.equal(loaded(script, out)(tokens), base(tokens))


def test_what_opens_is_what_was_trained(here):
    metrics = run("train_sft.py", *LORA, "--steps", 6, "--eval_every", 6, out="runs/same")
    model, tokenizer = load_model("runs/same")
    chats, val, _ = train_sft.load_chats(
        parse(train_sft.Config, train_sft.PRESETS, [*SFT, "--init", "runs/pretrain"])
    )
    rows = pack_chats(val, tokenizer, 48, "held-out", Silent())
    loss = train_sft.validation_loss(model.eval(), rows)
    assert loss == pytest.approx(metrics[-1]["val_loss"], abs=1e-5)


class Silent:
    def print(self, *_):
        pass


def test_the_reference_is_the_base_at_first(here):
    flags = [*LORA, "--steps", 1, "--nll_coef", 0]
    assert run("train_dpo.py", *flags, out="runs/dpo")[0]["loss"] == pytest.approx(
        0.6931472, abs=1e-6
    )
    first = [m for m in run("train_grpo.py", *LORA, "--steps", 1, out="runs/grpo") if "kl" in m]
    assert first[0]["kl"] == 0.0


def test_a_run_with_an_adapter_leaves_its_base_alone(here):
    before = Path("runs/sft/model.safetensors").read_bytes()
    run("train_dpo.py", *LORA, "--steps", 2, out="runs/dpo")
    assert Path("runs/sft/model.safetensors").read_bytes() == before


# --- where an adapter's folder may stand ---------------------------------------------------------


def test_an_adapters_folder_is_a_start_for_every_script(here):
    steps = ["--steps", 1, "--eval_every", 1]
    run("train_dpo.py", "--init", "runs/lora", *steps, out="runs/whole_again")
    assert Path("runs/whole_again/model.safetensors").exists()
    run("train_dpo.py", "--init", "runs/lora", *LORA, *steps, out="runs/second")
    run("train_rm.py", "--init", "runs/second", *LORA, *steps, out="runs/third")
    run("train_grpo.py", "--init", "runs/second", *steps, out="runs/fourth")
    config = json.loads(Path("runs/second/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "runs/lora"
    tokens = torch.arange(12)[None]
    both, first = load_model("runs/second")[0], load_model("runs/lora")[0]
    assert both(tokens).sub(first(tokens)).abs().max() > 0
    load_scalar("runs/third")


@pytest.mark.parametrize("method", ["adapter", "prefix"])
def test_what_cannot_be_merged_opens_attached_and_nothing_is_trained_on_it(method, here, capsys):
    out, flags = f"runs/{method}", ["--adapter", method, "--rank", 4, "--steps", 2]
    metrics = run("train_dpo.py", *flags, out=out)
    assert load_model(out)[0].adapter and metrics[-1]["kl"] != 0
    capsys.readouterr()
    module, own = SCRIPTS["train_dpo.py"]
    for more in ([], LORA):
        said = refused(capsys, module, *own, "--init", out, *more, "--out", "runs/refused")
        assert "can't be merged into its base" in said
    module, own = SCRIPTS["train_rm.py"]
    said = refused(capsys, module, *own, "--adapter", method, "--out", "runs/refused")
    assert "they take lora, dora, qlora" in said


def test_chat_and_evaluate_take_an_adapter(here, capsys):
    answers = []
    for flags in (["runs/lora"], ["runs/pretrain", "--adapter", "runs/lora"]):
        flags += ["--prompt", "say owl", "--temperature", "0", "--dtype", "fp32"]
        chat.main(parse(chat.Config, None, [*flags, "--max_new_tokens", "8"]))
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != ""
    found = []
    for flags in (["runs/lora"], ["runs/pretrain", "--adapter", "runs/lora"]):
        flags += ["--data", "problems.jsonl", "--dtype", "fp32", "--max_new_tokens", "8"]
        evaluate.main(parse(evaluate.Config, None, flags))
        found.append(json.loads(Path("runs/lora/evaluation.json").read_text())["tasks"])
    assert found[0] == found[1]


# --- kill and resume, several processes ----------------------------------------------------------


class Killed(Exception):
    pass


def interrupt(patch, last):
    """Let every run end in Killed after step `last`."""
    advance = Run.advance

    def interrupted(self):
        advance(self)
        if self.step == last:
            raise Killed

    patch.setattr(Run, "advance", interrupted)


@pytest.mark.parametrize("script,method", [
    ("train_sft.py", "dora"), ("train_dpo.py", "qlora"), ("train_rm.py", "lora"),
    ("train_ppo.py", "lora"), ("train_grpo.py", "lora"),
])  # fmt: skip
def test_an_interrupted_and_resumed_run_equals_a_whole_one_bit_for_bit(
    script, method, here, monkeypatch
):
    flags = ["--adapter", method, "--rank", 4, "--steps", 6, "--eval_every", 2]
    run(script, *flags, out=f"runs/whole_{script}")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        interrupt(patch, 5)  # a step after the checkpoint
        run(script, *flags, out=f"runs/killed_{script}")
    torch.manual_seed(99)
    module, _ = SCRIPTS[script]
    arguments = ["--out", f"runs/killed_{script}", "--resume"]
    module.main(parse(module.Config, module.PRESETS, arguments))
    folders = [f"runs/{name}_{script}" for name in ("whole", "killed")]
    assert same(*(torch.load(f"{f}/state.pt", weights_only=True)["model"] for f in folders))
    assert same(*(safetensors.load_file(f"{f}/adapter_model.safetensors") for f in folders))


def test_a_killed_and_resumed_run_equals_a_whole_one(here):
    flags = [*SCRIPTS["train_sft.py"][1], *LORA, "--steps", 24, "--eval_every", 4]
    run("train_sft.py", *LORA, "--steps", 24, "--eval_every", 4, out="runs/whole")
    kill_and_resume("train_sft.py", flags, "runs/killed", (4, 8, 12, 16))
    files = [
        safetensors.load_file(f"runs/{name}/adapter_model.safetensors")
        for name in ("whole", "killed")
    ]
    assert same(*files)


@pytest.mark.parametrize("script,method", [("train_sft.py", "qlora"), ("train_rm.py", "dora")])
def test_two_processes_give_the_gradients_of_one(script, method, here):
    flags = [*SCRIPTS[script][1], "--adapter", method, "--steps", 1, "--grad_clip", 0]
    flags += ["--eval_every", 1]
    moments = moments_of_two_processes(script, flags, f"runs/one_{script}", f"runs/two_{script}")
    assert len(moments[0]) > 5
    for a, b in zip(*moments):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4)


# --- bad input -----------------------------------------------------------------------------------

REFUSED = {
    "rank 0": (["--rank", 0], "--rank must be at least 1, not 0"),
    "an unknown method": (["--adapter", "lola"], "--adapter lola is no method; methods are lora"),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("case", REFUSED)
def test_flags_that_make_no_adapter_are_refused(script, case, here, capsys):
    module, own = SCRIPTS[script]
    flags, sentence = REFUSED[case]
    said = refused(capsys, module, *own, *LORA, *flags, "--out", "runs/refused")
    assert sentence in said and not Path("runs/refused").exists()


def test_an_adapter_of_another_base_is_refused(here, capsys):
    pretrain("--steps", 1, "--context", 64, "--channels", 64, out="runs/wide")
    capsys.readouterr()
    for module in (chat, evaluate):
        said = refused(capsys, module, "runs/wide", "--adapter", "runs/lora")
        assert "trained on another base" in said
        said = refused(capsys, module, "runs/pretrain", "--adapter", "runs/none")
        assert "--adapter runs/none is no folder" in said
    shutil.copytree("runs/lora", "runs/orphan", dirs_exist_ok=True)
    path = Path("runs/orphan/adapter_config.json")
    path.write_text(path.read_text().replace("runs/pretrain", "runs/gone"))
    for script, (module, own) in SCRIPTS.items():
        said = refused(capsys, module, *own, "--init", "runs/orphan", "--out", "runs/refused")
        assert "runs/orphan is an adapter of runs/gone, which is no folder" in said


def test_the_base_of_an_adapter_is_never_replaced(here, capsys):
    module, own = SCRIPTS["train_dpo.py"]
    said = refused(capsys, module, *own, "--init", "runs/lora", "--out", "runs/pretrain")
    assert "would replace runs/lora, whose base is runs/pretrain, which the run reads" in said


def test_resuming_with_another_rank_is_refused(here, capsys):
    run("train_sft.py", *LORA, "--steps", 1, out="runs/ranked")
    capsys.readouterr()
    settings = Path("runs/ranked/train_config.json").read_text()
    said = refused(capsys, train_sft, "--out", "runs/ranked", "--resume", "--rank", 2)
    assert "another shape" in said
    assert Path("runs/ranked/train_config.json").read_text() == settings  # resumes as before
