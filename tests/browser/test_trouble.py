"""Trouble, as a person in JupyterLab sees it: attempt, answer and remedy, without scrolling.

One server and one page for all. Pictures go to the folder that SANDBOX_ARTEFACTS names.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import pytest
from desk import PATIENCE_MS, SETTINGS, new_page
from jupyter_programs import TOKEN, Home, KernelSocket, Server, end_lab
from playwright.sync_api import Browser, Locator, Page, expect

pytestmark = [
    pytest.mark.requires("userns", "jupyterlab", "chromium", "playwright"),
    pytest.mark.timeout(120),
    pytest.mark.slow("JupyterLab and a browser start"),
]

COLUMNS = 80
_ENDS_SECONDS = 10.0  # an end takes milliseconds
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
        ('be "none" or "gateway" or "card"', "not 'non'", "Did you mean 'none'?"),
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


def kill_the_kernel(home: Home, init: int) -> None:
    """As an administrator would, who reads ps: PID 1 has started one process, the kernel."""
    [kernel] = Path(f"/proc/{init}/task/{init}/children").read_text().split()
    os.kill(int(kernel), signal.SIGKILL)


def replace_the_work_directory(home: Home, init: int) -> None:
    """As whoever puts a newer copy of a project in its place."""
    place = home.path / "project"
    place.rename(home.path / "older")
    place.mkdir()


def replace_a_covered_file(home: Home, init: int) -> None:
    """As an editor that keeps a backup: nobody knows who has the file by that other name."""
    place, pidfd, wait = home.path / "home", os.pidfd_open(init), 0.0
    try:
        while not select.select([pidfd], [], [], wait)[0]:
            wait = _ENDS_SECONDS
            new = place / ".bashrc.new"
            new.write_text("alias ll='ls -l'")
            (place / ".bashrc~").unlink(missing_ok=True)
            os.link(new, place / ".bashrc~")
            new.rename(place / ".bashrc")
    finally:
        os.close(pidfd)


WAIT = "import threading\nprint('begun')\nthreading.Event().wait()"
THREADS = """import threading
done = threading.Event()
print('begun')
while True:
    threading.Thread(target=done.wait, daemon=True).start()"""


@dataclass(frozen=True)
class Met:
    """What a kernel with *options* meets while it runs *cell*, or is *done* to it from outside when
    the cell has begun, and what stands below the cell then; *ends* the kernel."""

    name: str
    says: tuple[str, ...]
    cell: str = WAIT
    options: dict[str, Any] = field(default_factory=dict)
    done: Callable[[Home, int], None] | None = None
    ends: bool = True


MET = [
    Met(
        "process cap",
        ("was refused another process", "as many as pids_limit allows", "raise pids_limit"),
        THREADS, {"pids_limit": 40}, ends=False,
    ),
    Met(
        "process cap that ends the kernel",
        ("ended just after it was refused", "as many as pids_limit allows", "Raise pids_limit"),
        f"import os\n{THREADS}".replace("while", "try:\n  while").replace("\n    t", "\n      t")
        + "\nexcept RuntimeError:\n  os._exit(1)", {"pids_limit": 40},
    ),
    Met(
        "kernel killed from outside",
        ("was killed by SIGKILL", "a person or a program outside", "start the kernel again"),
        done=kill_the_kernel,
    ),
    Met(
        "work directory replaced",
        ("was moved, removed or replaced", "goes on in the old one", "Restart the kernel"),
        options={"workdir": "{home}/project"}, done=replace_the_work_directory, ends=False,
    ),
    Met(
        "cover lost",
        ("a program outside has replaced .bashrc", "must not reach", "Look at that file"),
        options={"workdir": "{home}/home"}, done=replace_a_covered_file,
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
    def output(self) -> Locator:
        """What stands below the last cell."""
        return self.page.locator(".jp-Notebook .jp-Cell").last.locator(".jp-OutputArea")

    def await_idle(self) -> None:
        """Wait until the status bar says that the kernel has nothing to do."""
        idle = self.page.get_by_role("button", name=re.compile(r"\| Idle"))
        expect(idle).to_be_visible(timeout=PATIENCE_MS)

    @property
    def told(self) -> Locator:
        """What of it stands on red, which is not the cell's own."""
        return self.output.locator("[data-mime-type='application/vnd.jupyter.stderr']").last

    def await_restart(self) -> None:
        """Wait until the new kernel answers: jupyter_client ends none that begins."""
        for kernel in self.lab.ask("GET", "kernels").json():
            with contextlib.closing(KernelSocket(self.lab, kernel["id"])) as client:
                client.await_kernel()

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
        for number, trouble in enumerate(MET):
            found = {name: _at(home, value) for name, value in trouble.options.items()}
            home.add_kernel(f"met-{number}", display_name=f"Python 3 ({trouble.name})", **found)
        argv = ["python", "-O", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        home.add_kernel("never-warm", argv=argv, warm=True, display_name="Python 3 (warm)")
        (home.path / "project").mkdir()
        (home.path / "home/.bashrc").write_text("")
        yield home


def _at(home: Home, value: Any) -> Any:
    return value.format(home=home.path) if isinstance(value, str) else value


@pytest.fixture(scope="module")
def desk(home: Home, browser: Browser, artefacts: Path) -> Iterator[Desk]:
    more = SETTINGS | {"LabApp.expose_app_in_browser": "True"}
    server = Server(home, module="jupyterlab", more=more)
    try:
        for page in new_page(browser):
            yield Desk(server, page, artefacts)
    finally:
        end_lab(server)


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


@pytest.mark.requires("cgroup-pids")
@pytest.mark.parametrize("number", range(len(MET)), ids=[t.name for t in MET])
def test_what_a_running_kernel_meets_stands_below_its_cell(desk: Desk, number: int) -> None:
    trouble = MET[number]
    desk.open(f"met-{number}", trouble.cell)
    desk.await_idle()
    [record] = desk.lab.home.records()
    desk.command("notebook:run-all-cells")
    if trouble.done:
        # Of a cell that ends its kernel at once nothing else may be shown.
        expect(desk.output).to_contain_text("begun", timeout=PATIENCE_MS)
        trouble.done(desk.lab.home, record.init_pid)
    # The last part is a word of the remedy, the last sentence.
    expect(desk.told).to_contain_text(trouble.says[-1], timeout=PATIENCE_MS)
    if trouble.ends:
        expect(desk.dialog).to_be_visible(timeout=PATIENCE_MS)
        desk.dialog.get_by_role("button").last.click()
        desk.await_restart()
    desk.shoot(trouble.name)
    text = desk.told.inner_text()
    for part in trouble.says:
        assert part in " ".join(text.split()), text
    assert_readable(text)
    assert desk.output.evaluate(HIDDEN) == []


def test_a_kernel_that_can_never_start_warm_works_and_the_log_says_why(desk: Desk) -> None:
    """Nothing is amiss for the person; for who has written the kernel.json it is."""
    desk.open("never-warm", "6 * 7")
    desk.await_idle()
    desk.command("notebook:run-all-cells")
    expect(desk.output).to_contain_text("42", timeout=PATIENCE_MS)
    desk.shoot("warm asked and impossible")
    line = desk.lab.program.await_line("Could not start kernels of 'Python 3 .warm.' warm")
    assert "its command is not that of a usual IPython kernel" in line
    assert "Change that, or remove it." in line
