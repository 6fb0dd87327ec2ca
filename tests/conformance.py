"""What PEFT's users may do with any tuner, as functions `behaviour(method, model)` that raise where it does not hold.

The list follows the tests that PEFT runs over its own tuners. `test_conformance.py` runs it.
"""

from __future__ import annotations

import copy
import functools
import io
import json
import pickle
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from backbones import ELP, build, labels_for, result, shaken, waveforms
from families import WHISPER
from packaging.version import Version
from peft import (
    AutoPeftModel,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    cast_mixed_precision_params,
    convert_to_lora,
    get_base_model_state_dict,
    get_peft_config,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from peft.functional import cast_adapter_dtype, delete_adapter, set_adapter, set_requires_grad
from peft.helpers import check_if_peft_model, disable_input_dtype_casting
from peft.tuners.mixed import COMPATIBLE_TUNER_TYPES
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, load_peft_weights
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.integrations.peft import PeftAdapterMixin

from peft_elp import ELPConfig


@dataclass(frozen=True)
class Model:
    """A tiny speech model with what the methods need to know of it."""

    make: Callable[[], Any]
    inputs: Callable[[], dict[str, Tensor]]
    head: tuple[str, ...]
    linears: str
    norms: str


@dataclass(frozen=True)
class Method:
    """A method of PEFT; `config` takes the model and fields that all methods have."""

    config: Callable[..., PeftConfig]
    prefix: str
    joint: dict[str, Any]  # options with which several adapters can be active together
    narrow: Callable[[Model], dict[str, Any]]  # options that leave out some of the parts


def _speech() -> dict[str, Tensor]:
    waveform, mask = waveforms()
    return {"input_values": waveform, "attention_mask": mask}


def _spectrogram() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"input_features": torch.randn(3, 8, 40), "decoder_input_ids": torch.tensor([[3, 5, 7]] * 3)}


def _whisper() -> Any:
    torch.manual_seed(0)
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**WHISPER)).eval()


WAVE = {
    "linears": r".*encoder\.layers\.\d+\.feed_forward\.(intermediate_dense|output_dense)",
    "norms": r".*encoder\.layers\.\d+\.(layer_norm|final_layer_norm)",
}
MODELS = {
    "wav2vec2-ctc": Model(lambda: build("wav2vec2", "ForCTC"), _speech, ("lm_head",), **WAVE),
    "wavlm-classification": Model(
        lambda: build("wavlm", "ForSequenceClassification"), _speech, ("projector", "classifier"), **WAVE
    ),
    "hubert-bare": Model(lambda: build("hubert", "Model"), _speech, (), **WAVE),
    "whisper-generation": Model(
        _whisper,
        _spectrogram,
        (),
        r".*encoder\.layers\.\d+\.(fc1|fc2)",
        r".*encoder\.layers\.\d+\.(self_attn_layer_norm|final_layer_norm)",
    ),
}


def _elp(model: Model, **options: Any) -> PeftConfig:
    return ELPConfig(**ELP | options)


def _ln_tuning(model: Model, **options: Any) -> PeftConfig:
    return LNTuningConfig(**{"target_modules": model.norms, "modules_to_save": list(model.head) or None} | options)


def _lora(model: Model, **options: Any) -> PeftConfig:
    return LoraConfig(**{"target_modules": model.linears, "modules_to_save": list(model.head) or None} | options)


def _one_layer(pattern: str) -> dict[str, Any]:
    return {"target_modules": pattern.replace(r"\d+", "1")}


METHODS = {
    "ELP": Method(
        _elp,
        "elp_",
        {"adapters": "EP", "train_layer_norms": False, "modules_to_save": []},
        lambda model: {"adapters": "E", "e_layers": [1], "train_layer_norms": False},
    ),
    "LN-Tuning": Method(_ln_tuning, "ln_tuning_", {"modules_to_save": None}, lambda model: _one_layer(model.norms)),
    "LoRA": Method(_lora, "lora_", {"modules_to_save": None}, lambda model: _one_layer(model.linears)),
}

BEHAVIOURS: dict[str, Callable[[Method, Model], None]] = {}


def behaviour(function: Callable[[Method, Model], None]) -> Callable[[Method, Model], None]:
    BEHAVIOURS[function.__name__] = function
    return function


def in_folder(function: Callable[[Method, Model, Path], None]) -> Callable[[Method, Model], None]:
    """A behaviour that needs an empty folder."""

    @functools.wraps(function)
    def in_new_folder(method: Method, model: Model) -> None:
        with tempfile.TemporaryDirectory() as folder:
            function(method, model, Path(folder))

    return behaviour(in_new_folder)


def adapted(
    method: Method, model: Model, *, adapter_name: str = "default", seed: int = 3, **options: Any
) -> PeftModel:
    """The model with one adapter that does something."""
    torch.manual_seed(seed)
    peft_model = get_peft_model(model.make(), method.config(model, **options), adapter_name=adapter_name)
    return nudged(peft_model, seed)


def nudged(peft_model: Any, seed: int) -> Any:
    """The model with its trainable parameters moved, differently for each seed."""
    shaken(peft_model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return peft_model.eval()


def pair(method: Method, model: Model, **options: Any) -> PeftModel:
    """The model with two different adapters, "default", which is active, and "other"."""
    peft_model = adapted(method, model, **options)
    peft_model.add_adapter("other", method.config(model, **options))
    peft_model.set_adapter("other")
    nudged(peft_model, 7)
    peft_model.set_adapter("default")
    return peft_model


def answer(module: Any, model: Model, **extra: Any) -> Tensor:
    with torch.no_grad():
        return result(module(**model.inputs(), **extra))


def loss_of(module: Any, model: Model) -> Tensor:
    output = result(module(**model.inputs())).float()
    torch.manual_seed(5)
    return (output * torch.randn_like(output)).sum()


def trainable(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def of_adapter(module: nn.Module, method: Method, name: str) -> dict[str, nn.Parameter]:
    """The parameters of one adapter, its copy of the head included."""
    return {
        key: parameter
        for key, parameter in module.named_parameters()
        if (method.prefix in key or ".modules_to_save." in key) and name in key.split(".")
    }


def same(one: Tensor, other: Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(one, other, **tolerance or {"atol": 1e-6, "rtol": 1e-6})


def differ(*answers: Tensor) -> None:
    for place, one in enumerate(answers):
        for other in answers[:place]:
            assert not torch.allclose(one, other, atol=1e-4), "two answers that should differ are alike"


def was_active() -> Any:
    """What PEFT says where the active adapter is deleted."""
    return pytest.warns(UserWarning, match="was active which is now deleted. Setting active adapter to")


def second_time() -> Any:
    """What PEFT says where a model is not adapted for the first time."""
    return pytest.warns(UserWarning, match="Already found a `peft_config` attribute")


# The model and its configuration ------------------------------------------------------------------------------------


@behaviour
def has_the_public_methods(method: Method, model: Model) -> None:
    peft_model = adapted(method, model)
    for name in ("save_pretrained", "from_pretrained", "push_to_hub", "load_adapter", "merge_and_unload", "unload"):
        assert callable(getattr(peft_model, name))


@behaviour
def peft_model_can_be_built_directly(method: Method, model: Model) -> None:
    torch.manual_seed(3)
    same(
        answer(nudged(PeftModel(model.make(), method.config(model)), 3), model), answer(adapted(method, model), model)
    )


@behaviour
def base_model_is_the_model_itself(method: Method, model: Model) -> None:
    base = model.make()
    assert get_peft_model(base, method.config(model)).get_base_model() is base


@behaviour
def adapter_name_is_in_parameter_names(method: Method, model: Model) -> None:
    peft_model = adapted(method, model, adapter_name="test-adapter")
    assert peft_model.active_adapters == ["test-adapter"]
    assert of_adapter(peft_model, method, "test-adapter")


@behaviour
def adapter_name_within_the_prefix_warns(method: Method, model: Model) -> None:
    name = method.prefix[:-1]
    with pytest.warns(UserWarning, match=f"'{name}' should not be contained in the prefix '{method.prefix}'"):
        get_peft_model(model.make(), method.config(model), adapter_name=name)


@behaviour
def config_is_active_and_knows_its_type(method: Method, model: Model) -> None:
    peft_model = adapted(method, model)
    config = peft_model.active_peft_config
    assert config is peft_model.peft_config["default"]
    assert config.peft_type == peft_model.peft_type == method.config(model).peft_type
    assert not config.is_prompt_learning
    assert not config.is_adaption_prompt


@in_folder
def config_survives_a_round_trip(method: Method, model: Model, folder: Path) -> None:
    for config in (method.config(model), adapted(method, model).peft_config["default"]):
        json.dumps({key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()})
        config.save_pretrained(folder)
        assert type(config).from_pretrained(folder).to_dict() == config.to_dict()
        assert type(PeftConfig.from_pretrained(folder)) is type(config)
        copied = copy.deepcopy(config)
        assert copied == config
        assert pickle.loads(pickle.dumps(config)) == config


@behaviour
def config_can_be_made_from_a_dict(method: Method, model: Model) -> None:
    fields = method.config(model).to_dict()
    config = get_peft_config({**fields, "peft_type": fields["peft_type"].value})
    assert type(config) is type(method.config(model))
    torch.manual_seed(3)
    assert torch.isfinite(answer(get_peft_model(model.make(), config), model)).all()


@in_folder
def config_of_a_newer_version_warns(method: Method, model: Model, folder: Path) -> None:
    adapted(method, model).save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"field_of_tomorrow": 1}))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['field_of_tomorrow'\]"):
        PeftModel.from_pretrained(model.make(), folder)


@in_folder
def config_that_is_passed_is_taken(method: Method, model: Model, folder: Path) -> None:
    adapted(method, model).save_pretrained(folder)
    config = PeftConfig.from_pretrained(folder)
    config.inference_mode = False
    peft_model = PeftModel.from_pretrained(model.make(), folder, config=config, is_trainable=False)
    assert peft_model.peft_config["default"] is config
    assert config.inference_mode


@in_folder
def config_that_leaves_choices_open_is_passed_on_as_it_is(method: Method, model: Model, folder: Path) -> None:
    config = method.config(model)
    get_peft_model(model.make(), config).save_pretrained(folder)
    peft_model = PeftModel.from_pretrained(model.make(), folder, config=config)
    assert peft_model.peft_config["default"] is config


class Custom(nn.Module):
    """A model that is not from Transformers, around one that is."""

    def __init__(self, speech: nn.Module) -> None:
        super().__init__()
        self.speech, self.config = speech, {"model_type": "custom"}

    def forward(self, **inputs: Tensor) -> Any:
        return self.speech(**inputs)


@in_folder
def config_of_the_model_may_be_a_dict(method: Method, model: Model, folder: Path) -> None:
    peft_model = nudged(get_peft_model(Custom(model.make()), method.config(model)), 3)
    peft_model.save_pretrained(folder)
    same(answer(PeftModel.from_pretrained(Custom(model.make()), folder), model), answer(peft_model, model))


@behaviour
def parameters_are_counted(method: Method, model: Model) -> None:
    peft_model = adapted(method, model)
    own = sum(parameter.numel() for parameter in of_adapter(peft_model, method, "default").values())
    assert peft_model.get_nb_trainable_parameters() == (own, sum(p.numel() for p in peft_model.parameters()))
    peft_model.print_trainable_parameters()


@behaviour
def printed_model_names_the_tuner(method: Method, model: Model) -> None:
    assert f"{method.prefix[:-1]}." in repr(adapted(method, model))


@behaviour
def targeted_modules_are_named(method: Method, model: Model) -> None:
    peft_model = adapted(method, model)
    assert peft_model.targeted_module_names
    for name in peft_model.targeted_module_names:
        assert isinstance(peft_model.get_base_model().get_submodule(name), BaseTunerLayer), name


@behaviour
def status_tells_layers_and_adapters(method: Method, model: Model) -> None:
    peft_model = pair(method, model)
    layers = peft_model.get_layer_status()
    tuned = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    assert len(layers) == sum(isinstance(module, tuned) for module in peft_model.modules())
    for layer in layers:
        assert layer.enabled
        assert layer.active_adapters == ["default"]
        assert layer.merged_adapters == []
        assert layer.available_adapters in (["default", "other"], [])
        assert layer.requires_grad in ({"default": True, "other": False}, {})
        assert all(devices == ["cpu"] for devices in layer.devices.values())
    status = peft_model.get_model_status()
    assert status.enabled is True
    assert status.active_adapters == ["default"]
    assert status.available_adapters == ["default", "other"]
    assert status.requires_grad == {"default": True, "other": False}
    assert set(status.peft_types.values()) == {peft_model.peft_config["default"].peft_type.value}
    assert status.trainable_params == peft_model.get_nb_trainable_parameters()[0]
    with peft_model.disable_adapter():
        assert peft_model.get_model_status().enabled is False


@behaviour
def attributes_of_the_base_are_in_reach(method: Method, model: Model) -> None:
    peft_model = adapted(method, model)
    assert peft_model.base_model_torch_dtype == torch.float32
    assert peft_model.config is peft_model.get_base_model().config
    assert peft_model.device.type == "cpu"
    assert peft_model.has_active_enabled_adapter


@behaviour
def wrapping_twice_warns(method: Method, model: Model) -> None:
    base = get_peft_model(model.make(), method.config(model)).get_base_model()
    with second_time(), pytest.warns(UserWarning, match="modify a model with PEFT for a second time"):
        get_peft_model(base, method.config(model), adapter_name="second")


@behaviour
def excluded_modules_get_no_adapter(method: Method, model: Model) -> None:
    excluded = r".*encoder\.layers\.0\..*"
    names = adapted(method, model, exclude_modules=excluded).state_dict()
    adapters = [name for name in names if method.prefix in name]
    assert any("layers.1." in name for name in adapters)
    assert not any(".layers.0." in name.partition(method.prefix)[0] for name in adapters)


# Running ------------------------------------------------------------------------------------------------------------


@behaviour
def adapter_changes_the_answer(method: Method, model: Model) -> None:
    differ(answer(adapted(method, model), model), answer(model.make(), model))


@behaviour
def inputs_may_be_positional(method: Method, model: Model) -> None:
    peft_model = adapted(method, model)
    first, *rest = model.inputs().items()
    if first[0] == "input_features":
        rest = [("attention_mask", None), *rest]
    with torch.no_grad():
        output = result(peft_model(first[1], *(value for _, value in rest)))
    same(output, answer(peft_model, model))


@behaviour
def answer_may_be_a_tuple(method: Method, model: Model) -> None:
    peft_model = adapted(method, model)
    with torch.no_grad():
        same(peft_model(**model.inputs(), return_dict=False)[0], answer(peft_model, model))


@behaviour
def hidden_states_have_the_shape_of_the_bases(method: Method, model: Model) -> None:
    shapes = []
    for module in (adapted(method, model), model.make()):
        output = module(**model.inputs(), output_hidden_states=True)
        states = output.encoder_hidden_states if "encoder_hidden_states" in output else output.hidden_states
        shapes.append([x.shape for x in states])
    assert shapes[0] == shapes[1]


@behaviour
def labels_give_a_loss(method: Method, model: Model) -> None:
    peft_model = adapted(method, model)
    if isinstance(peft_model.get_base_model(), transformers.HubertModel):
        pytest.skip("a bare encoder takes no labels")
    inputs = model.inputs()
    labels = inputs.pop("decoder_input_ids", None)
    if labels is None:
        labels = labels_for(peft_model.get_base_model(), 3, 0)
    loss = peft_model(**inputs, labels=labels).loss
    loss.backward()
    assert torch.isfinite(loss)


@behaviour
def text_is_generated(method: Method, model: Model) -> None:
    peft_model = adapted(method, model)
    if not peft_model.get_base_model().can_generate():
        pytest.skip("the model generates nothing")
    inputs = {"input_features": model.inputs()["input_features"], "max_new_tokens": 5, "do_sample": False}
    ids = peft_model.generate(**inputs, num_beams=2)
    with peft_model.disable_adapter():
        same(peft_model.generate(**inputs), model.make().generate(**inputs))
    assert ids.shape[0] == 3
    peft_model.generate(inputs["input_features"], max_new_tokens=2)


def _half(method: Method, model: Model, dtype: torch.dtype, autocast: bool) -> None:
    torch.manual_seed(3)
    peft_model = get_peft_model(model.make().to(dtype), method.config(model), autocast_adapter_dtype=autocast).eval()
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in model.inputs().items()}
    with torch.no_grad():
        output = result(peft_model(**inputs))
    assert output.dtype == dtype
    assert torch.isfinite(output).all()


@behaviour
def runs_in_float16(method: Method, model: Model) -> None:
    _half(method, model, torch.float16, True)


@behaviour
def runs_in_bfloat16(method: Method, model: Model) -> None:
    _half(method, model, torch.bfloat16, True)


@behaviour
def runs_in_float16_with_adapters_in_it(method: Method, model: Model) -> None:
    _half(method, model, torch.float16, False)


@behaviour
def runs_in_bfloat16_with_adapters_in_it(method: Method, model: Model) -> None:
    _half(method, model, torch.bfloat16, False)


@behaviour
def moves_to_another_dtype(method: Method, model: Model) -> None:
    peft_model = adapted(method, model)
    before = answer(peft_model, model)
    peft_model.double()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in model.inputs().items()}
    with torch.no_grad():
        same(result(peft_model(**inputs)).float(), before, atol=1e-3, rtol=1e-3)


def _adapter_dtypes(peft_model: nn.Module, method: Method, name: str) -> set[torch.dtype]:
    return {p.dtype for key, p in of_adapter(peft_model, method, name).items() if method.prefix in key}


@in_folder
def half_precision_adapters_are_float32(method: Method, model: Model, folder: Path) -> None:
    peft_model = get_peft_model(model.make().bfloat16(), method.config(model))
    peft_model.add_adapter("added", method.config(model))
    peft_model.save_pretrained(folder)
    peft_model.load_adapter(folder, adapter_name="loaded")
    for name in ("default", "added", "loaded"):
        assert _adapter_dtypes(peft_model, method, name) == {torch.float32}, name


@in_folder
def half_precision_adapters_can_be_asked_for(method: Method, model: Model, folder: Path) -> None:
    peft_model = get_peft_model(model.make().bfloat16(), method.config(model), autocast_adapter_dtype=False)
    peft_model.add_adapter("added", method.config(model), autocast_adapter_dtype=False)
    peft_model.save_pretrained(folder)
    peft_model.load_adapter(folder, adapter_name="loaded", autocast_adapter_dtype=False)
    for name in ("default", "added", "loaded"):
        assert _adapter_dtypes(peft_model, method, name) == {torch.bfloat16}, name


@behaviour
def casting_of_inputs_can_be_switched_off(method: Method, model: Model) -> None:
    peft_model = adapted(method, model)
    expected = answer(peft_model, model)
    with disable_input_dtype_casting(peft_model):
        same(answer(peft_model, model), expected)


@behaviour
def model_can_be_copied_deeply(method: Method, model: Model) -> None:
    peft_model = adapted(method, model)
    expected = answer(peft_model, model)
    twin = copy.deepcopy(peft_model)
    nudged(peft_model, 9)
    same(answer(twin, model), expected)
    differ(answer(peft_model, model), expected)


@behaviour
def model_can_be_pickled(method: Method, model: Model) -> None:
    peft_model = adapted(method, model)
    if any(parametrize.is_parametrized(module) for module in peft_model.modules()):
        pytest.skip("PyTorch pickles no parametrised weight, here that of the convolution over positions")
    same(answer(pickle.loads(pickle.dumps(peft_model)), model), answer(peft_model, model))
    buffer = io.BytesIO()
    torch.save(peft_model, buffer)
    buffer.seek(0)
    same(answer(torch.load(buffer, weights_only=False), model), answer(peft_model, model))


# Training -----------------------------------------------------------------------------------------------------------


@behaviour
def only_the_adapter_is_trainable(method: Method, model: Model) -> None:
    peft_model = adapted(method, model)
    assert trainable(peft_model) == set(of_adapter(peft_model, method, "default"))


@behaviour
def gradients_reach_the_whole_adapter_and_nothing_else(method: Method, model: Model) -> None:
    peft_model = adapted(method, model)
    loss_of(peft_model, model).backward()
    assert {n for n, p in peft_model.named_parameters() if p.grad is not None} == trainable(peft_model)


@behaviour
def steps_move_the_whole_adapter_and_nothing_else(method: Method, model: Model) -> None:
    peft_model = adapted(method, model).train()
    tensors = dict([*peft_model.named_parameters(), *peft_model.named_buffers()])
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    optimizer = torch.optim.Adam([p for p in peft_model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        loss_of(peft_model, model).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, tensor in tensors.items() if not torch.equal(tensor, before[name])}
    assert moved == trainable(peft_model)


@in_folder
def trained_adapter_answers_alike_when_loaded(method: Method, model: Model, folder: Path) -> None:
    peft_model = adapted(method, model).train()
    optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=0.01)
    loss_of(peft_model, model).backward()
    optimizer.step()
    peft_model.save_pretrained(folder)
    same(answer(PeftModel.from_pretrained(model.make(), folder), model), answer(peft_model.eval(), model))


def _checkpointed(method: Method, model: Model, reentrant: bool) -> None:
    peft_model = adapted(method, model).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            peft_model.prepare_model_for_gradient_checkpointing(peft_model)
            peft_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        peft_model.zero_grad()
        loss_of(peft_model, model).backward()
        gradients.append({n: p.grad for n, p in peft_model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == trainable(peft_model)
    for name, gradient in gradients[0].items():
        same(gradients[1][name], gradient, atol=1e-4, rtol=1e-3)


@behaviour
def gradient_checkpointing_gives_the_same_gradients(method: Method, model: Model) -> None:
    _checkpointed(method, model, reentrant=False)


@behaviour
def reentrant_checkpointing_gives_the_same_gradients(method: Method, model: Model) -> None:
    if isinstance(model.make(), transformers.WavLMPreTrainedModel):
        pytest.skip("WavLM itself never returns under re-entrant checkpointing")
    with warnings.catch_warnings():
        # Of the frozen convolutions, which Transformers checkpoints too.
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad=True", UserWarning)
        _checkpointed(method, model, reentrant=True)


@behaviour
def model_prepared_for_quantised_training_trains(method: Method, model: Model) -> None:
    base = prepare_model_for_kbit_training(
        model.make().bfloat16(), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    assert {p.dtype for p in base.parameters()} == {torch.float32}
    assert not trainable(base)
    peft_model = get_peft_model(base, method.config(model)).train()
    loss_of(peft_model, model).backward()
    assert {n for n, p in peft_model.named_parameters() if p.grad is not None} == trainable(peft_model)


@behaviour
def trains_under_autocast(method: Method, model: Model) -> None:
    peft_model = adapted(method, model).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(peft_model, model)
    loss.backward()
    assert {n for n, p in peft_model.named_parameters() if p.grad is not None} == trainable(peft_model)
    assert all(torch.isfinite(p.grad).all() for p in peft_model.parameters() if p.grad is not None)


@behaviour
def base_can_be_cast_to_half_precision_for_training(method: Method, model: Model) -> None:
    peft_model = adapted(method, model).train()
    cast_mixed_precision_params(peft_model, torch.bfloat16)
    assert {p.dtype for p in peft_model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in peft_model.parameters() if not p.requires_grad} == {torch.bfloat16}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(peft_model, model)
    loss.backward()
    assert {n for n, p in peft_model.named_parameters() if p.grad is not None} == trainable(peft_model)


@behaviour
def frozen_adapter_can_be_asked_for(method: Method, model: Model) -> None:
    peft_model = get_peft_model(model.make(), method.config(model, inference_mode=True))
    assert not trainable(peft_model)


@behaviour
def training_of_an_adapter_can_be_switched(method: Method, model: Model) -> None:
    peft_model = pair(method, model)
    peft_model.set_requires_grad("default", requires_grad=False)
    assert not trainable(peft_model)
    peft_model.set_requires_grad(["default", "other"], requires_grad=True)
    both = set(of_adapter(peft_model, method, "default")) | set(of_adapter(peft_model, method, "other"))
    assert trainable(peft_model) == both


# Adapters by name ---------------------------------------------------------------------------------------------------


@behaviour
def added_adapter_waits(method: Method, model: Model) -> None:
    peft_model = adapted(method, model)
    expected = answer(peft_model, model)
    peft_model.add_adapter("other", method.config(model))
    assert list(peft_model.peft_config) == ["default", "other"]
    assert peft_model.active_adapters == ["default"]
    assert trainable(peft_model) == set(of_adapter(peft_model, method, "default"))
    same(answer(peft_model, model), expected)


@behaviour
def taken_name_is_refused(method: Method, model: Model) -> None:
    peft_model = adapted(method, model)
    with pytest.raises(ValueError, match="'default' already exists"):
        peft_model.add_adapter("default", method.config(model))


@behaviour
def adapter_of_another_method_is_refused(method: Method, model: Model) -> None:
    peft_model = adapted(method, model)
    other = next(m for m in METHODS.values() if m.prefix != method.prefix).config(model)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        peft_model.add_adapter("other", other)
    assert list(peft_model.peft_config) == ["default"]


@behaviour
def adapters_are_switched(method: Method, model: Model) -> None:
    peft_model = pair(method, model)
    first = answer(peft_model, model)
    peft_model.set_adapter("other")
    second = answer(peft_model, model)
    differ(first, second, answer(model.make(), model))
    assert peft_model.active_adapters == ["other"]
    assert trainable(peft_model) == set(of_adapter(peft_model, method, "other"))
    peft_model.set_adapter("default", inference_mode=True)
    same(answer(peft_model, model), first)
    assert not trainable(peft_model)


@behaviour
def switching_to_an_unknown_adapter_raises(method: Method, model: Model) -> None:
    peft_model = adapted(method, model)
    with pytest.raises(ValueError, match="Adapter nobody not found"):
        peft_model.set_adapter("nobody")


@behaviour
def several_adapters_are_active_together(method: Method, model: Model) -> None:
    peft_model = pair(method, model, **method.joint)
    first = answer(peft_model, model)
    peft_model.set_adapter("other")
    second = answer(peft_model, model)
    peft_model.base_model.set_adapter(["default", "other"])
    together = answer(peft_model, model)
    assert peft_model.active_adapters == ["default", "other"]
    differ(first, second, together, answer(model.make(), model))
    assert {name.rpartition(method.prefix)[2] for name in trainable(peft_model)}
    with peft_model.disable_adapter():
        same(answer(peft_model, model), answer(model.make(), model))
    same(answer(peft_model, model), together)
    peft_model.set_adapter("default")
    same(answer(peft_model, model), first)


@behaviour
def disabled_adapters_give_the_base(method: Method, model: Model) -> None:
    expected = answer(model.make(), model)
    peft_model = adapted(method, model)
    with_adapter, before = answer(peft_model, model), trainable(peft_model)
    with peft_model.disable_adapter():
        same(answer(peft_model, model), expected)
        assert not peft_model.has_active_enabled_adapter
    same(answer(peft_model, model), with_adapter)
    assert trainable(peft_model) == before
    peft_model.base_model.disable_adapter_layers()
    same(answer(peft_model, model), expected)
    peft_model.base_model.enable_adapter_layers()
    same(answer(peft_model, model), with_adapter)


def _assert_gone(peft_model: Any, name: str, active: list[str]) -> None:
    assert name not in peft_model.peft_config
    assert peft_model.active_adapters == active
    for module in peft_model.modules():
        if isinstance(module, BaseTunerLayer):
            for container in (*module.adapter_layer_names, *module.other_param_names):
                assert name not in getattr(module, container)
        if isinstance(module, AuxiliaryTrainingWrapper):
            assert name not in module._adapters
            assert module.active_adapters == active
        if isinstance(module, ModulesToSaveWrapper):
            assert name not in module.modules_to_save


@behaviour
def active_adapter_can_be_deleted(method: Method, model: Model) -> None:
    peft_model = pair(method, model)
    expected = answer(peft_model, model)
    peft_model.set_adapter("other")
    with was_active():
        peft_model.delete_adapter("other")
    _assert_gone(peft_model, "other", ["default"])
    same(answer(peft_model, model), expected)
    assert trainable(peft_model) == set(of_adapter(peft_model, method, "default"))


@behaviour
def waiting_adapter_can_be_deleted(method: Method, model: Model) -> None:
    peft_model = pair(method, model)
    expected = answer(peft_model, model)
    peft_model.delete_adapter("other")
    _assert_gone(peft_model, "other", ["default"])
    same(answer(peft_model, model), expected)


@behaviour
def one_of_several_active_adapters_can_be_deleted(method: Method, model: Model) -> None:
    peft_model = pair(method, model, **method.joint)
    expected = answer(peft_model, model)
    peft_model.base_model.set_adapter(["default", "other"])
    peft_model.delete_adapter("other")
    _assert_gone(peft_model, "other", ["default"])
    same(answer(peft_model, model), expected)


@behaviour
def adapters_may_adapt_different_parts(method: Method, model: Model) -> None:
    peft_model = adapted(method, model, **method.narrow(model))
    expected = answer(peft_model, model)
    peft_model.add_adapter("other", method.config(model))
    peft_model.set_adapter("other")
    nudged(peft_model, 7)
    peft_model.set_adapter("default")
    same(answer(peft_model, model), expected)
    peft_model.set_adapter("other")
    with was_active():
        peft_model.delete_adapter("other")
    assert peft_model.active_adapters == ["default"]
    same(answer(peft_model, model), expected)
    assert trainable(peft_model) == set(of_adapter(peft_model, method, "default"))


@behaviour
def last_adapter_can_be_deleted(method: Method, model: Model) -> None:
    peft_model = adapted(method, model)
    peft_model.delete_adapter("default")
    _assert_gone(peft_model, "default", [])
    same(answer(peft_model.base_model, model), answer(model.make(), model))


@behaviour
def unknown_adapter_cannot_be_deleted(method: Method, model: Model) -> None:
    with pytest.raises(ValueError, match="Adapter nobody does not exist"):
        adapted(method, model).delete_adapter("nobody")


@behaviour
def deleted_name_can_be_used_again(method: Method, model: Model) -> None:
    peft_model = pair(method, model)
    peft_model.delete_adapter("other")
    peft_model.add_adapter("other", method.config(model))
    peft_model.set_adapter("other")
    nudged(peft_model, 7)
    again = answer(peft_model, model)
    peft_model.set_adapter("default")
    differ(again, answer(peft_model, model))


@behaviour
def failed_addition_leaves_no_trace(method: Method, model: Model) -> None:
    peft_model = adapted(method, model)
    expected, names = answer(peft_model, model), list(peft_model.state_dict())
    with pytest.raises(ValueError):  # noqa: PT011, each method has words of its own
        peft_model.add_adapter("broken", method.config(model, **_impossible(method)))
    assert list(peft_model.peft_config) == ["default"]
    assert list(peft_model.state_dict()) == names
    same(answer(peft_model, model), expected)


def _impossible(method: Method) -> dict[str, Any]:
    return {"e_layers": [99]} if method.prefix == "elp_" else {"target_modules": ["nowhere"]}


@behaviour
def mixed_batches_answer_row_by_row(method: Method, model: Model) -> None:
    peft_model = pair(method, model)
    first = answer(peft_model, model)
    peft_model.set_adapter("other")
    second = answer(peft_model, model)
    mixed = answer(peft_model, model, adapter_names=["__base__", "default", "other"])
    expected = torch.stack([answer(model.make(), model)[0], first[1], second[2]])
    same(mixed, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="nobody"):
        answer(peft_model, model, adapter_names=["nobody"] * 3)


@behaviour
def weighted_adapters_are_made(method: Method, model: Model) -> None:
    peft_model = pair(method, model, modules_to_save=[] if method.prefix == "elp_" else None)
    first = answer(peft_model, model)
    peft_model.add_weighted_adapter(["default"], [1.0], "same", combination_type="linear")
    peft_model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mean", combination_type="linear")
    peft_model.set_adapter("same")
    same(answer(peft_model, model), first, atol=1e-5, rtol=1e-4)
    peft_model.set_adapter("mean")
    differ(answer(peft_model, model), first, answer(model.make(), model))


@behaviour
def works_in_a_mixed_model_or_says_no(method: Method, model: Model) -> None:
    base, config = model.make(), method.config(model)
    if config.peft_type not in COMPATIBLE_TUNER_TYPES:
        with pytest.raises(ValueError, match=f"{config.peft_type.value}.* is not compatible"):
            get_peft_model(base, config, mixed=True)
        same(answer(base, model), answer(model.make(), model))
        return
    differ(answer(nudged(get_peft_model(base, config, mixed=True), 3), model), answer(model.make(), model))


@behaviour
def every_adapter_has_its_own_head(method: Method, model: Model) -> None:
    if not model.head:
        pytest.skip("there is no head to train")
    peft_model = pair(method, model)
    for name in model.head:
        wrapper = peft_model.get_base_model().get_submodule(name)
        assert isinstance(wrapper, ModulesToSaveWrapper)
        assert set(wrapper.modules_to_save) == {"default", "other"}
        assert torch.equal(wrapper.original_module.weight, model.make().get_submodule(name).weight)
        assert not wrapper.original_module.weight.requires_grad
    assert set(model.head) == set(peft_model.modules_to_save)
    assert any(key.endswith(f"{model.head[0]}.weight") for key in get_peft_model_state_dict(peft_model))


# Saving and loading -------------------------------------------------------------------------------------------------


@in_folder
def saved_folder_holds_the_adapter_alone(method: Method, model: Model, folder: Path) -> None:
    peft_model = adapted(method, model)
    peft_model.save_pretrained(folder)
    files = {file.name for file in folder.iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == len(of_adapter(peft_model, method, "default"))
    assert not any("default" in name for name in tensors)


@in_folder
def model_card_names_peft_and_the_base(method: Method, model: Model, folder: Path) -> None:
    base = model.make()
    base.save_pretrained(folder / "base")
    base = type(base).from_pretrained(folder / "base")
    adapted_base = get_peft_model(base, method.config(model))
    adapted_base.save_pretrained(folder / "adapter")
    card = (folder / "adapter" / "README.md").read_text()
    assert "library_name: peft" in card
    assert str(folder / "base") in card  # ELP: in the text, since the Hub takes no path for a name
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder / "base")
    (folder / "adapter" / "README.md").write_text(card + "\nKept.\n")
    adapted_base.save_pretrained(folder / "adapter")
    assert "Kept." in (folder / "adapter" / "README.md").read_text()


@in_folder
def saved_adapter_answers_alike(method: Method, model: Model, folder: Path) -> None:
    peft_model = adapted(method, model)
    peft_model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(model.make(), folder)
    same(answer(loaded, model), answer(peft_model, model))
    state, again = peft_model.state_dict(), loaded.state_dict()
    assert state.keys() == again.keys()
    for name, tensor in state.items():
        assert torch.equal(again[name], tensor), name
    assert not loaded.training
    assert not trainable(loaded)


@in_folder
def pickled_weights_are_saved_and_loaded(method: Method, model: Model, folder: Path) -> None:
    peft_model = adapted(method, model)
    peft_model.save_pretrained(folder, safe_serialization=False)
    assert (folder / "adapter_model.bin").exists()
    same(answer(PeftModel.from_pretrained(model.make(), folder), model), answer(peft_model, model))


@in_folder
def loaded_adapter_can_train_on(method: Method, model: Model, folder: Path) -> None:
    adapted(method, model).save_pretrained(folder)
    loaded = PeftModel.from_pretrained(model.make(), folder, is_trainable=True)
    assert not loaded.peft_config["default"].inference_mode
    assert trainable(loaded) == set(of_adapter(loaded, method, "default"))
    loss_of(loaded, model).backward()
    loaded.load_adapter(folder, "second", is_trainable=True)
    loaded.set_adapter("second")
    assert trainable(loaded) == set(of_adapter(loaded, method, "second"))


@in_folder
def adapter_is_loaded_under_another_name(method: Method, model: Model, folder: Path) -> None:
    peft_model = adapted(method, model, adapter_name="mine")
    peft_model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(model.make(), folder / "mine", adapter_name="yours")
    assert list(loaded.peft_config) == ["yours"]
    same(answer(loaded, model), answer(peft_model, model))


@in_folder
def adapters_are_loaded_beside_each_other(method: Method, model: Model, folder: Path) -> None:
    peft_model = pair(method, model)
    first = answer(peft_model, model)
    peft_model.set_adapter("other")
    second = answer(peft_model, model)
    peft_model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(model.make(), folder)
    for name in ("other", "yet-another"):
        outcome = loaded.load_adapter(folder / "other", adapter_name=name)
        assert outcome.missing_keys == outcome.unexpected_keys == []
    same(answer(loaded, model), first)
    loaded.set_adapter("yet-another")
    same(answer(loaded, model), second)


@in_folder
def selected_adapters_are_saved(method: Method, model: Model, folder: Path) -> None:
    peft_model = pair(method, model)
    peft_model.save_pretrained(folder, selected_adapters=["default"])
    assert not (folder / "other").exists()
    with pytest.raises(ValueError, match="invalid `selected_adapters`"):
        peft_model.save_pretrained(folder, selected_adapters=["nobody"])
    peft_model.save_pretrained(folder, selected_adapters=["other"])
    assert (folder / "other" / "adapter_model.safetensors").exists()


@in_folder
def adapters_with_overlapping_names_are_told_apart(method: Method, model: Model, folder: Path) -> None:
    peft_model = adapted(method, model)
    expected = len(get_peft_model_state_dict(peft_model))
    for name in ("default2", "other_default", "foodefault_bar", "efaul"):
        peft_model.add_adapter(name, method.config(model))
    peft_model.save_pretrained(folder)
    for place in (folder, folder / "default2", folder / "efaul"):
        assert len(load_file(place / "adapter_model.safetensors")) == expected


@in_folder
def adapter_is_loaded_without_memory_for_two(method: Method, model: Model, folder: Path) -> None:
    peft_model = adapted(method, model)
    expected = answer(peft_model, model)
    peft_model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(model.make(), folder, low_cpu_mem_usage=True)
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    same(answer(loaded, model), expected)
    loaded.load_adapter(folder, adapter_name="other", low_cpu_mem_usage=True)
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    loaded.set_adapter("other")
    same(answer(loaded, model), expected)


@behaviour
def adapter_is_injected_without_memory(method: Method, model: Model) -> None:
    base = inject_adapter_in_model(method.config(model), model.make(), low_cpu_mem_usage=True)
    # PEFT asks for no more: what is a copy of a part of the base, such as a layer norm, has its values from there.
    assert "meta" in {p.device.type for key, p in base.named_parameters() if method.prefix in key}


@in_folder
def device_of_a_loaded_adapter_can_be_chosen(method: Method, model: Model, folder: Path) -> None:
    adapted(method, model).save_pretrained(folder)
    loaded = PeftModel.from_pretrained(model.make(), folder, device_map={"": "cpu"}, torch_device="cpu")
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}


@behaviour
def state_dict_of_an_adapter_is_taken_and_given(method: Method, model: Model) -> None:
    peft_model = pair(method, model)
    peft_model.set_adapter("other")
    expected = answer(peft_model, model)
    state = get_peft_model_state_dict(peft_model, adapter_name="other")
    assert len(state) == len(of_adapter(peft_model, method, "other"))
    assert not any("other" in key.split(".") for key in state)
    fresh = get_peft_model(model.make(), method.config(model), adapter_name="fresh").eval()
    outcome = set_peft_model_state_dict(fresh, state, adapter_name="fresh")
    assert outcome.unexpected_keys == []
    assert not set(outcome.missing_keys) & set(of_adapter(fresh, method, "fresh"))
    same(answer(fresh, model), expected)
    again = get_peft_model_state_dict(fresh, adapter_name="fresh")
    assert again.keys() == state.keys()


@in_folder
def missing_weights_are_reported(method: Method, model: Model, folder: Path) -> None:
    adapted(method, model).save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    gone = next(name for name in tensors if method.prefix in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, file, metadata={"format": "pt"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            PeftModel.from_pretrained(model.make(), folder)
            report = " ".join(str(warning.message) for warning in caught)
        except ValueError as error:  # ELP refuses what PEFT warns of
            report = str(error)
    assert "missing" in report
    assert gone.rpartition(".")[2] in report


@behaviour
def weights_of_another_size_are_refused_or_passed_over(method: Method, model: Model) -> None:
    peft_model = adapted(method, model)
    state = {key: value.clone() for key, value in get_peft_model_state_dict(peft_model).items()}
    name = next(key for key in state if method.prefix in key and key.endswith("weight"))
    state[name] = torch.zeros([size + 1 for size in state[name].shape])
    with pytest.raises((RuntimeError, ValueError), match=r"size mismatch|of another shape"):
        set_peft_model_state_dict(peft_model, state)
    with pytest.warns(UserWarning, match="mismatched"):
        set_peft_model_state_dict(peft_model, state, ignore_mismatched_sizes=True)


@behaviour
def state_dict_of_the_whole_model_is_loaded(method: Method, model: Model) -> None:
    peft_model = adapted(method, model)
    fresh = get_peft_model(model.make(), method.config(model)).eval()
    fresh.load_state_dict(peft_model.state_dict())
    same(answer(fresh, model), answer(peft_model, model))


@behaviour
def state_dict_of_the_base_is_taken_and_given(method: Method, model: Model) -> None:
    original = model.make().state_dict()
    peft_model = adapted(method, model)
    expected = answer(peft_model, model)
    state = get_base_model_state_dict(peft_model)
    assert state.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(state[name], tensor), name
    with torch.no_grad():
        for name, parameter in peft_model.get_base_model().named_parameters():
            if not parameter.requires_grad and method.prefix not in name:
                parameter.add_(0.1)
    differ(answer(peft_model, model), expected)
    outcome = set_base_model_state_dict(peft_model, original, strict=False)
    assert not outcome.missing_keys
    assert not outcome.unexpected_keys
    same(answer(peft_model, model), expected)


@in_folder
def saved_weights_are_read_without_a_model(method: Method, model: Model, folder: Path) -> None:
    peft_model = adapted(method, model)
    peft_model.save_pretrained(folder)
    weights = load_peft_weights(str(folder), device="cpu")
    state = get_peft_model_state_dict(peft_model)
    assert weights.keys() == state.keys()
    assert all(torch.equal(weights[name], state[name]) for name in state)


@in_folder
def folder_is_known_for_an_adapter(method: Method, model: Model, folder: Path) -> None:
    peft_model = adapted(method, model)
    peft_model.save_pretrained(folder / "adapter")
    model.make().save_pretrained(folder / "base")
    assert check_if_peft_model(str(folder / "adapter"))
    assert not check_if_peft_model(str(folder / "base"))


@in_folder
def auto_class_finds_the_base(method: Method, model: Model, folder: Path) -> None:
    model.make().save_pretrained(folder / "base")
    base = type(model.make()).from_pretrained(folder / "base")
    peft_model = nudged(get_peft_model(base, method.config(model)), 3)
    peft_model.save_pretrained(folder / "adapter")
    same(answer(AutoPeftModel.from_pretrained(folder / "adapter"), model), answer(peft_model, model))


@in_folder
def weights_are_swapped_or_it_says_no(method: Method, model: Model, folder: Path) -> None:
    peft_model = pair(method, model, **method.joint)
    before = answer(peft_model, model)
    peft_model.set_adapter("other")
    expected = answer(peft_model, model)
    peft_model.save_pretrained(folder)
    peft_model.set_adapter("default")
    if method.prefix != "lora_":
        with pytest.raises(ValueError, match=f"only supports LORA but {method.config(model).peft_type.value}"):
            hotswap_adapter(peft_model, str(folder / "other"), adapter_name="default", torch_device="cpu")
        expected = before
    else:
        hotswap_adapter(peft_model, str(folder / "other"), adapter_name="default", torch_device="cpu")
    same(answer(peft_model, model), expected)


# Leaving ------------------------------------------------------------------------------------------------------------


@behaviour
def unloading_gives_the_base_back(method: Method, model: Model) -> None:
    base = model.make()
    names, expected = list(base.state_dict()), answer(base, model)
    unloaded = nudged(get_peft_model(base, method.config(model)), 3).unload()
    assert not any(isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for m in unloaded.modules())
    assert not hasattr(unloaded, "peft_config")
    assert list(unloaded.state_dict()) == names
    same(answer(unloaded, model), expected)


@behaviour
def unloaded_base_takes_another_adapter(method: Method, model: Model) -> None:
    bases = adapted(method, model).unload(), model.make()
    answers = []
    for base in bases:
        torch.manual_seed(3)
        answers.append(answer(nudged(get_peft_model(base, method.config(model)), 3), model))
    same(*answers)


@behaviour
def merging_keeps_the_answer_or_says_why_not(method: Method, model: Model) -> None:
    peft_model = adapted(method, model)
    expected = answer(peft_model, model)
    if method.prefix == "elp_":
        with pytest.raises(ValueError, match="cannot be merged"):
            peft_model.merge_adapter()
        with pytest.raises(ValueError, match="cannot be merged"):
            peft_model.merge_and_unload()
        same(answer(peft_model, model), expected)
        return
    peft_model.merge_adapter()
    same(answer(peft_model, model), expected, atol=1e-4, rtol=1e-4)
    peft_model.unmerge_adapter()
    same(answer(peft_model, model), expected, atol=1e-4, rtol=1e-4)


@behaviour
def merged_model_is_a_plain_one(method: Method, model: Model) -> None:
    peft_model = adapted(method, model)
    expected = answer(peft_model, model)
    merged = peft_model.merge_and_unload()
    assert not any(isinstance(m, BaseTunerLayer) for m in merged.modules())
    same(answer(merged, model), expected, atol=1e-4, rtol=1e-4)


# Without PeftModel --------------------------------------------------------------------------------------------------


@behaviour
def adapters_are_injected_in_place(method: Method, model: Model) -> None:
    base = model.make()
    injected = inject_adapter_in_model(method.config(model), base, adapter_name="default")
    assert injected is base
    assert list(injected.peft_config) == ["default"]
    with second_time():
        inject_adapter_in_model(method.config(model), base, adapter_name="other")
    set_adapter(base, "default")
    nudged(base, 3)
    first = answer(base, model)
    differ(first, answer(model.make(), model))
    set_adapter(base, "other")
    nudged(base, 7)
    differ(first, answer(base, model))
    set_adapter(base, "default")
    same(answer(base, model), first)


@behaviour
def injected_adapters_are_frozen_cast_and_deleted(method: Method, model: Model) -> None:
    base = inject_adapter_in_model(method.config(model), model.make(), adapter_name="default")
    with second_time():
        inject_adapter_in_model(method.config(model), base, adapter_name="other")
    set_requires_grad(base, ["default", "other"], requires_grad=False)
    assert not trainable(base)
    set_requires_grad(base, "other")
    assert trainable(base) == set(of_adapter(base, method, "other"))
    cast_adapter_dtype(base, "default")
    with was_active():
        delete_adapter(base, adapter_name="other", prefix=method.prefix)
    assert not any(method.prefix in key for key in of_adapter(base, method, "other"))
    answer(base, model)


@behaviour
def injected_state_dict_is_taken_and_given(method: Method, model: Model) -> None:
    base = nudged(inject_adapter_in_model(method.config(model), model.make()), 3)
    state = get_peft_model_state_dict(base)
    fresh = inject_adapter_in_model(method.config(model), model.make(), state_dict=state).eval()
    outcome = set_peft_model_state_dict(fresh, state)
    assert outcome.unexpected_keys == []
    same(answer(fresh, model), answer(base, model))


@in_folder
def transformers_adds_and_saves_adapters(method: Method, model: Model, folder: Path) -> None:
    base = model.make()
    base.add_adapter(method.config(model), adapter_name="mine")
    expected = answer(nudged(base, 3), model)
    assert base.active_adapters() == ["mine"]
    assert trainable(base) == set(of_adapter(base, method, "mine"))
    assert len(base.get_adapter_state_dict()) == len(of_adapter(base, method, "mine"))
    base.save_pretrained(folder)
    assert {file.name for file in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (folder / "model.safetensors").exists()
    same(answer(PeftModel.from_pretrained(model.make(), folder), model), expected)


@behaviour
def transformers_switches_adapters(method: Method, model: Model) -> None:
    base = model.make()
    original = answer(base, model)
    base.add_adapter(method.config(model), adapter_name="mine")
    first = answer(nudged(base, 3), model)
    with second_time():
        base.add_adapter(method.config(model), adapter_name="other")
    differ(answer(nudged(base, 7), model), first)
    base.set_adapter("mine")
    same(answer(base, model), first)
    base.disable_adapters()
    same(answer(base, model), original)


@behaviour
def transformers_deletes_adapters(method: Method, model: Model) -> None:
    base = model.make()
    original = answer(base, model)
    base.add_adapter(method.config(model), adapter_name="mine")
    first = answer(nudged(base, 3), model)
    with second_time():
        base.add_adapter(method.config(model), adapter_name="other")
    with was_active():
        base.delete_adapter("other")
    same(answer(base, model), first)
    base.delete_adapter("mine")
    same(answer(base, model), original)


@behaviour
def transformers_switches_adapters_on_again(method: Method, model: Model) -> None:
    base = model.make()
    base.add_adapter(method.config(model), adapter_name="mine")
    expected = answer(nudged(base, 3), model)
    base.disable_adapters()
    base.enable_adapters()
    same(answer(base, model), expected)


@in_folder
def transformers_loads_adapters(method: Method, model: Model, folder: Path) -> None:
    if Version(transformers.__version__) < Version("5.20"):
        pytest.skip("Transformers loads adapters with a head from 5.20 on, of whatever method")
    peft_model = adapted(method, model)
    peft_model.save_pretrained(folder)
    base = model.make()
    PeftAdapterMixin.load_adapter(base, str(folder), adapter_name="mine")  # Wav2Vec2ForCTC has another load_adapter
    same(answer(base.eval(), model), answer(peft_model, model))


@behaviour
def conversion_to_lora_is_answered(method: Method, model: Model) -> None:
    peft_model = adapted(method, model)
    if peft_model.supports_lora_conversion():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Converting a PEFT adapter to LoRA that is already a LoRA", UserWarning)
            convert_to_lora(peft_model, rank=2)
        return
    with pytest.raises((ValueError, TypeError), match=r"not support|cannot|Could not|LoRA"):
        convert_to_lora(peft_model, rank=2)
