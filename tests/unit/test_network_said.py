"""What people and programs are told of a kernel's network, from counts that are made up."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_listing import sandbox, text_of

from sandbox_provisioner.app import network
from sandbox_provisioner.contract import Labels
from sandbox_provisioner.ends import End
from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.facilities.network.facts.own_addresses import hub_addresses, own_addresses
from sandbox_provisioner.facilities.network.tell.counts import OfName, Traffic, Writer
from sandbox_provisioner.facilities.network.tell.notices import Refusals
from sandbox_provisioner.facilities.network.tell.said import as_rules, most_used, summary
from sandbox_provisioner.facilities.network.wish.rules import Rules, parse
from sandbox_provisioner.records import Record, RecordFolder
from sandbox_provisioner.story import ExitStory
from sandbox_provisioner.told import EndKind, Subject

MIB = 1 << 20
NAMES = {
    "data.example.org:443": OfName(up_bytes=MIB, down_bytes=42 * MIB, connections=16),
    "example.org": OfName(refusals=2),
    "example.net:25": OfName(refusals=1, connections=1),
}
SOME = Traffic(up_bytes=MIB, down_bytes=42 * MIB, connections=17, refusals=3, names=NAMES)
KERNEL = Subject(name="134530eb", memory_limit_bytes=0)
FIB_TRIE = """Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 0.0.0.0
        /0 universe UNICAST
     +-- 192.0.2.0/30 2 0 2
        |-- 192.0.2.0
           /24 link UNICAST
        |-- 192.0.2.2
           /32 host LOCAL
     |-- 192.0.2.255
        /32 link BROADCAST
Local:
        |-- 10.9.8.7
           /24 link UNICAST
           /32 host LOCAL
"""


def test_a_line_for_the_log_has_the_sums_and_who_was_refused() -> None:
    assert summary(SOME) == (
        "42 MiB down, 1 MiB up, 17 connections, 3 refused: example.org (2), example.net:25 (1)"
    )
    assert summary(Traffic(connections=1, quota_used_up=True)) == (
        "0 bytes down, 0 bytes up, 1 connection, the quota is used up"
    )


def test_a_line_names_a_few_of_many() -> None:
    many = {f"n{number}.example": OfName(refusals=1) for number in range(20)}
    assert summary(Traffic(refusals=20, names=many)).endswith("n12.example (1), 15 more")


def test_what_is_pasted_allows_what_was_wanted() -> None:
    rules = Rules.read(as_rules(NAMES))
    for name in NAMES:
        assert rules.judge_name(name.partition(":")[0]).allowed
        assert parse(name, "here").text == name


def test_addresses_are_pasted_as_they_are_judged() -> None:
    wanted = {"192.0.2.7:25": "192.0.2.7", "[2001:db8::7]:443": "2001:db8::7",
              "[::ffff:10.1.2.3]:80": "::ffff:10.1.2.3"}  # fmt: skip
    assert as_rules(wanted) == ["10.1.2.3:80", "192.0.2.7:25", "[2001:db8::7]:443"]
    rules = Rules.read(as_rules(wanted))
    for label, address in wanted.items():
        assert rules.judge(None, address, int(label.rpartition(":")[2])).allowed


# What a kernel can ask a name server for, and what each may come to.
PLANTED = {
    "all": ["all."], "all:443": ["all.:443"], "packages": ["packages."], "package": ["package."],
    "(others)": [], "*.com": [], "*.com:443": [], "10.0.0.0/8": [], "10.1.2.3": [], "": [], ":": [],
    "[::/0]:443": [], "0x7f.1": [], "all from packages": [], "a,b": [], "a.example:443,80": [],
    "a.example:0": [], "a.example:\u0663": ["a.example:3"], "a.example:" + "9" * 5000: [],
}  # fmt: skip


@pytest.mark.parametrize("refusals", [0, 1])
@pytest.mark.parametrize("planted", PLANTED)
def test_no_name_that_a_kernel_makes_up_is_pasted_as_another_rule(
    planted: str, refusals: int
) -> None:
    names = NAMES | {planted: OfName(refusals=refusals)}
    told = network.as_json(sandbox("a"), Traffic(names=names))
    lists = told["network_allow"], told["network_refused"]
    assert {*lists[not refusals]} <= {*as_rules(NAMES)}
    found = [*lists[refusals]]
    assert [rule for rule in found if rule not in NAMES] == PLANTED[planted]
    read = Rules.read(found)
    assert all(rule.name and not (rule.below or rule.everything or rule.preset)
               for rule in read.allow)  # fmt: skip
    assert f"network_allow = {json.dumps(told['network_allow'])}" in network.as_text(
        sandbox("a"), Traffic(names=names)
    )


def test_an_end_holds_a_bounded_number_of_names() -> None:
    many = {f"n{number}.example": OfName(up_bytes=number) for number in range(3000)}
    many |= {f"r{number}.example": OfName(refusals=1 + number) for number in range(500)}
    found = most_used(Traffic(names=many))
    assert len(found) <= 200
    assert {"n2999.example", "r499.example"} <= found.keys()
    story = ExitStory(kind=EndKind.EXIT, code=0, network=Traffic(refusals=4, names=many))
    told = End.of(story, Labels(), cell="", seconds=0.0).as_json()
    assert told["network"]["refusals"] == 4
    assert len(json.dumps(told)) < 50_000


def test_refusals_are_told_once_for_each_name_and_not_for_ever() -> None:
    heard = Refusals()
    assert heard.new(SOME, KERNEL) == ["Kernel 134530eb was refused example.org, example.net:25."]
    assert heard.new(SOME, KERNEL) == []
    more = {"example.org": OfName(refusals=9), "b\x1b.example": OfName(refusals=1)}
    (told,) = heard.new(Traffic(refusals=10, names=more), KERNEL)
    assert told.startswith("Kernel 134530eb was refused b")
    assert "\x1b" not in told
    many = {f"n{number}.example": OfName(refusals=1) for number in range(2000)}
    (told,) = heard.new(Traffic(refusals=2000, names=many), KERNEL)
    assert told.count("example") == 47
    assert heard.new(Traffic(refusals=2001, names=many), KERNEL) == []


def test_a_refusal_is_told_though_its_name_is_written_later_than_its_number() -> None:
    heard = Refusals()
    assert heard.new(Traffic(refusals=3), KERNEL) == []
    assert heard.new(SOME, KERNEL) == ["Kernel 134530eb was refused example.org, example.net:25."]


def test_a_used_up_quota_is_told_once() -> None:
    heard = Refusals()
    (told,) = heard.new(Traffic(quota_used_up=True), KERNEL)
    assert "network_quota" in told
    assert heard.new(Traffic(quota_used_up=True), KERNEL) == []


def test_a_list_has_columns_of_networks_only_where_there_is_one() -> None:
    plain, other = sandbox("a"), sandbox("b", traffic=SOME)
    assert "down" not in text_of(plain)
    head, without, row = text_of(plain, other).splitlines()
    assert head.split()[-4:-1] == ["down", "up", "refused"]
    assert row.split()[-6:-1] == ["42", "MiB", "1", "MiB", "3"]
    assert "MiB" not in without.split("128 MiB")[1]


def test_programs_get_the_sums_of_a_list_too() -> None:
    told = sandbox("a", traffic=SOME).as_json()
    assert (told["network_down_bytes"], told["network_refusals"]) == (42 * MIB, 3)
    assert sandbox("a").as_json()["network_down_bytes"] is None


def test_the_command_shows_all_names_and_what_would_allow_them() -> None:
    text = network.as_text(sandbox("a", traffic=SOME), SOME)
    lines = text.splitlines()
    assert lines[0].startswith("Kernel id-a: 42 MiB down")
    assert lines[4].split() == ["data.example.org:443", "16", "42", "MiB", "1", "MiB"]
    assert 'network_allow = ["data.example.org:443"]' in lines
    assert lines[-1] == '"example.net:25", "example.org"'


def test_the_page_tells_of_every_field_that_the_command_prints() -> None:
    page = (Path(__file__).parents[2] / "docs/network.md").read_text().partition("## What went")[2]
    for field in network.as_json(sandbox("a"), SOME):
        assert f"`{field}`" in page, field


@pytest.mark.parametrize("word", ["id-a", "analysis.ipynb", "/srv/analysis.ipynb"])
def test_a_kernel_is_meant_by_its_id_or_notebook(word: str) -> None:
    found = [sandbox("a", notebook="/srv/analysis.ipynb"), sandbox("b")]
    assert network.find_sandbox(word, found).record.name == "a"


@pytest.mark.parametrize(
    ("word", "answer"), [("id-", "one of 2"), ("", "no such"), ("x", "no such")]
)
def test_who_is_not_meant_is_told_who_there_is(word: str, answer: str) -> None:
    with pytest.raises(SpecError, match="id-a, id-b") as caught:
        network.find_sandbox(word, [sandbox("a"), sandbox("b")])
    assert answer in caught.value.answer


def test_an_id_that_another_users_record_copies_is_ours() -> None:
    ours, copied = sandbox("a", notebook="/srv/a.ipynb"), sandbox("a", notebook="/srv/a.ipynb")
    theirs, others = replace(copied, owner=1001), replace(copied, owner=1002)
    assert network.find_sandbox("id-a", [theirs, ours, others]) is ours
    for word, found in (("a.ipynb", [ours, theirs]), ("id-a", [others, theirs])):
        with pytest.raises(SpecError, match=r"id-a \(of uid 1001\)"):
            network.find_sandbox(word, found)


def test_a_kernel_without_a_network_is_told_how_to_have_one() -> None:
    with pytest.raises(SpecError, match="--network gateway"):
        network.traffic_of(sandbox("a"))


# -- files


def folder_of(tmp_path: Path) -> RecordFolder:
    return RecordFolder.create(tmp_path, Record(sandbox_id="abc"), ids=False)[0]


def test_counts_are_in_the_folder_of_the_record_for_nobody_else(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    try:
        assert folder.read_counts() is None
        with open(folder.make_counts(), "wb", buffering=0) as file:

            def write(text: bytes, position: int) -> Any:
                file.seek(position)
                file.write(text)

            assert folder.read_counts() == Traffic()
            Writer(write).all(SOME)
        assert folder.counts_file.stat().st_mode & 0o777 == 0o600
        assert folder.read_counts() == SOME
    finally:
        folder.remove()


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    try:
        os.mkfifo(folder.counts_file)
        assert folder.read_counts() is None
    finally:
        folder.remove()


def test_this_machines_addresses_are_those_that_it_answers_to(tmp_path: Path) -> None:
    (tmp_path / "fib_trie").write_text(FIB_TRIE)
    (tmp_path / "if_inet6").write_text(
        "fd000000000000000000000000000002 04 40 00 82     eth0\n"
        "fe800000000000000000000000000001 04 40 20 80     eth0\n"
    )
    found = own_addresses(tmp_path / "fib_trie", tmp_path / "if_inet6")
    assert found == ["10.9.8.7", "192.0.2.2", "fd00::2"]
    assert own_addresses(tmp_path / "none", tmp_path / "none") == []
    assert not {"127.0.0.1", "::1"} & {*own_addresses()}


@pytest.mark.parametrize(
    ("url", "addresses"),
    [
        ("http://127.0.0.1:8081/hub/api", ["127.0.0.1"]),
        ("https://[2001:db8::7]/hub/api", ["2001:db8::7"]),
        ("http://localhost:8081/hub/api", ["127.0.0.1"]),
        ("http://hub.invalid:8081/hub/api", []),
        ("http://[", []),
        ("", []),
    ],
)
def test_the_hub_is_known_by_what_it_tells_its_servers(url: str, addresses: list[str]) -> None:
    told: list[str] = []
    found = hub_addresses({"JUPYTERHUB_API_URL": url}, told.append)
    assert {*addresses} <= {*found}
    assert bool(addresses) == bool(found)
    assert bool(told) == bool(url and not found)
