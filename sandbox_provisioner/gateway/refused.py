"""gateway/refused.py - pure, in the gateway: the one error of whatever reads untrusted bytes.

May import: nothing.
"""

from __future__ import annotations


class Refused(Exception):
    """What a program sent is refused: *why* as a clause, for a sentence to the person."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why
