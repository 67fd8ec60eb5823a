"""What a person writes of an image and of a course: what it comes to, and where it is wrong."""

from __future__ import annotations

import datetime
import os
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.kernelspec import KernelSpec
from test_app import Command, command, kernel_json  # noqa: F401

from sandbox_provisioner import removal
from sandbox_provisioner.app import course
from sandbox_provisioner.app.course import read_course
from sandbox_provisioner.errors import HostError, SpecError
from sandbox_provisioner.images import build as module
from sandbox_provisioner.images import conda, squash
from sandbox_provisioner.images.box import BoxOrder
from sandbox_provisioner.images.build import build
from sandbox_provisioner.images.layers import FileLayer, FolderLayer
from sandbox_provisioner.images.recipe import KEYS, Recipe, read_recipe
from sandbox_provisioner.images.store import Image, Store
from sandbox_provisioner.images.tree import Kind, Refused
from sandbox_provisioner.spec import Network, NetworkWish

pytestmark = pytest.mark.requires("sqfstar")
DOCUMENT = Path(__file__).parents[2] / "docs/images.md"


class Silent:
    """Nobody looks."""

    def step(self, text: str) -> None: ...

    def progress(self, done: int, whole: int) -> None: ...


OPENED = ExitStack()


@pytest.fixture(autouse=True)
def _closed():
    with OPENED:
        yield


def read(folder: Path, text: str) -> Recipe:
    (folder / "recipe.toml").write_text(text)
    return read_recipe(str(folder / "recipe.toml"), OPENED)


def refused(folder: Path, text: str) -> str:
    with pytest.raises(SpecError) as error:
        read(folder, text)
    return str(error.value)


def test_a_recipe_says_what_is_in_an_image(tmp_path):
    (tmp_path / "requirements.txt").write_text("numpy==2.0\n")
    (tmp_path / "data").mkdir()
    recipe = read(
        tmp_path,
        'suite = "trixie"\nmirror = "https://snapshot.debian.org/archive/debian/20260101T000000Z"\n'
        'apt = ["git", "r-base-core=4.2.2-1"]\npip = "pandas>=2"\ndate = 2026-01-01\n'
        'requirements = "requirements.txt"\n[files]\n"/srv/data" = "data"\n',
    )
    assert recipe.packages == ("ca-certificates", "git", "python3-venv", "r-base-core=4.2.2-1")
    assert (recipe.pip, recipe.requirements) == (("pandas>=2",), "numpy==2.0\n")
    assert recipe.files == (("/srv/data", tmp_path / "data"),)
    assert recipe.time == datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC).timestamp()


def test_a_recipe_that_says_nothing_is_debian_with_a_kernel(tmp_path):
    recipe = read(tmp_path, "")
    assert "python3-ipykernel" in recipe.packages
    assert not recipe.has_pip


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ('aptt = ["git"]', "Did you mean 'apt'"),
        ('packages = ["git"]', "Did you mean 'apt'"),
        ("apt = 7", "no list of texts"),
        ("suite = 7", "no text"),
        ('suite = "book worm"', "nothing that suite could have"),
        ('suite = "--hook=x"', "nothing that suite could have"),
        ('apt = ["--option"]', "nothing that apt could have"),
        ('apt = ["./local.deb"]', "nothing that apt could have"),
        ('apt = ["?essential"]', "nothing that apt could have"),
        ('apt = ["git,less"]', "nothing that apt could have"),
        ('mirror = "deb http://x y main"', "nothing that mirror could have"),
        ('mirror = "file:///etc"', "nothing that mirror could have"),
        ('components = ["main contrib"]', "nothing that components could have"),
        ('pip = ["--index-url=http://x"]', "nothing that pip could have"),
        ('pip = ["/etc/passwd"]', "nothing that pip could have"),
        ('index = "--help"', "nothing that index could have"),
        ('index = "https://x:port/"', "nothing that index could have"),
        ('requirements = "../../etc/passwd"', "not beside the recipe"),
        ('wheels = "/etc"', "not beside the recipe"),
        ('wheels = "missing"', "there is no 'missing' beside it"),
        ('date = "yesterday"', "date is no date"),
        ('files = "x"', "files is no table"),
        ('files."srv" = "recipe.toml"', "no absolute path"),
        ('files."/a/../../b" = "recipe.toml"', "leads out of it"),
        ('files."/a" = "link"', "not beside the recipe"),
        ('files."/a" = 7', "the source is no text"),
        ('conda = ["https://x.example/a.conda"]', "nothing that conda could have"),
        ('conda = ["/etc/passwd"]', "nothing that conda could have"),
        ('conda = ["conda-forge::numpy"]', "nothing that conda could have"),
        ('channels = ["conda-forge"]', "it has no packages of conda"),
        ('channel = "conda-forge"', "Did you mean 'channels'"),
        ("apt = [", "it is no TOML"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_told_with_its_line(tmp_path, line, answer):
    (tmp_path / "link").symlink_to("/etc/passwd")
    told = refused(tmp_path, f"# a recipe\n\n{line}\n")
    assert answer in told
    assert "recipe.toml, line 3" in told or answer == "it is no TOML"


@pytest.mark.parametrize(
    ("channel", "answer"),
    [
        ("/etc", "nothing that channels could have"),
        ("file:///etc", "not beside the recipe"),
        ("file:../..", "not beside the recipe"),
        ("file:missing", "there is no 'missing' beside it"),
        ("https://me:secret@conda.example/x", "a password or a token"),
        ("https://conda.example/t/SECRET/x", "a password or a token"),
    ],
)
def test_what_is_wrong_with_a_channel_is_told_with_its_line(tmp_path, channel, answer):
    told = refused(tmp_path, f'# a recipe\nconda = "numpy"\nchannels = "{channel}"\n')
    assert answer in told
    assert "recipe.toml, line 3" in told


def test_no_recipe_is_read_from_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, answer in (("pipe", "is no file"), ("missing", "No such file"), (".", "irectory")):
        with pytest.raises(SpecError, match=answer):
            read_recipe(str(tmp_path / name), OPENED)


def test_two_recipes_with_the_same_packages_have_one_base(tmp_path):
    one = read(tmp_path, 'apt = ["git", "less"]')
    two = read(tmp_path, 'apt = ["less", "git"]\n[files]\n"/a" = "recipe.toml"')
    other = read(tmp_path, 'apt = ["less"]')
    assert one.base_key == two.base_key != other.base_key


def test_a_recipe_of_conda_is_refused_before_anything_is_done_where_nobody_knows_its_packages(
    tmp_path, monkeypatch
):
    recipe = read(tmp_path, 'conda = ["numpy"]')
    store = Store(tmp_path / "store", os.geteuid())
    monkeypatch.setattr(conda.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HostError, match=r"pip install 'sandbox-provisioner\[conda\]'"):
        build("x", recipe, store, pytest.fail, Silent())
    assert not store.path.exists()


def test_channels_are_names_addresses_and_folders(tmp_path):
    (tmp_path / "mine").mkdir()
    recipe = read(
        tmp_path,
        'conda = "numpy"\nchannels = ["bioconda", "https://conda.example/x/", "file:mine"]\n',
    )
    assert recipe.channels == (
        "https://conda.anaconda.org/bioconda", "https://conda.example/x", tmp_path / "mine",
    )  # fmt: skip
    assert read(tmp_path, 'conda = "numpy"').channels == ("https://conda.anaconda.org/conda-forge",)
    for spec in ("numpy", "numpy=2", "numpy==2.0=py311_0", "numpy >=2,<3", "r-base=4.*"):
        assert read(tmp_path, f'conda = "{spec}"').conda == (spec,)


def test_conda_is_told_of_the_c_library_of_the_base(tmp_path):
    """dpkg's own order of fields, with those of more lines."""
    status = tmp_path / "status"
    status.write_text(
        "Package: libbz2-1.0\nVersion: 1.0.8\n\nPackage: libc6\nStatus: install ok installed\n"
        "Conffiles:\n /etc/ld.so.conf 4317c6de\nVersion: 2.41-12\n\nPackage: x\nVersion: 3.0\n"
    )
    assert conda.libc_of(FileLayer(status, "var/lib/dpkg/status")) == "2.41"
    status.write_text("Package: x\nVersion: 3.0\n")
    assert conda.libc_of(FileLayer(status, "./var/lib/dpkg/status")) == ""


# -- a build, but for mmdebstrap and the box


@pytest.fixture
def base(tmp_path, monkeypatch):
    """What mmdebstrap would have made, of a few files; how often it was asked to."""
    root = tmp_path / "base"
    for name, text in {
        "etc/machine-id": "1", "etc/resolv.conf": "x", "etc/hostname": "this-machine",
        "var/log/dpkg.log": "now", "var/cache/apt/pkgcache.bin": "x", "bin/sh": "x",
        "usr/lib/python3/dist-packages/ipykernel/__init__.py": "", "usr/bin/python3": "#!",
    }.items():  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    asked = []

    def run(recipe: Recipe, target: Path, work: Path, told: Any) -> None:
        asked.append(recipe)
        subprocess.run(["tar", "-C", root, "-cf", target, "."], check=True)

    monkeypatch.setattr(module, "_run_mmdebstrap", run)
    monkeypatch.setattr(module.shutil, "which", lambda name: f"/usr/bin/{name}")
    return asked


def tree_in(image: Path, folder: Path) -> set[str]:
    words = ["unsquashfs", "-quiet", "-no-progress", "-dest", str(folder), str(image)]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return {
        str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()
    }  # fmt: skip


def test_an_image_has_what_the_recipe_says_and_nothing_of_this_machine(tmp_path, base):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a").write_text("data")
    (tmp_path / "data/out").symlink_to("/etc/shadow")
    store = Store(tmp_path / "store", os.geteuid())
    recipe = read(tmp_path, '[files]\n"/srv/data" = "data"\n"/etc/motd" = "recipe.toml"\n')
    image = build("x", recipe, store, pytest.fail, Silent())
    assert image.python == "/usr/bin/python3"
    assert tree_in(store.file(image), tmp_path / "out") == {
        "bin/sh", "etc/motd", "srv/data/a", "srv/data/out", "usr/bin/python3",
        "usr/lib/python3/dist-packages/ipykernel/__init__.py",
    }  # fmt: skip
    assert os.readlink(tmp_path / "out/srv/data/out") == "/etc/shadow"
    assert (tmp_path / "out/bin/sh").stat().st_mtime == recipe.time


def test_the_same_recipe_has_the_same_digest_at_another_time(tmp_path, base):
    store = Store(tmp_path / "store", os.geteuid())
    recipe = read(tmp_path, '[files]\n"/a" = "recipe.toml"')
    first = build("x", recipe, store, pytest.fail, Silent())
    os.utime(tmp_path / "recipe.toml", (1, 1))
    for path in (store.path / "layers").iterdir():
        path.unlink()
    assert build("y", recipe, store, pytest.fail, Silent()).blob == first.blob
    assert len(base) == 2


def test_a_program_that_ends_without_a_word_is_asked_once_more(tmp_path, base, monkeypatch):
    """As sqfstar does on a busy machine."""
    real = squash.shutil.which("sqfstar") or "/usr/bin/sqfstar"
    program, count = tmp_path / "sqfstar", tmp_path / "count"
    program.write_text(
        f'#!/bin/sh\necho >> {count}\n[ $(wc -l < {count}) = 1 ] && kill -9 $$\nexec {real} "$@"\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr(squash.shutil, "which", lambda name: str(program))
    store = Store(tmp_path / "store", os.geteuid())
    image = build("x", read(tmp_path, ""), store, pytest.fail, Silent())
    assert (store.file(image).exists(), len(count.read_text())) == (True, 2)


def test_a_program_may_tell_any_amount_before_it_reads_and_its_last_words_are_told(
    tmp_path, base, monkeypatch
):
    """More than a pipe holds, of which nobody would read while both wait."""
    (tmp_path / "large").write_bytes(os.urandom(1 << 20))
    recipe = read(tmp_path, '[files]\n"/large" = "large"')
    real = squash.shutil.which("sqfstar") or "/usr/bin/sqfstar"
    program, talks = tmp_path / "sqfstar", "head -c 1000000 /dev/zero | tr '\\0' '\\n' >&2"
    monkeypatch.setattr(squash.shutil, "which", lambda name: str(program))
    store = Store(tmp_path / "store", os.geteuid())
    program.write_text(f'#!/bin/sh\n{talks}\nexec {real} "$@"\n')
    program.chmod(0o755)
    image = build("x", recipe, store, pytest.fail, Silent())
    assert store.file(image).exists()
    program.write_text(f"#!/bin/sh\n{talks}\necho it is too warm >&2\nexit 1\n")
    with pytest.raises(HostError, match="it is too warm"):
        build("x", recipe, store, pytest.fail, Silent())


def test_a_build_whose_pip_failed_goes_on_from_its_base(tmp_path, base):
    store = Store(tmp_path / "store", os.geteuid())
    recipe = read(tmp_path, 'pip = ["numpy"]')
    with pytest.raises(HostError, match="pip ended with status 3"):
        build("x", recipe, store, lambda order: 3, Silent())
    assert store.images() == []
    assert not list((store.path / "work").iterdir())
    image = build("x", recipe, store, fill_kernel, Silent())
    assert image.python == "/opt/kernel/bin/python3"
    assert len(base) == 1


def test_a_base_of_yesterday_is_made_anew_since_it_lacks_the_updates_of_today(tmp_path, base):
    store = Store(tmp_path / "store", os.geteuid())
    recipe = read(tmp_path, "")
    build("x", recipe, store, pytest.fail, Silent())
    yesterday = time.time() - 25 * 3600
    os.utime(store.layer(recipe.base_key), (yesterday, yesterday))
    build("x", recipe, store, pytest.fail, Silent())
    assert len(base) == 2
    build("x", recipe, store, pytest.fail, Silent())
    assert len(base) == 2


def test_without_a_mirror_mmdebstrap_is_given_none(tmp_path):
    """It adds Debian's updates and security only then (mmdebstrap(1), MIRROR)."""
    words = module._mmdebstrap(read(tmp_path, ""), tmp_path / "base.tar")
    assert words[-2:] == ["bookworm", str(tmp_path / "base.tar")]


def test_a_build_that_somebody_interrupts_is_no_mistake_of_the_recipe(tmp_path, base):
    store = Store(tmp_path / "store", os.geteuid())
    with pytest.raises(KeyboardInterrupt):
        build("x", read(tmp_path, 'pip = "numpy"'), store, lambda order: 130, Silent())
    assert not list((store.path / "work").iterdir())


def test_a_full_disk_is_told_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "which", lambda name: f"/usr/bin/{name}")
    program = tmp_path / "mmdebstrap"
    program.write_text("#!/bin/sh\necho 'E: You have not enough free space in /x' >&2; exit 25\n")
    program.chmod(0o755)
    monkeypatch.setattr(module, "_mmdebstrap", lambda recipe, target: [str(program)])
    store = Store(tmp_path / "store", os.geteuid())
    with pytest.raises(HostError, match=r"the disk is full\. Make room there"):
        build("x", read(tmp_path, ""), store, pytest.fail, Silent())
    assert not list((store.path / "layers").iterdir())
    assert not list((store.path / "work").iterdir())


@pytest.mark.parametrize(
    ("index", "rules"),
    [
        ("https://pypi.org/simple", ("pypi.org:443", "files.pythonhosted.org:443")),
        ("http://me:secret@mirror.example:8080/simple", ("mirror.example:8080",)),
        ("https://10.1.2.3/simple", ("10.1.2.3:443",)),
    ],
)
def test_pip_speaks_with_the_index_of_the_recipe_and_nobody_else(tmp_path, base, index, rules):
    """What a box is given has to be what `network_allow` can have."""
    orders = []
    recipe = read(tmp_path, f'pip = "numpy"\nindex = "{index}"')
    with pytest.raises(HostError, match="status 3"):
        store = Store(tmp_path / "store", os.geteuid())
        build("x", recipe, store, lambda order: orders.append(order) or 3, Silent())
    assert orders[0].allow == rules
    NetworkWish(mode=Network.GATEWAY, allow=orders[0].allow)


def fill_kernel(order: BoxOrder) -> int:
    """A box in which pip does what it should; what it is given is what it may have."""
    assert order.allow == ("packages",)
    assert os.path.isfile(order.root)
    (stage,) = (v.split(":")[0] for v in order.volumes if v.endswith(":/opt/kernel:rw"))
    packages = Path(stage, "lib/python3.11/site-packages/ipykernel")
    packages.mkdir(parents=True)
    (packages / "__init__.py").write_text("")
    Path(stage, "bin").mkdir()
    Path(stage, "bin/python3").symlink_to("/usr/bin/python3")
    assert "numpy" in order.argv
    return 0


def test_local_wheels_need_no_network(tmp_path, base):
    (tmp_path / "wheels").mkdir()
    store = Store(tmp_path / "store", os.geteuid())
    orders = []

    def box(order: BoxOrder) -> int:
        orders.append(order)
        return fill_kernel(BoxOrder(**{**{name: getattr(order, name) for name in
                           ("root", "argv", "volumes")}, "allow": ("packages",)}))  # fmt: skip

    build("x", read(tmp_path, 'pip = "numpy"\nwheels = "wheels"'), store, box, Silent())
    assert orders[0].allow == ()
    assert "--no-index" in orders[0].argv
    assert f"{tmp_path}/wheels:/opt/wheels:ro" in orders[0].volumes


@pytest.mark.parametrize("source", ["d/secret", "d", "d/deep"])
def test_what_becomes_a_link_while_the_base_is_made_is_not_followed(tmp_path, base, source):
    """Who wrote the recipe changes where it leads, after it was read."""
    for folder in ("recipe/d/deep", "away/deep"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "secret").write_text("")
        (tmp_path / folder).with_name("secret").write_text("")
    recipe = read(tmp_path / "recipe", f'[files]\n"/srv/x" = "{source}"')
    (tmp_path / "recipe/d").rename(tmp_path / "recipe/d2")
    (tmp_path / "recipe/d").symlink_to(tmp_path / "away")
    store = Store(tmp_path / "store", os.geteuid())
    with pytest.raises(OSError, match="openat2"):
        build("x", recipe, store, pytest.fail, Silent())
    assert not store.images()


def test_the_folder_of_a_recipe_is_the_one_that_was_opened(tmp_path, base):
    for folder in ("recipe", "away"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_text(folder)
    recipe = read(tmp_path / "recipe", '[files]\n"/srv/x" = "file"')
    (tmp_path / "recipe").rename(tmp_path / "moved")
    (tmp_path / "recipe").symlink_to(tmp_path / "away")
    ((_, source),) = recipe.files
    for _, content in module._copied(recipe, source, "/srv/x").members():
        assert content.read() == b"recipe"
    assert conda._lock_at(recipe).parent.samefile(tmp_path / "moved")


def test_what_a_box_has_left_is_taken_as_it_is_and_leads_nowhere(tmp_path):
    stage = tmp_path / "stage"
    stage.mkdir()
    (stage / "out").symlink_to("/etc")
    (stage / "file").symlink_to("/etc/shadow")
    os.mkfifo(stage / "pipe")
    entries = [entry for entry, _ in FolderLayer(stage, "opt/kernel").members()]
    found = {entry.name: entry.kind for entry in entries if entry}
    assert found["opt/kernel/out"] is found["opt/kernel/file"] is Kind.SYMLINK
    assert not any("shadow" in name or "passwd" in name or "pipe" in name for name in found)


def test_what_becomes_a_pipe_while_it_is_read_is_not_waited_for(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    recipe, look = read(tmp_path, '[files]\n"/srv/x" = "data"'), os.lstat
    ((_, source),) = recipe.files

    def swapped_then(name: str, **where: int) -> os.stat_result:
        found = look(name, **where)
        (tmp_path / "pipe").rename(tmp_path / "data/file")
        return found

    monkeypatch.setattr(os, "lstat", swapped_then)
    with pytest.raises(Refused, match="file changes while it is read"):
        list(module._copied(recipe, source, "/srv/x").members())


def test_folders_deeper_than_anybody_walks_are_refused_with_their_reason(tmp_path, base):
    fd = os.open(tmp_path, os.O_RDONLY)
    for name in ["deep", *["d"] * 1500]:
        os.mkdir(name, dir_fd=fd)
        inner = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)
    recipe = read(tmp_path, '[files]\n"/srv/x" = "deep"')
    store = Store(tmp_path / "store", os.geteuid())
    try:
        with pytest.raises(SpecError, match="too deep in one another"):
            build("x", recipe, store, pytest.fail, Silent())
    finally:
        removal.empty(tmp_path / "deep")  # or every later pytest fails that would


# -- a course in one file


def test_a_course_is_a_kernelspec_with_the_options_of_its_file(command, tmp_path):  # noqa: F811
    (tmp_path / "sandbox.toml").write_text(
        'name = "course"\ndisplay_name = "Statistics 1"\nmem_limit = "2G"\npids_limit = 99\n'
        'network = "gateway"\nnetwork_allow = ["data.example.org"]\npreload = ["json"]\n'
    )
    command("install", "--from", tmp_path / "sandbox.toml", "--prefix", tmp_path / "prefix",
            "--pids-limit", "77")  # fmt: skip
    found = kernel_json(tmp_path / "prefix", "course")
    assert found["display_name"] == "Statistics 1"
    assert found["metadata"]["kernel_provisioner"]["config"] == {
        "mem_limit": "2G", "network": "gateway", "network_allow": ["data.example.org"],
        "preload": ["json"], "pids_limit": 77,
    }  # fmt: skip


def test_no_record_of_an_image_gets_a_variable_of_the_server_into_a_kernelspec(monkeypatch):
    python = "/${JUPYTERHUB_API_TOKEN}/bin/python3"
    image = Image(name="x", blob="", size_bytes=0, origin="", python=python)
    monkeypatch.setattr(course, "find", lambda *_: (image, Path("/x")))
    with pytest.raises(SpecError, match="no path that a kernelspec can have"):
        course.in_its_root(KernelSpec(argv=["python3"]), "x")


def test_a_course_without_a_name_is_named_as_its_folder(tmp_path):
    folder = tmp_path / "Statistics 1"
    folder.mkdir()
    (folder / "sandbox.toml").write_text("")
    assert read_course(str(folder / "sandbox.toml")).name == "statistics-1"


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ('mem_limitt = "2G"', "Did you mean 'mem_limit'"),
        ('memory = "2G"', "Did you mean 'mem_limit'"),
        ('mem_limit = "lots"', "'lots' is not a size"),
        ("mem_limit = [1]", "mem_limit"),
        ('network_allow = ["a b"]', "network_allow"),
        ("preload = 7", "a list of texts"),
        ('confinement = "jail"', "confinement"),
        ('name = "a/b"', "no name for a kernel"),
        ('name = ".."', "no name for a kernel"),
    ],
)
def test_what_is_wrong_in_a_course_is_told_with_its_line(tmp_path, line, answer):
    (tmp_path / "sandbox.toml").write_text(f"pids_limit = 9\n\n{line}\n")
    with pytest.raises(SpecError) as error:
        read_course(str(tmp_path / "sandbox.toml"))
    assert answer in str(error.value)
    assert "sandbox.toml, line 3" in str(error.value)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ('network_allow = ["data.example.org"]', 'network = "none" has no network'),
        ('rootfs = "no-such-image"', "To make one, see docs/images.md"),
    ],
)
def test_what_does_not_fit_together_in_a_course_is_told_of_its_file(
    command,  # noqa: F811
    tmp_path,
    text,
    answer,
):
    (tmp_path / "sandbox.toml").write_text(text)
    with pytest.raises(SpecError, match=r"\(of .*sandbox\.toml\)") as error:
        command("install", "--from", tmp_path / "sandbox.toml", "--prefix", tmp_path / "prefix")
    assert answer in str(error.value)
    assert not (tmp_path / "prefix").exists()


def test_nothing_is_installed_of_a_course_with_a_mistake(command, tmp_path):  # noqa: F811
    (tmp_path / "sandbox.toml").write_text('mem_limit = "lots"')
    with pytest.raises(SpecError, match="line 1"):
        command("install", "--from", tmp_path / "sandbox.toml", "--prefix", tmp_path / "prefix")
    assert not (tmp_path / "prefix").exists()


# -- what the page says


def test_the_page_of_images_knows_every_word_of_a_recipe():
    text = DOCUMENT.read_text()
    assert [key for key in KEYS if f"`{key}`" not in text] == []
