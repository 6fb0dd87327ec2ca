import importlib

import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import peft_elp
from peft_elp.tuner.registry import register


def test_a_second_import_is_harmless():
    before = list(PeftType)
    importlib.reload(peft_elp)
    elp = PeftType("ELP")
    assert list(PeftType) == before
    assert PEFT_TYPE_TO_CONFIG_MAPPING[elp] is peft_elp.ELPConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[elp] is peft_elp.ELPModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[elp] == "elp_"


def test_a_method_of_peft_with_the_same_name_is_not_overwritten(monkeypatch):
    class TheirConfig:
        __module__ = "peft.tuners.elp.config"

    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType("ELP"), TheirConfig)
    with pytest.raises(ImportError, match=r"method called ELP of its own \(peft.tuners.elp.config"):
        register(peft_elp.ELPConfig, peft_elp.ELPModel)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType("ELP")] is TheirConfig
