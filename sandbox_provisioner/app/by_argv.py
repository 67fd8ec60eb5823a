"""app/by_argv.py - a process of its own, the user's: a kernel that a front end started by its argv.

Such a front end (VS Code, nteract) knows nothing of provisioners. It writes a connection file with
five TCP ports, runs the argv of a kernel.json, signals that process, and waits for its end. We are
that process: the kernelspec whose argv it is says what box the kernel gets; a kernel manager starts
it there as in a server; and `Carrier` lets the front end come by its ports.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, cast

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from tornado.web import HTTPError

from sandbox_provisioner.app.command import (
    SandboxCommand,
    provisioner_name_of,
    spoken,
    stanza_of,
    working_directory,
)
from sandbox_provisioner.app.run import Signals, status_of
from sandbox_provisioner.carrier import Carrier
from sandbox_provisioner.errors import COMMAND, SandboxError, SpecError
from sandbox_provisioner.meeting import PORTS
from sandbox_provisioner.options import PROVISIONER
from sandbox_provisioner.provisioner import SandboxProvisioner, StartRefused
from sandbox_provisioner.unboxed import words_of_ours

CONNECTION_FILE = "{connection_file}"
_POLL_SECONDS = 3.0  # as jupyter_client's restarter
_LONGEST_FILE = 1 << 16
_ATTEMPT = "start a sandboxed kernel whose argv was run by itself"
_USE = (
    "Use a front end that starts kernels through jupyter_client (JupyterLab, Notebook, nbconvert, "
    "papermill), or connect this one to a Jupyter server."
)


@dataclass(frozen=True, slots=True)
class Asked:
    """The kernelspec *name*, whose argv we are, with the *connection_file* that was written for it,
    and the words *more* that were put behind it."""

    name: str
    connection_file: str
    more: tuple[str, ...]


def run_by_argv(words: list[str]) -> NoReturn:
    """Start the kernel that the argv with *words* behind our name is of, and end as it does."""
    app = SandboxCommand()
    try:
        app.initialize([])
        asked = _asked(KernelSpecManager(parent=app), words)
        status = asyncio.run(_run(app, asked))
    except SandboxError as error:
        print(spoken(error.for_people()), file=sys.stderr)
        status = 1
    except StartRefused:
        status = 1  # the provisioner's log has said why
    except HTTPError as error:
        print(spoken(str(error)), file=sys.stderr)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # a thread of ZeroMQ's may hold back what nobody reads any more


# -- what was asked for


def _asked(specs: KernelSpecManager, words: Sequence[str]) -> Asked:
    """SpecError unless the argv is one installed sandboxed kernel's."""
    found = list(_matches(specs, words))
    boxes = {json.dumps([stanza_of(spec.metadata), spec.env], sort_keys=True) for _, spec in found}
    if len(boxes) > 1:
        names = ", ".join(asked.name for asked, _ in found)
        raise SpecError(
            attempt=_ATTEMPT,
            answer=f"it may be any of {names}, whose sandboxes differ",
            remedy=("Install them anew, which writes their names into their argv:",
                    f"{COMMAND}jupyter sandbox install --kernel KERNEL --name NAME --replace"),
        )  # fmt: skip
    if not found:
        raise SpecError(
            attempt=_ATTEMPT,
            answer="no installed sandboxed kernel has this argv, and a kernel.json says what box "
            "its kernel gets",
            remedy=_USE,
        )
    return found[0][0]


def _matches(specs: KernelSpecManager, words: Sequence[str]) -> Iterator[tuple[Asked, KernelSpec]]:
    for name, model in sorted(specs.get_all_specs().items()):
        metadata, argv = model["spec"]["metadata"], model["spec"]["argv"]
        if provisioner_name_of(metadata) != PROVISIONER:
            continue
        for own in _spellings(words_of_ours(argv)):
            connection = _connection_file(own, words, model["resource_dir"])
            if connection:
                asked = Asked(name, connection, tuple(words[len(own) :]))
                yield asked, specs.get_kernel_spec(name)


def _spellings(own: list[str]) -> Iterator[list[str]]:
    """A kernelspec's *own* words as they stand, and as VS Code's Jupyter extension runs those of
    Python's kernels (addPythonConnectionArgs in its kernelProcess.node.ts): without the word that
    has the connection file and the one before it, and with --f= behind all."""
    yield own
    place = next((place for place, word in enumerate(own) if CONNECTION_FILE in word), 0)
    if place:
        yield [*own[: place - 1], *own[place + 1 :], f"--f={CONNECTION_FILE}"]


def _connection_file(own: Sequence[str], words: Sequence[str], resource_dir: str) -> str:
    """What stands in *words* where a kernelspec's *own* have {connection_file}; "" if they are not
    the same otherwise."""
    if not own or len(words) < len(own):
        return ""
    found = ""
    places = {"resource_dir": resource_dir, "prefix": sys.prefix}
    for pattern, word in zip(own, words, strict=False):
        text = re.escape(pattern)
        for name, path in places.items():
            here = re.escape(f"{{{name}}}")
            text = text.replace(here, f"(?:{here}|{re.escape(path)})")
        match = re.fullmatch(text.replace(re.escape(CONNECTION_FILE), "(.+)"), word, re.DOTALL)
        if match is None:
            return ""
        found = match[1] if match.groups() else found
    return _unquoted(found)


def _unquoted(path: str) -> str:
    """VS Code puts a path with blanks into quotes, and no shell takes them off."""
    is_quoted = len(path) > 2 and path[0] == path[-1] == '"'
    return path[1:-1] if is_quoted else path


def _connection(path: str) -> dict[str, Any]:
    """What the front end has written for the kernel; SpecError if that cannot be meant."""
    try:
        with open(path, "rb") as file:
            info = json.loads(file.read(_LONGEST_FILE))
        ports = [info[name] for name in PORTS]
        is_meant = all(isinstance(port, int) and 0 < port < 1 << 16 for port in ports)
        is_meant = is_meant and isinstance(info["ip"], str) and isinstance(info["key"], str)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise _bad_connection(path, str(error)) from None
    if not is_meant:
        raise _bad_connection(path, "it names no address, five ports and a key")
    return dict(info)


def _bad_connection(path: str, answer: str) -> SpecError:
    return SpecError(
        attempt=f"read the connection file {path}",
        answer=answer,
        remedy="The front end has to write it before it starts the kernel.",
    )


# -- the kernel


async def _run(app: SandboxCommand, asked: Asked) -> int:
    info = _connection(asked.connection_file)
    manager = _manager(app, asked, info)
    carrier = None
    if info.get("transport", "tcp") == "tcp":
        carrier = Carrier(info["ip"], {name: info[name] for name in PORTS})
    else:  # the kernel's own; `MeetingPlace.link` makes the paths that were asked for
        for name in ("transport", "ip", *PORTS):
            setattr(manager, name, info[name])
    signals = Signals()
    try:
        await manager.start_kernel(
            extra_arguments=list(asked.more), env=dict(os.environ), cwd=working_directory()
        )
        provisioner = manager.provisioner
        assert isinstance(provisioner, SandboxProvisioner)
        assert provisioner.handle
        signals.relay_to(provisioner.handle)
        if carrier:
            await carrier.serve(_paths(provisioner))
        async with _ended_with_front_end(provisioner):
            await _until_it_ends(provisioner, signals)
        assert provisioner.story
        return status_of(provisioner.story)
    finally:
        if manager.has_kernel:
            await manager.cleanup_resources()
        if carrier:
            await carrier.end()


def _manager(app: SandboxCommand, asked: Asked, info: dict[str, Any]) -> AsyncKernelManager:
    """One whose kernel has the keys that the front end chose."""
    manager = AsyncKernelManager(kernel_name=asked.name, parent=app)
    keys = {name: info[name] for name in info if name == "signature_scheme" or "key" in name}
    manager.load_connection_info(cast(KernelConnectionInfo, keys))
    return manager


def _paths(provisioner: SandboxProvisioner) -> dict[str, str]:
    """The kernel's sockets by the names of ports."""
    assert provisioner.handle
    place = provisioner.handle.meeting.for_clients
    return {name: f"{place['ip']}-{place[name]}" for name in PORTS}


async def _until_it_ends(provisioner: SandboxProvisioner, signals: Signals) -> None:
    """As a server's restarter does, and at once."""
    while await provisioner.poll() is None:
        if handle := provisioner.handle:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(handle.wait(), _POLL_SECONDS)
        if signals.asked_to_end:
            await provisioner.shutdown_requested()


@contextlib.asynccontextmanager
async def _ended_with_front_end(provisioner: SandboxProvisioner) -> Any:
    """Front ends that want a kernel to end with them name their pid, and a kernel looks whether
    that is still its parent: JPY_PARENT_PID of jupyter_client's launcher."""
    pidfd = _front_end(os.environ.get("JPY_PARENT_PID", ""))
    loop = asyncio.get_running_loop()

    def gone() -> None:
        loop.remove_reader(pidfd)
        if provisioner.handle:
            provisioner.handle.kill()

    if pidfd >= 0:
        loop.add_reader(pidfd, gone)
    try:
        yield
    finally:
        if pidfd >= 0:
            loop.remove_reader(pidfd)
            os.close(pidfd)


def _front_end(text: str) -> int:
    """A descriptor of our parent, -1 if *text* is not its pid."""
    parent = os.getppid()
    if text != str(parent):
        return -1
    try:
        pidfd = os.pidfd_open(parent)
    except OSError:
        return -1
    return pidfd if os.getppid() == parent else _closed(pidfd)


def _closed(pidfd: int) -> int:
    os.close(pidfd)
    return -1
