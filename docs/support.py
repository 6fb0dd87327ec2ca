"""Write the table of supported encoders from the rows that the code works with: `python docs/support.py`.

A test compares the result with `docs/reference/support.md`.
"""

import importlib
import re
from pathlib import Path

import transformers

from peft_elp.backbones import BACKBONES, REFUSED, Backbone

NOT_HEARING = "ForPreTraining|TextTo|ForCausalLM"  # these have no encoder of speech, or no head that a user trains
PAGE = Path(__file__).parent / "reference" / "support.md"
BEFORE = """# Supported encoders

Written by `python docs/support.py` from the table that the code works with, for Transformers {version}. An encoder is
found by the class of the stack that runs its layers, wherever in a model it sits. **E** goes into every layer, after
each of its feed-forward modules by default; `e_after` and `exclude_modules` choose. **L**: "any" output mode, or
"project/residual" where the stack pools or up-samples behind its layers, so that the sum of taps has to keep their
width. **P**: "joined" to the stack's input, or "carried" through the layers beside the frames, where the front end
sits inside the stack.

| stack | model | E | L | P | models with it |
|---|---|---|---|---|---|
"""
AFTER = """
Other models come in through [`register_backbone`](../how-to/new-encoder.md). These are refused, with the reason as the
error:

"""


def modules_of_transformers() -> dict[str, str]:
    """The module in which each class of a model is defined, by the name of the class."""
    root = Path(transformers.__file__).parent / "models"
    found: dict[str, str] = {}
    for file in sorted(root.glob("*/modeling_*.py")):
        name = f"transformers.models.{file.parent.name}.{file.stem}"
        found |= dict.fromkeys(re.findall(r"^class (\w+)", file.read_text(), flags=re.MULTILINE), name)
    return found


def row(stack: str, backbone: Backbone, module_name: str) -> str:
    """One line of the table."""
    module = importlib.import_module(module_name)
    heads = [name for name in module.__all__ if re.search(r"For[A-Z]", name) and not re.search(NOT_HEARING, name)]
    sites = " and ".join(f"`{part}`" for part in backbone.feed_forward)
    taps = "any" if backbone.taps_end == "stack" else "project/residual"
    pseudo = "carried" if backbone.front_end_inside else "joined"
    cells = [
        f"`{stack}`",
        module_name.split(".")[2],
        sites,
        f"no: {backbone.no_l}" if backbone.no_l else taps,
        f"no: {backbone.no_p}" if backbone.no_p else pseudo,
        ", ".join(f"`{name}`" for name in heads) or "a tower of larger models",
    ]
    return f"| {' | '.join(cells)} |"


def page() -> str:
    """The whole page."""
    modules = modules_of_transformers()
    rows = [row(stack, backbone, modules[stack]) for stack, backbone in BACKBONES.items() if stack in modules]
    refused = [f"- `{name}`: {reason}." for name, reason in sorted(REFUSED.items())]
    before = BEFORE.format(version=transformers.__version__)
    return before + "\n".join(rows) + "\n" + AFTER + "\n".join(refused) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
