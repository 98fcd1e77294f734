"""The safetensors format: parity with the official library, and a refusal for every broken file."""

import json
import random

import pytest
import torch

from nanollm.config import UserError
from nanollm.safetensors import DTYPES, load_file, load_folder, read_header, save_file


def some_tensors():
    """One tensor of every dtype, and the shapes that tend to be forgotten."""
    torch.manual_seed(0)
    tensors = {name: torch.randint(0, 2, (3, 5)).to(dtype) for name, dtype in DTYPES.items()}
    return tensors | {
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "turned": torch.randn(4, 3).T,
        "ä / \n": torch.randn(2, 1, 3),
    }


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert torch.equal(
            tensor.contiguous().reshape(-1).view(torch.uint8),
            theirs[name].contiguous().reshape(-1).view(torch.uint8),
        ), name


def raw_file(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(begin=0, end=4, dtype="F32", shape=(1,)):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# --- round trips -------------------------------------------------------------------------------
def test_what_is_saved_is_loaded(tmp_path):
    save_file(some_tensors(), tmp_path / "a.safetensors")
    assert_same(some_tensors(), load_file(tmp_path / "a.safetensors"))


def test_the_official_library_reads_what_we_write(tmp_path):
    official = pytest.importorskip("safetensors.torch")
    save_file(some_tensors(), tmp_path / "a.safetensors", {"format": "pt"})
    assert_same(some_tensors(), official.load_file(tmp_path / "a.safetensors"))
    with pytest.importorskip("safetensors").safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_we_read_what_the_official_library_writes(tmp_path):
    official = pytest.importorskip("safetensors.torch")
    tensors = {name: tensor.contiguous() for name, tensor in some_tensors().items()}
    official.save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    assert_same(tensors, load_file(tmp_path / "a.safetensors"))
    assert read_header(tmp_path / "a.safetensors")[1] == {"format": "pt"}


@pytest.mark.parametrize("tensors", [{}, {"empty": torch.zeros(0)}, {"one": torch.tensor(True)}])
def test_tiny_files_go_both_ways(tmp_path, tensors):
    official = pytest.importorskip("safetensors.torch")
    save_file(tensors, tmp_path / "ours.safetensors")
    official.save_file(tensors, tmp_path / "theirs.safetensors")
    assert_same(tensors, official.load_file(tmp_path / "ours.safetensors"))
    assert_same(tensors, load_file(tmp_path / "theirs.safetensors"))


def test_every_tensor_lies_aligned(tmp_path):
    save_file(some_tensors(), tmp_path / "a.safetensors")
    for entry in read_header(tmp_path / "a.safetensors")[0].values():
        assert entry.begin % entry.dtype.itemsize == 0


def test_an_unaligned_file_is_read(tmp_path):
    path = raw_file(tmp_path / "a", {"b": entry(0, 1, "U8"), "a": entry(1, 9, "F64")}, bytes(9))
    assert load_file(path)["a"].tolist() == [0.0]


def test_dtype_converts_floats_and_leaves_integers(tmp_path):
    save_file({"w": torch.ones(2), "ids": torch.arange(2)}, tmp_path / "a")
    loaded = load_file(tmp_path / "a", dtype=torch.bfloat16)
    assert (loaded["w"].dtype, loaded["ids"].dtype) == (torch.bfloat16, torch.int64)


def test_loaded_tensors_outlive_the_file(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "a")
    loaded = load_file(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"")
    assert loaded["w"].add_(1).tolist() == [2, 2]


def test_parameters_are_saved_as_plain_tensors(tmp_path):
    save_file({"w": torch.nn.Parameter(torch.ones(2))}, tmp_path / "a")
    assert not load_file(tmp_path / "a")["w"].requires_grad


def test_a_save_that_fails_leaves_the_old_file(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "a")
    with pytest.raises(NotImplementedError):  # a meta tensor has no bytes; found while writing
        save_file({"a": torch.ones(2), "w": torch.ones(2, device="meta")}, tmp_path / "a")
    assert load_file(tmp_path / "a")["w"].tolist() == [1, 1]
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    "tensors, metadata",
    [
        ({"w": torch.ones(2, dtype=torch.complex64)}, None),
        ({"w": torch.ones(2).to_sparse()}, None),
        ({"__metadata__": torch.ones(2)}, None),
        ({"w": torch.ones(2)}, {"steps": 3}),
    ],
)
def test_what_the_format_cannot_hold_is_not_written(tmp_path, tensors, metadata):
    with pytest.raises(TypeError):
        save_file(tensors, tmp_path / "a", metadata)
    assert list(tmp_path.iterdir()) == []


# --- broken files ------------------------------------------------------------------------------
ONE = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
BROKEN = {  # name: (header, data, the length to claim or None, what the message says)
    "a header beyond the file": ({}, b"", 99, "cut off"),
    "a header over 100 MB": ({}, b"", 2**63, "cut off"),
    "bad UTF-8": (b'{"\xff": 1}', b"", None, "cannot be read"),
    "bad JSON": (b'{"a"', b"", None, "cannot be read"),
    "an empty header": (b"", b"", None, "cannot be read"),
    "bottomless JSON": (b"[" * 100_000, b"", None, "cannot be read"),
    "a list for a header": ([], b"", None, "object"),
    "one tensor twice": (b'{"a":%b,"a":%b}' % (ONE, ONE), bytes(4), None, "'a' is there twice"),
    "one key twice": (
        b'{"a":%b}' % ONE.replace(b"{", b'{"dtype":"F32",'),
        bytes(4),
        None,
        "'dtype' is there twice",
    ),
    "a tensor that is no object": ({"a": 3}, b"", None, "needs dtype"),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4), None, "needs dtype"),
    "an unknown dtype": ({"a": entry(dtype="F33")}, bytes(4), None, "unknown dtype 'F33'"),
    "a dtype that is a list": ({"a": entry(dtype=["F32"])}, bytes(4), None, "unknown dtype"),
    "a negative size": ({"a": entry(shape=[-1])}, bytes(4), None, "whole numbers"),
    "a fractional size": ({"a": entry(shape=[1.0])}, bytes(4), None, "whole numbers"),
    "a true size": ({"a": entry(shape=[True])}, bytes(4), None, "whole numbers"),
    "a shape that is a number": ({"a": entry(shape=1)}, bytes(4), None, "whole numbers"),
    "negative offsets": ({"a": entry(-4, 0)}, bytes(4), None, "whole numbers"),
    "offsets backwards": ({"a": entry(4, 0)}, bytes(4), None, "impossible offsets"),
    "three offsets": ({"a": entry() | {"data_offsets": [0, 4, 8]}}, bytes(4), None, "impossible"),
    "too few bytes for the shape": ({"a": entry(shape=[2])}, bytes(4), None, "not (2,) of F32"),
    "a product that overflows 64 bits": (
        {"a": entry(0, 0, shape=[2**32, 2**32])},
        b"",
        None,
        "too large",
    ),
    "an overflow hidden by a zero": (
        {"a": entry(0, 0, shape=[2**40, 2**40, 0])},
        b"",
        None,
        "too large",
    ),
    "65 dimensions": ({"a": entry(shape=[1] * 65)}, bytes(4), None, "too large"),
    "a gap": ({"a": entry(), "b": entry(8, 12)}, bytes(12), None, "leaves a gap behind 'a'"),
    "a gap at the start": ({"a": entry(4, 8)}, bytes(8), None, "leaves a gap behind the header"),
    "an overlap": ({"a": entry(), "b": entry(2, 6)}, bytes(6), None, "'b' overlaps 'a'"),
    "the same bytes twice": ({"a": entry(), "b": entry()}, bytes(4), None, "overlaps"),
    "missing data": ({"a": entry()}, bytes(3), None, "cut off"),
    "trailing bytes": ({"a": entry()}, bytes(5), None, "not all tensors"),
    "metadata that is no object": ({"__metadata__": 3}, b"", None, "__metadata__"),
    "metadata that is no text": ({"__metadata__": {"a": 3}}, b"", None, "__metadata__"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_is_refused_in_one_line_that_names_it_for(name, tmp_path):
    header, data, length, says = BROKEN[name]
    path = raw_file(tmp_path / "broken.safetensors", header, data, length)
    with pytest.raises(UserError) as refusal:
        load_file(path)
    assert says in str(refusal.value)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("size", range(8))
def test_a_file_of_less_than_8_bytes_is_refused(tmp_path, size):
    (tmp_path / "a").write_bytes(bytes(size))
    with pytest.raises(UserError, match="cut off"):
        load_file(tmp_path / "a")


def test_a_header_over_the_limit_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "a", "wb") as file:  # sparse: takes no room on disk
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)
    with pytest.raises(UserError, match="100000001"):
        load_file(tmp_path / "a")


@pytest.mark.parametrize("where", ["missing", "file/below", "."])
def test_a_path_that_is_no_file_is_refused(tmp_path, where):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="no such file|is a folder"):
        load_file(tmp_path / where)


def test_no_damage_gives_anything_but_a_refusal_or_tensors(tmp_path):
    save_file(
        {"w": torch.randn(3, 4), "b": torch.tensor([True]), "ids": torch.arange(3)},
        tmp_path / "good",
        {"format": "pt"},
    )
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


# --- folders -----------------------------------------------------------------------------------
def sharded(folder, weight_map):
    save_file({"a": torch.ones(1)}, folder / "1.safetensors")
    save_file({"b": torch.ones(2)}, folder / "2.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_a_folder_with_one_file_is_read(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    assert load_folder(tmp_path, dtype=torch.float16)["w"].dtype == torch.float16


def test_a_folder_with_shards_is_read(tmp_path):
    tensors = load_folder(sharded(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"}))
    assert {name: len(tensor) for name, tensor in tensors.items()} == {"a": 1, "b": 2}


def test_of_a_tensor_in_two_shards_the_index_chooses_one(tmp_path):
    sharded(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    save_file({"a": torch.zeros(1), "b": torch.ones(2)}, tmp_path / "2.safetensors")
    assert load_folder(tmp_path)["a"].item() == 1


@pytest.mark.parametrize(
    "weight_map, says",
    [
        ({"a": "1.safetensors", "b": "3.safetensors"}, "3.safetensors: no such file"),
        ({"a": "1.safetensors", "c": "2.safetensors"}, "lacks the tensor 'c'"),
        ({"a": "../1.safetensors"}, "file of this folder"),
        ({"a": 1}, "file of this folder"),
        ({}, "file of this folder"),
        (None, "file of this folder"),
    ],
)
def test_an_index_is_refused_that_names_what_is_not_there(tmp_path, weight_map, says):
    with pytest.raises(UserError, match=says):
        load_folder(sharded(tmp_path, weight_map))


def test_an_index_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_folder(tmp_path)


def test_a_pickle_is_named_and_not_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pytorch_model.bin.*convert"):
        load_folder(tmp_path)


@pytest.mark.parametrize("folder, says", [(".", "no model.safetensors"), ("x", "no such folder")])
def test_a_folder_without_weights_is_refused(tmp_path, folder, says):
    with pytest.raises(UserError, match=says):
        load_folder(tmp_path / folder)
