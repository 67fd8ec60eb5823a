"""Programs that people use reach who is allowed, as they are: they know of no gateway."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import sysconfig
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sandbox_provisioner.spec import Network, NetworkWish

pytestmark = pytest.mark.requires("userns", "openssl")

NAME = socket.gethostname()
JAVA = """
import java.io.*; import java.net.*;
class Client { public static void main(String[] words) throws Exception {
    InputStream in = new URL(words[0]).openStream();
    System.out.println(new BufferedReader(new InputStreamReader(in)).readLine());
} }
"""
FETCH = "fetch(process.argv[1]).then(a => a.text()).then(t => console.log(t.trim()))"
URLLIB = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1]).read().decode().strip())"
REQUESTS = "import sys, requests; print(requests.get(sys.argv[1]).text.strip())"
# A program in Go has neither the C library nor anybody's proxy: this one runs what a file says.
TASK = os.path.join(sysconfig.get_path("scripts"), "task")
TASKFILE = "version: 3\nsilent: true\ntasks:\n  default: echo a page\n"
# What pixi and rattler-build are made of.
CONDA = """
import asyncio, os, rattler, sys
async def install(channel, prefix):
    found = await rattler.solve([channel], ["a-page"], platforms=["linux-64", "noarch"])
    await rattler.install(found, prefix, show_progress=False)
    print(open(f"{prefix}/share/page").read().strip())
asyncio.run(install(os.environ["CONDA_CHANNELS"], os.path.expanduser("~/prefix")))
sys.stdout.flush()
os._exit(0)  # its threads may still look for the interpreter when that has gone
"""
# By the program that has to be there: each prints the text of the page.
CLIENTS = {
    "curl": "curl -sS --cacert cert.pem {tls}/page",
    "wget": "wget -qO- --ca-certificate=cert.pem {tls}/page",
    "git": "GIT_SSL_CAINFO=$PWD/cert.pem git clone -q {tls}/project.git p && cat p/page",
    "java": "java Client.java {plain}/page",
    "node": f'NODE_EXTRA_CA_CERTS=cert.pem node -e "{FETCH}" {{tls}}/page',
    "go": f"SSL_CERT_FILE=cert.pem {TASK} --yes -t {{tls}}/Taskfile.yml",
    "urllib": f'SSL_CERT_FILE=cert.pem {sys.executable} -c "{URLLIB}" {{tls}}/page',
    "requests": f'REQUESTS_CA_BUNDLE=cert.pem {sys.executable} -c "{REQUESTS}" {{tls}}/page',
}
PROGRAMS = {"go": TASK, "urllib": sys.executable, "requests": sys.executable}
THERE = [name for name in CLIENTS if shutil.which(PROGRAMS.get(name, name))]
EACH = [
    pytest.param(
        name, marks=() if name in THERE else pytest.mark.skip(f"no {name} on this machine")
    )
    for name in CLIENTS
]


class Quiet(SimpleHTTPRequestHandler):
    """Serves files, and says nothing."""

    def log_message(self, *words: object) -> None:
        """Nobody reads it."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A web server with TLS and one without, on this machine: their URLs and ports."""
    folder, keys = tmp_path_factory.mktemp("pages"), tmp_path_factory.mktemp("keys")
    (folder / "page").write_text("a page\n")
    (folder / "Taskfile.yml").write_text(TASKFILE)
    make_repository(folder)
    make_channel(folder / "channel")
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes "
        f"-keyout key.pem -out cert.pem -days 2 -subj /CN={NAME} -addext subjectAltName=DNS:{NAME}"
    )
    subprocess.run(command.split(), cwd=keys, check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(keys / "cert.pem", keys / "key.pem")
    address = socket.gethostbyname(NAME)
    servers = [ThreadingHTTPServer((address, 0), partial(Quiet, directory=folder)) for _ in "ab"]
    servers[0].socket = context.wrap_socket(servers[0].socket, server_side=True)
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    ports = [str(server.server_address[1]) for server in servers]
    yield {
        "tls": f"https://{NAME}:{ports[0]}",
        "plain": f"http://{NAME}:{ports[1]}",
        "ports": ",".join(ports),
        "address": address,
        "certificate": (keys / "cert.pem").read_text(),
    }
    for server in servers:
        server.shutdown()
        server.server_close()


def make_repository(folder: Path) -> None:
    """A bare one with the page in it, to be fetched as files."""
    made = folder / "made"
    for command in (
        "git init -q made",
        "cp page made",
        "git -C made add page",
        "git -C made -c user.name=a -c user.email=a@example.org commit -q -m a",
        "git clone -q --bare made project.git",
        "git -C project.git update-server-info",
    ):
        subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    shutil.rmtree(made)


def make_channel(folder: Path) -> None:
    """Of conda's packages, with the page in one of them."""
    index = {"name": "a-page", "version": "1.0", "build": "0", "build_number": 0, "depends": [],
             "subdir": "noarch", "noarch": "generic"}  # fmt: skip
    page = {"_path": "share/page", "path_type": "hardlink", "size_in_bytes": 7}
    page["sha256"] = hashlib.sha256(b"a page\n").hexdigest()
    files = {
        "info/index.json": json.dumps(index),
        "info/paths.json": json.dumps({"paths_version": 1, "paths": [page]}),
        "share/page": "a page\n",
    }
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:bz2") as archive:
        for path, text in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    name, data = "a-page-1.0-0.tar.bz2", made.getvalue()
    record = index | {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    for platform, packages in (("noarch", {name: record}), ("linux-64", {})):
        (folder / platform).mkdir(parents=True)
        listed = {"info": {"subdir": platform}, "packages": packages, "packages.conda": {}}
        (folder / platform / "repodata.json").write_text(json.dumps(listed))
    (folder / "noarch" / name).write_bytes(data)


@pytest.fixture
def folder(workdir: Path, site: dict[str, str]) -> str:
    """The work directory, with what clients need."""
    (workdir / "cert.pem").write_text(site["certificate"])
    (workdir / "Client.java").write_text(JAVA)
    (workdir / "conda.py").write_text(CONDA)
    return str(workdir)


def run_client(command):
    """The last line that it prints, its status, and its errors."""
    import subprocess

    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=50)
    return "".join(done.stdout.split("\n")[-2:-1]), done.returncode, done.stderr


@pytest.mark.parametrize("client", EACH)
def test_a_client_gets_the_page_of_who_is_allowed(sandbox, folder, site, client):
    rules = (f"{NAME}:{site['ports']}", f"{site['address']}/32:{site['ports']}")
    network = NetworkWish(mode=Network.GATEWAY, allow=rules)
    with sandbox(network=network, cwd=folder) as box:
        found = box.call(run_client, CLIENTS[client].format(**site))
    assert found[:2] == ["a page", 0], found


@pytest.mark.parametrize("rules", [("packages",), ()], ids=["as configured", "not allowed"])
def test_a_client_of_conda_installs_from_the_channel_that_this_machine_is_configured_for(
    sandbox, folder, site, tmp_path, monkeypatch, rules
):
    """The name is allowed by the preset; the machine's own address by itself, as for any rule."""
    pytest.importorskip("rattler")
    shutil.copy("/bin/true", tmp_path / "conda")  # what is not installed counts for nothing
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CONDA_CHANNELS", f"{site['plain']}/channel")
    network = NetworkWish(
        mode=Network.GATEWAY, allow=(*rules, f"{site['address']}/32:{site['ports']}")
    )
    with sandbox(network=network, cwd=folder) as box:
        text, status, told = box.call(run_client, f"{sys.executable} conda.py")
    assert (text, not status) == (("a page", True) if rules else ("", False)), told


def test_no_client_gets_it_from_who_is_not(sandbox, folder, site):
    network = NetworkWish(mode=Network.GATEWAY, allow=("other.example",))
    commands = [CLIENTS[name].format(**site) for name in THERE if name != "java"]
    with sandbox(network=network, cwd=folder) as box:
        for command in commands:
            text, status, _ = box.call(run_client, command)
            assert (text, bool(status)) == ("", True), command
