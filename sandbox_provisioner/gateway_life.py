"""gateway_life.py - in the launching process: the gateway of its kernels, as long as it lives.

A kernel with ``network = "gateway"`` has no network but what a process outside gives to it
(`gateway/`). There is one for all kernels that this process starts: made when the first of them
starts, while that start goes on; in a box of ours with the host's network and nothing else; ended
with this process, or with the last of its kernels that was asked to outlive it.

::

    start of a kernel ──socketpair──▶ one end to PID 1 (`Site.held`)
                                      the other, with the counts file ──"box"──▶ gateway

A gateway that has ended, or does not answer, is replaced by the next start. Its kernels have no
network from then on: nothing but the gateway ever opens one.
"""

from __future__ import annotations

import asyncio
import compileall
import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import sandbox_provisioner
from sandbox_provisioner import orders
from sandbox_provisioner.caller import Caller
from sandbox_provisioner.contract import Labels, Stdio
from sandbox_provisioner.descriptors import is_readable, keep_from_children, private_pair
from sandbox_provisioner.errors import LaunchError, SandboxError
from sandbox_provisioner.facilities.caps import cgroup
from sandbox_provisioner.facilities.caps.cgroup import CgroupTree
from sandbox_provisioner.facilities.environment.facts.kernel_files import find_kernel_files
from sandbox_provisioner.facilities.network.facts.own_addresses import hub_addresses, own_addresses
from sandbox_provisioner.facilities.network.facts.resolver import (
    ResolverFiles,
    by_descriptor,
    find_resolver,
)
from sandbox_provisioner.handle import LocalHandle
from sandbox_provisioner.host import HostFacts, WorkdirFacts
from sandbox_provisioner.inside import wire
from sandbox_provisioner.inside.printable import one_line
from sandbox_provisioner.ledger import Ledger, closed_if_it_fails, undone_if_it_fails
from sandbox_provisioner.off_loop import off_loop
from sandbox_provisioner.performer import WORD_SECONDS, Performer
from sandbox_provisioner.plan import HOME, LaunchRequest, Plan, Site
from sandbox_provisioner.records import Record, RecordFolder, open_init
from sandbox_provisioner.spec import Limits, Network, NetworkWish, SandboxSpec
from sandbox_provisioner.stem import interpreter, stem
from sandbox_provisioner.sweeping import before_removal

KIND = "gateway"
NAME = "network gateway"
# Its interpreter starts and imports meanwhile.
_FIRST_ANSWER_SECONDS = 10.0
_MOST_OF_ANSWER = 4096
# How often the files are looked at by which this machine finds names.
_NAMES_SECONDS = 5.0
# Some 20 000 connections, each with two sockets; look-ups of names happen in threads.
_MEMORY_BYTES = 512 << 20
_PIDS = 64
_PACKAGE = os.path.dirname(os.path.abspath(sandbox_provisioner.__file__))
_LIBRARIES = ("dnslib",)
_BOOT = (
    "import sys; sys.path[:0] = sys.argv[1:]; "
    "from sandbox_provisioner.gateway.main import main; main()"
)

Perform = Callable[[Ledger, Performer, Site, Plan, CgroupTree], Awaitable[LocalHandle]]
Warn = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class BoxOfGateway:
    """One kernel, as the gateway has to know it: its rules and limits, as JSON can hold them; the
    other end of PID 1's channel, and the file of its counts. *survives*: it outlives this process.
    """

    sandbox_id: str
    rules: Mapping[str, Any]
    channel: int
    counts: int
    survives: bool = False

    def message(self, own: Sequence[str]) -> bytes:
        """What the gateway is told of it; *own* are addresses that no rule for all means."""
        told = {"id": self.sandbox_id, **self.rules, "own_addresses": own}
        return wire.message(wire.BOX, json.dumps(told))


class GatewayAttachment:
    """The network of one start: `ledger.Attachment`."""

    def __init__(self, life: GatewayLife, request: LaunchRequest) -> None:
        """Its channel; meanwhile the gateway is made, if there is none."""
        self._request = request
        self._life = life
        self._channel, self._theirs = private_pair()
        self._taken_in: Future[None] | None = None
        life.begin()

    @property
    def fd(self) -> int:
        """PID 1's end."""
        return self._theirs.fileno()

    def register(self, folder: RecordFolder, site: Site) -> None:
        """Let the gateway know of it; PID 1 may speak to it before."""
        counts = folder.make_counts()
        box = BoxOfGateway(
            sandbox_id=self._request.sandbox_id,
            rules=_rules_of(self._request, site),
            channel=self._channel.fileno(),
            counts=counts,
            survives=self._request.survive_server,
        )
        self._taken_in = self._life.take_in(box)
        self._taken_in.add_done_callback(partial(_close_both, self._channel, counts))

    async def joined(self) -> None:
        """Return when the gateway serves it; SandboxError if none can be had."""
        if self._taken_in:
            await asyncio.wrap_future(self._taken_in)

    def close(self) -> None:
        """Close our copies: from here on the end of PID 1 is the end of the channel. What the
        gateway gets of them is open until it has got it."""
        self._theirs.close()
        if self._taken_in is None:
            self._channel.close()


def _close_both(channel: socket.socket, counts: int, _: Future[None]) -> None:
    channel.close()
    os.close(counts)


class _Gone(Exception):
    """The gateway has ended, or does not answer: *why* as a clause."""

    def __init__(self, why: str, stderr_tail: str = "") -> None:
        super().__init__(why)
        self.why = why
        self.stderr_tail = stderr_tail


class RunningGateway:
    """One gateway process: its handle, and our end of its control socket."""

    def __init__(self, handle: LocalHandle, control: socket.socket, warn: Warn) -> None:
        """*warn* is told what may be wrong with kernels that it serves."""
        self.handle = handle
        self._control = control
        self._warn = warn
        self._hub: Sequence[str] = ()  # the addresses of who has started this server
        self._resolver = ResolverFiles()
        self.is_closed = threading.Event()
        self._patience_seconds = _FIRST_ANSWER_SECONDS
        self._survivors: set[str] = set()

    def lives(self) -> bool:
        """Whether it has not ended."""
        return self.handle.poll() is None

    def take_in(self, box: BoxOfGateway) -> None:
        """Let it serve *box*; LaunchError if it says why not, _Gone if nothing."""
        self._hub = self._hub or hub_addresses(Caller.this_process().environment, self._warn)
        if box.survives:
            self._outlive(box.sandbox_id)
        self.follow()
        message = box.message([*own_addresses(), *self._hub])
        self._say(message, [box.channel, box.counts], box.sandbox_id)

    def follow(self) -> None:
        """Let it look up names as this machine does by now; as of `take_in`."""
        for path, fd in self._resolver.changed():
            self._say(wire.message(wire.RESOLVER, path), [fd], path)

    def _say(self, message: bytes, fds: Sequence[int], about: str) -> None:
        try:
            socket.send_fds(self._control, [message], fds)
            answer = self._answer()
        except ConnectionError:
            raise _Gone("it has ended", self._last_words()) from None
        except OSError as error:  # such as EMSGSIZE
            raise _refused(error.strerror or str(error)) from error
        word, _, rest = answer.partition(" ")
        if word == wire.FAILED:
            raise _refused(one_line(rest))
        if (word, rest) != (wire.OK, about):
            raise _Gone("it answered what is no answer")

    def _answer(self) -> str:
        if not is_readable(self._control.fileno(), self._patience_seconds):
            raise _Gone(f"it has not answered for {self._patience_seconds:g} s")
        answer = self._control.recv(_MOST_OF_ANSWER)
        if not answer:
            raise _Gone("it has ended", self._last_words())
        self._patience_seconds = WORD_SECONDS
        return answer.decode(errors="replace")

    def _last_words(self) -> str:
        async def story() -> str:
            async with asyncio.timeout(WORD_SECONDS):
                return (await self.handle.wait()).stderr_tail

        with contextlib.suppress(TimeoutError):
            return asyncio.run(story())
        return ""

    def _outlive(self, sandbox_id: str) -> None:
        """From now on a server that ends leaves it alone: it ends with its last kernel."""
        self._survivors.add(sandbox_id)
        self._write_survival(survives=True)

    def _write_survival(self, *, survives: bool) -> None:
        if self.handle.record.survives_server != survives:
            self.handle.record = replace(self.handle.record, survives_server=survives)
            self.handle.folder.write(self.handle.record)

    def leave(self) -> None:
        """This process ends: the gateway takes no more kernels; where one of those that it has
        outlives us it stays, else it goes with all else that is ours (`sweeping.py`)."""
        runtime = self.handle.folder.path.parent
        if not any(_is_there(runtime / name) for name in self._survivors):
            with contextlib.suppress(OSError):
                self._write_survival(survives=False)
        self._end_control()

    def close(self) -> None:
        """End it, and remove every trace of it."""
        self._end_control()
        asyncio.run(self.handle.close())

    def _end_control(self) -> None:
        self.is_closed.set()
        self._control.close()


def _is_there(folder: Path) -> bool:
    """Whether the sandbox of *folder* runs."""
    try:
        pidfd = open_init(RecordFolder(folder).read())
    except (OSError, ValueError):
        return False
    if pidfd is not None:
        os.close(pidfd)
    return pidfd is not None


class GatewayLife:
    """The gateway for the kernels whose records are in *runtime*, in a thread of its own: starts
    come on any event loop, and none of them waits for more than the answer that it needs."""

    def __init__(self, runtime: Path, perform: Perform, warn: Warn) -> None:
        self._runtime = runtime
        self._perform = perform
        self._warn = warn
        self.forget()
        keep_from_children(self)

    def forget(self) -> None:
        """In a child that was forked: it has a gateway of its own when it starts a kernel."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sandbox-gateway")
        self.gateway: RunningGateway | None = None

    def begin(self) -> None:
        """Let there be one: a start has begun that will need it. What is wrong with it the start
        hears from `take_in`."""
        self._thread.submit(self._living)

    def take_in(self, box: BoxOfGateway) -> Future[None]:
        """Let the gateway serve *box*, whose descriptors stay open until that is done; SandboxError
        if there is none to be had."""
        return self._thread.submit(self._take_in, box)

    def close(self) -> None:
        """End it, and wait until every trace of it has gone."""
        self._thread.submit(self._bury).result()

    def leave(self) -> None:
        """See `RunningGateway.leave`."""
        if self.gateway:
            self.gateway.leave()

    def _take_in(self, box: BoxOfGateway) -> None:
        try:
            self._living().take_in(box)
        except _Gone as gone:
            self._warn(f"The network gateway is replaced: {gone.why}.")
        else:
            return
        self._bury()
        try:
            self._living().take_in(box)
        except _Gone as gone:
            self._bury()
            raise _not_to_be_had(gone) from None

    def _living(self) -> RunningGateway:
        if self.gateway and not self.gateway.lives():
            self._bury()
        if self.gateway is None:
            self.gateway = asyncio.run(self._start())
            self.gateway.handle.when_ended(lambda _: self._take_in_end())
            names = threading.Thread(target=self._keep_names, args=(self.gateway,), daemon=True)
            names.start()
        return self.gateway

    def _keep_names(self, gateway: RunningGateway) -> None:
        """In a thread of its own: a machine may go to another network between two starts. Nothing
        tells of that: a file may be replaced, and so may each link on the way to it."""
        while not gateway.is_closed.wait(_NAMES_SECONDS):
            with contextlib.suppress(RuntimeError):  # this process ends: no thread takes anything
                self._thread.submit(self._follow, gateway)

    def _follow(self, gateway: RunningGateway) -> None:
        """What is wrong with it the next start finds as well, and tells."""
        if gateway is self.gateway and gateway.lives():
            with contextlib.suppress(_Gone, LaunchError):
                gateway.follow()

    def _take_in_end(self) -> None:
        """It has ended by itself: somebody has to wait for it and to remove what it had."""
        with contextlib.suppress(RuntimeError):  # this process ends: no thread takes anything
            self._thread.submit(self._bury_the_dead)

    def _bury_the_dead(self) -> None:
        if self.gateway and not self.gateway.lives():
            self._bury()

    def _bury(self) -> None:
        gateway, self.gateway = self.gateway, None
        if gateway:
            try:
                gateway.close()
            except SandboxError as error:
                self._warn(str(error))  # what is left goes with the next sweep

    async def _start(self) -> RunningGateway:
        ours, theirs = private_pair()
        with theirs, contextlib.ExitStack() as undo:
            undo.callback(ours.close)
            handle = await _start_box(self._runtime, self._perform, self._warn, theirs)
            undo.pop_all()
            return RunningGateway(handle, ours, self._warn)


def _cache_code() -> None:
    """In its box nothing of ours can be written, and nobody else imports that code: in an editable
    install each gateway would compile it anew, which takes longer than all else of its start."""
    folder = os.path.join(_PACKAGE, "gateway")
    if os.access(folder, os.W_OK) and not sys.dont_write_bytecode:
        compileall.compile_dir(folder, quiet=2)  # of what has changed since


async def _start_box(
    runtime: Path, perform: Perform, warn: Warn, control: socket.socket
) -> LocalHandle:
    request = _request()
    made = Ledger(runtime, request, Labels(kind=KIND, name=NAME))
    performer = Performer(Stdio(control.fileno(), subprocess.DEVNULL, subprocess.DEVNULL))
    async with undone_if_it_fails() as undo:
        undo.push_async_callback(made.remove)
        undo.push_async_callback(performer.end)
        await off_loop(performer.ask, stem)
        await off_loop(_cache_code)
        site, plan, tree = await off_loop(_prepare, made, warn)
        handle = await perform(made, performer, site, plan, tree)
    async with closed_if_it_fails(handle):
        # PID 1 leaves its end to the gateway, which ends with the last kernel; as long as there is
        # none that outlives us nobody else has to leave it alone.
        handle.record = replace(handle.record, survives_server=False)
        await off_loop(handle.folder.write, handle.record)
    return handle


def _request() -> LaunchRequest:
    limits = Limits(
        memory_bytes=_MEMORY_BYTES, pids=_PIDS, by_default=frozenset({"memory", "pids"})
    )
    libraries = [path for name in _LIBRARIES if (path := _folder_of(name))]
    places = dict.fromkeys(os.path.dirname(path) for path in (_PACKAGE, *libraries))
    return LaunchRequest(
        sandbox_id=uuid.uuid4().hex[:12],
        spec=SandboxSpec(workdir=HOME, limits=limits, network=NetworkWish(mode=Network.HOST)),
        argv=(interpreter(), "-ISE", "-c", _BOOT, *places),
        environment={},
        cwd=HOME,
        survive_server=True,
        extra_files=(_PACKAGE, *libraries),
    )


def _rules_of(request: LaunchRequest, site: Site) -> dict[str, Any]:
    """What the gateway has to know of a kernel, as JSON can hold it."""
    wish = asdict(request.spec.network)
    for name in ("mode", "pool", "ipv6", "pool_ipv6"):  # they are the box's own, and the card's
        del wish[name]
    return wish | {"allow": site.network_allow}


def _folder_of(name: str) -> str:
    found = importlib.util.find_spec(name)
    return os.path.dirname(os.path.realpath(found.origin)) if found and found.origin else ""


def _prepare(made: Ledger, warn: Warn) -> tuple[Site, Plan, CgroupTree]:
    request, caller = made.request, Caller.this_process()
    facts = HostFacts.probe((), caller)
    if facts.obstacle:
        raise facts.obstacle
    limits, name = request.spec.limits, request.sandbox_id
    tree = cgroup.open_tree(facts.cgroups, name, limits, request.spec.may_lack, warn)
    site = Site(
        facts=facts,
        workdir=WorkdirFacts.nowhere(),
        files=find_kernel_files(request.argv, {}, facts, request.extra_files),
        join_files=tree.join_files,
        memory_group=tree.memory_group,
        memory_above=cgroup.narrowest_bound(facts.cgroups),
        resolver=by_descriptor(find_resolver()),
    )
    site = made.make_record(site)
    return site, orders.compile_for(request, site), tree


def _refused(why: str) -> LaunchError:
    return LaunchError(
        attempt="give the kernel a network",
        answer=f"the network gateway refused: {why}",
        remedy='Set network = "none" to start without one.',
        step="network-gateway",
    )


def _not_to_be_had(gone: _Gone) -> LaunchError:
    return LaunchError(
        attempt="start the network gateway",
        answer=f"two have been started, and each was of no use: {gone.why}",
        remedy='The machine may be overloaded. Set network = "none" to start without a network.',
        step="network-gateway",
        stderr_tail=gone.stderr_tail,
    )


_lives: dict[Path, GatewayLife] = {}


def gateway_life(runtime: Path, perform: Perform, warn: Warn) -> GatewayLife:
    """The one of this process for *runtime*."""
    if runtime not in _lives:  # starts begin in threads
        _lives.setdefault(runtime, GatewayLife(runtime, perform, warn))
    return _lives[runtime]


def own_records() -> list[Record]:
    """Those of the gateways that this process has now."""
    return [life.gateway.handle.record for life in _lives.values() if life.gateway]


def end_own() -> None:
    """End the gateways of this process."""
    while _lives:
        _lives.popitem()[1].close()


def _leave() -> None:
    for life in _lives.values():
        life.leave()


before_removal(_leave)
