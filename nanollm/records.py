"""What records mean: dialogues, preferences, prompts, problems, choices and images, strictly.

Each reader takes several published shapes and gives one; data/README.md shows a line of each. What
isn't of its format raises UserError, what nothing can be learnt from is dropped (formats.py).
"""

import re
from collections import defaultdict
from pathlib import Path

from nanollm.config import UserError
from nanollm.formats import IMAGE, Unusable, images_in, read_usable, usable
from nanollm.rewards import LETTERS, as_number

CHECKS = ("contains", "exact", "number", "choice", "unknown")  # how an answer is compared

# --- keys ----------------------------------------------------------------------------------------

ELSEWHERE = {  # our key of a record or a message: what others call it
    "messages": "conversations",
    "system": "system_prompt",
    "context": "passage article document paragraph story background",
    "completion": "output response",
    "reasoning_content": "reasoning thinking",
    "choices": "options",
    "answer": "answerKey",
    "images": "image",
    "role": "from",
    "content": "value",
    "loss": "loss_mask train training trainable train_on_turn weight",
}
NAMES = {theirs: ours for ours, names in ELSEWHERE.items() for theirs in names.split()}
KINDS = dict.fromkeys(("messages", "history", "tool_calls", "ranking", "not"), list)
KINDS |= dict.fromkeys(("system", "reasoning_content", "hint", "caption"), str)
# an answer that is null is empty; any other key that is null isn't there
ANSWERS = ("completion", "answer", "chosen", "rejected", "a", "b", "content")
# What no reader honours, but would change what is learnt: where it isn't empty, it is refused.
IGNORED = ("tools", "functions", "function_call", "documents", "chat_template_kwargs")
IGNORED += ("audio", "video", "mask", "masks", "masked")
EMPTY = (None, "", [], {}, "[]", "{}", "null")
FLAGS = {"true": True, "1": True, "1.0": True, "yes": True, "": None}
FLAGS |= {"false": False, "0": False, "0.0": False, "no": False}


def named(record):
    """A record or message with each key under our name for it, null ones left out. UserError where
    two values have one name, or one isn't of its kind.
    """
    found = {}
    for key, value in record.items():
        name = NAMES.get(key, key)
        kind = KINDS.get(name, object)
        if value is None and name in ANSWERS:
            value = ""
        if value is None or value == "" and (name in found or kind is list):
            continue
        if found.get(name, "") not in ("", value):
            raise UserError(f'"{name}" is said twice: {found[name]!r:.40} and {value!r:.40}')
        if not isinstance(value, kind):
            wanted = "a list" if kind is list else "text"
            raise UserError(f'"{name}" must be {wanted}, not {value!r:.40}')
        found[name] = value
    return found


def without(record, *keys):
    return {key: value for key, value in record.items() if key not in keys}


def refuse_ignored(record, keys, text):
    """UserError where a record has one of these keys and the text doesn't say its value."""
    for key in keys:
        value = record.get(key)
        said = isinstance(value, str) and value.strip() in text
        if value not in EMPTY and not said:
            raise UserError(f'"{key}" would be ignored: say it in a message, or drop the key')


def unknown(record, wanted):
    """What to raise of a record of no known shape."""
    return UserError(f"it needs {wanted}; it has {', '.join(map(repr, record)) or 'no key':.80}")


def flag_of(record, key):
    """True or False, as the record says behind this key, by whichever word; None: it doesn't."""
    said = str(record.get(key, "")).strip().lower()
    if said not in FLAGS:
        raise UserError(f'"{key}" must be true or false, not {record[key]!r:.40}')
    return FLAGS[said]


# --- messages ------------------------------------------------------------------------------------

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
ROLES |= {"developer": "system", "human": "user", "gpt": "assistant"}
ROLES |= dict.fromkeys(("function", "observation", "ipython"), "tool")


def said(role, content):
    return {"role": role, "content": content}


def as_messages(turns, images=()):
    """Turns as {"role", "content"} and, where they have them, "loss": False, "reasoning_content"
    and "tool_calls"; other keys are kept. `images`: those that their parts show, one after another.
    """
    messages, images = [], iter(images)
    for i, turn in enumerate(turns):
        try:
            messages.append(_as_message(turn, images))
        except UserError as e:
            raise UserError(f"message {i}: {e}") from None
    return messages


def _as_message(turn, images):
    message = named(turn) if isinstance(turn, dict) else {}
    role = ROLES.get(str(message.get("role")))
    if role is None:
        raise UserError(f"no role, of {', '.join(ROLES)}, is in {turn!r:.40}")
    calls = message.get("tool_calls")
    content = message.get("content", "" if calls else None)
    if isinstance(content, list):
        content = "".join(_text_of_part(part, images) for part in content)
    if not isinstance(content, str):
        raise UserError('it has no text as "content"')
    message |= said(role, content)
    learnt = flag_of(message, "loss")
    if role != "assistant" and (calls or learnt or message.get("reasoning_content")):
        raise UserError("only the assistant thinks, calls tools, and is learnt from")
    refuse_ignored(message, (*IGNORED, "images"), content)
    dropped = [key for key in ("loss", "tool_calls", "reasoning_content") if not message.get(key)]
    return without(message, "loss", *dropped) | ({"loss": False} if learnt is False else {})


def _text_of_part(part, images):
    """The text of one of a content's parts, of OpenAI's kinds; an image is its marker."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return str(part.get("text") or "")
    if kind not in ("image", "image_url") or next(images, None) is None:
        raise UserError(f"a part is neither text nor an image of the record's: {part!r:.40}")
    return IMAGE


# --- dialogues -----------------------------------------------------------------------------------

ASKED = {  # by the key of a question: what the user says, in this order
    "instruction": ("instruction", "question", "input", "context"),  # Alpaca, Dolly
    "prompt": ("context", "prompt", "input"),
    "question": ("context", "question", "input"),
}
SHAPES = ("messages", *ASKED)  # a record is what the first of these that it has says
# What stands beside it: read, and refused where the messages that come of it don't say it.
BESIDE = ("system", "context", "input", "completion", "reasoning_content")
HH = re.compile(r"(?:\n\n)?Human:.*\n\nAssistant:", re.DOTALL)  # how an HH-RLHF dialogue begins


def shape_of(record):
    """The key that holds a record's dialogue, or its question; None where it has neither."""
    return next((key for key in SHAPES if key in record), None)


def as_dialogue(record):
    """One record, as `named` gives it, as {"messages", other keys}, whichever its shape; the
    messages may end with an answer, or a question.
    """
    shape, images = shape_of(record), images_of(record)
    if shape is None:
        raise unknown(record, '"messages", a list of {"role", "content"}, or a "prompt"')
    messages = as_messages(_asked(record, shape), images)
    if not messages or messages[-1]["role"] != "assistant":
        messages += as_messages(_answered(record))
        record = without(record, "completion")
    if not messages:
        raise Unusable("there are no messages")
    before = []
    if messages[0]["role"] == "system":
        before.append(messages.pop(0))
    elif record.get("system"):
        before.append(said("system", record["system"]))
    for pair in record.get("history", []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError('"history" must be a list of [question, answer]')
        before += as_messages([said("user", pair[0]), said("assistant", pair[1])])
    messages = before + messages
    text = "\n".join(m["content"] + "\n" + m.get("reasoning_content", "") for m in messages)
    refuse_ignored(record, (*BESIDE, "instruction", "question", *IGNORED), text)
    return without(record, shape, *BESIDE, "history") | {"messages": messages}


def _asked(record, shape):
    """The turns of a dialogue, or of a question with what belongs to it."""
    asked = record[shape]
    if isinstance(asked, list):
        return asked
    if isinstance(asked, str) and HH.match(asked) and asked.rstrip().endswith("\n\nAssistant:"):
        return hh_turns(asked)[:-1]
    if isinstance(asked, str):
        texts = [record.get(key) for key in ASKED[shape]]
        asked = "\n\n".join(text for text in texts if text and isinstance(text, str))
    return [said("user", asked)]


def _answered(record):
    """The turns of the answer that stands beside a question; none where there is none."""
    answer = record.get("completion", [])
    if isinstance(answer, list):
        return answer
    turn = said("assistant", answer)
    if "reasoning_content" in record and "</think>" not in str(answer):
        turn["reasoning_content"] = record["reasoning_content"]
    return [turn]


def hh_turns(text):
    """The turns of an HH-RLHF dialogue, each behind an empty line and Human: or Assistant:."""
    pieces = re.split(r"(?:^|\n\n)(Human|Assistant):", text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [said(roles[who], text.strip()) for who, text in zip(pieces[::2], pieces[1::2])]


def read_chats(path):
    """Dialogues as dicts with "messages", those of ShareGPT, Alpaca and pairs of prompt and
    completion, too, and labels of two completions as a judge's answers; other keys are kept. What
    has no answer to learn is dropped.
    """
    return read_usable(path, as_text_chat)


def as_text_chat(record):
    """One record in the form of read_chats; images are refused, as nobody would look at them."""
    if images_of(named(record)):
        raise UserError("its image would be ignored; train_vlm.py looks at images")
    return as_chat(record)


def as_chat(record):
    """One record as {"messages", other keys}, with answers to learn."""
    record = by_label(named(record))
    if "chosen" in record and record.get("label") in ("a", "b"):
        return as_judgement(record)
    record = as_solved(as_choice(record))
    if "answer" in record and not record.keys() & {"completion", "messages"}:
        answer = record["answer"]
        record["completion"] = f"The answer is {answer}." if "choices" in record else answer
    chat = as_dialogue(record)
    answers = [message for message in chat["messages"] if message["role"] == "assistant"]
    if not answers:
        raise Unusable("no answer")
    learnt = [message for message in answers if "loss" not in message]
    if not learnt or flag_of(record, "loss") is False:
        raise Unusable("no answer that is trained on")
    for message in learnt:
        more = message.keys() & {"tool_calls", "reasoning_content"}
        if not message["content"].strip() and not more:
            raise Unusable("an answer is empty")
    if {"prompt", "completion", "label"} <= record.keys() and flag_of(record, "label") is False:
        raise Unusable("its label says that it isn't wanted")
    return chat


# --- preferences ---------------------------------------------------------------------------------


def read_preferences(path):
    """Rankings as dicts with "messages" (the prompt), "completions" (two or more texts, the best
    first) and "margin" (a float, or None); other keys are kept. Reads pairs, rankings, HH-RLHF,
    UltraFeedback and labels, of which several about the same two completions become one ranking, as
    the majority has it; of KTO's records, with one completion, "label" says whether it is wanted.
    """
    alike = defaultdict(list)  # labels of the same two completions; any other record is alone
    for n, ranked in enumerate(read_usable(path, as_ranking)):
        labelled = ranked.get("label") in ("a", "b")
        pair = (str(ranked["messages"]), *sorted(ranked["completions"])) if labelled else n
        alike[pair].append(ranked)
    return usable([each[0] | {"labels": each} for each in alike.values()], by_majority, path)


def by_majority(record):
    """The one ranking of a record's "labels", by which annotators rank the same two completions: as
    most of them do. Of several its "orders" say in which order each has put "completions".
    """
    labels = record["labels"]
    if len(labels) == 1:
        return labels[0]
    chosen = [each["completions"][0] for each in labels]
    best = max(chosen, key=chosen.count)
    if 2 * chosen.count(best) == len(chosen):
        raise Unusable("as many annotators prefer the one as the other")
    orders = [[0, 1] if each == best else [1, 0] for each in chosen]
    return labels[chosen.index(best)] | {"orders": orders}


def as_ranking(record):
    """One record in the form of read_preferences."""
    record = by_label(named(record))
    if images_of(record):
        raise UserError("its image would be ignored; preferences are of text")
    if flag_of(record, "loss") is False:
        raise Unusable("it is marked as not trained on")
    if "ranking" in record:
        completions = record["ranking"]
    elif {"chosen", "rejected"} <= record.keys():
        completions = [record["chosen"], record["rejected"]]
    elif {"completion", "label"} <= record.keys():
        completions = [record["completion"]]
        record["label"] = flag_of(record, "label")
    else:
        raise unknown(record, '"chosen" and "rejected", a "ranking", or "a", "b" and a "label"')
    if len(completions) < 2 and "ranking" in record:
        raise Unusable(f"a ranking needs two completions or more, not {len(completions)}")
    beside = without(record, "ranking", "chosen", "rejected", "completion")
    dialogues = [_continued(beside, completion) for completion in completions]
    if any(turns[-1]["role"] != "assistant" for turns in dialogues):
        raise Unusable("a dialogue must end with the assistant's answer")
    messages = dialogues[0][:-1]
    if any(turns[:-1] != messages for turns in dialogues):
        raise Unusable("chosen and rejected answer different prompts")
    check_prompt(messages)
    texts = [plain_text(turns[-1]) for turns in dialogues]
    if not all(text.strip() for text in texts):
        raise Unusable("a completion is empty")
    if len({text.strip() for text in texts}) < len(texts):
        raise Unusable("two completions are equal")
    for key in ("ratings", "gold"):
        values = record.get(key, [0] * len(texts))
        if not isinstance(values, list) or len([*map(number, values)]) != len(texts):
            raise UserError(f'"{key}" must hold a number for each completion')
    ranked = {"messages": messages, "completions": texts, "margin": margin_of(record)}
    return without(beside, *SHAPES, *BESIDE, "history") | ranked


def _continued(record, completion):
    """The messages of a record's prompt and a completion of it: text, a message or a list of them.
    A whole dialogue says that prompt itself; what stands beside it must be part of it.
    """
    turns = [completion] if isinstance(completion, dict) else completion
    if isinstance(turns, str) and HH.match(turns):
        turns = hh_turns(turns)
    elif isinstance(turns, str) and HH.match(str(record.get("prompt"))):
        turns = turns.strip()  # it begins with a blank there
    if not isinstance(turns, list) or len(turns) < 2:
        return as_dialogue(record | {"completion": turns})["messages"]
    whole = as_dialogue(without(record, *SHAPES) | {"messages": turns})["messages"]
    if shape_of(record):
        said = {message["content"] for message in whole}
        beside = as_dialogue(record)["messages"]
        if not all(m["content"] in said for m in beside if m["role"] == "user"):
            raise UserError("chosen and rejected don't answer the prompt that stands beside them")
    return whole


def number(value):
    """A number, or that of a table's cell."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"a margin, score or rating must be a number, not {value!r:.40}") from None


def margin_of(record):
    """By how much the chosen completion is better, a float, or None."""
    scores = [record.get(key, "") for key in ("score_chosen", "score_rejected")]  # UltraFeedback's
    if record.get("margin", "") != "":
        margin = number(record["margin"])
    elif "" not in scores:
        margin = number(scores[0]) - number(scores[1])
    else:
        return None
    if not margin >= 0:  # nor NaN
        raise Unusable("the rejected completion has the higher score")
    return margin


def by_label(record):
    """Which of two completions is better, "a" or "b", as "chosen", "rejected" and that label; any
    other record as it is. 1 would be the first of 1 and 2, but the second of 0 and 1.
    """
    if not record.keys() >= {"a", "b", "label"} or record.keys() & {"chosen", "ranking"}:
        return record
    label = str(record["label"]).strip().lower()
    if label not in ("a", "b", "tie"):
        raise UserError(f'"label" must be "a", "b" or "tie", not {record["label"]!r:.40}')
    if label == "tie":
        raise Unusable("it is labelled a tie")
    if record.keys() & {"ratings", "gold"}:
        raise UserError('"ratings" and "gold" are of a "ranking", the best first')
    better, worse = ("a", "b") if label == "a" else ("b", "a")
    ranked = {"label": label, "chosen": record[better], "rejected": record[worse]}
    return without(record, "a", "b") | ranked


def comparison(messages, a, b):
    """The prompt that asks a model which of two completions of a prompt is better."""
    *before, asked = messages
    compared = f"{asked['content']}\n\n{a} [A]\n{b} [B]\n\nWhich is better, A or B?"
    return [*before, asked | {"content": compared}]


def as_judgement(record):
    """A label as a dialogue: a model is asked for it, and answers A or B."""
    ranked = as_ranking(record)
    label, texts = ranked["label"], ranked["completions"]
    a, b = texts if label == "a" else texts[::-1]
    answer = said("assistant", label.upper())
    return {"messages": [*comparison(ranked["messages"], a, b), answer]}


def check_prompt(messages):
    if not messages or not messages[-1]["content"].strip():
        raise Unusable("the prompt is empty")


def plain_text(message):
    """The content of an answer that is to be text alone."""
    if more := message.keys() & {"tool_calls", "reasoning_content", "loss"}:
        raise UserError(f"a completion must be text alone, without {', '.join(sorted(more))}")
    return message["content"]


# --- prompts, problems and test examples ---------------------------------------------------------


def read_prompts(path, answered=False):
    """Prompts as dicts with "messages" that end before the assistant's turn; other keys are kept.
    Those with an image have "images". With `answered` those without "answer" are dropped.

    Reads prompts, dialogues (their last answer is left out), preferences, and problems with an
    "answer", GSM8K's included; "check" says how that answer is compared.
    """

    def prompt_of(record):
        prompt = as_prompt(record)
        if answered and "answer" not in prompt:
            raise Unusable('it needs an "answer"')
        return with_images(prompt, Path(path).parent) if images_of(prompt) else prompt

    return read_usable(path, prompt_of)


def read_examples(path):
    """Test examples: prompts with an "answer" and a "task", "all" where the file names none."""
    return [example | {"task": example.get("task", "all")} for example in read_prompts(path, True)]


def as_prompt(record):
    """One record in the form of read_prompts."""
    record = by_label(named(record))
    if record.keys() & {"ranking", "chosen"}:
        record = without(as_ranking(record), "completions", "margin")
    else:
        record = without(as_solved(as_choice(record)), "completion", "reasoning_content")
    prompt = as_dialogue(record)
    while prompt["messages"] and prompt["messages"][-1]["role"] == "assistant":
        prompt["messages"].pop()
    check_prompt(prompt["messages"])
    if "task" in prompt:
        prompt["task"] = str(prompt["task"])
    answer = prompt.pop("answer", "")
    if isinstance(answer, str) and not answer.strip():
        return prompt  # like any other
    return _with_check(prompt, answer)


def as_solved(record):
    """GSM8K's answer, worked steps, #### and a number, as that number and as thoughts, without the
    marks of its calculator: <<48/2=24>>. Any other record as it is.
    """
    steps, mark, number = str(record.get("answer")).rpartition("####")
    if not mark or as_number(number) is None:
        return record
    thoughts = re.sub("<<.*?>>", "", steps).strip()
    answer = number.strip().replace(",", "")
    return record | {"answer": answer, "check": "number", "reasoning_content": thoughts}


def _with_check(prompt, answer):
    """The prompt, its answer as text, a whole number as its digits, and its "check"; all that
    rewards.check_answer reads is checked.
    """
    if type(answer) in (int, float):
        answer = str(answer)
    if not isinstance(answer, str):
        raise UserError('an "answer" must be text or a number')
    answer = answer.strip()
    value = as_number(answer)
    letter = re.fullmatch(r"\(?([A-Z]|[a-h])[).]?", answer)  # of a choice that the prompt lists
    check = "contains" if value is None else "number"
    check = prompt.get("check", "choice" if letter or "choices" in prompt else check)
    if check not in CHECKS:
        raise UserError(f"unknown check {check!r:.40}; checks are {', '.join(CHECKS)}")
    if check == "number":
        if value is None:
            raise UserError(f'the "answer" must be a number, not {answer!r:.40}')
        answer = str(value) if value.denominator == 1 else answer
    if check == "choice":
        answer = letter[1].upper() if letter else answer
        if answer not in [*LETTERS[: len(prompt.get("choices", LETTERS))]]:
            raise UserError('the "answer" must be the letter of one of "choices"')
    wrong = prompt.get("not", [])
    if not all(isinstance(text, str) and text.strip() for text in wrong):
        raise UserError(f'"not" must be a list of texts, not {wrong!r:.40}')
    return {**prompt, "answer": answer, "check": check}


# --- multiple choice -----------------------------------------------------------------------------


def as_choice(record):
    """A question with choices as a prompt that lists them by letters, its "answer" the right one's
    letter, its "check" "choice"; any other record as it is. Lecture and solution of ScienceQA
    become thoughts (Lu et al. 2022, arXiv:2209.09513).

    Reads {"question", "choices": [...], "answer": place from 0, letter or text} (MMLU; ScienceQA,
    with a "hint"), MMLU's columns question, A, B, C, D, answer, and ARC's {"question": {"stem",
    "choices": [{"text", "label"}]}, "answerKey"}, also flat, with {"text": [...], "label": [...]}.
    """
    asked = next((key for key in ("question", "prompt", "instruction") if key in record), None)
    question, choices = record.get(asked), record.get("choices")
    columns = {letter: record[letter] for letter in LETTERS if record.get(letter, "") != ""}
    if isinstance(question, dict):
        question, choices = question.get("stem"), question.get("choices")
    elif choices is None and columns:
        choices = columns
    if question is None or choices is None or "messages" in record:
        return record
    if not isinstance(question, str):
        raise UserError('a "question" with choices must be text')
    choices = _by_label(choices)
    hint, image = record.get("hint", ""), IMAGE if images_of(record) else ""
    if IMAGE in hint + question:
        image = ""
    lines = [image, hint, question, *map("{}. {}".format, LETTERS, choices.values())]
    lines.append("Answer with the letter of the right choice.")
    problem = without(record, "hint", "lecture", "solution", "answer", *columns)
    problem[asked] = "\n".join(filter(None, lines))
    problem |= {"choices": [*choices.values()], "check": "choice"}
    thoughts = [str(record.get(key, "")).strip() for key in ("lecture", "solution")]
    if "subject" in record:
        problem.setdefault("task", record["subject"])  # accuracy is shown by subject
    if record.get("answer", "") == "":
        return problem
    if any(thoughts):
        problem["reasoning_content"] = "\n".join(filter(None, thoughts))
    return problem | {"answer": LETTERS[_place(record["answer"], choices)]}


def _by_label(choices):
    """{label: text} of choices, whichever way they are published."""
    if isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices):
        choices = {choice.get("label"): choice.get("text") for choice in choices}
    elif isinstance(choices, dict) and "text" in choices:
        choices = dict(zip(choices.get("label", LETTERS), choices["text"]))
    elif isinstance(choices, list) and len(choices) <= len(LETTERS):
        choices = dict(zip(LETTERS, choices))
    if not isinstance(choices, dict) or not 2 <= len(choices) <= len(LETTERS):
        raise UserError(f'2 to {len(LETTERS)} "choices" are wanted')
    if not all(isinstance(text, str) for text in choices.values()):
        raise UserError("choices must be texts")
    return choices


def _place(answer, choices):
    """Which choice an answer names, by label, text or place from 0; labels win over places: of "1",
    "2" and "3" the answer 1 is the first.
    """
    labels, texts = [*choices], [*choices.values()]
    said = str(answer).strip()
    if type(answer) is int and "1" not in labels and 0 <= answer < len(choices):
        return answer
    for names in (labels, texts):
        if said in names:
            return names.index(said)
    raise UserError(f"the answer {answer!r:.40} is none of the {len(choices)} choices")


# --- images --------------------------------------------------------------------------------------


def images_of(record):
    """The images that a record names, as a list."""
    images = record.get("images") or []
    return images if isinstance(images, list) else [images]


def read_image_chats(path):
    """As read_chats, each with "images", a list of paths (empty for text) that exist and are as
    many as the <image> markers of its messages.
    """
    return read_usable(path, lambda record: with_images(as_chat(record), Path(path).parent))


def read_captions(path):
    """Records {"image": path, "caption"} of a JSONL file; of a dialogue with one image the first
    answer counts as caption.
    """

    def caption_of(record):
        record = named(record)
        caption = record.get("caption")
        if caption is None:
            answers = [m for m in as_dialogue(record)["messages"] if m["role"] == "assistant"]
            caption = answers[0]["content"] if answers else None
        if not isinstance(caption, str):
            raise UserError('a "caption" is wanted, as text')
        if not caption.strip():
            raise Unusable("the caption is empty")
        images = image_paths(record, Path(path).parent)
        if len(images) != 1:
            raise UserError(f"a caption belongs to one image, not to {len(images)}")
        return {"image": images[0], "caption": caption}

    return read_usable(path, caption_of)


def with_images(record, folder):
    """A chat or prompt with "images": the paths of those that it names, relative to the folder."""
    images = image_paths(record, folder)
    check_markers(record["messages"], len(images))
    return {**record, "images": images}


def image_paths(record, folder):
    """The paths of the images that a record names, relative to the folder; each is a file."""
    named = images_of(record)
    if not all(isinstance(name, str) for name in named):
        raise UserError(f'"image" must be a file name or a list of them, not {named!r:.80}')
    images = [str(Path(folder) / name) for name in named]
    for image in images:
        if not Path(image).is_file():
            raise UserError(f"the image {image} does not exist")
    return images


def check_markers(messages, images):
    """Raise UserError unless users' turns, and no others, say <image> once per image."""
    for message in messages:
        if message["role"] != "user" and IMAGE in message["content"]:
            misplaced = f"{IMAGE} stands in a turn of the {message['role']}"
            raise UserError(f"{misplaced}, but only users show images")
    if images_in(messages) != images:
        counts = f"{images_in(messages)} times {IMAGE}, but {images} images"
        raise UserError(f"{counts}; each image needs one")
