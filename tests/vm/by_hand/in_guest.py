"""in_guest.py NAME - as root of the guest: the hub of a section of docs/jupyterhub.md, with two
users, who have a server and a kernel each.

What the page promises is looked at, and then that a stop leaves nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import websocket

PAGE = Path("/opt/docs/jupyterhub.md")
SECTIONS = {
    "local": "LocalProcessSpawner",
    "systemd": "SystemdSpawner",
    "subgroup": "SystemdSpawner",
    "ours": "Our spawner",
    "account": "A hub that is not root",
}
BIN = f"{sys.prefix}/bin"
FOLDER = Path("/srv/hub")
TOKEN = "a-token-of-the-tests-0123456789"
SECRET = "0123456789abcdef"
PATIENCE_SECONDS = 600
PEOPLE = {"alice": "bob", "bob": "alice"}
# What a test wants otherwise than a person.
CONFIG = f"""
c.JupyterHub.bind_url = "http://127.0.0.1:8000"
c.JupyterHub.authenticator_class = "dummy"
c.Authenticator.allow_all = True
c.JupyterHub.cleanup_servers = False
c.JupyterHub.services = [{{"name": "tests", "api_token": "{TOKEN}"}}]
c.JupyterHub.load_roles = [{{"name": "tests", "services": ["tests"], "scopes": [
    "admin:users", "admin:servers", "access:servers", "list:users"]}}]
c.Spawner.start_timeout = c.Spawner.http_timeout = {PATIENCE_SECONDS}
"""
PROXY_APART = f"""
c.ConfigurableHTTPProxy.should_start = False
c.ConfigurableHTTPProxy.auth_token = "{SECRET}"
"""
PATIENT = f"c.SandboxProvisioner.start_timeout = {PATIENCE_SECONDS}\n"
NO_NETWORK = """
c.SandboxSpawner.network = "none"
c.SandboxSpawner.network_allow = []
"""
PROXY = f"""[Service]
Environment=CONFIGPROXY_AUTH_TOKEN={SECRET}
ExecStart=/opt/proxy/node /opt/proxy/node_modules/.bin/configurable-http-proxy --ip 127.0.0.1 \
    --port 8000 --api-ip 127.0.0.1 --api-port 8001 --error-target http://127.0.0.1:8081/hub/error
"""
# As `npm install -g` has it.
INSTALLED_PROXY = """#!/bin/sh
exec /opt/proxy/node /opt/proxy/node_modules/.bin/configurable-http-proxy "$@"
"""
HUB = f"""[Service]
ExecStart={BIN}/python -m jupyterhub -f /srv/hub/jupyterhub_config.py
WorkingDirectory=/srv/hub
Environment=PATH={BIN}:/usr/bin:/bin
KillMode=process
"""
ACCOUNT, GROUP = "jupyterhub", "jupyter-users"
RECORDS = Path("/run/sandbox-provisioner")
LOOK = """
import json, os
status = open("/proc/self/status").read()
open("by-kernel", "w").close()
print(json.dumps({
    "seccomp": status.split("Seccomp:")[1].split()[0],
    "processes": len([name for name in os.listdir("/proc") if name.isdigit()]),
    "other": os.path.exists("/home/OTHER"),
    "cap": open("/sys/fs/cgroup/memory.max").read().strip(),
}))
"""


def main(name: str) -> None:
    set_up(name)
    for person in PEOPLE:
        begin(person)
    kernels = {person: Kernel(person) for person in PEOPLE}
    for person, other in PEOPLE.items():
        told = json.loads(kernels[person].run(LOOK.replace("OTHER", other)))
        print(person, told)
        assert told["seccomp"] == "2" and not told["other"], told
        assert told["cap"] != "max", told
        assert owner(f"/home/{person}/by-kernel") == owner(f"/home/{person}")
        kernels[person].run("x = 41")
    shell("jupyter-sandbox list")
    if name == "account":
        check_account()
        shell("systemctl restart sandbox-broker")
    else:
        shell("jupyter-sandbox doctor --hub --user alice")
    shell("systemctl restart jupyterhub")
    await_hub()
    for person, kernel in kernels.items():
        assert Kernel(person, kernel.id).run("print(x + 1)") == "42\n"
        ask("DELETE", f"/hub/api/users/{person}/server")
        while ask("GET", f"/hub/api/users/{person}")["servers"]:
            time.sleep(1)
    left = shell("jupyter-sandbox list --json")
    assert json.loads(left) == [], left
    if name == "account":
        shell("systemctl stop jupyterhub sandbox-broker.socket sandbox-broker.service")
        check_nothing_is_left()
    else:
        shell("systemctl stop jupyterhub proxy")
    print(f"{name}: all as its page says")


def code_of(section: str, kind: str) -> list[str]:
    """The pieces of code of *kind* in a section of the page."""
    text = PAGE.read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    pieces = (piece.partition("\n") for piece in text.split("```")[1::2])
    return [code for told, _, code in pieces if told == kind]


def set_up(name: str) -> None:
    if name == "account":
        set_up_account()
    else:
        set_up_root(name)
    await_hub()


def set_up_account() -> None:
    """Word for word, but for the environment, which is there, and how people log in."""
    section = SECTIONS["account"]
    _, install, enable, _ = code_of(section, "")
    (policy,), (configuration,), (unit,) = (
        code_of(section, kind) for kind in ("toml", "python", "ini")
    )
    assert f'account = "{ACCOUNT}"' in policy and f'groups = ["{GROUP}"]' in policy
    write_script(Path("/usr/local/bin/configurable-http-proxy"), INSTALLED_PROXY)
    shell(f"groupadd {GROUP}")
    for person in PEOPLE:
        shell(f"usermod --append --groups {GROUP} {person}")
    for line in install.splitlines():
        if "venv" not in line and "pip install" not in line:
            shell(line)
    make_volumes("/srv/shared")
    for folder in ("/etc/jupyter", "/etc/jupyterhub"):
        shutil.rmtree(folder, ignore_errors=True)
        Path(folder).mkdir()
    Path("/etc/jupyter/sandbox.toml").write_text(policy)
    config = Path("/etc/jupyterhub/jupyterhub_config.py")
    config.write_text(configuration + CONFIG + NO_NETWORK)
    Path("/etc/systemd/system/jupyterhub.service").write_text(unit)
    for line in enable.splitlines():
        shell(line)


def check_account() -> None:
    """What the page has people check, while two have a server and a kernel."""
    *_, check = code_of(SECTIONS["account"], "")
    for line in check.splitlines():
        shell(line)
    main_pid = shell("systemctl show --value --property=MainPID jupyterhub").strip()
    status = Path(f"/proc/{main_pid}/status").read_text()
    uid = pwd.getpwnam(ACCOUNT).pw_uid
    assert re.search(rf"^Uid:\t{uid}\t{uid}\t", status, re.MULTILINE), status
    assert "CapBnd:\t0000000000000000" in status and "NoNewPrivs:\t1" in status, status


def check_nothing_is_left() -> None:
    """Of servers and kernels, when all have stopped, and with them their hub and the broker."""
    assert not list(RECORDS.glob("*/record.json")), list(RECORDS.iterdir())
    groups = [str(path) for path in Path("/sys/fs/cgroup").glob("**/sandbox-provisioner/*")
              if path.is_dir()]  # fmt: skip
    assert not groups, groups
    for name in (*PEOPLE, ACCOUNT):
        found = subprocess.run(["pgrep", "--uid", name], stdout=subprocess.PIPE, check=False)
        assert not found.stdout, (name, found.stdout)


def set_up_root(name: str) -> None:
    shell("systemctl stop jupyterhub proxy 2>&1 || true")
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    configuration, *more = code_of(SECTIONS[name], "python")
    if name == "subgroup":
        configuration += more[0]
    # A gateway has 10 s to answer, and here its Python may take longer.
    without = NO_NETWORK if name == "ours" else ""
    config = configuration + CONFIG + PROXY_APART + without
    (FOLDER / "jupyterhub_config.py").write_text(config)
    write_script(Path(f"{BIN}/delegated"), *code_of("SystemdSpawner", "sh"))
    jupyter = Path("/etc/jupyter")
    shutil.rmtree(jupyter, ignore_errors=True)
    if name == "ours":  # whose kernels are in a box already
        make_volumes("/srv/data")
    else:
        jupyter.mkdir()
        servers, lab, *_ = code_of("What every server needs", "python")
        broker = 'c.SandboxProvisioner.launcher = "broker"\n' if name == "local" else ""
        (jupyter / "jupyter_server_config.py").write_text(servers + PATIENT + broker)
        (jupyter / "jupyter_lab_config.py").write_text(lab)
    units = Path("/etc/systemd/system")
    (units / "proxy.service").write_text(PROXY)
    (units / "jupyterhub.service").write_text(HUB)
    if name == "local":
        shell("jupyter-sandbox broker --install")
        shell("systemctl daemon-reload; systemctl start sandbox-broker.socket")
    shell("systemctl daemon-reload; systemctl start proxy jupyterhub")


def write_script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def make_volumes(shared: str) -> None:
    """Those that the page has."""
    Path("/srv/course").mkdir(exist_ok=True)
    for person in PEOPLE:
        account = pwd.getpwnam(person)
        folder = Path(shared, person)
        folder.mkdir(parents=True, exist_ok=True)
        os.chown(folder, account.pw_uid, account.pw_gid)


def shell(command: str) -> str:
    """What it prints, which is told; `jupyter sandbox` is that of the environment."""
    done = subprocess.run(
        ["sh", "-c", f"PATH={BIN}:$PATH; {command}"],
        cwd="/", check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    print(done.stdout, end="")
    return done.stdout


def owner(path: str) -> int:
    return Path(path).stat().st_uid


def await_hub() -> None:
    """Until it and its proxy answer."""
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            ask("GET", "/hub/api/users")
        except OSError:
            if time.monotonic() > end:
                shell("journalctl -u jupyterhub -o cat | tail -30")
                raise
            time.sleep(1)
        else:
            return


def ask(method: str, path: str, body: Any = None) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:8000{path}",
        method=method,
        headers={"Authorization": f"token {TOKEN}"},
        data=None if body is None else json.dumps(body).encode(),
    )
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as answer:
            text = answer.read()
    except urllib.error.HTTPError as error:
        raise OSError(f"{method} {path}: {error.code} {error.read().decode()}") from None
    return json.loads(text) if text else None


def begin(person: str) -> None:
    """Start the server of *person*, and return when it is there."""
    if person not in [user["name"] for user in ask("GET", "/hub/api/users")]:
        ask("POST", f"/hub/api/users/{person}")
    ask("POST", f"/hub/api/users/{person}/server")
    while True:
        server = ask("GET", f"/hub/api/users/{person}")["servers"].get("", {})
        if server.get("ready"):
            return
        if not server.get("pending"):
            shell("journalctl -u jupyterhub -o cat | tail -30")
            raise SystemExit(f"the server of {person} did not start")
        time.sleep(1)


class Kernel:
    """A new kernel of a person's server, or the one with that id, through the proxy."""

    def __init__(self, person: str, kernel_id: str = "") -> None:
        path = f"/user/{person}/api/kernels"
        self.id = kernel_id or ask("POST", path, {"name": "python3"})["id"]
        self._url = f"ws://127.0.0.1:8000{path}/{self.id}/channels"

    def run(self, code: str) -> str:
        """What *code* shows; by a connection of its own, since a server closes one on which nobody
        answers for a while."""
        header = [f"Authorization: token {TOKEN}"]
        connected = websocket.create_connection(self._url, header=header, timeout=PATIENCE_SECONDS)
        with contextlib.closing(connected):
            return _told(connected, code)


def _told(connected: websocket.WebSocket, code: str) -> str:
    name = uuid.uuid4().hex
    header = {"msg_id": name, "msg_type": "execute_request", "username": "", "session": "tests"}
    content = {"code": code, "silent": False, "user_expressions": {}, "allow_stdin": False}
    message = {"header": header | {"version": "5.3"}, "parent_header": {}, "metadata": {}}
    connected.send(json.dumps({**message, "content": content, "channel": "shell"}))
    shown = ""
    while True:
        told = json.loads(connected.recv())
        if told["parent_header"].get("msg_id") != name:
            continue
        content = told["content"]
        shown += content.get("text") or "\n".join(content.get("traceback", []))
        if content.get("execution_state") == "idle":
            return shown


if __name__ == "__main__":
    main(sys.argv[1])
