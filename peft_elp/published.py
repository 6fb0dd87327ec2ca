"""The published settings, learning rates and schedules of E- and L-adapters.

Source: the code and the tables published with Otake et al. 2023 ([arXiv:2212.02780](https://arxiv.org/abs/2212.02780)),
[sinhat98/adapter-wavlm](https://github.com/sinhat98/adapter-wavlm), for WavLM-base-plus and Adam. Tasks: "asr", speech
recognition (LibriLight 10 h, CTC); "asv", speaker verification (VoxCeleb1); "er", emotion recognition (IEMOCAP); "ic",
intent classification (Fluent Speech Commands).

The settings have GELU, as the code has for "asr" and "ic". For "asv" and "er" it has ReLU in both adapters, and for
"asv" a projector of 768 features.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_SIZES = {"e_dim": 256, "l_dim": 512, "e_activation": "gelu", "l_activation": "gelu"}
_START = {"train_layer_norms": True, "init_weights": "paper", "init_std": 1e-3}

SETTINGS: dict[str, dict[str, Any]] = {
    "e+l": {"adapters": "EL", **_SIZES, **_START},
    "conventional": {"adapters": "E", "e_after": ("attention", "feed_forward"), **_SIZES, **_START},
    "e-only": {"adapters": "E", **_SIZES, **_START},
    "l-only": {"adapters": "L", **_SIZES, **_START},
    "e+l+p": {"adapters": "ELP", "p_length": 16, "p_init_std": 0.02, **_SIZES, **_START},
}
SETTINGS["paper"] = SETTINGS["e+l+p"]

_HEADS = {"asv": 5e-4, "er": 5e-4, "asr": 2e-3, "ic": 5e-4}
_E_ALONE = {task: {"head": head, "E": 1e-5, "layer norms": 1e-5} for task, head in _HEADS.items()}
# By setting and task: the rates of the head and of the parts that the setting trains.
RATES: dict[str, dict[str, dict[str, float]]] = {
    "e+l": {
        "asv": {"head": 5e-4, "L": 1e-4, "E": 1e-5, "layer norms": 1e-5},
        "er": {"head": 5e-4, "L": 1e-4, "E": 5e-5, "layer norms": 5e-5},
        "asr": {"head": 2e-3, "L": 1e-3, "E": 1e-3, "layer norms": 1e-3},
        "ic": {"head": 5e-4, "L": 1e-5, "E": 1e-5, "layer norms": 1e-5},
    },
    "conventional": {**_E_ALONE, "asr": {"head": 1e-3, "E": 1e-5, "layer norms": 1e-5}},
    "e-only": _E_ALONE,
    "l-only": {
        "asv": {"head": 5e-4, "L": 5e-4, "layer norms": 5e-4},
        "er": {"head": 5e-4, "L": 5e-4, "layer norms": 5e-4},
        "asr": {"head": 2e-3, "L": 1e-3, "layer norms": 1e-3},
        "ic": {"head": 5e-4, "L": 1e-4, "layer norms": 1e-4},
    },
}
# No published rate for P was found. P changes what frozen layers compute, as E does, so we give it the rate of E.
RATES["e+l+p"] = {task: {**rates, "P": rates["E"]} for task, rates in RATES["e+l"].items()}
RATES["paper"] = RATES["e+l+p"]

FACTORS: dict[str, tuple[float, ...]] = {
    "asv": (0.3, 0.5, 0.7, 1.0, 0.2, 0.1),
    "er": (1.0,) * 10 + (0.1,) * 10,
    "asr": (
        *(0.1 + 0.9 * epoch / 19 for epoch in range(20)),
        *(1.0,) * 3,
        *((1 - 0.99 * epoch / 77) / (1 + 9 * epoch / 77) for epoch in range(77)),
    ),
    "ic": (0.1, 0.5, 0.7, 1.0, 0.5, 0.3, 0.1),
}
_CONVENTIONAL_ASR = tuple(0.3 ** (epoch // 25) for epoch in range(100))


def published_rates(setting: str, task: str) -> dict[str, float]:
    """Return the published learning rates of a setting for a task.

    The layer weights have the rate of L, as published. "e+l+p" has the rates of "e+l", and P has the rate of E. That
    is our choice: no published rate for P was found.

    Args:
        setting: "e+l", "conventional", "e-only", "l-only", "e+l+p" or "paper", as in `ELPConfig.preset`.
        task: "asr", "asv", "er" or "ic".

    Returns:
        Rates by part, for `create_optimizer`: "head" and the parts that the setting has, out of "L", "layer weights",
        "E", "P" and "layer norms". Each call returns a new dictionary.

    Raises:
        ValueError: The setting or the task is unknown.

    Examples:
        >>> published_rates("e+l", "asv")
        {'head': 0.0005, 'L': 0.0001, 'layer weights': 0.0001, 'E': 1e-05, 'layer norms': 1e-05}
    """
    by_task = RATES[_known("setting", setting, RATES)]
    rates = {}
    for part, rate in by_task[_known("task", task, by_task)].items():
        rates |= {part: rate, "layer weights": rate} if part == "L" else {part: rate}
    return rates


def published_factors(setting: str, task: str) -> tuple[float, ...]:
    """Return the published factors of all learning rates, one for each epoch of training.

    There are as many factors as published epochs: 100 for "asr", 6 for "asv", 20 for "er" and 7 for "ic". For "asr"
    they rise linearly from 1/10 to 1 over the first 20 % of the training, stay at 1 for 3 %, and then fall as
    `(1 - 0.99 p) / (1 + 9 p)`, with `p` from 0 to 1, to 1/1000 at the end. For "asr" with "conventional" they are
    multiplied by 0.3 every 25 epochs instead.

    Args:
        setting: "e+l", "conventional", "e-only", "l-only", "e+l+p" or "paper", as in `ELPConfig.preset`.
        task: "asr", "asv", "er" or "ic".

    Returns:
        The factors, with a peak of 1, for `get_epochwise_schedule`.

    Raises:
        ValueError: The setting or the task is unknown.

    Examples:
        >>> published_factors("e+l", "asv")
        (0.3, 0.5, 0.7, 1.0, 0.2, 0.1)
    """
    _known("setting", setting, SETTINGS)
    factors = FACTORS[_known("task", task, FACTORS)]
    return _CONVENTIONAL_ASR if (setting, task) == ("conventional", "asr") else factors


def _known(what: str, name: Any, names: Iterable[str]) -> str:
    if name not in (names := list(names)):
        raise ValueError(f"Unknown {what} {name!r}; choose one of {', '.join(map(repr, names))}.")
    return name
