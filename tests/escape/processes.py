"""processes.py - inside: processes of the host, rights and namespaces that a process may have."""

from __future__ import annotations

import ctypes
import os
import signal

from frame import Kind, attempt
from tools import (
    SECRET,
    call,
    closed,
    contextlib,
    done,
    fcntl,
    opened,
    read,
    socket,
    status,
    struct,
)  # fmt: skip

NEW = {
    "user": 0x10000000,
    "mount": 0x00020000,
    "pid": 0x20000000,
    "network": 0x40000000,
    "ipc": 0x08000000,
    "uts": 0x04000000,
    "cgroup": 0x02000000,
    "time": 0x00000080,
}

# -- others


@attempt(
    70, "find a process of the host in /proc", Kind.PROCESSES, "the PID namespace",
    expect="not seen", landlock="EACCES", control="seen",
)  # fmt: skip
def find_process(host):
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if open(f"/proc/{name}/cmdline", "rb").read() == b"sleep\0" + b"1000\0":
                return "seen"
    return "not seen"


@attempt(
    71, "signal a process of the host", Kind.PROCESSES, "kill(2)",
    expect="ESRCH", landlock="EPERM", unscoped="done", control="done",
)  # fmt: skip
def signal_process(host):
    return os.kill(host.pid, 0)


@attempt(
    72, "signal the server", Kind.PROCESSES, "kill(2)",
    expect="ESRCH", landlock="EPERM", unscoped="done", control="done",
)  # fmt: skip
def signal_server(host):
    return os.kill(host.server, 0)


@attempt(
    73, "send a process of the host a signal with a value", Kind.PROCESSES, "rt_sigqueueinfo(2)",
    expect="ESRCH", landlock="EPERM", unscoped="done", control="done",
)  # fmt: skip
def queue_signal(host):
    information = ctypes.create_string_buffer(128)
    information[8:12] = (-1).to_bytes(4, "little", signed=True)
    return done("rt_sigqueueinfo", host.pid, 0, information)


@attempt(
    74, "take a pidfd of a process of the host, and signal it", Kind.PROCESSES, "pidfd_open(2)",
    expect="ESRCH", landlock="EPERM", unscoped="done", control="done",
)  # fmt: skip
def signal_by_pidfd(host):
    return signal.pidfd_send_signal(os.pidfd_open(host.pid), 0)


@attempt(
    75, "trace a process of the host", Kind.PROCESSES, "ptrace(2), CVE-2019-13272",
    expect="EPERM", control="done",
)  # fmt: skip
def trace(host):
    return done("ptrace", 0x4206, host.pid, 0, 0)  # PTRACE_SEIZE


@attempt(
    76, "have oneself traced", Kind.PROCESSES, "PTRACE_TRACEME", expect="EPERM", control="done"
)
def be_traced(host):
    return done("ptrace", 0, 0, 0, 0)


for number, name in ((77, "process_vm_readv"), (78, "process_vm_writev")):

    @attempt(
        number, f"reach the memory of a process by {name}(2)", Kind.PROCESSES, "ptrace(2)", name,
        expect="EPERM", control="done",
    )  # fmt: skip
    def reach_memory(host, name):
        return done(name, host.pid, None, 0, None, 0, 0)


@attempt(
    79, "take a descriptor of another process", Kind.PROCESSES, "pidfd_getfd(2)",
    expect="EPERM", control="done",
)  # fmt: skip
def take_descriptor(host):
    return closed("pidfd_getfd", os.pidfd_open(1 if host.boxed else host.pid), 1, 0)


@attempt(
    80, "compare descriptors with another process", Kind.PROCESSES, "kcmp(2)",
    expect="EPERM", control="done",
)  # fmt: skip
def compare(host):
    return done("kcmp", os.getpid(), 1 if host.boxed else host.pid, 1, 0, 0)


for number, name, control in (
    (81, "environ", "opened"),
    (82, "mem", "opened"),
    (83, "maps", "opened"),
    (84, "ns/net", "opened"),
    (85, "io", "opened"),
    (86, "stack", "opened"),
    (87, "syscall", "opened"),
):

    @attempt(
        number, f"open /proc/1/{name}, where PID 1 is the watcher", Kind.PROCESSES, "proc(5)",
        name, expect="EACCES", control=control,
    )  # fmt: skip
    def open_of_init(host, name):
        return opened(f"/proc/{1 if host.boxed else host.pid}/{name}")


@attempt(
    88, "read the environment of a process of the host", Kind.PROCESSES, "proc(5)",
    expect="ENOENT", landlock="EACCES", control="there",
)  # fmt: skip
def read_environment_of(host):
    return "there" if SECRET in read(f"/proc/{host.pid}/environ") else "not there"


@attempt(
    89, "kill PID 1, the watcher", Kind.PROCESSES, "kill(2)",
    expect="EPERM", user="sent", control="sent",
)  # fmt: skip
def kill_init(host):
    """As PID 1 of a namespace it gets no signal that it does not wait for (pid_namespaces(7))."""
    os.kill(1 if host.boxed else host.pid, signal.SIGKILL if host.boxed else 0)
    return "sent"


@attempt(
    90, "lower the limits of PID 1, so that it cannot tell how the kernel ended", Kind.PROCESSES,
    "prlimit(2)", expect="EPERM", control="done",
)  # fmt: skip
def limit_init(host):
    limits = ctypes.create_string_buffer(bytes(16))
    return done("prlimit64", 1 if host.boxed else host.pid, 1, limits, None)  # RLIMIT_FSIZE


@attempt(
    91, "take the priority from PID 1", Kind.PROCESSES, "setpriority(2)",
    expect="EPERM", user="EPERM", control="done",
)  # fmt: skip
def slow_init(host):
    return os.setpriority(os.PRIO_PROCESS, 1 if host.boxed else host.pid, 19 if host.boxed else 0)


@attempt(
    92, "put all processes of one's user id behind", Kind.PROCESSES, "setpriority(PRIO_USER)",
    expect="others are as they were", control="others too",
    after=lambda host: "others too" if os.getpriority(0, host.pid) else "others are as they were",
)  # fmt: skip
def slow_user(host):
    """Without the box only for the one process: the machine has more of root's."""
    os.setpriority(
        os.PRIO_USER if host.boxed else os.PRIO_PROCESS, 0 if host.boxed else host.pid, 5
    )
    return "others too"


@attempt(
    93, "bind PID 1 to one CPU", Kind.PROCESSES, "sched_setaffinity(2)",
    expect="EPERM", control="done",
)  # fmt: skip
def bind_init(host):
    return os.sched_setaffinity(1 if host.boxed else host.pid, {0, 1} if not host.boxed else {0})


# -- rights


@attempt(
    100, "become root", Kind.PRIVILEGES, "setresuid(2)", expect="EPERM", user="EINVAL",
    landlock="EPERM", control="done",
)  # fmt: skip
def become_root(host):
    return os.setresuid(0, 0, 0)


@attempt(
    101, "join the group of root", Kind.PRIVILEGES, "setgroups(2)", expect="EPERM", control="done"
)
def join_root(host):
    return os.setgroups([0])


@attempt(102, "take capabilities", Kind.PRIVILEGES, "capset(2)", expect="EPERM", control="done")
def take_capabilities(host):
    header = (0x20080522).to_bytes(4, "little") + bytes(4)
    return done("capset", header, (0xFF).to_bytes(4, "little") * 2 + bytes(16))


for number, field, expect, control in (
    (103, "CapPrm", "0000000000000000", "some"),
    (104, "CapBnd", "0000000000000000", "some"),
    (105, "CapAmb", "0000000000000000", None),
    (106, "NoNewPrivs", "1", "0"),
    (107, "Seccomp", "2", "0"),
    (108, "Groups", "", "some"),
):

    @attempt(
        number, f"find {field} in one's status otherwise than “{expect}”", Kind.PRIVILEGES,
        "credentials(7)", field, expect=expect or "nothing",
        control=control or "", no_control="" if control else "no process has any as a rule",
        landlock=None,
        **({"user": None} if field == "Groups" else {}),
    )  # fmt: skip
    def look_at_status(host, field):
        answer = status(field)
        return answer or "nothing" if host.boxed or answer == "0" else "some"


@attempt(109, "raise one's priority", Kind.PRIVILEGES, "nice(2)", expect="EPERM", control="-1")
def raise_priority(host):
    return os.nice(-1)


@attempt(
    110, "run in real time", Kind.PRIVILEGES, "sched_setscheduler(2)", expect="EPERM",
    control="done", no_control="",
)  # fmt: skip
def run_in_real_time(host):
    return os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


@attempt(
    111, "have the disk first", Kind.PRIVILEGES, "ioprio_set(2)", expect="EPERM", control="done"
)
def have_the_disk_first(host):
    return done("ioprio_set", 1, 0, 1 << 13)


@attempt(
    113, "answer one's own calls with a filter's listener", Kind.PRIVILEGES, "seccomp(2)",
    expect="EPERM", control="done",
)  # fmt: skip
def listen_to_filter(host):
    statement = ctypes.create_string_buffer(bytes.fromhex("060000000000ff7f"), 8)
    program = (1).to_bytes(8, "little") + ctypes.addressof(statement).to_bytes(8, "little")
    return closed("seccomp", 1, 8, program)


@attempt(
    114, "forge who sends a message", Kind.PRIVILEGES, "SCM_CREDENTIALS", expect="EPERM",
    control="sent", user="EINVAL|EPERM",
)  # fmt: skip
def forge_sender(host):
    one, _ = socket.socketpair()
    words = struct.pack("iii", os.getpid(), 4242, 4242)
    one.sendmsg([b"x"], [(socket.SOL_SOCKET, 2, words)])
    return "sent"


for number, name, words in (
    (115, "PR_SET_MM", (35, 15, bytes(8), 0, 0)),
    (116, "PR_SCHED_CORE", (62, 1, 0, 0, 0)),
    (117, "PR_SET_MEMORY_MERGE", (67, 0, 0, 0, 0)),
):

    @attempt(
        number, f"prctl({name})", Kind.CALLS, "prctl(2)", list(words), expect="EPERM",
        control="EINVAL" if name == "PR_SCHED_CORE" else "done",
    )  # fmt: skip
    def control_process(host, words):
        return done("prctl", *words)


# -- namespaces

for number, (name, flag) in enumerate(NEW.items(), 120):

    @attempt(
        number, f"make a new {name} namespace", Kind.NAMESPACES,
        "unshare(2): CVE-2022-0185, CVE-2023-32233, CVE-2024-1086 begin so", flag,
        expect="EPERM", control="done",
    )  # fmt: skip
    def unshare(host, flag):
        return done("unshare", flag)


@attempt(
    128, "make a new user namespace with a child", Kind.NAMESPACES, "clone(2)",
    expect="EPERM", control="done",
)  # fmt: skip
def clone_user(host):
    pid = call("clone", 0x10000000 | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return "done"


@attempt(
    129, "make a new user namespace with clone3(2), whose flags are behind a pointer",
    Kind.NAMESPACES, "what a filter cannot see", expect="ENOSYS", control="done",
)  # fmt: skip
def clone3_user(host):
    words = (0x10000000, 0, 0, 0, signal.SIGCHLD, 0, 0, 0)
    text = b"".join(word.to_bytes(8, "little") for word in words)
    pid = call(435, text, len(text))
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return "done"


@attempt(
    130, "join a namespace by its file", Kind.NAMESPACES, "setns(2)", expect="EPERM",
    control="done",
)  # fmt: skip
def join_by_file(host):
    fd = os.open("/proc/self/ns/uts", os.O_RDONLY)
    return done("setns", fd, 0)


@attempt(
    131, "join the namespaces of PID 1 by a pidfd", Kind.NAMESPACES, "setns(2)",
    expect="EPERM", control="done",
)  # fmt: skip
def join_by_pidfd(host):
    return done("setns", os.pidfd_open(1 if host.boxed else os.getpid()), 0x04000000)


@attempt(
    132, "learn of namespaces around this one by ioctl", Kind.NAMESPACES, "ioctl_ns(2)",
    expect="EPERM", control="done",
)  # fmt: skip
def ask_for_parent(host):
    fd = os.open("/proc/self/ns/pid", os.O_RDONLY)
    return fcntl.ioctl(fd, 0xB701) and "done"  # NS_GET_USERNS


@attempt(
    133, "find one's user id to be root's outside", Kind.NAMESPACES, "user_namespaces(7)",
    expect="not root's", landlock=None, control="root's",
)  # fmt: skip
def look_at_map(host):
    inside = os.getuid()
    for line in open("/proc/self/uid_map"):
        first, outside, count = map(int, line.split())
        if first <= inside < first + count and outside + inside - first == 0:
            return "root's"
    return "not root's"
