"""How a problem is put to a model: as a chat, or for base models (R1-Zero) as plain text."""

from pathlib import Path

from nanollm.hub import read_json
from nanollm.vlm import render_with_pictures

EXAMPLE = "What is 2 + 3? 2 + 3 = 5."
DESCRIPTION = (
    "A user asks and an assistant answers. The assistant first thinks it through, then says the "
    "result: <think>the thoughts</think> the answer.\n"
)


def chat_prompt(item, tokenizer):
    """Ids of a dialogue up to where the assistant begins."""
    return tokenizer.render(item["messages"], generation_prompt=True)[0]


def zero_prompt(item, tokenizer):
    """For a base model, which follows examples instead of instructions: a question thought through,
    then the problem. Without tags: no text has shown them to our base model, so that it would never
    close one.
    """
    text = f"{EXAMPLE} {item['messages'][-1]['content']}"
    return [tokenizer.eot_id, *tokenizer.encode(text)]


def think_prompt(item, tokenizer):
    """For a base model that has read much of the internet: as DeepSeek-R1-Zero's template
    (2501.12948, table 1), the thought and its tags are described, and rewarded by `think_format`.
    """
    question = f"User: {item['messages'][-1]['content']}\nAssistant:"
    return tokenizer.encode(DESCRIPTION, special=True) + tokenizer.encode(question)


TEMPLATES = {"chat": chat_prompt, "zero": zero_prompt, "think": think_prompt}


def prompt_of(item, model, tokenizer, template="chat"):
    """The ids that the answer to a problem or a test item follows. One without "messages", a cloze
    item, is plain text to go on with; one with pictures is a chat, and `model` says how many ids a
    picture takes.
    """
    if "messages" not in item:
        return [tokenizer.eot_id, *tokenizer.encode(item["prompt"])]
    if item.get("images"):
        n = model.tokens_per_picture
        return render_with_pictures(tokenizer, item["messages"], n, len(item["images"]), True)[0]
    return TEMPLATES[template](item, tokenizer)


def template_of(run_folder):
    """The template that a run of train_grpo.py was trained with; "chat" for any other run."""
    path = Path(run_folder) / "train_config.json"
    name = read_json(path).get("template") if path.exists() else None
    return name if name in TEMPLATES else "chat"
