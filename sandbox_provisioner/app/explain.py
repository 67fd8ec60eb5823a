"""app/explain.py - a command of its own: `jupyter sandbox explain` shows a start, not run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from jupyter_client.kernelspec import KernelSpec
from traitlets import Unicode
from traitlets.config import Config

from sandbox_provisioner.app.command import (
    COMMON_ALIASES,
    OPTION_ALIASES,
    OPTIONS,
    SandboxCommand,
    find_kernel,
    provisioner_name_of,
    stanza_of,
    working_directory,
)
from sandbox_provisioner.app.tables import table
from sandbox_provisioner.confinement import confiner
from sandbox_provisioner.errors import COMMAND, SpecError
from sandbox_provisioner.facilities.caps.tell import memory_words
from sandbox_provisioner.facilities.storage.facts import find_storage
from sandbox_provisioner.facilities.storage.tell import disk_words
from sandbox_provisioner.host import HostFacts
from sandbox_provisioner.inside.printable import one_line
from sandbox_provisioner.options import AUTO, PROVISIONER, every_option
from sandbox_provisioner.plan import LaunchRequest, start_directory
from sandbox_provisioner.provisioner import SandboxProvisioner
from sandbox_provisioner.unboxed import inner_command

_CONNECTION_FILE = "kernel-example.json"
_SHOWN_WIDTH = 60
_WARM = (
    "where a nursery or a spare is ready, it has done the steps that are the same for every kernel,"
    "\nand the rest is done by a fork of it, or when the spare is bound. The box is the one below."
)
_AUTO = (
    "A server makes a nursery after its first kernel is ready, another process after its second;"
    "\nit belongs to that process, and ends with it."
)


_ALIASES = {"cwd": "ExplainApp.cwd", **OPTION_ALIASES, **COMMON_ALIASES}


class ExplainApp(SandboxCommand):
    """Compiles the plan that a start would perform, and prints it."""

    usage = "jupyter sandbox explain KERNEL [--cwd DIR] [options]"
    description = (
        "Show, step by step and with the reasons, what starting a sandboxed kernel would do, and "
        "which options are in force and where each comes from. Nothing is started. Options on "
        "this command line stand in for those of a configuration file, so that one can try them; "
        'with workdir = "root", DIR is taken for the server\'s root directory.'
    )
    examples = """
    jupyter sandbox explain python3-sandbox
    jupyter sandbox explain python3-sandbox --cwd /srv/course/alice
    jupyter sandbox explain python3-sandbox --volume /data:/data | grep -A1 /data
    jupyter sandbox explain python3-sandbox --config /etc/jupyter/jupyter_lab_config.py
    """
    cwd = Unicode("", help="The directory that the notebook is in. Default: this one.").tag(
        config=True
    )
    aliases = _ALIASES

    def start(self) -> None:
        """Called once by `main`."""
        if len(self.extra_args) != 1:
            raise self.wrong("write the name of one kernel")
        name = self.extra_args[0]
        kernel = find_kernel(self.kernels(), name)
        if provisioner_name_of(kernel.metadata) != PROVISIONER:
            raise SpecError(
                attempt=f"explain the sandbox of the kernel {name!r}",
                answer="it does not run in one",
                remedy=(
                    "Make a twin that does:",
                    f"{COMMAND}jupyter sandbox install --kernel {name}",
                ),
            )
        cwd = os.path.abspath(self.cwd or working_directory())
        provisioner = self.provisioner(kernel)
        options = tuple(self._options(provisioner))
        if provisioner.workdir == "root":
            provisioner.workdir = cwd
        request = request_for(provisioner, kernel, cwd)
        plan = provisioner.starter.explain(request)
        title = f"{kernel.display_name} ({kernel.resource_dir}), started in {cwd}"
        print(f"{one_line(title)}\n")
        print(table([("option", "value", "from"), *options], widest=(20, _SHOWN_WIDTH, 60)))
        limits, host = provisioner.spec_for(cwd).limits, HostFacts.probe()
        print(f"\n{memory_words(limits, host)}")
        kernel_version = host.machine.kernel
        storage = find_storage(limits, privileged=host.privileged, kernel=kernel_version)
        if words := disk_words(storage, limits):
            print(words)
        if lost := confiner(provisioner.confinement).losses(HostFacts.probe()):
            clauses = "\n".join(f"  - {text}" for text in lost)
            name = provisioner.confinement
            print(f'\nconfinement = "{name}" is weaker than namespaces:\n{clauses}')
        if provisioner.warm:
            print(f"\n{_warmth(provisioner, request)}")
        print(f"\n{plan.describe()}")

    def _options(self, provisioner: SandboxProvisioner) -> Iterator[tuple[str, str, str]]:
        """Every option with its value and origin; kernel.json wins over configuration."""
        stanza = stanza_of(provisioner.kernel_spec.metadata).get("config", {})
        on_command_line = self.cli_config.get(OPTIONS, Config())
        configured = self.config.get(OPTIONS, Config())
        files = ", ".join(self.loaded_config_files) or "configuration"
        for name in sorted(every_option()):
            origin = "default"
            if name in stanza:
                origin = "kernel.json"
            elif name in on_command_line:
                origin = "this command line"
            elif name in configured:
                origin = files
            yield name, _shown(getattr(provisioner, name)), origin


def _warmth(provisioner: SandboxProvisioner, request: LaunchRequest) -> str:
    """What the option warm comes to for this kernel."""
    name = "warm = auto" if provisioner.warm == AUTO else "warm = true"
    if why := provisioner.starter.why_cold(request):
        return f"{name}, but every start of this kernel is cold: {why}."
    return f"{name}: {_WARM}" + (f"\n{_AUTO}" if provisioner.warm == AUTO else "")


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        text = ", ".join(map(str, value))
    elif isinstance(value, Mapping):
        text = ", ".join(f"{key}={choice}" for key, choice in value.items())
    else:
        text = str(value)
    return text if len(text) <= 2 * _SHOWN_WIDTH else f"{text[: 2 * _SHOWN_WIDTH - 4]} ..."


def request_for(provisioner: SandboxProvisioner, kernel: KernelSpec, cwd: str) -> LaunchRequest:
    """What a server would ask a launcher for, with an example's connection file."""
    spec = provisioner.spec_for(cwd)
    meeting = provisioner.starter.meeting_place("example", spec.confinement)
    words = {
        "connection_file": meeting.connection_file(_CONNECTION_FILE),
        "resource_dir": kernel.resource_dir,
        "prefix": sys.prefix,
    }
    argv = inner_command(kernel.argv)
    for place, path in words.items():
        argv = [word.replace(f"{{{place}}}", path) for word in argv]
    return LaunchRequest(
        sandbox_id="example",
        spec=spec,
        argv=tuple(argv),
        environment={**os.environ, **kernel.env},
        env_keep=tuple(provisioner.env_keep),
        cwd=start_directory(cwd, spec),
        connection_file=(_CONNECTION_FILE, ""),
        survive_server=provisioner.survive_server,
    )
