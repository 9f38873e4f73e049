"""A page in a real browser, and everything that it should not have done."""

import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
STATES = "[...document.querySelectorAll('[data-chart]')].map(box => box.dataset.state)"
BUTTONS = "[...document.querySelectorAll('.modebar-btn')].map(button => button.dataset.title)"
OWN_BUTTONS = {
    *("Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes", "Show everything", "Toggle Spike Lines"),
    *("Orbital rotation", "Turntable rotation", "Reset camera to default", "Reset camera to last save"),
}
WITHOUT = [
    pytest.mark.skipif(not CHROMIUM.exists(), reason="no Chromium at /usr/bin/chromium"),
    pytest.mark.slow,
]
"""What a module of browser tests is marked with."""


class Watched:
    """A page, and everything that it should not have done."""

    def __init__(self, page):
        self.page = page
        self.faults = []
        self.allowed = set()
        page.on("dialog", self._dialog)
        page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        page.on("console", self._console)
        page.route("**/*", self._request)

    def _dialog(self, dialog):
        self.faults.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _console(self, message):
        if message.type == "error" and not any(word in message.text for word in self.allowed):
            self.faults.append(f"console: {message.text}")

    def _request(self, route):
        parts = urlsplit(route.request.url)
        if parts.scheme in ("file", "data", "blob") or parts.hostname == "127.0.0.1":
            route.continue_()
        else:
            self.faults.append(f"request: {route.request.url}")
            route.abort()

    def until(self, expression, wanted):
        """Polls from outside: a poll inside would need eval, which the pages' policy forbids."""
        for _ in range(150):
            found = self.page.evaluate(expression)
            if wanted(found):
                return found
            time.sleep(0.1)
        raise AssertionError(f"{expression} stayed {found!r}; {self.faults}")

    def drawn(self, pictures):
        states = self.until(STATES, lambda found: found and "waiting" not in found)
        assert states == ["drawn"] * pictures
        # Plotly says in the picture that it could not draw it, and takes it for drawn.
        assert self.page.locator(".no-webgl").count() == 0
        offered = set(self.page.evaluate(BUTTONS))
        assert offered <= OWN_BUTTONS, "nothing may offer to send a picture away"
