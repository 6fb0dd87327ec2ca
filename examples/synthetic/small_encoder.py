"""Pre-train a small wav2vec 2.0 to name phonemes in synthesised words, in about 80 s on 2 CPU cores.

It stands in for a large encoder where there is no network. It knows only English words in the voices of espeak-ng.
"""

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    ProgressCallback,
    Trainer,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForAudioFrameClassification,
    set_seed,
)

from peft_elp.recipes import Collator, RecipeTrainingArguments, num_frames

from .synthesize import Speech, synthesizer

FRAME_S = 0.02  # as in wav2vec 2.0
# Each voice is an accent of English and a speaker. No speaker is in both lists.
TRAINING_VOICES = """
en-us+m1 en+f2 en-gb-scotland+m7 en-us+f1 en+m3 en-gb-x-rp+f4 en-us+Andy en-us-nyc+steph en-gb-x-gbclan+Michael
en-029+adam en-gb-x-gbcwmd+linda en-us+Alex en-us+max en+Annie en-us+klatt2 en+Mario en-us+m5 en-gb-x-rp+m8
en-gb-scotland+Alicia en-us+f2 en-us-nyc+rob en-gb-x-gbclan+zac en-029+Reed en-gb-x-gbcwmd+anika
"""
TEST_VOICES = """
en-us+m2 en+f3 en-gb-scotland+belinda en-us+Denis en-gb-x-rp+david en-us-nyc+f5 en-us+Marco en-029+m6
"""
# The words that the encoder is trained on. None of them is a command of spoken_commands.py.
OTHER_WORDS = Path(__file__).with_name("words.txt").read_text(encoding="utf-8").split()


def vary(words: Sequence[str], voices: Sequence[str], voices_per_word: int, takes: int) -> list[dict[str, Any]]:
    """Return arguments of `Synthesizer.say`: each word in some voices, at a changing pitch and rate."""
    rng = random.Random(0)
    return [
        {"text": word, "voice": voice, "pitch": rng.randint(30, 70), "words_per_minute": rng.randint(130, 200)}
        for word in words
        for voice in rng.sample(voices, min(voices_per_word, len(voices)))
        for _ in range(takes)
    ]


class ProgressWithLoss(ProgressCallback):
    """The progress bar of Trainer, with the loss at its end instead of on lines of its own."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.2f}")


def cross_entropy(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(outputs.logits.flatten(0, -2), labels.flatten())


def pretrain(
    output_dir: str | Path,
    steps: int = 400,
    seed: int = 0,
    num_words: int | None = None,
    num_voices: int | None = None,
    words_per_clip: int = 1,
    pre_norm: bool = True,
) -> None:
    """Train a small wav2vec 2.0 to name the phoneme in each frame; save it with its feature extractor.

    Args:
        output_dir: Folder for both.
        steps: Training steps, of 32 clips each.
        seed: Seed of everything random.
        num_words: Number of `OTHER_WORDS` to use. None: all.
        num_voices: Number of `TRAINING_VOICES` to use. None: all.
        words_per_clip: Most words in a clip. Each word begins eight clips.
        pre_norm: Whether each layer normalises its input, as in large encoders, or its output.
    """
    words = OTHER_WORDS[:num_words]
    rng = random.Random(seed)
    texts = [" ".join([word, *rng.choices(words, k=rng.randrange(words_per_clip))]) for word in words]
    voices = TRAINING_VOICES.split()[:num_voices]
    spoken = [synthesizer().say(**say) for say in vary(texts, voices, voices_per_word=8, takes=1)]
    phonemes = sorted({phoneme for speech in spoken for _, phoneme in speech.phonemes} | {""})
    sizes: dict[str, Any] = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 768, "num_conv_pos_embeddings": 32, "num_conv_pos_embedding_groups": 8}
    # A frame is 20 ms as in wav2vec 2.0, but in four wide convolutions instead of seven, to be fast on a CPU.
    sizes |= {"conv_dim": [128] * 4, "conv_kernel": [64, 8, 4, 4], "conv_stride": [20, 4, 2, 2]}
    sizes |= {f"{where}_dropout": 0.05 for where in ("hidden", "attention", "activation", "feat_proj")}
    config: Any = Wav2Vec2Config(
        **sizes,
        feat_extract_norm="layer",
        do_stable_layer_norm=pre_norm,
        mask_time_length=3,  # Words are short: the usual span of 10 masked frames would leave little of them.
        mask_time_min_masks=0,
        layerdrop=0.0,  # An L-adapter reads every layer.
        classifier_proj_size=128,
    )
    config.num_labels = len(phonemes)
    set_seed(seed)
    model = Wav2Vec2ForAudioFrameClassification(config)
    feature_extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    clips: Any = [
        {"audio": one.waveform, "labels": phoneme_labels(one, phonemes, num_frames(model, len(one.waveform)))}
        for one in spoken
    ]
    size = sum(parameter.numel() for parameter in model.wav2vec2.parameters())
    print(f"A small wav2vec 2.0: {config.num_hidden_layers} layers, {size:,} parameters, random so far. Before it is")
    print(f"frozen, it learns to name the phonemes in {len(words)} other words ({len(spoken)} synthesised clips).")
    start = time.perf_counter()
    options: dict[str, Any] = {"learning_rate": 1e-3, "weight_decay": 0.01, "max_steps": steps, "seed": seed}
    options |= {"per_device_train_batch_size": 32, "logging_steps": 10, "disable_tqdm": False, "save_strategy": "no"}
    settings = RecipeTrainingArguments(output_dir=str(output_dir), **options)
    trainer = Trainer(model, settings, Collator(feature_extractor), clips, compute_loss_func=cross_entropy)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ProgressWithLoss)
    trainer.train()
    print(f"Pre-trained for {time.perf_counter() - start:.0f} s.")
    model.wav2vec2.save_pretrained(output_dir)
    feature_extractor.save_pretrained(output_dir)


def phoneme_labels(speech: Speech, phonemes: list[str], num_frames: int) -> np.ndarray:
    """Return the number of the phoneme in each frame."""
    starts = [start_s for start_s, _ in speech.phonemes]
    sounding = np.searchsorted(starts, (np.arange(num_frames) + 0.5) * FRAME_S, side="right") - 1
    return np.array([phonemes.index(speech.phonemes[index][1] if index >= 0 else "") for index in sounding])
