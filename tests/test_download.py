"""Models of the Hub by name, against a server on 127.0.0.1 that answers as the Hub does."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from helpers import ROOT, Answering, refused, run, serving

import train_sft
from nanollm import chat, safetensors
from nanollm.checkpoint import bases_of, existing_folder, save_gpt, weights_hash
from nanollm.config import UserError
from nanollm.formats import write_jsonl
from nanollm.hub import load_model

SHA = hashlib.sha1(b"a revision").hexdigest()
FOLDER = Path("data/cache/hub/owner--name")
PICKLE = {"pytorch_model.bin": b"pickle", "README.md": b"#"}


class Hub(Answering):
    """Answers as the Hub does, of `files` {path in the repository: bytes}."""

    def do_GET(self):
        hub, path = self.server, unquote(urlsplit(self.path).path)
        begin = int(self.headers.get("Range", "bytes=0-")[6:-1])
        hub.asked.append((path, begin))
        hub.tokens.append((self.headers["Host"], self.headers.get("Authorization")))
        revision, _, name = path.removeprefix("/owner/name/resolve/").partition("/")
        commit = {"X-Repo-Commit": hub.commit} if hub.commit else {}
        if hub.status != 200 or revision not in (hub.commit, "main") or name not in hub.files:
            return self.answer(b"no", 404 if hub.status == 200 else hub.status, **commit)
        if hub.cdn and name.endswith("safetensors") and hub.cdn != self.headers["Host"]:
            return self.answer(b"", 302, Location=f"http://{hub.cdn}{path}")
        body = hub.files[name][: hub.short.get(name)]
        status = 206 if begin and hub.ranges else 200
        body = body[begin:] if status == 206 else body
        self.answer(body[: hub.cut.pop(name, None)], status, len(body), **commit)


HUB = {
    "commit": SHA,  # that it tells, which a plain mirror doesn't
    "ranges": True,  # does it answer to Range?
    "status": 200,  # of every answer
    "cdn": None,  # another address of the server, to which weights are redirected
}


@pytest.fixture(scope="module")
def model_files(tmp_path_factory):
    from conftest import SMALL, randomise

    from nanollm.gpt import GPT, GPTConfig
    from nanollm.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("model")
    save_gpt(randomise(GPT(GPTConfig(**SMALL))), Tokenizer.from_bytes(), folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(model_files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    # (host, token) of requests, {name: bytes after which the connection breaks}, {name: bytes that
    # it says it has, and has}
    state = {"files": {**model_files}, "tokens": [], "cut": {}, "short": {}}
    with serving(Hub, **HUB, **state) as hub:
        monkeypatch.setenv("HF_ENDPOINT", f"{hub.url}/")
        yield hub


def sharded(files):
    """The same model as two shards and their index."""
    Path("whole.safetensors").write_bytes(files["model.safetensors"])
    tensors = sorted(safetensors.load_file("whole.safetensors").items())
    files = {name: body for name, body in files.items() if name != "model.safetensors"}
    index = {}
    for i, part in enumerate((tensors[:5], tensors[5:]), 1):
        name = f"model-{i:05}-of-00002.safetensors"
        safetensors.save_file(dict(part), name)
        files[name] = Path(name).read_bytes()
        index |= dict.fromkeys(dict(part), name)
    return files | {"model.safetensors.index.json": json.dumps({"weight_map": index}).encode()}


def logits(folder):
    return load_model(folder)[0](torch.arange(8)[None])


@pytest.mark.parametrize("commit, shards", [(SHA, True), (None, False)])
def test_a_name_is_a_folder_that_is_fetched_once(hub, monkeypatch, commit, shards):
    whole = {**hub.files}
    hub.files = (sharded(whole) if shards else whole) | PICKLE
    hub.commit = commit
    found = logits("owner/name")
    names = {path.name: path.read_bytes() for path in FOLDER.iterdir()}
    assert names == {name: body for name, body in hub.files.items() if name not in PICKLE}
    asked = len(hub.asked)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert torch.equal(logits("owner/name"), found) and len(hub.asked) == asked
    Path("local").mkdir()
    for name, body in whole.items():
        Path("local", name).write_bytes(body)
    assert torch.equal(logits("local"), found)
    assert sorted(path.name for path in FOLDER.parent.iterdir()) == ["owner--name"]


@pytest.mark.parametrize("commit, ranges", [(SHA, True), (None, True), (SHA, False)])
def test_a_download_that_broke_goes_on_where_it_was(hub, commit, ranges):
    hub.commit, hub.ranges = commit, ranges
    hub.files = files = sharded(hub.files)
    first, name = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    hub.cut = {name: 5000}
    with pytest.raises(UserError, match=f"{name}: the connection broke after 5,000 of .* again$"):
        load_model("owner/name")
    assert not FOLDER.exists()
    hub.asked.clear()
    load_model("owner/name")
    assert [begin for path, begin in hub.asked if path.endswith(name)] == [5000]
    assert not [path for path, _ in hub.asked if path.endswith(first)]  # which was whole
    assert (FOLDER / name).read_bytes() == files[name]


def test_files_of_two_commits_are_never_mixed(hub):
    name = "model.safetensors"
    hub.cut = {name: 5000}
    with pytest.raises(UserError, match="broke after"):
        existing_folder("owner/name")
    hub.commit = SHA[::-1]
    existing_folder("owner/name")
    assert [begin for path, begin in hub.asked if path.endswith(name)] == [0, 0]


def test_a_server_that_says_less_than_the_weights_are_is_found_out(hub):
    size = len(hub.files["model.safetensors"])
    hub.short = {"model.safetensors": size - 9}
    with pytest.raises(UserError, match=f"should have {size} bytes but has {size - 9}"):
        existing_folder("owner/name")
    assert not FOLDER.exists()
    hub.short = {}
    load_model("owner/name")  # nothing of it is kept


def in_shards(drop=(), **more):
    def change(hub):
        hub.files = sharded(hub.files) | more
        for name in drop:
            del hub.files[name]

    return change


def without(name, **more):
    return lambda hub: hub.files.update(more) if hub.files.pop(name) else None


def answering(status):
    return lambda hub: setattr(hub, "status", status)


INDEX, SHARD = "model.safetensors.index.json", "model-00002-of-00002.safetensors"
REFUSED = {
    "no such model": (answering(404), "no folder owner/name, and no config.json"),
    "gated": (answering(401), r"no access .*\(401\).* set HF_TOKEN"),
    "an ill server": (answering(503), "503.* HF_ENDPOINT"),
    "pickles alone": (without("model.safetensors", **PICKLE), "has no model.safetensors; no other"),
    "a shard is missing": (in_shards([SHARD]), f"lacks {SHARD}, which"),
    "an index that leads elsewhere": (
        in_shards(**{INDEX: b'{"weight_map": {"x": "../x.safetensors"}}'}),
        "a file of this directory",
    ),
    "a page for everybody": (
        lambda hub: hub.files.update(dict.fromkeys(hub.files, b"<html>Sign in")),
        "cut off, or not a safetensors file",
    ),
}


@pytest.mark.parametrize("change, why", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_had_is_one_line_and_leaves_no_folder(hub, capsys, change, why):
    change(hub)
    said = refused(capsys, chat, "owner/name", "--prompt", "a")
    assert re.search(why, said), said
    assert not FOLDER.exists() and not list(FOLDER.parent.glob(".*.lock"))


TRIED = "as a model of the Hub: cannot open "


@pytest.mark.parametrize(
    "endpoint, offline, why",
    [
        ("http://127.0.0.1:1", "0", f"{TRIED}http://127.0.0.1:1/.* HF_ENDP"),
        ("http://127.0.0.1:1", "1", f"no folder owner/name, nor {FOLDER}, and HF_HUB"),
        ("nonsense", "0", f"{TRIED}.*unknown url type.* HF_ENDPOINT"),
    ],
)
def test_without_a_network_the_line_says_what_was_tried(hub, monkeypatch, endpoint, offline, why):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    with pytest.raises(UserError, match=why) as caught:
        existing_folder("owner/name")
    assert "\n" not in str(caught.value)


def test_folders_of_ours_are_never_asked_for(hub):
    Path("mine").mkdir()
    for name in ("runs/sft", "mine/model", "./a/b", "a/b/c", "name", "/owner/name", "../a"):
        with pytest.raises(UserError, match="run the stage that makes it"):
            existing_folder(name)
    assert hub.asked == []


def test_the_token_is_told_to_the_hub_and_to_nobody_else(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", " secret\n")
    hub.cdn = f"localhost:{hub.server_port}"
    existing_folder("owner/name")
    told = {host.partition(":")[0]: token for host, token in hub.tokens}
    assert told == {"127.0.0.1": "Bearer secret", "localhost": None}
    assert {token for host, token in hub.tokens if host[0] == "l"} == {None}


def test_another_process_that_downloads_is_waited_for_and_never_joined(hub):
    code = "from nanollm.download import hub_folder; print(hub_folder('owner/name'))"
    how = {"stdout": subprocess.PIPE, "text": True, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    ranks = [how | {"env": how["env"] | {"LOCAL_RANK": rank}} for rank in "10"]
    both = [subprocess.Popen([sys.executable, "-c", code], **rank) for rank in ranks]
    assert [process.communicate()[0].split()[-1] for process in both] == [str(FOLDER)] * 2
    files = [path for path, _ in hub.asked]
    assert len(files) == len({*files})  # each was asked for once


def test_a_script_begins_from_a_name_and_its_adapter_names_it(hub):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    write_jsonl("chats.jsonl", [{"messages": turns}] * 30)
    flags = "--init owner/name --data chats.jsonl --replay 0 --steps 2 --batch_size 2 --dtype fp32"
    run(train_sft, *flags.split(), "--adapter", "lora", out="runs/a")
    saved = json.loads(Path("runs/a/adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "owner/name" and bases_of("runs/a") == [FOLDER]
    load_model("runs/a")
    assert weights_hash("owner/name") == weights_hash(FOLDER)
