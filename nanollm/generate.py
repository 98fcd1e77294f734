"""Sampling from a GPT: many prompts of different lengths, G samples each, in one batch with a
static KV cache. What a row writes doesn't depend on the rows beside it.

Prompts are padded on the left, so that every row writes its next token into the same slot of the
cache. The prefill runs once per prompt and is shared by its G samples. On a CPU, rows that are done
leave the batch; on a GPU a decoding step is recorded once as a CUDA graph and replayed.

Of a model it knows `merged` (a copy to sample with), `hidden`, `head`, `gather_images` and
`select_rows`. Images are read in the prefill; in the cache they are tokens like any other.

N prompts, G samples each, B = N * G rows; P longest prompt, L new tokens, S slots of the cache.
"""

from dataclasses import dataclass

import torch

from nanollm.config import UserError
from nanollm.gpt import KVCache, attention_dtype


@dataclass
class Generated:
    """What came out, row n * G + g being sample g of prompt n."""

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
    """The fewest whose probability reaches p stay (Holtzman et al. 2019, arXiv:1904.09751)."""
    sorted_logits, order = logits.sort(descending=True)
    probs = sorted_logits.softmax(-1)
    beyond = probs.cumsum(-1) - probs >= p  # what comes before it already reaches p
    beyond[:, 0] = False
    return logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), float("-inf"))


def sample(logits, u=None, temperature=1.0, top_k=0, top_p=1.0):
    """Draw one token per row: logits (B, V) -> tokens (B,), logprobs (B,) at this temperature.

    u (B,) are random numbers in [0, 1); temperature 0 needs none, it takes the largest. The
    logprobs are those of the full distribution, before top-k and top-p.
    """
    logits = logits.float()
    if temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
    logits = logits / temperature if temperature != 1 else logits
    probs = kept = logits.softmax(-1)
    if top_k or top_p < 1:
        logits = keep_top_k(logits, min(top_k, logits.shape[1])) if top_k else logits
        kept = (keep_top_p(logits, top_p) if top_p < 1 else logits).softmax(-1)
    cdf = kept.cumsum(-1, dtype=cdf_dtype(kept.device))
    tokens = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)  # the CDF's inverse at u
    return tokens[:, 0], probs.gather(1, tokens)[:, 0].log()


def cdf_dtype(device):
    """The dtype of a CDF over a large vocabulary: float64, where the device knows it."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def check_room(model, prompts):
    """Raise UserError where a prompt (list of ids) is empty, or leaves no room for a token."""
    context, lengths = model.cfg.max_position_embeddings, list(map(len, prompts))
    beyond = sum(length >= context for length in lengths)
    if beyond:
        raise UserError(
            f"{beyond} of {len(prompts)} prompts, the longest of {max(lengths)} tokens, don't fit "
            f"the model's context of {context} with a token to write; shorten or drop them"
        )
    if not all(lengths):
        raise UserError("give at least one token as a prompt")


# --- the engine ----------------------------------------------------------------------------------


class Engine:
    """A batch of rows being decoded: prefill once, then one token per row and step."""

    def __init__(self, model, prompts, new_tokens, samples=1, pad_id=0, images=None):
        """model: what `merged` gave; prompts: list of N lists of ids; images: a batch, or None.

        A row may write as much as its own prompt leaves room for, whatever stands beside it.
        """
        lengths = [len(p) for p in prompts]
        check_room(model, prompts)
        self.P, device = max(lengths), model.device
        self.model, self.cuda = model, device.type == "cuda"
        padded = [[pad_id] * (self.P - len(p)) + list(p) for p in prompts]
        prompts = torch.tensor(padded, device=device)  # (N, P)
        lengths = torch.tensor(lengths, device=device)
        self.pads = self.P - lengths  # (N,)
        self.room = model.cfg.max_position_embeddings - lengths  # (N,) new tokens at most
        dtype = attention_dtype(device, model.compute_dtype)
        self.never = getattr(model, "image_id", None)  # nobody writes a placeholder
        slots = torch.arange(self.P + new_tokens, device=device)
        self.cache = KVCache(model.cfg, len(prompts), len(slots), device, dtype)
        seen = (slots >= self.pads[:, None]) & (slots < self.P)  # (N, S)
        self.allowed = seen[:, None, None] if self.cuda or self.pads.any() else None
        self.last_logits = self._prefill(prompts, slots[: self.P], images)  # (N, V)
        self.length, self.graph = self.P, None
        if samples > 1:  # each prompt's keys and values for its G rows
            rows = torch.arange(len(prompts), device=device).repeat_interleave(samples)
            self.keep(rows)
            self.last_logits = self.last_logits[rows]

    def _prefill(self, prompts, slots, images):
        self.cache.slots, self.cache.visible = slots, self.P
        positions = mask = None
        if self.pads.any():
            positions = (slots - self.pads[:, None]).clamp(min=0)
            real = slots >= self.pads[:, None]  # (N, P)
            itself = slots[:, None] == slots  # padding sees itself, or its softmax has no key
            mask = ((slots[:, None] >= slots) & real[:, None] | itself)[:, None]
        shown = {} if images is None else {"images": images}
        hidden = self.model.hidden(prompts, positions, mask, self.cache, **shown)
        return self._without_placeholder(self.model.head(hidden[:, -1]))

    def _without_placeholder(self, logits):
        if self.never is not None:
            logits[:, self.never] = float("-inf")
        return logits

    def keep(self, rows):
        """Go on with these rows of the batch (int64, may repeat)."""
        self.cache.select(rows)
        self.model.select_rows(rows)
        self.pads, self.room = self.pads[rows], self.room[rows]
        if self.allowed is not None:
            self.allowed = self.allowed[rows]

    def step(self, tokens):
        """Feed tokens (B,), one per row; returns the logits (B, V) of what comes next."""
        # a row that is done goes on to the last step on a GPU: its position stays in the context
        positions = (self.length - self.pads).clamp(max=self.model.cfg.max_position_embeddings - 1)
        if self.allowed is not None:
            self.allowed[..., self.length] = True
        if self.cuda:
            logits = self._graphed_step(tokens[:, None], positions[:, None])
        else:
            self.cache.slots, self.cache.visible = torch.tensor([self.length]), self.length + 1
            mask = None if self.allowed is None else self.allowed[..., : self.length + 1]
            logits = self._forward(tokens[:, None], positions[:, None], mask)
        self.length += 1
        return self._without_placeholder(logits)

    def _forward(self, tokens, positions, mask):
        return self.model(tokens, positions, mask, self.cache)[:, -1]

    def _graphed_step(self, tokens, positions):
        if self.graph is None:
            self.static_tokens, self.static_positions = tokens.clone(), positions.clone()
            self.cache.slots = torch.tensor([self.length], device=tokens.device)
            self.cache.visible = self.allowed.shape[-1]
            arguments = (self.static_tokens, self.static_positions, self.allowed)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # warm-up outside of the recording
                self._forward(*arguments)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.static_logits = self._forward(*arguments)
        self.static_tokens.copy_(tokens)
        self.static_positions.copy_(positions)
        self.cache.slots.fill_(self.length)
        self.graph.replay()
        return self.static_logits.clone()


@torch.no_grad()
def decode(
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
    images=None,
):
    """Continue each of N prompts (lists of ids) G = `samples` times, until a stop id, the end of
    the context or max_new_tokens. Yields (t, Generated) behind the t-th of the new tokens: the same
    Generated each time, filled up to there.

    `noise` (B, max_new_tokens), uniform in [0, 1), takes the place of the generator: each row draws
    by its own.
    `tools` (tools.Toolbox) answers calls: behind a closed call the result is written into the row,
    token by token, while the other rows go on. `images` holds for each prompt a tensor (n, 3, H, W)
    with those that its placeholders stand for, in order, or what encode_images has made of them,
    or None.
    """
    shown = model.gather_images(prompts, images)
    engine = Engine(model.merged(), prompts, max_new_tokens, samples, pad_id, shown)
    shape, device = (len(engine.pads), max_new_tokens), model.device
    if noise is None and temperature > 0:
        noise = torch.rand(shape, dtype=cdf_dtype(device), device=device, generator=generator)
    tokens, logprobs = torch.full(shape, pad_id, device=device), torch.zeros(shape, device=device)
    mask, own = (torch.zeros(shape, dtype=torch.bool, device=device) for _ in range(2))
    out = Generated(tokens, mask, own, logprobs)
    results = {}  # row -> ids of a result that are still to be written
    stops = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)
    rows = torch.arange(len(tokens), device=device)  # those that the engine still works on
    alive, logits = torch.ones_like(rows, dtype=torch.bool), engine.last_logits
    for t in range(max_new_tokens):
        u = None if noise is None else noise[rows, t]
        new, logprob = sample(logits, u, temperature, top_k, top_p)
        new, chosen = torch.where(alive, new, pad_id), alive
        if results:
            new, chosen = insert_results(new, alive, rows, results)
        tokens[rows, t], mask[rows, t], own[rows, t] = new, alive, chosen
        logprobs[rows, t] = logprob * chosen
        yield t, out
        if tools is not None:
            for row in rows[(new == tools.call_end) & chosen].tolist():
                results[row] = tools.respond(tokens[row, : t + 1].tolist())
        alive = alive & ~torch.isin(new, stops) & (engine.room > t + 1)
        wait = engine.cuda and t % 16 != 15  # asking a GPU makes it wait
        left = 1 if wait else int(alive.sum())
        if left == 0 or t + 1 == max_new_tokens:
            return
        if not engine.cuda and left <= len(rows) // 2:
            keep = alive.nonzero()[:, 0]
            engine.keep(keep)
            rows, alive, new = rows[keep], alive[keep], new[keep]
        logits = engine.step(new)


def generate(*inputs, **how):
    """What `decode` gives in the end: Generated, as wide as the longest of its rows."""
    *_, (t, out) = decode(*inputs, **how)
    return Generated(*(x[:, : t + 1] for x in vars(out).values()))


def stream(model, prompt, max_new_tokens, stop_ids=(), images=None, **how):
    """Continue one prompt and yield each id as it is drawn, those of tools' results included; a
    stop id ends the stream and is not yielded. `images`: (n, 3, H, W), or None.
    """
    how |= {"stop_ids": stop_ids, "images": [images]}
    for t, out in decode(model, [prompt], max_new_tokens, **how):
        if out.mask[0, t] and int(out.tokens[0, t]) not in stop_ids:
            yield int(out.tokens[0, t])


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


# --- completions ---------------------------------------------------------------------------------


def sample_completions(
    model,
    tokenizer,
    prompts,
    max_new_tokens,
    samples=1,
    temperature=1.0,
    batch_size=256,
    generator=None,
    images=None,
    noise=None,
    **how,
):
    """Continue N prompts (lists of ids) `samples` times each; n * samples + g is the list of ids of
    sample g of prompt n, its stop token included. Short prompts run beside short ones.

    `noise` (N, samples, max_new_tokens) takes the place of the generator's, as in `generate`.
    `images`: a tensor (n, 3, H, W) or None for each prompt, in a list or what is indexed like it.
    """
    check_room(model, prompts)
    model, G = model.merged(), samples
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    completions = [None] * len(prompts) * G
    if noise is None and temperature > 0:
        noise = noise_by_prompt(prompts, (G, max_new_tokens), model.device, generator)
    size = max(1, batch_size // G)  # prompts in a batch
    for numbers in (order[i : i + size] for i in range(0, len(order), size)):
        part = model.merged()
        part.select_rows(torch.tensor(numbers))  # where each prompt has an adapter of its own
        out = generate(
            part,
            [prompts[i] for i in numbers],
            max_new_tokens,
            G,
            temperature=temperature,
            stop_ids=tokenizer.stop_ids,
            pad_id=tokenizer.pad_id,
            noise=None if noise is None else noise[numbers].flatten(0, 1),
            images=None if images is None else [images[i] for i in numbers],
            **how,
        )
        for row, ids in enumerate(out.lists()):
            completions[numbers[row // G] * G + row % G] = ids
    return completions


def noise_by_prompt(prompts, shape, device, generator=None):
    """For each prompt uniform random numbers of this shape, (N, *shape), that depend on its ids and
    on the generator alone: neither on its neighbours nor on the order. Equal prompts draw on.
    """
    on = "cpu" if generator is None else generator.device
    seed, drawn = torch.randint(2**62, (), generator=generator, device=on).item(), {}
    noise = torch.empty((len(prompts), *shape), dtype=cdf_dtype(device))
    for row, prompt in zip(noise, map(tuple, prompts)):
        if prompt not in drawn:
            drawn[prompt] = torch.Generator().manual_seed(hash((seed, prompt)) % 2**63)
        row.uniform_(generator=drawn[prompt])
    return noise.to(device)


def shared_noise(rt, shape, part, generator=None):
    """This process's `part`, a slice, of uniform random numbers. Every process draws for all of
    them, and on a CPU, so that they depend neither on how many processes there are nor on the
    device.
    """
    return torch.rand(shape, dtype=cdf_dtype(rt.device), generator=generator)[part].to(rt.device)


def sample_together(rt, model, tokenizer, prompts, max_new_tokens, samples=1, seed=0, **how):
    """sample_completions, the work shared by all processes; what comes out doesn't depend on how
    many they are.
    """
    generator, mine = torch.Generator().manual_seed(seed), rt.mine(len(prompts))
    noise = shared_noise(rt, (len(prompts), samples, max_new_tokens), mine, generator)
    how |= {"samples": samples, "noise": noise}
    return rt.gather(sample_completions(model, tokenizer, prompts[mine], max_new_tokens, **how))


def complete(model, tokenizer, prompts, max_new_tokens, **how):
    """As sample_completions, as texts, greedy where nothing else is said."""
    how = {"temperature": 0.0} | how
    ids = sample_completions(model, tokenizer, prompts, max_new_tokens, **how)
    return [as_text(tokenizer, each) for each in ids]


def as_text(tokenizer, ids):
    """A completion without its stop token."""
    return tokenizer.decode([t for t in ids if t not in tokenizer.stop_ids])
