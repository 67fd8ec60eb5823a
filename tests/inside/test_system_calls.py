"""Attempted escapes: through what a process may ask the Linux kernel for."""

from __future__ import annotations

import os

import pytest
from probes import answer_of, number_of, system_call

from sandbox_provisioner.facilities.rights.plan.syscall_numbers import NUMBERS

pytestmark = pytest.mark.requires("userns")

REFUSED = {"EPERM", "ENOSYS"}
CLONE_FLAGS = {
    "mount": 0x00020000, "cgroup": 0x02000000, "uts": 0x04000000, "ipc": 0x08000000,
    "user": 0x10000000, "pid": 0x20000000, "net": 0x40000000,
}  # fmt: skip

# Each with arguments that the Linux kernel would at least look at.
CALLS = {
    "io_uring_setup": (8, 0), "io_uring_enter": (0, 0, 0, 0, 0, 0), "io_uring_register": (0, 0),
    "bpf": (0, 0, 0), "perf_event_open": (0, 0, 0, 0, 0), "userfaultfd": (0,),
    "add_key": (0, 0, 0, 0, 0), "request_key": (0, 0, 0, 0), "keyctl": (0, 0),
    "ptrace": (0, 0, 0, 0), "process_vm_readv": (2, 0, 0, 0, 0, 0),
    "process_vm_writev": (2, 0, 0, 0, 0, 0), "pidfd_getfd": (0, 0, 0), "kcmp": (1, 2, 0, 0, 0),
    "mount": (0, 0, 0, 0, 0), "umount2": (0, 0), "pivot_root": (0, 0), "chroot": (b"/",),
    "fsopen": (b"tmpfs", 0), "fsconfig": (0, 0, 0, 0, 0), "fsmount": (0, 0, 0),
    "fspick": (0, b"/", 0), "open_tree": (0, b"/", 1), "move_mount": (0, 0, 0, 0, 0),
    "mount_setattr": (0, 0, 0, 0, 0), "setns": (0, 0), "unshare": (CLONE_FLAGS["user"],),
    "modify_ldt": (0, 0, 0), "iopl": (3,), "ioperm": (0, 1, 1), "kexec_load": (0, 0, 0, 0),
    "kexec_file_load": (0, 0, 0, 0, 0), "init_module": (0, 0, 0), "finit_module": (0, 0, 0),
    "delete_module": (0, 0), "swapon": (0, 0), "swapoff": (0,), "reboot": (0, 0, 0, 0),
    "acct": (0,), "quotactl": (0, 0, 0, 0), "quotactl_fd": (0, 0, 0, 0),
    "settimeofday": (0, 0), "clock_settime": (0, 0), "clock_adjtime": (0, 0),
    "syslog": (3, 0, 0), "fanotify_init": (0, 0), "fanotify_mark": (0, 0, 0, 0, 0),
    "name_to_handle_at": (0, 0, 0, 0, 0), "open_by_handle_at": (0, 0, 0),
    "lookup_dcookie": (0, 0, 0), "vhangup": (), "migrate_pages": (0, 0, 0, 0),
    "sethostname": (0, 0), "setdomainname": (0, 0),
    "personality": (0x0400000,),
}  # fmt: skip


def answers_of(calls):
    return {name: system_call(number, *words) for name, number, words in calls}


def answers_inside(run_inside, calls):
    """What the Linux kernel answers inside to *calls*; byte strings become pointers to nothing."""
    known = [
        (name, number_of(name), [0 if isinstance(word, bytes) else word for word in words])
        for name, words in calls.items()
        if number_of(name) is not None
    ]
    return run_inside(answers_of, known, using=(system_call,))


def test_system_calls_that_attack_the_linux_kernel_are_refused(run_inside):
    answers = answers_inside(run_inside, CALLS)
    assert {name: a for name, a in answers.items() if a not in REFUSED} == {}


@pytest.mark.parametrize("kind", CLONE_FLAGS)
def test_no_namespace_can_be_made(run_inside, kind):
    def attempt(unshare, clone, clone3, flag):
        import ctypes
        import errno
        import os

        arguments = (ctypes.c_uint64 * 11)(flag, 0, 0, 0, 17)
        libc = ctypes.CDLL(None, use_errno=True)
        made = libc.syscall(clone3, ctypes.byref(arguments), ctypes.c_size_t(88))
        if made == 0:
            os._exit(0)
        third = errno.errorcode[ctypes.get_errno()] if made < 0 else "made"
        pid = libc.syscall(clone, ctypes.c_ulong(flag | 17), None, None, None, None)
        if pid == 0:
            os._exit(0)
        second = errno.errorcode[ctypes.get_errno()] if pid < 0 else "made"
        return system_call(unshare, flag), second, third

    numbers = [number_of(name) for name in ("unshare", "clone", "clone3")]
    answers = run_inside(attempt, *numbers, CLONE_FLAGS[kind], using=(system_call,))
    assert answers == ["EPERM", "EPERM", "ENOSYS"]


def test_no_namespace_can_be_entered(run_inside):
    def attempt(setns):
        import os

        found = {}
        for kind in os.listdir("/proc/self/ns"):
            fd = os.open(f"/proc/self/ns/{kind}", os.O_RDONLY)
            found[kind] = system_call(setns, fd, 0)
            os.close(fd)
        return found

    answers = run_inside(attempt, number_of("setns"), using=(system_call,))
    assert set(answers.values()) <= REFUSED


def test_threads_and_processes_can_still_be_made(run_inside):
    def make():
        import os
        import subprocess
        import threading

        done = []
        thread = threading.Thread(target=done.append, args=(1,))
        thread.start()
        thread.join()
        child = os.fork()
        if child == 0:
            os._exit(7)
        return done, os.waitpid(child, 0)[1] >> 8, subprocess.call(["/bin/true"])

    assert run_inside(make) == [[1], 7, 0]


def test_only_four_families_of_sockets_exist(run_inside):
    def attempt():
        import errno
        import socket

        found = {}
        for family in range(48):
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, 5):
                try:
                    socket.socket(family, kind).close()
                    found.setdefault(family, []).append(int(kind))
                except OSError as error:
                    assert error.errno in errno.errorcode
        return found

    found = {int(family): kinds for family, kinds in run_inside(attempt).items()}
    unix, inet, inet6, netlink = 1, 2, 10, 16
    stream, datagram, raw = 1, 2, 3
    assert set(found) <= {unix, inet, inet6, netlink}
    assert {unix, inet} <= set(found)
    assert raw not in found[inet]
    assert raw not in found.get(inet6, [])
    assert {stream, datagram} <= set(found[inet])


def test_netlink_speaks_of_routes_and_of_nothing_else(run_inside):
    def attempt():
        import socket

        return [
            answer_of(lambda p=protocol: socket.socket(16, socket.SOCK_RAW, p).close())
            for protocol in range(32)
        ]

    answers = run_inside(attempt, using=(answer_of,))
    assert answers[0] == "None"
    assert "None" not in answers[1:]


def test_the_network_cannot_be_configured(run_inside):
    def attempt():
        import fcntl
        import socket
        import struct

        one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        address = struct.pack("16sH2s4s8x", b"lo", 2, b"", bytes([10, 0, 0, 1]))
        flags = struct.pack("16sh22x", b"lo", 0)
        set_address, set_flags, set_mtu = 0x8916, 0x8914, 0x8922
        return [
            answer_of(lambda: fcntl.ioctl(one, set_address, address)),
            answer_of(lambda: fcntl.ioctl(one, set_flags, flags)),
            answer_of(lambda: fcntl.ioctl(one, set_mtu, struct.pack("16si20x", b"lo", 1280))),
        ]

    assert run_inside(attempt, using=(answer_of,)) == ["EPERM"] * 3


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="32-bit calls are an x86 matter")
def test_system_calls_of_32_bit_programs_are_refused(sandbox):
    """int 0x80 reaches the table of i386, where the same numbers mean other calls."""

    def attempt():
        import ctypes
        import mmap
        import os

        # mov eax, 20 (getpid); int 0x80; ret
        code = b"\xb8\x14\x00\x00\x00\xcd\x80\xc3"
        page = mmap.mmap(-1, 4096, prot=7)
        page.write(code)
        call = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
        child = os.fork()
        if child == 0:
            os._exit(3 if call() == os.getpid() else 4)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    with sandbox() as box:
        answer = box.call(attempt)
    assert answer in {4, -31}, "getpid of i386 was answered"


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x32 is an x86 matter")
def test_system_calls_of_x32_programs_are_refused(run_inside):
    def attempt(number):
        import os

        child = os.fork()
        if child == 0:
            os._exit(3 if system_call(number | 0x40000000) not in ("EPERM", "ENOSYS") else 4)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert run_inside(attempt, number_of("getpid"), using=(system_call,)) in {4, -31}


def test_numbers_that_nobody_knows_yet_do_not_exist(run_inside):
    newest = max(number for pair in NUMBERS.values() for number in pair if number is not None)
    calls = [(str(n), n, [0] * 6) for n in range(newest + 1, newest + 40)]
    answers = run_inside(answers_of, calls, using=(system_call,))
    assert set(answers.values()) == {"ENOSYS"}


@pytest.mark.parametrize("filesystem", ["proc", "sysfs", "tmpfs", "cgroup", "cgroup2", "overlay"])
def test_nothing_can_be_mounted(run_inside, filesystem):
    def attempt(filesystem):
        import ctypes
        import errno
        import os

        libc = ctypes.CDLL(None, use_errno=True)
        os.makedirs("/tmp/here", exist_ok=True)
        libc.mount(b"none", b"/tmp/here", filesystem.encode(), ctypes.c_ulong(0), None)
        return errno.errorcode[ctypes.get_errno()]

    assert run_inside(attempt, filesystem) in REFUSED


def test_the_filter_cannot_be_taken_off(run_inside):
    def attempt():
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(22, 0, 0, 0, 0)
        with open("/proc/self/status") as file:
            return next(line for line in file if line.startswith("Seccomp:")).split()[1]

    assert run_inside(attempt) == "2"


def test_the_clock_and_the_kernel_log_are_out_of_reach(run_inside):
    def attempt():
        import time

        return answer_of(lambda: time.clock_settime(time.CLOCK_REALTIME, time.time()))

    assert run_inside(attempt, using=(answer_of,)) == "EPERM"


def reach_others(path):
    """Commands of allowed calls, by which a process reaches whoever else opens, reads or runs."""
    import ctypes
    import fcntl
    import mmap
    import os

    def lease():
        fd = os.open(path, os.O_RDONLY)
        try:
            fcntl.fcntl(fd, 1024, fcntl.F_RDLCK)
        finally:
            os.close(fd)

    def notice():
        fd = os.open("/usr", os.O_RDONLY)
        try:
            fcntl.fcntl(fd, 1026, 0x80000001)
            fcntl.fcntl(fd, 1026, 0)
        finally:
            os.close(fd)

    def watch(mask):
        libc = ctypes.CDLL(None, use_errno=True)
        fd = libc.inotify_init1(os.O_CLOEXEC)
        try:
            if libc.inotify_add_watch(fd, b"/usr/bin", mask) < 0:
                raise OSError(ctypes.get_errno(), "inotify_add_watch")
        finally:
            os.close(fd)

    def cached():
        fd = os.open(path, os.O_RDONLY)
        try:
            return os.preadv(fd, [bytearray(9)], 0, os.RWF_NOWAIT)
        finally:
            os.close(fd)

    return {
        "lease": answer_of(lease),
        "notice": answer_of(notice),
        "watch of reads": answer_of(lambda: watch(0x1)),
        "watch of starts": answer_of(lambda: watch(0x20)),
        "watch of changes": answer_of(lambda: watch(0xFC8)),
        "what is cached": answer_of(cached),
        "huge pages": answer_of(lambda: os.close(os.memfd_create("huge", os.MFD_HUGETLB))),
        "pages": answer_of(lambda: mmap.mmap(-1, 4096).close()),
    }


def test_no_allowed_call_has_a_command_that_reaches_others(run_inside, workdir):
    path = workdir / "file"
    path.write_text("something")
    outside = reach_others(str(path))
    assert {outside[name] for name in ("lease", "notice", "watch of reads", "huge pages")} == {
        "None"
    }
    assert run_inside(reach_others, str(path), using=(answer_of,)) == {
        "lease": "EINVAL",
        "notice": "EINVAL",
        "watch of reads": "EPERM",
        "watch of starts": "EPERM",
        "watch of changes": "None",
        "what is cached": "ENOTSUP",
        "huge pages": "EINVAL",
        "pages": "None",
    }


def test_advice_to_forget_a_file_leaves_it_cached(run_inside, workdir):
    """Whether it still is can only be asked from outside."""
    path = workdir / "file"
    path.write_text("something")
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)

    def forget(path):
        import os

        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)

    try:
        run_inside(forget, str(path))
        assert os.preadv(fd, [bytearray(9)], 0, os.RWF_NOWAIT) == 9
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        with pytest.raises(BlockingIOError):
            os.preadv(fd, [bytearray(9)], 0, os.RWF_NOWAIT)
    finally:
        os.close(fd)


def test_the_init_of_a_sandbox_is_served_as_before_whatever_the_kernel_asks_for(run_inside):
    def attempt():
        import os
        import resource

        return [
            answer_of(lambda: resource.prlimit(1, resource.RLIMIT_NOFILE, (3, 3))),
            answer_of(lambda: os.setpriority(os.PRIO_PROCESS, 1, 19)),
            answer_of(lambda: os.setpriority(os.PRIO_USER, 0, 19)),
            answer_of(lambda: os.sched_setscheduler(1, os.SCHED_IDLE, os.sched_param(0))),
            answer_of(lambda: os.sched_setaffinity(1, os.sched_getaffinity(0))),
            answer_of(lambda: os.setpriority(os.PRIO_PROCESS, os.getpid(), 15)),
            answer_of(lambda: os.sched_setaffinity(os.getpid(), os.sched_getaffinity(0))),
        ]

    answers = run_inside(attempt, using=(answer_of,))
    assert answers == [*["EPERM"] * 5, "None", "None"]
