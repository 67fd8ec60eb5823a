"""The contract of jupyter_client's provisioners, and its traps: each of them is a test."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.manager import AsyncKernelManager, KernelManager
from jupyter_client.multikernelmanager import AsyncMultiKernelManager, MultiKernelManager
from traitlets.config import Config

from sandbox_provisioner import provisioner
from sandbox_provisioner.ends import MIME
from sandbox_provisioner.errors import COLUMNS, InternalError, LaunchError, SpecError
from sandbox_provisioner.inside.wire import FAIL_AT
from sandbox_provisioner.launch import LocalLauncher
from sandbox_provisioner.off_loop import Gate
from sandbox_provisioner.provisioner import SandboxProvisioner, StartRefused
from sandbox_provisioner.records import Record, all_records
from sandbox_provisioner.told import EndKind
from sandbox_provisioner.units import format_bytes

pytestmark = pytest.mark.requires("userns")

BUSY_C_LOOP = "import re; re.match('(a+)+b', 'a' * 60)"


def kernels_of(runtime_dir: Path) -> list[Record]:
    return [record for _, record in all_records(runtime_dir) if record.kind == "kernel"]


# -- the ordinary life of a kernel


def test_a_kernel_runs_in_a_sandbox_and_leaves_nothing(kernel: Any, runtime_dir: Path) -> None:
    with kernel() as k:
        assert k.run("6 * 7") == "42"
        assert k.run("import os; os.getuid() != 0 and os.getppid()") == "1"
        assert len(kernels_of(runtime_dir)) == 1
    assert not kernels_of(runtime_dir)


@pytest.mark.parametrize(
    "code", ["import time; time.sleep(60)", "!sleep 60", BUSY_C_LOOP, "while True: pass"]
)
def test_an_interrupt_stops_the_cell_and_keeps_the_variables(kernel: Any, code: str) -> None:
    with kernel() as k:
        k.run("kept = 41")
        request = k.start(code)
        k.manager.interrupt_kernel()
        k.until(lambda m: m["content"].get("execution_state") == "idle", request)
        assert k.run("kept + 1") == "42"


def test_a_restart_keeps_the_connection_file_and_forgets_the_variables(kernel: Any) -> None:
    with kernel() as k:
        before = Path(k.manager.connection_file).read_text()
        first = k.provisioner.handle
        k.run("x = 1")
        k.manager.restart_kernel()
        k.client.wait_for_ready(timeout=60)
        assert Path(k.manager.connection_file).read_text() == before
        assert k.run("'x' in dir()") == "False"
        assert k.provisioner.handle is not first


def test_a_restart_never_follows_a_link_that_took_the_place_of_its_directory(
    kernel: Any, workdir: Path, new_folder: Any
) -> None:
    sub, moved, victim = workdir / "sub", workdir / "moved", new_folder()
    sub.mkdir()
    with kernel(start_options={"cwd": str(sub)}) as k:
        sub.rename(moved)
        sub.symlink_to(victim)
        with pytest.raises(
            StartRefused, match=r"(?s)sub'\s+is a\s+symbolic\s+link to .*the\s+real\s+path"
        ):
            k.manager.restart_kernel(now=True)
        sub.unlink()
        moved.rename(sub)
        k.manager.restart_kernel(now=True)
        k.client.wait_for_ready(timeout=60)
        assert k.run("open('made', 'w').close()") == ""
    assert os.listdir(sub) == ["made"]
    assert os.listdir(victim) == []


def test_a_restart_now_and_one_after_the_kernels_death_work(kernel: Any) -> None:
    with kernel() as k:
        k.manager.restart_kernel(now=True)
        k.client.wait_for_ready(timeout=60)
        k.provisioner.handle.kill()
        asyncio.run(k.provisioner.handle.wait())
        k.manager.restart_kernel(now=True)
        k.client.wait_for_ready(timeout=60)
        assert k.run("1 + 1") == "2"


def test_a_manager_that_starts_again_without_a_shutdown_ends_what_it_had(
    kernel: Any, runtime_dir: Path
) -> None:
    with kernel() as k:
        k.run("x = 1")
        first = k.provisioner.handle
        k.manager.start_kernel()
        k.client.wait_for_ready(timeout=60)
        assert k.run("'x' in globals()") == "False"
        assert first.poll() is not None
        assert (
            len([record for _, record in all_records(runtime_dir) if record.kind == "kernel"]) == 1
        )


def test_a_shutdown_ends_what_the_kernel_started(kernel: Any) -> None:
    with kernel() as k:
        k.run(
            "import subprocess, signal\n"
            "subprocess.Popen(['sh', '-c', 'trap \"\" TERM INT HUP; sleep 1000'],"
            " start_new_session=True)"
        )
        pidfd = os.pidfd_open(k.provisioner.handle.pid)
        k.shutdown()
        with pytest.raises(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, 0)
        os.close(pidfd)


def test_a_cell_can_ask_for_input(kernel: Any) -> None:
    with kernel() as k:

        def answer(_: object) -> None:
            k.client.input("Ada")

        assert "HELLO ADA" in k.run(
            "print('hello', input('who? '))".replace("print('hello', ", "print('HELLO', ").replace(
                "input('who? ')", "input('who? ').upper()"
            ),
            stdin_hook=answer,
            allow_stdin=True,
        )


def test_the_heartbeat_beats(kernel: Any) -> None:
    with kernel() as k:
        assert k.client.hb_channel.is_beating()


def test_a_subshell_answers_while_the_main_shell_is_busy(kernel: Any) -> None:
    with kernel() as k:
        request = k.client.session.msg("create_subshell_request", {})
        k.client.control_channel.send(request)
        made = k.client.get_control_msg(timeout=60)
        busy = k.start("import time; time.sleep(60)")
        message = k.client.session.msg("execute_request", {"code": "print(6 * 7)"})
        message["header"]["subshell_id"] = made["content"]["subshell_id"]
        k.client.shell_channel.send(message)
        said = k.until(lambda m: m["msg_type"] == "stream", message["header"]["msg_id"])
        assert said["content"]["text"].strip() == "42"
        k.manager.interrupt_kernel()
        assert busy


def test_the_debugger_starts_on_the_sandboxs_own_loopback(kernel: Any) -> None:
    with kernel() as k:
        arguments = {"clientID": "test", "adapterID": "", "pathFormat": "path"}
        content = {"type": "request", "seq": 1, "command": "initialize", "arguments": arguments}
        k.client.control_channel.send(k.client.session.msg("debug_request", content))
        answer = k.client.get_control_msg(timeout=60)
        assert answer["content"]["success"], answer["content"]
        assert k.run("1 + 1") == "2"


def test_a_comm_opens_and_is_answered(kernel: Any) -> None:
    with kernel() as k:
        k.run(
            "from comm import get_comm_manager\n"
            "answer = lambda comm, m: comm.send({'got': m['content']['data']})\n"
            "get_comm_manager().register_target('t', answer)"
        )
        content = {"comm_id": uuid.uuid4().hex, "target_name": "t", "data": {"x": 1}}
        message = k.client.session.msg("comm_open", content)
        k.client.shell_channel.send(message)
        said = k.until(lambda m: m["msg_type"] == "comm_msg", message["header"]["msg_id"])
        assert said["content"]["data"] == {"got": {"x": 1}}


def test_an_async_manager_starts_and_ends_a_kernel(kernelspec: Any) -> None:
    async def live() -> bool:
        manager = AsyncKernelManager(kernel_name=kernelspec())
        await manager.start_kernel()
        client = manager.client()
        client.start_channels()
        await client.wait_for_ready(timeout=60)
        alive = await manager.is_alive()
        client.stop_channels()
        await manager.shutdown_kernel()
        manager.context.destroy(linger=0)
        return alive and not await manager.is_alive()

    assert asyncio.run(live())


def test_a_multi_kernel_manager_keeps_its_kernels_apart(kernelspec: Any) -> None:
    manager = MultiKernelManager()
    ids = [manager.start_kernel(kernel_name=kernelspec()) for _ in range(3)]
    folders = {manager.get_kernel(name).ip for name in ids}
    assert len(folders) == 3
    manager.shutdown_all(now=True)
    manager.context.destroy(linger=0)


def test_many_kernels_start_at_once(kernelspec: Any) -> None:
    async def live() -> int:
        manager = AsyncMultiKernelManager()
        name = kernelspec()
        started = await asyncio.gather(*(manager.start_kernel(kernel_name=name) for _ in range(8)))
        await manager.shutdown_all(now=True)
        manager.context.destroy(linger=0)
        return len(set(started))

    assert asyncio.run(live()) == 8


# -- the traps


def test_cleanup_may_come_twice(kernel: Any) -> None:
    with kernel() as k:
        k.shutdown()
        asyncio.run(k.provisioner.cleanup(restart=False))
        asyncio.run(k.provisioner.cleanup(restart=False))


def test_cleanup_alone_ends_a_living_kernel(kernel: Any, runtime_dir: Path) -> None:
    with kernel() as k:
        pid = k.provisioner.handle.pid
        asyncio.run(k.provisioner.cleanup(restart=False))
        assert not kernels_of(runtime_dir)
        assert not Path(f"/proc/{pid}").exists()
        assert not k.provisioner.has_process


@pytest.mark.parametrize("moment", ["pre_launch", "launch_kernel"])
def test_a_kernel_that_is_shut_down_while_it_restarts_is_gone(
    kernelspec: Any, runtime_dir: Path, moment: str
) -> None:
    async def race() -> None:
        manager = AsyncKernelManager(kernel_name=kernelspec(), transport="ipc")
        await manager.start_kernel()
        assert manager.provisioner
        begun, called = asyncio.Event(), getattr(manager.provisioner, moment)

        async def told(*args: Any, **options: Any) -> Any:
            begun.set()
            return await called(*args, **options)

        setattr(manager.provisioner, moment, told)
        restart = asyncio.ensure_future(manager.restart_kernel(now=True))
        await begun.wait()
        with contextlib.suppress(asyncio.InvalidStateError):  # both tell the same future
            await manager.shutdown_kernel(now=True)
        with pytest.raises((StartRefused, asyncio.InvalidStateError)):
            await restart

    asyncio.run(race())
    assert not kernels_of(runtime_dir)


def test_a_signal_after_death_hits_nobody(kernel: Any) -> None:
    with kernel() as k:
        k.provisioner.handle.kill()
        asyncio.run(k.provisioner.wait())
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            asyncio.run(k.provisioner.send_signal(number))
        assert asyncio.run(k.provisioner.poll()) == -signal.SIGKILL
        assert not k.provisioner.has_process


def test_poll_tells_the_status_of_a_kernel_that_ended_by_itself(kernel: Any) -> None:
    with kernel() as k:
        k.client.execute("import os; os._exit(7)")
        asyncio.run(k.provisioner.handle.wait())
        assert asyncio.run(k.provisioner.poll()) == 7


def test_a_failed_launch_leaves_no_connection_file(kernelspec: Any, runtime_dir: Path) -> None:
    name = kernelspec(argv=["/no/such/program", "{connection_file}"])
    manager = KernelManager(kernel_name=name)
    with pytest.raises(StartRefused, match="no such program"):
        manager.start_kernel()
    assert not manager.connection_file or not Path(manager.connection_file).exists()
    assert not kernels_of(runtime_dir)


def test_a_kernel_that_fails_at_its_start_is_quoted(kernelspec: Any, runtime_dir: Path) -> None:
    argv = [sys.executable, "-c", "import sys; sys.exit('the battery is empty')"]
    manager = KernelManager(kernel_name=kernelspec(argv=argv))
    with pytest.raises(StartRefused) as caught:
        manager.start_kernel()
    text = str(caught.value.error)
    assert "wait-for-kernel" in text
    assert "ended with status 1" in text
    assert "the battery is empty" in text
    assert isinstance(caught.value.error, LaunchError)
    assert not kernels_of(runtime_dir)


def test_a_kernel_that_never_binds_its_sockets_is_given_up(kernelspec: Any) -> None:
    argv = [sys.executable, "-c", "import signal; signal.pause()"]
    manager = KernelManager(kernel_name=kernelspec(argv=argv, start_timeout=1.0))
    with pytest.raises(StartRefused, match="did not bind its sockets within 1 s"):
        manager.start_kernel()


def test_a_socket_that_is_a_link_is_not_accepted(kernelspec: Any, workdir: Path) -> None:
    victim = workdir / "s"
    program = (
        "import os, socket\n"
        f"s = socket.socket(socket.AF_UNIX); s.bind({str(victim)!r}); s.listen()\n"
        f"[os.symlink({str(victim)!r}, f'/run/kernel/s-{{n}}') for n in range(1, 6)]\n"
        "import signal; signal.pause()"
    )
    argv = [sys.executable, "-c", program]
    manager = KernelManager(kernel_name=kernelspec(argv=argv, start_timeout=2.0))
    with pytest.raises(StartRefused, match="did not bind its sockets"):
        manager.start_kernel()


def test_after_the_start_nothing_in_the_socket_directory_can_change(kernel: Any) -> None:
    with kernel() as k:
        said = k.run(
            "import os\n"
            "for act in (lambda: os.unlink('/run/kernel/s-2'),\n"
            "            lambda: os.symlink('/etc', '/run/kernel/x'),\n"
            "            lambda: open('/run/kernel/y', 'w')):\n"
            "    try: act()\n"
            "    except OSError as e: print(e.errno)\n"
        )
        assert said.split() == ["30", "30", "30"]


def test_unknown_options_refuse_the_start(kernelspec: Any) -> None:
    with pytest.raises(StartRefused, match=r"(?s)'mem_limt' of kernel.json.*mem_limit"):
        KernelManager(kernel_name=kernelspec(mem_limt="1G")).start_kernel()
    config = Config({"SandboxProvisioner": {"mem_limti": "1G"}})
    with pytest.raises(StartRefused, match=r"c.SandboxProvisioner.mem_limti"):
        KernelManager(kernel_name=kernelspec(), config=config).start_kernel()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mem_limit": "512MB"}, "'512MB' is not a size"),
        ({"mem_limit": "1K"}, "too small"),
        ({"cpu_limit": 0.0}, "too small"),
        ({"cpuset": "3-1"}, "not a list of CPUs"),
        ({"volumes": ["data:/data"]}, "relative path"),
        ({"volumes": ["/no/such/volume:/data"]}, "No such file or directory"),
        ({"workdir": "/"}, "more than one person's files"),
        ({"workdir": "/etc"}, "belongs to the system"),
        ({"workdir": "/no/such/dir"}, "No such file or directory"),
        ({"workdir": "root"}, "no root directory"),
        ({"on_missing": {"seccomp": "warn"}}, "that a start can do without"),
        ({"runtime_dir": "/tmp/" + "x" * 120}, "may have 107 bytes"),
    ],
)
def test_bad_input_is_refused_with_what_to_do(
    kernelspec: Any, options: dict[str, Any], words: str
) -> None:
    manager = KernelManager(kernel_name=kernelspec(**options))
    with pytest.raises(StartRefused) as caught:
        manager.start_kernel()
    assert not Path("/tmp/" + "x" * 120).exists()
    assert words in str(caught.value.error)
    assert caught.value.error.remedy in str(caught.value.error)


def test_a_kernels_own_config_wins_over_the_configuration_file(
    kernel: Any, kernelspec: Any
) -> None:
    config = Config({"SandboxProvisioner": {"pids_limit": 99, "tmp_limit": "77M"}})
    manager = KernelManager(kernel_name=kernelspec(pids_limit=55), config=config)
    with kernel(manager=manager) as k:
        assert k.provisioner.pids_limit == 55
        assert k.provisioner.tmp_limit == "77M"


def test_the_environment_variable_chooses_the_sandbox_for_a_plain_kernelspec(
    kernelspec: Any, runtime_dir: Path
) -> None:
    kernelspec()  # for its folders and the current directory
    program = (
        "from jupyter_client.manager import KernelManager\n"
        "from traitlets.config import Config\n"
        f"config = Config({{'SandboxProvisioner': {{'runtime_dir': {str(runtime_dir)!r}}}}})\n"
        "manager = KernelManager(kernel_name='python3', config=config)\n"
        "manager.start_kernel()\n"
        "print(type(manager.provisioner).__name__, manager.transport)\n"
        "manager.shutdown_kernel(now=True)\n"
    )
    variables = {**os.environ, "JUPYTER_DEFAULT_PROVISIONER_NAME": "sandbox-provisioner"}
    answer = subprocess.run(
        [sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=True
    )
    assert answer.stdout.split() == ["SandboxProvisioner", "ipc"]


# -- transport


def test_a_manager_that_insists_on_tcp_is_refused_by_the_options_name(kernelspec: Any) -> None:
    config = Config({"KernelManager": {"transport": "tcp"}})
    with pytest.raises(StartRefused, match="transport") as caught:
        KernelManager(kernel_name=kernelspec(), config=config).start_kernel()
    assert isinstance(caught.value.error, SpecError)
    manager = KernelManager(kernel_name=kernelspec())
    manager.shell_port = 5555
    with pytest.raises(StartRefused, match="ports"):
        manager.start_kernel()


def test_an_ip_that_the_caller_chose_for_ipc_is_respected(kernel: Any, kernelspec: Any) -> None:
    manager = KernelManager(kernel_name=kernelspec(), transport="ipc", ip="chosen")
    with kernel(manager=manager) as k:
        assert k.manager.ip == "chosen"
        assert k.run("1 + 1") == "2"
        k.manager.restart_kernel()
        k.client.wait_for_ready(timeout=60)
        assert k.run("1 + 2") == "3"
    assert not list(Path.cwd().glob("chosen*"))


def test_curve_keys_encrypt_the_unix_sockets_too(kernel: Any, kernelspec: Any) -> None:
    manager = KernelManager(kernel_name=kernelspec(), transport_encryption="required")
    with kernel(manager=manager) as k:
        assert manager.curve_publickey
        assert k.run("1 + 1") == "2"


def test_the_kernel_sees_an_inside_connection_file_with_the_same_keys(kernel: Any) -> None:
    with kernel() as k:
        inside = json.loads(
            k.run("print(open(get_ipython().kernel.parent.abs_connection_file).read())")
        )
        outside = json.loads(Path(k.manager.connection_file).read_text())
        assert inside["ip"] == "/run/kernel/s"
        assert outside["ip"] != inside["ip"]
        assert inside["key"] == outside["key"]


# -- caps


@pytest.mark.requires("cgroup-memory")
def test_a_kernel_that_reaches_its_memory_limit_says_why_under_the_cell(
    kernel: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with kernel(mem_limit="200M", mem_interrupt=0) as k, kernel(mem_limit="200M") as neighbour:
        k.manager.log.propagate = True
        request = k.start("x = [bytearray(b'1' * (1 << 20)) for _ in range(1000)]")
        asyncio.run(k.provisioner.handle.wait())
        assert not k.manager.is_alive()
        said = k.until(lambda m: m["msg_type"] == "stream", request)["content"]
        assert said["name"] == "stderr"
        assert "it reached its memory limit of 200 MiB" in said["text"]
        assert "Raise mem_limit" in said["text"]
        story = k.provisioner.story
        assert story.oom_killed
        assert story.memory_limit_bytes == 200 << 20
        assert format_bytes(story.memory_limit_bytes) in caplog.text
        assert neighbour.run("1 + 1") == "2"


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("os._exit(3)", ("exit", 3, None, False)),
        ("os.kill(os.getpid(), 9)", ("signal", None, 9, True)),
        ("os.kill(os.getpid(), 11)", ("signal", None, 11, True)),
    ],
)
def test_a_kernel_that_ends_by_itself_tells_programs_and_only_of_a_signal_says_a_sentence(
    kernel: Any, code: str, told: Any
) -> None:
    with kernel() as k:
        assert k.provisioner.end is None
        os.mkfifo("go")
        cell = k.start(f"import os; open('go').close(); {code}")
        # Who ends at once may not have told which cell runs.
        k.until(lambda m: m["content"].get("execution_state") == "busy", cell)
        open("go", "w").close()
        asyncio.run(k.provisioner.handle.wait())
        assert not k.manager.is_alive()
        data = k.until(lambda m: m["msg_type"] == "display_data", cell)
        assert data["content"]["data"] == {}
        end = k.provisioner.end
        found = (end.kind, end.exit_code, end.signal, bool(end.sentence), end.cell)
        assert found == (*told, cell)
        assert data["metadata"][MIME] == end.as_json()
    assert k.provisioner.end is end


def test_who_asks_for_the_end_while_another_one_cleans_up_gets_an_answer(kernel: Any) -> None:
    """A restarter asks every 3 s, also while a front end ends the kernel."""

    async def both() -> int | None:
        asked = asyncio.ensure_future(k.provisioner.poll())
        await asyncio.sleep(0)  # until it waits
        await k.provisioner.cleanup()
        return await asked

    with kernel() as k:
        k.client.execute("import os; os._exit(3)")
        asyncio.run(k.provisioner.handle.wait())
        assert asyncio.run(both()) == 3


def test_an_end_that_was_asked_for_is_known_to_its_manager_alone(kernel: Any) -> None:
    with kernel() as k:
        k.run("1")
    assert k.provisioner.end.kind == "asked"


@pytest.mark.requires("cgroup-memory", "cgroup-v1")  # v2 ends all of a group at once
def test_a_child_that_the_cap_has_killed_is_told_of_and_not_why_a_kernel_ends_later(
    kernel: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with kernel(mem_limit="200M", mem_interrupt=0) as k:
        k.manager.log.propagate = True
        request = k.start(
            "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'bytearray(1 << 30)'])"
        )
        told = k.until(lambda m: "A child process" in m["content"].get("text", ""), request)
        assert told["content"]["name"] == "stderr"
        assert "memory limit of 200 MiB" in " ".join(told["content"]["text"].split())
        assert k.manager.is_alive()
        assert "A child process of kernel" in caplog.text
        k.client.execute("import os; os.kill(os.getpid(), 9)")
        story = asyncio.run(k.provisioner.handle.wait())
        assert (story.kind, story.signal) == (EndKind.SIGNAL, 9)
        assert "limit" not in story.reason


FILL_WITH_THREADS = """
import os, threading
done = threading.Event()
try:
    while True:
        threading.Thread(target=done.wait).start()
except RuntimeError as error:
    print(error)
"""


def said_of(k: Any, request: str, words: str) -> str:
    """What stands in one line under the cell of *request* when *words* do; its server asks for the
    kernel now and then, as restarters do."""
    told = ""
    while words not in told:
        assert k.manager.is_alive()
        with contextlib.suppress(queue.Empty):
            message = k.client.get_iopub_msg(timeout=0.1)
            if message["parent_header"].get("msg_id") == request:
                told = " ".join(f"{told} {message['content'].get('text', '')}".split())
    return told


@pytest.mark.requires("cgroup-pids")
def test_a_kernel_that_is_refused_a_thread_and_lives_on_says_which_option_raises_it(
    kernel: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with kernel(pids_limit=40) as k:
        k.manager.log.propagate = True
        request = k.client.execute(f"{FILL_WITH_THREADS}done.wait()")
        told = said_of(k, request, "raise pids_limit")
        assert "can't start new thread" in told
        assert told.count("it has as many as pids_limit allows") == 1
        assert "refused another process or thread" in caplog.text
        k.manager.interrupt_kernel()


def test_what_is_said_to_a_person_is_text_and_short(kernel: Any) -> None:
    """It may come from a stranger, through the broker."""
    with kernel() as k:
        request = k.start("import threading; threading.Event().wait()")
        k.provisioner.handle.say("\x1b[2J" + "\N{DIGIT ONE}\N{EURO SIGN}" * 2000)
        told = k.until(lambda message: message["content"].get("name") == "stderr", request)
        text = told["content"]["text"]
        assert "\\x1b[2J1" in text
        assert "\x1b" not in text
        assert len(text.encode()) < 3100
        k.manager.interrupt_kernel()


@pytest.mark.parametrize("change", ["moved", "replaced", "removed"])
def test_a_kernel_whose_work_directory_was_changed_outside_says_so(
    kernel: Any, workdir: Path, change: str
) -> None:
    place = workdir / "ä b"
    place.mkdir()
    with kernel(start_options={"cwd": str(place)}) as k:
        assert k.manager.is_alive()
        request = k.start("import threading; threading.Event().wait()")
        if change == "removed":
            shutil.rmtree(place)
        else:
            place.rename(workdir / "old")
        if change == "replaced":
            place.mkdir()
        told = said_of(k, request, "Restart the kernel")
        assert f"The work directory of this kernel, {place}, was moved, removed or replaced" in told
        k.manager.interrupt_kernel()


@pytest.mark.requires("root", "cgroup-memory")
def test_a_kernel_whose_group_somebody_removes_is_ended_with_the_reason(kernel: Any) -> None:
    """Without its group it would go on without a limit."""
    with kernel(mem_limit="200M") as k:
        tree = k.provisioner.handle._tree
        if not hasattr(tree, "_freezer"):
            pytest.skip("v2 lets nobody remove a group with a member that has not ended")
        _, group = tree.memory_group
        for pid in tree.pids():
            Path(os.path.dirname(os.path.dirname(group)), "cgroup.procs").write_text(str(pid))
        os.rmdir(group)
        story = asyncio.run(k.provisioner.handle.wait())
        assert story.kind is EndKind.GROUP_LOST
        assert "another program has removed its control group" in story.reason


@pytest.mark.requires("cgroup-memory", "cgroup-cpu")
def test_the_caps_stand_in_the_environment_and_where_programs_look_in_a_container(
    kernel: Any,
) -> None:
    with kernel(mem_limit="256M", cpu_limit=1.5) as k:
        said = k.run(
            "import os; print([os.environ.get(n) for n in ('MEM_LIMIT', 'CPU_LIMIT',"
            " 'PYTHON_CPU_COUNT', 'OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS',"
            " 'NUMEXPR_NUM_THREADS')])"
        )
        files = k.run(
            "!cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max; ls -1 /sys /sys/fs/cgroup"
        )
        assert "Read-only" in k.run("open('/sys/fs/cgroup/memory.max', 'w')")
    assert said.strip() == str([str(256 << 20), "1.5", "2", "2", "2", "2", "2"])
    shown = [
        "268435456",
        "150000 100000",
        "/sys:",
        "devices",
        "fs",
        "/sys/fs/cgroup:",
        "cpu.max",
        "memory.max",
    ]
    assert [line.strip() for line in files.splitlines() if line.strip()] == shown


def test_what_the_server_inherited_is_not_handed_on(kernel: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", "secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("COURSE", "physics")
    with kernel(env_keep=["COURSE"]) as k:
        said = k.run("import os; print(sorted(os.environ.items()))")
    assert "secret" not in said
    assert "physics" in said


def test_what_the_caller_sets_for_this_kernel_arrives(kernel: Any) -> None:
    variables = {**os.environ, "JPY_SESSION_NAME": "/nb.ipynb", "FOR_THIS_KERNEL": "yes"}
    with kernel(start_options={"env": variables}) as k:
        assert k.run("import os; os.environ['FOR_THIS_KERNEL'] + __session__") == "'yes/nb.ipynb'"


# -- other processes


SECOND_PROCESS = """
import asyncio, json, signal, sys
from sandbox_provisioner.provisioner import SandboxProvisioner
info = json.load(sys.stdin)
async def take_over():
    provisioner = SandboxProvisioner(kernel_id=info["kernel_id"], parent=None)
    await provisioner.load_provisioner_info(info)
    print(await provisioner.poll(), flush=True)
    await provisioner.send_signal(signal.SIGTERM)
    print(await provisioner.wait())
asyncio.run(take_over())
"""


def test_a_second_process_finds_signals_and_stops_the_same_kernel(kernel: Any) -> None:
    with kernel() as k:
        info = json.dumps(asyncio.run(k.provisioner.get_provisioner_info()))
        command = [sys.executable, "-c", SECOND_PROCESS]
        answer = subprocess.run(command, input=info, capture_output=True, text=True, check=False)
        assert answer.stdout.split() == ["None", str(-signal.SIGTERM)], answer.stderr
        assert asyncio.run(k.provisioner.poll()) is not None


def test_after_the_kernels_death_loading_says_so(kernel: Any) -> None:
    with kernel() as k:
        info = asyncio.run(k.provisioner.get_provisioner_info())
        k.shutdown()
    with pytest.raises(LaunchError, match="it has ended"):
        asyncio.run(_stranger().load_provisioner_info(info))


def test_a_pid_that_belongs_to_somebody_else_now_is_not_signalled(kernel: Any) -> None:
    with kernel() as k:
        info = asyncio.run(k.provisioner.get_provisioner_info())
        info["sandbox"]["init_start"] -= 1
        with pytest.raises(LaunchError, match="somebody else's"):
            asyncio.run(_stranger().load_provisioner_info(info))
        assert k.run("1 + 1") == "2"


def _stranger() -> SandboxProvisioner:
    return SandboxProvisioner(kernel_id="stranger", parent=None)


def test_resolve_path_tells_of_the_work_directory_only(kernel: Any, workdir: Path) -> None:
    (workdir / "here.py").write_text("")
    with kernel() as k:
        assert k.provisioner.resolve_path("here.py") == str(workdir / "here.py")
        for path in ("/etc/passwd", "~/.bashrc", "../", "missing.py"):
            assert k.provisioner.resolve_path(path) is None


@pytest.mark.parametrize("where", ["make-record", "become", "provisioner"])
def test_a_mistake_of_ours_reaches_the_dialog_as_one(
    kernel: Any, runtime_dir: Path, monkeypatch: Any, where: str
) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("no such thing")

    monkeypatch.setenv(FAIL_AT, f"{where}:mistake")
    if where == "provisioner":
        monkeypatch.setattr(SandboxProvisioner, "_labels", fail)
    with pytest.raises(StartRefused) as caught, kernel():
        pass
    told = str(caught.value)
    assert isinstance(caught.value.error, InternalError)
    assert "This is a mistake in sandbox-provisioner" in told
    assert "jupyter sandbox doctor --json" in told
    assert max(map(len, told.splitlines())) <= COLUMNS
    assert not kernels_of(runtime_dir)


def test_a_front_end_that_runs_argv_without_a_connection_file_is_refused(kernelspec: Any) -> None:
    """With one its kernel is boxed all the same: test_by_argv.py."""
    argv = KernelManager(kernel_name=kernelspec()).kernel_spec.argv
    answer = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert answer.returncode == 1
    assert "Could not read the connection file" in answer.stderr


def test_few_kernels_start_cold_at_a_time(kernelspec: Any, monkeypatch: Any) -> None:
    beginning = most = 0
    all_places = asyncio.Event()

    async def begin_and_fail(*_: Any) -> None:
        nonlocal beginning, most
        beginning += 1
        most = max(most, beginning)
        if beginning == places:
            all_places.set()
        await asyncio.wait_for(all_places.wait(), 60)
        for _ in range(100):  # for one more that should not
            await asyncio.sleep(0)
        beginning -= 1
        raise LaunchError(attempt="start", answer="not meant to", remedy="None.", step="none")

    async def start_all(name: str) -> list[Any]:
        managers = [AsyncKernelManager(kernel_name=name) for _ in range(2 * places)]
        starts = (manager.start_kernel() for manager in managers)
        return await asyncio.gather(*starts, return_exceptions=True)

    places = provisioner._COLD_STARTS
    monkeypatch.setattr(provisioner, "_cold_starts", Gate(places, 60))
    monkeypatch.setattr(LocalLauncher, "start", begin_and_fail)
    answers = asyncio.run(start_all(kernelspec(warm=False)))
    assert {type(answer) for answer in answers} == {StartRefused}
    assert most == places
