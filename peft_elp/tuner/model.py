"""ELPModel: the tuner that PEFT puts around a speech encoder."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import torch
from accelerate import init_empty_weights
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from peft_elp.call.reports import asking
from peft_elp.call.route import BASE, Route, current_route
from peft_elp.call.shared_pass import CACHED, cached_pass, current_pass
from peft_elp.parameters import SETTINGS, belongs_to
from peft_elp.saved.weights import SavedTensor
from peft_elp.wording import unknown_adapter

from .averaging import check_combination, combine
from .head import Head
from .layers import WHY_NO_MERGE, ELPLayer
from .misfits import refuse_misfits, refuse_other_settings
from .one_pass import Task, adapted_encoder, refuse_idle_labels, refuse_reports, run_tasks
from .paths import canonical
from .place import adapted_modules, place_adapter, unwrap
from .plan import SAVED_PREFIX, Plan, check_adapter_name, make_plan
from .stack import ELPStack, set_frozen_norms
from .without_peft_model import prepare_for_transformers

WHY_NOT_CACHED = (
    "A batch with cached features holds the features of one adapter and no recordings. Call the model without "
    "adapter_names, or pass the recordings."
)


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
        # `inject_adapter_in_model` passes one configuration, and its caller goes on with the model alone. A PeftModel
        # passes a dictionary.
        self._in_peft_model = not isinstance(peft_config, PeftConfig)
        self._switched: tuple[list[Head], list[ELPLayer]] | None = None
        self._refuse_other_adapters(model)
        super().__init__(model, peft_config, *args, **kwargs)

    def _refuse_other_adapters(self, model: nn.Module) -> None:
        layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        others = [module for module in layers if self._in_peft_model or not isinstance(module, ELPLayer)]
        if others:
            kinds = sorted({type(module).__module__.split(".")[-2] for module in others} - {"tuner"}) or ["ELP"]
            raise ValueError(
                f"{type(model).__name__} already has adapters ({', '.join(kinds)}). Add a further ELP-adapter with "
                "model.add_adapter(name, config), or call unload() first."
            )

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Place one adapter; PEFT calls this for the first and for every further one.

        PEFT's own walk replaces modules by a list of names made beforehand, in which a parent that is replaced hides
        its children. ELP wraps parents and children, so it follows a plan of its own. What can be refused is refused
        before the model is changed.
        """
        try:
            plan = self._plan(model, adapter_name)
        except BaseException:
            self._forget(adapter_name)
            raise
        config = self.peft_config[adapter_name] = plan.config
        first = not any(isinstance(module, ELPLayer) for module in model.modules())
        if first:
            model.requires_grad_(False)
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            self.model = place_adapter(model, plan, adapter_name, self.active_adapters)
        self._switched = None
        # A further adapter leaves alone what the others train. Without a PeftModel, each new one is active.
        if first or not self._in_peft_model:
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self.targeted_module_names[:] = adapted_modules(self.model)
        if not self._in_peft_model:
            self._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
            _, stack = adapted_encoder(self)
            prepare_for_transformers(model, stack, config, adapter_name)

    def _plan(self, model: nn.Module, adapter_name: str) -> Plan:
        """Decide what to place, and refuse what does not fit. Nothing is changed."""
        config: Any = self.peft_config[adapter_name]
        self._check_new_adapter_config(config)
        check_adapter_name(model, adapter_name)
        saved, devices = config.tensors_to_load(), getattr(model, "hf_device_map", {})
        if saved is not None and "disk" in devices.values():
            raise ValueError(
                f"Parts of {type(model).__name__} are on disk, and PEFT cannot load an adapter beside them. Load the "
                "base with a device_map without 'disk'."
            )
        plan = make_plan(model, config)
        if not (self._in_peft_model or plan.encoder.stack_path):
            raise ValueError(
                f"{type(model).__name__} is an encoder stack itself. Its caller would go on without the wrapper "
                "that the adapters need around it. Use get_peft_model(model, config)."
            )
        if saved is not None:
            refuse_misfits(model, adapter_name, plan.tensors(), saved)
        if plan.config == config:
            plan.config = config  # The caller's own object, as from_pretrained(..., config=config) promises.
        return plan

    def _forget(self, adapter_name: str) -> None:
        """Drop the configuration of an adapter that is not in the model any more, or not yet."""
        self.peft_config.pop(adapter_name, None)
        self._switched = None
        if not self.peft_config:
            for name in ("peft_config", "_hf_peft_config_loaded"):  # BaseTuner and Transformers set these.
                vars(self.model).pop(name, None)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Let the utterances of a batch use different adapters. PeftModel enters this hook around each call."""
        names, cached = kwargs.get("adapter_names"), kwargs.get(CACHED)
        if names is None:
            passed = nullcontext() if cached is None else current_pass.set(cached_pass(cached))
            with asking(self.model, args, kwargs), passed:
                yield
            return
        if cached is not None:
            raise ValueError(WHY_NOT_CACHED)
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"adapter_names must be a list with one adapter name per utterance, got {names!r}.")
        if self.training:
            raise ValueError(
                "adapter_names mixes adapters in one batch for inference only, and the model is in training mode. "
                "Call model.eval() first, or train one adapter at a time."
            )
        unknown = {*names} - {*self.peft_config, BASE}
        if unknown:
            raise ValueError(f"{unknown_adapter(unknown, self.peft_config)} {BASE!r} stands for the backbone alone.")
        generation = kwargs.get("generation_config") or getattr(self.model, "generation_config", None)
        repeats = [kwargs.get(name, getattr(generation, name, None)) for name in ("num_beams", "num_return_sequences")]
        route = Route(names, max(1, *(number or 1 for number in repeats)))
        with asking(self.model, args, kwargs), current_route.set(route):
            yield

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # The models that PEFT has for a `task_type` call this, with arguments that the hook above does not see.
        with asking(self.model, args, kwargs):
            return super().forward(*args, **kwargs)

    def train(self, mode: bool = True) -> ELPModel:
        """Set the training mode. Frozen batch norms stay in evaluation mode."""
        super().train(mode)
        set_frozen_norms(self.model, False)
        return self

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make an adapter the active one, and the only trained one unless `inference_mode` is set.

        Args:
            adapter_name: Its name, or several names. E-adapters then run one after the other, and pseudo features are
                all joined. Of L-adapters, trained layer norms and heads only one can be active.
            inference_mode: Do not train it.

        Raises:
            ValueError: There is no adapter of that name, or several cannot be active together. Nothing is switched
                then.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        unknown = {*names} - {*self.peft_config}
        if unknown:
            raise ValueError(unknown_adapter(unknown, self.peft_config))
        if self._switched is None:
            heads = [module for module in self.model.modules() if isinstance(module, Head)]
            self._switched = heads, [module for module in self.model.modules() if isinstance(module, ELPLayer)]
        heads, layers = self._switched
        copies = [head.check_set_adapter(adapter_name) for head in heads]
        for layer in layers:
            if isinstance(layer, ELPStack):
                layer.check_set_adapter(names)
        for head, name in zip(heads, copies, strict=True):
            own = [name] if name and name in head.modules_to_save else []
            head.set_adapter(own, inference_mode=inference_mode)
        for layer in layers:
            layer.set_adapter(adapter_name, inference_mode=inference_mode)
        self.active_adapter = adapter_name

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. If it was active, the first of the others becomes active.

        The backbone is as it was before, with no wrapper left in it, once the last adapter is deleted.

        Raises:
            ValueError: There is no adapter of that name.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(unknown_adapter(adapter_name, self.peft_config))
        active = [name for name in self.active_adapters if name != adapter_name]
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        self.model = unwrap(self.model, only_unused=True)
        self._switched = None
        # In PEFT each layer chooses the next active adapter among its own. Layers that only some adapters have
        # would then differ in their active adapter, or have none.
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
        """Return the outputs of several L-adapters, each with its head, from one pass through the frozen backbone.

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
        if CACHED in kwargs:
            raise ValueError(WHY_NOT_CACHED)
        refuse_reports(self.model, kwargs)
        refuse_idle_labels(adapter_names, labels)
        encoder, stack = adapted_encoder(self)
        tasks: dict[str, Task] = {}
        for name in adapter_names:
            own = kwargs if name not in (labels or {}) else kwargs | {"labels": (labels or {})[name]}
            tasks[name] = Task(
                encoder.backbone, stack, name, partial(self._as, name, stack, *args, **own), Route.only(name)
            )
            if not tasks[name].leaves_layers_alone():
                config: Any = self.peft_config[name]
                raise ValueError(
                    f"{name!r} changes what the layers compute (adapters={config.adapters!r}, "
                    f"train_layer_norms={config.train_layer_norms}, modules_to_save={config.modules_to_save}). "
                    "Share passes among adapters with adapters='L' and train_layer_norms=False that train nothing of "
                    "the encoder, and call the model once for each of the others."
                )
        return run_tasks(tasks)

    def _as(self, adapter_name: str, stack: ELPStack, *args: Any, **kwargs: Any) -> Any:
        """Call the model with the settings of an adapter's head, on which its loss depends."""
        model: Any = self.model if stack.disable_adapters else stack.task_head.seen_by(adapter_name, self.model)
        with asking(self.model, args, kwargs):
            output = model(*args, **kwargs)
        stack.task_head.keep_problem_type(adapter_name, getattr(model, "config", None))
        return output

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add the weighted average of adapters that are configured alike as a further adapter, as model soups do.

        Computes `sum_i weights_i * adapters_i` over all tensors, those of the head included. As in PEFT, the new
        adapter is frozen, and it is not active until `set_adapter`.

        Args:
            adapters: Names of adapters with the same letters, sizes, layers and head.
            weights: One weight for each. They add up to 1; some may be negative.
            adapter_name: Name of the new adapter.
            combination_type: "linear" is the only type that ELP has.

        Raises:
            ValueError: The adapters are configured differently, or another argument does not fit. Nothing is changed
                then.
        """
        if combination_type != "linear":
            raise ValueError(
                f"combination_type={combination_type!r} combines low-rank factors, which ELP-adapters do not have. "
                "Write combination_type='linear'."
            )
        config = check_combination(self.peft_config, adapters, weights, adapter_name)
        self.peft_config[adapter_name] = replace(config, inference_mode=True)
        self.inject_adapter(self.model, adapter_name)
        combine(self.model, adapters, weights, adapter_name)

    def get_input_embeddings(self) -> None:
        """Return None. PEFT asks for the embeddings when it saves an adapter of a model with a resized vocabulary.

        It would save the frozen embeddings with the adapter, and write them into the base of whoever loads it. If they
        are to be trained, they belong to `modules_to_save`. Besides, Transformers raises for most speech models.
        """

    def get_output_embeddings(self) -> None:
        """Return None, as `get_input_embeddings`."""

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> NoReturn:
        # An abstract method of BaseTuner, which its inject_adapter would call for each module.
        raise NotImplementedError("ELP places its adapters in inject_adapter, by a plan.")

    def _check_merge_allowed(self) -> NoReturn:
        # PEFT calls this before it merges.
        raise ValueError(WHY_NO_MERGE)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        # The private method behind `unload` and `merge_and_unload`.
        if merge:
            self._check_merge_allowed()
        self.model = unwrap(self.model)
        self._switched = None
        vars(self.model).pop("peft_config", None)
        return self.model

    # PEFT delegates the names of an adapter's tensors to these private class methods. Its own versions look for them
    # under the names of modules, which not every state dict has: Transformers' leaves out ELP's wrappers, and the one
    # of an FSDP1 unit or an activation checkpoint leaves out PyTorch's. The saved name of a tensor must not depend on
    # which other adapters wrap the same backbone either.

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: Sequence[str] = (),
    ) -> dict[str, torch.Tensor]:
        for module in model.modules():
            if isinstance(module, ELPStack):
                module.check_depth()
                module.task_head.keep_problem_type()
        pattern = re.compile(rf"\b{cls.prefix}[a-z]+\.{re.escape(adapter_name)}\.")
        return {key: tensor for key, tensor in state_dict.items() if pattern.search(key)}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return canonical(re.sub(rf"\b({cls.prefix}[a-z]+)\.{re.escape(adapter_name)}(?=\.)", r"\1", key))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return the saved tensors under their names in the model, if they are those of the adapter.

        PEFT has given the tensors of the head their names in the model before.
        """
        own = {name: tensor for name, tensor in model.state_dict().items() if belongs_to(adapter_name, name)}
        names = {cls._remove_adapter_name_from_key(name, adapter_name): name for name in own}
        # Saved names start with the prefix. A model without a PeftModel does not have it.
        names |= {SAVED_PREFIX + saved: name for saved, name in names.items() if not saved.startswith(SAVED_PREFIX)}
        named = {names.get(key, key): tensor for key, tensor in state_dict.items()}
        given = {name: SavedTensor.of(tensor) for name, tensor in named.items()}
        refuse_misfits(model, adapter_name, own, given, shapes=False)

        def refuse_mismatches(_: nn.Module, tensors: dict[str, torch.Tensor], *args: Any) -> None:
            hook.remove()
            kept = {name: tensor for name, tensor in given.items() if name in tensors}
            refuse_misfits(model, adapter_name, {name: own[name] for name in kept}, kept)
            read: Any = getattr(config, "as_read", None)
            if read is None or {*read[1].values()} != {*given.values()}:  # Else they are beside this configuration.
                refuse_other_settings(adapter_name, own, named)

        # Only PEFT knows by now whether tensors of another size are to be passed over, and which.
        hook = model.register_load_state_dict_pre_hook(refuse_mismatches)
        return named | {name: tensor for name, tensor in own.items() if SETTINGS in name}
