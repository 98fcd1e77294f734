"""Talk with a model: python -m nanollm.chat runs/sft

The answer appears while it is written, and earlier turns stay in the conversation; when it outgrows
the context, the oldest turns are left out. /reset begins anew, an empty line or Ctrl-D ends. With
--prompt it answers once and exits; input from a pipe is read line by line.
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch

from nanollm.config import UserError, cli
from nanollm.evaluate import village_tools
from nanollm.generate import stream
from nanollm.hub import load_model
from nanollm.runtime import start


@dataclass
class Config:
    model: str = field(
        default="runs/sft", metadata={"positional": True}
    )  # run folder or model folder
    adapter: str | None = None  # folder of an adapter to put on it
    prompt: str | None = None  # answer this and exit
    system: str | None = None  # a system message before the conversation
    max_new_tokens: int = 100  # longest answer
    temperature: float = 0.3  # 0: always the most likely token
    top_k: int = 0  # draw from the k most likely tokens; 0: from all
    top_p: float = 1.0  # draw from the smallest set with this probability
    tools: bool = False  # run the calls that the model writes
    knowledge: str | None = None  # with tools: JSONL of {"title", "text"}; default: the village's
    seed: int = 0  # of the sampling
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # precision of the layers


def fitting_prompt(tokenizer, messages, room):
    """Ids of the conversation without its oldest turns, as many as needed to fit; drops them from
    messages.
    """
    while True:
        ids, _ = tokenizer.render(messages, generation_prompt=True)
        if len(ids) <= room:
            return ids
        oldest = next((i for i, m in enumerate(messages[:-1]) if m["role"] != "system"), None)
        if oldest is None:
            raise UserError(
                f"the message is {len(ids)} tokens long, but the model can read {room}; shorten it"
            )
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
    prompt = fitting_prompt(tokenizer, messages, room)
    ids, shown = [], ""
    sampling = {"temperature": cfg.temperature, "top_k": cfg.top_k, "top_p": cfg.top_p}
    for token in stream(
        model,
        prompt,
        cfg.max_new_tokens,
        stop_ids=tokenizer.stop_ids,
        generator=generator,
        tools=tools,
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
    if cfg.knowledge and not cfg.tools:
        raise UserError("--knowledge is what tools search in; add --tools")
    rt = start(cfg.device, cfg.dtype, cfg.seed)
    model, tokenizer = load_model(cfg.model, cfg.adapter)
    rt.prepare(model, train=False)
    generator = torch.Generator(rt.device).manual_seed(cfg.seed)
    tools = village_tools(cfg.model, tokenizer, cfg.knowledge) if cfg.tools else None
    reply_to = partial(answer, model, tokenizer, cfg=cfg, generator=generator, tools=tools)
    opening = [{"role": "system", "content": cfg.system}] if cfg.system else []
    messages = list(opening)
    if cfg.prompt is not None:
        reply_to([*messages, {"role": "user", "content": cfg.prompt}])
        return rt.close()
    typed = sys.stdin.isatty()
    if typed:
        print(
            f"{cfg.model}: {sum(p.numel() for p in model.parameters()):,} parameters. /reset "
            f"begins anew, Ctrl-D ends."
        )
    while True:
        if typed:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line or (typed and not line.strip()):
            break
        if line.strip() == "/reset":
            messages = list(opening)
        elif line.strip():
            messages.append({"role": "user", "content": line.strip()})
            try:
                reply = reply_to(messages)
            except UserError as error:
                if not typed:
                    raise
                print(error)
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": reply})
    rt.close()


if __name__ == "__main__":
    cli(main, Config)
