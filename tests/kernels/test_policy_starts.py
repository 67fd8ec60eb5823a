"""An administrator's policy at real starts: caps that are less than asked for, and no room left."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.manager import KernelManager

from sandbox_provisioner.policy import current
from sandbox_provisioner.policy.person import Person
from sandbox_provisioner.provisioner import StartRefused
from sandbox_provisioner.records import Record, all_records

pytestmark = pytest.mark.requires("userns", "cgroup-memory")

MIB = 1 << 20


@pytest.fixture
def policy(monkeypatch: Any, new_folder: Any) -> Any:
    """``policy(text)`` writes it, where this process looks for one."""
    path = new_folder() / "sandbox.toml"
    keeper = current.PolicyKeeper(str(path), os.geteuid())
    monkeypatch.setattr(current, "_keeper", keeper)
    return path.write_text


def kernels_of(runtime_dir: Path) -> list[Record]:
    return [record for _, record in all_records(runtime_dir) if record.kind == "kernel"]


def test_a_kernel_that_asks_for_more_runs_with_what_it_may_have_and_the_log_says_so(
    kernel: Any, runtime_dir: Path, policy: Any, caplog: Any
) -> None:
    policy('[everyone.ceilings]\nmem_limit = "300M"')
    with caplog.at_level(logging.WARNING), kernel(mem_limit="1G") as k:
        (record,) = kernels_of(runtime_dir)
        assert record.memory_limit_bytes == 300 * MIB
        assert k.provisioner.handle.usage().memory_limit_bytes == 300 * MIB
    assert "mem_limit is 300 MiB in place of 1 GiB, by the policy" in caplog.text


@pytest.mark.requires("root")
def test_a_server_of_roots_asks_for_whom_a_hub_has_started_it(
    kernel: Any, runtime_dir: Path, policy: Any, monkeypatch: Any
) -> None:
    group = Person.find("daemon").groups[0]
    policy(f'[everyone.defaults]\nmem_limit = "400M"\n[group.{group}.defaults]\nmem_limit = "200M"')
    for name, expected in (("daemon", 200 * MIB), ("nobody", 400 * MIB)):
        monkeypatch.setenv("JUPYTERHUB_USER", name)
        with kernel():
            (record,) = kernels_of(runtime_dir)
            assert (record.person, record.memory_limit_bytes) == (name, expected)


def test_one_kernel_too_many_is_refused_with_the_figures_until_another_has_ended(
    kernel: Any, kernelspec: Any, runtime_dir: Path, policy: Any
) -> None:
    policy("[everyone]\nkernels = 1")
    with kernel(), pytest.raises(StartRefused) as caught, kernel():
        pass
    assert "has 1, and may have 1 at once" in " ".join(str(caught.value).split())
    with kernel() as k:
        first = k.provisioner.handle
        k.manager.restart_kernel()  # is not one more
        k.client.wait_for_ready(timeout=60)
        assert k.provisioner.handle is not first
    assert not kernels_of(runtime_dir)


@pytest.fixture
def one_kernel(policy: Any) -> None:
    """What is ready was made by the policy that there is."""
    policy("[everyone]\nkernels = 1")


def test_a_kernel_from_a_nursery_is_counted_too(
    one_kernel: None, warm: Any, nursery: Record, runtime_dir: Path
) -> None:
    with warm() as k:
        assert k.provisioner.handle.record.nursery == nursery.sandbox_id
        with pytest.raises(StartRefused, match="may have 1 at"), warm():
            pass
        assert len(kernels_of(runtime_dir)) == 1


def test_a_host_without_the_memory_that_is_asked_for_refuses_and_says_what_is_left(
    kernel: Any, runtime_dir: Path, policy: Any
) -> None:
    policy('[host]\nmem_limit = "1G"')
    with kernel(mem_limit="700M"):
        with pytest.raises(StartRefused) as caught, kernel(mem_limit="400M"):
            pass
        told = " ".join(str(caught.value).split())
        assert "the host has 324 MiB left for sandboxes, of 1 GiB" in told
        with kernel(mem_limit="300M"):
            assert len(kernels_of(runtime_dir)) == 2


def test_a_policy_that_is_wrong_refuses_every_start_and_leaves_nothing(
    kernelspec: Any, runtime_dir: Path, policy: Any
) -> None:
    policy('[everyone.ceilings]\nmem_limt = "1G"')
    manager = KernelManager(kernel_name=kernelspec())
    with pytest.raises(StartRefused) as caught:
        manager.start_kernel()
    told = str(caught.value)
    assert "line 2" in told
    assert "Ask the administrator of this machine" in told
    assert not all_records(runtime_dir)


@pytest.mark.requires("root")
def test_an_audit_has_a_line_for_each_start_refusal_and_end(
    kernel: Any, policy: Any, new_folder: Any
) -> None:
    file = new_folder() / "audit.jsonl"
    policy(f'audit = "{file}"\n[everyone]\nkernels = 1\nceilings.mem_limit = "300M"')
    with kernel(mem_limit="1G") as k:
        kernel_id = k.provisioner.kernel_id
        with pytest.raises(StartRefused), kernel():
            pass
    start, refusal, end = map(json.loads, file.read_text().splitlines())
    assert (start["event"], start["kernel_id"]) == ("start", kernel_id)
    assert (start["asked"]["mem_limit"], start["given"]["mem_limit"]) == ("1 GiB", "300 MiB")
    assert (refusal["event"], "may have 1 at once" in refusal["error"]) == ("refusal", True)
    assert (end["event"], end["kernel_id"], end["story"]["kind"]) == ("end", kernel_id, "asked")
