"""Measure what adapters cost, on random encoders, because costs do not depend on the weights.

    python examples/measure_cost.py methods --output cost.json --plot cost.svg
    python examples/measure_cost.py overhead
    python examples/measure_cost.py adapters

`methods` compares ELP with LoRA, full fine-tuning and a head alone, interleaved in one run: trained parameters, the
size of the saved adapter, the bytes that a training step keeps for its backward pass, floating-point operations, and
times as ratios. `overhead` measures what is independent of the size of an encoder: the Python work of each layer.
`adapters` measures many adapters on one wav2vec 2.0: loading, switching, memory, and one pass for
several tasks. docs/reference/cost.md has results.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any
from weakref import WeakSet

import psutil
import torch
import transformers
from keys_and_values import KeysAndValues
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForAudioClassification, Wav2Vec2Config, Wav2Vec2ForSequenceClassification

from peft_elp import ELPConfig, FeatureCache, find_encoder, recipes, speed_up_frozen
from peft_elp.feature_cache import CACHED

# methods: one training step and one inference of each method ---------------------------------------------------------

WIDTHS = {
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "whisper-tiny": (384, 4, 6, 1536),
    "tiny": (32, 3, 2, 64),
}
# What every method costs at least that trains something in the first layer.
FLOOR = "head only, with a gradient through all layers"
FULL, LORA, Q_AND_V = "full fine-tuning", "LoRA, as many parameters as E+L", "LoRA, r=8 on q and v"
KEYS, EL_KEYS = "P, as keys and values alone", "E+L+P, P as keys and values alone"
METHODS: dict[str, dict[str, Any]] = {
    "head only": {"method": "head"},
    "weighted sum of layers + head": {"method": "head", "weighted": True},
    FLOOR: {"method": "head", "through": True},
    LORA: {"method": "lora"},
    Q_AND_V: {"method": "lora", "lora_r": 8, "lora_target_modules": ["q_proj", "v_proj"]},
    "conventional adapters": {"preset": "conventional"},
    "E": {"adapters": "E"},
    "L": {"adapters": "L"},
    "L without layer norms": {"adapters": "L", "train_layer_norms": False},
    "L without layer norms, from cached features": {"adapters": "L", "train_layer_norms": False, "cached": True},
    "L of the lower half without layer norms": {"adapters": "L", "train_layer_norms": False, "half": True},
    "P": {"adapters": "P"},
    KEYS: {"method": "head", "keys": True},
    "E+L": {"adapters": "EL"},
    "E+L+P": {"adapters": "ELP"},
    EL_KEYS: {"adapters": "EL", "keys": True},
    "E+L+P, 16 pseudo features": {"adapters": "ELP", "p_length": 16},
    FULL: {"method": "full"},
}


@dataclass
class Cost:
    """What one method costs.

    Args:
        method: Its name.
        trained: Trained parameters, with the head.
        file_mb: Size of the saved adapter, or of the trained tensors, in MB.
        saved_mib: What a training step keeps for its backward pass, in MiB, parameters and buffers apart.
        forward_gflop: Floating-point operations of the forward pass of a training step, in 10^9.
        backward_gflop: Those of its backward pass.
        step_s: Seconds of a training step, in each round.
        inference_s: Seconds of an inference, in each round.
        inject_s: Seconds to put adapters into a loaded model.
        load_s: Seconds to load a second adapter from a folder.
        switch_s: Seconds to switch between two adapters.
        peak_mib: On a GPU, the peak memory that a training step adds to the model, in MiB.
    """

    method: str
    trained: int
    file_mb: float
    saved_mib: float
    forward_gflop: float
    backward_gflop: float
    step_s: list[float]
    inference_s: list[float]
    inject_s: float | None = None
    load_s: float | None = None
    switch_s: float | None = None
    peak_mib: float | None = None


def config_of(args: argparse.Namespace, weighted: bool) -> Any:
    width, layers, heads, inside = WIDTHS[args.size]
    if args.family == "whisper":
        sizes = {
            "d_model": width,
            "encoder_layers": layers,
            "encoder_attention_heads": heads,
            "encoder_ffn_dim": inside,
        }
        sizes |= {"decoder_layers": 1, "max_source_positions": round(50 * args.seconds)}
    else:
        sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
        sizes |= {"intermediate_size": inside, "layerdrop": 0.0, "mask_time_prob": 0.0, "num_labels": 4}
        sizes |= {f"{where}_dropout": args.dropout for where in ("hidden", "attention", "activation", "feat_proj")}
        if args.size == "large":
            sizes |= {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}
    return AutoConfig.for_model(args.family, **sizes, use_weighted_layer_sum=weighted)


def model_of(args: argparse.Namespace, options: dict[str, Any]) -> tuple[Any, float]:
    """A random model that is prepared for one method, and the seconds that this took."""
    options = {key: value for key, value in options.items() if key != "cached"}
    torch.manual_seed(0)
    weighted, half, through, keys = (options.pop(name, False) for name in ("weighted", "half", "through", "keys"))
    model: Any = AutoModelForAudioClassification.from_config(config_of(args, weighted))
    if half:
        options["l_layers"] = list(range(len(find_encoder(model).layers) // 2))
    if options.get("method") == "lora" and "lora_r" not in options:
        options["lora_r"] = equal_rank(args)
    arguments = arguments_of(args, options)
    if through:
        find_encoder(model).layers[0].register_forward_pre_hook(
            lambda layer, inputs: (inputs[0].requires_grad_(torch.is_grad_enabled()), *inputs[1:])
        )
    speed_up_frozen(model.to(args.device))
    start = time.perf_counter()
    model = recipes.adapt(model, arguments)
    if keys:
        model.keys_and_values = KeysAndValues(find_encoder(model), args.p_length or 1).to(args.device)
    inject_s = time.perf_counter() - start
    if args.dtype == "bfloat16":  # The frozen weights; what is trained stays in float32.
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    if args.gradient_checkpointing:
        recipes.unwrap(model).gradient_checkpointing_enable({"use_reentrant": False})
    return model, inject_s


def arguments_of(args: argparse.Namespace, options: dict[str, Any]) -> recipes.ModelArguments:
    """The options of a method, with the sizes of the command line."""
    letters = "" if "method" in options else options.get("adapters", "E")
    sizes = {name: getattr(args, name) for name in ("e_dim", "l_dim", "p_length") if name[0].upper() in letters}
    sizes = {name: size for name, size in sizes.items() if size is not None}
    return recipes.ModelArguments(model_name_or_path="", **{"method": "elp", **sizes, **options})


def equal_rank(args: argparse.Namespace) -> int:
    """The rank at which LoRA on the feed-forward modules trains as much as E+L."""
    with torch.device("meta"):
        counts = []
        for options in ({"adapters": "EL"}, {"method": "lora", "lora_r": 1}):
            model = AutoModelForAudioClassification.from_config(config_of(args, weighted=False))
            arguments = arguments_of(args, options)
            counts.append(recipes.count_trained(recipes.adapt(model, arguments))["trained_parameters_encoder"])
    return max(1, round(counts[0] / counts[1]))


def inputs_of(args: argparse.Namespace) -> dict[str, Tensor]:
    """A batch of noise; with `--padded`, its recordings are between half as long and as long as asked."""
    torch.manual_seed(1)
    labels = torch.arange(args.batch_size) % 4 if args.family != "whisper" else torch.zeros(args.batch_size).long()
    if args.family == "whisper":
        return {"input_features": torch.randn(args.batch_size, 80, 2 * round(50 * args.seconds)), "labels": labels}
    samples = int(16_000 * args.seconds)
    batch = {"input_values": torch.randn(args.batch_size, samples), "labels": labels}
    if args.padded:
        lengths = torch.linspace(samples // 2, samples, args.batch_size).long()
        batch["attention_mask"] = (torch.arange(samples) < lengths[:, None]).long()
    return batch


class Held:
    """A tensor that a graph keeps for the backward pass; it lives as long as its node of the graph."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(model: Any, run: Callable[[], Tensor]) -> int:
    """The bytes of the tensors that a forward pass keeps for the backward pass, parameters and buffers apart."""
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
    """A model that is trained by one method, and how it runs."""

    def __init__(self, name: str, args: argparse.Namespace, folder: str) -> None:
        self.name, self.args = name, args
        self.model, self.inject_s = model_of(args, METHODS[name])
        self.inputs = {key: value.to(args.device) for key, value in inputs_of(args).items()}
        self.call: Any = self.model
        if args.compile:
            with torch.no_grad():
                self.model(**self.inputs)  # In its first call, Transformers installs hooks, which cannot be compiled.
            self.call = torch.compile(self.model)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5)
        self.rows: Any = None
        if METHODS[name].get("cached"):
            self.cache = FeatureCache(self.model, folder)
            clips = [{key: x[number] for key, x in self.inputs.items()} for number in range(args.batch_size)]
            self.rows = self.cache.read(
                clips, lambda rows: {key: x[None] for key, x in rows[0].items()}, progress=False
            )

    def loss(self) -> Tensor:
        bfloat16 = self.args.autocast or self.args.dtype == "bfloat16"
        context = torch.autocast(self.args.device.split(":")[0], torch.bfloat16) if bfloat16 else nullcontext()
        with context:
            return self.call(**self.batch()).loss

    def batch(self) -> dict[str, Any]:
        """The inputs. In training they may come from the cache, whose files are read each time."""
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

    def measure(self) -> Cost:
        """What can be measured once."""
        self.model.train()
        saved = saved_bytes(self.model, self.loss)
        with FlopCounterMode(display=False) as forward:
            loss = self.loss()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        with tempfile.TemporaryDirectory() as folder:
            trained = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
            if hasattr(self.model, "peft_config"):
                self.model.save_pretrained(folder)
            else:
                torch.save(trained, Path(folder, "trained.pt"))
            size = sum(path.stat().st_size for path in Path(folder).rglob("*.*t*") if path.suffix != ".json")
        inject_s = self.inject_s if hasattr(self.model, "peft_config") else None
        return Cost(
            self.name,
            sum(parameter.numel() for parameter in self.trained),
            size / 1e6,
            saved / 2**20,
            forward.get_total_flops() / 1e9,
            backward.get_total_flops() / 1e9,
            [],
            [],
            inject_s,
        )

    def load_and_switch(self) -> tuple[float | None, float | None]:
        """Seconds to load a second adapter, and to switch; to be measured last, because the model keeps both."""
        if not hasattr(self.model, "peft_config"):
            return None, None
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            load_s = seconds(lambda: self.model.load_adapter(folder, "second"), self.args.device)
        names = cycle(["second", "default"])
        return load_s, median_s(lambda: self.model.set_adapter(next(names)), 20)


def seconds(run: Callable[[], Any], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_methods(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        measure_in(folder, args)


def measure_in(folder: str, args: argparse.Namespace) -> None:
    """Measure the methods; cached features are in `folder`."""
    names = [name for name in METHODS if args.methods is None or name in args.methods]
    if args.family == "wavlm":
        left_out = [names.pop(names.index(name)) for name in (Q_AND_V, KEYS, EL_KEYS) if name in names]
        for name in left_out:
            print(f"Left out: {name}. WavLM's attention reads its weights without calling their modules.")
    if args.compile:  # All methods share the code of the encoder, and each needs a graph of its own.
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000
    methods = [Method(name, args, folder) for name in names]
    costs = [method.measure() for method in methods]
    for method in methods:  # To warm up, and to compile.
        method.step()
        method.infer()
    for _ in range(args.repeats):
        for method, cost in zip(methods, costs, strict=True):
            on_gpu = args.device != "cpu"
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() if on_gpu else 0
            cost.step_s.append(seconds(method.step, args.device))
            if on_gpu:
                cost.peak_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
            cost.inference_s.append(seconds(method.infer, args.device))
    for method, cost in zip(methods, costs, strict=True):
        cost.load_s, cost.switch_s = method.load_and_switch()
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if args.device != "cpu":
        machine = torch.cuda.get_device_name()
    about = {
        "encoder": f"{args.family}, {args.size} size",
        "batch": f"{args.batch_size} x {args.seconds:g} s{', padded' if args.padded else ''}",
        "dropout": args.dropout,
        "weights": args.dtype + (" under bfloat16 autocast" if args.autocast else ""),
        "gradient_checkpointing": args.gradient_checkpointing,
        "compiled": args.compile,
        "machine": machine,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print("\n".join(f"{key}: {value}" for key, value in about.items()), end="\n\n")
    print(table(costs), flush=True)
    if args.output:
        args.output.write_text(
            json.dumps({"about": about, "costs": [asdict(cost) for cost in costs]}, indent=2) + "\n"
        )
    if args.plot:
        plot(costs, args.plot)


def ratio(one: Sequence[float], other: Sequence[float]) -> str:
    """The median of the ratios of each round, and the range of the middle half of them."""
    ratios = sorted(a / b for a, b in zip(one, other, strict=True))
    quarter = len(ratios) // 4
    return f"{statistics.median(ratios):.2f} ({ratios[quarter]:.2f} to {ratios[-1 - quarter]:.2f})"


def table(costs: Sequence[Cost]) -> str:
    """The costs as a Markdown table, relative to full fine-tuning and to a head alone where these were run."""
    by_name = {cost.method: cost for cost in costs}
    full, lora, head = by_name.get(FULL), by_name.get(LORA), by_name.get("head only")
    heads = "| method | trained | file, MB | kept, MiB | kept / full | kept / LoRA | GFLOP forward + backward "
    heads += "| step / full | step / LoRA | inference / head only | inject, load, switch, ms |"
    on_gpu = any(cost.peak_mib is not None for cost in costs)
    if on_gpu:
        heads += " step, ms | inference, ms | peak, MiB |"
    lines = [heads, "|---|" + "--:|" * (heads.count("|") - 2)]
    for cost in costs:
        cells = [cost.method, f"{cost.trained:,}", f"{cost.file_mb:.1f}", f"{cost.saved_mib:.1f}"]
        cells += [f"{cost.saved_mib / other.saved_mib:.2f}" if other else "" for other in (full, lora)]
        cells += [f"{cost.forward_gflop:.0f} + {cost.backward_gflop:.0f}"]
        cells += [ratio(cost.step_s, other.step_s) if other else "" for other in (full, lora)]
        cells += [ratio(cost.inference_s, head.inference_s) if head else ""]
        life = [taken for taken in (cost.inject_s, cost.load_s, cost.switch_s) if taken is not None]
        cells += [", ".join(f"{1000 * taken:.1f}" for taken in life)]
        if on_gpu:
            cells += [f"{1000 * statistics.median(taken):.1f}" for taken in (cost.step_s, cost.inference_s)]
            cells += ["" if cost.peak_mib is None else f"{cost.peak_mib:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(costs: Sequence[Cost], file: Path) -> None:
    """Draw memory against time, relative to full fine-tuning."""
    from matplotlib.figure import Figure

    full = next(cost for cost in costs if cost.method == FULL)
    figure = Figure(figsize=(5.2, 7.2), layout="constrained")  # legible on a phone
    axes = figure.add_subplot()
    markers = cycle("os^Dv<>Ph*Xpd8")
    for cost in costs:
        x = statistics.median(a / b for a, b in zip(cost.step_s, full.step_s, strict=True))
        color = "#64748b" if METHODS[cost.method].get("method") else "#c2410c"  # ELP-adapters stand out.
        axes.plot(x, cost.saved_mib / full.saved_mib, next(markers), color=color, label=cost.method, markersize=8)
    figure.legend(loc="outside lower center", fontsize=9)
    axes.set_xlabel("time of a training step / full fine-tuning")
    axes.set_ylabel("memory kept for the backward pass / full fine-tuning")
    axes.set_xlim(0, None)
    axes.set_ylim(0, None)
    axes.margins(x=0.2)
    figure.savefig(file)


# overhead: the time of an encoder whose arithmetic takes next to none ------------------------------------------------

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "conv_dim": [32] * 7}
SMALL |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0, "mask_time_prob": 0.0}
LAYERS = 12
TARGETS = ["intermediate_dense", "output_dense"]
SETTINGS: dict[str, PeftConfig | None] = {
    "no adapter, all trained": None,
    "LoRA": LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["projector", "classifier"]),
    "L without layer norms": ELPConfig(adapters="L", l_dim=16, train_layer_norms=False),
    "E without layer norms": ELPConfig(adapters="E", e_dim=8, train_layer_norms=False),
    "E+L": ELPConfig(adapters="EL", e_dim=8, l_dim=16),
    "E+L+P": ELPConfig(e_dim=8, l_dim=16),
}


def measure_overhead(args: argparse.Namespace) -> None:
    """The shortest time of a forward pass and of a training step, and what a layer adds to it."""
    waveforms = torch.randn(args.batch_size, int(args.seconds * 16_000))
    labels = torch.zeros(args.batch_size).long()
    alone: tuple[float, float] | None = None
    print("| setting | forward, ms | more for each layer | forward + backward, ms | more for each layer |")
    print("|---|--:|--:|--:|--:|")
    for name, config in SETTINGS.items():
        torch.manual_seed(0)
        model: Any = Wav2Vec2ForSequenceClassification(
            Wav2Vec2Config.from_dict({**SMALL, "num_hidden_layers": LAYERS})
        )
        model = model if config is None else get_peft_model(model, config)

        def forward(model: Any = model) -> None:
            with torch.no_grad():
                model(waveforms)

        def step(model: Any = model) -> None:
            model.zero_grad()
            model(waveforms, labels=labels).loss.backward()

        found = {
            name: (shortest_ms(forward, model.eval(), args.repeats), shortest_ms(step, model.train(), args.repeats))
        }
        if name == "E+L+P":
            with model.disable_adapter():
                found["E+L+P, disabled"] = (shortest_ms(forward, model.eval(), args.repeats), 0.0)
        alone = alone or found[name]
        for label, times in found.items():
            cells = []
            for taken, least in zip(times, alone, strict=True):
                cells += [f"{taken:.2f}", f"{(taken - least) / LAYERS:+.3f}"] if taken else ["", ""]
            print(f"| {label} | {' | '.join(cells)} |", flush=True)


def shortest_ms(call: Callable[[], Any], model: Any, repeats: int) -> float:
    """The shortest of some times of a call, in ms. Other work on the machine makes some of them longer."""
    return 1000 * min(seconds(call, "cpu") for _ in range(repeats))


# adapters: many on one backbone, and several tasks in one pass ------------------------------------------------------


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


def tasks_in_one_pass(args: argparse.Namespace) -> None:
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


def measure_adapters(args: argparse.Namespace) -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    many_adapters("ELP", ELPConfig(), args.adapters)
    many_adapters(
        "LoRA", LoraConfig(target_modules=TARGETS, modules_to_save=["projector", "classifier"]), args.adapters
    )
    tasks_in_one_pass(args)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one measurement and print its results. `argv` defaults to the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True)
    methods, overhead, adapters = (kinds.add_parser(name) for name in ("methods", "overhead", "adapters"))
    for kind, measure, batch_size, length, repeats in (
        (methods, measure_methods, 2, 3, 5),
        (overhead, measure_overhead, 1, 0.25, 40),
        (adapters, measure_adapters, 4, 5, 5),
    ):
        kind.set_defaults(measure=measure)
        kind.add_argument("--batch_size", type=int, default=batch_size, help="Utterances in a batch.")
        kind.add_argument("--seconds", type=float, default=length, help="Length of each utterance.")
        kind.add_argument("--repeats", type=int, default=repeats, help="Rounds of timings.")
    methods.add_argument("--family", default="wavlm", help="wavlm, wav2vec2, hubert, whisper, ...")
    methods.add_argument("--size", choices=WIDTHS, default="base", help="Size of the encoder.")
    methods.add_argument("--methods", nargs="+", choices=METHODS, help="Only these.")
    methods.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="Of the frozen weights.")
    methods.add_argument("--autocast", action="store_true", help="Compute in bfloat16.")
    methods.add_argument("--e_dim", type=int, help="Width of the bottleneck of E-adapters.")
    methods.add_argument("--l_dim", type=int, help="Width of the taps of L-adapters.")
    methods.add_argument("--p_length", type=int, help="Number of pseudo features, where the method does not say it.")
    methods.add_argument("--dropout", type=float, default=0.1, help="Of the encoder.")
    methods.add_argument("--padded", action="store_true", help="Recordings of different lengths.")
    methods.add_argument("--gradient_checkpointing", action="store_true")
    methods.add_argument("--compile", action="store_true")
    methods.add_argument("--device", default="cpu")
    methods.add_argument("--output", type=Path, help="JSON file for the results.")
    methods.add_argument("--plot", type=Path, help="File for a plot of memory against time.")
    adapters.add_argument("--adapters", type=int, default=50, help="Adapters of the default size to load.")
    adapters.add_argument("--tasks", type=int, default=4, help="Tasks to run in one pass.")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")
    args.measure(args)


if __name__ == "__main__":
    main()
