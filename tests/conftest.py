"""conftest.py - in the test process: what every test stands on.

``requires(...)`` skips a test where the host lacks a facility (with SANDBOX_MUST_WORK=1 it fails),
and every test fails that leaves anything behind (`leaks.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import inner
import pytest
import users
from boxes import IDLE_SECONDS, WARM, Boxes, close_nurseries, request_for, run
from facilities import MUST_WORK, missing, ordinary_python, packages
from leaks import Watch, note_what_is_made

import sandbox_provisioner
from sandbox_provisioner import gateway_life
from sandbox_provisioner.contract import Labels, Warmth
from sandbox_provisioner.descriptors import afford_a_start
from sandbox_provisioner.launch import LocalLauncher
from sandbox_provisioner.stem import stem
from sandbox_provisioner.warm import make_nursery as nurseries
from sandbox_provisioner.warm.make_nursery import make_nursery

# Where Linux was built with such quotas: in the lane of the virtual machine.
_OF_QUOTAS = [
    "hub/test_limited_home.py",
    "inside/test_folder_limit.py",
    "inside/test_workdir_limit.py",
    "kernels/test_full_work_directory.py",
    "kernels/test_warm_folders.py",
]
collect_ignore = _OF_QUOTAS if missing("project-quotas") else []
collect_ignore += ["inside/test_btrfs_groups.py"] if missing("btrfs") else []


def pytest_configure(config: pytest.Config) -> None:
    """Tell an outer pytest what becomes of our tests, if there is one. A test that wants a nursery
    waits for it: that takes no more CPU time of others than the test does, whatever lanes run."""
    inner.write_reports(config)
    nurseries._POLITE_SECONDS = 0.0


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, or fail, a test whose requirements this host does not meet."""
    for mark in item.iter_markers("requires"):
        for facility in mark.args:
            reason = missing(facility)
            if reason:
                _refuse(f"requires {facility}: {reason}")


ORDINARY_UID = 54321


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Under root, a test that is marked ``ordinary_user`` runs in a pytest of such a user."""
    if os.geteuid() or not pyfuncitem.get_closest_marker("ordinary_user"):
        return None
    outcome = _as_ordinary_user(pyfuncitem.path, pyfuncitem.config).get(
        pyfuncitem.name, "it has not been run"
    )
    if outcome:
        pytest.fail(f"As uid {ORDINARY_UID}:\n{outcome}", pytrace=False)
    return True


@cache
def _as_ordinary_user(tests: Path, config: pytest.Config) -> dict[str, str]:
    """Run those of *tests* in one go; for each by its name why it failed, "" if it did not. A skip
    is nothing wrong: the outer pytest has judged it already."""
    here, home = str(Path(__file__).parent), tempfile.mkdtemp(prefix="sbx-", dir="/tmp")
    os.chown(home, ORDINARY_UID, ORDINARY_UID)
    reports = Path(home, "reports")
    identity = [f"--reuid={ORDINARY_UID}", f"--regid={ORDINARY_UID}", "--clear-groups"]
    places = [str(Path(sandbox_provisioner.__file__).parents[1]), here, *packages()]
    options = ["-q", "-p", "no:cacheprovider", f"--rootdir={here}/..", "-m", "ordinary_user"]
    variables = {"HOME": home, "PATH": os.defpath, "PYTHONPATH": os.pathsep.join(places)}
    try:
        done = subprocess.run(
            ["setpriv", *identity, ordinary_python(), "-m", "pytest", *options, str(tests)],
            env=variables | {inner.REPORTS: str(reports)}, cwd=home, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if not reports.exists():
            pytest.fail(f"No report:\n{done.stdout}\n{done.stderr}", pytrace=False)
        return {test.name: "\n".join(test.failures) for test in inner.tests_of(reports, config)}
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _refuse(reason: str) -> None:
    if os.environ.get(MUST_WORK) == "1":
        pytest.fail(f"{reason} (and {MUST_WORK}=1)", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def _lasting_descriptors() -> None:
    """What is opened once in a process and stays: ZeroMQ's threads, jupyter_core's loop for calls
    that block inside of a running loop."""
    afford_a_start()  # which keeps some for clean-up
    with contextlib.suppress(ImportError):
        import zmq
        from jupyter_core.utils import ensure_event_loop, run_sync

        zmq.Context.instance().socket(zmq.PAIR).close()

        async def nested() -> None:
            run_sync(asyncio.sleep)(0)

        async def twice_nested() -> None:  # a restarter that looks, every three seconds
            run_sync(nested)()

        ensure_event_loop().run_until_complete(twice_nested())


@pytest.fixture(autouse=True)
def watch(_lasting_descriptors: None) -> Iterator[Watch]:
    """Fails a test that leaves mounts, groups, links, descriptors, children, folders, stand-ins."""
    with contextlib.suppress(ImportError):
        from jupyter_core.utils import ensure_event_loop

        ensure_event_loop()  # asyncio.run in a test before this one has put it away
    watch = Watch()
    with pytest.MonkeyPatch.context() as patch:
        note_what_is_made(patch.setattr, watch)
        yield watch
        gateway_life.end_own()
        if stem._process and stem._process.poll() is not None:
            stem.end()
        found = watch.leaks()
    watch.clean()
    if found:
        pytest.fail("The test left behind:\n" + "\n".join(found), pytrace=False)


@pytest.fixture
def new_folder(watch: Watch) -> Callable[[], Path]:
    """Makes short-named empty folders, which are removed after the test.

    pytest's own tmp_path is too deep for the path of a socket, which has 107 bytes.
    """

    def new() -> Path:
        path = Path(tempfile.mkdtemp(prefix="sbx-", dir="/tmp"))
        watch.temporary.append(path)
        return path

    return new


@pytest.fixture
def public_folder(watch: Watch) -> Path:
    """A folder that every user may read, with a copy of our code and tests in ``code``; not where
    tests look for what of the host can be seen."""
    folder = Path(tempfile.mkdtemp(prefix="sbx-", dir="/opt"))
    watch.temporary.append(folder)
    folder.chmod(0o755)
    # Compiled, where it has been: who may not write there would compile it in each process.
    repository, ours = Path(__file__).parents[1], shutil.ignore_patterns(".*")
    for name in ("sandbox_provisioner", "tests"):
        shutil.copytree(repository / name, folder / "code" / name, ignore=ours)
    shutil.copy(repository / "pyproject.toml", folder / "code")
    return folder


@pytest.fixture
def user_home(public_folder: Path) -> Path:
    """A home directory of the ordinary user `users.USER`, with our code for them to read."""
    return users.make_home(public_folder)


def _new_runtime_dir() -> Path:
    places = ("/run", os.environ.get("XDG_RUNTIME_DIR", ""), "/tmp")
    place = next(place for place in places if place and os.access(place, os.W_OK))
    return Path(tempfile.mkdtemp(prefix="sbx-", dir=place))


# With `boxes.WARM`: where the nursery lives that all tests of this session share.
_shared: list[Path] = []


def pytest_sessionstart() -> None:
    """A nursery takes seconds to make, which is too long for each test."""
    if os.environ.get(WARM):
        _shared.append(_new_runtime_dir())
        launcher = LocalLauncher(runtime_dir=str(_shared[0]))
        with tempfile.TemporaryDirectory(prefix="sbx-") as workdir:
            request, warmth = request_for(workdir), Warmth(idle_seconds=IDLE_SECONDS)
            handle = run(make_nursery(launcher, request, Labels(), warmth))
        _nursery.append(handle)


_nursery: list[Any] = []


def pytest_sessionfinish() -> None:
    """End it."""
    for handle in _nursery:
        run(handle.close())
    stem.end()
    for path in _shared:
        shutil.rmtree(path)


@pytest.fixture
def runtime_dir(watch: Watch) -> Path:
    """A runtime directory of this test's own."""
    if _shared:
        return _shared[0]
    path = _new_runtime_dir()
    watch.temporary.append(path)
    return path


@pytest.fixture
def workdir(new_folder: Callable[[], Path]) -> Path:
    """An empty work directory."""
    return new_folder()


@pytest.fixture
def warnings() -> list[str]:
    """What the launcher warned of."""
    return []


@pytest.fixture
def launcher(runtime_dir: Path, warnings: list[str]) -> LocalLauncher:
    """A launcher that keeps its records in the test's own runtime directory."""
    return LocalLauncher(runtime_dir=str(runtime_dir), warn=warnings.append)


@pytest.fixture
def sandbox(launcher: LocalLauncher, workdir: Path) -> Iterator[Boxes]:
    """``with sandbox(...) as box: box.call(function)``; see `boxes.Boxes`."""
    yield Boxes(launcher, workdir)
    close_nurseries()


@pytest.fixture
def run_inside(sandbox: Boxes) -> Callable[..., Any]:
    """``run_inside(function, *arguments, using=(), **options)``: its value, from a new sandbox."""

    def call(function: Callable[..., Any], *arguments: Any, using: Any = (), **options: Any) -> Any:
        with sandbox(**options) as box:
            return box.call(function, *arguments, using=using)

    return call
