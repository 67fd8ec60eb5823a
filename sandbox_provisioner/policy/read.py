"""read.py - in who launches, reads only: the policy's file.

It is opened once, and all that counts is asked of that descriptor: whose it is, who may write to
it, what it says. What is wrong with it refuses every start, since what it would have forbidden is
not known then (`PolicyError`).
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import shlex
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sandbox_provisioner.errors import SandboxError, did_you_mean
from sandbox_provisioner.policy.hub import VOLUMES, HubTerms
from sandbox_provisioner.policy.lines import Lines, NotToml, Path, read_toml
from sandbox_provisioner.policy.meaning import check_option
from sandbox_provisioner.policy.narrow import contradiction
from sandbox_provisioner.policy.policy import (
    EVERYONE,
    KERNELS,
    ON_EXCESS,
    Entry,
    Policy,
    Section,
    count_term,
    sum_limits,
)
from sandbox_provisioner.policy.terms import ADMINISTRATOR, Kind, OnExcess, PolicyError, Term

POLICY_FILE = "/etc/jupyter/sandbox.toml"
MOST_BYTES = 256 << 10
# Where an audit's lines go that go to no file.
TO_LOG, TO_JOURNAL = "log", "journal"
_OF_ALL = ("ask", "audit", "host", "hub", EVERYONE, "group", "user")
_OF_HOST = ("mem_limit", KERNELS)
_ACCOUNT = "account"
_GROUPS = "groups"
_OF_HUB = (_ACCOUNT, _GROUPS, VOLUMES)
_OF_SECTION = (KERNELS, ON_EXCESS, *Kind)
# Where a name stands in for the users whose own it will be.
_ANYBODY = "username"

Known = Callable[[str], bool]
UidOf = Callable[[str], int | None]


def is_group(name: str) -> bool:
    """Whether the system has this group."""
    with contextlib.suppress(KeyError, ValueError):
        return bool(grp.getgrnam(name))
    return False


def uid_of(name: str) -> int | None:
    """Of the user of the system with this *name*; None if there is none."""
    with contextlib.suppress(KeyError, ValueError):
        return pwd.getpwnam(name).pw_uid
    return None


def read_policy(path: str = POLICY_FILE, owner_uid: int | None = 0) -> Policy | None:
    """The policy in *path*, which nobody but *owner_uid* may write (None: it is only looked at, and
    may be anybody's); None where there is no such file. PolicyError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(path, error) from None
    try:
        text = _read_trusted(fd, path, owner_uid)
    except OSError as error:
        raise _unreadable(path, error) from None
    finally:
        os.close(fd)
    return parse_policy(text, path)


def _unreadable(path: str, error: OSError) -> PolicyError:
    remedy = f"Let everybody read it, and its folders: chmod 644 {path}."
    return PolicyError(path, 0, f"reading it: {error.strerror}", remedy)


def _read_trusted(fd: int, path: str, owner_uid: int | None) -> bytes:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise PolicyError(path, 0, "it is no file", "Put a file there.")
    others_write = status.st_uid != owner_uid or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if others_write and owner_uid is not None:
        answer = f"it belongs to user {status.st_uid}, with mode {stat.S_IMODE(status.st_mode):o}"
        remedy = (
            "Nobody but root may write to it, as after chown root: and chmod 644. See what it says."
        )
        raise PolicyError(path, 0, answer, remedy)
    with open(fd, "rb", closefd=False) as file:
        text = file.read(MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        remedy = "Say it for groups in place of users."
        raise PolicyError(path, 0, f"it has more than {MOST_BYTES >> 10} KiB", remedy)
    return text


def parse_policy(
    content: bytes, file: str, is_group: Known = is_group, uid_of: UidOf = uid_of
) -> Policy:
    """The policy that *content* says, which is that of *file*; PolicyError."""
    try:
        found, lines = read_toml(content)
    except NotToml as error:
        raise PolicyError(file, error.line, error.answer, error.remedy) from None
    return _Reader(file, found, lines, is_group, uid_of).policy()


@dataclass(frozen=True, slots=True)
class _Reader:
    """What the errors of one file need: where its keys are, and whom to ask."""

    file: str
    found: Mapping[str, Any]
    lines: Lines
    is_group: Known
    uid_of: UidOf

    def policy(self) -> Policy:
        self._know((), self.found, _OF_ALL)
        host = self._table(("host",))
        self._know(("host",), host, _OF_HOST)
        memory = count = None
        if "mem_limit" in host:
            memory = self._term(("host", "mem_limit"), Kind.SUM, host["mem_limit"])
        if KERNELS in host:
            entry = self._entry(("host", KERNELS), host[KERNELS])
            with self._told(("host", KERNELS)):
                count = count_term("host", entry)
        return Policy(
            file=self.file,
            ask=self._text("ask", ADMINISTRATOR),
            audit=self._audit(),
            everyone=self._section((EVERYONE,)),
            groups=self._sections("group", self.is_group),
            users=self._sections("user", self._is_user),
            host_memory=memory,
            host_kernels=count,
            hub=self._hub() if "hub" in self.found else None,
        )

    # -- its parts

    def _hub(self) -> HubTerms:
        path = ("hub",)
        table = self._table(path)
        self._know(path, table, _OF_HUB)
        account, groups = self._account(path, table), self._groups(path, table)
        with self._told((*path, VOLUMES)):
            hub = HubTerms.read(account, groups, table.get(VOLUMES, []), self.lines.of(path))
        return hub

    def _groups(self, path: Path, table: Mapping[str, Any]) -> tuple[str, ...] | None:
        """Whose people may have servers by the hub; None where it does not say."""
        groups, at = table.get(_GROUPS), (*path, _GROUPS)
        if groups is None:
            return None
        if (
            not isinstance(groups, list)
            or not groups
            or not all(isinstance(g, str) for g in groups)
        ):
            self._refuse(at, f"{groups!r} is no list of groups", 'Write ["jupyter-users"].')
        for name in groups:
            if not self.is_group(name):
                remedy = f"Make it: groupadd {shlex.quote(name)}"
                self._refuse(at, f"this system has no group {name!r}", remedy)
        return tuple(groups)

    def _account(self, path: Path, table: Mapping[str, Any]) -> str:
        """That of the hub, which has rights of its own kind by it, and none else."""
        account = table.get(_ACCOUNT)
        if account is None:
            self._refuse(path, "it names no account", 'Write account = "jupyterhub" below it.')
        at = (*path, _ACCOUNT)
        if not isinstance(account, str):
            self._refuse(at, f"{account!r} is no text", 'Write account = "jupyterhub".')
        uid = self.uid_of(str(account))
        if uid is None:
            remedy = f"Make it: useradd --system --user-group {shlex.quote(str(account))}"
            self._refuse(at, f"this system has no user {account!r}", remedy)
        if uid == 0:
            self._refuse(
                at,
                f"{account!r} is root, whose hub starts servers by itself",
                "Name the account of a hub that is not root, or leave [hub] out.",
            )
        return str(account)

    def _is_user(self, name: str) -> bool:
        return self.uid_of(name) is not None

    def _sections(self, word: str, is_known: Known) -> dict[str, Section]:
        names = self._table((word,))
        for name in names:
            if not is_known(name):
                self._refuse(
                    (word, name),
                    f"this system has no {word} {name!r}",
                    f"Make it, or take what is said of it out of the file (getent "
                    f"{'group' if word == 'group' else 'passwd'} knows all).",
                )
        return {name: self._section((word, name)) for name in names}

    def _section(self, path: Path) -> Section:
        table = self._table(path)
        self._know(path, table, _OF_SECTION)
        name = ".".join(path)
        options = {kind: self._options((*path, kind), kind) for kind in Kind if kind in table}
        own = {word: self._entry((*path, word), table[word]) for word in (KERNELS, ON_EXCESS)
               if word in table}  # fmt: skip
        section = Section(name=name, line=self.lines.of(path), options=options, own=own)
        self._check_own(path, section)
        self._check_sense(path, section)
        return section

    def _options(self, path: Path, kind: Kind) -> dict[str, Entry]:
        return {
            option: self._checked((*path, option), kind, value)
            for option, value in self._table(path).items()
        }

    def _checked(self, path: Path, kind: Kind, value: Any) -> Entry:
        self._term(path, kind, value)
        return self._entry(path, value)

    def _term(self, path: Path, kind: Kind, value: Any) -> Term:
        *section, option = path
        with self._told(path):
            check_option(kind, option)
            named = Section(
                name=".".join(section[:-1] if section[-1] == kind else section),
                line=0,
                options={kind: {option: self._entry(path, value)}},
            )
            return named.term(kind, option, _ANYBODY)

    def _entry(self, path: Path, value: Any) -> Entry:
        return Entry(value, self.lines.of(path))

    # -- what is wrong with them

    def _check_own(self, path: Path, section: Section) -> None:
        if entry := section.own.get(KERNELS):
            with self._told((*path, KERNELS)):
                count_term(section.name, entry)
        if (entry := section.own.get(ON_EXCESS)) and entry.value not in set(OnExcess):
            answer = f"{entry.value!r} is nothing that could become of a start"
            self._refuse((*path, ON_EXCESS), answer, 'Write "narrow" or "refuse".')

    def _check_sense(self, path: Path, section: Section) -> None:
        """Refuse what one section says in two ways."""
        forced = section.says(Kind.FORCED)
        for kind in (Kind.DEFAULTS, Kind.CEILINGS):
            for option in section.says(kind):
                if option in forced:
                    answer = f"{option} is forced on line {forced[option].line}, and has {kind} too"
                    self._refuse((*path, kind, option), answer, "Take one of them out.")
        terms = {
            kind: {option: section.term(kind, option, _ANYBODY) for option in section.says(kind)}
            for kind in Kind
        }
        with self._told((*path, Kind.SUM)):
            sum_limits(terms[Kind.SUM].values())
        if wrong := contradiction(terms):
            option, kind, answer = wrong
            self._refuse((*path, kind, option), answer, "Take one of them out.")

    def _table(self, path: Path) -> Mapping[str, Any]:
        found: Any = self.found
        for name in path:
            found = found.get(name, {})
        if not isinstance(found, Mapping):
            self._refuse(path, f"{path[-1]} is no table", f"Write it as [{'.'.join(path)}].")
        table: Mapping[str, Any] = found
        return table

    def _know(self, path: Path, table: Mapping[str, Any], known: tuple[str, ...]) -> None:
        for name in table:
            if name not in known:
                hint = did_you_mean(name, known, f"Known here are: {', '.join(known)}.")
                self._refuse((*path, name), f"it has no {name!r}", hint)

    def _text(self, name: str, otherwise: str) -> str:
        value = self.found.get(name, otherwise)
        if not isinstance(value, str):
            self._refuse((name,), f"{value!r} is no text", f'Write {name} = "...".')
        return str(value)

    def _audit(self) -> str:
        place = self._text("audit", "")
        if place not in {"", TO_LOG, TO_JOURNAL} and not os.path.isabs(place):
            self._refuse(
                ("audit",),
                f"{place!r} is nowhere that lines can go to",
                'Write the absolute path of a file, "log" or "journal".',
            )
        return place

    @contextlib.contextmanager
    def _told(self, path: Path) -> Iterator[None]:
        """Let what is wrong with a value be told with its line."""
        try:
            yield
        except PolicyError:
            raise
        except SandboxError as error:
            answer = f"{error.answer} ({error.attempt})"
            self._refuse(path, answer, error.remedy)

    def _refuse(self, path: Path, answer: str, remedy: str) -> None:
        ask = self.found.get("ask", ADMINISTRATOR)
        ask = ask if isinstance(ask, str) else ADMINISTRATOR
        raise PolicyError(self.file, self.lines.of(path), answer, remedy, ask)
