"""Compiled and exported models against plain ones: `python -m pytest -o addopts= tests/compiled.py`.

Run by test_compile.py in a process of its own, since the axes of tensors are checked while tests run, which the
compiler cannot trace and an export would fix. Most models are traced without code generation.
"""

import shutil

import pytest
import torch
import transformers
from backbones import ELP, adapted, answer, call, shaken, waveforms
from families import FAMILIES, cases
from packaging.version import Version
from peft import get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export

from peft_elp import ELPConfig, hotswap_adapter

EXAMPLE = (2000, 1300, 900)
LENGTHS = ((1500, 1000), (3333, 2000, 1700, 900), (777, 500))
OLD = torch.__version__.startswith("2.6")


@pytest.fixture(autouse=True)
def afresh():
    torch.compiler.reset()


@pytest.fixture
def one_graph():
    if OLD:
        pytest.skip("PyTorch 2.6 cannot trace PEFT's wrapper, LoRA's neither")


def wave(lengths=EXAMPLE, padded=True):
    waveform, mask = waveforms(lengths)
    return {"input_values": waveform, "attention_mask": mask} if padded else {"input_values": waveform}


def small(family="wav2vec2", head="ForCTC", **options):
    """A model with two layers, and an adapter that does something."""
    return adapted(head, family, {"num_hidden_layers": 2}, **options)


def of_family(name, **options):
    """The same for any family."""
    return shaken(get_peft_model(FAMILIES[name].shallow(), FAMILIES[name].config(**options)))


def close(actual, expected, **options):
    torch.testing.assert_close(actual, expected, **{"atol": 1e-5, "rtol": 1e-5} | options)


def traced(model, **options):
    return torch.compile(model, **{"backend": "eager", "fullgraph": True} | options)


def as_the_backbone_alone(run, name):
    """What a function gives for an adapted model; the test is skipped where Transformers' own code does not."""
    model = of_family(name)
    expected = answer(model, **FAMILIES[name].inputs)  # first: some backbones keep tensors for the next call
    try:
        got = run(model)
    except Exception as error:
        torch.compiler.reset()
        with pytest.raises(type(error)):
            run(FAMILIES[name].shallow())
        pytest.skip("Transformers' own code does not")
    close(got, expected)


# Compiled -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("letters", "padded"), [("ELP", True), ("EL", True), ("E", True), ("L", True), ("P", True), ("ELP", False)]
)
def test_every_choice_of_letters_compiles_into_one_graph(letters, padded, one_graph):
    inputs, model = wave(padded=padded), small(adapters=letters)
    close(answer(traced(model), **inputs), answer(model, **inputs))


@pytest.mark.parametrize("name", cases())
def test_a_family_compiles_into_one_graph_where_the_backbone_alone_does(name, one_graph):
    as_the_backbone_alone(lambda model: answer(traced(model), **FAMILIES[name].inputs), name)


@pytest.mark.parametrize("letters", ["EL", "P"])
@pytest.mark.parametrize("name", ["wav2vec2", "whisper-classification"])
def test_layers_compile_one_by_one(name, letters):
    inputs, model = FAMILIES[name].inputs, of_family(name, adapters=letters, modules_to_save=[])
    expected = answer(model, **inputs)
    base = model.get_base_model()
    for layer in (base.wav2vec2.encoder if name == "wav2vec2" else base.encoder).encoder_layers:
        layer.compile(backend="eager")
    close(answer(model, **inputs), expected)


def test_a_graph_that_breaks_gives_the_same():
    class Breaking(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, *args, **kwargs):
            torch._dynamo.graph_break()
            return self.layer(*args, **kwargs)

    model = small(adapters="LP")
    expected = answer(model)
    layers = model.get_base_model().wav2vec2.encoder.encoder_layers
    layers[1].base_layer = Breaking(layers[1].base_layer)
    close(answer(traced(model, fullgraph=False)), expected)


ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(
    ("family", "letters", "device"),
    [
        ("wavlm", "ELP", "cpu"),
        ("wav2vec2", "ELP", "cpu"),
        *(pytest.param("wav2vec2", letters, "cuda", marks=ON_GPU) for letters in ("E", "L", "P", "ELP")),
    ],
)
def test_training_gets_the_same_gradients_from_one_graph(family, letters, device, one_graph):
    model, found = small(family, "ForSequenceClassification", adapters=letters, std=0.05).to(device), []
    inputs = {name: x.to(device) for name, x in wave().items()}
    answer(model, **inputs)  # In the first call Transformers installs hooks, which break the graph.
    # On a GPU in evaluation: in training, Transformers draws a random number for each layer, on the CPU.
    run = traced(model.train(), backend="aot_eager") if device == "cpu" else torch.compile(model, fullgraph=True)
    for runs in (model, run):
        runs(**inputs, labels=torch.arange(3, device=device)).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        model.zero_grad()
    for name, gradient in found[0].items():
        close(found[1][name], gradient, msg=name, **({} if device == "cpu" else {"atol": 1e-3, "rtol": 1e-2}))


@pytest.mark.parametrize("padded", [True, False])
def test_other_lengths_and_batch_sizes_need_no_other_graph(padded, one_graph):
    model, counter = small(), CompileCounterWithBackend("eager")
    compiled = traced(model, backend=counter, dynamic=True)
    for lengths in (EXAMPLE, *LENGTHS):
        inputs = wave(lengths, padded)
        close(answer(compiled, **inputs), answer(model, **inputs))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["wavlm", "whisper-classification"])
def test_a_hot_swapped_adapter_runs_in_the_same_graph(name, tmp_path, one_graph):
    inputs = FAMILIES[name].inputs
    model, other = (shaken(of_family(name), std) for std in (0.2, 0.4))
    other.save_pretrained(tmp_path)
    counter = CompileCounterWithBackend("eager")
    compiled = traced(model, backend=counter)
    assert not torch.allclose(answer(compiled, **inputs), answer(other, **inputs), atol=1e-2)
    hotswap_adapter(compiled, str(tmp_path))
    close(answer(compiled, **inputs), answer(other, **inputs))
    assert counter.frame_count == 1


def test_a_compiled_model_follows_what_is_activated(one_graph):
    model = small()
    compiled, first = traced(model), answer(model)
    close(answer(compiled), first)
    model.add_adapter("second", ELPConfig(**ELP | {"p_length": 5, "p_position": "prepend"}))
    model.set_adapter("second")
    shaken(model, std=0.5)
    assert not torch.allclose(answer(model), first, atol=1e-2)
    close(answer(compiled), answer(model))
    with model.disable_adapter():
        close(answer(compiled), answer(model))
    model.set_adapter("default")
    close(answer(compiled), first)


@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="inductor needs a C++ compiler")
def test_generated_code_gives_the_same_over_lengths_and_hot_swaps(tmp_path, one_graph):
    model, other = small(), small(std=0.4)
    other.save_pretrained(tmp_path)
    counter = CompileCounterWithBackend("inductor")
    compiled = traced(model, backend=counter, dynamic=True)
    counts = []
    for lengths in (EXAMPLE, (1501, 1000)):
        close(answer(compiled, **wave(lengths)), answer(model, **wave(lengths)), atol=1e-4, rtol=1e-4)
        counts.append(counter.frame_count)
    hotswap_adapter(compiled, str(tmp_path))
    inputs = wave((1501, 1000))
    close(answer(compiled, **inputs), answer(other, **inputs), atol=1e-4, rtol=1e-4)
    assert [*counts, counter.frame_count] == [counts[0]] * 3


# Exported -----------------------------------------------------------------------------------------------------------

MODELS = pytest.mark.parametrize(
    ("family", "head", "padded"),
    [
        ("wav2vec2", "ForCTC", True),
        ("wavlm", "ForSequenceClassification", False),
        ("wavlm", "ForCTC", True),
        ("hubert", "ForSequenceClassification", True),
    ],
)


def exported(model, inputs, strict=False):
    with torch.no_grad():
        free = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in inputs}
        return export(model, (), inputs, dynamic_shapes=free, strict=strict)


@MODELS
def test_an_exported_model_takes_any_length_and_batch_size(family, head, padded, tmp_path):
    model = small(family, head).get_base_model()
    torch.export.save(exported(model, wave(padded=padded)), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for lengths in (EXAMPLE, *LENGTHS):
        inputs = wave(lengths, padded)
        close(answer(program, **inputs), answer(model, **inputs))


@pytest.mark.skipif(OLD, reason="this PyTorch cannot trace the backbone alone either")
def test_a_strict_export_gives_the_same():
    model = small().get_base_model()
    program = exported(model, wave(), strict=True).module()
    for lengths in LENGTHS:
        close(answer(program, **wave(lengths)), answer(model, **wave(lengths)))


@pytest.mark.parametrize("how", ["compiled", "exported"])
def test_hidden_states_hold_no_pseudo_features(how):
    model, inputs = small().get_base_model(), wave()
    model.config.output_hidden_states = True
    expected = call(model, **inputs).hidden_states  # first: Transformers installs hooks in the first call
    run = traced(model) if how == "compiled" else exported(model, inputs).module()
    states = call(run, **inputs).hidden_states
    for actual, state in zip(states, expected, strict=True):
        close(actual, state)


@pytest.mark.parametrize("name", cases())
def test_a_family_exports_where_the_backbone_alone_does(name):
    inputs = FAMILIES[name].inputs

    def run(model):
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        if getattr(model, "can_generate", bool)():
            model.config.use_cache = False  # a cache is no output that can be exported
        with torch.no_grad():
            return answer(export(model, (), inputs, strict=False).module(), **inputs)

    as_the_backbone_alone(run, name)


def as_onnx(model, inputs, file, **options):
    """The logits of a model that was exported to ONNX, as a function of its inputs."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with torch.no_grad():
        names = {"input_names": list(inputs), "output_names": ["logits"]}
        torch.onnx.export(model, (), file, kwargs=inputs, dynamo=True, verbose=False, **names, **options)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda **inputs: torch.from_numpy(
        session.run(["logits"], {name: x.numpy() for name, x in inputs.items()})[0]
    )


@MODELS
def test_onnx_runtime_gives_the_same_for_any_length_and_batch_size(family, head, padded, tmp_path):
    model, inputs = small(family, head).get_base_model(), wave(padded=padded)
    free = {name: {0: "batch", 1: "samples"} for name in inputs}
    run = as_onnx(model, inputs, tmp_path / "model.onnx", dynamic_shapes=free, opset_version=18)
    for lengths in (EXAMPLE, *LENGTHS, (1234,)):
        inputs = wave(lengths, padded)
        close(run(**inputs), answer(model, **inputs), atol=1e-4, rtol=1e-4)


# Own frames ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.20"), reason="older heads drop the mask")
@pytest.mark.parametrize("how", ["compiled", "exported", "onnx"])
@pytest.mark.parametrize("letters", ["L", "ELP"])
def test_a_mean_over_own_frames_stays_one(letters, how, tmp_path):
    model = of_family("whisper-classification", adapters=letters, train_layer_norms=letters != "L").get_base_model()
    features = FAMILIES["whisper-classification"].inputs["input_features"]
    batch, _, steps = features.shape
    masks = [(torch.arange(steps) < torch.tensor(own)[:, None]).long() for own in ([steps] * batch, [8] * batch)]
    inputs, other = ({"input_features": features, "attention_mask": mask} for mask in masks)
    expected = answer(model, **other)
    assert not torch.allclose(expected, answer(model, **inputs), atol=1e-4)
    if how == "compiled":
        run = traced(model)
        answer(run, **inputs)
        close(answer(run, **other), expected)
    elif how == "exported":
        with torch.no_grad():
            close(answer(export(model, (), inputs, strict=False).module(), **other), expected)
    else:
        run = as_onnx(model, inputs, tmp_path / "model.onnx")
        close(run(**other), expected, atol=1e-4, rtol=1e-4)
