"""Showing results: a table on the terminal, JSON, a picture, a table in Markdown."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.contenders import FAST

__all__ = [
    "BadFileError",
    "brief",
    "digest",
    "draw",
    "draw_model",
    "load",
    "print_table",
    "rounded",
    "save",
    "split_readme",
    "summary",
    "update_readme",
    "write_between",
]

MARKS = {
    "brief": ("<!-- benchmarks brief: begin -->", "<!-- benchmarks brief: end -->"),
    "cpu": ("<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"),
    "cuda": ("<!-- benchmarks cuda: begin -->", "<!-- benchmarks cuda: end -->"),
    "model": ("<!-- benchmarks model: begin -->", "<!-- benchmarks model: end -->"),
}

Record = dict[str, Any]


class BadFileError(ValueError):
    """A file that was named on the command line is not what it should be."""


def rounded(value: Any) -> Any:
    """Return ``value`` with every float in it cut to five digits.

    What is shown at once and what is shown from the file later must not differ.
    """
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * scale >= 1:
            return f"{value * scale:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _case(record: Record) -> str:
    layout = "" if record["layout"] == "contiguous" else f", {record['layout']}"
    return f"{record['operation']} {record['norm']}, {record['dtype']}, {record['size']:,}{layout}"


def print_table(records: Sequence[Record], console: Console) -> None:
    """Print a line for every contender at every case."""
    table = Table("case", "contender", "time", "GB/s", "× limit", "× best peer")
    for column in table.columns[2:]:
        column.justify = "right"
    previous = None
    for record in records:
        case = _case(record)
        if previous not in (None, case):
            table.add_section()
        table.add_row(
            case if case != previous else "",
            record["contender"] + ("" if record["agrees"] else " (wrong result)"),
            _seconds(record["seconds"]),
            f"{record['gigabytes_per_second']:.1f}",
            _ratio(record["ratio_to_limit"]),
            _ratio(record["ratio_to_best_peer"]),
            style={"ours": "bold", "limit": "dim", "peer": ""}[record["kind"]],
        )
        previous = case
    console.print(table)


def save(results: dict[str, Any], path: Path) -> None:
    """Write everything that was measured as JSON."""
    records = ",\n".join(json.dumps(record) for record in results["records"])
    rest = json.dumps({name: part for name, part in results.items() if name != "records"})
    path.write_text(f'{rest[:-1]},\n"records": [\n{records}\n]}}\n', encoding="utf-8")


def load(path: Path) -> dict[str, Any]:
    """Read what :func:`save` wrote.

    Raises
    ------
    BadFileError
        If it is not such a file.
    """
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        missing = {"machine", "settings", "records", "first_calls", "slopes"} - set(results)
    except (OSError, ValueError) as error:
        raise BadFileError(f"--from-json {path} cannot be read: {error}") from None
    if missing:
        raise BadFileError(
            f"--from-json {path} was not written by python -m benchmarks; it lacks {missing}"
        )
    return results


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw throughput against size, a panel for each norm and dtype, a line for each contender."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = [r for r in results["records"] if r["layout"] == "contiguous" and r["size"] > 1]
    panels = list(dict.fromkeys((r["operation"], r["norm"], r["dtype"]) for r in records))
    if not panels:
        return
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4 * columns, 2.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(r["contender"] for r in records))
    lines: dict[str, Any] = {}
    for place, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, place + 1)
        for name in names:
            points = [
                (r["size"], r["gigabytes_per_second"])
                for r in records
                if (r["operation"], r["norm"], r["dtype"]) == panel
                and r["contender"] == name
                and r["agrees"]
                and (name != "limit" or r["size"] > results["settings"]["bare_call"])
            ]
            if points:
                lines[name] = axes.plot(
                    *zip(*sorted(points), strict=True),
                    linestyle="--" if name == "limit" else "-",
                    marker="" if name == "limit" else "o",
                    linewidth=2.5 if name in FAST else 1.2,
                    markersize=3,
                    color="black" if name == "limit" else f"C{names.index(name)}",
                    zorder=3 if name in FAST else 2,
                )[0]
        axes.set(xscale="log", yscale="log", title=f"{panel[0]} {panel[1]}, {panel[2]}")
        axes.set(xlabel="elements", ylabel="GB/s")
        axes.grid(alpha=0.3)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=6)
    figure.suptitle(_setting(results))
    figure.savefig(path, dpi=72)


Panels = Mapping[str, Mapping[str, Sequence[float]]]


def digest(panels: Panels) -> str:
    """Return what :func:`draw_model` notes in a picture, to tell what it was drawn of."""
    return hashlib.sha256(json.dumps(panels).encode()).hexdigest()


def draw_model(panels: Panels, gpus: Sequence[str], path: Path) -> None:
    """Draw modelled throughput for each GPU, a panel for each call, a mark for each contender.

    Parameters
    ----------
    panels : mapping
        Call -> contender, or ``"limit"`` -> bytes per second on each GPU.
    gpus : sequence of str
        Their names.
    path : pathlib.Path
        Where the PNG goes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(panels) // 4)
    figure = Figure(figsize=(16, 2.8 * rows + 1), layout="constrained")
    FigureCanvasAgg(figure)
    marks: dict[str, Any] = {}
    for place, (call, contenders) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, 4, place + 1)
        for number, (name, throughputs) in enumerate(contenders.items()):
            is_limit = name == "limit"
            shift = 0 if is_limit else 0.2 * (number - len(contenders) / 2)  # marks side by side
            (marks[name],) = axes.plot(
                [gpu + shift for gpu in range(len(gpus))],
                [throughput / 1e9 for throughput in throughputs],
                linestyle="",
                marker="_" if is_limit else "o",
                markersize=26 if is_limit else 8 if name == "ours" else 5,
                color="black" if is_limit else f"C{number}",
            )
        axes.set(yscale="log", title=call, ylabel="GB/s, modelled")
        axes.set_xticks(range(len(gpus)), [name.replace(" ", "\n", 1) for name in gpus])
        axes.tick_params("x", labelsize=8)
        axes.grid(alpha=0.3)
    figure.legend(marks.values(), marks.keys(), loc="outside lower center", ncols=len(marks))
    figure.suptitle("Modelled, not measured: the throughput that a GPU reaches at most")
    figure.savefig(path, dpi=72, metadata={"Comment": digest(panels)})


def _setting(results: dict[str, Any]) -> str:
    processor, threads = results["machine"]["processor"], results["machine"]["threads"]
    if not threads:  # a GPU
        return str(processor)
    return f"{processor}, {threads} thread{'s' if threads > 1 else ''}"


def summary(results: dict[str, Any]) -> str:
    """Return the tables of docs/performance.md, with what their figures depend on."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    layer = f" ({machine['threading_layer']})" if machine["threads"] else ""
    lines = [
        f"Measured with `python -m benchmarks` on {_setting(results)}{layer}, "
        f"{machine['system']}, Python {machine['python']}, {versions}. Medians of "
        f"{results['settings']['repeats']} interleaved rounds: the time; its ratio to the limit / "
        f"to the fastest peer, round by round.",
        "",
        *_pivot(results["records"]),
        "",
        f"{_limit(results)} The peers are {_peers(results['records'])}; where their "
        f"penalty is off by more than 1e-4 of itself they do not count.",
    ]
    if machine.get("caveat"):
        lines += ["", machine["caveat"]]
    if results["first_calls"]:
        lines += ["", "| in a fresh process | empty cache | full cache |", "| --- | ---: | ---: |"]
        empty, full = (results["first_calls"][state] for state in ("empty cache", "full cache"))
        lines += [f"| {n} | {_seconds(empty[n])} | {_seconds(full[n])} |" for n in empty]
    if results["slopes"]:
        found = results["slopes"].values()
        lines += [
            "",
            f"From 100,000 elements up, time grows as elementsᵖ with p between {min(found):.2f} "
            f"and {max(found):.2f} (least squares, a fit for each of {len(found)} series).",
        ]
    return "\n".join(lines)


def brief(results: dict[str, Any]) -> str:
    """Return the table of the README: times, and how many times that the fastest peer took."""
    found = {
        (r["operation"], r["norm"], r["dtype"], r["size"]): r
        for r in results["records"]
        if r["contender"] in FAST and r["layout"] == "contiguous" and r["ratio_to_best_peer"]
    }
    sizes = 1000, 100_000, 1_000_000, 20_000_000
    lines = [
        f"| elements | {' | '.join(f'{size:,}' for size in sizes)} |",
        f"| --- {'| ---: ' * len(sizes)}|",
    ]
    for dtype in ("float32", "float64"):
        for operation, norm in (("apply", "l1"), ("penalty", "l1"), ("apply", "l2")):
            records = [found.get((operation, norm, dtype, size)) for size in sizes]
            cells = [
                f"{_seconds(each['seconds'])}, {1 / each['ratio_to_best_peer']:.1f} ×"
                if each
                else ""
                for each in records
            ]
            lines.append(f"| `{operation}` {norm}, {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _limit(results: dict[str, Any]) -> str:
    if not results["machine"]["threads"]:
        return "The limit is a copy within the memory of the device that moves as many bytes."
    return (
        f"The limit is a parallel loop in Numba that reads and writes the same bytes: `g += c·x` "
        f"for L1 and squared L2, a sum of x for `penalty`, both for L2. Up to "
        f"{results['settings']['bare_call']:,} elements it is the call of a compiled function of "
        f"two arrays that does nothing, and for strided arrays a loop written by hand."
    )


def _pivot(records: Sequence[Record]) -> list[str]:
    """Return a table of what the fast backend took, a column for each size."""
    cells: dict[str, dict[int, str]] = {}
    for record in records:
        if record["contender"] in FAST:
            layout = "" if record["layout"] == "contiguous" else f", {record['layout']}"
            row = f"`{record['operation']}` {record['norm']}, {record['dtype']}{layout}"
            ratios = [_ratio(record[f"ratio_to_{rival}"]) for rival in ("limit", "best_peer")]
            cells.setdefault(row, {})[record["size"]] = (
                f"{_seconds(record['seconds'])}; {' / '.join(filter(None, ratios))}"
            )
    sizes = sorted({size for row in cells.values() for size in row})
    return [
        f"| elements | {' | '.join(f'{size:,}' for size in sizes)} |",
        f"| --- {'| ---: ' * len(sizes)}|",
        *(f"| {row} | {' | '.join(c.get(n, '') for n in sizes)} |" for row, c in cells.items()),
    ]


def _peers(records: Sequence[Record]) -> str:
    names = dict.fromkeys(r["contender"] for r in records if r["kind"] == "peer" and r["agrees"])
    return ", ".join(names) or "none"


def split_readme(path: Path, place: str, option: str = "--readme") -> tuple[str, str]:
    """Return what stands before and after the place for the tables of a device in ``path``.

    Raises
    ------
    BadFileError
        If the file cannot be read or has no such place.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadFileError(f"{option} {path} cannot be read: {error}") from None
    first, last = MARKS[place]
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise BadFileError(
            f"{option} {path} has no place for the table; put {first} and {last} there"
        )
    return before, after


def update_readme(results: dict[str, Any], path: Path, device: str) -> None:
    """Replace what stands between the two marks in ``path`` by :func:`summary`."""
    write_between(path, device, summary(results))


def write_between(path: Path, place: str, text: str, option: str = "--readme") -> None:
    """Replace what stands between the two marks of a place in ``path``."""
    (before, after), (first, last) = split_readme(path, place, option), MARKS[place]
    path.write_text(f"{before}{first}\n{text}\n{last}{after}", encoding="utf-8")
