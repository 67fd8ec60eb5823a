"""inside - runs in launcher, PID 1 and kernel: from first step to program.

May import: _signal, os, output, inside.kernel_calls, wire.
May raise: OSError (with every operand in its text).
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal without its enums
import os

from sandbox_provisioner.facilities.process.inside.output import Budget, Pump
from sandbox_provisioner.inside import kernel_calls as kernel
from sandbox_provisioner.inside import wire

TYPE_CHECKING = False  # as typing has it, without its import
if TYPE_CHECKING:
    from sandbox_provisioner.inside.box import Box

_OPEN_FILES = 1 << 20


class Output:
    """The pipes that the kernel writes to, stdout and stderr, and the numbers of those with a
    budget; *outlives_kernel*: PID 1 stays as long as any process does."""

    def __init__(self) -> None:
        self.pipes: list[tuple[int, int]] = []
        self.logged: tuple[int, ...] = ()
        self.outlives_kernel = False
        self._pumps: list[Pump] = []

    def begin(self) -> list[Pump]:
        """In PID 1, when the kernel has been forked: it alone writes from here on."""
        for number, (read_end, write_end) in enumerate(self.pipes, 1):
            os.close(write_end)
            self._pumps.append(Pump(read_end, number, Budget() if number in self.logged else None))
        return self._pumps

    def finish(self) -> bytes:
        """Pass on what is left; returns the last of stderr."""
        for pump in self._pumps:
            pump.finish()
        return self._pumps[-1].tail if self._pumps else b""


class Spare:
    """What a kernel from a nursery has, and one that waits for its start: descriptors that end with
    the nursery, by which it is claimed, and of what holds its groups; for how long, and while how
    much memory is available, it waits; pipes to and from the kernel; what it is bound to."""

    def __init__(self) -> None:
        self.nursery_fd = self.claims_fd = self.hold_fd = -1
        self.unclaimed: tuple[float, int] | None = None
        self.binding = self.ready = (-1, -1)
        self.bound = b""

    def wake(self, kernel_pid: int) -> None:
        """Let the kernel go on, with what it was bound to (`claim.py`)."""
        os.kill(kernel_pid, _signal.SIGCONT)
        binding = self.binding[1]
        rest = memoryview(self.bound)
        while rest:
            rest = rest[os.write(binding, rest) :]
        os.close(binding)


def exit_file(box: Box, path: str) -> None:
    """Open the file for init while its folder can still be reached."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    box.named["exit-file"] = [os.open(path, flags, 0o600)]


def hand_over(box: Box) -> None:
    """Send the server what was opened here, for a process that could not open it; and end."""
    names = "exit-file", "memory", "figures", wire.IMAGE_SERVER
    opened = (fd for name in names for fd in box.named.get(name, ()))
    fds = [*opened, *box.mounts.taken.values()]
    kernel.send_descriptors(box.control_fd, wire.message(wire.OPENED), fds)
    os._exit(0)


def await_opened(box: Box) -> None:
    """Go on when the server has sent what a launcher has opened for us; end if it has thought
    better of it."""
    word, box.received = kernel.receive_descriptors(box.control_fd)
    if not word:
        os._exit(0)


def stay_unclaimed(box: Box, idle_seconds: str, least_bytes: str) -> None:
    """Init waits for a server to claim this spare, for *idle_seconds* at most, and only while the
    machine has *least_bytes* of memory available; the kernel waits for its binding (`claim.py`)."""
    spare = box.part(Spare)
    spare.unclaimed = float(idle_seconds), int(least_bytes)
    spare.binding, spare.ready = os.pipe(), os.pipe()
    (spare.claims_fd,) = box.named["claims"]
    spare.hold_fd = box.named.get("hold", [-1])[0]


def bind_kernel(box: Box, path: str, *words: str) -> None:
    """The spare is for this start: it works in *path*; with its variables (`environment`) and its
    arguments, *words*, that is all that a kernel from a fresh launcher would know besides."""
    pairs = [name + b"=" + value for name, value in box.environment.items()]
    argv = [os.fsencode(word) for word in words]
    box.part(Spare).bound = wire.encode([[os.fsencode(path)], argv, pairs])


def outlive_kernel(box: Box) -> None:
    """Init stays after the program that it started, until there is no process left but itself."""
    box.part(Output).outlives_kernel = True


def survive_server(box: Box, *watching: str) -> None:
    """Do not end with who launches us; with "watching" there is a server that we end with, and
    that somebody else launches for."""
    box.survives_server = True
    box.ends_with_watched = bool(watching)


def stdio(box: Box, kind: str, *logged: str) -> None:
    """ "pump": init reads what the kernel writes and passes it on, so that the kernel holds no
    descriptor of the server's log or terminal. "inherit": the caller's own, as `run` wants it.
    Of stdout and stderr those that are *logged* have a budget (`output.py`)."""
    output = box.part(Output)
    if kind == "pump":
        output.pipes = [os.pipe(), os.pipe()]
    output.logged = tuple(("stdout", "stderr").index(name) + 1 for name in logged)


def terminal(_box: Box) -> None:
    """Make the terminal among the inherited descriptors ours, so that a shell has job control."""
    kernel.take_terminal(next(fd for fd in (0, 1, 2) if os.isatty(fd)))


def umask(_box: Box, mask: str) -> None:
    """umask(2): that of the server, which is how a person says who may read new files."""
    os.umask(int(mask, 8))


def environment(box: Box, *pairs: str) -> None:
    """The kernel's whole environment, as NAME=VALUE; nothing of the launcher's is in it."""
    for pair in pairs:
        name, _, value = os.fsencode(pair).partition(b"=")
        box.environment[name] = value


def chdir(_box: Box, path: str) -> None:
    """The directory in which the kernel starts."""
    os.chdir(path)


def execute(box: Box, *argv: str) -> None:
    """execve(2). The report pipe closes with it: the server reads the end of file as success."""
    kernel.close_on_exec_from(3)
    os.execve(argv[0], argv, box.environment)


def run_kernel(box: Box, *argv: str) -> None:
    """The last step in a process that has the kernel's program loaded already: leave what `execute`
    would leave, for the caller to run *argv*.

    Both signals are as Python sets them when it starts.
    """
    kernel.show_arguments(argv)
    for signal in (_signal.SIGPIPE, _signal.SIGXFSZ):
        _signal.signal(signal, _signal.SIG_IGN)
    kernel.set_dumpable(dumpable=True)
    spare = box.part(Spare)
    kept = sorted((spare.binding[0], spare.ready[1])) if spare.unclaimed else []
    first = 3
    for fd in (*kept, _OPEN_FILES):
        os.closerange(first, fd)
        first = fd + 1
    box.kernel_argv = argv


VERBS = (
    exit_file,
    hand_over,
    await_opened,
    stay_unclaimed,
    bind_kernel,
    outlive_kernel,
    survive_server,
    stdio,
    terminal,
    umask,
    environment,
    chdir,
    execute,
    run_kernel,
)
