"""confinement.py - any process outside; pure: the two confinements, each as one value.

What differs between them outside of a sandbox stands here, and who has to know asks the value; what
differs inside it follows from its order (`orders/`).
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass

from sandbox_provisioner.errors import HostError
from sandbox_provisioner.facilities.landlock import tell as landlock
from sandbox_provisioner.facilities.landlock.plan import private
from sandbox_provisioner.host import HostFacts
from sandbox_provisioner.inside import wire
from sandbox_provisioner.plan import CONNECTIONS, SOCKETS
from sandbox_provisioner.spec import Confinement


@dataclass(frozen=True, slots=True, kw_only=True)
class Confiner:
    """What holds a kernel, for everybody who does not build it.

    *obstacle* is why it cannot be had on a host; *losses* are what it does not give there and
    namespaces do, a clause each. *places* are, for the folder of a record, the directories of
    sockets and of the connection file as the kernel sees them. *shown_as* is what front ends show
    of its kernels, which *must_be_shown* if it is weaker than what people take for granted.

    *has_own_processes*: its init is PID 1 of a namespace, so that its end, whatever its cause, is
    the end of all, and a limit of a user's processes counts nobody else's. Without that its init
    has to end the others, and somebody may end it before: then it has told nothing.
    """

    name: Confinement
    obstacle: Callable[[HostFacts], HostError | None]
    losses: Callable[[HostFacts], tuple[str, ...]]
    places: Callable[[str], tuple[str, str]]
    shown_as: str
    must_be_shown: bool
    has_own_processes: bool

    @property
    def end_signal(self) -> int:
        """What ends all of it, sent to its init."""
        return signal.SIGKILL if self.has_own_processes else wire.relayed(signal.SIGKILL)


NAMESPACES = Confiner(
    name=Confinement.NAMESPACES,
    obstacle=lambda facts: facts.obstacle,
    losses=lambda _: (),
    places=lambda _: (SOCKETS, CONNECTIONS),
    shown_as="sandboxed",
    must_be_shown=False,
    has_own_processes=True,
)
LANDLOCK = Confiner(
    name=Confinement.LANDLOCK,
    obstacle=landlock.obstacle,
    losses=landlock.losses,
    places=lambda folder: (f"{folder}/sockets", private(folder, "jupyter")),
    shown_as="landlock",
    must_be_shown=True,
    has_own_processes=False,
)
_ALL = {confiner.name: confiner for confiner in (NAMESPACES, LANDLOCK)}


def confiner(name: str) -> Confiner:
    """The one called *name*; ValueError where there is none."""
    return _ALL[Confinement(name)]
