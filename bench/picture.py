"""Draw what compare.py measured: bars on a logarithmic scale, as SVG, for light and dark pages."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from typing import NamedTuple

# Margins: of the names, of the last numbers, of the title, of the scale and the note.
LEFT = 270
RIGHT = 90
TOP = 70
BOTTOM = 58
WIDTH = 860
ROW = 46
BAR = 15
# The ends of the scale.
LEAST_US = 10
MOST_US = 20_000
SCALE_US = (10, 100, 1_000, 10_000)
TITLE = "CPU of the server, lower is better"
NOTE = ("Logarithmic scale. Only the relay makes the receiver prove that it has the key:"
        " two P-384 seals of a rendezvous.")
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.title { font-size: 16px; font-weight: 600 }
.small { font-size: 12px; fill: #59636e }
.check { fill: #0969da } .meet { fill: #bc4c00 }
.ours { font-weight: 600 }
line { stroke: #d1d9e0 }
@media (prefers-color-scheme: dark) {
text { fill: #f0f6fc } .small { fill: #9198a1 } .check { fill: #4493f8 }
.meet { fill: #db6d28 } line { stroke: #3d444d }
}
"""


class Bars(NamedTuple):
    """A server with the CPU of a check and of a rendezvous in microseconds; None is not drawn."""

    title: str
    check_us: float | None
    meet_us: float | None


def place(us: float) -> float:
    """Return how far right of the axis a figure is, in pixels."""
    share = math.log(max(us, LEAST_US) / LEAST_US) / math.log(MOST_US / LEAST_US)
    return min(share, 1.0) * (WIDTH - LEFT - RIGHT)


def say(us: float) -> str:
    """Return a time for people."""
    if us < 1_000:
        return f"{us:.0f} µs"
    return f"{us / 1_000:.1f} ms"


def draw(servers: list[Bars]) -> str:
    """Return the picture; the first server is ours."""
    height = TOP + ROW * len(servers) + BOTTOM
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"'
        f' role="img" aria-label="{TITLE}">',
        f"<style>{STYLE}</style>",
        f'<text class="title" x="16" y="26">{TITLE}</text>',
        '<rect class="check" x="16" y="41" width="12" height="12"/>',
        '<text x="34" y="52">one check that finds nothing, on a fresh connection</text>',
        '<rect class="meet" x="420" y="41" width="12" height="12"/>',
        '<text x="438" y="52">one rendezvous, all its connections fresh</text>',
        *_draw_scale(height - BOTTOM)]
    for number, bars in enumerate(servers):
        style = ""
        if number == 0:
            style = ' class="ours"'
        lines += _draw_server(bars, TOP + ROW * number, style)
    lines += [f'<text class="small" x="16" y="{height - 10}">{NOTE}</text>', "</svg>", ""]
    return "\n".join(lines)


def _draw_scale(bottom: int) -> Iterator[str]:
    for us in SCALE_US:
        x = LEFT + place(us)
        said = say(us).replace(".0", "")
        yield f'<line x1="{x:.0f}" y1="{TOP}" x2="{x:.0f}" y2="{bottom}"/>'
        yield (f'<text class="small" x="{x:.0f}" y="{bottom + 20}"'
               f' text-anchor="middle">{said}</text>')


def _draw_server(bars: Bars, top: int, style: str) -> Iterator[str]:
    title = html.escape(bars.title)
    yield f'<text{style} x="{LEFT - 10}" y="{top + 27}" text-anchor="end">{title}</text>'
    if bars.check_us:
        yield from _draw_bar("check", bars.check_us, top + 6)
    if bars.meet_us:
        yield from _draw_bar("meet", bars.meet_us, top + 6 + BAR + 2)


def _draw_bar(kind: str, us: float, top: int) -> Iterator[str]:
    width = place(us)
    yield f'<rect class="{kind}" x="{LEFT}" y="{top}" width="{width:.0f}" height="{BAR}"/>'
    yield f'<text class="small" x="{LEFT + width + 6:.0f}" y="{top + 12}">{say(us)}</text>'
