"""app/hub_server.py - a command of its own, root's: `doctor --hub` looks at a hub user's server.

It reads what the server's process was started with, and, in a child that is at the server's place
(`elsewhere.py`), the configuration that the server reads, if root alone can have written it: what a
user has written is a program, and is not run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sandbox_provisioner.app.command import SandboxCommand
from sandbox_provisioner.app.shell import is_administrators
from sandbox_provisioner.errors import COMMAND, HostError, SpecError
from sandbox_provisioner.host import HostFacts
from sandbox_provisioner.hub.tell import HubFindings
from sandbox_provisioner.hub.trusted_code import is_trusted_code_only
from sandbox_provisioner.options import BROKER_SOCKET
from sandbox_provisioner.provisioner import user_name
from sandbox_provisioner.records import SERVER, Record, all_records, open_init
from sandbox_provisioner.trust import Writer, changeable

_SERVER = re.compile(
    r"jupyterhub-singleuser|jupyterhub\.singleuser|jupyter[-_]?(lab|server|notebook)"
)
_LONGEST = 1 << 20
_PACKAGES = ("jupyter_lsp", "jupyterlab")
_CONFIGS = ("jupyter_server_config", "jupyter_lab_config")


@dataclass(frozen=True, slots=True)
class Started:
    """What a server was started with: *words*, and the *variables* of its environment. *pid* is 0
    for one that would be started as we are."""

    pid: int = 0
    words: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    @classmethod
    def of(cls, pid: int) -> Started:
        """Look at process *pid*; HostError where we may not."""
        words = tuple(filter(None, _strings(pid, "cmdline")))
        pairs = (text.partition("=") for text in _strings(pid, "environ"))
        return cls(pid, words, {name: value for name, _, value in pairs})

    @property
    def prefix(self) -> str:
        """Of its Python."""
        program = self.words[0] if self.words else sys.executable
        is_python = "python" in os.path.basename(program) and program.startswith("/")
        return os.path.dirname(os.path.dirname(program)) if is_python else sys.prefix

    def reads_user_config(self) -> bool:
        """Unless the hub has said that it shall not."""
        said = self.variables.get("JUPYTERHUB_DISABLE_USER_CONFIG", "")
        return said.lower() not in {"1", "true", "yes"} and not any(
            re.fullmatch(r"--disable-user-config|--\w+\.disable_user_config=[Tt]rue", word)
            for word in self.words
        )

    def has_user_site(self) -> bool:
        """Whether its Python imports from there: site.py."""
        if self.variables.get("PYTHONNOUSERSITE"):
            return False
        for word in self.words[1:]:
            if not re.fullmatch(r"-[A-Za-z]+", word) or word in {"-m", "-c"}:
                break
            if "s" in word or "I" in word:
                return False
        try:
            text = Path(self.prefix, "pyvenv.cfg").read_text(errors="replace")
        except OSError:
            return True  # no virtual environment
        return bool(re.search(r"(?im)^include-system-site-packages\s*=\s*true", text))

    def settings(self) -> Iterator[tuple[tuple[str, str], Any]]:
        """Those of its command line."""
        for word in self.words:
            if match := re.fullmatch(r"--(\w+)\.(\w+)=(.*)", word, re.DOTALL):
                yield (match[1], match[2]), match[3]


def _strings(pid: int, name: str) -> list[str]:
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            return os.fsdecode(file.read(_LONGEST)).split("\0")
    except FileNotFoundError:
        raise SpecError(
            attempt=f"look at process {pid}",
            answer="there is no such process",
            remedy=("Take the number of the Jupyter server:", f"{COMMAND}pgrep -af jupyter"),
        ) from None
    except OSError as error:
        raise HostError(
            attempt=f"look at process {pid}",
            answer=error.strerror or str(error),
            remedy=("As administrator:", f"{COMMAND}sudo jupyter sandbox doctor --hub --pid {pid}"),
        ) from None


def server_of(name: str) -> int:
    """The pid of the Jupyter server of the user *name*; SpecError where there is none."""
    try:
        uid = pwd.getpwnam(name).pw_uid
    except KeyError:
        raise SpecError(
            attempt=f"find the server of {name!r}",
            answer="this machine has no such user",
            remedy="Write the name that getent passwd has.",
        ) from None
    for pid in sorted(int(entry) for entry in os.listdir("/proc") if entry.isdecimal()):
        with contextlib.suppress(OSError, SpecError, HostError):
            is_theirs = os.stat(f"/proc/{pid}").st_uid == uid
            if is_theirs and _SERVER.search(" ".join(Started.of(pid).words[:4])):
                return pid
    raise SpecError(
        attempt=f"find the server of {name!r}",
        answer="no process of this user is a Jupyter server",
        remedy="Start it, or write the number of its process: --pid.",
    )


def box_of(name: str, runtime: Path) -> Record | None:
    """The record of the box in which the whole server of the user *name* runs, by our spawner."""
    for _, record in all_records(runtime):
        is_theirs = (record.kind, record.user) == (SERVER, name)
        if is_theirs and (pidfd := open_init(record)) is not None:
            os.close(pidfd)
            return record
    return None


def look_at_server(started: Started) -> HubFindings:
    """Find out all; called where the server is (`elsewhere.Place`)."""
    settings, files = _configured()
    prefix = started.prefix
    places = (f"{prefix}/bin", f"{prefix}/lib")
    writer = Writer.this_process()
    found = f"process {started.pid}" if started.pid else "one that is started as this command"
    return HubFindings(
        who=f"{found}, of {user_name()}",
        settings=settings | dict(started.settings()),
        files=tuple(files),
        default_provisioner=started.variables.get("JUPYTER_DEFAULT_PROVISIONER_NAME", ""),
        user_config=started.reads_user_config(),
        user_site=started.has_user_site(),
        trusted_code_only=is_trusted_code_only(),
        changeable=next(filter(None, (changeable(place, writer) for place in places)), ""),
        installed=frozenset(name for name in _PACKAGES if importlib.util.find_spec(name)),
        missing=HostFacts.probe().cgroups.missing,
        broker=os.path.exists(settings.get(("SandboxProvisioner", "broker_socket"), BROKER_SOCKET)),
    )


class _Configuration(SandboxCommand):
    """Reads configuration of root's alone."""

    @property
    def config_file_paths(self) -> list[str]:
        return [path for path in super().config_file_paths if is_administrators(path)]


def _configured() -> tuple[dict[tuple[str, str], Any], Sequence[str]]:
    settings: dict[tuple[str, str], Any] = {}
    files: dict[str, None] = {}
    for name in _CONFIGS:
        app = _Configuration(config_file_name=name)
        app.load_config_file(suppress_errors=False)
        files |= dict.fromkeys(app.loaded_config_files)
        for owner, section in app.config.items():
            for trait, value in section.items():
                settings[owner, trait] = _plain(value)
    return settings, tuple(files)


def _plain(value: Any) -> Any:
    """A class by its name, as files may have it either way."""
    return f"{value.__module__}.{value.__qualname__}" if isinstance(value, type) else value
