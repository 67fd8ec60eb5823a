"""``python -m tests.readme`` writes README's table of options; a unit test compares it."""

from __future__ import annotations

import re
from pathlib import Path

from traitlets import TraitType

from sandbox_provisioner.options import every_option

README = Path(__file__).parent.parent / "README.md"
HEAD = "| option | default | meaning |\n|---|---|---|\n"


def table() -> str:
    """The table, as it has to stand in README.md."""
    rows = (
        f"| `{name}` | {_default(trait)} | {_meaning(trait)} |\n"
        for name, trait in every_option().items()
    )
    return HEAD + "".join(rows)


def _default(trait: TraitType) -> str:
    if shown := trait.metadata.get("default"):
        return shown
    value = trait.default()
    if isinstance(value, str) and value:
        return f'`"{value}"`'
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, int | float) else "none"


def _meaning(trait: TraitType) -> str:
    if text := trait.metadata.get("readme"):
        return text
    text = re.sub(r'"[^"]*"', r"`\g<0>`", str(trait.help))
    names = "|".join(name for name in every_option() if "_" in name)
    text = re.sub(rf"\b({names})\b", r"`\1`", text)
    text = re.sub(r"\b(SECURITY|docs/\w+)\.md", r"[\g<0>](\g<0>)", text)
    return text.replace("|", r"\|")


def written(readme: str) -> str:
    """The text of the *readme* with the table as it has to be."""
    before, _, after = readme.partition(HEAD)
    return before + table() + re.sub(r"\A(\|.*\n)*", "", after)


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
