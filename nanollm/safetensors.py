"""The safetensors format: tensors in a file that cannot run code, read without trusting it.

    8 bytes     N, the length of the header: unsigned, little-endian, at most 100 MB
    N bytes     JSON {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__"?: {}}
    the rest    the tensors' bytes, little-endian, end to end: offsets count from here, and
                neither gaps nor overlaps nor anything behind the last tensor are allowed

Format: https://github.com/huggingface/safetensors (README, "Format").
"""

import json
import math
from collections import namedtuple
from pathlib import Path

import torch

from nanollm.config import UserError, atomic_file

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000

Entry = namedtuple("Entry", "dtype shape begin end")  # begin and end: positions in the file


# --- writing -----------------------------------------------------------------------------------
def save_file(tensors, path, metadata=None):
    """Writes {name: tensor} as one file, or leaves the old file as it was.

    Tensors that share memory are written once each. `metadata` is {str: str}; transformers wants
    {"format": "pt"}. Raises TypeError for what the format cannot hold.
    """
    header, begin = {}, 0
    if metadata is not None:
        header["__metadata__"] = metadata
    if not all(isinstance(text, str) for pair in (metadata or {}).items() for text in pair):
        raise TypeError("metadata must map strings to strings")
    # widest first: as the header fills a multiple of 8 bytes, every tensor then lies aligned
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name in order:
        tensor = tensors[name]
        if name == "__metadata__" or tensor.dtype not in NAMES or tensor.layout != torch.strided:
            raise TypeError(f"safetensors cannot hold {name!r} ({tensor.dtype}, {tensor.layout})")
        end = begin + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[name]["data_offsets"] = [begin, end]
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = tensors[name].detach().cpu().contiguous()
            file.write(tensor.reshape(-1).view(torch.uint8).numpy())


# --- reading -----------------------------------------------------------------------------------
def load_file(path, device="cpu", dtype=None):
    """{name: tensor} of one file. `dtype` converts floating-point tensors only. Raises UserError.

    The file is mapped into memory and copied tensor by tensor, so the peak is the model plus one
    tensor, and the file may be replaced while the tensors live.
    """
    entries, _ = read_header(path)
    size = max([entry.end for entry in entries.values()], default=0)
    mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)  # (size,)
    tensors = {}
    for name, (stored, shape, begin, end) in entries.items():
        raw = mapped[begin:end]
        raw = raw != 0 if stored is torch.bool else raw.clone()  # the clone is aligned
        tensor = raw.view(stored).reshape(shape)
        to = dtype if dtype and stored.is_floating_point else stored
        tensors[name] = tensor.to(device=device, dtype=to)
    return tensors


def read_header(path):
    """({name: Entry}, metadata) of one file, every rule of the format checked. Raises UserError."""
    path = Path(path)
    if not path.is_file():
        why = "is a directory; name a safetensors file" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {why}")
    with open(path, "rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise UserError(
                f"{path} is cut off, or not a safetensors file: {size} bytes, and the header "
                f"would have {length}"
            )
        header = parse_json(file.read(length), path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise UserError(f"{path}: __metadata__ must map names to strings")
    entries = {name: read_entry(name, info, 8 + length, path) for name, info in header.items()}
    position, last = 8 + length, "the header"
    for name, entry in sorted(entries.items(), key=lambda each: each[1][2:]):
        if entry.begin != position:
            fault = "overlaps" if entry.begin < position else "leaves a gap behind"
            raise UserError(f"{path}: tensor {name!r} {fault} {last}")
        position, last = entry.end, repr(name)
    if position != size:
        fault = "cut off; fetch it again" if size < position else "more than its tensors"
        raise UserError(f"{path} should have {position} bytes but has {size}: it is {fault}")
    return entries, metadata


def read_entry(name, info, start, path):
    """The Entry of one tensor; `start` is where the data begins in the file."""
    try:
        dtype, shape, (begin, end) = DTYPES[info["dtype"]], info["shape"], info["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))  # True is an int, too
        # torch counts in 63 bits, even where a 0 makes the tensor empty, and allows 64 dimensions
        fits = whole and len(shape) <= 64 and math.prod(n or 1 for n in shape) < 2**63
        if fits and math.prod(shape) * dtype.itemsize == end - begin:
            return Entry(dtype, tuple(shape), start + begin, start + end)
    except (KeyError, TypeError, ValueError):
        pass
    raise UserError(
        f"{path}: tensor {name!r} must have a known dtype, a shape of whole numbers, and the "
        f"data_offsets of as many bytes, not {info!r:.100}"
    )


def unique(pairs):
    """A JSON object's dict. Of two equal keys Python keeps the last; we refuse both."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"a key is there twice, among {[name for name, _ in pairs]}"[:200])
    return dict(pairs)


def parse_json(text, path):
    """The JSON object in these bytes."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: the JSON in it cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: the JSON in it must be an object")
    return value


def load_folder(folder, device="cpu", dtype=None):
    """{name: tensor} of a model folder: model.safetensors, or the shards that its index names."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return load_file(folder / "model.safetensors", device, dtype)
    if not index.exists():
        pickles = [*folder.glob("*model*.bin"), *folder.glob("*model*.pt*")]
        why = (
            " but a pickle ({0.name}), which may run any code; convert it first" if pickles else ""
        )
        raise UserError(f"{folder} holds no model.safetensors" + why.format(*pickles))
    shard_of = parse_json(index.read_bytes(), index).get("weight_map")
    named = shard_of.values() if isinstance(shard_of, dict) and shard_of else [None]
    if not all(isinstance(shard, str) and Path(shard).name == shard for shard in named):
        raise UserError(f"{index}: weight_map must map each tensor to a file of this directory")
    tensors, unnamed = {}, set()
    for shard in sorted({*named}):
        loaded = load_file(folder / shard, device, dtype)
        unnamed |= loaded.keys() - shard_of.keys()
        for name in (name for name in shard_of if shard_of[name] == shard):
            if name not in loaded:
                raise UserError(f"{folder / shard} lacks the tensor {name!r} that the index names")
            tensors[name] = loaded[name]
    if unnamed:
        raise UserError(f"{index} doesn't name {min(unnamed)!r}, which is in one of its files")
    return tensors
