"""What holds for every method: what is trained, saved, opened, merged and refused; soft prompts."""

import copy
import json

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import close, same

from nanollm.config import UserError
from nanollm.generate import generate, stream
from nanollm.gpt import document_mask, unwrap
from nanollm.hub import load_model, load_scalar, save_model
from nanollm.peft import adapters, bottleneck, soft_prompts

TOKENS = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(0))
V = 5
SETTINGS = adapters.Settings(rank=4, alpha=8, virtual_tokens=V, hidden=16)
every_method = pytest.mark.parametrize("method", adapters.METHODS)
every_soft_prompt = pytest.mark.parametrize("method", ["prefix", "ptuning", "prompt"])


def attach(model, method, base=None):
    torch.manual_seed(0)
    return adapters.attach(model, method, SETTINGS, base)


def loss_of(model):
    logits = model(TOKENS)
    if logits.dim() == 2:  # a reward model
        return (logits - 1).square().mean()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())


def train(model, n=3):
    """Train a little, so that what starts at zero moves; returns the losses."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(n):
        losses.append(loss_of(model))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    return losses


# --- training ------------------------------------------------------------------------------------


@every_method
def test_what_was_added_is_trained_and_nothing_else(method, random_model):
    model = random_model()
    base = {name.replace(".base.", "."): p for name, p in model.named_parameters()}
    before = {name: p.detach().clone() for name, p in base.items()}
    attach(model, method)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and not {map(id, trained)} & {map(id, base.values())}
    n, share = adapters.trainable(model)
    assert n == sum(p.numel() for p in trained)
    assert share == n / sum(p.numel() for p in before.values())
    gradients = []
    for recompute in (False, True):  # the blocks, in backward
        model.model.checkpoint_activations = recompute
        model.zero_grad()
        loss_of(model).backward()
        gradients.append([p.grad for p in trained])
    for once, again in zip(*gradients):
        close(once, again)
    losses = train(model, 30)
    assert losses[-1] < 0.9 * losses[0] and same(base, before)


@pytest.mark.parametrize("method", ["lora", "dora", "bottleneck"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_starts_at_zero_changes_nothing_at_first(method, dtype, random_model):
    model = random_model(attention_bias=True)
    model.compute_dtype = dtype
    before = model(TOKENS)
    assert torch.equal(attach(model, method)(TOKENS), before)


# --- files ---------------------------------------------------------------------------------------


@every_method
def test_a_trained_adapter_is_saved_and_loaded_again(method, random_model, tmp_path):
    model = attach(random_model(), method)
    train(model)
    adapters.save_adapter(model, tmp_path, "runs/base")
    again = adapters.load_adapter(random_model(), tmp_path)
    close(again(TOKENS), model(TOKENS), 1e-6, 1e-6)
    assert again.adapter == {"prefix": "ptuning"}.get(method, method)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "runs/base"
    tensors = adapters.METHODS[again.adapter].parameters(again)
    size = sum(4 * t.numel() for t in tensors.values())  # what training alone needs isn't saved
    assert size < (tmp_path / adapters.WEIGHTS).stat().st_size < 1.5 * size + 2000


@pytest.mark.parametrize("method", ["lora", "bottleneck", "prefix", "prompt"])
def test_a_reward_models_head_is_trained_beside_the_adapter_and_saved_with_it(
    method, random_model, tokenizer, tmp_path
):
    save_model(random_model(), tokenizer, tmp_path / "base")
    model = attach(load_scalar(tmp_path / "base")[0], method, tmp_path / "base")
    before = model.score.weight.detach().clone()
    train(model)
    assert not torch.equal(model.score.weight, before)
    model.shift = 1.5
    save_model(model, tokenizer, tmp_path / "adapter")
    again, _ = load_scalar(tmp_path / "adapter")
    assert again.shift == 1.5
    close(again(TOKENS), model(TOKENS))


@pytest.mark.parametrize("method", ["lora", "bottleneck", "prefix"])
def test_an_adapter_goes_on_the_weights_that_it_was_trained_on_alone(
    method, tmp_path, random_model, tokenizer
):
    base, adapter, other = (tmp_path / name for name in ("base", "adapter", "other"))
    save_model(random_model(), tokenizer, base)
    save_model(random_model(seed=1), tokenizer, other)  # with equal shapes
    save_model(attach(load_model(base)[0], method, base), tokenizer, adapter)
    load_model(base, adapter)
    with pytest.raises(UserError, match=f"{adapter} was trained on another base: {other} holds"):
        load_model(other, adapter)
    changed = random_model()
    changed.model.layers[1].mlp.up_proj.weight.data.add_(1e-3)  # trained on
    save_model(changed, tokenizer, base)
    with pytest.raises(UserError, match="was trained on another base"):
        load_model(adapter)


@pytest.mark.parametrize("method", ["lora", "bottleneck", "prefix", "prompt"])
def test_an_adapter_of_a_base_of_another_shape_is_refused(method, random_model, tmp_path):
    adapters.save_adapter(attach(random_model(), method), tmp_path, "base")
    with pytest.raises(UserError, match="trained on another base"):
        adapters.load_adapter(random_model(hidden_size=48, head_dim=4), tmp_path)


def test_what_cannot_be_attached_is_refused(random_model, tmp_path):
    for name in ("magic", "lora+", "+prompt", "lora+lora", "prompt+lora", "lora+dora+prompt"):
        with pytest.raises(UserError, match="--adapter must be one of lora, .*not '"):
            adapters.attach(random_model(), name)
    with pytest.raises(UserError, match="has an adapter .prefix. already"):
        attach(attach(random_model(), "prefix"), "lora")
    with pytest.raises(UserError, match="holds no adapter"):
        adapters.load_adapter(random_model(), tmp_path)
    with pytest.raises(UserError, match="--targets must name o_proj, down_proj"):
        adapters.attach(random_model(), "bottleneck", adapters.Settings(targets="q_proj"))
    for name, method, words in (
        ("a", "bottleneck", "only adapters of the LoRA family stand side by side"),
        ("a", "lora", "called as their folders, and a is taken"),
        ("b", "qlora", "for a base of four bits can't stand beside"),
    ):
        model = adapters.attach(random_model(), "dora", SETTINGS, name="a")
        with pytest.raises(UserError, match=words):
            adapters.attach(model, method, SETTINGS, name=name)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOHA"}))
    with pytest.raises(UserError, match="peft_type 'LOHA' is not implemented"):
        adapters.load_adapter(random_model(), tmp_path)


# --- sampling and comparing ----------------------------------------------------------------------


@every_method
def test_generation_speaks_with_the_adapter(method, random_model):
    """Prompts of several lengths, padded on the left, two samples each; with a cache as without."""
    model, prompts = attach(random_model(), method), [[1, 2, 3, 4], [7, 8, 9, 10, 11, 12], [5]]
    train(model)
    out = generate(model, prompts, 8, samples=2, temperature=0).lists()
    for n, prompt in enumerate(prompts):
        ids = list(prompt)
        for _ in range(8):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        assert out[2 * n] == out[2 * n + 1] == ids[len(prompt) :]
    assert list(stream(model, prompts[0], 8, temperature=0)) == out[0]


@pytest.mark.parametrize("method", [n for n, m in adapters.METHODS.items() if m.mergeable])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_into_plain_layers_the_model_computes_and_writes_the_same(
    method, dtype, random_model
):
    model = attach(random_model(attention_bias=True), method)
    train(model)
    merged = copy.deepcopy(model)
    unwrap(merged, merged=True)
    assert {*merged.state_dict()} == {*random_model(attention_bias=True).state_dict()}
    close(merged(TOKENS), model(TOKENS))
    for each in (model, merged):
        each.compute_dtype = dtype
    outs = [generate(m, [[1, 2, 3], [4]], 10, temperature=0) for m in (model, merged)]
    assert torch.equal(outs[0].tokens, outs[1].tokens)
    assert torch.equal(outs[0].logprobs, outs[1].logprobs)
    assert any(hasattr(m, "plain") for m in model.modules())  # the model itself stays as it was


@every_method
def test_the_reference_is_the_base_and_shares_its_weights(method, random_model):
    model = random_model()
    base = model(TOKENS)
    attach(model, method)
    if method == "qlora":
        base = model(TOKENS)  # of its base, beside which B is zero
    train(model)
    ref = adapters.reference(model)
    close(ref(TOKENS), base, 1e-6, 1e-6)
    assert not torch.allclose(model(TOKENS), base)
    own = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in own for p in ref.parameters())
    train(model)
    close(ref(TOKENS), base, 1e-6, 1e-6)


@every_method
def test_bf16_follows_fp32(method, random_model):
    model = attach(random_model(), method)
    exact = model(TOKENS)
    model.compute_dtype = torch.bfloat16
    assert (model(TOKENS) - exact).abs().mean() < 0.1 * exact.abs().mean()


@every_soft_prompt
def test_virtual_tokens_stand_before_each_document_and_take_nothing_of_the_context(
    method, random_model
):
    model = attach(random_model(), method)
    positions, documents = torch.tensor([[*range(5), *range(7)]]), torch.tensor([[0] * 5 + [1] * 7])
    packed = model(TOKENS[:1], positions, document_mask(documents))
    for part in (slice(0, 5), slice(5, 12)):
        close(packed[:, part], model(TOKENS[:1, part]))
    context = model.cfg.max_position_embeddings
    assert model(torch.zeros(1, context, dtype=torch.int64)).shape[1] == context
    generate(model, [[1] * (context - 8)], 8, temperature=0)


# --- bottleneck adapters -------------------------------------------------------------------------


def test_a_bottleneck_adds_its_own_output_to_the_layers(random_model):
    layer = random_model().model.layers[0].mlp.down_proj
    new = bottleneck.Bottleneck(layer, 1)
    new.down.weight.data.fill_(0.5)
    new.up.weight.data.fill_(2.0)
    x = torch.randn(2, layer.in_features)
    h = layer(x)
    close(new(x), h + 2.0 * F.gelu(0.5 * h.sum(1, keepdim=True)))
    assert new.plain(merged=False) is layer and new.plain(merged=True) is new


# --- virtual tokens: equal to peft in logits, gradients and files --------------------------------


@pytest.fixture
def pair(random_model, tokenizer, tmp_path):
    """The same base with V virtual tokens in front, ours and peft's."""
    save_model(random_model(), tokenizer, tmp_path / "base")

    def make(method):
        config = peft.PromptTuningConfig if method == "prompt" else peft.PrefixTuningConfig
        how = {"task_type": "CAUSAL_LM", "num_virtual_tokens": V}
        if method == "prefix":
            how |= {"prefix_projection": True, "encoder_hidden_size": 16}
        ours = attach(random_model(), method)
        return ours, peft.get_peft_model(theirs(tmp_path), config(**how)).train()

    return make


def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)


def logits_of_peft(model):
    return model(input_ids=TOKENS).logits[:, -12:]


@every_soft_prompt
def test_logits_and_gradients_equal_pefts(method, pair):
    ours, other = pair(method)
    encoder, prefix = other.prompt_encoder["default"], ours.model.prefix
    if method == "prefix":
        # peft's embedding is as wide as keys and values, ours as the model: both are free to choose
        wide, out = encoder.embedding.weight.shape[1], encoder.transform[2].out_features
        prefix = ours.model.prefix = soft_prompts.PrefixMLP(V, wide, 16, out)
        prefix.load_state_dict(encoder.state_dict())
        parameters = list(zip(prefix.parameters(), encoder.parameters(), strict=True))
    else:
        encoder.embedding.weight.data.mul_(0.3)
        (own,) = prefix.parameters()
        own.data.copy_(encoder.embedding.weight)
        parameters = [(own, encoder.embedding.weight)]
    close(ours(TOKENS), logits_of_peft(other))
    loss_of(ours).backward()
    loss_of(lambda tokens: logits_of_peft(other)).backward()
    for one, two in parameters:
        assert two.grad.abs().max() > 0
        close(one.grad, two.grad)


@every_soft_prompt
def test_files_open_both_ways_with_equal_logits(method, pair, random_model, tmp_path):
    ours, other = pair(method)
    adapters.save_adapter(ours, tmp_path / "ours", tmp_path / "base")
    opened = peft.PeftModel.from_pretrained(theirs(tmp_path), str(tmp_path / "ours"))
    close(ours(TOKENS), logits_of_peft(opened))
    other.save_pretrained(tmp_path / "theirs")
    ours = adapters.load_adapter(random_model(), tmp_path / "theirs")
    close(ours(TOKENS), logits_of_peft(other))


@pytest.mark.parametrize("method", ["lora+prompt", "dora+prefix", "lora+ptuning"])
def test_an_adapter_and_virtual_tokens_together_are_two_folders_of_pefts(
    method, random_model, tokenizer, tmp_path
):
    base, folder = tmp_path / "base", tmp_path / "both"
    save_model(random_model(), tokenizer, base)
    ours = attach(random_model(), method, base)
    train(ours)
    save_model(ours, tokenizer, folder)
    first, second = method.split("+")
    inner = peft.PeftModel.from_pretrained(theirs(tmp_path), str(folder / first))
    other = peft.PeftModel.from_pretrained(inner.merge_and_unload(), str(folder))
    close(logits_of_peft(other), ours(TOKENS))
    folder.rename(tmp_path / "moved")
    save_model(attach(random_model(1), method, base), tokenizer, folder)
    again, _ = load_model(tmp_path / "moved")
    close(again(TOKENS), ours(TOKENS))
    out = [generate(each, [[1, 2], [3]], 6, temperature=0).lists() for each in (ours, again)]
    assert out[0] == out[1] and again.adapter == {"prefix": "ptuning"}.get(second, second)


@pytest.mark.parametrize("method", ["prompt", "ptuning"])
def test_a_prompt_of_words_equals_these_words_in_front_of_the_text(method, random_model):
    model, settings = random_model(), adapters.Settings(virtual_tokens=3)
    torch.manual_seed(0)
    words = torch.randint(model.cfg.vocab_size, (3,))[None]  # as attaching will draw them
    before = model(torch.cat([words, TOKENS[:1]], 1))[:, 3:]
    torch.manual_seed(0)
    adapters.attach(model, method, settings)
    close(model(TOKENS[:1]), before)
