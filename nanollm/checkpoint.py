"""Files of weights and their config.json: any Llama-, Qwen2-, Qwen3- or SmolLM2-shaped model folder
is read, and ours are written the same way.

A folder holds config.json, model.safetensors (or shards and their index), tokenizer.json,
tokenizer_config.json and generation_config.json;
`transformers.AutoModelForCausalLM.from_pretrained` opens it. hub.py opens adapters and
vision-language models, too.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import torch

from nanollm import safetensors
from nanollm.config import UserError, atomic_write
from nanollm.gpt import GPT, MLP, GPTConfig, ScalarGPT, rope_frequencies
from nanollm.tokenizer import Tokenizer

SAME_NAME = [
    f.name for f in dataclasses.fields(GPTConfig) if f.name not in ("rope_scaling", "qk_norm")
]
ADAPTER_CONFIG = "adapter_config.json"
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}


def read_json(path, kind=dict):
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
    kind = values.get("model_type")
    if kind not in ARCHITECTURES:
        raise UserError(f"{path}: model_type {kind!r} is not one of {', '.join(ARCHITECTURES)}")
    if values.get("hidden_act", "silu") != MLP.hidden_act or values.get("mlp_bias"):
        raise UserError(f"{path}: only an MLP of {MLP.hidden_act} without biases is implemented")
    if values.get("use_sliding_window"):
        raise UserError(f"{path}: sliding-window attention is not implemented")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: the RoPE settings must be a JSON object, not {rope!r}")
    kind_of_rope = rope.get("rope_type", rope.get("type", "default"))
    if kind_of_rope not in ("default", "llama3"):
        raise UserError(f"{path}: RoPE of type {kind_of_rope!r} is not implemented")
    known = {name: values[name] for name in SAME_NAME if values.get(name) is not None}
    for name, value in known.items():
        whole = type(getattr(GPTConfig, name)) is int
        if not isinstance(value, int if whole else (int, float)) or (whole and value < 1):
            raise UserError(f"{path} is incomplete or inconsistent: {name} is {value!r}")
    try:
        known.setdefault("num_key_value_heads", known["num_attention_heads"])
        known.setdefault("head_dim", known["hidden_size"] // known["num_attention_heads"])
        known.setdefault("tie_word_embeddings", False)
        known["rope_theta"] = float(values.get("rope_theta") or rope.get("rope_theta") or 10_000.0)
        known["attention_bias"] = kind == "qwen2" or bool(values.get("attention_bias"))
        cfg = GPTConfig(
            **known,
            qk_norm=kind == "qwen3",
            rope_scaling=rope if kind_of_rope == "llama3" else None,
        )
        rope_frequencies(cfg)  # a llama3 scaling may lack a number
        return cfg
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as e:
        raise UserError(f"{path} is incomplete or inconsistent: {e!r}") from None


def config_json(cfg, tokenizer, dtype):
    """The config.json of a model of ours: a llama, or with QK-norm a qwen3 (or qwen2, if it came as
    one).
    """
    kind = "qwen3" if cfg.qk_norm else "qwen2" if cfg.attention_bias else "llama"
    values = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_act": MLP.hidden_act,
    }
    values |= {name: getattr(cfg, name) for name in SAME_NAME}
    if cfg.rope_scaling:
        values["rope_scaling"] = {k: v for k, v in cfg.rope_scaling.items() if k != "rope_theta"}
    values |= {
        "bos_token_id": None,
        "eos_token_id": sorted(tokenizer.stop_ids),
        "pad_token_id": tokenizer.pad_id,
    }
    values["torch_dtype"] = str(dtype).removeprefix("torch.")
    return values


# --- writing and reading ------------------------------------------------------------------------


def save_gpt(model, tokenizer, folder):
    """Write a GPT or ScalarGPT and its tokenizer as a model folder; each file is replaced
    atomically, the weights last.
    """
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
    """Write config.json, and generation_config.json with what ends an answer."""
    generation = {
        "eos_token_id": sorted(tokenizer.stop_ids),
        "pad_token_id": tokenizer.pad_id,
        "do_sample": False,
    }
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
    own = dict(model.state_dict())
    if "lm_head.weight" not in own:
        tensors = {
            k: v for k, v in tensors.items() if k != "lm_head.weight"
        }  # tied: it repeats the embedding
    tensors = {
        k: v for k, v in tensors.items() if not k.endswith("rotary_emb.inv_freq")
    }  # old exports
    if missing := sorted(own.keys() - tensors.keys()):
        raise UserError(f"{where} lacks {len(missing)} tensors, such as {missing[0]}")
    if extra := sorted(tensors.keys() - own.keys()):
        raise UserError(
            f"{where} has {len(extra)} tensors that the model in config.json has not, such as "
            f"{extra[0]}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            shapes = f"{list(tensor.shape)}, but config.json says {list(own[name].shape)}"
            raise UserError(f"{where}: {name} has shape {shapes}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def grow_vocabulary(model, vocab_size):
    """The same model with more rows in embedding and head; the new rows are the mean of the old
    ones.
    """
    grown = GPT(dataclasses.replace(model.cfg, vocab_size=vocab_size))
    tensors = dict(model.state_dict())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            old = tensors[name]
            tensors[name] = torch.cat(
                [old, old.mean(0, keepdim=True).expand(vocab_size - len(old), -1)]
            )
    load_weights(grown, tensors, "the grown model")
    return grown


# --- what lies in a folder -----------------------------------------------------------------------


def existing_folder(folder, flag=""):
    """The folder as a Path; where there is none the message names the flag that asked for it."""
    if not Path(folder).is_dir():
        named = f"{flag} {folder}".strip()
        raise UserError(f"{named} is no folder; run the stage that makes it, or name another")
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
        if base is None or base.resolve() in [b.resolve() for b in (folder, *bases)]:
            raise UserError(
                f"{folder} is an adapter of {named}, which is no folder; name its base in "
                f"{folder / ADAPTER_CONFIG}, under base_model_name_or_path"
            )
        bases.append(base)
        folder = base
    return bases


def weights_hash(folder):
    """SHA-256 of a model's weights; those of an adapter's bases are part of it."""
    digest = hashlib.sha256()
    for place in (Path(folder), *bases_of(folder)):
        names = ("adapter_model.safetensors",) if is_adapter(place) else ("model*.safetensors",)
        for path in sorted(path for name in names for path in place.glob(name)):
            with open(path, "rb") as file:
                while part := file.read(2**20):
                    digest.update(part)
    return digest.hexdigest()


def is_scalar(folder):
    """Does the folder hold a reward model (one score per text) rather than a language model?"""
    if is_adapter(folder):
        return read_json(Path(folder) / ADAPTER_CONFIG).get("task_type") == "SEQ_CLS"
    kinds = read_json(Path(folder) / "config.json").get("architectures") or [""]
    return str(kinds[0]).endswith("SequenceClassification")
