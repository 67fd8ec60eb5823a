"""stages.py - in the launching process: the parts of a start that happen here, by their names.

The steps of a plan have names, too; they happen in other processes. Where `wire.FAIL_AT` names one
of either, a start fails there: so tests see that whatever was made before is undone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator

from sandbox_provisioner.errors import LaunchError
from sandbox_provisioner.inside import wire

# Those that make something, which a later one has to undo.
SERVER_STEPS = ("spawn-launcher", "make-record", "make-image", "create-cgroup", "write-record")
_log = logging.getLogger(__name__)
_listeners: list[Callable[[str], object]] = []


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Do the part of a start that is called *name*; whoever listens hears when it is done."""
    fail_here(name)
    began = time.monotonic()
    yield
    for listen in _listeners:
        listen(name)
    _log.debug("%s: %.1f ms", name, 1e3 * (time.monotonic() - began))


@contextlib.contextmanager
def heard_by(listen: Callable[[str], object]) -> Iterator[None]:
    """Call *listen* with the name of each stage, of whatever start, that is done meanwhile."""
    _listeners.append(listen)
    try:
        yield
    finally:
        _listeners.remove(listen)


def fail_at() -> str:
    """The stage or step at which a start is to fail, "" if none is."""
    return os.environ.get(wire.FAIL_AT, "")


def fail_here(name: str) -> None:
    """LaunchError if a start is to fail at the stage *name*."""
    try:
        wire.fail_as_wished(fail_at(), name)
    except OSError as error:
        raise LaunchError(
            attempt="start the sandbox",
            answer=str(error.strerror),
            remedy=f"Unset {wire.FAIL_AT}.",
            step=name,
        ) from None
