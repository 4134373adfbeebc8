"""The client's side that belongs to its owner: what is offered, on which conditions, and what was decided before.

All of it is in a folder of the client's own, which Flower's processes read; nothing of it is sent.

    key           the client's key; only its public half leaves      tuned/       tuned concepts, and their checkpoints
    client.json   what is offered                                   recordings/  what was recorded of them
    asked/ said/  questions to the owner, and answers, by hash       fused.safetensors  the model, where it is wanted
    apps.log      what went wrong, in full; the last of it, in      supernode.log  Flower's own
                  a line, in wrong until it is told at the terminal
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, model_validator

from mixofshow.errors import BadInputError, SettingsError, ours, printable
from mixofshow.outputs import holding, write_text
from mixofshow.reading import parse_json, read_bytes
from mixofshow.tables import Named, Settings

SETTINGS: Final = "client.json"
KEY: Final = "key"
ASKED: Final = "asked"
SAID: Final = "said"
WRONG: Final = "wrong"
YES: Final = "yes"
NO: Final = "no"
LOOKS_EVERY: Final = 0.5


class Declined(BadInputError):
    """Why a client does not do what the center asks. Its text goes to the center: there is nothing of the owner's in it."""


class ClientSettings(Settings):
    """What a client offers, and how."""

    name: Annotated[str, Named(32)] = Field(description="The concept's name.")
    class_word: str = Field("", max_length=64, description="Its class word, as for tune.")
    data: Path | None = Field(None, description="Folder of pictures to tune on.")
    concept: Path | None = Field(None, description="Or a concept file that is there already.")
    judge: Path | None = Field(None, description="Folder of held-out pictures, to judge the fused model on.")
    clip: str | None = Field(None, description="The CLIP that judges, on another base than emojiland.")
    base: str = Field("emojiland", description="The client's own copy of the base model.")
    device: str = "cpu"
    approve: Literal["ask", "always"] = Field("ask", description="Whether the owner is asked before a file is sent.")
    want_model: bool = Field(False, description="Whether the fused model is wanted.")

    @model_validator(mode="after")
    def _one_source(self) -> ClientSettings:
        """Raises SettingsError."""
        if (self.data is None) == (self.concept is None):
            raise SettingsError("give `data`, a folder to tune on, or `concept`, a file, and not both")
        if self.data is not None and not self.class_word:
            raise SettingsError("`data` needs `class_word`, what the thing is: dog, chair, street …")
        return self


def save_settings(folder: Path, settings: ClientSettings) -> None:
    """Keep them for Flower's processes."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / SETTINGS, settings.model_dump_json(indent=1) + "\n")


def read_settings(folder: Path) -> ClientSettings:
    """What `save_settings` kept. Raises BadInputError."""
    path = folder / SETTINGS
    return ClientSettings.of(parse_json(read_bytes(path), str(path)), str(path))


def approved(folder: Path, settings: ClientSettings, content: str, question: str) -> bool:
    """Whether the owner lets what has the hash `content` go; waits for the answer, and asks once in a lifetime."""
    if settings.approve == "always":
        return True
    said = folder / SAID / content
    if not said.is_file():
        (folder / ASKED).mkdir(exist_ok=True)
        write_text(folder / ASKED / content, question + "\n")
    while not said.is_file():
        time.sleep(LOOKS_EVERY)
    return approved_before(folder, content)


def approved_before(folder: Path, content: str) -> bool:
    """Whether the owner has said yes to what has the hash `content`."""
    said = folder / SAID / content
    return said.is_file() and said.read_text().strip() == YES


def open_questions(folder: Path) -> dict[str, str]:
    """What the owner has not answered yet, by hash."""
    asked = {one.name: one.read_text().strip() for one in sorted((folder / ASKED).glob("*")) if one.is_file()}
    return {content: question for content, question in asked.items() if not (folder / SAID / content).is_file()}


def answer(folder: Path, content: str, *, yes: bool) -> None:
    """Note the owner's answer for good."""
    (folder / SAID).mkdir(exist_ok=True)
    write_text(folder / SAID / content, (YES if yes else NO) + "\n")


def note_wrong(folder: Path, error: Exception) -> None:
    """Leave what went wrong, in a line, for whoever sits at the client's terminal."""
    known = ours(error)
    write_text(folder / WRONG, printable(str(known) if known else f"a fault of the program, {type(error).__name__}") + "\n")


def went_wrong(folder: Path) -> str:
    """What went wrong since one asked last, in a line; empty where nothing did."""
    try:
        said = (folder / WRONG).read_text("utf-8").strip()
        (folder / WRONG).unlink()
    except FileNotFoundError:
        return ""
    return said


def own_concept(folder: Path, settings: ClientSettings, pipeline: Any, tuning: dict[str, Any]) -> Path:
    """The file of the client's concept: given, tuned before in the same way on the same pictures, or tuned now.

    Tuning that was broken off goes on from where it stopped.

    Raises MixOfShowError.
    """
    if settings.concept is not None:
        return settings.concept
    from mixofshow.bases.loading import fingerprint
    from mixofshow.tuning.checkpoints import FOLDER, any_in
    from mixofshow.tuning.settings import make_settings
    from mixofshow.tuning.trainer import digests, examples_of, tune

    table = {**tuning, "name": settings.name, "class_word": settings.class_word, "data": str(settings.data)}
    same = {**table, "base": fingerprint(pipeline), "pictures": digests(examples_of(make_settings(table)))}
    key = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]
    target = folder / "tuned" / f"{settings.name}-{key}.safetensors"
    with _alone_in(target.parent):
        if not target.is_file():
            place = target.with_suffix("")
            resume = any_in(place / FOLDER)
            tune(
                make_settings({**table, "tracker": "none"}),
                pipeline,
                folder=place,
                resume=resume,
                finished=lambda concept: concept.save(target),
            )
    return target


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait until nobody else works there: an app of a round that was broken off may be about to finish the same."""
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        with holding(folder) as held:
            if held is not False:
                yield
                return
        time.sleep(LOOKS_EVERY)
