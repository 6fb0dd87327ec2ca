"""Exported models against plain ones: `python -m pytest -o addopts= tests/exported.py`, run by test_compile.py.

In a process of its own, since the axes of tensors are checked while tests run, which would fix them in the export.
"""

import functools
import re
import threading
from pathlib import Path

import pytest
import torch
from backbones import ELP, build, result, shaken, waveforms
from families import FAMILIES, cases
from peft import get_peft_model
from torch.export import Dim, export

import peft_elp
from peft_elp import ELPConfig

EXAMPLE = (2000, 1300, 900)
LENGTHS = ((1500, 1000), (3333, 2000, 1700, 900), (777, 500))


def small(name, head="ForCTC"):
    return build(name, head, num_hidden_layers=2)


def adapted(model, adapters="ELP", **options):
    return shaken(get_peft_model(model, ELPConfig(adapters=adapters, **ELP | options))).get_base_model()


def wave(lengths, padded=True):
    waveform, mask = waveforms(lengths)
    return {"input_values": waveform, "attention_mask": mask} if padded else {"input_values": waveform}


def output(model, inputs):
    with torch.no_grad():
        return result(model(**inputs))


def exported(model, inputs, strict=False):
    with torch.no_grad():
        free = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in inputs}
        return export(model, (), inputs, dynamic_shapes=free, strict=strict)


SLOW = {"marks": pytest.mark.slow}
MODELS = pytest.mark.parametrize(
    ("name", "head", "padded"),
    [
        ("wav2vec2", "ForCTC", True),
        pytest.param("wavlm", "ForSequenceClassification", False, **SLOW),
        pytest.param("wavlm", "ForCTC", True, **SLOW),
        pytest.param("hubert", "ForSequenceClassification", True, **SLOW),
    ],
)


@MODELS
def test_an_exported_model_takes_any_length_and_batch_size(name, head, padded, tmp_path):
    model = adapted(small(name, head))
    torch.export.save(exported(model, wave(EXAMPLE, padded)), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for lengths in (EXAMPLE, *LENGTHS):
        inputs = wave(lengths, padded)
        torch.testing.assert_close(output(program, inputs), output(model, inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_strict_export_gives_the_same():
    if torch.__version__.startswith("2.6"):
        pytest.skip("this PyTorch cannot trace the backbone alone either")
    model = adapted(small("wav2vec2"))
    program = exported(model, wave(EXAMPLE), strict=True).module()
    for lengths in LENGTHS:
        torch.testing.assert_close(output(program, wave(lengths)), output(model, wave(lengths)), atol=1e-5, rtol=1e-5)


def test_exported_hidden_states_hold_no_pseudo_features():
    model = adapted(small("wav2vec2"))
    model.config.output_hidden_states = True
    program = exported(model, wave(EXAMPLE)).module()
    inputs = wave(LENGTHS[0])
    with torch.no_grad():
        states, expected = program(**inputs).hidden_states, model(**inputs).hidden_states
    for actual, state in zip(states, expected, strict=True):
        torch.testing.assert_close(actual, state, atol=1e-5, rtol=1e-5)


def test_an_export_and_a_model_in_another_thread_leave_each_other_alone():
    model, serving, inputs = adapted(small("wav2vec2")), adapted(small("wavlm")), wave(EXAMPLE)
    expected, expected_of_serving = output(model, inputs), output(serving, inputs)
    inside, go_on, answers = threading.Event(), threading.Event(), []

    def wait_in_the_middle(module, args):
        inside.set()
        assert go_on.wait(60)

    def start_serving(module, args):
        if not inside.is_set():
            thread.start()
            assert inside.wait(60)

    def let_it_end(module, args):
        go_on.set()
        thread.join()

    thread = threading.Thread(target=lambda: answers.append(output(serving, inputs)))
    serving.wavlm.encoder.encoder_layers[1].register_forward_pre_hook(wait_in_the_middle)
    layers = model.wav2vec2.encoder.encoder_layers
    hooks = [layers[0].register_forward_pre_hook(start_serving), layers[1].register_forward_pre_hook(let_it_end)]
    program = exported(model, inputs).module()
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(output(program, inputs), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(answers[0], expected_of_serving, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", cases())
def test_a_family_exports_where_the_backbone_alone_does(name):
    family = FAMILIES[name]
    model = adapted(family.shallow(), family.adapters, **family.options)
    expected = output(model, family.inputs)  # before: some backbones keep tensors for the next call, an export's too

    def program(module):
        if getattr(module, "can_generate", bool)():
            module.config.use_cache = False  # a cache is no output that can be exported
        with torch.no_grad():
            return export(module, (), family.inputs, strict=False).module()

    try:
        got = output(program(model), family.inputs)
    except Exception as error:
        with pytest.raises(type(error)):
            program(family.shallow())
        pytest.skip("Transformers' own code does not")
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@MODELS
def test_onnx_runtime_gives_the_same_for_any_length_and_batch_size(name, head, padded, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, inputs = adapted(small(name, head)), wave(EXAMPLE, padded)
    with torch.no_grad():
        torch.onnx.export(
            model,
            (),
            tmp_path / "model.onnx",
            kwargs=inputs,
            input_names=list(inputs),
            output_names=["logits"],
            dynamic_shapes={name: {0: "batch", 1: "samples"} for name in inputs},
            opset_version=18,
            dynamo=True,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for lengths in (EXAMPLE, *LENGTHS, (1234,)):
        inputs = wave(lengths, padded)
        (logits,) = session.run(["logits"], {name: x.numpy() for name, x in inputs.items()})
        torch.testing.assert_close(torch.from_numpy(logits), output(model, inputs), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_page_about_it_runs(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    page = (Path(__file__).parent.parent / "docs/how-to/compile-and-export.md").read_text()
    model, other = (shaken(get_peft_model(small("wav2vec2"), ELPConfig(**ELP)), std) for std in (0.2, 0.4))
    monkeypatch.chdir(tmp_path)
    other.save_pretrained("another-adapter")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # generating code is slow
    inputs = wave(EXAMPLE)
    names = {"torch": torch, "peft_elp": peft_elp, "model": model, "inputs": inputs}
    found = []
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)[1:]:  # the first makes a model and inputs
        exec(block, names)
        found.append(torch.as_tensor(names["logits"]))
    assert len(found) == 4
    for logits in found[1:]:
        torch.testing.assert_close(logits, output(other, inputs), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found[0], found[1], atol=1e-2)
