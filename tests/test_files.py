"""Reading one tensor at a time, against the library's reading of the whole file."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixofshow.errors import ConceptFileError
from mixofshow.files import TensorFile, write_tensors

KINDS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
SHAPES = ((), (1,), (7,), (3, 5), (2, 3, 4), (1, 2, 3, 4), (0,), (0, 3))


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """Of every kind and shape, under names in no order."""
    generator = torch.Generator().manual_seed(0)
    found = {
        f"{kind} {shape}": (100 * torch.randn(shape, generator=generator)).to(kind)
        for kind in KINDS
        for shape in SHAPES
    }
    return dict(random.Random(0).sample(sorted(found.items()), len(found)))


@pytest.fixture(params=["ours", "the library's"])
def path(tensors, tmp_path, request) -> Path:
    write = write_tensors if request.param == "ours" else lambda path, *rest: save_file(rest[0], path, rest[1])
    write(tmp_path / "some.safetensors", tensors, {"format": "pt", "about": "é, “quoted”"})
    return tmp_path / "some.safetensors"


def test_every_tensor_is_as_the_library_reads_it(path):
    file, whole = TensorFile(path), load_file(path)
    assert file.metadata == {"format": "pt", "about": "é, “quoted”"}
    for name, tensor in whole.items():
        assert name in file
        found = file.read(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found, tensor), name
    assert "something else" not in file


def test_a_file_is_read_again_where_it_was_changed_after_opening(path, tensors):
    # Nothing is mapped: what is gone is an error, not a dead process.
    file = TensorFile(path)
    path.write_bytes(path.read_bytes()[:-200])
    refused = 0
    for name in tensors:
        try:
            file.read(name)
        except ConceptFileError as error:
            assert str(error).startswith(f"{path}: ")
            refused += 1
    assert 0 < refused < len(tensors)
    path.unlink()
    with pytest.raises(ConceptFileError, match="cannot be read"):
        file.read(next(iter(tensors)))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.3, 0.6, 0.9, 0.9999])
def test_cut_files_are_refused(share, path):
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ConceptFileError, match="empty|too short|cut") as raised:
        TensorFile(path)
    assert str(raised.value).startswith(f"{path}: ")


@pytest.mark.parametrize("surplus", [1, 8, 10_000])
def test_surplus_bytes_are_refused(surplus, path):
    path.write_bytes(path.read_bytes() + b"\0" * surplus)
    with pytest.raises(ConceptFileError, match=f"{surplus} surplus bytes"):
        TensorFile(path)


@pytest.mark.parametrize("what", ["nothing", "a folder", "a pipe", "a pickle"])
def test_what_is_no_such_file_is_refused(what, tmp_path):
    path = tmp_path / "it.safetensors"
    if what == "a folder":
        path.mkdir()
    elif what == "a pipe":
        os.mkfifo(path)  # opening it would wait for ever
    elif what == "a pickle":
        torch.save({"a": torch.zeros(3)}, path)
    with pytest.raises(ConceptFileError) as raised:
        TensorFile(path)
    assert str(raised.value).startswith(f"{path}: ")


def test_a_tensor_that_is_not_there_is_an_error_that_names_the_file(path):
    with pytest.raises(ConceptFileError, match="some.safetensors: tensor 'something else'"):
        TensorFile(path).read("something else")


def test_files_are_byte_for_byte_the_librarys_but_for_the_order_of_metadata(tmp_path):
    kinds = (
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
    )
    tensors = {f"{name}{kind}": torch.arange(size).to(kind) for kind in kinds for name, size in (("b", 3), ("a", 8))}
    tensors |= {
        "empty": torch.zeros(0, 4),
        "turned": torch.arange(6.0).view(2, 3).T.contiguous(),
        "one": torch.tensor(2.0),
    }
    save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    write_tensors(tmp_path / "ours.safetensors", tensors, {"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_tensors_that_lie_scattered_are_written_in_order(tmp_path):
    turned = torch.arange(6.0).view(2, 3).T
    write_tensors(tmp_path / "ours.safetensors", {"turned": turned}, {})
    assert torch.equal(load_file(tmp_path / "ours.safetensors")["turned"], turned)
