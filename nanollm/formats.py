"""Reading files: text, JSONL, corpora, dialogues, preferences and prompts, strictly.

data/README.md documents the formats. Wrong input raises UserError with file and line number.
"""

import json
import math
import re
from pathlib import Path

from nanollm.config import UserError

DEFAULT_VAL_FRACTION = 0.1


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
        try:
            records = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise UserError(
                f"{path}, line {getattr(e, 'lineno', '?')}: broken JSON ({getattr(e, 'msg', e)})"
            ) from None
        numbered = list(enumerate(records, 1))
    else:
        numbered = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    numbered.append((number, json.loads(line)))
                except (ValueError, RecursionError) as e:
                    raise UserError(
                        f"{path}, line {number}: broken JSON ({getattr(e, 'msg', e)})"
                    ) from None
    for number, record in numbered:
        if not isinstance(record, dict):
            raise UserError(
                f"{path}, line {number}: a JSON object is wanted, not {type(record).__name__}"
            )
    return numbered


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
    return [_as_chat(record, f"{path}, line {line}") for line, record in read_jsonl(path)]


def _as_chat(record, where):
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
    """Rankings as dicts with "messages" (the prompt), "replies" (two or more texts, the best first)
    and "margin" (a number, or None); other keys are kept. Reads pairs, rankings and HH-RLHF.
    """
    return [_as_ranking(record, f"{path}, line {line}") for line, record in read_jsonl(path)]


def read_prompts(path):
    """Prompts as dicts with "messages" that end before the assistant's turn; other keys are kept.

    Reads prompts, dialogues (their last answer is left out), preferences, and problems with an
    "answer", GSM8K's included; "check" says how that answer is compared.
    """
    return [_as_prompt(record, f"{path}, line {line}") for line, record in read_jsonl(path)]


def _as_ranking(record, where):
    if "ranking" in record:
        replies = record["ranking"]
        if not isinstance(replies, list):
            raise UserError(f'{where}: "ranking" must be a list of replies, the best first')
        messages = _prompt_of(record, where)
    elif "chosen" in record and "rejected" in record:
        replies = [record["chosen"], record["rejected"]]
        if "prompt" in record or "messages" in record:
            messages = _prompt_of(record, where)
            replies = [
                reply[0].get("content")
                if isinstance(reply, list) and len(reply) == 1 and isinstance(reply[0], dict)
                else reply
                for reply in replies
            ]
        else:
            messages, replies = _shared_prompt(replies, where)
    else:
        raise UserError(
            f'{where}: a preference record needs "chosen" and "rejected", or a "ranking"'
        )
    if not all(isinstance(reply, str) for reply in replies):
        raise UserError(f"{where}: every reply must be text")
    if len(replies) < 2:
        raise UserError(f"{where}: a ranking needs two replies or more, not {len(replies)}")
    if not all(reply.strip() for reply in replies):
        raise UserError(f"{where}: a reply is empty")
    if len({reply.strip() for reply in replies}) < len(replies):
        raise UserError(f"{where}: two replies are equal, which is no preference; drop the record")
    for key in ("ratings", "gold"):
        values = record.get(key)
        if values is not None and (
            not isinstance(values, list)
            or len(values) != len(replies)
            or not all(map(_is_number, values))
        ):
            raise UserError(f'{where}: "{key}" must hold a number for each reply')
    margin = record.get("margin")
    if margin is not None and not (_is_number(margin) and margin >= 0):
        raise UserError(f'{where}: "margin" must be a number of at least 0, not {margin!r}')
    kept = {k: v for k, v in record.items() if k not in ("prompt", "chosen", "rejected", "ranking")}
    return {**kept, "messages": messages, "replies": replies, "margin": margin}


def _is_number(value):
    return isinstance(value, (int, float)) and math.isfinite(value)


def _prompt_of(record, where):
    """The messages before the reply, checked."""
    if "messages" in record:
        messages = _as_chat(record, where)["messages"]
    elif isinstance(record.get("prompt"), str):
        messages = [{"role": "user", "content": record["prompt"]}]
    elif isinstance(record.get("prompt"), list):
        messages = _as_chat({"messages": record["prompt"]}, where)["messages"]
    else:
        raise UserError(f'{where}: a "prompt" (text) or "messages" are wanted')
    if not messages[-1]["content"].strip():
        raise UserError(f"{where}: the prompt is empty")
    if messages[-1]["role"] == "assistant":
        raise UserError(f"{where}: the prompt ends with an answer; the replies are to follow it")
    return messages


def _shared_prompt(pair, where):
    """(prompt, two replies) of two whole dialogues that differ in their last answer."""
    if all(isinstance(text, str) for text in pair):
        dialogues = [_hh_turns(text, where) for text in pair]
    elif all(isinstance(turns, list) for turns in pair):
        dialogues = [_as_chat({"messages": turns}, where)["messages"] for turns in pair]
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
            f'{where}: without a "prompt" a dialogue is wanted, as in "\\n\\nHuman: ...\\n\\nAssistant: '
            '..."'
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[role], "content": content.strip()}
        for role, content in zip(pieces[1::2], pieces[2::2])
    ]


def _as_prompt(record, where):
    if "ranking" in record or "chosen" in record:
        ranking = _as_ranking(record, where)
        return {k: v for k, v in ranking.items() if k not in ("replies", "margin")}
    if "question" in record:  # GSM8K
        answer = str(record.get("answer", ""))
        record = {"prompt": record["question"], "answer": answer.rpartition("####")[2].strip()}
    if isinstance(record.get("messages"), list):
        messages = list(record["messages"])
        while messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
            messages.pop()
        record = {**record, "messages": messages}
    kept = {k: v for k, v in record.items() if k != "prompt"}
    prompt = {**kept, "messages": _prompt_of(record, where)}
    if "answer" in prompt:
        if not isinstance(prompt["answer"], str) or not prompt["answer"].strip():
            raise UserError(f'{where}: an "answer" must be text')
        number = re.fullmatch(r"-?[\d,]+(?:\.\d+)?", prompt["answer"].strip())
        prompt.setdefault("check", "number" if number else "contains")
        if number and prompt["check"] == "number":
            prompt["answer"] = prompt["answer"].strip().replace(",", "")
    return prompt


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
