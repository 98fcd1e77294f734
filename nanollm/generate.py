"""Sampling from a GPT: many prompts of different lengths, G samples each, in one batch with a
static KV cache.

Prompts are padded on the left, so that every row writes its next token into the same slot of the
cache. The prefill runs once per prompt and is shared by its G samples. On a CPU, rows that are done
leave the batch; on a GPU a decoding step is recorded once as a CUDA graph and replayed.

Pictures (vlm.py) are read in the prefill, once per prompt; in the cache they are tokens like any.

N prompts, G samples each, B = N * G rows; P longest prompt, L new tokens, S slots of the cache.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nanollm.adapter_runs import unwrap
from nanollm.config import UserError
from nanollm.gpt import KVCache, Linear, attention_dtype
from nanollm.lora import select_rows
from nanollm.vlm import gather_pictures


@dataclass
class Generated:
    """What came out, row n * G + g being sample g of prompt n."""

    prompts: torch.Tensor  # (B, P) int64, padded on the left
    prompt_mask: torch.Tensor  # (B, P) bool, True on real prompt tokens
    tokens: torch.Tensor  # (B, L) int64, padded on the right; the stop token is part of it
    mask: torch.Tensor  # (B, L) bool, True on new tokens
    own: torch.Tensor  # (B, L) bool, True on those that the model chose, False on tools' results
    logprobs: torch.Tensor  # (B, L) fp32, of the tokens under the distribution at `temperature`

    def lists(self):
        """The new ids of each row, without padding."""
        return [row[m].tolist() for row, m in zip(self.tokens, self.mask)]

    def owned(self):
        """For each id of `lists`: did the model choose it?"""
        return [row[m].tolist() for row, m in zip(self.own, self.mask)]


# --- samplers: logits (B, V) -> logits (B, V), with -inf where nothing may be drawn ---------------


def keep_top_k(logits, k):
    """The k largest of each row stay (Fan et al. 2018, arXiv:1805.04833)."""
    return logits.masked_fill(logits < logits.topk(k).values[:, -1:], float("-inf"))


def keep_top_p(logits, p):
    """The smallest set whose probability reaches p stays (Holtzman et al. 2019, arXiv:1904.09751).
    """
    sorted_logits, order = logits.sort(descending=True)
    probs = sorted_logits.softmax(-1)
    beyond = probs.cumsum(-1) - probs >= p  # what comes before it already reaches p
    beyond[:, 0] = False
    return logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), float("-inf"))


def sample(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None, u=None):
    """Draw one token per row: logits (B, V) -> tokens (B,), logprobs (B,) at this temperature.

    temperature 0 takes the largest. The logprobs are those of the full distribution, before top-k
    and top-p. `u` (B,) in [0, 1), float64, takes the place of the generator's random numbers.
    """
    if temperature < 0 or top_k < 0 or not 0 <= top_p <= 1:
        raise UserError(
            f"temperature {temperature}, top_k {top_k} and top_p {top_p} are no way to sample: "
            f"the first two "
            "are at least 0, top_p lies between 0 and 1"
        )
    logits = logits.float()
    if temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
    logits = logits / temperature if temperature != 1 else logits
    probs = kept = logits.softmax(-1)
    if top_k or top_p < 1:
        logits = keep_top_k(logits, min(top_k, logits.shape[1])) if top_k else logits
        kept = (keep_top_p(logits, top_p) if top_p < 1 else logits).softmax(-1)
    cdf = kept.cumsum(-1, dtype=torch.float64)
    if u is None:
        u = torch.rand(len(cdf), dtype=torch.float64, device=cdf.device, generator=generator)
    # the inverse of the CDF at u
    tokens = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)
    return tokens[:, 0], probs.gather(1, tokens)[:, 0].log()


def check_room(model, prompts, new_tokens, items=()):
    """Raise UserError where a prompt (list of ids) and new tokens exceed the context. `items`, the
    prompts' records, let it say which one is the longest.
    """
    context = model.cfg.max_position_embeddings
    lengths = [len(prompt) + new_tokens for prompt in prompts]
    if (longest := max(lengths, default=0)) > context:
        asked = ""
        if items:
            item = items[lengths.index(longest)]
            text = item["messages"][-1]["content"] if "messages" in item else item["prompt"]
            asked = f", {text[:40]!r},"
        beyond = sum(length > context for length in lengths)
        raise UserError(
            f"{beyond} of {len(prompts)} prompts, the longest of {longest - new_tokens} "
            f"tokens{asked} and {new_tokens} to write don't fit the model's context of {context}; "
            "shorten or drop them" + ", or lower --max_new_tokens" * (new_tokens > 1)
        )


# --- the engine ----------------------------------------------------------------------------------


class Engine:
    """A batch of rows being decoded: prefill once, then one token per row and step."""

    def __init__(self, model, prompts, new_tokens, samples=1, pad_id=0, pictures=None):
        """prompts: list of N lists of ids; pictures as generate takes them. Raises UserError when
        prompt and new tokens exceed the context.
        """
        lengths = [len(p) for p in prompts]
        self.P = max(lengths)
        size, context = self.P + new_tokens, model.cfg.max_position_embeddings
        if min(lengths) == 0 or new_tokens < 1:
            raise UserError(
                "an empty prompt or zero new tokens: give at least one token, and ask for at "
                "least one"
            )
        if size > context:
            raise UserError(
                f"a prompt of {self.P} tokens and {new_tokens} new ones don't fit the model's "
                f"context of {context}; "
                "shorten the prompt or ask for fewer new tokens"
            )
        self.model, self.pad_id, device = model, pad_id, model.device
        self.cuda = device.type == "cuda"
        padded = [[pad_id] * (self.P - len(p)) + list(p) for p in prompts]
        self.prompts = torch.tensor(padded, device=device)  # (N, P)
        self.pads = torch.tensor([self.P - n for n in lengths], device=device)  # (N,)
        size_of_cache = self.P if samples > 1 else size
        dtype = attention_dtype(device, model.compute_dtype)
        self.cache = KVCache(model.cfg, len(prompts), size_of_cache, device, dtype)
        self.never = getattr(model, "image_id", None)  # a placeholder is no word of an answer
        self.last_logits = self._prefill(pictures)  # (B, V)
        if samples > 1:
            self._spread(samples, size)
        slots = torch.arange(size, device=device)
        seen = (slots >= self.pads[:, None]) & (slots < self.P)  # (B, S)
        self.allowed = seen[:, None, None] if self.cuda or self.pads.any() else None
        self.length = self.P
        self.graph = None

    def _prefill(self, pictures):
        slots = torch.arange(self.P, device=self.prompts.device)
        self.cache.slots, self.cache.visible = slots, self.P
        positions = mask = None
        if self.pads.any():
            positions = (slots - self.pads[:, None]).clamp(min=0)
            causal = slots[:, None] >= slots  # (P, P)
            real = slots >= self.pads[:, None]  # (N, P)
            itself = (
                slots[:, None] == slots
            )  # padding sees itself: a row without any key has no softmax
            mask = (causal & real[:, None] | itself)[:, None]
        shown = {} if pictures is None else {"pictures": pictures}
        hidden = self.model.hidden(self.prompts, positions, mask, self.cache, **shown)
        return self._speakable(self.model.head(hidden[:, -1]))

    def _speakable(self, logits):
        if self.never is not None:
            logits[:, self.never] = float("-inf")
        return logits

    def _spread(self, samples, size):
        """Copy each prompt's keys and values to its G rows, and make room for the new tokens."""
        rows = torch.arange(len(self.pads), device=self.pads.device).repeat_interleave(samples)
        old, cfg = self.cache, self.model.cfg
        self.cache = KVCache(cfg, len(rows), size, rows.device, old.k.dtype)
        self.cache.k[:, :, :, : self.P] = old.k[:, rows]
        self.cache.v[:, :, :, : self.P] = old.v[:, rows]
        self.prompts, self.pads = self.prompts[rows], self.pads[rows]
        select_rows(self.model, rows)
        self.last_logits = self.last_logits[rows]

    def keep(self, rows):
        """Go on with these rows of the batch only."""
        self.cache.select(rows)
        select_rows(self.model, rows)
        self.pads = self.pads[rows]
        if self.allowed is not None:
            self.allowed = self.allowed[rows]

    def step(self, tokens):
        """Feed tokens (B,), one per row; returns the logits (B, V) of what comes next."""
        if self.allowed is not None:
            self.allowed[..., self.length] = True
        if self.cuda:
            logits = self._graphed_step(tokens)
        else:
            self.cache.slots, self.cache.visible = torch.tensor([self.length]), self.length + 1
            mask = None if self.allowed is None else self.allowed[..., : self.length + 1]
            logits = self._forward(tokens[:, None], (self.length - self.pads)[:, None], mask)
        self.length += 1
        return self._speakable(logits)

    def _forward(self, tokens, positions, mask):
        return self.model(tokens, positions, mask, self.cache)[:, -1]

    def _graphed_step(self, tokens):
        if self.graph is None:
            self.static_tokens, self.static_positions = (
                tokens[:, None].clone(),
                (self.length - self.pads)[:, None],
            )
            self.cache.slots, self.cache.visible = (
                torch.tensor([self.length], device=tokens.device),
                self.allowed.shape[-1],
            )
            arguments = (self.static_tokens, self.static_positions, self.allowed)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # warm-up outside of the recording
                self._forward(*arguments)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.static_logits = self._forward(*arguments)
        self.static_tokens.copy_(tokens[:, None])
        self.static_positions.copy_((self.length - self.pads)[:, None])
        self.cache.slots.fill_(self.length)
        self.graph.replay()
        return self.static_logits.clone()


def for_inference(model):
    """A copy whose weights are cast once instead of at every step, adapters merged into them, and
    whose sister projections are one product.
    """
    eyes = getattr(model, "vision", None)  # read once per prompt: shared, neither copied nor cast
    light = copy.deepcopy(model, {id(eyes): eyes})
    unwrap(light, merged=True)
    for part in light.children():
        if part is not eyes:
            part.to(model.compute_dtype)
    light.model.cos, light.model.sin = model.model.cos, model.model.sin  # angles stay fp32
    if model.model.prefix is not None:  # computed once, too
        light.model.prefix = model.model.prefix.fixed(model.model, model.compute_dtype)
    for block in light.model.layers:
        attention, mlp = block.self_attn, block.mlp
        attention.project = fuse(attention.q_proj, attention.k_proj, attention.v_proj)
        mlp.project = fuse(mlp.gate_proj, mlp.up_proj)
    return light


def fuse(*linears):
    """One matrix product that gives what several linear layers of one input give, as a tuple."""
    if not all(type(linear) is Linear for linear in linears):
        return lambda x: tuple(
            linear(x) for linear in linears
        )  # layers with an adapter that can't be merged stay apart
    weight = torch.cat([linear.weight for linear in linears])
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    sizes = [linear.out_features for linear in linears]
    return lambda x: F.linear(x, weight, bias).split(sizes, dim=-1)


@torch.no_grad()
def generate(
    model,
    prompts,
    max_new_tokens,
    samples=1,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    stop_ids=(),
    pad_id=0,
    generator=None,
    noise=None,
    tools=None,
    pictures=None,
):
    """Continue each of N prompts (lists of ids) G = `samples` times, until a stop id or
    max_new_tokens; Generated.

    `noise` (B, max_new_tokens), uniform in [0, 1) and float64, takes the place of the generator:
    what a row draws then depends on its own noise only, not on which rows stand beside it.

    `tools` (tools.Toolbox) answers calls: behind a closed call the result is written into the row,
    token by token, while the other rows go on.

    `pictures` holds for each prompt a tensor (n, 3, H, W) with those that its placeholders stand
    for, in order, or what VLM.look has made of them, or None.
    """
    shown = gather_pictures(model, prompts, pictures)
    engine = Engine(for_inference(model), prompts, max_new_tokens, samples, pad_id, shown)
    B, device = len(engine.pads), model.device
    tokens = torch.full((B, max_new_tokens), pad_id, device=device)
    mask = torch.zeros((B, max_new_tokens), dtype=torch.bool, device=device)
    own = torch.zeros_like(mask)
    results = {}  # row -> ids of a result that are still to be written
    logprobs = torch.zeros((B, max_new_tokens), device=device)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)
    rows = torch.arange(B, device=device)  # the rows of the result that the engine still works on
    alive = torch.ones(B, dtype=torch.bool, device=device)
    prompt_rows, prompt_mask = (
        engine.prompts,
        torch.arange(engine.P, device=device) >= engine.pads[:, None],
    )
    logits = engine.last_logits
    for t in range(max_new_tokens):
        u = None if noise is None else noise[rows, t]
        new, logprob = sample(logits, temperature, top_k, top_p, generator, u)
        new, chosen = torch.where(alive, new, pad_id), alive
        if results:
            new, chosen = insert_results(new, alive, rows, results)
        tokens[rows, t], mask[rows, t], own[rows, t] = new, alive, chosen
        logprobs[rows, t] = logprob * chosen
        if tools is not None:
            for row in rows[(new == tools.call_end) & chosen].tolist():
                results[row] = tools.respond(tokens[row, : t + 1].tolist())
        alive = alive & ~torch.isin(new, stops)
        left = (
            int(alive.sum()) if not engine.cuda or t % 16 == 15 else 1
        )  # asking a GPU makes it wait
        if left == 0 or t + 1 == max_new_tokens:
            break
        if not engine.cuda and left <= len(rows) // 2:
            keep = alive.nonzero()[:, 0]
            engine.keep(keep)
            rows, alive, new = rows[keep], alive[keep], new[keep]
        logits = engine.step(new)
    made = (x[:, : t + 1] for x in (tokens, mask, own, logprobs))
    return Generated(prompt_rows, prompt_mask, *made)


def insert_results(new, alive, rows, results):
    """(tokens, which of them the model chose): rows with a result waiting get its next id."""
    new, chosen = new.clone(), alive.clone()
    for i, row in enumerate(rows.tolist()):
        if row in results:
            new[i], chosen[i] = results[row][0], False
            results[row] = results[row][1:]
            if not results[row]:
                del results[row]
    return new, chosen


@torch.no_grad()
def stream(
    model,
    prompt,
    max_new_tokens,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    stop_ids=(),
    generator=None,
    tools=None,
    pictures=None,
):
    """Continue one prompt and yield each id as it is drawn, those of tools' results included; a
    stop id ends the stream and is not yielded. `pictures`: (n, 3, H, W), or None.
    """
    shown = gather_pictures(model, [prompt], [pictures])
    engine = Engine(for_inference(model), [prompt], max_new_tokens, pictures=shown)
    logits, written, result = engine.last_logits, [], []
    for t in range(max_new_tokens):
        new, _ = sample(logits, temperature, top_k, top_p, generator)
        if result:
            new[0], result = result[0], result[1:]
        elif int(new) in stop_ids:
            return
        elif tools is not None and int(new) == tools.call_end:
            result = tools.respond([*written, tools.call_end])
        written.append(int(new))
        yield int(new)
        if t + 1 < max_new_tokens:
            logits = engine.step(new)
