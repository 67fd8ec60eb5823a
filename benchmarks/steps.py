"""steps.py - where the milliseconds of a cold start go, in the server and in the launcher.

The core is measured as it is, from outside: the stages of a start tell of themselves, some
functions around them are wrapped for the time of a run, and the line of Python that the launcher
is started with is replaced by one that first wraps the verbs.
The launcher, PID 1 and the kernel's process walk through one plan, each a fork of the one before,
so their time stamps collect in one list, and come back as one record of the report pipe just before
the kernel is executed. CLOCK_MONOTONIC is the same in all of them.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from benchmarks import common, start
from sandbox_provisioner import launch, provisioner, report, stages, stem
from sandbox_provisioner.facilities.devices import inside as devices
from sandbox_provisioner.facilities.environment import inside as environment
from sandbox_provisioner.facilities.figures import inside as figures
from sandbox_provisioner.facilities.layer import inside as layer
from sandbox_provisioner.facilities.root import inside as root
from sandbox_provisioner.facilities.workdir import inside as workdir
from sandbox_provisioner.handle import LocalHandle
from sandbox_provisioner.inside import mounts, wire
from sandbox_provisioner.warm import ahead

# (where, which function, what is done when it returns), in the order of a start.
Stamped = tuple[tuple[Any, str, str], ...]
# Besides the stages of a start (`stages.py`), which tell of themselves.
_STAMPED: Stamped = (
    (provisioner.SandboxProvisioner, "pre_launch", "options and command"),
    (launch.LocalLauncher, "sweep", "sweep of what is left over"),
    (LocalHandle, "sealed", "sockets bound and sealed"),
    (provisioner.SandboxProvisioner, "post_launch", "start_kernel about to return"),
)
_CONFIG: dict[str, dict[str, Any]] = {
    "cold": {"warm": False},
    "nursery": {"warm": True},
    "spare": {"warm": True, "spares": 1},
}
# Those that make mounts, or places for them.
_OF_MOUNTS = {
    verb.__name__.replace("_", "-")
    for room in (devices, environment, figures, layer, mounts, root, workdir)
    for verb in room.VERBS
} - {"limit-devices", "receive", "serve", "watch-folder"}
_KIND = "benchmark"
_BOOT = """
import time
stamps = []
def stamp(name):
    stamps.append(b"%s %d" % (name.encode(), time.monotonic_ns()))
import sys
sys.path.append(sys.argv[1])
from sandbox_provisioner.inside import wire
from sandbox_provisioner.launcher import enter
decode = wire.decode
def decoded(text):
    stamp("word")
    return decode(text)
wire.decode = decoded
def wrap(name, verb):
    def timed(box, *words):
        if name == "execute":
            stamp("(end)")
            box.report("benchmark", b";".join(stamps).decode())
        begin, computed = time.monotonic_ns(), time.thread_time_ns()
        verb(box, *words)
        computed = time.thread_time_ns() - computed
        stamps.append(b"%s %d %d %d" % (name.encode(), time.monotonic_ns(), begin, computed))
    return timed
for name in list(enter.VERBS):
    enter.VERBS[name] = wrap(name, enter.VERBS[name])
enter.system_call_filter = wrap("system-call-filter", enter.system_call_filter)
fork_kernel = enter.fork_kernel
enter.fork_kernel = lambda box: wrap("fork-kernel", fork_kernel)(box)
enter.main(sys.argv[2:])
"""


@dataclass(slots=True)
class Start:
    """The time stamps of one start, in ns: (name, when) in the order in which they came. *computed*
    is for how long each verb has had a CPU."""

    stamps: list[tuple[str, int]] = field(default_factory=list)
    inside: list[tuple[str, int, int]] = field(default_factory=list)
    computed: dict[str, int] = field(default_factory=dict)

    def stamp(self, name: str) -> None:
        self.stamps.append((name, time.monotonic_ns()))

    def read(self, text: str) -> None:
        """Take what the launcher wrote: "NAME END" or "NAME END BEGIN COMPUTED", separated by
        ";"."""
        for entry in text.split(";"):
            name, *numbers = entry.split()
            end, begin, computed = (*map(int, numbers), int(numbers[0]), 0)[:3]
            self.inside.append((name, begin, end))
            self.computed[name] = self.computed.get(name, 0) + computed


# -- wrapping


def stamping(function: Callable[..., Any], name: str, found: Start) -> Callable[..., Any]:
    """*function*, coroutine or not, with a time stamp when it returns."""
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def later(*args: Any, **kwargs: Any) -> Any:
            result = await function(*args, **kwargs)
            found.stamp(name)
            return result

        return later

    @functools.wraps(function)
    def now(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        found.stamp(name)
        return result

    return now


@contextlib.contextmanager
def watched(found: Start) -> Iterator[None]:
    """The core's functions wrapped, and the stem's first line replaced."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(stages.heard_by(found.stamp))
        for where, name, label in _STAMPED:
            wrapped = stamping(getattr(where, name), label, found)
            stack.enter_context(mock.patch.object(where, name, wrapped))
        stack.enter_context(mock.patch.object(stem, "BOOT", _BOOT))
        stack.enter_context(mock.patch.object(report.Report, "add", _reader(found)))
        yield


def _reader(found: Start) -> Callable[[Any, list[str]], None]:
    """The report pipe's reader, which also takes what `_BOOT` sends."""
    add = report.Report.add

    def read(found_here: Any, words: list[str]) -> None:
        if words[0] == _KIND:
            found.read(words[1])
        else:
            if words[0] == wire.PID:
                found.stamp("PID 1 made (server has heard)")
            add(found_here, words)

    return read


# -- one start


def measure(found: start.Place, specs: Any, variant: start.Variant) -> Start:
    """Start a kernel, wait for its first reply, end it."""
    taken = Start()
    ahead.wait()
    manager = start.new_manager(variant, found, specs)
    # The shutdown comes when nothing is watched any more: the next start is prepared meanwhile.
    with contextlib.ExitStack() as ending, watched(taken):
        taken.stamp("call")
        start.start_quietly(manager, found)
        ending.callback(manager.shutdown_kernel, now=False)
        taken.stamp("start_kernel returned (jupyter_client sleeps 10 ms)")
        client = manager.client()
        client.start_channels()
        ending.callback(client.stop_channels)
        taken.stamp("client connected")
        start.await_reply(client)
        taken.stamp("kernel_info_reply")
    return taken


# -- from stamps to rows


def intervals(stamps: Sequence[tuple[str, int]]) -> dict[str, float]:
    """The milliseconds from each stamp to the next, under the name of the later one."""
    pairs = itertools.pairwise(stamps)
    return {name: (when - before) / 1e6 for (_, before), (name, when) in pairs}


def inside_intervals(taken: Start) -> dict[str, float]:
    """What the launcher, PID 1 and the kernel's process did, by verb, in ms; a verb that came
    several times is summed under "VERB *".

    The stem is there already: of a server's first start this is all but its interpreter.
    """
    marks = {name: end for name, _, end in taken.inside}
    asked = dict(taken.stamps)["spawn-launcher"]
    rows = {"is forked, waits for the plan": (marks["word"] - asked) / 1e6}
    apart = {"word", "(end)"}
    steps = [entry for entry in taken.inside if entry[0] not in apart]
    rows |= _by_verb(steps)
    known = sum(rows.values())
    rows["decoding, calls, forks"] = (marks["(end)"] - asked) / 1e6 - known
    return rows


def of_mounts(taken: Start) -> tuple[float, float]:
    """How many ms all steps about mounts took together, and for how many they had a CPU."""
    took = sum(end - begin for name, begin, end in taken.inside if name in _OF_MOUNTS)
    return took / 1e6, sum(taken.computed.get(name, 0) for name in _OF_MOUNTS) / 1e6


def _by_verb(steps: Sequence[tuple[str, int, int]]) -> dict[str, float]:
    counts: dict[str, int] = {}
    sums: dict[str, float] = {}
    for name, begin, end in steps:
        counts[name] = counts.get(name, 0) + 1
        sums[name] = sums.get(name, 0.0) + (end - begin) / 1e6
    return {f"{name} x{counts[name]}": value for name, value in sums.items()}


def rows_of(samples: Sequence[dict[str, float]], head: str) -> list[list[str]]:
    """A row a name in the order of the first sample, with its share of the whole."""
    whole = statistics.median(sum(sample.values()) for sample in samples)
    rows = [[head, "ms", "(10th-90th)", "share"]]
    for name in samples[0]:
        found = common.spread([sample[name] for sample in samples if name in sample])
        assert found
        middle, _, rest = common.format_spread(found, 2).partition(" ")
        rows.append([name, middle, rest, f"{100 * found.median / whole:.0f} %"])
    return [*rows, ["whole", f"{whole:.2f}", "", ""]]


def main(rounds: int, kind: str, json_path: str | None) -> None:
    """Measure starts of *kind*, print, and save the stamps if *json_path* says where."""
    facts = common.machine()
    config = {"mem_limit": "1G", "network": "none"} | _CONFIG[kind]
    variant = start.Variant(kind, config=config)
    with start.place() as found:
        specs = start.write_kernels(found, [variant])
        taken = []
        try:
            for number in range(rounds + 1):
                taken.append(measure(found, specs, variant))
                print(f"\rround {number} of {rounds}", end="", file=sys.stderr, flush=True)
        finally:
            ahead.end_own()
    del taken[0]
    print(file=sys.stderr)
    print(common.format_machine(facts))
    print(f"rounds:   {rounds}; medians of {kind} starts\n")
    outer = [intervals(one.stamps) for one in taken]
    print(common.format_table(rows_of(outer, "until ... (server)")), end="\n\n")
    if kind == "cold":
        inner = [inside_intervals(one) for one in taken]
        print(common.format_table(rows_of(inner, "launcher, PID 1, kernel up to execve")))
        ms, computed = (
            common.format_spread(common.spread(values), 2)
            for values in zip(*map(of_mounts, taken), strict=True)
        )
        print(f"\nall that make mounts: {ms} ms, of which they had a CPU for {computed} ms")
    if json_path:
        common.save_json(json_path, {"machine": facts, "rounds": rounds, "starts": taken})
