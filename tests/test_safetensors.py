"""The safetensors format: parity with the official library, and a refusal for every broken file."""

import json
import random
import re

import pytest
import torch

from nanollm.config import UserError
from nanollm.safetensors import DTYPES, load_file, load_folder, read_header, save_file


def some_tensors():
    """One tensor of every dtype, and the shapes that tend to be forgotten."""
    torch.manual_seed(0)
    tensors = {name: torch.randint(0, 2, (3, 5)).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4)}
    return tensors | {"turned": torch.randn(4, 3).T, "ä / \n": torch.randn(2, 1, 3)}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        a, b = (x.contiguous().reshape(-1).view(torch.uint8) for x in (tensor, theirs[name]))
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert torch.equal(a, b), name


def raw_file(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(begin=0, end=4, dtype="F32", shape=(1,)):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# --- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tensors", [some_tensors(), {}])
def test_ours_and_the_official_library_read_each_others_files(tensors, tmp_path):
    official = pytest.importorskip("safetensors.torch")
    save_file(tensors, tmp_path / "ours")
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    official.save_file(plain, tmp_path / "theirs", {"format": "pt"})
    assert_same(tensors, official.load_file(tmp_path / "ours"))
    assert_same(tensors, load_file(tmp_path / "theirs"))
    assert_same(tensors, load_file(tmp_path / "ours"))
    for path in (tmp_path / "ours", tmp_path / "theirs"):
        assert read_header(path)[1] == {"format": "pt"}


def test_every_tensor_lies_aligned_and_an_unaligned_file_is_read(tmp_path):
    save_file(some_tensors(), tmp_path / "a")
    assert all(e.begin % e.dtype.itemsize == 0 for e in read_header(tmp_path / "a")[0].values())
    path = raw_file(tmp_path / "b", {"b": entry(0, 1, "U8"), "a": entry(1, 9, "F64")}, bytes(9))
    assert load_file(path)["a"].tolist() == [0.0]


def test_parameters_are_loaded_as_plain_tensors_that_outlive_the_file(tmp_path):
    save_file({"w": torch.nn.Parameter(torch.ones(2))}, tmp_path / "a")
    loaded = load_file(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"")
    assert loaded["w"].add_(1).tolist() == [2, 2] and not loaded["w"].requires_grad


# --- broken files --------------------------------------------------------------------------------

FILES = {  # name: (header, data, the length to claim or None, what the message says)
    "a header beyond the file": ({}, b"", 99, "cut off, or not a safetensors file"),
    "bad UTF-8": (b'{"\xff": 1}', b"", None, "damaged"),
    "a list for a header": ([], b"", None, "damaged"),
    "missing data": ({"a": entry()}, bytes(3), None, "fetch it again"),
    "trailing bytes": ({"a": entry()}, bytes(5), None, "fetch it again"),
}
ENTRIES = {  # entries that contradict themselves
    "a tensor that is no object": 3,
    "an unknown dtype": entry(dtype="F33"),
    "a negative size": entry(shape=[-1]),
    "negative offsets": entry(-4, 0),
    "too few bytes for the shape": entry(shape=[2]),
}
BROKEN = FILES | {name: ({"a": info}, bytes(4), None, "damaged") for name, info in ENTRIES.items()}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_is_refused_in_one_line_that_names_it_for(name, tmp_path):
    header, data, length, says = BROKEN[name]
    path = raw_file(tmp_path / "broken.safetensors", header, data, length)
    with pytest.raises(UserError) as refusal:
        load_file(path)
    said = str(refusal.value)
    assert re.search(says, said) and str(path) in said and "\n" not in said


def test_no_damage_gives_anything_but_a_refusal_or_tensors(tmp_path):
    tensors = {"w": torch.randn(3, 4), "b": torch.tensor([True]), "ids": torch.arange(3)}
    save_file(tensors, tmp_path / "good", {"format": "pt"})
    good, chance, outcomes = (tmp_path / "good").read_bytes(), random.Random(0), set()
    for _ in range(300):
        broken = bytearray(good)
        for _ in range(chance.randint(0, 3)):
            broken[chance.randrange(len(broken))] ^= 1 << chance.randrange(8)
        if chance.random() < 0.3:
            del broken[chance.randrange(len(broken)) :]
        (tmp_path / "bad").write_bytes(broken)
        try:
            for tensor in load_file(tmp_path / "bad").values():
                tensor.sum()
            outcomes.add("loaded")
        except UserError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert outcomes == {"loaded", "refused"}


# --- directories ---------------------------------------------------------------------------------


def sharded(folder, weight_map):
    save_file({"a": torch.ones(1), "b": torch.zeros(3)}, folder / "1.safetensors")
    save_file({"b": torch.ones(2)}, folder / "2.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_of_shards_the_tensors_are_read_that_the_index_names(tmp_path):
    tensors = load_folder(sharded(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"}))
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {"a": [1], "b": [1, 1]}


@pytest.mark.parametrize(
    "weight_map, says",
    [
        ({"a": "1.safetensors", "b": "3.safetensors"}, "3.safetensors does not exist"),
        ({"a": "../1.safetensors"}, "file of this directory"),
        ({}, "file of this directory"),
    ],
)
def test_an_index_is_refused_that_names_what_is_not_there(tmp_path, weight_map, says):
    with pytest.raises(UserError, match=says):
        load_folder(sharded(tmp_path, weight_map))


def test_a_directory_without_weights_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match="holds no model.safetensors.*pickle.*must be converted"):
        load_folder(tmp_path)
