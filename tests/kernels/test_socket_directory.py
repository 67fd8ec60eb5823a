"""Nothing but its five sockets can a kernel put into the directory that they are in.

Until it is sealed the directory can be written to, on the host's disk: no cap of the sandbox's
counts there.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.manager import KernelManager

from sandbox_provisioner.meeting import SocketFolder
from sandbox_provisioner.provisioner import StartRefused
from sandbox_provisioner.records import all_records
from sandbox_provisioner.sweeping import sweep
from sandbox_provisioner.told import EndKind

BIND = """
import os, socket, signal
def sockets(numbers):
    found = [socket.socket(socket.AF_UNIX) for _ in numbers]
    for number, one in zip(numbers, found):
        one.bind(f"/run/kernel/s-{number}")
        one.listen()
    return found
"""
ACTS = {
    "a file": "open('/run/kernel/x', 'w').close()",
    "a file that goes at once": "open('/run/kernel/x', 'w').close(); os.unlink('/run/kernel/x')",
    "a file with a socket's name": "os.close(os.open('/run/kernel/s-1', os.O_CREAT))",
    "a file without a name": "fd = os.open('/run/kernel', os.O_TMPFILE | os.O_RDWR)",
    "a folder": "os.mkdir('/run/kernel/x')",
    "a folder with a socket's name": "os.mkdir('/run/kernel/s-1')",
    "a link": "os.symlink('/etc', '/run/kernel/x')",
    "a pipe": "os.mkfifo('/run/kernel/x')",
    "a sixth socket": "sockets([6])",
    "after many events": "[(os.symlink('a', '/run/kernel/s-1'), os.unlink('/run/kernel/s-1')) "
    "for _ in range(2000)]; os.mkdir('/run/kernel/x')",
    "folders deeper than any path": "os.chdir('/run/kernel')\n"
    "for _ in range(3000): os.mkdir('d'); os.chdir('d')",
}


def refusal(kernelspec: Any, program: str) -> str:
    argv = [sys.executable, "-c", f"{BIND}{program}\nsignal.pause()"]
    manager = KernelManager(kernel_name=kernelspec(argv=argv, start_timeout=30.0))
    with pytest.raises(StartRefused) as caught:
        manager.start_kernel()
    return str(caught.value.error)


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
def test_whoever_puts_something_else_there_is_ended(
    kernelspec: Any, runtime_dir: Path, act: str
) -> None:
    assert "none of its five sockets" in refusal(kernelspec, act)
    assert all_records(runtime_dir) == []
    sweep(runtime_dir, pytest.fail, seconds=float("inf"))
    assert [name for name in os.listdir(runtime_dir) if "." in name] == []


def test_what_is_put_there_with_the_last_socket_is_noticed(kernelspec: Any) -> None:
    program = "a = sockets(range(1, 5))\nos.mkfifo('/run/kernel/x'); b = sockets([5])"
    assert "none of its five sockets" in refusal(kernelspec, program)


def test_a_kernel_may_list_the_directory_and_bind_a_socket_again(kernelspec: Any) -> None:
    program = (
        "kept = sockets([1]); os.unlink('/run/kernel/s-1'); os.listdir('/run/kernel')\n"
        "kept += sockets(range(1, 6))"
    )
    argv = [sys.executable, "-c", f"{BIND}{program}\nsignal.pause()"]
    manager = KernelManager(kernel_name=kernelspec(argv=argv))
    manager.start_kernel()
    try:
        assert manager.provisioner.handle.meeting.mistake() == ""
    finally:
        manager.shutdown_kernel(now=True)


def is_right(folder: Path) -> bool:
    return not SocketFolder(folder, "/run/kernel", "/run/jupyter").mistake()


def test_the_server_looks_by_itself(new_folder: Any) -> None:
    folder = new_folder()
    found = []
    for number in range(1, 6):
        assert not is_right(folder)
        found.append(socket.socket(socket.AF_UNIX))
        found[-1].bind(f"{folder}/s-{number}")
    assert is_right(folder)
    (folder / "x").touch()
    assert not is_right(folder)
    (folder / "x").unlink()
    (folder / "s-1").unlink()
    (folder / "s-1").symlink_to("s-2")
    assert not is_right(folder)
    assert not is_right(folder / "gone")
    for one in found:
        one.close()


@pytest.mark.requires("landlock", "ordinary-user")
@pytest.mark.ordinary_user
def test_without_a_mount_of_its_own_it_is_watched_to_the_end(
    kernel: Any, kernelspec: Any, new_folder: Any
) -> None:
    """Landlock lets the kernel make sockets there, and nothing else."""
    waived = dict.fromkeys(("memory", "cpu", "cpuset", "pids"), "warn")
    name = kernelspec("python-landlock", confinement="landlock", on_missing=waived)
    with kernel(KernelManager(kernel_name=name), {"cwd": str(new_folder())}) as k:
        folder = k.provisioner.handle.folder.sockets
        assert "PermissionError" in k.run(f"open('{folder}/x', 'w')")
        handle = k.provisioner.handle
        k.client.execute(
            "import zmq; zmq.Context.instance().socket(zmq.PUB).bind("
            + repr(f"ipc://{folder}/x")
            + ")"
        )
        story = asyncio.run(asyncio.wait_for(handle.wait(), 60))
        assert story.kind is EndKind.SOCKETS_MISUSED
        assert story.code == 125
