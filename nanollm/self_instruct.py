"""Self-Instruct: a model writes new prompts after the example of given ones; what says the same as
another one is left out (Wang et al. 2022, arXiv:2212.10560).

    ROUGE-L(a, b) = 2 LCS(a, b) / (|a| + |b|)        words; LCS: the longest common subsequence

Differs from the paper: shown are three given prompts and one of the model's own, not 6 and 2; it
leaves out from a ROUGE-L of 0.7 on, but questions about the village often differ in a name alone.

A model as small as ours doesn't follow examples. Nor does its user's turn hold any prompts, which
Magpie samples (Xu et al. 2024, 2406.08464): none was trained on. So ours is taught by `lessons`.

Run     python train_sft.py --preset writer              # from runs/sft
        python distill.py --prompts runs/writer --out runs/self
Expect  of 5,379 prompts 4,000 are kept, many of them garbled; a student that learns from the labels
        alone (--method labels) is right in 58.2%, with the teacher's completions of its own prompts
        in 76.3%, of real ones in 93.2% (seed 0, fp32). What is missing are villagers whom no lesson
        names: 17 of the 4,000 ask about them; facts never asked 1.0%, 7.5%, 92.0%, others as good
"""

import random
import re
from collections import Counter, defaultdict

import numpy as np

from nanollm.distillation import ask_teacher
from nanollm.formats import need
from nanollm.metrics import table

ASK = "Write one more like these:\n"
SHOWN = 4  # prompts at a time
ROUND = 500  # prompts asked for before new ones are shown, too
PATIENCE = 4  # asks per prompt that is wanted
ALIKE = 0.9  # ROUGE-L
LONGEST = 64  # tokens of a new prompt, and words that are compared
WORD = re.compile(r"[\u2e80-\uffff]|[^\W\u2e80-\uffff]+")  # Chinese has no blanks


def questions(examples):
    """The different prompts that are a user's first turn."""
    turns = (example["messages"][0] for example in examples)
    return list(dict.fromkeys(turn["content"] for turn in turns if turn["role"] == "user"))


def asking(shown):
    """The dialogue in which a model is asked for one more prompt."""
    return [{"role": "user", "content": ASK + "\n".join(f"- {prompt}" for prompt in shown)}]


def lessons(chats):
    """Dialogues in which a model is asked for one more prompt of a task, and writes one."""
    by_task, made, rng = defaultdict(list), [], random.Random(0)
    for chat in chats:
        by_task[chat.get("task")].append(chat)
    for prompts in map(questions, by_task.values()):
        for _ in prompts[SHOWN:]:
            *shown, new = rng.sample(prompts, SHOWN + 1)
            made.append({"messages": [*asking(shown), {"role": "assistant", "content": new}]})
    return made


def rouge_l(text, texts):
    """ROUGE-L of a text (L,) with each of the others (N, L): words as numbers, padded with -1."""
    lcs = np.zeros((len(texts), texts.shape[1] + 1), int)  # with the first 0, 1, ... words of each
    for word in text[text >= 0]:
        longer = np.where(texts == word, lcs[:, :-1] + 1, lcs[:, 1:])
        lcs[:, 1:] = np.maximum.accumulate(longer, axis=1)
    return 2 * lcs[:, -1] / ((text >= 0).sum() + (texts >= 0).sum(1))


def write_prompts(rt, model, tokenizer, examples, number, seed=0):
    """Up to so many new prompts, {"messages"}, that a model or an Endpoint has written."""
    given, rng, numbers = questions(examples), random.Random(seed), {}
    need(len(given) > SHOWN, "self-instruct", f"{len(given)} prompts are given; give more")

    def read(text):
        words = WORD.findall(text.lower())[:LONGEST]
        known = [numbers.setdefault(word, len(numbers)) for word in words]
        return np.array(known + [-1] * (LONGEST - len(known)))

    pool, new, counts = np.array([read(prompt) for prompt in given]), [], Counter()
    for turn in range(-(-PATIENCE * number // ROUND)):
        some = [rng.sample(given, SHOWN - 1) + [rng.choice(new or given)] for _ in range(ROUND)]
        asks = [{"messages": asking(shown)} for shown in some]
        for written in ask_teacher(rt, model, tokenizer, asks, LONGEST, seed=seed + turn):
            text = re.sub(r"^\s*([-*]|\d+[.)])\s+", "", written["completion"]).strip()
            words = read(text)
            if words[0] < 0 or rouge_l(words, pool).max() >= ALIKE:
                counts["like one that is known" if words[0] >= 0 else "empty"] += 1
            elif len(new) < number:
                counts["kept"] += 1
                pool = np.vstack((pool, words))
                new.append(text)
        if len(new) == number:
            break
    rt.print(table(["prompts written", f"{counts.total():,}"], counts.items()))
    return [{"messages": [{"role": "user", "content": text}]} for text in new]
