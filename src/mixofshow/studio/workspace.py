"""The folder that holds everything: concepts, models, pictures, what is composed, and what is tuned.

All of it in the formats that the command line reads and writes, under names that say what it is.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Final

import yaml
from PIL import Image

from mixofshow.concepts.manifest import MANIFEST
from mixofshow.errors import MixOfShowError, SettingsError
from mixofshow.outputs import check_outputs, write_text
from mixofshow.reading import MAX_YAML_BYTES, read_table
from mixofshow.replaceable import COMPOSITION, is_in_the_way
from mixofshow.sampling.composition import make_composition
from mixofshow.sampling.pictures import embedded, is_embedded, read_picture, write_picture
from mixofshow.sampling.settings import Composition

logger = logging.getLogger(__name__)

EMPTY: Final[Mapping[str, Any]] = {"prompt": ""}
LONG: Final = 8000
"""Pictures of more characters are files of their own."""
ROOM: Final = 60_000
"""Characters that all others of a composition have together: so many of a YAML are read, and some more."""


@dataclass(frozen=True)
class Workspace:
    """The folder, the base that all of it is for, and how that is loaded (options of `load_base`)."""

    folder: Path
    base: str = "emojiland"
    loading: Mapping[str, Any] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    names: dict[bytes, str] = field(default_factory=dict, repr=False)
    """Files among the inputs of large pictures, by digests of their texts; short texts as they are read back."""
    on_canvas: dict[int, dict[str, Any]] = field(default_factory=dict, repr=False)
    """What the canvas holds, by the time of its last change."""

    def open(self) -> None:
        """Make what is not there yet. Raises BadInputError, ResourceError where that cannot be."""
        check_outputs(shared=[self.folder])
        for one in (self.concepts, self.models, self.pictures, self.tuning, self.inputs):
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

    @property
    def inputs(self) -> Path:
        """Pictures that compositions are made from: to start from, to be followed, painted masks; by their hashes."""
        return self.folder / "inputs"

    @property
    def controls(self) -> Path:
        """Networks that follow a sketch, a folder each, beside those that come with the base."""
        return self.folder / "controls"

    def composition(self) -> Composition:
        """What is on the canvas. What cannot be read is put aside, for people write there too, and an empty one begun."""
        try:
            return make_composition(read_table(self.canvas), str(self.canvas), self.folder)
        except MixOfShowError as error:
            with self.lock:
                if self.canvas.exists():
                    self._put_aside(str(error))
            return make_composition(EMPTY)

    def _put_aside(self, why: str) -> None:
        names = (self.canvas.with_name(f"composition-aside-{number}.yaml") for number in count(1))
        aside = next(name for name in names if not name.exists())
        self.canvas.rename(aside)
        logger.warning("%s; it is now %s", why, aside.name)

    @property
    def canvas(self) -> Path:
        """The composition that is being worked on."""
        return self.folder / "composition.yaml"

    def holds(self, composition: Composition) -> bool:
        """Whether this is on the canvas: painted masks, too, which are other texts once they were written as pictures."""
        if changed_at(self.canvas) not in self.on_canvas:
            self._remember(self._table(self.composition(), self.folder))
        return self._table(composition, self.folder) == self.on_canvas.get(changed_at(self.canvas))

    def _remember(self, table: dict[str, Any]) -> None:
        """This is on the canvas now."""
        self.on_canvas.clear()
        self.on_canvas[changed_at(self.canvas)] = table

    def keep(self, composition: Composition) -> None:
        """Write what is on the canvas; what others wrote there is put aside."""
        with self.lock:
            if is_in_the_way(self.canvas, "YAML"):
                self._put_aside(f"{self.canvas.name} was not written by the studio")
            self.write(self.canvas, composition)
            self._remember(self._table(composition, self.folder))

    def new_pictures(self, compositions: Sequence[Composition], how: Callable[[Path, int], str]) -> list[Path]:
        """Write each composition under the next free number, above it `how(file, number in the list)` it is drawn.

        Its pictures are to go beside it, with the same name.
        """
        with self.lock:
            self.pictures.mkdir(parents=True, exist_ok=True)
            first = max(map(_number, self.pictures.iterdir()), default=0) + 1
            files = [self.pictures / f"{number:04d}.yaml" for number in range(first, first + len(compositions))]
            for number, (file, composition) in enumerate(zip(files, compositions, strict=True)):
                self.write(file, composition, how(file, number))
        return files

    def write(self, file: Path, composition: Composition, how: str = "mixofshow sample draws it.") -> None:
        """Write a composition as people do, without what is as usual; its large pictures go to `inputs`, each once.

        Raises SettingsError for one that is too large to be read again.
        """
        table = self._table(composition, file.parent)
        text = yaml.safe_dump({"prompt": "", **table}, sort_keys=False, allow_unicode=True, width=120)
        text = f"{COMPOSITION}{how}\n{text}"
        if (size := len(text.encode())) > MAX_YAML_BYTES:
            raise SettingsError(f"composition: {size} bytes, at most {MAX_YAML_BYTES} are read again; shorten its prompts")
        write_text(file, text)

    def _table(self, composition: Composition, folder: Path) -> dict[str, Any]:
        """A composition without what is as usual, its large pictures by their names as seen from the folder."""
        table = composition.model_dump(mode="json", exclude_defaults=True)
        for control in table.get("controls", []):
            control["picture"] = os.path.relpath(control["picture"], folder)
            if os.path.isdir(control["network"]):
                control["network"] = os.path.relpath(control["network"], folder)
        longest = min(LONG, ROOM // max(1, len(table.get("regions", ()))))
        named: dict[str, Any] = self._with_names(table, folder, longest)
        return named

    def _with_names(self, value: Any, folder: Path, longest: int, key: str = "") -> Any:
        """A table with files' names, as seen from the folder, in the place of pictures of more characters."""
        if isinstance(value, dict):
            return {name: self._with_names(one, folder, longest, name) for name, one in value.items()}
        if isinstance(value, list):
            return [self._with_names(one, folder, longest, key) for one in value]
        if not is_embedded(value) or len(value) <= longest:
            return value
        found = self._named(value, "RGB" if key == "image" else "L", longest)
        return found if is_embedded(found) else Path(os.path.relpath(self.inputs / found, folder)).as_posix()

    def _named(self, text: str, mode: str, longest: int) -> str:
        """A picture's file among the inputs; browsers write masks in their own way: as it is read back, it may be short."""
        key = hashlib.sha256(f"{mode} {longest} {text}".encode()).digest()
        found = self.names.get(key, "")
        if not found or not (is_embedded(found) or (self.inputs / found).is_file()):
            image = read_picture(text, mode)
            short = embedded(image)
            found = self.names[key] = short if len(short) <= longest else self.put(image).name
        return found

    def put(self, image: Image.Image) -> Path:
        """A picture's file among the inputs; the same picture has the same one."""
        file = self.inputs / f"{hashlib.sha256(embedded(image).encode()).hexdigest()[:16]}.png"
        if not file.exists():
            write_picture(image, file)
        return file

    def shown(self, path: Path) -> str:
        """A path as the command line has it, started in the workspace."""
        return path.relative_to(self.folder).as_posix() if path.is_relative_to(self.folder) else str(path)


def _number(path: Path) -> int:
    """What a file's name begins with, 0 for words; nobody has more than a billion pictures."""
    found = re.match(r"[0-9]{1,9}(?![0-9])", path.name)
    return int(found[0]) if found else 0


def changed_at(path: Path) -> int:
    """When a file was changed last, in nanoseconds; 0 for one that has gone meanwhile."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
