"""Saving an adapter: its files change all together, or not at all.

PEFT writes the card, the weights and the configuration one after the other into the folder itself. There, a README.md
that cannot be parsed costs the weights, and a process that is killed halfway leaves new weights beside the old
configuration. Transformers, which writes the configuration first, leaves the opposite. Here, both write
into a folder beside the files, which are then renamed into place.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from transformers import PreTrainedModel

from .card import CARD_NAME, write_card

UNFINISHED = ".saving-"  # what the name of the folder beside the files starts with


def protect_saving() -> None:
    """Wrap `save_pretrained` of PEFT and Transformers, for models with ELP-adapters alone; harmless when repeated.

    Neither has a hook around saving. PEFT asks a configuration to save itself when the weights have been overwritten,
    Transformers before.
    """
    if not hasattr(PeftModel.save_pretrained, "before_elp"):
        _protect_peft()
    if not hasattr(PreTrainedModel.save_pretrained, "before_elp"):
        _protect_transformers()


def _protect_transformers() -> None:
    save = PreTrainedModel.save_pretrained
    parameters = signature(save)

    @wraps(save)
    def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        call = parameters.bind(self, *args, **kwargs)
        call.apply_defaults()
        folder = Path(call.arguments["save_directory"])
        # Transformers sets this private flag on a model that got its adapters without a PeftModel.
        configs: list[Any] = list(self.peft_config.values()) if getattr(self, "_hf_peft_config_loaded", False) else []
        is_elp = any(config.peft_type == "ELP" for config in configs)
        # A push names the repository after the folder, and compares its files with those of before.
        plain = call.arguments["push_to_hub"] or not call.arguments["is_main_process"] or folder.is_file()
        if not is_elp or plain:
            save(self, *args, **kwargs)
            return
        with replacing(folder) as beside, settings_kept_on_error(configs):
            call.arguments["save_directory"] = str(beside)
            save(*call.args, **call.kwargs)

    vars(save_pretrained)["before_elp"] = save
    PreTrainedModel.save_pretrained = save_pretrained


def _protect_peft() -> None:
    save = PeftModel.save_pretrained
    parameters = signature(save)

    @wraps(save)
    def save_pretrained(self: PeftModel, *args: Any, **kwargs: Any) -> None:
        call = parameters.bind(self, *args, **kwargs)
        call.apply_defaults()
        folder, names = Path(call.arguments["save_directory"]), call.arguments["selected_adapters"]
        is_elp = any(config.peft_type == "ELP" for config in self.peft_config.values())
        if not is_elp or not call.arguments["is_main_process"] or folder.is_file():
            save(self, *args, **kwargs)
            return
        with replacing(folder) as beside, settings_kept_on_error(self.peft_config.values()):
            card = copy_card(self, folder, beside)
            call.arguments["save_directory"] = str(beside)
            save(*call.args, **call.kwargs)
            if not card:
                (beside / CARD_NAME).unlink()
        for name in names or list(self.peft_config):
            own = folder if name == "default" else folder / name
            try:
                write_card(own, getattr(self.peft_config[name], "description", None))
            except Exception as error:  # The adapter is saved: no card is worth an error.
                warnings.warn(
                    f"The adapter is saved in {own}, but its card could not be written: {error}", stacklevel=2
                )

    vars(save_pretrained)["before_elp"] = save
    PeftModel.save_pretrained = save_pretrained


@contextmanager
def settings_kept_on_error(configs: Iterable[PeftConfig]) -> Iterator[None]:
    """Restore some configurations if an error occurs in the block: PEFT sets `inference_mode` while it saves."""
    before = [(config, dict(vars(config))) for config in configs]
    try:
        yield
    except BaseException:
        for config, settings in before:
            vars(config).update(settings)
        raise


def copy_card(model: PeftModel, folder: Path, beside: Path) -> bool:
    """Copy the card of a folder for PEFT to update.

    Returns:
        Whether PEFT's card may take the place of the folder's: False if the folder has one that PEFT cannot read.
    """
    if not os.path.lexists(folder / CARD_NAME):
        return True
    try:
        shutil.copyfile(folder / CARD_NAME, beside / CARD_NAME)
        model.create_or_update_model_card(str(beside))
    except Exception:  # `write_card` warns about it, whatever is wrong with a card that somebody else wrote.
        with suppress(OSError):
            (beside / CARD_NAME).unlink()
        return False
    return True


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Give a folder to write files into, which then take the place of the files of the same names in `folder`.

    The old configuration goes first and the new one comes last, so that at no moment does a configuration stand
    beside weights of another save. After any error the files in `folder` are those of before.

    Args:
        folder: The folder whose files are replaced. It is made if it does not exist.

    Yields:
        A new, empty folder inside of it.

    Examples:
        >>> with TemporaryDirectory() as place:
        ...     _ = Path(place, "a.txt").write_text("old")
        ...     with replacing(Path(place)) as beside:
        ...         _ = (beside / "a.txt").write_text("new")
        ...     Path(place, "a.txt").read_text(), os.listdir(place)
        ('new', ['a.txt'])
    """
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=UNFINISHED, dir=folder) as beside:
            new, old = Path(beside, "new"), Path(beside, "old")
            new.mkdir()
            yield new
            _exchange(new, old, folder)
    except BaseException:
        for parent in made:
            with suppress(OSError):  # It holds something else by now, or was never made.
                parent.rmdir()
        raise


def _exchange(new: Path, old: Path, folder: Path) -> None:
    files = sorted((path.relative_to(new) for path in new.rglob("*") if path.is_file()), key=_configuration_last)
    outdated = [file.with_name(_other_format(file.name)) for file in files if _other_format(file.name)]
    moves = [(folder / file, old / file) for file in (*reversed(files), *outdated) if os.path.lexists(folder / file)]
    moves += [(new / file, folder / file) for file in files]
    made: list[Path] = []
    try:
        for source, target in moves:
            made += [parent for parent in target.parents if folder in parent.parents and not parent.exists()]
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
    except BaseException:
        for source, target in reversed(moves):
            if os.path.lexists(target) and not os.path.lexists(source):
                os.replace(target, source)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise


def _configuration_last(file: Path) -> tuple[bool, Path]:
    return file.name == CONFIG_NAME, file


def _other_format(name: str) -> str:
    """The name that weights have in the other format, which would be loaded in place of them or beside them."""
    return {SAFETENSORS_WEIGHTS_NAME: WEIGHTS_NAME, WEIGHTS_NAME: SAFETENSORS_WEIGHTS_NAME}.get(name, "")
