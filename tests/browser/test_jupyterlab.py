"""JupyterLab in a real browser: what a person sees of a sandboxed kernel.

Each test leaves pictures in the folder that SANDBOX_ARTEFACTS names, for a person to judge.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest
from desk import PATIENCE_MS, SETTINGS
from jupyter_programs import EAT_MEMORY, TOKEN, Home, Server, end_lab
from playwright.sync_api import Locator, Page, expect

pytestmark = [
    pytest.mark.requires("userns", "jupyterlab", "chromium", "playwright"),
    pytest.mark.timeout(300),
    pytest.mark.slow("JupyterLab and a browser start"),
]

SENTENCE = "was killed: it reached its memory limit of 200 MiB"
POLICY = '[everyone.ceilings]\nmem_limit = "1G"'
UNDER_A_POLICY = """
import os
from sandbox_provisioner.policy import current
current._keeper = current.PolicyKeeper("{path}", os.geteuid())
"""


@pytest.fixture(scope="module")
def home() -> Iterator[Home]:
    with Home() as home:
        home.add_kernel("boxed", mem_limit="512M", display_name="Python 3 (sandboxed)")
        home.add_kernel(
            "small", mem_limit="200M", mem_interrupt=0, display_name="Python 3 (200 MiB)"
        )
        home.add_kernel("patient", mem_limit="512M", display_name="Python 3 (512 MiB)")
        home.add_kernel("bad", mem_limit="2 GB", display_name="Python 3 (misspelt)")
        home.add_kernel("greedy", mem_limit="2G", display_name="Python 3 (2 GiB)")
        policy = home.path / "sandbox.toml"
        policy.write_text(POLICY)
        (home.config / "jupyter_server_config.py").write_text(UNDER_A_POLICY.format(path=policy))
        yield home


@pytest.fixture(scope="module")
def lab(home: Home) -> Iterator[Server]:
    server = Server(home, module="jupyterlab", more=SETTINGS)
    yield server
    end_lab(server)


class Notebook:
    """An open notebook in JupyterLab."""

    def __init__(self, lab: Server, page: Page, kernel: str, *cells: str) -> None:
        self.lab = lab
        self.page = page
        self.name = f"{kernel}-{len(list(lab.home.notebooks.glob('*.ipynb')))}.ipynb"
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        book.metadata.kernelspec = {"name": kernel, "display_name": kernel, "language": "python"}
        nbformat.write(book, lab.home.notebooks / self.name)
        page.goto(f"{lab.url}/lab/tree/{self.name}?reset&token={TOKEN}")

    def cell(self, number: int) -> Locator:
        return self.page.locator(".jp-Notebook .jp-Cell").nth(number)

    def output(self, number: int) -> Locator:
        return self.cell(number).locator(".jp-OutputArea-output")

    def run(self, number: int) -> None:
        self.cell(number).locator(".cm-content").click()
        self.page.keyboard.press("Control+Enter")

    def menu(self, name: str, entry: str) -> None:
        self.page.get_by_role("menuitem", name=name, exact=True).click()
        self.page.get_by_role("menuitem", name=entry).click()

    def await_idle(self) -> None:
        """Wait until the status bar says that the kernel has nothing to do."""
        idle = self.page.get_by_role("button", name=re.compile(r"\| Idle"))
        expect(idle).to_be_visible(timeout=PATIENCE_MS)

    def close(self) -> None:
        """End its session."""
        for session in self.lab.ask("GET", "sessions").json():
            assert self.lab.ask("DELETE", f"sessions/{session['id']}").status_code == 204


@pytest.fixture
def shoot(page: Page, artefacts: Path) -> Callable[[str], None]:
    def shoot(name: str) -> None:
        page.screenshot(path=artefacts / f"{name}.png")

    return shoot


@pytest.fixture
def notebook(lab: Server, page: Page) -> Iterator[Callable[..., Notebook]]:
    opened: list[Notebook] = []

    def open_notebook(kernel: str, *cells: str) -> Notebook:
        opened.append(Notebook(lab, page, kernel, *cells))
        return opened[-1]

    yield open_notebook
    for book in opened:
        book.close()


Open = Callable[..., Notebook]
Shoot = Callable[[str], None]


def test_a_cell_shows_its_output(notebook: Open, shoot: Shoot) -> None:
    book = notebook("boxed", "import socket\nprint(6 * 7, socket.gethostname())")
    book.await_idle()
    book.run(0)
    expect(book.output(0)).to_have_text("42 sandbox", timeout=PATIENCE_MS)
    shoot("output")


@pytest.mark.requires("cgroup-memory")
def test_what_a_policy_has_taken_stands_under_the_first_cell_also_when_that_is_over(
    notebook: Open, shoot: Shoot
) -> None:
    book = notebook("greedy", "1 + 1", "2 + 2")
    book.await_idle()
    book.run(0)
    told = "mem_limit is 1 GiB in place of 2 GiB, by the policy"
    expect(book.output(0).filter(has_text=told)).to_be_visible(timeout=PATIENCE_MS)
    book.run(1)
    expect(book.output(1)).to_have_text("4", timeout=PATIENCE_MS)
    shoot("narrowed")


def test_an_endless_cell_is_interrupted(notebook: Open, shoot: Shoot) -> None:
    book = notebook("boxed", "print('begun')\nwhile True: pass", "1 + 1")
    book.await_idle()
    book.run(0)
    expect(book.output(0)).to_have_text("begun", timeout=PATIENCE_MS)
    book.menu("Kernel", "Interrupt Kernel")
    expect(book.output(0).last).to_contain_text("KeyboardInterrupt", timeout=PATIENCE_MS)
    book.await_idle()
    shoot("interrupt")
    book.run(1)
    expect(book.output(1)).to_have_text("2", timeout=PATIENCE_MS)


@pytest.mark.requires("cgroup-memory")
def test_the_reason_stands_under_the_cell_that_reached_the_memory_cap(
    notebook: Open, shoot: Shoot, page: Page
) -> None:
    book = notebook("small", EAT_MEMORY, "print('alive', 1 + 1)")
    book.await_idle()
    book.run(0)
    expect(book.output(0).last).to_contain_text(SENTENCE, timeout=PATIENCE_MS)
    dialog = page.locator(".jp-Dialog-content")
    expect(dialog).to_be_visible(timeout=PATIENCE_MS)
    shoot("memory-dialog")
    dialog.get_by_role("button").last.click()
    # JupyterLab says "Starting" of any kernel that was restarted, until it runs a cell.
    book.run(1)
    expect(book.output(1)).to_have_text("alive 2", timeout=PATIENCE_MS)
    expect(book.output(0).last).to_contain_text(SENTENCE)
    shoot("memory")


@pytest.mark.requires("cgroup-memory")
def test_a_cell_that_comes_close_to_the_memory_cap_is_interrupted_and_says_so(
    notebook: Open, shoot: Shoot
) -> None:
    book = notebook("patient", EAT_MEMORY, "print('kept', bool(hoard))")
    book.await_idle()
    book.run(0)
    expect(book.output(0).first).to_contain_text("is interrupted: it uses", timeout=PATIENCE_MS)
    expect(book.output(0).last).to_contain_text("KeyboardInterrupt", timeout=PATIENCE_MS)
    book.run(1)
    expect(book.output(1)).to_have_text("kept True", timeout=PATIENCE_MS)
    shoot("memory-interrupt")


def test_a_kernel_that_is_refused_says_why_in_a_dialog(
    notebook: Open, shoot: Shoot, page: Page
) -> None:
    notebook("bad", "1")
    dialog = page.locator(".jp-Dialog-content")
    expect(dialog).to_contain_text("Could not read mem_limit: '2 GB' is not a size")
    expect(dialog).to_contain_text('such as "512M"')
    shoot("refused")
