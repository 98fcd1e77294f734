"""From records to batches: a corpus as tokens on disk, windows for pretraining, packed rows for
chat, padded rows for preferences and reinforcement. T is the length of a row in tokens.
"""

import functools
import hashlib
import itertools
import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from nanollm.config import UserError, atomic_folder, atomic_write, read_json
from nanollm.formats import Unusable, identity, images_in, stream_pieces, usable
from nanollm.gpt import document_mask

CACHE = Path("data/cache/corpora")
LONGEST_ROW = 2048  # tokens of a row, unless --context says more


# --- corpora -------------------------------------------------------------------------------------


@dataclass
class Corpus:
    """Texts as tokens on disk: a folder with meta.json and tokens.bin (little-endian uint16 or
    uint32).
    """

    tokens: np.ndarray  # a memory map
    text_bytes: int  # UTF-8 bytes of the text behind the tokens
    documents: int  # each begins with <|endoftext|>

    @classmethod
    def open(cls, folder):
        """From such a folder."""
        meta = read_json(folder / "meta.json")
        tokens = np.memmap(folder / "tokens.bin", meta["dtype"], "r", shape=meta["tokens"])
        return cls(tokens, meta["text_bytes"], meta["documents"])


def write_corpus(pieces, tokenizer, folder):
    """Tokenise a corpus, an iterator of (text, does a document begin with it?), into a new folder,
    <|endoftext|> before each document.
    """
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    tokens = text_bytes = documents = 0
    with atomic_folder(folder) as new, open(new / "tokens.bin", "wb") as file:
        while batch := list(itertools.islice(pieces, 128)):
            texts = [text for text, _ in batch]
            for (text, first), ids in zip(batch, tokenizer.documents(texts)):
                if not first:  # the same document goes on
                    ids = ids[len(tokenizer.begin) :]
                file.write(np.array(ids, dtype=dtype).tobytes())
                tokens += len(ids)
                text_bytes += len(text.encode())
                documents += first
        meta = {"dtype": dtype.str, "tokens": tokens, "text_bytes": text_bytes}
        atomic_write(new / "meta.json", json.dumps(meta | {"documents": documents}))


def open_corpus(tokenizer, *source):
    """The Corpus of what stream_pieces(*source) reads: made once, and found again as long as
    neither files nor tokenizer change.
    """
    path, *part = source
    key = json.dumps([*map(str, [*identity(path), *part]), tokenizer.fingerprint()])
    folder = CACHE / hashlib.sha256(key.encode()).hexdigest()[:24]
    if not folder.is_dir():
        write_corpus(stream_pieces(*source), tokenizer, folder)
    return Corpus.open(folder)


# --- batches -------------------------------------------------------------------------------------


class Sampler:
    """Numbers 0..n-1 in random order, epoch after epoch; its position can be saved."""

    def __init__(self, n, seed=0):
        self.n, self.seed, self.epoch, self.index = n, seed, 0, 0
        self._order = self._permutation()

    def _permutation(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return torch.randperm(self.n, generator=generator)

    def take(self, k):
        """The next k numbers, as an int64 tensor (k,)."""
        if k > 0 and not self.n:
            raise UserError("there are no rows to take from; give more data")
        taken = [self._order[:0]]
        while k > 0:
            if self.index == self.n:
                self.epoch, self.index = self.epoch + 1, 0
                self._order = self._permutation()
            part = self._order[self.index : self.index + k]
            taken.append(part)
            self.index, k = self.index + len(part), k - len(part)
        return torch.cat(taken)

    def state_dict(self):
        return {"n": self.n, "epoch": self.epoch, "index": self.index}

    def load_state_dict(self, state):
        if state["n"] != self.n:
            raise UserError(
                f"the data has changed since the checkpoint: {state['n']} rows then, {self.n} now"
            )
        self.epoch, self.index = state["epoch"], state["index"]
        self._order = self._permutation()


class MixedSampler:
    """Rows of one or several sources, each of which gives its share of them: row n is of the source
    in whose part of [0, 1), as long as its share, n golden mod 1 lies (Weyl 1916), a sequence that
    fills all parts as evenly as can be.
    """

    GOLDEN = (math.sqrt(5) - 1) / 2

    def __init__(self, sources, shares, seed=0):
        self.sources, self.bounds, self.taken = sources, np.cumsum([*shares])[:-1], 0
        self.samplers = [Sampler(len(rows), seed + 1000 * i) for i, rows in enumerate(sources)]

    def take(self, k):
        """The next k rows: a list of those of each source."""
        points = np.arange(self.taken, self.taken + k) * self.GOLDEN % 1
        counts = np.bincount(np.searchsorted(self.bounds, points, "right"), None, len(self.sources))
        self.taken += k
        drawn = zip(self.sources, self.samplers, counts.tolist())
        return [rows[sampler.take(count)] for rows, sampler, count in drawn]

    def state_dict(self):
        return {"taken": self.taken, "samplers": [each.state_dict() for each in self.samplers]}

    def load_state_dict(self, state):
        self.taken = state["taken"]
        for sampler, saved in zip(self.samplers, state["samplers"], strict=True):
            sampler.load_state_dict(saved)


def by_share(shares, metrics):
    """Of the metrics {name: value} of each source their means, weighted by {source: its share}, and
    where there are several sources those of each.
    """
    if len(metrics) == 1:
        return metrics[0]
    each = {f"{key} of {file}": m[key] for file, m in zip(shares, metrics) for key in m}
    means = {k: sum(w * m[k] for w, m in zip(shares.values(), metrics)) for k in metrics[0]}
    return means | each


def row_length(context, model, lengths=()):
    """T, the tokens of a row: --context, or what 99% of the dialogues need, rounded up to 64. That
    is at least 256 and at most LONGEST_ROW, or what the model can read where that is less. Raises
    UserError where --context is more than that. lengths: those of all dialogues, in tokens.
    """
    limit = model.cfg.max_position_embeddings
    T = context or min(256, limit)
    if T > limit:
        raise UserError(f"--context {T} is beyond the model's context of {limit}")
    if context or T == limit or not lengths:
        return T
    most = sorted(lengths)[-1 - len(lengths) // 100]
    return min(max(T, -(-most // 64) * 64), limit, LONGEST_ROW)


class Windows:
    """Rows of T + 1 tokens that tile a corpus, so that each token is predicted once per epoch."""

    def __init__(self, corpus, T):
        self.tokens, self.T = corpus.tokens, T
        if len(self.tokens) <= T:
            few = f"{len(self.tokens)} tokens are too few for one row of {T + 1}"
            raise UserError(f"{few}; use more text or a shorter --context")

    def __len__(self):
        return (len(self.tokens) - 1) // self.T

    def __getitem__(self, numbers):
        """int64 tensor (len(numbers), T + 1)."""
        starts = np.asarray(numbers)[:, None] * self.T
        return torch.from_numpy(self.tokens[starts + np.arange(self.T + 1)].astype(np.int64))


class Rows:
    """What Packed and Completions have in common: tensors of B rows each, and images of some. What
    derives from it is a dataclass; a tensor that isn't there is None, and so are images where all
    is text.
    """

    def __len__(self):
        return len(self.tokens)

    def tensors(self):
        """{name: tensor}."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: x for name, x in values.items() if x is not None and name != "images"}

    def each(self, change):
        """The same with `change` applied to each tensor."""
        return replace(self, **{name: change(x) for name, x in self.tensors().items()})

    def __getitem__(self, numbers):
        """These rows; numbers: an index tensor or a slice."""
        rows = self.each(lambda x: x[numbers])
        if self.images is not None:
            kept = torch.arange(len(self), device=self.tokens.device)[numbers].tolist()
            rows.images = [self.images[i] for i in kept]
        return rows

    def to(self, device):
        return self.each(lambda x: x.to(device, non_blocking=True))

    @classmethod
    def join(cls, parts):
        """The rows of several, padded on the right to the longest."""
        width = max(part.tokens.shape[1] for part in parts)
        wide = [part.each(lambda x: F.pad(x, (0, width - x.shape[1]))) for part in parts]
        names = parts[0].tensors()
        rows = cls(**{name: torch.cat([getattr(part, name) for part in wide]) for name in names})
        if any(part.images is not None for part in parts):
            rows.images = [each for part in parts for each in part.images or [None] * len(part)]
        return rows


@dataclass
class Packed(Rows):
    """Examples packed into rows of T tokens: what SFT trains on."""

    tokens: torch.Tensor  # (B, T) int64
    mask: torch.Tensor  # (B, T) bool: True where the token is trained on
    documents: torch.Tensor  # (B, T) int64: the example of a token; attention stays inside
    positions: torch.Tensor  # (B, T) int64: counted from 0 in each example
    images: list | None = None  # per row the numbers of its images, in order, or None

    def image_numbers(self):
        """The numbers of all images, row after row."""
        return [number for row in self.images or () for number in row or ()]


def pack(examples, T, pad_id, images=None):
    """First-fit packing of (ids, mask) examples, each at most T long, into rows of T tokens.

    Padding is a document of its own, never trained on. Longest first, so that few gaps stay.
    `images` holds the numbers of each example's images.
    """
    rows, room, open_rows = [], [], []  # row -> its examples, row -> tokens left, rows to fill
    for i in sorted(range(len(examples)), key=lambda i: -len(examples[i][0])):
        length = len(examples[i][0])
        row = next((r for r in open_rows if room[r] >= length), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(T)
            open_rows.append(row)
        rows[row].append(i)
        room[row] -= length
        if room[row] < 8:
            open_rows.remove(row)
        elif len(open_rows) > 64:  # the oldest has little room: bounds the search
            open_rows.pop(0)
    shape = len(rows), T
    tokens, documents = torch.full(shape, pad_id), torch.full(shape, -1)
    mask, positions = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.int64)
    for r, members in enumerate(rows):
        start = 0
        for number, i in enumerate(members):
            ids, trained = examples[i]
            part = slice(start, start + len(ids))
            tokens[r, part], mask[r, part] = torch.tensor(ids), torch.tensor(trained)
            documents[r, part], positions[r, part] = number, torch.arange(len(ids))
            start += len(ids)
    if images is not None:
        images = [[p for i in members for p in images[i]] for members in rows]
    return Packed(tokens, mask, documents, positions, images)


def last_true(mask):
    """Column of the last True of each row, (B,); every row of mask (B, T) holds one."""
    return mask.shape[1] - 1 - mask.flip(1).long().argmax(1)


@dataclass
class Completions(Rows):
    """Prompts with a completion each, one per row: what preferences and reinforcement train on."""

    tokens: torch.Tensor  # (B, T) int64: prompt, completion, padding
    mask: torch.Tensor  # (B, T) bool: True on those of the completion that the model chose
    real: torch.Tensor  # (B, T) bool: False on padding
    images: list | None = None  # per row what a VLM takes as images, a tensor (n, ...), or None

    def __getitem__(self, numbers):
        """These rows, without columns that are padding in all of them."""
        rows = super().__getitem__(numbers)
        used = rows.real.any(0).nonzero()[:, 0]
        columns = slice(int(used[0]), int(used[-1]) + 1)
        return rows.each(lambda x: x[:, columns])

    def last(self):
        """Column of each row's last real token, (B,): found by the mask, not by comparing ids."""
        return last_true(self.real)

    def inputs(self):
        """(tokens, positions, mask) for a model. Rows padded on the right alone need no mask:
        causal attention never looks at what comes later.
        """
        if self.real[:, 0].all():
            return self.tokens, None, None
        positions = (self.real.cumsum(1) - 1).clamp(min=0)
        return self.tokens, positions, document_mask(self.real.long())

    def shown(self):
        """What a model is given beside the inputs: the images of all rows, in order, if any."""
        some = [each for each in self.images or () if each is not None and len(each)]
        return {"images": torch.cat(some).to(self.tokens.device)} if some else {}


def pad_completions(prompts, completions, pad_id, own=None, images=None):
    """Completions from lists of ids, one completion per prompt, padded on the right.

    `own` holds a bool for each id of each completion: False where it is not to be trained on.
    `images`: those of each prompt, as Completions keeps them.
    """
    lengths = torch.tensor([[len(p), len(p) + len(r)] for p, r in zip(prompts, completions)])
    ids = [torch.tensor([*p, *r]) for p, r in zip(prompts, completions)]
    tokens = pad_sequence(ids, batch_first=True, padding_value=pad_id)
    columns = torch.arange(tokens.shape[1])
    real = columns < lengths[:, 1:]
    mask = real & (columns >= lengths[:, :1])
    if own is not None:
        mask[mask.clone()] = torch.tensor([each for row in own for each in row])
    return Completions(tokens, mask, real, images)


# --- dialogues -----------------------------------------------------------------------------------


def pack_chats(chats, tokenizer, T, name, rt, image_tokens=0, store=None):
    """Packed rows of T tokens; says what was cut and what was dropped. UserError when that is more
    than what is left to train on.

    T may also be what makes it of the lengths of all dialogues. With a `store` (vision/images.py)
    of images, each takes `image_tokens` in a row; those that were shown after the cut are left out,
    and none is ever cut.
    """

    def render(messages):
        """Ids and mask as arrays, of 5 bytes a token; in lists they take about 40."""
        ids, mask = tokenizer.render(messages, image_tokens=image_tokens)
        return np.array(ids, np.int32), np.array(mask, bool)

    def whole(chat):
        return chat | {"rendered": render(chat["messages"])}

    rendered = usable(chats, whole, f"{name} dialogues")
    if callable(T):
        T = T([len(chat["rendered"][0]) for chat in rendered])
    advice = "raise --context"
    if image_tokens:
        advice += f"; an image takes {image_tokens} tokens of it"
    fit = functools.partial(fit_chat, T, render)
    kept, examples, shortened = zip(*usable(rendered, fit, f"{name} dialogues", advice))
    images, note = None, ""
    if store is not None:
        paths = [chat.get("images", [])[: images_in(chat["messages"])] for chat in kept]
        images = list(map(store.numbers, paths))
        note = f" with {sum(map(len, images))} images"
    rows = pack(examples, T, tokenizer.pad_id, images)
    rt.print(
        f"{name}: {len(kept)} dialogues{note} in {len(rows)} rows of {T} tokens, "
        f"{rows.mask.sum():,} trained on; {sum(shortened)} shortened, {len(chats) - len(kept)} "
        "dropped"
    )
    return rows


def fit_chat(T, render, chat):
    """(the dialogue as far as it fits, its (ids, mask), was it shortened?): cut after the last of
    the assistant's turns with which it has at most T tokens. Unusable where that leaves nothing to
    learn. "rendered" is what `render` makes of the whole dialogue.
    """
    messages, reason = chat["messages"], "no answer that is trained on"
    ends = [i + 1 for i, message in enumerate(messages) if message["role"] == "assistant"]
    for end in reversed(ends):
        ids, mask = chat["rendered"] if end == len(messages) else render(messages[:end])
        if mask.any() and len(ids) <= T:
            return {**chat, "messages": messages[:end]}, (ids, mask), end < ends[-1]
        if mask.any():
            reason = f"its first answer ends beyond {T} tokens"
    raise Unusable(reason)
