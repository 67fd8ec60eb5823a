"""What kernels install, through the broker: root keeps it, for its user alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator

import pytest
import users
from brokers import Broker, Refused, User

from sandbox_provisioner.facilities.storage.facts import STORAGE
from sandbox_provisioner.layers.kept import MOST_OF_OTHERS

pytestmark = pytest.mark.requires(
    "userns", "root", "cgroup-memory", "setpriv", "public-python", "loop", "mkfs.ext4"
)

START = "kernel = Kernel(layer=layer, disk_limit='16M'); answer = kernel(code)"
WRITE = "import os; open(os.path.expanduser('~/.local/found'), 'w').write('installed')"
READ = "import os; print(open(os.path.expanduser('~/.local/found')).read())"
IS_THERE = "import os; print(os.path.exists(os.path.expanduser('~/.local/found')))"
COMMAND = """
import contextlib, io
from sandbox_provisioner.app.layer import LayerApp
def told(*words):
    app = LayerApp(argv=[], config=None)
    app.initialize([*words, f"--SandboxProvisioner.broker_socket={place['socket']}"])
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        app.start()
    return out.getvalue()
"""
NAME = "answer = kernel.manager.provisioner.sandbox_id"


@pytest.fixture(autouse=True)
def nothing_kept(kept_broker: Broker) -> Iterator[None]:
    yield
    shutil.rmtree(kept_broker.layers / "people", ignore_errors=True)


def test_what_a_kernel_installs_outlives_its_restarts_and_not_its_end(
    broker: Broker, user: User
) -> None:
    user(START, layer="kernel", code=WRITE)
    name = user(NAME)
    user("kernel.restart()")
    assert user("answer = kernel(code)", code=READ) == "installed"
    assert (STORAGE / name).exists()
    assert user("answer = kernel.end()") == "exit"
    assert not (STORAGE / name).exists()


def test_a_layer_goes_with_the_server_that_might_have_restarted_its_kernel(
    own_broker: Broker,
) -> None:
    with User(own_broker.home, users.USER) as server:
        server.sit_down(own_broker)
        server(START, layer="kernel", code=WRITE)
        name = server(NAME)
        server("kernel.client.stop_channels(); kernel.manager.provisioner.handle.kill()")
        own_broker.heard("end", name)
        closed = "answer = send(dict(ask='close', sandbox_id=name), [])"
        server(closed, name=name)
        assert (STORAGE / name).exists()
    own_broker.heard("forgotten", name)
    assert not (STORAGE / name).exists()


def test_a_kernel_restarts_with_its_layer_through_the_next_broker(
    own_broker: Broker, own_user: User
) -> None:
    own_user(START, layer="kernel", code=WRITE)
    own_broker.kill()
    own_broker.start()
    own_user("kernel.restart()")
    assert own_user("answer = kernel(code)", code=READ) == "installed"
    assert own_user("answer = kernel.end()") == "exit"


def test_no_layer_is_anybody_elses_whatever_a_kernel_is_called(
    broker: Broker, user: User, other: User
) -> None:
    """Its id is known to everybody, and images have its name."""
    user(START, layer="kernel", code=WRITE)
    name = user(NAME)
    user("send(dict(ask='kill', sandbox_id=name), [])", name=name)
    broker.heard("end", name)
    user("send(dict(ask='close', sandbox_id=name), [])", name=name)
    assert (STORAGE / name).exists()  # it may be started again
    take = """
from sandbox_provisioner.plan import HOME
message = wish(sandbox_id=name, cwd=HOME)
message["start"]["spec"] |= dict(workdir="none", layer="kernel")
answer = send(message, streams())
"""
    told = other(take, name=name)
    assert "not this user's" in str(told["error"]), told
    other("send(dict(ask='forget', sandbox_id=name), [])", name=name)
    assert (STORAGE / name).exists()
    user("send(dict(ask='forget', sandbox_id=name), [])", name=name)
    assert not (STORAGE / name).exists()
    user("kernel.client.stop_channels()")


def test_a_users_layer_is_for_the_next_kernel_and_for_one_at_a_time(
    broker: Broker, user: User, other: User
) -> None:
    for one in (user, other):
        one(COMMAND)
    user(START, layer="user", code=WRITE)
    with pytest.raises(Refused, match=r"has had the layer since"):
        user("Kernel(layer='user', disk_limit='16M')")
    with pytest.raises(Refused, match="has it"):
        user("told('reset', 'broker/host')")
    user("kernel.end()")
    assert json.loads(other("answer = told('list', '--json')")) == []
    with pytest.raises(Refused, match="none of this user's has that name"):
        other("told('reset', 'broker/host')")
    user(START, layer="user", code=READ)
    assert user("answer = kernel(code)", code=READ) == "installed"
    user("kernel.end()")
    [one] = json.loads(user("answer = told('list', '--json')"))
    assert (one["name"], one["held"]) == ("broker/host", False)
    assert "Removed the layer" in user("answer = told('reset', 'broker/host')")
    user(START, layer="user", code=IS_THERE)
    assert user("answer = kernel(code)", code=IS_THERE) == "False"
    user("kernel.end()")


def test_a_user_has_so_many_layers_and_no_more(kept_broker: Broker, user: User) -> None:
    """Each has its room also when no kernel has it; who touches a root would have one more."""
    place = kept_broker.layers / f"people/{users.USER}/user/{users.USER}"
    for number in range(MOST_OF_OTHERS):
        (place / f"root-{number}").mkdir(parents=True)
    with pytest.raises(Refused, match=f"{MOST_OF_OTHERS} layers of this user are kept"):
        user("Kernel(layer='user', disk_limit='16M')")
    (place / "root-0").rmdir()
    user(START, layer="user", code=WRITE)
    user("kernel.end()")
    user(START, layer="user", code=READ)  # the one that there is
    assert user("answer = kernel(code)", code=READ) == "installed"
    user("kernel.end()")
