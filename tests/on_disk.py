"""Tiny bases, adapters and recordings on disk, and a result for a model card."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import transformers
from backbones import ELP, FAMILIES, build, shaken
from huggingface_hub import EvalResult
from peft import PeftModel, get_peft_model
from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor

from peft_elp import ELPConfig

LABELS = ["yes", "no", "stop"]
LETTERS = ["<pad>", "<s>", "</s>", "<unk>", "|", "a", "b", "c", "d"]
EER = EvalResult(
    task_type="audio-classification",
    dataset_type="ProgramComputer/voxceleb",
    dataset_name="VoxCeleb1",
    dataset_split="test",
    metric_type="eer",
    metric_value=2.63,
)
HEADS = {"ForCTC": {}, "ForSequenceClassification": {"id2label": dict(enumerate(LABELS))}, "ForXVector": {}}


def save_base(folder: Path, family: str = "wavlm", return_attention_mask: bool = True, **options: Any) -> str:
    """An encoder without a head, and its feature extractor."""
    build(family, "Model", **options).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=return_attention_mask).save_pretrained(folder)
    return str(folder)


def adapted(base: str, head: str, family: str = "wavlm", **config: Any) -> PeftModel:
    """The encoder with a head and an adapter that does something."""
    torch.manual_seed(0)
    cls = getattr(transformers, FAMILIES[family] + head)
    model = cls.from_pretrained(base, **HEADS.get(head, {}))
    if head == "ForXVector":  # Transformers 5.0 leaves whatever was in memory
        torch.nn.init.normal_(model.objective.weight)
    return shaken(get_peft_model(model, ELPConfig(**ELP, **config))).eval()


def save_tokenizer(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "letters.json").write_text(json.dumps({letter: number for number, letter in enumerate(LETTERS)}))
    Wav2Vec2CTCTokenizer(str(folder / "letters.json")).save_pretrained(folder)
    (folder / "letters.json").unlink()


def save_whisper(folder: Path, window_s: int = 1) -> Path:
    """A checkpoint in float16, as published ones are, for short windows, with a tokenizer of letters."""
    sizes = {"d_model": 16, "vocab_size": 15, "num_mel_bins": 8, "init_std": 0.4}
    sizes["max_source_positions"] = 50 * window_s
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 2, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 24}
    tokens = {"pad_token_id": 12, "eos_token_id": 12, "bos_token_id": 14, "decoder_start_token_id": 14}
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(**sizes, **tokens, suppress_tokens=None, begin_suppress_tokens=None)
    )
    model.generation_config.update(max_new_tokens=12)
    model.half().save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=window_s).save_pretrained(folder)
    symbols = [*"abdegilmno", "\u0120", "t", "<|endoftext|>", "<|notimestamps|>", "<|startoftranscript|>"]
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    special = {"bos_token": symbols[-1], "eos_token": symbols[12], "pad_token": symbols[12], "unk_token": symbols[12]}
    transformers.WhisperTokenizer(vocab=vocabulary, merges=[], **special).save_pretrained(folder)
    return folder


def record(path: Path, samples: int, seed: int, rate_hz: int = 16_000, channels: int = 1) -> str:
    """A recording of noise."""
    sound = np.random.default_rng(seed).normal(scale=0.1, size=(samples, channels)).astype(np.float32)
    soundfile.write(path, sound, rate_hz, subtype="FLOAT")
    return str(path)
