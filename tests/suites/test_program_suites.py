"""The own tests of those who run kernels, of ipykernel, nbclient, nbconvert and papermill, with
sandboxed kernels: those of them that start kernels, cold, and for ipykernel from a nursery."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import pytest
from expected_failures import OF_PROGRAMS
from jupyter_programs import Home
from results import Results
from sources import unpacked

_PATIENCE_SECONDS = 600
_OPTIONS = (
    "-o addopts= -o filterwarnings=default -o asyncio_mode=auto -p of_the_start --timeout 100 "
    "--timeout-method=signal --tb=native -q"
)
# Notes down who started each kernel, and knows an option of pytest-cov's that ipykernel asks for.
_PLUGIN = """
import os

def pytest_addoption(parser):
    parser.addoption("--cov", default=None)

def pytest_configure():
    from sandbox_provisioner.provisioner import SandboxProvisioner

    launch = SandboxProvisioner.launch_kernel

    async def noting(self, cmd, **kwargs):
        told = await launch(self, cmd, **kwargs)
        with open(os.environ["SUITE_STARTS"], "a") as file:
            print("warm" if self.handle.record.nursery else "cold", file=file)
        return told

    SandboxProvisioner.launch_kernel = noting
"""

pytestmark = [
    pytest.mark.requires("userns", "network", "papermill", "pytest_asyncio", "testpath"),
    pytest.mark.timeout(_PATIENCE_SECONDS + 300),
    pytest.mark.slow("others' tests, with a kernel each"),
]


@dataclass(frozen=True)
class Suite:
    """*words* choose the tests, *left_out* is what of them would take long and tell nothing new, or
    needs what is not installed here; *options* are of the kernelspec that they find as python3, and
    *shares* says whether it shows them the folder that the tests keep their files in."""

    name: str
    words: tuple[str, ...]
    left_out: tuple[str, ...]
    at_least: int
    options: dict[str, Any]
    folder: str = "tests"
    shares: bool = False


COLD = {"warm": False}
SUITES = (
    Suite(
        name="ipykernel",
        words=("tests/test_kernel.py", "tests/test_subshells.py"),
        # The first two wait for half a minute; the others hang on how fast threads take turns, and
        # their authors run them again when they fail.
        left_out=(
            *("stop_on_error", "silent_flag", "subprocess_print", "subprocess_noprint"),
            *("subprocess_error", "run_concurrently", "print_to_correct_cell"),
            "sequential_control",
        ),
        at_least=28,
        options={"warm": True},
    ),
    Suite(
        name="nbclient",
        words=("tests/test_client.py",),
        # The first needs ipywidgets; the others wait for time-outs or for each other, or do more of
        # the same.
        left_out=("idget", "timeout", "parallel", "test_cleanup_kernel_client", "hook"),
        at_least=45,
        # Its notebooks look for these, which the tests set in their own process, and for files.
        options=COLD | {"env_keep": ["NBEXECUTE_TEST_PARALLEL_TMPDIR", "IPYKERNEL_CELL_NAME"]},
        shares=True,
    ),
    Suite(
        name="nbconvert",
        words=(
            "tests/preprocessors/test_execute.py",
            "tests/test_nbconvertapp.py::TestNbConvertApp::test_errors_print_traceback",
        ),
        left_out=(),
        at_least=6,
        options=COLD,
    ),
    Suite(
        name="papermill",
        words=("papermill/tests/test_execute.py",),
        left_out=("BrokenNotebook2",),  # it needs matplotlib
        at_least=24,
        options=COLD,
        folder="papermill",
    ),
)


@dataclass
class Ran:
    """A suite that has run: *starts* has a word for each kernel, "cold" or "warm"."""

    suite: Suite
    results: Results
    starts: list[str]


@pytest.fixture(scope="module", params=SUITES, ids=lambda suite: suite.name)
def ran(request: pytest.FixtureRequest) -> Iterator[Ran]:
    suite: Suite = request.param
    with Home() as home:
        shared = home.path / "shared"
        shared.mkdir()
        volumes = [f"{shared}:{shared}:rw"] if suite.shares else []
        home.add_kernel("python3", **suite.options, volumes=volumes)
        source = unpacked(suite.name, version(suite.name))
        shutil.copytree(source / suite.folder, home.notebooks / suite.folder)
        (home.notebooks / "of_the_start.py").write_text(_PLUGIN)
        starts = home.path / "starts"
        starts.touch()
        results = Results(folder=home.notebooks)
        try:
            _run(home, suite, results)
        finally:
            home.end_nurseries()
        yield Ran(suite, results, starts.read_text().split())


def _run(home: Home, suite: Suite, results: Results) -> None:
    environment = home.environment(
        PYTHONPATH=str(home.notebooks), SUITE_STARTS=str(home.path / "starts")
    )
    if suite.options["warm"]:
        home.prepare("python3", environment)
    report = home.path / "report.xml"
    left_out = " and ".join(f"not {word}" for word in suite.left_out)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", *suite.words, *_OPTIONS.split(), "-k", left_out),
            *(f"--junitxml={report}", f"--basetemp={home.path}/shared/t"),
        ],
        cwd=home.notebooks,
        env=environment,
        capture_output=True,
        text=True,
        timeout=_PATIENCE_SECONDS,
    )
    results.output = done.stdout + done.stderr
    assert report.exists(), results.output
    results.note(report)


def test_nothing_fails_that_is_not_expected_to(ran: Ran) -> None:
    expected = OF_PROGRAMS[ran.suite.name]
    surprises = {n: text for n, text in ran.results.failures.items() if n not in expected}
    assert not surprises, ran.results.output[-20_000:]


def test_everything_that_is_expected_to_fail_still_does(ran: Ran) -> None:
    assert set(OF_PROGRAMS[ran.suite.name]) - set(ran.results.failures) == set()


def test_the_suite_has_run_to_its_end_with_kernels_of_ours(ran: Ran) -> None:
    assert len(ran.results.passed) >= ran.suite.at_least, ran.results.output[-5000:]
    # Some are started with arguments of their own, for which no nursery was made.
    wanted = "warm" if ran.suite.options["warm"] else "cold"
    assert ran.starts.count(wanted) >= max(1, len(ran.starts) // 2), ran.starts
