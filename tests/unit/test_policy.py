"""The administrator's policy: what its file may say, on which line it is wrong, who gets what."""

from __future__ import annotations

import os
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox_provisioner.errors import SandboxError
from sandbox_provisioner.options import every_option
from sandbox_provisioner.policy import current, read
from sandbox_provisioner.policy.admission import Running, admit
from sandbox_provisioner.policy.lines import Lines
from sandbox_provisioner.policy.meaning import governed
from sandbox_provisioner.policy.narrow import covers_volume
from sandbox_provisioner.policy.person import Person
from sandbox_provisioner.policy.policy import Policy
from sandbox_provisioner.policy.terms import PolicyError, Terms
from sandbox_provisioner.spec import Volume

FILE = "/etc/jupyter/sandbox.toml"
GROUPS = {"ta", "students", "course"}
USERS = {"alice": 1000, "bob": 1001, "jupyterhub": 990, "toor": 0}
# Of the options those about which nothing is to decide: they are no power of the kernel's over
# anything, or no part of what a launcher is asked for.
UNGOVERNED = {
    "mem_interrupt", "workdir", "env_keep", "warm", "preload", "spares", "warm_idle_timeout",
    "start_timeout", "runtime_dir", "ends_file", "survive_server", "launcher", "broker_socket",
    "layer_dir", "review_days",
}  # fmt: skip
DOCUMENT = Path(__file__).parents[2] / "docs/policy.md"


def parsed(text: str) -> Policy:
    return read.parse_policy(text.encode(), FILE, GROUPS.__contains__, USERS.get)


def terms(text: str, name: str = "alice", *groups: str) -> Terms:
    return parsed(text).for_person(Person(name, 1000, groups))


def shown(found: Terms) -> dict[str, dict[str, tuple[str, int]]]:
    """By kinds and options, what counts and from which line."""
    kinds = {"defaults": found.defaults, "ceilings": found.ceilings, "forced": found.forced}
    return {
        kind: {option: (term.shown, term.line) for option, term in of_kind.items()}
        for kind, of_kind in kinds.items()
        if of_kind
    }


def test_every_option_is_one_that_a_policy_decides_about_or_known_not_to_be():
    assert set(every_option()) - set(governed()) == UNGOVERNED


# -- who gets what


PRECEDENCE = """\
[everyone.ceilings]
mem_limit = "4G"
pids_limit = 100
[everyone.defaults]
cpu_limit = 1
[group.ta.ceilings]
mem_limit = "8G"
[group.students.forced]
network = "none"
[group.students.ceilings]
mem_limit = "2G"
cpu_limit = 2
[user.alice.ceilings]
network = ["none", "gateway"]
[user.alice.defaults]
mem_limit = "3G"
"""


@pytest.mark.parametrize(
    ("name", "groups", "expected"),
    [
        ("bob", (), {
            "defaults": {"cpu_limit": ("1", 5)},
            "ceilings": {"mem_limit": ("4G", 2), "pids_limit": ("100", 3)},
        }),
        ("bob", ("students",), {
            "defaults": {"cpu_limit": ("1", 5)},
            "ceilings": {"mem_limit": ("2G", 11), "pids_limit": ("100", 3), "cpu_limit": ("2", 12)},
            "forced": {"network": ("none", 9)},
        }),
        # Of several groups the first of the file, whatever their order elsewhere; for each option.
        ("bob", ("students", "ta"), {
            "defaults": {"cpu_limit": ("1", 5)},
            "ceilings": {"mem_limit": ("8G", 7), "pids_limit": ("100", 3), "cpu_limit": ("2", 12)},
            "forced": {"network": ("none", 9)},
        }),
        # A user's own ceiling stands in for what a group has forced.
        ("alice", ("students",), {
            "defaults": {"cpu_limit": ("1", 5), "mem_limit": ("3G", 16)},
            "ceilings": {
                "mem_limit": ("2G", 11), "pids_limit": ("100", 3), "cpu_limit": ("2", 12),
                "network": ("none, gateway", 14),
            },
        }),
    ],
)  # fmt: skip
def test_a_user_comes_before_groups_these_before_everyone_and_the_first_group_first(
    name, groups, expected
):
    assert shown(terms(PRECEDENCE, name, *groups)) == expected


def test_sums_counts_and_what_becomes_of_more_are_found_in_the_same_order():
    text = """
    [everyone]
    kernels = 4
    on_excess = "refuse"
    sum = {mem_limit = "8G", cpu_limit = 4}
    [group.ta]
    kernels = 9
    sum.mem_limit = "16G"
    [user.alice]
    on_excess = "narrow"
    [host]
    mem_limit = "48G"
    """
    bob, alice = terms(text, "bob"), terms(text, "alice", "ta")
    assert (bob.kernels.fields, bob.on_excess) == ({"kernels": 4}, "refuse")
    assert (alice.kernels.fields, alice.on_excess) == ({"kernels": 9}, "narrow")
    assert (bob.sum.memory_bytes, bob.sum.cpu_cores) == (8 << 30, 4)
    assert (alice.sum.memory_bytes, alice.sum.cpu_cores) == (16 << 30, 4)
    assert alice.host_memory.fields == {"limits.memory_bytes": 48 << 30}


def test_the_name_of_whoever_it_is_stands_in_for_username():
    found = terms('[everyone.ceilings]\nvolumes = ["/scratch/{username}:/scratch:rw"]')
    assert found.ceilings["volumes"].fields == {
        "volumes": (Volume(source="/scratch/alice", target="/scratch", readonly=False),)
    }


def test_the_example_of_the_document_gives_what_the_document_says():
    text = DOCUMENT.read_text().partition("```toml\n")[2].partition("```")[0]
    both, alice = terms(text, "bob", "students", "ta"), terms(text, "alice")
    assert both.ceilings["mem_limit"].shown == "8G"
    assert both.forced["network"].shown == "none"
    assert (alice.kernels.fields, alice.host_kernels.fields) == ({"kernels": 10}, {"kernels": 60})
    moved = text.replace("[group.ta.ceilings]", '[group.ta.ceilings]\nnetwork = "gateway"')
    assert "network" not in terms(moved, "bob", "students", "ta").forced


# -- a hub that is not root


HUB = """\
[everyone]
kernels = 3
[hub]
account = "jupyterhub"
volumes = ["/srv/{username}:/mine:rw", "/srv/common:/common", "/opt/x:/x:rw,noexec"]
"""


def test_without_a_word_about_a_hub_there_is_none():
    assert parsed("[everyone]\nkernels = 3").hub is None


def test_a_hub_has_an_account_and_volumes_for_each_person():
    found = parsed(HUB).hub
    assert (found.account, found.line) == ("jupyterhub", 3)
    assert found.volumes_for("alice")[:2] == (
        Volume(source="/srv/alice", target="/mine", readonly=False),
        Volume(source="/srv/common", target="/common"),
    )
    assert parsed('[hub]\naccount = "jupyterhub"').hub.volumes_for("alice") == ()


def test_a_hub_is_for_everybody_or_for_groups():
    assert parsed(HUB).hub.groups is None and parsed(HUB).hub.is_for([])
    found = parsed('[hub]\naccount = "jupyterhub"\ngroups = ["students", "ta"]').hub
    assert found.groups == ("students", "ta")
    assert found.is_for(["x", "ta"]) and not found.is_for(["x"]) and not found.is_for([])


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ('{"/a" = {bind = "/b", mode = "rw"}, "/c" = "/d"}', ("/a:/b:rw", "/c:/d:ro")),
        ('"/a:/b"', ("/a:/b",)),
    ],
)
def test_other_spellings_of_volumes_are_the_same(written, found):
    hub = parsed(f'[hub]\naccount = "jupyterhub"\nvolumes = {written}').hub
    assert hub.volumes == found
    assert hub.volumes_for("alice")[0].source == "/a"


@pytest.mark.parametrize(
    ("text", "is_given"),
    [
        ("/srv/alice:/elsewhere:rw", True),
        ("/srv/alice/below:/x:ro", True),
        ("/srv/bob:/mine", False),
        ("/srv/alicea:/mine", False),
        ("/srv:/mine", False),
        ("/srv/common/a:/x", True),
        ("/srv/common:/common:rw", False),
        ("/opt/x:/x:rw", False),
        ("/opt/x:/x:ro,noexec", True),
    ],
)
def test_a_volume_is_given_that_lies_in_one_of_the_hubs_and_is_no_more(text, is_given):
    volume, given = Volume.parse(text), parsed(HUB).hub.volumes_for("alice")
    assert any(covers_volume(wide, volume) for wide in given) is is_given


@pytest.mark.parametrize("name", ["..", "a/b", "a:b", ""])
def test_a_name_that_leads_elsewhere_is_given_nothing(name):
    with pytest.raises(SandboxError, match="plain name"):
        parsed(HUB).hub.volumes_for(name)


# -- what is wrong with it


@pytest.mark.parametrize(
    ("text", "line", "answer"),
    [
        ("\n\nask = \n", 3, "no TOML"),
        ('ask = "help"\n[everyone', 2, "no TOML"),
        ('ask = """help', 1, "no TOML"),
        ("[everyone]\n[everyone]\n", 2, "no TOML"),
        ("\n[evryone]\n", 2, "no 'evryone'"),
        ("[everyone]\n\nkernel = 3", 3, "no 'kernel'"),
        ('[everyone.ceilings]\n# more\nmem_limt = "4G"', 3, "no such option"),
        ('[everyone]\nceilings = {cpu_limit = 1,\n mem_limt = "4G"}', 2, None),
        ('[everyone.ceilings]\nworkdir = "root"', 2, "no policy decides"),
        ('[everyone.ceilings]\nmem_limit = "4Q"', 2, "'4Q' is not a size"),
        ("[everyone.ceilings]\nmem_limit = true", 2, "mem_limit"),
        ("[everyone.ceilings]\nmem_limit = 1", 2, "1 is too small"),
        ("[everyone.ceilings]\nmem_limit = 2026-11-26", 2, "mem_limit"),
        ("[everyone.ceilings]\ncpu_limit = nan", 2, "nan is too small"),
        ('[everyone.ceilings]\nnetwork = ["none", "lan"]', 2, "lan"),
        ("[everyone.ceilings]\nnetwork = []", 2, "nothing to choose"),
        ('[everyone.ceilings]\nnetwork_allow = ["http://x/"]', 2, "a URL"),
        ('[everyone.ceilings]\nvolumes = ["data"]', 2, "not a volume"),
        ('[everyone.ceilings]\nnetwork_deny = ["all:25"]', 2, "nothing is more"),
        ("[everyone.ceilings]\nnetwork_audit = true", 2, "nothing is more"),
        ('[everyone.sum]\nnetwork = "none"', 2, "no such sum"),
        ('[everyone.sum]\nswap_limit = "1G"', 1, "no mem_limit"),
        ("[everyone]\nkernels = -1", 2, "not a number of kernels"),
        ("[everyone]\nkernels = true", 2, "not a number of kernels"),
        ('[everyone]\non_excess = "warn"', 2, "nothing that could become"),
        ("[everyone]\ndefaults = 3", 2, "no table"),
        ("[host]\nkernels = 1.5", 2, "not a number of kernels"),
        ('[host]\nmem_limit = "all"', 2, "not a size"),
        ("[host]\npids_limit = 5", 2, "no 'pids_limit'"),
        ("\n[group.nogroup]", 2, "no group 'nogroup'"),
        ('[group]\nta.kernels = 1\n"a b".kernels = 1', 3, "no group 'a b'"),
        ("[user.mallory]\nkernels = 3", 1, "no user 'mallory'"),
        ('[hub]\nvolumes = ["/a:/b"]', 1, "names no account"),
        ('\n[hub]\naccount = "hubert"', 3, "no user 'hubert'"),
        ('[hub]\naccount = ""', 2, "no user ''"),
        ('[hub]\naccount = "toor"', 2, "'toor' is root"),
        ('[hub]\naccount = ["jupyterhub"]', 2, "no text"),
        ('[hub]\naccount = "jupyterhub"\nusers = 3', 3, "no 'users'"),
        ('[hub]\naccount = "jupyterhub"\ngroups = []', 3, "no list of groups"),
        ('[hub]\naccount = "jupyterhub"\ngroups = "ta"', 3, "no list of groups"),
        ('[hub]\naccount = "jupyterhub"\ngroups = [3]', 3, "no list of groups"),
        ('[hub]\naccount = "jupyterhub"\ngroups = ["ta", "tas"]', 3, "no group 'tas'"),
        ("hub = 3", 1, "hub is no table"),
        ('[hub]\naccount = "jupyterhub"\nvolumes = ["data:/data"]', 3, "relative path"),
        ('[hub]\naccount = "jupyterhub"\nvolumes = ["/a:/b", "/c/../d:/d"]', 3, "not a plain"),
        ('[hub]\naccount = "jupyterhub"\nvolumes = ["/proc:/data"]', 3, "part of the system"),
        ('[hub]\naccount = "jupyterhub"\nvolumes = 3', 3, "volumes"),
        ('[hub]\naccount = "jupyterhub"\nvolumes = [3]', 3, "volumes"),
        ('ask = ["x"]', 1, "no text"),
        ('\naudit = "here.log"', 2, "nowhere"),
        # in two ways
        ('[everyone.forced]\nmem_limit = "1G"\n[everyone.ceilings]\nmem_limit = "2G"', 4, "forced"),
        ('[everyone.forced]\nmem_limit = "1G"\n[everyone.defaults]\nmem_limit = "1G"', 4, "forced"),
        (
            '[everyone.ceilings]\nmem_limit = "1G"\n[everyone.defaults]\nmem_limit = "2G"',
            4,
            "2G by default, and at most 1G",
        ),
        (
            '[everyone.forced]\nnetwork = "none"\nnetwork_allow = ["packages"]',
            3,
            "it has network_allow, and network",
        ),
    ],
)
def test_what_is_wrong_is_told_with_its_line_and_whom_to_ask(text, line, answer):
    with pytest.raises(PolicyError) as caught:
        parsed(text)
    told = caught.value
    assert told.line == line, told
    assert f"{FILE}, line {line}" in str(told)
    assert answer is None or answer in told.answer
    assert "Ask the administrator of this machine" in told.remedy
    assert "jupyter sandbox policy check" in told.remedy


def test_the_one_to_ask_is_whom_the_policy_names():
    with pytest.raises(PolicyError, match=r"Ask help@example\.edu, who"):
        parsed('ask = "help@example.edu"\n[everyone]\nkernels = "many"')


def test_a_text_that_is_no_text_and_one_too_deep_are_told_too():
    with pytest.raises(PolicyError, match="line 2: it is not UTF-8"):
        read.parse_policy(b"\n\xff", FILE)
    with pytest.raises(PolicyError):
        read.parse_policy(b"a = " + b"[" * 5000, FILE)


# -- its lines


_NAMES = st.sampled_from(
    ["mem_limit", "a", "b-c", "x y", 'q"t', "it's", "#no", "=", "[k]", "é", ""]
)
_VALUES = st.sampled_from([
    "1", '"x # y"', "'[a]'", '"""\n[no]\nb = 2\n"""', "'''\n# \" no\n'''", "[\n 1, # ]\n 2,\n]",
    '{ a = "}", b = [1, 2] }', "1979-05-27T07:32:00Z", '"\\"]"', '"""a\\""""', '""', "[]",
    '"""""two"""""', "[[1], ['''\n''']]",
])  # fmt: skip


def _quoted(name: str) -> str:
    if (
        name.replace("-", "").replace("_", "").isascii()
        and name.replace("-", "").replace("_", "").isalnum()
    ):
        return name
    return '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'


@st.composite
def texts(draw):
    """A TOML text, and the line of each of its keys."""
    text, lines = "", {}
    noise = st.sampled_from(["", "\n", "# [x]\n", "   \n", '# a = 1 "\n\n', "\r\n"])

    def add(path, piece):
        nonlocal text
        line = text.count("\n") + 1
        for length in range(1, len(path) + 1):
            lines.setdefault(path[:length], line)
        text += piece

    for table in [(), *draw(st.lists(_NAMES, unique=True, max_size=4))]:
        path = (table,) if table != () else ()
        text += draw(noise)
        if path:
            add(path, f"  [ {_quoted(table)} ] # = 3\n")
        for key in draw(st.lists(_NAMES, unique=True, max_size=4)):
            text += draw(noise)
            value = draw(_VALUES)
            if draw(st.booleans()):
                add((*path, key, "sub"), f"{_quoted(key)} . sub = {value} # end\n")
            else:
                add((*path, key), f"\t{_quoted(key)}= {value}\n")
    return text, lines


def _valid(text: str) -> bool:
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return False
    return True


@settings(max_examples=150, deadline=None)
@given(texts())
def test_each_key_is_found_on_its_line(case):
    text, lines = case
    if _valid(text):  # a key of the top may have the name of a table
        found = Lines(text.replace("\r\n", "\n"))
        assert {path: found.of(path) for path in lines} == lines
        assert found.paths() == set(lines)


def test_what_stands_in_a_value_has_the_line_of_the_value():
    found = Lines('a = 1\nb = {\n c = 1 }\n[[d]]\n"e.f" = 1\n')
    assert found.of(("b", "c")) == 2
    assert found.of(("d", "e.f")) == 5
    assert found.of(("nowhere",)) == 1


_WORDS = st.sampled_from(
    ["[everyone", ".ceilings]", "]", "[group.ta]", "[user.alice.sum]", "mem_limit", " = ", '"4G"',
     "network", '["none", "gateway"]', "kernels", "3", "\n", "\n", "#", '"""', "'", "{", "}", ",",
     "forced.", "volumes", '"/a:/b"', "\\", "é", "\0", "[host]", "nan", "-1", "on_excess",
     '"refuse"', "[hub]", "account", '"jupyterhub"', "[hub.volumes]"],
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.lists(_WORDS, max_size=30).map("".join), st.text(max_size=80)))
def test_any_text_is_a_policy_or_an_error_with_a_line_of_it(text):
    try:
        found = parsed(text)
    except PolicyError as error:
        assert 0 <= error.line <= text.replace("\r\n", "\n").count("\n") + 1
    except UnicodeEncodeError:
        pass  # surrogates are no file's
    else:
        found.for_person(Person("alice", 1000, ("ta",)))


# -- the file


def keeper(path: Path) -> current.PolicyKeeper:
    return current.PolicyKeeper(str(path), os.geteuid())


def test_without_a_file_there_is_no_policy(tmp_path):
    assert keeper(tmp_path / "none.toml").policy() is None
    assert keeper(tmp_path / "none.toml").terms(Person("alice", 1000)) is None


def test_a_file_is_read_again_when_it_changes_comes_or_goes_and_kept_otherwise(
    tmp_path, monkeypatch
):
    path, reads = tmp_path / "sandbox.toml", []
    real = current.read_policy
    monkeypatch.setattr(current, "read_policy", lambda *at: reads.append(at) or real(*at))
    kept, alice = keeper(path), Person("root", 0)
    assert kept.terms(alice) is None
    for count in (3, 4):
        path.write_text(f"[everyone]\nkernels = {count}\n# {'x' * count}")
        reads.clear()
        assert [kept.terms(alice).kernels.fields["kernels"] for _ in range(3)] == [count] * 3
        assert len(reads) == 1
    path.write_text("[everyone]\nkernels = 'x'")
    for _ in range(2):
        with pytest.raises(PolicyError):
            kept.terms(alice)
    path.unlink()
    assert kept.terms(alice) is None


def test_what_an_older_file_has_meant_is_not_kept_for_the_one_read_meanwhile(tmp_path, monkeypatch):
    path = tmp_path / "sandbox.toml"
    path.write_text("[everyone]\nkernels = 3")
    kept, root, real = keeper(path), Person("root", 0), current.Policy.for_person

    def for_person(policy, person):
        """Another start's thread comes in between."""
        path.write_text("[everyone]\nkernels = 4\n# changed")
        kept.policy()
        return real(policy, person)

    monkeypatch.setattr(current.Policy, "for_person", for_person)
    kept.terms(root)
    assert kept.terms(root).kernels.fields["kernels"] == 4


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_a_file_that_others_may_write_is_none_that_counts(tmp_path, mode):
    path = tmp_path / "sandbox.toml"
    path.touch()
    path.chmod(mode)
    with pytest.raises(PolicyError, match=f"with mode {mode:o}"):
        keeper(path).policy()


def test_a_file_of_somebody_else_is_none_that_counts(tmp_path):
    (tmp_path / "sandbox.toml").touch(0o644)
    with pytest.raises(PolicyError, match=f"it belongs to user {os.geteuid()}"):
        read.read_policy(str(tmp_path / "sandbox.toml"), os.geteuid() + 1)
    assert read.read_policy(str(tmp_path / "sandbox.toml"), None)  # a draft


def test_what_is_no_file_too_large_or_cannot_be_read_refuses_at_once(tmp_path):
    path = tmp_path / "sandbox.toml"
    os.mkfifo(path)
    with pytest.raises(PolicyError, match="it is no file"):
        keeper(path).policy()
    path.unlink()
    path.mkdir()
    with pytest.raises(PolicyError, match="it is no file"):
        keeper(path).policy()
    large = tmp_path / "large.toml"
    large.write_text("#" * (read.MOST_BYTES + 1))
    with pytest.raises(PolicyError, match="more than 256 KiB"):
        keeper(large).policy()
    (tmp_path / "loop.toml").symlink_to("loop.toml")
    with pytest.raises(PolicyError, match="symbolic links"):
        keeper(tmp_path / "loop.toml").policy()


@pytest.mark.ordinary_user
def test_a_user_who_may_not_read_it_is_told_so_and_gets_no_start(tmp_path):
    path = tmp_path / "sandbox.toml"
    path.touch(0o000)
    with pytest.raises(PolicyError, match=r"Permission denied.*chmod 644"):
        keeper(path).policy()


# -- room for one more

ROOM = '[everyone]\nkernels = 2\n[host]\nmem_limit = "8G"\nkernels = 5'
GIB = 1 << 30


def test_there_is_room_until_the_last_byte_and_the_last_kernel():
    found = terms(ROOM)
    running = [Running(person="bob", memory_bytes=4 * GIB)] * 1
    admit(found, Running(person="alice", memory_bytes=4 * GIB), running)
    running.append(Running(person="alice", memory_bytes=1 * GIB))
    with pytest.raises(SandboxError) as caught:
        admit(found, Running(person="alice", memory_bytes=4 * GIB), running)
    assert "the host has 3 GiB left for sandboxes, of 8 GiB" in caught.value.answer
    assert "you asked for 4 GiB" in caught.value.answer
    assert f"{FILE}, line 4" in caught.value.answer


def test_a_persons_own_kernels_are_counted_and_those_of_all():
    found = terms(ROOM)
    own, other = (Running(person=name, memory_bytes=GIB) for name in ("alice", "bob"))
    server = Running(person="alice", memory_bytes=GIB, kind="server")
    admit(found, own, [own, server])
    admit(found, server, [own, own])
    with pytest.raises(SandboxError, match="alice has 2, and may have 2 at once"):
        admit(found, own, [own, own])
    with pytest.raises(SandboxError, match="this machine has 5, and may have 5 at once"):
        admit(found, own, [other] * 5)


def test_servers_have_their_part_of_the_host_and_all_of_a_person_no_more_than_their_sum():
    found = terms('[host]\nmem_limit = "8G"')
    server = Running(person="alice", memory_bytes=None, sum_bytes=3 * GIB, kind="server")
    inside = Running(person="alice", memory_bytes=2 * GIB, sum_bytes=3 * GIB)
    admit(found, Running(person="bob", memory_bytes=5 * GIB), [server, inside, inside])
    admit(found, Running(person="bob", memory_bytes=5 * GIB), [inside, inside])
    admit(found, inside, [server, Running(person="bob", memory_bytes=5 * GIB)])
    with pytest.raises(SandboxError, match="has 3 GiB left for sandboxes, of 8 GiB"):
        admit(found, replace(server, person="bob", sum_bytes=4 * GIB),
              [server, Running(person="alice", memory_bytes=2 * GIB)])  # fmt: skip
    # Two below their sum have what they may have, and no more.
    small = Running(person="alice", memory_bytes=GIB, sum_bytes=30 * GIB)
    with pytest.raises(SandboxError, match="start a kernel with 7 GiB"):
        admit(found, replace(small, memory_bytes=7 * GIB), [small, small])
    with pytest.raises(SandboxError, match="start a server without a limit"):
        admit(found, Running(person="alice", memory_bytes=None, kind="server"), [])


def test_what_has_no_limit_has_no_room_on_a_host_that_has_one():
    with pytest.raises(SandboxError, match="without a limit on its memory"):
        admit(terms(ROOM), Running(person="alice", memory_bytes=None), [])
