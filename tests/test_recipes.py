"""The recipes in examples/, in a very short form, on noise and a tiny random encoder."""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import transformers
from backbones import build
from datasets import Dataset
from hub import TOKEN, client, serving
from on_disk import save_whisper
from safetensors.torch import load_file
from transformers import Wav2Vec2FeatureExtractor
from transformers.modeling_outputs import CausalLMOutput

pytest.importorskip("datasets")
pytest.importorskip("jiwer")
pytest.importorskip("matplotlib")

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import compare_methods
import jiwer
import run_emotion_recognition as emotion
import run_intent_classification as intent
import run_speaker_verification as verification
import run_speech_recognition as recognition
import run_speech_recognition_seq2seq as generation

from peft_elp import cli, published_rates, recipes
from peft_elp.recipes import long_recordings
from peft_elp.recipes import verification as training
from peft_elp.recipes.saving import CARD_METRICS
from peft_elp.speech.data import check_audio, check_disjoint, leave_one_group_out, read_dataset, read_trials
from peft_elp.speech.inference import SpeechAdapter
from peft_elp.speech.metrics import equal_error_rate, min_dcf

# The heads of tiny models are not small beside their encoders.
pytestmark = pytest.mark.filterwarnings("ignore:modules_to_save=.* trains and saves:UserWarning")
RATE_HZ = 16_000
ELP = ["--e_dim", "8", "--l_dim", "10", "--p_length", "3"]
METHODS = {"elp": ELP, "lora": ["--method", "lora", "--lora_r", "2"], "full": ["--method", "full"]}
METHODS["head"] = ["--method", "head"]
HARDLY = ["--learning_rate", "1e-6"]  # so that a random head goes on writing something, and not blanks alone
CHUNKS = ["--chunk_length_in_seconds"]
GROUPED = (  # Transformers 5.2 gave it another name
    ["--train_sampling_strategy", "group_by_length"]
    if hasattr(transformers.TrainingArguments, "train_sampling_strategy")
    else ["--group_by_length", "True"]
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    build("wav2vec2", "Model", mask_time_length=2).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """One table: speakers a to d are in training, e and f in test."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for number in range(24):
        speaker, loud = "abcdef"[number // 4], number % 2
        noise = np.random.default_rng(number).normal(0, 0.02 + 0.2 * loud, 1600 + 160 * (number % 5))
        soundfile.write(folder / f"{number}.flac", noise, RATE_HZ)
        rows.append(
            {
                "file_name": f"{number}.flac",
                "split": "train" if number < 16 else "test",
                "speaker_id": speaker,
                "text": ["go on", "a noon"][loud],
                "label": ["quiet", "loud"][loud],
                "emotion": ["calm", "angry"][loud],
                "action": ["open", "close"][loud],
                "object": ["door", ""][number // 2 % 2],
            }
        )
    write(folder / "metadata.csv", rows)
    return folder


def write(path, rows):
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def read(path):
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def run(encoder, data, tmp_path):
    """Runs a recipe for two steps; further arguments come last, and so count."""

    def run(module, *words, dataset=data, folder=tmp_path / "out"):
        argv = ["--model_name_or_path", encoder, "--dataset_name", dataset, "--output_dir", folder, "--max_steps", 2]
        argv += ["--per_device_train_batch_size", 4, "--save_strategy", "no", "--use_cpu", "--learning_rate", "1e-2"]
        metrics = module.main([str(word) for word in [*argv, *words]])
        assert {*metrics} >= {"method", "seed", "train_steps", "trained_parameters_encoder", "trained_parameters_head"}
        saved = json.loads(Path(folder, "all_results.json").read_text())
        assert {key: saved[key] for key in metrics} == metrics
        return metrics, Path(folder)

    return run


@pytest.mark.parametrize("module", [recognition, verification, emotion])
@pytest.mark.parametrize("method", METHODS)
def test_each_method_runs_and_is_saved_in_each_task(method, module, run):
    metrics, folder = run(module, *METHODS[method], *FOLD.get(module, []))
    assert metrics["method"] == method
    name = "adapter_model.safetensors" if method in ("elp", "lora") else "model.safetensors"
    assert next(folder.rglob(name))


FOLD = {emotion: ["--folds", "1"]}


@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_what_it_says_and_nothing_else(method, run, encoder):
    metrics, folder = run(intent, *METHODS[method])
    assert metrics["method"] == method
    assert (metrics["trained_parameters_encoder"] == 0) == (method == "head")
    rows = read(folder / "predictions.csv")
    assert metrics["eval_accuracy"] == np.mean([row["label"] == row["predicted_label"] for row in rows])
    if method in ("elp", "lora"):
        tensors = load_file(folder / "adapter_model.safetensors")
        assert not (folder / "model.safetensors").exists()
        assert sum(map(len, (t.flatten() for t in tensors.values()))) == sum(
            metrics[f"trained_parameters_{part}"] for part in ("encoder", "head")
        )
    else:
        before = transformers.AutoModel.from_pretrained(encoder).state_dict()
        after = transformers.AutoModelForAudioClassification.from_pretrained(folder).wav2vec2.state_dict()
        moved = {name for name in before if not after[name].equal(before[name])}
        expected = {name for name in before if name.startswith("encoder.layers.")} if method == "full" else set()
        assert moved == expected


@pytest.mark.parametrize("method", ["head", "full", "lora"])
def test_the_weights_of_a_weighted_layer_sum_are_trained_or_the_method_is_refused(method):
    model = build("wav2vec2", "ForSequenceClassification", use_weighted_layer_sum=True)
    model_args = recipes.ModelArguments(model_name_or_path="", method=method)
    if method == "lora":
        with pytest.raises(ValueError, match=r"would leave layer_weights .* frozen.*use_weighted_layer_sum=False"):
            recipes.adapt(model, model_args)
    else:
        adapted = recipes.adapt(model, model_args)
        assert "layer_weights" in recipes.trained_parameters(adapted)["head"]


@pytest.mark.parametrize("words", [["--bf16", "True"], ["--bf16", "True", "--dtype", "bfloat16"]])
def test_speakers_are_learned_under_autocast(words, run):
    metrics, _ = run(verification, *ELP, *words)
    assert 0 <= metrics["eval_eer"] <= 1


ONLY_L = ["--adapters", "L", "--train_layer_norms", "False", "--l_dim", "10"]


@pytest.mark.parametrize("module", [recognition, verification, emotion, intent])
def test_training_from_cached_features_gives_the_same_adapter(module, run, tmp_path, capsys):
    options = [*ONLY_L, *FOLD.get(module, []), "--learning_rate", "1e-4"]
    cached, saved = [], []
    for number, words in enumerate([[], ["--cache_features", tmp_path / "features", "--cache_dtype", "float32"]] * 2):
        metrics, folder = run(module, *options, *words, folder=tmp_path / str(number))
        cached.append({name: value for name, value in metrics.items() if name.startswith("eval_")})
        saved.append(load_file(next(folder.rglob("adapter_model.safetensors"))))
    assert "SpecAugment is off" in capsys.readouterr().out
    assert list((tmp_path / "features").rglob("*.safetensors"))
    for name, tensor in saved[1].items():
        assert torch.equal(tensor, saved[3][name])  # The second time, the features are read.
        torch.testing.assert_close(tensor, saved[0][name], rtol=1e-3, atol=1e-4)  # Dropout and SpecAugment are off.


def test_a_folder_holds_all_that_it_takes_to_answer_as_in_the_evaluation(run):
    metrics, folder = run(intent, *ELP, "--slot_column_names", "action", "object")
    there = {path.name for path in folder.iterdir()}
    assert there >= {"adapter_model.safetensors", "preprocessor_config.json", "README.md", "predictions.csv"}
    assert there >= {"layer_weights.png", "pseudo_feature_norms.png", "trainer_state.json"}
    card = (folder / "README.md").read_text()
    assert f"value: {round(metrics['eval_accuracy'], 4)}" in card
    assert "Seed: 42." in card
    rows = read(folder / "predictions.csv")
    answers = SpeechAdapter.from_pretrained(folder).classify([row["file"] for row in rows], top_k=1)
    expected = [f"{row['predicted_action']}, {row['predicted_object']}" for row in rows]
    assert [answer["label"] for (answer,) in answers] == expected
    assert metrics["eval_exact_match"] == metrics["eval_accuracy"] <= metrics["eval_accuracy_action"]


def test_slots_with_classes_of_their_own_answer_any_combination(run, data, tmp_path):
    rows = read(data / "metadata.csv")
    for row in rows:
        row["file_name"] = str(data / row["file_name"])
        row["object"] = row["object"] or "window"
    kept = [row for row in rows if row["split"] == "test" or (row["action"], row["object"]) != ("open", "door")]
    write(tmp_path / "metadata.csv", kept)
    slots = ["--slot_column_names", "action", "object"]
    with pytest.raises(ValueError, match=r"2 of 8 utterances .* such as open, door.*separate"):
        run(intent, *ELP, *slots, dataset=tmp_path)
    metrics, folder = run(intent, *ELP, *slots, "--slot_heads", "separate", dataset=tmp_path)
    right = [
        [row[column] == row[f"predicted_{column}"] for column in ("action", "object")]
        for row in read(folder / "predictions.csv")
    ]
    # Each slot's best label is in the ranking of all.
    for row, labels in zip(
        read(folder / "predictions.csv"),
        SpeechAdapter.from_pretrained(folder).classify([row["file"] for row in read(folder / "predictions.csv")]),
        strict=True,
    ):
        best = dict(label["label"].split(": ") for label in reversed(labels))
        assert best == {column: row[f"predicted_{column}"] for column in ("action", "object")}
    by_slot = [metrics["eval_accuracy_action"], metrics["eval_accuracy_object"]]
    assert by_slot == np.mean(right, axis=0).tolist()
    assert metrics["eval_exact_match"] == np.mean(np.all(right, axis=1))


def test_recognition_is_scored_by_what_it_wrote_and_writes_it_again(run):
    metrics, folder = run(recognition, *ELP, *GROUPED, *HARDLY)
    rows = read(folder / "predictions.csv")
    texts, found = [row["text"] for row in rows], [row["predicted"] for row in rows]
    assert any(found)
    assert metrics["eval_wer"] == jiwer.wer(texts, found)
    assert metrics["eval_cer"] == jiwer.cer(texts, found)
    assert json.loads((folder / "vocab.json").read_text()) == {
        token: number for number, token in enumerate(["[PAD]", "[UNK]", "|", "a", "g", "n", "o"])
    }
    # Rows stay in order where training groups by length; padding changes no text.
    assert SpeechAdapter.from_pretrained(folder).transcribe([row["file"] for row in rows]) == found


@pytest.mark.parametrize("module", [recognition, verification, emotion, intent])
def test_the_command_gives_the_figures_of_the_recipe(module, run, capsys):
    metrics, folder = run(module, *ELP, *HARDLY, *FOLD.get(module, []))
    (folder,) = {path.parent for path in folder.rglob("adapter_config.json")}
    verb = {recognition: "transcribe", verification: "trials"}.get(module, "classify")
    if module is verification:
        words = [folder / "scores.csv"]
    else:
        rows = read(folder / "predictions.csv")
        words = [row["file"] for row in rows]
    capsys.readouterr()
    assert cli.main([verb, *map(str, [folder, *words]), "--batch-size", "3", "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    if module is recognition:
        found, texts = [answer["text"] for answer in answers], [row["text"] for row in rows]
        assert {"wer": jiwer.wer(texts, found), "cer": jiwer.cer(texts, found)} == {
            name: metrics[f"eval_{name}"] for name in ("wer", "cer")
        }
    elif module is verification:
        assert answers[-1]["trials"] == metrics["eval_trials"]
        for name in ("eer", "min_dcf"):
            assert answers[-1][name] == pytest.approx(metrics[f"eval_{name}"])
    else:
        column, name = ("label", "accuracy") if module is intent else ("emotion", "weighted_accuracy")
        right = [answer["labels"][0]["label"] == row[column] for answer, row in zip(answers, rows, strict=True)]
        assert np.mean(right) == metrics[f"eval_{name}"]


def test_a_text_that_does_not_fit_its_frames_is_named_or_left_out(run, data, tmp_path):
    rows = read(data / "metadata.csv")
    rows = [{**row, "file_name": str(data / row["file_name"])} for row in rows]
    rows[3]["text"] = "no" * 60
    write(tmp_path / "metadata.csv", rows)
    with pytest.raises(ValueError, match=r"1 of 16 texts .*\n.*3\.flac: 120 frames needed, 1\d\d? there"):
        run(recognition, *ELP, dataset=tmp_path)
    with pytest.warns(UserWarning, match="left out"):
        run(recognition, *ELP, "--on_long_text", "skip", dataset=tmp_path)


def test_long_recordings_are_refused_or_recognised_in_pieces(run, tmp_path):
    with pytest.raises(ValueError, match="9 of 16 recordings cannot be used: 9 too long"):
        run(recognition, *ELP, "--max_duration_in_seconds", "0.11")
    runs = [
        run(recognition, *METHODS["head"], *HARDLY, *options, folder=tmp_path / name)
        for name, options in {"whole": [], "long pieces": [*CHUNKS, "9"], "pieces": [*CHUNKS, "0.09"]}.items()
    ]
    whole, long_pieces, pieces = ([row["predicted"] for row in read(folder / "predictions.csv")] for _, folder in runs)
    assert whole == long_pieces
    assert any(pieces)


def test_pieces_cover_each_frame_of_a_recording_once(monkeypatch, tmp_path):
    """A model that writes the number of each frame, and not what it hears, writes the same in pieces."""
    model = build("wav2vec2", "ForCTC")
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokenizer = recipes.make_tokenizer([letters], tmp_path)
    hop = model.config.inputs_to_logits_ratio

    def forward(input_values, attention_mask=None):
        assert input_values.shape[1] <= 960
        count = recipes.num_frames(model, input_values.shape[1])
        frames = input_values[0, : count * hop : hop].round().long() // hop % len(letters) + 3
        return CausalLMOutput(logits=torch.nn.functional.one_hot(frames, len(tokenizer)).float()[None])

    monkeypatch.setattr(model, "forward", forward)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True)
    for total in range(1000, 3200, 37):
        clock = np.arange(total, dtype=np.float32)  # each sample tells its time
        monkeypatch.setattr(long_recordings, "decode", lambda audio, rate_hz, clock=clock: clock)
        dataset = Dataset.from_list([{"audio": None}])
        (found,) = recipes.transcribe_long(model, extractor, tokenizer, dataset, chunk_s=0.06)
        assert found == "".join(letters[i % len(letters)] for i in range(recipes.num_frames(model, total)))


def test_pieces_too_short_to_overlap_are_refused(run):
    with pytest.raises(ValueError, match=r"--chunk_length_in_seconds 0\.005 is too short to overlap"):
        run(recognition, *METHODS["head"], *CHUNKS, "0.005")


@pytest.mark.parametrize(
    "options", [[], ["--loss", "softmax"], ["--head", "xvector"]], ids=["am", "softmax", "xvector"]
)
def test_the_error_rates_are_those_of_the_saved_scores_and_of_the_saved_adapter(options, run):
    metrics, folder = run(verification, *ELP, *options)
    rows = read(folder / "scores.csv")
    assert len(rows) == metrics["eval_trials"] == 8 * 7 // 2
    labels, scores = [int(row["label"]) for row in rows], [float(row["score"]) for row in rows]
    assert metrics["eval_eer"] == equal_error_rate(labels, scores)
    assert metrics["eval_min_dcf"] == min_dcf(labels, scores)
    assert (folder / "det.png").stat().st_size > 1000
    voices = SpeechAdapter.from_pretrained(folder)
    for row in rows[:3]:
        assert voices.verify(row["file_a"], row["file_b"]).score == pytest.approx(float(row["score"]), abs=1e-4)


def test_training_is_on_pieces_of_recordings_and_evaluation_on_all_of_them(run, monkeypatch, tmp_path):
    lengths = {True: set(), False: set()}
    embed = training.speaker_embeddings

    def spy(model, **inputs):
        lengths[model.training] |= {*inputs["attention_mask"].sum(-1).tolist()}
        return embed(model, **inputs)

    monkeypatch.setattr(training, "speaker_embeddings", spy)
    for number in range(8):
        waveform = np.random.default_rng(number).normal(0, 0.1, [8000, 9600][number % 2])
        soundfile.write(tmp_path / f"{number}.flac", waveform, RATE_HZ)
    rows = [{"file_name": f"{n}.flac", "split": SPLITS[n // 4], "speaker_id": n // 2} for n in range(8)]
    write(tmp_path / "metadata.csv", rows)
    run(verification, *ELP, "--crop_length_in_seconds", "0.5", dataset=tmp_path)
    assert lengths == {True: {8000}, False: {8000, 9600}}
    with pytest.raises(ValueError, match=r"--crop_length_in_seconds is 0\.5 or more"):
        run(verification, *ELP, "--crop_length_in_seconds", "0.2")


SPLITS = ("train", "test")


def test_an_x_vector_starts_from_finite_weights_whatever_transformers_leaves_there(run, monkeypatch):
    load = verification.AutoModelForAudioXVector.from_pretrained

    def from_pretrained(*args, **kwargs):
        model, report = load(*args, **kwargs)
        model.objective.weight.data.fill_(float("nan"))
        return model, report

    monkeypatch.setattr(verification.AutoModelForAudioXVector, "from_pretrained", from_pretrained)
    metrics, _ = run(verification, *ELP, "--head", "xvector")
    assert 0 <= metrics["eval_eer"] <= 1


def test_trials_that_are_all_alike_are_refused_before_training(run):
    with pytest.raises(ValueError, match="make 0 trials of two speakers and 1 of one"):
        run(verification, *ELP, "--max_eval_samples", "2", "--seed", "3")


def test_trials_and_s_norm_are_taken_from_where_they_are_said_to_be(run, data, tmp_path):
    trials = [{"label": int(a // 4 == b // 4), "file_a": f"{a}.flac", "file_b": f"{b}.flac"} for a, b in PAIRS]
    write(tmp_path / "trials.csv", trials)
    options = ["--trials", tmp_path / "trials.csv", "--trials_folder", data, "--s_norm_cohort", "train"]
    metrics, folder = run(verification, *ELP, *options, "--method", "elp")
    rows = read(folder / "scores.csv")
    assert [int(row["label"]) for row in rows] == [trial["label"] for trial in trials]
    assert metrics["eval_eer_s_norm"] == equal_error_rate(
        [int(row["label"]) for row in rows], [float(row["score_s_norm"]) for row in rows]
    )
    assert metrics["eval_s_norm_cohort"].startswith("16 training utterances")
    write(tmp_path / "trials.csv", [*trials, {"label": 0, "file_a": "3.flac", "file_b": "17.flac"}])
    with pytest.raises(ValueError, match=r"1 recordings of .* are in training, such as .*3\.flac"):
        run(verification, *ELP, *options)


PAIRS = [(16, 17), (16, 18), (16, 20), (17, 21), (18, 22), (20, 23)]


def test_speakers_of_test_that_are_in_training_are_refused(run):
    with pytest.raises(ValueError, match="4 values of the column 'speaker_id' are both in training and in test"):
        run(verification, *ELP, "--eval_split_name", "train")
    with pytest.raises(ValueError, match="4 values of the column 'speaker_id' are both in training and in test"):
        run(emotion, *ELP, "--train_split_name", "train", "--eval_split_name", "train")


def test_emotions_are_measured_on_one_speaker_after_the_other(run):
    metrics, folder = run(emotion, *ELP, "--folds", "2")
    folds = [json.loads((folder / f"fold-{speaker}" / "eval_results.json").read_text()) for speaker in "ab"]
    for name in ("eval_unweighted_accuracy", "eval_weighted_accuracy"):
        values = [fold[name] for fold in folds]
        assert metrics[name] == np.mean(values)
        assert metrics[f"{name}_sd"] == np.std(values, ddof=1)
    rows = read(folder / "fold-a" / "predictions.csv")
    assert [Path(row["file"]).stem for row in rows] == ["0", "1", "2", "3"]
    assert (folder / "confusion.png").is_file()
    assert (folder / "fold-a" / "layer_weights.png").is_file()


def test_unweighted_accuracy_is_the_mean_recall_of_the_classes_that_are_there():
    right, answered = ["a", "a", "a", "b"], ["a", "a", "c", "b"]
    assert emotion.accuracies(right, answered) == {
        "unweighted_accuracy": pytest.approx((2 / 3 + 1) / 2),
        "weighted_accuracy": 0.75,
    }


def test_folds_of_shuffled_utterances_warn_that_speakers_leak(run):
    with pytest.warns(UserWarning, match="test speakers are in training as well"):
        metrics, _ = run(emotion, *METHODS["head"], "--reference_split", "3", "--folds", "1")
    assert "test speakers are in training" in metrics["eval_protocol"]


def test_rates_are_the_published_ones_unless_others_are_given(encoder, data):
    def rates(task, *words):
        names = ["--model_name_or_path", str(encoder), "--dataset_name", str(data)]
        model_args, _, args = recipes.parse_arguments([*names, *words], recipes.DataArguments)
        model = recipes.adapt(build("wav2vec2", "ForCTC"), model_args)
        return recipes.learning_rates(model, model_args, args, task)

    assert rates("asr", "--adapters", "EL") == published_rates("e+l", "asr")
    assert rates("asv") == published_rates("e+l+p", "asv")
    assert rates("er", "--preset", "conventional") == published_rates("conventional", "er")
    only_l = ("--adapters", "L", "--train_layer_norms", "False")
    assert rates("ic", *only_l) == {"head": 5e-4, "L": 1e-4, "layer weights": 1e-4}
    assert rates("ic", *only_l, "--l_learning_rate", "1e-3") == {"head": 5e-4, "L": 1e-3}  # the optimizer decides
    assert rates("ic", *only_l, "--learning_rate", "1e-3") == {"head": 1e-3, "L": 1e-3}
    assert rates("ic", *only_l, "--layer_weights_learning_rate", "1e-2")["layer weights"] == 1e-2
    assert rates("asr", "--method", "full") == {"head": 1e-2, "encoder": 1e-4}
    assert rates("asr", "--method", "head") == {"head": 2e-3}
    assert rates("asr", "--method", "full", "--learning_rate", "1e-3", "--head_learning_rate", "2e-3") == {
        "head": 2e-3,
        "encoder": 1e-3,
    }
    assert rates("asv", "--e_learning_rate", "1e-2")["P"] == 1e-2
    with pytest.raises(ValueError, match="A learning rate is given for 'E'"):
        rates("asr", "--adapters", "L", "--e_learning_rate", "1e-3")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--do_train", "False"], "not used by the HfArgumentParser.*do_train"),
        (["--dataloader_drop_last", "True"], "not used by the HfArgumentParser.*drop_last"),
        (["--language_model", "english.arpa"], "--language_model is used only with --decoder beam"),
        (["--validation_split_name", "test"], "only with --eval_strategy steps or --eval_strategy epoch"),
        (["--lora_r", "4"], "--lora_r is used only with --method lora, and --method is elp"),
        (
            ["--chars_to_ignore", "", "--tokenizer_name_or_path", "UPPER"],
            "lacks characters .* a g n o. If it is in upper",
        ),
        (["--head", "mean", "--loss", "softmax", "--margin", "0.1"], "--margin is used only with --loss"),
        (["--head", "mean", "--s_norm_top_k", "5"], "--s_norm_top_k is used only with --s_norm_cohort"),
        (["--head", "mean", "--s_norm_cohort", "train", "--s_norm_top_k", "17"], "from 2 to the 16 utterances"),
        (["--head", "mean", "--trials_folder", "x"], "--trials_folder is used only with --trials, and"),
        (["--head", "mean", "--trials", "x", "--max_eval_samples", "2"], "only with no --trials, and --trials is x"),
        (["--folds", "2", "--eval_split_name", "test"], "--folds is used only with no --eval_split_name"),
        (["--eval_strategy", "steps"], "the test split must not choose anything"),
        (["--cache_features", "x"], "changes what the encoder computes.*adapters='L', train_layer_norms=False"),
        (["--method", "head", "--cache_features", "x"], "--cache_features is used only with --method elp"),
        (
            ["--head", "mean", "--cache_features", "x", "--crop_length_in_seconds", "1"],
            "--cache_features keeps the features of whole recordings.*--crop_length_in_seconds",
        ),
        (["--cache_dtype", "float32"], "--cache_dtype is used only with --cache_features"),
        (["--method", "lora", "--e_dim", "8"], "--e_dim is used only with --method elp"),
        (["--method", "lora", "--head", "xvector"], "LoRA would train both"),
        (["--decoder", "beam"], "needs pyctcdecode"),
    ],
)
def test_what_cannot_be_meant_is_refused(words, message, run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyctcdecode", None)
    if "UPPER" in words:
        recipes.make_tokenizer(["GO ON", "A NOON"], tmp_path / "UPPER").save_pretrained(tmp_path / "UPPER")
        words = [*words[:-1], tmp_path / "UPPER"]
    module = verification if "--head" in words else emotion if "--folds" in words else recognition
    with pytest.raises((ValueError, ImportError), match=message):
        run(module, *words)


def test_the_best_checkpoint_is_that_of_the_least_error(encoder, data):
    def greater(*words):
        names = ["--model_name_or_path", str(encoder), "--dataset_name", str(data)]
        return recipes.parse_arguments([*names, *words], recipes.DataArguments)[2].greater_is_better

    assert greater("--metric_for_best_model", "wer") is False
    assert greater("--metric_for_best_model", "eval_eer") is False
    assert greater("--metric_for_best_model", "accuracy") is True
    assert greater("--metric_for_best_model", "cer", "--greater_is_better", "True") is True


@pytest.mark.parametrize("module", [recognition, emotion, intent, verification])
def test_accumulated_batches_have_the_loss_of_one_batch(module, run, tmp_path):
    def loss(*words):
        folder = tmp_path / words[-1]
        run(module, *ELP, *HARDLY, "--max_grad_norm", 0, *FOLD.get(module, []), *words, folder=folder)
        history = [json.loads(path.read_text()) for path in folder.rglob("train_results.json")]
        return np.mean([results["train_loss"] for results in history])

    assert loss("--gradient_accumulation_steps", "4") == pytest.approx(loss("--max_steps", "8"), rel=0.25)


@pytest.mark.parametrize("module", [recognition, verification, intent])
def test_a_recording_is_measured_as_it_is_answered_where_padding_would_be_heard(module, run, data, tmp_path, capsys):
    grouped = build("wav2vec2", "Model", mask_time_length=2, feat_extract_norm="group", do_stable_layer_norm=False)
    grouped.save_pretrained(tmp_path / "grouped")
    Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(tmp_path / "grouped")
    _, folder = run(module, *ELP, *HARDLY, "--model_name_or_path", tmp_path / "grouped")
    assert "one recording at a time" in capsys.readouterr().out
    adapter = SpeechAdapter.from_pretrained(folder)
    if module is verification:
        for row in read(folder / "scores.csv"):
            assert adapter.verify(row["file_a"], row["file_b"]).score == pytest.approx(float(row["score"]), abs=1e-4)
        return
    rows = read(folder / "predictions.csv")
    files = [row["file"] for row in rows]
    if module is intent:
        answers = [answer["label"] for (answer,) in adapter.classify(files, top_k=1)]
        assert answers == [row["predicted_label"] for row in rows]
    else:
        assert adapter.transcribe(files) == [row["predicted"] for row in rows]


def test_recordings_inside_of_a_data_set_may_share_the_names_of_their_files(run, data, tmp_path):
    rows = {"train": [], "test": []}
    for row in read(data / "metadata.csv"):
        content = (data / row["file_name"]).read_bytes()
        rows[row["split"]].append({"audio": {"bytes": content, "path": "0001.flac"}, "speaker_id": row["speaker_id"]})
    (tmp_path / "voices/data").mkdir(parents=True)
    for split, found in rows.items():
        Dataset.from_list(found).to_parquet(tmp_path / f"voices/data/{split}-00000-of-00001.parquet")
    options = ["--s_norm_cohort", "train", *HARDLY]
    files, _ = run(verification, *ELP, *options)
    inside, folder = run(verification, *ELP, *options, dataset=tmp_path / "voices", folder=tmp_path / "inside")
    for name in ("eval_trials", "eval_eer", "eval_min_dcf", "eval_eer_s_norm", "eval_s_norm_cohort"):
        assert inside[name] == files[name]
    assert len({row["file_a"] for row in read(folder / "scores.csv")}) == 7


def test_what_was_trained_is_saved_before_it_is_measured_and_metrics_are_reported(run, monkeypatch, tmp_path):
    _, folder = run(intent, *ELP)
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert any("eval_accuracy" in entry for entry in history)

    def fail(*args, **kwargs):
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(recipes.RecipeTrainer, "predict", fail)
    with pytest.raises(RuntimeError, match="the disk is full"):
        run(intent, *ELP, folder=tmp_path / "unmeasured")
    assert SpeechAdapter.from_pretrained(tmp_path / "unmeasured").saved.labels == ["loud", "quiet"]


def test_a_recipe_pushes_what_its_card_names(encoder, data, tmp_path):
    with serving() as hub, client(hub, tmp_path) as there:
        card = there(push_intents, str(encoder), str(data), str(tmp_path / "out"))
    assert 'PeftModel.from_pretrained(base, "me/intents")' in card
    assert "Trained for 2 steps of 8 utterances." in card
    assert re.search(r"^\| data\d* \| test \| accuracy \| [01]\.\d+ \|$", card, re.MULTILINE)


def push_intents(encoder, data, folder):
    from huggingface_hub import hf_hub_download

    words = ["--model_name_or_path", encoder, "--dataset_name", data, "--output_dir", folder, "--max_steps", "2"]
    words += ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--use_cpu", *ELP]
    intent.main(
        [*words, "--save_strategy", "no", "--push_to_hub", "True", "--hub_model_id", "intents", "--hub_token", TOKEN]
    )
    return Path(hf_hub_download("me/intents", "README.md", token=TOKEN)).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("module", [verification, recognition, intent])
def test_two_processes_measure_what_one_does(module, run, encoder, data, tmp_path):
    script = Path(module.__file__)
    launch = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0"
    words = ["--model_name_or_path", encoder, "--dataset_name", data, "--output_dir", tmp_path / "two", *ELP, *HARDLY]
    words += ["--max_steps", 2, "--per_device_train_batch_size", 2, "--per_device_eval_batch_size", 3, "--use_cpu"]
    ran = subprocess.run(
        [sys.executable, "-m", *launch.split(), "--mixed_precision", "no", "--dynamo_backend", "no", script]
        + [str(word) for word in [*words, "--save_strategy", "no"]],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(script.parent.parent), "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    table = "scores.csv" if module is verification else "predictions.csv"
    two = json.loads((tmp_path / "two/all_results.json").read_text())
    one, folder = run(module, *ELP, *HARDLY)
    ours, theirs = read(folder / table), read(tmp_path / "two" / table)
    assert [row.get("file", row.get("file_a")) for row in ours] == [
        row.get("file", row.get("file_a")) for row in theirs
    ]
    if module is verification:
        scores = [[float(row["score"]) for row in rows] for rows in (ours, theirs)]
        assert scores[0] == pytest.approx(scores[1], abs=0.02)
    else:
        same = [row == other for row, other in zip(ours, theirs, strict=True)]
        assert np.mean(same) >= 0.75
    assert {key for key in one if key.startswith("eval_")} <= {*two}


def test_a_validation_split_chooses_the_checkpoint(run, data, tmp_path):
    rows = [{**row, "file_name": str(data / row["file_name"])} for row in read(data / "metadata.csv")]
    for row in rows[12:16]:
        row["split"] = "validation"
    write(tmp_path / "metadata.csv", rows)
    options = [
        "--validation_split_name",
        "validation",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        1,
        "--save_steps",
        1,
    ]
    best = ["--save_strategy", "steps", "--load_best_model_at_end", "True", "--metric_for_best_model", "accuracy"]
    _, folder = run(intent, *ELP, *options, *best, dataset=tmp_path)
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert len([entry for entry in history if "eval_accuracy" in entry]) >= 2
    metrics, _ = run(recognition, *ELP, *options, dataset=tmp_path, folder=tmp_path / "speech")
    assert "eval_wer" in metrics


def test_a_grid_goes_on_where_it_was_stopped_and_tables_mean_and_deviation(tmp_path, capsys):
    script = tmp_path / "task.py"
    script.write_text(
        "import json, sys; from pathlib import Path\n"
        "arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "if arguments['--method'] == 'broken': sys.exit(3)\n"
        "results = {'eval_accuracy': 0.5 + int(arguments['--seed']) / 10}\n"
        "results |= {'trained_parameters_encoder': 1234, 'trained_parameters_head': 5}\n"
        "Path(arguments['--output_dir'], 'all_results.json').write_text(json.dumps(results))\n"
    )
    grid = {"tasks": {"words": f"{script} --steps 3"}, "methods": {"ELP": "--method elp"}, "seeds": [0, 2]}
    words = ["--grid", str(tmp_path / "grid.json"), "--output_dir", str(tmp_path / "runs")]
    Path(words[1]).write_text(json.dumps(grid))
    assert compare_methods.main(words) == 0
    assert "| ELP | 1,234 | 5 | 60.0 ± 14.1 | 2 |" in (tmp_path / "runs" / "table.md").read_text()
    assert capsys.readouterr().out.count(" took ") == 2

    grid["methods"]["new"] = "--method broken"
    Path(words[1]).write_text(json.dumps(grid))
    assert compare_methods.main(words) == 2
    said = capsys.readouterr().out
    assert said.count(" took ") == 0  # what is done is done
    assert said.count("FAILED") == 2
    assert "| new | - | - | - | 0 |" in said


def test_a_grid_has_settings_of_one_method_in_one_task(tmp_path):
    grid = {"tasks": {"a": "a.py", "b": "b.py"}, "methods": {"x": "--x 1", "y": "--y 1"}, "seeds": [0]}
    grid["settings"] = {"b": {"x": "--z 2"}}
    assert [("--z" in run.command) for run in compare_methods.runs_of(grid, tmp_path)] == [False, False, True, False]
    for strange in ({"c": {}}, {"a": {"z": ""}}):
        with pytest.raises(ValueError, match="which is not in"):
            list(compare_methods.runs_of({**grid, "settings": strange}, tmp_path))


def test_the_commands_of_the_page_run_on_synthesised_speech(tmp_path, monkeypatch):
    """In a short form: fewer and less, and two steps."""
    pytest.importorskip("espeakng_loader")
    import make_demo_data

    page = (Path(__file__).parent.parent / "docs/how-to/recipes.md").read_text()
    block = page.split("```sh\n")[1].split("```")[0].replace("\\\n", "")
    commands = [shlex.split(line)[1:] for line in block.splitlines()]
    modules = [recognition, verification, emotion, intent]
    scripts = [Path(module.__file__).name for module in [make_demo_data, *modules]]
    assert [command[0] for command in commands] == [f"examples/{script}" for script in scripts]
    monkeypatch.chdir(tmp_path)
    make_demo_data.main([*commands[0][1:], *SMALL])
    for module, command in zip(modules, commands[1:], strict=True):
        short = ["--max_steps", "2", "--save_strategy", "no", "--use_cpu", "--per_device_train_batch_size", "4", *ELP]
        metrics = module.main([*command[1:], *short])
        assert any(f"eval_{measure}" in metrics for measure in CARD_METRICS)
        assert next(tmp_path.rglob(f"{command[-1]}/**/adapter_model.safetensors"))


def test_every_command_of_the_page_is_understood():
    pages = [Path(__file__).parent.parent / "docs/how-to" / name for name in ("recipes.md", "fine-tune-whisper.md")]
    page = "\n".join(page.read_text() for page in pages).replace("\\\n", "")
    kinds = {
        generation: generation.RecognitionArguments,
        recognition: recognition.RecognitionArguments,
        verification: verification.VerificationArguments,
        emotion: emotion.EmotionArguments,
        intent: intent.IntentArguments,
    }
    by_script = {f"examples/{Path(module.__file__).name}": module for module in kinds}
    commands = [shlex.split(line) for line in page.splitlines() if line.startswith("python examples/run_")]
    assert len(commands) >= 10
    for _, script, *words in commands:
        module = by_script[script]
        others = [recipes.Seq2SeqRecipeTrainingArguments] if module is generation else []
        recipes.parse_arguments(words, kinds[module], *others)


SMALL = ["--num_clips", "24", "--num_voices", "6", "--num_pretraining_words", "6", "--pretraining_steps", "1"]
SMALL += ["--pretraining_words_per_clip", "2"]


def test_demo_data_are_what_the_recipes_take_and_are_made_once(tmp_path, capsys):
    pytest.importorskip("espeakng_loader")
    import make_demo_data

    words = ["--output_dir", str(tmp_path), "--num_clips", "24", "--num_voices", "6"]
    words += ["--num_pretraining_words", "6", "--pretraining_steps", "1"]
    make_demo_data.main(words)
    for name in ("sentences", "speakers", "intents"):
        train, test = (read_dataset(tmp_path / name, split) for split in ("train", "test"))
        check_audio(train)
        check_disjoint(train, test, "speaker_id")
    trials = read_trials(tmp_path / "speakers" / "trials.csv")
    assert {trial.label for trial in trials} == {0, 1}
    folds = [held_out for held_out, *_ in leave_one_group_out(read_dataset(tmp_path / "emotions", None), "speaker_id")]
    assert len(folds) == 6
    transformers.AutoModelForCTC.from_pretrained(tmp_path / "encoder")
    capsys.readouterr()
    make_demo_data.main(words)
    assert capsys.readouterr().out.count(" is there") == 5


# Whisper and other families ------------------------------------------------------------------------------------------

FAMILIES = {
    "whisper": ("WhisperForAudioClassification", "WhisperConfig", {"d_model": 16, "encoder_ffn_dim": 32}),
    "wav2vec2": ("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", {"hidden_size": 16, "intermediate_size": 32}),
    "w2v-bert": (
        "Wav2Vec2BertForSequenceClassification",
        "Wav2Vec2BertConfig",
        {"hidden_size": 16, "intermediate_size": 32},
    ),
}
FEED_FORWARD = {"whisper": ("fc1", "fc2"), "wav2vec2": ("feed_forward",), "w2v-bert": ("ffn1", "ffn2")}


def classifier(family):
    model_class, config_class, sizes = FAMILIES[family]
    depth = {"encoder_layers": 2, "num_hidden_layers": 2, "encoder_attention_heads": 2, "num_attention_heads": 2}
    depth = depth if family == "whisper" else {key: depth[key] for key in ("num_hidden_layers", "num_attention_heads")}
    config = getattr(transformers, config_class)(**sizes, **depth, layerdrop=0.0, classifier_proj_size=12)
    return getattr(transformers, model_class)(config)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_the_same_places_in_every_family(method, family):
    words = ["--model_name_or_path", "x", "--dataset_name", "x", "--use_cpu", *METHODS[method]]
    model_args, *_ = recipes.parse_arguments(words, recipes.DataArguments)
    model = recipes.adapt(classifier(family), model_args)
    trained = recipes.trained_parameters(model)
    heads = {"projector", "classifier"}
    assert {name.removeprefix("base_model.model.").split(".")[0] for name in trained["head"]} == heads
    encoder = [name.removeprefix("base_model.model.") for name in trained["encoder"]]
    if method == "head":
        assert not encoder
    elif method == "full":
        every = [name for name, _ in model.named_parameters() if ".layers." in name]
        assert every
        assert sorted(encoder) == sorted(every)
    elif method == "lora":
        linear = [name for name, module in classifier(family).named_modules() if isinstance(module, torch.nn.Linear)]
        expected = {name for name in linear if any(f".{part}" in name for part in FEED_FORWARD[family])}
        assert {name.split(".lora_")[0] for name in encoder} == expected
    else:
        assert {part for name in encoder for part in ("elp_e", "elp_l", "elp_p", "elp_norm") if part in name} == {
            "elp_e", "elp_l", "elp_p", "elp_norm"
        }  # fmt: skip
        assert all("elp_" in name for name in encoder)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    return save_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.mark.parametrize("module", [verification, emotion, intent])
def test_a_checkpoint_in_half_precision_with_a_fixed_window_is_trained_in_float32(module, run, whisper):
    words = [*ELP, "--model_name_or_path", whisper, *FOLD.get(module, [])]
    metrics, folder = run(module, *words)
    assert metrics["trained_parameters_encoder"] > 0
    (saved,) = folder.rglob("adapter_model.safetensors")
    assert {str(tensor.dtype) for tensor in load_file(saved).values()} == {"torch.float32"}
    history = json.loads((saved.parent / "trainer_state.json").read_text())["log_history"]
    assert all(np.isfinite(entry["train_loss"]) for entry in history if "train_loss" in entry)


def test_a_model_may_be_trained_in_its_own_data_type(run, whisper):
    metrics, _ = run(intent, *ELP, "--model_name_or_path", whisper, "--dtype", "bfloat16")
    assert 0 <= metrics["eval_accuracy"] <= 1


def test_recordings_longer_than_a_fixed_window_are_not_cut_off_unnoticed(run, whisper, tmp_path):
    rows = []
    for number in range(4):
        soundfile.write(tmp_path / f"{number}.flac", np.random.default_rng(number).normal(0, 0.1, 17_000), RATE_HZ)
        rows.append({"file_name": f"{number}.flac", "split": SPLITS[number // 2], "label": "ab"[number % 2]})
    write(tmp_path / "metadata.csv", rows)
    with pytest.raises(ValueError, match=r"1\.1 s is longer than the 1 s that the encoder takes"):
        run(intent, *ELP, "--model_name_or_path", whisper, dataset=tmp_path)


@pytest.mark.parametrize("method", ["elp", "lora", "full"])
def test_a_model_with_a_decoder_is_measured_by_what_it_writes(method, run, whisper, capsys):
    # The random base writes nothing; it does with an adapter whose output takes the place of the encoder's.
    words = ["--l_output", "project"] if method == "elp" else []
    metrics, folder = run(generation, *METHODS[method], *words, "--model_name_or_path", whisper)
    rows = read(folder / "predictions.csv")
    normalize = recipes.make_normalizer(None)
    texts, found = ([normalize(row[column]) for row in rows] for column in ("text", "predicted"))
    assert any(found)
    assert metrics["eval_wer"] == jiwer.wer(texts, found)
    assert metrics["eval_cer"] == jiwer.cer(texts, found)
    assert metrics["eval_wer_before"] > 0
    assert (metrics["trained_parameters_head"] > 0) == (method == "full")
    assert "LOAD REPORT" not in "".join(capsys.readouterr())


def test_what_a_decoder_wrote_in_the_evaluation_is_what_the_saved_adapter_writes(run, whisper):
    beams = ["--generation_num_beams", 5]  # as in Transformers' pipeline
    _, folder = run(generation, *ELP, "--model_name_or_path", whisper, "--measure_before", "False", *beams)
    rows = read(folder / "predictions.csv")
    adapter = SpeechAdapter.from_pretrained(folder, device="cpu")
    adapter.model.float()  # as in the training; the checkpoint is in half precision
    assert adapter.transcribe([row["file"] for row in rows]) == [row["predicted"] for row in rows]


def test_generated_text_chooses_the_checkpoint(run, whisper, data, tmp_path):
    rows = [{**row, "file_name": str(data / row["file_name"])} for row in read(data / "metadata.csv")]
    for row in rows[12:16]:
        row["split"] = "validation"
    write(tmp_path / "metadata.csv", rows)
    words = ["--validation_split_name", "validation", "--eval_strategy", "steps", "--eval_steps", 1]
    _, folder = run(generation, *ELP, "--model_name_or_path", whisper, *words, dataset=tmp_path)
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert sum("eval_wer" in entry and "eval_loss" in entry for entry in history) == 2


def test_a_decoder_has_no_head_to_train_alone(run, whisper):
    with pytest.raises(ValueError, match="--method head has nothing to train in WhisperForConditionalGeneration"):
        run(generation, *METHODS["head"], "--model_name_or_path", whisper)


def test_labels_begin_after_the_start_token_and_end_with_the_end_token(whisper):
    model = transformers.WhisperForConditionalGeneration.from_pretrained(whisper)
    tokenizer = transformers.AutoTokenizer.from_pretrained(whisper)
    (label,) = recipes.make_labels(model, tokenizer, ["go on"])
    assert label[0] == 13  # <|notimestamps|>
    assert label[-1] == 12
    assert label.count(12) == 1
    assert 14 not in label
    assert tokenizer.decode(label[1:], skip_special_tokens=True) == "go on"
    with pytest.raises(ValueError, match="and the decoder has 448 positions"):
        recipes.make_labels(model, tokenizer, ["on " * 448])


def test_a_language_is_for_models_of_many_languages(whisper):
    model = transformers.WhisperForConditionalGeneration.from_pretrained(whisper)
    tokenizer = transformers.AutoTokenizer.from_pretrained(whisper)
    with pytest.raises(ValueError, match="takes no --language"):
        recipes.set_language(model, tokenizer, "de", "transcribe")
    model.generation_config.is_multilingual = True
    with pytest.raises(ValueError, match="Name one with --language"):
        recipes.set_language(model, tokenizer, None, "transcribe")


def test_a_head_of_another_size_is_made_new_and_an_encoder_is_not(run, encoder, tmp_path, capsys):
    _, folder = run(intent, *METHODS["full"], "--slot_column_names", "action", "object")
    capsys.readouterr()
    run(emotion, *ELP, *FOLD[emotion], "--model_name_or_path", folder, folder=tmp_path / "again")
    said = capsys.readouterr()
    assert "New in Wav2Vec2ForSequenceClassification: classifier" in said.out
    assert "LOAD REPORT" not in said.err
    config = json.loads((encoder / "config.json").read_text()) | {"intermediate_size": 40}
    broken = tmp_path / "broken"
    shutil.copytree(encoder, broken)
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"has no weights that fit .* tensors of the encoder layers"):
        run(intent, *ELP, "--model_name_or_path", broken)


@pytest.fixture
def wide_whisper(whisper, tmp_path):
    """The same checkpoint for windows of three seconds."""
    model = transformers.WhisperForConditionalGeneration.from_pretrained(whisper).float()
    model.model.encoder.embed_positions = torch.nn.Embedding(150, 16)
    model.config.max_source_positions = 150
    for part in (model, transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=3)):
        part.save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


@pytest.mark.parametrize("module", [verification, emotion, intent])
def test_a_shorter_window_is_used_again_by_the_saved_adapter(module, run, wide_whisper):
    words = [*ELP, "--model_name_or_path", wide_whisper, "--chunk_length", 1, *FOLD.get(module, [])]
    _, folder = run(module, *words)
    (folder,) = {path.parent for path in folder.rglob("adapter_config.json")}
    adapter = SpeechAdapter.from_pretrained(folder, device="cpu")
    assert adapter.feature_extractor.n_samples == RATE_HZ
    assert adapter.model.get_base_model().config.max_source_positions == 50
    if module is verification:
        row = read(folder / "scores.csv")[0]
        assert adapter.verify(row["file_a"], row["file_b"]).score == pytest.approx(float(row["score"]), abs=1e-4)
    else:
        rows = read(folder / "predictions.csv")
        column = "predicted_label" if module is intent else "predicted"
        answers = adapter.classify([row["file"] for row in rows], top_k=1)
        assert [answer["label"] for (answer,) in answers] == [row[column] for row in rows]
    with pytest.raises(ValueError, match="trained on a window of 1 s"):
        adapter.read(np.zeros(RATE_HZ + 1, dtype=np.float32), RATE_HZ)
    (folder / "preprocessor_config.json").unlink()  # as a plain save_pretrained leaves the folder
    assert SpeechAdapter.from_pretrained(folder, device="cpu").feature_extractor.n_samples == RATE_HZ


@pytest.mark.parametrize("method", ["lora", "full", "head"])
def test_every_method_takes_a_shorter_window(method, run, wide_whisper):
    words = ["--model_name_or_path", wide_whisper, "--chunk_length", 1]
    _, folder = run(intent, *METHODS[method], *words)
    if method != "lora":
        saved = transformers.AutoModelForAudioClassification.from_pretrained(folder)
        assert saved.config.max_source_positions == 50
        assert saved.encoder.embed_positions.weight.shape == (50, 16)


@pytest.mark.parametrize("method", ["elp", "lora", "full"])
def test_a_shorter_window_is_refused_where_text_is_generated(method, run, whisper):
    with pytest.raises(
        ValueError, match=r"chunk_length=1 would break the text that .*ForConditionalGeneration generates"
    ):
        run(generation, *METHODS[method], "--model_name_or_path", whisper, "--chunk_length", "1")


def test_a_shorter_window_is_for_encoders_with_a_fixed_one(run):
    with pytest.raises(ValueError, match="takes recordings of any length"):
        run(intent, *ELP, "--chunk_length", "1")


def encoder_with_decoder(family):
    """A tiny random model of a family whose decoder writes letters, and its feature extractor."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 15}
    tokens = {"pad_token_id": 12, "eos_token_id": 12, "bos_token_id": 14, "decoder_start_token_id": 14}
    if family == "moonshine":
        for part in ("encoder", "decoder"):
            sizes |= {f"{part}_num_hidden_layers": 2, f"{part}_num_attention_heads": 2}
        model = transformers.MoonshineForConditionalGeneration(transformers.MoonshineConfig(**sizes, **tokens))
        return model, Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True)
    sizes = {"d_model": 16, "vocab_size": 15}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 2, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 24}
    if family == "speech2text":
        config = transformers.Speech2TextConfig(**sizes, **tokens, input_feat_per_channel=80, conv_channels=16)
        model = transformers.Speech2TextForConditionalGeneration(config)
        return model, transformers.Speech2TextFeatureExtractor(feature_size=80, num_mel_bins=80)
    encoder = build("wav2vec2", "Model", mask_time_length=2)
    config = transformers.BartConfig(**sizes, is_decoder=True, add_cross_attention=True)
    model = transformers.SpeechEncoderDecoderModel(encoder=encoder, decoder=transformers.BartForCausalLM(config))
    model.config.update(tokens)
    model.generation_config.update(**tokens)
    return model, Wav2Vec2FeatureExtractor(return_attention_mask=True)


@pytest.mark.parametrize("family", ["moonshine", "speech2text", "speech-encoder-decoder"])
def test_other_families_with_a_decoder_are_trained_alike(family, run, whisper, tmp_path):
    model, extractor = encoder_with_decoder(family)
    model.generation_config.update(max_new_tokens=8)
    for part in (model, extractor, transformers.AutoTokenizer.from_pretrained(whisper)):
        part.save_pretrained(tmp_path / "base")
    metrics, folder = run(generation, *ELP, "--model_name_or_path", tmp_path / "base")
    assert metrics["trained_parameters_encoder"] > 0
    assert len(read(folder / "predictions.csv")) == 8
    assert next(folder.rglob("adapter_model.safetensors"))
