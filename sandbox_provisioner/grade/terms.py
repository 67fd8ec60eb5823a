"""grade/terms.py - pure: what a submission may use, and what surrounds every one alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# Where the files of a submission show in its box, read-only; the kernel starts in a copy of them.
FILES = "/submission"
# Kernels find these whatever the grader itself has, so that marks are the same twice.
FIXED = {
    "PYTHONHASHSEED": "0",
    "TZ": "UTC",
    "LANG": "C.UTF-8",
    "LC_ALL": "C.UTF-8",
    "NBGRADER_EXECUTION": "autograde",
}
SEED = 0
# Of a cell of a notebook; None is no limit.
SecondsOf = Callable[[Mapping[str, Any]], int | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Of one notebook: *cell_seconds* a cell and *total_seconds* in all; *shown_bytes* of what a
    cell shows are kept, and more than *said_bytes* in all end it. None is no limit."""

    cell_seconds: float | None = 30.0
    total_seconds: float | None = 600.0
    shown_bytes: int = 256 << 10
    said_bytes: int = 64 << 20


def setting_up(seed: int = SEED) -> str:
    """The code that a kernel runs first, before any of the submission's: its own copy of the files
    around it, and random numbers that begin alike. It leaves no name behind."""
    return f"exec({_SETTING_UP.format(files=FILES, seed=seed)!r}, {{}})"


_SETTING_UP = """
import os, random, shutil, sys
home = os.path.expanduser("~/submission")
shutil.copytree({files!r}, home, copy_function=shutil.copyfile)
os.chdir(home)
random.seed({seed})
numpy = sys.modules.get("numpy")
if numpy is not None:
    numpy.random.seed({seed})
"""
