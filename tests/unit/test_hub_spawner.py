"""What a hub's configuration asks of our spawner, and the ways into a box; no hub runs."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sandbox_provisioner.errors import HostError, SpecError
from sandbox_provisioner.hub import relay
from sandbox_provisioner.hub.doors import Doors, sweep
from sandbox_provisioner.spec import Volume

pytestmark = pytest.mark.requires("jupyterhub")


def spawner(**options: Any) -> Any:
    from sandbox_provisioner.hub.spawner import SandboxSpawner

    user = SimpleNamespace(name="ann", url="/user/ann")
    hub = SimpleNamespace(api_url=options.pop("api_url", "http://127.0.0.1:8081/hub/api"))
    return SandboxSpawner(user=user, hub=hub, **options)


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


def test_what_is_named_read_only_is_so_whatever_its_mode() -> None:
    asked = {"/srv/a": "/a", "/srv/b": {"bind": "/b", "mode": "rw"}}
    found = list(spawner(read_only_volumes=asked, volumes=["/srv/c:/c"])._volumes())
    assert [volume.readonly for volume in found] == [True, True, True]


@pytest.mark.parametrize("told", [5, {"bind": "/a", "mode": "z"}, {"bind": "/a", "more": 1}])
def test_a_volume_that_cannot_be_meant_is_refused(told: Any) -> None:
    with pytest.raises(SpecError, match="is not a volume"):
        list(spawner(volumes={"/srv/a": told})._volumes())


def test_a_hub_without_the_rights_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(HostError, match="does not run as root"):
        spawner()._check_hub()


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
    from sandbox_provisioner.hub.spawner import _account

    with pytest.raises(HostError, match="root's account"):
        _account("root")
    with pytest.raises(HostError, match="no such user"):
        _account("nobody-has-this-name")


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

        serving = asyncio.ensure_future(relay.Relay(listener, dial, most).serve())
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
