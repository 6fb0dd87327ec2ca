"""What the benchmarks share: recordings, the methods that they compare, error rates, stored trainings and tables."""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForAudioClassification

from peft_elp import recipes
from peft_elp.speech.audio import decode
from peft_elp.speech.data import read_table, read_trials
from peft_elp.speech.metrics import cosine_scores, equal_error_rate

RATE_HZ, SPLITS = 16_000, ("train", "validation", "test")
Row = dict[str, Any]  # the columns of a recording, its path under "file" and its samples under "audio"

# Methods -------------------------------------------------------------------------------------------------------------

HEAD, WEIGHTED, FULL = "head only", "weighted sum of layers + head", "full fine-tuning"
LORA, Q_AND_V = "LoRA, as many parameters as E+L", "LoRA, r=8 on q and v"
L_ONLY, BESIDE, CONVENTIONAL = "L without layer norms", "L beside the last layer", "conventional adapters"
SUM, SOME_LORA, SEARCH = "normalised sum of layers", "LoRA", "peft-elp train"

# Options of `recipes.ModelArguments`. LORA gets its rank from `equal_rank`, and WEIGHTED a setting of the encoder.
METHODS: dict[str, dict[str, Any]] = {
    HEAD: {"method": "head"},
    L_ONLY: {"adapters": "L", "train_layer_norms": False},
    "E+L": {"adapters": "EL"},
    LORA: {"method": "lora"},
    FULL: {"method": "full"},
    "E+L+P": {"adapters": "ELP"},
    WEIGHTED: {"method": "head"},
    "L": {"adapters": "L"},
    "E": {"adapters": "E"},
    Q_AND_V: {"method": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_modules": ["q_proj", "v_proj"]},
    # With the start of the others: on Whisper the paper's diverges at their rates (docs/reference/starts.md).
    CONVENTIONAL: {"preset": "conventional", "init_weights": True},
}


def equal_rank(config: Any, elp: dict[str, Any]) -> int:
    """Return the rank at which LoRA trains as much of an encoder as ELP-adapters with these settings."""
    counts = []
    for options in (elp, {"method": "lora", "lora_r": 1}):
        with torch.device("meta"):
            model = AutoModelForAudioClassification.from_config(config)
            model = recipes.adapt(model, recipes.ModelArguments(model_name_or_path="", **options))
        counts.append(recipes.count_trained(model)["trained_parameters_encoder"])
    return max(1, round(counts[0] / counts[1]))


# Recordings ----------------------------------------------------------------------------------------------------------


def read_rows(folder: Path, split: str, seconds: int) -> list[Row]:
    """Read a split in `audiofolder` layout; only the first `seconds` of each recording are kept."""
    rows = []
    for row in read_table(folder / split / "metadata.csv"):
        file = folder / split / row["file_name"]
        rows.append({**row, "file": str(file.resolve()), "audio": decode(file, RATE_HZ)[: seconds * RATE_HZ]})
    return rows


def read_pairs(trials: Path) -> tuple[list[int], list[tuple[str, str]]]:
    """Return the labels and the files of a list of trials, whose paths start from its folder."""
    listed = read_trials(trials, trials.parent)
    pairs = [(str(Path(trial.file_a).resolve()), str(Path(trial.file_b).resolve())) for trial in listed]
    return [trial.label for trial in listed], pairs


def pair_error(embeddings: dict[Any, Any], rows: Sequence[Row]) -> float:
    """Return the equal error rate of all pairs of recordings in per cent."""
    pairs = list(combinations(rows, 2))
    same = [a["speaker_id"] == b["speaker_id"] for a, b in pairs]
    return 100 * equal_error_rate(same, cosine_scores(embeddings, [(a["file"], b["file"]) for a, b in pairs]))


# Results -------------------------------------------------------------------------------------------------------------


def train_once(file: Path, settings: Any, train: Callable[[], Any]) -> Any:
    """Return the result of a training that is stored with the same settings, or train and store it, unless None."""
    stored = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if stored.get("settings") == settings:
        return stored["result"]
    result = train()
    if result is not None:
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({"settings": settings, "result": result}), encoding="utf-8")
        unfinished.replace(file)
    return result


def with_deviation(values: Sequence[float], digits: int = 1) -> str:
    """Return mean and sample standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}" if values else ""


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table. The columns after the first `left` ones are numbers."""
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * left + "--:|" * (len(header) - left), *lines[1:]])
