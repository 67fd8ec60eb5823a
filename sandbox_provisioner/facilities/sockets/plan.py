"""facilities/sockets/plan.py - pure: the folder in which the kernel and its clients meet.

It is bound writable, the kernel binds its five sockets, and PID 1 seals it (`launcher/init.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

from sandbox_provisioner.plan import CONNECTIONS, SOCKET_NAMES, SOCKETS, TAKE_REMEDY, Start, Step


def take(start: Start) -> Iterator[Step]:
    """The host's folder for them, if this is a Jupyter kernel."""
    if start.request.connection_file:
        words = (SOCKETS, start.site.sockets, "nosuid", "nodev", "noexec")
        yield Step("take", words, "the kernel's own sockets", TAKE_REMEDY)


def attach(start: Start) -> Iterator[Step]:
    """Where the kernel finds it."""
    if start.request.connection_file:
        yield Step("attach", (SOCKETS,))


def connection_file(start: Start) -> Iterator[Step]:
    """The file that the kernel reads."""
    if start.request.connection_file:
        name, text = start.request.connection_file
        ids = str(start.site.uid), str(start.site.gid)
        path = f"{CONNECTIONS}/{name}"
        yield Step(
            "private-file",
            (path, *ids, text),
            "its keys are its own",
            shown=(path, *ids, "(text)"),
        )


def seal(start: Start) -> Iterator[Step]:
    """As soon as the kernel listens."""
    if start.request.connection_file:
        why = "then nothing can swap a socket for a link to somebody else's"
        yield Step("seal-after", (SOCKETS, str(start.site.uid), *SOCKET_NAMES), why)
