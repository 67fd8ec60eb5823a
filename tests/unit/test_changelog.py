"""A release takes every fragment of ``changelog.d`` into CHANGELOG.md, and loses none."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
FRAGMENTS = sorted(
    set(REPOSITORY.glob("changelog.d/*.md")) - {REPOSITORY / "changelog.d/README.md"}
)
SETTINGS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["towncrier"]
KINDS = {kind["directory"] for kind in SETTINGS["type"]}


def words_of(text: str) -> str:
    return " ".join(text.split())


def test_each_fragment_is_of_a_known_kind_and_a_sentence():
    kinds = "|".join(KINDS)
    for path in FRAGMENTS:
        assert re.fullmatch(rf"[A-Za-z0-9-]+\.({kinds})\.md", path.name)
        assert re.search(r"[.:)`]$", path.read_text().strip()), path.name


@pytest.mark.requires("towncrier")
def test_the_section_of_a_release_has_every_fragment():
    command = [sys.executable, "-m", "towncrier", "build", "--draft", "--version", "9.9.9"]
    done = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    assert done.stdout.count("## 9.9.9 (") == 1
    section = words_of(done.stdout)
    for path in FRAGMENTS:
        assert f"- {words_of(path.read_text())}" in section, path.name
    for kind in {path.name.split(".")[1] for path in FRAGMENTS}:
        assert f"\n### {kind.capitalize()}\n\n- " in done.stdout


def test_the_changelog_has_the_line_that_a_new_section_goes_below():
    assert "<!-- towncrier release notes start -->" in (REPOSITORY / "CHANGELOG.md").read_text()
