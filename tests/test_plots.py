"""Figures of what adapters have learned: the artists hold the numbers of the model."""

import itertools
import sys

import matplotlib
import pytest
import torch
from backbones import ELP, build
from peft import get_peft_model

from peft_elp import ELPConfig
from peft_elp.speech.plots import layer_weights, plot_layer_weights, plot_pseudo_features, pseudo_feature_norms

matplotlib.use("Agg")


def adapted(**options):
    return get_peft_model(build("wavlm", "ForCTC"), ELPConfig(**ELP | options))


def set_logits(model, logits, adapter_name="default"):
    for name, parameter in model.named_parameters():
        if name.endswith(f"elp_l.{adapter_name}.layer_weights"):
            parameter.data = torch.tensor(logits)
            return
    raise AssertionError(f"no layer weights of {adapter_name}")


def bars(figure):
    """By label, the middle and the height of each bar."""
    return {
        container.get_label(): [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in container]
        for container in figure.axes[0].containers
    }


def ticks(figure):
    figure.canvas.draw()  # what is drawn, with the Agg backend
    return [label.get_text() for label in figure.axes[0].get_xticklabels()]


def legend(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_layer_weights_are_the_softmax_of_what_was_learned_by_number_of_layer():
    model = adapted()
    assert layer_weights(model) == [(layer, pytest.approx(1 / 3)) for layer in range(3)]
    set_logits(model, [0.0, 1.0, 2.0])
    total = 1 + 2.718281828 + 7.389056099
    shares = [1 / total, 2.718281828 / total, 7.389056099 / total]
    assert layer_weights(model) == [(layer, pytest.approx(share)) for layer, share in enumerate(shares)]


def test_layer_weights_name_the_tapped_layers_of_the_asked_adapter():
    model = adapted(l_layers=[0, 2])
    model.add_adapter("other", ELPConfig(**ELP, adapters="L", l_layers=[1, 2]))
    set_logits(model, [0.0, 0.0])
    set_logits(model, [0.0, 1.0986123], "other")
    assert layer_weights(model) == [(0, pytest.approx(0.5)), (2, pytest.approx(0.5))]
    assert layer_weights(model, "other") == [(1, pytest.approx(0.25)), (2, pytest.approx(0.75))]


def test_the_bars_are_the_layer_weights_and_the_ticks_the_layers():
    model = adapted()
    set_logits(model, [0.5, 1.0, -2.0])
    figure = plot_layer_weights({"commands": model})
    assert bars(figure) == {"commands": [(pytest.approx(n), pytest.approx(w)) for n, w in layer_weights(model)]}
    assert sum(height for _, height in bars(figure)["commands"]) == pytest.approx(1)
    assert ticks(figure) == ["0", "1", "2"]
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("layer", "layer weight")
    assert legend(figure) == ["commands"]


def test_several_adapters_stand_side_by_side_without_overlap():
    model = adapted(l_layers=[0, 2])
    figure = plot_layer_weights({"asr": [(0, 0.2), (1, 0.3), (2, 0.5)], "asv": model, "er": layer_weights(model)})
    found = bars(figure)
    assert [height for _, height in found["asr"]] == [0.2, 0.3, 0.5]
    assert [round(middle) for middle, _ in found["asv"]] == [0, 2]  # no bar for the layer without a tap
    assert [height for _, height in found["er"]] == pytest.approx([0.5, 0.5])
    assert legend(figure) == ["asr", "asv", "er"]
    assert ticks(figure) == ["0", "1", "2"]
    drawn = sorted((bar.get_x(), bar.get_width()) for bar in figure.axes[0].patches)
    for (left, width), (following, _) in itertools.pairwise(drawn):
        assert left + width <= following + 1e-9


def test_pseudo_features_are_drawn_by_the_norm_of_each_row():
    model = adapted(p_length=4)
    rows = next(p for name, p in model.named_parameters() if name.endswith("elp_p.default.rows"))
    rows.data = torch.eye(24)[:4] * torch.tensor([[3.0], [0.0], [1.0], [2.0]])
    assert pseudo_feature_norms(model) == [(0, 3.0), (1, 0.0), (2, 1.0), (3, 2.0)]
    figure = plot_pseudo_features({"asr": model})
    assert [height for _, height in bars(figure)["asr"]] == [3.0, 0.0, 1.0, 2.0]
    assert ticks(figure) == ["0", "1", "2", "3"]
    assert figure.axes[0].get_xlabel() == "pseudo feature"


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_a_figure_can_be_saved_in_any_format_and_leaves_none_open(suffix, tmp_path):
    plot_layer_weights({"asr": adapted()}).savefig(tmp_path / f"weights.{suffix}")
    assert (tmp_path / f"weights.{suffix}").stat().st_size > 1000
    from matplotlib import pyplot

    assert pyplot.get_fignums() == []


def test_what_is_not_there_to_draw_is_named():
    with pytest.raises(ValueError, match=r"has no L-adapter named 'default'; it has none. ELPConfig\(adapters=...\)"):
        layer_weights(adapted(adapters="EP"))
    with pytest.raises(ValueError, match=r"has no L-adapter named 'asv'; it has default\."):
        layer_weights(adapted(), "asv")
    with pytest.raises(ValueError, match="has no P-adapter named 'default'; it has none"):
        plot_pseudo_features({"asr": adapted(adapters="EL")})
    with pytest.raises(ValueError, match="WavLMForCTC has no L-adapter"):
        plot_layer_weights({"asr": build()})
    with pytest.raises(
        ValueError, match=r"a dictionary with a label for each adapter, got PeftModel. Write for example \{'asr': "
    ):
        plot_layer_weights(adapted())
    with pytest.raises(ValueError, match="got dict"):
        plot_layer_weights({})


def test_a_missing_matplotlib_is_named_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"matplotlib: pip install 'peft-elp\[recipes\]'"):
        plot_layer_weights({"asr": adapted()})
    assert layer_weights(adapted())  # the numbers need no figure
