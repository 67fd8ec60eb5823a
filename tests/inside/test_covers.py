"""Attempted escapes: through files of a home that the host runs, reads or trusts later."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from probes import answer_of, attempt_to_open

from sandbox_provisioner.errors import SandboxError
from sandbox_provisioner.spec import STAND_IN_NOTE, Covers

pytestmark = pytest.mark.requires("userns")

COVERS = Covers()
SECRET = "s3cret"


@pytest.fixture
def home(workdir, monkeypatch):
    """A home directory, which is also the work directory."""
    monkeypatch.setenv("HOME", str(workdir))
    return workdir


def fill(home):
    """Put something into everything that is covered."""
    for name in COVERS.home_directories:
        (home / name).mkdir(parents=True, exist_ok=True)
        (home / name / "file").write_text(SECRET)
    for name in COVERS.home_files:
        (home / name).write_text(SECRET)


def tree_of(folder):
    """Every path below *folder*, with the text of files and the target of links."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            found[name] = path.read_text() if path.is_file() else None
    return found


def read_everything(directories, files):
    """All text that can be read at the covered places."""
    import os

    found = {}
    for directory in directories:
        for folder, _, names in os.walk(directory):
            for name in names:
                found[f"{folder}/{name}"] = open(f"{folder}/{name}").read()
    for name in files:
        if os.path.exists(name):
            found[name] = open(name).read()
    return {name: text for name, text in found.items() if text}


def write_everywhere(directories, files):
    """Plant something at each covered place; how often that went well."""
    import contextlib
    import os

    count = 0
    for directory in directories:
        with contextlib.suppress(OSError):
            os.makedirs(directory, exist_ok=True)
        with contextlib.suppress(OSError), open(f"{directory}/planted", "w") as file:
            count += bool(file.write("planted"))
    for name in files:
        with contextlib.suppress(OSError), open(name, "w") as file:
            count += bool(file.write("planted"))
    return count


PLACES = (COVERS.home_directories, COVERS.home_files)


def test_what_is_secret_in_a_home_cannot_be_read(home, run_inside):
    fill(home)
    assert run_inside(read_everything, *PLACES) == {}


@pytest.mark.parametrize("existing", [True, False])
def test_what_a_kernel_writes_to_trusted_places_stays_in_the_sandbox(home, sandbox, existing):
    if existing:
        fill(home)
    before = tree_of(home)
    with sandbox() as box:
        assert box.call(write_everywhere, *PLACES) == len(PLACES[0]) + len(PLACES[1])
        assert "planted" not in tree_of(home).values()
        assert len(box.call(read_everything, *PLACES)) == len(PLACES[0]) + len(PLACES[1])
    assert tree_of(home) == before


def test_existing_files_keep_their_times_and_modes(home, run_inside):
    fill(home)
    before = {path: path.stat() for path in home.rglob("*")}
    run_inside(write_everywhere, *PLACES)
    for path, status in before.items():
        now = path.stat()
        assert (now.st_mode, now.st_uid, now.st_ino) == (
            status.st_mode,
            status.st_uid,
            status.st_ino,
        )
        assert path.is_dir() or now.st_mtime_ns == status.st_mtime_ns


def test_everything_else_in_a_home_is_the_persons_own(home, run_inside):
    def write():
        import os

        os.makedirs("project/.local")
        os.makedirs(".local/share/own", exist_ok=True)
        open(".local/share/own/file", "w").close()
        open("project/.bashrc", "w").close()
        return os.path.expanduser("~")

    assert run_inside(write) == str(home)
    assert (home / "project/.bashrc").exists()
    assert (home / ".local/share/own/file").exists()


def test_no_stand_in_and_no_folder_above_one_can_be_moved_or_removed(home, run_inside):
    def move():
        import os

        parents = (".local", ".local/share")
        found = {name: answer_of(lambda n=name: os.rename(n, n + "2")) for name in parents}
        for name in (".ssh", ".config", ".local/share/jupyter"):
            found[name] = answer_of(lambda n=name: os.rename(n, n + "2"))
            found[f"rmdir {name}"] = answer_of(lambda n=name: os.rmdir(n))
        for name in (".bashrc", ".profile", ".netrc"):
            found[name] = answer_of(lambda n=name: os.rename(n, n + "2"))
            found[f"unlink {name}"] = answer_of(lambda n=name: os.unlink(n))
            found[f"replace {name}"] = answer_of(lambda n=name: os.rename("mine", n))
        open("mine", "w").close()
        return found

    (home / "mine").touch()
    (home / "mine").chmod(0o666)
    answers = run_inside(move, using=(answer_of,))
    assert set(answers.values()) <= {"EBUSY", "EXDEV"}, answers


def test_a_hard_link_does_not_lead_around_a_cover(home, run_inside):
    def link():
        import os

        return [
            answer_of(lambda: os.link(".bashrc", "mine")),
            answer_of(lambda: os.link(".ssh/file", "mine")),
        ]

    fill(home)
    assert set(run_inside(link, using=(answer_of,))) <= {"EXDEV", "ENOENT"}


# -- symbolic links


@pytest.mark.parametrize("name", [".ssh", ".config", ".local", ".bashrc", ".local/share"])
def test_a_link_planted_at_a_covered_place_leads_no_mount_to_the_host(
    home, run_inside, new_folder, name
):
    target = new_folder()
    target.chmod(0o777)
    (target / "file").write_text(SECRET)
    (home / name).parent.mkdir(parents=True, exist_ok=True)
    (home / name).symlink_to(target)
    before = tree_of(target)
    assert SECRET not in run_inside(read_everything, *PLACES).values()
    run_inside(write_everywhere, *PLACES)
    assert tree_of(target) == before
    assert (home / name).readlink() == target


@pytest.mark.parametrize("name", [".ssh", ".local", ".bashrc"])
def test_a_link_to_nothing_makes_nothing_on_the_host(home, run_inside, new_folder, name):
    target = new_folder() / "not-there"
    (home / name).symlink_to(target)
    run_inside(write_everywhere, *PLACES)
    assert not target.exists()


def test_what_a_link_at_a_covered_place_leads_to_is_covered_as_well(home, run_inside):
    """Many keep their settings in one folder, and have links to it in their home."""

    def write():
        import os

        flags = os.O_WRONLY | os.O_CREAT
        files = ("dotfiles/bashrc", "dotfiles/config/planted")
        return [attempt_to_open(name, flags) for name in files]

    dotfiles = home / "dotfiles"
    (dotfiles / "config").mkdir(parents=True)
    (dotfiles / "bashrc").write_text("alias ll='ls -l'\n")
    for path in (dotfiles, dotfiles / "config", dotfiles / "bashrc"):
        path.chmod(0o777)
    (home / ".bashrc").symlink_to("dotfiles/bashrc")
    (home / ".config").symlink_to("dotfiles/config")
    run_inside(write, using=(attempt_to_open,))
    assert (dotfiles / "bashrc").read_text() == "alias ll='ls -l'\n"
    assert os.listdir(dotfiles / "config") == []


def test_a_file_in_place_of_a_covered_directory_does_not_stop_a_start(home, run_inside):
    for name in (".ssh", ".local", ".config"):
        (home / name).write_text("in the way")
    before = tree_of(home)
    assert "in the way" not in run_inside(read_everything, (), (".ssh", ".config")).values()
    assert tree_of(home) == before


# -- more than one kernel, and the person at the same time


def test_the_covers_of_one_kernel_hold_when_another_ends(home, sandbox):
    before = tree_of(home)
    with sandbox() as second:
        with sandbox() as first:
            assert first.call(write_everywhere, *PLACES)
        assert second.call(write_everywhere, *PLACES) == len(PLACES[0]) + len(PLACES[1])
        assert "planted" not in tree_of(home).values()
    assert tree_of(home) == before


def test_the_covers_of_a_later_kernel_hold_when_the_first_ends(home, sandbox):
    before = tree_of(home)
    first = sandbox()
    with first:
        pass
    with sandbox() as one:
        later = sandbox()
        other = later.__enter__()
        one.close()
        assert other.call(write_everywhere, *PLACES) == len(PLACES[0]) + len(PLACES[1])
        assert "planted" not in tree_of(home).values()
        later.__exit__(None, None, None)
    assert tree_of(home) == before


def test_what_a_person_writes_over_a_stand_in_stays(home, sandbox):
    def add_to(path):
        with path.open("a") as file:
            file.write("export EDITOR=vi\n")

    with sandbox():
        add_to(home / ".bashrc")
        (home / ".ssh/config").write_text("Host *\n")
    assert (home / ".bashrc").read_text() == "export EDITOR=vi\n"
    assert tree_of(home) == {
        ".bashrc": "export EDITOR=vi\n",
        ".ssh": None,
        ".ssh/config": "Host *\n",
    }


def test_a_person_who_replaces_a_stand_in_ends_the_kernel_that_would_see_the_new_file(
    home, sandbox
):
    """rename(2) over a mount point takes the mount away in the kernel's namespace."""
    with sandbox() as box:
        new = home / ".bashrc.new"
        new.write_text("mine")
        new.replace(home / ".bashrc")
        story = box.wait()
        assert story.cover_lost
        assert "must not reach" in story.reason
    assert (home / ".bashrc").read_text() == "mine"


# -- what is not the home itself


def test_a_home_within_the_work_directory_is_covered_too(workdir, run_inside, monkeypatch):
    home = workdir / "people" / "me"
    home.mkdir(parents=True)
    fill(home)
    before = tree_of(home)
    monkeypatch.setenv("HOME", str(home))
    places = [[f"people/me/{name}" for name in names] for names in PLACES]
    assert run_inside(read_everything, *places) == {}
    run_inside(write_everywhere, *places)
    assert tree_of(home) == before


@pytest.mark.parametrize("name", [".ssh", ".config", ".local/share/jupyter", ".config/own"])
def test_a_covered_place_is_no_work_directory(new_folder, sandbox, monkeypatch, name):
    home = new_folder()
    (home / name).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    with pytest.raises(SandboxError, match=r"work directory"), sandbox(workdir=home / name):
        pass


def test_the_covers_hold_where_the_work_directory_is_a_part_of_the_home(
    new_folder, run_inside, monkeypatch
):
    home = new_folder()
    (home / ".local/share/jupyter/kernels").mkdir(parents=True)
    for path in home.rglob("*"):
        path.chmod(0o777)
    monkeypatch.setenv("HOME", str(home))
    before = tree_of(home)
    run_inside(write_everywhere, ["share/jupyter/kernels"], [], workdir=home / ".local")
    assert tree_of(home) == before


@pytest.mark.parametrize(
    "name", ["JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR", "XDG_CONFIG_HOME"]
)
def test_folders_that_the_servers_environment_names_as_its_own_are_covered(
    workdir, run_inside, monkeypatch, name
):
    folder = workdir / "settings"
    folder.mkdir(mode=0o777)
    monkeypatch.setenv(name, str(folder))
    run_inside(write_everywhere, ["settings"], [])
    assert os.listdir(folder) == []


def test_a_folder_that_is_nobodys_home_is_not_covered(run_inside, workdir):
    run_inside(write_everywhere, *PLACES)
    assert (workdir / ".bashrc").read_text() == "planted"


# -- repositories and the server's own folder


def make_repository(folder):
    (folder / ".git/hooks").mkdir(parents=True)
    (folder / ".git/config").write_text("[core]\n")
    (folder / ".git/hooks/pre-commit.sample").write_text("#!/bin/sh\n")
    for path in (folder / ".git").rglob("*"):
        path.chmod(0o777)


def test_the_programs_that_git_would_run_cannot_be_planted(workdir, run_inside):
    def plant():
        import os

        flags = os.O_WRONLY | os.O_CREAT
        return {
            "hook": attempt_to_open(".git/hooks/pre-commit", flags),
            "config": attempt_to_open(".git/config", os.O_WRONLY),
            "replace config": answer_of(lambda: os.rename(".git/HEAD", ".git/config")),
            "move": answer_of(lambda: os.rename(".git", ".git2")),
            "move hooks": answer_of(lambda: os.rename(".git/hooks", ".git/hooks2")),
            "commit": attempt_to_open(".git/HEAD", flags),
        }

    make_repository(workdir)
    (workdir / ".git/HEAD").write_text("ref: refs/heads/main\n")
    (workdir / ".git/HEAD").chmod(0o666)
    before = tree_of(workdir)
    answers = run_inside(plant, using=(answer_of, attempt_to_open))
    assert answers["commit"] == "opened"
    assert answers["config"] == "EROFS"
    assert {answers[name] for name in ("replace config", "move", "move hooks")} == {"EBUSY"}
    assert tree_of(workdir) == before


def test_a_configuration_for_the_next_jupyter_server_cannot_be_planted(
    workdir, sandbox, monkeypatch
):
    monkeypatch.chdir(workdir)
    (workdir / "jupyter_lab_config.py").write_text("c.mine = 1\n")
    with sandbox() as box:
        assert (workdir / "jupyter_server_config.py").read_text() == STAND_IN_NOTE
        box.call(write_everywhere, (), COVERS.server_files)
        assert "planted" not in tree_of(workdir).values()
    assert tree_of(workdir) == {"jupyter_lab_config.py": "c.mine = 1\n"}


def test_the_servers_folder_within_the_work_directory_is_covered_too(
    workdir, run_inside, monkeypatch
):
    (workdir / "notebooks").mkdir(mode=0o777)
    monkeypatch.chdir(workdir / "notebooks")
    run_inside(write_everywhere, (), ["notebooks/jupyter_server_config.py"])
    assert os.listdir(workdir / "notebooks") == []


@pytest.mark.requires("root")
@pytest.mark.parametrize("owner", [0, 4321])
def test_stand_ins_belong_to_the_owner_of_the_home_while_they_are_there(home, sandbox, owner):
    os.chown(home, owner, owner)
    with sandbox():
        made = [path for path in home.rglob("*")]
        assert len(made) > len(COVERS.home_files)
        assert {path.lstat().st_uid for path in made} == {owner}
        assert {path.lstat().st_mode & 0o077 for path in made} == {0}


@pytest.mark.requires("root")
def test_a_home_that_cannot_be_written_to_is_no_reason_to_start_uncovered(home, sandbox):
    """A directory that its owner made read-only: nothing can be planted, or nothing starts."""
    Path(home).chmod(0o500)
    try:
        with sandbox() as box:
            box.call(write_everywhere, *PLACES)
    except SandboxError as error:
        assert "[cover]" in str(error)
    home.chmod(0o700)
    assert tree_of(home) == {}
