"""files.py - what another root and its layer cost: starts, memory, small files, large ones, an
install.

Every round does each thing in each place, in an order of its own. A place is a command in front of
``python -c``: what is timed is told by the Python inside, but for starts.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pip

from benchmarks import common, start
from sandbox_provisioner.facilities.root.facts.kept import drop_kept
from sandbox_provisioner.facilities.storage.facts import image_of
from sandbox_provisioner.layers.disks import add_ready, drop_ready, usual_size
from sandbox_provisioner.layers.place import layer_path
from sandbox_provisioner.warm import ahead
from tests import roots

_HERE = "/srv/bench"
_FILES, _MEBIBYTES, _INSTALLED = 2000, 128, 2000
# Runs in each place, as arguments: what to do, and where.
_WORK = f"""
import os, subprocess, sys, time
what, where = sys.argv[1:3]
os.makedirs(where, exist_ok=True); os.chdir(where)
begin = time.perf_counter()
if what == "small files":
    for number in range({_FILES}):
        os.makedirs(f"d{{number // 100}}", exist_ok=True)
        with open(f"d{{number // 100}}/{{number}}", "wb") as file: file.write(b"x" * 1024)
    for number in range({_FILES}):
        os.stat(f"d{{number // 100}}/{{number}}")
        os.rename(f"d{{number // 100}}/{{number}}", f"d{{number // 100}}/n{{number}}")
    for number in range({_FILES}): os.unlink(f"d{{number // 100}}/n{{number}}")
elif what == "large file":
    with open("large", "wb", buffering=0) as file:
        for _ in range({_MEBIBYTES}): file.write(b"x" * (1 << 20))
        os.fsync(file.fileno())
    with open("large", "rb", buffering=0) as file:
        while file.read(1 << 20): pass
    os.unlink("large")
elif what == "install":
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-cache-dir",
           "--no-compile", "--no-warn-script-location", "--disable-pip-version-check",
           "--root-user-action=ignore", "--target", where + "/installed", sys.argv[3]]
    subprocess.run(pip, check=True)
print("seconds", time.perf_counter() - begin)
"""
_BOX = (sys.executable, "-m", "sandbox_provisioner.app", "run", "--workdir", "none")
_WHATS = ("small files", "large file", "install")


@dataclass(frozen=True, slots=True)
class Sample:
    """One thing in one place."""

    what: str
    place: str
    value: float  # ms, of memory MiB


@dataclass(frozen=True, slots=True)
class Site:
    """What a run has: a root to work in, in its forms, a disk, and a package of many files."""

    forms: Mapping[str, str]
    disk: Path
    wheel: str


@contextlib.contextmanager
def _site() -> Iterator[Site]:
    # Not below /tmp, which a box has one of its own for.
    with tempfile.TemporaryDirectory(prefix="sbx-files-", dir="/var/tmp") as folder:
        os.chmod(folder, 0o755)
        root = roots.make(Path(folder, "root"))
        # Tests' roots leave out what pip needs of what it brings.
        shutil.copytree(
            os.path.dirname(pip.__file__), root / f"usr/lib/{roots.LIBRARY}/site-packages/pip"
        )
        wheel = _wheel(root)
        (root / _HERE[1:]).mkdir()
        (root / _HERE[1:]).chmod(0o1777)
        forms = {"directory": str(root)}
        for kind, maker in (("squashfs", "mksquashfs"), ("erofs", "mkfs.erofs"),
                            ("ext4", "mkfs.ext4")):  # fmt: skip
            if shutil.which(maker):
                forms[kind] = str(roots.make_image(root, Path(folder, f"root.{kind}"), kind))
        disk = Path(folder, "disk")
        disk.mkdir()
        yield Site(forms, disk, wheel)


def _wheel(root: Path) -> str:
    """A wheel of many small modules, in *root* and so at the same path in every place."""
    folder, name = root / "srv", "many-1.0-py3-none-any.whl"
    folder.mkdir(exist_ok=True)
    written = {f"many/m{number}.py": f"x = {number}\n" for number in range(_INSTALLED)}
    written["many-1.0.dist-info/METADATA"] = "Metadata-Version: 2.1\nName: many\nVersion: 1.0\n"
    written["many-1.0.dist-info/WHEEL"] = (
        "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    written["many-1.0.dist-info/RECORD"] = "".join(f"{path},,\n" for path in written)
    with zipfile.ZipFile(folder / name, "w") as file:
        for path, text in written.items():
            file.writestr(path, text)
    return f"/srv/{name}"


# -- starts


_READY, _FIRST = ", layer made ahead", ", first"


def _starts(rounds: int, site: Site) -> list[Sample]:
    """Of a kernel, until its first reply, and its memory then, in each root."""
    with start.place() as found, contextlib.ExitStack() as stack:
        stack.callback(ahead.end_own)
        options = _options(site).items()
        listed = [_variant(found, name, more) for name, more in options]
        specs = start.write_kernels(found, listed)
        samples = []
        for number, order in _orders(rounds, listed):
            for variant in order:
                measured = _start(variant, found, specs)
                samples += measured if number else []
    return samples


def _options(site: Site) -> dict[str, dict[str, str]]:
    """The options of each kind of start: with a layer and without, and the first over an image."""
    options: dict[str, dict[str, str]] = {"host": {}}
    is_root = os.geteuid() == 0
    layered = (", layer", _READY) if is_root and usual_size() else (", layer",)
    for form, path in site.forms.items():
        first = (_FIRST,) if is_root and form != "directory" else ()
        bare = {"rootfs": path, "layer": "none"}
        options |= {f"{form}{how}": bare for how in ("", *first)}
        options |= {f"{form}{how}": bare | {"layer": "kernel"} for how in layered}
    return options


def _variant(found: start.Place, name: str, more: Mapping[str, str]) -> start.Variant:
    python = roots.PYTHON if more else sys.executable
    config = {"mem_limit": "1G", "warm": False, "runtime_dir": str(found.runtime), **more}
    argv = (python, *start.KERNEL[1:])
    return start.Variant(name, argv=argv, config=config)


def _start(
    variant: start.Variant, found: start.Place, specs: start.KernelSpecManager
) -> list[Sample]:
    drop_ready()
    if variant.name.endswith(_FIRST):
        drop_kept()
    if variant.name.endswith(_READY):
        add_ready(image_of(usual_size()), layer_path(), 60.0)
    others = common.descendants(os.getpid())
    manager = start.new_manager(variant, found, specs)
    begin = time.perf_counter()
    start.start_quietly(manager, found)
    client = manager.client()
    client.start_channels()
    try:
        start.await_reply(client)
        ms = (time.perf_counter() - begin) * 1000
        processes = start.processes_of(manager, others)
        found_out = (
            ("start", ms),
            ("CPU time", common.cpu_ms(processes)),
            ("memory", common.pss_bytes(processes) / (1 << 20)),
        )
        return [Sample(what, variant.name, value) for what, value in found_out]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def _orders(rounds: int, things: Sequence[Any]) -> Iterator[tuple[int, list[Any]]]:
    """The number of each round, the first of which does not count, and its order."""
    shuffled = random.Random(start.SEED)
    for number in range(rounds + 1):
        print(f"\rround {number} of {rounds}", end="", file=sys.stderr, flush=True)
        yield number, shuffled.sample(things, len(things))
    print(file=sys.stderr)


# -- work


def _places(site: Site) -> dict[str, list[str]]:
    """What stands in front of the root's Python, for each place where work is done."""
    box = [*_BOX, "--mem-limit", "4G", "--tmp-limit", "2G", "--layer", "kernel", "--rootfs"]
    root = site.forms["directory"]
    places = {"bare disk": [], "layer over a directory": [*box, root, "--"]}
    if "squashfs" in site.forms:
        places["layer over squashfs"] = [*box, site.forms["squashfs"], "--"]
    if os.geteuid() == 0:
        places["overlay on the disk"] = [*_overlay(site, root), "chroot", f"{site.disk}/merged"]
    if shutil.which("bwrap"):
        places["bubblewrap"] = ["bwrap", "--unshare-all", "--ro-bind", root, "/", "--dev", "/dev",
                                "--tmpfs", "/tmp", "--bind", str(site.disk), _HERE]  # fmt: skip
    if shutil.which("podman"):
        # Its own limits are more than a container's root may set.
        limits = ("--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024")
        places["podman"] = ["podman", "run", "--rm", "--network=none", *limits, "--rootfs",
                            f"{root}:O"]  # fmt: skip
    return places


def _overlay(site: Site, root: str) -> list[str]:
    """An overlay as other engines have it, with the disk above, in a mount namespace of its own."""
    for name in ("upper", "work", "merged"):
        (site.disk / name).mkdir(exist_ok=True)
    options = f"lowerdir={root},upperdir={site.disk}/upper,workdir={site.disk}/work"
    script = f'mount -t overlay overlay -o {options} {site.disk}/merged && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", script, "sh"]


def _those_that_work(places: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Without engines that are installed and run nothing here, with what they say."""
    found = {}
    for place, front in places.items():
        words = [*front, roots.PYTHON, "-c", ""]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode and front:
            print(f"left out: {place}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        else:
            found[place] = front
    return found


def _work(rounds: int, site: Site) -> list[Sample]:
    places = _those_that_work(_places(site))
    pairs = [(what, place) for what in _WHATS for place in places]
    samples = []
    for number, order in _orders(rounds, pairs):
        for what, place in order:
            ms = _do(what, place, places[place], site)
            samples += [Sample(what, place, ms)] if number else []
    return samples


def _do(what: str, place: str, front: Sequence[str], site: Site) -> float:
    python, where, wheel = roots.PYTHON, _HERE, site.wheel
    if not front:
        root = site.forms["directory"]
        python, where, wheel = sys.executable, str(site.disk / "bare"), root + wheel
    words = [*front, python, "-c", _WORK, what, f"{where}/{time.monotonic_ns()}", wheel]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    told = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("seconds ")]
    if done.returncode or not told:
        raise SystemExit(f"{what} in {place} failed:\n{done.stdout}{done.stderr}")
    return float(told[0]) * 1000


# -- a run


def _table(samples: Sequence[Sample], what: str) -> list[list[str]]:
    """A row a place: what was measured, and its ratio to the first place, within each round."""
    places = list(dict.fromkeys(sample.place for sample in samples if sample.what == what))
    first = "bare disk" if what in _WHATS else "host"
    by_place = {
        place: [one.value for one in samples if (one.what, one.place) == (what, place)]
        for place in places
    }
    unit, digits = ("MiB", 1) if what == "memory" else ("ms", 0)
    rows = [[what, unit, f"to {first}"]]
    for place in sorted(places, key=lambda place: (place != first, place)):
        times = by_place[place]
        ratio = common.format_ratio(common.paired_ratio(times, by_place[first]))
        rows.append([place, common.format_spread(common.spread(times), digits), ratio])
    return rows


def main(rounds: int, work: int, json_path: str | None) -> None:
    """Measure, print, and save the samples if *json_path* says where."""
    facts = common.machine()
    with _site() as site:
        samples = _starts(rounds, site) + (_work(work, site) if work else [])
    print(common.format_machine(facts))
    print(f"rounds:   {rounds}, of work {work}; median (10th-90th percentile)")
    print(f"work:     {_FILES} small files, {_MEBIBYTES} MiB, a package of {_INSTALLED} modules")
    for what in ("start", "CPU time", "memory", *(_WHATS if work else ())):
        print()
        print(common.format_table(_table(samples, what)))
    if json_path:
        told = [{"what": one.what, "place": one.place, "value": one.value} for one in samples]
        common.save_json(json_path, {"machine": facts, "samples": told})
