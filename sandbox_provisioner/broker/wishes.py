"""broker/wishes.py - the daemon and its clients; pure: what a server asks the broker for.

A wish is data. It has no step, no user, and nothing that root would resolve: paths in it are names
for what came opened beside it, or are looked at with the rights of whoever asks (`eyes.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sandbox_provisioner.broker.values import BadValue, as_json, of_json
from sandbox_provisioner.contract import Labels
from sandbox_provisioner.facilities.network.wish.network import OFFERED
from sandbox_provisioner.facilities.workdir.facts.run_by_host import Server
from sandbox_provisioner.plan import LaunchRequest, start_directory
from sandbox_provisioner.policy.terms import Terms
from sandbox_provisioner.spec import NO_WORKDIR, Confinement, SandboxSpec, check_path

# With stdin, stdout, stderr and the work directory.
MOST_VOLUMES = 32
STREAMS = 3
MOST_DESCRIPTORS = STREAMS + 1 + MOST_VOLUMES
_MOST_WORDS = 1024
_MOST_LABEL = 4096
_ID = re.compile(r"[0-9a-f]{12}", re.ASCII)
_FILE_NAME = re.compile(r"[\w.+@=:-]{1,200}", re.ASCII)
_VARIABLE = re.compile(r"[^=\0]+", re.DOTALL)
_MOST_SIGNAL = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """One start. The words are those of `LaunchRequest`; *home*, *here*, *umask*, *environment* and
    *server* tell of who asks, as `Caller` has it."""

    sandbox_id: str
    spec: SandboxSpec
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    cwd: str
    connection_file: tuple[str, str]
    home: str
    here: str
    umask: int
    inherited: Mapping[str, str]
    server: Server
    labels: Labels
    env_keep: tuple[str, ...] = ()
    survive_server: bool = False
    logged: tuple[str, ...] = ()
    extra_files: tuple[str, ...] = ()
    server_places: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_id(self.sandbox_id)
        self._check_spec()
        self._check_command()
        for what, path in (("cwd", self.cwd), ("home", self.home), ("here", self.here)):
            check_path(what, path)
        _require(start_directory(self.cwd, self.spec) == self.cwd, "cwd is not in the workdir")
        name, _ = self.connection_file
        plain = _FILE_NAME.fullmatch(name) and name not in {".", ".."}
        _require(bool(plain), "connection_file has no plain name")
        _require(0 <= self.umask <= 0o777, "umask is none")
        _require(set(self.logged) <= {"stdout", "stderr"}, "logged has other words")
        _require(self.labels.kind == "kernel" and not self.labels.nursery, "it is no kernel")
        for label in (self.labels.kernel_id, self.labels.name, self.labels.notebook):
            _require(len(label) <= _MOST_LABEL, "a label is too long")

    def _check_spec(self) -> None:
        spec = self.spec
        _require(spec.confinement is Confinement.NAMESPACES, "the broker's confinement is another")
        _require(spec.network.mode in OFFERED, "nobody can ask for that network")
        _require(len(spec.volumes) <= MOST_VOLUMES, "there are too many volumes")
        _require(len(set(self.sources)) == len(self.sources), "one path is given twice")
        _require(bool(re.fullmatch(r"[A-Za-z0-9.-]{1,63}", spec.hostname)), "hostname is none")

    def _check_command(self) -> None:
        _require(0 < len(self.argv) <= _MOST_WORDS, "argv has no words, or too many")
        program = self.argv[0]
        _require("/" not in program or program.startswith("/"), "the program's path is relative")
        _require(not any("\0" in word for word in self.argv), "a word of argv has a NUL")
        for variables in (self.environment, self.inherited):
            for name, value in variables.items():
                good = _VARIABLE.fullmatch(name) and "\0" not in value
                _require(bool(good), "a variable has a name or a value that none can have")
        for path in (*self.extra_files, *self.server_places):
            _require(path.startswith("/") and "\0" not in path, "a path is relative")

    @property
    def sources(self) -> tuple[str, ...]:
        """The paths whose descriptors come with it, behind the streams."""
        return sources_of(self.spec)

    def request(self, spec: SandboxSpec, watched: int, terms: Terms | None = None) -> LaunchRequest:
        """The start of it in the box *spec*, which is narrowed to *terms*, where there are any."""
        return LaunchRequest(
            sandbox_id=self.sandbox_id,
            spec=spec,
            argv=self.argv,
            environment=self.environment,
            cwd=self.cwd,
            env_keep=self.env_keep,
            connection_file=self.connection_file,
            survive_server=True,
            watched=-1 if self.survive_server else watched,
            logged=self.logged,
            extra_files=self.extra_files,
            server_places=self.server_places,
            terms=terms,
        )


def sources_of(spec: SandboxSpec) -> tuple[str, ...]:
    """What of the host a box such as *spec* is given."""
    workdir = () if spec.workdir == NO_WORKDIR else (spec.workdir,)
    return (*workdir, *(volume.source for volume in spec.volumes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked of a kernel that runs. *init* is the pid and the start time of its PID 1, by
    which `find` knows whether it is still the same."""

    ask: str
    sandbox_id: str
    signal: int = 0
    busy: bool = False
    init: tuple[int, int] = field(default=(0, 0))

    def __post_init__(self) -> None:
        check_id(self.sandbox_id)
        _require(self.ask in QUESTIONS, "that is no question")
        _require(0 <= self.signal <= _MOST_SIGNAL, "there is no such signal")


QUESTIONS = ("ready", "look", "signal", "kill", "note", "find", "close")


def check_id(sandbox_id: str) -> None:
    """BadValue for what no sandbox is called: it becomes a name of folders and groups."""
    _require(bool(_ID.fullmatch(sandbox_id)), "sandbox_id is none")


def read(message: dict[str, Any]) -> Wish | Question:
    """What *message* asks for; BadValue or SpecError for what cannot be meant."""
    if message.keys() == {"start"}:
        return of_json(Wish, message["start"], "start")
    return of_json(Question, message, "question")


def written(asked: Wish | Question) -> dict[str, Any]:
    """The message that asks for it."""
    return {"start": as_json(asked)} if isinstance(asked, Wish) else as_json(asked)


def _require(good: bool, answer: str) -> None:
    if not good:
        raise BadValue(answer)
