"""The command `peft-elp`: for who has recordings and an adapter, and does not program."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from on_disk import LABELS, adapted, record, save_base, save_tokenizer
from test_card import EER

from peft_elp import count_parameters, describe
from peft_elp.cli import main
from peft_elp.inference import SpeechAdapter
from peft_elp.plots import layer_weights

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
    assert total == {"trials": 3, "eer": 0.0, "min_dcf": 0.0}
    out, err, status = run("trials", saved["ForXVector"], tmp_path / "trials.txt")
    assert (err, status) == ("", 0)
    assert out.splitlines()[0] == f"1.000\t1\t{files[0]}\t{files[0]}"
    assert out.splitlines()[-1] == "3 trials: equal error rate 0.00%, minDCF 0.000"


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
        (["classify", "{ForSequenceClassification}", "{file}", "--base", "./no"], "If it is elsewhere, say where"),
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


def test_as_a_module_it_looks_at_an_adapter_without_any_model(saved):
    code = (
        "import runpy, sys; sys.argv = ['peft-elp', 'info', sys.argv[1]]\n"
        "try: runpy.run_module('peft_elp.cli', run_name='__main__')\n"
        "except SystemExit as left: assert left.code == 0, left.code\n"
        "loaded = [name for name in sys.modules if 'modeling_wavlm' in name or name == 'peft_elp.inference']\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code, saved["ForCTC"]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WavLMForCTC" in done.stdout
    failed = subprocess.run([sys.executable, "-m", "peft_elp.cli", "info", "./no"], capture_output=True, text=True)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "Traceback" not in failed.stderr
