"""A saved adapter takes the place of a loaded one, in the same tensors, or leaves it as it is."""

import json

import pytest
import torch
from backbones import ELP, adapted, answer, build, result, waveforms
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_elp import ELPConfig, hotswap_adapter


def tensors(model):
    return {name: (id(x), x.data_ptr(), x.requires_grad) for name, x in model.named_parameters()}


def values(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def assert_refused(model, folder, *parts, match="cannot replace 'default', which was left as it is"):
    """The folder is refused with a message that holds the parts, and no tensor of the model is another."""
    before = values(model)
    with pytest.raises(ValueError, match=match) as error:
        hotswap_adapter(model, str(folder))
    for part in parts:
        assert part in str(error.value)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("adapters", ["ELP", "E", "L", "P"])
@pytest.mark.parametrize("head", ["ForCTC", "ForSequenceClassification"])
def test_a_swapped_adapter_answers_as_the_saved_one_did_from_the_same_tensors(adapters, head, tmp_path):
    model, other = (adapted(head, std=std, adapters=adapters) for std in (0.2, 0.5))
    other.save_pretrained(tmp_path)
    assert not torch.allclose(answer(model), answer(other), atol=1e-2)
    before = tensors(model)
    hotswap_adapter(model, str(tmp_path))
    assert torch.equal(answer(model), answer(other))
    assert tensors(model) == before


def test_training_goes_on_from_the_swapped_weights_with_the_same_optimizer(tmp_path):
    model, other = adapted(), adapted(std=0.5)
    other.save_pretrained(tmp_path)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    hotswap_adapter(model, str(tmp_path))
    start = values(model)
    result(model(waveforms()[0])).square().mean().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.detach(), start[name] - 0.1 * parameter.grad)


def test_only_the_named_adapter_changes(tmp_path):
    model, other = adapted(), adapted(std=0.5)
    other.save_pretrained(tmp_path)
    model.add_adapter("second", ELPConfig(**ELP))
    before, first = values(model), answer(model)
    hotswap_adapter(model, str(tmp_path), adapter_name="second")
    for name, x in model.state_dict().items():
        assert ".second." in name or torch.equal(x, before[name]), name
    assert torch.equal(answer(model), first)
    model.set_adapter("second")
    assert torch.equal(answer(model), answer(other))
    model.save_pretrained(tmp_path / "again", selected_adapters=["second"])
    again = PeftModel.from_pretrained(build("wavlm"), tmp_path / "again" / "second", is_trainable=True)
    assert torch.equal(answer(again.eval()), answer(other))


def test_an_adapter_in_a_subfolder_or_saved_in_half_precision_swaps(tmp_path):
    model, other = adapted(), adapted(std=0.5)
    other.save_pretrained(tmp_path / "inside")
    file = tmp_path / "inside" / "adapter_model.safetensors"
    save_file({name: x.half() for name, x in load_file(file).items()}, file)
    hotswap_adapter(model, str(tmp_path), subfolder="inside")
    assert all(p.dtype == torch.float32 for p in model.parameters())
    torch.testing.assert_close(answer(model), answer(other), atol=1e-2, rtol=1e-2)


E_OR_L = {"adapters": "EL", "train_layer_norms": False}
REFUSED = [
    ({}, {"e_dim": 4}, "e_dim is 4, here 8; 6 of another shape (.*down.weight (4, 24) in place of (8, 24)"),
    (
        {},
        {"adapters": "EL"},
        "adapters is 'EL', here 'ELP'; 1 missing (base_model.model.wavlm.encoder.elp_p.rows (3, 24))",
    ),
    ({}, {"e_layers": [1, 2]}, "e_layers is [1, 2], here [0, 1]; 6 missing (.*down.bias (8,).* and 2 more); 6 left"),
    ({}, {"base": {"vocab_size": 7}}, "lm_head.bias (7,) in place of (9,), .*lm_head.weight (7, 10) in place of (9,"),
    # The same names and shapes, and another computation:
    ({}, {"e_activation": "relu"}, "e_activation is 'relu', here 'gelu'. Load it as a further adapter: "),
    ({}, {"p_position": "prepend"}, "p_position is 'prepend', here 'append'"),
    (
        {"head": "ForSequenceClassification", "head_config": {"id2label": {0: "no", 1: "yes"}}},
        {"head": "ForSequenceClassification", "head_config": {"id2label": {0: "yes", 1: "no"}}},
        "head_config is {",
    ),
    (
        E_OR_L | {"l_layers": [0, 1]},
        E_OR_L | {"l_layers": [1, 2], "e_layers": [0, 1]},
        "l_layers is [1, 2], here [0, 1]. Load",
    ),
    (
        E_OR_L | {"l_output": "project"},
        E_OR_L | {"l_output": "residual"},
        "l_output is 'residual', here 'project'. Load",
    ),
    (E_OR_L, {"train_layer_norms": False}, "1 left over (base_model.model.wavlm.encoder.elp_p.rows (3, 24)). Load"),
]


@pytest.mark.parametrize(("here", "there", "message"), REFUSED)
def test_an_adapter_that_does_not_fit_or_computes_otherwise_is_refused(here, there, message, tmp_path):
    adapted(std=0.5, **there).save_pretrained(tmp_path)
    assert_refused(adapted(**here), tmp_path, *message.split(".*"))


def test_a_file_that_lacks_a_tensor_is_refused(tmp_path):
    adapted(std=0.5).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    saved = load_file(file)
    del saved["base_model.model.lm_head.bias"]
    save_file(saved, file)
    assert_refused(adapted(), tmp_path, match=r"1 missing \(base_model.model.lm_head.bias \(9,\)\)\. Load it as")


def test_dropout_and_the_start_of_training_may_differ_and_stay_those_of_the_loaded_one(tmp_path):
    adapted(std=0.5, e_dropout=0.5, init_std=0.1, p_init_std=0.3).save_pretrained(tmp_path)
    model = adapted()
    hotswap_adapter(model, str(tmp_path))
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["e_dropout"] == 0.0


def test_what_is_no_elp_adapter_is_named(tmp_path):
    model = adapted()
    with pytest.raises(ValueError, match=r"There is no adapter 'other'; the model has 'default'"):
        hotswap_adapter(model, str(tmp_path), adapter_name="other")
    with pytest.raises(ValueError, match=r"There is no adapter 'default'; the model has none"):
        hotswap_adapter(build("wavlm"), str(tmp_path))
    get_peft_model(build("wavlm"), LoraConfig(target_modules=["output_dense"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds an adapter of LORA, which cannot replace the ELP-adapter"):
        hotswap_adapter(model, str(tmp_path))
