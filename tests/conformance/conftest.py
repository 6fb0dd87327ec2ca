"""What PEFT's users may do with any tuner: every test runs for each method on each model.

The list follows the tests that PEFT runs over its own tuners. LoRA and LN-Tuning run beside ELP, so that a test asks
for no more than PEFT's own methods give. A run ends in one of three ways, which `python tests/count_conformance.py`
counts by method:

- It holds.
- It is refused as promised: the test says with `refusal` which methods refuse, and what the error says.
- It does not hold: the mark `does_not_hold` beside the test says why. For ELP the mark is strict; PEFT may mend its
  own methods without failing a test here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

pytest.register_assert_rewrite("steps")

from methods import METHODS, MODELS  # noqa: E402
from steps import adapted, pair  # noqa: E402

MARK = "does_not_hold(method, reason, models=None): the test does not hold for the method, on these models or on all"


def pytest_configure(config):
    config.addinivalue_line("markers", MARK)


@pytest.hookimpl(tryfirst=True)  # before -m chooses by the marks
def pytest_collection_modifyitems(items):
    for item in items:
        chosen = getattr(item, "callspec", None)
        if chosen is None or not {"method", "model"} <= chosen.params.keys():
            continue
        method, model = chosen.params["method"], chosen.params["model"]
        if method == "LN-Tuning":  # it asks for the widths of a layer norm; PEFT knows the widths of linear layers
            item.add_marker(pytest.mark.filterwarnings("ignore:Unsupported layer type .*LayerNorm:UserWarning"))
        for mark in item.iter_markers("does_not_hold"):
            name, reason = mark.args
            if name == method and model in mark.kwargs.get("models", MODELS):
                item.add_marker(pytest.mark.xfail(reason=reason, strict=method == "ELP"))


@pytest.fixture(params=METHODS)
def method(request, record_property):
    record_property("method", request.param)
    return METHODS[request.param]


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]


@pytest.fixture
def peft_model(method, model):
    return adapted(method, model)


@pytest.fixture
def paired(method, model):
    return pair(method, model)


@dataclass
class Refusal:
    """Whether a method refused, to be read after the block."""

    happened: bool = False


@pytest.fixture
def refusal(method, record_property):
    """Blocks that some methods promise to refuse: `with refusal("ELP", match="cannot be merged") as refused:`."""

    @contextmanager
    def block(*methods: str, match: str, error: type[Exception] = ValueError) -> Iterator[Refusal]:
        refused = Refusal()
        if method.name not in methods:
            yield refused
            return
        try:
            with pytest.raises(error, match=match):
                yield refused
            refused.happened = True
            record_property("refused", True)
        except pytest.fail.Exception:
            if method.name == "ELP":  # the others may have learnt it
                raise

    return block
