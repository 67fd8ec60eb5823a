"""grade/imports.py - pure: which modules an assignment's notebooks import.

The nursery imports them once, and each submission's kernel has them at once.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_MAGIC = re.compile(r"^\s*[%!?].*|.*\?\s*$")


def imports_of(notebooks: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """The modules, in the order in which they are met first."""
    found: dict[str, None] = {}
    for notebook in notebooks:
        for cell in notebook.get("cells", ()):
            if cell.get("cell_type") == "code":
                found |= dict.fromkeys(_of_cell(str(cell.get("source", ""))))
    return tuple(found)


def _of_cell(source: str) -> Iterator[str]:
    lines = ("" if _MAGIC.match(line) else line for line in source.splitlines())
    try:
        tree = ast.parse("\n".join(lines))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
