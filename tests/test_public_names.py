"""Every public name says what it is: a docstring, and the type of every argument and result."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
from peft import PeftConfig
from transformers import PreTrainedConfig, SamConfig

import peft_talora

# methods that Python calls: they need types, what they do is known
SPECIAL = ("__init__", "__call__", "__len__", "__getitem__", "__post_init__")


def own_functions(value):
    """{name: function} of a public function, or of what a public class defines itself."""
    if not inspect.isclass(value):
        return {value.__name__: inspect.unwrap(value)}
    found = {}
    for name, member in vars(value).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        written_here = inspect.isfunction(function) and inspect.getsourcefile(function) == inspect.getsourcefile(value)
        if written_here and (not name.startswith("_") or name in SPECIAL):
            found[f"{value.__name__}.{name}"] = function
    return found


FUNCTIONS = {
    name: function
    for public in peft_talora.__all__
    for name, function in own_functions(getattr(peft_talora, public)).items()
}
CLASSES = [name for name in peft_talora.__all__ if inspect.isclass(getattr(peft_talora, name))]


def test_methods_are_looked_at():
    assert {"TALoraLinear.forward", "MSamForMultiTask.from_sam", "MSamConfig.task_specs", "use_task"} <= set(FUNCTIONS)


@pytest.mark.parametrize("name", peft_talora.__all__)
def test_docstring(name):
    # its own: that of a base class would be about something else
    assert inspect.cleandoc(getattr(peft_talora, name).__doc__ or "")
    assert not (getattr(peft_talora, name).__doc__).startswith(f"{name}(")  # what dataclass writes where there is none


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name):
    function = FUNCTIONS[name]
    assert function.__doc__ or name.rpartition(".")[2] in SPECIAL
    signature = inspect.signature(function)
    arguments = [argument for argument in signature.parameters.values() if argument.name not in ("self", "cls")]
    assert [argument.name for argument in arguments if argument.annotation is inspect.Parameter.empty] == []
    assert signature.return_annotation is not inspect.Signature.empty


@pytest.mark.parametrize("name", [name for name in CLASSES if dataclasses.is_dataclass(getattr(peft_talora, name))])
def test_every_field_is_explained(name):
    documented = inspect.getdoc(getattr(peft_talora, name)).partition("\nArgs:\n")[2].partition("\nRaises:\n")[0]
    # the lines that begin an entry, which may be of several fields
    entries = " ".join(re.findall(r"^ {4}([a-z]\w*(?:, \w+)*)(?= \(|:)", documented, flags=re.MULTILINE))
    names = set(re.findall(r"\w+", entries))
    fields = {field.name for field in dataclasses.fields(getattr(peft_talora, name))}
    for base in (PeftConfig, PreTrainedConfig, SamConfig):
        if issubclass(getattr(peft_talora, name), base):
            fields -= {field.name for field in dataclasses.fields(base)}  # explained there
    assert fields and fields <= names


def test_type_checkers_may_use_the_types():
    assert (Path(peft_talora.__file__).parent / "py.typed").is_file()
