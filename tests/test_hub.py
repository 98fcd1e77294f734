"""Model folders: what transformers opens, what we refuse, and how a vocabulary grows."""

import dataclasses
import errno
import json
import os

import pytest
import torch

from nanollm import safetensors
from nanollm.checkpoint import grow_vocabulary, read_config
from nanollm.config import UserError
from nanollm.hub import load_model, save_model
from nanollm.run import Run
from nanollm.runtime import Runtime
from nanollm.tokenizer import SPECIAL_TOKENS

TEXTS = ["Anna lives in Berlin.", " 12 + 30 = 42\n", "naïve 北京 🙂", "<|end|> is text here", ""]


@pytest.fixture
def folder(random_model, tokenizer, tmp_path):
    """A good model folder, for the tests to spoil."""
    save_model(random_model(), tokenizer, tmp_path / "model")
    return tmp_path / "model"


def edit_json(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def edit_weights(folder, change):
    tensors = safetensors.load_folder(folder)
    change(tensors)
    safetensors.save_file(tensors, folder / "model.safetensors")


# --- what others read --------------------------------------------------------------------------
def test_transformers_opens_the_folder_of_a_run(random_model, tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")

    @dataclasses.dataclass
    class Settings:
        out: str = str(tmp_path / "run")
        resume: bool = False

    model = random_model()
    run = Run(Settings(), Runtime(torch.device("cpu"), torch.float32), steps=1)
    run.export(model, tokenizer)
    run.close()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    for text in TEXTS[:3]:
        ids = tokenizer.encode(text)
        assert their_tokenizer(text)["input_ids"] == ids
        tokens = torch.tensor([ids])
        assert torch.allclose(model(tokens), theirs(tokens).logits, atol=1e-4)
    messages = [{"role": "user", "content": "Hi"}]
    rendered = their_tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert list(rendered["input_ids"]) == tokenizer.render(messages, generation_prompt=True)[0]


def test_a_qwen2_that_we_save_again_keeps_its_tokenizer_in_transformers(
    random_model, tokenizer, tmp_path
):
    transformers = pytest.importorskip("transformers")
    save_model(random_model(qk_norm=False, attention_bias=True), tokenizer, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == tokenizer.encode(text, special=True)


def test_generation_config_names_both_stop_tokens_and_the_padding(folder, tokenizer):
    transformers = pytest.importorskip("transformers")
    config = transformers.GenerationConfig.from_pretrained(folder)
    assert config.eos_token_id == sorted(tokenizer.stop_ids) and len(config.eos_token_id) == 2
    assert config.pad_token_id == tokenizer.pad_id
    assert config.do_sample is False


@pytest.mark.parametrize(
    "shape, kind",
    [
        ({}, "qwen3"),
        ({"qk_norm": False}, "llama"),
        ({"qk_norm": False, "attention_bias": True}, "qwen2"),
    ],
)
def test_config_json_names_the_architecture_and_the_older_rope_theta(
    shape, kind, random_model, tokenizer, tmp_path
):
    save_model(random_model(rope_theta=5000.0, **shape), tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == kind
    assert config["rope_theta"] == 5000.0
    assert config["torch_dtype"] == "float32"


def test_a_tied_head_is_written_once(folder):
    assert "lm_head.weight" not in safetensors.load_folder(folder)


def test_a_folder_gives_back_model_and_tokenizer(folder, random_model, tokenizer):
    model, loaded = load_model(folder)
    assert loaded == tokenizer
    for (name, a), b in zip(model.named_parameters(), random_model().parameters()):
        assert torch.equal(a, b), name


def test_saving_twice_writes_the_same_bytes(folder):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert before.keys() == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    save_model(*load_model(folder), folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


# --- atomic writes -----------------------------------------------------------------------------
@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_folder_intact(
    broken, folder, random_model, tokenizer, monkeypatch
):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def disk_full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, broken, disk_full)
    with pytest.raises(OSError, match="No space"):
        save_model(random_model(seed=1), tokenizer, folder)
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_failure_in_the_middle_of_the_weights_leaves_the_old_ones(
    folder, random_model, tokenizer, monkeypatch
):
    old, numpy, calls = (folder / "model.safetensors").read_bytes(), torch.Tensor.numpy, []

    def third_fails(tensor):
        calls.append(tensor)
        return numpy(tensor) if len(calls) < 3 else 1 / 0

    monkeypatch.setattr(torch.Tensor, "numpy", third_fails)
    with pytest.raises(ZeroDivisionError):
        save_model(random_model(seed=1), tokenizer, folder)
    monkeypatch.undo()
    assert (folder / "model.safetensors").read_bytes() == old
    assert len(list(folder.iterdir())) == 5  # and nothing half-written lies about


# --- errors ------------------------------------------------------------------------------------
def drop(name):
    return lambda folder: edit_weights(folder, lambda tensors: tensors.pop(name))


def put(name, tensor):
    return lambda folder: edit_weights(folder, lambda tensors: tensors.update({name: tensor}))


def config(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


def cut_off(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def remove(name):
    return lambda folder: (folder / name).unlink()


def fewer_rows(folder):
    """A model of 200 tokens beside a tokenizer of 270."""
    config(vocab_size=200)(folder)
    edit_weights(folder, lambda t: t.update({"model.embed_tokens.weight": torch.zeros(200, 32)}))


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (remove("config.json"), "config.json does not exist"),
        (write("config.json", "{"), "config.json is not valid JSON"),
        (write("config.json", "[1]"), "config.json must hold a JSON object"),
        (config(model_type="mamba"), "model_type 'mamba' is not one of llama, qwen3, qwen2"),
        (config(model_type=...), "model_type None"),
        (config(use_sliding_window=True), "sliding-window attention is not implemented"),
        (config(hidden_act="gelu"), "only SwiGLU"),
        (config(mlp_bias=True), "only SwiGLU"),
        (
            config(rope_scaling={"rope_type": "yarn", "factor": 4.0}),
            "RoPE of type 'yarn' is not implemented",
        ),
        (config(rope_scaling={"type": "linear", "factor": 4.0}), "RoPE of type 'linear'"),
        (config(rope_parameters={"rope_type": "dynamic"}), "RoPE of type 'dynamic'"),
        (config(num_attention_heads=...), "config.json is incomplete or inconsistent"),
        (config(num_key_value_heads=3), "config.json is incomplete or inconsistent.*can't share"),
        (config(num_key_value_heads=0), "config.json is incomplete or inconsistent"),
        (config(hidden_size="32"), "config.json"),
        (config(num_hidden_layers=2.5), "config.json"),
        (config(vocab_size=-1), "config.json"),
        (config(rope_scaling="llama3"), "config.json"),
        (config(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "config.json"),
        (config(hidden_size=64), r"has shape \[.*32.*\], but config.json says \[.*64.*\]"),
        (config(num_hidden_layers=3), "lacks 11 tensors, such as model.layers.2"),
        (
            config(num_hidden_layers=1),
            "has 11 tensors that the model in config.json has not, such as model.layers.1",
        ),
        (remove("model.safetensors"), "no model.safetensors"),
        (cut_off, "cut off"),
        (write("model.safetensors", "hello"), "cut off or no safetensors file"),
        (drop("model.norm.weight"), "lacks 1 tensors, such as model.norm.weight"),
        (
            put("model.layers.0.gate", torch.zeros(2)),
            "has 1 tensors .* such as model.layers.0.gate",
        ),
        (
            put("model.norm.weight", torch.zeros(31)),
            r"model.norm.weight has shape \[31\], but config.json says \[32\]",
        ),
        (put("model.norm.weight", torch.zeros(32, 1)), r"model.norm.weight has shape \[32, 1\]"),
        (remove("tokenizer.json"), "tokenizer"),
        (write("tokenizer.json", "{}"), "tokenizer.json"),
        (
            fewer_rows,
            "vocabulary mismatch: .*ids up to 255, but the model's embedding has 200 rows",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_spoilt_folder_is_refused_in_one_line(spoil, sentence, folder):
    spoil(folder)
    with pytest.raises(UserError, match=sentence) as error:
        load_model(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("name", ["nowhere", "model/config.json"])
def test_a_path_that_is_no_folder_is_refused(name, folder):
    with pytest.raises(UserError, match=f"^{folder.parent / name} is no folder; .* name another$"):
        load_model(folder.parent / name)
    with pytest.raises(UserError, match=f"^--adapter {folder.parent / name} is no folder; "):
        load_model(folder, folder.parent / name)


def test_bias_of_the_output_projection_is_refused_rather_than_dropped(folder):
    put("model.layers.0.self_attn.o_proj.bias", torch.zeros(32))(folder)
    with pytest.raises(UserError, match="o_proj.bias"):
        load_model(folder)


def test_what_config_json_leaves_out_has_the_values_of_hugging_face(folder):
    config(head_dim=..., num_key_value_heads=..., tie_word_embeddings=..., rope_theta=...)(folder)
    cfg = read_config(folder)
    assert (cfg.head_dim, cfg.num_key_value_heads, cfg.tie_word_embeddings, cfg.rope_theta) == (
        8,
        4,
        False,
        10_000.0,
    )


# --- tolerated differences ---------------------------------------------------------------------
def test_a_tied_head_that_was_written_all_the_same_is_ignored(folder, random_model):
    tokens = torch.arange(10)[None]
    edit_weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert torch.equal(load_model(folder)[0](tokens), random_model()(tokens))


def test_saved_frequencies_of_old_exports_are_ignored(folder):
    put("model.layers.0.self_attn.rotary_emb.inv_freq", torch.zeros(4))(folder)
    load_model(folder)


# --- growing vocabularies ----------------------------------------------------------------------
@pytest.mark.parametrize("tied", [True, False])
def test_a_grown_model_keeps_its_logits_and_new_tokens_get_their_mean(tied, random_model):
    model = random_model(vocab_size=100, tie_word_embeddings=tied)
    grown, tokens = grow_vocabulary(model, 107), torch.randint(100, (2, 20))
    old, new = model(tokens), grown(tokens)
    assert new.shape == (2, 20, 107)
    assert torch.allclose(new[..., :100], old, atol=1e-5)
    assert torch.allclose(new[..., 100:], old.mean(-1, keepdim=True).expand(2, 20, 7), atol=1e-5)
    assert grown.cfg == dataclasses.replace(model.cfg, vocab_size=107)


def test_a_foreign_vocabulary_without_chat_marks_grows_the_model(random_model, tokenizer, tmp_path):
    model = random_model(vocab_size=257)  # bytes, and <|endoftext|>
    save_model(model, tokenizer, tmp_path)
    source = json.loads((tmp_path / "tokenizer.json").read_text())
    source["added_tokens"] = source["added_tokens"][:1]
    source["model"]["vocab"] = {
        name: id for name, id in source["model"]["vocab"].items() if id < 257
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(source))
    grown, loaded = load_model(tmp_path)
    assert loaded.vocab_size == grown.cfg.vocab_size == 256 + len(SPECIAL_TOKENS)
    ids = torch.tensor([loaded.render([{"role": "user", "content": "Hi"}])[0]])
    assert grown(ids).isfinite().all()
    text = torch.tensor([loaded.encode("Hello")])
    assert torch.allclose(grown(text)[..., :257], model(text), atol=1e-5)


def test_an_embedding_padded_beyond_the_vocabulary_stays_as_it_is(
    random_model, tokenizer, tmp_path
):
    save_model(random_model(vocab_size=320), tokenizer, tmp_path)
    assert load_model(tmp_path)[0].cfg.vocab_size == 320


def test_a_config_survives_the_round_trip_through_config_json(random_model, tokenizer, tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    model = random_model(
        rope_scaling=scaling, rope_theta=5e5, rms_norm_eps=1e-5, head_dim=16, num_key_value_heads=1
    )
    save_model(model, tokenizer, tmp_path)
    assert read_config(tmp_path) == model.cfg
