"""A gateway between a box and the world: what comes through, and what does not."""

from __future__ import annotations

import pytest
from world import ECHO

pytestmark = pytest.mark.requires("root", "ordinary-user")


def test_a_connection_to_an_allowed_name_comes_through(box):
    inside = box(allow=["data.example.org"])
    with inside.connect_to("data.example.org", ECHO) as one:
        one.sendall(b"\0hello")
        assert one.recv(10) == b"\0hello"
