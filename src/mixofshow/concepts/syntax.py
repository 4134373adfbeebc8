r"""Marks in prompts: weights in A1111's grammar, on request, and marks of other tools that are ordinary text here.

    (word) × 1.1    [word] ÷ 1.1    (word:1.3) × 1.3    \( \) \[ \] \\ the character itself

Weights multiply where marks stand in one another; what is opened and not closed goes to the end of the prompt. Source:
the documentation and behaviour of AUTOMATIC1111's stable-diffusion-webui ("Attention/emphasis").
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable
from decimal import Decimal
from functools import cache
from itertools import groupby
from typing import Final, Literal

from mixofshow.errors import LISTED, TokenError, nearest, shown

logger = logging.getLogger(__name__)

Syntax = Literal["plain", "a1111"]
Pieces = list[tuple[str, float]]
"""A prompt's texts in order, each with its weight."""

ANY_WORD: Final = re.compile(r"<[^<>\s]{1,64}>")
"""What prompts take for a placeholder."""
_HALF_WORD: Final = re.compile(r"<\s*([\w-]{1,64})|([\w-]{1,64})\s*>")
_BEGUN: Final = re.compile(r"(?<!\w)<[a-z]", re.IGNORECASE)
MORE, LESS = 1.1, 1 / 1.1
LARGEST: Final = 100.0
"""The largest weight that makes sense, either way."""
DEEPEST: Final = 100
_MARK: Final = re.compile(r"\\(?P<itself>[\\()\[\]]?)|(?P<open>[(\[])|:\s*(?P<by>[+-]?[\d.]+)\s*\)|(?P<close>[)\]])")

OTHERS: Final = {
    "prompt editing": r"\[[^\[\]]{0,200}[:|][^\[\]]{0,200}\]",
    "a web UI's LoRA": r"<\w{1,20}:[^<>]{1,100}>",
    "a web UI's chunks and regions": r"\b(?:BREAK|AND|ADDCOMM|ADDBASE|ADDCOL|ADDROW)\b",
    "wildcards": r"\{[^{}]{1,200}\}|\b__[\w/*-]{1,100}__",
    "ComfyUI's embeddings": r"\bembedding:\w{1,100}",
    "compel": r"\b\w{1,50}(?:\+\+|--)+(?![\w+-])|(?:\([^()]{1,200})?\)[+-]+(?!\w)|\([^()]{1,200}\)\d*\.?\d+"
    r"|\)\.(?:and|blend|swap)\(",
    "mixed prompts": r"\S{1,40}\s\|\s\S{1,40}",
    "Midjourney": r"::\s?-?[\d.]+|(?<!\S)--[a-z]{1,9}\b",
}
"""Marks of other tools that nothing here reads, by what they are."""
WEIGHTS: Final = r"\({1,9}[^()]{1,200}\){1,9}|\[{1,9}[^\[\]]{1,200}\]{1,9}|\\[()\[\]]"
"""Marks that A1111's grammar reads."""


def require_brackets(text: str, known: Collection[str]) -> None:
    """Raise TokenError for a placeholder that lacks one of its brackets, or has blanks between them.

    That is one of the `known` words, or what nobody writes but for a placeholder: `<name`, unlike `<3` or `a<b`.
    """
    for half in _HALF_WORD.finditer(plain := ANY_WORD.sub("|", text)):
        word = f"<{(half[1] or half[2]).lower()}>"
        if word in known or _BEGUN.match(plain, half.start()):
            found = shown(plain[half.start() :].strip(), 24)
            raise TokenError(
                f"'{found}': expected a concept's name in two brackets without blanks{nearest(word, known)}"
            )


def read_prompt(prompt: str, syntax: Syntax) -> Pieces:
    """The prompt's texts without their marks, neighbours of one weight as one. Raises TokenError for weights beyond sense."""
    if syntax == "plain":
        return [(prompt, 1.0)]
    pieces: Pieces = []
    opened: dict[str, list[int]] = {")": [], "]": []}  # where, by what closes it

    def weigh(start: int, by: float) -> None:
        pieces[start:] = [(text, weight * by) for text, weight in pieces[start:]]

    end = 0
    for mark in _MARK.finditer(prompt):
        pieces.append((prompt[end : mark.start()], 1.0))
        end = mark.end()
        if mark["itself"] is not None:
            pieces.append((mark["itself"], 1.0))
        elif mark["open"]:
            opened[")" if mark["open"] == "(" else "]"].append(len(pieces))
        elif mark["by"] and opened[")"]:
            weigh(opened[")"].pop(), _number(mark["by"]))
        elif mark["close"] and opened[mark["close"]]:
            weigh(opened[mark["close"]].pop(), _usual(mark["close"]))
        else:
            pieces.append((mark.group(), 1.0))
        if len(opened[")"]) + len(opened["]"]) > DEEPEST:
            raise TokenError(f"prompt weights: more than {DEEPEST} brackets in one another; write (word:1.3)")
    pieces.append((prompt[end:], 1.0))
    for closing, starts in opened.items():
        for start in starts:
            weigh(start, _usual(closing))
    if (beyond := max((abs(weight) for _, weight in pieces), default=0.0)) > LARGEST:
        raise TokenError(f"prompt weights: expected at most {LARGEST:g} in all, found {beyond:.3g}")
    return _merged(pieces)


def write_prompt(pieces: Iterable[tuple[str, float]], syntax: Syntax) -> str:
    """A prompt that is read as these pieces; the inverse of `read_prompt`."""
    if syntax == "plain":
        return "".join(text for text, _ in pieces)
    escaped = ((re.sub(r"[\\()\[\]]", r"\\\g<0>", text), weight) for text, weight in _merged(pieces))
    return "".join(text if weight == 1 else f"({text}:{Decimal(repr(weight)):f})" for text, weight in escaped)


def _usual(closing: str) -> float:
    return MORE if closing == ")" else LESS


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise TokenError(f"prompt weights: expected a number such as 1.3, found '{shown(text)}'") from error


def _merged(pieces: Iterable[tuple[str, float]]) -> Pieces:
    found = groupby((piece for piece in pieces if piece[0]), key=lambda piece: piece[1])
    return [("".join(text for text, _ in alike), weight) for weight, alike in found]


def foreign_marks(prompt: str, syntax: Syntax = "plain") -> list[str]:
    """Marks of other tools in a prompt that its syntax does not read, the first of each kind, as they are written."""
    found: list[str] = []
    for pattern in (*OTHERS.values(), *([WEIGHTS] if syntax == "plain" else [])):
        mark = re.search(pattern, prompt)
        if mark and not any(mark.group() in other for other in found):
            found.append(mark.group())
    return found


def tell_of_marks(prompts: Iterable[str], syntax: Syntax) -> None:
    """Say, once for each, which marks of other tools in these prompts are read as ordinary text."""
    marks = dict.fromkeys(mark for prompt in prompts for mark in foreign_marks(prompt, syntax))
    weights = any(re.fullmatch(WEIGHTS, mark) for mark in marks)
    way_out = "; `prompt_syntax` a1111 reads weights" if syntax == "plain" and weights else ""
    if marks:
        _say(f"prompt: {quoted(marks)}: another tool's marks, read as ordinary text here{way_out}")


def quoted(marks: Iterable[str]) -> str:
    """The first marks, each in quotes."""
    every = [f"'{shown(mark, 40)}'" for mark in marks]
    return ", ".join(every[:LISTED]) + (" …" if len(every) > LISTED else "")


@cache
def _say(line: str) -> None:
    logger.warning("%s", line)
