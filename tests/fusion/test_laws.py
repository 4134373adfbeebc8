"""What must hold for every fusion, whatever the concepts."""

from __future__ import annotations

import itertools

import pytest
import torch

from mixofshow.concepts.changes import LowRank
from mixofshow.concepts.model import load_model, with_concept
from mixofshow.errors import BadInputError, SettingsError, TokenError
from mixofshow.fusion.methods import METHODS, gradient, method_settings, solve_ridge
from mixofshow.fusion.problem import LayerProblem
from mixofshow.fusion.settings import PAPER, FusionSettings
from mixofshow.fusion.solving import STAGES, solver_for
from mixofshow.fusion.stages import fuse
from mixofshow.fusion.statistics import LayerStatistics, MomentAccumulator, input_of

FEW = FusionSettings(**PAPER, steps=3)
EXACT = FusionSettings(**PAPER, steps=3, options={"ridge": 1e-6, "toward": "base"})
EXACT_ALONE = {
    "gradient": {},
    "contrastive": {},
    "average": {},
    "sum": {},
    "ties": {"density": 1.0},  # at any other density, entries of the one concept are cut
    "dare": {"density": 1.0},  # at any other density, right only in expectation
    "svd": {"rank": 4},  # the concepts' own rank; below it nothing can keep them
    "regmean": {},
    "custom-diffusion": {"cutoff": 1e-8},  # weaker inputs are given up, which is what leaves 2e-3 at the usual 1e-6
    "orthogonal": {},  # there is no other to overlap with
}
"""The methods that keep one concept alone, with the settings at which they do; `lbfgs` only comes near."""
COMMON = sorted(METHODS.keys() - {"orthogonal"})
"""The methods for any concepts; `orthogonal` refuses those that were not tuned for it, as the golden ones were not."""
SHORT = {"lbfgs": {"iterations": 10}}
"""Settings that save time where the result does not matter."""


@pytest.fixture(scope="module")
def both(golden_pipeline, golden_concepts):
    return fuse(golden_concepts, golden_pipeline, FEW)


def test_one_concept_alone_is_that_concept(golden_pipeline, golden_concepts):
    for concept in golden_concepts:
        fused = fuse([concept], golden_pipeline, FEW)
        own = with_concept(golden_pipeline, concept)
        assert max(one.residual for one in fused.layers.values()) <= 1e-3
        assert fused.model.weights.keys() == own.weights.keys()


def test_the_order_of_the_files_does_not_matter(golden_pipeline, golden_concepts, both):
    turned = fuse(golden_concepts[::-1], golden_pipeline, FEW)
    assert list(turned.model.vocabulary.embeddings) == list(both.model.vocabulary.embeddings)
    for name, weight in both.model.weights.items():
        assert torch.equal(weight, turned.model.weights[name]), name


def test_no_method_fits_better_than_the_least_damped(golden_pipeline, golden_concepts, both):
    exact = fuse(golden_concepts, golden_pipeline, EXACT)
    for method in COMMON:
        settings = FusionSettings(**PAPER, method=method, steps=3, measure=True, options=SHORT.get(method, {}))
        other = fuse(golden_concepts, golden_pipeline, settings)
        for name in other.layers:
            if name.startswith("text_encoder."):  # later stages see what this method made of the earlier ones
                assert exact.layers[name].fused <= other.layers[name].fused * (1 + 1e-4), (method, name)
    assert all(one.fused <= one.average for one in both.layers.values())


@pytest.mark.parametrize(("method", "options"), EXACT_ALONE.items())
def test_one_concept_alone_is_kept(method, options, golden_pipeline, golden_concepts):
    alone = fuse(golden_concepts[:1], golden_pipeline, FusionSettings(**PAPER, method=method, steps=1, options=options))
    assert max(one.residual for one in alone.layers.values()) <= 1e-3


def test_orthogonal_fusion_is_for_concepts_tuned_for_it(golden_pipeline, golden_concepts):
    with pytest.raises(SettingsError, match=r"concepts 1 and 2 .* overlap by 0\..* unet\.orthogonal_slice"):
        fuse(golden_concepts, golden_pipeline, FusionSettings(**PAPER, method="orthogonal", steps=1))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"text": 500, "keys-and-values": 500, "picture": 50}),
        ({"picture.iterations": 7}, {"text": 500, "keys-and-values": 500, "picture": 7}),
        ({"iterations": 8}, {"text": 8, "keys-and-values": 8, "picture": 8}),
        ({"picture.iterations": 7, "iterations": 8}, {"text": 8, "keys-and-values": 8, "picture": 7}),
    ],
)
def test_a_method_may_have_other_defaults_in_a_stage(options, expected, monkeypatch):
    def iterations_of(problem: object, *, iterations: int = 500) -> int:
        return iterations

    monkeypatch.setitem(METHODS, "lbfgs", iterations_of)
    settings = FusionSettings(**PAPER, method="lbfgs", options=options)
    assert {stage: solver_for(settings, stage)(None) for stage in STAGES} == expected


def test_the_base_model_is_left_as_it_was(golden_pipeline, golden_concepts):
    before = {name: value.clone() for name, value in golden_pipeline.unet.state_dict().items()}
    fuse(golden_concepts, golden_pipeline, FEW)
    assert all(torch.equal(value, before[name]) for name, value in golden_pipeline.unet.state_dict().items())


def test_average_is_the_mean_of_the_changes(golden_pipeline, golden_concepts):
    fused = fuse(golden_concepts, golden_pipeline, FusionSettings(**PAPER, method="average", steps=1))
    for name, weight in itertools.islice(fused.model.weights.items(), 20):
        singles = [with_concept(golden_pipeline, concept).weights[name] for concept in golden_concepts]
        torch.testing.assert_close(weight, sum(singles) / len(singles), rtol=1e-5, atol=1e-6)


def test_a_saved_model_is_the_model(both, tmp_path):
    both.model.save(tmp_path / "fused")
    loaded = load_model(tmp_path / "fused")
    assert loaded.vocabulary.aliases == both.model.vocabulary.aliases
    for word, vectors in both.model.vocabulary.embeddings.items():
        assert torch.equal(loaded.vocabulary.embeddings[word], vectors)
    state = loaded.pipeline.unet.state_dict()
    for name, weight in both.model.weights.items():
        if name.startswith("unet."):
            assert torch.equal(state[name.removeprefix("unet.") + ".weight"], weight)


def test_moments_of_chunks_add_up():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 7, generator=generator)
    moments = MomentAccumulator()
    for part in rows.split(13):
        moments.add("x", part)
    torch.testing.assert_close(moments.seen()["x"].moments, rows.double().T @ rows.double())
    assert moments.seen()["x"].rows == 60


def test_a_convolution_counts_its_pixels_as_rows():
    picture = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    moments = MomentAccumulator()
    moments.add("x", picture)
    rows = picture.permute(0, 2, 3, 1).reshape(-1, 5).double()
    torch.testing.assert_close(moments.seen()["x"].moments, rows.T @ rows)


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        ("unet.a.attn1.to_q", "unet.a.attn1.to_v", True),
        ("unet.a.attn2.to_k", "unet.a.attn2.to_v", True),
        ("unet.a.attn2.to_q", "unet.a.attn2.to_k", False),
        ("unet.a.attn1.to_q", "unet.b.attn1.to_q", False),
        ("unet.a.attn1.to_out.0", "unet.a.attn1.to_q", False),
        ("text_encoder.l.self_attn.q_proj", "text_encoder.l.self_attn.k_proj", True),
        ("text_encoder.l.self_attn.out_proj", "text_encoder.l.self_attn.k_proj", False),
    ],
)
def test_which_layers_read_the_same_input(first, second, shared):
    assert (input_of(first) == input_of(second)) is shared


def test_inputs_in_a_subspace_move_nothing_outside_of_it():
    generator = torch.Generator().manual_seed(0)
    seen = torch.randn(40, 3, generator=generator).double() @ torch.randn(3, 10, generator=generator).double()
    change = LowRank(torch.randn(2, 10, generator=generator).double(), torch.randn(6, 2, generator=generator).double())
    problem = LayerProblem(torch.zeros(6, 10), [change], lambda _: LayerStatistics(seen.T @ seen, 40), [1.0])
    found = gradient(problem, ridge=1e-9, toward="base")
    outside = torch.linalg.qr(seen.T, mode="complete").Q[:, 3:]
    torch.testing.assert_close(found @ seen.T, change.matrix() @ seen.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found @ outside, torch.zeros(6, 7, dtype=torch.float64), atol=1e-5, rtol=0)


def test_a_singular_matrix_is_solved_by_eigenvalues():
    moments = torch.diag(torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64))
    rhs = torch.tensor([[4.0, 3.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(solve_ridge(moments, rhs, 0.0), torch.tensor([[2.0, 3.0, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("gradiant", {}, "did you mean 'gradient'"),
        ("gradient", {"rigde": 1}, "did you mean 'ridge'"),
        ("average", {"ridge": 1}, "has no setting 'ridge'"),
        ("gradient", {"ridge": "small"}, "'ridge'.*found small"),
        ("ties", {"majority_sign_method": "most"}, "'majority_sign_method'"),
    ],
)
def test_unknown_methods_and_settings_are_named(method, options, message):
    with pytest.raises(SettingsError, match=message):
        method_settings(method, options)


def test_settings_may_come_as_texts():
    assert method_settings("gradient", {"ridge": "1e-6"}) == {"ridge": 1e-6, "toward": "average"}


def test_nothing_and_twice_the_same_are_refused(golden_pipeline, golden_concepts):
    with pytest.raises(BadInputError, match="nothing to fuse"):
        fuse([], golden_pipeline)
    with pytest.raises(TokenError, match="two concepts claim"):
        fuse([golden_concepts[0]] * 2, golden_pipeline)
