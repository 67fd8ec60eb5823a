"""``python -m tests``: the linters and all tests, in lanes side by side; this is what CI runs.

Arguments go to pytest, in one lane: ``python -m tests tests/unit`` or ``python -m tests -k
interrupt``. With ``--vm`` the virtual machine (``python -m tests.vm``) is one more lane.

::

    main       linters, unit, inside, network, programs, escape      told as it runs
    kernels    kernels                                    \\
    aside      images, suites, browser, broker, hub,       told one after the other
               grade, lifecycle                            when main has ended
    vm         tests.vm                                   /

A machine of two CPUs is busy all the time then: most tests wait for a process, for half of their
time. What becomes of it lies in ``artefacts/`` (or ``$SANDBOX_ARTEFACTS``): a junit.xml for each
lane, the output of all but the first, durations.txt, and unsteady.txt if a test passed at its
second run only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from xml.etree import ElementTree

from sandbox_provisioner.host import HostFacts
from tests import unsteady

TESTS = Path(__file__).parent
# The rooms of each lane; the first is the one that is told as it runs.
LANES: dict[str, Sequence[str]] = {
    "main": ("unit", "inside", "network", "programs", "escape"),
    "kernels": ("kernels",),
    # From the browser's first test on, a loop runs in that lane's process.
    "aside": ("images", "suites", "browser", "broker", "hub", "grade", "lifecycle"),
}
LINTERS = (
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "."),
    ("mypy",),
)
# A lane sees no mount of another one's, and none of its own is seen there.
_OWN_MOUNTS = ("unshare", "--mount", "--propagation", "private")
# It keeps one CPU busy all the time, and cannot use a second one when all others have ended.
_VM = ("nice", "-n", "-3", "timeout", "--kill-after=60", "2400", sys.executable, "-m", "tests.vm")
SLOW_SECONDS = 5
_TELL_SECONDS = 20


def main() -> int:
    """Run all; the exit status is 0 if nothing fails."""
    os.chdir(TESTS.parent)
    folder = Path(os.environ.get("SANDBOX_ARTEFACTS", "artefacts"))
    folder.mkdir(parents=True, exist_ok=True)
    words = [word for word in sys.argv[1:] if word != "--vm"]
    if words:
        status = lint() or run_pytest(folder / "junit.xml", words)
        return status or judge([folder / "junit.xml"], folder)
    return run_lanes(folder, with_vm="--vm" in sys.argv)


def lint() -> int:
    """The exit status of the first linter that finds fault, 0 if none does."""
    commands = ([sys.executable, "-m", *linter] for linter in LINTERS)
    statuses = (subprocess.run(command, check=False).returncode for command in commands)
    return next(filter(None, statuses), 0)


def run_lanes(folder: Path, *, with_vm: bool) -> int:
    """All lanes; all that fails is told, and a part of it may be unsteady."""
    (folder / "unsteady.txt").unlink(missing_ok=True)
    reports = {name: folder / f"junit-{name}.xml" for name in LANES}
    commands: dict[str, Sequence[str]] = {
        name: unsteady.pytest_command(reports[name], rooms(LANES[name])) for name in LANES
    }
    commands |= {"vm": _VM} if with_vm else {}
    first, *others = commands
    with contextlib.ExitStack() as closing:
        lanes = {
            name: closing.enter_context(aside(commands[name], folder / f"{name}.log"))
            for name in others
        }
        if status := lint():
            return status
        ended = {first: subprocess.run(commands[first], check=False).returncode}
        for name, lane in lanes.items():
            print(f"\nThe lane {name}:", flush=True)
            ended[name] = follow(lane, folder / f"{name}.log")
    statuses = {report: ended.pop(name) for name, report in reports.items()}
    # Both: what was skipped is to be told also where something has failed, or has been killed.
    told = [report for report, status in statuses.items() if not status or report.exists()]
    judged = judge(told, folder)
    return unsteady.settle(statuses, [*ended.values()], folder) or judged


def rooms(names: Sequence[str]) -> list[str]:
    """The folders of *names*, as pytest's arguments."""
    return [f"tests/{name}" for name in names]


def run_pytest(report: Path, words: Sequence[str]) -> int:
    """Its exit status."""
    return subprocess.run(unsteady.pytest_command(report, words), check=False).returncode


@contextlib.contextmanager
def aside(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs *command*, with all that it says in *log*. It does not outlive us,
    however we end."""
    own_mounts = _OWN_MOUNTS if HostFacts.probe().privileged else ()
    with log.open("wb") as output:
        lane = subprocess.Popen(
            [*own_mounts, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield lane
    finally:
        signal.signal(signal.SIGTERM, before)
        while lane.poll() is None:  # it is interrupted, which cleans up after itself
            os.killpg(lane.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                lane.wait(timeout=30)


def follow(lane: subprocess.Popen[bytes], log: Path) -> int:
    """Tell all of *log*, which *lane* writes, until that has ended; its exit status."""
    with log.open(errors="replace") as told:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                lane.wait(timeout=_TELL_SECONDS)
            print(told.read(), end="", flush=True)
            if lane.returncode is not None:
                return lane.returncode


def judge(reports: Sequence[Path], folder: Path) -> int:
    """1 if a test was skipped for a reason that allowed_skips.txt does not know."""
    cases = [case for report in reports for case in ElementTree.parse(report).iter("testcase")]
    (folder / "durations.txt").write_text(durations(cases))
    lines = (TESTS / "allowed_skips.txt").read_text().splitlines()
    refused = [text for case in cases for text in unexplained_skips(case, lines)]
    for text in refused:
        print(f"not allowed to skip: {text}")
    return 1 if refused else 0


def unexplained_skips(case: ElementTree.Element, lines: Sequence[str]) -> Iterator[str]:
    """The reasons why *case* was skipped that none of *lines* knows."""
    name = f"{case.get('classname')}.{case.get('name')}"
    for skip in case.iter("skipped"):
        reason = skip.get("message", "")
        if not any(_allows(line, name, reason) for line in lines):
            yield f"{name}: {reason}"


def _allows(line: str, name: str, reason: str) -> bool:
    """Whether *line*, "[VARIANT] PART - WHY" or "PART - WHY", is about this skip."""
    part, dash, _ = line.partition(" - ")
    if not dash or line.startswith("#"):
        return False
    variant, bracket, of_variant = part.removeprefix("[").partition("] ")
    if not part.startswith("[") or not bracket:
        return part in reason
    return fnmatchcase(name.partition(".")[0], variant) and of_variant in reason


def durations(cases: Sequence[ElementTree.Element]) -> str:
    """The slow ones in seconds, the slowest first, and how much time all take."""
    times = {f"{c.get('classname')}.{c.get('name')}": float(c.get("time", 0)) for c in cases}
    slow = sorted(times.items(), key=lambda item: -item[1])
    lines = [f"{seconds:8.1f} {name}" for name, seconds in slow if seconds >= SLOW_SECONDS]
    return "\n".join([*lines, f"{sum(times.values()):8.1f} all {len(times)} tests", ""])


if __name__ == "__main__":
    sys.exit(main())
