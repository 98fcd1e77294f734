"""The safetensors format: tensors in a file that cannot run code, read without trusting it.

    8 bytes     N, the length of the header: unsigned, little-endian
    N bytes     JSON {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__"?: {}}
    the rest    the tensors' bytes, little-endian, end to end: offsets count from here

Format: https://github.com/huggingface/safetensors (README, "Format").
"""

import json
import math
from collections import namedtuple
from pathlib import Path

import torch

from nanollm.config import UserError, atomic_file, read_json
from nanollm.formats import need

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
INDEX = "model.safetensors.index.json"

Entry = namedtuple("Entry", "dtype shape begin end")  # begin and end: positions in the file


# --- writing -------------------------------------------------------------------------------------


def save_file(tensors, path, metadata=None):
    """Writes {name: tensor} as one file, or leaves the old file as it was.

    Tensors that share memory are written once each. `metadata` is {str: str}.
    """
    header, begin = {"__metadata__": {"format": "pt"} | (metadata or {})}, 0  # as transformers asks
    # widest first: as the header fills a multiple of 8 bytes, every tensor then lies aligned
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name in order:
        tensor, end = tensors[name], begin + tensors[name].nbytes
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


# --- reading -------------------------------------------------------------------------------------


def load_file(path):
    """{name: tensor} of one file. Raises UserError.

    The file is mapped into memory and copied tensor by tensor, so the peak is the model plus one
    tensor, and the file may be replaced while the tensors live.
    """
    entries, _ = read_header(path)
    size = Path(path).stat().st_size
    mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)  # (size,)
    tensors = {}
    for name, (dtype, shape, begin, end) in entries.items():
        raw = mapped[begin:end].clone()  # which is aligned
        tensors[name] = raw.view(dtype).reshape(shape)
    return tensors


def read_header(path):
    """({name: Entry}, metadata) of one file, whose tensors lie inside of it. Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist")
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        need(start <= size, path, "cut off, or not a safetensors file")
        text = file.read(start - 8)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        entries = {name: read_entry(info, start) for name, info in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: damaged, or not a safetensors file ({e!r:.100})") from None
    end = max([start, *(entry.end for entry in entries.values())])
    need(end == size, path, f"should have {end} bytes but has {size}; fetch it again")
    return entries, metadata


def read_entry(info, start):
    """The Entry of one tensor; `start` is where the data begins in the file."""
    dtype, shape, (begin, end) = DTYPES[info["dtype"]], info["shape"], info["data_offsets"]
    whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    if not whole or math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"a tensor is {info}")
    return Entry(dtype, tuple(shape), start + begin, start + end)


# --- folders -------------------------------------------------------------------------------------


def load_folder(folder):
    """{name: tensor} of a model folder: model.safetensors, or the shards that its index names."""
    whole, index = Path(folder) / "model.safetensors", Path(folder) / INDEX
    if whole.exists():
        return load_file(whole)
    if not index.exists():
        convert = "weights in other files (a pickle may run any code) must be converted first"
        raise UserError(f"{folder} holds no model.safetensors; {convert}")
    shard_of, tensors = read_index(index), {}
    for shard in sorted({*shard_of.values()}):
        loaded = load_file(index.parent / shard)
        # another shard may hold an older tensor of a name
        tensors |= {name: x for name, x in loaded.items() if shard_of.get(name) == shard}
    return tensors


def read_index(path):
    """{tensor: file beside the index} of the shards of a model. Raises UserError."""
    shard_of = read_json(path).get("weight_map", {})
    beside = all(Path(shard).name == shard for shard in shard_of.values())
    need(shard_of and beside, path, "weight_map must map each tensor to a file of this directory")
    return shard_of
