"""Write the tables of a page, and draw its figures, from what `measure_quality.py` measured.

    python examples/benchmarks/report_quality.py --json measured.json --page measured.md --plots plots \
        --cost "Whisper tiny.en" cost.json

A table of the page stands between `<!-- table: <encoder>, <name> -->` and `<!-- end -->`, with a name of `REPORTS`.
docs/reference/measured.md is such a page.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import FULL, L_ONLY, LORA, table, with_deviation
from matplotlib.figure import Figure
from measure_quality import CHOICES, METHODS, TASKS, Result
from scipy.stats import ttest_rel

from peft_elp.speech.plots import plot_layer_weights

Costs = Mapping[str, Sequence[float]]  # by method: memory and time relative to full fine-tuning
Found = dict[tuple[str, str], list[Result]]  # by task and method, of one encoder


def read_results(file: Path) -> list[Result]:
    return [Result(**found) for found in json.loads(file.read_text(encoding="utf-8"))]


def read_costs(file: Path) -> Costs:
    """Read what a step keeps and how long it takes, relative to full fine-tuning."""
    costs = {cost["method"]: cost for cost in json.loads(file.read_text(encoding="utf-8"))["costs"]}
    kept, taken = (costs[FULL][key] for key in ("saved_mib", "step_s"))
    times = {name: [a / b for a, b in zip(cost["step_s"], taken, strict=True)] for name, cost in costs.items()}
    return {name: (cost["saved_mib"] / kept, statistics.median(times[name])) for name, cost in costs.items()}


def of_encoder(results: Sequence[Result], encoder: str) -> Found:
    found: Found = {}
    for result in results:
        if result.encoder == encoder:
            found.setdefault((result.task, result.method), []).append(result)
    return found


def tasks_of(found: Found, methods: Sequence[str] = ()) -> list[str]:
    """Return the tasks that were measured, at all or with one of some methods."""
    return [task for task in TASKS if any(t == task and (not methods or m in methods) for t, m in found)]


def per_seed(results: Sequence[Result], measured: str) -> dict[int, float]:
    """Return the mean error over the folds of each seed after the choice."""
    errors: dict[int, list[float]] = {}
    for result in results:
        if result.seed:
            errors.setdefault(result.seed, []).append(result.errors[measured])
    return {seed: statistics.mean(errors[seed]) for seed in sorted(errors)}


def in_cell(results: Sequence[Result]) -> str:
    """Return the errors on validation and test."""
    cells = [with_deviation([*per_seed(results, name).values()]) for name in ("validation", "test")]
    return " / ".join(cell for cell in cells if cell)


def compare(one: Sequence[Result], other: Sequence[Result]) -> tuple[float | None, float | None]:
    """Return the mean difference of two methods on test over the seeds that both have, and its p-value.

    The p-value is of a paired t-test; None if all seeds differ by as much, or if there is one.
    """
    first, second = per_seed(one, "test"), per_seed(other, "test")
    pairs = [(first[seed], second[seed]) for seed in first if seed in second]
    differences = [x - y for x, y in pairs]
    p = None
    if len({round(difference, 6) for difference in differences}) > 1:
        p = float(ttest_rel([x for x, _ in pairs], [y for _, y in pairs]).pvalue)
    return statistics.mean(differences) if pairs else None, p


def error_table(found: Found, names: Sequence[str], tasks: Sequence[str], costs: Costs) -> str:
    """Return a line for each of some methods, a column for each task; the head does not count as trained."""
    rows = []
    for name in names:
        held = [found.get((task, name), []) for task in tasks]
        counts = sorted({result.trained[0] for results in held for result in results})
        ratios = [f"{ratio:.2f}" for ratio in costs.get(name, ())] or ["", ""]
        if counts:
            trained = " / ".join(f"{count / 1e6:.2f} M" if count else "0" for count in counts)
            rows.append([name, trained, *(ratios if costs else ()), *map(in_cell, held)])
    return table(["method", "trained", *(("kept / full", "step / full") if costs else ()), *tasks], rows)


def choice_table(found: Found, costs: Costs) -> str:
    """Return what one changed setting changes, as far as it was measured."""
    return error_table(found, [L_ONLY, "E+L", "E+L+P", *CHOICES], tasks_of(found, list(CHOICES)), {})


def rate_table(found: Found, costs: Costs) -> str:
    """Return the rates that the methods chose, with a mark where the best rate is the lowest or the highest."""
    rows = []
    for method, known in METHODS.items():
        cells = []
        for task in tasks_of(found):
            held = found.get((task, method), [])
            chosen = sorted({result.rate for result in held if result.seed})
            tried = [result.rate for result in held if not result.seed]
            edge = "*" if chosen and chosen[0] in (min(tried), max(tried)) else ""
            cells.append("".join(f"{rate:g}" for rate in chosen) + edge)
        if any(cells):
            rows.append([method, ", ".join(f"{rate:g}" for rate in known.rates), *cells])
    return table(["method", "rates", *tasks_of(found)], rows, left=2)


def comparison_table(found: Found, costs: Costs) -> str:
    """Return the ELP settings against LoRA and full fine-tuning: differences of test errors and p-values."""
    rows = []
    for task, method in itertools.product(TASKS, (L_ONLY, "L", "E", "E+L", "E+L+P")):
        held = found.get((task, method), [])
        if per_seed(held, "test"):
            pairs = [compare(held, found.get((task, other), [])) for other in (LORA, FULL)]
            cells = [("" if x is None else f"{x:+.1f}", "" if p is None else f"{p:.3f}") for x, p in pairs]
            rows.append([task, method, *itertools.chain(*cells)])
    return table(["task", "setting", "minus LoRA", "p", "minus full fine-tuning", "p"], rows, left=2)


def further_table(found: Found, costs: Costs) -> str:
    """Return the errors on test that are not in the main table: trials across sets, each slot, and words."""
    parts = []
    for task in TASKS:
        of_task = {method: held for (name, method), held in found.items() if name == task}
        names = sorted({n for held in of_task.values() for r in held for n in r.errors if n.startswith("test ")})
        rows = [
            [method, *(with_deviation([*per_seed(of_task.get(method, []), name).values()]) for name in names)]
            for method in METHODS
        ]
        if names:
            header = [f"{task}, test", *(name.removeprefix("test ") for name in names)]
            parts.append(table(header, [cells for cells in rows if any(cells[1:])]))
    return "\n\n".join(parts)


NONE_TRAINED = 10_000  # Where a method without trained parameters is drawn: a logarithm has no zero.


def draw_quality(found: Found) -> Figure:
    """Draw the error on test against trained parameters, one panel below the other: legible on a phone."""
    tasks = tasks_of(found)
    figure = Figure(figsize=(5.2, 2.5 * len(tasks) + 1.5), layout="constrained")
    panels = dict(zip(tasks, figure.subplots(len(tasks), squeeze=False, sharex=True)[:, 0], strict=True))
    markers = dict(zip(METHODS, "os^Dv<>Ph*X", strict=True))
    drawn: dict[str, Any] = {}
    for (task, method), held in found.items():
        values = [*per_seed(held, "test").values()]
        if method in METHODS and values:
            x = max(held[0].trained[0], NONE_TRAINED)
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            color = "#64748b" if METHODS[method].options.get("method") else "#c2410c"  # ELP-adapters stand out.
            point = panels[task].errorbar(x, statistics.mean(values), deviation, fmt=markers[method], color=color)
            drawn[method] = point
    for task, axes in panels.items():
        axes.set_xscale("log")
        axes.set_title(f"{task}: {TASKS[task].error}, %", fontsize=10)
    panels[tasks[-1]].set_xlabel(f"parameters trained in the encoder ({NONE_TRAINED:,}: none)")
    names = [name for name in METHODS if name in drawn]
    figure.legend([drawn[name] for name in names], names, loc="outside lower center", ncols=2, fontsize=9)
    return figure


def draw_layers(found: Found) -> Figure:
    """Draw the layer weights of the L-adapter of each task, mean over seeds."""
    means = {}
    for task in TASKS:
        if held := [result.shares for result in found.get((task, L_ONLY), []) if result.seed]:
            means[task] = [(int(layer), statistics.mean(shares[layer] for shares in held)) for layer in held[0]]
    return plot_layer_weights(means)


REPORTS = {
    "methods": lambda found, costs: error_table(found, list(METHODS), tasks_of(found), costs),
    "comparisons": comparison_table,
    "further": further_table,
    "rates": rate_table,
    "choices": choice_table,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--json", type=Path, required=True, help="File with all results.")
    option("--page", type=Path, required=True, help="Markdown file with marks for the tables.")
    option("--plots", type=Path, help="Folder for the figures.")
    option("--cost", nargs=2, action="append", default=[], help="Encoder, and output of `measure_cost.py methods`.")
    args = parser.parse_args(argv)
    results, page = read_results(args.json), args.page.read_text(encoding="utf-8")
    costs = {encoder: read_costs(Path(file)) for encoder, file in args.cost}
    for encoder in dict.fromkeys(result.encoder for result in results):
        found = of_encoder(results, encoder)
        for name, make in REPORTS.items():
            mark = f"<!-- table: {encoder}, {name} -->\n"
            before, there, after = page.partition(mark)
            if there:
                _, end, after = after.partition("<!-- end -->")
                page = f"{before}{mark}{make(found, costs.get(encoder, {}))}\n{end}{after}"
        if args.plots:
            args.plots.mkdir(parents=True, exist_ok=True)
            for name, draw in {"quality": draw_quality, "layers": draw_layers}.items():
                draw(found).savefig(args.plots / f"{name}-{encoder.split()[0].lower()}.svg")
    args.page.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
