"""States, arrows and boxes as SVG: just enough for the diagrams of these pages.

Rule 1: the same diagram gives the same bytes, so that a change of it is a visible diff.
Rule 2: it must read on a light page and on a dark one: shapes bring their own fill, lines and loose text are of a grey
between both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from typing import Final

__all__ = ["Arrow", "Drawing", "Node"]

LINE: Final = "#7d8696"
FONT: Final = "ui-sans-serif, system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif"
LOOKS: Final = {  # fill, border, text
    "plain": ("#e6ecf5", "#5f7391", "#1d2a3d"),
    "good": ("#dcefe3", "#4a8a63", "#16331f"),
    "bad": ("#f8e3de", "#ad5f4e", "#471d13"),
    "faint": ("#f1f3f6", "#a3acba", "#4a5464"),
}
CHARACTER: Final = 7.4
"""About the width of one at 13 px."""


@dataclass(frozen=True, slots=True)
class Node:
    """A state: where its middle is, and how it looks."""

    x: float
    y: float
    text: str
    look: str = "plain"

    @property
    def width(self) -> float:
        return len(self.text) * 8.2 + 34

    @property
    def height(self) -> float:
        return 38.0 if self.look != "faint" else 28.0

    def holds(self, x: float, y: float) -> bool:
        return abs(x - self.x) <= self.width / 2 + 2 and abs(y - self.y) <= self.height / 2 + 2


@dataclass(frozen=True, slots=True)
class Arrow:
    """A step from one state to another.

    Attributes:
        bend: how far the middle of the line lies to the left of the straight way; of a loop, how high it goes.
        at: where on its way the label stands, from 0 to 1.
    """

    source: Node
    target: Node
    text: str
    bend: float = 0.0
    at: float = 0.5


class Drawing:
    """One picture of a given size, from back to front."""

    def __init__(self, width: int, height: int, title: str, description: str) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" aria-labelledby="title description" font-family="{FONT}" font-size="13">',
            f'<title id="title">{escape(title)}</title>',
            f'<desc id="description">{escape(description)}</desc>',
        ]

    def states(self, nodes: Iterable[Node], arrows: Iterable[Arrow]) -> None:
        """All arrows, then all states, then all labels, so that none hides another."""
        labels: list[tuple[float, float, str]] = []
        for arrow in arrows:
            labels.append((*self._arrow(arrow), arrow.text))
        for node in nodes:
            self.box(node.x - node.width / 2, node.y - node.height / 2, node.width, node.height, node.text, node.look)
        for x, y, text in labels:
            self.label(x, y, text)

    def box(self, x: float, y: float, width: float, height: float, text: str, look: str = "plain") -> None:
        fill, border, ink = LOOKS[look]
        dashes = ' stroke-dasharray="4 3"' if look == "faint" else ""
        self._parts.append(
            f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" rx="{_n(min(height, 38) / 4)}" '
            f'fill="{fill}" stroke="{border}" stroke-width="1.4"{dashes}/>'
        )
        weight = "normal" if look == "faint" else "600"
        self.text(x + width / 2, y + height / 2, text, ink, weight=weight)

    def label(self, x: float, y: float, text: str) -> None:
        width = len(text) * CHARACTER * 0.92 + 10
        self._parts.append(
            f'<rect x="{_n(x - width / 2)}" y="{_n(y - 10)}" width="{_n(width)}" height="20" rx="5" '
            f'fill="#f4f5f8" stroke="#c9cfd9" stroke-width="0.8"/>'
        )
        self.text(x, y, text, "#3c4757", size=12)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        ink: str = LINE,
        *,
        size: int = 13,
        weight: str = "normal",
        anchor: str = "middle",
    ) -> None:
        self._parts.append(
            f'<text x="{_n(x)}" y="{_n(y + size * 0.35)}" text-anchor="{anchor}" font-size="{size}" '
            f'font-weight="{weight}" fill="{ink}">{escape(text)}</text>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, *, dashed: bool = False) -> None:
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self._parts.append(
            f'<line x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}" '
            f'stroke="{LINE}" stroke-width="1.6"{dashes}/>'
        )

    def _arrow(self, arrow: Arrow) -> tuple[float, float]:
        """Draw the line and its head; returns where the label goes."""
        source, target = arrow.source, arrow.target
        if source is target:
            points = _loop(source, arrow.bend)
        else:
            way = _curve(source, target, arrow.bend)
            points = [point for point in way if not source.holds(*point) and not target.holds(*point)]
        (x1, y1), (x2, y2) = points[-4], points[-1]
        angle = math.atan2(y2 - y1, x2 - x1)
        wings = [
            (x2 - 10 * math.cos(angle + turn), y2 - 10 * math.sin(angle + turn)) for turn in (math.pi / 7, -math.pi / 7)
        ]
        path = " ".join(f"{_n(x)},{_n(y)}" for x, y in points[:-2])
        self._parts.append(f'<polyline points="{path}" fill="none" stroke="{LINE}" stroke-width="1.6"/>')
        head = " ".join(f"{_n(x)},{_n(y)}" for x, y in [(x2, y2), *wings])
        self._parts.append(f'<polygon points="{head}" fill="{LINE}"/>')
        return points[round(arrow.at * (len(points) - 1))]

    def svg(self) -> str:
        """The whole picture."""
        return "\n".join([*self._parts, "</svg>", ""])


def _curve(source: Node, target: Node, bend: float) -> list[tuple[float, float]]:
    dx, dy = target.x - source.x, target.y - source.y
    length = math.hypot(dx, dy)
    # The control point of a quadratic curve is twice as far away as its middle.
    cx = (source.x + target.x) / 2 + 2 * bend * dy / length
    cy = (source.y + target.y) / 2 - 2 * bend * dx / length
    points: list[tuple[float, float]] = []
    for step in range(201):
        t = step / 200
        points.append(
            (
                (1 - t) ** 2 * source.x + 2 * t * (1 - t) * cx + t**2 * target.x,
                (1 - t) ** 2 * source.y + 2 * t * (1 - t) * cy + t**2 * target.y,
            )
        )
    return points


def _loop(node: Node, height: float) -> list[tuple[float, float]]:
    """From the left half of a state's upper edge back to it."""
    top = node.y - node.height / 2
    half = node.width / 5
    return [
        (node.x - half - half * math.cos(math.pi * step / 60), top - height * math.sin(math.pi * step / 60))
        for step in range(61)
    ]


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
