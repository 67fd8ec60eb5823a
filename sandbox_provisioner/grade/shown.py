"""grade/shown.py - pure: what is kept of what a cell shows.

What decides a mark is kept whatever came before it: the first error, a result, and that something
was written to standard error (`nbgrader.utils.determine_grade`). The rest ends at a limit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_CUT = "\n[more output was left out]\n"
_DECIDE = {"error", "execute_result"}
_LONGEST_TEXT = 64 << 10
_MOST_LINES = 100


def weight(message: Mapping[str, Any]) -> int:
    """How many bytes a kernel's *message* is worth, roughly."""
    content = message.get("content", {})
    text = content.get("text") if isinstance(content, Mapping) else None
    if isinstance(text, str):
        return len(text)
    parts = sum(len(part) for part in message.get("buffers", ()))
    return len(json.dumps(content, default=str)) + parts


class Budget:
    """How much of one cell's output is kept: *left* bytes."""

    def __init__(self, left: int) -> None:
        self.left = left
        self._cut: set[str] = set()
        self._decided: set[str] = set()

    def admitted(self, message: dict[str, Any], size: int) -> dict[str, Any] | None:
        """What the notebook gets in place of an output *message* of *size* bytes; None: nothing."""
        kind = message["msg_type"]
        self.left -= size
        if self.left >= 0:
            self._decided.add(kind)
            return message
        if kind in _DECIDE:
            if kind in self._decided:
                return None
            self._decided.add(kind)
            return {**message, "content": _shortened(message["content"])}
        if kind != "stream":
            return None
        return self._cut_off(message)

    def _cut_off(self, message: dict[str, Any]) -> dict[str, Any] | None:
        """Of each stream there is a last word, since its being there may decide."""
        name = str(message["content"].get("name"))
        if name in self._cut:
            return None
        self._cut.add(name)
        return {**message, "content": {"name": name, "text": _CUT}}


def _shortened(content: Mapping[str, Any]) -> dict[str, Any]:
    """An error with less traceback, a result as text alone."""
    short: dict[str, Any] = {
        key: _text(value) if isinstance(value, str) else value for key, value in content.items()
    }
    if "traceback" in short:
        lines = [_text(str(line)) for line in short["traceback"]]
        short["traceback"] = lines[-_MOST_LINES:] if sum(map(len, lines)) < _LONGEST_TEXT else []
    if "data" in short:
        short["data"] = {"text/plain": _text(str(short["data"].get("text/plain", "")))}
        short["metadata"] = {}
    return short


def _text(text: str) -> str:
    return text[:_LONGEST_TEXT]
