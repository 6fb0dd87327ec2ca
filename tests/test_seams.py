"""What ELP relies on inside PEFT, Transformers, Accelerate and PyTorch, beyond what they promise.

Each test stands for one private hook, which the code names in a comment. Where an upstream release changes the hook,
its test fails with a sentence that says what changed and which file to mend. Nothing here is a test of ELP itself.
"""

import ast
import copy
import inspect
import sys
from pathlib import Path
from typing import Any

import accelerate
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

import peft_elp

VERSIONS = ", ".join(
    f"{library.__name__} {library.__version__}" for library in (peft, transformers, accelerate, torch)
)
LORA = {"target_modules": ["intermediate_dense"], "r": 2}


def expect(holds, changed, mend):
    assert holds, f"{changed}. Mend {mend}. ({VERSIONS})"


def parameters_of(function):
    return list(inspect.signature(function).parameters)


def expect_parameters(function, names, mend):
    found = parameters_of(function)
    expect(found[: len(names)] == names, f"{function.__qualname__} takes {found} now, not {names}", mend)


def spied(monkeypatch, owner, name):
    """The calls of a function, as (args, kwargs), while it goes on doing what it does."""
    calls, function = [], inspect.getattr_static(owner, name)
    inner = getattr(function, "__func__", function)

    def spy(*args, **kwargs):
        calls.append((args, kwargs))
        return inner(*args, **kwargs)

    monkeypatch.setattr(owner, name, type(function)(spy) if inner is not function else spy)
    return calls


def lora(**options):
    return get_peft_model(build("hubert"), LoraConfig(**LORA | options))


# PEFT ----------------------------------------------------------------------------------------------------------------


def test_peft_types_are_an_enumeration_of_strings_that_takes_a_further_member():
    mend = "tuner/registry.py, which adds the member"
    elp = PeftType("ELP")
    expect(elp is PeftType["ELP"] and elp in list(PeftType), "PeftType does not find an added member", mend)
    expect(isinstance(elp, str) and elp.value == "ELP", "PeftType is not an enumeration of strings any more", mend)
    for name in ("_member_names_", "_member_map_", "_value2member_map_"):
        expect(hasattr(PeftType, name), f"PeftType has no {name} any more", mend)
    for name in ("_name_", "_value_", "_sort_order_"):
        expect(hasattr(elp, name), f"Members of PeftType have no {name} any more", mend)
    if sys.version_info >= (3, 13):
        expect(hasattr(PeftType, "_hashable_values_"), "PeftType has no _hashable_values_ any more", mend)


def test_peft_looks_methods_up_in_three_tables():
    mend = "tuner/registry.py, which writes into them"
    tables = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)
    for table in tables:
        expect(isinstance(table, dict) and PeftType.LORA in table, "PEFT's tables of methods have changed", mend)
    expect(PEFT_TYPE_TO_PREFIX_MAPPING[PeftType("ELP")] == "elp_", "The prefix of a method is named otherwise", mend)
    expect_parameters(peft.utils.register_peft_method, ["name", "config_cls", "model_cls"], mend)


def test_a_peft_model_passes_its_tuner_a_dictionary_and_injection_passes_a_configuration(monkeypatch):
    mend = "ELPModel.__init__ in tuner/model.py, which tells the two apart by it"
    calls = spied(monkeypatch, LoraModel, "__init__")
    lora()
    inject_adapter_in_model(LoraConfig(**LORA), build("hubert"))
    expect(len(calls) == 2, "PEFT makes a tuner in another way", mend)
    (wrapped, alone) = ((*args, *kwargs.values())[2] for args, kwargs in calls)
    expect(isinstance(wrapped, dict), "A PeftModel does not pass a dictionary of configurations", mend)
    expect(isinstance(alone, PeftConfig), "inject_adapter_in_model does not pass a bare configuration", mend)


def test_a_tuner_places_every_adapter_through_inject_adapter(monkeypatch):
    mend = "ELPModel.inject_adapter in tuner/model.py, which takes its place"
    names = ["self", "model", "adapter_name", "autocast_adapter_dtype", "low_cpu_mem_usage", "state_dict"]
    expect_parameters(BaseTuner.inject_adapter, names, mend)
    calls = spied(monkeypatch, BaseTuner, "inject_adapter")
    model = lora()
    model.add_adapter("other", LoraConfig(**LORA))
    expect([args[2] for args, _ in calls] == ["default", "other"], "Adapters are not placed by inject_adapter", mend)
    expect_parameters(BaseTuner._check_new_adapter_config, ["self", "config"], mend)
    expect_parameters(BaseTuner._cast_adapter_dtype, ["self", "adapter_name", "autocast_adapter_dtype"], mend)


def test_a_peft_model_enters_the_hooks_of_its_tuner_around_each_call(monkeypatch):
    mend = "ELPModel._enable_peft_forward_hooks in tuner/model.py, which routes mixed batches by it"
    calls = spied(monkeypatch, LoraModel, "_enable_peft_forward_hooks")
    model = lora().eval()
    model(waveforms()[0], adapter_names=["__base__"] * 3)
    found = [kwargs.get("adapter_names") for _, kwargs in calls]
    expect(found == [["__base__"] * 3], "adapter_names does not reach _enable_peft_forward_hooks", mend)


def test_peft_delegates_the_names_of_saved_tensors_to_the_tuners_class(monkeypatch, tmp_path):
    mend = "the class methods at the end of ELPModel in tuner/model.py"
    saving = spied(monkeypatch, BaseTuner, "_get_adapter_state_dict")
    naming = spied(monkeypatch, BaseTuner, "_remove_adapter_name_from_key")
    loading = spied(monkeypatch, BaseTuner, "_remap_adapter_state_dict_for_load")
    monkeypatch.delattr(LoraModel, "_get_adapter_state_dict", raising=False)
    monkeypatch.delattr(LoraModel, "_remap_adapter_state_dict_for_load", raising=False)
    lora().save_pretrained(tmp_path)
    expect(bool(saving and naming), "Saving does not ask the tuner's class which tensors are the adapter's", mend)
    wanted = {"model", "config", "adapter_name", "state_dict", "unwanted_adapter_names"}
    expect(set(saving[0][1]) <= wanted, f"_get_adapter_state_dict is passed {sorted(saving[0][1])}", mend)
    PeftModel.from_pretrained(build("hubert"), tmp_path)
    expect(bool(loading), "Loading does not ask the tuner's class for the names of the tensors", mend)
    wanted = {"model", "config", "adapter_name", "state_dict"}
    expect(set(loading[0][1]) == wanted, f"_remap_adapter_state_dict_for_load is passed {sorted(loading[0][1])}", mend)


def test_unloading_and_merging_go_through_private_methods(monkeypatch):
    mend = "_unload_and_optionally_merge and _check_merge_allowed in tuner/model.py"
    unloads = spied(monkeypatch, BaseTuner, "_unload_and_optionally_merge")
    checks = spied(monkeypatch, LoraModel, "_check_merge_allowed")
    model = lora()
    model.merge_adapter()
    expect(bool(checks), "merge_adapter does not call _check_merge_allowed", mend)
    model.unload()
    expect(len(unloads) == 1 and unloads[0][1].get("merge") is False, "unload() does not pass merge=False", mend)


def test_peft_sets_adapters_and_switches_them_off_on_tuner_layers():
    mend = "ELPLayer in tuner/layers.py and KeepsTrained in tuner/trained.py"
    model = lora()
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    expect(issubclass(LoraLayer, BaseTunerLayer), "Tuner layers have another base class", mend)
    for name in ("_active_adapter", "_disable_adapters", "merged_adapters", "adapter_layer_names"):
        expect(hasattr(layer, name), f"BaseTunerLayer has no {name} any more", mend)
    layer._disable_adapters = True
    expect(layer.disable_adapters, "disable_adapters does not read _disable_adapters", mend)
    expect_parameters(BaseTunerLayer.set_adapter, ["self", "adapter_names", "inference_mode"], mend)
    expect_parameters(BaseTunerLayer.enable_adapters, ["self", "enabled"], mend)
    expect_parameters(BaseTunerLayer.set_requires_grad, ["self", "adapter_names", "requires_grad"], mend)
    expect_parameters(BaseTunerLayer.delete_adapter, ["self", "adapter_name"], mend)
    expect_parameters(BaseTunerLayer._cast_input_dtype, ["self", "x", "dtype"], mend)


def test_an_adapter_moves_to_the_device_that_its_layer_names(monkeypatch):
    mend = "ELPLayer._get_base_layer_device_and_dtype in tuner/layers.py, which answers for a module without a weight"
    expect_parameters(BaseTunerLayer._get_base_layer_device_and_dtype, ["self", "base_layer"], mend)
    calls = spied(monkeypatch, BaseTunerLayer, "_get_base_layer_device_and_dtype")
    layer = next(module for module in lora().modules() if isinstance(module, LoraLayer))
    calls.clear()
    layer._move_adapter_to_device_of_base_layer("default")
    expect(bool(calls), "_move_adapter_to_device_of_base_layer does not ask for device and dtype", mend)


def test_heads_are_held_in_a_modules_to_save_wrapper():
    mend = "Head in tuner/head.py"
    module = nn.Linear(2, 2)
    wrapper: Any = ModulesToSaveWrapper(module, "one")
    wrapper.update("two")
    expect(wrapper.original_module is module, "ModulesToSaveWrapper keeps the model's module elsewhere", mend)
    expect(set(wrapper.modules_to_save) == {"one", "two"}, "The copies of a head are kept elsewhere", mend)
    expect(wrapper._adapters == {"one", "two"}, "ModulesToSaveWrapper counts its copies elsewhere", mend)
    expect(wrapper.check_set_adapter(["one"]) == "one", "check_set_adapter answers otherwise", mend)
    wrapper.set_adapter([])
    expect(wrapper.active_adapters == [], "set_adapter([]) does not switch all copies off", mend)
    wrapper.set_adapter("two")
    x = torch.ones(1, 2)
    expect(torch.equal(wrapper(x), wrapper.modules_to_save["two"](x)), "The active copy does not run", mend)
    names = {"weight": "modules_to_save.two.weight", "bias": "modules_to_save.two.bias"}
    expect(wrapper.adapter_state_dict_load_map("two") == names, "Copies of a head are named otherwise", mend)
    wrapper.delete_adapter("two", new_active_adapters=["one"])
    expect(wrapper.active_adapters == ["one"], "delete_adapter chooses another copy", mend)


def test_peft_checks_names_before_it_loads_a_state_dict(monkeypatch, tmp_path):
    mend = "_remap_adapter_state_dict_for_load in tuner/model.py, whose hook compares shapes in between"
    order = []
    lora().save_pretrained(tmp_path)
    inner = LoraModel._remap_adapter_state_dict_for_load.__func__

    def remap(cls, **kwargs):
        order.append("names")
        return inner(cls, **kwargs)

    monkeypatch.setattr(LoraModel, "_remap_adapter_state_dict_for_load", classmethod(remap))
    load = nn.Module.load_state_dict
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *a, **k: (order.append("load"), load(*a, **k))[1])
    PeftModel.from_pretrained(build("hubert"), tmp_path)
    expect(order == ["names", "load"], f"Loading takes its steps in another order: {order}", mend)


def test_peft_reads_the_configuration_before_it_places_an_adapter(monkeypatch, tmp_path):
    mend = "ELPConfig.from_pretrained in config.py, which looks at the weights before the model is changed"
    order = []
    lora().save_pretrained(tmp_path)
    read: Any = LoraConfig.from_pretrained
    place = LoraModel.inject_adapter
    reading = classmethod(lambda cls, *a, **k: (order.append("read"), read(*a, **k))[1])
    monkeypatch.setattr(LoraConfig, "from_pretrained", reading)
    monkeypatch.setattr(LoraModel, "inject_adapter", lambda *a, **k: (order.append("place"), place(*a, **k))[1])
    model = PeftModel.from_pretrained(build("hubert"), tmp_path)
    model.load_adapter(tmp_path, "other")
    expect(order == ["read", "place", "read", "place"], f"Loading takes its steps in another order: {order}", mend)
    expect(hasattr(PeftConfig, "_split_kwargs"), "PeftConfig has no _split_kwargs any more", mend)


def test_peft_saves_the_configuration_after_the_weights_and_names_the_base_in_it(monkeypatch, tmp_path):
    mend = "ELPConfig.save_pretrained in config.py, which writes the card then"
    seen = []

    def save(self, folder, **kwargs):
        seen.append((sorted(file.name for file in tmp_path.glob("*.safetensors")), sorted(kwargs)))

    monkeypatch.setattr(LoraConfig, "save_pretrained", save)
    lora().save_pretrained(tmp_path)
    expect(seen == [(["adapter_model.safetensors"], ["auto_mapping_dict"])], f"PEFT saves otherwise: {seen}", mend)


# Transformers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat", "data2vec-audio"])
def test_convolutions_record_a_graph_because_of_a_private_flag(family):
    mend = "wrap_stack in tuner/place.py, which switches the flag off"
    model: Any = build(family, "Model").train()
    model.feature_extractor.requires_grad_(False)
    recorded = []
    for flag in (True, False):
        expect(hasattr(model.feature_extractor, "_requires_grad"), f"{family} has no _requires_grad any more", mend)
        model.feature_extractor._requires_grad = flag
        recorded.append(model.feature_extractor(waveforms()[0]).requires_grad)
    expect(recorded == [True, False], f"_requires_grad of {family} does not decide about the graph", mend)


def test_transformers_initialises_one_module_by_a_private_method():
    mend = "tuner/head_config.py and tuner/place.py, which initialise new layers of a head"
    model: Any = build()
    module = nn.Linear(300, 300)
    nn.init.constant_(module.weight, 5.0)
    nn.init.constant_(module.bias, 5.0)
    model._init_weights(module)
    expect(module.weight.std() < 1 and not module.bias.any(), "_init_weights does not initialise a linear layer", mend)


def test_parameters_that_were_loaded_carry_a_mark(tmp_path):
    mend = "tuner/head_modules.py, which tells a new head from a trained one by the mark"
    build("hubert", "Model").save_pretrained(tmp_path)
    model: Any = transformers.HubertForCTC.from_pretrained(tmp_path)
    marks = [
        getattr(p, "_is_hf_initialized", False) for p in (*model.hubert.parameters(), *model.lm_head.parameters())
    ]
    expect(all(marks[:-2]) and not any(marks[-2:]), "_is_hf_initialized does not mark what was loaded", mend)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_layers_know_the_form_of_gradient_checkpointing(use_reentrant):
    mend = "tuner/checkpointing.py, which reads the form"
    model: Any = build("wav2vec2")
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    layer = model.wav2vec2.encoder.layers[0]
    expect(getattr(layer, "gradient_checkpointing", False), "Layers do not carry gradient_checkpointing", mend)
    keywords = getattr(getattr(layer, "_gradient_checkpointing_func", None), "keywords", {})
    expect(keywords.get("use_reentrant") is use_reentrant, "_gradient_checkpointing_func hides use_reentrant", mend)


def test_a_model_of_transformers_injects_and_deletes_adapters_in_place(monkeypatch):
    mend = "tuner/model.py, which tells such a model by the flag"
    model: Any = build("hubert")
    model.add_adapter(LoraConfig(**LORA))
    expect(vars(model).get("_hf_peft_config_loaded") is True, "The flag _hf_peft_config_loaded has gone", mend)
    expect(isinstance(vars(model).get("peft_config"), dict), "The model does not hold peft_config", mend)
    model.delete_adapter("default")
    expect(not hasattr(model, "peft_config"), "delete_adapter leaves peft_config behind", mend)


def test_a_copy_of_a_model_shares_its_modules():
    model = build("wavlm", "ForSequenceClassification")
    copied: Any = copy.copy(model)
    copied.config = copy.copy(model.config)
    copied.config.update({"num_labels": 7})
    expect(
        copied.wavlm is model.wavlm and model.config.num_labels == 4 and copied(waveforms()[0]).logits is not None,
        "a shallow copy of a model is not a view of it",
        "TaskHead.seen_by in tuner/head_config.py",
    )


def test_reported_hidden_states_are_the_tensors_that_the_layers_return():
    mend = "call/hidden_states.py, which finds the real frames by a mark on the tensors"
    model: Any = build("hubert", "Model")
    returned = []
    for layer in model.encoder.layers:
        layer.register_forward_hook(lambda module, args, output: returned.append(output))
    states = model(waveforms()[0], output_hidden_states=True).hidden_states
    first = [output if isinstance(output, torch.Tensor) else output[0] for output in returned]
    same = [any(state is x for x in first) for state in states]
    expect(sum(same) >= len(first) - 1, "Transformers copies hidden states that it reports", mend)


def test_a_model_counts_valid_frames_by_a_private_method():
    mend = "speech/speakers.py, which leaves padding out of a mean by it, and recipes/ctc.py"
    model: Any = build("wav2vec2", "Model")
    _, mask = waveforms()
    frames = int(model._get_feat_extract_output_lengths(mask.shape[1]))
    found = model._get_feature_vector_attention_mask(frames, mask)
    expect(found.shape == (3, frames), "_get_feature_vector_attention_mask answers otherwise", mend)


def test_trainer_tells_parameters_with_weight_decay_by_a_helper():
    from transformers.trainer_pt_utils import get_parameter_names

    mend = "optim.py, which splits parameters as Trainer does"
    names = get_parameter_names(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), [nn.LayerNorm])
    expect(set(names) == {"0.weight", "0.bias"}, "get_parameter_names of Trainer answers otherwise", mend)


# Accelerate and PyTorch ----------------------------------------------------------------------------------------------


def test_accelerate_keeps_its_hook_in_two_attributes_of_a_module():
    mend = "NOT_SHARED in tuner/wrapper.py"
    module = nn.Linear(2, 2)
    before = set(vars(module))
    add_hook_to_module(module, ModelHook())
    added = set(vars(module)) - before
    expect(added == {"_hf_hook", "_old_forward", "forward"}, f"add_hook_to_module sets {sorted(added)}", mend)


def test_modules_keep_their_hooks_and_tensors_in_dictionaries():
    mend = "tuner/wrapper.py and call/reports.py"
    module = nn.Linear(2, 2)

    def hook(*args):
        pass

    module.register_forward_hook(hook)
    module.register_forward_pre_hook(hook, with_kwargs=True)
    module.register_state_dict_post_hook(hook)
    for name in ("_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks"):
        held = getattr(module, name, {})
        expect(hook in held.values(), f"nn.Module keeps no hooks in {name} any more", mend)
    expect("weight" in vars(module)["_parameters"], "nn.Module keeps parameters elsewhere", mend)
    expect(vars(module)["_buffers"] == {}, "nn.Module keeps buffers elsewhere", mend)


def test_writing_into_a_tensor_counts():
    mend = "tuner/without_peft_model.py, which tells loaded tensors by it"
    parameter = nn.Parameter(torch.zeros(2))
    before = parameter._version
    with torch.no_grad():
        parameter.copy_(torch.ones(2))
    expect(parameter._version > before, "Tensor._version does not count writes any more", mend)


def test_transformers_tells_what_a_call_reports():
    mend = "_transformers_collects in peft_elp/call/reports.py"
    capturing = getattr(transformers.utils, "output_capturing", None)
    if capturing is None:
        pytest.skip("This version replaces `forward` of the layers")
    model, seen = build("wavlm", "Model"), []
    model.encoder.layers[0].register_forward_hook(lambda *_: seen.append(capturing._active_collector.get()))
    for report in (False, True):
        model(torch.zeros(1, 2000), output_attentions=report)
    expect([bool(collected) for collected in seen] == [False, True], "Transformers collects elsewhere", mend)
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    modules = {hook.__module__ for hook in hooks} - {__name__}
    expect(all(name.startswith("transformers.") for name in modules), f"Hooks are from {modules}", mend)


def test_batch_norms_have_a_base_class():
    mend = "tuner/stack.py, which keeps frozen batch norms in evaluation"
    base = getattr(nn.modules.batchnorm, "_BatchNorm", ())
    expect(isinstance(nn.BatchNorm1d(2), base), "nn.modules.batchnorm._BatchNorm is not the base class", mend)


def test_accelerate_keeps_weights_elsewhere_by_a_hook_that_names_the_device():
    mend = "peft_elp/tuner/offload.py"
    linear = nn.Linear(2, 2)
    weight = linear.weight.detach().clone()
    cpu_offload(nn.Sequential(linear), execution_device="cpu")  # The hook of the whole model is of another kind.
    hook = vars(linear).get("_hf_hook")
    expect(linear.weight.is_meta, "accelerate no longer keeps offloaded weights on the meta device", mend)
    expect(hook is not None, "accelerate no longer keeps its hook in `_hf_hook`", mend)
    expect(torch.device(hook.execution_device).type == "cpu", "The hook has no `execution_device` any more", mend)
    with align_module_device(linear):
        expect(torch.equal(linear.weight, weight), "align_module_device no longer brings the weights back", mend)
    vars(linear)["_hf_hook"] = ModelHook()
    remove_hook_from_module(linear)
    expect(linear.weight.is_meta, "Removing an empty ModelHook moves weights", mend)
    expect("_hf_hook" not in vars(linear), "remove_hook_from_module leaves its hook", mend)


def test_peft_takes_arguments_of_a_call_out_by_their_names():
    mend = "feature_cache.py, which adds the name of its argument"
    model: Any = lora()
    expect(isinstance(model.special_peft_forward_args, set), "PeftModel has no special_peft_forward_args", mend)
    model.special_peft_forward_args = {*model.special_peft_forward_args, "cached"}
    model(waveforms()[0], cached=1)  # HuBERT would refuse the argument


def test_saving_takes_its_arguments_by_these_names():
    mend = "saved/card.py and recipes/saving.py"
    expect_parameters(PeftModel.save_pretrained, ["self", "save_directory", "safe_serialization"], mend)
    expect_parameters(transformers.PreTrainedModel.save_pretrained, ["self", "save_directory"], mend)


def test_trainer_asks_an_attribute_whether_the_model_takes_the_number_of_items():
    mend = "recipes/trainer.py, which sets it"
    arguments = transformers.TrainingArguments("unused", report_to=[], use_cpu=True)
    trainer = transformers.Trainer(build("hubert"), arguments)
    expect(hasattr(trainer, "model_accepts_loss_kwargs"), "Trainer has no model_accepts_loss_kwargs any more", mend)


def test_a_compiled_model_holds_the_plain_one():
    model = nn.Linear(2, 2)
    plain = getattr(torch.compile(model, backend="eager"), "_orig_mod", None)
    expect(plain is model, "torch.compile keeps the model elsewhere than in _orig_mod", "tuner/hotswap.py")


# All of them ---------------------------------------------------------------------------------------------------------

OWN = {
    "_learning_rate",
    "_elp_faster",
    "_elp_pooled",
    "_elp_real_frames",
    "_elp_replaced",
    "_elp_version",
}  # set and read by ELP
DOCUMENTED = {"_asdict"}


def private_names() -> dict[str, str]:
    """The private names that the package uses and does not define, with a file that uses them."""
    used, defined = {}, set()
    for file in sorted(Path(peft_elp.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                defined.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.add(node.id)
            elif isinstance(node, ast.Attribute):
                if isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self":
                    defined.add(node.attr)
                used[node.attr] = file.name
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                used[node.value] = file.name  # of getattr() and vars()
    own = defined | OWN
    return {
        name: file for name, file in used.items() if name[:1] == "_" and name[1:2] not in ("_", "") and name not in own
    }


def test_every_private_name_of_another_library_has_a_test_here():
    tested = Path(__file__).read_text(encoding="utf-8")
    assert {name: file for name, file in private_names().items() if name not in tested} == {}
