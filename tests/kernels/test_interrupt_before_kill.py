"""A kernel that comes close to its memory cap is interrupted, and its variables stay."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.provisioner import SandboxProvisioner, StartRefused
from sandbox_provisioner.told import EndKind

pytestmark = pytest.mark.requires("userns", "cgroup-memory")

ROUNDS = 20
STEP_BY_STEP = "while True:\n    kept.append(bytearray(b'x' * (10 << 20)))"


def outputs(kernel: Any, code: str) -> list[tuple[str, str]]:
    """(stream's or error's name, its text) of what the cell *code* showed until it was idle."""
    found: list[tuple[str, str]] = []
    kernel.client.execute_interactive(
        code, output_hook=lambda message: found.extend(shown(message)), timeout=60
    )
    return found


def shown(message: dict[str, Any]) -> list[tuple[str, str]]:
    content = message["content"]
    if message["msg_type"] == "stream":
        return [(content["name"], content["text"])]
    return [(content["ename"], content["evalue"])] if message["msg_type"] == "error" else []


def interrupted(kernel: Any, code: str = STEP_BY_STEP) -> list[tuple[str, str]]:
    """The outputs of a cell that grows, with the sentence: a thread of the kernel's sends that,
    perhaps after the end of the cell."""
    found = outputs(kernel, code)
    while is_interrupt(found) and not said(found):
        found += shown(kernel.client.get_iopub_msg(timeout=60))
    return found


def is_interrupt(found: list[tuple[str, str]]) -> bool:
    return [name for name, _ in found if name != "stderr"] == ["KeyboardInterrupt"]


def said(found: list[tuple[str, str]]) -> str:
    return "".join(text for name, text in found if name == "stderr")


@pytest.mark.slow("twenty rounds up to the cap")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mem_limit", ["512M", "768M"])
def test_a_loop_that_grows_is_interrupted_and_the_variables_are_there(
    kernel: Any, mem_limit: str
) -> None:
    with kernel(mem_limit=mem_limit) as k:
        k.run("answer = 42")
        for number in range(ROUNDS):
            assert k.run("kept = []") == "", number
            found = interrupted(k)
            assert is_interrupt(found), (number, found)
            assert "The kernel is interrupted: it uses " in said(found), number
            assert f"its memory limit of {mem_limit[:-1]} MiB" in said(found), number
            assert int(k.run("len(kept)")) * 10 > int(mem_limit[:-1]) * 0.6, number
            assert k.run("del kept; answer") == "42", number


def test_one_that_grows_where_the_page_cache_has_filled_the_cap_is_interrupted_too(
    kernel: Any, workdir: Path
) -> None:
    big = big_file(workdir)
    with kernel(mem_limit="512M") as k:
        for _ in range(3):
            found = outputs(k, f"{read_all(big)}\nkept = []\n{STEP_BY_STEP}")
            assert is_interrupt(found), found
            assert k.run("bool(kept); del kept; 6 * 7") == "42"


def test_one_that_reads_more_than_its_cap_is_left_alone(kernel: Any, workdir: Path) -> None:
    big = big_file(workdir)
    with kernel(mem_limit="512M") as k:
        assert outputs(k, f"{read_all(big)}\n{read_all(big)}\nprint('done')") == [
            ("stdout", "done\n")
        ]
        # On cgroup v2 memory.high, which stands at the share, keeps the cache below it.
        share = 0.92 if k.provisioner.handle.record.cgroup_version == 1 else 0.85
        assert k.provisioner.handle.usage().memory_bytes > share * (512 << 20)
        assert k.provisioner.handle.notices() == []


def big_file(folder: Path) -> Path:
    path = folder / "big"
    with path.open("wb") as file:
        for _ in range(700):
            file.write(bytes(1 << 20))
    # On its way to the disk it would be charged to whoever wrote it: to us.
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


def read_all(path: Path) -> str:
    return (
        f"with open({str(path)!r}, 'rb', buffering=0) as file:\n"
        "    while file.readinto(part := bytearray(1 << 20)): pass"
    )


@pytest.mark.parametrize("place", ["/tmp", "/dev/shm"])
def test_files_in_memory_count(kernel: Any, place: str) -> None:
    with kernel(mem_limit="512M", shm_limit="1G", tmp_limit="1G") as k:
        found = outputs(
            k,
            f"import time\nfile = open('{place}/x', 'wb', buffering=0)\n"
            "while True:\n    file.write(b'x' * (1 << 20))\n    time.sleep(0.001)",
        )
        assert is_interrupt(found), found
        assert k.run("file.truncate(0)") == "0"


def test_a_child_that_grows_is_interrupted_too(kernel: Any) -> None:
    with kernel(mem_limit="512M") as k:
        child = f"kept = []\n{STEP_BY_STEP}"
        found = outputs(
            k, f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])"
        )
        assert is_interrupt(found), found
        assert k.run("6 * 7") == "42"


def test_a_loop_that_catches_the_interrupt_is_interrupted_again(kernel: Any) -> None:
    with kernel(mem_limit="512M") as k:
        found = outputs(
            k,
            "import time\nkept = []\ntry:\n"
            + STEP_BY_STEP.replace("while", "    while").replace("    kept", "        kept")
            + "\nexcept KeyboardInterrupt:\n    while True:\n"
            "        kept.append(bytearray(b'x' * (1 << 20))); time.sleep(0.05)",
        )
        assert is_interrupt(found), found
        assert said(found).count("is interrupted") >= 2


def test_one_big_allocation_is_killed_and_says_so(kernel: Any, workdir: Path) -> None:
    os.mkfifo(workdir / "go")
    with kernel(mem_limit="256M") as k:
        request = k.start("open('go').read()\nx = b'x' * (600 << 20)")
        (workdir / "go").write_text("")
        asyncio.run(k.provisioner.handle.wait())
        assert not k.manager.is_alive()
        told = k.until(lambda m: "was killed" in m["content"].get("text", ""), request)
        assert "it reached its memory limit of 256 MiB" in told["content"]["text"]
        assert k.provisioner.story.kind is EndKind.MEMORY_CAP


@pytest.mark.parametrize("value", [0, None, False])
def test_it_can_be_turned_off(kernel: Any, value: object) -> None:
    with kernel(mem_limit="128M", mem_interrupt=value) as k:
        k.start(f"kept = []\n{STEP_BY_STEP}")
        story = asyncio.run(k.provisioner.handle.wait())
        assert story.oom_killed
        assert not k.manager.is_alive()


def test_the_share_is_what_one_asks_for(kernel: Any) -> None:
    with kernel(mem_limit="400M", mem_interrupt=0.5) as k:
        found = interrupted(k, f"kept = []\n{STEP_BY_STEP}")
        assert is_interrupt(found), found
        assert 200 <= int(said(found).partition("it uses ")[2].split()[0]) < 240


@pytest.mark.parametrize("value", [1, 0.3, -0.5, 92, True])
def test_a_share_that_cannot_be_meant_is_refused(kernelspec: Any, value: object) -> None:
    manager = KernelManager(kernel_name=kernelspec(mem_limit="256M", mem_interrupt=value))
    with pytest.raises(StartRefused, match=r"0\.5 to 0\.99, or 0") as caught:
        manager.start_kernel()
    assert isinstance(caught.value.error, SpecError)


def test_a_kernel_that_wants_interrupts_as_messages_gets_no_signal(kernelspec: Any) -> None:
    manager = KernelManager(kernel_name=kernelspec(mem_limit="256M"))
    provisioner = SandboxProvisioner(kernel_spec=manager.kernel_spec, parent=None)
    provisioner.mem_limit = "256M"
    assert provisioner.spec_for("/srv").limits.interrupt_share == 0.92
    manager.kernel_spec.interrupt_mode = "message"
    assert provisioner.spec_for("/srv").limits.interrupt_share is None


# -- who is told


def test_the_log_tells_of_it(kernel: Any, caplog: pytest.LogCaptureFixture) -> None:
    with kernel(mem_limit="512M") as k:
        k.manager.log.propagate = True
        assert is_interrupt(outputs(k, f"kept = []\n{STEP_BY_STEP}"))
        assert k.manager.is_alive()
        assert "was interrupted: it uses 4" in caplog.text
        assert "of its memory limit of 512 MiB" in caplog.text


def test_a_kernel_that_ends_of_the_interrupt_says_so_under_the_cell(kernel: Any) -> None:
    with kernel(mem_limit="512M") as k:
        request = k.start(
            "import os, signal; signal.signal(signal.SIGINT, lambda *_: os._exit(3))\nkept = []\n"
            + STEP_BY_STEP
        )
        assert asyncio.run(k.provisioner.handle.wait()).code == 3
        assert not k.manager.is_alive()
        told = k.until(lambda m: "ended when it was" in m["content"].get("text", ""), request)
        assert "its memory limit of 512 MiB" in " ".join(told["content"]["text"].split())


def test_one_that_hears_no_interrupt_is_left_to_the_kill(kernel: Any) -> None:
    with kernel(mem_limit="256M") as k:
        k.start(
            "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL)\nkept = []\n"
            + STEP_BY_STEP
        )
        assert asyncio.run(k.provisioner.handle.wait()).oom_killed


def test_a_kernel_that_is_asked_to_end_soon_after_did_not_end_of_it(
    kernel: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with kernel(mem_limit="512M") as k:
        k.manager.log.propagate = True
        assert is_interrupt(outputs(k, f"kept = []\n{STEP_BY_STEP}"))
        k.shutdown()
        assert "was interrupted" in caplog.text
        assert "ended" not in caplog.text


def test_a_notebook_that_nbclient_runs_keeps_the_sentence(kernelspec: Any) -> None:
    cell = nbformat.v4.new_code_cell(f"kept = []\n{STEP_BY_STEP}")
    notebook = nbformat.v4.new_notebook(cells=[cell])
    with pytest.raises(CellExecutionError, match="KeyboardInterrupt"):
        NotebookClient(notebook, kernel_name=kernelspec(mem_limit="512M")).execute()
    kinds = [(output.output_type, output.get("name", "")) for output in cell.outputs]
    assert ("stream", "stderr") in kinds
    assert "is interrupted" in "".join(output.get("text", "") for output in cell.outputs)


def test_a_standard_error_that_is_no_pipe_gets_nothing(kernel: Any, workdir: Path) -> None:
    (workdir / "mine").write_text("")
    with kernel(mem_limit="512M") as k:
        k.run("import os; other = os.open('mine', os.O_WRONLY); os.dup2(other, 2)")
        assert is_interrupt(outputs(k, f"kept = []\n{STEP_BY_STEP}"))
        assert k.run("del kept; os.close(2)") == ""
        assert is_interrupt(outputs(k, f"kept = []\n{STEP_BY_STEP}"))
        assert k.run("6 * 7") == "42"
    assert (workdir / "mine").read_text() == ""


def test_init_has_no_more_rights_over_files_than_the_kernels_user(kernel: Any) -> None:
    with kernel(mem_limit="256M") as k:
        told = k.run(
            "import os; status = dict(l.split(':', 1) for l in open('/proc/1/status'))\n"
            "[status[n].split()[3] for n in ('Uid', 'Gid')] == [str(os.getuid()), str(os.getgid())]"
        )
    assert told == "True"
