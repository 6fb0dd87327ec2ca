"""examples/label_corpus.py on a local Ray of two processes."""

import os
import sys
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pyarrow as pa
import pytest
from on_disk import LABELS, adapted, record, save_base, save_tokenizer
from pyarrow import parquet

pytest.importorskip("ray")

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import label_corpus
import ray

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray uses its own deprecated settings, and leaves files open.
EXAMPLES = Path(label_corpus.__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two adapters of one base, that of CTC with a tokenizer, and recordings, one of which is broken."""
    folder = tmp_path_factory.mktemp("corpus")
    base = save_base(folder / "base")
    adapted(base, "ForSequenceClassification").save_pretrained(folder / "words")
    adapted(base, "ForCTC").save_pretrained(folder / "english")
    save_tokenizer(folder / "english")
    (folder / "calls").mkdir()
    for number in range(5):
        record(folder / "calls" / f"{number}.wav", 4000 + 400 * number, seed=number)
    (folder / "calls" / "broken.wav").write_bytes(b"RIFF")
    return folder


@pytest.fixture
def two_processes(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # Else Ray writes a token into the home folder.
    path = os.pathsep.join([str(EXAMPLES), str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
    yield
    ray.shutdown()


def test_what_has_no_answer_is_labelled_as_in_one_process_and_errors_are_counted(folder, two_processes, capsys):
    adapters = [str(folder / name) for name in ("words", "english")]
    alone = label_corpus.Labeller(adapters, "cpu")
    calls = sorted(str(path) for path in (folder / "calls").iterdir())
    (folder / "labels").mkdir()
    assert "newly initialized" not in capsys.readouterr().err
    done = alone({"file": np.array(calls[:2])})  # as if an earlier run had been interrupted
    parquet.write_table(pa.table(done), folder / "labels" / "earlier.parquet")

    words = ["--recordings", str(folder / "calls"), "--output", str(folder / "labels")]
    assert label_corpus.main(["--adapters", *adapters, *words, "--files_per_block", "2"]) == 1
    said = capsys.readouterr()
    assert "4 recordings have no answer" in said.out
    assert "1 recordings have an error instead of an answer, such as" in said.err
    assert "broken.wav" in said.err
    assert label_corpus.unanswered([str(folder / "calls")], str(folder / "labels")) == []
    rows = [row for file in (folder / "labels").glob("*.parquet") for row in parquet.read_table(file).to_pylist()]
    assert sorted(row["file"] for row in rows) == calls
    for row in rows:
        broken = Path(row["file"]).name == "broken.wav"
        assert alone.answer(row["file"]) | ({"words_score": ANY} if broken else {}) == row
        assert (row["words"] in LABELS, bool(row["error"])) == (not broken, broken)
        if not broken:
            (best,) = alone.adapters["words"].classify(row["file"], top_k=1)
            assert (row["words"], row["words_score"]) == (best["label"], pytest.approx(best["score"], abs=1e-4))
