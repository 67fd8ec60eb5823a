"""Images that an ordinary user makes, who has a range of ids and a store of their own.

The real mmdebstrap fills a root of a few files in a user namespace; builders are killed, two are at
it, and the disk is full.
"""

from __future__ import annotations

import os
import subprocess
import tarfile
from pathlib import Path

import pytest
import roots
import users
from channels import Channel

pytestmark = [
    pytest.mark.requires(
        "root", "mmdebstrap", "sqfstar", "userns", "setpriv", "public-python", "newuidmap"
    ),
    pytest.mark.timeout(300),
]
RECIPE = 'conda = ["tool"]\nchannels = ["file:channel"]\n'
RANGES = f"{users.NAME}:{users.FIRST_UID}:65536\n", f"{users.NAME}:{users.FIRST_GID}:65536\n"
# It may have no essential packages, but has to find a list of some.
LISTED = (
    "Package: nothing\nVersion: 1\nArchitecture: all\nMaintainer: a\nFilename: ./nothing.deb\n"
    f"Size: 1\nSHA256: {'0' * 64}\n\n"
)
# The mode is what the builder has chosen.
MMDEBSTRAP = """#!/bin/sh
for word; do case "$word" in *.tar) target=$word;; --mode=*) mode=$word;; esac; done
echo "$mode" >> {home}/modes
[ -p {home}/go ] && read word < {home}/go
exec {program} "$mode" --variant=custom --format=tar \
    --setup-hook='mkdir -p "$1/etc/apt" "$1/var/lib/dpkg"' \
    --customize-hook='tar-in {home}/root.tar /' \
    "" "$target" "deb [trusted=yes] copy:{home}/repository ./"
"""


class Home:
    """That of the user, with all that a build needs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.chown(path, users.USER, users.USER)
        users.write_files(path, *RANGES)
        self.store = path / ".local/share/jupyter/sandbox/images"
        (path / "work/recipe.toml").write_text(RECIPE)
        self._fill_channel(Channel(path / "work/channel"))
        self._fill_root()
        (path / "repository").mkdir()
        (path / "repository/Packages").write_text(LISTED)
        program = path / "bin/mmdebstrap"
        program.parent.mkdir()
        real = subprocess.check_output(["which", "mmdebstrap"], text=True).strip()
        program.write_text(MMDEBSTRAP.format(home=path, program=real))
        program.chmod(0o755)

    def _fill_channel(self, channel: Channel) -> None:
        packages = f"lib/{roots.LIBRARY}/site-packages"
        channel.add("python", {"bin/python3": "#!/bin/sh\n"}, executable=("bin/python3",),
                    links={"bin/python": "python3"})  # fmt: skip
        channel.add("ipykernel", {f"{packages}/ipykernel/__init__.py": ""}, depends=("python",))
        channel.add("tool", {"share/tool": "a tool"})

    def _fill_root(self) -> None:
        with tarfile.open(self.path / "root.tar", "w") as tar:
            tar.add(roots.shell(), arcname=".")

    def build(self, name: str) -> list[str]:
        return ["-m", "sandbox_provisioner.app", "image", "build", name,
                str(self.path / "work/recipe.toml")]  # fmt: skip

    @property
    def variables(self) -> dict[str, str]:
        return {"PATH": f"{self.path}/bin:{os.defpath}:/usr/sbin:/sbin"}

    def run(self, *words: str) -> tuple[int, str]:
        done = users.try_as_user(self.path, *words, variables=self.variables)
        return done.returncode, done.stdout

    def start(self, *words: str) -> subprocess.Popen[str]:
        return users.start_as_user(self.path, *words, variables=self.variables)

    def names(self, folder: str) -> list[str]:
        return sorted(path.name for path in (self.store / folder).iterdir())

    def modes(self) -> list[str]:
        return (self.path / "modes").read_text().split()


@pytest.fixture
def home(user_home: Path) -> Home:
    return Home(user_home)


def test_a_user_with_a_range_of_ids_builds_an_image_of_their_own(home: Home) -> None:
    status, told = home.run(*home.build("course"))
    assert (status, "Its kernel is /opt/kernel/bin/python3" in told) == (0, True), told
    assert home.modes() == ["--mode=unshare"]
    (folder, file) = home.names("blobs")
    assert file == f"{folder}.squashfs"
    assert {path.stat().st_uid for path in (home.store / "blobs").iterdir()} == {users.USER}
    assert (home.store / "blobs" / folder / "opt/kernel/share/tool").read_text() == "a tool"
    status, told = home.run("-m", "sandbox_provisioner.app", "image", "check", "course")
    assert status == 0, told
    assert home.names("work") == []


@pytest.mark.parametrize(
    ("subuid", "subgid", "answer"),
    [
        ("", RANGES[1], f"/etc/subuid gives {users.NAME} no 65536 ids"),
        # newuidmap takes a number for a name, mmdebstrap does not.
        (RANGES[0], f"{users.USER}:500000:65536\n", f"no entry in /etc/subgid for {users.NAME}"),
    ],
)
def test_a_user_without_one_is_told_how_to_get_it(
    home: Home, subuid: str, subgid: str, answer: str
) -> None:
    users.write_files(home.path, subuid, subgid)
    status, told = home.run(*home.build("course"))
    told = " ".join(told.split())
    assert (status, answer in told) == (1, True), told
    given = max(int(line.split(":")[1]) for line in (subuid + subgid).splitlines()) + 65536
    span = f"{given}-{given + 65535}"
    assert f"sudo usermod --add-subuids {span} --add-subgids {span} {users.NAME}" in told
    assert not (home.store / "blobs").exists() or home.names("blobs") == []


def until(process: subprocess.Popen[str], line: str) -> None:
    """It has said *line*."""
    assert process.stdout
    said = []
    for one in process.stdout:
        said.append(one)
        if line in one:
            return
    raise AssertionError("".join(said))


def test_a_builder_that_is_killed_leaves_nothing_that_the_next_one_does_not_clear(
    home: Home,
) -> None:
    for line in ("running --setup-hook", "conda's packages, in a box", "Writing the image"):
        with home.start(*home.build("course")) as process:
            until(process, line)
            process.kill()
        assert home.names("blobs") == home.names("names") == []
    status, told = home.run(*home.build("course"))
    assert status == 0, told
    assert home.names("names") == ["course.json"]
    assert (len(home.names("blobs")), home.names("work")) == (2, [])
    # What apt installs was whole after the first of them.
    assert len(home.modes()) == 2


def test_the_second_of_two_builders_is_told_who_is_at_it(home: Home) -> None:
    os.mkfifo(home.path / "go", 0o666)
    os.chmod(home.path / "go", 0o666)
    with home.start(*home.build("course")) as first:
        until(first, "packages that the recipe needs")
        status, told = home.run(*home.build("course"))
        told = " ".join(told.split())
        assert (status, f"process {first.pid} has been at it since" in told) == (1, True), told
        # One of another name waits for the same packages, and has them.
        with home.start(*home.build("other")) as other:
            until(other, "Waiting for another build of the same packages")
            (home.path / "go").write_text("go\n")
            rest, _ = first.communicate()
            told, _ = other.communicate()
    assert (first.returncode, other.returncode) == (0, 0), rest + told
    assert home.names("names") == ["course.json", "other.json"]
    # The same recipe has the same digest.
    assert len(home.names("blobs")) == 2
    assert len(home.modes()) == 1


def test_a_full_disk_is_told_wherever_a_build_meets_it_and_leaves_nothing(home: Home) -> None:
    home.store.mkdir(parents=True)
    for folder in (home.store, *home.store.relative_to(home.path).parents):
        os.chown(home.path / folder, users.USER, users.USER)
    base = (home.path / "root.tar").stat().st_size
    sizes = [base // 2, base + (256 << 10), base + (1 << 20), base * 2, base * 4, base * 16]
    mount = ["mount", "-t", "tmpfs", "-o", f"uid={users.USER},gid={users.USER},mode=700"]
    subprocess.run([*mount, "sbx-full", home.store], check=True)
    try:
        failed = 0
        for size in sizes:
            subprocess.run(["mount", "-o", f"remount,size={size}", home.store], check=True)
            status, told = home.run(*home.build("course"))
            if status == 0:
                break
            failed += 1
            assert "ake room there" in told or "room for all files" in told, told
            assert home.names("names") == home.names("blobs") == home.names("work") == []
        assert (failed >= 3, home.names("names")) == (True, ["course.json"])
    finally:
        subprocess.run(["umount", home.store], check=True)
