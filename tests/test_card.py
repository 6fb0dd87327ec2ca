"""A saved adapter has a card: what it is, whose it is, what was measured, and code that runs."""

import ast
import re
import shlex
from dataclasses import replace
from email.message import Message
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import torch
from backbones import ELP, build, shaken
from huggingface_hub import ModelCard
from on_disk import EER, LABELS, adapted, save_base, save_tokenizer, save_whisper
from peft import get_peft_model
from transformers import (
    AutoTokenizer,
    WavLMForCTC,
    WhisperFeatureExtractor,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
    pipeline,
)

import peft_elp
from peft_elp import ELPConfig, count_parameters, describe
from peft_elp.saved.card import MARK, read_results, write_card
from peft_elp.speech.inference import SpeechAdapter
from peft_elp.speech.plots import layer_weights

# PEFT asks the Hub, where these tests cannot reach it, whether a base has another vocabulary.
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in :UserWarning")
HUB_BASE = "microsoft/wavlm-base-plus"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


def from_the_hub(head="ForSequenceClassification", **options):
    """A model that says its base is on the Hub."""
    backbone = build("wavlm", head)
    backbone.name_or_path = backbone.config._name_or_path = HUB_BASE
    return get_peft_model(backbone, ELPConfig(**ELP), **options)


def card(folder):
    return ModelCard.load(Path(folder, "README.md"))


def code(folder):
    (snippet,) = re.findall(r"```python\n(.*?)```", card(folder).text, re.DOTALL)
    return snippet


@pytest.mark.parametrize(
    ("head", "says"),
    [
        ("ForCTC", r"[abcd <>/spadunk]*"),
        ("ForCTC without a tokenizer", r"tensor\(\[\[.*"),
        ("ForSequenceClassification", "|".join(LABELS)),
        ("ForAudioFrameClassification", r"torch.Size\(\[1, \d+, 4\]\)"),
        ("ForXVector", r"torch.Size\(\[1, 12\]\)"),
        ("Model", r"torch.Size\(\[1, \d+, 24\]\)"),
    ],
)
def test_the_code_of_the_card_runs_and_gives_what_the_trained_model_gives(
    base, tmp_path, monkeypatch, capsys, head, says
):
    model = adapted(base, head.split()[0])
    if head == "ForCTC":
        save_tokenizer(tmp_path / "mine")
    model.save_pretrained(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    Path(Path(base).name).symlink_to(base)  # The card names the last part of its path.
    assert str(Path(base).parent) not in card("mine").text
    names = {}
    exec(code("mine"), names)
    assert re.fullmatch(says, capsys.readouterr().out.strip(), re.DOTALL)
    assert ("no tokenizer was saved" in code("mine")) == ("without" in head)
    with torch.no_grad():
        expected = model(**names["inputs"])
        torch.testing.assert_close(names["model"](**names["inputs"])[0], expected[0])
    data = card("mine").data.to_dict()  # The base is not on the Hub.
    assert "base_model" not in data
    assert not any(tag.startswith("base_model:") for tag in data["tags"])


def test_the_code_of_the_card_and_a_pipeline_run_on_a_float16_base_with_a_window(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    whisper = WhisperForAudioClassification.from_pretrained(
        save_whisper(tmp_path / "base"), dtype=torch.float32, id2label=dict(enumerate(LABELS))
    )
    WhisperFeatureExtractor(feature_size=8, chunk_length=2).save_pretrained("base")  # longer than the adapter's window
    model = shaken(get_peft_model(whisper, ELPConfig(**ELP | {"adapters": "EL"}, chunk_length=1))).eval()
    model.save_pretrained("mine")
    names = {}
    exec(code("mine"), names)
    assert capsys.readouterr().out.strip() in LABELS
    torch.testing.assert_close(names["logits"], model(**names["inputs"]).logits)
    assert 'from_pretrained("base", chunk_length=1, return_attention_mask=True)' in code("mine")
    assert "Labels: yes, no, stop." in card("mine").text
    assert "Window: recordings of at most 1 s." in card("mine").text
    adapter = SpeechAdapter.from_pretrained("mine", device="cpu")
    name = pipeline("audio-classification", "mine", feature_extractor=adapter.feature_extractor, device="cpu")
    noise = np.random.default_rng(0).normal(scale=0.1, size=8000).astype(np.float32)
    scores = {one["label"]: one["score"] for one in name(noise)}
    assert scores == {one["label"]: pytest.approx(one["score"], abs=0.02) for one in adapter.classify(noise, 16000)}


def test_the_code_of_the_card_of_a_model_that_generates_text_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    whisper = WhisperForConditionalGeneration.from_pretrained(save_whisper(tmp_path / "base"), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained("base")
    tokenizer.save_pretrained("mine")  # before the adapter, whose card looks for it
    model = shaken(get_peft_model(whisper, ELPConfig(**ELP))).eval()
    model.save_pretrained("mine")
    names = {}
    exec(code("mine"), names)
    tokens = model.generate(**names["inputs"])
    assert capsys.readouterr().out == tokenizer.batch_decode(tokens)[0] + "\n"


@pytest.mark.parametrize("url", [None, "https://example.org/peft_elp"])
def test_the_card_says_how_to_install_and_where_the_repository_is_once_it_is_known(tmp_path, monkeypatch, url):
    known = Message()
    known["Project-URL"] = f"Repository, {url}" if url else "Paper, https://arxiv.org/abs/2407.21066"
    monkeypatch.setattr("peft_elp.saved.card.metadata", lambda _: known)
    from_the_hub().save_pretrained(tmp_path)
    text = card(tmp_path).text
    assert f"pip install 'peft_elp-{peft_elp.__version__}-py3-none-any.whl[recipes]'" in text
    assert (f"pip install 'peft-elp[recipes] @ git+{url}'" in text) == bool(url)
    assert re.findall(r"^- (\S+) \d", text, re.MULTILINE) == ["PEFT", "peft-elp", "transformers", "torch"]


def test_the_metadata_say_base_library_and_task(tmp_path):
    from_the_hub("ForCTC").save_pretrained(tmp_path)
    tags = [f"base_model:adapter:{HUB_BASE}", "elp", "peft-elp", "transformers"]
    expected = {"base_model": HUB_BASE, "library_name": "peft", "pipeline_tag": "automatic-speech-recognition"}
    assert card(tmp_path).data.to_dict() == {**expected, "tags": tags}


def test_the_card_counts_each_part_and_shows_the_layer_weights(base, tmp_path):
    model = adapted(base, "ForSequenceClassification")
    (tmp_path / "layer_weights.png").write_bytes(b"")
    model.save_pretrained(tmp_path)
    text = card(tmp_path).text
    counts = count_parameters(model)
    rows = dict(re.findall(r"^\| (E|L|P|layer norms|head|all) \| ([\d,]+) \|", text, re.MULTILINE))
    counts["all"] = sum(counts.values())
    assert {part: int(count.replace(",", "")) for part, count in rows.items()} == counts
    weights = re.search(r"^\| weight \| (.*) \|$", text, re.MULTILINE)
    assert [float(share) for share in weights[1].split(" | ")] == pytest.approx(
        [share for _, share in layer_weights(model)], abs=1e-3
    )
    assert "![layer_weights](layer_weights.png)" in text


def test_what_was_described_is_in_the_card(tmp_path):
    model = from_the_hub()
    describe(
        model,
        repo_id="me/voices",
        language="en",
        license="mit",
        datasets=["ProgramComputer/voxceleb"],
        metrics=[replace(EER, metric_value=np.float64(2.630001))],
        protocol="AM-Softmax.",
        training={"epochs": 6, "learning rate": np.float32(0.5)},
        seed=7,
    )
    model.save_pretrained(tmp_path / "any-name")
    data, text = card(tmp_path / "any-name").data, card(tmp_path / "any-name").text
    assert data.eval_results == read_results(tmp_path / "any-name") == [EER]
    assert data.model_name == "voices"
    assert (data.language, data.license, data.metrics) == ("en", "mit", ["eer"])
    assert data.datasets == ["ProgramComputer/voxceleb"]
    assert 'PeftModel.from_pretrained(base, "me/voices")' in text
    assert data.training == {"epochs": 6, "learning rate": 0.5}
    for line in ("AM-Softmax.", "Settings: epochs 6, learning rate 0.5.", "Seed: 7.", "Licence: mit."):
        assert line in text
    assert "| VoxCeleb1 | test | eer | 2.63 |" in text


def test_an_edited_card_stays_once_the_line_of_the_mark_is_removed(tmp_path):
    model = from_the_hub()
    describe(model, seed=1)
    model.save_pretrained(tmp_path)
    generated = (tmp_path / "README.md").read_text()
    assert generated.count(MARK) == 1
    (tmp_path / "README.md").write_text(generated.replace(MARK, "").replace("## Use", "## Usage"))
    edited = card(tmp_path)
    with pytest.warns(UserWarning, match="its card is your own and stays as it is, without what `describe` says"):
        model.save_pretrained(tmp_path)
    assert card(tmp_path).text.strip() == edited.text.strip()
    assert not write_card(tmp_path)


def test_a_generated_card_is_written_anew_and_keeps_metadata_that_were_added(tmp_path):
    model = from_the_hub()
    describe(model, datasets=["me/calls"], metrics=[EER])
    model.save_pretrained(tmp_path)
    first = (tmp_path / "README.md").read_text()
    # PEFT adds the line of its version, if it is another one.
    (tmp_path / "README.md").write_text(first.replace("- PEFT ", "- PEFT 0.99.0\n- PEFT ").replace("## Use", "## X"))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == first
    (tmp_path / "README.md").write_text(first.replace("---\n", "---\nlicense: mit\nlanguage: en\n", 1))
    describe(model, seed=3)
    model.save_pretrained(tmp_path)
    assert (card(tmp_path).data.license, card(tmp_path).data.language) == ("mit", "en")
    assert "Seed: 3." in card(tmp_path).text
    assert read_results(tmp_path) == []
    assert card(tmp_path).data.datasets is None


def test_a_card_of_ones_own_stays_as_peft_leaves_it_and_one_that_cannot_be_read_gives_no_results(tmp_path):
    for text in ("---\nlicense: mit\n---\n# Mine\n\n### Framework versions\n\n- PEFT 0.1\n", "# Mine"):
        (tmp_path / "README.md").write_text(text)
        from_the_hub().save_pretrained(tmp_path)
        assert card(tmp_path).text.startswith("# Mine")
        assert "ELP" not in card(tmp_path).text
        assert card(tmp_path).data.license == ("mit" if "mit" in text else None)
    for text in ("---\nmodel-index: 3\n---\n# x\n", "---\n: [\n---\n# x\n"):
        (tmp_path / "README.md").write_text(text)
        assert read_results(tmp_path) == []


def test_each_of_several_adapters_has_its_own_card(tmp_path):
    model = from_the_hub(adapter_name="calls")
    model.add_adapter("studio", ELPConfig(**ELP | {"e_dim": 4}))
    describe(model, "calls", repo_id="me/both", seed=1)
    model.save_pretrained(tmp_path)
    assert 'from_pretrained(base, "me/both", subfolder="calls")' in code(tmp_path / "calls")
    assert "Seed: 1." in card(tmp_path / "calls").text
    assert "bottleneck of 4" in card(tmp_path / "studio").text
    assert "Seed" not in card(tmp_path / "studio").text


def test_an_adapter_from_transformers_own_door_gets_its_card_on_demand(base, tmp_path):
    model = WavLMForCTC.from_pretrained(base)
    model.add_adapter(ELPConfig(**ELP))
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()
    assert write_card(tmp_path)
    assert card(tmp_path).data.pipeline_tag == "automatic-speech-recognition"


HOSTILE = "a|b\n| c | <script>x</script> [d](javascript:alert(1)) `e` &lt; $f$"


def test_names_and_results_of_strangers_stay_within_their_cells(tmp_path):
    model = from_the_hub()
    names = ("dataset_name", "dataset_split", "metric_name", "metric_value", "metric_config")
    describe(model, datasets=[HOSTILE], metrics=[replace(EER, **dict.fromkeys(names, HOSTILE))])
    model.save_pretrained(tmp_path)
    text = card(tmp_path).text
    assert "<script>" not in text
    assert not re.search(r"(?<!\\)\]\(javascript", text)
    (row,) = [line for line in text.splitlines() if line.startswith(r"| a\|")]
    assert len(re.findall(r"(?<!\\)\|", row)) == 5
    assert row.count("&lt;script&gt;x&lt;/script&gt; \\[d\\](javascript:alert(1)) \\`e\\` &amp;lt; \\$f\\$") == 4
    assert card(tmp_path).data.datasets == [HOSTILE]
    assert read_results(tmp_path)[0].dataset_name == HOSTILE


@pytest.mark.parametrize("base", ['x"); import os; os.abort() #', "x'\n```\nimport os", "a`b", "C:\\models\\base"])
def test_a_base_with_any_name_is_a_string_in_the_code(tmp_path, base):
    model = from_the_hub()
    model.peft_config["default"].base_model_name_or_path = base
    describe(model, repo_id='me/"voices" $(x)')
    model.save_pretrained(tmp_path)
    calls = [node for node in ast.walk(ast.parse(code(tmp_path))) if isinstance(node, ast.Call)]
    loaded = [call for call in calls if getattr(call.func, "attr", "") == "from_pretrained"]
    loaded.sort(key=lambda call: call.lineno)
    name = PureWindowsPath(base).name  # no path of the writer's disk
    assert [ast.literal_eval(call.args[-1]) for call in loaded] == [name, 'me/"voices" $(x)', name]
    (command,) = re.findall(r"^peft-elp .*$", card(tmp_path).text, re.MULTILINE)
    assert shlex.split(command) == ["peft-elp", "classify", 'me/"voices" $(x)', "a.wav", "b.wav"]
    code_spans = re.findall(r"(?<!`)(`+)(?!`) ?(.*?) ?(?<!`)\1(?!`)", card(tmp_path).text.split("## Use")[0])
    assert code_spans[0][1] == " ".join(name.split())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"adapter_name": "other"}, ValueError, r"no adapter 'other'; the model has 'default'"),
        ({"datasets": "a/b"}, TypeError, r"Write datasets=\['a/b'\]"),
        ({"metrics": [{"eer": 2}]}, TypeError, r"huggingface_hub.EvalResult objects, got \[\{'eer': 2\}\]"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        describe(from_the_hub(), **options)
