"""From records to batches: token shards on disk, windows for pretraining, packed rows for chat,
padded rows for preferences and reinforcement. T is the length of a row in tokens.
"""

import functools
import hashlib
import itertools
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from nanollm.config import UserError, atomic_folder, atomic_write
from nanollm.formats import Unusable, identity, images_in, read_documents, usable
from nanollm.gpt import document_mask

CACHE = Path("data/cache/tokens")
SHARD_TOKENS = 2**27  # tokens per shard file
LONGEST_ROW = 2048  # tokens of a row, unless --context says more


# --- token shards --------------------------------------------------------------------------------


@dataclass
class TokenShards:
    """A corpus as tokens on disk: a folder with meta.json and shard_*.bin (little-endian uint16 or
    uint32).
    """

    arrays: list  # memory maps
    tokens: int
    text_bytes: int  # UTF-8 bytes of the text behind the tokens
    documents: int  # each begins with <|endoftext|>

    @classmethod
    def open(cls, folder, tokenizer):
        """From a folder of shards; UserError where it is damaged, or of another tokenizer."""
        folder = Path(folder)
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            arrays = [np.memmap(folder / n, dtype=meta["dtype"], mode="r") for n in meta["shards"]]
            shards = cls(arrays, meta["tokens"], meta["text_bytes"], meta["documents"])
            made_with = meta["tokenizer"]
        except (FileNotFoundError, KeyError, TypeError, ValueError) as e:
            wanted = "must be a directory of token shards; delete it to have it made anew"
            raise UserError(f"{folder} {wanted} ({e})") from None
        if made_with != tokenizer.fingerprint():
            raise UserError(
                f"the tokens in {folder} were made with another tokenizer; tokenize the text again"
            )
        if sum(map(len, arrays)) != shards.tokens:
            raise UserError(f"{folder} is truncated; delete it to have it made anew")
        return shards


def write_shards(documents, tokenizer, folder):
    """Tokenise documents (str) into a new folder of shards, <|endoftext|> before each."""
    dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
    names, pending, tokens, text_bytes, count = [], [], 0, 0, 0
    with atomic_folder(folder) as new:
        documents = iter(documents)
        batches = iter(lambda: list(itertools.islice(documents, 1024)), [])
        for batch in itertools.chain(batches, [[]]):  # the empty one writes the rest
            for text, ids in zip(batch, tokenizer.documents(batch)):
                pending.append(np.array(ids, dtype=dtype))
                tokens += len(ids)
                text_bytes += len(text.encode())
            count += len(batch)
            if pending and (not batch or sum(map(len, pending)) >= SHARD_TOKENS):
                names.append(f"shard_{len(names):05d}.bin")
                np.concatenate(pending).tofile(new / names[-1])
                pending = []
        meta = {"dtype": dtype, "tokenizer": tokenizer.fingerprint(), "shards": names}
        meta |= {"tokens": tokens, "text_bytes": text_bytes, "documents": count}
        atomic_write(new / "meta.json", json.dumps(meta))


def load_shards(documents, source, tokenizer):
    """TokenShards of a corpus, made once and found again by the identity of source and tokenizer.

    documents: a function that returns the texts; source: what identifies them (path, size, part).
    """
    identity = json.dumps([*map(str, source), tokenizer.fingerprint()])
    folder = CACHE / hashlib.sha256(identity.encode()).hexdigest()[:24]
    if not folder.is_dir():
        write_shards(documents(), tokenizer, folder)
    return TokenShards.open(folder, tokenizer)


def text_shards(path, tokenizer):
    """TokenShards of a corpus, as read_documents reads it."""
    return load_shards(lambda: read_documents(path), identity(path), tokenizer)


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
    """Rows of T + 1 tokens that tile the shards, so that each token is predicted once per epoch."""

    def __init__(self, shards, T):
        self.arrays, self.T = shards.arrays, T
        counts = [max(0, (len(a) - 1) // T) for a in self.arrays]
        self.ends = np.cumsum(counts)
        self.n = sum(counts)
        if self.n == 0:
            few = f"{shards.tokens} tokens are too few for one row of {T + 1}"
            raise UserError(f"{few}; use more text or a shorter --context")

    def __len__(self):
        return self.n

    def __getitem__(self, numbers):
        """int64 tensor (len(numbers), T + 1)."""
        out = np.empty((len(numbers), self.T + 1), dtype=np.int64)
        for row, number in enumerate(np.asarray(numbers)):
            shard = int(np.searchsorted(self.ends, number, side="right"))
            start = (int(number) - (int(self.ends[shard - 1]) if shard else 0)) * self.T
            out[row] = self.arrays[shard][start : start + self.T + 1]
        return torch.from_numpy(out)


def picked(images, numbers):
    """The images of these rows, of a list with an entry for each row; None of None."""
    if images is None:
        return None
    rows = torch.arange(len(images), device=getattr(numbers, "device", None))
    return [images[i] for i in rows[numbers].tolist()]


class Rows:
    """What Packed and Completions have in common: tensors of B rows each, and images of some. What
    derives from it is a dataclass; a tensor that isn't there is None.
    """

    def __len__(self):
        return len(self.tokens)

    def tensors(self):
        return [getattr(self, field.name) for field in fields(self) if field.name != "images"]

    def each(self, change):
        """The same with `change` applied to each tensor."""
        names = (field.name for field in fields(self) if field.name != "images")
        tensors = {name: getattr(self, name) for name in names}
        return replace(self, **{n: change(x) for n, x in tensors.items() if x is not None})

    def to(self, device):
        return self.each(lambda x: x.to(device, non_blocking=True))


@dataclass
class Packed(Rows):
    """Examples packed into rows of T tokens: what SFT trains on."""

    tokens: torch.Tensor  # (B, T) int64
    mask: torch.Tensor  # (B, T) bool: True where the token is trained on
    documents: torch.Tensor  # (B, T) int64: the example of a token; attention stays inside
    positions: torch.Tensor  # (B, T) int64: counted from 0 in each example
    # per row the numbers of its images, in the order of their placeholders; None: all is text
    images: list | None = None

    def __getitem__(self, numbers):
        """These rows; numbers: an index tensor or a slice."""
        return Packed(*(x[numbers] for x in self.tensors()), picked(self.images, numbers))

    def join(self, other):
        """The rows of both."""
        images = None
        if self.images is not None or other.images is not None:
            images = [p for rows in (self, other) for p in rows.images or [[]] * len(rows)]
        return Packed(*map(torch.cat, zip(self.tensors(), other.tensors())), images)

    def image_numbers(self):
        """The numbers of all images, row after row."""
        return [number for row in self.images or () for number in row]


def pack(examples, T, pad_id, images=None):
    """First-fit packing of (ids, mask) examples, each at most T long, into rows of T tokens.

    Padding is a document of its own, never trained on. Longest first, so that few gaps stay.
    `images` holds the numbers of each example's images.
    """
    rows, room, open_rows = [], [], []  # row -> its examples, row -> tokens left, rows to fill
    for i in sorted(range(len(examples)), key=lambda i: -len(examples[i][0])):
        need = len(examples[i][0])
        row = next((r for r in open_rows if room[r] >= need), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(T)
            open_rows.append(row)
        rows[row].append(i)
        room[row] -= need
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
    mask: torch.Tensor  # (B, T) bool: True on the completion's tokens, its end of turn included
    real: torch.Tensor  # (B, T) bool: False on padding
    # per row what a VLM takes as images, a tensor (n, ...), or None; None: all is text
    images: list | None = None

    def __getitem__(self, numbers):
        """These rows, without columns that are padding in all of them."""
        real = self.real[numbers]
        used = real.any(0).nonzero()[:, 0]
        columns = slice(int(used[0]), int(used[-1]) + 1)
        tensors = (x[numbers][:, columns] for x in self.tensors())
        return Completions(*tensors, picked(self.images, numbers))

    @classmethod
    def join(cls, parts):
        """The rows of several, padded on the right to the longest."""
        width = max(part.tokens.shape[1] for part in parts)
        columns = zip(*(part.tensors() for part in parts))
        padded = ([F.pad(x, (0, width - x.shape[1])) for x in xs] for xs in columns)
        images = None
        if any(part.images is not None for part in parts):
            images = [p for part in parts for p in part.images or [None] * len(part)]
        return cls(*map(torch.cat, padded), images)

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
    tokens = torch.full((len(prompts), int(lengths.max())), pad_id)
    for row, (prompt, completion) in enumerate(zip(prompts, completions)):
        tokens[row, : lengths[row, 1]] = torch.tensor([*prompt, *completion])
    columns = torch.arange(tokens.shape[1])
    real = columns < lengths[:, 1:]
    mask = real & (columns >= lengths[:, :1])
    if own is not None:
        mask[mask.clone()] = torch.tensor([each for row in own for each in row])
    return Completions(tokens, mask, real, images)


# --- dialogues -----------------------------------------------------------------------------------


def fit_chat(T, tokenizer, image_tokens, chat, where):
    """(the dialogue as far as it fits, its (ids, mask), was it shortened?): cut after the last of
    the assistant's turns with which it has at most T tokens. Unusable where that leaves nothing to
    learn. What `render` makes of the whole chat may stand under "rendered".
    """
    messages, reason = chat["messages"], "no answer that is trained on"
    takes = f", of which an image takes {image_tokens}" * bool(image_tokens)
    ends = [i + 1 for i, message in enumerate(messages) if message["role"] == "assistant"]
    for end in reversed(ends):
        known = chat.get("rendered") if end == len(messages) else None
        ids, mask = known or tokenizer.render(messages[:end], image_tokens=image_tokens)
        if any(mask) and len(ids) <= T:
            return {**chat, "messages": messages[:end]}, (ids, mask), end < ends[-1]
        reason = f"its first answer ends beyond {T} tokens{takes}" if any(mask) else reason
    raise Unusable(where, reason)


def pack_chats(chats, tokenizer, T, name, rt, image_tokens=0, store=None):
    """Packed rows of T tokens; says what was cut and what was dropped. UserError when that is more
    than what is left to train on.

    T may also be what makes it of the lengths of all dialogues. With a `store` (vision/images.py)
    of images, each takes `image_tokens` in a row; those that were shown after the cut are left out,
    and none is ever cut.
    """
    if callable(T):

        def rendered(chat, _):
            ids_and_mask = tokenizer.render(chat["messages"], image_tokens=image_tokens)
            return chat | {"rendered": ids_and_mask}

        chats = usable(chats, rendered, "dialogues")
        T = T([len(chat["rendered"][0]) for chat in chats])
    fit = functools.partial(fit_chat, T, tokenizer, image_tokens)
    fitted = usable(chats, fit, f"{name} dialogues", "raise --context")
    kept, examples, shortened = zip(*fitted)
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
