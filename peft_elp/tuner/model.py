"""ELPModel: the tuner that PEFT puts around a speech encoder."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import torch
from accelerate import init_empty_weights
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from peft_elp.adapters import EAdapter, LAdapter, PAdapter
from peft_elp.call.route import BASE, Route, current_route
from peft_elp.config import ELPConfig

from .averaging import check_combination, combine
from .fit import misfit_error, misfits, mismatches, with_head
from .guards import expect_loading, refuse_unloaded
from .head import Head, place_head, remove_head
from .layers import WHY_NO_MERGE, ELPLayer, ELPNorm, ELPSublayer, Wrapper
from .one_pass import Task, parts_of, refuse_idle_labels, refuse_reports, run
from .paths import canonical
from .place import join_head, new_head, placed, remove_adapter, unwrap, wrap, wrap_stack
from .plan import Plan, check_adapter_name, make_plan
from .stack import ELPStack


class ELPModel(BaseTuner):
    """The tuner that `get_peft_model(model, ELPConfig())` puts around a speech encoder, with any of its heads.

    Takes what every tuner of PEFT takes: a model, which contains one supported speech encoder; a configuration, or
    configurations by adapter name; and the name of the first adapter.

    Raises:
        ValueError: The model has no supported encoder or several, or the configuration does not fit it. The model is
            then as it was.

    Examples:
        >>> from peft import get_peft_model
        >>> from transformers import WavLMConfig, WavLMForCTC
        >>> import peft_elp
        >>> size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, layerdrop=0.0)
        >>> model = get_peft_model(WavLMForCTC(WavLMConfig(vocab_size=8, **size)), peft_elp.ELPConfig())
        >>> model.peft_config["default"].l_output
        'head'
    """

    prefix = "elp_"
    tuner_layer_cls = ELPLayer

    def __init__(self, model: nn.Module, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        # PEFT's inject_adapter_in_model passes a bare config; whoever calls it goes on with the model that it passed.
        self._direct = isinstance(peft_config, PeftConfig)
        self._switched: tuple[list[Head], list[ELPLayer]] | None = None
        # What was trainable before an adapter was placed whose tensors are to be loaded next.
        self._unloaded: dict[str, dict[nn.Parameter, bool]] = {}
        super().__init__(model, peft_config, *args, **kwargs)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Place one adapter; called by PEFT for the first and for every further one.

        PEFT's own walk replaces modules by a list of names made beforehand, in which a parent that is replaced hides
        its children. ELP wraps parents and children, so it follows a plan of its own.

        Raises:
            ValueError: The configuration does not fit the model. Nothing is changed then.
            RuntimeError: An adapter that the plan holds was not found after placing. The adapter is removed again.
        """
        config = self.peft_config[adapter_name]
        assert isinstance(config, ELPConfig)
        self._check_new_adapter_config(config)
        check_adapter_name(model, adapter_name)
        plan = make_plan(model, config)
        if self._direct and not plan.parts.stack_path:
            raise ValueError(
                f"{type(model).__name__} is an encoder stack itself, which has to be wrapped as a whole: adapters "
                "that are injected into it would be passed by. Use get_peft_model(model, config)."
            )
        layers = [layer for layer in model.modules() if isinstance(layer, (ELPLayer, Head))]
        trainable_before = {parameter: parameter.requires_grad for parameter in model.parameters()}
        names_before = [layer._trainable for layer in layers]

        if plan.config != config:  # else the caller's own object, as from_pretrained(..., config=config) promises
            self.peft_config[adapter_name] = plan.config
        if config.weights_follow:
            self._unloaded[adapter_name] = trainable_before
        try:
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._place(model, adapter_name, plan)
            model = self.model if not plan.parts.stack_path else model
            missing = plan.expected() - placed(model, adapter_name)
            if missing:
                raise RuntimeError(
                    f"{len(missing)} of {len(plan.expected())} adapters found no place: {', '.join(sorted(missing))}. "
                    "Are layers of this model shared? Name the layers to adapt with e_layers and l_layers."
                )
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
            self._mark_only_adapters_as_trainable(model)
            place_head(
                model,
                plan.config.modules_to_save or [],
                adapter_name,
                active=adapter_name in self.active_adapters,
                inference_mode=config.inference_mode,
                replacements=new_head(model, plan),
                named_by_tuner=not self._direct,
            )
            join_head(model, plan, adapter_name)
        except BaseException:
            self.peft_config[adapter_name] = config
            self._unloaded.pop(adapter_name, None)
            self.model = remove_adapter(self.model, adapter_name)
            _restore(trainable_before)
            raise
        finally:
            self._switched = None

        # A further adapter leaves what others train as it was. The first one freezes the backbone, and without a
        # PeftModel each becomes the only active one.
        if layers and not self._direct:
            _restore(trainable_before)
            for layer, names in zip(layers, names_before, strict=True):
                layer._trainable = layer._trainable | names
        self.targeted_module_names[:] = [
            canonical(name)
            for name, module in model.named_modules()
            if isinstance(module, ELPLayer) and module.adapter_layer_names
        ]
        if self._direct:
            self._finish_alone(model, adapter_name, autocast_adapter_dtype)

    def _finish_alone(self, model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool) -> None:
        """Do for an adapter what a PeftModel does, for a model that goes on without one, as in Transformers' API."""
        self._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for module in model.modules():
            if isinstance(module, Wrapper):
                module.keep_names()
        config = self.peft_config[adapter_name]
        kind = type(model)
        config.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
        if config.inference_mode:
            own = re.compile(rf"\.(elp_[a-z]+|modules_to_save)\.{re.escape(adapter_name)}\.")
            expect_loading(parameter for name, parameter in model.named_parameters() if own.search(name))
            if refuse_unloaded not in model._forward_pre_hooks.values():
                model.register_forward_pre_hook(refuse_unloaded)
        if self.get_input_embeddings() is None:  # which saving asks the model for, where a PeftModel asks the tuner
            vars(model).update(get_input_embeddings=_no_embeddings, get_output_embeddings=_no_embeddings)

    def _place(self, model: nn.Module, adapter_name: str, plan: Plan) -> None:
        config, parts = plan.config, plan.parts
        active, frozen = self.active_adapters, config.inference_mode
        init_std = config.init_std if config.init_weights else None
        for layer, part in plan.e_sites:
            sublayer = wrap(parts.layers[layer], part, ELPSublayer, active)
            adapter = EAdapter(parts.hidden_size, config.e_dim, config.e_activation, config.e_dropout, init_std)
            sublayer.place("elp_e", adapter_name, adapter, frozen)
        for layer, part in plan.norm_sites:
            wrap(parts.layers[layer], part, ELPNorm, active).copy_for(adapter_name, frozen)

        stack = wrap_stack(model, parts, active)
        if config.window_s is not None:
            stack.windows[adapter_name] = config.window_s
        if "L" in config.adapters:
            assert config.l_layers is not None
            assert config.l_output is not None
            assert config.l_input_norm is not None
            stack.tapped_layers[adapter_name] = config.l_layers
            if stack.layerdrop > 0:
                warnings.warn(
                    f"LayerDrop ({parts.family.layerdrop}={stack.layerdrop}) is off while an L-adapter is active: a "
                    "layer that is skipped has no output to read. unload() restores it.",
                    stacklevel=2,
                )
            adapter = LAdapter(
                parts.hidden_size,
                len(config.l_layers),
                config.l_dim,
                config.l_activation,
                config.l_dropout,
                init_std,
                output="taps" if config.l_output == "head" else config.l_output,
                input_norm=config.l_input_norm,
            )
            stack.place("elp_l", adapter_name, adapter, frozen)
        if "P" in config.adapters:
            adapter = PAdapter(parts.hidden_size, config.p_length, config.p_position, config.p_init_std)
            stack.place("elp_p", adapter_name, adapter, frozen)
        if not parts.stack_path:
            self.model = stack

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """What PEFT enters around each call: a batch whose utterances use different adapters, if the caller says so.

        Raises:
            ValueError: The model is in training mode, or an adapter does not exist.
        """
        self._unloaded.clear()  # what has answered is not taken out again
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"adapter_names is a list with one name an utterance, got {names!r}.")
        if self.training:
            raise ValueError(
                "adapter_names mixes adapters in one batch for inference only, and the model is in training mode. "
                "Call model.eval() first, or train one adapter at a time."
            )
        unknown = sorted({*names} - {*self.peft_config, BASE})
        if unknown:
            raise ValueError(
                f"adapter_names asks for {', '.join(map(repr, unknown))}, and the model has "
                f"{', '.join(map(repr, sorted(self.peft_config)))}; {BASE!r} stands for the backbone alone."
            )
        generation = kwargs.get("generation_config") or getattr(self.model, "generation_config", None)
        repeats = [kwargs.get(name, getattr(generation, name, None)) for name in ("num_beams", "num_return_sequences")]
        with current_route.set(Route(names, max(1, *(number or 1 for number in repeats)))):
            yield

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make an adapter the active one, and the only trainable one unless `inference_mode` is set.

        PEFT searches the whole model for what has to be switched. This searches once.

        Args:
            adapter_name: Its name. Or several: E-adapters then run one after the other and pseudo features join one
                another; of L-adapters, trained layer norms and heads only one can be active.
            inference_mode: Leave it frozen.

        Raises:
            ValueError: There is no adapter of that name, or several have a copy of the head. Nothing is switched then.
        """
        unknown = {adapter_name} if isinstance(adapter_name, str) else {*adapter_name}
        unknown -= {*self.peft_config}
        if unknown:
            raise ValueError(
                f"There is no adapter {', '.join(map(repr, sorted(unknown)))}; the model has "
                f"{', '.join(map(repr, sorted(self.peft_config)))}."
            )
        if self._switched is None:
            modules = list(self.model.modules())
            self._switched = (
                [module for module in modules if isinstance(module, Head)],
                [module for module in modules if isinstance(module, ELPLayer)],
            )
        heads, layers = self._switched
        copies = [head.check_set_adapter(adapter_name) for head in heads]
        for head, name in zip(heads, copies, strict=True):
            head.set_adapter([name] if name and name in head._adapters else [], inference_mode=inference_mode)
        for layer in layers:
            layer.set_adapter(adapter_name, inference_mode=inference_mode)
        self.active_adapter = adapter_name

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; where it was active, the first of the others is active then."""
        active = [name for name in self.active_adapters if name != adapter_name]
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        self._switched = None
        # In PEFT each layer chooses what comes next among its own, and the first layer for all: a part that only some
        # adapters have would leave them mixed, or none of them active.
        following = active or list(self.peft_config)[:1]
        if was_active and following:
            self.set_adapter(following)

    def forward_all(
        self,
        adapter_names: Sequence[str],
        *args: Any,
        labels: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The outputs of several L-adapters, each with its head, from one pass through the frozen backbone.

        Equal to activating each of them and calling the model. In training, gradients reach those that are trainable
        (`model.set_requires_grad(adapter_names)`).

        Args:
            adapter_names: Names of adapters that leave the backbone alone: `adapters="L"`, `train_layer_norms=False`.
            args: What the model takes.
            labels: For each adapter that is to have a loss, its labels.
            kwargs: What the model takes.

        Returns:
            The model's output under each name.

        Raises:
            ValueError: An adapter is unknown, or changes what the layers compute; or hidden states are asked for.
        """
        names = [*adapter_names, *(labels or ())]
        unknown = sorted({*names} - {*self.peft_config})
        if unknown or isinstance(adapter_names, str):
            raise ValueError(
                f"forward_all takes a list of adapter names, got {adapter_names!r}; the model has "
                f"{', '.join(map(repr, sorted(self.peft_config)))}."
            )
        refuse_reports(self.model, kwargs)
        refuse_idle_labels(adapter_names, labels)
        self._unloaded.clear()
        parts, stack = parts_of(self)
        tasks: dict[str, Task] = {}
        for name in adapter_names:
            own = kwargs if name not in (labels or {}) else kwargs | {"labels": (labels or {})[name]}
            tasks[name] = Task(
                parts.backbone, stack, name, partial(self._as, name, stack, *args, **own), Route.only(name)
            )
            if not tasks[name].leaves_backbone_alone():
                config: Any = self.peft_config[name]
                raise ValueError(
                    f"{name!r} changes what the layers compute (adapters={config.adapters!r}, "
                    f"train_layer_norms={config.train_layer_norms}, modules_to_save={config.modules_to_save}), so "
                    "that it has no pass in common with others. Share passes among adapters with adapters='L' and "
                    "train_layer_norms=False that train nothing of the encoder but its head, and call the model once "
                    "for each of the others."
                )
        return run(tasks)

    def _as(self, adapter_name: str, stack: ELPStack, *args: Any, **kwargs: Any) -> Any:
        """Call the model with the settings of an adapter's head, on which its loss depends."""
        stack.task_head.follow([adapter_name], enabled=not stack.disable_adapters)
        stack._switch_layerdrop(off=True)
        try:
            return self.model(*args, **kwargs)
        finally:
            stack._follow_adapters()

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add the weighted average of adapters of one make as a further adapter, as model soups do.

        Computes `sum_i weights_i * adapters_i` over all tensors, those of the head included. As in PEFT, the new
        adapter is frozen, and not active until `set_adapter`.

        Args:
            adapters: Names of adapters with the same letters, sizes, layers and head.
            weights: One weight for each. They add up to 1; some may be negative.
            adapter_name: Name of the new adapter.
            combination_type: "linear", the only one that has a meaning for ELP.

        Raises:
            ValueError: The adapters are of different make, or another argument does not fit. Nothing is changed then.
        """
        if combination_type != "linear":
            raise ValueError(
                f"combination_type={combination_type!r} combines low-rank factors, which ELP-adapters do not have. "
                "Write combination_type='linear'."
            )
        config = check_combination(self.peft_config, adapters, weights, adapter_name)
        self.peft_config[adapter_name] = replace(config, inference_mode=True)
        try:
            self.inject_adapter(self.model, adapter_name)
        except BaseException:
            self.peft_config.pop(adapter_name)
            raise
        combine(self.model, adapters, weights, adapter_name)

    def get_input_embeddings(self) -> nn.Module | None:
        """The embeddings of a text vocabulary, None for an encoder of speech.

        PEFT asks for them when it saves a model whose vocabulary is not that of its base, such as a CTC head for a new
        language. Transformers raises for most speech models.
        """
        base: Any = self.model
        try:
            return base.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            return None

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError("ELP places its adapters in inject_adapter, by a plan.")

    def _check_merge_allowed(self) -> NoReturn:
        raise ValueError(WHY_NO_MERGE)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            self._check_merge_allowed()
        self.model = unwrap(self.model)
        remove_head(self.model)
        self._switched = None
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model

    # PEFT looks for an adapter's tensors under the names of its modules. Not every state dict has these: Transformers'
    # leaves ELP's wrappers out, that of an FSDP1 unit or an activation checkpoint PyTorch's. And the saved name of a
    # tensor must not depend on which other adapters wrap the same backbone.

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: Sequence[str] = (),
    ) -> dict[str, torch.Tensor]:
        pattern = re.compile(rf"\b{cls.prefix}[a-z]+\.{re.escape(adapter_name)}\.")
        return {key: tensor for key, tensor in state_dict.items() if pattern.search(key)}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return canonical(re.sub(rf"\b({cls.prefix}[a-z]+)\.{re.escape(adapter_name)}(?=\.)", r"\1", key))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The saved tensors under their names in the model, if they are those of the adapter.

        Raises:
            ValueError: They are not. An adapter that was placed to be loaded is taken out again.
        """
        own = cls._get_adapter_state_dict(model, config, adapter_name, model.state_dict())
        names = {cls._remove_adapter_name_from_key(key, adapter_name): key for key in own}
        outside = "base_model.model."  # which a saved name starts with, and a model without a PeftModel around lacks
        names |= {outside + saved: key for saved, key in names.items() if not key.startswith(outside)}
        named = with_head(model, adapter_name, {names.get(key, key): tensor for key, tensor in state_dict.items()})
        tuner = getattr(model, "base_model", None)
        trainable = tuner._unloaded.pop(adapter_name, None) if isinstance(tuner, cls) else None

        def refuse(what: str) -> None:
            if what and isinstance(tuner, cls) and trainable is not None:
                tuner._take_back(adapter_name, trainable)
            if what:
                raise misfit_error(model, adapter_name, what)

        def refuse_mismatches(_: nn.Module, tensors: dict[str, torch.Tensor], *args: Any) -> None:
            hook.remove()
            refuse(mismatches(model, tensors))

        refuse(misfits(model, adapter_name, named))
        # Only PEFT knows by now whether tensors of another size are to be passed over, and which.
        hook = model.register_load_state_dict_pre_hook(refuse_mismatches)
        return named

    def _take_back(self, adapter_name: str, trainable: dict[nn.Parameter, bool]) -> None:
        """Leave the model as it was before an adapter was placed."""
        del self.peft_config[adapter_name]
        self.model = remove_adapter(self.model, adapter_name)
        self._switched = None
        _restore(trainable)
        if not self.peft_config and hasattr(self.model, "peft_config"):
            del self.model.peft_config


def _no_embeddings() -> None:
    """What a model of speech answers when it is asked for the embeddings of a text vocabulary."""


def _restore(trainable: dict[nn.Parameter, bool]) -> None:
    for parameter, requires_grad in trainable.items():
        parameter.requires_grad_(requires_grad)
