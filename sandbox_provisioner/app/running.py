"""app/running.py - a command of its own: `jupyter sandbox list` and `jupyter sandbox gc`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from traitlets import Bool, Float

from sandbox_provisioner.app.command import COMMON_ALIASES, COMMON_FLAGS, SandboxCommand
from sandbox_provisioner.app.leftovers import remove_left_groups
from sandbox_provisioner.app.tables import table
from sandbox_provisioner.cgroup import Usage, open_existing
from sandbox_provisioner.handle import short_id
from sandbox_provisioner.inside.printable import one_line
from sandbox_provisioner.records import (
    Record,
    RecordFolder,
    age_seconds,
    all_records,
    cgroup_facts,
    open_init,
    sweep,
)
from sandbox_provisioner.spec import format_bytes

_CLEAR_SCREEN = "\033[H\033[2J"


@dataclass(frozen=True, slots=True)
class Pages:
    """The memory of a sandbox's processes by who has it: nobody else, or others too, as what a
    nursery has imported; *pss_bytes* counts a page that n processes share as 1/n of it."""

    private_bytes: int
    shared_bytes: int
    pss_bytes: int

    @classmethod
    def of(cls, pids: Iterable[int]) -> Pages | None:
        """Of the processes *pids*, from proc_pid_smaps(5); None if none of them may be read."""
        total: dict[str, int] = {}
        for pid in pids:
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
                    name, _, rest = line.partition(":")
                    total[name] = total.get(name, 0) + (int(rest.split()[0]) << 10)
        if not total:
            return None
        return cls(
            private_bytes=total["Private_Clean"] + total["Private_Dirty"],
            shared_bytes=total["Shared_Clean"] + total["Shared_Dirty"],
            pss_bytes=total["Pss"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sandbox:
    """One that there is. *state* is running, waiting (a spare), starting, ended (its server has not
    removed it yet) or left (its server is gone)."""

    record: Record
    state: str
    usage: Usage
    pages: Pages | None = None
    cpu_percent: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Flat, with the units in the names; null where the kernel does not tell."""
        record = asdict(self.record)
        shown = (
            "sandbox_id", "kernel_id", "kind", "nursery", "name", "user", "workdir", "started",
            "cpu_cores", "confinement",
        )  # fmt: skip
        usage = asdict(self.usage)
        usage["processes"] = usage.pop("pids")
        usage["memory_limit_bytes"] = self.record.memory_limit_bytes
        return {
            **{name: record[name] for name in shown},
            "state": self.state,
            "pid": self.record.init_pid,
            "age_seconds": round(age_seconds(self.record), 1),
            "cpu_percent": self.cpu_percent,
            "private_bytes": self.pages.private_bytes if self.pages else None,
            "shared_bytes": self.pages.shared_bytes if self.pages else None,
            "pss_bytes": self.pages.pss_bytes if self.pages else None,
            **usage,
        }


def look(runtime: Path) -> list[Sandbox]:
    """Every sandbox with a record in *runtime*, oldest first; changes nothing."""
    return [_seen(folder, record) for folder, record in all_records(runtime)]


def _seen(folder: RecordFolder, record: Record) -> Sandbox:
    tree = open_existing(cgroup_facts(record), record.tree)
    pages = Pages.of(tree.pids())
    return Sandbox(record=record, state=_state(folder, record), usage=tree.usage(), pages=pages)


def _state(folder: RecordFolder, record: Record) -> str:
    orphan = folder.is_orphan()
    if orphan:
        folder.release()
    pidfd = open_init(record)
    if pidfd is not None:
        os.close(pidfd)
        if orphan and not record.survives_server:
            return "left"
        return "waiting" if record.kind == "spare" else "running"
    if orphan:
        return "left"
    return "ended" if record.init_pid else "starting"


_ALIASES = {"interval": "ListApp.interval", **COMMON_ALIASES}
_FLAGS = {
    **COMMON_FLAGS,
    "json": ({"ListApp": {"json_output": True}}, "Print JSON."),
    "watch": ({"ListApp": {"watching": True}}, "Look again and again; end it with Ctrl-C."),
}


class ListApp(SandboxCommand):
    """Shows what runs, once or again and again."""

    usage = "jupyter sandbox list [--json] [--watch]"
    description = (
        "Show the sandboxes that you have started on this machine: kernels, what `run` runs, and "
        "the nurseries and spares that make starts fast. "
        "The state is running, starting, waiting (a spare for the next start), ended (its server "
        "is about to remove it) or left (its server was killed; see: jupyter sandbox gc). A kernel "
        "that a nursery has forked shares memory with it: private is what would be free without "
        "this kernel, shared what others have too."
    )
    examples = """
    jupyter sandbox list
    jupyter sandbox list --watch --interval 5
    jupyter sandbox list --json | jq '.[] | select(.memory_bytes > 1e9) | .kernel_id'
    """
    json_output = Bool(False, help="Print JSON: a list, or one line a look with --watch.").tag(
        config=True
    )
    watching = Bool(False, help="Look again and again, and show the use of CPUs.").tag(config=True)
    interval = Float(2.0, min=0.1, help="Seconds between two looks of --watch.").tag(config=True)
    aliases = _ALIASES
    flags = _FLAGS

    def start(self) -> None:
        """Called once by `main`; with --watch it returns when it is interrupted."""
        self.refuse_words()
        runtime = self.runtime()
        found = look(runtime)
        self._show(found)
        while self.watching:
            before = {sandbox.record.sandbox_id: sandbox for sandbox in found}
            time.sleep(self.interval)
            found = [_compared(sandbox, before, self.interval) for sandbox in look(runtime)]
            self._show(found)

    def _show(self, found: list[Sandbox]) -> None:
        if self.json_output:
            indent = None if self.watching else 1
            print(json.dumps([sandbox.as_json() for sandbox in found], indent=indent), flush=True)
            return
        if self.watching and sys.stdout.isatty():
            print(_CLEAR_SCREEN, end="")
        print(_as_table(found, watching=self.watching) if found else "No sandbox runs.", flush=True)


def _compared(sandbox: Sandbox, before: Mapping[str, Sandbox], seconds: float) -> Sandbox:
    """*sandbox* with the use of CPUs since the look before."""
    earlier = before.get(sandbox.record.sandbox_id)
    now, then = sandbox.usage.cpu_seconds, earlier.usage.cpu_seconds if earlier else None
    if now is None or then is None:
        return sandbox
    percent = round(100 * (now - then) / seconds, 1)
    return replace(sandbox, cpu_percent=percent)


def _as_table(found: list[Sandbox], *, watching: bool) -> str:
    head = [
        "id", "kind", "name", "user", "state", "age", "memory", "private", "shared", "cpu",
        "processes", "held by",
    ]  # fmt: skip
    rows = [_row(sandbox) for sandbox in found]
    if watching:
        head.insert(10, "now")
        for row, sandbox in zip(rows, found, strict=True):
            percent = sandbox.cpu_percent
            row.insert(10, "" if percent is None else f"{percent:.0f} %")
    return table([head, *rows])


def _row(sandbox: Sandbox) -> list[str]:
    record, usage, pages = sandbox.record, sandbox.usage, sandbox.pages
    used = "?" if usage.memory_bytes is None else format_bytes(usage.memory_bytes)
    cap = f" of {format_bytes(record.memory_limit_bytes)}" if record.memory_limit_bytes else ""
    return [
        short_id(record),
        record.kind,
        record.name,
        record.user,
        sandbox.state,
        _format_age(age_seconds(record)),
        used + cap,
        format_bytes(pages.private_bytes) if pages else "?",
        format_bytes(pages.shared_bytes) if pages else "?",
        "?" if usage.cpu_seconds is None else f"{usage.cpu_seconds:.1f} s",
        "?" if usage.pids is None else str(usage.pids),
        record.confinement,
    ]


def _format_age(seconds: float) -> str:
    """Two units are enough: 59 s, 12 min, 3 h 20 min, 2 d 4 h."""
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if not minutes:
        return f"{seconds:.0f} s"
    if not hours:
        return f"{minutes} min"
    return f"{days} d {hours % 24} h" if days else f"{hours} h {minutes % 60} min"


class CollectApp(SandboxCommand):
    """Removes what is nobody's any more."""

    usage = "jupyter sandbox gc"
    description = (
        "Remove what servers left that were killed: their sandboxes, with all processes in them, "
        "and empty control groups. What a living server has started is not touched, nor are "
        "kernels that were asked to outlive their server, so that this is safe at any time. What "
        "cannot be removed is named, and the exit status is 1 then. "
        "Every start of a sandboxed kernel does the same for sandboxes that have a record."
    )
    examples = """
    jupyter sandbox gc
    """

    def start(self) -> None:
        """Called once by `main`; HostError if processes cannot be ended, SystemExit with 1 if
        something cannot be removed."""
        self.refuse_words()
        runtime = self.runtime()
        stuck: list[str] = []
        gone = sweep(runtime, stuck.append, seconds=float("inf"))
        for name in gone:
            print(f"Removed the sandbox {one_line(name)}, whose server is gone.")
        groups = remove_left_groups(runtime)
        for name in groups:
            print(f"Removed the empty control group {name}.")
        if not gone and not groups and not stuck:
            print("Nothing to remove.")
        for sentence in stuck:
            print(f"jupyter sandbox: {one_line(sentence)}", file=sys.stderr)
        if stuck:
            raise SystemExit(1)
