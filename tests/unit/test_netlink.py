"""The bytes that make a box's network, as somebody else's parser reads them (pyroute2)."""

from __future__ import annotations

import struct
from ipaddress import ip_address

import pytest
from pyroute2.netlink.nfnetlink.nftsocket import nft_chain_msg, nft_rule_msg, nft_table_msg
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from sandbox_provisioner.facilities.network.plan.local import (
    OWN_IPV4,
    OWN_IPV6,
    every_address_is_ours,
)
from sandbox_provisioner.facilities.network.plan.netlink import NETFILTER, ROUTE
from sandbox_provisioner.facilities.network.plan.tables import who_gets_what
from sandbox_provisioner.facilities.network.wish.addresses import SYNTHETIC_IPV6

REQUEST, ACK, CREATE, APPEND = 1, 4, 0x400, 0x800
PARSERS = {
    20: ifaddrmsg, 24: rtmsg, 0xA00: nft_table_msg, 0xA03: nft_chain_msg, 0xA06: nft_rule_msg,
}  # fmt: skip


def parsed(data):
    """Kind, flags and number of each message, and what its attributes are."""
    position = 0
    while position < len(data):
        length, kind, flags, number, _ = struct.unpack_from("=IHHII", data, position)
        whole = None
        if parser := PARSERS.get(kind):
            whole = parser(data[position : position + length])
            whole.decode()
        yield kind, flags, number, whole
        assert length % 4 == 0
        position += length
    assert position == len(data)


@pytest.mark.parametrize("ipv6", [False, True])
def test_every_message_that_is_answered_has_a_name_by_its_number(ipv6):
    for told in (every_address_is_ours(ipv6=ipv6), who_gets_what()):
        numbers = [number for _, flags, number, _ in parsed(told.data) if flags & ACK]
        assert numbers == list(range(1, len(told.names) + 1))
        assert len(set(told.names)) == len(told.names)


def test_one_address_and_one_route_for_each_family():
    told = every_address_is_ours(ipv6=True)
    four, six, *routes = [message for *_, message in parsed(told.data)]
    assert told.protocol == ROUTE
    for message, address in ((four, OWN_IPV4), (six, OWN_IPV6)):
        assert message["index"] == 1
        assert message["prefixlen"] == address.max_prefixlen
        assert ip_address(message.get_attr("IFA_LOCAL")) == address
        assert not address.is_loopback
    for route, source in zip(routes, ("127.0.0.1", "::1"), strict=True):
        assert (route["type"], route["table"], route["dst_len"]) == (2, 255, 0)
        assert route.get_attr("RTA_OIF") == 1
        assert route.get_attr("RTA_PREFSRC") == source
    assert every_address_is_ours(ipv6=False).names == told.names[::2]
    assert OWN_IPV6 not in SYNTHETIC_IPV6


def test_the_table_is_one_transaction():
    (begin, *_), *parts, (end, *_) = parsed(who_gets_what().data)
    assert (begin, end) == (0x10, 0x11)  # NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END
    assert who_gets_what().protocol == NETFILTER
    assert {flags for _, flags, *_ in parts} == {
        REQUEST | ACK | CREATE, REQUEST | ACK | CREATE | APPEND,
    }  # fmt: skip


def in_words(expression):
    """An expression of a rule, without the registers that it goes through."""
    data = expression.get_attr("NFTA_EXPR_DATA")
    match expression.get_attr("NFTA_EXPR_NAME"):
        case "meta":
            return data.get_attr("NFTA_META_KEY").removeprefix("NFT_META_").lower()
        case "payload":
            base = data.get_attr("NFTA_PAYLOAD_BASE").split("_")[2].lower()
            return f"{base}+{data.get_attr('NFTA_PAYLOAD_OFFSET')}"
        case "cmp":
            value = data.get_attr("NFTA_CMP_DATA").get_attr("NFTA_DATA_VALUE")
            assert data.get_attr("NFTA_CMP_OP") == "NFT_CMP_EQ"
            return f"= {value.hex()}"
        case "immediate":
            value = data.get_attr("NFTA_IMMEDIATE_DATA")
            if verdict := value.get_attr("NFTA_DATA_VERDICT"):
                return verdict.get_attr("NFTA_VERDICT_CODE").removeprefix("NF_").lower()
            return value.get_attr("NFTA_DATA_VALUE").hex()
        case name:
            return name


def test_the_rules_are_those_that_their_names_tell():
    messages = [message for kind, *_, message in parsed(who_gets_what().data) if kind >> 8]
    rules = [m for m in messages if isinstance(m, nft_rule_msg)]
    told = {
        (
            rule.get_attr("NFTA_RULE_CHAIN"),
            " ".join(map(in_words, rule.get_attr("NFTA_RULE_EXPRESSIONS"))),
        )
        for rule in rules
    }
    own = {
        "nfproto = 02 network+16 = 7f accept",
        f"nfproto = 02 network+16 = {OWN_IPV4.packed.hex()} accept",
        f"nfproto = 0a network+24 = {ip_address('::1').packed.hex()} accept",
        f"nfproto = 0a network+24 = {OWN_IPV6.packed.hex()} accept",
    }
    assert {rule for chain, rule in told if chain == "catch"} == own | {
        "l4proto = 06 0035 tproxy accept"
    }
    assert {rule for chain, rule in told if chain == "refuse"} == own | {
        "l4proto = 06 accept", "l4proto = 11 transport+2 = 0035 accept", "l4proto = 11 reject",
        "reject",
    }  # fmt: skip
    assert [r.get_attr("NFTA_RULE_CHAIN") for r in rules] == ["catch"] * 5 + ["refuse"] * 8


def test_each_chain_stands_where_it_shall():
    chains = [m for *_, m in parsed(who_gets_what().data) if isinstance(m, nft_chain_msg)]
    found = {}
    for chain in chains:
        hook = chain.get_attr("NFTA_CHAIN_HOOK")
        place = hook.get_attr("NFTA_HOOK_HOOKNUM"), hook.get_attr("NFTA_HOOK_PRIORITY")
        found[chain.get_attr("NFTA_CHAIN_NAME")] = place
    assert found == {"catch": (0, -150), "refuse": (3, 0)}  # prerouting mangle, output filter
