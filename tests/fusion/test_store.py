"""Recordings in files: what is lost in storing them, and that no damage goes unseen."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mixofshow.errors import BadInputError, ConceptFileError, SettingsError
from mixofshow.files import write_tensors
from mixofshow.fusion import store as stores
from mixofshow.fusion.statistics import LayerStatistics
from mixofshow.fusion.store import Recording, Store, open_recording, pack, unpack

KEY = {"source": "abc", "texts": ["a photo"], "settings": {"steps": 3, "guidance_scale": 1.0}, "bound": float("-inf")}
LOSSY = ("fp32", "fp16", "low-rank")


def moments(width: int, rows: int, *, seed: int = 0, spread: float = 1.0) -> Tensor:
    """Of correlated rows; the columns' sizes differ by factors of e^spread."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    mixed = x @ torch.randn(width, width, generator=generator, dtype=torch.float64)
    scaled = mixed * (spread * torch.randn(width, generator=generator, dtype=torch.float64)).exp()
    return scaled.T @ scaled


MATRICES = {
    "usual": moments(24, 200),
    "of few rows": moments(24, 3),
    "of columns that differ widely": moments(16, 100, spread=5.0),
    "large": 1e12 * moments(16, 50),
    "small": 1e-12 * moments(16, 50),
    "with columns never seen": torch.block_diag(moments(10, 50), torch.zeros(6, 6, dtype=torch.float64)),
    "of one column": moments(1, 10),
    "of nothing": torch.zeros(8, 8, dtype=torch.float64),
}


@pytest.fixture
def seen() -> dict[str, LayerStatistics]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, 8, generator=generator)
    moments_of_inputs = x.double().T @ x.double()
    return {
        "unet.a.input": LayerStatistics(moments(8, 20), 20),
        "unet.b": LayerStatistics(moments(16, 5), 5),
        "unet.d": LayerStatistics(moments_of_inputs, 9, inputs=x.bfloat16()),
    }


@pytest.fixture
def kept(seen, tmp_path) -> Path:
    return Store(tmp_path).save(KEY, "cat", seen).file.path


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
def test_double_precision_is_exact(matrix):
    assert torch.equal(unpack(pack(matrix, "fp64")), matrix)


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
def test_single_precision_is_its_rounding(matrix):
    assert ((unpack(pack(matrix, "fp32")) - matrix).abs() <= 2**-24 * matrix.abs()).all()


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
def test_half_precision_rounds_correlations(matrix):
    # Half precision rounds by 2^-11 of the value, or by 2^-25 where it is tiny; the scales by 2^-24 each.
    size = matrix.diagonal().sqrt()
    bound = (2**-11 + 2**-22) * matrix.abs() + 2**-24 * size[:, None] * size
    assert ((unpack(pack(matrix, "fp16")) - matrix).abs() <= bound).all()


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
def test_low_rank_loses_no_more_than_its_eigenvalues_and_keeps_the_diagonal(matrix):
    packed = pack(matrix, "low-rank")
    found, rank = unpack(packed), max(1, len(matrix) // 8)
    assert packed["factor"].shape == (len(matrix), rank)
    rest = torch.linalg.eigvalsh(matrix).clamp(min=0).sort().values[: len(matrix) - rank]
    assert float((found - matrix).norm()) <= float(rest.norm()) + 1e-6 * float(matrix.norm())
    assert float((found - matrix).diagonal().abs().max()) <= 1e-6 * float(matrix.diagonal().max())


@pytest.mark.parametrize("storage", ["fp64", *LOSSY])
@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
def test_what_was_stored_is_still_symmetric_and_never_negative_by_more_than_its_error(storage, matrix):
    found = unpack(pack(matrix, storage))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, found.T, rtol=1e-12, atol=0)
    lowest = float(torch.linalg.eigvalsh(found).min())
    assert lowest >= -float((found - matrix).norm()) - 1e-12 * float(matrix.norm())


@pytest.mark.parametrize("name", ["usual", "large"])
def test_less_storage_is_less_exact_and_takes_less(name):
    matrix = MATRICES[name]
    errors = [float((unpack(pack(matrix, storage)) - matrix).norm()) for storage in ("fp64", *LOSSY)]
    sizes = [sum(part.nbytes for part in pack(matrix, storage).values()) for storage in ("fp64", *LOSSY)]
    assert errors == sorted(errors)
    assert errors[0] == 0 < errors[1]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("storage", ["fp64", *LOSSY])
def test_the_error_of_storing_is_reported_as_it_is(storage, tmp_path):
    seen = {name: LayerStatistics(matrix, 1) for name, matrix in MATRICES.items() if name != "of nothing"}
    recording = Store(tmp_path, storage).save(KEY, "cat", seen)
    errors = [
        float((recording.statistics(name).moments - matrix).norm() / matrix.norm())
        for name, matrix in MATRICES.items()
        if name != "of nothing"
    ]
    assert recording.info.error == pytest.approx((sum(errors) / len(errors), max(errors)), rel=1e-6)
    assert (max(errors) > 0) is (storage != "fp64")


@pytest.mark.parametrize("storage", ["fp64", *LOSSY])
def test_what_was_seen_is_found_again(storage, seen, tmp_path):
    store = Store(tmp_path, storage)
    assert store.find(KEY, "cat", set()) is None
    store.save(KEY, "cat", seen)
    recording = Store(tmp_path, storage).find(KEY, "cat", set(seen))
    for name, one in seen.items():
        found = recording.statistics(name)
        assert found.rows == one.rows
        assert found.tensors().keys() == one.tensors().keys()
        for kind, value in found.tensors().items():
            exact = storage == "fp64" or kind != "moments"
            assert torch.equal(value, one.tensors()[kind]) is exact, (name, kind)


def test_the_same_recording_is_the_same_bytes(seen, tmp_path):
    first, second = (Store(tmp_path / folder).save(KEY, "cat", seen).file.path for folder in "ab")
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("key", "storage", "inputs"),
    [
        (KEY | {"source": "abd"}, "fp64", {"unet.b"}),
        (KEY | {"settings": {"steps": 4, "guidance_scale": 1.0}}, "fp64", {"unet.b"}),
        (KEY | {"more": None}, "fp64", {"unet.b"}),
        (KEY, "fp32", {"unet.b"}),
        (KEY, "fp64", {"unet.b", "unet.e"}),
    ],
    ids=["another concept", "other steps", "another key", "another storage", "an input that was not recorded"],
)
def test_what_was_not_recorded_is_not_found(key, storage, inputs, kept):
    assert Store(kept.parent).find(KEY, "cat", {"unet.b"}) is not None
    assert Store(kept.parent, storage).find(key, "cat", inputs) is None


def test_a_storage_that_there_is_not_is_refused(tmp_path):
    for known in ("fp64", *LOSSY):
        assert Store(tmp_path, known).storage == known
    with pytest.raises(SettingsError, match="storage: expected one of fp64, fp32, fp16, low-rank, found fp8"):
        Store(tmp_path, "fp8")


def test_a_file_under_the_name_of_another_is_refused(kept, seen):
    store, other = Store(kept.parent), KEY | {"source": "abd"}
    kept.rename(store.path(other, "cat"))
    with pytest.raises(ConceptFileError, match="not what its name says") as raised:
        store.find(other, "cat", set())
    assert str(raised.value).startswith(f"{store.path(other, 'cat')}: ")


@pytest.mark.parametrize("storage", ["fp64", *LOSSY])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_never_kept(value, storage, seen, tmp_path):
    matrix = moments(16, 5)
    matrix[3, 3] = value
    with pytest.raises(BadInputError, match="cat: in its own model, unet.b has values that are not finite"):
        Store(tmp_path, storage).save(KEY, "cat", seen | {"unet.b": LayerStatistics(matrix, 5)})
    assert list(tmp_path.iterdir()) == []


def refused(path: Path, names: list[str]) -> Iterator[str]:
    """Opening and reading all: nothing but a ConceptFileError that names the file may come out of it."""
    try:
        recording = open_recording(path)
    except ConceptFileError as error:
        yield str(error)
        return
    for name in names:
        try:
            recording.statistics(name)
        except ConceptFileError as error:
            yield str(error)


def assert_refused(path: Path, data: bytes, seen: dict[str, LayerStatistics], what: object) -> None:
    path.write_bytes(data)
    lines = list(refused(path, list(seen)))
    assert lines, what
    assert all(line.startswith(f"{path}: ") and line.isprintable() for line in lines), (what, lines)


def test_a_good_file_is_not_refused(kept, seen):
    assert list(refused(kept, list(seen))) == []


def test_a_flipped_bit_anywhere_is_seen(kept, seen):
    data, draw = kept.read_bytes(), random.Random(0)
    start = 8 + int.from_bytes(data[:8], "little")
    for place in [*range(8), *draw.sample(range(8, start), 350), *draw.sample(range(start, len(data)), 50)]:
        bit = draw.randrange(8)
        flipped = data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]
        assert_refused(kept, flipped, seen, (place, bit, data[place - 20 : place + 20]))


def test_a_file_cut_anywhere_is_refused(kept, seen):
    data = kept.read_bytes()
    for length in random.Random(0).sample(range(len(data)), 150):
        assert_refused(kept, data[:length], seen, length)


def test_another_files_numbers_or_description_are_refused(kept, seen, tmp_path):
    other = Store(tmp_path / "other").save(
        KEY | {"source": "abd"}, "cat", {**seen, "unet.b": LayerStatistics(moments(16, 6), 6)}
    )
    described = other.file.metadata
    write_tensors(kept, load_file(kept), described)
    assert len(list(refused(kept, list(seen)))) == 1
    for metadata in ({}, {"format": "pt"}, {**described, "more": "text"}, {**described, "format": "np"}):
        kept.unlink()
        write_tensors(kept, load_file(other.file.path), metadata)
        assert list(refused(kept, list(seen))), metadata


def described(path: Path, **changes: object) -> None:
    """Change what a recording says of itself, and sign it anew."""
    about = json.loads(open_recording(path).file.metadata[stores.METADATA_KEY]) | changes
    write_tensors(path, load_file(path), stores._metadata(json.dumps(about)))


@pytest.mark.parametrize(
    "changes",
    [
        {"format_version": 2},
        {"format_version": "1"},
        {"format_version": None},
        {"rows": None},
        {"rows": ["unet.b"]},
        {"rows": {"unet.b": "many"}},
        {"rows": {"unet.b": float("inf")}},
        {"rows": {"unet.b": None}},
        {"rows": {}},
        {"key": None},
        {"key": "abc"},
        {"digests": None},
        {"digests": {}},
        {"digests": {"unet.b": 3}},
        {"error": None},
        {"error": [1, 2, 3]},
    ],
    ids=str,
)
def test_strange_descriptions_are_refused(changes, kept, seen):
    described(kept, **changes)
    lines = list(refused(kept, list(seen)))
    assert lines
    assert all(line.startswith(f"{kept}: ") for line in lines)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused(value, kept, seen):
    tensors = load_file(kept)
    tensors["plain:unet.b"][2, 5] = value
    write_tensors(kept, tensors, open_recording(kept).file.metadata)
    digests = open_recording(kept).info.digests | {"unet.b": stores._digest({"plain": tensors["plain:unet.b"]})}
    described(kept, digests=digests)
    (line,) = refused(kept, list(seen))
    assert line == f"{kept}: moments of unet.b: values that are not finite"


FORGED = {
    "another width": {"plain": torch.eye(3, dtype=torch.float64)},
    "no matrix": {"plain": torch.ones(3, dtype=torch.float64)},
    "no square": {"plain": torch.ones(3, 4, dtype=torch.float64)},
    "negated": {"plain": -torch.eye(10, dtype=torch.float64)},
    "a part is missing": {"scaled": torch.eye(10).half()},
    "parts that do not fit": {"factor": torch.ones(10, 2), "diagonal": torch.ones(7)},
}


@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED)
def test_recordings_whose_digests_are_right_and_numbers_are_not_are_refused(forged, kept):
    """F7, F39."""
    tensors = {key: tensor for key, tensor in load_file(kept).items() if not key.endswith(":unet.b")}
    tensors |= {f"{kind}:unet.b": tensor for kind, tensor in forged.items()}
    write_tensors(kept, tensors, open_recording(kept).file.metadata)
    described(kept, digests=open_recording(kept).info.digests | {"unet.b": stores._digest(forged)})
    with pytest.raises(ConceptFileError, match=r"unet\.b: ") as raised:
        open_recording(kept).statistics("unet.b", width=10)
    assert len(str(raised.value)) - len(str(kept)) < 200


def test_a_pickle_is_refused_unopened(kept):
    torch.save({"a": torch.zeros(3)}, kept)
    with pytest.raises(ConceptFileError, match="pickles are never opened"):
        Store(kept.parent).find(KEY, "cat", set())


def test_a_recording_looks_up_nothing_else(kept):
    recording = Store(kept.parent).find(KEY, "cat", set())
    assert isinstance(recording, Recording)
    with pytest.raises(ConceptFileError, match="unet.e"):
        recording.statistics("unet.e")
