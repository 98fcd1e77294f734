"""What records mean: dialogues, preferences, prompts, problems, choices and images, strictly.

Each reader takes several published shapes and gives one; data/README.md shows a line of each. What
isn't of its format raises UserError, what nothing can be learnt from is dropped (formats.py).
"""

import re
import sys
from collections import defaultdict
from pathlib import Path

from nanollm.config import UserError
from nanollm.formats import IMAGE, images_in, need, need_usable, read_usable, usable
from nanollm.rewards import LETTERS, as_number

CHECKS = ("contains", "exact", "number", "choice", "unknown")  # how an answer is compared
ROLES = ("system", "user", "assistant", "tool")
ROLE_NAMES = {"human": "user", "gpt": "assistant", "developer": "system"}  # elsewhere
ROLE_NAMES |= dict.fromkeys(("function", "observation", "ipython"), "tool")

# --- dialogues -----------------------------------------------------------------------------------


def read_chats(path):
    """Dialogues as dicts with "messages", those of ShareGPT, Alpaca and pairs of prompt and
    completion, too, and labels of two completions as a judge's answers; other keys are kept. What
    has no answer to learn is dropped.
    """
    return read_usable(path, as_text_chat)


def as_text_chat(record, where):
    """One record in the form of read_chats; images are refused, as nobody would look at them."""
    ignored = "its image would be ignored; train_vlm.py looks at images"
    need(not shown(record, where), where, ignored)
    return as_chat(record, where)


def shown(record, where):
    """The images that a record names, by either key, as a list."""
    images = one_of(record, ("image", "images"), where) or []
    return images if isinstance(images, list) else [images]


def as_chat(record, where):
    """One record as {"messages", other keys}, with answers to learn; errors begin with `where`."""
    record = present(record)
    if record.keys() & {*EXPLAINED}:
        record = _as_explained(record, where)
    if is_label(record):
        return as_judgement(record, where)
    key = shape_of(record)
    choices = key in ("prompt", "question") and as_choice(record, where) is not record
    need(not choices, where, "its choices would be ignored; such a record is a problem, no chat")
    if key == "question" and "answer" in record:
        record = _as_solved(record, where)
    answered = record.keys() & {*ANSWERS} or key not in ("prompt", "question")
    need(answered, where, CHAT_WANTED + keys_of(record))
    chat = as_dialogue(record, where)
    answers = [m for m in chat["messages"] if m["role"] == "assistant"]
    need_usable(answers, where, "no answer")
    trained = [m for m in answers if "loss" not in m] if trained_on(record, where) else []
    need_usable(trained, where, "no answer that is trained on")
    said = (m["content"].strip() or m.keys() & {"tool_calls", "reasoning_content"} for m in trained)
    need_usable(all(said), where, "an answer is empty")
    wanted = key != "prompt" or "label" not in record or flag_of(record, "label", where)
    need_usable(wanted, where, "its label says that it isn't wanted")
    return chat


def _as_solved(record, where):
    """A question with its answer as prompt and completion. Of GSM8K's, number and worked steps with
    #### between them, the number is the "answer", too, and the steps become thoughts, without the
    marks of its calculator: <<48/2=24>>.
    """
    steps, mark, number = str(record["answer"]).rpartition("####")
    solved = {k: v for k, v in record.items() if k not in ("question", "answer")}
    solved |= {"prompt": record["question"], "completion": record["answer"]}
    if mark:
        solved = _with_check(solved | {"answer": number, "check": "number"}, where)
        thoughts = re.sub("<<.*?>>", "", steps).strip()
        said = {"role": "assistant", "content": solved["answer"], "reasoning_content": thoughts}
        solved["completion"] = [said]
    return solved


EXPLAINED = ("lecture", "solution")  # of ScienceQA's choices: how the right one is found


def _as_explained(record, where):
    """A question with choices as prompt and completion: lecture and solution become thoughts, and
    the right letter the answer (Lu et al. 2022, arXiv:2209.09513); any other record as it is.
    """
    problem, texts = as_choice(record, where), [record.get(key) or "" for key in EXPLAINED]
    if problem is record:
        return record
    fine = all(isinstance(text, str) for text in texts)
    need(fine, where, '"lecture" and "solution" must be text')
    need_usable("answer" in problem, where, "no answer")
    said = f"The answer is {problem['answer']}."
    thoughts = "\n".join(text.strip() for text in texts if text.strip())
    return problem | {"completion": said, "reasoning_content": thoughts}


# Where a record has its dialogue, or its question: behind the first of these keys that it has.
QUESTIONS = ("instruction", "prompt", "question")
SHAPES = ("messages", "conversations", *QUESTIONS)
ANSWERS = ("output", "response", "completion")  # to a question, beside it
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # of an answer
# before a question, or behind an instruction
PASSAGES = ("context", "passage", "article", "document", "paragraph", "story", "background")
SYSTEM = ("system", "system_prompt")
READ = (*SYSTEM, "history", *PASSAGES, "input", *ANSWERS, *THOUGHTS)
# What a model should see, or say: refused where no message holds it.
CARRIED = (*PASSAGES, "input", "instruction", *THOUGHTS)
CARRIED += ("tools", "functions", "documents", "chat_template_kwargs")
NOTHING = (None, "", [], {}, "[]", "{}", "null")
CHAT_WANTED = 'a chat record needs "messages", a list of {"role", "content"}'
PROMPT_WANTED = 'a "prompt" (text) or "messages" are wanted'


def present(record):
    """A record without the keys that are null; an answer that is null is empty."""
    answers = (*ANSWERS, "answer", "chosen", "rejected", "a", "b")
    return {k: "" if v is None else v for k, v in record.items() if v is not None or k in answers}


def keys_of(record):
    """For a refusal: the keys that a record of no known shape has."""
    return f"; it has {', '.join(map(repr, record)) or 'no key':.80}"


def shape_of(record):
    """The key that holds a record's dialogue, or its question; None where it has neither."""
    return next((key for key in SHAPES if record.get(key) is not None), None)


def one_of(record, keys, where):
    """What a record has behind one of these keys, which mean the same; None where it has none."""
    values = {key: record[key] for key in keys if record.get(key) not in (None, "")}
    differ = f"{' and '.join(values)} mean the same, and differ"
    need(all(value == [*values.values()][0] for value in values.values()), where, differ)
    return [*values.values(), *(record[key] for key in keys if key in record), None][0]


def as_dialogue(record, where, wanted=CHAT_WANTED):
    """One record as {"messages", other keys}, whichever its shape; the messages may end with an
    answer, or a question.
    """
    key, answer = shape_of(record), one_of(record, ANSWERS, where)
    turns, images = record.get(key), iter(shown(record, where))
    if key in QUESTIONS:
        turns = as_turns(_asked(record, key), "user")
        thoughts = {k: record[k] for k in THOUGHTS if k in record}
        if isinstance(answer, str) and "</think>" not in answer:
            answer = [{"role": "assistant", "content": answer} | thoughts]
        turns = turns + as_turns(answer, "assistant") * (answer is not None)
    need(isinstance(turns, list) and turns, where, wanted + keys_of(record))
    messages = [as_message(turn, i, where, images) for i, turn in enumerate(turns)]
    fine = key in QUESTIONS or not answer or answer == messages[-1]["content"]
    need(fine, where, "an answer stands beside the messages that isn't their last")
    kept = {k: v for k, v in record.items() if k not in (key, *READ)}
    return {**kept, "messages": in_context(messages, record, where)}


def _asked(record, key):
    """The question behind this key, with the passages and the input that stand beside it."""
    asked = record[key]
    if not isinstance(asked, str):
        return asked
    if HH.match(asked) and asked.rstrip().endswith("\n\nAssistant:"):
        return _hh_turns(asked)[:-1]
    passages, given = [record.get(k) for k in PASSAGES], [record.get("input")]
    if str(record.get("question")) not in asked:  # it stands beside an instruction
        given = [record.get("question"), *given]
    texts = [asked, *given, *passages] if key == "instruction" else [*passages, asked, *given]
    return "\n\n".join(text for text in texts if text and isinstance(text, str))


def as_turns(said, role):
    """A list of turns as it is, and any other value as one turn of this role."""
    return said if isinstance(said, list) else [{"role": role, "content": said}]


def in_context(messages, record, where):
    """The messages behind the system prompt and the earlier turns that stand beside them."""
    system = one_of(record, SYSTEM, where) or ""
    need(isinstance(system, str), where, '"system" must be text')
    own = messages[:1] if messages[0]["role"] == "system" else []
    same = not system or not own or own[0]["content"] == system
    need(same, where, '"system" and the first message are different system prompts')
    first = own or [{"role": "system", "content": system}] * bool(system)
    turns, history = [], record.get("history") or []
    pairs = isinstance(history, list) and all(isinstance(p, list) and len(p) == 2 for p in history)
    need(pairs, where, '"history" must be a list of [question, answer]')
    for asked, answer in history:
        turns += as_turns(asked, "user") + as_turns(answer, "assistant")
    turns = [as_message(turn, f"{i} of the history", where) for i, turn in enumerate(turns)]
    messages = [*first, *turns, *messages[len(own) :]]
    said = {True: "", False: ""}  # by the assistant, by others
    for m in messages:
        said[m["role"] == "assistant"] += "\n".join([m["content"], m.get("reasoning_content", "")])
    for key in CARRIED:
        value, text = record.get(key), said[key in THOUGHTS]
        there = value in NOTHING or isinstance(value, str) and value.strip() in text
        need(there, where, f'the model would not see the "{key}"; say it in a message')
    return messages


# Keys of a message that as_message reads, and keys that would be lost.
LOSS_KEYS = ("loss", "loss_mask", "train", "training", "trainable", "train_on_turn", "weight")
TURN = ("from", "value", "role", "content", "tool_calls", "function_call", *LOSS_KEYS, *THOUGHTS)
LOST = ("image", "images", "audio", "video", "refusal")


def as_message(turn, i, where, images=None):
    """A turn as {"role", "content"} and, where it has them, "loss": False, "reasoning_content" and
    "tool_calls"; other keys are kept. `images`: an iterator of those that its parts may show.
    """
    named = isinstance(turn, dict) and ("role" in turn or "from" in turn)
    need(named, where, f'message {i} has no "role"')
    roles = {k: ROLE_NAMES.get(str(turn[k]), turn[k]) for k in ("role", "from") if k in turn}
    role, known = one_of(roles, ("role", "from"), where), ", ".join(ROLES)
    need(role in ROLES, where, f"message {i} has the unknown role {role!r:.40}; roles are {known}")
    message = {"role": role, "content": one_of(turn, ("content", "value"), where)}
    if role == "assistant" and message["content"] is None and turn.keys() & {"content", "value"}:
        message["content"] = ""
    message |= {key: value for key, value in turn.items() if key not in TURN}
    if lost := [key for key in LOST if turn.get(key)]:
        raise UserError(f'{where}: message {i} has "{lost[0]}", which would be ignored')
    if not trained_on(turn, where, role == "assistant"):
        message["loss"] = False
    thoughts = one_of(turn, THOUGHTS, where)
    calls = turn.get("tool_calls") or []
    if turn.get("function_call"):  # OpenAI's older form
        calls = [{"type": "function", "function": turn["function_call"]}]
    own = role == "assistant" or not (thoughts or calls)
    need(own, where, f"message {i}: only the assistant thinks, and calls tools")
    if thoughts:
        need(isinstance(thoughts, str), where, f"message {i}: its thoughts must be text")
        message["reasoning_content"] = thoughts
    if calls:  # of which the tokenizer knows more
        need(isinstance(calls, list), where, f'message {i}: "tool_calls" must be a list')
        message |= {"tool_calls": calls, "content": message["content"] or ""}
    if isinstance(message["content"], list):
        parts = [_text_of_part(part, i, where, images) for part in message["content"]]
        message["content"] = "".join(parts)
    need(isinstance(message["content"], str), where, f'message {i} has no text in "content"')
    return message


def _text_of_part(part, i, where, images):
    """The text of one of a content's parts, of OpenAI's kinds; an image is its marker."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return part["text"]
    image = kind in ("image", "image_url", "input_image")
    need(image, where, f"message {i} has a part that is neither text nor an image: {part!r:.40}")
    shown = next(images or iter(()), None)
    need(shown, where, f'message {i} shows an image, but the record names no "image" for it')
    named = part.get("image") or part.get("image_url")
    named = named.get("url") if isinstance(named, dict) else named
    need(named in (None, shown), where, f"message {i} shows {named!r:.40}, not {shown!r:.40}")
    return IMAGE


def flag_of(record, key, where):
    """True or False, as the record says behind this key, by whichever word."""
    known = {True: ("true", "1", "1.0", "yes"), False: ("false", "0", "0.0", "no")}
    said = str(record[key]).strip().lower()
    flag = next((flag for flag, words in known.items() if said in words), None)
    need(flag is not None, where, f'"{key}" must be true or false, not {record[key]!r:.40}')
    return flag


def trained_on(turn, where, answers=True):
    """What "loss", "train" or "weight" say of a turn: is it learnt? Only answers ever are."""
    for key in ("mask", "masks", "masked"):
        unclear = f'"{key}" may mean that it is learnt, or that it is not; say "loss": false'
        need(turn.get(key) is None, where, unclear)
    given = [key for key in LOSS_KEYS if turn.get(key) not in (None, "")]
    flags = {key: flag_of(turn, key, where) for key in given}
    for key, flag in flags.items():
        alone = f"\"{key}\" is true of a message that the assistant doesn't write: it isn't learnt"
        need(answers or not flag, where, alone)
    return all(flags.values())


# --- preferences ---------------------------------------------------------------------------------


def read_preferences(path):
    """Rankings as dicts with "messages" (the prompt), "completions" (two or more texts, the best
    first) and "margin" (a float, or None); other keys are kept. Reads pairs, rankings, HH-RLHF,
    UltraFeedback and labels, of which several about the same two completions become one ranking, as
    the majority has it; of KTO's records, with one completion, "label" says whether it is wanted.
    """
    rankings = read_usable(path, as_ranking)
    labels = defaultdict(list)  # of the same two completions; any other record is alone
    for n, each in enumerate(rankings):
        labelled = each.get("label") in ("a", "b")
        pair = (str(each["messages"]), *sorted(each["completions"])) if labelled else n
        labels[pair].append(each)
    return usable([alike[0] | {"labels": alike} for alike in labels.values()], by_majority, path)


def by_majority(record, where):
    """The one ranking of a record's "labels", by which annotators rank the same two completions: as
    most of them do. Of several its "orders" say in which order each has put "completions".
    """
    labels = record["labels"]
    if not labels[1:]:
        return labels[0]
    chosen = [each["completions"][0] for each in labels]
    best = max(chosen, key=chosen.count)
    tied = 2 * chosen.count(best) == len(chosen)
    need_usable(not tied, where, "as many annotators prefer the one as the other")
    orders = [[0, 1] if each == best else [1, 0] for each in chosen]
    return labels[chosen.index(best)] | {"orders": orders}


def as_ranking(record, where):
    """One record in the form of read_preferences, or an error that begins with `where`."""
    record = by_label(present(record), where)
    need(not shown(record, where), where, "its image would be ignored; preferences are of text")
    need_usable(trained_on(record, where), where, "it is marked as not trained on")
    keys = ("completion",) if {"completion", "label"} <= record.keys() else ("chosen", "rejected")
    completions = record.get("ranking", [record.get(key) for key in keys])
    there = "ranking" in record or record.keys() >= {*keys}
    wanted = 'a preference record needs "chosen" and "rejected", or a "ranking", a list, '
    wanted += 'or "a", "b" and a "label"'
    need(there and isinstance(completions, list), where, wanted + keys_of(record))
    label = {"label": flag_of(record, "label", where)} if keys == ("completion",) else {}
    few = f"a ranking needs two completions or more, not {len(completions)}"
    need_usable(len(completions) > 1 or label, where, few)
    messages, completions = _prompt_and_completions(completions, record, where)
    texts = [each.strip() for each in completions]
    need_usable(all(texts), where, "a completion is empty")
    need_usable(len(set(texts)) == len(texts), where, "two completions are equal")
    for key in ("ratings", "gold"):
        values = record.get(key)
        listed = isinstance(values, list) and len(values) == len(completions)
        fine = values is None or listed and all(map(_is_number, values))
        need(fine, where, f'"{key}" must hold a number for each completion')
    used = {"chosen", "rejected", "ranking", *SHAPES, *READ}
    kept = {k: v for k, v in record.items() if k not in used}
    margin = margin_of(record, where)
    return {**kept, **label, "messages": messages, "completions": completions, "margin": margin}


def is_label(record):
    """Does a record say which of two completions, "a" and "b", is better?"""
    return record.keys() >= {"a", "b", "label"} and not record.keys() & {"chosen", "ranking"}


def comparison(messages, a, b):
    """The prompt that asks a model which of two completions of a prompt is better."""
    *before, asked = messages
    compared = f"{asked['content']}\n\n{a} [A]\n{b} [B]\n\nWhich is better, A or B?"
    return [*before, asked | {"content": compared}]


def as_judgement(record, where):
    """A label as a dialogue: a model is asked for it, and answers A or B."""
    ranked = as_ranking(record, where)
    label, texts = ranked["label"], ranked["completions"]
    answer = {"role": "assistant", "content": label.upper()}
    a, b = texts if label == "a" else texts[::-1]
    return {"messages": [*comparison(ranked["messages"], a, b), answer]}


def by_label(record, where):
    """A label as "chosen", "rejected" and its label; any other record as it is.
    The label is "a", "b" or "tie": 1 would be the first of 1 and 2, but the second of 0 and 1.
    """
    if not is_label(record):
        return record
    label = str(record["label"]).strip().lower()
    known = label in ("a", "b", "tie")
    need(known, where, f'"label" must be "a", "b" or "tie", not {record["label"]!r:.40}')
    need_usable(label != "tie", where, "it is labelled a tie")
    clear = not record.keys() & {"ratings", "gold"}
    need(clear, where, '"ratings" and "gold" are of a "ranking", the best first')
    chosen, rejected = ("a", "b") if label == "a" else ("b", "a")
    said = {"label": label, "chosen": record[chosen], "rejected": record[rejected]}
    return {key: value for key, value in record.items() if key not in ("a", "b")} | said


def margin_of(record, where):
    """By how much the chosen completion is better, a float, or None."""
    keys = ("margin", "score_chosen", "score_rejected")  # the latter are UltraFeedback's
    margin, *scores = (_from_cell(record.get(key)) for key in keys)
    if margin is None and all(map(_is_number, scores)):
        margin = scores[0] - scores[1]
        need_usable(margin >= 0, where, "the rejected completion has the higher score")
    fine = margin is None or _is_number(margin) and margin >= 0
    need(fine, where, f'"margin" must be a number of at least 0, not {margin!r:.40}')
    return None if margin is None else float(margin)


def _from_cell(value):
    """The number that a table's cell holds, None where it is empty; anything else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value or None


def _is_number(value):
    """Can a float hold it? JSON knows true, NaN, Infinity and numbers of 1000 digits, too."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _prompt_and_completions(completions, record, where):
    """(messages, texts) of completions that follow a record's prompt, or are whole dialogues that
    share theirs: then a prompt that stands beside them, too, must be said by them.
    """
    alone = shape_of(record) is None
    hh = alone or all(isinstance(each, str) and HH.match(each) for each in completions)
    if HH.match(str(record.get("prompt"))):  # what follows it begins with a blank
        completions = [each.strip() if isinstance(each, str) else each for each in completions]
    dialogues = [_turns_of(completion, hh, where) for completion in completions]
    answered = all(turns[-1]["role"] == "assistant" for turns in dialogues)
    need_usable(answered, where, "a dialogue must end with the assistant's answer")
    messages = dialogues[0][:-1]
    shared = all(turns[:-1] == messages for turns in dialogues)
    need_usable(shared, where, "chosen and rejected answer different prompts")
    context = (*ANSWERS, *SYSTEM, "history") if messages else ANSWERS
    beside = {key: value for key, value in record.items() if key not in context}
    beside = [] if alone else as_dialogue(beside, where, PROMPT_WANTED)["messages"]
    if messages:
        known = [turn["content"] for turn in dialogues[0]]
        fine = all(turn["content"] in known for turn in beside)
        need(fine, where, "chosen and rejected don't answer the prompt that stands beside them")
    messages = in_context(messages, record, where) if messages else beside
    _check_prompt(messages, where)
    return messages, [plain_text(turns[-1], where) for turns in dialogues]


def _turns_of(completion, hh, where):
    """The messages that a completion is given by: text, which may be an HH-RLHF dialogue, one
    message, or a list of them.
    """
    if hh and isinstance(completion, str):
        turns = _hh_turns(completion, where)
    else:
        turns = [completion] if isinstance(completion, dict) else as_turns(completion, "assistant")
    need(turns, where, "a completion must be text, or messages")
    return [as_message(turn, i, where) for i, turn in enumerate(turns)]


def _check_prompt(messages, where):
    need_usable(messages and messages[-1]["content"].strip(), where, "the prompt is empty")
    open_end = messages[-1]["role"] != "assistant"
    need(open_end, where, "the prompt ends with an answer; the completions are to follow it")


def plain_text(message, where):
    """The content of an answer that is to be text alone."""
    more = message.keys() & {"tool_calls", "reasoning_content", "loss"}
    need(not more, where, f"a completion must be text alone, without {', '.join(sorted(more))}")
    return message["content"]


HH = re.compile(r"(?:\n\n)?Human:.*\n\nAssistant:", re.DOTALL)  # how an HH-RLHF dialogue begins


def _hh_turns(text, where=""):
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
    Those with an "image" have "images", too. With `answered` those without "answer" are dropped.

    Reads prompts, dialogues (their last answer is left out), preferences, and problems with an
    "answer", GSM8K's included; "check" says how that answer is compared.
    """

    def prompt_of(record, where):
        prompt = as_prompt(record, where)
        need_usable("answer" in prompt or not answered, where, 'it needs an "answer"')
        return with_images(prompt, Path(path).parent, where) if shown(prompt, where) else prompt

    return read_usable(path, prompt_of)


def read_examples(path):
    """Test examples: prompts with an "answer" and a "task", "all" where the file names none."""
    return [example | {"task": example.get("task", "all")} for example in read_prompts(path, True)]


def as_prompt(record, where):
    """One record in the form of read_prompts, or an error that begins with `where`."""
    said = (*THOUGHTS, *ANSWERS)  # behind the prompt
    record = as_choice({k: v for k, v in present(record).items() if k not in said}, where)
    if record.keys() & {"ranking", "chosen"} or is_label(record):
        record = as_ranking(record, where)
        record = {k: v for k, v in record.items() if k not in ("completions", "margin")}
    elif shape_of(record) == "question" and record.get("answer"):  # here problems become prompts
        record = _as_solved(record, where)
        wanted = 'the "answer" to a "question" must end with #### and a number'
        need("answer" in record, where, wanted)
    prompt = as_dialogue(record, where, PROMPT_WANTED)
    while prompt["messages"] and prompt["messages"][-1]["role"] == "assistant":
        prompt["messages"].pop()
    _check_prompt(prompt["messages"], where)
    for key in ("task", "begins", "ends"):
        value = prompt.get(key, "")
        need(isinstance(value, str), where, f'"{key}" must be text, not {value!r:.40}')
    answer = prompt.pop("answer", None)
    if answer is None or isinstance(answer, str) and not answer.strip():
        return prompt  # like any other
    return _with_check(prompt | {"answer": answer}, where)


def _with_check(prompt, where):
    """The prompt, its answer as text, a whole number as its digits, and its "check"; all that
    rewards.check_answer reads is checked.
    """
    answer = str(prompt["answer"]) if _is_number(prompt["answer"]) else prompt["answer"]
    textual = isinstance(answer, str) and answer.strip()
    need(textual, where, 'an "answer" must be text or a number')
    answer = answer.strip()
    value = as_number(answer)
    letter = re.fullmatch(r"\(?([A-Z]|[a-h])[).]?", answer)  # of a choice that the prompt lists
    default = "choice" if letter else "contains" if value is None else "number"
    check = prompt.get("check", "choice" if "choices" in prompt else default)
    known = ", ".join(CHECKS)
    need(check in CHECKS, where, f"unknown check {check!r:.40}; checks are {known}")
    if check == "number":
        need(value is not None, where, f'the "answer" must be a number, not {answer!r:.40}')
        answer = str(value) if value.denominator == 1 else answer
    if check == "choice":
        answer, choices = letter[1].upper() if letter else answer, prompt.get("choices", [*LETTERS])
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
    with a "hint"; "options" as well), MMLU's columns question, A, B, C, D, answer, and ARC's
    {"question": {"stem", "choices": [{"text", "label"}]}, "answerKey"}, also flat, with {"text":
    [...], "label": [...]}. Labels win over places: of "1", "2" and "3" the answer 1 is the first.
    """
    asked = "instruction" if "instruction" in record else "prompt"
    asked = "question" if "question" in record or "check" in record else asked
    question, choices = record.get(asked), one_of(record, ("choices", "options"), where)
    columns = [letter for letter in LETTERS if record.get(letter, "") != ""]
    if isinstance(question, dict):
        question, choices = question.get("stem"), question.get("choices")
    elif columns and choices is None:
        choices = [{"text": record[letter], "label": letter} for letter in columns]
    if question is None or choices is None:
        return record
    labels, hint = [*LETTERS], record.get("hint") or ""
    if isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices):
        choices = {key: [choice.get(key) for choice in choices] for key in ("text", "label")}
    if isinstance(choices, dict) and "text" not in choices:  # {"A": "a hen", "B": "a goat"}
        choices = {"text": [*choices.values()], "label": [*choices]}
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
    used = {asked, "choices", "options", "hint", "answer", "answerKey", *columns}
    problem = {key: value for key, value in record.items() if key not in used}
    if isinstance(record.get("subject"), str):
        problem = {"task": record["subject"]} | problem  # accuracy is shown by subject
    key = asked if "instruction" in problem else "prompt"  # behind an instruction, or alone
    problem |= {key: prompt, "choices": choices, "check": "choice"}
    answer = record.get("answerKey", record.get("answer"))
    if answer in (None, ""):
        return problem
    n, named = len(choices), isinstance(answer, str) or "1" in labels
    answer = str(answer).strip() if named else answer
    names = [range(n)] if type(answer) is int else [labels[:n], choices]
    places = [each.index(answer) for each in names if answer in each]
    need(places, where, f"the answer {answer!r:.40} is none of the {n} choices")
    return problem | {"answer": LETTERS[places[0]]}


# --- images --------------------------------------------------------------------------------------


def read_image_chats(path):
    """As read_chats, each with "images", a list of paths (empty for text) that exist and are as
    many as the <image> markers of its messages.
    """
    folder = Path(path).parent
    return read_usable(path, lambda r, where: with_images(as_chat(r, where), folder, where))


def read_captions(path):
    """Records {"image": path, "caption"} of a JSONL file; of a dialogue with one image the first
    answer counts as caption.
    """

    def caption_of(record, where):
        caption = record.get("caption")
        if caption is None:
            messages = as_dialogue(record, where)["messages"]
            caption = next((m["content"] for m in messages if m["role"] == "assistant"), None)
        need(isinstance(caption, str), where, 'a "caption" is wanted, as text')
        need_usable(caption.strip(), where, "the caption is empty")
        images = image_paths(record, Path(path).parent, where)
        need(len(images) == 1, where, f"a caption belongs to one image, not to {len(images)}")
        return {"image": images[0], "caption": caption}

    return read_usable(path, caption_of)


def with_images(record, folder, where):
    """A chat or prompt with "images": the paths that its "image" names, relative to the folder."""
    images = image_paths(record, folder, where)
    check_markers(record["messages"], len(images), where)
    return {**record, "images": images}


def image_paths(record, folder, where):
    """The paths that a record's "image" names, relative to the folder; each is a file."""
    named = shown(record, where)
    fine = all(isinstance(name, str) for name in named)
    need(fine, where, f'"image" must be a file name or a list of them, not {named!r:.80}')
    images = [str(Path(folder) / name) for name in named]
    for image in images:
        need(Path(image).is_file(), where, f"the image {image} does not exist")
    return images


def check_markers(messages, images, where="the dialogue"):
    """Raise UserError, beginning with `where`, unless users' turns say <image> once per image."""
    for message in messages:
        role, shows = message["role"], IMAGE in message["content"]
        misplaced = f"{IMAGE} stands in a turn of the {role}, but only users show images"
        need(role == "user" or not shows, where, misplaced)
    markers = images_in(messages)
    wanted = f"{markers} times {IMAGE}, but {images} images; each image needs one"
    need(markers == images, where, wanted)
