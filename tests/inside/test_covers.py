"""Attempted escapes: through files of a home that the host runs, reads or trusts later."""

from __future__ import annotations

import os
import select
import subprocess
from pathlib import Path

import pytest
from probes import answer_of, attempt_to_open

from sandbox_provisioner.errors import SandboxError
from sandbox_provisioner.spec import Covers
from sandbox_provisioner.told import EndKind

pytestmark = pytest.mark.requires("userns")

COVERS = Covers()
SECRET = "s3cret"


@pytest.fixture
def home(workdir, monkeypatch):
    """A home directory, which is also the work directory."""
    monkeypatch.setenv("HOME", str(workdir))
    return workdir


# Some of no list: whatever begins with a dot is covered.
UNHEARD_OF = (".unheard-of", ".unheard-of-rc")


def fill(home):
    """Put something into everything that is covered."""
    for name in (*COVERS.home_directories, UNHEARD_OF[0]):
        (home / name).mkdir(parents=True, exist_ok=True)
        (home / name / "file").write_text(SECRET)
    for name in (*COVERS.home_files, UNHEARD_OF[1]):
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
# What is in a home already is the same for names that nobody has thought of.
FILLED = ((*PLACES[0], UNHEARD_OF[0]), (*PLACES[1], UNHEARD_OF[1]))


def test_what_is_secret_in_a_home_cannot_be_read(home, run_inside):
    fill(home)
    assert run_inside(read_everything, *FILLED) == {}


@pytest.mark.parametrize("existing", [True, False])
def test_what_a_kernel_writes_to_trusted_places_stays_in_the_sandbox(home, sandbox, existing):
    if existing:
        fill(home)
    places = FILLED if existing else PLACES
    before = tree_of(home)
    with sandbox() as box:
        assert box.call(write_everywhere, *places) == len(places[0]) + len(places[1])
        assert "planted" not in tree_of(home).values()
        assert len(box.call(read_everything, *places)) == len(places[0]) + len(places[1])
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
        open("project/.bashrc", "w").close()
        open("data.csv", "w").close()
        os.rename("data.csv", "renamed.csv")
        open(".gitignore", "a").close()
        return os.path.expanduser("~")

    (home / ".gitignore").touch(0o666)
    assert run_inside(write) == str(home)
    names = {".gitignore", "project", "project/.local", "project/.bashrc", "renamed.csv"}
    assert tree_of(home).keys() == names


def test_no_stand_in_and_no_folder_above_one_can_be_moved_or_removed(home, run_inside):
    def move():
        import os

        found = {}
        for name in (".ssh", ".config", ".local"):
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
    assert not (home / ".bashrc").is_symlink()
    assert tree_of(home) == {
        ".bashrc": "export EDITOR=vi\n",
        ".ssh": None,
        ".ssh/config": "Host *\n",
    }


def test_to_a_program_outside_a_file_that_is_not_there_is_not_there_while_a_kernel_runs(
    home, sandbox
):
    """bash takes the first of .bash_profile, .bash_login and .profile that it finds."""
    (home / ".profile").write_text("echo my profile\n")
    with sandbox():
        told = subprocess.run(
            ["bash", "--login", "-c", "true"], env={"HOME": str(home), "PATH": os.defpath},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert (told.stdout, told.stderr) == ("my profile\n", "")
        shown = [path for path in home.iterdir() if not path.name.startswith(".")]
        assert [path.name for path in shown if not path.is_socket()] == []
        assert [path.name for path in shown] == ["bin"]


# -- what programs outside do on an ordinary day


def replace(path, text):
    """As editors, git and shells do."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text)
    new.replace(path)


def rename_and_write(path, text):
    """As vim does."""
    if path.exists():
        path.rename(f"{path}~")
    path.write_text(text)


def remove_and_write(path, text):
    path.unlink()
    path.write_text(text)


def file_system_of(name):
    """The number of the file system on which *name* lies, or the next directory above it."""
    import os

    while not os.path.lexists(name):
        name = os.path.dirname(name) or "."
    return os.lstat(name).st_dev


def mended(box, path):
    """Wait until *path*, in the work directory, is covered inside; the sentences of PID 1.

    A kernel that has been stopped answers when it goes on. Only to look lays no hands on a file.
    """
    host, told = file_system_of(str(path)), []
    while box.call(file_system_of, path.name) == host:
        select.select([box.handle._control], [], [], 0.01)
        told += box.handle.notices()
    return told + box.handle.notices()


@pytest.mark.parametrize("change", [replace, rename_and_write, remove_and_write])
@pytest.mark.parametrize("existing", [True, False])
def test_a_file_that_a_program_outside_replaces_is_covered_again_and_the_kernel_goes_on(
    home, sandbox, change, existing
):
    if existing or change is rename_and_write:  # which writes through a link
        (home / ".bashrc").write_text("old")
    with sandbox() as box:
        change(home / ".bashrc", "mine")
        told = mended(box, home / ".bashrc")
        assert box.call(read_everything, [], [".bashrc"]) == {}
        assert box.call(write_everywhere, [], [".bashrc"]) == 1
        change(home / ".bashrc", "again")
        told += mended(box, home / ".bashrc")
        assert box.call(read_everything, [], [".bashrc"]) == {}
        assert box.handle.poll() is None
        told += box.handle.notices()
        assert any(".bashrc" in sentence for sentence in told)
    assert (home / ".bashrc").read_text() == "again"


def test_a_directory_that_a_program_outside_removes_is_out_of_reach_again(home, sandbox):
    """As ``rm -rf ~/.cache`` does, after which the next program makes it anew."""
    (home / ".cache/old").mkdir(parents=True)
    with sandbox() as box:
        (home / ".cache/old").rmdir()
        (home / ".cache").rmdir()
        mended(box, home / ".cache")
        box.call(write_everywhere, [".cache"], [])
        assert os.listdir(home / ".cache") == []
    assert not (home / ".cache").exists()


def protected(box, path):
    """Wait until *path* is read-only inside."""

    def is_read_only(path):
        import os

        return bool(os.statvfs(path).f_flag & os.ST_RDONLY)

    while not box.call(is_read_only, path):
        select.select([box.handle._control], [], [], 0.01)


@pytest.mark.parametrize("name", [".git", "project/.git"])
def test_a_repositorys_settings_stay_protected_when_git_outside_changes_them(home, sandbox, name):
    git = home / name
    subprocess.run(["git", "init", "-q", str(git.parent)], check=True)
    give_to_all(git)
    with sandbox() as box:
        for value in ("one", "two"):
            subprocess.run(["git", "config", "user.name", value], cwd=git.parent, check=True)
            protected(box, f"{name}/config")
            answers = box.call(plant_in_repository, name, using=(answer_of, attempt_to_open))
            assert answers == PLANTED_NOTHING
        assert box.handle.poll() is None
    assert "two" in (git / "config").read_text()


def open_until_it_is_another(name, how):
    """Stay in a loop around open(2), as who waits for the moment."""
    import os

    device = os.stat(name).st_dev
    fd = os.open(name, os.O_RDONLY)
    while os.fstat(fd).st_dev == device:
        os.close(fd)
        fd = os.open(name, os.O_RDONLY)
    if how == "closed":
        os.close(fd)
    elif how == "moved":
        os.rename(name, "mine")
    return how


@pytest.mark.parametrize("how", ["held", "closed", "moved"])
def test_a_kernel_that_was_quicker_than_its_stop_ends_and_the_file_is_named(home, sandbox, how):
    (home / ".bashrc").write_text("old")
    (home / ".bashrc").chmod(0o666)
    for _ in range(20):
        with sandbox() as box:
            box.send(open_until_it_is_another, ".bashrc", how)
            for _ in range(50):
                replace(home / ".bashrc", "mine")
                assert select.select([box.handle._control], [], [], 10)[0]
                if not box.handle.notices():
                    break  # it has ended
            else:
                continue
            story = box.wait()
            assert story.kind is EndKind.COVER_LOST
            assert story.lost_path == ".bashrc"
            assert ".bashrc" in story.reason
            return
    pytest.fail("the kernel was never quicker: this test shows nothing")


def test_a_program_outside_that_only_reads_a_covered_file_lays_nothing_bare(home, sandbox):
    (home / ".bashrc").write_text("mine")
    with sandbox() as box:
        for _ in range(100):
            assert (home / ".bashrc").read_text() == "mine"
        replace(home / ".bashrc", "new")
        mended(box, home / ".bashrc")
        assert box.handle.poll() is None


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
    (folder / ".git/info").mkdir()
    (folder / ".git/config").write_text("[core]\n")
    (folder / ".git/hooks/pre-commit.sample").write_text("#!/bin/sh\n")
    (folder / ".git/HEAD").write_text("ref: refs/heads/main\n")
    give_to_all(folder / ".git")


def give_to_all(folder):
    for path in folder.rglob("*"):
        path.chmod(0o777)


@pytest.mark.parametrize("options", [[], ["--bare"]])
@pytest.mark.parametrize("name", ["hooks", "hooks/deep", "objects"])
def test_what_git_keeps_of_a_repository_is_no_work_directory(workdir, sandbox, options, name):
    """All of it would be the kernel's, also what is covered in one that begins higher up."""
    subprocess.run(["git", "init", "-q", *options, str(workdir)], check=True)
    inside = workdir / ("" if options else ".git") / name
    inside.mkdir(parents=True, exist_ok=True)
    give_to_all(workdir)
    with pytest.raises(SandboxError, match="git keeps for itself"), sandbox(workdir=str(inside)):
        pass


def plant_in_repository(git):
    """What redirects git to another program, and what a commit has to change."""
    import os

    flags = os.O_WRONLY | os.O_CREAT
    return {
        "hook": attempt_to_open(f"{git}/hooks/pre-commit", flags),
        "config": attempt_to_open(f"{git}/config", os.O_WRONLY),
        "replace config": answer_of(lambda: os.rename(f"{git}/HEAD", f"{git}/config")),
        "work tree's config": attempt_to_open(f"{git}/config.worktree", flags),
        "commondir": attempt_to_open(f"{git}/commondir", flags),
        "replace commondir": answer_of(lambda: os.rename(f"{git}/HEAD", f"{git}/commondir")),
        "attributes": attempt_to_open(f"{git}/info/attributes", flags),
        "move": answer_of(lambda: os.rename(git, f"{git}2")),
        "move hooks": answer_of(lambda: os.rename(f"{git}/hooks", f"{git}/hooks2")),
        "commit": attempt_to_open(f"{git}/HEAD", flags),
    }


PLANTED_NOTHING = {
    "hook": "opened",  # in a directory of its own
    "config": "EROFS",
    "replace config": "EBUSY",
    "work tree's config": "EROFS",
    "commondir": "EROFS",
    "replace commondir": "EBUSY",
    "attributes": "EROFS",
    "move": "EBUSY",
    "move hooks": "EBUSY",
    "commit": "opened",
}


@pytest.mark.parametrize("folder", [".", "project", "course/project"])
def test_the_programs_that_git_would_run_cannot_be_planted(workdir, run_inside, folder):
    (workdir / folder).mkdir(parents=True, exist_ok=True)
    make_repository(workdir / folder)
    before = tree_of(workdir)
    answers = run_inside(
        plant_in_repository, f"{folder}/.git".removeprefix("./"), using=(answer_of, attempt_to_open)
    )
    assert answers == PLANTED_NOTHING
    assert tree_of(workdir) == before


def test_the_person_is_told_of_repositories_that_a_kernel_has_made(workdir, sandbox):
    def make(*folders):
        import os

        for folder in folders:
            for name in ("objects", "refs"):
                os.makedirs(f"{folder}/{name}")
            for name in ("HEAD", "config"):
                open(f"{folder}/{name}", "w").close()

    make_repository(workdir / "before")
    with sandbox() as box:
        box.call(make, ".git", "project/.git", "data")
    told = box.handle.left_behind
    assert len(told) == 3
    for path, sentence in zip((".git", "data", "project/.git"), told, strict=True):
        assert f"the repository {path} was made in {workdir}" in sentence
        assert "git runs programs" in sentence


def test_git_works_inside_and_outside_while_a_kernel_runs(workdir, sandbox):
    def commit():
        import subprocess

        who = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
        open("more", "w").close()
        for words in (["add", "."], ["commit", "-qm", "inside"], ["log", "--oneline"]):
            told = subprocess.run(["git", *who, *words], capture_output=True, text=True)
            assert told.returncode == 0, told.stderr
        return told.stdout

    def git(*words):
        who = ("-c", "user.name=me", "-c", "user.email=me@example.org")
        done = subprocess.run(
            ["git", *who, *words], cwd=workdir, capture_output=True, text=True, check=True
        )
        return done.stdout

    git("init", "-q")
    (workdir / "one").touch()
    give_to_all(workdir)
    (workdir / ".git").chmod(0o777)
    with sandbox() as box:
        git("add", "one")
        git("commit", "-qm", "outside")
        give_to_all(workdir / ".git")
        assert len(box.call(commit).splitlines()) == 2
        assert "inside" in git("log", "--oneline")
        git("status")
        git("branch", "other")
    assert sorted(os.listdir(workdir)) == [".git", "more", "one"]
    assert not (workdir / ".git/commondir").exists()


@pytest.mark.requires("root")
@pytest.mark.parametrize("owner", [0, 4321])
def test_stand_ins_belong_to_the_owner_of_the_home_while_they_are_there(home, sandbox, owner):
    os.chown(home, owner, owner)
    with sandbox():
        made = [path for path in home.rglob("*")]
        assert len(made) > len(COVERS.home_files)
        assert {path.lstat().st_uid for path in made} == {owner}
        kept = [path for path in made if not path.is_symlink()]
        assert {path.lstat().st_mode & 0o077 for path in kept} == {0}


@pytest.mark.requires("root")
def test_a_home_that_cannot_be_written_to_is_no_reason_to_start_uncovered(home, sandbox):
    """A directory that its owner made read-only: nothing can be planted, or nothing starts."""
    Path(home).chmod(0o500)
    try:
        with sandbox() as box:
            box.call(write_everywhere, *PLACES)
    except SandboxError as error:
        assert "[make-folders " in str(error)
        assert "writable for its owner" in str(error)
    home.chmod(0o700)
    assert tree_of(home) == {}


def test_links_without_end_in_a_home_stop_no_start(home, sandbox):
    """os.path.realpath calls itself for each of them."""
    for number in range(3000):
        (home / f"a{number}").symlink_to(f"a{number + 1}")
    for name in (".profile", ".unheard-of", "bin"):
        (home / name).symlink_to("a0")
    with sandbox() as box:
        assert box.handle.poll() is None
