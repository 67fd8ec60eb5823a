"""The system call filter: judged by an interpreter for both machines, then by this kernel."""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_provisioner.facilities.rights.plan import seccomp
from sandbox_provisioner.facilities.rights.plan.seccomp import (
    ABSENT,
    ALLOW,
    ALLOWED,
    AUDIT_ARCH,
    CHECKED,
    GO,
    IF_AT_LEAST,
    IF_EQUAL,
    KILL,
    LOAD,
    REFUSED,
    RETURN,
    UNKNOWN,
    Program,
    Rule,
    Word,
    compile_filter,
    describe,
    fail,
)
from sandbox_provisioner.facilities.rights.plan.syscall_numbers import NUMBERS

X86_64, AARCH64 = "x86_64", "aarch64"
MACHINES = (X86_64, AARCH64)
I386, ARM32 = 0x4000_0003, 0x4000_0028
X32 = 0x4000_0000
EPERM = fail(errno.EPERM)
EINVAL = fail(errno.EINVAL)
UNSUPPORTED = fail(errno.EOPNOTSUPP)
GARBAGE = 0xDEAD_BEEF_0000_0000
LONGEST_PROGRAM = 4096  # linux/bpf_common.h, BPF_MAXINSNS
SECCOMP_DATA_BYTES = 64
LONGEST_SEARCH = 16  # instructions
FIRST_COMMON_NUMBER = 424  # pidfd_send_signal, Linux 5.1

Args = tuple[int, ...]


# ---- an interpreter for the few instructions of BPF that a filter may use ------------------------


def instructions(program: bytes) -> list[tuple[int, int, int, int]]:
    return list(struct.iter_unpack("<HBBI", program))


def run(program: bytes, arch: int, number: int, args: Args = ()) -> int:
    """What seccomp(2) would answer to this call."""
    return trace(program, arch, number, args)[0]


def trace(program: bytes, arch: int, number: int, args: Args = ()) -> tuple[int, int]:
    """The answer, and how many instructions it took."""
    padded = [*args, *[0] * (6 - len(args))]
    seen = struct.pack("<IIQ6Q", number, arch, 0, *(a % 2**64 for a in padded))
    code, at, accumulator = instructions(program), 0, 0
    for taken in itertools.count(1):
        opcode, yes, no, value = code[at]
        at += 1
        match opcode:
            case 0x20:
                (accumulator,) = struct.unpack_from("<I", seen, value)
            case 0x54:
                accumulator &= value
            case 0x05:
                at += value
            case 0x15:
                at += yes if accumulator == value else no
            case 0x35:
                at += yes if accumulator >= value else no
            case 0x06:
                return value, taken
            case _:
                pytest.fail(f"instruction {opcode:#x}")
    raise AssertionError


def ask(machine: str, name: str, *args: int) -> int:
    number = NUMBERS[name][MACHINES.index(machine)]
    assert number is not None
    return run(compile_filter(machine), AUDIT_ARCH[machine], number, args)


def judge(rule: Rule, args: Args) -> int:
    """What a rule says, read straight from the table."""
    for case in rule.cases:
        if all(half(args, word) & word.mask in word.among for word in case.when):
            return case.verdict
    return rule.otherwise


def half(args: Args, word: Word) -> int:
    return args[word.argument] >> 32 * word.upper & 0xFFFF_FFFF


def exists(machine: str, name: str) -> bool:
    return NUMBERS[name][MACHINES.index(machine)] is not None


JUDGED_BY_A_POINTER = {"prlimit64"}
HARMLESS: dict[str, Args] = {
    "socket": (1, 1, 0),
    "socketpair": (1, 1, 0),
    "prctl": (15,),
    "ioctl": (0, 0x5401),
    "ioprio_set": (1, 0, 0),
}
both_machines = pytest.mark.parametrize("machine", MACHINES)
words = st.one_of(
    st.integers(0, 2**64 - 1),
    st.integers(0, 40),
    st.sampled_from([1 << bit for bit in range(64)]),
    st.sampled_from(
        [1024, 1030, 1039, 0x5401, 0x5412, 0x9401, 0x4004_9409, 0o104755, 0o20644, 0xFFFF_FFFF]
    ),
)
six_words = st.tuples(*[words] * 6)


# ---- the program ---------------------------------------------------------------------------------


@both_machines
def test_the_kernel_would_accept_the_program(machine: str) -> None:
    code = instructions(compile_filter(machine))
    assert len(code) < LONGEST_PROGRAM
    for at, (opcode, yes, no, value) in enumerate(code):
        if opcode == GO:
            assert at + 1 + value < len(code)
        if opcode in (IF_EQUAL, IF_AT_LEAST):
            assert at + 1 + max(yes, no) < len(code)
        if opcode == LOAD:
            assert value in range(0, SECCOMP_DATA_BYTES, 4)
    assert code[-1][0] == RETURN


@both_machines
def test_the_search_for_a_number_is_short(machine: str) -> None:
    program, arch = compile_filter(machine), AUDIT_ARCH[machine]
    judged = {number for number, v in seccomp.by_number(machine).items() if isinstance(v, Rule)}
    numbers = set(range(600)) - judged
    assert max(trace(program, arch, number)[1] for number in numbers) <= LONGEST_SEARCH


def test_another_machine_is_refused_with_the_names_of_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'riscv64'.*aarch64 and x86_64"):
        compile_filter("riscv64")


@pytest.mark.parametrize("count", [1, 2, 300, 1500])
def test_jumps_longer_than_eight_bits_arrive(count: int) -> None:
    parts = [(first * 2, fail(first)) for first in range(count)]
    program = Program()
    start = program.search(list(parts))
    if program.skip(start):
        program.add(0x05, program.skip(start))
    program.add(0x20, 0)
    code = b"".join(reversed(program.backwards))
    for number in range(2 * count):
        assert run(code, 0, number) == fail(number // 2)


@both_machines
@given(args=six_words)
def test_argument_checks_say_what_their_tables_say(machine: str, args: Args) -> None:
    for name, rule in CHECKED.items():
        if exists(machine, name):
            assert ask(machine, name, *args) == judge(rule, args), name


@both_machines
@given(args=six_words, high=st.integers(0, 2**32 - 1))
def test_upper_halves_of_arguments_change_nothing(machine: str, args: Args, high: int) -> None:
    low = tuple(a & 0xFFFF_FFFF for a in args)
    for name in CHECKED.keys() - JUDGED_BY_A_POINTER:
        if exists(machine, name):
            shifted = (a | high << 32 for a in low)
            assert ask(machine, name, *low) == ask(machine, name, *shifted), name


# ---- the tables ----------------------------------------------------------------------------------


def test_every_call_stands_in_one_table_and_has_a_number() -> None:
    named = [name for name, _ in seccomp.verdicts()]
    assert len(named) == len(set(named))
    assert sorted(named) == list(NUMBERS)
    assert all(numbers != (None, None) for numbers in NUMBERS.values())


@pytest.mark.parametrize("column", [0, 1])
def test_no_two_calls_share_a_number(column: int) -> None:
    numbers = [n[column] for n in NUMBERS.values() if n[column] is not None]
    assert len(numbers) == len(set(numbers))


def test_new_calls_have_one_number_on_both_machines() -> None:
    for name, (x86, arm) in NUMBERS.items():
        if x86 is not None and x86 >= FIRST_COMMON_NUMBER:
            assert x86 == arm, name


def test_x86_numbers_agree_with_the_kernel_headers_of_this_machine() -> None:
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip(f"no {header}")
    known = dict(re.findall(r"#define __NR_(\w+)\s+(\d+)", header.read_text()))
    for name, (x86, _) in NUMBERS.items():
        if name in known:
            assert x86 == int(known[name]), name


# ---- verdicts on numbers -------------------------------------------------------------------------


@both_machines
def test_every_allowed_call_is_allowed_whatever_its_arguments(machine: str) -> None:
    for calls in ALLOWED.values():
        for name in filter(lambda name: exists(machine, name), calls.split()):
            assert ask(machine, name) == ALLOW, name
            assert ask(machine, name, *[2**64 - 1] * 6) == ALLOW, name


@both_machines
def test_every_checked_call_is_allowed_with_harmless_arguments(machine: str) -> None:
    for name in filter(lambda name: exists(machine, name), CHECKED):
        assert ask(machine, name, *HARMLESS.get(name, ())) == ALLOW, name


@both_machines
def test_every_refused_call_fails_with_its_error(machine: str) -> None:
    for refusal in REFUSED:
        for name in filter(lambda name: exists(machine, name), refusal.calls.split()):
            assert ask(machine, name) == fail(refusal.error), name


@both_machines
def test_calls_that_hide_their_flags_do_not_exist(machine: str) -> None:
    for name in filter(lambda name: exists(machine, name), ABSENT):
        assert ask(machine, name) == UNKNOWN, name
    assert ask(machine, "clone3") == ask(machine, "openat2") == fail(errno.ENOSYS)


@both_machines
@given(number=st.one_of(st.integers(0, 2**32 - 1), st.integers(0, 600)), args=six_words)
def test_any_number_no_table_names_does_not_exist(machine: str, number: int, args: Args) -> None:
    if number not in seccomp.by_number(machine):
        assert run(compile_filter(machine), AUDIT_ARCH[machine], number, args) == UNKNOWN


def test_x32_calls_do_not_exist() -> None:
    for x86, _ in NUMBERS.values():
        if x86 is not None:
            assert run(compile_filter(X86_64), AUDIT_ARCH[X86_64], X32 | x86) == UNKNOWN


@both_machines
@given(number=st.integers(0, 500))
def test_calls_through_a_foreign_abi_kill(machine: str, number: int) -> None:
    (other,) = set(AUDIT_ARCH) - {machine}
    for arch in (I386, ARM32, AUDIT_ARCH[other], 0):
        assert run(compile_filter(machine), arch, number) == KILL


# ---- verdicts on arguments -----------------------------------------------------------------------

UNIX, INET, INET6, NETLINK = 1, 2, 10, 16
STREAM, DGRAM, RAW, SEQPACKET, PACKET, CLOEXEC = 1, 2, 3, 5, 10, 0o2000000
NO_FAMILY, NO_PROTOCOL = fail(errno.EAFNOSUPPORT), fail(errno.EPROTONOSUPPORT)


@both_machines
@pytest.mark.parametrize(
    ("args", "verdict"),
    [
        ((UNIX, STREAM, 0), ALLOW),
        ((UNIX, SEQPACKET | CLOEXEC, 0), ALLOW),
        ((INET, STREAM | CLOEXEC, 6), ALLOW),
        ((INET6, DGRAM, 17), ALLOW),
        ((INET, DGRAM, 1), ALLOW),
        ((INET, RAW, 1), EPERM),
        ((INET6, RAW | CLOEXEC, 58), EPERM),
        ((INET, PACKET, 0x300), EPERM),
        ((INET, STREAM, 262), NO_PROTOCOL),
        ((INET, STREAM, 132), NO_PROTOCOL),
        ((INET, SEQPACKET, 0), NO_PROTOCOL),
        ((NETLINK, RAW | CLOEXEC, 0), ALLOW),
        ((NETLINK, RAW, 6), NO_PROTOCOL),
        ((GARBAGE | INET, GARBAGE | RAW, 0), EPERM),
        ((GARBAGE | 38, GARBAGE | STREAM, 0), NO_FAMILY),
    ],
)
def test_sockets(machine: str, args: Args, verdict: int) -> None:
    assert ask(machine, "socket", *args) == verdict


@both_machines
@given(family=st.integers(0, 2**32 - 1).filter(lambda f: f not in (UNIX, INET, INET6, NETLINK)))
def test_no_other_socket_family_exists(machine: str, family: int) -> None:
    assert ask(machine, "socket", family, RAW, 0) == NO_FAMILY
    assert ask(machine, "socketpair", family, STREAM, 0) == NO_FAMILY


@both_machines
def test_kernel_tls_cannot_be_switched_on(machine: str) -> None:
    assert ask(machine, "setsockopt", 5, 6, 31) == fail(errno.ENOPROTOOPT)
    assert ask(machine, "setsockopt", 5, 6, 1) == ALLOW
    assert ask(machine, "setsockopt", 31, 1, 31) == ALLOW


@both_machines
@pytest.mark.parametrize("bit", [0x20000, *(1 << n for n in range(25, 31))])
def test_clone_makes_no_namespace(machine: str, bit: int) -> None:
    for others in (0, 0x3D0F00, GARBAGE, 0xFFFF_FFFF_8000_0000):
        assert ask(machine, "clone", bit | others) == EPERM


@both_machines
@pytest.mark.parametrize("flags", [0x11, 0x4111, 0x3D0F00, 0x120_0011, GARBAGE, -(1 << 31)])
def test_clone_makes_processes_and_threads(machine: str, flags: int) -> None:
    assert ask(machine, "clone", flags) == ALLOW


@both_machines
@pytest.mark.parametrize("bits", [0o4000, 0o2000, 0o6000])
@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("chmod", ()),
        ("fchmod", ()),
        ("fchmodat", (0,)),
        ("fchmodat2", (0,)),
        ("creat", ()),
        ("mknod", ()),
        ("mknodat", (0,)),
    ],
)
def test_modes_hold_no_set_id_bits(machine: str, name: str, before: Args, bits: int) -> None:
    if not exists(machine, name):
        return
    assert ask(machine, name, *before, 0, bits | 0o755) == EPERM
    assert ask(machine, name, *before, 0, GARBAGE | bits | 0o755) == EPERM
    assert ask(machine, name, *before, 0, GARBAGE | 0o755) == ALLOW
    assert ask(machine, name, *before, 0, 0o1777 if "mknod" not in name else 0o777) == ALLOW


@both_machines
@pytest.mark.parametrize("making", [os.O_CREAT, os.O_TMPFILE, os.O_CREAT | os.O_EXCL | os.O_RDWR])
def test_opening_makes_no_set_id_file(machine: str, making: int) -> None:
    assert ask(machine, "openat", 0, 0, making, 0o4755) == EPERM
    assert ask(machine, "openat", 0, 0, making | GARBAGE, 0o2755 | GARBAGE) == EPERM
    assert ask(machine, "openat", 0, 0, making, 0o755 | GARBAGE) == ALLOW
    if machine == X86_64:
        assert ask(machine, "open", 0, making, 0o4755) == EPERM
        assert ask(machine, "open", 0, making, 0o644) == ALLOW


@both_machines
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR | os.O_CLOEXEC, os.O_DIRECTORY])
def test_opening_reads_no_mode_where_no_file_is_made(machine: str, flags: int) -> None:
    assert ask(machine, "openat", 0, 0, flags, 0o7777) == ALLOW


@both_machines
@pytest.mark.parametrize(
    ("kind", "verdict"),
    [
        *[(kind, ALLOW) for kind in (0, stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK)],
        *[(kind, EPERM) for kind in (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFDIR, stat.S_IFLNK)],
    ],
)
def test_nodes_are_files_pipes_and_sockets(machine: str, kind: int, verdict: int) -> None:
    assert ask(machine, "mknodat", 0, 0, kind | 0o644) == verdict


@both_machines
@pytest.mark.parametrize("command", [*seccomp.FORBIDDEN_IOCTLS, 0x5000_9401, 0xB701, 0x8004_B706])
def test_terminals_quotas_and_namespaces_are_out_of_reach(machine: str, command: int) -> None:
    assert ask(machine, "ioctl", 0, command) == EPERM
    assert ask(machine, "ioctl", 0, command | GARBAGE) == EPERM


@both_machines
@given(command=st.integers(0, 2**32 - 1))
def test_device_commands_that_no_table_names_do_not_exist(machine: str, command: int) -> None:
    known = {number for numbers in seccomp.ALLOWED_IOCTLS.values() for number in numbers}
    if command not in known and command & 0xFF00 not in seccomp.FORBIDDEN_IOCTL_TYPES:
        said = EPERM if command in seccomp.FORBIDDEN_IOCTLS else fail(errno.ENOTTY)
        assert ask(machine, "ioctl", 0, command) == said


@pytest.mark.parametrize(
    ("command", "verdict"),
    [
        (0xC020_462A, ALLOW),  # NV_ESC_RM_ALLOC
        (0x25, ALLOW),  # UVM_REGISTER_GPU
        (0x3000_0001, ALLOW),  # UVM_INITIALIZE
        (0x8B01, fail(errno.ENOTTY)),  # wireless
        (0x4004_6F01, fail(errno.ENOTTY)),  # ocfs2
        (0x4004_CF0B, fail(errno.ENOTTY)),  # cifs
        (0x5412, EPERM),
        (0x5000_9401, EPERM),
    ],
)
def test_with_devices_their_drivers_commands_pass_and_linuxs_own_do_not(
    command: int, verdict: int
) -> None:
    args = (0, command, 0, 0, 0, 0)
    assert judge(seccomp.any_device_commands(), args) == verdict


@both_machines
@pytest.mark.parametrize("command", [0x5401, 0x5413, 0x540E, 0x5421, 0x541B, 0x4004_9409, 0x8912])
def test_ordinary_device_commands_work(machine: str, command: int) -> None:
    assert ask(machine, "ioctl", 0, command) == ALLOW


@both_machines
@pytest.mark.parametrize(
    ("name", "args", "verdict"),
    [
        ("personality", (0xFFFF_FFFF,), ALLOW),
        ("personality", (2**64 - 1,), ALLOW),
        ("personality", (0x40000,), ALLOW),
        ("personality", (8,), EPERM),
        ("personality", (0x0400000,), EPERM),
        ("fcntl", (3, 0), ALLOW),
        ("fcntl", (3, 11), ALLOW),
        ("fcntl", (3, 12), EINVAL),
        ("fcntl", (3, 37), ALLOW),
        ("fcntl", (3, 1024, 1), EINVAL),
        ("fcntl", (3, GARBAGE | 1024, 1), EINVAL),
        ("fcntl", (3, 1025), ALLOW),
        ("fcntl", (3, 1026, 1), EINVAL),
        ("fcntl", (3, 1030), ALLOW),
        ("fcntl", (3, 1038), ALLOW),
        ("fcntl", (3, 1040), EINVAL),
        ("inotify_add_watch", (3, 0, 0x0FC8 | 0x0100_0000), ALLOW),
        ("inotify_add_watch", (3, 0, 0x0FFF), EPERM),
        ("inotify_add_watch", (3, 0, 0x1), EPERM),
        ("inotify_add_watch", (3, 0, 0x10), EPERM),
        ("inotify_add_watch", (3, 0, 0x20), EPERM),
        ("preadv2", (3, 0, 0, 0, 0, 0), ALLOW),
        ("preadv2", (3, 0, 0, 0, 0, 8), UNSUPPORTED),
        ("preadv2", (3, 0, 0, 0, 0, 0x88), UNSUPPORTED),
        ("pwritev2", (3, 0, 0, 0, 0, 0x16), ALLOW),
        ("pwritev2", (3, 0, 0, 0, 0, GARBAGE | 9), UNSUPPORTED),
        ("fadvise64", (3, 0, 0, 2), ALLOW),
        ("fadvise64", (3, 0, 0, 4), fail(0)),
        ("mmap", (0, 4096, 3, 0x22), ALLOW),
        ("mmap", (0, 4096, 3, 0x4_0022), fail(errno.ENOMEM)),
        ("mmap", (0, 4096, 3, 0x7C04_0022), fail(errno.ENOMEM)),
        ("memfd_create", (0, 3), ALLOW),
        ("memfd_create", (0, 5), EINVAL),
        ("shmget", (0, 4096, 0o1600), ALLOW),
        ("shmget", (0, 4096, 0o5600), fail(errno.ENOMEM)),
        ("prlimit64", (0, 7, GARBAGE), ALLOW),
        ("prlimit64", (1, 7, 0, 0), ALLOW),
        ("prlimit64", (1, 7, 0x7FFF_1234_5678), EPERM),
        ("prlimit64", (1, 7, 0x7FFF_0000_0000), EPERM),
        ("sched_setaffinity", (0, 8), ALLOW),
        ("sched_setaffinity", (77, 8), ALLOW),
        ("sched_setaffinity", (1, 8), EPERM),
        ("sched_setscheduler", (1, 5), EPERM),
        ("sched_setattr", (GARBAGE | 1,), EPERM),
        ("setpriority", (0, 77, 5), ALLOW),
        ("setpriority", (0, 1, 5), EPERM),
        ("setpriority", (2, 0, 5), EPERM),
        ("ioprio_set", (1, 0, 0), ALLOW),
        ("ioprio_set", (1, 1, 0), EPERM),
        ("ioprio_set", (3, 0, 0), EPERM),
        ("membarrier", (8, 0), ALLOW),
        ("membarrier", (2, 0), EINVAL),
        ("prctl", (38, 1), ALLOW),
        ("prctl", (0x5356_4D41, 0), ALLOW),
        ("prctl", (57, 1), EINVAL),
        ("prctl", (999,), EINVAL),
        ("prctl", (15,), ALLOW),
        ("prctl", (35, 14), EPERM),
        ("prctl", (62,), EPERM),
        ("prctl", (67, 1), EPERM),
        ("seccomp", (1, 0), ALLOW),
        ("seccomp", (1, 1), ALLOW),
        ("seccomp", (1, 8), EPERM),
        ("seccomp", (1, 0x18), EPERM),
        ("madvise", (0, 4096, 4), ALLOW),
        ("madvise", (0, 4096, 12), EINVAL),
    ],
)
def test_other_arguments(machine: str, name: str, args: Args, verdict: int) -> None:
    assert ask(machine, name, *args) == verdict


def test_the_description_names_every_checked_refused_and_absent_call() -> None:
    text = describe()
    assert text.splitlines()[0].startswith(f"{sum(len(c.split()) for c in ALLOWED.values())} ")
    refused = [name for refusal in REFUSED for name in refusal.calls.split()]
    for name in (*CHECKED, *refused, *ABSENT):
        assert re.search(rf"\b{name}\b", text), name


# ---- this kernel ---------------------------------------------------------------------------------

MACHINE = os.uname().machine
on_a_known_machine = pytest.mark.skipif(
    sys.platform != "linux" or MACHINE not in MACHINES, reason=f"no filter for {MACHINE}"
)
on_x86_64 = pytest.mark.skipif(MACHINE != X86_64, reason="x86_64 only")

LOCK_IN = """
import ctypes, errno, fcntl, os, socket, struct, sys, tempfile
libc = ctypes.CDLL(None, use_errno=True)
class Fprog(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
code = bytes.fromhex(sys.argv[1])
held = ctypes.create_string_buffer(code, len(code))
fprog = Fprog(len(code) // 8, ctypes.addressof(held))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(fprog), 0, 0) == 0, ctypes.get_errno()
def call(number, *args):
    libc.syscall.restype = ctypes.c_long
    if libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, args)) >= 0:
        return "done"
    return errno.errorcode[ctypes.get_errno()]
def answer(function, *args, **more):
    try:
        function(*args, **more)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"
"""


def locked_in(code: str, *args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python code (after LOCK_IN) in a process under the filter."""
    return subprocess.run(
        [sys.executable, "-c", LOCK_IN + code, compile_filter(MACHINE).hex(), *args],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=cwd,
    )


def command_locked_in(*argv: str, cwd: Path) -> str:
    """Output of a command under the filter, which must succeed."""
    ended = locked_in("os.execvp(sys.argv[2], sys.argv[2:])", *argv, cwd=cwd)
    assert ended.returncode == 0, ended
    return ended.stdout


def number_of(name: str) -> int:
    number = NUMBERS[name][MACHINES.index(MACHINE)]
    assert number is not None
    return number


@on_a_known_machine
@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("answer(socket.socket, socket.AF_UNIX)", "done"),
        ("answer(socket.socket, socket.AF_INET)", "done"),
        ("answer(socket.socket, 16, socket.SOCK_RAW, 0)", "done"),
        ("answer(socket.socketpair)", "done"),
        ("answer(socket.socket, socket.AF_INET, socket.SOCK_RAW, 1)", "EPERM"),
        ("answer(socket.socket, 16, socket.SOCK_RAW, 15)", "EPROTONOSUPPORT"),
        ("{answer(socket.socket, f, 2) for f in range(3, 46) if f not in (10, 16)}",
         "{'EAFNOSUPPORT'}"),
        ("answer(os.chmod, sys.argv[2], 0o4755)", "EPERM"),
        ("answer(os.chmod, sys.argv[2], 0o755)", "done"),
        ("answer(os.open, sys.argv[2] + '.set-id', os.O_CREAT | os.O_WRONLY, 0o4755)", "EPERM"),
        ("answer(os.open, sys.argv[2] + '.plain', os.O_CREAT | os.O_WRONLY, 0o755)", "done"),
        ("answer(os.mkdir, f := sys.argv[2] + '.folder', 0o6755), os.stat(f).st_mode & 0o6000",
         "done 0"),
        ("answer(os.mkfifo, sys.argv[2] + '.fifo')", "done"),
        ("answer(os.mknod, sys.argv[2] + '.null', 0o020666, os.makedev(1, 3))", "EPERM"),
        ("[answer(fcntl.ioctl, fd, 0x5412, b'x') for fd in os.openpty()]", "['EPERM', 'EPERM']"),
        ("answer(fcntl.ioctl, os.open('/proc/self/ns/net', 0), 0xb701)", "EPERM"),
    ],
)  # fmt: skip
def test_this_kernel_answers(expression: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ended = locked_in(f"print({expression})", str(tmp_path / "file"))
    assert (ended.stdout.strip(), ended.stderr) == (said, "")


@on_a_known_machine
@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("unshare", (0x1000_0000,), "EPERM"),
        ("setns", (0, 0), "EPERM"),
        ("clone", (0x1000_0011, 0, 0, 0, 0), "EPERM"),
        ("clone3", (0, 0), "ENOSYS"),
        ("openat2", (0, 0, 0, 0), "ENOSYS"),
        ("fchmodat2", (-100, 0, 0o4755, 0), "EPERM"),
        ("io_uring_setup", (1, 0), "EPERM"),
        ("bpf", (0, 0, 0), "EPERM"),
        ("userfaultfd", (0,), "EPERM"),
        ("keyctl", (0, 0), "EPERM"),
        ("ptrace", (0, 0, 0, 0), "EPERM"),
        ("splice", (0, 0, 0, 0, 0, 0), "EINVAL"),
        ("personality", (8,), "EPERM"),
        ("personality", (-1,), "done"),
        ("seccomp", (1, 8, 0), "EPERM"),
        ("seccomp", (1, 0, 0), "EFAULT"),
    ],
)
def test_this_kernel_answers_the_call(name: str, args: Args, said: str) -> None:
    ended = locked_in(f"print(call({number_of(name)}, *{args}))")
    assert (ended.stdout.strip(), ended.stderr) == (said, "")


@on_a_known_machine
@on_x86_64
def test_int_0x80_ends_the_process_by_sigsys() -> None:
    ended = locked_in(
        "import mmap, resource\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        "page = mmap.mmap(-1, 4096, prot=7)\n"
        # mov $getpid, %eax; int $0x80; ret
        "page.write(bytes.fromhex('b814000000cd80c3'))\n"
        "address = ctypes.addressof(ctypes.c_char.from_buffer(page))\n"
        "print('alive', ctypes.CFUNCTYPE(ctypes.c_int)(address)())\n"
    )
    assert (ended.returncode, ended.stdout) == (-signal.SIGSYS, "")


@on_a_known_machine
@on_x86_64
def test_x32_calls_do_not_work_here() -> None:
    assert locked_in(f"print(call({X32 | 39}))").stdout == "ENOSYS\n"


# ---- what must still work ------------------------------------------------------------------------

PROGRAMS = {
    "subprocess": "import subprocess; subprocess.run(['true'], check=True)",
    "subprocess with a fork": "import subprocess; "
    "subprocess.run(['true'], check=True, preexec_fn=lambda: None, start_new_session=True)",
    "threads": "import threading as t; a = [t.Thread(target=print) for _ in range(8)]; "
    "[x.start() for x in a]; [x.join() for x in a]",
    "multiprocessing by fork": "import multiprocessing as m; "
    "assert m.get_context('fork').Pool(2).map(abs, [-1, 2]) == [1, 2]",
    "multiprocessing by forkserver": "import multiprocessing as m; "
    "assert m.get_context('forkserver').Pool(2).map(abs, [-1, 2]) == [1, 2]",
    "shared memory": "from multiprocessing.shared_memory import SharedMemory as S; "
    "s = S(create=True, size=9); s.close(); s.unlink()",
    "asyncio": "import asyncio; "
    "asyncio.run(asyncio.wait_for((lambda: asyncio.create_subprocess_exec('true'))(), 30))",
    "sqlite3": "import sqlite3; d = sqlite3.connect('a.db'); d.execute('pragma journal_mode=wal'); "
    "d.execute('create table t(x)'); d.commit(); d.close()",
    "numpy": "import numpy as n; a = n.ones((600, 600)); assert (a @ a)[0, 0] == 600",
    "temporary files": "tempfile.TemporaryFile(); tempfile.NamedTemporaryFile()",
    "copies": "import shutil; open('a', 'w').write('x' * 99999); shutil.copytree('.', 'b')",
    "terminals": "import pty; assert pty.spawn(['true']) == 0",
    "locks": "fcntl.flock(open('l', 'w'), 2); fcntl.lockf(open('m', 'w'), 2)",
    "zmq": "import zmq; c = zmq.Context(); a = c.socket(zmq.REP); a.bind('ipc://z'); "
    "b = c.socket(zmq.REQ); b.connect('ipc://z'); b.send(b'x'); assert a.recv() == b'x'",
}


@on_a_known_machine
@pytest.mark.parametrize("program", PROGRAMS)
def test_python_still_does(program: str, tmp_path: Path) -> None:
    if program in ("numpy", "zmq"):
        pytest.importorskip(program)
    ended = locked_in(PROGRAMS[program], cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr


@on_a_known_machine
@pytest.mark.parametrize(
    "argv",
    [
        ("git", "--version"),
        ("git", "init", "--quiet", "repository"),
        ("bash", "-c", "echo a | cat | (sleep 0; cat) & wait; cp -a . ../copy; tar c . | wc -c"),
        ("gcc", "-pthread", "hello.c", "-o", "hello"),
        ("node", "-e", "require('child_process').execSync('true')"),
        ("java", "-version"),
        ("Rscript", "-e", "stopifnot(system('true') == 0)"),
        (sys.executable, "-m", "pip", "--version"),
    ],
    ids=lambda argv: Path(argv[0]).name + " " + argv[1],
)
def test_programs_still_run(argv: tuple[str, ...], tmp_path: Path) -> None:
    if shutil.which(argv[0]) is None:
        pytest.skip(f"no {argv[0]} on this machine")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "hello.c").write_text("int main(void) { return 0; }\n")
    command_locked_in(*argv, cwd=tmp_path / "work")


def test_the_gateway_may_splice_and_nobody_else() -> None:
    gateway, kernel = dict(seccomp.verdicts(seccomp.GATEWAY)), dict(seccomp.verdicts())
    changed = {name for name in kernel if gateway[name] != kernel[name]}
    assert changed == {"splice", "listen", "socket", "socketpair"}
    assert gateway["splice"] == ALLOW
    for profile in (seccomp.KERNEL, seccomp.SHARED, seccomp.NURSERY, seccomp.NETWORKED):
        assert dict(seccomp.verdicts(profile))["splice"] != ALLOW


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", sorted(seccomp.ROOT_CHECKED))
def test_for_a_kernel_that_is_root_init_judges_set_id_bits_alone(machine: str, name: str) -> None:
    number = NUMBERS[name][MACHINES.index(machine)]
    if number is None:
        return
    rule = dict(seccomp.verdicts(seccomp.ROOT))[name]
    assert isinstance(rule, seccomp.Rule)
    before = (0,) * rule.cases[0].when[0].argument
    program = compile_filter(machine, seccomp.ROOT)
    for mode, verdict in ((0o4755, seccomp.ASK), (0o2755, seccomp.ASK), (0o1777, ALLOW)):
        assert run(program, AUDIT_ARCH[machine], number, (*before, mode)) == verdict
    others = dict(seccomp.verdicts(seccomp.ROOT)) | dict.fromkeys(seccomp.ROOT_CHECKED, 0)
    assert others == dict(seccomp.verdicts()) | dict.fromkeys(seccomp.ROOT_CHECKED, 0)


def test_the_gateway_reaches_no_name_of_the_family_unix_and_is_nobodys_server() -> None:
    gateway = dict(seccomp.verdicts(seccomp.GATEWAY))
    assert gateway["listen"] == fail(errno.EPERM)
    assert gateway["socketpair"] == fail(errno.EAFNOSUPPORT)
    rule = gateway["socket"]
    assert isinstance(rule, Rule)
    for kind in (1, 2, 5):
        assert judge(rule, (seccomp.AF_UNIX, kind, 0)) == fail(errno.EAFNOSUPPORT)
    assert judge(rule, (seccomp.AF_INET6, seccomp.SOCK_STREAM, 0)) == ALLOW


def test_tables_of_networks_are_set_up_in_no_nursery_but_one_whose_kernels_have_a_gateway() -> None:
    def answers(profile: str) -> list[int]:
        rule = dict(seccomp.verdicts(profile))["socket"]
        assert isinstance(rule, Rule)
        kind = seccomp.AF_NETLINK, seccomp.SOCK_RAW
        return [number for number in range(64) if judge(rule, (*kind, number)) == ALLOW]

    route, netfilter = seccomp.NETLINK_ROUTE, seccomp.NETLINK_NETFILTER
    assert answers(seccomp.NETWORKED) == [route, netfilter]
    for profile in (seccomp.KERNEL, seccomp.NURSERY, seccomp.GATEWAY):
        assert answers(profile) == [route]
