"""A shorter window for encoders that take audio features of one fixed length, such as Whisper's 30 seconds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .find import Encoder, find_encoder

FRAME_S = 0.02  # In every family of the table that has a window.


def shorten_window(model: nn.Module, chunk_length: int | None) -> None:
    """Let an encoder with a fixed window, such as Whisper's, take shorter audio features.

    The positions of the frames are cut to the first `chunk_length` seconds. A word of one second then costs a second of
    compute, and a head that averages over frames averages over less padding. `ELPConfig(chunk_length=...)` does the same
    with an adapter, and saves it; call this function for a model without an ELP-adapter.

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
        window.place(window.first(chunk_length))


def check_window(model: nn.Module, encoder: Encoder, chunk_length: int) -> None:
    """Check that the encoder of a model can take a shorter window.

    Raises:
        ValueError: It cannot; the message says why.
    """
    stack: Any = encoder.stack
    name = type(stack).__name__
    if encoder.family.window is None:
        raise ValueError(
            f"chunk_length={chunk_length} shortens a fixed window, and {name} takes recordings of any length. Remove chunk_length."
        )
    can_generate: Any = getattr(model, "can_generate", None)
    if can_generate is not None and can_generate():
        raise ValueError(
            f"chunk_length={chunk_length} would break the text that {type(model).__name__} generates: its decoder was trained "
            "on the whole window. A shorter window is for classification and speaker verification. Leave chunk_length out."
        )
    full_s = Window(stack, encoder.family.window).whole_frames * FRAME_S
    if chunk_length > full_s:
        raise ValueError(f"chunk_length={chunk_length} is longer than the window of {name}, {full_s:g} s.")


def common_window(windows_s: Iterable[int | None]) -> int | None:
    """The window that adapters have in common, in seconds; None for the whole one.

    Raises:
        ValueError: They take windows of different lengths.
    """
    windows = set(windows_s)
    if len(windows) > 1:
        lengths = " and ".join(sorted(map(window_text, windows)))
        raise ValueError(f"These adapters take windows of different lengths: {lengths}. Use one of them at a time.")
    return windows.pop() if windows else None


def window_text(chunk_length: int | None) -> str:
    """How an error names a window."""
    return "the whole window" if chunk_length is None else f"a window of {chunk_length} s"


class FirstPositions(nn.Embedding):
    """The positions of a shorter window, which know the number of positions in the whole one."""

    whole_frames: int


class Window:
    """The fixed window of one encoder stack.

    Args:
        stack: The encoder stack, without ELP's wrapper.
        path: Path from the stack to the embedding with the positions of the frames. None if there is no fixed window.
    """

    def __init__(self, stack: nn.Module, path: str | None) -> None:
        self.stack: Any = stack
        self.path = path
        self.whole: nn.Embedding | None = None  # The positions of the whole window, while it is shorter.

    def follow(self, windows_s: Iterable[int | None]) -> None:
        """Give the encoder the window of the active adapters.

        Args:
            windows_s: The window of each active adapter in seconds. None: the whole one.

        Raises:
            ValueError: The adapters take windows of different lengths.
        """
        chunk_length = common_window(windows_s)
        if chunk_length is None:
            self.restore()
        else:
            self.shorten(chunk_length)

    def shorten(self, chunk_length: int) -> None:
        """Cut the window to the first seconds until `restore`."""
        self.restore()
        first = FirstPositions.from_pretrained(self.first(chunk_length).weight, freeze=True)
        first.whole_frames, self.whole = self.whole_frames, self.positions
        self.place(first)

    def restore(self) -> None:
        """Give the encoder its whole window back."""
        if self.whole is not None:
            weight = self.positions.weight
            self.place(self.whole.to(weight.device, weight.dtype))
            self.whole = None

    def first(self, chunk_length: int) -> nn.Embedding:
        """The positions of the first seconds, which share the memory of the others."""
        return nn.Embedding.from_pretrained(
            self.positions.weight.detach()[: round(chunk_length / FRAME_S)], freeze=True
        )

    @property
    def positions(self) -> nn.Embedding:
        """The positions that the encoder uses now."""
        positions = self.stack.get_submodule(self.path)
        assert isinstance(positions, nn.Embedding)
        return positions

    @property
    def whole_frames(self) -> int:
        """The number of frames in the whole window."""
        return getattr(self.positions, "whole_frames", self.positions.num_embeddings)

    def place(self, positions: nn.Embedding) -> None:
        """Let the encoder use other positions, and so another window."""
        assert self.path is not None
        parent, _, name = self.path.rpartition(".")
        setattr(self.stack.get_submodule(parent), name, positions)
        # Transformers checks the length of the features by its configuration.
        self.stack.config.max_source_positions = positions.num_embeddings
        self.stack.max_source_positions = positions.num_embeddings
