"""golden.py - pure, in the test process: every plan that there is, as text, for one fixed machine.

``python -m tests.golden`` writes them anew to ``tests/unit/golden``, a file for each kind of start
and each kind of user; ``tests/unit/test_golden.py`` compares. Who moves code sees there that no
word of any plan has changed, and who changes a plan shows the reader of the commit where.

A file has each plan twice: as `explain` prints it, and as the launcher reads it, a step a line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any
from unittest import mock

from sandbox_provisioner import orders
from sandbox_provisioner.caller import Caller
from sandbox_provisioner.errors import SandboxError
from sandbox_provisioner.facilities.caps.cgroup import Bound, CgroupFacts
from sandbox_provisioner.facilities.devices.facts import Devices, Node
from sandbox_provisioner.facilities.environment.facts.kernel_files import KernelFiles, OwnSite
from sandbox_provisioner.facilities.ids.facts import FIRST_ID, IDS, IdRange
from sandbox_provisioner.facilities.network.facts.packages import Packages
from sandbox_provisioner.facilities.network.facts.resolver import ResolverPlace
from sandbox_provisioner.facilities.root.facts import RootFacts
from sandbox_provisioner.facilities.root.facts.kinds import KINDS
from sandbox_provisioner.facilities.storage.facts import Storage, WorkdirQuota
from sandbox_provisioner.facilities.storage.wish import DiskBackend
from sandbox_provisioner.facilities.workdir.facts.covers import Covered
from sandbox_provisioner.host import HostFacts, Machine, VolumeFacts, WorkdirFacts
from sandbox_provisioner.mounts import Mount
from sandbox_provisioner.places import Place
from sandbox_provisioner.plan import HOME, LaunchRequest, NurseryPids, Plan, Site, Step
from sandbox_provisioner.spec import (
    Confinement,
    KernelUser,
    Layer,
    Limits,
    Network,
    NetworkWish,
    SandboxSpec,
    UserIds,
    Volume,
    WorkdirMode,
)
from sandbox_provisioner.warm.why_cold import why_no_nursery
from tests.hosts import host_with

FOLDER = Path(__file__).parent / "unit" / "golden"

WORKDIR = "/srv/ann/work"
RECORD = "/run/user/1000/sandbox-provisioner/abc"
EXT4, FUSE = Mount(30, 1, "/srv", "ext4"), Mount(31, 30, f"{WORKDIR}/films", "fuse.sshfs")
MEMORY_BYTES = 2 << 30
BOUND = Bound(group="/user.slice", limit_bytes=1 << 30)
# What a server sets and what its kernels get are two things.
SERVER = {"LANG": "C.UTF-8", "PATH": "/opt/env/bin:/usr/bin", "JUPYTERHUB_API_TOKEN": "secret"}
SYSCONF = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 4 << 18}

RESOLVER = (
    ResolverPlace("/run/systemd/resolve", "/run/systemd/resolve"),
    ResolverPlace("/etc/hosts", "/etc/hosts"),
    ResolverPlace("/etc/resolv.conf", "/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"),
)
COVERED = Covered(
    directories=(".ssh", "project/.git/hooks"),
    files=(".netrc",),
    links=("project/.envrc",),
    sockets=("jupyter_config.py",),
    placed=(("project/.git/commondir", "./\n"),),
    frozen=("project/.git/config",),
    repositories=("project",),
)
FILES = KernelFiles(
    program="/opt/env/bin/python",
    readonly=("/opt/env", "/opt/python3.12", f"{WORKDIR}/project/.git/hooks/tool"),
    real={"/opt/python3.12": "/opt/python3.12.7"},
    environment=(f"{WORKDIR}/project/venv",),
    variables={"PYTHONUSERBASE": "/home/ann/.local"},
    off_path=("/home/ann/bin",),
)
# What the user has installed, and what the machine's installers are configured to use.
OWN_SITE = OwnSite("python3.12", "/home/ann/.local")
SHOWN = OWN_SITE.outside
TOLD = Packages(
    rules=("index.example.org:443 from packages",),
    variables={"PIP_INDEX_URL": "https://index.example.org/simple"},
)
ASKED = (IPv4Address("10.0.0.1"), IPv4Address("10.0.0.2"))

ROOT = HostFacts(
    machine=Machine(
        kernel=(6, 12),
        architecture="x86_64",
        root_links={"/bin": "usr/bin", "/lib": "usr/lib"},
        system_directories=("/usr", "/etc/alternatives"),
        system_files=("/etc/ld.so.cache", "/etc/localtime"),
        landlock=6,
    ),
    caller=Caller(uid=0, gid=0, home="/root", cwd="/", umask=0o022, environment={}),
    privileged=True,
    obstacle=None,
    cgroups=CgroupFacts(version=1, bases={}, missing={}),
    homes=frozenset({"/root", "/home/ann"}),
)
USER = host_with(
    ROOT,
    uid=1000,
    gid=1001,
    home="/home/ann",
    privileged=False,
    cgroups=CgroupFacts(version=2, bases={}, missing={"pids": "no controller of that name"}),
    umask=0o077,
)

REQUEST = LaunchRequest(
    sandbox_id="abc",
    spec=SandboxSpec(
        workdir=WORKDIR,
        limits=Limits(
            memory_bytes=MEMORY_BYTES,
            cpu_cores=1.5,
            pids=4096,
            interrupt_share=0.9,
            shm_bytes=1 << 20,
        ),
        volumes=(
            Volume(source="/data/books", target="/data/books"),
            Volume(source="/data/results", target="/data/out", readonly=False),
        ),
        devices=("example.org/fake=0",),
    ),
    argv=("python", "-m", "ipykernel_launcher", "-f", "/run/jupyter/kernel-1.json"),
    environment={**SERVER, "JPY_SESSION_NAME": f"{WORKDIR}/a.ipynb", "COURSE": "physics"},
    cwd=f"{WORKDIR}/project",
    connection_file=("kernel-1.json", '{"key": "0123", "transport": "ipc"}'),
    logged=("stdout", "stderr"),
)


def place_of(path: str, *below: Mount) -> Place:
    """A directory of Ann's."""
    return Place(
        path=path, source=path, fd=-1, device=1, inode=2, owner_uid=1000, owner_gid=1001,
        mount=EXT4, below=below,
    )  # fmt: skip


def site_of(facts: HostFacts) -> Site:
    """What is found for `REQUEST` by the user of *facts*."""
    version, files = (1, ("/tasks", "/tasks")) if facts.privileged else (2, ("/cgroup.procs",))
    group = "/sys/fs/cgroup/memory/sandbox-abc" if version == 1 else "/sys/fs/cgroup/sandbox-abc"
    return Site(
        facts=facts,
        workdir=WorkdirFacts(
            place=place_of(WORKDIR, FUSE), idmappable=True, unmapped=(FUSE,), covered=COVERED
        ),
        files=FILES,
        volumes=tuple(
            VolumeFacts(volume=volume, place=place_of(volume.source), idmappable=True)
            for volume in REQUEST.spec.volumes
        ),
        devices=Devices(nodes=(Node(path="/dev/fake0", source="/dev/real0", major=195, minor=0),)),
        figure_groups={
            "memory": (version, group),
            "cpu": (version, group.replace("memory", "cpuacct")),
        },
        device_group=(version, group.replace("memory", "devices")),
        join_files=tuple(group + name for name in files),
        memory_group=(version, group),
        memory_above=None if facts.privileged else BOUND,
        first_id=FIRST_ID + 3 * IDS,
        sockets=f"{RECORD}/sockets",
        exit_file=f"{RECORD}/exit",
        user_tasks=40,
        server_environment=SERVER,
    )


def with_range(request: LaunchRequest, site: Site) -> tuple[LaunchRequest, Site]:
    """The same by a user who has a range of ids; and it is to outlive its server."""
    ids = IdRange(
        first_uid=100000,
        first_gid=200000,
        newuidmap="/usr/bin/newuidmap",
        newgidmap="/usr/bin/newgidmap",
    )
    spec = replace(request.spec, user_ids=UserIds.RANGE)
    return replace(request, spec=spec, survive_server=True), replace(site, id_range=ids)


ASKERS = {
    "root": (REQUEST, site_of(ROOT)),
    "user": (REQUEST, site_of(USER)),
    "range": with_range(REQUEST, site_of(USER)),
}


# -- the kinds of starts: each gives its plans, by what they are


Plans = Iterator[tuple[str, Plan]]


def cold(request: LaunchRequest, site: Site) -> Plans:
    """A kernel in namespaces of its own."""
    yield "", orders.compile_for(request, site)


def command(request: LaunchRequest, site: Site) -> Plans:
    """A command in a terminal, as ``jupyter sandbox run`` starts it."""
    yield "", orders.compile_for(as_command(request), site)


def as_command(request: LaunchRequest) -> LaunchRequest:
    """*request* for a shell."""
    return replace(
        request, argv=("bash",), connection_file=None, pump=False, logged=(), terminal=True
    )


def landlock(request: LaunchRequest, site: Site) -> Plans:
    """A kernel where there are no namespaces."""
    yield "", orders.compile_for(*under_landlock(request, site))


def landlock_command(request: LaunchRequest, site: Site) -> Plans:
    """A command there."""
    request, site = under_landlock(request, site)
    yield "", orders.compile_for(as_command(request), site)


def under_landlock(request: LaunchRequest, site: Site) -> tuple[LaunchRequest, Site]:
    """The same where nothing has to be covered, no group caps memory, and volumes show where they
    are."""
    volumes = tuple(replace(one, target=one.source) for one in request.spec.volumes)
    spec = replace(request.spec, confinement=Confinement.LANDLOCK, volumes=volumes)
    workdir = WorkdirFacts(place=place_of(WORKDIR), idmappable=True)
    files = KernelFiles(program=FILES.program, readonly=("/opt/env",))
    missing = {**site.facts.cgroups.missing, "memory": "no controller of that name"}
    facts = replace(site.facts, cgroups=replace(site.facts.cgroups, missing=missing))
    shown = tuple(replace(one, volume=new) for one, new in zip(site.volumes, volumes, strict=True))
    site = replace(site, facts=facts, workdir=workdir, files=files)
    site = replace(site, volumes=shown, memory_group=None)
    return replace(request, spec=spec), site


def nursery(request: LaunchRequest, site: Site) -> Plans:
    """The process that kernels are forked from."""
    own = replace(
        request,
        spec=replace(request.spec, volumes=()),
        argv=("python", "-c", "boot"),
        cwd=HOME,
        connection_file=None,
        logged=(),
    )
    yield "", orders.compile_nursery(own, of_nobody(site))


def child(request: LaunchRequest, site: Site) -> Plans:
    """A kernel that a nursery forks: one process opens what the other needs."""
    family = NurseryPids(init=501, child=502)
    yield "by a launcher", orders.compile_opening(request, site, family)
    yield "by the nursery's child", orders.compile_fork(request, site)


def spare(request: LaunchRequest, site: Site) -> Plans:
    """A kernel that waits for a work directory."""
    spec = replace(request.spec, volumes=())
    own = replace(request, spec=spec, cwd=HOME, survive_server=True)
    site = replace(of_nobody(site), idle_seconds=600.0, held={"claims": 9, "hold": 10})
    yield "", orders.compile_spare(own, site)


def claim(request: LaunchRequest, site: Site) -> Plans:
    """What is left to do when a spare gets one."""
    outside, inside = orders.compile_claim(request, site)
    yield "by a launcher", outside
    yield "by the spare's PID 1", inside


def of_nobody(site: Site) -> Site:
    """Where there is no work directory yet."""
    return replace(site, workdir=WorkdirFacts.nowhere(), volumes=())


def served_image(_request: LaunchRequest, site: Site) -> Plans:
    """What reads an image file for an ordinary user."""
    yield "", orders.compile_served_image(site.facts, "/usr/bin/squashfuse")


def with_root(start: Callable[[LaunchRequest, Site], Plans], kind: str = "") -> Any:
    """*start* in another root than the host's: a directory, or a file of *kind*."""

    def in_root(request: LaunchRequest, site: Site) -> Plans:
        root = RootFacts(
            wish="/srv/roots/course",
            place=place_of("/srv/roots/course"),
            kind=KINDS[kind] if kind else None,
            users="root:x:0:0:root:/root:/bin/sh\nmail:x:8:8:mail:/var/mail:/bin/sh\n",
            groups="root:x:0:\nmail:x:8:\n",
        )
        layer = Layer.AUTO if kind else Layer.NONE
        spec = replace(request.spec, rootfs=root.wish, layer=layer)
        files = KernelFiles(
            program="/usr/bin/python3", readonly=(), own_site=OwnSite("python3.13", "/")
        )
        return start(replace(request, spec=spec), replace(site, root=root, files=files))

    return in_root


def as_root(start: Callable[[LaunchRequest, Site], Plans]) -> Any:
    """*start* of a kernel that is root in its box."""

    def of_root(request: LaunchRequest, site: Site) -> Plans:
        spec = replace(request.spec, kernel_user=KernelUser.ROOT)
        site = replace(site, kernel_user=KernelUser.ROOT)
        site = replace(site, root=replace(site.root, has_apt=True))
        return start(replace(request, spec=spec), site)

    return of_root


def with_network(mode: Network, start: Callable[[LaunchRequest, Site], Plans]) -> Any:
    """*start* for a box that has the network *mode*, on a machine with IPv6."""

    def of_network(request: LaunchRequest, site: Site) -> Plans:
        spec = replace(request.spec, network=NetworkWish(mode=mode))
        facts = host_with(site.facts, ipv6=True)
        files = replace(site.files, own_site=OWN_SITE, readonly=(*site.files.readonly, SHOWN))
        site = replace(site, files=files, network_allow=TOLD.rules, packages=TOLD)
        held = {"network": -1} if start in {cold, child, claim} else {}
        site = replace(site, facts=facts, resolver=RESOLVER, held=held, name_servers=ASKED)
        return start(replace(request, spec=spec), site)

    return of_network


def reviewed(start: Callable[[LaunchRequest, Site], Plans]) -> Any:
    """*start* where what is written in the work directory is laid aside; nothing is mounted in
    it."""

    def of_review(request: LaunchRequest, site: Site) -> Plans:
        spec = replace(request.spec, workdir_mode=WorkdirMode.REVIEW)
        workdir = replace(site.workdir, place=place_of(WORKDIR), unmapped=())
        aside = place_of("/var/lib/sandbox-provisioner/review/abc/box")
        site = replace(site, workdir=workdir, review=aside, held={"review-lock": -1})
        return start(replace(request, spec=spec), site)

    return of_review


def kept(start: Callable[[LaunchRequest, Site], Plans]) -> Any:
    """*start* where what is installed is kept."""

    def with_layer(request: LaunchRequest, site: Site) -> Plans:
        spec = replace(request.spec, layer=Layer.USER)
        folder = place_of("/var/lib/sandbox-provisioner/user/0/host/box")
        held = {**site.held, "layer-lock": -1}
        return start(replace(request, spec=spec), replace(site, layer=folder, held=held))

    return with_layer


def by_ports(start: Callable[[LaunchRequest, Site], Plans]) -> Any:
    """*start* where Linux cannot hand all connections to one listener."""

    def of_ports(request: LaunchRequest, site: Site) -> Plans:
        allow = "data.example.org", "10.1.0.0/16:5432,5433"
        site = replace(site, catch_obstacle="there is no nf_tables", network_allow=allow)
        return start(request, site)

    return of_ports


def with_disk(start: Callable[[LaunchRequest, Site], Plans]) -> Any:
    """*start* with a limit of the disk."""

    def of_disk(request: LaunchRequest, site: Site) -> Plans:
        limits = replace(request.spec.limits, disk_bytes=10 << 30, inodes=100_000)
        backend = DiskBackend.IMAGE if site.facts.privileged else DiskBackend.TMPFS
        storage = Storage(backend=backend, size_bytes=10 << 30, inodes=99_840)
        request = replace(request, spec=replace(request.spec, limits=limits))
        return start(request, replace(site, storage=storage))

    return of_disk


def with_folder(start: Callable[[LaunchRequest, Site], Plans]) -> Any:
    """*start* with a limit of the disk that a project quota holds."""

    def of_folder(request: LaunchRequest, site: Site) -> Plans:
        if not site.facts.privileged:
            return with_disk(start)(request, site)
        limits = replace(request.spec.limits, disk_bytes=10 << 30, inodes=100_000)
        storage = Storage(backend=DiskBackend.PROJECT, size_bytes=10 << 30, inodes=100_000)
        request = replace(request, spec=replace(request.spec, limits=limits))
        held = {**site.held, "disk-lock": -1}
        return start(request, replace(site, storage=storage, held=held))

    return of_folder


def with_workdir_limit(start: Callable[[LaunchRequest, Site], Plans]) -> Any:
    """*start* with a limit of the work directory, which is root's to set."""

    def of_workdir(request: LaunchRequest, site: Site) -> Plans:
        if not site.facts.privileged:
            return start(request, site)
        quota = WorkdirQuota(path=WORKDIR, filesystem="xfs", size_bytes=10 << 30, inodes=100_000)
        return start(request, replace(site, workdir=replace(site.workdir, quota=quota)))

    return of_workdir


def in_image(start: Callable[[LaunchRequest, Site], Plans]) -> Any:
    """*start*, where what it installs is kept in an image of root's."""

    def kept_there(request: LaunchRequest, site: Site) -> Plans:
        if not site.facts.privileged:
            return kept(start)(request, site)
        storage = Storage(backend=DiskBackend.IMAGE, size_bytes=8 << 30, inodes=1 << 20)
        spec = replace(request.spec, layer=Layer.KERNEL)
        return start(replace(request, spec=spec), replace(site, layer_storage=storage))

    return kept_there


STARTS: dict[str, Callable[[LaunchRequest, Site], Plans]] = {
    "cold": cold,
    "command": command,
    "landlock": landlock,
    "landlock-command": landlock_command,
    "nursery": nursery,
    "child": child,
    "spare": spare,
    "claim": claim,
    "gateway": with_network(Network.GATEWAY, cold),
    "gateway-by-ports": by_ports(with_network(Network.GATEWAY, cold)),
    "gateway-nursery": with_network(Network.GATEWAY, nursery),
    "gateway-child": with_network(Network.GATEWAY, child),
    "gateway-spare": with_network(Network.GATEWAY, spare),
    "gateway-claim": with_network(Network.GATEWAY, claim),
    "card": with_network(Network.CARD, cold),
    "card-claim": with_network(Network.CARD, claim),
    "review": reviewed(cold),
    "review-child": reviewed(child),
    "review-claim": reviewed(claim),
    "layer": kept(cold),
    "layer-in-image": in_image(cold),
    "layer-in-image-child": in_image(child),
    "layer-in-image-over-file": with_root(in_image(cold), "squashfs"),
    "layer-over-file": with_root(kept(cold), "squashfs"),
    "host-network": with_network(Network.HOST, cold),
    "root": with_root(cold),
    "root-file": with_root(cold, "squashfs"),
    "root-file-nursery": with_root(nursery, "squashfs"),
    "root-file-child": with_root(child, "squashfs"),
    "root-spare": with_root(spare),
    "root-claim": with_root(claim),
    "root-inside": with_root(as_root(cold), "squashfs"),
    "layer-root-inside": with_root(as_root(kept(cold)), "squashfs"),
    "disk": with_disk(cold),
    "disk-child": with_disk(child),
    "disk-claim": with_disk(claim),
    "disk-in-folder": with_folder(cold),
    "disk-in-folder-child": with_folder(child),
    "workdir-limit": with_workdir_limit(cold),
    "workdir-limit-claim": with_workdir_limit(claim),
    "served-image": served_image,
}
WARM = [start for start in STARTS if start.split("-")[-1] in {"nursery", "child", "spare", "claim"}]
CASES = [f"{start}-{asker}" for start in STARTS for asker in ASKERS]


def render(case: str) -> str:
    """The text of *case*, "START-ASKER"; where there is no such start, why."""
    start, _, asker = case.rpartition("-")
    request, site = ASKERS[asker]
    if start in WARM and (why := why_no_nursery(request, site)):
        return f"Refused: {why}\n"
    with _fixed_machine():
        try:
            found = list(STARTS[start](request, site))
        except SandboxError as error:
            return f"Refused: {error}\n"
        return "\n\n".join(_text_of(part, plan) for part, plan in found)


def verbs_of(case: str) -> set[str]:
    """The verbs of the steps that *case* has."""
    lines = (line.split() for line in render(case).splitlines())
    return {words[1] for words in lines if len(words) > 1 and _is_numbered(words[0])}


def _is_numbered(word: str) -> bool:
    """As a step is; a number alone is part of a detail."""
    return word.endswith(".") and word[:-1].isdigit()


@contextmanager
def _fixed_machine() -> Iterator[None]:
    """Plans depend on the machine in two places: links in paths, and how much memory there is."""
    with (
        mock.patch("os.path.realpath", lambda path: path),
        mock.patch("os.sysconf", SYSCONF.__getitem__),
    ):
        yield


def _text_of(part: str, plan: Plan) -> str:
    lines = [encoded(step) for step in plan.steps]
    assert b"".join(Plan((step,)).encode() for step in plan.steps) == plan.encode()
    title = f"# {part}\n\n" if part else ""
    return f"{title}{plan.describe()}\n\n" + "\n".join(lines) + "\n"


def encoded(step: Step) -> str:
    """Its bytes for the launcher in one line; a filter's program is too long to be read."""
    text = Plan((step,)).encode()
    for word in step.words:
        if isinstance(word, bytes):
            text = text.replace(word, b"(sha256 %s)" % hashlib.sha256(word).hexdigest().encode())
    return repr(text)[2:-1]


def main() -> None:
    """Write all of them, and remove what is no case any more."""
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.iterdir():
        path.unlink()
    for case in CASES:
        (FOLDER / f"{case}.txt").write_text(render(case))
    print(f"{len(CASES)} files in {FOLDER}")


if __name__ == "__main__":
    main()
