"""Compiled models against plain ones: `python -m pytest -o addopts= tests/compiled.py`, run by test_compile.py.

In a process of its own, since the axes of tensors are checked while tests run, which the compiler cannot trace. Most
models are traced without code generation.
"""

import functools
import shutil

import pytest
import torch
from backbones import ELP, build, result, shaken, waveforms
from families import FAMILIES, cases
from peft import LoraConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from peft_elp import ELPConfig, hotswap_adapter

WAVE = ["wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat", "data2vec-audio"]
FIRST = ["wavlm", "wav2vec2-bert", "whisper-classification"]
REST = [*(name for name in WAVE if name not in FIRST), *cases(FAMILIES.keys() - FIRST)]


@pytest.fixture(autouse=True)
def afresh():
    torch.compiler.reset()


@functools.cache
def peft_compiles_into_one_graph():
    """Whether PEFT's own wrapper does, which older versions of PyTorch cannot trace."""
    model = get_peft_model(build("wav2vec2"), LoraConfig(target_modules=["output_dense"])).eval()
    try:
        output(torch.compile(model, backend="eager", fullgraph=True), {"input_values": waveforms()[0]})
    except torch._dynamo.exc.Unsupported:
        assert torch.__version__.startswith("2.6"), "newer versions can"
        return False
    finally:
        torch.compiler.reset()
    return True


@pytest.fixture
def one_graph():
    if not peft_compiles_into_one_graph():
        pytest.skip("this PyTorch cannot trace PEFT's wrapper, LoRA's neither")


def base_of(name):
    return build(name, num_hidden_layers=2) if name in WAVE else FAMILIES[name].shallow()


def inputs_of(name, padded=True, lengths=(2000, 1300, 900)):
    if name not in WAVE:
        return {k: x for k, x in FAMILIES[name].inputs.items() if padded or k != "attention_mask"}
    waveform, mask = waveforms(lengths)
    return {"input_values": waveform, "attention_mask": mask} if padded else {"input_values": waveform}


def adapted(name, adapters=None, std=0.2, **options):
    family = FAMILIES.get(name)
    letters, more = (family.adapters, family.options) if family else ("ELP", {})
    return shaken(get_peft_model(base_of(name), ELPConfig(adapters=adapters or letters, **ELP | more | options)), std)


def output(model, inputs):
    with torch.no_grad():
        return result(model(**inputs))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def traced(model, **options):
    return torch.compile(model, backend="eager", fullgraph=True, **options)


@pytest.mark.parametrize(
    ("adapters", "padded"), [("ELP", True), ("EL", True), ("E", True), ("L", True), ("P", True), ("ELP", False)]
)
def test_every_choice_of_letters_compiles_into_one_graph(adapters, padded, one_graph):
    inputs, model = inputs_of("wav2vec2", padded), adapted("wav2vec2", adapters)
    close(output(traced(model), inputs), output(model, inputs))


@pytest.mark.parametrize("name", FIRST)
def test_families_compile_into_one_graph(name, one_graph):
    inputs, model = inputs_of(name), adapted(name)
    close(output(traced(model), inputs), output(model, inputs))


@pytest.mark.slow
@pytest.mark.parametrize("name", REST)
def test_a_family_compiles_into_one_graph_where_the_backbone_alone_does(name, one_graph):
    inputs, model = inputs_of(name), adapted(name)
    expected = output(model, inputs)
    try:
        got = output(traced(model), inputs)
    except Exception as error:
        torch.compiler.reset()
        with pytest.raises(type(error)):
            output(traced(base_of(name)), inputs)
        pytest.skip("Transformers' own code does not")
    close(got, expected)


@pytest.mark.parametrize("name", ["wav2vec2", "whisper-classification"])
@pytest.mark.parametrize("adapters", ["EL", "P"])
def test_layers_compile_one_by_one(name, adapters):
    inputs, model = inputs_of(name), adapted(name, adapters, modules_to_save=[])
    expected = output(model, inputs)
    base = model.get_base_model()
    for layer in (base.wav2vec2.encoder if name == "wav2vec2" else base.encoder).encoder_layers:
        layer.compile(backend="eager")
    close(output(model, inputs), expected)


@pytest.mark.slow
def test_a_graph_that_breaks_gives_the_same():
    class Breaking(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, *args, **kwargs):
            torch._dynamo.graph_break()
            return self.layer(*args, **kwargs)

    inputs, model = inputs_of("wav2vec2"), adapted("wav2vec2", "LP")
    expected = output(model, inputs)
    layers = model.get_base_model().wav2vec2.encoder.encoder_layers
    layers[1].base_layer = Breaking(layers[1].base_layer)
    close(output(torch.compile(model, backend="eager"), inputs), expected)


def test_hidden_states_hold_no_pseudo_features(one_graph):
    inputs, model = inputs_of("wav2vec2"), adapted("wav2vec2")
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True).hidden_states
        got = traced(model)(**inputs, output_hidden_states=True).hidden_states
    for actual, states in zip(got, expected, strict=True):
        close(actual, states)


def test_training_gets_the_same_gradients(one_graph):
    inputs, model = inputs_of("wavlm"), adapted("wavlm").train()
    found = []
    for runs in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        result(runs(**inputs)).square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        model.zero_grad()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["wavlm", "wav2vec2"])
def test_a_model_that_reports_its_layers_trains_in_one_graph_after_its_first_call(name, one_graph):
    """In the first call Transformers installs hooks, which break the graph with and without adapters."""
    torch.manual_seed(0)
    base = build(name, "ForSequenceClassification")
    model = get_peft_model(base, ELPConfig(**ELP)).train()
    waveform, mask = waveforms()
    with torch.no_grad():
        model(waveform, attention_mask=mask)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(waveform, attention_mask=mask, labels=torch.arange(len(mask))).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("padded", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_other_lengths_and_batch_sizes_need_no_other_graph(padded, one_graph):
    model, counter = adapted("wav2vec2"), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for lengths in ((2000, 1300, 900), (1501, 1000), (3333, 2000, 1999, 900)):
        inputs = inputs_of("wav2vec2", padded, lengths)
        close(output(compiled, inputs), output(model, inputs))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wavlm", "wav2vec2-bert"])
def test_other_lengths_need_as_many_graphs_as_without_adapters(name, one_graph):
    wave = "input_values" in inputs_of(name)
    counts = []
    for model in (base_of(name), adapted(name)):
        torch.compiler.reset()
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
        for shorter in (0, 200, 600) if wave else (0, 1, 6):
            cut = {k: x[:, : x.shape[1] - shorter].contiguous() for k, x in inputs_of(name).items()}
            close(output(compiled, cut), output(model, cut))
        counts.append(counter.frame_count)
    assert counts[1] == counts[0]


@pytest.mark.parametrize("name", ["wavlm", "whisper-classification"])
def test_a_hot_swapped_adapter_runs_in_the_same_graph(name, tmp_path, one_graph):
    inputs = inputs_of(name)
    model, other, third = (adapted(name, std=std) for std in (0.2, 0.4, 0.6))
    other.save_pretrained(tmp_path / "other")
    third.save_pretrained(tmp_path / "third")
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    before = output(compiled, inputs)
    assert not torch.allclose(before, output(other, inputs), atol=1e-2)
    hotswap_adapter(compiled, str(tmp_path / "other"))
    close(output(compiled, inputs), output(other, inputs))
    hotswap_adapter(model, str(tmp_path / "third"))
    close(output(compiled, inputs), output(third, inputs))
    # PEFT's own, which does not check that the adapters compute alike.
    set_peft_model_state_dict(model, load_peft_weights(str(tmp_path / "other"), device="cpu"))
    close(output(compiled, inputs), output(other, inputs))
    assert counter.frame_count == 1


def test_a_compiled_model_follows_what_is_activated(one_graph):
    inputs, model = inputs_of("wav2vec2"), adapted("wav2vec2")
    compiled, first = traced(model), output(model, inputs)
    close(output(compiled, inputs), first)
    model.add_adapter("second", ELPConfig(**ELP | {"p_length": 5, "p_position": "prepend"}))
    model.set_adapter("second")
    shaken(model, std=0.5)
    assert not torch.allclose(output(model, inputs), first, atol=1e-2)
    close(output(compiled, inputs), output(model, inputs))
    with model.disable_adapter():
        close(output(compiled, inputs), output(model, inputs))
    model.set_adapter("default")
    close(output(compiled, inputs), first)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="inductor needs a C++ compiler")
def test_generated_code_gives_the_same_over_lengths_and_hot_swaps(tmp_path, one_graph):
    model, other = adapted("wav2vec2"), adapted("wav2vec2", std=0.4)
    other.save_pretrained(tmp_path)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for lengths in ((2000, 1300, 900), (1501, 1000)):
        inputs = inputs_of("wav2vec2", True, lengths)
        torch.testing.assert_close(output(compiled, inputs), output(model, inputs), atol=1e-4, rtol=1e-4)
        counts.append(counter.frame_count)
    hotswap_adapter(compiled, str(tmp_path))
    torch.testing.assert_close(output(compiled, inputs), output(other, inputs), atol=1e-4, rtol=1e-4)
    assert [*counts, counter.frame_count] == [counts[0]] * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("adapters", ["E", "L", "P", "ELP"])
def test_a_compiled_training_step_on_a_gpu_gives_the_same_gradients(adapters):
    # In training mode, Transformers draws a random number for each layer, which a full graph cannot hold.
    model = adapted("wav2vec2", adapters, std=0.05).cuda().eval()
    inputs = {name: x.cuda() for name, x in inputs_of("wav2vec2").items()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        model(**inputs)
    found = []
    for runs in (model, torch.compile(model, fullgraph=True)):
        result(runs(**inputs)).square().sum().backward()
        found.append({name: p.grad for name, p in trained.items()})
        model.zero_grad()
    for name in trained:
        torch.testing.assert_close(found[1][name], found[0][name], atol=1e-3, rtol=1e-2)
