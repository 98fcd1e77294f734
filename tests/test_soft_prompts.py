"""Prefix tuning, P-Tuning v2, prompt tuning: equal to peft, right in packed rows and the cache."""

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers

from nanollm.config import UserError
from nanollm.generate import generate, stream
from nanollm.gpt import document_mask
from nanollm.hub import save_model
from nanollm.peft import adapters, soft_prompts

V = 5
METHODS = ("prefix", "ptuning", "prompt")
TOKENS = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def attached(random_model):
    """A small model with V virtual tokens in front."""

    def make(method, **changes):
        torch.manual_seed(0)
        settings = adapters.Settings(virtual_tokens=V, hidden=16)
        return adapters.attach(random_model(**changes), method, settings)

    return make


@pytest.fixture
def folder(random_model, tokenizer, tmp_path):
    """The base in a folder, and what transformers makes of it."""
    save_model(random_model(), tokenizer, tmp_path / "base")
    return tmp_path


def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)


def with_peft(folder, **settings):
    torch.manual_seed(1)
    kinds = {"prefix_projection": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}
    kind = kinds[settings.pop("kind")]
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=V, **settings)
    return peft.get_peft_model(theirs(folder), config).train()


def loss_of(logits):
    return F.cross_entropy(logits[:, -12:-1].flatten(0, 1), TOKENS[:, 1:].flatten())


# --- parity with peft ----------------------------------------------------------------------------


def test_prefix_with_its_mlp_equals_pefts_in_logits_and_gradients(folder, attached):
    other = with_peft(
        folder, kind="prefix_projection", prefix_projection=True, encoder_hidden_size=16
    )
    encoder = other.prompt_encoder["default"]
    ours = attached("prefix")
    # peft's embedding is as wide as keys and values, ours as the model: both are free to choose
    width = encoder.embedding.weight.shape[1]
    ours.model.prefix = soft_prompts.PrefixMLP(V, width, 16, soft_prompts.shape_of(ours.cfg))
    ours.model.prefix.load_state_dict(encoder.state_dict())
    compare(
        ours,
        other,
        [
            (ours.model.prefix.embedding.weight, encoder.embedding.weight),
            (ours.model.prefix.transform[0].weight, encoder.transform[0].weight),
            (ours.model.prefix.transform[2].weight, encoder.transform[2].weight),
        ],
    )


def test_p_tuning_equals_pefts_prefix_without_an_mlp_in_logits_and_gradients(folder, attached):
    other = with_peft(folder, kind="prefix_projection", prefix_projection=False)
    weight = other.prompt_encoder["default"].embedding.weight
    ours = attached("ptuning")
    shape = soft_prompts.shape_of(ours.cfg)
    ours.model.prefix.values.data.copy_(soft_prompts.unflatten(weight.detach(), shape))
    a, b = ours(TOKENS), other(input_ids=TOKENS).logits
    loss_of(a).backward()
    loss_of(b).backward()
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    theirs = soft_prompts.unflatten(weight.grad, shape)
    torch.testing.assert_close(ours.model.prefix.values.grad, theirs, atol=1e-5, rtol=1e-5)


def test_prompt_tuning_equals_pefts_in_logits_and_gradients(folder, attached):
    other = with_peft(folder, kind="prompt")
    weight = other.prompt_encoder["default"].embedding.weight
    ours = attached("prompt")
    ours.model.prefix.embedding.data.copy_(0.3 * weight.detach())
    weight.data.mul_(0.3)
    compare(ours, other, [(ours.model.prefix.embedding, weight)])


def compare(ours, other, parameters):
    a, b = ours(TOKENS), other(input_ids=TOKENS).logits[:, -12:]
    loss_of(a).backward()
    loss_of(b).backward()
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for one, two in parameters:
        assert two.grad.abs().max() > 0
        torch.testing.assert_close(one.grad, two.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_opens_in_peft_with_equal_logits(method, folder, attached):
    ours = attached(method)
    adapters.save_adapter(ours, folder / "soft", folder / "base")
    other = peft.PeftModel.from_pretrained(theirs(folder), str(folder / "soft"))
    logits = other(input_ids=TOKENS).logits[:, -12:]
    torch.testing.assert_close(ours(TOKENS), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["prefix_projection", "prompt"])
def test_what_peft_saves_opens_here_with_equal_logits(kind, folder, random_model):
    settings = {"prefix_projection": True} if kind == "prefix_projection" else {}
    other = with_peft(folder, kind=kind, **settings)
    other.save_pretrained(folder / "theirs")
    ours = adapters.load_adapter(random_model(), folder / "theirs")
    logits = other(input_ids=TOKENS).logits[:, -12:]
    torch.testing.assert_close(ours(TOKENS), logits, atol=1e-5, rtol=1e-5)


def test_the_file_holds_the_virtual_tokens_alone(folder, attached):
    ours = attached("prefix")
    adapters.save_adapter(ours, folder / "soft", folder / "base")
    size = (folder / "soft" / adapters.WEIGHTS).stat().st_size
    values = V * 2 * 2 * 2 * 8  # V, layers, keys and values, G, D
    assert 4 * values < size < 4 * values + 300


# --- what stands where ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_each_document_of_a_packed_row_has_the_virtual_tokens_in_front_of_itself(method, attached):
    model = attached(method)
    documents = torch.tensor([[0] * 5 + [1] * 7])
    positions = torch.tensor([[*range(5), *range(7)]])
    packed = model(TOKENS[:1], positions, document_mask(documents))
    for part in (slice(0, 5), slice(5, 12)):
        alone = model(TOKENS[:1, part])
        torch.testing.assert_close(packed[:, part], alone, atol=1e-5, rtol=1e-5)


def test_a_prompt_of_words_equals_these_words_in_front_of_the_text(random_model):
    model, words = random_model(), torch.tensor([[7, 8, 9]])
    before = model(torch.cat([words, TOKENS[:1]], 1))[:, 3:]
    soft_prompts.make_room(model, 3)
    embedding = model.model.embed_tokens.weight[words[0]].detach()
    model.model.prefix = soft_prompts.PromptEmbeddings(embedding)
    torch.testing.assert_close(model(TOKENS[:1]), before, atol=1e-5, rtol=1e-5)
    values = soft_prompts.keys_and_values(model.model, embedding)
    model.model.prefix = soft_prompts.KeysAndValues(values.detach())
    torch.testing.assert_close(model(TOKENS[:1]), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_generation_with_a_cache_continues_as_without_one(method, attached):
    """Prompts of several lengths, padded on the left, two samples each."""
    model, prompts = attached(method), [[1, 2, 3, 4], [7, 8, 9, 10, 11, 12, 13], [5]]
    out = generate(model, prompts, 8, samples=2, temperature=0).lists()
    for n, prompt in enumerate(prompts):
        ids = list(prompt)
        for _ in range(8):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        assert out[2 * n] == out[2 * n + 1] == ids[len(prompt) :]
    assert list(stream(model, prompts[0], 8, temperature=0)) == out[0]


@pytest.mark.parametrize("method", METHODS)
def test_the_whole_context_is_left_to_the_text(method, attached):
    model = attached(method)
    tokens = torch.zeros(1, model.cfg.max_position_embeddings, dtype=torch.int64)
    assert model(tokens).shape[1] == model.cfg.max_position_embeddings
    generate(model, [[1] * 56], 8, temperature=0)


@pytest.mark.parametrize("method", METHODS)
def test_bf16_follows_fp32(method, attached):
    model = attached(method)
    exact = model(TOKENS)
    model.compute_dtype = torch.bfloat16
    assert (model(TOKENS) - exact).abs().mean() < 0.1 * exact.abs().mean()
    generate(model, [[1, 2, 3]], 4, temperature=0)


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_training_moves_the_virtual_tokens_and_nothing_else(method, attached):
    model = attached(method)
    model.model.checkpoint_activations = True  # the blocks are recomputed in backward
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.03)
    losses = []
    for _ in range(30):
        losses.append(loss_of(model(TOKENS)))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.85 * losses[0]
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != ("prefix" in name), name


def test_checkpointed_gradients_are_the_same(attached):
    grads = []
    for checkpointed in (False, True):
        model = attached("prompt")
        model.model.checkpoint_activations = checkpointed
        loss_of(model(TOKENS)).backward()
        grads.append(model.model.prefix.embedding.grad)
    torch.testing.assert_close(*grads, atol=1e-7, rtol=1e-5)


# --- bad input -----------------------------------------------------------------------------------


def test_no_virtual_tokens_and_a_whole_context_of_them_are_refused(random_model):
    for method in METHODS:
        with pytest.raises(UserError, match="--virtual_tokens must be at least 1"):
            adapters.attach(random_model(), method, adapters.Settings(virtual_tokens=0))
        with pytest.raises(UserError, match="--virtual_tokens 64 fill the model's context of 64"):
            adapters.attach(random_model(), method, adapters.Settings(virtual_tokens=64))


@pytest.mark.parametrize("method", METHODS)
def test_virtual_tokens_of_another_base_are_refused(method, attached, random_model, tmp_path):
    adapters.save_adapter(attached(method), tmp_path, "base")
    other = random_model(num_hidden_layers=3, hidden_size=48)
    with pytest.raises(UserError, match="trained on another base"):
        adapters.load_adapter(other, tmp_path)
