"""The card of a saved adapter: a README.md for people, with the metadata that the Hub reads."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined, Template
from torch import nn

from peft_elp.wording import unknown_adapter

from .folder import SavedAdapter, first_line, is_hub_id, read_adapter

CARD_NAME = "README.md"
LARGEST_CARD = 1_000_000  # bytes: larger ones are nobody's card, and YAML takes its time
TAGS = ("elp", "peft-elp")
OURS = re.compile(r"<!-- peft-elp card ([0-9a-f]{16})\b.*-->\s*$")
EDITED = ("datasets", "metrics", "model-index", "pipeline_tag")  # metadata written here that people correct
TOKENIZER = ("tokenizer_config.json", "vocab.json", "tokenizer.json")


@dataclass(frozen=True)
class Description:
    """What a card cannot find out about its adapter; see `describe`."""

    repo_id: str | None = None
    subfolder: str | None = None
    task: str | None = None
    language: str | Sequence[str] | None = None
    license: str | None = None
    datasets: Sequence[str] = ()
    metrics: Sequence[EvalResult] = ()
    protocol: str | None = None
    seed: int | None = None


def describe(
    model: nn.Module,
    adapter_name: str = "default",
    *,
    repo_id: str | None = None,
    task: str | None = None,
    language: str | Sequence[str] | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    metrics: Sequence[EvalResult] = (),
    protocol: str | None = None,
    seed: int | None = None,
) -> None:
    """Describe an adapter for its card, which `save_pretrained` writes.

    The description belongs to the adapter in memory, as it is now: describe it again after further training. It is
    not loaded with a saved adapter.

    Args:
        model: A model with ELP-adapters.
        adapter_name: The adapter.
        repo_id: Its name on the Hub, for the card's code. Default: the name of the folder that it is saved to.
        task: Its task, as the Hub names it. Default: the task of the model's head.
        language: Code of the language, such as "en", or several.
        license: Its licence, as the Hub names it, such as "apache-2.0".
        datasets: Hub ids of the training data.
        metrics: Results, each with the data that it was measured on.
        protocol: How it was trained and measured, in Markdown. It is copied into the card as it is.
        seed: The seed of the training.

    Raises:
        ValueError: The model has no adapter of that name.
        TypeError: `datasets` is a string, or a metric is not a `huggingface_hub.EvalResult`.

    Examples:
        >>> from huggingface_hub import EvalResult
        >>> wer = EvalResult(
        ...     task_type="automatic-speech-recognition",
        ...     dataset_type="openslr/librispeech_asr",
        ...     dataset_name="LibriSpeech",
        ...     dataset_split="test.clean",
        ...     metric_type="wer",
        ...     metric_value=7.9,
        ... )
        >>> describe(model, datasets=["openslr/librispeech_asr"], metrics=[wer], seed=1)  # doctest: +SKIP
        >>> model.save_pretrained("english")  # doctest: +SKIP
    """
    peft_config: Any = getattr(model, "peft_config", {})
    if adapter_name not in peft_config:
        raise ValueError(unknown_adapter(adapter_name, peft_config))
    if isinstance(datasets, str):
        raise TypeError(f"datasets is a list of Hub ids, got the string {datasets!r}. Write datasets=[{datasets!r}].")
    for metric in metrics:
        if not isinstance(metric, EvalResult):
            raise TypeError(f"metrics holds huggingface_hub.EvalResult(...) objects, got {metric!r}.")
    peft_config[adapter_name].description = Description(
        repo_id=repo_id,
        subfolder=None if adapter_name == "default" else adapter_name,
        task=task,
        language=language,
        license=license,
        datasets=tuple(datasets),
        metrics=tuple(replace(metric, metric_value=_number(metric.metric_value)) for metric in metrics),
        protocol=protocol,
        seed=seed,
    )


def _number(value: Any) -> Any:
    """A number of NumPy or torch as a number of Python, for YAML."""
    return value.item() if hasattr(value, "item") else value


def write_card(folder: str | Path, description: Description | None = None) -> bool:
    """Write the card of a saved adapter, unless its folder has a card that was not generated here, or was edited.

    A card counts as edited if its text was changed, or the data sets, metrics, results or task in its metadata. Other
    metadata, such as a licence, are kept when a card is written anew. A card that cannot be read is left alone.

    Args:
        folder: The folder of the adapter.
        description: What `describe` recorded, for `save_pretrained`.

    Returns:
        Whether the card was written.

    Raises:
        ValueError: The folder holds no ELP-adapter.

    Examples:
        >>> write_card("english")  # doctest: +SKIP
        True
    """
    saved = read_adapter(folder)
    path = saved.folder / CARD_NAME
    try:
        there = ModelCard.load(path) if os.path.lexists(path) else ModelCard.from_template(ModelCardData())
    except Exception as error:  # Somebody else wrote it, and anything may be wrong with it.
        warnings.warn(
            f"{path} cannot be read as a card ({first_line(error)}). It stays as it is. To have a card written, "
            "remove it.",
            stacklevel=2,
        )
        return False
    if not (is_generated(there) or _is_template(there.text)):
        if description is not None:
            warnings.warn(
                f"{path} was edited or was not generated by peft_elp: it stays as it is, without what `describe` "
                "says. To have it written anew, remove it.",
                stacklevel=2,
            )
        return False
    description = description or Description()
    data = _data(saved, description, there.data.to_dict())
    text = _text(saved, description)
    content = f"---\n{data.to_yaml()}\n---\n\n{text}"
    read_back = ModelCard(content, ignore_metadata_errors=True).data.to_dict()
    content += f"\n<!-- peft-elp card {_fingerprint(text, read_back)}: saving writes it anew until it is edited -->\n"
    with TemporaryDirectory(prefix=".saving-", dir=saved.folder) as beside:
        ModelCard(content, ignore_metadata_errors=True).save(Path(beside, CARD_NAME))
        os.replace(Path(beside, CARD_NAME), path)
    return True


def read_results(folder: str | Path) -> list[EvalResult]:
    """The results in the metadata of a folder's card; empty without a card, or if its metadata cannot be read."""
    path = Path(folder, CARD_NAME)
    try:
        if not path.is_file() or path.stat().st_size > LARGEST_CARD:
            return []
        data: Any = ModelCard.load(path, ignore_metadata_errors=True).data
        results = data.eval_results or []
    except Exception:  # Somebody else may have written it, and anything may be wrong with it.
        return []
    return [result for result in results if isinstance(result.metric_value, (int, float, str))]


def is_generated(card: ModelCard) -> bool:
    """Whether a card was generated here and not edited since; see `write_card`."""
    mark = OURS.search(card.text)
    return mark is not None and mark[1] == _fingerprint(card.text[: mark.start()], card.data.to_dict())


def _is_template(text: str) -> bool:
    """Whether a card is the one that PEFT has just made from its template."""
    return _fingerprint(text) == _fingerprint(ModelCard.from_template(ModelCardData()).text)


def _fingerprint(text: str, data: Mapping[str, Any] | None = None) -> str:
    # PEFT adds its version at the end of every card.
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and line != "### Framework versions" and not line.startswith("- PEFT ")]
    lines.append(json.dumps([(data or {}).get(name) or None for name in EDITED], sort_keys=True, default=str))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _data(saved: SavedAdapter, description: Description, there: dict[str, Any]) -> ModelCardData:
    for name in ("model-index", "base_model", "datasets", "metrics", "pipeline_tag"):
        there.pop(name, None)
    base = saved.base if _on_hub(saved.base) else None
    tags = [tag for tag in map(str, there.pop("tags", None) or ()) if base or not tag.startswith("base_model:")]
    own = {
        "base_model": base,
        "pipeline_tag": description.task or saved.task,
        "language": _plain(description.language),
        "license": description.license,
        "datasets": list(description.datasets) or None,
        "metrics": sorted({metric.metric_type for metric in description.metrics}) or None,
        "eval_results": list(description.metrics) or None,
        "model_name": _name(saved, description).rpartition("/")[2] if description.metrics else None,
    }
    kept = {name: value for name, value in there.items() if own.get(name) is None}
    own = {name: value for name, value in own.items() if value is not None}
    return ModelCardData(**{**kept, **own, "library_name": "peft", "tags": sorted({*tags, *TAGS})})


def _plain(value: str | Sequence[str] | None) -> Any:
    return value if value is None or isinstance(value, str) else list(value)


def _on_hub(name: str | None) -> bool:
    return name is not None and is_hub_id(name) and not os.path.exists(name)


def _name(saved: SavedAdapter, description: Description) -> str:
    return description.repo_id or saved.folder.resolve().name


def _text(saved: SavedAdapter, description: Description) -> str:
    """The card without its metadata."""
    where, head = _name(saved, description), saved.head
    has_tokenizer = saved.task == "automatic-speech-recognition" and saved.holds(*TOKENIZER)
    model_class = saved.model_class or "AutoModel"
    subfolder = description.subfolder if description.repo_id else None
    return _template().render(
        arguments=quoted(where) + (f", subfolder={quoted(subfolder)}" if subfolder else ""),
        base=saved.base or "?",
        base_on_hub=_on_hub(saved.base),
        command=_command(saved, where, subfolder),
        counts=saved.counts,
        datasets=description.datasets,
        extractor=quoted(where if saved.holds("preprocessor_config.json") else saved.base or "?"),
        has_tokenizer=has_tokenizer,
        importable_class=model_class,
        imports=["AutoFeatureExtractor", *(["AutoTokenizer"] if has_tokenizer else []), model_class],
        layer_weights=saved.layer_weights,
        metrics=description.metrics,
        model_class=saved.model_class or "?",
        output=head.output if head else "hidden_states",
        peft_version=saved.config["peft_version"],
        pictures=lambda stem: _pictures(saved, stem),
        protocol=description.protocol,
        repo_id=description.repo_id,
        seed=description.seed,
        sizes=saved.sizes(),
        title=where.rpartition("/")[2],
        where=where,
    )


def _template() -> Template:
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters.update(cell=cell, code=code, quoted=quoted)
    return environment.from_string(Path(__file__).with_name("card.md").read_text(encoding="utf-8"))


def cell(value: Any) -> str:
    r"""Plain text in Markdown: one line, in which nothing is a link, HTML or the end of a table's cell.

    Examples:
        >>> print(cell("a|b <i>c</i> [d](e)"))
        a\|b &lt;i&gt;c&lt;/i&gt; \[d\](e)
    """
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~#!$])", r"\\\1", text)


def code(value: Any) -> str:
    """Code within a line of Markdown, whatever backticks it holds.

    Examples:
        >>> code("a`b")
        '``a`b``'
    """
    text = " ".join(str(value).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def quoted(text: str) -> str:
    r"""Text as a string of Python, in double quotes. It does not close the block of code that it stands in.

    Examples:
        >>> print(quoted('a"b'))
        "a\"b"
    """
    return json.dumps(text, ensure_ascii=False).replace("```", r"\x60" * 3)


def _command(saved: SavedAdapter, where: str, subfolder: str | None) -> str:
    """The command for recordings; empty where the head is not for the command line."""
    commands = saved.head.commands if saved.head else ()
    if not commands:
        return ""
    words = ["peft-elp", commands[0], where, *(["--subfolder", subfolder] if subfolder else []), "a.wav", "b.wav"]
    return shlex.join(words)


def _pictures(saved: SavedAdapter, stem: str) -> list[str]:
    return [f"![{cell(path.stem)}]({quote(path.name)})" for path in sorted(saved.folder.glob(f"{stem}*.png"))]
