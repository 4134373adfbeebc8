"""Secure aggregation: what is summed is exact, what is sent says nothing, and what Flower lacks."""

from __future__ import annotations

import importlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import LocalGrid

from mixofshow.bases.layers import layer, matrix, tunable_layers
from mixofshow.concepts.concept import EMBEDDINGS, load_concept
from mixofshow.concepts.delta import load_delta
from mixofshow.errors import BadInputError, SettingsError
from mixofshow.federation import secure
from mixofshow.federation.client import SUMS
from mixofshow.federation.fixed import LARGEST, LIMBS, MOMENT_UNIT, from_limbs, to_limbs
from mixofshow.federation.owner import answer
from mixofshow.federation.plan import SECURE, Plan
from mixofshow.federation.secure import masked, masks, summed
from mixofshow.federation.sums import SumsShape
from mixofshow.files import parse_tensors
from mixofshow.fusion.stages import fuse
from tests.federation.local import QUICK


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(0, 2**32), st.floats(1e-6, 1e9))
def test_sums_of_limbs_are_sums_of_rounded_numbers(count, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    terms = [scale * torch.randn(9, generator=generator, dtype=torch.float64) for _ in range(count)]
    limbs = [to_limbs(term, MOMENT_UNIT) for term in terms]
    total = from_limbs([sum(parts) for parts in zip(*limbs, strict=True)], MOMENT_UNIT)
    units = sum((term / MOMENT_UNIT).round().long() for term in terms)
    assert torch.equal(total, units.double() * MOMENT_UNIT)
    assert all(float(limb.min()) >= -(2**19) and float(limb.max()) < 2**19 for limb in limbs[0][: LIMBS - 1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), LARGEST * MOMENT_UNIT])
def test_numbers_that_cannot_be_summed_are_refused(value):
    with pytest.raises(BadInputError, match="cannot be summed"):
        to_limbs(torch.tensor([value], dtype=torch.float64), MOMENT_UNIT)


def test_flowers_masks_come_from_32_bits_and_ours_from_the_whole_seed():
    """A center could try all 2³² seeds of a mask. Once Flower mends it, ours can go, and this test says so."""
    one, other = bytes(range(32)), bytes(range(4, 8)) + bytes(range(4)) + bytes(range(8, 32))
    assert one != other
    for make, same in ((pseudo_rand_gen, True), (masks, False)):
        first, second = (make(seed, 2**32, [(64,)])[0] for seed in (one, other))
        assert np.array_equal(first, second) == same
    spread = masks(one, 2**32, [(20_000,)])[0] / 2**32
    assert abs(spread.mean() - 0.5) < 0.01 and spread.min() >= 0 and spread.max() < 1


def clients_with(terms):
    """Clients of a grid that hold these limbs each."""

    def client(own):
        context = Context(1, 1, {}, RecordDict(), {})
        return lambda message: masked(message, context, lambda asked: own)

    return LocalGrid({n: client(own) for n, own in enumerate(terms, 1)}, {n: str(n) for n in range(1, len(terms) + 1)})


def center():
    return Context(1, 0, {}, RecordDict(), {})


def test_the_center_gets_the_exact_sum_and_of_each_client_what_looks_random():
    generator = torch.Generator().manual_seed(0)
    terms = [torch.randn(3000, generator=generator, dtype=torch.float64) * 1e4 for _ in range(3)]
    grid = clients_with([to_limbs(term, MOMENT_UNIT) for term in terms])
    sums, stayed = summed(grid, center(), [1, 2, 3], timeout=5)
    expected = sum((term / MOMENT_UNIT).round() for term in terms) * MOMENT_UNIT
    assert stayed == [1, 2, 3] and torch.equal(from_limbs(sums, MOMENT_UNIT), expected)
    sent = [
        np.frombuffer(array.data, "<u4") / 2**32
        for reply in grid.sent
        for record in reply.content.array_records.values()
        for array in record.values()
    ]
    large = [one for one in sent if one.size == 3000]
    assert len(large) == 3 * LIMBS
    for one in large:
        assert abs(one.mean() - 0.5) < 0.03 and abs(one.std() - 12**-0.5) < 0.03
    for one in range(len(large)):
        for other in range(one):
            assert abs(np.corrcoef(large[one], large[other])[0, 1]) < 0.1


def test_records_that_travelled_as_one_are_two_again():
    """Flower hands out one object for records that say the same; what came for one stood in the other, and ended the round."""
    empty, numbers = ConfigRecord(), np.arange(3, dtype="<u4")
    pieces = ArrayRecord({"000000": Array("uint32", (3,), "bytes", numbers.tobytes())})
    content = RecordDict({"fitres.metrics": empty, secure.RECORD: empty, secure.PIECES: pieces})
    whole = secure._whole_again(Message(content, 1, "train"))
    assert list(whole.content) == ["fitres.metrics", secure.RECORD] and not whole.content["fitres.metrics"]
    (found,) = whole.content[secure.RECORD][secure.MASKED]
    assert np.array_equal(np.load(io.BytesIO(found)), numbers)


@pytest.mark.parametrize("sent", [0, 1])
def test_sums_of_another_size_than_the_layers_are_one_line(sent, golden_pipeline):
    name = next(name for name in tunable_layers(golden_pipeline) if name.endswith("attn2.to_k"))
    with pytest.raises(BadInputError, match=rf"sums, found {3 * sent}$"):
        SumsShape.of(golden_pipeline, [name]).unpacked([torch.ones(3)] * sent)


def test_two_clients_are_too_few():
    grid = clients_with([to_limbs(torch.ones(3), MOMENT_UNIT)] * 2)
    with pytest.raises(BadInputError, match="expected 3"):
        summed(grid, center(), [1, 2], timeout=1)


def test_one_who_drops_out_before_sending_leaves_the_sum_of_the_others():
    terms = [to_limbs(torch.full((5,), float(n), dtype=torch.float64), MOMENT_UNIT) for n in range(1, 6)]
    grid = clients_with(terms)
    stages = []
    honest = grid.clients[5]

    def dies(message):
        stages.append(message)
        return honest(message) if len(stages) < 3 else None

    grid.clients[5] = dies
    sums, stayed = summed(grid, center(), [1, 2, 3, 4, 5], timeout=1)
    assert sorted(stayed) == [1, 2, 3, 4] and torch.equal(from_limbs(sums, MOMENT_UNIT), torch.full((5,), 10.0, dtype=torch.float64))


def test_masks_are_flowers_again_outside():
    modules = [importlib.import_module(name) for name in secure.MASKING]
    with secure.strong_masks():
        assert all(module.pseudo_rand_gen is masks for module in modules)
    assert all(module.pseudo_rand_gen is pseudo_rand_gen for module in modules)


def test_a_secure_round_gives_the_model_of_independent_fusion_and_sends_no_change(federation):
    for name in federation.files:
        federation.join(name)
    report = federation.round(1, secure=True, least=3)
    assert (report.refused, report.why_not, sorted(report.members)) == ({}, "", ["catx", "dogx", "manx"])
    plain = fuse(federation.files.values(), federation.base, **QUICK, **SECURE).model
    found = load_delta(Path(report.delta)).weights(federation.base)
    assert found.keys() == plain.weights.keys()
    change = {name: plain.weights[name] - matrix(layer(federation.base, name)) for name in found}
    error = sum(float((found[n] - plain.weights[n]).square().sum()) for n in found) ** 0.5
    assert error <= 1e-5 * sum(float(one.square().sum()) for one in change.values()) ** 0.5
    words = [reply.content.array_records["files"]["words"].data for reply in federation.grid.sent if "files" in reply.content]
    assert len(words) == 3
    for data in words:
        assert set(parse_tensors(data, "words")[0]) == {EMBEDDINGS}


def test_what_an_owner_said_of_the_file_is_not_said_of_its_sums(federation):
    name = "dogx"
    federation.join(name, name=name, concept=federation.files[name], approve="ask")
    content = load_concept(federation.files[name]).hash
    folder = federation.folder / f"client-{name}"
    answer(folder, content + SUMS, yes=True)
    answer(folder, content, yes=False)
    assert federation.round(1).refused == {name: "its owner does not approve"}
    answer(folder, content, yes=True)
    answer(folder, content + SUMS, yes=False)
    assert federation.round(2, secure=True).refused == {name: "its owner does not approve"}


@pytest.mark.parametrize("fuse", [{"method": "ties"}, {"mode": "staged"}, {"weights": "energy"}, {"refine": 1}, {"prior": 1}])
def test_what_cannot_be_had_of_sums_is_refused(fuse):
    with pytest.raises(SettingsError, match="cannot be had of sums"):
        Plan(secure=True, fuse=fuse)
