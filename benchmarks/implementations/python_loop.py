"""A Python loop over users, autograd through each one's inner loop: what textbooks show."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.implementations.blocks import Blocks, Gradients, Peer, Step, gathered_step
from benchmarks.implementations.losses import loss
from benchmarks.workloads import Problem, Workload

MOST_TASKS = 256  # about 3 ms a task: more of them show nothing new


class UserSide(nn.Module):
    """The part of the model that adapts: a user vector and bias; calling it scores items."""

    def __init__(self, user: Tensor, user_bias: Tensor) -> None:
        super().__init__()
        self.user, self.bias = nn.Parameter(user.clone()), nn.Parameter(user_bias.clone())

    def forward(self, rows: list[Tensor], biases: list[Tensor]) -> Tensor:
        """Scores [S] of items, or of pairs of items (BPR)."""
        if len(rows) == 2:
            return (rows[0] - rows[1]) @ self.user + biases[0] - biases[1] + 0 * self.bias
        return rows[0] @ self.user + biases[0] + self.bias


TaskLoss = Callable[[nn.Module, list[Tensor], list[Tensor], Tensor, Tensor], Tensor]
# (model, inner loss of a model, outer loss of a model) → the outer loss after adaptation
Adapt = Callable[[nn.Module, Callable[[nn.Module], Tensor], Callable[[nn.Module], Tensor]], Tensor]


def make_loop(work: Workload, adapt: Adapt) -> Gradients:
    """One task after the other, each with a backward pass of its own; gradients add up in the leaves."""

    def gradients(user: Tensor, user_bias: Tensor, rows: list[Tensor], biases: list[Tensor], blocks: Blocks) -> tuple:
        known, asked = blocks.support, blocks.query
        assert asked is not None
        model = UserSide(user, user_bias)
        for leaf in (*rows, *biases):
            leaf.requires_grad_()
        count, num_tasks = len(rows) // 2, rows[0].shape[0]
        total = torch.zeros(())
        sizes = [known.items.shape[1]] * num_tasks
        if isinstance(known.weights, Tensor):
            sizes = (known.weights > 0).sum(1).tolist()  # a loop needs no padding
        for t in range(num_tasks):
            own = [part[t] for part in rows], [part[t] for part in biases]

            def inner(model: nn.Module, own=own, t=t) -> Tensor:
                n = sizes[t]
                scores = model([part[:n] for part in own[0][:count]], [part[:n] for part in own[1][:count]])
                return loss(work.loss, scores, known.targets[t, :n]).mean()

            def outer(model: nn.Module, own=own, t=t) -> Tensor:
                scores = model(own[0][count:], own[1][count:])
                return loss(work.loss, scores, asked.targets[t]).mean() / num_tasks

            value = adapt(model, inner, outer)
            value.backward()
            total = total + value.detach()
        return (
            total,
            model.user.grad,
            model.bias.grad,
            [part.grad for part in rows],
            [part.grad for part in biases],
        )

    return gradients


def _autograd(work: Workload) -> Adapt:
    def adapt(model: nn.Module, inner: Callable[[nn.Module], Tensor], outer: Callable[[nn.Module], Tensor]) -> Tensor:
        names = [name for name, _ in model.named_parameters()]
        fast = list(model.parameters())

        def called(values: list[Tensor]) -> Callable[..., Tensor]:
            return lambda *inputs: torch.func.functional_call(model, dict(zip(names, values, strict=True)), inputs)

        for _ in range(work.steps):
            slopes = torch.autograd.grad(inner(called(fast)), fast, create_graph=not work.first_order)
            fast = [value - work.inner_lr * slope for value, slope in zip(fast, slopes, strict=True)]
        return outer(called(fast))

    return adapt


def loop_effort(work: Workload) -> str | None:
    """Where it is quick, and once where it is not: a task takes as long as all of them together take the others."""
    if work.kind != "gradient" or work.adapt != "user" or work.num_tasks > MOST_TASKS:
        return None
    if work.num_tasks * work.steps <= 64:
        return "quick"
    return "normal" if work.name == "user" else "all"


def loop_peer(
    name: str,
    adapt: Callable[[Workload], Adapt],
    missing: Callable[[], str | None] = lambda: None,
    first_order: bool = True,
) -> Peer:
    """A peer that differs from the others in how one task adapts."""

    def prepare(problem: Problem) -> Step:
        return gathered_step(problem, make_loop(problem.workload, adapt(problem.workload)))

    def effort(work: Workload) -> str | None:
        return None if work.first_order and not first_order else loop_effort(work)

    return Peer(name, prepare, effort, missing)


PEERS = (loop_peer("Python loop, autograd", _autograd),)
