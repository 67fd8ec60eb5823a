"""hub/tell.py - pure: what a hub user's server lets run without a box, as rows of doctor.

`app/hub_server.py` finds out, from the configuration of root's, and from what the server's process
was started with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sandbox_provisioner.checks import Check, State
from sandbox_provisioner.errors import COMMAND, SandboxError, joined

SPECS = "sandbox_provisioner.hub.kernelspecs.SandboxKernelSpecManager"
TERMINALS = "sandbox_provisioner.hub.terminals.SandboxTerminalManager"
CONTENTS = "sandbox_provisioner.contents.SandboxContentsManager"
PROVISIONER = "sandbox-provisioner"
_WHERE = "In a jupyter_server_config.py of root's, such as /etc/jupyter/jupyter_server_config.py:"
_SPAWNER = "In jupyterhub_config.py:"
_OFF = (False, "False", "false")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFindings:
    """What was found out of a server. *settings* by class and trait, as the *files* of root's and
    its command line say; *default_provisioner* is its environment's; *user_config* and *user_site*
    whether it reads what the user has written for it; *changeable* what of its environment the user
    may change, "" if nothing; *trusted_code_only* whether extensions run nothing that the user may
    change; *installed* the packages that matter; *missing* caps with reasons;
    *broker* whether there is one."""

    who: str
    settings: Mapping[tuple[str, str], Any]
    files: tuple[str, ...]
    default_provisioner: str = ""
    user_config: bool = False
    user_site: bool = False
    changeable: str = ""
    trusted_code_only: bool = False
    installed: frozenset[str] = frozenset()
    missing: Mapping[str, str] = field(default_factory=dict)
    broker: bool = False

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
        _extensions(found),
        _environment(found),
        _contents(found),
        _groups(found),
        _memory(found),
    ]


def examine_box(sandbox_id: str, init_pid: int, user: str) -> list[Check]:
    """Of a server that our spawner has started: there is no way around, but a wall less."""
    return [
        Check(
            facility="server",
            state=State.OK,
            found=f"in the box {sandbox_id}, whose PID 1 is process {init_pid}; of {user}",
        ),
        Check(
            facility="all that it starts",
            state=State.OK,
            found="in that box; each kernel in one beside it, unless local-provisioner is set",
        ),
        Check(
            facility="the server's token",
            state=State.NOTE,
            found="terminals and extensions are in its box",
            effect="They can read it, and do at the hub what the server may.",
        ),
    ]


def examine_account(account: str, obstacle: SandboxError | None) -> list[Check]:
    """Of a hub that runs as *account*, by what the broker says to that: *obstacle* is why it starts
    no servers for it."""
    if obstacle:
        return [_no_hub(account, obstacle, State.MISSING)]
    return [
        _row("hub", f"one that runs as {account}: the broker answers, and starts its servers"),
        _row("servers", "each is in a box as a whole, with the rights of its user"),
    ]


def note_account(account: str, obstacle: SandboxError) -> Check:
    """Of whoever is perhaps meant to be a hub's account."""
    return _no_hub(account, obstacle, State.NOTE)


def _no_hub(account: str, obstacle: SandboxError, state: State) -> Check:
    return _row(
        "hub",
        "",
        found=f"{obstacle.attempt}: {obstacle.answer}",
        effect=f"A hub that runs as {account} starts no servers in boxes.",
        remedy="\n".join(obstacle.steps),
        state=state,
    )


def _row(
    facility: str,
    fine: str,
    *,
    found: str = "",
    effect: str = "",
    remedy: str = "",
    state: State = State.MISSING,
) -> Check:
    """What is *fine*, where it is; or what was *found* in place of that, with its *state*."""
    if fine:
        return Check(facility=facility, state=State.OK, found=fine)
    return Check(facility=facility, state=state, found=found, effect=effect, remedy=remedy)


def _set(where: str, *lines: str) -> str:
    return "\n".join((where, *(f"{COMMAND}{line}" for line in lines)))


def _kernel_specs(found: HubFindings) -> Check:
    value = found.setting("ServerApp", "kernel_spec_manager_class")
    return _row(
        "kernelspecs",
        "each starts in a box" if value == SPECS else "",
        found=f"kernel_spec_manager_class is {value or 'not set'}",
        effect="A kernelspec that names another provisioner starts without a box, and one that "
        "the user has written says what its box is.",
        remedy=_set(_WHERE, f'c.ServerApp.kernel_spec_manager_class = "{SPECS}"'),
    )


def _default_provisioner(found: HubFindings) -> Check:
    value = found.setting("KernelProvisionerFactory", "default_provisioner_name")
    value = value or found.default_provisioner
    return _row(
        "default provisioner",
        PROVISIONER if value == PROVISIONER else "",
        found=value or "not set",
        effect="What starts kernels by other ways than the server's (nbconvert, voila) uses no "
        "box.",
        remedy=_set(
            _SPAWNER,
            f'c.Spawner.environment = {{"JUPYTER_DEFAULT_PROVISIONER_NAME": "{PROVISIONER}"}}',
        ),
    )


def _terminals(found: HubFindings) -> Check:
    fine, said = "", "open without a box"
    if found.setting("ServerApp", "terminals_enabled") in _OFF:
        fine = "off"
    elif found.setting("TerminalsExtensionApp", "terminal_manager_class") == TERMINALS:
        fine = "each opens in a box"
    elif found.setting("ServerApp", "terminado_settings"):
        said = "a request may name another command than that of terminado_settings"
    return _row(
        "terminals",
        fine,
        found=said,
        effect="Who opens a terminal has all rights of the user, and the server's token.",
        remedy=_set(
            _WHERE,
            f'c.TerminalsExtensionApp.terminal_manager_class = "{TERMINALS}"',
            "or: c.ServerApp.terminals_enabled = False",
        ),
    )


def _language_servers(found: HubFindings) -> Iterator[Check]:
    if "jupyter_lsp" not in found.installed:
        return
    fine = ""
    if found.setting("LanguageServerManager", "autodetect") in _OFF:
        named = found.setting("LanguageServerManager", "language_servers") or {}
        fine = f"those that are named: {joined(sorted(named))}" if named else "none is looked for"
    yield _row(
        "language servers",
        fine,
        found="looked for in node_modules of directories that kernels write to",
        effect="What is found there runs without a box, with the server's token.",
        remedy=_set(_WHERE, "c.LanguageServerManager.autodetect = False"),
    )


def _extension_manager(found: HubFindings) -> Iterator[Check]:
    if "jupyterlab" not in found.installed:
        return
    yield _row(
        "extension manager",
        "read-only" if found.setting("LabApp", "extension_manager") == "readonly" else "",
        found="JupyterLab's installs packages",
        effect="pip runs what a package brings, outside of any box; where the user may not write "
        "to the environment it installs into the user's own site.",
        remedy=_set(
            "In a jupyter_lab_config.py of root's, such as /etc/jupyter/jupyter_lab_config.py:",
            'c.LabApp.extension_manager = "readonly"',
        ),
    )


def _user_config(found: HubFindings) -> Check:
    return _row(
        "the user's configuration",
        "" if found.user_config else "not read",
        found="~/.jupyter is read",
        effect="It is a program, and sets all of this as the user likes.",
        remedy=_set(_SPAWNER, "c.Spawner.disable_user_config = True"),
    )


def _user_site(found: HubFindings) -> Check:
    return _row(
        "the user's site",
        "" if found.user_site else "off",
        found="~/.local/lib/python is imported from",
        effect="A usercustomize, or a package there, runs in the server.",
        remedy=_set(_SPAWNER, 'c.Spawner.environment = {"PYTHONNOUSERSITE": "1"}'),
    )


def _extensions(found: HubFindings) -> Check:
    return _row(
        "extensions",
        "run nothing that the user may change" if found.trusted_code_only else "",
        found="may read configuration, and import, from directories of the user's",
        effect="One that is an application of its own (nbgrader) runs what it finds in "
        "~/.jupyter and where the server was started, without a box.",
        remedy=_set(
            _WHERE,
            "from sandbox_provisioner.hub.trusted_code import run_trusted_code_only",
            "run_trusted_code_only(c)",
        ),
    )


def _environment(found: HubFindings) -> Check:
    return _row(
        "the server's environment",
        "" if found.changeable else "the user may not change it",
        found=f"the user may change {found.changeable}",
        effect="Who changes the server's own programs needs no way around.",
        remedy="Start servers from an environment of root's.",
    )


def _contents(found: HubFindings) -> Check:
    is_ours = found.setting("ServerApp", "contents_manager_class") == CONTENTS
    return _row(
        "saved files",
        "no planted link is followed" if is_ours else "",
        state=State.NOTE,
        found="a link that a kernel has planted is followed when the server saves",
        effect="A kernel can have the server write to other files of the user's: ~/.bashrc.",
        remedy=f"{COMMAND}sudo jupyter sandbox install --server --prefix=/usr/local",
    )


def _groups(found: HubFindings) -> Check:
    asks = found.setting("SandboxProvisioner", "launcher") in {None, "auto", "broker"}
    without = "those of the broker" if found.broker and asks else ""
    return _row(
        "control groups",
        without if found.missing else "every cap can be had",
        found="; ".join(f"no {name} cap: {why}" for name, why in found.missing.items()),
        effect="Kernels whose caps were asked for do not start, others have none.",
        remedy="A hub's servers are outside of login sessions. Let the spawner start each of them "
        "in groups that are its own: a service with Delegate=yes (SystemdSpawner), or our spawner; "
        "or run the broker. "
        "With cgroup v1 to make groups is not enough: the server has to be started in them, in "
        "each hierarchy (docs/jupyterhub.md has that spawner).",
    )


def _memory(found: HubFindings) -> Check:
    value = found.setting("SandboxProvisioner", "mem_limit")
    return _row(
        "memory of a kernel",
        f"mem_limit = {value}" if value else "",
        state=State.NOTE,
        found="mem_limit is not set",
        effect="Each kernel of each user may take half of the machine, and none where no cap can "
        "be had refuses to start.",
        remedy=_set(_WHERE, 'c.SandboxProvisioner.mem_limit = "2G"'),
    )
