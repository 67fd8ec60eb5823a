"""The tests of the box once more, where something is different: who starts it, and how it starts.

Each variant is a pytest of its own, which the outer one reports test by test, under names such as
``user-warm/test_covers.py::test_x``. Tests that take a start apart, or look at what a test's own
runtime directory has in it, are not among those of a nursery: test_warm_starts has theirs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import inner
import pytest
from boxes import USER_IDS, WARM
from users import try_as_user

HERE = Path(__file__).parent
OF_THE_BOX = ("bounds", "covers", "file_system", "identity", "namespaces", "system_calls")


@dataclass(frozen=True)
class Variant:
    """The tests of *rooms*, with *variables* in the environment; an ordinary user's unless *root*
    runs them."""

    rooms: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    root: bool = False

    @property
    def files(self) -> list[str]:
        return [f"tests/inside/test_{room}.py" for room in self.rooms]


USER = ("userns", "root", "setpriv", "public-python")
VARIANTS = {
    "root-warm": Variant((*OF_THE_BOX, "figures", "limits"), {WARM: "1"}, root=True),
    "user": Variant(
        (
            *OF_THE_BOX,
            "attached",
            "environments",
            "layers",
            "lifecycle",
            "review",
            "starts",
            "swaps",
        )
    ),
    "user-warm": Variant((*OF_THE_BOX, "swaps"), {WARM: "1"}),
    "user-range": Variant(("file_system", "identity", "namespaces", "starts"), {USER_IDS: "range"}),
}
NEEDS = {
    "root-warm": ("userns", "root", "cgroup-memory"),
    "user": USER,
    "user-warm": USER,
    "user-range": (*USER, "newuidmap"),
}


@pytest.mark.slow("each is a pytest of hundreds of tests")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.requires(*NEEDS[name])) for name in VARIANTS]
)
def test_the_tests_of_the_box_pass_as(name: str, user_home: Path, request: pytest.FixtureRequest):
    variant, reports = VARIANTS[name], user_home / "base/reports"
    run = run_as_root if variant.root else run_as_user
    done = run(user_home, variant, reports)
    assert reports.exists(), done.stdout
    inner.report_as(name, reports, request.config)
    tests = inner.tests_of(reports, request.config)
    assert chosen_outside(request.session, variant) - {test[:2] for test in tests} == set()
    # What has failed, and how, is reported by itself.
    failed = [test.name for test in tests if test.failures]
    assert (failed, done.returncode) == ([], 0), done.stdout[-2000:] if not failed else ""


def run_as_root(_: Path, variant: Variant, reports: Path) -> subprocess.CompletedProcess[str]:
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", *variant.files)
    return subprocess.run(
        [sys.executable, *words],
        env={**os.environ, **variant.variables, inner.REPORTS: str(reports)},
        cwd=HERE.parents[1],
        stdin=subprocess.DEVNULL,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_as_user(home: Path, variant: Variant, reports: Path) -> subprocess.CompletedProcess[str]:
    code = home / "code"
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={home}/base/t")
    files = ("-c", f"{code}/pyproject.toml", *(f"{code}/{file}" for file in variant.files))
    variables = {**variant.variables, inner.REPORTS: str(reports)}
    return try_as_user(home, *words, *files, variables=variables)


def chosen_outside(session: pytest.Session, variant: Variant) -> set[tuple[str, str]]:
    """What the outer pytest runs of the same rooms, or would run if it runs none of them."""
    modules = {Path(file).stem for file in variant.files}
    chosen = {(item.path.stem, item.name) for item in session.items if item.path.stem in modules}
    return chosen or collected(variant)


def collected(variant: Variant) -> set[tuple[str, str]]:
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", *variant.files)
    told = subprocess.run(
        [sys.executable, *words], cwd=HERE.parents[1], check=True, capture_output=True, text=True
    ).stdout
    names = (line.partition("::") for line in told.splitlines() if "::" in line)
    return {(Path(file).stem, name) for file, _, name in names}
