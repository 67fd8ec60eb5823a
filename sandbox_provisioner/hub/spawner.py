"""hub/spawner.py - in the hub: starts each user's whole server in a box.

``c.JupyterHub.spawner_class = "sandbox"``. All code of a user runs in one box then: the server, its
extensions, terminals, language servers, and kernels of every kind, known to us or not. Its caps
are those of the person's group, all root's; the home is the user's own, and so is every file in it;
the way in and the way to the hub's API are those of `relay.py`. A box outlives the hub: the next
one finds it by its card. A hub that runs as root starts it by itself (`servers.py`), any other one
has the broker do it (`through_broker.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import html
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jupyterhub.spawner import Spawner, SpawnException
from traitlets import Bool, Dict, Enum, Float, Integer, List, Unicode, Union

from sandbox_provisioner import audit
from sandbox_provisioner.broker.server_wish import ServerWish
from sandbox_provisioner.broker.talk import Silent
from sandbox_provisioner.broker.values import BadValue
from sandbox_provisioner.contract import Stdio
from sandbox_provisioner.errors import HostError, LaunchError, SandboxError, SpecError, in_lines
from sandbox_provisioner.facilities.devices.wish import DeviceOptions
from sandbox_provisioner.facilities.network.wish.options import NetworkOptions, network_wish
from sandbox_provisioner.facilities.storage.wish.options import DiskOptions, disk_wish
from sandbox_provisioner.facilities.volumes.wish import READ_ONLY, WRITABLE, as_texts, check_name
from sandbox_provisioner.hub import relay
from sandbox_provisioner.hub.kernels import UNTAKEN
from sandbox_provisioner.hub.ranges import FOLDER
from sandbox_provisioner.hub.servers import Server, Servers, as_root
from sandbox_provisioner.hub.through_broker import BrokeredServer, BrokeredServers, check_account
from sandbox_provisioner.inside.printable import one_line
from sandbox_provisioner.launch import LocalLauncher
from sandbox_provisioner.off_loop import apart, off_loop, widen
from sandbox_provisioner.options import AUTO, BROKER, BROKER_SOCKET, LOCAL
from sandbox_provisioner.policy.current import terms_for
from sandbox_provisioner.spec import Limits, Volume
from sandbox_provisioner.story import ExitStory
from sandbox_provisioner.units import parse_bytes

# In a network of its own, so the same for everybody. jupyter_server's default.
_PORT = 8888
_THREADS = 64
_FROM_SERVER = 8


# JupyterHub has no types.
class SandboxSpawner(DeviceOptions, DiskOptions, NetworkOptions, Spawner):  # type: ignore[misc]
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
    username_template = Unicode(
        "{USERNAME}",
        help='The account of a user of the hub, as SystemdSpawner has it: "jupyter-{USERNAME}".',
    ).tag(config=True)
    term_timeout = Float(
        1.0,
        help="Seconds that a server has to end by itself when it is asked to, before all in its "
        "box is killed.",
    ).tag(config=True)
    runtime_dir = Unicode(
        "",
        help="Where the records of boxes are; the default is /run/sandbox-provisioner. The broker "
        "has its own.",
    ).tag(config=True)

    state_dir = Unicode(
        str(FOLDER),
        help="Where it is written down, for ever, which range of ids is whose. "
        "The broker has its own.",
    ).tag(config=True)

    launcher = Enum(
        [AUTO, LOCAL, BROKER],
        default_value=AUTO,
        help='Who starts servers: "local" is the hub itself, which has to be root; "broker" is a '
        "daemon of this machine (docs/broker.md), for a hub that is not: the policy of this "
        'machine has to name its account. "auto": the hub, if it is root.',
    ).tag(config=True)
    broker_socket = Unicode(BROKER_SOCKET, help="Where that daemon listens.").tag(config=True)

    metrics = Bool(
        False, help="Whether the hub's own metrics (/hub/metrics) tell of boxes too."
    ).tag(config=True)

    def __init__(self, **kwargs: Any) -> None:
        self._running: Server | BrokeredServer | None = None
        self._relay: asyncio.Task[None] | None = None
        self._ending = asyncio.Lock()
        self._code: int | None = 0  # of a server that has ended, or that there never was
        self._card: dict[str, Any] = {}
        self._keeping: asyncio.Future[None] | None = None
        self._is_kept = True  # the broker knows that we have written the card down, or it may not
        self._is_lost = False  # it ended when no hub was there
        self._events: list[dict[str, Any]] = []
        self._told = asyncio.Event()
        super().__init__(**kwargs)
        _serve_many()
        if self.metrics and not self._asks_broker:
            _count(str(LocalLauncher(runtime_dir=self.runtime_dir).runtime()))

    @property
    def _asks_broker(self) -> bool:
        return self.launcher == BROKER or (self.launcher == AUTO and os.geteuid() != 0)

    def _servers(self) -> Servers | BrokeredServers:
        """Who starts and finds them."""
        if self._asks_broker:
            return BrokeredServers(self.broker_socket, self._warn)
        return Servers(
            judge=as_root,
            terms_for=terms_for,
            warn=self._warn,
            log=self._log_kernels,
            runtime_dir=self.runtime_dir,
            state_dir=self.state_dir,
        )

    def _warn(self, text: str) -> None:
        self.log.warning("%s: %s", self._log_name, one_line(text))

    # -- what a hub remembers

    def get_state(self) -> dict[str, Any]:
        """Called when the server runs: what the next hub needs to find it."""
        state: dict[str, Any] = super().get_state()
        if not self._card:
            return state
        if not self._is_kept and self._keeping is None:  # which is written down before we wait
            self._keeping = asyncio.ensure_future(self._keep())
        return state | {"sandbox": self._card}

    async def _keep(self) -> None:
        with contextlib.suppress(SandboxError):  # `poll` tries again
            if isinstance(self._running, BrokeredServer):
                await self._running.keep()
                self._is_kept = True

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Called by the next hub. A server that has ended meanwhile is told by `poll`."""
        super().load_state(state)
        if card := state.get("sandbox"):
            self._card = dict(card)
            self._find()

    def _find(self) -> None:
        try:
            self._running = running = self._servers().find(self._card)
        except LaunchError as error:
            self._warn(str(error))
            self._is_lost, self._code = True, 0
        except SandboxError as error:  # whether it runs nobody can tell just now
            self._warn(str(error))
            self._code = None
        else:
            self._code = None
            # What ended with it is nobody's.
            self._is_lost = isinstance(running, Server) and running.handle.poll() is not None

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
            if not self._asks_broker:  # which has told it itself
                await off_loop(partial(audit.refused, error, **self._wished()))
            raise _for_page(error) from error

    def _wished(self) -> dict[str, Any]:
        """What an audit tells of a start that came to nothing."""
        name = os.path.basename(self.cmd[0]) if self.cmd else ""
        return {"person": self.user.name, "name": name, "asked": None}

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
        self.ip, self.port = "127.0.0.1", _PORT
        wish = self._wish()
        self._tell(15, "Making the box")
        self._running = running = await self._servers().start(wish, Stdio())
        self._is_kept, self._keeping = not self._asks_broker, None
        await self._listen_for_server(running)
        self._code, self._card = None, running.handle.card()
        self._tell(60, "The box is there. Waiting for the server in it")
        await self._answered(running)
        return running.url

    def _account_name(self) -> str:
        return self.username_template.replace("{USERNAME}", self.user.name)

    def _check_hub(self) -> None:
        if self._asks_broker:
            check_account()
        elif os.geteuid() != 0:
            raise HostError(
                attempt="start servers in boxes",
                answer="the hub does not run as root",
                remedy='Leave c.SandboxSpawner.launcher = "local" out: then the sandbox broker '
                "starts the servers (docs/jupyterhub.md). Or run the hub as root.",
            )
        if self.metrics and self._asks_broker:
            raise SpecError(
                attempt="have the hub's metrics tell of boxes",
                answer="the broker has the boxes of a hub that is not root",
                remedy="Leave c.SandboxSpawner.metrics out, and scrape the broker: its --metrics.",
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
        if "traefik" in type(self.user.settings.get("proxy")).__module__:
            raise SpecError(
                attempt="reach servers in boxes through Traefik",
                answer="they listen on unix sockets, to which it forwards nothing",
                remedy='Set c.JupyterHub.proxy_class = "configurable-http-proxy".',
            )

    def _wish(self) -> ServerWish:
        """What is asked for; SpecError for what cannot be meant."""
        environment, address = self.get_env(), self._api_address()
        environment["JUPYTERHUB_API_URL"], environment["JUPYTERHUB_ACTIVITY_URL"] = (
            urlsplit(environment[name])._replace(netloc=f"127.0.0.1:{address[1]}").geturl()
            for name in ("JUPYTERHUB_API_URL", "JUPYTERHUB_ACTIVITY_URL")
        )
        environment = {name: str(value) for name, value in environment.items()}
        environment["PATH"] = _path_with_ours(environment.get("PATH", os.defpath))
        try:
            return ServerWish(
                person=self._account_name(),
                user=self.user.name,
                argv=(*self.cmd, *self.get_args()),
                environment=environment,
                port=_PORT,
                api_port=address[1],
                sum=self._sum(),
                box=self._box(),
                network=network_wish(self),
                volumes=tuple(self._volumes()),
                devices=tuple(self.devices),
                installed=os.path.dirname(sys.executable),
            )
        except BadValue as error:
            raise SpecError(
                attempt=f"start a server for {self.user.name}",
                answer=str(error),
                remedy="Look at what c.Spawner and c.SandboxSpawner say of it.",
            ) from None

    def _box(self) -> Limits:
        half = self.mem_limit // 2 if self.mem_limit else None
        sizes = {
            name: half if value is None else parse_bytes(name, value)
            for name, value in (("shm_limit", self.shm_limit), ("tmp_limit", self.tmp_limit))
        }
        return Limits(
            shm_bytes=sizes["shm_limit"], tmp_bytes=sizes["tmp_limit"], **vars(disk_wish(self))
        )

    def _sum(self) -> Limits:
        """What all of this person's has together."""
        return Limits(
            memory_bytes=self.mem_limit or None,
            cpu_cores=self.cpu_limit or None,
            cpu_guarantee_cores=self.cpu_guarantee or None,
            pids=self.pids_limit,
        )

    def _volumes(self) -> Iterator[Volume]:
        """As DockerSpawner writes them: what its administrator gives can be written to, unless
        it is among those that are read-only."""
        for text in as_texts(self.volumes, WRITABLE):
            yield Volume.parse(self._filled_in(text))
        for text in as_texts(self.read_only_volumes, READ_ONLY):
            yield replace(Volume.parse(self._filled_in(text)), readonly=True)

    def _filled_in(self, text: str) -> str:
        """With the names that JupyterHub knows of; none of them leads a path elsewhere."""
        for name in (self.user.name, self.name) if "{" in text else ():
            if name:
                check_name(name)
        return str(self.format_string(text))

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

    async def _listen_for_server(self, running: Server | BrokeredServer) -> None:
        """For what it asks of the hub. Who polls meanwhile sees it."""
        host, port = self._api_address()
        listener = await running.listen()
        way = relay.Relay(listener, lambda: _to_hub(host, port), _FROM_SERVER, apart)
        self._relay = asyncio.ensure_future(way.serve())

    async def _listen_again(self, running: Server | BrokeredServer) -> None:
        """The same where another hub was there before, which may have been of another version:
        kernels are no reason to end a server."""
        try:
            await self._listen_for_server(running)
            if isinstance(running, Server):
                await running.kernels.begin()
        except Silent:
            return  # the next poll tries again
        except UNTAKEN as error:
            self._warn(f"It starts no kernels until it is started anew: {error}")

    def _log_kernels(self, event: str, **told: object) -> None:
        level = logging.WARNING if event in {"refusal", "warning"} else logging.INFO
        self.log.log(level, "%s: %s of a kernel: %s", self._log_name, event, json.dumps(told))

    async def _answered(self, running: Server | BrokeredServer) -> None:
        """Return when the server answers; LaunchError if it ends before."""
        url = urlsplit(f"{self.server.base_url}api")
        answered = asyncio.ensure_future(_first_answer(running.entrance, url.path))
        ended = asyncio.ensure_future(running.handle.wait())
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
            await off_loop(self._servers().sweep)
        if self._running is None and self._card and self._code is None:
            await off_loop(self._find)
        if (running := self._running) is None:
            async with self._ending:  # who asked before us may still be removing it
                return self._code
        for sentence in running.handle.notices():
            self.log.info("%s: %s", self._log_name, one_line(sentence))
        if (story := await running.handle.look()) is None:
            if self._relay is None and self._code is None:
                await self._listen_again(running)
            if self._keeping and not self._is_kept:
                await self._keep()
            return None
        self.log.warning("The server of %s ended: %s", self._log_name, one_line(_how(story)))
        self._code = story.code if story.code is not None else 1
        await self._end()
        return self._code

    async def stop(self, now: bool = False) -> None:
        """Called by the hub: end all in the box, and leave nothing."""
        if self._running is None and self._card and self._code is None:
            await off_loop(self._find)
        if self._running and not now:
            handle = self._running.handle
            with contextlib.suppress(TimeoutError, SandboxError):  # then it is killed
                await off_loop(handle.signal, signal.SIGTERM)
                async with asyncio.timeout(self.term_timeout):
                    await handle.wait()
        if self._running is None and self._card and self._code is None:
            if isinstance(servers := self._servers(), BrokeredServers):
                servers.close_later(self._card)
            self._code = 0
        await self._end()

    async def _end(self) -> None:
        async with self._ending:
            running, self._running = self._running, None
            try:
                if running:
                    if self._code is None:
                        self._code = 0
                    await running.close()
            finally:
                if self._relay:
                    self._relay.cancel()
                    self._relay = None


@cache
def _serve_many() -> None:
    """Once in the life of the hub: what one person's server has waiting keeps no other from
    starting."""
    widen(_THREADS)


@cache
def _count(runtime: str) -> None:
    """Have the servers of *runtime* counted, once in the life of the hub."""
    # Only a hub that was asked for it imports this.
    from sandbox_provisioner.metrics import Metrics, servers_in  # noqa: PLC0415

    Metrics(partial(servers_in, Path(runtime)))


# -- on the way of a start


def _path_with_ours(path: str) -> str:
    """A hub that is started by its full path has its own programs nowhere on the PATH."""
    ours = os.path.dirname(sys.executable)
    return path if ours in path.split(os.pathsep) else f"{ours}{os.pathsep}{path}"


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
