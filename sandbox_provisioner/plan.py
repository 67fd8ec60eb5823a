"""plan.py - pure: what a plan is, and what it is made from: a request and the site where it runs.

The facilities yield the steps (`facilities/*/plan.py`), `orders/` puts them in their order, and
`launcher/` performs them; who performs decides nothing. A plan can be printed (`describe`),
compared and replayed. It never crosses the broker's socket: a client that can send steps is root.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import IntEnum

from sandbox_provisioner.facilities.caps.cgroup import Bound
from sandbox_provisioner.facilities.devices.facts import Devices
from sandbox_provisioner.facilities.environment.facts.kernel_files import KernelFiles
from sandbox_provisioner.facilities.ids.facts import IdRange
from sandbox_provisioner.facilities.network.facts.packages import Packages
from sandbox_provisioner.facilities.network.facts.resolver import ResolverPlace
from sandbox_provisioner.facilities.network.wish.addresses import Address
from sandbox_provisioner.facilities.root.facts import IMAGE, RootFacts
from sandbox_provisioner.facilities.storage.facts import Storage
from sandbox_provisioner.host import HostFacts, VolumeFacts, WorkdirFacts
from sandbox_provisioner.inside import wire
from sandbox_provisioner.inside.printable import one_line
from sandbox_provisioner.places import Place
from sandbox_provisioner.policy.terms import Terms
from sandbox_provisioner.spec import NO_WORKDIR, KernelUser, Limits, SandboxSpec, relative

HOME = "/home/jovyan"
SOCKETS = "/run/kernel"
CONNECTIONS = "/run/jupyter"
# Where what is laid aside stands until it is in its place.
REVIEW = "/.review"
# The same of a layer that is kept on the disk; and where of the home what is installed goes to.
LAYER = "/.layer"
# The name of the user namespace by which ids of the box are others on a disk of the host's.
DISK = "disk"
OWN_BASE = f"{HOME}/.local"
SOCKET_NAMES = tuple(f"s-{port}" for port in range(1, 6))
KERNEL_ID = 1000
# What holds every place that a kernel may write to and that is not given to it.
SCRATCH = "/.scratch"
TAKE_REMEDY = "Make the path readable, or correct the option that names it."
# How what is the host's and every kernel sees is mounted.
READ_ONLY = ("readonly", "nosuid", "nodev")


@dataclass(frozen=True, slots=True)
class Step:
    """One step: a verb (`launcher/verbs.py`), its words, the reason for it, and what a person can
    do where it fails. *shown* is what people see in place of words that are secret, or mean nothing
    to them; *detail* are more lines for them."""

    verb: str
    words: tuple[str | bytes, ...] = ()
    why: str = ""
    remedy: str = ""
    shown: tuple[str, ...] | None = None
    detail: tuple[str, ...] = ()

    def describe(self) -> str:
        """The step for people: long words are cut."""
        shown = self.shown
        if shown is None:
            shown = tuple(_short(str(word)) for word in self.words)
        return one_line(" ".join([self.verb, *shown]))


def _short(word: str) -> str:
    word = word.replace("\n", "\\n")
    return f"{word[:57]}..." if len(word) > 60 else word


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps of one start, in order."""

    steps: tuple[Step, ...]

    def describe(self) -> str:
        """For `explain`: a numbered line a step, with its reason and its details below it."""
        lines = []
        for number, step in enumerate(self.steps, 1):
            lines.append(f"{number:3}. {step.describe()}")
            below = filter(None, (step.why, *step.detail))
            lines += (f"       {one_line(line)}" for line in below)
        return "\n".join(lines)

    def encode(self) -> bytes:
        """For the launcher, which decodes it (`inside/wire.py`)."""
        # As os.fsencode does it, which asks of each of some hundred words what it is.
        form = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()
        return wire.encode(
            [
                [word if isinstance(word, bytes) else word.encode(*form) for word in words]
                for words in ((step.verb, *step.words) for step in self.steps)
            ]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchRequest:
    """One start: what to run in which box. *cwd* lies in the work directory.

    *connection_file* is the name and the text of the file that a Jupyter kernel reads; it shows in
    /run/jupyter. The kernel binds its sockets in /run/kernel, which init seals once it listens on
    all of them. *environment* is what the caller wishes; `variables.py` tells what becomes of it,
    and *env_keep* what more of the server's own is handed on. *survive_server* is jupyter_client's
    "independent"; *watched* is a pidfd whose end is the sandbox's all the same then, -1 for none:
    whoever launches for others may end before. *pump* makes init pass stdout and stderr on; those
    that are *logged*, as they are the server's own, within a budget and printable. Without it they
    are the caller's, and with *terminal* the one among them controls the command's session.
    *server_places* are more paths that the server would run or import from. *below* are the groups,
    hub/NAME/KIND, in which the sandbox's own is made, for a person's; *sums* are the limits of some
    of these, by their names, for all that is in one together. *terms* are a policy's, to which
    *spec* has been narrowed: they are asked whether there is room for one more; *asked* is the spec
    as it was before, and *narrowed* what the person shall read of that. *first_id* is the first of
    a range of ids that is the person's for ever; 0: any range that is free. *box* is the sandbox of
    the server that asked for it, where that one is in one: of a kernel beside it.
    """

    sandbox_id: str
    spec: SandboxSpec
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    cwd: str
    env_keep: tuple[str, ...] = ()
    connection_file: tuple[str, str] | None = None
    survive_server: bool = False
    watched: int = -1
    pump: bool = True
    logged: tuple[str, ...] = ()
    terminal: bool = False
    extra_files: tuple[str, ...] = ()
    server_places: tuple[str, ...] = ()
    below: str = ""
    sums: Mapping[str, Limits] = field(default_factory=dict)
    terms: Terms | None = None
    asked: SandboxSpec | None = None
    narrowed: str = ""
    first_id: int = 0
    box: str = ""

    @property
    def group(self) -> str:
        """The name of its control groups."""
        return f"{self.below}/{self.sandbox_id}" if self.below else self.sandbox_id


def start_directory(cwd: str, spec: SandboxSpec) -> str:
    """Where a kernel starts that a caller wants to start in *cwd*: in its work directory, or, where
    it has none, in its home in memory."""
    if spec.workdir == NO_WORKDIR:
        return HOME
    return cwd if relative(cwd, spec.workdir) is not None else spec.workdir


@dataclass(frozen=True, slots=True)
class NurseryPids:
    """The pids, as the server sees them, of a nursery's PID 1 and of its child, a PID 1 too."""

    init: int
    child: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where a request is going to run: all that was found out on the host for it.

    *first_id* is the first of the host's ids that a root server gives to this sandbox; *sockets*
    the host's directory that shows inside as /run/kernel, *exit_file* where init tells the end.
    *id_range* is what an ordinary user's sandbox maps all ids but the user's own to; None: nothing.
    *figure_groups* are those whose caps on memory and CPUs the box is told.
    *device_group* is the version and the group by which Linux limits what devices it opens.
    *memory_above* is the smallest cap on memory of the groups that its own is to be a part of.
    *user_tasks* is how many processes and threads the user has, where a cap is to count from there.
    *family* is whose child the kernel's PID 1 is, where that is a nursery's; *idle_seconds* how
    long a spare waits for its start. *held* is what whoever performs the first plan inside is given
    by the server besides, the descriptors by the names under which `receive` takes them.
    *network_allow* are the rules of the kernel's network, those of presets in their place, which
    *packages* tells more of.
    *real_home* is the real path of the home directory of whoever asks for it.
    *root* is its root file system, where that is not the host's, and *kernel_user* who the kernel
    is there.
    *catch_obstacle* is why Linux does not hand all connections of a box to one listener, "" if it
    does. *resolver* is how the machine finds names, for a box that has the machine's own network;
    *name_servers* whom it asks, for one that has a card.
    *review* is where on the disk what is written in the work directory is laid aside, *layer* where
    what it installs is kept.
    *storage* is what holds a limit of the disk, None where there is none, *layer_storage* the same
    of what is kept of what it installs; *disk* and *layer_disk* are the mounts of these.
    *opened* closes the descriptors of `places`: whoever made the site does, when the start is done.
    """

    facts: HostFacts
    workdir: WorkdirFacts
    files: KernelFiles
    volumes: tuple[VolumeFacts, ...] = ()
    devices: Devices = field(default_factory=Devices)
    device_group: tuple[int, str] | None = None
    join_files: tuple[str, ...] = ()
    memory_group: tuple[int, str] | None = None
    figure_groups: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    memory_above: Bound | None = None
    first_id: int = 0
    id_range: IdRange | None = None
    sockets: str = ""
    exit_file: str = ""
    user_tasks: int = 0
    family: NurseryPids | None = None
    idle_seconds: float = 0.0
    held: Mapping[str, int] = field(default_factory=dict)
    catch_obstacle: str = ""
    resolver: tuple[ResolverPlace, ...] = ()
    name_servers: tuple[Address, ...] = ()
    server_environment: Mapping[str, str] = field(default_factory=dict)
    real_home: str = ""
    network_allow: tuple[str, ...] = ()
    packages: Packages = field(default_factory=Packages)
    review: Place | None = None
    layer: Place | None = None
    root: RootFacts = field(default_factory=RootFacts)
    kernel_user: KernelUser = KernelUser.USER
    storage: Storage | None = None
    layer_storage: Storage | None = None
    disk: int = -1
    layer_disk: int = -1
    opened: ExitStack = field(default_factory=ExitStack, repr=False, compare=False)

    @property
    def places(self) -> tuple[tuple[str, Place], ...]:
        """What of the host this one kernel is given, and where that shows inside."""
        workdir = ((self.workdir.path, self.workdir.place),) if self.workdir.source else ()
        folders = ((REVIEW, self.review), (LAYER, self.layer))
        aside = tuple((target, place) for target, place in folders if place)
        volumes = ((facts.volume.target, facts.place) for facts in self.volumes)
        root = ((IMAGE, self.root.place),) if self.root.place and not self.root.kind else ()
        return (*workdir, *aside, *volumes, *root)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Those of `places` and of mounts that are attached nowhere, which go to the launcher with
        the plan."""
        image = (self.root.mount_fd,) if self.root.kind else ()
        disks = (fd for fd in (self.disk, self.layer_disk) if fd >= 0)
        return (*(place.fd for _, place in self.places), *image, *disks)

    @property
    def has_image(self) -> bool:
        """Whether there is a file system in a file for what it writes."""
        return self.layer_storage is not None or bool(self.storage and self.storage.is_image)

    @property
    def uid(self) -> int:
        """The kernel's user id inside: 0 only where that was asked for, also where a container's
        root starts it."""
        if self.kernel_user is KernelUser.ROOT:
            return 0
        return KERNEL_ID if self.facts.privileged else self.facts.caller.uid or KERNEL_ID

    @property
    def gid(self) -> int:
        """The kernel's group id inside: the same, since some platforms give 0 to every user."""
        if self.kernel_user is KernelUser.ROOT:
            return 0
        return KERNEL_ID if self.facts.privileged else self.facts.caller.gid or KERNEL_ID

    @property
    def outside_uid(self) -> int:
        """The kernel's user id as the host sees it."""
        if not self.facts.privileged:
            return self.facts.caller.uid
        return self.first_id + self.uid if self.workdir.idmappable else self.workdir.place.owner_uid

    @property
    def outside_gid(self) -> int:
        """The kernel's group id as the host sees it."""
        if not self.facts.privileged:
            return self.facts.caller.gid
        return self.first_id + self.gid if self.workdir.idmappable else self.workdir.place.owner_gid

    @property
    def home(self) -> str:
        """HOME inside: the work directory if it is the server's own home, as users expect there."""
        is_own = self.real_home == self.workdir.source != ""
        return self.workdir.path if is_own else HOME


class Kind(IntEnum):
    """Where a process is in the order of a start when the start begins: see `orders/`."""

    COLD = 0
    NURSERY = 1
    FORK = 2
    SPARE = 3
    CLAIM = 4


@dataclass(frozen=True, slots=True)
class Start:
    """What the facilities make steps from."""

    request: LaunchRequest
    site: Site
    kind: Kind = Kind.COLD

    @property
    def keeps_layer(self) -> bool:
        """Whether there is a place for what is kept of what it installs."""
        is_there = self.site.layer is not None or self.site.layer_storage is not None
        return is_there and self.kind in (Kind.COLD, Kind.FORK, Kind.SPARE)

    @property
    def map_of_box(self) -> str:
        """The name of the user namespace that a root server maps the ids of the box's own file
        systems by: the box's own where its launcher makes that, which saves a process."""
        return "sandbox" if self.kind is Kind.COLD else "box"


def mapping_words(name: str, facts: WorkdirFacts | VolumeFacts, site: Site) -> tuple[str, ...]:
    """How the ids of a place's mounts are mapped, by the user namespace *name*."""
    if not site.facts.privileged or not facts.idmappable:
        return ()
    return (f"idmap-top={name}",) if facts.unmapped else (f"idmap={name}",)


def unmapped_steps(target: str, facts: WorkdirFacts | VolumeFacts) -> Iterator[Step]:
    """Of mounts below what is attached at *target*: new files there would be nobody's."""
    below = (relative(mount.path, facts.place.source) for mount in facts.unmapped)
    paths = tuple(os.path.join(target, path) for path in below if path)
    if paths:
        yield Step("freeze-paths", paths, "mounts whose ids cannot be mapped may only be read")
