"""What tells a kernel with a network where it can install, and how this machine gets packages."""

from __future__ import annotations

import resource
from dataclasses import replace

from golden import REQUEST, ROOT, site_of

from sandbox_provisioner.facilities.environment.facts.kernel_files import OwnSite
from sandbox_provisioner.facilities.environment.inside import own_note
from sandbox_provisioner.facilities.environment.plan.installs import (
    BASE,
    folders,
    note_of,
    of_certificates,
    variables,
)
from sandbox_provisioner.facilities.network.facts.packages import Packages
from sandbox_provisioner.facilities.network.wish.network import Network, NetworkWish
from sandbox_provisioner.inside.box import Box
from sandbox_provisioner.orders.variables import variables_for

VENV, PLAIN = OwnSite("python3.12", ""), OwnSite("python3.12", "/home/ann/.local")
SITE = f"{BASE}/lib/python3.12/site-packages"
PATH = {"PATH": "/usr/bin"}


def test_in_an_environment_of_its_own_pip_is_told_a_prefix_and_python_where_that_is():
    found = variables(PATH, "/env/bin/python", VENV, {})
    assert found["PIP_PREFIX"] == BASE
    assert found["PYTHONPATH"] == SITE
    assert "PYTHONUSERBASE" not in found
    assert found["PATH"] == f"{BASE}/bin:/env/bin:/usr/bin"
    after = variables({**PATH, "PYTHONPATH": "/mine"}, "/env/bin/python", VENV, {})
    assert after["PYTHONPATH"] == f"/mine:{SITE}"


def test_any_other_python_has_a_user_base_of_its_own():
    found = variables({**PATH, "PYTHONUSERBASE": PLAIN.base}, "/usr/bin/python3", PLAIN, {})
    assert found["PYTHONUSERBASE"] == BASE
    assert not {"PIP_PREFIX", "PYTHONPATH"} & set(found)
    assert found["PATH"] == f"{BASE}/bin:/usr/bin"
    assert SITE in folders(PLAIN)
    assert PLAIN.outside in note_of(PLAIN.outside)


def test_what_is_no_python_is_told_what_any_python_that_it_starts_needs():
    found = variables({**PATH, "R_LIBS_USER": "/r"}, "/usr/bin/R", None, {})
    assert not {"PIP_PREFIX", "PYTHONPATH"} & set(found)
    assert found["PYTHONUSERBASE"] == BASE
    assert found["R_LIBS_USER"] == "/home/jovyan/R/library:/r"
    assert "/home/jovyan/R/library" in folders(None)


def test_what_was_asked_for_this_kernel_stays():
    asked = {**PATH, "PIP_NO_CACHE_DIR": "0", "PIP_INDEX_URL": "https://mine", "PIP_PREFIX": "/p"}
    told = {"PIP_INDEX_URL": "https://machine", "PIP_TIMEOUT": "9"}
    found = {**asked, **variables(asked, "/env/bin/python", VENV, told)}
    assert found["PIP_INDEX_URL"] == "https://mine"
    assert found["PIP_NO_CACHE_DIR"] == "0"
    assert found["PIP_PREFIX"] == "/p"
    assert found["PIP_TIMEOUT"] == "9"


def test_certificates_are_named_only_where_they_show():
    wanted = {"SSL_CERT_FILE": "/etc/ssl/certs/ca.pem", "CURL_CA_BUNDLE": "/root/ca.pem",
              "AWS_SECRET_ACCESS_KEY": "/etc/ssl/certs/x"}  # fmt: skip
    told = {"PIP_CERT": "/etc/ssl/certs/ca.pem", "npm_config_cafile": "/root/x.pem", "PIP_X": "1"}
    assert of_certificates(wanted, told, ["/usr", "/etc/ssl/certs"]) == {
        "SSL_CERT_FILE": "/etc/ssl/certs/ca.pem",
        "PIP_CERT": "/etc/ssl/certs/ca.pem",
    }


def test_another_root_is_told_of_no_certificates_of_this_machine():
    told = Packages(variables={"PIP_CERT": "/usr/share/ca.pem", "PIP_INDEX_URL": "https://mine"})
    site = replace(site_of(ROOT), packages=told)
    spec = replace(REQUEST.spec, network=NetworkWish(mode=Network.GATEWAY))
    request = replace(REQUEST, spec=spec)
    assert variables_for(request, site)["PIP_CERT"] == "/usr/share/ca.pem"
    elsewhere = replace(request, spec=replace(spec, rootfs="/srv/roots/course"))
    found = variables_for(elsewhere, site)
    assert "PIP_CERT" not in found
    assert found["PIP_INDEX_URL"] == "https://mine"


def test_where_an_earlier_kernel_has_left_no_room_for_a_note_the_next_one_starts(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # the file can be made, not written
    try:
        own_note(Box(-1, -1), str(tmp_path / "shown.pth"), note_of("/home/ann"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "shown.pth").read_text() == ""
    own_note(Box(-1, -1), str(tmp_path / "shown.pth"), note_of("/home/ann"))
    assert (tmp_path / "shown.pth").read_text() == note_of("/home/ann")
