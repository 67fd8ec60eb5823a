"""nursery/preload.py - runs in a nursery, before it forks: imports the modules that a person named.

What a module decides when it is imported is decided for every kernel. So it finds what it would
find in a kernel's first cell: the variables of one that has been rehearsed, its command line, its
shell, its streams (`kernel.py`), an empty home at the same path. What it leaves in that home every
kernel gets. Where it looked at what is each kernel's own, or holds what kernels would share,
no kernel can have it from here: `Watcher` says why, and it is imported in each kernel as ever.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

from sandbox_provisioner.nursery.kernel import Kernel

_MOST_HOME_BYTES = 4 << 20
_MOST_HOME_FILES = 256
# Who asks only to tell the names of sources that are no files ("<string>"), for a place to turn to
# where there is no /tmp, and who is told the right one in each kernel (`kernel._tell_directory`):
# rich comes with scikit-learn, and with all who have that.
_MAY_ASK = ("inspect", "tempfile", "multiprocessing.process", "rich")
_TEMPORARY = ("/tmp", "/dev/shm")
# What a module that is refused does, by the word that a new process is told it with.
WHY = {
    "threads": "it starts threads when it is imported",
    "processes": "it starts processes when it is imported",
    "files": "it keeps files or sockets open when it is imported",
    "memory": "it shares memory with other processes when it is imported",
    "directory": "it asks for the current directory when it is imported",
    "kernel": "it looks into the kernel when it is imported",
    "random": "it makes random numbers of its own when it is imported",
    "temporary": "it leaves files in /tmp or /dev/shm when it is imported",
    "home": "it writes too much to the home directory when it is imported",
    "rehearsal": "no kernel could be rehearsed here, so that nobody knows what it would find",
    "shell": "IPython has a configuration here, with which each kernel makes a shell of its own",
}


class Left(NamedTuple):
    """What an import has left at *path*: a file's *content*, None of a directory."""

    path: str
    mode: int
    content: bytes | None


def import_all(
    names: Iterable[str], watcher: Watcher, kernel: Kernel
) -> Iterator[tuple[str, str, str]]:
    """Import *names*; of each that is not there then, or shall not be: its name, the error, and the
    word of `WHY`. After a word this process is of no use any more."""
    kernel.lend_streams()
    for name in names:
        if name in sys.modules:
            continue
        error = ""
        try:
            with (
                kernel.in_a_cell(watcher.note_kernel),
                watcher.asked_for_directory(),
                quiet_allocators(),
            ):
                importlib.import_module(name)
        except Exception as found:
            error = f"{type(found).__name__}: {found}"
        why = watcher.why_not()
        if error or why:
            yield name, error, why


@contextlib.contextmanager
def quiet_allocators() -> Iterator[None]:
    """While this lasts, libraries start no threads that tidy up memory: Arrow's jemalloc has one,
    without which it does so when it is next asked for memory. Modules of Python do not see it."""
    name, word = "JE_ARROW_MALLOC_CONF", "background_thread:false"
    known = os.environ.get(name)
    os.putenv(name, f"{known},{word}" if known else word)
    try:
        yield
    finally:
        if known is None:
            os.unsetenv(name)
        else:
            os.putenv(name, known)


class Watcher:
    """What a module may not have done, by what was there before the first of them."""

    def __init__(self) -> None:
        """Called just before the first import."""
        self._home = _Tree(os.environ["HOME"])
        self._files = set(open_files())
        self._temporary = _names_in(_TEMPORARY)
        self._memory = len(_shared_memory())
        self._random = _own_randoms()
        self._asked = self._asked_kernel = False

    @contextlib.contextmanager
    def asked_for_directory(self) -> Iterator[None]:
        """Notice who asks which directory it is in: the start's, which nobody here knows."""
        known = os.getcwd, os.getcwdb

        def noting(call: Callable[[], Any]) -> Callable[[], Any]:
            def noted() -> Any:
                self._asked |= _asker() not in _MAY_ASK
                return call()

            return noted

        os.getcwd, os.getcwdb = map(noting, known)
        try:
            yield
        finally:
            os.getcwd, os.getcwdb = known

    def note_kernel(self) -> None:
        """Somebody asks for what only a kernel has."""
        self._asked_kernel = True

    def why_not(self) -> str:
        """A word of `WHY`, "" if nothing speaks against what was imported."""
        found = {
            "threads": not is_one_thread(),
            "processes": _has_children(),
            "files": set(open_files()) != self._files,
            "memory": len(_shared_memory()) > self._memory,
            "directory": self._asked,
            "kernel": self._asked_kernel,
            "random": _own_randoms() > self._random,
            "temporary": _names_in(_TEMPORARY) != self._temporary,
            "home": self._home.is_too_much(),
        }
        return next((word for word, is_so in found.items() if is_so), "")

    def left_in_home(self) -> list[Left]:
        """What was made there, for `put_in_home`."""
        return self._home.made()


def put_in_home(found: Iterable[Left]) -> None:
    """In a kernel: make in its home what imports have made in the nursery's, at the same path. What
    does not fit is left out, as the modules themselves would have to."""
    for left in found:
        with contextlib.suppress(OSError):
            os.makedirs(os.path.dirname(left.path), exist_ok=True)
            if left.content is None:
                os.mkdir(left.path)
            else:
                with open(left.path, "xb") as file:
                    file.write(left.content)
            os.chmod(left.path, left.mode)


def _asker() -> str:
    """The module that asks for the current directory, perhaps by a relative path."""
    frame = sys._getframe(2)
    while frame.f_back and frame.f_globals.get("__name__") == os.path.__name__:
        frame = frame.f_back
    return str(frame.f_globals.get("__name__"))


# -- what is there


def is_one_thread() -> bool:
    """OpenBLAS and others end their threads when their process forks, and start new ones where they
    are needed; so the question is put after a fork."""
    if len(os.listdir("/proc/self/task")) > 1:
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
    return len(os.listdir("/proc/self/task")) == 1


def open_files() -> list[tuple[int, str]]:
    """Each descriptor but the standard ones, and what it is."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own
            if int(name) > 2:
                found.append((int(name), os.readlink(f"/proc/self/fd/{name}")))
    return [(fd, what) for fd, what in found if not what.endswith("/fd")]


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _shared_memory() -> list[str]:
    """Mappings that stay shared after a fork, and that can be written to (proc_pid_maps(5))."""
    with open("/proc/self/maps") as lines:
        return [line for line in lines if line.split()[1][1:4:2] == "ws"]


def _own_randoms() -> int:
    """How many sources of random numbers there are that nothing makes anew in each kernel."""
    numpy = sys.modules.get("numpy.random")
    if numpy is None:
        return 0
    kinds = (numpy.Generator, numpy.RandomState)
    return sum(issubclass(type(one), kinds) for one in gc.get_objects()) - _of_numpy(numpy, kinds)


def _of_numpy(numpy: ModuleType, kinds: tuple[type, ...]) -> int:
    """numpy's own, which `kernel._refresh` seeds."""
    return len({id(one) for one in vars(numpy.mtrand).values() if isinstance(one, kinds)})


def _names_in(folders: Iterable[str]) -> set[str]:
    return {f"{folder}/{name}" for folder in folders for name in os.listdir(folder)}


def empty_home(kept: Iterable[str]) -> None:
    """Take away what has come into the nursery's home but for the names that are *kept*: a kernel's
    is as empty."""
    for entry in list(os.scandir(os.environ["HOME"])):
        if entry.name not in kept:
            with contextlib.suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    os.unlink(entry.path)


class _Tree:
    """A directory, and what has come into it since."""

    def __init__(self, top: str) -> None:
        self._top = top
        self._before = set(self._walk())

    def _walk(self) -> Iterator[str]:
        for folder, folders, files in os.walk(self._top):
            yield from (os.path.join(folder, name) for name in sorted((*folders, *files)))

    def is_too_much(self) -> bool:
        made = set(self._walk()) - self._before
        size = sum(os.lstat(path).st_size for path in made if not os.path.isdir(path))
        return len(made) > _MOST_HOME_FILES or size > _MOST_HOME_BYTES

    def made(self) -> list[Left]:
        """Each new path, what is above it first."""
        found: list[Left] = []
        for path in self._walk():
            if path in self._before or os.path.islink(path):
                continue
            if os.path.isdir(path):
                content = None
            else:
                with open(path, "rb") as file:
                    content = file.read()
            found.append(Left(path, stat.S_IMODE(os.stat(path).st_mode), content))
        return found
