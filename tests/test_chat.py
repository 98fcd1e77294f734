"""Chat: what is a command, what is sent to the model, and what Ctrl-C stops."""

import io
from unittest.mock import Mock

import pytest
from helpers import Typed, refused

from nanollm import chat
from nanollm.gpt import GPT
from nanollm.hub import save_model


@pytest.fixture
def talk(random_model, tokenizer, tmp_path, monkeypatch):
    """talk(input, stdin, answers) is the prompts that the model was sent; an answer with ^C in it
    is stopped there.
    """
    folder = tmp_path / "model"
    save_model(random_model(max_position_embeddings=256), tokenizer, folder)

    def talk(text, stdin=Typed, answers=(), **settings):
        prompts, left = [], iter(answers)

        def stream(model, prompt, *rest, **how):
            prompts.append(tokenizer.decode(prompt))
            begun, stop, _ = next(left, "fine").partition("^C")
            yield from tokenizer.encode(begun)
            if stop:
                raise KeyboardInterrupt

        monkeypatch.setattr(chat, "stream", stream)
        monkeypatch.setattr("sys.stdin", stdin(text))
        chat.main(chat.Config(model=str(folder), max_new_tokens=4, dtype="fp32", **settings))
        return prompts

    talk.folder = str(folder)
    return talk


@pytest.mark.parametrize("stdin", [Typed, io.StringIO])
def test_commands_are_not_sent_to_the_model_which_is_merged_once(stdin, talk, capsys, monkeypatch):
    merged = Mock(side_effect=GPT.merged)
    monkeypatch.setattr(GPT, "merged", lambda model: merged(model))
    text = "one\n/help\ntwo\n /reset \nis /usr here?\n/usr/bin?\n/quit\nlost\n"
    prompts = talk(text, stdin, system="be kind")
    assert [prompt.count("<|user|>") for prompt in prompts] == [1, 2, 1, 2]
    assert all(prompt.startswith("<|system|>be kind<|end|>") for prompt in prompts)
    said = capsys.readouterr().out
    assert said.count("/reset       begin anew") == 1 and ("> " in said) == (stdin is Typed)
    assert not any(word in "".join(prompts) for word in ("/help", "/reset", "/quit", "lost"))
    assert merged.call_count == 1


def test_what_does_not_fit_any_more_is_left_out_and_a_longer_message_refused(talk, capsys):
    prompts = talk(f"{'a' * 150}\n{'b' * 150}\n{'c' * 300}\n")
    assert ["aa" in prompt for prompt in prompts] == [True, False] and "bb" in prompts[1]
    assert "shorten it" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["/hlep", "/exit now", "/", "/image", "/image "])
def test_an_unknown_command_is_named_and_ends_a_pipe(line, talk, capsys, monkeypatch):
    assert len(talk(f"{line}\none\n")) == 1  # somebody who types goes on
    command = line.split()[0]
    assert f"{command}: no such command" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{line}\none\n"))
    assert f"error: {command}: no such command" in refused(capsys, chat, talk.folder)


def test_quit_ends_and_an_empty_line_says_nothing(talk):
    assert len(talk("one\n\ntwo\n /quit \nthree\n")) == 2


def test_ctrl_c_stops_the_answer_which_stays_in_the_conversation_as_far_as_it_got(talk, capsys):
    first, second, third = talk("one\ntwo\nthree\n", Typed, ["half an^Cswer", "^C"])
    assert "half an\n" in capsys.readouterr().out
    assert "half an<|end|>" in second and "two" in second
    assert "half an<|end|>" in third and "three" in third
    assert "two" not in third  # stopped before its answer began


@pytest.mark.parametrize(
    "text, stdin, answer",
    [
        ("one\n^C\n", Typed, "half^C"),  # the second one, instead of a message
        ("one\ntwo\n", io.StringIO, "half^C"),
        ("one\ntwo\n", io.StringIO, "^C"),
    ],
)
def test_ctrl_c_ends_the_conversation_where_nothing_is_to_be_stopped(text, stdin, answer, talk):
    with pytest.raises(KeyboardInterrupt):
        talk(text, stdin, [answer])
