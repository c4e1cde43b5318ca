"""Pages in a headless Chromium, each in frames as wide as a screen and as a phone; what a script finds in them.

A window of Chromium is never narrower than about 500 pixels; a frame may be, and media queries see its width.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1300,1000",
)  # fmt: skip
SCHEMES = {"light": [], "dark": ["--blink-settings=preferredColorScheme=0"]}
WIDTHS = {"wide": 1200, "phone": 390}
LISTEN = (
    "<script>window.errors = [];"
    "addEventListener('error', (e) => errors.push(String(e.message || e.target.src)), true);"
    "for (const name of ['error', 'warn']) console[name] = (...all) => errors.push(all.join(' '));</script>"
)


def found_in(pages: Mapping[str, str], directory: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """By page, width and scheme what `look.js` finds. Two starts of the browser for all of them."""
    frames = [
        f'<iframe name="{name} {size}" style="width:{width}px;height:900px;border:0" '
        f'srcdoc="{html.escape(text.replace("<head>", "<head>" + LISTEN, 1))}"></iframe>'
        for name, text in pages.items()
        for size, width in WIDTHS.items()
    ]
    script = (Path(__file__).parent / "look.js").read_text(encoding="utf-8")
    # A frame has the scheme of the page around it: it must take both.
    head = "<meta charset='utf-8'><style>:root{color-scheme:light dark}</style>"
    around = directory / "around.html"
    around.write_text(
        f"<!doctype html><html><head>{head}<script>{script}</script></head><body><pre id='found'></pre>"
        f"{''.join(frames)}</body></html>",
        encoding="utf-8",
    )
    return {
        (*name.split(), scheme): found
        for scheme, flags in SCHEMES.items()
        for name, found in _dumped(around, flags, directory / f"profile-{scheme}").items()
    }


def _dumped(page: Path, flags: list[str], profile: Path) -> dict[str, dict[str, Any]]:
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", *flags, "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    written = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert written and written[1], done.stderr[-2000:]
    found: dict[str, dict[str, Any]] = json.loads(html.unescape(written[1]))
    return found
