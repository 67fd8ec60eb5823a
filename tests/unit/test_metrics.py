"""What Prometheus is told, of things that only seem to happen."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from sandbox_provisioner import audit, metrics
from sandbox_provisioner.errors import (
    HostError,
    InternalError,
    LaunchError,
    SandboxError,
    SpecError,
)
from sandbox_provisioner.facilities.caps.cgroup import Usage
from sandbox_provisioner.policy.terms import NoRoom, NotAllowed, PolicyError
from sandbox_provisioner.records import Record
from sandbox_provisioner.spec import SandboxSpec
from sandbox_provisioner.story import ExitStory
from sandbox_provisioner.told import EndKind

P = "sandbox_provisioner"
ANN = Record(sandbox_id="a" * 12, person="ann", user="hub")
BOB = Record(sandbox_id="b" * 12, user="bob")
SPEC = SandboxSpec(workdir="/srv")
SAID = {"attempt": "start", "answer": "no"}
REFUSED: dict[str, SandboxError] = {
    "options": SpecError(**SAID, remedy="Ask."),
    "host": HostError(**SAID, remedy="Ask."),
    "start": LaunchError(**SAID, remedy="Ask.", step="attach"),
    "mistake": InternalError(**SAID),
    "policy": NotAllowed(**SAID, remedy="Ask."),
    "no-room": NoRoom(**SAID, remedy="Ask."),
    "policy-file": PolicyError("/f", 3, "no", "Mend it."),
}


class Scraped:
    """A registry of its own; *running* and what each uses are a test's to say."""

    def __init__(self, monkeypatch: Any) -> None:
        self.running: list[Record] = []
        self.usage: dict[str, Usage] = {}
        self.registry = metrics.CollectorRegistry()
        monkeypatch.setattr(metrics, "_usage", lambda record: self.usage[record.sandbox_id])
        self.metrics = metrics.Metrics(lambda: self.running, self.registry)

    def __call__(self, name: str, **labels: str) -> float | None:
        found: float | None = self.registry.get_sample_value(f"{P}_{name}", labels)
        return found


@pytest.fixture
def scraped(monkeypatch: Any) -> Iterator[Scraped]:
    made = Scraped(monkeypatch)
    yield made
    made.metrics.close()


def test_starts_are_counted_by_how_they_began_and_how_long_they_took(scraped: Scraped) -> None:
    audit.started(ANN, None, SPEC, seconds=0.07, how="nursery")
    audit.started(ANN, None, SPEC, seconds=3.0, how="cold")
    name = "start_duration_seconds"
    assert scraped(f"{name}_bucket", kind="kernel", how="nursery", le="0.1") == 1
    assert scraped(f"{name}_bucket", kind="kernel", how="nursery", le="0.05") == 0
    assert scraped(f"{name}_sum", kind="kernel", how="cold") == 3.0


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_are_counted_by_whose_turn_it_is(scraped: Scraped, reason: str) -> None:
    assert scraped("refusals_total", reason=reason) == 0
    audit.refused(REFUSED[reason], person="ann", name="R", asked=None)
    assert scraped("refusals_total", reason=reason) == 1
    assert sum(scraped("refusals_total", reason=each) or 0 for each in REFUSED) == 1


def test_every_cause_of_an_end_is_there_before_it_happens(scraped: Scraped) -> None:
    audit.started(ANN, None, SPEC, seconds=0.1, how="cold")
    for cause in EndKind:
        assert scraped("ends_total", kind="kernel", cause=cause) == 0
    audit.ended(ANN, ExitStory(kind=EndKind.MEMORY_CAP, code=-9))
    assert scraped("ends_total", kind="kernel", cause="memory-cap") == 1


def test_cpu_time_of_a_user_never_goes_back(scraped: Scraped) -> None:
    other = replace(ANN, sandbox_id="c" * 12)
    scraped.running = [ANN, other, BOB]
    scraped.usage = {
        ANN.sandbox_id: Usage(cpu_seconds=5.0, memory_bytes=100),
        other.sandbox_id: Usage(cpu_seconds=2.0, memory_bytes=10),
        BOB.sandbox_id: Usage(cpu_seconds=1.0),
    }
    assert scraped("sandboxes", user="ann", kind="kernel") == 2
    assert scraped("memory_bytes", user="ann") == 110
    assert scraped("cpu_seconds_total", user="ann") == 7.0
    scraped.usage[ANN.sandbox_id] = Usage()  # its group is gone, and it is not yet told
    assert scraped("cpu_seconds_total", user="ann") == 7.0
    audit.ended(ANN, ExitStory(kind=EndKind.EXIT, code=0, cpu_seconds=6.5))
    assert scraped("cpu_seconds_total", user="ann") == 8.5
    scraped.running = [BOB]
    assert scraped("cpu_seconds_total", user="ann") == 8.5
    assert scraped("sandboxes", user="ann", kind="kernel") is None
    scraped.running = [replace(ANN, sandbox_id="d" * 12), BOB]
    scraped.usage["d" * 12] = Usage(cpu_seconds=1.0)
    assert scraped("cpu_seconds_total", user="ann") == 9.5


def test_what_ended_between_two_scrapes_has_used_cpu_time_too(scraped: Scraped) -> None:
    audit.ended(ANN, ExitStory(kind=EndKind.EXIT, code=0, cpu_seconds=6.5))
    assert scraped("cpu_seconds_total", user="ann") == 6.5


def test_what_ends_when_nobody_lists_it_any_more_has_used_its_cpu_time_once(
    scraped: Scraped,
) -> None:
    scraped.running, scraped.usage = [ANN], {ANN.sandbox_id: Usage(cpu_seconds=5.0)}
    assert scraped("cpu_seconds_total", user="ann") == 5.0
    scraped.running = []
    assert scraped("cpu_seconds_total", user="ann") == 5.0
    audit.ended(ANN, ExitStory(kind=EndKind.EXIT, code=0, cpu_seconds=6.5))
    assert [scraped("cpu_seconds_total", user="ann") for _ in range(3)] == [6.5, 6.5, 6.5]


def test_a_kernel_that_was_restarted_has_used_what_both_starts_have(scraped: Scraped) -> None:
    audit.ended(ANN, ExitStory(kind=EndKind.EXIT, code=0, cpu_seconds=6.5))
    scraped.running = [replace(ANN, started=ANN.started + 1)]
    scraped.usage = {ANN.sandbox_id: Usage(cpu_seconds=1.0)}
    assert scraped("cpu_seconds_total", user="ann") == 7.5


def test_users_without_end_have_series_with_an_end(scraped: Scraped, monkeypatch: Any) -> None:
    monkeypatch.setattr(metrics, "_MOST_USERS", 3)
    scraped.running = [replace(BOB, sandbox_id=f"{n:012}", user=f"u{n}") for n in range(10)]
    scraped.usage = {record.sandbox_id: Usage(memory_bytes=1) for record in scraped.running}
    assert [scraped("memory_bytes", user=f"u{n}") for n in range(4)] == [1, 1, 1, None]
    assert scraped("memory_bytes", user="(others)") == 7


def test_a_scrape_looks_no_longer_than_its_time(scraped: Scraped, monkeypatch: Any) -> None:
    now = iter(range(1000))
    monkeypatch.setattr(time, "monotonic", lambda: next(now) / 50)
    looked: list[Record] = []
    monkeypatch.setattr(metrics, "_usage", lambda record: looked.append(record) or Usage())
    scraped.running = [replace(BOB, sandbox_id=f"{n:012}") for n in range(200)]
    assert scraped("sandboxes", user="bob", kind="kernel") == 200
    assert len(looked) == 49


def test_no_start_imports_what_counts() -> None:
    script = (
        "import sys, json, sandbox_provisioner.provisioner, sandbox_provisioner.launch\n"
        "import sandbox_provisioner.broker.daemon, sandbox_provisioner.audit\n"
        "print(json.dumps([n for n in sys.modules if 'prometheus' in n or n.endswith('.metrics')]))"
    )
    answer = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert json.loads(answer.stdout) == []


@pytest.mark.parametrize("address", ["0.0.0.0:9185", "127.0.0.1", "10.0.0.1:1", "[::]:9", "a:1",
                                     "127.0.0.1:99999", "example.org:80", ""])  # fmt: skip
def test_metrics_are_told_on_this_machine_alone(address: str) -> None:
    from sandbox_provisioner.broker.scrape import _of_this_machine

    assert _of_this_machine("127.0.0.1:9185") == ("127.0.0.1", 9185)
    assert _of_this_machine("[::1]:9185") == ("::1", 9185)
    with pytest.raises(SpecError, match="loopback"):
        _of_this_machine(address)
