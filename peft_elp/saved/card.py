"""The card of a saved adapter: a README.md for people, with the metadata that the Hub reads."""

from __future__ import annotations

import json
import os
import re
import shlex
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import metadata, version
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined
from torch import nn

from peft_elp.config import ELPConfig
from peft_elp.wording import brief, first_line, shortened, unknown_adapter

from .folder import TOKENIZER, SavedAdapter, is_hub_id, read_adapter

CARD_NAME = "README.md"
LARGEST_CARD = 1_000_000  # bytes: larger ones are nobody's card, and YAML takes its time
TAGS = ("elp", "peft-elp")
MARK = "<!-- peft_elp writes this card anew when the adapter is saved. To keep your edits, remove this line. -->"
OWN_METADATA = ("model-index", "base_model", "datasets", "metrics", "pipeline_tag", "training")  # Others are kept.


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
    training: Mapping[str, Any] = field(default_factory=dict)


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
    training: Mapping[str, Any] | None = None,
) -> None:
    """Describe an adapter for its card, which `save_pretrained` writes.

    The description belongs to the adapter in memory: describe it again after further training. It is not loaded with
    a saved adapter.

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
        training: Its settings, such as `{"epochs": 30, "learning rate": 1e-3}`.

    Raises:
        ValueError: The model has no adapter of that name.
        TypeError: `datasets` is a string, or a metric is not a `huggingface_hub.EvalResult`.

    Examples:
        >>> from huggingface_hub import EvalResult
        >>> data = "openslr/librispeech_asr"
        >>> wer = EvalResult("automatic-speech-recognition", data, "LibriSpeech test-clean", "wer", 7.9)
        >>> describe(model, datasets=[data], metrics=[wer], seed=1)  # doctest: +SKIP
        >>> model.save_pretrained("english")  # doctest: +SKIP
    """
    peft_config: Any = getattr(model, "peft_config", {})
    if adapter_name not in peft_config:
        raise ValueError(unknown_adapter(adapter_name, peft_config))
    if isinstance(datasets, str):
        raise TypeError(
            f"datasets must be a list of Hub ids, got the string {datasets!r}. Write datasets=[{datasets!r}]."
        )
    if not all(isinstance(metric, EvalResult) for metric in metrics):
        raise TypeError(f"metrics must hold huggingface_hub.EvalResult objects, got {brief(metrics)}.")
    peft_config[adapter_name].description = Description(
        repo_id=repo_id,
        subfolder=None if adapter_name == "default" else adapter_name,
        task=task,
        language=language,
        license=license,
        datasets=tuple(datasets),
        metrics=tuple(replace(metric, metric_value=_plain(metric.metric_value)) for metric in metrics),
        protocol=protocol,
        seed=seed,
        training={str(name): _plain(value) for name, value in (training or {}).items()},
    )


def _plain(value: Any) -> Any:
    """Return a value for YAML: a number of Python, rounded to four digits, or text."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float):
        return round(value, 1) if abs(value) >= 1000 else float(f"{value:.4g}")
    return value if isinstance(value, (int, str)) else str(value)


def write_card(folder: str | Path, description: Description | None = None) -> bool:
    """Write the card of a saved adapter, unless its folder holds a card of your own.

    A card is your own if the line is missing in which generated cards say that they are written anew. Metadata that
    are not generated, such as a licence, are kept.

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
    there = _replaceable(path)
    if there is None:
        return False
    data = _data(saved, description or Description(), there.data.to_dict())
    text = _text(saved, description or Description())
    path.write_text(f"---\n{data.to_yaml()}\n---\n\n{text}\n", encoding="utf-8")
    return True


def write_saved_card(folder: str | Path, config: ELPConfig) -> None:
    """Write the card of an adapter that PEFT has just saved. A card that cannot be written is a warning."""
    try:
        kept = not write_card(folder, config.description) and config.description is not None
        problem = "is your own and stays as it is, without what `describe` says. To have it written anew, remove it"
    except Exception as error:  # The adapter is saved: no card is worth an error.
        kept, problem = True, f"could not be written: {first_line(error)}"
    if kept:
        warnings.warn(f"The adapter is saved in {folder}, but its card {problem}.", stacklevel=2)


def read_metadata(folder: str | Path) -> ModelCardData:
    """Read the metadata of a folder's card; none if there is no card that can be read."""
    path = Path(folder, CARD_NAME)
    try:
        if path.is_file() and path.stat().st_size <= LARGEST_CARD:
            return ModelCard.load(path, ignore_metadata_errors=True).data  # pyright: ignore[reportReturnType]
    except Exception:  # Somebody else may have written it, and anything may be wrong with it.
        pass
    return ModelCardData()


def read_results(folder: str | Path) -> list[EvalResult]:
    """Read the results in the metadata of a folder's card; none if there is no card that can be read."""
    results = read_metadata(folder).eval_results or []
    return [result for result in results if isinstance(result.metric_value, (int, float, str))]


def wheel_name() -> str:
    """Return the file name of the wheel of this version."""
    return f"peft_elp-{version('peft-elp')}-py3-none-any.whl"


def _repository() -> str | None:
    """Return the address of the repository, if `project.urls` in `pyproject.toml` names one."""
    urls = metadata("peft-elp").get_all("Project-URL") or []
    return dict(url.split(", ", 1) for url in urls).get("Repository")


def _replaceable(path: Path) -> ModelCard | None:
    """Return the card in a file if it may be written anew: a generated one, PEFT's empty template, or none yet."""
    template = ModelCard.from_template(ModelCardData())
    if not os.path.lexists(path):
        return template
    try:
        there = ModelCard.load(path)
    except Exception:  # Somebody else wrote it, and anything may be wrong with it.
        return None
    # PEFT adds its version at the end of every card.
    is_empty = there.text.partition("### Framework versions")[0].strip() == template.text.strip()
    return there if is_empty or MARK in there.text else None


def _data(saved: SavedAdapter, description: Description, there: dict[str, Any]) -> ModelCardData:
    base = saved.base if _on_hub(saved.base) else None
    language = description.language
    own = {
        "base_model": base,
        "pipeline_tag": description.task or saved.task,
        "language": language if language is None or isinstance(language, str) else list(language),
        "license": description.license,
        "datasets": list(description.datasets),
        "training": dict(description.training),
        "metrics": sorted({metric.metric_type for metric in description.metrics}),
        "eval_results": list(description.metrics),
        "model_name": _name(saved, description).rpartition("/")[2] if description.metrics else None,
    }
    kept = {name: value for name, value in there.items() if name not in OWN_METADATA}
    tags = [tag for tag in map(str, kept.pop("tags", None) or ()) if base or not tag.startswith("base_model:")]
    own = {name: value for name, value in own.items() if value}
    return ModelCardData(**kept | own | {"library_name": "peft", "tags": sorted({*tags, *TAGS})})


def _on_hub(name: str | None) -> bool:
    return name is not None and is_hub_id(name) and not os.path.exists(name)


def _name(saved: SavedAdapter, description: Description) -> str:
    return description.repo_id or saved.folder.resolve().name


def _text(saved: SavedAdapter, description: Description) -> str:
    """Return the card without its metadata."""
    where, head = _name(saved, description), saved.head
    has_tokenizer = saved.task == "automatic-speech-recognition" and saved.holds(*TOKENIZER)
    model_class = saved.model_class or "AutoModel"
    subfolder = description.subfolder if description.repo_id else None
    commands = head.commands if head else ()
    words = ["peft-elp", *commands[:1], where, *(["--subfolder", subfolder] if subfolder else []), "a.wav", "b.wav"]
    base, on_hub = saved.base or "?", _on_hub(saved.base)
    if not on_hub:
        base = PureWindowsPath(base).name or base  # The last part of a path of either kind of system.
    extractor = [quoted(where if saved.holds("preprocessor_config.json") else base)]
    extractor += [f"chunk_length={seconds}"] if (seconds := saved.config.get("chunk_length")) else []
    extractor += ["return_attention_mask=True"] if saved.config.get("pool_own_frames") else []
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters.update(cell=cell, code=code, quoted=quoted)
    return environment.from_string(Path(__file__).with_name("card.md").read_text(encoding="utf-8")).render(
        mark=MARK,
        saved=saved,
        about=description,
        arguments=quoted(where) + (f", subfolder={quoted(subfolder)}" if subfolder else ""),
        base=base,
        base_on_hub=on_hub,
        command=shlex.join(words) if commands else "",
        extractor=", ".join(extractor),
        has_tokenizer=has_tokenizer,
        importable_class=model_class,
        imports=["AutoFeatureExtractor", *(["AutoTokenizer"] if has_tokenizer else []), model_class],
        labels=shortened(saved.labels, 100),
        model_class=saved.model_class or "?",
        output=head.output if head else "hidden_states",
        pictures=[
            f"![{cell(path.stem)}]({quote(path.name)})" for path in sorted(saved.folder.glob("layer_weights*.png"))
        ],
        repository=_repository(),
        title=where.rpartition("/")[2],
        versions={name: version(name) for name in ("peft-elp", "transformers", "torch")},
        wheel=wheel_name(),
        where=where,
        window_s=saved.config.get("chunk_length"),
    )


def cell(value: Any) -> str:
    r"""Escape plain text for Markdown: one line without links, HTML or the end of a table's cell.

    Examples:
        >>> print(cell("a|b <i>c</i> [d](e)"))
        a\|b &lt;i&gt;c&lt;/i&gt; \[d\](e)
    """
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~#!$])", r"\\\1", text)


def code(value: Any) -> str:
    """Format text as code within a line of Markdown, whatever backticks it holds."""
    text = " ".join(str(value).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def quoted(text: str) -> str:
    """Format text as a string of Python, which does not close the block of code that it stands in."""
    return json.dumps(text, ensure_ascii=False).replace("```", r"\x60" * 3)
