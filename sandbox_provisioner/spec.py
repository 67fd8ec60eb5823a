"""spec.py - pure: what a sandbox shall be, parsed once from what a person wrote.

Every type is frozen, validates itself and has its units in its names. `SandboxSpec` holds wishes;
what this machine can do is `host.HostFacts`; `orders.compile_for` brings the two together.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from sandbox_provisioner.errors import SpecError, did_you_mean
from sandbox_provisioner.facilities.caps.wish import BY_FACILITY, CAPS, FACILITIES, Cap, Wishes
from sandbox_provisioner.facilities.devices import wish as of_devices
from sandbox_provisioner.facilities.network.wish.network import Network, NetworkWish
from sandbox_provisioner.facilities.storage.wish import KEEPING, DiskWish
from sandbox_provisioner.units import at_least

__all__ = [
    "HOST_ROOT",
    "NO_WORKDIR",
    "WRITTEN_THROUGH",
    "Confinement",
    "Covers",
    "KernelUser",
    "Layer",
    "Limits",
    "Network",
    "NetworkWish",
    "OnMissing",
    "SandboxSpec",
    "UserIds",
    "Volume",
    "VolumeOfDevice",
    "WorkdirMode",
    "check_path",
    "relative",
    "volumes_for",
]


# The size of a folder in memory where there is no cap on memory.
SHM_BYTES, TMP_BYTES = 64 << 20, 1 << 30


def folder_bytes(memory_bytes: int | None, uncapped_bytes: int) -> int:
    """The size of a folder in memory that nobody has asked for. Half of the cap leaves room for the
    kernel beside it, and is what a tmpfs(5) has of a machine's memory; what is in it is charged all
    the same."""
    return uncapped_bytes if memory_bytes is None else memory_bytes // 2


def inodes_of(size_bytes: int) -> int:
    """How many files a folder in memory may have that nobody has asked for: an empty one takes no
    page of its size, but a page's worth of the Linux kernel's memory."""
    return size_bytes // 4096 + 64


@dataclass(frozen=True, kw_only=True)
class Limits(Wishes, DiskWish):
    """The caps of one sandbox, and the sizes of its folders in memory. None means no cap; for a
    folder, that its size follows the cap on memory (`facilities/root/plan.py`).

    *by_default* are the facilities whose cap nobody has asked for: where a cap of these cannot be
    enforced, a start does without.
    """

    shm_bytes: int | None = None
    tmp_bytes: int | None = None
    by_default: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for cap in CAPS:
            cap.check(self)
        for name, size in (("shm_limit", self.shm_bytes), ("tmp_limit", self.tmp_bytes)):
            if size is not None:
                at_least(name, size, 4096, 'Use at least one page, "4K".')
        self.check_disk()

    @property
    def asked(self) -> list[Cap]:
        """The caps that it has."""
        return [cap for cap in CAPS if cap.is_asked(self)]

    def without(self, facilities: Collection[str]) -> Limits:
        """The same minus the caps of *facilities*."""
        dropped: dict[str, Any] = {}
        for facility in facilities:
            dropped |= dict.fromkeys(BY_FACILITY[facility].fields)
        return replace(self, **dropped)

    @property
    def cpu_count(self) -> int | None:
        """How many threads at once make sense under the caps; None without a cap."""
        counts = []
        if self.cpu_cores is not None:
            counts.append(max(1, -(-self.cpu_cores // 1)))
        if self.cpuset is not None:
            counts.append(len(self.cpuset))
        return int(min(counts)) if counts else None


# What belongs to the system inside; a volume there would replace it.
_SYSTEM = {"", "bin", "dev", "etc", "lib", "lib32", "lib64", "proc", "run", "sbin", "sys", "usr"}
_PROGRAMS = {"lib", "lib32", "lib64", "run", "usr"}
# Of /etc a volume may show what the box lacks, but nothing in place of what tells who it is, and
# where.
_OWN_OF_ETC = {"passwd", "group", "hosts", "hostname", "resolv.conf", "nsswitch.conf"}
_VOLUME_OPTIONS = {"ro", "rw", "noexec"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """A host path that the sandbox gets besides its work directory: "SRC:DST[:ro|rw][,noexec]"."""

    source: str
    target: str
    readonly: bool = True
    noexec: bool = False

    def __post_init__(self) -> None:
        for role, path in (("source", self.source), ("target", self.target)):
            check_path(f"the {role} of volume {self.source}:{self.target}", path)
        if self._hides_system() or self.source.split("/")[1] in {"", "proc", "sys", "dev"}:
            raise SpecError(
                attempt=f"use volume {self.source}:{self.target}",
                answer="it would show or hide a part of the system",
                remedy="Choose a target such as /data, and a directory of files as the source. Of "
                "/etc more can be shown, read-only, but nothing in place of the box's own "
                f"{', '.join(sorted(_OWN_OF_ETC))}.",
            )

    def _hides_system(self) -> bool:
        names = self.target.strip("/").split("/")
        if names[0] != "etc":
            return names[0] in _SYSTEM
        return not self.readonly or len(names) < 2 or names[1] in _OWN_OF_ETC

    @classmethod
    def parse(cls, text: str) -> Volume:
        """Read "SRC:DST" or "SRC:DST:OPTIONS": ro, rw, noexec; read-only unless it says rw."""
        parts = text.split(":")
        options = parts[2].split(",") if len(parts) == 3 else []
        once = len({*options}) == len(options) and not {*options} >= {"ro", "rw"}
        if len(parts) not in {2, 3} or not once or not {*options} <= _VOLUME_OPTIONS:
            raise SpecError(
                attempt="read volumes",
                answer=f"{text!r} is not a volume",
                remedy='Write "SOURCE:TARGET:ro" or "SOURCE:TARGET:rw", both absolute paths; '
                'or "SOURCE:TARGET:ro,noexec", where none of its programs shall run.',
            )
        return cls(
            source=parts[0],
            target=parts[1],
            readonly="rw" not in options,
            noexec="noexec" in options,
        )

    @property
    def options(self) -> str:
        """As `parse` reads them."""
        return ("ro" if self.readonly else "rw") + (",noexec" if self.noexec else "")


class VolumeOfDevice(Volume):
    """What comes with a device of root's specification: it may be among the programs of another
    root, as a driver's libraries are. A class of its own, for nobody's text or JSON is read as
    one."""

    __slots__ = ()

    def _hides_system(self) -> bool:
        names = self.target.strip("/").split("/")
        is_among = self.readonly and len(names) > 2 and names[0] in _PROGRAMS
        return not is_among and super()._hides_system()


def volumes_for(paths: Sequence[str]) -> str:
    """The option that shows *paths* where they are, for a sentence."""
    named = ", ".join(f'"{path}:{path}"' for path in paths)
    return f"volumes = [{named}]"


def check_path(what: str, path: str) -> None:
    """Refuse a path that is not absolute and plain: relative, with "..", a NUL or a newline."""
    remedy = 'Write an absolute path without "." and ".." in it.'
    if not path.startswith("/"):
        answer = f"{path!r} is a relative path"
    elif os.path.normpath(path) != path.rstrip("/") and path != "/":
        answer = f"{path!r} is not a plain path"
    elif re.search(r"[\0\n]", path):
        answer = f"{path!r} contains a NUL or a newline"
        remedy = "Rename it, or name another one."
    else:
        return
    raise SpecError(attempt=f"use {what}", answer=answer, remedy=remedy)


def relative(path: str, base: str) -> str | None:
    """*path* as seen from *base* ("" for itself), or None where it does not lie in it; nothing lies
    in a *base* of "", which is that of a box without a work directory."""
    if not base:
        return None
    base = base.rstrip("/")
    if not path.startswith(base):  # of nearly all that a start asks for
        return None
    path = path.rstrip("/") or "/"
    if path == (base or "/"):
        return ""
    return path[len(base) + 1 :] if path.startswith(f"{base}/") else None


# In place of a path: nothing of the host is a kernel's work directory.
NO_WORKDIR = "none"


class UserIds(StrEnum):
    """Which ids an ordinary user's sandbox has: SINGLE is the user's own and nothing else, RANGE
    maps every other one to the ids that subuid(5) gives the user."""

    SINGLE = "single"
    RANGE = "range"


class KernelUser(StrEnum):
    """Who a kernel is in a root file system of its own: ROOT is uid 0 there, and nobody outside,
    with the few capabilities that package managers need (`facilities/rights/plan`)."""

    USER = "user"
    ROOT = "root"


class Confinement(StrEnum):
    """What holds a kernel. LANDLOCK is for places that have no namespaces, and is weaker: see
    `facilities/landlock/plan.py`. It is chosen by name, never fallen back to."""

    NAMESPACES = "namespaces"
    LANDLOCK = "landlock"


class WorkdirMode(StrEnum):
    """What becomes of what a kernel writes in its work directory: REVIEW lays it aside, until
    somebody has looked at it (`layers/`); DIRECT is the directory itself."""

    REVIEW = "review"
    DIRECT = "direct"


# In place of an image: what the host has in /usr, read-only.
HOST_ROOT = "host"
_IMAGE_NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,99}", re.ASCII)


class Layer(StrEnum):
    """What becomes of what a kernel installs, and of what it writes into a root that is not the
    host's. NONE: such a root is read-only. KERNEL and USER: it is kept on the disk (`layers/`),
    over restarts of a kernel, or for the next kernels of its user. AUTO: of another root as KERNEL,
    where something bounds that (`LocalLauncher.settled`), else in memory, gone with the kernel's
    processes."""

    NONE = "none"
    AUTO = "auto"
    KERNEL = "kernel"
    USER = "user"


class OnMissing(StrEnum):
    """What to do where this machine cannot enforce a facility."""

    REFUSE = "refuse"
    WARN = "warn"


# Where a file goes that a program outside writes through a link that stands in for it, below its
# home directory: out of the kernel's reach, and on the same file system.
WRITTEN_THROUGH = ".local/share/jupyter/stand-ins"


# Where installations lie in directories of programs that are shown of a home, by patterns.
_NODES = (".nvm/versions/*/*", ".volta/tools/image/node/*", ".asdf/installs/nodejs/*")
_MAVENS = (".sdkman/candidates/maven/*", ".asdf/installs/maven/*")
_PYTHONS = (
    ".venv", ".virtualenvs/*", ".pyenv/versions/*", ".pyenv/versions/*/envs/*", ".conda/envs/*",
    ".asdf/installs/python/*",
)  # fmt: skip
# conda keeps in "state" what `conda env config vars set` was told.
_SECRETS_OF_PYTHON = (
    "pip.conf", ".condarc", "condarc", "condarc.d", "conda-meta/state", "etc/conda/env_vars.d",
    "etc/conda/activate.d", "etc/jupyter", "etc/npmrc",
)  # fmt: skip
_MOST_PATH = 4096
_ACTIVATION = (
    "preactivate", "postactivate", "predeactivate", "postdeactivate", "premkvirtualenv",
    "postmkvirtualenv", "get_env_details",
)  # fmt: skip


def _is_plain(path: str) -> bool:
    """Linux takes no longer path (PATH_MAX), and nobody shall have us keep one."""
    return len(path) <= _MOST_PATH and _is_plain_path(path)


@functools.lru_cache(maxsize=4096)
def _is_plain_path(path: str) -> bool:
    """Each start asks it of the same three hundred paths."""
    return os.path.normpath(path) == path and path.partition("/")[0] not in {"", ".", ".."}


@dataclass(frozen=True, slots=True, kw_only=True)
class Covers:
    """What of a work directory the sandbox must not reach, since the host would run or trust it.

    Of a home directory in it everything that begins with a dot is covered but for *home_visible*;
    what is there of *home_frozen* (programs that the host runs, data that it unpickles) is kept,
    but read-only, and what is there of *home_secrets*, patterns as of glob, is covered. The next
    login, shell, editor or Jupyter server looks for *home_directories*, *home_files* and
    *home_frozen* also where they do not exist yet: then each has a stand-in.
    *repository_directories*, *repository_frozen* and *repository_placed* are relative to a
    repository; the last are files, with a text that means nothing to git, that git would believe.

    *whole*: none of this is covered, where all code of the home's owner runs in the sandbox. What
    the server itself runs or imports from there is read-only all the same.
    """

    whole: bool = False

    home_directories: tuple[str, ...] = (
        ".ssh", ".gnupg", ".aws", ".azure", ".kube", ".docker", ".config", ".cache", ".jupyter",
        ".ipython", ".local/bin", ".local/lib", ".local/share/jupyter", ".local/share/keyrings",
        ".local/share/applications", ".local/share/systemd", ".mozilla", ".password-store", ".pki",
        ".vim", ".vscode", ".vscode-server", ".cursor", ".npm", ".m2", ".gradle", ".ivy2", ".sbt",
        ".julia", ".R", ".cabal", ".ghc", ".stack", ".cpan", ".gem", ".bundle", ".composer",
        ".subversion", ".terraform.d", ".ansible", ".dbus",
    )  # fmt: skip
    home_files: tuple[str, ...] = (
        ".bashrc", ".bash_profile", ".bash_login", ".bash_logout", ".bash_aliases", ".bash_history",
        ".bash_completion", ".bash_functions", ".bashrc.d", ".profile", ".zshrc", ".zshenv",
        ".zprofile", ".zlogin", ".zlogout", ".zsh_history", ".zshrc.d", ".zsh", ".p10k.zsh",
        ".kshrc", ".mkshrc", ".shrc", ".shinit", ".cshrc", ".tcshrc", ".login", ".logout",
        ".xprofile", ".xsession", ".xsessionrc", ".xinitrc", ".xserverrc", ".Xclients",
        ".Xresources", ".Xdefaults", ".Xmodmap", ".Xauthority", ".ICEauthority", ".xmonad",
        ".fluxbox", ".i3", ".awesome", ".vnc", ".pam_environment", ".environment", ".inputrc",
        ".editrc", ".netrc", ".pgpass", ".my.cnf", ".psqlrc", ".gitconfig", ".git-credentials",
        ".hgrc", ".npmrc", ".yarnrc", ".yarnrc.yml", ".pypirc", ".pip", ".pydistutils.cfg",
        ".condarc", ".Rprofile", ".Renviron", ".vimrc", ".gvimrc", ".exrc", ".nvimrc", ".emacs",
        ".emacs.d", ".emacs.el", ".spacemacs", ".doom.d", ".nanorc", ".nano", ".python_history",
        ".pythonrc", ".pythonrc.py", ".pdbrc", ".pdbrc.py", ".gdbinit", ".lldbinit", ".tmux.conf",
        ".tmux", ".screenrc", ".byobu", ".lesskey", ".lessfilter", ".mailcap", ".mailrc", ".muttrc",
        ".mutt", ".forward", ".procmailrc", ".msmtprc", ".rhosts", ".k5login", ".wgetrc", ".curlrc",
        ".ackrc", ".fzf.bash", ".fzf.zsh", ".direnvrc", ".envrc", ".gemrc", ".irbrc", ".pryrc",
        ".sbclrc", ".ocamlinit", ".octaverc", ".mavenrc", ".ant", ".antrc", ".lftprc", ".xonshrc",
        ".kde", ".atom", ".ideavimrc", ".mambarc", ".ghci", ".perltidyrc", ".perlcriticrc",
        ".sqliterc", ".mongorc.js", ".terraformrc", ".ansible.cfg", ".asdfrc", ".wezterm.lua",
        ".oh-my-zsh", ".oh-my-bash",
    )  # fmt: skip
    home_frozen: tuple[str, ...] = (
        ".cargo", ".rustup", ".nvm", ".pyenv", ".rbenv", ".rvm", ".sdkman", ".deno", ".bun",
        ".volta", ".asdf", ".conda", ".nix-profile", ".juliaup", ".ghcup", ".opam", ".virtualenvs",
        ".venv", ".keras", "bin",
    )  # fmt: skip
    # Tokens of registries, passwords of proxies and indexes, variables that an environment sets.
    home_secrets: tuple[str, ...] = (
        ".cargo/credentials", ".cargo/credentials.toml", ".opam/plugins/opam-publish",
        *(f"{place}/etc/npmrc" for place in _NODES),
        *(f"{place}/conf/settings.xml" for place in _MAVENS),
        *(f"{place}/{name}" for place in _PYTHONS for name in _SECRETS_OF_PYTHON),
        ".conda/.condarc", ".conda/condarc", ".conda/condarc.d",
        *(f".virtualenvs/{hook}" for hook in _ACTIVATION),
        *(f".virtualenvs/*/bin/{hook}" for hook in _ACTIVATION),
    )  # fmt: skip
    home_visible: tuple[str, ...] = (
        ".git", ".gitignore", ".gitattributes", ".gitmodules", ".ipynb_checkpoints",
        ".virtual_documents", ".nbgrader.log",
    )  # fmt: skip
    repository_directories: tuple[str, ...] = (".git/hooks",)
    repository_frozen: tuple[str, ...] = (
        ".git/config", ".git/config.worktree", ".git/commondir", ".git/info", ".git/modules",
        ".git/worktrees", ".gitmodules",
    )  # fmt: skip
    # "The directory of what all work trees share is this one": gitrepository-layout(5), commondir.
    repository_placed: tuple[tuple[str, str], ...] = (
        (".git/commondir", ".\n"), (".git/config.worktree", ""),
    )  # fmt: skip

    def __post_init__(self) -> None:
        placed = (path for path, _ in self.repository_placed)
        others = {"repository_placed", "whole"}
        lists = (getattr(self, name) for name in self.__slots__ if name not in others)
        for path in (*placed, *(path for names in lists for path in names)):
            if not _is_plain(path):
                raise SpecError(
                    attempt=f"cover {path!r}",
                    answer="it is not a plain relative path",
                    remedy='Write it as seen from the home directory, such as ".ssh".',
                )

    @property
    def guarded(self) -> frozenset[str]:
        """What of a home no kernel ever writes: it is covered, and nobody's work directory."""
        names = (*self.home_directories, *self.home_files)
        return frozenset(n for n in names if n.partition("/")[0] not in self.home_visible)


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxSpec:
    """Everything that is wished of one sandbox; serialisable, and the same for every launcher.

    *workdir* is bound writable at the same path, minus what *covers* tells. It may be
    `NO_WORKDIR`: then all that a kernel can write to is in memory, and ends with it. With
    *workdir_mode* "review" what it writes there is laid aside, for somebody to look at. *rootfs* is
    `HOST_ROOT`, the path of another root file system, or the name of one. *untouched* are the names
    of options that nobody has set, which a policy's defaults stand in for.
    """

    workdir: str
    workdir_mode: WorkdirMode = WorkdirMode.DIRECT
    covers: Covers = field(default_factory=Covers)
    limits: Limits = field(default_factory=Limits)
    confinement: Confinement = Confinement.NAMESPACES
    network: NetworkWish = field(default_factory=NetworkWish)
    user_ids: UserIds = UserIds.SINGLE
    kernel_user: KernelUser = KernelUser.USER
    volumes: tuple[Volume, ...] = ()
    rootfs: str = HOST_ROOT
    layer: Layer = Layer.AUTO
    devices: tuple[str, ...] = ()
    hostname: str = "sandbox"
    on_missing: Mapping[str, OnMissing] = field(default_factory=lambda: MappingProxyType({}))
    untouched: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.workdir != NO_WORKDIR:
            check_path("the work directory", self.workdir)
        self._check_root()
        self._check_limits()
        self._check_kernel_user()
        of_devices.check(self.devices)
        unknown = sorted(set(self.on_missing) - set(FACILITIES))
        if unknown:
            raise SpecError(
                attempt="read on_missing",
                answer=f"{unknown[0]!r} is not a cap that a start can do without",
                remedy=did_you_mean(unknown[0], FACILITIES, f"Use: {', '.join(FACILITIES)}."),
            )

    @property
    def is_reviewed(self) -> bool:
        """Whether what it writes in its work directory is laid aside."""
        return self.workdir_mode is WorkdirMode.REVIEW and self.workdir != NO_WORKDIR

    def _check_root(self) -> None:
        if self.rootfs.startswith("/"):
            check_path("the root file system", self.rootfs)
        elif not _IMAGE_NAME.fullmatch(self.rootfs):
            raise SpecError(
                attempt=f"use {self.rootfs!r} as the root file system",
                answer="it is neither a path nor the name of an image",
                remedy='Write "host", an absolute path, or a name of letters, digits, ".", "_", '
                '"+" and "-".',
            )

    def _check_limits(self) -> None:
        backend = self.limits.disk_backend
        if self.keeps_layer and self.limits.disk_bytes and backend not in KEEPING:
            raise SpecError(
                attempt=f'use layer = "{self.layer.value}" with disk_backend = "{backend.value}"',
                answer="what is kept when a kernel has ended is limited in an image alone",
                remedy='Set layer or disk_backend to "auto".',
            )
        if self.is_reviewed and self.limits.limits_workdir:
            raise SpecError(
                attempt='use workdir_mode = "review" with workdir_limit',
                answer="what is laid aside lies outside of what that limits",
                remedy='Set workdir_mode to "direct", or leave out workdir_limit.',
            )

    def _check_kernel_user(self) -> None:
        attempt = 'use kernel_user = "root"'
        if self.is_root and not self.has_own_root:
            raise SpecError(
                attempt=attempt,
                answer="there is nothing to install into: the root file system is the host's",
                remedy="Set rootfs to an image or a directory of another system, or kernel_user to "
                '"user".',
            )
        if self.is_root and self.is_reviewed:
            raise SpecError(
                attempt=f'{attempt} with workdir_mode = "review"',
                answer="what is laid aside is kept by the owners that it has, and it would belong "
                "to root inside as well as to the work directory's owner",
                remedy='Set workdir_mode to "direct", or kernel_user to "user".',
            )

    @property
    def is_root(self) -> bool:
        """Whether its kernel is root in its box."""
        return self.kernel_user is KernelUser.ROOT

    @property
    def has_own_root(self) -> bool:
        """Whether its root file system is not the host's."""
        return self.rootfs != HOST_ROOT

    @property
    def writes_layer(self) -> bool:
        """Whether what a kernel writes into such a root goes into a layer over it."""
        return self.has_own_root and self.layer is not Layer.NONE

    @property
    def keeps_layer(self) -> bool:
        """Whether what it installs is kept on the disk."""
        return self.layer in {Layer.KERNEL, Layer.USER}

    def may_lack(self, facility: str) -> bool:
        """Whether the administrator accepts a start without *facility*."""
        return self.on_missing.get(facility) is OnMissing.WARN
