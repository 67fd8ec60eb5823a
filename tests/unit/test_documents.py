"""What the documents name is there: pages and their headings, commands and options, files of ours.

Configurations that they show are test_documented_configuration.py's.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
from traitlets.config import Application
from traitlets.utils.importstring import import_item

from sandbox_provisioner.app import SandboxApp

REPOSITORY = Path(__file__).parents[2]
PAGES = [
    path
    for pattern in ("*.md", "docs/*.md", "[a-z]*/README.md", "tests/*/README.md")
    for path in sorted(REPOSITORY.glob(pattern))
    if path.name != "CHANGELOG.md"
]
ALL_PAGES = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPOSITORY)))
_BLOCK = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
# Options of other programs that stand alone, and files of others, with whose they are.
OF_OTHERS = {
    "--disable-hook": "nvidia-ctk's",
    "--folder": "of a hook of nvidia-ctk's",
    "--unshare-net": "bubblewrap's",
    "setup.py": "of a project of somebody's",
}


def prose_of(page: Path) -> str:
    return _BLOCK.sub("", page.read_text())


def code_of(page: Path) -> list[str]:
    """Lines of blocks, with what continues them, and pieces within the text."""
    blocks = "\n".join(_BLOCK.findall(page.read_text()))
    pieces = re.findall(r"`([^`]+)`", prose_of(page))
    return [*re.sub(r"\\\n\s*", " ", blocks).split("\n"), *(" ".join(p.split()) for p in pieces)]


@cache
def anchors_of(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ +(.*)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@ALL_PAGES
def test_what_a_page_links_to_is_there(page: Path) -> None:
    links = re.findall(r"\]\(\s*([^)\s]+)\s*\)", prose_of(page))
    for link in links:
        name, _, anchor = link.partition("#")
        if not re.match(r"[a-z]+:", name):
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors_of(target), link


@cache
def options_of(command: str) -> set[str]:
    """Those of a subcommand, as they are written."""
    app: type[Application] = import_item(SandboxApp.subcommands[command][0])
    names = {name for names in (*app.aliases, *app.flags) for name in (names, *names)}
    full = {
        f"--{owner.__name__}.{name}"
        for owner in (app, *app.classes)
        for name in owner.class_trait_names(config=True)
    }
    return {f"--{name}" for name in names} | full | {"--help", "--help-all", "--version"}


@ALL_PAGES
def test_each_command_of_ours_that_a_page_shows_is_one_and_has_these_options(page: Path) -> None:
    for line in code_of(page):
        for shown in re.findall(r"jupyter[ -]sandbox +([a-z].*)", line):
            command, *words = re.split(r"[|;&#)`]| -- | --$", shown)[0].split()
            assert command in SandboxApp.subcommands, line
            asked = {re.split(r"[=.,\]]*$|=", word.strip("["))[0] for word in words}
            asked = {word for word in asked if word.startswith("--")}
            assert asked <= options_of(command), line


@ALL_PAGES
def test_each_option_that_stands_alone_is_one_of_ours_or_known_to_be_others(page: Path) -> None:
    if page.parent.name == "benchmarks":
        return  # which have their own
    ours = set().union(*map(options_of, SandboxApp.subcommands))
    alone = {m[1] for line in code_of(page) if (m := re.match(r"(--[a-z][\w.-]*)(=|$| )", line))}
    assert alone - ours - {*OF_OTHERS} == set()


@ALL_PAGES
def test_each_file_of_python_that_a_page_names_is_one_of_ours(page: Path) -> None:
    ours = {str(path) for path in REPOSITORY.glob("[a-z]*/**/*.py")}
    for piece in code_of(page):
        if re.fullmatch(r"\w[\w/]*(?<!_config)\.py", piece) and piece not in OF_OTHERS:
            assert any(path.endswith(f"/{piece}") for path in ours), piece
