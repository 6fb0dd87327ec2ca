"""The card of a saved adapter: a README.md for people, with the metadata that the Hub reads."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn
from yaml import YAMLError

from .folder import SavedAdapter, read_adapter

TAGS = ("elp", "peft-elp")
OURS = re.compile(r"<!-- peft-elp card ([0-9a-f]{16})\b.*-->\s*$")
EDITED = ("datasets", "metrics", "model-index", "pipeline_tag")  # metadata from here that people correct
TOKENIZER = ("tokenizer_config.json", "vocab.json", "tokenizer.json")


@dataclass(frozen=True)
class Description:
    """What only whoever trained an adapter knows of it; see `describe`."""

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
    """Say what the card of an adapter cannot find out by itself; `save_pretrained` then writes it.

    It describes the adapter as it is now: describe it again after further training. It is not loaded with an adapter.

    Args:
        model: A model with ELP-adapters.
        adapter_name: The adapter.
        repo_id: Its name on the Hub, for the card's code. Default: the name of the folder that it is saved to.
        task: What the Hub calls its task. Default: by the model's head.
        language: Code of the language, such as "en", or several.
        license: What the Hub calls its licence, such as "apache-2.0".
        datasets: Hub ids of the training data.
        metrics: What was measured, on what.
        protocol: How it was trained and measured, in Markdown.
        seed: That of the training.

    Raises:
        ValueError: The model has no adapter of that name.
        TypeError: `datasets` is no list, or a metric no `huggingface_hub.EvalResult`.

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
        raise ValueError(f"No adapter named {adapter_name!r}; the model has {sorted(peft_config) or 'none'}.")
    if isinstance(datasets, str):
        raise TypeError(f"datasets is a list of Hub ids, got the string {datasets!r}. Write datasets=[{datasets!r}].")
    for metric in metrics:
        if not isinstance(metric, EvalResult):
            raise TypeError(f"metrics holds results as huggingface_hub.EvalResult(...) makes them, got {metric!r}.")
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
    """A number of NumPy or torch as Python's own, which YAML knows."""
    return value.item() if hasattr(value, "item") else value


def write_card(folder: str | Path, description: Description | None = None) -> bool:
    """Write the card of a saved adapter, unless its folder has one that is not from here, or was edited since.

    An edit is one of the text, or of what the metadata say of data sets, metrics, results and task. Other metadata,
    such as a licence, are kept in a card that is written anew.

    Returns:
        Whether it was written.

    Raises:
        ValueError: The folder holds no ELP-adapter.
    """
    saved, described, description = read_adapter(folder), description is not None, description or Description()
    path = saved.folder / "README.md"
    there = ModelCard.load(path) if path.exists() else ModelCard.from_template(ModelCardData())
    if not (is_generated(there) or _is_template(there.text)):
        if described:
            warnings.warn(
                f"{path} is not from here or was edited: it stays as it is, without what `describe` says. To have it "
                "written anew, remove it.",
                stacklevel=2,
            )
        return False
    data = _data(saved, description, there.data.to_dict())
    text = _text(saved, description)
    content = f"---\n{data.to_yaml()}\n---\n\n{text}"
    read_back = ModelCard(content, ignore_metadata_errors=True).data.to_dict()
    content += f"\n<!-- peft-elp card {_fingerprint(text, read_back)}: saving writes it anew until it is edited -->\n"
    ModelCard(content, ignore_metadata_errors=True).save(path)
    return True


def read_results(folder: str | Path) -> list[EvalResult]:
    """What the card in a folder says was measured; nothing without a card, or where its metadata cannot be read."""
    path = Path(folder, "README.md")
    if not path.is_file():
        return []
    try:
        data: Any = ModelCard.load(path, ignore_metadata_errors=True).data
    except (ValueError, YAMLError):
        return []
    return data.eval_results or []


def is_generated(card: ModelCard) -> bool:
    """Whether a card is from here and was not edited since; see `write_card`."""
    mark = OURS.search(card.text)
    return mark is not None and mark[1] == _fingerprint(card.text[: mark.start()], card.data.to_dict())


def _is_template(text: str) -> bool:
    """Whether it is the card that PEFT has just made."""
    return _fingerprint(text) == _fingerprint(ModelCard.from_template(ModelCardData()).text)


def _fingerprint(text: str, data: Mapping[str, Any] | None = None) -> str:
    # PEFT adds its version to every card, behind whatever comes last.
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and line != "### Framework versions" and not line.startswith("- PEFT ")]
    lines.append(json.dumps([(data or {}).get(name) or None for name in EDITED], sort_keys=True, default=str))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _data(saved: SavedAdapter, description: Description, there: dict[str, Any]) -> ModelCardData:
    for name in ("model-index", "base_model", "datasets", "metrics", "pipeline_tag"):
        there.pop(name, None)
    base = saved.base if _on_hub(saved.base) else None
    tags = [tag for tag in there.pop("tags", None) or () if base or not tag.startswith("base_model:")]
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
    return name is not None and bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)) and not Path(name).exists()


def _name(saved: SavedAdapter, description: Description) -> str:
    return description.repo_id or saved.folder.resolve().name


def _text(saved: SavedAdapter, description: Description) -> str:
    base = saved.base or "?"
    link = f"[{base}](https://huggingface.co/{base})" if _on_hub(saved.base) else f"`{base}`"
    sections = [
        f"# {_name(saved, description).rpartition('/')[2]}\n\n"
        f"ELP-adapters ([arXiv:2407.21066](https://arxiv.org/abs/2407.21066)) for {link}, of class "
        f"`{saved.model_class or '?'}`. The base is frozen and is not in this repository: these are the adapters with "
        "their head.",
        f"## Use\n\n{_use(saved, description)}",
        f"## Encoder\n\n{_parts(saved)}",
    ]
    if training := _training(description):
        sections.append(f"## Training\n\n{training}")
    if description.metrics:
        sections.append(f"## Results\n\n{_results(description.metrics)}")
    if saved.layer_weights:
        sections.append(f"## Layer weights\n\n{_layer_weights(saved)}")
    if saved.counts["P"] and (pictures := _pictures(saved, "pseudo_feature_norms")):
        sections.append("## Norms of the pseudo features\n\n" + "\n\n".join(pictures))
    sections.append(f"### Framework versions\n\n- PEFT {saved.config.get('peft_version')}\n")
    return "\n\n".join(sections)


def _use(saved: SavedAdapter, description: Description) -> str:
    model_class = saved.model_class or "AutoModel"
    where = f'"{_name(saved, description)}"'
    if description.repo_id and description.subfolder:
        where += f', subfolder="{description.subfolder}"'
    reads_text = saved.task == "automatic-speech-recognition"
    with_tokenizer = reads_text and saved.holds(*TOKENIZER)
    auto = ["AutoFeatureExtractor", *(["AutoTokenizer"] if with_tokenizer else []), model_class]
    extractor = where if saved.holds("preprocessor_config.json") else f'"{saved.base}"'
    lines = [
        "import peft_elp  # first: it makes PEFT know the method",
        "import torch",
        "from peft import PeftModel",
        f"from transformers import {', '.join(auto)}",
        "",
        f'base = {model_class}.from_pretrained("{saved.base}")',
        f"model = PeftModel.from_pretrained(base, {where}).eval()",
        f"extractor = AutoFeatureExtractor.from_pretrained({extractor})",
        "waveform = torch.zeros(extractor.sampling_rate)  # one second of silence: put yours, mono, at this rate",
        'inputs = extractor(waveform.numpy(), sampling_rate=extractor.sampling_rate, return_tensors="pt")',
        "with torch.no_grad():",
        *_answer(model_class, where, reads_text, with_tokenizer),
    ]
    code = "\n".join(lines)
    note = "" if description.repo_id else f"{where} is the adapter's folder; from the Hub, write its name there.\n\n"
    return (
        f"{note}```bash\npip install 'peft-elp[recipes]'\n```\n\n```python\n{code}\n```{_command(saved, description)}"
    )


def _answer(model_class: str, where: str, reads_text: bool, with_tokenizer: bool) -> list[str]:
    """The end of the code: what a model of the class gives."""
    if reads_text and model_class.endswith("ForCTC"):
        lines = ["    tokens = model(**inputs).logits.argmax(-1)"]
    elif reads_text:
        lines = ["    tokens = model.generate(**inputs)"]
    elif model_class.endswith("ForXVector"):
        return ["    voice = model(**inputs).embeddings", "print(voice.shape)"]
    elif model_class.endswith("Classification"):
        frames = model_class.endswith("FrameClassification")
        label = "model.config.id2label[int(logits[0].argmax())]"
        return ["    logits = model(**inputs).logits", f"print({'logits.shape' if frames else label})"]
    else:
        return ["    output = model(**inputs)", "print(output[0].shape)"]
    if with_tokenizer:
        return [*lines, f"print(AutoTokenizer.from_pretrained({where}).batch_decode(tokens)[0])"]
    return [*lines, "print(tokens)  # no tokenizer was saved with the adapter: numbers, not text"]


def _command(saved: SavedAdapter, description: Description) -> str:
    verb = {"automatic-speech-recognition": "transcribe", "audio-classification": "classify"}.get(saved.task or "")
    if verb is None or (saved.model_class or "").endswith("FrameClassification"):
        return ""
    files = "a.wav b.wav"
    if (saved.model_class or "").endswith("ForXVector"):
        verb = "verify"
    where = _name(saved, description)
    if description.repo_id and description.subfolder:
        where += f" --subfolder {description.subfolder}"
    return f"\n\nWith files, on the command line:\n\n```bash\npeft-elp {verb} {where} {files}\n```"


def _parts(saved: SavedAdapter) -> str:
    rows = [f"| {part} | {saved.counts[part]:,} | {what} |" for part, what in saved.sizes().items()]
    rows.append(f"| all | {sum(saved.counts.values()):,} | |")
    return "\n".join(["| part | parameters | |", "|---|--:|---|", *rows])


def _training(description: Description) -> str:
    said = []
    if description.datasets:
        said.append(f"Data: {', '.join(description.datasets)}.")
    if description.protocol:
        said.append(description.protocol)
    if description.seed is not None:
        said.append(f"Seed: {description.seed}.")
    return "\n\n".join(said)


def _results(metrics: Sequence[EvalResult]) -> str:
    rows = [
        f"| {metric.dataset_name} | {metric.dataset_split or ''} | {metric.metric_name or metric.metric_type} | "
        f"{metric.metric_value} |"
        for metric in metrics
    ]
    return "\n".join(["| data | split | metric | value |", "|---|---|---|--:|", *rows])


def _layer_weights(saved: SavedAdapter) -> str:
    layers = " | ".join(str(layer) for layer, _ in saved.layer_weights)
    shares = " | ".join(f"{share:.3f}" for _, share in saved.layer_weights)
    table = f"| layer | {layers} |\n|---|{'--:|' * len(saved.layer_weights)}\n| weight | {shares} |"
    return "\n\n".join([*_pictures(saved, "layer_weights"), table])


def _pictures(saved: SavedAdapter, stem: str) -> list[str]:
    return [f"![{path.stem}]({path.name})" for path in sorted(saved.folder.glob(f"{stem}*.png"))]
