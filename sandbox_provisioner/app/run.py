"""app/run.py - a command of its own: `jupyter sandbox run` starts any command in a kernel's box."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import uuid
from dataclasses import replace

from traitlets import Unicode

from sandbox_provisioner.app.command import (
    COMMON_ALIASES,
    OPTION_ALIASES,
    SandboxCommand,
    find_kernel,
    spoken,
    working_directory,
)
from sandbox_provisioner.app.terminal import relayed
from sandbox_provisioner.contract import Handle, Labels, Launcher, Stdio
from sandbox_provisioner.errors import LaunchError, in_lines
from sandbox_provisioner.facilities.network.tell.said import summary
from sandbox_provisioner.inside.printable import one_line
from sandbox_provisioner.plan import LaunchRequest, start_directory
from sandbox_provisioner.provisioner import SandboxProvisioner, user_name
from sandbox_provisioner.story import ExitStory
from sandbox_provisioner.told import EndKind

_RELAYED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


_ALIASES = {"kernel": "RunApp.kernel", **OPTION_ALIASES, **COMMON_ALIASES}


class RunApp(SandboxCommand):
    """Starts one command, waits, and ends as it did."""

    usage = "jupyter sandbox run [options] -- COMMAND [ARGUMENT ...]"
    description = (
        "Run any command in the same box that a kernel would get: a shell to look around in, "
        "tests, the few lines of a bug report. The work directory is the one you are in, and "
        "writable. Without options it is the box of c.SandboxProvisioner; with --kernel that of an "
        "installed sandboxed kernel, whose kernel.json then wins over other options.\n\n"
        "On a terminal the command has one of its own; otherwise your stdin, stdout and stderr. "
        "Its exit status is passed on (128+N for signal N); 1 is also that of a start that "
        "failed, and 2 that of options that cannot be meant."
    )
    examples = """
    jupyter sandbox run -- bash
    jupyter sandbox run --mem-limit 512M --cpu-limit 0.5 -- python grade.py < answers.json
    jupyter sandbox run --volume /data:/data:ro --env-keep 'MY_*' -- make test
    jupyter sandbox run --workdir /srv/scratch -- sh -c 'id; ls -la; cat /proc/self/mounts'
    jupyter sandbox run --kernel python3-sandbox -- bash
    """
    kernel = Unicode("", help="Use the options of this installed sandboxed kernel.").tag(
        config=True
    )
    aliases = _ALIASES

    def start(self) -> None:
        """Called once by `main`; leaves with the command's exit status."""
        position = self.argv.index("--") if "--" in self.argv else len(self.argv)
        command = self.argv[position + 1 :]
        if not command or len(self.extra_args) != len(command):
            raise self.wrong("write the command, all of it, behind --")
        kernel = find_kernel(self.kernels(), self.kernel) if self.kernel else None
        provisioner = self.provisioner(kernel)
        request = request_for_command(provisioner, command, working_directory())
        raise SystemExit(asyncio.run(run_and_tell(provisioner, request)))


def request_for_command(
    provisioner: SandboxProvisioner, command: list[str], cwd: str
) -> LaunchRequest:
    """What is asked of a launcher for *command* in *cwd*."""
    spec = provisioner.spec_for(cwd)
    return LaunchRequest(
        sandbox_id=uuid.uuid4().hex[:12],
        spec=spec,
        argv=tuple(command),
        environment=os.environ,
        env_keep=tuple(provisioner.env_keep),
        cwd=start_directory(cwd, spec),
        pump=False,
        terms=provisioner.terms,
        asked=provisioner.asked,
    )


async def run_and_tell(
    provisioner: SandboxProvisioner, request: LaunchRequest, relay: type[Signals] | None = None
) -> int:
    """`run_in_box`, and say on stderr what its exit status, which is the answer, does not tell."""
    left: list[str] = []
    try:
        story = await run_in_box(provisioner.starter, request, relay, left)
    except LaunchError as error:
        raise _for_a_command(error, request.argv[0]) from None
    for sentence in filter(None, (_refused(story), _reason(story), *left)):
        print(spoken(in_lines(one_line(sentence))), file=sys.stderr)
    return status_of(story)


async def run_in_box(
    launcher: Launcher,
    request: LaunchRequest,
    relay: type[Signals] | None = None,
    left: list[str] | None = None,
) -> ExitStory:
    """Run *request* with our stdio, and with a terminal of its own where ours is one; *relay* says
    what becomes of the signals that we get; *left* gets what is to be decided when it is gone.

    Raises a SandboxError where it cannot be started; the box is gone when this returns.
    """
    labels = Labels(name=os.path.basename(request.argv[0]), user=user_name())
    with relayed() as terminal:
        request = replace(request, terminal=terminal is not None)
        signals = (relay or Signals)()
        handle = await launcher.start(request, labels, terminal.stdio if terminal else Stdio(None))
        try:
            signals.relay_to(handle)
            if terminal:
                terminal.start()
            story = await handle.wait()
            if terminal:
                await terminal.drain()
            return story
        finally:
            await handle.close()
            launcher.forget(request.sandbox_id)
            if left is not None and request.spec.is_reviewed:
                left += handle.left_behind


class Signals:
    """Relays the signals that we get; those that come during the start are delivered after it.
    *asked_to_end*: one of them was not an interrupt."""

    def __init__(self) -> None:
        self.asked_to_end = False
        self._handle: Handle | None = None
        self._early: list[int] = []
        for number in _RELAYED:
            asyncio.get_running_loop().add_signal_handler(number, self._take, number)

    def relay_to(self, handle: Handle) -> None:
        self._handle = handle
        for number in self._early:
            handle.signal(number)

    def _take(self, number: int) -> None:
        self.asked_to_end |= number != signal.SIGINT
        if self._handle:
            self._handle.signal(number)
        else:
            self._early.append(number)


def _for_a_command(error: LaunchError, program: str) -> LaunchError:
    """*error* without advice about a kernel.json, where there is none."""
    if error.step != "find-kernel" or error.stderr_tail:
        return error
    return LaunchError(
        attempt=f"run {program!r}",
        answer=error.answer.removeprefix(f"[{error.step}] "),
        remedy="A path has to be absolute, or as seen from here; a name has to be on the PATH.",
        step=error.step,
    )


def _reason(story: ExitStory) -> str:
    """Why a box ended that did not end by itself, which its status alone does not tell."""
    if story.kind is EndKind.SIGNAL:
        return ""
    from_outside = "The box was ended from outside, so how the command ended is not known."
    return from_outside if story.kind is EndKind.OUTSIDE else story.reason


def _refused(story: ExitStory) -> str:
    """What its network was refused: a command has no cell that it could be shown under."""
    if story.network is None or not story.network.refusals:
        return ""
    return f"Over its network: {summary(story.network)}. Ask for names with network_allow."


def status_of(story: ExitStory) -> int:
    """As shells have it: 128+N for whoever signal N ended."""
    if story.code is None:
        return 128 + signal.SIGKILL
    return story.code if story.code >= 0 else 128 - story.code
