"""Reading files: text, JSONL, corpora, dialogues, preferences, prompts and images, strictly.

data/README.md documents the formats. What isn't of its format raises UserError with file and line.
"""

import json
import re
import sys
from pathlib import Path

from nanollm.config import UserError, atomic_write
from nanollm.rewards import LETTERS, as_number

DEFAULT_VAL_FRACTION = 0.1
IMAGE = "<image>"
CHECKS = (
    "contains",
    "exact",
    "number",
    "choice",
    "unknown",
)  # how an answer is compared: rewards.py
ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def need(fine, where, message):
    """Raise UserError with this message, behind `where` it happened, unless all is fine."""
    if not fine:
        raise UserError(f"{where}: {message}")


# --- text and JSON -------------------------------------------------------------------------------


def read_text(path):
    """A UTF-8 text file as str; missing, empty or other encodings raise UserError."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a directory; name a file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start})") from None
    if not text.strip():
        raise UserError(f"{path} is empty")
    return text


def read_jsonl(path):
    """[(number, record), ...] of a JSONL file's lines, or of one JSON array."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        numbered = list(enumerate(_parse(text, path), 1))
    else:
        lines = enumerate(text.split("\n"), 1)
        numbered = [(number, _parse(line, path, number)) for number, line in lines if line.strip()]
    halves = re.search(r"\\u[dD][89a-fA-F]", text)  # of characters that JSON writes as two
    for number, record in numbered:
        where, kind = f"{path}, line {number}", type(record).__name__
        need(isinstance(record, dict), where, f"a record must be a JSON object, not {kind}")
        lone = halves and re.search("[\ud800-\udfff]", json.dumps(record, ensure_ascii=False))
        need(not lone, where, "half of a surrogate pair is no character")
    return numbered


def write_jsonl(path, records):
    """Write one record per line; the file takes its place once it is complete."""
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    atomic_write(path, "".join(lines))


def _parse(text, path, line=None):
    """The value of a JSON text. Without `line`, a mistake is at the line that the parser names."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        line = line or getattr(e, "lineno", "?")
        raise UserError(f"{path}, line {line}: broken JSON ({getattr(e, 'msg', e)})") from None


def placed(path):
    """(record, where it stands) of each record of a file."""
    return [(record, f"{path}, line {number}") for number, record in read_jsonl(path)]


def identity(path):
    """What tells one version of a file from another: its place, size and time of change."""
    if not Path(path).exists():
        raise UserError(f"{path} does not exist")
    stat = Path(path).stat()
    return [Path(path).resolve(), stat.st_size, stat.st_mtime_ns]


def split_documents(documents, part, fraction=DEFAULT_VAL_FRACTION):
    """The first part of a list ("train"), or the last ("val"); a lone text is cut inside."""
    alone = len(documents) == 1 and isinstance(documents[0], str)
    whole = documents[0] if alone else documents
    cut = int(len(whole) * (1 - fraction))
    kept = whole[:cut] if part == "train" else whole[cut:]
    return [kept] if alone else kept


def read_parts(read, path, val_path=None, val_fraction=DEFAULT_VAL_FRACTION):
    """[training, held-out] records of a file; the latter are in another file, or its last part."""
    records = read(path)
    if val_path:
        return [records, read(val_path)]
    return [split_documents(records, part, val_fraction) for part in ("train", "val")]


# --- corpora and dialogues -----------------------------------------------------------------------


def read_documents(path):
    """Documents of a corpus: all of a .txt file, or the "text" of each record of a .jsonl file."""
    if Path(path).suffix not in (".jsonl", ".json"):
        return [read_text(path)]
    records = placed(path)
    for record, where in records:
        wanted = 'a corpus record needs a "text", as in {"text": "Once upon..."}'
        need(isinstance(record.get("text"), str), where, wanted)
    return [record["text"] for record, _ in records]


def read_chats(path):
    """Dialogues as dicts with "messages", those of ShareGPT and Alpaca too; other keys are kept."""
    return [as_chat(record, where) for record, where in placed(path)]


def as_chat(record, where):
    """One record in the form of read_chats, or a UserError that begins with `where`."""
    messages = record.get("messages")
    if "conversations" in record:  # ShareGPT
        turns = record["conversations"]
        listed = isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)
        need(listed, where, '"conversations" must be a list of {"from", "value"}')
        messages = []
        for turn in turns:  # a turn keeps its other keys: "loss" says what is trained on
            kept = {key: value for key, value in turn.items() if key not in ("from", "value")}
            role = SHAREGPT_ROLES.get(str(turn.get("from")), turn.get("from"))
            messages.append({"role": role, "content": turn.get("value"), **kept})
    elif "instruction" in record:  # Alpaca
        asked = [str(record[key]) for key in ("instruction", "input") if record.get(key)]
        messages = [
            {"role": "user", "content": "\n\n".join(asked)},
            {"role": "assistant", "content": record.get("output")},
        ]
    wanted = 'a chat record needs "messages", a list of {"role", "content"}'
    need(isinstance(messages, list) and messages, where, wanted)
    for i, message in enumerate(messages):
        need(isinstance(message, dict) and "role" in message, where, f'message {i} has no "role"')
        role, known, content = message["role"], ", ".join(ROLES), message.get("content")
        unknown = f"message {i} has the unknown role {role!r:.40}; roles are {known}"
        need(role in ROLES, where, unknown)
        need(isinstance(content, str), where, f'message {i} has no text in "content"')
    return {**record, "messages": messages}


# --- preferences ---------------------------------------------------------------------------------


def read_preferences(path):
    """Rankings as dicts with "messages" (the prompt), "completions" (two or more texts, the best
    first) and "margin" (a float, or None); other keys are kept. Reads pairs, rankings and HH-RLHF.
    """
    return [as_ranking(record, where) for record, where in placed(path)]


def as_ranking(record, where):
    """One record in the form of read_preferences, or a UserError that begins with `where`."""
    completions = record.get("ranking", [record.get(key) for key in ("chosen", "rejected")])
    there = "ranking" in record or "chosen" in record and "rejected" in record
    wanted = 'a preference record needs "chosen" and "rejected", or a "ranking", a list'
    need(there and isinstance(completions, list), where, wanted)
    if record.keys() & {"ranking", "prompt", "messages"}:
        messages = _prompt_of(record, where)
        completions = [_completion_of(completion, where) for completion in completions]
    else:
        messages, completions = _shared_prompt(completions, where)
    texts = [each.strip() for each in completions if isinstance(each, str)]
    need(len(texts) == len(completions), where, "every completion must be text")
    need(len(texts) > 1, where, f"a ranking needs two completions or more, not {len(texts)}")
    need(all(texts), where, "a completion is empty")
    equal = len(set(texts)) < len(texts)
    need(not equal, where, "two completions are equal, so that none is preferred; drop the record")
    for key in ("ratings", "gold"):
        values = record.get(key)
        listed = isinstance(values, list) and len(values) == len(completions)
        fine = values is None or listed and all(map(_is_number, values))
        need(fine, where, f'"{key}" must hold a number for each completion')
    margin = record.get("margin")
    fine = margin is None or _is_number(margin) and margin >= 0
    need(fine, where, f'"margin" must be a number of at least 0, not {margin!r:.40}')
    kept = {k: v for k, v in record.items() if k not in ("prompt", "chosen", "rejected", "ranking")}
    margin = None if margin is None else float(margin)
    return {**kept, "messages": messages, "completions": completions, "margin": margin}


def _is_number(value):
    """Can a float hold it? JSON knows true, NaN, Infinity and numbers of 1000 digits, too."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _prompt_of(record, where):
    """The messages before the completion, checked."""
    turns = record.get("messages", record.get("prompt"))
    if isinstance(turns, str) and "messages" not in record:
        turns = [{"role": "user", "content": turns}]
    there = "messages" in record or isinstance(turns, list)
    need(there, where, 'a "prompt" (text) or "messages" are wanted')
    messages = turns and as_chat({"messages": turns}, where)["messages"]
    need(messages and messages[-1]["content"].strip(), where, "the prompt is empty")
    open_end = messages[-1]["role"] != "assistant"
    need(open_end, where, "the prompt ends with an answer; the completions are to follow it")
    return messages


def _completion_of(completion, where):
    """The text of a completion, which may also be a list with one message (TRL's datasets)."""
    if not isinstance(completion, list):
        return completion
    turn = completion[0] if len(completion) == 1 and isinstance(completion[0], dict) else {}
    wanted = "beside a prompt a completion must be text, or one message of the assistant"
    need(turn.get("role") == "assistant", where, wanted)
    return turn.get("content")


def _shared_prompt(pair, where):
    """(prompt, two completions) of two whole dialogues that differ in their last answer."""
    if all(isinstance(text, str) for text in pair):
        dialogues = [_hh_turns(text, where) for text in pair]
    else:
        both = all(isinstance(turns, list) for turns in pair)
        need(both, where, '"chosen" and "rejected" must both be text, or both messages')
        dialogues = [as_chat({"messages": turns}, where)["messages"] for turns in pair]
    answered = all(turns[-1]["role"] == "assistant" for turns in dialogues)
    need(answered, where, "a dialogue must end with the assistant's answer")
    shared = dialogues[0][:-1] == dialogues[1][:-1]
    need(shared, where, "chosen and rejected answer different prompts")
    messages = _prompt_of({"messages": dialogues[0][:-1]}, where)
    return messages, [turns[-1]["content"] for turns in dialogues]


def _hh_turns(text, where):
    """Messages of an HH-RLHF dialogue: turns begin with an empty line and Human: or Assistant:."""
    before, *pieces = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    wanted = r'without a "prompt" a dialogue is wanted, as in "\n\nHuman: ...\n\nAssistant: ..."'
    need(len(pieces) >= 4 and not before.strip(), where, wanted)
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(pieces[::2], pieces[1::2])
    return [{"role": roles[who], "content": content.strip()} for who, content in turns]


# --- prompts, problems and test examples ---------------------------------------------------------


def read_prompts(path, answered=False):
    """Prompts as dicts with "messages" that end before the assistant's turn; other keys are kept.
    Those with an "image" have "images", too. With `answered` every one needs an "answer".

    Reads prompts, dialogues (their last answer is left out), preferences, and problems with an
    "answer", GSM8K's included; "check" says how that answer is compared.
    """
    prompts = [(as_prompt(record, where), where) for record, where in placed(path)]
    for prompt, where in prompts:
        need("answer" in prompt or not answered, where, 'a test example needs an "answer"')
        if "image" in prompt:
            prompt |= with_images(prompt, Path(path).parent, where)
    return [prompt for prompt, _ in prompts]


def read_examples(path):
    """Test examples: prompts with an "answer" and a "task", "all" where the file names none."""
    return [{"task": "all", **example} for example in read_prompts(path, answered=True)]


def as_prompt(record, where):
    """One record in the form of read_prompts, or a UserError that begins with `where`."""
    record = as_choice(record, where)
    if "ranking" in record or "chosen" in record:
        record = as_ranking(record, where)
        record = {k: v for k, v in record.items() if k not in ("completions", "margin")}
    elif "messages" not in record and "prompt" not in record:
        if "question" in record:
            record = _as_problem(record, where)
        elif record.keys() & {"conversations", "instruction"}:  # ShareGPT, Alpaca
            record = as_chat(record, where)
    if "messages" in record:
        messages = as_chat({"messages": record["messages"]}, where)["messages"]
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        record = {**record, "messages": messages}
    kept = {k: v for k, v in record.items() if k != "prompt"}
    prompt = {**kept, "messages": _prompt_of(record, where)}
    for key in ("task", "begins", "ends"):
        value = prompt.get(key, "")
        need(isinstance(value, str), where, f'"{key}" must be text, not {value!r:.40}')
    return _with_check(prompt, where) if "answer" in prompt else prompt


def _as_problem(record, where):
    """GSM8K: the number behind #### is the answer, and what stands before it is left out."""
    _, mark, answer = str(record.get("answer")).rpartition("####")
    need(mark, where, 'the "answer" to a "question" must end with #### and a number')
    kept = {k: v for k, v in record.items() if k != "question"}
    return {**kept, "prompt": record["question"], "answer": answer, "check": "number"}


def _with_check(prompt, where):
    """The prompt, its answer as text, a whole number as its digits, and its "check"; all that
    rewards.check_answer reads is checked.
    """
    answer = str(prompt["answer"]) if _is_number(prompt["answer"]) else prompt["answer"]
    textual = isinstance(answer, str) and answer.strip()
    need(textual, where, 'an "answer" must be text or a number')
    answer = answer.strip()
    value = as_number(answer)
    default = "contains" if value is None else "number"
    check = prompt.get("check", "choice" if "choices" in prompt else default)
    known = ", ".join(CHECKS)
    need(check in CHECKS, where, f"unknown check {check!r:.40}; checks are {known}")
    if check == "number":
        need(value is not None, where, f'the "answer" must be a number, not {answer!r:.40}')
        answer = str(value) if value.denominator == 1 else answer
    if check == "choice":
        choices = prompt.get("choices")
        listed = isinstance(choices, list) and all(isinstance(each, str) for each in choices)
        fine = listed and answer in [*LETTERS[: len(choices)]]
        need(fine, where, 'the "answer" must be the letter of one of "choices", a list of texts')
    wrong = prompt.get("not", [])
    texts = isinstance(wrong, list) and all(isinstance(w, str) and w.strip() for w in wrong)
    need(texts, where, f'"not" must be a list of texts, not {wrong!r:.40}')
    return {**prompt, "answer": answer, "check": check}


# --- multiple choice -----------------------------------------------------------------------------


def as_choice(record, where):
    """A question with choices as a prompt that lists them by letters, its "answer" the right one's
    letter, its "check" "choice"; any other record as it is.

    Reads {"question", "choices": [...], "answer": place from 0, letter or text} (MMLU; ScienceQA,
    with a "hint"), MMLU's columns question, A, B, C, D, answer, and ARC's {"question": {"stem",
    "choices": [{"text", "label"}]}, "answerKey"}, also flat, with {"text": [...], "label": [...]}.
    """
    asked = "question" if "question" in record or "check" in record else "prompt"
    question, choices = record.get(asked), record.get("choices")
    columns = [letter for letter in LETTERS if letter in record]
    if isinstance(question, dict):
        question, choices = question.get("stem"), question.get("choices")
    elif columns and choices is None:
        choices = [record[letter] for letter in columns]
    if question is None or choices is None:
        return record
    labels, hint = [*LETTERS], record.get("hint") or ""
    if isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices):
        choices = {key: [choice.get(key) for choice in choices] for key in ("text", "label")}
    if isinstance(choices, dict):
        choices, labels = choices.get("text"), choices.get("label")
    listed = isinstance(choices, list) and isinstance(labels, list)
    listed = listed and 2 <= len(choices) <= min(len(LETTERS), len(labels))
    fine = listed and all(isinstance(each, str) for each in (hint, question, *choices, *labels))
    wanted = f'a "question" (text) and 2 to {len(LETTERS)} "choices", texts'
    need(fine, where, f'{wanted} or {{"text", "label"}}, are wanted; a "hint" must be text')
    shows = bool(record.get("image")) and IMAGE not in hint + question
    lines = [IMAGE * shows, hint, question, *map("{}. {}".format, LETTERS, choices)]
    prompt = "\n".join(filter(None, [*lines, "Answer with the letter of the right choice."]))
    used = {asked, "choices", "hint", "answer", "answerKey", *columns}
    problem = {key: value for key, value in record.items() if key not in used}
    if isinstance(record.get("subject"), str):
        problem = {"task": record["subject"]} | problem  # accuracy is shown by subject
    problem |= {"prompt": prompt, "choices": choices, "check": "choice"}
    answer = record.get("answerKey", record.get("answer"))
    if answer in (None, ""):
        return problem
    answer, n = answer.strip() if isinstance(answer, str) else answer, len(choices)
    names = [range(n)] if type(answer) is int else [labels[:n], choices]
    places = [each.index(answer) for each in names if answer in each]
    need(places, where, f"the answer {answer!r:.40} is none of the {n} choices")
    return problem | {"answer": LETTERS[places[0]]}


def choice_columns(cells):
    """The columns of a table whose first line is a question, its choices and the right one's letter
    already, as MMLU is published; None of any other.
    """
    letters = [*LETTERS[: max(0, len(cells) - 2)]]
    return (
        ["question", *letters, "answer"] if letters[1:] and cells[-1].strip() in letters else None
    )


# --- images --------------------------------------------------------------------------------------


def read_image_chats(path):
    """As read_chats, each with "images", a list of paths (empty for text) that exist and are as
    many as the <image> markers of its messages.
    """
    folder = Path(path).parent
    return [with_images(as_chat(record, where), folder, where) for record, where in placed(path)]


def read_captions(path):
    """Records {"image": path, "caption"} of a JSONL file; of a dialogue with one image the first
    answer counts as caption.
    """
    captions = []
    for record, where in placed(path):
        caption = record.get("caption")
        if caption is None:
            messages = as_chat(record, where)["messages"]
            caption = next((m["content"] for m in messages if m["role"] == "assistant"), None)
        textual = isinstance(caption, str) and caption.strip()
        need(textual, where, 'a "caption" is wanted, as text')
        images = image_paths(record, Path(path).parent, where)
        need(len(images) == 1, where, f"a caption belongs to one image, not to {len(images)}")
        captions.append({"image": images[0], "caption": caption})
    return captions


def with_images(record, folder, where):
    """A chat or prompt with "images": the paths that its "image" names, relative to the folder."""
    images = image_paths(record, folder, where)
    check_markers(record["messages"], len(images), where)
    return {**record, "images": images}


def image_paths(record, folder, where):
    """The paths that a record's "image" names, relative to the folder; each is a file."""
    named = record.get("image") or []
    named = [named] if isinstance(named, str) else named
    listed = isinstance(named, list) and all(isinstance(name, str) for name in named)
    need(listed, where, f'"image" must be a file name or a list of them, not {named!r:.80}')
    images = [str(Path(folder) / name) for name in named]
    for image in images:
        need(Path(image).is_file(), where, f"the image {image} does not exist")
    return images


def images_in(messages):
    """How many images the text of these messages has."""
    return sum(message["content"].count(IMAGE) for message in messages)


def check_markers(messages, images, where="the dialogue"):
    """Raise UserError, beginning with `where`, unless users' turns say <image> once per image."""
    for message in messages:
        role, shows = message["role"], IMAGE in message["content"]
        misplaced = f"{IMAGE} stands in a turn of the {role}, but only users show images"
        need(role == "user" or not shows, where, misplaced)
    markers = images_in(messages)
    wanted = f"{markers} times {IMAGE}, but {images} images; each image needs one"
    need(markers == images, where, wanted)
