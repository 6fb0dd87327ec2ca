"""What every forward and backward pass keeps to, for all six families and both places of the layer norm."""

import copy
import threading

import pytest
import torch
from backbones import ELP, HEADS, NORMS, build, has, labels_for, result, shaken, waveforms
from peft import get_peft_model

from peft_elp import ELPConfig
from peft_elp.call.outputs import hidden_states_of

LETTERS = ["E", "L", "P", "EL", "EP", "LP", "ELP"]
# Data2vec's stacked positional convolutions carry values across the end of an utterance: the backbone alone is not
# invariant to padding.
INVARIANT = [(family, stable) for family, stable in NORMS if family != "data2vec-audio"]


def adapted(family, head, stable, seed=0, **options):
    base = build(family, head, seed=seed, do_stable_layer_norm=stable)
    return get_peft_model(base, ELPConfig(**ELP | options))


@pytest.mark.parametrize("adapters", LETTERS)
@pytest.mark.parametrize(("family", "stable"), NORMS)
def test_one_training_step_reaches_every_parameter_and_no_other(family, stable, adapters):
    model = shaken(adapted(family, "ForCTC", stable, adapters=adapters)).train()
    waveform, mask = waveforms()
    model(waveform, attention_mask=mask, labels=labels_for(model.get_base_model(), 3, 0)).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        assert "elp_" in name or "modules_to_save" in name, name
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    for letter, part in (("E", ".elp_e."), ("L", ".elp_l."), ("P", ".elp_p."), ("EL", ".elp_norm.")):
        assert any(part in name for name in trained) == bool(set(letter) & set(adapters)), part
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trained)


@pytest.mark.parametrize("head", [head for head in HEADS if head != "Model"])
@pytest.mark.parametrize("adapters", ["E", "L", "ELP"])
def test_every_head_trains(head, adapters):
    model = shaken(adapted("wavlm", head, False, adapters=adapters)).train()
    waveform, mask = waveforms()
    frames = model.get_base_model()._get_feat_extract_output_lengths(waveform.shape[1])
    model(waveform, attention_mask=mask, labels=labels_for(model.get_base_model(), 3, frames)).loss.backward()
    unreached = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert unreached == []


@pytest.mark.parametrize("position", ["append", "prepend"])
@pytest.mark.parametrize("head", ["ForCTC", "ForSequenceClassification", "ForXVector"])
@pytest.mark.parametrize(("family", "stable"), INVARIANT)
def test_an_utterance_alone_is_as_in_a_padded_batch(family, stable, head, position):
    if not has(family, head):
        pytest.skip(f"{family} has no {head}")
    model = shaken(adapted(family, head, stable, p_position=position))
    lengths = (2000, 1300, 900)
    waveform, mask = waveforms(lengths)
    with torch.no_grad():
        together = result(model(waveform, attention_mask=mask))
        for row, length in enumerate(lengths):
            short = waveform[row : row + 1, :length]
            alone = result(model(short, attention_mask=torch.ones_like(short, dtype=torch.long)))[0]
            frames = (slice(len(alone)),) if head == "ForCTC" else ()
            torch.testing.assert_close(together[row][frames], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("position", ["append", "prepend"])
def test_a_longer_padding_changes_nothing(position):
    model = shaken(adapted("wavlm", "ForCTC", False, p_position=position))
    waveform, mask = waveforms((1300, 900))
    longer = [torch.nn.functional.pad(x, (0, 700)) for x in (waveform, mask)]
    with torch.no_grad():
        short = result(model(waveform, attention_mask=mask))
        long = result(model(longer[0], attention_mask=longer[1]))
    torch.testing.assert_close(long[0, : short.shape[1]], short[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("family", "stable"), NORMS)
def test_pseudo_features_show_nowhere(family, stable, head):
    if not has(family, head):
        pytest.skip(f"{family} has no {head}")
    waveform, mask = waveforms()
    options = {"attention_mask": mask, "output_hidden_states": True}
    with torch.no_grad():
        before = build(family, head, do_stable_layer_norm=stable)(waveform, **options)
        model = adapted(family, head, stable, l_output=None if head != "Model" else "project")
        after = model(waveform, **options)
        as_tuple = model(waveform, **options, return_dict=False)
    assert result(after).shape == result(before).shape
    assert [x.shape for x in after.hidden_states] == [x.shape for x in before.hidden_states]
    states = next(value for value in as_tuple if isinstance(value, tuple))
    assert [x.shape for x in states] == [x.shape for x in before.hidden_states]


def test_reported_hidden_states_are_the_real_frames_of_the_adapted_backbone():
    model = shaken(adapted("wavlm", "ForCTC", False, adapters="P"))
    waveform, mask = waveforms()
    with torch.no_grad():
        together = model(waveform, attention_mask=mask, output_hidden_states=True).hidden_states
        alone = model(waveform[2:, :900], attention_mask=mask[2:, :900], output_hidden_states=True).hidden_states
    for batch, one in zip(together, alone, strict=True):
        torch.testing.assert_close(batch[2, : one.shape[1]], one[0], atol=1e-5, rtol=1e-5)


def test_the_ctc_loss_counts_the_frames_of_the_backbone():
    waveform, mask = waveforms()
    labels = torch.tensor([[1, 2, 3, -100]] * 3)
    model = shaken(adapted("wav2vec2", "ForCTC", False))
    output = model(waveform, attention_mask=mask, labels=labels)
    lengths = model.get_base_model()._get_feat_extract_output_lengths(mask.sum(-1))
    expected = torch.nn.functional.ctc_loss(
        output.logits.log_softmax(-1).transpose(0, 1), labels[:, :3], lengths, torch.tensor([3, 3, 3]), reduction="sum"
    )
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("l_output", ["head", "project", "residual"])
def test_the_sum_of_taps_reaches_the_head_in_each_mode(l_output):
    model = adapted("wavlm", "ForSequenceClassification", False, adapters="L", l_output=l_output).train()
    projector = model.get_base_model().projector
    assert projector.modules_to_save["default"].in_features == (ELP["l_dim"] if l_output == "head" else 24)
    assert projector.original_module.in_features == 24
    waveform, mask = waveforms()
    for _ in range(2):  # a residual path starts at zero, so its taps move from the second step on
        loss = model(waveform, attention_mask=mask, labels=torch.tensor([0, 1, 2])).loss
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


def test_a_fresh_residual_adapter_leaves_the_output_as_it_was():
    waveform, mask = waveforms()
    base = build("wav2vec2", "ForCTC")
    with torch.no_grad():
        before = result(base(waveform, attention_mask=mask))
        after = result(
            get_peft_model(base, ELPConfig(adapters="L", l_output="residual", **ELP))(waveform, attention_mask=mask)
        )
    torch.testing.assert_close(after, before, atol=0, rtol=0)


# Of the frozen convolutions, which Transformers checkpoints too.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
@pytest.mark.parametrize("adapters", LETTERS)
def test_gradient_checkpointing_gives_the_same_gradients(adapters, checkpointing):
    gradients = []
    for on in (False, True):
        model = shaken(adapted("wav2vec2", "ForCTC", True, adapters=adapters)).train()
        if on:
            model.get_base_model().gradient_checkpointing_enable(checkpointing)
        waveform, mask = waveforms()
        model(waveform, attention_mask=mask, labels=labels_for(model.get_base_model(), 3, 0)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_bfloat16_autocast_trains_float32_adapters():
    model = adapted("wavlm", "ForCTC", False).train()
    waveform, mask = waveforms()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(waveform, attention_mask=mask, labels=labels_for(model.get_base_model(), 3, 0)).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32, name
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("head", ["ForCTC", "ForSequenceClassification"])
def test_a_half_precision_backbone_keeps_float32_adapters(head):
    base = build("wav2vec2", head).to(torch.bfloat16)
    model = get_peft_model(base, ELPConfig(**ELP)).train()
    waveform, mask = waveforms()
    output = model(waveform.bfloat16(), attention_mask=mask, labels=labels_for(base, 3, 0))
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert {p.dtype for n, p in model.named_parameters() if ".elp_" in n} == {torch.float32}


@pytest.mark.parametrize("adapters", ["E", "L", "ELP"])
def test_the_frozen_cnn_records_no_graph(adapters):
    model = adapted("wav2vec2", "ForCTC", False, adapters=adapters).train()
    seen = []
    encoder = model.get_base_model().wav2vec2
    encoder.feature_extractor.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    model(waveforms()[0])
    assert seen == [False]


def test_nothing_below_the_taps_is_recorded_for_l_alone():
    model = adapted("wav2vec2", "ForCTC", False, adapters="L", train_layer_norms=False).train()
    seen = []
    for layer in model.get_base_model().wav2vec2.encoder.encoder_layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(hidden_states_of(output).requires_grad))
    model(waveforms()[0])
    assert seen == [False] * 3


def test_a_deep_copy_uses_its_own_adapters():
    model = adapted("wavlm", "ForCTC", False)
    waveform, mask = waveforms()
    with torch.no_grad():
        before = result(model(waveform, attention_mask=mask))
        changed = shaken(copy.deepcopy(model))
        assert not torch.allclose(result(changed(waveform, attention_mask=mask)), before, atol=1e-2)
        torch.testing.assert_close(result(model(waveform, attention_mask=mask)), before)
        shaken(model)
        torch.testing.assert_close(
            result(model(waveform, attention_mask=mask)), result(changed(waveform, attention_mask=mask))
        )


def test_two_threads_on_one_model_agree_with_serial_runs():
    model = shaken(adapted("wavlm", "ForCTC", False))
    inputs = [waveforms(lengths, seed) for seed, lengths in enumerate([(2000, 1300), (1500, 700, 900), (2600,)])]

    def run(waveform, mask):
        with torch.no_grad():
            output = model(waveform, attention_mask=mask, output_hidden_states=True)
        return [output.logits, *output.hidden_states]

    serial = [run(*given) for given in inputs]
    failures = []

    def repeat(number):
        try:
            for _ in range(20):
                for found, expected in zip(run(*inputs[number]), serial[number], strict=True):
                    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=repeat, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("switch", ["set_adapter", "enable_adapter_layers"])
@pytest.mark.parametrize("options", [{}, {"adapter_names": ["default"] * 3}], ids=["one adapter", "names"])
def test_a_call_during_which_another_thread_switches_adapters_gives_no_answer(switch, options):
    model = shaken(adapted("wavlm", "ForCTC", False)).eval()
    waveform, mask = waveforms()
    layer = model.get_base_model().wavlm.encoder.layers[1]

    def switch_meanwhile(*_):
        thread = threading.Thread(target=getattr(model.base_model, switch), args=("default",) * (switch[0] == "s"))
        thread.start()
        thread.join()

    with torch.no_grad():
        expected = result(model(waveform, attention_mask=mask, **options))
        handle = layer.register_forward_pre_hook(switch_meanwhile)
        with pytest.raises(RuntimeError, match=r"switched in another thread while this call ran.*Pass adapter_names"):
            model(waveform, attention_mask=mask, **options)
        handle.remove()
        assert torch.equal(result(model(waveform, attention_mask=mask, **options)), expected)


def test_a_call_that_fails_leaves_no_trace():
    model = shaken(adapted("wavlm", "ForCTC", False))
    waveform, mask = waveforms()
    with torch.no_grad():
        before = result(model(waveform, attention_mask=mask))
        handle = model.get_base_model().wavlm.encoder.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(waveform, attention_mask=mask)
        handle.remove()
        torch.testing.assert_close(result(model(waveform, attention_mask=mask)), before, atol=0, rtol=0)
