"""A real hub with its real proxy, and the servers of real users in boxes.

One hub for all of these tests; ann and bob have a server each, which a test that ends one starts
again.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import attacks
import pytest
import requests
import roots
from hub_server import (
    GREEDY,
    PATIENCE_SECONDS,
    TOKEN,
    UID,
    Hub,
    await_end,
    check_a_kernel_over_its_cap_ends_alone,
    check_a_killed_server_is_noticed_and_leaves_nothing,
    check_a_stop_leaves_nothing,
    environment_of,
    groups_of,
    is_gone,
    is_same,
    left_of,
    marks_of_hub,
    names_of_nurseries,
    nurseries_of,
    person,
    ready_for,
    running,
    serving,
    type_at,
    until,
    until_gone,
    until_logged,
    until_ready,
    while_it_ends,
)
from peer import NAME, Peer

from sandbox_provisioner.facilities.ids.facts import FIRST_PERSONS_ID, IDS

pytestmark = marks_of_hub("cgroup-memory")

PEOPLE = ("ann", "bob", "eve", "mallory", "dora", "nora")
MORE = """
c.SandboxSpawner.mem_limit = "768M"
c.SandboxSpawner.pids_limit = 150
c.SandboxSpawner.metrics = True
c.JupyterHub.authenticate_prometheus = False
c.SandboxSpawner.volumes = {"FOLDER/shared/{username}": "/shared"}

def before(spawner):
    if spawner.user.name == "eve":
        spawner.cmd = ["sh", "-c", "echo this is the end >&2; exit 3"]
    spawner.volumes = {} if spawner.user.name == "eve" else spawner.volumes
    if spawner.user.name == "dora":
        spawner.disk_limit, spawner.inode_limit, spawner.shm_limit = "16M", 1024, "2M"
        spawner.read_only_volumes = {"FOLDER/shared": "/all"}
    if spawner.user.name == "nora":
        spawner.network, spawner.network_allow = "gateway", ALLOWED
        spawner.devices = ["example.org/gpu=0"]
        spawner.tmp_limit, spawner.disk_limit, spawner.disk_backend = "4M", "8M", "tmpfs"
        spawner.term_timeout = 60.0
        ends = 'trap "sleep 2; touch ended; exit" TERM; "$@" & wait'
        spawner.cmd = ["sh", "-c", ends, "sh", "jupyterhub-singleuser"]

from sandbox_provisioner.facilities.devices.facts import cdi
cdi.FOLDERS = ("DEVICES",)

c.Spawner.pre_spawn_hook = before

# Before the stage of a start that a test writes there, the hub is killed.
import os, signal
from sandbox_provisioner import stages

def begins(name):
    if os.path.exists("FOLDER/killed-at") and open("FOLDER/killed-at").read() == name:
        os.unlink("FOLDER/killed-at")
        os.kill(os.getpid(), signal.SIGKILL)

stages.fail_here = begins
"""


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    made = Peer()
    yield made
    made.close()


@pytest.fixture(scope="module")
def devices() -> Iterator[Path]:
    """A folder of root's alone with a device of the host, /dev/full by another name."""
    made = Path(tempfile.mkdtemp(prefix="sbx-", dir="/run"))
    made.chmod(0o755)
    os.mknod(made / "real", stat.S_IFCHR | 0o600, os.makedev(1, 7))
    node = {"path": "/dev/gpu0", "hostPath": f"{made}/real", "major": 1, "minor": 7}
    device = {"name": "0", "containerEdits": {"deviceNodes": [node]}}
    told = {"cdiVersion": "0.6.0", "kind": "example.org/gpu", "devices": [device]}
    (made / "gpu.json").write_text(json.dumps(told))
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def hub(peer: Peer, devices: Path) -> Iterator[Hub]:
    hub = Hub(PEOPLE)
    for name in PEOPLE:
        (hub.folder / "shared" / name).mkdir(parents=True)
    allowed = repr(list(peer.rules))
    with serving(hub, MORE.replace("ALLOWED", allowed).replace("DEVICES", str(devices))):
        yield hub


ann, bob = map(person, PEOPLE[:2])


# -- what works


def test_a_start_tells_how_far_it_is_and_where_the_server_is(hub: Hub) -> None:
    if "bob" in hub.people():
        hub.stop("bob")
    events = hub.begin("bob")
    told = [event["message"] for event in events]
    assert "Making the box ..." in told
    assert events[-1]["ready"], events
    assert hub.ask("bob", "GET", "/status").json()["kernels"] == 0


def test_the_hubs_metrics_tell_of_boxes(hub: Hub, bob: str) -> None:
    with hub.kernel(bob) as kernel:
        kernel.run("x = bytearray(20 << 20)")
        lines = hub.api("GET", "/../metrics").text.splitlines()
    pairs = [line.rpartition(" ") for line in lines if line.startswith("sandbox_")]
    told = {name: float(number) for name, _, number in pairs}
    ours = "sandbox_provisioner"
    assert told[f'{ours}_sandboxes{{kind="server",user="bob"}}'] == 1
    assert told[f'{ours}_memory_bytes{{user="bob"}}'] > 20 << 20
    assert told[f'{ours}_cpu_seconds_total{{user="bob"}}'] > 0
    assert told[f'{ours}_start_duration_seconds_count{{how="cold",kind="server"}}'] >= 1


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


def test_the_hubs_api_is_all_that_a_server_reaches_and_a_kernel_reaches_nothing(
    hub: Hub, ann: str
) -> None:
    code = f"""
import os, socket, urllib.request
url = os.environ.get("JUPYTERHUB_API_URL")
print(urllib.request.urlopen(url).status if url else os.path.exists("/jupyterhub"))
for port in {hub.ports!r}:
    try:
        socket.create_connection(("127.0.0.1", port), 5)
        print("open")
    except OSError as error:
        print(error.errno)
"""
    assert hub.in_server(ann, code).split() == ["200", "111", "open", "111"]
    with hub.kernel(ann) as kernel:
        assert kernel.run(code).split() == ["False", "111", "111", "111"]
    # Whatever is said to it, what is dialled is the hub: the proxy's URL is none of its own.
    code = f"""
import socket
s = socket.create_connection(("127.0.0.1", {hub.ports[1]}))
s.sendall(b"GET http://127.0.0.1:{hub.ports[2]}/api/routes HTTP/1.0\\r\\n\\r\\n")
print(s.makefile("rb").read().decode())
"""
    assert "Server: TornadoServer" in hub.in_server(ann, code)


# -- kernels beside their server


def test_each_kernel_has_a_box_of_its_own_in_the_groups_of_its_person(
    hub: Hub, ann: str, bob: str
) -> None:
    server = hub.record(ann)
    with hub.kernel(ann) as one, hub.kernel(ann) as two, hub.kernel(bob) as other:
        found = {**hub.kernels(ann), **hub.kernels(bob)}
        records = [found[kernel.id] for kernel in (one, two, other)]
        assert len({record.first_id // IDS for record in (server, *records)}) == 4
        assert [record.tree for record in records] == [
            f"hub/{name}/kernels/{record.sandbox_id}"
            for name, record in zip((ann, ann, bob), records, strict=True)
        ]
        assert {record.memory_limit_bytes for record in records} == {384 << 20}  # half of 768
        # Neither sees the other, or the server: its token, its processes, its ways to the hub.
        code = """
import os
print(os.path.exists("/jupyterhub"), "JUPYTERHUB_API_TOKEN" in os.environ)
print(max(int(name) for name in os.listdir("/proc") if name.isdigit()) < 100)
"""
        assert one.run(code).split() == ["False", "False", "True"]
    assert not hub.kernels(ann) and not hub.kernels(bob)
    shown = Path(f"{hub.runtime}-hub", server.sandbox_id, "hub/kernels")
    assert not list(shown.iterdir())


def test_a_kernel_comes_from_what_its_servers_box_alone_has_ready(
    hub: Hub, ann: str, bob: str
) -> None:
    ready_for(hub, ann)
    nurseries = nurseries_of(hub, hub.record(ann))
    with hub.kernel(ann) as kernel, hub.kernel(bob) as other:
        record = hub.kernels(ann)[kernel.id]
        assert record.nursery in nurseries
        assert record.tree == f"hub/{ann}/kernels/{record.sandbox_id}"
        assert nurseries[record.nursery].tree == f"hub/{ann}/kernels/{record.nursery}"
        assert hub.kernels(bob)[other.id].nursery not in nurseries
        assert kernel.run("print(6 * 7)") == "42\n"


def test_a_kernel_over_its_cap_is_told_under_its_cell_and_ends_alone(
    hub: Hub, ann: str, bob: str
) -> None:
    check_a_kernel_over_its_cap_ends_alone(hub, ann, bob)


def test_whoever_is_in_the_servers_box_is_given_no_more_than_the_box_has(
    hub: Hub, ann: str, bob: str
) -> None:
    """The person's rights outside may show more than their box: others' homes that all may read."""
    elsewhere = hub.folder / "shared" / bob
    (elsewhere / "program").write_text("#!/bin/sh\n")
    (elsewhere / "program").chmod(0o755)
    words = str(elsewhere), hub.record(bob).sandbox_id
    text = hub.in_server(ann, (Path(__file__).parent / "asking.py").read_text(), *words)
    assert text.startswith("{"), text
    told = json.loads(text)
    error, warnings, sees, interfaces, uid = told["given"]
    assert (error, sees, interfaces, uid) == (None, [], ["lo"], 1000)
    assert "The kernel's network is that of its server: it has no other." in warnings
    del told["given"]
    answers = {what: told[what].get("error", {}).get("answer") for what in told}
    assert answers == {
        "program": "there is no such program",
        "another root": "there is neither a directory usr nor bin in it",
        "by a link": "it is /usr/share, and leads there by a symbolic link",
        "of the box alone": "that is nothing which the hub shows to this server",
        "read-only": "its server can only read it",
        "another's": "it has ended, or was never this user's",
    }


def test_a_kernel_beside_its_server_has_a_root_of_the_persons_and_is_reviewed_by_them(
    hub: Hub, ann: str
) -> None:
    """What is laid aside outside comes into the box as a mount with the ids of that box."""
    root = hub.home(ann) / "own-root"
    shutil.copytree(roots.directory(), root, symlinks=True)
    uid, gid = hub.home(ann).stat().st_uid, hub.home(ann).stat().st_gid
    subprocess.run(["chown", "-hR", f"{uid}:{gid}", root], check=True)
    people = Path("/var/lib/sandbox-provisioner/people", f"{uid}-hub")
    try:
        text = hub.in_server(ann, (Path(__file__).parent / "working.py").read_text(), str(root))
        assert text.startswith("["), text
        said, before, kept, after, left = json.loads(text)
        assert said == ["ID=tiny", "1000"]
        assert before == ["gone"]
        assert "Kept 2 changes" in kept
        assert after == {"new": "by the kernel"}
        assert "No kernel's changes" in left
        assert (hub.home(ann) / "work/new").stat().st_uid == uid
    finally:
        shutil.rmtree(root)
        shutil.rmtree(hub.home(ann) / "work", ignore_errors=True)
        shutil.rmtree(people, ignore_errors=True)


def test_doctor_tells_that_all_of_a_persons_server_is_in_a_box(hub: Hub, ann: str) -> None:
    words = [sys.executable, "-m", "sandbox_provisioner.app", "doctor", "--hub", "--json"]
    place = f"--SandboxProvisioner.runtime_dir={hub.runtime}"
    done = subprocess.run(
        [*words, "--user", ann, place], capture_output=True, text=True, check=False, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    rows = {row["facility"]: row for row in json.loads(done.stdout)}
    assert hub.record(ann).sandbox_id in rows["server"]["found"]
    assert rows["the server's token"]["state"] == "note"


# -- how much a server can write

FILL = """
import errno, json, os

def fill(path):
    written = 0
    try:
        with open(path, "wb", buffering=0) as file:
            while written < 32 << 20:
                written += file.write(bytes(1 << 16))
    except OSError as error:
        return errno.errorcode[error.errno], written
    return "all", written

places = ("/tmp", "/run", "/var/tmp", "/dev/shm", "/all", os.path.expanduser("~"))
print(json.dumps({place: fill(f"{place}/much") for place in places}))
"""
MAKE_FILES = """
import errno, os
os.unlink("/tmp/much")
try:
    for number in range(1 << 14):
        open(f"/tmp/{number}", "x").close()
except OSError as error:
    print(errno.errorcode[error.errno], number)
"""


def test_a_server_writes_no_more_than_its_limits_and_goes_on_and_the_hub_tells_of_which(
    hub: Hub, ann: str
) -> None:
    running(hub, "dora")
    kept, says = hub.record("dora"), "dora: {} of the server of dora is full: it holds all that {}"
    told = json.loads(hub.in_server("dora", FILL))
    assert told["/tmp"][0] == "ENOSPC" and 12 << 20 < told["/tmp"][1] <= 16 << 20, told
    assert told["/run"] == told["/var/tmp"] == ["ENOSPC", 0]  # it is one limit
    assert told["/dev/shm"] == ["ENOSPC", 2 << 20]
    assert told["/all"] == ["EROFS", 0]
    assert told[str(hub.home("dora"))] == ["all", 32 << 20]  # which workdir_limit is for
    for place, option in (("/tmp", "disk_limit"), ("/dev/shm", "shm_limit")):
        until_logged(hub, says.format(place, option))
    why, made = hub.in_server("dora", MAKE_FILES).split()
    assert why == "ENOSPC" and 900 < int(made) <= 1024
    until_logged(hub, says.format("/tmp", "inode_limit"))
    with hub.kernel("dora") as kernel:
        assert kernel.run("print(6 * 7)") == "42\n"
    assert is_same(hub.record("dora"), kept)
    # The control: whose server has no such limit.
    told = json.loads(hub.in_server(ann, FILL))
    assert all(told[place] == ["all", 32 << 20] for place in ("/tmp", "/run", "/dev/shm")), told
    hub.stop("dora")
    assert left_of(hub, kept) == []


# -- a network, devices, and how much time it has to end

USE = """
import errno, json, os, socket, sys

def told_of(call):
    try:
        return call()
    except OSError as error:
        return errno.errorcode.get(error.errno, "no name")

def speak(host, port):
    with socket.create_connection((host, port), 20) as connection:
        connection.sendall(b"\\0hello")  # no request of HTTP's, which would have to name its host
        return connection.recv(100)[1:].decode()

def write():
    with open("/dev/gpu0", "wb", buffering=0) as file:
        file.write(b"x")

name, port, closed = sys.argv[1], *map(int, sys.argv[2:])
size = os.statvfs("/tmp")
told = [told_of(lambda: speak(name, port)), told_of(lambda: speak(name, closed)), told_of(write)]
print(json.dumps([*told, size.f_blocks * size.f_frsize]))
"""


def test_a_server_has_the_network_the_device_and_the_time_that_its_administrator_names(
    hub: Hub, ann: str, peer: Peer
) -> None:
    running(hub, "nora")
    kept, words = hub.record("nora"), (NAME, str(peer.port), str(hub.ports[0]))
    said, closed, device, size = json.loads(hub.in_server("nora", USE, *words))
    assert (said, device, size) == ("hello", "ENOSPC", 4 << 20)  # as /dev/full answers
    assert closed in {"ECONNREFUSED", "ECONNRESET"}
    with hub.kernel("nora") as kernel:  # its device and network are those of its server
        told = json.loads(kernel.run(f"import sys; sys.argv = {['', *words]}\n{USE}"))
        assert (told[0], told[2]) == (said, device)
    # The control: whose server has none of it.
    said, _, device, size = json.loads(hub.in_server(ann, USE, *words))
    assert said != "hello" and device == "EROFS" and size > 4 << 20  # no node can be made
    hub.stop("nora")
    assert (hub.home("nora") / "ended").exists()  # 2 s after it was asked to
    assert left_of(hub, kept) == []


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


SOCKETS = 65  # of a kernel that is no child of the server's


def test_what_fails_in_a_kernel_of_roots_fails_in_a_persons_box(hub: Hub, ann: str) -> None:
    with attacks.target(hub.home(ann)) as stage, hub.kernel(ann) as kernel:
        assert not attacks.wrong_answers(stage, kernel.run, attacks.chosen(SOCKETS))


def test_what_takes_too_much_ends_inside_and_the_other_goes_on(
    hub: Hub, ann: str, bob: str
) -> None:
    with hub.kernel(bob) as kernel, hub.kernel(ann) as greedy:
        kernel.run("x = 42")
        code = """
import os, time, warnings
warnings.simplefilter("ignore")  # of forks beside threads, since Python 3.12
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
        greedy.send(GREEDY)
        while "restarting" not in str(greedy.receive()["content"]):
            pass
        assert kernel.run("print(x)").strip() == "42"
    # And it was the kernel's end, not the server's.
    assert hub.ask(ann, "GET", "/status").status_code == 200
    tree = hub.tree_of(hub.record(ann))
    assert tree.usage().memory_bytes or 0 < 768 << 20


def test_what_kernels_take_together_ends_one_of_them_and_not_the_server(hub: Hub, ann: str) -> None:
    """Each is below its own cap, and all are above that of their person."""
    record = hub.record(ann)
    with hub.kernel(ann) as one, hub.kernel(ann) as two, hub.kernel(ann) as three:
        for kernel in (one, two, three):
            kernel.send("kept = b'x' * (230 << 20)")
        ends = [os.pidfd_open(found.init_pid) for found in hub.kernels(ann).values()]
        poll = select.poll()
        for end in ends:
            poll.register(end, select.POLLIN)
        assert poll.poll(PATIENCE_SECONDS * 1000)
        for end in ends:
            os.close(end)
    assert is_same(hub.record(ann), record)
    assert hub.ask(ann, "GET", "/status").status_code == 200


def test_many_small_ones_that_take_too_much_end_and_not_the_server(hub: Hub, ann: str) -> None:
    """Each has less memory than the server."""
    record = hub.record(ann)
    with hub.kernel(ann) as kernel:
        code = """
import os, signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)  # near the cap the kernel may be interrupted first
pids = []
for _ in range(60):
    if not (pid := os.fork()):
        kept = b"x" * (24 << 20)
        time.sleep(1000)
    pids.append(pid)
ended, status = os.waitpid(-1, 0)
print("ended by", os.WTERMSIG(status))
for pid in {*pids} - {ended}:
    os.kill(pid, 9); os.waitpid(pid, 0)
"""
        assert "ended by 9" in kernel.run(code)  # with the sentence that tells why
    assert is_same(hub.record(ann), record)
    assert hub.ask(ann, "GET", "/status").status_code == 200


# -- restarts and ends


def test_a_killed_hub_loses_no_server_and_what_ended_meanwhile_leaves_nothing(
    hub: Hub, ann: str, bob: str
) -> None:
    kept, killed = hub.record(ann), hub.record(bob)
    with hub.kernel(ann) as kernel, hub.kernel(ann) as stopped:
        kernel.run("x = 43")
        stopped.run("x = 44")
        hub.end(signal.SIGKILL)
        os.kill(killed.init_pid, signal.SIGKILL)
        await_end(killed)
        stop = [sys.executable, "-m", "sandbox_provisioner.app", "stop", stopped.id]
        subprocess.run([*stop, f"--runtime-dir={hub.runtime}"], check=True)
        hub.start()
        assert hub.people() == [ann]
        assert left_of(hub, killed) == []
        how = f"The server of {bob} ended: The server of {bob} was killed from outside"
        assert how in hub.log.read_text()
        how = f"Kernel {stopped.id[:8]} was stopped by the administrator"
        until_logged(hub, how)  # once its server has polled, and was listened for
        with hub.kernel(ann, kernel.id) as again:
            assert again.run("print(x)").strip() == "43"
            hub.ask(ann, "POST", f"/kernels/{kernel.id}/interrupt").raise_for_status()
        # And the way to the hub's API is there again.
        url = "os.environ['JUPYTERHUB_API_URL']"
        code = f"import os, urllib.request; print(urllib.request.urlopen({url}).status)"
        assert hub.in_server(ann, code).strip() == "200"
        with hub.kernel(ann) as another:
            assert another.run("print(1 + 1)").strip() == "2"
    assert is_same(hub.record(ann), kept)


def test_a_hub_that_is_killed_while_it_starts_a_kernel_leaves_nothing_of_it(
    hub: Hub, ann: str
) -> None:
    with hub.kernel(ann):
        until_ready(hub, ann)  # or the making of a nursery comes to the stage before a kernel does
    kept, known = hub.record(ann), set(os.listdir(hub.runtime))
    for stage in ("create-cgroup", "write-record"):
        (hub.folder / "killed-at").write_text(stage)
        assert hub.ask(ann, "POST", "/kernels", json={"name": "python3"}).status_code >= 500
        hub.await_end()
        started = set(os.listdir(hub.runtime)) - known
        assert started, stage
        hub.start()
        assert hub.kernels(ann) == {}, stage
        left = set(os.listdir(hub.runtime)) - names_of_nurseries(hub)
        assert not started & left, stage
        assert hub.tree_of(kept).usage().processes
        with hub.kernel(ann) as kernel:
            assert kernel.run("print(6 * 7)").strip() == "42"
    assert is_same(hub.record(ann), kept)


def test_a_hub_that_is_killed_while_it_ends_a_server_leaves_nothing_to_the_next(
    hub: Hub, ann: str
) -> None:
    record = hub.record(ann)
    with while_it_ends(hub, ann) as stopped:
        hub.end(signal.SIGKILL)
        assert isinstance(stopped.exception(), requests.ConnectionError)
        assert not is_gone(hub, record)
    hub.start()
    until(lambda: ann not in hub.people())
    until_gone(hub, record)


def test_a_server_that_was_killed_is_noticed_and_leaves_nothing(hub: Hub, ann: str) -> None:
    check_a_killed_server_is_noticed_and_leaves_nothing(hub, ann)


def test_a_stop_leaves_nothing(hub: Hub, ann: str) -> None:
    check_a_stop_leaves_nothing(hub, ann)


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
        until(lambda: ann not in hub.people())
    finally:
        culler.kill()
        culler.wait()
    assert left_of(hub, record) == []


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
