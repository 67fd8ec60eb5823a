"""writing.py - in a box: the ways to write more than a limit of the disk allows.

Each writes into a directory until something stops it; `try_a_way` tells what that was.
"""

from __future__ import annotations


def plain(_, place):
    with open(f"{place}/file", "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))


def in_every_place(_, _place):
    import os

    files = [
        open(f"{each}/file", "wb", buffering=0)
        for each in (os.path.expanduser("~"), "/tmp", "/run", "/var/tmp")
    ]
    failed = None
    for file in files * 64:
        try:
            file.write(bytes(1 << 20))
        except OSError as error:
            failed = error
    raise failed


def sparsely(_, place):
    with open(f"{place}/file", "wb", buffering=0) as file:
        for number in range(1 << 20):
            file.seek(number << 16)
            file.write(bytes(4096))


def allocated(size, place):
    import os

    file = os.open(f"{place}/file", os.O_RDWR | os.O_CREAT)
    for number in range(64):
        os.posix_fallocate(file, number * size // 8, size // 8)


def unnamed(_, place):
    import os

    file = os.open(place, os.O_RDWR | os.O_TMPFILE)
    while True:
        os.write(file, bytes(1 << 16))


def deleted_but_open(_, place):
    import os

    kept = []
    while True:
        kept.append(os.open(f"{place}/file", os.O_RDWR | os.O_CREAT | os.O_EXCL))
        os.unlink(f"{place}/file")
        os.write(kept[-1], bytes(1 << 20))


def by_other_names(_, place):
    import os

    number = 0
    while True:
        with open(f"{place}/{number}", "wb", buffering=0) as file:
            file.write(bytes(1 << 20))
        for name in ("a", "b"):
            os.link(f"{place}/{number}", f"{place}/{number}{name}")
        os.unlink(f"{place}/{number}")
        number += 1


def in_attributes(_, place):
    import os

    number = 0
    while True:
        open(f"{place}/{number}", "w").close()
        for name in range(16):
            os.setxattr(f"{place}/{number}", f"user.{name}", bytes(200))
        number += 1


def in_empty_files(_, place):
    number = 0
    while True:
        open(f"{place}/{number}", "w").close()
        number += 1


def in_directories(_, place):
    import os

    number = 0
    while True:
        os.mkdir(f"{place}/{number:0>200}")
        number += 1


def in_links(_, place):
    import os

    number = 0
    while True:
        os.symlink("x" * 1000, f"{place}/{number}")
        number += 1


WAYS = (
    plain, in_every_place, sparsely, allocated, unnamed, deleted_but_open, by_other_names,
    in_attributes, in_empty_files, in_directories, in_links,
)  # fmt: skip


def try_a_way(name, size, place):
    """What stops it, and what it has got by then."""
    import os

    try:
        globals()[name](size, place)
    except OSError as error:
        found = os.statvfs(place)
        used = (found.f_blocks - found.f_bfree) * found.f_frsize
        return error.errno, used, found.f_files - found.f_ffree
    return 0, 0, 0


def close_all():
    """What the last way has left open."""
    import os

    os.closerange(3, 256)


def write_all(path):
    """How much can be written to it."""
    import os

    fd, written = -1, 0
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT)
        while True:
            written += os.write(fd, bytes(1 << 16))
    except OSError:
        return written
    finally:
        if fd >= 0:
            os.close(fd)


def map_more_than_there_is(place):
    import mmap
    import os

    file = os.open(f"{place}/sparse", os.O_RDWR | os.O_CREAT)
    os.ftruncate(file, 64 << 20)
    mapped = mmap.mmap(file, 64 << 20)
    for page in range(0, 64 << 20, 4096):
        mapped[page] = 1
