"""train_vlm.py, run for real on coloured squares: what it learns, resumes, shares and refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import (
    Killed,
    as_two_processes,
    assert_resumes,
    first_moments,
    in_new_folder,
    refused,
    result,
    run,
    same,
    weights,
)
from PIL import Image, ImageDraw

import train_pretrain
import train_vlm
from nanollm import safetensors
from nanollm.config import parse
from nanollm.formats import write_jsonl
from nanollm.hub import load_model
from nanollm.records import read_captions
from nanollm.run import Run, read_metrics
from nanollm.vision.images import ImageStore
from nanollm.vision.vit import Block
from nanollm.vision.vlm import VLM

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 170, 60),
    "blue": (40, 60, 220),
    "pink": (250, 160, 200),
}
PLACES = {"left": (0, 4), "middle": (4, 4), "right": (8, 4)}
PRETRAIN = (
    "--batch_size 4 --dtype fp32 --device cpu --layers 1 --channels 32 --heads 2 --context 64 "
    "--tokenizer bytes --data text.txt --sample_tokens 8 --steps 20 --eval_every 20"
).split()
COMMON = (
    "--dtype fp32 --device cpu --batch_size 12 --warmup 2 --eval_every 1000 --image_size 16 "
    "--patch_size 8 --vision_layers 2 --vision_channels 32 --replay 0 "
    "--text_data chats.jsonl --replay_data text.txt"
).split()
CLIP = [*COMMON, *"--stage clip --init runs/pretrain --data captions.jsonl".split()]
CLIP += "--val_data captions.jsonl --muon_lr 0.01 --lr 0.002".split()
TWICE = [*CLIP, *"--data twice.jsonl --hard_negatives 2".split()]  # two captions of an image
LANGUAGE = [*COMMON, *"--data colours.jsonl --val_data colours.jsonl --context 48".split()]
ALIGN = [*LANGUAGE, *"--stage align --init runs/pretrain --vision runs/clip".split()]
ALIGN += "--muon_lr 0.01 --feature_layer -2 --no_class_token".split()
INSTRUCT = [*LANGUAGE, *"--stage instruct --init runs/align --muon_lr 0.02 --lr 0.01".split()]
ALL = [*LANGUAGE, *"--stage all --init runs/pretrain --muon_lr 0.01 --lr 0.005".split()]
MIXED = ["--replay", "0.5"]  # of twelve rows four dialogues and two of plain text


def said(*turns):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turns)]


def write(name, records):
    write_jsonl(f"{name}.jsonl", records)


def vlm(own, *flags, out):
    return run(train_vlm, *own, *flags, out=out)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with twelve images, what is said of them, and a run of each stage."""
    with in_new_folder(tmp_path_factory) as folder:
        names = [(colour, place) for colour in COLOURS for place in PLACES]
        for colour, place in names:
            image, (x, y) = Image.new("RGB", (16, 16), "white"), PLACES[place]
            ImageDraw.Draw(image).rectangle((x, y, x + 7, y + 7), fill=COLOURS[colour])
            image.save(f"{colour}_{place}.png")
        files = [{"image": f"{colour}_{place}.png"} for colour, place in names]
        write("captions", [f | {"caption": " ".join(n)} for f, n in zip(files, names)])
        other = [f | {"caption": " ".join(n[::-1])} for f, n in zip(files, names)]
        write("twice", [r for pair in zip(read_captions("captions.jsonl"), other) for r in pair])
        asked = [f | {"messages": said("<image>colour?", n[0])} for f, n in zip(files, names)]
        write("colours", asked)
        question = {"prompt": "<image>colour?", "task": "colour", "check": "exact"}
        write("examples", [f | question | {"answer": n[0]} for f, n in zip(files, names)])
        write("chats", [{"messages": said("say owl", "owl")}] * 12)
        run(train_pretrain, *PRETRAIN, out="runs/pretrain")
        vlm(CLIP, "--steps", 60, out="runs/clip")
        vlm(ALIGN, "--steps", 40, out="runs/align")
        asked = ["--test_data", "examples.jsonl", "--steps", 60]
        vlm(INSTRUCT, *asked, "--no_images", out="runs/vlm-no_images")
        vlm(INSTRUCT, *asked, out="runs/vlm")
    return folder


def effects(out):
    return {each["name"]: (each["before"], each["after"]) for each in result(out)["effects"]}


def changed(before, after):
    """The parts of a VLM in which a weight of one folder differs from that of another."""
    a, b = weights(before), weights(after)
    assert a.keys() == b.keys()
    return {name.split(".")[0] for name in a if not torch.equal(a[name], b[name])}


# --- learning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss, most", [("clip", 0.3), ("siglip", 0.5)])
def test_the_loss_falls_until_every_image_and_every_caption_is_found(loss, most, here):
    if loss == "siglip":
        vlm(CLIP, "--loss", "siglip", "--steps", 60, out="runs/siglip")
    folder = {"clip": "runs/clip", "siglip": "runs/siglip"}[loss]
    losses = [m["loss"] for m in read_metrics(folder) if "loss" in m]
    assert losses[-1] < most  # at first log 12 = 2.5, and SigLIP's 3.4
    assert {after for _, after in effects(folder).values()} == {1.0}
    assert max(before for before, _ in effects(folder).values()) < 0.5


def test_alignment_lowers_the_loss_by_the_projector_alone(here):
    losses = [m["loss"] for m in read_metrics("runs/align") if "loss" in m]
    assert losses[-1] < losses[0]
    aligned, text = weights("runs/align"), weights("runs/pretrain")
    tower = {
        k: v
        for k, v in safetensors.load_folder("runs/clip").items()
        if k.startswith("vision_model.")
    }
    own = {k: v for k, v in aligned.items() if k.startswith("vision.")}
    assert same(tower, {k.replace("vision.", "vision_model.", 1): v for k, v in own.items()})
    assert all(torch.equal(text[name], aligned[name]) for name in text)
    vlm(ALIGN, "--steps", 1, "--muon_lr", 0, "--lr", 0, out="runs/untrained")
    assert changed("runs/untrained", "runs/align") == {"projector"}
    [(another, right)] = effects("runs/align").values()
    assert right == result("runs/align")["val_loss"]["right"] and another > 0


def test_the_model_names_the_colour_that_it_is_shown_and_the_baseline_cannot(here):
    model, baseline = result("runs/vlm"), result("runs/vlm-no_images")
    assert model["images"]["right"]["colour"] == {"accuracy": 1.0, "n": 12}
    assert baseline["images"]["right"]["colour"]["accuracy"] <= 0.25  # always the same of four
    found = effects("runs/vlm")
    name = "questions about images, by the no-image baseline and the model"
    assert found[name] == (baseline["images"]["right"]["colour"]["accuracy"], 1.0)
    another, right = next(found[key] for key in found if "another's image" in key)
    assert right < 0.05 < another
    losses = [m["val_loss"] for m in read_metrics("runs/vlm-no_images") if "val_loss" in m]
    assert losses[-1] > 0.2  # log 4 over the tokens of a colour and the end


def test_the_tower_stays_as_it_is_unless_it_is_trained(here):
    assert changed("runs/align", "runs/vlm") == {"model", "projector"}
    vlm(INSTRUCT, "--train_vision", "--steps", 2, out="runs/all_trained")
    assert changed("runs/align", "runs/all_trained") == {"model", "projector", "vision"}
    before, after = weights("runs/align"), weights("runs/all_trained")
    layers = [[name for name in before if f"vision.encoder.layers.{i}." in name] for i in (0, 1)]
    moved = [name for name in layers[0] if not torch.equal(before[name], after[name])]
    assert {name for name in layers[0] if "k_proj.bias" not in name} <= {*moved}
    assert all(torch.equal(before[name], after[name]) for name in layers[1])  # isn't read


@pytest.mark.parametrize(
    "targets, parts",
    [("all", {"model"}), ("vision", {"vision"}), ("all,vision", {"model", "vision"})],
)
def test_an_adapter_is_trained_beside_the_projector_and_its_folder_opens(targets, parts, here):
    flags = f"--adapter lora --rank 4 --steps 3 --targets {targets}"
    vlm(INSTRUCT, *flags.split(), out="runs/lora")
    trained = result("runs/lora")["trained_parameters"]
    assert trained < sum(x.numel() for x in weights("runs/lora").values()) / 2
    assert not Path("runs/lora/model.safetensors").exists()
    names = torch.load("runs/lora/state.pt", weights_only=True)["model"].keys()
    assert {name.split(".")[0] for name in names if ".lora_" not in name} == {"projector"}
    assert any(".lora_" in name for name in names)
    assert isinstance(load_model("runs/lora")[0], VLM)
    assert changed("runs/align", "runs/lora") == {"projector", *parts}


@pytest.mark.parametrize(
    "own, blocks", [(CLIP, 4), ([*INSTRUCT, "--train_vision"], 1)], ids=["clip", "instruct"]
)
def test_recomputed_activations_change_no_weight(own, blocks, here, monkeypatch):
    """Each block of the towers that is trained runs twice: two layers for images and two for text,
    and of a tower whose state -2 is read the first layer.
    """
    count, forward = [0], Block.forward
    monkeypatch.setattr(
        Block, "forward", lambda self, x: (count.append(count.pop() + 1), forward(self, x))[1]
    )
    runs = []
    for flags in ([], ["--checkpoint_activations"]):
        count[0] = 0
        vlm(own, "--steps", 2, *flags, out="runs/recomputed")
        runs.append((count[0], torch.load("runs/recomputed/state.pt", weights_only=True)["model"]))
    assert runs[1][0] - runs[0][0] == 2 * blocks and same(runs[0][1], runs[1][1])


# --- what comes out ------------------------------------------------------------------------------


def test_what_was_instructed_opens_in_transformers_with_our_logits(here, transformers):
    equal_in_transformers(transformers, "runs/vlm")


def equal_in_transformers(transformers, folder):
    ours, tokenizer = load_model(folder)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    ids = tokenizer.render(said("<image>colour?"), True, ours.tokens_per_image)[0]
    images, tokens = ImageStore(ours.preprocessing).of(["red_left.png"]), torch.tensor([ids])
    with torch.no_grad():
        got = ours.eval()(tokens, images=images)
        expected = theirs(input_ids=tokens, pixel_values=images).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def smollm2(here, transformers):
    """A folder as SmolLM2's: a small Llama, a byte-level tokenizer, ChatML, and no <image>."""
    t, ends = pytest.importorskip("tokenizers"), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    peer = t.Tokenizer(t.models.BPE())
    level = t.pre_tokenizers.ByteLevel(add_prefix_space=False)
    peer.pre_tokenizer = t.pre_tokenizers.Sequence([t.pre_tokenizers.Digits(True), level])
    peer.decoder = t.decoders.ByteLevel()
    alphabet = {"initial_alphabet": level.alphabet(), "show_progress": False}
    trainer = t.trainers.BpeTrainer(vocab_size=264, special_tokens=ends, **alphabet)
    peer.train_from_iterator([Path("text.txt").read_text()], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=peer, eos_token=ends[2])
    fast.chat_template = CHATML
    fast.save_pretrained("smollm2")
    shape = dict(vocab_size=264, hidden_size=24, intermediate_size=40, num_hidden_layers=2)
    shape |= dict(num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=96)
    cfg = transformers.LlamaConfig(**shape, tie_word_embeddings=True, eos_token_id=2)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(cfg).save_pretrained("smollm2")
    return "smollm2"


def test_a_downloaded_model_without_an_image_token_learns_to_see(smollm2, transformers):
    vlm([*ALIGN, "--init", smollm2, "--context", 64], "--steps", 4, out="runs/sees")
    vlm([*INSTRUCT, "--init", "runs/sees", "--context", 64], "--steps", 2, out="runs/saw")
    text, text_tokenizer = load_model(smollm2)
    aligned, tokenizer = load_model("runs/sees")
    assert text_tokenizer.vocab_size == aligned.image_id == 264 and aligned.cfg.vocab_size == 265
    own, rows = text.model.embed_tokens.weight, aligned.model.embed_tokens.weight
    assert torch.equal(rows[:264], own) and torch.allclose(rows[264], own.mean(0))
    asked = said("<image>colour?")
    assert tokenizer.decode(tokenizer.render(asked, True, 2)[0]) == (
        "<|im_start|>user\n<image><image>colour?<|im_end|>\n<|im_start|>assistant\n"
    )
    plain = said("colour?", "red")
    assert tokenizer.render(plain) == text_tokenizer.render(plain)
    for folder in ("runs/sees", "runs/saw"):
        equal_in_transformers(transformers, folder)


def test_completions_are_kept_with_their_images_and_the_baselines(here):
    files = [Path(f"runs/{name}/images.json") for name in ("vlm", "vlm-no_images")]
    model, baseline = (json.loads(file.read_text()) for file in files)
    assert len(model) == 3 and {each["question"] for each in model} == {"colour?"}
    assert all(each["completion"] == each["answer"] for each in model)
    assert [each["no_images"] for each in model] == [each["completion"] for each in baseline]
    assert [each["image"] for each in model] == [each["image"] for each in baseline]


# --- kill and resume -----------------------------------------------------------------------------


@pytest.mark.parametrize("own", [CLIP, [*INSTRUCT, *MIXED]])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(own, here):
    assert_resumes("train_vlm.py", [*own, "--steps", 12, "--eval_every", 4], last=10)


FOUR_STEPS = ["--steps", 4, "--eval_every", 2]


@pytest.fixture
def all_stages(here):
    """The four folders of an uninterrupted call."""
    if not Path("runs/all").exists():
        vlm(ALL, *FOUR_STEPS, out="runs/all")


@pytest.mark.parametrize("stage, step", [("-align", 3), ("", 1)])  # its first checkpoint is at 2
def test_all_stages_go_on_where_one_was_killed_and_end_as_without(
    stage, step, all_stages, monkeypatch
):
    advance = Run.advance

    def killed(self, *args, **metrics):
        advance(self, *args, **metrics)
        if self.folder == Path(f"runs/some{stage}") and self.step == step:
            raise Killed

    shutil.rmtree("runs/some", ignore_errors=True)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "advance", killed)
        vlm(ALL, *FOUR_STEPS, out="runs/some")
    done = Path("runs/some-clip/state.pt").stat().st_mtime_ns
    torch.manual_seed(99)
    vlm(["--resume"], out="runs/some")
    assert Path("runs/some-clip/state.pt").stat().st_mtime_ns == done
    for folder in ("", "-align", "-no_images"):
        assert same(weights(f"runs/all{folder}"), weights(f"runs/some{folder}")), folder
    assert same(*(safetensors.load_folder(f"runs/{name}-clip") for name in ("all", "some")))


def test_an_attempt_that_fails_leaves_the_finished_stages_alone(all_stages, capsys):
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")}
    for flags in (["--context", 65], ["--hard_negatives", 5], ["--data", "nowhere.jsonl"]):
        refused(capsys, train_vlm, *ALL, *flags, "--out", "runs/all")
    assert {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")} == before


def test_all_stages_move_the_earlier_ones_out_of_the_way(here):
    for seed in (0, 1):
        vlm(ALL, "--steps", 1, "--seed", seed, out="runs/twice")
    names = [f"runs/twice{stage}" for stage in ("", "-clip", "-align", "-no_images")]
    files = [Path(f"{name}.previous/train_config.json") for name in names]
    assert [json.loads(file.read_text())["seed"] for file in files] == [0] * 4


# --- several processes ---------------------------------------------------------------------------


@pytest.mark.parametrize("own", [TWICE, [*INSTRUCT, *MIXED, "--train_vision"]])
def test_two_processes_give_the_gradients_of_one(own, here):
    """After one step the optimizers' first moments are the gradients, up to a constant factor. In a
    batch of CLIP's every image has two captions; of the others the second process has texts alone.
    """
    flags = ["--steps", 1, "--grad_clip", 0]
    vlm(own, *flags, out="runs/one")
    as_two_processes("train_vlm.py", *own, *flags, "--out", "runs/two")
    one, two = first_moments("runs/one"), first_moments("runs/two")
    assert len(one) > 5
    for a, b in zip(one, two):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)
    losses = [read_metrics(name)[0]["loss"] for name in ("runs/one", "runs/two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# --- bad input -----------------------------------------------------------------------------------

ONE = json.dumps({"image": "red_left.png", "caption": "red"}) + "\n"
FILES = {
    "damaged.jsonl": ONE * 11 + '{"image": "damaged.png", "caption": "a"}',
    "single.jsonl": ONE,
    "long.jsonl": json.dumps({"image": "red_left.png", "caption": "a" * 200}),
    "long_examples.jsonl": json.dumps(
        {"image": "red_left.png", "prompt": "<image>" + "a" * 60, "answer": "red"}
    ),
    "damaged_examples.jsonl": '{"image": "damaged.png", "prompt": "<image>?", "answer": "red"}',
}
REFUSED = {
    "align without a tower": ([*ALIGN, "--vision", "none"], "is what --stage align needs"),
    "all without images": ([*ALL, "--no_images"], "goes with --stage instruct alone"),
    "instruct from text": ([*INSTRUCT, "--init", "runs/pretrain"], "without a vision tower"),
    "long caption": ([*CLIP, "--data", "long.jsonl"], "long.jsonl, line 1): shorten"),
    "captions for align": ([*ALIGN, "--data", "captions.jsonl"], 'needs "messages"'),
    "tests of clip on the village": ([*CLIP, "--test_data", "village"], "take at least 32 pixels"),
    "damaged image": ([*CLIP, "--data", "damaged.jsonl"], "damaged.png can't be read"),
    "one record": ([*CLIP, "--data", "single.jsonl", "--val_data", "none"], "too few records"),
    "negatives don't divide": ([*CLIP, "--hard_negatives", 5], "must divide --batch_size 12"),
    "negatives of more": (
        [*CLIP, "--hard_negatives", 24, "--batch_size", 24], "needs as many captions; there are 12"
    ),
    "row beyond the model": ([*ALIGN, "--context", 65], "beyond the model's context of 64"),
    "patches leave an edge": ([*CLIP, "--image_size", 20], "or the border is never seen"),
    "pixel shuffle of a class token": ([*ALL, "--projector", "pixel_shuffle"], "add --no_class"),
    "replay of no row": ([*INSTRUCT, "--replay", 0.01], "would be 0 of 12 rows"),
    "long examples": ([*INSTRUCT, "--test_data", "long_examples.jsonl"], "context of 64"),
    "damaged examples": ([*INSTRUCT, "--test_data", "damaged_examples.jsonl"], "damaged.png"),
    "adapter and tower": ([*INSTRUCT, "--adapter", "lora", "--train_vision"], "all,vision"),
    "all with damaged examples": ([*ALL, "--test_data", "damaged_examples.jsonl"], "damaged.png"),
    "all from a VLM": ([*ALL, "--init", "runs/align"], "not on one that has a tower"),
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


@pytest.mark.parametrize("own, out", [
    (CLIP, "runs/pretrain"), (ALIGN, "runs/pretrain"), (ALIGN, "runs/clip"),
    (INSTRUCT, "runs/align"), ([*ALL, "--init", "runs/text-clip"], "runs/text"),
])  # fmt: skip
def test_a_folder_that_the_run_reads_is_never_replaced(own, out, here, capsys):
    for name in ("runs/text", "runs/text-clip"):
        shutil.copytree("runs/pretrain", name, dirs_exist_ok=True)
    before = sorted(Path("runs").rglob("*"))
    said = refused(capsys, train_vlm, *own, "--out", out)
    assert "which the run reads" in said and sorted(Path("runs").rglob("*")) == before


def test_files_beside_out_that_are_no_run_stay_where_they_are(here, capsys):
    Path("mine-align").mkdir(exist_ok=True)
    Path("mine-align/thesis.txt").write_text("years of work")
    said = refused(capsys, train_vlm, *ALL, "--out", "mine")
    assert "mine-align holds files that no run has written; choose another --out" in said
    assert Path("mine-align/thesis.txt").exists() and not Path("mine").exists()


def test_weights_that_are_no_numbers_never_replace_a_checkpoint(here, capsys):
    vlm(CLIP, "--steps", 2, out="runs/finite")
    capsys.readouterr()
    rates = ["--muon_lr", 1e38, "--lr", 1e38, "--grad_clip", 0]
    flags = ["--out", "runs/finite", "--resume", "--steps", 9, "--eval_every", 1, *rates]
    assert "became" in refused(capsys, train_vlm, *flags)
    state = torch.load("runs/finite/state.pt", weights_only=True)
    assert state["step"] == 2 and all(p.isfinite().all() for p in state["model"].values())


def test_the_no_image_baseline_of_the_village_takes_half_the_steps():
    def steps(*flags):
        flags = ["--stage", "instruct", *flags]
        return train_vlm.complete_settings(parse(train_vlm.Config, train_vlm.PRESETS, flags)).steps

    assert 2 * steps("--no_images") == steps()
    assert steps("--no_images", "--data", "own.jsonl") == steps()
    assert steps("--no_images", "--steps", "8") == 8
