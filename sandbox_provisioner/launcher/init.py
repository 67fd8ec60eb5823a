"""launcher/init.py - PID 1 of the sandbox: reaps, relays signals, passes output on, tells the end.

PID 1 gets only the signals that it asks for (pid_namespaces(7)): a kernel in its place would ignore
SIGTERM, and would keep its orphans as zombies. Signals for the kernel come from outside as
real-time signals, over a pidfd of this very process, so that no stranger can be hit. It ends with
the server, which it learns by the end of the control socket, or, where a child of the server's
holds that too, by the server's pidfd. What it hears and tells is drawn in `wire.py`; what it waits
for, each a watcher of a facility's or of its own, in `watchers.py`.

When PID 1 ends, the Linux kernel ends every process of the namespace. Under the confinement
"landlock" there is no PID namespace: we are an ordinary process outside of the kernel's Landlock
domain, which therefore cannot signal or trace us, and before we end we end everybody (`family.py`).
Who wants the end of such a sandbox sends us the relayed SIGKILL; our own death would leave others.
"""

from __future__ import annotations

import os
import select

from sandbox_provisioner.facilities.landlock.inside import Landlock
from sandbox_provisioner.facilities.process.inside import Output, Spare
from sandbox_provisioner.inside import kernel_calls as kernel
from sandbox_provisioner.inside import wire
from sandbox_provisioner.inside.box import Box
from sandbox_provisioner.inside.printable import with_place
from sandbox_provisioner.inside.say import say_to_person
from sandbox_provisioner.launcher import family
from sandbox_provisioner.launcher.watchers import watchers_of

_CAP_KILL = 5
_SIGKILL = 9


class _Init:
    """What watchers have it do: `watcher.Init`."""

    def __init__(self, box: Box, kernel_pid: int) -> None:
        self.box = box
        self.kernel_pid = kernel_pid  # 0 when it has ended, and we have not
        self.is_starting = False
        box.part(Landlock).keep_of_kernel(kernel_pid)
        self.watchers = watchers_of(box)

    def loop(self) -> None:
        """Does not return: who knows of an end ends this process."""
        for watcher in self.watchers:
            watcher.begin(self)
        while True:
            ready = self.wait()
            for watcher in self.watchers:
                watcher.serve(self, ready)

    def wait(self) -> dict[int, int]:
        """For whatever comes first; what has come, by descriptor."""
        # A new one each time: who waits for something else now has nothing to take back.
        poll, patience = select.poll(), None
        for watcher in self.watchers:
            for fd, events in watcher.waits():
                poll.register(fd, events)
            wait = watcher.patience()
            if wait is not None and (patience is None or wait < patience):
                patience = wait
        return dict(poll.poll(patience))

    def tell(self, word: str, *rest: str) -> None:
        """Tell the server, if it listens; nobody may have to wait for one that does not."""
        try:
            os.write(self.box.control_fd, wire.message(word, *rest))
        except OSError:
            return

    def say(self, text: str) -> None:
        """To the person at the notebook, on lines of its own."""
        say_to_person(self.kernel_pid, f"\n{text}\n")

    def relay(self, number: int) -> None:
        """Send signal *number* to the kernel's group."""
        if not self.kernel_pid:
            return
        try:
            os.kill(-self.kernel_pid, number)
        except ProcessLookupError:
            os.kill(self.kernel_pid, number)  # it has not made its session yet

    def end_start(self, word: str, *rest: str) -> None:
        """Tell the server, which waits for it; from here on nobody waits for the server."""
        os.write(self.box.control_fd, wire.message(word, *rest))
        os.set_blocking(self.box.control_fd, False)
        self.is_starting = False

    def narrow_rights(self) -> None:
        """Keep those alone that are needed to the end."""
        if self.box.namespaces:
            kernel.set_capabilities(_CAP_KILL, *self.box.lasting_rights)

    def why(self, code: int) -> str:
        """What the first watcher that knows something tells of an end with this *code*."""
        return next(filter(None, (watcher.why(code) for watcher in self.watchers)), "")

    def give_up(self, why: str) -> None:
        """End a kernel that must not go on, for the reason *why*."""
        self.end(wire.FAILED_STATUS, why)

    def end(self, code: int, why: str = "") -> None:
        """Tell how the kernel has ended, and end with it."""
        tail = self.box.part(Output).finish()
        signal = -code if code < 0 else 0
        if not self.box.namespaces:
            family.end_all()
        _tell_end(self.box, wire.exit_file(max(code, 0), signal, why, tail))
        os._exit(code if code >= 0 else 128 + signal)

    def end_with_server(self) -> None:
        """Whoever finds what is left is told."""
        if not self.box.namespaces:
            family.end_all()
        _tell_end(self.box, wire.exit_file(0, _SIGKILL, wire.SERVER_ENDED, b""))
        os._exit(0)


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


def run(box: Box, kernel_pid: int) -> None:
    """Be PID 1 until the kernel or the server ends; does not return.

    _CAP_KILL stays, to signal the kernel, which has another user id; until the seal also what it
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
            rights = _CAP_KILL, *box.lasting_rights, *box.rights_until_sealed
            kernel.set_capabilities(*rights)
        else:
            kernel.set_capabilities()
        kernel.set_no_new_privileges()
        init = _Init(box, kernel_pid)
        if box.part(Spare).bound:
            box.part(Spare).wake(kernel_pid)
            os.set_blocking(box.control_fd, False)
        init.loop()
    except BaseException as error:
        tell_failure(box, error)
        if not box.namespaces:
            family.end_all()
    finally:
        os._exit(wire.FAILED_STATUS)
