"""Fusing staged and from independent recordings: what is found again, what counts how much, and what refining does."""

from __future__ import annotations

import itertools
import re
import shutil
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor

from mixofshow.bases.layers import layer, matrix
from mixofshow.concepts.adapters import replaced, tuned_weights
from mixofshow.errors import BadInputError
from mixofshow.fusion import stages
from mixofshow.fusion.methods import METHODS, NEEDS_STATISTICS
from mixofshow.fusion.problem import LayerProblem
from mixofshow.fusion.recording import Source, record, stage_of
from mixofshow.fusion.settings import PAPER, FusionSettings
from mixofshow.fusion.solving import QUIET
from mixofshow.fusion.stages import Fused, fuse, record_concept
from mixofshow.fusion.statistics import input_of
from mixofshow.fusion.store import Recording, Store

FEW = {**PAPER, "steps": 1, "mode": "staged", "options": {"ridge": 0.1}}
SOME = re.compile(r"^text_encoder|mid_block|up_blocks\.3")
FEED_FORWARD = "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2"


def few(**options: Any) -> FusionSettings:
    """One step of one picture."""
    return FusionSettings(**{**FEW, **options})


APART, STAGED = few(mode="independent"), few()


@pytest.fixture(scope="module")
def three(random_concept):
    """One changes the text encoder and some of the UNet, one the same without keys and values, one a single block."""
    return [
        random_concept("cat", seed=1, changes=SOME.search),
        random_concept("dog", seed=2, changes=lambda name: SOME.search(name) and not name.endswith(("to_k", "to_v"))),
        random_concept("cup", seed=3, changes=lambda name: ".up_blocks.3." in name),
    ]


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Store:
    """For tests that are about what comes after recording."""
    return Store(tmp_path_factory.mktemp("recordings"))


@pytest.fixture(scope="module")
def apart(golden_pipeline, three):
    return fuse(three, golden_pipeline, APART)


def same(one: Fused, other: Fused) -> bool:
    """Bit for bit, in whatever order."""
    weights = other.model.weights
    return one.model.weights.keys() == weights.keys() and all(
        torch.equal(weight, weights[name]) for name, weight in one.model.weights.items()
    )


@pytest.fixture
def problems(monkeypatch) -> dict[str, LayerProblem]:
    """The problem of every layer that is solved from here on; the last one of each."""
    found: dict[str, LayerProblem] = {}
    original = stages.problem_of

    def kept(name: str, *args: Any) -> LayerProblem:
        found[name] = original(name, *args)
        return found[name]

    monkeypatch.setattr(stages, "problem_of", kept)
    return found


# What is found again


@pytest.mark.parametrize("order", [(2, 1, 0), (1, 2, 0), (0, 2, 1)])
def test_independent_fusion_forgets_the_order(order, double_pipeline, three, in_double):
    # In double precision, where the order of three summands would show in the last digits.
    there, back = (fuse(some, double_pipeline, APART, store=in_double) for some in (three, [three[k] for k in order]))
    assert same(there, back)
    assert there.model.manifest == back.model.manifest


def test_recordings_from_different_places_are_as_good_as_recording_here(
    golden_pipeline, three, apart, recorded, tmp_path
):
    center = tmp_path / "center"
    center.mkdir()
    for number, concept in enumerate(reversed(three)):
        recording = record_concept(concept, golden_pipeline, APART, Store(tmp_path / str(number)))
        shutil.move(recording.file.path, center)
    assert sorted(recorded) == ["cat", "cup", "dog"]
    recorded.clear()
    assert same(fuse(three, golden_pipeline, APART, store=Store(center)), apart)
    assert recorded == []


def test_adding_a_concept_is_fusing_from_scratch(golden_pipeline, three, apart, recorded, tmp_path):
    store = Store(tmp_path)
    fuse(three[:2], golden_pipeline, APART, store=store)
    recorded.clear()
    assert same(fuse(three, golden_pipeline, APART, store=store), apart)
    assert recorded == ["cup"]


def test_removing_a_concept_is_never_having_had_it(golden_pipeline, three, recorded, tmp_path):
    scratch = fuse(three[:2], golden_pipeline, APART)
    fuse(three, golden_pipeline, APART, store=Store(tmp_path))
    recorded.clear()
    assert same(fuse(three[:2], golden_pipeline, APART, store=Store(tmp_path)), scratch)
    assert recorded == []


@pytest.mark.parametrize(
    ("others", "passes", "options"),
    [([2], 0, {}), ([1], 1, {"options": {"ridge": 1.0}})],
    ids=["another concept", "another ridge"],
)
def test_staged_recordings_serve_only_the_fusion_that_they_stand_behind(
    others, passes, options, golden_pipeline, three, recorded, tmp_path
):
    """But for the text encoder, whose recordings stand behind nothing: it is not recorded again."""
    fuse(three[:2], golden_pipeline, few(refine=passes), store=Store(tmp_path))
    concepts = [three[0], *(three[k] for k in others)]
    settings = few(refine=passes, **options)
    recorded.clear()
    found = fuse(concepts, golden_pipeline, settings, store=Store(tmp_path))
    rounds = 3 + passes
    assert len(recorded) == 2 * rounds - sum(concept in three[:2] for concept in concepts)
    recorded.clear()
    assert same(found, fuse(concepts, golden_pipeline, settings))
    assert len(recorded) == 2 * rounds


def test_a_concept_that_changes_more_layers_has_the_others_recorded_there(
    golden_pipeline, three, random_concept, recorded, tmp_path
):
    shape = matrix(layer(golden_pipeline, FEED_FORWARD)).shape
    more = random_concept("sky", seed=4, changes=lambda name: ".mid_block." in name)
    odd = next(iter(more.deltas.values()))
    wider = type(odd)(torch.randn(4, shape[1]) / shape[1] ** 0.5, 0.1 * torch.randn(shape[0], 4))
    more = type(more)(more.info, more.embeddings, {**more.deltas, FEED_FORWARD: wider})
    scratch = fuse([*three[:2], more], golden_pipeline, APART)
    fuse(three[:2], golden_pipeline, APART, store=Store(tmp_path))
    recorded.clear()
    assert same(fuse([*three[:2], more], golden_pipeline, APART, store=Store(tmp_path)), scratch)
    assert sorted(recorded) == ["cat", "dog", "sky"]
    assert FEED_FORWARD in scratch.model.weights


@pytest.mark.parametrize(
    "options",
    [
        {"method": "average", "options": {}, "measure": True},
        {"weights": "energy"},
        {"guard": True, "leave_one_out": True},
        {"max_memory": 0.001},
    ],
    ids=str,
)
def test_how_recordings_are_used_does_not_record_them_again(options, golden_pipeline, three, recorded, shared):
    fuse(three, golden_pipeline, APART, store=shared)
    recorded.clear()
    settings = APART.model_copy(update=options)
    found = fuse(three, golden_pipeline, settings, store=shared)
    assert recorded == []
    assert same(found, fuse(three, golden_pipeline, settings))
    assert len(recorded) == len(three)


def test_methods_that_look_at_no_inputs_record_nothing(golden_pipeline, three, recorded):
    """B30."""
    blind = set(METHODS) - NEEDS_STATISTICS
    assert blind == {"average", "sum", "ties", "dare", "svd", "orthogonal"}
    for method in blind - {"orthogonal"}:
        found = fuse(three, golden_pipeline, FusionSettings(method=method))
        assert recorded == []
        assert not found.recorded
        measured = fuse(
            three, golden_pipeline, FusionSettings(method=method, steps=1, mode="independent", measure=True)
        )
        assert measured.recorded
        assert same(found, measured)
        recorded.clear()


@pytest.mark.parametrize("options", [{"leave_one_out": True}, {"refuse_loud": True}, {"refine": 0}], ids=str)
def test_what_changes_no_recording_is_not_part_of_its_identity(options, golden_pipeline, three, recorded, tmp_path):
    """B43."""
    settings = FusionSettings(steps=1, prompts=("a {}",), picture_prompts=("a {}",))
    fuse(three[:2], golden_pipeline, settings, store=Store(tmp_path))
    recorded.clear()
    fuse(three[:2], golden_pipeline, settings.model_copy(update=options), store=Store(tmp_path))
    assert recorded == []


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 2},
        {"seed": 1},
        {"prompts": ("{}",)},
        {"picture_prompts": ("{}",)},
        {"guidance_scale": 2.0},
        {"scheduler": EulerDiscreteScheduler},
        {"scheduler": {"solver_order": 1}},
    ],
    ids=str,
)
def test_what_is_drawn_otherwise_is_recorded_again(options, golden_pipeline, three, recorded, shared, monkeypatch):
    fuse(three[2:], golden_pipeline, APART, store=shared)
    recorded.clear()
    scheduler = options.get("scheduler")
    if isinstance(scheduler, dict):
        monkeypatch.setattr(
            golden_pipeline,
            "scheduler",
            golden_pipeline.scheduler.from_config(golden_pipeline.scheduler.config, **scheduler),
        )
    elif scheduler:
        monkeypatch.setattr(golden_pipeline, "scheduler", scheduler.from_config(golden_pipeline.scheduler.config))
    settings = APART.model_copy(update={key: value for key, value in options.items() if key != "scheduler"})
    fuse(three[2:], golden_pipeline, settings, store=shared)
    assert recorded == ["cup"]


def test_the_text_encoder_is_fused_alike_in_both_modes(double_pipeline, three, in_double):
    apart = fuse(three, double_pipeline, APART, store=in_double).model.weights
    staged, text = fuse(three, double_pipeline, STAGED).model.weights, 0
    for name, weight in apart.items():
        if stage_of(name) == "text":
            text += 1
            assert torch.equal(staged[name], weight), name
    assert text > 0
    far = "unet.up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_q"
    assert not torch.equal(staged[far], apart[far])


def test_staged_layers_see_what_the_stages_before_them_made(double_pipeline, three):
    """Each layer's closed form, with the stages before as they were fused and those behind as in the base."""
    found = fuse(three, double_pipeline, STAGED).model.weights
    for earlier, name in zip(((), ("text",), *[("text", "keys-and-values")] * 2), SOME_LAYERS, strict=True):
        seen = []
        for concept in three:
            own = {one for one in found if stage_of(one) == stage_of(name)}
            with replaced(double_pipeline, {one: found[one] for one in found if stage_of(one) in earlier}):
                recorded = record(double_pipeline, Source.of(concept, STAGED), [name], STAGED, own=own)
            seen.append({name: recorded[input_of(name)].moments})
        base = matrix(layer(double_pipeline, name))
        wanted = closed_form(name, base, three, seen, (1, 1, 1))
        assert float((found[name] - base - wanted).norm() / wanted.norm()) < 1e-9, name


class BreaksOffError(Exception):
    """What stops a fusion here."""


def _rounds(settings: FusionSettings) -> int:
    once = 1 if settings.mode == "independent" else 3
    return once + settings.refine


@pytest.mark.parametrize(
    ("options", "stops"),
    [
        ({"refine": 1}, (3, 7)),
        ({"mode": "independent", "refine": 1, "prior": 1.0, "prior_prompts": ("",)}, (2, 5)),
    ],
    ids=str,
)
def test_a_fusion_that_was_broken_off_goes_on_from_there(options, stops, golden_pipeline, three, recorded, tmp_path):
    concepts, settings = three[1:], few(**options)
    sources = len(concepts) + (settings.prior > 0)
    totals: set[int] = set()
    whole = fuse(concepts, golden_pipeline, settings, progress=lambda step, total, info: totals.add(total))
    assert totals == {len(recorded)} == {_rounds(settings) * sources}
    before = {name: value.clone() for name, value in golden_pipeline.unet.state_dict().items()}
    done = 0
    for stop in (*stops, None):

        def progress(step: int, total: int, info: Any, stop: int | None = stop) -> None:
            if step == stop:
                raise BreaksOffError

        recorded.clear()
        if stop is not None:
            with pytest.raises(BreaksOffError):
                fuse(concepts, golden_pipeline, settings, store=Store(tmp_path), progress=progress)
            assert len(recorded) == stop - done
            assert all(torch.equal(value, before[name]) for name, value in golden_pipeline.unet.state_dict().items())
            done = stop
    resumed = fuse(concepts, golden_pipeline, settings, store=Store(tmp_path), progress=progress)
    assert len(recorded) == totals.pop() - done
    assert same(resumed, whole)


# What counts how much


SOME_LAYERS = [
    "text_encoder.text_model.encoder.layers.2.self_attn.out_proj",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "unet.up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_v",
    "unet.up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_out.0",
]


@pytest.fixture(scope="module")
def in_double(tmp_path_factory) -> Store:
    """For recordings of the model in double precision, which the key does not tell from those in single."""
    return Store(tmp_path_factory.mktemp("in-double"))


@pytest.fixture(scope="module")
def seen_apart(double_pipeline, three) -> list[dict[str, Tensor]]:
    """Each concept's moments by layer."""
    recordings = [record(double_pipeline, Source.of(concept, APART), SOME_LAYERS, APART) for concept in three]
    return [{name: seen[input_of(name)].moments for name in SOME_LAYERS} for seen in recordings]


def closed_form(name: str, base: Tensor, concepts: Any, seen: list[dict[str, Tensor]], weights: Any) -> Tensor:
    """argmin Σ w_i ‖(ΔW_i − ΔW) X_i‖² + λ ‖ΔW − D‖² from each concept's own recording."""
    changes = [
        concept.deltas[name].matrix(dtype=torch.float64) if name in concept.deltas else torch.zeros_like(base)
        for concept in concepts
    ]
    mean = sum(changes) / len(changes)
    moments = sum(w * one[name] for w, one in zip(weights, seen, strict=True))
    rhs = sum(w * change @ one[name] for w, change, one in zip(weights, changes, seen, strict=True))
    scale = 0.1 * moments.diagonal().mean()
    damped = moments + scale * torch.eye(len(moments), dtype=torch.float64)
    return torch.linalg.solve(damped, (rhs + scale * mean).T).T


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("equal", (1, 1, 1)),
        ({"cat": 0.5, "dog": 10.0, "cup": 2.0}, (0.5, 10, 2)),
        ({"cup": 1000.0}, (1, 1, 1000)),
    ],
    ids=str,
)
def test_weights_are_those_of_the_closed_form(weights, expected, double_pipeline, three, seen_apart, in_double):
    settings = few(mode="independent", weights=weights)
    found = fuse(three, double_pipeline, settings, store=in_double).model.weights
    for name in SOME_LAYERS:
        base = matrix(layer(double_pipeline, name))
        change, wanted = found[name] - base, closed_form(name, base, three, seen_apart, expected)
        assert float((change - wanted).norm() / wanted.norm()) < 1e-9, name


def test_a_weight_may_be_of_one_kind_of_layer(double_pipeline, three, seen_apart, in_double):
    settings = few(mode="independent", weights={"dog": 2.0, "dog.picture": 10.0, "cup.text": 5.0})
    found = fuse(three, double_pipeline, settings, store=in_double).model.weights
    expected = {"text": (1, 2, 5), "keys-and-values": (1, 2, 1), "picture": (1, 10, 1)}
    assert {stage_of(name) for name in SOME_LAYERS} == set(expected)
    for name in SOME_LAYERS:
        base = matrix(layer(double_pipeline, name))
        change, wanted = found[name] - base, closed_form(name, base, three, seen_apart, expected[stage_of(name)])
        assert float((change - wanted).norm() / wanted.norm()) < 1e-9, name


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("bird", "weights: no concept is called bird"),
        ("dog.pictures", "weights: expected dog or one of dog.text, dog.keys-and-values, dog.picture, found dog.pictures"),
    ],
)
def test_weights_of_nobody_are_refused(key, message, double_pipeline, three):
    with pytest.raises(BadInputError, match=message):
        fuse(three, double_pipeline, few(weights={key: 2.0}))


@pytest.mark.parametrize("factor", [1e-3, 3.0])
def test_only_the_ratios_of_weights_count(factor, double_pipeline, three, in_double):
    weights = {"cat": 0.5, "dog": 10.0, "cup": 2.0}
    one, other = (
        fuse(
            three,
            double_pipeline,
            APART.model_copy(update={"weights": {name: times * weight for name, weight in weights.items()}}),
            store=in_double,
        ).model.weights
        for times in (1, factor)
    )
    for name, weight in one.items():
        change = weight - matrix(layer(double_pipeline, name))
        assert float((other[name] - weight).norm()) <= 1e-9 * float(change.norm()), name


def test_by_energy_nobody_counts_more_than_its_share_in_any_layer(
    golden_pipeline, three, random_concept, problems, tmp_path
):
    loud = random_concept("sky", seed=4, scale=30.0, changes=SOME.search)
    fuse([*three, loud], golden_pipeline, APART.model_copy(update={"weights": "energy"}), store=Store(tmp_path))
    for name, problem in problems.items():
        assert sum(problem.weights) / 4 == pytest.approx(1)
        counted = []
        for number, change in enumerate(problem.changes):
            moments, base = problem.statistics(number).moments, problem.base.double()
            wanted = [QUIET * base, *([change.matrix(dtype=torch.float64)] if change else [])]
            sizes = [float((moved @ moments * moved).sum()) for moved in wanted]
            counted.append(problem.weights[number] * max(sizes))
        assert counted == pytest.approx([counted[0]] * len(counted), rel=1e-9), name


def test_a_weight_for_nobody_is_refused_by_name(golden_pipeline, three):
    settings = APART.model_copy(update={"weights": {"cat": 2.0, "horse": 1.0, "ant": 1.0}})
    with pytest.raises(BadInputError, match="weights: no concept is called ant, horse"):
        fuse(three, golden_pipeline, settings)


def test_no_prior_is_none(golden_pipeline, three, apart, recorded):
    settings = APART.model_copy(update={"prior": 0.0, "prior_prompts": ("a dog", "a house")})
    assert same(fuse(three, golden_pipeline, settings), apart)
    assert "the base" not in recorded


@pytest.mark.parametrize(("prior", "weights"), [(0.01, "equal"), (1.0, {"cat": 5.0}), (100.0, "energy")])
def test_the_prior_has_its_share_of_a_concepts_energy(prior, weights, golden_pipeline, three, problems, shared):
    fuse(three[:2], golden_pipeline, APART.model_copy(update={"prior": prior, "weights": weights}), store=shared)
    assert problems
    for name, problem in problems.items():
        energies = [
            weight * float(problem.statistics(number).moments.diagonal().sum())
            for number, weight in enumerate(problem.weights)
        ]
        found = problem.prior_weight * float(problem.prior.moments.diagonal().sum())
        assert found == pytest.approx(prior * sum(energies) / 2, rel=1e-9), name


def test_a_heavy_prior_leaves_what_the_base_sees_alone(golden_pipeline, three, tmp_path):
    options = {"mode": "independent", "options": {"toward": "base"}, "prior_prompts": ("", "a photo")}
    names, base = list(three[0].deltas), Source(None, ("", "a photo"), ("", "a photo"))
    seen = record(golden_pipeline, base, names, APART)
    moved: list[dict[str, float]] = []
    for prior in (0.0, 1.0, 100.0, 1e6):
        fused = fuse(three, golden_pipeline, few(prior=prior, **options), store=Store(tmp_path))
        changes = {
            name: fused.model.weights[name].double() - matrix(layer(golden_pipeline, name)).double() for name in names
        }
        moved.append(
            {name: float((one @ seen[input_of(name)].moments * one).sum()) ** 0.5 for name, one in changes.items()}
        )
    for less, more in itertools.pairwise(moved):
        assert all(more[name] < less[name] for name in names)
    assert all(moved[-1][name] < 1e-4 * moved[0][name] for name in names)


# What refining does


@pytest.mark.parametrize("mode", ["staged", "independent"])
def test_refining_keeps_one_concept_alone(mode, double_pipeline, three):
    fused = fuse(three[:1], double_pipeline, few(mode=mode, refine=2)).model.weights
    for name, own in tuned_weights(double_pipeline, three[0], three[0].deltas).items():
        change = own - matrix(layer(double_pipeline, name))
        assert float((fused[name] - own).norm()) < 1e-6 * float(change.norm()), name


def test_refining_solves_for_what_the_layers_see_in_the_fused_model(double_pipeline, three):
    """Each layer's closed form, all with one and the same model as it was fused before."""
    before, after = (fuse(three, double_pipeline, few(refine=passes)).model.weights for passes in (0, 1))
    for name in SOME_LAYERS:
        with replaced(double_pipeline, before):
            seen = [record(double_pipeline, Source.of(concept, STAGED), [name], STAGED, own=set()) for concept in three]
        base = matrix(layer(double_pipeline, name))
        wanted = closed_form(name, base, three, [{name: one[input_of(name)].moments} for one in seen], (1, 1, 1))
        assert float((after[name] - base - wanted).norm() / wanted.norm()) < 1e-9, name
        moved = float((after[name] - before[name]).norm()) > 1e-6 * float(before[name].norm())
        assert moved or stage_of(name) != "picture", name  # keys and values read the fused text encoder before, too


def test_refining_leaves_alone_what_reads_the_words_themselves(double_pipeline, three):
    before, after = (fuse(three[:2], double_pipeline, few(refine=passes)).model.weights for passes in (0, 1))
    first = [name for name in before if re.search(r"\.layers\.0\.self_attn\.[qkv]_proj", name)]
    assert len(first) == 3
    assert all(float((after[name] - before[name]).norm()) < 1e-9 * float(before[name].norm()) for name in first)


@pytest.mark.parametrize("refine", [0, 1])
def test_less_memory_means_more_recordings_of_fewer_layers_and_the_same_model(refine, golden_pipeline, three, tmp_path):
    settings = FusionSettings(steps=1, prompts=("a {}",), picture_prompts=("a {}",), refine=refine)
    whole = fuse(three, golden_pipeline, settings, store=Store(tmp_path / "whole"))
    limit = 8 * 32**2 * 4  # bytes: four of the widest inputs
    little = settings.model_copy(update={"max_memory": limit / 2**30})
    told = []
    found = fuse(three, golden_pipeline, little, store=Store(tmp_path / "little"), progress=lambda *it: told.append(it))
    assert same(found, whole)
    sizes = [[path.stat().st_size for path in (tmp_path / kind).iterdir()] for kind in ("whole", "little")]
    assert len(sizes[1]) > len(sizes[0])
    assert max(sizes[0]) > limit + 10_000
    assert max(sizes[1]) < limit + 10_000  # and what the file says of itself
    assert told[-1][0] == told[-1][1]


def test_less_memory_without_a_store_keeps_nothing_in_memory_and_gives_the_same_model(golden_pipeline, three, monkeypatch):
    settings = FusionSettings(steps=1, prompts=("a {}",), picture_prompts=("a {}",))
    whole = fuse(three[:2], golden_pipeline, settings)
    kept, save = [], stages.Scratch.save

    def watched(scratch: Any, *args: Any) -> Any:
        kept.append(save(scratch, *args))
        return kept[-1]

    monkeypatch.setattr(stages.Scratch, "save", watched)
    limit = 8 * 32**2 * 4  # bytes: four of the widest inputs
    little = settings.model_copy(update={"max_memory": limit / 2**30})
    assert same(fuse(three[:2], golden_pipeline, little), whole)
    assert all(isinstance(one, Recording) for one in kept)
    assert len(kept) > 3 * 2  # more than one in each stage


def test_a_fusion_without_a_store_is_the_same_in_memory_and_in_files(golden_pipeline, three, monkeypatch):
    in_memory = fuse(three, golden_pipeline, STAGED)
    monkeypatch.setattr(stages, "ROOM", 10_000)
    assert same(fuse(three, golden_pipeline, STAGED), in_memory)


@pytest.mark.parametrize(
    ("options", "exact"),
    [
        ({}, False),
        ({"options": {"ridge": 1e-3}}, False),
        ({"options": {"ridge": 1e-6}}, True),
        ({"options": {"ridge": 0.1, "picture.ridge": "1e-6"}}, True),
        ({"mode": "independent"}, True),
        ({"method": "regmean"}, True),
    ],
    ids=str,
)
def test_products_are_in_single_only_where_the_ridge_damps_them_and_nobody_else_reads_them(options, exact):
    assert FusionSettings(**options).exact is exact


@pytest.mark.parametrize("ridges", [(0.03, 1e-6), (1e-6, 0.03)])
def test_products_in_single_and_in_double_are_kept_apart(ridges, golden_pipeline, three, recorded, tmp_path):
    """What the text encoder sees depends on nothing that is fused before it, but it does on how it is counted."""
    first, second = (few(options={"ridge": ridge}) for ridge in ridges)
    fuse(three[:2], golden_pipeline, first, store=Store(tmp_path))
    recorded.clear()
    found = fuse(three[:2], golden_pipeline, second, store=Store(tmp_path))
    assert recorded == 3 * [concept.info.name for concept in sorted(three[:2], key=lambda one: one.hash)]
    assert same(found, fuse(three[:2], golden_pipeline, second))


def test_what_single_precision_changes_is_little(golden_pipeline, three, monkeypatch):
    settings = few(options={"ridge": 1e-3})
    single = fuse(three, golden_pipeline, settings).model
    monkeypatch.setattr(FusionSettings, "exact", True)
    for name, weight in fuse(three, golden_pipeline, settings).model.weights.items():
        change = float((weight - matrix(layer(golden_pipeline, name))).norm())
        assert float((single.weights[name] - weight).norm()) < 3e-3 * change, name
