"""What every forward and backward pass keeps to, beside what test_families.py asks of every family."""

import threading

import pytest
import torch
from backbones import ELP, FAMILIES, adapted, call, labels_for, result, waveforms

from peft_elp import ELPConfig
from peft_elp.call.outputs import hidden_states_of


def step(model):
    """One backward pass from the loss of the head; gives the gradients of what is trained."""
    waveform, mask = waveforms()
    base = model.train().get_base_model()
    frames = base._get_feat_extract_output_lengths(waveform.shape[1])
    model(waveform, attention_mask=mask, labels=labels_for(base, 3, frames)).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_the_ctc_loss_counts_the_frames_of_the_backbone():
    waveform, mask = waveforms()
    labels = torch.tensor([[1, 2, 3, -100]] * 3)
    model = adapted(family="wav2vec2")
    output = model(waveform, attention_mask=mask, labels=labels)
    lengths = model.get_base_model()._get_feat_extract_output_lengths(mask.sum(-1))
    expected = torch.nn.functional.ctc_loss(
        output.logits.log_softmax(-1).transpose(0, 1), labels[:, :3], lengths, torch.tensor([3, 3, 3]), reduction="sum"
    )
    torch.testing.assert_close(output.loss, expected)


# Of the frozen convolutions, which Transformers checkpoints too.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": True}])
@pytest.mark.parametrize("letters", ["E", "L", "P", "EL", "EP", "LP"])
def test_gradient_checkpointing_gives_the_same_gradients(letters, checkpointing):
    found = []
    for on in (False, True):
        model = adapted(family="wav2vec2", base={"do_stable_layer_norm": True}, adapters=letters)
        if on:
            model.get_base_model().gradient_checkpointing_enable(checkpointing)
        found.append(step(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


@pytest.mark.parametrize("letters", ["E", "L", "ELP"])
def test_nothing_that_is_frozen_records_a_graph_below_the_first_adapter(letters):
    model = adapted(family="wav2vec2", adapters=letters, train_layer_norms=False).train()
    encoder = model.get_base_model().wav2vec2
    convolutions, layers = [], []
    encoder.feature_extractor.register_forward_hook(lambda *args: convolutions.append(args[-1].requires_grad))
    for layer in encoder.encoder.encoder_layers:
        layer.register_forward_hook(lambda *args: layers.append(hidden_states_of(args[-1]).requires_grad))
    model(waveforms()[0])
    assert convolutions == [False]
    assert letters != "L" or layers == [False] * 3


# Hidden states that are reported ------------------------------------------------------------------------------------


def test_reported_hidden_states_are_the_real_frames_of_the_adapted_backbone():
    model, (waveform, mask) = adapted(adapters="P"), waveforms()
    together = call(model, input_values=waveform, attention_mask=mask, output_hidden_states=True).hidden_states
    short = {"input_values": waveform[2:, :900], "attention_mask": mask[2:, :900]}
    for batch, one in zip(together, call(model, **short, output_hidden_states=True).hidden_states, strict=True):
        torch.testing.assert_close(batch[2, : one.shape[1]], one[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("l_output", ["project", "residual"])
@pytest.mark.parametrize("letters", ["L", "LP"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_hidden_state_of_a_post_norm_encoder_is_its_output_under_l_too(family, letters, l_output):
    waveform, mask = waveforms()
    options = {"input_values": waveform, "attention_mask": mask, "output_hidden_states": True}
    model = adapted("Model", family, adapters=letters, l_output=l_output)
    output = call(model, **options)
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    states = next(value for value in call(model, **options, return_dict=False) if isinstance(value, tuple))
    assert torch.equal(states[-1], output.last_hidden_state)


# Threads ------------------------------------------------------------------------------------------------------------


def test_threads_on_one_model_agree_with_serial_runs():
    model = adapted()
    model.add_adapter("other", ELPConfig(**ELP | {"adapters": "E"}))
    inputs = [waveforms(lengths, seed) for seed, lengths in enumerate([(2000, 1300), (1500, 700, 900), (2600,)])]

    def run(number, **options):
        waveform, mask = inputs[number]
        with torch.no_grad():
            return result(model(waveform, attention_mask=mask, **options))

    names = [{}, {"adapter_names": ["other"] * 3}, {"adapter_names": ["__base__"]}]
    serial = [run(number, **names[number]) for number in range(3)]
    failures = []

    def repeat(number):
        try:
            for _ in range(20):
                torch.testing.assert_close(run(number, **names[number]), serial[number], atol=1e-5, rtol=1e-5)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=repeat, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
