"""What PPO and GRPO do alike: sample answers, as rows to train on. B = N G, G = cfg.samples."""

from dataclasses import dataclass

import torch

from nanollm.data import Replies, pad_replies
from nanollm.evaluate import as_text
from nanollm.generate import generate


@dataclass
class Answers:
    """G answers to each of N items; row n G + g is answer g to item n."""

    items: list  # B records: each item G times
    rows: Replies  # their mask leaves out what tools have written
    texts: list
    lengths: list  # tokens of each answer, what tools have written included
    ended: torch.Tensor  # (B,) bool: the last token is one that stops

    def each(self):
        """(item, text, length, ended) of every answer."""
        return zip(self.items, self.texts, self.lengths, self.ended.tolist())


def draw_noise(cfg, rt):
    """What this process samples the next batch with, (B, max_new_tokens). Every process draws for
    all of them, so that answers don't depend on how many there are.
    """
    noise = torch.rand(cfg.batch_size, cfg.samples, cfg.max_new_tokens, dtype=torch.float64)
    return noise[rt.share(cfg.batch_size)].flatten(0, 1).to(rt.device)


def sample_answers(cfg, policy, tokenizer, items, prompts, noise, tools=None, pictures=None):
    """Sample G Answers to each item with this noise, on the policy's device.

    prompts: each item's list of ids; pictures: what each item shows, as generate takes it, or None.
    """
    out = generate(
        policy,
        prompts,
        cfg.max_new_tokens,
        cfg.samples,
        cfg.temperature,
        stop_ids=tokenizer.stop_ids,
        pad_id=tokenizer.pad_id,
        noise=noise,
        tools=tools,
        pictures=pictures,
    )
    replies = out.lists()  # ids as generated, never made from text again
    items, prompts, pictures = (
        xs and [x for x in xs for _ in range(cfg.samples)] for xs in (items, prompts, pictures)
    )
    rows = pad_replies(prompts, replies, tokenizer.pad_id, out.owned(), pictures)
    device = out.tokens.device
    ended = torch.tensor([ids[-1] in tokenizer.stop_ids for ids in replies], device=device)
    texts = [as_text(tokenizer, ids) for ids in replies]
    return Answers(items, rows.to(device), texts, list(map(len, replies)), ended)
