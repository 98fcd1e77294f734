"""A dialogue is cut between turns, never inside one; what is left out is counted."""

import pytest
import torch

from nanollm.batches import fit_chats, pack_chats
from nanollm.config import UserError
from nanollm.runtime import Runtime
from nanollm.tokenizer import Tokenizer

CPU = Runtime(torch.device("cpu"), torch.float32)


def render(messages):
    """Three tokens a turn, those of the assistant trained on."""
    roles = [message["role"] for message in messages for _ in range(3)]
    return list(range(len(roles))), [role == "assistant" for role in roles]


def dialogue(*roles):
    return {"messages": [{"role": role, "content": "hm"} for role in roles], "from": "a file"}


TWO = dialogue("user", "assistant", "user", "assistant")  # 12 tokens, 6 after the first answer
FIT = [(12, [4], 0), (11, [2], 1), (6, [2], 1), (5, [], 0)]


@pytest.mark.parametrize("T, turns, shortened", FIT)
def test_a_dialogue_is_cut_after_the_last_answer_that_fits(T, turns, shortened):
    kept, examples, count = fit_chats([TWO], T, render)
    assert [len(chat["messages"]) for chat in kept] == turns and count == shortened
    assert [len(ids) for ids, _ in examples] == [3 * n for n in turns]
    assert all(chat["from"] == "a file" for chat in kept) and len(TWO["messages"]) == 4


def test_a_question_without_an_answer_is_no_loss_to_a_dialogue():
    kept, _, shortened = fit_chats([dialogue("user", "assistant", "user")], 12, render)
    assert len(kept[0]["messages"]) == 2 and shortened == 0


def test_without_an_answer_that_is_trained_on_a_dialogue_is_dropped():
    def unmoved(messages):
        return render(messages)[0], [False] * 3 * len(messages)

    assert fit_chats([dialogue("user")], 12, render) == ([], [], 0)
    assert fit_chats([TWO], 12, unmoved) == ([], [], 0)


def test_what_was_cut_is_said(capsys):
    chats = [TWO, dialogue("user", "assistant"), dialogue("user", "user", "assistant")]
    rows = pack_chats(chats, Tokenizer.from_bytes(), 8, "training", CPU, render)
    assert len(rows) == 2 and rows.images is None
    assert capsys.readouterr().out == (
        "training: 2 dialogues in 2 rows of 8 tokens, 6 trained on; 1 shortened, 1 dropped because "
        "they were longer\n"
    )


def test_nothing_left_to_train_on_is_an_error():
    sentence = "none of the 1 held-out dialogues has an answer within 5 tokens; raise --context"
    with pytest.raises(UserError, match=sentence):
        pack_chats([TWO], Tokenizer.from_bytes(), 5, "held-out", CPU, render)
