"""A downloaded folder through every script and back: its template, ids, stops and logits stay."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SMALL, randomise
from helpers import ON_CPU, in_new_folder, run, turns
from test_templates import base, downloaded, theirs  # noqa: F401

import distill
import lora
import train_dpo
import train_grpo
import train_ppo
import train_pretrain
import train_rm
import train_sft
from nanollm.checkpoint import is_adapter, is_scalar
from nanollm.formats import write_jsonl
from nanollm.generate import complete
from nanollm.hub import load_model, load_scalar
from nanollm.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
STOPS = [0, 2]  # places among the added tokens: <|endoftext|>, <|im_end|>
CHAT = turns("what is 2 + 3?")
BRIEF = [*ON_CPU, "--steps", 1, "--batch_size", 2, "--eval_every", 1]
FROM = ["--init", "downloaded"]
RL = ["--data", "problems.jsonl", "--max_new_tokens", 4, "--val_fraction", 0.5]
ROAD = {  # script: (module, flags)
    "pretrain": (train_pretrain, [*FROM, "--data", "text.txt", "--context", 64]),
    "sft": (train_sft, [*FROM, "--data", "chats.jsonl", "--replay", 0]),
    "rm": (train_rm, [*FROM, "--data", "pairs.jsonl"]),
    "dpo": (train_dpo, [*FROM, "--data", "pairs.jsonl"]),
    "ppo": (train_ppo, [*FROM, *RL, "--reward", "rules"]),
    "grpo": (train_grpo, [*FROM, *RL, "--samples", 2, "--eval_samples", 1]),
    "distill": (
        distill,
        "--teacher downloaded --init downloaded --method soft --data chats.jsonl --labels 10",
    ),
    "lora": (
        lora,
        "--init downloaded --data chats.jsonl --test_data problems.jsonl "
        "--other_data problems.jsonl --other_text text.txt",
    ),
}


@pytest.fixture(scope="module", autouse=True)
def folder(base, tmp_path_factory):  # noqa: F811
    """A Qwen3 with a template of its own, two stops, and files of records."""
    with in_new_folder(tmp_path_factory) as folder:
        place = downloaded(Path("downloaded"), base, "qwen3")
        tokenizer = Tokenizer.load(place)
        stops = [len(json.loads(base)["model"]["vocab"]) + place for place in STOPS]
        shape = SMALL | {"vocab_size": tokenizer.vocab_size + 3, "max_position_embeddings": 256}
        shape |= {"eos_token_id": stops, "bos_token_id": None}
        peer = randomise(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape)))
        peer.generation_config.eos_token_id = stops
        peer.save_pretrained(place)
        sums = [(f"what is {n} + {n}?", str(n + n)) for n in range(12)]
        write_jsonl("chats.jsonl", [{"messages": turns(*pair)} for pair in sums])
        pairs = [{"prompt": p, "chosen": a, "rejected": "no"} for p, a in sums]
        write_jsonl("pairs.jsonl", pairs)
        write_jsonl("problems.jsonl", [{"prompt": p, "answer": a} for p, a in sums])
        yield folder


@pytest.mark.parametrize("name", ROAD)
def test_a_downloaded_model_is_itself_after_every_script(name):
    module, flags = ROAD[name]
    flags = flags.split() if isinstance(flags, str) else flags
    run(module, *BRIEF, *flags, out=f"runs/{name}")
    out = Path(f"runs/{name}")
    if name != "distill" or is_adapter(out):
        assert theirs(out, CHAT, True) == theirs("downloaded", CHAT, True)
    model, tokenizer = (load_scalar if is_scalar(out) else load_model)(out)
    assert tokenizer == Tokenizer.load("downloaded")
    assert tokenizer.stop_ids == Tokenizer.load("downloaded").stop_ids
    if is_adapter(out):
        return  # opened by peft: see test_lora.py
    kind = "SequenceClassification" if is_scalar(out) else "CausalLM"
    peer = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(out).eval()
    assert {*peer.config.eos_token_id} >= tokenizer.stop_ids
    ids = torch.tensor([theirs("downloaded", [*CHAT, *turns("a", "5")[1:]])])
    with torch.no_grad():
        if is_scalar(out):
            assert torch.allclose(
                model(ids)[:, -1], peer(ids).logits[:, 0] - model.shift, atol=1e-5
            )
        else:
            assert torch.allclose(model(ids), peer(ids).logits, atol=1e-5)


def test_a_greedy_continuation_of_the_models_own_prompt_equals_transformers():
    """And so does a third stop of generation_config.json, one that the model does write."""
    shutil.copytree("downloaded", "stopping")
    path = Path("stopping/generation_config.json")
    config = json.loads(path.read_text())
    peer = transformers.AutoModelForCausalLM.from_pretrained("stopping").eval()
    prompts = [theirs("stopping", turns(f"what is {n}?"), True) for n in range(12)]

    def continued(prompt):
        ids = peer.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
        return ids[0, len(prompt) :].tolist()

    written = continued(prompts[0])
    third = next(token for token in written[3:] if token not in written[:3])
    peer.generation_config.eos_token_id = config["eos_token_id"] + [third]
    path.write_text(json.dumps(config | {"eos_token_id": peer.generation_config.eos_token_id}))
    model, tokenizer = load_model("stopping")
    wanted = [continued(prompt) for prompt in prompts]
    assert len(wanted[0]) < 24 and wanted[0][-1] == third
    texts = [tokenizer.decode(i for i in ids if i not in tokenizer.stop_ids) for ids in wanted]
    assert complete(model, tokenizer, prompts, 24) == texts
