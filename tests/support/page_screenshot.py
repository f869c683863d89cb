"""The README's picture of the page, from a running server.

llmcad-mlx serve &
python -m tests.support.page_screenshot URL docs/page.png [dark|light] [desktop|ipad|phone] [QUESTION]
"""

from __future__ import annotations

import sys
from typing import Any

from playwright.sync_api import sync_playwright

from tests.serve.test_page import CHROMIUM, IPAD

SCREENS: dict[str, dict[str, Any]] = {
    "desktop": {"viewport": {"width": 1280, "height": 800}, "device_scale_factor": 1.5},
    "ipad": IPAD,
    "phone": {**IPAD, "viewport": {"width": 390, "height": 844}},
}


def main(url: str, file: str, scheme: Any = "light", screen: str = "desktop", question: str = "") -> None:
    """Ask a question, wait for the answer, look at the round with the most accepted tokens, take the picture."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(color_scheme=scheme, **SCREENS[screen])
        page.goto(url)
        if question:
            page.get_by_label("Message").fill(question)
            page.get_by_label("Message").press("Enter")
            page.locator('.answer[aria-busy="false"]').wait_for(timeout=300_000)
            rounds = page.get_by_label("Round", exact=True)

            def accepted(number: int) -> int:
                rounds.fill(str(number))
                return page.locator(".tree-node.accepted").count()

            rounds.fill(str(max(range(1, 1 + int(rounds.get_attribute("max") or 1)), key=accepted)))
            page.get_by_label("Message").focus()
        page.screenshot(path=file)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
