"""broker/wishes.py - the daemon and its clients; pure: what a server asks the broker for.

A wish is data. It has no step, no user, and nothing that root would resolve: paths in it are names
for what came opened beside it, or are looked at with the rights of whoever asks (`eyes.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sandbox_provisioner.broker.server_wish import ServerWish
from sandbox_provisioner.broker.values import BadValue, as_json, of_json
from sandbox_provisioner.contract import Labels
from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.facilities.network.wish.network import OFFERED
from sandbox_provisioner.facilities.workdir.facts.run_by_host import Server
from sandbox_provisioner.plan import LaunchRequest, start_directory
from sandbox_provisioner.policy.terms import Terms
from sandbox_provisioner.spec import NO_WORKDIR, Confinement, SandboxSpec, check_path

# With stdin, stdout, stderr, the work directory, and another root.
MOST_VOLUMES = 32
STREAMS = 3
MOST_DESCRIPTORS = STREAMS + 2 + MOST_VOLUMES
_MOST_WORDS = 1024
_MOST_LABEL = 4096
MOST_SAID = 4096  # letters, which is more than is shown
_ID = re.compile(r"[0-9a-f]{12}", re.ASCII)
_FILE_NAME = re.compile(r"[\w.+@=:-]{1,200}", re.ASCII)
_MOST_SIGNAL = 64
_MODULE = re.compile(r"[\w.]+")
_MOST_PRELOADED = 64
_MOST_NAME = 256
_MOST_SECONDS = 1e7


# What is done about a wish: a start anew, or from what is ready; or that something is ready for
# starts such as this, when there is time, or now.
START, START_READY, PREPARE, FILL = ACTS = ("start", "start-ready", "prepare", "fill")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """What shall be ready before a start, in the words of `contract.Warmth`; *alone*: for the
    server that asks."""

    preload: tuple[str, ...] = ()
    spares: int = 0
    idle_seconds: float = 900.0
    lonely_seconds: float | None = None
    alone: bool = True
    waited_for: bool = False

    def __post_init__(self) -> None:
        _require(len(self.preload) <= _MOST_PRELOADED, "preload has too many names")
        good = all(len(name) <= _MOST_NAME and _MODULE.fullmatch(name) for name in self.preload)
        _require(good, "preload has what is no name of a module")
        _require(0 <= self.spares <= _MOST_WORDS, "spares is no number of kernels")
        for seconds in (self.idle_seconds, self.lonely_seconds or 0.0):
            _require(0 <= seconds < _MOST_SECONDS, "no nursery waits so long")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """One start, or what is ready for such ones: *act* is one of `ACTS`, with *ahead* unless it is
    a start anew. *no_input*: its standard input is nothing. The other words are those of
    `LaunchRequest`; *home*, *here*, *umask*, *environment* and *server* tell of who asks, as
    `Caller` has it."""

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
    act: str = START
    ahead: Ahead | None = None
    no_input: bool = False

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
        _require(self.act in ACTS, "that is nothing to do about a wish")
        _require((self.ahead is None) == (self.act == START), "ahead is missing, or too much")
        _require(0 <= self.umask <= 0o777, "umask is none")
        _require(set(self.logged) <= {"stdout", "stderr"}, "logged has other words")
        _require(self.labels.kind == "kernel" and not self.labels.nursery, "it is no kernel")
        for label in (self.labels.kernel_id, self.labels.name, self.labels.notebook):
            _require(len(label) <= _MOST_LABEL, "a label is too long")

    def _check_spec(self) -> None:
        spec = self.spec
        in_namespaces = spec.confinement is Confinement.NAMESPACES
        _offered(in_namespaces, "has kernels in namespaces alone", 'confinement = "namespaces"')
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
            good = _have_names(variables) and "\0" not in "".join(variables.values())
            _require(good, "a variable has a name or a value that none can have")
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
    root = (spec.rootfs,) if spec.rootfs.startswith("/") else ()
    return (*workdir, *(volume.source for volume in spec.volumes), *root)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked of a kernel that runs, or, to "list" them, of all; or of what one has left that
    is reviewed (`REVIEWS`), or installed (`LAYERS`, one of them by its *name*); or, by a hub, of a
    person's server (`SERVERS`). *init* is the pid and the start time of its PID 1, by which `find`
    knows whether it is still the same. *text* is what to "say" to the person at the notebook."""

    ask: str
    sandbox_id: str = ""
    signal: int = 0
    busy: bool = False
    init: tuple[int, int] = field(default=(0, 0))
    name: str = ""
    text: str = ""

    def __post_init__(self) -> None:
        _require(len(self.name) <= _MOST_LABEL, "name is none")
        _require(len(self.text) <= MOST_SAID, "text is too long")
        if self.ask not in _OF_ALL:
            check_id(self.sandbox_id)
        _require(self.ask in QUESTIONS, "that is no question")
        _require(0 <= self.signal <= _MOST_SIGNAL, "there is no such signal")


# Of changes that somebody has to decide about: which there are; of one, what it is about, what was
# written, and its lock, as descriptors; that nothing is left of it; that nobody wants it.
REVIEWS = ("reviews", "review-about", "review-upper", "review-take", "settle", "discard")
# Of what is kept for a user's next kernels: which there are; that one, by its name, shall go.
LAYERS = ("layers", "layer-reset")
# Of a server: that its hub has written down where it is; for the socket by which it asks that hub.
SERVERS = (
    "server-find", "server-keep", "server-listen", "server-look", "server-signal", "server-kill",
    "server-close",
)  # fmt: skip
QUESTIONS = (
    "ready", "look", "signal", "kill", "note", "say", "find", "listen", "stop", "close", "list",
    "forget", *REVIEWS, *LAYERS, *SERVERS,
)  # fmt: skip
_OF_ALL = {"list", "reviews", *LAYERS}


def check_id(sandbox_id: str) -> None:
    """BadValue for what no sandbox is called: it becomes a name of folders and groups."""
    _require(bool(_ID.fullmatch(sandbox_id)), "sandbox_id is none")


Asked = Wish | ServerWish | Question


def read(message: dict[str, Any]) -> Asked:
    """What *message* asks for; BadValue or SpecError for what cannot be meant."""
    if message.keys() == {"start"}:
        return of_json(Wish, message["start"], "start")
    if message.keys() == {"server-start"}:
        wish = of_json(ServerWish, message["server-start"], "server-start")
        wish.check_offered()
        return wish
    return of_json(Question, message, "question")


def written(asked: Asked) -> dict[str, Any]:
    """The message that asks for it."""
    told: dict[str, Any] = as_json(asked, whole=False)
    if isinstance(asked, ServerWish):
        return {"server-start": told}
    return {"start": told} if isinstance(asked, Wish) else told


def _have_names(variables: Mapping[str, str]) -> bool:
    """Whether all are called what variables can be. All are looked at in one: a server has some
    hundred."""
    return "" not in variables and not {"=", "\0"} & set("".join(variables))


def _require(good: bool, answer: str) -> None:
    if not good:
        raise BadValue(answer)


def _offered(good: bool, answer: str, instead: str) -> None:
    """What somebody has set by an option: SpecError, with what to set *instead*."""
    if not good:
        raise SpecError(
            attempt="start a kernel through the sandbox broker",
            answer=f"it {answer}",
            remedy=f'Set {instead}, or launcher = "local".',
        )
