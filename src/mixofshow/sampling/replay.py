"""PNGs that say what they were made from, and making the same bytes again from that."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from mixofshow.bases.families import family_of, text_encoders
from mixofshow.bases.parts import glimpse, plain
from mixofshow.errors import BadInputError, SettingsError, shown
from mixofshow.files import raw
from mixofshow.images import opened
from mixofshow.progress import Progress, silent
from mixofshow.reading import parse_json, read_bytes
from mixofshow.replaceable import MARK
from mixofshow.sampling.composition import compose, make_composition
from mixofshow.sampling.pictures import FORMATS, MAX_BYTES, PictureSource, read_picture, write_picture
from mixofshow.sampling.pipeline import MixOfShowPipeline
from mixofshow.sampling.settings import Composition
from mixofshow.tables import Settings

logger = logging.getLogger(__name__)

PNG_KEY: Final = MARK
_KNOWN: Final[WeakKeyDictionary[Any, tuple[str, Any]]] = WeakKeyDictionary()
"""What UNets' models looked like when their weights were hashed, and that hash, which goes on with the rest."""
PACKAGES: Final = ("mixofshow", "torch", "diffusers", "transformers")


class Maker(Settings):
    """What drew a picture. There is no place in it for a path, a host or a user.

    Of each concept it has the hash, and of those taken from a sister base what they were made for.
    """

    base: str
    hash: str
    concepts: dict[str, str]
    made_for: dict[str, str] = Field({})
    versions: dict[str, str]
    device: str
    threads: int


def maker_of(pipeline: MixOfShowPipeline, known: str | None = None) -> Maker:
    """What draws with this pipeline, whose `model_hash` may be known already."""
    model = pipeline.model
    return Maker(
        base=model.base,
        hash=known or model_hash(pipeline),
        concepts=model.concept_hashes,
        made_for={one.name: one.made_for for one in model.listed if one.made_for},
        versions={package: version(package) for package in PACKAGES},
        device=pipeline.device.type,
        threads=torch.get_num_threads(),
    )


def model_hash(pipeline: MixOfShowPipeline) -> str:
    """Hex digits of everything in the model that a picture depends on: all weights, words, and the scheduler.

    Weights that are as they were last time are not read again.
    """
    unet, parts = plain(pipeline.unet), (*(part for part, _ in family_of(pipeline).text_encoders), "unet", "vae")
    with pipeline.model.active():
        named = [
            (f"{part}.{name}", tensor)
            for part in parts
            for name, tensor in sorted(plain(getattr(pipeline, part)).state_dict().items())
        ]
        seen = glimpse(named)
        if _KNOWN.get(unet, ("", None))[0] != seen:
            _KNOWN[unet] = seen, _digest(named)
        digest = _KNOWN[unet][1].copy()
    if any(skips := [one.clip_skip for one in text_encoders(pipeline)]):
        digest.update(f"clip_skip {skips}".encode())
    _digest(pipeline.model.vocabulary.embeddings.items(), digest)
    if not pipeline.model.weights:  # un-fused concepts, if any, are part of no weights
        for name, own in () if pipeline.model.baked else pipeline.model.concept_hashes.items():
            digest.update(f"{name} {own}".encode())
    scheduler = {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")}
    digest.update(f"{type(pipeline.scheduler).__name__} {json.dumps(scheduler, sort_keys=True, default=str)}".encode())
    return digest.hexdigest()


def _digest(named: Iterable[tuple[str, Tensor]], digest: Any = None) -> Any:
    """A hash, the given one or a new one, with some tensors taken into it."""
    digest = hashlib.sha256() if digest is None else digest
    for name, tensor in named:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(raw(tensor))
    return digest


def save_picture(image: Image.Image, path: Path, composition: Composition, maker: Maker, number: int = 0) -> None:
    """Write a PNG that carries the composition of just this picture, number k of those composed, and its maker.

    All of its values are written, so that later defaults do not matter; see `resolved`.
    """
    alone = composition.model_copy(update={"seed": composition.seed + number, "num": 1})
    about = {"composition": alone.model_dump(mode="json"), "maker": maker.model_dump(exclude_defaults=True)}
    write_picture(image, path, json.dumps(about))


def resolved(composition: Composition, pipeline: MixOfShowPipeline) -> Composition:
    """The composition with the values that this pipeline would take for those that it leaves open."""
    start = read_picture(composition.image, "RGB") if composition.image else None
    width, height = start.size if start and composition.redo else composition.size(pipeline, start)
    guidance = pipeline.model.usual_guidance if composition.guidance_scale is None else composition.guidance_scale
    return composition.model_copy(update={"width": width, "height": height, "guidance_scale": guidance})


def read_note(path: Path) -> tuple[Composition, Maker]:
    """What a PNG carries. Raises SettingsError when it carries nothing of ours, BadInputError when it is no PNG."""
    return _parsed(_note(path), str(path))


def _parsed(note: str, name: str) -> tuple[Composition, Maker]:
    about = parse_json(note, name, SettingsError)
    if not isinstance(about, dict) or not about.keys() >= {"composition", "maker"}:
        raise SettingsError(f"{name}: what it carries is not the expected table ({shown(about)})")
    wanted = about["composition"]
    if isinstance(wanted, dict):
        wanted = Composition.renamed(wanted, quiet=True)
    return make_composition(wanted, name), Maker.of(about["maker"], name)


def _note(path: Path) -> str:
    """The text that a PNG carries for us."""
    with opened(read_bytes(path, MAX_BYTES, BadInputError), str(path), formats=("PNG",)) as image:
        text = image.info.get(PNG_KEY)
    if text is None:
        raise SettingsError(f"{shown(path)}: carries no composition")
    return str(text)


def carried(picture: PictureSource) -> Composition | None:
    """The composition that a picture carries, if it does. Raises SettingsError for what is none of ours."""
    if isinstance(picture, Image.Image):
        note, name = picture.info.get(PNG_KEY), "the picture"
    else:
        name = shown(picture)
        with opened(read_bytes(Path(picture), MAX_BYTES, BadInputError), name, formats=FORMATS) as image:
            note = image.info.get(PNG_KEY)
    return None if note is None else _parsed(str(note), name)[0]


def composition_of(path: Path) -> Composition:
    """The composition that a PNG carries. Raises as `read_note` does."""
    return read_note(path)[0]


def replay(pipeline: MixOfShowPipeline, path: Path, out: Path, *, progress: Progress = silent) -> None:
    """Draw a PNG's picture again, with as many threads, and write the same bytes.

    Raises SettingsError when it was another model; other versions or another device are only warned of.
    """
    composition, before = read_note(path)
    found = model_hash(pipeline)
    if found != before.hash:
        raise SettingsError(
            f"{path}: was drawn by another model, on base '{shown(before.base)}' with {_named(before.concepts)}; "
            f"expected hash {shown(before.hash, 12)}, found {found[:11]}…"
        )
    with _threads(before.threads):
        maker = maker_of(pipeline, found)
        if (changed := _differences(before, maker)) != "":
            logger.warning("%s was drawn with %s; the bytes may differ", path, changed)
        (image,) = compose(pipeline, composition, progress=progress)
        if maker == before:  # said as it was, by whatever version
            write_picture(image, out, _note(path))
        else:
            save_picture(image, out, resolved(composition, pipeline), maker)


def _named(concepts: Mapping[str, str]) -> str:
    return ", ".join(f"<{shown(name, 32)}>" for name in concepts) or "no concept"


def _differences(before: Maker, now: Maker) -> str:
    changed = {name: was for name, was in before.versions.items() if now.versions.get(name) != was}
    changed |= {"device": before.device} if before.device != now.device else {}
    return ", ".join(f"{shown(name, 20)} {shown(was, 20)}" for name, was in changed.items())


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Inside, torch computes with so many threads: their number decides how sums are rounded."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(max(1, min(count, 1024)))
        yield
    finally:
        torch.set_num_threads(before)
