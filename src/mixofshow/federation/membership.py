"""Whose concepts belong to the model, from round to round: files by their content, and who brought which."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from mixofshow.concepts.concept import read_concept
from mixofshow.errors import BadInputError, nearest, shown
from mixofshow.files import parse_tensors
from mixofshow.outputs import write_text, writing
from mixofshow.reading import parse_json, read_bytes

logger = logging.getLogger(__name__)

MEMBERS: Final = "members.json"
CONCEPTS: Final = "concepts"
SUFFIX: Final = ".safetensors"


class Member(BaseModel):
    """What a member has brought."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    concept: str
    hash: str
    class_word: str
    words: tuple[str, ...]

    @property
    def claimed(self) -> set[str]:
        """What nobody else's prompts may mean."""
        return {f"<{self.concept}>", *self.words}


_TABLE: Final = TypeAdapter(dict[str, Member])


@dataclass(frozen=True)
class Membership:
    """The members of the center in a folder; `pipeline` is its base."""

    folder: Path
    pipeline: Any

    def table(self) -> dict[str, Member]:
        """What each member has brought, by the member's name. Raises BadInputError."""
        path = self.folder / MEMBERS
        if not path.is_file():
            return {}
        try:
            return _TABLE.validate_python(parse_json(read_bytes(path), str(path)))
        except ValidationError as error:
            raise BadInputError(f"{path}: damaged; restore it, or remove it and ask all members again") from error

    def path(self, content: str) -> Path:
        """Where the concept file with this content is kept."""
        return self.folder / CONCEPTS / f"{content}{SUFFIX}"

    def has(self, content: str) -> bool:
        """Whether it is there."""
        return self.path(content).is_file()

    def take(self, member: str, data: bytes) -> Member:
        """Check a member's file as any stranger's, and keep it in the place of what the member brought before.

        Raises BadInputError, and then nothing has changed.
        """
        found = read_concept(*parse_tensors(data, member), member, self.pipeline)
        info, table = found.info, self.table()
        new = Member(concept=info.name, hash=found.hash, class_word=info.class_word, words=info.words)
        for name, other in table.items():
            if name != member and (twice := sorted(new.claimed & other.claimed)):
                raise BadInputError(f"claims the placeholder {twice[0]}, which is {name}'s")
        if not self.has(found.hash):
            self.path(found.hash).parent.mkdir(exist_ok=True)
            with writing(self.path(found.hash)) as temporary:
                temporary.write_bytes(data)
        self._write({**table, member: new})
        return new

    def remove(self, names: Iterable[str]) -> None:
        """Take members' concepts out of the model to come; their files stay. Who is not there is said.

        A plan may be used again, and what it removes is gone then.
        """
        table = self.table()
        for name in names:
            if name not in table:
                logger.warning("remove: no member '%s' has brought a concept%s", shown(name), nearest(name, table))
        self._write({name: member for name, member in table.items() if name not in names})

    def _write(self, table: Mapping[str, Member]) -> None:
        entries = {name: member.model_dump() for name, member in sorted(table.items())}
        write_text(self.folder / MEMBERS, json.dumps(entries, indent=1) + "\n")
