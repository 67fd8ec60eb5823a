"""Many kernels of one server are alive at once, each with a network, forked by one nursery."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from boxes import run
from card_hosts import OTHER, PUBLIC, apart, eventually, listening, play_host, refusal
from test_card_for_real import SILENT, cards, kernel_request, nothing_is_left

from sandbox_provisioner import gateway_life
from sandbox_provisioner.contract import Labels, Warmth
from sandbox_provisioner.handle import LocalHandle
from sandbox_provisioner.launch import LaunchRequest, LocalLauncher
from sandbox_provisioner.spec import Network, NetworkWish
from sandbox_provisioner.stem import stem
from sandbox_provisioner.sweeping import sweep
from sandbox_provisioner.warm.make_nursery import make_nursery
from sandbox_provisioner.warm.start_from import start_warm

pytestmark = pytest.mark.requires("root")
# `python -m benchmarks network` has 200 of each.
MANY = 12


def request(workdir: Path, mode: Network) -> LaunchRequest:
    one = kernel_request(workdir)
    return replace(
        one, spec=replace(one.spec, network=NetworkWish(mode=mode, allow=(f"{PUBLIC}:80",)))
    )


def refusals(handle: LocalHandle) -> tuple[str, str]:
    """Why a program beside that kernel does not reach who is allowed, and who is not."""
    namespace = os.open(f"/proc/{handle.record.init_pid}/ns/net", os.O_RDONLY)
    try:
        return refusal(namespace, PUBLIC), refusal(namespace, OTHER)
    finally:
        os.close(namespace)


@pytest.mark.parametrize("mode", [Network.GATEWAY, Network.CARD])
def test_many_kernels_at_once_have_a_network_each_and_leave_nothing_of_it(
    workdir: Path, runtime_dir: Path, mode: Network
) -> None:
    is_card = mode is Network.CARD
    # A gateway accepts, and resets, which who connects may see already; a card answers in the place
    # of who would have.
    refused = {"Connection refused"} if is_card else {"", "Connection reset by peer"}

    def host() -> None:
        world, launcher = play_host(), LocalLauncher(runtime_dir=str(runtime_dir))
        wish = Warmth(idle_seconds=300)
        nursery = run(make_nursery(launcher, request(workdir, mode), Labels(), wish))
        alive = [
            run(start_warm(launcher, request(workdir, mode), Labels(), SILENT, Warmth()))
            for _ in range(MANY)
        ]
        with listening(world):
            assert {handle.record.nursery for handle in alive} == {nursery.record.sandbox_id}
            for allowed, other in map(refusals, alive):
                assert (allowed, other in refused) == ("", True), (allowed, other)
        assert len(cards()) == MANY * is_card
        for handle in alive:
            eventually(lambda one=handle: one.folder.read_counts().connections >= 1)
            eventually(lambda one=handle: one.folder.read_counts().refusals >= 1)
            run(handle.close())
        eventually(nothing_is_left)
        run(nursery.close())
        gateway_life.end_own()
        stem.end()

    apart(host)
    eventually(lambda: not sweep(runtime_dir) and os.listdir(runtime_dir) == ["lock"])
