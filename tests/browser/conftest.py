"""The fixtures of the tests in a browser."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from desk import chromium, new_page
from playwright.sync_api import Browser, Page


@pytest.fixture(scope="module")
def artefacts() -> Path:
    folder = Path(
        os.environ.get("SANDBOX_ARTEFACTS") or tempfile.mkdtemp(prefix="lab-", dir="/tmp")
    )
    folder.mkdir(parents=True, exist_ok=True)
    print(f"pictures are in {folder}")
    return folder


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    yield from chromium()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    yield from new_page(browser)
