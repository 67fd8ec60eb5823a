"""program.py - pure: the list of devices that a group may open, as cgroup v1 and v2 take it.

v1 has files to write (cgroup-v1/devices.rst). v2 has a program of the type
BPF_PROG_TYPE_CGROUP_DEVICE, which Linux runs whenever a process of the group opens a node or makes
one (cgroup-v2.rst, "Device controller"; linux/bpf.h, struct bpf_cgroup_dev_ctx): it gets the kind
and the access in one word, then major and minor, and answers 1 for yes. All instructions but the
last two of each entry go forward, so that nothing has to be proved of loops.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_CHARACTER = 2  # BPF_DEVCG_DEV_CHAR
_ACCESS = {"m": 1, "r": 2, "w": 4}  # BPF_DEVCG_ACC_MKNOD, _READ, _WRITE
# linux/bpf_common.h, linux/bpf.h: classes, sizes and modes as they are used here.
_LOAD_WORD = 0x61  # BPF_LDX | BPF_MEM | BPF_W
_AND = 0x54  # BPF_ALU | BPF_AND | BPF_K
_SHIFT_RIGHT = 0x74  # BPF_ALU | BPF_RSH | BPF_K
_COPY = 0xBC  # BPF_ALU | BPF_MOV | BPF_X
_SET = 0xB4  # BPF_ALU | BPF_MOV | BPF_K
_IF_OTHER = 0x55  # BPF_JMP | BPF_JNE | BPF_K
_EXIT = 0x95
_CONTEXT, _KIND, _WANTED, _MAJOR, _MINOR, _REST, _ANSWER = 1, 2, 3, 4, 5, 6, 0


@dataclass(frozen=True, slots=True)
class Allowed:
    """Character devices: *minor* None is every one of *major*."""

    major: int
    minor: int | None
    access: str = "rw"

    def of_v1(self) -> str:
        """As devices.allow has it."""
        return f"c {self.major}:{'*' if self.minor is None else self.minor} {self.access}"


def program(entries: Iterable[Allowed]) -> bytes:
    """What allows these and nothing else, in the byte order of this machine."""
    parts = [
        _instruction(_LOAD_WORD, _KIND, _CONTEXT, offset=0),
        _instruction(_AND, _KIND, value=0xFFFF),
        _instruction(_LOAD_WORD, _WANTED, _CONTEXT, offset=0),
        _instruction(_SHIFT_RIGHT, _WANTED, value=16),
        _instruction(_LOAD_WORD, _MAJOR, _CONTEXT, offset=4),
        _instruction(_LOAD_WORD, _MINOR, _CONTEXT, offset=8),
    ]
    for entry in entries:
        parts += _entry(entry)
    return b"".join((*parts, _instruction(_SET, _ANSWER, value=0), _instruction(_EXIT)))


def _entry(entry: Allowed) -> Iterator[bytes]:
    """The tests of one entry, each of which leads to the next entry where it fails."""
    more = ~sum(_ACCESS[letter] for letter in entry.access) & 7
    tests = [(_KIND, _CHARACTER), (_REST, 0), (_MAJOR, entry.major)]
    if entry.minor is not None:
        tests.append((_MINOR, entry.minor))
    yield _instruction(_COPY, _REST, _WANTED)
    yield _instruction(_AND, _REST, value=more)
    for position, (register, value) in enumerate(tests):
        to_next = len(tests) - position - 1 + 2
        yield _instruction(_IF_OTHER, register, offset=to_next, value=value)
    yield _instruction(_SET, _ANSWER, value=1)
    yield _instruction(_EXIT)


def _instruction(
    code: int, target: int = 0, source: int = 0, *, offset: int = 0, value: int = 0
) -> bytes:
    """struct bpf_insn; on the machines that we know its registers lie lowest first."""
    return struct.pack("<BBhi", code, target | source << 4, offset, value)
