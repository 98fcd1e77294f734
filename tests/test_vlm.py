"""The vision-language model: LLaVA's equal, placeholders, generation with images, files, chat."""

import json

import pytest
import torch
from conftest import SMALL, randomise
from PIL import Image

from nanollm import chat, safetensors
from nanollm.batches import Packed, pack, pack_chats, pad_completions
from nanollm.config import TrainConfig, UserError
from nanollm.formats import IMAGE
from nanollm.generate import generate, sample_completions, stream
from nanollm.gpt import GPTConfig, count_parameters, document_mask
from nanollm.hub import load_model, save_model
from nanollm.logprobs import completion_logprobs
from nanollm.metrics import accuracy_by_task
from nanollm.optim import PROJECTOR, build_optimizer
from nanollm.peft import adapters
from nanollm.peft.method import BASE, Around, peft_name
from nanollm.records import read_examples, read_image_chats
from nanollm.runtime import Runtime
from nanollm.vision.images import ImageStore, Preprocessing
from nanollm.vision.vit import CLIP_KIND, SIGLIP_KIND, VisionConfig, ViT
from nanollm.vision.vlm import ACTIVATIONS, VLM, Projector, build_vlm

TOWER = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
CONTEXT = 128


def make(tokenizer, projector="mlp", tower=CLIP_KIND, seed=0, **changes):
    """A small VLM, every parameter random."""
    shape = SMALL | {"max_position_embeddings": CONTEXT} | changes
    vision = ViT(VisionConfig(**TOWER, model_type=tower))
    vlm = VLM(GPTConfig(**shape), vision, projector, tokenizer.special[IMAGE]).eval()
    randomise(vlm, seed)
    vlm.preprocessing = Preprocessing(16)
    return vlm


@pytest.fixture
def vlm(tokenizer):
    return make(tokenizer, "pixel_shuffle")  # 4 tokens per image


def some_images(n, seed=0):
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def ask(vlm, tokenizer, text):
    """Ids of a question whose <image> are expanded."""
    messages = [{"role": "user", "content": text}]
    return tokenizer.render(messages, True, vlm.tokens_per_image)[0]


@torch.no_grad()
def logits_of(vlm, ids, images=None):
    return vlm(torch.tensor([ids]), images=images)[0]


@torch.no_grad()
def equal_to_theirs(vlm, theirs, tokenizer, atol=1e-5):
    """Does a model of transformers give the VLM's logits?"""
    ids, images = ask(vlm, tokenizer, "<image> and <image>?"), some_images(2)
    expected = theirs.eval()(input_ids=torch.tensor([ids]), pixel_values=images).logits[0]
    return torch.allclose(logits_of(vlm.eval(), ids, images), expected, atol=atol)


# --- the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tower", [CLIP_KIND, SIGLIP_KIND])
@pytest.mark.parametrize("projector", ["mlp", "linear"])
def test_llava_of_transformers_opens_our_folder_and_we_theirs_with_the_same_logits(
    tower, projector, tokenizer, tmp_path, transformers
):
    vlm = make(tokenizer, projector, tower)
    save_model(vlm, tokenizer, tmp_path / "ours")
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert equal_to_theirs(vlm, theirs, tokenizer)
    if projector == "mlp":  # a linear one is nothing that theirs writes
        randomise(theirs, seed=3)
        theirs.save_pretrained(tmp_path / "theirs")
        tokenizer.save(tmp_path / "theirs")
        Preprocessing(16).save(tmp_path / "theirs")
        assert equal_to_theirs(load_model(tmp_path / "theirs")[0], theirs, tokenizer)


@pytest.mark.parametrize("tower", [CLIP_KIND, SIGLIP_KIND])
def test_their_processor_makes_our_ids_and_pixels(tower, tokenizer, tmp_path, transformers):
    vlm = make(tokenizer, "mlp", tower)
    save_model(vlm, tokenizer, tmp_path)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    image = Image.new("RGB", (20, 30), (200, 10, 90))
    made = processor(
        text="<|user|>a <image> b<|end|><|assistant|>", images=[image], return_tensors="pt"
    )
    assert made["input_ids"][0].tolist() == ask(vlm, tokenizer, "a <image> b")
    assert torch.allclose(made["pixel_values"][0], vlm.preprocessing(image), atol=1e-6)


def test_transformers_refuses_what_it_would_get_wrong(vlm, tokenizer, tmp_path, transformers):
    save_model(vlm, tokenizer, tmp_path)
    with pytest.raises(ValueError, match="nanollm_vlm"):
        transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    with pytest.raises(RuntimeError):
        transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)


def test_pixel_shuffle_puts_neighbouring_patches_side_by_side():
    projector = Projector(1, 4, "pixel_shuffle")
    projector.linear_1, projector.linear_2 = torch.nn.Identity(), None
    patches = torch.arange(16.0).view(1, 16, 1)  # a grid of 4 x 4
    assert projector(patches)[0].tolist() == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
        [8, 9, 12, 13],
        [10, 11, 14, 15],
    ]


def test_a_projector_that_does_not_fit_is_refused():
    for patches in (9, 12):
        with pytest.raises(UserError, match=f"not {patches} patches"):
            Projector(8, 8, "pixel_shuffle")(torch.zeros(1, patches, 8))


# --- placeholders --------------------------------------------------------------------------------


@pytest.mark.parametrize("P, places", [(1, 8), (3, 8), (None, 8), (1, 0)])
def test_other_placeholders_than_features_stop_the_model(P, places, vlm):
    ids = [1, 2] + [vlm.image_id] * places
    images = None if P is None else some_images(P)
    wanted = f"{places} placeholders, but {P or 0} images of 4 tokens each need {4 * (P or 0)}"
    with pytest.raises(UserError, match=wanted):
        logits_of(vlm, ids, images)


def test_another_image_gives_other_logits_behind_it_and_the_same_before_it(vlm, tokenizer):
    ids = ask(vlm, tokenizer, "what is <image>?")
    place = ids.index(vlm.image_id)
    one, other = (logits_of(vlm, ids, some_images(1, seed)) for seed in (0, 1))
    assert torch.equal(one[:place], other[:place])
    assert (one[place:] - other[place:]).abs().amax(-1).min() > 1e-3


def test_images_go_to_the_rows_in_the_order_of_their_placeholders_and_none_to_rows_of_text(
    vlm, tokenizer
):
    shown, images = ask(vlm, tokenizer, "a <image><image>b"), some_images(4)
    text = tokenizer.encode("the rain in spain!" * 3)[: len(shown)]
    with torch.no_grad():
        together = vlm(torch.tensor([shown, text, shown]), images=images)
    assert torch.allclose(together[0], logits_of(vlm, shown, images[:2]), atol=1e-5)
    assert torch.allclose(together[1], logits_of(vlm, text), atol=1e-5)
    assert torch.allclose(together[2], logits_of(vlm, shown, images[2:]), atol=1e-5)


# --- training ------------------------------------------------------------------------------------


def grads(vlm):
    return {n for n, p in vlm.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


@pytest.mark.parametrize("parts", ["vision", "projector", "language", "vision projector language"])
def test_the_parts_that_are_trained_get_a_gradient_and_the_others_none(parts, vlm, tokenizer):
    vlm.train_parts(**{part: part in parts for part in ("vision", "projector", "language")})
    vlm(torch.tensor([ask(vlm, tokenizer, "<image>?")]), images=some_images(1)).sum().backward()
    names = tuple(f"{part}." for part in parts.replace("language", "model").split())
    behind = ("vision.encoder.layers.2.", "vision.post_layernorm.")  # features are state -2
    wanted = {n for n, _ in vlm.named_parameters() if n.startswith(names)}
    assert grads(vlm) == {n for n in wanted if not n.startswith(behind)}
    assert grads(vlm) == {n for n, p in vlm.named_parameters() if p.requires_grad}


def test_batches_of_text_and_of_images_go_through_ddp_in_any_order(vlm, tokenizer, tmp_path):
    """It complains of a parameter that got no gradient when the next step begins; as strictly with
    one process as with many.
    """
    where = f"file://{tmp_path}/meeting"
    torch.distributed.init_process_group("gloo", init_method=where, rank=0, world_size=1)
    vlm.train().train_parts(vision=True, projector=True, language=True)
    ddp_model = torch.nn.parallel.DistributedDataParallel(vlm)
    text, shown = torch.tensor([[1, 2, 3]]), torch.tensor([ask(vlm, tokenizer, "<image>?")])
    try:
        for tokens in (text, shown, text, text):
            vlm.zero_grad()
            ddp_model(tokens, images=None if tokens is text else some_images(1)).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert vlm.projector.linear_1.weight.grad.abs().max() == 0  # the last batch was text


def test_muon_takes_the_matrices_of_the_vision_blocks_too_and_a_projector_learns_slowly(vlm):
    vlm.train_parts(vision=True, projector=True, language=True)
    muon, adam = (
        {id(p): group["lr"] for group in each.param_groups for p in group["params"]}
        for each in build_optimizer(vlm, TrainConfig(lr=1.0, muon_lr=1.0)).optimizers
    )
    assert muon[id(vlm.vision.encoder.layers[0].mlp.fc1.weight)] == 1.0
    assert muon[id(vlm.projector.linear_1.weight)] == PROJECTOR
    assert adam[id(vlm.vision.embeddings.patch_embedding.weight)] == 1.0


def test_flop_of_a_token_leave_the_vision_tower_out(vlm, random_model):
    total, through = count_parameters(vlm)
    assert total == sum(p.numel() for p in vlm.parameters())
    assert through == count_parameters(random_model())[1]
    untied = random_model(tie_word_embeddings=False)
    assert count_parameters(untied)[1] == through  # a head more, and an embedding less


# --- adapters ------------------------------------------------------------------------------------


def adapted(vlm, method="lora", targets="all"):
    adapters.attach(vlm, method, adapters.Settings(rank=4, alpha=8.0, targets=targets))
    with torch.no_grad():
        for name, p in vlm.named_parameters():
            if name.endswith((".lora_B", ".up.weight")):
                p.normal_(std=0.3)
        vlm.projector.linear_1.weight.mul_(1.5)
    return vlm


@pytest.mark.parametrize("targets", ["all", "vision", "all,vision"])
@pytest.mark.parametrize("method, layers", [("lora", 6), ("dora", 6), ("bottleneck", 2)])
def test_an_adapter_goes_around_layers_that_have_a_part_in_what_is_read_and_the_projector_learns(
    method, layers, targets, vlm, tokenizer, tmp_path
):
    save_model(vlm, tokenizer, tmp_path / "base")
    ids, images = ask(vlm, tokenizer, "<image>?"), some_images(1)
    before = vlm.encode_images(images)
    adapted(vlm, method, targets).base_folder = tmp_path / "base"
    around = [name for name, module in vlm.named_modules() if isinstance(module, Around)]
    in_tower = [name.split(".")[3] for name in around if name.startswith("vision.encoder.layers.")]
    assert in_tower == (["0"] * layers + ["1"] * layers if "vision" in targets else [])  # of three
    assert (len(around) > len(in_tower)) == targets.startswith("all")  # state -2 is read
    trained = {name for name, p in vlm.named_parameters() if p.requires_grad}
    assert all(name.startswith((*around, "projector.")) for name in trained)
    assert {n for n, _ in vlm.named_parameters() if n.startswith("projector.")} <= trained
    assert torch.allclose(vlm.encode_images(images), before, atol=1e-2) == (targets == "all")
    expected = logits_of(vlm, ids, images)
    vlm.train()
    loss = vlm(torch.tensor([ids]), images=images).square().mean()
    loss.backward()  # through all that is trained
    assert all(p.grad is not None for p in vlm.parameters() if p.requires_grad)
    save_model(vlm.eval(), tokenizer, tmp_path / "adapter")
    loaded = load_model(tmp_path / "adapter")[0].eval()
    assert torch.allclose(logits_of(loaded, ids, images), expected, atol=1e-4)
    written = generate(vlm, [ids], 6, temperature=0, images=[images]).lists()
    assert written == [slow_greedy(vlm, ids, images, 6)]
    assert torch.equal(logits_of(vlm, ids, images), expected)  # sampling has merged a copy


@pytest.mark.parametrize("targets", ["all", "vision", "q_proj,vision"])
def test_peft_opens_and_merges_the_adapter_of_a_vlm_as_we_do(
    targets, tokenizer, tmp_path, transformers
):
    peft = pytest.importorskip("peft")
    vlm = make(tokenizer, "mlp")
    save_model(vlm, tokenizer, tmp_path / "base")
    adapted(vlm, targets=targets).base_folder = tmp_path / "base"
    save_model(vlm, tokenizer, tmp_path / "adapter")
    base = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert equal_to_theirs(vlm, theirs, tokenizer, atol=1e-4)
    theirs, ours = theirs.merge_and_unload().state_dict(), load_model(tmp_path / "adapter")[0]
    for name, tensor in ours.state_dict().items():
        name = peft_name(vlm, name).removeprefix(BASE)
        torch.testing.assert_close(tensor, theirs[name], atol=1e-6, rtol=1e-5)


# --- generation ----------------------------------------------------------------------------------


def four_prompts(vlm, tokenizer):
    """Prompts of different lengths with 1, 0, 2 and 0 images."""
    texts = ["<image>what?", "hm", "is <image> left of <image>, or not at all?", "a longer text"]
    prompts = [ask(vlm, tokenizer, text) for text in texts]
    images = some_images(3)
    return prompts, [images[:1], None, images[1:], images[:0]]


@torch.no_grad()
def slow_greedy(vlm, prompt, images, n):
    """The obvious loop: the whole sequence anew for every token."""
    ids = list(prompt)
    for _ in range(n):
        shown = images if images is not None and len(images) else None
        logits = vlm(torch.tensor([ids]), images=shown)[0, -1]
        logits[vlm.image_id] = float("-inf")
        ids.append(logits.argmax().item())
    return ids[len(prompt) :]


def test_a_padded_batch_of_images_and_text_is_continued_as_one_by_one(vlm, tokenizer):
    prompts, images = four_prompts(vlm, tokenizer)
    greedy = [slow_greedy(vlm, p, x, 6) for p, x in zip(prompts, images)]
    out = generate(vlm, prompts, 6, samples=3, temperature=0, images=images)
    assert out.lists() == [row for row in greedy for _ in range(3)]
    how = {"temperature": 0, "batch_size": 2, "images": images}  # sorted by length
    completions = sample_completions(vlm, tokenizer, prompts, 6, **how)
    for prompt, shown, slow, completion in zip(prompts, images, greedy, completions):
        assert list(stream(vlm, prompt, 6, temperature=0, images=shown)) == slow
        ends = [i + 1 for i, token in enumerate(slow) if token in tokenizer.stop_ids]
        assert completion == slow[: min(ends, default=6)]


def test_the_vision_tower_runs_once_per_prompt(vlm, tokenizer, monkeypatch):
    seen, features = [], ViT.features
    monkeypatch.setattr(
        ViT, "features", lambda self, x, *how: (seen.append(len(x)), features(self, x, *how))[1]
    )
    prompts, images = four_prompts(vlm, tokenizer)
    generate(vlm, prompts, 6, samples=3, temperature=0, images=images)
    assert seen == [3]


def test_a_placeholder_is_never_drawn(vlm, tokenizer):
    vlm.model.embed_tokens.weight.data[vlm.image_id] *= 20  # tied: a loud row of the head
    prompts, images = four_prompts(vlm, tokenizer)
    out = generate(vlm, prompts, 20, samples=4, images=images)
    assert vlm.image_id not in {token for row in out.lists() for token in row}


def test_in_bf16_the_masters_stay_fp32_and_the_logprobs_near(vlm, tokenizer):
    prompts, images = four_prompts(vlm, tokenizer)
    before = {name: p.clone() for name, p in vlm.named_parameters()}
    exact = generate(vlm, prompts, 1, temperature=0, images=images).logprobs
    vlm.compute_dtype = torch.bfloat16
    rough = generate(vlm, prompts, 1, temperature=0, images=images).logprobs
    assert (exact - rough).abs().max() < 0.3
    for name, p in vlm.named_parameters():
        assert p.dtype == torch.float32 and torch.equal(p, before[name]), name


def test_images_of_another_prompt_are_refused_even_where_the_total_fits(vlm, tokenizer):
    prompts, images = four_prompts(vlm, tokenizer)
    with pytest.raises(UserError, match="prompt 0: 4 placeholders, but 2 images .* need 8"):
        generate(vlm, prompts, 2, images=[images[2], None, images[0], None])


def test_completions_are_scored_with_their_images(vlm, tokenizer):
    prompts, images = four_prompts(vlm, tokenizer)
    completions = [[5, 6, 7], [8], [9, 10], [11, 12]]
    rows = pad_completions(prompts, completions, tokenizer.pad_id, images=images)
    with torch.no_grad():
        scored = completion_logprobs(vlm, rows)
    for row, prompt, completion, own in zip(scored, prompts, completions, images):
        own = own if own is not None and len(own) else None
        fresh = logits_of(vlm, prompt + completion, own)
        fresh[:, vlm.image_id] = -torch.inf  # never drawn
        fresh = fresh.log_softmax(-1)
        for t, token in enumerate(completion, start=len(prompt)):
            assert row[t - 1].item() == pytest.approx(fresh[t - 1, token].item(), abs=1e-4)


# --- data ----------------------------------------------------------------------------------------


@pytest.fixture
def album(tmp_path):
    """Three plain images a.png, b.png, c.png, and a function that writes rows of JSONL."""
    for name, colour in zip("abc", [(250, 0, 0), (0, 250, 0), (0, 0, 250)]):
        Image.new("RGB", (20, 20), colour).save(tmp_path / f"{name}.png")

    def write(*rows, name="rows.jsonl"):
        text = "\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def row(image, asked, answer="yes", **more):
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return {"image": image, "messages": turns, **more} if image else {"messages": turns, **more}


def test_rows_with_one_image_several_and_none_are_read_and_llavas_json_array(album):
    path = album(row("a.png", "<image>"), row(["b.png", "a.png"], "<image><image>"), row(None, "?"))
    chats, place = read_image_chats(path), path.parent
    names = [[image.removeprefix(f"{place}/") for image in chat["images"]] for chat in chats]
    assert names == [["a.png"], ["b.png", "a.png"], []]
    turns = [{"from": "human", "value": "<image>\nred?"}, {"from": "gpt", "value": "yes"}]
    llava = {"id": "1", "image": "a.png", "conversations": turns}
    [read] = read_image_chats(album(llava, name="llava.json"))
    assert read["messages"][0] == {"role": "user", "content": "<image>\nred?"}
    assert read["images"] == [str(place / "a.png")]
    [read] = read_examples(album(llava | {"answer": "yes"}))
    assert [m["role"] for m in read["messages"]] == ["user"] and read["task"] == "all"


def test_packed_rows_know_their_images_in_order_and_rows_of_text_join_them():
    examples = [([1] * n, [True] * n) for n in (12, 30, 10, 28)]
    rows = pack(examples, 40, pad_id=0, images=[[7], [8, 9], [], [4]])
    # longest first: 30 and 10 share a row, and so do 28 and 12
    assert rows.images == [[8, 9], [4, 7]]
    assert rows[torch.tensor([1, 0])].image_numbers() == [4, 7, 8, 9]
    assert rows[slice(1, 2)].image_numbers() == [4, 7]
    text = pack([([2] * 40, [True] * 40)], 40, 0)
    assert text.images is None and Packed.join([text, text]).images is None
    assert Packed.join([rows, text]).images == [[8, 9], [4, 7], None]
    assert Packed.join([text, rows]).to("cpu").image_numbers() == [8, 9, 4, 7]


def test_packed_dialogues_give_the_loss_of_each_alone(vlm, tokenizer, album, capsys):
    """Attention stays inside a dialogue, images go to their own placeholders."""
    chats = read_image_chats(
        album(
            row("a.png", "<image>hm"), row("b.png", "so <image>?"), row(None, "no"), row(None, "ah")
        )
    )
    store = ImageStore(vlm.preprocessing)
    rt = Runtime(torch.device("cpu"), torch.float32)
    rows = pack_chats(chats, tokenizer, 40, "training", rt, 4, store)
    assert "4 dialogues with 2 images in 2 rows" in capsys.readouterr().out
    with torch.no_grad():
        logits = vlm(
            rows.tokens,
            rows.positions,
            document_mask(rows.documents),
            images=store.images(rows.image_numbers()),
        )
    found = 0
    for each in chats:
        ids, _ = tokenizer.render(each["messages"], image_tokens=vlm.tokens_per_image)
        alone = logits_of(vlm, ids, store.of(each["images"]))
        for r, tokens in enumerate(rows.tokens.tolist()):
            for start in range(len(tokens) - len(ids) + 1):
                if tokens[start : start + len(ids)] == ids:
                    assert torch.allclose(logits[r, start : start + len(ids)], alone, atol=1e-4)
                    found += 1
    assert found == 4


def test_a_dialogue_is_cut_between_turns_and_never_inside_an_image(vlm, tokenizer, album):
    two = row("a.png", "<image>one")
    two["messages"] += row("b.png", "<image>two")["messages"]
    chats = read_image_chats(album(two | {"image": ["a.png", "b.png"]}))
    store = ImageStore(vlm.preprocessing)
    whole = 4 + 3 + 2 + 3 + 2  # placeholders, "one", its markers, "yes", its markers
    rt = Runtime(torch.device("cpu"), torch.float32)
    for T, images in ((2 * whole, 2), (2 * whole - 1, 1), (whole, 1)):
        rows = pack_chats(chats, tokenizer, T, "training", rt, 4, store)
        assert len(rows.image_numbers()) == images
        assert (rows.tokens == vlm.image_id).sum() == 4 * images
    with pytest.raises(UserError, match="raise --context; an image takes 4 "):
        pack_chats(chats, tokenizer, whole - 1, "training", rt, 4, store)


# --- folders, evaluation and chat ----------------------------------------------------------------


@pytest.mark.parametrize(
    "projector, tower", [*((name, CLIP_KIND) for name in ACTIVATIONS), ("mlp", SIGLIP_KIND)]
)
def test_a_folder_gives_back_model_tokenizer_and_preprocessing(
    projector, tower, tokenizer, tmp_path
):
    vlm = make(tokenizer, projector, tower)
    save_model(vlm, tokenizer, tmp_path)
    loaded, their_tokenizer = load_model(tmp_path)
    assert isinstance(loaded, VLM) and their_tokenizer == tokenizer
    assert loaded.preprocessing == vlm.preprocessing and loaded.projector.kind == projector
    assert loaded.feature_layer == -2 and loaded.image_id == vlm.image_id
    for (name, a), (_, b) in zip(loaded.named_parameters(), vlm.named_parameters()):
        assert torch.equal(a, b), name


def test_a_vlm_is_joined_from_a_text_model_and_a_vision_tower(random_model, tokenizer):
    text, tower = random_model(), (ViT(VisionConfig(**TOWER)), Preprocessing(16))
    vlm, same = build_vlm(text, tokenizer, *tower, "pixel_shuffle", -1)
    assert same == tokenizer and vlm.cfg == text.cfg
    assert vlm.feature_layer == -1 and vlm.preprocessing == Preprocessing(16)
    assert torch.equal(text(torch.tensor([[1, 2, 3]])), vlm(torch.tensor([[1, 2, 3]])))
    with pytest.raises(UserError, match="not on one that has a tower"):
        build_vlm(vlm, tokenizer, *tower)
    with pytest.raises(UserError, match="has 3 layers; .* can't be those of layer 4"):
        build_vlm(text, tokenizer, *tower, "mlp", 4)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"model_type": "llava_next"}, "model_type must be llava or nanollm_vlm, not 'llava_next'"),
        ({"text_config": None}, "must have a text_config"),
        ({"projector": "mpl"}, "projector must be linear or mlp or pixel_shuffle, not 'mpl'"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act must be gelu, not 'relu'"),
        ({"vision_feature_layer": [-2, -5]}, r"can't be those of layer \[-2, -5\]"),
        ({"image_token_index": 3}, "image_token_index must be 269, not 3"),
    ],
)
def test_a_folder_of_another_kind_is_refused(changes, sentence, tokenizer, tmp_path):
    save_model(make(tokenizer), tokenizer, tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(UserError, match=sentence):
        load_model(tmp_path)


def test_names_of_older_versions_are_read(tokenizer, tmp_path):
    vlm = make(tokenizer)
    save_model(vlm, tokenizer, tmp_path)
    tensors = {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor
        for name, tensor in safetensors.load_folder(tmp_path).items()
    }
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    loaded, _ = load_model(tmp_path)
    images = some_images(1)
    assert torch.equal(loaded.image_features(images), vlm.image_features(images))


def example(image, **more):
    turns = [{"role": "user", "content": "<image>\ncolour?"}]
    return {"image": image, "messages": turns, "answer": "x", "task": "colour", **more}


def test_examples_are_answered_with_the_right_image_or_a_grey_one(vlm, tokenizer, album):
    text = {"prompt": "2 + 2?", "answer": "4"}
    examples = read_examples(album(example("a.png"), text, example("b.png"), example("c.png")))
    right, none = (
        accuracy_by_task(vlm, tokenizer, examples, 8, shown=shown)[1] for shown in ("right", "none")
    )
    assert len({right[0], right[2], right[3]}) == 3
    assert none == [none[0], right[1], none[0], none[0]]


def test_a_text_model_can_not_be_asked_about_images(random_model, tokenizer, album):
    examples = read_examples(album(example("a.png")))
    with pytest.raises(UserError, match="reads text only"):
        accuracy_by_task(random_model(), tokenizer, examples, 4)
    with pytest.raises(UserError, match="reads text only"):
        generate(random_model(), [[1]], 2, images=[some_images(1)])


def run_chat(monkeypatch, lines=(), **settings):
    """What each answer was asked: (ids of the prompt, number of images)."""
    asked = []

    def record(model, prompt, n, images=None, **sampling):
        asked.append((prompt, 0 if images is None else len(images)))
        return stream(model, prompt, 3, temperature=0, images=images)

    monkeypatch.setattr(chat, "stream", record)
    typed = iter([*(f"{line}\n" for line in lines), ""])
    monkeypatch.setattr(
        "sys.stdin",
        type("Pipe", (), {"isatty": lambda self: False, "readline": lambda self: next(typed)})(),
    )
    chat.main(chat.Config(max_new_tokens=10, dtype="fp32", **settings))
    return asked


@pytest.fixture
def folder(vlm, tokenizer, tmp_path):
    save_model(vlm, tokenizer, tmp_path / "vlm")
    return str(tmp_path / "vlm")


def test_chat_shows_images_in_front_of_the_prompt(folder, vlm, tokenizer, album, monkeypatch):
    place = album().parent
    images = f"{place / 'a.png'}, {place / 'b.png'}"
    [(ids, shown)] = run_chat(monkeypatch, model=folder, image=images, prompt="same?")
    assert ids == ask(vlm, tokenizer, "<image>\n<image>\nsame?") and shown == 2
    [(ids, shown)] = run_chat(
        monkeypatch, model=folder, image=images, prompt="is <image> like <image>?"
    )
    assert ids == ask(vlm, tokenizer, "is <image> like <image>?") and shown == 2


def test_chat_keeps_images_over_turns_and_takes_new_ones(folder, vlm, album, monkeypatch):
    place = album().parent
    lines = ["what?", f"/image {place / 'b.png'}", "and this?", "/reset", "hello"]
    asked = run_chat(monkeypatch, lines, model=folder, image=str(place / "a.png"))
    assert [shown for _, shown in asked] == [1, 2, 0]
    assert [ids.count(vlm.image_id) for ids, _ in asked] == [4, 8, 0]


@pytest.mark.parametrize(
    "lines, shown", [(["what?", "x" * 50, "y" * 50], 1), (["x" * 60, "y" * 60], 0)]
)
def test_chat_keeps_the_image_longer_than_what_was_said_later_and_says_when_it_has_no_room(
    lines, shown, folder, vlm, tokenizer, album, monkeypatch, capsys
):
    asked = run_chat(monkeypatch, lines, model=folder, image=str(album().parent / "a.png"))
    assert [n for _, n in asked] == [1] * (len(lines) - 1) + [shown]
    last = tokenizer.decode(asked[-1][0])
    assert lines[-1] in last and lines[-2] not in last and ("what?" in last) == (shown == 1)
    assert capsys.readouterr().err.count("no room is left for the image") == 1 - shown


def test_chat_says_what_is_wrong_with_the_message(
    folder, random_model, tokenizer, tmp_path, album, monkeypatch
):
    save_model(random_model(), tokenizer, tmp_path / "text")
    for model, prompt, sentence in (
        (folder, "<image><image>?", "2 times <image>, but 1 images"),
        (folder, "x" * 130, "shorten it"),
        (str(tmp_path / "text"), "hm", "reads text only"),
    ):
        with pytest.raises(UserError, match=sentence):
            image = str(album().parent / "a.png")
            run_chat(monkeypatch, model=model, image=image, prompt=prompt)
