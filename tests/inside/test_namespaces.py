"""Attempted escapes: through what a process can see of others, or share with them."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest
from probes import answer_of, children_of, number_of, system_call

pytestmark = pytest.mark.requires("userns")

KINDS = ("mnt", "pid", "net", "ipc", "uts", "user", "cgroup")


def namespaces():
    import os

    return {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in os.listdir("/proc/self/ns")}


@pytest.fixture
def two_boxes(sandbox, new_folder):
    with sandbox() as one, sandbox(workdir=new_folder()) as other:
        yield one, other


def test_every_namespace_is_another_than_the_hosts(run_inside):
    inside, here = run_inside(namespaces), namespaces()
    assert [kind for kind in KINDS if inside[kind] == here[kind]] == []


def test_two_sandboxes_share_no_namespace(two_boxes):
    one, other = (box.call(namespaces) for box in two_boxes)
    assert [kind for kind in KINDS if one[kind] == other[kind]] == []


# -- processes


def test_only_its_own_processes_are_visible(run_inside):
    def processes():
        import os

        return [name for name in os.listdir("/proc") if name.isdecimal()]

    assert run_inside(processes) == ["1", "2"]


def test_a_pid_of_the_host_means_nothing_inside(run_inside):
    def signal_it(pid):
        import os

        os.kill(pid, 0)

    assert os.getpid() > 2
    with pytest.raises(ProcessLookupError):
        run_inside(signal_it, os.getpid())


@pytest.mark.requires("root")
def test_pid_1_cannot_be_signalled(run_inside):
    def signal_it():
        import os
        import signal

        numbers = (0, signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, signal.SIGRTMIN)
        return [answer_of(lambda n=number: os.kill(1, n)) for number in numbers]

    assert run_inside(signal_it, using=(answer_of,)) == ["EPERM"] * 5


def test_pid_1_outlives_every_signal_that_the_kernel_sends_it(sandbox):
    def signal_it():
        import contextlib
        import os
        import signal

        # SIGHUP, SIGINT, SIGTERM and what stands for a signal are meant for the kernel.
        relayed = {1, 2, 15, 17, *range(34, 65)}
        for number in set(range(1, signal.NSIG)) - relayed - {32, 33}:
            with contextlib.suppress(PermissionError):
                os.kill(1, number)

    def still_here():
        import os

        return os.path.exists("/proc/1/status")

    with sandbox() as box:
        box.call(signal_it)
        assert box.call(still_here)
        assert box.finish().code == 0


def test_pid_1_shows_neither_its_memory_nor_its_descriptors_nor_its_program(run_inside):
    def look():
        import os

        def opening(name, flags=os.O_RDONLY):
            return answer_of(lambda: os.open(f"/proc/1/{name}", flags))

        names = ("mem", "environ", "maps", "auxv", "stack", "syscall", "io", "pagemap", "exe")
        answers = {name: opening(name) for name in names}
        answers["mem, to write"] = opening("mem", os.O_RDWR)
        answers["exe, to write"] = opening("exe", os.O_RDWR)
        answers["fd"] = answer_of(lambda: os.listdir("/proc/1/fd"))
        answers["root"] = answer_of(lambda: os.listdir("/proc/1/root/"))
        answers["cwd"] = answer_of(lambda: os.readlink("/proc/1/cwd"))
        answers["ns"] = answer_of(lambda: os.readlink("/proc/1/ns/mnt"))
        return {name: answer for name, answer in answers.items() if answer != "ENOENT"}

    found = run_inside(look, using=(answer_of,))
    assert set(found.values()) <= {"EACCES", "EPERM"}, found


def test_pid_1_cannot_be_traced(run_inside):
    def attempt(calls):
        ptrace, read, write, get_fd = calls
        attach, seize = 16, 0x4206
        return [
            system_call(ptrace, attach, 1, 0, 0),
            system_call(ptrace, seize, 1, 0, 0),
            system_call(read, 1, 0, 0, 0, 0, 0),
            system_call(write, 1, 0, 0, 0, 0, 0),
            system_call(get_fd, 0, 0, 0),
        ]

    names = ("ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd")
    answers = run_inside(attempt, [number_of(name) for name in names], using=(system_call,))
    assert set(answers) <= {"EPERM", "ENOSYS"}, answers


def test_a_daemon_that_ignores_signals_is_gone_when_the_sandbox_is_closed(sandbox, workdir):
    def make_daemon():
        import contextlib
        import os
        import signal

        asked, told = os.pipe()
        parent = os.fork()
        if parent == 0:
            os.setsid()
            if os.fork() == 0:
                for number in range(1, signal.NSIG):
                    with contextlib.suppress(OSError, ValueError):
                        signal.signal(number, signal.SIG_IGN)
                os.write(told, b"%d" % os.getpid())
                for fd in (0, 1, 2, asked, told):
                    os.close(fd)
                while True:
                    signal.pause()
            os._exit(0)
        os.waitpid(parent, 0)  # from then on PID 1 is the daemon's parent
        return int(os.read(asked, 16))

    with sandbox() as box:
        pid = box.call(make_daemon)
        outside = next(p for p in children_of(box.handle.pid) if inside_pid(p) == pid)
        pidfd = os.pidfd_open(outside)
    try:
        with pytest.raises(ProcessLookupError):
            os.kill(outside, 0)
    finally:
        os.close(pidfd)


def inside_pid(pid):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("NSpid:")).split()[-1])


# -- descriptors


def open_descriptors():
    import os

    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
    return sorted(found.items())


@pytest.mark.parametrize("pump", [True, False])
def test_only_stdin_stdout_and_stderr_are_open(sandbox, pump, workdir):
    script = (
        "import os; fds = [f for f in os.listdir('/proc/self/fd')"
        " if os.path.lexists(f'/proc/self/fd/{f}')]; print(sorted(fds))"
    )
    with sandbox([sys.executable, "-SIc", script], pump=pump) as box:
        assert box.readline() == b"['0', '1', '2']\n"


def test_a_descriptor_that_the_server_leaks_does_not_arrive(sandbox, tmp_path):
    folder = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(folder, True)
    try:
        with sandbox() as box:
            assert [fd for fd, _ in box.call(open_descriptors)] == [0, 1, 2]
    finally:
        os.close(folder)


def test_no_descriptor_leads_to_a_namespace_or_a_directory_of_the_host(run_inside):
    assert {target.partition(":")[0] for _, target in run_inside(open_descriptors)} <= {
        "pipe",
        "/dev/null",
        os.readlink("/proc/self/fd/2"),
    }


# -- sockets, shared memory, names


def test_abstract_sockets_of_the_host_cannot_be_reached(run_inside):
    def connect(name):
        import socket

        with socket.socket(socket.AF_UNIX) as one:
            one.connect("\0" + name)

    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0sbx-test")
        server.listen()
        with pytest.raises(ConnectionRefusedError):
            run_inside(connect, "sbx-test")


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_server_on_the_hosts_loopback_cannot_be_reached(run_inside, address):
    def connect(address, port):
        import socket

        socket.create_connection((address, port), 5).close()

    with socket.create_server((address, 0), family=_family(address)) as server:
        with pytest.raises(OSError, match=r"refused|unreachable|Cannot assign"):
            run_inside(connect, address, server.getsockname()[1])


def _family(address):
    return socket.AF_INET6 if ":" in address else socket.AF_INET


@pytest.mark.parametrize("address", ["169.254.169.254", "1.1.1.1", "10.0.0.1", "fd00:ec2::254"])
def test_no_address_but_the_own_loopback_has_a_route(run_inside, address):
    def connect(address):
        import socket

        socket.create_connection((address, 80), 5).close()

    with pytest.raises(OSError, match=r"unreachable|Cannot assign"):
        run_inside(connect, address)


def test_the_only_interface_is_a_loopback_that_works(run_inside):
    def interfaces():
        import socket

        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), 5).close()
        return [name for _, name in socket.if_nameindex()]

    assert run_inside(interfaces) == ["lo"]


def test_system_v_shared_memory_is_not_shared(two_boxes):
    def make_segment(number):
        import ctypes

        create = 0o1000 | 0o666
        return ctypes.CDLL(None).shmget(number, 4096, create) >= 0

    def find_segment(number):
        import ctypes

        return ctypes.CDLL(None).shmget(number, 4096, 0) >= 0

    one, other = two_boxes
    assert one.call(make_segment, 4711)
    assert one.call(find_segment, 4711)
    assert not other.call(find_segment, 4711)


def test_posix_message_queues_are_not_shared(two_boxes):
    def open_queue(flags):
        import ctypes
        import os

        libc = ctypes.CDLL("librt.so.1", use_errno=True)
        if libc.mq_open(b"/sbx", os.O_RDWR | flags, 0o666, None) >= 0:
            return "open"
        return os.strerror(ctypes.get_errno())

    one, other = two_boxes
    assert one.call(open_queue, os.O_CREAT) == "open"
    assert other.call(open_queue, 0) == "No such file or directory"


def test_abstract_sockets_and_dev_shm_are_not_shared(two_boxes):
    def leave():
        import socket

        global kept
        kept = socket.socket(socket.AF_UNIX)
        kept.bind("\0between")
        kept.listen()
        open("/dev/shm/between", "w").close()

    def find():
        import os
        import socket

        with socket.socket(socket.AF_UNIX) as one:
            return one.connect_ex("\0between"), os.listdir("/dev/shm")

    one, other = two_boxes
    one.call(leave)
    assert other.call(find) == [111, []]


def test_a_file_lock_does_not_reach_another_sandbox(two_boxes):
    """A lock on a file that both may read would be a channel between two who must not talk."""

    def lock(path):
        import fcntl

        global held
        held = open(path)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "held by somebody"
        return "locked"

    one, other = two_boxes
    assert one.call(lock, "/etc/passwd") == "locked"
    assert other.call(lock, "/etc/passwd") == "locked"


def test_the_host_name_is_the_sandboxes_own_and_cannot_be_changed(run_inside):
    def rename():
        import socket

        name = socket.gethostname()
        return name, answer_of(lambda: socket.sethostname("evil"))

    assert run_inside(rename, using=(answer_of,)) == ["sandbox", "EPERM"]


def test_no_terminal_of_the_server_comes_along(run_inside):
    def look():
        import os

        return os.getsid(0) == os.getpid(), answer_of(lambda: os.open("/dev/tty", os.O_RDWR))

    assert run_inside(look, using=(answer_of,)) == [True, "ENXIO"]


def test_nothing_can_be_typed_into_a_terminal(run_inside):
    def type_it():
        import fcntl
        import os
        import termios

        _, terminal = os.openpty()
        requests = {"TIOCSTI": termios.TIOCSTI, "TIOCLINUX": 0x541C}
        return {
            name: answer_of(lambda r=request: fcntl.ioctl(terminal, r, b"x"))
            for name, request in requests.items()
        }

    answers = run_inside(type_it, using=(answer_of,))
    assert set(answers.values()) == {"EPERM"}


def test_the_first_process_tells_nothing_of_the_host(run_inside):
    def look():
        import os

        def text_of(name):
            try:
                with open(f"/proc/1/{name}", "rb") as file:
                    return file.read().decode("latin-1")
            except OSError as error:
                return error.strerror

        def link_of(name):
            try:
                return os.readlink(f"/proc/1/{name}")
            except OSError as error:
                return error.strerror

        texts = {name: text_of(name) for name in ("cmdline", "environ", "maps", "auxv", "stack")}
        return texts, {name: link_of(name) for name in ("exe", "cwd", "root", "fd/0", "ns/mnt")}

    texts, links = run_inside(look)
    assert texts.pop("cmdline").rstrip("\0") == "sandbox-init"
    refused = {"Permission denied", "Operation not permitted", "", "No such file or directory"}
    assert set(texts.values()) | set(links.values()) <= refused
