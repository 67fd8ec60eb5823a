"""metrics.py - in who launches, where somebody asks for metrics: what Prometheus scrapes.

Nobody on the way of an ordinary start imports this file, or prometheus_client. What happens is
counted as it happens; what runs, and what it uses, is looked at when somebody scrapes. Only for
whom something runs, or has run since this process began, is there a series by user. Names and
units stand in docs/metrics.md.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sandbox_provisioner import audit
from sandbox_provisioner.errors import (
    HostError,
    InternalError,
    LaunchError,
    SandboxError,
    SpecError,
)
from sandbox_provisioner.facilities.caps.cgroup import Usage, open_existing
from sandbox_provisioner.policy.terms import NoRoom, NotAllowed, PolicyError
from sandbox_provisioner.records import (
    OF_NOBODY,
    SERVER,
    UNREADABLE,
    Record,
    all_records,
    cgroup_facts,
    held,
)
from sandbox_provisioner.story import ExitStory
from sandbox_provisioner.told import EndKind

_PREFIX = "sandbox_provisioner"
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_REASONS: dict[type[SandboxError], str] = {
    NotAllowed: "policy",
    NoRoom: "no-room",
    PolicyError: "policy-file",
    SpecError: "options",
    HostError: "host",
    LaunchError: "start",
    InternalError: "mistake",
}
# How long one scrape looks at groups; those that are left have the use of the scrape before.
_A_SCRAPE_SECONDS = 1.0
# So many users have series of their own, all others one.
_MOST_USERS = 1000
_OTHERS = "(others)"
Running = Callable[[], Iterable[Record]]
_Start = tuple[str, float]


class Metrics(Collector):
    """In *registry*: what this process starts, refuses and ends, and what is *running* of it."""

    def __init__(self, running: Running, registry: CollectorRegistry = REGISTRY) -> None:
        self._running = running
        self._registry = registry
        self._cpu = _CpuSeconds()
        self._users: set[str] = set()
        self._starts = Histogram(
            f"{_PREFIX}_start_duration_seconds",
            "From being asked for a sandbox until its program runs",
            ("kind", "how"),
            buckets=_SECONDS,
            registry=registry,
        )
        self._refusals = Counter(
            f"{_PREFIX}_refusals", "Starts that came to nothing", ("reason",), registry=registry
        )
        self._ends = Counter(
            f"{_PREFIX}_ends", "Sandboxes that have ended", ("kind", "cause"), registry=registry
        )
        for reason in _REASONS.values():
            self._refusals.labels(reason)
        registry.register(self)
        audit.listen(self)

    def close(self) -> None:
        """Take all of it out of the registry."""
        audit.forget(self)
        for collector in (self, self._starts, self._refusals, self._ends):
            self._registry.unregister(collector)

    # -- what happens

    def started(self, record: Record, seconds: float, how: str) -> None:
        self._starts.labels(record.kind, how).observe(seconds)
        for cause in EndKind:  # a counter that begins with its first event has no increase
            self._ends.labels(record.kind, str(cause))

    def refused(self, error: SandboxError) -> None:
        self._refusals.labels(_reason(error)).inc()

    def ended(self, record: Record, story: ExitStory) -> None:
        self._ends.labels(record.kind, str(story.kind)).inc()
        self._cpu.note(record, self._label(record), story.cpu_seconds)

    # -- what runs

    def describe(self) -> Iterable[Metric]:
        """Asked when we are registered: nobody has to look for what runs by then."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Called at each scrape, in whichever thread."""
        count: Tally[tuple[str, str]] = Tally()
        memory: Tally[str] = Tally()
        until = time.monotonic() + _A_SCRAPE_SECONDS
        records = list(self._running())
        for record in records:
            user = self._label(record)
            usage = _usage(record) if time.monotonic() < until else Usage()
            count[user, record.kind] += 1
            memory[user] += usage.memory_bytes or 0
            self._cpu.note(record, user, usage.cpu_seconds)
        running, used, cpu = _families()
        for labels, number in count.items():
            running.add_metric(labels, number)
        for user, number in memory.items():
            used.add_metric((user,), number)
        for user, seconds in self._cpu.totals(set(map(_start_of, records))).items():
            cpu.add_metric((user,), seconds)
        yield from (running, used, cpu)

    def _label(self, record: Record) -> str:
        user = record.person or record.user
        if user not in self._users and len(self._users) >= _MOST_USERS:
            return _OTHERS
        self._users.add(user)
        return user


def _families() -> tuple[GaugeMetricFamily, GaugeMetricFamily, CounterMetricFamily]:
    return (
        GaugeMetricFamily(
            f"{_PREFIX}_sandboxes", "Sandboxes that run now", labels=("user", "kind")
        ),
        GaugeMetricFamily(
            f"{_PREFIX}_memory_bytes", "Memory that sandboxes use now", labels=("user",)
        ),
        CounterMetricFamily(
            f"{_PREFIX}_cpu_seconds", "CPU time that sandboxes have used", labels=("user",)
        ),
    )


class _CpuSeconds:
    """By users, what their sandboxes have used, those too that have ended: it only grows. A restart
    is another start of the same sandbox, and begins with nothing."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: dict[_Start, tuple[str, float]] = {}  # of each that is counted by itself
        self._missed: set[_Start] = set()  # of these, what ran no more at the last scrape
        self._before: Tally[str] = Tally()  # by users, of all that have ended

    def note(self, record: Record, user: str, seconds: float | None) -> None:
        """*record* of the *user* has used so much by now."""
        with self._lock:
            start = _start_of(record)
            known = self._last.get(start, (user, 0.0))[1]
            self._last[start] = user, max(known, seconds or 0.0)

    def totals(self, running: set[_Start]) -> dict[str, float]:
        """By users; those that are not *running* any more are added up a scrape later: somebody may
        tell of their ends when nobody lists them any more."""
        with self._lock:
            missed = self._last.keys() - running
            for start in missed & self._missed:
                user, seconds = self._last.pop(start)
                self._before[user] += seconds  # type: ignore[assignment]
            self._missed = missed - self._missed
            found: dict[str, float] = dict(self._before)
            for user, seconds in self._last.values():
                found[user] = found.get(user, 0.0) + seconds
            return found


def _start_of(record: Record) -> _Start:
    return record.sandbox_id, record.started


def _reason(error: SandboxError) -> str:
    return next(_REASONS[kind] for kind in type(error).__mro__ if kind in _REASONS)


def _usage(record: Record) -> Usage:
    with contextlib.suppress(SandboxError, OSError, ValueError):
        return open_existing(cgroup_facts(record), record.tree).usage()
    return Usage()


# -- whose they are


def of_this_process() -> Iterator[Record]:
    """What a server has started itself."""
    for folder in list(held):
        with contextlib.suppress(*UNREADABLE):
            record = folder.read()
            if record.kind not in OF_NOBODY:
                yield record


def servers_in(runtime: Path) -> Iterator[Record]:
    """The servers that hubs have started."""
    return (record for _, record in all_records(runtime) if record.kind == SERVER)


# -- as an extension of jupyter_server, which shows them at /metrics


def _jupyter_server_extension_points() -> list[dict[str, str]]:
    return [{"module": __name__}]


def _load_jupyter_server_extension(server: Any) -> None:
    """Called once, by a server whose configuration names us."""
    Metrics(of_this_process)
    server.log.info("Sandboxes are counted, and told at /metrics.")
