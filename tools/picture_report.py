"""Take the two pictures of the documentation of a report's page, with Chromium: `python tools/picture_report.py runs/demo/report.html`."""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

STATIC = Path(__file__).resolve().parent.parent / "docs" / "static"
LOOKS = {"report.png": (1280, 900), "report-phone.png": (360, 740)}
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

if __name__ == "__main__":
    [page] = map(Path, sys.argv[1:])
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, headless=True, args=ARGUMENTS)
        for name, (width, height) in LOOKS.items():
            shown = browser.new_page(viewport={"width": width, "height": height}, color_scheme="light")
            shown.goto(page.resolve().as_uri())
            shown.wait_for_selector("html[data-ready]", state="attached")
            shown.screenshot(path=STATIC / name)
            print(STATIC / name, f"{(STATIC / name).stat().st_size:,} bytes")
        browser.close()
