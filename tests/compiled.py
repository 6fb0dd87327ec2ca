"""Compiled models against plain ones: `python tests/compiled.py`, run by test_compile.py.

In a process of its own, since the axes of tensors are checked while tests run, which the compiler cannot trace. Models
are traced, without code generation.
"""

import torch
from backbones import ELP, build, result, shaken, waveforms
from families import FAMILIES
from peft import LoraConfig, get_peft_model

from peft_elp import ELPConfig


def case(name):
    if name == "wav2vec2":
        return build("wav2vec2", "ForCTC"), {"input_values": waveforms()[0]}
    return FAMILIES[name].model(), FAMILIES[name].inputs


def output(model, inputs):
    with torch.no_grad():
        return result(model(**inputs))


def lora_compiles_into_one_graph():
    """Whether PEFT's own wrapper does, which older versions of PyTorch cannot trace."""
    torch.compiler.reset()
    base, inputs = case("wav2vec2")
    model = get_peft_model(base, LoraConfig(target_modules=["output_dense"]))
    try:
        output(torch.compile(model, backend="eager", fullgraph=True), inputs)
    except torch._dynamo.exc.Unsupported:
        return False
    return True


def check(name, adapters, how):
    torch.compiler.reset()
    base, inputs = case(name)
    model = shaken(get_peft_model(base, ELPConfig(adapters=adapters, modules_to_save=[], **ELP)), std=1.0)
    expected = output(model, inputs)
    if how == "one graph":
        model = torch.compile(model, backend="eager", fullgraph=True)
    else:  # the stack around the layers runs as it is
        stack = base.wav2vec2.encoder if name == "wav2vec2" else base.encoder
        for layer in stack.encoder_layers:
            layer.compile(backend="eager")
    torch.testing.assert_close(output(model, inputs), expected, atol=1e-5, rtol=1e-5)
    print("ok", name, adapters, how)  # noqa: T201 (what the test counts)


if __name__ == "__main__":
    possible = lora_compiles_into_one_graph()
    for adapters in ("EL", "P"):
        if possible:
            check("wav2vec2", adapters, "one graph")
        else:
            print("left out: one graph")  # noqa: T201 (what the test counts)
        check("wav2vec2", adapters, "layer by layer")
        check("whisper-classification", adapters, "layer by layer")
