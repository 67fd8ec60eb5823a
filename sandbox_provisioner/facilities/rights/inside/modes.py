"""modes.py - PID 1 of a sandbox whose kernel is root in it: changes the modes of files for it, but
for set-id bits.

Packages have programs with such bits, and dpkg gives up where it cannot set them. No program gains
anything by them in a box; in the work directory of a user they would lend that user's identity to
whoever runs the program on the host. So the filter has us answer such a call: of a file that lies
on the box's own root we change the mode, without these bits, and of any other one we refuse it.

    kernel, or what it runs    chmod(2) with a set-id bit ── waits
    PID 1                      finds the very file that is meant, changes its mode, answers

What the caller has told us lies in its memory, which it may change meanwhile; so nothing is looked
at twice, and it does not go on with the call itself (seccomp_unotify(2)).
"""

from __future__ import annotations

import errno
import os
import select
import stat

from sandbox_provisioner.inside import kernel_calls as kernel
from sandbox_provisioner.inside.watcher import Watcher

TYPE_CHECKING = False  # as typing has it, without its import
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sandbox_provisioner.inside.watcher import Init

# By their numbers: which argument names a directory, a path in it, the mode, and flags.
_CALLS: dict[str, dict[int, tuple[int | None, int | None, int, int | None]]] = {
    "x86_64": {90: (None, 0, 1, None), 91: (0, None, 1, None), 268: (0, 1, 2, None),
               452: (0, 1, 2, 3)},
    "aarch64": {52: (0, None, 1, None), 53: (0, 1, 2, None), 452: (0, 1, 2, 3)},
}  # fmt: skip
_WITHOUT_SET_ID = 0o1777
_MOST_PATH = 4096
_PAGE = 4096
_AT_SYMLINK_NOFOLLOW, _AT_EMPTY_PATH = 0x100, 0x1000
# As the C library names a descriptor that it has no other call for.
_OWN_DESCRIPTORS = (b"/proc/self/fd/", b"/dev/fd/")
# No other mount than that of the box's root, and no file that only somebody's /proc leads to.
_ON_ROOT = kernel.RESOLVE_NO_XDEV | kernel.RESOLVE_NO_MAGICLINKS
_CAP_FOWNER_BIT = 1 << kernel.CAP_FOWNER


class Modes(Watcher):
    """*kernels_end* is the socket by which the kernel hands over the listener of its filter."""

    def __init__(self) -> None:
        self.kernels_end = self._ours = self._listener = self._root = -1

    def prepare(self, pair: tuple[int, int]) -> None:
        """Before the fork; *pair* are the ends of a socket pair."""
        self._ours, self.kernels_end = pair

    def watch(self) -> Modes | None:
        """None where nobody asks."""
        return self if self._ours >= 0 else None

    def begin(self, init: Init) -> None:
        """From here on only the kernel has its end."""
        os.close(self.kernels_end)
        self._root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def waits(self) -> Iterable[tuple[int, int]]:
        """The listener, as soon as we have it."""
        fds = [fd for fd in (self._ours, self._listener) if fd >= 0]
        return [(fd, select.POLLIN) for fd in fds]

    def serve(self, init: Init, ready: dict[int, int]) -> None:
        """One call at a time."""
        if self._ours in ready:
            _, found = kernel.receive_descriptors(self._ours)
            os.close(self._ours)
            self._ours, self._listener = -1, (found or [-1])[0]
        elif events := ready.get(self._listener, 0):
            if not events & select.POLLIN:  # nobody has the filter any more
                os.close(self._listener)
                self._listener = -1
            else:
                self._answer()

    def _answer(self) -> None:
        try:
            mark, pid, number, arguments = kernel.asked(self._listener)
        except OSError:
            return  # it has ended meanwhile
        code = 0
        try:
            self._change(pid, number, arguments, lambda: kernel.still_asks(self._listener, mark))
        except OSError as error:
            code = error.errno or errno.EPERM
        except (ValueError, KeyError, IndexError):  # what we cannot mean ends no box
            code = errno.EPERM
        try:
            kernel.answer(self._listener, mark, code)
        except OSError:
            return

    def _change(
        self, pid: int, number: int, arguments: tuple[int, ...], is_there: Callable[[], bool]
    ) -> None:
        folder, path, mode, flags = _CALLS[kernel.MACHINE][number]
        given = arguments[flags] & 0xFFFFFFFF if flags is not None else 0
        fd = self._file(
            pid,
            arguments[folder] if folder is not None else kernel.AT_FDCWD,
            _text_at(pid, arguments[path]) if path is not None else b"",
            given | (_AT_EMPTY_PATH if path is None else 0),
        )
        try:
            may = _may_change(pid, os.fstat(fd))
            if not is_there():  # what has been looked at may be another process's
                raise OSError(errno.ESRCH, os.strerror(errno.ESRCH))
            if not may or _mount_of(fd) != _mount_of(self._root):
                raise OSError(errno.EPERM, os.strerror(errno.EPERM))
            os.chmod(f"/proc/self/fd/{fd}", arguments[mode] & _WITHOUT_SET_ID)
        finally:
            os.close(fd)

    def _file(self, pid: int, folder: int, path: bytes, flags: int) -> int:
        """An O_PATH descriptor of what the process *pid* names by *path*, as seen from its
        descriptor *folder*."""
        for prefix in _OWN_DESCRIPTORS:
            digits = path.removeprefix(prefix)
            if digits != path and digits.isdigit():
                return _open_of(pid, f"fd/{int(digits)}")
        if path.startswith(b"/"):
            start = os.dup(self._root)
        else:
            number = folder & 0xFFFFFFFF
            is_here = number == kernel.AT_FDCWD & 0xFFFFFFFF
            start = _open_of(pid, "cwd" if is_here else f"fd/{number}")
        if not path and flags & _AT_EMPTY_PATH:
            return start
        try:
            if _mount_of(start) != _mount_of(self._root):
                raise OSError(errno.EPERM, os.strerror(errno.EPERM))
            how = os.O_PATH | (os.O_NOFOLLOW if flags & _AT_SYMLINK_NOFOLLOW else 0)
            return kernel.openat2(start, os.fsdecode(path), how, _ON_ROOT)
        except OSError as error:
            if error.errno in (errno.EXDEV, errno.ELOOP):
                raise OSError(errno.EPERM, os.strerror(errno.EPERM)) from None
            raise
        finally:
            os.close(start)


def _open_of(pid: int, name: str) -> int:
    """What *name* in /proc of the process leads to."""
    try:
        return os.open(f"/proc/{pid}/{name}", os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from None


def _text_at(pid: int, address: int) -> bytes:
    """The text that ends with a NUL at *address* of the memory of the process; with the NUL it has
    `_MOST_PATH` bytes at most, as PATH_MAX counts."""
    text = b""
    fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        while len(text) < _MOST_PATH:
            # A page at a time: the next one may not be there.
            place = address + len(text)
            found, end, _ = os.pread(fd, _PAGE - place % _PAGE, place).partition(b"\0")
            text += found
            if end and len(text) < _MOST_PATH:
                return text
            if end or not found:
                break
    except (OSError, OverflowError):  # EIO, and for an address that no file has
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT)) from None
    finally:
        os.close(fd)
    code = errno.ENAMETOOLONG if text else errno.EFAULT
    raise OSError(code, os.strerror(code))


def _may_change(pid: int, status: os.stat_result) -> bool:
    """Whether the caller may: chmod(2) lets the owner, and who has CAP_FOWNER."""
    with open(f"/proc/{pid}/status", "rb", buffering=0) as file:
        lines = dict(line.split(b":", 1) for line in file.readall().splitlines() if b":" in line)
    has_right = int(lines[b"CapEff"], 16) & _CAP_FOWNER_BIT
    return not stat.S_ISLNK(status.st_mode) and (
        bool(has_right) or int(lines[b"Uid"].split()[3]) == status.st_uid
    )


def _mount_of(fd: int) -> bytes:
    """proc_pid_fdinfo(5): the number of the mount that *fd* leads to."""
    with open(f"/proc/self/fdinfo/{fd}", "rb", buffering=0) as file:
        for line in file.readall().splitlines():
            if line.startswith(b"mnt_id:"):
                return line
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))
