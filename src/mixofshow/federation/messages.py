"""What a center and its clients say to each other: a table of plain values, and files as bytes.

A file is sent as an array of bytes, which Flower cuts into pieces of 5 MB. Neither side trusts what the other sends:
values are checked here for their types, files by their own readers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from mixofshow.errors import BadInputError, shown

PROTOCOL: Final = 1
"""Raised when older versions could not answer."""
TABLE: Final = "mixofshow"
FILES: Final = "files"
ASKED_OF_SUMS: Final = "fitins.config"
"""The table in a message of Flower's secure aggregation (flwr 1.42, `fitins_to_recorddict`)."""
REFUSED: Final = "refused"
"""In a reply: why the client did not do what it was asked for."""
LONGEST_TEXT: Final = 100_000
"""Characters of a value, at most."""
MAX_CONCEPT: Final = 256 * 2**20
MAX_RECORDING: Final = 4 * 2**30
"""Bytes of files, at most."""
HELLO: Final = "query.hello"
CONCEPT: Final = "train.concept"
MOMENTS: Final = "query.moments"
MODEL: Final = "query.model"
JUDGE: Final = "evaluate.judge"
WORDS: Final = "query.words"
"""Messages by what they ask for, as Flower names them. Those of secure aggregation are plain "train" messages, its own."""
Value = str | int | float | bool


def content_of(values: Mapping[str, Value], files: Mapping[str, bytes] | None = None) -> RecordDict:
    """The content of a message."""
    content = RecordDict({TABLE: ConfigRecord({"protocol": PROTOCOL, **values})})
    if files:
        arrays = {name: Array("uint8", (len(data),), "bytes", data) for name, data in files.items()}
        content[FILES] = ArrayRecord(arrays)
    return content


def values_of(message: Message, expected: Mapping[str, type], record: str = TABLE) -> dict[str, Any]:
    """The values of a message, which must be there and of these types. Raises BadInputError for what is not."""
    table = message.content.config_records.get(record, {})
    if table.get("protocol") != PROTOCOL:
        raise BadInputError(f"speaks version {shown(table.get('protocol'), 20)} of the protocol, expected {PROTOCOL}")
    if REFUSED in table:
        raise BadInputError(shown(table[REFUSED], 200))
    for name, kind in expected.items():
        value = table.get(name)
        if type(value) is not kind or (isinstance(value, str) and len(value) > LONGEST_TEXT):
            raise BadInputError(f"'{name}': expected {kind.__name__}, found {shown(value)}")
    return {name: table[name] for name in expected}


def file_of(message: Message, name: str, limit: int) -> bytes:
    """The bytes of a file in a message. Raises BadInputError where there is none, or one larger than `limit`."""
    record = message.content.array_records.get(FILES, {})
    if name not in record:
        raise BadInputError(f"sent no {name}")
    data: bytes = record[name].data
    if len(data) > limit:
        raise BadInputError(f"sent a {name} of {len(data)} bytes, at most {limit} are taken")
    return data
