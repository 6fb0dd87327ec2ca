"""ELP on backbones whose weights are not plain floating-point ones, and on backbones that another adapter changed."""

import copy

import pytest
import torch
from backbones import ELP, build, call, result, shaken, trained, waveforms
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForAudioClassification, BitsAndBytesConfig

from peft_elp import ELPConfig

FEED_FORWARD = ["intermediate_dense", "output_dense"]


class Int8Linear(nn.Module):
    """A linear layer without any floating-point parameter: the weight is a frozen int8 one, its scales a buffer."""

    def __init__(self, linear, dtype):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.abs().amax(dim=1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale.detach().to(dtype))
        self.register_buffer("bias", linear.bias.detach().to(dtype))

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def by_hand(model, dtype):
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Int8Linear(child, dtype))


def torchao_int8(model, dtype):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())


WAYS = [by_hand, torchao_int8]
# Widths that a 4-bit block of 64 values divides.
WIDE = {"hidden_size": 64, "intermediate_size": 64, "conv_dim": (64, 64), "num_conv_pos_embedding_groups": 4}


def quantised(way, dtype, head="ForCTC"):
    model = build("hubert", head, **WIDE).requires_grad_(False).to(dtype)
    way(model.base_model, dtype)
    return model


def values(parameter):
    tensor = parameter.detach()
    return (tensor.dequantize() if hasattr(tensor, "qdata") else tensor).clone()  # torchao's tensors do not compare


def step(model, dtype):
    """One training step; gives the names of the parameters that moved."""
    model.train()
    before = [(name, p, values(p)) for name, p in model.named_parameters()]
    waveform, mask = waveforms()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        result(model(waveform.to(dtype), attention_mask=mask)).float().square().mean().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return {name for name, p, start in before if not torch.equal(values(p), start)}


def answer(model, dtype=torch.float32):
    waveform, mask = waveforms()
    return result(call(model, input_values=waveform.to(dtype), attention_mask=mask))


quiet = pytest.mark.filterwarnings(
    "ignore:.*inputs will be cast from:UserWarning",  # bitsandbytes casts activations to half precision
    "ignore:.*torch.jit.script:DeprecationWarning",  # in an import of bitsandbytes
)


@quiet
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", ["Model", "ForCTC", "ForSequenceClassification"])
@pytest.mark.parametrize("way", WAYS)
def test_adapters_on_a_quantised_backbone_are_float32_train_and_are_saved(way, head, dtype, tmp_path):
    model = get_peft_model(quantised(way, dtype, head), ELPConfig(**ELP))
    own = trained(model)
    assert own
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if ".elp_" in name)
    shaken(model)
    assert step(model, dtype) == own
    expected = answer(model, dtype)
    assert expected.dtype == dtype
    with model.disable_adapter():
        off = answer(model, dtype)
    model.save_pretrained(tmp_path)
    base = model.unload()
    assert torch.equal(answer(base, dtype), off)
    assert torch.equal(answer(PeftModel.from_pretrained(base, tmp_path), dtype), expected)


@quiet
@pytest.mark.parametrize("way", WAYS)
def test_a_backbone_prepared_for_quantised_training_takes_adapters(way):
    base = quantised(way, torch.float32)
    base.is_loaded_in_8bit = True  # as Transformers marks it
    base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(base, ELPConfig(**ELP))
    assert step(model, torch.float32) == trained(model)


@quiet
@pytest.mark.parametrize("bits", [8, 4])
def test_what_transformers_quantises_while_loading_takes_adapters(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    build("hubert", "ForSequenceClassification", **WIDE).save_pretrained(tmp_path / "base")
    head = ["projector", "classifier"]

    def load():
        config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, llm_int8_skip_modules=head)
        base = AutoModelForAudioClassification.from_pretrained(
            tmp_path / "base", quantization_config=config, device_map="cpu", dtype=torch.float32
        )
        return prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})

    model = get_peft_model(load(), ELPConfig(**ELP))
    own = trained(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert step(model, torch.float32) == own
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(answer(PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()), answer(model))


@quiet
@pytest.mark.parametrize("way", WAYS)
def test_a_quantised_head_is_refused_with_the_way_out(way):
    model = build("hubert", "ForSequenceClassification", **WIDE)
    way(model, torch.float32)  # head and all
    with pytest.raises(
        ValueError, match=r"'projector.weight' is quantised.*llm_int8_skip_modules=\['projector', 'classifier'\]"
    ):
        get_peft_model(model, ELPConfig(**ELP))
    assert get_peft_model(model, ELPConfig(modules_to_save=[], **ELP)).peft_config["default"].l_output == "residual"


def test_adapters_train_on_a_backbone_that_lora_was_merged_into(tmp_path):
    lora = get_peft_model(build("wavlm", "ForCTC"), LoraConfig(target_modules=FEED_FORWARD, init_lora_weights=False))
    merged = lora.merge_and_unload().eval()
    expected, twin = answer(merged), copy.deepcopy(merged)
    model = shaken(get_peft_model(merged, ELPConfig(**ELP)))
    assert step(model, torch.float32) == trained(model)
    with model.disable_adapter():
        torch.testing.assert_close(answer(model), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(PeftModel.from_pretrained(twin, tmp_path)), answer(model))
