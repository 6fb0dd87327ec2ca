"""One candidate of the search: an L-adapter and a head, trained on features, in a form that ELP's modules can take.

Features are standardised and logits are divided by a temperature here. Both are linear: a saved adapter has them in
its weights. For a tap without a matrix, the head is linear in the mean over frames, so frames are not needed at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout, linear, normalize, one_hot

from peft_elp.adapters import LAdapter
from peft_elp.optim import LAYER_WEIGHTS_RATIO

from .features import Features

BATCH = 32
FRAMES = 16  # of each recording in a training step: their mean is that of all frames, plus noise that regularises
CHECKS = 10  # how often the held-out recordings are answered during a training
MARGIN, SCALE = 0.2, 30.0  # of AM-Softmax


@dataclass(frozen=True)
class Setting:
    """What the search chooses."""

    layers: tuple[int, ...]  # that are read, 0-based
    l_dim: int = 0  # width of the taps; 0 has no matrices
    rate: float = 3e-3  # learning rate; the layer weights have 30 times as much
    steps: int = 300  # of the whole schedule, which falls linearly to 0
    dropout: float = 0.2  # of the mean over frames; half of it in the taps
    weight_decay: float = 0.01  # of the matrices
    smoothing: float = 0.0  # of labels

    def size(self, hidden: int) -> int:
        """Return the number of trained parameters in the encoder."""
        return len(self.layers) * (1 + (self.l_dim and hidden * self.l_dim + 3 * self.l_dim))

    def elp(self) -> dict[str, Any]:
        """Return the settings of an `ELPConfig` that has the same L-adapter."""
        return {
            "l_dim": self.l_dim,
            "l_layers": list(self.layers),
            "l_input_norm": True,
            "l_dropout": self.dropout / 2,
        }


@dataclass(frozen=True)
class Problem:
    """What every candidate is trained for."""

    features: Features
    labels: Tensor  # the number of the class of each recording
    classes: int
    verify: bool = False  # compare voices instead of naming classes: AM-Softmax, and embeddings for answers
    width: int = 256  # of the projector
    seed: int = 0


class Reader(nn.Module):
    """An L-adapter and the two linear layers of a head, on features with the centre and scale of those of `rows`."""

    centre: Tensor
    scale: Tensor

    def __init__(self, problem: Problem, setting: Setting, rows: Sequence[int]) -> None:
        super().__init__()
        self.features, self.setting = problem.features, setting
        pooled = self.features.pooled[list(setting.layers)]
        hidden = pooled.shape[-1]
        self.register_buffer("centre", pooled[:, rows].mean(1))
        deviation = pooled[:, rows].std(1).clamp(min=1e-4)
        # One scale for all layers if nothing comes between their sum and the projector.
        self.register_buffer("scale", deviation if setting.l_dim else deviation.square().mean(0, keepdim=True).sqrt())
        self.pooled = self._standardised(pooled)
        self.adapter = LAdapter(
            hidden, len(setting.layers), setting.l_dim, dropout=setting.dropout / 2, init_std=None, input_norm=False
        )
        self.projector = nn.Linear(setting.l_dim or hidden, problem.width)
        self.classifier = nn.Linear(problem.width, problem.classes)

    def means(self, rows: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """Return the mean over frames of the adapter's output, `(recordings, width)`; with a generator, of a few."""
        if not self.setting.l_dim:
            return torch.einsum("lbh,l->bh", self.pooled[:, rows], self.shares)
        if generator is not None:
            x = self.features.some(rows, self.setting.layers, FRAMES, generator)
            return self.adapter(self._standardised(x.flatten(1, 2))[:, None]).unflatten(1, x.shape[1:3])[0].mean(1)
        means = []
        for row in rows:
            x = self.features.of(row)[list(self.setting.layers)]
            means.append(self.adapter(self._standardised(x)[:, None])[0].mean(0))
        return torch.stack(means)

    @property
    def shares(self) -> Tensor:
        """The layer weights."""
        return self.adapter.shares()

    def _standardised(self, x: Tensor) -> Tensor:
        return (x - self.centre[:, None]) / self.scale[:, None]

    def embed(self, rows: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """Return what the projector makes of each recording, `(recordings, width)`."""
        return self.projector(dropout(self.means(rows, generator), self.setting.dropout, self.training))

    def folded(self) -> dict[str, Tensor]:
        """Return the weights of an ELP-adapter and its head that answer as this reader does, by name.

        The adapter of the model normalises each frame, and does not centre or scale it.
        """
        state = {key: x.clone() for key, x in self.state_dict().items() if key not in ("centre", "scale")}
        if self.setting.l_dim:
            for tap, (centre, scale) in enumerate(zip(self.centre, self.scale, strict=True)):
                _fold(state, f"adapter.taps.{tap}.down", centre, scale)
        else:
            _fold(state, "projector", self.shares.detach() @ self.centre, self.scale[0])
        return state


def _fold(state: dict[str, Tensor], layer: str, centre: Tensor, scale: Tensor) -> None:
    """Let a linear layer take what it took as `(x - centre) / scale`."""
    weight = state[f"{layer}.weight"] / scale
    state[f"{layer}.weight"] = weight
    state[f"{layer}.bias"] = state[f"{layer}.bias"] - weight @ centre


def train_reader(
    problem: Problem, setting: Setting, rows: Sequence[int], held_out: Sequence[int] = (), stop: int = CHECKS
) -> tuple[Reader, list[Tensor], list[float]]:
    """Train a candidate, up to the check `stop` of the whole schedule.

    Returned are the reader; for each check the answers for `held_out`, logits or embeddings; and the loss up to it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(problem.seed)
        generator = torch.Generator().manual_seed(problem.seed)
        rows = list(rows)
        labels = problem.labels[rows]
        reader = Reader(problem, setting, rows)
        if problem.verify:
            reader.classifier.bias.requires_grad_(False).zero_()
        weight = class_weights(problem, rows)
        layer_weights = [reader.adapter.layer_weights]
        matrices = [p for name, p in reader.named_parameters() if p.dim() > 1]
        others = [p for p in reader.parameters() if p.dim() == 1 and p is not layer_weights[0] and p.requires_grad]
        optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "initial_lr": setting.rate, "weight_decay": setting.weight_decay},
                {"params": others, "initial_lr": setting.rate},
                {"params": layer_weights, "initial_lr": LAYER_WEIGHTS_RATIO * setting.rate},
            ],
            weight_decay=0.0,
            fused=True,
        )
        answers, losses, total, order = [], [], 0.0, torch.empty(0, dtype=torch.long)
        checks = [round(setting.steps * number / CHECKS) for number in range(1, CHECKS + 1)]
        for step in range(1, checks[stop - 1] + 1):
            if len(order) < min(BATCH, len(rows)):
                order = torch.randperm(len(rows), generator=generator)
            batch, order = order[:BATCH], order[BATCH:]
            embeddings = reader.embed([rows[i] for i in batch.tolist()], generator)
            loss = _loss(problem, setting, reader, embeddings, labels[batch], weight)
            loss.backward()
            for group in optimizer.param_groups:  # It falls linearly to 0.
                group["lr"] = group["initial_lr"] * (1 - (step - 1) / setting.steps)
            optimizer.step()
            optimizer.zero_grad()
            total += float(loss.detach())
            if step in checks:
                losses.append(total / (step - (checks[len(losses) - 1] if losses else 0)))
                total = 0.0
                if len(held_out):
                    answers.append(answer(problem, reader, held_out))
        return reader.eval(), answers, losses


def class_weights(problem: Problem, rows: Sequence[int]) -> Tensor:
    """Return the weight of each class in a loss over some recordings: 1 where all are as frequent."""
    counts = torch.bincount(problem.labels[list(rows)], minlength=problem.classes)
    return len(rows) / (counts.clamp(min=1) * (counts > 0).sum())


def _loss(
    problem: Problem, setting: Setting, reader: Reader, embeddings: Tensor, labels: Tensor, weight: Any
) -> Tensor:
    if problem.verify:
        cosines = linear(normalize(embeddings), normalize(reader.classifier.weight))
        scores = SCALE * (cosines - MARGIN * one_hot(labels, problem.classes))
    else:
        scores = reader.classifier(embeddings)
    return cross_entropy(scores, labels, weight, label_smoothing=setting.smoothing)


@torch.no_grad()
def answer(problem: Problem, reader: Reader, rows: Sequence[int]) -> Tensor:
    """Return the logits of recordings, or their embeddings where voices are compared."""
    training = reader.training
    reader.eval()
    embeddings = reader.embed(list(rows))
    reader.train(training)
    return embeddings if problem.verify else reader.classifier(embeddings)


def place(state: Mapping[str, Tensor], adapted: Any) -> None:
    """Copy folded weights into a model with an ELP-adapter of the same setting.

    Raises:
        RuntimeError: The model has no parameter for a weight, or several.
    """
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    for key, value in state.items():
        wanted = key.replace("adapter.", "elp_l.default.", 1) if key.startswith("adapter.") else key
        found = [p for name, p in trained.items() if name.replace("modules_to_save.default.", "").endswith(wanted)]
        if len(found) != 1 or found[0].shape != value.shape:
            raise RuntimeError(f"{len(found)} parameters of the model are {wanted}; one is needed.")
        found[0].data.copy_(value)


def cool(adapted: Any, temperature: float) -> None:
    """Divide the logits of an adapted model by a temperature."""
    for name, x in adapted.named_parameters():
        if x.requires_grad and "classifier." in name:
            x.data.div_(temperature)
