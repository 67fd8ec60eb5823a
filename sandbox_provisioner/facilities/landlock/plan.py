"""facilities/landlock/plan.py - pure: the steps that only the confinement "landlock" has.

What holds the kernel: Landlock's rules for files, TCP and signals, a stricter system call filter
(`seccomp.SHARED_REFUSED`), limits, and an init outside of the rules that ends everybody at the end.

Rules only ever allow, for a directory and all beneath it. So whatever a mount would cover cannot be
covered here: a work directory in which something has to be, is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.facilities.landlock.tell import losses, obstacle
from sandbox_provisioner.host import HostFacts
from sandbox_provisioner.plan import SOCKET_NAMES, Site, Start, Step
from sandbox_provisioner.spec import Limits, Network, SandboxSpec, relative

_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
# Of /proc what tells of the machine, and of the kernel's own process: no command line, no
# environment and no sockets of anybody else.
_PROC = (
    "cpuinfo", "filesystems", "loadavg", "meminfo", "stat", "sys", "uptime", "version",
    "self/auxv", "self/cgroup", "self/cmdline", "self/comm", "self/environ", "self/fd",
    "self/fdinfo", "self/limits", "self/maps", "self/smaps_rollup", "self/stat", "self/statm",
    "self/status",
)  # fmt: skip
_LOADER = "/etc/ld.so.cache"
_IPYTHON_FOLDERS = (
    ".ipython", ".ipython/profile_default", ".ipython/profile_default/startup",
)  # fmt: skip
_REMEDY = 'Use a directory below it, or confinement = "namespaces", which can cover parts of it.'


def private(folder: str, name: str = "") -> str:
    """A directory of the kernel's own below the *folder* of its record."""
    return os.path.join(folder, "private", name).rstrip("/")


def check(start: Start) -> None:
    """HostError or SpecError where a start cannot be as asked."""
    problem = obstacle(start.site.facts)
    if problem:
        raise problem
    _check_network(start.request.spec.network.mode)
    _check_mode(start.request.spec)
    _check_root(start.request.spec)
    _check_disk(start.request.spec.limits)
    _check_workdir(start.site)
    _check_volumes(start.site)


def _check_mode(spec: SandboxSpec) -> None:
    if spec.keeps_layer:
        raise SpecError(
            attempt=f'use layer = "{spec.layer.value}" with confinement = "landlock"',
            answer="without mounts of its own it has no place for that",
            remedy='Set layer to "auto", or confinement to "namespaces".',
        )
    if spec.is_reviewed:
        raise SpecError(
            attempt='lay aside what a kernel writes with confinement = "landlock"',
            answer="without mounts of its own it writes in the directory itself",
            remedy='Set workdir_mode to "direct", or confinement to "namespaces".',
        )


def _check_network(mode: Network) -> None:
    if mode is not Network.NONE:
        raise SpecError(
            attempt=f'give a kernel with confinement = "landlock" the network "{mode}"',
            answer="it shares the host's network namespace, in which nothing but a whole port can "
            "be allowed",
            remedy='Use confinement = "namespaces", or network = "none".',
        )


def _check_root(spec: SandboxSpec) -> None:
    if spec.has_own_root:
        raise SpecError(
            attempt=f"use {spec.rootfs} as the root file system",
            answer='with confinement = "landlock" a kernel has the root of the host',
            remedy='Use confinement = "namespaces", or rootfs = "host".',
        )


def _check_disk(limits: Limits) -> None:
    if limits.disk_bytes is not None or limits.inodes is not None:
        raise SpecError(
            attempt='keep disk_limit or inode_limit with confinement = "landlock"',
            answer="it writes to the host's own file system, which has no limit of one kernel",
            remedy='Use confinement = "namespaces", or leave both out.',
        )


def _check_workdir(site: Site) -> None:
    workdir, found = site.workdir, site.workdir.covered
    if not workdir.source:
        raise SpecError(
            attempt='start a kernel with workdir = "none" and confinement = "landlock"',
            answer="without a root of its own it has no private home to start in",
            remedy='Use confinement = "namespaces", or name an empty directory as workdir.',
        )
    covered = (
        *found.directories, *found.files, *found.links, *found.sockets, *found.frozen,
    )  # fmt: skip
    if covered:
        some = ", ".join(covered[:3]) + (", ..." if len(covered) > 3 else "")
        raise SpecError(
            attempt=f'use {workdir.path} as the work directory with confinement = "landlock"',
            answer=f"what the host would run or trust lies in it ({some}), and Landlock cannot "
            "take away parts of a directory",
            remedy=_REMEDY,
        )
    for path in site.files.readonly:
        if relative(os.path.realpath(path), workdir.source) is not None:
            raise SpecError(
                attempt=f'use {workdir.path} as the work directory with confinement = "landlock"',
                answer=f"the kernel's environment {path} lies in it, and could be changed",
                remedy=_REMEDY,
            )


def _check_volumes(site: Site) -> None:
    for facts in site.volumes:
        if facts.volume.target != facts.source:
            raise SpecError(
                attempt=f"show the volume {facts.volume.source} at {facts.volume.target}",
                answer='confinement = "landlock" has no mounts: a path is what it is outside',
                remedy=f'Write "{facts.source}:{facts.source}".',
            )


def _folder(start: Start) -> str:
    """That of the record."""
    return os.path.dirname(start.site.sockets)


def receive_places(start: Start) -> Iterator[Step]:
    """What was opened for this one start."""
    opened = tuple(f"place:{place.source}" for _, place in start.site.places)
    yield Step("receive", opened, "opened and judged before; no path is looked up again")


def share_namespaces(start: Start) -> Iterator[Step]:
    """The rest happens among the host's processes and files."""
    yield Step("share-namespaces", (), "; ".join(losses(start.site.facts)))


def make_folders(start: Start) -> Iterator[Step]:
    """Directories of the kernel's own, where a root of its own would have them."""
    folder = _folder(start)
    home = private(folder, "home")
    own = tuple(private(folder, name) for name in ("", "home", "tmp", "jupyter"))
    profile = tuple(f"{home}/{name}" for name in _IPYTHON_FOLDERS)
    yield Step("private-folder", own, "in place of /home/jovyan, /tmp and /run/jupyter")
    why = "IPython would copy its own, with the chmod(2) that the filter refuses"
    yield Step("private-folder", profile, why)
    yield _own_file(f"{profile[-1]}/README", "Start-up files of IPython.\n", "")


def _own_file(path: str, text: str, why: str) -> Step:
    return Step("own-file", (path, text), why, shown=(path, "(text)"))


def connection_file(start: Start) -> Iterator[Step]:
    """The file that the kernel reads."""
    if start.request.connection_file:
        name, text = start.request.connection_file
        path = f"{private(_folder(start), 'jupyter')}/{name}"
        yield _own_file(path, text, "its keys are its own")


def seal(start: Start) -> Iterator[Step]:
    """As soon as the kernel listens."""
    if start.request.connection_file:
        site = start.site
        why = "init says so once the kernel listens; it can make sockets there, and no links"
        yield Step("seal-after", (site.sockets, str(site.uid), *SOCKET_NAMES), why)


def keep_paths(start: Start) -> Iterator[Step]:
    """All that `allow` names."""
    rules = (rule for rule in allow(start) if rule.verb == "landlock-allow")
    named = tuple(str(word) for rule in rules for word in rule.words[1:])
    yield Step("keep-paths", named, "a rule lasts as long as Linux knows its file")


def homes(start: Start) -> tuple[str, str]:
    """HOME and TMPDIR of the kernel."""
    folder = _folder(start)
    return private(folder, "home"), private(folder, "tmp")


def end_with_init(_start: Start) -> Iterator[Step]:
    """There is no PID namespace that would end with it."""
    yield Step("end-with-init", (), "nobody else would end it")


def renounce(_start: Start) -> Iterator[Step]:
    """What `rights.become` is in namespaces."""
    yield Step("renounce", (), "no capability, no way to gain one")


def chdir(start: Start) -> Iterator[Step]:
    """Where the notebook lies."""
    workdir = start.site.workdir
    below = relative(start.request.cwd, workdir.path) or ""
    remedy = "Start the notebook in a directory that its user may enter."
    yield Step("chdir-place", (workdir.source, below), remedy=remedy)


def limit_without_groups(start: Start) -> Iterator[Step]:
    """Where a cap was waived since there is no cgroup for it, what setrlimit(2) has instead.

    RLIMIT_AS is not among it: programs reserve addresses by the gigabyte and use few of them.
    """
    limits, missing = start.request.spec.limits, start.site.facts.cgroups.missing
    if limits.pids is not None and "pids" in missing:
        why = f"no cgroup caps processes here: {limits.pids} more than the user has now"
        most = limits.pids + start.site.user_tasks
        yield Step("resource-limits", (f"nproc={most}:{most}",), why)
    if limits.memory_bytes is not None and "memory" in missing:
        why = "no cgroup caps memory here: at least each process has a cap on what it writes to"
        words = (f"data={limits.memory_bytes}:{limits.memory_bytes}",)
        yield Step("resource-limits", words, why)


def allow(start: Start) -> Iterator[Step]:
    """The rules."""
    site, machine, folder = start.site, start.site.facts.machine, _folder(start)
    is_kernel = start.request.connection_file is not None
    why = f"version {machine.landlock}: everything it knows is forbidden but for what follows"
    yield Step("landlock-rules", (str(machine.landlock),), why)
    programs = (*machine.system_directories, *site.files.readonly)
    yield Step("landlock-allow", ("run", *programs), "the system's and the kernel's programs")
    yield Step("landlock-allow", ("read", *machine.system_files), "what programs need of /etc")
    yield Step("landlock-allow", ("use", *(f"/dev/{name}" for name in _DEVICES)))
    yield Step("landlock-allow", ("read", *(f"/proc/{name}" for name in _PROC)))
    names = ("home", "tmp", "jupyter") if is_kernel else ("home", "tmp")
    writable = [site.workdir.source, *(private(folder, name) for name in names)]
    yield Step("landlock-allow", ("change", *writable), "the work directory, and what is private")
    if is_kernel:
        yield Step("landlock-allow", ("bind", site.sockets), "the kernel's own sockets")
    if site.devices.nodes:
        paths = (node.source for node in site.devices.nodes)
        yield Step("landlock-allow", ("use", *paths), "asked for by devices")
    for volume in site.volumes:
        kinds = ("read", "write") if volume.volume.noexec else ("run", "change")
        kind = kinds[0] if volume.volume.readonly else kinds[1]
        yield Step("landlock-allow", (kind, volume.source), "asked for by volumes")


def restrict(_start: Start) -> Iterator[Step]:
    """landlock_restrict_self(2)."""
    yield Step("landlock-restrict", (), "from here on the rules hold, for all that it starts too")


def read_alone(facts: HostFacts, place: str) -> Iterator[Step]:
    """For a program of the system's that reads one file, *place*, whoever made that: what it runs,
    and that file. Where there is no Landlock the system call filter has to do."""
    machine = facts.machine
    if machine.landlock:
        yield Step("landlock-rules", (str(machine.landlock),))
        yield Step("landlock-allow", ("run", *machine.system_directories))
        read = (place, *(path for path in machine.system_files if path == _LOADER))
        yield Step("landlock-allow", ("read", *read))
        yield Step("landlock-allow", ("use", "/dev/null"))
        yield Step("landlock-restrict", (), "it reads a file that anybody may have made")
