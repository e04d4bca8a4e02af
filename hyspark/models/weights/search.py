"""Find the state dicts in the contents of a file, wherever they lie, and choose one.

A state dict is a mapping of names to tensors. Training programs store it under names of their own (`state_dict`,
`network_weights`, `teacher`, `model_ema`), nested, in lists, or module by module. The one that matches the network best
is used. Of several that match equally well, `preference` decides; where it does not, the choice is the user's.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hyspark.models.weights.objects import ModuleState

CONTAINERS = ("model", "state_dict", "module")
"""Keys under which most checkpoints store their weights; preferred to other keys."""
NO_WEIGHTS = re.compile(r"optim|sched|exp_avg|momentum_buffer|scaler|rng_state|_loops?$|^loops$")
"""Keys of states of an optimizer and the like, which are not searched."""
TEACHER = re.compile(r"teacher")
AVERAGED = re.compile(r"(^|[._])(ema|swa|averaged?|avg|student|momentum|target)([._]|$)|_k\.|momentum_encoder", re.I)
"""Copies that are used only if there is no other: averages of the weights, and the student of a teacher."""
MAX_DEPTH = 12


@dataclass(frozen=True)
class Candidate:
    """State dict in the contents of a file.

    Attributes:
        path: keys and indices that lead to it; none for the contents themselves.
        tensors: the tensors by name.
        others: the names beside them whose values are no tensors.
        is_joined: whether several state dicts lie side by side in it.
        is_module: whether it was a whole module.
    """

    path: tuple[Any, ...]
    tensors: dict[str, Tensor]
    others: tuple[Any, ...] = ()
    is_joined: bool = False
    is_module: bool = False

    @property
    def key(self) -> str:
        """The path, joined by dots."""
        return ".".join(map(str, self.path))


def find_candidates(contents: object, path: tuple[Any, ...] = ()) -> Iterator[Candidate]:
    """Find all state dicts in the contents of a file, the inner before the outer.

    If state dicts lie side by side, such as those of an encoder and a decoder, the whole is one more.
    """
    items = named_items(contents)
    if len(path) > MAX_DEPTH or {"state", "param_groups"} <= items.keys():
        return
    inner = {
        name: list(find_candidates(value, (*path, name)))
        for name, value in items.items()
        if not NO_WEIGHTS.search(str(name))
    }
    for found in inner.values():
        yield from found
    own = {name: tensor for name, value in items.items() if (tensor := tensor_or_array(value)) is not None}
    if own and not isinstance(contents, list | tuple):
        names = {str(name): tensor for name, tensor in own.items()}
        others = tuple(name for name in items if name not in own or not isinstance(name, str))
        yield Candidate(path, names, others, is_module=isinstance(contents, ModuleState | nn.Module))
    outermost = {name: found[-1].tensors for name, found in inner.items() if found}
    if len(outermost) + bool(own) > 1 and not isinstance(contents, list | tuple):
        joined = {f"{name}.{rest}": value for name, found in outermost.items() for rest, value in found.items()}
        yield Candidate(path, {str(name): tensor for name, tensor in own.items()} | joined, is_joined=True)


def named_items(contents: object) -> dict[Any, Any]:
    """Return the items of a mapping, those of a list by their index, and the state dict of a module."""
    if isinstance(contents, nn.Module):
        return dict(contents.state_dict())
    if isinstance(contents, Mapping):
        return dict(contents)
    return dict(enumerate(contents)) if isinstance(contents, list | tuple) else {}


def tensor_or_array(value: object) -> Tensor | None:
    """Return a tensor or a numeric array as a tensor; None for other values."""
    if (
        isinstance(value, np.ndarray)
        and value.dtype.kind in "fiub"
        and value.dtype.name not in ("float128", "longdouble")
    ):
        return torch.from_numpy(np.array(value, order="C", dtype=value.dtype.newbyteorder("=")))
    return value if isinstance(value, Tensor) else None


def choose_state_dict(
    contents: object,
    name: str,
    score: Callable[[Mapping[str, Tensor]], Any] | None = None,
    *,
    settings: Collection[str] = (),
    key: str = "",
) -> tuple[Candidate, tuple[str, ...]]:
    """Choose the state dict of a file that has the highest score.

    Args:
        contents: contents of the file.
        name: name of the file, for messages.
        score: how well tensors match; by default their number, where most lie in one state dict.
        settings: keys of plain data that may lie among its tensors; they are excluded.
        key: keys of the state dict, joined by dots, if the user has chosen; prefixes of its names may follow.

    Returns:
        The state dict, and the keys of alternatives that match equally well.

    Raises:
        ValueError: there is no state dict, or none under `key`; several match equally well.
    """
    found = list(find_candidates(contents))
    if key:
        found = [candidate for c in found if (candidate := below_key(c, key)) is not None][:1]
    if not found:
        raise ValueError(f"{name}: no weights; expected a state dict{explain_absence(contents, key)}")
    if score is None:
        most = max(len(candidate.tensors) for candidate in found)
        single = [c for c in found if not c.is_joined and 2 * len(c.tensors) >= most]
        found, score = single or found, len
    scores = [score(candidate.tensors) for candidate in found]
    best = [candidate for candidate, value in zip(found, scores, strict=True) if value == max(scores)]
    equal = [c for c in best if not any(is_within(other, c) for other in best)]
    rank = min(preference(c.key) for c in equal)
    chosen = [c for c in equal if preference(c.key) == rank]
    if not max_score(scores):
        chosen = [max(found, key=lambda c: len(c.tensors))]
    others = tuple(dict.fromkeys(c.key for c in (equal if max_score(scores) else ()) if c.key != chosen[0].key))
    if len(chosen) > 1 and not all(are_equal(chosen[0], c) for c in chosen[1:]):
        raise ValueError(
            f"{name}: {len(chosen)} state dicts match equally well: {', '.join(c.key for c in chosen)}; choose one: "
            f"--weights_key {chosen[0].key} (in Python key={chosen[0].key!r})"
        )
    check_values_are_tensors(chosen[0], name, settings)
    return chosen[0], others


def is_within(one: Candidate, other: Candidate) -> bool:
    """Whether a state dict is part of another one."""
    if one.path == other.path:
        return other.is_joined and not one.is_joined
    return one.path[: len(other.path)] == other.path


def max_score(scores: list[Any]) -> bool:
    """Whether the highest score is one at all, above 0 or (0, 0)."""
    best = max(scores)
    return bool(any(best) if isinstance(best, tuple) else best)


def preference(key: str) -> int:
    """Rank the key of a state dict among others that match equally well: the lowest is used.

    The usual keys first, then a teacher, which DINO's authors use, then any, last averages and students.
    """
    last = key.rpartition(".")[2]
    if last in CONTAINERS and not AVERAGED.search(key) and not TEACHER.search(key):
        return 0
    return 1 if TEACHER.search(key) else 3 if AVERAGED.search(key) else 2


def below_key(candidate: Candidate, key: str) -> Candidate | None:
    """Select what lies under a key that the user has chosen; None if nothing does."""
    if candidate.key == key:
        return candidate
    start = f"{candidate.key}." if candidate.key else ""
    prefix = key.removeprefix(start) + "."
    if not f"{key}.".startswith(start):
        return None
    tensors = {name.removeprefix(prefix): x for name, x in candidate.tensors.items() if name.startswith(prefix)}
    return Candidate((key,), tensors) if tensors else None


def are_equal(one: Candidate, other: Candidate) -> bool:
    """Whether two state dicts hold the same tensors."""
    return one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(value, other.tensors[name]) for name, value in one.tensors.items()
    )


def check_values_are_tensors(candidate: Candidate, name: str, settings: Collection[str]) -> None:
    """Raise ValueError if other values lie among the tensors of a state dict."""
    others = [key for key in candidate.others if key not in settings and not str(key).endswith("_extra_state")]
    if unnamed := [key for key in others if not isinstance(key, str)]:
        raise ValueError(f"{name}: no state dict; expected text as keys, got {unnamed[0]!r}")
    if others:
        raise ValueError(
            f"{name}: no state dict; expected tensors as values, got others at {', '.join(others[:3])}; save the "
            "tensors under a key of their own"
        )


def explain_absence(contents: object, key: str) -> str:
    """Describe contents without a state dict, and what to do."""
    if key:
        keys = list(dict.fromkeys(c.key for c in find_candidates(contents) if c.key))
        return f" under {key!r}, which is no key" + (f"; its keys are {', '.join(keys[:8])}" if keys else "")
    if isinstance(contents, Tensor | np.ndarray):
        return f", got one tensor {tuple(contents.shape)} without a name; ask for the state dict"
    if isinstance(contents, list | tuple):
        num = sum(tensor_or_array(x) is not None for x in contents)
        return f", got a list with {num} tensors without names; ask for the state dict"
    if isinstance(contents, Mapping):
        names = ", ".join(map(str, list(contents)[:8]))
        what = f"only the keys {names}" if names else "an empty file"
        return f" (tensors by name), got {what}; ask for the state dict"
    return f", got {type(contents).__name__}; ask for the state dict"
