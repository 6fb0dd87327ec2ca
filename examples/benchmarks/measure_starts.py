"""Measure how adapters start, which rates they take, and how many pseudo features pay off.

    python examples/measure_starts.py taps --model_name_or_path openai/whisper-tiny.en \
        --verification recordings/commands_ar --emotions recordings/emotion_emodb
    python examples/measure_starts.py fresh --model_name_or_path openai/whisper-tiny.en \
        --recordings recordings/asr_kathleen --text_column_name transcription
    python examples/measure_starts.py rates --model_name_or_path openai/whisper-tiny.en \
        --recordings recordings/commands_ar --chunk_length 1
    python examples/measure_starts.py lengths --model_name_or_path openai/whisper-tiny.en \
        --recordings recordings/commands_ar --chunk_length 1

The folders are in `audiofolder` layout, with a table `metadata.csv` in each split. docs/reference/starts.md has the
results, and how long each command took.
"""

import argparse
import copy
import csv
import itertools
import statistics
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jiwer
import numpy as np
import soundfile
import torch
from keys_and_values import KeysAndValues
from peft import get_peft_model
from sklearn.metrics import balanced_accuracy_score
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, normalize, one_hot
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForCTC,
    AutoModelForSpeechSeq2Seq,
    AutoTokenizer,
    get_constant_schedule_with_warmup,
    set_seed,
)
from transformers.utils import logging

from peft_elp import ELPConfig, count_parameters, create_optimizer, find_encoder, recipes
from peft_elp.adapters import LAdapter
from peft_elp.speech.data import read_trials
from peft_elp.speech.metrics import cosine_scores, equal_error_rate

RATE_HZ = 16_000


class Clip(NamedTuple):
    """A recording: its file, its row of the table, and its samples or what the layers of the encoder made of them."""

    file: str
    row: dict[str, str]
    data: Any


def read_clips(folder: Path, split: str, limit: int | None = None) -> list[Clip]:
    with open(folder / split / "metadata.csv", encoding="utf-8") as table:
        rows = list(csv.DictReader(table))[:limit]
    files = [str(folder / split / row["file_name"]) for row in rows]
    return [Clip(file, row, soundfile.read(file, dtype="float32")[0]) for file, row in zip(files, rows, strict=True)]


# taps: an L-adapter with several inputs, on what the layers of a frozen encoder return -------------------------------

TAPS_STEPS = 150


class Reading(NamedTuple):
    """How taps read: with a normalised input or not, their layer weights at so many times the rate, times a factor."""

    input_norm: bool
    ratio: float = 1.0
    by_root: bool = False  # Whether the layer weights are multiplied by the root of their number, before the softmax.


READINGS: dict[str, Reading | None] = {
    "head only": None,
    "raw taps": Reading(False),
    "normalised input": Reading(True),
    "normalised input, layer weights times the root of their number": Reading(True, by_root=True),
    "normalised input, layer weights at 30 times the rate": Reading(True, 30.0),
}


class ScaledAdapter(LAdapter):
    """An L-adapter whose layer weights are multiplied by the root of their number."""

    def shares(self) -> Tensor:
        return (len(self.taps) ** 0.5 * self.layer_weights).softmax(dim=0)


class Reader(nn.Module):
    """The head of a classifier, on the mean over frames of what an L-adapter or the last layer gives."""

    def __init__(self, layers: int, hidden_size: int, classes: int, reading: Reading | None) -> None:
        super().__init__()
        self.adapter = None
        if reading is not None:
            adapter = ScaledAdapter if reading.by_root else LAdapter
            self.adapter = adapter(hidden_size, layers, 512, input_norm=reading.input_norm)
        self.projector = nn.Linear(hidden_size if reading is None else 512, 256)
        self.classifier = nn.Linear(256, classes)

    def forward(self, clips: Sequence[Clip]) -> Tensor:
        """Clips with states `(layers, frames, hidden)` to embeddings `(clips, 256)`."""
        states = [clip.data.float() for clip in clips]
        joined = torch.cat(states, dim=1)
        y = self.projector(joined[-1] if self.adapter is None else self.adapter(joined[:, None])[0])
        return torch.stack([frames.mean(dim=0) for frames in y.split([x.shape[1] for x in states])])


def speaker_loss(reader: Reader, embeddings: Tensor, labels: Tensor) -> Tensor:
    """AM-Softmax, as in `run_speaker_verification.py`."""
    cosines = linear(normalize(embeddings), normalize(reader.classifier.weight))
    return cross_entropy(30 * (cosines - 0.2 * one_hot(labels, cosines.shape[-1])), labels)


def emotion_loss(reader: Reader, embeddings: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(reader.classifier(embeddings), labels)


@torch.no_grad()
def speaker_error(reader: Reader, clips: Sequence[Clip], names: Sequence[str], trials: Path) -> float:
    """The equal error rate in per cent: of the trials of the test split, or of all pairs of another split."""
    embeddings: dict[Hashable, Any] = {clip.file: reader([clip])[0].numpy() for clip in clips}
    if Path(clips[0].file).parent.name == "test":
        pairs, labels = [], []
        for label, *files in read_trials(trials, trials.parent):
            pairs.append(tuple(str(file) for file in files))
            labels.append(label)
    else:
        of = {clip.file: clip.row["speaker_id"] for clip in clips}
        pairs = list(itertools.combinations(of, 2))
        labels = [of[a] == of[b] for a, b in pairs]
    return 100 * equal_error_rate(labels, cosine_scores(embeddings, pairs))


@torch.no_grad()
def emotion_error(reader: Reader, clips: Sequence[Clip], names: Sequence[str], trials: Path) -> float:
    """100 minus the unweighted accuracy in per cent."""
    answers = [names[int(reader.classifier(reader([clip])).argmax())] for clip in clips]
    return 100 - 100 * float(balanced_accuracy_score([clip.row["emotion"] for clip in clips], answers))


class TapsTask(NamedTuple):
    """What the taps are read for: the column with the classes, the batch, the loss, and the error in per cent."""

    column: str
    batch_size: int
    loss: Callable[[Reader, Tensor, Tensor], Tensor]
    error: Callable[[Reader, Sequence[Clip], Sequence[str], Path], float]


TAPS_TASKS = {
    "verification": TapsTask("speaker_id", 16, speaker_loss, speaker_error),
    "emotions": TapsTask("emotion", 8, emotion_loss, emotion_error),
}


@torch.no_grad()
def encode(model: Any, extractor: Any, clips: Sequence[Clip]) -> list[Clip]:
    """The clips with the states of all layers, without the frames of padding."""
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model
    encoded = []
    for clip in clips:
        inputs = extractor(clip.data, sampling_rate=RATE_HZ, return_tensors="pt")
        states = torch.cat(encoder(**inputs, output_hidden_states=True).hidden_states[1:])
        encoded.append(clip._replace(data=states[:, : -(-len(clip.data) // 320)].half()))  # a frame is 20 ms
    return encoded


def train_reader(
    clips: Sequence[Clip], names: Sequence[str], task: TapsTask, reading: Reading | None, rate: float, seed: int
) -> Reader:
    set_seed(seed)
    layers, _, hidden_size = clips[0].data.shape
    reader = Reader(layers, hidden_size, len(names), reading)
    ratio = 1.0 if reading is None else reading.ratio
    weights = [] if reader.adapter is None else [reader.adapter.layer_weights]
    others = [parameter for parameter in reader.parameters() if all(parameter is not held for held in weights)]
    groups = [{"params": others, "lr": rate}, {"params": weights, "lr": ratio * rate}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [rate, ratio * rate], total_steps=TAPS_STEPS)
    for _ in range(TAPS_STEPS):
        batch = [clips[number] for number in torch.randint(len(clips), (task.batch_size,)).tolist()]
        labels = torch.tensor([names.index(clip.row[task.column]) for clip in batch])
        loss = task.loss(reader, reader(batch), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return reader


def pruned(reader: Reader, keep: int) -> Reader:
    """The reader with the taps that weigh most. A weight of minus infinity is a share of zero."""
    reader = copy.deepcopy(reader)
    assert reader.adapter is not None
    weights = reader.adapter.layer_weights.data
    weights[weights.argsort(descending=True)[keep:]] = -torch.inf
    return reader


def taps_errors(
    task: TapsTask, readers: Sequence[Reader], names: Sequence[str], folder: Path, *splits: Sequence[Clip]
) -> list[list[float]]:
    """The errors of the readers on each split."""
    return [[task.error(reader, held, names, folder / "trials.csv") for reader in readers] for held in splits]


def in_words(errors: Sequence[Sequence[float]]) -> str:
    return " / ".join(f"{np.mean(held):.1f} ± {np.std(held, ddof=1):.1f}" for held in errors) + " (validation / test)"


def measure_taps(args: argparse.Namespace) -> None:
    model = AutoModel.from_pretrained(args.model_name_or_path, dtype=torch.float32).eval()
    extractor = AutoFeatureExtractor.from_pretrained(args.model_name_or_path)
    for name, task in TAPS_TASKS.items():
        if (folder := getattr(args, name)) is None:
            continue
        clips = {split: encode(model, extractor, read_clips(folder, split)) for split in args.splits}
        train, validation, test = clips.values()
        names = sorted({clip.row[task.column] for clip in train})
        readers: list[Reader] = []
        shares: list[float] = []
        for what, reading in READINGS.items():
            trained, errors = {}, {}  # of each rate
            for rate in args.rates:
                trained[rate] = [train_reader(train, names, task, reading, rate, seed) for seed in args.seeds]
                errors[rate] = taps_errors(task, trained[rate], names, folder, validation, test)
            rate = min(errors, key=lambda rate: statistics.mean(errors[rate][0]))
            readers = trained[rate]
            shares = [round(share, 2) for share in readers[0].adapter.shares().tolist()] if readers[0].adapter else []
            print(f"{name}, {what}: error {in_words(errors[rate])}, rate {rate:g}, shares {shares}", flush=True)
        for keep in range(len(shares) - 1, 0, -1):  # of the last reading
            shorter = [pruned(reader, keep) for reader in readers]
            found = taps_errors(task, shorter, names, folder, validation, test)
            print(f"{name}, the {keep} taps that weigh most: error {in_words(found)}", flush=True)


# fresh: a pre-trained recogniser with adapters that were not trained -------------------------------------------------

FRESH: dict[str, dict[str, Any] | None] = {"the model alone": None}
FRESH |= {letters: {"adapters": letters} for letters in ("E", "L", "P", "ELP")}
FRESH |= {f"P, p_length={length}": {"adapters": "P", "p_length": length} for length in (4, 16)}
FRESH["ELP, the paper's starts"] = {"init_weights": "paper", "p_init_std": 0.02, "l_output": "project"}


@torch.no_grad()
def recognise(model: Any, extractor: Any, tokenizer: Any, clips: Sequence[Clip], texts: Sequence[str]) -> Any:
    """The mean loss over the clips, one at a time, and the word error rate of greedy decoding."""
    is_seq2seq = model.config.is_encoder_decoder
    losses, found = [], []
    labels = recipes.make_labels(model, tokenizer, texts) if is_seq2seq else tokenizer(list(texts)).input_ids
    for clip, numbers in zip(clips, labels, strict=True):
        inputs = extractor(clip.data, sampling_rate=RATE_HZ, return_tensors="pt")
        outputs = model(**inputs, labels=torch.tensor([numbers]))
        losses.append(outputs.loss.item())
        tokens = model.generate(**inputs, max_new_tokens=100) if is_seq2seq else outputs.logits.argmax(-1)
        found += tokenizer.batch_decode(tokens, skip_special_tokens=is_seq2seq)
    normalize = recipes.make_normalizer(tokenizer)
    return statistics.mean(losses), jiwer.wer([*map(normalize, texts)], [*map(normalize, found)])


def measure_fresh(args: argparse.Namespace) -> None:
    name = args.model_name_or_path
    extractor, tokenizer = AutoFeatureExtractor.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    clips = read_clips(args.recordings, "test", args.max_clips)
    texts = [clip.row[args.text_column_name] for clip in clips]
    is_seq2seq = AutoConfig.from_pretrained(name).is_encoder_decoder
    for what, options in FRESH.items():
        set_seed(0)
        auto = AutoModelForSpeechSeq2Seq if is_seq2seq else AutoModelForCTC
        model: Any = auto.from_pretrained(name, dtype=torch.float32)
        if options is not None:
            model = get_peft_model(model, ELPConfig(**options))
        loss, error = recognise(model.eval(), extractor, tokenizer, clips, texts)
        print(f"{what}: loss {loss:.4f}, word error rate {100 * error:.2f} %", flush=True)


# rates: E-adapters from two starts, at rates from far too low to far too high ----------------------------------------

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
HEAD_RATE = 1e-3
STARTS: dict[str, Any] = {"the default start": True, "the paper's start": "paper"}


def train_words(
    args: argparse.Namespace,
    clips: Sequence[Clip],
    options: dict[str, Any],
    rates: dict[str, float],
    seed: int,
    rows: int = 0,
) -> tuple[Any, Callable[[Sequence[Clip]], Any], list[float]]:
    """Train adapters and a head to name the class of a clip, at the rates of their parts.

    With `rows`, so many pseudo features are trained at the rate of P that are keys and values alone.

    Returns:
        The model; what makes a batch for it from clips; and the loss of each step.
    """
    name, names = args.model_name_or_path, sorted({clip.row[args.label_column_name] for clip in clips})
    window = {} if args.chunk_length is None else {"chunk_length": args.chunk_length}
    extractor = AutoFeatureExtractor.from_pretrained(name, **window)
    set_seed(seed)
    model = AutoModelForAudioClassification.from_pretrained(name, num_labels=len(names), dtype=torch.float32)
    model = get_peft_model(model, ELPConfig(**options, chunk_length=args.chunk_length)).train()
    collate = recipes.Collator(extractor, model)

    def batch_of(clips: Sequence[Clip]) -> Any:
        return collate(
            [{"audio": clip.data, "labels": names.index(clip.row[args.label_column_name])} for clip in clips]
        )

    trained = [part for part, number in count_parameters(model).items() if number]
    optimizer = create_optimizer(model, rates={part: rates[part] for part in trained})
    if rows:
        keys = KeysAndValues(find_encoder(model), rows)
        optimizer.add_param_group({"params": [keys.rows], "lr": rates["P"]})
    schedule = get_constant_schedule_with_warmup(optimizer, args.steps // 10)
    order = itertools.chain.from_iterable(torch.randperm(len(clips)).tolist() for _ in itertools.count())
    losses = []
    for _ in range(args.steps):
        loss = model(**batch_of([clips[number] for number in itertools.islice(order, 8)])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return model.eval(), batch_of, losses


def final_loss(args: argparse.Namespace, clips: Sequence[Clip], start: Any, rate: float, seed: int) -> float:
    """The mean loss of the last 10 steps of training E-adapters at `rate`, and the head."""
    options = {"adapters": "E", "e_dim": 128, "train_layer_norms": False, "init_weights": start}
    _, _, losses = train_words(args, clips, options, {"head": HEAD_RATE, "E": rate}, seed)
    return statistics.mean(losses[-10:])


def measure_rates(args: argparse.Namespace) -> None:
    clips = read_clips(args.recordings, "train")

    def mean_loss(start: Any, rate: float) -> float:
        return statistics.mean(final_loss(args, clips, start, rate, seed) for seed in args.seeds)

    alone = mean_loss(True, 1e-12)  # The default start is the identity, and at this rate it stays so.
    print(f"head alone: {alone:.3f}", flush=True)
    for what, start in STARTS.items():
        losses = {rate: mean_loss(start, rate) for rate in args.rates}
        better = sum(loss < alone for loss in losses.values())
        values = ", ".join(f"{loss:.3f} at {rate:g}" for rate, loss in losses.items())
        print(f"{what}: {values}; better than the head alone at {better} of {len(losses)} rates", flush=True)


# lengths: pseudo features alone, and beside E and L ------------------------------------------------------------------

LENGTHS = (0, 1, 4, 16)
P_RATES = (1e-3, 1e-2)


@torch.no_grad()
def loss_and_error(model: Any, batch_of: Callable[[Sequence[Clip]], Any], clips: Sequence[Clip]) -> list[float]:
    """The mean loss, and how many of the clips get a wrong class, in per cent."""
    losses, wrong = [], []
    for start in range(0, len(clips), 8):
        batch = batch_of(clips[start : start + 8])
        logits = model(**batch).logits
        losses.append(cross_entropy(logits, batch["labels"], reduction="none"))
        wrong.append(logits.argmax(-1) != batch["labels"])
    return [torch.cat(losses).mean().item(), 100 * torch.cat(wrong).float().mean().item()]


def measure_lengths(args: argparse.Namespace) -> None:
    train, *held = (read_clips(args.recordings, split) for split in ("train", "validation", "test"))
    lengths: list[int] = args.lengths
    for letters, length in itertools.product(("", "EL"), lengths):
        rows = length if args.keys_and_values else 0
        carried = bool(length) and not rows
        options = {"adapters": letters + "P" * carried, "e_dim": 128, "l_dim": 128, "p_length": length or 1}
        if not options["adapters"]:  # The head alone: E-adapters start as the identity, and stay so at such a rate.
            options |= {"adapters": "E", "train_layer_norms": False}
        results = {}  # of each rate: (seeds, validation and test, loss and error)
        for rate in P_RATES if length else P_RATES[:1]:
            rates = {"head": HEAD_RATE, "L": 1e-3, "layer norms": 1e-3, "P": rate, "E": 1e-3 if letters else 1e-12}
            found = []
            for seed in args.seeds:
                model, batch_of, _ = train_words(args, train, options, rates, seed, rows)
                found.append([loss_and_error(model, batch_of, clips) for clips in held])
            results[rate] = np.array(found)
        rate = min(results, key=lambda rate: results[rate][:, 0, 0].mean())
        mean, deviation = results[rate].mean(0), results[rate].std(0, ddof=1)
        for number, (what, digits) in enumerate({"loss": 2, "error": 1}.items()):
            pairs = zip(mean[:, number], deviation[:, number], strict=True)
            text = " / ".join(f"{of_mean:.{digits}f} ± {spread:.{digits}f}" for of_mean, spread in pairs)
            print(f"{letters}P, {length} rows: {what} {text} (validation / test), rate {rate:g}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one measurement and print its results. `argv` defaults to the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True)
    taps, fresh, rates, lengths = (kinds.add_parser(name) for name in ("taps", "fresh", "rates", "lengths"))
    measures = (taps, measure_taps), (fresh, measure_fresh), (rates, measure_rates), (lengths, measure_lengths)
    for kind, measure in measures:
        kind.set_defaults(measure=measure)
        kind.add_argument("--model_name_or_path", required=True, help="An encoder, or for `fresh` a recogniser.")
    taps.add_argument("--verification", type=Path, help="Folder with a column speaker_id, and trials.csv over test.")
    taps.add_argument("--emotions", type=Path, help="Folder with a column emotion.")
    splits = ["train", "validation", "test"]
    taps.add_argument("--splits", nargs=3, default=splits, help="To train, to choose the rate, to measure.")
    taps.add_argument("--rates", type=float, nargs="+", default=[1e-4, 5e-4, 2e-3])
    taps.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    fresh.add_argument("--recordings", type=Path, required=True, help="Folder with a split test.")
    fresh.add_argument("--text_column_name", default="text", help="Column with the text.")
    fresh.add_argument("--max_clips", type=int, help="Read this many clips.")
    for kind, seeds in ((rates, [0]), (lengths, [0, 1, 2])):
        kind.add_argument("--recordings", type=Path, required=True, help="Folder with the splits of other commands.")
        kind.add_argument("--label_column_name", default="label", help="Column with the classes.")
        kind.add_argument("--chunk_length", type=int, help="Cut a fixed window, such as Whisper's 30 s, to this.")
        kind.add_argument("--steps", type=int, default=60)
        kind.add_argument("--seeds", type=int, nargs="+", default=seeds)
    rates.add_argument("--rates", type=float, nargs="+", default=RATES)
    lengths.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    lengths.add_argument("--keys_and_values", action="store_true", help="Without queries and feed-forward modules.")
    args = parser.parse_args(argv)
    # Hide what Transformers says about each tensor of a new head.
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    args.measure(args)


if __name__ == "__main__":
    main()
