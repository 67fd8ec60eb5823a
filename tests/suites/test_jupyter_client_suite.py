"""jupyter_client's own test suite, with our provisioner in the place of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version

import pytest
from expected_failures import EXPECTED_FAILURES
from jupyter_programs import Home
from leaks import is_stand_in
from results import Results, node_id
from sources import unpacked

from sandbox_provisioner.records import all_records, runtime_directory
from sandbox_provisioner.sweeping import sweep

_PATIENCE_SECONDS = 1500
# native: the others parse the source, in which Python 3.11 can fail after a deep recursion.
_OPTIONS = (
    "-p no:asyncio -p no:hypothesispytest -o addopts= --timeout 60 --timeout-method=signal "
    "--tb=native -q"
)

pytestmark = [
    pytest.mark.requires("userns", "network", "pytest_jupyter"),
    pytest.mark.timeout(_PATIENCE_SECONDS + 300),
    pytest.mark.slow("hundreds of others' tests"),
]


@pytest.fixture(scope="module")
def results() -> Iterator[Results]:
    """The suite without what is expected to fail, and then that alone.

    A failed test of it may leave a kernel manager whose garbage collection waits for ever for a
    ZeroMQ socket; so no other test shares a process with one.
    """
    with Home() as home:
        source = unpacked("jupyter_client", version("jupyter_client"))
        # A short path, for some tests bind sockets where they run; and only what they need.
        results = Results(folder=home.notebooks)
        shutil.copytree(source / "tests", home.notebooks / "tests")
        shutil.copy(source / "pyproject.toml", home.notebooks)
        (home.path / "xdg").mkdir(mode=0o700)
        names = [node_id(name) for name in EXPECTED_FAILURES]
        _run(home, results, "tests", *(f"--deselect={name}" for name in names))
        # Some wait for a time that a busy machine does not keep.
        if surprises := results.failures.keys() - EXPECTED_FAILURES.keys():
            _run(home, results, *map(node_id, surprises))
        for name in names:
            _run(home, results, name)
        sweep(runtime_directory())
        yield results


def _run(home: Home, results: Results, *words: str) -> None:
    report = home.path / "report.xml"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, *_OPTIONS.split(), f"--junitxml={report}"],
        cwd=home.notebooks,
        env=_environment(home),
        capture_output=True,
        text=True,
        timeout=_PATIENCE_SECONDS,
    )
    results.output += done.stdout + done.stderr
    results.note(report)


def _environment(home: Home) -> Mapping[str, str]:
    """The suite has homes of its own, too deep for sockets: without root ours go elsewhere."""
    return home.environment(
        JUPYTER_DEFAULT_PROVISIONER_NAME="sandbox-provisioner",
        XDG_RUNTIME_DIR=str(home.path / "xdg"),
        ASYNC_TEST_TIMEOUT="30",
    )


def test_nothing_fails_that_is_not_expected_to(results: Results) -> None:
    surprises = {n: text for n, text in results.failures.items() if n not in EXPECTED_FAILURES}
    assert not surprises, results.output[-20_000:]


def test_everything_that_is_expected_to_fail_still_does(results: Results) -> None:
    assert set(EXPECTED_FAILURES) - set(results.failures) == set()


def test_the_suite_has_run_to_its_end(results: Results) -> None:
    assert len(results.passed) > 250, results.output[-5000:]


def test_the_suite_leaves_no_sandbox_and_no_stand_in(results: Results) -> None:
    ours = str(results.folder)
    left = [record for _, record in all_records(runtime_directory()) if record.workdir == ours]
    assert left == []
    assert [path.name for path in results.folder.iterdir() if is_stand_in(str(path))] == []
