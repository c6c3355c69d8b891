"""The MLP tower computed with torch; two hidden layers, relu, squared loss.

    autograd    an inner loop on weights [T, out, in], differentiated by autograd
    torch.func  vmap of a task's loss, grad outside; eager and compiled
    adjoint     what our kernel does, written by hand in batched products: the first layer by products of inputs, the
                steps undone by their adjoint; eager and compiled

All gather rows from the item table, and return the loss and the gradients of user part, rows and layers.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from benchmarks.implementations.blocks import Outputs, Peer, Step
from benchmarks.workloads import Problem, Workload
from metarec_fast import SparseRows

Gradients = tuple[Tensor, ...]  # loss, user part [T, D], support rows and query rows [T, S, D], W_1, b_1, …


def named(problem: Problem, gradients: Gradients) -> Outputs:
    """Gradients under our names."""
    loss, user, rows, query_rows, *layers = gradients
    batch = problem.batch
    assert batch.query is not None
    parts = ((batch.support, rows), (batch.query, query_rows))
    table = [SparseRows(side.items, part.reshape(-1, part.shape[-1])) for side, part in parts]
    return {
        "loss": loss, "user_part": user, "item_table": table, **{f"layers[{i}]": part for i, part in enumerate(layers)},
    }  # fmt: skip


def _step(problem: Problem, gradients: Callable[..., Gradients]) -> Step:
    """One call: gather, as ours does, then the gradients."""
    tower, batch = problem.tower, problem.batch
    assert tower is not None
    assert batch.query is not None
    sides = [(side.items, side.targets.view(batch.num_tasks, -1)) for side in (batch.support, batch.query)]
    parameters = [part for layer in tower.layers for part in layer]

    def step() -> Outputs:
        gathered: list[Tensor] = []
        for items, targets in sides:
            gathered += [problem.item_table[items].view(*targets.shape, -1), targets]
        return named(problem, gradients(tower.user_part, *gathered, *parameters))

    return step


def autograd(problem: Problem) -> Step:
    work = problem.workload

    def forward(inputs: Tensor, weights: list[Tensor]) -> Tensor:  # weights [T, out, in] and [T, out]
        for place in range(0, len(weights), 2):
            inputs = torch.baddbmm(weights[place + 1][:, None], inputs, weights[place].transpose(1, 2))
            inputs = inputs.relu() if place + 2 < len(weights) else inputs
        return inputs[..., 0]

    def gradients(user, rows, targets, query_rows, query_targets, *parameters) -> Gradients:
        leaves = [value.detach().requires_grad_() for value in (user, rows, query_rows, *parameters)]
        tasks, users = len(user), leaves[0][:, None]
        known, asked = (torch.cat([users.expand(-1, part.shape[1], -1), part], -1) for part in leaves[1:3])
        fast = [value.expand(tasks, *value.shape) for value in leaves[3:]]
        for _ in range(work.steps):
            loss = ((forward(known, fast) - targets) ** 2).mean(1).sum()
            slopes = torch.autograd.grad(loss, fast, create_graph=True)
            fast = [value - work.inner_lr * slope for value, slope in zip(fast, slopes, strict=True)]
        loss = ((forward(asked, fast) - query_targets) ** 2).mean()
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    return _step(problem, gradients)


def torch_func(problem: Problem, compiled: bool) -> Step:
    work = problem.workload
    sizes = [2 * work.dim, *work.hidden, 1]
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
        for _ in range(work.steps):
            slopes = grad(error)(fast, user, rows, targets)
            fast = {name: value - work.inner_lr * slopes[name] for name, value in fast.items()}
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


def adjoint(problem: Problem, compiled: bool) -> Step:
    """Two hidden layers: csrc/cpu/tower_task.h has the formulas."""
    s, steps = problem.workload.inner_lr, problem.workload.steps

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


def _effort(needed: str, at_most: int) -> Callable[[Workload], str | None]:
    """On batches of more than `at_most` tasks only with `--all`."""
    return lambda work: None if work.kind != "mlp" else needed if work.num_tasks <= at_most else "all"


PEERS = (
    Peer("hand adjoint, compiled", lambda problem: adjoint(problem, True), _effort("normal", 4096), compiles=True),
    Peer("hand adjoint", lambda problem: adjoint(problem, False), _effort("quick", 4096)),
    Peer("torch.func, compiled", lambda problem: torch_func(problem, True), _effort("normal", 256), compiles=True),
    Peer("torch.func", lambda problem: torch_func(problem, False), _effort("normal", 256)),
    Peer("autograd", autograd, _effort("normal", 256)),
)
