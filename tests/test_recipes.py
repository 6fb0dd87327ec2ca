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
from types import ModuleType

import numpy as np
import pytest
import soundfile
import torch
import transformers
from backbones import build
from datasets import Dataset
from families import FAMILIES
from hub import TOKEN, client, serving
from on_disk import record, save_base, save_whisper
from safetensors.torch import load_file
from transformers import Wav2Vec2FeatureExtractor

pytest.importorskip("jiwer")
pytest.importorskip("matplotlib")

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import jiwer
import run_emotion_recognition as emotion
import run_intent_classification as intent
import run_speaker_verification as verification
import run_speech_recognition as recognition
import run_speech_recognition_seq2seq as generation

import peft_elp_command as cli
from peft_elp import published_factors, published_rates, recipes
from peft_elp.recipes import verification as training
from peft_elp.recipes.rates import schedule_factors
from peft_elp.recipes.saving import CARD_METRICS
from peft_elp.speech.data import check_disjoint, read_dataset
from peft_elp.speech.inference import SpeechAdapter
from peft_elp.speech.metrics import equal_error_rate, min_dcf

# The heads of tiny models are not small beside their encoders.
ROOT = Path(__file__).parent.parent
RATE_HZ = 16_000
TASKS = [recognition, verification, emotion, intent]
ELP = ["--e_dim", "8", "--l_dim", "10", "--p_length", "3"]
METHODS = {"elp": ELP, "lora": ["--method", "lora", "--lora_r", "2"], "full": ["--method", "full"]}
METHODS["head"] = ["--method", "head"]
HARDLY = ["--learning_rate", "1e-6"]  # so that a random head goes on writing something, and not blanks alone
SLOTS = ["--slot_column_names", "action", "object"]
GROUPED = ["--train_sampling_strategy", "group_by_length"]
if not hasattr(transformers.TrainingArguments, "train_sampling_strategy"):  # Transformers 5.2 gave it another name.
    GROUPED = ["--group_by_length", "True"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return Path(save_base(tmp_path_factory.mktemp("encoder"), "wav2vec2", mask_time_length=2))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """One table: speakers a to d are in training, e and f in test."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for number in range(24):
        loud = number % 2
        noise = np.random.default_rng(number).normal(0, 0.02 + 0.2 * loud, 1600 + 160 * (number % 5))
        soundfile.write(folder / f"{number}.flac", noise, RATE_HZ)
        row = {"file_name": str(folder / f"{number}.flac"), "split": "train" if number < 16 else "test"}
        row |= {"speaker_id": "abcdef"[number // 4], "text": ["go on", "a noon"][loud]}
        row |= {"label": ["quiet", "loud"][loud], "emotion": ["calm", "angry"][loud]}
        rows.append(row | {"action": ["open", "close"][loud], "object": ["door", ""][number // 2 % 2]})
    write(folder, rows)
    return folder


def write(folder, rows, name="metadata.csv"):
    with (folder / name).open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return folder


def read(path):
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def trained(encoder, data, tmp_path_factory):
    """Runs a recipe for two steps, once for the same arguments; further arguments come last, and so count."""
    ran: dict[tuple, tuple] = {}

    def run(module: ModuleType, *words, dataset=data, folder=None):
        key = (module, *map(str, words), dataset, folder)
        if key not in ran:
            folder = folder or tmp_path_factory.mktemp("out")
            argv = ["--model_name_or_path", encoder, "--dataset_name", dataset, "--output_dir", folder]
            argv += ["--max_steps", 2, "--per_device_train_batch_size", 4, "--save_strategy", "no", "--use_cpu"]
            argv += ["--learning_rate", "1e-2", *words]
            if module is emotion and not {"--folds", "--eval_split_name"} & {*words}:
                argv += ["--folds", 1]
            if module in (emotion, intent) and (dataset / "metadata.csv").is_file():  # The table has both.
                argv += ["--label_column_name", "emotion" if module is emotion else "label"]
            metrics = module.main([str(word) for word in argv])
            held = {"method", "seed", "train_steps", "trained_parameters_encoder", "trained_parameters_head"}
            assert held <= {*metrics}
            saved = json.loads(Path(folder, "all_results.json").read_text())
            assert {key: saved[key] for key in metrics} == metrics
            ran[key] = metrics, Path(folder)
        return ran[key]

    return run


def options(encoder, data, *words):
    words = ["--model_name_or_path", str(encoder), "--dataset_name", str(data), *map(str, words)]
    return recipes.parse_arguments(words, recipes.DataArguments)


def validated(data, folder):
    """The same table, with a validation split."""
    rows = read(data / "metadata.csv")
    for row in rows[12:16]:
        row["split"] = "validation"
    return write(folder, rows)


# Methods -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_what_it_says_in_each_task_and_nothing_else(method, module, trained, encoder):
    metrics, folder = trained(module, *METHODS[method])
    assert metrics["method"] == method
    assert (metrics["trained_parameters_encoder"] == 0) == (method == "head")
    name = "adapter_model.safetensors" if method in ("elp", "lora") else "model.safetensors"
    (saved,) = folder.rglob("*model.safetensors")
    assert saved.name == name
    if method in ("elp", "lora"):
        bias = 4 if module is verification else 0  # It is saved and not trained: angles have none.
        count = sum(tensor.numel() for name, tensor in load_file(saved).items() if "settings" not in name) - bias
        assert count == sum(metrics[f"trained_parameters_{part}"] for part in ("encoder", "head"))
    else:
        before, after = transformers.AutoModel.from_pretrained(encoder).state_dict(), load_file(saved)
        moved = {name for name in before if not after[f"wav2vec2.{name}"].equal(before[name])}
        assert moved == {name for name in before if method == "full" and name.startswith("encoder.layers.")}
    if module is intent:
        rows = read(folder / "predictions.csv")
        assert metrics["eval_accuracy"] == np.mean([row["label"] == row["predicted_label"] for row in rows])


SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
OF_WHISPER = {"d_model": 16, "encoder_ffn_dim": 32, "encoder_layers": 2, "encoder_attention_heads": 2}
PLACES = {"Whisper": ("ForAudioClassification", OF_WHISPER, ("fc1", "fc2"))}
PLACES["Wav2Vec2"] = ("ForSequenceClassification", SMALL, ("feed_forward",))
PLACES["Wav2Vec2Bert"] = ("ForSequenceClassification", SMALL, ("ffn1", "ffn2"))


@pytest.mark.parametrize("family", PLACES)
@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_the_same_places_in_every_family(method, family):
    head, sizes, feed_forward = PLACES[family]
    config = getattr(transformers, f"{family}Config")(**sizes, layerdrop=0.0, classifier_proj_size=12)
    model = getattr(transformers, family + head)(config)
    expected = {"head": set(), "elp": {"elp_e", "elp_l", "elp_p", "elp_norm"}}
    expected["full"] = {name for name, _ in model.named_parameters() if ".layers." in name}
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    expected["lora"] = {name for name in linear if any(f".{part}" in name for part in feed_forward)}
    parts = recipes.trained_parameters(recipes.adapt(model, options("x", "x", "--use_cpu", *METHODS[method])[0]))
    names = {part: [name.removeprefix("base_model.model.") for name in held] for part, held in parts.items()}
    assert {name.split(".")[0] for name in names["head"]} == {"projector", "classifier"}
    found = {re.search(r"elp_[a-z]+", name)[0] if method == "elp" else name for name in names["encoder"]}
    assert {name.split(".lora_")[0] for name in found} == expected[method]


def test_the_weights_of_a_weighted_layer_sum_are_trained_or_the_method_is_refused():
    for method in ("head", "full", "lora"):
        model = build("wav2vec2", "ForSequenceClassification", use_weighted_layer_sum=True)
        model_args = recipes.ModelArguments(model_name_or_path="", method=method)
        if method == "lora":
            with pytest.raises(ValueError, match=r"would leave layer_weights .* frozen.*use_weighted_layer_sum=False"):
                recipes.adapt(model, model_args)
        else:
            assert "layer_weights" in recipes.trained_parameters(recipes.adapt(model, model_args))["head"]


def test_adapters_that_get_no_gradient_stop_the_training(trained, tmp_path):
    """WavLM's attention reads its weights without calling their modules, so LoRA there never trains."""
    words = [*METHODS["lora"], "--lora_target_modules", "q_proj", "v_proj"]
    with pytest.raises(RuntimeError, match=r"12 trained parameters got no gradient .*v_proj\.lora_A"):
        trained(intent, *words, "--model_name_or_path", save_base(tmp_path, mask_time_length=2))


def test_rates_and_factors_are_the_published_ones_unless_others_are_given(encoder, data):
    def rates(task, *words):
        model_args, _, args = options(encoder, data, *words)
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
    given = ["--learning_rate", "1e-3", "--head_learning_rate", "2e-3"]
    assert rates("asr", "--method", "full", *given) == {"head": 2e-3, "encoder": 1e-3}
    assert rates("asv", "--e_learning_rate", "1e-2")["P"] == 1e-2
    with pytest.raises(ValueError, match="A learning rate is given for 'E'"):
        rates("asr", "--adapters", "L", "--e_learning_rate", "1e-3")


@pytest.mark.parametrize("task", ["asr", "asv"])
def test_the_published_schedule_is_that_of_the_setting(task, encoder, data):
    settings = {f"--preset {name}": name for name in ("conventional", "e-only", "l-only", "e+l", "e+l+p")}
    for words, setting in (settings | {"--adapters E": "e-only", "--method full": "e+l"}).items():
        model = recipes.adapt(build("wav2vec2", "ForCTC"), options(encoder, data, *words.split())[0])
        assert schedule_factors(model, task) == published_factors(setting, task), words


# Training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--bf16", "True"], ["--bf16", "True", "--dtype", "bfloat16"]])
def test_speakers_are_learned_under_autocast(words, trained):
    metrics, _ = trained(verification, *ELP, *words)
    assert 0 <= metrics["eval_eer"] <= 1


@pytest.mark.parametrize("module", [recognition, verification, intent])
def test_training_from_cached_features_gives_the_same_adapter(module, trained, tmp_path, capsys):
    only_l = ["--adapters", "L", "--train_layer_norms", "False", "--l_dim", "10", "--learning_rate", "1e-4"]
    cached = ["--cache_features", tmp_path / "features", "--cache_dtype", "float32"]
    folders = [trained(module, *only_l, *words)[1] for words in ([], cached, [*cached, "--logging_steps", "7"])]
    live, written, again = (load_file(next(folder.rglob("adapter_model.safetensors"))) for folder in folders)
    assert "SpecAugment is off" in capsys.readouterr().out
    assert list((tmp_path / "features").rglob("*.safetensors"))
    for name, tensor in written.items():
        assert torch.equal(tensor, again[name])  # The second time, the features are read.
        torch.testing.assert_close(tensor, live[name], rtol=1e-3, atol=1e-4)  # Dropout and SpecAugment are off.


@pytest.mark.parametrize("module", [recognition, verification, intent])
def test_accumulated_batches_have_the_loss_of_one_batch(module, trained):
    def loss(*words):
        _, folder = trained(module, *ELP, *HARDLY, "--max_grad_norm", 0, *words)
        return np.mean([json.loads(path.read_text())["train_loss"] for path in folder.rglob("train_results.json")])

    assert loss("--gradient_accumulation_steps", "4") == pytest.approx(loss("--max_steps", "8"), rel=0.25)


def test_training_is_on_pieces_of_recordings_and_evaluation_on_all_of_them(trained, monkeypatch, tmp_path):
    lengths = {True: set(), False: set()}
    embed = training.speaker_embeddings

    def spy(model, **inputs):
        lengths[model.training] |= {*inputs["attention_mask"].sum(-1).tolist()}
        return embed(model, **inputs)

    monkeypatch.setattr(training, "speaker_embeddings", spy)
    files = [record(tmp_path / f"{n}.wav", [8000, 9600][n % 2], seed=n) for n in range(8)]
    rows = [
        {"file_name": file, "split": ["train", "test"][n // 4], "speaker_id": n // 2} for n, file in enumerate(files)
    ]
    trained(verification, *ELP, "--crop_length_in_seconds", "0.5", dataset=write(tmp_path, rows))
    assert lengths == {True: {8000}, False: {8000, 9600}}


def test_the_best_checkpoint_is_that_of_the_least_error(encoder, data):
    def greater(*words):
        return options(encoder, data, "--metric_for_best_model", *words)[2].greater_is_better

    assert [greater(name) for name in ("wer", "eval_eer", "accuracy")] == [False, False, True]
    assert greater("cer", "--greater_is_better", "True") is True


@pytest.mark.parametrize("module", [intent, emotion, verification])
def test_labels_are_smoothed_in_every_loss_of_classes(module, trained, tmp_path):
    losses = {}
    for factor in (0, 0.5):
        words = [*ELP, "--label_smoothing_factor", factor, "--logging_steps", 1]
        _, folder = trained(module, *words, folder=tmp_path / str(factor))
        state = next(iter(sorted(folder.rglob("trainer_state.json"))))
        losses[factor] = json.loads(state.read_text())["log_history"][0]["loss"]
    assert losses[0] != pytest.approx(losses[0.5], rel=1e-7)


def test_a_training_that_gets_no_better_stops_early(trained, data, tmp_path):
    words = [*ELP, "--validation_split_name", "validation", "--eval_strategy", "steps", "--eval_steps", 1]
    words += ["--save_strategy", "steps", "--save_steps", 1, "--load_best_model_at_end", "True", "--max_steps", 9]
    words += ["--early_stopping_patience", 2, "--learning_rate", 1e-9, "--metric_for_best_model", "accuracy"]
    _, folder = trained(intent, *words, dataset=validated(data, tmp_path))
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 3


@pytest.mark.parametrize("module", [recognition, intent, generation])
def test_a_validation_split_chooses_the_checkpoint(module, trained, whisper, data, tmp_path):
    words = [*ELP, "--validation_split_name", "validation", "--eval_strategy", "steps", "--eval_steps", 1]
    if module is intent:
        words += ["--save_strategy", "steps", "--save_steps", 1, "--load_best_model_at_end", "True"]
        words += ["--metric_for_best_model", "accuracy"]
    elif module is generation:
        words += ["--model_name_or_path", whisper]
    _, folder = trained(module, *words, dataset=validated(data, tmp_path))
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    measured = "eval_accuracy" if module is intent else "eval_wer"
    assert sum(measured in entry and "eval_loss" in entry for entry in history) == 2


def test_what_was_trained_is_saved_before_it_is_measured_and_metrics_are_reported(trained, monkeypatch, tmp_path):
    _, folder = trained(intent, *ELP)
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert any("eval_accuracy" in entry for entry in history)

    def fail(*args, **kwargs):
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(recipes.RecipeTrainer, "predict", fail)
    with pytest.raises(RuntimeError, match="the disk is full"):
        trained(intent, *ELP, folder=tmp_path / "unmeasured")
    assert SpeechAdapter.from_pretrained(tmp_path / "unmeasured").saved.labels == ["loud", "quiet"]


def test_two_processes_measure_what_one_does(trained, encoder, data, tmp_path):
    launch = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0"
    launch += f" --mixed_precision no --dynamo_backend no {verification.__file__}"
    words = ["--model_name_or_path", encoder, "--dataset_name", data, "--output_dir", tmp_path, *ELP, *HARDLY]
    words += ["--max_steps", 2, "--per_device_train_batch_size", 2, "--per_device_eval_batch_size", 3, "--use_cpu"]
    ran = subprocess.run(
        [sys.executable, "-m", *launch.split(), *map(str, words), "--save_strategy", "no"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    one, folder = trained(verification, *ELP, *HARDLY)
    assert {key for key in one if key.startswith("eval_")} <= {
        *json.loads((tmp_path / "all_results.json").read_text())
    }
    ours, theirs = read(folder / "scores.csv"), read(tmp_path / "scores.csv")
    assert [row["file_a"] for row in ours] == [row["file_a"] for row in theirs]
    scores = [[float(row["score"]) for row in rows] for rows in (ours, theirs)]
    assert scores[0] == pytest.approx(scores[1], abs=0.02)


# Results -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", TASKS)
def test_the_command_gives_the_figures_of_the_recipe(module, trained, capsys):
    # Rows stay in order where training groups by length.
    metrics, folder = trained(module, *ELP, *HARDLY, *(GROUPED if module is recognition else []))
    (folder,) = {path.parent for path in folder.rglob("adapter_config.json")}
    assert {"preprocessor_config.json", "layer_weights.png"} <= {path.name for path in folder.iterdir()}
    verb = {recognition: "transcribe", verification: "trials"}.get(module, "classify")
    rows = [] if module is verification else read(folder / "predictions.csv")
    words = [row["file"] for row in rows] or [folder / "scores.csv"]
    capsys.readouterr()
    assert cli.main([verb, *map(str, [folder, *words]), "--batch-size", "3", "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    if module is recognition:
        found, texts = [answer["text"] for answer in answers], [row["text"] for row in rows]
        assert any(found)
        assert found == [row["predicted"] for row in rows]
        rates = {"eval_wer": jiwer.wer(texts, found), "eval_cer": jiwer.cer(texts, found)}
        assert rates == {name: metrics[name] for name in rates}
        vocabulary = json.loads((folder / "vocab.json").read_text())
        assert sorted(vocabulary, key=vocabulary.get) == ["[PAD]", "[UNK]", "|", "a", "g", "n", "o"]
    elif module is verification:
        assert answers[-1]["trials"] == metrics["eval_trials"]
        for name in ("eer", "min_dcf"):
            assert answers[-1][name] == pytest.approx(metrics[f"eval_{name}"])
    else:
        column, name = ("label", "accuracy") if module is intent else ("emotion", "weighted_accuracy")
        right = [answer["labels"][0]["label"] == row[column] for answer, row in zip(answers, rows, strict=True)]
        assert np.mean(right) == metrics[f"eval_{name}"]


def test_slots_with_classes_of_their_own_answer_any_combination(trained, data, tmp_path):
    rows = read(data / "metadata.csv")
    for row in rows:
        row["object"] = row["object"] or "window"
    kept = [row for row in rows if row["split"] == "test" or (row["action"], row["object"]) != ("open", "door")]
    write(tmp_path, kept)
    with pytest.raises(ValueError, match=r"2 of 8 utterances .* such as open, door.*separate"):
        trained(intent, *ELP, *SLOTS, dataset=tmp_path)
    metrics, folder = trained(intent, *ELP, *SLOTS, "--slot_heads", "separate", dataset=tmp_path)
    rows = read(folder / "predictions.csv")
    right = [[row[column] == row[f"predicted_{column}"] for column in ("action", "object")] for row in rows]
    answers = SpeechAdapter.from_pretrained(folder).classify([row["file"] for row in rows])
    for row, labels in zip(rows, answers, strict=True):  # Each slot's best label is in the ranking of all.
        best = dict(label["label"].split(": ") for label in reversed(labels))
        assert best == {column: row[f"predicted_{column}"] for column in ("action", "object")}
    by_slot = [metrics["eval_accuracy_action"], metrics["eval_accuracy_object"]]
    assert by_slot == np.mean(right, axis=0).tolist()
    assert metrics["eval_exact_match"] == np.mean(np.all(right, axis=1))


@pytest.mark.parametrize("module", [recognition, verification, intent])
def test_a_recording_is_measured_as_it_is_answered_where_padding_would_be_heard(module, trained, tmp_path, capsys):
    options = {"mask_time_length": 2, "feat_extract_norm": "group", "do_stable_layer_norm": False}
    save_base(tmp_path, "wav2vec2", return_attention_mask=False, **options)
    _, folder = trained(module, *ELP, *HARDLY, "--model_name_or_path", tmp_path)
    assert "one recording at a time" in capsys.readouterr().out
    answers_as_measured(module, folder)


def answers_as_measured(module, folder, **settings):
    """A saved adapter gives the answers that the recipe wrote into its table."""
    (folder,) = {path.parent for path in folder.rglob("adapter_config.json")}
    adapter = SpeechAdapter.from_pretrained(folder, **settings)
    if module is verification:
        for row in read(folder / "scores.csv")[:3]:
            assert adapter.verify(row["file_a"], row["file_b"]).score == pytest.approx(float(row["score"]), abs=1e-4)
        return adapter
    rows = read(folder / "predictions.csv")
    if module in (recognition, generation):
        adapter.model.float()  # as in the training; a checkpoint may be in half precision
        found = adapter.transcribe([row["file"] for row in rows])
    else:
        found = [best["label"] for (best,) in adapter.classify([row["file"] for row in rows], top_k=1)]
    assert found == [row["predicted_label" if module is intent else "predicted"] for row in rows]
    return adapter


def test_a_recipe_pushes_what_its_card_names(encoder, data, tmp_path):
    with serving() as hub, client(hub, tmp_path) as there:
        card = there(push_intents, str(encoder), str(data), str(tmp_path / "out"))
    assert 'PeftModel.from_pretrained(base, "me/intents")' in card
    assert "Trained for 2 steps of 8 utterances." in card
    assert "Seed: 42." in card
    assert re.search(r"^Settings: epochs 1\.0, rate of head 0\.0005, .*rate of E 1e-05", card, re.MULTILINE)
    assert re.search(r"^\| data\d* \| test \| accuracy \| [01]\.\d+ \|$", card, re.MULTILINE)


def push_intents(encoder, data, folder):
    from huggingface_hub import hf_hub_download

    words = ["--model_name_or_path", encoder, "--dataset_name", data, "--output_dir", folder, "--max_steps", "2"]
    words += ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--use_cpu", *ELP]
    words += ["--push_to_hub", "True", "--hub_model_id", "intents", "--hub_token", TOKEN]
    intent.main([*words, "--label_column_name", "label", "--save_strategy", "no"])
    return Path(hf_hub_download("me/intents", "README.md", token=TOKEN)).read_text()


# Recognition ---------------------------------------------------------------------------------------------------------


def test_a_text_that_does_not_fit_its_frames_is_named_or_left_out(trained, data, tmp_path):
    rows = read(data / "metadata.csv")
    rows[3]["text"] = "no" * 60
    write(tmp_path, rows)
    with pytest.raises(ValueError, match=r"1 of 16 texts .*\n.*3\.flac: 120 frames needed, 1\d\d? there"):
        trained(recognition, *ELP, dataset=tmp_path)
    with pytest.warns(UserWarning, match="left out"):
        trained(recognition, *ELP, "--on_long_text", "skip", dataset=tmp_path)


def test_long_recordings_are_recognised_in_pieces(trained):
    runs = [
        trained(recognition, *METHODS["head"], *HARDLY, *words)
        for words in ([], ["--chunk_length_in_seconds", "9"], ["--chunk_length_in_seconds", "0.09"])
    ]
    whole, long_pieces, pieces = ([row["predicted"] for row in read(folder / "predictions.csv")] for _, folder in runs)
    assert whole == long_pieces
    assert any(pieces)


# Verification --------------------------------------------------------------------------------------------------------


HEADS = {"am": ["--classifier_proj_size", "6"], "softmax": ["--loss", "softmax"], "xvector": ["--head", "xvector"]}


@pytest.mark.parametrize("words", HEADS.values(), ids=HEADS)
def test_the_error_rates_are_those_of_the_saved_scores_and_of_the_saved_adapter(words, trained, monkeypatch):
    def load_model(*args):
        model = load(*args)
        if "xvector" in words:  # Some versions of Transformers leave new weights as the memory was.
            model.objective.weight.data.fill_(float("nan"))
        return model

    load = recipes.load_model
    monkeypatch.setattr(recipes, "load_model", load_model)
    metrics, folder = trained(verification, *ELP, *words)
    rows = read(folder / "scores.csv")
    assert len(rows) == metrics["eval_trials"] == 8 * 7 // 2
    labels, scores = [int(row["label"]) for row in rows], [float(row["score"]) for row in rows]
    assert metrics["eval_eer"] == equal_error_rate(labels, scores)
    assert metrics["eval_min_dcf"] == min_dcf(labels, scores)
    assert (folder / "det.png").stat().st_size > 1000
    adapter = answers_as_measured(verification, folder)
    assert adapter.embed(rows[0]["file_a"]).shape == ((6,) if "6" in words else (12,))


def test_trials_and_s_norm_are_taken_from_where_they_are_said_to_be(trained, data, tmp_path):
    pairs = [(16, 17), (16, 18), (16, 20), (17, 21), (18, 22), (20, 23)]
    trials = [{"label": int(a // 4 == b // 4), "file_a": f"{a}.flac", "file_b": f"{b}.flac"} for a, b in pairs]
    write(tmp_path, trials, "trials.csv")
    words = ["--trials", tmp_path / "trials.csv", "--trials_folder", data, "--s_norm_cohort", "train"]
    metrics, folder = trained(verification, *ELP, *words)
    rows = read(folder / "scores.csv")
    labels = [int(row["label"]) for row in rows]
    assert labels == [trial["label"] for trial in trials]
    assert metrics["eval_eer_s_norm"] == equal_error_rate(labels, [float(row["score_s_norm"]) for row in rows])
    assert metrics["eval_s_norm_cohort"].startswith("16 training utterances")
    write(tmp_path, [*trials, {"label": 0, "file_a": "3.flac", "file_b": "17.flac"}], "trials.csv")
    with pytest.raises(ValueError, match=r"1 recordings of .* are in training, such as .*3\.flac"):
        trained(verification, *ELP, *words, "--seed", "1")


def test_recordings_inside_of_a_data_set_may_share_the_names_of_their_files(trained, data, tmp_path):
    rows = {"train": [], "test": []}
    for row in read(data / "metadata.csv"):
        sound = {"bytes": Path(row["file_name"]).read_bytes(), "path": "0001.flac"}
        rows[row["split"]].append({"audio": sound, "speaker_id": row["speaker_id"]})
    (tmp_path / "data").mkdir()
    for split, found in rows.items():
        Dataset.from_list(found).to_parquet(tmp_path / f"data/{split}-00000-of-00001.parquet")
    words = ["--s_norm_cohort", "train", *HARDLY]
    files, _ = trained(verification, *ELP, *words)
    inside, folder = trained(verification, *ELP, *words, dataset=tmp_path)
    for name in ("eval_trials", "eval_eer", "eval_min_dcf", "eval_eer_s_norm", "eval_s_norm_cohort"):
        assert inside[name] == files[name]
    assert len({row["file_a"] for row in read(folder / "scores.csv")}) == 7


# Emotions ------------------------------------------------------------------------------------------------------------


def test_emotions_are_measured_on_one_speaker_after_the_other(trained):
    metrics, folder = trained(emotion, *ELP, "--folds", "2")
    folds = [json.loads((folder / f"fold-{speaker}" / "eval_results.json").read_text()) for speaker in "ab"]
    for name in ("eval_unweighted_accuracy", "eval_weighted_accuracy"):
        values = [fold[name] for fold in folds]
        assert (metrics[name], metrics[f"{name}_sd"]) == (np.mean(values), np.std(values, ddof=1))
    rows = read(folder / "fold-a" / "predictions.csv")
    assert [Path(row["file"]).stem for row in rows] == ["0", "1", "2", "3"]
    assert (folder / "confusion.png").is_file()
    recall = (2 / 3 + 1) / 2  # of the classes that are there
    expected = {"unweighted_accuracy": pytest.approx(recall), "weighted_accuracy": 0.75}
    assert emotion.accuracies(["a", "a", "a", "b"], ["a", "a", "c", "b"]) == expected


def test_emotions_are_read_from_folders_and_one_adapter_is_trained_on_all_of_them(trained, tmp_path):
    for number in range(12):
        (folder := tmp_path / ["calm", "angry"][number % 2] / "abc"[number // 4]).mkdir(parents=True, exist_ok=True)
        record(folder / f"{number}.wav", 4_000, seed=number)
    words = [*METHODS["head"], "--folds", "2"]
    metrics, folder = trained(emotion, *ELP, "--folds", "2", "--final", dataset=tmp_path)
    card = (folder / "final" / "README.md").read_text()
    assert f"{metrics['eval_unweighted_accuracy']:.4g}" in card
    assert "measured on a fold that it was not trained on: a, b" in card
    assert len(SpeechAdapter.from_pretrained(folder / "final").classify(str(next(tmp_path.rglob("*.wav"))))) == 2
    metrics, folder = trained(emotion, *words, "--measure_on", "validation", dataset=tmp_path)
    assert metrics["eval_folds"] == "b, c"
    assert {Path(row["file"]).parent.name for row in read(folder / "fold-b" / "predictions.csv")} == {"b"}


def test_folds_of_shuffled_utterances_warn_that_speakers_leak(trained):
    with pytest.warns(UserWarning, match="test speakers are in training as well"):
        metrics, _ = trained(emotion, *METHODS["head"], "--reference_split", "3")
    assert "test speakers are in training" in metrics["eval_protocol"]


# Options -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "words", "message"),
    [
        (recognition, "--do_train False", "not used by the HfArgumentParser.*do_train"),
        (recognition, "--dataloader_drop_last True", "not used by the HfArgumentParser.*drop_last"),
        (recognition, "--validation_split_name test", "only with --eval_strategy steps or --eval_strategy epoch"),
        (recognition, "--lora_r 4", "--lora_r is used only with --method lora, and --method is elp"),
        (recognition, "--eval_strategy steps", "the test split must not choose anything"),
        (recognition, "--cache_features x", "changes what the encoder computes.*adapters='L', train_layer_norms=Fal"),
        (recognition, "--method head --cache_features x", "--cache_features is used only with --method elp"),
        (recognition, "--cache_dtype float32", "--cache_dtype is used only with --cache_features"),
        (recognition, "--method lora --e_dim 8", "--e_dim is used only with --method elp"),
        (recognition, "--max_duration_in_seconds 0.11", "9 of 16 recordings are longer than 0.11 s, .*--on_long"),
        (recognition, "--method head --chunk_length_in_seconds 0.005", "must be long enough to overlap, got 0.005"),
        (recognition, "--label_smoothing_factor 0.1", "smooths classes, and is not used for recognition"),
        (recognition, "--early_stopping_patience 3", "is used only with --load_best_model_at_end"),
        (verification, "--loss softmax --margin 0.1", "--margin is used only with --loss"),
        (verification, "--s_norm_top_k 5", "--s_norm_top_k is used only with --s_norm_cohort"),
        (verification, "--s_norm_cohort train --s_norm_top_k 17", "must be from 2 to the 16 training utterances"),
        (verification, "--trials_folder x", "--trials_folder is used only with --trials, and"),
        (verification, "--trials x --max_eval_samples 2", "only with no --trials, and --trials is x"),
        (verification, "--cache_features x --crop_length_in_seconds 1", "--cache_features needs whole recordings.*"),
        (verification, "--method lora --head xvector", "LoRA would train both"),
        (verification, "--head xvector --classifier_proj_size 8", "is used only with --head mean, and --head is xvec"),
        (verification, "--max_eval_samples 2 --seed 3", "make 0 trials of two speakers and 1 of one"),
        (verification, "--crop_length_in_seconds 0.2", "--crop_length_in_seconds must be at least 0.5, got 0.2"),
        (verification, "--eval_split_name train", "4 values of the column 'speaker_id' are both in training and in"),
        (emotion, "--train_split_name train --eval_split_name train", "4 values of the column 'speaker_id' are both"),
        (emotion, "--folds 2 --eval_split_name test", "--folds is used only with no --eval_split_name"),
        (intent, "--chunk_length 1", "takes recordings of any length"),
        (generation, "--method head", "--method head has nothing to train in WhisperForConditionalGeneration"),
        (generation, "--chunk_length 1", "chunk_length=1 would break the text that .*Generation generates"),
        (generation, "--chunk_length 1 --method full", "chunk_length=1 would break the text that .* generates"),
        (generation, "--language de", "knows a single language. Remove --language"),
    ],
)
def test_what_cannot_be_meant_is_refused(module, words, message, trained, whisper):
    base = ["--model_name_or_path", whisper] if module is generation else []
    with pytest.raises(ValueError, match=message):
        trained(module, *words.split(), *base)


def test_a_vocabulary_must_have_the_characters_of_the_text(trained, tmp_path):
    recipes.make_tokenizer(["GO ON", "A NOON"], tmp_path).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks characters .* a g n o. If it is in upper"):
        trained(recognition, "--chars_to_ignore", "", "--tokenizer_name_or_path", tmp_path)


def test_a_head_of_another_size_is_made_new_and_an_encoder_is_not(trained, encoder, tmp_path, capsys):
    _, folder = trained(intent, *METHODS["full"], *SLOTS)
    capsys.readouterr()
    trained(emotion, *ELP, "--model_name_or_path", folder)
    said = capsys.readouterr()
    assert "New in Wav2Vec2ForSequenceClassification: classifier" in said.out
    assert "LOAD REPORT" not in said.err
    broken = shutil.copytree(encoder, tmp_path / "broken")
    config = json.loads((encoder / "config.json").read_text()) | {"intermediate_size": 40}
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"has no weights that fit .* tensors of the encoder layers"):
        trained(intent, *ELP, "--model_name_or_path", broken)


# The page ------------------------------------------------------------------------------------------------------------


def test_every_command_of_the_pages_is_understood():
    pages = [ROOT / "docs/how-to" / name for name in ("recipes.md", "fine-tune-whisper.md", "feature-cache.md")]
    page = "\n".join(page.read_text() for page in pages).replace("\\\n", "")
    kinds = {generation: generation.RecognitionArguments, recognition: recognition.RecognitionArguments}
    kinds |= {emotion: emotion.EmotionArguments, intent: intent.IntentArguments}
    kinds[verification] = verification.VerificationArguments
    by_script = {f"examples/{Path(module.__file__).name}": module for module in kinds}
    commands = [shlex.split(line) for line in page.splitlines() if line.startswith("python examples/run_")]
    assert len(commands) >= 11
    for _, script, *words in commands:
        module = by_script[script]
        others = [recipes.Seq2SeqRecipeTrainingArguments] if module is generation else []
        recipes.parse_arguments(words, kinds[module], *others)


def test_the_commands_of_the_page_run_on_synthesised_speech(tmp_path, monkeypatch, capsys):
    """In a short form: fewer and less, and two steps."""
    pytest.importorskip("espeakng_loader")
    import make_demo_data

    block = (ROOT / "docs/how-to/recipes.md").read_text().split("```sh\n")[1].split("```")[0].replace("\\\n", "")
    commands = [shlex.split(line)[1:] for line in block.splitlines()]
    scripts = [Path(module.__file__).name for module in [make_demo_data, *TASKS]]
    assert [command[0] for command in commands] == [f"examples/{script}" for script in scripts]
    monkeypatch.chdir(tmp_path)
    small = ["--num_clips", "24", "--num_voices", "6", "--num_pretraining_words", "6", "--pretraining_steps", "1"]
    small += ["--pretraining_words_per_clip", "2"]
    make_demo_data.main([*commands[0][1:], *small])
    for module, command in zip(TASKS, commands[1:], strict=True):
        short = ["--max_steps", "2", "--save_strategy", "no", "--use_cpu", "--per_device_train_batch_size", "4", *ELP]
        metrics = module.main([*command[1:], *short])
        assert any(f"eval_{measure}" in metrics for measure in CARD_METRICS)
        assert next(tmp_path.rglob(f"{command[-1]}/**/adapter_model.safetensors"))

    for name in ("sentences", "speakers", "intents"):
        check_disjoint(*(read_dataset(tmp_path / "demo" / name, split) for split in ("train", "test")), "speaker_id")
    capsys.readouterr()
    make_demo_data.main([*commands[0][1:], *small])
    assert capsys.readouterr().out.count(" is there") == 5


# Whisper and other models with a decoder -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    return save_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def wide_whisper(tmp_path_factory):
    return save_whisper(tmp_path_factory.mktemp("wide"), window_s=3)


PRECISIONS = [(verification, "float32"), (emotion, "float32"), (intent, "float32"), (intent, "bfloat16")]


@pytest.mark.parametrize(("module", "dtype"), PRECISIONS)
def test_a_checkpoint_in_half_precision_is_trained_in_float32_or_as_asked(module, dtype, trained, whisper):
    metrics, folder = trained(module, *ELP, "--model_name_or_path", whisper, "--dtype", dtype)
    assert metrics["trained_parameters_encoder"] > 0
    (saved,) = folder.rglob("adapter_model.safetensors")
    tensors = {name: x for name, x in load_file(saved).items() if not name.endswith("checksums")}  # of settings
    adapters = {name: x.dtype for name, x in tensors.items() if "elp_" in name or dtype == "float32"}
    assert {*adapters.values()} == {torch.float32}
    history = json.loads((saved.parent / "trainer_state.json").read_text())["log_history"]
    assert all(np.isfinite(entry["train_loss"]) for entry in history if "train_loss" in entry)


@pytest.mark.parametrize("module", [verification, emotion, intent])
def test_the_window_is_that_of_the_longest_recording_also_in_the_saved_adapter(module, trained, wide_whisper, capsys):
    _, folder = trained(module, *ELP, "--model_name_or_path", wide_whisper)
    assert "cut to 1 s, the longest recording; --chunk_length 3 keeps it whole." in capsys.readouterr().out
    adapter = answers_as_measured(module, folder, device="cpu")
    assert adapter.feature_extractor.n_samples == RATE_HZ
    with pytest.raises(ValueError, match="window of 1 s"):
        adapter.read(np.full(RATE_HZ + 1, 0.1, np.float32), RATE_HZ)
    folder = adapter.saved.folder
    (folder / "preprocessor_config.json").unlink()  # as a plain save_pretrained leaves the folder
    assert SpeechAdapter.from_pretrained(folder, device="cpu").feature_extractor.n_samples == RATE_HZ


@pytest.mark.parametrize("long", ["train", "test"])
def test_recordings_longer_than_the_window_are_refused_before_the_training(long, trained, whisper, tmp_path, capsys):
    rows = []
    for number, split in enumerate(["train", "train", "test", "test"]):
        file = record(tmp_path / f"{number}.wav", 17_000 if split == long else 1_600, seed=number)
        rows.append({"file_name": file, "split": split, "label": "ab"[number % 2]})
    with pytest.raises(ValueError, match=r"2 of 2 recordings are longer than 1 s, such as .*\.wav of 1\.062 s.*crop"):
        trained(intent, *ELP, "--model_name_or_path", whisper, dataset=write(tmp_path, rows))
    said = capsys.readouterr().out
    assert "The encoder reads at most 1 s; --on_long_audio is error." in said
    assert "Trained:" not in said


@pytest.mark.parametrize("how", ["crop", "split", "skip"])
@pytest.mark.parametrize("module", [verification, intent])
def test_long_recordings_are_cropped_averaged_over_pieces_or_left_out(module, how, trained, whisper, tmp_path, capsys):
    files = [record(tmp_path / f"{n}.wav", [8_000, 40_000][n % 3 == 0], seed=n) for n in range(16)]
    rows = [{"file_name": file, "label": "ab"[n % 2], "speaker": n // 4} for n, file in enumerate(files)]
    rows = [{**row, "split": ["train", "test"][n // 8]} for n, row in enumerate(rows)]
    words = [*ELP, "--model_name_or_path", whisper, "--on_long_audio", how]
    _, folder = trained(module, *words, dataset=write(tmp_path, rows))
    assert f"recordings are longer than 1 s, such as {files[0]} of 2.5 s: {how}." in capsys.readouterr().out
    count = 8 if how != "skip" else 5
    adapter = SpeechAdapter.from_pretrained(folder, device="cpu")
    adapter.model.float()
    collate = recipes.Collator(adapter.feature_extractor, adapter.model, on_long_audio=how)

    def answered(file):
        batch = collate([{"audio": file}])
        pieces = batch.pop("pieces", torch.tensor([1]))
        assert pieces.tolist() == [3 if how == "split" and soundfile.info(file).frames > RATE_HZ else 1]
        with torch.no_grad():
            output = training.speaker_embeddings if module is verification else lambda m, **x: m(**x).logits
            return output(adapter.model, **batch).mean(0)

    if module is verification:
        rows = read(folder / "scores.csv")
        assert len(rows) == count * (count - 1) // 2
        for row in rows[:4]:
            score = torch.cosine_similarity(answered(row["file_a"]), answered(row["file_b"]), dim=0)
            assert score.item() == pytest.approx(float(row["score"]), abs=1e-4)
    else:
        rows = read(folder / "predictions.csv")
        assert len(rows) == count
        assert [row["predicted_label"] for row in rows] == ["ab"[answered(row["file"]).argmax()] for row in rows]


def test_no_recording_is_cut_unnoticed():
    rows = [{"audio": np.ones(3 * RATE_HZ, np.float32)}]
    assert recipes.Collator(Wav2Vec2FeatureExtractor())(rows)["input_values"].shape == (1, 3 * RATE_HZ)
    spectrogram = transformers.ASTFeatureExtractor(max_length=150, num_mel_bins=40)
    for extractor, window_s in ((transformers.WhisperFeatureExtractor(chunk_length=2), 2), (spectrogram, 1.5)):
        for crop_s, length_s in ((None, "3.0"), (2.5, "2.5")):
            with pytest.raises(ValueError, match=rf"{length_s} s, and the encoder reads at most {window_s} s"):
                recipes.Collator(extractor, crop_s=crop_s)(rows)


@pytest.mark.parametrize("method", ["lora", "full", "head"])
def test_every_method_takes_a_shorter_window(method, trained, wide_whisper):
    _, folder = trained(intent, *METHODS[method], "--model_name_or_path", wide_whisper, "--chunk_length", 1)
    if method != "lora":
        saved = transformers.AutoModelForAudioClassification.from_pretrained(folder)
        assert saved.config.max_source_positions == 50
        assert saved.encoder.embed_positions.weight.shape == (50, 16)


@pytest.mark.parametrize("method", ["elp", "lora", "full"])
def test_a_model_with_a_decoder_is_measured_by_what_it_writes(method, trained, whisper, capsys):
    # The random base writes nothing; it does with an adapter whose output takes the place of the encoder's.
    words = ["--l_output", "project", *ELP] if method == "elp" else METHODS[method]
    metrics, folder = trained(generation, *words, "--model_name_or_path", whisper)
    rows = read(folder / "predictions.csv")
    normalize = recipes.make_normalizer(None)
    texts, found = ([normalize(row[column]) for row in rows] for column in ("text", "predicted"))
    assert any(found)
    assert (metrics["eval_wer"], metrics["eval_cer"]) == (jiwer.wer(texts, found), jiwer.cer(texts, found))
    assert metrics["eval_wer_before"] > 0
    assert (metrics["trained_parameters_head"] > 0) == (method == "full")
    assert "LOAD REPORT" not in "".join(capsys.readouterr())


def test_what_a_decoder_wrote_in_the_evaluation_is_what_the_saved_adapter_writes(trained, whisper):
    beams = ["--generation_num_beams", 5]  # as in Transformers' pipeline
    words = [*ELP, "--model_name_or_path", whisper, "--measure_before", "False", *beams]
    answers_as_measured(generation, trained(generation, *words)[1], device="cpu")


def test_labels_begin_after_the_start_token_and_end_with_the_end_token(whisper):
    model = transformers.WhisperForConditionalGeneration.from_pretrained(whisper)
    tokenizer = transformers.AutoTokenizer.from_pretrained(whisper)
    (label,) = recipes.make_labels(model, tokenizer, ["go on"])
    assert (label[0], label[-1], label.count(12), label.count(14)) == (13, 12, 1, 0)  # <|notimestamps|> ... end
    assert tokenizer.decode(label[1:], skip_special_tokens=True) == "go on"
    with pytest.raises(ValueError, match="but the decoder has 448 positions"):
        recipes.make_labels(model, tokenizer, ["on " * 448])
    model.generation_config.is_multilingual = True
    with pytest.raises(ValueError, match="Name one with --language"):
        recipes.set_language(model, tokenizer, None, "transcribe")


OF_WAVE = Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True)
WITH_DECODER = {"moonshine": OF_WAVE, "speech_to_text": transformers.Speech2TextFeatureExtractor(8, num_mel_bins=8)}


@pytest.mark.parametrize("family", [*WITH_DECODER, "any encoder and decoder"])
def test_other_families_with_a_decoder_are_trained_alike(family, trained, whisper, tmp_path):
    tokens = {"pad_token_id": 12, "eos_token_id": 12, "bos_token_id": 14, "decoder_start_token_id": 14}
    if family in WITH_DECODER:
        cls = getattr(transformers, FAMILIES[family].model_class)
        model = cls(cls.config_class(**FAMILIES[family].sizes | tokens | {"vocab_size": 15}))
    else:
        sizes = {"vocab_size": 15, "d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2}
        bart = transformers.BartConfig(**sizes, decoder_ffn_dim=24, is_decoder=True, add_cross_attention=True)
        both = {
            "encoder": build("wav2vec2", "Model", mask_time_length=2),
            "decoder": transformers.BartForCausalLM(bart),
        }
        model = transformers.SpeechEncoderDecoderModel(**both)
        model.config.update(tokens)
        model.generation_config.update(**tokens)
    model.generation_config.update(max_new_tokens=8)
    for part in (model, WITH_DECODER.get(family, OF_WAVE), transformers.AutoTokenizer.from_pretrained(whisper)):
        part.save_pretrained(tmp_path)
    metrics, folder = trained(generation, *ELP, "--model_name_or_path", tmp_path)
    assert metrics["trained_parameters_encoder"] > 0
    assert len(read(folder / "predictions.csv")) == 8
    assert next(folder.rglob("adapter_model.safetensors"))
