"""The bytes of a step with LoRA that lora.py's docstring states, counted tensor by tensor."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanollm.gpt import GPT, GPTConfig
from nanollm.peft.adapters import attach
from nanollm.peft.method import Settings
from train_sft import sft_loss


class Held(TorchDispatchMode):
    """Counts the bytes of all storages that are alive: `now`, and the most of them, `peak`."""

    def __init__(self, tensors):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, {}
        for tensor in tensors:
            self.count(tensor)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor):
                self.count(each)
        return out

    def count(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known[key] = weakref.ref(storage, lambda _: self.forget(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def forget(self, key, size):
        del self.known[key]
        self.now -= size


def test_a_step_with_lora_takes_as_many_bytes_as_the_formula_says(monkeypatch):
    monkeypatch.setattr("nanollm.logprobs.CHUNK", {"cpu": 2**27})  # as on a GPU
    T, V, C = 256, 8192, 256
    shape = {"hidden_size": C, "intermediate_size": 512, "num_hidden_layers": 4, "head_dim": 64}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": T}
    model = GPT(GPTConfig(vocab_size=V, tie_word_embeddings=True, **shape))
    N = sum(p.numel() for p in model.parameters())
    attach(model, "lora", Settings(rank=4, alpha=8.0))
    model.compute_dtype, model.model.checkpoint_activations = torch.bfloat16, True
    trained = [p for p in model.parameters() if p.requires_grad]
    n = sum(p.numel() for p in trained)
    optimizer = torch.optim.AdamW(trained)
    tokens, mask = torch.arange(T)[None], torch.ones(1, T, dtype=torch.bool)
    with Held([*model.parameters(), *model.buffers()]) as held:
        for _ in range(2):
            sft_loss(model(tokens), tokens, mask).backward()
            optimizer.step()
            optimizer.zero_grad()
    formula = 4 * N + 16 * n + 2 * V * C + 12 * T * V
    assert 0.9 * formula < held.peak < 1.1 * formula
