"""attacks.py - in the test process: the attempts of tests/escape for code in a box of another kind.

Those that are after the host itself; what a kernel does to its own work directory, or may have by
options of its own, is not the same there.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "escape"))

import rooms  # noqa: F401
from frame import VARIANTS, Attempt, Kind, table
from stage import Stage, jobs_of, prelude, stage_for

ROOT = VARIANTS[0]
KINDS = {
    Kind.FILES, Kind.DESCRIPTORS, Kind.PRIVILEGES, Kind.PROCESSES, Kind.NAMESPACES, Kind.MOUNTS,
    Kind.CALLS, Kind.REACHING, Kind.MACHINE, Kind.TERMINALS, Kind.NETWORK, Kind.SOCKETS, Kind.PROC,
}  # fmt: skip


@contextlib.contextmanager
def target(workdir: Path) -> Iterator[Stage]:
    """The host with what is attacked, some of it in *workdir*, from where it is attacked."""
    with stage_for(ROOT) as stage:
        stage.workdir = workdir
        before = set(workdir.iterdir())
        try:
            stage.fill()
            yield stage
        finally:
            # However deep it is.
            subprocess.run(["rm", "-rf", "--", *(set(workdir.iterdir()) - before)], check=True)


def chosen(*but: int) -> list[Attempt]:
    """All that share a kernel without options of its own, *but* those numbers."""
    found = [
        a
        for a in table.values()
        if a.inside and not (a.alone or a.options or a.after)
        and a.kind in KINDS and a.answer(ROOT) is not None and a.number not in but
    ]  # fmt: skip
    assert len(found) > 200
    return found


def wrong_answers(
    stage: Stage, run: Callable[[str], str], attempts: list[Attempt], **facts: Any
) -> dict[str, str]:
    """What *attempts* answer that they do not in a kernel of root's; *run* runs code in the box,
    for which other *facts* hold."""
    facts = {**stage.facts, "boxed": True, "sockets": "/run/kernel", **facts}
    run(f"exec(compile({prelude()!r}, 'tools', 'exec'))")
    said = run(f"print(run_jobs({jobs_of(attempts)!r}, {facts!r}))")
    found = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    told = {attempt: str(found[str(attempt.number)]) for attempt in attempts}
    return {
        f"{a.number} {a.title}": f"{answer}, not {a.answer(ROOT)}"
        for a, answer in told.items()
        if answer not in a.allowed(ROOT)
    }
