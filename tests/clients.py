"""Clients of kernels: what a cell shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

PATIENCE_SECONDS = 60


def text_of(messages: Iterable[Mapping[str, Any]]) -> str:
    """What a person sees of *messages* under the cell."""
    return "".join(map(_text_of_one, messages))


def _text_of_one(message: Mapping[str, Any]) -> str:
    content = message["content"]
    kind = message["header"]["msg_type"]
    if kind == "stream":
        return str(content["text"])
    if kind in {"execute_result", "display_data"}:
        return str(content["data"].get("text/plain", ""))
    return f"{content['ename']}: {content['evalue']}" if kind == "error" else ""


def run(client: Any, code: str, **options: Any) -> str:
    """What *code* shows until it is done, errors too."""
    found: list[Mapping[str, Any]] = []
    client.execute_interactive(
        code, output_hook=found.append, **{"timeout": PATIENCE_SECONDS, **options}
    )
    return text_of(found)
