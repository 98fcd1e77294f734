"""The image towers and CLIP: equal to transformers', their losses, their folders."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from nanollm import safetensors
from nanollm.config import UserError
from nanollm.tokenizer import Tokenizer
from nanollm.vision.clip import CLIP, MAX_LOG_SCALE, TextConfig, save_clip
from nanollm.vision.images import ImageStore, Preprocessing
from nanollm.vision.vit import (
    CLIP_KIND,
    SIGLIP_KIND,
    VisionConfig,
    ViT,
    attention,
    load_vision,
    vision_config_of,
)
from train_vlm import Pairs, clip_loss, held_out_retrieval, retrieval, siglip_loss, split_by_image

# two shapes per kind; in the second the patches leave a rest of the image
SHAPES = {
    "even": dict(image_size=32, patch_size=8, hidden_size=32, intermediate_size=48)
    | dict(num_hidden_layers=3, num_attention_heads=4),
    "rest": dict(image_size=31, patch_size=7, hidden_size=24, intermediate_size=40)
    | dict(num_hidden_layers=2, num_attention_heads=3, layer_norm_eps=1e-3, hidden_act="gelu"),
}
KINDS = [(kind, shape) for kind in (CLIP_KIND, SIGLIP_KIND) for shape in SHAPES]
TEXT = dict(vocab_size=270, hidden_size=16, intermediate_size=24, num_hidden_layers=2) | dict(
    num_attention_heads=2, max_position_embeddings=12
)


def their_vision(transformers, randomised, kind, shape):
    name = "CLIP" if kind == CLIP_KIND else "Siglip"
    cfg = getattr(transformers, f"{name}VisionConfig")(**SHAPES[shape])
    return randomised(getattr(transformers, f"{name}VisionModel")(cfg).eval())


def whole_model(transformers, randomised, name, end=269):
    """A CLIPModel or SiglipModel with random weights."""
    ids = dict(bos_token_id=None, eos_token_id=end, pad_token_id=0)
    extra = dict(projection_dim=20) if name == "CLIP" else {}
    text = TEXT | ids | ({} if extra else dict(projection_size=32))
    cfg = getattr(transformers, f"{name}Config")(
        text_config=text, vision_config=SHAPES["even"], **extra
    )
    model = getattr(transformers, f"{name}Model")(cfg).eval()
    for seed, part in enumerate((model.text_model, model.vision_model)):
        randomised(part, seed)
    with torch.no_grad():
        model.logit_scale.fill_(1.5)
        if name == "Siglip":
            model.logit_bias.fill_(-0.7)
    return model


def images(size, n=3):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(7))


def small_vit(randomised, kind=CLIP_KIND, shape="even"):
    return randomised(ViT(VisionConfig(model_type=kind, **SHAPES[shape])).eval())


def save_tower(vit, size, folder, **changes):
    Preprocessing(size).save(folder)
    (folder / "config.json").write_text(json.dumps(asdict(vit.cfg) | changes))
    safetensors.save_file(vit.state_dict(), folder / "model.safetensors")


# --- the tower -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, shape", KINDS)
def test_a_folder_of_transformers_gives_its_outputs(
    transformers, randomised, tmp_path, kind, shape
):
    theirs = their_vision(transformers, randomised, kind, shape)
    theirs.save_pretrained(tmp_path)
    Preprocessing(theirs.config.image_size).save(tmp_path)
    vit, _ = load_vision(tmp_path)
    names = {name for name in theirs.state_dict() if not name.startswith("head.")}
    assert names and vit.state_dict().keys() == names
    x = images(vit.cfg.image_size)
    expected = theirs(x, output_hidden_states=True)
    first = 1 if kind == CLIP_KIND else 0  # the class token
    if first:
        assert torch.allclose(vit(x), expected.pooler_output, atol=1e-5)
    for layer in range(-len(expected.hidden_states), len(expected.hidden_states)):
        features = vit.features(x, layer)
        assert features.shape == (3, vit.cfg.num_patches, vit.cfg.hidden_size)
        assert torch.allclose(features, expected.hidden_states[layer][:, first:], atol=1e-5)


@pytest.mark.parametrize("kind", [CLIP_KIND, SIGLIP_KIND])
def test_gradients_equal_those_of_transformers(transformers, randomised, kind):
    theirs = their_vision(transformers, randomised, kind, "rest")
    vit = small_vit(randomised, kind, "rest")
    vit.load_state_dict(theirs.state_dict(), strict=False)
    x = images(31)
    last = theirs(x, output_hidden_states=True).hidden_states[-1]
    theirs.post_layernorm(last).square().mean().backward()
    vit.post_layernorm(vit.features(x, -1, class_token=True)).square().mean().backward()
    expected = dict(theirs.named_parameters())
    for name, p in vit.named_parameters():
        assert torch.allclose(p.grad, expected[name].grad, rtol=1e-4, atol=1e-6), name


def test_attention_written_out_in_bf16_is_that_of_torch():
    q, k, v = torch.randn(3, 2, 9, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    rough, exact = attention(q, k, v, 3), attention(q.float(), k.float(), v.float(), 3)
    assert rough.dtype == torch.bfloat16 and rough.shape == (2, 9, 12)
    assert (rough - exact).abs().max() < 0.02
    causal = attention(q, k, v, 3, causal=True)
    assert torch.allclose(causal[:, 0], v[:, 0]) and not torch.allclose(causal, rough)


def test_features_run_no_block_above_the_wanted_layer(randomised):
    vit = small_vit(randomised)
    with torch.no_grad():
        vit.encoder.layers[-1].mlp.fc1.weight.fill_(float("nan"))
    assert vit.features(images(32)).isfinite().all()  # -2, the default
    assert vit.features(images(32), -1).isnan().all()


def test_patches_come_in_rows_from_the_top():
    vit = ViT(VisionConfig(num_hidden_layers=1))
    x = images(64, n=1)
    changed = x.clone()
    changed[:, :, 8:16, 24:32] += 1  # second row of patches, fourth column
    before, after = vit.features(x, 0), vit.features(changed, 0)
    assert (before != after).any(-1).nonzero().tolist() == [[0, 8 + 3]]


def test_in_bf16_the_outputs_stay_near_and_the_weights_in_fp32():
    vit = ViT(VisionConfig())
    x = images(64)
    exact = vit.features(x)
    vit.compute_dtype = torch.bfloat16
    rough = vit.features(x)
    assert rough.dtype == vit(x).dtype == torch.bfloat16
    assert (rough.float() - exact).abs().mean() < 0.02 * exact.abs().mean()
    assert {p.dtype for p in vit.parameters()} == {torch.float32}


# --- folders of towers ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_the_vision_part_of_a_whole_model_in_shards(transformers, randomised, tmp_path, name):
    theirs = whole_model(transformers, randomised, name)
    theirs.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    Preprocessing(32).save(tmp_path)
    vit, _ = load_vision(tmp_path)
    x = images(32)
    expected = theirs.vision_model(x, output_hidden_states=True).hidden_states[-1]
    assert torch.allclose(vit.features(x, -1, class_token=True), expected, atol=1e-5)


def test_names_of_older_versions_load(randomised, tmp_path):
    vit = small_vit(randomised)
    save_tower(vit, 32, tmp_path)
    old = {f"vision_model.{name}": x for name, x in vit.state_dict().items()}
    old["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    old["visual_projection.weight"] = torch.zeros(4, 32)  # CLIPVisionModelWithProjection
    safetensors.save_file(old, tmp_path / "model.safetensors")
    assert torch.equal(load_vision(tmp_path)[0](images(32)), vit(images(32)))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_where_config_json_is_silent_it_means_what_transformers_means(transformers, kind):
    silent = {"model_type": kind, "vision_config": {"model_type": f"{kind}_vision_model"}}
    cfg = vision_config_of(silent, Path("config.json"))
    name = "CLIP" if kind == "clip" else "Siglip"
    theirs = getattr(transformers, f"{name}VisionConfig")()
    for field, value in vars(cfg).items():
        assert getattr(theirs, field) == value, field


CONFIG_FAULTS = [
    (dict(model_type="dinov2"), "model_type 'dinov2' is not one of clip_vision_model"),
    (dict(hidden_act="relu"), "hidden_act 'relu'"),
    (dict(num_hidden_layers=4), "Missing .*encoder.layers.3"),
    (dict(num_hidden_layers=2), "Unexpected .*encoder.layers.2"),
    (dict(image_size=40), "size mismatch for .*position_embedding.weight"),
    (dict(size=64), "it must make 32 x 32 pixels, which the ViT reads"),
]


@pytest.mark.parametrize("changes, message", CONFIG_FAULTS)
def test_folders_that_do_not_fit_are_named(randomised, tmp_path, changes, message):
    changes = {"size": 32} | changes
    save_tower(small_vit(randomised), changes.pop("size"), tmp_path, **changes)
    with pytest.raises(UserError, match=message) as error:
        load_vision(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


# --- losses --------------------------------------------------------------------------------------


def pairs_of(n):
    return torch.eye(n, dtype=torch.bool)


def test_losses_of_two_orthogonal_pairs_by_hand():
    x, zero = torch.eye(2), torch.tensor(0.0)  # exp(0) = 1, so s is the identity
    # -log(e / (e + 1)) each way
    loss = clip_loss(x, x, zero, pairs_of(2)).item()
    assert loss == pytest.approx(math.log(1 + math.exp(-1)))
    # a row: the pair asks sigmoid(1), the other cell sigmoid(-0)
    loss = siglip_loss(x, x, zero, zero, pairs_of(2)).item()
    assert loss == pytest.approx(math.log(1 + math.exp(-1)) + math.log(2))


def test_a_second_caption_of_an_image_is_no_negative_of_it():
    """Three pairs, the first two of one image: s = [[1, 1, 0], [1, 1, 0], [0, 0, 1]]."""
    x, zero, e = torch.eye(2)[[0, 0, 1]], torch.tensor(0.0), math.e
    positives = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
    # of the first two rows a cell is left out: -log(e / (e + 1)); the third: -log(e / (e + 2))
    expected = (2 * math.log(1 + 1 / e) + math.log(1 + 2 / e)) / 3
    assert clip_loss(x, x, zero, positives).item() == pytest.approx(expected)
    # five cells ask sigmoid(1), four sigmoid(-0)
    expected = (5 * math.log(1 + 1 / e) + 4 * math.log(2)) / 3
    assert siglip_loss(x, x, zero, zero, positives).item() == pytest.approx(expected)
    # were they negatives, a perfect model would still lose log 2 on the first two
    perfect = clip_loss(x, x, torch.tensor(9.0), pairs_of(3)).item()
    assert perfect == pytest.approx(2 / 3 * math.log(2))
    assert clip_loss(x, x, torch.tensor(9.0), positives).item() == 0


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_losses_and_gradients_equal_those_of_transformers(transformers, randomised, name):
    theirs, n = whole_model(transformers, randomised, name), 5
    tokens = torch.randint(0, 269, (n, 6), generator=torch.Generator().manual_seed(1))
    tokens[:, -1] = 269
    out = theirs(input_ids=tokens, pixel_values=images(32, n), return_loss=True)
    numbers = [theirs.logit_scale] + ([theirs.logit_bias] if name == "Siglip" else [])
    wrt = [out.image_embeds, out.text_embeds, *numbers]
    expected = torch.autograd.grad(out.loss, wrt)
    ours = [x.detach().clone().requires_grad_() for x in wrt]
    loss = (clip_loss if name == "CLIP" else siglip_loss)(*ours, pairs_of(n))
    assert torch.allclose(loss, out.loss, atol=1e-6)
    for mine, theirs in zip(torch.autograd.grad(loss, ours), expected):
        assert torch.allclose(mine, theirs, atol=1e-6)


def test_retrieval_counts_both_ways():
    images = torch.eye(4)
    texts = images[[0, 1, 2, 2]]  # the last text lies on the third image
    found = {"text_to_image": 0.75, "image_to_text": 0.75, "cosine": 0.75}
    assert retrieval(images, texts, pairs_of(4)) == found
    # all texts alike: each finds the first image, each image the first text
    assert retrieval(images, torch.ones(4, 4), pairs_of(4))["text_to_image"] == 0.25
    # the last two rows are one image: either of its captions, and either row, is right
    same = pairs_of(4) | torch.tensor([0, 0, 1, 1]).bool().outer(torch.tensor([0, 0, 1, 1]).bool())
    found = retrieval(images[[0, 1, 2, 2]], images[[0, 1, 3, 2]], same)
    assert found == {"text_to_image": 0.75, "image_to_text": 1.0, "cosine": 0.75}


@pytest.fixture
def pairs(tokenizer, tmp_path):
    """Seven captions of four images: red stands in two files, dark in one, green, blue."""
    colours = {"r": (250, 0, 0), "r2": (250, 0, 0), "d": (90, 0, 0), "g": (0, 250, 0)}
    for name, colour in (colours | {"b": (0, 0, 250)}).items():
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    said = "r red, g green, r2 rose, g grass, b blue, d red, g good".split(", ")
    records = [{"image": str(tmp_path / f"{x.split()[0]}.png")} for x in said]
    records = [r | {"caption": x.split()[1]} for r, x in zip(records, said)]
    return Pairs(records, ImageStore(Preprocessing(8, mean=(0,) * 3)), tokenizer)


def test_a_batch_of_captions_ends_with_the_end_token_and_is_padded_to_the_longest(pairs, tokenizer):
    images, tokens = pairs.batch(torch.tensor([0, 2]), "cpu")
    end, pad = tokenizer.end_id, tokenizer.pad_id
    assert images.shape == (2, 3, 8, 8)
    assert tokens.tolist() == [[*b"red", end, pad], [*b"rose", end]]


def test_pairs_know_every_caption_of_an_image_and_every_image_of_a_caption(pairs):
    chosen = torch.tensor([6, 1, 0, 2, 4, 5])
    named = ["good", "green", "red", "rose", "blue", "red of the dark one"]
    found = {name: [] for name in named}
    for row, column in pairs.positives(chosen, "cpu").nonzero().tolist():
        found[named[row]].append(named[column])
    assert found == {
        "good": ["good", "green"],
        "green": ["good", "green"],
        "red": ["red", "rose", "red of the dark one"],  # the last is the same text
        "rose": ["red", "rose", "red of the dark one"],  # of an equal image in another file
        "blue": ["blue"],
        "red of the dark one": ["red", "red of the dark one"],  # nobody has called it a rose
    }


@pytest.mark.parametrize("among, sizes", [(64, [7]), (2, [5, 2])])
def test_held_out_retrieval_shows_so_many_images_with_all_their_captions(pairs, among, sizes):
    shown = []

    class Colours:  # a CLIP that embeds an image as its colour, a caption by its first letter
        device = "cpu"

        def __call__(self, images, tokens):
            shown.append(len(images))
            x, letters = F.normalize(images.mean((2, 3))), torch.tensor([ord(c) for c in "rgb"])
            return x, (tokens[:, :1] == letters).float()

    found = held_out_retrieval(Colours(), pairs, among)
    assert shown == sizes and found == pytest.approx(dict.fromkeys(found, 1.0))


def test_the_last_images_are_held_out_with_all_that_is_said_of_them():
    captions = [{"image": name, "caption": text} for name, text in zip("abacbad", "1234567")]
    train, val = split_by_image(captions, 0.5)
    assert "".join(r["caption"] for r in train) == "12356"
    assert "".join(r["caption"] for r in val) == "47"
    chats = [{"images": list(names)} for names in ("a", "", "ab", "cd", "a", "d")]
    assert split_by_image(chats, 0.25) == [[chats[i] for i in (0, 1, 2, 4)], [chats[3], chats[5]]]


# --- CLIP ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigmoid", [False, True])
def test_transformers_opens_what_save_clip_writes_and_we_the_tower(
    transformers, randomised, tokenizer, tmp_path, sigmoid
):
    end = tokenizer.end_id
    text = TextConfig(**TEXT, eos_token_id=end, hidden_act="quick_gelu")
    clip = CLIP(VisionConfig(**SHAPES["rest"]), text, projection_dim=20, sigmoid=sigmoid)
    randomised(clip.vision_model), randomised(clip.text_model)
    save_clip(clip, tokenizer, tmp_path, Preprocessing(31))
    theirs, report = transformers.CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert set(report["unexpected_keys"]) == ({"logit_bias"} if sigmoid else set())
    # padded behind the first end token, with another end token, and full
    tokens = torch.tensor([[5, 6, end, 0, 0], [7, end, 9, end, 3], [1, 2, 3, 4, end]])
    out = theirs.eval()(input_ids=tokens, pixel_values=images(31))
    x, y = clip(images(31), tokens)
    assert torch.allclose(x, out.image_embeds, atol=1e-5)
    assert torch.allclose(y, out.text_embeds, atol=1e-5)
    assert transformers.AutoImageProcessor.from_pretrained(tmp_path).size["height"] == 31
    assert Tokenizer.load(tmp_path) == tokenizer
    vit, preprocessing = load_vision(tmp_path)
    assert vit.cfg == clip.vision_model.cfg and preprocessing == Preprocessing(31)
    assert torch.equal(vit(images(31)), clip.vision_model(images(31)))


def test_the_scale_starts_as_in_the_papers_and_is_limited():
    cfgs = VisionConfig(**SHAPES["even"]), TextConfig(**TEXT)
    clip, sigmoid = CLIP(*cfgs), CLIP(*cfgs, sigmoid=True)
    assert clip.logit_scale.exp().item() == pytest.approx(1 / 0.07) and clip.logit_bias is None
    assert sigmoid.logit_scale.exp().item() == pytest.approx(10)
    assert sigmoid.logit_bias.item() == -10
    torch.nn.init.constant_(clip.logit_scale, 7.0)
    clip.limit_scale()
    assert clip.logit_scale.item() == pytest.approx(MAX_LOG_SCALE)
