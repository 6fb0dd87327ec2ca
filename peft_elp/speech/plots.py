"""Figures of layer weights, confusions between labels, and the errors of speaker verification.

Figures are made without `pyplot`, so none is shown or kept open. Save one with `figure.savefig("name.pdf")`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from numpy.typing import ArrayLike
from torch import nn

from peft_elp.wording import shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Shares = Sequence[tuple[int, float]]
INK = "#808080"  # can be read on light and on dark pages


def layer_weights(model: nn.Module, adapter_name: str = "default") -> list[tuple[int, float]]:
    """Return the layer weights of an L-adapter: each layer's share in its sum, `softmax(w)`.

    Args:
        model: A model with ELP-adapters, as `get_peft_model` returns it.
        adapter_name: The adapter.

    Returns:
        For each tapped layer its number, from 0, and its share. Shares are positive and sum to 1. Before training they
        are equal.

    Raises:
        ValueError: The model has no L-adapter of that name.

    Examples:
        >>> layer_weights(model)  # doctest: +SKIP
        [(0, 0.31), (1, 0.69)]
    """
    stacks: list[Any] = [module for module in model.modules() if isinstance(getattr(module, "elp_l", None), nn.Module)]
    for stack in stacks:
        if adapter_name in stack.elp_l:
            shares = stack.elp_l[adapter_name].shares().tolist()
            return list(zip(stack.tapped_layers[adapter_name], shares, strict=True))
    names = sorted(name for stack in stacks for name in stack.elp_l)
    raise ValueError(
        f"{type(model).__name__} has no L-adapter named {adapter_name!r}; it has {shortened(names) or 'none'}. "
        "ELPConfig(adapters=...) places one if the letters contain L."
    )


def plot_layer_weights(adapters: Mapping[str, nn.Module | Shares]) -> Figure:
    """Draw the layer weights as bars, for one or several adapters side by side.

    Args:
        adapters: For each label, such as a task: a model, whose adapter "default" is drawn, or the list that
            `layer_weights` returns.

    Raises:
        ValueError: There is nothing to draw, or a model has no L-adapter.
        ImportError: matplotlib is not installed.

    Examples:
        >>> figure = plot_layer_weights({"asr": [(0, 0.2), (1, 0.8)], "asv": [(0, 0.7), (1, 0.3)]})
        >>> figure.axes[0].get_xlabel()
        'layer'
    """
    if not isinstance(adapters, Mapping) or not adapters:
        raise ValueError(
            f"adapters must be a dictionary from labels to models, such as {{'asr': model}}, got {type(adapters)}."
        )
    series = {label: dict(layer_weights(x) if isinstance(x, nn.Module) else x) for label, x in adapters.items()}
    numbers = sorted({number for points in series.values() for number in points})
    width = 0.8 / len(series)
    figure = _figure(max(4.8, 0.3 * len(numbers) * len(series)), 3.2)
    axes = figure.subplots()
    for place, (label, points) in enumerate(series.items()):
        left = -0.4 + place * width
        axes.bar([number + left for number in points], list(points.values()), width, align="edge", label=label)
    axes.set(xlabel="layer", ylabel="layer weight", xticks=numbers)
    axes.legend()
    return _legible(figure)


def plot_confusion(labels: Sequence[str], predictions: Sequence[str]) -> Figure:
    """Draw how often each label was predicted for each true label.

    Args:
        labels: The true label of each recording.
        predictions: The predicted label of each recording.

    Raises:
        ImportError: matplotlib or scikit-learn is not installed.

    Examples:
        >>> figure = plot_confusion(["yes", "no", "no"], ["yes", "no", "yes"])
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['1', '1', '0', '1']
    """
    figure = _figure(6.4, 5.6)
    from sklearn.metrics import ConfusionMatrixDisplay

    ConfusionMatrixDisplay.from_predictions(labels, predictions, ax=figure.subplots(), xticks_rotation="vertical")
    return _legible(figure)


def plot_det(systems: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> Figure:
    """Draw the detection error trade-off: misses against false alarms, over all thresholds.

    Args:
        systems: For each name of a system, the labels and the scores of its trials, as `equal_error_rate` takes them.

    Raises:
        ImportError: matplotlib or scikit-learn is not installed.

    Examples:
        >>> figure = plot_det({"E+L": ([1, 1, 0, 0], [0.9, 0.4, 0.6, 0.1])})
        >>> figure.axes[0].get_legend().get_texts()[0].get_text()
        'E+L'
    """
    figure = _figure(4.8, 4.8)
    from sklearn.metrics import DetCurveDisplay

    axes = figure.subplots()
    for name, (labels, scores) in systems.items():
        DetCurveDisplay.from_predictions(labels, scores, name=name, ax=axes)
    return _legible(figure)


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'peft-elp[recipes]'") from error
    return Figure(figsize=(width, height), layout="constrained", facecolor="none")


def _legible(figure: Figure) -> Figure:
    """Draw in grey what is not data, without a background, for light and for dark pages."""
    for axes in figure.axes:
        axes.set_facecolor("none")
        axes.spines[:].set_color(INK)
        axes.tick_params(colors=INK)
        legend = axes.get_legend()
        for text in (axes.xaxis.label, axes.yaxis.label, *(legend.get_texts() if legend else ())):
            text.set_color(INK)
        if legend:
            legend.set_frame_on(False)
    return figure
