"""nbclient, and with it nbconvert, papermill and nbgrader: notebooks that run without a person."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_programs import EAT_MEMORY, Home
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from traitlets.config import Config

from sandbox_provisioner import provisioner
from sandbox_provisioner.ends import ends_in
from sandbox_provisioner.policy import current
from sandbox_provisioner.provisioner import SandboxProvisioner, StartRefused
from sandbox_provisioner.templates import keep_templates_out

pytestmark = pytest.mark.requires("userns", "nbclient")
needs_memory_cap = pytest.mark.requires("cgroup-memory")

SENTENCE = "was killed: it reached its memory limit of 200 MiB"
ENDS_PAGE = Path(__file__).parents[2] / "docs/ends.md"
WHERE_AM_I = "import socket; print(socket.gethostname())"
_PATIENCE_SECONDS = 100


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """A home whose kernelspecs this very process finds."""
    with Home() as home:
        for name, value in home.places.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(home.notebooks)
        home.add_kernel("boxed", mem_limit="512M")
        home.add_kernel("small", mem_limit="200M", mem_interrupt=0)
        yield home


def notebook(*cells: str, kernel: str = "boxed") -> Any:
    """A notebook with these code cells."""
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    made.metadata.kernelspec = {"name": kernel, "display_name": kernel, "language": "python"}
    return made


def client_of(book: Any, **options: Any) -> NotebookClient:
    return NotebookClient(book, timeout=60, **options)


def shown(cell: Any) -> str:
    """What stands under *cell*."""
    return "".join(output.get("text", "") for output in cell.outputs)


def test_nbclient_runs_a_notebook_in_the_box_by_the_name_of_its_kernel(home: Home) -> None:
    book = notebook(WHERE_AM_I, "x = 20", "print(x + 1)")
    client_of(book).execute()
    assert [shown(cell) for cell in book.cells] == ["sandbox\n", "", "21\n"]
    assert home.records() == []


@needs_memory_cap
def test_what_a_policy_has_taken_is_in_the_log_of_a_program_and_not_in_its_notebook(
    home: Home, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """nbgrader, for one, gives no marks for a test with anything on standard error."""
    policy = home.path / "sandbox.toml"
    policy.write_text('[everyone.ceilings]\nmem_limit = "300M"')
    monkeypatch.setattr(current, "_keeper", current.PolicyKeeper(str(policy), os.geteuid()))
    # While a cell waits for an answer the loop runs, and would have told.
    book = notebook("import threading; threading.Event().wait(1)", "print(6 * 7)")
    with caplog.at_level(logging.WARNING):
        client_of(book).execute()
    assert "mem_limit is 300 MiB in place of 512 MiB, by the policy" in caplog.text
    assert [shown(cell) for cell in book.cells] == ["", "42\n"]


def test_nbclient_runs_a_plain_kernel_in_the_box_where_the_environment_says_so(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jupyter_client.provisioning import KernelProvisionerFactory

    # It reads the variable when it is first used in a process.
    factory = KernelProvisionerFactory.instance()
    monkeypatch.setattr(factory, "default_provisioner_name", "sandbox-provisioner")
    book = notebook(WHERE_AM_I, kernel="python3")
    client_of(book).execute()
    assert shown(book.cells[0]) == "sandbox\n"


def test_an_error_in_a_cell_is_the_cells_and_ends_the_kernel(home: Home) -> None:
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        client_of(notebook("1 / 0")).execute()
    assert home.records() == []


def test_a_refused_start_tells_the_option(home: Home) -> None:
    home.add_kernel("bad", mem_limit="2 GB")
    with pytest.raises(StartRefused, match="Could not read mem_limit:\n'2 GB' is not a size"):
        client_of(notebook("1", kernel="bad")).execute()
    assert home.records() == []


@needs_memory_cap
def test_a_killed_kernel_is_a_dead_one_and_the_log_says_why(
    home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    book = notebook("print('before')", EAT_MEMORY, kernel="small")
    with caplog.at_level(logging.WARNING), pytest.raises(DeadKernelError):
        client_of(book).execute()
    assert SENTENCE in caplog.text
    assert shown(book.cells[0]) == "before\n"
    assert home.records() == []


@needs_memory_cap
def test_the_cell_that_killed_its_kernel_has_the_reason_among_its_outputs(home: Home) -> None:
    book = notebook(EAT_MEMORY, kernel="small")
    with pytest.raises(DeadKernelError):
        client_of(book).execute()
    assert SENTENCE in shown(book.cells[0])


@needs_memory_cap
def test_a_notebook_whose_kernel_was_killed_has_the_end_as_data(home: Home) -> None:
    book = notebook("x = 1", EAT_MEMORY, kernel="small")
    with pytest.raises(DeadKernelError):
        client_of(book).execute()
    nbformat.validate(book)
    (end,) = ends_in(json.loads(nbformat.writes(book)))
    assert (end["kind"], end["cell_index"], end["signal"]) == ("memory-cap", 1, 9)
    assert end["memory_limit_bytes"] == 200 << 20
    assert 150 << 20 < end["memory_peak_bytes"] <= 200 << 20
    assert end["sentence"] in " ".join(shown(book.cells[1]).split())


@needs_memory_cap
def test_the_example_of_the_page_about_ends_tells_the_cell_and_the_limit(home: Home) -> None:
    nbformat.write(notebook("x = 1", EAT_MEMORY, kernel="small"), "analysis.ipynb")
    (example,) = re.findall("```python\n(.*?)```", ENDS_PAGE.read_text(), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", example],
        cwd=home.notebooks,
        env=home.environment(),
        capture_output=True,
        text=True,
        timeout=_PATIENCE_SECONDS,
    )
    assert done.stdout == "cell 1 needs more than 200 MiB\n", done.stderr


def test_a_variable_that_the_program_has_set_and_kernels_lack_is_told_once_with_the_line_for_it(
    home: Home, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(provisioner, "_told_variables", set())
    monkeypatch.setenv("DATA_DIR", "/data")
    book = notebook("import os; print(os.environ.get('DATA_DIR'))")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            client_of(book).execute()
    assert shown(book.cells[0]) == "None\n"
    told = [text for text in caplog.messages if "DATA_DIR" in text]
    assert len(told) == 1
    line = re.findall(r"c\.SandboxProvisioner\.env_keep = .*", told[0])[0]
    c = Config()
    exec(line, {"c": c})
    client_of(book, config=c).execute()
    assert shown(book.cells[0]) == "/data\n"


def test_cleaning_up_twice_is_as_good_as_once(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    cleanup = SandboxProvisioner.cleanup

    async def noting(self: SandboxProvisioner, restart: bool = False) -> None:
        calls.append(restart)
        await cleanup(self, restart)

    monkeypatch.setattr(SandboxProvisioner, "cleanup", noting)
    client_of(notebook("1")).execute()
    assert calls == [False, False]
    assert home.records() == []


# -- nbconvert's command line


def convert(
    home: Home, book: Any, *words: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    path = Path(home.notebooks, "book.ipynb")
    nbformat.write(book, path)
    command = [
        "jupyter",
        "nbconvert",
        "--execute",
        "--to",
        "notebook",
        "--inplace",
        *words,
        path.name,
    ]
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=home.notebooks,
        env=home.environment(**variables),
        capture_output=True,
        text=True,
        timeout=_PATIENCE_SECONDS,
    )


@needs_memory_cap
@pytest.mark.requires("nbconvert")
def test_nbconvert_writes_no_notebook_but_a_line_about_the_end(home: Home) -> None:
    ends = home.path / "ends.jsonl"
    done = convert(
        home,
        notebook("x = 1", EAT_MEMORY, kernel="small"),
        f"--SandboxProvisioner.ends_file={ends}",
    )
    assert done.returncode == 1
    assert "DeadKernelError" in done.stderr
    (line,) = ends.read_text().splitlines()
    end = json.loads(line)
    assert (end["kind"], end["memory_limit_bytes"]) == ("memory-cap", 200 << 20)
    assert end["cell"]


PLANT = """
import os
os.makedirs("lab", exist_ok=True)
print(open("lab/index.html.j2", "w").write("PLANTED {{ 6 * 7 }}"))
"""


@pytest.mark.requires("nbconvert")
def test_a_template_that_a_kernel_plants_is_not_run_by_nbconvert(home: Home) -> None:
    def export(*words: str) -> str:
        command = ["jupyter", "nbconvert", "--to", "html", *words, "book.ipynb"]
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=home.notebooks, env=home.environment(),
            capture_output=True, text=True, timeout=_PATIENCE_SECONDS, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return Path(home.notebooks, "book.html").read_text()

    nbformat.write(notebook(PLANT), Path(home.notebooks, "book.ipynb"))
    assert "PLANTED 42" not in export("--execute")
    assert not Path(home.notebooks, "lab").exists()
    Path(home.notebooks, "lab").mkdir()
    Path(home.notebooks, "lab/index.html.j2").write_text("PLANTED {{ 6 * 7 }}")
    assert export() == "PLANTED 42", "the attack does not work where it is not held up"


@pytest.mark.requires("nbconvert")
def test_a_server_exports_with_installed_templates_only(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a kernel has left in the directory that the server was started in."""
    from nbconvert import HTMLExporter
    from traitlets.config import Config, Configurable

    monkeypatch.chdir(home.notebooks)
    Path("lab").mkdir()
    Path("lab/index.html.j2").write_text("PLANTED {{ 6 * 7 }}")
    server = Configurable(config=Config())
    manager = Configurable(parent=server)
    book = notebook("1")
    control, _ = HTMLExporter(config=server.config).from_notebook_node(book)
    assert control == "PLANTED 42", "the attack does not work where it is not held up"
    keep_templates_out(manager)
    exported, _ = HTMLExporter(config=server.config).from_notebook_node(book)
    assert "PLANTED" not in exported
    own = Config({"TemplateExporter": {"extra_template_basedirs": ["/mine"]}})
    keep_templates_out(Configurable(config=own))
    assert own.TemplateExporter.extra_template_basedirs == ["/mine"]


@pytest.mark.requires("nbconvert")
@pytest.mark.parametrize(
    ("kernel", "variables"),
    [("boxed", {}), ("python3", {"JUPYTER_DEFAULT_PROVISIONER_NAME": "sandbox-provisioner"})],
)
def test_nbconvert_executes_a_notebook_in_the_box(
    home: Home, kernel: str, variables: dict[str, str]
) -> None:
    done = convert(home, notebook(WHERE_AM_I, kernel=kernel), **variables)
    assert done.returncode == 0, done.stderr
    book = nbformat.read(home.notebooks / "book.ipynb", as_version=4)
    assert shown(book.cells[0]) == "sandbox\n"


@needs_memory_cap
@pytest.mark.requires("nbconvert")
def test_nbconvert_tells_why_the_kernel_is_dead(home: Home) -> None:
    done = convert(home, notebook(EAT_MEMORY, kernel="small"))
    assert done.returncode != 0
    assert SENTENCE in done.stderr
    assert "DeadKernelError" in done.stderr


@pytest.mark.requires("nbconvert")
def test_nbconvert_tells_why_a_kernel_was_refused(home: Home) -> None:
    home.add_kernel("bad", mem_limit="2 GB")
    done = convert(home, notebook("1", kernel="bad"))
    assert done.returncode != 0
    assert "Could not read mem_limit: '2 GB' is not a size" in done.stderr


@needs_memory_cap
def test_a_program_that_ends_its_kernel_when_it_ends_itself_leaves_nothing_and_says_nothing(
    home: Home,
) -> None:
    (home.notebooks / "script.py").write_text(WHERE_AM_I)
    command = [sys.executable, "-m", "jupyter_client.runapp", "--kernel=boxed", "script.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_SECONDS)
    assert (done.returncode, done.stdout, done.stderr) == (0, "sandbox\n", "")
    assert not list(home.runtime.glob("*/record.json"))
