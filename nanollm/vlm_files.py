"""Folders of vision-language models (vlm.py): join one from its parts, write it, and open it.

    build_vlm     a text model's folder and a vision tower's -> a VLM with a new projector
    save_vlm      config.json, model.safetensors, tokenizer, preprocessing
    load_vlm      the same back, or a folder that transformers has written

They are those of transformers' LlavaForConditionalGeneration. With a projector that it doesn't have
(pixel_shuffle) model_type is another, so that transformers refuses to open them.
"""

import dataclasses
import json
from pathlib import Path

import torch

from nanollm import safetensors
from nanollm.config import UserError, atomic_write
from nanollm.hub import config_json, config_of, load_model, load_weights, read_json, write_configs
from nanollm.tokenizer import Tokenizer
from nanollm.vision import (
    CLIP_KIND,
    ViT,
    load_preprocessing,
    load_vision,
    vision_config_of,
    without_ids,
)
from nanollm.vlm import IMAGE, VLM, image_id_of

# our names -> those in a file
PREFIXES = {
    "model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "vision.": "vision_tower.",
    "projector.": "multi_modal_projector.",
}
ACTIVATIONS = {"mlp": "gelu", "linear": "linear", "pixel_shuffle": "gelu"}
LLAVA, OURS = "llava", "nanollm_vlm"  # model_type; the second is for what transformers has not


def build_vlm(language_folder, vision_folder, projector="mlp", feature_layer=-2, class_token=False):
    """(VLM, Tokenizer) of a text model and a vision tower, each with its weights, and a new
    projector between them; vlm.preprocessing is the tower's.

    Raises UserError where the tokenizer has no <image>, or the projector doesn't fit the patches.
    """
    language, tokenizer = load_language(language_folder)
    vision, preprocessing = load_vision(vision_folder)
    vlm = VLM(language.cfg, vision, projector, image_id_of(tokenizer), feature_layer, class_token)
    vlm.load_state_dict(language.state_dict(), strict=False)
    vlm.preprocessing = preprocessing
    return vlm, tokenizer


def load_language(folder):
    """(GPT, Tokenizer) of a text model that can be given eyes; else UserError."""
    language, tokenizer = load_model(folder)
    if isinstance(language, VLM):
        raise UserError(f"{folder} holds a vision-language model already; name a text one")
    if getattr(language, "adapter", None):
        raise UserError(f"{folder} holds an adapter that can't be merged; name its base")
    image_id_of(tokenizer)
    return language, tokenizer


def save_vlm(vlm, tokenizer, preprocessing, folder):
    """Write a model folder; transformers' LlavaForConditionalGeneration and AutoProcessor open it,
    save with pixel_shuffle. Each file is replaced atomically, the weights last.

    A linear projector is LLaVA's without activation, and with the identity as second layer.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    preprocessing.save(folder)
    write_configs(vlm_config(vlm, tokenizer), tokenizer, folder)
    cfg, clip = vlm.vision.cfg, vlm.vision.cfg.model_type == CLIP_KIND
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE,
        "patch_size": cfg.patch_size,
        "vision_feature_select_strategy": strategy(vlm),
        "num_additional_image_tokens": int(clip),
    }
    if vlm.projector.r == 1:
        atomic_write(folder / "processor_config.json", json.dumps(processor, indent=2) + "\n")
    tensors = {name: p.detach().cpu() for name, p in vlm.state_dict().items()}
    if vlm.projector.kind == "linear":
        bias = torch.zeros_like(tensors["projector.linear_1.bias"])
        tensors["projector.linear_2.weight"] = torch.eye(len(bias), dtype=bias.dtype)
        tensors["projector.linear_2.bias"] = bias
    tensors = {renamed(name, PREFIXES): tensor for name, tensor in tensors.items()}
    safetensors.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def vlm_config(vlm, tokenizer):
    """What config.json holds."""
    text = config_json(vlm.cfg, tokenizer, vlm.model.norm.weight.dtype)
    known = vlm.projector.r == 1
    vision, kind = dataclasses.asdict(vlm.vision.cfg), vlm.projector.kind
    return {
        "architectures": ["LlavaForConditionalGeneration" if known else "VLM"],
        "model_type": LLAVA if known else OURS,
        "projector": kind,
        "projector_hidden_act": ACTIVATIONS[kind],
        "multimodal_projector_bias": True,
        "image_token_index": vlm.image_id,
        "image_seq_length": vlm.tokens_per_picture,
        "vision_feature_layer": vlm.feature_layer,
        "vision_feature_select_strategy": strategy(vlm),
        "tie_word_embeddings": vlm.cfg.tie_word_embeddings,
        **{name: text[name] for name in ("eos_token_id", "pad_token_id", "torch_dtype")},
        "text_config": text,
        "vision_config": vision,
    }


def strategy(vlm):
    """LLaVA's word for which tokens are features: "default" leaves the class token out."""
    clip = vlm.vision.cfg.model_type == CLIP_KIND
    return "default" if clip and not vlm.class_token else "full"


def chosen_features(values, path):
    """Does config.json want all tokens of the tower?"""
    chosen = values.get("vision_feature_select_strategy", "default")
    if chosen not in ("default", "full"):
        raise UserError(f"{path}: vision_feature_select_strategy {chosen!r} is unknown")
    return chosen == "full"


def renamed(name, prefixes):
    """The name with the first of the prefixes that it has replaced."""
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def load_vlm(folder):
    """(VLM in fp32 on the CPU, Tokenizer, Preprocessing) from a folder that save_vlm or a
    LlavaForConditionalGeneration has written. Raises UserError for what isn't implemented.
    """
    path = Path(folder) / "config.json"
    values = read_json(path)
    kind = projector_of(values, path)
    vision_cfg = vision_config_of(values["vision_config"], path)
    full, clip = chosen_features(values, path), vision_cfg.model_type == CLIP_KIND
    if not full and not clip:
        raise UserError(f"{path}: a tower without class token has no features without it")
    tokenizer = Tokenizer.load(folder)
    image_id = values.get("image_token_index", values.get("image_token_id"))
    if image_id != image_id_of(tokenizer):
        raise UserError(f"{path}: image_token_index {image_id} is not the tokenizer's {IMAGE}")
    vlm = VLM(
        config_of(values["text_config"], path),
        ViT(vision_cfg),
        kind,
        image_id,
        values.get("vision_feature_layer", -2),
        class_token=full and clip,
    )
    back = {"vision_tower.vision_model.": "vision."} | {new: old for old, new in PREFIXES.items()}
    tensors = {renamed(name, back): x for name, x in safetensors.load_folder(folder).items()}
    if kind == "linear":
        tensors = {name: x for name, x in tensors.items() if ".linear_2." not in name}
    load_weights(vlm, without_ids(tensors), folder)
    vlm.preprocessing = load_preprocessing(folder, vision_cfg)
    return vlm, tokenizer, vlm.preprocessing


def projector_of(values, path):
    """The kind of projector that a config.json asks for."""
    if values.get("model_type") not in (LLAVA, OURS):
        raise UserError(f"{path}: model_type {values.get('model_type')!r} is not {LLAVA}, a VLM's")
    for part in ("text_config", "vision_config"):
        if not isinstance(values.get(part), dict):
            raise UserError(f"{path} has no {part}")
    kind = values.get("projector", "mlp")
    if ACTIVATIONS.get(kind) != values.get("projector_hidden_act", "gelu"):
        raise UserError(f"{path}: projector {kind!r} with this projector_hidden_act is unknown")
    if not values.get("multimodal_projector_bias", True):
        raise UserError(f"{path}: a projector without biases is not implemented")
    return kind
