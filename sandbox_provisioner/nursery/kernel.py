"""nursery/kernel.py - runs in a nursery, and in what it forks: a kernel, built as far as can be.

Before the fork there are the application, with its command line read, and the shell. After it comes
what one process alone may have: sockets, threads, the history's database, folders, random sources.
A spare then waits for its start, and is bound to it.

ipykernel is used as it is: `IPKernelApp.initialize` runs whole, and finds two of its steps done.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sandbox_provisioner.facilities.process.inside import Spare
from sandbox_provisioner.inside import orders, wire
from sandbox_provisioner.inside.box import Box
from sandbox_provisioner.nursery.pages import ListedModules, bring_names_together

_FILE_OPTION = "-f"
# The sections of a configuration that the usual command line makes.
_USUAL_SECTIONS = {"IPKernelApp"}
_ORDERLY_SECONDS = 5.0
# Those of ipykernel's application that hear clients, each in a loop of its own.
_LISTENERS = ("iopub_thread", "control_thread", "shell_channel_thread")
# What a shell does when it is made that one process alone may do, or that needs its folders.
_LATE = ("init_ipython_dir", "init_profile_dir", "init_history", "init_user_ns")


# Freeing an object, or looking a name up, writes to a page, which is this process's own from then
# on and no longer the nursery's. So we keep what we have used.
_ours: list[str] = []
_kept: list[object] = []


class Kernel:
    """A kernel that has no process yet: built once, in the nursery, and used in each child."""

    def __init__(self) -> None:
        """Build what can be built, with ipykernel and IPython of the kernel's environment."""
        self.main = sys.modules["__main__"]
        _ours[:] = [name for name in sys.modules if name.partition(".")[0] == "sandbox_provisioner"]
        self.app: Any = None
        self._lent: list[Any] = []
        with contextlib.suppress(ImportError):  # it says so itself, when it is asked for
            self._build()

    def _build(self) -> None:
        from ipykernel.compiler import XCachingCompiler  # noqa: PLC0415
        from ipykernel.kernelapp import IPKernelApp  # noqa: PLC0415
        from ipykernel.zmqshell import ZMQInteractiveShell  # noqa: PLC0415

        app: Any = IPKernelApp.instance()
        app.parse_command_line([_FILE_OPTION, "/any"])
        app.init_crash_handler()  # the shell remembers what it finds
        self.app = app
        self.shell_class: Any = ZMQInteractiveShell
        with _without(ZMQInteractiveShell, _LATE):
            self.shell: Any = ZMQInteractiveShell.instance(
                config=app.config, compiler_class=XCachingCompiler
            )

    def list_modules(self) -> None:
        """Called last of all: what it makes lies together."""
        bring_names_together()
        self.listed = ListedModules(_ours)

    def lend_streams(self) -> None:
        """Let modules that are imported from here on find the standard output and error that they
        will have in a kernel: some keep them, above all for logs."""
        if self.app is not None:
            sys.stdout, sys.stderr = map(_lent, (sys.stdout, sys.stderr))
            self._lent = [sys.stdout, sys.stderr]

    @contextlib.contextmanager
    def in_a_cell(self, note: Callable[[], None]) -> Iterator[None]:
        """While this lasts, modules find the shell as in a cell of a kernel; *note* is called when
        one asks for more of the kernel than whether there is one."""
        if self.app is None:
            yield
            return
        self.shell.kernel = _NoKernel(note)
        try:
            with self.shell.builtin_trap, self.shell.display_trap:
                yield
        finally:
            self.shell.kernel = None

    def become(self, box: Box, imported: Mapping[str, str]) -> None:
        """In the kernel's process, with every right given up: be the program of *box*, ipykernel
        or what follows ``-c``. *imported* are variables that modules set when they were imported.
        """
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        _set_variables(box.environment, imported)
        words = box.kernel_argv
        sys.executable = words[0]  # of several names of one interpreter
        if "-m" not in words:
            self._run_code(words[words.index("-c") + 1 :])
            return
        app = self._initialized(words[words.index("-m") + 2 :])
        if box.part(Spare).unclaimed:
            given = {os.fsdecode(name) for name in box.environment}
            _bind(app, box, {name: v for name, v in os.environ.items() if name not in given})
        app.start()
        _end_in_order(app)

    def _run_code(self, words: Sequence[str]) -> None:
        """What ``python -c`` does: tests look around so in a box that a nursery made."""
        _refresh()
        sys.modules["__main__"] = self.main
        sys.argv = ["-c", *words[1:]]
        sys.path.insert(0, "")
        exec(compile(words[0], "<string>", "exec"), vars(self.main))

    def _initialized(self, arguments: Sequence[str]) -> Any:
        """As `initialized`, from what was built; where *arguments* are others than those that it
        was built for, from the beginning."""
        if self.app is None:
            return initialized(arguments)
        if len(arguments) != 2 or arguments[0] != _FILE_OPTION:
            self.app.clear_instance()
            self.shell_class.clear_instance()
            return initialized(arguments)
        app = self.app
        _set_arguments(arguments)
        app.argv = list(arguments)
        app.connection_file = app.config.IPKernelApp.connection_file = arguments[1]
        app.parse_command_line = lambda argv=None: None
        app.init_kernel, app.init_io = self._init_kernel, self._init_io
        app.initialize()
        del app.parse_command_line, app.init_kernel, app.init_io
        _open_its_own_channel(app)
        return app

    def _init_io(self) -> None:
        """`IPKernelApp.init_io`, which makes the streams: of those that modules know already."""
        from ipykernel import iostream  # noqa: PLC0415

        kind, lent = iostream.OutStream, list(self._lent)

        def made(*words: Any, **options: Any) -> Any:
            stream = lent.pop(0)
            stream.__class__ = kind
            stream.__init__(*words, **options)
            return stream

        vars(iostream)["OutStream"] = made
        try:
            type(self.app).init_io(self.app)
        finally:
            vars(iostream)["OutStream"] = kind

    def _init_kernel(self) -> None:
        """`IPKernelApp.init_kernel`, which makes the kernel's object and finds a shell; it makes
        one where a configuration file has had something to say."""
        unusual = is_unusual(self.app.config)
        if unusual:
            self.shell_class.clear_instance()
        from ipykernel import ipkernel  # noqa: PLC0415

        vars(ipkernel)["sys"] = self.listed
        try:
            type(self.app).init_kernel(self.app)
        finally:
            vars(ipkernel)["sys"] = sys
        if not unusual:
            self._settle(self.app.kernel)

    def _settle(self, kernel: Any) -> None:
        """What the shell has not done when it was made."""
        shell = self.shell
        for name in set(shell.config) - set(self.app.config):
            self.app.config[name] = shell.config[name]  # made by looking for it
        shell.config = self.app.config
        shell.parent = shell.kernel = kernel
        shell.init_environment()
        shell.init_ipython_dir(None)
        shell.init_profile_dir(kernel.profile_dir)
        shell.starting_dir = os.getcwd()
        shell.save_sys_module_state()
        shell.init_history()
        shell.configurables.insert(1, shell.configurables.pop())  # where a new shell has it
        shell.init_user_ns()


def is_unusual(config: Mapping[str, Any]) -> bool:
    """Whether a configuration file has had something to say; looking for a section makes an empty
    one."""
    return bool({name for name, found in config.items() if found} - _USUAL_SECTIONS)


@contextlib.contextmanager
def _without(cls: type, names: Sequence[str]) -> Iterator[None]:
    """*cls* with methods that do nothing in place of those of *names*."""
    for name in names:
        setattr(cls, name, lambda self, *words: None)
    try:
        yield
    finally:
        for name in names:
            delattr(cls, name)


class _NoKernel:
    """Stands in for the kernel of a shell, where there is none yet."""

    def __init__(self, note: Callable[[], None]) -> None:
        self._note = note

    def __getattr__(self, name: str) -> object:
        self._note()
        raise AttributeError(name)


def _lent(raw: Any) -> Any:
    """What will be a kernel's stream of the name of *raw*, and is *raw* until then."""
    from ipykernel.iostream import OutStream  # noqa: PLC0415

    class Lent(OutStream):
        name, closed = raw.name.strip("<>"), False
        write, flush = (staticmethod(getattr(raw, call)) for call in ("write", "flush"))

        def __init__(self) -> None:
            """Not what a kernel's does."""

        def isatty(self) -> bool:
            return False

        def fileno(self) -> int:
            number: int = raw.fileno()
            return number

    return Lent()


def initialized(arguments: Sequence[str]) -> Any:
    """What ``python -m ipykernel_launcher`` is when it has bound its sockets and is about to wait
    for messages, in a process that has imported it."""
    from ipykernel.kernelapp import IPKernelApp  # noqa: PLC0415

    _set_arguments(arguments)
    app: Any = IPKernelApp.instance()
    app.initialize()
    return app


def _open_its_own_channel(app: Any) -> None:
    """Let the thread that publishes have what wakes it, a socket for each thread that it hears,
    also for itself. It makes that when it first publishes a print: a cold kernel's has done so
    before the first cell, and ours could not any more in a cell that has used all descriptors."""
    publisher = app.iopub_thread
    publisher.schedule(lambda: publisher.schedule(lambda: None))


def _set_arguments(arguments: Sequence[str]) -> None:
    import ipykernel_launcher  # noqa: PLC0415

    _refresh()
    sys.argv = [os.path.abspath(ipykernel_launcher.__file__), *arguments]


def _set_variables(wanted: Mapping[bytes, bytes], imported: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update({os.fsdecode(k): os.fsdecode(v) for k, v in wanted.items()})
    for name, value in imported.items():
        os.environ.setdefault(name, value)
    time.tzset()


def _end_in_order(app: Any) -> None:
    """Let the thread of the control channel end before the one that publishes: ipykernel ends them
    the other way round, and waits ten seconds for what the first still wants published. The sooner
    a kernel ends the more often: one of ten here."""
    control = getattr(app, "control_thread", None)
    if control and control.is_alive():
        control.stop()
        control.join(_ORDERLY_SECONDS)


def _bind(app: Any, box: Box, made: Mapping[str, str]) -> None:
    """Wait, as a spare, for the start that this is for (`launcher/claim.py`), and become what a
    kernel that had known of it from the beginning would be. *made* are variables that the kernel
    has set itself."""
    let_go = _hold_listeners(app)
    os.write(box.part(Spare).ready[1], wire.message(wire.READY))
    os.close(box.part(Spare).ready[1])
    found = orders.read_all(box.part(Spare).binding[0])
    if not found:
        os._exit(0)
    (cwd,), argv, pairs = wire.decode(found)
    os.chdir(cwd)
    _set_variables(dict(pair.split(b"=", 1) for pair in pairs), made)
    os.unlink(app.connection_file)
    words = [os.fsdecode(word) for word in argv]
    sys.executable = words[0]
    sys.argv[1:] = app.argv[:] = words[words.index("-m") + 2 :]
    app.connection_file = app.config.IPKernelApp.connection_file = sys.argv[2]
    with open(app.connection_file) as file:
        info = json.load(file)
    app.session.signature_scheme = info["signature_scheme"]
    app.session.key = info["key"].encode()
    let_go()
    shell = app.shell
    shell.init_environment()
    shell.starting_dir = os.getcwd()
    _tell_directory()
    shell.history_manager.dir_hist[:] = [Path.cwd()]
    if name := os.environ.get("JPY_SESSION_NAME"):
        shell.user_ns["__session__"] = shell.user_ns_hidden["__session__"] = name


def _hold_listeners(app: Any) -> Callable[[], None]:
    """Keep the threads that hear clients from it until what is returned is called. A client may be
    there as soon as the spare goes on, and would be answered, and judged, by the key that the
    spare was made with."""
    bound = threading.Event()

    def hold(held: threading.Event) -> None:
        held.set()
        bound.wait()

    for thread in (getattr(app, name, None) for name in _LISTENERS):
        if thread is not None:
            held = threading.Event()
            thread.io_loop.add_callback(hold, held)
            if not held.wait(_ORDERLY_SECONDS):
                raise RuntimeError(f"{thread} does not listen")
    return bound.set


def _refresh() -> None:
    """Random sources that Python's own fork hooks know nothing of; and nothing of ours is loaded
    that a kernel would not have loaded."""
    for name in _ours:
        _kept.append(sys.modules.pop(name))
    random = sys.modules.get("numpy.random")
    if random:
        random.seed()
    # Log records tell how old the program is; in nanoseconds since Python 3.13.
    in_ns = isinstance(vars(logging)["_startTime"], int)
    vars(logging)["_startTime"] = time.time_ns() if in_ns else time.time()
    process = sys.modules.get("multiprocessing.process")
    if process:
        process.current_process().authkey = os.urandom(32)
    if temporary := sys.modules.get("tempfile"):
        vars(temporary)["_name_sequence"] = None  # random, and known by its pid as well
    if openssl := sys.modules.get("_ssl"):
        # It knows forks by their pids (RAND_DRBG(7)), which are the same in each box.
        openssl.RAND_add(os.urandom(32), 32.0)
    _tell_directory()
    gc.enable()


def _tell_directory() -> None:
    """Who remembers in which directory the program was started."""
    if process := sys.modules.get("multiprocessing.process"):
        vars(process)["ORIGINAL_DIR"] = os.getcwd()
    if rich := sys.modules.get("rich"):  # its tracebacks name files as seen from there
        vars(rich)["_IMPORT_CWD"] = os.path.abspath(os.getcwd())
