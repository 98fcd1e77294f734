"""GPT: what makes a decoder a decoder. Parity with transformers' is in test_foreign.py."""

import json
import math
from collections import Counter

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import SMALL

from nanollm import checkpoint, gpt
from nanollm.batches import pack
from nanollm.config import TrainConfig
from nanollm.generate import generate
from nanollm.gpt import (
    GPT,
    GPTConfig,
    Linear,
    RMSNorm,
    count_parameters,
    document_mask,
    rope_frequencies,
    rotate,
    rotation_table,
)
from nanollm.hub import load_model, save_model
from nanollm.logprobs import token_logprobs
from nanollm.optim import build_optimizer
from nanollm.peft.adapters import attach

LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}
LLAMA3_ROPE |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA = {"qk_norm": False, "rope_scaling": LLAMA3_ROPE, "rope_theta": 500.0}
QWEN2 = {"qk_norm": False, "attention_bias": True, "tie_word_embeddings": False, "head_dim": 16}


def some_tokens(B=2, T=40, V=270, seed=0):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def assert_close(ours, theirs, tolerance=1e-5):
    """Largest difference relative to the largest value: the size of a logit is arbitrary."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * max(1.0, theirs.abs().max())


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def loss_of(model, tokens):
    return -token_logprobs(model(tokens[:, :-1]), tokens[:, 1:]).mean()


# --- RoPE and norm -----------------------------------------------------------------------------
def test_rope_turns_the_first_pair_by_one_radian_per_position():
    cfg = GPTConfig(head_dim=4, rope_theta=100.0)
    assert rope_frequencies(cfg).tolist() == pytest.approx([1.0, 0.1])
    cos, sin = (table[1] for table in rotation_table(cfg))  # position 1
    turned = rotate(torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 1, 1, 4), cos, sin)
    wanted = [math.cos(1), math.cos(0.1), math.sin(1), math.sin(0.1)]  # pairs are (0, 2) and (1, 3)
    assert turned.flatten().tolist() == pytest.approx(wanted)


def test_rmsnorm_divides_by_the_root_of_the_mean_square():
    norm = RMSNorm(2, eps=0.0)
    assert norm(torch.tensor([3.0, 4.0])).tolist() == pytest.approx([3 / 12.5**0.5, 4 / 12.5**0.5])


def test_an_impossible_shape_is_refused():
    with pytest.raises(ValueError, match="can't share 3 key-value heads"):
        GPTConfig(num_attention_heads=4, num_key_value_heads=3)
    with pytest.raises(ValueError, match="head size 7 is odd"):
        GPTConfig(head_dim=7)


# --- attention ---------------------------------------------------------------------------------
def test_a_token_never_sees_what_comes_after_it(random_model):
    model, tokens = random_model(), some_tokens(B=1, T=20)
    changed = tokens.clone()
    changed[0, 12] = (tokens[0, 12] + 1) % 270
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert ((before - after)[:, 12:].abs().amax(-1) > 1e-3).all()  # what follows does see it


def test_document_mask_by_hand():
    mask = document_mask(torch.tensor([[0, 0, 1, 1]]))
    assert mask.shape == (1, 1, 4, 4)
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def packed_and_alone():
    """Five documents in rows of 32, and the same documents one by one."""
    documents = [some_tokens(1, n, seed=n)[0].tolist() for n in (20, 12, 9, 15, 3)]
    rows = pack([(ids, [False] + [True] * (len(ids) - 1)) for ids in documents], 32, pad_id=257)
    assert len(rows) == 2  # 20 + 12, and 15 + 9 + 3 with padding
    return documents, rows


@pytest.mark.parametrize("shape", [LLAMA, {"rope_theta": 1e6}])
def test_packed_documents_have_the_logits_and_gradients_that_they_have_alone(shape, random_model):
    packed, alone = (random_model(**shape) for _ in range(2))
    documents, rows = packed_and_alone()
    logits = packed(rows.tokens, rows.positions, document_mask(rows.documents))
    (token_logprobs(logits[:, :-1], rows.tokens[:, 1:]) * rows.mask[:, 1:]).sum().backward()
    places = {
        (row, n) for row, numbers in enumerate(rows.documents.tolist()) for n in numbers if n >= 0
    }
    assert len(places) == 5
    for row, number in places:
        here = rows.documents[row] == number
        ids = rows.tokens[row][here]
        assert ids.tolist() in documents
        logits_alone = alone(ids[None])
        assert_close(logits[row][here], logits_alone[0])
        token_logprobs(logits_alone[:, :-1], ids[None, 1:]).sum().backward()
    for name, grad in gradients(packed).items():
        assert_close(grad, gradients(alone)[name], 2e-5)


# --- precision and memory ----------------------------------------------------------------------
def test_checkpointing_computes_each_block_once_more_and_the_same_loss_and_gradients(random_model):
    models, calls, tokens = (random_model(), random_model()), [], some_tokens()
    for model, checkpointed in zip(models, (False, True)):
        model.model.checkpoint_activations = checkpointed
        for n, block in enumerate(model.model.layers):
            name = checkpointed, n
            block.mlp.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    losses = [loss_of(model, tokens) for model in models]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    plain, recomputed = map(gradients, models)
    for name, grad in plain.items():
        assert torch.allclose(grad, recomputed[name], atol=1e-7), name
    assert Counter(calls) == {(False, 0): 1, (False, 1): 1, (True, 0): 2, (True, 1): 2}


@pytest.mark.parametrize("shape", [LLAMA, QWEN2])
def test_bf16_computes_within_its_rounding_and_keeps_fp32_weights(shape, random_model):
    model, tokens = random_model(**shape), some_tokens()
    exact = model(tokens).detach()
    model.compute_dtype = torch.bfloat16
    rounded = model(tokens)
    assert rounded.dtype == torch.bfloat16
    error = (rounded.float() - exact).pow(2).mean().sqrt() / exact.std()
    assert 1e-4 < error < 0.03  # bf16 has 8 bits; some tens of roundings in a row
    rounded.float().logsumexp(-1).sum().backward()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


# --- a fresh model -----------------------------------------------------------------------------
def test_every_block_starts_as_the_identity():
    model = GPT(GPTConfig(num_hidden_layers=2, attention_bias=True))
    x, positions = torch.randn(2, 10, 128), torch.arange(10)
    cos, sin = model.model.cos[positions], model.model.sin[positions]
    for block in model.model.layers:
        assert torch.equal(block(x, cos, sin, None, None), x)
    for name, p in model.named_parameters():  # gains are one, biases zero
        assert p.dim() > 1 or p.unique().tolist() == [float(not name.endswith("bias"))]


@pytest.mark.parametrize("C, tied", [(64, True), (768, False), (2048, True)])
def test_a_fresh_model_of_any_width_finds_all_tokens_about_equally_likely(C, tied):
    shape = {"vocab_size": 4096, "hidden_size": C, "intermediate_size": 64}
    model = GPT(GPTConfig(**shape, num_hidden_layers=1, tie_word_embeddings=tied))
    with torch.no_grad():
        loss = loss_of(model, some_tokens(B=4, T=64, V=4096))
    assert loss == pytest.approx(math.log(4096), abs=0.6)  # 8.3 nats


@pytest.mark.parametrize("tied, total, in_products", [(True, 120, 120), (False, 140, 120)])
def test_parameters_are_counted_by_hand(tied, total, in_products):
    # q, o 4x4; k, v 2x4; gate, up, down 3x4: 84. Norms 4 + 4 + 4, of heads 2 + 2: 16. Embedding
    # 5x4: 20
    shape = {"vocab_size": 5, "hidden_size": 4, "intermediate_size": 3, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2}
    model = GPT(GPTConfig(**shape, tie_word_embeddings=tied))
    assert count_parameters(model) == (total, in_products)


# --- to sample with ------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [None, *"lora dora qlora bottleneck prefix prompt".split()])
def test_a_merged_model_computes_the_same_and_is_its_own_merged_model(adapter, random_model):
    model, tokens = random_model(), some_tokens()
    if adapter:
        attach(model, adapter)
        for p in (p for p in model.parameters() if p.requires_grad):  # as if it had learnt
            nn.init.normal_(p, std=0.1)
    merged = model.merged()
    assert merged is not model and merged.merged() is merged
    assert_close(merged(tokens), model(tokens), 1e-4)


def test_a_merged_model_stays_as_it_was_when_the_model_is_trained_on(random_model):
    model, tokens = random_model(), some_tokens()
    model.compute_dtype = torch.bfloat16
    merged = model.merged()
    before = merged(tokens)
    model.model.norm.weight.data += 1
    assert torch.equal(merged(tokens), before) and not torch.equal(model(tokens), before)


class ReLU2(nn.Module):
    """What somebody puts in the place of MLP: ReLU^2 (So et al. 2021, arXiv:2109.08668)."""

    hidden_act = "relu2"

    def __init__(self, cfg):
        super().__init__()
        self.wide = Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.down_proj = Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.relu(self.wide(x)).square())


@pytest.mark.parametrize("mlp", [gpt.MLP, ReLU2])
def test_a_fresh_model_of_ours_or_with_another_mlp_trains_generates_and_is_exported_and_read_back(
    mlp, tokenizer, tmp_path, monkeypatch
):
    for module in (gpt, checkpoint):  # in a fork it stands in gpt.py
        monkeypatch.setattr(module, "MLP", mlp)
    model, tokens = GPT(GPTConfig(**SMALL)), some_tokens(2, 16)
    optimizer = build_optimizer(model, TrainConfig(lr=0.01, muon_lr=0.05))
    for _ in range(60):
        loss = loss_of(model, tokens)
        loss.backward()
        optimizer.step(grad_clip=1.0)
    assert loss < 0.1  # from 5.6
    prompts = tokens[:, :2].tolist()
    assert generate(model, prompts, 14, temperature=0).lists() == tokens[:, 2:].tolist()
    save_model(model, tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["hidden_act"] == mlp.hidden_act
    assert torch.equal(load_model(tmp_path)[0](tokens), model(tokens))
