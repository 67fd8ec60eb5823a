"""host.py: what is found out about a work directory."""

from __future__ import annotations

import dataclasses
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hosts import host_with

from sandbox_provisioner import places
from sandbox_provisioner.caller import Caller
from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.facilities.workdir.facts import covers
from sandbox_provisioner.facilities.workdir.facts.covers import Covered
from sandbox_provisioner.host import HostFacts, VolumeFacts, WorkdirFacts
from sandbox_provisioner.places import Folders
from sandbox_provisioner.spec import Covers, Volume, relative

COVERS = Covers(home_directories=(".ssh",), home_files=(".bashrc",), home_frozen=(".cargo",))


def probe(path: Path, **changes: Any) -> Covered:
    nothing = {"homes": frozenset(), "home": "/x", "environment": {}, "cwd": "/"}
    facts = host_with(HostFacts.probe(), **{**nothing, **changes})
    return look_at(str(path), facts, COVERS).covered


def look_at(path: str, facts: HostFacts, covers: Covers) -> WorkdirFacts:
    with ExitStack() as opened:
        return WorkdirFacts.probe(path, facts, covers, opened)


def test_a_plain_directory_has_nothing_to_cover(tmp_path: Path) -> None:
    assert probe(tmp_path) == Covered()


def test_each_home_in_the_work_directory_is_covered_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "people/me").mkdir(parents=True)
    homes = frozenset({str(tmp_path), f"{tmp_path}/people/me", "/elsewhere"})
    found = probe(tmp_path, homes=homes, uid=1000)
    assert found.directories == (".ssh", "people/me/.ssh")
    assert found.links == (".bashrc", ".cargo", "people/me/.bashrc", "people/me/.cargo")


def test_what_a_link_at_a_covered_place_leads_to_counts_too(tmp_path: Path) -> None:
    (tmp_path / "dotfiles").mkdir()
    (tmp_path / ".bashrc").symlink_to("dotfiles/bashrc")
    (tmp_path / ".ssh").symlink_to("/root/.ssh")
    found = probe(tmp_path, homes=frozenset({str(tmp_path)}))
    assert found.files == (".bashrc", "dotfiles/bashrc")
    assert found.directories == (".ssh",)


def test_everything_that_begins_with_a_dot_is_covered_in_a_home_but_for_a_short_list(
    tmp_path: Path,
) -> None:
    for name in (".unheard-of", ".ipynb_checkpoints", "project/.own"):
        (tmp_path / name).mkdir(parents=True)
    for name in (".rc", ".gitignore", "data.csv"):
        (tmp_path / name).touch()
    found = probe(tmp_path, homes=frozenset({str(tmp_path)}))
    assert found.directories == (".ssh", ".unheard-of")
    assert found.files == (".rc",)


def test_a_name_that_a_link_in_a_home_gives_to_something_visible_is_covered_too(
    tmp_path: Path,
) -> None:
    (tmp_path / "settings").mkdir()
    (tmp_path / ".unheard-of").symlink_to("settings")
    found = probe(tmp_path, homes=frozenset({str(tmp_path)}))
    assert found.directories == (".ssh", "settings")
    assert found.files == (".unheard-of",)


def test_secrets_among_programs_that_are_shown_are_covered_by_their_real_paths(
    tmp_path: Path,
) -> None:
    (tmp_path / ".cargo/versions/1").mkdir(parents=True)
    (tmp_path / ".cargo/versions/current").symlink_to("1")
    for name in (".cargo/credentials", ".cargo/versions/1/token", ".cargo/program", "mine"):
        (tmp_path / name).touch()
    (tmp_path / ".cargo/linked").symlink_to("../mine")
    secrets = (".cargo/cred*", ".cargo/versions/*/token", ".cargo/linked", ".nvm/*")
    covers = dataclasses.replace(COVERS, home_secrets=secrets)
    facts = host_with(HostFacts.probe(), homes=frozenset({str(tmp_path)}), cwd="/")
    found = look_at(str(tmp_path), facts, covers).covered
    assert found.files == (".cargo/credentials", ".cargo/versions/1/token", "mine")
    assert found.frozen == (".cargo",)


def test_a_name_that_would_be_seen_has_no_link_for_a_stand_in(tmp_path: Path) -> None:
    """File browsers show links to nothing, and no sockets."""
    covers = dataclasses.replace(COVERS, home_frozen=("bin", ".cargo"))
    facts = host_with(HostFacts.probe(), homes=frozenset({str(tmp_path)}), cwd="/")
    found = look_at(str(tmp_path), facts, covers).covered
    assert found.sockets == ("bin",)
    assert found.links == (".bashrc", ".cargo")


def test_a_home_with_more_such_names_than_can_be_covered_is_refused(tmp_path: Path) -> None:
    for number in range(1001):
        (tmp_path / f".{number}").touch()
    with pytest.raises(SpecError, match="begin with a dot"):
        probe(tmp_path, homes=frozenset({str(tmp_path)}))


@pytest.mark.parametrize("may_be_listed", [True, False])
def test_a_link_in_a_home_elsewhere_counts_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, may_be_listed: bool
) -> None:
    def refuse(path: str) -> list[str]:
        raise PermissionError(13, "Permission denied", path)

    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    home.mkdir()
    (home / ".ssh").symlink_to(work / "keys")
    (home / ".bashrc").symlink_to(work / "bashrc")
    if not may_be_listed:
        monkeypatch.setattr(os, "listdir", refuse)
    found = probe(work, home=str(home))
    assert (found.directories, found.files) == (("keys",), ("bashrc",))


def test_a_work_directory_in_a_covered_part_of_a_home_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".ssh/work").mkdir(parents=True)
    with pytest.raises(SpecError, match="holds secrets"):
        probe(tmp_path / ".ssh/work", home=str(tmp_path))


def test_a_repository_loses_its_hooks_and_keeps_its_settings_read_only(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/config").write_text("")
    found = probe(tmp_path)
    assert found.directories == (".git/hooks",)
    assert found.placed == ((".git/commondir", ".\n"), (".git/config.worktree", ""))
    assert found.frozen == (".git/commondir", ".git/config", ".git/config.worktree")


def test_repositories_near_the_work_directory_are_found_in_it(tmp_path: Path) -> None:
    for name in ("a/.git", "b/c/.git", "d/e/f/.git", ".hidden/.git"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to("d/e")
    found = probe(tmp_path)
    assert found.directories == (".hidden/.git/hooks", "a/.git/hooks", "b/c/.git/hooks")
    assert found.repositories == (".hidden/.git", "a/.git", "b/c/.git")


@pytest.mark.parametrize("named", ["a\0b/c", "x" * 300 + "/y", "../../out", "/out", "..", "/"])
def test_what_nobody_can_make_or_lies_elsewhere_is_no_place_to_cover(
    tmp_path: Path, named: str
) -> None:
    """A kernel writes such names too, and the next start has to go well."""
    settings = "\n".join(f"  {key} = {named}" for key in ("hooksPath", "path", "fsmonitor"))
    make_repository(tmp_path / ".git", f"[core]\n{settings}\n")
    (tmp_path / "below").mkdir()
    (tmp_path / "below/.git").write_text(f"gitdir: {named}\n")
    (tmp_path / ".profile").write_text(f". ~/{named}\nPATH={named}:$PATH\n")
    found = probe(tmp_path, homes=frozenset({str(tmp_path)}))
    assert {*found.frozen} == {
        ".git/commondir", ".git/config", ".git/config.worktree", "below/.git",
    }  # fmt: skip
    assert not {*found.directories} - {".git/hooks", ".ssh", "out"}
    assert not {*found.sockets} - {"out"}


def test_what_the_start_up_files_of_a_home_name_is_read_only_or_cannot_be_made(
    tmp_path: Path,
) -> None:
    (tmp_path / ".profile").write_text(f"""
        # . ~/kept
        export PATH="$HOME/go/bin:{tmp_path}/perl5/bin:/usr/bin:$PATH"
        if [ -f '{tmp_path}/sdk/path.inc' ]; then . '{tmp_path}/sdk/path.inc'; fi
        [ -r ~/missing ] && source ~/missing
        cd ~/kept; . "$OTHER/kept"; PATH=$KEPT/bin:$PATH; . ~/.hidden/env
        eval "$(perl -I$HOME/perl5/lib/perl5 -Mlocal::lib)"
    """)
    for name in ("go/bin", "perl5/bin", "perl5/lib/perl5", "sdk", "kept"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "sdk/path.inc").write_text("source ${HOME}/sdk/more\n")
    (tmp_path / "sdk/more").touch()
    found = probe(tmp_path, homes=frozenset({str(tmp_path)}))
    names = {"go/bin", "perl5/bin", "perl5/lib/perl5", "sdk/path.inc", "sdk/more"}
    assert {*found.frozen} == names
    assert found.sockets == ("missing",)


def make_repository(folder: Path, config: str = "") -> None:
    (folder / "hooks").mkdir(parents=True)
    (folder / "config").write_text(config)


def test_what_stands_in_for_a_repository_leads_to_it(tmp_path: Path) -> None:
    make_repository(tmp_path / "x/y/z/bare")
    make_repository(tmp_path / "x/y/z/linked")
    (tmp_path / "x/y/z/tree").mkdir()
    (tmp_path / "x/y/z/tree/commondir").write_text("../bare\n")
    for name, text in (("a", "../x/y/z/tree"), ("b", "../missing"), ("c", "/elsewhere")):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".git").write_text(f"gitdir: {text}\n")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/.git").symlink_to("../x/y/z/linked")
    found = probe(tmp_path)
    ours = {"a/.git", "b/.git", "c/.git", "d/.git", "x/y/z/bare/config", "x/y/z/linked/config"}
    assert ours <= {*found.frozen}
    hooks = {f"x/y/z/{name}/hooks" for name in ("bare", "linked", "tree")}
    assert {*found.directories} == {"missing", *hooks}


def test_what_a_repositorys_settings_and_links_name_is_read_only(tmp_path: Path) -> None:
    text = """[core]
        hooksPath = .husky
        fsmonitor = tools/../tools/monitor --all
        excludesFile = kept
        editor = vi
    [include]
        path = ../more
    [remote "origin"]
        url = ../kept
    [alias]
        path = "~/kept"
    """
    make_repository(tmp_path / ".git", text)
    (tmp_path / ".git/hooks").rmdir()
    (tmp_path / ".git/hooks").symlink_to("../hooks")
    (tmp_path / "more").write_text('[diff "x"]\n  command = ./run $1\n[include]\n path = none\n')
    for name in ("hooks", "tools", ".husky", "kept"):
        (tmp_path / name).mkdir()
    for name in ("tools/monitor", "run"):
        (tmp_path / name).touch()
    found = probe(tmp_path)
    ours = {".husky", "hooks", "more", "run", "tools/monitor"}
    assert {*found.frozen} - ours == {".git/config", ".git/commondir", ".git/config.worktree"}
    assert ours <= {*found.frozen}
    assert found.directories == (".git/hooks", "none")


def test_no_number_of_names_keeps_a_repository_or_an_environment_from_being_found(
    tmp_path: Path,
) -> None:
    """As many as a kernel makes in a second, in whatever order the file system lists them."""
    for number in range(8):
        (tmp_path / f"mine-{number}/.git").mkdir(parents=True)
        (tmp_path / f"mine-{number}/pyvenv.cfg").touch()
    for number in range(6000):
        (tmp_path / f"crowd-{number}").touch()
    found = probe(tmp_path)
    assert found.repositories == tuple(f"mine-{number}/.git" for number in range(8))
    assert {f"mine-{number}" for number in range(8)} <= {*found.frozen}


def test_more_folders_than_are_looked_at_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Folders.__init__, "__defaults__", (1 << 20, 4))
    for number in range(5):
        (tmp_path / f"{number}").mkdir()
    with pytest.raises(SpecError, match="more than 4 directories lie in it, so what the host runs"):
        probe(tmp_path)
    monkeypatch.setattr(Folders.__init__, "__defaults__", (5, 1 << 16))
    (tmp_path / "file").touch()
    with pytest.raises(SpecError, match="more than 5 names lie in it"):
        probe(tmp_path)


def test_a_look_that_takes_too_long_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "_LONGEST_LOOK_SECONDS", -1)
    with pytest.raises(SpecError, match="listing its directories takes over"):
        probe(tmp_path)


def test_more_places_than_can_be_covered_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(covers, "_MOST_PLACES", 8)
    for number in range(3):
        (tmp_path / f"{number}/.git").mkdir(parents=True)
    with pytest.raises(SpecError, match="more than 8 places in it would have to be covered"):
        probe(tmp_path)


@pytest.mark.parametrize("folder", ["", "mine"])
def test_a_repository_without_a_work_tree_is_protected_too(tmp_path: Path, folder: str) -> None:
    bare = tmp_path / folder
    for name in ("objects", "refs", "hooks"):
        (bare / name).mkdir(parents=True)
    for name in ("HEAD", "config"):
        (bare / name).touch()
    found = probe(tmp_path)
    prefix = f"{folder}/" if folder else ""
    assert found.directories == (f"{prefix}hooks",)
    assert {f"{prefix}config", f"{prefix}commondir"} <= set(found.frozen)
    assert found.repositories == (folder or ".",)


def test_the_file_that_names_a_work_trees_repository_is_read_only(tmp_path: Path) -> None:
    (tmp_path / ".git").write_text("gitdir: /elsewhere")
    assert probe(tmp_path).frozen == (".git",)


def test_programs_in_a_home_are_read_only_where_they_are(tmp_path: Path) -> None:
    (tmp_path / ".cargo").mkdir()
    assert probe(tmp_path, homes=frozenset({str(tmp_path)})).frozen == (".cargo",)


def test_a_part_of_a_home_is_covered_by_what_lies_in_it(tmp_path: Path) -> None:
    covers = Covers(home_directories=(".local/share/jupyter", ".local/bin", ".ssh"))
    (tmp_path / ".local").mkdir()
    facts = host_with(HostFacts.probe(), homes=frozenset({str(tmp_path)}), cwd="/")
    found = look_at(f"{tmp_path}/.local", facts, covers).covered
    assert {"share/jupyter", "bin"} <= set(found.directories)


def test_a_covered_place_is_no_work_directory(tmp_path: Path) -> None:
    (tmp_path / ".ssh/keys").mkdir(parents=True)
    for name in (".ssh", ".ssh/keys"):
        with pytest.raises(SpecError, match="holds secrets"):
            probe(tmp_path / name, homes=frozenset({str(tmp_path)}))


@pytest.mark.parametrize(
    "path", ["/", "/home", "/srv", "/tmp", "/etc/cron.d", "/usr/lib", "/proc/self"]
)
def test_a_directory_of_the_system_is_nobodys_work_directory(path: str) -> None:
    with pytest.raises(SpecError, match="as the work directory"):
        probe(Path(path))


def test_roots_work_directory_has_nobodys_home_in_it(tmp_path: Path) -> None:
    """Else its kernel, which writes there as root, could put a link in a home's place."""
    (tmp_path / "people/me").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "people"):
        with pytest.raises(SpecError, match="more than one person's files"):
            probe(folder, homes=frozenset({f"{tmp_path}/people/me"}), uid=0)
    assert probe(tmp_path / "people/me", homes=frozenset({f"{tmp_path}/people/me"}), uid=0)


def test_a_link_to_a_directory_of_the_system_is_refused_too(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc")
    with pytest.raises(SpecError, match="a symbolic link to '/etc'"):
        probe(tmp_path / "link")


@pytest.mark.parametrize(
    ("path", "base", "answer"),
    [
        ("/a/b", "/a", "b"),
        ("/a", "/a", ""),
        ("/ab", "/a", None),
        ("/a", "/a/b", None),
        ("/a/b/", "/a/", "b"),
        ("/a", "/", "a"),
        ("/", "/", ""),
    ],
)
def test_relative_compares_whole_names(path: str, base: str, answer: str | None) -> None:
    assert relative(path, base) == answer


def test_probing_the_host_opens_nothing_that_stays_open() -> None:
    before = os.listdir("/proc/self/fd")
    HostFacts.probe()
    assert os.listdir("/proc/self/fd") == before


# -- volumes


def volume_of(source: Path | str, *, readonly: bool = True) -> VolumeFacts:
    volume = Volume(source=str(source), target="/data", readonly=readonly)
    with ExitStack() as opened:
        return VolumeFacts.probe(volume, HostFacts.probe(), opened)


def test_a_volume_may_be_a_file_or_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert volume_of(tmp_path).place.is_directory
    assert not volume_of(tmp_path / "file").place.is_directory


def test_what_somebody_else_has_opened_is_what_its_path_says(tmp_path: Path) -> None:
    """By which a policy has judged it."""
    (tmp_path / "other").mkdir()
    with ExitStack() as opened:
        fd = os.open(tmp_path / "other", os.O_PATH)
        opened.callback(os.close, fd)
        for name, answer in (("said", f"it is {tmp_path}/other now"), ("other", "")):
            path = str(tmp_path / name)
            facts = HostFacts.probe(
                (),
                dataclasses.replace(
                    Caller.this_process(), groups=frozenset({0}), opened={path: fd}
                ),
            )
            volume = Volume(source=path, target="/data")
            if answer:
                with pytest.raises(SpecError, match=answer):
                    VolumeFacts.probe(volume, facts, opened)
            else:
                assert VolumeFacts.probe(volume, facts, opened).source == path


def test_a_volume_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"volume.*missing.*No such file.*Create it"):
        volume_of(tmp_path / "missing")


def test_a_link_that_a_kernel_could_have_made_is_no_volume(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/home")
    with pytest.raises(SpecError, match=r"link' is a symbolic link to '/home'"):
        volume_of(tmp_path / "link")


@pytest.mark.parametrize("path", ["/etc", "/home", "/tmp"])
def test_no_kernel_writes_to_a_directory_in_which_links_are_followed(path: str) -> None:
    assert volume_of(path).source == os.path.realpath(path)
    with pytest.raises(SpecError, match=r"volume.*read-only"):
        volume_of(path, readonly=False)


def test_the_machine_is_looked_at_on_behalf_of_whoever_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "IPYTHONDIR"):
        monkeypatch.setenv(name, "/of/the/launching/process")
    home = str(tmp_path)
    asks = Caller(
        uid=4711, gid=4712, home=home, cwd=home, umask=0o077, environment={"IPYTHONDIR": "/of/it"}
    )  # fmt: skip
    facts = HostFacts.probe(caller=asks)
    who = facts.caller
    found = who.uid, who.gid, who.home, who.cwd, who.umask, facts.privileged
    assert found == (4711, 4712, home, home, 0o077, HostFacts.probe().privileged)
    assert facts.caller.own_folders == {"/of/it"}
    assert "/of/the/launching/process" not in facts.homes
