"""facilities/namespaces/facts.py: which cause a refusal is put down to, and what lifts it."""

from __future__ import annotations

import dataclasses
import errno
from typing import Any

import pytest

from sandbox_provisioner.errors import HostError, LaunchError, SandboxError
from sandbox_provisioner.facilities.namespaces.facts import (
    APPARMOR,
    Surroundings,
    cause_of,
    forbidding_setting,
    masked_proc_cause,
    mount_cause,
)
from sandbox_provisioner.failures import failure_of
from sandbox_provisioner.host import HostFacts
from sandbox_provisioner.plan import TAKE_REMEDY, Step
from sandbox_provisioner.told import Cause

UNSHARE = "unshare(flags=CLONE_NEWUSER) failed: EPERM (Operation not permitted)"
CLONE = "clone(flags=CLONE_NEWUSER) failed: EPERM (Operation not permitted)"
WRITE = "write(file='/proc/self/uid_map', text='1 1 1') failed: EPERM (Operation not permitted)"
PROC = "fsmount(name='proc', attributes=MOUNT_NODEV) failed: EPERM (Operation not permitted)"
UBUNTU = {APPARMOR: "1"}


def around(sysctls: dict[str, str] | None = None, **changes: Any) -> Surroundings:
    return Surroundings(sysctls=sysctls or {}, **changes)


def cause(
    where: Surroundings, number: int = errno.EPERM, text: str = UNSHARE, *, privileged: bool = False
) -> Cause:
    return cause_of(number, text, where, privileged=privileged)


@pytest.mark.parametrize(
    ("where", "number", "text", "found", "remedy"),
    [
        (
            around({"user.max_user_namespaces": "0"}), errno.ENOSPC, UNSHARE,
            "user.max_user_namespaces is 0", "echo user.max_user_namespaces=28633 | sudo tee -a",
        ),
        (
            around({"kernel.unprivileged_userns_clone": "0"}, filtered=True), errno.EPERM, UNSHARE,
            "unprivileged_userns_clone is 0", "echo kernel.unprivileged_userns_clone=1 | sudo",
        ),
        (
            around({"user.max_net_namespaces": "0"}), errno.ENOSPC, UNSHARE,
            "user.max_net_namespaces is 0", "user.max_net_namespaces=28633",
        ),
        (around(), errno.ENOSPC, UNSHARE, "or they lie 32 deep", "max_user_namespaces"),
        (around(), errno.EINVAL, UNSHARE, "without user namespaces", "CONFIG_USER_NS=y"),
        (
            around(UBUNTU, profile="unconfined"), errno.EPERM, WRITE,
            "programs that have no profile", "install --apparmor-profile | sudo tee /etc/apparmor",
        ),
        (around(UBUNTU), errno.EACCES, UNSHARE, "no profile", "sudo apparmor_parser -r"),
        (
            around(UBUNTU, profile="unprivileged_userns (enforce)"), errno.EPERM, WRITE,
            "no profile", "--apparmor-profile",
        ),
        (
            around(UBUNTU, profile="docker-default (enforce)", container="docker"), errno.EACCES,
            WRITE, "profile docker-default of a Docker container", "apparmor=unconfined",
        ),
        (
            around(profile="snap.jupyter (enforce)"), errno.EACCES, WRITE,
            "profile snap.jupyter on this server", "sudo aa-disable snap.jupyter",
        ),
        (
            around(UBUNTU, filtered=True, container="docker"), errno.EPERM, UNSHARE,
            "filter (seccomp) of a Docker container", "docker run --security-opt seccomp=unconf",
        ),
        (
            around(filtered=True, container="podman"), errno.ENOSYS, UNSHARE,
            "filter (seccomp) of a Podman container", "podman run --security-opt seccomp=unconf",
        ),
        (
            around(filtered=True, container="kubernetes"), errno.EPERM, UNSHARE,
            "of a Kubernetes pod", "hostUsers: false, and in the container's securityContext: sec",
        ),
        (
            around(filtered=True, container="lxc"), errno.EPERM, UNSHARE,
            "a container (lxc)", "Docker: --security-opt seccomp=unconfined",
        ),
        (
            around(filtered=True), errno.EPERM, UNSHARE,
            "filter (seccomp) is on this server", "RestrictNamespaces=no",
        ),
        (around(chrooted=True), errno.EPERM, UNSHARE, "a chroot(2)", "outside"),
        (around(container="docker"), errno.EPERM, UNSHARE, "a Docker container forbids", "docker"),
        (around(), errno.EPERM, UNSHARE, "no setting", "journalctl -k -g denied"),
    ],
)  # fmt: skip
def test_each_refusal_is_put_down_to_what_is_in_force(
    where: Surroundings, number: int, text: str, found: str, remedy: str
) -> None:
    answer = cause(where, number, text)
    assert found in answer.found
    assert remedy in answer.remedy


def test_the_machines_root_is_not_bound_by_what_binds_others() -> None:
    settings = {**UBUNTU, "kernel.unprivileged_userns_clone": "0"}
    assert forbidding_setting(settings, privileged=True) is None
    assert "no setting" in cause(around(settings), privileged=True).found


def test_a_program_with_a_profile_that_allows_it_is_not_held_by_apparmor() -> None:
    allowed = around(UBUNTU, profile="jupyter-sandbox (unconfined)")
    assert not allowed.is_held_by_apparmor
    assert not allowed.is_confined
    assert around(UBUNTU, profile="unconfined").is_held_by_apparmor
    assert not around({APPARMOR: "0"}, profile="unconfined").is_held_by_apparmor


@pytest.mark.parametrize(
    ("container", "remedy"),
    [
        ("docker", "--security-opt systempaths=unconfined"),
        ("podman", "--security-opt unmask=ALL"),
        ("kubernetes", "procMount: Unmasked"),
        ("", "Podman: --security-opt unmask=ALL; Kubernetes: procMount: Unmasked with hostUsers"),
        ("", "Of a systemd service, set ProtectKernelTunables=no and ProtectKernelLogs=no."),
    ],
)
def test_a_masked_proc_is_told_with_each_engines_setting(container: str, remedy: str) -> None:
    found = masked_proc_cause(around(container=container, masks=("/proc/kcore", "/proc/scsi")))
    assert "(/proc/kcore, /proc/scsi)" in found.found
    assert remedy in found.remedy


def test_a_mount_is_put_down_to_a_container_only_where_one_holds_us() -> None:
    assert mount_cause(around(), privileged=False) is None
    assert mount_cause(around(filtered=True), privileged=False) is None
    filtered = mount_cause(around(filtered=True, container="docker"), privileged=False)
    assert filtered
    assert "forbids mounts" in filtered.found


def failure(
    verb: str, number: int, text: str, where: Surroundings, monkeypatch: pytest.MonkeyPatch
) -> SandboxError:
    class FakeSite:
        facts = dataclasses.replace(HostFacts.probe(), privileged=False)

    monkeypatch.setattr(Surroundings, "probe", classmethod(lambda _: where))
    step = Step(verb, remedy=TAKE_REMEDY if verb == "take" else "")
    return failure_of(step, number, text, FakeSite())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("verb", "number", "text", "kind", "told"),
    [
        ("unshare-user-namespace", errno.EPERM, UNSHARE, HostError, "forbids new namespaces"),
        ("unshare-user-namespace", errno.EINVAL, "unshare(x)", HostError, "CONFIG_USER_NS"),
        ("make-user-namespace", errno.EPERM, CLONE, HostError, "forbids new namespaces"),
        ("make-user-namespace", errno.EINVAL, CLONE, HostError, "CONFIG_USER_NS"),
        ("fork-init", errno.EINVAL, CLONE, LaunchError, "doctor"),
        ("unshare-user-namespace", errno.EINVAL, "write(x)", LaunchError, "doctor"),
        ("mount", errno.EPERM, PROC, HostError, "systempaths=unconfined"),
        ("new-root", errno.EACCES, "mount(x)", HostError, "forbids mounts"),
        ("take", errno.EACCES, "open_tree(x)", LaunchError, "Make the path readable"),
        ("mount", errno.ENOSPC, "fsmount(name='tmpfs'", LaunchError, "doctor"),
        ("map-user-namespace", errno.EPERM, "newuidmap(x)", HostError, "/etc/subgid give"),
        ("map-user-namespace", errno.EPERM, UNSHARE, HostError, "forbids new namespaces"),
    ],
)
def test_a_failed_step_is_this_machines_fault_only_where_it_forbids_it(
    verb: str, number: int, text: str, kind: type, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = around(filtered=True, container="docker")
    error = failure(verb, number, text, where, monkeypatch)
    assert type(error) is kind
    assert told in str(error)


def test_looking_around_answers_for_this_machine() -> None:
    found = Surroundings.probe()
    assert "user.max_user_namespaces" in found.sysctls
    assert not found.chrooted
    assert all(path.startswith("/proc/") for path in found.masks)
