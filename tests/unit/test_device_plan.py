"""Devices: what may be asked for, what specifications may say, and the list as Linux takes it."""

from __future__ import annotations

import errno
import itertools
import json
import os
import stat
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from golden import ASKERS

from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.facilities.devices import facts, inside
from sandbox_provisioner.facilities.devices.facts import cdi, find_devices, libraries, nodes
from sandbox_provisioner.facilities.devices.plan import limit
from sandbox_provisioner.facilities.devices.plan.program import Allowed, program
from sandbox_provisioner.facilities.devices.wish import covers
from sandbox_provisioner.inside.kernel_calls import CallFailed
from sandbox_provisioner.plan import Start
from sandbox_provisioner.root_files import RootFiles
from sandbox_provisioner.spec import SandboxSpec

# -- names


@pytest.mark.parametrize("name", ["/dev/kvm", "nvidia.com/gpu=0", "amd.com/gpu=all", "a/b=c:0"])
def test_a_device_is_named_as_a_specification_or_a_node_is(name: str) -> None:
    assert SandboxSpec(workdir="/srv", devices=(name,)).devices == (name,)


@pytest.mark.parametrize(
    "name",
    ["", "kvm", "gpu=0", "nvidia.com/gpu", "nvidia.com/gpu=", "a/b=c d", "/dev/../etc/shadow",
     "/dev//kvm", "/dev/kvm/", "/dev/a\nb", "a/b=c=d", "a/b/c=d"],
)  # fmt: skip
def test_what_is_no_device_is_refused(name: str) -> None:
    with pytest.raises(SpecError, match="devices"):
        SandboxSpec(workdir="/srv", devices=(name,))


@pytest.mark.parametrize(
    ("wide", "narrow", "expected"),
    [
        ("nvidia.com/gpu=*", "nvidia.com/gpu=0", True),
        ("nvidia.com/gpu=0", "nvidia.com/gpu=1", False),
        ("nvidia.com/*=*", "amd.com/gpu=0", False),
        ("*/gpu=[01]", "amd.com/gpu=1", True),
        ("/dev/dri/renderD*", "/dev/dri/renderD128", True),
        ("/dev/*", "/dev/dri/renderD128", False),
        ("/dev/*", "nvidia.com/gpu=0", False),
        ("nvidia.com/gpu=0", "nvidia.com/gpu=*", False),
    ],
)
def test_a_pattern_of_a_policy_covers_parts_of_names(
    wide: str, narrow: str, expected: bool
) -> None:
    assert covers(wide, narrow) is expected


# -- specifications


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., cdi.Specifications]:
    """``read(name=text)`` reads files of these names and texts, as if root had written them."""
    monkeypatch.setattr(cdi, "is_roots", lambda _: True)
    monkeypatch.setattr(cdi, "is_roots_alone", lambda _: True)

    def written(*texts: tuple[str, str]) -> cdi.Specifications:
        for path, text in texts:
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_text(text)
        return cdi.Specifications((f"{tmp_path}/etc", f"{tmp_path}/run"))

    return written


def of_gpu(**edits: Any) -> str:
    device = {"name": "0", "containerEdits": edits}
    return json.dumps({"cdiVersion": "0.5.0", "kind": "a.b/gpu", "devices": [device]})


def of_nvidia(*words: str, program: tuple[str, ...] = ("nvidia-cdi-hook",)) -> dict[str, Any]:
    return {"hookName": "createContainer", "path": "/opt/x", "args": [*program, *words]}


@pytest.mark.parametrize("program", [("nvidia-cdi-hook",), ("/opt/nvidia-ctk", "hook")])
def test_of_nvidias_hooks_only_the_links_that_they_make_are_taken(
    read: Callable[..., cdi.Specifications], program: tuple[str, ...]
) -> None:
    hooks = [
        of_nvidia("update-ldcache", "--folder", "/usr/lib", program=program),
        of_nvidia("create-symlinks", "--link", "a.so::/b/c.so", "--link=d::/e", program=program),
        of_nvidia("chmod", "--mode", "755", "--path", "/dev/dri", program=program),
        of_nvidia("disable-device-node-modification", program=program),
        of_nvidia("enable-cuda-compat", "--host-driver-version=575", program=program),
    ]
    found = read(("etc/gpu.json", of_gpu(hooks=hooks))).edits("a.b/gpu=0")
    assert found.links == (cdi.Link(path="/b/c.so", text="a.so"), cdi.Link(path="/e", text="d"))
    assert found.folders == ("/usr/lib",)


def test_a_library_is_asked_for_by_what_is_written_in_it(tmp_path: Path) -> None:
    library = next(
        Path(line.split()[-1])
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith("/libc.so.6")
    )
    assert libraries.soname(str(library)) == "libc.so.6"
    content = library.read_bytes()
    for number, wrong in enumerate((b"", content[:40], content[:100], b"#!/bin/sh\n")):
        (tmp_path / str(number)).write_bytes(wrong)
        assert libraries.soname(f"{tmp_path}/{number}") == ""
    assert libraries.soname(str(tmp_path)) == ""
    assert libraries.soname(f"{tmp_path}/none") == ""
    head = bytearray(content[:64])
    struct.pack_into("<Q", head, 32, 1 << 63)  # where the list of its parts is to be
    (tmp_path / "far").write_bytes(head)
    assert libraries.soname(f"{tmp_path}/far") == ""


@pytest.mark.parametrize(
    ("told", "is_linked"),
    [("libcuda.so.1", True), ("libnvidia-ml.so.1", True), ("libnvidia-allocator.so", True),
     ("", False), (".", False), ("..", False), ("../libcuda.so.1", False), ("sh", False),
     ("libcuda.so.1\n", False), ("libcuda.so.1 ", False), ("libc.so.6", False),
     ("libm.so.6", False), ("libstdc++.so.6", False), ("ld-linux-x86-64.so.2", False),
     ("libcuda.so.550.1", False)],
)  # fmt: skip
def test_a_link_is_made_by_the_name_of_a_library_and_hides_none_of_the_roots_own(
    monkeypatch: pytest.MonkeyPatch, told: str, is_linked: bool
) -> None:
    monkeypatch.setattr(libraries, "soname", lambda _: told)
    mount = cdi.MountWish(source="/a", target="/lib/libcuda.so.550.1", readonly=True)
    link = cdi.Link(path=f"/lib/{told}", text="libcuda.so.550.1")
    assert list(libraries.sonames([mount])) == [link] * is_linked


def test_programs_of_another_root_find_the_libraries_of_a_folder_that_is_listed(
    tmp_path: Path,
) -> None:
    beside = tmp_path / "usr/lib/arch"
    beside.mkdir(parents=True)
    (beside / "libc.so.6").touch()
    (tmp_path / "lib").symlink_to("usr/lib")
    folders = ("/lib/arch", "/lib/arch/nvidia/current", "/lib/arch/vdpau", "/opt/driver")
    device = facts.Devices(
        mounts=tuple(
            cdi.MountWish(source="/none", target=f"{folder}/libcuda.so.535", readonly=True)
            for folder in folders
        ),
        folders=("/lib/arch", "/lib/arch/nvidia/current", "/usr/share"),
    )
    fd = os.open(tmp_path, os.O_PATH)
    try:
        found = device.in_root(RootFiles(fd)).variables
    finally:
        os.close(fd)
    searched = "/opt/driver:/usr/lib/arch/nvidia/current"
    assert found == {"LD_LIBRARY_PATH": searched}


def test_a_device_has_what_is_its_own_and_what_all_of_its_kind_have(
    read: Callable[..., cdi.Specifications],
) -> None:
    text = """
cdiVersion: 1.0.0
kind: a.b/gpu
containerEdits:
  deviceNodes: [{path: /dev/ctl}]
  env: [DRIVER=1]
  hooks: []
devices:
- name: "0"
  containerEdits:
    deviceNodes: [{path: /dev/gpu0, hostPath: /dev/real0, permissions: rw}]
    mounts: [{hostPath: /opt/lib, containerPath: /opt/inside, options: [ro, nosuid]}]
"""
    found = read(("etc/gpu.yaml", text)).edits("a.b/gpu=0")
    assert [(node.path, node.source, node.access) for node in found.nodes] == [
        ("/dev/gpu0", "/dev/real0", "rw"), ("/dev/ctl", "/dev/ctl", "rw"),
    ]  # fmt: skip
    assert [(m.source, m.target, m.readonly) for m in found.mounts] == [
        ("/opt/lib", "/opt/inside", True)
    ]
    assert found.variables == {"DRIVER": "1"}


def test_the_second_folder_counts_more(read: Callable[..., cdi.Specifications]) -> None:
    found = read(("etc/z.json", of_gpu(env=["A=1"])), ("run/a.json", of_gpu(env=["A=2"])))
    assert found.edits("a.b/gpu=0").variables == {"A": "2"}


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("etc/a.json", "{", "no JSON"),
        ("etc/a.json", "[" * 100_000, "no JSON"),
        ("etc/a.json", "[]", "in the place of a mapping"),
        ("etc/a.yaml", "{a: [}", "no YAML"),
        ("etc/a.yaml", "!!python/object/apply:os.system [id]", "no YAML"),
        ("etc/a.json", '{"cdiVersion": "9.0", "kind": "a.b/gpu"}', "'9.0' is not known"),
        ("etc/a.json", '{"cdiVersion": "0.5.0"}', "names no kind"),
        ("etc/a.json", '{"cdiVersion": "0.5.0", "kind": "a.b/gpu", "more": 1}', "'more'"),
        ("etc/a.json", " " * (cdi._MOST_BYTES + 1), "more than 1024 KiB"),
        ("etc/a.txt", "{}", "There are: none"),
    ],
)
def test_a_file_that_cannot_be_meant_is_left_out_and_named_where_a_device_is_missing(
    read: Callable[..., cdi.Specifications], name: str, text: str, told: str
) -> None:
    found = read((name, text), ("run/other.json", of_gpu()))
    assert found.edits("a.b/gpu=0") == cdi.Edits(variables={})
    found = read((name, text), ("run/other.json", "{}"))
    with pytest.raises(cdi.BadSpecification, match=told):
        found.edits("a.b/gpu=0")


@pytest.mark.parametrize(
    ("edits", "told"),
    [
        ({"hooks": [{"path": "/bin/x"}]}, r"\(a hook\).*/bin/x"),
        ({"intelRdt": {"closID": "x"}}, "'intelRdt'"),
        ({"deviceNodes": [{"path": "gpu0"}]}, "no absolute path"),
        ({"deviceNodes": [{"path": "/dev/../etc/gpu0"}]}, "no plain path"),
        ({"deviceNodes": [{"path": "/dev/sda", "type": "b"}]}, "no character device"),
        ({"deviceNodes": [{"path": "/dev/gpu0", "more": 1}]}, "'more'"),
        ({"deviceNodes": {"path": "/dev/gpu0"}}, "in the place of a list"),
        ({"mounts": [{"hostPath": "/a"}]}, "no absolute path"),
        ({"mounts": [{"hostPath": "/a", "containerPath": "/b", "type": "tmpfs"}]}, "no bind"),
        (
            {"deviceNodes": [{"path": "/dev/gpu0", "type": ["c"]}]},
            "in the place of a text, as type",
        ),
        ({"deviceNodes": [{"path": "/dev/gpu0", "permissions": 6}]}, "as permissions"),
        ({"mounts": [{"hostPath": "/a", "containerPath": "/b", "type": {}}]}, "as type"),
        ({"mounts": [{"hostPath": "/a", "containerPath": "/b", "options": 1}]}, "of a list"),
        (
            {"hooks": [{"args": ["nvidia-cdi-hook", "new-hook"]}]},
            "a hook.*nvidia-cdi-hook new-hook",
        ),
        ({"hooks": [{"args": ["nvidia-ctk", "hook"]}]}, "a hook.*nvidia-ctk hook"),
        ({"hooks": [{"args": ["nvidia-ctk", "system", "chmod"]}]}, "a hook"),
        ({"hooks": [{"args": ["update-ldcache", "update-ldcache"]}]}, "a hook"),
        ({"hooks": [of_nvidia("create-symlinks", "--link", "a:/b")]}, "no link"),
        ({"hooks": [of_nvidia("create-symlinks", "--link", "a::b")]}, "no absolute path"),
        ({"hooks": [of_nvidia("create-symlinks", "--link=a::/b/../c")]}, "no plain path"),
        ({"hooks": [of_nvidia("create-symlinks", "--link", "a\n::/b")]}, "no link"),
        ({"env": ["A"]}, "no variable"),
        ({"env": ["A=\0"]}, "no variable"),
    ],
)
def test_a_device_that_needs_what_is_not_given_is_refused_with_the_reason(
    read: Callable[..., cdi.Specifications], edits: dict[str, Any], told: str
) -> None:
    with pytest.raises(cdi.BadSpecification, match=told):
        read(("etc/gpu.json", of_gpu(**edits))).edits("a.b/gpu=0")


def test_what_is_null_is_not_there(read: Callable[..., cdi.Specifications]) -> None:
    node = {"path": "/dev/gpu0", "type": None, "permissions": None, "hostPath": None}
    mount = {"hostPath": "/a", "containerPath": "/b", "type": None, "options": None}
    edits = {"deviceNodes": [node], "mounts": [mount], "env": None, "hooks": None}
    device = {"name": "0", "containerEdits": edits}
    text = {"cdiVersion": "0.5.0", "kind": "a.b/gpu", "containerEdits": None, "devices": [device]}
    empty = {"cdiVersion": "0.5.0", "kind": "a.b/x", "devices": None}
    files = ("etc/a.json", json.dumps(text)), ("etc/b.json", json.dumps(empty))
    found = read(*files).edits("a.b/gpu=0")
    assert [(node.source, node.access) for node in found.nodes] == [("/dev/gpu0", "rw")]
    assert [mount.readonly for mount in found.mounts] == [True]


def test_a_device_that_two_files_of_a_folder_name_is_refused(
    read: Callable[..., cdi.Specifications],
) -> None:
    two = ("etc/a.json", of_gpu(env=["A=1"])), ("etc/b.json", of_gpu(env=["A=2"]))
    with pytest.raises(cdi.BadSpecification, match=r"a\.json and .*b\.json both name it"):
        read(*two).edits("a.b/gpu=0")
    found = read(*two, ("run/c.json", of_gpu(env=["A=3"])))
    assert found.edits("a.b/gpu=0").variables == {"A": "3"}


@pytest.mark.requires("root")
def test_what_others_than_root_can_write_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text(of_gpu())
    with pytest.raises(cdi.BadSpecification, match="others than root may write there"):
        cdi.Specifications((str(tmp_path),)).edits("a.b/gpu=0")


@pytest.mark.parametrize(
    ("privileged", "is_broker", "name"),
    [(True, False, "/dev/kvm0"), (True, True, "/dev/kvm0"), (True, True, "a.b/gpu=0")],
)
def test_what_root_gives_to_others_a_policy_has_to_name(
    privileged: bool, is_broker: bool, name: str
) -> None:
    with pytest.raises(SpecError, match="no policy says"):
        find_devices((name,), privileged=privileged, granted=False, is_broker=is_broker)
    with pytest.raises(SpecError, match=r"No such file|no file in"):
        find_devices((name,), privileged=privileged, granted=True, is_broker=is_broker)


# -- the list


def judged(code: bytes, kind: int, access: int, major: int, minor: int) -> int:
    """What the program *code* answers: an interpreter of the few instructions that it has."""
    context = struct.pack("=III", access << 16 | kind, major, minor)
    registers, position = [0] * 11, 0
    for _ in range(len(code) // 8):
        op, both, offset, value = struct.unpack_from("<BBhi", code, 8 * position)
        target, source, value = both & 15, both >> 4, value & 0xFFFFFFFF
        position += 1
        if op == 0x61:
            registers[target] = struct.unpack_from("=I", context, offset)[0]
        elif op == 0x54:
            registers[target] &= value
        elif op == 0x74:
            registers[target] >>= value
        elif op == 0xBC:
            registers[target] = registers[source]
        elif op == 0xB4:
            registers[target] = value
        elif op == 0x55:
            position += offset if registers[target] != value else 0
        else:
            assert op == 0x95
            return registers[0]
    raise AssertionError("it has no end")


def test_the_program_allows_what_is_listed_with_its_access_and_nothing_else() -> None:
    entries = [Allowed(1, 3), Allowed(136, None), Allowed(195, 0, "r"), Allowed(10, 229, "w")]
    code = program(entries)
    for kind, access, major, minor in itertools.product(
        (1, 2), range(8), (0, 1, 10, 136, 195, 1 << 11), (0, 3, 229, 1 << 19)
    ):
        allowed = any(
            kind == 2
            and entry.major == major
            and entry.minor in {None, minor}
            and not access & ~sum({"r": 2, "w": 4}[letter] for letter in entry.access)
            for entry in entries
        )
        assert judged(code, kind, access, major, minor) == allowed, (kind, access, major, minor)
    assert judged(program([]), 2, 2, 1, 3) == 0


def test_the_list_is_of_either_version_and_roots_alone() -> None:
    request, site = ASKERS["root"]
    (step,) = limit(Start(request, site))
    assert (step.verb, *step.words[:2]) == ("limit-devices", "1", "1")
    assert step.words[-1] == "c 195:0 rw" and "c 1:3 rw" in step.words
    (step,) = limit(Start(request, replace(site, device_group=(2, "/group"))))
    assert step.words[1] == "2" and judged(bytes(step.words[3]), 2, 6, 195, 0)  # type: ignore[arg-type]
    (step,) = limit(Start(request, replace(site, devices=facts.Devices())))
    assert step.words[0] == "0"
    assert not [*limit(Start(request, replace(site, device_group=None)))]
    assert not [*limit(Start(*ASKERS["user"]))]


# -- a list in a list


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """``refusing(text=errno)`` lets Linux refuse what is written so; the list has what it took."""

    def prepared(refused: dict[str, int]) -> list[str]:
        taken: list[str] = []

        def write(path: str, text: str) -> None:
            if text in refused:
                raise CallFailed("write", refused[text], file=path, text=text)
            taken.append(text)

        monkeypatch.setattr(inside, "write", write)
        return taken

    return prepared


def listed(asked: int, *entries: str) -> None:
    inside.limit_devices(None, str(asked), "1", "/group", *entries)  # type: ignore[arg-type]


def test_what_is_usual_and_not_in_the_list_above_is_left_out_and_the_rest_holds(
    refusing: Callable[..., list[str]],
) -> None:
    taken = refusing({"c 137:* rw": errno.EPERM})
    listed(1, "c 1:3 rw", "c 137:* rw", "c 1:5 rw", "c 195:0 rw")
    assert taken == ["a", "c 1:3 rw", "c 1:5 rw", "c 195:0 rw"]


def test_what_was_asked_for_has_to_hold(refusing: Callable[..., list[str]]) -> None:
    refusing({"c 195:0 rw": errno.EPERM})
    with pytest.raises(CallFailed, match="195:0"):
        listed(1, "c 1:3 rw", "c 195:0 rw")


def test_a_list_that_cannot_be_begun_is_no_reason_where_nothing_was_asked_for(
    refusing: Callable[..., list[str]],
) -> None:
    taken = refusing({"a": errno.EPERM})
    listed(0, "c 1:3 rw")
    assert taken == []
    with pytest.raises(CallFailed):
        listed(1, "c 1:3 rw")
    refusing({"c 1:3 rw": errno.ENOMEM})  # nothing can be opened by now
    with pytest.raises(CallFailed):
        listed(0, "c 1:3 rw")


# -- what a node is


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """``sysfs("10:99", name, subsystem)`` tells of a device, and of why it is not given."""
    monkeypatch.setattr(nodes, "_SYS", f"{tmp_path}/char")
    monkeypatch.setattr(nodes, "_DRIVERS", f"{tmp_path}/devices")
    text = "Character devices:\n 10 misc\n195 nvidia\n\nBlock devices:\n240 nvidia\n"
    (tmp_path / "devices").write_text(text)

    def told(number: str, name: str = "", subsystem: str = "misc") -> str:
        if name:
            (tmp_path / "char" / number).mkdir(parents=True)
            (tmp_path / "char" / number / "uevent").write_text(f"MAJOR=1\nDEVNAME={name}\n")
            (tmp_path / "char" / number / "subsystem").symlink_to(f"/sys/class/{subsystem}")
        major, minor = map(int, number.split(":"))
        device = SimpleNamespace(st_mode=stat.S_IFCHR, st_rdev=os.makedev(major, minor))
        return nodes._why_not(device)  # type: ignore[arg-type]

    return told


@pytest.mark.parametrize(
    ("device", "why"),
    [
        (("10:99", "kvm"), ""),
        (("10:99", "cpu_dma_latency"), "cpu_dma_latency"),
        (("10:259", "harmless"), ""),
        (("10:99", "xen/privcmd"), "privcmd"),
        (("240:0", "vfio/noiommu-3", "vfio"), "no IOMMU"),
        (("240:0", "vfio/3", "vfio"), ""),
        (("240:0", "dax0.0", "dax"), "one of dax"),
        (("240:0", "uio0", "uio"), "one of uio"),
        (("10:221",), "mpt2ctl"),
        (("229:0",), "console"),
        (("9:0",), "tape"),
        (("89:1",), "i2c"),
        (("153:0",), "spi"),
        (("195:0",), ""),  # as of NVIDIA's driver
        (("240:1",), "no driver tells"),
    ],
)
def test_a_node_is_judged_by_what_its_driver_calls_it(
    sysfs: Callable[..., str], device: tuple[str, ...], why: str
) -> None:
    told = sysfs(*device)
    assert (why in told, bool(told)) == (True, bool(why))
