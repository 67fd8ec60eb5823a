"""``python -m tests.vm``: a part of the suite in a virtual machine with systemd and cgroup v2.

Once as root, and once as an ordinary user in a login session; see README.md. ``--only user`` runs
one set-up; all other arguments go to pytest, in the place of the tests that a set-up has chosen:
``python -m tests.vm --only root tests/inside``.
``VM_SUITE=trixie`` takes another Debian than the host's. Needs root on Debian, x86_64; elsewhere
it says so and skips.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import quoteattr

from tests import unsteady
from tests.vm.environments import PYTHON, REPOSITORY, environment

VM = Path(__file__).with_name("vm")
PACKAGES = ("pytest", "pytest-timeout", "psutil", "nbclient", "hypothesis", "prometheus_client")
# Where they lie in the guest; every user may read them.
VENV, SOURCES = "/opt/suite/venv", "/opt/suite/sources"
GUEST_LIFE_SECONDS = 2700

# Calls of fork and exec take 30 times as long in a guest without KVM, Python 6 times.
PYTEST = (
    "-m", "pytest", "-ra", "-q", "--timeout=300", "-p", "no:cacheprovider", "--durations=5",
    "--color=no",
)  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """One pass through a part of the suite: who runs it, in what."""

    name: str
    user: str
    tests: Sequence[str]
    within: Sequence[str] = ()
    limit_seconds: int = 1200


CGROUPS = ("tests/inside/test_cgroup_for_real.py",)
CONTRACT = "tests/kernels/test_contract.py::test_a_kernel"
ESCAPES = (
    "tests/inside/test_limits.py", "tests/inside/test_identity.py",
    "tests/inside/test_file_system.py",
    f"{CONTRACT}_runs_in_a_sandbox_and_leaves_nothing",
    f"{CONTRACT}_that_reaches_its_memory_limit_says_why_under_the_cell",
    "tests/kernels/test_spares.py::test_a_spare_that_reaches_its_memory_limit_says_why",
    "tests/inside/test_attached.py::"
    "test_a_box_speaks_with_whom_its_rules_allow_and_with_nobody_else",
)  # fmt: skip
CARD = "tests/network/test_card_for_real.py::test"
# Systemd's groups, another Linux, another nft; in network namespaces of their own.
CARDS = (
    f"{CARD}_a_kernel_speaks_with_whom_its_rules_name_and_its_end_tells_how_much",
    f"{CARD}_what_a_killed_server_leaves_of_a_card_is_swept[later]",
    "tests/network/test_card.py::test_another_firewalls_tables_stay_as_they_are",
)
# Its Linux has what XFS and ext4 count by.
QUOTAS = (
    "tests/inside/test_folder_limit.py",
    "tests/inside/test_workdir_limit.py",
    "tests/kernels/test_full_work_directory.py",
    "tests/broker/test_limited_work_directory.py",
    "tests/hub/test_limited_home.py",
)
# The broker as the service that an administrator installs, and ends in every way.
UNITS = ("tests/broker/test_units.py",)
# Of all attempts those that share one kernel, which was started cold.
ATTACKS = ("tests/escape/test_escape.py::test_an_attempt_fails", "-k")
# A process in a login session may not move itself out of it; tests that move their own children
# into groups run next to these.
SCOPE = ("systemd-run", "--user", "--scope", "--quiet")
# As a container or a service does it that was delegated a group: out of the way, then direct.
DELEGATED = (
    *SCOPE, "-p", "Delegate=yes", "sh", "-c",
    'group=/sys/fs/cgroup$(sed s/0::// /proc/self/cgroup); mkdir "$group/server"; '
    'echo $$ > "$group/server/cgroup.procs"; exec "$@"', "sh",
)  # fmt: skip
SETUPS = (
    Setup("root", "root", (*CGROUPS, *ESCAPES, *CARDS)),
    Setup("quotas", "root", QUOTAS),
    Setup("user", "alice", ESCAPES),
    Setup("user-cgroups", "alice", CGROUPS, SCOPE),
    Setup("user-delegated", "alice", CGROUPS, DELEGATED),
    Setup("units", "root", UNITS),
    Setup("root-attacks", "root", (*ATTACKS, "root]")),
    Setup("user-attacks", "alice", (*ATTACKS, "user] or landlock]")),
)


def main() -> int:
    """Run every set-up; the exit status is 0 if all of them passed or none can run here."""
    parser = argparse.ArgumentParser(prog="python -m tests.vm", description=__doc__)
    parser.add_argument("--only", choices=[setup.name for setup in SETUPS], action="append")
    options, chosen = parser.parse_known_args()
    setups = [setup for setup in SETUPS if not options.only or setup.name in options.only]
    if reason := why_not():
        return skip(reason)
    begin = time.monotonic()
    # So that the guest is stopped when somebody ends us.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    if vm("build") and not shutil.which("qemu-system-x86_64"):
        return skip("qemu is not installed, nor can it be from Debian's packages")
    os.environ.update(VM_NAME=f"suite-{os.getpid()}", VM_LIFE=str(GUEST_LIFE_SECONDS))
    with tempfile.TemporaryDirectory() as folder:
        sources = copy_sources(Path(folder, "sources"))
        shares = [
            "--share",
            f"{environment('venv', PACKAGES, VENV)}:{VENV}:copy",
            "--share",
            f"{sources}:{SOURCES}:copy",
        ]
        try:
            if vm("start", *shares):
                return 1
            status = run_all(setups, chosen)
        finally:
            vm("stop")
    told = "something" if status else "nothing"
    say(f"{told} failed, {time.monotonic() - begin:.0f} s in all")
    return status


def run_all(setups: Sequence[Setup], chosen: Sequence[str]) -> int:
    """0 if all of *setups* went well; what fails there may be unsteady as elsewhere."""
    statuses = {results(setup.name): run(setup, chosen, results(setup.name)) for setup in setups}

    def again(case: unsteady.Case, report: Path) -> list[Path]:
        """In each set-up in which it has failed."""
        found = []
        for setup in setups:
            if case in unsteady.failures_of([results(setup.name)]):
                found.append(report.with_stem(f"{report.stem}-{setup.name}"))
                run(setup, [str(case)], found[-1])
        return found

    return unsteady.settle(statuses, [], results("all").parent, again)


def say(text: str) -> None:
    print(f"tests.vm: {text}", flush=True)


def why_not() -> str:
    """Why no virtual machine can be had here, "" if one can."""
    if os.geteuid() or platform.machine() != "x86_64":
        return "needs root on x86_64"
    if not shutil.which("apt-get") or not Path("/etc/debian_version").exists():
        return "needs a Debian host, whose packages the guest is made of"
    if not Path(PYTHON).exists():
        return f"needs {PYTHON}, the guest's interpreter"
    return ""


def skip(reason: str) -> int:
    """Say it where nobody can overlook it, and in the results."""
    print(f"\n{'!' * 78}\n!! tests.vm SKIPPED: {reason}\n{'!' * 78}\n", flush=True)
    results("skipped").write_text(
        '<testsuites><testsuite name="tests.vm" tests="1" skipped="1">'
        '<testcase classname="tests.vm" name="tests.vm">'
        f"<skipped message={quoteattr(reason)}/></testcase></testsuite></testsuites>\n"
    )
    return 0


def results(name: str) -> Path:
    """Where the results of a set-up go, in JUnit's format."""
    folder = Path(os.environ.get("SANDBOX_ARTEFACTS", "artefacts"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"junit-vm-{name}.xml"


def copy_sources(target: Path) -> Path:
    """The files of the working tree that git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True).stdout
    for name in filter(None, os.fsdecode(names).split("\0")):
        if (REPOSITORY / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, target / name)
    return target


def vm(*words: str) -> int:
    return subprocess.run([str(VM), *words], check=False).returncode


def run(setup: Setup, chosen: Sequence[str], results: Path) -> int:
    """pytest's exit status for one set-up; 5, no test was chosen, is fine if somebody chose. Its
    report goes to *results*."""
    report = f"/tmp/{results.name}"
    say(f"{setup.name} ({setup.user})")
    status = vm(
        "run", "--user", setup.user, "--cwd", SOURCES, "--timeout", str(setup.limit_seconds),
        "--", *setup.within, f"{VENV}/bin/python", *PYTEST,
        f"--junit-xml={report}", *(chosen or setup.tests),
    )  # fmt: skip
    with results.open("wb") as file:
        copy = [str(VM), "run", "--", "cat", report]
        subprocess.run(copy, check=False, stdout=file, stderr=subprocess.DEVNULL)
    return 0 if chosen and status == 5 else status


if __name__ == "__main__":
    sys.exit(main())
