"""What a person may write as an option, and what it is understood as."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.facilities.caps.wish.cpuset import format_cpuset, parse_cpuset
from sandbox_provisioner.facilities.caps.wish.memory import SMALLEST_MEMORY_BYTES
from sandbox_provisioner.facilities.volumes.wish import as_texts, filled_in, without_mode
from sandbox_provisioner.spec import Covers, Limits, OnMissing, SandboxSpec, Volume, VolumeOfDevice
from sandbox_provisioner.units import format_bytes, parse_bytes

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (0, 0), (12, 12), (1.5, 1), ("12", 12), ("1K", KIB), ("512M", 512 * MIB), ("1G", GIB),
        ("1.5G", 3 * GIB // 2), ("0.5K", 512), ("2T", 2 << 40),
    ],
)  # fmt: skip
def test_sizes_are_read_as_jupyterhub_reads_them(written, meant):
    assert parse_bytes("mem_limit", written) == meant


@pytest.mark.parametrize(
    "written",
    ["", " ", "1g", "1GB", "1 G", "G", "-1", -1, "1e9", "1_000", "0x10", "1.G", ".5G", None, True,
     False, [], "１G", float("nan"), "1G\n"],
)  # fmt: skip
def test_what_is_no_size_is_refused_with_the_name_of_the_option(written):
    with pytest.raises(SpecError, match=r"mem_limit.*not a size"):
        parse_bytes("mem_limit", written)


def test_an_endless_size_is_refused():
    with pytest.raises(SpecError):
        parse_bytes("mem_limit", float("inf"))


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (KIB, "1 KiB"), (512 * MIB, "512 MiB"),
     (3 * GIB // 2, "1.5 GiB"), (5 << 40, "5 TiB")],
)  # fmt: skip
def test_sizes_are_shown_with_one_unit(count, shown):
    assert format_bytes(count) == shown


@pytest.mark.parametrize(
    ("written", "meant"),
    [("0", {0}), ("0-3,6", {0, 1, 2, 3, 6}), ("1,1", {1}), (" 0 , 2 ", {0, 2}), ("5-5", {5})],
)
def test_lists_of_cpus_are_read_as_linux_writes_them(written, meant):
    assert parse_cpuset(written) == meant


@pytest.mark.parametrize(
    "written",
    ["", ",", "a", "3-1", "-1", "1-", "0-", "0--1", "0-99999999", "1;2", "0x1", "0,,1", "1-2-3"],
)
def test_what_is_no_list_of_cpus_is_refused(written):
    with pytest.raises(SpecError, match="cpuset"):
        parse_cpuset(written)


@given(st.frozensets(st.integers(0, 4095), min_size=1, max_size=64))
def test_a_list_of_cpus_survives_being_written_and_read(cpus):
    assert parse_cpuset(format_cpuset(cpus)) == cpus


@given(st.text(max_size=20))
def test_no_text_at_all_crashes_a_reader(text):
    for read in (lambda: parse_bytes("mem_limit", text), lambda: parse_cpuset(text),
                 lambda: Volume.parse(text), lambda: SandboxSpec(workdir=text)):  # fmt: skip
        try:
            read()
        except SpecError as error:
            assert error.remedy


# -- limits


@pytest.mark.parametrize(
    ("wish", "name"),
    [
        ({"memory_bytes": SMALLEST_MEMORY_BYTES - 1}, "mem_limit"),
        ({"cpu_cores": 0.001}, "cpu_limit"),
        ({"cpu_cores": -1.0}, "cpu_limit"),
        ({"cpu_cores": float("nan")}, "cpu_limit"),
        ({"cpu_guarantee_cores": 0.0}, "cpu_guarantee"),
        ({"pids": 7}, "pids_limit"),
        ({"swap_bytes": MIB}, "swap_limit.*Set mem_limit too"),
        ({"io_bytes_per_second": 65535}, "io_limit"),
        ({"shm_bytes": 0}, "shm_limit"),
        ({"tmp_bytes": 4095}, "tmp_limit"),
        ({"cpuset": frozenset()}, "cpuset"),
    ],
)
def test_a_cap_that_cannot_be_meant_is_refused_by_its_options_name(wish, name):
    with pytest.raises(SpecError, match=name):
        Limits(**wish)


@pytest.mark.parametrize(
    ("limits", "count"),
    [
        (Limits(), None),
        (Limits(cpu_cores=0.5), 1),
        (Limits(cpu_cores=1.0), 1),
        (Limits(cpu_cores=1.5), 2),
        (Limits(cpuset=frozenset({0, 2, 3})), 3),
        (Limits(cpu_cores=8, cpuset=frozenset({0, 1})), 2),
        (Limits(cpu_cores=1, cpuset=frozenset({0, 1})), 1),
    ],
)
def test_threads_worth_starting_follow_from_the_caps(limits, count):
    assert limits.cpu_count == count


# -- volumes and paths


def test_a_volume_is_read_only_unless_it_says_rw():
    assert Volume.parse("/a:/b").readonly
    assert Volume.parse("/a:/b:ro").readonly
    assert Volume.parse("/a:/b:rw") == Volume(source="/a", target="/b", readonly=False)
    assert Volume.parse("/a:/b:noexec") == Volume(source="/a", target="/b", noexec=True)


@pytest.mark.parametrize("options", ["ro", "rw", "ro,noexec", "rw,noexec"])
def test_a_volumes_options_are_told_as_they_are_read(options):
    assert Volume.parse(f"/a:/b:{options}").options == options


@pytest.mark.parametrize(
    ("written", "texts"),
    [
        (["/a:/b", "/c:/d:rw"], ["/a:/b", "/c:/d:rw"]),
        ({"/a": "/b"}, ["/a:/b:ro"]),
        ({"/a": {"bind": "/b"}}, ["/a:/b:ro"]),
        ({"/a": {"bind": "/b", "mode": "rw"}, "/c": "/d"}, ["/a:/b:rw", "/c:/d:ro"]),
        ({"/a": {"bind": "/b", "mode": "ro,noexec"}}, ["/a:/b:ro,noexec"]),
    ],
)
def test_volumes_in_dockers_spelling_are_read_only_unless_they_say_rw(written, texts):
    assert as_texts(written) == texts


@pytest.mark.parametrize(
    "told", [5, None, [], "", "/b:rw", {}, {"bind": 1}, {"bind": "/b", "mode": ""},
             {"bind": "/b", "mode": "ro:rw"}, {"bind": "/b", "propagation": "shared"}],
)  # fmt: skip
def test_a_volume_in_dockers_spelling_that_cannot_be_meant_is_refused(told):
    with pytest.raises(SpecError, match="is not a volume"):
        as_texts({"/a": told})


def test_a_dictionarys_volumes_without_a_mode_are_known_for_a_sentence():
    written = {"/a": "/b", "/c": {"bind": "/d"}, "/e": {"bind": "/f", "mode": "ro"}}
    assert without_mode(written) == ["/a", "/c"]
    assert without_mode(["/a:/b"]) == []


@pytest.mark.parametrize(
    "name", ["..", ".", "", "a/b", "../b", "/etc", "a:/etc", ".ssh", "a\nb", "a\0"]
)
def test_no_users_name_leads_a_volume_elsewhere(name):
    assert filled_in("/srv/{username}:/data", "ann") == "/srv/ann:/data"
    assert filled_in("/srv/data:/data", name) == "/srv/data:/data"
    with pytest.raises(SpecError, match="plain name"):
        filled_in("/srv/{username}:/data", name)


@pytest.mark.parametrize(
    "written",
    ["", "/a", "a:/b", "/a:b", "/a:/b:rx", "/a:/b:rw:ro", "/a:/b/../c", "/a/./b:/c", "/a\n:/b",
     "/a:/b\0", ":", "::", "/a::rw", "~/a:/b", "/a:/b:RW", "/a:/b:", "/a:/b:ro,rw", "/a:/b:ro,ro",
     "/a:/b:noexec,", "/a:/b:suid", "/a:/b:dev", "/a:/b:rw,exec"],
)  # fmt: skip
def test_what_is_no_volume_is_refused(written):
    with pytest.raises(SpecError):
        Volume.parse(written)


@pytest.mark.parametrize("path", ["", "relative", ".", "/a/../b", "/a/.", "//a//b", "/a\0", "/a\n"])
def test_a_work_directory_is_an_absolute_plain_path(path):
    with pytest.raises(SpecError, match="work directory"):
        SandboxSpec(workdir=path)


def test_a_slash_at_the_end_is_fine():
    assert SandboxSpec(workdir="/srv/me/").workdir == "/srv/me/"


# -- covers and waivers


@pytest.mark.parametrize(
    "path", ["/etc", ".", "..", "../up", "a/../b", "./a", "a//b", "a/", "", "a" * 4097]
)
@pytest.mark.parametrize(
    "field",
    [
        "home_directories",
        "home_files",
        "home_frozen",
        "home_visible",
        "repository_directories",
        "repository_frozen",
    ],
)
def test_what_is_covered_is_a_plain_relative_path(field, path):
    with pytest.raises(SpecError, match="cover"):
        Covers(**{field: (path,)})


def test_what_is_placed_in_a_repository_is_a_plain_relative_path():
    with pytest.raises(SpecError, match="cover"):
        Covers(repository_placed=(("../config", ""),))


def test_a_name_that_only_begins_with_two_dots_can_be_covered():
    assert Covers(home_files=("..data",)).home_files == ("..data",)


def test_no_cover_stands_twice_or_hides_below_another():
    covers = Covers()
    paths = [*covers.home_directories, *covers.home_files, *covers.home_frozen]
    assert len(paths) == len(set(paths))
    inside = [p for p in paths for other in paths if p != other and p.startswith(f"{other}/")]
    assert inside == []


@pytest.mark.parametrize("name", [".ssh", ".jupyter", ".ipython", ".local/share/jupyter"])
def test_the_places_that_jupyter_runs_at_its_next_start_are_covered(name):
    assert name in Covers().home_directories


def test_isolation_itself_cannot_be_waived():
    for name in ("namespaces", "seccomp", "root", "Memory", ""):
        with pytest.raises(SpecError, match="not a cap that a start can do without"):
            SandboxSpec(workdir="/srv/me", on_missing={name: OnMissing.WARN})


def test_only_a_waived_facility_may_be_missing():
    choices = {"memory": OnMissing.WARN, "pids": OnMissing.REFUSE}
    spec = SandboxSpec(workdir="/srv/me", on_missing=choices)
    assert spec.may_lack("memory")
    assert not spec.may_lack("pids")
    assert not spec.may_lack("cpu")


@pytest.mark.parametrize("kind", [Limits, Covers, SandboxSpec, Volume])
def test_every_type_is_frozen(kind):
    assert dataclasses.fields(kind)
    assert kind.__dataclass_params__.frozen


@pytest.mark.parametrize(
    "text",
    ["/a:/", "/a:/etc", "/a:/etc/", "/a:/etc/x:rw", "/a:/etc/passwd", "/a:/etc/hosts/", "/a:/usr",
     "/:/host", "/proc/1:/p", "/sys:/s"],
)  # fmt: skip
def test_a_volume_neither_replaces_nor_shows_the_system(text):
    with pytest.raises(SpecError, match="a part of the system"):
        Volume.parse(text)


def test_what_comes_with_a_device_may_be_among_the_programs_read_only_and_nowhere_else():
    assert VolumeOfDevice(source="/usr/lib/a", target="/usr/lib/a").readonly
    for target, readonly in (("/usr/lib/a", False), ("/usr/lib", True), ("/bin/a", True)):
        with pytest.raises(SpecError, match="a part of the system"):
            VolumeOfDevice(source="/usr/lib/a", target=target, readonly=readonly)


def test_a_volume_may_show_more_of_etc_read_only():
    assert Volume.parse("/etc/profile.d:/etc/profile.d").target == "/etc/profile.d"


def test_what_of_a_home_no_kernel_writes_is_what_is_covered_and_not_made_visible():
    covers = Covers(home_directories=(".a", ".b/c", ".d"), home_files=(".e",), home_visible=(".b",))
    assert covers.guarded == {".a", ".d", ".e"}
    assert ".config" in Covers().guarded
    assert ".git" not in Covers().guarded
