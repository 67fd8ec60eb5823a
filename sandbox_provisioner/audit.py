"""audit.py - in who launches: a line for each start, refusal, change and end, as the policy has it.

Whoever counts them (`metrics.py`) listens here, whether lines are written or not. Where the lines
go stands in the policy (``audit``): a file, to which each is added by one write(2); the log; or
systemd's journal. A line is one JSON object, whose fields docs/policy.md tells. What cannot be
written is told in the log, and keeps nobody from starting.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import pwd
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Protocol

from sandbox_provisioner.errors import SandboxError
from sandbox_provisioner.inside.printable import one_line
from sandbox_provisioner.policy.current import audit_place
from sandbox_provisioner.policy.meaning import fields_of, governed, reach
from sandbox_provisioner.policy.narrow import described
from sandbox_provisioner.policy.read import TO_JOURNAL, TO_LOG
from sandbox_provisioner.records import Record
from sandbox_provisioner.spec import SandboxSpec
from sandbox_provisioner.story import ExitStory

JOURNAL = "/run/systemd/journal/socket"
_log = logging.getLogger(__name__)
# Lists that every kernel has, and that no line needs.
_UNTOLD = ("covers.",)
_LONG = {"asked", "given"}


class Listener(Protocol):
    """Who hears of starts, refusals and ends, from whichever thread."""

    def started(self, record: Record, seconds: float, how: str) -> None:
        """*record* runs, since *seconds* after somebody asked for it."""
        ...

    def refused(self, error: SandboxError) -> None:
        """A start came to nothing."""
        ...

    def ended(self, record: Record, story: ExitStory) -> None:
        """*record* runs no more."""
        ...


_listeners: list[Listener] = []


def listen(listener: Listener) -> None:
    """Let *listener* hear of all that happens from now on."""
    _listeners.append(listener)


def forget(listener: Listener) -> None:
    """Let it hear no more."""
    _listeners.remove(listener)


def _is_wanted() -> bool:
    """Only of what root's processes do: what another one says of itself is its own word."""
    return os.geteuid() == 0 and bool(audit_place())


def started(
    record: Record, asked: SandboxSpec | None, given: SandboxSpec, *, seconds: float, how: str
) -> None:
    """*record* runs: *asked* is what was wished before a policy narrowed it, None if nothing was
    narrowed. It took *seconds*, and began *how*: "cold", from a "nursery" or as a "spare"."""
    for listener in _listeners:
        listener.started(record, seconds, how)
    if _is_wanted():
        told = {
            "asked": _options(asked or given, set_alone=True),
            "given": _options(given),
            "seconds": round(seconds, 4),
            "how": how,
        }
        _note("start", record, **told)


def refused(error: SandboxError, *, person: str, name: str, asked: SandboxSpec | None) -> None:
    """A start for *person* of what is called *name* came to nothing."""
    for listener in _listeners:
        listener.refused(error)
    if _is_wanted():
        wished = _options(asked, set_alone=True) if asked else {}
        _write("refusal", {"person": person, "name": name, "asked": wished, "error": str(error)})


def changed(record: Record, told: str) -> None:
    """*record*, which runs, is changed now."""
    if _is_wanted():
        _note("change", record, given=told)


def ended(record: Record, story: ExitStory) -> None:
    """*record* runs no more."""
    for listener in _listeners:
        listener.ended(record, story)
    if _is_wanted():
        told = asdict(story)
        del told["stderr_tail"], told["network"]  # a kernel's own words, and its guests'
        traffic = story.network
        used = {"up_bytes": traffic.up_bytes, "down_bytes": traffic.down_bytes} if traffic else None
        _note("end", record, story={**told, "kind": str(story.kind), "network": used})


def _options(spec: SandboxSpec, *, set_alone: bool = False) -> dict[str, str]:
    """By options, what *spec* has, as people read it; with *set_alone* those that somebody set."""
    found = {}
    for option in governed():
        fields = {path: reach(spec, path) for path in fields_of(option)}
        is_told = not any(path.startswith(_UNTOLD) for path in fields)
        if is_told and not (set_alone and option in spec.untouched):
            found[option] = described(fields)
    return found


def _note(event: str, record: Record, **more: Any) -> None:
    about = {
        "person": record.person or record.user,
        "sandbox_id": record.sandbox_id,
        "kernel_id": record.kernel_id,
        "kind": record.kind,
        "name": record.name,
        "notebook": record.notebook,
    }
    _write(event, {**about, **more})


def _write(event: str, fields: Mapping[str, Any]) -> None:
    now = round(time.time(), 3)
    line = json.dumps({"time": now, "event": event, "by": _by(), **fields})
    place = audit_place()
    try:
        if place == TO_LOG:
            _log.info("%s", line)
        elif place == TO_JOURNAL:
            try:
                _to_journal(line, event, fields)
            except OSError as error:
                if error.errno != errno.EMSGSIZE:
                    raise
                # More than a datagram may have (socket(7), wmem_default): the rest is told.
                short = {name: fields[name] for name in fields if name not in _LONG} | {"cut": True}
                line = json.dumps({"time": now, "event": event, "by": _by(), **short})
                _to_journal(line, event, fields)
        else:
            _to_file(place, line)
    except OSError as error:
        _log.warning("The audit could not be written to %s: %s", place, one_line(str(error)))


def _by() -> str:
    """Whose process this is."""
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(os.geteuid()).pw_name
    return str(os.geteuid())


def _to_file(path: str, line: str) -> None:
    """Opened anew each time: somebody may have moved it away meanwhile (logrotate(8))."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC
    fd = os.open(path, flags | os.O_NONBLOCK, 0o600)
    try:
        os.write(fd, f"{line}\n".encode())
    finally:
        os.close(fd)


def _to_journal(line: str, event: str, fields: Mapping[str, Any]) -> None:
    """systemd's native protocol: a line a field; JSON has no line ends of its own."""
    told = {
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": "jupyter-sandbox",
        "SANDBOX_EVENT": event,
        "SANDBOX_PERSON": one_line(str(fields.get("person", ""))),
        "MESSAGE": line,
    }
    text = "".join(f"{name}={value}\n" for name, value in told.items())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.setblocking(False)
        channel.sendto(text.encode(), JOURNAL)
