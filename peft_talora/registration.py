"""Makes PEFT know our tuners: real `PeftType` members, and PEFT's own registry."""

from __future__ import annotations

import threading
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_LOCK = threading.RLock()
_MINIMUM_PEFT = "0.21"


def _peft_error(reason: str) -> ImportError:
    try:
        installed = version("peft")
    except PackageNotFoundError:
        installed = "no peft"
    return ImportError(
        f"peft_talora works with peft >= {_MINIMUM_PEFT}, found {installed}: {reason}. "
        f'Install a fitting version with: pip install "peft>={_MINIMUM_PEFT}"'
    )


def _peft_registry() -> tuple[Any, ...]:
    """PEFT's type enum, register function and the mappings that the function fills."""
    try:
        from peft.mapping import (
            PEFT_TYPE_TO_CONFIG_MAPPING,
            PEFT_TYPE_TO_PREFIX_MAPPING,
            PEFT_TYPE_TO_TUNER_MAPPING,
        )
        from peft.tuners.tuners_utils import BaseTuner
        from peft.utils import register_peft_method
        from peft.utils.peft_types import PeftType
    except ImportError as error:
        raise _peft_error(str(error)) from error
    # hooks of the tuner base class that ours build on; without them saving would silently write too much or too little
    for attribute in ("_get_adapter_state_dict", "_prepare_model", "_mark_only_adapters_as_trainable"):
        if not hasattr(BaseTuner, attribute):
            raise _peft_error(f"its BaseTuner has no {attribute}")
    mappings = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)
    return PeftType, register_peft_method, mappings


def add_peft_type(name: str) -> Any:
    """Add the member `PeftType.NAME`, or return the one that is there.

    It is a member like any other: found by name and by value, iterated over, and kept by pickle and deepcopy.
    """
    peft_type, _, _ = _peft_registry()
    with _LOCK:
        if name in peft_type.__members__:
            return peft_type[name]
        try:
            member = str.__new__(peft_type, name)
            member._name_ = name
            member._value_ = name
            member._sort_order_ = len(peft_type.__members__)
            member.__objclass__ = peft_type
            type.__setattr__(peft_type, name, member)
            peft_type._member_names_.append(name)
            peft_type._member_map_[name] = member
            peft_type._value2member_map_[name] = member
        except (AttributeError, TypeError) as error:
            raise _peft_error(f"its PeftType cannot be extended ({error})") from error
        if peft_type(name) is not member or peft_type[name] is not member:
            raise _peft_error(f"its PeftType does not return the added member {name}")
        return member


def register_tuner(name: str, config_cls: type, model_cls: type) -> None:
    """Register a tuner with PEFT under `name` (lower case) and the prefix `{name}_`.

    Registering the same classes again is harmless, also after a reload of this package.

    Raises:
        ImportError: PEFT is too old or changed in a way we do not know.
        RuntimeError: Another package has registered other classes under this name.
    """
    with _LOCK:
        member = add_peft_type(name.upper())
        _, register_peft_method, mappings = _peft_registry()
        configs, tuners, prefixes = mappings
        registered = configs.get(member)
        if registered is None:
            try:
                register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)
            except (TypeError, ValueError, KeyError) as error:
                raise _peft_error(f"it refused to register '{name}' ({error})") from error
        elif (registered.__module__, registered.__qualname__) == (config_cls.__module__, config_cls.__qualname__):
            configs[member], tuners[member], prefixes[member] = config_cls, model_cls, f"{name}_"
        else:
            raise RuntimeError(
                f"The PEFT method '{name}' is already registered by {registered.__module__}.{registered.__qualname__}; "
                "peft_talora cannot be used together with that package."
            )
