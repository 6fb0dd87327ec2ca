"""Whatever fails while an adapter is saved, its folder holds either the files of before or those of after."""

import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from backbones import ELP, build, shaken
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from untouched import logits

from peft_elp import ELPConfig, describe
from peft_elp.saved.folder import read_adapter
from peft_elp.saved.save import protect_saving

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
BROKEN_CARDS = {
    "broken YAML": b"---\n: [\n---\n# mine\n",
    "not UTF-8": b"---\nlicense: mit\n---\n# m\xff\xfein\n",
    "metadata that are a list": b"---\n- mit\n---\n# mine\n",
    "results of the wrong kind": b"---\nmodel-index: 3\n---\n# mine\n",
    "tags of the wrong kind": b"---\ntags: 3\n---\n# mine\n",
}


def adapted(seed, **config):
    return shaken(get_peft_model(build("wavlm", "ForSequenceClassification"), ELPConfig(**ELP | config)), seed=seed)


@pytest.fixture(scope="module")
def older():
    """Tapped layers differ from those of `newer`, and no shape does."""
    return adapted(1, l_layers=[0, 1], e_activation="relu")


@pytest.fixture(scope="module")
def newer():
    return adapted(2, l_layers=[1, 2], e_activation="gelu")


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def answer(folder):
    return logits(PeftModel.from_pretrained(build("wavlm", "ForSequenceClassification"), folder).eval())


def failing(function, error):
    """The function, which does its work and then fails."""

    def fail(*args, **kwargs):
        function(*args, **kwargs)
        raise error

    return fail


@pytest.mark.parametrize("card", BROKEN_CARDS.values(), ids=BROKEN_CARDS)
def test_a_card_that_cannot_be_read_costs_no_adapter(newer, tmp_path, card):
    (tmp_path / CARD).write_bytes(card)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        newer.save_pretrained(tmp_path)
    torch.testing.assert_close(answer(tmp_path), logits(newer))
    if "tags" not in str(card):  # which PEFT overwrites
        assert (tmp_path / CARD).read_bytes() == card
        assert [str(one.message) for one in caught if "cannot be read as a card" in str(one.message)]
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, WEIGHTS, CARD}


def test_a_card_that_is_a_folder_costs_no_adapter(newer, tmp_path):
    (tmp_path / CARD).mkdir()
    with pytest.warns(UserWarning, match="cannot be read as a card"):
        newer.save_pretrained(tmp_path)
    torch.testing.assert_close(answer(tmp_path), logits(newer))


def test_a_card_that_cannot_be_written_costs_no_adapter(newer, tmp_path, monkeypatch):
    monkeypatch.setattr("peft_elp.saved.card._text", lambda *args: 1 / 0)
    with pytest.warns(UserWarning, match="is saved in .* but its card could not be written: division by zero"):
        newer.save_pretrained(tmp_path)
    torch.testing.assert_close(answer(tmp_path), logits(newer))


@pytest.mark.parametrize("new", [True, False], ids=["new folder", "older adapter"])
@pytest.mark.parametrize("where", ["get_peft_model_state_dict", "safe_save_file", "os.makedirs"])
def test_what_fails_while_saving_leaves_the_folder_as_it_was(older, newer, tmp_path, monkeypatch, where, new):
    folder = tmp_path / "a" / "b"
    if not new:
        older.save_pretrained(folder)
    before = contents(tmp_path)
    holder = os if where == "os.makedirs" else __import__("peft.peft_model", fromlist=["x"])
    name = where.removeprefix("os.")
    with monkeypatch.context() as patched:
        patched.setattr(holder, name, failing(getattr(holder, name), OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            newer.save_pretrained(folder)
    assert contents(tmp_path) == before
    assert folder.exists() != new or not list(folder.iterdir())
    newer.save_pretrained(folder)
    torch.testing.assert_close(answer(folder), logits(newer))


def test_a_configuration_that_json_does_not_take_leaves_the_folder_as_it_was(older, tmp_path):
    older.save_pretrained(tmp_path)
    before = contents(tmp_path)
    model = adapted(3)
    model.peft_config["default"].head_config["num_labels"] = np.ones(2)  # as nothing that checks would let through
    with pytest.raises(TypeError, match="not JSON serializable"):
        model.save_pretrained(tmp_path)
    assert contents(tmp_path) == before
    with pytest.raises(TypeError, match="not JSON serializable"):
        model.peft_config["default"].save_pretrained(tmp_path)
    assert contents(tmp_path) == before


def test_a_save_that_fails_while_files_are_renamed_takes_them_all_back(older, newer, tmp_path, monkeypatch):
    older.save_pretrained(tmp_path)
    before, replace, renamed = contents(tmp_path), os.replace, 0
    for last in range(20):
        count = 0

        def fail(source, target, last=last):
            nonlocal count
            count += 1
            if count == last + 1:
                raise OSError(28, "No space left on device")
            replace(source, target)

        with monkeypatch.context() as patched, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the card could not be written
            patched.setattr(os, "replace", fail)
            try:
                newer.save_pretrained(tmp_path)
            except OSError:
                assert contents(tmp_path) == before
                renamed = last
            else:
                break
    assert renamed >= 5
    torch.testing.assert_close(answer(tmp_path), logits(newer))


@pytest.fixture(scope="module")
def newer_without_peft_model(newer, tmp_path_factory):
    """The same adapter in a model of Transformers, which saves it by its own method."""
    folder = tmp_path_factory.mktemp("newer")
    newer.save_pretrained(folder)
    model = build("wavlm", "ForSequenceClassification")
    model.load_adapter(folder)
    return model


@pytest.mark.parametrize("door", ["PEFT", "Transformers"])
def test_at_no_moment_does_a_folder_load_as_a_mixture_of_two_saves(door, older, request, tmp_path, monkeypatch):
    """The folder as a kill would leave it before each rename: it loads as one of the two, or not at all."""
    if door == "Transformers" and Version(transformers.__version__) < Version("5.20"):
        pytest.skip("Transformers loads no adapter with a head yet")
    newer = request.getfixturevalue("newer" if door == "PEFT" else "newer_without_peft_model")
    folder, replace, moments = tmp_path / "folder", os.replace, []

    def look(source, target):
        moments.append(shutil.copytree(folder, tmp_path / str(len(moments))))
        replace(source, target)

    older.save_pretrained(folder)
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", look)
        newer.save_pretrained(folder)
    answers = {"older": logits(older), "newer": logits(newer)}
    assert not torch.allclose(*answers.values())
    seen = []
    for moment in [*moments, folder]:
        if (moment / CONFIG).exists():
            seen.append(next(name for name, expected in answers.items() if torch.allclose(answer(moment), expected)))
        else:
            seen.append("refused")
            with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
                answer(moment)
            with pytest.raises(ValueError, match=r"holds no adapter: .* A save was cut off: \.saving-"):
                read_adapter(moment)
    assert list(dict.fromkeys(seen)) == ["older", "refused", "newer"]


def test_what_fails_while_transformers_saves_leaves_the_folder_as_it_was(older, tmp_path, monkeypatch):
    older.save_pretrained(tmp_path)
    before = contents(tmp_path)
    model = build("wavlm", "ForSequenceClassification")
    model.add_adapter(ELPConfig(**ELP))
    with monkeypatch.context() as patched:
        patched.setattr(
            "transformers.modeling_utils.safe_save_file", failing(lambda *_, **__: None, OSError(28, "full"))
        )
        with pytest.raises(OSError, match="full"):
            model.save_pretrained(tmp_path)
    assert contents(tmp_path) == before
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(answer(tmp_path), logits(model))


def test_weights_of_the_other_format_do_not_outlive_a_save(older, newer, tmp_path):
    older.save_pretrained(tmp_path)
    newer.save_pretrained(tmp_path, safe_serialization=False)
    torch.testing.assert_close(answer(tmp_path), logits(newer))
    older.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_model.bin").exists()
    torch.testing.assert_close(answer(tmp_path), logits(older))


def test_other_files_and_links_stay_what_they_are(newer, tmp_path):
    folder = tmp_path / "folder"
    (folder / "checkpoint-1").mkdir(parents=True)
    (folder / "checkpoint-1" / CONFIG).write_text("{}")
    (folder / "preprocessor_config.json").write_text("{}")
    (tmp_path / "elsewhere.json").write_text("{}")
    (folder / CONFIG).symlink_to(tmp_path / "elsewhere.json")
    newer.save_pretrained(folder)
    assert (tmp_path / "elsewhere.json").read_text() == "{}"
    assert (folder / "checkpoint-1" / CONFIG).read_text() == "{}"
    assert json.loads((folder / CONFIG).read_text())["peft_type"] == "ELP"


def test_each_of_several_adapters_is_in_its_folder(newer, tmp_path):
    model = adapted(1)
    model.add_adapter("calls", ELPConfig(**ELP))
    describe(model, "calls", seed=4)
    model.save_pretrained(tmp_path)
    files = {CONFIG, WEIGHTS, CARD}
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == files | {
        f"calls/{name}" for name in files
    }
    model.save_pretrained(tmp_path / "one", selected_adapters=["calls"])
    assert "Seed: 4." in (tmp_path / "one/calls/README.md").read_text()
    assert not (tmp_path / "one" / CONFIG).exists()


def test_a_process_that_is_not_the_main_one_writes_nothing(newer, tmp_path):
    newer.save_pretrained(tmp_path, is_main_process=False)
    assert contents(tmp_path) == {}


def test_saving_a_model_of_another_method_is_left_to_peft(tmp_path):
    model = get_peft_model(build("wavlm", "ForCTC"), LoraConfig(target_modules=["intermediate_dense"]))
    model.save_pretrained(tmp_path / "wrapped")
    PeftModel.save_pretrained.before_elp(model, tmp_path / "theirs")
    assert contents(tmp_path / "wrapped") == contents(tmp_path / "theirs")


def test_saving_is_wrapped_once():
    wrapped = PeftModel.save_pretrained
    protect_saving()
    assert PeftModel.save_pretrained is wrapped


def test_a_folder_of_the_configuration_alone_is_written_whole(older, tmp_path):
    ELPConfig(e_dim=4).save_pretrained(tmp_path / "new")
    assert set(contents(tmp_path)) == {f"new/{CONFIG}"}
    assert ELPConfig.from_pretrained(tmp_path / "new").e_dim == 4
    older.save_pretrained(tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / WEIGHTS)
    config = ELPConfig.from_pretrained(tmp_path / "adapter")
    config.verification_threshold = 0.5
    config.save_pretrained(tmp_path / "adapter")
    assert load_file(tmp_path / "adapter" / WEIGHTS).keys() == weights.keys()
    assert ELPConfig.from_pretrained(tmp_path / "adapter").verification_threshold == 0.5
