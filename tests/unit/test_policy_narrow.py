"""What becomes of a wish under a policy: never more than its terms, never more than was wished."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.facilities.network.wish.rules import Rules
from sandbox_provisioner.policy import read
from sandbox_provisioner.policy.narrow import for_person, narrow, narrow_network, narrower_sum
from sandbox_provisioner.policy.person import Person
from sandbox_provisioner.policy.terms import Terms
from sandbox_provisioner.spec import (
    Confinement,
    Covers,
    Limits,
    Network,
    NetworkWish,
    OnMissing,
    SandboxSpec,
    Volume,
)

FILE = "/etc/jupyter/sandbox.toml"
GIB = 1 << 30


def terms(text: str) -> Terms:
    return read.parse_policy(text.encode(), FILE).for_person(Person("alice", 1000))


def spec(**parts) -> SandboxSpec:
    return SandboxSpec(workdir="/srv", **parts)


def gateway(*allow: str, **more) -> NetworkWish:
    return NetworkWish(mode=Network.GATEWAY, allow=allow, **more)


def test_without_a_word_about_it_a_wish_stays_as_it_is():
    wish = spec(limits=Limits(memory_bytes=GIB), network=gateway("all", up_bits=10**6))
    assert narrow(wish, terms("")) == (wish, ())


def test_a_ceiling_leaves_less_and_says_so_with_its_line():
    found, notices = narrow(
        spec(limits=Limits(memory_bytes=8 * GIB)), terms('[everyone.ceilings]\nmem_limit = "4G"')
    )
    assert found.limits.memory_bytes == 4 * GIB
    assert notices == (
        f"mem_limit is 4 GiB in place of 8 GiB, by the policy: {FILE}, line 2, "
        "[everyone.ceilings].",
    )


def test_what_a_person_reads_is_text_and_has_a_bound():
    policy = terms('ask = "the help desk"\n[everyone.ceilings]\nmem_limit = "4G"\nvolumes = []')
    assert for_person((), policy.ask) == ""
    volumes = tuple(Volume.parse(f"/data/{'x' * 200}{n}:/{n}\x1b[2J") for n in range(30))
    _, notices = narrow(spec(limits=Limits(memory_bytes=8 * GIB), volumes=volumes), policy)
    begin, memory, long, end = for_person(notices, policy.ask).split("\n")
    assert (begin[-1], memory, end) == (":", notices[0], "Ask the help desk for more.")
    assert long.startswith("volumes is empty in place of /data/xxx")
    assert len(long) == 300
    many = for_person(["\x1b]0;\n" * 900] * 50, "\x07" * 900).split("\n")
    assert many[-2] == "The server's log has 42 more of these."
    assert all(len(line) <= 320 and line.isprintable() for line in many)


def test_a_ceiling_holds_for_who_wished_no_limit_at_all():
    text = (
        '[everyone.ceilings]\nmem_limit = "4G"\ncpu_limit = 2\npids_limit = 99\n'
        'network_rate = "10M"\nnetwork_quota = "1G"\ncpuset = "0-1"'
    )
    found, _ = narrow(spec(network=gateway("all")), terms(text))
    limits, network = found.limits, found.network
    assert (limits.memory_bytes, limits.cpu_cores, limits.pids) == (4 * GIB, 2, 99)
    assert limits.cpuset == {0, 1}
    assert (network.up_bits, network.down_bits, network.quota_bytes) == (10**7, 10**7, GIB)


def test_a_ceiling_gives_nobody_more_than_there_is_without_it():
    """None of these is "without a limit"."""
    policy = terms('[everyone.ceilings]\nshm_limit = "4G"\ntmp_limit = "200M"\nswap_limit = "1G"')
    sizes = {"swap_limit", "shm_limit", "tmp_limit"}
    limits = Limits(memory_bytes=GIB)
    for untouched in (sizes, set()):
        found, notices = narrow(spec(limits=limits, untouched=frozenset(untouched)), policy)
        assert (found.limits.swap_bytes, found.limits.shm_bytes) == (0, GIB // 2)
        assert found.limits.tmp_bytes == 200 << 20
        said = ["tmp_limit is 200 MiB in place of 512 MiB"] if not untouched else []
        assert [notice.partition(", by")[0] for notice in notices] == said
    found, _ = narrow(spec(), terms('[everyone.ceilings]\nshm_limit = "4G"\ntmp_limit = "2G"'))
    assert (found.limits.shm_bytes, found.limits.tmp_bytes) == (64 << 20, GIB)
    both = terms('[everyone.ceilings]\nmem_limit = "100M"\nshm_limit = "4G"')
    assert narrow(spec(limits=limits), both)[0].limits.shm_bytes == 50 << 20


def test_what_is_said_of_kernels_alone_keeps_no_box_of_a_person_from_its_network():
    wish = spec(network=gateway("all"))
    policy = terms('[everyone.ceilings]\nswap_limit = "1G"\nnetwork = "gateway"')
    assert narrow_network(wish, policy) == (wish, ())


def test_a_policy_that_refuses_names_what_may_be_had_and_whom_to_ask():
    text = 'ask = "help@x.edu"\n[everyone]\non_excess = "refuse"\nceilings.mem_limit = "4G"'
    with pytest.raises(SpecError) as caught:
        narrow(spec(limits=Limits(memory_bytes=8 * GIB)), terms(text))
    assert str(caught.value) == (
        "Could not start with mem_limit = 8 GiB: alice may have 4 GiB "
        f"({FILE}, line 4, [everyone.ceilings]). Ask for that, or ask help@x.edu for more."
    )
    # Who has not asked for anything has not asked for more.
    wish = spec(limits=Limits(memory_bytes=8 * GIB), untouched=frozenset({"mem_limit"}))
    found, notices = narrow(wish, terms(text))
    assert (found.limits.memory_bytes, notices) == (4 * GIB, ())


def test_a_default_is_for_options_that_nobody_has_set():
    policy = terms('[everyone.defaults]\nmem_limit = "1G"\nnetwork = "gateway"')
    asked = spec(limits=Limits(memory_bytes=2 * GIB))
    assert narrow(asked, policy) == (asked, ())
    found, notices = narrow(replace(asked, untouched=frozenset({"mem_limit", "network"})), policy)
    assert (found.limits.memory_bytes, found.network.mode) == (GIB, Network.GATEWAY)
    assert notices == ()


def test_a_default_of_one_section_is_no_more_than_the_ceiling_of_another(tmp_path):
    text = '[everyone.defaults]\nmem_limit = "8G"\n[user.root.ceilings]\nmem_limit = "2G"'
    policy = read.parse_policy(text.encode(), FILE).for_person(Person("root", 0))
    found, notices = narrow(spec(untouched=frozenset({"mem_limit"})), policy)
    assert (found.limits.memory_bytes, notices) == (2 * GIB, ())


def test_a_cap_of_the_policy_is_none_that_a_start_does_without():
    """Neither since it was a default, nor since the user's on_missing allows it."""
    wish = spec(
        limits=Limits(memory_bytes=GIB, pids=100, by_default=frozenset({"memory", "pids"})),
        on_missing={"memory": OnMissing.WARN, "cpu": OnMissing.WARN},
        untouched=frozenset({"mem_limit"}),
    )
    found, notices = narrow(wish, terms('[everyone.ceilings]\nmem_limit = "4G"'))
    assert found.limits.by_default == {"pids"}
    assert found.on_missing == {"cpu": OnMissing.WARN}
    assert [notice.partition(" is ")[0] for notice in notices] == ["on_missing"]
    allowed = terms('[everyone]\nceilings.mem_limit = "4G"\nforced.on_missing = {memory = "warn"}')
    assert narrow(wish, allowed)[0].on_missing == {"memory": OnMissing.WARN}


@pytest.mark.parametrize(
    ("ceiling", "wished", "left"),
    [
        ('["none", "gateway"]', Network.CARD, Network.GATEWAY),
        ('["none", "gateway"]', Network.GATEWAY, Network.GATEWAY),
        ('["none", "gateway"]', Network.NONE, Network.NONE),
        ('"card"', Network.GATEWAY, Network.NONE),
        ('["gateway"]', Network.NONE, Network.NONE),
    ],
)
def test_of_a_choice_what_was_wished_is_left_or_the_nearest_that_is_stricter(ceiling, wished, left):
    found, _ = narrow(
        spec(network=NetworkWish(mode=wished)), terms(f"[everyone.ceilings]\nnetwork = {ceiling}")
    )
    assert found.network.mode is left


@pytest.mark.parametrize(
    ("ceiling", "wished", "left"),
    [
        ('["host", "physics"]', "physics", "physics"),
        ('["host", "physics"]', "/srv/roots/mine", "host"),
        ('["host", "physics"]', "host", "host"),
        ('["physics", "biology"]', "host", "biology"),
        ('["/srv/roots/a"]', "/srv/roots/b", "/srv/roots/a"),
    ],
)
def test_of_roots_only_those_are_left_that_are_listed(ceiling, wished, left):
    policy = terms(f"[everyone.ceilings]\nrootfs = {ceiling}")
    assert narrow(spec(rootfs=wished), policy)[0].rootfs == left


def test_a_confinement_that_is_weaker_can_be_kept_from_people():
    policy = terms('[everyone.ceilings]\nconfinement = "namespaces"')
    found, notices = narrow(spec(confinement=Confinement.LANDLOCK), policy)
    assert found.confinement is Confinement.NAMESPACES
    assert len(notices) == 1


def test_where_the_network_is_none_nothing_else_is_said_of_one():
    text = (
        '[everyone]\nforced = {network = "none"}\ndefaults = {}\n'
        'ceilings = {network_allow = ["packages"], network_rate = "1M"}'
    )
    found, notices = narrow(spec(network=gateway("all", audit=True)), terms(text))
    assert found.network == NetworkWish()
    assert [notice.partition(" is ")[0] for notice in notices] == ["network"]


@pytest.mark.parametrize(
    ("ceiling", "wished", "left"),
    [
        (["*.x.edu"], ["a.x.edu:443", "x.edu", "b.com"], ["a.x.edu:443"]),
        (["*.x.edu:443"], ["a.x.edu", "a.x.edu:443,80"], []),
        (["*.x.edu", "b.com:443"], ["all"], ["*.x.edu", "b.com:443"]),
        (["*.x.edu"], ["*.y.x.edu", "*.edu"], ["*.y.x.edu", "*.x.edu"]),
        (["all"], ["b.com", "packages", "10.0.0.0/8", "all:443"], ["b.com", "all:443"]),
        (["packages", "10.0.0.0/8"], ["packages", "10.0.0.0/8:22"], ["packages", "10.0.0.0/8:22"]),
        # A smaller range can name addresses that the larger one does not.
        (["0.0.0.0/0"], ["10.0.0.0/8", "1.2.3.4"], []),
        (["10.0.0.0/8"], ["0.0.0.0/0"], []),
    ],
)
def test_of_a_guest_list_what_the_ceiling_covers_is_left(ceiling, wished, left):
    found, notices = narrow(
        spec(network=gateway(*wished)), terms(f"[everyone.ceilings]\nnetwork_allow = {ceiling}")
    )
    assert list(found.network.allow) == left
    assert bool(notices) == (left != wished)


def test_of_volumes_what_lies_below_an_allowed_source_is_left_and_not_writable_unless_that_is():
    policy = terms('[everyone.ceilings]\nvolumes = ["/data:/data", "/work/{username}:/w:rw"]')
    wished = ("/data/a:/x", "/data:/y:rw", "/database:/z", "/work/alice/b:/b:rw", "/work:/c")
    found, notices = narrow(spec(volumes=tuple(map(Volume.parse, wished))), policy)
    # Nobody has opened /work/alice, which is a part of /work.
    left = ("/data/a:/x", "/work/alice/b:/b:rw")
    assert found.volumes == tuple(map(Volume.parse, left))
    assert len(notices) == 1


def test_of_volumes_whose_programs_may_not_run_those_of_others_are_left_out():
    policy = terms(
        '[everyone.ceilings.volumes]\n"/w/{username}" = {bind = "/w", mode = "rw,noexec"}'
    )
    wished = ("/w/alice:/a:rw", "/w/alice:/b:rw,noexec", "/w/alice:/c:noexec", "/w/bob:/d:noexec")
    found, _ = narrow(spec(volumes=tuple(map(Volume.parse, wished))), policy)
    assert found.volumes == tuple(map(Volume.parse, wished[1:3]))


def test_what_is_forced_is_so_and_of_a_restriction_is_added():
    text = (
        '[everyone.forced]\nnetwork = "gateway"\nnetwork_allow = ["packages"]\n'
        'network_deny = ["all:25"]\ncovered_directories = [".secrets"]\nmem_limit = "1G"'
    )
    wish = spec(
        limits=Limits(memory_bytes=GIB >> 1),
        network=gateway("all", deny=("bad.com",)),
        covers=Covers(home_directories=(".ssh",)),
    )
    found, notices = narrow(wish, terms(text))
    assert found.limits.memory_bytes == GIB
    assert (found.network.allow, found.network.deny) == (("packages",), ("bad.com", "all:25"))
    assert found.covers.home_directories == (".ssh", ".secrets")
    assert {notice.partition(" is ")[0] for notice in notices} == {"mem_limit", "network_allow"}


def test_a_box_of_all_that_is_a_persons_has_the_network_of_the_policy_and_its_sums():
    text = (
        'everyone.forced.network = "none"\n[everyone.sum]\nmem_limit = "4G"\ncpu_limit = 2\n'
        '[everyone.ceilings]\nmem_limit = "1G"\nvolumes = []\n[everyone]\non_excess = "narrow"'
    ).replace('[everyone]\non_excess = "narrow"', "")
    policy = terms(text)
    wish = spec(network=gateway("all"), volumes=(Volume.parse("/srv/way:/way"),))
    found, notices = narrow_network(wish, policy)
    assert found == replace(wish, network=NetworkWish())
    assert [notice.partition(" is ")[0] for notice in notices] == ["network"]
    wished = Limits(memory_bytes=8 * GIB, cpu_cores=1, pids=99)
    assert narrower_sum(wished, policy) == Limits(memory_bytes=4 * GIB, cpu_cores=1, pids=99)
    assert narrower_sum(Limits(), policy) == Limits(memory_bytes=4 * GIB, cpu_cores=2)


# -- whatever is wished, and whatever the policy says

_BYTES = st.sampled_from([32 << 20, GIB, 2 * GIB, 4 * GIB, 9 * GIB])
_RULES = st.sampled_from([
    "all", "all:443", "a.x.edu", "*.x.edu", "*.x.edu:443", "x.edu:80", "packages", "10.0.0.0/8",
    "10.1.0.0/16", "10.1.2.3", "0.0.0.0/0", "8.8.8.8", "[2001:db8::/32]:443",
])  # fmt: skip
_VOLUMES = st.sampled_from(["/data:/d", "/data/a:/e:rw", "/data/a/b:/f", "/x:/x", "/data:/g:rw"])
_MODES = st.sampled_from(["none", "gateway"])


@st.composite
def wishes(draw):
    mode = Network(draw(_MODES))
    network = NetworkWish()
    if mode is not Network.NONE:
        network = NetworkWish(
            mode=mode,
            allow=tuple(draw(st.lists(_RULES, unique=True, max_size=4))),
            up_bits=draw(st.sampled_from([0, 8000, 10**7])),
            quota_bytes=draw(st.sampled_from([0, 1 << 20, GIB])),
        )
    volumes = draw(st.lists(_VOLUMES, unique=True, max_size=3))
    return spec(
        limits=Limits(
            memory_bytes=draw(st.none() | _BYTES),
            cpu_cores=draw(st.none() | st.floats(0.01, 99)),
            pids=draw(st.none() | st.integers(8, 9999)),
            tmp_bytes=draw(_BYTES),
            disk_bytes=draw(st.none() | _BYTES),
            inodes=draw(st.none() | st.integers(128, 9999)),
            workdir_bytes=draw(st.none() | _BYTES),
            workdir_inodes=draw(st.none() | st.integers(128, 9999)),
            cpuset=draw(st.none() | st.frozensets(st.integers(0, 3), min_size=1)),
        ),
        network=network,
        volumes=tuple(map(Volume.parse, volumes)),
        untouched=draw(st.frozensets(st.sampled_from(["mem_limit", "network", "volumes"]))),
    )


@st.composite
def policies(draw):
    said = {
        "mem_limit": draw(st.none() | _BYTES),
        "cpu_limit": draw(st.none() | st.floats(0.01, 99)),
        "pids_limit": draw(st.none() | st.integers(8, 9999)),
        "tmp_limit": draw(st.none() | _BYTES),
        "disk_limit": draw(st.none() | _BYTES),
        "inode_limit": draw(st.none() | st.integers(128, 9999)),
        "workdir_limit": draw(st.none() | _BYTES),
        "workdir_inode_limit": draw(st.none() | st.integers(128, 9999)),
        "network_rate": draw(st.sampled_from([None, 8000, 10**6])),
        "network_quota": draw(st.sampled_from([None, 1 << 20, GIB])),
        "network": draw(st.none() | st.lists(_MODES, min_size=1, unique=True)),
        "network_allow": draw(st.none() | st.lists(_RULES, unique=True, max_size=3)),
        "volumes": draw(st.none() | st.lists(_VOLUMES, unique=True, max_size=3)),
        "cpuset": draw(st.sampled_from([None, '"0-1"', '"2,3"'])),
    }
    lines = (f"{name} = {value}" for name, value in said.items() if value is not None)
    return said, terms("[everyone.ceilings]\n" + "\n".join(lines))


def _no_more(value, most, wished):
    return most is None or (
        value is not None and value <= most and (wished is None or value <= wished)
    )


_PLACES = ("10.1.2.3", "10.9.9.9", "8.8.8.8", "127.0.0.1", "2001:db8::1", "93.184.216.34")


@settings(max_examples=200, deadline=None)
@given(wishes(), policies())
def test_nothing_is_ever_more_than_its_ceiling_or_than_was_wished(wish, policy):
    said, found_terms = policy
    found, notices = narrow(wish, found_terms)
    was, limits = wish.limits, found.limits
    assert _no_more(limits.memory_bytes, said["mem_limit"], was.memory_bytes)
    assert _no_more(limits.cpu_cores, said["cpu_limit"], was.cpu_cores)
    assert _no_more(limits.pids, said["pids_limit"], was.pids)
    assert _no_more(limits.tmp_bytes, said["tmp_limit"], was.tmp_bytes)
    assert _no_more(limits.disk_bytes, said["disk_limit"], was.disk_bytes)
    assert _no_more(limits.inodes, said["inode_limit"], was.inodes)
    assert _no_more(limits.workdir_bytes, said["workdir_limit"], was.workdir_bytes)
    assert _no_more(limits.workdir_inodes, said["workdir_inode_limit"], was.workdir_inodes)
    if found.network.mode is not Network.NONE:
        quota = found.network.quota_bytes
        assert quota or not (said["network_quota"] or wish.network.quota_bytes)
        assert quota <= (said["network_quota"] or quota)
        assert found.network.up_bits <= (said["network_rate"] or found.network.up_bits)
        assert "gateway" in (said["network"] or ["gateway"])
        assert wish.network.mode is Network.GATEWAY
    for volume in found.volumes:
        for most in (said["volumes"], None):
            sources = wish.volumes if most is None else tuple(map(Volume.parse, most))
            assert most is None or any(
                f"{volume.source}/".startswith(f"{one.source}/") and volume.readonly >= one.readonly
                for one in sources
            )
    if said["network_allow"] is not None:
        ceiling = Rules.read(r for r in said["network_allow"] if r != "packages")
        asked = Rules.read(r for r in wish.network.allow if r != "packages")
        left = Rules.read(r for r in found.network.allow if r != "packages")
        for name in (None, "a.x.edu", "x.edu", "b.com"):
            for place in _PLACES:
                for port in (80, 443):
                    if left.judge(name, place, port).allowed:
                        assert ceiling.judge(name, place, port).allowed, (name, place, port)
                        assert asked.judge(name, place, port).allowed, (name, place, port)
    # Once narrowed, there is nothing more to say.
    assert narrow(found, found_terms) == (found, ())
    if wish == found:
        assert notices == ()
