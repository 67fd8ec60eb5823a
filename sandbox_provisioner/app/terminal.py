"""app/terminal.py - a command of its own: the person's terminal on one side, a box on the other.

::

    terminal ──keys──▶ us ──▶ pty master ═ pty slave: stdio of the command in the box
             ◀─screen─ us ◀──            its Ctrl-C, job control and window size

The box gets no descriptor of the person's terminal: whoever has one can read what is typed there,
after the box has ended too. What is no terminal (a pipe, a file) is passed through.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import struct
import sys
import termios
import tty
from collections.abc import Iterator
from typing import Any

from sandbox_provisioner.contract import Stdio

_CHUNK = 1 << 16
_END_OF_INPUT = b"\x04"  # Ctrl-D
# The master of a pty tells the end of its slaves with an error; this is for one that does not.
_DRAIN_SECONDS = 1.0


class Terminal:
    """The pty of one command; made, relayed and closed by `relayed`."""

    def __init__(self, ours: tuple[int, ...]) -> None:
        """*ours* are those of our stdin, stdout and stderr that are terminals; at least one."""
        self._ours = ours
        self._master, self._slave = os.openpty()
        os.set_blocking(self._master, False)
        termios.tcsetattr(self._slave, termios.TCSANOW, termios.tcgetattr(ours[0]))
        self._screen = next((fd for fd in ours if fd > 0), 0)
        self._typed = b""
        self._keys_ended = False
        self._done = asyncio.Event()
        self.resize()

    @property
    def stdio(self) -> Stdio:
        """What the command gets: the pty in place of our terminal."""
        return Stdio(*(self._slave if fd in self._ours else None for fd in range(3)))

    def resize(self) -> None:
        """Tell the command the size of our window; called when it changes (SIGWINCH)."""
        blank = struct.pack("HHHH", 0, 0, 0, 0)
        with contextlib.suppress(OSError):
            size = fcntl.ioctl(self._ours[0], termios.TIOCGWINSZ, blank)
            fcntl.ioctl(self._master, termios.TIOCSWINSZ, size)

    def start(self) -> None:
        """Relay from now on; called when the command has its own copy of the slave."""
        loop = asyncio.get_running_loop()
        os.close(self._slave)
        self._slave = -1
        loop.add_reader(self._master, self._show)
        if 0 in self._ours:
            loop.add_reader(0, self._take_keys)

    def _show(self) -> None:
        try:
            text = os.read(self._master, _CHUNK)
        except BlockingIOError:
            return
        except OSError:
            text = b""  # EIO: no slave is open any more
        if not text:
            asyncio.get_running_loop().remove_reader(self._master)
            self._done.set()
        while text:
            text = text[os.write(self._screen, text) :]

    def _take_keys(self) -> None:
        """Read keys only when those before them are delivered: a pty holds 4 KiB."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(0)
        self._typed = os.read(0, _CHUNK)
        if not self._typed:
            self._keys_ended = True
            self._typed = _END_OF_INPUT
        loop.add_writer(self._master, self._deliver)

    def _deliver(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            self._typed = self._typed[os.write(self._master, self._typed) :]
        except BlockingIOError:
            return
        except OSError:
            self._typed = b""
        if not self._typed:
            loop.remove_writer(self._master)
            if not self._keys_ended:
                loop.add_reader(0, self._take_keys)

    async def drain(self) -> None:
        """Show the rest of what the command wrote; called when it has ended."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_SECONDS):
                await self._done.wait()

    def close(self) -> None:
        """Stop relaying and close the pty."""
        loop = asyncio.get_running_loop()
        for fd in (0, self._master):
            loop.remove_reader(fd)
        loop.remove_writer(self._master)
        for fd in (self._master, self._slave):
            if fd >= 0:
                os.close(fd)


@contextlib.contextmanager
def relayed() -> Iterator[Terminal | None]:
    """A `Terminal`, with ours in raw mode until the end; None where none of ours is one."""
    ours = tuple(fd for fd in range(3) if os.isatty(fd))
    if not ours:
        yield None
        return
    sys.stdout.flush()
    terminal = Terminal(ours)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGWINCH, terminal.resize)
    before: list[Any] | None = None
    try:
        if 0 in ours:
            before = termios.tcgetattr(0)
            # Not the default, which would throw away what was typed while we started.
            tty.setraw(0, termios.TCSADRAIN)
        yield terminal
    finally:
        if before is not None:
            termios.tcsetattr(0, termios.TCSADRAIN, before)
        loop.remove_signal_handler(signal.SIGWINCH)
        terminal.close()
