"""Running a suite: nothing is made twice, what was broken off goes on, and the results hold what the docs say."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from mixofshow import cli
from mixofshow.bases.loading import load_base
from mixofshow.concepts.concept import Concept, load_concept
from mixofshow.concepts.model import with_concept
from mixofshow.errors import BadInputError, ConceptFileError, SettingsError
from mixofshow.evaluation import tasks
from mixofshow.evaluation.requests import BaseSource, DrawnBy
from mixofshow.evaluation.results import alignment_table, print_alignments, summary
from mixofshow.evaluation.study import read_index
from mixofshow.evaluation.suite import make_suite, read_suite, run_suite
from mixofshow.evaluation.tasks import process_pool

SHIPPED = Path(__file__).parents[3] / "examples" / "concepts"
QUICK_FUSION = {"prompts": ["{}"], "picture_prompts": ["{}"], "steps": 1}
TABLE = {
    "concepts": [
        {"name": "clown", "files": {"ed-lora": str(SHIPPED / "clown.safetensors")}},
        {"name": "steamtrain", "files": {"ed-lora": str(SHIPPED / "steamtrain.safetensors")}},
    ],
    "methods": ["ed-lora+average"],
    "fuse": QUICK_FUSION,
    "words_only": ["ed-lora+average"],
    "prompts": {"subject": {"context": ["a {} on the beach"], "style": ["a {} on a red background"]}},
    "prior_prompts": ["a cat in the snow"],
    "images_per_prompt": 2,
    "steps": 1,
    "imagenet": False,
    "compositions": {"together": [["clown", "steamtrain"]], "places": ["in the forest"], "images": 2},
}
REQUESTS = (
    4 * 2 * 2 + 2 + 2
)  # four arms of two concepts and two prompts, a wide picture of two seeds, a prompt without concepts


@pytest.fixture
def draws(monkeypatch):
    """Counts what is drawn; breaks off after `draws.limit`."""

    class Draws:
        count, limit = 0, 10**6

        def __call__(self, model, wanted):
            if self.count >= self.limit:
                raise KeyboardInterrupt
            self.count += 1
            return drawn(model, wanted)

    drawn, counter = tasks.draw, Draws()
    monkeypatch.setattr(tasks, "draw", counter)
    return counter


def _pictures(out):
    return {path.name: path.read_bytes() for path in (out / "cache" / "pictures").rglob("*.png")}


def test_a_run_that_was_broken_off_goes_on_and_a_finished_one_draws_nothing(tmp_path, draws, caplog):
    suite = make_suite(TABLE)
    draws.limit = 7
    with pytest.raises(KeyboardInterrupt):
        run_suite(suite, tmp_path / "a")
    assert not (tmp_path / "a" / "results.json").exists()
    draws.limit = 10**6
    first = run_suite(suite, tmp_path / "a")
    assert draws.count == REQUESTS
    assert run_suite(suite, tmp_path / "a") == first
    assert draws.count == REQUESTS
    _check_results(first, tmp_path / "a")
    assert "covers no whole cell" not in caplog.text  # of regions that are the suite's own
    index = read_index(tmp_path / "a")
    for states in index.methods.values():
        for state in ("single", "fused"):
            listed = [path for row in states[state].values() for asked in row for path in asked.pictures]
            assert listed and all((tmp_path / "a" / path).is_file() for path in listed)
    assert all((tmp_path / "a" / folder).is_dir() for folder in index.references.values())
    assert not [path for path in (tmp_path / "a").rglob("*") if path.name.startswith(".")]

    more = make_suite({**TABLE, "prior_prompts": ["a cat in the snow", "a dog"]})
    run_suite(more, tmp_path / "a")
    assert draws.count == REQUESTS + 2  # only what is new
    unbroken = run_suite(suite, tmp_path / "b")
    assert _pictures(tmp_path / "b").items() <= _pictures(tmp_path / "a").items()
    assert {**unbroken, "cost": 0} == {**first, "cost": 0}


def test_concepts_of_a_sister_base_are_told_in_the_results(tmp_path, capsys):
    """Numbers, report and table were those of concepts that had been made for this base."""
    concept = load_concept(SHIPPED / "clown.safetensors")
    info = concept.info.model_copy(update={"base": "another", "base_fingerprint": "0123456789abcdef"})
    replace(concept, info=info).save(tmp_path / "clown.safetensors")
    few = {"words_only": [], "prior_prompts": [], "images_per_prompt": 1, "compositions": {}}
    few["prompts"] = {"subject": {"context": ["a {} on the beach"]}}
    taken = {"name": "clown", "files": {"ed-lora": str(tmp_path / "clown.safetensors")}}
    suite = make_suite({**TABLE, **few, "concepts": [taken]})
    with pytest.raises(ConceptFileError, match="made for base 'another'"):
        run_suite(suite, tmp_path / "out")
    results = run_suite(suite, tmp_path / "out", loading={"allow_base": "sister"})
    assert results["made_for"] == summary(results)["made_for"]
    assert results["made_for"] == {"ed-lora+average": {"clown": "another (0123456789abcdef)"}}
    assert "&lt;clown&gt; was made for another (0123456789abcdef)" in (tmp_path / "out" / "report.html").read_text()
    print_alignments(results)
    assert "ed-lora+average: <clown> was made for another (0123456789abcdef)" in capsys.readouterr().out


def _check_results(results, out):
    assert json.loads((out / "results.json").read_text()) == results
    assert results["concepts"] == 2
    method = results["methods"]["ed-lora+average"]
    for measure in ("image_alignment", "image_alignment_first", "text_alignment"):
        assert set(method[measure]) == {"mean", "characters", "objects", "context", "style"}
        for entry in method[measure].values():
            assert entry["change"] == pytest.approx(entry["fused"] - entry["single"])
            for state, (low, high) in entry["intervals"].items():
                assert low - 1e-9 <= entry[state] <= high + 1e-9
    by_concept = method["by_concept"]["image_alignment"]
    assert by_concept["clown"]["single"] == pytest.approx(method["image_alignment"]["characters"]["single"])
    assert set(method["words_only"]["image_alignment"]) >= {"mean", "clown", "context"}
    assert [sum(row) for row in method["interference"]["matrix"]] == pytest.approx([1, 1])
    assert 0 <= results["region_accuracy"]["ed-lora+average"]["value"] <= 1
    assert results["region_accuracy"]["ed-lora+average"]["regions"] == 4
    identity = results["identity"]["ed-lora+average"]
    assert (identity["asked"], list(identity["by_concept"])) == (4, list(results["names"]))
    assert 0 <= identity["accuracy"] <= 1 and identity["missing"] >= identity["doubled"]
    assert set(results["bounds"]["image_alignment"]["mean"]) == {"lower", "upper"}
    assert results["cost"]["ed-lora+average"]["fuse"]["seconds"] > 0
    assert results["cost"]["ed-lora+average"]["tune"] is None
    rows = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    (row,) = [
        row
        for row in rows
        if (row["measure"], row["over"], row["state"]) == ("text_alignment", "style", "fused")
        and row["method"] == "ed-lora+average"
    ]
    assert float(row["value"]) == method["text_alignment"]["style"]["fused"]
    short = summary(results)
    assert short["image_alignment"]["single"] == method["image_alignment"]["mean"]["single"]
    assert short["concepts"].keys() == {"lower_bound", "single", "ed-lora+average"} == short["text_alignment"].keys()
    assert short["concepts"]["single"]["clown"]["image_alignment"] == by_concept["clown"]["single"]
    page = (out / "report.html").read_text()
    assert f"{identity['missing']} of 4" in page
    assert [row for row in csv.DictReader((out / "results.csv").read_text().splitlines()) if row["measure"] == "identity_accuracy"]
    assert set(re.findall(r'(?:src|href)="([a-z]+:)', page)) == {"data:"}
    assert "<script" not in page and page.count("data:image/svg+xml;base64,") >= 5
    assert "0.843\N{NO-BREAK SPACE}→\N{NO-BREAK SPACE}0.749" in page
    head, rows = alignment_table(results, "image_alignment")
    assert len(head) == len(rows[0]) and [row[0].strip("*") for row in rows][:3] == ["<clown>", "<steamtrain>", "mean"]
    flagged = {row[0].strip("<>*") for row in rows if row[0].endswith("*")}
    lower = results["bounds"]["by_concept"]["image_alignment"]
    assert flagged == {name for name in lower if by_concept[name]["single"] < lower[name]["lower"] + 0.05}
    assert flagged == set(results["drawn_by_the_base"]["image_alignment"])
    assert page.count("&lt;steamtrain&gt;") > 4 and ("* the base draws it already" in page) == any(
        results["drawn_by_the_base"].values()
    )


def test_concepts_are_tuned_once_and_again_when_settings_or_pictures_change(tmp_path, draws, monkeypatch):
    tuned = []

    def tune(settings, pipeline):
        tuned.append(settings.name)
        return load_concept(SHIPPED / f"{settings.name}.safetensors", pipeline)

    monkeypatch.setattr(tasks, "tune", tune)
    folder = tmp_path / "mine"
    for part in ("train", "reference"):
        (folder / part).mkdir(parents=True)
        Image.new("RGB", (64, 64), "red").save(folder / part / "a.png")
    mine = {"name": "clown", "kind": "character", "class_word": "cook", "folder": str(folder)}
    table = {**TABLE, "concepts": [mine], "compositions": {}, "methods": ["ed-lora+average", "ed-lora+sum"]}
    out = tmp_path / "out"
    results = run_suite(make_suite(table), out)
    assert tuned == ["clown"]  # by both methods in the same way
    assert results["cost"]["ed-lora+sum"]["tune"]["seconds"] >= 0
    run_suite(make_suite(table), out)
    assert len(tuned) == 1
    run_suite(make_suite({**table, "tune": {"steps": 3}}), out)
    assert len(tuned) == 2
    Image.new("RGB", (64, 64), "blue").save(folder / "train" / "a.png")
    run_suite(make_suite(table), out)
    assert len(tuned) == 3
    Image.new("RGB", (64, 64), "blue").save(folder / "reference" / "a.png")
    run_suite(make_suite(table), out)
    assert len(tuned) == 3  # references are for looking only


def test_words_alone_lose_nothing_when_they_are_put_together(tmp_path, draws, monkeypatch):
    def tune(settings, pipeline):
        concept = load_concept(SHIPPED / f"{settings.name}.safetensors", pipeline)
        word = {"words": (settings.placeholder,), "initializers": ("dog",), "method": settings.method}
        return Concept(concept.info.model_copy(update=word), concept.embeddings[1:], {})

    monkeypatch.setattr(tasks, "tune", tune)
    table = {**TABLE, "concepts": ["clown", "robot"], "methods": ["p-plus"], "words_only": [], "compositions": {}}
    method = run_suite(make_suite(table), tmp_path)["methods"]["p-plus"]
    assert method["image_alignment"]["mean"]["change"] == 0
    assert method["prior_drift"] == pytest.approx(0, abs=1e-6)


def test_a_damaged_picture_and_a_strangers_concept_are_named(tmp_path, draws):
    table = {**TABLE, "words_only": [], "compositions": {}, "prior_prompts": []}
    run_suite(make_suite(table), tmp_path)
    path = next((tmp_path / "cache" / "pictures").rglob("*.png"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BadInputError, match=f"{path.name}: cannot be read as a picture"):
        run_suite(make_suite(table), tmp_path)
    other = {"name": "clown", "files": {"ed-lora": str(SHIPPED / "robot.safetensors")}}
    with pytest.raises(SettingsError, match=r"expected the concept <clown>, found <robot>"):
        run_suite(make_suite({**table, "concepts": [other]}), tmp_path)


def test_jobs_are_done_in_any_number_of_processes_and_errors_come_through(tmp_path):
    done = []
    with process_pool(1) as each:
        assert list(each(done.append, [1, 2, 3])) == done == [1, 2, 3]
    with pytest.raises(SettingsError, match="workers"), process_pool(0):
        pass


@pytest.mark.slow
def test_several_processes_draw_the_same_pictures(tmp_path):
    suite = make_suite(TABLE)
    one, two = (run_suite(suite, tmp_path / str(workers), workers=workers) for workers in (1, 2))
    assert _pictures(tmp_path / "1").keys() == _pictures(tmp_path / "2").keys()
    mean = "image_alignment"
    assert two["methods"]["ed-lora+average"][mean]["mean"]["single"] == pytest.approx(
        one["methods"]["ed-lora+average"][mean]["mean"]["single"], abs=1e-3
    )
    missing = {**TABLE["concepts"][0], "files": {"ed-lora": str(tmp_path / "missing.safetensors")}}
    with pytest.raises(BadInputError, match=r"missing\.safetensors"):
        run_suite(make_suite({**TABLE, "concepts": [missing], "compositions": {}}), tmp_path / "3", workers=2)


@pytest.mark.slow
def test_the_small_suite_shows_what_the_paper_shows(tmp_path):
    results = run_suite(read_suite(SHIPPED.parent / "suites" / "emojiland-small.yaml"), tmp_path, workers=2)
    scores = {key: method["image_alignment"]["mean"] for key, method in results["methods"].items()}
    assert abs(scores["ed-lora+gradient"]["change"]) <= 0.05
    assert scores["ed-lora+gradient"]["change"] > scores["ed-lora+average"]["change"]
    assert scores["ed-lora+gradient"]["single"] > results["bounds"]["image_alignment"]["mean"]["lower"]
    assert results["region_accuracy"]["ed-lora+gradient"]["value"] >= 2 / 3  # by chance it is 1 / 3
    words = results["methods"]["ed-lora+gradient"]["words_only"]["image_alignment"]
    alone = results["methods"]["ed-lora+gradient"]["by_concept"]["image_alignment"]
    assert alone["robot"]["single"] - words["robot"] > alone["clown"]["single"] - words["clown"]  # out of domain, in it


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{0}/missing.yaml"], "missing.yaml: cannot be read"),
        (["{0}/typo.yaml"], "typo.yaml: unknown key 'concept'; did you mean 'concepts'?"),
        (["{0}/typo.yaml", "--method", "average"], "--method: is for FILE=FOLDER"),
        (["{0}/typo.yaml", "another.yaml"], "one suite at a time"),
    ],
)
def test_the_command_names_what_is_wrong(tmp_path, capsys, monkeypatch, arguments, message):
    (tmp_path / "typo.yaml").write_text("concept: [clown]\nconcepts: [clown]\nmethods: [p-plus]\n")
    monkeypatch.setattr("sys.argv", ["mixofshow", "evaluate", *(one.format(tmp_path) for one in arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_fused_model_speaks_the_words_of_its_file(tmp_path):
    concept = SHIPPED / "clown.safetensors"
    model = with_concept(load_base("emojiland"), load_concept(concept))
    refitted = {word: 2 * vector for word, vector in model.vocabulary.embeddings.items()}
    replace(model, vocabulary=replace(model.vocabulary, embeddings=refitted)).save_delta(tmp_path / "a.safetensors")
    found = tasks._loaded(DrawnBy(BaseSource("emojiland"), "", delta=tmp_path / "a.safetensors"))
    assert found.vocabulary.aliases == model.vocabulary.aliases
    assert list(found.vocabulary.embeddings) == list(refitted)
    assert all(torch.equal(vector, refitted[word]) for word, vector in found.vocabulary.embeddings.items())
