"""Figures of what adapters have learned and where they err: the artists hold the numbers."""

import itertools
import sys

import matplotlib
import pytest
import torch
from backbones import ELP, build
from matplotlib import pyplot
from peft import get_peft_model

from peft_elp import ELPConfig
from peft_elp.speech.plots import layer_weights, plot_confusion, plot_det, plot_layer_weights

matplotlib.use("Agg")


def adapted(**options):
    return get_peft_model(build("wavlm", "ForCTC"), ELPConfig(**ELP | options))


def set_logits(model, logits, adapter_name="default"):
    (parameter,) = (p for name, p in model.named_parameters() if name.endswith(f"elp_l.{adapter_name}.layer_weights"))
    parameter.data = torch.tensor(logits)


def bars(figure):
    """By label, the middle and the height of each bar."""
    return {
        container.get_label(): [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in container]
        for container in figure.axes[0].containers
    }


def test_layer_weights_are_the_softmax_of_what_was_learned_by_number_of_layer():
    model = adapted(l_layers=[0, 2])
    model.add_adapter("other", ELPConfig(**ELP, adapters="L", l_layers=[1, 2]))
    assert layer_weights(model) == [(0, pytest.approx(0.5)), (2, pytest.approx(0.5))]
    set_logits(model, [0.0, 1.0986123], "other")
    assert layer_weights(model) == [(0, pytest.approx(0.5)), (2, pytest.approx(0.5))]
    assert layer_weights(model, "other") == [(1, pytest.approx(0.25)), (2, pytest.approx(0.75))]


def test_several_adapters_stand_side_by_side_without_overlap():
    model = adapted(l_layers=[0, 2])
    set_logits(model, [0.0, 1.0986123])
    figure = plot_layer_weights({"asr": [(0, 0.2), (1, 0.3), (2, 0.5)], "asv": model, "er": layer_weights(model)})
    found = bars(figure)
    assert [height for _, height in found["asr"]] == [0.2, 0.3, 0.5]
    assert [round(middle) for middle, _ in found["asv"]] == [0, 2]  # no bar for the layer without a tap
    assert [height for _, height in found["er"]] == pytest.approx([0.25, 0.75])
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["asr", "asv", "er"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("layer", "layer weight")
    figure.canvas.draw()  # with the Agg backend
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2"]
    drawn = sorted((bar.get_x(), bar.get_width()) for bar in axes.patches)
    for (left, width), (following, _) in itertools.pairwise(drawn):
        assert left + width <= following + 1e-9


def test_confusions_are_counted_by_true_and_predicted_label():
    axes = plot_confusion(["yes", "no", "no", "stop"], ["yes", "no", "yes", "no"]).axes[0]
    assert [text.get_text() for text in axes.texts] == ["1", "0", "1", "1", "0", "0", "0", "0", "1"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["no", "stop", "yes"]


def test_the_errors_of_each_system_are_a_curve():
    axes = plot_det({"E+L": ([1, 0, 1, 0], [0.9, 0.5, 0.4, 0.1]), "L": ([1, 0, 1, 0], [0.9, 0.1, 0.4, 0.5])}).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["E+L", "L"]
    assert len(axes.lines) == 2


def test_figures_can_be_saved_and_none_stays_open(tmp_path):
    plot_layer_weights({"asr": adapted()}).savefig(tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").stat().st_size > 1000
    assert pyplot.get_fignums() == []


def test_what_is_not_there_to_draw_is_named():
    with pytest.raises(ValueError, match=r"has no L-adapter named 'default'; it has none\. ELPConfig\(adapters="):
        layer_weights(adapted(adapters="EP"))
    with pytest.raises(ValueError, match=r"has no L-adapter named 'asv'; it has default\."):
        layer_weights(adapted(), "asv")
    with pytest.raises(ValueError, match="WavLMForCTC has no L-adapter"):
        plot_layer_weights({"asr": build()})
    for nothing in (adapted(), {}):
        with pytest.raises(ValueError, match=r"adapters must be a dictionary .*, such as \{'asr': model\}, got"):
            plot_layer_weights(nothing)


def test_a_missing_matplotlib_is_named_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"matplotlib: pip install 'peft-elp\[recipes\]'"):
        plot_layer_weights({"asr": adapted()})
    assert layer_weights(adapted())  # the numbers need no figure
