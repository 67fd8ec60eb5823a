"""The options of a sandbox: what of them users have in their configurations does not change."""

from __future__ import annotations

import pytest
from jupyter_client.provisioning.local_provisioner import LocalProvisioner
from traitlets import Int, TraitType
from traitlets.config import Config

from sandbox_provisioner.app.command import OPTION_ALIASES
from sandbox_provisioner.options import every_option
from sandbox_provisioner.provisioner import SandboxProvisioner
from tests.readme import README, written

LISTS = {"covered_directories", "covered_files", "home_visible"}
OPTIONS = """\
broker_socket: Unicode = '/run/sandbox-broker/socket'
confinement: Enum['namespaces', 'landlock'] = 'namespaces' --confinement
covered_directories: List[Unicode]
covered_files: List[Unicode]
cpu_guarantee: Float or None = None --cpu-guarantee
cpu_limit: Float or None = None --cpu-limit
cpuset: Unicode = '' --cpuset
devices: List[Unicode] = [] --device
disk_backend: Enum['tmpfs', 'image', 'project', 'btrfs', 'auto'] = 'auto' --disk-backend
disk_limit: Union[Int, Unicode] or None = None --disk-limit
ends_file: Unicode = ''
env_keep: List[Unicode] = [] --env-keep
home_visible: List[Unicode]
inode_limit: Int or None = None --inode-limit
io_limit: Union[Int, Unicode] or None = None --io-limit
kernel_user: Enum['user', 'root'] = 'user' --kernel-user
launcher: Enum['auto', 'local', 'broker'] = 'auto'
layer: Enum['none', 'auto', 'kernel', 'user'] = 'auto' --layer
layer_dir: Unicode = '' --layer-dir
mem_interrupt: Float or None = 0.92
mem_limit: Union[Int, Unicode] or None = '50%' --mem-limit
network: Enum['none', 'gateway', 'card'] = 'none' --network
network_allow: List[Unicode] = [] --network-allow
network_audit: Bool = False --network-audit
network_connections: Union[Int, Unicode, Dict] or None = None --network-connections
network_deny: List[Unicode] = [] --network-deny
network_ipv6: Bool = False --network-ipv6
network_pool: Unicode = '100.64.0.0/10'
network_pool_ipv6: Unicode = 'fd53:616e:6462:6f79::/64'
network_quota: Union[Int, Unicode] or None = None --network-quota
network_rate: Union[Int, Unicode, Dict] or None = None --network-rate
on_missing: Dict[Enum['refuse', 'warn']] = {} --on-missing
pids_limit: Int or None = 512 --pids-limit
preload: List[Unicode] = [] --preload
review_days: Float = 14.0
rootfs: Unicode = 'host' --rootfs
runtime_dir: Unicode = ''
shm_limit: Union[Int, Unicode] or None = None --shm-limit
spares: Int (min 0) = 0 --spares
start_timeout: Float = 60.0
survive_server: Bool = False
swap_limit: Union[Int, Unicode] or None = None --swap-limit
tmp_limit: Union[Int, Unicode] or None = None --tmp-limit
user_ids: Enum['single', 'range'] = 'single' --user-ids
volumes: Volumes[Unicode] = [] --volume
warm: Union[Bool, Enum['auto']] = 'auto' --warm
warm_idle_timeout: Float = 900.0 --warm-idle-timeout
workdir: Unicode = 'notebook' --workdir
workdir_inode_limit: Int or None = None --workdir-inode-limit
workdir_limit: Union[Int, Unicode] or None = None --workdir-limit
workdir_mode: Enum['review', 'direct'] = 'direct' --workdir-mode
"""


def kind(trait: TraitType) -> str:
    name = type(trait).__name__
    inner = [*getattr(trait, "trait_types", [])]
    inner += [i for n in ("_trait", "_value_trait") if (i := getattr(trait, n, None))]
    values = [*map(repr, getattr(trait, "values", None) or []), *map(kind, inner)]
    least = getattr(trait, "min", None) if isinstance(trait, Int) else None
    words = [
        f"{name}[{', '.join(values)}]" if values else name,
        *(["or None"] if trait.allow_none else []),
        *([f"(min {least})"] if least is not None else []),
    ]
    return " ".join(words)


def shown(name: str) -> str:
    trait = SandboxProvisioner.class_traits()[name]
    flags = [alias for alias, full in OPTION_ALIASES.items() if full.endswith(f".{name}")]
    default = [] if name in LISTS else [f"= {getattr(SandboxProvisioner(), name)!r}"]
    return " ".join((f"{name}: {kind(trait)}", *default, *(f"--{flag}" for flag in flags)))


def test_names_types_defaults_and_flags_are_what_configurations_rely_on() -> None:
    assert "".join(f"{shown(name)}\n" for name in sorted(every_option())) == OPTIONS


def test_every_option_is_set_in_configuration_files_and_tells_what_it_means() -> None:
    for name in every_option():
        trait = SandboxProvisioner.class_traits()[name]
        assert trait.metadata["config"] is True
        assert str(trait.help).endswith((".", ")"))


def test_every_option_of_the_provisioner_stands_in_the_table() -> None:
    upstream = set(LocalProvisioner.class_trait_names(config=True))
    assert set(SandboxProvisioner.class_trait_names(config=True)) - upstream == {*every_option()}


def test_the_readme_tells_every_option_as_the_table_of_options_does() -> None:
    text = README.read_text()
    assert written(text) == text, "write it anew: python -m tests.readme"


@pytest.mark.parametrize("name", sorted(every_option()))
def test_a_configuration_file_sets_each_by_the_provisioners_name(name: str) -> None:
    value = getattr(SandboxProvisioner(), name)
    config = Config({"SandboxProvisioner": {name: value}})
    assert getattr(SandboxProvisioner(config=config), name) == value
    assert f"c.SandboxProvisioner.{name}" in SandboxProvisioner.class_config_section()
