"""A handler for Hugging Face's Inference Endpoints: all adapters of a repository, on one backbone.

Put this file into the repository beside the folders of the adapters, with a `requirements.txt` that names the wheel of
this package, as `peft-elp demo --space` writes it. A request holds a recording in base64:

    {"inputs": {"model": "emotions", "task": "classify", "file": "UklGR..."}}
"""

import base64
from typing import Any

from peft_elp.serving.engine import Engine, Request


class EndpointHandler:
    """Made once by Inference Endpoints, and called for each request."""

    def __init__(self, path: str = "") -> None:
        self.engine = Engine({}, folder=path or ".")

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        """Answer with labels ("classify"), text ("transcribe") or the embedding of a voice ("embed")."""
        inputs = data["inputs"]
        recording = {"bytes": base64.b64decode(inputs["file"], validate=True), "path": None}
        (answer,) = self.engine.answer([Request(inputs["model"], inputs["task"], recording)])
        if isinstance(answer, Exception):
            raise answer
        return {"answer": answer.tolist() if inputs["task"] == "embed" else answer}
