"""A real hub with its real proxy, which run as an account of their own, and a broker beside them.

One hub for all of these tests; una and ben have a server each, which a test that ends one starts
again. All is as with a hub of root's, but that the broker starts what runs in boxes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from brokers import User
from facilities import public_python
from hub_account import ACCOUNT, ACCOUNT_UID, HubOfAccount
from hub_server import (
    PATIENCE_SECONDS,
    UID,
    await_end,
    check_a_kernel_over_its_cap_ends_alone,
    check_a_killed_server_is_noticed_and_leaves_nothing,
    check_a_stop_leaves_nothing,
    environment_of,
    groups_of,
    held_at_its_end,
    is_gone,
    is_same,
    left_of,
    marks_of_hub,
    person,
    ready_for,
    serving,
    until,
    until_gone,
    until_logged,
    while_it_ends,
)

from sandbox_provisioner.records import open_init

pytestmark = marks_of_hub("cgroup-memory", "ordinary-user")

PEOPLE = ("una", "ben", "eve")
CONFIG = """
c.SandboxSpawner.mem_limit = "768M"
c.SandboxSpawner.pids_limit = 150
c.SandboxSpawner.volumes = {"FOLDER/shared/{username}": "/shared"}

def before(spawner):
    if spawner.user.name == "eve":
        spawner.volumes = {"FOLDER/secret": "/secret"}

c.Spawner.pre_spawn_hook = before
"""
POLICY = f"""
[hub]
account = "{ACCOUNT}"
volumes = ["{{folder}}/shared/{{username}}:/shared:rw"]
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[HubOfAccount]:
    hub = HubOfAccount(PEOPLE, policy=POLICY)
    # Root's alone above: a person has what is theirs by the policy, and no other way.
    for folder in ("shared", "secret"):
        (hub.folder / folder).mkdir(mode=0o700)
    for uid, name in enumerate(PEOPLE, UID):
        shared = hub.folder / "shared" / name
        shared.mkdir(mode=0o700)
        os.chown(shared, uid, uid)
    with serving(hub, CONFIG):
        yield hub


una, ben = map(person, PEOPLE[:2])


# -- what works


def test_neither_the_hub_nor_its_proxy_nor_a_server_is_root(hub: HubOfAccount, una: str) -> None:
    children = Path(f"/proc/{hub.pid}/task/{hub.pid}/children").read_text().split()
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children]
    assert any(b"configurable-http-proxy" in command for command in commands)
    assert {os.stat(f"/proc/{pid}").st_uid for pid in (hub.pid, *children)} == {ACCOUNT_UID}
    record = hub.record(una)
    assert os.stat(f"/proc/{record.init_pid}").st_uid == record.first_id
    assert record.tree == f"hub/{una}/server/{record.sandbox_id}"
    for group in filter(Path.exists, groups_of(record)):
        assert {path.stat().st_uid for path in (group, *group.rglob("*"))} == {0}


def test_who_logs_in_has_the_own_server_and_no_other(hub: HubOfAccount, una: str, ben: str) -> None:
    base = f"http://127.0.0.1:{hub.ports[0]}"
    with requests.Session() as browser:
        page = browser.get(f"{base}/hub/login", timeout=PATIENCE_SECONDS)
        token = re.search(r'name="_xsrf" value="([^"]+)"', page.text)
        assert token
        form = {"username": una, "password": "any", "_xsrf": token[1]}
        browser.post(f"{base}/hub/login", data=form, timeout=PATIENCE_SECONDS)
        pages = [
            browser.get(f"{base}/user/{name}/{path}", timeout=PATIENCE_SECONDS)
            for name in (una, ben)
            for path in ("files/none", "api/status")  # the first one asks the hub who that is
        ]
    assert [page.status_code for page in pages[1::2]] == [200, 403], [pages[1].text, pages[3].text]
    assert pages[1].json()["kernels"] == 0


def test_kernels_have_the_home_and_what_the_policy_shows_of_their_person_and_no_others(
    hub: HubOfAccount, una: str, ben: str
) -> None:
    (hub.home(ben) / "secret").write_text("b")
    with hub.kernel(una) as kernel, hub.kernel(ben) as other:
        assert kernel.run("import os; print(os.getuid(), os.getcwd())").split() == [
            "1000", str(hub.home(una)),
        ]  # fmt: skip
        kernel.run("open('made', 'w').close(); open('/shared/made', 'w').close()")
        assert kernel.run(f"print(os.listdir({str(hub.folder / 'home')!r}))").strip() == "['una']"
        assert "FileNotFound" in kernel.run(f"open({str(hub.home('ben') / 'secret')!r})")
        assert other.run("import os; print(os.listdir('/shared'))").strip() == "[]"
        found = {**hub.kernels(una), **hub.kernels(ben)}
        mine, others = found[kernel.id], found[other.id]
        assert mine.tree == f"hub/{una}/kernels/{mine.sandbox_id}"
        assert mine.first_id != others.first_id
        attempt = f"""
def tried(act):
    try:
        return act()
    except OSError as error:
        return type(error).__name__
print(tried(lambda: os.kill({others.init_pid}, 9)), os.path.exists("/jupyterhub"))
print(tried(lambda: os.listdir("/proc/{others.init_pid}")))
"""
        assert kernel.run(attempt).split() == ["ProcessLookupError", "False", "FileNotFoundError"]
    made = (hub.home(una) / "made").stat(), (hub.folder / "shared/una/made").stat()
    assert {(status.st_uid, status.st_gid) for status in made} == {(UID, UID)}
    assert not hub.kernels(una) and not hub.kernels(ben)


def test_a_kernel_over_its_cap_is_told_under_its_cell_and_ends_alone(
    hub: HubOfAccount, una: str
) -> None:
    check_a_kernel_over_its_cap_ends_alone(hub, una)


def test_what_a_kernel_of_the_hubs_cannot_have_stands_under_its_first_cell(
    hub: HubOfAccount, una: str
) -> None:
    folder = hub.home(una) / ".local/share/jupyter/kernels/greedy"
    folder.mkdir(parents=True)
    config = {"devices": ["nvidia.com/gpu=all"]}
    spec = {
        "argv": [public_python(), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "Greedy", "language": "python",
        "metadata": {"kernel_provisioner": {
            "provisioner_name": "sandbox-provisioner", "config": config,
        }},
    }  # fmt: skip
    (folder / "kernel.json").write_text(json.dumps(spec))
    with hub.kernel(una, spec="greedy") as kernel:
        cell = kernel.send("6 * 7")
        while (told := kernel.receive())["content"].get("name") != "stderr":
            pass
        assert told["parent_header"]["msg_id"] == cell
        said = " ".join(told["content"]["text"].split())
        assert "devices cannot be had by a server in a box of a hub's" in said
        assert kernel.run("print(6 * 7)") == "42\n"


def test_a_server_reaches_the_hubs_api_and_nothing_else_of_the_machine(
    hub: HubOfAccount, una: str
) -> None:
    code = f"""
import os, socket, urllib.request
print(urllib.request.urlopen(os.environ["JUPYTERHUB_API_URL"]).status)
for port in {hub.ports!r}:
    try:
        socket.create_connection(("127.0.0.1", port), 5)
        print("open")
    except OSError as error:
        print(error.errno)
"""
    assert hub.in_server(una, code).split() == ["200", "111", "open", "111"]


# -- restarts and ends


def test_hub_and_broker_are_killed_and_servers_and_kernels_go_on(
    hub: HubOfAccount, una: str, ben: str
) -> None:
    kept, killed = hub.record(una), hub.record(ben)
    with hub.kernel(una) as kernel:
        kernel.run("x = 43")
        hub.end(signal.SIGKILL)
        hub.broker.kill()
        os.kill(killed.init_pid, signal.SIGKILL)
        await_end(killed)
        hub.broker.start()
        hub.start()
        assert hub.people() == [una]
        until_gone(hub, killed)
        assert is_same(hub.record(una), kept)
        with hub.kernel(una, kernel.id) as again:
            assert again.run("print(x)").strip() == "43"
        with hub.kernel(una) as another:
            assert another.run("print(1 + 1)").strip() == "2"


def test_a_broker_alone_that_begins_again_is_found_by_the_hub(hub: HubOfAccount, una: str) -> None:
    kept = hub.record(una)
    hub.broker.close()
    hub.broker.start()
    with hub.kernel(una) as kernel:
        assert kernel.run("print(1 + 1)").strip() == "2"
    assert is_same(hub.record(una), kept)
    hub.stop(una)
    assert left_of(hub, kept) == []


def test_what_is_ready_for_a_server_is_removed_also_where_its_end_is_asked_for_meanwhile(
    hub: HubOfAccount, una: str
) -> None:
    """The broker is ending it by itself when the hub asks for it."""
    record, how = hub.record(una), f"The server of {una} ended"
    told = hub.log.read_text().count(how)
    with held_at_its_end(ready_for(hub, una)):
        os.kill(record.init_pid, signal.SIGKILL)
        await_end(record)
        until_logged(hub, how, told + 1)
        assert all(una in hub.people() for _ in range(20))  # it waits
    until(lambda: una not in hub.people())
    assert left_of(hub, record) == []


def test_a_server_that_is_stopped_while_there_is_no_broker_leaves_nothing_when_there_is_one(
    hub: HubOfAccount, una: str
) -> None:
    record = hub.record(una)
    with hub.kernel(una):
        hub.broker.close()
        hub.stop(una)
    end = open_init(record)
    assert end is not None  # it runs
    os.close(end)
    hub.broker.start()
    until_gone(hub, record)


def test_a_broker_that_is_killed_while_it_ends_a_server_leaves_nothing_to_the_next(
    hub: HubOfAccount, una: str
) -> None:
    record = hub.record(una)
    with while_it_ends(hub, una) as stopped:
        hub.broker.kill()
        hub.broker.start()
        assert not is_gone(hub, record)
    stopped.result()
    until_gone(hub, record)


def test_a_server_that_was_killed_is_noticed_and_leaves_nothing(
    hub: HubOfAccount, una: str
) -> None:
    check_a_killed_server_is_noticed_and_leaves_nothing(hub, una)
    how = f"The server of {una} ended: The server of {una} was killed from outside"
    assert how in hub.log.read_text()


def test_a_stop_leaves_nothing(hub: HubOfAccount, una: str) -> None:
    check_a_stop_leaves_nothing(hub, una)


# -- what cannot be


def test_a_folder_that_its_person_may_not_open_is_refused(hub: HubOfAccount) -> None:
    (event,) = hub.begin("eve")[-1:]
    assert event.get("failed"), event
    assert f"{hub.folder}/secret" in event["message"]


def test_nobody_else_comes_in_by_the_proxys_way(hub: HubOfAccount, una: str, ben: str) -> None:
    entrance = f"{hub.ways}/{hub.record(ben).sandbox_id}/s.sock"
    code = f"import socket; socket.socket(socket.AF_UNIX).connect({entrance!r}); print('in')"

    def tried(uid: int) -> str:
        words = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
        done = subprocess.run(
            [*words, "/usr/bin/python3", "-c", code], capture_output=True, text=True, check=False
        )
        return done.stdout + done.stderr

    assert tried(ACCOUNT_UID) == "in\n"
    for uid in (UID, UID + 1, 65534):
        assert "PermissionError" in tried(uid)
    token = environment_of(hub.record(una), "JUPYTERHUB_API_TOKEN")
    assert hub.ask(ben, "GET", "/contents", token=token).status_code in {403, 404}


# -- what the account, and who is not the account, would like to have


@contextlib.contextmanager
def asking(hub: HubOfAccount, uid: int) -> Iterator[User]:
    """A process of the user *uid* that asks the broker by itself."""
    with User(hub.folder, uid) as user:
        user("from hub_asking import *; begin(path)", path=hub.broker.socket)
        yield user


@pytest.fixture
def account(hub: HubOfAccount) -> Iterator[User]:
    with asking(hub, ACCOUNT_UID) as user:
        yield user


def test_the_account_has_servers_for_people_and_for_nobody_else(
    hub: HubOfAccount, account: User
) -> None:
    people = ["una", "root", "daemon", ACCOUNT, "nobody-knows", "../una"]
    told = account("answer = {name: start(name) for name in people}", people=people)
    assert told.pop("una") == ""
    assert "root" in told["root"] or "of the system's" in told["root"]
    assert "an account of the system's" in told["daemon"]
    assert "the account of the hub itself" in told[ACCOUNT]
    assert "no such user" in told["nobody-knows"] and "no such user" in told["../una"]


def test_the_account_shows_a_server_nothing_that_its_person_could_not_open(
    hub: HubOfAccount, account: User
) -> None:
    secret, shared, home = hub.folder / "secret", hub.folder / "shared", hub.home("una")
    program = secret / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    (home / "link").symlink_to(secret)
    (shared / "una/link").symlink_to(shared / "ben")
    try:
        told = account(
            "answer = [start('una', *volumes) for volumes in tried]",
            tried=[
                [f"{shared}/una:/shared:rw", f"{home}:/again:rw"],
                [f"{secret}:/data"],
                [f"{home}/link:/data"],
                [f"{hub.home('ben')}:/data"],
                [f"{shared}/ben:/data"],
                [f"{shared}:/data"],
                [f"{shared}/una/link:/data"],
                ["/root:/data"],
                [f"{hub.runtime}:/data"],
                [f"{hub.ways}:/data"],
                [f"{hub.folder}/state:/data"],
                ["/usr/share:/data:rw"],
            ],
        )
        assert told[0] == ""
        assert all(told[1:]), told
        assert "no such program" in account(
            "answer = start('una', program=program)", program=str(program)
        )
        # What is refused is theirs to see where it is named.
        assert not any("program" in answer for answer in told)
    finally:
        (home / "link").unlink()
        (shared / "una/link").unlink()


def test_the_account_ends_its_servers_and_nothing_else(
    hub: HubOfAccount, account: User, una: str
) -> None:
    server = hub.record(una)
    with hub.kernel(una) as kernel:
        kernel.run("x = 42")
        (record,) = hub.kernels(una).values()
        told = account(
            "answer = [about(what, kernel) for what in asked] + [about('server-look', server)]",
            asked=["kill", "stop", "signal", "server-kill", "server-signal", "server-close"],
            kernel=record.sandbox_id, server=server.sandbox_id,
        )  # fmt: skip
        assert told.pop() == ""
        assert all(told), told
        assert kernel.run("print(x)").strip() == "42"


def test_who_is_not_the_account_has_and_ends_no_server(
    hub: HubOfAccount, una: str, ben: str
) -> None:
    server = hub.record(ben)
    about = f"init=({server.init_pid}, {server.init_start})"
    for uid in (UID, UID + 1):
        with asking(hub, uid) as user:
            told = user(
                f"answer = [start('una'), about('server-find', server, {about})]"
                " + [about(what, server) for what in asked]",
                server=server.sandbox_id,
                asked=[
                    "server-keep", "server-listen", "server-look", "server-signal", "server-kill",
                    "server-close", "kill", "close", "stop", "listen",
                ],
            )  # fmt: skip
        assert all(told), told
        assert f"runs as {ACCOUNT}" in told[0], told[0]
    assert is_same(hub.record(ben), server)
    assert hub.ask(ben, "GET", "/status").status_code == 200


def test_doctor_tells_the_account_that_it_is_served_and_another_one_that_it_is_not(
    hub: HubOfAccount,
) -> None:
    code = """
import subprocess
words = ["-m", "sandbox_provisioner.app", "doctor", "--hub", "--json"]
done = subprocess.run([sys.executable, *words, "--SandboxProvisioner.broker_socket=" + path],
                      capture_output=True, text=True, cwd="/")
answer = done.returncode, done.stdout or done.stderr
"""
    with asking(hub, ACCOUNT_UID) as account, asking(hub, UID) as other:
        code_of_account, told = account(code, path=hub.broker.socket)
        _, told_other = other(code, path=hub.broker.socket)
    assert code_of_account == 0, told
    rows, other_rows = (
        {row["facility"]: row for row in json.loads(text)} for text in (told, told_other)
    )
    assert rows["hub"]["state"] == "ok"
    assert f"runs as {ACCOUNT}: the broker answers" in rows["hub"]["found"]
    assert other_rows["hub"]["state"] == "note"
    assert f"runs as {ACCOUNT}" in other_rows["hub"]["found"]
