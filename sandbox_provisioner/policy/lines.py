"""lines.py - pure: a TOML text that a person has written, and the line of each of its keys.

Python's `tomllib` says where a text is no TOML, and nothing of where its values were. This walks
through a text that `tomllib` has read: a statement is a header or a key with a value, strings and
brackets are what may hide the end of one (toml.io, v1.0.0).
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from typing import Any

Path = tuple[str, ...]

_AT_LINE = re.compile(r" ?\(at (?:line (\d+), column \d+|end of document)\)")

_KEY = re.compile(r'"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'|[A-Za-z0-9_-]+')
_STRING = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}(?!")|\'\'\'.*?\'{3,5}(?!\')|"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'',
    re.DOTALL,
)
_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")


class NotToml(ValueError):
    """What is wrong with a text, on which *line* (0: all of it), and what to do about it."""

    def __init__(self, line: int, answer: str, remedy: str) -> None:
        self.line, self.answer, self.remedy = line, answer, remedy
        super().__init__(answer)


def read_toml(content: bytes) -> tuple[dict[str, Any], Lines]:
    """What *content* says, and where; NotToml."""
    try:
        text = content.decode().replace("\r\n", "\n")
        return tomllib.loads(text), Lines(text)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise NotToml(line, "it is not UTF-8", "Write it anew there.") from None
    except tomllib.TOMLDecodeError as error:
        # tomllib tells the line at the end of what it says.
        at = _AT_LINE.search(str(error))
        line = int(at[1]) if at and at[1] else text.count("\n") + 1
        answer = f"it is no TOML: {_AT_LINE.sub('', str(error))}"
        raise NotToml(line, answer, "Correct that line.") from None
    except RecursionError:
        raise NotToml(0, "its brackets are too deep", "Write it flat.") from None


class Lines:
    """Of *text*, which is TOML, the line of each key: the first one that speaks of it."""

    def __init__(self, text: str) -> None:
        self._found: dict[Path, int] = {}
        for path, line in _statements(text):
            for length in range(1, len(path) + 1):
                self._found.setdefault(path[:length], line)

    def of(self, path: Path) -> int:
        """The line of *path*; of what stands within a value, that of the value."""
        while path and path not in self._found:
            path = path[:-1]
        return self._found.get(path, 1)

    def paths(self) -> frozenset[Path]:
        """All keys that were seen."""
        return frozenset(self._found)


def _statements(text: str) -> Iterator[tuple[Path, int]]:
    """Each header and each key, in their order, with the line on which it begins."""
    table: Path = ()
    at, line, counted = 0, 1, 0
    while (at := _after(_BLANK, text, at)) < len(text):
        line, counted = line + text.count("\n", counted, at), at
        if text[at] == "[":
            brackets = 2 if text.startswith("[[", at) else 1
            table, at = _dotted(text, at + brackets)
            yield table, line
            at = _after(_SPACE, text, at) + brackets
        else:
            key, at = _dotted(text, at)
            yield (*table, *key), line
            at = _end_of_value(text, at)


def _dotted(text: str, at: int) -> tuple[Path, int]:
    """The key at *at*, with all its parts, and where it ends."""
    parts = []
    while match := _KEY.match(text, _after(_SPACE, text, at)):
        parts.append(_plain(match[0]))
        at = _after(_SPACE, text, match.end())
        if not text.startswith(".", at):
            break
        at += 1
    return tuple(parts), at


def _plain(key: str) -> str:
    """A part of a key without its quotes."""
    if key.startswith("'"):
        return key[1:-1]
    return str(tomllib.loads(f"key = {key}")["key"]) if key.startswith('"') else key


def _end_of_value(text: str, at: int) -> int:
    """Where the statement ends whose "=" is at *at*: at a line's end outside of all brackets."""
    depth = 0
    while at < len(text):
        if match := _STRING.match(text, at):
            at = match.end()
            continue
        if text[at] == "#":
            at = _after(_BLANK, text, at) if depth else _line_end(text, at)
            continue
        if text[at] == "\n" and not depth:
            break
        depth += (text[at] in "[{") - (text[at] in "]}")
        at += 1
    return at


def _line_end(text: str, at: int) -> int:
    end = text.find("\n", at)
    return len(text) if end < 0 else end


def _after(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return match.end() if match else at
