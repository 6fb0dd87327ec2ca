"""Figures of what L- and P-adapters have learned.

Figures are made without `pyplot`, so none is shown or kept open. Save one with `figure.savefig("name.pdf")`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from peft_elp.adapters import LAdapter, PAdapter
from peft_elp.wording import shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = Sequence[tuple[int, float]]


def layer_weights(model: nn.Module, adapter_name: str = "default") -> list[tuple[int, float]]:
    """The layer weights of an L-adapter: each layer's share in its sum, `softmax(w)`.

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
    stack = _stack_with(model, "elp_l", "L", adapter_name)
    adapter = stack.elp_l[adapter_name]
    assert isinstance(adapter, LAdapter)
    return list(zip(stack.tapped_layers[adapter_name], adapter.shares().tolist(), strict=True))


def pseudo_feature_norms(model: nn.Module, adapter_name: str = "default") -> list[tuple[int, float]]:
    """The Euclidean norm of each pseudo feature of a P-adapter.

    Args:
        model: A model with ELP-adapters, as `get_peft_model` returns it.
        adapter_name: The adapter.

    Returns:
        For each pseudo feature its number, from 0, and its norm.

    Raises:
        ValueError: The model has no P-adapter of that name.

    Examples:
        >>> pseudo_feature_norms(model)  # doctest: +SKIP
        [(0, 0.55), (1, 0.57)]
    """
    adapter = _stack_with(model, "elp_p", "P", adapter_name).elp_p[adapter_name]
    assert isinstance(adapter, PAdapter)
    return list(enumerate(adapter.rows.norm(dim=1).tolist()))


def plot_layer_weights(adapters: Mapping[str, nn.Module | Points]) -> Figure:
    """Bars of the layer weights, for one or several adapters side by side.

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
    return _bars(adapters, layer_weights, "layer", "layer weight")


def plot_pseudo_features(adapters: Mapping[str, nn.Module | Points]) -> Figure:
    """Bars of the norms of the pseudo features, for one or several adapters side by side.

    Args:
        adapters: For each label, such as a task: a model, whose adapter "default" is drawn, or the list that
            `pseudo_feature_norms` returns.

    Raises:
        ValueError: There is nothing to draw, or a model has no P-adapter.
        ImportError: matplotlib is not installed.

    Examples:
        >>> figure = plot_pseudo_features({"asr": [(0, 0.5), (1, 0.6)]})
        >>> figure.axes[0].get_ylabel()
        'norm'
    """
    return _bars(adapters, pseudo_feature_norms, "pseudo feature", "norm")


def _stack_with(model: nn.Module, container: str, letter: str, adapter_name: str) -> Any:
    stacks: list[Any] = [
        module for module in model.modules() if isinstance(getattr(module, container, None), nn.ModuleDict)
    ]
    for stack in stacks:
        if adapter_name in getattr(stack, container):
            return stack
    names = sorted(name for stack in stacks for name in getattr(stack, container))
    raise ValueError(
        f"{type(model).__name__} has no {letter}-adapter named {adapter_name!r}; it has {shortened(names) or 'none'}. "
        f"ELPConfig(adapters=...) places one if the letters contain {letter}."
    )


def _bars(
    adapters: Mapping[str, nn.Module | Points], of_model: Callable[[nn.Module], Points], xlabel: str, ylabel: str
) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'peft-elp[recipes]'") from error

    if not isinstance(adapters, Mapping) or not adapters:
        raise ValueError(
            f"Plots take a dictionary with a label for each adapter, got {type(adapters).__name__}. Write for "
            "example {'asr': model}."
        )
    series = {label: dict(of_model(x) if isinstance(x, nn.Module) else x) for label, x in adapters.items()}
    numbers = sorted({number for points in series.values() for number in points})
    width = 0.8 / len(series)
    figure = Figure(figsize=(max(4.8, 0.3 * len(numbers) * len(series)), 3.2), layout="constrained")
    axes = figure.subplots()
    for place, (label, points) in enumerate(series.items()):
        left = -0.4 + place * width
        axes.bar([number + left for number in points], list(points.values()), width, align="edge", label=label)
    axes.set(xlabel=xlabel, ylabel=ylabel, xticks=numbers)
    axes.legend()
    return figure
