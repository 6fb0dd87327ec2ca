"""Compare methods on several tasks with several seeds.

    python examples/benchmarks/compare_methods.py --grid grid.json

The grid is a JSON file. Each run is the command of a task with the options of a method and a seed:

    {
      "tasks": {"intents": "examples/run_intent_classification.py --dataset_name demo/intents ..."},
      "methods": {"ELP": "--method elp", "EL": "--method elp --adapters EL", "head": "--method head"},
      "settings": {"intents": {"ELP": "--learning_rate 3e-3"}},
      "seeds": [0, 1, 2]
    }

"settings" adds options for one method in one task, and is optional. Each run is a process that writes to
`<output_dir>/<task>/<method>/seed-<seed>`, one after the other. A run that has finished with the same command is not
repeated, so a grid can be stopped, continued and extended. After every run, `<output_dir>/table.md` has mean and
standard deviation over seeds.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common import table, train_once, with_deviation

METRICS = ["wer", "cer", "eer", "eer_s_norm", "min_dcf", "unweighted_accuracy", "weighted_accuracy", "accuracy"]
Run = tuple[str, str, int]  # task, method and seed


def commands_of(grid: dict[str, Any]) -> dict[Run, list[str]]:
    """Return the command of each run: every task and method with the first seed, then with the next.

    Raises:
        ValueError: The grid lacks a part, or its settings name a task or method that it does not have.
    """
    if absent := [part for part in ("tasks", "methods", "seeds") if not grid.get(part)]:
        raise ValueError(f"The grid has no {', '.join(absent)}; it needs tasks, methods and seeds.")
    tasks, methods, settings = grid["tasks"], grid["methods"], grid.get("settings", {})
    chosen = {method for options in settings.values() for method in options}
    if unknown := [*({*settings} - {*tasks}), *(chosen - {*methods})]:
        raise ValueError(
            f"The settings name {unknown[0]!r}, which is not in the grid: {', '.join(tasks)}; {', '.join(methods)}."
        )
    return {
        (task, method, seed): shlex.split(f"{command} {options} {more.get(method, '')} --seed {seed}")
        for seed in grid["seeds"]
        for task, command in tasks.items()
        for more in [settings.get(task, {})]
        for method, options in methods.items()
    }


def run(command: Sequence[str], folder: Path) -> dict[str, Any] | None:
    """Run a command, with its output in log.txt; return its metrics, or None if it failed."""
    start = time.perf_counter()
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        words = [sys.executable, *command, "--output_dir", str(folder)]
        failed = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT).returncode != 0
    what = f"FAILED, see {folder / 'log.txt'}, after" if failed else "took"
    print(f"{folder} {what} {time.perf_counter() - start:.0f} s", flush=True)
    return None if failed else json.loads((folder / "all_results.json").read_text(encoding="utf-8"))


def tables(results: Mapping[Run, dict[str, Any] | None]) -> str:
    """Return a Markdown table for each task, with a line for each method."""
    parts = []
    for task in dict.fromkeys(task for task, *_ in results):
        found = [(method, result or {}) for (name, method, _), result in results.items() if name == task]
        metrics = [name for name in METRICS if any(f"eval_{name}" in result for _, result in found)]
        rows = []
        for method in dict.fromkeys(method for method, _ in found):
            ended = [result for name, result in found if name == method and result]
            sizes = [{f"{one[f'trained_parameters_{part}']:,}" for one in ended} for part in ("encoder", "head")]
            cells = [" / ".join(sorted(each)) for each in sizes]
            for name in metrics:
                factor, digits = (1, 3) if "dcf" in name else (100, 1)
                values = [factor * result[f"eval_{name}"] for result in ended if f"eval_{name}" in result]
                cells.append(with_deviation(values, digits))
            rows.append([method, *(cell or "-" for cell in cells), str(len(ended))])
        names = [name if "dcf" in name else f"{name}, %" for name in metrics]
        header = ["method", "trained in the encoder", "in the head", *names, "seeds"]
        parts.append(f"### {task}\n\n{table(header, rows)}\n")
    return "\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the missing runs of a grid; return the number of failed ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=Path, required=True, help="A JSON file with tasks, methods and seeds.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/compare"), help="For the runs and the table.")
    args = parser.parse_args(argv)
    commands = commands_of(json.loads(args.grid.read_text(encoding="utf-8")))
    results: dict[Run, dict[str, Any] | None] = dict.fromkeys(commands)
    for (task, method, seed), command in commands.items():
        folder = args.output_dir / task / method / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        results[task, method, seed] = train_once(folder / "run.json", command, partial(run, command, folder))
        (args.output_dir / "table.md").write_text(tables(results), encoding="utf-8")
    failed = list(results.values()).count(None)
    print(f"\n{tables(results)}\n{failed} of {len(results)} runs failed; the same command tries them again.")
    return failed


if __name__ == "__main__":
    sys.exit(bool(main()))
