"""The usual call of an operator, whose arguments nobody looks at but the operator itself.

To look at every argument, so that whatever is wrong is said by its name, takes longer than a small batch does, and on
the CPU the operators refuse by themselves what does not fit. So where nothing is out of the ordinary they are called
at once, and arguments are looked at one by one only if they refuse. What they would not refuse, `_calls` looks at,
which is compiled and calls the kernels without PyTorch's dispatcher where nobody watches it: all of this runs between
two batches, when what it needs has left the processor's nearest caches.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from metarec_fast import _arguments, _library, _ops
from metarec_fast._arguments import PAIRWISE, WANT, WANT_ALL, Settings, Start, check_outer_loss, kept_scalar
from metarec_fast.results import AdaptedItems, FastWeights, MetaStep, SparseRows
from metarec_fast.tasks import Entries, TaskBatch

try:
    from metarec_fast import _calls
except ImportError:
    _calls = None  # type: ignore[assignment, unused-ignore]


class Unusual(Exception):
    """An argument has to be looked at more closely."""


_loops: dict[tuple[Settings, torch.dtype], tuple[Any, ...]] = {}
_MOST_LOOPS = 1000


def _loop(settings: Settings, dtype: torch.dtype) -> tuple[Any, ...]:
    """The inner loop as the operators take it, which is kept unless there are tensors in it."""
    inner_lr, steps, preconditioner, prior_pull, extra_count, momentum, loss, first_order, adapt = settings
    if not (isinstance(steps, int) or steps == "exact") or type(extra_count) not in (int, float):
        raise Unusual
    if not (momentum is None or isinstance(momentum, Tensor)):
        raise Unusual
    pull = prior_pull if isinstance(prior_pull, Tensor) else None
    if pull is None and prior_pull != 0:
        raise Unusual
    count = _ops.EXACT if steps == "exact" else steps
    rate = kept_scalar(inner_lr, dtype)
    loop = (
        rate, preconditioner, pull, momentum, float(extra_count), count, loss,
        bool(first_order), "auto", adapt,
    )  # fmt: skip
    if type(rate) is Tensor and not any(isinstance(setting, Tensor) for setting in settings):  # and no fake one
        if len(_loops) >= _MOST_LOOPS:
            _loops.clear()
        _loops[settings, dtype] = loop
    return loop


_outer_losses: dict[Any, tuple[str, str]] = {}


def _outer(key: Any, outer_loss: str | Mapping[str, float]) -> tuple[str, str]:
    """Outer losses as the operator takes them, which is kept, and one of them that looks at the same of a query."""
    losses = check_outer_loss(outer_loss)
    numbers = all(type(weight) in (int, float) for weight in losses.values())
    if not numbers or len({name in PAIRWISE for name in losses}) != 1:
        raise Unusual
    if len(_outer_losses) >= _MOST_LOOPS:
        _outer_losses.clear()
    _outer_losses[key] = kept = _ops.outer_text(losses), next(iter(losses))
    return kept


def _kernel(name: str) -> int:
    """Where the operator's kernel on the CPU can be called directly."""
    library = ctypes.CDLL(str(_library.FOLDER / f"{_library.cpu.name}.so"))
    address = ctypes.cast(getattr(library, f"metarec_fast_{name}"), ctypes.c_void_p).value
    assert address is not None
    return address


def _operator(name: str) -> tuple[Any, int]:
    return getattr(_ops.ops, name).default, _kernel(name)


def _in_forward_mode() -> bool:
    return getattr(forward_ad, "_current_level", 0) >= 0


_OPERATORS = ("adapt", "adapt_all", "adapt_and_score", "meta_step", "reptile_step")


def _known() -> dict[str, Any]:
    """What `_calls` has to know; some of it is of PyTorch's inside, which a later version may have elsewhere."""
    inside = torch._C
    return {
        "tensor": Tensor,
        "parameter": Parameter,
        "watchers": (
            inside._len_torch_dispatch_stack,
            inside._len_torch_function_stack,
            inside._functorch.peek_interpreter_stack,
            inside._get_tracing_state,
            inside._autograd._profiler_enabled,
            _in_forward_mode,
        ),
        "is_negated": Tensor.is_neg,
        "to_handles": inside._aoti.unsafe_alloc_void_ptrs_from_tensors,
        "from_handles": inside._aoti.alloc_tensors_by_stealing_from_void_ptrs,
        "operators": {name: _operator(name) for name in _OPERATORS},
        "float32": torch.float32,
        "float64": torch.float64,
        "entries_type": Entries,
        "fast_weights_type": FastWeights,
        "adapted_items_type": AdaptedItems,
        "meta_step_type": MetaStep,
        "sparse_rows_type": SparseRows,
        "pairwise": PAIRWISE,
        "scalars": _arguments._scalars,
        "loops": _loops,
        "outer_losses": _outer_losses,
        "make_scalar": kept_scalar,
        "make_loop": _loop,
        "make_outer": _outer,
        "is_grad_enabled": torch.is_grad_enabled,
        "gradient_names": tuple(WANT),
        "want_all": WANT_ALL,
    }


def _enable() -> _library.Library:
    """Tells `_calls` what it has to know, and says whether it can be used."""
    if _calls is None:
        return _library.compiled_module("_calls")
    if not _library.cpu.loaded:
        return _library.Library("_calls", False, "_C is missing")
    try:
        known = _known()
        _try_handles(known["to_handles"], known["from_handles"])
        _calls.use(known)
    except (AttributeError, TypeError, RuntimeError) as error:
        return _library.Library("_calls", False, f"this torch is another inside: {error}")
    return _library.Library("_calls", True)


def _try_handles(to_handles: Callable[..., Any], from_handles: Callable[..., Any]) -> None:
    """Raises unless they give what `_calls` takes them to give."""
    tensor = torch.zeros(1, device="cpu")
    handles = to_handles([tensor])
    kind = type(handles[0]).__name__
    if type(handles) is not list or kind != "PyCapsule" or from_handles(handles)[0].data_ptr() != tensor.data_ptr():
        raise TypeError(f"expected tensors to become a list of capsules, got {type(handles).__name__} of {kind}")


library = _enable()


def _usual(name: str) -> Callable[..., Any]:
    """What an operator of `functional` returns, given its arguments, or None where they have to be looked at."""
    return getattr(_calls, name) if library.loaded else lambda *_: None


adapt: Callable[[Start, Settings, Entries], FastWeights | None] = _usual("adapt")
adapt_and_score: Callable[[Start, Settings, TaskBatch], Tensor | None] = _usual("adapt_and_score")
meta_step: Callable[[Start, Settings, TaskBatch, str | Mapping[str, float]], MetaStep | None] = _usual("meta_step")
reptile_step: Callable[[Start, Settings, Entries], MetaStep | None] = _usual("reptile_step")
