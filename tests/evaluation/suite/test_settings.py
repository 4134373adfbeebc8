"""Suites: what they say, and that bad ones are refused in one line that names the field."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mixofshow.errors import SettingsError
from mixofshow.evaluation.suite import make_suite, read_suite
from mixofshow.evaluation.suite_settings import usual_prompts
from mixofshow.tuning.settings import with_presets

SUITES = sorted((Path(__file__).parents[3] / "examples" / "suites").glob("*.yaml"))
GOOD = {"concepts": ["clown", "volcano"], "methods": ["ed-lora+gradient"]}


def test_emojilands_concepts_need_no_more_than_their_name():
    clown, place = make_suite(GOOD).concepts
    assert (clown.kind, clown.class_word, clown.noun, clown.prompt_kind) == ("character", "cook", "<clown>", "subject")
    assert (place.kind, place.class_word, place.prompt_kind) == ("scene", "mountains", "scene")


def test_methods_are_called_by_what_they_do():
    methods = [
        "p-plus",
        "custom-diffusion",
        "lora+average",
        {"tuning": "ed-lora", "fusion": "gradient", "name": "ours"},
    ]
    suite = make_suite({**GOOD, "methods": methods})
    assert [method.key for method in suite.methods] == ["p-plus", "custom-diffusion", "lora+average", "ours"]
    assert [suite.fusion(method).method for method in suite.methods] == [
        "average",
        "custom-diffusion",
        "average",
        "gradient",
    ]


def test_a_methods_settings_stand_above_the_suites_and_those_above_the_bases(tmp_path):
    method = {"tuning": "ed-lora", "fusion": "gradient", "tune": {"unet.rank": 2}, "fuse": {"options": {"ridge": 0.5}}}
    suite = make_suite(
        {
            **GOOD,
            "methods": [method],
            "tune": {"steps": 7, "unet": {"rank": 3}},
            "fuse": {"steps": 5, "options": {"toward": "base"}},
        }
    )
    tuning = with_presets(suite.tuning(suite.methods[0], suite.concepts[0], tmp_path), "emojiland")
    assert (tuning.steps, tuning.unet.rank, tuning.unet.rate, tuning.data) == (7, 2, 1.5e-3, tmp_path)
    assert suite.fusion(suite.methods[0]).options == {"toward": "base", "ridge": 0.5}
    assert suite.fusion(suite.methods[0]).steps == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"concepts": ["cloun"]}, "concepts.0: emojiland has no such concept; did you mean 'clown'?"),
        ({"concepts": []}, "'concepts'"),
        ({"concepts": ["clown", "clown"]}, "two concepts are called clown"),
        ({"concepts": [{"name": "clown", "foldr": "x"}]}, "concepts.0: unknown key 'foldr'; did you mean 'folder'?"),
        ({"concepts": [{"name": "mine", "folder": "x"}]}, "'concepts.0.kind'"),
        ({"methods": ["ed-lra+gradient"]}, "methods.0: no tuning method 'ed-lra'; did you mean 'ed-lora'?"),
        ({"methods": ["ed-lora"]}, "ed-lora has no fusion of its own"),
        ({"methods": ["ed-lora+gradeint"]}, "did you mean 'gradient'?"),
        ({"methods": ["p-plus", "p-plus"]}, "two methods are called p-plus"),
        ({"tune": {"unet.rnk": 2}}, "unknown key 'unet.rnk'; did you mean 'unet.rank'?"),
        ({"fuse": {"stepz": 2}}, "unknown key 'stepz'; did you mean 'steps'?"),
        ({"words_only": ["lora"]}, "words_only: no method 'lora'"),
        ({"imges_per_prompt": 2}, "unknown key 'imges_per_prompt'; did you mean 'images_per_prompt'?"),
        ({"images_per_prompt": 0}, "'images_per_prompt'"),
        ({"seed": -1}, "'seed'"),
        ({"compositions": {"together": [["clown", "foxi"]]}}, "compositions.together: no concept 'foxi'"),
        ({"prompts": {"subject": {"context": ["a dog"]}}}, "prompts.subject.context: expected one {} for the concept"),
        ({"prompts": {"subject": {"context": ["a {} {0}"]}}}, "expected one {} for the concept"),
        ({"prompts": {"subject": {"mean": ["a {}"]}}}, "'mean' is no name for a category"),
        ({"prompts": {"person": {"context": ["a {}"]}}}, "prompts.person"),
    ],
)
def test_a_bad_suite_is_refused_in_one_line(change, message):
    with pytest.raises(SettingsError) as caught:
        make_suite({**GOOD, **change}, "suite.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("suite.yaml: ")
    assert "\n" not in str(caught.value)


def test_paths_are_relative_to_the_file_and_keys_may_be_overridden(tmp_path):
    (tmp_path / "base").mkdir()
    concept = {
        "name": "mine",
        "kind": "object",
        "class_word": "cup",
        "folder": "cup",
        "files": {"ed-lora": "cup.safetensors"},
    }
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({**GOOD, "base": "base", "concepts": [concept]}))
    suite = read_suite(tmp_path / "a.yaml", {"images_per_prompt": 9})
    assert suite.base == str(tmp_path / "base")
    assert suite.concepts[0].folder == tmp_path / "cup"
    assert suite.concepts[0].files == {"ed-lora": tmp_path / "cup.safetensors"}
    assert suite.images_per_prompt == 9


@pytest.mark.parametrize("base", ["emojiland", "any other"])
@pytest.mark.parametrize("kind", ["subject", "scene"])
def test_there_are_twenty_prompts_of_each_kind(base, kind):
    prompts = [prompt for row in usual_prompts(base)[kind].values() for prompt in row]
    assert len(prompts) == len(set(prompts)) == 20
    assert all(prompt.count("{}") == 1 for prompt in prompts)


def test_emojiland_is_asked_in_its_own_words():
    from mixofshow.bases.loading import load_base

    tokenizer = load_base("emojiland").tokenizer
    known = usual_prompts("emojiland")
    asked = {prompt for kind in ("subject", "scene") for row in known[kind].values() for prompt in row}
    words = {prompt.format("cat") for prompt in (*asked, *known["without"])}
    assert not [prompt for prompt in words if tokenizer.unk_token_id in tokenizer(prompt).input_ids[1:-1]]


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_the_suites_that_ship_are_good(path):
    suite = read_suite(path)
    assert all(file.is_file() for concept in suite.concepts for file in concept.files.values())


def test_the_papers_table_is_there_in_full():
    (path,) = [path for path in SUITES if path.stem == "emojiland-table1"]
    suite = read_suite(path)
    kinds = [concept.kind for concept in suite.concepts]
    assert kinds.count("character") >= 6 and kinds.count("object") >= 6 and kinds.count("scene") >= 2
    assert {method.key for method in suite.methods} == {
        "p-plus",
        "custom-diffusion",
        "lora+average",
        "ed-lora+average",
        "ed-lora+gradient",
    }
    assert {len(names) for names in suite.compositions.together} == {3}
