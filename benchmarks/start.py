"""start.py - starts and ends kernels of several kinds in turn, and measures time and memory.

Every round starts one kernel of every variant, in an order of its own. What the machine does
meanwhile so hits all of them alike, and each figure can be held against the plain one of its round.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ipykernel
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager

from benchmarks import common
from sandbox_provisioner.warm import ahead

SEED = 20240229
LEFT_OVER_SECONDS = 0.25
_TIMEOUT_SECONDS = 60
KERNEL = (sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}")
_MEASURES = ("reply_ms", "imported_ms", "ready_ms", "shutdown_ms", "pss_mib")
# What a teaching notebook begins with; where it is not installed nothing is imported.
_WISHED = ("numpy", "pandas", "matplotlib.pyplot")
PRELOAD = [name for name in _WISHED if importlib.util.find_spec(name.partition(".")[0])]


# The options of the shipped kernelspec. A round begins with two starts that do not count.
_MODEL = Path(__file__).parents[1] / "kernelspecs/python3-sandbox/kernel.json"
SHIPPED = json.loads(_MODEL.read_text())["metadata"]["kernel_provisioner"]["config"]


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to start the kernel: *config* is that of our provisioner, None leaves it out."""

    name: str
    argv: tuple[str, ...] = KERNEL
    transport: str = ""
    config: dict[str, Any] | None = None

    def kernel_json(self) -> dict[str, Any]:
        """The kernel.json of this variant."""
        spec = {"argv": list(self.argv), "display_name": self.name, "language": "python"}
        if self.config is None:
            return spec
        stanza = {"provisioner_name": "sandbox-provisioner", "config": self.config}
        return spec | {"metadata": {"kernel_provisioner": stanza}}


@dataclass(slots=True, kw_only=True)
class Sample:
    """One kernel from start to end."""

    variant: str
    reply_ms: float = 0.0
    imported_ms: float = 0.0
    ready_ms: float = 0.0
    shutdown_ms: float = 0.0
    pss_mib: float = 0.0
    processes: int = 0
    left: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Place:
    """The directories of a run, all below one that is removed at its end."""

    root: Path

    @property
    def kernels(self) -> Path:
        return self.root / "kernels"

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def runtime(self) -> Path:
        return self.root / "runtime"


@contextlib.contextmanager
def place() -> Iterator[Place]:
    """A `Place`; Jupyter's and IPython's own folders lie in it for as long as it is there."""
    with tempfile.TemporaryDirectory(prefix="bench-") as root:
        found = Place(Path(root).resolve())
        for path in (found.kernels, found.work, found.runtime):
            path.mkdir()
        changed = {
            "JUPYTER_RUNTIME_DIR": str(found.runtime),
            "IPYTHONDIR": str(found.root / "ipython"),
        }
        before = {name: os.environ.get(name) for name in changed}
        os.environ.update(changed)
        try:
            yield found
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                os.environ.update({name: value} if value is not None else {})


# -- what is compared


def variants(found: Place) -> list[Variant]:
    """All that can be started here; the first is what the others are held against."""
    sandboxed = {"mem_limit": "1G", "network": "none", "warm": False}
    listed = [
        Variant("plain tcp"),
        Variant("plain ipc", transport="ipc"),
        Variant("sandbox", config=sandboxed),
        Variant("sandbox 1 cpu", config=sandboxed | {"cpu_limit": 1.0}),
    ]
    warm = sandboxed | {"warm": True, "preload": PRELOAD, "mem_limit": "2G"}
    listed += [
        Variant("nursery", config=warm),
        # Another cap, or the kernels of the row above would take them.
        Variant("spare", config=warm | {"spares": 1, "mem_limit": "3G"}),
    ]
    listed.append(Variant("as shipped, second start", config=SHIPPED))
    if shutil.which("bwrap"):
        listed.append(Variant("bubblewrap", argv=bubblewrap(found) + KERNEL, transport="ipc"))
    return listed


def bubblewrap(found: Place) -> tuple[str, ...]:
    """bwrap(1) with all of its namespaces, read-only system and Python, and a private home.

    JPY_PARENT_PID=1: ipykernel ends itself where its parent is not the process of that number, and
    does not look where it is 1.
    """
    words = ["bwrap", "--unshare-all", "--die-with-parent"]
    for path in ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc"):
        if os.path.islink(path):
            words += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            words += ["--ro-bind", path, path]
    home = os.path.expanduser("~")
    words += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--tmpfs", home]
    for path in sorted(_python_directories()):
        words += ["--ro-bind", path, path]
    for folder in (found.work, found.runtime):
        words += ["--bind", str(folder), str(folder)]
    words += ["--setenv", "JPY_PARENT_PID", "1", "--setenv", "IPYTHONDIR", f"{home}/.ipython"]
    return (*words, "--chdir", str(found.work), "--")


def _python_directories() -> set[str]:
    packages = Path(ipykernel.__file__).parents[1]
    paths = {sys.prefix, sys.base_prefix, str(packages)}
    return {
        path
        for path in paths
        if not path.startswith("/usr/") and not any(path.startswith(f"{o}/") for o in paths)
    } - {"/usr"}


# -- one kernel


def write_kernels(found: Place, listed: Sequence[Variant]) -> KernelSpecManager:
    """A kernel.json for each of *listed*, and who finds them."""
    for variant in listed:
        folder = found.kernels / kernel_name(variant)
        folder.mkdir()
        (folder / "kernel.json").write_text(json.dumps(variant.kernel_json()))
    return KernelSpecManager(kernel_dirs=[str(found.kernels)], ensure_native_kernel=False)


def kernel_name(variant: Variant) -> str:
    """The name of the variant's kernelspec."""
    return variant.name.replace(" ", "-")


def new_manager(variant: Variant, found: Place, specs: KernelSpecManager) -> KernelManager:
    """A manager for one kernel, with files of its own in the run's runtime directory."""
    manager = KernelManager(kernel_name=kernel_name(variant), kernel_spec_manager=specs)
    own = found.runtime / f"k{time.monotonic_ns() % 10**9}"
    manager.connection_file = f"{own}.json"
    if variant.transport:
        manager.transport = variant.transport
        manager.ip = str(own)
    return manager


def start_quietly(manager: KernelManager, found: Place) -> None:
    """Start *manager*'s kernel; what it writes to its log goes nowhere."""
    manager.start_kernel(cwd=str(found.work), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@contextlib.contextmanager
def client_of(manager: KernelManager, seconds: float) -> Iterator[Any]:
    """One of *manager*'s kernel, which has been started, when that has answered within so many
    *seconds*; both end with this."""
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=seconds)
        yield client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def await_reply(client: Any) -> None:
    """Ask for kernel_info once, and wait for the answer."""
    client.kernel_info()
    while client.get_shell_msg(timeout=_TIMEOUT_SECONDS)["msg_type"] != "kernel_info_reply":
        pass


def measure(variant: Variant, found: Place, specs: KernelSpecManager) -> Sample:
    """Start, time, weigh and end one kernel."""
    sample = Sample(variant=variant.name)
    ahead.wait()
    others = common.descendants(os.getpid())
    mounts = common.mount_count()
    manager = new_manager(variant, found, specs)
    begin = time.perf_counter()
    start_quietly(manager, found)
    client = manager.client()
    client.start_channels()
    try:
        await_reply(client)
        sample.reply_ms = _since(begin)
        client.wait_for_ready(timeout=_TIMEOUT_SECONDS)
        sample.ready_ms = _since(begin)
        processes = processes_of(manager, others)
        sample.processes = len(processes)
        sample.pss_mib = common.pss_bytes(processes) / (1 << 20)
        groups = common.own_cgroups(processes)
        files = _files_of(manager)
    finally:
        client.stop_channels()
        begin = time.perf_counter()
        manager.shutdown_kernel(now=False)
        sample.shutdown_ms = _since(begin)
    sample.left = _left_overs(processes, groups, mounts, files)
    return sample


def measure_imports(variant: Variant, found: Place, specs: KernelSpecManager) -> float:
    """Start a kernel and import what a notebook begins with: milliseconds from the call on."""
    ahead.wait()
    manager = new_manager(variant, found, specs)
    begin = time.perf_counter()
    start_quietly(manager, found)
    client = manager.client()
    client.start_channels()
    try:
        message = client.execute(f"import {', '.join(PRELOAD or ['json'])}")
        while client.get_shell_msg(timeout=_TIMEOUT_SECONDS)["parent_header"]["msg_id"] != message:
            pass
        return _since(begin)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def processes_of(manager: KernelManager, others: set[common.Process]) -> set[common.Process]:
    """Those of *manager*'s kernel: of ours below its PID 1, of others what is new."""
    handle = getattr(manager.provisioner, "handle", None)
    if handle is None:
        return common.descendants(os.getpid()) - others
    init = common.process(handle.record.init_pid)
    return common.descendants(init.pid) | {init}


def _since(begin: float) -> float:
    return (time.perf_counter() - begin) * 1000


def _files_of(manager: KernelManager) -> list[str]:
    """Patterns of what lies about for a kernel that runs."""
    patterns = [manager.connection_file]
    if manager.transport == "ipc":
        patterns.append(f"{manager.ip}-*")
    folder = getattr(getattr(manager.provisioner, "handle", None), "folder", None)
    return [*patterns, str(folder.path)] if folder else patterns


def _left_overs(
    processes: set[common.Process],
    groups: set[str],
    mounts: int,
    files: Sequence[str],
) -> dict[str, int]:
    """What is still there when its time is over."""

    def count() -> dict[str, int]:
        return {
            "processes": sum(process.exists() for process in processes),
            "cgroups": sum(map(os.path.isdir, groups)),
            "mounts": max(0, common.mount_count() - mounts),
            "files": sum(len(glob.glob(pattern)) for pattern in files),
        }

    common.wait_until(lambda: not any(count().values()), LEFT_OVER_SECONDS, time.sleep)
    return count()


# -- a run


def run(rounds: int, listed: Sequence[Variant], found: Place) -> list[Sample]:
    """*rounds* kernels of each variant, after one of each that does not count."""
    specs = write_kernels(found, listed)
    shuffled = random.Random(SEED)
    samples = []
    for number in range(rounds + 1):
        order = shuffled.sample(listed, len(listed))
        taken = [measure(variant, found, specs) for variant in order]
        for sample, variant in zip(taken, order, strict=True):
            sample.imported_ms = measure_imports(variant, found, specs)
        samples += taken if number else []
        print(f"\rround {number} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return samples


def table(samples: Sequence[Sample], names: Sequence[str]) -> list[list[str]]:
    """A row a variant: spread and ratio of each measure, and what was left."""
    head = [
        "kernel",
        "reply ms",
        "",
        "imported ms",
        "",
        "ready ms",
        "",
        "shutdown ms",
        "",
        "PSS MiB",
        "",
    ]
    rows = [[*head, "processes", "left over"]]
    for name in names:
        mine = [sample for sample in samples if sample.variant == name]
        row = [name]
        for measure_name in _MEASURES:
            values = values_of(samples, name, measure_name)
            base = values_of(samples, names[0], measure_name)
            digits = 1 if measure_name == "pss_mib" else 0
            row.append(common.format_spread(common.spread(values), digits))
            row.append(common.format_ratio(common.paired_ratio(values, base)))
        row.append(str(max(sample.processes for sample in mine)))
        rows.append([*row, format_left(mine)])
    return rows


def values_of(samples: Sequence[Sample], name: str, measure_name: str) -> list[float]:
    """One measure of one variant, in the order of the rounds."""
    return [getattr(sample, measure_name) for sample in samples if sample.variant == name]


def format_left(samples: Sequence[Sample]) -> str:
    """Such as "2 files", summed over *samples*, "0" for nothing."""
    total: dict[str, int] = {}
    for sample in samples:
        for kind, number in sample.left.items():
            total[kind] = total.get(kind, 0) + number
    return ", ".join(f"{number} {kind}" for kind, number in total.items() if number) or "0"


def main(rounds: int, json_path: str | None) -> None:
    """Measure, print, and save the samples if *json_path* says where."""
    facts = common.machine()
    with place() as found:
        listed = variants(found)
        try:
            samples = run(rounds, listed, found)
        finally:
            ahead.end_own()
    print(common.format_machine(facts))
    print(f"imported: {', '.join(PRELOAD) or 'nothing: none of them is installed'}")
    print(f"rounds:   {rounds}; median (10th-90th percentile), and the ratio to plain tcp\n")
    print(common.format_table(table(samples, [variant.name for variant in listed])))
    if json_path:
        common.save_json(json_path, {"machine": facts, "rounds": rounds, "samples": samples})
