"""Faults to plant in the CUDA sources, so that a test can see that each is found.

All are planted at once, in a copy, and one is chosen when the program runs (`metarec_planted`, 0 for none): a statement
becomes `{ if (planted(n)) { new } else { old } }`, an expression `(planted(n) ? (new) : (old))`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import simulator

COPY = simulator.ROOT / "build" / "planted"


class Fault(NamedTuple):
    name: str
    file: str  # in csrc/cuda
    old: str  # what stands there, once; up to ¦, if it has one
    new: str
    found_by: str  # a kind of build
    case: str  # of exercise.py: part of its name


FAULTS = [
    Fault(
        "a warp barrier is missing",
        "query.h",
        "__syncwarp();¦\n      compare(",
        ";",
        "thread",
        "meta_step, bpr direct float32 D=7",
    ),
    Fault(
        "a block barrier is missing",
        "totals.cu",
        "__syncthreads();¦\n  value = 0;",
        ";",
        "plain",
        "meta_step, plain float32 D=7",
    ),
    Fault(
        "a barrier between two tasks is missing",
        "booking.h",
        "team.sync();¦  // the task before has been read to its end",
        ";",
        "thread",
        "meta_step, many tasks, gram float32 D=7",
    ),
    Fault(
        "a shuffle in a divergent branch",
        "query.h",
        "own = warp_sum(own);",
        "if (lane < 16) own = warp_sum(own);",
        "plain",
        "meta_step, bpr direct float32 D=7",
    ),
    Fault(
        "an index past a shared array",
        "totals.cu",
        "of_warps[threadIdx.x / kWarpSize] = value;",
        "of_warps[threadIdx.x / kWarpSize + 1] = value;",
        "address",
        "meta_step, plain float32 D=7",
    ),
    Fault(
        "an index past the support",
        "sorted_rows.h",
        "if (place >= sorted.count) return;",
        "if (place > sorted.count) return;",
        "address",
        "sum_rows, few, rows float32 D=7",
    ),
    Fault(
        "an index past the query",
        "query.h",
        "q < entries ? begin + q : int64_t{-1}",
        "q <= entries ? begin + q : int64_t{-1}",
        "address",
        "meta_step, plain float32 D=7",
    ),
    Fault(
        "teams of all blocks write one record",
        "booking.h",
        "launch.first_record + place.team",
        "launch.first_record",
        "thread",
        "meta_step, plain float32 D=7",
    ),
    Fault(
        "threads write the same number to the same place",
        "sum_rows.cu",
        "place == 0 || numbers[place] != numbers[place - 1]",
        "true",
        "thread",
        "coalesce_rows, one id, numbers float32 D=7",
    ),
    Fault(
        "a misaligned load of a vector",
        "row_layout.h",
        "dim % kPack == 0 && is_aligned(rows)",
        "dim > 0",
        "address",
        "meta_step, plain float32 D=7",
    ),
    Fault(
        "shared memory that nobody has written",
        "booking.h",
        "task.each(record.at.size(), [&](int i) { record.values()[i] = 0; });",
        ";",
        "plain",
        "meta_step, plain float32 D=7",
    ),
    Fault(
        "lanes leave before their warp works together",
        "item_shares.cu",
        "if (begin > 0 && sorted.ids[begin - 1] == id) return;",
        "if (threadIdx.x % kWarpSize > 20 || (begin > 0 && sorted.ids[begin - 1] == id)) return;",
        "plain",
        "reptile_step, all float32 D=7",
    ),
    Fault(
        "a mask without some of the lanes",
        "team.h",
        "value += __shfl_xor_sync(kAllLanes, value, apart);",
        "value += __shfl_xor_sync(0xffffu, value, apart);",
        "plain",
        "meta_step, plain float32 D=7",
    ),
    Fault(
        "threads leave before a block barrier",
        "sorted_rows.h",
        "if (!(is_first && is_long)) return;",
        "if (!(is_first && is_long) || threadIdx.x >= 64) return;",
        "plain",
        "sum_rows, one id, rows float32 D=7",
    ),
    Fault(
        "a block barrier in a branch",
        "score_tile.h",
        "__syncthreads();¦  // nobody reads what was there\n      fetch(",
        "if (warp < 2) __syncthreads();",
        "plain",
        "score_top_k, 4 of 60 float32 D=7",
    ),
    Fault(
        "numbers of a fragment in the wrong order",
        "tensor_tile.h",
        "users[u].set({at[0], at[8 * kStride], at[4], at[8 * kStride + 4]});",
        "users[u].set({at[0], at[4], at[8 * kStride], at[8 * kStride + 4]});",
        "plain",
        "score_top_k, tensor cores float32 D=7",
    ),
    Fault(
        "a rest that is left out",
        "tensor_tile.h",
        "multiply_add(users[u].rests, items.heads, sums[u][j]);",
        ";",
        "plain",
        "score_top_k, tensor cores float32 D=7",
    ),
    Fault(
        "scores are read before others have written them",
        "tensor_tile.h",
        "__syncthreads();¦  // a warp reads what all have written",
        ";",
        "thread",
        "score_top_k, tensor cores float32 D=7",
    ),
    Fault(
        "a product of indices in 32 bits",
        "task.h",
        "problem.item_table + item * problem.shape.dim",
        "problem.item_table + static_cast<int>(item) * (problem.shape.dim << 28)",
        "address",
        "meta_step, plain float32 D=7",
    ),
    Fault(
        "a vote taken for a barrier",
        "best_list.h",
        "__syncwarp(kAllLanes);¦\n      if (moves && i + 1 < k_) put(i + 1, entry);",
        "__ballot_sync(kAllLanes, moves);",
        "thread",
        "score_top_k, 4 of 60 float32 D=7",
    ),
    Fault(
        "tiles are filled anew while threads read them",
        "matrix.h",
        "__syncthreads();¦  // the factors are there",
        ";",
        "thread",
        "mlp_meta_step, plain float32 D=7",
    ),
    Fault(
        "tiles are read before they are full",
        "matrix.h",
        "__syncthreads();¦\n#pragma unroll 4",
        ";",
        "plain",
        "mlp_meta_step, plain float32 D=7",
    ),
    Fault(
        "an index past the parameters",
        "matrix.h",
        "i < width¦ && d < depth ? values",
        "i <= width",
        "address",
        "mlp_meta_step, plain float32 D=7",
    ),
    Fault(
        "numbers of another thread without a barrier",
        "tower_path.h",
        "team.sync();¦\n#pragma unroll 1\n    for (int i = team.thread()",
        ";",
        "thread",
        "mlp_meta_step, plain float32 D=7",
    ),
    Fault(
        "an array without a place in the scratch",
        "tower.h",
        "take(S * n0)¦;\n  return at;",
        "take(0)",
        "address",
        "mlp_meta_step, plain float32 D=7",
    ),
    Fault(
        "blocks share their scratch",
        "tower.cuh",
        "blockIdx.x * launch.scratch.size",
        "0",
        "thread",
        "mlp_meta_step, plain float32 D=132",
    ),
    Fault(
        "blocks share their record",
        "tower.cuh",
        "launch.first_record + blockIdx.x",
        "launch.first_record",
        "thread",
        "mlp_meta_step, plain float32 D=7",
    ),
    Fault(
        "two launches take the same task",
        "tower.cuh",
        "rows < launch.fewest_rows",
        "false",
        "plain",
        "mlp_meta_step, plain float32 D=7",
    ),
    Fault(
        "an entry of the query between two parts",
        "tower.cuh",
        "first += at_once",
        "first += at_once + 1",
        "plain",
        "mlp_meta_step, several tiles float32 D=7",
    ),
    Fault(
        "a sum that is no atomic",
        "atomic_sums.h",
        "atomicAdd(address + i, pack.values[i]);",
        "address[i] += pack.values[i];",
        "thread",
        "sum_rows, few, rows, atomics float32 D=7",
    ),
    Fault(
        "rows that are added as they are",
        "atomic_sums.h",
        "row.values[i] *= factor;",
        ";",
        "plain",
        "sparse_sgd, 40 rows, atomics float32 D=7",
    ),
    Fault(
        "a row past the last one",
        "atomic_sums.h",
        "if (entry >= count) return;",
        "if (entry > count) return;",
        "address",
        "sum_rows, few, rows, atomics float32 D=7",
    ),
]

_HEADER = """#pragma once
extern "C" {
[[gnu::visibility("default")]] inline int metarec_planted = 0;
}
inline bool planted(int fault) { return metarec_planted == fault; }
"""


@cache
def build(kind: str) -> Path:
    """The simulated operators with all faults in them."""
    with simulator.locked(COPY):
        _plant()
    return simulator.build(kind, sources=COPY)


def _plant() -> None:
    texts = {path.relative_to(simulator.ROOT): path.read_text() for path in _sources()}
    for number, fault in enumerate(FAULTS, 1):
        path = Path("csrc/cuda") / fault.file
        found = fault.old.replace("¦", "")
        count = texts[path].count(found)
        if count != 1:
            raise ValueError(f"{fault.name}: {path} has this {count} times, expected once:\n{found}")
        texts[path] = texts[path].replace(found, _choice(number, fault))
    for path in {Path("csrc/cuda") / fault.file for fault in FAULTS}:
        texts[path] = f'#include "planted.h"\n{texts[path]}'
    texts[Path("csrc/cuda/planted.h")] = _HEADER
    for path, text in texts.items():
        copy = COPY / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.exists() or copy.read_text() != text:  # what stays as it is need not be compiled again
            copy.write_text(text)
    for copy in (COPY / "csrc").rglob("*.*"):
        if copy.relative_to(COPY) not in texts:
            copy.unlink()


def _sources() -> list[Path]:
    return [path for path in (simulator.ROOT / "csrc").rglob("*") if path.is_file()]


def _choice(number: int, fault: Fault) -> str:
    old, _, rest = fault.old.partition("¦")
    if old.endswith(";"):
        return f"{{ if (planted({number})) {{ {fault.new} }} else {{ {old} }} }}{rest}"
    return f"(planted({number}) ? ({fault.new}) : ({old})){rest}"
