"""hub/kernels.py - in the hub, or in the daemon, as root: gives the server in a box its kernels, as
boxes beside it.

It is the broker's code, with a socket that this box alone sees (`broker/desk.py`). Whoever started
the server starts its kernels, so all are in the groups of one person, below one sum. A kernel is
nobody's: the next hub finds it, and it ends with the server that asked for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
from collections.abc import Callable, Collection
from dataclasses import replace

from sandbox_provisioner.broker.box import INSIDE
from sandbox_provisioner.broker.daemon import Daemon, short
from sandbox_provisioner.broker.desk import BoxDesk
from sandbox_provisioner.broker.kernels import Kernels
from sandbox_provisioner.broker.values import BadValue, as_json, of_json
from sandbox_provisioner.errors import SandboxError
from sandbox_provisioner.hub.doors import Doors
from sandbox_provisioner.off_loop import off_loop
from sandbox_provisioner.plan import LaunchRequest, Site
from sandbox_provisioner.policy.read import POLICY_FILE
from sandbox_provisioner.records import Record

_DESCRIPTORS = 1 << 16
# What `begin` raises, above all where whoever made the server was of another version.
UNTAKEN = (OSError, ValueError, BadValue, SandboxError)


def write_desk(
    doors: Doors, name: str, request: LaunchRequest, site: Site, shared: Collection[str]
) -> None:
    """Write down, for this hub and those to come, what the kernels of *name*'s server may have:
    what that one has, which *request* starts at *site*. *shared* are the targets of those of its
    volumes that they have, too."""
    group = os.path.dirname(request.below)
    ways = {path: place.source for path, place in site.places if path != INSIDE}
    desk = BoxDesk(
        box=request.sandbox_id,
        name=name,
        first_id=request.first_id,
        ways=ways,
        shown=(*site.files.readonly, *site.files.real.values(), *ways.values()),
        volumes=tuple(
            replace(facts.volume, source=facts.source)
            for facts in site.volumes
            if facts.volume.target in shared
        ),
        limits=request.sums[group],
        workdir_bytes=request.spec.limits.workdir_bytes,
        workdir_inodes=request.spec.limits.workdir_inodes,
        network=request.spec.network,
        folder=str(doors.kernels),
        runtime=str(doors.runtime),
    )
    doors.desk_file.write_text(json.dumps(as_json(desk)))


def _afford_many() -> None:
    """Each kernel takes some descriptors here, and a service has 1024 unless it asks for more."""
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _DESCRIPTORS:
        wished = _DESCRIPTORS if most == resource.RLIM_INFINITY else min(most, _DESCRIPTORS)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wished, most))


class BoxKernels:
    """Those of the server behind *doors*, until it is closed; *log* is told of them."""

    def __init__(
        self, doors: Doors, runtime_dir: str, log: Callable[..., None], policy: str = POLICY_FILE
    ) -> None:
        self._doors = doors
        self._runtime_dir = runtime_dir
        self._policy = policy
        # What a box says may be long.
        self._log = lambda event, **told: log(event, **{k: short(v) for k, v in told.items()})
        self._kernels: Kernels | None = None
        self._daemon: Daemon | None = None
        self._serving: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Take over what another hub has left, and listen; what `UNTAKEN` has."""
        _afford_many()
        kernels = await self._adopted()
        self._daemon = Daemon(self._doors.listen_for_kernels(), kernels)
        self._serving = asyncio.ensure_future(self._daemon.serve())

    async def _adopted(self) -> Kernels:
        told = json.loads(await off_loop(self._doors.desk_file.read_text))
        desk = of_json(BoxDesk, told, "desk.json")
        self._kernels = Kernels(self._runtime_dir, self._policy, self._log, desk)
        await self._kernels.adopt()
        return self._kernels

    def records(self) -> list[Record]:
        """Of all that run; from any thread."""
        return self._kernels.records() if self._kernels else []

    async def end(self) -> None:
        """Listen no more, and end all that are left, also where nobody has taken them over yet:
        their server has ended."""
        await self._close()
        if self._kernels is None:
            with contextlib.suppress(*UNTAKEN):  # then they end with it, and the next sweep comes
                await self._adopted()
        if self._kernels:
            await self._kernels.end()

    async def let_go(self) -> None:
        """Listen no more; all live on, for whoever comes after us."""
        await self._close()
        if self._kernels:
            await self._kernels.stop()
            self._kernels.let_go()

    async def _close(self) -> None:
        if self._serving:
            self._serving.cancel()
        if self._daemon:
            await self._daemon.close()
