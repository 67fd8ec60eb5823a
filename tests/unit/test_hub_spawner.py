"""What a hub's configuration asks of our spawner, and the ways into a box; no hub runs."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sandbox_provisioner import audit
from sandbox_provisioner.broker.server_wish import ServerWish
from sandbox_provisioner.broker.talk import Silent
from sandbox_provisioner.contract import Stdio
from sandbox_provisioner.errors import HostError, SpecError
from sandbox_provisioner.facilities.storage.wish import DiskBackend
from sandbox_provisioner.hub import for_hub, relay, through_broker
from sandbox_provisioner.hub.doors import Doors, sweep
from sandbox_provisioner.hub.for_hub import Had, ServersOfHub
from sandbox_provisioner.hub.servers import Server, account
from sandbox_provisioner.off_loop import apart
from sandbox_provisioner.spec import Volume

pytestmark = pytest.mark.requires("jupyterhub")


API_URL = "http://127.0.0.1:8081/hub/api"


def spawner(**options: Any) -> Any:
    from sandbox_provisioner.hub.spawner import SandboxSpawner

    user = SimpleNamespace(name="ann", url="/user/ann", settings={})
    hub = SimpleNamespace(api_url=options.pop("api_url", API_URL))
    return SandboxSpawner(user=user, hub=hub, **options)


def wish(made: Any, monkeypatch: pytest.MonkeyPatch) -> ServerWish:
    """What *made* asks for."""
    variables = dict.fromkeys(("JUPYTERHUB_API_URL", "JUPYTERHUB_ACTIVITY_URL"), API_URL)
    monkeypatch.setattr(made, "get_env", lambda: variables)
    monkeypatch.setattr(made, "get_args", list)
    found: ServerWish = made._wish()
    return found


# -- options


@pytest.mark.parametrize(
    "volumes",
    [
        {"/srv/{username}": "/data"},
        {"/srv/{username}": {"bind": "/data", "mode": "rw"}},
        ["/srv/{username}:/data:rw"],
    ],
)
def test_volumes_are_written_as_in_dockerspawner_or_as_ours(volumes: Any) -> None:
    (found,) = spawner(volumes=volumes)._volumes()
    assert found == Volume(source="/srv/ann", target="/data", readonly=False)


@pytest.mark.parametrize("name", ["..", "a/b", ".ssh", "a:/etc"])
def test_no_users_name_leads_a_volume_elsewhere(name: str) -> None:
    asked = spawner(volumes={"/srv/{username}": "/data"})
    asked.user.name = name
    with pytest.raises(SpecError, match="plain name"):
        list(asked._volumes())
    asked.volumes = {"/srv/all": "/data"}
    assert [volume.source for volume in asked._volumes()] == ["/srv/all"]


def test_what_is_named_read_only_is_so_whatever_its_mode() -> None:
    asked = {"/srv/a": "/a", "/srv/b": {"bind": "/b", "mode": "rw"}}
    found = list(spawner(read_only_volumes=asked, volumes=["/srv/c:/c"])._volumes())
    assert [volume.readonly for volume in found] == [True, True, True]


@pytest.mark.parametrize("told", [5, {"bind": "/a", "mode": "z"}, {"bind": "/a", "more": 1}])
def test_a_volume_that_cannot_be_meant_is_refused(told: Any) -> None:
    with pytest.raises(SpecError, match="is not a volume"):
        list(spawner(volumes={"/srv/a": told})._volumes())


def test_a_box_has_the_devices_that_its_administrator_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert wish(spawner(devices=["a.b/gpu=0"]), monkeypatch).devices == ("a.b/gpu=0",)
    assert wish(spawner(), monkeypatch).devices == ()


def test_a_home_holds_what_the_administrator_says(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = wish(spawner(workdir_limit="10G", workdir_inode_limit=100_000), monkeypatch).box
    assert (asked.workdir_bytes, asked.workdir_inodes) == (10 << 30, 100_000)
    assert not wish(spawner(), monkeypatch).box.limits_workdir


def test_a_box_has_the_sizes_that_the_administrator_says_and_else_halves_of_its_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = {"shm_limit": "64M", "tmp_limit": 1 << 27, "disk_limit": "10G", "inode_limit": 9000}
    asked = wish(spawner(**sizes, disk_backend="image", mem_limit="1G"), monkeypatch).box
    assert (asked.shm_bytes, asked.tmp_bytes, asked.disk_bytes) == (64 << 20, 128 << 20, 10 << 30)
    assert (asked.inodes, asked.disk_backend) == (9000, DiskBackend.IMAGE)
    asked = wish(spawner(mem_limit="1G"), monkeypatch).box
    assert (asked.shm_bytes, asked.tmp_bytes, asked.disk_bytes) == (512 << 20, 512 << 20, None)


def test_a_server_has_its_way_to_the_hub_and_a_wish_that_cannot_be_meant_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = spawner(api_url="http://10.0.0.5:77/hub/api")
    assert (
        wish(made, monkeypatch).environment["JUPYTERHUB_API_URL"] == "http://127.0.0.1:77/hub/api"
    )
    made.cmd = ["bin/python"]
    with pytest.raises(SpecError, match="path is relative"):
        wish(made, monkeypatch)


def test_the_account_of_a_user_may_be_called_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    asked = spawner(username_template="no-such-{USERNAME}")
    wish(asked, monkeypatch)
    with pytest.raises(HostError, match="start a server for no-such-ann"):
        asyncio.run(asked._start())


def test_a_proxy_that_reaches_no_unix_socket_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    asked = spawner()
    proxy = type("TraefikFileProviderProxy", (), {"__module__": "jupyterhub_traefik_proxy.toml"})
    asked.user.settings["proxy"] = proxy()
    with pytest.raises(SpecError, match="through Traefik"):
        asked._check_hub()


def test_a_hub_without_the_rights_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(HostError, match="does not run as root"):
        spawner(launcher="local")._check_hub()
    spawner()._check_hub()  # which asks the broker


@pytest.mark.requires("root")
def test_a_hub_that_is_root_asks_no_broker() -> None:
    assert not spawner()._asks_broker
    with pytest.raises(HostError, match="needs no broker"):
        spawner(launcher="broker")._check_hub()


def test_where_no_broker_is_the_administrator_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    made = spawner(broker_socket=str(tmp_path / "socket"))
    asked = wish(made, monkeypatch)
    with pytest.raises(Silent, match="enable --now sandbox-broker"):
        asyncio.run(made._servers().start(asked, Stdio()))
    # Nor is a server forgotten that the next broker will find.
    made.load_state({"sandbox": {"id": "0" * 12, "init_pid": 1, "init_start": 1}})
    assert asyncio.run(made.poll()) is None


def test_a_server_that_is_stopped_while_there_is_no_broker_ends_when_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card = {"id": "0" * 12, "init_pid": 1, "init_start": 1}
    silent = Silent(attempt="ask", answer="nobody is there", remedy="Wait.")
    answers: list[Silent | None] = [silent, silent, silent, None]
    closed: list[Any] = []

    class Found:
        async def close(self) -> None:
            closed.append(card)

    def find(_: object, asked: Any) -> Found:
        assert asked == card
        if answer := answers.pop(0):
            raise answer
        return Found()

    monkeypatch.setattr(through_broker.BrokeredServers, "find", find)
    monkeypatch.setattr(through_broker, "_AGAIN_SECONDS", 0)
    made = spawner(launcher="broker")
    made.load_state({"sandbox": card})

    async def scene() -> None:
        await made.stop()
        assert not closed and len(answers) == 2  # the hub does not wait
        made.clear_state()
        assert await made.poll() == 0
        await asyncio.gather(*through_broker._closing)

    asyncio.run(scene())
    assert closed == [card]


def test_a_refused_server_is_a_line_of_the_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, str]] = []
    monkeypatch.setattr(audit, "_is_wanted", lambda: True)
    monkeypatch.setattr(audit, "_write", lambda event, line: told.append((event, line["person"])))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Exception, match="does not run as root"):
        asyncio.run(spawner(cmd=["jupyterhub-singleuser"], launcher="local").start())
    assert told == [("refusal", "ann")]


@pytest.mark.requires("root")
@pytest.mark.parametrize("options", [{"internal_ssl": True}, {"mem_guarantee": "1G"}])
def test_what_a_box_cannot_have_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=next(iter(options))):
        spawner(**options)._check_hub()


@pytest.mark.parametrize("url", ["https://hub:8081/hub/api", "http+unix://%2Frun%2Fhub/hub/api"])
def test_only_plain_http_is_carried_to_the_hub(url: str) -> None:
    with pytest.raises(SpecError, match="only plain HTTP over TCP"):
        spawner(api_url=url)._api_address()
    assert spawner(api_url="http://10.0.0.5/hub/api")._api_address() == ("10.0.0.5", 80)


def test_root_has_no_server_and_who_has_no_home_is_told() -> None:
    with pytest.raises(HostError, match="root's account"):
        account("root")
    with pytest.raises(HostError, match="no such user"):
        account("nobody-has-this-name")


# -- ways in and out


def test_the_ways_into_a_box_go_with_its_record(tmp_path: Path) -> None:
    runtime = tmp_path / "run"
    runtime.mkdir()
    first, other = Doors("a" * 12, runtime), Doors("b" * 12, runtime)
    for doors in (first, other):
        doors.make().close()
        assert sweep(runtime) == []  # somebody makes it
        (runtime / doors.path.name).mkdir()
        doors.made()
    assert sweep(runtime) == []
    assert os.readlink(f"{first.entrance}:80") == "s.sock"
    (runtime / first.path.name).rmdir()
    assert sweep(runtime) == [first.path.name]
    assert other.path.exists() and not first.path.exists()
    other.remove()
    other.remove()


@pytest.mark.requires("root")
def test_the_way_in_of_a_hub_that_is_not_root_is_its_accounts_alone(tmp_path: Path) -> None:
    runtime = tmp_path / "run"
    runtime.mkdir()
    doors = Doors("a" * 12, runtime, account=4330)
    doors.make().close()
    doors.note_hub(os.getpid())
    waiting = doors.waiting_hub()
    assert waiting is not None
    os.close(waiting)
    doors.hub_has_heard()
    assert doors.waiting_hub() is None
    status = doors.entrance.stat()
    assert (status.st_uid, status.st_mode & 0o777) == (4330, 0o600)
    for folder in doors.entrance.parents[:2]:  # which nobody else can change, or list
        assert (folder.stat().st_uid, folder.stat().st_mode & 0o777) == (0, 0o711)
    assert (tmp_path / "run-hub").stat().st_mode & 0o777 == 0o700
    doors.made()
    assert sweep(runtime) == [doors.path.name]
    assert not doors.entrance.parent.exists()


@pytest.mark.requires("root")
def test_what_a_killed_broker_was_making_goes_when_the_next_one_begins(tmp_path: Path) -> None:
    runtime = tmp_path / "run"
    runtime.mkdir()
    doors = Doors("a" * 12, runtime, account=4330)
    doors.make().close()
    doors.made()  # nobody holds it, and there is no record
    told: list[str] = []
    servers = ServersOfHub(str(runtime), str(tmp_path / "policy"), lambda *_, **__: told.append(""))

    async def scene() -> None:
        assert await servers.adopt() == []
        assert doors.entrance.exists()
        await servers.begin()

    asyncio.run(scene())
    assert not doors.path.exists() and not doors.entrance.parent.exists() and not told


class Taken:
    """The server of a box that was taken over; its parts do what the broker asks of them."""

    def __init__(self) -> None:
        self.kernels = self.handle = self
        self.has_begun, self.closed = asyncio.Event(), asyncio.Event()

    async def begin(self) -> None:
        self.has_begun.set()

    async def wait(self) -> None:
        await asyncio.Event().wait()

    async def let_go(self) -> None:
        pass

    async def close(self) -> None:
        self.closed.set()
        raise OSError(errno.EIO, "no disk")


def test_a_hub_that_dies_while_its_servers_are_taken_over_costs_no_other_one(
    tmp_path: Path,
) -> None:
    told: list[str] = []
    servers = ServersOfHub(
        str(tmp_path), str(tmp_path / "policy"), lambda event, **more: told.append(event)
    )

    async def scene() -> None:
        first, last = Taken(), Taken()
        dead, write = os.pipe()
        os.close(write)  # it can be read, as the pidfd of a hub that has ended
        servers._all["a"] = Had(server=first, person="ann", hub=dead)  # type: ignore[arg-type]
        servers._all["b"] = Had(server=last, person="ann")  # type: ignore[arg-type]

        async def begin() -> None:
            last.has_begun.set()
            await first.closed.wait()

        last.begin = begin  # type: ignore[method-assign]
        await servers.begin()
        assert first.has_begun.is_set() and last.has_begun.is_set()
        assert list(servers._all) == ["b"]
        await servers.let_go()

    asyncio.run(scene())
    assert told == ["warning", "removed"]


@pytest.mark.parametrize("is_heard_of", [True, False])
def test_a_server_of_which_a_hub_that_lives_never_hears_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_heard_of: bool
) -> None:
    asked: list[float] = []

    async def readable_within(_: int, seconds: float) -> bool:
        asked.append(seconds)
        if is_heard_of:
            await asyncio.Event().wait()
        return False  # it has not ended, and the time is over

    monkeypatch.setattr(for_hub, "readable_within", readable_within)
    servers = ServersOfHub(str(tmp_path), str(tmp_path / "policy"), lambda *_, **__: None)

    async def scene() -> bool:
        had = Had(server=Taken(), person="ann", hub=os.open("/dev/null", os.O_RDONLY))  # type: ignore[arg-type]
        if is_heard_of:
            had.heard.set()
        return await servers._is_heard_of(had)

    assert asyncio.run(scene()) is is_heard_of
    assert asked == [600]  # more than hubs wait for a server's first answer


def test_ways_into_boxes_that_others_could_reach_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run-hub").mkdir(mode=0o755)
    with pytest.raises(HostError, match="others than root can get into it"):
        Doors("a" * 12, tmp_path / "run").make()
    with pytest.raises(HostError, match="lower case"):
        Doors("a" * 12, tmp_path / "Run").make()


def test_a_relay_carries_both_ways_and_so_many_at_once(tmp_path: Path) -> None:
    most = 2
    ended: list[int] = []

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read())
        writer.close()
        await writer.wait_closed()
        ended.append(1)

    async def ask(text: bytes) -> bytes:
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))
        writer.write(text)
        writer.write_eof()
        answer = await reader.read()
        writer.close()
        return answer

    async def scene() -> None:
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        address = server.sockets[0].getsockname()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / "s"))
        listener.listen(8)
        dialled: list[int] = []

        async def dial() -> socket.socket:
            dialled.append(1)
            return await relay.dialled(socket.AF_INET, address)

        serving = asyncio.ensure_future(relay.Relay(listener, dial, most, apart).serve())
        texts = [bytes([65 + n]) * (1 << 18) for n in range(6)]
        assert await asyncio.gather(*map(ask, texts)) == texts
        dialled.clear()
        idle = [await asyncio.open_unix_connection(str(tmp_path / "s")) for _ in range(most)]
        waiting = asyncio.ensure_future(ask(b"x"))
        while len(dialled) < most:
            await asyncio.sleep(0)
        assert len(dialled) == most and not waiting.done()
        idle.pop()[1].close()
        assert await waiting == b"x"
        idle.pop()[1].close()
        while len(ended) < len(texts) + most + 1:
            await asyncio.sleep(0)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        server.close()

    asyncio.run(scene())


def test_a_servers_kernels_end_also_where_its_box_cannot_be_removed() -> None:
    """And its record goes last: by it the next broker, or hub, finds the kernels."""
    ended: list[str] = []

    class Stubborn:
        async def end(self) -> None:
            ended.append("box")

        async def close(self) -> None:
            ended.append("record")
            raise HostError(attempt="remove a group", answer="busy", remedy="Wait.")

    class Beside:
        async def end(self) -> None:
            ended.append("kernels")

    class Around:
        def remove(self) -> None:
            ended.append("doors")

    made = spawner()
    made._running = Server(Stubborn(), Around(), Beside())  # type: ignore[arg-type]
    with pytest.raises(HostError):
        asyncio.run(made._end())
    assert ended == ["box", "kernels", "record", "doors"]
