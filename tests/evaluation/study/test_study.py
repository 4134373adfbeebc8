"""Laws of the study: fair lots, blind pages, answers in a real browser, and statistics against hand-computed values."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
from PIL import Image, PngImagePlugin
from typer.testing import CliRunner

from mixofshow.cli import app
from mixofshow.errors import BadInputError, SettingsError
from mixofshow.evaluation.study import build_study, fleiss_kappa, score_study, wilson

METHODS = {"ours": (10, 200, 10), "theirs": (200, 10, 10)}
CONCEPTS = ("cat", "dog")


@pytest.fixture
def suite(tmp_path):
    """What a suite writes: each method's pictures are of one colour, a little different each."""
    folder = tmp_path / "suite"
    secret = PngImagePlugin.PngInfo()
    secret.add_text("mixofshow", "drawn by theirs")
    for concept in CONCEPTS:
        (folder / concept).mkdir(parents=True)
        Image.new("RGB", (16, 16), "blue").save(folder / concept / "0.png")
    methods = {}
    for method, (red, green, blue) in METHODS.items():
        row = {}
        for number, concept in enumerate(CONCEPTS):
            paths = [f"{method}-{concept}-{k}.png" for k in range(4)]
            for k, path in enumerate(paths):
                Image.new("RGB", (16, 16), (red, green, blue + 20 * k + number)).save(folder / path, pnginfo=secret)
            row[concept] = [
                {"prompt": f"a {concept}", "pictures": paths[:2]},
                {"prompt": f"a {concept} </script><b>", "pictures": paths[2:]},
            ]
        methods[method] = {"single": row, "fused": row}
    table = {"references": {name: name for name in CONCEPTS}, "methods": methods}
    (folder / "pictures.json").write_text(json.dumps(table))
    return folder


def study_of(page):
    return json.loads(re.search(r'id="study">(.*?)</script>', page.read_text(), re.DOTALL).group(1))


def answers(path, *, choose, rater="a", pairs=(("ours", "theirs"),) * 4, **changes):
    """A file of answers; `choose(item)` is (image, text)."""
    rows = [
        {"item": item, "left": left, "right": right, "image": choose(item)[0], "text": choose(item)[1]}
        for item, (left, right) in enumerate(pairs)
    ]
    table = {"schema": 1, "study": "s", "rater": rater, "items": len(rows), "answers": rows, **changes}
    path.write_text(json.dumps(table))
    return path


def test_sides_are_even_concepts_take_turns_and_the_same_seed_draws_the_same_lots(suite, tmp_path):
    pages = [tmp_path / f"{number}.html" for number in range(3)]
    for page, seed in zip(pages, (0, 0, 1), strict=True):
        assert build_study(suite, ["ours,theirs"], page, count=8, seed=seed) == 8
    assert pages[0].read_bytes() == pages[1].read_bytes() != pages[2].read_bytes()
    items = study_of(pages[0])["items"]
    assert Counter(item["left"]["method"] for item in items) == {"ours": 4, "theirs": 4}
    assert Counter(item["concept"] for item in items) == {"cat": 4, "dog": 4}
    assert all({item[side]["method"] for side in ("left", "right")} == set(METHODS) for item in items)
    assert len({item["left"]["picture"] for item in items}) == 8


def test_pages_hold_everything_and_pictures_tell_nothing_of_their_making(suite, tmp_path):
    build_study(suite, ["ours,theirs"], tmp_path / "page.html", count=4)
    text = (tmp_path / "page.html").read_text()
    assert "drawn by" not in text
    assert not re.search(r"""(src|href)=["'](?!data:)""", text)
    assert "http" not in text
    assert all(
        item["left"]["picture"].startswith("data:image/png;base64,")
        for item in study_of(tmp_path / "page.html")["items"]
    )


@pytest.mark.parametrize(
    ("pairs", "count", "message"),
    [
        (["ours,their"], 4, "no method 'their' in this suite; did you mean 'theirs'"),
        (["ours"], 4, "expected two methods as A,B, found 'ours'"),
        (["ours,ours"], 4, "expected two methods"),
        (["ours,theirs"], 9, "has 8 pictures of each method, 9 are asked for"),
        (["ours,theirs"], 0, "count: expected at least 1, found 0"),
    ],
)
def test_what_cannot_be_asked_is_named(suite, tmp_path, pairs, count, message):
    with pytest.raises((BadInputError, SettingsError), match=re.escape(message)):
        build_study(suite, pairs, tmp_path / "page.html", count=count)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("content", [None, "", "{", '{"methods": {}}', '{"references": {}, "methods": 3}'])
def test_a_folder_that_is_no_suite_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "pictures.json").write_text(content)
    with pytest.raises(BadInputError, match=re.escape(str(tmp_path))):
        build_study(tmp_path, ["a,b"], tmp_path / "page.html")


# ---- in a browser


@pytest.mark.filterwarnings("default")  # of the browser's driver
def test_a_browser_takes_keys_and_clicks_goes_on_where_it_stopped_and_gives_answers_that_can_be_scored(
    suite, tmp_path, browser
):
    file = tmp_path / "page.html"
    build_study(suite, ["ours,theirs"], file, count=4)
    items, person = study_of(file)["items"], browser.new_context()
    page = person.new_page()
    page.goto(file.as_uri())
    for key in ("ArrowLeft", "ArrowLeft", "Backspace", "ArrowRight"):  # two answers, one taken back and given anew
        page.keyboard.press(key)
    assert page.inner_text("#position") == "question 3 of 8"
    assert "ours" not in page.inner_text("body")
    assert page.input_value("#answers") == ""
    page.close()
    page = person.new_page()
    page.goto(file.as_uri())
    for number in range(2, 8):  # opened again: whoever is "ours" is clicked from here on
        page.click("#left" if items[number // 2]["left"]["method"] == "ours" else "#right")
    text = page.input_value("#answers")
    person.close()
    found = json.loads(text)
    assert found["answers"][0]["image"] == items[0]["left"]["method"]
    assert found["answers"][0]["text"] == items[0]["right"]["method"]
    assert all(answer["image"] == answer["text"] == "ours" for answer in found["answers"][1:])
    (tmp_path / "answers.json").write_text(text)
    image, _ = score_study([tmp_path / "answers.json"])
    assert image.pair == ("ours", "theirs")
    assert image.share == (3 + (items[0]["left"]["method"] == "ours")) / 4


# ---- counting


def test_shares_are_of_all_answers_whichever_side_a_method_stood_on(tmp_path):
    pairs = (("ours", "theirs"), ("theirs", "ours"), ("ours", "theirs"), ("theirs", "other"))
    one = answers(tmp_path / "1.json", choose=lambda k: ("theirs" if k == 3 else "ours", "theirs"), pairs=pairs)
    two = answers(tmp_path / "2.json", rater="b", choose=lambda k: ("theirs", "theirs"), pairs=pairs)
    found = {(one.pair, one.question): one for one in score_study([one, two])}
    assert found[("ours", "theirs"), "image"].share == 3 / 6
    assert found[("ours", "theirs"), "image"].answers == 6
    assert found[("ours", "theirs"), "text"].share == 0
    assert found[("ours", "theirs"), "text"].agreement == 1
    assert found[("other", "theirs"), "image"].share == 0


def test_wilson_intervals():
    """Newcombe (1998), table I: 81 of 263 gives 0.2553 to 0.3662, 0 of 20 gives 0 to 0.1611."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert wilson(20, 20) == pytest.approx((1 - 0.1611, 1), abs=5e-5)


def test_fleiss_kappa():
    """The worked example of Wikipedia's page on it (10 subjects, 14 raters, 5 categories): 0.210; and closed forms."""
    rows = [(0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1)]
    rows += [(7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7)]
    assert fleiss_kappa([dict(enumerate(row)) for row in rows]) == pytest.approx(0.210, abs=5e-4)
    assert fleiss_kappa([{"a": 2}, {"b": 2}]) == 1
    assert fleiss_kappa([{"a": 1, "b": 1}] * 3) == -1
    assert fleiss_kappa([{"a": 1}, {"b": 1}]) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"items": 5}, "expected answers about pairs 0 to 4, found 4 answers"),
        ({"answers": []}, "found 0 answers"),
        ({"schema": 2}, "'schema'"),
        ({"colour": 1}, "unknown key 'colour'"),
        ({"study": "other"}, "answers another study"),
        ({"rater": "a"}, "by the same person as"),
        (
            {"answers": [{"item": 0, "left": "a", "right": "b", "image": "c", "text": "a"}], "items": 1},
            "expected a or b",
        ),
    ],
    ids=str,
)
def test_incomplete_and_malformed_files_are_named(tmp_path, changes, message):
    good = answers(tmp_path / "good.json", choose=lambda _: ("ours", "ours"))
    bad = answers(tmp_path / "bad.json", **{"choose": lambda _: ("ours", "ours"), "rater": "b", **changes})
    with pytest.raises(BadInputError, match=re.escape(message)) as caught:
        score_study([good, bad])
    assert str(caught.value).startswith(f"{bad}: ")


@pytest.mark.parametrize("content", [b"", b"[", b"[]", b"\xff\xfe", b"[" * 100_000], ids=repr)
def test_files_that_are_no_answers_are_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(BadInputError, match=r"a\.json"):
        score_study([tmp_path / "a.json"])


def test_the_commands(suite, tmp_path):
    runner = CliRunner()
    page = tmp_path / "page.html"
    done = runner.invoke(
        app, ["study", "build", str(suite), "--pairs", "ours,theirs", "--count", "4", "--out", str(page)]
    )
    assert (done.exit_code, done.output.strip().endswith("page.html: 4 pairs of pictures")) == (0, True)
    file = answers(tmp_path / "a.json", choose=lambda _: ("ours", "theirs"))
    done = runner.invoke(app, ["study", "score", str(file), "--json", str(tmp_path / "found.json")])
    assert done.exit_code == 0
    assert "100.0%" in done.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert [one["share"] for one in found] == [1.0, 0.0]
