"""Downloaded model folders: their logits are those of transformers, or they are refused."""

import itertools
import json
import os

import pytest
import torch
from conftest import SMALL

from nanollm import safetensors
from nanollm.config import UserError
from nanollm.hub import load_model, save_model
from nanollm.peft import adapters

TOKENS = torch.randint(270, (2, 64), generator=torch.Generator().manual_seed(0))
OLD = {"original_max_position_embeddings": 16}
LLAMA3 = OLD | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "rope_theta": 500.0}
TIED = {"tie_word_embeddings": True}
SHAPES = {  # name: (model_type, settings, RoPE)
    "Llama 3": ("Llama", {}, LLAMA3),
    "SmolLM2": ("Llama", TIED, {"rope_type": "default", "rope_theta": 1e5}),
    "TinyLlama": ("Llama", {"num_key_value_heads": 4}, {"rope_type": "default"}),
    "a head size of its own": (
        "Llama",
        {"num_key_value_heads": 1, "head_dim": 16, "rms_norm_eps": 1e-5},
        {"rope_type": "default"},
    ),
    "Qwen2.5": ("Qwen2", TIED, {"rope_type": "default", "rope_theta": 1e6}),
    "Qwen3": ("Qwen3", TIED, {"rope_type": "default", "rope_theta": 1e6}),
    "Mistral": ("Mistral", {"sliding_window": None}, {"rope_type": "default", "rope_theta": 1e6}),
    "Mistral, a window as long as the context": ("Mistral", {"sliding_window": 64}, LLAMA3),
}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def edit(folder, **changes):
    """Set keys of config.json; ... leaves one out."""
    values = {k: v for k, v in (config_of(folder) | changes).items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(values))


def as_transformers_4_wrote(folder, type_key="rope_type"):
    rope = config_of(folder)["rope_parameters"]
    theta, kind = rope.pop("rope_theta", 10_000.0), rope.pop("rope_type")
    old = {"rope_theta": theta, "rope_scaling": {type_key: kind} | rope if rope else None}
    edit(folder, rope_parameters=..., dtype=..., torch_dtype=config_of(folder)["dtype"], **old)


@pytest.fixture
def download(transformers, randomised, tokenizer, tmp_path):
    """A folder as transformers writes it, with random weights."""

    def make(name="SmolLM2", dtype=torch.float32, shard="5GB", **changes):
        kind, settings, rope = SHAPES[name]
        values = SMALL | {"bos_token_id": None, "eos_token_id": None, "rope_parameters": dict(rope)}
        if kind == "Qwen2":
            del values["head_dim"]
        config = getattr(transformers, f"{kind}Config")(**values | settings | changes)
        model = randomised(getattr(transformers, f"{kind}ForCausalLM")(config).eval()).to(dtype)
        model.save_pretrained(tmp_path / "download", max_shard_size=shard)
        tokenizer.save(tmp_path / "download")
        return tmp_path / "download"

    return make


def their_logits(transformers, folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(TOKENS).logits


def close(ours, theirs, tolerance=1e-5):
    return (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


# --- what is computed ----------------------------------------------------------------------------


CONVENTIONS = [(name, "5") for name in SHAPES]
CONVENTIONS += itertools.product(("SmolLM2", "Llama 3"), ["5, bf16, sharded", "4", "4, type"])


@pytest.mark.parametrize("name, convention", CONVENTIONS)
def test_logits_equal_transformers_there_and_back(
    name, convention, download, transformers, tmp_path
):
    dtype = torch.bfloat16 if "bf16" in convention else torch.float32
    folder = download(name, dtype, "30KB" if "sharded" in convention else "5GB")
    if convention[0] == "4":
        as_transformers_4_wrote(folder, convention[3:] or "rope_type")
    assert (folder / "model.safetensors").exists() == ("sharded" not in convention)
    wanted = their_logits(transformers, folder)
    model, tokenizer = load_model(folder)
    assert close(model(TOKENS), wanted)
    save_model(model, tokenizer, tmp_path / "saved")
    assert close(their_logits(transformers, tmp_path / "saved"), wanted)
    assert load_model(tmp_path / "saved")[0].cfg == model.cfg


def test_stretching_counts(download):
    """Else its parity would show nothing."""
    folder = download("Llama 3")
    with torch.no_grad():
        long = load_model(folder)[0](TOKENS)
        edit(folder, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
        assert (load_model(folder)[0](TOKENS) - long)[:, 16:].abs().max() > 1


# --- what is refused -----------------------------------------------------------------------------

TWICE, MISSING, MISFIT = "is said twice", "not implemented", "aren't those of config.json: .*"
HALF = {"partial_rotary_factor": 0.5}
REFUSED = {  # keys of a config.json: what is said; those in ROPES stand in rope_parameters
    "two of RoPE": ({"rope_scaling": LLAMA3}, "rope_scaling; move all into"),
    "two thetas": ({"rope_theta": 10_000.0}, f"rope_theta {TWICE}, 10000.0 and 100000.0"),
    "half of RoPE": (HALF, f"partial_rotary_factor 0.5 is {MISSING}"),
    "quantised": ({"quantization_config": {"bits": 4}}, f"quantization_config .* is {MISSING}"),
    "a window": ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    "a window in a Llama": ({"sliding_window": 32}, "sliding_window 32 is shorter than the conte"),
    "Mistral's silent window": (
        {"model_type": "mistral", "max_position_embeddings": 8192},
        "sliding_window 4096 is shorter .*; set max_position_embeddings to 4096",
    ),
    "Granite itself": ({"model_type": "granite"}, "model_type must be one of llama, .*'granite'"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act must be 'silu', not 'gelu'"),
    "biases": ({"attention_bias": True}, f"{MISFIT}Missing .*bias"),
    "other heads": ({"num_attention_heads": 8}, f"{MISFIT}size mismatch"),
    "no heads": ({"num_attention_heads": ...}, "incomplete or inconsistent"),
    "shared heads": ({"num_key_value_heads": 3}, "incomplete or inconsistent.*can't share"),
    "more layers": ({"num_hidden_layers": 3}, f"{MISFIT}Missing .*model.layers.2"),
    "fewer layers": ({"num_hidden_layers": 1}, f"{MISFIT}Unexpected .*model.layers.1"),
    "no tie": ({"tie_word_embeddings": False}, f"{MISFIT}Missing .*lm_head.weight"),
}
ROPES = {
    "two contexts": (LLAMA3, f"original_max_position_embeddings {TWICE}, 32 and 16"),
    "a theta that is text": (LLAMA3 | {"rope_theta": "big"}, "incomplete or inconsistent"),
    "no factor": (OLD | {"rope_type": "llama3"}, "incomplete or .*'low_freq_factor'"),
    "another stretching": ({"rope_type": "yarn"}, f"'yarn' is {MISSING}"),
    "half of it": (HALF, f"partial_rotary_factor 0.5 is {MISSING}"),
}
REFUSED |= {name: ({"rope_parameters": rope}, why) for name, (rope, why) in ROPES.items()}
REFUSED["two contexts"][0]["original_max_position_embeddings"] = 32


@pytest.mark.parametrize("case", REFUSED)
def test_what_contradicts_itself_or_is_not_implemented_is_refused_in_one_line(case, download):
    change, sentence = REFUSED[case]
    folder = download()
    edit(folder, **change)
    with pytest.raises(UserError, match=sentence) as error:
        load_model(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def change_weights(folder, change):
    tensors = safetensors.load_folder(folder)
    safetensors.save_file(tensors | change(tensors), folder / "model.safetensors")


QUANTISED = "model.layers.0.mlp.up_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TENSORS = {  # (what is changed in the file, what is said)
    "a head that differs from the embedding": (
        lambda t: {HEAD: t[EMBEDDING] + 1},
        f"{MISFIT}Unexpected .*{HEAD}",
    ),
    "a tensor that nobody reads": (
        lambda t: {"model.mtp.weight": torch.zeros(2)},
        f"{MISFIT}Unexpected .*model.mtp.weight",
    ),
    "eight-bit floats": (
        lambda t: {QUANTISED: t[QUANTISED].to(torch.float8_e4m3fn)},
        f"{QUANTISED} is torch.float8_e4m3fn; quantised weights are not implemented",
    ),
    "integers": (lambda t: {QUANTISED: t[QUANTISED].char()}, f"{QUANTISED} is torch.int8; quant"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_contradict_config_json_are_refused(case, download):
    change, sentence = TENSORS[case]
    folder = download()
    change_weights(folder, change)
    with pytest.raises(UserError, match=sentence):
        load_model(folder)


def test_a_head_that_differs_is_taken_where_config_json_does_not_tie_it(download, transformers):
    folder = download()
    change_weights(folder, lambda t: {HEAD: t[EMBEDDING] + 1})
    edit(folder, tie_word_embeddings=False)
    assert close(load_model(folder)[0](TOKENS), their_logits(transformers, folder))


# --- what is said --------------------------------------------------------------------------------


def test_what_makers_say_of_sampling_is_kept_and_what_would_change_greedy_answers_is_said(
    download, tmp_path, capsys
):
    folder = download("Qwen2.5")
    path = folder / "generation_config.json"
    said = {"repetition_penalty": 1.1, "top_p": 0.8, "do_sample": True, "no_repeat_ngram_size": 0}
    path.write_text(json.dumps(said))
    save_model(*load_model(folder), tmp_path)
    [note] = capsys.readouterr().out.splitlines()
    assert "asks for a repetition_penalty; completions here are without it" in note
    assert said.items() <= json.loads((tmp_path / path.name).read_text()).items()


# --- adapters on them ----------------------------------------------------------------------------


def test_an_adapter_opens_in_peft_and_here_wherever_one_stands(
    download, tmp_path, monkeypatch, transformers
):
    peft = pytest.importorskip("peft")
    base, elsewhere = download(), tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load_model("download")
    adapters.attach(model, "lora", adapters.Settings(rank=2), "download")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.1 if "lora_B" in name else 0)
        wanted = model(TOKENS)
    save_model(model, tokenizer, "runs/lora")
    monkeypatch.chdir(elsewhere)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "runs/lora").eval()
    assert close(theirs(TOKENS).logits, wanted)
    path = tmp_path / "runs/lora/adapter_config.json"
    for written in (str(base), "download", "../../download", "/gone/runs/download"):
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": written})
        )
        assert close(load_model(tmp_path / "runs/lora")[0](TOKENS), wanted)
        assert close(load_model(os.path.relpath(tmp_path / "runs/lora"))[0](TOKENS), wanted)


def test_no_adapter_is_trained_on_an_adapter_which_peft_would_open_wrongly(download, tmp_path):
    base = download()
    model, tokenizer = load_model(base)
    save_model(adapters.attach(model, "lora", base=base), tokenizer, tmp_path / "lora")
    merged, _ = load_model(tmp_path / "lora")
    with pytest.raises(UserError, match="hub export .*lora --merge --out .*lora_merged"):
        adapters.attach(merged, "lora", base=tmp_path / "lora")
