"""train_vlm.py, run for real on coloured squares: what it learns, resumes, shares and refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image, ImageDraw

import train_vlm
from nanollm.config import parse
from nanollm.formats import read_captions
from nanollm.hub import load_model
from nanollm.report import ReportImage, Section, to_html, to_markdown
from nanollm.run import Run, read_metrics
from nanollm.vision.clip import caption_tokens, load_clip
from nanollm.vision.images import ImageStore
from nanollm.vision.vlm import VLM, render_with_images
from nanollm.vlm_figures import blind_figures, summary
from tests.test_train import (
    as_two_processes,
    first_moments,
    kill_and_resume,
    pretrain,
    refused,
    same,
    weights,
)

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 170, 60),
    "blue": (40, 60, 220),
    "pink": (250, 160, 200),
}
PLACES = {"left": (0, 4), "middle": (4, 4), "right": (8, 4)}
COMMON = (
    "--dtype fp32 --device cpu --batch_size 12 --warmup 2 --eval_every 1000 --image_size 16 "
    "--patch_size 8 --vision_layers 2 --vision_channels 32 --hard_negatives 1 --replay 0 "
    "--text_data chats.jsonl --replay_data text.txt"
).split()
CLIP = [*COMMON, *"--stage clip --init runs/pretrain --data captions.jsonl".split()]
CLIP += "--val_data captions.jsonl --muon_lr 0.01 --lr 0.002".split()
LANGUAGE = [*COMMON, *"--data colours.jsonl --val_data colours.jsonl --context 48".split()]
ALIGN = [*LANGUAGE, *"--stage align --init runs/pretrain --vision runs/clip".split()]
ALIGN += ["--lr", "0.01", "--feature_layer", "-2", "--no_class_token"]
INSTRUCT = [*LANGUAGE, *"--stage instruct --init runs/align --muon_lr 0.02 --lr 0.01".split()]
ALL = [*LANGUAGE, *"--stage all --init runs/pretrain --muon_lr 0.01 --lr 0.005".split()]
MIXED = ["--replay", "0.5"]  # of twelve rows three dialogues and three of plain text


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with twelve images, what is said of them, and a run of each stage."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("text.txt").write_text("the cat sat on the mat. the dog sat on the log. " * 150)
        captions, dialogues, examples = [], [], []
        for colour, rgb in COLOURS.items():
            for place, (x, y) in PLACES.items():
                image, name = Image.new("RGB", (16, 16), "white"), f"{colour}_{place}.png"
                ImageDraw.Draw(image).rectangle((x, y, x + 7, y + 7), fill=rgb)
                image.save(name)
                captions.append({"image": name, "caption": f"{colour} {place}"})
                turns = [("user", "<image>colour?"), ("assistant", colour)]
                dialogues.append({"image": name, "messages": said(turns)})
                question = {"prompt": "<image>colour?", "task": "colour", "check": "exact"}
                examples.append({"image": name, "answer": colour, **question})
        write("captions", captions)
        write("colours", dialogues)
        write("items", examples)
        write("chats", [{"messages": said([("user", "say owl"), ("assistant", "owl")])}] * 12)
        pretrain("--steps", 20, "--eval_every", 20, "--context", 64)
        run(CLIP, "--steps", 60, out="runs/clip")
        run(ALIGN, "--steps", 40, out="runs/align")
        asked = ["--test_data", "items.jsonl", "--steps", 60]
        run(INSTRUCT, *asked, "--blind", out="runs/seeing-blind")
        run(INSTRUCT, *asked, out="runs/seeing")
    return folder


@pytest.fixture
def here(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return trained


def said(turns):
    return [{"role": role, "content": content} for role, content in turns]


def write(name, records):
    Path(f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def run(own, *flags, out):
    """Train in this process; returns the metrics."""
    flags = [*own, "--out", out, *map(str, flags)]
    train_vlm.main(parse(train_vlm.Config, train_vlm.PRESETS, flags))
    return read_metrics(out)


def resume(out, *flags):
    torch.manual_seed(99)
    flags = ["--out", out, "--resume", *flags]
    train_vlm.main(parse(train_vlm.Config, train_vlm.PRESETS, flags))


def result(out):
    return json.loads(Path(out, "result.json").read_text())


def changed(before, after):
    """The parts of a VLM in which a weight of one folder differs from that of another."""
    a, b = weights(before), weights(after)
    assert a.keys() == b.keys()
    names = {name for name in a if not torch.equal(a[name], b[name])}
    return {name.split(".")[0] for name in names}


# --- learning ------------------------------------------------------------------------------------


def test_the_clip_loss_falls_until_every_image_is_found(here):
    losses = [m["loss"] for m in read_metrics("runs/clip") if "loss" in m]
    found = result("runs/clip")
    assert losses[-1] < 0.3  # log 12 = 2.5 by chance
    assert found["image_to_text"] == found["text_to_image"] == 1.0


def test_the_siglip_loss_falls_until_every_image_is_found(here):
    metrics = run(CLIP, "--loss", "siglip", "--steps", 60, out="runs/siglip")
    losses = [m["loss"] for m in metrics if "loss" in m]
    found = result("runs/siglip")
    assert losses[-1] < 0.5  # 3.4 where every cell is answered alike
    assert found["image_to_text"] == found["text_to_image"] == 1.0


def test_alignment_lowers_the_loss_by_the_projector_alone(here):
    losses = [m["loss"] for m in read_metrics("runs/align") if "loss" in m]
    assert losses[-1] < losses[0]
    text, tower = weights("runs/pretrain"), load_clip("runs/clip")[0].vision_model.state_dict()
    aligned = weights("runs/align")
    eyes = {k.removeprefix("vision."): v for k, v in aligned.items() if k.startswith("vision.")}
    assert same(tower, eyes)
    assert all(torch.equal(text[name], aligned[name]) for name in text)
    assert {name.split(".")[0] for name in aligned.keys() - text.keys()} == {"vision", "projector"}


def test_the_projector_that_alignment_writes_is_another_than_it_began_with(here):
    run(ALIGN, "--steps", 1, "--lr", 0, out="runs/untrained")
    assert changed("runs/untrained", "runs/align") == {"projector"}


def test_the_model_names_the_colour_that_it_is_shown_and_the_blind_one_cannot(here):
    seeing, blind = result("runs/seeing"), result("runs/seeing-blind")
    assert seeing["images"]["right"]["colour"] == {"accuracy": 1.0, "n": 12}
    assert seeing["images"]["shuffled"]["colour"]["accuracy"] <= 0.5
    assert blind["images"]["right"]["colour"]["accuracy"] <= 0.25  # always the same of four
    assert seeing["blind"] == blind["images"]["right"] == blind_figures("runs/seeing")
    line = summary(seeing["images"], seeing["blind"])
    assert line.startswith("accuracy, mean over tasks: right image 100.0%, another item's")
    losses = [
        [m for m in read_metrics(n) if "val_loss" in m][-1]["val_loss"]
        for n in ("runs/seeing", "runs/seeing-blind")
    ]
    assert losses[0] < 0.05 < 0.2 < losses[1]  # log 4 over the tokens of a colour and the end


def test_the_tower_stays_as_it_is_unless_it_is_trained(here):
    assert changed("runs/align", "runs/seeing") == {"model", "projector"}
    run(INSTRUCT, "--train_vision", "--steps", 2, out="runs/all_trained")
    assert changed("runs/align", "runs/all_trained") == {"model", "projector", "vision"}
    before, after = weights("runs/align"), weights("runs/all_trained")
    layers = [[name for name in before if f"vision.encoder.layers.{i}." in name] for i in (0, 1)]
    moved = [name for name in layers[0] if not torch.equal(before[name], after[name])]
    assert {name for name in layers[0] if "k_proj.bias" not in name} <= {*moved}
    assert all(torch.equal(before[name], after[name]) for name in layers[1])  # isn't read


def test_an_adapter_is_trained_beside_the_projector_and_its_folder_opens(here):
    flags = ["--adapter", "lora", "--rank", 4, "--steps", 3]
    run(INSTRUCT, *flags, out="runs/lora")
    assert not Path("runs/lora/model.safetensors").exists()
    names = torch.load("runs/lora/state.pt", weights_only=True)["model"].keys()
    assert {name.split(".")[0] for name in names if ".lora_" not in name} == {"projector"}
    assert any(".lora_" in name for name in names)
    model, _ = load_model("runs/lora")
    assert isinstance(model, VLM)
    kept = {name: p for name, p in model.state_dict().items() if name.startswith("vision.")}
    before = {name: p for name, p in weights("runs/align").items() if name.startswith("vision.")}
    assert same(kept, before)
    assert not torch.equal(
        model.state_dict()["projector.linear_1.weight"],
        weights("runs/align")["projector.linear_1.weight"],
    )


# --- what comes out ------------------------------------------------------------------------------


def test_a_clip_folder_opens_in_transformers_with_our_similarities(here):
    ours, tokenizer, preprocessing = load_clip("runs/clip")
    records = read_captions("captions.jsonl")
    images = ImageStore(preprocessing).of([r["image"] for r in records])
    tokens = caption_tokens(tokenizer, [r["caption"] for r in records], 128)
    theirs = transformers.CLIPModel.from_pretrained("runs/clip").eval()
    with torch.no_grad():
        x, y = ours.eval()(images, tokens)
        expected = theirs(input_ids=tokens, pixel_values=images).logits_per_image
    torch.testing.assert_close(ours.logit_scale.exp() * x @ y.T, expected, atol=1e-4, rtol=1e-5)


def test_what_was_instructed_opens_in_transformers_with_our_logits(here):
    ours, tokenizer = load_model("runs/seeing")
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained("runs/seeing").eval()
    messages = said([("user", "<image>colour?")])
    ids, _ = render_with_images(tokenizer, messages, ours.tokens_per_image, 1, True)
    images, tokens = ImageStore(ours.preprocessing).of(["red_left.png"]), torch.tensor([ids])
    with torch.no_grad():
        got = ours.eval()(tokens, images=images)
        expected = theirs(input_ids=tokens, pixel_values=images).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)


def test_completions_are_kept_with_their_images_and_the_report_shows_them(here):
    files = [Path(f"runs/{name}/images.json") for name in ("seeing", "seeing-blind")]
    seen, guessed = (json.loads(file.read_text()) for file in files)
    assert [s["image"] for s in seen] == [g["image"] for g in guessed]
    assert all(s["right"] and s["completion"] == s["answer"] for s in seen) and len(seen) == 3
    assert {s["question"] for s in seen} == {"colour?"}
    section = Section("Eyes")
    rows = [[ReportImage(s["image"], Path(".")), s["answer"]] for s in seen]
    section.table(["image", "right"], rows)
    html = to_html("Report", "lead", [section])
    assert html.count("<img src='data:image/png;base64,iVBOR") == len(seen)
    assert "| ![](red_left.png) | red |" in to_markdown("Report", "lead", [section])


# --- kill and resume -----------------------------------------------------------------------------


class Killed(Exception):
    pass


def kill(patch, folder, last):
    """Let the run in this folder end in Killed after step `last`."""
    advance = Run.advance

    def killed(self):
        advance(self)
        if self.folder == Path(folder) and self.step == last:
            raise Killed

    patch.setattr(Run, "advance", killed)


@pytest.mark.parametrize("stage, own", [("clip", CLIP), ("instruct", [*INSTRUCT, *MIXED])])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    stage, own, here, monkeypatch
):
    whole, killed = f"runs/whole_{stage}", f"runs/killed_{stage}"
    flags = ["--steps", 12, "--eval_every", 4]
    run(own, *flags, out=whole)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, killed, 10)  # two steps behind its checkpoint
        run(own, *flags, out=killed)
    resume(killed)
    assert same(*(torch.load(f"{n}/state.pt", weights_only=True)["model"] for n in (whole, killed)))
    figures = [
        [{k: v for k, v in m.items() if "second" not in k} for m in read_metrics(n)]
        for n in (whole, killed)
    ]
    assert figures[0] == figures[1] and len(figures[0]) > 3


def test_a_process_that_was_killed_is_resumed_to_the_same_weights(here):
    flags = [*CLIP, *"--steps 60 --eval_every 4".split()]
    run(flags, out="runs/whole_process")
    kill_and_resume("train_vlm.py", flags, "runs/killed_process", (4, 8, 12))
    names = ("whole_process", "killed_process")
    assert same(*(load_clip(f"runs/{name}")[0].state_dict() for name in names))


FOUR_STEPS = ["--steps", 4, "--eval_every", 2]


@pytest.fixture
def all_stages(here):
    """The four folders of an uninterrupted call."""
    if not Path("runs/all").exists():
        run(ALL, *FOUR_STEPS, out="runs/all")


@pytest.mark.parametrize("stage, step", [("-align", 1), ("-align", 3), ("-blind", 1), ("", 1)])
def test_all_stages_go_on_where_one_was_killed_and_end_as_without(
    stage, step, all_stages, monkeypatch
):
    shutil.rmtree("runs/cut", ignore_errors=True)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, f"runs/cut{stage}", step)
        run(ALL, *FOUR_STEPS, out="runs/cut")
    done = Path("runs/cut-clip/state.pt").stat().st_mtime_ns
    resume("runs/cut")
    assert Path("runs/cut-clip/state.pt").stat().st_mtime_ns == done
    for folder in ("", "-align", "-blind"):
        assert same(weights(f"runs/all{folder}"), weights(f"runs/cut{folder}")), folder
    assert same(*(load_clip(f"runs/{n}-clip")[0].state_dict() for n in ("all", "cut")))


def test_an_attempt_that_fails_leaves_the_finished_stages_alone(all_stages, capsys):
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")}
    for flags in (["--context", 65], ["--hard_negatives", 5], ["--data", "nowhere.jsonl"]):
        refused(capsys, train_vlm, *ALL, *flags, "--out", "runs/all")
    assert {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")} == before


def test_all_stages_move_the_earlier_ones_out_of_the_way(here):
    for seed in (0, 1):
        run(ALL, "--steps", 1, "--seed", seed, out="runs/twice")
    names = [f"runs/twice{stage}" for stage in ("", "-clip", "-align", "-blind")]
    files = [Path(f"{name}.previous/train_config.json") for name in names]
    assert [json.loads(file.read_text())["seed"] for file in files] == [0] * 4


# --- several processes ---------------------------------------------------------------------------


@pytest.mark.parametrize("stage, own", [
    ("clip", CLIP), ("instruct", [*INSTRUCT, *MIXED, "--train_vision"]),
])  # fmt: skip
def test_two_processes_give_the_gradients_of_one(stage, own, here):
    """After one step the optimizers' first moments are the gradients, up to a constant factor. The
    second process has rows of text alone.
    """
    one, two = f"runs/one_{stage}", f"runs/two_{stage}"
    flags = ["--steps", 1, "--grad_clip", 0]
    run(own, *flags, out=one)
    as_two_processes("train_vlm.py", *own, *flags, "--out", two)
    moments = [first_moments(torch.load(f"{n}/state.pt", weights_only=True)) for n in (one, two)]
    assert len(moments[0]) > 5
    for a, b in zip(*moments):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)


# --- bad input -----------------------------------------------------------------------------------

ONE = json.dumps({"image": "red_left.png", "caption": "red"}) + "\n"
ASKED = {"messages": said([("user", "<image>colour?"), ("assistant", "red")])}
MISSING = json.dumps({"image": "nowhere.png", **ASKED}) + "\n"
FILES = {
    "bad.jsonl": ONE * 3 + '{"image": "red_left.png"',
    "silent.jsonl": ONE * 3 + '{"image": "red_left.png", "caption": " "}',
    "gone.jsonl": MISSING,
    "damaged.jsonl": ONE * 11 + '{"image": "damaged.png", "caption": "a"}',
    "single.jsonl": ONE,
    "long.jsonl": json.dumps({"image": "red_left.png", "caption": "a" * 200}),
    "blind_items.jsonl": '{"prompt": "say owl", "answer": "owl"}',
    "same.jsonl": '{"image": "red_left.png", "prompt": "<image>?", "answer": "red"}\n' * 2,
    "long_items.jsonl": json.dumps(
        {"image": "red_left.png", "prompt": "<image>" + "a" * 60, "answer": "red"}
    ),
    "damaged_items.jsonl": '{"image": "damaged.png", "prompt": "<image>?", "answer": "red"}\n'
    '{"image": "red_left.png", "prompt": "<image>?", "answer": "red"}',
}
REFUSED = {
    "align without a tower": ([*ALIGN, "--vision", "none"], "--stage align needs --vision"),
    "a tower that is none": ([*ALIGN, "--vision", "runs/pretrain"], "'qwen3' is not one of"),
    "no such tower": ([*ALIGN, "--vision", "runs/none"], "runs/none is no folder"),
    "instruct from text": ([*INSTRUCT, "--init", "runs/pretrain"], "without eyes"),
    "instruct from a tower": ([*INSTRUCT, "--init", "runs/clip"], "model_type 'clip'"),
    "align from a model with eyes": ([*ALIGN, "--init", "runs/align"], "model already"),
    "no such model": ([*CLIP, "--init", "runs/none"], "no tokenizer at runs/none"),
    "missing image": ([*ALIGN, "--data", "gone.jsonl"], "line 1: the image nowhere.png"),
    "broken captions": ([*CLIP, "--data", "bad.jsonl"], "bad.jsonl, line 4: broken JSON"),
    "empty caption": ([*CLIP, "--data", "silent.jsonl"], 'line 4: a "caption" is wanted'),
    "long caption": ([*CLIP, "--data", "long.jsonl"], "has 201 tokens, more than 128"),
    "captions for align": ([*ALIGN, "--data", "captions.jsonl"], 'needs "messages"'),
    "damaged image": ([*CLIP, "--data", "damaged.jsonl"], "damaged.png: the image is damaged"),
    "damaged held-out image": ([*CLIP, "--val_data", "damaged.jsonl"], "damaged.png: the image"),
    "one record": ([*CLIP, "--data", "single.jsonl", "--val_data", "none"], "too few records (1)"),
    "alike doesn't divide": ([*CLIP, "--hard_negatives", 5], "--hard_negatives 5 doesn't divide --batch_size 12"),
    "alike is more than all": (
        [*CLIP, "--hard_negatives", 24, "--batch_size", 24],
        "--hard_negatives 24 is more than the 12 captions",
    ),
    "alike is nothing": ([*CLIP, "--hard_negatives", 0], "--hard_negatives must be at least 1"),
    "row beyond the model": ([*ALIGN, "--context", 65], "beyond the model's context of 64"),
    "row within a image": ([*ALIGN, "--context", 4], "a image takes 4 tokens, too many"),
    "row within an answer": ([*ALIGN, "--context", 12], "has an answer within 12 tokens"),
    "patch beyond the image": ([*CLIP, "--patch_size", 32], "--patch_size 32 doesn't divide"),
    "patches leave an edge": ([*CLIP, "--image_size", 20], "its right and lower edge too"),
    "patches of nothing": ([*CLIP, "--patch_size", 0], "--patch_size must be at least 1"),
    "heads don't divide": ([*CLIP, "--vision_channels", 100], "must be a multiple of 32"),
    "pixel shuffle of nine": (
        [*ALL, "--projector", "pixel_shuffle", "--image_size", 24, "--no_class_token"],
        "not 9 patches",
    ),
    "pixel shuffle of a class token": (
        [*ALL, "--projector", "pixel_shuffle"], "leave it out with --no_class_token"
    ),
    "a layer too deep": ([*ALIGN, "--feature_layer", 5], "has 2 layers; there is no 5"),
    "replay of all": ([*INSTRUCT, "--replay", 1], "--replay 1.0 is no share"),
    "replay of all rows": ([*INSTRUCT, "--replay", 0.99], "leaves none of the 12 rows"),
    "items without images": (
        [*INSTRUCT, "--test_data", "blind_items.jsonl"],
        "the item 'say owl' has no image",
    ),
    "items of one image": ([*INSTRUCT, "--test_data", "same.jsonl"], "no other item has 1 pic"),
    "long items": ([*INSTRUCT, "--test_data", "long_items.jsonl"], "the model reads 64; shorten"),
    "damaged items": ([*INSTRUCT, "--test_data", "damaged_items.jsonl"], "damaged.png: the image"),
    "unknown adapter": ([*INSTRUCT, "--adapter", "lola"], "--adapter lola is no method"),
    "adapter and tower": ([*INSTRUCT, "--adapter", "lora", "--train_vision"], "no --adapter"),
    "adapter of a tower": ([*CLIP, "--adapter", "lora"], "goes with --stage instruct or all"),
    "blind tower": ([*CLIP, "--blind"], "--blind goes with --stage instruct, not clip"),
    "all blind": ([*ALL, "--blind"], "--blind goes with --stage instruct, not all"),
    "projector of another stage": (
        [*INSTRUCT, "--projector", "linear"], "--projector goes with --stage align or all"
    ),
    "a image too small to paint": (
        [*CLIP, "--data", "village", "--image_size", 16, "--patch_size", 4], "the least is 32"
    ),
    "all stages, as the last one": (
        [*INSTRUCT, "--init", "runs/pretrain"], "all stages go on with --stage all --resume"
    ),
    "all with a tower": ([*ALL, "--vision", "runs/clip"], "--vision goes with --stage align"),
    "all from nothing": ([*ALL, "--init", "runs/none"], "runs/none is no folder"),
    "all from eyes": ([*ALL, "--init", "runs/align"], "model already; name a text one"),
    "all with captions": ([*ALL, "--data", "captions.jsonl"], 'needs "messages"'),
    "all with bad items": ([*ALL, "--test_data", "blind_items.jsonl"], "has no image"),
    "all beyond the context": ([*ALL, "--context", 65], "beyond the model's context of 64"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused_and_leaves_nothing(case, here, capsys):
    for name, text in FILES.items():
        Path(name).write_text(text)
    Path("damaged.png").write_bytes(Path("red_left.png").read_bytes()[:60])
    flags, sentence = REFUSED[case]
    before = sorted(Path("runs").rglob("*"))
    assert sentence in refused(capsys, train_vlm, *flags, "--out", "runs/refused")
    assert sorted(Path("runs").rglob("*")) == before


READ = [
    (CLIP, "runs/pretrain"), (ALIGN, "runs/pretrain"), (ALIGN, "runs/clip"),
    (INSTRUCT, "runs/align"), ([*ALL, "--init", "runs/text-clip"], "runs/text"),
    ([*ALL, "--init", "runs/text"], "runs/text"),
]  # fmt: skip


@pytest.mark.parametrize("own, out", READ)
def test_a_folder_that_the_run_reads_is_never_replaced(own, out, here, capsys):
    for name in ("runs/text", "runs/text-clip"):
        shutil.copytree("runs/pretrain", name, dirs_exist_ok=True)
    before = sorted(Path("runs").rglob("*"))
    said = refused(capsys, train_vlm, *own, "--out", out)
    assert "which the run reads; use another folder" in said
    assert sorted(Path("runs").rglob("*")) == before


def test_files_beside_out_that_are_no_run_stay_where_they_are(here, capsys):
    Path("mine-align").mkdir(exist_ok=True)
    Path("mine-align/thesis.txt").write_text("years of work")
    said = refused(capsys, train_vlm, *ALL, "--out", "mine")
    assert "mine-align holds files that are no run of ours; choose another --out" in said
    assert Path("mine-align/thesis.txt").exists() and not Path("mine").exists()


def test_an_empty_folder_is_taken_for_all_stages(here):
    Path("runs/empty").mkdir()
    run(ALL, "--steps", 1, out="runs/empty")
    assert "images" not in result("runs/empty") and not blind_figures("runs/empty")


@pytest.mark.parametrize("own", [CLIP, INSTRUCT])
def test_weights_that_are_no_numbers_never_replace_a_checkpoint(own, here, capsys):
    run(own, "--steps", 2, out="runs/finite")
    capsys.readouterr()
    rates = ["--muon_lr", 1e38, "--lr", 1e38, "--grad_clip", 0]
    flags = ["--out", "runs/finite", "--resume", "--steps", 9, "--eval_every", 1, *rates]
    assert "became nan" in refused(capsys, train_vlm, *flags)
    state = torch.load("runs/finite/state.pt", weights_only=True)
    assert state["step"] == 2 and all(p.isfinite().all() for p in state["model"].values())


def test_every_flag_has_a_help_text(capsys):
    with pytest.raises(SystemExit):
        parse(train_vlm.Config, train_vlm.PRESETS, ["--help"])
    lines = " ".join(capsys.readouterr().out.split())
    assert "--vision_layers int of the vision tower" in lines
