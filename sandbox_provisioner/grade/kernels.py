"""grade/kernels.py - whoever grades: a kernel for one submission, its box, and how much of what it
says is read.

Whatever kernel is named runs in a box: with its own options where it has such, and with these on
top, which nobody wants otherwise: nothing of the host to write to, the files of the submission
read-only, variables that are alike for all.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty
from types import MappingProxyType
from typing import Any

import zmq
import zmq.asyncio
from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from traitlets import Type
from traitlets.config import Config

from sandbox_provisioner.ends import End
from sandbox_provisioner.errors import LaunchError
from sandbox_provisioner.facilities.volumes.wish import as_texts
from sandbox_provisioner.grade.terms import FILES, FIXED
from sandbox_provisioner.options import PROVISIONER
from sandbox_provisioner.provisioner import SandboxProvisioner
from sandbox_provisioner.spec import NO_WORKDIR

# Where nobody says otherwise. A box without a limit is none for code of strangers; and an interrupt
# near the limit comes at another place each time, so that marks would not be the same twice.
_DEFAULTS = {"mem_limit": "1G", "mem_interrupt": 0}
# ZeroMQ reads a message whole before anybody can look at it, and so many before anybody does.
_MESSAGE_BYTES = 16 << 20
_MESSAGES = 8
_TRIES = 3
_HEARD_SECONDS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Boxing:
    """What is asked for a submission's kernel: its kernelspec's *name*, *options* of ours for its
    box, and the *config* of the program that grades."""

    name: str
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    config: Config = field(default_factory=Config)

    def manager(self, files: Path) -> BoxedManager:
        """Of a kernel that is not started yet, and finds *files* at `FILES`."""
        manager = BoxedManager(kernel_name=self.name, config=self.config)
        manager.box = {**self.options, "volumes": self._volumes(files)}
        return manager

    async def make_nursery(self, files: Path) -> str:
        """Make now what all kernels of this one process are forked from, and return why not, "" if
        there is one: without it each starts by itself. Raises what any start would, too."""
        manager = self.manager(files)
        command, options = await manager._async_pre_start_kernel(env=environment())
        try:
            if isinstance(manager.provisioner, SandboxProvisioner):
                await manager.provisioner.fill(command, own=True, **options)
        except LaunchError as error:
            return str(error)
        finally:
            manager.cleanup_connection_file()
        return ""

    def _volumes(self, files: Path) -> list[str]:
        return [*as_texts(self.options.get("volumes", ())), f"{files}:{FILES}:ro"]


class _Client(AsyncKernelClient):
    """One that hears from the kernel when it is ready. Upstream's listens until it has heard
    nothing for 0.2 s: of a small submission that is a third of its time."""

    async def wait_for_ready(self, timeout: float | None = None) -> None:
        """Return when the kernel answers and is heard; RuntimeError where it does not in time."""
        for _ in range(_TRIES):
            if await self._answers():
                return
        await self._async_wait_for_ready(timeout)

    async def _answers(self) -> bool:
        """Whether it replies, and is heard to be done with that. What it says before we are
        connected nobody hears."""
        asked = self.kernel_info()
        try:
            while not _is_of(reply := await self.get_shell_msg(timeout=1), asked):
                pass
            while not _is_idle(await self.get_iopub_msg(timeout=_HEARD_SECONDS), asked):
                pass
        except Empty:
            return False
        self._handle_kernel_info_reply(reply)
        return True


def _is_of(told: Mapping[str, Any], asked: str) -> bool:
    return bool(told["parent_header"].get("msg_id") == asked)


def _is_idle(told: Mapping[str, Any], asked: str) -> bool:
    return _is_of(told, asked) and told["content"].get("execution_state") == "idle"


class BoxedManager(AsyncKernelManager):
    """Of one kernel in a box, whatever its kernelspec says of provisioners."""

    client_factory = Type(_Client, klass=AsyncKernelClient)
    box: Mapping[str, Any] = MappingProxyType({})
    _boxed: KernelSpec | None = None

    @property
    def kernel_spec(self) -> KernelSpec | None:
        """The installed one, with our stanza; NoSuchKernel where there is none."""
        if self._boxed is None:
            installed = super().kernel_spec
            if installed is not None:
                self._boxed = boxed(installed, self.box, self.config)
        return self._boxed

    def client(self, **kwargs: Any) -> AsyncKernelClient:  # type: ignore[override]  # as upstream
        """One that reads no message of any size, and few at a time."""
        context = zmq.asyncio.Context()
        context.setsockopt(zmq.MAXMSGSIZE, _MESSAGE_BYTES)
        context.setsockopt(zmq.RCVHWM, _MESSAGES)
        client = super().client(context=context, **kwargs)
        client._created_context = True  # it ends with its client
        return client

    async def _async_wait(self, pollinterval: float = 0.1) -> None:
        """Called when the kernel has been told to end. Upstream looks ten times a second."""
        if self.provisioner:
            await self.provisioner.wait()

    def end(self) -> End | None:
        """How the kernel ended; None while it runs."""
        provisioner = self.provisioner
        return provisioner.end if isinstance(provisioner, SandboxProvisioner) else None


def boxed(installed: KernelSpec, options: Mapping[str, Any], config: Config) -> KernelSpec:
    """*installed* as a kernel for a submission. Of several answers to one option the one in
    *options* counts, then that of its kernel.json, then *config*'s."""
    stanza = installed.metadata.get("kernel_provisioner") or {}
    own = stanza.get("config", {}) if stanza.get("provisioner_name") == PROVISIONER else {}
    given = {**own, **options}
    volumes = [*as_texts(own.get("volumes", ())), *as_texts(options.get("volumes", ()))]
    kept = _kept(given, config.get("SandboxProvisioner", {}))
    forced = {"workdir": NO_WORKDIR, "volumes": volumes, "env_keep": kept}
    said = {**config.get("SandboxProvisioner", {}), **given}
    defaults = {name: value for name, value in _DEFAULTS.items() if said.get(name) is None}
    new = {"provisioner_name": PROVISIONER, "config": {**defaults, **given, **forced}}
    spec = KernelSpec(**installed.to_dict(), resource_dir=installed.resource_dir)
    spec.metadata = {**installed.metadata, "kernel_provisioner": new}
    return spec


def _kept(given: Mapping[str, Any], configured: Mapping[str, Any]) -> Sequence[str]:
    return [*(given.get("env_keep") or configured.get("env_keep") or ()), *FIXED]


def environment() -> dict[str, str]:
    """What a start is given of variables."""
    return {**os.environ, **FIXED}
