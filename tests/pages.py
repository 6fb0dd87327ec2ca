"""Runs a page of the documentation: its Python, its commands and its files, in order, in one session.

The blocks of a page share one namespace and one folder. A block with a title, such as `title="fsdp.yaml"` behind its
language, becomes a file of that name, for the blocks after it. Blocks of `text` are output or formulas and are not
run. A block that cannot run here is marked on the page, with the reason: `<!-- skip: next "needs two GPUs" -->`.

The Hub is a server on this machine (`hub.py`), where `microsoft/wavlm-base-plus` and `openai/whisper-tiny.en` are
tiny and random. The folder of a page holds what the pages say that a reader has; see `provide`.
"""

import csv
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any
from unittest import SkipTest

import torch
import yaml
from backbones import ELP, build
from datasets import Dataset
from hub import TOKEN
from on_disk import adapted, record, save_base, save_tokenizer, save_whisper
from peft import PeftModel, get_peft_model
from sybil import Document, Example, Region
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import SkipParser
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer
from transformers import (
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    Trainer,
    TrainingArguments,
    WhisperForConditionalGeneration,
    set_seed,
)

from peft_elp import ELPConfig
from peft_elp_command import main as peft_elp_command

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))
    if "```" in path.read_text(encoding="utf-8")
)
BASE, WHISPER = "microsoft/wavlm-base-plus", "openai/whisper-tiny.en"
SHELLS = ("bash", "sh")
DATA = {"json": json.loads, "yaml": yaml.safe_load}
NOT_RUN = ("text",)  # output and formulas
INFO = re.compile(r'(?P<language>\w*)[ \t]*(?:title="(?P<title>[^"\n]+)")?[ \t]*$\n', re.MULTILINE)


def blocks(document: Document) -> Iterator[Region]:
    """The fenced blocks of a page that are run or written to a file.

    Raises:
        ValueError: A block has no language, or one that nothing is known to do with.
    """
    for region in RawFencedCodeBlockLexer(INFO)(document):
        language, title = region.lexemes["language"], region.lexemes["title"]
        if language in NOT_RUN and title is None:
            continue
        if title is None and language not in EVALUATORS:
            raise ValueError(f"{document.path}: a block of {language!r}. Write its language, or `text` for output.")
        region.parsed = region.lexemes["source"]
        region.evaluator = write if title else EVALUATORS[language]
        yield region


def read(page: str) -> Document:
    """A page, with the blocks that are run."""
    return Document.parse(str(ROOT / page), blocks, SkipParser())


def write(example: Example) -> None:
    path = Path(example.region.lexemes["title"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(example.parsed, encoding="utf-8")
    if path.suffix.strip(".") in DATA:
        DATA[path.suffix.strip(".")](example.parsed)


def run_data(example: Example) -> None:
    DATA[example.region.lexemes["language"]](example.parsed)


def run_shell(example: Example) -> None:
    lines = example.parsed.replace("\\\n", "").splitlines()
    if all(line.startswith("peft-elp ") for line in lines):  # here, where PyTorch is imported already
        for line in lines:
            assert peft_elp_command(shlex.split(line)[1:]) == 0, line
        return
    command = ["bash", "-eu", "-c", example.parsed]
    done = subprocess.run(command, text=True, capture_output=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise AssertionError(f"exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


EVALUATORS = {
    "python": PythonEvaluator(),
    **dict.fromkeys(SHELLS, run_shell),
    **dict.fromkeys(DATA, run_data),
}


def run(page: str, folder: str, base: str = BASE) -> dict[str, int]:
    """Run a page in a folder; in a process of its own, since the Hub is chosen when `huggingface_hub` is imported.

    Another base takes the place of the page's own.

    Returns:
        How many blocks were "run" and "skipped", and how many marks of skipping there are.
    """
    os.environ |= {"HF_TOKEN": TOKEN, "CUDA_VISIBLE_DEVICES": ""}  # as after `hf auth login`, without a GPU
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    os.environ["PYTHONPATH"] = str(ROOT)
    torch.compile = partial(torch.compile, backend="eager")  # it traces; generating code takes a minute
    set_seed(0)
    os.chdir(folder)
    changed = Path(folder, "page.md")
    changed.write_text((ROOT / page).read_text(encoding="utf-8").replace(BASE, base), encoding="utf-8")
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return dict(Counter(evaluate(page, example) for example in read(str(changed))))


def evaluate(page: str, example: Example) -> str:
    """Run one block; returns "run", or "skipped" where the page says so, or "mark" for what says so."""
    try:
        example.evaluate()
    except SkipTest:
        return "skipped"
    except Exception as error:
        raise AssertionError(f"{page}, the block at line {example.line}: {type(error).__name__}: {error}") from error
    return "run" if example.region.lexemes else "mark"


def reasons(page: str) -> list[str]:
    """Why blocks of a page are not run."""
    return re.findall(r'^<!-- skip: \w+ "(.+)" -->$', (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)


def headings(page: str) -> list[str]:
    """The headings of a page below its title, without marks of code."""
    found = re.findall(r"^## (.+)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"^(`+) ?(.*?) ?\1$", r"\2", heading) for heading in found]


def bases() -> dict[str, dict[str, bytes]]:
    """The files of the tiny random bases on the Hub, by their names there."""
    found = {}
    for name, save in ((BASE, save_base), (WHISPER, partial(save_whisper, window_s=30))):
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder))
            found[name] = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
    return found


def provide(folder: str) -> None:
    """What the pages say that a reader has.

    - `a.wav` and `b.wav`, two recordings, and `trials.csv`, which compares them;
    - `english`, `emotions` and `voices`, trained adapters for recognition, classification and speakers;
    - `my-folder`, recordings in a folder for each split with a `metadata.csv`;
    - `examples`, as in a clone of the repository.
    """
    place = Path(folder)
    (place / "examples").symlink_to(ROOT / "examples")
    for name, seed in (("a.wav", 0), ("b.wav", 1)):
        record(place / name, 8_000, seed)
    (place / "trials.csv").write_text("label,file_a,file_b\n1,a.wav,a.wav\n0,a.wav,b.wav\n")
    for name, head in (("english", "ForCTC"), ("emotions", "ForSequenceClassification"), ("voices", "ForXVector")):
        AutoFeatureExtractor.from_pretrained(BASE).save_pretrained(place / name)
        if head == "ForCTC":
            save_tokenizer(place / name)
        adapted(BASE, head).save_pretrained(place / name)
    for number, split in enumerate(("train", "validation", "test")):
        (place / "my-folder" / split).mkdir(parents=True)
        rows = [
            {
                "file_name": f"{row}.wav",
                "label": ("yes", "no")[row % 2],
                "text": ("a b", "c d")[row % 2],
                "speaker": f"{split}{row // 4}",
            }
            for row in range(8)
        ]
        with (place / "my-folder" / split / "metadata.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        for row in range(8):
            record(place / "my-folder" / split / f"{row}.wav", 4_000, 10 * number + row)


# The errors of the page on errors: for each heading, code that causes it. -------------------------------------------


def load_without_import() -> None:
    code = "from peft import PeftConfig; PeftConfig.from_pretrained('emotions')"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    raise RuntimeError(done.stderr)


def train_without_the_column() -> None:
    def collate(rows: list) -> dict:
        return {"input_values": torch.tensor([row["audio"] for row in rows])}

    data = Dataset.from_dict({"audio": [[0.1] * 4_000] * 2, "labels": [0, 1]})
    arguments = TrainingArguments("outputs", max_steps=1, use_cpu=True)
    model = get_peft_model(build(head="ForSequenceClassification"), ELPConfig(**ELP))
    Trainer(model, arguments, train_dataset=data, data_collator=collate).train()


def load_with_other_labels() -> None:
    build(head="ForSequenceClassification").save_pretrained("base")
    AutoModelForAudioClassification.from_pretrained("base", num_labels=3)


def checkpoint_reentrantly() -> None:
    model = build()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    get_peft_model(model, ELPConfig(**ELP)).train()(torch.randn(1, 4_000))


def adapted_noise(samples: int, **to: Any) -> Any:
    return get_peft_model(build().to(**to), ELPConfig(**ELP))(torch.randn(1, samples))


ERRORS: dict[str, Callable[[], Any]] = {
    "KeyError: 'ELP'": load_without_import,
    "Can't find 'adapter_config.json'": lambda: PeftModel.from_pretrained(build(), "no-such-folder"),
    "should be the same": lambda: adapted_noise(4_000, dtype=torch.half),
    "KeyError: 'audio'": train_without_the_column,
    "the mel input features to be of length 3000": lambda: WhisperForConditionalGeneration.from_pretrained(WHISPER)(
        torch.randn(1, 8, 100).half(), labels=torch.tensor([[3, 4]])
    ),
    "You set `ignore_mismatched_sizes` to `False`": load_with_other_labels,
    "is too short for": lambda: adapted_noise(20),
    "cannot be merged": lambda: get_peft_model(build(), ELPConfig(**ELP)).merge_and_unload(),
    "contains no speech encoder that ELP can adapt": lambda: get_peft_model(torch.nn.Linear(2, 2), ELPConfig()),
    "The saved tensors are not those of adapter": lambda: PeftModel.from_pretrained(
        build(head="ForSequenceClassification", hidden_size=32), "emotions"
    ),
    "never returns under re-entrant gradient checkpointing": checkpoint_reentrantly,
}


def message(heading: str, folder: str) -> str:
    """The error that the code of a heading causes, as a traceback ends with it."""
    os.environ["PYTHONPATH"] = str(ROOT)
    os.chdir(folder)
    try:
        ERRORS[heading]()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
