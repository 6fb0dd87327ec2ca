"""Compare methods on several tasks with several seeds: `python examples/compare_methods.py --grid grid.json`.

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

import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

# In per cent, except minDCF. all_results.json of a run has its other metrics.
METRICS = {
    "eval_wer": "WER %",
    "eval_cer": "CER %",
    "eval_eer": "EER %",
    "eval_eer_s_norm": "EER % (s-norm)",
    "eval_min_dcf": "minDCF",
    "eval_unweighted_accuracy": "unweighted accuracy %",
    "eval_weighted_accuracy": "weighted accuracy %",
    "eval_accuracy": "accuracy %",
}


@dataclass
class Arguments:
    """The options of the command line."""

    grid: str = field(metadata={"help": "A JSON file with tasks, methods and seeds."})
    output_dir: str = field(default="outputs/compare", metadata={"help": "Folder for the runs and the table."})


@dataclass
class Run:
    """One training of a task by a method with a seed."""

    task: str
    method: str
    seed: int
    command: list[str]
    folder: Path

    def results(self) -> dict[str, Any] | None:
        """The metrics, or None if this command has not finished successfully."""
        ended = self.folder / "command.json"
        if not ended.is_file() or json.loads(ended.read_text(encoding="utf-8")) != self.command:
            return None
        return json.loads((self.folder / "all_results.json").read_text(encoding="utf-8"))

    def start(self) -> bool:
        """Run the command, with its output in log.txt; returns whether it succeeded."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "command.json").unlink(missing_ok=True)
        (self.folder / "all_results.json").unlink(missing_ok=True)
        with (self.folder / "log.txt").open("w", encoding="utf-8") as log:
            ended_well = subprocess.run(self.command, stdout=log, stderr=subprocess.STDOUT).returncode == 0
        if ended_well:
            (self.folder / "command.json").write_text(json.dumps(self.command), encoding="utf-8")
        return ended_well


def runs_of(grid: dict[str, Any], output_dir: Path) -> Iterator[Run]:
    """All runs of a grid: every task and method with the first seed, then with the next.

    Raises:
        ValueError: The grid lacks a part.
    """
    if absent := [part for part in ("tasks", "methods", "seeds") if not grid.get(part)]:
        raise ValueError(f"The grid has no {', '.join(absent)}; it needs tasks, methods and seeds.")
    settings = grid.get("settings", {})
    named = [(task, "tasks") for task in settings]
    named += [(method, "methods") for methods in settings.values() for method in methods]
    if strange := [f"{name!r}, which is not in {part}" for name, part in named if name not in grid[part]]:
        raise ValueError(f"The settings name {strange[0]}: {', '.join(grid['tasks'])}; {', '.join(grid['methods'])}.")
    for seed in grid["seeds"]:
        for task, command in grid["tasks"].items():
            for method, options in grid["methods"].items():
                folder = output_dir / task / method / f"seed-{seed}"
                words = [
                    *shlex.split(command),
                    *shlex.split(options),
                    *shlex.split(settings.get(task, {}).get(method, "")),
                    "--seed",
                    str(seed),
                    "--output_dir",
                    str(folder),
                ]
                yield Run(task, method, seed, [sys.executable, *words], folder)


def table(runs: Sequence[Run]) -> str:
    """A Markdown table for each task, with a line for each method."""
    parts = []
    for task in dict.fromkeys(run.task for run in runs):
        by_method: dict[str, list[dict[str, Any]]] = {}
        for run in runs:
            if run.task == task:
                found = run.results()
                by_method.setdefault(run.method, []).extend([found] if found else [])
        everything = [results for found in by_method.values() for results in found]
        metrics = [metric for metric in METRICS if any(metric in results for results in everything)]
        header = ["method", "trained in the encoder", "in the head", *(METRICS[metric] for metric in metrics), "seeds"]
        lines = [f"### {task}", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        for method, found in by_method.items():
            sizes = [
                " / ".join(sorted({f"{results[f'trained_parameters_{part}']:,}" for results in found})) or "-"
                for part in ("encoder", "head")
            ]
            cells = [method, *sizes, *(mean_and_deviation(metric, found) for metric in metrics), str(len(found))]
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def mean_and_deviation(metric: str, found: Sequence[dict[str, Any]]) -> str:
    """Mean and sample standard deviation over seeds."""
    values = [results[metric] * (1 if "dcf" in metric else 100) for results in found if metric in results]
    digits = 3 if "dcf" in metric else 1
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the missing runs of a grid; returns the number of failed ones."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(args=argv)  # pyright: ignore[reportArgumentType]
    output_dir = Path(args.output_dir)
    runs = list(runs_of(json.loads(Path(args.grid).read_text(encoding="utf-8")), output_dir))
    failed = 0
    for number, run in enumerate(runs, start=1):
        if run.results() is not None:
            continue
        start = time.perf_counter()
        ended_well = run.start()
        failed += not ended_well
        what = "took" if ended_well else f"FAILED, see {run.folder / 'log.txt'}, after"
        print(f"{number}/{len(runs)} {run.folder} {what} {time.perf_counter() - start:.0f} s", flush=True)
        (output_dir / "table.md").write_text(table(runs), encoding="utf-8")
    print(f"\n{table(runs)}")
    if failed:
        print(f"{failed} of {len(runs)} runs failed; the same command tries them again.")
    return failed


if __name__ == "__main__":
    sys.exit(bool(main()))
