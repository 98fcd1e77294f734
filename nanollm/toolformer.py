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

import operator
from dataclasses import dataclass, field

import torch

from data.village import examples as village
from nanollm.batches import pad_completions
from nanollm.config import ModelConfig, Whole, cli
from nanollm.formats import write_jsonl
from nanollm.generate import sample_completions
from nanollm.hub import load_model
from nanollm.logprobs import completion_logprobs
from nanollm.preferences import in_batches
from nanollm.records import read_chats
from nanollm.run import check_file
from nanollm.runtime import start
from nanollm.tools import LONGEST_RESULT, Toolbox


@dataclass
class Config(ModelConfig):
    # run folder or model folder that samples the calls
    model: str = field(default="runs/tools", metadata={"positional": True})
    data: str = "chats.jsonl"  # dialogues; calls are tried before their last answer
    out: str = "calls.jsonl"  # dialogues with the calls that help, for train_sft.py --data
    # JSONL of {"title", "text"} to search; default: the village's, and SQL about it
    knowledge: str | None = None
    samples: Whole[1] = 4  # calls tried per dialogue
    threshold: float = 0.5  # nats per token of the answer by which a call must help


def answer_losses(model, tokenizer, prompts, answers):
    """Nats per token of each answer after its prompt (lists of ids), (N,)."""
    rows = pad_completions(prompts, answers, tokenizer.pad_id)
    logprobs = in_batches(lambda *part: completion_logprobs(*part).sum(1), model, rows)
    return -logprobs / rows.mask.sum(1)


def sampled_calls(model, tokenizer, tools, prompts, samples, generator=None):
    """(number of the prompt, call, result) of each call that was closed; the last two as ids."""
    begun = [[*prompt, tools.call] for prompt in prompts]
    how = {"samples": samples, "generator": generator}
    for n, ids in enumerate(sample_completions(model, tokenizer, begun, LONGEST_RESULT, **how)):
        if tools.call_end in ids:
            call = [tools.call, *ids[: ids.index(tools.call_end) + 1]]
            yield n // samples, call, tools.respond(call)


def filter_calls(model, tokenizer, tools, chats, samples=4, threshold=0.5, generator=None):
    """The dialogues in which a call helps to predict the last answer, with the best such call.

    A call that doesn't fit the model's context, or that text can't hold as these ids, is left out,
    and so are answers that hold calls or results already.
    """
    context, rows = model.cfg.max_position_embeddings, []  # (dialogue, prompt, answer)
    for chat in chats:
        prompt = tokenizer.render(chat["messages"][:-1], generation_prompt=True)[0]
        answer = tokenizer.render(chat["messages"])[0][len(prompt) :]
        if len(prompt + answer) < context and not {tools.call, tools.result} & {*answer}:
            rows.append((chat, prompt, answer))
    tried = []  # (number of the row, the dialogue with a call, call, result)
    prompts = [prompt for _, prompt, _ in rows]
    for n, call, result in sampled_calls(model, tokenizer, tools, prompts, samples, generator):
        chat, prompt, answer = rows[n]
        *before, last = chat["messages"]
        last = {**last, "content": tokenizer.decode(call + result) + last["content"]}
        messages, ids = [*before, last], prompt + call + result + answer
        if len(ids) <= context and tokenizer.render(messages)[0] == ids:
            tried.append((n, {**chat, "messages": messages}, call, result))
    if not tried:
        return []
    numbers, chats, calls, results = zip(*tried)

    def losses(inserted):
        before = [rows[n][1] + ids for n, ids in zip(numbers, inserted)]
        return answer_losses(model, tokenizer, before, [rows[n][2] for n in numbers])

    nothing = losses([[] for _ in tried])
    alone = losses([[*call, tools.result, tools.result_end] for call in calls])
    gains = torch.minimum(nothing, alone) - losses(map(operator.add, calls, results))
    best = {}  # number of the row -> (gain, dialogue)
    for n, chat, gain in zip(numbers, chats, gains.tolist()):
        if gain >= threshold and (n not in best or gain > best[n][0]):
            best[n] = gain, chat
    return [best[n][1] for n in sorted(best)]


def main(cfg):
    check_file(cfg.out, cfg.data)
    rt = start(cfg.device, cfg.dtype, cfg.seed)
    model, tokenizer = load_model(cfg.model)
    rt.prepare(model, train=False)
    chats = [c for c in read_chats(cfg.data) if c["messages"][-1]["role"] == "assistant"]
    knowledge = village.knowledge_of(cfg.model, cfg.knowledge)
    tools = Toolbox.with_knowledge(knowledge, tokenizer)
    sampling = cfg.samples, cfg.threshold, torch.Generator(rt.device).manual_seed(cfg.seed)
    kept = filter_calls(model, tokenizer, tools, chats, *sampling)
    write_jsonl(cfg.out, kept)
    print(f"{cfg.out}: a call helps in {len(kept)} of {len(chats)} dialogues")
    rt.close()


if __name__ == "__main__":
    cli(main, Config)
