"""inside/watcher.py - runs in PID 1: one thing that it waits for while the kernel runs.

May import: nothing.  A facility's watcher lives in its `inside`; `launcher/watchers.py` has the
list of all, in the order in which they are served.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as typing has it, without its import
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Protocol

    from sandbox_provisioner.inside.box import Box

    class Init(Protocol):
        """What a watcher may have PID 1 do: `launcher/init.py`."""

        box: Box
        kernel_pid: int
        is_starting: bool

        def tell(self, word: str, *rest: str) -> None:
            """Tell the server, if it listens."""

        def say(self, text: str) -> None:
            """To the person at the notebook."""

        def relay(self, number: int) -> None:
            """Send that signal to the kernel's group."""

        def end_start(self, word: str, *rest: str) -> None:
            """Tell the server, which waits for it, that the kernel is there; or is not to be."""

        def narrow_rights(self) -> None:
            """Keep those alone that are needed to the end."""

        def why(self, code: int) -> str:
            """What is known of an end with this *code*."""

        def give_up(self, why: str) -> None:
            """End a kernel that must not go on."""

        def end(self, code: int, why: str = "") -> None:
            """The kernel has ended, with this *code*."""

        def end_with_server(self) -> None:
            """Nobody is there to be told."""


class Watcher:
    """What it waits for, for how long at most, and what it does then."""

    def begin(self, init: Init) -> None:
        """Once, when the kernel has been forked."""

    def waits(self) -> Iterable[tuple[int, int]]:
        """Descriptors, and the events of poll(2) that each is waited for; asked before each
        wait."""
        return ()

    def patience(self) -> int | None:
        """In how many milliseconds to be served although no descriptor is ready; None if there is
        nothing that no event tells of."""
        return None

    def serve(self, init: Init, ready: dict[int, int]) -> None:
        """After each wait; *ready* are the events that have come, by descriptor."""

    def why(self, code: int) -> str:
        """What it knows of the end of a kernel with this *code*, at the moment of it: words of an
        exit file."""
        return ""
