"""Measure what many adapters on one backbone cost: `python examples/measure_cost.py`.

The backbone is a random wav2vec 2.0 of base size (12 layers, 768 wide), because costs do not depend on the weights.
Prints the time to load and to switch an adapter and its memory, with 2 and with 50 adapters, for ELP and LoRA. Also
prints the time of one pass for several tasks, next to one pass per task. Takes 2 minutes on 2 CPU cores.
"""

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from typing import Any

import psutil
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import HfArgumentParser, Wav2Vec2Config, Wav2Vec2ForSequenceClassification

from peft_elp import ELPConfig


@dataclass
class Arguments:
    """The options of the command line."""

    adapters: int = field(default=50, metadata={"help": "Adapters of the default size to load."})
    tasks: int = field(default=4, metadata={"help": "Tasks to run in one pass."})
    seconds: float = field(default=5.0, metadata={"help": "Length of each utterance."})
    batch_size: int = field(default=4, metadata={"help": "Utterances in a batch."})
    repeats: int = field(default=5, metadata={"help": "Repetitions of each timing of a forward pass."})


def backbone() -> Wav2Vec2ForSequenceClassification:
    torch.manual_seed(0)
    config = Wav2Vec2Config.from_dict({"layerdrop": 0.0, "num_labels": 4})
    return Wav2Vec2ForSequenceClassification(config).eval()


def median_s(call: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def many_adapters(method: str, config: PeftConfig, number: int) -> None:
    process = psutil.Process()
    model: Any = get_peft_model(backbone(), config, adapter_name="a0").eval()
    own = sum(p.numel() for n, p in model.named_parameters() if ".a0." in n)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        before = process.memory_info().rss
        loading, switching = [], {}
        for count in range(2, number + 1):
            start = time.perf_counter()
            model.load_adapter(f"{folder}/a0", f"a{count - 1}")
            loading.append(time.perf_counter() - start)
            if count in (2, number):
                names = cycle([f"a{index}" for index in range(count)])
                switch = partial(lambda names: model.set_adapter(next(names), inference_mode=True), names)
                switching[count] = median_s(switch, 200)
    grown = (process.memory_info().rss - before) / (number - 1)
    print(
        f"{method}: {own / 1e6:.2f} M parameters an adapter, {grown / 2**20:.1f} MiB of memory each "
        f"({grown / 4 / own:.2f} of their float32 size); loading {loading[0] * 1e3:.0f} ms (2nd) to "
        f"{loading[-1] * 1e3:.0f} ms ({number}th); switching {switching[2] * 1e6:.0f} us with 2, "
        f"{switching[number] * 1e6:.0f} us with {number}"
    )


def tasks_in_one_pass(args: Arguments) -> None:
    names = [f"t{task}" for task in range(args.tasks)]
    config = ELPConfig(adapters="L", train_layer_norms=False)
    model: Any = get_peft_model(backbone(), config, adapter_name=names[0]).eval()
    for name in names[1:]:
        model.add_adapter(name, config)
    waveforms = torch.randn(args.batch_size, int(args.seconds * 16_000))

    def one_by_one() -> list[torch.Tensor]:
        outputs = []
        for name in names:
            model.set_adapter(name, inference_mode=True)
            outputs.append(model(waveforms).logits)
        return outputs

    def together() -> list[torch.Tensor]:
        return [output.logits for output in model.forward_all(names, waveforms).values()]

    with torch.inference_mode():
        for one, other in zip(one_by_one(), together(), strict=True):
            torch.testing.assert_close(one, other)
        alone = median_s(lambda: model(waveforms), args.repeats)
        separate, shared = median_s(one_by_one, args.repeats), median_s(together, args.repeats)
        with model.disable_adapter():
            plain = median_s(lambda: model(waveforms), args.repeats)
    print(
        f"{args.tasks} tasks on {args.batch_size} x {args.seconds:g} s: one pass for all {shared:.2f} s, one pass a "
        f"task {separate:.2f} s (ratio {shared / separate:.2f}); one task {alone:.2f} s, the backbone without "
        f"adapters {plain:.2f} s; each further task costs {(shared - alone) / (args.tasks - 1) / plain:.1%} of a "
        "plain pass"
    )


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()  # pyright: ignore[reportArgumentType]
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    many_adapters("ELP", ELPConfig(), args.adapters)
    targets = ["intermediate_dense", "output_dense"]
    many_adapters(
        "LoRA", LoraConfig(target_modules=targets, modules_to_save=["projector", "classifier"]), args.adapters
    )
    tasks_in_one_pass(args)


if __name__ == "__main__":
    main()
