"""What the studio does, without a page: forms, compositions, advice, jobs, and drawing the command line's bytes."""

from __future__ import annotations

import shlex
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import BaseModel, Field

from mixofshow import cli
from mixofshow.errors import BadInputError, MixOfShowError, SettingsError
from mixofshow.fusion.settings import FusionSettings
from mixofshow.reading import read_table
from mixofshow.replaceable import kind_of
from mixofshow.sampling.composition import make_composition
from mixofshow.sampling.pictures import embedded
from mixofshow.sampling.replay import Maker, save_picture
from mixofshow.sampling.settings import Composition, Region
from mixofshow.studio import compose, sketching, web
from mixofshow.studio.advice import advice, completed
from mixofshow.studio.compose import Studio
from mixofshow.studio.drawing import OWN
from mixofshow.studio.editor import painted, region_fields, regions_of, value_of
from mixofshow.studio.forms import fields_of, table_of, values_of
from mixofshow.studio.jobs import Job, Jobs
from mixofshow.studio.server import check_address
from mixofshow.studio.shelf import cards, file_name, named_in, put_on, unreadable
from mixofshow.studio.workspace import Workspace
from mixofshow.tuning.settings import TuningSettings, dotted_keys

EXAMPLES = Path(__file__).parents[2] / "examples" / "concepts"
FILES = [EXAMPLES / f"{name}.safetensors" for name in ("clown", "steamtrain")]
BOX = {"prompt": "a <clown>", "box": [0.0, 0.0, 0.5, 1.0], "units": "share"}


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    workspace = Workspace(tmp_path / "work")
    put_on(workspace, FILES)
    return Studio(workspace)


def parts(canvas: dict[str, Any], prompt: str = "", **values: Any) -> list[Any]:
    """The page's parts as they are when it opens, with some filled in."""
    given = values.pop("given", {})
    plain = [values.pop(key, None) for key in compose.PLAIN[1:]]
    more = values_of(compose.more_fields(), values)
    return [canvas, prompt, *plain, *more, given]


# Forms.


@pytest.mark.parametrize("model", [TuningSettings, FusionSettings])
def test_a_form_has_every_setting_and_only_those(model: type[BaseModel]) -> None:
    assert [one.key for one in fields_of(model.model_json_schema())] == [key for key, _ in dotted_keys(model)]


def test_every_key_of_a_composition_has_its_place() -> None:
    keys = {*compose.ON_THE_PAGE, *(one.key for one in compose.more_fields())}
    assert keys == set(Composition.model_fields)


def test_a_form_left_alone_says_nothing_and_one_filled_in_says_just_that() -> None:
    fields = fields_of(TuningSettings.model_json_schema())
    assert table_of(fields, values_of(fields, {})) == {}
    given = {"name": "cat", "unet.rank": 8, "captions.shuffle": True, "unet.targets": "all", "loss.min_snr": 5.0}
    assert table_of(fields, values_of(fields, given)) == given


def test_a_form_reads_what_has_several_kinds_as_yaml_and_lists_by_line() -> None:
    class Odd(BaseModel):
        isolate: int | bool = False
        prompts: tuple[str, ...] = ("{}",)
        author: str | None = None
        rank: int = Field(4, ge=1, le=8)

    fields = fields_of(Odd.model_json_schema())
    assert [(one.kind, one.minimum, one.maximum) for one in fields][-1] == ("whole", 1, 8)
    assert table_of(fields, ["true", "a {}\n\n{} b", "yes", ""]) == {
        "isolate": True,
        "prompts": ["a {}", "{} b"],
        "author": "yes",
    }


def test_the_list_of_regions_asks_what_a_region_has() -> None:
    asked = {one["key"] for one in region_fields()}
    assert asked | {"prompt", "box", "polygon", "mask", "units", "adapters"} == set(Region.__dataclass_fields__)


# Compositions.

REGIONS = [
    BOX | {"feather": 0.1, "strength": 0.5, "first_step": 2},
    {"prompt": "b", "polygon": [[0.0, 0.0], [1.0, 0.0], [0.5, 1.0]], "units": "share", "negative_prompt": "c"},
]


def test_a_composition_comes_back_as_it_was_put_together(studio: Studio) -> None:
    canvas = {"width": 96, "height": 64, "regions": REGIONS}
    made = compose.composition_from(*parts(canvas, "all", width=96, height=64, seed=3, num=2, steps=7, isolate=True))
    assert (made.prompt, made.width, made.seed, made.num, made.steps, made.isolate) == ("all", 96, 3, 2, 7, True)
    again = compose.parts_of(studio, made)
    assert again[0] == canvas
    assert compose.composition_from(*again) == made


def test_what_is_on_the_canvas_is_kept_and_another_page_finds_it(studio: Studio) -> None:
    made = compose.composition_from(*parts({"regions": REGIONS}, "ein Clown – draußen"))
    compose.keep(studio, made, OWN)
    assert Studio(studio.workspace).workspace.composition() == made
    assert read_table(studio.workspace.canvas)["prompt"] == "ein Clown – draußen"


def test_a_page_that_has_not_seen_what_another_did_writes_nothing_over_it(studio: Studio) -> None:
    pages, (first, second, third) = ("one", "other"), (Composition(prompt=text) for text in "abc")
    for page in pages:
        studio.changes.begin(page)
    compose.keep(studio, first, OWN, "one")
    assert not studio.changes.news("one")
    compose.keep(studio, second, OWN, "other")
    assert studio.workspace.composition() == first
    assert "at the same moment is not kept" in studio.changes.news("other") and not studio.changes.news("other")
    compose.keep(studio, second, OWN, "other")
    assert studio.changes.news("one") == "another page has changed this"
    compose.keep(studio, third, OWN, "one")
    assert studio.workspace.composition() == third


def test_a_page_of_before_the_studio_was_started_again_writes_nothing_over_what_came_since(studio: Studio) -> None:
    before, since, anew = (Composition(prompt=text) for text in "abc")
    compose.keep(studio, before, OWN, "old")
    again = Studio(studio.workspace)
    compose.keep(again, since, OWN, "old")  # nobody has done anything since
    again.changes.begin("new")
    compose.keep(again, anew, OWN, "new")
    assert again.changes.news("old") == "another page has changed this"
    once_more = Studio(studio.workspace)
    once_more.changes.begin("new")
    compose.keep(once_more, since, OWN, "new")
    compose.keep(once_more, before, OWN, "old")
    assert once_more.workspace.composition() == since
    assert "at the same moment is not kept" in once_more.changes.news("old")


def test_a_canvas_that_cannot_be_read_is_put_aside_and_not_lost(studio: Studio) -> None:
    for number in (1, 2):
        studio.workspace.canvas.write_text(f"prompt: [{number}")
        assert studio.workspace.composition() == Composition(prompt="")
        studio.workspace.keep(Composition(prompt="new"))
        aside = studio.workspace.folder / f"composition-aside-{number}.yaml"
        assert aside.read_text() == f"prompt: [{number}"


def test_pixels_become_shares_of_the_picture() -> None:
    regions = ({"prompt": "a", "box": [16, 8, 80, 64], "feather": 6.4}, {"prompt": "b", "box": [0, 0, 0.5, 1]})
    found = value_of(make_composition({"prompt": "", "regions": regions}), (160, 64))
    assert found["regions"][0]["box"] == [0.1, 0.125, 0.5, 1.0]
    assert found["regions"][0]["feather"] == pytest.approx(0.1)
    assert found["regions"][1]["box"] == [0.0, 0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    "region",
    [
        {"prompt": "a", "mask": "/etc/hostname"},
        {"prompt": "a", "mask": "../secret.png"},
        {"prompt": "a", "box": [0, 0, 1], "units": "share"},
        {"prompt": "a", "box": [0, 0, 1, 1], "boxx": 1},
        {"prompt": 5, "box": [0, 0, 1, 1]},
        {"prompt": "a", "polygon": "all"},
        {},
        "<img src=x onerror=alert(1)>",
        None,
    ],
)
def test_no_visitor_names_a_file_or_breaks_the_page(region: Any) -> None:
    with pytest.raises(MixOfShowError) as refused:
        compose.composition_from(*parts({"regions": [region]}))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", [None, 5, "text", {"regions": 5}, {"regions": {}}, {}])
def test_a_value_that_is_no_canvas_is_refused(value: Any) -> None:
    with pytest.raises(SettingsError, match="regions: expected a list"):
        regions_of(value)


# What a region lacks.


@pytest.mark.parametrize(
    ("prompts", "base", "said"),
    [
        (["", "a <steamtrain>"], "other", ["Say what is in this region.", ""]),
        (["a <clwn>", "a <steamtrain>"], "other", ["did you mean '<clown>'", ""]),
        (["a cook", "a <steamtrain>"], "other", ["No concept's name", ""]),
        (["a <clown>", "a <steamtrain>"], "other", ["", ""]),
        (["A <Clown>", "a <STEAMTRAIN2>"], "other", ["", ""]),
        (["a <clown>", "a car and a <steamtrain>"], "emojiland", ["as: a photo of a <clown> and a cook", ""]),
    ],
)
def test_what_a_regions_prompt_lacks_is_said(studio: Studio, prompts: list[str], base: str, said: list[str]) -> None:
    boxes = ([0, 0, 0.5, 1], [0.5, 0, 1, 1])
    regions = [{"prompt": prompt, "box": box} for prompt, box in zip(prompts, boxes, strict=True)]
    found = advice(make_composition({"prompt": "", "regions": regions}), cards(studio.workspace), base)
    assert all(part in line and bool(part) == bool(line) for part, line in zip(said, found, strict=True))


def test_written_prompts_lack_nothing_and_go_from_left_to_right(studio: Studio) -> None:
    shelf = cards(studio.workspace)
    right, left = {"prompt": "<clown>", "box": [0.5, 0, 1, 1]}, {"prompt": "<steamtrain>", "box": [0, 0, 0.5, 1]}
    made = completed(make_composition({"prompt": "", "regions": [right, left]}), shelf, "emojiland", "in the forest")
    assert made.prompt == "a photo of a <steamtrain> and a <clown> in the forest"
    assert made.regions[0].prompt == "a photo of a cook and a <clown> in the forest"
    assert advice(made, shelf, "emojiland") == ["", ""]


# The shelf.


def test_the_shelf_says_what_files_say_and_what_is_wrong_with_others(studio: Studio) -> None:
    (studio.workspace.concepts / "bad.safetensors").write_bytes(b"\x80\x04K\x01." + bytes(100))
    assert [card.word for card in cards(studio.workspace)] == ["<clown>", "<steamtrain>"]
    assert "a cook" in cards(studio.workspace)[0].facts
    (problem,) = unreadable(studio.workspace)
    assert "pickles are never opened" in problem
    composition = make_composition({"prompt": "a <Clown1> here"})
    assert [card.name for card in named_in(composition, cards(studio.workspace))] == ["clown"]


@pytest.mark.parametrize(
    ("text", "name"), [("My Dog!", "my-dog"), ("../../etc/x", "etc-x"), ("<b>", "b"), ("日本", "concept"), ("clown", "clown-2")]
)
def test_a_concept_is_called_by_a_plain_name(text: str, name: str) -> None:
    assert file_name(text, ["clown"]) == name


def test_a_strangers_text_is_never_html() -> None:
    assert web.line('<img src=x onerror="alert(1)">') == (
        '<p class="line good" role="status">&lt;img src=x onerror=&quot;alert(1)&quot;&gt;</p>'
    )


# Jobs.


def test_jobs_are_done_in_turn_and_say_how_they_ended() -> None:
    jobs, order = Jobs(), list[str]()

    def work(name: str, error: BaseException | None = None) -> Any:
        def act(job: Job) -> list[Path]:
            order.append(name)
            if error:
                raise error
            return [Path(name)]

        return act

    errors = {"one": None, "two": BadInputError("no <b>"), "three": ZeroDivisionError("x")}
    ends = [jobs.submit("a", name, work(name, error)) for name, error in errors.items()]
    for job in ends:
        jobs.wait(job)
    assert order == ["one", "two", "three"]
    assert [job.state for job in ends] == ["done", "failed", "failed"]
    assert ends[0].results == (Path("one"),)
    assert ends[1].line == "no <b>"
    assert ends[2].line.startswith("a fault of the program (ZeroDivisionError")


def test_stopping_ends_what_is_at_work_as_ctrl_c_does_and_what_waits_never_begins() -> None:
    jobs, begun = Jobs(), threading.Event()

    def endless(job: Job) -> list[Path]:
        begun.set()
        while True:
            job.progress(1, 2, {"loss": 0.5})

    first, second = jobs.submit("a", "one", endless), jobs.submit("a", "two", endless)
    other = jobs.submit("b", "three", lambda job: [])
    begun.wait(30)
    assert jobs.latest("a") is first
    jobs.stop("a")
    assert jobs.wait(other, 30).state == "done"
    assert (first.state, second.state, first.figures) == ("stopped", "stopped", {"loss": 0.5})


# Drawing.


def test_a_picture_has_the_bytes_that_its_command_line_gives(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    canvas = {"regions": [BOX, {"prompt": "a <steamtrain>", "box": [0.5, 0, 1, 1], "units": "share"}]}
    composition = compose.composition_from(*parts(canvas, "a <clown>", width=96, height=32, num=2, steps=2, seed=5))
    monkeypatch.setattr("mixofshow.studio.drawing.PREVIEW_SECONDS", 0.0)
    job = studio.jobs.wait(compose.start_drawing(studio, composition, OWN))
    assert job.line == "drawing 2 pictures: done", job.said
    assert job.preview is not None and job.preview.size == (96, 32)
    first, second = sorted(job.results)
    assert (compose.caption(first), compose.caption(second)) == ("0001 · seed 5", "0002 · seed 6")
    monkeypatch.chdir(studio.workspace.folder)
    monkeypatch.setattr(sys, "argv", shlex.split(compose.command_of(second)))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert Path("picture.png").read_bytes() == second.read_bytes()
    again = compose.recalled(studio.workspace, second)
    assert again.regions == composition.regions and again.seed == 6
    assert compose.drawn_by_of(second) == OWN


def test_one_region_is_drawn_over_and_all_else_stays(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(studio.workspace.folder)
    canvas = {"regions": [BOX, {"prompt": "a <steamtrain>", "box": [0.5, 0, 1, 1], "units": "share"}]}
    composition = compose.composition_from(*parts(canvas, "a <clown>", width=64, height=32, steps=2))
    (first,) = studio.jobs.wait(compose.start_drawing(studio, composition, OWN)).results
    anew = composition.model_copy(update={"seed": 9})
    job = studio.jobs.wait(compose.start_drawing_over(studio, first.stem, 2, anew, OWN))
    assert job.state == "done", job.line
    (second,) = job.results
    before, after = (np.array(Image.open(one).convert("RGB")) for one in (first, second))
    assert (before[:, :32] == after[:, :32]).all() and (before[:, 32:] != after[:, 32:]).any()
    monkeypatch.setattr(sys, "argv", shlex.split(compose.command_of(second)))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert Path("picture.png").read_bytes() == second.read_bytes()
    assert compose.recalled(studio.workspace, second).redo.prompt == "a <steamtrain>"
    for picture, place, said in (("", 1, "which picture"), ("7777", 1, "no picture is called"), (first.stem, 3, "from 1 to 2")):
        with pytest.raises(BadInputError, match=said):
            compose.start_drawing_over(studio, picture, place, composition, OWN)


def test_what_cannot_be_drawn_is_refused_before_anything_is_written(studio: Studio) -> None:
    two = compose.composition_from(*parts({"regions": []}, "a <clown> and a <steamtrain>"))
    for composition, drawn_by, said in [
        (two, OWN, "2 files without regions"),
        (two, "lost", "no fused model is called 'lost'"),
        (two.model_copy(update={"num": 65}), OWN, "at most 64"),
        (two.model_copy(update={"prompt": "a <clwn>"}), OWN, "unknown concept '<clwn>'"),
    ]:
        with pytest.raises(BadInputError, match=said):
            compose.start_drawing(studio, composition, drawn_by)
    assert studio.workspace.picture_files() == []
    with pytest.raises(SettingsError, match="no picture is called"):
        compose.picture_named(studio, "../composition")


def test_of_what_is_stopped_only_the_pictures_that_were_drawn_stay(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(job: Job, step: int, *_: Any) -> None:
        if step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Job, "progress", stop)
    three = compose.composition_from(*parts({"regions": [BOX]}, "a <clown>", width=32, height=32, num=3, steps=2))
    assert studio.jobs.wait(compose.start_drawing(studio, three, OWN)).state == "stopped"
    assert sorted(file.name for file in studio.workspace.pictures.iterdir()) == ["0001.png", "0001.yaml"]


def carrying(made: Composition, path: Path) -> Path:
    """A picture that says it was made from a composition."""
    maker = Maker(base="b", hash="h", concepts={}, versions={}, device="cpu", threads=1)
    save_picture(Image.new("RGB", (8, 8)), path, made, maker)
    return path


def test_what_a_picture_was_drawn_from_comes_back_with_it(studio: Studio, tmp_path: Path) -> None:
    start = embedded(Image.new("RGB", (8, 8)))
    made = make_composition({"prompt": "a", "image": start, "seed": 4, "width": 64, "height": 64})
    found = compose.recalled(studio.workspace, carrying(made, tmp_path / "a.png"))
    assert found == made
    assert compose.composition_from(*compose.parts_of(studio, found)) == made
    assert compose.underlay(None, found) == start


def test_a_sketch_becomes_a_control_and_strangers_sketches_are_left_out(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    workspace = studio.workspace
    monkeypatch.chdir(workspace.folder)
    sketch = painted({"regions": [{"box": [0, 0, 0.5, 1], "units": "share"}]}, (64, 64))
    assert [sketch.getpixel((x, 9)) for x in (10, 50)] == [255, 0]
    control = sketching.following(workspace, sketch.convert("RGB"), "emojiland-t2i-adapter", strength=0.8, end=None)
    assert control["picture"].startswith("inputs/") and control["strength"] == 0.8
    made = compose.composition_from(*parts({"regions": []}, "a <clown>", given={"controls": [control]}))
    workspace.keep(made)
    assert workspace.composition() == made
    assert compose.recalled(workspace, carrying(made, tmp_path / "a.png")) == made
    Path(control["picture"]).rename(tmp_path / "elsewhere.png")
    assert compose.recalled(workspace, tmp_path / "a.png").controls == ()
    assert "a sketch that is not here" in caplog.text
    with pytest.raises(SettingsError, match="no network is called '../x'"):
        sketching.following(workspace, sketch, "../x")
    with pytest.raises(SettingsError, match="nothing is painted"):
        painted({"regions": []}, (64, 64))


def test_a_composition_read_back_from_its_file_is_the_same(studio: Studio) -> None:
    workspace = studio.workspace
    mask, large = embedded(Image.new("L", (4, 4), 128)), embedded(Image.effect_noise((128, 128), 99).convert("RGB"))
    regions = [{"prompt": "- a", "mask": mask}]
    made = make_composition({"prompt": "ü: #x", "regions": regions, "guidance_scale": 3, "image": large})
    workspace.keep(made)
    assert workspace.composition() == made
    (file,) = workspace.inputs.iterdir()
    assert f"image: inputs/{file.name}" in workspace.canvas.read_text("utf-8")
    assert kind_of(workspace.canvas) == "YAML"


def test_what_others_wrote_is_not_written_over(studio: Studio, caplog: pytest.LogCaptureFixture) -> None:
    workspace = studio.workspace
    workspace.canvas.write_text("prompt: mine\n")
    assert workspace.composition().prompt == "mine"
    workspace.keep(Composition(prompt="new"))
    assert (workspace.folder / "composition-aside-1.yaml").read_text() == "prompt: mine\n"
    assert "is now composition-aside-1.yaml" in caplog.text
    workspace.keep(Composition(prompt="newer"))
    assert workspace.composition().prompt == "newer"
    assert not (workspace.folder / "composition-aside-2.yaml").exists()


# Who may come in.


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_an_address_that_others_reach_needs_a_token(host: str) -> None:
    with pytest.raises(SettingsError, match="give a token"):
        check_address(host, None)
    check_address(host, "a long secret")
    with pytest.raises(SettingsError, match="at least 8"):
        check_address(host, "short")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.5"])
def test_this_machine_alone_needs_none(host: str) -> None:
    check_address(host, None)


def test_pictures_beyond_the_ten_thousandth_write_over_none(tmp_path):
    workspace = Workspace(tmp_path / "work")
    workspace.open()
    (workspace.pictures / "9999.yaml").touch()
    made = [workspace.new_pictures([Composition(prompt=text)], lambda *_: "")[0] for text in ("first", "second")]
    names = [file.name for file in made]
    assert names == ["10000.yaml", "10001.yaml"]
    for name in ("9999.png", "10000.png", "mine.png"):
        (workspace.pictures / name).touch()
    assert [one.name for one in workspace.picture_files()] == ["10000.png", "9999.png", "mine.png"]
