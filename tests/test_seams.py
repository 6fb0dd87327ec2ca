"""What ELP relies on inside PEFT, Transformers, Accelerate and PyTorch, beyond what they promise.

Each test stands for one private hook, which the code names in a comment, and says in its docstring which file to mend
when an upstream release changes the hook. Nothing here is a test of ELP itself.
"""

import ast
import copy
import inspect
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import align_module_device
from backbones import build, waveforms
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model, inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

import peft_elp

LORA = {"target_modules": ["intermediate_dense"], "r": 2}


def lora(**options):
    return get_peft_model(build("hubert"), LoraConfig(**LORA | options))


def lora_layer():
    return next(module for module in lora().modules() if isinstance(module, LoraLayer))


def spied(monkeypatch, owner, name, log=None):
    """The calls of a function, as (args, kwargs), while it goes on doing what it does."""
    calls, function = [], inspect.getattr_static(owner, name)
    inner = getattr(function, "__func__", function)

    def spy(*args, **kwargs):
        calls.append((args, kwargs))
        if log is not None:
            log.append(name)
        return inner(*args, **kwargs)

    monkeypatch.setattr(owner, name, type(function)(spy) if inner is not function else spy)
    return calls


@pytest.mark.parametrize(
    ("function", "names"),
    [
        # tuner/model.py, which takes the place of these methods or calls them
        (BaseTuner.inject_adapter, "self model adapter_name autocast_adapter_dtype low_cpu_mem_usage state_dict"),
        (BaseTuner._check_new_adapter_config, "self config"),
        (BaseTuner._cast_adapter_dtype, "self adapter_name autocast_adapter_dtype"),
        # tuner/layers.py and tuner/trained.py
        (BaseTunerLayer.set_adapter, "self adapter_names inference_mode"),
        (BaseTunerLayer.enable_adapters, "self enabled"),
        (BaseTunerLayer.set_requires_grad, "self adapter_names requires_grad"),
        (BaseTunerLayer.delete_adapter, "self adapter_name"),
        (BaseTunerLayer._cast_input_dtype, "self x dtype"),
        (BaseTunerLayer._get_base_layer_device_and_dtype, "self base_layer"),
        # tuner/registry.py
        (peft.utils.register_peft_method, "name config_cls model_cls"),
        # saved/card.py and recipes/saving.py
        (PeftModel.save_pretrained, "self save_directory safe_serialization"),
        (transformers.PreTrainedModel.save_pretrained, "self save_directory"),
    ],
    ids=lambda x: getattr(x, "__qualname__", ""),
)
def test_arguments_have_the_names_that_elp_passes(function, names):
    expected = names.split()
    assert list(inspect.signature(function).parameters)[: len(expected)] == expected


# PEFT ---------------------------------------------------------------------------------------------------------------


def test_peft_types_are_an_enumeration_of_strings_that_takes_a_further_member_and_tables_name_them():
    """Mend tuner/registry.py, which adds the member and writes into the tables."""
    for table in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        assert {PeftType.LORA, PeftType("ELP")} <= table.keys()
    elp = PeftType("ELP")
    assert elp is PeftType["ELP"]
    assert elp in list(PeftType)
    assert isinstance(elp, str)
    assert elp.value == "ELP"
    names = ["_member_names_", "_member_map_", "_value2member_map_"]
    names += ["_hashable_values_"] * (sys.version_info >= (3, 13))
    assert all(hasattr(PeftType, name) for name in names)
    assert all(hasattr(elp, name) for name in ("_name_", "_value_"))


def test_a_peft_model_passes_its_tuner_a_dictionary_and_injection_passes_a_configuration(monkeypatch):
    """Mend ELPModel.__init__ in tuner/model.py, which tells the two apart by it."""
    calls = spied(monkeypatch, LoraModel, "__init__")
    lora()
    inject_adapter_in_model(LoraConfig(**LORA), build("hubert"))
    wrapped, alone = ((*args, *kwargs.values())[2] for args, kwargs in calls)
    assert isinstance(wrapped, dict)
    assert isinstance(alone, PeftConfig)


def test_a_tuner_places_adapters_and_surrounds_calls_by_two_methods(monkeypatch):
    """Mend ELPModel.inject_adapter and ELPModel._enable_peft_forward_hooks in tuner/model.py."""
    placed = spied(monkeypatch, BaseTuner, "inject_adapter")
    called = spied(monkeypatch, LoraModel, "_enable_peft_forward_hooks")
    model = lora()
    model.add_adapter("other", LoraConfig(**LORA))
    assert [args[2] for args, _ in placed] == ["default", "other"]
    model.eval()(waveforms()[0], adapter_names=["__base__"] * 3)
    assert [kwargs.get("adapter_names") for _, kwargs in called] == [["__base__"] * 3]


def test_peft_takes_arguments_of_a_call_out_by_their_names():
    """Mend feature_cache.py, which adds the name of its argument."""
    model: Any = lora()
    model.special_peft_forward_args = {*model.special_peft_forward_args, "cached"}
    model(waveforms()[0], cached=1)  # HuBERT would refuse the argument


def test_peft_delegates_the_names_of_saved_tensors_to_the_tuners_class(monkeypatch, tmp_path):
    """Mend the class methods at the end of ELPModel in tuner/model.py."""
    saving, naming, loading = (
        spied(monkeypatch, BaseTuner, name)
        for name in ("_get_adapter_state_dict", "_remove_adapter_name_from_key", "_remap_adapter_state_dict_for_load")
    )
    monkeypatch.delattr(LoraModel, "_get_adapter_state_dict", raising=False)
    monkeypatch.delattr(LoraModel, "_remap_adapter_state_dict_for_load", raising=False)
    lora().save_pretrained(tmp_path)
    assert naming
    assert set(saving[0][1]) <= {"model", "config", "adapter_name", "state_dict", "unwanted_adapter_names"}
    PeftModel.from_pretrained(build("hubert"), tmp_path)
    assert set(loading[0][1]) == {"model", "config", "adapter_name", "state_dict"}


def test_peft_reads_the_configuration_places_the_adapter_checks_names_and_loads(monkeypatch, tmp_path):
    """Mend ELPConfig.from_pretrained in config.py, and _remap_adapter_state_dict_for_load in tuner/model.py."""
    steps = []
    lora().save_pretrained(tmp_path)
    spied(monkeypatch, LoraConfig, "from_pretrained", steps)
    spied(monkeypatch, LoraModel, "inject_adapter", steps)
    spied(monkeypatch, LoraModel, "_remap_adapter_state_dict_for_load", steps)
    spied(monkeypatch, nn.Module, "load_state_dict", steps)
    model = PeftModel.from_pretrained(build("hubert"), tmp_path)
    model.load_adapter(tmp_path, "other")
    in_order = ["from_pretrained", "inject_adapter", "_remap_adapter_state_dict_for_load", "load_state_dict"]
    assert steps == in_order * 2
    assert hasattr(PeftConfig, "_split_kwargs")


def test_peft_saves_the_configuration_after_the_weights_and_names_the_base_in_it(monkeypatch, tmp_path):
    """Mend ELPConfig.save_pretrained in config.py, which writes the card then."""
    seen = []

    def save(self, folder, **kwargs):
        seen.append((sorted(file.name for file in tmp_path.glob("*.safetensors")), sorted(kwargs)))

    monkeypatch.setattr(LoraConfig, "save_pretrained", save)
    lora().save_pretrained(tmp_path)
    assert seen == [(["adapter_model.safetensors"], ["auto_mapping_dict"])]


def test_unloading_and_merging_go_through_private_methods(monkeypatch):
    """Mend _unload_and_optionally_merge and _check_merge_allowed in tuner/model.py."""
    unloads = spied(monkeypatch, BaseTuner, "_unload_and_optionally_merge")
    checks = spied(monkeypatch, LoraModel, "_check_merge_allowed")
    model = lora()
    model.merge_adapter()
    model.unload()
    assert checks
    assert [kwargs.get("merge") for _, kwargs in unloads] == [False]


def test_tuner_layers_hold_adapters_and_name_the_device_of_new_ones(monkeypatch):
    """Mend ELPLayer in tuner/layers.py, which answers for modules without weight, and tuner/trained.py."""
    layer = lora_layer()
    assert isinstance(layer, BaseTunerLayer)
    names = ("_active_adapter", "merged_adapters", "adapter_layer_names", "other_param_names")
    assert all(hasattr(layer, name) for name in names)
    layer._disable_adapters = True
    assert layer.disable_adapters
    calls = spied(monkeypatch, BaseTunerLayer, "_get_base_layer_device_and_dtype")
    layer._move_adapter_to_device_of_base_layer("default")
    assert calls


def test_heads_are_held_in_a_modules_to_save_wrapper():
    """Mend Head in tuner/head.py."""
    module = nn.Linear(2, 2)
    wrapper: Any = ModulesToSaveWrapper(module, "one")
    wrapper.update("two")
    assert wrapper.original_module is module
    assert set(wrapper.modules_to_save) == wrapper._adapters == {"one", "two"}
    assert wrapper.check_set_adapter(["one"]) == "one"
    wrapper.set_adapter([])
    assert wrapper.active_adapters == []
    wrapper.set_adapter("two")
    assert torch.equal(wrapper(torch.ones(1, 2)), wrapper.modules_to_save["two"](torch.ones(1, 2)))
    names = {"weight": "modules_to_save.two.weight", "bias": "modules_to_save.two.bias"}
    assert wrapper.adapter_state_dict_load_map("two") == names
    wrapper.delete_adapter("two", new_active_adapters=["one"])
    assert wrapper.active_adapters == ["one"]


# Transformers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat", "data2vec-audio"])
def test_convolutions_record_a_graph_because_of_a_private_flag(family):
    """Mend tuner/place.py, which switches the flag off."""
    model: Any = build(family, "Model").train()
    model.feature_extractor.requires_grad_(False)
    for flag in (True, False):
        assert hasattr(model.feature_extractor, "_requires_grad")
        model.feature_extractor._requires_grad = flag
        assert model.feature_extractor(waveforms()[0]).requires_grad == flag


def test_transformers_marks_what_it_loads_and_initialises_a_module_by_a_private_method(tmp_path):
    """Mend tuner/head_modules.py, which tells a new head from a trained one, and tuner/head_config.py."""
    build("hubert", "Model").save_pretrained(tmp_path)
    model: Any = transformers.HubertForCTC.from_pretrained(tmp_path)
    assert all(getattr(p, "_is_hf_initialized", False) for p in model.hubert.parameters())
    assert not any(getattr(p, "_is_hf_initialized", False) for p in model.lm_head.parameters())
    module = nn.Linear(300, 300)
    nn.init.constant_(module.weight, 5.0)
    build()._init_weights(module)
    assert module.weight.std() < 1
    assert not module.bias.any()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_layers_know_the_form_of_gradient_checkpointing(use_reentrant):
    """Mend tuner/stack.py, which reads the form."""
    model: Any = build("wav2vec2")
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    layer = model.wav2vec2.encoder.layers[0]
    assert layer.gradient_checkpointing
    assert layer._gradient_checkpointing_func.keywords["use_reentrant"] is use_reentrant


def test_a_model_of_transformers_injects_adapters_in_place():
    """Mend tuner/model.py, which tells such a model by the flag."""
    model: Any = build("hubert")
    model.add_adapter(LoraConfig(**LORA))
    assert vars(model)["_hf_peft_config_loaded"] is True
    assert isinstance(vars(model)["peft_config"], dict)


def test_a_copy_of_a_model_shares_its_modules():
    """Mend TaskHead.seen_by in tuner/head_config.py."""
    model = build("wavlm", "ForSequenceClassification")
    copied: Any = copy.copy(model)
    copied.config = copy.copy(model.config)
    copied.config.update({"num_labels": 7})
    assert copied.wavlm is model.wavlm
    assert model.config.num_labels == 4
    assert copied(waveforms()[0]).logits is not None


def test_reported_hidden_states_are_the_tensors_that_the_layers_return():
    """Mend call/hidden_states.py, which finds the real frames by a mark on the tensors."""
    model: Any = build("hubert", "Model")
    returned = []
    for layer in model.encoder.layers:
        layer.register_forward_hook(lambda module, args, output: returned.append(output))
    states = model(waveforms()[0], output_hidden_states=True).hidden_states
    first = [output if isinstance(output, torch.Tensor) else output[0] for output in returned]
    assert sum(any(state is x for x in first) for state in states) >= len(first) - 1


def test_a_model_counts_valid_frames_by_private_methods():
    """Mend speech/speakers.py and speech/inference.py, which leave padding out of a mean, and recipes/ctc.py."""
    model: Any = build("wav2vec2", "Model")
    _, mask = waveforms()
    frames = int(model._get_feat_extract_output_lengths(mask.shape[1]))
    assert model._get_feature_vector_attention_mask(frames, mask).shape == (3, frames)


def test_trainer_tells_parameters_with_weight_decay_by_a_helper():
    """Mend optim.py, which splits parameters as Trainer does."""
    names = get_parameter_names(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), [nn.LayerNorm])
    assert set(names) == {"0.weight", "0.bias"}


@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")
def test_trainer_asks_an_attribute_whether_the_model_takes_the_number_of_items(tmp_path):
    """Mend recipes/trainer.py, which sets it."""
    arguments = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    assert hasattr(transformers.Trainer(build("hubert"), arguments), "model_accepts_loss_kwargs")


def test_the_pipeline_of_recognition_says_with_how_many_beams_it_searches():
    """Mend _beams in serving/engine.py."""
    pipeline = transformers.AutomaticSpeechRecognitionPipeline
    default = pipeline._default_generation_config
    assert default is None or default.num_beams is None or default.num_beams >= 1


def test_transformers_tells_what_a_call_reports():
    """Mend _transformers_collects in call/reports.py."""
    capturing = getattr(transformers.utils, "output_capturing", None)
    if capturing is None:
        pytest.skip("This version replaces `forward` of the layers")
    model, seen = build("wavlm", "Model"), []
    model.encoder.layers[0].register_forward_hook(lambda *_: seen.append(bool(capturing._active_collector.get())))
    for report in (False, True):
        model(torch.zeros(1, 2000), output_attentions=report)
    assert seen == [False, True]
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert all(hook.__module__.startswith(("transformers.", __name__)) for hook in hooks)


# Accelerate and PyTorch ---------------------------------------------------------------------------------------------


def test_accelerate_keeps_its_hook_in_two_attributes_of_a_module():
    """Mend NOT_SHARED in tuner/wrapper.py."""
    module = nn.Linear(2, 2)
    before = set(vars(module))
    add_hook_to_module(module, ModelHook())
    assert set(vars(module)) - before == {"_hf_hook", "_old_forward", "forward"}


def test_accelerate_keeps_weights_elsewhere_by_a_hook_that_names_the_device():
    """Mend tuner/offload.py."""
    linear = nn.Linear(2, 2)
    weight = linear.weight.detach().clone()
    cpu_offload(nn.Sequential(linear), execution_device="cpu")  # The hook of the whole model is of another kind.
    assert linear.weight.is_meta
    assert torch.device(vars(linear)["_hf_hook"].execution_device).type == "cpu"
    with align_module_device(linear):
        assert torch.equal(linear.weight, weight)
    vars(linear)["_hf_hook"] = ModelHook()
    remove_hook_from_module(linear)
    assert linear.weight.is_meta
    assert "_hf_hook" not in vars(linear)


def test_modules_keep_their_hooks_and_tensors_in_dictionaries():
    """Mend tuner/wrapper.py, call/reports.py and multitask.py."""
    module = nn.Linear(2, 2)

    def hook(*args):
        pass

    module.register_forward_hook(hook)
    module.register_forward_pre_hook(hook, with_kwargs=True)
    module.register_state_dict_post_hook(hook)
    for name in ("_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks"):
        assert hook in getattr(module, name).values()
    assert "weight" in vars(module)["_parameters"]
    assert vars(module)["_buffers"] == {}


def test_writing_into_a_tensor_counts():
    """Mend tuner/without_peft_model.py, which tells loaded tensors by it."""
    parameter = nn.Parameter(torch.zeros(2))
    before = parameter._version
    with torch.no_grad():
        parameter.copy_(torch.ones(2))
    assert parameter._version > before


def test_batch_norms_have_a_base_class():
    """Mend tuner/stack.py, which keeps frozen batch norms in evaluation."""
    assert isinstance(nn.BatchNorm1d(2), nn.modules.batchnorm._BatchNorm)


# All of them --------------------------------------------------------------------------------------------------------

# Set and read by ELP; the ending of an option; documented by Python.
OWN = {"_elp_faster", "_elp_pooled", "_elp_real_frames", "_elp_replaced", "_elp_version", "_learning_rate", "_asdict"}


def private_names() -> dict[str, str]:
    """The private names that the package uses and does not define, with a file that uses them."""
    used, defined = {}, set()
    for file in sorted(Path(peft_elp.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                defined.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.add(node.id)
            elif isinstance(node, ast.Attribute):
                if isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self":
                    defined.add(node.attr)
                used[node.attr] = file.name
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                used[node.value] = file.name  # of getattr() and vars()
    found = {name: file for name, file in used.items() if name[:1] == "_" and name[1:2] not in ("_", "")}
    return {name: file for name, file in found.items() if name not in defined | OWN}


def test_every_private_name_of_another_library_has_a_test_here():
    tested = Path(__file__).read_text(encoding="utf-8")
    assert {name: file for name, file in private_names().items() if name not in tested} == {}
