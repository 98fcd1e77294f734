"""Talk with a model: python -m nanollm.chat runs/sft

The answer appears while it is written, and earlier turns stay in the conversation; when it outgrows
the context, the oldest turns are left out. /reset begins anew, an empty line or Ctrl-D ends. With
--prompt it answers once and exits; input from a pipe is read line by line.

    python -m nanollm.chat runs/vlm --image a.png --prompt "What is in the image?"

A vision-language model is shown --image with the first message, and what a line `/image FILE` names
with the next one. Images stand before the message, or where it says <image>.
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch

from data import village
from nanollm.config import UserError, cli, say
from nanollm.formats import IMAGE, check_markers
from nanollm.generate import stream
from nanollm.hub import load_model
from nanollm.metrics import LONGEST_COMPLETION
from nanollm.rollouts import template_of
from nanollm.runtime import start
from nanollm.tools import Toolbox, check_knowledge
from nanollm.vision.images import open_image
from nanollm.vision.vlm import VLM


@dataclass
class Config:
    model: str = field(
        default="runs/sft", metadata={"positional": True}
    )  # run folder or model folder
    adapter: str | None = None  # folder of an adapter to put on it
    prompt: str | None = None  # answer this and exit
    image: str | None = None  # image to show with the first message; several with commas
    system: str | None = None  # a system message before the conversation
    max_new_tokens: int = LONGEST_COMPLETION  # longest answer
    temperature: float = 0.3  # 0: always the most likely token
    top_k: int = 0  # draw from the k most likely tokens; 0: from all
    top_p: float = 1.0  # draw from the smallest set with this probability
    tools: bool = False  # run the calls that the model writes
    knowledge: str | None = None  # with tools: JSONL of {"title", "text"}; default: the village's
    seed: int = 0  # of the sampling
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # precision of the layers


def show(model, path):
    """The image (3, H, W) in a file, as the model reads it."""
    if not isinstance(model, VLM):
        raise UserError("this model reads text only; images need one of train_vlm.py's")
    return model.preprocessing(open_image(path))


def user_message(model, text, images):
    """What the user says and shows: images stand in front where the text doesn't place them."""
    if images and IMAGE not in text:
        text = f"{IMAGE}\n" * len(images) + text
    message = {"role": "user", "content": text, "images": images}
    if isinstance(model, VLM):
        check_markers([message], len(images), "the message")
    return message


def images_of(messages):
    """All images that the messages show, in order."""
    return [image for message in messages for image in message.get("images", [])]


def render(model, tokenizer, messages):
    """Ids of the conversation, its images' placeholders included."""
    tokens = model.tokens_per_image if images_of(messages) else 0
    return tokenizer.render(messages, generation_prompt=True, image_tokens=tokens)[0]


def fitting_prompt(model, tokenizer, messages, room):
    """Ids of the conversation without its oldest turns, as many as needed to fit; drops them from
    messages. What shows a image is dropped last, and says so.
    """
    while True:
        ids = render(model, tokenizer, messages)
        if len(ids) <= room:
            return ids
        turns = [i for i, m in enumerate(messages[:-1]) if m["role"] != "system"]
        if not turns:
            raise UserError(
                f"the message is {len(ids)} tokens long, but the model can read {room}; shorten it"
            )
        shown = {i for i in turns if messages[i].get("images")}
        with_answers = shown | {i + 1 for i in shown}
        oldest = next((i for i in turns if i not in with_answers), turns[0])
        if oldest in shown:
            say("note: no room is left for the image; show it again", sys.stderr)
        del messages[oldest]


def answer(model, tokenizer, messages, cfg, generator, tools=None):
    """Stream the answer to stdout and return it as text."""
    room = model.cfg.max_position_embeddings - cfg.max_new_tokens
    if room < 1:
        raise UserError(
            f"--max_new_tokens {cfg.max_new_tokens} leaves no room for a prompt; the model's "
            f"context is "
            f"{model.cfg.max_position_embeddings}"
        )
    prompt = fitting_prompt(model, tokenizer, messages, room)
    images = images_of(messages)
    ids, shown = [], ""
    sampling = {"temperature": cfg.temperature, "top_k": cfg.top_k, "top_p": cfg.top_p}
    for token in stream(
        model,
        prompt,
        cfg.max_new_tokens,
        stop_ids=tokenizer.stop_ids,
        generator=generator,
        tools=tools,
        images=torch.stack(images) if images else None,
        **sampling,
    ):
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # a character whose bytes aren't all there yet waits
            print(text[len(shown) :], end="", flush=True)
            shown = text
    text = tokenizer.decode(ids)
    print(text[len(shown) :], flush=True)
    return text


def main(cfg):
    check_knowledge(cfg)
    rt = start(cfg.device, cfg.dtype, cfg.seed)
    model, tokenizer = load_model(cfg.model, cfg.adapter)
    rt.prepare(model, train=False)
    template = template_of(cfg.adapter or cfg.model)
    if template != "chat":
        say(
            f"note: {cfg.model} was trained with --template {template}, not on chats; "
            "python -m nanollm.evaluate asks as it was trained",
            sys.stderr,
        )
    generator = torch.Generator(rt.device).manual_seed(cfg.seed)
    tools = (
        Toolbox.of_village(village.of_run(cfg.model), tokenizer, cfg.knowledge)
        if cfg.tools
        else None
    )
    completion_to = partial(answer, model, tokenizer, cfg=cfg, generator=generator, tools=tools)
    opening = [{"role": "system", "content": cfg.system}] if cfg.system else []
    messages = list(opening)
    images = [show(model, path.strip()) for path in (cfg.image or "").split(",") if path.strip()]
    if cfg.prompt is not None:
        completion_to([*messages, user_message(model, cfg.prompt, images)])
        return rt.close()
    typed = sys.stdin.isatty()
    if typed:
        print(
            f"{cfg.model}: {sum(p.numel() for p in model.parameters()):,} parameters. "
            + "/image FILE shows a image, " * isinstance(model, VLM)
            + "/reset begins anew, Ctrl-D ends."
        )
    while True:
        if typed:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line or (typed and not line.strip()):
            break
        try:
            if line.strip() == "/reset":
                messages, images = list(opening), []
            elif line.startswith("/image "):
                images.append(show(model, line.removeprefix("/image ").strip()))
            elif line.strip():
                asked = [*messages, user_message(model, line.strip(), images)]
                completion = completion_to(asked)
                messages = [*asked, {"role": "assistant", "content": completion}]
                images = []
        except UserError as error:
            if not typed:
                raise
            print(error)
    rt.close()


if __name__ == "__main__":
    cli(main, Config)
