"""A shorter window for encoders that take audio features of one fixed length, such as Whisper's 30 seconds."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from copy import copy
from typing import Any

import torch
from torch import nn

from peft_elp.call.own_frames import weigh_own_frames
from peft_elp.heads import head_row

from .find import Encoder, find_encoder

POOLED = "_elp_pooled"  # Attribute of an encoder that `pool_own_frames` has changed.
FRAME_S = 0.02  # In every family of the table that has a window.


def shorten_window(model: nn.Module, chunk_length: int | None) -> None:
    """Let an encoder with a fixed window, such as Whisper's, take shorter audio features.

    The positions of the frames are cut to the first `chunk_length` seconds. A word of one second then costs a second
    of compute, and a head that averages over frames averages over less padding. `ELPConfig(chunk_length=...)` does the
    same with an adapter, and saves it; call this function for a model without an ELP-adapter.

    The feature extractor has to pad to the same length:
    `AutoFeatureExtractor.from_pretrained(name, chunk_length=chunk_length)`.

    Args:
        model: A model with a speech encoder, which is changed in place.
        chunk_length: Length in whole seconds. None leaves the model as it is.

    Raises:
        ValueError: The encoder has no fixed window or a shorter one, or the model generates text.

    Examples:
        >>> import torch
        >>> from transformers import WhisperConfig, WhisperForAudioClassification
        >>> sizes = dict(d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32)
        >>> model = WhisperForAudioClassification(WhisperConfig(**sizes))
        >>> shorten_window(model, 2)
        >>> model(torch.zeros(1, 80, 200)).logits.shape
        torch.Size([1, 2])
    """
    if chunk_length is not None:
        encoder = find_encoder(model)
        check_window(model, encoder, chunk_length)
        window = Window(encoder.stack, encoder.family.window)
        first = window.positions.weight.detach()[: round(chunk_length / FRAME_S)]
        window.place(nn.Embedding.from_pretrained(first), encoder.stack.config)


def check_window(model: nn.Module, encoder: Encoder, chunk_length: int) -> None:
    """Check that the encoder of a model can take a shorter window."""
    stack: Any = encoder.stack
    name = type(stack).__name__
    if encoder.family.window is None:
        raise ValueError(
            f"chunk_length={chunk_length} shortens a fixed window, and {name} takes recordings of any length. Remove "
            "chunk_length."
        )
    can_generate: Any = getattr(model, "can_generate", None)
    if can_generate is not None and can_generate():
        raise ValueError(
            f"chunk_length={chunk_length} would break the text that {type(model).__name__} generates. A shorter "
            "window is for classification and speaker verification."
        )
    full_s = Window(stack, encoder.family.window).whole_frames * FRAME_S
    if chunk_length > full_s:
        raise ValueError(f"chunk_length={chunk_length} is longer than the window of {name}, {full_s:g} s.")


def averages_over_padding(model: nn.Module, encoder: Encoder) -> bool:
    """Whether the head of a model averages over a fixed window, padding included, and the encoder gets its mask."""
    row = head_row(type(model))
    if encoder.family.window is None or row is None or row.output != "labels":
        return False
    # Transformers 5.0 passes these arguments on one by one, and no mask.
    return "return_dict" not in inspect.signature(type(model).forward).parameters


def pool_own_frames(model: nn.Module) -> nn.Module:
    """Let a head that averages over a fixed window, such as Whisper's, average over a recording's own frames.

    `WhisperForAudioClassification` takes the mean over the whole window, so that most of what it averages may be
    padding. New ELP-adapters change this themselves (`ELPConfig.pool_own_frames`). Call this function for a model
    without one, before you compare methods, and pass the `attention_mask` that the feature extractor returns with
    `return_attention_mask=True`. A call without a mask answers as before.

    Args:
        model: A model with a speech encoder, which is changed in place. Nothing changes if it has no such head.

    Returns:
        The model.

    Raises:
        ValueError: The model has no supported encoder, or several.

    Examples:
        >>> import torch
        >>> from transformers import WhisperConfig, WhisperForAudioClassification
        >>> sizes = dict(d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32)
        >>> model = pool_own_frames(WhisperForAudioClassification(WhisperConfig(max_source_positions=50, **sizes)))
        >>> mask = (torch.arange(100) < 60).long()[None]
        >>> model(torch.zeros(1, 80, 100), attention_mask=mask).logits.shape
        torch.Size([1, 2])
    """
    encoder = find_encoder(model)
    if averages_over_padding(model, encoder) and not getattr(encoder.stack, POOLED, False):
        encoder.stack.register_forward_hook(weigh_own_frames, with_kwargs=True)
        setattr(encoder.stack, POOLED, True)
    return model


def common_window(windows_s: Iterable[int | None]) -> int | None:
    """Return the window that adapters have in common, in seconds; None for the whole one."""
    windows = set(windows_s)
    if len(windows) > 1:
        lengths = " and ".join(sorted(map(window_text, windows)))
        raise ValueError(f"These adapters take windows of different lengths: {lengths}. Use one of them at a time.")
    return windows.pop() if windows else None


def window_text(chunk_length: int | None) -> str:
    """Return how an error names a window."""
    return "the whole window" if chunk_length is None else f"a window of {chunk_length} s"


class FirstPositions(nn.Embedding):
    """The positions of a shorter window.

    In a state dict they are the positions of the whole window, so that a checkpoint of the model loses nothing.
    """

    whole: tuple[nn.Embedding]  # A tuple, so that it is not a sub-module.

    @classmethod
    def of(cls, whole: nn.Embedding, frames: int) -> FirstPositions:
        """Return the first positions of an embedding, which share the memory of the others."""
        first = cls.from_pretrained(whole.weight.detach()[:frames], freeze=True)
        first.whole = (whole,)
        first.register_state_dict_post_hook(_with_all_positions)
        first.register_load_state_dict_pre_hook(_load_all_positions)
        return first


def _with_all_positions(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    assert isinstance(module, FirstPositions)
    state_dict[f"{prefix}weight"] = module.whole[0].weight.detach().to(module.weight)


def _load_all_positions(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    assert isinstance(module, FirstPositions)
    given = state_dict.get(f"{prefix}weight")
    if given is not None and len(given) == len(module.whole[0].weight):
        with torch.no_grad():
            module.whole[0].weight.copy_(given)
        state_dict[f"{prefix}weight"] = given[: module.num_embeddings]


class Window:
    """The fixed window of one encoder stack, by the path from the stack to the positions of the frames, if any."""

    def __init__(self, stack: nn.Module, path: str | None) -> None:
        self.stack: Any = stack
        self.path = path
        self.config: Any = None  # The configuration of the whole window, while it is shorter.

    def follow(self, seconds: Iterable[int | None]) -> None:
        """Give the encoder the window of the active adapters, in seconds; None for the whole one."""
        chunk_length = common_window(seconds)
        self.restore()
        if chunk_length is not None:
            # The encoder gets a configuration of its own: the model's still describes the whole window.
            self.config = self.stack.config
            self.place(FirstPositions.of(self.positions, round(chunk_length / FRAME_S)), copy(self.config))

    def check(self, features: Any) -> None:
        """Refuse audio features of another length than the shorter window of the active adapter."""
        if self.config is None or not isinstance(features, torch.Tensor):
            return
        frames = self.positions.num_embeddings
        if features.shape[-1] != 2 * frames:
            raise ValueError(
                f"The active adapter reads a window of {frames * FRAME_S:g} s, so features of length {2 * frames}, "
                f"got {features.shape[-1]}. Load the feature extractor with chunk_length={frames * FRAME_S:g}, and "
                "pass it to a pipeline as feature_extractor=..."
            )

    def restore(self) -> None:
        """Give the encoder its whole window back."""
        positions = self.positions if self.path else None
        if isinstance(positions, FirstPositions):
            (whole,), weight = positions.whole, positions.weight
            self.place(whole.to(weight.device, weight.dtype), self.config)
            self.config = None

    @property
    def positions(self) -> nn.Embedding:
        """The positions that the encoder uses now."""
        positions = self.stack.get_submodule(self.path)
        assert isinstance(positions, nn.Embedding)
        return positions

    @property
    def whole_frames(self) -> int:
        """The number of frames in the whole window."""
        positions = self.positions
        return len((positions.whole[0] if isinstance(positions, FirstPositions) else positions).weight)

    def place(self, positions: nn.Embedding, config: Any) -> None:
        """Let the encoder use other positions, and the configuration that it reads its window from."""
        assert self.path is not None
        parent, _, name = self.path.rpartition(".")
        setattr(self.stack.get_submodule(parent), name, positions)
        # Transformers checks the length of the features by its configuration.
        config.max_source_positions = positions.num_embeddings
        self.stack.config = config
        self.stack.max_source_positions = positions.num_embeddings
