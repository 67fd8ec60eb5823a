"""What the tests in a browser share: Chromium, and a page of it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator

from playwright.sync_api import Browser, Page, expect, sync_playwright

PATIENCE_MS = 60_000
_ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
SETTINGS = {
    "LabApp.news_url": "None",
    "LabApp.extension_manager": "readonly",
    "LanguageServerManager.autodetect": "False",
}


def chromium() -> Iterator[Browser]:
    """The machine's. What a test expects may take as long as an act, on a busy machine."""
    expect.set_options(timeout=PATIENCE_MS)
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=_ARGUMENTS)
        yield browser
        browser.close()


def new_page(browser: Browser) -> Iterator[Page]:
    """A page that talks to this machine alone."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(PATIENCE_MS)
    context.route(re.compile(r"^https?://(?!127\.0\.0\.1)"), lambda route: route.abort())
    yield context.new_page()
    context.close()
