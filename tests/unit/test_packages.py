"""The preset "packages": what this machine's installers are configured to use, and nothing else."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_provisioner.errors import HostError
from sandbox_provisioner.facilities.network.facts.apt import add_apt
from sandbox_provisioner.facilities.network.facts.conda import add_conda
from sandbox_provisioner.facilities.network.facts.configured import Configured, Files
from sandbox_provisioner.facilities.network.facts.npm import add_npm
from sandbox_provisioner.facilities.network.facts.packages import (
    Packages,
    expanded_rules,
    find_packages,
)
from sandbox_provisioner.facilities.network.facts.pip import add_pip
from sandbox_provisioner.facilities.network.facts.r import add_r
from sandbox_provisioner.facilities.network.wish.rules import Rules

PYTHON, NPM = "/env/bin/python", "/env/bin/npm"


class Tree(Files):
    """A machine on which there are these files, and no other configuration."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        super().__init__(uid=0, home="/home/me")
        object.__setattr__(self, "texts", texts)

    def text(self, path: str) -> str:
        return self.texts.get(path, "")

    def within(self, folder: str, ending: str | tuple[str, ...]) -> list[str]:
        found = (path for path in self.texts if os.path.dirname(path) == folder)
        return sorted(path for path in found if path.endswith(ending))


def of_pip(texts: Mapping[str, str], **environment: str) -> Configured:
    found = Configured()
    add_pip(found, Tree(texts), environment, PYTHON)
    return found


def of_conda(texts: Mapping[str, str], **environment: str) -> Configured:
    found = Configured()
    add_conda(found, Tree(texts), environment)
    return found


def of_npm(texts: Mapping[str, str], **environment: str) -> Configured:
    found = Configured()
    add_npm(found, Tree(texts), environment, NPM)
    return found


def of_r(texts: Mapping[str, str], **environment: str) -> Configured:
    found = Configured()
    add_r(found, Tree(texts), environment)
    return found


def of_apt(texts: Mapping[str, str]) -> Configured:
    found = Configured()
    add_apt(found, Tree(texts))
    return found


def hosts(found: Configured) -> set[str]:
    ends = " from packages"
    assert all(rule.endswith(ends) for rule in found.rules)
    Rules.read(found.rules)
    return {rule.removesuffix(ends) for rule in found.rules}


PYPI = {"pypi.org:443", "files.pythonhosted.org:443"}


# -- pip


@pytest.mark.parametrize(
    ("texts", "environment", "expected"),
    [
        ({}, {}, PYPI),
        ({"/etc/pip.conf": "[global]\nindex-url = https://mirror.corp/simple\n"}, {},
         {"mirror.corp:443"}),
        ({"/etc/pip.conf": "[global]\nindex_url: http://mirror.corp:8081/simple\n"}, {},
         {"mirror.corp:8081"}),
        ({"/etc/pip.conf": "[global]\nextra-index-url =\n  https://a.corp/s\n  https://b.corp/s\n"},
         {}, {*PYPI, "a.corp:443", "b.corp:443"}),
        ({"/etc/xdg/pip/pip.conf": "[global]\nindex-url=https://a.corp\n",
          "/home/me/.config/pip/pip.conf": "[global]\nindex-url=https://b.corp\n"}, {},
         {"b.corp:443"}),
        ({"/etc/pip.conf": "[install]\nindex-url=https://a.corp\n",
          "/env/pip.conf": "[global]\nindex-url=https://b.corp\n"}, {}, {"a.corp:443"}),
        ({"/etc/pip.conf": "[download]\nindex-url=https://a.corp\n[list]\nx = y\n"}, {}, PYPI),
        ({"/env/pip.conf": "[global]\nindex-url=https://a.corp\n"},
         {"PIP_INDEX_URL": "https://[2001:db8::7]:8443/simple"}, {"[2001:db8::7]:8443"}),
        ({"/etc/pip.conf": "[global]\nindex-url=https://a.corp\n"},
         {"PIP_CONFIG_FILE": "/dev/null"}, PYPI),
        ({"/x.conf": "[global]\nindex-url=https://x.corp\n"}, {"PIP_CONFIG_FILE": "/x.conf"},
         {"x.corp:443"}),
        ({"/etc/pip.conf": "[global]\nno-index = true\nfind-links = /wheels https://w.corp/x\n"},
         {}, {"w.corp:443"}),
        ({"/etc/pip.conf": "[global]\nextra-index-url = file:///opt/pypi\n"}, {}, PYPI),
        ({}, {"PIP_INDEX_URL": "https://test.pypi.org/simple"},
         {"test.pypi.org:443", "test-files.pythonhosted.org:443"}),
        ({"/etc/pip.conf": "[global]\nindex-url = https://B\u00fccher.example/simple\n"}, {},
         {"xn--bcher-kva.example:443"}),
    ],
)  # fmt: skip
def test_pip_is_read_as_pip_reads_it(texts, environment, expected):
    assert hosts(of_pip(texts, **environment)) == expected


def test_what_pip_is_told_outside_it_is_told_inside():
    found = of_pip(
        {"/etc/pip.conf": "[global]\nindex-url = https://a.corp/s\ncert = /etc/ssl/a.pem\n"
         "trusted-host = a.corp\nconstraint = /etc/c.txt\n"}
    )  # fmt: skip
    assert found.variables == {
        "PIP_INDEX_URL": "https://a.corp/s",
        "PIP_CERT": "/etc/ssl/a.pem",
        "PIP_TRUSTED_HOST": "a.corp",
    }
    assert of_pip({}).variables == {}
    in_the_box = of_pip({"/env/pip.conf": "[global]\nindex-url = https://me:pw@a.corp/s\n"})
    assert (in_the_box.variables, in_the_box.notices) == ({}, [])
    assert hosts(in_the_box) == {"a.corp:443"}


@pytest.mark.parametrize("url", ["https://me:hunter2@a.corp/s", "https://hunter2@a.corp/s"])
def test_a_password_of_an_index_is_not_told(url):
    found = of_pip({"/etc/pip.conf": f"[global]\nindex-url = {url}\n"})
    assert hosts(found) == {"a.corp:443"}
    assert "hunter2" not in repr(found)
    assert "PIP_INDEX_URL" in found.notices[0]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("index-url = https://a.corp\n", "line 1"),
        ("[global]\n\nindex-url\n", "line 3"),
        ("[global]\nx = 1\nindex-url = https://a.corp:port/s\n", "line 3"),
        ("[global]\nindex-url = https:///s\n", "line 2"),
        ("[global]\nindex-url = https://me:hunter2@a_\u200d.corp/s\n", "line 2"),
        ("[global]\nextra-index-url = https://0x7f.1/s\n", "line 2"),
    ],
)
def test_what_cannot_be_read_names_the_file_and_the_line_and_no_password(text, line):
    with pytest.raises(HostError) as caught:
        of_pip({"/etc/pip.conf": text})
    assert f"/etc/pip.conf, {line}" in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert "name the hosts in network_allow" in caught.value.remedy


# -- conda


ANACONDA = {"conda.anaconda.org:443", "repo.anaconda.com:443"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ANACONDA),
        ("channels:\n  - conda-forge\n", {"conda.anaconda.org:443"}),
        ("channels:\n- conda-forge\n- defaults\n", ANACONDA),
        ("channels: [conda-forge, 'https://c.corp/x']  # ours\n",
         {"conda.anaconda.org:443", "c.corp:443"}),
        ("channel_alias: https://mirror.corp:8443/conda\nchannels: [conda-forge]\n",
         {"mirror.corp:8443"}),
        ("default_channels:\n  - http://c.corp/main\nssl_verify: true\n",
         {"conda.anaconda.org:443", "c.corp:80"}),
        ("channels: [x]\ncustom_channels:\n  x: https://x.corp/\n  'y z': \"https://y.corp\"\n",
         {"conda.anaconda.org:443", "x.corp:443", "y.corp:443"}),
        ("custom_multichannels:\n  m:\n    - https://m.corp/a\n    - https://n.corp/b\n",
         {*ANACONDA, "m.corp:443", "n.corp:443"}),
        ("envs_dirs: |\n  whatever: {x\nchannels:\n  - conda-forge\n", {"conda.anaconda.org:443"}),
        ("channels:\n  - $OURS/x\n", {"conda.anaconda.org:443", "env.corp:443"}),
    ],
)  # fmt: skip
def test_conda_is_read_as_conda_reads_it(text, expected):
    found = of_conda({"/home/me/.condarc": text}, OURS="https://env.corp")
    assert hosts(found) == expected


def test_conda_is_told_its_channels_but_no_token():
    found = of_conda({"/etc/conda/condarc": "channels: [a, b]\nchannel_alias: https://c.corp\n"})
    assert found.variables == {
        "CONDA_CHANNELS": "a,b",
        "CONDA_CHANNEL_ALIAS": "https://c.corp",
    }
    found = of_conda({"/etc/conda/condarc.d/x.yml": "channels: [https://c.corp/t/tk-1/x]\n"})
    assert "c.corp:443" in hosts(found)
    assert found.variables == {}
    assert "tk-1" not in repr(found)


@pytest.mark.parametrize("text", ["channels: {a: b}\n", "channels:\n  - *x\n", "channels\n"])
def test_what_of_yaml_is_not_read_is_an_error_with_its_line(text):
    with pytest.raises(HostError, match=r"/home/me/\.condarc, line \d"):
        of_conda({"/home/me/.condarc": text})


# -- npm, R, apt


@pytest.mark.parametrize(
    ("texts", "environment", "expected"),
    [
        ({}, {}, {"registry.npmjs.org:443"}),
        ({"/home/me/.npmrc": "; x\nregistry=https://n.corp/\n//n.corp/:_authToken=secret\n"}, {},
         {"n.corp:443"}),
        ({"/env/etc/npmrc": "@ours:registry = http://o.corp:4873\n"}, {},
         {"registry.npmjs.org:443", "o.corp:4873"}),
        ({"/home/me/.npmrc": "registry=${OURS}/x\n"}, {"OURS": "https://e.corp"}, {"e.corp:443"}),
        ({"/home/me/.npmrc": "registry=https://n.corp/\n"},
         {"NPM_CONFIG_REGISTRY": "https://v.corp"}, {"v.corp:443"}),
        ({"/u": "registry=https://u.corp\n"}, {"npm_config_userconfig": "/u"}, {"u.corp:443"}),
    ],
)  # fmt: skip
def test_npm_is_read_as_npm_reads_it(texts, environment, expected):
    found = of_npm(texts, **environment)
    assert hosts(found) == expected
    assert "secret" not in repr(found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {"cloud.r-project.org:443"}),
        ('options(repos = c(CRAN = "https://cran.corp"))\n', {"cran.corp:443"}),
        ('local({\n  r <- getOption("repos")\n  r["CRAN"] <- "http://c.corp:8080"\n'
         "  options(repos = r)\n})\n", {"c.corp:8080"}),
        ('# options(repos = c(CRAN = "https://cran.corp"))\n', {"cloud.r-project.org:443"}),
        ('Sys.setenv(http_proxy = "http://p.corp")\noptions(repos=c(A="https://a.corp",\n'
         'B="https://b.corp"))\n', {"a.corp:443", "b.corp:443"}),
        ('x <- "https://elsewhere.corp"\n', {"cloud.r-project.org:443"}),
    ],
)  # fmt: skip
def test_r_is_read_without_being_run(text, expected):
    assert hosts(of_r({"/etc/R/Rprofile.site": text})) == expected


def test_apt_is_read_in_both_forms():
    found = of_apt(
        {
            "/etc/apt/sources.list": "# x\ndeb [arch=amd64 a=b] http://d.example/debian sid main\n"
            "deb-src https://s.example/ sid main # y\ndeb cdrom:[x]/ sid main\n",
            "/etc/apt/sources.list.d/a.list": "deb mirror+https://m.example/list sid main\n",
            "/etc/apt/sources.list.d/b.sources": "Types: deb\nURIs: https://u.example/\n"
            " https://v.example/\nSuites: sid\n\nURIs: https://off.example\nEnabled: no\n",
            "/etc/apt/sources.list.d/c.list.disabled": "deb https://never.example sid main\n",
        }
    )
    assert hosts(found) == {
        "d.example:80", "s.example:443", "m.example:443", "u.example:443", "v.example:443",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["sources.list", "sources.list.d/a.sources"])
def test_a_line_that_apt_would_not_read_is_an_error(name):
    with pytest.raises(HostError, match=rf"/etc/apt/{name}, line 1"):
        of_apt({f"/etc/apt/{name}": "what is this\n"})


# -- what no preset gives


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "x.localhost"])
def test_an_index_of_this_machines_loopback_is_left_out_and_told(host):
    found = of_pip({"/etc/pip.conf": f"[global]\nindex-url = http://{host}:3141/s\n"})
    assert hosts(found) == set()
    assert "/etc/pip.conf, line 2" in found.notices[0]


def test_a_proxy_is_no_part_of_it_and_told():
    for found in (
        of_pip({"/etc/pip.conf": "[global]\nproxy = http://p.corp:3128\n"}),
        of_npm({"/home/me/.npmrc": "https-proxy=http://p.corp:3128\n"}),
        of_conda({"/etc/conda/.condarc": "proxy_servers:\n  http: http://p.corp:3128\n"}),
        of_apt({"/etc/apt/apt.conf.d/9": 'Acquire::http::Proxy "http://p.corp:3128";\n'}),
    ):
        assert not any("p.corp" in host for host in hosts(found))
        assert "proxy" in found.notices[0]


@given(st.text(alphabet='ab:[]{}-=\n "#/.\t\u00fc', max_size=80), st.integers(0, 4))
def test_any_text_is_read_or_is_one_clear_error(text, which):
    places = ("/etc/pip.conf", "/home/me/.condarc", "/home/me/.npmrc", "/etc/R/Rprofile.site",
              "/etc/apt/sources.list")  # fmt: skip
    read = (of_pip, of_conda, of_npm, of_r, of_apt)[which]
    try:
        hosts(read({places[which]: text}))
    except HostError as error:
        assert f"{places[which]}, line " in str(error)


# -- what counts at all


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home/.config/pip").mkdir(parents=True)
    return tmp_path / "home"


GUARDED = frozenset({".config", ".npmrc"})


def read(path: Path, **options) -> tuple[str, list[str]]:
    files = Files(**{"uid": 0, "guarded": GUARDED, **options})
    return files.text(str(path)), files.doubted


def test_a_file_counts_only_where_no_kernel_can_have_written_it(home):
    believed = home / ".config/pip/pip.conf"
    doubted = [
        home / "work/pip.conf",
        home / ".git/pip.conf",
        home / ".npmrc2",
        home.parent / "pip.conf",
    ]
    for path in (believed, *doubted):
        path.parent.mkdir(exist_ok=True)
        path.write_text("told")
    assert read(believed, home=str(home)) == ("told", [])
    for path in doubted:
        assert read(path, home=str(home)) == ("", [str(path)])


def test_a_file_below_this_kernels_own_directory_counts_only_where_it_is_covered(home):
    path = home / ".config/pip/pip.conf"
    path.write_text("told")
    given = {"home": str(home), "writable": (str(home),)}
    assert read(path, **given)[0] == ""
    assert read(path, **given, covered=(f"{home}/.config",))[0] == "told"
    assert read(path, home=str(home), writable=(f"{home}/.config",))[0] == ""


def test_a_link_that_leads_to_where_kernels_write_makes_a_file_count_for_nothing(home):
    target = home / "work/pip.conf"
    target.parent.mkdir()
    target.write_text("told")
    link = home / ".config/pip/pip.conf"
    link.symlink_to(target)
    assert read(link, home=str(home)) == ("", [str(link)])
    target.unlink()
    target.symlink_to("/etc/hostname")
    assert read(link, home=str(home))[0] == ""


def test_what_belongs_to_root_counts_for_an_ordinary_user_only(monkeypatch):
    status = os.stat("/opt") if os.path.isdir("/opt") else os.stat("/")
    if status.st_uid or status.st_mode & 0o022:
        pytest.skip("needs an /opt that only root may write")
    path = "/opt/such-a-thing" if os.path.isdir("/opt") else "/such-a-thing"
    monkeypatch.setattr(os, "lstat", lambda _: status)
    assert Files(uid=1000, home="/home/me").is_out_of_reach(path)
    assert not Files(uid=0, home="/home/me").is_out_of_reach(path)


def test_a_file_that_never_ends_or_is_no_text_is_an_error(home):
    path = home / ".npmrc"
    path.write_bytes(b"x=1\n" * 100_000)
    with pytest.raises(HostError, match=r"\.npmrc: it is longer than"):
        read(path, home=str(home))
    path.write_bytes(b"registry=https://a.corp\n\xff\n")
    with pytest.raises(HostError, match=r"\.npmrc, line 2: .*UTF-8"):
        read(path, home=str(home))


def test_a_file_that_a_kernel_wrote_is_told_and_widens_nothing(home, monkeypatch):
    evil = home / "work/pip.conf"
    evil.parent.mkdir()
    evil.write_text("[global]\nindex-url = https://evil.example/s\n")
    environment = {"PIP_CONFIG_FILE": str(evil), "XDG_CONFIG_DIRS": str(home / "none")}
    found = find_packages(sys.executable, environment, Files(uid=0, home=str(home)))
    assert not any("evil" in rule for rule in found.rules)
    assert any(str(evil) in notice for notice in found.notices)


def test_what_has_changed_counts_at_the_next_start(home):
    path = home / ".config/pip/pip.conf"
    environment = {"XDG_CONFIG_DIRS": str(home / "none")}

    def found(**more: str) -> str:
        files = Files(uid=0, home=str(home), guarded=GUARDED)
        return " ".join(find_packages(sys.executable, environment | more, files).rules)

    assert "a.corp" not in found()
    path.write_text("[global]\nindex-url = https://a.corp/s\n")
    assert "a.corp" in found()
    assert found() == found() == found(JPY_SESSION_NAME="b.ipynb")
    (home / "other.conf").write_text("[global]\nindex-url = https://b.corp/s\n")
    path.unlink()
    path.symlink_to(home / "other.conf")
    assert "a.corp" not in found()
    assert "b.corp" not in found()  # not out of reach
    assert "c.corp" in found(PIP_INDEX_URL="https://c.corp")


def test_the_preset_is_replaced_by_its_rules_and_nothing_else_is():
    given = Packages(rules=("pypi.org:443 from packages", "a.corp:443 from packages"))
    assert expanded_rules(("x.example", "packages", "y.example"), given) == (
        "x.example", "pypi.org:443 from packages", "a.corp:443 from packages", "y.example",
    )  # fmt: skip
    assert expanded_rules(("x.example", "packages"), Packages()) == ("x.example",)
