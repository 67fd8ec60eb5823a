"""A server that a hub started for an ordinary user, who wants to run something without a box."""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import users
from facilities import public_python
from hub_user import CONFIG, HubHome, TerminalSocket, ipykernel, stanza
from jupyter_programs import PATIENCE_SECONDS, Home, Server

from sandbox_provisioner.app import hub_server
from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.sweeping import sweep

pytestmark = [
    pytest.mark.requires("root", "userns", "jupyter_server", "setpriv", "public-python"),
]
OTHER = 4322
BOXED = "import os, socket; print(socket.gethostname(), os.getuid())"
IN_A_BOX = f"sandbox {users.USER}\n"
SHM = "import os; s = os.statvfs('/dev/shm'); print(s.f_blocks * s.f_bsize >> 20)"
DEFAULT_SHM = "64\n"


@pytest.fixture(scope="module")
def home() -> Iterator[HubHome]:
    with HubHome() as home:
        own, anybodys = home.home / ".local/share/jupyter", home.path / "anybodys"
        ours = stanza("sandbox-provisioner", shm_limit="32M")
        home.add_spec(home.share, "plain", **ipykernel())
        home.add_spec(home.share, "local", **ipykernel(**stanza("local-provisioner")))
        home.add_spec(home.share, "unknown", **ipykernel(**stanza("no-such-provisioner")))
        home.add_spec(home.share, "capped", **ipykernel(**ours))
        home.add_spec(home.share, "others", owner=OTHER, **ipykernel(**ours))
        for name, share in (("own", own), ("shared", anybodys)):
            spec = {
                "argv": ["/bin/touch", f"{home.home}/ran-{name}"],
                "display_name": name,
                "metadata": stanza("local-provisioner"),
            }
            home.add_spec(share, name, owner=users.USER, **spec)
        home.add_spec(own, "capped", owner=users.USER, **ipykernel(**stanza("local-provisioner")))
        (anybodys / "kernels").chmod(0o777)
        home.places["JUPYTER_PATH"] = f"{own}:{anybodys}:{home.share}"
        yield home


@pytest.fixture(scope="module")
def server(home: HubHome) -> Iterator[Server]:
    server = Server(home)
    yield server
    server.end()


def watch_the_end(server: Server) -> Callable[[], None]:
    """Of the only box; what is answered waits for its end and that of the program outside, which is
    the parent of its init. Who closes a terminal kills that if it takes longer than half a second:
    then a sweep removes what is left."""
    [record] = server.home.records()
    status = Path(f"/proc/{record.init_pid}/status").read_text()
    parent = int(status.partition("PPid:")[2].split()[0])
    ends = [os.pidfd_open(pid) for pid in (record.init_pid, parent)]

    def wait() -> None:
        for end in ends:
            with io.FileIO(end):
                assert select.select([end], [], [], PATIENCE_SECONDS)[0]
        sweep(server.home.runtime)
        assert server.home.records() == []

    return wait


# -- kernelspecs


@pytest.mark.parametrize("name", ["plain", "local", "unknown", "python3"])
def test_every_kernelspec_is_started_in_a_box(server: Server, name: str) -> None:
    with server.session(name) as client:
        assert client.run(BOXED) == IN_A_BOX


def test_what_a_request_says_of_the_provisioner_changes_nothing(server: Server) -> None:
    variables = {"JUPYTER_DEFAULT_PROVISIONER_NAME": "local-provisioner"}
    answer = server.ask("POST", "kernels", {"name": "plain", "env": variables})
    assert answer.status_code == 201, answer.text
    try:
        records = server.home.records()
        assert [record.name for record in records] == ["Python"]
    finally:
        assert server.ask("DELETE", f"kernels/{answer.json()['id']}").status_code == 204


@pytest.mark.parametrize("name", ["own", "shared"])
def test_a_kernelspec_that_the_user_could_write_is_not_there(server: Server, name: str) -> None:
    assert name not in server.ask("GET", "kernelspecs").json()["kernelspecs"]
    assert server.ask("POST", "kernels", {"name": name}).status_code >= 400
    assert server.post_session(name).status_code >= 400
    assert not os.path.exists(server.home.path / f"home/ran-{name}")
    assert f"{name}/kernel.json does not count: the user of this server may change" in server.log


def test_one_of_the_users_does_not_hide_one_of_roots(server: Server) -> None:
    found = server.ask("GET", "kernelspecs/capped").json()["spec"]["metadata"]
    assert found["kernel_provisioner"]["provisioner_name"] == "sandbox-provisioner"
    with server.session("capped") as client:
        assert client.run(SHM) == "32\n"


def test_what_not_root_alone_has_written_sets_no_options(server: Server) -> None:
    with server.session("others") as client:
        assert client.run(SHM) == DEFAULT_SHM


# -- terminals


@contextlib.contextmanager
def terminal(server: Server, **request: Any) -> Iterator[TerminalSocket]:
    answer = server.ask("POST", "terminals", request)
    assert answer.status_code == 200, answer.text
    name = answer.json()["name"]
    try:
        with contextlib.closing(TerminalSocket(server, name)) as browser:
            browser.run("PS1='$'")
            yield browser
    finally:
        server.ask("DELETE", f"terminals/{name}")


def test_a_terminal_opens_in_a_box_with_the_files_of_the_users_kernels(server: Server) -> None:
    with terminal(server) as browser:
        assert "sandbox" in browser.run("uname -n")
        assert "home" in browser.run("pwd; touch from-the-terminal")
        assert "=" not in browser.run("env | grep -E 'TOKEN|JUPYTER_SERVER'")
        assert "2" in browser.run("grep Seccomp: /proc/self/status")
        browser.resize(33, 101)
        assert "33 101" in browser.run("stty size")
        for key, shown in (("\x03", "^C"), ("\x1a", "Stopped")):
            browser.type("sh -c 'echo up; exec sleep 1000'\n")
            browser.until("up\r\n")
            browser.type(key)
            browser.until(shown)
        assert "sleep 1000" in browser.run("jobs")
        browser.type("exit\nexit\n")
        browser.until("<disconnect>")
    assert (server.home.notebooks / "from-the-terminal").stat().st_uid == users.USER
    assert server.home.records() == []


def test_a_request_cannot_say_what_a_terminal_runs_or_where_outside(server: Server) -> None:
    home = server.home.notebooks
    mark = home / "ran-outside"
    (home / "evil.sh").write_text(f"touch {mark}")
    hostile = {
        "shell_command": ["/bin/touch", str(mark)],
        "extra_env": {"BASH_ENV": f"{home}/evil.sh", "PYTHONPATH": str(home)},
        "cwd": "/etc",
    }
    with terminal(server, **hostile) as browser:
        assert "sandbox" in browser.run("uname -n")
        assert str(home) in browser.run("pwd")
    assert not mark.exists()


def test_what_a_terminal_runs_ends_with_it_whatever_it_ignores(server: Server) -> None:
    with terminal(server) as browser:
        browser.run("trap '' HUP TERM INT; { setsid sleep 1000 & }")
        ended = watch_the_end(server)
    ended()


@pytest.fixture
def unwatched() -> Iterator[Server]:
    more = "c.SandboxTerminalManager.end_unwatched_after = 0.01\n"
    with HubHome(CONFIG + more) as home:
        server = Server(home)
        yield server
        server.end(kindly=False)


def test_a_terminal_ends_with_the_browser_and_with_the_server(unwatched: Server) -> None:
    for end in ("browser", "server"):
        name = unwatched.ask("POST", "terminals").json()["name"]
        with contextlib.closing(TerminalSocket(unwatched, name)) as browser:
            browser.type("trap '' HUP TERM INT; sh -c 'echo up; exec sleep 1000'\n")
            browser.until("up\r\n")
            ended = watch_the_end(unwatched)
            (browser.close if end == "browser" else unwatched.program.process.kill)()
            ended()


@pytest.mark.requires("cgroup-memory")
def test_a_terminal_has_the_memory_that_a_kernel_has_and_says_so() -> None:
    more = "c.SandboxProvisioner.mem_limit = '100M'\nc.SandboxProvisioner.mem_interrupt = 0\n"
    with Home() as home:
        more += f"c.SandboxProvisioner.runtime_dir = {str(home.runtime)!r}\n"
        (home.config / "jupyter_server_config.py").write_text(CONFIG + more)
        server = Server(home)
        try:
            with terminal(server) as browser:
                assert "pyvenv.cfg" in browser.run(f"ls {sys.prefix}")
                browser.type("x=x; while :; do x=$x$x; done\n")
                browser.until("reached its memory limit of 100 MiB")
                browser.until("<disconnect>")
        finally:
            server.end()


# -- what an administrator is told


def test_doctor_tells_what_of_a_running_server_is_closed(server: Server) -> None:
    planted = server.home.notebooks / "ran-by-doctor"
    own = server.home.config / "jupyter_server_config.py"
    own.write_text(f"open({str(planted)!r}, 'w')\nc.ServerApp.terminals_enabled = False\n")
    os.chown(own, users.USER, users.USER)
    asked = ["doctor", "--hub", "--json", f"--pid={server.program.process.pid}"]
    done = subprocess.run(
        [public_python(), "-m", "sandbox_provisioner.app", *asked],
        env={"PATH": os.defpath, "PYTHONPATH": server.home.places["PYTHONPATH"]},
        capture_output=True, text=True,
    )  # fmt: skip
    own.unlink()
    assert done.stdout, done.stderr
    assert done.returncode == 1
    rows = {row["facility"]: row for row in json.loads(done.stdout)}
    assert str(server.home.path / "etc") in rows["server"]["found"]
    closed = ("kernelspecs", "default provisioner", "terminals")
    assert {rows[name]["state"] for name in closed} == {"ok"}
    assert rows["terminals"]["found"] == "each opens in a box"
    for name in ("the user's configuration", "language servers", "extension manager"):
        assert rows[name]["state"] == "missing"
    assert not planted.exists()


def test_the_server_of_a_user_is_found_by_the_users_name(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = server.program.process.pid
    monkeypatch.setattr(
        hub_server.pwd, "getpwnam", {"ann": SimpleNamespace(pw_uid=users.USER)}.__getitem__
    )
    # There are servers of others' tests, of the same user.
    monkeypatch.setattr(
        hub_server.os, "listdir", lambda _: ["self", "1", str(os.getpid()), str(own)]
    )
    assert hub_server.server_of("ann") == own
    monkeypatch.setattr(hub_server.os, "listdir", lambda _: ["self", "1", str(os.getpid())])
    with pytest.raises(SpecError, match="no process of this user is a Jupyter server"):
        hub_server.server_of("ann")
    with pytest.raises(SpecError, match="no such user"):
        hub_server.server_of("bob")
