"""What of /etc and /var every kernel sees, and what a volume may add to it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from probes import attempt_to_open

from sandbox_provisioner import system_files
from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.spec import Volume

pytestmark = pytest.mark.requires("userns")


@pytest.mark.requires("chromium")
def test_chromium_prints_a_page(run_inside, workdir):
    """Debian's starts through a script that reads /etc/chromium.d, and ends where it is missing."""

    def print_page(program):
        import subprocess

        words = ["--headless", "--no-sandbox", "--disable-gpu", "--user-data-dir=/tmp/profile"]
        page = "data:text/html,<h1>A page</h1>"
        done = subprocess.run(
            [program, *words, "--print-to-pdf=page.pdf", page], capture_output=True, text=True
        )
        return done.returncode, done.stderr

    names = ("chromium", "chromium-browser", "google-chrome")
    code, told = run_inside(print_page, next(filter(None, map(shutil.which, names))))
    assert code == 0, told
    assert (workdir / "page.pdf").read_bytes().startswith(b"%PDF")


def test_what_is_shown_of_etc_and_var_is_what_everybody_may_read(run_inside):
    def look(paths):
        import os

        return {path: os.access(path, os.R_OK) for path in paths}

    shown = system_files.system_files()
    assert "/etc/fonts" in shown or "/etc/mime.types" in shown
    assert all(run_inside(look, shown).values())


def test_what_is_not_for_everybody_is_not_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(system_files, "_TREES", (f"{tmp_path}/etc/",))
    etc = tmp_path / "etc"
    made = {"fonts": 0o755, "perl": 0o750, "texmf": 0o777, "magic": 0o644, "rpc": 0o640}
    for name, mode in made.items():
        (etc / name).mkdir(parents=True) if mode & 0o100 else (etc / name).touch()
        (etc / name).chmod(mode)
    (tmp_path / "elsewhere").mkdir()
    (etc / "R").symlink_to(tmp_path / "elsewhere")
    (etc / "xml").symlink_to(etc / "fonts")
    (etc / "sgml").symlink_to("nowhere")

    def shown(owner):
        places = sorted(etc.iterdir())
        return [p.name for p in places if system_files._is_for_everybody(str(p), owner)]

    assert shown(os.getuid()) == ["fonts", "magic", "xml"]
    assert shown(os.getuid() + 1) == []


def test_a_volume_shows_more_of_etc(run_inside, new_folder):
    def look():
        import os

        tried = attempt_to_open("/etc/more.d/file", os.O_WRONLY)
        return open("/etc/more.d/file").read(), tried

    folder = new_folder()
    folder.chmod(0o755)
    (folder / "file").write_text("shown")
    volume = Volume(source=str(folder), target="/etc/more.d")
    assert run_inside(look, volumes=(volume,), using=(attempt_to_open,)) == ["shown", "EROFS"]


@pytest.mark.requires("root")
def test_a_volume_of_the_system_shows_what_everybody_may_read(run_inside):
    """Not what only root may, although a root server takes it."""

    def look():
        import os

        paths = ("/data/shadow", "/data/passwd")
        return [attempt_to_open(path, os.O_RDONLY) for path in paths]

    volumes = (Volume(source="/etc", target="/data"),)
    assert run_inside(look, volumes=volumes, using=(attempt_to_open,)) == ["EACCES", "opened"]


def test_a_volume_cannot_be_made_in_what_shows_of_the_system(run_inside, new_folder):
    place = next(path for path in system_files.system_files() if Path(path).is_dir())
    volume = Volume(source=str(new_folder()), target=f"{place}/not-there")
    with pytest.raises(SpecError, match=f"{place} is the system's own, where it cannot be made"):
        run_inside(os.getpid, volumes=(volume,))
