"""A shorter window for Whisper and its relatives."""

import pytest
import torch
from backbones import with_adapters
from families import FAMILIES, cases
from peft import PeftModel, get_peft_model
from transformers import WhisperConfig, WhisperForAudioClassification, WhisperForConditionalGeneration

from peft_elp import ELPConfig, MultiTaskModel, find_encoder, shorten_window
from peft_elp.backbones import has_fixed_window

pytestmark = pytest.mark.filterwarnings("ignore:The head averages over the padding:UserWarning")
SIZES = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "num_mel_bins": 8}
SIZES |= {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "max_source_positions": 150}
SIZES |= {"classifier_proj_size": 8}
ELP = {"e_dim": 4, "l_dim": 6, "p_length": 2}


def whisper():
    torch.manual_seed(0)
    return WhisperForAudioClassification(WhisperConfig(**SIZES, num_labels=3)).eval()


def features(seconds):
    torch.manual_seed(seconds)
    return torch.randn(2, 8, 100 * seconds)


@pytest.mark.parametrize("name", cases(name for name, family in FAMILIES.items() if "input_features" in family.inputs))
def test_the_table_knows_which_encoders_take_one_length_only(name):
    family = FAMILIES[name]
    model = family.model()
    try:
        row = find_encoder(model).family
    except ValueError:
        pytest.skip("several encoders")
    assert has_fixed_window(model) == (row.window is not None)
    if row.window is None:
        return
    assert isinstance(find_encoder(model).stack.get_submodule(row.window), torch.nn.Embedding)
    inputs = dict(family.inputs)
    inputs["input_features"] = inputs["input_features"][..., :-4]
    with pytest.raises((ValueError, RuntimeError)):
        model(**inputs)


def test_shorter_features_give_what_the_first_positions_give():
    model = whisper()
    layers, positions = model.encoder.layers, model.encoder.embed_positions.weight
    with torch.no_grad():
        x = torch.nn.functional.gelu(model.encoder.conv1(features(1)))
        x = torch.nn.functional.gelu(model.encoder.conv2(x)).permute(0, 2, 1) + positions[:50]
        for layer in layers:
            x = layer(x, None)
            x = x[0] if isinstance(x, tuple) else x  # as in Transformers 5.0
        expected = model.classifier(model.projector(model.encoder.layer_norm(x)).mean(dim=1))
        shorten_window(model, 1)
        torch.testing.assert_close(model(features(1)).logits, expected)
    with pytest.raises(ValueError, match="length 100"):
        model(features(3))


def test_a_shorter_window_goes_with_its_adapter(tmp_path):
    model = get_peft_model(whisper(), ELPConfig(**ELP, chunk_length=1), adapter_name="short").eval()
    model.add_adapter("whole", ELPConfig(**ELP))
    model.add_adapter("middle", ELPConfig(**ELP, chunk_length=2))
    for name, seconds in {"short": 1, "whole": 3, "middle": 2}.items():
        model.set_adapter(name)
        assert model(features(seconds)).logits.shape == (2, 3)
        with pytest.raises(
            ValueError, match=r"mel input features to be of length|chunk_length=[12].*feature_extractor="
        ):
            model(features(4))
    model.set_adapter("short")
    with model.disable_adapter():
        torch.testing.assert_close(model(features(3)).logits, whisper()(features(3)).logits)
    answer = model(features(1)).logits
    model.save_pretrained(tmp_path, selected_adapters=["short"])
    loaded = PeftModel.from_pretrained(whisper(), tmp_path / "short").eval()
    torch.testing.assert_close(loaded(features(1)).logits, answer)


@pytest.mark.parametrize("leave", ["unload", "delete_adapter"])
def test_the_whole_window_is_back_when_the_adapter_is_gone(leave):
    model = get_peft_model(whisper(), ELPConfig(**ELP, chunk_length=1))
    base = model.unload() if leave == "unload" else model.get_base_model()
    if leave == "delete_adapter":
        model.delete_adapter("default")
    torch.testing.assert_close(base(features(3)).logits, whisper()(features(3)).logits)
    assert base.config.max_source_positions == 150


def test_adapters_with_different_windows_are_not_active_together():
    model = get_peft_model(whisper(), ELPConfig(adapters="E", e_dim=4, train_layer_norms=False, chunk_length=1))
    model.add_adapter(
        "other", ELPConfig(adapters="E", e_dim=4, train_layer_norms=False, chunk_length=2, modules_to_save=[])
    )
    with pytest.raises(ValueError, match="windows of different lengths"):
        model.base_model.set_adapter(["default", "other"])


READER = {"adapters": "L", "train_layer_norms": False}
WINDOWS = {"short": 1, "brief": 1, "middle": 2, "whole": None}


def readers(names=tuple(WINDOWS)):
    return with_adapters(whisper(), **{name: READER | {"chunk_length": WINDOWS[name]} for name in names})


def pass_for_all(model, names, x):
    return [output.logits[0] for output in model.forward_all(names, x).values()]


def batch_of_both(model, names, x):
    return model(x, adapter_names=names).logits


BOTH = [pass_for_all, batch_of_both]


@pytest.mark.parametrize("call", BOTH)
@pytest.mark.parametrize(("names", "active"), [(["short", "brief"], "brief"), (["whole", "whole"], "whole")])
def test_adapters_that_a_call_names_share_the_window_of_the_active_one(call, names, active):
    model, x = readers(), features(WINDOWS[active] or 3)[:1].expand(2, -1, -1)
    expected = []
    for name in names:
        model.set_adapter(name)
        expected.append(model(x).logits[0])
    model.set_adapter(active)
    for found, own in zip(call(model, names, x), expected, strict=False):
        torch.testing.assert_close(found, own)


@pytest.mark.parametrize("call", BOTH)
@pytest.mark.parametrize("active", ["short", "middle", "whole"])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["short", "whole"], "windows of different lengths: a window of 1 s and the whole window"),
        (["short", "middle"], "windows of different lengths: a window of 1 s and a window of 2 s"),
        (
            ["brief", "brief"],
            r"take a window of 1 s, and the active adapter takes .* set_adapter with one of \['brief'\]",
        ),
        (
            ["whole", "whole"],
            r"take the whole window, and the active adapter takes .* set_adapter with one of \['whole'\]",
        ),
    ],
)
def test_an_adapter_never_answers_on_the_window_of_another(call, active, names, message):
    if WINDOWS[active] in {WINDOWS[name] for name in names} and len(set(names)) == 1:
        pytest.skip("the window that they take")
    model = readers()
    model.set_adapter(active)
    with pytest.raises(ValueError, match=message):
        call(model, names, features(WINDOWS[active] or 3))


def test_the_backbone_in_a_mixed_batch_takes_the_whole_window():
    model = readers()
    model.set_adapter("short")
    with pytest.raises(ValueError, match="windows of different lengths"):
        model(features(1), adapter_names=["short", "__base__"])


def test_models_that_share_a_pass_take_one_window():
    first, second = readers(("whole", "short")), readers(("whole", "short"))
    tasks = MultiTaskModel({"one": first, "two": second}).eval()
    first.set_adapter("whole")
    with pytest.raises(ValueError, match="windows of different lengths"):
        tasks(features(1))


@pytest.mark.parametrize(
    ("chunk_length", "message"),
    [(0, "chunk_length"), (1.5, "chunk_length"), (4, "longer than the window of WhisperEncoder, 3 s")],
)
def test_a_window_is_whole_seconds_of_the_whole_one(chunk_length, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(whisper(), ELPConfig(**ELP, chunk_length=chunk_length))


def test_a_window_is_not_cut_where_text_is_generated():
    model = WhisperForConditionalGeneration(WhisperConfig(**SIZES))
    for cut in (lambda: shorten_window(model, 1), lambda: get_peft_model(model, ELPConfig(**ELP, chunk_length=1))):
        with pytest.raises(ValueError, match="would break the text"):
            cut()
    assert model.config.max_source_positions == 150
