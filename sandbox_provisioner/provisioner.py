"""provisioner.py - in the server: jupyter_client's contract on one side, our types on the other.

It translates options into a `SandboxSpec`, hands a `LaunchRequest` to a launcher, and answers
jupyter_client about the handle that comes back (`contract.py`).

The contract has traps, each of which a test in tests/kernels holds: `cleanup` comes twice, or alone
with the kernel still there; `kill` never sees restart=True; nobody cleans up after a failed launch;
a signal comes after death; an unknown key of kernel.json's config is only a warning upstream.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import pwd
import re
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import zmq
from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.multikernelmanager import MultiKernelManager
from jupyter_client.provisioning.local_provisioner import LocalProvisioner
from tornado.web import HTTPError
from traitlets import TraitError, TraitType, default, observe

from sandbox_provisioner import audit
from sandbox_provisioner.broker import box
from sandbox_provisioner.broker.launcher import BrokerLauncher
from sandbox_provisioner.confinement import confiner
from sandbox_provisioner.contract import (
    Handle,
    Labels,
    Launcher,
    MeetingPlace,
    Stdio,
    Warmth,
    WarmUnavailable,
)
from sandbox_provisioner.ends import MIME, End
from sandbox_provisioner.ends_file import EndsFile
from sandbox_provisioner.errors import (
    COMMAND,
    InternalError,
    LaunchError,
    SandboxError,
    SpecError,
    in_lines,
    told_as_internal_error,
)
from sandbox_provisioner.facilities.environment.plan.variables import set_and_left_out
from sandbox_provisioner.facilities.network.tell.said import summary
from sandbox_provisioner.facilities.network.wish.network import Network, NetworkWish
from sandbox_provisioner.facilities.network.wish.options import network_wish
from sandbox_provisioner.facilities.volumes.wish import without_mode
from sandbox_provisioner.facilities.workdir.facts.run_by_host import IN_START_DIRECTORY
from sandbox_provisioner.host import memory_bytes
from sandbox_provisioner.inside.printable import one_line
from sandbox_provisioner.last_words import LastWords
from sandbox_provisioner.meeting import PORTS
from sandbox_provisioner.off_loop import Gate, apart, off_loop, one_after_another
from sandbox_provisioner.option_errors import bad_value, unknown_option
from sandbox_provisioner.options import (
    AUTO,
    BROKER,
    BROKER_SOCKET,
    LOCAL,
    SandboxOptions,
    every_option,
    spec_of,
)
from sandbox_provisioner.plan import LaunchRequest, start_directory
from sandbox_provisioner.policy.current import terms_of_this_process
from sandbox_provisioner.policy.narrow import for_person, narrow
from sandbox_provisioner.policy.person import Person
from sandbox_provisioner.policy.terms import Terms
from sandbox_provisioner.spec import (
    Confinement,
    Limits,
    SandboxSpec,
    volumes_for,
)
from sandbox_provisioner.story import ExitStory, signal_name
from sandbox_provisioner.templates import keep_templates_out, template_places
from sandbox_provisioner.told import EndKind
from sandbox_provisioner.unboxed import inner_command
from sandbox_provisioner.warm.ahead import count_start
from sandbox_provisioner.warm.keys import this_process
from sandbox_provisioner.warm.launcher import WarmLauncher

_POLL_SECONDS = 1.0
_MOST_UNSEEN = 4
# How long a nursery that nobody asked for may cost more memory than it saves: as long as a person
# goes on opening notebooks.
_LONELY_SECONDS = 300.0
_LONGEST_NAME = 4096  # of a notebook, with its path
# An interpreter that starts computes for some 0.3 s. Sixty at once on two CPUs take each other's
# caches away, and a quarter longer than three at a time; and then all of them are late.
_COLD_STARTS = len(os.sched_getaffinity(0)) + 1
_COLD_START_SECONDS = 1.0
_cold_starts = Gate(_COLD_STARTS, _COLD_START_SECONDS)


class _Lines(str):
    """Text whose form for programmers is itself: where a notebook is given another kernel,
    jupyter_server puts that into the dialog (services/sessions/handlers.py)."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"\n{self}"


class StartRefused(HTTPError):
    """How a SandboxError reaches a person: JupyterLab's dialog shows *log_message* only of an
    HTTPError, and only the reason and message of this form. The text is in lines, since nobody
    after us breaks any."""

    def __init__(self, error: SandboxError) -> None:
        super().__init__(500, str(error), reason="Kernel could not be started")
        self.error = error

    @property
    def log_message(self) -> str:
        return str(self)

    def get_message(self) -> str:
        """What tornado's log gets: one line."""
        return str(self.error)

    def __str__(self) -> str:
        """Of this jupyter_server makes an HTTPError of its own, whose message tornado takes for a
        format: the dialog would say "50%%"."""
        return _Lines(re.sub(r"(?<=\d)%", " percent", self.error.for_people()))


class OptionRefused(StartRefused, TraitError):
    """The same where an option has a value of a wrong type: callers of traitlets look for this."""


class ProgramNotFound(StartRefused, FileNotFoundError):
    """The same where the kernel's program is missing: callers of jupyter_client look for this."""


# What launchers have told in the life of this process.
_told: set[str] = set()
# How a kernel may end that was asked to, by a message and by signals.
_OF_A_SHUTDOWN = {EndKind.INTERRUPTED, EndKind.SIGNAL}
# Of kernelspecs by their names, why they start cold: no more than there are of these.
_told_cold: set[tuple[str, str]] = set()


# jupyter_client computes its metaclass, which mypy cannot know to be one of traitlets'.
class SandboxProvisioner(SandboxOptions, LocalProvisioner):  # type: ignore[metaclass]
    """Starts a kernel in Linux namespaces of its own, under memory, CPU and process caps.

    jupyter_client makes one for each kernel and keeps it over restarts. Options come from the
    kernel.json's ``metadata.kernel_provisioner.config``, which wins, or from
    ``c.SandboxProvisioner`` in a configuration file; options.py has them all.
    """

    spec: SandboxSpec
    handle: Handle | None = None
    story: ExitStory | None = None
    #: How the kernel ended the last time, for programs: docs/ends.md. None if it never has.
    end: End | None = None
    #: What the administrator's policy lets us have; None where there is none.
    terms: Terms | None = None
    #: What was asked for before that narrowed it; None where nothing does.
    asked: SandboxSpec | None = None
    #: What the person at the notebook is told of that.
    narrowed = ""

    def __init__(self, **kwargs: Any) -> None:
        self._launcher: Launcher | None = None
        try:
            super().__init__(**kwargs)
        except TraitError as error:
            given = {**kwargs.get("config", {}).get("SandboxProvisioner", {}), **kwargs}
            raise OptionRefused(bad_value(error, self.traits(config=True), given)) from error
        self.sandbox_id = uuid.uuid4().hex[:12]
        self._tap: LastWords | None = None
        self._telling: asyncio.Task[None] | None = None  # under the first cell
        self._place = contextlib.AsyncExitStack()  # among those that start cold now
        self._ending = False
        self._starts = False  # or is about to, in a restart
        self._given_up = False  # it was shut down since
        self._busy: bool | None = None  # as it was noted down
        self._restart_limit: int | None = None  # what it is where somebody has stopped the kernel
        self._ends_file: EndsFile | None = None
        self._told_of_policy: set[str] = set()
        self._network_bytes = 0  # of all starts: a restart brings no new network_quota

    # -- what is asked for

    @classmethod
    def class_own_traits(cls, **metadata: Any) -> dict[str, TraitType[Any, Any]]:
        """Called by applications, which neither take nor tell options of a class that has none of
        its own: here these are all of the table."""
        own = super().class_own_traits(**metadata)
        if cls is SandboxProvisioner:
            names = cls.class_traits(**metadata).keys() & every_option().keys()
            own |= {name: cls.class_traits()[name] for name in names}
        return own

    def _refuse_unknown_keys(self) -> None:
        """kernel.json's config is passed on as keywords, of which traitlets only warns."""
        known = set(self.trait_names(config=True))
        for key in self._of_kernel_json():
            if key not in known:
                raise unknown_option(key, f"{key!r} of kernel.json", known)
        for key in self.config.get("SandboxProvisioner", {}):
            if key not in known:
                raise unknown_option(key, f"c.SandboxProvisioner.{key}", known)

    def _of_kernel_json(self) -> Mapping[str, Any]:
        metadata = self.kernel_spec.metadata if self.kernel_spec else {}
        options: Mapping[str, Any] = metadata.get("kernel_provisioner", {}).get("config", {})
        return options

    def _network(self) -> NetworkWish:
        """Where kernel.json says of none, and no more, the rest is a configuration's, for those
        that have one."""
        options = self._of_kernel_json().items()
        said = {name: value for name, value in options if name.startswith("network") and value}
        return NetworkWish() if said == {"network": Network.NONE} else network_wish(self)

    def _refuse_silent_weakness(self) -> None:
        """Whoever chooses a kernel reads its display name, and nothing else, before it runs."""
        name = self.kernel_spec.display_name
        holder = confiner(self.confinement)
        if holder.must_be_shown and holder.shown_as not in name.lower():
            raise SpecError(
                attempt=f'start {name!r} with confinement = "{self.confinement}"',
                answer="its display name does not tell that it is weaker than a sandbox made of "
                "namespaces",
                remedy=(
                    "Make a twin that does:",
                    f"{COMMAND}jupyter sandbox install --confinement {self.confinement}",
                ),
            )

    def spec_for(self, cwd: str) -> SandboxSpec:
        """The options as a `SandboxSpec`, for a kernel that starts in *cwd*; raises SpecError."""
        spec = spec_of(self, workdir=self._workdir(cwd), network=self._network())
        self._tell_of_volumes()
        limits = spec.limits
        if not self._may_interrupt(limits):
            limits = replace(limits, interrupt_share=None)
        by_default = {cap.facility for cap in limits.asked if self.untouched & {*cap.options}}
        limits = replace(limits, by_default=frozenset(by_default))
        return self._as_allowed(replace(spec, limits=limits, untouched=self._nobody_has_set()))

    def _nobody_has_set(self) -> frozenset[str]:
        """The options that stand neither in kernel.json nor in a configuration, and that nothing
        else has changed."""
        written = set(self._of_kernel_json())
        for section in self.section_names():
            written |= self.config.get(section, {}).keys()
        usual = _usual_values()
        return frozenset(
            name for name in usual.keys() - written if getattr(self, name) == usual[name]
        )

    def _as_allowed(self, spec: SandboxSpec) -> SandboxSpec:
        """*spec* as the administrator's policy lets us have it, where there is one; SpecError."""
        # Who asks a hub does not know for whom the policy takes it, and may not read that.
        self.terms = None if self._asks_hub else terms_of_this_process()
        self.narrowed = ""
        if self.terms is None:
            return spec
        self.asked = spec
        spec, notices = narrow(spec, self.terms)
        self.narrowed = for_person(notices, self.terms.ask)
        for notice in notices:
            if notice not in self._told_of_policy:
                self._told_of_policy.add(notice)
                self.log.warning("%s", notice)
        return spec

    def username(self) -> str:
        """Called for a path that names the user."""
        return Person.find(os.geteuid()).name

    def _tell_of_volumes(self) -> None:
        """DockerSpawner's can be written to unless they say otherwise; people copy them."""
        for source in without_mode(self.volumes):
            text = (
                f'The volume "{source}" can only be read, since it does not say more. If kernels '
                f'shall write to it: {{"{source}": {{"bind": ..., "mode": "rw"}}}}.'
            )
            if text not in _told:
                _told.add(text)
                self.log.info("%s", text)

    def machine_bytes(self) -> int:
        """Called for an option that is a share of the machine's memory."""
        return memory_bytes()

    def _may_interrupt(self, limits: Limits) -> bool:
        """A kernel that wants interrupts as messages may end of a signal: none for that one. And
        one that swallows it, or answers "aborted", would show wrong results as if all were well."""
        kernel, by_default = self.kernel_spec, limits.interrupt_by_default
        if kernel is None:
            return True
        return kernel.interrupt_mode != "message" and (not by_default or is_ipython(kernel.argv))

    def _workdir(self, cwd: str) -> str:
        if self.workdir == "notebook":
            return cwd
        if self.workdir != "root":
            return self.workdir
        root = self._server_root()
        if not root:
            raise SpecError(
                attempt='use workdir = "root"',
                answer="no Jupyter server starts this kernel, so there is no root directory",
                remedy='Use "notebook", or write the path of the directory.',
            )
        return root

    def _server_places(self) -> tuple[str, ...]:
        """What JupyterLab and nbconvert run that lies where notebooks do."""
        root = self._server_root()
        below_root = [f"{root}/{name}" for name in IN_START_DIRECTORY] if root else []
        return (*below_root, *template_places(os.getcwd()))

    def _server_root(self) -> str:
        """The directory that a Jupyter server shows, "" if we are in none."""
        root = getattr(getattr(self.parent, "parent", None), "root_dir", "")
        return os.path.abspath(os.path.expanduser(root)) if root else ""

    @property
    def starter(self) -> Launcher:
        """Who starts our sandboxes, made once."""
        if self._launcher is None:
            asks = self.launcher == BROKER
            self._launcher = self._asking() if asks else self._launching()
        return self._launcher

    def _launching(self) -> WarmLauncher:
        warn = lambda text: self.log.warning("%s", text)  # noqa: E731
        return WarmLauncher(
            runtime_dir=self.runtime_dir,
            layer_dir=self.layer_dir,
            review_days=self.review_days,
            warn=warn,
            told=_told,
            keep_seconds=self.warm_idle_timeout,
        )

    def _asking(self) -> BrokerLauncher:
        warn = lambda text: self.log.warning("%s", text)  # noqa: E731
        return BrokerLauncher(self.broker_socket, warn, self.runtime_dir)

    @default("broker_socket")
    def _usual_socket(self) -> str:
        """In a box of a hub's that hub answers, and nobody else."""
        return box.SOCKET if os.path.exists(box.SOCKET) else BROKER_SOCKET

    @property
    def _asks_hub(self) -> bool:
        """Whether our server is in a box of a hub's, which starts its kernels."""
        return self.launcher != LOCAL and self.broker_socket == box.SOCKET

    @observe("runtime_dir", "layer_dir", "review_days", "launcher", "broker_socket")
    def _starts_elsewhere(self, _: Any) -> None:
        self._launcher = None

    def _choose_starter(self) -> None:
        """With "auto": the broker, where there is one, for what we lack the rights to do."""
        if self.launcher != AUTO or self._launcher or not os.path.exists(self.broker_socket):
            return
        if self._asks_hub:
            self._launcher = self._asking()
            return
        local = self._launching()
        self._launcher = self._asking() if local.obstacle(self.spec) else local

    @property
    def meeting(self) -> MeetingPlace:
        """Where clients meet our kernel, which need not be there yet."""
        return self.starter.meeting_place(self.sandbox_id, Confinement(self.confinement))

    # -- start

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        """Called by the manager before every start and restart: options, transport, command."""
        self._starts = True
        try:
            with self._told():
                async with one_after_another():
                    return await self._prepared(kwargs)
        except SandboxError as error:
            raise await self._refuse(error) from error
        except BaseException:
            self._starts = self._given_up = False
            raise

    async def _prepared(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        self._refuse_unknown_keys()
        kwargs["cwd"] = os.path.abspath(kwargs.get("cwd") or os.getcwd())
        # A share of the memory is one of what the groups around us have: files of the host.
        self.spec = await off_loop(self.spec_for, kwargs["cwd"])
        self._refuse_silent_weakness()
        await off_loop(self._choose_starter)
        keep_templates_out(self)
        if self.parent:
            self._choose_transport(self.parent)
        kwargs = await super().pre_launch(**kwargs)
        kwargs["cmd"] = inner_command(kwargs["cmd"])
        return kwargs

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        """Called by the manager after `pre_launch`: returns when the kernel's sockets are there."""
        self._starts = True
        try:
            with self._told():
                handle = await self._launched(cmd, kwargs)
                self._check_wanted()
        except SandboxError as error:
            raise await self._refuse(error) from error
        except BaseException:
            await self._close()
            raise
        finally:
            self._starts = self._given_up = False
        self.pid = self.pgid = handle.pid
        return self.connection_info

    def _told(self) -> contextlib.AbstractContextManager[None]:
        """Of a mistake of ours the person is told as of any other reason for no start. Not of what
        jupyter_client and its callers have an error of their own for."""
        attempt = f"start the kernel {self.kernel_spec.display_name!r}"
        return told_as_internal_error(attempt, but=(HTTPError, TraitError))

    def _check_wanted(self) -> None:
        """Whoever shuts a kernel down while it restarts knows nothing of the start: the kernel
        would be nobody's, and live on for as long as the server does."""
        if self._given_up:
            raise LaunchError(
                attempt=f"start the kernel {self.kernel_spec.display_name!r}",
                answer="it was shut down meanwhile",
                remedy="Start it again if you want it.",
                step="wait-for-kernel",
            )

    async def _launched(self, cmd: list[str], kwargs: dict[str, Any]) -> Handle:
        await self._close()  # of a manager that starts again without a shutdown
        if self.ends_file:
            await off_loop(self._open_ends_file)
        self.story = None
        self._may_restart()
        self._ending = False
        self._busy = None
        async with contextlib.AsyncExitStack() as self._place:
            self.handle = await self._start(cmd, kwargs)
            await self._await_sockets(self.handle)
        self._link(self.handle.meeting)
        return self.handle

    async def post_launch(self, **kwargs: Any) -> None:
        """Called by the manager when the kernel runs: from now on we listen for its last cell.

        The manager sleeps for 10 ms then: that is when there is time for it."""
        await super().post_launch(**kwargs)
        if self.parent:
            asyncio.get_running_loop().call_soon(self._listen)

    def _listen(self) -> None:
        if self.handle is None or self._tap:
            return
        try:
            self._tap = LastWords(self.parent)
        except (OSError, zmq.ZMQError) as error:
            self.log.warning("The cell in which the kernel ends will not be known: %s", error)
            return
        apart(self._tap.begin)
        told = "\n".join(filter(None, (self.narrowed, self.handle.narrowed)))
        if told and self._is_of_a_server:
            speech = self._tell_narrowed(self._tap, self.handle, told)
            self._telling = asyncio.create_task(speech)

    async def _tell_narrowed(self, tap: LastWords, handle: Handle, told: str) -> None:
        """Under the first cell: before it there is none that front ends could show it under."""
        try:
            if await tap.shows_a_cell():
                await off_loop(handle.say, told)
        except (OSError, zmq.ZMQError, SandboxError) as error:  # the log has it
            self.log.info("Could not tell the notebook what it has less: %s", error)

    def _open_ends_file(self) -> None:
        volumes = [volume.source for volume in self.spec.volumes if not volume.readonly]
        self._ends_file = EndsFile(self.ends_file, [self.spec.workdir, *volumes])

    def _close_ends_file(self) -> None:
        if self._ends_file:
            self._ends_file.close()
            self._ends_file = None

    def _choose_transport(self, manager: Any) -> None:
        """Unix sockets in a directory of this kernel's own; an ip that the caller chose for ipc
        stays, and gets links to them."""
        if manager.transport == "tcp":
            _refuse_explicit_tcp(manager)
        elif manager.trait_has_value("ip"):
            return
        manager.cache_ports = False
        for name, value in self.meeting.for_clients.items():
            setattr(manager, name, value)

    async def _start(self, cmd: list[str], kwargs: dict[str, Any]) -> Handle:
        request = self._request(cmd, kwargs)
        self._tell_left_out(request.environment)
        labels = self._labels(request.environment)
        # None would be the server's own stdin, perhaps the terminal of whoever started it.
        stdin = kwargs.get("stdin")
        stdin = subprocess.DEVNULL if stdin is None else stdin
        stdio = Stdio(stdin, kwargs.get("stdout"), kwargs.get("stderr"))
        if self.warm:
            return await self._start_warm(request, labels, stdio)
        return await self._start_cold(request, labels, stdio)

    def _tell_left_out(self, environment: Mapping[str, str]) -> None:
        """Once for each: a program that sets os.environ for its kernels expects them there."""
        try:
            began_with = Path("/proc/self/environ").read_bytes()
        except OSError:
            return
        names = set_and_left_out(environment, os.environ, began_with, self.env_keep)
        new = [name for name in names if name not in _told_variables]
        if new:
            _told_variables.update(new)
            self.log.warning("%s", _left_out(new, self.env_keep))

    async def _start_cold(self, request: LaunchRequest, labels: Labels, stdio: Stdio) -> Handle:
        await self._place.enter_async_context(_cold_starts.passed())
        await off_loop(self.starter.sweep)
        return await self.starter.start(request, labels, stdio)

    async def fill(self, cmd: list[str], *, own: bool = False, **kwargs: Any) -> int:
        """Called by `jupyter sandbox warm` in place of `launch_kernel`: make now what a start finds
        ready, and return how many nurseries and spares that were; raises SandboxError. What is made
        is this process's *own* alone, or for all of this user's."""
        request = self._request(cmd, kwargs)
        await off_loop(self.starter.sweep)
        warmth = replace(self._warmth(), waited_for=True) if own else self._wishes()
        return await self.starter.fill(request, self._labels({}), warmth)

    def _wishes(self) -> Warmth:
        return Warmth(tuple(self.preload), self.spares, self.warm_idle_timeout)

    def _warmth(self) -> Warmth:
        """The same, for this process alone where nobody has asked for a nursery."""
        if self.warm != AUTO:
            return self._wishes()
        lonely = min(self.warm_idle_timeout, _LONELY_SECONDS)
        return replace(self._wishes(), lonely_seconds=lonely, owner=this_process())

    @property
    def _is_of_a_server(self) -> bool:
        """Whether who asks for kernels is a server, which has a manager of many of them. A program
        that runs one notebook has a manager of one, and no server above it."""
        many = getattr(self.parent, "parent", None)
        return isinstance(many, MultiKernelManager) and many.parent is not None

    def _lives_on(self, starts: int) -> bool:
        """Whether a start to come is worth preparing: we are of a server, or this is not the first
        of *starts*."""
        return self.warm != AUTO or self._is_of_a_server or starts > 1

    def _labels(self, environment: Mapping[str, str]) -> Labels:
        return Labels(
            kernel_id=self.kernel_id or "",
            name=self.kernel_spec.display_name,
            notebook=one_line(str(environment.get("JPY_SESSION_NAME", "")))[:_LONGEST_NAME],
            user=os.environ.get("JUPYTERHUB_USER") or user_name(),
        )

    async def _start_warm(self, request: LaunchRequest, labels: Labels, stdio: Stdio) -> Handle:
        """From what was prepared, or cold; and then the next start is prepared, if one may come."""
        warmth, lives_on = self._warmth(), self._lives_on(count_start(labels.name))
        try:
            handle = await self.starter.start_prepared(request, labels, stdio, warmth)
        except WarmUnavailable as error:
            if lives_on or error.failed:
                self._tell_cold(error)
            handle = await self._start_cold(request, labels, stdio)
        if lives_on:  # when the kernel's sockets are waited for: a thread takes time to begin
            later = asyncio.get_running_loop().call_soon
            of_any_kernel = replace(request, spec=self.spec)
            later(self.starter.prepare, of_any_kernel, labels, warmth)
        return handle

    def _tell_cold(self, error: WarmUnavailable) -> None:
        """Why, for the log; once where nobody has asked for it to be warm, or no start can be."""
        name = self.kernel_spec.display_name
        text = f"Kernel {self.kernel_id} starts cold: {one_line(str(error))}"
        is_new = (name, str(error)) not in _told_cold
        _told_cold.add((name, str(error)))
        if error.failed:
            self.log.warning("%s", text)
        elif error.never and self.warm is True:
            if is_new:
                self.log.warning("%s", _never_warm(name, error))
        elif is_new or self.warm != AUTO:
            self.log.info("%s", text)

    def _request(self, cmd: list[str], kwargs: dict[str, Any]) -> LaunchRequest:
        cwd = kwargs["cwd"]
        outside = getattr(self.parent, "connection_file", "") if self.parent else ""
        name = os.path.basename(outside)
        if outside:
            # format_kernel_cmd writes its real path; it may be a relative one or lie behind a link.
            inside = self.meeting.connection_file(name)
            paths = (os.path.realpath(outside), os.path.abspath(outside), outside)
            cmd = [_replaced(word, paths, inside) for word in cmd]
        return LaunchRequest(
            sandbox_id=self.sandbox_id,
            spec=self._spec_of_this_start(),
            argv=tuple(cmd),
            environment=kwargs.get("env", os.environ),
            env_keep=tuple(self.env_keep),
            cwd=start_directory(cwd, self.spec),
            connection_file=(name, self._inside_connection()) if outside else None,
            survive_server=self.survive_server or bool(kwargs.get("independent")),
            extra_files=self._resources(cmd),
            server_places=self._server_places(),
            logged=tuple(_logged(kwargs.get("stdout"), kwargs.get("stderr"))),
            terms=self.terms,
            asked=self.asked,
        )

    def _spec_of_this_start(self) -> SandboxSpec:
        network = self.spec.network
        used_bytes = self._network_bytes if network.quota_bytes else 0
        return replace(self.spec, network=replace(network, used_bytes=used_bytes))

    def _resources(self, cmd: list[str]) -> tuple[str, ...]:
        """The kernelspec's own folder, if its argv names it ({resource_dir})."""
        folder = self.kernel_spec.resource_dir
        return (folder,) if folder and any(folder in word for word in cmd) else ()

    def _inside_connection(self) -> str:
        """The connection file as the kernel shall read it: same keys, the sockets' inside path."""
        assert self.parent
        info = json.loads(Path(self.parent.connection_file).read_text())
        info |= self.meeting.for_kernel
        return json.dumps(info, indent=2)

    async def _await_sockets(self, handle: Handle) -> None:
        if not self.parent:
            return
        attempt = f"start the kernel {self.kernel_spec.display_name!r}"
        try:
            async with asyncio.timeout(self.start_timeout):
                mistake = await handle.ready()
        except TimeoutError:
            handle.kill()
            tail = (await handle.wait()).stderr_tail
            raise LaunchError(
                attempt=attempt,
                answer=f"it did not bind its sockets within {self.start_timeout:g} s",
                remedy="It has to support Jupyter's transport ipc. If it is only slow, raise "
                "start_timeout.",
                step="wait-for-kernel",
                stderr_tail=tail,
            ) from None
        if mistake == "":
            return
        if mistake:
            handle.kill()
        story = await handle.wait()
        if story.mistake:
            raise InternalError(attempt=attempt, answer=story.mistake)
        raise LaunchError(
            attempt=attempt,
            answer=mistake or _ending(story),
            remedy=_remedy(story, handle.unseen),
            step="wait-for-kernel",
            stderr_tail=story.stderr_tail,
        )

    def _link(self, meeting: MeetingPlace) -> None:
        if self.parent:
            meeting.link(self.parent.ip, {name: getattr(self.parent, name) for name in PORTS})

    async def _refuse(self, error: SandboxError) -> StartRefused:
        """Undo the start: nobody calls `cleanup` after a failed one."""
        self._starts = self._given_up = False
        is_ours = isinstance(error, InternalError)
        self.log.error("%s", error, exc_info=error.__cause__ if is_ours else None)
        person = self.terms.person.name if self.terms else user_name()
        name = self.kernel_spec.display_name
        told = partial(audit.refused, error, person=person, name=name, asked=self.asked)
        await off_loop(told)
        await self._close()
        self._remove_files()
        if isinstance(error, LaunchError) and error.step == "find-kernel":
            return ProgramNotFound(error)
        return StartRefused(error)

    # -- while it runs

    @property
    def has_process(self) -> bool:
        """From launch until `wait` has seen the end."""
        return self.handle is not None

    async def poll(self) -> int | None:
        """Called by the restarter every 3 s: None while it runs, else its exit status."""
        # A copy, as somebody may clean up while this waits.
        if (handle := self.handle) is None:
            return _status(self.story) if self.story else 0
        if self._ending:
            # The manager asks whether a shutdown is done, and sleeps 100 ms before it asks again:
            # answer when it is.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(handle.wait(), _POLL_SECONDS)
        story = await handle.look()
        self._hear(handle)
        if story is None:
            if self._tap:
                await self._keep_up(handle, self._tap)
            return None
        await self._tell(story, handle)
        if story.kind is EndKind.STOPPED and not self._ending:
            await self._stay_ended()
        return _status(story)

    async def _keep_up(self, handle: Handle, tap: LastWords) -> None:
        await tap.keep_up()
        if self._busy is not tap.busy:
            self._busy = tap.busy
            await off_loop(partial(handle.note_activity, busy=tap.busy))

    async def wait(self) -> int | None:
        """Called after a shutdown or kill: the end of the kernel, and of everything it started."""
        if (handle := self.handle) is None:
            return _status(self.story) if self.story else 0
        await self._tell(await handle.wait(), handle)
        await self._close()
        assert self.story
        return _status(self.story)

    async def send_signal(self, signum: int) -> None:
        """Called to interrupt, and before every shutdown, also when the kernel has died."""
        if self.handle is not None:
            self.handle.signal(signum)

    async def kill(self, restart: bool = False) -> None:
        """Called when it did not end by itself: everything inside ends at once."""
        if self.handle is not None:
            await off_loop(self.handle.kill)

    async def terminate(self, restart: bool = False) -> None:
        """Called at half of the shutdown's patience."""
        await self.send_signal(signal.SIGTERM)

    async def shutdown_requested(self, restart: bool = False) -> None:
        """Called when the kernel has been asked to end."""
        self._ending = True

    async def cleanup(self, restart: bool = False) -> None:
        """Called last, but twice by nbclient, or alone while the kernel is still there, or while
        it restarts."""
        self._given_up = self._starts and not restart
        self._starts = self._starts or restart
        await self._close()
        if not restart and self._launcher:
            await off_loop(self._launcher.forget, self.sandbox_id)

    async def _close(self) -> None:
        handle, self.handle = self.handle, None
        tap, self._tap = self._tap, None
        telling, self._telling = self._telling, None
        if telling:
            telling.cancel()
        if tap:
            tap.close()
        if handle:
            self._hear(handle)
            try:
                await handle.close()
            except SandboxError as error:
                self.log.warning("%s", error)  # what is left goes with the next start's sweep
            for sentence in handle.left_behind:
                self.log.warning("%s", sentence)
            story = await handle.look()
            if story and self.story is not story:
                self.story = story
                self.end = End.of(story, handle.labels, cell="", seconds=time.time())
            if story and story.network:
                self._network_bytes += story.network.up_bytes + story.network.down_bytes
                self.log.info("Kernel %s: %s", self.kernel_id, one_line(summary(story.network)))
        self._close_ends_file()

    def _hear(self, handle: Handle) -> None:
        for sentence in handle.notices():
            self.log.warning("%s", sentence)

    async def _tell(self, story: ExitStory, handle: Handle) -> None:
        """Once for each end: to the log, and, if nobody asked for it, under the cell that ran."""
        if self.story is story:
            return
        self.story = story
        self.end = await self._end_of(story, handle)
        asked_for = self._ending and (story.kind in _OF_A_SHUTDOWN or not story.reason)
        if asked_for or not _is_news(self.end):
            return
        if story.reason:
            self.log.warning("%s", story.reason)
        if self._ends_file:
            try:
                await off_loop(self._ends_file.add, self.end.as_json())
            except OSError as error:
                self.log.warning("Could not write to %s: %s", self.ends_file, error)
        if self._tap:
            try:
                data = {MIME: self.end.as_json()}
                listener = await off_loop(handle.listen_in_place)
                await asyncio.to_thread(self._tap.speak, in_lines(story.reason), data, listener)
            except (OSError, zmq.ZMQError, SandboxError) as error:
                # A sentence that cannot be shown must not hide the death; the log has it.
                self.log.warning("Could not say so at the notebook: %s", error)

    async def _stay_ended(self) -> None:
        """A server's restarter, which asks just now, would start it anew as after a crash. Let it
        tell its clients that the kernel is dead: then its server forgets it, and nobody cleans up.
        """
        restarter = getattr(self.parent, "_restarter", None)
        if restarter is None or self._restart_limit is not None:
            return
        self._restart_limit, restarter.restart_limit = restarter.restart_limit, 0
        await self.cleanup()
        self._remove_files()

    def _remove_files(self) -> None:
        """Those of the manager's."""
        if self.parent:
            self.parent.cleanup_connection_file()
            self.parent.cleanup_ipc_files()

    def _may_restart(self) -> None:
        """As before: somebody has started it."""
        restarter = getattr(self.parent, "_restarter", None)
        if restarter is not None and self._restart_limit is not None:
            restarter.restart_limit, self._restart_limit = self._restart_limit, None

    async def _end_of(self, story: ExitStory, handle: Handle) -> End:
        cell = ""
        if self._tap and (story.reason or not self._ending):
            with contextlib.suppress(OSError, zmq.ZMQError):  # it was closed meanwhile
                heard = await asyncio.to_thread(self._tap.finish)
                cell = "" if self._ending else heard
        return End.of(story, handle.labels, cell=cell, seconds=time.time())

    def resolve_path(self, path: str) -> str | None:
        """Where the server finds the kernel's *path*."""
        return self.handle.visible(path) if self.handle else None

    # -- for another process

    async def get_provisioner_info(self) -> dict[str, Any]:
        """What a second process needs to find this kernel; as JSON can hold it."""
        info = await super().get_provisioner_info()
        connection = dict(info.get("connection_info", {}))
        if isinstance(connection.get("key"), bytes):
            connection["key"] = connection["key"].decode()
        info["connection_info"] = connection
        info["sandbox"] = self.handle.card() if self.handle else {"id": self.sandbox_id}
        return info

    async def load_provisioner_info(self, provisioner_info: dict[str, Any]) -> None:
        """Take over the kernel that `get_provisioner_info` told of; LaunchError if it has ended."""
        info = dict(provisioner_info)
        connection = dict(info["connection_info"])
        if isinstance(connection.get("key"), str):
            connection["key"] = connection["key"].encode()
        await super().load_provisioner_info(info | {"connection_info": connection})
        self.sandbox_id = info["sandbox"]["id"]
        self.handle = await off_loop(self.starter.find, info["sandbox"])


_told_variables: set[str] = set()  # in the life of this process


def _left_out(names: Sequence[str], kept: Sequence[str]) -> str:
    shown = [one_line(name) for name in names]
    line = json.dumps([*kept, *shown], ensure_ascii=False)
    return (
        f"Kernels do not get {', '.join(shown)} of the environment, which this process has set "
        "since it began: a sandbox hands on only what stands on a list. For kernels that need "
        f'what it says, write into the config of their kernel.json: "env_keep": {line}, or into '
        f"a configuration file: c.SandboxProvisioner.env_keep = {line}"
    )


def _never_warm(name: str, error: WarmUnavailable) -> str:
    return (
        f"Could not start kernels of {one_line(name)!r} warm, as their option warm asks for: "
        f"{one_line(str(error))}. They start as without that option. Change that, or remove it."
    )


def _logged(stdout: Any, stderr: Any) -> Iterator[str]:
    """Which of a kernel's outputs end up in the server's own, as `subprocess.Popen` reads these."""
    if stdout is None:
        yield "stdout"
    if stderr is None or (stderr == subprocess.STDOUT and stdout is None):
        yield "stderr"


def _refuse_explicit_tcp(manager: Any) -> None:
    """tcp is only jupyter_client's default, unless somebody asked for it."""
    sections = [cls.__name__ for cls in type(manager).__mro__]
    asked = any(
        manager.config[name].get("transport") for name in sections if name in manager.config
    )
    if asked or any(getattr(manager, name) for name in PORTS):
        raise SpecError(
            attempt="connect the kernel over tcp, as transport or a port asks for",
            answer="a sandbox has a network of its own, and listens on unix sockets only",
            remedy='Remove the option transport (or set c.KernelManager.transport = "ipc") and '
            "the options for ports.",
        )


_IPYTHON = re.compile(r"(^|\s)-m\s+ipykernel(_launcher)?(\s|$)")


def is_ipython(argv: Sequence[str]) -> bool:
    """Whether the command *argv*, or what a shell in it runs, is IPython's kernel."""
    return bool(_IPYTHON.search(" ".join(argv)))


def _replaced(word: str, old: tuple[str, ...], new: str) -> str:
    """*word* with the first of *old* that it contains: what is put in may contain a later one."""
    found = next((text for text in old if text in word), None)
    return word.replace(found, new) if found else word


def _status(story: ExitStory) -> int:
    """poll's int: a kernel that nobody could ask was killed."""
    return story.code if story.code is not None else -signal.SIGKILL


def _is_news(end: End) -> bool:
    """Whether it has to be told: not where somebody stopped the kernel, or had it end while it
    did nothing."""
    if end.sentence:
        return True
    return end.kind != EndKind.ASKED and (end.exit_code != 0 or bool(end.cell))


def _remedy(story: ExitStory, unseen: tuple[str, ...]) -> str:
    if story.reason and story.kind is not EndKind.SIGNAL:  # of which the answer tells already
        return story.reason
    if unseen:
        named = ", ".join(unseen[:_MOST_UNSEEN])
        wish = volumes_for(unseen[:_MOST_UNSEEN])
        return f"Its command names what is not in the box, {named}. If it needs that: {wish}."
    if story.stderr_tail.strip():
        return "Correct what its last lines complain of."
    return "It has written nothing: run its argv by hand, with the connection file of a kernel."


def _ending(story: ExitStory) -> str:
    if story.signal:
        return f"it was ended by {signal_name(story.signal)} before it bound its sockets"
    if story.code is None:
        return "it was killed, with its init, before it bound its sockets"
    return f"it ended with status {story.code} before it bound its sockets"


@functools.cache
def _usual_values() -> Mapping[str, Any]:
    """The options as they are where nobody has set any."""
    options = SandboxOptions()
    return {name: getattr(options, name) for name in every_option()}


def user_name() -> str:
    """Our user as people see it in lists: the name, or the number where there is none."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())
