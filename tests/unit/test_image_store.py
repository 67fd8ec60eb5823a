"""The store of images: what a name leads to, who may have said so, and what removing leaves."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from sandbox_provisioner.caller import Caller
from sandbox_provisioner.errors import HostError, SpecError
from sandbox_provisioner.facilities.root import facts
from sandbox_provisioner.facilities.root.facts import RootFacts, check_apart
from sandbox_provisioner.facilities.storage import images
from sandbox_provisioner.facilities.workdir.facts.covers import Covered
from sandbox_provisioner.host import VolumeFacts, WorkdirFacts
from sandbox_provisioner.hub import ranges
from sandbox_provisioner.images import store as module
from sandbox_provisioner.images.store import Store, check_name, find_image, stores_of
from sandbox_provisioner.layers import place
from sandbox_provisioner.layers.place import layer_directory
from sandbox_provisioner.places import Place
from sandbox_provisioner.removal import is_aside
from sandbox_provisioner.spec import Volume
from sandbox_provisioner.state import make_state


def caller(home: Path, uid: int = 1234, groups: frozenset[int] | None = None) -> Caller:
    return Caller(
        uid=uid, gid=uid, home=str(home), cwd="/", umask=0o022, environment={}, groups=groups
    )


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home directory whose owner runs the tests, and no images of root's."""
    monkeypatch.setattr(module, "ROOTS_STORE", tmp_path / "roots")
    return tmp_path


@pytest.fixture
def store(home):
    found = Store(stores_of(caller(home))[0].path, os.geteuid())
    found.prepare()
    return found


def add(store: Store, name: str, content: bytes = b"image") -> module.Image:
    with store.workplace() as folder:
        (folder / "new").write_bytes(content)
        return store.add(folder / "new", name=name, origin="a test")


def identity(path: Path) -> tuple[int, ...]:
    """As a layer knows its root by it."""
    with path.open("rb") as file:
        return facts._identity(file.fileno())


def blobs(store: Store) -> set[str]:
    return {path.name for path in (store.path / "blobs").iterdir()}


def test_a_name_leads_to_the_file_with_the_content_that_was_added(store, monkeypatch):
    add(store, "course", b"the course's image")
    monkeypatch.setattr(module, "stores_of", lambda _: (store,))
    path = find_image("course", caller(Path("/")))
    assert path.read_bytes() == b"the course's image"
    assert path.stat().st_mode & 0o777 == 0o444
    assert not list((store.path / "work").iterdir())


@pytest.mark.requires("mksquashfs")
def test_a_users_image_is_a_directory_too_which_goes_with_it(home, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/closed").mkdir(mode=0o100)
    (tmp_path / "in/name").write_text("course")
    store = Store(tmp_path / "own", os.geteuid(), unpacks=True)
    store.prepare()
    words = ["mksquashfs", tmp_path / "in", tmp_path / "image", "-quiet", "-no-progress"]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    found = set()
    for name in ("one", "two", "three"):
        with store.workplace() as folder:
            shutil.copy(tmp_path / "image", folder / "new")
            image = store.add(folder / "new", name=name, origin="a test")
        root = store.root(image)
        assert (root / "name").read_text() == "course"
        found.add(root.stat().st_ino)
        if name == "two":
            assert len(found) == 1  # the first one stays: layers are of this very directory
            (root / "name").write_text("coarse")
    aside = {name for name in blobs(store) if is_aside(name)}
    assert (len(found), len(blobs(store)), len(aside)) == (2, 3, 1)
    for name in ("one", "two", "three"):
        store.remove(name)
    # A kernel may run on them.
    assert blobs(store) == {image.blob.removesuffix(".squashfs"), *aside}
    store.collect()
    assert blobs(store) == set()


def test_a_name_that_is_not_there_is_told_with_the_one_that_was_meant(store, monkeypatch):
    add(store, "course")
    monkeypatch.setattr(module, "stores_of", lambda _: (store,))
    with pytest.raises(SpecError, match="Did you mean 'course'"):
        find_image("cuorse", caller(Path("/")))


@pytest.mark.parametrize("name", ["", "host", "../x", "a/b", "-x", "Course", "x" * 65, ".x", "é"])
def test_no_image_has_a_name_that_could_lead_elsewhere(name):
    with pytest.raises(SpecError, match="no image can have that name"):
        check_name(name)


def test_two_names_of_one_content_are_one_file_which_goes_with_the_last(store):
    add(store, "one")
    add(store, "two")
    assert len(blobs(store)) == 1
    store.remove("one")
    assert len(blobs(store)) == 1
    store.remove("two")
    assert blobs(store) == set()


def test_the_same_content_made_again_is_the_same_file_unless_that_has_changed(store):
    path = store.file(add(store, "one"))
    first = identity(path)
    add(store, "one")
    assert identity(path) == first
    path.chmod(0o644)
    path.write_bytes(b"IMAGE")
    assert not store.wrong_bytes(add(store, "one"))
    assert not list((store.path / "work").iterdir())


def test_a_file_that_no_name_means_any_more_goes_when_the_name_gets_another(store):
    add(store, "course", b"old")
    new = add(store, "course", b"new")
    assert blobs(store) == {new.blob}


def test_who_has_a_removed_image_open_keeps_it(store):
    image = add(store, "course", b"in use")
    with store.file(image).open("rb") as held:
        store.remove("course")
        assert held.read() == b"in use"


def test_a_second_builder_of_a_name_is_told_who_builds(store):
    told = pytest.raises(HostError, match=f"process {os.getpid()} has been at it since")
    with store.building("course"), store.building("other"), told, store.building("course"):
        pass
    with store.building("course"):
        pass


def test_what_a_killed_builder_left_goes_with_the_next_one(store):
    script = (
        "import sys, pathlib, sandbox_provisioner.images.store as s\n"
        "with s.Store(pathlib.Path(sys.argv[1]), int(sys.argv[2])).workplace() as folder:\n"
        "    (folder / 'half').write_text('x'); print('here', flush=True); input()\n"
    )
    words = [sys.executable, "-c", script, str(store.path), str(os.geteuid())]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as builder:
        assert builder.stdout and builder.stdout.readline() == b"here\n"
        with store.workplace():
            assert len(list((store.path / "work").iterdir())) == 2
        builder.send_signal(signal.SIGKILL)
    assert len(list((store.path / "work").iterdir())) == 1
    with store.workplace():
        assert len(list((store.path / "work").iterdir())) == 1
    assert not list((store.path / "work").iterdir())


def test_what_others_could_have_written_is_no_image(store):
    image = add(store, "course")
    record = store.path / "names/course.json"
    record.chmod(0o666)
    with pytest.raises(HostError, match="others than its owner could have changed it"):
        store.image("course")
    record.chmod(0o644)
    store.file(image).chmod(0o666)
    with pytest.raises(HostError, match="others than its owner could have changed it"):
        store.file(image)
    with pytest.raises(HostError, match="others than its owner"):
        Store(store.path, os.geteuid() + 1).image("course")


def test_neither_a_record_nor_an_image_is_reached_through_a_link(store, tmp_path):
    image = add(store, "course")
    record, blob = store.path / "names/course.json", store.file(image)
    blob.rename(tmp_path / "elsewhere")
    blob.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HostError, match="not the file that was put there"):
        store.file(image)
    record.rename(tmp_path / "record")
    record.symlink_to(tmp_path / "record")
    with pytest.raises(HostError):
        store.image("course")


@pytest.mark.parametrize("blob", ["../../../etc/passwd", "sha256-0.squashfs", "x"])
def test_a_record_leads_to_nothing_but_an_image(store, blob):
    add(store, "course")
    record = store.path / "names/course.json"
    told = json.loads(record.read_text())
    record.write_text(json.dumps({**told, "blob": blob}))
    with pytest.raises(HostError, match="no record of an image"):
        store.image("course")


@pytest.mark.parametrize("text", ["{", "[]", '{"made_at": NaN}', "[" * 60000])
def test_a_bad_record_hides_no_image_and_removes_none(store, text):
    image = add(store, "course")
    add(store, "bad", b"other")
    (store.path / "names/bad.json").write_text(text)
    assert (store.images(), store.unusable()) == ([image], ["bad"])
    store.remove("course")
    assert len(blobs(store)) == 2
    store.remove("bad")
    assert (store.unusable(), blobs(store)) == ([], set())


def test_nobody_else_gets_into_a_users_store_also_where_it_was_open(tmp_path):
    path = tmp_path / "store"
    Store(path, os.geteuid()).prepare()
    assert path.stat().st_mode & 0o777 == 0o755
    Store(path, os.geteuid(), unpacks=True).prepare()
    assert path.stat().st_mode & 0o777 == 0o700


def of_layers(state):
    with mock.patch.object(place, "STATE", state), mock.patch.object(os, "geteuid", lambda: 0):
        layer_directory()


def of_boxes(state):
    with mock.patch.object(images, "STORAGE", state / "storage"):
        images.make_directory(state / "storage")
    assert (state / "storage").stat().st_mode & 0o777 == 0o700


def of_ranges(state):
    with mock.patch.object(ranges, "FOLDER", state):
        ranges.range_of("ann", state)


def of_images(state):
    with mock.patch.object(module, "ROOTS_STORE", state / "images"):
        Store(state / "images", os.geteuid()).prepare()


@pytest.mark.requires("root")
@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize("make", [of_layers, of_boxes, of_ranges, of_images])
def test_all_users_reach_roots_images_whoever_makes_the_folder_above(tmp_path, make, is_there):
    """With any umask; and they read no "Permission denied" where there is none yet."""
    state = tmp_path / "sandbox-provisioner"
    if is_there:
        state.mkdir(mode=0o700)
    umask = os.umask(0o077)
    try:
        make(state)
    finally:
        os.umask(umask)
    assert state.stat().st_mode & 0o777 == 0o755


def test_that_folder_is_not_used_where_others_may_write_to_it(tmp_path):
    state = tmp_path / "sandbox-provisioner"
    state.mkdir()
    state.chmod(0o702)
    with pytest.raises(PermissionError, match="others than root can write"):
        make_state(state)
    assert state.stat().st_mode & 0o777 == 0o702


def test_who_waited_for_a_layers_lock_that_was_removed_keeps_others_out_all_the_same(
    store, monkeypatch
):
    real, told = module.lock, []
    first = store.making_layer("key", pytest.fail)
    first.__enter__()

    def lock(path, operation):
        """Who waits has opened it before the first one has left."""
        if operation & fcntl.LOCK_NB:
            return real(path, operation)
        fd = os.open(path, os.O_RDWR)
        first.__exit__(None, None, None)
        fcntl.flock(fd, operation)
        return fd

    monkeypatch.setattr(module, "lock", lock)
    path = store.path / "locks/layer-key"
    with store.making_layer("key", told.append):
        assert told
        with pytest.raises(BlockingIOError):
            real(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not path.exists()


def test_a_truncated_image_is_told(store):
    image = add(store, "course")
    path = store.file(image)
    path.chmod(0o644)
    path.write_bytes(b"imag")
    with pytest.raises(HostError, match="not the file that was put there"):
        store.file(image)


def test_a_changed_image_is_found_by_its_content(store):
    image = add(store, "course")
    assert not store.wrong_bytes(image)
    path = store.file(image)
    path.chmod(0o644)
    path.write_bytes(b"IMAGE")
    assert store.wrong_bytes(image)


def test_root_uses_no_image_of_a_user_for_whom_it_launches(home):
    own = [store.path for store in stores_of(caller(home))]
    assert own == [home / ".local/share/jupyter/sandbox/images", home / "roots"]
    asked = stores_of(caller(home, groups=frozenset({1234})))
    assert [store.path for store in asked] == [home / "roots"]
    assert [store.path for store in stores_of(caller(home, uid=0))] == [home / "roots"]


def test_an_image_of_ones_own_is_a_root_for_who_works_at_home(tmp_path: Path) -> None:
    """There the store is covered; a volume that leads around the cover is not."""
    place, store = Place.nowhere(), ".local/share/jupyter"
    home, image = str(tmp_path), f"{tmp_path}/{store}/sandbox/images/blobs/one"
    root = RootFacts(wish="one", place=replace(place, source=image))
    covered = Covered(directories=(store,))
    workdir = WorkdirFacts(place=replace(place, source=home), idmappable=True, covered=covered)
    check_apart(root, "one", workdir, ())
    for bare in (
        replace(workdir, covered=Covered()),
        replace(workdir, covered=Covered(directories=(".x",))),
    ):
        with pytest.raises(SpecError, match="lies in it or around it"):
            check_apart(root, "one", bare, ())
    wide = Volume(source=home, target="/home", readonly=False)
    volume = VolumeFacts(volume=wide, place=workdir.place, idmappable=True)
    elsewhere = replace(workdir, place=replace(place, source=f"{home}/work"))
    with pytest.raises(SpecError, match="lies in it or around it"):
        check_apart(root, "one", elsewhere, (volume,))
