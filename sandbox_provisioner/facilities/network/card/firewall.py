"""firewall.py - in the launching process, reads only: whether another firewall stands in the way.

What one table accepts another one may still drop: ours cannot let pass what somebody else's does
not. Chains of nf_tables are seen here, those of iptables-nft among them; of what is only a rule at
the end of a chain, and of the older iptables, nothing is.
"""

from __future__ import annotations

from sandbox_provisioner.errors import COMMAND, HostError
from sandbox_provisioner.facilities.network.card import netlink, nft, ruleset
from sandbox_provisioner.facilities.network.plan.netlink import attributes

_FAMILIES = {1: "inet", 2: "ip"}
# NFTA_CHAIN_*, NFTA_HOOK_HOOKNUM, NFTA_RULE_TABLE
_TABLE, _NAME, _HOOK, _POLICY, _NUMBER, _OF_TABLE = 1, 3, 4, 5, 1, 1
_FORWARD = 2


def refuse_one_that_drops() -> None:
    """HostError where a chain drops all that is forwarded and no rule of it, and none of its table,
    names our interfaces."""
    for family, chain in netlink.read_all(nft.GET_CHAIN):
        table = chain[_TABLE]
        stands = family in _FAMILIES and _drops_what_is_forwarded(chain)
        if stands and not _names_ours(family, table):
            raise _dropped(f"{_FAMILIES[family]} {_text(table)}", _text(chain[_NAME]))


def _names_ours(family: int, table: bytes) -> bool:
    ours = ruleset.INTERFACE.encode()
    rules = (rule for of, rule in netlink.read_all(nft.GET_RULE) if of == family)
    return any(ours in part for rule in rules if rule[_OF_TABLE] == table for part in rule.values())


def _drops_what_is_forwarded(chain: dict[int, bytes]) -> bool:
    hook = attributes(chain.get(_HOOK, b""))
    number, policy = hook.get(_NUMBER, b""), chain.get(_POLICY, b"")
    is_drop = int.from_bytes(policy, "big") == nft.DROP
    return bool(number and policy) and int.from_bytes(number, "big") == _FORWARD and is_drop


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")


def _dropped(table: str, chain: str) -> HostError:
    rule = f"{COMMAND}nft insert rule {table} {chain}"
    return HostError(
        attempt="give a kernel a network card",
        answer=f"the firewall of this host drops what is forwarded (table {table}, chain {chain})",
        remedy=(
            "Let it accept what cards send and receive; who may speak with whom is judged all the "
            "same:",
            f"{rule} iifname '{ruleset.INTERFACE}*' accept",
            f"{rule} oifname '{ruleset.INTERFACE}*' accept",
            "Where Docker is the reason, put them into its chain DOCKER-USER. Or set network = "
            '"gateway".',
        ),
    )
