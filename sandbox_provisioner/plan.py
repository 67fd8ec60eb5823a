"""plan.py - pure: from wishes and facts to the one list of steps, in its true order.

`compile_plan` decides everything; `inside/` only does. A plan can be printed (`describe`), compared
and replayed. It never crosses the broker's socket: a client that can send steps is root.

The order below is the theory of operation. Two things force most of it: id-mapped mounts can only
be made by somebody who is privileged *outside*, so a root server takes all mounts before it enters
the user namespace; and an ordinary user may take mounts only *inside* one, so it is the other way
round.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from sandbox_provisioner.bounds import MOST_TERMINALS, SYSCTLS, kernels_limits, makers_limits
from sandbox_provisioner.cgroup import Bound
from sandbox_provisioner.errors import COLUMNS, HostError, SpecError, in_lines
from sandbox_provisioner.host import HostFacts, VolumeFacts, WorkdirFacts
from sandbox_provisioner.id_range import ATTEMPT as RANGE_ATTEMPT
from sandbox_provisioner.id_range import IdRange, id_map
from sandbox_provisioner.inside.printable import one_line
from sandbox_provisioner.inside.seccomp import KERNEL, compile_filter, describe
from sandbox_provisioner.kernel_files import KernelFiles
from sandbox_provisioner.places import Place
from sandbox_provisioner.spec import (
    WRITTEN_THROUGH,
    Limits,
    SandboxSpec,
    UserIds,
    format_bytes,
    relative,
    volumes_for,
)
from sandbox_provisioner.variables import kernel_environment

HOME = "/home/jovyan"
SOCKETS = "/run/kernel"
CONNECTIONS = "/run/jupyter"
SOCKET_NAMES = tuple(f"s-{port}" for port in range(1, 6))
KERNEL_ID = 1000
_SKELETON_BYTES = 4 << 20
_STAGING = "/proc"
_TERMINALS = f"newinstance,ptmxmode=0666,mode=0620,max={MOST_TERMINALS}"
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
# Of /proc what programs need, the C library above all; everything else there tells of the host.
_SHOWN_OF_PROC = (
    "cpuinfo", "filesystems", "loadavg", "meminfo", "mounts", "net", "self", "stat", "sys",
    "sysvipc", "thread-self", "uptime", "version", "vmstat",
)  # fmt: skip
_SHOWN_OF_SETTINGS = ("crypto", "fs", "kernel", "net", "user", "vm")
# Below them there are more names than mounts are worth: these count or name what is the host's.
_MASKED = (
    "/proc/sys/fs/binfmt_misc", "/proc/sys/fs/dentry-state", "/proc/sys/fs/file-nr",
    "/proc/sys/fs/inode-nr", "/proc/sys/fs/inode-state", "/proc/sys/kernel/core_pattern",
    "/proc/sys/kernel/pty", "/proc/sys/kernel/random/boot_id",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Step:
    """One step: a verb of `inside/steps.py`, its words, and the reason for it."""

    verb: str
    words: tuple[str | bytes, ...] = ()
    why: str = ""

    def describe(self) -> str:
        """The step for people: long words are cut, the environment's values are left out."""
        if self.verb == "environment":
            shown = [str(word).partition("=")[0] for word in self.words]
        elif self.verb in {"private-file", "own-file"}:
            shown = [*map(str, self.words[:-1]), "(text)"]
        elif self.verb == "system-call-filter":
            policy = describe(str(self.words[1]))
            shown = [f"({len(self.words[0]) // 8} statements: {policy})"]
        else:
            shown = [_short(str(word)) for word in self.words]
        return one_line(" ".join([self.verb, *shown]))


def _short(word: str) -> str:
    word = word.replace("\n", "\\n")
    return f"{word[:57]}..." if len(word) > 60 else word


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps of one start, in order."""

    steps: tuple[Step, ...]

    def describe(self) -> str:
        """For `explain`: a numbered line a step, with its reason below it."""
        lines = []
        for number, step in enumerate(self.steps, 1):
            lines.append(f"{number:3}. {step.describe()}")
            if step.why:
                lines.append(f"       {one_line(step.why)}")
        return "\n".join(lines)

    def encode(self) -> bytes:
        """For `inside.enter.decode`: per step a count and "#", then "LENGTH:BYTES" a word."""
        parts = []
        for step in self.steps:
            words = [step.verb, *step.words]
            parts.append(b"%d#" % len(words))
            for word in words:
                text = word if isinstance(word, bytes) else os.fsencode(word)
                parts.append(b"%d:%s" % (len(text), text))
        return b"".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchRequest:
    """One start: what to run in which box. *cwd* lies in the work directory.

    *connection_file* is the name and the text of the file that a Jupyter kernel reads; it shows in
    /run/jupyter. The kernel binds its sockets in /run/kernel, which init seals once it listens on
    all of them. *environment* is what the caller wishes; `variables.py` tells what becomes of it,
    and *env_keep* what more of the server's own is handed on. *survive_server* is jupyter_client's
    "independent". *pump* makes init pass stdout and stderr on; those that are *logged*, as they are
    the server's own, within a budget and printable. Without it they are the caller's, and with
    *terminal* the one among them controls the command's session. *server_places* are more paths
    that the server would run or import from.
    """

    sandbox_id: str
    spec: SandboxSpec
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    cwd: str
    env_keep: tuple[str, ...] = ()
    connection_file: tuple[str, str] | None = None
    survive_server: bool = False
    pump: bool = True
    logged: tuple[str, ...] = ()
    terminal: bool = False
    extra_files: tuple[str, ...] = ()
    server_places: tuple[str, ...] = ()

    @property
    def stdio(self) -> Step:
        """What becomes of its output."""
        if not self.pump:
            return Step("stdio", ("inherit",))
        why = "what goes to the server's own log has a budget" if self.logged else ""
        return Step("stdio", ("pump", *self.logged), why)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where a request is going to run: all that was found out on the host for it.

    *first_id* is the first of the host's ids that a root server gives to this sandbox; *sockets*
    the host's directory that shows inside as /run/kernel, *exit_file* where init tells the end.
    *id_range* is what an ordinary user's sandbox maps all ids but the user's own to; None: nothing.
    *memory_above* is the smallest cap on memory of the groups that its own is to be a part of.
    *user_tasks* is how many processes and threads the user has, where a cap is to count from there.
    *opened* closes the descriptors of `places`: whoever made the site does, when the start is done.
    """

    facts: HostFacts
    workdir: WorkdirFacts
    files: KernelFiles
    volumes: tuple[VolumeFacts, ...] = ()
    join_files: tuple[str, ...] = ()
    memory_group: tuple[int, str] | None = None
    memory_above: Bound | None = None
    first_id: int = 0
    id_range: IdRange | None = None
    sockets: str = ""
    exit_file: str = ""
    user_tasks: int = 0
    server_environment: Mapping[str, str] = field(default_factory=dict)
    opened: ExitStack = field(default_factory=ExitStack, repr=False, compare=False)

    @property
    def places(self) -> tuple[tuple[str, Place], ...]:
        """What of the host this one kernel is given, and where that shows inside."""
        workdir = ((self.workdir.path, self.workdir.place),) if self.workdir.source else ()
        return (*workdir, *((facts.volume.target, facts.place) for facts in self.volumes))

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Those of `places`, which go to the launcher with the plan."""
        return tuple(place.fd for _, place in self.places)

    @property
    def uid(self) -> int:
        """The kernel's user id inside: never 0, also where a container's root starts it."""
        return KERNEL_ID if self.facts.privileged else self.facts.uid or KERNEL_ID

    @property
    def gid(self) -> int:
        """The kernel's group id inside: never 0, which some platforms give to every user."""
        return KERNEL_ID if self.facts.privileged else self.facts.gid or KERNEL_ID

    @property
    def outside_uid(self) -> int:
        """The kernel's user id as the host sees it."""
        if not self.facts.privileged:
            return self.facts.uid
        return (
            self.first_id + KERNEL_ID if self.workdir.idmappable else self.workdir.place.owner_uid
        )

    @property
    def outside_gid(self) -> int:
        """The kernel's group id as the host sees it."""
        if not self.facts.privileged:
            return self.facts.gid
        return (
            self.first_id + KERNEL_ID if self.workdir.idmappable else self.workdir.place.owner_gid
        )

    @property
    def home(self) -> str:
        """HOME inside: the work directory if it is the server's own home, as users expect there."""
        is_own = os.path.realpath(self.facts.home) == self.workdir.source
        return self.workdir.path if is_own else HOME


def compile_plan(request: LaunchRequest, site: Site) -> Plan:
    """The steps for *request* at *site*. Raises HostError if this host cannot do it as asked."""
    check(site)
    steps = (
        *receive_steps(site),
        Step("exit-file", (site.exit_file,), "where init will write how the kernel ended"),
        Step("join-cgroup", site.join_files, "memory, CPU and processes are charged from here on"),
        *watch_steps(request, site),
        Step("oom-score", ("300",), "if the machine runs out, kernels go before their server"),
        *namespace_and_mount_steps(request, site),
        Step("fork-init", (), "a PID namespace begins with a child; that one is PID 1"),
        Step("new-session", (), "no terminal, process group or keyring of the server"),
        *root_steps(request, site),
        *workdir_steps(site),
        *late_attach_steps(site),
        *socket_steps(request, site),
        Step("pivot", (), "the new root becomes /; of the host's nothing stays reachable"),
        Step("close-root", (), "read-only from here on"),
        Step("hostname", (request.spec.hostname,)),
        Step("loopback-up", (), "debugpy and forked output use 127.0.0.1, and hang without it"),
        *((Step("survive-server", (), "asked for by the caller"),) * request.survive_server),
        request.stdio,
        Step("fork-kernel", (), "PID 1 stays behind as init; the rest is done by the kernel"),
        *kernel_steps(request, site),
    )
    return Plan(tuple(step for step in steps if step.verb != "join-cgroup" or step.words))


def receive_steps(site: Site) -> Iterator[Step]:
    """Name the descriptors that come with the plan."""
    if site.places:
        names = tuple(f"place:{target}" for target, _ in site.places)
        yield Step("receive", names, "opened and judged before; no path is looked up again")


def check(site: Site) -> None:
    """Raise what no plan can do here."""
    if site.facts.obstacle:
        raise site.facts.obstacle
    _check_ids(site)
    _check_volumes(site)


def watch_steps(request: LaunchRequest, site: Site) -> Iterator[Step]:
    """Whose kill was whose, and the interrupt before it. A command that is no Jupyter kernel has no
    cell to interrupt: it would end."""
    limits = request.spec.limits
    cap = limits.memory_bytes
    if cap is None or site.memory_group is None:
        return
    version, group = site.memory_group
    yield Step("open-memory", (str(version), group), "while the host's groups can be reached")
    share = (limits.interrupt_share or 0) if request.connection_file else 0
    killed = _child_killed(cap) if request.connection_file else ""
    sentence = in_lines(_interrupted(cap, site.memory_above), COLUMNS - len("1023 MiB"))
    if site.memory_above:
        cap = min(cap, site.memory_above.limit_bytes)
    words = (str(version), str(round(cap * share)), str(cap), str(site.uid), str(site.gid))
    why = "init learns which process Linux ends at the cap"
    if share:
        why = f"at {share:g} of the cap init interrupts the kernel, before Linux would end it"
    yield Step("watch-memory", (*words, sentence, in_lines(killed)), why)


def _interrupted(cap: int, above: Bound | None) -> str:
    """What the person at the notebook reads then, with "{}" for what the kernel uses. It is said
    before it is known whether the interrupt comes in time."""
    limit, remedy = f"its memory limit of {format_bytes(cap)}", "raise mem_limit"
    if above and above.limit_bytes < cap:
        limit = f"the {format_bytes(above.limit_bytes)} that it shares with other programs"
        remedy = "ask who runs this machine for more"
    return (
        f"The kernel is interrupted: it uses {{}} of {limit}. If this comes in time, your "
        f"variables stay; delete what you do not need, or {remedy}. If not, the kernel is killed, "
        "and says so."
    )


def _child_killed(cap: int) -> str:
    """The same when a process that the kernel had started is no more."""
    return (
        "A child process of this kernel was killed: together they reached the memory limit of "
        f"{format_bytes(cap)}. What waits for it may wait for ever: if so, interrupt the cell. "
        "Start fewer processes, give them less, or raise mem_limit."
    )


def _check_ids(site: Site) -> None:
    workdir = site.workdir
    if site.facts.privileged and not workdir.idmappable and workdir.place.owner_uid == 0:
        raise HostError(
            attempt=f"show {workdir.path} to a kernel that is not root",
            answer=f"it belongs to root, and Linux {'.'.join(map(str, site.facts.kernel))} cannot "
            f"map the ids of a mount of {workdir.place.filesystem}",
            remedy=f"Give it to an ordinary user (chown), or work on a file system such as ext4, "
            f"xfs or btrfs, so that the files in {workdir.path} can keep their owner.",
        )


def _check_volumes(site: Site) -> None:
    for facts in site.volumes:
        if relative(facts.volume.target, site.workdir.path) is not None:
            raise SpecError(
                attempt=f"show the volume {facts.volume.source} at {facts.volume.target}",
                answer="the target lies in the work directory, where it would have to be made",
                remedy="Choose a target such as /data, and make a link to it.",
            )
        _check_place_for(facts, site.facts.system_files)


def _check_place_for(facts: VolumeFacts, shown: Iterable[str]) -> None:
    """A mount point can be made in the box's own /etc, not in what shows there of the host's."""
    target = facts.volume.target
    for path in shown:
        if relative(target, path) and not os.path.exists(target):
            raise SpecError(
                attempt=f"show the volume {facts.volume.source} at {target}",
                answer=f"{path} is the system's own, where it cannot be made",
                remedy=f"Show a directory in place of all of {path}, or make {target} outside.",
            )


# -- namespaces, and the mounts that are taken from the host


def namespace_and_mount_steps(
    request: LaunchRequest, site: Site, *, more_ids: str = ""
) -> Iterator[Step]:
    """Who may do what first: see this file's docstring. *more_ids* are lines of uid_map that a root
    server adds."""
    yield Step("resource-limits", makers_limits(), "only root can raise what the server has")
    new = Step(
        "unshare",
        ("mount", "pid", "network", "ipc", "uts", "cgroup"),
        "everything below is private; the network is a loopback and nothing else",
    )
    takes = (*program_take_steps(site), *given_take_steps(request, site))
    if not site.facts.privileged:
        yield _own_user_namespace(request, site)
        yield new
        yield from find_again_steps(site)
        yield from takes
        return
    why = "uid 0 inside is nobody outside: the server's root maps to an id range of its own"
    maps = (
        id_map(KERNEL_ID, site.outside_uid, site.first_id) + more_ids,
        id_map(KERNEL_ID, site.outside_gid, site.first_id) + more_ids,
    )
    # Its owner is what the machine's own limits count it for (namespaces(7)).
    yield Step("make-user-namespace", ("sandbox", *maps, str(site.first_id)), why)
    yield from owner_map_steps(site)
    yield from takes
    yield Step("enter-user-namespace", ("sandbox",), "from here on nobody on the host")
    yield new


def find_again_steps(site: Site) -> Iterator[Step]:
    """For who takes mounts in a mount namespace of its own."""
    for target, place in site.places:
        why = "of the mounts that we now have a copy of; it must be the very same file"
        yield Step("find-again", (target, place.source), why)


def owner_map_steps(site: Site) -> Iterator[Step]:
    """A user namespace for each mount whose ids a root server maps."""
    why = "for an id-mapped mount: who owns it outside appears as the kernel's user"
    owned: list[tuple[str, WorkdirFacts | VolumeFacts]]
    owned = [("workdir", site.workdir)] if site.workdir.source and site.workdir.idmappable else []
    mapped = [(f"volume-{n}", facts) for n, facts in enumerate(site.volumes) if facts.idmappable]
    for name, facts in (*owned, *mapped):
        owner = (
            f"{facts.place.owner_uid} {site.outside_uid} 1",
            f"{facts.place.owner_gid} {site.outside_gid} 1",
        )
        yield Step("make-user-namespace", (name, *owner), why)


def _own_user_namespace(request: LaunchRequest, site: Site) -> Step:
    """An ordinary user's: the kernel's id outside is theirs, whatever its number inside."""
    facts, ids = site.facts, site.id_range
    if request.spec.user_ids is UserIds.SINGLE:
        why = "an ordinary user has rights over mounts only in a user namespace"
        maps = f"{site.uid} {facts.uid} 1", f"{site.gid} {facts.gid} 1"
        return Step("unshare-user-namespace", maps, why)
    if ids is None:
        raise HostError(
            attempt=RANGE_ATTEMPT,
            answer="nobody has looked for one",
            remedy='Set user_ids to "single".',
        )
    why = "the user's own id, and for every other one of /etc/subuid's; mapped by set-uid helpers"
    maps = ids.maps(facts.uid, facts.gid, site.uid, site.gid)
    return Step("map-user-namespace", (ids.newuidmap, ids.newgidmap, *maps), why)


def program_take_steps(site: Site) -> Iterator[Step]:
    """What every kernel of this kernelspec sees, read-only."""
    program = ("readonly", "nosuid", "nodev")
    for path in site.facts.system_directories:
        yield Step("take", (path, path, *program), "the system's programs, read-only")
    for path in site.facts.system_files:
        yield Step("take", (path, path, *program))
    for name in _DEVICES:
        yield Step("take", (f"/dev/{name}", f"/dev/{name}", "nosuid", "noexec"))
    why = "the kernel's environment"
    for path in _environment_paths(site):
        words = (path, site.files.real.get(path, path), *program, "no-links")
        yield Step("take", words, why)


def given_take_steps(request: LaunchRequest, site: Site) -> Iterator[Step]:
    """What this one kernel is given of the host: work directory, volumes, sockets."""
    mapped = _mapping("workdir", site.workdir, site)
    if site.workdir.source:
        yield Step(
            "take-place",
            (site.workdir.path, *mapped, "nosuid", "nodev"),
            "the work directory, writable; its files keep their owner",
        )
    for number, facts in enumerate(site.volumes):
        how = ("readonly",) if facts.volume.readonly else ()
        mapped = _mapping(f"volume-{number}", facts, site)
        words = (facts.volume.target, *mapped, *how, "nosuid", "nodev")
        yield Step("take-place", words, "asked for by volumes")
    if request.connection_file:
        attributes = ("nosuid", "nodev", "noexec")
        yield Step("take", (SOCKETS, site.sockets, *attributes), "the kernel's own sockets")


def _mapping(name: str, facts: WorkdirFacts | VolumeFacts, site: Site) -> tuple[str, ...]:
    """How the ids of a place's mounts are mapped, by the user namespace *name*."""
    if not site.facts.privileged or not facts.idmappable:
        return ()
    return (f"idmap-top={name}",) if facts.unmapped else (f"idmap={name}",)


def _environment_paths(site: Site) -> tuple[str, ...]:
    """What of the environment has to be taken apart from the work directory.

    What lies in the work directory shows there; but where a cover hides it, it is needed again.
    """
    return tuple(path for path in site.files.readonly if _visible_at(path, site) != path)


def _visible_at(path: str, site: Site) -> str:
    if not site.workdir.source:
        return ""
    inside = relative(os.path.realpath(path), site.workdir.source)
    if inside is None or path != f"{site.workdir.path}/{inside}".rstrip("/"):
        return ""
    covered = site.workdir.covered.directories
    hidden = any(relative(inside, place) is not None for place in covered)
    return "" if hidden else path


# -- the new root


def root_steps(request: LaunchRequest, site: Site, *, masked: bool = True) -> Iterator[Step]:
    """Build the root up to the places of its own; *masked*: hide what is dangerous of /proc."""
    limits = request.spec.limits
    yield Step("new-root", (_STAGING, str(_SKELETON_BYTES)), "an empty tmpfs; only what follows")
    for link, text in site.facts.root_links.items():
        yield Step("symlink", (link, text))
    for path in sorted(site.facts.system_directories):
        yield Step("attach", (path,))
    for path, text in _etc_files(request, site).items():
        yield Step("file", (path, text))
    for path in site.facts.system_files:
        yield Step("attach", (path,))
    for name in _DEVICES:
        yield Step("attach", (f"/dev/{name}",))
    for link, text in (
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
        ("/dev/ptmx", "pts/ptmx"),
    ):
        yield Step("symlink", (link, text))
    yield Step(
        "mount",
        ("devpts", "/dev/pts", _TERMINALS, "nosuid", "noexec"),
        f"terminals of its own, {MOST_TERMINALS} at the most",
    )
    yield Step(
        "mount",
        ("tmpfs", "/dev/shm", f"mode=1777,{_room(limits.shm_bytes)}", "nosuid", "nodev"),
        f"shared memory, {format_bytes(limits.shm_bytes)} at the most",
    )
    yield Step("mount", ("proc", "/proc", "", "nosuid", "nodev", "noexec"), "only our processes")
    if masked:
        why = "what the machine has for everybody: a small share of it"
        yield Step("own-limits", SYSCTLS, why)
        why = "settings of the Linux kernel may be read, not changed"
        yield Step("freeze-paths", ("/proc/sys",), why)
        why = "what programs need; all else there tells of the host, or acts on it"
        yield Step("show-only", ("/proc", *_SHOWN_OF_PROC), why)
        yield Step("show-only", ("/proc/sys", *_SHOWN_OF_SETTINGS))
        yield Step("mask", _MASKED, "the same, where a few are to be hidden among many")
    yield Step(
        "scratch",
        (
            *(str(site.uid), str(site.gid), _room(limits.tmp_bytes)),
            *("1777:/tmp", f"0755:{HOME}", "0755:/run", "1777:/var/tmp"),
        ),
        f"every other writable place, {format_bytes(limits.tmp_bytes)} in all",
    )


def _room(size_bytes: int) -> str:
    """The options of a tmpfs(5): an empty file takes no page of its size, but a page's worth of
    the Linux kernel's memory."""
    return f"size={size_bytes},nr_inodes={size_bytes // 4096 + 64}"


def _etc_files(request: LaunchRequest, site: Site) -> dict[str, str]:
    uid, gid, host = site.uid, site.gid, request.spec.hostname
    return {
        "/etc/passwd": "root:x:0:0:root:/root:/usr/sbin/nologin\n"
        f"jovyan:x:{uid}:{gid}:Notebook user:{site.home}:/bin/bash\n"
        "nobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n",
        "/etc/group": f"root:x:0:\njovyan:x:{gid}:\ntty:x:5:\nnogroup:x:65534:\n",
        "/etc/hosts": f"127.0.0.1 localhost {host}\n::1 localhost ip6-localhost\n",
        "/etc/hostname": f"{host}\n",
        "/etc/resolv.conf": "# This sandbox has no network.\n",
        "/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    }


# -- the work directory and what is kept out of it


def workdir_steps(site: Site) -> Iterator[Step]:
    """Attach the work directory, and cover what of it the kernel must not have."""
    path = site.workdir.path
    if not site.workdir.source:
        return
    for around in _around_workdir(site):
        yield Step("attach", (around,), "before the work directory, which lies in it")
    yield Step("attach", (path,), "at the same path as outside")
    yield from unmapped_steps(path, site.workdir)
    covered = site.workdir.covered
    inside = _protected_environment(site)
    if not covered.count and not inside:
        return
    why = "what of it the host would run or trust, or must be kept from the kernel"
    yield Step("covers-of", (path, str(site.uid), str(site.gid), WRITTEN_THROUGH), why)
    if covered.links:
        homes = sorted({os.path.dirname(link) for link in covered.links})
        why = "where files go that a program outside writes meanwhile"
        yield Step("make-folders", tuple(os.path.join(h, WRITTEN_THROUGH) for h in homes), why)
        why = "not there, and to programs outside not there meanwhile: links to nothing"
        yield Step("cover", ("link", *covered.links), why)
    if covered.sockets:
        why = "the same for names that would be seen: no file browser shows a socket"
        yield Step("cover", ("socket", *covered.sockets), why)
    if covered.directories:
        why = "private and empty: secrets, and what the host would run or trust later"
        yield Step("cover", ("directory", *covered.directories), why)
    if covered.files:
        yield Step("cover", ("file", *covered.files), "the same for files")
    if covered.placed:
        words = tuple(word for pair in covered.placed for word in pair)
        yield Step("place", words, "git would believe what a kernel writes there")
    if covered.frozen or inside:
        why = "the host runs these too: they may be read, not changed"
        yield Step("protect", (*covered.frozen, *inside), why)


def _protected_environment(site: Site) -> tuple[str, ...]:
    """What of the kernel's environment shows in the work directory, relative to it."""
    workdir = site.workdir
    covered = (*workdir.covered.directories, *workdir.covered.frozen)
    kept = (relative(path, workdir.source) for path in site.files.environment)
    return tuple(path for path in kept if path and not _within_any(path, covered))


def late_attach_steps(site: Site) -> Iterator[Step]:
    """What may lie in the work directory: the environment; and volumes."""
    around = {*_around_workdir(site)}
    targets = {*_environment_paths(site), *(facts.volume.target for facts in site.volumes)}
    for target in sorted(targets - around):
        yield Step("attach", (target,))
    for facts in site.volumes:
        yield from unmapped_steps(facts.volume.target, facts)


def unmapped_steps(target: str, facts: WorkdirFacts | VolumeFacts) -> Iterator[Step]:
    """Of mounts below what is attached at *target*: new files there would be nobody's."""
    below = (relative(mount.path, facts.place.source) for mount in facts.unmapped)
    paths = tuple(os.path.join(target, path) for path in below if path)
    if paths:
        yield Step("freeze-paths", paths, "mounts whose ids cannot be mapped may only be read")


def _around_workdir(site: Site) -> tuple[str, ...]:
    """What of the environment the work directory lies in: a project that is installed from there.
    Attached after it, it would hide it."""
    if not site.workdir.source:
        return ()
    paths = sorted(_environment_paths(site))
    return tuple(path for path in paths if relative(site.workdir.path, path) is not None)


def _within_any(path: str, folders: Iterable[str]) -> bool:
    return any(relative(path, folder) is not None for folder in folders)


def connection_step(connection_file: tuple[str, str], site: Site) -> Step:
    """The file that the kernel reads."""
    name, text = connection_file
    words = (f"{CONNECTIONS}/{name}", str(site.uid), str(site.gid), text)
    return Step("private-file", words, "its keys are its own")


def socket_steps(request: LaunchRequest, site: Site) -> Iterator[Step]:
    """The directory of sockets, and the connection file."""
    if request.connection_file:
        yield Step("attach", (SOCKETS,))
        yield connection_step(request.connection_file, site)
        why = "then nothing can swap a socket for a link to somebody else's"
        yield Step("seal-after", (SOCKETS, str(site.uid), *SOCKET_NAMES), why)


# -- the last steps, in the process that becomes the kernel


def kernel_steps(
    request: LaunchRequest, site: Site, *, run: str = "execute", profile: str = KERNEL
) -> Iterator[Step]:
    """Give up every right; the last step, *run*, is the kernel's program."""
    if request.terminal:
        yield Step("terminal", (), "a shell inside has job control, and Ctrl-C goes to its jobs")
    if profile == KERNEL:
        why = "all that there are, so that none is the server's by chance"
        yield Step("resource-limits", kernels_limits(_processes(request, site)), why)
        yield Step("umask", (f"{site.facts.umask:04o}",), "the server's: who may read new files")
    yield Step(
        "become",
        (str(site.uid), str(site.gid)),
        "no capability, no way to gain one, an ordinary user",
    )
    yield environment_step(request, site)
    yield Step("chdir", (request.cwd,))
    program = compile_filter(site.facts.machine, profile)
    why = "an allow-list of what the kernel may ask Linux"
    yield Step("system-call-filter", (program, profile), why)
    yield Step(run, (site.files.program, *request.argv[1:]))


def _processes(request: LaunchRequest, site: Site) -> int | None:
    """How many the kernel may have where no cgroup caps them; getrlimit(2) counts those of its user
    in its user namespace, before Linux 5.14 those of the whole machine. None where one does."""
    most = request.spec.limits.pids
    if most is None or "pids" not in site.facts.cgroups.missing:
        return None
    return most + site.user_tasks


def environment_step(request: LaunchRequest, site: Site) -> Step:
    """The kernel's whole environment as a step."""
    variables = variables_for(request, site)
    pairs = tuple(f"{name}={value}" for name, value in sorted(variables.items()))
    why = "this, and nothing of the server's; programs are told of the caps and the network by it"
    if hidden := site.files.off_path:
        why += f"; on its PATH and not in the box: {volumes_for(hidden)} would show it"
    return Step("environment", pairs, why)


def enforced(limits: Limits, facts: HostFacts) -> Limits:
    """*limits* without a cap on memory that is only a default, where it cannot be had."""
    given_up = "memory" in limits.by_default and "memory" in facts.cgroups.missing
    return replace(limits, memory_bytes=None) if given_up else limits


def variables_for(request: LaunchRequest, site: Site) -> dict[str, str]:
    """The kernel's whole environment."""
    return kernel_environment(
        request.environment,
        site.server_environment,
        kept=request.env_keep,
        limits=enforced(request.spec.limits, site.facts),
        network=request.spec.network,
        home=site.home,
        hostname=request.spec.hostname,
        found=site.files.variables,
    )
