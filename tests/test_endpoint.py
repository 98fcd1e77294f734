"""Endpoints of OpenAI's kind, against a server on 127.0.0.1 that answers well, slowly, or lies."""

import json
import time

import pytest
import torch
from helpers import Answering, serving, turns

from nanollm import endpoint
from nanollm.config import UserError
from nanollm.distillation import ask_teacher
from nanollm.endpoint import Endpoint
from nanollm.runtime import Runtime

RT = Runtime(torch.device("cpu"), torch.float32)
KEY = "sk-secret"


class Handler(Answering):
    def do_GET(self):
        self.answer(b'{"data": [{"id": "owl-7b"}, {"id": "other"}]}')

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body, self.headers["Authorization"]))
        said = self.server.behave(self, body)
        if said is not None:
            self.answer(json.dumps(said).encode())


def choice(content, reason="stop", **more):
    message = {"role": "assistant", "content": content, **more}
    return {"choices": [{"index": 0, "message": message, "finish_reason": reason}]}


def shouts(handler, body):
    return choice(body["messages"][-1]["content"].upper())


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(Handler, behave=shouts) as server:
        server.url += "/v1"
        yield server


def test_each_prompt_is_completed_as_often_as_asked_in_order_and_with_the_key(server):
    examples = [{"messages": [*turns("a", "b", word)]} for word in ("owl", "fox", "hen")]
    examples[0]["messages"][1]["loss"] = False  # not for servers
    texts = Endpoint(server.url, 9).complete(RT, examples, 24, 2, 0.5, seed=3)
    assert texts == ["OWL", "OWL", "FOX", "FOX", "HEN", "HEN"]
    bodies = sorted((b["messages"][2]["content"], b["seed"]) for _, b, _ in server.asked)
    assert bodies == [(word, seed) for word in ("fox", "hen", "owl") for seed in (6, 7)]
    path, body, key = server.asked[0]
    assert path == "/v1/chat/completions" and key == f"Bearer {KEY}"
    assert body | {"seed": 6} == {
        "model": "owl-7b",
        "messages": turns("a", "b", body["messages"][2]["content"]),
        "max_tokens": 24,
        "temperature": 0.5,
        "seed": 6,
    }


def test_the_model_is_the_one_named_behind_the_address_and_no_key_is_sent_without_one(
    server, monkeypatch
):
    monkeypatch.delenv("OPENAI_API_KEY")
    Endpoint(f"{server.url}/#org/name", 9).complete(RT, [{"messages": turns("a")}], 8)
    [(path, body, key)] = server.asked
    assert (path, body["model"], key) == ("/v1/chat/completions", "org/name", None)


def test_what_does_not_end_is_counted_what_is_thought_is_kept_and_answers_are_checked(
    server, capsys
):
    said = iter(
        [choice("12"), choice("1", "length"), choice(None), choice("7", reasoning_content="3 + 4")]
    )
    server.behave = lambda handler, body: next(said)
    example = {"messages": turns("3 + 4?"), "answer": "7", "check": "number"}
    endpoint.AT_ONCE, before = 1, endpoint.AT_ONCE
    found = ask_teacher(RT, Endpoint(server.url, 9), None, [example], 8, 4)
    endpoint.AT_ONCE = before
    assert [(e["completion"], e["right"]) for e in found] == [
        ("12", False),
        ("", False),
        ("<think>3 + 4</think>7", True),
    ]
    assert "1 of 4 completions don't end within 8 tokens" in capsys.readouterr().out


def test_a_busy_server_is_asked_again(server):
    def busy(handler, body):
        return handler.answer(b"", 503) if len(server.asked) < 2 else shouts(handler, body)

    server.behave = busy
    assert Endpoint(server.url, 9).complete(RT, [{"messages": turns("a")}], 8) == ["A"]


def hangs(handler, body):
    time.sleep(3)


def breaks(handler, body):
    handler.connection.close()


def drips(handler, body):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(40):  # as long as somebody listens
        handler.wfile.write(b" ")
        time.sleep(0.1)


FAULTS = [
    (drips, "too slow"),
    (hangs, "TimeoutError timed out"),
    (breaks, "it has 0.5 s"),
    (lambda handler, body: handler.answer(b"no such model", 404), "404 b'no such model'"),
    (lambda handler, body: handler.send_error(401, f"not {KEY}"), "not ***"),
    (lambda handler, body: handler.answer(b"", 500), "500 b''"),
    (lambda handler, body: handler.answer(b"", 302, Location="/v1/x"), "owl-7b"),
    (lambda handler, body: handler.answer(b'{"choices": [', said=99), "choices"),
    (lambda handler, body: handler.answer(b"<html>hello</html>"), "<html>hello"),
    (lambda handler, body: handler.answer(b"\xff\xfe"), r"b'\xff\xfe'"),
    (lambda handler, body: handler.answer(b" " * 2**21 + b"{}"), "   "),
    (lambda handler, body: [1], "[1]"),
    (lambda handler, body: {"error": {"message": "no such model"}}, "no such model"),
    (lambda handler, body: {"choices": []}, "check the address, OPENAI_API_KEY"),
    (lambda handler, body: choice(7), "check the address, OPENAI_API_KEY"),
    (lambda handler, body: choice("half \ud800"), "check the address, OPENAI_API_KEY"),
    (lambda handler, body: {"error": body["messages"]}, "check the address, OPENAI_API_KEY"),
]


@pytest.mark.parametrize("behave, sentence", FAULTS)
def test_whatever_a_server_does_one_line_says_so(server, monkeypatch, behave, sentence):
    server.behave, begin = behave, time.monotonic()
    monkeypatch.setattr(endpoint, "MOST", 2**20)
    with pytest.raises(UserError) as error:
        Endpoint(server.url, 0.5).complete(RT, [{"messages": turns(KEY)}] * 20, 8)
    assert sentence in str(error.value) and KEY not in str(error.value)
    assert time.monotonic() - begin < 2


@pytest.mark.parametrize(
    "address, key, sentence",
    [
        ("http://me:word@host/v1", "", "set OPENAI_API_KEY"),
        ("http://host/v1?key=word", "", "set OPENAI_API_KEY"),
        ("http://127.0.0.1:1/v1", "\u2026", "codec can't encode"),
        ("http://127.0.0.1:1/v1", "", "refused"),
        ("http://[/v1", "", "ValueError"),
        ("file:///etc", "", "URLError"),
    ],
)
def test_addresses_and_keys_that_cannot_be_are_refused(address, key, sentence, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError) as error:
        Endpoint(address, 0.5).complete(RT, [{"messages": turns("a")}], 8)
    assert sentence in str(error.value) and "word" not in str(error.value)
