"""warm/found.py - any process outside: nurseries and spares that are there, and what comes of them.

In the runtime directory, which only this user can enter; a key (`keys.py`) stands for all that its
kernels have from before the fork, one that belongs to a process for that one as well::

    <key>.nursery ──▶ <sandbox id>/requests    the socket that requests come through; the link is
                                               made when the nursery is ready
    <key>.building                             locked by whoever makes one
    <key>-<sandbox id>.spare ──▶ <sandbox id>/claims    the socket through which a spare is claimed
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from sandbox_provisioner.contract import WarmUnavailable
from sandbox_provisioner.control import control_pair
from sandbox_provisioner.descriptors import is_readable
from sandbox_provisioner.handle import LastWord
from sandbox_provisioner.inside import wire
from sandbox_provisioner.off_loop import off_loop
from sandbox_provisioner.performer import WORD_SECONDS, Performer
from sandbox_provisioner.plan import LaunchRequest, Site
from sandbox_provisioner.records import Record, RecordFolder, open_init
from sandbox_provisioner.warm.keys import mark_of

SOCKET = "requests"
CLAIMS = "claims"
_SPARE = ".spare"
_NURSERY = ".nursery"


# By the nursery's id.
_last_words: dict[str, LastWord] = {}


@dataclass(frozen=True, slots=True)
class Whose:
    """For whom it has to be: the user *uid*, whose server is in the sandbox *box*, "" for none. A
    key has it, too; but a key is short, and half of what it is made of is chosen by users."""

    uid: int
    box: str

    @classmethod
    def of(cls, request: LaunchRequest, site: Site) -> Whose:
        """Who asks for *request*."""
        return cls(site.facts.caller.uid, request.box)

    def has(self, record: Record) -> bool:
        """Whether what has that *record*, which only who launches can write, is theirs."""
        return (record.uid, record.box) == (self.uid, self.box)


@dataclass(frozen=True, slots=True)
class Nursery:
    """The source of performers that are its children: PID 1 of a box that is not there yet.
    *channel* was connected for one of them."""

    channel: socket.socket
    runtime: Path
    key: str
    record: Record
    is_of_init: ClassVar[bool] = True
    # Its part of a start takes some tens of milliseconds; without it one starts cold.
    patience_seconds: ClassVar[float] = 10.0

    def ask(self, performer: Performer) -> None:
        """Ask for a fork."""
        with self.channel, contextlib.suppress(ConnectionError):  # then `here` says so
            control, theirs = control_pair()
            with theirs:
                last_word = _last_words.setdefault(self.record.sandbox_id, LastWord())
                performer.connect(control, last_word)
                socket.send_fds(self.channel, [wire.message(wire.FORK)], [theirs.fileno()])

    async def here(self, performer: Performer) -> None:
        """Wait for the child; WarmUnavailable if the nursery does not answer soon, or has ended.
        One that does not answer nobody shall ask any more."""
        if await performer.is_heard():
            return
        if is_readable(performer.control.fileno()):
            raise WarmUnavailable("the nursery has ended", failed=True)
        _last_words.pop(self.record.sandbox_id, None)
        await off_loop(dismiss, self.runtime, self.key, self.record)
        why = f"the nursery has not answered for {WORD_SECONDS:g} s, and is given up"
        raise WarmUnavailable(why, failed=True)


@dataclass(frozen=True, slots=True)
class Spare:
    """The source of the one performer that is a spare's PID 1, at the other end of *channel*."""

    channel: socket.socket
    folder: RecordFolder
    record: Record
    is_of_init: ClassVar[bool] = True
    patience_seconds: ClassVar[float] = 3.0  # it attaches, covers, and wakes

    def ask(self, performer: Performer) -> None:
        """It is there."""
        performer.connect(self.channel)
        pidfd = open_init(self.record)
        known = self.record.init_pid, self.record.init_start
        performer.meet(*known, -1 if pidfd is None else pidfd)

    async def here(self, performer: Performer) -> None:
        """It is."""


def spares(runtime: Path, key: str) -> list[Path]:
    """The links to the spares for *key*, in no order."""
    names = [name for name in os.listdir(runtime) if name.startswith(f"{key}-")]
    return [runtime / name for name in names if name.endswith(_SPARE)]


def spare_link(runtime: Path, key: str, sandbox_id: str) -> Path:
    """Where a spare for *key* is found once it is ready."""
    return runtime / f"{key}-{sandbox_id}{_SPARE}"


def claim(runtime: Path, key: str, whose: Whose) -> Spare | None:
    """A spare for *key* that is ours now, by a connection that nobody else can have; or None."""
    for link in spares(runtime, key):
        try:
            path = runtime / os.readlink(link)
            link.unlink()  # who removes it may have it
            record = RecordFolder(path.parent).read()
        except (OSError, ValueError):
            continue
        if not whose.has(record):
            continue
        with contextlib.suppress(BlockingIOError):  # somebody else has connected to it
            channel = call(path)
            if channel is not None:
                return Spare(channel, RecordFolder(path.parent), record)
    return None


def link_of(runtime: Path, key: str) -> Path:
    """Where the nursery for *key* is found once it is ready."""
    return runtime / f"{key}{_NURSERY}"


def is_any(runtime: Path, owners: Sequence[str]) -> bool:
    """Whether any of *owners* has a nursery at all: without one nobody has to look for the right
    one."""
    marks = tuple(map(mark_of, owners))
    names = os.listdir(runtime)
    return any(name.endswith(_NURSERY) and name.startswith(marks) for name in names)


def leads_to(runtime: Path) -> set[str]:
    """The ids of the nurseries and spares that somebody can find."""
    found = set()
    for name in os.listdir(runtime):
        if name.endswith((_NURSERY, _SPARE)):
            with contextlib.suppress(OSError):
                found.add(os.path.dirname(os.readlink(runtime / name)))
    return found


def call(path: Path) -> socket.socket | None:
    """A connection to the nursery that listens at *path*, None if there is none (any more).

    BlockingIOError if so many wait already that another one would have to wait for his turn to
    wait: it does not answer.
    """
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        channel.setblocking(False)
        channel.connect(os.fspath(path))
        channel.setblocking(True)
    except BlockingIOError:
        channel.close()
        raise
    except OSError:
        channel.close()
        return None
    return channel


def forget(sandbox_id: str) -> None:
    """That nursery has ended, and nobody asks it any more."""
    _last_words.pop(sandbox_id, None)


def is_served(folder: Path) -> bool:
    """Whether the nursery of the record in *folder* can be asked."""
    try:
        channel = call(folder / SOCKET)
    except BlockingIOError:  # so many ask
        return True
    if channel:
        channel.close()
    return channel is not None


def find(runtime: Path, key: str, whose: Whose) -> Nursery | None:
    """The nursery for *key*; None without one."""
    link = link_of(runtime, key)
    try:
        path = runtime / os.readlink(link)
        record = RecordFolder(path.parent).read()
    except (OSError, ValueError):
        return None
    if not whose.has(record):
        return None
    try:
        channel = call(path)
    except BlockingIOError:
        dismiss(runtime, key, record)
        return None
    if channel is None:
        with contextlib.suppress(OSError):
            link.unlink()
        return None
    return Nursery(channel, runtime, key, record)


def dismiss(runtime: Path, key: str, nursery: Record) -> None:
    """Let nobody find a *nursery* that does not answer, and end it; its kernels stay, and so does
    its PID 1, in whose namespace they are."""
    link = link_of(runtime, key)
    with contextlib.suppress(OSError):
        if os.readlink(link) == f"{nursery.sandbox_id}/{SOCKET}":
            link.unlink()
    pidfd = open_init(nursery)
    if pidfd is not None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, wire.relayed(signal.SIGKILL))
        os.close(pidfd)
