"""Parameters that should be trained and get no gradient."""

from __future__ import annotations

from torch import nn

from peft_elp.wording import shortened

from .paths import canonical


def check_gradients(model: nn.Module) -> None:
    """Check that the last backward pass reached every parameter that is trained.

    Call it once, after the first `loss.backward()`. Parameters that a process holds no part of are left out.

    Args:
        model: A model, with or without adapters.

    Raises:
        RuntimeError: Parameters that require a gradient have none. The message names them and the likely reason.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> model[1](model[0].weight).sum().backward()
        >>> check_gradients(model)
        Traceback (most recent call last):
        RuntimeError: 1 trained parameters got no gradient (0.bias): nothing that the loss depends on comes after them.
    """
    unreached = [
        canonical(name) for name, p in model.named_parameters() if p.requires_grad and p.grad is None and p.numel()
    ]
    if not unreached:
        return
    reason = "nothing that the loss depends on comes after them"
    if any("elp_l." in name for name in unreached):
        reason = (
            "the loss does not depend on the encoder's last_hidden_state, which the L-adapter replaces. Let the head "
            "read that, not hidden_states, or leave L out of adapters"
        )
    raise RuntimeError(
        f"{len(unreached)} trained parameters got no gradient ({shortened(unreached, shown=2)}): {reason}."
    )
