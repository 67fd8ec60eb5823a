"""Nurseries and spares of an ordinary user, who has no rights but in user namespaces."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from warmth import came_from, spares, state_of

from sandbox_provisioner.warm import ahead

pytestmark = [pytest.mark.requires("userns"), pytest.mark.ordinary_user]

# Without cgroups there is no cap on processes to be had.
OPTIONS = {"pids_limit": None, "spares": 1}


def test_an_ordinary_users_spare_passes_for_a_cold_kernel(
    warm: Any, kernel: Any, runtime_dir: Path, workdir: Path
) -> None:
    assert os.geteuid()
    with warm(**OPTIONS):
        ahead.wait()
    (spare,) = spares(runtime_dir)
    with kernel(warm=False, pids_limit=None) as cold, warm(**OPTIONS) as k:
        assert k.provisioner.handle.record.group == spare.sandbox_id
        cold_state, spare_state = state_of(cold), state_of(k)
        k.run("open('mine', 'w').close()")
    assert (workdir / "mine").stat().st_uid == os.geteuid()
    for key, value in cold_state.items():
        assert (key, spare_state[key]) == (key, value)


def test_an_ordinary_users_nursery_forks_kernels(warm: Any) -> None:
    options = OPTIONS | {"spares": 0}
    with warm(**options):
        ahead.wait()
    with warm(**options) as one, warm(**options) as other:
        assert came_from(one) == came_from(other) != ""
        assert one.run("6 * 7") == other.run("6 * 7") == "42"
