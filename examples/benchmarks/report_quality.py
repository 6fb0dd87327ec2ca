"""Write the tables of a page, and draw its figure, from what `measure_quality.py collect` wrote.

    python examples/benchmarks/report_quality.py --json measured.json --page measured.md --plot quality.svg

A table of the page stands between `<!-- table: <name> -->` and `<!-- end -->`, with a name of `REPORTS`.
docs/reference/measured.md is such a page.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import table
from matplotlib.figure import Figure
from measure_quality import METHODS, SEARCH, TASKS

Measured = dict[str, list[dict[str, Any]]]
NAMES = [*METHODS, SEARCH]


def by_method(measured: Measured) -> dict[str, dict[str, dict[str, Any]]]:
    """Return what was measured by method and task, in the order of the page."""
    held = {name: {row["task"]: row for row in measured["methods"] if row["method"] == name} for name in NAMES}
    return {name: rows for name, rows in held.items() if rows}


def tasks_of(measured: Measured) -> list[str]:
    return [task for task in TASKS if any(row["task"] == task for row in measured["methods"])]


def millions(counts: Sequence[int]) -> str:
    """Return numbers of parameters, the smallest and the largest where they differ."""
    ends = list(dict.fromkeys((min(counts), max(counts))))
    return " to ".join(f"{count / 1e6:.2f} M" if count >= 10_000 else str(count) for count in ends)


def error_table(measured: Measured) -> str:
    """Return the errors on validation and on test, with intervals."""
    rows = []
    for name, found in by_method(measured).items():
        cells = dict.fromkeys(tasks_of(measured), "")
        for task, row in found.items():
            low, high = row["interval"]
            chosen = "" if row["validation"] is None else f"{row['validation']:.1f} / "
            cells[task] = f"{chosen}{row['test']:.1f} ({low:.1f} to {high:.1f})"
        rows.append([name, millions([count for row in found.values() for count in row["trained"]]), *cells.values()])
    return table(["method", "trained", *tasks_of(measured)], rows)


def comparison_table(measured: Measured) -> str:
    """Return differences of test errors with their intervals and corrected p-values, where these are below 0.5."""
    rows = []
    for row in (one for one in measured["compared"] if one["p"] < 0.5):
        low, high = row["interval"]
        told = [f"{row['difference']:+.1f}", f"{low:+.1f} to {high:+.1f}", f"{row['p']:.3f}"]
        rows.append([row["task"], row["method"], row["minus"], *told])
    return table(["task", "method", "minus", "difference", "95 % interval", "p"], rows, left=3)


def setting_table(measured: Measured) -> str:
    """Return the settings that were chosen, and where trainings stopped."""
    rows = []
    for name, found in by_method(measured).items():
        for task, row in found.items():
            if name != SEARCH:
                kept = ("l_dim", "lora_r", "rate")
                told = [", ".join(f"{key}={one[key]:g}" for key in kept if key in one) for one in row["settings"]]
                ends = " to ".join(map(str, dict.fromkeys((row["steps"][0], row["steps"][-1]))))
                rows.append([name, task, "; ".join(sorted(told)), ends, f"{row['seconds']}"])
    return table(["method", "task", "chosen", "steps", "seconds"], rows, left=3)


def draw_quality(measured: Measured) -> Figure:
    """Draw the errors on test with their intervals, one panel below the other: legible on a phone."""
    tasks, held = tasks_of(measured), by_method(measured)
    figure = Figure(figsize=(5.2, 0.28 * len(tasks) * len(held) + 1.5), layout="constrained")
    for axes, task in zip(figure.subplots(len(tasks), squeeze=False)[:, 0], tasks, strict=True):
        shown = [(name, found[task]) for name, found in held.items() if task in found][::-1]
        for place, (name, row) in enumerate(shown):
            low, high = row["interval"]
            is_elp = name == SEARCH or any("adapters" in one for one in row["settings"])
            color = "#c2410c" if is_elp else "#64748b"
            axes.plot([low, high], [place, place], color=color, linewidth=2)
            axes.plot([row["test"]], [place], "o", color=color)
        axes.set_yticks(range(len(shown)), [name for name, _ in shown], fontsize=9)
        axes.set_title(f"{task}: {TASKS[task].error}, %", fontsize=10)
    return figure


REPORTS = {"methods": error_table, "comparisons": comparison_table, "settings": setting_table}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--json", type=Path, required=True, help="File with all results.")
    option("--page", type=Path, required=True, help="Markdown file with marks for the tables.")
    option("--plot", type=Path, help="File for the figure.")
    args = parser.parse_args(argv)
    measured: Measured = json.loads(args.json.read_text(encoding="utf-8"))
    page = args.page.read_text(encoding="utf-8")
    for name, make in REPORTS.items():
        mark = f"<!-- table: {name} -->\n"
        before, there, after = page.partition(mark)
        if there:
            _, end, after = after.partition("<!-- end -->")
            page = f"{before}{mark}{make(measured)}\n{end}{after}"
    if args.plot:
        draw_quality(measured).savefig(args.plot, transparent=True)
    args.page.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
