"""Read pickles without executing anything: data is read, and unknown objects become plain records of their state.

Training programs store their settings as objects beside the weights: argparse.Namespace, numpy scalars, OmegaConf,
enumerations, whole modules. Their classes are neither imported nor called. A record stands for each; what it holds is
searched for weights. A file that calls other functions of Python's standard library is refused: weights need none.
"""

import io
import pickle
import sys
import warnings
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # Python 2's names, which protocol 2 stores
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

HARMLESS_MODULES = frozenset(
    {
        *("argparse", "collections", "copyreg", "datetime", "decimal", "enum", "fractions", "functools", "logging"),
        *("operator", "_operator", "pathlib", "random", "re", "types", "typing", "uuid", "zoneinfo"),
    }
)
"""Modules of the standard library whose objects are settings; objects of third-party packages are too."""
HARMLESS_BUILTINS = frozenset(
    f"builtins.{name}"
    for name in ("getattr", "slice", "range", "object", "list", "dict", "tuple", "int", "float", "str", "bool")
)
TENSOR_PARTS = ("_parameters", "_buffers", "_modules")
"""Attributes in which a module stores its state."""
STATE_SETTER = "__setstate__"


class ModuleState(dict[str, Tensor]):
    """State dict of a whole module that a file holds."""


def make_record(args: tuple[Any, ...]) -> Any:
    """Make the record of an object, to which readers add items and attributes.

    It is a Counter, because torch's reader sets items of few types alone, and this one may have attributes too.
    """
    record: Counter[Any] = Counter()

    def set_state(state: Any) -> None:
        parts = state if isinstance(state, tuple) else (state,)
        for index, part in enumerate(parts):
            vars(record).update(part if isinstance(part, dict) else {f"state{index}": part})

    vars(record)[STATE_SETTER] = set_state
    vars(record).update({"args": list(args)} if args else {})
    return record


class RecordType(type):
    """Type of the classes that stand for unknown names of a pickle; a call makes a record or is refused."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if vars(cls)["is_strict"] and is_suspicious(cls.__qualname__):
            raise pickle.UnpicklingError(f"it calls {cls.__qualname__}")
        return make_record(args)


def is_suspicious(name: str) -> bool:
    """Whether a name is of a function of the standard library that no settings need."""
    top, _, function = name.partition(".")
    top = IMPORT_MAPPING.get(top, top)
    is_known = (top in HARMLESS_MODULES and "." not in function) or name in HARMLESS_BUILTINS
    return top in sys.stdlib_module_names and not is_known


def stand_in(name: str, is_strict: bool = True) -> type:
    """Make the class that stands for an unknown name; a strict one refuses calls of suspicious functions."""

    def make(_cls: type, *args: Any, **_kwargs: Any) -> Any:
        return make_record(args)

    return RecordType(name, (), {"__new__": make, "__qualname__": name, "is_strict": is_strict})


def to_list(items: Iterable[Any] = (), *_: Any) -> list[Any]:
    """Return items as a list, for a deque."""
    return list(items)


def to_dict(*_: Any) -> dict[Any, Any]:
    """Return an empty dict, for a defaultdict, whose items follow."""
    return {}


def numpy_names() -> dict[str, Callable[..., Any]]:
    """Map the names by which pickles restore numpy arrays and scalars, of numpy 1 and 2, to numpy's functions."""
    restore: Any = np.zeros(1).__reduce__()[0]
    scalar: Any = np.float64(0).__reduce__()[0]
    found: dict[str, Any] = {"numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype}
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        found |= {f"{module}._reconstruct": restore, f"{module}.scalar": scalar}
    return found | {f"numpy.dtypes.{kind.__name__}": kind for kind in {type(np.dtype(c)) for c in np.typecodes["All"]}}


DATA: dict[str, Callable[..., Any]] = {
    **numpy_names(),
    "builtins.frozenset": frozenset,
    "collections.deque": to_list,
    "collections.defaultdict": to_dict,
}
"""Functions that restore plain data; they execute nothing of a file."""


def load_torch(path: Path, is_strict: bool = True) -> object:
    """Read a file of torch.save on the CPU, by torch's restricted reader, with records for unknown objects.

    Args:
        path: the file.
        is_strict: whether to refuse a file that calls suspicious functions; nothing is called in any case.

    Raises:
        pickle.UnpicklingError: the file calls a function, or is damaged.
    """
    known: Any = [(function, name) for name, function in DATA.items()]
    with warnings.catch_warnings(), torch.serialization.safe_globals(known):
        warnings.simplefilter("ignore", UserWarning)  # of the pickle protocol
        try:
            return load_restricted(path)
        except pickle.UnpicklingError:
            names = unknown_names(path)
            if not names:
                raise
        with torch.serialization.safe_globals([(stand_in(name, is_strict), name) for name in names]):
            return as_plain_data(load_restricted(path))


def load_restricted(path: Path) -> object:
    """Read a file by torch's restricted reader; of a path, torch would take the ending for its format."""
    with path.open("rb") as file:
        return torch.load(file, map_location="cpu", weights_only=True)


def unknown_names(path: Path) -> list[str]:
    """List the names in a file of torch.save that torch's restricted reader does not know; none of a damaged file."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # written by an old version, or damaged
        return unknown_names_legacy(path)


def unknown_names_legacy(path: Path) -> list[str]:
    """List such names of a file before torch 1.6, one refusal after the other."""
    names: list[str] = []
    while True:
        with torch.serialization.safe_globals([(stand_in(name), name) for name in names]):
            try:
                load_restricted(path)
            except pickle.UnpicklingError as error:
                name = str(error).partition("GLOBAL ")[2].partition(" ")[0]
                name = name if "." in name else f"builtins.{name}"
                if name == "builtins." or name in names:
                    return names
                names.append(name)
            except Exception:
                return names
            else:
                return names


def tensor_from_bytes(content: bytes) -> object:
    """Read a tensor's storage inside a plain pickle."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


PICKLED: dict[str, Callable[..., Any]] = {
    "builtins.bytearray": bytearray,
    "builtins.complex": complex,
    "builtins.set": set,
    "collections.OrderedDict": OrderedDict,
    "_codecs.encode": lambda text, encoding: text.encode(encoding),
    "torch.storage._load_from_bytes": tensor_from_bytes,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
    **DATA,
}
"""Functions that restore data in a pickle that torch.save did not write."""


class DataUnpickler(pickle.Unpickler):
    """Reader of pickles that knows data alone; other names become records."""

    def find_class(self, module: str, name: str) -> Any:
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full = f"{module}.{name}"
        if module == "torch" and isinstance(kind := getattr(torch, name, None), torch.dtype):
            return kind
        return PICKLED.get(full) or stand_in(full)


def load_pickle(path: Path) -> object:
    """Read a pickle that torch.save did not write, such as those of detectron2.

    Raises:
        pickle.UnpicklingError: it calls a function, or is damaged.
    """
    with path.open("rb") as file:
        try:
            return as_plain_data(DataUnpickler(file, encoding="latin1").load())
        except (TypeError, AttributeError, ValueError) as error:
            raise pickle.UnpicklingError(f"it calls an object ({error})") from error


def as_plain_data(value: Any, seen: dict[int, Any] | None = None) -> Any:
    """Convert records to dicts of their items and attributes; those of modules to their state dict."""
    seen = {} if seen is None else seen
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, Mapping):
        attributes = {k: v for k, v in vars(value).items() if k != STATE_SETTER} if isinstance(value, Counter) else {}
        if all(isinstance(attributes.get(part), Mapping) for part in TENSOR_PARTS):
            seen[id(value)] = module_state(value)
            return seen[id(value)]
        made: dict[Any, Any] = {}
        seen[id(value)] = made
        made.update((key, as_plain_data(item, seen)) for key, item in (*value.items(), *attributes.items()))
        return made
    if isinstance(value, list):
        items: list[Any] = []
        seen[id(value)] = items
        items.extend(as_plain_data(item, seen) for item in value)
        return items
    return tuple(as_plain_data(item, seen) for item in value) if type(value) is tuple else value


def module_state(module: Any) -> ModuleState:
    """Collect the state dict of a whole module from its record."""
    state = vars(module)
    passing = state.get("_non_persistent_buffers_set", ())
    own = [*state["_parameters"].items(), *((k, v) for k, v in state["_buffers"].items() if k not in passing)]
    found = ModuleState((name, value) for name, value in own if value is not None)
    for name, child in state["_modules"].items():
        if child is not None and "_modules" in vars(child):
            found.update((f"{name}.{key}", value) for key, value in module_state(child).items())
    return found
