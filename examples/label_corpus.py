"""Label many recordings with several adapters of one base, in several processes.

    python examples/label_corpus.py --adapters emotions english --recordings calls/ --output labels

Each process loads the backbone once. `MultiTaskModel` answers for all adapters in one call, and adapters that allow
it share one pass through the encoder. The answers are Parquet files with the columns `file`, one for each adapter, its
score if it names labels, and `error` for recordings that cannot be used; if there are any, the status is 1. If the
work stops, the same command goes on with the recordings that have no answer. Needs `pip install 'peft-elp[ray]'`; on a
Ray cluster, the processes are on all of its machines.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from pyarrow import parquet
from ray.data import SaveMode
from transformers import HfArgumentParser
from transformers.utils import logging

from peft_elp import MultiTaskModel
from peft_elp.recipes import option
from peft_elp.speech.audio import find_recordings
from peft_elp.speech.inference import SpeechAdapter


@dataclass
class Arguments:
    """The options of the command line."""

    adapters: list[str] = field(metadata={"help": "Folders of adapters, or names on the Hub, of one base."})
    recordings: list[str] = field(metadata={"help": "Files, folders, or patterns such as 'calls/**/*.wav'."})
    output: str = field(metadata={"help": "Folder for the answers."})
    processes: int = option(2, "How many processes answer.")
    cpus: float = option(1, "CPU cores of each process.")
    gpus: float = option(0, "GPUs of each process; 0.5 lets two share one.")
    files_per_block: int = option(256, "Answers in a file; what an interruption loses.")


class Labeller:
    """What one process does: load the adapters once, then answer for batches of files."""

    def __init__(self, adapters: Sequence[str], device: str) -> None:
        logging.set_verbosity_error()  # A base that comes with a new head is meant here.
        logging.disable_progress_bar()
        loaded = [SpeechAdapter.from_pretrained(name, device=device) for name in adapters]
        self.adapters = {Path(name).name: adapter for name, adapter in zip(adapters, loaded, strict=True)}
        self.tasks = MultiTaskModel({name: adapter.model for name, adapter in self.adapters.items()}).eval()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        answers = [self.answer(str(file)) for file in batch["file"]]
        return {column: [answer[column] for answer in answers] for column in answers[0]}

    @torch.inference_mode()
    def answer(self, file: str) -> dict[str, Any]:
        """Return the text, or the label with its score, of each adapter for one file."""
        first = next(iter(self.adapters.values()))
        answer: dict[str, Any] = {"file": file}
        for name, adapter in self.adapters.items():
            answer |= {name: ""} if adapter.tokenizer else {name: "", f"{name}_score": float("nan")}
        answer["error"] = ""
        try:
            waveform = first.read(file)
        except ValueError as error:
            return answer | {"error": str(error)}
        made = first.feature_extractor(waveform, sampling_rate=first.sampling_rate, return_tensors="pt")
        parameter = next(self.tasks.parameters())
        for name, outputs in self.tasks(**made.to(parameter.device, dtype=parameter.dtype)).items():
            adapter, logits = self.adapters[name], outputs.logits[0].float()
            if adapter.tokenizer:
                answer[name] = adapter.tokenizer.decode(logits.argmax(dim=-1))
                continue
            score, best = logits.softmax(dim=-1).max(dim=-1)
            config: Any = adapter.model.get_base_model().config
            answer |= {name: config.id2label[int(best)], f"{name}_score": round(float(score), 4)}
        return answer


def answered(output: str) -> dict[str, str]:
    """Return the files that have a row in the output, each with its error, which is empty where there is none."""
    tables = [parquet.read_table(file, columns=["file", "error"]) for file in Path(output).glob("*.parquet")]
    return {row["file"]: row["error"] for table in tables for row in table.to_pylist()}


def unanswered(names: Sequence[str], output: str) -> list[str]:
    """Return the recordings that have no row in the output yet."""
    done = answered(output)
    return [file for file in find_recordings(names)[0] if file not in done]


def main(argv: Sequence[str] | None = None) -> int:
    """Label the files that have no answer; return how many files in the output have an error instead."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(args=argv)  # pyright: ignore[reportArgumentType]
    files = unanswered(args.recordings, args.output)
    print(f"{len(files)} recordings have no answer in {args.output}.")
    if files:
        blocks = max(args.processes, -(-len(files) // args.files_per_block))
        dataset = ray.data.from_items([{"file": file} for file in files], override_num_blocks=min(blocks, len(files)))
        answers = dataset.map_batches(
            Labeller,
            fn_constructor_args=([str(name) for name in args.adapters], "cuda" if args.gpus else "cpu"),
            batch_size=16,
            compute=ray.data.ActorPoolStrategy(size=args.processes),
            num_cpus=args.cpus,
            num_gpus=args.gpus,
        )
        answers.write_parquet(str(Path(args.output).resolve()), mode=SaveMode.APPEND)
    failed = [f"{file}: {error}" for file, error in answered(args.output).items() if error]
    if failed:
        print(f"{len(failed)} recordings have an error instead of an answer, such as {failed[0]}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(bool(main()))
