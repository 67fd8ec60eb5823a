"""options.py - in the server, pure: the one table of all options of a sandbox.

Each option is one entry: its name, its type and default, what it means (`help`), and as tags

    flag      its name on the command line; without one it is only in configuration files
    default   what README's table shows for its default, where that is not the value itself
    readme    what README's table says, where that is more than `help`
    fields    of `spec.SandboxSpec`, those that it comes to: what a policy decides about
    choice    of texts, of which a policy can list those that are allowed: the strictest ones first
    restricts true where more of it is less for the kernel: a policy adds to it, and takes nothing

The provisioner is configured by them (``c.SandboxProvisioner`` and kernel.json), and from them come
the flags of ``jupyter sandbox``, the rows of ``explain``, and README's table, which
``python -m tests.readme`` writes. Those of caps and of the network stand in
`facilities/caps/wish/` and their like, beside what they mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from traitlets import Bool, Dict, Enum, Float, HasTraits, Integer, List, TraitType, Unicode, Union

from sandbox_provisioner.facilities.caps.wish import CAPS, FACILITIES, CapOptions
from sandbox_provisioner.facilities.devices.wish import DeviceOptions
from sandbox_provisioner.facilities.network.wish.options import NetworkOptions, network_wish
from sandbox_provisioner.facilities.storage.wish.options import DiskOptions, disk_wish
from sandbox_provisioner.facilities.volumes.wish import USERNAME, Volumes, as_texts, filled_in
from sandbox_provisioner.spec import (
    HOST_ROOT,
    Confinement,
    Covers,
    KernelUser,
    Layer,
    Limits,
    NetworkWish,
    OnMissing,
    SandboxSpec,
    UserIds,
    Volume,
    WorkdirMode,
)
from sandbox_provisioner.units import parse_bytes

AUTO, LOCAL, BROKER = "auto", "local", "broker"
BROKER_SOCKET = "/run/sandbox-broker/socket"
# Our entry point in jupyter_client.kernel_provisioners, by which kernelspecs name us.
PROVISIONER = "sandbox-provisioner"


class BoxOptions(HasTraits):
    """What a kernel has in its box, and what holds it."""

    shm_limit = Union(
        [Integer(), Unicode()],
        allow_none=True,
        default_value=None,
        help="The size of /dev/shm; it is memory, and counts towards mem_limit. None: half of the "
        'cap on memory, "64M" where there is none.',
    ).tag(
        config=True,
        flag="shm-limit",
        default="half of `mem_limit`",
        fields=("limits.shm_bytes",),
    )
    tmp_limit = Union(
        [Integer(), Unicode()],
        allow_none=True,
        default_value=None,
        help="The size of /tmp, /run and the private home directory together; it is memory, and "
        'counts towards mem_limit. None: half of the cap on memory, "1G" where there is none.',
    ).tag(
        config=True,
        flag="tmp-limit",
        default="half of `mem_limit`",
        fields=("limits.tmp_bytes",),
    )
    confinement = Enum(
        [choice.value for choice in Confinement],
        default_value=Confinement.NAMESPACES.value,
        help='"namespaces", or, where there are none to be had, "landlock", which is weaker: see '
        'SECURITY.md. The kernel\'s display name has to say "landlock" then.',
    ).tag(
        config=True,
        flag="confinement",
        fields=("confinement",),
    )
    user_ids = Enum(
        [choice.value for choice in UserIds],
        default_value=UserIds.SINGLE.value,
        help="What an ordinary user's kernels have for user ids: \"single\" is the user's own, "
        '"range" maps all others to those that /etc/subuid gives the user, with newuidmap. '
        "Kernels of a root server always have a range.",
    ).tag(
        config=True,
        flag="user-ids",
        fields=("user_ids",),
    )
    workdir = Unicode(
        "notebook",
        help='What the kernel may write to: "notebook" is the directory it starts in (that of the '
        'notebook), "root" the server\'s root directory, "none" nothing of the host: it starts in '
        "its private home, in memory; anything else is an absolute path.",
    ).tag(
        config=True,
        flag="workdir",
    )
    workdir_mode = Enum(
        [choice.value for choice in WorkdirMode],
        default_value=WorkdirMode.DIRECT.value,
        help='"direct": what the kernel writes in its work directory is there at once. "review": '
        "it is laid aside, over restarts too, until somebody keeps or discards it: docs/review.md.",
    ).tag(
        config=True,
        flag="workdir-mode",
        fields=("workdir_mode",),
    )
    rootfs = Unicode(
        HOST_ROOT,
        help='The root file system: "host" shows the host\'s /usr, read-only. Else the kernel runs '
        "the Python of another one, and sees no program of the host: the absolute path of a "
        "directory, of an image file (squashfs, erofs, ext4) or of an OCI layout or archive, or "
        "the name of an image.",
    ).tag(
        config=True,
        flag="rootfs",
        fields=("rootfs",),
        choice=(HOST_ROOT,),
        readme="The root file system: `host`, the path of a directory, of an image file (squashfs, "
        "erofs, ext4) or of an OCI layout or archive, or the name of an image: "
        "[docs/images.md](docs/images.md).",
    )
    layer = Enum(
        [choice.value for choice in Layer],
        default_value=Layer.AUTO.value,
        help="What becomes of what a kernel installs, and writes into a root not the host's. "
        '"kernel": it is kept on the disk over restarts, "user": for the next kernels of this '
        'user, too. "auto": as "kernel" for a root not the host\'s, where something bounds it; '
        'else it is in memory, and gone with the kernel. "none": such a root is read-only: '
        "docs/layers.md.",
    ).tag(
        config=True,
        flag="layer",
        fields=("layer",),
    )
    kernel_user = Enum(
        [choice.value for choice in KernelUser],
        default_value=KernelUser.USER.value,
        help='Who the kernel is in a root not the host\'s: "root" is uid 0 there and nobody '
        "outside, with the few rights that apt install needs; its box has to have a range of ids: "
        "docs/layers.md.",
    ).tag(
        config=True,
        flag="kernel-user",
        fields=("kernel_user",),
    )
    volumes = Volumes(
        help='More host paths, "SOURCE:TARGET[:ro|rw][,noexec]", or as DockerSpawner writes them: '
        '{"/srv/data": {"bind": "/data", "mode": "rw"}}. {username} is who asks. Read-only without '
        "rw, in either spelling.",
    ).tag(
        config=True,
        flag="volume",
        fields=("volumes",),
        readme='More host paths: `["/data:/data", "/scratch/{username}:/scratch:rw,noexec"]`, or '
        'as DockerSpawner writes them: `{"/srv": {"bind": "/data", "mode": "rw"}}`. Read-only '
        "without `rw` **in either spelling**; of `/etc` what the box does not show anyway "
        '([a list](sandbox_provisioner/system_files.py)): `"/etc/profile.d:/etc/profile.d"`.',
    )
    env_keep = List(
        Unicode(), help="Names or patterns of the server's environment variables to hand on."
    ).tag(
        config=True,
        flag="env-keep",
        readme="Names or patterns of the server's environment variables to hand on; "
        "[a list](sandbox_provisioner/facilities/environment/plan/variables.py) is handed on "
        "anyway.",
    )
    covered_directories = List(
        Unicode(),
        default_value=list(Covers().home_directories),
        help="Directories of a home directory that a kernel working there gets empty ones for, "
        "also where they do not exist yet.",
    ).tag(
        config=True,
        fields=("covers.home_directories",),
        restricts=True,
        default="[a list](sandbox_provisioner/spec.py)",
    )
    covered_files = List(
        Unicode(),
        default_value=list(Covers().home_files),
        help="Files of a home directory that a kernel working there gets empty ones for, also "
        "where they do not exist yet.",
    ).tag(
        config=True,
        fields=("covers.home_files",),
        restricts=True,
        default="[a list](sandbox_provisioner/spec.py)",
    )
    home_visible = List(
        Unicode(),
        default_value=list(Covers().home_visible),
        help="What of a home directory a kernel working there may have although it begins with a "
        "dot; everything else that does is covered.",
    ).tag(
        config=True,
        fields=("covers.home_visible",),
        default="[a list](sandbox_provisioner/spec.py)",
    )
    on_missing = Dict(
        value_trait=Enum([choice.value for choice in OnMissing]),
        help="What to do where a cap cannot be enforced here, by facility "
        f'({", ".join(FACILITIES)}): "refuse", which is the default, or "warn".',
    ).tag(
        config=True,
        flag="on-missing",
        fields=("on_missing",),
        default="refuse",
        readme='What to do where a cap cannot be enforced here: `{"cpu": "warn"}`; facilities are '
        f"{', '.join(FACILITIES)}.",
    )

    def username(self) -> str:
        """Who asks, for paths that name the user."""
        raise NotImplementedError


class WarmOptions(HasTraits):
    """What is made ready before a kernel is asked for."""

    warm = Union(
        [Bool(), Enum([AUTO])],
        default_value=AUTO,
        help="Start kernels from a nursery: a process, in a box of its own, that has imported what "
        'they import, and forks. IPython kernels only, others start as ever. "auto": it is made '
        "after the first start in a server, or the second one in another process, serves that "
        "process alone and ends with it. True: it is made after the first start in any process, "
        "and found by all servers of the user. False: none.",
    ).tag(
        config=True,
        flag="warm",
        readme="Fork kernels from a process, in a box of its own, that has imported what they "
        "import: for a server that lives on, for every process (true), or for none (false); "
        "[see below](#warm-starts).",
    )
    preload = List(
        Unicode(),
        help='Modules that a nursery imports besides, such as "numpy": kernels have them at once.',
    ).tag(
        config=True,
        flag="preload",
    )
    spares = Integer(
        0,
        min=0,
        help="With warm: how many kernels wait for a start, initialised and stopped. They are made "
        "in the background, and given up where the machine is short of memory.",
    ).tag(
        config=True,
        flag="spares",
    )
    warm_idle_timeout = Float(
        900.0,
        help="After how many seconds without a start a nursery and its spares end, and the image "
        "of a root is unmounted.",
    ).tag(
        config=True,
        flag="warm-idle-timeout",
    )


class ServerOptions(HasTraits):
    """How the server deals with its kernels."""

    start_timeout = Float(60.0, help="How many seconds a kernel may take to start.").tag(
        config=True,
    )
    launcher = Enum(
        [AUTO, LOCAL, BROKER],
        default_value=AUTO,
        help='Who starts kernels: "local" is the server itself, with its user\'s rights; "broker" '
        "is a daemon of this machine (docs/broker.md), which gives them ids and caps of root's. "
        '"auto": the broker, where there is one, for what the server lacks the rights to do.',
    ).tag(
        config=True,
    )
    broker_socket = Unicode(BROKER_SOCKET, help="Where that daemon listens.").tag(
        config=True,
    )
    runtime_dir = Unicode(
        "",
        help="Where sockets and records are kept; short, and the user's own. Empty: a directory "
        "below /run, or what stands for it where the user may not write there.",
    ).tag(
        config=True,
        default="`/run/…`",
    )
    layer_dir = Unicode(
        "",
        help="Where on the disk lies what kernels write that outlives them; a file system that can "
        "be the upper one of an overlay. Empty: /var/lib/sandbox-provisioner for root, "
        "~/.local/share/jupyter/sandbox for others.",
    ).tag(
        config=True,
        flag="layer-dir",
        default="`/var/lib/…`, `~/.local/…`",
    )
    review_days = Float(
        14.0,
        min=0.0,
        help='With workdir_mode = "review": after how many days without a decision jupyter sandbox '
        "gc, and a start, throw away what a kernel that has ended had changed.",
    ).tag(
        config=True,
    )
    ends_file = Unicode(
        "",
        help="A file to which a line of JSON is added for each kernel that ends without being "
        "asked to (docs/ends.md); in a directory that kernels may not write to.",
    ).tag(
        config=True,
    )
    survive_server = Bool(
        False, help="Let kernels live on when the server ends (as with independent=True)."
    ).tag(
        config=True,
    )


class SandboxOptions(
    CapOptions, DiskOptions, BoxOptions, DeviceOptions, NetworkOptions, WarmOptions, ServerOptions
):
    """All of them, in the order in which people read them."""


def spec_of(
    options: SandboxOptions, *, workdir: str, network: NetworkWish | None = None
) -> SandboxSpec:
    """What *options* come to, for a kernel whose work directory is *workdir*, with this *network*
    where it is not theirs; SpecError."""
    wishes = {name: value for cap in CAPS for name, value in vars(cap.wish(options)).items()}
    return SandboxSpec(
        workdir=workdir,
        workdir_mode=WorkdirMode(options.workdir_mode),
        limits=Limits(
            **wishes,
            shm_bytes=_size("shm_limit", options.shm_limit),
            tmp_bytes=_size("tmp_limit", options.tmp_limit),
            **vars(disk_wish(options)),
        ),
        confinement=Confinement(options.confinement),
        network=network_wish(options) if network is None else network,
        user_ids=UserIds(options.user_ids),
        kernel_user=KernelUser(options.kernel_user),
        volumes=tuple(_volumes(options)),
        rootfs=options.rootfs,
        layer=Layer(options.layer),
        devices=tuple(options.devices),
        covers=Covers(
            home_directories=tuple(options.covered_directories),
            home_files=tuple(options.covered_files),
            home_visible=tuple(options.home_visible),
        ),
        on_missing={name: OnMissing(choice) for name, choice in options.on_missing.items()},
    )


def _volumes(options: SandboxOptions) -> Iterator[Volume]:
    for text in as_texts(options.volumes):
        name = options.username() if USERNAME in text else ""
        yield Volume.parse(filled_in(text, name))


def _size(name: str, value: int | str | None) -> int | None:
    return None if value is None else parse_bytes(name, value)


def every_option() -> dict[str, TraitType[Any, Any]]:
    """The options by their names, in the order of the table."""
    return {
        name: trait
        for part in SandboxOptions.__mro__
        for name, trait in vars(part).items()
        if isinstance(trait, TraitType) and trait.metadata.get("config")
    }


def flags() -> dict[str, str]:
    """From the flag of a command line to the option that it sets."""
    return {
        flag: name for name, trait in every_option().items() if (flag := trait.metadata.get("flag"))
    }
