"""CPython's own tests of what programs ask of a system, in a box beside the same ones without it.

A choice that takes less than a minute. All of them, by hand::

    jupyter sandbox run --mem-limit 2G --pids-limit 512 -- python -m test -j2
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pytest
from facilities import missing
from jupyter_programs import Home

_PATIENCE_SECONDS = 300
_MODULES = (
    "test_asyncio", "test_fcntl", "test_mmap", "test_multiprocessing_fork",
    "test_multiprocessing_spawn", "test_os", "test_poll", "test_posix", "test_pty",
    "test_resource", "test_select", "test_signal", "test_socket", "test_subprocess",
    "test_threading",
)  # fmt: skip
# By test, class or whole name: without what waits for seconds, or talks to a network.
_CHOSEN = (
    "test.test_fcntl.*", "test.test_mmap.*", "test.test_os.*", "test.test_poll.*",
    "test.test_posix.*", "test.test_pty.*", "test.test_resource.*", "test.test_select.*",
    "ThreadTests", "LockTests", "ConditionTests", "EventTests", "SemaphoreTests", "BarrierTests",
    "POSIXProcessTestCase", "ContextManagerTests", "RunFuncTestCase",
    "PosixTests", "WakeupFDTests", "SiginterruptTest", "PendingSignalsTests",
    "BasicTCPTest", "BasicUDPTest", "*SCMRights*", "BasicSocketPairTest", "TestUnixDomain",
    "TestLinuxAbstractNamespace", "NonBlockingTCPTests", "BufferIOTest",
    "UnixReadPipeTransportTests", "SubprocessThreadedWatcherTests", "StreamTests",
    "WithProcessesTestQueue", "WithProcessesTestLock", "WithProcessesTestSharedMemory",
)  # fmt: skip

_NO_SPLICE = (
    "splice(2) is refused, as by a file that cannot be spliced: it writes to cached pages of files "
    "that are only readable, where Linux has a bug. Callers copy by hand."
)
_NO_NOTIFY = "F_NOTIFY is refused: it tells who reads in a directory that others share."
EXPECTED_FAILURES: Mapping[str, str] = {
    "test.test_os.FileTests.test_splice": _NO_SPLICE,
    "test.test_os.FileTests.test_splice_offset_in": _NO_SPLICE,
    "test.test_os.FileTests.test_splice_offset_out": _NO_SPLICE,
    "test.test_fcntl.TestFcntl.test_fcntl_64_bit": _NO_NOTIFY,
}


@dataclass(frozen=True)
class Outcome:
    """What became of each test, by its name."""

    passed: frozenset[str]
    failed: frozenset[str]
    told: str


def outcome_of(home: Home, prefix: tuple[str, ...], chosen: tuple[str, ...]) -> Outcome:
    report = home.notebooks / "report.xml"
    patterns = [word for name in chosen for word in ("-m", name)]
    # Builds of Python leave some out.
    modules = [name for name in _MODULES if importlib.util.find_spec(f"test.{name}")]
    words = ["-m", "test", "-j2", "--junit-xml", str(report), *patterns, *modules]
    done = subprocess.run(
        [*prefix, sys.executable, *words], cwd=home.notebooks, env=home.environment(),
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PATIENCE_SECONDS,
    )  # fmt: skip
    told = done.stdout + done.stderr
    assert report.exists(), f"status {done.returncode}:\n{told}"
    passed, failed = set(), set()
    for case in ET.parse(report).iter("testcase"):
        name = case.attrib["name"]
        if any(part.tag in {"failure", "error"} for part in case):
            failed.add(name)
        elif case.find("skipped") is None:
            passed.add(name)
    report.unlink()
    return Outcome(frozenset(passed), frozenset(failed), told)


@pytest.fixture(scope="module")
def home() -> Iterator[Home]:
    if missing("cpython-tests"):  # also in CI: distributions keep them in a package of its own
        pytest.skip(missing("cpython-tests"))
    with Home() as home:
        yield home


@pytest.fixture(scope="module")
def plain(home: Home) -> Outcome:
    return outcome_of(home, (), _CHOSEN)


def box(home: Home) -> tuple[str, ...]:
    limits = ("--mem-limit", "1G", "--pids-limit", "256", "--runtime-dir", str(home.runtime))
    return (sys.executable, "-m", "sandbox_provisioner.app", "run", *limits, "--")


@pytest.fixture(scope="module")
def boxed(home: Home, plain: Outcome) -> Outcome:
    return outcome_of(home, box(home), _CHOSEN)


pytestmark = [
    pytest.mark.requires("userns", "cgroup-memory", "cgroup-pids"),
    pytest.mark.timeout(2 * _PATIENCE_SECONDS),
    pytest.mark.slow("CPython's own tests, in a box and without one"),
]


def test_what_passes_without_a_box_passes_in_it(home: Home, plain: Outcome, boxed: Outcome) -> None:
    surprises = boxed.failed - plain.failed - EXPECTED_FAILURES.keys()
    # Some of them wait for a time that a busy machine does not keep.
    again = outcome_of(home, box(home), tuple(sorted(surprises))) if surprises else boxed
    assert not surprises & again.failed, again.told[-20_000:]


def test_what_is_expected_to_fail_in_a_box_still_does(plain: Outcome, boxed: Outcome) -> None:
    assert EXPECTED_FAILURES.keys() & plain.passed & boxed.passed == frozenset()
    assert EXPECTED_FAILURES.keys() & boxed.failed


def test_most_tests_have_run_in_both(plain: Outcome, boxed: Outcome) -> None:
    assert len(plain.passed) > 500, plain.told[-5000:]
    assert len(boxed.passed | boxed.failed) > 0.95 * len(plain.passed), boxed.told[-5000:]
