"""warm/spare.py - in the launching process: makes a spare, which whoever needs it claims.

It belongs to nobody once it is ready: it is found by a link (`found.py`), and ends by itself when
nobody has claimed it for long, when its nursery ends, or when the machine is short of memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import uuid
from collections.abc import Callable
from dataclasses import replace

from sandbox_provisioner import orders
from sandbox_provisioner.contract import Labels, Stdio, Warmth
from sandbox_provisioner.errors import LaunchError
from sandbox_provisioner.handle import LocalHandle
from sandbox_provisioner.host import WorkdirFacts
from sandbox_provisioner.inside import wire
from sandbox_provisioner.launch import LocalLauncher
from sandbox_provisioner.plan import CONNECTIONS, HOME, LaunchRequest, Plan, Site
from sandbox_provisioner.records import RecordFolder
from sandbox_provisioner.spawn import LAUNCH_SECONDS, stem
from sandbox_provisioner.warm.found import (
    CLAIMS,
    Command,
    find,
    key_of,
    made_of,
    of_no_notebook,
    spare_key_of,
    spare_link,
    spares,
)
from sandbox_provisioner.warm.launch import ForkedProcess, Nursery, WarmStart
from sandbox_provisioner.warm.obstacles import obstacle, spare_obstacle
from sandbox_provisioner.warm.opener import Opener

KIND = "spare"
_FILE = "spare.json"
_SILENT = Stdio(subprocess.DEVNULL, subprocess.DEVNULL, subprocess.DEVNULL)


class SpareStart(WarmStart):
    """The start of a kernel that has no work directory yet, and is claimed at *listener*."""

    listener: socket.socket
    idle_seconds: float

    def make_record(self, site: Site) -> tuple[Site, RecordFolder]:
        """The socket's name goes with the record, also where somebody else removes it."""
        site, folder = super().make_record(site)
        self.listener.bind(os.fspath(folder.path / CLAIMS))
        self.listener.listen(1)
        return site, folder

    def compile(self, site: Site) -> Plan:
        assert self.tree
        held = ("claims", "string") if self.tree.string >= 0 else ("claims",)
        site = replace(site, idle_seconds=self.idle_seconds, held=held)
        return orders.compile_spare(self.request, site)

    def held(self) -> tuple[int, ...]:
        assert self.tree
        string = self.tree.string
        return (self.listener.fileno(), string) if string >= 0 else (self.listener.fileno(),)


async def make_spare(
    launcher: LocalLauncher,
    request: LaunchRequest,
    labels: Labels,
    warmth: Warmth,
    when_ended: Callable[[int], object] = lambda _: None,
) -> bool:
    """Make one spare for starts such as *request*, unless there are as many already as *warmth*
    wants, or they cannot be had: False then.

    Returns when it can be claimed; *when_ended* is called in a thread when it ends, whosever it is
    then. Raises SandboxError or WarmUnavailable if it fails; then nothing is left of it.
    """
    if Command.of(request.argv) is None:
        return False
    site, _ = launcher.survey(request)
    site.opened.close()  # a spare gets a work directory when it is claimed
    if obstacle(request, site) or spare_obstacle(request, site):
        return False
    runtime, made = launcher.runtime(), made_of(request, site, warmth.preload)
    for of in dict.fromkeys((warmth.owner, "")):
        nursery_key = key_of(made, of)
        key = spare_key_of(request, site, nursery_key)
        if len(spares(runtime, key)) >= warmth.spares:
            return False
        if found := find(runtime, nursery_key):
            break
    else:
        return False
    channel, record = found
    own = _own_request(request)
    labels = Labels(name=labels.name, user=labels.user, kind=KIND, nursery=record.sandbox_id)
    child = ForkedProcess(channel, _SILENT, Nursery(runtime, nursery_key, record))
    start = SpareStart(own, child, runtime, labels)
    start.idle_seconds = warmth.idle_seconds
    handle = await _start(launcher, start)
    handle.when_ended(when_ended)
    handle.let_go()
    spare_link(runtime, key, own.sandbox_id).symlink_to(f"{own.sandbox_id}/{CLAIMS}")
    return True


async def _start(launcher: LocalLauncher, start: SpareStart) -> LocalHandle:
    """Start it, and wait until it can be claimed."""
    start.opener = Opener(stem.launcher())
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as start.listener:
        try:
            site, tree = launcher.survey(start.request)
            site.opened.close()
            site = replace(site, workdir=WorkdirFacts.nowhere(), volumes=())
            handle = await start.run(site, tree)
        except BaseException:
            await start.opener.end()  # it makes a file in the folder that goes then
            await start.undo()
            raise
        await start.opener.end()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LAUNCH_SECONDS):
            if await handle.sealed() == wire.SEALED:
                return handle
    handle.kill()
    story = await handle.wait()
    await handle.close()
    raise LaunchError(
        attempt="keep a spare",
        answer="its kernel did not become ready",
        remedy="Kernels start without it. See what it wrote:",
        step="wait-for-spare",
        stderr_tail=story.stderr_tail,
    )


def _own_request(request: LaunchRequest) -> LaunchRequest:
    """*request* for nobody's notebook: what only one start knows comes when it is claimed."""
    assert request.connection_file
    name, text = request.connection_file
    info = json.loads(text) | {"key": uuid.uuid4().hex}
    old, new = f"{CONNECTIONS}/{name}", f"{CONNECTIONS}/{_FILE}"
    return replace(
        request,
        sandbox_id=uuid.uuid4().hex[:12],
        spec=replace(request.spec, volumes=()),
        argv=tuple(word.replace(old, new) for word in request.argv),
        environment=of_no_notebook(request.environment),
        cwd=HOME,
        connection_file=(_FILE, json.dumps(info)),
        survive_server=True,
    )
