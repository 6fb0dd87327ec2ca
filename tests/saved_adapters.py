"""A plugin with what the tests of answers share: a saved adapter for each head with a command, and recordings."""

import functools

import pytest
from on_disk import EER, LABELS, adapted, record, save_base, save_tokenizer

from peft_elp import describe
from peft_elp.speech.inference import SpeechAdapter

HEADS = ("ForCTC", "ForSequenceClassification", "ForXVector")
LENGTHS = (4000, 2600, 900, 4000)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="session")
def base(folder):
    return save_base(folder / "base")


@pytest.fixture(scope="session")
def models(folder, base):
    """The models, each of which is saved in a folder of its head's name; the tokenizer beside the first one."""
    models = {head: adapted(base, head) for head in HEADS}
    describe(models["ForXVector"], metrics=[EER])
    models["ForXVector"].peft_config["default"].verification_threshold = 0.25
    for head, model in models.items():
        model.save_pretrained(folder / head)
    save_tokenizer(folder / "ForCTC")
    return models


@pytest.fixture(scope="session")
def folders(folder, models):
    """The folder of the adapter for each head."""
    return {head: str(folder / head) for head in models}


@pytest.fixture(scope="session")
def files(folder):
    return [record(folder / f"{seed}.wav", samples, seed) for seed, samples in enumerate(LENGTHS)]


@pytest.fixture(scope="session")
def loaded(folders):
    """Loads the adapter for a head, once."""
    return functools.cache(lambda head: SpeechAdapter.from_pretrained(folders[head], device="cpu"))


__all__ = ["HEADS", "LABELS", "LENGTHS"]
