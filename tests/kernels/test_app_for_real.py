"""test_app_for_real.py - in the test process: `jupyter sandbox` in processes of its own."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import clients
import pytest
from jupyter_client.manager import start_new_kernel
from leaks import Watch

from sandbox_provisioner.facilities.caps.cgroup import open_existing
from sandbox_provisioner.inside.kernel_calls import watch_changes
from sandbox_provisioner.records import Record, all_records, cgroup_facts, open_init
from sandbox_provisioner.warm.found import SOCKET, call

pytestmark = pytest.mark.requires("userns", "cgroup-memory", "cgroup-pids")

APP = (sys.executable, "-m", "sandbox_provisioner.app")
PATIENCE_SECONDS = 60
OTHER_SCREEN, OWN_SCREEN = b"\x1b[?1049h", b"\x1b[?1049l"
Run = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., "contextlib.AbstractContextManager[subprocess.Popen[bytes]]"]


@pytest.fixture
def environment(new_folder: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """No configuration or kernels but the test's own."""
    folder = new_folder()
    for name in ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR"):
        monkeypatch.setenv(f"JUPYTER_{name}", str(folder / name.lower()))
    monkeypatch.setenv("JUPYTER_PATH", str(folder / "prefix" / "share" / "jupyter"))
    monkeypatch.setenv("PREFIX", str(folder / "prefix"))
    monkeypatch.setenv("TERM", "dumb")
    return dict(os.environ)


@pytest.fixture
def jupyter_sandbox(environment: dict[str, str], runtime_dir: Path, workdir: Path) -> Run:
    """``jupyter_sandbox("run", "--", "id")``: the command, ended."""

    def run(name: str, *words: str, input: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*APP, name, f"--runtime-dir={runtime_dir}", *words],
            cwd=workdir,
            env={**environment, "PWD": str(workdir)},
            input=input,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )

    return run


@pytest.fixture
def running(environment: dict[str, str], runtime_dir: Path, workdir: Path, watch: Watch) -> Start:
    """``with running("cat") as process``: `jupyter sandbox run`; the command says "ready"."""

    @contextlib.contextmanager
    def start(*command: str) -> Iterator[subprocess.Popen[bytes]]:
        words = [*APP, "run", f"--runtime-dir={runtime_dir}", "--mem-limit=128M", "--", *command]
        process = subprocess.Popen(
            words, cwd=workdir, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdin and process.stdout
        with process.stdin, process.stdout:
            assert process.stdout.readline() == b"ready\n"
            watch.expect_gone(_record_of_what_runs(runtime_dir), runtime_dir)
            yield process
            if process.poll() is None:
                process.terminate()
            process.wait(PATIENCE_SECONDS)

    return start


def _record_of_what_runs(runtime: Path) -> Record:
    """The only record of *runtime*, once it names PID 1: a command may speak before that."""
    [(folder, record)] = all_records(runtime)
    changes = watch_changes([str(folder.path)])
    try:
        while not (record := folder.read()).init_pid:
            assert select.select([changes], [], [], PATIENCE_SECONDS)[0], "it was never written"
            os.read(changes, 1 << 16)
    finally:
        os.close(changes)
    return record


WAIT = ("sh", "-c", "echo ready; read line")


# -- run


def test_run_passes_stdin_stdout_stderr_and_the_status_on(jupyter_sandbox: Run) -> None:
    ended = jupyter_sandbox("run", "--", "sh", "-c", "cat; echo oops >&2; exit 7", input="hello")
    assert (ended.stdout, ended.stderr, ended.returncode) == ("hello", "oops\n", 7)


def test_run_runs_in_the_directory_that_one_is_in(jupyter_sandbox: Run, workdir: Path) -> None:
    ended = jupyter_sandbox("run", "--", "sh", "-c", "pwd; echo made > file")
    assert ended.stdout.strip() == str(workdir)
    assert (workdir / "file").read_text() == "made\n"


def test_a_command_that_names_files_of_the_box_has_the_boxs_own(jupyter_sandbox: Run) -> None:
    read = "cat /proc/self/status /etc/hostname; wc -l < /etc/passwd"
    for words in (("sh", "-c", read), ("cat", "/proc/self/status", "/etc/hostname")):
        ended = jupyter_sandbox("run", "--", *words)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert "Name:\tcat\n" in ended.stdout
        assert "\nsandbox\n" in ended.stdout


def test_run_tells_a_signal_as_shells_do(jupyter_sandbox: Run) -> None:
    ended = jupyter_sandbox("run", "--", "sh", "-c", "kill -TERM $$")
    assert ended.returncode == 128 + signal.SIGTERM


def test_run_says_when_the_cap_on_memory_ended_the_command(jupyter_sandbox: Run) -> None:
    fill = "x = b'x' * (300 << 20)"
    ended = jupyter_sandbox("run", "--mem-limit", "64M", "--", sys.executable, "-c", fill)
    assert ended.returncode == 137
    assert "reached its memory limit of 64 MiB" in " ".join(ended.stderr.split())
    assert max(map(len, ended.stderr.splitlines())) <= 80


def test_run_says_at_the_end_what_its_network_was_refused(jupyter_sandbox: Run) -> None:
    options = ("--network=gateway", "--network-allow=allowed.test")
    ended = jupyter_sandbox("run", *options, "--", "getent", "ahostsv4", "refused.test")
    assert (ended.stdout, ended.returncode) == ("", 2)
    assert "1 refused: refused.test (1)" in " ".join(ended.stderr.split())


def test_run_hands_on_no_variable_that_is_not_asked_for(
    jupyter_sandbox: Run, environment: dict[str, str]
) -> None:
    environment |= {"DEMO_TOKEN": "secret", "DEMO_NAME": "name"}
    assert "DEMO_" not in jupyter_sandbox("run", "--", "env").stdout
    assert "DEMO_NAME=name" in jupyter_sandbox("run", "--env-keep=DEMO_N*", "--", "env").stdout


def test_run_takes_the_options_of_an_installed_kernel(jupyter_sandbox: Run) -> None:
    jupyter_sandbox("install", "--prefix", os.environ["PREFIX"], "--name=k", "--mem-limit=96M")
    ended = jupyter_sandbox("run", "--kernel", "k", "--", "env")
    assert f"MEM_LIMIT={96 << 20}" in ended.stdout, ended.stderr


def test_run_names_the_program_that_is_not_there(jupyter_sandbox: Run) -> None:
    ended = jupyter_sandbox("run", "--", "nonesuch")
    assert ended.returncode == 1
    assert ended.stderr.startswith("jupyter sandbox: Could not run 'nonesuch'")
    assert "kernel.json" not in ended.stderr


def test_run_refuses_what_it_cannot_mean_before_it_starts(jupyter_sandbox: Run) -> None:
    assert jupyter_sandbox("run", "id").returncode == 2
    assert jupyter_sandbox("run", "--mem-limit=3Q", "--", "id").returncode == 1
    assert jupyter_sandbox("run", "--cpu-limit=much", "--", "id").returncode == 2


def test_run_says_that_the_box_was_ended_from_outside(
    environment: dict[str, str], runtime_dir: Path, workdir: Path
) -> None:
    words = [*APP, "run", f"--runtime-dir={runtime_dir}", "--", *WAIT]
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    with subprocess.Popen(words, cwd=workdir, env=environment, text=True, **pipes) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        pidfd = open_init(_record_of_what_runs(runtime_dir))
        assert pidfd is not None
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)
        _, told = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 128 + signal.SIGKILL
    assert "The box was ended from outside" in told


def test_run_in_a_sandbox_says_that_this_is_one_already(jupyter_sandbox: Run) -> None:
    inner = [sys.executable, "-m", "sandbox_provisioner.app", "run", "--mem-limit=1G", "--", "true"]
    ended = jupyter_sandbox("run", "--", *inner)
    told = " ".join(ended.stderr.split())
    assert ended.returncode == 1
    assert "this is a sandbox already, in which there can be no other. Use the plain kernel" in told


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_relays_signals(running: Start, number: int) -> None:
    trap = f"trap 'echo got it; exit 3' {number}; echo ready; while :; do sleep 0.05; done"
    with running("sh", "-c", trap) as process:
        process.send_signal(number)
        assert process.wait(PATIENCE_SECONDS) == 3
        assert process.stdout and process.stdout.read() == b"got it\n"


class _Person:
    """Types into a terminal in which `jupyter sandbox run` runs, and reads its screen."""

    def __init__(self, master: int) -> None:
        self.master = master
        self.screen = b""

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    def await_text(self, text: bytes) -> bytes:
        """Read on until *text* shows; what came before it, which is forgotten."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while text not in self.screen:
            left = deadline - time.monotonic()
            assert select.select([self.master], [], [], left)[0], self.screen
            self.screen += os.read(self.master, 4096)
        before, _, self.screen = self.screen.partition(text)
        return before


def resize(terminal: int, rows: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    master, slave = pty.openpty()
    resize(master, 33, 77)
    yield master, slave
    os.close(master)
    os.close(slave)


def test_a_shell_has_a_terminal_with_job_control_and_window_size(
    environment: dict[str, str], runtime_dir: Path, workdir: Path, terminal: tuple[int, int]
) -> None:
    master, slave = terminal
    before = termios.tcgetattr(slave)
    process = subprocess.Popen(
        [*APP, "run", f"--runtime-dir={runtime_dir}", "--", "sh"],
        cwd=workdir,
        env={**environment, "PS1": "box> "},
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    person = _Person(master)
    person.type(b"echo up=$((40+2)); stty size; echo said > /dev/tty\r")
    for text in (b"up=42", b"33 77", b"said"):
        person.await_text(text)
    person.type(b"sleep 1000; echo status=$?\r")
    person.await_text(b"status=$?")
    while not _runs_inside(runtime_dir, "sleep"):
        select.select([master], [], [], 0.05)
    person.type(b"\x03")
    person.type(b"echo again=$((1+1))\r")
    person.await_text(b"again=2")
    resize(master, 40, 100)
    os.kill(process.pid, signal.SIGWINCH)
    person.type(b"until stty size | grep 40; do sleep 0.05; done\r")
    person.await_text(b"40 100")
    person.type(b"exit 5\r")
    assert process.wait(PATIENCE_SECONDS) == 5
    assert termios.tcgetattr(slave) == before


def _runs_inside(runtime: Path, name: str) -> bool:
    """Whether a process *name* descends from the PID 1 of a sandbox of *runtime*."""
    inits = {record.init_pid for _, record in all_records(runtime)}
    parents, names = {}, {}
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            head, _, rest = Path(f"/proc/{entry}/stat").read_text().rpartition(")")
            parents[int(entry)] = int(rest.split()[1])
            names[int(entry)] = head.partition("(")[2]
    inside = set(inits)
    while more := {pid for pid, parent in parents.items() if parent in inside} - inside:
        inside |= more
    return name in {names.get(pid) for pid in inside}


def test_the_box_does_not_get_the_persons_own_terminal(
    environment: dict[str, str], runtime_dir: Path, workdir: Path, terminal: tuple[int, int]
) -> None:
    _, slave = terminal
    ended = subprocess.run(
        [*APP, "run", f"--runtime-dir={runtime_dir}", "--", "stat", "-Lc", "%d:%i", "/dev/stderr"],
        cwd=workdir,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=slave,
        timeout=PATIENCE_SECONDS,
        check=True,
    )
    ours = os.fstat(slave)
    assert ended.stdout.decode().strip() != f"{ours.st_dev}:{ours.st_ino}"


# -- list, gc


def test_list_shows_what_runs_and_its_use(jupyter_sandbox: Run, running: Start) -> None:
    with running(*WAIT):
        [found] = json.loads(jupyter_sandbox("list", "--json").stdout)
        assert found["name"] == "sh"
        assert found["state"] == "running"
        assert found["memory_limit_bytes"] == 128 << 20
        assert 0 < found["memory_bytes"] < 128 << 20
        assert found["processes"] >= 2
        assert found["age_seconds"] < PATIENCE_SECONDS
        table = jupyter_sandbox("list").stdout
        assert found["sandbox_id"][:8] in table
        assert "of 128 MiB" in table
    assert jupyter_sandbox("list").stdout == "No sandbox runs.\n"


def test_list_watches_the_use_of_cpus(
    running: Start, runtime_dir: Path, environment: dict[str, str]
) -> None:
    words = ["list", "--json", "--watch", "--interval=0.5", f"--runtime-dir={runtime_dir}"]
    with running("sh", "-c", "echo ready; while :; do :; done"):
        watcher = subprocess.Popen([*APP, *words], env=environment, stdout=subprocess.PIPE)
        assert watcher.stdout
        with watcher.stdout:
            # On a busy machine a look may come before the loop has had its turn.
            [found] = json.loads(watcher.stdout.readline())
            while found["cpu_percent"] <= 10:
                [found] = json.loads(watcher.stdout.readline())
            watcher.send_signal(signal.SIGINT)
            assert watcher.wait(PATIENCE_SECONDS) == 130


def test_list_watches_on_the_other_screen_of_a_terminal_and_gives_it_back(
    running: Start, runtime_dir: Path, environment: dict[str, str], terminal: tuple[int, int]
) -> None:
    ours, slave = terminal
    words = ["list", "--watch", "--interval=0.1", f"--runtime-dir={runtime_dir}"]
    settings = termios.tcgetattr(slave)
    with running(*WAIT):
        watcher = subprocess.Popen(
            [*APP, *words],
            env=environment | {"TERM": "xterm-256color"},
            stdin=slave,
            stdout=slave,
            stderr=slave,
        )
        person = _Person(ours)
        seen = [person.await_text(text) for text in (OTHER_SCREEN, *[b"\x1b[H", b" MiB"] * 3)]
        watcher.send_signal(signal.SIGINT)
        seen += [person.await_text(text) for text in (b"\x1b[?25h", OWN_SCREEN)]
        assert watcher.wait(PATIENCE_SECONDS) == 130
    # Each look begins at the top: it does not clear the screen, which would flicker.
    assert not any(OTHER_SCREEN in text or b"\x1b[2J" in text for text in seen)
    assert b"1 sandbox " in b"".join(seen)
    assert termios.tcgetattr(slave) == settings


def test_a_sandbox_whose_processes_are_all_stopped_is_asleep(
    jupyter_sandbox: Run, running: Start, runtime_dir: Path
) -> None:
    with running(*WAIT):
        record = _record_of_what_runs(runtime_dir)
        tree = open_existing(cgroup_facts(record), record.tree)
        tree.freeze()
        try:
            [found] = json.loads(jupyter_sandbox("list", "--json").stdout)
        finally:
            tree.thaw()
        assert found["state"] == "asleep"
        [found] = json.loads(jupyter_sandbox("list", "--json").stdout)
        assert found["state"] == "running"


def test_gc_removes_what_a_killed_server_left(
    jupyter_sandbox: Run, running: Start, watch: Watch
) -> None:
    with running(*WAIT) as process:
        [found] = json.loads(jupyter_sandbox("list", "--json").stdout)
        assert found["sandbox_id"] not in jupyter_sandbox("gc").stdout
        [found] = json.loads(jupyter_sandbox("list", "--json").stdout)
        process.kill()
        process.wait()
        [left] = json.loads(jupyter_sandbox("list", "--json").stdout)
        assert left["state"] == "left"
        assert found["sandbox_id"] in jupyter_sandbox("doctor", "--json").stdout
        assert found["sandbox_id"] in jupyter_sandbox("gc").stdout
    assert watch.groups
    assert jupyter_sandbox("list").stdout == "No sandbox runs.\n"


TRY = """
import mine
try:
    open(".venv/bin/planted", "w")
except OSError as error:
    print(mine.VALUE, error.strerror)
"""


@pytest.mark.parametrize("how", ["interpreter", "script"])
def test_a_project_with_an_environment_of_its_own_runs_and_cannot_change_it(
    jupyter_sandbox: Run, workdir: Path, how: str
) -> None:
    environment = workdir / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (workdir / "mine.py").write_text("VALUE = 42")
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "mine.pth").write_text(f"{workdir}\n")
    script = environment / "bin/try"
    script.write_text(f"#!{environment}/bin/python\n{TRY}")
    script.chmod(0o755)
    words = [".venv/bin/python", "-c", TRY] if how == "interpreter" else [".venv/bin/try"]
    ended = jupyter_sandbox("run", "--", *words)
    assert ended.stdout == "42 Read-only file system\n", ended.stderr


def test_warm_prepares_starts_and_list_shows_what_is_shared(
    jupyter_sandbox: Run, runtime_dir: Path, workdir: Path, watch: Watch
) -> None:
    words = ["--prefix", os.environ["PREFIX"], "--name", "quick", "--warm", "True", "--spares", "2"]
    assert jupyter_sandbox("install", *words, "--display-name", "Quick").returncode == 0
    made = jupyter_sandbox("warm", "quick", "--cwd", str(workdir))
    assert made.stdout == "Made 3 of nursery and spares.\n", made.stderr
    again = jupyter_sandbox("warm", "quick", "--cwd", str(workdir))
    assert again.stdout == "All of it is there already.\n", again.stderr
    for _, record in all_records(runtime_dir):
        watch.expect_gone(record, runtime_dir)
    nursery, *spares = json.loads(jupyter_sandbox("list", "--json").stdout)
    assert (nursery["kind"], nursery["state"]) == ("nursery", "running")
    assert [(one["kind"], one["state"]) for one in spares] == [("spare", "waiting")] * 2
    for one in spares:
        assert one["nursery"] == nursery["sandbox_id"]
        assert one["shared_bytes"] > one["private_bytes"] > 0
        assert one["pss_bytes"] < one["shared_bytes"] + one["private_bytes"]
    assert "waiting" in jupyter_sandbox("list").stdout
    channel = call(runtime_dir / nursery["sandbox_id"] / SOCKET)
    assert channel
    with channel:
        channel.send(b"retire")
    for _, record in all_records(runtime_dir):
        if (pidfd := open_init(record)) is not None:
            select.select([pidfd], [], [], PATIENCE_SECONDS)
            os.close(pidfd)
    assert jupyter_sandbox("gc").stdout.count("Removed the sandbox") == 3


def test_warm_refuses_what_no_start_would_use(jupyter_sandbox: Run) -> None:
    words = ["--prefix", os.environ["PREFIX"], "--name", "slow", "--warm", "False"]
    assert jupyter_sandbox("install", *words, "--display-name", "Slow").returncode == 0
    for name, answer in (("slow", "its option warm is false"), ("none", "it is not installed")):
        refused = jupyter_sandbox("warm", name)
        assert refused.returncode == 1
        assert answer in refused.stderr
    assert jupyter_sandbox("warm").returncode == 2


# -- kernels


def test_an_installed_twin_starts_and_is_boxed(
    jupyter_sandbox: Run, runtime_dir: Path, workdir: Path, watch: Watch
) -> None:
    words = ["--prefix", os.environ["PREFIX"], "--name", "twin", "--mem-limit", "512M"]
    installed = jupyter_sandbox("install", *words)
    assert installed.returncode == 0, installed.stderr
    manager, client = start_new_kernel(kernel_name="twin", cwd=str(workdir))
    try:
        for _, record in all_records(runtime_dir):
            watch.expect_gone(record, runtime_dir)
        said = clients.run(client, "import os; print(os.getpid() < 10, os.environ['MEM_LIMIT'])")
        assert said.split() == ["True", str(512 << 20)]
        [found] = json.loads(jupyter_sandbox("list", "--json").stdout)
        assert found["kernel_id"] == manager.provisioner.kernel_id
    finally:
        client.stop_channels()
        manager.shutdown_kernel()
        manager.context.destroy(linger=0)


def test_explain_shows_steps_reasons_and_where_options_come_from(
    jupyter_sandbox: Run, workdir: Path
) -> None:
    jupyter_sandbox("install", "--prefix", os.environ["PREFIX"], "--name=k", "--mem-limit=96M")
    told = jupyter_sandbox("explain", "k", "--cpu-limit=0.5", "--cwd", str(workdir)).stdout
    lines = [line.split() for line in told.splitlines()]
    assert ["mem_limit", "96M", "kernel.json"] in lines
    assert ["cpu_limit", "0.5", "this", "command", "line"] in lines
    assert ["pids_limit", "512", "default"] in lines
    assert "pivot" in told
    assert "warm = auto: " in told
    assert "warm = true: " in jupyter_sandbox("explain", "k", "--warm", "True").stdout
    assert "warm = " not in jupyter_sandbox("explain", "k", "--warm", "False").stdout
    swaps = jupyter_sandbox("explain", "k", "--mem-limit=1G", "--swap-limit=1G").stdout
    assert "not interrupted before it, since it has swap beyond it." in swaps
    assert "the new root becomes /" in told
    assert "ipykernel_launcher -f /run/jupyter/kernel-example.json" in told
    assert jupyter_sandbox("list").stdout == "No sandbox runs.\n"


def test_doctor_finds_this_machine_able(jupyter_sandbox: Run) -> None:
    ended = jupyter_sandbox("doctor", "--json")
    checks: dict[str, Any] = {check["facility"]: check for check in json.loads(ended.stdout)}
    assert ended.returncode == 0
    assert checks["a sandbox starts"]["state"] == "ok"
    assert "Python started" in jupyter_sandbox("doctor").stdout


def test_doctor_names_the_step_that_fails(
    jupyter_sandbox: Run, environment: dict[str, str]
) -> None:
    environment["SANDBOX_FAIL_AT"] = "pivot"
    ended = jupyter_sandbox("doctor")
    assert ended.returncode == 1
    assert "missing  a sandbox starts" in ended.stdout
    assert "[pivot]" in ended.stdout


def test_a_command_tells_of_a_mistake_of_ours(
    jupyter_sandbox: Run, environment: dict[str, str]
) -> None:
    environment["SANDBOX_FAIL_AT"] = "pivot:mistake"
    ended = jupyter_sandbox("run", "--", "true")
    assert ended.returncode == 1
    assert "AssertionError: made to fail" in ended.stderr
    assert "This is a mistake in sandbox-provisioner" in ended.stderr


def test_the_demo_shows_that_the_sandbox_held(jupyter_sandbox: Run) -> None:
    ended = jupyter_sandbox("demo")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for text in ("/etc/shadow", "127.0.0.1", "DEMO_API_TOKEN", "processes", "network interfaces"):
        assert text in ended.stdout
    assert "reached its memory limit of 256 MiB" in ended.stdout
    assert ended.stdout.splitlines()[-1].startswith("Next: ")
    assert " NO\n" not in ended.stdout
