"""What is broken off, by Ctrl-C, a full disk, a closed pipe or another run, loses nothing that was there.

Covers F5, F13, F33, F34, F36, F37, G4, G7, G9, G10 and case 15.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mixofshow import cli
from mixofshow.cli.fuse import _write_fused
from mixofshow.concepts.concept import load_concept
from mixofshow.concepts.model import ConceptModel
from mixofshow.demo import run_demo
from mixofshow.errors import BadInputError, ResourceError
from mixofshow.evaluation.suite import Suite, run_suite
from mixofshow.fusion.jobs import inputs_of
from mixofshow.fusion.stages import Fused
from mixofshow.outputs import holding
from mixofshow.progress import terminal_bar
from mixofshow.reading import parse_table
from mixofshow.sampling.composition import make_composition
from mixofshow.sampling.pictures import is_embedded
from mixofshow.terminal import forgiving_output
from mixofshow.tuning.run import interrupts_noted
from mixofshow.tuning.settings import make_settings
from mixofshow.tuning.trainer import tune
from tests.conftest import pictures_in, short_run

GOLDEN_BASE = Path(__file__).parents[1] / "goldens" / "pipeline"
EXAMPLE = Path(__file__).parents[2] / "examples" / "concepts" / "clown.safetensors"


@pytest.fixture
def make(tmp_path):
    """Settings of a short run."""
    quick = {"steps": 4, "batch_size": 1, "save_every": 2, "tracker": "none", "pictures.size": 64}
    return short_run(pictures_in(tmp_path / "pictures", "red", size=(16, 16)), **quick)


def _pressing(at):
    """Progress during which Ctrl-C is pressed."""

    def progress(step, total, info):
        if step == at:
            os.kill(os.getpid(), signal.SIGINT)

    return progress


def test_ctrl_c_ends_between_steps_and_the_run_goes_on_to_the_same_bits(golden_pipeline, make, tmp_path):
    straight, kept = tune(make(), golden_pipeline), []
    run = {"folder": tmp_path / "run", "stopped": lambda concept, step: kept.append((concept, step))}
    with pytest.raises(KeyboardInterrupt):
        tune(make(), golden_pipeline, **run, progress=_pressing(3))
    ((concept, step),) = kept
    assert step == concept.info.settings["steps"] == 3
    assert tune(make(), golden_pipeline, **run, resume=True).hash == straight.hash


def test_the_second_ctrl_c_breaks_off():
    with pytest.raises(KeyboardInterrupt), interrupts_noted() as interrupted:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted()
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_after_ctrl_c_no_further_concept_is_begun_and_the_exit_code_is_130(make, tmp_path, monkeypatch):
    begun = []

    def interrupted(settings, *_, **__):
        begun.append(settings.name)
        raise KeyboardInterrupt

    monkeypatch.setattr("mixofshow.evaluation.previews.tune", interrupted)
    text = f"{{base: {GOLDEN_BASE}, class_word: man, data: {tmp_path}/pictures, concepts: [{{name: a}}, {{name: b}}]}}"
    (tmp_path / "both.yaml").write_text(text)
    monkeypatch.setattr(
        sys, "argv", ["mixofshow", "tune", str(tmp_path / "both.yaml"), "--out", str(tmp_path / "made")]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130 and begun == ["a"]


@pytest.mark.parametrize("where", ["mixofshow.cli.commands", "typer", "mixofshow.tuning.settings"])
def test_ctrl_c_while_modules_are_imported_is_130_without_a_traceback(where):
    script = f"""
import sys
class Pressed:
    def find_spec(self, name, *_):
        if name == {where!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Pressed())
sys.argv = ["mixofshow", "--help"]
from mixofshow.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_terminated_command_cleans_up(monkeypatch):
    ended = []

    def app():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            ended.append(True)

    monkeypatch.setattr(cli, "app", app)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 143 and ended and signal.getsignal(signal.SIGTERM) is before


def test_two_runs_do_not_share_a_folder(golden_pipeline, make, tmp_path):
    (tmp_path / "run").mkdir()
    with holding(tmp_path / "run"), pytest.raises(BadInputError, match="run: another run is at work there"):
        tune(make(), golden_pipeline, folder=tmp_path / "run")
    tune(make(), golden_pipeline, folder=tmp_path / "run")


def _room(path: Path, *results: bool):
    """Writes a concept to `path` where the results say so; else the disk is full."""
    left = iter(results)

    def save(concept):
        if not next(left):
            raise ResourceError(f"{path}: could not be written (No space left on device); nothing was changed")
        concept.save(path)

    return save


def test_a_result_without_room_is_tried_again_with_that_of_an_old_checkpoint(golden_pipeline, make, tmp_path):
    save = _room(tmp_path / "thing.safetensors", False, True)
    tune(make(steps=5), golden_pipeline, folder=tmp_path / "run", finished=save)
    assert (tmp_path / "thing.safetensors").exists()
    assert [one.name for one in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004.pt"]


def test_a_run_whose_result_finds_no_room_is_kept_and_says_where(golden_pipeline, make, tmp_path):
    run = {"folder": tmp_path / "run", "finished": _room(tmp_path / "thing.safetensors", False, False, True)}
    with pytest.raises(ResourceError, match=r"No space left.*kept: .*step-00000005\.pt; make room.*`resume`"):
        tune(make(steps=5), golden_pipeline, **run)
    again = tune(make(steps=5), golden_pipeline, **run, resume=True, progress=lambda *_: pytest.fail("it is done"))
    assert load_concept(tmp_path / "thing.safetensors").hash == again.hash


def test_of_several_results_of_a_fusion_one_without_room_costs_no_other(golden_pipeline, tmp_path, monkeypatch):
    def full(self, path):
        raise ResourceError(f"{path}: could not be written (No space left on device)")

    fused = Fused(ConceptModel(golden_pipeline), {})
    monkeypatch.setattr(ConceptModel, "save", full)
    with pytest.raises(ResourceError, match="f: could not be written"):
        _write_fused(fused, tmp_path / "f", tmp_path / "d.safetensors", None, None)
    assert [one.name for one in tmp_path.iterdir()] == ["d.safetensors"]


def test_a_preview_without_room_costs_no_training(golden_pipeline, make, tmp_path, caplog):
    def preview(concept, step):
        raise ResourceError("000001.png: could not be written (No space left on device)")

    done = tune(make(preview_every=1), golden_pipeline, preview=preview)
    assert done.info.settings["steps"] == 4 and caplog.text.count("training goes on") == 4


def _command(line: str, **options):
    """A command in a process of its own, by the shell."""
    line = line.replace("mixofshow", f"{sys.executable} -m mixofshow")
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, timeout=120, **options)


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (f"mixofshow inspect {EXAMPLE} > /dev/full", 3, "error: standard output: No space left on device"),
        (f"mixofshow inspect {EXAMPLE} >&-", 0, ""),
        (f"mixofshow inspect {EXAMPLE} | true; exit ${{PIPESTATUS[0]}}", 0, ""),
        ("mixofshow inspect /none 2>&-", 2, ""),
        ("mixofshow inspect /none 2> /dev/full", 2, ""),
        ("PYTHONIOENCODING=cp1252 mixofshow evaluate --help > /dev/null", 0, ""),
    ],
)
def test_where_output_goes_changes_no_exit_code_but_of_a_full_disk(line, code, said):
    done = _command(line)
    assert done.returncode == code and done.stderr.startswith(said) and bool(said) == bool(done.stderr), done.stderr


def test_what_an_encoding_lacks_is_escaped_and_work_is_done(tmp_path):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "犬.png")
    (tmp_path / "犬.txt").touch()
    done = _command(
        f"mixofshow check {tmp_path} --json {tmp_path}.json", env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert done.returncode == 0 and "\\u72ac.png" in done.stdout, done.stderr
    assert "犬" in Path(f"{tmp_path}.json").read_text("utf-8")


def test_in_this_process_output_is_as_before(capsys):
    with forgiving_output() as lost:
        print("said")
        assert not lost()
    assert capsys.readouterr().out == "said\n"


def test_hundreds_of_notices_of_a_kind_are_a_few_lines(monkeypatch, capsys):
    def app():
        for number in range(200):
            logging.getLogger("mixofshow").warning("region %d covers no whole cell", number)
        raise BadInputError("that is all")

    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr(sys, "argv", ["mixofshow"])
    with pytest.raises(SystemExit):
        cli.main()
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == [f"region {number} covers no whole cell" for number in range(3)]
    assert lines[3:] == ["and 197 more notices of these kinds; --debug shows all", "error: that is all"]


def test_the_demo_keeps_off_folders_that_are_not_its_own(tmp_path):
    for name in ("model", "pictures"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "holiday.jpg").write_text("the beach")
    with pytest.raises(BadInputError, match="holds files that are not the demo's"):
        run_demo(tmp_path)
    assert len(list(tmp_path.rglob("*"))) == 4


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("<!doctype html> mine", "report.html: there is a file that is no HTML of this program's"),
        ('<!doctype html><meta name="generator" content="mixofshow">', "report.html: is there and of no suite"),
    ],
)
def test_a_suite_writes_over_no_report_that_is_not_a_suites(page, message, tmp_path):
    (tmp_path / "report.html").write_text(page)
    suite = Suite(concepts=("clown",), methods=("ed-lora+average",))
    with pytest.raises(BadInputError, match=message):
        run_suite(suite, tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["report.html"]


def test_the_home_folder_in_yaml_is_ones_own(monkeypatch, tmp_path):
    """In what is a path, and in no text that begins so."""
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    tuned = make_settings(
        parse_table("name: dog\nclass_word: dog\ndata: ~/dogs\nprior: {data: ~/more, prompt: ~/dog}", "it")
    )
    assert (tuned.data, tuned.prior.data, tuned.prior.prompt) == (tmp_path / "dogs", tmp_path / "more", "~/dog")
    drawn = make_composition(parse_table("prompt: ~/ a cat\nimage: ~/a.png", "it"), folder=Path())
    assert drawn.prompt == "~/ a cat" and is_embedded(drawn.image)
    (tmp_path / "fuse.yaml").write_text("concepts: [~/a.safetensors]\nbase: ~/b\nprior_prompts: [~/c]")
    assert [tmp_path / name for name in ("fuse.yaml", "a.safetensors", "b")] == inputs_of([tmp_path / "fuse.yaml"])


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["sample", "--out", "~/a.png"], ["sample", "--out", "/home/me/a.png"]),
        (["sample", "~/a.yaml", "--out=~/a.png"], ["sample", "/home/me/a.yaml", "--out=/home/me/a.png"]),
        (["sample", "--prompt", "~/ a cat", "--negative-prompt=~/ a"],) * 2,
    ],
)
def test_the_home_folder_on_the_command_line_is_ones_own(typed, meant, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr("sys.argv", ["mixofshow", *typed])
    monkeypatch.setattr(cli, "app", lambda: None, raising=False)
    with pytest.raises(SystemExit):
        cli.main()
    assert sys.argv[1:] == meant


def test_an_errors_line_has_no_bar_above_it(capfd):
    """F5: what a run found wrong once its bar was there was told in the second line."""
    with pytest.raises(BadInputError), terminal_bar("sampling") as progress:
        progress(1, 5, {"loss": 0.1})
        raise BadInputError("a word that nobody knows")
    assert capfd.readouterr().err == ""
