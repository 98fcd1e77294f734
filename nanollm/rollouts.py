"""From prompts to sampled completions: rows for PPO and GRPO to train on, and how a problem is put.

    sample_rows             SampledRows: G completions of each prompt
    RolloutRows             the rows of these, and beside them what PPO or GRPO adds
    whiten                  advantages of mean 0 and variance 1
    TEMPLATES, prompt_of    a problem as the ids that a completion follows
    with_room               the problems that leave room for one

N prompts, G = cfg.samples completions each, B = N G rows.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from nanollm.batches import Completions, pad_completions
from nanollm.config import read_json
from nanollm.formats import Unusable, usable
from nanollm.generate import as_text, generate, shared_noise


@dataclass
class SampledRows:
    """G completions of each of N prompts; row n G + g is completion g of prompt n."""

    examples: list  # B records: each example G times
    prompts: list  # of ids
    completions: list  # of ids as generated, what tools have written included
    rows: Completions  # their mask leaves out what tools have written
    texts: list  # of the completions
    ended: torch.Tensor  # (B,) bool: the last token is one that stops


@dataclass
class RolloutRows:
    """Completions to train on. PPO and GRPO each add what an update needs to know of them: tensors
    (B,), (B, 1) or (B, T - 1), or None.
    """

    rows: Completions

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, numbers):
        """These completions, without columns that are padding in all of them."""
        parts = {name: x[numbers] for name, x in vars(self).items() if x is not None}
        width = parts["rows"].mask.shape[1] - 1  # columns that are cut are on the right
        for name, x in parts.items():
            if isinstance(x, torch.Tensor) and x.dim() == 2:
                parts[name] = x[:, :width]
        return dataclasses.replace(self, **parts)

    @property
    def mask(self):
        """True on the tokens to train on, (B, T - 1): not on what tools have written."""
        return self.rows.mask[:, 1:]


def sample_rows(cfg, rt, policy, tokenizer, examples, prompts, tools=None, images=None):
    """Sample G completions of each of this process's prompts: SampledRows on the policy's device.
    What comes out doesn't depend on how many processes share the batch.

    prompts: each example's list of ids; images: what each shows, as generate takes it, or None.
    """
    n = len(examples) * rt.world
    noise = shared_noise(rt, (n, cfg.samples, cfg.max_new_tokens), rt.share(n))
    out = generate(
        policy,
        prompts,
        cfg.max_new_tokens,
        cfg.samples,
        cfg.temperature,
        stop_ids=tokenizer.stop_ids,
        pad_id=tokenizer.pad_id,
        noise=noise.flatten(0, 1),
        tools=tools,
        images=images,
    )
    completions, stops = out.lists(), tokenizer.stop_ids  # ids are never made from text again

    def repeated(each):
        return [x for x in each for _ in range(cfg.samples)]

    examples, prompts = repeated(examples), repeated(prompts)
    images = images and repeated(images)
    rows = pad_completions(prompts, completions, tokenizer.pad_id, out.owned(), images)
    texts = [tokenizer.begun(p) + as_text(tokenizer, ids) for p, ids in zip(prompts, completions)]
    ended = torch.tensor([ids[-1] in stops for ids in completions], device=rt.device)
    return SampledRows(examples, prompts, completions, rows.to(rt.device), texts, ended)


def moments(x, mask, total=float):
    """(mean, variance) over the real tokens; `total` sums a number over processes."""
    n = total(mask.sum())
    mean = total((x * mask).sum()) / n
    return mean, total((((x - mean) * mask) ** 2).sum()) / n


def whiten(x, mask, total=float):
    """(x - mean) / std over the real tokens."""
    mean, variance = moments(x, mask, total)
    return (x - mean) / math.sqrt(variance + 1e-8) * mask


# --- how a problem is put -------------------------------------------------------------------------

EXAMPLE = "What is 2 + 3? 2 + 3 = 5."
DESCRIPTION = (
    "A user asks and an assistant answers. The assistant first thinks it through, then says the "
    "result: <think>the thoughts</think> the answer.\n"
)


def chat_prompt(example, tokenizer):
    """Ids of a dialogue up to where the assistant begins."""
    return tokenizer.render(example["messages"], generation_prompt=True)[0]


def only_question(example):
    """The question of a problem that is put without a chat template."""
    *before, question = example["messages"]
    if before:
        raise Unusable("its template has no place for what comes before it")
    return question["content"]


def zero_prompt(example, tokenizer):
    """For a base model, which follows examples instead of instructions: a question thought through,
    then the problem. Without tags, which no text has shown to our base model: it would never close
    one.
    """
    text = f"{EXAMPLE} {only_question(example)}"
    return [*tokenizer.begin, *tokenizer.encode(text)]


def think_prompt(example, tokenizer):
    """For a base model that has read much of the internet: as in DeepSeek-R1-Zero's template
    (2501.12948, table 1), the thought and its tags are described, and rewarded by `think_format`.
    """
    question = f"User: {only_question(example)}\nAssistant:"
    described = tokenizer.encode(DESCRIPTION, special=True)
    return [*tokenizer.begin, *described, *tokenizer.encode(question)]


TEMPLATES = {"chat": chat_prompt, "zero": zero_prompt, "think": think_prompt}


def prompt_of(example, model, tokenizer, template="chat"):
    """The ids that the completion of a problem or a test example follows. A cloze example, without
    "messages", is plain text to go on with; one with images is a chat, and `model` says how many
    ids an image takes.
    """
    if "messages" not in example:
        return [*tokenizer.begin, *tokenizer.encode(example["prompt"])]
    if example.get("images"):
        return tokenizer.render(example["messages"], True, model.tokens_per_image)[0]
    return TEMPLATES[template](example, tokenizer)


def with_room(examples, ids_of, model, new_tokens, name):
    """The examples whose prompts, as `ids_of` puts them, leave the model's context room for so many
    tokens; the others are dropped and counted.
    """
    context = model.cfg.max_position_embeddings

    def fitting(example):
        if len(ids_of(example)) + new_tokens > context:
            reason = f"no room for {new_tokens} more in the model's context of {context} tokens"
            raise Unusable(reason)
        return example

    lower = ", or lower --max_new_tokens" * (new_tokens > 1)
    return usable(examples, fitting, name, f"shorten or drop them{lower}")


def template_of(run_folder):
    """The template that a run of train_grpo.py was trained with; "chat" for any other run."""
    path = Path(run_folder) / "train_config.json"
    name = read_json(path).get("template") if path.exists() else None
    return name if name in TEMPLATES else "chat"
