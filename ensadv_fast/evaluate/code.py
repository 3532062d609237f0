"""What a module computes by beside its layers and its state: plain attributes, and the code of its forward pass.

Code of torch and of this package is left out: whoever compares fingerprints compares their versions too.
"""
from __future__ import annotations

import functools
import itertools
import re
import types
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..system import files

OWN = frozenset(vars(nn.Module()))  # attributes of every module: state, submodules, hooks
HOOKS = ("_forward_pre_hooks", "_forward_hooks")
WRITTEN_CODE = (torch.jit.ScriptModule, torch.fx.GraphModule)  # their classes have none; the objects do, as text
FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)
NUMBERS = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


def beside_state(model: nn.Module) -> dict[str, Any]:
    """By the names of submodules, as JSON holds it; {} where everything is torch's or this package's own code.

    Of an attribute that is no number, string, tensor, array, module, function or container of these the class is
    named. Functions include the functions, numbers and strings that they take from their modules and closures.
    """
    return _Walk().module(model)


def code_of(function: Any) -> Any:
    """The code of a function, bound method or partial, as :func:`beside_state` has it; None where it is known."""
    return None if is_known(function) else _Walk().value(function)


def plain_repr(value: Any) -> str:
    """repr without addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def is_known(of: Any) -> bool:
    """Does this class or function belong to torch, to Python or to this package, whose versions tell it apart?"""
    return str(getattr(of, "__module__", "")).partition(".")[0] in ("torch", "builtins", "ensadv_fast")


class _Walk:
    """One walk over a module. What was met before is named by its number, so that cycles end."""

    def __init__(self) -> None:
        self._met: dict[int, tuple[int, Any]] = {}  # id -> number, and the object, which keeps its id its own

    def _is_new(self, value: Any) -> bool:
        if id(value) in self._met:
            return False
        self._met[id(value)] = len(self._met), value
        return True

    def module(self, model: nn.Module) -> dict[str, Any]:
        found = {name: self._one(m) for name, m in model.named_modules() if self._is_new(m)}
        return {name: more for name, more in found.items() if more}

    def _one(self, m: nn.Module) -> dict[str, Any]:
        known = is_known(type(m))
        attributes = {k: v for k, v in vars(m).items() if k not in OWN and (not known or _is_foreign(v))}
        found = {k: self.value(v) for k, v in sorted(attributes.items())}
        hooks = [self.value(hook) for name in HOOKS for hook in getattr(m, name).values() if not is_known(hook)]
        code = [self._class(c) for c in type(m).__mro__ if not is_known(c)]
        if isinstance(m, WRITTEN_CODE):
            code.append(str(getattr(m, "code", "")))
        parts = {"attributes": found, "hooks": hooks, "code": code}
        return {name: part for name, part in parts.items() if part}

    def _class(self, c: type) -> Any:
        """Methods, and numbers and strings that the class holds."""
        held = {k: getattr(v, "__func__", getattr(v, "fget", v)) for k, v in vars(c).items()
                if not k.startswith("__") or k == "__call__"}
        return {k: self.value(v) for k, v in sorted(held.items()) if isinstance(v, (types.FunctionType, *NUMBERS))}

    def value(self, v: Any) -> Any:
        if v is None or isinstance(v, NUMBERS):
            return repr(v)
        if isinstance(v, (Tensor, np.ndarray)):
            return [list(v.shape), files.digest(torch.as_tensor(v).detach())]
        if isinstance(v, np.generic):
            return repr(v)
        if not self._is_new(v):
            return self._met[id(v)][0]
        if isinstance(v, dict):
            return [[self.value(k), self.value(one)] for k, one in v.items()]
        if isinstance(v, (list, tuple)):
            return [self.value(one) for one in v]
        if isinstance(v, (set, frozenset)):
            return sorted(map(plain_repr, v))
        if isinstance(v, nn.Module):  # one that is not registered: its state is nowhere else
            state = dict(itertools.chain(v.named_parameters(), v.named_buffers()))
            self._met.pop(id(v))
            return [plain_repr(v), files.digest(state), self.module(v)]
        if isinstance(v, types.MethodType):
            return self.value(v.__func__)
        if isinstance(v, functools.partial):
            return [self.value(v.func), self.value(v.args), self.value(v.keywords)]
        if isinstance(v, types.FunctionType):
            return self._function(v)
        return f"{type(v).__module__}.{type(v).__qualname__}"

    def _function(self, f: types.FunctionType) -> Any:
        if is_known(f):
            return f"{f.__module__}.{f.__qualname__}"
        codes = list(_codes(f.__code__))
        taken = {name: f.__globals__.get(name) for code in codes for name in code.co_names}
        taken |= {name: cell.cell_contents for name, cell in zip(f.__code__.co_freevars, f.__closure__ or ())
                  if _is_filled(cell)}
        used = {k: self.value(v) for k, v in sorted(taken.items())
                if v is not None and isinstance(v, (Tensor, *FUNCTIONS, *NUMBERS))}
        return [[_code(code) for code in codes], self.value(f.__defaults__), self.value(f.__kwdefaults__), used]


def _is_foreign(v: Any) -> bool:
    """Is this an attribute that a module of a known class has got from its user?"""
    return isinstance(v, (Tensor, np.ndarray)) or isinstance(v, FUNCTIONS) and not is_known(v)


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _codes(code: types.CodeType) -> Iterable[types.CodeType]:
    """The code itself, and what is defined inside it."""
    yield code
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _codes(const)


def _code(code: types.CodeType) -> list[str]:
    consts = [sorted(map(repr, c)) if isinstance(c, frozenset) else repr(c) for c in code.co_consts
              if not isinstance(c, types.CodeType)]
    return [code.co_code.hex(), repr(code.co_names), repr(code.co_varnames), repr(consts)]
