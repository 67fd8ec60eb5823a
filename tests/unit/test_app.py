"""test_app.py - in the test process: `jupyter sandbox` as far as it starts nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from facilities import missing
from hosts import host_with
from jupyter_client.kernelspec import KernelSpec
from traitlets import TraitError

from sandbox_provisioner import doctor
from sandbox_provisioner.app import SandboxApp, main
from sandbox_provisioner.app.apparmor import profile_for
from sandbox_provisioner.app.command import SandboxCommand, UsageError
from sandbox_provisioner.app.listing import format_age
from sandbox_provisioner.app.tables import table
from sandbox_provisioner.app.twins import twin_of, write_twin
from sandbox_provisioner.caller import Caller
from sandbox_provisioner.checks import Check, Findings, Kernel, State
from sandbox_provisioner.errors import COLUMNS, HostError, LaunchError, SpecError
from sandbox_provisioner.facilities.caps.cgroup import CgroupFacts
from sandbox_provisioner.facilities.ids.facts import IdRange
from sandbox_provisioner.facilities.namespaces.facts import APPARMOR, Surroundings
from sandbox_provisioner.facilities.workdir.tell import WATCHERS
from sandbox_provisioner.host import HostFacts, Machine, WorkdirFacts
from sandbox_provisioner.mounts import Mount
from sandbox_provisioner.places import Place

Command = Callable[..., str]


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """Runs a command line in this process, with kernels and configuration of this test's own."""
    for name in ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR"):
        monkeypatch.setenv(f"JUPYTER_{name}", str(tmp_path / name.lower()))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "prefix" / "share" / "jupyter"))
    monkeypatch.delenv("JUPYTER_PREFER_ENV_PATH", raising=False)

    def run(*words: str) -> str:
        app = SandboxApp(log_level=50)
        app.initialize([str(word) for word in words])
        app.start()
        return capsys.readouterr().out

    yield run
    for application in (SandboxApp, *SandboxCommand.__subclasses__()):
        application.clear_instance()


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return tmp_path / "prefix"


def kernel_json(prefix: Path, name: str = "python3-sandbox") -> dict[str, Any]:
    path = prefix / "share" / "jupyter" / "kernels" / name / "kernel.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def install_other_kernel(prefix: Path, **changes: Any) -> Path:
    """A kernel with a script beside its kernel.json, and all that a twin has to keep."""
    folder = prefix / "share" / "jupyter" / "kernels" / "other"
    folder.mkdir(parents=True)
    (folder / "start.sh").write_text("exec other")
    (folder / "logo-svg.svg").write_text("<svg/>")
    spec = {
        "argv": ["/bin/sh", "{resource_dir}/start.sh", "{connection_file}"],
        "display_name": "Other",
        "language": "other",
        "interrupt_mode": "message",
        "env": {"OTHER": "1"},
        "metadata": {"debugger": True, "supported_encryption": ["curve"]},
    }
    (folder / "kernel.json").write_text(json.dumps(spec | changes))
    return folder


# -- install


def test_a_twin_runs_the_same_kernel_behind_ours(command: Command, prefix: Path) -> None:
    command("install", "--prefix", prefix)
    twin = kernel_json(prefix)
    assert twin["argv"][:6] == [
        sys.executable, "-P", "-m", "sandbox_provisioner.unboxed", "python3-sandbox", "--",
    ]  # fmt: skip
    assert twin["argv"][-3:] == ["ipykernel_launcher", "-f", "{connection_file}"]
    assert twin["display_name"].endswith("(sandboxed)")
    assert twin["metadata"]["debugger"] is True


def test_a_twin_in_the_weaker_box_says_so(command: Command, prefix: Path) -> None:
    command("install", "--prefix", prefix)
    command("install", "--prefix", prefix, "--confinement", "landlock")
    assert kernel_json(prefix)["display_name"].endswith("(sandboxed)")
    twin = kernel_json(prefix, "python3-landlock")
    assert twin["display_name"].endswith("(landlock)")
    assert twin["metadata"]["kernel_provisioner"]["config"] == {"confinement": "landlock"}


def test_a_weaker_twin_cannot_have_a_name_that_hides_it(command: Command, prefix: Path) -> None:
    words = ["--confinement", "landlock", "--display-name", "Python"]
    with pytest.raises(SpecError, match="does not tell that it is weaker"):
        command("install", "--prefix", prefix, *words)


def test_a_twin_holds_only_the_options_that_were_given(command: Command, prefix: Path) -> None:
    command("install", "--prefix", prefix)
    assert kernel_json(prefix)["metadata"]["kernel_provisioner"] == {
        "provisioner_name": "sandbox-provisioner",
        "config": {},
    }
    words = ["--mem-limit", "512M", "--cpu-limit=1.5", "--pids-limit", "100"]
    words += ["--volume", "/a:/a", "--volume", "/b:/b:rw", "--on-missing", "cpu=warn"]
    command("install", "--prefix", prefix, "--replace", *words)
    assert kernel_json(prefix)["metadata"]["kernel_provisioner"]["config"] == {
        "mem_limit": "512M",
        "cpu_limit": 1.5,
        "pids_limit": 100,
        "volumes": ["/a:/a", "/b:/b:rw"],
        "on_missing": {"cpu": "warn"},
    }


def test_a_twin_keeps_files_environment_and_interrupt_mode(command: Command, prefix: Path) -> None:
    install_other_kernel(prefix)
    command("install", "--kernel", "other", "--name", "boxed", "--prefix", prefix)
    twin = kernel_json(prefix, "boxed")
    assert twin["env"] == {"OTHER": "1"}
    assert twin["interrupt_mode"] == "message"
    assert twin["metadata"]["supported_encryption"] == ["curve"]
    assert "{resource_dir}/start.sh" in twin["argv"]
    folder = prefix / "share" / "jupyter" / "kernels" / "boxed"
    assert sorted(os.listdir(folder)) == ["kernel.json", "logo-svg.svg", "start.sh"]


def test_install_says_where_it_wrote_and_how_to_go_on(command: Command, prefix: Path) -> None:
    told = command("install", "--prefix", prefix, "--display-name", "Safe")
    assert str(prefix / "share" / "jupyter" / "kernels" / "python3-sandbox") in told
    assert 'choose "Safe"' in told
    assert "jupyter sandbox explain python3-sandbox" in told


def test_install_goes_to_the_users_own_kernels_if_asked(command: Command, tmp_path: Path) -> None:
    command("install", "--user", "--name", "mine")
    assert (tmp_path / "data_dir" / "kernels" / "mine" / "kernel.json").exists()


def test_install_goes_to_an_environment_of_ones_own_by_default(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    command("install", "--name", "default")
    assert kernel_json(tmp_path / "venv", "default")
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    command("install", "--name", "default")
    assert (tmp_path / "data_dir" / "kernels" / "default" / "kernel.json").exists()


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--mem-limit", "3Q"], "'3Q' is not a size"),
        (["--mem-limit", "1M"], "too small"),
        (["--cpu-limit", "0"], "too small"),
        (["--cpuset", "3-1"], "not a list of CPUs"),
        (["--volume", "data"], "not a volume"),
        (["--workdir", "here"], "relative path"),
        (["--on-missing", "network=warn"], "that a start can do without"),
        (["--SandboxProvisioner.memlimit", "1G"], "no such option"),
        (["--kernel", "nonesuch"], "not installed"),
        (["--name", "a b"], "Invalid kernel name"),
    ],
)
def test_install_writes_nothing_where_something_cannot_be_meant(
    command: Command, prefix: Path, words: list[str], answer: str
) -> None:
    with pytest.raises(SpecError, match=answer):
        command("install", "--prefix", prefix, *words)
    assert not prefix.exists()


def test_install_lists_the_known_kernels_where_it_finds_none(
    command: Command, prefix: Path
) -> None:
    install_other_kernel(prefix)
    with pytest.raises(SpecError, match="Installed are: other, python3"):
        command("install", "--kernel", "nonesuch")


def test_install_refuses_values_of_wrong_types(command: Command, prefix: Path) -> None:
    with pytest.raises(TraitError, match="cpu_limit"):
        command("install", "--prefix", prefix, "--cpu-limit", "much")
    assert not prefix.exists()


@pytest.mark.parametrize("name", [".", ".."])
def test_no_name_of_a_kernel_is_the_folder_around_all_of_them(
    command: Command, prefix: Path, name: str
) -> None:
    kernels = prefix / "share/jupyter/kernels"
    (kernels / "other").mkdir(parents=True)
    with pytest.raises(SpecError, match="no kernel has that name"):
        command("install", "--prefix", prefix, "--name", name, "--replace")
    assert (kernels / "other").exists()


def test_install_does_not_replace_without_being_asked(command: Command, prefix: Path) -> None:
    command("install", "--prefix", prefix, "--mem-limit", "1G")
    with pytest.raises(SpecError, match="--replace"):
        command("install", "--prefix", prefix)
    assert kernel_json(prefix)["metadata"]["kernel_provisioner"]["config"]["mem_limit"] == "1G"


def test_a_twin_has_no_twin(command: Command, prefix: Path) -> None:
    command("install", "--prefix", prefix, "--name", "twin")
    with pytest.raises(SpecError, match="runs in a sandbox already"):
        command("install", "--prefix", prefix, "--kernel", "twin")


def test_a_kernel_of_another_provisioner_gets_no_twin() -> None:
    elsewhere = {"kernel_provisioner": {"provisioner_name": "slurm-provisioner"}}
    with pytest.raises(SpecError, match="slurm-provisioner"):
        twin_of(KernelSpec(argv=["x"], display_name="X", metadata=elsewhere), {}, name="x")


def test_a_twin_can_take_the_place_of_the_plain_kernel(command: Command, prefix: Path) -> None:
    folder = install_other_kernel(prefix)
    command("install", "--kernel", "other", "--name", "other", "--replace", "--prefix", prefix)
    assert "sandbox_provisioner.unboxed" in kernel_json(prefix, "other")["argv"]
    assert (folder / "start.sh").exists()


def server_config(prefix: Path) -> Path:
    return prefix / "etc/jupyter/jupyter_server_config.json"


def test_install_server_adds_its_settings_and_takes_them_out(
    command: Command, prefix: Path
) -> None:
    path = server_config(prefix)
    path.parent.mkdir(parents=True)
    own = {"ServerApp": {"port": 1}, "X": {}}
    path.write_text(json.dumps(own))
    told = command("install", "--server", "--prefix", prefix)
    assert json.loads(path.read_text()) == {
        "ServerApp": {
            "port": 1,
            "contents_manager_class": "sandbox_provisioner.contents.SandboxContentsManager",
        },
        "LanguageServerManager": {"autodetect": False},
        "X": {},
    }
    assert f"Set in {path}" in told
    assert "follow no link" in told
    assert not (prefix / "share").exists()
    assert f"out of {path}" in command("install", "--server", "--remove", "--prefix", prefix)
    assert json.loads(path.read_text()) == own
    assert "Nothing of ours" in command("install", "--server", "--remove", "--prefix", prefix)


def test_install_server_changes_nothing_that_somebody_else_has_set(
    command: Command, prefix: Path
) -> None:
    path = server_config(prefix)
    path.parent.mkdir(parents=True)
    for text in ('{"ServerApp": {"contents_manager_class": "s3.S3"}}', "{", '{"ServerApp": 1}'):
        path.write_text(text)
        with pytest.raises(SpecError, match=str(path)):
            command("install", "--server", "--prefix", prefix)
        assert path.read_text() == text
    path.write_text('{"ServerApp": {"contents_manager_class": "s3.S3"}}')
    command("install", "--server", "--replace", "--prefix", prefix)
    assert "s3" not in path.read_text()


def test_install_prints_an_apparmor_profile_and_tells_what_it_allows(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told: list[str] = []
    monkeypatch.setattr(sys.stderr, "write", told.append)
    (tmp_path / "python").symlink_to("/usr/bin/env")
    monkeypatch.setattr(sys, "_base_executable", str(tmp_path / "python"))
    text = command("install", "--apparmor-profile")
    real = os.path.realpath("/usr/bin/env")
    assert "abi <abi/4.0>," in text
    assert f"profile jupyter-sandbox {real} flags=(unconfined) {{\n  userns,\n" in text
    advice = "".join(told)
    assert f"allows user namespaces to everything that {real} runs" in advice
    assert "sudo tee /etc/apparmor.d/jupyter-sandbox" in advice
    assert "sudo apparmor_parser -r /etc/apparmor.d/jupyter-sandbox" in advice
    assert command("install", "--apparmor-profile", "--output", tmp_path / "p") == ""
    assert (tmp_path / "p").read_text() == text
    assert f"sudo cp {tmp_path}/p /etc/apparmor.d" in "".join(told)


def test_an_apparmor_profile_that_cannot_be_written_is_an_error(command: Command) -> None:
    with pytest.raises(HostError, match="No such file or directory"):
        command("install", "--apparmor-profile", "--output", "/nonexistent/profile")


def test_a_path_in_a_profile_stands_for_itself() -> None:
    assert 'jupyter-sandbox "/opt/my py\\[1\\]/python" flags' in profile_for("/opt/my py[1]/python")


@pytest.mark.parametrize("path", ["/usr/bin/python3.13", '/opt/my "py"[1],@{x}/python*?'])
def test_the_profile_is_one_that_apparmor_can_read(path: str, tmp_path: Path) -> None:
    if missing("apparmor_parser"):  # Debian 12 has none that could: a skip, also in CI
        pytest.skip(missing("apparmor_parser"))
    (tmp_path / "profile").write_text(profile_for(path))
    words = ["apparmor_parser", "--skip-kernel-load", "--skip-cache", str(tmp_path / "profile")]
    assert subprocess.run(words, check=False).returncode == 0


def test_a_twin_can_be_made_of_a_kernel_without_a_folder(tmp_path: Path) -> None:
    kernel = KernelSpec(argv=["/bin/x", "{connection_file}"], display_name="X", language="x")
    write_twin(kernel, twin_of(kernel, {}, name="x"), tmp_path / "x")
    assert os.listdir(tmp_path / "x") == ["kernel.json"]


# -- the command line


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["nonesuch"],
        ["install", "python3"],
        ["install", "--user", "--prefix=/x"],
        ["install", "--output=/x"],
        ["install", "--remove"],
        ["explain"],
        ["run", "id"],
        ["run", "--"],
        ["run", "id", "--", "id"],
        ["list", "all"],
        ["gc", "all"],
    ],
)
def test_wrong_usage_is_told_apart(command: Command, words: list[str]) -> None:
    with pytest.raises(UsageError):
        command(*words)


@pytest.mark.parametrize("words", [["run", "--bogus", "1", "--", "id"], ["list", "--Foo.bar=1"]])
def test_unknown_options_are_refused_and_not_only_warned_of(
    command: Command, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        command(*words)
    assert "there is no option" in capsys.readouterr().err


def test_a_value_that_traitlets_cannot_read_is_wrong_usage(command: Command) -> None:
    with pytest.raises(SystemExit, match="2"):
        command("list", "--interval", "often")


@pytest.mark.parametrize("name", ["install", "doctor", "explain", "run", "list", "gc", "demo"])
def test_help_begins_with_usage_and_examples(
    command: Command, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        command(name, "--help")
    told = capsys.readouterr().out
    assert told.startswith(f"Usage: jupyter sandbox {name}")
    assert told.index("Examples") < told.index("Options\n")
    assert f"  jupyter sandbox {name}" in told.split("Examples", 1)[1]


def test_an_error_is_one_message_without_a_traceback(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["jupyter-sandbox", "explain", "nonesuch"])
    with pytest.raises(SystemExit, match="1"):
        main()
    told = capsys.readouterr()
    assert told.err.startswith("jupyter sandbox: Could not find the kernel 'nonesuch'")
    assert not told.out


def test_explain_refuses_a_plain_kernel_and_tells_how_to_box_it(
    command: Command, prefix: Path
) -> None:
    install_other_kernel(prefix)
    with pytest.raises(SpecError, match="jupyter sandbox install --kernel other"):
        command("explain", "other")


def test_a_list_of_nothing_says_so(command: Command, tmp_path: Path) -> None:
    assert command("list", "--runtime-dir", tmp_path / "run") == "No sandbox runs.\n"
    assert json.loads(command("list", "--json", "--runtime-dir", tmp_path / "run")) == []


def test_ages_have_at_most_two_units() -> None:
    told = [format_age(seconds) for seconds in (3.4, 59.4, 61, 3600 * 3 + 1200, 86400 * 2 + 14400)]
    assert told == ["3 s", "59 s", "1 min", "3 h 20 min", "2 d 4 h"]


def test_a_table_wraps_what_is_too_wide() -> None:
    told = table([("a", "b"), ("one two three", "x")], widest=(7,))
    assert told.splitlines() == ["a        b", "───────  ─", "one two  x", "three"]


# -- doctor

NO_NAMESPACES = HostError(attempt="make namespaces", answer="EPERM", remedy="Ask root.")


def host_facts(**changes: Any) -> HostFacts:
    facts = HostFacts(
        machine=Machine(
            kernel=(6, 8),
            architecture="x86_64",
            root_links={},
            system_directories=("/usr",),
            system_files=(),
            landlock=7,
        ),
        caller=Caller(
            uid=1000, gid=1000, home="/home/u", cwd="/home/u", umask=0o022, environment={}
        ),
        privileged=False,
        obstacle=None,
        cgroups=CgroupFacts(version=2, bases=MappingProxyType({}), missing={}),
        homes=frozenset(),
    )
    return host_with(facts, **changes)


def workdir_facts(**changes: Any) -> WorkdirFacts:
    place: dict[str, Any] = {
        "path": "/home/u/w",
        "source": "/home/u/w",
        "fd": -1,
        "device": 1,
        "inode": 2,
        "owner_uid": 1000,
        "owner_gid": 1000,
        "mount": Mount(1, 0, "/", changes.pop("filesystem", "ext4")),
    }
    place |= {name: changes.pop(name) for name in place.keys() & changes.keys()}
    facts: dict[str, Any] = {
        "place": Place(**place),
        "idmappable": True,
    }
    return WorkdirFacts(**facts | changes)


HEALTHY = Findings(
    host=host_facts(),
    workdir=workdir_facts(),
    sysctls={"kernel.seccomp.actions_avail": "kill_process errno allow"},
    surroundings=Surroundings(sysctls={}),
    id_range=IdRange(first_uid=100000, first_gid=100000, newuidmap="/n", newgidmap="/n"),
    runtime="/run/user/1000/sandbox-provisioner",
    runtime_free_bytes=1 << 30,
    entry_point="sandbox-provisioner = x",
    server="",
    kernels=(Kernel(name="python3-sandbox", sandboxed=True, guarded=True),),
    left_sandboxes=(),
    left_groups=(),
    storage_room=(100 << 30, 0, 1 << 30),
    trial=80.0,
    filesystems=frozenset({"overlay", "squashfs", "ext4"}),
    image_reader="/usr/bin/squashfuse",
    has_fuse=True,
)


def around(sysctls: dict[str, str] | None = None, **changes: Any) -> dict[str, Any]:
    """The finding of these surroundings."""
    return {"surroundings": Surroundings(sysctls=sysctls or {}, **changes)}


def refused(sysctls: dict[str, str] | None = None, **changes: Any) -> dict[str, Any]:
    """The same where no sandbox starts."""
    return {"trial": NO_NAMESPACES, **around(sysctls, **changes)}


def check(facility: str, **changes: Any) -> Check:
    found = dataclasses.replace(HEALTHY, **changes)
    return next(c for c in doctor.examine(found) if c.facility == facility)


def test_doctor_tells_what_limits_a_work_directory_or_who_can() -> None:
    counting = Mount(1, 0, "/srv", "xfs", limits_projects=True)
    found = check("size of work directory", workdir=workdir_facts(mount=counting))
    assert "workdir_limit can limit it" in found.found
    assert "broker" in found.effect
    for filesystem, told in (("ext4", "tune2fs"), ("xfs", "rootflags"), ("vfat", "of its own")):
        workdir = workdir_facts(filesystem=filesystem)
        assert told in check("size of work directory", workdir=workdir).remedy


def test_doctor_tells_what_holds_a_limit_of_the_disk() -> None:
    found = check("disk limit", storage_room=(10 << 30, 2 << 30, 1 << 30))
    assert "10 GiB free, of which kernels may still fill 2 GiB" in found.found
    full = check("disk limit", storage_room=(3 << 30, 2 << 30, 1 << 30))
    assert full.state is State.MISSING
    assert "mkfs" in check("disk limit", image_obstacle="there is no mkfs.ext4").found


def test_doctor_tells_of_landlock() -> None:
    assert check("landlock").found == "ABI 7"
    assert "signals" in check("landlock", host=host_facts(landlock=4)).found
    assert "root" in check("landlock", host=host_facts(uid=0)).found
    missing = check("landlock", host=host_facts(landlock=0))
    assert missing.state is State.NOTE
    assert "lsm=" in missing.remedy


def test_doctor_tells_what_images_are_made_with() -> None:
    assert "images" not in [one.facility for one in doctor.examine(HEALTHY)]
    tools = {"sqfstar": True, "mmdebstrap": True}
    assert check("images", image_tools=tools).state is State.OK
    missing = check("images", image_tools=tools | {"mmdebstrap": False})
    assert missing.state is State.NOTE
    assert "apt install mmdebstrap" in missing.remedy


def test_doctor_tells_which_roots_kernels_can_have() -> None:
    assert check("rootfs").found == "directories, and files of squashfs"
    root = host_facts(uid=0, privileged=True)
    assert check("rootfs", host=root).found == "directories, and files of squashfs and ext4"
    for changes, text in (
        ({"filesystems": frozenset({"ext4"})}, "no overlay"),
        ({"image_reader": ""}, "no squashfuse"),
        ({"has_fuse": False}, "/dev/fuse is closed"),
    ):
        found = check("rootfs", **changes)
        assert found.state is State.NOTE
        assert text in found.found
        assert found.remedy
    brokered = check("rootfs", image_reader="", broker="/run/sandbox-broker/socket")
    assert brokered.state is State.OK
    assert "files that its policy names" in brokered.found


def test_doctor_tells_of_a_linux_that_hands_over_no_connections() -> None:
    why = "netlink(protocol=12, message='(all of them)') failed: ENOTSUP (Operation not supported)"
    found = check('network = "gateway"', catch_obstacle=why)
    assert found.state is State.NOTE
    assert why in found.found
    assert "sudo modprobe -a nf_tables" in found.remedy


def test_doctor_tells_why_kernels_cannot_have_a_network_card() -> None:
    told = "Linux refuses to make the object quota-64400001: Operation not supported"
    root = host_facts(privileged=True)
    found = check('network = "card"', host=root, card=told)
    assert (found.state, found.found) == (State.NOTE, told)
    assert "modprobe -a nf_tables" in found.remedy
    error = HostError(attempt="a", answer="this host forwards nothing", remedy="Let it forward.")
    found = check('network = "card"', host=root, card=error)
    assert (found.found, found.remedy) == ("this host forwards nothing", "Let it forward.")


def test_doctor_finds_nothing_where_everything_works() -> None:
    assert {found.state for found in doctor.examine(HEALTHY)} == {State.OK}


@pytest.mark.parametrize(
    ("facility", "changes", "remedy"),
    [
        ("Linux", {"host": host_facts(kernel=(5, 4))}, "Boot Linux 5.12"),
        ("machine", {"host": host_facts(architecture="riscv64")}, "x86_64, aarch64"),
        ("user namespaces", around({"user.max_user_namespaces": "0"}), "=28633"),
        ("user namespaces", around({"kernel.unprivileged_userns_clone": "0"}), "=1"),
        ("user namespaces", refused({APPARMOR: "1"}), "restrict_unprivileged_userns=0"),
        ("user namespaces", refused({APPARMOR: "1"}), "install --apparmor-profile | sudo tee"),
        ("system call filter", {"sysctls": {}}, "CONFIG_SECCOMP_FILTER"),
        ("runtime directory", {"runtime": NO_NAMESPACES}, "Ask root."),
        ("runtime directory", {"runtime_free_bytes": 0}, "df "),
        ("known to Jupyter", {"entry_point": ""}, "pip install"),
        ("a sandbox starts", {"trial": NO_NAMESPACES}, "Ask root"),
    ],
)
def test_doctor_tells_the_effect_and_the_remedy(
    facility: str, changes: dict[str, Any], remedy: str
) -> None:
    found = check(facility, **changes)
    assert found.state is State.MISSING
    assert remedy in found.remedy
    assert "sandbox starts" in found.effect


def test_doctor_tells_the_reason_for_each_cap_that_is_missing() -> None:
    cgroups = CgroupFacts(version=2, bases={}, missing={"cpu": "controller 'cpu' is not delegated"})
    found = check("cpu cap", host=host_facts(cgroups=cgroups))
    assert "not delegated" in found.found
    assert "Delegate=" in found.remedy
    assert 'on_missing = {"cpu": "warn"}' in found.effect


def test_doctor_tells_that_a_sandbox_would_start_without_caps() -> None:
    cgroups = CgroupFacts(version=0, bases={}, missing={"pids": "no cgroups"})
    changes = {"trial": NO_NAMESPACES, "uncapped_trial": 70.0}
    found = check("one without caps", host=host_facts(cgroups=cgroups), **changes)
    assert "on_missing = {'pids': 'warn'}" in found.effect


def test_root_is_not_bound_by_settings_for_ordinary_users() -> None:
    settings = refused({APPARMOR: "1", "kernel.unprivileged_userns_clone": "0"})
    found = check("user namespaces", **settings, host=host_facts(uid=0, privileged=True))
    assert found.state is State.OK


def test_doctor_suspects_the_filter_of_a_container() -> None:
    found = check("user namespaces", **refused(container="docker", filtered=True))
    assert found.state is State.NOTE
    assert "a Docker container" in found.found
    assert "docker run --security-opt seccomp=unconfined" in found.remedy
    works = check("user namespaces", **around(container="docker", filtered=True))
    assert (works.state, works.found) == (
        State.OK,
        "allowed for uid 1000 in a Docker container",
    )


def test_doctor_suspects_no_filter_where_namespaces_were_made_and_proc_is_masked() -> None:
    proc = HostError(
        attempt="make namespaces for a sandbox",
        answer="[mount /proc] fsmount(name='proc', attributes=0) failed: EPERM: it is masked",
        remedy="Unmask it.",
    )
    found = check("user namespaces", **refused(container="podman", filtered=True) | {"trial": proc})
    assert found.state is State.OK


def test_doctor_is_content_with_apparmor_where_a_profile_lets_sandboxes_start() -> None:
    assert check("user namespaces", **around({APPARMOR: "1"})).state is State.OK


def test_doctor_blames_nobody_for_namespaces_where_only_caps_are_missing() -> None:
    found = check("user namespaces", **refused({APPARMOR: "1"}), uncapped_trial=70.0)
    assert found.state is State.OK


def test_doctor_tells_whose_ids_kernels_have() -> None:
    facility = "user ids of kernels"
    assert "65536 from 100000 on" in check(facility).found
    missing = check(facility, id_range=NO_NAMESPACES)
    assert (missing.state, missing.remedy) == (State.NOTE, "Ask root.")
    assert "a range of 65536" in check(facility, host=host_facts(uid=0, privileged=True)).found
    contained = check(facility, host=host_facts(uid=0))
    assert contained.state is State.NOTE
    assert "container's root, without its rights" in contained.found


def test_doctor_looks_at_the_work_directory_only_as_far_as_it_matters() -> None:
    fixed = workdir_facts(idmappable=False, filesystem="overlay")
    root = host_facts(uid=0, privileged=True)
    assert check("work directory", workdir=fixed).state is State.OK
    assert check("work directory", workdir=fixed, host=root).state is State.NOTE
    of_root = workdir_facts(idmappable=False, filesystem="overlay", owner_uid=0)
    assert check("work directory", workdir=of_root, host=root).state is State.MISSING
    assert check("work directory", workdir=NO_NAMESPACES).remedy == "Ask root."


def test_doctor_names_plain_and_unguarded_kernels() -> None:
    kernels = (
        Kernel(name="bare", sandboxed=True, guarded=False),
        Kernel(name="ir", sandboxed=False, guarded=False),
    )
    assert "ir" in check("plain kernels", kernels=kernels).found
    assert "bare" in check("unguarded kernels", kernels=kernels).found
    assert check("sandboxed kernels", kernels=()).remedy == "  jupyter sandbox install"


@pytest.mark.parametrize(
    ("facts", "kernel", "is_told"),
    [
        ({"version": 2, "favors_moves": False}, (6, 0), True),
        ({"version": 2, "favors_moves": True}, (6, 0), False),
        ({"version": 2, "favors_moves": False}, (5, 19), False),
        ({"version": 1, "favors_moves": False}, (6, 0), False),
    ],
)
def test_doctor_tells_where_starts_wait_for_their_group(
    facts: dict[str, Any], kernel: tuple[int, int], is_told: bool
) -> None:
    cgroups = CgroupFacts(bases=MappingProxyType({}), missing={}, **facts)
    found = dataclasses.replace(HEALTHY, host=host_facts(cgroups=cgroups, kernel=kernel))
    told = [one for one in doctor.examine(found) if one.facility == "joining a group"]
    assert bool(told) == is_told
    assert not told or "remount,favordynmods" in told[0].remedy


def test_doctor_names_what_receives_core_dumps_and_what_is_left() -> None:
    pattern = {"kernel.core_pattern": "|/usr/share/apport/apport %p"}
    assert "apport" in check("core dumps", sysctls=pattern).found
    left = check("leftovers", left_sandboxes=("abc",), left_groups=("def",))
    assert "abc, def" in left.found
    assert left.remedy == "  jupyter sandbox gc"


@pytest.mark.parametrize(
    ("limit", "privileged", "state"),
    [
        ("128", False, State.OK),
        ("16", False, State.NOTE),
        ("16", True, State.OK),
    ],
)
def test_the_doctor_tells_for_how_many_kernels_in_a_home_there_are_watches(
    limit: str, privileged: bool, state: State
) -> None:
    host = dataclasses.replace(HEALTHY.host, privileged=privileged)
    told = check("inotify instances", host=host, sysctls={WATCHERS: limit})
    assert told.state is state
    assert limit in told.found
    assert ("sysctl" in told.remedy) == (state is State.NOTE)


def test_the_table_of_doctor_fits_into_a_terminal_and_tells_each_remedy_once() -> None:
    reason = f"/sys/fs/cgroup/{'x' * 60} is not writable for uid 1000"
    missing = dict.fromkeys(("memory", "cpu", "pids"), reason)
    facts = host_facts(cgroups=CgroupFacts(version=0, bases={}, missing=missing))
    told = doctor.describe(doctor.examine(dataclasses.replace(HEALTHY, host=facts)))
    assert max(map(len, told.splitlines())) <= COLUMNS
    assert told.count("mount -t cgroup2") == 1
    assert told.count('What helps stands at "memory cap".') == 2


def test_the_table_of_doctor_puts_each_remedy_on_a_line_to_copy() -> None:
    failed = LaunchError(attempt="start", answer="EPERM", remedy="Do that.", step="unshare")
    told = doctor.describe(doctor.examine(dataclasses.replace(HEALTHY, trial=failed)))
    lines = [line.strip() for line in told.splitlines()]
    assert "Do that." in lines
    assert any(line.startswith("missing  a sandbox starts") for line in lines)
    assert "[unshare] EPERM" in told
