"""With whom a sandbox may speak: what a person writes, and what that lets through."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jupyter_client.kernelspec import KernelSpec
from traitlets.config import Config

from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.facilities.network.wish.addresses import meant_by, special_of
from sandbox_provisioner.facilities.network.wish.names import BadNameError, host_name
from sandbox_provisioner.facilities.network.wish.network import Network, NetworkWish
from sandbox_provisioner.facilities.network.wish.options import network_wish
from sandbox_provisioner.facilities.network.wish.rules import Rules, given_by, parse
from sandbox_provisioner.provisioner import SandboxProvisioner

PUBLIC, OTHER = "93.184.215.14", "1.1.1.1"
HOME = "2a00:1450:4001::1"

labels = st.from_regex(r"[a-z]([a-z0-9-]{0,8}[a-z])?", fullmatch=True)
names = st.lists(labels, min_size=2, max_size=4).map(".".join)
ports = st.integers(1, 65535)
ipv4 = st.ip_addresses(v=4)


# -- what a rule may be


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("data.example.org", "data.example.org"),
        ("Data.Example.ORG.", "data.example.org"),
        ("*.Example.edu:443", "*.example.edu:443"),
        ("db:5432", "db:5432"),
        ("my_db.internal:80,443,80", "my_db.internal:80,443"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("bu\u0308cher.example", "xn--bcher-kva.example"),
        ("straße.example", "xn--strae-oqa.example"),  # and not strasse.example
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("10.1.0.0/16:5432,443", "10.1.0.0/16:443,5432"),
        ("10.1.2.3", "10.1.2.3"),
        ("10.1.2.3/32", "10.1.2.3"),
        ("2001:DB8::/32", "2001:db8::/32"),
        ("[2001:db8::/32]:443", "[2001:db8::/32]:443"),
        ("[2001:db8::]/32:443", "[2001:db8::/32]:443"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("2001:db8::1:443", "2001:db8::1:443"),
        ("all", "all"),
        ("all:80,443", "all:80,443"),
        ("packages", "packages"),
        ("packages.", "packages."),
        ("all.", "all."),
    ],
)
def test_a_rule_is_read_in_one_form_and_is_read_again_from_it(written, meant):
    rule = parse(written, "network_allow, rule 1")
    assert rule.text == meant
    assert parse(rule.text, "network_allow, rule 1") == rule


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ("", "empty"), (" ", "blanks"), ("a.example b.example", "blanks"),
        ("a.example\n", "blanks"),
        ("https://data.example.org/x", "URL"), ("data.example.org/x", "no range"),
        ("*", '"all"'), ("*example.org", "part of a host name"), ("*.*.org", "part of a host"),
        ("a..example", "part of a host name"), ("-a.example", "part of a host name"),
        (f"{'a' * 64}.example", "part of a host name"), (".".join(["abcdefg"] * 40), "at most 253"),
        ("user@example.org", "part of a host name"), ("a.example:443:80", "no range"),
        ("2130706433", "ends in a number"), ("0x7f.1", "ends in a number"),
        ("0x7f000001", "ends in a number"), ("0177.0.0.1", "ends in a number"),
        ("127.1", "ends in a number"), ("*.0x7f", "ends in a number"), ("1.2.3.4.5", "number"),
        ("a.example.1.", "ends in a number"), ("256.1.1.1", "ends in a number"),
        ("localhost", "the sandbox itself"), ("*.localhost:80", "the sandbox itself"),
        ("x.localhost.", "the sandbox itself"),
        ("Ｅxample.org", "variant"), ("a\u200db.example", "part of a host name"),
        ("ex\u3002org", "part of a host name"),
        ("a.example:", "no port"), ("a.example:0", "no port"), ("a.example:65536", "no port"),
        ("a.example:http", "no port"), ("a.example:٤٤٣", "no port"), ("a.example:80,", "no port"),
        ("a.example:080", "no port"), ("[a.example]:443", "IPv6"), ("[2001:db8::1", "no range"),
        ("10.1.2.3/16", '"10.1.0.0/16"'), ("10.0.0.0/33", "no range"),
        ("10.0.0.0/255.0.0.0", '"10.0.0.0/8"'), ("010.0.0.1", "ends in a number"),
        ("fe80::1%eth0", "interface"), ("[fe80::1%eth0]:80", "interface"),
        ("::ffff:10.0.0.1", "carries an address of IPv4"), ("2002:a00:1::/48", "carries"),
        ("64:ff9b::a00:1", "carries"), ("2001:0:1::/48", "carries"), ("::ffff:0:0/96", "carries"),
        ("packages:443", "its own ports"), ("package", '"packages"'), ("Packages", '"packages"'),
        ("pypi.org:443 from packages", "blanks"),
    ],
)  # fmt: skip
def test_an_error_of_a_rule_names_the_rule_its_place_and_the_remedy(written, answer):
    with pytest.raises(SpecError) as caught:
        parse(written, "network_allow, rule 3")
    told = str(caught.value)
    assert "network_allow, rule 3" in told
    assert repr(written) in told or "\\" in repr(written)
    assert answer in told
    assert "Write " in caught.value.remedy


@given(st.one_of(st.text(max_size=30), st.text(alphabet="a1.:*[]/%,- x\u00df\u212a", max_size=20)))
def test_any_text_is_a_rule_that_is_read_again_or_one_clear_error(text):
    try:
        rule = parse(text, "network_deny, rule 9")
    except SpecError as error:
        assert "network_deny, rule 9" in str(error)
    else:
        assert rule.text.isascii()
        assert parse(rule.text, "again") == rule


# -- names


@pytest.mark.parametrize(
    ("rule", "let", "refused"),
    [
        ("data.example.org", ["data.example.org", "DATA.example.org.", "data.Example.ORG"],
         ["example.org", "x.data.example.org", "data.example.org.evil.example", "xdata.example.org",
          "data-example.org", "data.example.or", ""]),
        ("*.example.edu", ["a.example.edu", "b.a.example.edu", "A.EXAMPLE.EDU."],
         ["example.edu", "xexample.edu", ".example.edu", "example.edu.evil.example", "edu"]),
        ("bücher.example", ["xn--bcher-kva.example", "XN--BCHER-KVA.example"],
         ["bucher.example", "bücher.example"]),
        ("key.example", ["KEY.example"], ["\N{KELVIN SIGN}ey.example"]),
        ("all", ["a.example", "com", "a_b.example"],
         ["2130706433", "0x7f.1", "0x7f000001", "127.1", "127.0.0.1", "::1", "1.2.3.4",
          "localhost", "LOCALHOST.", "a.localhost", "a b.example", "a.example\0", "a..example",
          "a.example..", "-a.example"]),
        ("all.", ["all"], ["a.example"]),
        ("10.0.0.0/8", [], ["a.example", "10.0.0.1"]),
    ],
)  # fmt: skip
def test_a_name_is_looked_up_only_where_a_rule_has_it(rule, let, refused):
    rules = Rules.read([rule])
    for name in let:
        assert rules.judge_name(name).allowed, name
        assert rules.judge(name, PUBLIC, 443).allowed, name
    for name in refused:
        assert not rules.judge_name(name).allowed, name
        assert not rules.judge(name, PUBLIC, 443).allowed, name


def test_nothing_is_allowed_where_nothing_is_written():
    for rules in (Rules(), Rules.read([]), Rules.read(["packages"])):
        assert not rules.judge_name("a.example").allowed
        assert not rules.judge(None, PUBLIC, 443).allowed
        assert not rules.judge("a.example", PUBLIC, 443).allowed


@given(names, names, st.booleans(), ports, ports)
def test_a_name_passes_if_and_only_if_it_is_the_rules(wanted, ruled, below, port, allowed_port):
    rules = Rules.read([f"{'*.' * below}{ruled}:{allowed_port}"])
    is_meant = wanted.endswith(f".{ruled}") if below else wanted == ruled
    assert rules.judge_name(wanted).allowed == is_meant
    assert rules.judge(wanted, PUBLIC, port).allowed == (is_meant and port == allowed_port)
    child = f"x.{ruled}"
    assert rules.judge(child.upper() + ".", PUBLIC, allowed_port).allowed == below


@given(st.text(max_size=20))
def test_a_name_that_passes_is_ascii_and_no_address(text):
    if Rules.read(["all"]).judge_name(text).allowed:
        assert text.isascii()
        assert not text.rstrip(".").rpartition(".")[2].isdecimal()
        assert host_name(text) == host_name(host_name(text))
    else:
        with pytest.raises(BadNameError):
            host_name(text)


# -- ports and denials


def test_a_port_has_to_be_in_the_rule_that_has_the_name():
    rules = Rules.read(["a.example:80,443", "b.example", "c.example:22", "c.example:443"])
    assert [p for p in (22, 80, 443, 8080) if rules.judge("a.example", PUBLIC, p).allowed] == [
        80,
        443,
    ]
    assert rules.judge("b.example", PUBLIC, 1).allowed
    assert rules.judge("c.example", PUBLIC, 22).allowed
    refused = rules.judge("a.example", PUBLIC, 22)
    assert "ports 443 and 80" in refused.why or "ports 80 and 443" in refused.why


def test_what_has_no_ports_passes_a_rule_without_ports_only():
    rules = Rules.read(["a.example:80", "b.example", "10.0.0.0/8"])
    assert not rules.judge("a.example", PUBLIC, 80, "icmp").allowed
    assert rules.judge("b.example", PUBLIC, 0, "icmp").allowed
    assert rules.judge(None, "10.1.1.1", 0, "icmp").allowed
    assert rules.judge("a.example", PUBLIC, 80, "udp").allowed


def test_what_is_denied_is_refused_whatever_is_allowed():
    rules = Rules.read(
        ["all", "*.example", "10.0.0.0/8"],
        ["b.example", "*.c.example", "d.example:25", "1.1.1.0/24", "10.0.0.1", "all:6667"],
    )
    assert not rules.judge_name("b.example").allowed
    assert not rules.judge_name("x.c.example").allowed
    assert rules.judge_name("c.example").allowed
    assert rules.judge_name("d.example").allowed
    assert rules.judge("d.example", PUBLIC, 443).allowed
    assert not rules.judge("d.example", PUBLIC, 25).allowed
    assert not rules.judge("a.example", OTHER, 443).allowed
    assert not rules.judge(None, OTHER, 443).allowed
    assert not rules.judge(None, f"::ffff:{OTHER}", 443).allowed
    assert rules.judge(None, "10.0.0.2", 443).allowed
    assert not rules.judge(None, "10.0.0.1", 443).allowed
    assert not rules.judge("a.example", PUBLIC, 6667).allowed
    assert rules.judge("b.example", PUBLIC, 443).sentence("b.example:443") == (
        "b.example:443 was refused: network_deny has b.example."
    )


@given(names, ports, ipv4, st.sampled_from(["all", "*.{}", "{}"]))
def test_a_denial_beats_every_rule(name, port, address, rule):
    allow = ["all", name, f"*.{name}", str(address), f"{address}:{port}"]
    denied = rule.format(name)
    child = f"a.{name}" if rule.startswith("*") else name
    rules = Rules.read(allow, [f"{denied}:{port}"])
    assert not rules.judge(child, PUBLIC, port).allowed
    rules = Rules.read(allow, [str(address)])
    for text in (str(address), f"::ffff:{address}", f"64:ff9b::{address}"):
        assert not rules.judge(None, text, port).allowed
        assert not rules.judge(name, text, port).allowed


# -- addresses

SPECIAL = [
    "127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "169.254.0.1", "169.254.169.254",
    "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1", "100.127.255.255",
    "198.18.0.1", "198.19.255.255", "192.0.2.1", "198.51.100.1", "203.0.113.80", "224.0.0.1",
    "239.255.255.255", "240.0.0.1", "255.255.255.255", "192.0.0.8", "168.63.129.16",
    "100.100.100.200", "192.0.0.192",
    "::1", "::", "fe80::1", "fec0::1", "fc00::1", "fd00:ec2::254", "fd53:616e:6462:6f78::1",
    "ff02::1", "2001:db8::1", "3fff::1", "100::1", "2001:2::1", "2001:10::1", "::1.2.3.4",
    "64:ff9b:1::1", "4000::1", "5f00::1", "fe00::1", "200::1",
]  # fmt: skip


@pytest.mark.parametrize("address", SPECIAL)
def test_what_is_not_public_is_reached_only_by_a_rule_that_names_it(address):
    version = ip_address(address).version
    world = "0.0.0.0/0" if version == 4 else "::/0"
    nearly = "0.0.0.0/1" if version == 4 else "::/1"
    wide = Rules.read(["all", "a.example", world, nearly])
    for name in (None, "a.example"):
        assert not wide.judge(name, address, 443).allowed
    exact = Rules.read([f"[{address}]:443" if version == 6 else f"{address}:443"])
    assert exact.judge(None, address, 443).allowed
    assert not exact.judge(None, address, 80).allowed
    assert not exact.judge("a.example", address, 443).allowed
    both = Rules.read(["a.example", address])
    assert both.judge("a.example", address, 443).allowed
    assert not both.judge("b.example", address, 443).allowed


@pytest.mark.parametrize(
    ("rule", "let", "refused"),
    [
        ("10.1.0.0/16:5432", ["10.1.0.1", "10.1.255.255"], ["10.2.0.1", "11.1.0.1"]),
        ("10.0.0.0/8", ["10.9.9.9"], ["9.255.255.255", "11.0.0.0"]),
        ("fc00::/7", ["fd00::1", "fc00::1"],
         ["fd00:ec2::254", "fd53:616e:6462:6f78::2", "fe80::1"]),
        ("100.64.0.0/10", ["100.64.0.1"], ["100.100.100.200", "100.63.255.255"]),
        ("169.254.0.0/16", ["169.254.1.1"], ["169.254.169.254", "169.254.170.2"]),
        ("127.0.0.0/8", ["127.0.0.1"], ["128.0.0.1", "::1"]),
        ("8.0.0.0/7", ["8.8.8.8", "9.9.9.9"], ["10.0.0.1", "7.7.7.7"]),
        ("8.0.0.0/6", ["8.8.8.8", "11.0.0.1"], ["10.0.0.1"]),  # has 10.0.0.0/8 too, by the way
        ("2a00::/12", [HOME], ["2a10::1", "fd00::1"]),
    ],
)  # fmt: skip
def test_a_rule_of_addresses_lets_those_through_and_no_kind_that_it_only_contains(
    rule, let, refused
):
    rules = Rules.read([rule])
    assert [a for a in let if not rules.judge(None, a, 5432).allowed] == []
    assert [a for a in refused if rules.judge(None, a, 5432).allowed] == []


def carried(address: IPv4Address) -> list[str]:
    number = int(address)
    return [
        f"::ffff:{address}",
        f"64:ff9b::{address}",
        str(IPv6Address(0x2002 << 112 | number << 80 | 1)),
        str(IPv6Address(0x2001_0000 << 96 | 0x0102_0304 << 64 | number ^ 0xFFFF_FFFF)),
    ]


@given(ipv4, ports, st.sampled_from(["all", "0.0.0.0/0", "10.0.0.0/8", "127.0.0.0/8", "::/0"]))
def test_an_address_that_carries_another_one_is_judged_as_that_one(address, port, rule):
    rules = Rules.read([rule, "a.example"])
    for name in (None, "a.example", "b.example"):
        plain = rules.judge(name, str(address), port).allowed
        for text in carried(address):
            assert rules.judge(name, text, port).allowed == plain, text


@given(st.ip_addresses())
def test_all_that_python_knows_to_be_no_global_address_is_special(address):
    meant = meant_by(address)
    if not meant.is_global or meant.is_multicast:
        assert special_of(meant) is not None


@given(st.ip_addresses(), ports, names)
def test_all_lets_through_what_is_public_and_nothing_else(address, port, name):
    rules = Rules.read(["all"], own=[PUBLIC])
    public = special_of(meant_by(address)) is None and str(meant_by(address)) != PUBLIC
    assert rules.judge(None, str(address), port).allowed == public
    assert rules.judge(name, str(address), port).allowed == public


@pytest.mark.parametrize(
    "text",
    ["", "localhost", "2130706433", "0x7f.1", "127.1", "0177.0.0.1", "fe80::1%eth0", "::1%1",
     "1.2.3.4/32", " 1.1.1.1", "1.1.1.1\n", "a.example", "[::1]", "１.1.1.1"],
)  # fmt: skip
def test_what_is_no_address_in_the_usual_notation_leads_nowhere(text):
    rules = Rules.read(["all", "a.example"])
    assert not rules.judge(None, text, 443).allowed
    assert not rules.judge("a.example", text, 443).allowed


def test_this_machine_and_other_sandboxes_are_reached_by_a_rule_for_exactly_them():
    own = [PUBLIC, "10.0.0.5", "100.70.0.0/16", "2a00::5"]
    wide = Rules.read(["all", "a.example", "10.0.0.0/8", "93.184.0.0/16", "100.64.0.0/10"], own=own)
    for address in (PUBLIC, "10.0.0.5", "100.70.1.1", "2a00::5", f"::ffff:{PUBLIC}"):
        assert not wide.judge(None, address, 8888).allowed, address
        assert not wide.judge("a.example", address, 8888).allowed, address
    assert wide.judge(None, "10.0.0.6", 8888).allowed
    assert wide.judge(None, "100.71.0.1", 8888).allowed
    exact = Rules.read(["10.0.0.5:8888", f"{PUBLIC}:8888", "100.70.1.0/24"], own=own)
    for address in ("10.0.0.5", PUBLIC, "100.70.1.1"):
        assert exact.judge(None, address, 8888).allowed, address
    assert not exact.judge(None, "10.0.0.5", 22).allowed
    assert "this machine" in wide.judge(None, PUBLIC, 1).why
    assert "other sandboxes" in wide.judge(None, "100.70.1.1", 1).why


# -- presets


def test_a_name_that_a_preset_gave_may_lead_to_a_private_address_and_nowhere_worse():
    rules = Rules.read(
        [given_by("packages", "mirror.corp:443"), given_by("packages", "10.0.0.7:8080"),
         given_by("packages", "127.0.0.1:3128")],
        own=["10.0.0.5"],
    )  # fmt: skip
    for address in ("10.0.0.9", "192.168.1.1", "100.64.0.1", "203.0.113.80", "fd00::1", PUBLIC):
        assert rules.judge("mirror.corp", address, 443).allowed, address
    worse = (
        "127.0.0.1", "169.254.169.254", "0.0.0.0", "::1", "10.0.0.5", "224.0.0.1", "198.18.0.9",
        "fd53:616e:6462:6f78::9", "fd00:ec2::254", "100.100.100.200",
    )  # fmt: skip
    for address in worse:
        assert not rules.judge("mirror.corp", address, 443).allowed, address
    assert not rules.judge("mirror.corp", "10.0.0.9", 80).allowed
    assert rules.judge(None, "10.0.0.7", 8080).allowed
    assert not rules.judge(None, "10.0.0.8", 8080).allowed
    assert not rules.judge(None, "127.0.0.1", 3128).allowed
    assert rules.allows == "packages"


def test_a_persons_rule_does_not_become_a_presets():
    rules = Rules.read(["mirror.corp", given_by("packages", "pypi.org:443")])
    assert not rules.judge("mirror.corp", "10.0.0.9", 443).allowed
    with pytest.raises(SpecError, match="no preset"):
        Rules.read(["a.example from nowhere"])


# -- what the person reads


def test_a_refusal_tells_what_is_allowed_and_how_to_ask():
    rules = Rules.read(["data.example.org", "*.example.edu"])
    assert rules.judge_name("example.org").sentence("example.org:443") == (
        "example.org:443 was refused: this kernel's network allows data.example.org and "
        "*.example.edu. Ask for it with network_allow."
    )
    leads = rules.judge("data.example.org", "10.0.0.5", 443).sentence("data.example.org:443")
    assert leads == (
        "data.example.org:443 was refused: it leads to 10.0.0.5, which is a private address, and "
        "no rule of network_allow names that address. Ask for it with network_allow."
    )
    assert "allows nothing." in Rules().judge_name("a.example").sentence("a.example:1")


def test_a_refusal_is_short_however_many_rules_there_are():
    many = Rules.read([f"host-{number}.example.org" for number in range(1000)])
    assert "and 994 more" in many.allows
    assert len(many.judge_name("a.example").sentence("a.example:443")) < 400


# -- the whole wish


def wish(**options) -> NetworkWish:
    return network_wish(SandboxProvisioner(**options))


def test_without_options_there_is_no_network():
    assert wish() == NetworkWish() == NetworkWish(mode=Network.NONE)


def test_a_kernel_json_of_none_ignores_what_a_configuration_says_of_networks():
    config = Config({"SandboxProvisioner": {
        "network": "gateway", "network_allow": ["packages"], "network_quota": "5G",
        "network_rate": "20M", "network_audit": True,
    }})  # fmt: skip

    def of_kernel_json(**options) -> NetworkWish:
        stanza = {"provisioner_name": "sandbox-provisioner", "config": options}
        spec = KernelSpec(display_name="boxed", metadata={"kernel_provisioner": stanza})
        provisioner = SandboxProvisioner(kernel_spec=spec, config=config, **options)
        return provisioner.spec_for("/srv").network

    assert of_kernel_json().mode is Network.GATEWAY
    assert of_kernel_json(network="none") == NetworkWish()
    assert of_kernel_json(network="none", network_allow=[]) == NetworkWish()
    with pytest.raises(SpecError, match="use network_rate"):
        of_kernel_json(network="none", network_allow=[], network_rate="1M")
    assert wish(network="gateway").allow == ()


def test_nobody_can_ask_for_the_machines_own_network():
    with pytest.raises(Exception, match=r"(?s)network.*\"none\" or \"gateway\" or \"card\""):
        SandboxProvisioner(network="host")


@pytest.mark.parametrize("mode", ["gateway", "card"])
@pytest.mark.parametrize(
    "options",
    [
        {"network_allow": ["a.example"]}, {"network_deny": ["a.example"]},
        {"network_rate": "1M"}, {"network_rate": {"down": "1M"}}, {"network_quota": "1G"},
        {"network_connections": 5}, {"network_audit": True},
    ],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_what_is_said_of_a_network_needs_one(mode, options):
    name = next(iter(options))
    with pytest.raises(SpecError, match=rf'use {name}: network = "none".*network = "gateway"'):
        wish(**options)
    if (mode, name) == ("card", "network_audit"):
        with pytest.raises(SpecError, match=r'no names.*network = "gateway"'):
            wish(network=mode, **options)
        return
    assert wish(network=mode, **options).mode is Network(mode)


@pytest.mark.parametrize(
    ("rate", "up", "down"),
    [
        (None, 0, 0), ("10M", 10**7, 10**7), (64_000, 64_000, 64_000),
        ({"up": "2M", "down": "20M"}, 2 * 10**6, 2 * 10**7), ({"up": 9000}, 9000, 0),
        ("up=2M,down=1.5G", 2 * 10**6, 15 * 10**8), ("down=8K", 0, 8000),
    ],
)  # fmt: skip
def test_rates_are_bits_a_second_in_powers_of_a_thousand(rate, up, down):
    found = wish(network="gateway", network_rate=rate)
    assert (found.up_bits, found.down_bits) == (up, down)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"network_rate": "10 M"}, "network_rate.*not a rate"),
        ({"network_rate": "10Mbit"}, "network_rate.*not a rate"),
        ({"network_rate": True}, "network_rate"),
        ({"network_rate": -1}, "network_rate.*not a rate"),
        ({"network_rate": "7K"}, "network_rate.*too small.*8K"),
        ({"network_rate": {"upp": "1M"}}, "network_rate.*'upp'.*'up'"),
        ({"network_rate": "sideways=1M"}, "network_rate.*'sideways'.*up=2M,down=20M"),
        ({"network_rate": {"up": None}}, "network_rate.*not a rate"),
        ({"network_quota": "1GB"}, "network_quota.*not a size"),
        ({"network_quota": 10}, "network_quota.*too small"),
        ({"network_connections": 0}, "network_connections.*too small"),
        ({"network_connections": -1}, "network_connections.*not a number"),
        ({"network_connections": {"at_once": "many"}}, "network_connections.*not a number"),
        ({"network_connections": {"new_per_second": 0}}, "network_connections.*too small"),
        ({"network_connections": {"at_one": 1}}, "network_connections.*at_once"),
        ({"network_allow": ["a.example", "a b"]}, "network_allow, rule 2"),
        ({"network_deny": ["a.example", "*"]}, "network_deny, rule 2"),
        ({"network_deny": ["packages"]}, "network_deny, rule 1.*only allows"),
        ({"network_deny": ["all"]}, "network_deny, rule 1.*nothing would be left"),
        ({"network_allow": ["a.example"] * 1001}, "network_allow.*1001 rules"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_meant_is_one_error_that_names_the_option(options, told):
    with pytest.raises(Exception, match=told) as caught:
        wish(network="gateway", **options)
    assert isinstance(caught.value, SpecError)


def test_connections_are_a_number_or_both_numbers():
    def found(value) -> tuple[int, int]:
        made = wish(network="gateway", network_connections=value)
        return made.connections, made.new_per_second

    assert found(None) == (512, 100)
    assert found(20) == (20, 100)
    assert found({"new_per_second": 7}) == (512, 7)
    assert found("at_once=3,new_per_second=4") == (3, 4)


@pytest.mark.parametrize("network", ["10.0.0.0/8", "127.0.0.0/8", "fc00::/7", "169.254.0.0/16"])
def test_the_edges_of_a_special_block_are_its_own(network):
    block = ip_network(network)
    assert special_of(block[0]) is not None
    assert special_of(block[-1]) is not None
