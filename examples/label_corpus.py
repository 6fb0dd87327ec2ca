"""Label many recordings with several adapters of one base, in several processes.

    python examples/label_corpus.py --adapters emotions intents --recordings 'calls/**/*.wav' --output labels

Each process loads the backbone once. `MultiTaskModel` answers for all adapters in one call, and adapters that allow
it share one pass through the encoder. The answers are Parquet files with the columns `file`, one for each adapter,
and `error` for recordings that cannot be used. If the work stops, the same command goes on with the recordings that
have no answer. Needs `pip install 'peft-elp[ray]'`; on a Ray cluster, the processes are on all of its machines.
"""

import glob
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

from peft_elp import MultiTaskModel
from peft_elp.speech.inference import SpeechAdapter


@dataclass
class Arguments:
    """The options of the command line."""

    adapters: list[str] = field(metadata={"help": "Folders of adapters, or names on the Hub, of one base."})
    recordings: str = field(metadata={"help": "Files, as a pattern."})
    output: str = field(metadata={"help": "Folder for the answers."})
    processes: int = field(default=2, metadata={"help": "How many processes answer."})
    cpus: float = field(default=1, metadata={"help": "CPU cores of each process."})
    gpus: float = field(default=0, metadata={"help": "GPUs of each process; 0.5 lets two share one."})
    files_per_block: int = field(default=256, metadata={"help": "Answers in a file; what an interruption loses."})


class Labeller:
    """What one process does: load the adapters once, then answer for batches of files.

    Args:
        adapters: The adapters.
        device: Where they run.
    """

    def __init__(self, adapters: Sequence[str], device: str) -> None:
        loaded = [SpeechAdapter.from_pretrained(name, device=device) for name in adapters]
        self.adapters = {Path(name).name: adapter for name, adapter in zip(adapters, loaded, strict=True)}
        self.tasks = MultiTaskModel({name: adapter.model for name, adapter in self.adapters.items()}).eval()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        answers = [self.answer(str(file)) for file in batch["file"]]
        return {column: [answer[column] for answer in answers] for column in ("file", *self.adapters, "error")}

    @torch.inference_mode()
    def answer(self, file: str) -> dict[str, str]:
        """The label or the text of each adapter for one file."""
        first = next(iter(self.adapters.values()))
        answer = {"file": file, "error": "", **dict.fromkeys(self.adapters, "")}
        try:
            waveform = first.read(file)
        except ValueError as error:
            return answer | {"error": str(error)}
        made = first.feature_extractor(waveform, sampling_rate=first.sampling_rate, return_tensors="pt")
        parameter = next(self.tasks.parameters())
        inputs = {name: x.to(parameter.device) for name, x in made.items()}
        inputs = {name: x.to(parameter.dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        for name, outputs in self.tasks(**inputs).items():
            answer[name] = self.in_words(self.adapters[name], outputs.logits[0].argmax(dim=-1))
        return answer

    def in_words(self, adapter: SpeechAdapter, best: torch.Tensor) -> str:
        """The name of the best label, or the text of the best tokens."""
        if adapter.tokenizer is not None:
            return adapter.tokenizer.decode(best)
        config: Any = adapter.model.get_base_model().config
        return config.id2label[int(best)]


def unanswered(pattern: str, output: str) -> list[str]:
    """The files of a pattern that have no row in the output yet."""
    there = sorted(glob.glob(pattern, recursive=True))
    if not there:
        raise ValueError(f"No file is named like {pattern!r}.")
    tables = [parquet.read_table(file, columns=["file"]) for file in Path(output).glob("*.parquet")]
    done = {file for table in tables for file in table["file"].to_pylist()}
    return [file for file in there if file not in done]


def main(argv: Sequence[str] | None = None) -> int:
    """Label the files that have no answer; returns how many there were."""
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
    return len(files)


if __name__ == "__main__":
    main()
