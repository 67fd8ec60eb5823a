"""Trouble, as a person in JupyterLab sees it: attempt, answer and remedy, without scrolling.

One server and one page for all. Pictures go to the folder that SANDBOX_ARTEFACTS names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pytest
from desk import PATIENCE_MS, SETTINGS, new_page
from jupyter_programs import TOKEN, Home, Server
from playwright.sync_api import Browser, Locator, Page, expect

pytestmark = [
    pytest.mark.requires("userns", "jupyterlab", "chromium", "playwright"),
    pytest.mark.timeout(120),
    pytest.mark.slow("JupyterLab and a browser start"),
]

COLUMNS = 80
# What does not fit into the dialog, or the dialog into the page.
HIDDEN = """
dialog => [dialog, ...dialog.querySelectorAll('*')].filter(e =>
    (getComputedStyle(e).overflowX != 'visible' && e.scrollWidth > e.clientWidth + 1)
    || (getComputedStyle(e).overflowY != 'visible' && e.scrollHeight > e.clientHeight + 1)
    || e.getBoundingClientRect().bottom > innerHeight
    || e.getBoundingClientRect().right > innerWidth
).map(e => e.tagName + '.' + e.className)
"""


@dataclass(frozen=True)
class Refused:
    """A kernel with *options* that does not start, and what the dialog *says*."""

    name: str
    options: dict[str, Any]
    says: tuple[str, ...]


REFUSED = [
    Refused(
        "misspelt option", {"mem_limt": "1G"},
        ("the option 'mem_limt' of kernel.json", "no such option", "Did you mean 'mem_limit'?"),
    ),
    Refused(
        "misspelt value", {"network": "non"},
        ("read the option network", "it has to be \"none\", not 'non'", "Did you mean 'none'?"),
    ),
    Refused(
        "value that is no size", {"mem_limit": "2 GB"},
        ("read mem_limit", "'2 GB' is not a size", 'such as "512M"'),
    ),
    Refused(
        "share above the whole", {"mem_limit": "150%"},
        ("read mem_limit", "'150 percent' is no share", "at most 100 percent"),
    ),
    Refused(
        "value of a wrong type", {"cpu_limit": "two"},
        ("read the option cpu_limit", "it has to be a number, not 'two'", "0.5 is half"),
    ),
    Refused(
        "cap that cannot be had", {"cpuset": "4000-4001"},
        ("confine to CPUs 4000,4001", "the CPUs available here are", "Write some of these"),
    ),
    Refused(
        "missing work directory", {"workdir": "/nowhere/at/all"},
        ("use '/nowhere/at/all' as the work directory", "No such file or directory", "Create it"),
    ),
    Refused(
        "work directory of many", {"workdir": "/srv"},
        ("use '/srv' as the work directory", "more than one person's files", "a directory of its"),
    ),
    Refused(
        "missing volume", {"volumes": ["/nowhere:/data"]},
        ("use the volume '/nowhere'", "No such file or directory", "Create it"),
    ),
    Refused(
        "forbidden volume", {"volumes": ["/proc:/data"]},
        ("use volume /proc:/data", "show or hide a part of the system", "Choose a target such as"),
    ),
    Refused(
        "runtime directory too long", {"runtime_dir": "/tmp/" + "long" * 30},
        ("bind the kernel's sockets at", "may have 107 bytes", "Set runtime_dir to a shorter"),
    ),
    Refused(
        "runtime directory that cannot be written", {"runtime_dir": "/proc/nowhere"},
        ("keep the sockets of kernels in /proc/nowhere", "No such file", "Set runtime_dir to"),
    ),
    Refused(
        "missing interpreter", {"argv": ["/usr/bin/no-such-python", "-f", "{connection_file}"]},
        ("/usr/bin/no-such-python", "no such program", "kernel.json"),
    ),
    Refused(
        "interpreter without ipykernel",
        {"argv": ["python", "-m", "no_such_ipykernel", "-f", "{connection_file}"]},
        ("start the kernel", "it ended with status 1 before", "No module named no_such_ipykernel"),
    ),
    Refused(
        "kernel that dies of itself",
        {"argv": ["sh", "-c", "echo its own reason >&2; kill -SEGV $$", "{connection_file}"]},
        ("start the kernel", "it was ended by signal 11 (SIGSEGV) before", "its own reason"),
    ),
    Refused(
        "kernel that never listens",
        {"argv": ["sleep", "1000"], "start_timeout": 1},
        ("start the kernel", "did not bind its sockets within 1 s", "If it is only slow, raise"),
    ),
    Refused(
        "landlock behind another name", {"confinement": "landlock", "display_name": "Python"},
        ("confinement = \"landlock\"", "does not tell that it is weaker", "install --confinement"),
    ),
]  # fmt: skip


class Desk:
    """One JupyterLab in one page, in which notebooks are opened and closed."""

    def __init__(self, lab: Server, page: Page, artefacts: Path) -> None:
        self.lab, self.page, self._artefacts = lab, page, artefacts
        page.goto(f"{lab.url}/lab?reset&token={TOKEN}")
        page.wait_for_function(
            "window.jupyterapp && window.jupyterapp.restored", timeout=PATIENCE_MS
        )
        page.evaluate("() => window.jupyterapp.restored")

    def command(self, name: str, **words: Any) -> None:
        """Run a command of JupyterLab's."""
        script = "([name, words]) => { window.jupyterapp.commands.execute(name, words) }"
        self.page.evaluate(script, [name, words])

    def open(self, kernel: str, *cells: str) -> None:
        """Open a notebook whose kernel is *kernel*."""
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        book.metadata.kernelspec = {"name": kernel, "display_name": kernel, "language": "python"}
        nbformat.write(book, self.lab.home.notebooks / f"{kernel}.ipynb")
        self.command("docmanager:open", path=f"{kernel}.ipynb")

    @property
    def dialog(self) -> Locator:
        return self.page.locator(".jp-Dialog-content")

    def shoot(self, name: str) -> None:
        self.page.screenshot(path=self._artefacts / f"trouble-{name.replace(' ', '-')}.png")

    def dismiss(self) -> None:
        """What a person clicks when the dialog is read; JupyterLab wants another kernel then."""
        self.dialog.get_by_role("button", name="Ok").click()
        self.dialog.get_by_role("button", name="No Kernel", exact=True).click()

    def clear(self) -> None:
        """Close what is open without saving it, and end all sessions."""
        while self.dialog.count():  # where a test has failed
            self.dialog.get_by_role("button", name=re.compile("^(Ok|No Kernel)$")).last.click()
        script = "() => { for (const w of [...jupyterapp.shell.widgets('main')]) w.dispose(); }"
        self.page.evaluate(script)
        for session in self.lab.ask("GET", "sessions").json():
            self.lab.ask("DELETE", f"sessions/{session['id']}")


@pytest.fixture(scope="module")
def home() -> Iterator[Home]:
    with Home() as home:
        for number, trouble in enumerate(REFUSED):
            options = {"display_name": f"Python 3 ({number})"} | trouble.options
            home.add_kernel(f"refused-{number}", **options)
        yield home


@pytest.fixture(scope="module")
def desk(home: Home, browser: Browser, artefacts: Path) -> Iterator[Desk]:
    more = SETTINGS | {"LabApp.expose_app_in_browser": "True"}
    server = Server(home, module="jupyterlab", more=more)
    try:
        for page in new_page(browser):
            yield Desk(server, page, artefacts)
    finally:
        server.end()


@pytest.fixture(autouse=True)
def cleared(desk: Desk) -> Iterator[None]:
    """Whatever a test leaves is not the next one's trouble."""
    yield
    desk.clear()


def assert_readable(text: str) -> None:
    """No line is longer than a terminal's."""
    assert max(map(len, text.splitlines())) <= COLUMNS, text


@pytest.mark.parametrize("number", range(len(REFUSED)), ids=[t.name for t in REFUSED])
def test_a_kernel_that_does_not_start_says_why_in_the_dialog(desk: Desk, number: int) -> None:
    trouble = REFUSED[number]
    desk.open(f"refused-{number}", "1")
    told = desk.dialog.locator("pre")
    expect(told).to_be_visible(timeout=PATIENCE_MS)
    desk.shoot(trouble.name)
    text = told.inner_text()
    for part in trouble.says:
        assert part in " ".join(text.split()), text
    assert text.startswith("Could not ")
    assert_readable(text)
    assert desk.dialog.evaluate(HIDDEN) == []
    desk.dismiss()
