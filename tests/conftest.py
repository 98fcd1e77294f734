"""What the tests share: one thread, no network, small models with random weights, a tokenizer."""

import os

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = (
    "1"  # before transformers is imported
)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from nanollm.gpt import GPT, GPTConfig
from nanollm.tokenizer import Tokenizer

SMALL = {
    "vocab_size": 270,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer():
    """256 bytes and 14 special tokens: 270 ids."""
    return Tokenizer.from_bytes()


@pytest.fixture
def random_model():
    """A small GPT in which every parameter is random, also gains, biases and zeros."""

    def make(seed=0, **changes):
        model = GPT(GPTConfig(**SMALL | changes)).eval()
        randomise(model, seed)
        return model

    return make


@pytest.fixture
def randomised():
    return randomise


def randomise(model, seed=0):
    """Vectors around 1, so that gains stay gains; logits spread by about 2: tokens differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=generator)
            spread = 0.4 if "embed" in name or "lm_head" in name else 1.5 * p.shape[-1] ** -0.5
            p.copy_(1 + 0.3 * noise if p.dim() == 1 else spread * noise)
    return model


@pytest.fixture(scope="session")
def transformers():
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


@pytest.fixture
def here(trained, monkeypatch):
    """In the folder that the module's fixture `trained` has made."""
    monkeypatch.chdir(trained)
    return trained
