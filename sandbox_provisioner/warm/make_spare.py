"""warm/make_spare.py - in the launching process: makes a spare, which whoever needs it claims.

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
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from sandbox_provisioner import orders
from sandbox_provisioner.contract import Labels, Stdio, Warmth
from sandbox_provisioner.errors import LaunchError
from sandbox_provisioner.facilities.caps.cgroup import CgroupTree
from sandbox_provisioner.handle import LocalHandle
from sandbox_provisioner.host import WorkdirFacts
from sandbox_provisioner.inside import wire
from sandbox_provisioner.launch import LocalLauncher
from sandbox_provisioner.ledger import Ledger, closed_if_it_fails, undone_if_it_fails
from sandbox_provisioner.off_loop import off_loop
from sandbox_provisioner.performer import Performer
from sandbox_provisioner.plan import CONNECTIONS, HOME, LaunchRequest, Plan, Site
from sandbox_provisioner.records import SPARE, all_records
from sandbox_provisioner.stem import stem
from sandbox_provisioner.warm.found import CLAIMS, Nursery, Whose, find, spare_link, spares
from sandbox_provisioner.warm.keys import (
    key_of,
    made_of,
    of_no_notebook,
    spare_key_of,
)
from sandbox_provisioner.warm.start_from import begin_inside, perform_in_two
from sandbox_provisioner.warm.why_cold import why_no_nursery, why_no_nursery_anywhere, why_no_spare

KIND = SPARE
_MOST_OF_OTHERS = 8  # whatever they differ in
_FILE = "spare.json"
# It has a minute to be ready, as any start.
_SEALED_SECONDS = 60.0
_SILENT = Stdio(subprocess.DEVNULL, subprocess.DEVNULL, subprocess.DEVNULL)


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
    if why_no_nursery_anywhere(request):  # nobody has to look at the host
        return False
    found = await off_loop(_nursery_for, launcher, request, warmth)
    if found is None:
        return False
    key, nursery = found
    own = _own_request(request)
    parent = nursery.record.sandbox_id
    labels = Labels(name=labels.name, user=labels.user, kind=KIND, nursery=parent)
    made = Ledger(launcher.runtime(), own, labels, layer_dir=launcher.layer_dir)
    handle = await _start(launcher, made, nursery, warmth.idle_seconds)
    async with closed_if_it_fails(handle):
        await _sealed(handle)
        link = spare_link(launcher.runtime(), key, own.sandbox_id)
        link.symlink_to(f"{own.sandbox_id}/{CLAIMS}")
        handle.when_ended(when_ended)
        handle.let_go()  # who has found it by now waits for that
    return True


def _nursery_for(
    launcher: LocalLauncher, request: LaunchRequest, warmth: Warmth
) -> tuple[str, Nursery] | None:
    """The key of the spares for *request*, of which there are fewer than are wanted, and the
    nursery that one can be made from."""
    # A spare gets a work directory when it is claimed.
    site, _ = launcher.survey_closed(request)
    runtime, whose = launcher.runtime(), Whose.of(request, site)
    if why_no_nursery(request, site) or why_no_spare(request, site):
        return None
    if site.facts.caller.opened is not None and _has_most(runtime, whose):
        return None
    made = made_of(request, site, warmth.preload)
    for of in warmth.owners:
        nursery_key = key_of(made, of)
        key = spare_key_of(request, site, nursery_key)
        if len(spares(runtime, key)) >= warmth.spares:
            return None
        if nursery := find(runtime, nursery_key, whose):
            return key, nursery
    return None


def _has_most(runtime: Path, whose: Whose) -> bool:
    """Whether somebody has as many spares as who launches for others makes for one: each has a
    range of ids, and room on a disk is promised to it."""
    found = (record for _, record in all_records(runtime) if record.kind == KIND)
    return sum(map(whose.has, found)) >= _MOST_OF_OTHERS


async def _start(
    launcher: LocalLauncher, made: Ledger, nursery: Nursery, idle_seconds: float
) -> LocalHandle:
    """Let a child of the *nursery* become a kernel, which has no work directory yet."""
    child, opener = Performer(_SILENT), Performer()
    async with undone_if_it_fails() as undo:
        undo.push_async_callback(made.remove)
        undo.push_async_callback(opener.end)  # it makes a file in the folder
        undo.push_async_callback(child.end)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            child.ask(nursery)
            with ExitStack() as opened:
                await off_loop(opener.ask, stem)
                site, tree = await off_loop(launcher.look, made.request, opened)
                nowhere = WorkdirFacts.nowhere()
                site = replace(site, workdir=nowhere, volumes=(), idle_seconds=idle_seconds)
                site, plan = await off_loop(_prepare, made, child, site, tree, listener)
                return await perform_in_two(made, nursery, child, opener, site, plan)


def _prepare(
    made: Ledger, child: Performer, site: Site, tree: CgroupTree, listener: socket.socket
) -> tuple[Site, Plan]:
    """As for any kernel from a nursery, and the socket by which the spare is claimed: its name goes
    with the record, also where somebody else removes it."""
    site = made.make_record(site)
    assert made.folder
    listener.bind(os.fspath(made.folder.path / CLAIMS))
    listener.listen(1)
    made.make_groups(tree, child.pid)
    hold = {"hold": tree.hold_fd} if tree.hold_fd >= 0 else {}
    site = replace(site, held={**site.held, "claims": listener.fileno(), **hold})
    return site, begin_inside(made, child, site, orders.compile_spare)


async def _sealed(handle: LocalHandle) -> None:
    """Wait until it can be claimed; LaunchError, and it has ended, if it never can."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_SEALED_SECONDS):
            if await handle.sealed() == wire.SEALED:
                return
    handle.kill()
    story = await handle.wait()
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
