"""The plan where there are no namespaces: what is refused, what is told, and in which order."""

from __future__ import annotations

import dataclasses

import pytest
from hosts import host_with
from test_plan import FACTS, FILES, WORKDIR, WORKDIR_FACTS, place_of

from sandbox_provisioner.errors import HostError, SpecError
from sandbox_provisioner.facilities.caps.cgroup import CgroupFacts
from sandbox_provisioner.facilities.landlock.tell import losses
from sandbox_provisioner.facilities.rights.plan.seccomp import (
    AUDIT_ARCH,
    SHARED,
    SHARED_CHECKED,
    SHARED_REFUSED,
    compile_filter,
    describe,
    verdicts,
)
from sandbox_provisioner.facilities.workdir.facts.covers import Covered
from sandbox_provisioner.host import VolumeFacts
from sandbox_provisioner.launcher.verbs import VERBS
from sandbox_provisioner.orders import compile_for
from sandbox_provisioner.plan import LaunchRequest, Site
from sandbox_provisioner.records import Record
from sandbox_provisioner.spec import Confinement, Limits, Network, NetworkWish, SandboxSpec, Volume

FOLDER = "/run/user/1000/sandbox-provisioner/abc"
ORDINARY = host_with(FACTS, uid=1000, gid=1000, privileged=False, home="/home/me", landlock=7)


def site_of(facts=ORDINARY, workdir=WORKDIR_FACTS, files=FILES, **changes):
    return Site(facts=facts, workdir=workdir, files=files, sockets=f"{FOLDER}/sockets", **changes)


def plan_of(site=None, limits=None, **options):
    spec = SandboxSpec(workdir=WORKDIR, confinement=Confinement.LANDLOCK, limits=limits or Limits())
    request = {
        "sandbox_id": "abc",
        "spec": spec,
        "argv": ("python3", "-c", "pass"),
        "environment": {},
        "cwd": WORKDIR,
        **options,
    }
    return compile_for(LaunchRequest(**request), site or site_of())


def verbs_of(plan):
    return [step.verb for step in plan.steps]


def rules_of(plan, kind):
    steps_ = (step for step in plan.steps if step.verb == "landlock-allow")
    return {path for step in steps_ if step.words[0] == kind for path in step.words[1:]}


def test_every_verb_is_one_of_the_launchers():
    verbs = set(verbs_of(plan_of(connection_file=("k.json", "k3y"), survive_server=True)))
    assert verbs <= {*VERBS, "fork-kernel"}


def test_nothing_of_it_needs_a_namespace_or_a_mount():
    verbs = set(verbs_of(plan_of()))
    assert not verbs & {"unshare", "unshare-user-namespace", "mount", "pivot", "attach", "take"}
    assert verbs_of(plan_of())[:2] == ["receive", "share-namespaces"]


def test_the_last_steps_lock_in_before_anything_of_the_kernels_runs():
    assert verbs_of(plan_of())[-3:] == ["landlock-restrict", "system-call-filter", "execute"]
    verbs = verbs_of(plan_of())
    assert verbs.index("renounce") < verbs.index("landlock-restrict")
    assert verbs.index("end-with-init") == verbs.index("fork-kernel") + 1


def test_only_the_work_directory_and_what_is_private_can_be_changed():
    plan = plan_of(connection_file=("k.json", "k3y"))
    private = {f"{FOLDER}/private/{name}" for name in ("home", "tmp", "jupyter")}
    assert rules_of(plan, "change") == {WORKDIR, *private}
    assert rules_of(plan, "bind") == {f"{FOLDER}/sockets"}
    assert "k3y" not in plan.describe()


def test_init_holds_what_every_rule_names():
    plan = plan_of()
    kept = next(step.words for step in plan.steps if step.verb == "keep-paths")
    assert set(kept) == set().union(*(rules_of(plan, k) for k in ("run", "read", "use", "change")))


def test_the_environment_leads_to_the_private_places():
    step = next(step for step in plan_of().steps if step.verb == "environment")
    assert f"HOME={FOLDER}/private/home" in step.words
    assert f"TMPDIR={FOLDER}/private/tmp" in step.words


@pytest.mark.parametrize("field", ["directories", "files", "links", "sockets", "frozen"])
def test_what_would_have_to_be_covered_refuses_the_work_directory(field):
    workdir = dataclasses.replace(WORKDIR_FACTS, covered=Covered(**{field: (".ssh",)}))
    with pytest.raises(SpecError, match=r"\.ssh.*Use a directory below it"):
        plan_of(site_of(workdir=workdir))


@pytest.mark.parametrize("mode", [Network.GATEWAY, Network.CARD])
def test_a_network_is_refused_since_there_is_no_namespace_for_it(mode):
    spec = SandboxSpec(
        workdir=WORKDIR, confinement=Confinement.LANDLOCK, network=NetworkWish(mode=mode)
    )
    with pytest.raises(SpecError, match=f'"{mode}".*Use confinement = "namespaces"'):
        plan_of(spec=spec)


@pytest.mark.parametrize("limits", [Limits(disk_bytes=1 << 30), Limits(inodes=1000)])
def test_a_limit_of_the_disk_is_refused_since_it_is_the_hosts(limits):
    spec = SandboxSpec(workdir=WORKDIR, confinement=Confinement.LANDLOCK, limits=limits)
    with pytest.raises(SpecError, match=r'disk_limit.*Use confinement = "namespaces"'):
        plan_of(spec=spec)


def test_an_environment_in_the_work_directory_is_refused():
    files = dataclasses.replace(FILES, readonly=(f"{WORKDIR}/venv",))
    with pytest.raises(SpecError, match="could be changed"):
        plan_of(site_of(files=files))


def test_a_volume_elsewhere_than_outside_is_refused():
    volume = Volume(source="/data", target="/other")
    facts = VolumeFacts(volume=volume, place=place_of("/data"), idmappable=False)
    with pytest.raises(SpecError, match="/data:/data"):
        plan_of(site_of(volumes=(facts,)))


@pytest.mark.parametrize(
    ("changes", "words"), [({"landlock": 0}, "lsm="), ({"uid": 0}, "ordinary user")]
)
def test_a_host_or_a_server_that_it_does_not_fit_is_refused(changes, words):
    with pytest.raises(HostError, match=words):
        plan_of(site_of(host_with(ORDINARY, **changes)))


def test_missing_namespaces_are_no_obstacle():
    obstacle = HostError(attempt="use namespaces", answer="no", remedy="none")
    assert plan_of(site_of(host_with(ORDINARY, obstacle=obstacle))).steps


def test_a_waived_cap_becomes_a_resource_limit():
    limits = Limits(pids=100, memory_bytes=1 << 30)
    missing = {"pids": "not writable", "memory": "not writable"}
    facts = host_with(ORDINARY, cgroups=CgroupFacts(version=0, bases={}, missing=missing))
    found = {step.words for step in plan_of(site_of(facts, user_tasks=7), limits).steps}
    wanted = {("nproc=107:107",), (f"data={1 << 30}:{1 << 30}",)}
    assert wanted <= found
    capped = {step.words for step in plan_of(limits=limits).steps}
    assert not wanted & capped


def test_what_is_lost_is_told_in_the_plan():
    text = plan_of().describe()
    assert all(lost in text for lost in losses(ORDINARY))
    assert "signals" not in " ".join(losses(ORDINARY))
    assert "signals" in " ".join(losses(host_with(ORDINARY, landlock=5)))


def test_a_sandbox_without_a_pid_namespace_is_not_ended_by_killing_its_init():
    assert Record(sandbox_id="a").end_signal == 9
    assert Record(sandbox_id="a", confinement="landlock").end_signal == 42


# -- its filter


@pytest.mark.parametrize("machine", AUDIT_ARCH)
def test_the_filter_for_it_is_another_one_and_fits(machine):
    program = compile_filter(machine, SHARED)
    assert program != compile_filter(machine)
    assert len(program) // 8 < 4096


def test_it_only_takes_away():
    usual, stricter = dict(verdicts()), dict(verdicts(SHARED))
    assert stricter.keys() == usual.keys()
    named = {name for refusal in SHARED_REFUSED for name in refusal.calls.split()}
    changed = {name for name in usual if usual[name] != stricter[name]}
    assert changed == named | SHARED_CHECKED.keys()


def test_it_is_told_in_words():
    assert "connect: EACCES" in describe(SHARED)
    assert "connect: EACCES" not in describe()
    assert "connect: EACCES" in plan_of().describe()
