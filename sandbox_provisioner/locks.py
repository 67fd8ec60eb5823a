"""locks.py - any process outside: locks in a runtime directory, which the Linux kernel lets go of
when who holds them dies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from sandbox_provisioner.errors import HostError

# It is held for a few reads and writes of small files.
_LOCK_SECONDS = 10
_LOCK_AGAIN_SECONDS = 0.005


class Locked(HostError):
    """Somebody holds a lock for too long."""


def lock(path: Path, operation: int, *, make: bool = True) -> int:
    """Lock *path* by *operation* of flock(2); the descriptor that has it."""
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        fd = os.open(path, flags | os.O_RDWR | (os.O_CREAT if make else 0), 0o600)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        fd = os.open(path, flags | os.O_RDONLY)  # it was made before, and can still be locked
    try:
        fcntl.flock(fd, operation)
    except OSError:
        os.close(fd)
        raise
    return fd


@contextlib.contextmanager
def locked(runtime: Path) -> Iterator[None]:
    """Have the directory *runtime* for oneself meanwhile."""
    try:
        fd = lock_soon(runtime / "lock")
    except FileNotFoundError:
        # The whole directory has gone, and with it everybody whom the lock is for.
        yield
        return
    try:
        yield
    finally:
        unlock(fd)


def lock_soon(path: Path, *, make: bool = True) -> int:
    """Lock *path*; HostError if somebody holds it for longer than any of us ever needs to."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            return lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB, make=make)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise Locked(
                    attempt=f"lock {path}",
                    answer=f"another process has held it for {_LOCK_SECONDS} s",
                    remedy="See /proc/locks for who it is; end it if it hangs.",
                ) from None
        time.sleep(_LOCK_AGAIN_SECONDS)  # flock(2) has no timeout, and no event to wait for


def lock_at_once(path: Path) -> int:
    """Lock *path*, which is there; BlockingIOError if somebody has it, and not only looks
    (`is_free`)."""
    while True:
        try:
            return lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB, make=False)
        except BlockingIOError:
            if not is_free(path):
                raise
        time.sleep(_LOCK_AGAIN_SECONDS)


def unlock(fd: int) -> None:
    """flock(2): closing is not enough, since a child that somebody forked meanwhile (a thread with
    multiprocessing) has the same open file, and would hold the lock for as long as it lives."""
    fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def is_free(path: Path) -> bool:
    """Whether nobody holds the lock *path*, but who looks as we do."""
    try:
        unlock(lock(path, fcntl.LOCK_SH | fcntl.LOCK_NB))
    except OSError:
        return False
    return True
