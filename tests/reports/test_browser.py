"""The written page in headless Chromium: silent, asking for nothing, light and dark, printable, on a phone.

Each test opens two pages, that of a study made for tests and that of the reference records. The page's own policy
forbids every request, so that one which it tried would be an error on the console.
"""

import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from ablations.study import Study
from reports.build import build, write

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--enable-logging=stderr",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--window-size=1000,1200",
)
BRIGHT, DIM = 0.75, 0.35  # mean brightness of black text on white paper, and of the reverse

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")


@pytest.fixture(params=["coin", "reference"])
def page(request: pytest.FixtureRequest, coin: Study, run: Callable[..., Path], tmp_path: Path) -> Path:
    """A page of its own, which the test may change."""
    if request.param == "reference":
        folder, _ = request.getfixturevalue("reference")
        return Path(shutil.copy(folder / "index.html", tmp_path))
    out = run("full", failing="bent")
    write(out, build(out, [coin]).files)
    return out / "index.html"


def chromium(page: Path, *flags: str) -> tuple[str, list[str]]:
    """What the browser printed on the page, and its console's messages."""
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={page.parent / 'browser'}", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


class Tree(HTMLParser):
    """The tags of a page with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_loads_whole_in_silence(page: Path) -> None:
    dom, console = chromium(page, "--dump-dom")
    assert console == []
    ids = {attributes.get("id") for _, attributes in Tree(dom).tags}
    pictures = [attributes for tag, attributes in Tree(dom).tags if tag == "svg"]
    assert len(pictures) == sum(tag == "figure" for tag, _ in Tree(page.read_text()).tags) >= 3
    for attributes in pictures:
        assert attributes["aria-describedby"] in ids
        assert attributes.get("aria-details", attributes["aria-describedby"]) in ids
    targets = {(attributes["href"] or "")[1:] for _, attributes in Tree(dom).tags if attributes.get("class") == "ref"}
    assert targets
    assert targets <= ids


def test_a_request_would_be_seen(page: Path) -> None:
    text = page.read_text()
    assert "default-src 'none'" in text
    page.write_text(text.replace("<main>", '<main><img src="http://nowhere.example/x.png">'))
    _, console = chromium(page, "--dump-dom")
    assert any("nowhere.example" in line for line in console)


def test_dark_pages_are_dark_and_light_ones_light(page: Path) -> None:
    mean = {}
    for scheme, number in (("dark", 0), ("light", 1)):
        shot = page.with_name(f"{scheme}.png")
        _, console = chromium(page, f"--screenshot={shot}", f"--blink-settings=preferredColorScheme={number}")
        assert console == []
        mean[scheme] = float(np.mean(imread(shot)[..., :3]))
    assert mean["light"] > BRIGHT
    assert mean["dark"] < DIM


def test_it_prints_page_by_page_with_its_tables_open(page: Path) -> None:
    def pages(text: str) -> int:
        page.write_text(text)
        printed = page.with_name("page.pdf")
        chromium(page, f"--print-to-pdf={printed}", "--no-pdf-header-footer")
        return len(re.findall(rb"/Type\s*/Page\b", printed.read_bytes()))

    text = page.read_text()
    long = "".join(f"<p>line {at}</p>" for at in range(300))  # three pages, were it shown
    sections = text.count("<section ")  # each begins a page
    assert pages(text) >= sections >= 5
    assert pages(text.replace("</details></figure>", f"{long}</details></figure>", 1)) >= pages(text) + 2


@pytest.mark.parametrize("width", [390, 1000])  # Chromium's windows have at least 500, which is a phone's here too
def test_nothing_is_wider_than_the_window_but_what_scrolls_by_itself(page: Path, width: int) -> None:
    said = "document.body.dataset.widths = `${document.documentElement.scrollWidth} ${innerWidth}`"
    policy = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
    page.write_text(policy.sub("", page.read_text()).replace("</body>", f"<script>{said}</script></body>"))
    dom, _ = chromium(page, f"--window-size={width},1200", "--dump-dom")
    (widths,) = (attributes["data-widths"] for tag, attributes in Tree(dom).tags if tag == "body")
    needed, there = map(int, (widths or "").split())
    assert needed <= there
