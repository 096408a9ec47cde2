"""The directive ``house-map``: the modules of the package and their imports, as a picture.

The picture is made from the sources when the site is built, so that it cannot be out of date. A box
is a module, or a package whose modules belong together. An arrow leads from a box to one that it
imports; arrows that follow from others are left out. Imports that go round in a circle are an
error.
"""

from __future__ import annotations

import ast
import html
from graphlib import TopologicalSorter
from itertools import pairwise
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

PACKAGE = "actreg_dispatch"
ROOT = Path(__file__).parent.parent.parent / PACKAGE
ROW, HEIGHT, LETTER, GAP, MARGIN = 64, 28, 7.4, 16, 8

Imports = dict[str, set[str]]


def box_of(module: str) -> str:
    """Return the box that a module, named from the package on, is drawn in."""
    first, _, rest = module.partition(".")
    if first == "backends" or module == "runtime.warmup":  # which calls the API
        return ".".join([first, *rest.split(".")[:1]])
    return first


def read_modules() -> dict[str, ast.Module]:
    """Return the package's modules but those that only name others, parsed."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name and name != "__main__":
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports_of(modules: dict[str, ast.Module]) -> Imports:
    """Return, for each box, the boxes that it imports where it is loaded."""
    found: Imports = {box_of(name): set() for name in modules if name != "backends"}
    for name, tree in modules.items():
        for statement in tree.body:
            if not isinstance(statement, ast.ImportFrom) or statement.module is None:
                continue
            package, _, source = statement.module.partition(".")
            if package != PACKAGE:
                continue
            for alias in statement.names:
                inner = f"{source}.{alias.name}".lstrip(".")
                imported = inner if inner in modules else source
                if imported and box_of(imported) in found:
                    found[box_of(name)].add(box_of(imported))
    for box, imported in found.items():
        imported.discard(box)
    return found


def reduced(imports: Imports) -> Imports:
    """Return the imports without those that follow from others; raise on a circle."""
    reach: Imports = {}
    for box in TopologicalSorter(imports).static_order():  # raises CycleError
        reach[box] = set().union(*(reach[each] | {each} for each in imports[box]))
    return {
        box: {each for each in found if not any(each in reach[other] for other in found)}
        for box, found in imports.items()
    }


def rows_of(imports: Imports) -> tuple[list[list[str]], list[list[str]]]:
    """Return the boxes in rows, each above all that it imports, and the way of each arrow.

    A way is what the arrow goes through, from row to row: boxes at its ends, and between them
    gaps, whose names are those of the ends, joined by ``>``.
    """
    height: dict[str, int] = {}
    for box in TopologicalSorter(imports).static_order():
        height[box] = 1 + max((height[each] for each in imports[box]), default=-1)
    rows: list[list[str]] = [[] for _ in range(max(height.values()) + 1)]
    for box in sorted(height):
        rows[height[box]].append(box)
    ways = []
    for box, found in imports.items():
        for other in sorted(found):
            gap = f"{box}>{other}"
            between = range(height[box] - 1, height[other], -1)
            ways.append([box, *(f"{gap}>{row}" for row in between), other])
            for row, name in zip(between, ways[-1][1:], strict=False):
                rows[row].append(name)
    near: Imports = {name: set() for row in rows for name in row}
    for way in ways:
        for above, below in pairwise(way):
            near[above].add(below)
            near[below].add(above)
    for _ in range(40):  # each to the middle of what it is joined to
        for row in [*rows, *reversed(rows)]:
            place = {name: (k + 0.5) / len(each) for each in rows for k, name in enumerate(each)}
            middle = {
                name: sum(place[each] for each in near[name]) / max(1, len(near[name]))
                for name in row
            }
            row.sort(key=middle.__getitem__)
    return rows[::-1], ways


def picture(modules: dict[str, ast.Module]) -> str:
    """Return the map as SVG."""
    imports = reduced(imports_of(modules))
    rows, ways = rows_of(imports)
    widths = {
        name: len(name) * LETTER + 20 if name in imports else 4 for row in rows for name in row
    }
    wide = max(sum(widths[name] + GAP for name in row) for row in rows) + 2 * MARGIN
    centre: dict[str, float] = {}
    for row in rows:
        spare = (wide - 2 * MARGIN - sum(widths[name] for name in row)) / len(row)
        left = MARGIN + spare / 2
        for name in row:
            centre[name] = left + widths[name] / 2
            left += widths[name] + spare
    top = {name: MARGIN + number * ROW for number, row in enumerate(rows) for name in row}
    tall = 2 * MARGIN + (len(rows) - 1) * ROW + HEIGHT
    lines = [
        f'<div class="house"><svg viewBox="0 0 {wide:.0f} {tall}" role="img" '
        f'aria-label="Modules of the package and their imports" style="min-width: {wide:.0f}px">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z"/></marker></defs>',
    ]
    for way in ways:
        path = [f"M{centre[way[0]]:.1f} {top[way[0]] + HEIGHT}"]
        for above, below in pairwise(way):
            start, end = top[above] + HEIGHT, top[below]
            bend = (end - start) / 2
            path.append(
                f"L{centre[above]:.1f} {start}C{centre[above]:.1f} {start + bend:.1f} "
                f"{centre[below]:.1f} {end - bend:.1f} {centre[below]:.1f} {end}"
            )
        lines.append(f'<path class="arrow" marker-end="url(#tip)" d="{" ".join(path)}"/>')
    for box in imports:
        tip = html.escape((ast.get_docstring(modules[box]) or "").partition("\n")[0])
        x, y, width = centre[box], top[box], widths[box]
        lines.append(
            f'<g><title>{tip}</title><rect x="{x - width / 2:.1f}" y="{y}" width="{width:.1f}" '
            f'height="{HEIGHT}" rx="5"/><text x="{x:.1f}" y="{y + 18}">{box}</text></g>'
        )
    return "\n".join([*lines, "</svg></div>"])


class HouseMap(SphinxDirective):
    """Show the map."""

    def run(self) -> list[nodes.Node]:
        """Return the picture, for HTML."""
        for path in ROOT.rglob("*.py"):
            self.env.note_dependency(str(path))
        return [nodes.raw("", picture(read_modules()), format="html")]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("house-map", HouseMap)
    return {"parallel_read_safe": True}
