"""The tensors that pass between the files of this package, by name and axes.

Axes: `batch` utterances; `frames` steps of the encoder (20 ms in wav2vec 2.0, HuBERT and WavLM); `hidden` the width of
the backbone; `tap` the width of an L-adapter; `joined` the frames together with the pseudo features of a P-adapter.
"""

from jaxtyping import Float, Int, Shaped
from torch import Tensor

HiddenStates = Float[Tensor, "*batch frames hidden"]  # some encoders pack all utterances along frames, without batch
TapFrames = Float[Tensor, "*batch frames tap"]
LayerWeights = Float[Tensor, " layers"]  # the space keeps linters from reading a type name
FrameMask = Shaped[Tensor, "batch frames"]  # bool in the wav2vec 2.0 line, int64 elsewhere
FrameIndex = Int[Tensor, "batch frames"]
JoinedStates = Float[Tensor, "batch joined hidden"]  # frames and pseudo features
JoinedMask = Shaped[Tensor, "batch joined"]
JoinedIndex = Int[Tensor, "batch joined"]
