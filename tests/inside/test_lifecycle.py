"""A sandbox ends when it shall, whoever dies first, and then nothing is left of it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys

import pytest
from boxes import run

from sandbox_provisioner import audit, records
from sandbox_provisioner.stages import SERVER_STEPS
from sandbox_provisioner.sweeping import sweep

pytestmark = pytest.mark.requires("userns")

SERVER = """
import os, signal, sys
import boxes
from sandbox_provisioner import launch, records, spec, stages
runtime, workdir, survive, die_at = sys.argv[1:]

def die(step):
    if step == die_at:
        os.kill(os.getpid(), signal.SIGKILL)

def die_while_writing(folder, record):
    os.kill(os.getpid(), signal.SIGKILL)

stages.fail_here = die
if die_at == "first-record":
    records.RecordFolder.write = die_while_writing
box = boxes.start(
    launch.LocalLauncher(runtime_dir=runtime),
    boxes.request_for(
        workdir, survive_server=survive == "survive", limits=spec.Limits(disk_bytes=16 << 20),
    ),
)
print(box.handle.record.sandbox_id, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def start_server(runtime_dir, workdir):
    """Starts a server of its own with one sandbox; its process, and the sandbox's id."""
    with contextlib.ExitStack() as stack:

        def start(survive="", die_at=""):
            words = [str(runtime_dir), str(workdir), survive, die_at]
            server = subprocess.Popen(
                [sys.executable, "-c", SERVER, *words],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.callback(end_server, server)
            return server, server.stdout.readline().strip()

        yield start


def end_server(server):
    server.kill()
    server.wait()
    server.stdin.close()
    server.stdout.close()


def only_record(runtime, watch):
    ((_, record),) = records.all_records(runtime)
    watch.expect_gone(record, runtime)
    return record


def has_ended(pidfd, seconds):
    return bool(select.select([pidfd], [], [], seconds)[0])


class Ends(list):
    """What an audit hears of ends: ids and kinds."""

    def ended(self, record, story):
        self.append((record.sandbox_id, str(story.kind)))


@pytest.fixture
def ends():
    heard = Ends()
    audit.listen(heard)
    yield heard
    audit.forget(heard)


def test_a_sandbox_ends_with_its_killed_server_and_a_sweep_leaves_nothing(
    start_server, runtime_dir, watch, ends
):
    server, sandbox_id = start_server()
    record = only_record(runtime_dir, watch)
    pidfd = records.open_init(record)
    server.kill()
    assert has_ended(pidfd, 10)
    os.close(pidfd)
    assert sweep(runtime_dir) == [sandbox_id]
    assert os.listdir(runtime_dir) == ["lock"]
    assert ends == [(sandbox_id, "asked")]


def test_a_sweep_leaves_the_sandbox_of_a_living_server_alone(start_server, runtime_dir, watch):
    server, sandbox_id = start_server()
    record = only_record(runtime_dir, watch)
    assert sweep(runtime_dir) == []
    pidfd = records.open_init(record)
    assert not has_ended(pidfd, 0)
    server.kill()
    assert has_ended(pidfd, 10)
    os.close(pidfd)
    assert sweep(runtime_dir) == [sandbox_id]


def test_a_sandbox_that_shall_survive_its_server_does_until_it_ends_itself(
    start_server, runtime_dir, watch
):
    server, sandbox_id = start_server("survive")
    record = only_record(runtime_dir, watch)
    pidfd = records.open_init(record)
    # Its program would end with its stdin: a process that waits for no one takes its place.
    assert record.survives_server
    signal.pidfd_send_signal(pidfd, 0)
    server.send_signal(signal.SIGSTOP)
    assert sweep(runtime_dir) == []
    assert not has_ended(pidfd, 0)
    server.kill()
    server.wait()
    assert has_ended(pidfd, 10)  # as its stdin ended
    os.close(pidfd)
    assert sweep(runtime_dir) == [sandbox_id]


# -- servers that are not as one expects

FORKING = SERVER.replace(
    "sys.stdin.read()",
    """
if os.fork() == 0:
    sys.stdin.read()
    os._exit(0)
sys.stdin.read()
""",
)


@pytest.mark.parametrize("warm", ["", "1"], ids=["cold", "warm"])
def test_a_sandbox_ends_with_its_server_though_a_child_that_it_has_forked_lives(
    start_server, runtime_dir, watch, monkeypatch, warm
):
    """multiprocessing forks so; the child has a copy of all that its server had open."""
    monkeypatch.setattr(sys.modules[__name__], "SERVER", FORKING)
    monkeypatch.setenv("SANDBOX_TEST_WARM", warm)
    server, sandbox_id = start_server()
    for _, record in records.all_records(runtime_dir):
        watch.expect_gone(record, runtime_dir)
    pidfds = {r.kind: records.open_init(r) for _, r in records.all_records(runtime_dir)}
    server.kill()
    assert has_ended(pidfds["kernel"], 10)
    assert sweep(runtime_dir) == [sandbox_id]
    if warm:
        signal.pidfd_send_signal(pidfds["nursery"], signal.SIGKILL)
        assert has_ended(pidfds["nursery"], 10)
        sweep(runtime_dir)
    for pidfd in pidfds.values():
        os.close(pidfd)


STRANGE = {
    "ignores-children": "signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
    "waits-for-all-children": """
def wait_for_all(*_):
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
signal.signal(signal.SIGCHLD, wait_for_all)
""",
    "has-no-stdin": "os.closerange(0, 1)",
    "has-no-streams": "os.closerange(0, 3)",
    "has-something-else-there": "os.closerange(0, 3); kept = [os.eventfd(0) for _ in range(3)]",
}
STRANGE_SERVER = """
import asyncio, os, signal, subprocess, sys
from sandbox_provisioner.errors import SandboxError
from sandbox_provisioner.launch import LocalLauncher
from sandbox_provisioner.contract import Stdio
from sandbox_provisioner.stem import stem
import boxes
runtime, workdir, answer = sys.argv[1:]
STRANGE
async def live():
    launcher, null = LocalLauncher(runtime_dir=runtime), subprocess.DEVNULL
    request = boxes.request_for(workdir, ["/bin/sh", "-c", "echo hello; exit 7"], pump=True)
    handle = await launcher.start(request, stdio=Stdio(null, None, subprocess.PIPE))
    story = await handle.wait()
    await handle.close()
    try:
        wrong = boxes.request_for(workdir, ["/bin/true"], cwd=f"{workdir}/missing")
        await launcher.start(wrong)
    except SandboxError as error:
        return f"{story.code} {type(error).__name__} {os.listdir(runtime)}"
found = asyncio.run(live())
stem.end()
with open(answer, "w") as file:
    file.write(found)
"""


@pytest.mark.parametrize("how", STRANGE)
@pytest.mark.parametrize("begun", ["<&- >&- 2>&-", ""], ids=["without-streams", "with-streams"])
def test_a_start_goes_well_or_tells_why_in_a_server_that(runtime_dir, workdir, how, begun):
    script = STRANGE_SERVER.replace("STRANGE", STRANGE[how], 1)
    answer = workdir / "answer"
    words = [sys.executable, "-c", script, str(runtime_dir), str(workdir), str(answer)]
    subprocess.run(
        ["/bin/sh", "-c", f'exec "$@" {begun}', "sh", *words],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=60,
        check=False,  # Python itself cannot flush its streams
    )
    assert answer.read_text() == "7 LaunchError ['lock']"


SURVIVOR = SERVER.replace("    workdir, survive", "    workdir, ['/bin/sleep', '1000'], survive")


def test_a_survivor_is_left_alone_by_a_sweep_and_can_be_ended_by_its_record(
    start_server, runtime_dir, watch, monkeypatch, ends
):
    monkeypatch.setattr(sys.modules[__name__], "SERVER", SURVIVOR)
    server, sandbox_id = start_server("survive")
    record = only_record(runtime_dir, watch)
    pidfd = records.open_init(record)
    server.kill()
    server.wait()
    assert sweep(runtime_dir) == []
    assert ends == []
    assert not has_ended(pidfd, 0.3)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    assert has_ended(pidfd, 10)
    os.close(pidfd)
    assert sweep(runtime_dir) == [sandbox_id]
    assert os.listdir(runtime_dir) == ["lock"]
    assert ends == [(sandbox_id, "outside")]


@pytest.mark.parametrize("step", ["first-record", *SERVER_STEPS])
def test_a_server_that_is_killed_while_it_starts_a_sandbox_leaves_nothing_after_a_sweep(
    start_server, runtime_dir, watch, step
):
    server, _ = start_server(die_at=step)
    assert server.wait(10) == -signal.SIGKILL
    for _, record in records.all_records(runtime_dir):
        watch.expect_gone(record, runtime_dir)
    sweep(runtime_dir)
    assert set(os.listdir(runtime_dir)) <= {"lock"}


@pytest.mark.parametrize("step", ["write-record"])
def test_stand_ins_go_too_when_a_server_is_killed_while_it_starts_a_sandbox(
    start_server, runtime_dir, watch, workdir, monkeypatch, step
):
    monkeypatch.setenv("HOME", str(workdir))
    start_server(die_at=step)
    for _, record in records.all_records(runtime_dir):
        watch.expect_gone(record, runtime_dir)
    sweep(runtime_dir)
    assert os.listdir(workdir) == []


def test_stand_ins_of_a_killed_server_go_with_a_sweep(
    start_server, runtime_dir, watch, workdir, monkeypatch
):
    monkeypatch.setenv("HOME", str(workdir))
    server, sandbox_id = start_server()
    only_record(runtime_dir, watch)
    assert len(os.listdir(workdir)) > 20
    server.kill()
    server.wait()
    assert sweep(runtime_dir) == [sandbox_id]
    assert os.listdir(workdir) == []


def test_a_sandbox_ends_when_its_program_does_and_tells_its_status(sandbox):
    with sandbox([sys.executable, "-c", "import sys; sys.exit(7)"]) as box:
        assert box.wait().code == 7


def test_a_signal_that_ends_the_program_is_told(sandbox):
    with sandbox([sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"]) as box:
        story = box.wait()
        assert (story.code, story.signal) == (-11, 11)


def test_an_interrupt_reaches_the_whole_process_group(sandbox):
    script = "import signal, sys\nprint('ready', flush=True)\nsignal.pause()"
    with sandbox([sys.executable, "-c", script]) as box:
        assert box.readline() == b"ready\n"
        box.handle.signal(signal.SIGINT)
        assert box.wait().code in {1, -signal.SIGINT}


def test_closing_twice_and_signals_after_the_end_are_fine(sandbox):
    with sandbox() as box:
        box.handle.kill()
        box.wait()
        box.handle.signal(signal.SIGINT)
        box.handle.kill()
        run(box.handle.close())
        run(box.handle.close())
        box.handle.kill()
        assert box.handle.poll() is not None


@pytest.mark.requires("cgroup-pids")
def test_a_frozen_sandbox_can_be_ended(sandbox):
    from sandbox_provisioner.spec import Limits

    with sandbox(limits=Limits(pids=16)) as box:
        box.handle.freeze()


def test_a_program_that_stops_itself_is_ended_all_the_same(sandbox):
    with sandbox([sys.executable, "-c", "import os; print(1, flush=True); os.kill(0, 19)"]) as box:
        assert box.readline() == b"1\n"


def test_waiting_from_a_second_event_loop_works(sandbox):
    with sandbox() as box:
        with pytest.raises(TimeoutError):
            import asyncio

            asyncio.run(asyncio.wait_for(box.handle.wait(), 0.01))
        assert box.finish().code == 0
