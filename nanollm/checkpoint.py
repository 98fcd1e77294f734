"""Model folders: any Llama, Mistral, Qwen2, Qwen3 or SmolLM2 is read, and ours are written alike.

A folder holds config.json, model.safetensors (or shards and their index), tokenizer.json,
tokenizer_config.json and generation_config.json, and transformers' from_pretrained opens it.
What config.json says is computed with, or refused; keys that nothing reads are named once.
hub.py opens adapters and vision-language models, too.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
from pathlib import Path

import torch

from nanollm import safetensors
from nanollm.config import UserError, atomic_write, read_json, say
from nanollm.formats import need
from nanollm.gpt import GPT, MLP, GPTConfig, ScalarGPT, rope_frequencies, yarn_scale
from nanollm.tokenizer import Tokenizer

OWN_NAMES = {"rope_scaling", "qk_norm"}  # the other fields of GPTConfig are named as in config.json
SAME_NAME = [f.name for f in dataclasses.fields(GPTConfig) if f.name not in OWN_NAMES]
# model_type -> what it is saved as: a Mistral whose window never ends is a Llama
KINDS = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Llama"}
# What changes the logits: the value with which GPT computes them. All may be missing, or null.
COMPUTED = {
    "mlp_bias": False, "use_sliding_window": False,
    "layer_types": "full_attention", "attention_chunk_size": None, "per_layer_config": None,
    "no_rope_layers": 1, "partial_rotary_factor": 1, "rope_interleaved": False,
    "quantization_config": None, "compression_config": None,
}  # fmt: skip
ROPE = {  # rope_type -> its numbers
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
}
CONTEXT = "original_max_position_embeddings"  # that of pretraining
ROPE_KEYS = {"rope_type", "type", "rope_theta", "truncate", CONTEXT}
IRRELEVANT = """architectures model_type dtype torch_dtype transformers_version rope_parameters
rope_scaling original_max_position_embeddings sliding_window max_window_layers pretraining_tp
use_cache initializer_range bos_token_id eos_token_id pad_token_id id2label label2id problem_type
_name_or_path _attn_implementation is_llama_config transformers.js_config reward_shift""".split()
# of generation_config.json: what changes even greedy completions in transformers, but none here
PENALTIES = """repetition_penalty no_repeat_ngram_size suppress_tokens begin_suppress_tokens
bad_words_ids sequence_bias min_length min_new_tokens forced_bos_token_id forced_eos_token_id
stop_strings""".split()
ADAPTER_CONFIG, EMBEDDING = "adapter_config.json", "model.embed_tokens.weight"


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
    check_computed(values, path, {"hidden_act", *SAME_NAME, *IRRELEVANT})
    known = {name: values[name] for name in SAME_NAME if values.get(name) is not None}
    try:
        known.setdefault("num_key_value_heads", known["num_attention_heads"])
        known.setdefault("head_dim", known["hidden_size"] // known["num_attention_heads"])
        known.setdefault("tie_word_embeddings", False)
        known["rope_theta"], scaling = rope_of(values, path)
        known["attention_bias"] = kind == "qwen2" or bool(values.get("attention_bias"))
        cfg = GPTConfig(**known, qk_norm=kind == "qwen3", rope_scaling=scaling)
        wanted = "predicts the next token (causal)" if causal else "fills in blanks (mlm)"
        why = f"is_causal is {cfg.is_causal}, but a model that {wanted} is wanted"
        need(cfg.is_causal == causal, path, why)
        context = cfg.max_position_embeddings
        if scaling and scaling["rope_type"] != "linear":
            scaling.setdefault(CONTEXT, context)
        angles = rope_frequencies(cfg) * yarn_scale(scaling)  # a scaling may lack a number
        need(bool(angles.isfinite().all()), path, f"RoPE can't be computed from {scaling}")
        # Qwen's has a switch, in COMPUTED; where a Mistral is silent, transformers takes 4096
        window = values.get("sliding_window", 4096 if kind == "mistral" else None)
        if window and window < context and not kind.startswith("qwen"):
            longer = f"sliding_window {window} is shorter than the context, and not implemented"
            raise UserError(f"{path}: {longer}; set max_position_embeddings to {window}")
        return cfg
    except (KeyError, TypeError, ValueError, ArithmeticError) as e:
        raise UserError(f"{path}: incomplete or inconsistent, {e!r}") from None


def check_computed(values, path, read=()):
    """Raise UserError where a config.json, or its part on RoPE, asks for what GPT doesn't compute;
    tell once of keys that nobody reads.
    """
    for name, value in COMPUTED.items():
        asked = values.get(name)
        each = asked if isinstance(asked, list) and asked else [asked]
        fine = all(one is None or one == value for one in each)
        only = "" if value is None else f"; only {value!r} is"
        need(fine, path, f"{name} {asked!r:.80} is not implemented{only}")
    unread = values.keys() - COMPUTED.keys() - set(read)
    if unread := sorted(key for key in unread if values[key] not in (None, False, 0, [], {})):
        tell(f"note: {path} sets {', '.join(unread)}, which nothing here reads")


tell = functools.cache(say)  # a run opens a folder several times


def rope_of(values, path):
    """(rope_theta, rope_scaling) by the convention of transformers 4, which names them so, or 5,
    where rope_parameters holds both. What is said twice must be said alike.
    """
    new, old = (values.get(name) or {} for name in ("rope_parameters", "rope_scaling"))
    why = "rope_parameters and rope_scaling differ; move all into rope_parameters"
    need(not (new and old) or new == old, path, why)
    rope = {name: value for name, value in dict(new or old).items() if value is not None}
    kind = rope.setdefault("rope_type", rope.get("type", "default"))
    outside = {"type": kind, "rope_theta": values.get("rope_theta"), CONTEXT: values.get(CONTEXT)}
    for name, value in outside.items():
        same = value is None or rope.setdefault(name, value) == value
        need(same, path, f"{name} is said twice, {value!r} and {rope.get(name)!r}; drop one")
    odd = [name for name, value in rope.items() if isinstance(value, (dict, list))]
    what = ", ".join(odd) if kind in ROPE else f"type {kind!r}"
    why = f"RoPE of {what} is not implemented"
    need(kind in ROPE and not odd, path, why)
    check_computed(rope, path, {*ROPE_KEYS, *ROPE[kind]})
    del rope["type"]
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
    odd = [k for k in PENALTIES if tokenizer.generation.get(k) not in (None, 0, 1, [], {})]
    if odd:
        what = f"generation_config.json sets {', '.join(odd)}"
        tell(f"note: {folder}/{what}: kept there; completions here are the model's own, without it")
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
    """Copy tensors into the model by name; wrong names, shapes or dtypes raise UserError naming the
    first of each kind.
    """
    own = model.state_dict()
    # old exports hold the angles of RoPE
    tensors = {k: x for k, x in tensors.items() if not k.endswith("rotary_emb.inv_freq")}
    if "lm_head.weight" in tensors.keys() - own.keys():  # a tied head repeats the embedding
        same = torch.equal(tensors.pop("lm_head.weight"), tensors.get(EMBEDDING, torch.empty(0)))
        two = f"lm_head.weight differs from {EMBEDDING}, to which config.json ties it; "
        need(same, where, two + "say tie_word_embeddings false there")
    if missing := sorted(own.keys() - tensors.keys()):
        raise UserError(f"{where} lacks {len(missing)} tensors, such as {missing[0]}")
    if unknown := sorted(tensors.keys() - own.keys()):
        many = f"{len(unknown)} tensors that the model in config.json has not"
        raise UserError(f"{where} has {many}, such as {unknown[0]}")
    for name, tensor in tensors.items():
        shapes = f"{list(tensor.shape)}, but config.json says {list(own[name].shape)}"
        need(tensor.shape == own[name].shape, where, f"{name} has shape {shapes}")
        whole = tensor.is_floating_point() and tensor.element_size() > 1
        need(whole, where, f"{name} is {tensor.dtype}; quantised weights are not implemented")
    model.load_state_dict(tensors)


def grow_vocabulary(model, vocab_size):
    """The same model with more rows in embedding and head: new rows are the mean of the others."""
    grown, tensors = GPT(dataclasses.replace(model.cfg, vocab_size=vocab_size)), model.state_dict()
    for name in {EMBEDDING, "lm_head.weight"} & tensors.keys():
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
        # within the adapter; as written, here or from any folder above it; or, after a move, by its
        # name
        above = [folder.resolve(), *folder.resolve().parents]
        ends = (named, Path(named).name)
        places = [folder / Path(named).name, Path(named)]
        places += [place / end for end in ends for place in above]
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
