"""An error is one line for a log, and lines that fit into a dialog for a person."""

from __future__ import annotations

import subprocess

import pytest
from tornado.web import HTTPError
from traitlets import TraitError

from sandbox_provisioner.errors import (
    COLUMNS,
    HostError,
    LaunchError,
    SpecError,
    did_you_mean,
    in_lines,
    nearest,
)
from sandbox_provisioner.provisioner import OptionRefused, SandboxProvisioner, StartRefused

COMMAND = "  printf '%s|' 'one two  three' " + " ".join(f"word-{n}" for n in range(30))


def widest(text: str) -> int:
    return max(map(len, text.split("\n")))


def output_of(command: str) -> str:
    return subprocess.run(
        ["sh", "-c", command], check=True, capture_output=True, text=True
    ).stdout  # fmt: skip


def test_attempt_answer_and_remedy_begin_a_line_each() -> None:
    error = SpecError(attempt="read x", answer="'2 GB' is not a size", remedy="Write 1G. Or 2G.")
    assert error.for_people() == "Could not read x:\n'2 GB' is not a size.\n\nWrite 1G.\nOr 2G."
    assert str(error) == "Could not read x: '2 GB' is not a size. Write 1G. Or 2G."


def test_no_line_for_a_person_is_wider_than_a_terminal() -> None:
    path = "/" + "x" * 200
    error = LaunchError(
        attempt=f"start {path}",
        answer="word " * 60,
        remedy=("Do this. " * 30, COMMAND),
        step="step",
        stderr_tail="y" * 500 + "\n" + "\t" * 50 + "end",
    )
    assert widest(error.for_people()) <= COLUMNS
    assert "[step]" not in error.for_people()
    assert "[step]" in str(error)
    assert "\n" not in str(HostError(attempt=path, answer=path, remedy=("a", COMMAND)))


def test_a_command_in_lines_is_the_same_command_for_a_shell() -> None:
    lines = in_lines(COMMAND)
    assert widest(lines) <= COLUMNS
    assert len(lines.split("\n")) > 3
    assert output_of(lines) == output_of(COMMAND) != ""


def test_a_name_cannot_make_a_line_of_its_own() -> None:
    error = SpecError(attempt="use 'a\nb'", answer="c\nd", remedy=("e\nf",))
    assert error.for_people().split("\n") == [
        r"Could not use 'a\x0ab':", r"c\x0ad.", "", r"e\x0af"
    ]  # fmt: skip


def test_of_what_a_kernel_wrote_a_person_gets_the_end() -> None:
    tail = "\n".join(f"line {number}" for number in range(100))
    error = LaunchError(attempt="a", answer="b", remedy="c", step="s", stderr_tail=tail)
    shown = error.for_people()
    assert "line 99" in shown and "line 80" not in shown
    assert "line 0\n" in str(error)


def test_the_nearest_name_is_told_and_not_all() -> None:
    assert nearest("mem_limt", ["cpu_limit", "mem_limit"]) == "mem_limit"
    assert did_you_mean("memlimit", ["cpu_limit", "mem_limit"], "x") == "Did you mean 'mem_limit'?"
    assert did_you_mean("colour", ["cpu_limit", "mem_limit"], "See there.") == "See there."


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        (
            "network",
            "nnone",
            ['"none" or "gateway" or "card"', "not 'nnone'", "Did you mean 'none'?"],
        ),
        ("confinement", "x", ['"namespaces" or "landlock"', "SECURITY.md"]),
        ("cpu_limit", "two", ["a number, not 'two'", "in cores: 0.5 is half of one core"]),
        ("spares", -1, ["a whole number, at least 0, not -1"]),
        ("volumes", 3, ["a list of texts, or a dictionary, not 3", "SOURCE:TARGET"]),
        ("on_missing", {"cpu": "wran"}, ['each value "refuse" or "warn"', "wran"]),
        ("network_rate", [1], ["a number, a text or a dictionary, not [1]", '{"up": "2M"']),
        ("mem_limit", [1], ["a number or a text, not [1]", '"512M"']),
    ],
)
def test_a_value_of_a_wrong_type_is_told_in_plain_words(
    name: str, value: object, told: list[str]
) -> None:
    with pytest.raises(OptionRefused) as caught:
        SandboxProvisioner(**{name: value})
    assert isinstance(caught.value, TraitError)  # which callers of traitlets look for
    shown = " ".join(caught.value.log_message.split())
    assert all(text in shown for text in [f"read the option {name}", *told]), shown


def test_a_dialog_shows_no_percent_sign_twice() -> None:
    error = SpecError(attempt="read", answer="'150%' is no share", remedy="At most 100%.")
    refused = StartRefused(error)
    # What jupyter_server makes of it.
    for shown in (refused, HTTPError(500, str(refused))):
        assert shown.log_message == (
            "Could not read:\n'150 percent' is no share.\n\nAt most 100 percent."
        )
    assert refused.get_message() == str(error)
