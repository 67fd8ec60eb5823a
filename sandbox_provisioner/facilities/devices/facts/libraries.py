"""libraries.py - whoever launches; reads only: how another root's programs find libraries.

Programs ask for a library by its SONAME, "libcuda.so.1", and a specification mounts the file with
the driver's version in its name. ldconfig(8) makes the links between the two, and a list of
where they are; NVIDIA has it run by a hook, after each start. Here the links are read out of the
files, before it (elf(5)), and no program runs. What lies beside the root's own C library is found
without a list (ld.so(8)); of other folders a variable tells.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterable, Iterator, Set

from sandbox_provisioner.facilities.devices.facts.cdi import Link, MountWish
from sandbox_provisioner.root_files import RootFiles

_LIBRARY = re.compile(r"lib.+\.so\.\d[\w.]*")
_ASKED_FOR = re.compile(r"lib[\w.+-]+\.so(\.[\w.]+)?", re.ASCII)
_C_LIBRARY = "libc.so.6"
# What the C library and the compiler bring: another one in the place of these ends every program.
_OF_ROOT = re.compile(
    r"lib(c|m|mvec|pthread|dl|rt|util|resolv|nsl|anl|crypt|nss_\w+|thread_db"
    r"|c_malloc_debug|gcc_s|stdc\+\+)\.so.*"
)
# Of a file of 64 bits and this byte order; NVIDIA has no others for the machines that we run on.
_MAGIC = b"\x7fELF\x02\x01"
_LOADED, _DYNAMIC = 1, 2  # PT_
_END, _STRINGS, _SONAME = 0, 5, 14  # DT_
_MOST_ENTRIES = 512
_LONGEST_NAME = 256


def sonames(mounts: Iterable[MountWish]) -> Iterator[Link]:
    """What ldconfig would make beside the libraries among *mounts*."""
    for mount in mounts:
        folder, name = os.path.split(mount.target)
        if _LIBRARY.fullmatch(name):
            found = soname(mount.source)
            is_name = _ASKED_FOR.fullmatch(found) and not _OF_ROOT.fullmatch(found)
            if is_name and found != name:
                yield Link(path=f"{folder}/{found}", text=name)


def unsearched(mounts: Iterable[MountWish], listed: Set[str], files: RootFiles) -> tuple[str, ...]:
    """The folders of libraries among *mounts* that programs in the root of *files* do not look
    into; those that are *listed* for ldconfig are to be found, wherever they lie."""
    folders = {os.path.dirname(mount.target) for mount in mounts
               if _LIBRARY.fullmatch(os.path.basename(mount.target))}  # fmt: skip
    return tuple(sorted(f for f in folders if not _is_searched(f, files, is_listed=f in listed)))


def _is_searched(folder: str, files: RootFiles, *, is_listed: bool) -> bool:
    """Or lies below one that is: what is there, and not listed, is asked for with its path."""
    if is_listed:
        return bool(files.kind_at(f"{folder}/{_C_LIBRARY}"))
    while folder not in {"", "/"}:
        if files.kind_at(f"{folder}/{_C_LIBRARY}"):
            return True
        folder = os.path.dirname(folder)
    return False


def soname(path: str) -> str:
    """What the library at *path* is asked for by, "" if it does not say, or is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return _soname(fd)
    # Of a directory, where the file is too short, and where it says more than there can be.
    except (OSError, OverflowError, ValueError, struct.error):
        return ""
    finally:
        os.close(fd)


def _soname(fd: int) -> str:
    head = os.pread(fd, 64, 0)
    if not head.startswith(_MAGIC):
        return ""
    (at,), (count,) = struct.unpack_from("<Q", head, 32), struct.unpack_from("<H", head, 56)
    table = os.pread(fd, 56 * count, at)
    # p_type, p_offset, p_vaddr, p_filesz
    parts = [struct.unpack_from("<I4xQQ8xQ", table, 56 * n) for n in range(count)]
    for kind, offset, _, size in parts:
        if kind == _DYNAMIC:
            entries = os.pread(fd, min(size, 16 * _MOST_ENTRIES), offset)
            told = dict(_told(entries))
            break
    else:
        return ""
    for kind, offset, address, size in parts:
        start = told.get(_STRINGS, 0) - address
        if kind == _LOADED and _SONAME in told and 0 <= start < size:
            text = os.pread(fd, _LONGEST_NAME, offset + start + told[_SONAME])
            return text.partition(b"\0")[0].decode("ascii", "replace")
    return ""


def _told(entries: bytes) -> Iterator[tuple[int, int]]:
    for tag, value in struct.iter_unpack("<QQ", entries[: len(entries) // 16 * 16]):
        if tag == _END:
            return
        yield tag, value
