"""What others have made of an image, honest or not: what becomes of it, and nothing else does."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import resource
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from layouts import MACHINE, Layout, folder, layer, link, member

from sandbox_provisioner.errors import HostError, SpecError
from sandbox_provisioner.images import oci
from sandbox_provisioner.images.importing import import_image
from sandbox_provisioner.images.store import Store
from sandbox_provisioner.images.tree import Bounds, Entry, Kind, Tree

pytestmark = pytest.mark.requires("sqfstar")


@pytest.fixture
def layout(tmp_path):
    return Layout(tmp_path / "layout")


@pytest.fixture
def store(tmp_path) -> Iterator[Store]:
    yield Store(tmp_path / "store", os.geteuid())
    # Whatever came of it: nothing that is half, and nothing beside the store.
    work = tmp_path / "store/work"
    assert not work.exists() or not list(work.iterdir())


def tree_of(path: str, bounds: Bounds | None = None) -> Tree:
    bounds = bounds or Bounds()
    with oci.opened(path, bounds) as source:
        return oci.tree_of(source, bounds)[0]


def names(tree: Tree) -> set[str]:
    return {path for path, _ in tree.walk()}


def refused(path: str, bounds: Bounds | None = None) -> str:
    with pytest.raises(SpecError) as error:
        tree_of(path, bounds)
    return str(error.value)


def imported(path: str, store: Store) -> Path:
    image, _ = import_image("test", path, store, Bounds(), lambda *_: None)
    return store.file(image)


def unsquashed(image: Path, target: Path) -> Path:
    words = ["unsquashfs", "-quiet", "-no-progress", "-dest", str(target), str(image)]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return target


# -- what an honest one comes to

HONEST = (
    layer(
        folder("./usr"), folder("./usr/lib"), link("./lib", "usr/lib"), folder("./opt/x/bin"),
        member("./etc/old", b"old"), member("./etc/kept", b"kept"), member("./cache/a", b"a"),
        member("./opt/x/bin/python3", b"#!", mode=0o755),
        member("opt/x/lib/python3.12/site-packages/ipykernel/__init__.py", b""),
    ),
    layer(
        member("lib/new", b"through the image's own link"), member("etc/.wh.old", b""),
        member("cache/.wh..wh..opq", b""), member("cache/b", b"b"),
        link("etc/second", "etc/kept", tarfile.LNKTYPE),
    ),
)  # fmt: skip


def test_layers_come_to_what_they_say_together(layout, store, tmp_path):
    root = unsquashed(imported(layout.fill(*HONEST), store), tmp_path / "root")
    assert (root / "usr/lib/new").read_text() == "through the image's own link"
    assert os.readlink(root / "lib") == "usr/lib"
    assert sorted(os.listdir(root / "etc")) == ["kept", "second"]
    assert os.listdir(root / "cache") == ["b"]
    assert (root / "etc/second").stat().st_ino == (root / "etc/kept").stat().st_ino


def test_its_kernel_is_the_python_of_its_path_that_has_ipykernel(layout, store):
    image, _ = import_image("test", layout.fill(*HONEST), store, Bounds(), lambda *_: None)
    assert image.python == "/opt/x/bin/python3"


def test_the_same_image_has_the_same_digest_however_it_came(layout, store, tmp_path):
    plain = Layout(tmp_path / "plain")
    first = imported(layout.fill(*HONEST), store).name
    assert imported(plain.fill(*HONEST, pack=bytes), store).name == first
    archive = tmp_path / "archive.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(layout.path, arcname=".")
    assert imported(str(archive), store).name == first


def test_what_docker_saves_is_read_too(store, tmp_path, layout):
    first = imported(layout.fill(*HONEST), store).name
    archive = tmp_path / "docker.tar"
    digests = [f"sha256:{hashlib.sha256(one).hexdigest()}" for one in HONEST]
    config = {"architecture": MACHINE, "rootfs": {"diff_ids": digests}}
    told = [{"Config": "c.json", "Layers": ["0/layer.tar", "1/layer.tar"]}]
    files = {"c.json": json.dumps(config).encode(), "manifest.json": json.dumps(told).encode()}
    files |= {f"{number}/layer.tar": one for number, one in enumerate(HONEST)}
    archive.write_bytes(layer(*(member(name, content) for name, content in files.items())))
    assert imported(str(archive), store).name == first
    files["1/layer.tar"] = HONEST[0]
    archive.write_bytes(layer(*(member(name, content) for name, content in files.items())))
    assert "is not what its digest says" in refused(str(archive))


@pytest.mark.requires("umoci")
def test_what_umoci_has_made_comes_to_what_it_unpacks(store, tmp_path):
    root, layout = tmp_path / "in", tmp_path / "layout"
    (root / "etc").mkdir(parents=True)
    (root / "etc/name").write_text("umoci")
    (root / "link").symlink_to("etc/name")
    for words in (["init", "--layout", layout], ["new", "--image", f"{layout}:x"],
                  ["insert", "--rootless", "--image", f"{layout}:x", root, "/"],
                  ["insert", "--rootless", "--image", f"{layout}:x", root / "etc/name", "/last"],
                  ["insert", "--image", f"{layout}:x", "--whiteout", "/link"]):  # fmt: skip
        subprocess.run(["umoci", *map(str, words)], check=True, capture_output=True)
    made = unsquashed(imported(str(layout), store), tmp_path / "root")
    assert sorted(os.listdir(made)) == ["etc", "last"]
    assert (made / "last").read_text() == (made / "etc/name").read_text() == "umoci"


def test_a_layer_takes_away_what_is_below_it_and_nothing_of_its_own(layout):
    """In whatever order it has them (OCI's layer.md, whiteouts)."""
    path = layout.fill(
        layer(member("cache/a", b"a"), member("cache/in/a", b"a")),
        layer(
            member("cache/b", b"b"), member("cache/in/b", b"b"),
            member("cache/.wh..wh..opq", b""), member("cache/.wh.b", b""),
        ),
    )  # fmt: skip
    assert names(tree_of(path)) == {"cache", "cache/b", "cache/in", "cache/in/b"}


# -- what a hostile one comes to


@pytest.mark.parametrize(
    ("hostile", "answer"),
    [
        (member("../../etc/cron.d/x", b"x"), "leads out of it"),
        (member("a/../../x", b"x"), "leads out of it"),
        (link("x", "/etc/shadow", tarfile.LNKTYPE), "which is no file"),
        (link("x", "../../etc/shadow", tarfile.LNKTYPE), "leads out of it"),
        (member("x" * 300, b"x"), "a name is too long"),
        (member("/".join(["d"] * 3000), b"x"), "a name is too long"),
    ],
)  # fmt: skip
def test_an_image_with_a_name_that_leads_out_is_refused(layout, store, hostile, answer):
    path = layout.fill(layer(folder("etc"), hostile))
    assert answer in refused(path).replace("'shadow' is not in it", "which is no file")
    with pytest.raises(SpecError):
        imported(path, store)
    assert store.images() == []


def test_an_absolute_name_is_meant_from_the_images_own_root(layout, store, tmp_path):
    path = layout.fill(layer(member("/sbx-outside", b"x")))
    assert names(tree_of(path)) == {"sbx-outside"}
    imported(path, store)
    assert not Path("/sbx-outside").exists()


@pytest.mark.parametrize("target", ["/outside", "../../../../outside"])
def test_a_link_above_a_name_leads_through_the_image_alone(layout, store, tmp_path, target):
    outside = tmp_path / "outside"
    outside.mkdir()
    target = target.replace("/outside", str(outside))
    path = layout.fill(layer(link("way", target), member("way/in", b"x")))
    assert f"{outside}/in".lstrip("/") in names(tree_of(path))
    imported(path, store)
    assert not list(outside.iterdir())


def test_links_that_lead_in_a_circle_are_refused(layout):
    path = layout.fill(layer(link("a", "b"), link("b", "a"), member("a/x", b"x")))
    assert "too many links" in refused(path)


def test_no_device_set_id_bit_or_strange_owner_gets_into_an_image(layout, store, tmp_path):
    path = layout.fill(
        layer(
            member("dev/sda", kind=tarfile.BLKTYPE, devmajor=8),
            member("pipe", kind=tarfile.FIFOTYPE),
            member("null", kind=tarfile.CHRTYPE, devmajor=1, devminor=3),
            member("bin/su", b"x", mode=0o6755, uid=2**30, gid=7), folder("tmp", mode=0o1777),
        )
    )  # fmt: skip
    tree = tree_of(path)
    assert names(tree) == {"bin", "bin/su", "tmp"}
    program, temporary = tree.find("bin/su"), tree.find("tmp")
    assert program and temporary
    assert (program.mode, program.uid, program.gid) == (0o755, 65534, 7)
    assert temporary.mode == 0o1777
    assert imported(path, store).exists()


def sparse(name: str, size: int) -> bytes:
    """The head of a file of GNU tar that has nothing but a hole."""
    head = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    head[156:157] = tarfile.GNUTYPE_SPARSE
    head[386:482] = b"\0" * 96
    head[483:495] = b"\x80" + size.to_bytes(11, "big")
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


def test_a_sparse_file_of_ten_terabytes_is_refused_before_anybody_reads_it(layout):
    path = layout.fill(sparse("hole", 10 << 40) + bytes(1024))
    assert "have more than 65536 MiB" in refused(path)


def test_a_head_that_asks_for_gigabytes_of_memory_is_refused(layout):
    head = tarfile.TarInfo("x")
    head.type, head.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
    path = layout.fill(head.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    assert "the head of an entry is too long" in refused(path)


def pax(kind: bytes, content: bytes) -> bytes:
    head = tarfile.TarInfo("head")
    head.type, head.size = kind, len(content)
    return head.tobuf() + content + bytes(-len(content) % 512)


def long_name() -> bytes:
    return pax(tarfile.GNUTYPE_LONGNAME, b"x" * 65536)


SPARSE = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n21 GNU.sparse.name=x\n"


@pytest.mark.parametrize(
    "bomb",
    [
        long_name() * 20,
        pax(tarfile.XGLTYPE, b"60011 %s=\n" % (b"k" * 60003)) * 20,
        pax(tarfile.XHDTYPE, SPARSE) + pax(tarfile.REGTYPE, b"9999999\n" + b"0\n" * (2 << 20)),
    ],
    ids=["long names", "global heads", "the map of a sparse file"],
)
def test_heads_before_one_entry_that_would_fill_the_memory_are_refused(layout, bomb):
    path = layout.fill(bomb + layer(member("a", b"a")))
    assert "the heads of an entry are too long" in refused(path)
    archive = layout.path.with_name("archive.tar")
    archive.write_bytes(bomb + layer(member("a", b"a")))
    assert "the heads of an entry are too long" in refused(str(archive))


def test_global_heads_of_many_entries_do_not_add_up(layout):
    head = pax(tarfile.XGLTYPE, b"60011 %s=\n" % (b"k" * 60003))
    path = layout.fill(b"".join(head + member("a", b"")[0].tobuf() for _ in range(40)))
    assert names(tree_of(path)) == {"a"}


@pytest.mark.parametrize("target", ["", "x" * 5000])
def test_a_link_to_what_can_be_no_path_is_refused(layout, target):
    assert "a link to what can be no path" in refused(layout.fill(layer(link("a", target))))


def test_folders_that_links_make_deeper_than_any_name_are_refused(layout):
    path = "/".join(["d"] * 900)
    hostile = layer(folder(path), link("l", path), member(f"l/{path}/x", b""))
    assert "folders more than 1024 deep" in refused(layout.fill(hostile))


def test_paths_that_links_make_longer_than_an_image_is_are_refused(layout):
    path = "/".join(["d" * 250] * 15)
    many = [member(f"l/{path}/{number}", b"") for number in range(200)]
    hostile = layout.fill(layer(folder(path), link("l", path), *many))
    assert layout.largest.stat().st_size < 1 << 16
    with pytest.raises(SpecError, match="paths of its files come to more than 1 MiB"):
        bounds = Bounds(path_bytes=1 << 20)
        with oci.opened(hostile, bounds) as source:
            oci.tree_of(source, bounds)[0].latest()


@pytest.mark.parametrize("last", ["x", ".wh.x"])
def test_ways_that_links_make_longer_than_any_honest_ones_are_refused(layout, last):
    """Each entry is found by 40 links of 4096 bytes, also one that takes something away."""
    around = "d/../" * 800
    links = [link(f"l{n}", f"{around}l{n + 1}") for n in range(30)]
    many = [member(f"l0/{last}{number}", b"") for number in range(10)]
    hostile = layout.fill(layer(folder("d"), link("l30", "d"), *links, *many))
    assert layout.largest.stat().st_size < 1 << 16
    assert names(tree_of(hostile)) > {"d", "l0"}
    assert "more than 200000 steps" in refused(hostile, Bounds(steps=200_000))


def test_devices_and_whiteouts_count_as_entries(layout):
    for entry in (member("p", kind=tarfile.FIFOTYPE), member(".wh.x"), member(".wh..wh..opq")):
        path = Layout(layout.path.with_name(entry[0].name)).fill(layer(*[entry] * 101))
        assert "more than 100 entries" in refused(path, Bounds(entries=100))


def test_a_folder_is_cleared_once_for_a_layer_however_often_it_is_asked(layout):
    tree = Tree(Bounds())
    for number in range(10):
        tree.add(Entry(name=f"a/{number}", kind=Kind.FILE), 0, number)
    tree.add(Entry(name="a/new", kind=Kind.FILE), 1, 0)
    tree.clear("a", 1)
    node = tree.find("a")
    assert node and (set(node.children), node.cleared) == ({"new"}, 1)
    tree.add(Entry(name="a", kind=Kind.FOLDER), 1, 1)
    node = tree.find("a")
    assert node and node.cleared == 1


@pytest.mark.parametrize("time", ["nan", "inf"])
def test_a_time_that_is_none_is_refused(layout, time):
    record = b"%d mtime=%s\n" % (len(time) + 10, time.encode())
    entry = pax(tarfile.XHDTYPE, record) + layer(member("a", b"a"))
    assert "has a time that is none" in refused(layout.fill(entry))


@pytest.mark.parametrize("folder_name", ["/${JUPYTERHUB_API_TOKEN}/bin", "/{prefix}/bin", "/$x"])
def test_no_kernel_is_where_a_kernelspec_would_take_the_name_for_a_variable(layout, folder_name):
    above = os.path.dirname(folder_name)
    tree = tree_of(
        layout.fill(
            layer(
                member(f"{folder_name}/python3", b"#!", mode=0o755),
                member(f"{above}/lib/python3.12/site-packages/ipykernel/__init__.py", b""),
            )
        )
    )
    assert oci.python_in(tree, {"PATH": folder_name}) == ""


DOCKERS = {"Config": "c.json", "Layers": ["0/layer.tar"]}


@pytest.mark.parametrize(
    ("told", "config"),
    [
        (DOCKERS, b"no JSON"), (DOCKERS, b"[]"), ({**DOCKERS, "Layers": [["x"]]}, None),
        ({**DOCKERS, "Layers": ["\ud800"]}, None), ({**DOCKERS, "Layers": ["0/layer.tar\0"]}, None),
        ({**DOCKERS, "Config": 7}, None), ({**DOCKERS, "Config": "/etc/passwd"}, None),
        ({**DOCKERS, "Config": "../c.json"}, None), ({**DOCKERS, "Config": "way/c.json"}, None),
        ({**DOCKERS, "Layers": ["%OUTSIDE%"]}, None), ({**DOCKERS, "Layers": ["link"]}, None),
    ],
)  # fmt: skip
def test_what_docker_would_not_have_saved_is_refused_and_leads_nowhere(tmp_path, told, config):
    path, outside = tmp_path / "saved", tmp_path / "outside.tar"
    (path / "0").mkdir(parents=True)
    (path / "oci-layout").touch()
    content = layer(member("a", b"a"))
    for file in (outside, path / "0/layer.tar"):
        file.write_bytes(content)
    (path / "link").symlink_to(outside)
    (path / "way").symlink_to(tmp_path)
    digests = [f"sha256:{hashlib.sha256(content).hexdigest()}"]
    good = json.dumps({"architecture": MACHINE, "rootfs": {"diff_ids": digests}}).encode()
    for file in (path / "c.json", tmp_path / "c.json"):
        file.write_bytes(good if config is None else config)
    (path / "manifest.json").write_text(json.dumps([DOCKERS]))
    if config is None:
        assert names(tree_of(str(path))) == {"a"}
    text = json.dumps([told]).replace("%OUTSIDE%", str(outside))
    (path / "manifest.json").write_text(text)
    assert "Nothing of it was kept" in refused(str(path))


def test_zeros_that_a_compressor_hides_are_not_read_without_an_end(layout):
    found, _ = member("zeros")
    found.size = 4 << 20
    content = found.tobuf() + bytes((4 << 20) + 1024)
    path = layout.fill(content)
    assert layout.largest.stat().st_size < 1 << 14
    assert "have more than 1 MiB" in refused(path, Bounds(size_bytes=1 << 20))
    # The same behind the end of the archive, where no head tells of it.
    path = Layout(layout.path.with_name("more")).fill(layer(member("a", b"a")) + bytes(8 << 20))
    assert "a layer has more than 2 MiB" in refused(path, Bounds(size_bytes=1 << 20))


def test_more_entries_than_an_image_may_have_are_refused(layout):
    path = layout.fill(layer(*(member(f"f{number}", b"") for number in range(101))))
    assert "more than 100 entries" in refused(path, Bounds(entries=100))
    deep = Layout(layout.path.with_name("deep")).fill(layer(member("/".join("d" * 101), b"")))
    assert "more than 100 entries" in refused(deep, Bounds(entries=100))


def test_a_layer_that_is_not_what_its_digest_says_is_refused(layout, store):
    path = layout.fill(*HONEST)
    content = bytearray(layout.largest.read_bytes())
    content[len(content) // 2] ^= 1
    layout.largest.write_bytes(content)
    assert "is not what its digest says" in refused(path)
    with pytest.raises(SpecError, match="is not what its digest says"):
        imported(path, store)
    assert store.images() == []


def test_a_truncated_layer_and_a_truncated_archive_are_refused(layout, tmp_path):
    path = layout.fill(layer(member("a", os.urandom(4096))))
    archive = tmp_path / "archive.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(layout.path, arcname=".")
    whole = archive.read_bytes()
    for length in (len(whole) // 2, 700, 100, 0):
        archive.write_bytes(whole[:length])
        assert "Nothing of it was kept" in refused(str(archive)), length
    layout.largest.write_bytes(layout.largest.read_bytes()[:-100])
    assert "is not what its digest says" in refused(path)


def test_a_layer_that_changes_between_two_looks_is_refused(layout, store):
    path = layout.fill(layer(member("a", b"a")), layer(member("b", b"b")))
    bounds = Bounds()
    with pytest.raises(SpecError), oci.opened(path, bounds) as source:
        oci.tree_of(source, bounds)
        for blob in (layout.path / "blobs/sha256").iterdir():
            if blob.read_bytes()[:2] == b"\x1f\x8b":
                blob.write_bytes(gzip.compress(layer(member("a", b"z"))))
        oci.tree_of(source, bounds)


def test_a_manifest_that_is_not_what_its_digest_says_is_refused(layout):
    path = layout.fill(*HONEST)
    told = json.loads((layout.path / "index.json").read_text())["manifests"][0]
    blob = layout.path / "blobs/sha256" / told["digest"].partition(":")[2]
    blob.write_bytes(blob.read_bytes() + b" ")
    assert "is not what its name says" in refused(path)


@pytest.mark.parametrize(
    "digest", ["sha256:../../../../etc/passwd", "sha256:" + "A" * 64, "md5:" + "0" * 32, 7, None]
)
def test_a_digest_leads_to_nothing_but_a_blob(layout, digest):
    layout.fill(*HONEST)
    layout.index({"manifests": [{"digest": digest}]})
    assert "no digest by SHA-256" in refused(str(layout.path))


def test_a_blob_that_is_a_link_or_a_pipe_is_refused(layout, tmp_path):
    path = layout.fill(*HONEST)
    blob = layout.largest
    (tmp_path / "elsewhere").write_bytes(blob.read_bytes())
    blob.unlink()
    blob.symlink_to(tmp_path / "elsewhere")
    assert "Nothing of it was kept" in refused(path)
    blob.unlink()
    os.mkfifo(blob)
    assert "is no file" in refused(path)


def test_an_image_of_another_machine_is_told_so(layout):
    assert f"it is for s390x, and this machine is {MACHINE}" in refused(
        layout.fill(*HONEST, machine="s390x")
    )


def test_of_an_image_for_several_machines_ours_is_taken(layout, tmp_path):
    layout.fill(*HONEST)
    (ours,) = json.loads((layout.path / "index.json").read_text())["manifests"]
    other = {"digest": "sha256:" + "0" * 64, "platform": {"architecture": "s390x"}}
    inner = layout.blob(json.dumps({"manifests": [other, ours]}).encode())
    kind = "application/vnd.oci.image.index.v1+json"
    layout.index({"manifests": [{**inner, "mediaType": kind}]})
    assert "etc/kept" in names(tree_of(str(layout.path)))
    layout.index({"manifests": [other]})
    assert "it is for s390x" in refused(str(layout.path))


@pytest.mark.parametrize(
    "told", [[], {}, {"manifests": []}, {"manifests": 7}, {"manifests": [7]}, "x", None]
)
def test_an_index_that_cannot_be_meant_is_refused(layout, told):
    layout.fill(*HONEST)
    layout.index(told)
    assert "Nothing of it was kept" in refused(str(layout.path))


def test_what_is_no_image_is_refused(tmp_path, layout):
    (tmp_path / "text").write_text("hello")
    assert "no archive that could be read" in refused(str(tmp_path / "text"))
    assert "No such file" in refused(str(tmp_path / "missing"))
    assert "there is nothing in it" in refused(layout.fill(layer()))


def test_an_image_that_does_not_fit_on_the_disk_leaves_nothing(layout, store):
    path = layout.fill(layer(member("a", os.urandom(1 << 20))))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, before[1]))
    try:
        with pytest.raises(HostError, match=r"write .*image"):
            imported(path, store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert store.images() == []
    assert not list((store.path / "blobs").iterdir())


def test_a_link_whose_file_a_later_layer_removes_keeps_it(layout, store, tmp_path):
    path = layout.fill(
        layer(member("a", b"content")), layer(link("b", "a", tarfile.LNKTYPE)),
        layer(member(".wh.a", b"")),
    )  # fmt: skip
    tree = tree_of(path)
    assert names(tree) == {"b"}
    node = tree.find("b")
    assert node and node.kind is Kind.FILE
    root = unsquashed(imported(path, store), tmp_path / "root")
    assert (root / "b").read_bytes() == b"content"
