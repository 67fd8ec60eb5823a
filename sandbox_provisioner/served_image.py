"""served_image.py - in the launching process: mounts an image file for an ordinary user.

A launcher of its own does it in a user namespace (`facilities/root/inside/served.py`), and hands
the mount out; the program that answers for it ends when nobody has that any more. Whoever looks
into the mount waits for that program, in Linux, where nobody can be interrupted: so it is ended
where it does not answer, and all who wait for it get an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

from sandbox_provisioner import orders
from sandbox_provisioner.errors import COMMAND, HostError
from sandbox_provisioner.facilities.root.facts import RootFacts
from sandbox_provisioner.host import HostFacts
from sandbox_provisioner.performer import Performer, signal_to
from sandbox_provisioner.stem import stem

PROGRAM = "squashfuse"
# A look into an image takes it some milliseconds. What it is ended for takes for ever.
_ANSWER_SECONDS = 20.0
# Not from PATH, where a kernel may have put one.
_FOLDERS = ("/usr/bin", "/bin", "/usr/local/bin", "/run/current-system/sw/bin")


def program() -> str:
    """The path of what reads image files, "" where there is none."""
    paths = (f"{folder}/{PROGRAM}" for folder in _FOLDERS)
    return next((path for path in paths if os.access(path, os.X_OK)), "")


def served(root: RootFacts, facts: HostFacts, opened: ExitStack) -> RootFacts:
    """*root* with its image file mounted, until *opened* closes; HostError where that cannot be."""
    attempt = f"mount {root.wish} as a root file system"
    assert root.kind
    assert root.place
    if root.kind.filesystem != "squashfs":
        raise _refused(attempt, f"it is a file of {root.kind.filesystem}", ())
    path = program()
    if not path:
        install = f"{COMMAND}sudo apt install {PROGRAM}"
        raise _refused(attempt, f"there is no {PROGRAM}, which reads such a file", (install,))
    with ThreadPoolExecutor(1) as own:  # the caller's may run a loop already
        fds = own.submit(asyncio.run, _mounted(facts, path, root.place.fd, attempt)).result()
    for fd in fds:
        opened.callback(os.close, fd)
    server_fd, mount_fd = fds
    root = replace(root, server_fd=server_fd, mount_fd=mount_fd)
    with answering(root):
        try:
            os.close(os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount_fd))
        except OSError as error:
            raise HostError(
                attempt=attempt,
                answer=f"{PROGRAM} cannot read it ({error.strerror})",
                remedy="It may be damaged, or compressed in a way that this one does not know.",
            ) from None
    return root


@contextlib.contextmanager
def answering(root: RootFacts) -> Iterator[None]:
    """Look into *root* meanwhile; HostError where the program that reads it does not answer, which
    is ended then."""
    if root.server_fd < 0:
        yield
        return
    ended = threading.Event()

    def end() -> None:
        ended.set()
        signal_to(root.server_fd, signal.SIGKILL)

    timer = threading.Timer(_ANSWER_SECONDS, end)
    timer.daemon = True
    timer.start()
    silent = HostError(
        attempt=f"read {root.wish}, the root file system",
        answer=f"{PROGRAM}, which reads it for this user, has not answered for "
        f"{_ANSWER_SECONDS:g} seconds",
        remedy="See whether the file can be read at all (it may lie on a file server that does "
        f"not answer): unsquashfs -s {root.wish}",
    )
    try:
        yield
    except Exception as error:
        if ended.is_set():
            raise silent from error
        raise
    finally:
        timer.cancel()
    if ended.is_set():
        raise silent


def _refused(attempt: str, answer: str, first: tuple[str, ...]) -> HostError:
    return HostError(
        attempt=attempt,
        answer=f"Linux lets nobody but root mount a file, and {answer}",
        remedy=(
            *first,
            "Or show the kernel a directory, such as unsquashfs makes one: rootfs = DIRECTORY.",
            "Or have root start it, by a server of root's or the broker.",
        ),
    )


async def _mounted(facts: HostFacts, path: str, file: int, attempt: str) -> list[int]:
    performer = Performer()
    try:
        performer.ask(stem)
        await performer.here()
        plan = orders.compile_served_image(facts, path)
        performer.begin(plan, (file,))
        fds = await performer.opened()
        if not fds:
            failure = performer.report.failure
            step = plan.steps[failure.step - 1] if failure else plan.steps[0]
            raise HostError(
                attempt=attempt,
                answer=failure.text if failure else "the launcher for it has ended",
                remedy=step.remedy or "See: jupyter sandbox doctor",
            )
        return fds
    finally:
        await performer.end()
