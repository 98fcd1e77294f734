"""The one place that opens whatever lies in a folder, and writes it back: a language model, a
reward model, an adapter on either, or a vision-language model. What isn't there isn't imported.

    python -m nanollm.hub export runs/sft --out model --dtype bf16      # without the run's files
    python -m nanollm.hub export runs/lora --out model --merge          # base and adapter in one

What was written is opened again and compared before it gets its name: ids and logits.

For llama.cpp run `convert_hf_to_gguf.py model` on the result. It wants architectures[0] to be one
that it knows (ours are), tokenizer.json with ids below vocab_size, and of a byte-level BPE that it
knows the ids of a test text: a downloaded model's tokenizer passes, one trained here does not, for
llama.cpp would cut text in other places.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from nanollm import safetensors
from nanollm.checkpoint import (
    bases_of,
    existing_folder,
    is_adapter,
    is_scalar,
    load_gpt,
    load_weights,
    read_config,
    save_gpt,
)
from nanollm.config import UserError, atomic_folder, cli, read_json
from nanollm.gpt import ScalarGPT
from nanollm.runtime import DTYPES
from nanollm.tokenizer import Tokenizer


def save_model(model, tokenizer, folder):
    """Write model and tokenizer as a model folder; of a model with an adapter that is trained, the
    adapter's files only.
    """
    folder = Path(folder)
    if model.adapter:
        from nanollm.peft.adapters import save_adapter

        tokenizer.save(folder)
        save_adapter(model, folder, model.base_folder)
    elif hasattr(model, "vision"):
        from nanollm.vision.vlm import save_vlm

        save_vlm(model, tokenizer, folder)
    else:
        save_gpt(model, tokenizer, folder)


def load_model(folder, adapter=None):
    """(GPT in fp32 on the CPU, Tokenizer) from a run folder or any downloaded folder of a known
    shape; from an adapter's folder its base with the adapter. `adapter` names one more to put on,
    or several with commas, of which peft.lora.use chooses. A folder of LLaVA's shape gives a VLM.
    """
    folder = existing_folder(folder)
    if is_scalar(folder):
        raise UserError(f"{folder} holds a reward model, which scores text and writes none")
    if adapter:
        from nanollm.peft.adapters import put_adapters

        chosen = [existing_folder(name, "--adapter") for name in str(adapter).split(",")]
        model, tokenizer = load_model(folder)
        put_adapters(model, chosen, folder)
        return model, tokenizer
    if is_adapter(folder):
        return load_model(bases_of(folder)[0], folder)
    if "vision_config" in read_json(folder / "config.json"):
        from nanollm.vision.vlm import load_vlm

        return load_vlm(folder)
    return load_gpt(folder)


def load_scalar(folder):
    """(ScalarGPT in fp32 on the CPU, Tokenizer) from the folder of a reward model, ours or any of
    Hugging Face's shape with one label; or from a language model's, whose head a new one replaces.
    """
    folder = existing_folder(folder)
    if is_scalar(folder) and is_adapter(folder):
        from nanollm.peft.adapters import put_adapters

        base = bases_of(folder)[0]
        model, tokenizer = load_scalar(base)
        put_adapters(model, [folder], base)
        return model, tokenizer
    if is_scalar(folder):
        model, tokenizer = ScalarGPT(read_config(folder)), Tokenizer.load(folder)
        load_weights(model, safetensors.load_folder(folder), folder)
        model.shift = float(read_json(folder / "config.json").get("reward_shift", 0.0))
        return model, tokenizer
    language_model, tokenizer = load_model(folder)
    if language_model.adapter:
        raise UserError(f"{folder} holds an adapter that can't be merged; start from its base")
    model = ScalarGPT(language_model.cfg)
    model.model.load_state_dict(language_model.model.state_dict())
    return model, tokenizer


# --- the command ---------------------------------------------------------------------------------

TEXT = "The quick brown fox jumps over 12 lazy dogs;\n\tisn't it (x == 3.5)?"


@dataclass
class Config:
    run: str = field(default="runs/sft", metadata={"positional": True})  # run or model folder
    out: str = "model"  # folder to write, a new one
    merge: bool = False  # of an adapter: write the model that base and adapter make together
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # precision of the weights in the file


def export(cfg):
    """Write the plain model folder cfg.out, once it was opened again and is what it should be."""
    folder, out = existing_folder(cfg.run), Path(cfg.out)
    if out.exists():
        raise UserError(f"--out {out} is there already; name a new folder")
    if is_adapter(folder) and not cfg.merge:
        raise UserError(f"{folder} holds an adapter, which peft opens; add --merge for one model")
    load = load_scalar if is_scalar(folder) else load_model
    model, tokenizer = load(folder)
    if model.adapter:
        raise UserError(f"{folder}: an adapter of kind {model.adapter} can't be merged")
    ids = tokenizer.encode(TEXT)[: model.cfg.max_position_embeddings]
    with torch.no_grad(), atomic_folder(out) as new:
        before = model(torch.tensor([ids]))
        save_model(model.to(DTYPES[cfg.dtype]), tokenizer, new)
        again, its_tokenizer = load(new)
        error = float((again(torch.tensor([ids])) - before).norm() / before.norm())
        if its_tokenizer != tokenizer or not error <= 16 * torch.finfo(DTYPES[cfg.dtype]).eps:
            why = f"what was written differs, its logits by {error:.1%}; --dtype fp32 is exact"
            raise UserError(f"{folder}: {why}")
    print(f"{out}: opened again; ids are equal, and logits within {error:.1e} (relative)")


if __name__ == "__main__":
    cli(export, Config, argv=sys.argv[1 + (sys.argv[1:2] == ["export"]) :])
