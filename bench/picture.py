"""Draw what compare.py measured: bars on a logarithmic scale, as SVG, for light and dark pages."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from typing import NamedTuple

LEFT, RIGHT, TOP, BOTTOM = 270, 90, 70, 58  # margins: names, last numbers, title, scale and note
WIDTH, ROW, BAR = 860, 46, 15
NOTE = "Logarithmic scale. Only the relay has the receiver prove that the key is his: two P-384 seals of a rendezvous."
LEAST_US, MOST_US = 10, 20_000  # of the scale
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
    """A server with the CPU of a check and of a rendezvous, in microseconds; None is not drawn."""

    title: str
    check_us: float | None
    meet_us: float | None


def place(us: float) -> float:
    """Return how far right a figure is, in pixels from the axis."""
    share = math.log(max(us, LEAST_US) / LEAST_US) / math.log(MOST_US / LEAST_US)
    return min(share, 1.0) * (WIDTH - LEFT - RIGHT)


def say(us: float) -> str:
    """Return a time for people."""
    return f"{us:.0f} µs" if us < 1_000 else f"{us / 1_000:.1f} ms"


def draw(rows: list[Bars]) -> str:
    """Return the picture."""
    height = TOP + ROW * len(rows) + BOTTOM
    title = "CPU of the server, less is better"
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{title}">',
        f"<style>{STYLE}</style>",
        f'<text class="title" x="16" y="26">{title}</text>',
        '<rect class="check" x="16" y="41" width="12" height="12"/>',
        '<text x="34" y="52">one check that finds nothing, on a fresh connection</text>',
        '<rect class="meet" x="420" y="41" width="12" height="12"/>',
        '<text x="438" y="52">one rendezvous, all its connections fresh</text>',
        *_draw_scale(height - BOTTOM),
        *(line for number, row in enumerate(rows) for line in _draw_row(row, TOP + ROW * number, number == 0)),
        f'<text class="small" x="16" y="{height - 10}">{NOTE}</text>',
        "</svg>", ""])


def _draw_scale(bottom: int) -> Iterator[str]:
    for us in (10, 100, 1_000, 10_000):
        x = LEFT + place(us)
        yield f'<line x1="{x:.0f}" y1="{TOP}" x2="{x:.0f}" y2="{bottom}"/>'
        said = say(us).replace(".0", "")
        yield f'<text class="small" x="{x:.0f}" y="{bottom + 20}" text-anchor="middle">{said}</text>'


def _draw_row(row: Bars, top: int, ours: bool) -> Iterator[str]:
    style = ' class="ours"' if ours else ""
    yield f'<text{style} x="{LEFT - 10}" y="{top + 27}" text-anchor="end">{html.escape(row.title)}</text>'
    for us, kind, y in ((row.check_us, "check", top + 6), (row.meet_us, "meet", top + 6 + BAR + 2)):
        if us:
            yield f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{place(us):.0f}" height="{BAR}"/>'
            yield f'<text class="small" x="{LEFT + place(us) + 6:.0f}" y="{y + 12}">{say(us)}</text>'
