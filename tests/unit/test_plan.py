"""From wishes and facts to the one list of steps."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hosts import host_with
from hypothesis import given
from hypothesis import strategies as st

from sandbox_provisioner.caller import Caller
from sandbox_provisioner.errors import HostError
from sandbox_provisioner.facilities.caps.cgroup import Bound, CgroupFacts
from sandbox_provisioner.facilities.environment.facts.kernel_files import KernelFiles
from sandbox_provisioner.facilities.ids.facts import IdRange
from sandbox_provisioner.facilities.workdir.facts.covers import Covered
from sandbox_provisioner.host import HostFacts, Machine, VolumeFacts, WorkdirFacts
from sandbox_provisioner.inside.wire import decode
from sandbox_provisioner.launcher.verbs import VERBS
from sandbox_provisioner.mounts import Mount
from sandbox_provisioner.orders import compile_for
from sandbox_provisioner.places import Place
from sandbox_provisioner.plan import LaunchRequest, Plan, Site, Step
from sandbox_provisioner.spec import WRITTEN_THROUGH, Limits, SandboxSpec, UserIds, Volume

WORKDIR = "/srv/me"
FIRST_ID = 0x70000000

FACTS = HostFacts(
    machine=Machine(
        kernel=(6, 18),
        architecture="x86_64",
        root_links={"/bin": "usr/bin"},
        system_directories=("/usr",),
        system_files=("/etc/localtime",),
    ),
    caller=Caller(uid=0, gid=0, home="/root", cwd="/", umask=0o022, environment={}),
    privileged=True,
    obstacle=None,
    cgroups=CgroupFacts(version=0, bases={}, missing={}),
    homes=frozenset(),
)
WORKDIR_PLACE = Place(
    path=WORKDIR,
    source=WORKDIR,
    fd=-1,
    device=1,
    inode=2,
    owner_uid=500,
    owner_gid=600,
    mount=Mount(1, 0, "/", "ext4"),
)
WORKDIR_FACTS = WorkdirFacts(
    place=WORKDIR_PLACE,
    idmappable=True,
)
FILES = KernelFiles(program="/usr/bin/python3", readonly=())


def changed(value, **changes):
    return dataclasses.replace(value, **changes)


def place_of(path, **changes):
    return changed(WORKDIR_PLACE, path=path, source=path, **changes)


def covering(**places):
    return changed(WORKDIR_FACTS, covered=Covered(**places))


def site_of(facts=FACTS, workdir=WORKDIR_FACTS, files=FILES, **changes):
    return Site(facts=facts, workdir=workdir, files=files, first_id=FIRST_ID, **changes)


ORDINARY = host_with(FACTS, uid=1000, gid=1001, privileged=False, home="/home/me")


def plan_of(site=None, **options):
    options = {
        "sandbox_id": "abc",
        "spec": SandboxSpec(workdir=WORKDIR),
        "argv": ("python3", "-c", "pass"),
        "environment": {},
        "cwd": WORKDIR,
        **options,
    }
    return compile_for(LaunchRequest(**options), site or site_of())


def verbs_of(plan):
    """The verbs in order, each run of the same one once."""
    found = []
    for step in plan.steps:
        if found[-1:] != [step.verb]:
            found.append(step.verb)
    return found


def words_of(plan, verb):
    return [step.words for step in plan.steps if step.verb == verb]


def taken_of(plan):
    """What is taken of the host, by its target inside, with the words that tell how."""
    takes = [words for verb in ("take", "take-place") for words in words_of(plan, verb)]
    alike = [
        (path, tuple(attributes.split(",")))
        for attributes, *paths in words_of(plan, "take-all")
        for path in paths
    ]
    return [*alike, *((words[0], words[1:]) for words in takes)]


def attached_of(plan):
    """The targets of what was taken, in the order in which it is put there."""
    return [target for targets in words_of(plan, "attach") for target in targets]


# -- the order of steps


def test_a_root_server_takes_mounts_before_it_enters_the_user_namespace():
    assert verbs_of(plan_of(site_of(join_files=("/cg/procs",)))) == [
        "receive", "exit-file", "join-cgroup", "oom-score", "resource-limits",
        "make-user-namespace", "take-all", "take-place", "enter-user-namespace",
        "unshare", "fork-init", "new-session", "new-root", "symlink", "attach", "file", "attach",
        "symlink", "mount", "own-limits", "freeze-paths", "show-only", "mask", "scratch", "pivot",
        "attach", "close-root", "hostname", "loopback-up", "stdio", "fork-kernel",
        "resource-limits", "umask", "become", "environment", "chdir",
        "system-call-filter", "execute",
    ]  # fmt: skip


def test_an_ordinary_user_takes_mounts_inside_the_user_namespace():
    assert verbs_of(plan_of(site_of(ORDINARY)))[:8] == [
        "receive", "exit-file", "oom-score", "resource-limits", "unshare-user-namespace",
        "unshare", "find-again", "take-all",
    ]  # fmt: skip


def test_a_jupyter_kernel_with_a_cap_is_watched_before_the_cgroup_is_out_of_reach():
    cap = 512 << 20
    limits = Limits(memory_bytes=cap, interrupt_share=0.92)
    spec = SandboxSpec(workdir=WORKDIR, limits=limits)
    site, file = site_of(memory_group=(1, "/cg/memory/abc")), ("kernel.json", "{}")
    plan = plan_of(site, spec=spec, connection_file=file)
    assert words_of(plan, "open-memory") == [("1", "/cg/memory/abc")]
    ((*words, sentence, killed),) = words_of(plan, "watch-memory")
    assert words == ["1", str(round(cap * 0.92)), str(cap), "1000", "1000"]
    assert "it uses {} of its memory limit of 512 MiB" in sentence
    assert "memory limit of 512 MiB" in " ".join(killed.split())
    verbs = verbs_of(plan)
    assert verbs.index("open-memory") < verbs.index("make-user-namespace")
    assert verbs.index("watch-memory") < verbs.index("fork-kernel")
    # Where nothing can be watched nothing is.
    assert not words_of(plan_of(spec=spec, connection_file=file), "watch-memory")


@pytest.mark.parametrize(("missing", "share"), [({}, 0), ({"swap": "not counted"}, 0.92)])
def test_who_has_no_swap_after_all_is_interrupted_before_its_cap(missing, share):
    """on_missing may allow a start without the swap that was asked for."""
    limits = Limits(
        memory_bytes=512 << 20, swap_bytes=1 << 30, interrupt_share=0.92, interrupt_by_default=True
    )
    facts = dataclasses.replace(FACTS, cgroups=dataclasses.replace(FACTS.cgroups, missing=missing))
    site = site_of(facts, memory_group=(1, "/cg/memory/abc"))
    spec = SandboxSpec(workdir=WORKDIR, limits=limits)
    plan = plan_of(site, spec=spec, connection_file=("kernel.json", "{}"))
    ((_, at, *_),) = words_of(plan, "watch-memory")
    assert at == str(round((512 << 20) * share))


def test_what_is_not_interrupted_is_watched_all_the_same_for_whose_kill_was_whose():
    """A command is no kernel; of another one nobody asked for an interrupt."""
    site, file = site_of(memory_group=(1, "/cg/memory/abc")), ("kernel.json", "{}")
    for share, connection_file in ((0.92, None), (None, file)):
        limits = Limits(memory_bytes=512 << 20, interrupt_share=share)
        spec = SandboxSpec(workdir=WORKDIR, limits=limits)
        plan = plan_of(site, spec=spec, connection_file=connection_file)
        ((_, at, *_, killed),) = words_of(plan, "watch-memory")
        assert at == "0"
        assert bool(killed) is bool(connection_file)


@pytest.mark.parametrize("facts", [FACTS, ORDINARY], ids=["root", "ordinary"])
def test_what_protects_comes_in_an_order_that_cannot_be_undone(facts):
    verbs = verbs_of(plan_of(site_of(facts)))
    for first, later in (
        ("unshare", "fork-init"),
        ("mask", "pivot"),
        ("pivot", "fork-kernel"),
        ("fork-kernel", "become"),
        ("become", "system-call-filter"),
        ("system-call-filter", "execute"),
    ):
        assert verbs.index(first) < verbs.index(later)
    assert verbs[-2:] == ["system-call-filter", "execute"]


def test_every_step_is_one_that_the_launcher_knows():
    everything = {
        "connection_file": ("kernel.json", "{}"),
        "survive_server": True,
        "terminal": True,
    }
    homes = changed(
        WORKDIR_FACTS,
        covered=Covered(
            directories=(".ssh",),
            files=(".bashrc",),
            links=(".profile",),
            placed=((".git/commondir", "."),),
            frozen=(".git/config",),
        ),
    )
    for facts in (FACTS, ORDINARY):
        plan = plan_of(site_of(facts, homes, join_files=("/cg/procs",)), **everything)
        assert {step.verb for step in plan.steps} <= {*VERBS, "fork-kernel"}


# -- identity


def test_the_owner_of_the_work_directory_appears_as_the_kernels_user():
    plan = plan_of()
    outside = FIRST_ID + 1000
    assert words_of(plan, "make-user-namespace") == [
        ("sandbox", f"0 {FIRST_ID} 65536", f"0 {FIRST_ID} 65536", str(FIRST_ID)),
        ("workdir", f"500 {outside} 1", f"600 {outside} 1"),
    ]
    assert words_of(plan, "take-place") == [(WORKDIR, "idmap=workdir", "nosuid", "nodev")]
    assert words_of(plan, "become") == [("1000", "1000")]


def test_without_id_mapped_mounts_the_kernel_is_the_owner_and_nobody_else():
    plan = plan_of(site_of(workdir=changed(WORKDIR_FACTS, idmappable=False)))
    assert words_of(plan, "make-user-namespace") == [
        (
            "sandbox",
            f"0 {FIRST_ID} 1000\n1000 500 1\n1001 {FIRST_ID + 1001} 64535",
            f"0 {FIRST_ID} 1000\n1000 600 1\n1001 {FIRST_ID + 1001} 64535",
            str(FIRST_ID),
        )
    ]


def test_root_is_never_mapped_in_even_where_ids_of_mounts_cannot_be():
    place = changed(WORKDIR_PLACE, owner_uid=0, mount=Mount(1, 0, "/", "nfs"))
    owned = changed(WORKDIR_FACTS, idmappable=False, place=place)
    with pytest.raises(HostError, match=r"belongs to root.*nfs.*chown"):
        plan_of(site_of(workdir=owned))


def test_a_mount_that_lets_in_nobody_but_who_mounted_it_is_refused_with_the_option_that_does():
    own = Mount(1, 0, "/", "fuse.sshfs", private=True)
    facts = changed(WORKDIR_FACTS, place=changed(WORKDIR_PLACE, mount=own))
    with pytest.raises(HostError, match=r"fuse\.sshfs which lets in nobody.*allow_other"):
        plan_of(site_of(workdir=facts))
    assert plan_of(site_of(ORDINARY, workdir=facts))  # there it is the user's own


def test_an_ordinary_user_maps_only_themselves():
    plan = plan_of(site_of(ORDINARY))
    assert words_of(plan, "unshare-user-namespace") == [("1000 1000 1", "1001 1001 1")]
    assert words_of(plan, "become") == [("1000", "1001")]


def test_a_containers_root_starts_kernels_that_are_nobodys_root():
    plan = plan_of(site_of(host_with(ORDINARY, uid=0, gid=0)))
    assert words_of(plan, "unshare-user-namespace") == [("1000 0 1", "1000 0 1")]
    assert words_of(plan, "become") == [("1000", "1000")]


def test_a_user_whose_group_is_roots_has_another_one_inside():
    plan = plan_of(site_of(host_with(ORDINARY, gid=0)))
    assert words_of(plan, "unshare-user-namespace") == [("1000 1000 1", "1000 0 1")]


RANGE = IdRange(first_uid=100000, first_gid=200000, newuidmap="/b/newuidmap", newgidmap="/b/g")


def test_a_range_is_mapped_by_helpers_around_the_users_own_id():
    plan = plan_of(
        site_of(ORDINARY, id_range=RANGE),
        spec=SandboxSpec(workdir=WORKDIR, user_ids=UserIds.RANGE),
    )
    assert words_of(plan, "map-user-namespace") == [
        (
            "/b/newuidmap",
            "/b/g",
            "0 100000 1000\n1000 1000 1\n1001 101001 64535",
            "0 200000 1001\n1001 1001 1\n1002 201002 64534",
        )
    ]
    assert words_of(plan, "unshare-user-namespace") == []
    assert verbs_of(plan)[4:7] == ["map-user-namespace", "unshare", "find-again"]
    assert words_of(plan, "become") == [("1000", "1001")]


def test_a_range_that_nobody_found_is_no_start():
    with pytest.raises(HostError, match="user_ids"):
        plan_of(site_of(ORDINARY), spec=SandboxSpec(workdir=WORKDIR, user_ids=UserIds.RANGE))


def test_a_root_server_has_its_own_ranges_whatever_is_asked():
    spec = SandboxSpec(workdir=WORKDIR, user_ids=UserIds.RANGE)
    assert plan_of(spec=spec) == plan_of()


def test_an_obstacle_of_the_host_is_raised_as_it_is():
    obstacle = HostError(attempt="try", answer="no", remedy="Wait.")
    with pytest.raises(HostError) as caught:
        plan_of(site_of(host_with(FACTS, obstacle=obstacle)))
    assert caught.value is obstacle


# -- mounts


@pytest.mark.parametrize("facts", [FACTS, ORDINARY])
def test_what_was_opened_is_mounted_and_never_looked_up_by_name(facts):
    """But where only a copy of its mount can be taken: then it has to be the same file."""
    data = Volume(source="/data", target="/d", readonly=False)
    volume = VolumeFacts(volume=data, place=place_of("/real/data", fd=9), idmappable=True)
    place = changed(WORKDIR_PLACE, fd=8, source="/real/me")
    workdir = changed(WORKDIR_FACTS, place=place)
    site = site_of(facts, workdir=workdir, volumes=(volume,))
    plan = plan_of(site)
    assert site.descriptors == (8, 9)
    assert plan.steps[0].words == (f"place:{WORKDIR}", "place:/d")
    assert [words[0] for words in words_of(plan, "take-place")] == [WORKDIR, "/d"]
    looked_up = [words[1] for words in words_of(plan, "take")]
    assert not {"/real/data", "/real/me", "/data", WORKDIR} & set(looked_up)
    again = [] if facts is FACTS else [(WORKDIR, "/real/me"), ("/d", "/real/data")]
    assert words_of(plan, "find-again") == again


def test_only_the_work_directory_and_the_sockets_are_taken_writable():
    takes = taken_of(plan_of(connection_file=("kernel.json", "{}")))
    writable = {target for target, how in takes if "readonly" not in how}
    assert {path for path in writable if not path.startswith("/dev/")} == {WORKDIR, "/run/kernel"}


def test_everything_taken_is_put_somewhere_and_only_once():
    for facts in (FACTS, ORDINARY):
        plan = plan_of(site_of(facts, files=changed(FILES, readonly=("/opt/env",))))
        taken = [target for target, _ in taken_of(plan)]
        attached = attached_of(plan)
        assert sorted(taken) == sorted(attached)
        assert len(set(taken)) == len(taken)


def test_an_environment_is_protected_though_the_whole_project_is_on_its_path():
    files = changed(FILES, readonly=(WORKDIR,), environment=(f"{WORKDIR}/.venv",))
    assert words_of(plan_of(site_of(files=files)), "protect") == [(".venv",)]


def test_what_is_protected_already_is_not_protected_twice():
    files = changed(FILES, readonly=(WORKDIR,), environment=(f"{WORKDIR}/.venv/lib",))
    plan = plan_of(site_of(workdir=covering(frozen=(".venv",)), files=files))
    assert words_of(plan, "protect") == [(".venv",)]


def test_a_project_that_the_work_directory_lies_in_does_not_hide_it():
    files = changed(FILES, readonly=("/srv", "/opt/env"))
    attached = attached_of(plan_of(site_of(files=files)))
    assert attached.index("/srv") < attached.index(WORKDIR) < attached.index("/opt/env")
    assert attached.count("/srv") == 1


def test_an_environment_outside_is_taken_and_one_in_the_work_directory_is_protected():
    paths = ("/opt/env", f"{WORKDIR}/.venv")
    files = changed(FILES, readonly=paths, environment=(f"{WORKDIR}/.venv",))
    plan = plan_of(site_of(files=files))
    assert "/opt/env" in [target for target, _ in taken_of(plan)]
    assert f"{WORKDIR}/.venv" not in [target for target, _ in taken_of(plan)]
    assert words_of(plan, "protect") == [(".venv",)]


def test_an_environment_behind_a_link_is_taken_by_the_path_that_was_judged():
    files = changed(FILES, readonly=("/opt/env", "/opt/link"), real={"/opt/link": "/opt/env-1"})
    taken = {words[0]: words for words in words_of(plan_of(site_of(files=files)), "take")}
    assert taken["/opt/link"][1] == "/opt/env-1"
    assert all("no-links" in taken[path] for path in ("/opt/env", "/opt/link"))


def test_an_environment_that_a_cover_hides_is_taken_apart():
    path = f"{WORKDIR}/.local/share/jupyter/env"
    workdir = covering(directories=(".local/share/jupyter",))
    plan = plan_of(site_of(workdir=workdir, files=changed(FILES, readonly=(path,))))
    assert path in [target for target, _ in taken_of(plan)]


def test_a_program_in_the_work_directory_itself_is_no_second_mount_of_it():
    plan = plan_of(site_of(files=changed(FILES, readonly=(WORKDIR,))))
    assert [target for target, _ in taken_of(plan)].count(WORKDIR) == 1


def test_room_in_memory_is_capped_in_bytes_and_in_files():
    limits = Limits(shm_bytes=1 << 20, tmp_bytes=1 << 30)
    plan = plan_of(spec=SandboxSpec(workdir=WORKDIR, limits=limits))
    shm = next(words for words in words_of(plan, "mount") if words[1] == "/dev/shm")
    assert shm[2] == "mode=1777,size=1048576,nr_inodes=320"
    assert words_of(plan, "scratch")[0][2] == "size=1073741824,nr_inodes=262208"


@pytest.mark.parametrize(
    ("cap", "above", "missing", "sizes"),
    [
        (3 << 30, None, {}, (3 << 29, 3 << 29)),
        (3 << 30, 1 << 30, {}, (1 << 29, 1 << 29)),  # a group above gives less
        (None, None, {}, (64 << 20, 1 << 30)),
        (3 << 30, None, {"memory": "not writable"}, (64 << 20, 1 << 30)),  # the default, given up
    ],
)
def test_room_in_memory_is_half_of_what_the_kernel_may_have_of_it(cap, above, missing, sizes):
    facts = dataclasses.replace(FACTS, cgroups=dataclasses.replace(FACTS.cgroups, missing=missing))
    bound = Bound(group="/ours", limit_bytes=above) if above else None
    spec = SandboxSpec(workdir=WORKDIR, limits=Limits(memory_bytes=cap))
    plan = plan_of(site_of(facts, memory_above=bound), spec=spec)
    shm = next(words for words in words_of(plan, "mount") if words[1] == "/dev/shm")
    found = shm[2], words_of(plan, "scratch")[0][2]
    assert [int(re.search(r"size=(\d+)", words)[1]) for words in found] == list(sizes)


# -- covers


def test_a_plain_work_directory_is_covered_by_nothing():
    assert words_of(plan_of(), "cover") == words_of(plan_of(), "protect") == []


def test_directories_and_files_are_covered_as_the_kernels_user():
    workdir = covering(
        directories=("me/.ssh",), files=("me/.bashrc",), links=("me/.profile", "you/.profile")
    )
    plan = plan_of(site_of(workdir=workdir))
    assert words_of(plan, "covers-of") == [(WORKDIR, "1000", "1000", WRITTEN_THROUGH)]
    assert words_of(plan, "make-folders") == [(f"me/{WRITTEN_THROUGH}", f"you/{WRITTEN_THROUGH}")]
    assert words_of(plan, "cover") == [
        ("link", "me/.profile", "you/.profile"),
        ("directory", "me/.ssh"),
        ("file", "me/.bashrc"),
    ]


def test_what_git_would_believe_is_there_before_it_is_protected():
    placed, path = ((".git/commondir", "."),), ".git/commondir"
    plan = plan_of(site_of(workdir=covering(placed=placed, frozen=(path,))))
    verbs = [step.verb for step in plan.steps]
    assert words_of(plan, "place") == [placed[0]]
    assert verbs.index("place") < verbs.index("protect")


def test_a_repositorys_settings_can_be_read_but_not_changed():
    plan = plan_of(site_of(workdir=covering(frozen=(".git/config",))))
    assert words_of(plan, "protect") == [(".git/config",)]


# -- the kernel


def test_the_home_inside_is_the_work_directory_only_where_it_is_the_servers_own():
    def home(site):
        (pairs,) = words_of(plan_of(site), "environment")
        return next(pair for pair in pairs if pair.startswith("HOME="))

    assert home(site_of()) == "HOME=/home/jovyan"
    assert home(site_of(real_home=WORKDIR)) == f"HOME={WORKDIR}"


def test_the_filter_is_that_of_the_machine():
    other = plan_of(site_of(host_with(FACTS, architecture="aarch64")))
    assert words_of(other, "system-call-filter") != words_of(plan_of(), "system-call-filter")


def test_the_program_is_the_one_that_was_found_and_its_words_are_kept():
    assert words_of(plan_of(), "execute") == [("/usr/bin/python3", "-c", "pass")]


# -- printing and encoding


def test_a_plan_for_people_hides_values_and_numbers_its_lines():
    environment = {"MY_TOKEN": "s3cret"}
    text = plan_of(environment=environment, connection_file=("kernel.json", "k3y")).describe()
    assert "s3cret" not in text
    assert "k3y" not in text
    assert "MY_TOKEN" in text
    assert ". oom-score 300\n       if the machine runs out, kernels go before" in text
    assert [int(line[:3]) for line in text.splitlines() if line[3:4] == "."][:3] == [1, 2, 3]
    assert "\n" + " " * 7 + "an allow-list of what the kernel may ask Linux" in text


def test_a_plan_for_people_tells_a_filter_in_lines():
    """Lines of ours: an end of line in a word of a start's is shown as what it is."""
    text = plan_of().describe()
    assert "\\x0a" not in text
    assert f"\n{' ' * 9}socketpair: family unix\n" in text
    hostile = Plan((Step("take", ("/a",), detail=("one\ntwo",)),)).describe()
    assert "one\\x0atwo" in hostile


def test_a_plan_for_people_cuts_long_words():
    step = Step("execute", ("x" * 100, "two\nlines"))
    assert step.describe() == f"execute {'x' * 57}... two\\nlines"


def test_the_same_wishes_make_the_same_plan():
    assert plan_of() == plan_of()


words = st.one_of(st.text(st.characters(codec="utf-8")), st.binary())
some_steps = st.lists(
    st.builds(Step, st.text(st.characters(codec="ascii")), st.tuples(words, words))
)


@given(some_steps)
def test_a_plan_arrives_in_the_launcher_as_it_left(made):
    def as_bytes(word):
        return word if isinstance(word, bytes) else word.encode()

    wanted = [[as_bytes(word) for word in (step.verb, *step.words)] for step in made]
    assert decode(Plan(tuple(made)).encode()) == wanted


def test_a_whole_plan_arrives_in_the_launcher_as_it_left():
    plan = plan_of()
    arrived = decode(plan.encode())
    assert [words[0].decode() for words in arrived] == [step.verb for step in plan.steps]


@pytest.mark.parametrize("text", [b"1", b"1#", b"x#", b"1#5", b"1#x:"])
def test_a_plan_that_was_cut_is_no_plan(text):
    with pytest.raises(ValueError):
        decode(text)
