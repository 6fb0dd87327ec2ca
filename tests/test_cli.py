"""The command `peft-elp`: for who has recordings and an adapter, and does not program."""

import csv
import importlib
import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from on_disk import EER, LABELS, adapted, record, save_base, save_tokenizer
from safetensors.torch import load_file, save_file

import peft_elp
from peft_elp import count_parameters, describe
from peft_elp.cli import main
from peft_elp.speech.inference import SpeechAdapter
from peft_elp.speech.plots import layer_weights

COMMANDS = ("info", "transcribe", "classify", "verify")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def models(folder):
    base = save_base(folder / "base")
    models = {head: adapted(base, head) for head in ("ForCTC", "ForSequenceClassification", "ForXVector")}
    describe(models["ForXVector"], metrics=[EER])
    models["ForXVector"].peft_config["default"].verification_threshold = 0.25
    for head, model in models.items():
        model.save_pretrained(folder / head)
    save_tokenizer(folder / "ForCTC")
    return models


@pytest.fixture(scope="module")
def saved(folder, models):
    return {head: str(folder / head) for head in models}


@pytest.fixture(scope="module")
def files(folder):
    return [record(folder / f"{seed}.wav", 3000 - 500 * seed, seed) for seed in range(3)]


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


def test_info_says_what_an_adapter_consists_of(run, saved, models):
    out, err, status = run("info", saved["ForSequenceClassification"])
    assert (err, status) == ("", 0)
    model = models["ForSequenceClassification"]
    for line in (
        f"base {model.peft_config['default'].base_model_name_or_path}",
        "model WavLMForSequenceClassification",
        "task audio-classification",
        "adapters ELP",
        f"labels {', '.join(LABELS)}",
    ):
        assert re.search(line.replace(" ", r" +", 1) + "$", out, re.MULTILINE)
    for part, count in count_parameters(model).items():
        assert re.search(rf"^  {part} +{count:,}  ", out, re.MULTILINE)
    bars = re.findall(r"^ +(\d) (0\.\d{3}) (#+)$", out, re.MULTILINE)
    assert [(int(layer), float(share)) for layer, share, _ in bars] == [
        (layer, round(share, 3)) for layer, share in layer_weights(model)
    ]
    assert max(len(bar) for _, _, bar in bars) == 40


def test_info_says_threshold_and_results(run, saved):
    out, _, _ = run("info", saved["ForXVector"])
    assert re.search(r"^threshold +0\.25$", out, re.MULTILINE)
    assert "VoxCeleb1 test eer 2.63" in out


def test_info_in_json(run, saved, models):
    out, err, status = run("info", saved["ForXVector"], "--json")
    assert (err, status) == ("", 0)
    (found,) = in_json(out)
    assert found["parameters"] == count_parameters(models["ForXVector"])
    assert found["layer_weights"] == [[n, pytest.approx(x)] for n, x in layer_weights(models["ForXVector"])]
    assert found["results"] == [{"data": "VoxCeleb1", "split": "test", "metric": "eer", "value": 2.63}]
    assert found["verification_threshold"] == 0.25


def test_info_reads_an_adapter_that_was_saved_by_pickle(run, tmp_path, saved, models):
    models["ForXVector"].save_pretrained(tmp_path, safe_serialization=False)
    (pickled,) = in_json(run("info", tmp_path, "--json")[0])
    assert pickled["parameters"] == count_parameters(models["ForXVector"])
    assert pickled["layer_weights"] == in_json(run("info", saved["ForXVector"], "--json")[0])[0]["layer_weights"]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_transcribe_writes_a_line_for_each_file(run, saved, files, batch_size):
    expected = SpeechAdapter.from_pretrained(saved["ForCTC"], device="cpu").transcribe(files)
    out, err, status = run("transcribe", saved["ForCTC"], *files, "--batch-size", batch_size, "--device", "cpu")
    assert (err, status) == ("", 0)
    assert out.splitlines() == [f"{file}\t{text}" for file, text in zip(files, expected, strict=True)]
    out, _, _ = run("transcribe", saved["ForCTC"], *files, "--json")
    assert in_json(out) == [{"file": file, "text": text} for file, text in zip(files, expected, strict=True)]


def test_classify_names_the_likeliest_label_or_several(run, saved, files):
    expected = SpeechAdapter.from_pretrained(saved["ForSequenceClassification"], device="cpu").classify(files)
    out, err, status = run("classify", saved["ForSequenceClassification"], *files)
    assert (err, status) == ("", 0)
    assert out.splitlines() == [
        f"{file}\t{labels[0]['label']} {labels[0]['score']:.3f}" for file, labels in zip(files, expected, strict=True)
    ]
    out, _, _ = run("classify", saved["ForSequenceClassification"], files[0], "--top-k", 2, "--json")
    assert in_json(out) == [{"file": files[0], "labels": expected[0][:2]}]


def test_a_file_that_is_given_twice_is_answered_twice(run, saved, files):
    out, _, _ = run("classify", saved["ForSequenceClassification"], files[0], files[0], "--batch-size", 2)
    assert len(out.splitlines()) == 2


def test_verify_says_score_and_decision(run, saved, files):
    score = SpeechAdapter.from_pretrained(saved["ForXVector"], device="cpu").verify(*files[:2]).score
    out, err, status = run("verify", saved["ForXVector"], *files[:2])
    assert (err, status) == ("", 0)
    assert out == f"{score:.3f}\t{'same voice' if score >= 0.25 else 'different voices'}, threshold 0.25\n"
    assert run("verify", saved["ForXVector"], *files[:2], "--threshold", "1")[0].endswith(
        "different voices, threshold 1.0\n"
    )
    assert "same voice" in run("verify", saved["ForXVector"], files[0], "--device", "cpu", files[0])[0]
    out, _, _ = run("verify", saved["ForSequenceClassification"], *files[:2])
    assert "names no threshold; give one with --threshold" in out
    (found,) = in_json(run("verify", saved["ForXVector"], *files[:2], "--json")[0])
    assert found == {"score": pytest.approx(score), "threshold": 0.25, "same": score >= 0.25}


def test_trials_are_scored_and_measured(run, saved, files, tmp_path):
    trials = [(1, files[0], files[0]), (0, files[0], files[1]), (0, files[1], files[0])]
    (tmp_path / "trials.txt").write_text("".join(f"{label} {a} {b}\n" for label, a, b in trials))
    *lines, total = in_json(run("trials", saved["ForXVector"], "--json", tmp_path / "trials.txt")[0])
    voices = SpeechAdapter.from_pretrained(saved["ForXVector"], device="cpu")
    assert lines == [
        {"label": label, "file_a": a, "file_b": b, "score": pytest.approx(voices.verify(a, b).score, abs=1e-5)}
        for label, a, b in trials
    ]
    assert total == {"trials": 3, "eer": 0.0, "min_dcf": 0.0, "threshold": pytest.approx(1)}
    out, err, status = run("trials", saved["ForXVector"], tmp_path / "trials.txt")
    assert (err, status) == ("", 0)
    assert out.splitlines()[0] == f"1.000\t1\t{files[0]}\t{files[0]}"
    assert out.splitlines()[-1] == "3 trials: equal error rate 0.00% at the threshold 1.000, minDCF 0.000"


def test_the_page_runs(capsys, tmp_path, monkeypatch, saved, files):
    page = (Path(__file__).parent.parent / "docs/how-to/use-an-adapter.md").read_text()
    for name, head in {"english": "ForCTC", "emotions": "ForSequenceClassification", "voices": "ForXVector"}.items():
        shutil.copytree(saved[head], tmp_path / name)
    for name, file in zip("ab", files, strict=False):
        shutil.copy(file, tmp_path / f"{name}.wav")
    (tmp_path / "trials.csv").write_text("label,file_a,file_b\n1,a.wav,a.wav\n0,a.wav,b.wav\n")
    monkeypatch.chdir(tmp_path)
    (commands,) = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    for command in commands.splitlines():
        assert main(command.split()[1:]) == 0
    assert capsys.readouterr().err == ""
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(snippet, names)
    voices = SpeechAdapter.from_pretrained("voices", device="cpu")
    assert voices.verify("a.wav", "b.wav").threshold == 0.31


# What cannot be answered --------------------------------------------------------------------------------------------


def test_a_bad_file_is_named_and_the_others_are_answered(run, saved, files, tmp_path):
    out, err, status = run(
        "classify", saved["ForSequenceClassification"], files[0], tmp_path / "no.wav", files[1], "--batch-size", 2
    )
    assert status == 1
    assert err == f"peft-elp: {tmp_path / 'no.wav'}: there is no such file.\n"
    assert [line.split("\t")[0] for line in out.splitlines()] == files[:2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "./nowhere"], "There is no folder './nowhere'"),
        (["classify", "./nowhere", "a.wav"], "There is no folder './nowhere'"),
        (["classify", "{ForCTC}", "{file}"], "cannot classify: it was trained with the head of WavLMForCTC"),
        (["transcribe", "{ForXVector}", "{file}"], "cannot transcribe"),
        (["verify", "{ForXVector}", "{file}", "no.wav"], "no.wav: there is no such file"),
        (["classify", "{ForSequenceClassification}", "{file}", "--device", "gpu"], "The device 'gpu' cannot be used"),
        (["classify", "{ForSequenceClassification}", "{file}", "--base", "./no"], "--base on the command line"),
        (["info", "{ForCTC}", "--subfolder", "calls"], "holds no adapter"),
    ],
)
def test_an_error_is_one_line_and_no_traceback(run, saved, files, arguments, message):
    out, err, status = run(*(argument.format(**saved, file=files[0]) for argument in arguments))
    assert status == 1
    assert out == ""
    assert re.fullmatch(f"peft-elp: [^\n]*{re.escape(message)}[^\n]*\n", err)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["sing"],
        ["classify", "folder"],
        ["verify", "folder", "a.wav"],
        ["classify", "folder", "a.wav", "--batch-size", "0"],
        ["classify", "folder", "a.wav", "--top-k", "many"],
    ],
)
def test_wrong_arguments_leave_with_2_and_say_how_it_is_used(capsys, arguments):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert "usage: peft-elp" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_its_help(capsys, command):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert f"usage: peft-elp {command}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["--version"], ["classify", "--help"]])
def test_help_and_version_do_not_wait_for_pytorch(arguments):
    code = (
        "import sys; sys.argv = ['/usr/bin/peft-elp', *sys.argv[1:]]\n"
        "from peft_elp.cli import main\n"
        "try: main()\n"
        "except SystemExit: print(sorted({'torch', 'peft', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.stdout.endswith("[]\n"), done.stdout + done.stderr
    assert "peft-elp" in done.stdout + done.stderr


@pytest.mark.parametrize(
    "argv",
    [
        ["peft-elp", "info", "--help-me"],
        ["peft-elp", "classify", "folder", "--", "--help"],  # a recording of that name
        ["train.py", "--help"],
        ["peft-elp.py", "--help"],
        ["", "--help"],
        [""],
        [],
    ],
)
def test_everything_else_imports_the_whole_package(argv):
    assert not peft_elp._prints_help_alone(argv)


def test_as_a_module_it_looks_at_an_adapter_without_any_model(saved):
    code = (
        "import runpy, sys; sys.argv = ['peft-elp', 'info', sys.argv[1]]\n"
        "try: runpy.run_module('peft_elp.cli', run_name='__main__')\n"
        "except SystemExit as left: assert left.code == 0, left.code\n"
        "loaded = [name for name in sys.modules if 'modeling_wavlm' in name or name == 'peft_elp.speech.inference']\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code, saved["ForCTC"]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WavLMForCTC" in done.stdout
    failed = subprocess.run([sys.executable, "-m", "peft_elp.cli", "info", "./no"], capture_output=True, text=True)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "Traceback" not in failed.stderr


# Files, tables and terminals ----------------------------------------------------------------------------------------


def test_one_recording_that_fails_costs_no_other_its_answer(run, saved, files, tmp_path, monkeypatch):
    names = [files[0], "x" * 5000 + ".wav", files[1], str(tmp_path), files[2]]
    tmp_path.joinpath("a.txt").touch()
    answered = SpeechAdapter.classify

    def classify(self, recordings, *args):
        if any(len(recording) == 2500 for recording in recordings):  # the second of the files
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nmore of it")
        return answered(self, recordings, *args)

    monkeypatch.setattr(SpeechAdapter, "classify", classify)
    for batch_size in (1, 3):
        out, err, status = run(
            "classify", saved["ForSequenceClassification"], *names[:3], names[4], "--batch-size", batch_size
        )
        assert status == 1
        assert [line.split("\t")[0] for line in out.splitlines()] == [files[0], files[2]]
        assert sorted(line.split(": ", 1)[1][:20] for line in err.splitlines()) == sorted(["x" * 20, files[1][:20]])
        assert "RuntimeError: DefaultCPUAllocator: can't allocate memory" in err


def test_a_trial_with_a_bad_recording_has_no_score_and_the_list_no_error_rate(run, saved, files, tmp_path):
    (tmp_path / "bad.wav").write_text("no sound")
    (tmp_path / "trials.txt").write_text(f"1 {files[0]} {files[0]}\n0 {files[0]} bad.wav\n0 {files[0]} {files[1]}\n")
    out, err, status = run("trials", saved["ForXVector"], tmp_path / "trials.txt")
    assert status == 1
    assert [line.split("\t")[1:] for line in out.splitlines()] == [
        ["1", files[0], files[0]],
        ["0", files[0], files[1]],
    ]
    assert re.search(r"bad\.wav: .*\n.* 1 of 3 trials have no score, so no error rate is given", err)


def test_the_threshold_at_the_equal_error_rate_can_be_saved(run, saved, files, tmp_path):
    shutil.copytree(saved["ForXVector"], tmp_path / "voices")
    (tmp_path / "trials.txt").write_text(f"1 {files[0]} {files[0]}\n0 {files[0]} {files[1]}\n")
    weights = (tmp_path / "voices/adapter_model.safetensors").read_bytes()
    out, _, status = run("trials", tmp_path / "voices", tmp_path / "trials.txt", "--save-threshold", "--json")
    assert status == 0
    assert (tmp_path / "voices/adapter_model.safetensors").read_bytes() == weights
    voices = SpeechAdapter.from_pretrained(tmp_path / "voices", device="cpu")
    assert voices.verify(files[0], files[1]).threshold == pytest.approx(in_json(out)[-1]["threshold"], abs=1e-5)
    assert voices.verify(files[0], files[0]).same is True
    assert voices.verify(files[0], files[1]).same is False


def test_labels_and_names_cannot_act_on_a_terminal(run, models, folder, tmp_path, files):
    labels = ["\x1b[2Jyes", "no\nno", "st\u202eop\x9b31m"]
    model = adapted(str(folder / "base"), "ForSequenceClassification")
    model.peft_config["default"].head_config["id2label"] = dict(enumerate(labels))
    model.peft_config["default"].head_config["label2id"] = {label: i for i, label in enumerate(labels)}
    model.save_pretrained(tmp_path / "adapter")
    name = str(tmp_path / "a\x1b[31m\nb.wav")
    shutil.copy(files[0], name)
    answers = [run("info", tmp_path / "adapter"), run("classify", tmp_path / "adapter", name, "--top-k", 3)]
    answers.append(run("classify", tmp_path / "adapter", tmp_path / "no\x1b[31m\n.wav"))
    answers.append(run("info", tmp_path / "n\x1b[31m\no"))
    for out, err, _ in answers:
        assert not set("\x1b\x9b\u202e") & set(out + err)
    assert r"\x1b[2Jyes, no\nno, st\u202eop\x9b31m" in answers[0][0]
    assert len(answers[1][0].splitlines()) == len(answers[2][1].splitlines()) == len(answers[3][1].splitlines()) == 1
    for command in ("info", "classify"):
        out, _, _ = run(command, tmp_path / "adapter", *([name] if command == "classify" else []), "--json")
        assert not set("\x1b\x9b\u202e") & set(out)
        (found,) = in_json(out)
        assert found.get("labels") == labels if command == "info" else found["file"] == name


def test_json_is_json_whatever_the_card_says(run, saved, tmp_path):
    shutil.copytree(saved["ForXVector"], tmp_path / "voices")
    card = (tmp_path / "voices/README.md").read_text()
    (tmp_path / "voices/README.md").write_text(card.replace("value: 2.63", "value: .nan"))
    out, _, _ = run("info", tmp_path / "voices", "--json")
    assert json.loads(out, parse_constant=pytest.fail)["results"][0]["value"] is None


def test_answers_that_are_not_finite_are_errors(run, saved, files, tmp_path):
    base = save_base(tmp_path / "base")
    tensors = load_file(tmp_path / "base/model.safetensors")
    tensors["feature_projection.projection.weight"].fill_(float("nan"))
    save_file(tensors, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    for command, head in (("classify", "ForSequenceClassification"), ("transcribe", "ForCTC")):
        out, err, status = run(command, saved[head], files[0], "--base", base, "--json")
        assert (out, status) == ("", 1)
        assert "values that are not finite" in err


def test_a_folder_or_a_pattern_stands_for_its_recordings(run, saved, files, tmp_path):
    (tmp_path / "in").mkdir()
    inside = [
        shutil.copy(file, tmp_path / name) for file, name in zip(files, ("b.wav", "in/a.WAV", "[c].wav"), strict=True)
    ]
    (tmp_path / "notes.txt").touch()
    expected = sorted(map(str, inside))
    for names in ([tmp_path], [tmp_path / "[[]c].wav", tmp_path / "**/a.*", tmp_path / "b*"], sorted(inside)):
        out, err, status = run("classify", saved["ForSequenceClassification"], *names)
        assert (err, status) == ("", 0)
        assert sorted(line.split("\t")[0] for line in out.splitlines()) == expected
    _, err, status = run("classify", saved["ForSequenceClassification"], tmp_path / "*.mp3")
    assert (err, status) == (f"peft-elp: {tmp_path}/*.mp3: there is no such file.\n", 1)
    (tmp_path / "empty").mkdir()
    _, err, status = run("classify", saved["ForSequenceClassification"], tmp_path / "empty")
    assert (err, status) == (f"peft-elp: There are no recordings in the folder '{tmp_path}/empty'.\n", 1)


@pytest.mark.parametrize(("command", "head"), [("classify", "ForSequenceClassification"), ("transcribe", "ForCTC")])
def test_answers_go_into_a_table(run, saved, files, tmp_path, command, head):
    options = ["--top-k", "2"] if command == "classify" else []
    out, _, _ = run(command, saved[head], *files, *options, "--json")
    expected = in_json(out)
    for name in ("answers.jsonl", "answers.csv"):
        out, err, status = run(command, saved[head], *files, *options, "--output", tmp_path / name)
        assert (out, err, status) == ("", "", 0)
    assert in_json((tmp_path / "answers.jsonl").read_text()) == expected
    with open(tmp_path / "answers.csv", newline="") as table:
        rows = list(csv.DictReader(table))
    if command == "classify":
        labels = [(one["file"], label["label"], str(label["score"])) for one in expected for label in one["labels"]]
        assert [(row["file"], row["label"], row["score"]) for row in rows] == labels
    else:
        assert rows == expected


def test_a_warning_is_one_line(run, saved, monkeypatch):
    def warn(*args):
        warnings.warn("something\nodd", UserWarning, stacklevel=1)
        return []

    monkeypatch.setattr("peft_elp.saved.card.read_results", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        _, err, status = run("info", saved["ForXVector"])
    assert (err, status) == ("peft-elp: something odd\n", 0)


def test_verify_doubts_an_adapter_that_was_trained_for_labels(run, saved, files):
    _, err, _ = run("verify", saved["ForSequenceClassification"], *files[:2], "--threshold", "0.5")
    assert err == "peft-elp: a warning: this adapter was trained to tell yes, no, stop apart, maybe not voices.\n"
    assert run("verify", saved["ForXVector"], *files[:2])[1] == ""


def test_a_dtype_can_be_chosen(run, saved, files):
    _, err, status = run("classify", saved["ForSequenceClassification"], files[0], "--dtype", "bfloat16")
    assert (err, status) == ("", 0)
    assert "The dtype 'four' is not one" in run("classify", saved["ForXVector"], files[0], "--dtype", "four")[1]


def test_the_version_is_said_also_as_a_module(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"peft-elp {peft_elp.__version__}\n"
    done = subprocess.run([sys.executable, "-m", "peft_elp", "--version"], capture_output=True, text=True)
    assert done.stdout == f"peft-elp {peft_elp.__version__}\n"


@pytest.mark.parametrize(
    ("package", "module", "arguments"),
    [
        ("soxr", "audio", ["classify", "{ForSequenceClassification}", "{file}"]),
        ("soundfile", "audio", ["transcribe", "{ForCTC}", "{file}"]),
        ("datasets", "data", ["trials", "{ForXVector}", "trials.csv"]),
    ],
)
def test_a_missing_extra_is_named_with_its_command(run, saved, files, monkeypatch, package, module, arguments):
    for name in ("audio", "data", "inference"):
        monkeypatch.delitem(sys.modules, f"peft_elp.{name}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    out, err, status = run(*(argument.format(**saved, file=files[0]) for argument in arguments))
    assert (out, status) == ("", 1)
    assert re.fullmatch(rf"peft-elp: peft_elp\.{module} .*pip install 'peft-elp\[recipes\]'\.\n", err)
    with pytest.raises(ImportError, match=r"pip install 'peft-elp\[recipes\]'"):
        importlib.import_module("peft_elp.speech.inference" if module == "audio" else "peft_elp.speech.data")


@pytest.mark.skipif(sys.platform == "win32", reason="a closed pipe raises another error on Windows")
@pytest.mark.parametrize("command", [["info"], ["classify"]], ids=["printed at its end", "printed at once"])
def test_a_reader_that_stops_reading_is_no_error(command, saved, files):
    recordings = files if command == ["classify"] else []
    words = [sys.executable, "-m", "peft_elp", *command, saved["ForSequenceClassification"], *recordings]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 1
    assert said == ""
