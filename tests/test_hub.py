"""Model folders: what transformers opens, what we refuse, and how a vocabulary grows."""

import dataclasses
import json

import pytest
import torch
from test_foreign import EMBEDDING, HEAD, change_weights, edit

from nanollm import hub, safetensors
from nanollm.checkpoint import grow_vocabulary, read_config
from nanollm.config import UserError, parse
from nanollm.hub import load_model, save_model
from nanollm.peft import adapters
from nanollm.tokenizer import SPECIAL_TOKENS

NAMES = "config generation_config tokenizer tokenizer_config".split()
NAMES = {f"{name}.json" for name in NAMES} | {"model.safetensors"}
SHAPES = {
    "qwen3": {},
    "llama": {"qk_norm": False},
    "qwen2": {"qk_norm": False, "attention_bias": True},
}
NORM = "model.norm.weight"


@pytest.fixture
def folder(random_model, tokenizer, tmp_path):
    """A good model folder, for the tests to spoil."""
    save_model(random_model(), tokenizer, tmp_path / "model")
    return tmp_path / "model"


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# --- what others read ----------------------------------------------------------------------------


WHOLE = "num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_size "
WHOLE += "intermediate_size max_position_embeddings"


@pytest.mark.parametrize("kind", SHAPES)
def test_what_we_save_says_what_it_is_to_transformers_and_llama_cpp(
    kind, random_model, tokenizer, tmp_path, transformers
):
    save_model(random_model(rope_theta=5000.0, **SHAPES[kind]), tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    said = {"model_type": kind, "rope_theta": 5000.0, "torch_dtype": "float32"}  # as of old
    said |= {"architectures": [f"{kind.title()}ForCausalLM"], "rms_norm_eps": 1e-6}
    assert config.items() >= said.items()
    assert all(type(config[name]) is int for name in WHOLE.split())
    tensors = safetensors.load_folder(tmp_path)
    assert "lm_head.weight" not in tensors  # tied: written once
    mapped = "model.layers.", "model.embed_tokens", "model.norm"  # by llama.cpp's converter
    assert all(name.startswith(mapped) for name in tensors)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert max(theirs.get_vocab().values()) < config["vocab_size"]
    source = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    assert source["type"] == "BPE" and not source.get("byte_fallback")  # then it is read as GPT-2's
    generation = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert generation.eos_token_id == sorted(tokenizer.stop_ids) and len(tokenizer.stop_ids) == 2
    assert (generation.pad_token_id, generation.do_sample) == (tokenizer.pad_id, False)


def test_a_folder_gives_back_model_and_tokenizer_and_is_saved_again_byte_by_byte(
    folder, random_model, tokenizer
):
    before, (model, loaded) = files(folder), load_model(folder)
    assert loaded == tokenizer
    for (name, a), b in zip(model.named_parameters(), random_model().parameters()):
        assert torch.equal(a, b), name
    save_model(model, loaded, folder)
    assert files(folder) == before
    assert before.keys() == NAMES


# --- errors --------------------------------------------------------------------------------------


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def remove(name):
    return lambda folder: (folder / name).unlink()


def cut_off(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def fewer_rows(folder):
    """A model of 200 tokens beside a tokenizer of 270."""
    edit(folder, vocab_size=200)
    change_weights(folder, lambda _: {EMBEDDING: torch.zeros(200, 32)})


@pytest.mark.parametrize(  # what config.json and the tensors may say is in test_foreign.py
    "spoil, sentence",
    [
        (remove("config.json"), "config.json does not exist"),
        (write("config.json", "{"), "config.json is not valid JSON"),
        (remove("model.safetensors"), "no model.safetensors"),
        (cut_off, "bytes but has"),
        (remove("tokenizer.json"), "the tokenizer .* must be a directory with a tokenizer.json"),
        (write("tokenizer.json", "{}"), "tokenizer.json"),
        (fewer_rows, "its tokenizer has ids up to 255, but the embedding has 200 rows"),
    ],
)
def test_a_spoilt_folder_is_refused_in_one_line(spoil, sentence, folder):
    spoil(folder)
    with pytest.raises(UserError, match=sentence) as error:
        load_model(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("name", ["nowhere", "model/config.json"])
def test_a_path_without_a_directory_is_refused(name, folder):
    path = folder.parent / name
    with pytest.raises(UserError, match=f"^{path} is not a folder; .* name another$"):
        load_model(path)
    with pytest.raises(UserError, match=f"^--adapter {path} is not a folder; "):
        load_model(folder, path)


# --- tolerated differences -----------------------------------------------------------------------


def test_what_config_json_leaves_out_has_the_values_of_hugging_face(folder):
    left_out = "head_dim num_key_value_heads tie_word_embeddings rope_theta"
    edit(folder, **dict.fromkeys(left_out.split(), ...))
    cfg = read_config(folder)
    assert (cfg.head_dim, cfg.num_key_value_heads) == (8, 4)
    assert (cfg.tie_word_embeddings, cfg.rope_theta) == (False, 10_000.0)


def test_a_tied_head_that_is_the_embedding_and_saved_frequencies_are_ignored(folder, random_model):
    tokens = torch.arange(10)[None]
    angles = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    change_weights(folder, lambda t: {HEAD: t[EMBEDDING]} | angles)
    assert torch.equal(load_model(folder)[0](tokens), random_model()(tokens))


# --- growing vocabularies ------------------------------------------------------------------------


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
    (tmp_path / "tokenizer_config.json").unlink()  # which has a chat template
    source = json.loads((tmp_path / "tokenizer.json").read_text())
    source["added_tokens"], vocab = source["added_tokens"][:1], source["model"]["vocab"]
    source["model"]["vocab"] = {name: id for name, id in vocab.items() if id < 257}
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


# --- export --------------------------------------------------------------------------------------


def export(folder, *flags):
    hub.export(parse(hub.Config, None, [str(folder), *map(str, flags)]))


@pytest.mark.parametrize(
    "scalar, dtype, error",
    [(False, "fp32", 0.0), (False, "bf16", 2e-2), (False, "fp16", 3e-3), (True, "bf16", 2e-2)],
)
def test_an_exported_folder_is_a_plain_model_in_transformers(
    scalar, dtype, error, random_model, tokenizer, tmp_path, transformers, capsys
):
    run, tokens = tmp_path / "run", torch.arange(40)[None]
    torch.manual_seed(0)
    save_model(random_model(qk_norm=False), tokenizer, run)
    if scalar:
        save_model(hub.load_scalar(run)[0], tokenizer, run)
    (run / "state.pt").touch()
    export(run, "--out", tmp_path / "new/model", "--dtype", dtype)
    assert capsys.readouterr().out.startswith(f"{tmp_path}/new/model: opened again; ids are equal")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"model"}
    assert {path.name for path in (tmp_path / "new/model").iterdir()} == NAMES
    auto = "SequenceClassification" if scalar else "CausalLM"
    theirs = getattr(transformers, f"AutoModelFor{auto}").from_pretrained(tmp_path / "new/model")
    assert theirs.dtype == hub.DTYPES[dtype]
    load = hub.load_scalar if scalar else load_model
    before, ours = (load(each)[0](tokens) for each in (run, tmp_path / "new/model"))
    assert (ours - before).norm() <= error * before.norm()
    logits = theirs.float()(tokens).logits
    assert torch.allclose(logits, ours[:, -1:] if scalar else ours, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "dora", "qlora", "bottleneck"])
def test_an_adapter_is_exported_with_its_base_or_refused(
    method, folder, tokenizer, tmp_path, transformers
):
    model, _ = load_model(folder)
    adapters.attach(model, method, adapters.Settings(rank=4), folder)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 if p.requires_grad else 0)
    save_model(model, tokenizer, tmp_path / "adapter")
    with pytest.raises(UserError, match="holds an adapter, which peft opens; add --merge"):
        export(tmp_path / "adapter", "--out", tmp_path / "whole")
    if method == "bottleneck":
        with pytest.raises(UserError, match="of kind bottleneck can't be merged"):
            export(tmp_path / "adapter", "--out", tmp_path / "whole", "--merge")
        return
    export(tmp_path / "adapter", "--out", tmp_path / "whole", "--merge")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    tokens = torch.arange(40)[None]
    wanted = model(tokens)
    assert (theirs(tokens).logits - wanted).abs().max() < 1e-5 * wanted.abs().max()


def overflow(folder):
    change_weights(folder, lambda t: {NORM: t[NORM] + 1e5})


@pytest.mark.parametrize(
    "spoil, flags, sentence",
    [
        (overflow, ["--dtype", "fp16"], "its logits by nan%; --dtype fp32 is exact"),
        (lambda folder: (folder / "out").mkdir(), [], "out is there already; name a new folder"),
    ],
)
def test_an_export_that_would_not_be_the_run_leaves_nothing(spoil, flags, sentence, folder):
    spoil(folder)
    with pytest.raises(UserError, match=sentence):
        export(folder, "--out", folder / "out", *flags)
    assert not list(folder.glob("out*/*"))


def test_what_is_written_wrongly_is_not_kept(folder, tmp_path, monkeypatch):
    def save(model, tokenizer, where):
        with torch.no_grad():
            model.model.norm.weight[0] += 1
            save_model(model, tokenizer, where)
            model.model.norm.weight[0] -= 1

    monkeypatch.setattr(hub, "save_model", save)
    with pytest.raises(UserError, match="what was written differs"):
        export(folder, "--out", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
