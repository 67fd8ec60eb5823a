"""A real hub with its real proxy, and the servers of real users in boxes.

One hub for all of these tests; ann and bob have a server each, which a test that ends one starts
again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import PATIENCE_SECONDS, TOKEN, UID, Hub, type_at

from sandbox_provisioner.descriptors import is_readable
from sandbox_provisioner.facilities.ids.facts import FIRST_PERSONS_ID, IDS
from sandbox_provisioner.records import Record, open_init

pytestmark = [
    pytest.mark.timeout(2 * PATIENCE_SECONDS),  # the hub, and both servers, may start in one test
    pytest.mark.requires(
        "root", "cgroup-memory", "jupyterhub", "jupyter_server", "websocket", "requests",
        "unshare", "configurable-http-proxy",
    ),
]  # fmt: skip

PEOPLE = ("ann", "bob", "eve", "mallory")
MORE = """
c.SandboxSpawner.mem_limit = "768M"
c.SandboxSpawner.pids_limit = 150
c.SandboxSpawner.volumes = {"{folder}/shared/{{username}}": "/shared"}

def before(spawner):
    if spawner.user.name == "eve":
        spawner.cmd = ["sh", "-c", "echo this is the end >&2; exit 3"]
    spawner.volumes = {} if spawner.user.name == "eve" else spawner.volumes

c.Spawner.pre_spawn_hook = before
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    hub = Hub(PEOPLE)
    with (hub.folder / "jupyterhub_config.py").open("a") as file:
        file.write(MORE.replace("{folder}", str(hub.folder)).replace("{{", "{").replace("}}", "}"))
    for name in PEOPLE:
        (hub.folder / "shared" / name).mkdir(parents=True)
    hub.start()
    try:
        yield hub
    finally:
        hub.close()


@pytest.fixture
def ann(hub: Hub) -> str:
    return running(hub, "ann")


@pytest.fixture
def bob(hub: Hub) -> str:
    return running(hub, "bob")


def running(hub: Hub, name: str) -> str:
    if name not in hub.people():
        events = hub.begin(name)
        assert events[-1].get("ready"), (events, hub.log.read_text())
    return name


def groups_of(record: Record) -> list[Path]:
    """Of the person, in each hierarchy."""
    name = os.path.dirname(os.path.dirname(record.tree))
    bases = set(record.cgroup_bases.values())
    return [Path(base, "sandbox-provisioner", name) for base in bases]


def is_gone(hub: Hub, record: Record) -> bool:
    """Whether nothing is left of a server: groups, record, and the ways in and out."""
    places = [
        hub.runtime / record.sandbox_id,
        Path(f"{hub.runtime}-hub", record.sandbox_id),
        *groups_of(record),
    ]
    return not any(path.exists() for path in places)


def await_end(record: Record) -> None:
    pidfd = open_init(record)
    if pidfd is not None:
        assert is_readable(pidfd, PATIENCE_SECONDS)
        os.close(pidfd)


# -- what works


def test_a_start_tells_how_far_it_is_and_where_the_server_is(hub: Hub) -> None:
    if "bob" in hub.people():
        hub.stop("bob")
    events = hub.begin("bob")
    told = [event["message"] for event in events]
    assert "Making the box ..." in told
    assert events[-1]["ready"], events
    assert hub.ask("bob", "GET", "/status").json()["kernels"] == 0


def test_a_kernel_over_the_hubs_websocket_has_the_persons_home_and_no_other(
    hub: Hub, ann: str, bob: str
) -> None:
    (hub.home("bob") / "secret").write_text("b")
    with hub.kernel(ann) as kernel:
        assert kernel.run("import os, socket; print(os.getuid(), os.getcwd())").split() == [
            "1000", str(hub.home("ann")),
        ]  # fmt: skip
        kernel.run("open('made', 'w').write('by ann'); open('/shared/made', 'w').close()")
        assert kernel.run(f"print(os.listdir({str(hub.folder / 'home')!r}))").strip() == "['ann']"
        assert "FileNotFound" in kernel.run(f"open({str(hub.home('bob') / 'secret')!r})")
        assert kernel.run("print(os.path.exists('/root/.bashrc'))").strip() == "False"
    status = (hub.home("ann") / "made").stat()
    assert (status.st_uid, status.st_gid) == (UID, UID)
    assert (hub.folder / "shared/ann/made").exists()


def test_each_person_has_a_range_of_ids_and_groups_of_roots(hub: Hub, ann: str, bob: str) -> None:
    found = {name: hub.record(name) for name in (ann, bob)}
    firsts = sorted(record.first_id for record in found.values())
    assert len(set(firsts)) == 2
    assert all((first - FIRST_PERSONS_ID) % IDS == 0 and first >= FIRST_PERSONS_ID
               for first in firsts)  # fmt: skip
    told = (hub.folder / "state/ranges").read_text()
    assert all(f"{name} {record.first_id}\n" in told for name, record in found.items())
    pid = found[ann].init_pid
    assert Path(f"/proc/{pid}").stat().st_uid == found[ann].first_id
    version, bases = found[ann].cgroup_version, found[ann].cgroup_bases
    file = {1: "memory.limit_in_bytes", 2: "memory.max"}[version]
    for name in ("hub/ann", "hub/ann/server"):
        limit = Path(bases["memory"], "sandbox-provisioner", name, file).read_text()
        assert int(limit) == 768 << 20
    for group in filter(Path.exists, groups_of(found[ann])):
        files = [group, *group.rglob("*")]
        assert {path.stat().st_uid for path in files} == {0}
        assert not any(path.stat().st_mode & 0o022 for path in files)


def test_a_terminal_sees_the_box_alone(hub: Hub, ann: str, bob: str) -> None:
    name = hub.ask(ann, "POST", "/terminals").json()["name"]
    terminal = hub.connect(ann, f"terminals/websocket/{name}")
    try:
        shown = type_at(terminal, "ls /tmp/sbx-*/home; grep Seccomp: /proc/self/status; ps -e")
        assert "ann" in shown and "bob" not in shown
        assert "Seccomp:\t2" in shown.expandtabs(1).replace(" ", "\t")
        assert "jupyterhub -f" not in shown and "configurable-http" not in shown
    finally:
        terminal.close()


def test_the_hubs_api_is_all_that_is_reached_of_this_machine(hub: Hub, ann: str) -> None:
    with hub.kernel(ann) as kernel:
        code = f"""
import os, socket, urllib.request
print(urllib.request.urlopen(os.environ["JUPYTERHUB_API_URL"]).status)
for port in {hub.ports!r}:
    try:
        socket.create_connection(("127.0.0.1", port), 5)
        print("open")
    except OSError as error:
        print(error.errno)
"""
        assert kernel.run(code).split() == ["200", "111", "open", "111"]
        # Whatever is said to it, what is dialled is the hub: the proxy's URL is none of its own.
        code = f"""
s = socket.create_connection(("127.0.0.1", {hub.ports[1]}))
s.sendall(b"GET http://127.0.0.1:{hub.ports[2]}/api/routes HTTP/1.0\\r\\n\\r\\n")
print(s.makefile("rb").read().decode())
"""
        assert "Server: TornadoServer" in kernel.run(code)


# -- one against the other


def test_a_person_cannot_see_signal_or_connect_to_another(hub: Hub, ann: str, bob: str) -> None:
    other = hub.record(bob)
    token = environment_of(other, "JUPYTERHUB_API_TOKEN")
    entrance = f"{hub.runtime}-hub/{other.sandbox_id}/s.sock"
    with hub.kernel(ann) as kernel:
        code = f"""
import contextlib, os, signal, socket
def tried(act):
    try:
        return act()
    except OSError as error:
        return type(error).__name__
def connect(path):
    with socket.socket(socket.AF_UNIX) as s:
        return s.connect(path)
print(tried(lambda: os.kill({other.init_pid}, signal.SIGKILL)))
print(tried(lambda: connect({entrance!r})))
print(tried(lambda: os.listdir("/proc/{other.init_pid}")))
print(max(int(name) for name in os.listdir("/proc") if name.isdigit()) < 1000)
for name in filter(str.isdigit, os.listdir("/proc")):
    with contextlib.suppress(OSError), open(f"/proc/{{name}}/environ") as file:
        if {token!r} in file.read():
            print(name)
"""
        assert kernel.run(code).split() == [
            "ProcessLookupError", "FileNotFoundError", "FileNotFoundError", "True",
        ]  # fmt: skip
    # Nor by the hub: ann's token is not bob's.
    own = environment_of(hub.record(ann), "JUPYTERHUB_API_TOKEN")
    assert hub.ask(bob, "GET", "/contents", token=own).status_code in {403, 404}
    # Nor another user of this machine, by the socket or by what a process tells.
    for act in (f"cat /proc/{other.init_pid}/environ", f"ls {os.path.dirname(entrance)}"):
        words = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "sh", "-c", act]
        assert subprocess.run(words, capture_output=True, check=False).returncode != 0


def environment_of(record: Record, name: str) -> str:
    """A variable of the server in the box of *record*."""
    for pid in Path(f"/proc/{record.init_pid}/task/{record.init_pid}/children").read_text().split():
        pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        for pair in pairs:
            if pair.startswith(name.encode() + b"="):
                return pair.decode().partition("=")[2]
    raise AssertionError(name)


def test_what_takes_too_much_ends_inside_and_the_other_goes_on(
    hub: Hub, ann: str, bob: str
) -> None:
    with hub.kernel(bob) as kernel, hub.kernel(ann) as greedy:
        kernel.run("x = 42")
        code = """
import os, time
pids = []
try:
    for _ in range(1000):
        pid = os.fork()
        if not pid:
            time.sleep(1000)
        pids.append(pid)
except OSError as error:
    print(error.errno, len(pids) < 150)
for pid in pids:
    os.kill(pid, 9); os.waitpid(pid, 0)
"""
        assert greedy.run(code).split() == ["11", "True"]
        greedy.send("kept = [bytearray(b'x' * (8 << 20)) for _ in range(1000)]")
        while "restarting" not in str(greedy.receive()["content"]):
            pass
        assert kernel.run("print(x)").strip() == "42"
    # And it was the kernel's end, not the server's.
    assert hub.ask(ann, "GET", "/status").status_code == 200
    tree = hub.tree_of(hub.record(ann))
    assert tree.usage().memory_bytes or 0 < 768 << 20


def test_many_small_ones_that_take_too_much_end_and_not_the_server(hub: Hub, ann: str) -> None:
    """Each has less memory than the server."""
    record = hub.record(ann)
    with hub.kernel(ann) as kernel:
        code = """
import os, time
pids = []
for _ in range(60):
    if not (pid := os.fork()):
        kept = b"x" * (24 << 20)
        time.sleep(1000)
    pids.append(pid)
ended, status = os.waitpid(-1, 0)
print(os.WTERMSIG(status))
for pid in {*pids} - {ended}:
    os.kill(pid, 9); os.waitpid(pid, 0)
"""
        assert kernel.run(code).strip() == "9"
    assert hub.record(ann) == record
    assert hub.ask(ann, "GET", "/status").status_code == 200


# -- restarts and ends


def test_a_killed_hub_loses_no_server_and_what_ended_meanwhile_leaves_nothing(
    hub: Hub, ann: str, bob: str
) -> None:
    kept, killed = hub.record(ann), hub.record(bob)
    with hub.kernel(ann) as kernel:
        kernel.run("x = 43")
        hub.end(signal.SIGKILL)
        os.kill(killed.init_pid, signal.SIGKILL)
        await_end(killed)
        hub.start()
        assert hub.people() == [ann]
        assert is_gone(hub, killed)
        with hub.kernel(ann, kernel.id) as again:
            assert again.run("print(x)").strip() == "43"
            # And the way to the hub's API is there again.
            url = "os.environ['JUPYTERHUB_API_URL']"
            code = f"import os, urllib.request; print(urllib.request.urlopen({url}).status)"
            assert again.run(code).strip() == "200"
    assert hub.record(ann) == kept


def test_a_server_that_was_killed_is_noticed_and_leaves_nothing(hub: Hub, ann: str) -> None:
    record = hub.record(ann)
    os.kill(record.init_pid, signal.SIGKILL)
    await_end(record)
    while ann in hub.people():
        pass
    assert is_gone(hub, record)


def test_a_stop_leaves_nothing(hub: Hub, ann: str) -> None:
    record = hub.record(ann)
    with hub.kernel(ann) as kernel:
        kernel.run("import subprocess; subprocess.Popen(['setsid', 'sleep', '1000'])")
        assert any(group.exists() for group in groups_of(record))
        hub.stop(ann)
    assert is_gone(hub, record)
    assert hub.home("ann").exists()


@pytest.mark.requires("jupyterhub_idle_culler")
def test_an_idle_server_is_culled_and_leaves_nothing(hub: Hub, ann: str) -> None:
    record = hub.record(ann)
    url = f"http://127.0.0.1:{hub.ports[1]}/hub/api"
    culler = subprocess.Popen(
        [sys.executable, "-m", "jupyterhub_idle_culler", "--timeout=1", "--cull-every=1",
         f"--url={url}"],
        env={**os.environ, "JUPYTERHUB_API_TOKEN": TOKEN}, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        await_end(record)
        while ann in hub.people():
            pass
    finally:
        culler.kill()
        culler.wait()
    assert is_gone(hub, record)


# -- what cannot be


def test_who_is_no_user_of_this_machine_is_told_whom_to_ask(hub: Hub) -> None:
    (event,) = hub.begin("nobody-knows")[-1:]
    assert "no such user" in event["message"] and "useradd" in event["message"]


def test_a_home_that_is_not_theirs_is_refused(hub: Hub) -> None:
    os.chown(hub.home("mallory"), UID, UID)
    (event,) = hub.begin("mallory")[-1:]
    assert "is not a directory of theirs" in event["message"]


def test_a_server_that_ends_at_its_start_tells_why(hub: Hub) -> None:
    (event,) = hub.begin("eve")[-1:]
    assert "it ended before it answered" in event["message"], event
    assert "this is the end" in event["message"]
    left = [path for path in (hub.runtime, Path(f"{hub.runtime}-hub")) for path in path.iterdir()]
    known = {hub.record(name).sandbox_id for name in hub.people()}
    assert {path.name for path in left if path.is_dir()} <= known
