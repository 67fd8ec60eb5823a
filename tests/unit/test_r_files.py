"""Where an R looks for its user's packages."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandbox_provisioner.facilities.environment.facts.r_files import find_r_files, is_r


def library(home: Path, name: str) -> str:
    (home / name).mkdir(parents=True)
    return str(home / name)


def look(home: Path, **environment: str) -> tuple[list[str], dict[str, str]]:
    libraries, variables = find_r_files(environment, str(home))
    return [found.path for found in libraries], variables


def test_the_libraries_of_a_home_are_found_and_named(tmp_path: Path) -> None:
    shown = library(tmp_path, "R/x86_64-pc-linux-gnu-library")
    library(tmp_path, "R/projects")
    (tmp_path / "R/file-library").touch()
    assert look(tmp_path) == ([shown], {"R_LIBS_USER": f"{tmp_path}/R/%p-library/%v"})


@pytest.mark.parametrize("told", ["~/mine:/no/such", "~/mine/%v"])
def test_what_the_variable_says_counts(tmp_path: Path, told: str) -> None:
    library(tmp_path, "R/x86_64-pc-linux-gnu-library")
    shown = library(tmp_path, "mine")
    library(tmp_path, "mine/4.2")
    paths, variables = look(tmp_path, R_LIBS_USER=told)
    assert variables == {"R_LIBS_USER": told.replace("~", str(tmp_path))}
    assert paths[0] == (f"{shown}/4.2" if "%v" in told else shown)


@pytest.mark.parametrize("told", ["", "relative/%v", "/%v", "%p"])
def test_without_a_library_nothing_is_said(tmp_path: Path, told: str) -> None:
    assert look(tmp_path, R_LIBS_USER=told) == ([], {})


def test_r_is_known_by_its_name() -> None:
    assert is_r("/usr/bin/R")
    assert is_r("/opt/conda/bin/Rscript")
    assert not is_r("/usr/bin/Rust")
