"""What happens around the gradient of a batch: whoever listens to an optimiser hears of its steps, and losses count."""

import functools
import types

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from metarec_fast import _outer_steps
from metarec_fast._outer_steps import Losses, OuterSteps


def make_steps(kind=torch.optim.SGD, total=100, **arguments):
    parameter = torch.nn.Parameter(torch.ones(3))
    return OuterSteps([kind([parameter], **{"lr": 0.5, **arguments})], total), parameter


def take_step(steps, parameter, slope=1.0):
    steps.begin()
    parameter.grad = torch.full_like(parameter, slope)
    steps.end()


def test_rates_rise_for_a_tenth_of_the_steps_and_fall_to_a_fiftieth():
    steps, parameter = make_steps(total=100)
    rates = []
    for _ in range(100):
        take_step(steps, parameter)
        rates.append(steps.optimizers[0].param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.5 * 0.1)
    assert rates[9] == pytest.approx(0.5 * 0.91)
    assert rates[50] == pytest.approx(0.5 * 0.5)
    assert rates[99] == pytest.approx(0.5 * 0.02)
    assert steps.done == 100
    torch.testing.assert_close(parameter.detach(), torch.ones(3) - sum(rates))


def test_long_trainings_rise_for_fifty_steps():
    steps, parameter = make_steps(total=100_000)
    for _ in range(50):
        take_step(steps, parameter)
    assert steps.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.5, rel=1e-3)


def test_gradients_of_the_step_before_are_forgotten():
    steps, parameter = make_steps()
    parameter.grad = torch.ones(3)
    steps.begin()
    assert parameter.grad is None


def test_an_optimizer_may_forget_gradients_in_its_own_way():
    class Zeros(torch.optim.SGD):
        def zero_grad(self, set_to_none=True):
            super().zero_grad(set_to_none=False)

    steps, parameter = make_steps(Zeros)
    parameter.grad = torch.ones(3)
    steps.begin()
    assert torch.equal(parameter.grad, torch.zeros(3))


def test_nobody_is_told_of_a_step_who_does_not_ask(monkeypatch):
    def fail(*_):
        raise AssertionError("a profiler was told")

    steps, parameter = make_steps()
    monkeypatch.setattr(torch.autograd.profiler, "record_function", fail)
    take_step(steps, parameter)
    assert parameter[0] < 1


def own_pre_hook(optimizer, heard):
    optimizer.register_step_pre_hook(lambda *_: heard.append(1))


def own_post_hook(optimizer, heard):
    optimizer.register_step_post_hook(lambda *_: heard.append(1))


def a_patch(optimizer, heard):
    step = optimizer.step

    def patched(*arguments):
        heard.append(1)
        return step(*arguments)

    optimizer.step = patched


def a_wrapper(optimizer, heard):
    kind = type(optimizer)

    @functools.wraps(kind.step)
    def wrapped(self, *arguments):
        heard.append(1)
        return kind.step(self, *arguments)

    optimizer.__class__ = type("Wrapped", (kind,), {"step": wrapped})


@pytest.mark.parametrize("listen", [own_pre_hook, own_post_hook, a_patch, a_wrapper])
def test_who_listens_to_an_optimizer_hears_of_its_steps(listen):
    heard = []
    steps, parameter = make_steps()
    listen(steps.optimizers[0], heard)
    take_step(steps, parameter)
    assert heard == [1]
    assert parameter[0] < 1


@pytest.mark.parametrize("name", ["_inside", "_profiler_enabled", "_TELLS_PROFILER"])
def test_where_pytorch_is_another_inside_everybody_is_told(name, monkeypatch):
    unknown = {"_inside": types.SimpleNamespace(), "_profiler_enabled": lambda: True, "_TELLS_PROFILER": object()}
    told = []
    steps, parameter = make_steps()
    record = torch.autograd.profiler.record_function
    monkeypatch.setattr(torch.autograd.profiler, "record_function", lambda what: (told.append(what), record(what))[1])
    take_step(steps, parameter)
    assert not told
    monkeypatch.setattr(_outer_steps, name, unknown[name])
    take_step(steps, parameter)
    assert told == ["Optimizer.step#SGD.step"]


@pytest.mark.parametrize("register", [register_optimizer_step_pre_hook, register_optimizer_step_post_hook])
def test_who_listens_to_all_optimizers_hears_of_their_steps(register):
    heard = []
    steps, parameter = make_steps()
    handle = register(lambda *_: heard.append(1))
    try:
        take_step(steps, parameter)
    finally:
        handle.remove()
    take_step(steps, parameter)
    assert heard == [1]


def test_a_profiler_is_told_of_steps():
    steps, parameter = make_steps()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        take_step(steps, parameter)
    assert any(event.key == "Optimizer.step#SGD.step" for event in profile.key_averages())


def test_a_schedule_notices_that_the_optimizer_went_on(recwarn):
    steps, parameter = make_steps()
    schedule = torch.optim.lr_scheduler.StepLR(steps.optimizers[0], 1)
    take_step(steps, parameter)
    schedule.step()
    assert not [str(warning.message) for warning in recwarn if "lr_scheduler.step()" in str(warning.message)]


class Event:
    waited_for = 0

    def synchronize(self):
        Event.waited_for += 1


def far_loss(value):
    """Looks like a loss on a GPU."""
    return types.SimpleNamespace(device=torch.device("cuda:0"), to=lambda device, non_blocking: torch.tensor(value))


def test_losses_of_a_gpu_are_read_when_the_next_step_is_under_way(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(record_event=Event))
    losses = Losses(lambda step: f"in step {step}")
    losses.add(far_loss(1.0), 1, 1)
    assert losses.mean == 0
    losses.add(far_loss(4.0), 2, 2)
    assert losses.mean == 1.0
    losses.read_all()
    assert losses.mean == 3.0
    assert Event.waited_for == 2

    losses.add(far_loss(float("nan")), 1, 3)
    with pytest.raises(FloatingPointError, match="the outer loss became nan in step 3"):
        losses.add(far_loss(1.0), 1, 4)


def test_losses_on_the_cpu_are_read_at_once():
    losses = Losses(lambda step: f"in step {step}")
    assert losses.mean == 0
    losses.add(torch.tensor(2.0), 3, 1)
    assert losses.mean == 2.0
    with pytest.raises(FloatingPointError, match="the outer loss became inf in step 2"):
        losses.add(torch.tensor(float("inf")), 1, 2)
