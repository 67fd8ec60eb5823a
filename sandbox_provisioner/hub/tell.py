"""hub/tell.py - pure: what a hub user's server lets run without a box, as rows of doctor.

`app/hub_server.py` finds out, from the configuration of root's, and from what the server's process
was started with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sandbox_provisioner.checks import Check, State
from sandbox_provisioner.errors import COMMAND, joined

SPECS = "sandbox_provisioner.hub.kernelspecs.SandboxKernelSpecManager"
TERMINALS = "sandbox_provisioner.hub.terminals.SandboxTerminalManager"
CONTENTS = "sandbox_provisioner.contents.SandboxContentsManager"
PROVISIONER = "sandbox-provisioner"
_WHERE = "In a jupyter_server_config.py of root's, such as /etc/jupyter/jupyter_server_config.py:"
_SPAWNER = "In jupyterhub_config.py:"


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFindings:
    """What was found out of a server. *settings* by class and trait, as the *files* of root's and
    its command line say; *default_provisioner* is its environment's; *user_config* and *user_site*
    whether it reads what the user has written for it; *changeable* what of its environment the user
    may change, "" if nothing; *installed* the packages that matter; *missing* caps with reasons."""

    who: str
    settings: Mapping[tuple[str, str], Any]
    files: tuple[str, ...]
    default_provisioner: str = ""
    user_config: bool = False
    user_site: bool = False
    changeable: str = ""
    installed: frozenset[str] = frozenset()
    missing: Mapping[str, str] = field(default_factory=dict)

    def setting(self, owner: str, name: str) -> Any:
        """The value of c.*owner*.*name*, None where nothing says."""
        return self.settings.get((owner, name))


def examine_hub(found: HubFindings) -> list[Check]:
    """Every way around, in the order in which a user would try them."""
    files = joined(found.files) or "no configuration of root's alone"
    return [
        Check(facility="server", state=State.OK, found=f"{found.who}; by {files}"),
        _kernel_specs(found),
        _default_provisioner(found),
        _terminals(found),
        *_language_servers(found),
        *_extension_manager(found),
        _user_config(found),
        _user_site(found),
        _environment(found),
        _contents(found),
        _groups(found),
        _memory(found),
    ]


def _set(where: str, *lines: str) -> str:
    return "\n".join((where, *(f"{COMMAND}{line}" for line in lines)))


def _kernel_specs(found: HubFindings) -> Check:
    facility = "kernelspecs"
    value = found.setting("ServerApp", "kernel_spec_manager_class")
    if value == SPECS:
        return Check(facility=facility, state=State.OK, found="each starts in a box")
    return Check(
        facility=facility,
        state=State.MISSING,
        found=f"kernel_spec_manager_class is {value or 'not set'}",
        effect="A kernelspec that names another provisioner starts without a box, and one that "
        "the user has written says what its box is.",
        remedy=_set(_WHERE, f'c.ServerApp.kernel_spec_manager_class = "{SPECS}"'),
    )


def _default_provisioner(found: HubFindings) -> Check:
    facility = "default provisioner"
    value = found.setting("KernelProvisionerFactory", "default_provisioner_name")
    value = value or found.default_provisioner
    if value == PROVISIONER:
        return Check(facility=facility, state=State.OK, found=PROVISIONER)
    return Check(
        facility=facility,
        state=State.MISSING,
        found=value or "not set",
        effect="What starts kernels by other ways than the server's (nbconvert, voila) uses no "
        "box.",
        remedy=_set(
            _SPAWNER,
            f'c.Spawner.environment = {{"JUPYTER_DEFAULT_PROVISIONER_NAME": "{PROVISIONER}"}}',
        ),
    )


def _terminals(found: HubFindings) -> Check:
    facility = "terminals"
    if found.setting("ServerApp", "terminals_enabled") in {False, "False", "false"}:
        return Check(facility=facility, state=State.OK, found="off")
    if found.setting("TerminalsExtensionApp", "terminal_manager_class") == TERMINALS:
        return Check(facility=facility, state=State.OK, found="each opens in a box")
    said = "open without a box"
    if found.setting("ServerApp", "terminado_settings"):
        said = "a request may name another command than that of terminado_settings"
    return Check(
        facility=facility,
        state=State.MISSING,
        found=said,
        effect="Who opens a terminal has all rights of the user, and the server's token.",
        remedy=_set(
            _WHERE,
            f'c.TerminalsExtensionApp.terminal_manager_class = "{TERMINALS}"',
            "or: c.ServerApp.terminals_enabled = False",
        ),
    )


def _language_servers(found: HubFindings) -> Iterator[Check]:
    facility = "language servers"
    if "jupyter_lsp" not in found.installed:
        return
    if found.setting("LanguageServerManager", "autodetect") in {False, "False", "false"}:
        named = found.setting("LanguageServerManager", "language_servers") or {}
        told = f"those that are named: {joined(sorted(named))}" if named else "none is looked for"
        yield Check(facility=facility, state=State.OK, found=told)
        return
    yield Check(
        facility=facility,
        state=State.MISSING,
        found="looked for in node_modules of directories that kernels write to",
        effect="What is found there runs without a box, with the server's token.",
        remedy=_set(_WHERE, "c.LanguageServerManager.autodetect = False"),
    )


def _extension_manager(found: HubFindings) -> Iterator[Check]:
    facility = "extension manager"
    if "jupyterlab" not in found.installed:
        return
    if found.setting("LabApp", "extension_manager") == "readonly":
        yield Check(facility=facility, state=State.OK, found="read-only")
        return
    yield Check(
        facility=facility,
        state=State.MISSING,
        found="JupyterLab's installs packages",
        effect="pip runs what a package brings, outside of any box; where the user may not write "
        "to the environment it installs into the user's own site.",
        remedy=_set(
            "In a jupyter_lab_config.py of root's, such as /etc/jupyter/jupyter_lab_config.py:",
            'c.LabApp.extension_manager = "readonly"',
        ),
    )


def _user_config(found: HubFindings) -> Check:
    facility = "the user's configuration"
    if not found.user_config:
        return Check(facility=facility, state=State.OK, found="not read")
    return Check(
        facility=facility,
        state=State.MISSING,
        found="~/.jupyter is read",
        effect="It is a program, and sets all of this as the user likes.",
        remedy=_set(_SPAWNER, "c.Spawner.disable_user_config = True"),
    )


def _user_site(found: HubFindings) -> Check:
    facility = "the user's site"
    if not found.user_site:
        return Check(facility=facility, state=State.OK, found="off")
    return Check(
        facility=facility,
        state=State.MISSING,
        found="~/.local/lib/python is imported from",
        effect="A usercustomize, or a package there, runs in the server.",
        remedy=_set(_SPAWNER, 'c.Spawner.environment = {"PYTHONNOUSERSITE": "1"}'),
    )


def _environment(found: HubFindings) -> Check:
    facility = "the server's environment"
    if not found.changeable:
        return Check(facility=facility, state=State.OK, found="the user may not change it")
    return Check(
        facility=facility,
        state=State.MISSING,
        found=f"the user may change {found.changeable}",
        effect="Who changes the server's own programs needs no way around.",
        remedy="Start servers from an environment of root's.",
    )


def _contents(found: HubFindings) -> Check:
    facility = "saved files"
    if found.setting("ServerApp", "contents_manager_class") == CONTENTS:
        return Check(facility=facility, state=State.OK, found="no planted link is followed")
    return Check(
        facility=facility,
        state=State.NOTE,
        found="a link that a kernel has planted is followed when the server saves",
        effect="A kernel can have the server write to other files of the user's: ~/.bashrc.",
        remedy=f"{COMMAND}sudo jupyter sandbox install --server --prefix=/usr/local",
    )


def _groups(found: HubFindings) -> Check:
    facility = "control groups"
    if not found.missing:
        return Check(facility=facility, state=State.OK, found="every cap can be had")
    return Check(
        facility=facility,
        state=State.MISSING,
        found="; ".join(f"no {name} cap: {why}" for name, why in found.missing.items()),
        effect="Kernels whose caps were asked for do not start, others have none.",
        remedy="A hub's servers are outside of login sessions. Let the spawner start each of them "
        "in groups that are its own: a service with Delegate=yes (SystemdSpawner), or our spawner. "
        "With cgroup v1 to make groups is not enough: the server has to be started in them, in "
        "each hierarchy (docs/jupyterhub.md has that spawner).",
    )


def _memory(found: HubFindings) -> Check:
    facility = "memory of a kernel"
    value = found.setting("SandboxProvisioner", "mem_limit")
    if value:
        return Check(facility=facility, state=State.OK, found=f"mem_limit = {value}")
    return Check(
        facility=facility,
        state=State.NOTE,
        found="mem_limit is not set",
        effect="Each kernel of each user may take half of the machine, and none where no cap can "
        "be had refuses to start.",
        remedy=_set(_WHERE, 'c.SandboxProvisioner.mem_limit = "2G"'),
    )
