"""grade/reading.py - whoever grades: a notebook that somebody else has written, as data.

It may be any file by that name: so much of it is read, and so deep.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.inside.printable import one_line

MOST_BYTES = 16 << 20
_MOST_CELLS = 2000
_DEEPEST = 50
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_LONGEST_ERROR = 200
_SHORT_BYTES = 200


def read_notebook(path: Path) -> NotebookNode:
    """The notebook at *path*, in the newest form; SpecError where there is none."""
    with _told(path):
        found = json.loads(_text(path, MOST_BYTES))
        _judge(found)
        notebook = nbformat.reads(json.dumps(found), as_version=4)
        if not all(map(_is_cell, notebook.cells)):
            raise ValueError("not all of its cells are cells")
        return notebook


def read_short(path: Path) -> str:
    """The text of a small file, "" where there is none; SpecError where it is something else."""
    if not os.path.lexists(path):
        return ""
    with _told(path):
        return _text(path, _SHORT_BYTES).decode().strip()


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except RecursionError:
        answer = "it is nested too deeply"
    except OSError as error:
        answer = error.strerror or str(error)
    except Exception as error:  # nbformat's validators raise what they like
        answer = one_line(str(error) or type(error).__name__)[:_LONGEST_ERROR]
    else:
        return
    raise SpecError(
        attempt=f"read {path}",
        answer=answer,
        remedy="Ask for it again, or mark it by hand.",
    )


def _text(path: Path, most_bytes: int) -> bytes:
    fd = os.open(path, _FLAGS)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("it is no regular file")
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(
            f"it is larger than {most_bytes >> 20 or most_bytes} "
            f"{'MiB' if most_bytes >> 20 else 'bytes'}"
        )
    return content


def _judge(found: Any) -> None:
    """ValueError where *found* is no notebook that can be worked with."""
    if not isinstance(found, dict):
        raise ValueError("it is no notebook")
    cells = found.get("cells", found.get("worksheets"))
    if not isinstance(cells, list) or len(cells) > _MOST_CELLS:
        raise ValueError(f"it has no cells, or more than {_MOST_CELLS}")
    level: list[Any] = [found]
    for _ in range(_DEEPEST):  # of each level the parts: no recursion on what somebody nested
        level = [part for whole in level for part in _parts(whole)]
    if level:
        raise RecursionError


def _is_cell(cell: Any) -> bool:
    """What everybody takes for granted: nbformat only complains of what is not so."""
    return (
        isinstance(cell, dict)
        and isinstance(cell.get("cell_type"), str)
        and isinstance(cell.get("source"), str)
        and isinstance(cell.get("metadata"), dict)
        and isinstance(cell["metadata"].get("nbgrader", {}), dict)
        and (cell["cell_type"] != "code" or isinstance(cell.get("outputs"), list))
    )


def _parts(whole: Any) -> list[Any]:
    parts = whole.values() if isinstance(whole, dict) else whole
    return [part for part in parts if isinstance(part, dict | list)]
