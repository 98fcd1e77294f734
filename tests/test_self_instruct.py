"""Self-Instruct: ROUGE-L against a slow loop, what is kept of what a model writes, lessons."""

import random

import numpy as np
import pytest
import torch
from helpers import WORDS, turns

from nanollm import self_instruct
from nanollm.config import UserError
from nanollm.runtime import Runtime
from nanollm.self_instruct import lessons, rouge_l, write_prompts

GIVEN = [{"messages": turns(f"say {word}", "yes")} for word in WORDS]
RT = Runtime(torch.device("cpu"), torch.float32)


def slow_rouge_l(a, b):
    """By the recursion of Lin (2004), cell by cell."""
    lcs = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            lcs[i][j] = lcs[i - 1][j - 1] + 1 if x == y else max(lcs[i - 1][j], lcs[i][j - 1])
    return 2 * lcs[-1][-1] / (len(a) + len(b))


def numbers(text, known, most=16):
    ids = [known.setdefault(word, len(known)) for word in text.split()]
    return np.array(ids + [-1] * (most - len(ids)))


def test_rouge_l_equals_a_slow_loop():
    rng, known = random.Random(0), {}
    texts = [" ".join(rng.choices("abcde", k=rng.randint(1, 12))) for _ in range(60)]
    pool = np.array([numbers(text, known) for text in texts])
    for text in texts:
        expected = [slow_rouge_l(text.split(), other.split()) for other in texts]
        assert rouge_l(numbers(text, known), pool).tolist() == pytest.approx(expected)


def test_lessons_show_prompts_of_one_task_and_ask_for_another():
    others = [{"messages": turns(f"{n} + {n}?", "?"), "task": "sum"} for n in range(9)]
    made = lessons(GIVEN + others + GIVEN[:2])
    assert len(made) == 12 + 5  # as many as there are prompts beyond those that are shown
    for lesson in made:
        asked, new = (message["content"] for message in lesson["messages"])
        shown = asked.split("\n- ")[1:]
        assert len({*shown, new}) == 5 and len({"+" in prompt for prompt in [*shown, new]}) == 1


@pytest.fixture
def scripted(monkeypatch):
    """A model that writes the same each time, but for the number of the time."""
    seen = []

    def ask(rt, model, tokenizer, dialogues, max_new_tokens, seed):
        seen.append("".join(each["messages"][0]["content"] for each in dialogues))
        said = ["3. sing gnu", "- Sing, gnu!", "say owl", "", f"who is number {seed}?", "?"]
        said += ["猫在哪里", "猫在那里"]
        return [{"completion": text} for text in said]

    monkeypatch.setattr(self_instruct, "ask_teacher", ask)
    return seen


def written(number, **how):
    found = write_prompts(RT, None, None, GIVEN, number, **how)
    return [example["messages"][0]["content"] for example in found]


def test_new_prompts_are_kept_and_shown_later(scripted, capsys):
    first = ["sing gnu", "who is number 0?", "猫在哪里", "猫在那里"]
    assert written(200) == [*first, "who is number 1?"]  # at most four asks for each that is wanted
    assert len(scripted) == 2 and "sing gnu" in scripted[1] and "sing gnu" not in scripted[0]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == ["16", "5", "7", "4"]
    assert written(1) == ["sing gnu"] and written(2, seed=7)[1] == "who is number 7?"


def test_alike_is_what_shares_most_words_in_their_order(scripted, monkeypatch):
    monkeypatch.setattr(self_instruct, "ALIKE", 0.7)
    assert written(200) == ["sing gnu", "who is number 0?", "猫在哪里"]


def test_too_few_examples_are_refused():
    with pytest.raises(UserError, match="4 prompts are given"):
        write_prompts(RT, None, None, GIVEN[:4], 5)
