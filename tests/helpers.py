"""What tests of the scripts share: running one in this process, as a command, killed and resumed,
or as two processes, and looking at what it leaves.
"""

import contextlib
import faulthandler
import functools
import http.server
import importlib
import io
import itertools
import json
import multiprocessing.forkserver
import os
import random
import runpy
import signal
import socket
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanollm.config import cli, parse
from nanollm.generate import Engine
from nanollm.gpt import GPT, GPTConfig
from nanollm.hub import load_model
from nanollm.run import Run, read_metrics

ROOT = Path(__file__).resolve().parents[1]


ON_CPU = "--batch_size 4 --dtype fp32 --device cpu".split()
TINY = [*ON_CPU, *"--layers 1 --channels 32 --heads 2 --context 64 --tokenizer bytes".split()]
TINY += "--data text.txt --sample_tokens 8".split()  # of train_pretrain.py
WORDS = "owl fox hen cow pig bee ant elk yak emu eel cod bat rat cat dog".split()


@contextlib.contextmanager
def in_new_folder(tmp_path_factory):
    """Inside, a new folder with a text in it is the current one; for fixtures of a module."""
    folder = tmp_path_factory.mktemp("trained")
    with contextlib.chdir(folder):
        Path("text.txt").write_text("the cat sat on the mat. the dog sat on the log. " * 150)
        yield folder


def run(module, *flags, out):
    """Train in this process; returns the metrics."""
    flags = [*map(str, flags), "--out", str(out)]
    module.main(parse(module.Config, module.PRESETS, flags))
    return read_metrics(out)


def result(out):
    return json.loads(Path(out, "result.json").read_text(encoding="utf-8"))


def close(ours, theirs, atol=1e-5, rtol=1e-5):
    torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs), atol=atol, rtol=rtol)


def weights(folder):
    return dict(load_model(folder)[0].state_dict())


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@functools.cache
def nursery():
    """A context of multiprocessing whose processes begin as copies of one that has imported torch,
    and has done nothing else: no thread of its own could be missing in the copy.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers", "torch._dynamo"])  # which optimizers import
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "tests"))))
        multiprocessing.forkserver.ensure_running()
    return context


def command(script, *flags):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return {"args": [sys.executable, str(ROOT / script), *map(str, flags)], "env": env}


def begin(script, *flags, said=os.devnull, **env):
    """Run a script in a process of its own; what it says is added to the file `said`."""
    arguments = str(ROOT / script), list(map(str, flags)), os.getcwd(), said, env
    process = nursery().Process(target=execute, args=arguments)
    process.start()
    return process


def execute(script, flags, folder, said, env):
    os.chdir(folder)
    os.environ.update(env)
    with open(said, "a") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    faulthandler.enable()
    torch.set_num_threads(1)
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")


class Killed(Exception):
    pass


def logged(out):
    """Metrics of a run, without what the clock says."""
    return [{k: v for k, v in m.items() if "second" not in k} for m in read_metrics(out)]


def assert_resumes(script, flags, last):
    """A run that ended after step `last` and is resumed has the weights and metrics of an
    uninterrupted one, bit for bit. Returns the folders of both.
    """
    advance = Run.advance

    def until_last(self, *args, **metrics):
        advance(self, *args, **metrics)
        if self.step == last:
            raise Killed

    module, folders = importlib.import_module(Path(script).stem), ("runs/whole", "runs/killed")
    run(module, *flags, out=folders[0])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "advance", until_last)
        run(module, *flags, out=folders[1])
    torch.manual_seed(99)
    run(module, "--resume", out=folders[1])
    assert same(*(torch.load(f"{n}/state.pt", weights_only=True)["model"] for n in folders))
    assert logged(folders[0]) == logged(folders[1])
    return folders


def moments_of_two_processes(script, flags, one, two):
    """First moments of the optimizers after a run with one process and a run with two."""
    run(importlib.import_module(Path(script).stem), *flags, out=one)
    as_two_processes(script, *flags, "--out", two)
    return [first_moments(n) for n in (one, two)]


def as_two_processes(script, *flags, code=0, timeout=120):
    """Run a script as two processes, as torchrun starts them; returns what they said. Where they
    hang, the failure tells what each thread was doing.
    """
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    said = f"said_{env['MASTER_PORT']}.txt"
    ranks = [{"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    both = [begin(script, *flags, said=said, **env, **rank) for rank in ranks]
    for process in both:
        process.join(timeout)
    for process in (hung := [process for process in both if process.is_alive()]):
        os.kill(process.pid, signal.SIGABRT)
        process.join()
    text = Path(said).read_text()
    assert not hung, f"{script} hung for {timeout} s:\n{text}"
    assert [process.exitcode for process in both] == [code] * 2, text
    return text


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def first_moments(folder):
    """First moments in a checkpoint: after one step the gradients, up to a factor."""
    state = torch.load(Path(folder, "state.pt"), weights_only=True)["optimizer"]
    return [
        s[name]
        for optimizer in state["optimizers"]
        for s in optimizer["state"].values()
        for name in ("momentum", "exp_avg")
        if name in s
    ]


def refused(capsys, module, *flags):
    """The one line on stderr with which a script refuses; its exit code must be 2."""
    capsys.readouterr()  # what was said before
    with pytest.raises(SystemExit) as stop:
        cli(module.main, module.Config, getattr(module, "PRESETS", None), list(map(str, flags)))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


class Typed(io.StringIO):
    """Lines that somebody types, who hits Ctrl-C instead of a line "^C"."""

    def isatty(self):
        return True

    def readline(self):
        line = super().readline()
        if line == "^C\n":
            raise KeyboardInterrupt
        return line


class Peak(TorchDispatchMode):
    """The most bytes of tensors alive at once: of these, and of those that are made within."""

    def __init__(self, tensors=()):
        super().__init__()
        self.alive, self.peak = weakref.WeakValueDictionary(), 0
        self.count(tensors)

    def count(self, tensors):
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = storage
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.alive.values()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count(tree_leaves(out))
        return out


# --- texts and models by hand --------------------------------------------------------------------

MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_result>", "</tool_result>")
MEGABYTES = 10 * 2**20
ALPHABETS = (
    "0123456789+-*/%(). ,",
    "12()**//%",
    [chr(i) for i in range(128)],
    [*"٣１²½∞−×÷πéßǅ中0+(", "\0", "\ud800", "\udfff", "\u202e", "\u2028", "\xa0", "😀", "e\u0301"],
    ["9**", "(", ")", "lambda", "__import__", "'", '"""', "0x", "1e9", "1e999", ":=", "[", "{",
     "if", "else", "for x in", "1j", "_", "~", "<<", "@", "f'{", "#", "\n", "not", " ", "0", "\\"],
    [*MARKS, "4", "-", ".", ",", " ", "The answer is ", "\n", "<", "think>", "search(", ")"],
)  # fmt: skip


class Answering(http.server.BaseHTTPRequestHandler):
    """A request to a server of `serving`, which is answered without a word on stderr."""

    def answer(self, body, status=200, said=None, **headers):
        """`said`: how many bytes are announced, where that isn't true."""
        self.send_response(status)
        for name, value in {"Content-Length": said or len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 50


@contextlib.contextmanager
def serving(handler, **attributes):
    """A server on 127.0.0.1 whose requests are answered by a `handler`; it has these attributes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "*")
        with Server(("127.0.0.1", 0), handler) as server:
            server.url, server.asked = f"http://127.0.0.1:{server.server_port}", []
            vars(server).update(attributes)
            threading.Thread(target=server.serve_forever, args=(0.01,)).start()
            yield server
            server.shutdown()


def random_strings(n, seed):
    """Mostly short ones, some around the longest that is allowed."""
    rng = random.Random(seed)
    for _ in range(n):
        length = rng.choice((rng.randint(0, 8), rng.randint(0, 40), rng.randint(0, 250)))
        yield "".join(rng.choices(rng.choice(ALPHABETS), k=length))


def seconds(function, *arguments):
    """Of this process, whatever else the machine does meanwhile."""
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


def turns(*contents):
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": content} for role, content in zip(roles, contents)]


def say(word, completion, **more):
    """A dialogue about a word."""
    return {"messages": turns(f"say {word}", completion), **more}


def some_prompts(lengths=(5, 9, 1, 7), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(250, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def slow_greedy(model, prompt, n, stop_ids=(), tools=None):
    """The obvious loop, the whole sequence anew for every token: (ids, which the model chose)."""
    ids, own, result = [], [], []
    for _ in range(n):
        own.append(not result)
        best = model(torch.tensor([prompt + ids]))[0, -1].argmax().item()
        ids.append(result.pop(0) if result else best)
        if own[-1] and tools and ids[-1] == tools.call_end:
            result = tools.respond(ids)
        if ids[-1] in stop_ids:
            break
    return ids, own


def watch_batches(monkeypatch):
    """Sizes of the batches of rows that are left when others have ended, from now on."""
    sizes, keep = [], Engine.keep
    monkeypatch.setattr(
        Engine, "keep", lambda self, rows: sizes.append(len(rows)) or keep(self, rows)
    )
    return sizes


def writer(tokenizer, *texts):
    """A GPT that continues each id as the texts do, whatever came before: the last id picks a row
    of the head.
    """
    V = tokenizer.vocab_size
    cfg = GPTConfig(
        vocab_size=V,
        hidden_size=V,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=96,
        tie_word_embeddings=False,
    )
    model = GPT(cfg).eval()  # whose branches are zero
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(V))
        model.lm_head.weight.zero_()
        for text in texts:
            ids = tokenizer.encode(text, special=True)
            for id, following in itertools.pairwise(ids):
                assert model.lm_head.weight[:, id].sum() == 0, "an id twice"
                model.lm_head.weight[following, id] = 10
    return model
