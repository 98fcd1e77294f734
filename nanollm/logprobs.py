"""Log-probabilities of tokens and their entropy: what lies under nearly every loss, in fp32
whatever the precision of the logits; and what they make of held-out text, in bits per byte.
B batch, T tokens, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F

from nanollm.gpt import document_mask

# Logits turned to fp32 at a time: few enough to stay in a CPU's cache, and a 50k vocabulary times a
# long batch never exists in fp32 on a GPU.
CHUNK = {"cpu": 2**21, "cuda": 2**27}


def _row_chunks(logits):
    rows = max(1, CHUNK.get(logits.device.type, 2**21) // logits.shape[1])
    return [slice(i, i + rows) for i in range(0, len(logits), rows)]


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(logits)[target]; backward recomputes the softmax, so that it takes no memory."""

    @staticmethod
    def forward(ctx, logits, targets):
        """logits (N, V), targets (N,) -> (N,)."""
        out = logits.new_empty(len(logits), dtype=torch.float32)
        for part in _row_chunks(logits):
            rows = logits[part].float()
            out[part] = rows.gather(1, targets[part, None])[:, 0] - rows.logsumexp(1)
        ctx.save_for_backward(logits, targets, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        """d log p_target / d logits = onehot(target) - softmax(logits)."""
        logits, targets, logprobs = ctx.saved_tensors
        out = torch.empty_like(logits)
        for part in _row_chunks(logits):
            rows, target, g = logits[part].float(), targets[part, None], grad[part, None]
            logsumexp = rows.gather(1, target) - logprobs[part, None]
            rows = (rows - logsumexp).exp_().mul_(-g)
            out[part] = rows.scatter_add_(1, target, g)
        return out, None


def token_logprobs(logits, targets):
    """log p(target) at every position: logits (..., V), targets (...) -> (...) in fp32."""
    V = logits.shape[-1]
    return _TokenLogprobs.apply(logits.reshape(-1, V), targets.reshape(-1)).view(targets.shape)


def completion_logprobs(model, rows, temperature=1.0, with_entropy=False):
    """log p of each completion's tokens: rows batches.Completions -> (B, T - 1) in fp32.

    Entry t scores tokens[:, t + 1], and is zero where that is no token of the completion. With
    `with_entropy` also the entropy in nats of the distribution behind each, (B, T - 1). The
    distribution is the one that generate draws from: a VLM's <image> has no share in it.
    """
    trained = rows.mask[:, 1:]
    logits = model(*rows.inputs(), where=F.pad(trained, (0, 1)), **rows.shown())  # (n, V)
    if temperature != 1:
        logits = logits / temperature
    never = getattr(getattr(model, "module", model), "image_id", None)  # DDP's module
    if never is not None:  # not -inf, for which p log p of the entropy is NaN
        at = torch.tensor([never], device=logits.device)
        logits = logits.index_fill(1, at, torch.finfo(logits.dtype).min)
    blank = torch.zeros(trained.shape, device=logits.device)
    out = blank.masked_scatter(trained, token_logprobs(logits, rows.tokens[:, 1:][trained]))
    if not with_entropy:
        return out
    with torch.no_grad():
        return out, blank.masked_scatter(trained, entropy(logits))


@torch.no_grad()
def batched_logprobs(model, rows, parts, temperature):
    """completion_logprobs of all rows, (B, T - 1), part by part; parts: numbers of rows."""
    out = torch.zeros(rows.mask[:, 1:].shape, device=rows.mask.device)
    for numbers in parts:
        logprobs = completion_logprobs(model, rows[numbers], temperature)
        out[numbers, : logprobs.shape[1]] = logprobs
    return out


def entropy(logits):
    """-sum_v p_v log p_v in nats at every position: logits (..., V) -> (...)."""
    logp = logits.float().log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


# --- text ----------------------------------------------------------------------------------------


def token_lengths(tokenizer, vocab_size):
    """UTF-8 bytes of each token's text, (V,) int64; special tokens stand for no text."""
    lengths = torch.zeros(vocab_size, dtype=torch.int64)
    for token, i in tokenizer.ranks.items():
        lengths[i] = len(token)
    return lengths


def next_token_logits(model, tokens, begin_id=None):
    """Logits (B, T, V) of plain rows; with begin_id attention stays inside the documents that this
    token begins.
    """
    inside = None if begin_id is None else document_mask((tokens == begin_id).cumsum(1))
    return model(tokens, mask=inside)


@torch.no_grad()
def bits_per_byte(model, tokenizer, windows, most=math.inf, mask_documents=True, batch=32):
    """(nats per token, bits per byte) on held-out rows of T + 1 tokens, of which `most` bounds the
    number, each document read on its own unless mask_documents is False. In data-parallel training
    every process computes the same rows, so that all agree on when to stop.
    """
    token_bytes = token_lengths(tokenizer, model.cfg.vocab_size)
    begin_id = tokenizer.begin[0] if mask_documents else None
    nats = tokens = text_bytes = 0
    for part in torch.arange(math.ceil(min(len(windows), most / windows.T))).split(batch):
        rows = windows[part].to(model.device)
        targets = rows[:, 1:]
        logits = next_token_logits(model, rows[:, :-1], begin_id)
        nats -= token_logprobs(logits, targets).double().sum().item()
        tokens += targets.numel()
        text_bytes += token_bytes[targets.cpu()].sum().item()
    return nats / tokens, nats / math.log(2) / max(1, text_bytes)
