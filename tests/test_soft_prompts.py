"""Prefix tuning, P-Tuning v2 and prompt tuning: equal to peft in logits, gradients and files."""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers

from nanollm.generate import generate
from nanollm.hub import load_model, save_model
from nanollm.peft import adapters, soft_prompts

V = 5
TOKENS = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(0))
METHODS = {
    "prefix": peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=V, prefix_projection=True, encoder_hidden_size=16
    ),
    "ptuning": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=V),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=V),
}
every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture
def pair(random_model, tokenizer, tmp_path):
    """The same base with V virtual tokens in front, ours and peft's."""
    save_model(random_model(), tokenizer, tmp_path / "base")

    def make(method):
        torch.manual_seed(0)
        settings = adapters.Settings(virtual_tokens=V, hidden=16)
        ours = adapters.attach(random_model(), method, settings)
        return ours, peft.get_peft_model(theirs(tmp_path), copy.copy(METHODS[method])).train()

    return make


def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)


def logits_of_peft(model):
    return model(input_ids=TOKENS).logits[:, -12:]


def loss_of(logits):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())


@every_method
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
    a, b = ours(TOKENS), logits_of_peft(other)
    loss_of(a).backward()
    loss_of(b).backward()
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for one, two in parameters:
        assert two.grad.abs().max() > 0
        torch.testing.assert_close(one.grad, two.grad, atol=1e-5, rtol=1e-5)


@every_method
def test_files_open_both_ways_with_equal_logits(method, pair, random_model, tmp_path):
    ours, other = pair(method)
    adapters.save_adapter(ours, tmp_path / "ours", tmp_path / "base")
    opened = peft.PeftModel.from_pretrained(theirs(tmp_path), str(tmp_path / "ours"))
    torch.testing.assert_close(ours(TOKENS), logits_of_peft(opened), atol=1e-5, rtol=1e-5)
    other.save_pretrained(tmp_path / "theirs")
    ours = adapters.load_adapter(random_model(), tmp_path / "theirs")
    torch.testing.assert_close(ours(TOKENS), logits_of_peft(other), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["lora+prompt", "dora+prefix", "lora+ptuning"])
def test_an_adapter_and_virtual_tokens_together_are_two_folders_of_pefts(
    method, random_model, tokenizer, tmp_path
):
    base, folder = tmp_path / "base", tmp_path / "both"
    save_model(random_model(), tokenizer, base)
    settings = adapters.Settings(rank=4, virtual_tokens=V, hidden=16)
    ours = adapters.attach(random_model(), method, settings, base)
    trained = [p for p in ours.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(ours(TOKENS)).backward()
        assert all(p.grad.abs().max() > 0 for p in trained[-1:])
        optimizer.step()
    save_model(ours, tokenizer, folder)
    first, second = method.split("+")
    inner = peft.PeftModel.from_pretrained(theirs(tmp_path), str(folder / first))
    other = peft.PeftModel.from_pretrained(inner.merge_and_unload(), str(folder))
    torch.testing.assert_close(logits_of_peft(other), ours(TOKENS), atol=1e-5, rtol=1e-5)
    folder.rename(tmp_path / "moved")
    save_model(adapters.attach(random_model(1), method, settings, base), tokenizer, folder)
    again, _ = load_model(tmp_path / "moved")
    torch.testing.assert_close(again(TOKENS), ours(TOKENS), atol=1e-5, rtol=1e-5)
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
    torch.testing.assert_close(model(TOKENS[:1]), before, atol=1e-5, rtol=1e-5)
