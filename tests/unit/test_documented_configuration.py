"""Every piece of configuration in the documents, by the classes of the programs that read it."""

from __future__ import annotations

import asyncio
import configparser
import importlib
import os
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from traitlets import TraitError
from traitlets.config import Config, Configurable

from sandbox_provisioner.facilities.volumes.wish import WRITABLE, as_texts, filled_in
from sandbox_provisioner.hub import trusted_code
from sandbox_provisioner.policy.narrow import covers_volume
from sandbox_provisioner.policy.read import parse_policy
from sandbox_provisioner.spec import Volume
from tests.readme import README

# tests/grade grades by what nbgrader.md says; nbgrader imports setuptools, which wants
# to come before whatever has imported distutils.
DOCUMENTS = [
    README,
    *(path for path in sorted(README.parent.glob("docs/*.md")) if path.name != "nbgrader.md"),
]
# Where the class of a section `c.NAME` is.
CLASSES = {
    "Authenticator": "jupyterhub.auth",
    "DockerSpawner": "dockerspawner",
    "JupyterHub": "jupyterhub.app",
    "KernelProvisionerFactory": "jupyter_client.provisioning.factory",
    "KubeSpawner": "kubespawner",
    "LabApp": "jupyterlab.labapp",
    "LanguageServerManager": "jupyter_lsp",
    "LocalAuthenticator": "jupyterhub.auth",
    "SandboxProvisioner": "sandbox_provisioner",
    "SandboxSpawner": "sandbox_provisioner.hub.spawner",
    "SandboxTerminalManager": "sandbox_provisioner.hub.terminals",
    "ServerApp": "jupyter_server.serverapp",
    "Spawner": "jupyterhub.spawner",
    "SystemdSpawner": "systemdspawner",
    "TerminalsExtensionApp": "jupyter_server_terminals",
}


def class_named(name: str) -> type[Configurable]:
    """One that is not installed is skipped, and CI takes no such skip."""
    assert name in CLASSES, f"no class is known whose options are c.{name}"
    module = pytest.importorskip(CLASSES[name], reason=f"{CLASSES[name]} is not installed")
    found = getattr(module, name)
    assert issubclass(found, Configurable)
    return found


FILTER = Path("/usr/share/containers/seccomp.json")


@pytest.fixture(autouse=True)
def programs_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """What configurations import or read, and is on a hub's machine alone."""
    stand_ins = {"tljh": {"user": None}, "tljh.normalize": {"generate_system_username": None}}
    for name, names in stand_ins.items():
        module = ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)
    # It is for the process that reads the configuration.
    monkeypatch.setattr(trusted_code, "run_trusted_code_only", lambda c: None)
    read = Path.read_text

    def read_text(path: Path, *args: Any, **kwargs: Any) -> str:
        return "{}" if path == FILTER else read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", read_text)


def blocks_of(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def _configurations() -> Iterator[Any]:
    """Those that set something: ``c.Class.option = …``."""
    for document in DOCUMENTS:
        for place, text in enumerate(blocks_of(document.read_text())):
            if re.search(r"^c\.\w+\.\w+ = ", text, re.M):
                yield pytest.param(text, id=f"{document.name}-{place}")


CONFIGURATIONS = list(_configurations())


def executed(text: str) -> Config:
    config = Config()
    exec(compile(text, "configuration", "exec"), {"c": config, "get_config": lambda: config})
    return config


def check(section: str, option: str, value: Any) -> None:
    """AssertionError or TraitError unless the class of *section* takes *value* for *option*."""
    owner = class_named(section)
    traits = owner.class_traits(config=True)
    assert option in traits, f"{section} has no option {option}"
    # Made without __init__, which may want a hub or a cluster.
    traits[option]._validate(owner.__new__(owner), value)


def options_of(config: Config) -> list[tuple[str, str, Any]]:
    return [
        (section, option, value)
        for section, options in config.items()
        for option, value in options.items()
    ]


@pytest.mark.parametrize("text", CONFIGURATIONS)
def test_each_option_is_one_of_its_class_and_takes_that_value(text: str) -> None:
    found = options_of(executed(text))
    assert found
    for section, _, _ in found:
        class_named(section)
    for section, option, value in found:
        check(section, option, value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("c.Spawner.mem_limits = '1G'", "Spawner has no option mem_limits"),
        ("c.Spawner.start_timeout = 'soon'", "expected an int, not the str 'soon'"),
        ("c.Hub.port = 1", r"no class is known whose options are c\.Hub"),
        ("c.JupyterHub.spawner_class = 'dock'", "dock"),
    ],
)
def test_an_option_or_a_value_that_there_is_not_fails(text: str, told: str) -> None:
    with pytest.raises((AssertionError, TraitError), match=told):
        check(*options_of(executed(text))[0])


def section_named(title: str) -> str:
    """The text of a section of docs/jupyterhub.md."""
    page = README.parent.joinpath("docs", "jupyterhub.md").read_text()
    return page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def section_of(title: str) -> Config:
    """All configuration of it in one."""
    config = Config()
    for text in blocks_of(section_named(title)):
        config.merge(executed(text))
    return config


UNPRIVILEGED = "A hub that is not root"


def block_in(language: str) -> str:
    """The one of that language in the section of a hub that is not root."""
    [text] = re.findall(rf"```{language}\n(.*?)```", section_named(UNPRIVILEGED), re.DOTALL)
    return str(text)


def test_the_policy_for_a_hub_that_is_not_root_gives_the_volumes_of_its_configuration() -> None:
    accounts = {"jupyterhub": 990}.get
    groups = {"jupyter-users"}.__contains__
    text = block_in("toml").encode()
    hub = parse_policy(text, "sandbox.toml", is_group=groups, uid_of=accounts).hub
    assert hub
    assert hub.account == "jupyterhub"
    spawner = section_of(UNPRIVILEGED).SandboxSpawner
    wished = [*as_texts(spawner.volumes, WRITABLE), *as_texts(spawner.read_only_volumes)]
    assert len(wished) == 2
    for text in wished:
        volume = Volume.parse(filled_in(text, "alice"))
        assert any(covers_volume(wide, volume) for wide in hub.volumes_for("alice")), text


def test_the_unit_of_a_hub_that_is_not_root_runs_it_as_the_account_of_the_policy() -> None:
    unit = configparser.ConfigParser(strict=True, interpolation=None)
    unit.optionxform = str  # type: ignore[method-assign, assignment]
    unit.read_string(block_in("ini"))
    service = unit["Service"]
    assert service["User"] == tomllib.loads(block_in("toml"))["hub"]["account"]
    assert service["CapabilityBoundingSet"] == ""
    assert service["NoNewPrivileges"] == "yes"
    program, _, config = service["ExecStart"].split()
    assert os.path.dirname(program) in service["Environment"].partition("=")[2].split(":")
    assert f"`{config}`" in section_named(UNPRIVILEGED)
    [command] = section_of(UNPRIVILEGED).Spawner.cmd
    assert os.path.dirname(command) == os.path.dirname(program)
    # What the hub asks is a socket, and what it serves are ports.
    assert {"AF_UNIX", "AF_INET"} <= set(service["RestrictAddressFamilies"].split())


def test_the_pod_that_kubernetes_is_asked_for_has_what_a_sandbox_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spawners = pytest.importorskip("kubespawner", reason="kubespawner is not installed")
    client = importlib.import_module("kubernetes_asyncio.client")
    # Of a cluster.
    monkeypatch.setattr("kubespawner.spawner.load_config", lambda **_: None)
    config = section_of("Docker and Kubernetes")
    config.JupyterHub.spawner_class = spawners.KubeSpawner

    async def asked_for() -> Any:
        spawner = spawners.KubeSpawner(config=config, _mock=True)
        async with client.ApiClient() as api:
            return api.sanitize_for_serialization(await spawner.get_pod_manifest())["spec"]

    pod = asyncio.run(asked_for())
    assert pod["hostUsers"] is False
    [container] = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "procMount": "Unmasked",
        "seccompProfile": {"type": "Unconfined"},
        "appArmorProfile": {"type": "Unconfined"},
    }


def test_the_container_that_docker_is_asked_for_has_what_a_sandbox_needs() -> None:
    spawners = pytest.importorskip("dockerspawner", reason="dockerspawner is not installed")
    engine = importlib.import_module("docker")

    class Asking(spawners.DockerSpawner):  # type: ignore[misc, name-defined]
        client = engine.APIClient(base_url="http://127.0.0.1:1", version="1.41")

        async def docker(self, method: str, name: str, **asked: Any) -> Any:
            return self.client.create_container_config(**asked)

        async def get_command(self) -> list[str]:
            return []

        def get_env(self) -> dict[str, str]:
            return {}

    page = README.parent.joinpath("docs", "jupyterhub.md").read_text()
    [text] = [text for text in blocks_of(page) if "MaskedPaths" in text]
    spawner = Asking(config=executed(text), user=SimpleNamespace(name="ann", escaped_name="ann"))
    asked = asyncio.run(spawner.create_object())["HostConfig"]
    assert asked["MaskedPaths"] == asked["ReadonlyPaths"] == []
    assert asked["SecurityOpt"] == ["seccomp={}", "apparmor=unconfined"]
