"""launcher/init.py - PID 1 of the sandbox: reaps, relays signals, passes output on, tells the end.

PID 1 gets only the signals that it asks for (pid_namespaces(7)): a kernel in its place would ignore
SIGTERM, and would keep its orphans as zombies. Signals for the kernel come from outside as
real-time signals, over a pidfd of this very process, so that no stranger can be hit. It ends with
the server, which it learns by the end of the control socket, or, where a child of the server's
holds that too, by the server's pidfd. What it hears and tells is drawn in `wire.py`.

When PID 1 ends, the Linux kernel ends every process of the namespace. Under the confinement
"landlock" there is no PID namespace: we are an ordinary process outside of the kernel's Landlock
domain, which therefore cannot signal or trace us, and before we end we end everybody (`family.py`).
Who wants the end of such a sandbox sends us the relayed SIGKILL; our own death would leave others.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal without its enums
import os
import select
import time

from sandbox_provisioner.facilities.caps.inside import Caps, memory
from sandbox_provisioner.facilities.landlock.inside import Landlock
from sandbox_provisioner.facilities.process.inside import Output, Spare, output
from sandbox_provisioner.facilities.root.inside.folders import Folders, own_folders
from sandbox_provisioner.facilities.sockets.inside import Seal, Sockets
from sandbox_provisioner.facilities.workdir.inside import Workdir
from sandbox_provisioner.facilities.workdir.inside.covers import CoverLost, Watch
from sandbox_provisioner.inside import kernel_calls as kernel
from sandbox_provisioner.inside import wire
from sandbox_provisioner.inside.box import Box
from sandbox_provisioner.inside.printable import with_place
from sandbox_provisioner.launcher import family

CAP_DAC_READ_SEARCH = 2
CAP_KILL = 5
CAP_SYS_PTRACE = 19
_ENODEV = 19
_SIGINT = 2
_SIGBUS = 7
_SIGKILL = 9
_SIGCHLD = 17
_SIGCONT = 18
# What an administrator's kill(1) sends is for the kernel as well.
_RELAYED = wire.RELAYED | {1: 1, 2: 2, 15: 15}
_LISTENED = (_SIGCHLD, *_RELAYED)
_LISTEN_SOON_MS = 1
_ENDED_OF_IT_SECONDS = 1.0
_CHUNK = 4096


def block_signals() -> None:
    """Before the fork, so that no signal is lost between it and `run`."""
    _signal.pthread_sigmask(_signal.SIG_BLOCK, _LISTENED)


def unblock_signals() -> None:
    """In the kernel's process."""
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, _LISTENED)


def watch_covers(box: Box) -> None:
    """Before anything of the kernel's runs. Where the mounts are the host's nothing is covered, and
    what changes is not ours."""
    if box.namespaces:
        workdir = box.part(Workdir)
        workdir.watch = Watch(workdir.covers, workdir.begun)


class _Init:
    def __init__(self, box: Box, kernel_pid: int) -> None:
        self.box = box
        self.kernel_pid = kernel_pid  # 0 when it has ended, and we have not
        self.last_code = 0
        self.pumps = []
        self.output, self.caps = box.part(Output), box.part(Caps)
        for number, (read_end, write_end) in enumerate(self.output.pumps, 1):
            os.close(write_end)
            budget = output.Budget() if number in self.output.logged else None
            self.pumps.append(output.Pump(read_end, number, budget))
        # Kept apart: a pump leaves the list at its end of file, which may come before the death.
        self.stderr = self.pumps[-1] if self.pumps else None
        for name in box.part(Landlock).kept_of_kernel:
            self.keep(f"/proc/{kernel_pid}/{name}")
        self.signals = kernel.signal_fd(_LISTENED)
        self.poll = select.poll()
        self.covers = box.part(Workdir).watch
        # Where the mounts are the host's, they are full of others' files, too.
        self.folders = own_folders() if box.namespaces else None
        self.interrupted_until = 0.0
        self.seal = Seal(box) if box.part(Sockets).names else None
        # Not until the kernel listens; one that was claimed does so already.
        self.memory: memory.Memory | None = None if self.seal else self.caps.memory
        if self.memory and not box.part(Spare).bound:
            self.memory.arm()

    def wake(self) -> None:
        """Let the kernel of a spare go on, with what it was bound to (`claim.py`)."""
        os.kill(self.kernel_pid, _SIGCONT)
        spare = self.box.part(Spare)
        binding = spare.binding[1]
        rest = memoryview(spare.bound)
        while rest:
            rest = rest[os.write(binding, rest) :]
        os.close(binding)
        os.set_blocking(self.box.control_fd, False)

    def keep(self, path: str) -> None:
        """See `landlock.inside.keep_paths`; nothing if the kernel has ended already."""
        try:
            self.box.part(Landlock).kept.append(os.open(path, os.O_PATH | os.O_CLOEXEC))
        except OSError:
            return

    def watch(self) -> None:
        """Register what to wait for: a pump either reads or writes, never blocks in between."""
        self.poll.register(self.signals, select.POLLIN)
        if self.covers:
            self.poll.register(self.covers.mounts, select.POLLPRI)
            if self.covers.events >= 0:
                self.poll.register(self.covers.events, self.covers.mask)
        if self.box.control_fd >= 0:
            self.poll.register(self.box.control_fd, select.POLLIN)
        if not self.box.survives_server:
            self.poll.register(self.box.server_fd, select.POLLIN)
        if self.seal:
            self.poll.register(self.seal.events, select.POLLIN)
        if self.memory:
            self.poll.register(self.memory.fd, self.memory.mask)
        for pump in self.pumps:
            if pump.waiting:
                self.poll.register(pump.write_fd, select.POLLOUT)
            else:
                self.poll.register(pump.read_fd, select.POLLIN)

    def patience(self) -> int | None:
        """How many milliseconds without an event: what tells no event has to be looked at."""
        if self.seal and not self.seal.is_closed and self.seal.bound():
            return _LISTEN_SOON_MS
        waits = [pump.patience() for pump in self.pumps]
        waits.append(self.memory.patience if self.memory else None)
        waits.append(self.covers.patience() if self.covers else None)
        waits.append(self.folders.patience() if self.folders else None)
        return min((wait for wait in waits if wait is not None), default=None)

    def loop(self) -> None:
        while True:
            self.watch()
            ready = dict(self.poll.poll(self.patience()))
            # Before the covers: whoever sweeps after a server that has ended would remove what is
            # made for them now.
            if self.box.server_fd in ready:
                self.end_with_server()
            if self.covers:
                self.serve_covers(self.covers, ready)
            # Output first: what the kernel wrote before it died belongs to its tail.
            for pump in list(self.pumps):
                self.serve_pump(pump, ready)
            if self.box.control_fd in ready:
                self.serve_control()
            if self.seal:
                self.serve_seal(self.seal, ready)
            if self.memory and (self.memory.fd in ready or self.memory.patience):
                self.serve_memory(self.memory)
            if self.folders:
                self.serve_folders(self.folders)
            if self.signals in ready:
                self.serve_signal()

    def serve_pump(self, pump: output.Pump, ready: dict[int, int]) -> None:
        if pump.write_fd in ready and pump.waiting:
            pump.drain()
            if not pump.waiting:
                self.poll.unregister(pump.write_fd)
        elif pump.read_fd in ready:
            self.poll.unregister(pump.read_fd)
            if not pump.fill():
                pump.end()
                os.close(pump.read_fd)
                self.pumps.remove(pump)
        elif pump.patience() == 0:
            self.poll.unregister(pump.read_fd)
            pump.report()

    def serve_seal(self, seal: Seal, ready: dict[int, int]) -> None:
        if seal.events in ready and seal.misused(_CHUNK):
            self.give_up(wire.SOCKETS_MISUSED)
        if not seal.is_closed and seal.bound() and seal.listening():
            self.end_start(seal)

    def serve_signal(self) -> None:
        number = int.from_bytes(os.read(self.signals, 128)[:4], "little")
        if number == _SIGCHLD:
            self.reap()
        else:
            self.relay(_RELAYED[number])

    def serve_covers(self, watch: Watch, ready: dict[int, int]) -> None:
        """First of all: until everybody is stopped, something may be bare."""
        heard = watch.events in ready and watch.heard()
        if heard or (watch.mounts in ready and watch.lost()):
            self.mend(watch)

    def mend(self, watch: Watch) -> None:
        """Cover again what a program outside has laid bare, or end."""
        try:
            mended = watch.mended()
        except CoverLost as lost:
            self.give_up(f"{wire.COVER_LOST} {wire.in_hexadecimal(str(lost))}")
        for path in mended:
            self.tell(wire.COVERED, path)

    def serve_memory(self, watched: memory.Memory) -> None:
        try:
            used = watched.look(self.kernel_pid)
            kills = watched.child_killed(self.kernel_pid)
        except OSError as error:
            if error.errno != _ENODEV:
                raise
            self.give_up(wire.GROUP_LOST)  # somebody has removed it: no limit holds any more
        if kills:
            # The server first: who reads the sentence may ask it at once.
            self.tell(wire.KILLED, str(kills))
            if watched.killed:
                memory.say(self.kernel_pid, f"\n{watched.killed}\n")
        if used and memory.hears(self.kernel_pid, _SIGINT):
            self.interrupt(watched, used)

    def serve_folders(self, folders: Folders) -> None:
        for sentence in folders.look():
            self.tell(wire.FULL, sentence.partition(" ")[0])
            memory.say(self.kernel_pid, f"\n{sentence}\n")

    def interrupt(self, watched: memory.Memory, used: int) -> None:
        """Tell first: the cell that the interrupt ends is the one to show it."""
        memory.say(self.kernel_pid, f"\n{watched.sentence(used)}\n")
        self.relay(_SIGINT)
        self.interrupted_until = time.monotonic() + _ENDED_OF_IT_SECONDS
        self.tell(wire.MEMORY, str(used))

    def tell(self, word: str, *rest: str) -> None:
        """Tell the server, if it listens; nobody may have to wait for one that does not."""
        try:
            os.write(self.box.control_fd, wire.message(word, *rest))
        except OSError:
            return

    def relay(self, number: int) -> None:
        if not self.kernel_pid:
            return
        try:
            os.kill(-self.kernel_pid, number)
        except ProcessLookupError:
            os.kill(self.kernel_pid, number)  # it has not made its session yet

    def reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                if self.output.outlives_kernel and not self.kernel_pid:
                    self.end(self.last_code)
                return
            if pid == 0:
                return
            if pid == self.kernel_pid and self.output.outlives_kernel:
                self.kernel_pid, self.last_code = 0, os.waitstatus_to_exitcode(status)
            elif pid == self.kernel_pid:
                code = os.waitstatus_to_exitcode(status)
                self.end(code, self.why(code))

    def why(self, code: int) -> str:
        """What is known of the end of a kernel with this *code*, at the moment of it."""
        if code == -_SIGKILL:
            return self.why_killed()
        if code == -_SIGBUS and self.folders:
            return self.folders.why()
        return wire.INTERRUPTED if time.monotonic() < self.interrupted_until else ""

    def why_killed(self) -> str:
        try:
            watched = self.caps.memory
            return wire.MEMORY_CAP if watched and watched.has_ended_it() else ""
        except OSError as error:
            if error.errno != _ENODEV:
                raise
            return wire.GROUP_LOST

    def give_up(self, why: str) -> None:
        """End a kernel that must not go on."""
        self.end(wire.FAILED_STATUS, why)

    def end(self, code: int, why: str = "") -> None:
        for pump in self.pumps:
            pump.finish()
        tail = self.stderr.tail if self.stderr else b""
        signal = -code if code < 0 else 0
        if not self.box.namespaces:
            family.end_all()
        _tell_end(self.box, wire.exit_file(max(code, 0), signal, why, tail))
        os._exit(code if code >= 0 else 128 + signal)

    def serve_control(self) -> None:
        if told := os.read(self.box.control_fd, _CHUNK):
            word, sentence = wire.parts(told)
            if word == wire.SAY:
                memory.say(self.kernel_pid, f"\n{sentence}\n")
            return
        if not self.box.survives_server:
            self.end_with_server()
        self.poll.unregister(self.box.control_fd)
        os.close(self.box.control_fd)
        self.box.control_fd = -1

    def end_with_server(self) -> None:
        if not self.box.namespaces:
            family.end_all()
        os._exit(0)

    def end_start(self, seal: Seal) -> None:
        """Everything is bound: close the directory, give up CAP_SYS_ADMIN, tell the server."""
        try:
            seal.close()
            if seal.misused():  # just before
                self.give_up(wire.SOCKETS_MISUSED)
            if self.box.namespaces:
                kernel.set_capabilities(*_lasting_rights(self.box))
            answer = wire.message(wire.SEALED)
        except OSError as error:
            answer = wire.message(wire.UNSEALED, str(error))
        os.write(self.box.control_fd, answer)
        os.set_blocking(self.box.control_fd, False)
        if seal.is_mount:
            self.poll.unregister(seal.events)
            # The end of an inotify instance waits for a grace period of SRCU, some 15 ms.
            os.close(seal.events)
            self.seal = None
        if self.caps.memory:
            self.caps.memory.arm()
            self.memory = self.caps.memory


def _tell_end(box: Box, text: bytes) -> None:
    """The disk that the file is on may be full: then our exit status is all that tells."""
    try:
        os.write(box.exit_fd, text)
    except OSError:
        return


def tell_failure(box: Box, error: BaseException) -> None:
    """Leave in the exit file why we could not go on: an OSError is this machine's, anything else a
    mistake of ours."""
    text = with_place(error)
    is_ours = not isinstance(error, OSError | MemoryError)
    why = f"{wire.INTERNAL_ERROR} {wire.in_hexadecimal(text)}" if is_ours else ""
    tail = os.fsencode(f"The sandbox's init failed: {text}")
    _tell_end(box, wire.exit_file(wire.FAILED_STATUS, 0, why, tail))


def _lasting_rights(box: Box) -> tuple[int, ...]:
    if box.part(Workdir).covers:
        return CAP_KILL, kernel.CAP_SYS_ADMIN, CAP_SYS_PTRACE
    return (CAP_KILL,)


def run(box: Box, kernel_pid: int) -> None:
    """Be PID 1 until the kernel or the server ends; does not return.

    CAP_KILL stays, to signal the kernel, which has another user id; until the seal also what it
    takes to look into the kernel's directory of sockets and to make its mount read-only. Where
    there are covers it stays possible to mount, and to look who has what open. With files we can do
    what the kernel's user can, and no more.
    """
    try:
        if box.namespaces:
            kernel.drop_bounding_set()
            if box.files_as:
                kernel.set_filesystem_ids(*box.files_as)
                kernel.set_dumpable(dumpable=False)  # credentials(7): a change may reset it
            seals = box.part(Sockets).names
            until_sealed = (CAP_DAC_READ_SEARCH, kernel.CAP_SYS_ADMIN) if seals else ()
            kernel.set_capabilities(*_lasting_rights(box), *until_sealed)
        else:
            kernel.set_capabilities()
        kernel.set_no_new_privileges()
        started = _Init(box, kernel_pid)
        if box.part(Spare).bound:
            started.wake()
        covers = box.part(Workdir).covers
        if covers and started.covers:
            covers.made = lambda kind, path: started.tell(wire.MADE, kind, path)
            if started.covers.began_late:
                started.mend(started.covers)
        started.loop()
    except BaseException as error:
        tell_failure(box, error)
        if not box.namespaces:
            family.end_all()
    finally:
        os._exit(wire.FAILED_STATUS)
