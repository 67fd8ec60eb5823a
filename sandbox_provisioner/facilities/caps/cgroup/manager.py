"""manager.py - in the launching process: systemd's own interface, as far as scopes need it.

org.freedesktop.systemd1(5), spoken over the bus of the system or of the user. A connection lives as
long as one call: a server starts few kernels, and no descriptor stays behind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from jeepney import DBusAddress, DBusErrorResponse, MatchRule, message_bus, new_method_call
from jeepney.io.blocking import DBusConnection, open_dbus_connection
from jeepney.wrappers import unwrap_msg

from sandbox_provisioner.errors import HostError
from sandbox_provisioner.facilities.caps.cgroup.remedies import MANAGER_REMEDIES
from sandbox_provisioner.facilities.caps.cgroup.survey import bus_path
from sandbox_provisioner.facilities.caps.wish.cap import Property

_SYSTEMD = DBusAddress(
    "/org/freedesktop/systemd1",
    bus_name="org.freedesktop.systemd1",
    interface="org.freedesktop.systemd1.Manager",
)
_SECONDS = 20.0


def start_scope(manager: str, unit: str, properties: Sequence[Property]) -> None:
    """Start the transient *unit*, with the processes in its PIDs; returns when they are in it.

    Raises HostError if the manager cannot be reached, refuses, or fails.
    """
    attempt = f"start {unit} of systemd's {manager} manager"
    with _talk(manager, attempt) as bus, bus.filter(_JOB_REMOVED, bufsize=64) as ended:
        bus.send(message_bus.AddMatch(_JOB_REMOVED))
        bus.send(new_method_call(_SYSTEMD, "Subscribe"))
        words: tuple[Any, ...] = (unit, "fail", list(properties), [])
        call = new_method_call(_SYSTEMD, "StartTransientUnit", "ssa(sv)a(sa(sv))", words)
        (job,) = unwrap_msg(bus.send_and_get_reply(call, timeout=_SECONDS))
        while True:
            _, path, _, result = bus.recv_until_filtered(ended, timeout=_SECONDS).body
            if path == job:
                break
        if result != "done":
            raise HostError(
                attempt=attempt,
                answer=f"its job ended with {result!r}",
                remedy=f"See: journalctl{_flag(manager)} --unit {unit}",
            )


def stop_unit(manager: str, unit: str) -> None:
    """Let the manager end *unit*; one that is gone is fine. Raises HostError, does not wait."""
    with _talk(manager, f"stop {unit} of systemd's {manager} manager") as bus:
        call = new_method_call(_SYSTEMD, "StopUnit", "ss", (unit, "replace"))
        try:
            unwrap_msg(bus.send_and_get_reply(call, timeout=_SECONDS))
        except DBusErrorResponse as error:
            if error.name != "org.freedesktop.systemd1.NoSuchUnit":
                raise


_JOB_REMOVED = MatchRule(
    type="signal",
    interface="org.freedesktop.systemd1.Manager",
    member="JobRemoved",
    path="/org/freedesktop/systemd1",
)


@contextlib.contextmanager
def _talk(manager: str, attempt: str) -> Iterator[DBusConnection]:
    """A connection whose failures tell *attempt*."""
    remedy = MANAGER_REMEDIES[manager]
    try:
        with open_dbus_connection(f"unix:path={bus_path(manager)}", auth_timeout=_SECONDS) as bus:
            yield bus
    except DBusErrorResponse as error:
        words = " ".join(map(str, error.data))
        raise HostError(
            attempt=attempt,
            answer=f"{error.name}: {words}",
            remedy=f"See: journalctl{_flag(manager)}, and jupyter sandbox doctor",
        ) from error
    except TimeoutError as error:
        answer = f"no answer within {_SECONDS:g} seconds"
        raise HostError(attempt=attempt, answer=answer, remedy=remedy) from error
    except OSError as error:
        answer = f"{bus_path(manager)}: {error.strerror or error}"
        raise HostError(attempt=attempt, answer=answer, remedy=remedy) from error


def _flag(manager: str) -> str:
    return " --user" if manager == "user" else ""
