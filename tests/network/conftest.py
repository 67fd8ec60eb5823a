"""One world for all tests of this folder; each test has boxes of its own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from facilities import missing
from world import Box, World


@pytest.fixture(scope="session")
def _world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World | None]:
    """None where there can be none: each test says what it needs."""
    if missing("root") or missing("openssl"):
        yield None
        return
    world = World(tmp_path_factory.mktemp("world"))
    yield world
    world.close()


@pytest.fixture
def world(_world: World | None) -> World:
    """With an empty book of what was asked, and the names that tests use."""
    assert _world is not None
    _world.dns.zone.clear()
    _world.dns.stuck.clear()
    _world.dns.zone |= {
        "data.example.org": ["93.184.216.34"],
        "other.example.org": ["93.184.216.35"],
        "www.example.edu": ["93.184.216.34"],
    }
    _world.dns.asked.clear()
    _world.hosts.clear()
    _world.sni.clear()
    return _world


_numbers = itertools.count(1)


@pytest.fixture
def box(world: World) -> Iterator[Callable[..., Box]]:
    """``box(allow=[...], ...)``: one that the world's gateway serves."""
    made: list[Box] = []

    def new(**settings: Any) -> Box:
        made.append(Box(world.gateway, f"box-{next(_numbers)}", **settings))
        return made[-1]

    yield new
    for one in made:
        one.close()
    assert world.gateway.process.poll() is None
    assert "Traceback" not in world.gateway.log()
