"""boxes.py - in the test process: sandboxes that run Python functions of a test inside.

::

    test     ──{"source", "name", "arguments"}──▶ stdin    PROGRAM, inside
             ◀──{"value"} or {"error"}─────────── stdout   one line each

A function travels as its source: it sees its arguments, what it imports, and the functions that
the test names with ``using``, but nothing of the test's module.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import inspect
import json
import os
import select
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sandbox_provisioner.contract import Labels, Stdio, Warmth, WarmUnavailable
from sandbox_provisioner.handle import LocalHandle
from sandbox_provisioner.launch import LaunchRequest, LocalLauncher
from sandbox_provisioner.plan import Plan
from sandbox_provisioner.spec import SandboxSpec, UserIds
from sandbox_provisioner.story import ExitStory
from sandbox_provisioner.warm.keys import Command
from sandbox_provisioner.warm.make_nursery import make_nursery
from sandbox_provisioner.warm.start_from import start_warm

ANSWER_SECONDS = 60
# With "range" all tests of the box run in sandboxes that map a range of ids.
USER_IDS = "SANDBOX_TEST_USER_IDS"
# With "1" whatever a nursery can stand in for runs in sandboxes that one has forked, never cold.
WARM = "SANDBOX_TEST_WARM"
IDLE_SECONDS = 600  # the session's own nursery may not be asked for by any test of a room
_SPEC_OPTIONS = (
    "covers", "limits", "confinement", "network", "volumes", "hostname", "on_missing", "user_ids",
    "workdir_mode", "rootfs", "layer", "devices", "kernel_user",
)  # fmt: skip
PROGRAM = """
import builtins, json, os, sys, traceback
answers = os.fdopen(1, "w", closefd=False)
sys.stdout = sys.stderr
def answer_to(question):
    try:
        names = {"__name__": "inside"}
        exec(question["source"], names)
        return {"value": names[question["name"]](*question["arguments"])}
    except BaseException as error:
        words = [error.errno, error.strerror] if isinstance(error, OSError) else [str(error)]
        return {"error": type(error).__name__, "words": words, "text": traceback.format_exc()}
for line in sys.stdin:
    print(json.dumps(answer_to(json.loads(line))), file=answers, flush=True)
"""


nurseries: list[LocalHandle] = []


def close_nurseries() -> None:
    """Those that a test has made."""
    while nurseries:
        run(nurseries.pop().close())


class Box:
    """A running sandbox whose program waits on its stdin, without a sleep, for what to do."""

    def __init__(self, handle: LocalHandle, to_program: int, from_program: int) -> None:
        self.handle = handle
        self._stdin = os.fdopen(to_program, "wb")
        self._stdout = os.fdopen(from_program, "rb")

    def call(self, function: Callable[..., Any], *arguments: Any, using: Sequence[Any] = ()) -> Any:
        """Run *function* inside; its value, or its exception raised here again."""
        self.send(function, *arguments, using=using)
        return self.receive()

    def send(
        self, function: Callable[..., Any], *arguments: Any, using: Sequence[Any] = ()
    ) -> None:
        """Begin a `call` whose answer `receive` waits for."""
        question = {
            "source": "\n".join(_source_of(f) for f in (*using, function)),
            "name": function.__name__,
            "arguments": arguments,
        }
        self.write(json.dumps(question).encode() + b"\n")

    def receive(self) -> Any:
        """The value of the function that was sent."""
        line = self.readline()
        if not line:
            raise EOFError(f"the sandbox ended without an answer: {self.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise _raised_inside(answer)
        return answer["value"]

    def has_answered(self) -> bool:
        """Whether `receive` would not wait."""
        return bool(select.select([self._stdout], [], [], 0)[0])

    def write(self, text: bytes) -> None:
        """Write to the stdin of whatever runs inside."""
        self._stdin.write(text)
        self._stdin.flush()

    def readline(self) -> bytes:
        """One line of its stdout, b"" at its end."""
        if not select.select([self._stdout], [], [], ANSWER_SECONDS)[0]:
            raise TimeoutError(f"no word from the sandbox in {ANSWER_SECONDS} s")
        return self._stdout.readline()

    def finish(self) -> ExitStory:
        """Close its stdin, which ends the program, and tell how it ended."""
        self._stdin.close()
        return self.wait()

    def wait(self) -> ExitStory:
        """Wait until it has ended."""
        return run(self.handle.wait())

    def close(self) -> None:
        """End it and remove every trace."""
        for file in (self._stdin, self._stdout):
            with contextlib.suppress(BrokenPipeError):
                file.close()
        run(self.handle.close())


def run(coroutine: Any) -> Any:
    """Run one coroutine, no longer than the patience of a test."""

    async def limited() -> Any:
        return await asyncio.wait_for(coroutine, ANSWER_SECONDS)

    return asyncio.run(limited())


def is_reaped(pid: int) -> bool:
    """Whether the child *pid* has ended, and was waited for, before long; no event tells."""
    end = time.monotonic() + 10
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < end:
        select.poll().poll(10)
    return not os.path.exists(f"/proc/{pid}")


def request_for(
    workdir: Path | str, argv: Sequence[str] | None = None, **options: Any
) -> LaunchRequest:
    """A request to run *argv* (or `PROGRAM`); *options* are fields of the spec or the request."""
    options.setdefault("user_ids", UserIds(os.environ.get(USER_IDS, "single")))
    wishes = {name: options.pop(name) for name in _SPEC_OPTIONS if name in options}
    settings: Mapping[str, Any] = {
        "sandbox_id": uuid.uuid4().hex[:12],
        "environment": dict(os.environ),
        "cwd": str(workdir),
        "pump": False,
    }
    return LaunchRequest(
        spec=SandboxSpec(workdir=str(workdir), **wishes),
        argv=tuple(argv or (sys.executable, "-c", PROGRAM)),
        **{**settings, **options},
    )


def start(launcher: LocalLauncher, request: LaunchRequest, stderr: int | None = None) -> Box:
    """Start *request* with pipes for stdin and stdout, and our stderr unless told another."""
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    stdio = Stdio(theirs_in, theirs_out, stderr)
    try:
        if os.environ.get(WARM) and Command.of(request.argv):
            handle = run(_start_warm(launcher, request, stdio))
        else:
            handle = run(launcher.start(request, stdio=stdio))
    except BaseException:
        os.close(ours_in)
        os.close(ours_out)
        raise
    finally:
        os.close(theirs_in)
        os.close(theirs_out)
    return Box(handle, ours_out, ours_in)


async def _start_warm(launcher: LocalLauncher, request: LaunchRequest, stdio: Stdio) -> LocalHandle:
    """From a nursery, which is made where there is none yet; never cold."""
    made = await make_nursery(launcher, request, Labels(), Warmth(idle_seconds=IDLE_SECONDS))
    if made:
        nurseries.append(made)
    try:
        return await start_warm(launcher, request, Labels(), stdio, Warmth())
    except WarmUnavailable as error:
        raise error.__cause__ or error from None


class Boxes:
    """Makes sandboxes for one test: the fixture ``sandbox``."""

    def __init__(self, launcher: LocalLauncher, workdir: Path) -> None:
        self.launcher = launcher
        self.workdir = workdir

    @contextlib.contextmanager
    def __call__(self, argv: Sequence[str] | None = None, **options: Any) -> Iterator[Box]:
        """A running sandbox, closed at the end; *options* as in `request_for`, or ``workdir``."""
        workdir = options.pop("workdir", self.workdir)
        stderr = options.pop("stderr", None)
        box = start(self.launcher, request_for(workdir, argv, **options), stderr)
        try:
            yield box
        finally:
            box.close()

    def explain(self, argv: Sequence[str] | None = None, **options: Any) -> Plan:
        """The plan of what the same arguments would start."""
        workdir = options.pop("workdir", self.workdir)
        return self.launcher.explain(request_for(workdir, argv, **options))


def _source_of(function: Callable[..., Any] | str) -> str:
    if isinstance(function, str):
        return function
    return textwrap.dedent(inspect.getsource(function))


def _raised_inside(answer: dict[str, Any]) -> BaseException:
    kind = getattr(builtins, answer["error"], RuntimeError)
    error: BaseException = kind(*answer["words"])
    error.add_note(f"Raised in the sandbox:\n{answer['text']}")
    return error
