"""Write the tables of a page, and draw its figures, from what `measure_quality.py` measured.

    python examples/report_quality.py --json measured.json --page measured.md --plots plots \
        --cost "Whisper tiny.en" cost.json

A table of the page stands between `<!-- table: <encoder>, <name> -->` and `<!-- end -->`, with a name of `REPORTS`.
docs/reference/measured.md is such a page.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from measure_quality import CHOICES, FULL, L_ONLY, LORA, METHODS, TASKS, Result
from scipy.stats import ttest_rel

from peft_elp.speech.plots import plot_layer_weights

Costs = dict[str, tuple[float, float]]  # by method


def read_results(file: Path) -> list[Result]:
    return [Result(**found) for found in json.loads(file.read_text(encoding="utf-8"))]


def read_costs(file: Path) -> Costs:
    """What a step keeps and how long it takes, relative to full fine-tuning."""
    costs = {cost["method"]: cost for cost in json.loads(file.read_text(encoding="utf-8"))["costs"]}
    full = costs[FULL]
    return {
        method: (
            cost["saved_mib"] / full["saved_mib"],
            statistics.median(a / b for a, b in zip(cost["step_s"], full["step_s"], strict=True)),
        )
        for method, cost in costs.items()
    }


def per_seed(results: Sequence[Result], measured: str) -> dict[int, float]:
    """The mean error over the folds of each seed after the choice."""
    seeds = sorted({result.seed for result in results if result.seed})
    return {
        seed: statistics.mean(result.errors[measured] for result in results if result.seed == seed) for seed in seeds
    }


def with_deviation(values: Sequence[float]) -> str:
    """Mean and sample standard deviation."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}" if values else ""


def in_cell(results: Sequence[Result]) -> str:
    """The errors on validation and test."""
    names = [name for name in ("validation", "test") if results]
    cells = [with_deviation([*per_seed(results, name).values()]) for name in names]
    return " / ".join(cell for cell in cells if cell)


def p_value(one: Sequence[Result], other: Sequence[Result], measured: str) -> float | None:
    """The p-value of a paired t-test of two methods, over the seeds that both have; None if all differ by as much."""
    first, second = per_seed(one, measured), per_seed(other, measured)
    common = sorted({*first} & {*second})
    if len(common) < 2 or len({round(first[seed] - second[seed], 6) for seed in common}) == 1:
        return None
    return float(ttest_rel([first[seed] for seed in common], [second[seed] for seed in common]).pvalue)


def by_method(results: Sequence[Result], encoder: str, task: str) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        if (result.encoder, result.task) == (encoder, task):
            found.setdefault(result.method, []).append(result)
    return found


def error_table(
    results: Sequence[Result], encoder: str, names: Sequence[str], tasks: Sequence[str], costs: Costs
) -> str:
    """A line for each of some methods, a column for each task; the head does not count as trained."""
    heads = ["method", "trained", *(("kept / full", "step / full") if costs else ()), *tasks]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "--:|" * (len(heads) - 1)]
    for name in names:
        held = [by_method(results, encoder, task).get(name, []) for task in tasks]
        if any(held):
            counts = sorted({result.trained[0] for found in held for result in found})
            trained = " / ".join(f"{count / 1e6:.2f} M" if count else "0" for count in counts)
            cells = [name, trained, *map(in_cell, held)]
            if costs:
                cells[2:2] = [f"{ratio:.2f}" for ratio in costs[name]] if name in costs else ["", ""]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main_table(results: Sequence[Result], encoder: str, costs: Costs) -> str:
    """All methods on all tasks, beside what they cost."""
    tasks = [task for task in TASKS if by_method(results, encoder, task)]
    return error_table(results, encoder, list(METHODS), tasks, costs)


def choice_table(results: Sequence[Result], encoder: str, costs: Costs) -> str:
    """What one changed setting changes, as far as it was measured."""
    tasks = [task for task in TASKS if {*CHOICES} & {*by_method(results, encoder, task)}]
    return error_table(results, encoder, [L_ONLY, "E+L", "E+L+P", *CHOICES], tasks, {})


def rate_table(results: Sequence[Result], encoder: str, costs: Costs) -> str:
    """The rates that the methods chose, with a mark where the best rate is the lowest or the highest."""
    tasks = [task for task in TASKS if by_method(results, encoder, task)]
    lines = [f"| method | rates | {' | '.join(tasks)} |", "|---|---|" + "--:|" * len(tasks)]
    for method, known in METHODS.items():
        cells = []
        for task in tasks:
            held = by_method(results, encoder, task).get(method, [])
            chosen = sorted({result.rate for result in held if result.seed})
            tried = [result.rate for result in held if not result.seed]
            edge = "*" if chosen and chosen[0] in (min(tried), max(tried)) else ""
            cells.append("".join(f"{rate:g}" for rate in chosen) + edge)
        if any(cells):
            lines.append(f"| {method} | {', '.join(f'{rate:g}' for rate in known.rates)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def comparison_table(results: Sequence[Result], encoder: str, costs: Costs) -> str:
    """The ELP settings against LoRA and full fine-tuning: differences of test errors and p-values."""
    lines = ["| task | setting | minus LoRA | p | minus full fine-tuning | p |", "|---|---|--:|--:|--:|--:|"]
    for task in TASKS:
        found = by_method(results, encoder, task)
        for method in (L_ONLY, "L", "E", "E+L", "E+L+P"):
            if method not in found or not per_seed(found[method], "test"):
                continue
            cells = []
            for other in (LORA, FULL):
                one, two = per_seed(found[method], "test"), per_seed(found.get(other, []), "test")
                common = sorted({*one} & {*two})
                p = p_value(found[method], found.get(other, []), "test")
                cells.append(f"{statistics.mean(one[s] - two[s] for s in common):+.1f}" if common else "")
                cells.append("" if p is None else f"{p:.3f}")
            lines.append(f"| {task} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def further_table(results: Sequence[Result], encoder: str, costs: Costs) -> str:
    """The errors on test that are not in the main table: trials across sets, each slot, and words."""
    parts = []
    for task in TASKS:
        found = by_method(results, encoder, task)
        names = sorted({n for held in found.values() for r in held for n in r.errors if n.startswith("test ")})
        if names:
            heads = [name.removeprefix("test ") for name in names]
            lines = [f"| {task}, test | {' | '.join(heads)} |", "|---|" + "--:|" * len(heads)]
            for method in METHODS:
                cells = [with_deviation([*per_seed(found.get(method, []), name).values()]) for name in names]
                if any(cells):
                    lines.append(f"| {method} | {' | '.join(cells)} |")
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


NONE_TRAINED = 10_000  # Where a method without trained parameters is drawn: a logarithm has no zero.


def draw_quality(results: Sequence[Result], encoder: str) -> Figure:
    """Error on test against trained parameters, a panel for each task, one below the other: legible on a phone."""
    tasks = [task for task in TASKS if by_method(results, encoder, task)]
    figure = Figure(figsize=(5.2, 2.5 * len(tasks) + 1.5), layout="constrained")
    panels = figure.subplots(len(tasks), squeeze=False, sharex=True)[:, 0]
    markers = dict(zip(METHODS, "os^Dv<>Ph*X", strict=True))
    drawn: dict[str, Any] = {}
    for axes, task in zip(panels, tasks, strict=True):
        for method, held in by_method(results, encoder, task).items():
            values = [*per_seed(held, "test").values()]
            if method in METHODS and values:
                x = max(held[0].trained[0], NONE_TRAINED)
                deviation = statistics.stdev(values) if len(values) > 1 else 0.0
                color = "#64748b" if METHODS[method].options.get("method") else "#c2410c"  # ELP-adapters stand out.
                drawn[method] = axes.errorbar(x, statistics.mean(values), deviation, fmt=markers[method], color=color)
        axes.set_xscale("log")
        axes.set_title(f"{task}: {TASKS[task].error}, %", fontsize=10)
    panels[-1].set_xlabel(f"parameters trained in the encoder ({NONE_TRAINED:,}: none)")
    figure.legend(
        [drawn[m] for m in METHODS if m in drawn],
        [m for m in METHODS if m in drawn],
        loc="outside lower center",
        ncols=2,
        fontsize=9,
    )
    return figure


def draw_layers(results: Sequence[Result], encoder: str) -> Figure:
    """The layer weights of the L-adapter of each task, mean over seeds."""
    means = {}
    for task in TASKS:
        held = [result for result in by_method(results, encoder, task).get(L_ONLY, []) if result.seed]
        if held:
            means[task] = [(int(n), statistics.mean(result.shares[n] for result in held)) for n in held[0].shares]
    return plot_layer_weights(means)


REPORTS = {
    "methods": main_table,
    "comparisons": comparison_table,
    "further": further_table,
    "rates": rate_table,
    "choices": choice_table,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="File with all results.")
    parser.add_argument("--page", type=Path, required=True, help="Markdown file with marks for the tables.")
    parser.add_argument("--plots", type=Path, help="Folder for the figures.")
    parser.add_argument(
        "--cost",
        nargs=2,
        action="append",
        default=[],
        metavar=("ENCODER", "FILE"),
        help="What `measure_cost.py methods --output FILE` measured for an encoder.",
    )
    args = parser.parse_args(argv)
    results = read_results(args.json)
    costs = {encoder: read_costs(Path(file)) for encoder, file in args.cost}
    encoders = list(dict.fromkeys(result.encoder for result in results))
    page = args.page.read_text(encoding="utf-8")
    for encoder, (name, make) in itertools.product(encoders, REPORTS.items()):
        mark = f"<!-- table: {encoder}, {name} -->\n"
        before, found, after = page.partition(mark)
        if found:
            _, end, after = after.partition("<!-- end -->")
            page = f"{before}{mark}{make(results, encoder, costs.get(encoder, {}))}\n{end}{after}"
    args.page.write_text(page, encoding="utf-8")
    for encoder in encoders if args.plots else ():
        args.plots.mkdir(parents=True, exist_ok=True)
        for name, draw in {"quality": draw_quality, "layers": draw_layers}.items():
            draw(results, encoder).savefig(args.plots / f"{name}-{encoder.split()[0].lower()}.svg")


if __name__ == "__main__":
    main()
