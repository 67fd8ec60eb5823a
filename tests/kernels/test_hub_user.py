"""A server that a hub started for an ordinary user, who wants to run something without a box."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import users
from hub_user import HubHome, ipykernel, stanza
from jupyter_programs import Server

pytestmark = [
    pytest.mark.requires("root", "userns", "jupyter_server", "setpriv", "public-python"),
]
OTHER = 4322
BOXED = "import os, socket; print(socket.gethostname(), os.getuid())"
IN_A_BOX = f"sandbox {users.USER}\n"
SHM = "import os; s = os.statvfs('/dev/shm'); print(s.f_blocks * s.f_bsize >> 20)"
DEFAULT_SHM = "64\n"


@pytest.fixture(scope="module")
def home() -> Iterator[HubHome]:
    with HubHome() as home:
        own, anybodys = home.home / ".local/share/jupyter", home.path / "anybodys"
        ours = stanza("sandbox-provisioner", shm_limit="32M")
        home.add_spec(home.share, "plain", **ipykernel())
        home.add_spec(home.share, "local", **ipykernel(**stanza("local-provisioner")))
        home.add_spec(home.share, "unknown", **ipykernel(**stanza("no-such-provisioner")))
        home.add_spec(home.share, "capped", **ipykernel(**ours))
        home.add_spec(home.share, "others", owner=OTHER, **ipykernel(**ours))
        for name, share in (("own", own), ("shared", anybodys)):
            spec = {
                "argv": ["/bin/touch", f"{home.home}/ran-{name}"],
                "display_name": name,
                "metadata": stanza("local-provisioner"),
            }
            home.add_spec(share, name, owner=users.USER, **spec)
        home.add_spec(own, "capped", owner=users.USER, **ipykernel(**stanza("local-provisioner")))
        (anybodys / "kernels").chmod(0o777)
        home.places["JUPYTER_PATH"] = f"{own}:{anybodys}:{home.share}"
        yield home


@pytest.fixture(scope="module")
def server(home: HubHome) -> Iterator[Server]:
    server = Server(home)
    yield server
    server.end()


# -- kernelspecs


@pytest.mark.parametrize("name", ["plain", "local", "unknown", "python3"])
def test_every_kernelspec_is_started_in_a_box(server: Server, name: str) -> None:
    with server.session(name) as client:
        assert client.run(BOXED) == IN_A_BOX


def test_what_a_request_says_of_the_provisioner_changes_nothing(server: Server) -> None:
    variables = {"JUPYTER_DEFAULT_PROVISIONER_NAME": "local-provisioner"}
    answer = server.ask("POST", "kernels", {"name": "plain", "env": variables})
    assert answer.status_code == 201, answer.text
    try:
        records = server.home.records()
        assert [record.name for record in records] == ["Python"]
    finally:
        assert server.ask("DELETE", f"kernels/{answer.json()['id']}").status_code == 204


@pytest.mark.parametrize("name", ["own", "shared"])
def test_a_kernelspec_that_the_user_could_write_is_not_there(server: Server, name: str) -> None:
    assert name not in server.ask("GET", "kernelspecs").json()["kernelspecs"]
    assert server.ask("POST", "kernels", {"name": name}).status_code >= 400
    assert server.post_session(name).status_code >= 400
    assert not os.path.exists(server.home.path / f"home/ran-{name}")
    assert f"{name}/kernel.json does not count: the user of this server may change" in server.log


def test_one_of_the_users_does_not_hide_one_of_roots(server: Server) -> None:
    found = server.ask("GET", "kernelspecs/capped").json()["spec"]["metadata"]
    assert found["kernel_provisioner"]["provisioner_name"] == "sandbox-provisioner"
    with server.session("capped") as client:
        assert client.run(SHM) == "32\n"


def test_what_not_root_alone_has_written_sets_no_options(server: Server) -> None:
    with server.session("others") as client:
        assert client.run(SHM) == DEFAULT_SHM
