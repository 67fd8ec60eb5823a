"""Attempted escapes from the confinement "landlock", which has no namespaces.

Every test runs as an ordinary user: a root server is refused this confinement.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from boxes import run
from probes import answer_of, attempt_to_open, number_of, system_call

from sandbox_provisioner import ledger, records
from sandbox_provisioner.errors import HostError, LaunchError, SpecError
from sandbox_provisioner.facilities.caps.cgroup import CgroupFacts
from sandbox_provisioner.facilities.landlock.inside import VERBS
from sandbox_provisioner.host import HostFacts
from sandbox_provisioner.spec import Confinement, Limits, OnMissing, Volume
from sandbox_provisioner.sweeping import sweep

pytestmark = [
    pytest.mark.requires("landlock", "ordinary-user"),
    pytest.mark.ordinary_user,
]

LANDLOCK = {"confinement": Confinement.LANDLOCK}
WAIVED = {name: OnMissing.WARN for name in ("memory", "cpu", "cpuset", "pids")}
REFUSED = {"EPERM", "EACCES"}
signals_are_kept_back = pytest.mark.skipif(
    HostFacts.probe().machine.landlock < 6, reason="Landlock keeps back signals since version 6"
)


# -- files


def try_files(secret, folder):
    import os

    def opened(flags):
        return lambda: attempt_to_open(secret, flags)

    return {
        "read": answer_of(opened(os.O_RDONLY)),
        "write": answer_of(opened(os.O_WRONLY)),
        "empty": answer_of(lambda: os.truncate(secret, 0)),
        "empty by open": answer_of(opened(os.O_RDONLY | os.O_TRUNC)),
        "list": answer_of(lambda: os.listdir(folder)),
        "create": answer_of(opened(os.O_RDONLY)),
        "make": answer_of(lambda: os.mkdir(f"{folder}/new")),
        "remove": answer_of(lambda: os.unlink(secret)),
        "rename": answer_of(lambda: os.rename(secret, "mine")),
        "link": answer_of(lambda: os.link(secret, "mine")),
        "mode": answer_of(lambda: os.chmod(secret, 0o777)),
        "owner": answer_of(lambda: os.chown(secret, os.getuid(), os.getgid())),
        "attribute": answer_of(lambda: os.setxattr(secret, "user.x", b"1")),
        "run": answer_of(lambda: os.execv(secret, [secret])),
    }


def test_files_of_the_same_user_are_out_of_reach(run_inside, new_folder):
    folder = new_folder()
    secret = folder / "secret"
    secret.write_text("#!/bin/sh\n")
    secret.chmod(0o700)
    answers = run_inside(
        try_files, str(secret), str(folder), using=(answer_of, attempt_to_open), **LANDLOCK
    )
    answers["rename"] = answers["rename"].replace("EXDEV", "EACCES")
    answers["link"] = answers["link"].replace("EXDEV", "EACCES")
    assert {name: a for name, a in answers.items() if a not in REFUSED} == {}
    assert secret.read_text() == "#!/bin/sh\n"
    assert secret.stat().st_mode & 0o7777 == 0o700
    assert os.listdir(folder) == ["secret"]


def test_what_is_swapped_after_it_was_judged_is_still_what_may_be_used(
    sandbox, workdir, new_folder, monkeypatch
):
    """Rules name files: those that were opened before, whatever stands at their paths."""

    def look(other):
        import os

        own = answer_of(lambda: open("made", "w").close())
        return own, answer_of(lambda: os.listdir(other)), os.stat(".").st_ino

    victim, sub = new_folder(), workdir / "sub"
    (sub / "below").mkdir(parents=True)
    (victim / "below").mkdir()
    make_record = ledger.Ledger.make_record

    def swapped(start, site):
        sub.rename(workdir / "moved")
        sub.symlink_to(victim)
        return make_record(start, site)

    monkeypatch.setattr(ledger.Ledger, "make_record", swapped)
    with sandbox(workdir=sub, cwd=str(sub / "below"), **LANDLOCK) as box:
        own, other, here = box.call(look, str(victim), using=(answer_of,))
    assert (own, other) == ("None", "EACCES")
    assert here == os.stat(workdir / "moved/below").st_ino
    assert os.listdir(workdir / "moved/below") == ["made"]
    assert os.listdir(victim / "below") == []


def test_a_link_out_of_the_work_directory_leads_nowhere(run_inside, new_folder, workdir):
    secret = new_folder() / "secret"
    secret.write_text("s3cret")
    os.symlink(secret, workdir / "link")
    answer = run_inside(attempt_to_open, str(workdir / "link"), os.O_RDONLY, using=(), **LANDLOCK)
    assert answer == "EACCES"


def try_places():
    import os

    def first(path):
        if os.path.isdir(path):
            return f"{len(os.listdir(path))} names"
        return open(path, "rb").read(1)

    places = (
        "/", "/home", "/tmp", "/root", "/run", "/var", "/proc", "/sys", "/dev/shm", "/dev/pts",
        "/dev/ptmx", "/etc/passwd", "/etc/shadow", "/etc/hosts", f"/proc/{os.getppid()}/cmdline",
        f"/proc/{os.getppid()}/environ", "/proc/1/cmdline", "/proc/net/unix", "/proc/self/mounts",
    )  # fmt: skip
    return {path: answer_of(lambda path=path: first(path)) for path in places}


def test_the_rest_of_the_host_cannot_be_listed_or_read(run_inside):
    answers = run_inside(try_places, using=(answer_of,), **LANDLOCK)
    assert {path: a for path, a in answers.items() if a not in {*REFUSED, "ENOENT"}} == {}


def test_the_record_and_the_server_s_folder_are_out_of_reach(sandbox, runtime_dir):
    def attempt(folder):
        import os

        return [
            answer_of(lambda: os.listdir(folder)),
            answer_of(lambda: open(f"{folder}/record.json").read()),
            answer_of(lambda: open(f"{folder}/exit", "w")),
            answer_of(lambda: os.rename(f"{folder}/sockets", f"{folder}/x")),
            answer_of(lambda: os.symlink("/tmp/x", f"{folder}/sockets/s-1")),
        ]

    with sandbox(**LANDLOCK) as box:
        answers = box.call(attempt, str(box.handle.folder.path), using=(answer_of,))
    assert set(answers) == {"EACCES"}


def work():
    import os
    import subprocess
    import sys
    import tempfile

    with open("made", "w") as file:
        file.write("x")
    os.makedirs("a/b")
    os.rename("made", "a/b/made")
    os.fchmod(os.open("a/b/made", os.O_RDONLY), 0o750)
    with tempfile.NamedTemporaryFile("w") as file:
        file.write("x")
    with open(os.path.expanduser("~/note"), "w") as file:
        file.write("x")
    child = [sys.executable, "-c", "print(6 * 7)"]
    said = subprocess.run(child, capture_output=True, text=True, check=True).stdout
    return [said, open("/proc/self/status").read(5), open("/proc/meminfo").read(8), os.getcwd()]


def test_work_goes_on_in_the_work_directory_and_in_a_home_that_ends(sandbox, workdir):
    with sandbox(**LANDLOCK) as box:
        assert box.call(work) == ["42\n", "Name:", "MemTotal", str(workdir)]
        private = box.handle.folder.path / "private"
        assert (private / "home/note").read_text() == "x"
    assert not private.exists()
    assert (workdir / "a/b/made").read_text() == "x"


def test_what_the_kernel_made_unlistable_is_removed_too(sandbox, runtime_dir):
    def hide():
        import os

        os.makedirs(os.path.expanduser("~/a/b"))
        for path in ("~/a/b", "~/a", "~"):
            fd = os.open(os.path.expanduser(path), os.O_RDONLY)
            os.fchmod(fd, 0)

    with sandbox(**LANDLOCK) as box:
        box.call(hide)
    assert os.listdir(runtime_dir) == ["lock"]


def test_a_volume_is_where_it_is_and_read_only_unless_asked(run_inside, new_folder):
    def attempt(one, other):
        return [answer_of(lambda p=p: open(f"{p}/new", "w").close()) for p in (one, other)]

    one, other = str(new_folder()), str(new_folder())
    volumes = (Volume.parse(f"{one}:{one}"), Volume.parse(f"{other}:{other}:rw"))
    answers = run_inside(attempt, one, other, using=(answer_of,), volumes=volumes, **LANDLOCK)
    assert answers == ["EACCES", "None"]
    with pytest.raises(SpecError, match="has no mounts"):
        run_inside(attempt, volumes=(Volume.parse(f"{one}:/data"),), **LANDLOCK)


# -- sockets


def try_sockets(port, path, abstract):
    import socket

    def connect(family, kind, address):
        with socket.socket(family, kind) as s:
            s.connect(address)

    inet, unix = socket.AF_INET, socket.AF_UNIX
    stream, datagram = socket.SOCK_STREAM, socket.SOCK_DGRAM
    return [
        answer_of(lambda: connect(inet, stream, ("127.0.0.1", port))),
        answer_of(lambda: connect(socket.AF_INET6, stream, ("::1", port))),
        answer_of(lambda: connect(inet, datagram, ("127.0.0.1", port))),
        answer_of(lambda: connect(unix, stream, path)),
        answer_of(lambda: connect(unix, stream, "\0" + abstract)),
        answer_of(lambda: connect(unix, socket.SOCK_SEQPACKET, path)),
        answer_of(lambda: socket.socket(unix, datagram)),
        answer_of(lambda: socket.socketpair(unix, datagram)),
        answer_of(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)),
    ]


def test_nobody_on_the_host_can_be_talked_to(run_inside, new_folder):
    with contextlib.ExitStack() as stack:

        def listen(family, address):
            listener = stack.enter_context(socket.socket(family))
            listener.bind(address)
            listener.listen()
            return listener.getsockname()

        port = listen(socket.AF_INET, ("127.0.0.1", 0))[1]
        path = listen(socket.AF_UNIX, str(new_folder() / "s"))
        name = f"sbx-{os.getpid()}"
        listen(socket.AF_UNIX, f"\0{name}")
        answers = run_inside(try_sockets, port, path, name, using=(answer_of,), **LANDLOCK)
    no_family = "EAFNOSUPPORT"
    assert answers == [
        *(no_family, no_family, no_family, "EACCES", "EACCES", "EACCES"),
        *(no_family, no_family, "ENOTSUP"),
    ]


# -- processes


@signals_are_kept_back
def test_no_process_outside_can_be_signalled(sandbox):
    def attempt(pids):
        import os
        import signal

        answers = {answer_of(lambda pid=pid: os.kill(pid, 0)) for pid in pids}
        for pid in pids:
            fd = os.pidfd_open(pid)
            answers.add(answer_of(lambda fd=fd: signal.pidfd_send_signal(fd, 9)))
        return sorted(answers)

    with sandbox(**LANDLOCK) as box, subprocess.Popen(["sleep", "1000"]) as other:
        try:
            pids = [os.getpid(), other.pid, box.handle.pid]
            assert box.call(attempt, pids, using=(answer_of,)) == ["EPERM"]
            assert other.poll() is None
        finally:
            other.kill()


def test_no_process_outside_can_be_hampered_or_looked_into(sandbox):
    def attempt(pid, calls):
        import os
        import resource

        limit = (1, 1)
        return {
            "limits": answer_of(lambda: resource.prlimit(pid, resource.RLIMIT_CPU, limit)),
            "cpus": answer_of(lambda: os.sched_setaffinity(pid, {0})),
            "idle": answer_of(lambda: os.sched_setscheduler(pid, 5, os.sched_param(0))),
            "nice": answer_of(lambda: os.setpriority(os.PRIO_PROCESS, pid, 19)),
            "nice to all": answer_of(lambda: os.setpriority(os.PRIO_USER, 0, 19)),
            "memory": answer_of(lambda: open(f"/proc/{pid}/mem", "rb")),
            "files": answer_of(lambda: os.listdir(f"/proc/{pid}/fd")),
            "trace": system_call(calls["ptrace"], 16, pid, 0, 0),
            "descriptor": system_call(calls["pidfd_getfd"], 0, 0, 0),
        }

    calls = {name: number_of(name) for name in ("ptrace", "pidfd_getfd")}
    with sandbox(**LANDLOCK) as box:
        answers = box.call(attempt, os.getpid(), calls, using=(answer_of, system_call))
    assert {name: a for name, a in answers.items() if a not in REFUSED} == {}


def test_the_host_s_queues_and_shared_memory_do_not_exist(run_inside):
    calls = ("shmget", "semget", "msgget", "mq_open", "inotify_init1", "io_setup", "clone3")

    def attempt(numbers):
        return {name: system_call(number, 0, 0, 0) for name, number in numbers.items()}

    numbers = {name: number_of(name) for name in calls}
    answers = run_inside(attempt, numbers, using=(system_call,), **LANDLOCK)
    assert set(answers.values()) == {"ENOSYS"}


def test_system_calls_that_attack_the_linux_kernel_are_refused(run_inside):
    calls = (
        "unshare", "setns", "mount", "bpf", "io_uring_setup", "perf_event_open", "userfaultfd",
        "keyctl", "add_key", "chroot", "process_vm_readv", "open_by_handle_at", "connect",
    )  # fmt: skip

    def attempt(numbers):
        return {name: system_call(number, 0, 0, 0, 0) for name, number in numbers.items()}

    numbers = {name: number_of(name) for name in calls}
    answers = run_inside(attempt, numbers, using=(system_call,), **LANDLOCK)
    assert {name: a for name, a in answers.items() if a not in {*REFUSED, "ENOSYS"}} == {}


def test_no_right_is_left_and_none_can_be_gained(run_inside):
    def attempt():
        import os

        text = open("/proc/self/status").read()
        status = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
        names = ("CapPrm", "CapEff", "CapInh", "CapAmb", "NoNewPrivs", "Seccomp")
        with open("f", "w") as file:
            modes = [answer_of(lambda m=m: os.fchmod(file.fileno(), m)) for m in (0o4755, 0o777)]
            modes.append(answer_of(lambda: os.fchmod(file.fileno(), 0o755)))
        return [status[name] for name in names], modes

    rights, modes = run_inside(attempt, using=(answer_of,), **LANDLOCK)
    assert rights == [*["0" * 16] * 4, "1", "2"]
    assert modes == ["EPERM", "EPERM", "None"]


def test_nothing_of_the_server_s_is_inherited(run_inside):
    def look():
        import os

        return dict(os.environ), sorted(os.listdir("/proc/self/fd")), os.getsid(0) == os.getpid()

    environment = {**os.environ, "TOKEN": "s3cret"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKEN", "s3cret")
        seen, descriptors, leads = run_inside(look, environment=environment, **LANDLOCK)
    assert "TOKEN" not in seen
    assert seen["HOME"].endswith("/private/home")
    assert seen["TMPDIR"].endswith("/private/tmp")
    assert len(descriptors) == 4  # three, and the one that lists them
    assert leads


# -- caps


def bomb():
    import os
    import time

    made = 0
    while True:
        try:
            if os.fork() == 0:
                time.sleep(1000)
        except OSError:
            return made
        made += 1


def test_a_fork_bomb_is_bounded_and_ends_with_the_sandbox(sandbox, workdir):
    limits = Limits(pids=20)
    with sandbox(limits=limits, on_missing=WAIVED, **LANDLOCK) as box:
        # The limit counts all of a user's processes, and others may come and go meanwhile.
        assert 5 <= box.call(bomb) <= 40
    assert not processes_in(workdir)


def test_a_bomb_that_goes_on_is_ended_too(sandbox, workdir):
    def go_on():
        import os

        for _ in range(3):
            if os.fork() == 0:
                while True:
                    try:
                        os.setsid() if os.getsid(0) != os.getpid() else None
                        os.fork()
                    except OSError:
                        pass
        return True

    with sandbox(limits=Limits(pids=40), on_missing=WAIVED, **LANDLOCK) as box:
        assert box.call(go_on)
        assert len(processes_in(workdir)) > 3
    assert not processes_in(workdir)


def test_a_cap_that_cannot_be_had_is_refused(run_inside, monkeypatch):
    nothing = CgroupFacts(version=0, bases={}, missing={"pids": "nobody may write there"})
    monkeypatch.setattr("sandbox_provisioner.host.survey", lambda: nothing)
    with pytest.raises(HostError, match="cap processes"):
        run_inside(work, limits=Limits(pids=100), **LANDLOCK)


def processes_in(folder):
    """The processes that work in *folder*, the dead left out."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{name}/cwd").startswith(str(folder)):
                found.append(Path(f"/proc/{name}/status").read_text())
    return [status for status in found if "State:\tZ" not in status]


# -- the end


def leave_others():
    import subprocess
    import sys

    daemon = "import os, time; os.fork() and os._exit(0); os.setsid(); time.sleep(1000)"
    deaf = "trap '' TERM INT HUP; sleep 1000"
    subprocess.run([sys.executable, "-c", daemon], check=True)
    subprocess.Popen(["sh", "-c", deaf], start_new_session=True)


@pytest.mark.parametrize("way", ["close", "kill", "exit"])
def test_whatever_the_kernel_started_ends_with_it(sandbox, workdir, way):
    with sandbox(**LANDLOCK) as box:
        box.call(leave_others)
        assert len(processes_in(workdir)) >= 3
        if way == "kill":
            box.handle.kill()
            assert box.wait().signal == signal.SIGKILL
            assert not processes_in(workdir)
        elif way == "exit":
            assert box.finish().code == 0
            assert not processes_in(workdir)
    assert not processes_in(workdir)


def hide(number):
    import ctypes
    import os
    import signal
    import time

    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # one of those below ends with it
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    libc.prctl(1, 0, 0, 0, 0)  # no more PR_SET_PDEATHSIG
    for flags in (0, 0x8000, 0x8000 | 17, 10):  # no exit signal, CLONE_PARENT, SIGUSR1
        if libc.syscall(number, ctypes.c_ulong(flags), None, None, None, None) == 0:
            os.setsid()
            if os.fork():
                os._exit(0)
            time.sleep(1000)
    return True


def test_nobody_hides_from_the_end(sandbox, workdir):
    with sandbox(**LANDLOCK) as box:
        assert box.call(hide, number_of("clone"))
    assert not processes_in(workdir)


def test_the_kernel_ends_when_its_init_was_killed(sandbox):
    with sandbox(**LANDLOCK) as box:
        kernel = box.call(own_pid)
        pidfd = os.pidfd_open(kernel)
        os.kill(box.handle.pid, signal.SIGKILL)
        assert select.select([pidfd], [], [], 10)[0]
        os.close(pidfd)


def own_pid():
    import os

    return os.getpid()


SERVER = """
import sys
import boxes
from sandbox_provisioner.launch import LocalLauncher
from sandbox_provisioner.spec import Confinement
request = boxes.request_for(sys.argv[2], confinement=Confinement.LANDLOCK)
box = boxes.start(LocalLauncher(runtime_dir=sys.argv[1]), request)
print(box.handle.pid, flush=True)
sys.stdin.read()
"""


def test_everything_ends_with_a_server_that_is_killed(runtime_dir, workdir, watch):
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(runtime_dir), str(workdir)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with server:
        pidfd = os.pidfd_open(int(server.stdout.readline()))
        ((_, record),) = records.all_records(runtime_dir)
        assert record.confinement == "landlock"
        watch.expect_gone(record, runtime_dir)
        server.kill()
        assert select.select([pidfd], [], [], 10)[0]
        os.close(pidfd)
    assert sweep(runtime_dir) == [record.sandbox_id]
    assert os.listdir(runtime_dir) == ["lock"]
    assert not processes_in(workdir)


@pytest.mark.parametrize(
    "step", sorted({*(v.__name__.replace("_", "-") for v in VERBS), "fork-kernel", "execute"})
)
def test_a_step_that_fails_leaves_nothing(sandbox, monkeypatch, step, runtime_dir, workdir):
    monkeypatch.setenv("SANDBOX_FAIL_AT", step)
    with (
        pytest.raises(LaunchError, match=rf"\[{step}( [^]]+)?\].*made to fail"),
        sandbox(**LANDLOCK),
    ):
        pass
    assert os.listdir(runtime_dir) == ["lock"]
    assert not processes_in(workdir)


# -- refusals


def test_a_work_directory_that_would_need_covers_is_refused(sandbox, workdir, monkeypatch):
    monkeypatch.setenv("HOME", str(workdir))
    with pytest.raises(SpecError, match="Use a directory below it"), sandbox(**LANDLOCK):
        pass
    monkeypatch.undo()
    (workdir / ".git").mkdir()
    with pytest.raises(SpecError, match="hooks"), sandbox(**LANDLOCK):
        pass
    below = workdir / "below"
    below.mkdir()
    with sandbox(workdir=below, **LANDLOCK) as box:
        assert run(box.handle.close()) is None


def test_a_server_s_own_directory_is_refused(sandbox, workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    with pytest.raises(SpecError, match="node_modules"), sandbox(**LANDLOCK):
        pass


@pytest.mark.parametrize("version", [1, 2, 3, 4, 5])
def test_an_older_landlock_keeps_files_too(run_inside, monkeypatch, new_folder, version):
    folder = new_folder()
    secret = folder / "secret"
    secret.write_text("s3cret")
    monkeypatch.setattr("sandbox_provisioner.host.landlock_version", lambda: version)
    names = ("read", "write", "empty", "empty by open", "list", "remove")
    answers = run_inside(
        try_files, str(secret), str(folder), using=(answer_of, attempt_to_open), **LANDLOCK
    )
    assert {answers[name] for name in names} <= REFUSED
    assert secret.read_text() == "s3cret"


def test_without_landlock_the_start_is_refused(run_inside, monkeypatch):
    monkeypatch.setattr("sandbox_provisioner.host.landlock_version", lambda: 0)
    with pytest.raises(HostError, match="CONFIG_SECURITY_LANDLOCK"):
        run_inside(work, **LANDLOCK)
