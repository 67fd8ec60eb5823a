"""Caps that nobody has asked for, and those that somebody has."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import golden
import pytest
from jupyter_client.kernelspec import KernelSpec
from traitlets.config import Config

from sandbox_provisioner import host
from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.facilities.caps.cgroup import CgroupFacts
from sandbox_provisioner.facilities.caps.plan import enforced, interrupt_share
from sandbox_provisioner.provisioner import SandboxProvisioner
from sandbox_provisioner.spec import Limits
from sandbox_provisioner.units import parse_share

GIB = 1 << 30
Wish = Callable[..., Limits]


@pytest.fixture
def wish(monkeypatch: pytest.MonkeyPatch) -> Wish:
    def limits_of(**options: Any) -> Limits:
        config = Config({"SandboxProvisioner": options})
        return SandboxProvisioner(config=config, kernel_spec=None).spec_for("/srv").limits

    monkeypatch.setattr(host.os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096}.get(name, 1 << 22))
    monkeypatch.setattr(host, "survey", lambda: CgroupFacts(version=0, bases={}, missing={}))
    return limits_of


def test_a_kernel_has_half_of_the_machines_memory_if_nobody_says_otherwise(wish: Wish) -> None:
    limits = wish()
    assert (limits.memory_bytes, limits.pids) == (8 * GIB, 512)
    assert limits.by_default == {"memory", "pids"}


def test_where_a_group_above_has_less_it_is_half_of_that(
    wish: Wish, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "memory_bounds", lambda facts: [4 * GIB, 1 << 62])
    assert wish().memory_bytes == 2 * GIB


def test_what_the_options_read_of_the_host_they_read_beside_the_loop(
    wish: Wish, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share of the memory is one of what the groups around this process have."""
    threads: list[threading.Thread] = []

    def look() -> CgroupFacts:
        threads.append(threading.current_thread())
        return CgroupFacts(version=0, bases={}, missing={})

    monkeypatch.setattr(host, "survey", look)
    spec = KernelSpec(argv=["python", "-m", "ipykernel_launcher"], display_name="boxed")
    provisioner = SandboxProvisioner(kernel_spec=spec)
    asyncio.run(provisioner._prepared({"cwd": "/srv", "env": {}}))
    assert provisioner.spec.limits.memory_bytes == 8 * GIB
    assert threads
    assert threading.current_thread() not in threads


@pytest.mark.parametrize(("value", "expected"), [("50%", 8 * GIB), ("25%", 4 * GIB), ("1G", GIB)])
def test_what_was_asked_for_is_asked_for_also_where_it_is_the_default(
    wish: Wish, value: str, expected: int
) -> None:
    limits = wish(mem_limit=value, pids_limit=512)
    assert (limits.memory_bytes, limits.pids) == (expected, 512)
    assert limits.by_default == frozenset()


def test_a_value_that_was_set_later_is_asked_for(wish: Wish) -> None:
    provisioner = SandboxProvisioner(kernel_spec=None)
    assert provisioner.spec_for("/srv").limits.by_default == {"memory", "pids"}
    provisioner.mem_limit = "1G"
    assert provisioner.spec_for("/srv").limits.by_default == {"pids"}


def test_without_a_cap_there_is_none(wish: Wish) -> None:
    limits = wish(mem_limit=None, pids_limit=None)
    assert (limits.memory_bytes, limits.pids, limits.by_default) == (None, None, frozenset())


@pytest.mark.parametrize(
    ("options", "missing", "share"),
    [
        ({}, "", 0.92),
        ({"swap_limit": "1G"}, "", None),
        ({"swap_limit": 0}, "", 0.92),
        ({"swap_limit": "1G", "mem_interrupt": 0.9}, "", 0.9),
        # It was waived: nothing comes beyond the cap on memory, which is enforced.
        ({"swap_limit": "1G", "on_missing": {"swap": "warn"}}, "swap", 0.92),
        ({"swap_limit": "1G", "mem_interrupt": 0}, "swap", None),
    ],
)
def test_who_may_swap_is_not_interrupted_before_unless_that_was_asked_for(
    wish: Wish, options: dict[str, Any], missing: str, share: float | None
) -> None:
    absent = {missing: "Linux does not count it"} if missing else {}
    cgroups = CgroupFacts(version=2, bases={}, missing=absent)
    facts = replace(golden.ROOT, cgroups=cgroups)
    assert interrupt_share(wish(**options), facts) == share


@pytest.mark.parametrize("value", ["0%", "101%", "-5%", "5 %", "%"])
def test_a_share_that_cannot_be_meant_is_refused(wish: Wish, value: str) -> None:
    with pytest.raises(SpecError, match="read mem_limit"):
        wish(mem_limit=value)


def test_a_share_is_told_from_a_size() -> None:
    assert [parse_share(text) for text in ("50%", "12.5%", "1G", 3)] == [0.5, 0.125, None, None]


def test_a_default_that_is_given_up_takes_the_swap_with_it_that_was_to_come_on_top():
    """Where neither can be had, and the administrator does without the swap."""
    limits = Limits(memory_bytes=1 << 30, swap_bytes=1 << 20, by_default=frozenset({"memory"}))
    missing = {"memory": "no controller of that name", "swap": "no controller of that name"}
    facts = replace(golden.USER, cgroups=CgroupFacts(version=2, bases={}, missing=missing))
    assert enforced(limits, facts).asked == []
    assert enforced(limits, golden.USER) == limits
