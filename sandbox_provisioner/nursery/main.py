"""nursery/main.py - runs in a nursery's box, in the kernel's own interpreter: preload, wait, fork.

Imports before the fork only what a kernel would import; `inside/` does the rest. It holds no
socket but the one that requests come through, no ZeroMQ context, no thread and no secret, since
every kernel inherits all of it. A child is PID 1 of a namespace from the beginning; it performs a
plan, and is the kernel. What is said is drawn in `inside/wire.py`.

It ends by itself when it is not worth its memory any more (`Patience`), and when a file that it has
imported changes: what it would fork is then not what a new kernel would be.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from sandbox_provisioner.facilities.caps.inside.memory import available_bytes
from sandbox_provisioner.inside import kernel_calls, wire
from sandbox_provisioner.inside.box import Box
from sandbox_provisioner.inside.say import say_who
from sandbox_provisioner.launcher import enter
from sandbox_provisioner.nursery.immortal import immortalize
from sandbox_provisioner.nursery.kernel import Kernel, initialized, is_unusual
from sandbox_provisioner.nursery.pages import forget_lookups, plug
from sandbox_provisioner.nursery.preload import (
    WHY,
    Watcher,
    empty_home,
    import_all,
    is_one_thread,
    open_files,
    put_in_home,
)

REQUEST_BYTES = 1 << 12
_BASE = ("ipykernel.kernelapp", "ipykernel.debugger", "ipykernel.zmqshell")
_REHEARSAL_SECONDS = 120
_TELL = """
import json, os, sys
told = list(sys.modules), dict(os.environ), {{n: len(c) for n, c in get_ipython().config.items()}}
json.dump(told, open({listed!r}, "w"))
"""
_LOOK_SECONDS = 5.0  # at the machine's memory, which no event tells of
# With fewer kernels it takes more memory than it saves (benchmarks/README.md, density).
_WORTH_KERNELS = 3
_MOST_OF_ERROR = 500
# Each fork copies the page tables of all that was imported, so the child is PID 1 at once.
_NAMESPACES = kernel_calls.CLONE_NEWUSER | kernel_calls.CLONE_NEWPID
_OF_INSTALLATION = (".pth", ".dist-info", ".egg-info", ".egg-link")


def main(argv: Sequence[str]) -> None:
    """Called as the nursery's program, with the listening socket as standard input.

    *argv*: the words of `Patience`; then the modules to preload, comma-separated, and those among
    them that turned out not to bear it.
    """
    begun = time.time()
    *words, preload, refusals = argv
    patience, wanted, refused = Patience(*map(float, words)), _names(preload), _refusals(refusals)
    listener = _taken_listener()
    gc.disable()
    before, home = dict(os.environ), os.listdir(os.environ["HOME"])

    def again(refused: dict[str, str]) -> None:
        os.dup2(listener.fileno(), 0)
        os.environ.clear()
        os.environ.update(before)
        empty_home(home)
        command = [*sys.orig_argv[: len(sys.orig_argv) - len(argv)], *argv[:-1]]
        words = ",".join(f"{name}={why}" for name, why in refused.items())
        os.execv(sys.executable, [*command, words])

    rehearsal = _import_base()
    kernel = Kernel()
    sockets = [what for _, what in open_files() if what.startswith("socket:")]
    if not is_one_thread() or len(sockets) > 1:
        raise SystemExit("ipykernel itself starts threads or opens sockets")
    _be_like_a_kernel(rehearsal)
    empty_home(home)
    watcher, failed = Watcher(), {}
    if why := rehearsal.why_not:
        refused = dict.fromkeys(wanted, why)
    bearable = [name for name in wanted if name not in refused]
    for name, error, why in import_all(bearable, watcher, kernel):
        if why:
            again(refused | {name: why})
        failed[name] = error[:_MOST_OF_ERROR]
    left = watcher.left_in_home()
    watched = Watched(begun)
    gc.collect()
    plug()
    kernel.list_modules()
    if not immortalize():
        forget_lookups()
    gc.freeze()
    told: dict[str, object] = {
        "preloaded": [n for n in wanted if n in sys.modules and n not in refused],
        "refused": {name: WHY[why] for name, why in refused.items()},
        "failed": failed,
    }
    box = _serve(listener, watched, patience, told)
    if box is None:
        os._exit(0)  # nothing that the shell would do at a kernel's end is ours to do
    imported = {name: v for name, v in os.environ.items() if before.get(name) != v}
    put_in_home(left)
    kernel.become(box, imported)


def _taken_listener() -> socket.socket:
    """What we were given as standard input, where nothing is from here on."""
    listener = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    return listener


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _refusals(text: str) -> dict[str, str]:
    """By the name of a module the word of `WHY`."""
    pairs = (item.rpartition("=") for item in _names(text))
    return {name: why for name, _, why in pairs}


# -- what a kernel imports


class Rehearsal(NamedTuple):
    """What a real kernel has done that has run its first cells: the modules that it has imported,
    in their order, the variables that it has set, and whether a configuration file has had
    something to say to its shell."""

    modules: Sequence[str] = ()
    variables: Mapping[str, str] = {}
    makes_own_shell: bool = False

    @property
    def why_not(self) -> str:
        """The word of `WHY` that no module can be preloaded, "" if one can."""
        if not self.modules:
            return "rehearsal"
        return "shell" if self.makes_own_shell else ""


def _import_base() -> Rehearsal:
    """What every kernel imports; without what is missing, which each kernel tells by itself."""
    _import_there(_BASE)
    rehearsal = _rehearse()
    _import_there(rehearsal.modules)
    return rehearsal


def _import_there(names: Iterable[str]) -> None:
    for name in names:
        if name not in sys.modules:
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def _be_like_a_kernel(rehearsal: Rehearsal) -> None:
    """In what a module may look at when it is imported."""
    os.environ.update(rehearsal.variables)
    with contextlib.suppress(ImportError):
        launcher = importlib.import_module("ipykernel_launcher")
        sys.argv = [os.path.abspath(launcher.__file__ or ""), "-f", "/any"]


def _rehearse() -> Rehearsal:
    folder = f"/tmp/rehearsal-{os.getpid()}"
    os.mkdir(folder, 0o700)
    connection = f"{folder}/connection.json"
    info = {"transport": "ipc", "ip": f"{folder}/s", "key": "", "signature_scheme": "hmac-sha256"}
    names = ("shell_port", "iopub_port", "stdin_port", "control_port", "hb_port")
    with open(connection, "w") as file:
        json.dump(info | {name: number for number, name in enumerate(names, 1)}, file)
    listed = f"{folder}/modules"
    words = ["-f", connection, "--IPKernelApp.log_level=50"]
    kernel = _forked(lambda: initialized(words).start())
    client = _forked(lambda: _visit(connection, listed))
    _end_both(kernel, client)
    try:
        with open(listed) as file:
            modules, variables, config = json.load(file)
    except (OSError, ValueError):
        return Rehearsal()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    known = [n for n in modules if not n.startswith(("sandbox_provisioner", "__main__"))]
    new = {name: value for name, value in variables.items() if os.environ.get(name) != value}
    return Rehearsal(known, new, is_unusual(config))


def _end_both(*pids: int) -> None:
    """Wait until one of them has ended, and then for no other: whom it spoke with would wait for
    ever."""
    pidfds = [os.pidfd_open(pid) for pid in pids]
    select.select(pidfds, [], [], _REHEARSAL_SECONDS)
    for pid, pidfd in zip(pids, pidfds, strict=True):
        os.kill(pid, 9)  # the dead whom nobody has waited for too
        os.close(pidfd)
        os.waitpid(pid, 0)


def _forked(call: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            call()
        finally:
            os._exit(0)
    return pid


def _visit(connection: str, listed: str) -> None:
    """What a person's first cells make a kernel import. Not what the first completion of a name
    does: it weighs a sixth of all, is then a small part of what that completion takes, and a kernel
    that is alone with its nursery's pages would pay for it whether it is ever asked for or not."""
    from jupyter_client.blocking.client import BlockingKernelClient  # noqa: PLC0415

    client = BlockingKernelClient(connection_file=connection)
    client.load_connection_file()
    # Without a heart, after a beat of which that is missed `wait_for_ready` gives up: on a busy
    # machine the kernel takes longer than that second to bind its sockets.
    client.start_channels(hb=False)
    client.wait_for_ready(timeout=_REHEARSAL_SECONDS)
    for code in ("1 + 1", "print('a'); 1/0", "%pwd", "display(1)"):
        client.execute_interactive(code, output_hook=lambda message: None)
    client.inspect("print", reply=True, timeout=10)
    client.is_complete("1 +")
    code = _TELL.format(listed=listed)
    client.execute_interactive(code, output_hook=lambda message: None)
    client.shutdown(reply=True, timeout=10)


# -- whether it is still what a new kernel would be


class Watched:
    """What was imported, as files that may change. What is merely added beside it is seen by every
    kernel when it looks for a module, but for what says that something was installed."""

    def __init__(self, begun: float) -> None:
        """*begun* is when the first of it was imported."""
        files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
        # Some modules are no files, and have a name all the same.
        paths = {os.path.realpath(file) for file in files if file and os.path.exists(file)}
        folders = {os.path.dirname(path) for path in paths}
        # Of a package that is replaced as a whole the folder above it tells.
        self._names = {os.path.basename(path) for path in paths | folders}
        folders |= {path for path in sys.path if os.path.isdir(path)}
        self.fd = kernel_calls.watch_changes(sorted(folders))
        if max(os.stat(path).st_mtime for path in paths) > begun:
            raise SystemExit("a module was changed while it was being imported")

    def has_changed(self) -> bool:
        """Whether some of it has; does not wait."""
        while select.select([self.fd], [], [], 0)[0]:
            for name in kernel_calls.names_of_changes(os.read(self.fd, 1 << 16)):
                if name in self._names or name.endswith(_OF_INSTALLATION):
                    return True
        return False


# -- whether it is worth its memory


class Patience:
    """How long it waits for somebody to ask. What it costs is its own memory; what it saves is what
    its kernels share with it, and that they are ready sooner."""

    def __init__(self, idle: float, lonely: float, least_bytes: float) -> None:
        """*idle*: seconds without a request; *lonely*: seconds with so few kernels that share its
        memory that they would take less without it; *least_bytes*: with less available on this
        machine it does not wait at all."""
        self.idle, self.lonely, self.least_bytes = idle, lonely, least_bytes
        self.look_seconds = min(idle, lonely, _LOOK_SECONDS)
        self.kernels: list[int] = []
        self.renew()

    def renew(self) -> None:
        """Somebody has asked."""
        self.since = time.monotonic()

    def is_over(self) -> bool:
        """Whether it has waited long enough."""
        waited = time.monotonic() - self.since
        if waited >= self.idle or available_bytes() < self.least_bytes:
            return True
        self.kernels = [pid for pid in self.kernels if _exists(pid)]
        return waited >= self.lonely and len(self.kernels) < _WORTH_KERNELS


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # under a root server it has ids of its own
        pass
    return True


# -- requests


def _serve(
    listener: socket.socket, watched: Watched, patience: Patience, told: dict[str, object]
) -> Box | None:
    """Answer requests until it is over (None); in a child its box, when it is to be the kernel."""
    # A spare has one end, and ends when the other one closes: with this process.
    alive, ours = os.pipe()
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    poll.register(watched.fd, select.POLLIN)
    while True:
        ready = dict(poll.poll(patience.look_seconds * 1000))
        if watched.fd in ready and watched.has_changed():
            return None
        if not ready and patience.is_over():
            return None
        if listener.fileno() not in ready:
            continue
        connection, _ = listener.accept()
        with connection:
            text, fds, _, _ = socket.recv_fds(connection, REQUEST_BYTES, 8)
            word, _ = wire.parts(text)
            patience.renew()
            if word == wire.FORK:
                if (pid := kernel_calls.fork_as_sibling(_NAMESPACES)) == 0:
                    listener.close()
                    connection.close()
                    os.close(watched.fd)
                    os.close(ours)
                    return _child(fds[0], alive)
                patience.kernels.append(pid)
                for fd in fds:
                    os.close(fd)
            elif word == wire.STATUS:
                connection.send(json.dumps(told).encode())
            elif word == wire.RETIRE:
                return None


def _child(control: int, alive: int) -> Box:
    """Be PID 1 of a box, then the kernel: what a launcher, PID 1 and the kernel are in a cold
    start."""
    try:
        say_who(control, wire.HERE)
        return enter.obey(control, alive)
    except OSError:  # the server has gone
        os._exit(wire.FAILED_STATUS)
