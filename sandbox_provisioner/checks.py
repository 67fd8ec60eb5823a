"""checks.py - pure: one check of `jupyter sandbox doctor`, and what checks are made from.

A facility's `tell` has the checks that are its own, general ones stand in `doctor.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from sandbox_provisioner.errors import SandboxError
from sandbox_provisioner.facilities.ids.facts import IdRange
from sandbox_provisioner.facilities.namespaces.facts import Surroundings
from sandbox_provisioner.host import HostFacts, WorkdirFacts

NO_SANDBOX = "No sandbox starts."


class State(StrEnum):
    """MISSING may keep sandboxes from starting; NOTE is for the reader to judge."""

    OK = "ok"
    MISSING = "missing"
    NOTE = "note"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of the table. *effect* and *remedy* are for `errors.in_lines`: what follows from it,
    and what mends it; "" where all is well."""

    facility: str
    state: State
    found: str
    effect: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """An installed kernel. *guarded* means that its argv makes a sandbox by itself too."""

    name: str
    sandboxed: bool
    guarded: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What was found out. *sysctls* are those that this Linux has.

    *catch_obstacle* is why Linux hands the connections of a kernel to no one listener, "" if it
    does, or if no sandbox starts at all; *card* is why kernels of a root server cannot have a
    network card, "" if they can. *id_range* is what an ordinary user's kernels can have;
    *runtime* is a directory or the error instead, *trial* the milliseconds that a sandbox took or
    the error instead, and *uncapped_trial* the same without the caps that are missing here, where
    the first one failed; *server* the program `jupyter` on the PATH if it is of another
    environment, *default_provisioner* who starts kernels that do not say it. *broker* is where one
    answers, the error where it does not, or "" where there is none. *image_obstacle* is why no
    image can hold a limit of the disk, "" if one can, *project_obstacle* the same of a
    folder with a project quota; *storage_room* is what is free for them,
    promised to kernels, and kept. *image_tools* tells of each program that makes images of roots
    whether it is here. *filesystems* are those that Linux has, or has a module for; *image_reader*
    is the program that reads image files for an ordinary user, who may use FUSE if *has_fuse*.
    """

    host: HostFacts
    workdir: WorkdirFacts | SandboxError
    sysctls: Mapping[str, str]
    surroundings: Surroundings
    id_range: IdRange | SandboxError
    runtime: str | SandboxError
    runtime_free_bytes: int
    entry_point: str
    server: str
    kernels: Sequence[Kernel]
    left_sandboxes: Sequence[str]
    left_groups: Sequence[str]
    trial: float | SandboxError
    uncapped_trial: float | SandboxError | None = None
    catch_obstacle: str = ""
    card: SandboxError | str = ""
    broker: SandboxError | str = ""
    image_obstacle: str = ""
    project_obstacle: str = ""
    storage_room: tuple[int, int, int] = (0, 0, 0)
    image_tools: Mapping[str, bool] = field(default_factory=dict)
    filesystems: frozenset[str] = frozenset()
    image_reader: str = ""
    has_fuse: bool = False


def lines(steps: Sequence[str]) -> str:
    """The steps of a remedy, as a check has them."""
    return "\n".join(steps)
