"""One way to attach, count, save and load every method; bottleneck adapters."""

import json

import pytest
import torch
import torch.nn.functional as F

from nanollm.config import UserError
from nanollm.generate import generate
from nanollm.peft import adapters

TOKENS = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(0))
SETTINGS = adapters.Settings(rank=4, alpha=8, virtual_tokens=5, hidden=16)


def attach(model, method):
    torch.manual_seed(0)
    return adapters.attach(model, method, SETTINGS)


def step(model, n=3):
    """Train a little, so that what starts at zero moves."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(n):
        loss = F.cross_entropy(model(TOKENS)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# --- every method --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", adapters.METHODS)
def test_only_what_was_added_is_trained(method, random_model):
    model = random_model()
    base = {name for name, _ in model.named_parameters()}
    n_base = sum(p.numel() for p in model.parameters())
    attach(model, method)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and not trained.keys() & base
    n, share = adapters.trainable(model)
    assert n == sum(p.numel() for p in trained.values()) and share == n / n_base


@pytest.mark.parametrize("method", ["lora", "dora", "adapter"])
def test_what_starts_at_zero_changes_nothing_at_first(method, random_model):
    model = random_model()
    before = model(TOKENS)
    after = attach(model, method)(TOKENS)
    if method == "dora":  # m / |W| is 1 up to rounding
        torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(after, before)


@pytest.mark.parametrize("method", adapters.METHODS)
def test_a_trained_adapter_is_saved_and_loaded_again(method, random_model, tmp_path):
    model = attach(random_model(), method)
    step(model)
    wanted = model(TOKENS)
    adapters.save_adapter(model, tmp_path, "runs/base")
    again = adapters.load_adapter(random_model(), tmp_path)
    torch.testing.assert_close(again(TOKENS), wanted, atol=1e-6, rtol=1e-6)
    assert again.adapter == {"prefix": "ptuning"}.get(method, method)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "runs/base"


@pytest.mark.parametrize("method", adapters.METHODS)
def test_generation_speaks_with_the_adapter(method, random_model):
    model = attach(random_model(), method)
    step(model)
    ids = [1, 2, 3]
    for _ in range(6):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert generate(model, [[1, 2, 3]], 6, temperature=0).lists() == [ids[3:]]


# --- bottleneck adapters -------------------------------------------------------------------------


def test_a_bottleneck_adds_its_own_output_to_the_layers(random_model):
    model = random_model()
    layer = model.model.layers[0].mlp.down_proj
    new = adapters.Bottleneck.around(layer, 1)
    new.down.weight.data.fill_(0.5)
    new.up.weight.data.fill_(2.0)
    x = torch.randn(2, layer.in_features)
    h = layer(x)
    middle = 0.5 * h.sum(1, keepdim=True)
    torch.testing.assert_close(new(x), h + 2.0 * F.gelu(middle))


def test_two_adapters_in_every_block_with_two_matrices_and_two_biases_each(random_model):
    model = attach(random_model(), "adapter")
    C, r = 32, 4
    assert adapters.trainable(model)[0] == 2 * 2 * (2 * C * r + r + C)


def test_the_base_keeps_the_names_of_its_parameters_and_their_values(random_model):
    base = random_model()
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = attach(base, "adapter")
    step(model)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], p) for name, p in before.items())


def test_without_its_adapter_a_layer_is_the_bases_own(random_model):
    model = random_model()
    x, layer = torch.randn(2, 48), model.model.layers[1].mlp.down_proj
    wanted = layer(x)
    attach(model, "adapter")
    step(model)
    wrapped = model.model.layers[1].mlp.down_proj
    assert not torch.equal(wrapped(x), wanted)
    assert torch.equal(wrapped.plain(merged=False)(x), wanted)
    assert wrapped.plain(merged=False).weight is wrapped.weight
    assert wrapped.plain(merged=True) is wrapped


# --- bad input -----------------------------------------------------------------------------------


def test_what_cannot_be_attached_is_refused(random_model):
    with pytest.raises(UserError, match="unknown method 'magic'"):
        adapters.attach(random_model(), "magic")
    for method in ("lora", "dora", "qlora", "adapter"):
        with pytest.raises(UserError, match="--rank must be at least 1, not 0"):
            adapters.attach(random_model(), method, adapters.Settings(rank=0))
    with pytest.raises(UserError, match="has an adapter .prefix. already"):
        attach(attach(random_model(), "prefix"), "lora")


@pytest.mark.parametrize("method", ["adapter", "lora"])
def test_an_adapter_of_another_base_is_refused(method, random_model, tmp_path):
    adapters.save_adapter(attach(random_model(), method), tmp_path, "base")
    with pytest.raises(UserError, match="another base"):
        adapters.load_adapter(random_model(hidden_size=48), tmp_path)


def test_a_folder_without_an_adapter_or_with_an_unknown_one_is_refused(random_model, tmp_path):
    with pytest.raises(UserError, match="holds no adapter"):
        adapters.load_adapter(random_model(), tmp_path)
    adapters.save_adapter(attach(random_model(), "adapter"), tmp_path, "base")
    path = tmp_path / "adapter_config.json"
    for change, message in (
        ({"peft_type": "IA3"}, "'IA3' is not implemented"),
        ({"r": 0}, "not a whole number from 1 on"),
    ):
        kept = json.loads(path.read_text())
        path.write_text(json.dumps(kept | change))
        with pytest.raises(UserError, match=message):
            adapters.load_adapter(random_model(), tmp_path)
        path.write_text(json.dumps(kept))
