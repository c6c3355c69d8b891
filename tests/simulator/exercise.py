"""Every operator on small ragged problems, once on the CPU and once simulated: how far apart are they?

    exercise.py LIBRARY [--only PART]… [--brief] [--small] [--fault N PART]…

Started by `simulator.run`, which sets paths and preloads sanitizers. Ends with 2 where numbers differ, with 3 where an
operator refuses. With `--fault` it does so once for each fault, planted in the library (see faults.py), in a process
of its own, and prints how each of these ended.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from problems import RAGGED, Draw, less_precise_products, tracked
from torch import Tensor

import metarec_fast as mf
import simulator
from metarec_fast import _ops
from metarec_fast import functional as F
from metarec_fast._arguments import Model
from metarec_fast.results import SparseRows
from simulator.tower_cases import adapting_towers

DIFFERENT, REFUSED = 2, 3
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

Results = list[Tensor]
Case = tuple[str, torch.dtype, Callable[[], Results]]


def cases(small: bool, brief: bool = False) -> Iterator[Case]:
    """All by name, with the dtype of their arithmetic, if `brief` in one dtype, if `small` also of one width."""
    dtypes = (torch.float32,) if small or brief else (torch.float64, torch.float32)
    widths = (7,) if small else (7, 132) if brief else (7, 16, 132)
    for dtype, dim in itertools.product(dtypes, widths):
        for part in (adapting, adapting_items, moving, ranking, summing, optimising, adding):
            for name, run in part(dtype, dim, (3, 0, 34) if small else RAGGED):
                yield f"{name} {str(dtype)[6:]} D={dim}", dtype, run
        for name, run in adapting_towers(dtype, dim, (3, 0, 34) if small else RAGGED):
            yield f"{name} {str(dtype)[6:]} D={dim}", dtype, lambda r=run: flat(r())
    if not small:
        for name, run in narrow_tables():
            yield name, torch.float32, run


def adapting(dtype: torch.dtype, dim: int, sizes: tuple[int, ...]) -> Iterator[tuple[str, Callable[[], Results]]]:
    """The user side: every form, loss, and argument of the inner loop."""

    def draw() -> Draw:
        return Draw(dim, dtype)

    loops: dict[str, dict[str, Any]] = {
        "plain": {},
        "first order": {"first_order": True},
        "logistic": {"loss": "logistic", "form": "direct"},
        "gram": {"form": "gram", "steps": 20},
        "everything": {"learned": True, "form": "direct"},
        "everything per task": {"learned": True, "form": "direct", "num_tasks": len(sizes)},
        "gram with momentum": {"learned": True, "form": "gram", "preconditioner": None, "loss": "logistic"},
        "exact": {"learned": True, "steps": -1},
    }
    for name, settings in loops.items():
        settings = dict(settings)
        exact = settings.get("steps") == -1
        steps, tasks = max(settings.pop("steps", 3), 1), settings.pop("num_tasks", None)
        if exact:
            settings |= {"inner_steps": "exact", "momentum": None, "preconditioner": None, "inner_lr": draw().uniform()}
        weights = name.startswith("everything")
        model = draw().model(dim=dim, num_tasks=tasks)
        batch = draw().batch(sizes, weights=weights or exact)
        loop = draw().loop(steps, dim=dim, num_tasks=tasks, **settings)
        yield f"adapt_and_score, {name}", lambda m=model, b=batch, l=loop: differentiated(_ops.adapt_and_score, m, b, l)
        yield f"adapt, {name}", lambda m=model, b=batch, l=loop: flat(_ops.adapt(m, b.support, l))
        outer = {"squared": 0.5, "logistic": 0.25, "absolute": 0.25}
        yield f"meta_step, {name}", lambda m=model, b=batch, l=loop, o=outer: flat(_ops.meta_step(m, b, l, o, None))
        if not exact:
            path = draw().uniform(steps + 1)
            yield (
                f"meta_step, {name}, whole path",
                lambda m=model, b=batch, l=loop, p=path: flat(_ops.meta_step(m, b, l, {"squared": 1.0}, p)),
            )
    for name, settings in (("plain", {}), ("gram", {"form": "gram", "steps": 20}), ("items", {"adapt": "all"})):
        settings = {"steps": 3, "inner_lr": torch.tensor(0.02, dtype=dtype), **settings}
        many, model = draw().batch(sizes[:2] * 8), draw().model(dim=dim)  # so that a team has several of them
        loop = draw().loop(settings.pop("steps"), dim=dim, **settings)
        yield (
            f"meta_step, many tasks, {name}",
            lambda m=model, b=many, l=loop: flat(_ops.meta_step(m, b, l, {"squared": 1.0}, None)),
        )
    for loss, form in itertools.product(("bpr", "softmax"), ("direct", "gram")):
        model = draw().model(dim=dim)
        batch = draw().batch(sizes, negatives=3, log_q=loss == "softmax", weights=True)
        loop = draw().loop(3, dim=dim, loss=loss, form=form)
        outer = {"bpr": 0.5, "softmax": 0.5}
        yield (
            f"meta_step, {loss} {form}",
            lambda m=model, b=batch, l=loop, o=outer: flat(_ops.meta_step(m, b, l, o, None)),
        )


def adapting_items(dtype: torch.dtype, dim: int, sizes: tuple[int, ...]) -> Iterator[tuple[str, Callable[[], Results]]]:
    """Item rows adapt too."""
    for loss, first_order in (("squared", False), ("logistic", False), ("squared", True)):
        draw = Draw(dim, dtype)
        model, batch = draw.model(dim=dim), draw.batch(sizes, weights=loss == "logistic")
        slow = 0.02 * draw.uniform()  # so that nothing grows, and rounding with it
        loop = draw.loop(3, dim=dim, inner_lr=slow, loss=loss, first_order=first_order, adapt="all")
        name = f"{loss}{', first order' * first_order}"
        for op in (_ops.adapt_and_score, adapt):
            yield (
                f"{op.__name__}, all, {name}",
                lambda m=model, b=batch, l=loop, o=op: differentiated(o, m, b, l),
            )
        for path in (None, draw.uniform(4)):
            yield (
                f"meta_step, all, {name}{', whole path' * (path is not None)}",
                lambda m=model, b=batch, l=loop, p=path: flat(_ops.meta_step(m, b, l, {"squared": 1.0}, p)),
            )
    draw = Draw(dim, dtype)
    model, batch = draw.model(dim=dim), draw.batch(sizes)
    pairs = draw.batch(sizes, negatives=3, log_q=True).query
    batch = type(batch)(batch.support, pairs)
    loop = draw.loop(3, dim=dim, adapt="all")
    outer = {"bpr": 0.5, "softmax": 0.5}
    yield "meta_step, all, pairs", lambda: flat(_ops.meta_step(model, batch, loop, outer, None))


def moving(dtype: torch.dtype, dim: int, sizes: tuple[int, ...]) -> Iterator[tuple[str, Callable[[], Results]]]:
    for adapts, weighted in itertools.product(("user", "all"), (False, True)):
        draw = Draw(dim, dtype)
        model, batch = draw.model(dim=dim), draw.batch(sizes, weights=weighted)
        loop = draw.loop(3, dim=dim, adapt=adapts)
        yield (
            f"reptile_step, {adapts}{', weighted' * weighted}",
            lambda m=model, b=batch, l=loop: flat(_ops.reptile_step(m, b.support, b.weights, l)),
        )


def ranking(dtype: torch.dtype, dim: int, sizes: tuple[int, ...]) -> Iterator[tuple[str, Callable[[], Results]]]:
    for num_users, num_items, k in ((3, 60, 4), (11, 700, 40), (3, 300, 150))[: 1 if len(sizes) == 3 else 3]:
        draw = Draw(dim, dtype)
        table, bias, users = draw.normal(num_items, dim), draw.normal(num_items), draw.normal(num_users, dim)
        seen = draw.entries(tuple(range(num_users)), num_items)
        for exclude in (None, seen):
            yield (
                f"score_top_k, {k} of {num_items}{', some excluded' * (exclude is not None)}",
                lambda u=users, t=table, b=bias, n=k, e=exclude: flat(_ops.score_top_k(u, u[:, 0].clone(), t, b, n, e)),
            )
    if dtype == torch.float32:  # more users than one a warp
        table, bias, users = draw.normal(150, dim), draw.normal(150), draw.normal(11, dim)
        yield "score_top_k, tensor cores", lambda: on_tensor_cores(users, table, bias)


def on_tensor_cores(users: Tensor, table: Tensor, bias: Tensor) -> Results:
    with less_precise_products():
        return flat(_ops.score_top_k(users, users[:, 0].clone(), table, bias, 4, None))


def summing(dtype: torch.dtype, dim: int, sizes: tuple[int, ...]) -> Iterator[tuple[str, Callable[[], Results]]]:
    draw = Draw(dim, dtype)
    counts = {"few": 40, "none": 0} if len(sizes) == 3 else {"few": 40, "none": 0, "one id": 700, "many": 700}
    for name, count in counts.items():
        ids = draw.integers(0, 1 if name == "one id" else 30, count)
        for rows in (draw.normal(count, dim), draw.normal(count)):
            gradient = SparseRows(ids, rows)
            shape = "rows" if rows.dim() == 2 else "numbers"
            yield f"sum_rows, {name}, {shape}", lambda g=gradient: [F.sum_rows(g, 33)]
            yield f"coalesce_rows, {name}, {shape}", lambda g=gradient: flat(_ops.coalesce_rows(g))
            yield f"coalesce_rows_padded, {name}, {shape}", lambda g=gradient: flat(_ops.coalesce_rows_padded(g))


def optimising(dtype: torch.dtype, dim: int, sizes: tuple[int, ...]) -> Iterator[tuple[str, Callable[[], Results]]]:
    numbers = {"adam": (0.1, 0.9, 0.99, 1e-8, 3), "adagrad": (0.1, 1e-8), "sgd": (0.1,)}
    states = {"adam": 2, "adagrad": 1, "sgd": 0}

    def step(name: str, count: int) -> Results:
        draw = Draw(dim, dtype)
        ids = draw.integers(0, 30, count)
        tables = [[draw.uniform(33, dim), draw.uniform(33)] for _ in range(1 + states[name])]
        rows = [draw.normal(count, dim), draw.normal(count)]
        getattr(_ops.ops, f"sparse_{name}")(*tables, ids, rows, *numbers[name])
        return [tensor for group in tables for tensor in group]

    for name, count in itertools.product(numbers, (40,) if len(sizes) == 3 else (40, 0, 700)):
        yield f"sparse_{name}, {count} rows", lambda n=name, c=count: step(n, c)


def adding(dtype: torch.dtype, dim: int, sizes: tuple[int, ...]) -> Iterator[tuple[str, Callable[[], Results]]]:
    """What is summed in any order where atomics are allowed, and one optimiser that goes on sorting."""
    for part in (summing, optimising):
        for name, run in part(dtype, dim, sizes):
            if name.startswith(("sum_rows", "sparse_sgd", "sparse_adam")):
                yield f"{name}, atomics", lambda r=run: by_atomics(r)
    draw = Draw(dim, dtype)
    model, batch, loop = draw.model(dim=dim), draw.batch(sizes), draw.loop(3, dim=dim)
    yield (
        "adapt_and_score, atomics",
        lambda: by_atomics(lambda: differentiated(_ops.adapt_and_score, model, batch, loop)),
    )


def by_atomics(run: Callable[[], Results]) -> Results:
    """Also where deterministic algorithms are asked for, to have fresh memory filled: they would win."""
    asked = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")
    try:
        with mf.allow_atomics():
            assert mf.atomics_allowed()
            return run()
    finally:
        torch.set_deterministic_debug_mode(asked)


def narrow_tables() -> Iterator[tuple[str, Callable[[], Results]]]:
    """Tables in bfloat16, whose arithmetic is in float32."""
    for dim in (7, 16, 132):
        draw = Draw(dim, torch.float32)
        model, batch = draw.model(dim=dim), draw.batch()
        narrow = replace(model, item_table=model.item_table.bfloat16())
        for adapts in ("user", "all"):
            loop = draw.loop(3, dim=dim, adapt=adapts)
            yield (
                f"meta_step, bfloat16, {adapts}, D={dim}",
                lambda m=narrow, b=batch, l=loop: flat(_ops.meta_step(m, b, l, {"squared": 1.0}, None)),
            )
        users = draw.normal(3, dim)
        table, bias = narrow.item_table, narrow.item_bias
        yield (
            f"score_top_k, bfloat16, D={dim}",
            lambda u=users, t=table, b=bias: flat(_ops.score_top_k(u, u[:, 0].clone(), t, b, 4, None)),
        )
        users = draw.normal(11, dim)
        yield (
            f"score_top_k, bfloat16, tensor cores, D={dim}",
            lambda u=users, t=table, b=bias: on_tensor_cores(u, t, b),
        )


def adapt(model: Model, batch: Any, loop: Any) -> Any:
    return _ops.adapt(model, batch.support, loop)


def differentiated(op: Callable[..., Any], model: Model, batch: Any, loop: Any) -> Results:
    """Results, and gradients of a sum of them with random factors."""
    leaves, *problem = tracked(model, batch, loop)
    results = flat(op(*problem))
    draw = Draw(99, results[0].dtype)
    total = sum((result * draw.normal(*result.shape)).sum() for result in results)
    assert isinstance(total, Tensor)
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return [*(result.detach() for result in results), *gradients]


def flat(result: Any) -> Results:
    """All tensors in there, in order."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, dict):
        return [tensor for each in result.values() for tensor in flat(each)]
    if isinstance(result, (tuple, list)):
        return [tensor for each in result for tensor in flat(each)]
    return flat(list(vars(result).values())) if result is not None else []


def difference(simulated: Results, expected: Results, dtype: torch.dtype) -> str:
    """What is wrong; empty if nothing is."""
    assert len(simulated) == len(expected)
    for place, (actual, right) in enumerate(zip(simulated, expected, strict=True)):
        if actual.shape != right.shape or actual.dtype != right.dtype:
            return f"result {place}: {actual.dtype} {tuple(actual.shape)}, not {right.dtype} {tuple(right.shape)}"
        if actual.numel() == 0 or torch.equal(actual, right):
            continue
        if not right.is_floating_point():
            return f"result {place}: other integers"
        # Terms are about 0.1 where they cancel, and so is what is lost by rounding them.
        scale = max(0.1, float(right[right.isfinite()].abs().max()))
        error = float((actual - right).masked_fill(actual == right, 0).abs().max()) / scale
        if not error <= TOLERANCE[dtype]:  # NaN too
            return f"result {place}: {error:.1e} apart"
    return ""


def exercise(every: Sequence[Case], quiet: bool) -> int:
    wrong = 0
    for name, dtype, run in every:
        simulator.switch("metarec_fast")
        expected = run()
        simulator.switch(simulator.NAMESPACE)
        # What nobody writes is not a number.
        torch.use_deterministic_algorithms(True)
        try:
            found = difference(run(), expected, dtype)
        except RuntimeError as error:
            print(f"{name}: {error}", flush=True)
            return REFUSED
        torch.use_deterministic_algorithms(False)
        if found:
            wrong += 1
            print(f"{name}: {found}", flush=True)
            if quiet:
                break
    if not quiet:
        print(f"{len(every)} cases, {wrong} wrong")
    return DIFFERENT if wrong else 0


def exercise_with(fault: int, library: Path, every: Sequence[Case]) -> None:
    """In a process of its own, which may not survive it."""
    print(f"fault {fault}", flush=True)
    child = os.fork()
    if child == 0:
        ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "metarec_planted").value = fault
        code = exercise(every, quiet=True)
        os._exit(code)
    _, status = os.waitpid(child, 0)
    print(f"ended {os.waitstatus_to_exitcode(status)}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", type=Path)
    parser.add_argument("--only", action="append", help="cases whose names contain this")
    parser.add_argument("--brief", action="store_true", help="float32 alone")
    parser.add_argument("--small", action="store_true", help="and few blocks, for ThreadSanitizer")
    parser.add_argument("--fault", action="append", nargs=2, metavar=("N", "PART"), default=[])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    simulator.use(arguments.library)
    every = list(cases(arguments.small, arguments.brief))
    for number, part in arguments.fault:
        exercise_with(int(number), arguments.library, named(every, [part]))
    return 0 if arguments.fault else exercise(named(every, arguments.only or [""]), quiet=False)


def named(every: Sequence[Case], parts: Sequence[str]) -> Sequence[Case]:
    return [case for case in every if any(part in case[0] for part in parts)]


if __name__ == "__main__":
    sys.exit(main())
