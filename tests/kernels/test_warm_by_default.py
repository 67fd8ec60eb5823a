"""warm = "auto", which nobody has to ask for: who gets a nursery, whose it is, and when it ends."""

from __future__ import annotations

import contextlib
import json
import logging
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.manager import KernelManager
from jupyter_programs import REPOSITORY, Home, Server
from leaks import Watch
from warmth import came_from, made, nurseries, state_of, wait_for_end

from sandbox_provisioner import launch, provisioner
from sandbox_provisioner.facilities.caps import cgroup
from sandbox_provisioner.handle import LocalHandle
from sandbox_provisioner.launch import LocalLauncher
from sandbox_provisioner.provisioner import AUTO, SandboxProvisioner
from sandbox_provisioner.sweeping import sweep
from sandbox_provisioner.warm import ahead

# As long as a nursery may take: it gives way to all else that runs.
_READY_SECONDS = 180
_LOOK_AGAIN_MS = 20
MODULES = "import sys; print(*sys.modules)"
pytestmark = [pytest.mark.requires("userns"), pytest.mark.timeout(2 * _READY_SECONDS)]


@pytest.fixture
def auto(kernel: Any, kernelspec: Any) -> Any:
    """``with auto() as k``: a kernel whose kernelspec says nothing of warmth but the default."""

    def start(**options: Any) -> Any:
        return kernel(KernelManager(kernel_name=kernelspec(**({"warm": AUTO} | options))))

    return start


@pytest.fixture
def home() -> Iterator[Home]:
    """One with the kernelspec as it is shipped."""
    with Home() as home:
        home.add_kernel("boxed", warm=AUTO, mem_limit="512M")
        yield home


def _prepares() -> bool:
    return any(thread.name == ahead.THREAD for thread in threading.enumerate())


def test_it_is_the_default_and_the_shipped_kernelspec_does_not_say_otherwise() -> None:
    assert SandboxProvisioner().warm == AUTO
    shipped = json.loads((REPOSITORY / "kernelspecs/python3-sandbox/kernel.json").read_text())
    assert "warm" not in shipped["metadata"]["kernel_provisioner"]["config"]


def test_a_program_that_starts_one_kernel_prepares_nothing(auto: Any, runtime_dir: Path) -> None:
    with auto() as k:
        assert not _prepares()
        assert came_from(k) == ""
    assert not nurseries(runtime_dir)


def test_a_second_kernel_of_a_kernelspec_has_the_third_prepared(
    auto: Any, runtime_dir: Path
) -> None:
    with auto() as k:
        cold = state_of(k)
        k.run("%pwd")
        k.run("1 / 0")
        k.client.inspect("print", reply=True, timeout=_READY_SECONDS)
        usual = {*k.run(MODULES).split(), "ipykernel_launcher"}  # there it is the program
    with auto(name="another"):
        assert not _prepares()
    with auto() as k:
        assert came_from(k) == ""
        nursery = made(runtime_dir)
    with auto() as k:
        assert came_from(k) == nursery.sandbox_id
        assert state_of(k) == cold
        # Memory is no higher than that of a cold one's first cells: not what completes names.
        assert set(k.run(MODULES).split()) - usual == set()
        assert "import" in k.client.complete("impo", reply=True, timeout=60)["content"]["matches"]
    assert not nursery.survives_server


def test_a_start_looks_at_the_host_once_also_where_somebody_else_has_a_nursery(
    auto: Any, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    def counted(launcher: LocalLauncher, *arguments: Any) -> Any:
        nonlocal looks
        looks += launcher.runtime() == runtime_dir
        return look(launcher, *arguments)

    look = LocalLauncher.look
    monkeypatch.setattr(provisioner, "this_process", lambda: "another")
    with auto(), auto():
        made(runtime_dir)
    monkeypatch.setattr(LocalLauncher, "look", counted)
    monkeypatch.setattr(ahead, "prepare", lambda *_: None)
    monkeypatch.setattr(provisioner, "this_process", lambda: "one")
    with auto() as k:
        assert came_from(k) == ""
    assert looks == 1


def test_what_is_looked_for_at_every_start_is_told_once(
    auto: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(provisioner, "_told", set())
    monkeypatch.setattr(cgroup, "allows_less", lambda *_: "a group above allows less")
    monkeypatch.setattr(launch, "notice", lambda *_: "the server imports from there")
    for _ in range(2):
        with auto(warm=False):
            pass
    for sentence in ("a group above allows less", "the server imports from there"):
        assert caplog.messages.count(sentence) == 1, caplog.messages


def test_what_one_process_has_prepared_no_other_one_uses(
    auto: Any, kernelspec: Any, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provisioner, "this_process", lambda: "one")
    with auto(), auto():
        nursery = made(runtime_dir)
    monkeypatch.setattr(provisioner, "this_process", lambda: "another")
    with auto() as k:
        assert came_from(k) == ""
    monkeypatch.setattr(provisioner, "this_process", lambda: "one")
    with auto() as k:
        assert came_from(k) == nursery.sandbox_id


SCRIPT = """
import sys
from jupyter_client.manager import KernelManager
from sandbox_provisioner.warm import ahead
starts, waits = int(sys.argv[1]), sys.argv[2]
for number in range(starts):
    manager = KernelManager(kernel_name="boxed")
    manager.start_kernel()
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    client.stop_channels()
    if waits == "waits":
        ahead.wait()
    print(manager.provisioner.handle.record.nursery or "cold", flush=True)
    if number + 1 < starts:
        manager.shutdown_kernel()
"""


@pytest.mark.parametrize(("starts", "waits"), [(1, "waits"), (2, "ends at once"), (3, "waits")])
def test_a_script_leaves_nothing_whenever_it_ends(home: Home, starts: int, waits: str) -> None:
    command = [sys.executable, "-c", SCRIPT, str(starts), waits]
    done = subprocess.run(
        command, env=home.environment(), cwd=home.notebooks, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    told = done.stdout.split()
    assert told[:2] == ["cold", "cold"][:starts]
    assert starts < 3 or told[2] != "cold"
    assert [path.name for path in home.runtime.iterdir()] == ["lock"]


@contextlib.contextmanager
def _serving(home: Home) -> Iterator[Server]:
    server = Server(home)
    try:
        yield server
    finally:
        server.end()


def _await_nursery(home: Home) -> Any:
    """That of a server tells only by its link that it is ready."""
    end = time.monotonic() + _READY_SECONDS
    while not list(home.runtime.glob("*.nursery")):
        assert time.monotonic() < end, "the server has made no nursery"
        select.poll().poll(_LOOK_AGAIN_MS)
    (nursery,) = nurseries(home.runtime)
    return nursery


@pytest.mark.requires("jupyter_server", "cgroup-memory")
def test_a_servers_first_kernel_is_cold_its_second_is_warm_and_nothing_survives_it(
    home: Home, watch: Watch
) -> None:
    with _serving(home) as server:
        with server.session("boxed", "first.ipynb") as client:
            client.await_kernel()
            (first,) = (one for one in home.records() if one.kind == "kernel")
            nursery = _await_nursery(home)
            with server.session("boxed", "second.ipynb") as other:
                other.await_kernel()
                second = next(one for one in home.records() if one.nursery)
                assert other.run("print(6 * 7)") == "42\n"
        assert (first.nursery, second.nursery) == ("", nursery.sandbox_id)
        watch.expect_gone(nursery, home.runtime)
    assert [path.name for path in home.runtime.iterdir()] == ["lock"]


@pytest.mark.requires("jupyter_server", "cgroup-memory")
def test_a_killed_servers_nursery_ends_with_it(home: Home, watch: Watch) -> None:
    with _serving(home) as server:
        assert server.post_session("boxed").status_code == 201
        nursery = _await_nursery(home)
        for record in home.records():
            watch.expect_gone(record, home.runtime)
        server.end(kindly=False)
        wait_for_end(nursery)
    sweep(home.runtime)
    assert [path.name for path in home.runtime.iterdir()] == ["lock"]


def test_a_nursery_with_too_few_kernels_ends_before_one_that_is_worth_its_memory(
    auto: Any, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provisioner, "_LONELY_SECONDS", 5)
    told: list[float] = []
    monkeypatch.setattr(ahead.stem, "stay", told.append)
    with auto(), auto():
        wait_for_end(made(runtime_dir))
    assert told == [5]  # nor does what forks launchers wait for longer


def test_it_does_without_the_cpu_that_others_want_until_it_is_ready(
    auto: Any, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[bool] = []
    give_way = LocalHandle.give_way

    def noted(handle: Any, *, on: bool) -> None:
        told.append(on)
        give_way(handle, on=on)

    monkeypatch.setattr(LocalHandle, "give_way", noted)
    with auto(), auto():
        made(runtime_dir)
    assert (told[0], told[-1]) == (True, False)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"survive_server": True}, "it shall outlive its server"),
        (
            {"argv": [sys.executable, "-m", "bash_kernel", "-f", "{connection_file}"]},
            "its command is not that of a usual IPython kernel",
        ),
    ],
    ids=["survivor", "bash"],
)
def test_what_cannot_be_warm_starts_cold_and_says_why_once(
    auto: Any,
    runtime_dir: Path,
    caplog: pytest.LogCaptureFixture,
    options: dict[str, Any],
    why: str,
) -> None:
    provisioner._told_cold.clear()
    with caplog.at_level(logging.INFO):
        for _ in range(3):  # the first is not looked at: no second one may come
            with auto(**options) as k:
                assert came_from(k) == ""
    ahead.wait()
    assert not nurseries(runtime_dir)
    assert len([line for line in caplog.messages if why in line]) == 1, caplog.messages
