"""Whether saved tensors are those of an adapter, before any of them is written into the model.

Before an adapter is placed, its size is compared with the size of the file that it will be loaded from. When PEFT
hands over the tensors, they are compared with those of the adapter one by one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from peft_elp.parameters import belongs_to
from peft_elp.saved.weights import SavedTensor, is_accepted
from peft_elp.wording import shortened

from .build import new_e_adapter, new_l_adapter, new_p_adapter
from .head import Head, original
from .head_config import planned_head
from .paths import join
from .plan import Plan
from .wrapper import Wrapper

# What the names in a saved file start with: PEFT names a tensor from the PeftModel around the tuner around the model.
SAVED_PREFIX = "base_model.model."
# An adapter may have this many times more values than its file, and this many in any case, before it is refused.
MARGIN, ALWAYS_FITS = 10, 10**6


def expected_tensors(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """The tensors that an adapter will have, under their names in a file, without their values.

    Args:
        model: The model, before the adapter is placed.
        plan: The plan of the adapter.
    """
    encoder, config = plan.encoder, plan.config
    modules: dict[str, nn.Module] = {}
    with torch.device("meta"):
        modules |= {f"{encoder.layer_path(*site)}.elp_e": new_e_adapter(plan) for site in plan.e_sites}
        if "L" in config.adapters:
            modules[join(encoder.stack_path, "elp_l")] = new_l_adapter(plan)
        if "P" in config.adapters:
            modules[join(encoder.stack_path, "elp_p")] = new_p_adapter(plan)
    for layer, path in plan.norm_sites:
        norm = encoder.layers[layer].get_submodule(path)
        modules[f"{encoder.layer_path(layer, path)}.elp_norm"] = norm.base_layer if isinstance(norm, Wrapper) else norm
    paths = config.modules_to_save or ()
    head = planned_head(model, paths, config.head_config, plan.new_head_input, config.l_dim)
    for path in paths:
        modules[path] = head.get(path, original(model.get_submodule(path)))
    return {
        f"{SAVED_PREFIX}{path}.{name}": tensor.detach().to("meta")
        for path, module in modules.items()
        for name, tensor in module.state_dict().items()
    }


def refuse_too_large(model: nn.Module, plan: Plan, adapter_name: str, saved: Mapping[str, SavedTensor]) -> None:
    """Refuse a file of weights, before its adapter is placed, if the adapter would take far more memory than the file.

    Args:
        model: The model, before the adapter is placed.
        plan: The plan of the adapter.
        adapter_name: The adapter's name.
        saved: What is known of the tensors of the file.

    Raises:
        ValueError: The adapter would be far larger than the file.
    """
    expected = expected_tensors(model, plan)
    described = {name: torch.empty(held.shape, dtype=held.dtype, device="meta") for name, held in saved.items()}
    largest = max(MARGIN * sum(tensor.numel() for tensor in described.values()), ALWAYS_FITS)
    if sum(tensor.numel() for tensor in expected.values()) > largest:
        raise misfit_error(
            model, adapter_name, listed(problems(expected, described) | mismatches(expected, described))
        )


def with_head(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, with the tensors of the head under the names of the adapter's own copies in the model."""
    named = dict(state_dict)
    for path, head in model.named_modules():
        if isinstance(head, Head) and adapter_name in head.modules_to_save:
            for name in head.modules_to_save[adapter_name].state_dict():
                if f"{path}.{name}" in named:
                    named[f"{path}.modules_to_save.{adapter_name}.{name}"] = named.pop(f"{path}.{name}")
    return named


def adapter_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The tensors that an adapter has in the model, by their names in a state dict."""
    return {name: tensor for name, tensor in model.state_dict().items() if belongs_to(adapter_name, name)}


def problems(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """How saved tensors differ from those of an adapter, shapes aside.

    Args:
        expected: The tensors of the adapter.
        given: The saved tensors, by the same kind of names.

    Returns:
        The names of the tensors that differ, by how they do.
    """
    return {
        "missing": [f"{name} {_shape(tensor)}" for name, tensor in expected.items() if name not in given],
        "left over": [f"{name} {_shape(tensor)}" for name, tensor in given.items() if name not in expected],
        "not floating-point": [
            f"{name} {tensor.dtype}" for name, tensor in given.items() if name in expected and not is_accepted(tensor)
        ],
        "not finite": [
            name
            for name, tensor in given.items()
            if name in expected and is_accepted(tensor) and not is_finite(tensor, expected[name].dtype)
        ],
    }


def mismatches(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Which saved tensors have another shape than the adapter's tensor of that name."""
    return {
        "of another shape": [
            f"{name} {_shape(tensor)} in place of {_shape(expected[name])}"
            for name, tensor in given.items()
            if name in expected and _shape(tensor) != _shape(expected[name])
        ]
    }


def listed(problems: dict[str, list[str]]) -> str:
    """The problems in words, or an empty string if there are none."""
    return "; ".join(f"{len(names)} {what} ({shortened(names, shown=4)})" for what, names in problems.items() if names)


def misfit_error(model: nn.Module, adapter_name: str, what: str) -> ValueError:
    """The error about an adapter that was not loaded."""
    return ValueError(
        f"The saved tensors are not those of adapter {adapter_name!r} in {type(model).__name__}: {what}. Nothing was "
        "loaded. Load the adapter into the backbone that it was trained on (base_model_name_or_path in its "
        "adapter_config.json), from the folder that save_pretrained wrote."
    )


def is_finite(tensor: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether all values of a floating-point tensor are finite, also after they are converted to `dtype`."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta:
        return True
    low, high = tensor.aminmax()  # Both are NaN if one value is NaN. This takes half the time of isfinite().all().
    return bool(torch.stack([low, high]).to(dtype or tensor.dtype).isfinite().all())


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(getattr(tensor, "ds_shape", tensor.shape))  # DeepSpeed's ZeRO-3 keeps the full shape there.
