"""A real Jupyter server and its clients: what a person at a notebook gets from our kernels."""

from __future__ import annotations

import contextlib
import getpass
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from signal import SIGINT, SIGTERM

import pytest
from clients import text_of
from jupyter_programs import (
    EAT_MEMORY,
    PATIENCE_SECONDS,
    Home,
    Json,
    KernelSocket,
    Server,
    kind_of,
    parent_of,
)
from leaks import Watch

from benchmarks.common import wait_until
from sandbox_provisioner.app.running import Sandbox, look
from sandbox_provisioner.ends import MIME
from sandbox_provisioner.inside.kernel_calls import watch_changes
from sandbox_provisioner.records import Record, all_records, open_init
from sandbox_provisioner.sweeping import sweep

pytestmark = pytest.mark.requires("userns", "jupyter_server")
needs_memory_cap = pytest.mark.requires("cgroup-memory")

SENTENCE = "was killed: it reached its memory limit of 200 MiB"


@pytest.fixture(scope="module")
def home() -> Iterator[Home]:
    with Home() as home:
        home.add_kernel("boxed", mem_limit="512M")
        home.add_kernel("small", mem_limit="200M", mem_interrupt=0)
        home.add_kernel("patient", mem_limit="512M")
        home.add_kernel("bad-unit", mem_limit="2 GB")
        home.add_kernel("bad-key", mem_limt="1G")
        yield home


@pytest.fixture(scope="module")
def server(home: Home) -> Iterator[Server]:
    server = Server(home)
    yield server
    server.end()


@contextlib.contextmanager
def configured_server(text: str) -> Iterator[Server]:
    """A server whose jupyter_server_config.py is *text*."""
    with Home() as home:
        (home.config / "jupyter_server_config.py").write_text(text)
        server = Server(home)
        try:
            yield server
        finally:
            server.end()


def pidfd_of(record: Record) -> int:
    pidfd = open_init(record)
    assert pidfd is not None
    return pidfd


def has_ended(pidfd: int) -> bool:
    """Wait for the end of a process that is not ours."""
    return bool(select.select([pidfd], [], [], PATIENCE_SECONDS)[0])


def streams(messages: list[Json], name: str) -> list[Json]:
    return [m for m in messages if kind_of(m) == "stream" and m["content"]["name"] == name]


# -- what every kernel can do


def test_a_notebooks_kernel_runs_cells_in_the_box(server: Server) -> None:
    with server.session("boxed") as client:
        assert client.run("import socket; print(6 * 7, socket.gethostname())") == "42 sandbox\n"
        paths = ["/etc/shadow", str(server.home.config), str(server.home.path / "runtime")]
        assert client.run(f"import os; [os.path.exists(p) for p in {paths}]") == (
            "[False, False, False]"
        )


def test_a_notebook_reads_and_writes_beside_itself(server: Server) -> None:
    (server.home.notebooks / "course").mkdir(exist_ok=True)
    with server.session("boxed", "course/week1.ipynb") as client:
        client.run("open('result.txt', 'w').write('done')")
        text = client.run("import os; print(os.getcwd(), os.listdir('..'))")
    assert text == f"{server.home.notebooks}/course ['course']\n"
    written = server.home.notebooks / "course/result.txt"
    assert written.read_text() == "done"
    assert written.stat().st_uid == os.geteuid()


def test_the_kernel_knows_its_notebook_and_not_the_servers_token(server: Server) -> None:
    with server.session("boxed", "mine.ipynb") as client:
        text = client.run("import os; print(sorted(n for n in os.environ if n[:3] == 'JPY'))")
        name = client.run("import os; print(os.environ['JPY_SESSION_NAME'])")
    assert "TOKEN" not in text
    assert name.endswith("mine.ipynb\n")


def test_the_kernel_reads_nothing_that_is_meant_for_the_server(server: Server) -> None:
    with server.session("boxed") as client:
        assert client.run("import os; os.readlink('/proc/self/fd/0')") == "'/dev/null'"


def test_list_tells_the_notebook_and_whether_a_cell_runs(server: Server) -> None:
    with server.session("boxed", "deep.ipynb") as client:
        client.await_kernel()
        sandbox = await_state(server.home.runtime, "idle")
        assert sandbox.record.notebook == str(server.home.notebooks / "deep.ipynb")
        cell = client.execute("input()", allow_stdin=True)
        client.until(lambda message: kind_of(message) == "input_request")
        await_state(server.home.runtime, "busy")
        client.send("input_reply", channel="stdin", value="")
        client.until_idle(cell)
        await_state(server.home.runtime, "idle")


def await_state(runtime: Path, state: str) -> Sandbox:
    """The only kernel, once its server has noted down that it is in *state*."""
    [folder] = [folder for folder, record in all_records(runtime) if record.kind == "kernel"]
    changes = watch_changes([str(folder.path)])
    try:
        while True:
            [found] = [sandbox for sandbox in look(runtime) if sandbox.record.kind == "kernel"]
            if found.state == state:
                return found
            assert select.select([changes], [], [], PATIENCE_SECONDS)[0], found.state
            os.read(changes, 1 << 16)
    finally:
        os.close(changes)


def test_an_interrupt_stops_the_cell_and_the_kernel_goes_on(server: Server) -> None:
    with server.session("boxed") as client:
        cell = client.execute("print('begun', flush=True)\nwhile True: pass")
        client.until(lambda message: "begun" in text_of([message]))
        assert server.ask("POST", f"kernels/{client.kernel_id}/interrupt").status_code == 204
        assert "KeyboardInterrupt" in text_of(client.until_idle(cell))
        assert client.run("1 + 1") == "2"


def test_a_restart_forgets_and_works(server: Server) -> None:
    with server.session("boxed") as client:
        client.run("kept = 1")
        assert server.ask("POST", f"kernels/{client.kernel_id}/restart").status_code == 200
        client.await_kernel()
        assert client.run("kept").startswith("NameError")


def test_a_cell_can_ask_for_input(server: Server) -> None:
    with server.session("boxed") as client:
        cell = client.execute("print('Hello', input('Name? '))", allow_stdin=True)
        asked = client.until(lambda message: kind_of(message) == "input_request")[-1]
        assert asked["content"]["prompt"] == "Name? "
        client.send("input_reply", channel="stdin", value="Ada")
        assert text_of(client.until_idle(cell)) == "Hello Ada\n"


def test_a_subshell_answers_while_the_main_shell_is_busy(server: Server) -> None:
    with server.session("boxed") as client:
        client.send("create_subshell_request", channel="control")
        reply = client.until(lambda message: kind_of(message) == "create_subshell_reply")[-1]
        subshell = reply["content"]["subshell_id"]
        code = "import threading; gate = threading.Event(); print('there', flush=True); gate.wait()"
        busy = client.execute(code)
        # Being busy comes first, when there is no gate yet that a subshell could open.
        client.until(lambda m: parent_of(m) == busy and "there" in text_of([m]))
        code = "gate.set(); print('from the side')"
        side = client.execute(code, header={"subshell_id": subshell})
        # A subshell's output may come after its idle: another thread sends it.
        client.until(lambda m: parent_of(m) == side and "from the side" in text_of([m]))
        assert client.run("gate.is_set()").endswith("True")


def test_a_second_client_sees_what_the_first_one_runs(server: Server) -> None:
    with server.session("boxed") as first:
        first.run("1")
        with contextlib.closing(KernelSocket(server, first.kernel_id)) as second:
            second.await_kernel()
            first.execute("print('for all')")
            second.until(lambda message: "for all" in text_of([message]))


def test_five_kernels_run_at_once_and_see_nothing_of_each_other(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(server.session("boxed", f"notebook-{n}.ipynb")) for n in range(5)
        ]
        pids = [client.execute("import os; os.listdir('/proc')") for client in clients]
        for client, message in zip(clients, pids, strict=True):
            shown = text_of(client.until_idle(message))
            assert len([name for name in eval(shown) if name.isdecimal()]) <= 3
        assert len(server.home.records()) == 5
    assert server.home.records() == []


def test_resolve_path_tells_of_the_work_directory_and_of_nothing_else(server: Server) -> None:
    (server.home.notebooks / "seen.txt").write_text("")
    with server.session("boxed") as client:
        client.run("import os; os.path.lexists('link') or os.symlink('/etc/shadow', 'link')")

        def resolved(path: str) -> list[str]:
            answer = server.ask("GET", f"resolvePath?kernel={client.kernel_id}&path={path}")
            return [e["path"] for e in answer.json()["resolved"] if e["scope"] == "kernel"]

        assert resolved("seen.txt") == [str(server.home.notebooks / "seen.txt")]
        for path in ("/etc/passwd", "/root", "~/.ssh", "~", "../config", "missing.txt", "link"):
            assert resolved(path) == [], path


# -- a kernel that reaches its cap


@needs_memory_cap
def test_the_cell_that_reached_the_memory_cap_says_so_before_the_restart(server: Server) -> None:
    with server.session("small") as client:
        client.run("1")
        cell = client.execute(EAT_MEMORY)
        came = client.until_status("restarting")
        told = [message for message in streams(came, "stderr") if SENTENCE in text_of([message])]
        assert [parent_of(message) for message in told] == [cell]
        assert kind_of(came[-1]) == "status"
        assert client.kernel_id[:8] in text_of(told)
        client.await_kernel()
        assert client.run("'hoard' in globals()") == "False"
    assert SENTENCE in server.log


@needs_memory_cap
def test_a_cell_that_comes_close_to_the_cap_is_interrupted_and_says_so(server: Server) -> None:
    sentence = "is interrupted: it uses 4"
    with server.session("patient") as client:
        client.run("kept = 41")
        cell = client.execute(EAT_MEMORY)
        came = client.until(
            lambda message: (
                message["content"].get("execution_state") == "idle" and parent_of(message) == cell
            )
        )
        told = [message for message in streams(came, "stderr") if sentence in text_of([message])]
        assert [parent_of(message) for message in told] == [cell]
        assert "KeyboardInterrupt" in str(came)
        assert client.run("bool(hoard), kept + 1") == "(True, 42)"


@needs_memory_cap
def test_every_client_of_a_killed_kernel_reads_why(server: Server) -> None:
    with server.session("small") as first:
        first.run("1")
        with contextlib.closing(KernelSocket(server, first.kernel_id)) as second:
            second.await_kernel()
            first.execute(EAT_MEMORY)
            for client in (first, second):
                came = client.until_status("restarting")
                assert text_of(came).count(SENTENCE) == 1
                # The data is in the sentence's message, and in the one that a notebook keeps.
                ends = [message["metadata"].get(MIME, {}) for message in came]
                told = [(kind_of(m), e["kind"]) for m, e in zip(came, ends, strict=True) if e]
                assert told == [("stream", "memory-cap"), ("display_data", "memory-cap")]
            first.await_kernel()


def test_who_was_stopped_reads_by_whom_and_does_not_start_again_by_itself(server: Server) -> None:
    found = server.post_session("boxed", "stopped.ipynb").json()["kernel"]["id"]
    with contextlib.closing(KernelSocket(server, found)) as client:
        client.await_kernel()
        cell = client.execute("print('begun', flush=True)\nwhile True: pass")
        client.until(lambda message: "begun" in text_of([message]))
        stop = [sys.executable, "-m", "sandbox_provisioner.app", "stop", found]
        subprocess.run([*stop, "--runtime-dir", server.home.runtime], check=True)
        came = client.until_status("dead")
    assert "restarting" not in [message["content"].get("execution_state") for message in came]
    told = streams(came, "stderr")
    assert [parent_of(message) for message in told] == [cell]
    assert "with the command jupyter sandbox stop" in " ".join(text_of(told).split())
    # Nobody has it any more: not its server, which would clean up after it, nor this machine.
    assert server.ask("GET", f"kernels/{found}").status_code == 404
    assert [r.kernel_id for _, r in all_records(server.home.runtime) if r.kind == "kernel"] == []
    assert not list((server.home.path / "runtime").glob(f"kernel-{found}*"))
    with server.session("boxed", "stopped.ipynb") as client:
        assert client.run("1 + 1") == "2"


@needs_memory_cap
def test_a_kernel_that_reaches_its_cap_twice_says_so_twice(server: Server) -> None:
    with server.session("small") as client:
        for _ in range(2):
            client.await_kernel()
            cell = client.execute(EAT_MEMORY)
            told = streams(client.until_status("restarting"), "stderr")
            assert [parent_of(message) for message in told] == [cell]
            assert SENTENCE in text_of(told)
        client.await_kernel()


@needs_memory_cap
def test_a_child_that_reached_the_cap_does_not_end_its_kernel_without_a_word(
    server: Server,
) -> None:
    """Linux picks who dies; whoever it was, the person is told or the kernel goes on."""
    with server.session("small") as client:
        code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {EAT_MEMORY!r}])"
        cell = client.execute(code)
        came = client.until(
            lambda message: (
                message["content"].get("execution_state") == "restarting"
                or (parent_of(message) == cell and kind_of(message) == "execute_result")
            )
        )
        restarted = came[-1]["content"].get("execution_state") == "restarting"
        assert (SENTENCE in text_of(came)) == restarted
        client.await_kernel()
        # What is said of a child comes when it is known, perhaps under this cell.
        lines = client.run("1 + 1").split("\n")
        assert lines.count("2") == 1
        said = "".join(line for line in lines if line != "2")
        assert not said or "A child process" in said


def test_a_kernel_that_ends_by_itself_is_not_called_killed(server: Server) -> None:
    with server.session("boxed") as client:
        client.execute("import os; os._exit(7)")
        came = client.until_status("restarting")
        assert "was killed" not in text_of(came)
        client.await_kernel()
        assert client.run("1 + 1") == "2"


# -- a kernel that is not started

ERRORS = {
    "bad-unit": ("Could not read mem_limit", "'2 GB' is not a size", 'such as "512M"'),
    "bad-key": ("Could not read the option 'mem_limt'", "there is no such option", "mem_limit"),
}


@pytest.mark.parametrize("kernel", ERRORS)
def test_opening_a_notebook_tells_why_its_kernel_was_refused(server: Server, kernel: str) -> None:
    answer = server.post_session(kernel)
    assert answer.status_code == 500
    for words in ERRORS[kernel]:
        assert words in answer.json()["message"]
    assert server.ask("GET", "sessions").json() == []


@pytest.mark.parametrize("kernel", ERRORS)
def test_starting_a_kernel_tells_why_it_was_refused(server: Server, kernel: str) -> None:
    answer = server.ask("POST", "kernels", {"name": kernel})
    assert answer.status_code == 500
    for words in ERRORS[kernel]:
        assert words in answer.json()["message"]


@pytest.mark.parametrize("kernel", ERRORS)
def test_choosing_another_kernel_tells_in_lines_why_it_was_refused(
    server: Server, kernel: str
) -> None:
    session = server.post_session("boxed").json()
    wish = {"kernel": {"name": kernel}}
    message = server.ask("PATCH", f"sessions/{session['id']}", wish).json()["message"]
    for words in ERRORS[kernel]:
        assert words in message
    assert "\\n" not in message
    assert "\nCould not " in message
    assert server.ask("DELETE", f"sessions/{session['id']}").status_code == 204


def test_a_refused_kernel_leaves_nothing(server: Server) -> None:
    server.post_session("bad-unit", "refused.ipynb")
    assert server.home.records() == []
    assert list((server.home.path / "runtime").glob("kernel-*.json")) == []


# -- settings of an administrator


def options_seen(server: Server, kernel: str) -> int | None:
    with server.session(kernel):
        (record,) = server.home.records()
        return record.memory_limit_bytes


@needs_memory_cap
def test_a_cap_of_the_servers_settings_reaches_kernels_and_kernel_json_wins() -> None:
    with configured_server('c.SandboxProvisioner.mem_limit = "300M"') as server:
        server.home.add_kernel("own", mem_limit="256M")
        server.home.add_kernel("none", without=["mem_limit"])
        assert options_seen(server, "none") == 300 << 20
        assert options_seen(server, "own") == 256 << 20


@needs_memory_cap
def test_the_default_provisioner_of_the_settings_boxes_every_kernelspec() -> None:
    settings = (
        "c.KernelProvisionerFactory.default_provisioner_name = 'sandbox-provisioner'\n"
        "c.SandboxProvisioner.mem_limit = '300M'\n"
        "c.SandboxProvisioner.warm = False\n"
        "from pathlib import Path\n"
        "c.SandboxProvisioner.runtime_dir = str(Path(__file__).parents[1] / 'run')\n"
    )
    with configured_server(settings) as server, server.session("python3") as client:
        text = client.run("import os, socket; print(socket.gethostname(), os.environ['MEM_LIMIT'])")
        assert text == f"sandbox {300 << 20}\n"


def test_a_misspelt_setting_refuses_to_start_a_kernel() -> None:
    with configured_server('c.SandboxProvisioner.mem_limt = "300M"') as server:
        server.home.add_kernel("boxed")
        message = server.post_session("boxed").json()["message"]
    assert "c.SandboxProvisioner.mem_limt" in message
    assert "there is no such option" in message


def test_the_servers_metrics_tell_of_its_kernels_where_that_is_asked_for() -> None:
    extension = "c.ServerApp.jpserver_extensions = {'sandbox_provisioner.metrics': True}"
    with configured_server(extension) as server:
        server.home.add_kernel("boxed")
        with server.session("boxed"):
            text = server.ask("GET", "../metrics").text
    ours, whose = "sandbox_provisioner", getpass.getuser()
    assert f'\n{ours}_sandboxes{{kind="kernel",user="{whose}"}} 1.0\n' in text
    assert f'\n{ours}_start_duration_seconds_count{{how="cold",kind="kernel"}} 1.0\n' in text
    assert f'\n{ours}_ends_total{{cause="memory-cap",kind="kernel"}} 0.0\n' in text


# -- a server that is gone


def test_kernels_end_with_a_server_that_is_stopped() -> None:
    with configured_server("") as server:
        server.home.add_kernel("boxed")
        assert server.post_session("boxed").status_code == 201
        (record,) = server.home.records()
        with contextlib.ExitStack() as stack:
            pidfd = pidfd_of(record)
            stack.callback(os.close, pidfd)
            server.end()
            assert has_ended(pidfd)


@pytest.mark.parametrize("signals", [[SIGTERM], [SIGTERM, SIGTERM], [SIGINT], [SIGINT, SIGTERM]])
def test_a_server_that_is_told_to_stop_leaves_nothing(watch: Watch, signals: list[int]) -> None:
    """Without a terminal, as under a hub, SIGINT ends a server's event loop at once; and a hub that
    is impatient sends SIGTERM after it."""
    with configured_server("") as server:
        server.home.add_kernel("boxed")
        for number in range(2):
            assert server.post_session("boxed", f"n{number}.ipynb").status_code == 201
        for record in server.home.records():
            watch.expect_gone(record, server.home.runtime)
        for number in signals:
            server.program.process.send_signal(number)
        server.program.process.wait(PATIENCE_SECONDS)
        assert [path.name for path in server.home.runtime.iterdir()] == ["lock"]


FORGETFUL = """
import os, sys
from jupyter_client.manager import KernelManager
manager = KernelManager(kernel_name="boxed", transport="ipc", ip=sys.argv[1])
manager.start_kernel()
if os.fork() == 0:
    sys.exit()
os.wait()
assert manager.is_alive()
"""


def test_a_script_that_forgets_its_kernel_leaves_nothing_and_its_forks_end_nobody() -> None:
    with Home() as home:
        home.add_kernel("boxed")
        command = [sys.executable, "-c", FORGETFUL, f"{home.path}/ip"]
        subprocess.run(command, env=home.environment(), cwd=home.notebooks, check=True)
        assert [path.name for path in home.runtime.iterdir()] == ["lock"]
        assert list(home.notebooks.iterdir()) == []
        assert list(home.path.glob("ip-*")) == []


def test_a_script_ends_and_leaves_the_kernel_that_shall_survive_it() -> None:
    with Home() as home:
        home.add_kernel("boxed", survive_server=True)
        command = [sys.executable, "-c", FORGETFUL, f"{home.path}/ip"]
        subprocess.run(command, env=home.environment(), cwd=home.notebooks, check=True)
        (record,) = home.records()
        pidfd = pidfd_of(record)
        signal.pidfd_send_signal(pidfd, record.end_signal)
        assert has_ended(pidfd)
        os.close(pidfd)
        assert sweep(home.runtime) == [record.sandbox_id]


def test_kernels_of_a_killed_server_end_and_a_sweep_leaves_nothing(watch: Watch) -> None:
    with configured_server("") as server:
        server.home.add_kernel("boxed")
        for number in range(2):
            assert server.post_session("boxed", f"n{number}.ipynb").status_code == 201
        records = server.home.records()
        pidfds = [pidfd_of(record) for record in records]
        for record in records:
            watch.expect_gone(record, server.home.runtime)
        try:
            server.end(kindly=False)
            assert all(map(has_ended, pidfds))
        finally:
            for pidfd in pidfds:
                os.close(pidfd)
        assert sorted(sweep(server.home.runtime)) == sorted(r.sandbox_id for r in records)
        assert [path.name for path in server.home.runtime.iterdir()] == ["lock"]


def test_the_next_kernel_sweeps_what_a_killed_server_left(watch: Watch) -> None:
    with Home() as home:
        home.add_kernel("boxed")
        first = Server(home)
        assert first.post_session("boxed").status_code == 201
        (left,) = home.records()
        watch.expect_gone(left, home.runtime)
        first.end(kindly=False)
        for file in Path(home.path, "runtime").glob("jpserver-*"):
            file.unlink()
        second = Server(home)
        try:
            with second.session("boxed"):
                (record,) = home.records()
                assert record.sandbox_id != left.sandbox_id
        finally:
            second.end()


# -- what a policy has narrowed

NARROWED = """
import os
from sandbox_provisioner.policy import current
current._keeper = current.PolicyKeeper("{policy}", os.geteuid())
"""
POLICY = """
ask = "the help desk"
[everyone.ceilings]
mem_limit = "300M"
network = "none"
devices = []
"""
TOLD = [
    "mem_limit is 300 MiB in place of 1 GiB, by the policy",
    "network is none in place of gateway, by the policy",
    "devices is empty in place of nvidia.com/gpu=all, by the policy",
    "Ask the help desk for more.",
]
WAIT = "import threading; threading.Event().wait()"


@pytest.fixture(scope="module")
def narrowing() -> Iterator[Server]:
    """A server under a policy, and kernels that ask for more than that has."""
    with Home() as home:
        policy = home.path / "sandbox.toml"
        policy.write_text(POLICY)
        (home.config / "jupyter_server_config.py").write_text(NARROWED.format(policy=policy))
        wish = {"mem_limit": "1G", "network": "gateway", "devices": ["nvidia.com/gpu=all"]}
        home.add_kernel("greedy", **wish)
        home.add_kernel("ready", warm=True, **wish)
        home.add_kernel("spare", warm=True, spares=1, **wish)
        server = Server(home)
        yield server
        server.end()
        home.end_nurseries()


def is_told_of_narrowing(client: KernelSocket, cell: str) -> None:
    """All of it, in one message, under *cell*."""
    (*_, message) = client.until(lambda message: bool(streams([message], "stderr")))
    assert parent_of(message) == cell
    text = " ".join(message["content"]["text"].split())
    assert all(sentence in text for sentence in TOLD), text


@needs_memory_cap
def test_a_kernel_that_was_given_less_says_so_under_its_first_cell_and_once(
    narrowing: Server,
) -> None:
    with narrowing.session("greedy") as client:
        client.send("kernel_info_request")
        silent = client.send("execute_request", code="6 * 7", silent=True)
        client.until_idle(silent)
        cell = client.execute(WAIT)
        is_told_of_narrowing(client, cell)
        narrowing.ask("POST", f"kernels/{client.kernel_id}/interrupt")
        client.until_idle(cell)
        assert client.run("print(6 * 7)") == "42\n"
        assert narrowing.ask("POST", f"kernels/{client.kernel_id}/restart").status_code == 200
        client.await_kernel()
        is_told_of_narrowing(client, client.execute("6 * 7"))  # also when that is over
        assert client.run("print(6 * 7)") == "42\n"


@needs_memory_cap
@pytest.mark.slow("a nursery and a spare are made")
@pytest.mark.parametrize(("name", "kind"), [("ready", "nursery"), ("spare", "spare")])
def test_a_kernel_that_was_ready_says_so_as_well(narrowing: Server, name: str, kind: str) -> None:
    home, made = narrowing.home, set[str]()

    def is_made() -> bool:
        made.update(record.sandbox_id for record in home.records() if record.kind == kind)
        return bool(made)

    def is_told() -> bool:
        """Of a kernel that comes from there: what has just been made may not be ready yet."""
        with narrowing.session(name) as client:
            assert wait_until(is_made, PATIENCE_SECONDS, time.sleep)
            ours = (one for one in home.records() if one.kernel_id == client.kernel_id)
            (of,) = (record for record in ours if record.kind == "kernel")
            if not made & {of.nursery, of.group}:
                return False
            client.await_kernel()
            is_told_of_narrowing(client, client.execute("6 * 7"))
            assert client.run("print(6 * 7)") == "42\n"
            return True

    assert wait_until(is_told, PATIENCE_SECONDS, time.sleep)
