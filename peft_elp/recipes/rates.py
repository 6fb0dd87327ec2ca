"""The learning rate of each part that a recipe trains, and the factors that change them over the training."""

from collections.abc import Sequence
from typing import Any

from peft_elp.parameters import count_parameters
from peft_elp.published import published_factors, published_rates

from .arguments import ModelArguments
from .methods import has_elp, trained_parameters

# The published setting that has the rates of an adapter, by its letters.
SETTINGS = {"ELP": "e+l+p", "EL": "e+l", "E": "e-only", "L": "l-only"}
# Rates of full fine-tuning, from the same source as the rates in `peft_elp.published`.
FULL_RATES = {"asv": {"head": 5e-4, "encoder": 1e-4}, "er": {"head": 5e-4, "encoder": 5e-5}}
FULL_RATES |= {"asr": {"head": 1e-2, "encoder": 1e-4}, "ic": {"head": 5e-4, "encoder": 1e-4}}
LORA_RATE = 5e-4  # Our choice: no rate was published for these tasks.


def learning_rates(model: Any, model_args: ModelArguments, args: Any, task: str) -> dict[str, float]:
    """Return the rate of each part that is trained: the given one, or else the published one.

    Args:
        model: The model, as `adapt` returns it.
        model_args: The model arguments, with the rates that were given.
        args: The training arguments; their `learning_rate` replaces all published rates.
        task: "asr", "asv", "er" or "ic", as in `peft_elp.published_rates`.

    Returns:
        Rates of "head" and of "encoder", or of "L", "E", "P" and "layer norms"; of "layer weights" where it is
        published or given, else `create_optimizer` decides.

    Raises:
        ValueError: A rate was given for a part that is not trained.
    """
    parts = ("head", "E", "L", "layer weights", "P", "layer norms", "encoder")
    given = {part: getattr(model_args, f"{part.lower().replace(' ', '_')}_learning_rate") for part in parts}
    chosen: dict[str, float] = {part: rate for part, rate in given.items() if rate is not None}
    if has_elp(model):
        trained = [part for part, count in count_parameters(model).items() if count]
        published = published_rates(_setting(model), task)
        if "L" in trained:
            trained.append("layer weights")
        if "L" in chosen:
            published.pop("layer weights", None)
        if "E" in chosen and "P" in trained:
            chosen.setdefault("P", chosen["E"])
    else:
        trained = [part for part, held in trained_parameters(model).items() if held]
        published = dict(FULL_RATES[task])
        if model_args.method != "full":
            published = {"encoder": LORA_RATE, "head": published_rates("e+l", task)["head"]}
    if untrained := [part for part in chosen if part not in trained]:
        raise ValueError(
            f"A learning rate is given for {untrained[0]!r}, but --method {model_args.method} trains "
            f"{', '.join(trained)}. Remove the option."
        )
    if args.learning_rate is not None:
        published = dict.fromkeys(trained, float(args.learning_rate))
        published.pop("layer weights", None)
    rates = published | chosen
    # The head comes first: Trainer logs the rate of the first group.
    return {part: rates[part] for part in sorted(trained, key="head".__ne__) if part in rates}


def schedule_factors(model: Any, task: str) -> Sequence[float]:
    """Return the published factors of all learning rates, one for each stretch of the training."""
    return published_factors(_setting(model) if has_elp(model) else "e+l", task)


def _setting(model: Any) -> str:
    """Return the published setting that is closest to an adapter."""
    config = model.peft_config["default"]
    if config.adapters == "E" and len(config.e_after) == 2:
        return "conventional"
    return SETTINGS.get(config.adapters, "e+l+p")
