"""The command `peft-elp`, for people who have recordings and an adapter, and do not program."""

import csv
import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from on_disk import LABELS, adapted
from transformers import Seq2SeqTrainingArguments

import peft_elp
import peft_elp_options
from peft_elp import count_parameters, describe, recipes
from peft_elp.speech.inference import SpeechAdapter
from peft_elp.speech.plots import layer_weights
from peft_elp_command import main

pytest_plugins = ["saved_adapters"]
COMMANDS = ("info", "transcribe", "classify", "verify", "trials", "demo")
NAMER, COMPARER = "ForSequenceClassification", "ForXVector"


@pytest.fixture
def run(capsys):
    """What the command printed, its errors, and its status."""

    def run(*arguments):
        capsys.readouterr()  # what the test itself has printed
        status = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return out, err, status

    return run


def in_json(out):
    return [json.loads(line) for line in out.splitlines()]


# Answers ------------------------------------------------------------------------------------------------------------


def test_info_says_what_an_adapter_consists_of_without_any_model(run, folders, models, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", pytest.fail)
    out, err, status = run("info", folders[NAMER])
    assert (err, status) == ("", 0)
    model = models[NAMER]
    lines = {"base": model.peft_config["default"].base_model_name_or_path, "adapters": "ELP"}
    lines |= {"model": "WavLMForSequenceClassification", "task": "audio-classification", "labels": ", ".join(LABELS)}
    for name, value in lines.items():
        assert f"{name:12}{value}\n" in out
    for part, count in count_parameters(model).items():
        assert re.search(rf"^  {part} +{count:,}  ", out, re.MULTILINE)
    bars = re.findall(r"^ +(\d) (0\.\d{3}) (#+)$", out, re.MULTILINE)
    assert [(int(layer), share) for layer, share, _ in bars] == [(n, f"{x:.3f}") for n, x in layer_weights(model)]
    assert max(len(bar) for _, _, bar in bars) == 40


def test_info_in_json_also_of_an_adapter_that_was_saved_by_pickle(run, tmp_path, folders, models):
    model = models[COMPARER]
    (found,) = in_json(run("info", folders[COMPARER], "--json")[0])
    assert found["parameters"] == count_parameters(model)
    assert found["layer_weights"] == [[n, pytest.approx(x)] for n, x in layer_weights(model)]
    assert found["results"] == [{"data": "VoxCeleb1", "split": "test", "metric": "eer", "value": 2.63}]
    assert found["verification_threshold"] == 0.25
    assert "VoxCeleb1 test eer 2.63" in run("info", folders[COMPARER])[0]
    training = {"epochs": 30, "learning rate": 1e-5}
    describe(model, license="mit", training=training)
    model.save_pretrained(tmp_path, safe_serialization=False)
    (pickled,) = in_json(run("info", tmp_path, "--json")[0])
    assert pickled == found | {"results": [], "license": "mit", "training": training}
    out, _, _ = run("info", tmp_path)
    lines = ("licence +mit", "training +epochs 30, learning rate 1e-05", r"PEFT +[\d.]+", "computes in +float32")
    for line in (*lines, r"threshold +0\.25$"):
        assert re.search(f"^{line}", out, re.MULTILINE)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_transcribe_writes_a_line_for_each_file(run, folders, files, loaded, batch_size):
    expected = loaded("ForCTC").transcribe(files)
    out, err, status = run("transcribe", folders["ForCTC"], *files, "--batch-size", batch_size, "--device", "cpu")
    assert (err, status) == ("", 0)
    assert out.splitlines() == [f"{file}\t{text}" for file, text in zip(files, expected, strict=True)]
    out, _, _ = run("transcribe", folders["ForCTC"], *files, "--json")
    rows = zip(files, expected, strict=True)
    assert in_json(out) == [{"file": file, "text": text, "error": None} for file, text in rows]


def test_classify_names_the_likeliest_label_or_several(run, folders, files, loaded):
    expected = loaded(NAMER).classify(files)
    out, err, status = run("classify", folders[NAMER], *files)
    assert (err, status) == ("", 0)
    assert out.splitlines() == [
        f"{file}\t{labels[0]['label']} {labels[0]['score']:.3f}" for file, labels in zip(files, expected, strict=True)
    ]
    out, _, _ = run("classify", folders[NAMER], files[0], files[0], "--top-k", 2, "--batch_size", 2, "--json")
    labels = [{"label": one["label"], "score": round(one["score"], 4)} for one in expected[0][:2]]
    assert in_json(out) == 2 * [{"file": files[0], "labels": labels, "error": None}]


def test_verify_says_score_and_decision(run, folders, files, loaded):
    score = loaded(COMPARER).verify(*files[:2]).score
    out, err, status = run("verify", folders[COMPARER], *files[:2])
    assert (err, status) == ("", 0)
    assert out == f"{score:.3f}\t{'same voice' if score >= 0.25 else 'different voices'}, threshold 0.25\n"
    out, _, _ = run("verify", folders[COMPARER], *files[:2], "--threshold", "1")
    assert out.endswith("different voices, threshold 1.0\n")
    assert "same voice" in run("verify", folders[COMPARER], files[0], "--device", "cpu", files[0])[0]
    (found,) = in_json(run("verify", folders[COMPARER], *files[:2], "--json")[0])
    assert found == {"score": pytest.approx(score), "threshold": 0.25, "same": score >= 0.25}
    out, err, _ = run("verify", folders[NAMER], *files[:2])
    assert "names no threshold; give one with --threshold" in out
    assert err == "peft-elp: a warning: this adapter was trained to name labels, maybe not to tell voices apart.\n"


def test_trials_are_scored_and_measured_and_their_threshold_is_saved(run, folders, files, tmp_path, loaded):
    trials = [(1, files[0], files[0]), (0, files[0], files[1]), (0, files[1], files[0])]
    (tmp_path / "trials.txt").write_text("".join(f"{label} {a} {b}\n" for label, a, b in trials))
    out, err, status = run("trials", folders[COMPARER], tmp_path / "trials.txt")
    assert (err, status) == ("", 0)
    assert out.splitlines()[0] == f"1.000\t1\t{files[0]}\t{files[0]}"
    assert out.splitlines()[-1] == "3 trials: equal error rate 0.00% at the threshold 1.000, minDCF 0.000"
    shutil.copytree(folders[COMPARER], tmp_path / "voices")
    weights = (tmp_path / "voices/adapter_model.safetensors").read_bytes()
    out, _, _ = run("trials", tmp_path / "voices", tmp_path / "trials.txt", "--save-threshold", "--json")
    *lines, total = in_json(out)
    score = loaded(COMPARER).verify
    assert lines == [
        {"label": label, "file_a": a, "file_b": b, "score": pytest.approx(score(a, b).score, abs=1e-5)}
        for label, a, b in trials
    ]
    assert total == {"trials": 3, "eer": 0.0, "min_dcf": 0.0, "threshold": pytest.approx(1)}
    assert (tmp_path / "voices/adapter_model.safetensors").read_bytes() == weights
    voices = SpeechAdapter.from_pretrained(tmp_path / "voices", device="cpu")
    assert [voices.verify(a, b).same for _, a, b in trials] == [True, False, False]


# What cannot be answered --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "./nowhere"], "There is no folder './nowhere'"),
        (["classify", "{ForCTC}", "{file}"], "cannot classify: it was trained with the head of WavLMForCTC"),
        (["transcribe", "{ForXVector}", "{file}", "{file}"], "cannot transcribe"),
        (["classify", "{ForSequenceClassification}", "{file}", "--on-long-audio", "cut"], "on_long_audio must be one"),
        (["verify", "{ForXVector}", "{file}", "no.wav"], "no.wav: there is no such file"),
        (["classify", "{ForSequenceClassification}", "{file}", "--device", "gpu"], "The device 'gpu' cannot be used"),
        (["classify", "{ForSequenceClassification}", "{file}", "--base", "./no"], "--base on the command line"),
        (["info", "wrong"], "num_labels in head_config must be"),
        (["trials", "{ForXVector}", "long.csv"], "Row 1 of long.csv cannot be read: field larger than field limit"),
    ],
)
def test_an_error_is_one_line_and_no_traceback(run, folders, files, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("long.csv").write_text(f"label,file_a,file_b\n1,{'a' * 150_000},b.wav\n")
    config = json.loads(Path(shutil.copytree(folders["ForCTC"], "wrong"), "adapter_config.json").read_text())
    Path("wrong/adapter_config.json").write_text(json.dumps(config | {"head_config": {"num_labels": [3]}}))
    out, err, status = run(*(argument.format(**folders, file=files[0]) for argument in arguments))
    assert (out, status) == ("", 1)
    assert re.fullmatch(f"peft-elp: [^\n]*{re.escape(message)}[^\n]*\n", err)


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "sing",
        "classify folder",
        "classify folder a.wav --batch-size 0",
        "classify folder a.wav --output answers.xls",
        "serve --adapters-folder folder --revision main",
    ],
)
def test_wrong_arguments_leave_with_2_and_say_how_it_is_used(run, arguments):
    out, err, status = run(*arguments.split())
    assert status == 2
    assert "Usage: peft-elp" in out + err


def test_help_comes_in_groups_and_waits_for_no_library():
    """The one process: what the command imports cannot be seen in this one. It also ends where its reader stops."""
    code = (
        f"import sys\nfrom peft_elp_command import main\nfor command in {COMMANDS}:\n    main([command, '--help'])\n"
        "main(['--version'])\nprint(sorted({'torch', 'peft', 'transformers', 'peft_elp'} & sys.modules.keys()))\n"
        "sys.stdout.flush()\nsys.stdin.read()\nsys.exit(main(['--version']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        said = "".join(iter(process.stdout.readline, "[]\n"))
        process.stdout.close()
        process.stdin.close()
        assert (process.stderr.read(), process.wait()) == ("", 1)
    for command in COMMANDS:
        assert f"Usage: peft-elp {command}" in said
    for group in ("Model", "Answers", "Adapter", "Page"):
        assert f"─ {group} ─" in said
    assert f"peft-elp {peft_elp.__version__}\n" in said


RUN_SCRIPTS = """
import contextlib, runpy, sys
for script, *words in {}:
    sys.argv = [script, *words]
    with contextlib.redirect_stderr(sys.stdout):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as left:
            print("status", left.code, "torch" in sys.modules, end="\\f")
"""


def test_the_training_scripts_answer_help_and_name_mistakes_before_they_import_pytorch(tmp_path):
    scripts = sorted(map(str, (Path(__file__).parent.parent / "examples").glob("run_*.py")))
    (tmp_path / "train.csv").touch()
    needed = ["--model_name_or_path", "me/encoder", "--dataset_name", "me/voices"]
    mistakes = {
        "the following arguments are required: --model_name_or_path": [],
        "--leraning_rate is not an option. Did you mean --learning_rate?": [*needed, "--leraning_rate", "1"],
        "invalid choice: 'sing'": [*needed, "--method", "sing"],
        "--lora_r is used only with --method lora": [*needed, "--lora_r", "4", "--bf16", "True", "--adapters", "L"],
        "./nowhere does not exist": [*needed, "--dataset_name", "./nowhere"],
        "has no split test; it holds train.csv.": [
            *needed,
            "--dataset_name",
            str(tmp_path),
            "--train_split_name",
            "test",
        ],
        "/no/encoder does not exist": [*needed, "--model_name_or_path", "/no/encoder"],
    }
    cases = [[script, "--help"] for script in scripts] + [[scripts[0], *words] for words in mistakes.values()]
    code = RUN_SCRIPTS.format(cases)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said = ran.stdout.split("\f")[:-1]
    assert len(scripts) == 5
    for text in said[:5]:
        assert text.endswith("status None False")
        assert "--max_duration_in_seconds " in text
        assert "--help-all lists them" in text
        assert len(text.splitlines()) < 100
    for message, text in zip(mistakes, said[5:], strict=True):
        assert text.endswith("status 2 False")
        assert message in text


def test_the_names_of_all_options_are_known_without_an_import():
    names = [one.name for one in (*fields(Seq2SeqTrainingArguments), *fields(recipes.ModelArguments))]
    peft_elp_options._check_names([f"--{name}" for name in names], [peft_elp_options.MethodArguments])


def test_an_installed_command_is_this_one():
    from importlib.metadata import entry_points

    (script,) = entry_points(group="console_scripts", name="peft-elp")
    assert script.load() is main


# Files, tables and terminals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4])
def test_one_recording_that_fails_costs_no_other_its_answer(run, folders, files, tmp_path, monkeypatch, batch_size):
    answered = SpeechAdapter.classify

    def classify(self, recordings, **options):
        if files[1] in recordings:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nmore of it")
        return answered(self, recordings, **options)

    monkeypatch.setattr(SpeechAdapter, "classify", classify)
    names = [files[0], "x" * 5000 + ".wav", files[1], tmp_path / "no.wav", files[2]]
    out, err, status = run("classify", folders[NAMER], *names, "--batch-size", batch_size)
    assert status == 1
    assert [line.split("\t")[0] for line in out.splitlines()] == [files[0], files[2]]
    long, failed, missing, summary = err.splitlines()
    assert long.startswith("peft-elp: xxx")
    assert failed == f"peft-elp: {files[1]}: RuntimeError: DefaultCPUAllocator: can't allocate memory more of it"
    assert missing == f"peft-elp: {tmp_path / 'no.wav'}: there is no such file."
    assert summary == "peft-elp: 2 answered, 3 refused, 0 skipped, 0 ignored; in float32 on cpu"


def test_a_trial_with_a_bad_recording_has_no_score_and_the_list_no_error_rate(run, folders, files, tmp_path):
    (tmp_path / "bad.wav").write_text("no sound")
    (tmp_path / "trials.txt").write_text(f"1 {files[0]} {files[0]}\n0 {files[0]} bad.wav\n0 {files[0]} {files[1]}\n")
    out, err, status = run("trials", folders[COMPARER], tmp_path / "trials.txt")
    assert status == 1
    assert [line.split("\t")[1:] for line in out.splitlines()] == [
        ["1", files[0], files[0]],
        ["0", files[0], files[1]],
    ]
    assert re.search(r"bad\.wav: .*\n.* 1 of 3 trials have no score, so no error rate is given", err)


@pytest.fixture
def labelled(base, tmp_path):
    """Saves an adapter with labels of one's choice."""

    def save(*labels):
        model = adapted(base, NAMER)
        model.peft_config["default"].head_config["id2label"] = dict(enumerate(labels))
        model.peft_config["default"].head_config["label2id"] = {label: i for i, label in enumerate(labels)}
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return save


def test_labels_and_names_cannot_act_on_a_terminal(run, labelled, tmp_path, files):
    labels = ["\x1b[2Jyes", "no\nno", "st\u202eop\x9b31m"]
    adapter = labelled(*labels)
    name = str(tmp_path / "a\x1b[31m\nb.wav")
    shutil.copy(files[0], name)
    words = [["classify", adapter, name], ["classify", adapter, f"no{name}"], ["info", name], ["info", adapter]]
    words += [["info", adapter, "--json"], ["classify", adapter, name, "--json"]]
    answers = ["".join(run(*one)[:2]) for one in words]
    assert not set("\x1b\x9b\u202e") & set("".join(answers))
    assert [len(answer.splitlines()) for answer in answers[:3]] == [1, 1, 1]
    assert r"\x1b[2Jyes, no\nno, st\u202eop\x9b31m" in answers[3]
    assert json.loads(answers[4])["labels"] == labels
    assert json.loads(answers[5])["file"] == name


def test_a_table_holds_no_cell_that_a_spreadsheet_would_run(run, labelled, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(files[0], "-a.wav")
    adapter = labelled("=HYPERLINK(1)", "@SUM(1)", "\tyes")
    out, _, status = run("classify", adapter, "--output", "answers.csv", "--top-k", 3, "--", "-a.wav")
    assert (out, status) == ("", 0)
    with open("answers.csv", newline="") as table:
        cells = [cell for row in list(csv.reader(table))[1:] for cell in row[:2]]
    assert {*cells} == {"'-a.wav", "'=HYPERLINK(1)", "'@SUM(1)", "'\tyes"}


def test_json_is_json_whatever_the_card_says(run, folders, tmp_path):
    shutil.copytree(folders[COMPARER], tmp_path / "voices")
    card = (tmp_path / "voices/README.md").read_text()
    (tmp_path / "voices/README.md").write_text(card.replace("value: 2.63", "value: .nan"))
    out, _, _ = run("info", tmp_path / "voices", "--json")
    assert json.loads(out, parse_constant=pytest.fail)["results"][0]["value"] is None


def test_a_folder_or_a_pattern_stands_for_its_recordings(run, folders, files, tmp_path):
    (tmp_path / "in").mkdir()
    inside = [
        shutil.copy(file, tmp_path / name) for file, name in zip(files, ("b.wav", "in/a.WAV", "[c].wav"), strict=False)
    ]
    (tmp_path / "notes.txt").touch()
    patterns = [tmp_path / "[[]c].wav", tmp_path / "**/a.*", tmp_path / "b*"]
    for names, ignored in (([tmp_path], 1), (patterns, 0), (inside, 0)):
        out, err, status = run("classify", folders[NAMER], *names)
        assert status == 0
        assert ("3 answered, 0 refused, 0 skipped, 1 ignored" in err) if ignored else (err == "")
        assert sorted(line.split("\t")[0] for line in out.splitlines()) == sorted(map(str, inside))
    _, err, status = run("classify", folders[NAMER], tmp_path / "*.mp3")
    assert (err, status) == (f"peft-elp: {tmp_path}/*.mp3: there is no such file.\n", 1)
    (tmp_path / "empty").mkdir()
    _, err, status = run("classify", folders[NAMER], tmp_path / "empty")
    assert (err, status) == (f"peft-elp: There are no recordings in the folder '{tmp_path}/empty'.\n", 1)


@pytest.mark.parametrize(("command", "head"), [("classify", NAMER), ("transcribe", "ForCTC")])
def test_answers_and_errors_go_into_a_table(run, folders, files, tmp_path, command, head):
    names = [files[1], tmp_path / "no.wav", files[0]]  # the last one is longer than the limit
    words = [command, folders[head], *names, "--max-duration", "0.2", "--on-long-audio", "skip"]
    answered, *others = in_json(run(*words, "--json")[0])
    assert [one["error"] for one in (answered, *others)] == [None, "there is no such file.", "skipped, it is too long"]
    for name in ("answers.jsonl", "answers.csv"):
        out, err, status = run(*words, "--output", tmp_path / name)
        assert (out, status) == ("", 1)
        summary = "peft-elp: 1 answered, 1 refused, 1 skipped, 0 ignored; in float32 on cpu"
        assert err.splitlines() == [f"peft-elp: {names[1]}: there is no such file.", summary]
    assert in_json((tmp_path / "answers.jsonl").read_text()) == [answered, *others]
    with open(tmp_path / "answers.csv", newline="") as table:
        rows = list(csv.DictReader(table))
    (one,) = answered.get("labels") or [{"text": answered["text"]}]
    assert rows[0] == {"file": files[1], **{name: str(value) for name, value in one.items()}, "error": ""}
    blank = dict.fromkeys(one, "")
    assert rows[1:] == [{"file": other["file"], **blank, "error": other["error"]} for other in others]
