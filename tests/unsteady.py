"""unsteady.py - in the process of ``python -m tests`` or ``tests.vm``: what failed once and passes
alone.

An unsteady test is a bug, of the test or of what it tests, and is to be mended. One of thousands
that hiccups on a busy machine does not make the other results worthless, though: what failed is run
once more, alone, when everything else has ended. If it passes then, it is told loudly, with the
text of its first failure, and the run goes on. Not more than `MOST` of them, so that nobody gets
used to it; and no hole in a wall (`holes_of`), which is one also if it comes and goes. Where the
run fails all the same, the last thing that it says is what has failed, and why, in few lines: of a
long output often only the end is kept.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

MOST = 3
WALLS = "tests.escape."
# Of a failure, where the run fails; all of it is further up, and in junit.xml.
SHORT_LINES, SHORT_WIDTH = 12, 300
# How those tests there are named that have no wall before them, and so cannot find a hole in one.
CONTROLS = "without_the_box"


class Case(NamedTuple):
    """A test as junit.xml names it."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.file}::{self.name}" if self.file.exists() else f"{self.module}.{self.name}"

    @property
    def file(self) -> Path:
        """Where it stands; there is no such file of a test of an inner pytest (inner.py), which is
        run again by the test that runs its pytest."""
        return Path(f"{self.module.replace('.', '/')}.py")


def pytest_command(report: Path, words: Sequence[str]) -> list[str]:
    """pytest with *words*, whose results go to *report*, with what a failed test has printed."""
    report.unlink(missing_ok=True)
    told = ("-o", "junit_logging=all", "-o", "junit_log_passing_tests=false")
    return [sys.executable, "-m", "pytest", "-ra", f"--junit-xml={report}", *told, *words]


def alone(case: Case, report: Path) -> list[Path]:
    """Run *case* in a pytest of its own; where its results are."""
    subprocess.run(pytest_command(report, [str(case)]), check=False)
    return [report]


def settle(
    statuses: Mapping[Path, int],
    others: Sequence[int],
    folder: Path,
    again: Callable[[Case, Path], list[Path]] = alone,
) -> int:
    """0 if all went well: *statuses* are those with which pytest has ended, by its report, and
    *others* those of what else has run. *again* runs a test once more. What was unsteady is kept
    in *folder*."""
    if not any((*statuses.values(), *others)):
        return 0
    failures = failures_of(statuses)
    if why := why_not_again(failures, holes_of(statuses), unfinished(statuses), others):
        tell_shortly(failures)
        print(f"\nNothing is run again: {why}", flush=True)
        return 1
    passed = set(run_again(failures, next(iter(statuses)), again))
    tell({case: text for case, text in failures.items() if case in passed}, folder)
    stays = {case: text for case, text in failures.items() if case not in passed}
    tell_shortly(stays)
    for case in stays:
        print(f"\nIt fails alone too: {case}", flush=True)
    return 1 if stays else 0


def unfinished(statuses: Mapping[Path, int]) -> list[str]:
    """The runs of pytest that ended in another way than with tests that passed or failed: exit
    status 1 is also that of whoever ends the process."""
    return [
        f"{report.name}: exit status {status}"
        for report, status in statuses.items()
        if status not in {0, 1} or (status == 1 and not failures_of([report]))
    ]


def holes_of(reports: Iterable[Path]) -> list[Case]:
    """The tests of the walls that have asserted in vain: an attempt has answered what it may not,
    or something is left behind. An attempt without an answer (its kernel did not start in time,
    say) is none of them: it is made again."""
    return [
        case
        for element, case in _cases(reports)
        if case.module.startswith(WALLS) and CONTROLS not in case.name
        for told in (*element.iter("failure"), *element.iter("error"))
        if "assert" in told.get("message", "").lower()
    ]


def why_not_again(
    failures: Mapping[Case, str],
    holes: Sequence[Case],
    unfinished: Sequence[str],
    others: Sequence[int],
) -> str:
    """Why the run has failed, whatever a second look at the tests would tell; "" if it may."""
    if any(others):
        return "the virtual machine's tests have failed."
    if unfinished:
        return f"pytest has not run to its end: {', '.join(unfinished)}."
    if len(failures) > MOST:
        return f"{len(failures)} tests have failed, and at most {MOST} may be unsteady."
    if holes:
        return f"a wall that holds at the second attempt does not hold: {holes[0]}"
    return ""


def failures_of(reports: Iterable[Path]) -> dict[Case, str]:
    """What has failed, before, in or after the test, with all that is told of it."""
    found: dict[Case, list[str]] = {}
    for element, case in _cases(reports):
        if told := [*element.iter("failure"), *element.iter("error")]:
            told += [*element.iter("system-out"), *element.iter("system-err")]
            found.setdefault(case, []).extend(part.text or "" for part in told)
    return {case: "\n".join(texts) for case, texts in found.items()}


def run_again(
    failures: Mapping[Case, str], before: Path, again: Callable[[Case, Path], list[Path]]
) -> Iterator[Case]:
    """One after the other: those of *failures* that have passed. Their reports lie beside the one
    *before*, under its name and a number."""
    reports = []
    for number, case in enumerate(case for case in failures if case.file.exists()):
        print(f"\nIt has failed, and runs once more, alone: {case}", flush=True)
        reports += again(case, before.with_stem(f"{before.stem}-again-{number}"))
    failed = failures_of(reports)
    for element, case in _cases(reports):
        if case in failures and case not in failed and element.find("skipped") is None:
            yield case


def _cases(reports: Iterable[Path]) -> Iterator[tuple[ElementTree.Element, Case]]:
    for report in filter(Path.exists, reports):  # pytest may have been killed
        for element in ElementTree.parse(report).iter("testcase"):
            yield element, Case(element.get("classname", ""), element.get("name", ""))


def tell(unsteady: Mapping[Case, str], folder: Path) -> None:
    """Loudly, and in a file."""
    for case, text in unsteady.items():
        told = f"{'!' * 78}\nUNSTEADY: {case}\nIt failed, and passed when it ran again, alone. "
        told += f"It is to be mended. Its first failure:\n{'!' * 78}\n{text}\n"
        print(f"\n{told}", flush=True)
        with (folder / "unsteady.txt").open("a") as file:
            file.write(told)


def tell_shortly(failures: Mapping[Case, str]) -> None:
    """The lines of each that say where it was and what was wrong, the last ones of many."""
    for case, text in failures.items():
        lines = [line[:SHORT_WIDTH] for line in text.splitlines() if line.startswith((">", "E "))]
        print(f"\nFAILED {case}", *lines[-SHORT_LINES:], sep="\n", flush=True)
