"""Model folders: those of any Llama, Qwen2, Qwen3 or SmolLM2 are read, and ours are written alike.

A folder holds config.json, model.safetensors (or shards and their index), tokenizer.json,
tokenizer_config.json and generation_config.json, and transformers' from_pretrained opens it.
hub.py opens adapters and vision-language models, too.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import torch

from nanollm import safetensors
from nanollm.config import UserError, atomic_write
from nanollm.download import hub_folder, is_hub_name
from nanollm.formats import need
from nanollm.gpt import GPT, MLP, GPTConfig, ScalarGPT, rope_frequencies
from nanollm.tokenizer import Tokenizer

OWN_NAMES = {"rope_scaling", "qk_norm"}  # the other fields of GPTConfig are named as in config.json
SAME_NAME = [f.name for f in dataclasses.fields(GPTConfig) if f.name not in OWN_NAMES]
ARCHITECTURES = {kind.lower(): f"{kind}ForCausalLM" for kind in ("Llama", "Qwen3", "Qwen2")}
ADAPTER_CONFIG = "adapter_config.json"


def read_json(path, kind=dict):
    """The JSON object, or array, in a file; raises UserError."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is not valid JSON ({e})") from None
    if not isinstance(value, kind):
        raise UserError(f"{path} must hold a JSON {'object' if kind is dict else 'array'}")
    return value


def read_config(folder):
    """config.json -> GPTConfig; shapes that GPT doesn't have raise UserError."""
    path = Path(folder) / "config.json"
    return config_of(read_json(path), path)


def config_of(values, path):
    """The GPTConfig that these values of a config.json mean; `path` is where they stand."""
    kind, act = values.get("model_type"), values.get("hidden_act", "silu")
    known = ", ".join(ARCHITECTURES)
    need(kind in ARCHITECTURES, path, f"model_type must be one of {known}, not {kind!r}")
    mlp = f"the MLP must have hidden_act {MLP.hidden_act!r} and no biases"
    need(act == MLP.hidden_act and not values.get("mlp_bias"), path, mlp)
    need(not values.get("use_sliding_window"), path, "sliding-window attention is not implemented")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    rope = rope if isinstance(rope, dict) else {"type": rope}
    rope_kind = rope.get("rope_type", rope.get("type", "default"))
    there = rope_kind in ("default", "llama3")
    need(there, path, f"RoPE of type {rope_kind!r} is not implemented")
    known = {name: values[name] for name in SAME_NAME if values.get(name) is not None}
    for name, value in known.items():
        whole = type(getattr(GPTConfig, name)) is int
        fine = isinstance(value, int if whole else (int, float)) and (value >= 1 or not whole)
        need(fine, path, f"incomplete or inconsistent, {name} is {value!r}")
    try:
        known.setdefault("num_key_value_heads", known["num_attention_heads"])
        known.setdefault("head_dim", known["hidden_size"] // known["num_attention_heads"])
        known.setdefault("tie_word_embeddings", False)
        known["rope_theta"] = float(values.get("rope_theta") or rope.get("rope_theta") or 10_000.0)
        known["attention_bias"] = kind == "qwen2" or bool(values.get("attention_bias"))
        scaling = rope if rope_kind == "llama3" else None
        cfg = GPTConfig(**known, qk_norm=kind == "qwen3", rope_scaling=scaling)
        rope_frequencies(cfg)  # a llama3 scaling may lack a number
        return cfg
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as e:
        raise UserError(f"{path}: incomplete or inconsistent, {e!r}") from None


def config_json(cfg, tokenizer, dtype):
    """The config.json of a model of ours, which is a Qwen3 with QK-norm, a Llama without (or a
    Qwen2, if it came as one).
    """
    kind = "qwen3" if cfg.qk_norm else "qwen2" if cfg.attention_bias else "llama"
    values = {"architectures": [ARCHITECTURES[kind]], "model_type": kind}
    values |= {"hidden_act": MLP.hidden_act} | {name: getattr(cfg, name) for name in SAME_NAME}
    if cfg.rope_scaling:
        values["rope_scaling"] = {k: v for k, v in cfg.rope_scaling.items() if k != "rope_theta"}
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
    safetensors.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_configs(config, tokenizer, folder):
    """Write config.json, and generation_config.json with what ends a completion."""
    generation = {"eos_token_id": sorted(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id}
    generation["do_sample"] = False
    atomic_write(folder / "config.json", json.dumps(config, indent=2) + "\n")
    atomic_write(folder / "generation_config.json", json.dumps(generation, indent=2) + "\n")


def load_gpt(folder):
    """(GPT in fp32 on the CPU, Tokenizer) from the folder of a whole language model; adapters and
    vision-language models are opened by hub.load_model.

    Where the tokenizer had no chat markers and got them, the embedding grows by rows equal to the
    mean of the others.
    """
    folder = existing_folder(folder)
    model, tokenizer = GPT(read_config(folder)), Tokenizer.load(folder)
    load_weights(model, safetensors.load_folder(folder), folder)
    known = max(tokenizer.ranks.values(), default=0)
    if known >= model.cfg.vocab_size:
        raise UserError(
            f"vocabulary mismatch: {folder}/tokenizer.json has ids up to {known}, but the model's "
            f"embedding has {model.cfg.vocab_size} rows; the two files don't belong together"
        )
    if tokenizer.vocab_size > model.cfg.vocab_size:
        model = grow_vocabulary(model, tokenizer.vocab_size)
    return model, tokenizer


def load_weights(model, tensors, where):
    """Copy tensors into the model by name; wrong names or shapes raise UserError naming the first
    of each kind.
    """
    own = model.state_dict()
    # a tied head that was written repeats the embedding; old exports hold the angles of RoPE
    extra = {"lm_head.weight"} - own.keys()
    extra |= {name for name in tensors if name.endswith("rotary_emb.inv_freq")}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in extra}
    if missing := sorted(own.keys() - tensors.keys()):
        raise UserError(f"{where} lacks {len(missing)} tensors, such as {missing[0]}")
    if unknown := sorted(tensors.keys() - own.keys()):
        many = f"{len(unknown)} tensors that the model in config.json has not"
        raise UserError(f"{where} has {many}, such as {unknown[0]}")
    for name, tensor in tensors.items():
        shapes = f"{list(tensor.shape)}, but config.json says {list(own[name].shape)}"
        need(tensor.shape == own[name].shape, where, f"{name} has shape {shapes}")
    model.load_state_dict(tensors)


def grow_vocabulary(model, vocab_size):
    """The same model with more rows in embedding and head: new rows are the mean of the others."""
    grown, tensors = GPT(dataclasses.replace(model.cfg, vocab_size=vocab_size)), model.state_dict()
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & tensors.keys():
        new = tensors[name].mean(0, keepdim=True).expand(vocab_size - len(tensors[name]), -1)
        tensors[name] = torch.cat([tensors[name], new])
    load_weights(grown, tensors, "the grown model")
    return grown


# --- what lies in a folder -----------------------------------------------------------------------


def existing_folder(folder, flag=""):
    """The folder as a Path, that of a model of the Hub for owner/name (download.py); where there is
    none the message names the flag that asked for it.
    """
    if is_hub_name(folder):
        return hub_folder(folder)
    if not Path(folder).is_dir():
        wanted = "is not a folder; run the stage that makes it, or name another"
        raise UserError(f"{flag} {folder} {wanted}".strip())
    return Path(folder)


def is_adapter(folder):
    return (Path(folder) / ADAPTER_CONFIG).exists()


def bases_of(folder):
    """The folder that an adapter in this one was trained on, then that one's base, and so on; none
    for a whole model. Raises UserError where one is missing.
    """
    bases, folder = [], Path(folder)
    while is_adapter(folder):
        named = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        # as written, or beside the adapter where the runs have moved
        places = [Path(named), folder.parent / Path(named).name] if isinstance(named, str) else []
        base = next((place for place in places if place.is_dir()), None)
        if base is None and isinstance(named, str) and is_hub_name(named):
            base = hub_folder(named)
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
