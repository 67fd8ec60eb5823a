"""conda_in_box.py - in a box, with nobody's rights: finds, fetches and links packages of conda.

Its text is handed to this machine's Python, which has rattler; nothing else of ours is there. No
program of a package runs: rattler links files, and leaves their scripts for that alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
from typing import Any
from urllib.parse import unquote

import rattler
from rattler import InstallerReporter, LockChannel, LockPlatform

# The same links wherever it is done: a record in the image tells which they were.
_COPIES = "allow-symbolic-links = false\nallow-hard-links = false\nallow-ref-links = false\n"
_FILE = "file://"
# Of this machine's processor and its drivers nothing is said: the image is for others as well.
_OF_ANY_MACHINE = ("__unix", "__linux")


async def install(told: dict[str, Any]) -> None:
    """What *told* says; the lock is there before anything is fetched."""
    if not os.path.exists(told["lock"]):
        _say("looks for packages that fit together")
        _write_lock(told, await _solved(told))
    found = rattler.LockFile.from_path(told["lock"])
    environment = found.default_environment()
    records = environment and environment.conda_repodata_records_for_platform(found.platforms()[0])
    if not records:
        raise ValueError("there are no packages for this machine in the lock")
    for record in records:
        _check(record)
    megabytes = sum(record.size or 0 for record in records) >> 20
    _say(f"{len(records)} packages, {megabytes} MB")
    lines = None if sys.stderr.isatty() else _Lines(len(records))  # type: ignore[abstract]
    await rattler.install(
        records,
        told["prefix"],
        cache_dir=told["cache"],
        execute_link_scripts=False,
        show_progress=sys.stderr.isatty(),
        reporter=lines,
        config=rattler.Config.from_toml(_COPIES),
    )


def _check(record: rattler.RepoDataRecord) -> None:
    """ValueError where it is not the very package: rattler looks at what comes from a server, and
    not at files. What is not there any more may have been fetched before."""
    if not record.sha256:
        raise ValueError(f"{record.file_name}: its channel tells no SHA-256 of it")
    if not record.url.startswith(_FILE):
        return
    path = unquote(record.url.removeprefix(_FILE))
    if not os.path.exists(path):
        return
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").digest()
    if found != record.sha256:
        raise ValueError(f"{record.file_name} is not the package that it was, by its SHA-256")


async def _solved(told: dict[str, Any]) -> list[rattler.RepoDataRecord]:
    detected = (one.into_generic() for one in rattler.VirtualPackage.detect())
    virtual = [one for one in detected if one.name.normalized in _OF_ANY_MACHINE]
    if told["glibc"]:
        virtual.append(_generic("__glibc", told["glibc"]))
    return await rattler.solve(
        told["channels"],
        told["specs"],
        gateway=rattler.Gateway(cache_dir=told["cache"]),
        platforms=[_platform(), "noarch"],
        virtual_packages=virtual,
    )


def _generic(name: str, version: str) -> rattler.GenericVirtualPackage:
    return rattler.GenericVirtualPackage(
        rattler.PackageName(name), rattler.Version(version), rattler.BuildString("0")
    )


def _platform() -> Any:
    return str(rattler.Subdir.current())


def _write_lock(told: dict[str, Any], records: list[rattler.RepoDataRecord]) -> None:
    platform = LockPlatform(_platform())
    lock = rattler.LockFile([platform])
    lock.set_channels("default", [LockChannel(channel) for channel in told["channels"]])
    for record in sorted(records, key=lambda one: one.name.normalized):
        lock.add_conda_package("default", platform, record)
    lock.to_path(told["lock"])


class _Lines(InstallerReporter):
    """Says which package is there, for who has no terminal."""

    def __init__(self, whole: int) -> None:
        self._done, self._whole = 0, whole
        self._names: list[str] = []

    def on_link_start(self, operation: int, package_name: str) -> int:
        self._names.append(package_name)
        return len(self._names) - 1

    def on_link_complete(self, index: int) -> None:
        self._done += 1
        _say(f"{self._done} of {self._whole}: {self._names[index]}")


def _say(text: str) -> None:
    sys.stderr.write(f"conda: {text}\n")


def main() -> int:
    """The exit status."""
    try:
        told = json.loads(sys.argv[1])
        os.environ.update(told["variables"])
        asyncio.run(install(told))
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # rattler has one for each thing, and tells it in full
        _say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # its threads may still look for the interpreter when that has gone
