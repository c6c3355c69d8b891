"""Fake kernels, gradients and autocast of the operators: what PyTorch's stable C++ ABI leaves to Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import impl, register_autograd, register_fake

from metarec_fast import _autocast
from metarec_fast._arguments import WANT
from metarec_fast._known_gradients import Once, is_known_one

ops = torch.ops.metarec_fast

ITEM_TABLE, ITEM_BIAS, SUPPORT_ITEMS, SUPPORT_OFFSETS, SUPPORT_WEIGHTS, SUPPORT_NEGATIVES, INPUTS = 2, 3, 5, 7, 8, 9, 12
QUERY = 2  # query_items, query_offsets of adapt_and_score
JUDGED_QUERY, QUERY_NEGATIVES = 7, 4  # query_items … task_weights of meta_step, and where negatives are among them
FIRST_ORDER, ADAPT_WHAT = 7, 9  # among the inner loop's arguments


def places(loop_start: int) -> dict[str, int]:
    """Where an operator has the arguments that have gradients, if its inner loop's begin at `loop_start`."""
    user_side = dict(zip(("user_init", "user_bias_init", "item_table", "item_bias", "offset"), range(5), strict=True))
    loop = ("inner_lr", "preconditioner", "prior_pull", "momentum")
    return {**user_side, **{name: loop_start + i for i, name in enumerate(loop)}, "support_weights": SUPPORT_WEIGHTS}


ADAPT, ADAPT_AND_SCORE, META_STEP = places(INPUTS), places(INPUTS + QUERY), places(INPUTS + JUDGED_QUERY)


def _adapted(args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Fake user vectors [T, D] and biases [T]."""
    like, dim, num_tasks = args[ITEM_BIAS], args[ITEM_TABLE].shape[1], args[SUPPORT_OFFSETS].shape[0] - 1
    return like.new_empty((num_tasks, dim)), like.new_empty((num_tasks,))


def _gradients(args: tuple[Any, ...], where: dict[str, int], wanted: int) -> list[Tensor | None]:
    """Fake gradients in the operators' order; None where one is not wanted."""
    return [
        args[ITEM_BIAS].new_empty(args[where[name]].shape) if args[where[name]] is not None and wanted & bit else None
        for name, bit in WANT.items()
    ]


def _fake_adapt(*args: Any) -> tuple[Tensor, Tensor]:
    return _adapted(args)


def _fake_adapt_and_score(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return *_adapted(args), args[ITEM_BIAS].new_empty(args[INPUTS].shape)


def _fake_adapt_and_score_backward(
    grad_user: Tensor, grad_bias: Tensor, grad_scores: Tensor, *args: Any
) -> list[Tensor | None]:
    return _gradients(args, ADAPT_AND_SCORE, args[-1])


def _fake_adapt_all(*args: Any) -> tuple[Tensor, ...]:
    like, entries = args[ITEM_BIAS], args[SUPPORT_ITEMS].shape[0]
    rows, biases = like.new_empty((entries, args[ITEM_TABLE].shape[1])), like.new_empty((entries,))
    return *_adapted(args), rows, biases


def _fake_adapt_all_backward(
    grad_user: Tensor, grad_bias: Tensor, grad_rows: Tensor, grad_biases: Tensor, *args: Any
) -> list[Tensor | None]:
    return _gradients(args, ADAPT, args[-1])


def _fake_meta_step(*args: Any) -> list[Tensor | None]:
    wanted, like = args[-1], args[ITEM_BIAS]
    gradients = _gradients(args, META_STEP, wanted)
    rows = _num_rows(args) if wanted & WANT["item_table"] else 0
    if wanted & WANT["item_table"]:
        gradients[2:4] = [like.new_empty((rows, args[ITEM_TABLE].shape[1])), like.new_empty((rows,))]
    return [like.new_empty(()), *gradients, args[INPUTS].new_empty((rows,))]


def _fake_reptile_step(*args: Any) -> tuple[Tensor | None, ...]:
    like, entries = args[ITEM_BIAS], args[SUPPORT_ITEMS].shape[0]
    moves = like.new_empty(()), like.new_empty(args[0].shape), like.new_empty(args[1].shape)
    if args[INPUTS + 1 + ADAPT_WHAT] != "all":
        return *moves, None, None
    return *moves, like.new_empty((entries, args[ITEM_TABLE].shape[1])), like.new_empty((entries,))


def _num_rows(args: tuple[Any, ...]) -> int:
    """How many gradient rows meta_step returns; first order has none for the support, unless its items adapt."""
    loop = args[INPUTS + JUDGED_QUERY :]
    without_support = loop[FIRST_ORDER] and loop[ADAPT_WHAT] == "user"
    support = () if without_support else (args[SUPPORT_ITEMS], args[SUPPORT_NEGATIVES])
    pieces = (*support, args[INPUTS], args[INPUTS + QUERY_NEGATIVES])
    return sum(ids.numel() for ids in pieces if ids is not None)


def _fake_score_top_k(
    user: Tensor, user_bias: Tensor, table: Tensor, item_bias: Tensor, k: int, *exclude: Any
) -> tuple[Tensor, Tensor]:
    shape = (user.shape[0], k)
    return user.new_empty(shape, dtype=torch.int64), user.new_empty(shape)


def _fake_coalesce_rows(ids: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    distinct = torch.library.get_ctx().new_dynamic_size()
    return ids.new_empty((distinct,)), rows.new_empty((distinct, *rows.shape[1:]))


def _fake_coalesce_rows_padded(ids: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return ids.new_empty(ids.shape), rows.new_empty(rows.shape), ids.new_empty(())


def _fake_sum_rows(ids: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    return rows.new_empty((num_rows, *rows.shape[1:]))


def _fake_update(*args: Any) -> None:
    """An operator that returns nothing."""


def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors = [value if isinstance(value, Tensor) else None for value in inputs]
    ctx.save_for_backward(*tensors)
    ctx.settings = [None if isinstance(value, Tensor) else value for value in inputs]


def restore(ctx: Any) -> list[Any]:
    return [
        setting if tensor is None else tensor for tensor, setting in zip(ctx.saved_tensors, ctx.settings, strict=True)
    ]


def _at_places(ctx: Any, gradients: tuple[Tensor | None, ...], where: dict[str, int]) -> tuple[Tensor | None, ...]:
    """The gradients at their arguments' places; other arguments have none."""
    result: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    for gradient, place in zip(gradients, where.values(), strict=True):
        if ctx.needs_input_grad[place]:
            result[place] = gradient
    return tuple(result)


def _wanted(ctx: Any, where: dict[str, int]) -> int:
    return sum({WANT[name] for name, place in where.items() if ctx.needs_input_grad[place]})


def _adapt_and_score_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    wanted = _wanted(ctx, ADAPT_AND_SCORE)
    gradients = Once.apply("adapt_and_score", ops.adapt_and_score_backward, *grads, *restore(ctx), wanted)
    return _at_places(ctx, gradients, ADAPT_AND_SCORE)


def _adapt_backward(ctx: Any, grad_user: Tensor, grad_bias: Tensor) -> tuple[Tensor | None, ...]:
    args, wanted = restore(ctx), _wanted(ctx, ADAPT)
    no_items, no_offsets = args[SUPPORT_ITEMS].new_empty((0,)), torch.zeros_like(args[SUPPORT_OFFSETS])
    gradients = Once.apply(
        "adapt", ops.adapt_and_score_backward, grad_user, grad_bias, grad_bias.new_empty((0,)),
        *args[:INPUTS], no_items, no_offsets, *args[INPUTS:], wanted,
    )  # fmt: skip
    return _at_places(ctx, gradients, ADAPT)


def _adapt_all_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    gradients = Once.apply("adapt", ops.adapt_all_backward, *grads, *restore(ctx), _wanted(ctx, ADAPT))
    return _at_places(ctx, gradients, ADAPT)


def _meta_step_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
    _, *gradients, ids = output
    ctx.mark_non_differentiable(*(each for each in gradients if each is not None), ids)
    ctx.num_rows = inputs[2].shape[0]
    inputs_with_gradients = [inputs[place] for place in META_STEP.values()]
    ctx.save_for_backward(*gradients, *inputs_with_gradients, ids)


def _meta_step_backward(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    saved, count = ctx.saved_tensors, len(WANT)
    gradients, inputs, ids = saved[:count], saved[count : 2 * count], saved[2 * count]
    num_rows = ctx.num_rows
    needed = [ctx.needs_input_grad[META_STEP[name]] for name in ("item_table", "item_bias")]
    one = is_known_one(grad_loss)

    def scale(grad_loss: Tensor, *inputs: Tensor) -> tuple[Tensor | None, ...]:
        def dense(rows: Tensor, wanted: bool) -> Tensor | None:
            if not wanted:
                return None
            table: Tensor = ops.sum_rows(ids, rows, num_rows)
            return table if one else table * grad_loss

        tables = (dense(*each) for each in zip(gradients[2:4], needed, strict=True))
        before, after = (
            [None if gradient is None else gradient * grad_loss for gradient in part]
            for part in (gradients[:2], gradients[4:])
        )
        return *before, *tables, *after

    scaled = Once.apply("meta_step", scale, grad_loss, *inputs)
    return _at_places(ctx, scaled, META_STEP)


def refuse(message: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(message)

    return backward


_FAKES: dict[str, Callable[..., Any]] = {
    "adapt": _fake_adapt,
    "adapt_and_score": _fake_adapt_and_score,
    "adapt_and_score_backward": _fake_adapt_and_score_backward,
    "adapt_all": _fake_adapt_all,
    "adapt_all_backward": _fake_adapt_all_backward,
    "meta_step": _fake_meta_step,
    "reptile_step": _fake_reptile_step,
    "score_top_k": _fake_score_top_k,
    "coalesce_rows": _fake_coalesce_rows,
    "coalesce_rows_padded": _fake_coalesce_rows_padded,
    "sum_rows": _fake_sum_rows,
    "sparse_adam": _fake_update,
    "sparse_adagrad": _fake_update,
    "sparse_sgd": _fake_update,
    "use_huge_pages": _fake_update,
}


def register_gradients(
    namespace: str, name: str, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> None:
    """As `torch.library.register_autograd`, which goes through the schema once for each of its arguments.

    With thirty of them that takes a third of a millisecond a call. It is there to find arguments left out because they
    have their default: operators registered here must not have any.
    """
    op = getattr(getattr(torch.ops, namespace), name).default

    def run(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            *inputs, keyset = args
            output = run(keyset, *inputs)
            setup_context(ctx, tuple(inputs), output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return backward(ctx, *grads)  # None for the keyset, too: a result for each of ctx.needs_input_grad

    def differentiate(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return Gradient.apply(*args, keyset)
        return run(keyset, *args)

    _autocast.fragment(namespace).impl(name, differentiate, "Autograd", with_keyset=True)


def register(namespace: str) -> None:
    """Gives the operators of a namespace their fake kernels, gradients and what they do under autocast."""
    for name, fake in _FAKES.items():
        register_fake(f"{namespace}::{name}", fake)
    gradients: dict[str, tuple[Callable[..., Any], Callable[..., None]]] = {
        "adapt": (_adapt_backward, save),
        "adapt_and_score": (_adapt_and_score_backward, save),
        "adapt_all": (_adapt_all_backward, save),
        "meta_step": (_meta_step_backward, _meta_step_setup),
    }
    for name, (backward, setup) in gradients.items():
        register_gradients(namespace, name, backward, setup)
    refusals = {
        "adapt_and_score_backward": "adapt_and_score cannot be differentiated twice",
        "adapt_all_backward": "adapt cannot be differentiated twice",
    }
    for name in ("reptile_step", "score_top_k", "coalesce_rows", "coalesce_rows_padded", "sum_rows"):
        refusals[name] = f"{name} has no gradient of its own"
    for name, message in refusals.items():
        register_autograd(f"{namespace}::{name}", refuse(message))
    _autocast.register(namespace, (*gradients, *refusals))
    impl(f"{namespace}::must_be_deterministic", "default", torch.are_deterministic_algorithms_enabled)


register("metarec_fast")
