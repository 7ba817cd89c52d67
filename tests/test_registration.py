"""PEFT knows the tuner like one of its own, however often and by whatever route the package is imported."""

import copy
import os
import pickle
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import peft.mapping
import peft.utils
import pytest
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.peft_types import PeftType

from peft_talora import TALoraConfig, TALoraModel
from peft_talora.registration import add_peft_type, register_tuner

ROOT = Path(__file__).parents[1]


def run_python(code: str) -> str:
    """Run code in a fresh interpreter without a network; its standard output."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


class TestMember:
    def test_by_name_and_by_value(self):
        member = PeftType.TALORA
        assert PeftType("TALORA") is member and PeftType["TALORA"] is member
        assert isinstance(member, PeftType) and member == "TALORA" and member != "LORA"
        assert (member.name, member.value) == ("TALORA", "TALORA")
        assert f"{member!r}" == f"{PeftType.LORA!r}".replace("LORA", "TALORA")

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_copies_are_the_member_itself(self, protocol):
        member = PeftType.TALORA
        assert pickle.loads(pickle.dumps(member, protocol)) is member
        assert copy.deepcopy(member) is member and copy.copy(member) is member
        assert copy.deepcopy({"type": [member]})["type"][0] is member

    def test_iteration_and_containment(self):
        members = list(PeftType)
        assert members.count("TALORA") == 1 and members[[m.name for m in members].index("TALORA")] is PeftType.TALORA
        assert PeftType.TALORA in PeftType and len(PeftType) == len(members) == len(PeftType.__members__)
        assert {PeftType.TALORA: 1}["TALORA"] == 1

    def test_adding_it_again_returns_it(self):
        count = len(PeftType)
        assert add_peft_type("TALORA") is PeftType.TALORA and add_peft_type("LORA") is PeftType.LORA
        assert len(PeftType) == count


def test_peft_mappings():
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.TALORA] is TALoraConfig
    assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.TALORA] is TALoraModel
    assert peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.TALORA] == "talora_" == TALoraModel.prefix
    assert PeftType.TALORA not in peft.mapping.PEFT_TYPE_TO_MIXED_MODEL_MAPPING
    assert TALoraConfig().peft_type is PeftType.TALORA
    assert type(peft.get_peft_config({"peft_type": "TALORA", "r": 3})) is TALoraConfig


class TestRegisteringAgain:
    def test_the_same_classes_change_nothing(self):
        before = dict(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING)
        register_tuner("talora", config_cls=TALoraConfig, model_cls=TALoraModel)
        assert before == peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING

    def test_a_foreign_class_under_our_name_is_refused(self, monkeypatch):
        class OtherConfig:
            pass

        monkeypatch.setitem(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.TALORA, OtherConfig)
        with pytest.raises(RuntimeError, match=r"'talora' is already registered by .*OtherConfig"):
            register_tuner("talora", config_cls=TALoraConfig, model_cls=TALoraModel)
        assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.TALORA] is OtherConfig

    @pytest.mark.slow
    def test_import_from_several_threads_beside_another_plugin(self):
        code = """
import sys, threading
from peft.utils.peft_types import PeftType
other = str.__new__(PeftType, "OTHER")
other._name_ = other._value_ = "OTHER"
type.__setattr__(PeftType, "OTHER", other)
PeftType._member_names_.append("OTHER")
PeftType._member_map_["OTHER"] = PeftType._value2member_map_["OTHER"] = other

def in_threads(work):
    barrier, found, errors = threading.Barrier(8), [], []
    def run():
        barrier.wait()
        try:
            found.extend(work())
        except BaseException as error:
            errors.append(error)
    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert not errors, errors
    names = [member.name for member in PeftType]
    assert len(set(names)) == len(names) == len(PeftType), names
    return found

def load():
    import peft_talora
    return [peft_talora.TALoraConfig().peft_type]

assert all(member is PeftType.TALORA for member in in_threads(load))
assert PeftType("OTHER") is other and list(PeftType).index("OTHER") < list(PeftType).index("TALORA")

# no import lock here: the registration's own has to hold, even if the threads change at every line of it
import time
from peft_talora.registration import add_peft_type

def change_threads(frame, event, arg):
    if frame.f_code.co_name == "add_peft_type":
        time.sleep(1e-4)
        return change_threads

threading.settrace(change_threads)
added = in_threads(lambda: [(f"NEW_{i}", add_peft_type(f"NEW_{i}")) for i in range(5)])
assert len(added) == 40 and all(member is PeftType[name] for name, member in added)
"""
        run_python(code)

    @pytest.mark.slow
    def test_import_after_the_package_was_dropped(self):
        # what a notebook's reload does
        code = """
import sys
import peft_talora
import peft.utils
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import PeftType
from torch import nn

def drop():
    for name in [n for n in sys.modules if n.partition(".")[0] == "peft_talora"]:
        del sys.modules[name]

member, first, count = PeftType.TALORA, peft_talora.TALoraConfig, len(PeftType)
drop()
import peft_talora
assert peft_talora.TALoraConfig is not first
assert PeftType.TALORA is member and len(PeftType) == count
assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is peft_talora.TALoraConfig
assert PEFT_TYPE_TO_TUNER_MAPPING[member] is peft_talora.TALoraModel
model = get_peft_model(
    nn.Sequential(nn.Linear(3, 3)), peft_talora.TALoraConfig(tasks=["a", "b"], target_modules=["0"], r=2)
)
assert model.active_task == "a"

# and with a PEFT that lacks what we need, the import itself says so
drop()
del peft.utils.register_peft_method
try:
    import peft_talora
except ImportError as error:
    print(error)
"""
        assert f"peft_talora works with peft >= 0.21, found {version('peft')}" in run_python(code)


class TestUnfitPeft:
    """One ImportError that names the version found, whatever is missing."""

    @pytest.mark.parametrize(
        "attribute", ["_get_adapter_state_dict", "_prepare_model", "_mark_only_adapters_as_trainable"]
    )
    def test_base_tuner_without_a_hook(self, monkeypatch, attribute):
        monkeypatch.delattr(BaseTuner, attribute)
        with pytest.raises(ImportError, match=rf"found {version('peft')}: its BaseTuner has no {attribute}"):
            register_tuner("talora", config_cls=TALoraConfig, model_cls=TALoraModel)

    def test_no_register_function(self, monkeypatch):
        monkeypatch.delattr(peft.utils, "register_peft_method")
        with pytest.raises(ImportError, match=rf"peft >= 0\.21, found {version('peft')}: .*register_peft_method"):
            register_tuner("talora", config_cls=TALoraConfig, model_cls=TALoraModel)

    def test_register_function_that_refuses(self, monkeypatch):
        def refuse(*, name, config_cls, model_cls, needs_more):
            raise AssertionError

        monkeypatch.delitem(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.TALORA)
        monkeypatch.setattr(peft.utils, "register_peft_method", refuse)
        with pytest.raises(
            ImportError, match=rf"found {version('peft')}: it refused to register 'talora'.*needs_more"
        ):
            register_tuner("talora", config_cls=TALoraConfig, model_cls=TALoraModel)

    def test_types_that_cannot_be_extended(self, monkeypatch):
        import peft.utils.peft_types as peft_types

        class Closed:
            __members__ = {}

        monkeypatch.setattr(peft_types, "PeftType", Closed)
        with pytest.raises(ImportError, match=rf"found {version('peft')}: its PeftType cannot be extended"):
            add_peft_type("TALORA")
