"""Tuning on the page: pictures, captions and masks of a concept in a folder of their own, and the job that tunes it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from glob import escape as escape_glob
from html import escape
from pathlib import Path
from typing import Any, Final

import yaml

from mixofshow.bases.loading import load_base
from mixofshow.concepts.concept import load_concept
from mixofshow.errors import DatasetError, MixOfShowError, SettingsError, shown
from mixofshow.evaluation.previews import tune_into
from mixofshow.images import opened, read_image
from mixofshow.outputs import check_outputs, write_text, writing
from mixofshow.reading import read_bytes, read_table
from mixofshow.replaceable import SETTINGS
from mixofshow.sampling.pictures import MAX_BYTES, write_picture
from mixofshow.studio.commands import line
from mixofshow.studio.compose import Studio
from mixofshow.studio.editor import painted, thumbnail
from mixofshow.studio.forms import Field, fields_of
from mixofshow.studio.jobs import Job
from mixofshow.studio.shelf import file_name, replacing
from mixofshow.studio.workspace import Workspace, changed_at
from mixofshow.tuning.captions import Naming
from mixofshow.tuning.check import check_folder
from mixofshow.tuning.checkpoints import FOLDER, any_in, newest, run_folder, working_in
from mixofshow.tuning.folder import CAPTIONS, Finding, picture_paths
from mixofshow.tuning.settings import TuningSettings, dotted_keys, make_settings, nested, with_presets

logger = logging.getLogger(__name__)
KIND: Final = "tune"
NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,30}")
SUFFIX_OF: Final = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "MPO": ".jpg"}
ON_THE_PAGE: Final = ("name", "class_word", "data", "masks", "base", "prior.data")
"""Settings with a place of their own, or that name other folders than the concept's."""
HEAD: Final = f"{SETTINGS}mixofshow tune reads them.\n"
FIRST: Final = {"preview_every": 50, "save_every": 50}
"""What the page sets where the command line's default is another."""
SMALL: Final = 160
"""Of a picture in the grid, in pixels."""
WIDE, HIGH = 480, 120
"""Of the curve."""


@cache
def tuning_fields(base: str) -> list[Field]:
    """The form of tuning, with the defaults that hold on this base."""
    usual = with_presets(make_settings({"name": "x", "class_word": "x", "data": "x"}), base)
    found = fields_of(TuningSettings.model_json_schema(), leave_out=ON_THE_PAGE)
    values = {**dict(_flat(usual)), **FIRST}
    return [replace(one, default=values[one.key]) for one in found]


def _flat(settings: TuningSettings) -> Iterable[tuple[str, Any]]:
    for key, _ in dotted_keys():
        value: Any = settings
        for part in key.split("."):
            value = getattr(value, part)
        yield key, value


def folder_of(workspace: Workspace, name: str) -> Path:
    """Where a concept's pictures, captions and masks are. Raises SettingsError for what cannot be a concept's name."""
    if not name:
        raise SettingsError("name: give it one first")
    if not NAME.fullmatch(name):
        raise SettingsError(f"name: expected up to 31 lower-case letters, digits, '-', '_', found '{shown(name)}'")
    return workspace.tuning / name


def names(workspace: Workspace) -> list[str]:
    """The concepts of which there are pictures."""
    return sorted(one.parent.name for one in workspace.tuning.glob("*/pictures"))


def pictures(workspace: Workspace, name: str) -> list[Path]:
    """A concept's pictures, as `tune` finds them."""
    folder = folder_of(workspace, name) / "pictures"
    try:
        return picture_paths(folder)
    except DatasetError:
        return []


def add_pictures(workspace: Workspace, name: str, uploads: Sequence[Path]) -> list[str]:
    """Copy pictures into the concept's folder; see `copy_pictures`."""
    return copy_pictures(folder_of(workspace, name) / "pictures", uploads)


def copy_pictures(place: Path, uploads: Sequence[Path]) -> list[str]:
    """Copy pictures that can be read into a folder, numbered; a line for each that cannot, or that is changed when read."""
    place.mkdir(parents=True, exist_ok=True)
    number, said = max((int(one.stem) for one in place.iterdir() if one.stem.isdecimal()), default=-1) + 1, []
    for upload in uploads:
        label = shown(upload.name)
        try:
            data = read_bytes(upload, MAX_BYTES, DatasetError, label)
            notes = read_image(data, label, error=DatasetError).notes
            with opened(data, label, error=DatasetError) as image:
                suffix = SUFFIX_OF[image.format]
        except MixOfShowError as error:
            said.append(str(error))
            continue
        with writing(place / f"{number:03d}{suffix}") as temporary:
            temporary.write_bytes(data)
        said += [f"{label}: {note}" for note in notes]
        number += 1
    return said


def captions(workspace: Workspace, name: str) -> list[list[str]]:
    """A row for each picture: its file and its caption."""

    def caption(picture: Path) -> str:
        found = next((file for suffix in CAPTIONS if (file := picture.with_suffix(suffix)).is_file()), None)
        return found.read_text("utf-8", errors="replace").strip() if found else ""

    return [[picture.name, caption(picture)] for picture in pictures(workspace, name)]


def write_captions(workspace: Workspace, name: str, rows: Sequence[Sequence[Any]]) -> int:
    """Write the captions that were changed; an empty one removes its file. Returns how many pictures have one.

    Files that people wrote in several lines stay so, unless their caption is another now.
    """
    before = {picture: one_line(text) for picture, text in captions(workspace, name)}
    for picture, caption in ((str(row[0]), one_line(row[1])) for row in rows):
        file = picture_named(workspace, name, picture).with_suffix(".txt")
        if caption == before[picture]:
            continue
        if caption:
            write_text(file, f"{caption}\n")
        else:
            file.unlink(missing_ok=True)
    return sum(bool(text) for _, text in captions(workspace, name))


def one_line(text: Any) -> str:
    """A text, or nothing, without breaks."""
    return " ".join(str(text or "").split())


def write_mask(workspace: Workspace, name: str, picture: str, value: Any) -> Path:
    """A picture's mask from what was painted over it, the editor's value. Raises SettingsError, RegionError."""
    file = picture_named(workspace, name, picture)
    mask = painted(value, read_image(file, shown(picture), error=DatasetError).image.size)
    target = folder_of(workspace, name) / "masks" / f"{Path(picture).stem}.png"
    write_picture(mask, target)
    return target


def findings(workspace: Workspace, name: str, class_word: str) -> list[Finding]:
    """What `mixofshow check` says of the folder. Raises DatasetError."""
    naming = Naming(f"<{name}>", [f"<{name}{number}>" for number in (1, 2)], class_word or "object")
    return check_folder(folder_of(workspace, name) / "pictures", naming=naming)


def grid(workspace: Workspace, name: str, found: Sequence[Finding] = ()) -> list[dict[str, Any]]:
    """What the page shows of each picture: itself, its caption, whether it has a mask, what there is to say of it."""
    masked = {one.stem for one in (folder_of(workspace, name) / "masks").glob("*")}
    return [
        {
            "name": file.name,
            "picture": _small(file, changed_at(file)),
            "caption": text,
            "masked": file.stem in masked,
            "said": [f"{one.level}: {one.message}" for one in found if Path(one.file).stem == file.stem],
        }
        for file, (_, text) in zip(pictures(workspace, name), captions(workspace, name), strict=True)
    ]


def general(workspace: Workspace, name: str, found: Sequence[Finding]) -> list[str]:
    """Of what `check` says, that which is said of no picture, a line each."""
    if not found:
        return ["nothing to say: every picture is used as it is"]
    stems = {file.stem for file in pictures(workspace, name)}
    return [f"{one.level}: {one}" for one in found if Path(one.file).stem not in stems]


@lru_cache(maxsize=1000)
def _small(file: Path, changed: int) -> str:
    return thumbnail(file, SMALL)


def remove_picture(workspace: Workspace, name: str, picture: str) -> None:
    """Put a picture aside, with its caption and mask. Raises SettingsError."""
    file = picture_named(workspace, name, picture)
    removed = workspace.folder / "removed"
    removed.mkdir(exist_ok=True)
    place = removed / file_name(f"{name}-{file.stem}", [one.name for one in removed.iterdir()])
    place.mkdir()
    for one in (file, file.with_suffix(".txt"), *file.parent.with_name("masks").glob(f"{escape_glob(file.stem)}.*")):
        if one.is_file():
            (place / one.parent.name).mkdir(exist_ok=True)
            one.rename(place / one.parent.name / one.name)


def picture_named(workspace: Workspace, name: str, picture: str) -> Path:
    """A concept's picture. Raises SettingsError; no other file can be named."""
    found = {one.name: one for one in pictures(workspace, name)}
    if picture not in found:
        raise SettingsError(f"'{shown(picture)}': no picture of <{name}> is called so")
    return found[picture]


def settings_file(workspace: Workspace, name: str) -> Path:
    """The YAML of a concept's settings, as `mixofshow tune` reads it."""
    return folder_of(workspace, name) / "tune.yaml"


def command(workspace: Workspace, name: str, *, resume: bool = False) -> str:
    """The command line that tunes the same."""
    target = workspace.shown(workspace.concepts / f"{name}.safetensors")
    words = ["tune", workspace.shown(settings_file(workspace, name)), "--out", target]
    return line(workspace, *words, *(["--resume"] if resume else []), device="auto")


def start_tuning(studio: Studio, name: str, class_word: str, given: Mapping[str, Any], *, resume: bool) -> Job:
    """Write the settings, and tune by them in a job. Raises SettingsError, DatasetError, BadInputError."""
    workspace = studio.workspace
    data = folder_of(workspace, name) / "pictures"
    table = nested(
        {"name": name, "class_word": class_word, "data": str(data), "base": workspace.base, **FIRST, **given}
    )
    settings = make_settings(table, "settings")
    if not pictures(workspace, name):
        raise DatasetError(f"<{name}> has no pictures yet; drop some first")
    if any(job.kind == KIND and job.facts == name and not job.over for job in studio.jobs.all):
        raise SettingsError(f"<{name}> is being tuned, or waits for it; stop that first")
    target = workspace.concepts / f"{name}.safetensors"
    folder = run_folder(target)
    ours = {"safetensors": [target], "settings": [settings_file(workspace, name)]}
    check_outputs(files=ours, shared=[folder], inputs=[data])
    if any_in(folder / FOLDER) and not resume:
        _put_aside(workspace, folder)
    in_yaml = HEAD + yaml.safe_dump({**table, "data": workspace.shown(data)}, sort_keys=False, allow_unicode=True)

    def work(job: Job) -> list[Path]:
        studio.engine.forget()
        pipeline = load_base(workspace.base, **{"dtype": settings.precision, **workspace.loading})

        def say(text: str) -> None:
            job.said.append(text.replace(f"{workspace.folder}{os.sep}", ""))

        how: dict[str, Any] = {"folder": folder, "resume": resume, "progress": job.progress, "say": say}
        kept = contextlib.nullcontext() if resume else replacing(workspace, target)
        with written(settings_file(workspace, name), in_yaml), kept:
            tune_into(target, settings, pipeline, **how)
        return [target]

    return studio.jobs.submit(KIND, f"tuning <{name}>", work, facts=name)


@contextlib.contextmanager
def written(file: Path, text: str) -> Iterator[None]:
    """The file with this text; as it was before, where what is done inside fails: it tells of the run that is there."""
    before = file.read_text("utf-8") if file.is_file() else None
    write_text(file, text)
    try:
        yield
    except MixOfShowError:
        if before is not None:
            write_text(file, before)
        raise


def _put_aside(workspace: Workspace, folder: Path) -> None:
    """An earlier run's checkpoints and previews, so that a new one begins with its first step."""
    removed = workspace.folder / "removed"
    removed.mkdir(exist_ok=True)
    with working_in(folder):  # nobody else is, in a terminal perhaps
        folder.rename(removed / file_name(folder.name, [one.name for one in removed.iterdir()]))


def broken_off(workspace: Workspace, name: str) -> str:
    """What is left of a run that did not come to its end, in a line; empty where nothing is."""
    target = workspace.concepts / f"{name}.safetensors"
    folder = run_folder(target) / FOLDER
    last = newest(folder) if folder.is_dir() else None
    asked = {one.key: one.default for one in tuning_fields(workspace.base)} | known(workspace, name)
    if last is None or asked["epochs"]:
        return ""
    if changed_at(target) >= changed_at(last) and _steps_of(target) >= asked["steps"]:
        return ""  # it came to its end, behind its last checkpoint
    done = int(last.stem.partition("-")[2])
    return f"A run of <{name}> got as far as step {done} of {asked['steps']}: Resume goes on from there."


def _steps_of(target: Path) -> int:
    """How many steps a concept was tuned for; 0 for one that is not there."""
    try:
        return int(load_concept(target).info.settings.get("steps") or 0)
    except MixOfShowError:
        return 0


def known(workspace: Workspace, name: str) -> dict[str, Any]:
    """The settings of a concept that was tuned here before, by dotted keys; empty for a new one."""
    file = settings_file(workspace, name)
    if not file.is_file():
        return {}
    given = make_settings(read_table(file), str(file)).model_dump(mode="json", exclude_unset=True)
    return dict(_dotted(given, ""))


def _dotted(table: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def previews(workspace: Workspace, name: str) -> list[Path]:
    """Preview grids of the concept's run, the first first."""
    folder = run_folder(workspace.concepts / f"{name}.safetensors")
    return sorted(one for one in folder.glob("*.png") if one.stem.isdecimal())


def curve(points: Sequence[tuple[int, float]]) -> str:
    """The loss by step, as a drawing in HTML, smoothed over a twentieth of it."""
    if len(points) < 2:
        return ""
    window = max(1, len(points) // 20)
    losses = [loss for _, loss in points]
    recent = [losses[max(0, end - window) : end] for end in range(1, len(losses) + 1)]
    smooth = [sum(one) / len(one) for one in recent]
    low, high = min(smooth), max(smooth)
    scale = (HIGH - 10) / ((high - low) or 1)
    path = " ".join(
        f"{WIDE * number / (len(smooth) - 1):.1f},{HIGH - 5 - (loss - low) * scale:.1f}"
        for number, loss in enumerate(smooth)
    )
    label = escape(f"Loss from {smooth[0]:.3g} at step {points[0][0]} to {smooth[-1]:.3g} at step {points[-1][0]}")
    return (
        f'<figure class="curve"><svg viewBox="0 0 {WIDE} {HIGH}" role="img" aria-label="{label}"><polyline points="{path}" '
        f'fill="none" stroke="currentColor" stroke-width="2"/></svg><figcaption>{label}</figcaption></figure>'
    )
