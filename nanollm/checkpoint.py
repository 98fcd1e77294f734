"""Model folders: any Llama, Mistral, Qwen2, Qwen3 or SmolLM2 is read, and ours are written alike.

A folder holds config.json, model.safetensors (or shards and their index), tokenizer.json,
tokenizer_config.json and generation_config.json, and transformers' from_pretrained opens it.
What config.json says is computed with, or refused.
hub.py opens adapters and vision-language models, too.
"""

import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path

import torch

from nanollm import safetensors
from nanollm.config import UserError, atomic_write, read_json, say
from nanollm.formats import need
from nanollm.gpt import GPT, MLP, GPTConfig, ScalarGPT, rope_frequencies
from nanollm.tokenizer import Tokenizer

OWN_NAMES = {"rope_scaling", "qk_norm"}  # the other fields of GPTConfig are named as in config.json
SAME_NAME = [f.name for f in dataclasses.fields(GPTConfig) if f.name not in OWN_NAMES]
# model_type -> what it is saved as: a Mistral whose window never ends is a Llama
KINDS = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Llama"}
# What changes the logits of these: the value with which GPT computes them. All may be missing.
COMPUTED = {
    "mlp_bias": False,
    "use_sliding_window": False,
    "layer_types": "full_attention",
    "partial_rotary_factor": 1,
    "quantization_config": None,
}
ROPE_TYPES = ("default", "llama3")
CONTEXT = "original_max_position_embeddings"  # that of pretraining
ADAPTER_CONFIG = "adapter_config.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def read_config(folder, causal=True):
    """config.json -> GPTConfig; shapes that GPT doesn't have raise UserError."""
    path = Path(folder) / "config.json"
    return config_of(read_json(path), path, causal)


def config_of(values, path, causal=True):
    """The GPTConfig that these values of a config.json mean; `path` is where they stand. UserError
    for a model that fills in blanks where one that writes on is wanted, or the other way round.
    """
    kind = values.get("model_type")
    need(kind in KINDS, path, f"model_type must be one of {', '.join(KINDS)}, not {kind!r}")
    act = values.get("hidden_act") or "silu"
    need(act == MLP.hidden_act, path, f"hidden_act must be {MLP.hidden_act!r}, not {act!r}")
    check_computed(values, path)
    known = {name: values[name] for name in SAME_NAME if values.get(name) is not None}
    try:
        known.setdefault("num_key_value_heads", known["num_attention_heads"])
        known.setdefault("head_dim", known["hidden_size"] // known["num_attention_heads"])
        known.setdefault("tie_word_embeddings", False)
        known["rope_theta"], scaling = rope_of(values, path)
        known["attention_bias"] = kind == "qwen2" or bool(values.get("attention_bias"))
        cfg = GPTConfig(**known, qk_norm=kind == "qwen3", rope_scaling=scaling)
        rope_frequencies(cfg)  # raises where the scaling lacks a number
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"{path}: incomplete or inconsistent, {e!r}") from None
    wanted = "predicts the next token (causal)" if causal else "fills in blanks (mlm)"
    why = f"is_causal is {cfg.is_causal}, but a model that {wanted} is wanted"
    need(cfg.is_causal == causal, path, why)
    # Qwen's has a switch, in COMPUTED; where a Mistral is silent, transformers takes 4096
    window = values.get("sliding_window", 4096 if kind == "mistral" else None)
    if window and window < cfg.max_position_embeddings and not kind.startswith("qwen"):
        longer = f"sliding_window {window} is shorter than the context, and not implemented"
        raise UserError(f"{path}: {longer}; set max_position_embeddings to {window}")
    return cfg


def check_computed(values, path):
    """Raise UserError where a config.json, or its RoPE, asks for what GPT doesn't compute."""
    for name, computed in COMPUTED.items():
        asked = values.get(name)
        for one in asked if isinstance(asked, list) else [asked]:
            need(one is None or one == computed, path, f"{name} {one!r:.80} is not implemented")


def rope_of(values, path):
    """(rope_theta, rope_scaling) by the convention of transformers 4, which names them so, or 5,
    where rope_parameters holds both. What is said twice must be said alike.
    """
    new, old = values.get("rope_parameters"), values.get("rope_scaling")
    why = "it has rope_parameters and rope_scaling; move all into rope_parameters"
    need(not (new and old), path, why)
    rope = {name: value for name, value in (new or old or {}).items() if value is not None}
    for name in ("rope_theta", CONTEXT):
        if (outside := values.get(name)) is not None:
            inside = rope.setdefault(name, outside)
            need(inside == outside, path, f"{name} is said twice, {outside!r} and {inside!r}")
    kind = rope.setdefault("rope_type", rope.get("type", "default"))
    need(kind in ROPE_TYPES, path, f"RoPE of type {kind!r} is not implemented")
    check_computed(rope, path)
    rope.pop("type", None)
    return float(rope.pop("rope_theta", 10_000.0)), None if kind == "default" else rope


def config_json(cfg, tokenizer, dtype):
    """The config.json of a model of ours, which is a Qwen3 with QK-norm, a Llama without (or a
    Qwen2, if it came as one).
    """
    kind = "qwen3" if cfg.qk_norm else "qwen2" if cfg.attention_bias else "llama"
    values = {"architectures": [f"{KINDS[kind]}ForCausalLM"], "model_type": kind}
    values |= {"hidden_act": MLP.hidden_act} | {name: getattr(cfg, name) for name in SAME_NAME}
    if cfg.rope_scaling:
        values["rope_scaling"] = cfg.rope_scaling
    values |= {"bos_token_id": None, "eos_token_id": sorted(tokenizer.stop_ids)}
    return values | {"pad_token_id": tokenizer.pad_id, "torch_dtype": str(dtype)[6:]}


# --- writing and reading ------------------------------------------------------------------------


def save_gpt(model, tokenizer, folder):
    """Write a GPT or ScalarGPT and its tokenizer as a model folder: file by file, weights last."""
    folder = Path(folder)
    weights = {name: p.detach().cpu() for name, p in model.state_dict().items()}
    config = config_json(model.cfg, tokenizer, model.model.norm.weight.dtype)
    if isinstance(model, ScalarGPT):
        kind = config["architectures"][0].replace("CausalLM", "SequenceClassification")
        one_label = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        config |= {"architectures": [kind], **one_label, "reward_shift": model.shift}
    tokenizer.save(folder)
    write_configs(config, tokenizer, folder)
    safetensors.save_file(weights, folder / "model.safetensors")


def write_configs(config, tokenizer, folder):
    """Write config.json, and generation_config.json with what ends a completion; what its makers
    said of sampling stays.
    """
    generation = {"do_sample": False} | tokenizer.generation
    generation |= {"eos_token_id": sorted(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id}
    atomic_write(folder / "config.json", json.dumps(config, indent=2) + "\n")
    atomic_write(folder / "generation_config.json", json.dumps(generation, indent=2) + "\n")


def load_gpt(folder, causal=True):
    """(GPT in fp32 on the CPU, Tokenizer) from the folder of a whole language model; adapters and
    vision-language models are opened by hub.load_model.

    Where the tokenizer had no chat markers and got them, the embedding grows by rows equal to the
    mean of the others.
    """
    folder = existing_folder(folder)
    model, tokenizer = GPT(read_config(folder, causal)), Tokenizer.load(folder)
    if tokenizer.generation.get("repetition_penalty", 1) != 1:
        say(f"note: {folder} asks for a repetition_penalty; completions here are without it")
    load_weights(model, safetensors.load_folder(folder), folder)
    known, rows = max(tokenizer.ranks.values(), default=0), model.cfg.vocab_size
    why = f"its tokenizer has ids up to {known}, but the embedding has {rows} rows"
    need(known < rows, folder, why)
    if tokenizer.vocab_size > model.cfg.vocab_size:
        model = grow_vocabulary(model, tokenizer.vocab_size)
    return model, tokenizer


def load_weights(model, tensors, where):
    """Copy tensors into the model by name; other names, shapes or dtypes than its own raise
    UserError.
    """
    # old exports hold the angles of RoPE
    tensors = {k: x for k, x in tensors.items() if not k.endswith("rotary_emb.inv_freq")}
    if {EMBEDDING, HEAD} <= tensors.keys() and HEAD not in model.state_dict():
        if torch.equal(tensors[EMBEDDING], tensors[HEAD]):  # a tied head may be stored, too
            del tensors[HEAD]
    for name, tensor in tensors.items():
        whole = tensor.is_floating_point() and tensor.element_size() > 1
        need(whole, where, f"{name} is {tensor.dtype}; quantised weights are not implemented")
    try:
        model.load_state_dict(tensors)
    except RuntimeError as e:  # which names what is missing, unexpected or of another shape
        why = " ".join(str(e).split())
        raise UserError(f"{where}: the weights aren't those of config.json: {why:.300}") from None


def grow_vocabulary(model, vocab_size):
    """The same model with more rows in embedding and head: new rows are the mean of the others."""
    grown, tensors = GPT(dataclasses.replace(model.cfg, vocab_size=vocab_size)), model.state_dict()
    for name in {EMBEDDING, HEAD} & tensors.keys():
        new = tensors[name].mean(0, keepdim=True).expand(vocab_size - len(tensors[name]), -1)
        tensors[name] = torch.cat([tensors[name], new])
    grown.load_state_dict(tensors)
    return grown


# --- what lies in a folder -----------------------------------------------------------------------


def existing_folder(folder, flag=""):
    """The folder as a Path, that of a model of the Hub for owner/name; where there is none the
    message names the flag that asked for it.
    """
    if is_hub_name(folder):
        from nanollm.download import hub_folder

        return hub_folder(folder)
    if not Path(folder).is_dir():
        wanted = "is not a folder; run the stage that makes it, or name another"
        raise UserError(f"{flag} {folder} {wanted}".strip())
    return Path(folder)


def is_hub_name(name):
    """Can this be a model of the Hub: owner/name, and nothing here? runs/ is always ours."""
    owner, _, model = str(name).replace(os.sep, "/").partition("/")  # ./a/b is a folder
    word = r"[A-Za-z0-9][\w.-]*"
    looks = owner != "runs" and re.fullmatch(word, owner) and re.fullmatch(word, model)
    return bool(looks) and not Path(owner).exists()


def is_adapter(folder):
    return (Path(folder) / ADAPTER_CONFIG).exists()


def bases_of(folder):
    """The folder that an adapter in this one was trained on, then that one's base, and so on; none
    for a whole model. Raises UserError where one is missing.
    """
    bases, folder = [], Path(folder)
    while is_adapter(folder):
        named = str(read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path"))
        # beside the adapter's own files; as written, from here or any folder above it; or, after a
        # move, by its name
        above = [folder.resolve(), *folder.resolve().parents]
        places = [folder / Path(named).name, Path(named), *(place / named for place in above)]
        places += [place / Path(named).name for place in above]
        base = next((place for place in places if place.is_dir()), None)
        if base is None and is_hub_name(named):
            base = existing_folder(named)
        if base is None or base.resolve() in [b.resolve() for b in (folder, *bases)]:
            raise UserError(
                f"{folder} is an adapter of {named}, which is not a folder; name its base in "
                f"{folder / ADAPTER_CONFIG}, under base_model_name_or_path"
            )
        bases.append(base)
        folder = base
    return bases


def weights_hash(folder):
    """Tells a model's weights, an adapter's bases included, from others: SHA-256 of 64 bytes in the
    middle of every tensor. Training changes nearly all weights, and to read them all takes long.
    """
    digest = hashlib.sha256()
    folder = existing_folder(folder)
    for place in (folder, *bases_of(folder)):
        name = "adapter_model.safetensors" if is_adapter(place) else "model*.safetensors"
        for path in sorted(place.glob(name)):
            with open(path, "rb") as file:
                for tensor, entry in sorted(safetensors.read_header(path)[0].items()):
                    size = entry.end - entry.begin
                    file.seek(entry.begin + max(0, size // 2 - 32))
                    digest.update(tensor.encode() + file.read(min(size, 64)))
    return digest.hexdigest()


def is_scalar(folder):
    """Does the folder hold a reward model (one score per text) rather than a language model?"""
    if is_adapter(folder):
        return read_json(Path(folder) / ADAPTER_CONFIG).get("task_type") == "SEQ_CLS"
    kinds = read_json(Path(folder) / "config.json").get("architectures") or [""]
    return str(kinds[0]).endswith("SequenceClassification")
