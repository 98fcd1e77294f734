"""GRPO on problems about images: what rewards alone teach, the same distribution in sampling and
training, adapters, bad input.
"""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from helpers import refused, result, run
from PIL import Image

import train_grpo
from data.village import images as village_images
from nanollm import evaluate, rollouts
from nanollm.batches import Completions, pad_completions
from nanollm.config import parse
from nanollm.formats import IMAGE
from nanollm.generate import generate
from nanollm.gpt import GPTConfig
from nanollm.hub import load_model, save_model
from nanollm.logprobs import completion_logprobs
from nanollm.peft.adapters import reference
from nanollm.runtime import Runtime
from nanollm.tokenizer import Tokenizer
from nanollm.vision.images import Preprocessing
from nanollm.vision.vit import VisionConfig, ViT
from nanollm.vision.vlm import VLM
from tests.conftest import SMALL
from tests.test_vlm import TOWER, adapted, make, some_images

CPU = Runtime(torch.device("cpu"), torch.float32)
COLOURS = {"red": (230, 30, 30), "blue": (30, 30, 230), "grey": (128, 128, 128)}
ASKED = "<image>Red or blue?"
OWN = (
    "--dtype fp32 --device cpu --init runs/guesses --data right.jsonl --val_fraction 0.5 "
    "--max_new_tokens 2 --batch_size 8 --samples 8 --accumulate 2 --eval_samples 1"
).split()


def start_of(vlm, tokenizer):
    messages = [{"role": "user", "content": ASKED}]
    return tokenizer.render(messages, True, vlm.tokens_per_image)[0]


def guessing_model(tokenizer):
    """A small VLM that has been taught to say 1 or 2 by chance, whatever the image."""
    torch.manual_seed(0)
    cfg = GPTConfig(**SMALL | {"max_position_embeddings": 96})
    vlm = VLM(cfg, ViT(VisionConfig(**TOWER)), "pixel_shuffle", tokenizer.special[IMAGE])
    vlm.preprocessing = Preprocessing(16)
    vlm.train_parts(language=True)
    answers = [[*tokenizer.encode(text), tokenizer.end_id] for text in "12"] * 4
    prompts, images = [start_of(vlm, tokenizer)] * 8, list(torch.randn(8, 1, 3, 16, 16))
    rows = pad_completions(prompts, answers, tokenizer.pad_id, images=images)
    optimizer = torch.optim.AdamW(vlm.parameters(), 0.01)
    for _ in range(40):
        optimizer.zero_grad()
        (-completion_logprobs(vlm, rows).sum() / 8).backward()
        optimizer.step()
    return vlm


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model that guesses; problems with a red or a blue image, and the same with grey ones."""
    folder, tokenizer = tmp_path_factory.mktemp("grpo"), Tokenizer.from_bytes()
    save_model(guessing_model(tokenizer), tokenizer, folder / "runs/guesses")
    for name, colour in COLOURS.items():
        Image.new("RGB", (16, 16), colour).save(folder / f"{name}.png")
    rights = [("red", "1"), ("blue", "2")] * 20
    for name, shown in ("right", None), ("grey", "grey"):
        pairs = [(f"{shown or colour}.png", answer) for colour, answer in rights]
        problems = [{"image": i, "prompt": ASKED, "answer": answer} for i, answer in pairs]
        write(folder / f"{name}.jsonl", problems)
    texts = [{"prompt": "One or two?", "answer": "1"}] * 40
    write(folder / "texts.jsonl", texts)
    write(folder / "mixed.jsonl", [x for pair in zip(texts, problems) for x in pair])
    return folder


def write(path, records):
    Path(path).write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def here(made, monkeypatch):
    monkeypatch.chdir(made)
    return made


def grpo(*flags, out="runs/grpo"):
    return run(train_grpo, *OWN, *flags, out=out)


def accuracies(metrics):
    return [m["accuracy"] for m in metrics if "accuracy" in m]


# --- learning ------------------------------------------------------------------------------------

LEARN = "--steps 30 --eval_every 30 --lr 0.005 --warmup 2".split()


@pytest.fixture(scope="module")
def learnt(made):
    """Metrics of a run on what can be seen, runs/seeing."""
    with contextlib.chdir(made):
        return grpo(*LEARN, out="runs/seeing")


def test_rewards_alone_teach_to_look_at_the_image(learnt, here):
    seen = accuracies(learnt)
    assert seen[0] < 0.7 and sum(seen[-5:]) / 5 > 0.9
    assert result("runs/seeing")["after"]["all"]["accuracy"] == 1.0


def test_projector_and_language_model_learn_and_the_vision_tower_is_frozen(here):
    grpo("--steps", 2, "--warmup", 0)
    before, after = (
        dict(load_model(f"runs/{n}")[0].named_parameters()) for n in ("guesses", "grpo")
    )
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {name for name in before if name.startswith("vision.")}


@pytest.mark.parametrize("data", ["texts.jsonl", "mixed.jsonl"])
def test_problems_of_text_are_answered_too_alone_or_beside_images(data, here):
    metrics = grpo("--steps", 2, "--data", data)
    assert len(accuracies(metrics)) == 2 and all(m.get("grad_norm", 1) > 0 for m in metrics)


def test_an_adapter_starts_at_the_reference_and_leaves_it(here):
    flags = ["--steps", 4, "--eval_every", 4, "--adapter", "lora", "--lr", 0.01]
    kl = [m["kl"] for m in grpo(*flags, "--warmup", 0, "--kl_coef", 0.1) if "kl" in m]
    assert kl[0] == 0.0 and kl[-1] != 0.0
    assert isinstance(load_model("runs/grpo")[0], VLM)


# --- one distribution ----------------------------------------------------------------------------


@pytest.fixture
def vlm(tokenizer):
    return make(tokenizer, "pixel_shuffle")


def rollout_of(vlm, tokenizer, temperature=1.0):
    """Completions of a random model to problems with two images, none, and one."""
    cfg = train_grpo.Config(samples=4, max_new_tokens=6, temperature=temperature)
    examples = []
    for images in ["red.png", "blue.png"], [], ["red.png"]:
        message = {"role": "user", "content": "<image>" * len(images) + f"{len(images)}?"}
        record = {"messages": [message], "images": images}
        examples.append(record | {"answer": "7", "check": "number"})
    torch.manual_seed(0)
    prompts = train_grpo.Prompts(cfg, CPU, vlm, tokenizer, examples)
    return train_grpo.sample_rollout(cfg, prompts, examples)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampling_and_training_see_one_distribution(temperature, vlm, tokenizer, here, monkeypatch):
    made = []
    monkeypatch.setattr(
        rollouts, "generate", lambda *a, **k: made.append(generate(*a, **k)) or made[0]
    )
    rows = rollout_of(vlm, tokenizer, temperature).rows
    with torch.no_grad():
        trained = completion_logprobs(vlm, rows, temperature)[rows.mask[:, 1:]]
    torch.testing.assert_close(trained, made[0].logprobs[made[0].own], atol=2e-5, rtol=0)


def test_the_placeholder_has_no_share_in_logprobs_and_entropy(vlm, tokenizer):
    prompt = start_of(vlm, tokenizer)
    rows = pad_completions([prompt], [[5]], 0, images=[some_images(1)])
    with torch.no_grad():
        logprob, entropy = (x.sum() for x in completion_logprobs(vlm, rows, with_entropy=True))
        logits = vlm(torch.tensor([prompt]), images=some_images(1))[0, -1]
        others = torch.arange(len(logits)) != vlm.image_id
        p = logits[others].softmax(-1)
    assert logprob.item() == pytest.approx(p[5].log().item(), abs=1e-5)
    assert entropy.item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-4)


def test_the_reference_keeps_its_projector_where_an_adapter_is_trained(vlm, tokenizer, here):
    rows, policy = rollout_of(vlm, tokenizer).rows, adapted(vlm)
    ref = reference(policy)
    with torch.no_grad():
        before = completion_logprobs(ref, rows)
        policy.projector.linear_1.weight.mul_(2)
        assert torch.equal(completion_logprobs(ref, rows), before)
    assert ref.model.embed_tokens.weight is policy.model.embed_tokens.weight  # frozen: shared


# --- rows and their images ---------------------------------------------------------------------


def test_each_answer_is_scored_with_its_own_images_in_any_order(vlm, tokenizer, here):
    rows = rollout_of(vlm, tokenizer).rows
    with torch.no_grad():
        whole = completion_logprobs(vlm, rows).sum(1)
        order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
        mixed = completion_logprobs(vlm, rows[order]).sum(1)
        text, shown = rows[slice(4, 8)], rows[slice(0, 4)]
        joined = completion_logprobs(vlm, Completions.join([text, shown])).sum(1)
    torch.testing.assert_close(mixed, whole[order], atol=1e-4, rtol=0)
    torch.testing.assert_close(joined, whole[[4, 5, 6, 7, 0, 1, 2, 3]], atol=1e-4, rtol=0)


def test_the_vision_tower_looks_once_at_each_prompts_images(vlm, tokenizer, here, monkeypatch):
    looked, features = [], vlm.vision.features
    monkeypatch.setattr(
        vlm.vision, "features", lambda p, *how: looked.append(len(p)) or features(p, *how)
    )
    rows = rollout_of(vlm, tokenizer).rows
    completion_logprobs(vlm, rows).sum().backward()
    assert looked == [3]  # four samples, and a pass of training, of 2 + 0 + 1 images


# --- resume, files, bad input --------------------------------------------------------------------


def test_the_villages_images_are_found_by_the_run_that_chose_them(here, monkeypatch):
    asked = []
    monkeypatch.setattr(village_images, "prepare", lambda **how: asked.append(how))
    earlier = {"init": "runs/sft", "image_size": 32, "images": 7, "most_groups": 2}
    Path("runs/b").mkdir(parents=True)
    Path("runs/b/train_config.json").write_text(
        json.dumps({"init": "runs/a", "data": "images", "began_from": earlier})
    )
    for folder in "runs/b", "runs/guesses":
        village_images.of_run(folder)
    assert asked == [{"size": 32, "n_train": 7, "most_groups": 2}, {}]


def test_evaluate_asks_about_the_villages_images_or_shows_grey_ones(learnt, here, monkeypatch):
    for file in "questions_test", "combos_test", "problems_test":
        pairs = ("red", "1"), ("blue", "2")
        records = [{"image": f"{colour}.png", "prompt": ASKED, "answer": a} for colour, a in pairs]
        write(f"{file}.jsonl", [record | {"task": file} for record in records])
    monkeypatch.setattr(village_images, "prepare", lambda **how: here)
    found = {}
    for name, shown in ("images", "right"), ("combos", "right"), ("counting", "none"):
        flags = ["runs/seeing", "--data", name, "--images", shown, "--out", "found.json"]
        evaluate.main(parse(evaluate.Config, None, [*flags, "--dtype", "fp32"]))
        found |= json.loads(Path("found.json").read_text())["tasks"]
    accuracy = {task: each["accuracy"] for task, each in found.items()}
    assert accuracy == {"questions_test": 1.0, "combos_test": 1.0, "problems_test": 0.5}


def test_what_cannot_be_is_refused_in_one_line(here, capsys, random_model, tokenizer):
    save_model(random_model(max_position_embeddings=96), tokenizer, "runs/text")
    bad = [{"image": "none.png", "prompt": ASKED, "answer": "1"}]
    write("missing.jsonl", bad)
    write("unmarked.jsonl", [bad[0] | {"image": "red.png", "prompt": "Which?"}])
    for flags, sentence in (
        (["--init", "runs/text"], "this model reads text only"),
        (["--data", "missing.jsonl"], "line 1: the image none.png does not exist"),
        (["--data", "unmarked.jsonl"], "line 1: 0 times <image>, but 1 images"),
    ):
        assert sentence in refused(capsys, train_grpo, *OWN, "--out", "runs/refused", *flags)
        assert not Path("runs/refused").exists()
