"""Low-rank adapters: equal to peft in logits, gradients and files; merged, switched, refused."""

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
import transformers

from nanollm import safetensors
from nanollm.checkpoint import weights_hash
from nanollm.config import UserError
from nanollm.generate import generate
from nanollm.gpt import GPTConfig, ScalarGPT
from nanollm.hub import load_model, load_scalar, save_model
from nanollm.optim import build_optimizers
from nanollm.peft import adapters, lora
from nanollm.peft.adapters import reference, unwrap
from nanollm.peft.nf4 import NF4Linear
from tests.conftest import SMALL

KINDS = {"lora": {}, "rslora": {"rslora": True}, "dora": {}}
TOKENS = torch.randint(0, 270, (3, 12), generator=torch.Generator().manual_seed(5))


def adapted(model, method="lora", seed=1, name="default", **settings):
    """The model with an adapter that does something: B random, too."""
    rslora = method == "rslora"
    made = adapters.Settings(**{"rank": 4, "alpha": 6.0, "rslora": rslora, **settings})
    torch.manual_seed(seed)
    lora.add(model, "lora" if rslora else method, made, name)
    model.adapter = method
    with torch.no_grad():
        for layer in lora.layers(model).values():
            if name in layer.lora_B:
                layer.lora_B[name].normal_(std=0.3)
            if name in layer.magnitude:
                layer.magnitude[name].mul_(torch.rand_like(layer.magnitude[name]) + 0.5)
    return model


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# --- the layer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_nothing_exactly(method, dtype, random_model):
    model = random_model(attention_bias=True)
    model.compute_dtype = dtype
    before = model(TOKENS)
    lora.add(model, method, adapters.Settings(rank=4))
    assert torch.equal(model(TOKENS), before)


def test_the_product_of_two_thin_matrices_is_added():
    base = lora.Linear(2, 3, bias=False)
    layer = lora.LoRALinear(base, lora.Choice())
    layer.add("a", 1, 0.5, dora=False)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [1, 1]]))
        layer.lora_A["a"].copy_(torch.tensor([[1.0, 2]]))
        layer.lora_B["a"].copy_(torch.tensor([[1.0], [0], [-1]]))
    layer.choice.active = "a"
    # W x = (3, 4, 7), A x = 11, s B A x = (5.5, 0, -5.5)
    assert layer(torch.tensor([3.0, 4])).tolist() == [8.5, 4, 1.5]


@pytest.mark.parametrize("method", KINDS)
def test_scales_are_alpha_over_r_or_its_root(method, random_model):
    model = adapted(random_model(), method, rank=4, alpha=6.0)
    scale = next(iter(lora.layers(model).values())).scale["default"]
    assert scale == (3.0 if method == "rslora" else 1.5)


def test_only_the_adapter_is_trained(random_model):
    model = adapted(random_model(), targets="q_proj, down_proj")
    model(TOKENS).sum().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert len(moved) == 2 * 2 * 2 and all(".lora_" in name for name in moved)


def test_a_second_adapter_is_trained_alone(random_model):
    model = adapted(adapted(random_model(), name="a"), name="b")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.endswith(".b") for name in trained)


def test_lora_plus_lets_b_learn_faster(random_model):
    model = adapted(random_model())
    optimizers = build_optimizers(model, "adamw", lr=1e-3, lora_plus=16.0)
    names = {id(p): n for n, p in model.named_parameters()}
    for group in optimizers.groups():
        kinds = {names[id(p)].split(".")[-2] for p in group["params"]}
        assert len(kinds) == 1 and group["lr"] == (0.016 if kinds == {"lora_B"} else 0.001)


@pytest.mark.parametrize("method", ["lora", "dora", "qlora"])
def test_b_moves_when_activations_are_recomputed_in_backward(method, random_model):
    model = random_model().train()
    lora.add(model, method, adapters.Settings(rank=2))
    gradients = []
    for recompute in (False, True):
        model.model.checkpoint_activations = recompute
        model.zero_grad()
        model(TOKENS).square().mean().backward()
        gradients.append([layer.lora_B["default"].grad for layer in lora.layers(model).values()])
    assert all(g.abs().max() > 0 for g in gradients[1])
    for a, b in zip(*gradients):
        close(a, b)


# --- merge and switch ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "qlora"])
def test_merged_equals_unmerged_and_unmerging_restores_the_base(method, random_model):
    model = adapted(random_model(attention_bias=True), method)
    weights = {n: p.clone() for n, p in model.state_dict().items()}
    before = model(TOKENS)
    lora.merge(model)
    close(model(TOKENS), before)
    assert not torch.equal(model(TOKENS), before)  # another order of computing
    lora.unmerge(model)
    assert torch.equal(model(TOKENS), before)
    assert all(torch.equal(p, weights[n]) for n, p in model.state_dict().items())


@pytest.mark.parametrize("method", ["lora", "dora", "qlora"])
def test_plain_layers_with_the_adapter_in_them_compute_the_same(method, random_model):
    model = adapted(random_model(attention_bias=True), method)
    before = model(TOKENS)
    unwrap(model, merged=True)
    assert not lora.layers(model) and not any(isinstance(m, NF4Linear) for m in model.modules())
    close(model(TOKENS), before)


def test_adapters_are_switched_at_run_time(random_model):
    model = random_model()
    base = model(TOKENS)
    alone = []
    for name, seed in (("a", 1), ("b", 2)):
        alone.append(adapted(random_model(), seed=seed, name=name)(TOKENS))
        adapted(model, seed=seed, name=name)
    for name, expected in (("a", alone[0]), ("b", alone[1]), (None, base), ("a", alone[0])):
        lora.use(model, name)
        assert torch.equal(model(TOKENS), expected)


@pytest.mark.parametrize("methods", [("lora", "lora"), ("dora", "lora")])
def test_every_row_of_a_batch_may_have_its_own_adapter(methods, random_model):
    model = random_model(attention_bias=True)
    for name, method, targets in zip("ab", methods, ("all", "q_proj,up_proj")):
        adapted(model, method, seed=ord(name), name=name, targets=targets)
    expected = []
    for row, name in enumerate(("b", None, "a")):
        lora.use(model, name)
        expected.append(model(TOKENS[row : row + 1]))
    lora.use(model, ["b", None, "a"])
    close(model(TOKENS), torch.cat(expected))
    with pytest.raises(UserError, match="3 rows have an adapter, but the batch has 2"):
        model(TOKENS[:2])


def test_rows_keep_their_adapters_while_generating(random_model):
    model = random_model()
    for name in "ab":
        adapted(model, seed=ord(name), name=name)
    prompts = [[1, 2, 3], [4, 5], [6]]
    expected = []
    for prompt, name in zip(prompts, ("b", None, "a")):
        lora.use(model, name)
        expected += generate(model, [prompt], 8, samples=2, temperature=0, stop_ids=[7]).lists()
    lora.use(model, ["b", None, "a"])
    got = generate(model, prompts, 8, samples=2, temperature=0, stop_ids=[7]).lists()
    assert got == expected and len({tuple(row) for row in got}) == 3


@pytest.mark.parametrize("method", ["lora", "dora", "qlora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_equals_that_of_the_merged_model(method, dtype, random_model):
    model = adapted(random_model(), method)
    model.compute_dtype = dtype
    merged = copy.deepcopy(model)
    unwrap(merged, merged=True)
    outs = [generate(m, [[1, 2, 3], [4]], 10, temperature=0) for m in (model, merged)]
    assert torch.equal(outs[0].tokens, outs[1].tokens)
    assert torch.equal(outs[0].logprobs, outs[1].logprobs)
    assert lora.layers(model)  # the model itself stays as it was


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_reference_is_the_base_and_shares_its_weights(method, random_model):
    model = random_model()
    base = model(TOKENS)
    adapted(model, method)
    ref = reference(model)
    assert torch.equal(ref(TOKENS), base) and not torch.equal(model(TOKENS), base)
    own = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in own for p in ref.parameters())


def test_the_reference_of_a_quantised_model_is_quantised(random_model):
    model = random_model()
    lora.add(model, "qlora", adapters.Settings(rank=2))
    model.adapter = "qlora"
    before = model(TOKENS)
    ref = reference(adapted(model, "lora", name="more"))
    assert torch.equal(ref(TOKENS), before)


# --- peft ----------------------------------------------------------------------------------------


@pytest.fixture
def base_folder(tmp_path, random_model, tokenizer):
    folder = tmp_path / "base"
    save_model(random_model(), tokenizer, folder)
    return folder


def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("method", KINDS)
def test_our_files_open_in_peft_with_our_logits_and_gradients(method, base_folder, tmp_path):
    model = adapted(load_model(base_folder)[0].eval(), method)
    adapters.save_adapter(model, tmp_path / "adapter", base_folder)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base_folder)
    other = peft.PeftModel.from_pretrained(
        theirs(base_folder), tmp_path / "adapter", is_trainable=True
    )
    ours, peers = model(TOKENS), other(TOKENS).logits
    close(ours, peers)
    ours.square().mean().backward()
    peers.square().mean().backward()
    gradients = dict(other.named_parameters())
    for name, layer in lora.layers(model).items():
        where = f"base_model.model.{name}"
        for part, own in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            close(own["default"].grad, gradients[f"{where}.{part}.default.weight"].grad)
        if method == "dora":
            name = f"{where}.lora_magnitude_vector.default.weight"
            close(layer.magnitude["default"].grad, gradients[name].grad)


@pytest.mark.parametrize("method", KINDS)
def test_files_of_peft_open_in_ours_with_its_logits(method, base_folder, tmp_path):
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM",
        use_dora=method == "dora", use_rslora=method == "rslora", init_lora_weights=False,
    )  # fmt: skip
    torch.manual_seed(0)
    other = peft.get_peft_model(theirs(base_folder), config).eval()
    other.save_pretrained(tmp_path / "adapter")
    model, _ = load_model(tmp_path / "adapter")  # merged
    close(model(TOKENS), other(TOKENS).logits)
    model, _ = load_model(base_folder)
    adapters.load_adapter(model, tmp_path / "adapter")  # attached
    close(model(TOKENS), other(TOKENS).logits)


def test_keys_and_shapes_are_those_that_peft_writes(base_folder, tmp_path):
    names = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    config = peft.LoraConfig(r=4, target_modules=names, use_dora=True, task_type="CAUSAL_LM")
    peft.get_peft_model(theirs(base_folder), config).save_pretrained(tmp_path / "peft")
    model = adapted(load_model(base_folder)[0], "dora")
    adapters.save_adapter(model, tmp_path / "ours", base_folder)
    files = [
        safetensors.load_file(tmp_path / folder / "adapter_model.safetensors")
        for folder in ("ours", "peft")
    ]
    ours, peers = ({name: t.shape for name, t in file.items()} for file in files)
    assert ours == peers


def test_a_reward_models_adapter_opens_in_peft_and_keeps_its_shift(base_folder, tmp_path):
    model, tokenizer = load_scalar(base_folder)
    adapted(model.eval())
    model.shift, model.base_folder = 1.5, base_folder
    ours = model(TOKENS)
    save_model(model, tokenizer, tmp_path / "adapter")
    again, _ = load_scalar(tmp_path / "adapter")
    assert again.shift == 1.5
    close(again(TOKENS), ours)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        base_folder, num_labels=1, dtype=torch.float32
    )
    other = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    scores = other(TOKENS, attention_mask=torch.ones_like(TOKENS)).logits[:, 0]
    close(ours[:, -1] + 1.5, scores)


# --- what cannot be done -------------------------------------------------------------------------


REFUSED = {
    "rank 0": ({"rank": 0}, "--rank must be at least 1, not 0"),
    "alpha 0": ({"alpha": 0.0}, "--alpha must be more than 0, not 0.0"),
    "a negative alpha": ({"alpha": -8.0}, "--alpha must be more than 0, not -8.0"),
    "no such layer": ({"targets": "q_proj,query"}, "--targets query matches no layer; there are"),
    "nothing": ({"targets": " , "}, "--targets is empty"),
    "the tied head": ({"targets": "lm_head"}, "no adapter goes around the embedding"),
    "the embedding": ({"targets": "embed_tokens"}, "no adapter goes around the embedding"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_fit_nothing_are_refused(case, random_model):
    settings, sentence = REFUSED[case]
    with pytest.raises(UserError, match=sentence):
        lora.add(random_model(), "lora", adapters.Settings(**settings))


def test_an_untied_head_may_have_an_adapter(random_model, tmp_path, tokenizer):
    save_model(random_model(tie_word_embeddings=False), tokenizer, tmp_path / "base")
    model = adapted(load_model(tmp_path / "base")[0], targets="lm_head,q_proj")
    adapters.save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    other = peft.PeftModel.from_pretrained(theirs(tmp_path / "base"), tmp_path / "adapter")
    close(model(TOKENS), other(TOKENS).logits)


def test_an_unknown_or_merged_adapter_is_not_used(random_model):
    model = adapted(random_model())
    with pytest.raises(UserError, match="no adapter 'other'; it has default"):
        lora.use(model, "other")
    lora.merge(model)
    with pytest.raises(UserError, match="unmerge it"):
        lora.use(model, None)


def changed(folder, **values):
    path = Path(folder) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_files_that_do_not_fit_are_refused(base_folder, tmp_path, random_model):
    folder = tmp_path / "adapter"
    adapters.save_adapter(adapted(load_model(base_folder)[0]), folder, base_folder)
    good = (folder / "adapter_config.json").read_text()
    cases = [
        ({"r": 8}, "trained on another base|has shape"),
        ({"r": 0}, "are no rank and scale"),
        ({"use_dora": True}, "lacks .*lora_magnitude_vector"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern .* is not implemented"),
        ({"init_lora_weights": "pissa"}, "convert it with peft"),
        ({"target_modules": 3}, "target_modules can't be 3"),
        ({"target_modules": ["q_proj", 3]}, "target_modules can't be"),
        ({"use_dora": "no"}, "use_dora can't be 'no'"),
        ({"peft_type": ["LORA"]}, "peft_type can't be"),
        ({"reward_shift": "0"}, "reward_shift can't be '0'"),
        ({"base_model_name_or_path": "runs/nowhere"}, "is an adapter of runs/nowhere, which is no"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path"),
        ({"base_model_name_or_path": str(folder)}, "base_model_name_or_path"),
    ]
    for values, sentence in cases:
        (folder / "adapter_config.json").write_text(good)
        changed(folder, **values)
        with pytest.raises(UserError, match=sentence):
            load_model(folder)
    for shape in ({"hidden_size": 48}, {"num_hidden_layers": 1}):
        (folder / "adapter_config.json").write_text(good)
        with pytest.raises(UserError, match="trained on another base"):
            adapters.load_adapter(random_model(**shape), folder)


@pytest.mark.parametrize("method", ["lora", "adapter", "prefix"])
def test_an_adapter_goes_on_the_weights_that_it_was_trained_on_alone(
    method, base_folder, tmp_path, random_model, tokenizer
):
    adapter, other = tmp_path / "adapter", tmp_path / "other"
    model = adapters.attach(load_model(base_folder)[0], method, base=base_folder)
    adapters.save_adapter(model, adapter, base_folder)
    save_model(random_model(seed=1), tokenizer, other)  # with equal shapes
    load_model(base_folder, adapter)
    with pytest.raises(UserError, match=f"{adapter} was trained on another base: {other} holds"):
        load_model(other, adapter)
    save_model(random_model(seed=1), tokenizer, base_folder)  # trained anew
    with pytest.raises(UserError, match="was trained on another base"):
        load_model(adapter)


def test_an_adapter_is_not_put_on_twice(base_folder, tmp_path):
    config = peft.LoraConfig(task_type="CAUSAL_LM")  # peft writes no hash of the base
    peft.get_peft_model(theirs(base_folder), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="holds the adapter in .* already"):
        load_model(tmp_path / "adapter", tmp_path / "adapter")


def test_peft_opens_a_file_with_the_hash_of_its_base(base_folder, tmp_path):
    model = adapters.attach(load_model(base_folder)[0], "lora", base=base_folder)
    for layer in lora.layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"])
    adapters.save_adapter(model, tmp_path / "adapter", base_folder)
    metadata = safetensors.read_header(tmp_path / "adapter/adapter_model.safetensors")[1]
    assert metadata == {"format": "pt", "base_sha256": weights_hash(base_folder)}
    other = peft.PeftModel.from_pretrained(theirs(base_folder), tmp_path / "adapter")
    close(model(TOKENS), other(TOKENS).logits)


def test_the_base_is_found_beside_an_adapter_that_has_moved(base_folder, tmp_path):
    model = adapted(load_model(base_folder)[0])
    adapters.save_adapter(model, tmp_path / "adapter", "somewhere/else/base")
    close(load_model(tmp_path / "adapter")[0](TOKENS), model(TOKENS))


def test_a_quantised_base_is_quantised_again_when_its_adapter_is_opened(base_folder, tmp_path):
    model = adapted(load_model(base_folder)[0], "qlora")
    adapters.save_adapter(model, tmp_path / "adapter", base_folder)
    close(load_model(tmp_path / "adapter")[0](TOKENS), model(TOKENS))


def test_a_reward_models_head_is_trained_beside_the_adapter():
    model = adapted(ScalarGPT(GPTConfig(**SMALL)))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "score.weight" in trained and all(
        ".lora_" in name for name in trained - {"score.weight"}
    )
