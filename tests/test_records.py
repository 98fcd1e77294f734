"""Records as people publish them, and what becomes of each: the text that is read and, in brackets,
what is trained on; or the reason for which it is dropped, or refused.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import turns

import distill
import train_dpo
import train_grpo
import train_ppo
import train_sft
import train_vlm
from nanollm.batches import pack_chats
from nanollm.config import UserError
from nanollm.distillation import read_completions, tokenize
from nanollm.formats import read_documents, write_jsonl
from nanollm.preferences import completion_rows, load_preferences
from nanollm.records import (
    read_captions,
    read_chats,
    read_examples,
    read_image_chats,
    read_preferences,
    read_prompts,
)
from nanollm.runtime import Runtime

CPU = Runtime(torch.device("cpu"), torch.float32)
SHARED = Path(__file__).parents[2] / "shared"


def marked(tokenizer, ids, mask):
    """The text of these ids, the trained ones in brackets, by the first letters of the roles."""
    text, before = "", False
    for token, trained in [*zip(ids, mask), (None, False)]:
        text += "[" * (trained and not before) + "]" * (before and not trained)
        text += "" if token is None else tokenizer.decode([token])
        before = trained
    for role in ("system", "user", "assistant", "tool"):
        text = text.replace(f"<|{role}|>", f" {role[0].upper()} ")
    return text.replace("<|end|>", ".").strip()


def as_chat(record, tokenizer):
    return marked(tokenizer, *tokenizer.render(record["messages"]))


def as_preference(record, tokenizer):
    _, rows, _ = completion_rows([record], tokenizer)
    first = marked(tokenizer, rows.tokens[0][rows.real[0]], rows.mask[0][rows.real[0]])
    others = [f" | {text}" for text in record["completions"][1:]]
    note = [f" {record[key]}" for key in ("margin", "label") if record.get(key) is not None]
    return first + "".join(others + note)


def as_prompt(record, tokenizer):
    text = as_chat(record, tokenizer)
    return f"{text} -> {record['check']} {record['answer']}" if "answer" in record else text


def as_images(record, tokenizer):
    said = record["caption"] if "caption" in record else as_chat(record, tokenizer)
    images = record["images"] if "images" in record else [record["image"]]
    return said + "".join(f" ({Path(image).name})" for image in images)


def as_completion(record, tokenizer):
    if "completion" not in record:
        return as_prompt(record, tokenizer)
    [(prompt, ids, _)] = tokenize([record], True, tokenizer, 512)
    return marked(tokenizer, prompt + ids, [False] * len(prompt) + [True] * len(ids))


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def hh(*contents):
    whos = ("\n\nHuman: ", "\n\nAssistant: ") * len(contents)
    return "".join(who + text for who, text in zip(whos, contents))


def chat(*messages, **more):
    return {"messages": list(messages), **more}


def sharegpt(*turns, **more):
    return {"conversations": [{"from": who, "value": text} for who, text in turns], **more}


U, A = said("user", "Hi"), said("assistant", "Yo")
S, T = said("system", "Be"), said("tool", "4")
CALL = {"function": {"name": "add", "arguments": '{"x": "1+2"}'}, "type": "function", "id": "c1"}
HI = "U Hi. A [Yo.]"
PART, PAINTED = {"type": "text", "text": "Hi"}, {"type": "image_url", "image_url": {"url": "a.png"}}
CALLED = "A [<tool_call>add(1+2)</tool_call>.] T 4. A [Yo.]"
# ScienceQA's, of which many have no image, no hint or no lecture
SCIENCE = {"question": "Hi", "choices": ["a cow", "a cat"], "answer": 1, "hint": "", "image": None}
SCIENCE |= {"task": "closed choice", "grade": "grade2", "subject": "natural science"}
SCIENCE |= {"topic": "biology", "category": "Pets", "skill": "Identify pets"}
SCIENCE |= {"lecture": "Cats purr.", "solution": "It purrs.\n"}
LETTERED = "Hi\nA. a cow\nB. a cat\nAnswer with the letter of the right choice."
ALPACA, PAIR = {"instruction": "Hi", "output": "Yo"}, {"prompt": "Hi", "completion": "Yo"}
THINK = "U Hi. A [<think>hm</think>Yo.]"

IGNORED = "would be ignored: say it in a message"

CHATS = [
    # shapes
    (chat(U, A), HI),
    (sharegpt(("human", "Hi"), ("gpt", "Yo")), HI),
    (chat({"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}), HI),
    (chat(U, completion="Yo"), HI),
    (ALPACA, HI),
    (ALPACA | {"input": "now", "question": "Ho"}, "U Hi\n\nHo\n\nnow. A [Yo.]"),
    (ALPACA | {"prompt": "### Instruction: Hi"}, HI),
    (PAIR, HI),
    ({"prompt": [S, U], "completion": [A]}, "S Be. U Hi. A [Yo.]"),
    (PAIR | {"label": 0}, "dropped: its label says that it isn't wanted"),
    (chat(U, A, id=7, source="x", score=0.5, category="y"), HI),
    ({}, 'refused: it needs "messages", a list of {"role", "content"}, or a "prompt"'),
    ({"text": "Hi", "meta": 1}, "refused: it has 'text', 'meta'"),
    ({"messages": "hi"}, "refused: \"messages\" must be a list, not 'hi'"),
    ({"conversations": []}, "dropped: there are no messages"),
    ({"system_prompt": "Be", "question": "Hi", "response": "Yo", "id": "x"}, "S Be. U Hi. A [Yo.]"),
    ({"question": "Hi", "answer": "Yo", "solution": "So."}, HI),
    ({"question": "Hi", "answer": "48/2 = <<48/2=24>>24\n#### 1,072"},
     "U Hi. A [<think>48/2 = 24</think>1072.]"),
    ({"question": "Hi", "answer": "#### So"}, "U Hi. A [#### So.]"),  # a heading
    (SCIENCE, f"U {LETTERED}. A [<think>Cats purr.\nIt purrs.</think>The answer is B..]"),
    (SCIENCE | {"lecture": None}, f"U {LETTERED}. A [<think>It purrs.</think>The answer is B..]"),
    (SCIENCE | {"lecture": "", "solution": ""}, f"U {LETTERED}. A [The answer is B..]"),
    (SCIENCE | {"answer": None}, "dropped: no answer"),
    (SCIENCE | {"answer": 2}, "refused: the answer 2 is none of the 2 choices"),
    (SCIENCE | {"image": "a.png"}, "refused: its image would be ignored"),
    # one thing by two names
    (ALPACA | {"response": "No"}, "refused: \"completion\" is said twice: 'Yo' and 'No'"),
    (ALPACA | {"response": "", "completion": "Yo"}, HI),
    (chat(U | {"from": "gpt"}, A), "refused: message 0: \"role\" is said twice: 'user' and 'gpt'"),
    # null is absent, and an empty answer
    (chat(U, A, prompt=None, tools=None, image=None, weight=None), HI),
    *((record | {key: None}, "dropped: an answer is empty") for record, key in (
        (ALPACA, "output"), (PAIR, "completion"), ({"question": "Hi"}, "answer"))),
    # what stands beside them
    *((record | {key: "now"}, "U now\n\nHi. A [Yo.]") for key in ("context", "passage", "story")
      for record in (PAIR, {"question": "Hi", "answer": "Yo"})),
    *((record, f'refused: "{key}" {IGNORED}') for key, record in (
        ("input", ALPACA | {"input": {"x": 1}}), ("context", chat(U, A, passage="now")),
        ("input", sharegpt(("human", "Hi"), input="Ho")), ("question", PAIR | {"question": "Ho"}),
        ("context", {"prompt": [U], "completion": "Yo", "context": "now"}),
        ("instruction", chat(U, A, instruction="now")), ("documents", PAIR | {"documents": "now"}),
        ("reasoning_content", chat(U, A, reasoning="now")), ("completion", chat(U, A, output="No")),
        ("tools", chat(U, A, tools=[{"x": 1}])), ("tools", chat(S | {"tools": "add"}, U, A)),
        ("system", chat(S, U, A, system="No")), ("audio", chat(U, A | {"audio": {"id": "x"}})),
        ("mask", chat(U, A, mask=[0, 1])), ("mask", chat(U, A | {"mask": True})),
        ("masked", chat(U, A | {"masked": 0})), ("images", chat(U | {"image": "a.png"}, A)),
        ("function_call", chat(U, said("assistant", None, function_call=CALL["function"]))))),
    (chat(U, A, context="Hi", instruction="Hi", tools="[]", documents=[]), HI),
    *((record | {key: "hm"}, THINK) for record in (ALPACA, PAIR)
      for key in ("reasoning", "reasoning_content", "thinking")),
    (PAIR | {"completion": "<think>hm</think>Yo", "reasoning": "hm"}, THINK),
    (chat(S, U, A, system="Be"), "S Be. U Hi. A [Yo.]"),
    (ALPACA | {"system": ["Be"]}, 'refused: "system" must be text'),
    (ALPACA | {"system": "Be", "history": [["a", "b"]]}, "S Be. U a. A [b.] U Hi. A [Yo.]"),
    (chat(S, U, A, history=[["a", "b"]]), "S Be. U a. A [b.] U Hi. A [Yo.]"),
    *((ALPACA | {"history": bad}, 'refused: "history" must be a list') for bad in ("a: b", [U])),
    # roles and contents
    (chat(said("developer", "Be"), U, A), "S Be. U Hi. A [Yo.]"),
    (sharegpt(("human", "Hi"), ("gpt", "Yo"), ("observation", "4")), "U Hi. A [Yo.] T 4."),
    *((chat(bad, A), "refused: message 0: no role, of system, user,")
      for bad in (said("bot", "Hi"), said(["user"], "Hi"), {"content": "Hi"}, "Hi")),
    (chat(said("user", [PART, PART]), said("assistant", [PART])), "U HiHi. A [Hi.]"),
    (chat(said("user", [PAINTED, PART]), A), "refused: message 0: a part is neither text nor an"),
    (chat(said("user", 5), A), 'refused: message 0: it has no text as "content"'),
    (chat(U, A | {"audio": None, "refusal": None, "name": "Bo"}), HI),
    # thoughts and calls
    (chat(U, A | {"reasoning_content": "hm"}), THINK),
    (chat(U, A | {"reasoning_content": ["hm"]}), 'refused: "reasoning_content" must be text'),
    (chat(U | {"reasoning_content": "hm"}, A), "refused: only the assistant thinks"),
    (chat(U, said("assistant", None, tool_calls=[CALL]), T, A), "U Hi. " + CALLED),
    (chat(U, A | {"tool_calls": "add"}), 'refused: "tool_calls" must be a list'),
    # what is learnt
    *((chat(U, A | {key: no}, U, A), "U Hi. A Yo. U Hi. A [Yo.]")
      for key, no in {"loss": 0.0, "train": False, "weight": 0, "training": "False",
                      "loss_mask": 0, "trainable": False, "train_on_turn": False}.items()),
    *((chat(U, A | {"loss": yes}), HI) for yes in (True, 1, "true", None)),
    (chat(U | {"loss": False}, A), HI),
    (chat(U, A | {"weight": 0.5}), 'refused: "loss" must be true or false, not 0.5'),
    (chat(U | {"train": True}, A), "refused: and is learnt from"),
    ({"conversations": [U, *({"from": "gpt", "value": "Yo", "loss": no} for no in (False, True))]},
     "U Hi. A Yo. A [Yo.]"),
    *((record, "dropped: no answer that is trained on")
      for record in (chat(U, A, weight=0), chat(U, A | {"loss": False}))),
    *((record, "dropped: no answer") for record in (chat(U), {"prompt": "Hi"})),
    (chat(U, said("assistant", "", loss=False), U, A), "U Hi. A . U Hi. A [Yo.]"),
    # a text that spells a marker
    (chat(said("user", "<think>Hi"), A), "U <think>Hi. A [Yo.]"),
]  # fmt: skip

TWO = {"prompt": "Hi", "chosen": "Yo", "rejected": "No"}
BEST = "U Hi. A [Yo.] | No"
LABELLED = {"prompt": "Hi", "a": "Yo", "b": "No", "label": "a"}
SCORES = {"score_chosen": 8, "score_rejected": 6.5}
WHOLE = {"chosen": [U, A], "rejected": [U, said("assistant", "No")]}
PREFERENCES = [
    (TWO, BEST),
    (sharegpt(("human", "Hi"), chosen={"from": "gpt", "value": "Yo"}, rejected="No"), BEST),
    (TWO | {"prompt": [U], "chosen": [A]}, BEST),
    (chat(U, A, U, chosen="Yo", rejected="No"), "U Hi. A Yo. U Hi. A [Yo.] | No"),
    ({"prompt": "Hi", "ranking": ["Yo", " def f():\n", "No"]}, "U Hi. A [Yo.] |  def f():\n | No"),
    (TWO | {"task": "x", "gold": [1, 2], "ratings": [1.5, 0]}, BEST),
    *((TWO | {"ratings": bad}, "refused: a number") for bad in ([1], ["x", 1])),
    *((TWO | {"margin": margin}, f"{BEST} {float(margin)}") for margin in (0, 2, "2")),
    *((TWO | {"margin": bad}, "refused: a margin, score or rating must be a number")
      for bad in (10**400, "two", [2])),
    (TWO | {"margin": "", "score_chosen": "8", "score_rejected": "6.5"}, BEST + " 1.5"),
    *((TWO | worse, "dropped: the rejected completion has the higher score")
      for worse in ({"margin": -1}, SCORES | {"score_chosen": 1}, {"margin": float("nan")})),
    (TWO | {"context": "now"}, "U now\n\nHi. A [Yo.] | No"),
    (TWO | {"documents": "now"}, f'refused: "documents" {IGNORED}'),
    ({"chosen": hh("Hi", "Yo"), "rejected": hh("Hi", "No")}, BEST),
    ({"chosen": hh("Hi", "Yo", "One\n\ntwo\nHuman: 3", "A\n\nB"),
      "rejected": hh("Hi", "Yo", "One\n\ntwo\nHuman: 3", "Human: B")},
     "U Hi. A Yo. U One\n\ntwo\nHuman: 3. A [A\n\nB.] | Human: B"),
    ({"prompt": hh("Hi", ""), "response": "Yo", "chosen": " Yo", "rejected": " No"}, BEST),
    *(({"prompt": asked, "chosen": hh("Hi", "Yo"), "rejected": hh("Hi", "No")}, BEST)
      for asked in ("Hi", hh("Hi", ""))),
    *(({"prompt": "Ho"} | pair, "refused: don't answer the prompt that stands beside them")
      for pair in ({"chosen": hh("Hi", "Yo"), "rejected": hh("Hi", "No")}, WHOLE)),
    ({"context": "now", "chosen": hh("Hi", "Yo"), "rejected": hh("Hi", "No")},
     f'refused: "context" {IGNORED}'),
    *(({"chosen": text, "rejected": "c"}, 'refused: it needs "messages"')
      for text in ("b", "So" + hh("Hi", "Yo"))),
    ({"prompt": "Hi", "chosen": "Yo"}, 'refused: it needs "chosen" and "rejected", a "ranking"'),
    *((TWO | {"rejected": bad}, "refused: message 0: it has no text")
      for bad in (5, [{"role": "user"}])),
    (TWO | {"rejected": None}, "dropped: a completion is empty"),
    (TWO | {"rejected": []}, "dropped: must end with the assistant's answer"),
    # UltraFeedback
    (WHOLE | {"prompt": "Hi", "messages": [U, A]} | SCORES, BEST + " 1.5"),
    (TWO | {"chosen": [A | {"reasoning_content": "hm"}]}, "refused: without reasoning_content"),
    (TWO | {"image": "a.png"}, "refused: its image would be ignored"),
    (TWO | {"chosen": "No\n"}, "dropped: two completions are equal"),
    (TWO | {"prompt": ""}, "dropped: the prompt is empty"),
    ({"prompt": "Hi", "ranking": ["Yo"]}, "dropped: two completions or more, not 1"),
    (WHOLE | {"chosen": [said("user", "Ho"), A]}, "dropped: answer different prompts"),
    (WHOLE | {"chosen": [U, A, U]}, "dropped: must end with the assistant's answer"),
    # KTO
    (PAIR | {"label": True}, "U Hi. A [Yo.] True"),
    (PAIR | {"label": "false", "system": "Be"}, "S Be. U Hi. A [Yo.] False"),
    (PAIR | {"label": "so"}, 'refused: "label" must be true or false'),
    # labels
    (LABELLED, BEST + " a"),
    ({"prompt": "Hi", "a": "No", "b": "Yo", "label": " B "}, BEST + " b"),
    (chat(S, U, a="Yo", b="No", label="a"), "S Be. U Hi. A [Yo.] | No a"),
    ({"a": hh("Hi", "No"), "b": hh("Hi", "Yo"), "label": "b"}, BEST + " b"),
    *((LABELLED | {"label": bad}, 'refused: "label" must be "a", "b" or "tie"')
      for bad in (0, 1, "1", True, ["a"])),
    (LABELLED | {"label": "tie"}, "dropped: labelled a tie"),
    (LABELLED | {"label": None}, 'refused: or "a", "b" and a "label"'),
    (LABELLED | {"a": None}, "dropped: a completion is empty"),
    (LABELLED | {"ratings": [1, 2]}, 'refused: are of a "ranking", the best first'),
]  # fmt: skip

PROMPTS = [
    ({"prompt": "Hi"}, "U Hi."),
    ({"prompt": "Hi", "system": "Be", "history": [["a", "b"]]}, "S Be. U a. A [b.] U Hi."),
    *((record, "U Hi.") for record in (PAIR, ALPACA, LABELLED, chat(U, A, A))),
    (TWO | {"answer": "Yo"}, "U Hi. -> contains Yo"),
    ({"chosen": hh("Hi", "Yo"), "rejected": hh("Hi", "No")}, "U Hi."),
    (chat(S, U, A), "S Be. U Hi."),
    ({"prompt": hh("a", "b", "Hi", "")}, "U a. A [b.] U Hi."),
    (chat(A), "dropped: the prompt is empty"),
    ({}, 'refused: it needs "messages"'),
    # answers
    ({"prompt": "Hi", "answer": None}, "U Hi."),
    *(({"prompt": "Hi", "answer": given}, f"U Hi. -> number {read}")
      for given, read in ((0, "0"), ("-3", "-3"), (" 0.5 ", "0.5"), ("1,072", "1072"))),
    ({"question": "Hi", "reasoning": "hm", "answer": "7"}, "U Hi. -> number 7"),
    ({"instruction": "Say", "context": "now", "question": "Hi", "options": ["a", "b"], "answer": 1},
     "U Say\n\nHi\nA. a\nB. b\nAnswer with the letter of the right choice.\n\nnow. -> choice B"),
    *(({"prompt": "Hi", "answer": text}, "U Hi. -> choice B") for text in ("B", " (b) ", "b.")),
    *(({"prompt": "Hi", "answer": text}, f"U Hi. -> contains {text.strip()}")
      for text in (" a goat\n", "1,2,3", ",", "7 goats")),
    ({"prompt": "Hi", "answer": 62, "check": "exact"}, "U Hi. -> exact 62"),
    *(({"prompt": "Hi", "answer": bad}, 'refused: "answer" must be text or a number')
      for bad in (["7"], True)),
    ({"prompt": "Hi", "answer": "so", "check": "number"}, "refused: must be a number, not 'so'"),
    *(({"prompt": "Hi", "answer": "b", "check": bad}, f"refused: unknown check {bad!r}")
      for bad in ("regex", [])),
    *(({"prompt": "Hi", "answer": "b", "not": bad}, 'refused: "not" must be a list')
      for bad in (5, [5], "banana", ["c", ""])),
    ({"question": "Hi", "answer": "3 + 4 = <<3+4=7>>7\n#### 1,072", "system": "Be"},
     "S Be. U Hi. -> number 1072"),
]  # fmt: skip
EXAMPLES = [
    ({"prompt": "Hi", "answer": "7"}, "U Hi. -> number 7"),
    (SCIENCE, f"U {LETTERED}. -> choice B"),
    ({"prompt": "Hi"}, 'dropped: needs an "answer"'),
]
SHOWN = chat(*turns("<image>Hi", "Yo"), image="a.png")
IMAGE_CHATS = [
    (SHOWN, "U <image>Hi. A [Yo.] (a.png)"),
    (chat(said("user", [PAINTED, PART]), A, images=["a.png"]), "U <image>Hi. A [Yo.] (a.png)"),
    (chat(U, A), HI),
    (
        SCIENCE | {"image": "a.png", "hint": "Look."},
        f"U <image>\nLook.\n{LETTERED}. A [<think>Cats purr.\nIt purrs.</think>The answer is B..]"
        " (a.png)",
    ),
    (chat(said("user", [PAINTED, PAINTED]), A, image="a.png"), "refused: an image of the record's"),
    (SHOWN | {"images": ["b.png"]}, 'refused: "images" is said twice'),
    (SHOWN | {"image": "b.png"}, "refused: b.png does not exist"),
    (SHOWN | {"image": None}, "refused: 1 times <image>, but 0 images"),
    (chat(U, said("assistant", "<image>"), image="a.png"), "refused: only users show images"),
]
CAPTIONS = [
    (SHOWN, "Yo (a.png)"),
    ({"image": "a.png", "caption": "A dog."}, "A dog. (a.png)"),
    ({"image": "a.png", "caption": " "}, "dropped: the caption is empty"),
    ({"caption": "A dog."}, "refused: a caption belongs to one image, not to 0"),
    (chat(said("user", "<image>"), image="a.png"), 'refused: a "caption" is wanted, as text'),
]
COMPLETIONS = [
    (chat(U, A), HI),
    (PAIR, HI),
    (chat(U, said("assistant", "<think>hm</think>Yo")), THINK),
    (chat(U, A, U, A | {"loss": False}), "U Hi. A [Yo.] U Hi."),  # a prompt, as chats read it
    (chat(U, A | {"reasoning_content": "hm"}), "refused: without reasoning_content"),
    (chat(U, said("assistant", " ")), "dropped: an answer is empty"),
    ({"question": "Hi", "answer": "3 + 4\n#### 7"}, "U Hi. -> number 7"),
]
READERS = [
    (read_chats, as_chat, {"messages": [U, A]}, CHATS),
    (read_preferences, as_preference, TWO, PREFERENCES),
    (read_prompts, as_prompt, {"prompt": "Hi"}, PROMPTS),
    (read_examples, as_prompt, {"prompt": "Hi", "answer": "7"}, EXAMPLES),
    (read_completions, as_completion, PAIR, COMPLETIONS),
    (read_image_chats, as_images, SHOWN, IMAGE_CHATS),
    (read_prompts, as_images, SHOWN, [(SHOWN, "U <image>Hi. (a.png)"), IMAGE_CHATS[4]]),
    (read_captions, as_images, SHOWN, CAPTIONS),
]


@pytest.mark.parametrize(
    "read, shown, good, record, outcome",
    [(*reader, *row) for *reader, rows in READERS for row in rows],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""),
)
def test_what_becomes_of_a_record(read, shown, good, record, outcome, tokenizer, tmp_path, capsys):
    path, (kind, _, words) = tmp_path / "a.jsonl", outcome.partition(": ")
    (tmp_path / "a.png").write_bytes(b"")
    write_jsonl(path, [good, record, good])
    if kind == "refused":
        with pytest.raises(UserError) as caught:
            read(path)
        sentence = str(caught.value)
        assert sentence.startswith(f"{path}, line 2: ") and words in sentence
        assert "\n" not in sentence and len(sentence) < 2 * len(str(path)) + 200
        return
    found = read(path)
    assert [found[0].where, found[-1].where] == [f"{path}, line {n}" for n in (1, 3)]
    out = capsys.readouterr().out
    if kind == "dropped":
        assert len(found) == 2 and words in out and "1 of 3 records" in out and "line 2" in out
    else:
        assert len(found) == 3 and not out and shown(found[1], tokenizer) == outcome


def test_other_keys_are_kept_and_an_example_has_a_task(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [ALPACA | {"kind": "x", "prompt": "y", "answer": "7"}])
    [chats] = read_chats(tmp_path / "a.jsonl")
    [example] = read_examples(tmp_path / "a.jsonl")
    assert chats == {"messages": turns("Hi", "Yo"), "kind": "x", "prompt": "y", "answer": "7"}
    assert (example["task"], example["kind"]) == ("all", "x")


def test_a_file_of_which_most_is_unusable_is_refused_with_the_reasons(tmp_path):
    path, empty = tmp_path / "a.jsonl", chat(U, said("assistant", ""))
    write_jsonl(path, [chat(U, A), empty, chat(U), empty, empty, chat(U, A), empty])
    said_of_it = (
        f"{path}: 5 of 7 records can't be used: an answer is empty (4: line 2, line 4, line 5, ...)"
        "; no answer (1: line 3): mend or drop them"
    )
    with pytest.raises(UserError) as caught:
        read_chats(path)
    assert str(caught.value) == said_of_it


# --- the real samples ----------------------------------------------------------------------------


def sample(name):
    if not (SHARED / "data" / name).exists():
        pytest.skip("the real samples are not here")
    return SHARED / "data" / name


def test_of_the_real_hh_rlhf_pairs_nine_are_dropped_and_the_others_split_into_turns(capsys):
    read = read_preferences(sample("hh_harmless_test.jsonl.gz"))
    assert len(read) == 2303 and all(len(r["completions"]) == 2 for r in read)
    assert all(r["messages"][-1]["role"] == "user" for r in read)
    assert capsys.readouterr().out.endswith(
        "9 of 2,312 records can't be used: a completion is empty (4: line 87, line 517, line 926, "
        "...); chosen and rejected answer different prompts (5: line 1255, line 1689, line 1951, "
        "...); dropped\n"
    )


def test_every_real_gsm8k_record_is_a_chat_and_a_problem():
    chats, problems = (read(sample("gsm8k/test.jsonl")) for read in (read_chats, read_prompts))
    assert len(chats) == len(problems) == 1319
    for chat, problem in zip(chats, problems):
        asked, answer = chat["messages"]
        assert [asked] == problem["messages"] and answer["content"] == problem["answer"]
        assert answer["reasoning_content"] and "<<" not in answer["reasoning_content"]


def test_the_real_alpaca_instructions_are_chats_and_prompts():
    prompts, chats = (read(sample("instructions.json")) for read in (read_prompts, read_chats))
    assert chats and [p["messages"] for p in prompts] == [c["messages"][:-1] for c in chats]
    assert read_documents(sample("tinystories.txt"))


# --- scripts -------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path):
    def make(*records):
        write_jsonl(tmp_path / "data.jsonl", records)
        return str(tmp_path / "data.jsonl")

    return make


PROBLEM = {"prompt": "Hi", "answer": "7"}
NEEDS, ASKED = 'needs an "answer"', {"prompt": "Hi"}
LOADERS = [  # (script, its loader, flags, a good record, one that can't be used, the reason)
    (train_sft, "load_chats", {}, chat(U, A), chat(U), "no answer"),
    (train_ppo, "load_prompts", {}, TWO, TWO | {"prompt": ""}, "empty"),
    (train_ppo, "load_prompts", {"reward": "rules"}, PROBLEM, ASKED, NEEDS),
    (train_grpo, "load_problems", {}, PROBLEM, ASKED, NEEDS),
    (distill, "load_examples", {}, PAIR, PAIR | {"completion": ""}, "empty"),
]


@pytest.mark.parametrize("script, name, flags, good, bad, reason", LOADERS)
def test_every_script_drops_what_it_cannot_use_and_refuses_what_is_no_record(
    script, name, flags, good, bad, reason, write, capsys
):
    def load(*records):
        getattr(script, name)(script.Config(data=write(*records), **flags))

    load(good, bad, good)
    assert "1 of 3 records can't be used: " in (out := capsys.readouterr().out) and reason in out
    for records, words in (
        ([good, good, {"x": 1}], "line 3: "),
        ([good, bad, bad], "2 of 3 records can't be used"),
        ([good], "1 records leave none to train on, or none to hold out"),
    ):
        with pytest.raises(UserError, match=words):
            load(*records)


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_rankings_that_are_too_long_are_dropped_with_their_line(
    loss, write, tokenizer, random_model, capsys
):
    path = write(TWO, TWO | {"rejected": "o" * 60}, TWO, TWO)
    cfg = train_dpo.Config(data=path, val_fraction=0.25, loss=loss)
    train, val = load_preferences(cfg, random_model(), tokenizer, CPU, None, None)
    assert (len(train[0]), len(val[0])) == (2, 1)
    assert f"longer than the model's 64 tokens (1: {path}, line 2)" in capsys.readouterr().out


def test_completions_with_a_label_are_paired_by_it_for_kto(write, tokenizer, random_model):
    labelled = [PAIR | {"label": n == 1} for n in range(4)]
    cfg = train_dpo.Config(data=write(*labelled, *labelled), val_fraction=0.5, loss="kto")
    model = random_model()
    train, _ = load_preferences(cfg, model, tokenizer, CPU, None, None)
    pairs = train_dpo.open_pairs(cfg, model, *train)
    assert pairs.index.tolist() == [[1, 0], [1, 2], [1, 3]]
    assert len(pairs.mismatched) == len(pairs.rows) == 4
    with pytest.raises(UserError, match="line 1: one completion and its label are for --loss kto"):
        load_preferences(replace(cfg, loss="ipo"), model, tokenizer, CPU, None, None)
    with pytest.raises(UserError, match="both true and false"):
        train_dpo.open_pairs(cfg, model, train[0][:1], *train[1:])


def test_labels_of_the_same_two_completions_count_as_the_majority_has_them(write, capsys):
    swapped = {"prompt": "Hi", "a": "No", "b": "Yo"}
    other, tied = LABELLED | {"prompt": "Ho"}, LABELLED | {"prompt": "Ha"}
    records = [LABELLED | {"label": "b", "by": 0}, other, swapped | {"label": "b", "by": 1}]
    records += [TWO, tied, tied | {"label": "b"}, TWO, LABELLED | {"by": 2}]
    found = read_preferences(write(*records))
    assert [r["completions"] for r in found] == [["Yo", "No"]] * 4
    assert [r["messages"][0]["content"] for r in found] == ["Hi", "Ho", "Hi", "Hi"]
    assert found[0]["orders"] == [[1, 0], [0, 1], [0, 1]] and found[0]["by"] == 1
    assert all("orders" not in record for record in found[1:])  # TWO stands there twice
    assert "as many annotators prefer the one as the other (1: " in capsys.readouterr().out


def test_what_the_tokenizer_refuses_is_told_with_its_line(write, tokenizer):
    call = {"function": {"name": "add", "arguments": "{1"}}
    path = write(chat(U, A), chat(U, said("assistant", "", tool_calls=[call])))
    with pytest.raises(
        UserError, match="data.jsonl, line 2: .*a tool call needs a name, and arguments in JSON"
    ):
        pack_chats(read_chats(path), tokenizer, 64, "training", CPU)


def test_a_caption_that_is_too_long_for_clip_is_dropped(tokenizer, capsys):
    store = SimpleNamespace(numbers=lambda images: [0] * len(images))
    said = ("a", "a " * train_vlm.LONGEST_CAPTION, "b")
    records = [{"image": "a.png", "caption": text} for text in said]
    assert len(train_vlm.Pairs(records, store, tokenizer)) == 2
    assert "more than 128 tokens (1: " in capsys.readouterr().out
