"""hub/spawner.py - in the hub, which runs as root: starts each user's whole server in a box.

``c.JupyterHub.spawner_class = "sandbox"``. All code of a user runs in one box then: the server, its
extensions, terminals, language servers, and kernels of every kind, known to us or not. Its caps
are those of the person's group, all root's; the home is the user's own, and so is every file in it;
the way in and the way to the hub's API are those of `relay.py`. A box outlives the hub: the next
one finds it by its card.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
import os
import pwd
import signal
import socket
import stat
import sys
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jupyterhub.spawner import Spawner, SpawnException
from traitlets import Dict, Float, Integer, List, Unicode, Union

from sandbox_provisioner.caller import Caller
from sandbox_provisioner.contract import Labels, Stdio
from sandbox_provisioner.errors import HostError, LaunchError, SandboxError, SpecError, in_lines
from sandbox_provisioner.facilities.environment.facts.kernel_files import Given, find_kernel_files
from sandbox_provisioner.facilities.network.wish.options import NetworkOptions, network_wish
from sandbox_provisioner.handle import LocalHandle
from sandbox_provisioner.host import HostFacts
from sandbox_provisioner.hub import relay
from sandbox_provisioner.hub.doors import API_SOCKET, INSIDE, Doors, sweep
from sandbox_provisioner.hub.kernels import NAME as CHILD
from sandbox_provisioner.hub.ranges import FOLDER, range_of
from sandbox_provisioner.inside.printable import one_line
from sandbox_provisioner.launch import LocalLauncher
from sandbox_provisioner.off_loop import off_loop
from sandbox_provisioner.plan import LaunchRequest
from sandbox_provisioner.policy.current import terms_for
from sandbox_provisioner.policy.narrow import narrow_network, narrower_sum
from sandbox_provisioner.policy.person import Person
from sandbox_provisioner.policy.terms import Terms
from sandbox_provisioner.records import SERVER
from sandbox_provisioner.spec import Covers, Limits, SandboxSpec, Volume
from sandbox_provisioner.story import ExitStory
from sandbox_provisioner.units import parse_bytes

# In a network of its own, so the same for everybody. jupyter_server's default.
_PORT = 8888
_FROM_PROXY, _FROM_SERVER = 512, 8
# What an administrator has set for all servers of this machine.
_OF_MACHINE = ("/etc/jupyter", "/etc/ipython")
_ASK = "For the administrator of this hub:"


class SandboxSpawner(NetworkOptions, Spawner):  # type: ignore[misc]  # jupyterhub has no types
    """Starts a user's server, and all that it starts, in a box of its own."""

    # -- options

    pids_limit = Integer(
        4096,
        allow_none=True,
        help="The most processes and threads of a user, in all servers together. None: no cap.",
    ).tag(config=True)
    shm_limit = Union(
        [Integer(), Unicode()],
        allow_none=True,
        default_value=None,
        help="The size of /dev/shm; it counts towards mem_limit. None: half of mem_limit.",
    ).tag(config=True)
    tmp_limit = Union(
        [Integer(), Unicode()],
        allow_none=True,
        default_value=None,
        help="The size of /tmp and /run together; it counts towards mem_limit. None: half of it.",
    ).tag(config=True)
    volumes = Union(
        [Dict(), List(Unicode())],
        help="What of the host the server gets besides the home directory, as DockerSpawner has "
        'it: {"/srv/data/{username}": "/data"} can be written to; so can {"/srv/data": {"bind": '
        '"/data", "mode": "rw"}}, and with "ro" it cannot. A list has "SOURCE:TARGET", which is '
        'read-only, or "SOURCE:TARGET:rw".',
    ).tag(config=True)
    read_only_volumes = Dict(help="The same, read-only.").tag(config=True)
    term_timeout = Float(
        1.0,
        help="Seconds that a server has to end by itself when it is asked to, before all in its "
        "box is killed.",
    ).tag(config=True)
    runtime_dir = Unicode(
        "", help="Where the records of boxes are; the default is /run/sandbox-provisioner."
    ).tag(config=True)

    state_dir = Unicode(
        str(FOLDER), help="Where it is written down, for ever, which range of ids is whose."
    ).tag(config=True)

    def __init__(self, **kwargs: Any) -> None:
        self._handle: LocalHandle | None = None
        self._doors: Doors | None = None
        self._relay: asyncio.Task[None] | None = None
        self._code: int | None = 0  # of a server that has ended, or that there never was
        self._card: dict[str, Any] = {}
        self._is_lost = False  # it ended when no hub was there
        self._events: list[dict[str, Any]] = []
        self._told = asyncio.Event()
        super().__init__(**kwargs)

    # -- what a hub remembers

    def get_state(self) -> dict[str, Any]:
        """Called when the server runs: what the next hub needs to find it."""
        state: dict[str, Any] = super().get_state()
        return state | ({"sandbox": self._card} if self._card else {})

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Called by the next hub. A server that has ended meanwhile is told by `poll`."""
        super().load_state(state)
        if not (card := state.get("sandbox")):
            return
        self._card, self._doors = dict(card), Doors(card["id"], self._launcher().runtime())
        try:
            self._handle = self._launcher().find(card)
        except SandboxError as error:
            self.log.warning("%s", one_line(str(error)))
            self._forget()
            self._is_lost = True
        else:
            self._code = None

    def clear_state(self) -> None:
        """Called when the server has ended, and before a start."""
        super().clear_state()
        self._card = {}

    # -- start

    async def start(self) -> str:
        """Called by the hub; the URL by which it, and its proxy, reach the server."""
        self._events.clear()
        try:
            async with self._undone_if_it_fails():
                return await self._start()
        except SandboxError as error:
            raise _for_page(error) from error

    @contextlib.asynccontextmanager
    async def _undone_if_it_fails(self) -> AsyncIterator[None]:
        try:
            yield
        except BaseException:
            await self._end()
            raise

    async def _start(self) -> str:
        self._tell(5, "Looking at the account and its home directory")
        self._check_hub()
        person = await off_loop(_account, self.user.name)
        self.ip, self.port = "127.0.0.1", _PORT
        launcher = self._launcher(person)
        await off_loop(launcher.sweep)
        await off_loop(sweep, launcher.runtime())
        self._tell(15, "Making the box")
        self._doors = doors = Doors(uuid.uuid4().hex[:12], launcher.runtime())
        with await off_loop(doors.make) as listener:
            self._listen_for_server(doors)
            request = await off_loop(self._request, person, launcher, doors)
            labels = Labels(name=os.path.basename(self.cmd[0]), user=self.user.name, kind=SERVER)
            stdio = Stdio(stdin=listener.fileno())
            self._handle = await launcher.start(request, labels, stdio)
        doors.made()
        self._code, self._card = None, self._handle.card()
        self._tell(60, "The box is there. Waiting for the server in it")
        await self._answered(doors)
        return doors.url

    def _check_hub(self) -> None:
        if os.geteuid() != 0:
            raise HostError(
                attempt="start servers in boxes",
                answer="the hub does not run as root",
                remedy="Run the hub as root, or leave the servers to another spawner and put their "
                "kernels into boxes (docs/jupyterhub.md).",
            )
        if self.internal_ssl:
            raise SpecError(
                attempt="use internal_ssl",
                answer="proxy and hub reach a box through sockets of root's, over which there is "
                "no TLS",
                remedy="Set c.JupyterHub.internal_ssl = False: nobody can listen to them.",
            )
        if self.mem_guarantee:
            raise SpecError(
                attempt="use mem_guarantee",
                answer="no memory is kept free for a box",
                remedy="Leave it out; mem_limit is what nobody else can take from.",
            )

    def _launcher(self, person: pwd.struct_passwd | None = None) -> LocalLauncher:
        """Starts boxes as root, on behalf of *person*: whose home it is, and no variable of the
        hub's."""
        home = person.pw_dir if person else "/"

        def caller() -> Caller:
            return Caller(uid=0, gid=0, home=home, cwd="/", umask=0o022, environment={})

        def warn(text: str) -> None:
            self.log.warning("%s: %s", self._log_name, text)

        return LocalLauncher(runtime_dir=self.runtime_dir, warn=warn, caller=caller)

    def _request(
        self, person: pwd.struct_passwd, launcher: LocalLauncher, doors: Doors
    ) -> LaunchRequest:
        environment, address = self.get_env(), self._api_address()
        environment["JUPYTERHUB_API_URL"], environment["JUPYTERHUB_ACTIVITY_URL"] = (
            urlsplit(environment[name])._replace(netloc=f"127.0.0.1:{address[1]}").geturl()
            for name in ("JUPYTERHUB_API_URL", "JUPYTERHUB_ACTIVITY_URL")
        )
        environment = {name: str(value) for name, value in environment.items()}
        environment["PATH"] = _path_with_ours(environment.get("PATH", os.defpath))
        command = [*self.cmd, *self.get_args()]
        program, needed = _needed_by(command, environment, person)
        if os.path.dirname(program) == os.path.dirname(sys.executable):  # where we are installed
            environment.setdefault("JUPYTER_DEFAULT_PROVISIONER_NAME", CHILD)
        words = (str(_PORT), str(address[1]), API_SOCKET, str(_FROM_PROXY))
        terms = terms_for(Person.find(person.pw_name))
        group, limits = f"hub/{person.pw_name}", self._sum(terms)
        return LaunchRequest(
            sandbox_id=doors.path.name,
            spec=self._within(terms, self._spec(person, doors)),
            argv=(sys.executable, "-SI", relay.__file__, *words, program, *command[1:]),
            environment=environment,
            cwd=person.pw_dir,
            survive_server=True,
            logged=("stdout", "stderr"),
            extra_files=(relay.__file__, *needed),
            below=f"{group}/server",
            # A broker that starts kernels beside it writes the first one anew, by the policy alone.
            sums={group: limits, f"{group}/server": _of_servers(limits)},
            first_id=range_of(person.pw_name, Path(self.state_dir)),
        )

    def _spec(self, person: pwd.struct_passwd, doors: Doors) -> SandboxSpec:
        half = self.mem_limit // 2 if self.mem_limit else None
        sizes = {
            name: half if value is None else parse_bytes(name, value)
            for name, value in (("shm_limit", self.shm_limit), ("tmp_limit", self.tmp_limit))
        }
        way = Volume(source=str(doors.shown), target=INSIDE)
        return SandboxSpec(
            workdir=person.pw_dir,
            covers=Covers(whole=True),
            limits=Limits(shm_bytes=sizes["shm_limit"], tmp_bytes=sizes["tmp_limit"]),
            network=network_wish(self),
            volumes=(way, *_of_machine(), *self._volumes()),
            hostname=f"jupyter-{person.pw_name}"[:63],
        )

    def _within(self, terms: Terms | None, spec: SandboxSpec) -> SandboxSpec:
        """*spec* with no more of a network than the administrator's policy lets the person have."""
        if terms is None:
            return spec
        spec, notices = narrow_network(spec, terms)
        for notice in notices:
            self.log.warning("%s: %s", self._log_name, notice)
        return spec

    def _sum(self, terms: Terms | None = None) -> Limits:
        """What all of this person's has together, by the policy too."""
        wished = Limits(
            memory_bytes=self.mem_limit or None,
            cpu_cores=self.cpu_limit or None,
            cpu_guarantee_cores=self.cpu_guarantee or None,
            pids=self.pids_limit,
        )
        return narrower_sum(wished, terms) if terms else wished

    def _volumes(self) -> Iterator[Volume]:
        if isinstance(self.volumes, list):
            yield from (Volume.parse(self.format_string(text)) for text in self.volumes)
        else:
            yield from self._bound(self.volumes, "rw")
        yield from self._bound(self.read_only_volumes, "ro")

    def _bound(self, volumes: Mapping[str, Any], usual: str) -> Iterator[Volume]:
        """As DockerSpawner writes them."""
        for source, told in volumes.items():
            bind = told if isinstance(told, dict) else {"bind": told}
            target, mode = bind.get("bind", ""), bind.get("mode", usual)
            if (
                mode not in {"ro", "rw"}
                or not isinstance(target, str)
                or set(bind) - {"bind", "mode"}
            ):
                raise SpecError(
                    attempt="read volumes",
                    answer=f"{source!r}: {told!r} is not a volume",
                    remedy='Write {"/source": "/target"}, or {"/source": {"bind": "/target", '
                    '"mode": "ro"}}.',
                )
            yield Volume(
                source=self.format_string(source),
                target=self.format_string(target),
                readonly=usual == "ro" or mode == "ro",
            )

    def _api_address(self) -> tuple[str, int]:
        """Of the hub's API: the only one that anybody in the box is carried to."""
        url = urlsplit(self.hub_connect_url or self.hub.api_url)
        if url.scheme != "http" or not url.hostname:
            raise SpecError(
                attempt=f"reach the hub's API at {url.geturl()}",
                answer="only plain HTTP over TCP is carried to it",
                remedy="Set c.JupyterHub.hub_bind_url (or hub_connect_url) to a URL such as "
                "http://127.0.0.1:8081. It does not leave this machine.",
            )
        return url.hostname, url.port or 80

    def _listen_for_server(self, doors: Doors) -> None:
        host, port = self._api_address()
        way = relay.Relay(doors.listen_for_server(), lambda: _to_hub(host, port), _FROM_SERVER)
        self._relay = asyncio.ensure_future(way.serve())

    async def _answered(self, doors: Doors) -> None:
        """Return when the server answers; LaunchError if it ends before."""
        assert self._handle
        url = urlsplit(f"{self.server.base_url}api")
        answered = asyncio.ensure_future(_first_answer(doors.entrance, url.path))
        ended = asyncio.ensure_future(self._handle.wait())
        try:
            await asyncio.wait({answered, ended}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            answered.cancel()
            ended.cancel()
        if ended.done() and not ended.cancelled():
            raise _ended_early(ended.result())

    # -- the page that people wait at

    def _tell(self, percent: int, text: str) -> None:
        self._events.append({"progress": percent, "message": f"{text} ..."})
        told, self._told = self._told, asyncio.Event()
        told.set()

    async def progress(self) -> AsyncIterator[dict[str, Any]]:
        """Called by the hub, which ends it when the server is there, or cannot be."""
        told = 0
        while True:
            more = self._told
            for event in self._events[told:]:
                yield event
                told += 1
            await more.wait()

    # -- while it runs, and its end

    async def poll(self) -> int | None:
        """Called by the hub every now and then: None while the server runs."""
        if self._is_lost:
            self._is_lost = False
            await off_loop(self._launcher().sweep)
        if self._handle is None:
            return self._code
        for sentence in self._handle.notices():
            self.log.info("%s: %s", self._log_name, one_line(sentence))
        if (story := await self._handle.look()) is None:
            if self._relay is None and self._doors:  # another hub was there before
                self._listen_for_server(self._doors)
            return None
        self.log.warning("The server of %s ended: %s", self._log_name, one_line(_how(story)))
        self._code = story.code if story.code is not None else 1
        await self._end()
        return self._code

    async def stop(self, now: bool = False) -> None:
        """Called by the hub: end all in the box, and leave nothing."""
        if self._handle and not now:
            self._handle.signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.term_timeout):
                    await self._handle.wait()
        await self._end()

    async def _end(self) -> None:
        handle, self._handle = self._handle, None
        try:
            if handle:
                if self._code is None:
                    self._code = 0
                await handle.close()
        finally:
            self._forget()

    def _forget(self) -> None:
        if self._relay:
            self._relay.cancel()
            self._relay = None
        if self._doors:
            self._doors.remove()
            self._doors = None


# -- on the way of a start


def _of_servers(limits: Limits) -> Limits:
    """Of *limits* of all that a person runs, those of the servers: but for CPU time, of which v1
    lets no group have more than the one above, also where that is changed (sched-bwc.rst)."""
    return Limits(memory_bytes=limits.memory_bytes, pids=limits.pids)


def _account(name: str) -> pwd.struct_passwd:
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
            attempt=attempt, answer="this machine has no such user", remedy=(_ASK, remedy)
        ) from None
    if person.pw_uid == 0:
        answer = "it is root's account, whose files are everybody's"
        raise HostError(attempt=attempt, answer=answer, remedy="Log in as another user.")
    home = person.pw_dir
    try:
        status = os.lstat(home)
    except OSError as error:
        answer = f"the home directory {home} cannot be used: {error.strerror}"
        remedy = f"mkdir {home} && chown {name}: {home}"
        raise HostError(attempt=attempt, answer=answer, remedy=(_ASK, remedy)) from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != person.pw_uid:
        answer = f"the home directory {home} is not a directory of theirs"
        remedy = f"chown {name}: {home}"
        raise HostError(attempt=attempt, answer=answer, remedy=(_ASK, remedy))
    return person


def _needed_by(
    command: list[str], environment: Mapping[str, str], person: pwd.struct_passwd
) -> tuple[str, tuple[str, ...]]:
    """The absolute path of the program of *command*, and all that it needs of the host to run."""
    caller = Caller(
        uid=0, gid=0, home=person.pw_dir, cwd=person.pw_dir, umask=0o022, environment={}
    )
    given = Given(writable=(os.path.realpath(person.pw_dir),), owner_uid=person.pw_uid)
    found = find_kernel_files(command, environment, HostFacts.probe((), caller), (), given)
    return found.program, found.readonly


def _path_with_ours(path: str) -> str:
    """A hub that is started by its full path has its own programs nowhere on the PATH."""
    ours = os.path.dirname(sys.executable)
    return path if ours in path.split(os.pathsep) else f"{ours}{os.pathsep}{path}"


def _of_machine() -> Iterator[Volume]:
    return (Volume(source=path, target=path) for path in _OF_MACHINE if os.path.isdir(path))


async def _to_hub(host: str, port: int) -> socket.socket:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, _, _, _, address = found[0]
    return await relay.dialled(family, address)  # type: ignore[arg-type]


async def _first_answer(path: Path, url_path: str) -> None:
    """Wait for whatever the server says to a request: for ever where it will never say anything,
    since then its box ends just now."""
    with contextlib.suppress(OSError):
        reader, writer = await asyncio.open_unix_connection(str(path))
        with contextlib.closing(writer):
            writer.write(f"GET {url_path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
            await writer.drain()
            if await reader.read(1):
                return
    await asyncio.Event().wait()


def _how(story: ExitStory) -> str:
    return story.reason or f"its exit status is {story.code}"


def _ended_early(story: ExitStory) -> LaunchError:
    return LaunchError(
        attempt="start the server",
        answer=f"it ended before it answered: {_how(story)}",
        remedy="See what it wrote last, below; the log of the hub has all of it.",
        step="wait-for-server",
        stderr_tail=story.stderr_tail,
    )


def _for_page(error: SandboxError) -> SpawnException:
    """*error* as the hub shows it to the user, and logs it."""
    told = in_lines(error.for_people())
    shown = SpawnException(
        told,
        reason="sandbox",
        log_message=one_line(str(error)),
        message_html=f"<pre>{html.escape(told)}</pre>",
        status_code=500,
    )
    # The page of a start that takes longer looks for these.
    shown.jupyterhub_message, shown.jupyterhub_html_message = told, shown.message_html
    return shown
