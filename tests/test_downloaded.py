"""A downloaded model is prompted as its makers meant, and ends where they meant it to."""

import json
from pathlib import Path

import pytest
import torch
from conftest import SMALL, randomise
from helpers import turns
from test_templates import base, downloaded, theirs  # noqa: F401

from nanollm.generate import complete
from nanollm.hub import load_model
from nanollm.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
STOPS = [0, 2]  # places among the added tokens: <|endoftext|>, <|im_end|>


def qwen3(place, base):  # noqa: F811
    """A folder with a Qwen3 of random weights, a template of its own and two stops."""
    Path(place).mkdir(parents=True)
    place = downloaded(Path(place), base, "qwen3")
    stops = [len(json.loads(base)["model"]["vocab"]) + place for place in STOPS]
    shape = SMALL | {"vocab_size": Tokenizer.load(place).vocab_size + 3}
    shape |= {"max_position_embeddings": 256, "eos_token_id": stops, "bos_token_id": None}
    peer = randomise(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape)))
    peer.generation_config.eos_token_id = stops
    peer.save_pretrained(place)
    return peer.eval()


def test_a_greedy_continuation_of_the_models_own_prompt_equals_transformers(base, tmp_path):  # noqa: F811
    """And so does a third stop of generation_config.json, one that the model does write."""
    peer = qwen3(tmp_path / "stopping", base)
    path = tmp_path / "stopping/generation_config.json"
    config = json.loads(path.read_text())
    prompts = [theirs(tmp_path / "stopping", turns(f"what is {n}?"), True) for n in range(12)]

    def continued(prompt):
        ids = peer.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
        return ids[0, len(prompt) :].tolist()

    written = continued(prompts[0])
    third = next(token for token in written[3:] if token not in written[:3])
    peer.generation_config.eos_token_id = config["eos_token_id"] + [third]
    path.write_text(json.dumps(config | {"eos_token_id": peer.generation_config.eos_token_id}))
    model, tokenizer = load_model(tmp_path / "stopping")
    wanted = [continued(prompt) for prompt in prompts]
    assert len(wanted[0]) < 24 and wanted[0][-1] == third
    texts = [tokenizer.decode(i for i in ids if i not in tokenizer.stop_ids) for ids in wanted]
    assert complete(model, tokenizer, prompts, 24) == texts
