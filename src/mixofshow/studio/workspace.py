"""The folder that holds everything: concepts, models, pictures, what is composed, and what is tuned.

All of it in the formats that the command line reads and writes, under names that say what it is.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Final

import yaml

from mixofshow.concepts.manifest import MANIFEST
from mixofshow.errors import MixOfShowError
from mixofshow.outputs import check_outputs, write_text
from mixofshow.reading import read_table
from mixofshow.sampling.composition import make_composition
from mixofshow.sampling.settings import Composition

logger = logging.getLogger(__name__)

EMPTY: Final[Mapping[str, Any]] = {"prompt": ""}
DIGITS: Final = 4


@dataclass(frozen=True)
class Workspace:
    """The folder, the base that all of it is for, and how that is loaded (options of `load_base`)."""

    folder: Path
    base: str = "emojiland"
    loading: Mapping[str, Any] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def open(self) -> None:
        """Make what is not there yet. Raises BadInputError, ResourceError where that cannot be."""
        check_outputs(shared=[self.folder])
        for one in (self.concepts, self.models, self.pictures, self.tuning):
            one.mkdir(parents=True, exist_ok=True)

    @property
    def concepts(self) -> Path:
        """Concept files, NAME.safetensors, and beside them what `tune` leaves of a run."""
        return self.folder / "concepts"

    @property
    def models(self) -> Path:
        """Fused models, a folder each."""
        return self.folder / "models"

    @property
    def pictures(self) -> Path:
        """Pictures, which say what they were made from, and the compositions that they were made from."""
        return self.folder / "pictures"

    @property
    def tuning(self) -> Path:
        """A folder for each concept that is tuned: settings, pictures, captions, masks."""
        return self.folder / "tuning"

    def concept_files(self) -> list[Path]:
        """All concept files, by name."""
        return sorted(self.concepts.glob("*.safetensors"))

    def model_names(self) -> list[str]:
        """All fused models, by name."""
        return sorted(one.parent.name for one in self.models.glob(f"*/{MANIFEST}"))

    def picture_files(self) -> list[Path]:
        """All pictures, the newest first."""
        return sorted(self.pictures.glob("*.png"), key=lambda path: (_number(path), path.name), reverse=True)

    def composition(self) -> Composition:
        """What is on the canvas. What cannot be read is put aside, for people write there too, and an empty one begun."""
        try:
            return make_composition(read_table(self.canvas), str(self.canvas), self.folder)
        except MixOfShowError as error:
            with self.lock:
                if self.canvas.exists():
                    names = (self.canvas.with_name(f"composition-aside-{number}.yaml") for number in count(1))
                    aside = next(name for name in names if not name.exists())
                    self.canvas.rename(aside)
                    logger.warning("%s; it is now %s", error, aside.name)
            return make_composition(EMPTY)

    @property
    def canvas(self) -> Path:
        """The composition that is being worked on."""
        return self.folder / "composition.yaml"

    def keep(self, composition: Composition) -> None:
        """Write what is on the canvas."""
        with self.lock:
            write_text(self.canvas, as_yaml(composition))

    def new_pictures(self, compositions: Sequence[Composition]) -> list[Path]:
        """Write each composition under the next free number; its pictures are to go beside it, with the same name."""
        with self.lock:
            first = max(map(_number, self.pictures.iterdir()), default=0) + 1
            files = [self.pictures / f"{number:04d}.yaml" for number in range(first, first + len(compositions))]
            for file, composition in zip(files, compositions, strict=True):
                write_text(file, as_yaml(composition))
        return files

    def shown(self, path: Path) -> str:
        """A path as the command line has it, started in the workspace."""
        return path.relative_to(self.folder).as_posix() if path.is_relative_to(self.folder) else str(path)


def _number(path: Path) -> int:
    """What a file's name begins with, 0 for words; nobody has more than a billion pictures."""
    found = re.match(r"[0-9]{1,9}(?![0-9])", path.name)
    return int(found[0]) if found else 0


def as_yaml(composition: Composition) -> str:
    """The composition as people write it, without what is as usual; read back, it is the same."""
    table = composition.model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump({"prompt": "", **table}, sort_keys=False, allow_unicode=True, width=120)
