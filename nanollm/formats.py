"""Reading files: text, JSONL, corpora, dialogues, preferences and prompts, strictly.

data/README.md documents the formats. Wrong input raises UserError with file and line number.
"""

import json
import re
import sys
from pathlib import Path

from nanollm.config import UserError

DEFAULT_VAL_FRACTION = 0.1
IMAGE = "<image>"
CHECKS = ("contains", "exact", "number", "unknown")  # how an answer is compared: rewards.py


def read_text(path):
    """A UTF-8 text file as str; missing, empty or other encodings raise UserError."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.is_dir():
        raise UserError(f"{path} is a folder, a file is wanted")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start})") from None
    if not text.strip():
        raise UserError(f"{path} is empty")
    return text


def read_jsonl(path):
    """The records of a JSONL file (or of one JSON array) with their line numbers: [(line, dict),
    ...].
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        numbered = list(enumerate(_parse(text, path), 1))
    else:
        lines = enumerate(text.split("\n"), 1)
        numbered = [(number, _parse(line, path, number)) for number, line in lines if line.strip()]
    halves = re.search(r"\\u[dD][89a-fA-F]", text)  # of characters that JSON writes as two
    for number, record in numbered:
        if not isinstance(record, dict):
            raise UserError(
                f"{path}, line {number}: a JSON object is wanted, not {type(record).__name__}"
            )
        if halves and not _is_text(json.dumps(record, ensure_ascii=False)):
            raise UserError(f"{path}, line {number}: half of a surrogate pair is no character")
    return numbered


def _is_text(value):
    """Can UTF-8 hold it?"""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parse(text, path, line=None):
    """The value of a JSON text. Without `line`, a mistake is at the line that the parser names."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        line = line or getattr(e, "lineno", "?")
        raise UserError(f"{path}, line {line}: broken JSON ({getattr(e, 'msg', e)})") from None


def read_documents(path):
    """Documents of a corpus: the whole of a .txt file, or the "text" of every record of a .jsonl
    file.
    """
    if Path(path).suffix not in (".jsonl", ".json"):
        return [read_text(path)]
    documents = []
    for line, record in read_jsonl(path):
        if not isinstance(record.get("text"), str):
            raise UserError(
                f'{path}, line {line}: a corpus record needs a "text", as in '
                f'{{"text": "Once upon..."}}'
            )
        documents.append(record["text"])
    return documents


SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
ROLES = ("system", "user", "assistant", "tool")


def read_chats(path):
    """Chat records as dicts with "messages"; ShareGPT's and Alpaca's records are turned into that
    form.
    """
    return [as_chat(record, f"{path}, line {line}") for line, record in read_jsonl(path)]


def as_chat(record, where):
    """One record in the form of read_chats, or a UserError that begins with `where`."""
    if "conversations" in record:  # ShareGPT
        turns = record["conversations"]
        if not isinstance(turns, list) or not all(isinstance(t, dict) for t in turns):
            raise UserError(f'{where}: "conversations" must be a list of {{"from", "value"}}')
        messages = [
            {
                "role": SHAREGPT_ROLES.get(str(t.get("from")), t.get("from")),
                "content": t.get("value"),
            }
            for t in turns
        ]
    elif "instruction" in record:  # Alpaca
        prompt = "\n\n".join(
            str(record[key]) for key in ("instruction", "input") if record.get(key)
        )
        messages = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": record.get("output")},
        ]
    else:
        messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UserError(f'{where}: a chat record needs "messages", a list of {{"role", "content"}}')
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message:
            raise UserError(f'{where}: message {i} has no "role"')
        if message["role"] not in ROLES:
            raise UserError(
                f"{where}: message {i} has the unknown role {message['role']!r}; roles are "
                f"{', '.join(ROLES)}"
            )
        if not isinstance(message.get("content"), str):
            raise UserError(f'{where}: message {i} has no text in "content"')
    return {**record, "messages": messages}


# --- preferences and prompts ---------------------------------------------------------------------


def read_preferences(path):
    """Rankings as dicts with "messages" (the prompt), "completions" (two or more texts, the best first)
    and "margin" (a float, or None); other keys are kept. Reads pairs, rankings and HH-RLHF.
    """
    return [as_ranking(record, f"{path}, line {line}") for line, record in read_jsonl(path)]


def read_prompts(path, answered=False):
    """Prompts as dicts with "messages" that end before the assistant's turn; other keys are kept.
    Those with an "image" have "images", too. With `answered` every one needs an "answer".

    Reads prompts, dialogues (their last answer is left out), preferences, and problems with an
    "answer", GSM8K's included; "check" says how that answer is compared.
    """
    prompts = []
    for line, record in read_jsonl(path):
        where = f"{path}, line {line}"
        prompt = as_prompt(record, where)
        if answered and "answer" not in prompt:
            raise UserError(f'{where}: a test example needs an "answer"')
        prompts.append(
            with_images(prompt, Path(path).parent, where) if "image" in prompt else prompt
        )
    return prompts


def read_examples(path):
    """Test examples: prompts with an "answer" and a "task", "all" where the file names none."""
    return [{"task": "all", **example} for example in read_prompts(path, answered=True)]


def as_ranking(record, where):
    """One record in the form of read_preferences, or a UserError that begins with `where`."""
    if "ranking" in record:
        messages, completions = _prompt_of(record, where), record["ranking"]
        if not isinstance(completions, list):
            raise UserError(f'{where}: "ranking" must be a list of completions, the best first')
    elif "chosen" in record and "rejected" in record:
        completions = [record["chosen"], record["rejected"]]
        if "prompt" in record or "messages" in record:
            messages = _prompt_of(record, where)
            completions = [_completion_of(completion, where) for completion in completions]
        else:
            messages, completions = _shared_prompt(completions, where)
    else:
        raise UserError(
            f'{where}: a preference record needs "chosen" and "rejected", or a "ranking"'
        )
    _check_completions(completions, where)
    for key in ("ratings", "gold"):
        values = record.get(key)
        if values is not None and (
            not isinstance(values, list)
            or len(values) != len(completions)
            or not all(map(_is_number, values))
        ):
            raise UserError(f'{where}: "{key}" must hold a number for each completion')
    margin = record.get("margin")
    if margin is not None:
        if not _is_number(margin) or margin < 0:
            raise UserError(f'{where}: "margin" must be a number of at least 0, not {margin!r:.40}')
        margin = float(margin)
    kept = {k: v for k, v in record.items() if k not in ("prompt", "chosen", "rejected", "ranking")}
    return {**kept, "messages": messages, "completions": completions, "margin": margin}


def _check_completions(completions, where):
    if not all(isinstance(completion, str) for completion in completions):
        raise UserError(f"{where}: every completion must be text")
    if len(completions) < 2:
        raise UserError(f"{where}: a ranking needs two completions or more, not {len(completions)}")
    if not all(completion.strip() for completion in completions):
        raise UserError(f"{where}: a completion is empty")
    if len({completion.strip() for completion in completions}) < len(completions):
        raise UserError(
            f"{where}: two completions are equal, which is no preference; drop the record"
        )


def _is_number(value):
    """Is it a number that a float can hold? JSON's true, NaN, Infinity and 1000 digits are none."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _prompt_of(record, where):
    """The messages before the completion, checked."""
    if "messages" in record:
        turns = record["messages"]
    elif isinstance(record.get("prompt"), str):
        turns = [{"role": "user", "content": record["prompt"]}]
    elif isinstance(record.get("prompt"), list):
        turns = record["prompt"]
    else:
        raise UserError(f'{where}: a "prompt" (text) or "messages" are wanted')
    messages = turns and as_chat({"messages": turns}, where)["messages"]
    if not messages or not messages[-1]["content"].strip():
        raise UserError(f"{where}: the prompt is empty")
    if messages[-1]["role"] == "assistant":
        raise UserError(
            f"{where}: the prompt ends with an answer; the completions are to follow it"
        )
    return messages


def _completion_of(completion, where):
    """The text of a completion, which may also be a list with one message (TRL's datasets)."""
    if not isinstance(completion, list):
        return completion
    if (
        len(completion) != 1
        or not isinstance(completion[0], dict)
        or completion[0].get("role") != "assistant"
    ):
        raise UserError(
            f"{where}: a completion must be text, or one message of the assistant; where both completions "
            "are whole dialogues, leave the prompt out"
        )
    return completion[0].get("content")


def _shared_prompt(pair, where):
    """(prompt, two completions) of two whole dialogues that differ in their last answer."""
    if all(isinstance(text, str) for text in pair):
        dialogues = [_hh_turns(text, where) for text in pair]
    elif all(isinstance(turns, list) for turns in pair):
        dialogues = [as_chat({"messages": turns}, where)["messages"] for turns in pair]
    else:
        raise UserError(f'{where}: "chosen" and "rejected" must both be text, or both messages')
    if any(turns[-1]["role"] != "assistant" for turns in dialogues):
        raise UserError(f"{where}: a dialogue must end with the assistant's answer")
    if dialogues[0][:-1] != dialogues[1][:-1]:
        raise UserError(f"{where}: chosen and rejected answer different prompts")
    messages = _prompt_of({"messages": dialogues[0][:-1]}, where)
    return messages, [turns[-1]["content"] for turns in dialogues]


def _hh_turns(text, where):
    """Messages of an HH-RLHF dialogue: turns begin with an empty line and Human: or Assistant:."""
    pieces = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    if pieces[0].strip() or len(pieces) < 5:
        raise UserError(
            f'{where}: without a "prompt" a dialogue is wanted, as in '
            r'"\n\nHuman: ...\n\nAssistant: ..."'
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[role], "content": content.strip()}
        for role, content in zip(pieces[1::2], pieces[2::2])
    ]


def as_prompt(record, where):
    """One record in the form of read_prompts, or a UserError that begins with `where`."""
    if "ranking" in record or "chosen" in record:
        ranking = as_ranking(record, where)
        record = {k: v for k, v in ranking.items() if k not in ("completions", "margin")}
    elif "messages" not in record and "prompt" not in record:
        if "question" in record:
            record = _as_problem(record, where)
        elif "conversations" in record or "instruction" in record:  # ShareGPT, Alpaca
            record = as_chat(record, where)
    if "messages" in record:
        messages = as_chat({"messages": record["messages"]}, where)["messages"]
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        record = {**record, "messages": messages}
    kept = {k: v for k, v in record.items() if k != "prompt"}
    prompt = {**kept, "messages": _prompt_of(record, where)}
    if not isinstance(prompt.get("task", ""), str):
        raise UserError(f'{where}: a "task" must be text, not {prompt["task"]!r:.40}')
    return _with_check(prompt, where) if "answer" in prompt else prompt


def _as_problem(record, where):
    """GSM8K: the number behind #### is the answer, and what stands before it is left out."""
    _, mark, answer = str(record.get("answer")).rpartition("####")
    if not mark:
        raise UserError(
            f'{where}: the "answer" to a "question" must end with #### and a number; call the '
            'question "prompt" where the answer is given alone'
        )
    kept = {k: v for k, v in record.items() if k != "question"}
    return {**kept, "prompt": record["question"], "answer": answer, "check": "number"}


def _with_check(prompt, where):
    """The prompt, its answer as text, a number without the commas of 1,000, and its "check"; all
    that rewards.check_answer reads is checked.
    """
    answer = str(prompt["answer"]) if _is_number(prompt["answer"]) else prompt["answer"]
    if not isinstance(answer, str) or not answer.strip():
        raise UserError(f'{where}: an "answer" must be text or a number')
    answer = answer.strip()
    number = re.fullmatch(r"-?(\d+|\d{1,3}(,\d{3})+)(\.\d+)?", answer, re.ASCII)
    check = prompt.get("check", "number" if number else "contains")
    if check not in CHECKS:
        known = ", ".join(CHECKS)
        raise UserError(f"{where}: unknown check {check!r:.40}; checks are {known}")
    if check == "number":
        if not number:
            raise UserError(f'{where}: the "answer" must be a number, not {answer!r:.40}')
        answer = answer.replace(",", "")
    wrong = prompt.get("not", [])
    if not isinstance(wrong, list) or not all(
        isinstance(each, str) and each.strip() for each in wrong
    ):
        raise UserError(f'{where}: "not" must be a list of texts, not {wrong!r:.40}')
    for key in ("begins", "ends"):
        if not isinstance(prompt.get(key, ""), str):
            raise UserError(f'{where}: "{key}" must be text, not {prompt[key]!r:.40}')
    return {**prompt, "answer": answer, "check": check}


def split_documents(documents, part, fraction=DEFAULT_VAL_FRACTION):
    """The first or last part of a corpus: a single document is cut by characters, several are
    counted.
    """
    alone = len(documents) == 1 and isinstance(documents[0], str)
    whole = documents[0] if alone else documents
    cut = int(len(whole) * (1 - fraction))
    kept = whole[:cut] if part == "train" else whole[cut:]
    return [kept] if isinstance(kept, str) else kept


def identity(path):
    """What tells one version of a file from another: its place, size and time of change."""
    if not Path(path).exists():
        raise UserError(f"{path} does not exist")
    stat = Path(path).stat()
    return [Path(path).resolve(), stat.st_size, stat.st_mtime_ns]


# --- images -------------------------------------------------------------------------------------


def read_image_chats(path):
    """Chat records as dicts with "messages" and "images", a list of paths (empty for text).

    Raises UserError with file and line where a image is missing, or markers and images differ.
    """
    chats = []
    for line, record in read_jsonl(path):
        where = f"{path}, line {line}"
        chats.append(with_images(as_chat(record, where), Path(path).parent, where))
    return chats


def read_captions(path):
    """Records {"image": path, "caption"} of a JSONL file; of a dialogue with one image the first
    answer counts as caption. Raises UserError with file and line.
    """
    captions = []
    for line, record in read_jsonl(path):
        where = f"{path}, line {line}"
        caption = record.get("caption")
        if caption is None:
            messages = as_chat(record, where)["messages"]
            caption = next((m["content"] for m in messages if m["role"] == "assistant"), None)
        if not isinstance(caption, str) or not caption.strip():
            raise UserError(f'{where}: a "caption" is wanted, as text')
        images = image_paths(record, Path(path).parent, where)
        if len(images) != 1:
            raise UserError(f"{where}: a caption belongs to one image, not to {len(images)}")
        captions.append({"image": images[0], "caption": caption})
    return captions


def with_images(record, folder, where):
    """The record with "images": the paths that its "image" names, relative to the folder."""
    images = image_paths(record, folder, where)
    messages = as_chat({"messages": record["messages"]}, where)["messages"]
    check_markers(messages, len(images), where)
    return {**record, "images": images}


def image_paths(record, folder, where):
    """The paths that a record's "image" names, relative to the folder; each is a file."""
    named = record.get("image") or []
    named = [named] if isinstance(named, str) else named
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise UserError(f'{where}: "image" must be a file name or a list of them, not {named!r}')
    images = [str(Path(folder) / name) for name in named]
    for image in images:
        if not Path(image).is_file():
            raise UserError(f"{where}: the image {image} does not exist")
    return images


def images_in(messages):
    """How many images the text of these messages has."""
    return sum(message["content"].count(IMAGE) for message in messages)


def check_markers(messages, images, where="the dialogue"):
    """Raise UserError, beginning with `where`, unless users' turns say <image> once per image."""
    for message in messages:
        if message["role"] != "user" and IMAGE in message["content"]:
            raise UserError(
                f"{where}: {IMAGE} stands in a turn of the {message['role']}, but only users show "
                "images"
            )
    markers = images_in(messages)
    if markers != images:
        raise UserError(
            f"{where}: {markers} times {IMAGE}, but {images} images; each image needs one"
        )
