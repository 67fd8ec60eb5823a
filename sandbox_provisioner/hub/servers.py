"""hub/servers.py - in a hub that is root, or in the daemon for one that is not, as root: starts the
servers of people, each in a box, and has them.

What is wished (`broker/server_wish.py`) is looked at with rights that are handed in: those of root,
whose hub it is, or those of the person (`persons.py`). A server outlives whoever has started it.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
import stat
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sandbox_provisioner.broker.box import INSIDE
from sandbox_provisioner.broker.server_wish import ServerWish
from sandbox_provisioner.caller import Caller
from sandbox_provisioner.contract import Labels, Stdio
from sandbox_provisioner.errors import HostError, SandboxError
from sandbox_provisioner.facilities.caps.cgroup import make_common_scope
from sandbox_provisioner.facilities.environment.facts.kernel_files import (
    Given,
    KernelFiles,
    find_kernel_files,
)
from sandbox_provisioner.handle import LocalHandle
from sandbox_provisioner.host import HostFacts
from sandbox_provisioner.hub import relay
from sandbox_provisioner.hub.doors import API_SOCKET, Doors, sweep, url_of
from sandbox_provisioner.hub.kernels import BoxKernels, write_desk
from sandbox_provisioner.hub.ranges import FOLDER, range_of
from sandbox_provisioner.launch import LocalLauncher, SeenBy, Warn, answered, seen_by_ourselves
from sandbox_provisioner.off_loop import off_loop
from sandbox_provisioner.options import PROVISIONER
from sandbox_provisioner.plan import LaunchRequest
from sandbox_provisioner.policy.narrow import narrow_network, narrow_of_account, narrower_sum
from sandbox_provisioner.policy.person import Person
from sandbox_provisioner.policy.read import POLICY_FILE
from sandbox_provisioner.policy.terms import Terms
from sandbox_provisioner.records import SERVER, UNREADABLE
from sandbox_provisioner.spec import Covers, Limits, SandboxSpec, Volume

# What an administrator has set for all servers of this machine.
OF_MACHINE = ("/etc/jupyter", "/etc/ipython")
ASK = "For the administrator of this hub:"
_FROM_PROXY = 512

Log = Callable[..., None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rights:
    """With which a wish is looked at: on behalf of *caller*, by *seen_by*. *volumes* are those of
    the wish, by their real paths where a policy has judged them."""

    caller: Caller
    seen_by: SeenBy
    volumes: tuple[Volume, ...]


# Of whom, what that one's box is always shown, and the wish; what closes all that is opened for it.
Judge = Callable[[pwd.struct_passwd, tuple[Volume, ...], ServerWish, ExitStack], Rights]


class Server:
    """That of one person, which runs, or has ended: *handle* is its box, *doors* lead there."""

    def __init__(self, handle: LocalHandle, doors: Doors, kernels: BoxKernels) -> None:
        self.handle = handle
        self.doors = doors
        self.kernels = kernels
        self._for_hub: socket.socket | None = None

    @property
    def entrance(self) -> Path:
        """The proxy's way in."""
        return self.doors.entrance

    @property
    def url(self) -> str:
        """The same for the hub."""
        return url_of(self.entrance)

    async def listen(self) -> socket.socket:
        """What listens for the hub's API, whose caller accepts: in place of who did before."""
        listener, self._for_hub = self._for_hub, None
        if listener is None:
            return await off_loop(self.doors.listen_for_server)
        return listener

    def take(self, for_hub: socket.socket) -> None:
        """It listens already."""
        self._for_hub = for_hub

    async def keep(self) -> None:
        """Called when a hub has written down where it is found."""
        await off_loop(self.doors.hub_has_heard)

    async def close(self) -> None:
        """End all in the box and beside it, and leave nothing. The box's record goes when nothing
        but the doors is left: by it whoever comes after us finds its kernels."""
        async with AsyncExitStack() as stack:
            stack.callback(self.doors.remove)
            stack.callback(self._hush)
            stack.push_async_callback(self.handle.close)
            stack.push_async_callback(self.kernels.end)
            stack.push_async_callback(self.handle.end)

    async def let_go(self) -> None:
        """It lives on, for whoever comes after us."""
        self._hush()
        await self.kernels.let_go()
        self.handle.let_go()

    def _hush(self) -> None:
        listener, self._for_hub = self._for_hub, None
        if listener:
            listener.close()


class Servers:
    """Starts and finds them. *judge* tells with whose rights one is started, *terms_for* what a
    policy lets the person have, *account* as whom the hub runs. What there is to say is said by
    *warn*, and of kernels by *log*."""

    def __init__(
        self,
        *,
        judge: Judge | None,
        terms_for: Callable[[Person], Terms | None],
        warn: Warn,
        log: Log,
        runtime_dir: str = "",
        state_dir: str = str(FOLDER),
        policy: str = POLICY_FILE,
        account: int = 0,
    ) -> None:
        self._judge = judge
        self._terms_for = terms_for
        self._warn = warn
        self._log = log
        self._runtime_dir = runtime_dir
        self._state_dir = Path(state_dir)
        self._policy = policy
        self._account = account

    def launcher(self, rights: Rights | None = None) -> LocalLauncher:
        """Who has the records; with *rights* also who starts a box."""
        if rights is None:
            return LocalLauncher(runtime_dir=self._runtime_dir, warn=self._warn)
        return LocalLauncher(
            runtime_dir=self._runtime_dir,
            warn=self._warn,
            caller=lambda: rights.caller,
            seen_by=rights.seen_by,
        )

    def sweep(self) -> None:
        """Remove what is left of boxes that have ended while nobody was there."""
        self.launcher().sweep()
        sweep(self.launcher().runtime())

    async def start(self, wish: ServerWish, stdio: Stdio, hub_pid: int = 0) -> Server:
        """Start what *wish* asks for, whose stdout and stderr are those of *stdio*; SandboxError.
        Until the process *hub_pid* has heard of it, it ends with that one."""
        person = await off_loop(account, wish.person)
        await off_loop(make_common_scope)
        await off_loop(self.sweep)
        doors = self.doors(uuid.uuid4().hex[:12])
        async with AsyncExitStack() as undo:
            listener = await off_loop(doors.make)
            undo.callback(doors.remove)
            with listener, ExitStack() as opened:
                if hub_pid:
                    await off_loop(doors.note_hub, hub_pid)
                made = await off_loop(self._request, person, wish, doors, opened)
                launcher, request = made
                for_hub = await off_loop(doors.listen_for_server)
                undo.callback(for_hub.close)
                kernels = self._kernels(doors)
                undo.push_async_callback(kernels.end)
                await kernels.begin()
                labels = Labels(name=wish.program, user=wish.user, kind=SERVER)
                streams = replace(stdio, stdin=listener.fileno())
                server = Server(await launcher.start(request, labels, streams), doors, kernels)
            undo.pop_all()
        doors.made()
        server.take(for_hub)
        return server

    def find(self, card: Mapping[str, Any]) -> Server:
        """That of which another hub's handle has left *card*, also where it has ended and nobody
        has swept it; LaunchError, and what was left is gone."""
        doors = self.doors(card["id"])
        try:
            handle = self.launcher().find(card)
        except SandboxError:
            found = self._ended(card)
            if found is None:
                doors.remove()
                raise
            handle = found
        return self.of(handle, doors)

    def of(self, handle: LocalHandle, doors: Doors) -> Server:
        """That of *handle*, which was found."""
        return Server(handle, doors, self._kernels(doors))

    def doors(self, sandbox_id: str) -> Doors:
        """Those of the box *sandbox_id*."""
        return Doors(sandbox_id, self.launcher().runtime(), self._account)

    def _kernels(self, doors: Doors) -> BoxKernels:
        return BoxKernels(doors, self._runtime_dir, self._log, self._policy)

    def _ended(self, card: Mapping[str, Any]) -> LocalHandle | None:
        """That of the server of *card*, which has ended, if nobody has swept it."""
        launcher = self.launcher()
        with contextlib.suppress(*UNREADABLE):
            found = launcher.adopt(launcher.runtime() / card["id"])
            if found and found.record.init_start == card["init_start"]:
                return found
            if found:
                found.let_go()
        return None

    # -- what is started

    def _request(
        self, person: pwd.struct_passwd, wish: ServerWish, doors: Doors, opened: ExitStack
    ) -> tuple[LocalLauncher, LaunchRequest]:
        """Who starts what *wish* may be, and that."""
        assert self._judge
        always = (Volume(source=str(doors.shown), target=INSIDE), *_of_machine())
        rights = self._judge(person, always, wish, opened)
        launcher = self.launcher(rights)
        found = _needed_by(wish, person, rights)
        environment = dict(wish.environment)
        if os.path.dirname(found.program) == wish.installed:
            environment.setdefault("JUPYTER_DEFAULT_PROVISIONER_NAME", PROVISIONER)
        words = (str(wish.port), str(wish.api_port), API_SOCKET, str(_FROM_PROXY))
        terms = self._terms_for(Person.find(person.pw_name))
        group, limits = f"hub/{person.pw_name}", _sum(wish, terms)
        request = LaunchRequest(
            sandbox_id=doors.path.name,
            spec=self._within(terms, _spec(person, wish, (*always, *rights.volumes))),
            argv=(sys.executable, "-SI", relay.__file__, *words, found.program, *wish.argv[1:]),
            environment=environment,
            cwd=person.pw_dir,
            survive_server=True,
            logged=("stdout", "stderr"),
            extra_files=(relay.__file__, *found.readonly),
            below=f"{group}/server",
            sums={group: limits, f"{group}/server": _of_servers(limits)},
            terms=terms,
            first_id=range_of(person.pw_name, self._state_dir),
        )
        site, _ = launcher.survey_closed(request)
        shared = {volume.target for volume in rights.volumes}
        write_desk(doors, person.pw_name, request, site, shared)
        return launcher, request

    def _within(self, terms: Terms | None, spec: SandboxSpec) -> SandboxSpec:
        """*spec* with no more of a network than the administrator's policy lets the person have,
        nor, for a hub that is not root, of what else is root's to give."""
        if terms is None:
            return spec
        narrow = narrow_of_account if self._account else narrow_network
        spec, notices = narrow(spec, terms)
        for notice in notices:
            self._warn(notice)
        return spec


def as_root(
    person: pwd.struct_passwd, always: tuple[Volume, ...], wish: ServerWish, opened: ExitStack
) -> Rights:
    """Those of a hub that is root, on behalf of *person*: whose home it is, and no variable of the
    hub's."""
    home = person.pw_dir
    caller = Caller(uid=0, gid=0, home=home, cwd="/", umask=0o022, environment={})
    return Rights(caller=caller, seen_by=seen_by_ourselves, volumes=wish.volumes)


def account(name: str) -> pwd.struct_passwd:
    """The system user called *name*, whose home is there and theirs; HostError."""
    attempt = f"start a server for {name}"
    try:
        person = pwd.getpwnam(name)
    except KeyError:
        remedy = (
            f"Make one: useradd --create-home {name}   (or let the authenticator do it: "
            "c.LocalAuthenticator.create_system_users = True)"
        )
        raise HostError(
            attempt=attempt, answer="this machine has no such user", remedy=(ASK, remedy)
        ) from None
    if person.pw_uid == 0:
        answer = "it is root's account, whose files are everybody's"
        raise HostError(attempt=attempt, answer=answer, remedy="Log in as another user.")
    home = person.pw_dir
    try:
        status = answered(partial(os.lstat, home), lambda _: None, (home,))
    except OSError as error:
        answer = f"the home directory {home} cannot be used: {error.strerror}"
        remedy = f"mkdir {home} && chown {name}: {home}"
        raise HostError(attempt=attempt, answer=answer, remedy=(ASK, remedy)) from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != person.pw_uid:
        answer = f"the home directory {home} is not a directory of theirs"
        remedy = f"chown {name}: {home}"
        raise HostError(attempt=attempt, answer=answer, remedy=(ASK, remedy))
    return person


def _spec(person: pwd.struct_passwd, wish: ServerWish, volumes: tuple[Volume, ...]) -> SandboxSpec:
    return SandboxSpec(
        workdir=person.pw_dir,
        covers=Covers(whole=True),
        limits=wish.box,
        network=wish.network,
        volumes=volumes,
        devices=wish.devices,
        hostname=f"jupyter-{person.pw_name}"[:63],
    )


def _sum(wish: ServerWish, terms: Terms | None) -> Limits:
    """What all of this person's has together, by the policy too."""
    return narrower_sum(wish.sum, terms) if terms else wish.sum


def _of_servers(limits: Limits) -> Limits:
    """Of *limits* of all that a person runs, those of the servers: but for CPU time, of which v1
    lets no group have more than the one above, also where that is changed (sched-bwc.rst)."""
    return Limits(memory_bytes=limits.memory_bytes, pids=limits.pids)


def _needed_by(wish: ServerWish, person: pwd.struct_passwd, rights: Rights) -> KernelFiles:
    """The program of *wish*, and all that it needs of the host to run."""
    facts = HostFacts.probe((), replace(rights.caller, cwd=person.pw_dir))
    home = rights.seen_by(os.path.realpath, person.pw_dir)
    given = Given(writable=(home,), owner_uid=person.pw_uid)
    return rights.seen_by(find_kernel_files, wish.argv, wish.environment, facts, (), given)


def _of_machine() -> Iterator[Volume]:
    return (Volume(source=path, target=path) for path in OF_MACHINE if os.path.isdir(path))
