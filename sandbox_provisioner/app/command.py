"""app/command.py - a command of its own: what the subcommands of `jupyter sandbox` share."""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from textwrap import dedent, indent
from typing import Any

from jupyter_client.kernelspec import KernelSpec, KernelSpecManager, NoSuchKernel
from jupyter_client.provisioning.factory import KernelProvisionerFactory
from jupyter_core.application import JupyterApp
from traitlets.config import Config, Configurable
from traitlets.config.loader import KVArgParseConfigLoader

import sandbox_provisioner
from sandbox_provisioner.errors import COLUMNS, SpecError, did_you_mean, nearest
from sandbox_provisioner.host import HostFacts, WorkdirFacts
from sandbox_provisioner.options import flags
from sandbox_provisioner.provisioner import SandboxProvisioner
from sandbox_provisioner.records import runtime_directory
from sandbox_provisioner.spec import Covers

_NOBODY = 65534
OPTIONS = "SandboxProvisioner"
OPTION_ALIASES = {flag: f"{OPTIONS}.{name}" for flag, name in flags().items()}
COMMON_ALIASES = {
    "config": "JupyterApp.config_file",
    "log-level": "Application.log_level",
    "runtime-dir": f"{OPTIONS}.runtime_dir",
}


class UsageError(Exception):
    """The command line cannot be meant; `main` exits with 2."""

    def __init__(self, text: str, usage: str = "jupyter sandbox") -> None:
        self.usage = usage
        super().__init__(text)


class _StrictLoader(KVArgParseConfigLoader):
    """traitlets only warns of an option that it does not know."""

    def _parse_args(self, args: Sequence[str]) -> Any:
        for word in itertools.takewhile(lambda word: word != "--", args):
            name = re.match(r"--([A-Za-z][\w-]*)(=|$)", word)
            if name and name[1] not in {*self.aliases, *self.flags}:
                self._refuse(name[1], {*self.aliases, *self.flags})
        return super()._parse_args(args)

    def _convert_to_config(self) -> None:
        super()._convert_to_config()
        known = {cls.__name__ for cls in self.classes}
        for section in set(self.config) - known:
            self._refuse(section, known)

    def _refuse(self, name: str, known: Collection[str]) -> None:
        meant = nearest(name, known)
        hint = f"; did you mean --{meant}?" if meant else ""
        self.parser.error(f"there is no option --{name}{hint}")


_CLASSES: list[type[Configurable]] = [SandboxProvisioner]
COMMON_FLAGS: dict[str, Any] = {
    "debug": ({"Application": {"log_level": 10}}, "Log everything to stderr."),
}


class SandboxCommand(JupyterApp):
    """One command: strict about its options, and configured like the server that starts kernels.

    Options come from ``jupyter_config`` and ``jupyter_server_config`` files, or from the file that
    ``--config`` names, so that `explain`, `list` and `gc` see what a server sees.
    """

    name = "jupyter sandbox"
    usage = ""
    option_description = "Each is also a setting of configuration files, as Equivalent to tells."
    version = sandbox_provisioner.__version__
    classes = _CLASSES
    aliases = COMMON_ALIASES
    flags = COMMON_FLAGS

    def _log_level_default(self) -> int:
        return 30

    def _config_file_name_default(self) -> str:
        return "jupyter_server_config"

    def _create_loader(
        self, argv: list[str] | None, aliases: Any, flags: Any, classes: Any
    ) -> KVArgParseConfigLoader:
        return _StrictLoader(argv, aliases, flags, self.log, classes, usage=self.usage or None)

    def emit_help(self, classes: bool = False) -> Iterator[str]:  # type: ignore[override]
        """What --help prints: usage and examples come before the long list of options."""
        yield from (f"Usage: {self.usage}", "")
        yield from self.emit_description()
        yield from self.emit_subcommands_help()
        yield from ("Examples", "========", indent(dedent(self.examples).strip("\n"), "  "), "")
        yield from self.emit_options_help()
        if classes:
            yield from (cls.class_get_help() for cls in self.classes)

    def _find_subcommand(self, name: str) -> str:
        # JupyterApp would run another program for our first word: `explain lab` jupyter-lab.
        return ""

    def migrate_config(self) -> None:
        """Nothing of ours is as old as what JupyterApp would migrate here."""

    def exit(self, exit_status: int | str | None = 0) -> None:
        """traitlets says 1 only to an option with a value that it cannot read: our 2."""
        super().exit(2 if exit_status == 1 else exit_status)

    def wrong(self, text: str) -> UsageError:
        """The error for a command line that cannot be meant."""
        return UsageError(text, self.usage.partition(" [")[0])

    def refuse_words(self) -> None:
        """Called by commands that take options only."""
        if self.extra_args:
            raise self.wrong(f"there is nothing to do with {self.extra_args[0]!r}")

    def kernels(self) -> KernelSpecManager:
        """Where kernels are installed, as every Jupyter program looks for them."""
        return KernelSpecManager(parent=self)

    def provisioner(self, kernel: KernelSpec | None = None) -> SandboxProvisioner:
        """The provisioner that a server would make for *kernel*, or one without a kernel.

        Raises SpecError or TraitError for options that cannot be meant.
        """
        chosen = kernel or KernelSpec(display_name="command")
        options = stanza_of(chosen.metadata).get("config", {})
        provisioner = SandboxProvisioner(kernel_spec=chosen, config=self.config, **options)
        provisioner._refuse_unknown_keys()
        return provisioner

    def given_options(self) -> dict[str, Any]:
        """The options of a sandbox that stand on this command line, with the types of kernel.json.

        Raises TraitError for a value of a wrong type.
        """
        given = self.cli_config.get(OPTIONS, Config())
        typed = SandboxProvisioner(config=Config({OPTIONS: given}))
        typed._refuse_unknown_keys()
        return {name: getattr(typed, name) for name in given}

    def runtime(self) -> Path:
        """The records' directory; HostError where it cannot be used."""
        return runtime_directory(self.provisioner().runtime_dir)


def spoken(text: str) -> str:
    """*text* for the terminal of whoever typed the command: it says who speaks."""
    first = text.partition("\n")[0]
    speaker = "jupyter sandbox:"
    between = " " if len(speaker) + len(first) < COLUMNS else "\n"
    return speaker + between + text


def find_kernel(manager: KernelSpecManager, name: str) -> KernelSpec:
    """The installed kernel *name*; SpecError with the known names where there is none."""
    try:
        return manager.get_kernel_spec(name)
    except NoSuchKernel:
        known = sorted(manager.find_kernel_specs())
        raise SpecError(
            attempt=f"find the kernel {name!r}",
            answer="it is not installed",
            remedy=did_you_mean(name, known, f"Installed are: {', '.join(known)}."),
        ) from None


def stanza_of(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a kernel.json's metadata says about its provisioner; empty where it says nothing."""
    stanza = metadata.get("kernel_provisioner")
    return stanza if isinstance(stanza, Mapping) else {}


def provisioner_name_of(metadata: Mapping[str, Any]) -> str:
    """Who starts a kernel with *metadata* here."""
    default = KernelProvisionerFactory.instance().default_provisioner_name
    return str(stanza_of(metadata).get("provisioner_name") or default)


def working_directory() -> str:
    """Ours, by the path that the person typed where the shell tells it."""
    typed, real = os.environ.get("PWD", ""), os.getcwd()
    return typed if typed and os.path.realpath(typed) == real else real


def silent_log() -> logging.Logger:
    """For others' objects, where we say ourselves what there is to say."""
    log = logging.Logger("silent")
    log.addHandler(logging.NullHandler())
    return log


def lend(folder: Path, host: HostFacts) -> None:
    """Make a temporary *folder* of ours one that a sandbox can work in.

    What belongs to root can only be shown through an id-mapped mount, and a file system under /tmp
    that has none says nothing about where notebooks are.
    """
    with ExitStack() as opened:
        found = WorkdirFacts.probe(str(folder), host, Covers(), opened)
    if host.privileged and not found.idmappable:
        os.chown(folder, _NOBODY, _NOBODY)
