"""The modules that an adapter consists of, made as a plan says."""

from __future__ import annotations

from peft_elp.adapters import EAdapter, LAdapter, PAdapter

from .plan import Plan


def new_e_adapter(plan: Plan) -> EAdapter:
    """One E-adapter."""
    config = plan.config
    return EAdapter(
        plan.encoder.hidden_size,
        config.e_dim,
        config.e_activation,
        config.e_dropout,
        init_std=config.init_std if config.init_weights == "paper" else None,
        norm_gain=0.0 if config.init_weights is True else 1.0,
    )


def new_l_adapter(plan: Plan) -> LAdapter:
    """The L-adapter."""
    config = plan.config
    return LAdapter(
        plan.encoder.hidden_size,
        len(config.l_layers or ()),
        config.l_dim,
        config.l_activation,
        config.l_dropout,
        config.init_std if config.init_weights else None,
        output="taps" if config.l_output in (None, "head") else config.l_output,
        input_norm=bool(config.l_input_norm),
    )


def new_p_adapter(plan: Plan) -> PAdapter:
    """The P-adapter."""
    config = plan.config
    assert config.p_length is not None  # `make_plan` has chosen it.
    return PAdapter(plan.encoder.hidden_size, config.p_length, config.p_position, config.p_init_std)
