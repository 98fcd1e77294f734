"""Low-rank adapters: equal to peft in logits, gradients and files; merged, switched, refused."""

import json
import re
from pathlib import Path

import peft
import pytest
import torch
import transformers
from helpers import Peak, close

from nanollm import hub, safetensors
from nanollm.config import UserError
from nanollm.generate import generate, sample_completions
from nanollm.gpt import GPT, GPTConfig
from nanollm.hub import load_model, load_scalar, save_model
from nanollm.optim import build_optimizer
from nanollm.peft import adapters, lora
from train_sft import Config, sft_loss

KINDS = {"lora": {}, "rslora": {"rslora": True}, "dora": {}}
TOKENS = torch.randint(0, 270, (3, 12), generator=torch.Generator().manual_seed(5))


def adapted(model, method="lora", seed=1, base=None, **more):
    """The model with an adapter that does something: B random, too."""
    name = {"name": more.pop("name")} if "name" in more else {}
    settings = adapters.Settings(**{"rank": 4, "alpha": 6.0, "rslora": method == "rslora"} | more)
    method = "lora" if method == "rslora" else method
    torch.manual_seed(seed)
    adapters.attach(model, method, settings, base, **name)
    with torch.no_grad():
        for where, p in model.named_parameters():
            if p.requires_grad and where.endswith("lora_B"):
                p.normal_(std=0.3)
            if p.requires_grad and "magnitude" in where:
                p.mul_(torch.rand_like(p) + 0.5)
    return model


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, lora.LoRALinear)}


# --- the layer -----------------------------------------------------------------------------------


def test_the_product_of_two_thin_matrices_is_added():
    base = lora.Linear(2, 3, bias=False)
    layer = lora.LoRALinear(base, lora.Choice(), number=0, rank=1, scale=0.5)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [1, 1]]))
        layer.lora_A.copy_(torch.tensor([[1.0, 2]]))
        layer.lora_B.copy_(torch.tensor([[1.0], [0], [-1]]))
    layer.choice.active = 0
    # W x = (3, 4, 7), A x = 11, s B A x = (5.5, 0, -5.5)
    assert layer(torch.tensor([3.0, 4])).tolist() == [8.5, 4, 1.5]


def test_only_the_layers_that_are_named_get_an_adapter(random_model):
    model = adapted(random_model(), targets="q_proj, model.layers.1.mlp.down_proj")
    ends = [name.removeprefix("model.layers.") for name in layers(model)]
    assert ends == ["0.self_attn.q_proj", "1.self_attn.q_proj", "1.mlp.down_proj"]


def test_a_second_adapter_is_trained_alone(random_model):
    model = adapted(random_model(), name="a")
    first = {p for p in model.parameters() if p.requires_grad}
    adapted(model, name="b")
    second = {p for p in model.parameters() if p.requires_grad}
    assert len(first) == len(second) and not first & second


def test_lora_plus_lets_b_learn_faster(random_model):
    model = adapted(random_model())
    optimizer = build_optimizer(model, Config(optimizer="adamw", lr=1e-3), lora_plus=16.0)
    names = {id(p): n for n, p in model.named_parameters()}
    for group in optimizer.groups():
        kinds = {names[id(p)].split(".")[-1] for p in group["params"]}
        assert len(kinds) == 1 and group["lr"] == (0.016 if kinds == {"lora_B"} else 0.001)


def test_a_step_with_lora_takes_as_many_bytes_as_the_formula_says(monkeypatch):
    """That of the docstring of lora.py."""
    monkeypatch.setattr("nanollm.logprobs.CHUNK", {"cpu": 2**27})  # as on a GPU
    T, V, C = 256, 8192, 256
    shape = {"hidden_size": C, "intermediate_size": 512, "num_hidden_layers": 4, "head_dim": 64}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": T}
    model = GPT(GPTConfig(vocab_size=V, tie_word_embeddings=True, **shape))
    N = sum(p.numel() for p in model.parameters())
    adapters.attach(model, "lora", adapters.Settings(rank=4, alpha=8.0))
    model.compute_dtype, model.model.checkpoint_activations = torch.bfloat16, True
    trained = [p for p in model.parameters() if p.requires_grad]
    n = sum(p.numel() for p in trained)
    optimizer = torch.optim.AdamW(trained)
    tokens, mask = torch.arange(T)[None], torch.ones(1, T, dtype=torch.bool)
    with Peak([*model.parameters(), *model.buffers()]) as held:
        for _ in range(2):
            sft_loss(model(tokens), tokens, mask).backward()
            optimizer.step()
            optimizer.zero_grad()
    formula = 4 * N + 16 * n + 2 * V * C + 12 * T * V
    assert 0.9 * formula < held.peak < 1.1 * formula


# --- switching -----------------------------------------------------------------------------------


def test_adapters_are_loaded_by_name_and_switched_at_run_time(random_model, tmp_path):
    model = random_model()
    base, alone = model(TOKENS), {}
    for name in "ab":
        one = adapted(random_model(), seed=ord(name))
        alone[name] = one(TOKENS)
        adapters.save_adapter(one, tmp_path / name, "base")
        adapters.load_adapter(model, tmp_path / name, name=name)
    for name, expected in [*alone.items(), (None, base), ("a", alone["a"])]:
        lora.use(model, name)
        assert torch.equal(model(TOKENS), expected)


@pytest.mark.parametrize("methods", [("lora", "lora"), ("dora", "lora"), ("qlora", "qlora")])
def test_every_row_of_a_batch_may_have_its_own_adapter_while_generating_too(methods, random_model):
    model, rows = random_model(attention_bias=True), ["b", None, "a"]
    for name, method, targets in zip("ab", methods, ("all", "q_proj,up_proj")):
        adapted(model, method, seed=ord(name), name=name, targets=targets)
    prompts, expected, written = [[1, 2, 3], [4, 5], [6]], [], []
    how = {"samples": 2, "temperature": 0, "stop_ids": [7]}
    for row, (prompt, name) in enumerate(zip(prompts, rows)):
        lora.use(model, name)
        expected.append(model(TOKENS[row : row + 1]))
        written += generate(model, [prompt], 8, **how).lists()
    lora.use(model, rows)
    close(model(TOKENS), torch.cat(expected))
    got = generate(model, prompts, 8, **how).lists()
    assert got == written and len({tuple(row) for row in got}) == 3

    class Any:
        stop_ids, pad_id = [7], 0

    for size in (2, 256):  # batches of prompts, the shortest first
        how = {"samples": 2, "temperature": 0, "batch_size": size}
        assert sample_completions(model, Any, prompts, 8, **how) == written
    with pytest.raises(UserError, match="no adapter 'c'; it has a, b"):
        lora.use(model, ["a", "c"])


# --- peft ----------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path, random_model, tokenizer):
    """A model's folder."""
    save_model(random_model(), tokenizer, tmp_path / "base")
    return tmp_path / "base"


def theirs(folder, kind="CausalLM"):
    opener = getattr(transformers, f"AutoModelFor{kind}")
    return opener.from_pretrained(folder, dtype=torch.float32, num_labels=1)  # labels of rewards


def opened_by_peft(base, adapter, kind="CausalLM", **how):
    return peft.PeftModel.from_pretrained(theirs(base, kind), adapter, **how)


@pytest.mark.parametrize("method", KINDS)
def test_our_files_open_in_peft_with_our_logits_and_gradients(method, base, tmp_path):
    model = adapted(load_model(base)[0].eval(), method)
    model.base_hash = "0123"
    adapters.save_adapter(model, tmp_path / "adapter", base)
    metadata = safetensors.read_header(tmp_path / "adapter/adapter_model.safetensors")[1]
    assert metadata == {"format": "pt", "base_weights_hash": "0123"}
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    other = opened_by_peft(base, tmp_path / "adapter", is_trainable=True)
    logits = [model(TOKENS), other(TOKENS).logits]
    close(*logits)
    for each in logits:
        each.square().mean().backward()
    gradients = dict(other.named_parameters())
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(found) == 2 * 7 * (3 if method == "dora" else 2)
    for name, p in found.items():
        name = re.sub(r"(lora_.*)", r"\1.default.weight", name)
        close(p.grad, gradients[f"base_model.model.{name}"].grad)


def peft_adapter(base, *targets, **how):
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **how
    )
    return peft.get_peft_model(theirs(base), config).eval()


@pytest.mark.parametrize("method", KINDS)
def test_files_of_peft_open_in_ours_with_its_logits(method, base, tmp_path):
    how = {"use_dora": method == "dora", "use_rslora": method == "rslora"}
    other = peft_adapter(base, "q_proj", "v_proj", "down_proj", **how, init_lora_weights=False)
    other.save_pretrained(tmp_path / "adapter")
    merged, _ = load_model(tmp_path / "adapter")
    attached = adapters.load_adapter(load_model(base)[0], tmp_path / "adapter")
    for model in (merged, attached):
        close(model(TOKENS), other(TOKENS).logits)


@pytest.mark.parametrize("method", KINDS)
def test_what_is_exported_merged_is_what_peft_merges(method, base, tmp_path, tokenizer):
    model = adapted(load_model(base)[0], method, base=base)
    save_model(model, tokenizer, tmp_path / "adapter")
    hub.export(hub.Config(str(tmp_path / "adapter"), str(tmp_path / "merged"), merge=True))
    ours = safetensors.load_folder(tmp_path / "merged")
    other = opened_by_peft(base, tmp_path / "adapter").merge_and_unload().state_dict()
    other.pop("lm_head.weight")  # tied
    assert ours.keys() == other.keys()
    for name, tensor in ours.items():
        close(tensor, other[name], 1e-6, 1e-5)
    moved = [
        name for name, x in load_model(base)[0].state_dict().items() if not x.equal(ours[name])
    ]
    assert len(moved) == 2 * 7


def test_a_reward_models_adapter_opens_in_peft(base, tmp_path):
    model, tokenizer = load_scalar(base)
    adapted(model.eval(), base=base)
    model.shift = 1.5
    save_model(model, tokenizer, tmp_path / "adapter")
    other = opened_by_peft(base, tmp_path / "adapter", "SequenceClassification")
    scores = other(TOKENS, attention_mask=torch.ones_like(TOKENS)).logits[:, 0]
    close(model(TOKENS)[:, -1] + 1.5, scores)


def test_an_untied_head_may_have_an_adapter(random_model, tmp_path, tokenizer):
    save_model(random_model(tie_word_embeddings=False), tokenizer, tmp_path / "base")
    model = adapted(load_model(tmp_path / "base")[0], targets="lm_head,q_proj")
    adapters.save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    close(model(TOKENS), opened_by_peft(tmp_path / "base", tmp_path / "adapter")(TOKENS).logits)


# --- what cannot be done -------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["q_proj,query", " , ", "lm_head", "embed_tokens"])
def test_targets_that_match_no_layer_are_refused(targets, random_model):
    with pytest.raises(UserError, match="--targets .* matches no linear layer; there are down_pr"):
        adapters.attach(random_model(), "lora", adapters.Settings(targets=targets))


MISFITS = {
    "another rank": ({"r": 8}, "trained on another base"),
    "dora without magnitudes": ({"use_dora": True}, "lora_magnitude_vector has shape None"),
    "a rank of its own": ({"rank_pattern": {"q_proj": 2}}, "rank_pattern .* is not implemented"),
    "a changed base": ({"init_lora_weights": "pissa"}, "convert it with peft"),
    "no such base": ({"base_model_name_or_path": "runs/nowhere"}, "adapter of runs/nowhere"),
    "no base": ({"base_model_name_or_path": None}, "base_model_name_or_path"),
    "itself as base": ({"base_model_name_or_path": "adapter"}, "base_model_name_or_path"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_files_that_do_not_fit_are_refused(case, base, tmp_path):
    change, sentence = MISFITS[case]
    adapters.save_adapter(adapted(load_model(base)[0]), tmp_path / "adapter", base)
    path = Path(tmp_path / "adapter/adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=sentence):
        load_model(tmp_path / "adapter")


def test_the_base_is_found_beside_an_adapter_that_has_moved(base, tmp_path):
    model = adapted(load_model(base)[0], "qlora")  # quantised again when it is opened
    adapters.save_adapter(model, tmp_path / "adapter", "somewhere/else/base")
    close(load_model(tmp_path / "adapter")[0](TOKENS), model(TOKENS))
