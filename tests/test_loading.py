"""What does not fit is refused with names and shapes, and the model stays as it was."""

import json
import shutil
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from backbones import ELP, adapted, answer, build
from families import FAMILIES
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from transformers import WhisperForConditionalGeneration
from untouched import assert_untouched, snapshot

from peft_elp import ELPConfig, hotswap_adapter

E = "base_model.model.wavlm.encoder.layers.0.feed_forward.elp_e.down.weight"
HEAD = "base_model.model.lm_head.bias"


@pytest.fixture
def changed(saved, tmp_path):
    """Copies the folder of a trained adapter, and changes its tensors or its configuration."""

    def copy(change=None, head="ForCTC", **settings):
        folder = shutil.copytree(saved(head).adapter, tmp_path / "changed", dirs_exist_ok=True)
        weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
        if change is not None:
            tensors = load_file(weights)
            change(tensors)
            save_file(tensors, weights, metadata={"format": "pt"})
        config.write_text(json.dumps(json.loads(config.read_text()) | settings))
        return folder

    return copy


def more(name):
    return lambda tensors: tensors.update({name: torch.ones(2)})


def with_value(name, value):
    return lambda tensors: tensors[name].view(-1)[:1].fill_(value)


def with_dtype(dtype):
    return lambda tensors: tensors.update({E: tensors[E].to(dtype)})


MISFITS = {
    "E is missing": (lambda tensors: tensors.pop(E), r"1 missing \(.*elp_e\.(\w+\.)?down\.weight \(8, 24\)\)"),
    "the head is missing": (lambda tensors: tensors.pop(HEAD), r"1 missing \(.*lm_head.*bias \(9,\)\)"),
    "E of another layer": (more(E.replace("s.0", "s.7")), r"1 left over \(.*layers\.7.*\(2,\)\)"),
    "E is narrow": (
        lambda tensors: tensors.update({E: torch.ones(4, 24)}),
        r"1 of another shape \(.*down\.weight \(4, 24\) in place of \(8, 24\)\)",
    ),
    "E is not a number": (with_value(E, float("nan")), r"1 not finite or too large \(.*down\.weight\)"),
    "E is huge": (with_value(E, 3e38), r"1 not finite or too large \(.*down\.weight\)"),
    "the head is infinite": (with_value(HEAD, float("inf")), r"1 not finite or too large \(.*lm_head.*bias\)"),
    "the backbone's": (more("base_model.model.wavlm.feature_projection.projection.weight"), "1 left over"),
    "the backbone's, without prefix": (more("wavlm.feature_projection.projection.weight"), "1 left over"),
    "a wrapped module's": (more("base_model.model.wavlm.encoder.base_layer.layer_norm.weight"), "1 left over"),
    "the original head's": (more("base_model.model.lm_head.original_module.weight"), "1 left over"),
    "first's head": (more("base_model.model.lm_head.modules_to_save.first.weight"), "1 left over"),
    "first's": (more("base_model.model.wavlm.encoder.elp_p.first.rows"), "1 left over"),
    **{
        f"E in {dtype}": (with_dtype(dtype), r"of a wrong dtype|float64, float32, float16 or bfloat16")
        for dtype in (torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn)
    },
    "E beyond float32": (
        lambda tensors: tensors.update({E: torch.full((8, 24), 1e300, dtype=torch.float64)}),
        r"1 not finite or too large \(.*down\.weight\)",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_tensors_that_are_not_the_adapters_are_refused_by_every_door(name, changed):
    change, message = MISFITS[name]
    folder, base = changed(change), build()
    before = snapshot(base)
    with pytest.raises(ValueError, match=message) as error:
        PeftModel.from_pretrained(base, folder)
    assert len(str(error.value)) < 700
    assert_untouched(base, before)
    assert not hasattr(base, "peft_config")

    model = get_peft_model(base, ELPConfig(**ELP), adapter_name="first")
    before, expected = snapshot(model), answer(model)
    for is_trainable in (False, True):
        with pytest.raises(ValueError, match=message):
            model.load_adapter(folder, "second", is_trainable=is_trainable)
    with pytest.raises(ValueError, match=r"cannot replace 'first'|float64, float32, float16 or bfloat16"):
        hotswap_adapter(model, str(folder), adapter_name="first")
    if "first" not in name:  # PEFT leaves out what another name stands in
        with pytest.raises((ValueError, KeyError), match=r"Nothing was loaded|lm_head.bias"):
            set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"), adapter_name="first")
    assert list(model.peft_config) == model.active_adapters == ["first"]
    assert_untouched(model, before)
    assert torch.equal(answer(model), expected)
    model.load_adapter(changed(), "second")  # the name is free


@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, 3e38), (torch.bfloat16, 1e30)])
def test_values_that_overflow_in_a_model_of_half_precision_are_refused(dtype, value, changed):
    folder = changed(lambda tensors: tensors.update({HEAD: torch.full((9,), value, dtype=dtype)}))
    base = build().half()
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"1 not finite or too large \("):
        PeftModel.from_pretrained(base, folder)
    assert_untouched(base, before)


def test_double_precision_is_loaded_if_it_fits(saved, changed):
    assert torch.equal(answer(PeftModel.from_pretrained(build(), changed(with_dtype(torch.float64)))), saved().logits)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (lambda: build(hidden_size=16), r"of another shape \(.*\(10, 24\) in place of \(10, 16\)"),
        (lambda: build(num_hidden_layers=2), r"names 2, and WavLMForCTC has 2 layers"),
        (lambda: build("hubert"), r"missing \(.*hubert.*left over \(.*wavlm"),
        (lambda: build("wavlm", "ForSequenceClassification"), r"has no such module"),
    ],
)
def test_an_adapter_of_another_backbone_is_refused(base, message, saved):
    base = base()
    before = snapshot(base)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, saved().adapter)
    assert_untouched(base, before)


def test_a_deeper_backbone_has_a_place_for_each_layer_that_the_adapter_names(saved):
    PeftModel.from_pretrained(build(num_hidden_layers=4), saved().adapter)


HUGE: list[tuple[dict[str, Any], str]] = [
    ({"e_dim": 5}, r"of another shape \(.*\(8, 24\) in place of \(5, 24"),
    ({"e_dim": 16_000}, r"of another shape \(.*elp_e.*in place of \(16000"),
    ({"l_dim": 16_000}, r"of another shape \(.*elp_l.*in place of \(16000"),
    ({"p_length": 16_000}, r"of another shape \(.*elp_p.*in place of \(16000"),
    ({"head_config": {"vocab_size": 1_000_000}}, r"of another shape \(.*lm_head.*in place of \(1000000"),
    ({"head_config": {"vocab_size": 10**9}}, r"vocab_size"),
    ({"e_layers": list(range(10**6))}, r"e_layers names 3, 4"),
    ({"modules_to_save": ["x" * 10**6]}, r"modules_to_save names"),
    ({"head_config": {str(i): 1 for i in range(10**6)}}, r"head_config"),
    ({"target": "x" * 10**6}, r"target="),
]


@pytest.mark.parametrize(("settings", "message"), HUGE, ids=[str(settings)[:30] for settings, _ in HUGE])
def test_settings_without_sense_are_refused_before_memory_is_allocated(settings, message, changed):
    folder, base = changed(**settings), build()
    before = snapshot(base)
    largest = 0

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            made = function(*args, **kwargs or {})
            if isinstance(made, torch.Tensor) and not made.is_meta:
                largest = max(largest, made.numel())
            return made

    with Watch(), pytest.raises(ValueError, match=message) as error:
        PeftModel.from_pretrained(base, folder)
    assert len(str(error.value)) < 1500
    assert largest < 10**6
    assert_untouched(base, before)


def test_the_weights_are_read_once(saved, monkeypatch):
    read = []
    for module, name in ((peft.utils.save_and_load, "safe_load_file"), (safetensors.torch, "load_file")):
        load = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, load=load, **kwargs: read.append(args) or load(*args, **kwargs)
        )
    PeftModel.from_pretrained(build(), saved().adapter)
    assert len(read) == 1


def test_an_adapter_may_be_started_from_the_configuration_of_a_saved_one(saved):
    config = ELPConfig.from_pretrained(saved().adapter)
    config.inference_mode, config.e_dim = False, 30
    model = get_peft_model(saved().load_base(), config)
    expected = answer(model)
    assert model.get_base_model().wavlm.encoder.layers[0].feed_forward.elp_e["default"].down.out_features == 30
    with pytest.raises(ValueError, match="Nothing was loaded"):
        set_peft_model_state_dict(model, get_peft_model_state_dict(adapted()))
    assert torch.equal(answer(model), expected)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_the_embeddings_of_a_resized_vocabulary_are_saved_if_they_are_trained(trained, tmp_path):
    FAMILIES["whisper"].model().save_pretrained(tmp_path / "base")
    base = WhisperForConditionalGeneration.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(34)
    config = ELPConfig(adapters="E", e_dim=4, modules_to_save=["proj_out"] if trained else None)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert ("base_model.model.proj_out.weight" in names) == trained
    assert not any("embed_tokens" in name for name in names)
    again = WhisperForConditionalGeneration.from_pretrained(tmp_path / "base")
    again.resize_token_embeddings(34)
    PeftModel.from_pretrained(again, tmp_path / "adapter")
