"""app/running.py - a command of its own: `jupyter sandbox list` and `jupyter sandbox gc`."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pwd
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from traitlets import Bool, Enum, Float

from sandbox_provisioner.app.command import (
    COMMON_ALIASES,
    COMMON_FLAGS,
    OPTION_ALIASES,
    SandboxCommand,
    spoken,
)
from sandbox_provisioner.app.leftovers import (
    remove_left_cards,
    remove_left_folders,
    remove_left_groups,
    remove_left_images,
    remove_left_table,
)
from sandbox_provisioner.broker.launcher import kernels_through
from sandbox_provisioner.errors import SandboxError
from sandbox_provisioner.facilities.caps.cgroup import Usage, open_existing
from sandbox_provisioner.facilities.network.tell.counts import Traffic
from sandbox_provisioner.facilities.network.tell.said import refused
from sandbox_provisioner.hub import doors
from sandbox_provisioner.inside.printable import one_line
from sandbox_provisioner.layers.folders import collect
from sandbox_provisioner.layers.kept import collect_layers
from sandbox_provisioner.layers.place import all_bases, layer_path
from sandbox_provisioner.records import (
    Record,
    RecordFolder,
    age_seconds,
    all_records,
    cgroup_facts,
    of_later_versions,
    open_init,
)
from sandbox_provisioner.spec import relative
from sandbox_provisioner.sweeping import sweep
from sandbox_provisioner.units import format_bytes

_GROUPS = "/sys/fs/cgroup"
_LARGEST_PID = 1 << 22  # proc_sys_kernel(5), pid_max
_MOST_BYTES = 1 << 63
_TRAFFIC = ("up_bytes", "down_bytes", "connections", "refusals")
_MOST_REFUSED = 100  # names that are told of one kernel, which can make up any number
_FIRST_SECONDS = 0.25  # between the two looks that tell the use of CPUs


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
class Disk:
    """What a sandbox has written that disk_limit limits: bytes, and files with directories and
    links; and the size of the file system that it is in."""

    used_bytes: int
    size_bytes: int
    inodes: int

    @classmethod
    def of(cls, record: Record) -> Disk | None:
        """As its /run tells, which is always there; None where nothing is limited, where it has
        ended, or where we may not look. Not for another user's record, who says which process it
        is: one whose file system never answers would keep us for ever, a thread of ours, too."""
        if not record.storage or not record.init_pid:
            return None
        try:
            found = os.statvfs(f"/proc/{record.init_pid}/root/run")
        except OSError:
            return None
        return cls(
            used_bytes=(found.f_blocks - found.f_bfree) * found.f_frsize,
            size_bytes=found.f_blocks * found.f_frsize,
            inodes=found.f_files - found.f_ffree,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sandbox:
    """One that there is. *state* is busy or idle (by its messages), running (whose messages nobody
    hears), asleep (frozen), waiting (a spare), starting, ended (its server has not removed it yet)
    or left (its server is gone). *owner* is the uid of another user whose word its record is."""

    record: Record
    state: str
    usage: Usage
    pages: Pages | None = None
    cpu_percent: float | None = None
    traffic: Traffic | None = None
    disk: Disk | None = None
    folder: Path = Path()
    owner: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Flat, with the units in the names; null where the kernel does not tell."""
        record = asdict(self.record)
        shown = (
            "sandbox_id", "kernel_id", "kind", "nursery", "name", "notebook", "user", "workdir",
            "started", "cpu_cores", "confinement", "network", "changed",
            "storage",
        )  # fmt: skip
        usage = asdict(self.usage)
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
            "disk_bytes": self.disk.used_bytes if self.disk else None,
            "disk_size_bytes": self.disk.size_bytes if self.disk else None,
            "disk_inodes": self.disk.inodes if self.disk else None,
            **{f"network_{name}": getattr(self.traffic, name, None) for name in _TRAFFIC},
            "network_refused": self._refused(),
            **usage,
        }

    def _refused(self) -> dict[str, int] | None:
        """How often by name, the most wanted first."""
        if self.traffic is None:
            return None
        found = [*refused(self.traffic.names).items()][:_MOST_REFUSED]
        return {name: counts.refusals for name, counts in found}


def look(runtime: Path) -> list[Sandbox]:
    """Every sandbox with a record in *runtime*, oldest first; changes nothing."""
    return [_seen(folder, record) for folder, record in all_records(runtime)]


def look_at_others(uid: int, runtime: Path) -> list[Sandbox]:
    """The same for root, of a directory of the user *uid*, who may write anything into a record, as
    a group a FIFO that nobody ever writes to. What cannot be meant is not shown."""
    found = []
    for folder, record in all_records(runtime):
        if can_be_meant(record):
            with contextlib.suppress(SandboxError, OSError, ValueError, ArithmeticError):
                found.append(_seen(folder, record, owner=uid))
    return found


def can_be_meant(record: Record) -> bool:
    """Whether another user's *record* names what a sandbox may have."""
    bases = [os.path.normpath(str(base)) for base in record.cgroup_bases.values()]
    return (
        record.started >= 0
        and 0 <= record.init_pid <= _LARGEST_PID
        and 0 <= (record.memory_limit_bytes or 0) < _MOST_BYTES
        and math.isfinite(record.cpu_cores or 0)
        and all(relative(base, _GROUPS) is not None for base in bases)
    )


def _seen(folder: RecordFolder, record: Record, owner: int | None = None) -> Sandbox:
    tree = open_existing(cgroup_facts(record), record.tree)
    pids, usage = tree.pids(), tree.usage()
    state = _state(folder, record)
    if not pids and state == "running":
        pids = family_of(record.init_pid)
    pages = Pages.of(pids)
    if usage.memory_bytes is None:
        usage = counted(pids, pages)
    if state == "running":
        state = "asleep" if tree.is_frozen() else folder.read_activity() or state
    has_disk = owner is None and state not in {"left", "ended", "starting"}
    return Sandbox(
        record=record,
        folder=folder.path,
        state=state,
        usage=usage,
        pages=pages,
        traffic=folder.read_counts(),
        disk=Disk.of(record) if has_disk else None,
        owner=owner,
    )


def family_of(pid: int) -> list[int]:
    """The process *pid*, PID 1 of its namespace, and all below it: nobody gets out of there."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal() and (fields := _stat_of(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [pid]
    for member in found:  # which grows meanwhile
        found += children.get(member, [])
    return found


def counted(pids: Sequence[int], pages: Pages | None) -> Usage:
    """What processes use by their own word, where no group counts it: their memory, the part of it
    that others have too divided among all who have it; and their CPU time, with that of those who
    have ended and were waited for."""
    found = [fields for pid in pids if (fields := _stat_of(pid))]
    if not found:
        return Usage()
    ticks = sum(int(time) for fields in found for time in fields[11:15])
    return Usage(
        memory_bytes=pages.pss_bytes if pages else None,
        cpu_seconds=ticks / os.sysconf("SC_CLK_TCK"),
        processes=sum(int(fields[17]) for fields in found),
    )


def _stat_of(pid: int) -> list[str]:
    """proc_pid_stat(5) from field 3 on: state, parent, … 14 to 17 are times, 20 is the number of
    threads; [] if it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def _state(folder: RecordFolder, record: Record) -> str:
    orphan = folder.own_if_orphan()
    if orphan:
        folder.release()
    pidfd = open_init(record)
    if pidfd is not None:
        os.close(pidfd)
        if orphan and not record.survives_server:
            return "left"
        return "waiting" if record.kind == "spare" else "running"
    if orphan and not (record.survives_server and folder.is_asked_for()):
        return "left"
    return "ended" if record.init_pid else "starting"


# Of equals, and of those of whom it is not known, the oldest comes first.
_ORDERS: Mapping[str, Callable[[Sandbox], Any]] = {
    "age": lambda sandbox: 0,
    "memory": lambda sandbox: -(sandbox.usage.memory_bytes or 0),
    "cpu": lambda sandbox: -(sandbox.cpu_percent or 0),
    "name": lambda sandbox: sandbox.record.name.lower(),
}
_ALIASES = {"interval": "ListApp.interval", "sort": "ListApp.sort", **COMMON_ALIASES}
_FLAGS = {
    **COMMON_FLAGS,
    "json": ({"ListApp": {"json_output": True}}, "Print JSON."),
    "watch": ({"ListApp": {"watching": True}}, "Look again and again; end it with Ctrl-C."),
}


class ListApp(SandboxCommand):
    """Shows what runs, once or again and again."""

    usage = "jupyter sandbox list [--sort ORDER] [--json] [--watch]"
    description = (
        "Show the sandboxes that you have started on this machine, by yourself or through a broker "
        "or a hub, root those of all users: "
        "kernels, what `run` runs, the nurseries and spares that make starts fast, and the "
        "gateways that serve networks. "
        "A kernel is busy or idle by its own messages, as its server has last looked (every three "
        "seconds); running where nobody listens to them; asleep while all of it is stopped. "
        "Others are starting, waiting (a spare for the next start), ended (its server is about to "
        "remove it) or left (its server was killed; see: jupyter sandbox gc). "
        "CPU is the use since the last look, 100 % is one core. A kernel that a nursery has forked "
        "shares memory with it: private is what would be free without this kernel, shared what "
        "others have too. The fields of --json stand in docs/list.md."
    )
    examples = """
    jupyter sandbox list --sort memory
    jupyter sandbox list --watch --sort cpu --interval 5
    jupyter sandbox list --json | jq '.[] | select(.memory_bytes > 1e9) | .kernel_id'
    """
    json_output = Bool(False, help="Print JSON: a list, or one line a look with --watch.").tag(
        config=True
    )
    watching = Bool(False, help="Look again and again.").tag(config=True)
    interval = Float(2.0, min=0.1, help="Seconds between two looks of --watch.").tag(config=True)
    sort = Enum(
        list(_ORDERS),
        default_value="age",
        help="What comes first: the oldest, who uses most memory or CPU, or the first by name.",
    ).tag(config=True)
    aliases = _ALIASES
    flags = _FLAGS
    _broker = ""  # that has kernels for us

    def start(self) -> None:
        """Called once by `main`; with --watch it returns when it is interrupted."""
        self.refuse_words()
        # Only a command waits for this import, and no start.
        from sandbox_provisioner.app import listing  # noqa: PLC0415

        is_for_all = os.geteuid() == 0 and not self.provisioner().runtime_dir
        tell_later_versions(self.runtime())
        looks = self._looks(self.runtime(), places_of_others() if is_for_all else ())
        asked = self.provisioner().broker_socket
        self._broker = asked if os.geteuid() and os.path.exists(asked) else ""
        if self.json_output:
            for found in looks:
                told = [sandbox.as_json() for sandbox in found]
                print(json.dumps(told, indent=None if self.watching else 1), flush=True)
            return
        out = listing.console()
        if not self.watching:
            out.print(listing.drawn(next(looks), out.width))
            return
        with listing.screen(out) as show:
            for found in looks:
                show(found, f"{_sums(found)}  ·  every {self.interval:g} s, Ctrl-C ends")

    def _looks(self, ours: Path, others: Sequence[tuple[int, Path]]) -> Iterator[list[Sandbox]]:
        """What there is, sorted; again and again with --watch, and each time with the use of CPUs
        since the look before."""
        seconds = _FIRST_SECONDS
        before, then = self._look(ours, others), time.monotonic()
        while True:
            time.sleep(seconds)
            found, now = self._look(ours, others), time.monotonic()
            shown = [_compared(sandbox, before, now - then) for sandbox in found]
            yield sorted(shown, key=_ORDERS[self.sort])
            if not self.watching:
                return
            before, then, seconds = found, now, self.interval

    def _look(self, ours: Path, others: Sequence[tuple[int, Path]]) -> list[Sandbox]:
        """What there is, with what a broker has for us."""
        found = look_at_all(ours, others)
        try:
            found += look_at_broker(self._broker) if self._broker else []
        except SandboxError as error:
            print(spoken(str(error)), file=sys.stderr)
            self._broker = ""
        return sorted(found, key=lambda sandbox: sandbox.record.started)


def look_at_broker(path: str) -> list[Sandbox]:
    """What the broker at *path* has for this user; SandboxError if it does not answer."""
    return [
        Sandbox(record=record, state=state, usage=usage)
        for record, state, usage in kernels_through(path)
    ]


def look_at_all(ours: Path, others: Sequence[tuple[int, Path]] = ()) -> list[Sandbox]:
    """Every sandbox in our directory of records and in those of *others*, oldest first."""
    found = look(ours) + [one for of_user in others for one in look_at_others(*of_user)]
    return sorted(found, key=lambda sandbox: sandbox.record.started)


def places_of_others() -> list[tuple[int, Path]]:
    """By uid, where the servers of other users keep their records if nothing else is configured."""
    return [(uid, path) for uid in _users() for path in _default_places(uid)]


def tell_later_versions(runtime: Path) -> None:
    """Say on stderr what we cannot show or change, if there is any."""
    found = of_later_versions(runtime)
    if found:
        text = (
            f"Left out: {', '.join(map(one_line, found))}, whose records a later version of "
            "sandbox-provisioner has written. Use that one's command."
        )
        print(spoken(text), file=sys.stderr)


def _users() -> list[int]:
    """Who has processes now; nobody else's home is touched, which may be far away."""
    found = set()
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                found.add(entry.stat().st_uid)
    return sorted(found - {0})


def _default_places(uid: int) -> Iterator[Path]:
    """As `records.runtime_directory` chooses them for the user *uid*; only what is that user's own,
    and no symbolic link."""
    paths = [Path(f"/run/user/{uid}/sandbox-provisioner")]
    with contextlib.suppress(KeyError):
        paths.append(Path(pwd.getpwuid(uid).pw_dir, ".local/share/jupyter/sandboxes"))
    for path in paths:
        with contextlib.suppress(OSError):
            status = path.lstat()
            if stat.S_ISDIR(status.st_mode) and status.st_uid == uid:
                yield path


def _compared(sandbox: Sandbox, before: Iterable[Sandbox], seconds: float) -> Sandbox:
    """*sandbox* with the use of CPUs since the look before, *seconds* ago."""
    same = (o for o in before if o.record.sandbox_id == sandbox.record.sandbox_id)
    earlier = next(same, None)
    now, then = sandbox.usage.cpu_seconds, earlier.usage.cpu_seconds if earlier else None
    if now is None or then is None:
        return sandbox
    return replace(sandbox, cpu_percent=max(0.0, round(100 * (now - then) / seconds, 1)))


def _sums(found: Sequence[Sandbox]) -> str:
    used = sum(sandbox.usage.memory_bytes or 0 for sandbox in found)
    cores = sum(sandbox.cpu_percent or 0 for sandbox in found) / 100
    count = f"{len(found)} sandbox{'' if len(found) == 1 else 'es'}"
    return f"{count}  ·  {format_bytes(used)} of memory  ·  {cores:.1f} cores"


_COLLECT_ALIASES = {**COMMON_ALIASES, "layer-dir": OPTION_ALIASES["layer-dir"]}


class CollectApp(SandboxCommand):
    """Removes what is nobody's any more."""

    usage = "jupyter sandbox gc"
    description = (
        "Remove what servers left that were killed: their sandboxes, with all processes in them, "
        "and empty control groups. What a living server has started is not touched, nor are "
        "kernels that were asked to outlive their server, so that this is safe at any time. What "
        "cannot be removed is named, and the exit status is 1 then. "
        "Every start of a sandboxed kernel does the same for sandboxes that have a record. Changes "
        "that nobody has decided about for review_days go, too: docs/review.md."
    )
    examples = """
    jupyter sandbox gc
    """
    aliases = _COLLECT_ALIASES

    def _kept_too_long(self) -> list[str]:
        """Remove it; the ids of the kernels whose changes these were."""
        options, gone = self.provisioner(), []
        for base in all_bases(layer_path(options.layer_dir)):
            gone += collect(base, options.review_days, float("inf"))
            collect_layers(base, float("inf"))
        return gone

    def start(self) -> None:
        """Called once by `main`; HostError if processes cannot be ended, SystemExit with 1 if
        something cannot be removed."""
        self.refuse_words()
        runtime = self.runtime()
        stuck: list[str] = []
        gone = sweep(runtime, stuck.append, seconds=float("inf"))
        for name in gone:
            print(f"Removed the sandbox {one_line(name)}, whose server is gone.")
        doors.sweep(runtime)
        undecided = self._kept_too_long()
        for name in undecided:
            print(f"Removed the changes of kernel {one_line(name)}: nobody has decided about them.")
        groups, written = remove_left_groups(runtime), _remove_left_disks()
        cards = remove_left_cards()
        is_table_gone = remove_left_table()
        for name in groups:
            print(f"Removed the empty control group {name}.")
        for kind, name in written:
            print(f"Removed the {kind} that the sandbox {one_line(name)} wrote to.")
        for name in cards:
            print(f"Removed what the network card of {one_line(name)} had left.")
        if is_table_gone:
            print("Removed the rules that network cards have together: there are none.")
        if not any((gone, undecided, groups, written, cards, is_table_gone, stuck)):
            print("Nothing to remove.")
        for sentence in stuck:
            print(f"jupyter sandbox: {one_line(sentence)}", file=sys.stderr)
        if stuck:
            raise SystemExit(1)


def _remove_left_disks() -> list[tuple[str, str]]:
    """What it was in which boxes wrote that are gone, and the ids of these."""
    images, folders = remove_left_images(), remove_left_folders()
    return [*(("image", name) for name in images), *(("folder", name) for name in folders)]
