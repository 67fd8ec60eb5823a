"""What the broker has ready for users: what a new broker makes of it, and how much it may be."""

from __future__ import annotations

import asyncio
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from sandbox_provisioner.broker import ahead
from sandbox_provisioner.broker.ahead import Job, Prepared
from sandbox_provisioner.errors import HostError
from sandbox_provisioner.handle import LastWord
from sandbox_provisioner.records import Record, RecordFolder
from sandbox_provisioner.warm.found import SOCKET, _last_words

NURSERY, KERNEL = "a" * 12, "b" * 12


class Handle:
    """That of a nursery whose PID 1 runs until it is killed."""

    def __init__(self, folder: RecordFolder, record: Record) -> None:
        self.folder, self.record = folder, record
        self.ended, self.closed = asyncio.Event(), asyncio.Event()

    def kill(self) -> None:
        self.ended.set()

    async def wait(self) -> None:
        await self.ended.wait()

    async def close(self) -> None:
        self.kill()
        self.closed.set()

    def let_go(self) -> None:
        """It stays."""


class Slow(Handle):
    """Its removal takes until it may *go_on*."""

    def __init__(self, folder: RecordFolder, record: Record) -> None:
        super().__init__(folder, record)
        self.removing, self.go_on = asyncio.Event(), asyncio.Event()

    async def close(self) -> None:
        self.removing.set()
        await self.go_on.wait()
        await super().close()


class Launcher:
    """Adopts *handle* alone."""

    def __init__(self, runtime: Path, handle: Handle) -> None:
        self._runtime, self._handle = runtime, handle

    def runtime(self) -> Path:
        return self._runtime

    def adopt(self, _: Path) -> Handle:
        return self._handle


def prepared() -> Any:
    return Prepared(lambda record: record.kind == "nursery", lambda *_, **__: None)


@pytest.mark.parametrize("has_kernel", [True, False])
def test_a_nursery_that_nobody_finds_ends_with_its_broker_unless_it_has_kernels(
    tmp_path: Path, has_kernel: bool
) -> None:
    """The program of one has ended, its PID 1 stays: in its PID namespace its kernels are."""
    record = Record(sandbox_id=NURSERY, kind="nursery", uid=7)
    kernel = Record(sandbox_id=KERNEL, nursery=NURSERY if has_kernel else "", uid=7)

    async def check() -> None:
        folder, made = RecordFolder(tmp_path / NURSERY), prepared()
        handle = Handle(folder, record)
        found = [(folder, record), (RecordFolder(tmp_path / KERNEL), kernel)]
        _last_words[NURSERY] = LastWord()
        await made.adopt(Launcher(tmp_path, handle), found)
        assert handle.ended.is_set() != has_kernel
        if has_kernel:
            assert made.handles(7) == [handle]
            handle.kill()
        await handle.closed.wait()
        assert NURSERY not in _last_words

    asyncio.run(check())


@pytest.mark.parametrize("lasts", [True, False], ids=["does-not-end", "cannot-be-removed"])
def test_no_broker_waits_long_for_what_another_one_left_half_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lasts: bool
) -> None:
    monkeypatch.setattr(ahead, "_PATIENCE_SECONDS", 0.01)

    class Stuck(Handle):
        def kill(self) -> None:
            if not lasts:
                self.ended.set()

        async def close(self) -> None:
            await self.wait()
            self.closed.set()
            raise HostError(attempt="end it", answer="no", remedy="None.")

    async def check() -> None:
        record = Record(sandbox_id=NURSERY, kind="nursery", uid=7)
        folder, made = RecordFolder(tmp_path / NURSERY), prepared()
        handle = Stuck(folder, record)
        await made.adopt(Launcher(tmp_path, handle), [(folder, record)])
        assert made.handles(7) == ([handle] if lasts else [])
        handle.ended.set()
        await handle.closed.wait()
        while made.handles(7):
            await asyncio.sleep(0)

    asyncio.run(check())


@pytest.mark.parametrize("is_cancelled", [True, False])
def test_what_is_not_made_is_dropped_once(
    monkeypatch: pytest.MonkeyPatch, is_cancelled: bool
) -> None:
    """It has some dozens of descriptors."""
    dropped: list[int] = []

    async def never() -> int:
        raise AssertionError

    async def check() -> None:
        waiting = asyncio.Event()

        async def idle(_: float) -> None:
            waiting.set()
            if not is_cancelled:
                raise OSError("nobody can tell how busy it is")
            await asyncio.Event().wait()

        monkeypatch.setattr(ahead, "idle", idle)
        made = prepared()
        made.want(Job(of=7, name=("a", "b"), make=never, drop=lambda: dropped.append(7)))
        await waiting.wait()
        if is_cancelled:
            await made.stop()
        while made._tasks:
            await asyncio.sleep(0)

    asyncio.run(check())
    assert dropped == [7]


@pytest.mark.parametrize("gives_up", [True, False], ids=["the-first-gives-up", "two-wait"])
def test_what_is_half_made_is_undone_however_often_it_is_given_up(
    monkeypatch: pytest.MonkeyPatch, gives_up: bool
) -> None:
    """A server's end is seen, and its hub asks for it: both end what is made for it."""

    async def idle(_: float) -> None:
        """It is."""

    async def check() -> None:
        made, begun, undoing, go_on = prepared(), *(asyncio.Event() for _ in range(3))
        undone = False

        async def make() -> int:
            nonlocal undone
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                undoing.set()
                await go_on.wait()
                undone = True
            return 1

        made.want(Job(of=7, name=("a", "b"), make=make, drop=lambda: None))
        await begun.wait()
        first = asyncio.ensure_future(made.end())
        await undoing.wait()
        if gives_up:
            first.cancel()
            await asyncio.wait([first])
        second = asyncio.ensure_future(made.end())
        await asyncio.wait([second], timeout=0.01)
        assert not second.done()
        go_on.set()
        await second
        assert undone

    monkeypatch.setattr(ahead, "idle", idle)
    asyncio.run(check())


def test_a_nursery_that_has_ended_takes_no_place_of_a_new_one(tmp_path: Path) -> None:
    """However many kernels of it there are."""

    async def check() -> None:
        made = prepared()
        with ExitStack() as opened:
            for number in range(ahead._MOST_NURSERIES):
                record = Record(sandbox_id=str(number) * 12, kind="nursery", uid=7)
                folder, _ = RecordFolder.create(tmp_path, record, ids=False)
                opened.callback(folder.remove)
                made.keep(7, Handle(folder, record))
                listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                opened.enter_context(listener)
                listener.bind(str(folder.path / SOCKET))
                listener.listen(1)
            assert "has 4 nurseries" in made.why_no_more(7)
            listener.close()
            assert made.why_no_more(7) == ""
        made.let_go()

    asyncio.run(check())


def test_whoever_ends_all_waits_also_for_what_was_ending_before(tmp_path: Path) -> None:
    """A nursery ends with its server by itself, and is not found any more while it is removed."""

    async def check() -> None:
        record = Record(sandbox_id=NURSERY, kind="nursery", uid=7)
        folder, _ = RecordFolder.create(tmp_path, record, ids=False)
        handle = Slow(folder, record)
        kept = prepared()
        kept.keep(7, handle)
        handle.kill()
        await handle.removing.wait()
        assert not kept.handles(7)
        end = asyncio.create_task(kept.end())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not end.done()
        handle.go_on.set()
        await end
        assert handle.closed.is_set()
        folder.remove()

    asyncio.run(check())


def test_a_nursery_is_removed_also_where_nobody_waits_for_it_any_more(tmp_path: Path) -> None:
    """Whoever ends the kernels of a server that has ended is cancelled where its end is asked for;
    who asks waits then."""

    async def check() -> None:
        made = prepared()
        record = Record(sandbox_id=NURSERY, kind="nursery", uid=7)
        handle = Slow(RecordFolder(tmp_path / NURSERY), record)
        made.keep(7, handle)
        first = asyncio.create_task(made.end())
        await handle.removing.wait()
        first.cancel()
        await asyncio.wait([first])
        assert first.cancelled()
        again = asyncio.create_task(made.end())
        done, _ = await asyncio.wait([again], timeout=0.05)
        assert not done and not handle.closed.is_set()
        handle.go_on.set()
        await again
        assert handle.closed.is_set()

    asyncio.run(check())


def test_of_a_user_whose_turn_is_over_nothing_is_kept() -> None:
    async def check() -> None:
        made, held = prepared(), []

        async def make() -> int:
            held.extend(made._turns)
            return 1

        assert await made.now(Job(of=7, name=("a", "b"), make=make, drop=lambda: None)) == 1
        assert (held, list(made._turns)) == ([7], [])

    asyncio.run(check())
