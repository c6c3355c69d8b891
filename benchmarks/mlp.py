"""The MLP tower beside the same computed with torch, by turns: `python -m benchmarks.mlp --help`.

    autograd    an inner loop on weights [T, out, in], differentiated by autograd
    torch.func  vmap of a task's loss, grad outside; eager and compiled
    adjoint     what our kernel does, written by hand in batched products: the first layer by products of inputs, the
                steps undone by their adjoint; eager and compiled

All start from the item table and gather its rows, and return the loss and the gradients of user part, rows and layers.
With `--device cuda` each is timed by the GPU's events, and replayed as a CUDA graph where it can be captured.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from benchmarks import clock
from benchmarks.environment import keep_freed_memory
from benchmarks.memory import _resident as resident
from metarec_fast import Entries, TaskBatch
from metarec_fast import functional as F

Gradients = tuple[Tensor, ...]  # loss, user part, support rows, query rows, W_1, b_1, …


@dataclass(frozen=True)
class Problem:
    """T tasks of S support and Q query entries; a tower 2 D → hidden → 1, relu, squared loss, float32."""

    user_part: Tensor  # [T, D]
    item_table: Tensor  # [N, D]
    layers: list[tuple[Tensor, Tensor]]
    batch: TaskBatch
    inner_lr: float
    steps: int

    @staticmethod
    def draw(tasks: int, items: int, dim: int, hidden: tuple[int, ...], size: int, steps: int) -> Problem:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        def entries() -> Entries:
            ids = torch.randint(items, (tasks * size,), generator=generator)
            ratings = 1 + 4 * torch.rand(tasks * size, generator=generator)
            return Entries(ids, ratings, torch.arange(tasks + 1) * size)

        widths = (2 * dim, *hidden, 1)
        layers = [(normal(o, i) * (2 / i) ** 0.5, 0.1 * normal(o)) for i, o in pairwise(widths)]
        table, user = normal(items, dim) / dim**0.5, normal(tasks, dim) / dim**0.5
        return Problem(user, table, layers, TaskBatch(entries(), entries()), 0.02, steps)

    def to(self, device: torch.device) -> Problem:
        layers = [(weight.to(device), bias.to(device)) for weight, bias in self.layers]
        user, table = self.user_part.to(device), self.item_table.to(device)
        return replace(self, user_part=user, item_table=table, layers=layers, batch=self.batch.to(device))

    def gathered(self) -> tuple[Tensor, ...]:
        """Rows [T, S, D] and targets [T, S] of support and query."""
        tasks, query = self.batch.num_tasks, self.batch.query
        assert query is not None
        parts = []
        for side in (self.batch.support, query):
            assert side.targets is not None
            parts += [self.item_table[side.items].view(tasks, -1, self.item_table.shape[1])]
            parts += [side.targets.view(tasks, -1)]
        return tuple(parts)

    @property
    def parameters(self) -> list[Tensor]:
        return [part for layer in self.layers for part in layer]


def ours(problem: Problem) -> Callable[[], Gradients]:
    def step() -> Gradients:
        result = F.mlp_meta_step(
            problem.user_part, problem.item_table, problem.layers, problem.batch, inner_lr=problem.inner_lr,
            inner_steps=problem.steps,
        )  # fmt: skip
        rows = result.grads["item_table"].rows.chunk(2)
        layers = [part for layer in result.grads["layers"] for part in layer]
        return result.loss, result.grads["user_part"], *rows, *layers

    return step


def _step(problem: Problem, gradients: Callable[..., Gradients]) -> Callable[[], Gradients]:
    return lambda: gradients(problem.user_part, *problem.gathered(), *problem.parameters)


def autograd(problem: Problem) -> Callable[[], Gradients]:
    def forward(inputs: Tensor, weights: list[Tensor]) -> Tensor:  # weights [T, out, in] and [T, out]
        for place in range(0, len(weights), 2):
            inputs = torch.baddbmm(weights[place + 1][:, None], inputs, weights[place].transpose(1, 2))
            inputs = inputs.relu() if place + 2 < len(weights) else inputs
        return inputs[..., 0]

    def gradients(user, rows, targets, query_rows, query_targets, *parameters) -> Gradients:
        leaves = [value.detach().requires_grad_() for value in (user, rows, query_rows, *parameters)]
        tasks, count = len(user), rows.shape[1]
        known, asked = (torch.cat([leaves[0][:, None].expand(-1, count, -1), part], -1) for part in leaves[1:3])
        fast = [value.expand(tasks, *value.shape) for value in leaves[3:]]
        for _ in range(problem.steps):
            loss = ((forward(known, fast) - targets) ** 2).mean(1).sum()
            slopes = torch.autograd.grad(loss, fast, create_graph=True)
            fast = [value - problem.inner_lr * slope for value, slope in zip(fast, slopes, strict=True)]
        loss = ((forward(asked, fast) - query_targets) ** 2).mean()
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    return _step(problem, gradients)


def torch_func(problem: Problem, compiled: bool) -> Callable[[], Gradients]:
    sizes = [problem.layers[0][0].shape[1], *(len(bias) for _, bias in problem.layers)]
    parts: list[torch.nn.Module] = []
    for inside, outside in pairwise(sizes):
        parts += [torch.nn.Linear(inside, outside, device="meta"), torch.nn.ReLU()]
    module = torch.nn.Sequential(*parts[:-1])
    names = [name for name, _ in module.named_parameters()]

    def error(fast, user, rows, targets) -> Tensor:
        inputs = torch.cat([user.expand(len(rows), -1), rows], -1)
        return ((functional_call(module, fast, (inputs,))[:, 0] - targets) ** 2).mean()

    def task_loss(user, rows, targets, query_rows, query_targets, parameters) -> Tensor:
        fast = dict(zip(names, parameters, strict=True))
        for _ in range(problem.steps):
            slopes = grad(error)(fast, user, rows, targets)
            fast = {name: value - problem.inner_lr * slopes[name] for name, value in fast.items()}
        return error(fast, user, query_rows, query_targets)

    def mean_loss(user, rows, query_rows, parameters, targets, query_targets) -> tuple[Tensor, Tensor]:
        dims = (0, 0, 0, 0, 0, None)
        losses = vmap(task_loss, in_dims=dims)(user, rows, targets, query_rows, query_targets, parameters)
        return losses.mean(), losses.mean()

    outer = grad(mean_loss, argnums=(0, 1, 2, 3), has_aux=True)

    def gradients(user, rows, targets, query_rows, query_targets, *parameters) -> Gradients:
        (of_user, of_rows, of_query, layers), loss = outer(user, rows, query_rows, parameters, targets, query_targets)
        return loss, of_user, of_rows, of_query, *layers

    return _step(problem, torch.compile(gradients, dynamic=False) if compiled else gradients)


def adjoint(problem: Problem, compiled: bool) -> Callable[[], Gradients]:
    """Two hidden layers: csrc/cpu/tower_task.h has the formulas."""
    s, steps = problem.inner_lr, problem.steps

    def gradients(user, X, y, Xq, yq, W1, b1, W2, b2, W3, b3) -> Gradients:
        T, S, D = X.shape
        Wu, We = W1[:, :-D], W1[:, -D:]
        from_user = (user @ Wu.T + b1)[:, None]
        shift = ((user * user).sum(1) + 1)[:, None, None]
        G, Gq = torch.bmm(X, X.transpose(1, 2)) + shift, torch.bmm(Xq, X.transpose(1, 2)) + shift
        first, A = X @ We.T + from_user, X.new_zeros(T, S, len(b1))
        V2, c2, w3, c3 = W2.expand(T, -1, -1), b2.expand(T, 1, -1), W3.expand(T, 1, -1), b3.expand(T, 1)
        path = []
        for _ in range(steps):
            Z1 = first - torch.bmm(G, A)
            H1 = Z1.relu()
            Z2 = torch.bmm(H1, V2.transpose(1, 2)) + c2
            H2 = Z2.relu()
            d3 = (2 / S) * ((H2 * w3).sum(-1) + c3 - y)
            d2 = d3[..., None] * w3 * (Z2 > 0)
            d1 = torch.bmm(d2, V2) * (Z1 > 0)
            path.append((A, H1, H2, d2, d3, V2, w3))
            A, V2, c2 = A + s * d1, V2 - s * torch.bmm(d2.transpose(1, 2), H1), c2 - s * d2.sum(1, keepdim=True)
            w3, c3 = w3 - s * (d3[..., None] * H2).sum(1, keepdim=True), c3 - s * d3.sum(1, keepdim=True)

        Z1 = Xq @ We.T + from_user - torch.bmm(Gq, A)
        H1 = Z1.relu()
        Z2 = torch.bmm(H1, V2.transpose(1, 2)) + c2
        H2 = Z2.relu()
        error = (H2 * w3).sum(-1) + c3 - yq
        d3 = 2 / yq.numel() * error
        d2 = d3[..., None] * w3 * (Z2 > 0)
        dq = torch.bmm(d2, V2) * (Z1 > 0)
        M2, m2 = torch.bmm(d2.transpose(1, 2), H1), d2.sum(1, keepdim=True)
        M3, m3 = (d3[..., None] * H2).sum(1, keepdim=True), d3.sum(1, keepdim=True)
        grad_A, grad_Gq = -torch.bmm(Gq.transpose(1, 2), dq), -torch.bmm(dq, A.transpose(1, 2))
        grad_G, grad_first = torch.zeros_like(G), torch.zeros_like(A)
        for A, H1, H2, d2, d3, V2, w3 in reversed(path):
            on1, on2 = H1 > 0, H2 > 0
            D1, D2 = s * grad_A, -s * (torch.bmm(H1, M2.transpose(1, 2)) + m2)
            D3 = -s * ((H2 * M3).sum(-1) + m3)
            grad_H1, grad_H2 = -s * torch.bmm(d2, M2), -s * d3[..., None] * M3
            E = D1 * on1
            D2 = D2 + torch.bmm(E, V2.transpose(1, 2))
            M2 = M2 + torch.bmm(d2.transpose(1, 2), E)
            E = D2 * on2
            z3 = (2 / S) * (D3 + (E * w3).sum(-1))
            M3 = M3 + (d3[..., None] * E + z3[..., None] * H2).sum(1, keepdim=True)
            m3 = m3 + z3.sum(1, keepdim=True)
            z2 = (grad_H2 + z3[..., None] * w3) * on2
            M2, m2 = M2 + torch.bmm(z2.transpose(1, 2), H1), m2 + z2.sum(1, keepdim=True)
            z1 = (grad_H1 + torch.bmm(z2, V2)) * on1
            grad_first = grad_first + z1
            grad_A, grad_G = grad_A - torch.bmm(G, z1), grad_G - torch.bmm(z1, A.transpose(1, 2))

        sums = grad_first.sum(1) + dq.sum(1)  # [T, n_1]
        whole = grad_G + grad_G.transpose(1, 2)
        of_X = grad_first @ We + torch.bmm(whole, X) + torch.bmm(grad_Gq.transpose(1, 2), Xq)
        of_Xq = dq @ We + torch.bmm(grad_Gq, X)
        of_user = sums @ Wu + 2 * (grad_G.sum((1, 2)) + grad_Gq.sum((1, 2)))[:, None] * user
        of_We = grad_first.flatten(0, 1).T @ X.flatten(0, 1) + dq.flatten(0, 1).T @ Xq.flatten(0, 1)
        of_W1 = torch.cat([sums.T @ user, of_We], 1)
        last = M2.sum(0), m2.sum((0, 1)), M3.sum(0), m3.sum(0)
        return (error * error).mean(), of_user, of_X, of_Xq, of_W1, sums.sum(0), *last

    return _step(problem, torch.compile(gradients, dynamic=False) if compiled else gradients)


PEERS: dict[str, Callable[[Problem], Callable[[], Gradients]]] = {
    "metarec_fast": ours,
    "autograd": autograd,
    "torch.func": lambda problem: torch_func(problem, False),
    "torch.func, compiled": lambda problem: torch_func(problem, True),
    "adjoint": lambda problem: adjoint(problem, False),
    "adjoint, compiled": lambda problem: adjoint(problem, True),
}


def largest_difference(actual: Gradients, expected: Gradients) -> float:
    """max |difference| / max |expected|, the worst of all tensors."""
    pairs = [(one.reshape(-1), other.reshape(-1)) for one, other in zip(actual, expected, strict=True)]
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)


def peak_megabytes(step: Callable[[], Gradients]) -> float:
    """Outputs and temporaries of one call, as benchmarks.memory has it; Linux only."""
    with suppress(AttributeError):  # not glibc: free memory is kept, and the result is a lower bound
        ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    outputs = step()
    peak = (resident("VmHWM") - before) / 1e3
    del outputs
    return peak


def by_turns(steps: dict[str, Callable[[], Gradients]], seconds: float) -> dict[str, list[float]]:
    """ms of single calls."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - begin))
    return times


def by_events(
    steps: dict[str, Callable[[], Gradients]], seconds: float, device: torch.device
) -> dict[str, list[float]]:
    """ms of single calls on a GPU, and of their replay."""
    watch, each = clock.Clock(device), seconds / (2 * len(steps))
    times: dict[str, list[float]] = {}
    for name, step in steps.items():
        times[name] = watch.times(step, each).cold
        try:
            replay, _ = clock.capture(step)
        except (RuntimeError, AssertionError) as error:  # the latter: no CUDA in this torch
            print(f"{name} cannot be captured: {str(error).splitlines()[0]}")
            continue
        times[f"{name}, CUDA graph"] = watch.times(replay, each).cold
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tasks", type=int, default=256)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--hidden", type=int, nargs=2, default=(64, 64))
    parser.add_argument("--size", type=int, default=16, help="support and query entries of a task")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing, all together")
    parser.add_argument("--peer", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--memory", action="store_true", help="peak memory of one call instead, best with one --peer")
    options = parser.parse_args()
    if options.memory and options.device.type != "cpu":
        parser.error("--memory: only of the CPU")
    torch.set_num_threads(options.threads)
    if not options.memory:
        keep_freed_memory()
    sizes = (options.tasks, options.items, options.dim, tuple(options.hidden), options.size, options.steps)
    problem = Problem.draw(*sizes).to(options.device)
    steps = {name: PEERS[name](problem) for name in options.peer}
    if options.memory:
        for name, step in steps.items():
            (
                PEERS[name](Problem.draw(2, *sizes[1:])) if name == "metarec_fast" else step
            )()  # ours keeps results' memory
            outputs = 4e-6 * options.dim * options.tasks * (1 + 2 * options.size)
            print(f"{name:22} {peak_megabytes(step):8.1f} MB, outputs {outputs:.1f} MB")
        return
    expected = ours(problem)()
    for name, step in steps.items():
        difference = largest_difference(step(), expected)
        assert difference < 1e-3, f"{name} differs by {difference}"
    seconds, device = options.seconds, options.device
    times = by_turns(steps, seconds) if device.type == "cpu" else by_events(steps, seconds, device)
    fastest = min(next(iter(times.values())))
    for name, each in times.items():
        ratio = min(each) / fastest
        print(f"{name:34} min {min(each):8.2f} ms  median {statistics.median(each):8.2f} ms  {ratio:6.2f}×")


if __name__ == "__main__":
    main()
