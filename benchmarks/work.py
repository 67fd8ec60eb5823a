"""work.py - runs in the kernels that overhead.py compares: pieces of work, and how long each takes.

Its text is sent to them; it imports nothing but the standard library.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable

_PAGE = 4096
_MEBIBYTE = 1 << 20
_LEAST_REPEATS, _SECONDS = 3, 0.04
# Private: memory that is shared has small pages, whatever is asked for (shmem_enabled of Linux's
# transhuge.rst).
_private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_blocks = [mmap.mmap(-1, 32 * _MEBIBYTE, _private) for _ in range(2)]
for _block in _blocks:
    _block.madvise(mmap.MADV_DONTFORK)  # or a fork would copy its page tables
    # Where small pages lie is each process's luck, and changes a copy's speed by a third.
    _block.madvise(mmap.MADV_HUGEPAGE)
    _block[:] = bytes([1]) * len(_block)  # what was never written is one page of zeros
_null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
_zero = os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC)
_pipe = os.pipe()


def _compute(times: int) -> None:
    sum(number * number for number in range(times))


def _copy_memory(times: int) -> None:
    for _ in range(times):
        _blocks[0][:] = memoryview(_blocks[1])


def _touch_pages(times: int) -> None:
    with mmap.mmap(-1, times * _PAGE) as memory:
        for place in range(0, times * _PAGE, _PAGE):
            memory[place] = 1


def _getppid(times: int) -> None:
    for _ in range(times):
        os.getppid()


def _read(times: int) -> None:
    for _ in range(times):
        os.read(_zero, 1)


def _open_and_close(times: int) -> None:
    for _ in range(times):
        os.close(os.open("/dev/null", os.O_RDONLY))


def _ioctl(times: int) -> None:
    for _ in range(times):
        os.isatty(_null)


def _fcntl(times: int) -> None:
    for _ in range(times):
        fcntl.fcntl(_null, fcntl.F_GETFL)


def _map_and_unmap(times: int) -> None:
    for _ in range(times):
        mmap.mmap(-1, _PAGE).close()


def _pass_through_a_pipe(times: int) -> None:
    for _ in range(times):
        os.write(_pipe[1], b"x")
        os.read(_pipe[0], 1)


def _run_a_program(times: int) -> None:
    for _ in range(times):
        subprocess.run(["/bin/true"], check=True)


def _fork_and_run_a_program(times: int) -> None:
    """By fork in place of vfork. Not os.fork: a kernel has threads, and the child can wait for ever
    for a lock that one of them held."""
    subprocess._USE_VFORK = False  # type: ignore[attr-defined] # documented with subprocess
    try:
        _run_a_program(times)
    finally:
        subprocess._USE_VFORK = True  # type: ignore[attr-defined]


def _small_files(folder: str, times: int) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as here:
        for number in range(times):
            path = f"{here}/{number}"
            with open(path, "wb", buffering=0) as file:
                file.write(b"x" * 1024)
            os.stat(path)
            os.unlink(path)


def _files_in_the_work_directory(times: int) -> None:
    _small_files(".", times)


def _files_in_tmp(times: int) -> None:
    _small_files("/tmp", times)


def _start_threads(times: int) -> None:
    for _ in range(times):
        thread = threading.Thread(target=_null.bit_length)
        thread.start()
        thread.join()


# Each piece of work by its name in the table, and how often it is done between two looks at the
# clock: for some 1 ms where that can be had, since longer ones are interrupted by other work.
WORK: dict[str, tuple[Callable[[int], None], int]] = {
    "computing": (_compute, 10_000),
    "copying memory, 32 MiB": (_copy_memory, 1),
    "page fault": (_touch_pages, 512),
    "getppid": (_getppid, 5000),
    "read, 1 byte": (_read, 2000),
    "open and close": (_open_and_close, 200),
    "ioctl": (_ioctl, 2000),
    "fcntl": (_fcntl, 2000),
    "mmap and munmap": (_map_and_unmap, 100),
    "a byte through a pipe": (_pass_through_a_pipe, 1000),
    "run a program": (_run_a_program, 1),
    "fork and run a program": (_fork_and_run_a_program, 1),
    "small file, work directory": (_files_in_the_work_directory, 20),
    "small file, /tmp": (_files_in_tmp, 20),
    "thread": (_start_threads, 10),
}


def microseconds(name: str) -> float:
    """How long one time of this work takes: the best of some 40 ms, as other work only adds."""
    work, times = WORK[name]
    taken: list[float] = []
    while len(taken) < _LEAST_REPEATS or sum(taken) < _SECONDS:
        begin = time.perf_counter()
        work(times)
        taken.append(time.perf_counter() - begin)
    return min(taken) / times * 1e6
