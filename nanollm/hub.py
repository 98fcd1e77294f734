"""The one place that opens whatever lies in a folder, and writes it back: a language model, a
reward model, an adapter on either, or a vision-language model. What isn't there isn't imported.
"""

from pathlib import Path

from nanollm import safetensors
from nanollm.checkpoint import (
    bases_of,
    existing_folder,
    is_adapter,
    is_scalar,
    load_gpt,
    load_weights,
    read_config,
    read_json,
    save_gpt,
)
from nanollm.config import UserError
from nanollm.gpt import ScalarGPT
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
    shape; from an adapter's folder its base with the adapter. `adapter` names one more to put on.
    A folder of LLaVA's shape gives a VLM.
    """
    folder = existing_folder(folder)
    if is_scalar(folder):
        raise UserError(f"{folder} holds a reward model, which scores text and writes none")
    if adapter:
        own = existing_folder(adapter, "--adapter").resolve()
        if own in [place.resolve() for place in (folder, *bases_of(folder))]:
            raise UserError(f"{folder} holds the adapter in {adapter} already")
        from nanollm.peft.adapters import put_adapter

        model, tokenizer = load_model(folder)
        put_adapter(model, adapter, folder)
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
        from nanollm.peft.adapters import put_adapter

        base = bases_of(folder)[0]
        model, tokenizer = load_scalar(base)
        put_adapter(model, folder, base)
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
