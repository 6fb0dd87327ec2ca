"""Which modules of a model are its head, and which of them an adapter trains."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from peft_elp.backbones import BRIDGES, family
from peft_elp.heads import head_input
from peft_elp.wording import brief, shortened

from .find import Encoder
from .paths import canonical, join, original


def find_head(model: nn.Module, backbone_path: str, warn: bool = False) -> list[str]:
    """Return the paths of the modules outside the speech encoder.

    The head is found without knowing its name: it is every module with parameters that is not on the way from the
    model to the encoder. A bare model of Transformers has no head, so the search ends there. The modules in a list are
    named one by one, since a list is never called. With `warn`, parameters outside any module are named, which PEFT
    cannot train.
    """
    head: list[str] = []
    here, path = model, ""
    for step in backbone_path.split(".") if backbone_path else ():
        if type(here).__module__.startswith("transformers.") and type(here).__name__.endswith("Model"):
            break
        bare = [name for name, _ in here.named_parameters(recurse=False)]
        if bare and warn:
            warnings.warn(
                f"{shortened(bare)} of {type(here).__name__} stay frozen and are not saved with the adapter: PEFT "
                "trains modules, and these are outside any module of the head. Move them into one; for a trained sum "
                "over layers, use an L-adapter instead of use_weighted_layer_sum.",
                stacklevel=2,
            )
        for name, child in here.named_children():
            if name != step and not any(family(type(module)) for module in child.modules()):
                head += _callable_modules(join(path, name), child)
        here, path = here.get_submodule(step), join(path, step)
    return head


def _callable_modules(path: str, module: nn.Module) -> list[str]:
    """Return the path of a module with parameters, or of the modules in a list, which is never called."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return [
            inner for name, child in module.named_children() for inner in _callable_modules(join(path, name), child)
        ]
    return [path] if any(True for _ in module.parameters()) else []


def choose_head(model: nn.Module, encoder: Encoder, wanted: list[str] | None) -> list[str]:
    """Return the paths of the modules that an adapter trains and saves whole: those that `modules_to_save` names.

    None: the head, or what joins the encoder to a pre-trained decoder.
    """
    if wanted is not None:
        chosen = _resolve(model, wanted, encoder.stack_path, find_head(model, encoder.backbone_path))
    elif _generates(model):
        chosen = [name for name in BRIDGES if hasattr(model, name)]
    else:
        chosen = find_head(model, encoder.backbone_path, warn=True)
    _refuse_quantised(model, chosen)
    return chosen


def _generates(model: nn.Module) -> bool:
    """Whether what follows the encoder is a pre-trained decoder or language model rather than a task's head."""
    generates = isinstance(model, PreTrainedModel) and (model.can_generate() or hasattr(model, "generate_speech"))
    return generates and head_input(type(model)) is None


def _resolve(model: nn.Module, names: list[str], stack_path: str, head: list[str]) -> list[str]:
    """Return the full paths of the modules that `modules_to_save` names, by a full path or by endings of paths."""
    modules = {canonical(name): module for name, module in model.named_modules() if ".modules_to_save." not in name}
    paths: list[str] = []
    for name in names:
        found = [name] if name in modules else [path for path in modules if path.endswith(f".{name}")]
        found = [inner for path in found for inner in _callable_modules(path, modules[path])]
        if not found:
            raise ValueError(
                f"modules_to_save names {brief(name)}, and {type(model).__name__} has no such module with parameters. "
                f"Its head, which None trains, is {brief(head) if head else 'empty: it is a bare encoder'}."
            )
        for path in found:
            if f"{stack_path}.".startswith(f"{path}.") or path.startswith(f"{stack_path}."):
                raise ValueError(
                    f"modules_to_save names {brief(name)}, which means {path!r}: that lies around or inside the "
                    f"encoder {stack_path!r}. Name modules outside of it, such as {brief(head) if head else 'a head'}."
                )
        paths += [path for path in found if path not in paths]
    return paths


def _refuse_quantised(model: nn.Module, head: list[str]) -> None:
    """Refuse a head that is quantised, since it is trained. The frozen encoder may be quantised."""
    for path in head:
        for name, parameter in original(model.get_submodule(path)).named_parameters():
            # torchao's tensors report a floating-point dtype.
            if not parameter.dtype.is_floating_point or type(parameter).__module__.startswith("torchao"):
                raise ValueError(
                    f"{join(path, name)!r} is quantised ({type(parameter).__name__}, {parameter.dtype}), and the head "
                    "is trained. Quantise the encoder alone: pass BitsAndBytesConfig("
                    f"llm_int8_skip_modules={brief(head)}), or call torchao's quantize_ on the model's base_model."
                )


def was_loaded(parameter: nn.Parameter) -> bool:
    """Whether Transformers has loaded a parameter. It marks those, and a deep copy has no marks."""
    return getattr(parameter, "_is_hf_initialized", False)


def warn_of_new_and_frozen(model: nn.Module, trained: list[str]) -> None:
    """Warn about modules that Transformers has newly initialised and that stay frozen."""
    marked = {id(parameter) for parameter in model.parameters() if was_loaded(parameter)}
    frozen = _largest_without(lambda parameter: id(parameter) in marked, "", model, {*trained}) if marked else []
    if frozen:
        warnings.warn(
            f"{shortened(map(repr, frozen))} of {type(model).__name__} are newly initialised and stay frozen. Train "
            f"them too: modules_to_save={[*trained, *frozen]}.",
            stacklevel=2,
        )


def _largest_without(
    loaded: Callable[[nn.Parameter], bool], path: str, module: nn.Module, trained: set[str]
) -> list[str]:
    """Return the paths of the largest modules without a loaded parameter, apart from what is trained."""
    name = canonical(path)
    if name in trained or name.rpartition(".")[2].startswith("elp_") or isinstance(module, ModulesToSaveWrapper):
        return []
    parameters = list(module.parameters())
    holds_trained = any(inner.startswith(f"{name}.") for inner in trained)  # As a list of modules does.
    if parameters and not holds_trained and not any(map(loaded, parameters)):
        return [name]
    return [
        found
        for step, child in module.named_children()
        for found in _largest_without(loaded, join(path, step), child, trained)
    ]
