"""Which calls of tools help? Toolformer's filter: sampled calls are kept where their result makes
the answer easier to predict.

    keep if min(L(nothing), L(call without result)) - L(call with result) >= threshold

L is the loss on the answer in nats per token (Schick et al. 2023, arXiv:2302.04761, section 2).
Differs from the paper: the model is shown no examples but continues after <tool_call>; calls stand
at the beginning of the answer; all of the answer's tokens weigh the same; of several calls that
help the best is kept.

Run     python -m nanollm.toolformer runs/tools --data chats.jsonl --out calls.jsonl
        python train_sft.py --data calls.jsonl
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from data import village
from nanollm.batches import pad_completions
from nanollm.config import UserError, atomic_write, cli
from nanollm.formats import read_chats
from nanollm.generate import sample_completions
from nanollm.hub import load_model
from nanollm.logprobs import completion_logprobs
from nanollm.preferences import in_batches
from nanollm.run import check_file
from nanollm.runtime import start
from nanollm.tools import LONGEST_RESULT, Toolbox


@dataclass
class Config:
    model: str = field(
        default="runs/tools", metadata={"positional": True}
    )  # run folder or model folder that samples the calls
    data: str = "chats.jsonl"  # dialogues; calls are tried before their last answer
    out: str = "calls.jsonl"  # dialogues with the calls that help, for train_sft.py --data
    knowledge: str | None = None  # JSONL of {"title", "text"} to search; default: the village's
    samples: int = 4  # calls tried per dialogue
    threshold: float = 0.5  # nats per token of the answer by which a call must help
    seed: int = 0  # of the sampling
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # precision of the layers


def answer_losses(model, tokenizer, prompts, prefixes, answers):
    """Nats per token of each answer after its prompt and prefix (lists of ids), (N,)."""
    rows = pad_completions([p + z for p, z in zip(prompts, prefixes)], answers, tokenizer.pad_id)
    logprobs = in_batches(lambda part: completion_logprobs(model, part).sum(1), rows, model.device)
    return -logprobs / rows.mask.sum(1)


def sampled_calls(model, tokenizer, tools, prompts, samples, generator=None):
    """(number of the prompt, call, result) of each call that was closed, the last two as ids."""
    begun = [prompt + [tools.call] for prompt in prompts]
    sampled = sample_completions(
        model, tokenizer, begun, LONGEST_RESULT, samples, generator=generator
    )
    found = []
    for n, ids in enumerate(sampled):
        if tools.call_end in ids:
            call = [tools.call, *ids[: ids.index(tools.call_end) + 1]]
            found.append((n // samples, call, tools.respond(call)))
    return found


def filter_calls(model, tokenizer, tools, chats, samples=4, threshold=0.5, generator=None):
    """The dialogues in which a call helps to predict the last answer, with the best such call.

    A call that doesn't fit the model's context, or that text can't hold as these ids, is left out,
    and so are answers that hold calls or results already.
    """
    context = model.cfg.max_position_embeddings
    prompts = [tokenizer.render(c["messages"][:-1], generation_prompt=True)[0] for c in chats]
    whole = [tokenizer.render(c["messages"])[0] for c in chats]
    answers = [ids[len(prompt) :] for ids, prompt in zip(whole, prompts)]
    tried = [tools.call in ids or tools.result in ids for ids in answers]
    fit = [n for n, ids in enumerate(whole) if len(ids) < context and not tried[n]]
    if not fit:
        return []
    asked = [prompts[n] for n in fit]
    found = []  # (number of the chat, call, result, the chat with them)
    for i, call, result in sampled_calls(model, tokenizer, tools, asked, samples, generator):
        n = fit[i]
        ddp_model = with_call(chats[n], tokenizer.decode(call + result))
        same = tokenizer.render(ddp_model["messages"])[0] == prompts[n] + call + result + answers[n]
        if same and len(whole[n]) + len(call + result) <= context:
            found.append((n, call, result, ddp_model))
    if not found:
        return []
    numbers, calls, results, chats_with_call = zip(*found)
    asked, wanted = [prompts[n] for n in numbers], [answers[n] for n in numbers]

    def losses(prefixes):
        return answer_losses(model, tokenizer, asked, prefixes, wanted)

    empty = [tools.result, tools.result_end]
    without = torch.minimum(losses([[]] * len(calls)), losses([call + empty for call in calls]))
    gains = (without - losses([c + r for c, r in zip(calls, results)])).tolist()
    best = {}
    for n, chat, gain in zip(numbers, chats_with_call, gains):
        if gain >= threshold and (n not in best or gain > best[n][0]):
            best[n] = gain, chat
    return [chat for _, (_, chat) in sorted(best.items(), key=lambda pair: pair[0])]


def with_call(chat, text):
    *before, last = chat["messages"]
    return {**chat, "messages": [*before, {**last, "content": text + last["content"]}]}


def main(cfg):
    check_file(cfg.out, cfg.data)
    rt = start(cfg.device, cfg.dtype, cfg.seed)
    model, tokenizer = load_model(cfg.model)
    rt.prepare(model, train=False)
    chats = [c for c in read_chats(cfg.data) if c["messages"][-1]["role"] == "assistant"]
    if not chats:
        raise UserError(f"{cfg.data} holds no dialogue that ends with an answer")
    tools = Toolbox.of_village(village.of_run(cfg.model), tokenizer, cfg.knowledge)
    generator = torch.Generator(rt.device).manual_seed(cfg.seed)
    sampling = cfg.samples, cfg.threshold, generator
    kept = filter_calls(model, tokenizer, tools, chats, *sampling)
    if not kept:
        raise UserError(
            f"a call helps in none of {len(chats)} dialogues, so {cfg.out} is not written; raise "
            "--samples or lower --threshold"
        )
    atomic_write(Path(cfg.out), "".join(json.dumps(c, ensure_ascii=False) + "\n" for c in kept))
    print(f"{cfg.out}: a call helps in {len(kept)} of {len(chats)} dialogues")
    rt.close()


if __name__ == "__main__":
    cli(main, Config)
