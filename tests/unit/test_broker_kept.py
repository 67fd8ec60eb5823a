"""What outlives a user's kernels, asked for through the broker. None of it has run any."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from test_desk import DESK

from sandbox_provisioner.broker import kept as kept_module
from sandbox_provisioner.broker.desk import Desk
from sandbox_provisioner.broker.kept import Kept
from sandbox_provisioner.broker.kernels import Kernels
from sandbox_provisioner.broker.peer import Peer
from sandbox_provisioner.broker.wishes import Question
from sandbox_provisioner.errors import LaunchError
from sandbox_provisioner.layers import place
from sandbox_provisioner.layers.folders import REVIEW, About
from sandbox_provisioner.removal import ALWAYS, is_aside

ANN = Peer("ann", 4321, 4321, frozenset({4321}), "/home/ann")
NAME = "0123456789ab"
LAYER = "host"


def kernels_of(tmp_path: Path, desk: Desk) -> Kernels:
    return Kernels(str(tmp_path), str(tmp_path / "none"), lambda *_, **__: None, desk)


def leave(base: Path) -> None:
    """What a kernel has left for review in *base*, and a layer."""
    for path, about in (
        (base / REVIEW / NAME, asdict(About(sandbox_id=NAME, covers={}))),
        (base / "user" / str(ANN.uid) / LAYER, {}),
    ):
        path.mkdir(parents=True)
        (path / "lock").touch()
        (path / "about.json").write_text(json.dumps(about))


async def asked(kernels: Kernels, ask: str, **more: str) -> list[str]:
    """What is listed of it."""
    told, _ = await kernels.answer(ANN, Question(ask=ask, **more))
    return [one.get("sandbox_id") or one["name"] for one in told.get("kernels", ())]


def test_code_in_a_box_has_no_way_to_what_a_users_kernels_elsewhere_have_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have the usual place, and one uid."""
    monkeypatch.setattr(place, "STATE", tmp_path / "layers")
    monkeypatch.setenv("HOME", str(tmp_path / "layers"))
    public, boxed = kernels_of(tmp_path, Desk()), kernels_of(tmp_path, DESK)
    leave(Kept("", 14.0).base(ANN.uid))

    async def scene() -> None:
        assert await asked(public, "reviews") == [NAME]
        assert await asked(public, "layers") == [LAYER]
        assert await asked(boxed, "reviews") == await asked(boxed, "layers") == []
        for ask in ("discard", "review-about", "review-take", "review-upper"):
            with pytest.raises(LaunchError, match="no such kernel of this user"):
                await asked(boxed, ask, sandbox_id=NAME)
        with pytest.raises(LaunchError, match="none of this user's has that name"):
            await asked(boxed, "layer-reset", name=LAYER)
        assert await asked(public, "reviews") == [NAME]

    asyncio.run(scene())


def test_questions_of_one_user_have_so_many_threads_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To look at, or to remove, what kernels have left may take long."""
    begun, go = list[int](), threading.Event()
    kernels = kernels_of(tmp_path, replace(DESK))

    def answer(peer: Peer, *_: Any) -> tuple[dict[str, Any], int]:
        begun.append(peer.uid)
        go.wait()
        return {}, -1

    monkeypatch.setattr(kernels._kept, "answer", answer)

    async def scene() -> None:
        bob = replace(ANN, uid=ANN.uid + 1)
        asks = [Question(ask="reviews"), Question(ask="layers"), Question(ask="reviews")]
        waiting = [asyncio.ensure_future(kernels.answer(ANN, ask)) for ask in asks]
        waiting.append(asyncio.ensure_future(kernels.answer(bob, asks[0])))
        while len(begun) < DESK.together + 1 or bob.uid not in begun:
            await asyncio.sleep(0)
        found = sorted(begun)
        go.set()  # also where it is about to fail: who is cancelled waits for the threads
        assert found == [ANN.uid] * DESK.together + [bob.uid]
        await asyncio.gather(*waiting)
        assert len(begun) == 4

    asyncio.run(scene())


def test_who_asks_to_discard_very_much_waits_for_some_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest goes with the next sweep."""
    kept = Kept(str(tmp_path), 14.0)
    monkeypatch.setattr(kept_module, "_SECONDS", 0.0)
    leave(kept.base(ANN.uid))
    for folder, ask in (
        (kept.base(ANN.uid) / REVIEW, Question(ask="discard", sandbox_id=NAME)),
        (kept.base(ANN.uid) / "user" / str(ANN.uid), Question(ask="layer-reset", name=LAYER)),
    ):
        inside = next(folder.iterdir()) / "box"
        inside.mkdir()
        for number in range(ALWAYS + 10):
            (inside / f"{number}").touch()
        assert kept.answer(ANN, ask, lambda *_: None) == ({}, -1)
        (aside,) = folder.iterdir()
        assert is_aside(aside.name)
    kept.collect()
    assert not any(path.is_file() for path in kept.base(ANN.uid).rglob("box/*"))
