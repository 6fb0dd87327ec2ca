"""Measure what adapters cost, on random encoders, because costs do not depend on the weights.

    python examples/benchmarks/measure_cost.py methods --output cost.json
    python examples/benchmarks/measure_cost.py adapters

`methods` compares ELP with LoRA, full fine-tuning and a head alone, interleaved in one run: trained parameters, the
bytes that a training step keeps for its backward pass, floating-point operations, and times as ratios. With `--size
overhead` the arithmetic takes next to no time, and what is left is the Python work of each layer. `adapters` measures
many adapters on one wav2vec 2.0: placing, loading, switching, memory, and one pass for several tasks.
docs/reference/cost.md has results.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any
from weakref import WeakSet

import common
import psutil
import torch
import transformers
from common import CONVENTIONAL, FULL, HEAD, L_ONLY, LORA, Q_AND_V, WEIGHTED
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForAudioClassification, Wav2Vec2Config, Wav2Vec2ForSequenceClassification

from peft_elp import ELPConfig, FeatureCache, find_encoder, recipes, speed_up_frozen
from peft_elp.feature_cache import CACHED

# methods: one training step and one inference of each method ---------------------------------------------------------

# Width, layers, attention heads and width of the feed-forward modules.
WIDTHS = {"base": (768, 12, 12, 3072), "large": (1024, 24, 16, 4096), "whisper-tiny": (384, 4, 6, 1536)}
WIDTHS |= {"tiny": (32, 3, 2, 64), "overhead": (32, 12, 2, 64)}
# FLOOR is what every method costs at least that trains something in the first layer.
FLOOR, CACHED_L = "head only, with a gradient through all layers", f"{L_ONLY}, from cached features"
HALF_L, LONG_P = "L of the lower half without layer norms", "E+L+P, 16 pseudo features"
METHODS: dict[str, dict[str, Any]] = {
    **{name: common.METHODS[name] for name in (HEAD, WEIGHTED)},
    FLOOR: {"method": "head"},
    **{name: common.METHODS[name] for name in (LORA, Q_AND_V, CONVENTIONAL, "E", "L", L_ONLY)},
    CACHED_L: common.METHODS[L_ONLY],
    HALF_L: common.METHODS[L_ONLY],
    "P": {"adapters": "P"},
    **{name: common.METHODS[name] for name in ("E+L", "E+L+P")},
    LONG_P: {"adapters": "ELP", "p_length": 16},
    FULL: common.METHODS[FULL],
}


@dataclass
class Cost:
    """What one method costs."""

    method: str
    trained: int  # parameters, with the head
    saved_mib: float  # what a training step keeps for its backward pass, parameters and buffers apart
    forward_gflop: float  # 10^9 floating-point operations of a training step
    backward_gflop: float
    step_s: list[float] = field(default_factory=list)  # in each round
    inference_s: list[float] = field(default_factory=list)


def config_of(args: argparse.Namespace, weighted: bool = False) -> Any:
    width, layers, heads, inside = WIDTHS[args.size]
    if args.family == "whisper":
        sizes = {"d_model": width, "encoder_layers": layers, "encoder_attention_heads": heads}
        sizes |= {"encoder_ffn_dim": inside, "decoder_layers": 1, "max_source_positions": round(50 * args.seconds)}
    else:
        sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
        sizes |= {"intermediate_size": inside, "layerdrop": 0.0, "mask_time_prob": 0.0, "num_labels": 4}
        sizes |= {f"{where}_dropout": args.dropout for where in ("hidden", "attention", "activation", "feat_proj")}
        if args.size == "large":
            sizes |= {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}
        if args.size == "overhead":
            sizes |= {"conv_dim": [32] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    return AutoConfig.for_model(args.family, **sizes, use_weighted_layer_sum=weighted)


def model_of(args: argparse.Namespace, name: str) -> Any:
    """Return a random model that is prepared for one method."""
    torch.manual_seed(0)
    model: Any = AutoModelForAudioClassification.from_config(config_of(args, weighted=name == WEIGHTED))
    given = {size: value for size in ("e_dim", "l_dim", "p_length") if (value := getattr(args, size)) is not None}
    options: dict[str, Any] = {"method": "elp", **METHODS[name]}
    if name == HALF_L:
        options["l_layers"] = list(range(len(find_encoder(model).layers) // 2))
    if name == LORA:
        el = {size: value for size, value in given.items() if size != "p_length"}
        options["lora_r"] = common.equal_rank(config_of(args), {"adapters": "EL", **el})
    if options["method"] == "elp":
        letters = options.get("adapters", "E").lower()
        options = {size: value for size, value in given.items() if size[0] in letters} | options
    if name == FLOOR:
        find_encoder(model).layers[0].register_forward_pre_hook(
            lambda layer, inputs: (inputs[0].requires_grad_(torch.is_grad_enabled()), *inputs[1:])
        )
    model = speed_up_frozen(model.to(args.device))
    model = recipes.adapt(model, recipes.ModelArguments(model_name_or_path="", **options))
    if args.dtype == "bfloat16":  # The frozen weights; what is trained stays in float32.
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    if args.gradient_checkpointing:
        recipes.get_base_model(model).gradient_checkpointing_enable({"use_reentrant": False})
    return model


def inputs_of(args: argparse.Namespace) -> dict[str, Tensor]:
    """Return a batch of noise."""
    torch.manual_seed(1)
    if args.family == "whisper":
        features = torch.randn(args.batch_size, 80, 2 * round(50 * args.seconds))
        whole = torch.ones(args.batch_size, features.shape[-1], dtype=torch.long)
        return {"input_features": features, "attention_mask": whole, "labels": torch.zeros(args.batch_size).long()}
    samples = int(16_000 * args.seconds)
    return {"input_values": torch.randn(args.batch_size, samples), "labels": torch.arange(args.batch_size) % 4}


class Held:
    """A tensor that a graph keeps for the backward pass; it lives as long as its node of the graph."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(model: Any, run: Callable[[], Tensor]) -> int:
    """Count the bytes of the tensors that a forward pass keeps for the backward pass, parameters and buffers apart."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    held: WeakSet[Held] = WeakSet()  # A checkpoint around frozen layers saves its input and drops it again.

    def pack(tensor: Tensor) -> Held:
        held.add(one := Held(tensor.detach()))  # A tensor with its graph would keep the graph alive, and itself.
        return one

    with saved_tensors_hooks(pack, lambda one: one.tensor):
        loss = run()
    storages = {one.tensor.untyped_storage().data_ptr(): one.tensor.untyped_storage().nbytes() for one in held}
    del loss  # Until here, it holds the graph.
    return sum(size for address, size in storages.items() if address not in known)


class Method:
    """A model that is trained by one method, and how it runs; cached features are in `folder`."""

    def __init__(self, name: str, args: argparse.Namespace, folder: str) -> None:
        self.args, self.model, self.rows = args, model_of(args, name), None
        self.inputs = {key: value.to(args.device) for key, value in inputs_of(args).items()}
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)
        if name == CACHED_L:
            self.cache = FeatureCache(self.model, folder)
            clips = [{key: x[number, None] for key, x in self.inputs.items()} for number in range(args.batch_size)]
            self.rows = self.cache.read(clips, lambda rows: rows[0], progress=False)
        self.model.train()
        saved = saved_bytes(self.model, self.loss) / 2**20
        with FlopCounterMode(display=False) as forward:
            loss = self.loss()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        gflops = [part.get_total_flops() / 1e9 for part in (forward, backward)]
        self.cost = Cost(name, sum(parameter.numel() for parameter in trained), saved, gflops[0], gflops[1])

    def loss(self) -> Tensor:
        bfloat16 = self.args.autocast or self.args.dtype == "bfloat16"
        context = torch.autocast(self.args.device.split(":")[0], torch.bfloat16) if bfloat16 else nullcontext()
        with context:
            return self.model(**self.batch()).loss

    def batch(self) -> dict[str, Any]:
        """Return the inputs. In training they may come from the cache, whose files are read each time."""
        if self.rows is None or not self.model.training:
            return self.inputs
        batch = self.cache.collate([self.rows[number] for number in range(self.args.batch_size)])
        features = {layer: x.to(self.args.device) for layer, x in batch.pop(CACHED).items()}
        return {CACHED: features, **{name: x.to(self.args.device) for name, x in batch.items()}}

    def step(self) -> None:
        self.model.train()
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    @torch.no_grad()
    def infer(self) -> None:
        self.model.eval()
        self.loss()


def seconds(call: Callable[[], Any], device: str = "cpu") -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def median_s(call: Callable[[], Any], repeats: int) -> float:
    return statistics.median(seconds(call) for _ in range(repeats))


def measure_methods(args: argparse.Namespace) -> None:
    names = [name for name in METHODS if args.methods is None or name in args.methods]
    if args.family == "wavlm" and Q_AND_V in names:
        names.remove(Q_AND_V)
        print(f"Left out: {Q_AND_V}. WavLM's attention reads its weights without calling their modules.")
    with tempfile.TemporaryDirectory() as folder:
        methods = [Method(name, args, folder) for name in names]
        costs = [method.cost for method in methods]
        for method in methods:  # To warm up.
            method.step()
            method.infer()
        for _ in range(args.repeats):
            for method in methods:
                method.cost.step_s.append(seconds(method.step, args.device))
                method.cost.inference_s.append(seconds(method.infer, args.device))
    about = {key: value for key, value in vars(args).items() if key not in ("measure", "output")}
    cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
    about["machine"] = cpu if args.device == "cpu" else torch.cuda.get_device_name()
    about |= {"torch": torch.__version__, "transformers": transformers.__version__}
    print("\n".join(f"{key}: {value}" for key, value in about.items()), end="\n\n")
    print(table(costs), flush=True)
    if args.output:
        found = {"about": about, "costs": [asdict(cost) for cost in costs]}
        args.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def ratio(one: Sequence[float], other: Sequence[float]) -> str:
    """Return the median of the ratios of each round, and the range of the middle half of them."""
    ratios = sorted(a / b for a, b in zip(one, other, strict=True))
    quarter = len(ratios) // 4
    return f"{statistics.median(ratios):.2f} ({ratios[quarter]:.2f} to {ratios[-1 - quarter]:.2f})"


def table(costs: Sequence[Cost]) -> str:
    """Return the costs as a Markdown table, relative to full fine-tuning and to a head alone where these were run."""
    by_name = {cost.method: cost for cost in costs}
    full, lora, head = by_name.get(FULL), by_name.get(LORA), by_name.get(HEAD)
    header = ["method", "trained", "kept, MiB", "kept / full", "kept / LoRA", "GFLOP forward + backward"]
    header += ["step / full", "step / LoRA", "inference / head only", "step, ms", "inference, ms"]
    rows = []
    for cost in costs:
        cells = [cost.method, f"{cost.trained:,}", f"{cost.saved_mib:.1f}"]
        cells += [f"{cost.saved_mib / other.saved_mib:.2f}" if other else "" for other in (full, lora)]
        cells += [f"{cost.forward_gflop:.0f} + {cost.backward_gflop:.0f}"]
        cells += [ratio(cost.step_s, other.step_s) if other else "" for other in (full, lora)]
        cells += [ratio(cost.inference_s, head.inference_s) if head else ""]
        rows.append(cells + [f"{1000 * statistics.median(taken):.2f}" for taken in (cost.step_s, cost.inference_s)])
    return common.table(header, rows)


# adapters: many on one backbone, and several tasks in one pass ------------------------------------------------------


def backbone() -> Any:
    torch.manual_seed(0)
    return Wav2Vec2ForSequenceClassification(Wav2Vec2Config.from_dict({"layerdrop": 0.0, "num_labels": 4})).eval()


def many_adapters(method: str, config: PeftConfig, number: int) -> None:
    place_s = seconds(partial(get_peft_model, backbone(), config))
    model: Any = get_peft_model(backbone(), config, adapter_name="a0").eval()
    own = sum(p.numel() for n, p in model.named_parameters() if ".a0." in n)
    process, loading, switching = psutil.Process(), [], {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        before = process.memory_info().rss
        for count in range(2, number + 1):
            loading.append(seconds(partial(model.load_adapter, f"{folder}/a0", f"a{count - 1}")))
            if count in (2, number):
                names = cycle([f"a{index}" for index in range(count)])
                switch = partial(lambda names: model.set_adapter(next(names), inference_mode=True), names)
                switching[count] = median_s(switch, 200)
    grown = (process.memory_info().rss - before) / (number - 1)
    print(
        f"{method}: {own / 1e6:.2f} M parameters an adapter, {grown / 2**20:.1f} MiB of memory each "
        f"({grown / 4 / own:.2f} of their float32 size); placing {place_s * 1e3:.0f} ms; "
        f"loading {loading[0] * 1e3:.0f} ms (2nd) to {loading[-1] * 1e3:.0f} ms ({number}th); "
        f"switching {switching[2] * 1e6:.0f} us with 2, {switching[number] * 1e6:.0f} us with {number}"
    )


def tasks_in_one_pass(args: argparse.Namespace) -> None:
    names = [f"t{task}" for task in range(args.tasks)]
    config = ELPConfig(adapters="L", train_layer_norms=False)
    model: Any = get_peft_model(backbone(), config, adapter_name=names[0]).eval()
    for name in names[1:]:
        model.add_adapter(name, config)
    waveforms = torch.randn(args.batch_size, int(args.seconds * 16_000))

    def alone(name: str) -> Tensor:
        model.set_adapter(name, inference_mode=True)
        return model(waveforms).logits

    def together() -> list[Tensor]:
        return [output.logits for output in model.forward_all(names, waveforms).values()]

    with torch.inference_mode():
        torch.testing.assert_close([alone(name) for name in names], together())
        one = median_s(partial(model, waveforms), args.repeats)
        separate = median_s(lambda: [alone(name) for name in names], args.repeats)
        shared = median_s(together, args.repeats)
        with model.disable_adapter():
            plain = median_s(partial(model, waveforms), args.repeats)
    print(
        f"{args.tasks} tasks on {args.batch_size} x {args.seconds:g} s: one pass for all {shared:.2f} s, one pass a "
        f"task {separate:.2f} s (ratio {shared / separate:.2f}); one task {one:.2f} s, the backbone without adapters "
        f"{plain:.2f} s; each further task costs {(shared - one) / (args.tasks - 1) / plain:.1%} of a plain pass"
    )


def measure_adapters(args: argparse.Namespace) -> None:
    targets, head = ["intermediate_dense", "output_dense"], ["projector", "classifier"]
    many_adapters("ELP", ELPConfig(), args.adapters)
    many_adapters("LoRA", LoraConfig(target_modules=targets, modules_to_save=head), args.adapters)
    tasks_in_one_pass(args)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one measurement and print its results. `argv` defaults to the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True)
    methods, adapters = (kinds.add_parser(name) for name in ("methods", "adapters"))
    for kind, measure, batch_size, length in (methods, measure_methods, 2, 3), (adapters, measure_adapters, 4, 5):
        kind.set_defaults(measure=measure)
        kind.add_argument("--batch_size", type=int, default=batch_size, help="Utterances in a batch.")
        kind.add_argument("--seconds", type=float, default=length, help="Length of each utterance.")
        kind.add_argument("--repeats", type=int, default=5, help="Rounds of timings.")
    option = methods.add_argument
    option("--family", default="wavlm", help="wavlm, wav2vec2, hubert, whisper, ...")
    option("--size", choices=WIDTHS, default="base", help="Size of the encoder.")
    option("--methods", nargs="+", choices=METHODS, help="Only these.")
    option("--dtype", choices=["float32", "bfloat16"], default="float32", help="Of the frozen weights.")
    option("--autocast", action="store_true", help="Compute in bfloat16.")
    option("--e_dim", type=int, help="Width of the bottleneck of E-adapters.")
    option("--l_dim", type=int, help="Width of the taps of L-adapters.")
    option("--p_length", type=int, help="Number of pseudo features, where the method does not say it.")
    option("--dropout", type=float, default=0.1, help="Of the encoder.")
    option("--gradient_checkpointing", action="store_true")
    option("--device", default="cpu")
    option("--output", type=Path, help="JSON file for the results.")
    adapters.add_argument("--adapters", type=int, default=50, help="Adapters of the default size to load.")
    adapters.add_argument("--tasks", type=int, default=4, help="Tasks to run in one pass.")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")
    args.measure(args)


if __name__ == "__main__":
    main()
