"""What a kernel gets of the environment."""

from __future__ import annotations

import pytest

from sandbox_provisioner.facilities.environment.plan.variables import (
    files_from_caps,
    kernel_environment,
    set_and_left_out,
)
from sandbox_provisioner.spec import Limits, Network

OWN = {"HOME", "USER", "LOGNAME", "SHELL", "HOSTNAME", "JPY_PARENT_PID", "PATH"}


def made_of(wanted, server=None, kept=(), limits=None, network=None, **options):
    return kernel_environment(
        wanted,
        wanted if server is None else server,
        kept=kept,
        limits=limits or Limits(),
        network=network,
        home="/home/jovyan",
        hostname="sandbox",
        **options,
    )


@pytest.mark.parametrize(
    "name",
    ["JUPYTERHUB_API_TOKEN", "AWS_SECRET_ACCESS_KEY", "SSH_AUTH_SOCK", "JPY_API_TOKEN", "LS_COLORS",
     "DBUS_SESSION_BUS_ADDRESS", "OPENAI_API_KEY", "http_proxy", "PYTHONSTARTUP", "LD_PRELOAD",
     "BASH_ENV", "KUBECONFIG", "MAIL"],
)  # fmt: skip
def test_what_was_merely_inherited_stays_behind(name):
    assert set(made_of({name: "s3cret"})) == OWN


@pytest.mark.parametrize(
    "name",
    ["LANG", "LC_ALL", "TZ", "PYTHONPATH", "VIRTUAL_ENV", "CONDA_PREFIX", "JULIA_DEPOT_PATH"],
)
def test_what_programs_need_is_inherited(name):
    assert made_of({name: "value"})[name] == "value"


def test_what_was_set_for_this_kernel_is_kept():
    found = made_of({"MY_OPTION": "1", "CHANGED": "new"}, {"CHANGED": "old"})
    assert (found["MY_OPTION"], found["CHANGED"]) == ("1", "new")


def test_what_the_administrator_keeps_is_kept_by_name_or_pattern():
    found = made_of({"PROJECT": "a", "DATA_DIR": "b", "OTHER": "c"}, kept=("PROJECT", "DATA_*"))
    assert (found["PROJECT"], found["DATA_DIR"], "OTHER" in found) == ("a", "b", False)


@pytest.mark.parametrize("name", ["HOME", "USER", "SHELL", "TMPDIR", "XDG_RUNTIME_DIR"])
def test_what_the_sandbox_sets_itself_cannot_be_set_from_outside(name):
    found = made_of({name: "/root"}, {}, kept=(name,))
    assert found.get(name) != "/root"


def test_an_interpreters_parent_is_the_sandboxes_init():
    assert made_of({"JPY_PARENT_PID": "4711"}, {})["JPY_PARENT_PID"] == "1"


def test_a_value_with_a_nul_is_left_out():
    assert "BROKEN" not in made_of({"BROKEN": "a\0b"}, {})


def test_caps_become_jupyterhubs_variables_and_counts_of_threads():
    found = made_of({}, limits=Limits(memory_bytes=1 << 30, cpu_cores=1.5))
    assert (found["MEM_LIMIT"], found["CPU_LIMIT"]) == ("1073741824", "1.5")
    assert found["OMP_NUM_THREADS"] == found["PYTHON_CPU_COUNT"] == "2"


def test_libraries_that_see_no_cap_are_told():
    found = made_of({}, limits=Limits(memory_bytes=1 << 30, cpu_cores=2))
    assert found["LOKY_MAX_CPU_COUNT"] == found["POLARS_MAX_THREADS"] == found["MC_CORES"] == "2"
    java = "-XX:+IgnoreUnrecognizedVMOptions -XX:MaxRAM=1073741824"
    assert found["JAVA_TOOL_OPTIONS"] == f"{java} -XX:ActiveProcessorCount=2"
    assert 0.5 < int(found["R_MAX_VSIZE"]) / (1 << 30) < 1
    only_memory = made_of({}, limits=Limits(memory_bytes=1 << 30))
    assert only_memory["JAVA_TOOL_OPTIONS"] == java
    assert "LOKY_MAX_CPU_COUNT" not in only_memory
    assert "JAVA_TOOL_OPTIONS" not in made_of({})


def test_files_tell_what_the_variables_tell():
    found = files_from_caps(made_of({}, limits=Limits(memory_bytes=1 << 30, cpu_cores=0.5)))
    group = "/sys/fs/cgroup"
    assert found == {f"{group}/memory.max": "1073741824\n", f"{group}/cpu.max": "50000 100000\n"}
    assert files_from_caps(made_of({})) == {}


@pytest.mark.parametrize("text", ["", "much", "1G", "-1", "1e9", "nan", "1\n2", "9" * 400])
def test_a_cap_that_somebody_has_set_to_no_number_is_in_no_file(text):
    assert files_from_caps({"MEM_LIMIT": text, "CPU_LIMIT": text}) == {}


def test_without_a_network_installers_are_told_unless_somebody_said_otherwise():
    found = made_of({}, network=Network.NONE)
    assert (found["PIP_RETRIES"], found["UV_OFFLINE"]) == ("0", "1")
    assert "no-network" in found["PIP_EXTRA_INDEX_URL"]
    assert made_of({"UV_OFFLINE": "0"}, {}, network=Network.NONE)["UV_OFFLINE"] == "0"
    assert "PIP_RETRIES" not in made_of({})
    kept = made_of({"PIP_RETRIES": "3", "UV_OFFLINE": "0"}, kept=["PIP_*"], network=Network.NONE)
    assert (kept["PIP_RETRIES"], kept["UV_OFFLINE"]) == ("3", "1")


def test_without_caps_no_count_of_threads_is_set():
    assert "OMP_NUM_THREADS" not in made_of({})


def test_a_count_of_threads_that_was_set_for_this_kernel_wins_an_inherited_one_does_not():
    limits = Limits(cpu_cores=2)
    assert made_of({"OMP_NUM_THREADS": "1"}, {}, limits=limits)["OMP_NUM_THREADS"] == "1"
    assert made_of({"OMP_NUM_THREADS": "64"}, limits=limits)["OMP_NUM_THREADS"] == "2"


def test_packages_of_the_users_own_are_pointed_to():
    found = {"PYTHONUSERBASE": "/home/me/.local"}
    assert made_of({}, found=found)["PYTHONUSERBASE"] == "/home/me/.local"


@pytest.mark.parametrize(
    ("wanted", "expected"), [("/cuda/compat", "/cuda/compat:/driver"), ("", "/driver")]
)
def test_a_drivers_libraries_are_looked_for_after_those_that_were_asked_for(wanted, expected):
    found = {"LD_LIBRARY_PATH": "/driver", "DRIVER": "1"}
    made = made_of({"LD_LIBRARY_PATH": wanted}, {}, found=found, own_root=True)
    assert (made["LD_LIBRARY_PATH"], made["DRIVER"]) == (expected, "1")
    assert made_of({}, found=found)["LD_LIBRARY_PATH"] == "/driver"
    assert "PYTHONUSERBASE" not in made_of({})


def test_a_path_is_always_there():
    assert made_of({})["PATH"] == "/usr/local/bin:/usr/bin:/bin"
    assert made_of({"PATH": "/opt/bin"})["PATH"] == "/opt/bin"


BEGAN_WITH = b"PATH=/bin\0TOKEN=s3cret\0MODE=old\0"


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("DATA_DIR", "/data", True),
        ("MODE", "new", True),
        ("TOKEN", "s3cret", False),  # it began with that
        ("LANG", "de", False),  # is handed on
        ("KEPT", "x", False),
        ("HOME", "/x", False),  # kernels have one of their own
        ("PYTEST_CURRENT_TEST", "x", False),
        ("ODD\udcff", "\udcff", True),
    ],
)
def test_what_a_program_has_set_for_its_kernels_and_they_do_not_get_is_told(name, value, told):
    server = {"PATH": "/bin", "TOKEN": "s3cret", name: value}
    found = set_and_left_out(server, server, BEGAN_WITH, ["KEPT"])
    assert found == ([name] if told else [])


def test_what_was_set_for_one_kernel_alone_arrives_and_is_not_told():
    server = {"PATH": "/bin"}
    assert set_and_left_out(server | {"FOR_IT": "1"}, server, BEGAN_WITH, ()) == []


def test_where_a_title_was_written_over_the_environment_nothing_is_told():
    server = {"PATH": "/bin", "TOKEN": "s3cret"}
    assert set_and_left_out(server, server, b"my server: ready\0\0\0\0", ()) == []
