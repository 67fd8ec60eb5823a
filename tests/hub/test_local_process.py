"""A real hub whose servers are ordinary processes of their users, and what users leave for these.

ann's server is set up as docs/jupyterhub.md says; bob's by the same configuration, without what the
hub itself has to say, and without the line for extensions. Whatever of theirs runs outside of a box
leaves a mark.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import hub_user
import pytest
from facilities import packages, public_python
from hub_server import UID, Hub, marks_of_hub, serving, type_at
from jupyter_programs import REPOSITORY

pytestmark = marks_of_hub("userns", "ordinary-user")

PEOPLE = ("ann", "bob")
HUB = """
c.JupyterHub.spawner_class = "localprocess"
c.Spawner.cmd = [{python!r}, "-m", "jupyterhub.singleuser"]
c.Spawner.environment = {{
    "JUPYTERHUB_SINGLEUSER_APP": "jupyter_server.serverapp.ServerApp",
    "JUPYTER_CONFIG_PATH": "{folder}/etc:{prefix}/etc/jupyter",
    "PYTHONPATH": {path!r},
    "PYTHONDONTWRITEBYTECODE": "1",
}}

def before(spawner):
    if spawner.user.name == "ann":
        spawner.disable_user_config = True
        spawner.environment = {{**spawner.environment, "PYTHONNOUSERSITE": "1"}}

c.Spawner.pre_spawn_hook = before
"""
SERVER = """
import os
if os.environ["JUPYTERHUB_USER"] == "ann":
    from sandbox_provisioner.hub.trusted_code import run_trusted_code_only
    run_trusted_code_only(c)
c.ServerApp.jpserver_extensions = {"graders": True}
c.ServerApp.contents_manager_class = "sandbox_provisioner.contents.SandboxContentsManager"
c.LanguageServerManager.autodetect = False
c.SandboxProvisioner.warm = False
"""
# An extension of root's that is an application of its own, as nbgrader's are: it has its own
# configuration, and puts the current directory first on its import path.
GRADERS = """
import contextlib
import importlib.metadata
import os
import sys
from jupyter_core.application import JupyterApp
from nbconvert.exporters import HTMLExporter
from nbformat.v4 import new_notebook

class Graders(JupyterApp):
    name = "graders"

    def load_config_file(self, **options):
        super().load_config_file(**options)
        for folder in (os.getcwd(), os.path.expanduser("~/course")):
            super(JupyterApp, self).load_config_file(self.config_file_name, folder)

def _load_jupyter_server_extension(server):
    sys.path.insert(0, os.getcwd())
    app = Graders(parent=server)
    app.initialize([])
    for point in importlib.metadata.entry_points(group="graders"):
        open(os.path.expanduser(f"~/ran-{point.name}"), "w").close()
    with contextlib.suppress(ImportError):
        import planted_later
    with contextlib.suppress(ValueError):  # the tests' Python has no templates
        HTMLExporter(config=server.config).from_notebook_node(new_notebook())
    server.log.warning("The course is %s", app.config.Graders.course)
"""
SITE = f".local/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
# What a user may leave, by the mark that it makes where it is run. In the second half is what
# bob's server does not run either.
HELD_FOR_ANN = {
    "config": ".jupyter/jupyter_server_config.py",
    "base-config": ".jupyter/jupyter_config.py",
    "extension": f"{SITE}/planted_extension.py",
    "user-site": f"{SITE}/usercustomize.py",
    "local-etc": ".local/etc/jupyter/jupyter_server_config.py",
    "application": ".jupyter/graders_config.py",
    "application-here": "graders_config.py",
    "application-course": "course/graders_config.py",
    "module": "planted_later.py",
    "entry-point": "planted-1.0.dist-info/entry_points.txt",
}
TEXTS = {
    "entry-point": "[graders]\nentry-point = os:getcwd\n",
    "template": "{{{{ cycler.__init__.__globals__.os.mkdir({path!r}) }}}}",
}
HELD_FOR_BOTH = {
    "start-directory": "jupyter_server_config.py",
    "ipython": ".ipython/profile_default/startup/0.py",
    "template": "lab/index.html.j2",
}
ENABLED = {"ServerApp": {"jpserver_extensions": {"planted_extension": True}}}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    hub = Hub(PEOPLE, place="/opt")
    ours = shutil.ignore_patterns("__pycache__", ".*")
    code = hub.folder / "code"
    shutil.copytree(REPOSITORY / "sandbox_provisioner", code / "sandbox_provisioner", ignore=ours)
    path = os.pathsep.join([str(code), *packages()])
    python = public_python()
    config = HUB.format(python=python, folder=hub.folder, prefix=sys.prefix, path=path)
    (code / "graders.py").write_text(GRADERS)
    (hub.folder / "etc").mkdir()
    (hub.folder / "etc/graders_config.py").write_text('c.Graders.course = "of-root"\n')
    (hub.folder / "etc/jupyter_server_config.py").write_text(hub_user.CONFIG + SERVER)
    hub.runtime.mkdir()
    for uid, name in enumerate(PEOPLE, UID):
        for mark, path in (HELD_FOR_ANN | HELD_FOR_BOTH).items():
            text = TEXTS.get(mark, "open({path!r}, 'w')\n").format(path=marked(hub, name, mark))
            plant(hub.home(name), path, text, uid)
        extensions = ".jupyter/jupyter_server_config.d/planted.json"
        plant(hub.home(name), extensions, json.dumps(ENABLED), uid)
        spec = {
            "argv": ["/bin/touch", marked(hub, name, "kernelspec")],
            "display_name": "own", "language": "none",
            "metadata": hub_user.stanza("local-provisioner"),
        }  # fmt: skip
        own = ".local/share/jupyter/kernels/own/kernel.json"
        plant(hub.home(name), own, json.dumps(spec), uid)
    with serving(hub, config):
        yield hub


def plant(home: Path, path: str, text: str, uid: int) -> None:
    file = home / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    for made in (file, *file.parents):
        if made == home:
            return
        os.chown(made, uid, uid)


def marked(hub: Hub, name: str, mark: str) -> str:
    return str(hub.home(name) / f"ran-{mark}")


def marks(hub: Hub, name: str) -> set[str]:
    return {path.name.removeprefix("ran-") for path in hub.home(name).glob("ran-*")}


def test_nothing_that_a_user_has_left_runs_outside_of_a_box(hub: Hub) -> None:
    events = hub.begin("ann")
    assert events[-1].get("ready"), (events, hub.log.read_text())
    assert set(hub.ask("ann", "GET", "/kernelspecs").json()["kernelspecs"]) == {"python3"}
    assert hub.ask("ann", "POST", "/kernels", json={"name": "own"}).status_code >= 400
    with hub.kernel("ann") as kernel:
        where = (
            "import os, socket; print(socket.gethostname(), 'JUPYTERHUB_API_TOKEN' in os.environ)"
        )
        assert kernel.run(where) == "sandbox False\n"
    hostile = {"shell_command": ["/bin/touch", marked(hub, "ann", "terminal")]}
    name = hub.ask("ann", "POST", "/terminals", json=hostile).json()["name"]
    with contextlib.closing(hub.connect("ann", f"terminals/websocket/{name}")) as terminal:
        assert "on sandbox." in type_at(terminal, "echo on $(uname -n).")
    hub.stop("ann")
    assert marks(hub, "ann") == set()
    assert "The course is of-root" in hub.log.read_text(), hub.log.read_text()


def test_without_what_the_hub_has_to_say_the_same_runs(hub: Hub) -> None:
    """What the test before this one has to hold against."""
    events = hub.begin("bob")
    assert events[-1].get("ready"), (events, hub.log.read_text())
    hub.stop("bob")
    assert marks(hub, "bob") == set(HELD_FOR_ANN)
