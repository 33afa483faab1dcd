"""Known families of transformers, found by the names of a model's class and its bases."""

from __future__ import annotations

from torch import nn

from hasten.models.adapter import ModelAdapter

__all__ = ["find", "register", "registered"]

_HOSTS: dict[str, ModelAdapter] = {}


def register(class_name: str, spec: ModelAdapter) -> ModelAdapter:
    """Teach hasten the family of transformers whose class (or a base of it) is called `class_name`.

    A full name, `package.module.Class`, is for that class alone, and takes precedence over one without the module.

    A later registration of the same name replaces the earlier one.
    """
    _HOSTS[class_name] = spec
    return spec


def registered() -> dict[str, ModelAdapter]:
    """The known families by class name."""
    return dict(_HOSTS)


def find(model: nn.Module) -> ModelAdapter | None:
    """The entry for a model, or None if its family is not known."""
    for cls in type(model).__mro__:
        for name in (f"{cls.__module__}.{cls.__qualname__}", cls.__name__):
            if name in _HOSTS:
                return _HOSTS[name]
    return None
