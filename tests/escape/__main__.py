"""``python -m tests.escape > docs/attacks.md``: the table of all attempts, for people."""

from __future__ import annotations

import sys
from pathlib import Path

# As pytest has them: this folder, and that of what all tests share.
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import rooms  # noqa: F401
from frame import VARIANTS, Attempt, Kind, Variant, table

HEAD = """# Attacks

What the tests in `tests/escape` try, each time they run: {count} attempts. This page is made from
the table that they are run from (`python -m tests.escape > docs/attacks.md`). Most run inside a
real kernel, by its own messages; those with a star are made outside: they play what a kernel left
behind, and who comes after it.

- *root* is the answer in a kernel of a server that is root, *user* in one of an ordinary user's;
  both whether started cold, forked from a nursery, or bound as a spare. *landlock* is
  `confinement = "landlock"`, with what it does not hold back. A dash: it is not tried there.
- What leaves its kernel whole and is after the host itself is tried again, with the answers of
  *root*, in the box of a hub user's whole server, and in a kernel through the broker.
- *Without the box* is what the same attempt answers without a sandbox, so that one which cannot
  succeed is noticed. Where that is another error, Linux has looked at the arguments, which are such
  that nothing happens to the machine.
"""


def main() -> None:
    """Print the page."""
    print(HEAD.format(count=len(table)))
    for kind in Kind:
        found = sorted((a for a in table.values() if a.kind is kind), key=lambda a: a.number)
        if not found:
            continue
        print(f"## {kind.value[0].upper()}{kind.value[1:]}\n")
        print("| | what is tried | stands for | root | user | landlock | without the box |")
        print("|---|---|---|---|---|---|---|")
        print("\n".join(row_of(attempt) for attempt in found), end="\n\n")


def row_of(attempt: Attempt) -> str:
    """A line of a table."""
    groups = {variant.group: variant for variant in reversed(VARIANTS)}
    answers = [_text(attempt, groups[name]) for name in ("root", "user", "landlock")]
    control = _or(attempt.control) if attempt.control else f"*{attempt.why_no_control}*"
    number = f"{attempt.number}{'' if attempt.inside else '*'}"
    words = [number, attempt.title, attempt.stands_for, *answers, control]
    return f"| {' | '.join(words)} |"


def _text(attempt: Attempt, variant: Variant) -> str:
    answer = attempt.answer(variant)
    if answer is None:
        return "–"
    older = variant.group == "landlock" and attempt.unscoped
    return _or(answer) + (f", `{older}` before Linux 6.12" if older else "")


def _or(answers: str) -> str:
    return " or ".join(f"`{answer}`" for answer in answers.split("|"))


if __name__ == "__main__":
    main()
