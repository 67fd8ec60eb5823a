"""What doctor says of a hub user's server, by what was found."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

from sandbox_provisioner.app.hub_server import Started
from sandbox_provisioner.checks import State
from sandbox_provisioner.errors import HostError
from sandbox_provisioner.hub.tell import (
    CONTENTS,
    SPECS,
    TERMINALS,
    HubFindings,
    examine_account,
    examine_hub,
    note_account,
)

SET = {
    ("ServerApp", "kernel_spec_manager_class"): SPECS,
    ("ServerApp", "contents_manager_class"): CONTENTS,
    ("KernelProvisionerFactory", "default_provisioner_name"): "sandbox-provisioner",
    ("TerminalsExtensionApp", "terminal_manager_class"): TERMINALS,
    ("LanguageServerManager", "autodetect"): False,
    ("LabApp", "extension_manager"): "readonly",
    ("SandboxProvisioner", "mem_limit"): "2G",
}
CLOSED = HubFindings(
    who="process 7, of alice",
    settings=SET,
    files=("/etc/jupyter/jupyter_server_config.py",),
    trusted_code_only=True,
    installed=frozenset({"jupyter_lsp", "jupyterlab"}),
)


def states(**changes: Any) -> dict[str, State]:
    found = examine_hub(dataclasses.replace(CLOSED, **changes))
    return {check.facility: check.state for check in found if check.state is not State.OK}


def test_a_server_with_all_ways_closed_has_nothing_to_tell() -> None:
    assert states() == {}


@pytest.mark.parametrize(
    ("owner", "row", "state"),
    [
        ("ServerApp.kernel_spec_manager_class", "kernelspecs", State.MISSING),
        ("ServerApp.contents_manager_class", "saved files", State.NOTE),
        (
            "KernelProvisionerFactory.default_provisioner_name",
            "default provisioner",
            State.MISSING,
        ),
        ("TerminalsExtensionApp.terminal_manager_class", "terminals", State.MISSING),
        ("LanguageServerManager.autodetect", "language servers", State.MISSING),
        ("LabApp.extension_manager", "extension manager", State.MISSING),
        ("SandboxProvisioner.mem_limit", "memory of a kernel", State.NOTE),
    ],
)
def test_each_setting_that_is_missing_or_another_one_has_its_row(owner, row, state) -> None:
    key = tuple(owner.split("."))
    without = {name: value for name, value in SET.items() if name != key}
    assert states(settings=without) == {row: state}
    other = {} if row == "memory of a kernel" else {row: state}
    assert states(settings=SET | {key: "another"}) == other


@pytest.mark.parametrize(
    ("changes", "row"),
    [
        ({"user_config": True}, "the user's configuration"),
        ({"user_site": True}, "the user's site"),
        ({"trusted_code_only": False}, "extensions"),
        ({"changeable": "/home/alice/venv/bin"}, "the server's environment"),
        ({"missing": {"memory": "not writable"}}, "control groups"),
    ],
)
def test_what_the_server_was_started_with_has_its_row(changes, row) -> None:
    assert states(**changes) == {row: State.MISSING}


def test_other_ways_to_close_one_are_known() -> None:
    off = {("TerminalsExtensionApp", "terminal_manager_class"): None}
    assert states(settings=SET | off | {("ServerApp", "terminals_enabled"): False}) == {}
    shell = {
        ("ServerApp", "terminado_settings"): {"shell_command": ["jupyter", "sandbox", "shell"]}
    }
    assert states(settings=SET | off | shell) == {"terminals": State.MISSING}
    default = {("KernelProvisionerFactory", "default_provisioner_name"): None}
    assert states(settings=SET | default, default_provisioner="sandbox-provisioner") == {}
    lone = {("LabApp", "extension_manager"): None, ("LanguageServerManager", "autodetect"): None}
    assert states(settings=SET | lone, installed=frozenset()) == {}


def test_what_a_server_was_started_with_is_read(tmp_path: Path) -> None:
    def started(*words: str, **variables: str) -> Started:
        return Started(7, words, variables)

    assert started("x").reads_user_config()
    assert not started("x", JUPYTERHUB_DISABLE_USER_CONFIG="1").reads_user_config()
    assert not started("x", "--SingleUserNotebookApp.disable_user_config=True").reads_user_config()
    python = f"{tmp_path}/bin/python3"
    assert started(python, "-m", "jupyter_server").has_user_site()
    assert not started(python, "-Ps", "-m", "jupyter_server").has_user_site()
    assert started(python, "-m", "jupyter_server", "-s").has_user_site()
    assert not started(python, PYTHONNOUSERSITE="1").has_user_site()
    (tmp_path / "pyvenv.cfg").write_text("include-system-site-packages = false\n")
    assert not started(python).has_user_site()
    (tmp_path / "pyvenv.cfg").write_text("include-system-site-packages = true\n")
    assert started(python).has_user_site()
    assert started(python).prefix == str(tmp_path)
    assert started("jupyter-lab").prefix == sys.prefix
    [setting] = started("x", "--ServerApp.terminals_enabled=False").settings()
    assert setting == (("ServerApp", "terminals_enabled"), "False")


def test_where_a_broker_is_asked_the_server_needs_no_groups_of_its_own() -> None:
    missing = {"missing": {"memory": "not writable"}}
    assert states(**missing) == {"control groups": State.MISSING}
    assert states(**missing, broker=True) == {}
    local = SET | {("SandboxProvisioner", "launcher"): "local"}
    assert states(**missing, broker=True, settings=local) == {"control groups": State.MISSING}


def test_the_account_of_a_hub_is_told_what_the_broker_says_to_it() -> None:
    assert {check.state for check in examine_account("jupyterhub", None)} == {State.OK}
    obstacle = HostError(attempt="have a server", answer="nobody is named", remedy="Name it.")
    [check] = examine_account("jupyterhub", obstacle)
    assert (check.state, check.remedy) == (State.MISSING, "Name it.")
    assert "nobody is named" in check.found and "runs as jupyterhub" in check.effect
    assert note_account("alice", obstacle).state is State.NOTE
