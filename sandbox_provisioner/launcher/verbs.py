"""launcher/verbs.py - runs in the launcher, PID 1 and the kernel: each step's verb -> its function.

May import: the facilities' `inside.py`, and `inside/`.  What to do, in which order and why stands
in the plan; a verb does not log, lock, sleep or decide.

Three processes walk through one plan, each from where the one before forked it::

    launcher   joins the cgroups, takes the mounts, makes the namespaces     fork_init    ends
    PID 1      builds the root, pivots, attaches, covers                     fork_kernel  init.py
    kernel     drops everything it could hold on to                          execute      execve
"""

from __future__ import annotations

from sandbox_provisioner.facilities.caps import inside as caps
from sandbox_provisioner.facilities.devices import inside as devices
from sandbox_provisioner.facilities.environment import inside as environment
from sandbox_provisioner.facilities.figures import inside as figures
from sandbox_provisioner.facilities.ids import inside as ids
from sandbox_provisioner.facilities.landlock import inside as landlock
from sandbox_provisioner.facilities.layer import inside as layer
from sandbox_provisioner.facilities.namespaces import inside as namespaces
from sandbox_provisioner.facilities.network import inside as network
from sandbox_provisioner.facilities.process import inside as process
from sandbox_provisioner.facilities.rights import inside as rights
from sandbox_provisioner.facilities.root import inside as root
from sandbox_provisioner.facilities.sockets import inside as sockets
from sandbox_provisioner.facilities.workdir import inside as workdir
from sandbox_provisioner.inside import mounts

TYPE_CHECKING = False  # as typing has it, without its import
if TYPE_CHECKING:
    from collections.abc import Callable

    Verb = Callable[..., None]

_ROOMS: tuple[tuple[Verb, ...], ...] = (
    caps.VERBS, devices.VERBS, environment.VERBS, figures.VERBS, ids.VERBS, landlock.VERBS,
    layer.VERBS, mounts.VERBS, namespaces.VERBS, network.VERBS, process.VERBS, rights.VERBS,
    root.VERBS, sockets.VERBS, workdir.VERBS,
)  # fmt: skip
VERBS: dict[str, Verb] = {verb.__name__.replace("_", "-"): verb for room in _ROOMS for verb in room}
