"""configured.py - whoever launches; reads only: where an installer is configured to look.

Who writes such a file says with whom kernels may speak. So one counts only if no kernel can have
written it: not this one, and none that worked somewhere else before. Kernels write into work
directories and writable volumes, with the rights of their server. What lies in the system's trees
is in none of these; nor is what `Covers` names in a home, which is no work directory, and is
covered in every one around it. What belongs to root is out of reach of an ordinary user's.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from configparser import Error, RawConfigParser
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlsplit

from sandbox_provisioner.errors import HostError, SpecError
from sandbox_provisioner.facilities.network.wish.addresses import read_address
from sandbox_provisioner.facilities.network.wish.rules import PACKAGES, Rule, given_by, parse
from sandbox_provisioner.links import real_path
from sandbox_provisioner.places import is_of_system
from sandbox_provisioner.python_files import links_on_way, read_start
from sandbox_provisioner.spec import relative

_MOST_BYTES = 1 << 18
_MOST_FILES = 64
_DEFAULT_PORTS = {"http": 80, "https": 443}


# Changes when a file or directory does; None where there is none.
State = tuple[int, ...] | None


def state_of(path: str) -> State:
    """That of *path*, and of what a link there leads to."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@dataclass(frozen=True, slots=True)
class Said:
    """A *value*, and *where* it is said: "/etc/pip.conf, line 3". *file* is "" for a variable."""

    value: str
    where: str
    file: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Reads configuration files of the user *uid*, whose *home* it is.

    *guarded* are names in it that no kernel ever writes, *writable* real paths that this kernel may
    write, but for *covered* below them. Files that are there and do
    not count are noted down in *doubted*, and in *seen* the state of all that was looked at.
    """

    uid: int
    home: str
    guarded: frozenset[str] = frozenset()
    writable: tuple[str, ...] = ()
    covered: tuple[str, ...] = ()
    doubted: list[str] = field(default_factory=list)
    seen: dict[str, State] = field(default_factory=dict)

    @property
    def who(self) -> tuple[object, ...]:
        """All that decides on what is read, and what counts."""
        return self.uid, self.home, self.guarded, self.writable, self.covered

    def look(self, path: str) -> None:
        """Note down the state of *path*, before it is used."""
        self.seen.setdefault(path, state_of(path))

    def text(self, path: str) -> str:
        """All of a file; "" if it is not there or cannot be read, which is how its own reader takes
        it, or if a kernel may have written it."""
        self.look(path)
        raw = read_start(path, _MOST_BYTES + 1)
        if raw and not self.is_out_of_reach(path):
            self.doubted.append(path)
            return ""
        if len(raw) > _MOST_BYTES:
            raise unreadable(path, f"it is longer than {_MOST_BYTES >> 10} KiB")
        try:
            return raw.decode().removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            raise unreadable(f"{path}, line {line}", "it is not text in UTF-8") from None

    def lines(self, path: str) -> Iterator[Said]:
        """The lines of a file, without spaces at their ends."""
        for number, line in enumerate(self.text(path).splitlines(), 1):
            yield Said(line.rstrip(), f"{path}, line {number}", path)

    def within(self, folder: str, ending: str | tuple[str, ...]) -> list[str]:
        """The files in *folder* whose names end so, sorted."""
        self.look(folder)
        try:
            names = sorted(os.listdir(folder))[:_MOST_FILES]
        except OSError:
            return []
        return [f"{folder}/{name}" for name in names if name.endswith(ending)]

    def is_out_of_reach(self, path: str) -> bool:
        """Whether no kernel can have written *path*, or a link on the way to it."""
        ways = {os.path.normpath(path), real_path(path), *links_on_way(path)}
        return all(map(self._is_safe, ways)) and not any(map(self._is_given, ways))

    def _is_given(self, path: str) -> bool:
        if any(relative(path, place) is not None for place in self.covered):
            return False
        return any(relative(path, root) is not None for root in self.writable)

    def _is_safe(self, path: str) -> bool:
        if is_of_system(path):
            return True
        below = relative(path, self.home) or relative(path, real_path(self.home)) or ""
        if any(relative(below, name) is not None for name in self.guarded):
            return True
        return self.uid != 0 and _is_roots(path)

    def ini(self, path: str) -> dict[str, dict[str, Said]]:
        """A file of sections: each with its settings."""
        parser = RawConfigParser(strict=False)
        try:
            parser.read_string(self.text(path), path)
        except Error as error:
            problems = getattr(error, "errors", None)
            line = getattr(error, "lineno", None) or (problems[0][0] if problems else None)
            where = f"{path}, line {line}" if line else path
            raise unreadable(where, "it is no line of a settings file") from None
        starts = list(self.lines(path))
        return {
            section: {
                key: Said(value or "", _where(starts, key, path), path)
                for key, value in parser.items(section)
            }
            for section in parser.sections()
        }


def _where(lines: list[Said], key: str, path: str) -> str:
    """The last line that begins with *key*."""
    found = [line.where for line in lines if line.value.lower().startswith(key)]
    return found[-1] if found else path


def _is_roots(path: str) -> bool:
    """Whether nobody but root can change *path*, or what is on the way to it."""
    while True:
        try:
            status = os.lstat(path)
        except OSError:
            return False
        if status.st_uid != 0:
            return False
        is_link = stat.S_ISLNK(status.st_mode)
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not is_link:
            return False
        if path == "/":
            return True
        path = os.path.dirname(path)


def unreadable(where: str, answer: str) -> HostError:
    """The error for a configuration that cannot be read."""
    return HostError(
        attempt=f'find out what network_allow = "{PACKAGES}" means on this machine',
        answer=f"{where}: {answer}",
        remedy="Correct it there, or name the hosts in network_allow in its place.",
    )


@dataclass(slots=True)
class Configured:
    """What installers are configured to use: *rules*, *variables* that tell it to those inside, and
    *notices* for whoever starts the kernel."""

    rules: dict[str, None] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def add(self, said: Said) -> SplitResult | None:
        """Add the host of a URL; None where it is not one of a network."""
        try:
            url = urlsplit(said.value)
            port = url.port or _DEFAULT_PORTS.get(url.scheme)
        except ValueError as error:
            raise unreadable(said.where, f"{without_password(said.value)!r}: {error}") from None
        if url.scheme not in _DEFAULT_PORTS:
            return None
        if not url.hostname:
            raise unreadable(said.where, f"{without_password(said.value)!r} names no host")
        if _is_this_machine(url.hostname):
            self.notices.append(
                f"{said.where} names {url.hostname}, which inside a sandbox is the sandbox itself: "
                f'left out of network_allow = "{PACKAGES}".'
            )
            return None
        host = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
        rule = _rule(f"{host}:{port}", said.where)
        self.rules[given_by(PACKAGES, rule.text)] = None
        return url

    def add_proxy(self, said: Said) -> None:
        """A proxy connects to anybody: whoever may speak with it has no rules any more."""
        if said.value:
            self.notices.append(
                f"{said.where} names a proxy, which would lead a kernel everywhere: "
                f'network_allow = "{PACKAGES}" has the hosts themselves, and not the proxy.'
            )


def _is_this_machine(host: str) -> bool:
    address = read_address(host)
    return address.is_loopback if address else host.rstrip(".").endswith("localhost")


def _rule(text: str, where: str) -> Rule:
    try:
        return parse(text, where)
    except SpecError as error:
        raise unreadable(where, error.answer) from None


def expanded(text: str, environment: Mapping[str, str]) -> str:
    """*text* with the variables that it names, as npm and conda have them."""
    return re.sub(r"\$\{?(\w+)\}?", lambda found: environment.get(found[1], found[0]), text)


def has_password(url: SplitResult) -> bool:
    """Whether it tells who asks: nobody's kernel gets that unasked. conda has it in the path."""
    return "@" in url.netloc or url.path.startswith("/t/")


def without_password(url: str) -> str:
    """For a message."""
    scheme, separator, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}" if separator else url
