"""The corpora of the ELP paper, read from the folders in which they are published.

Each reader takes the folder that you downloaded and returns a data set with the columns it names. Entries of `audio`
are for `peft_elp.speech.audio.decode`, every other column is text. Nothing is decoded yet: check the recordings next,
with `peft_elp.speech.data.check_audio`. If a folder lacks what a reader looks for, a `ValueError` says what that is.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from peft_elp.speech.data import from_rows, read_table

FOUR_EMOTIONS = {"ang": "ang", "hap": "hap", "exc": "hap", "neu": "neu", "sad": "sad"}


def librispeech(root: str | Path, split: str) -> Dataset:
    """Read LibriSpeech, [openslr.org/12](https://www.openslr.org/12), for speech recognition.

    Layout: `<root>/<split>/<speaker>/<chapter>/<utterance>.flac` beside `<speaker>-<chapter>.trans.txt`, which has a
    line for each utterance: its name and its text. `root` is the folder `LibriSpeech` of the archives, and a split is
    "train-clean-100", "dev-clean" or "test-other", for example.

    Returns:
        Columns audio, text (upper case), speaker, chapter, utterance.
    """
    return transcribed([Path(root, split)])


def librilight(root: str | Path, split: str = "10h") -> Dataset:
    """Read Libri-light's limited-resource training sets, [Kahn et al. 2020](https://arxiv.org/abs/1912.07875).

    Layout: `<root>/1h/{0..5}/{clean,other}/...` and `<root>/9h/{clean,other}/...`, and so on as in LibriSpeech. `root`
    is the folder `librispeech_finetuning` of the
    [archive](https://dl.fbaipublicfiles.com/librilight/data/librispeech_finetuning.tgz). Validation and test are
    LibriSpeech's own.

    Args:
        root: The folder that holds `1h` and `9h`.
        split: "10h" is `1h` and `9h` together, "1h" its six parts of 10 minutes, "10min" the first of them.

    Returns:
        Columns as of `librispeech`.
    """
    parts = {"10h": ("1h", "9h"), "1h": ("1h",), "10min": ("1h/0",)}
    if split not in parts:
        raise ValueError(f"split must be one of {', '.join(parts)}, got {split!r}.")
    return transcribed([Path(root, part) for part in parts[split]])


def voxceleb1(root: str | Path, split: str) -> Dataset:
    """Read VoxCeleb1, [robots.ox.ac.uk/~vgg/data/voxceleb](https://www.robots.ox.ac.uk/~vgg/data/voxceleb/vox1.html).

    Layout: `<root>/wav/<speaker>/<video>/<segment>.wav`, with vox1_dev_wav and vox1_test_wav unpacked into the one
    folder `wav`, and the list of trials `<root>/veri_test.txt`. Read the trials with
    `peft_elp.speech.data.read_trials(f"{root}/veri_test.txt", f"{root}/wav")`.

    Args:
        root: The folder that holds `wav` and the list.
        split: "test" is the 40 speakers of the trials, "train" the other 1,211.

    Returns:
        Columns audio, speaker, video.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be one of train, test, got {split!r}.")
    wav, listed = Path(root, "wav"), Path(root, "veri_test.txt")
    there([listed] if listed.is_file() else [], listed)
    lines = [line.split() for line in listed.read_text().splitlines() if line.strip()]
    test_speakers = {file.split("/")[0] for _, *pair in lines for file in pair}
    files = [path for path in wav.glob("*/*/*.wav") if (path.parts[-3] in test_speakers) == (split == "test")]
    rows = [{"audio": path, "speaker": path.parts[-3], "video": path.parts[-2]} for path in sorted(files)]
    return from_rows(there(rows, wav / f"<speaker>/<video>/<segment>.wav of the split {split!r}"))


def iemocap(root: str | Path, labels: Mapping[str, str] = FOUR_EMOTIONS) -> Dataset:
    """Read IEMOCAP, [sail.usc.edu/iemocap](https://sail.usc.edu/iemocap/), for emotion recognition.

    Layout: `<root>/Session{1..5}/sentences/wav/<dialog>/<utterance>.wav`, with the label that most raters chose in
    `<root>/Session{1..5}/dialog/EmoEvaluation/<dialog>.txt`: lines `[start - end]`, utterance, label and `[valence,
    activation, dominance]`, separated by tabs. There is no split: make folds by session or by speaker with
    `peft_elp.speech.data.leave_one_group_out`.

    Args:
        root: The folder that holds the sessions, `IEMOCAP_full_release`.
        labels: A class for each label of the corpus that is used. Utterances with other labels, such as "fru" or
            "xxx" (no majority), are left out. The default is the usual task of four classes with "exc" counted as
            "hap", for which the full release has 5,531 utterances.

    Returns:
        Columns audio, label, session ("Session1"), speaker ("Ses01F"), utterance.
    """
    rows, heard = [], set()
    # The release also has hidden copies of these files, which macOS made.
    files = sorted(path for path in Path(root).glob("Session*/dialog/EmoEvaluation/*.txt") if path.name[0] != ".")
    for file in there(files, Path(root, "Session1/dialog/EmoEvaluation/<dialog>.txt")):
        for line in file.read_text(encoding="utf-8").splitlines():
            if not line.startswith("["):
                continue  # the header, or the choice of a single rater
            found = re.match(r"\[[\d.]+ - [\d.]+\]\t((Ses\d+)\w_\w+_([FM])\d+\w*)\t(\w+)\t\[", line)
            if not found:
                raise ValueError(f"{file} has a line that does not name an utterance and its label: {line!r}.")
            utterance, session, gender, label = found.groups()
            heard.add(label)
            if label in labels:
                audio = file.parents[2] / "sentences" / "wav" / file.stem / f"{utterance}.wav"
                row = {"audio": audio, "label": labels[label], "session": file.parents[2].name}
                rows.append({**row, "speaker": session + gender, "utterance": utterance})
    if absent := set(labels.values()) - {row["label"] for row in rows}:
        absent, heard = (", ".join(sorted(names)) for names in (absent, heard))
        raise ValueError(f"No utterance in {root} has the class {absent}; its labels are {heard}.")
    return from_rows(rows)


def fluent_speech_commands(root: str | Path, split: str) -> Dataset:
    """Read Fluent Speech Commands, [Lugosch et al. 2019](https://arxiv.org/abs/1904.03670), for intent classification.

    Layout: `<root>/data/{train,valid,test}_data.csv` with columns path, speakerId, transcription, action, object and
    location; a path, `wavs/speakers/<speaker>/<recording>.wav`, counts from `root`. The splits are "train",
    "validation" (or "valid") and "test".

    Returns:
        Columns audio, text, speaker, action, object, location, and label. The label is the intent: action, object and
        location joined, such as "activate, lights, kitchen".
    """
    table = Path(root, "data", f"{'valid' if split == 'validation' else split}_data.csv")
    there([table] if table.is_file() else [], table)
    rows = read_table(table)
    slots = ("action", "object", "location")
    if absent := {"path", "transcription", "speakerId", *slots} - set(rows[0] if rows else ()):
        raise ValueError(f"{table} has no column {', '.join(sorted(absent))}.")
    return from_rows(
        [
            {"audio": row["path"], "text": row["transcription"], "speaker": row["speakerId"]}
            | {slot: row[slot] for slot in slots}
            | {"label": ", ".join(row[slot] for slot in slots)}
            for row in rows
        ],
        root,
    )


def transcribed(folders: list[Path]) -> Dataset:
    """Read the utterances that LibriSpeech's `*.trans.txt` files list in the folders."""
    rows = []
    for folder in folders:
        recordings = set(folder.rglob("*.flac"))
        for file in there(sorted(folder.rglob("*.trans.txt")), folder / "<speaker>/<chapter>/<...>.trans.txt"):
            for line in file.read_text(encoding="utf-8").splitlines():
                utterance, _, text = line.partition(" ")
                if not text.strip():
                    raise ValueError(f"{file} has a line without a text: {line!r}.")
                audio = file.with_name(f"{utterance}.flac")
                recordings.discard(audio)
                speaker, chapter = file.parts[-3:-1]
                row = {"audio": audio, "text": text, "speaker": speaker, "chapter": chapter}
                rows.append({**row, "utterance": utterance})
        if recordings:
            raise ValueError(f"{len(recordings)} recordings in {folder} have no text, such as {min(recordings)}.")
    return from_rows(rows)


def there(found: list[Any], looked_for: Path) -> list[Any]:
    """Return what was found, or raise an error if that is nothing."""
    if not found:
        raise ValueError(f"There is no {looked_for}. Pass the root folder that the reader's docstring describes.")
    return found
