"""A picture as it stands in a page: an SVG within the HTML, in few bytes, that takes the page's colours, light or dark.

no prolog, metadata or outside names; ids of its own, and none that nothing refers to
coordinates to hundredths of a point, lines along an axis by one number
neighbouring cells of a map that have one colour as one
ink and greys as shares of the page's ink on its paper
"""

import re
from html import escape

from reports.figures import CLAIMED, INK

_LONG = re.compile(r"-?\b\d+\.\d{3,}\b")
_CELL = re.compile(r'<path d="M (\S+) (\S+) L (\S+) \2 L \3 (\S+) L \1 \4 L \1 \2 ?" style="fill: (#\w+)"/>')
_CELLS = re.compile(rf"(?:{_CELL.pattern})+")
_PATH = re.compile(r' d="([^"]*)"')
_STEP = re.compile(r"([A-Za-z])([^A-Za-z]*)")
_GREY = re.compile(r"#([0-9a-f]{2})\1\1\b")


def inline(svg: bytes, name: str, description: str, *, twin: bool) -> str:
    """The SVG as it stands in a page, described by its caption and, where it has a twin, by that."""
    text = svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = _brief(re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href"))
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = text.replace(INK, "currentColor").replace(CLAIMED, "var(--fails)")
    # Not the white and black of text: it stands on a colour that does not change.
    text = re.sub(r"<(?!text)[^>]*>", lambda tag: _GREY.sub(_inked, tag[0]), text)
    described = f'aria-label="{escape(description)}" aria-describedby="{name}-caption"'
    details = f' aria-details="{name}-table"' if twin else ""
    return text.replace("<svg", f'<svg role="img" {described}{details}', 1)


def _brief(svg: str) -> str:
    """The same picture in fewer bytes."""
    named = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r'\s+id="([^"]*)"', lambda given: given[0] if given[1] in named else "", svg)
    svg = re.sub(r"\s*\n\s*", " ", svg).replace("> <", "><")
    svg = re.sub(r"<[^>]*>", lambda tag: _LONG.sub(lambda digits: f"{float(digits[0]):.2f}", tag[0]), svg)
    return _PATH.sub(_straight, _CELLS.sub(_joined, svg))


def _joined(cells: re.Match[str]) -> str:
    joined: list[list[str]] = []
    for left, low, right, high, fill in _CELL.findall(cells[0]):
        if joined and joined[-1][1:] == [low, left, high, fill]:
            joined[-1][2] = right
        else:
            joined.append([left, low, right, high, fill])
    return "".join(
        f'<path d="M {left} {low} L {right} {low} L {right} {high} L {left} {high} Z" style="fill: {fill}"/>'
        for left, low, right, high, fill in joined
    )


def _straight(path: re.Match[str]) -> str:
    """The path, its lines along an axis said by one number."""
    said, at = "", ["", ""]
    for letter, numbers in _STEP.findall(path[1]):
        to = numbers.split()
        if letter == "L" and at[1] == to[1]:
            said += f"H{to[0]}"
        elif letter == "L" and at[0] == to[0]:
            said += f"V{to[1]}"
        else:
            said += letter + " ".join(to)
        at = to[-2:] or ["", ""]
    return f' d="{said}"'


def _inked(grey: re.Match[str]) -> str:
    """A grey near paper or ink as so much of the page's ink on its paper; one between can be told from both."""
    ink = 1 - int(grey[1], 16) / 255
    if 0.25 < ink < 0.75:
        return grey[0]
    ends = {0.0: "var(--paper)", 1.0: "currentColor"}
    return ends.get(ink, f"color-mix(in srgb, currentColor {ink:.0%}, var(--paper))")
