"""The benchmarks' arithmetic and tables."""

from __future__ import annotations

import random
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import common, files, network_starts, overhead, soak, start, steps, work

numbers = st.floats(min_value=0.001, max_value=1e6)


def test_a_spread_names_the_middle_and_both_tenths() -> None:
    found = common.spread([float(value) for value in range(11)])
    assert found == common.Spread(count=11, low=1, median=5, high=9)


def test_no_samples_have_no_spread_and_show_as_a_dash() -> None:
    assert common.spread([]) is None
    assert common.format_spread(None) == "-"
    assert common.paired_ratio([], []) is None
    assert common.format_ratio(None) == "-"


@given(st.lists(numbers, min_size=1))
def test_a_spread_lies_within_its_samples_in_order(samples: list[float]) -> None:
    found = common.spread(samples)
    assert found
    tolerance = max(samples) * 1e-9
    assert min(samples) - tolerance <= found.low <= found.median + tolerance
    assert found.median - tolerance <= found.high <= max(samples) + tolerance


@given(st.lists(numbers, min_size=1), numbers)
def test_one_sample_is_every_quantile_of_itself(samples: list[float], value: float) -> None:
    assert common.quantile([value], 0.1) == common.quantile([value], 0.9) == value
    assert common.quantile(samples, 0) == min(samples)
    assert common.quantile(samples, 1) == max(samples)


def test_the_interval_of_a_median_holds_it_nineteen_times_of_twenty() -> None:
    assert common.median_interval([3, 1, 2]) == (1, 3)
    assert common.median_interval([float(value) for value in range(20)]) == (5, 14)
    chance, rounds = random.Random(1), 500
    found = [common.median_interval([chance.gauss() for _ in range(15)]) for _ in range(rounds)]
    assert 0.94 < sum(low <= 0 <= high for low, high in found) / rounds < 0.99


def test_every_second_round_goes_backwards() -> None:
    turns = [one for counts, one in network_starts.rounds_of(4, "abc", "") if counts]
    rounds = ["".join(turns[begin : begin + 3]) for begin in range(0, 12, 3)]
    assert [rounds[1], rounds[3]] == [rounds[0][::-1], rounds[2][::-1]]


def test_a_ratio_is_taken_pair_by_pair() -> None:
    # The medians alone would say 4: in a slow round both are slow.
    assert common.paired_ratio([2, 200, 20], [1, 100, 5]) == 2


def test_pairs_of_different_length_are_an_error() -> None:
    with pytest.raises(ValueError):
        common.paired_ratio([1, 2], [1])


def test_columns_are_aligned_and_the_heading_is_underlined() -> None:
    rows = [["kernel", "ms"], ["plain", "9"], ["a longer name", "1234"]]
    assert common.format_table(rows).splitlines() == [
        "kernel           ms",
        "-------------  ----",
        "plain             9",
        "a longer name  1234",
    ]


def test_a_spread_is_printed_with_the_digits_asked_for() -> None:
    found = common.Spread(count=3, low=1.26, median=2.0, high=3.999)
    assert common.format_spread(found) == "2 (1-4)"
    assert common.format_spread(found, 1) == "2.0 (1.3-4.0)"
    assert common.format_ratio(1.239) == "x1.24"


def test_the_table_holds_each_variant_against_the_first() -> None:
    samples = [
        start.Sample(variant="plain", reply_ms=100, ready_ms=300, shutdown_ms=10, pss_mib=40),
        start.Sample(variant="boxed", reply_ms=150, ready_ms=300, shutdown_ms=5, pss_mib=50),
    ]
    _, plain, boxed = start.table(samples, ["plain", "boxed"])
    assert plain[:3] == ["plain", "100 (100-100)", "x1.00"]
    assert boxed[:3] == ["boxed", "150 (150-150)", "x1.50"]
    assert boxed[8] == "x0.50"
    assert boxed[9:11] == ["50.0 (50.0-50.0)", "x1.25"]


def test_what_was_left_over_is_summed_by_kind() -> None:
    clean = start.Sample(variant="a", left={"processes": 0, "files": 0})
    dirty = start.Sample(variant="a", left={"processes": 1, "files": 2})
    assert start.format_left([clean, clean]) == "0"
    assert start.format_left([clean, dirty, dirty]) == "2 processes, 4 files"


def test_a_kernel_json_names_our_provisioner_only_where_it_is_asked_for() -> None:
    assert "metadata" not in start.Variant("plain").kernel_json()
    boxed = start.Variant("boxed", config={"mem_limit": "1G"}).kernel_json()
    stanza = boxed["metadata"]["kernel_provisioner"]
    assert stanza["provisioner_name"] == "sandbox-provisioner"
    assert stanza["config"] == {"mem_limit": "1G"}


def test_stamps_become_the_time_since_the_one_before() -> None:
    assert steps.intervals([("call", 0), ("survey", 2_000_000), ("plan", 2_500_000)]) == {
        "survey": 2.0,
        "plan": 0.5,
    }


def test_the_launchers_stamps_are_summed_by_verb_and_add_up() -> None:
    taken = steps.Start(stamps=[("spawn-launcher", 0)])
    ms = 1_000_000
    taken.read(
        f"word {12 * ms};take {14 * ms} {13 * ms};"
        f"take {17 * ms} {15 * ms};pivot {20 * ms} {19 * ms};(end) {21 * ms}"
    )
    rows = steps.inside_intervals(taken)
    assert rows["is forked, waits for the plan"] == 12
    assert rows["take x2"] == 3
    assert rows["pivot x1"] == 1
    assert rows["decoding, calls, forks"] == 5
    assert sum(rows.values()) == 21


def test_work_is_held_against_the_first_kernel_round_by_round() -> None:
    samples = {
        ("getppid", "plain"): [0.2, 0.4],
        ("getppid", "boxed"): [0.3, 0.6],
        ("thread", "plain"): [60.0, 60.0],
        ("thread", "boxed"): [60.0, 60.0],
    }
    assert overhead.table(samples, ["plain", "boxed"]) == [
        ["work", "plain us", "boxed", ""],
        ["getppid", "0.300 (0.220-0.380)", "0.450 (0.330-0.570)", "x1.50"],
        ["thread", "60 (60-60)", "60 (60-60)", "x1.00"],
    ]


@pytest.mark.parametrize("name", work.WORK)
def test_each_piece_of_work_can_be_done(name: str) -> None:
    work.WORK[name][0](1)


def test_what_a_soak_has_seen_is_told_and_drawn_without_its_first_tenth() -> None:
    looks = [(n, dict.fromkeys(soak.MEASURES, 99.0 if n == 1 else 5.0)) for n in range(1, 21)]
    assert soak.table(looks)[1] == ["descriptors", "5", "5", "5", "5"]
    root = ElementTree.fromstring(soak.svg(looks))
    assert len(root.findall("{http://www.w3.org/2000/svg}polyline")) == len(soak.MEASURES)


def test_a_place_is_held_against_the_first_one_of_its_round() -> None:
    samples = [
        files.Sample(what, place, ms)
        for what, place, ms in (
            ("install", "layer", 20.0), ("install", "bare disk", 10.0), ("start", "host", 1.0),
            ("install", "bare disk", 1.0), ("install", "layer", 3.0),
        )
    ]  # fmt: skip
    assert files._table(samples, "install")[1:] == [
        ["bare disk", "6 (2-9)", "x1.00"], ["layer", "12 (5-18)", "x2.50"],
    ]  # fmt: skip
