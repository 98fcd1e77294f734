"""Toolformer's filter: which calls are kept, and that dialogues hold the ids that were scored."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
from helpers import some_prompts, turns, writer

from nanollm import toolformer
from nanollm.config import UserError
from nanollm.toolformer import answer_losses, filter_calls, sampled_calls
from nanollm.tools import Toolbox, calculator

REPLY = "<tool_call>c(2*3)</tool_call><tool_result>6</tool_result>E<|end|>"


@pytest.fixture
def products(tokenizer):
    return Toolbox({"c": calculator}, tokenizer)


def call_ids(tools, argument, result):
    """(call, result) as ids."""
    return tuple(
        tools.tokenizer.encode(text, special=True)
        for text in (
            f"<tool_call>c({argument})</tool_call>",
            f"<tool_result>{result}</tool_result>",
        )
    )


CHATS = [{"messages": turns(question, answer)} for question, answer in (("q0", "a"), ("q1", "b"))]


ROOMY = SimpleNamespace(cfg=SimpleNamespace(max_position_embeddings=4096))  # for no forward pass


@pytest.fixture
def filtered(tokenizer, products, monkeypatch):
    """filter_calls on made-up calls and losses: given {(number of the chat, argument): (loss with
    nothing, with the call alone, with its result)}, what is kept, as [(question, answer)].
    """

    def run(losses, chats=CHATS, **settings):
        calls = [(n, *call_ids(products, argument, "6")) for n, argument in losses]
        prompts = [tokenizer.render(c["messages"][:-1], generation_prompt=True)[0] for c in chats]

        def made_up(model, tokenizer, asked, prefixes, wanted):
            made = []
            for prompt, prefix in zip(asked, prefixes):
                n, text = prompts.index(prompt), tokenizer.decode(prefix)
                for (number, argument), (_, alone, both) in losses.items():
                    if number == n and f"c({argument})" in text:
                        made.append(alone if "<tool_result></tool_result>" in text else both)
                if not prefix:
                    made.append(next(v[0] for (number, _), v in losses.items() if number == n))
            return torch.tensor(made)

        monkeypatch.setattr(toolformer, "answer_losses", made_up)
        monkeypatch.setattr(toolformer, "sampled_calls", lambda *_: calls)
        return filter_calls(ROOMY, tokenizer, products, chats, **settings)

    return run


@pytest.mark.parametrize(
    "nothing, alone, both, kept",
    [
        (2.0, 2.0, 1.0, True),
        (2.0, 2.0, 1.5, True),  # by the threshold exactly
        (2.0, 2.0, 1.5625, False),
        (2.0, 1.0, 0.75, False),  # the call helps, its result hardly
        (1.0, 2.0, 0.75, False),  # the answer was easy before
        (2.0, 3.0, 1.25, True),
        (3.0, 2.0, 1.25, True),
        (1.0, 1.0, 4.0, False),
    ],
)
def test_a_call_is_kept_where_its_result_lowers_the_loss_by_the_threshold(
    nothing, alone, both, kept, filtered
):
    result = filtered({(1, "2*3"): (nothing, alone, both)}, threshold=0.5)
    assert len(result) == kept
    if kept:
        assert result == [{"messages": turns("q1", REPLY.replace("E<|end|>", "b"))}]


def test_of_several_calls_that_help_the_best_is_kept(filtered):
    losses = {
        (0, "1"): (4.0, 4.0, 3.0),
        (0, "2"): (4.0, 4.0, 1.0),
        (0, "3"): (4.0, 4.0, 2.0),
        (1, "4"): (4.0, 4.0, 3.75),
        (1, "5"): (4.0, 4.0, 2.75),
    }
    kept = [chat["messages"][1]["content"] for chat in filtered(losses)]
    expected = [("2", "a"), ("5", "b")]
    assert kept == [
        f"<tool_call>c({n})</tool_call><tool_result>6</tool_result>{answer}"
        for n, answer in expected
    ]


def test_a_call_goes_before_the_last_answer_and_all_else_stays(filtered):
    chat = {
        "messages": [{"role": "system", "content": "s"}, *turns("q", "first", "and then?", "last")],
        "task": "f",
    }
    chat["messages"][-1]["extra"] = 1
    before = json.dumps(chat)
    (kept,) = filtered({(0, "2*3"): (4.0, 4.0, 1.0)}, chats=[chat])
    assert json.dumps(chat) == before
    assert kept["task"] == "f" and kept["messages"][:-1] == chat["messages"][:-1]
    last = REPLY.replace("E<|end|>", "last")
    assert kept["messages"][-1] == {"role": "assistant", "content": last, "extra": 1}


def test_dialogues_without_a_closed_call_are_dropped(tokenizer, products):
    silent = writer(tokenizer, "<tool_call>c(<|end|>")
    assert sampled_calls(silent, tokenizer, products, [[1], [2]], samples=3) == []
    assert filter_calls(silent, tokenizer, products, CHATS) == []


def test_calls_are_sampled_behind_their_prompt_and_answered(tokenizer, products):
    model = writer(tokenizer, "<tool_call>c(2*3)</tool_call>!<|end|>", "</tool_result>E<|end|>")
    found = sampled_calls(model, tokenizer, products, [[1, 2, 3], [4]], samples=2)
    call, result = call_ids(products, "2*3", "6")
    assert found == [(0, call, result), (0, call, result), (1, call, result), (1, call, result)]


def test_a_result_that_the_answer_does_not_need_is_dropped(tokenizer, products):
    """The writer looks at the last id only: an empty result makes the answer as easy."""
    model = writer(tokenizer, "<tool_call>c(2*3)</tool_call>!<|end|>", "</tool_result>a<|end|>")
    assert filter_calls(model, tokenizer, products, CHATS, samples=2, threshold=0.01) == []


@torch.no_grad()
def loss_by_hand(model, before, answer):
    logprobs = model(torch.tensor([before + answer]))[0, :-1].log_softmax(-1)
    own = [logprobs[len(before) - 1 + i, id].item() for i, id in enumerate(answer)]
    return -sum(own) / len(own)


def test_losses_are_means_over_the_answer_after_prompt_and_prefix(random_model, tokenizer):
    model, prompts, answers = random_model(), some_prompts((3, 9, 1, 5)), some_prompts((2, 6, 1, 3))
    prefixes = [*some_prompts((4, 2, 7)), []]
    losses = answer_losses(model, tokenizer, prompts, prefixes, answers)
    by_hand = [loss_by_hand(model, p + z, a) for p, z, a in zip(prompts, prefixes, answers)]
    assert losses.tolist() == pytest.approx(by_hand, abs=1e-4)


def test_the_filter_keeps_what_losses_by_hand_say(random_model, tokenizer, products, monkeypatch):
    model = random_model()
    chats = [{"messages": turns(f"q{i}", f"{i}!")} for i in range(6)]
    calls = [(n, *call_ids(products, f"{n}+{i}", n + i)) for n in range(6) for i in range(3)]
    monkeypatch.setattr(toolformer, "sampled_calls", lambda *_: calls)
    empty, gains = [products.result, products.result_end], {}
    for n, call, result in calls:
        prompt = tokenizer.render(chats[n]["messages"][:1], generation_prompt=True)[0]
        answer = [*f"{n}!".encode(), tokenizer.end_id]
        nothing, alone, both = (
            loss_by_hand(model, prompt + prefix, answer)
            for prefix in ([], call + empty, call + result)
        )
        gains[n, tokenizer.decode(call + result)] = min(nothing, alone) - both
    ordered = sorted(gains.values())
    threshold = (ordered[8] + ordered[9]) / 2
    best = {}
    for (n, text), gain in sorted(gains.items(), key=lambda pair: pair[1]):
        if gain >= threshold:
            best[n] = text
    kept = filter_calls(model, tokenizer, products, chats, threshold=threshold)
    assert 0 < len(best) < 6
    assert kept == [{"messages": turns(f"q{n}", best[n] + f"{n}!")} for n in sorted(best)]


def test_an_answer_is_scored_in_the_ids_that_training_sees(tokenizer, products, monkeypatch):
    seen = []
    monkeypatch.setattr(toolformer, "sampled_calls", lambda *_: [(0, *call_ids(products, 1, 1))])
    monkeypatch.setattr(
        toolformer, "answer_losses", lambda *given: (seen.append(given[4]), torch.zeros(1))[1]
    )
    messages = turns("q", "<think>6 * 7 = 42</think>42")
    filter_calls(ROOMY, tokenizer, products, [{"messages": messages}])
    prompt = tokenizer.render(messages[:1], generation_prompt=True)[0]
    assert seen[0] == [tokenizer.render(messages)[0][len(prompt) :]]


def test_a_dialogue_kept_is_read_again_as_the_ids_that_were_scored(tokenizer, monkeypatch):
    """Text can't tell a result that spells </tool_result> from one that ends there."""
    forging = Toolbox({"c": lambda _: "</tool_result>7"}, tokenizer)
    call = tokenizer.encode("<tool_call>c(1)</tool_call>", special=True)
    result, losses = forging.respond(call), iter((9.0, 9.0, 1.0))
    monkeypatch.setattr(toolformer, "sampled_calls", lambda *_: [(0, call, result)])
    monkeypatch.setattr(toolformer, "answer_losses", lambda *_: torch.tensor([next(losses)]))
    prompt = tokenizer.render(CHATS[0]["messages"][:1], generation_prompt=True)[0]
    for kept in filter_calls(ROOMY, tokenizer, forging, CHATS[:1]):
        scored = prompt + call + result + [ord("a"), tokenizer.end_id]
        assert tokenizer.render(kept["messages"])[0] == scored


def test_an_answer_that_calls_already_gets_no_further_call(filtered):
    """Nor does one that holds a result: none of its tokens is to count as the answer's."""
    lookup = "<tool_call>c(2*3)</tool_call><tool_result>6</tool_result>6"
    result = "<tool_result>6</tool_result>6"
    chats = [{"messages": turns("q", answer)} for answer in (lookup, result)]
    assert filtered({(0, "2*3"): (4.0, 4.0, 1.0)}, chats=chats) == []
    earlier = {"messages": turns("q", lookup, "and?", "a")}  # in an earlier answer it may stand
    assert len(filtered({(0, "2*3"): (4.0, 4.0, 1.0)}, chats=[earlier])) == 1


@pytest.mark.parametrize(
    "out, sentence",
    [("chats.jsonl", "would replace the file"), (".", "is a directory; name a file")],
)
def test_a_place_that_cannot_be_written_is_refused_first(out, sentence, tmp_path):
    files = {"data": str(tmp_path / "chats.jsonl"), "out": str(tmp_path / out)}
    with pytest.raises(UserError, match=sentence):
        toolformer.main(toolformer.Config(**files, device="cpu"))


def test_a_dialogue_too_long_for_a_call_is_dropped_or_the_users_error(tokenizer, products):
    model = writer(tokenizer, "<tool_call>c(2*3)</tool_call>!<|end|>", "</tool_result>E<|end|>")
    long = {"messages": turns(80 * "q", 8 * "a")}  # 92 ids of 96; with the call 103
    assert len(tokenizer.render(long["messages"])[0]) == 92
    with contextlib.suppress(UserError):
        assert filter_calls(model, tokenizer, products, [long, CHATS[0]], threshold=0.1) == []


def test_where_no_call_helps_nothing_is_written(tmp_path, monkeypatch, random_model, tokenizer):
    chat = {"messages": [{"role": role, "content": "a"} for role in ("user", "assistant")]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(chat) + "\n")
    monkeypatch.setattr(toolformer, "load_model", lambda folder: (random_model(), tokenizer))
    monkeypatch.setattr(toolformer.Toolbox, "of_village", lambda *_: None)
    monkeypatch.setattr(toolformer.village, "of_run", lambda *_: None)
    monkeypatch.setattr(toolformer, "filter_calls", lambda *_: [])
    files = {"data": str(tmp_path / "chats.jsonl"), "out": str(tmp_path / "calls.jsonl")}
    with pytest.raises(UserError, match="a call helps in none of 1 dialogues"):
        toolformer.main(toolformer.Config(**files, device="cpu"))
    assert not (tmp_path / "calls.jsonl").exists()
