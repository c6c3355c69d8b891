"""Learners as modules: losses and gradients, what equals what, and other people's optimisers."""

import numpy as np
import pytest
import torch
from problems import Draw

from metarec_fast import functional as F
from metarec_fast.data import Interactions
from metarec_fast.maml import FOMAML, MAML, MetaSGD
from metarec_fast.maml_r import MAMLR
from metarec_fast.models import DotRecommender
from metarec_fast.optim import SparseAdam, clip_grad_norm_
from metarec_fast.reptile import Reptile
from metarec_fast.tasks import Entries, TaskBatch

NUM_ITEMS, DIM = 12, 3
ALL = [MAML, FOMAML, Reptile, MetaSGD, MAMLR]
OFF = {
    "warm_start": False, "choices": False, "learn_rates": False, "momentum": 0.0, "pull": False, "weigh_items": False,
    "extra_count": 0.0, "outer_loss": "squared",
}  # fmt: skip


def make_entries(draw, sizes, dtype=torch.float64, num_items=NUM_ITEMS):
    n = sum(sizes)
    items = draw.integers(0, num_items, n)
    targets = draw.integers(1, 6, n).to(dtype)
    return Entries(items, targets, torch.tensor([0, *np.cumsum(sizes)]))


def make_batch(seed=0, support=(3, 0, 5), query=(2, 4, 1), dtype=torch.float64):
    draw = Draw(seed)
    return TaskBatch(make_entries(draw, support, dtype), make_entries(draw, query, dtype))


def make_model(seed=0, dtype=torch.float64, **arguments):
    torch.manual_seed(seed)
    model = DotRecommender(NUM_ITEMS, DIM, **arguments).to(dtype)
    with torch.no_grad():
        model.item_embedding.weight.normal_(std=0.5)
        model.item_bias.weight.normal_(std=0.3)
        model.user_init.normal_(std=0.5)
        model.user_bias_init.fill_(0.1)
        model.offset.fill_(3.2)
    model.initialized.fill_(True)
    return model


def make_log(num_users=40, seed=0):
    """Users who each rated about half of the items, by a rank-one taste plus noise."""
    generator = np.random.default_rng(seed)
    taste, kind = generator.normal(size=num_users), generator.normal(size=NUM_ITEMS)
    users, items = np.nonzero(generator.random((num_users, NUM_ITEMS)) < 0.6)
    ratings = 3 + 0.8 * taste[users] * kind[items] + 0.3 * generator.normal(size=len(users))
    return Interactions.from_arrays(users, items, ratings)


def gradients(learner, batch):
    learner.zero_grad()
    loss = learner(batch)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in learner.named_parameters()}


def deposited(learner, batch):
    """What `backward` gives in place of `gradients`."""
    learner.zero_grad()
    loss = learner.backward(batch)
    assert not loss.requires_grad
    return loss, {name: parameter.grad for name, parameter in learner.named_parameters()}


@pytest.mark.parametrize("algorithm", ALL)
@pytest.mark.parametrize("adapt", ["user", "all"])
@pytest.mark.parametrize("sparse", [False, True])
def test_backward_gives_what_autograd_does(algorithm, adapt, sparse):
    if algorithm in (MetaSGD, MAMLR) and adapt == "all":
        pytest.skip("has rates of its own for what adapts")
    learner = algorithm(make_model(sparse=sparse), adapt=adapt)
    batch = make_batch().with_weights(torch.tensor([1.0, 2, 3]).double())
    (loss, expected), (own_loss, own) = gradients(learner, batch), deposited(learner, batch)
    torch.testing.assert_close(own_loss, loss, rtol=0, atol=0)
    assert_same_gradients(dense_of(own), dense_of(expected))
    assert {name: each.layout for name, each in own.items()} == {name: each.layout for name, each in expected.items()}
    learner.backward(batch)
    twice = {name: parameter.grad for name, parameter in learner.named_parameters()}
    assert_same_gradients(dense_of(twice), dense_of(expected), factor=2.0)


def test_backward_weighs_users_as_the_loss_does():
    learner, batch = MAMLR(make_model(), weigh_users="ratings"), make_batch()
    (loss, expected), (own_loss, own) = gradients(learner, batch), deposited(learner, batch)
    torch.testing.assert_close(own_loss, loss, rtol=0, atol=0)
    assert_same_gradients(own, expected)


def test_backward_leaves_frozen_parameters_without_gradient():
    learner, batch = MAML(make_model()), make_batch()
    learner.freeze(["item_embedding.weight", "offset"])
    _, own = deposited(learner, batch)
    assert own["model.item_embedding.weight"] is None
    assert own["model.offset"] is None
    assert own["model.user_init"] is not None


@pytest.mark.parametrize("algorithm", [MAML, MAMLR, Reptile])
def test_whoever_hangs_onto_a_learner_is_told_by_backward_too(algorithm):
    learner, batch, told = algorithm(make_model()), make_batch(), []
    model = learner.model
    _, expected = gradients(learner, batch)
    model.user_init.register_hook(lambda gradient: told.append("hook") or 2 * gradient)
    model.offset.register_post_accumulate_grad_hook(lambda _: told.append("accumulated"))
    _, own = deposited(learner, batch)
    assert sorted(told) == ["accumulated", "hook"]
    torch.testing.assert_close(own["model.user_init"], 2 * expected["model.user_init"])
    model.item_embedding.register_forward_hook(lambda *_: told.append("looked up"))
    learner.backward(batch)
    assert "looked up" in told
    learner.register_forward_hook(lambda *_: told.append("called"))
    learner.backward(batch)
    assert told[-3:].count("called") == 1


def test_backward_calls_the_forward_of_a_subclass():
    class Doubled(MAML):
        def forward(self, batch):
            return 2 * super().forward(batch)

    batch = make_batch()
    (loss, expected), (own_loss, own) = gradients(MAML(make_model()), batch), deposited(Doubled(make_model()), batch)
    torch.testing.assert_close(own_loss, 2 * loss)
    assert_same_gradients(own, expected, factor=2.0)


def test_the_loss_is_the_mean_over_tasks_of_their_query_loss_after_adapting():
    model, batch = make_model(), make_batch()
    learner = MAML(model, inner_lr=0.05, inner_steps=3)
    scores = learner.predict(batch)
    errors = (scores - batch.query.targets).square().split(batch.query.sizes().tolist())
    torch.testing.assert_close(learner(batch).detach(), torch.stack([error.mean() for error in errors]).mean())


@pytest.mark.parametrize("algorithm", ALL)
def test_an_extra_count_damps_the_steps_of_small_supports(algorithm):
    arguments = {**OFF, "extra_count": 0.0} if algorithm is MAMLR else {}
    batch, sizes = make_batch(), torch.tensor([3.0, 0.0, 5.0]).double()
    damped, grads = gradients(algorithm(make_model(), inner_lr=0.05, **{**arguments, "extra_count": 2.0}), batch)
    shares = (sizes / (sizes + 2))[batch.support.task_ids()]
    weighted = batch.with_entries(batch.support.with_weights(shares), batch.query)
    expected, expected_grads = gradients(algorithm(make_model(), inner_lr=0.05, **arguments), weighted)
    torch.testing.assert_close(damped, expected, rtol=1e-12, atol=0)
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, expected_grads[name], rtol=1e-10, atol=1e-12, msg=name)
    assert damped != algorithm(make_model(), inner_lr=0.05, **arguments)(batch)


def test_gradients_are_those_of_meta_step_on_the_whole_table():
    model, batch = make_model(), make_batch()
    loss, grads = gradients(MAML(model, inner_lr=0.05, inner_steps=3), batch)
    table, item_bias = (value.detach() for value in model.tables())
    result = F.meta_step(
        model.user_init.detach(), table, item_bias, batch, user_bias_init=model.user_bias_init.detach(),
        offset=model.offset.detach(), inner_lr=0.05, inner_steps=3,
    )  # fmt: skip
    torch.testing.assert_close(loss, result.loss.detach())
    rows, biases = result.grads["item_table"], result.grads["item_bias"]
    torch.testing.assert_close(grads["model.item_embedding.weight"], rows.to_dense(NUM_ITEMS))
    torch.testing.assert_close(grads["model.item_bias.weight"].squeeze(1), biases.to_dense(NUM_ITEMS))
    for name in ("user_init", "user_bias_init", "offset"):
        torch.testing.assert_close(grads[f"model.{name}"], result.grads[name])


@pytest.mark.parametrize("algorithm", ALL)
def test_the_loss_without_gradients_is_the_same(algorithm):
    learner, batch = algorithm(make_model()), make_batch()
    with torch.no_grad():
        value = learner(batch)
    assert not value.requires_grad
    torch.testing.assert_close(value, learner(batch).detach())


@pytest.mark.parametrize("algorithm", ALL)
def test_every_parameter_gets_a_finite_gradient(algorithm):
    _, grads = gradients(algorithm(make_model()), make_batch())
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in grads.values())


def test_task_weights_weigh_tasks_and_tasks_without_query_do_not_count():
    model, batch = make_model(), make_batch(query=(2, 0, 1))
    learner = MAML(model)
    weights = torch.tensor([1.0, 5.0, 3.0], dtype=torch.float64)
    weighted = TaskBatch(batch.support, batch.query, weights=weights)
    errors = (learner.predict(batch) - batch.query.targets).square()
    expected = (errors[:2].mean() + 3 * errors[2]) / 4
    torch.testing.assert_close(learner(weighted).detach(), expected)
    with torch.no_grad():
        torch.testing.assert_close(learner(weighted), expected)


def test_fomaml_is_maml_of_first_order():
    model, batch = make_model(), make_batch()
    loss, grads = gradients(FOMAML(model, inner_lr=0.07), batch)
    same_loss, same = gradients(MAML(model, inner_lr=0.07, first_order=True), batch)
    _, second_order = gradients(MAML(model, inner_lr=0.07), batch)
    assert torch.equal(loss, same_loss)
    assert all(torch.equal(grads[name], same[name]) for name in grads)
    assert not torch.allclose(grads["model.item_embedding.weight"], second_order["model.item_embedding.weight"])


def test_maml_r_with_every_part_off_is_maml():
    model, batch = make_model(), make_batch()
    loss, grads = gradients(MAML(model, inner_lr=0.07, inner_steps=4), batch)
    same_loss, same = gradients(MAMLR(model, inner_lr=0.07, inner_steps=4, **OFF), batch)
    assert grads.keys() == same.keys()
    assert torch.equal(loss, same_loss)
    assert all(torch.equal(grads[name], same[name]) for name in grads)


def test_meta_sgd_starts_as_maml_and_learns_a_rate_for_each_coordinate():
    model, batch = make_model(), make_batch()
    learner = MetaSGD(model, inner_lr=0.07)
    torch.testing.assert_close(learner(batch), MAML(model, inner_lr=0.07)(batch))
    _, grads = gradients(learner, batch)
    assert grads["log_rates"].shape == (DIM + 1,)
    step = 1e-6
    with torch.no_grad():
        learner.log_rates[0] += step
        above = learner(batch)
        learner.log_rates[0] -= 2 * step
        below = learner(batch)
    torch.testing.assert_close(grads["log_rates"][0], (above - below) / (2 * step), rtol=1e-5, atol=1e-8)


def test_the_gradients_of_maml_r_are_those_of_finite_differences():
    learner, batch = MAMLR(make_model(), inner_lr=0.03), make_batch()
    _, grads = gradients(learner, batch)
    step = 1e-6
    for name, parameter in learner.named_parameters():
        flat = parameter.detach().view(-1)
        place = int(grads[name].reshape(-1).abs().argmax())
        before = float(flat[place])
        with torch.no_grad():
            flat[place] = before + step
            above = learner(batch)
            flat[place] = before - step
            below = learner(batch)
            flat[place] = before
        slope = (above - below) / (2 * step)
        # Central differences err by step² and by rounding over step, about 1e-9 of a loss of order one.
        torch.testing.assert_close(grads[name].reshape(-1)[place], slope, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.cpu
def test_maml_r_starts_where_its_factor_model_is():
    from metarec_fast.factor_model import FactorModel

    log, batch = make_log(), make_batch(dtype=torch.float32)
    model = DotRecommender(NUM_ITEMS, DIM)
    learner = MAMLR(model, inner_steps="exact")
    learner.initialize(log)
    factors = FactorModel.fit(log, dim=DIM)
    user, bias = factors.fold_in(batch)
    assert factors.user_start.abs().max() > 0
    tasks, items = batch.query.task_ids(), batch.query.items
    # The start adds to the factor model's pull a little more with every rating, which is taken out here.
    with torch.no_grad():
        learner.log_pull[1] = -30.0
    expected = (
        factors.offset + factors.item_bias[items] + bias[tasks] + (user[tasks] * factors.item_table[items]).sum(1)
    )
    torch.testing.assert_close(learner.predict(batch), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.cpu
def test_maml_r_starts_from_any_factor_model():
    from metarec_fast import warm_start

    log, batch = make_log(), make_batch(dtype=torch.float32)
    factors = warm_start.given(torch.randn(NUM_ITEMS, DIM, generator=torch.Generator().manual_seed(0)), log)
    learner = MAMLR(DotRecommender(NUM_ITEMS, DIM), inner_steps="exact")
    learner.start_from(factors, log)
    with torch.no_grad():
        learner.log_pull[1] = -30.0
    user, bias = factors.fold_in(batch)
    tasks, items = batch.query.task_ids(), batch.query.items
    expected = factors.offset + factors.item_bias[items] + bias[tasks]
    expected = expected + (user[tasks] * factors.item_table[items]).sum(1)
    torch.testing.assert_close(learner.predict(batch), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"factors\.item_table: expected shape \[N, D\] = \(12, 3\).* got \(12, 2\)"):
        learner.start_from(warm_start.ppca(log, dim=2), log)


@pytest.mark.parametrize("method", ["ppca", "als", False])
def test_maml_r_takes_other_warm_starts_by_name(method):
    learner = MAMLR(DotRecommender(NUM_ITEMS, DIM), warm_start=method)
    learner.initialize(make_log())
    assert bool(learner.model.initialized)
    assert not learner.choice.weight.any()


def test_maml_r_names_settings_that_it_does_not_know():
    with pytest.raises(ValueError, match=r"warm_start: expected a bool or one of 'variational', .* got 'svd'"):
        MAMLR(make_model(), warm_start="svd")
    with pytest.raises(ValueError, match=r'weigh_users: expected "equal" or "ratings", got 3'):
        MAMLR(make_model(), weigh_users=3)


def test_users_weighed_by_ratings_count_by_their_query_sizes():
    batch = make_batch()
    learner = MAMLR(make_model(), weigh_users="ratings", outer_loss="squared")
    expected = (learner.predict(batch) - batch.query.targets).square().mean()
    torch.testing.assert_close(learner(batch).detach(), expected)


def test_the_choices_of_a_user_move_his_start():
    batch = make_batch()
    learner = MAMLR(make_model(), inner_steps=0)
    with torch.no_grad():
        learner.choice.weight.copy_(Draw(1).normal(*learner.choice.weight.shape))
    user, bias = learner.start_of(batch.support)
    for task, items in enumerate(batch.support.items.split(batch.support.sizes().tolist())):
        moved = learner.choice.weight[items].sum(0) / (len(items) + 1) ** 0.5
        torch.testing.assert_close(user[task], learner.model.user_init + moved[:-1])
        torch.testing.assert_close(bias[task], learner.model.user_bias_init + moved[-1])
    fast = learner.fast_weights(batch)
    torch.testing.assert_close(fast.user, user.detach())


@pytest.mark.cpu
def test_the_warm_started_steps_of_maml_r_end_near_the_exact_solution():
    log, batch = make_log(), make_batch(dtype=torch.float32, support=(3, 4, 5))
    predictions = {}
    for steps in (0, 5, "exact"):
        learner = MAMLR(DotRecommender(NUM_ITEMS, DIM), inner_steps=steps)
        learner.initialize(log)
        predictions[steps] = learner.predict(batch)
    distance = {steps: float((predictions[steps] - predictions["exact"]).norm()) for steps in (0, 5)}
    assert distance[5] < 0.5 * distance[0]


def test_sgd_with_rate_epsilon_on_reptile_is_reptile():
    epsilon = 0.3
    model = make_model()
    batch = TaskBatch(make_batch(support=(3, 0, 5)).support)
    learner = Reptile(model, inner_lr=0.05, inner_steps=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast = learner.fast_weights(batch)

    learner(batch).backward()
    torch.optim.SGD(learner.parameters(), lr=epsilon).step()

    user = before["user_init"] + epsilon * (fast.user - before["user_init"]).mean(0)
    bias = before["user_bias_init"] + epsilon * (fast.bias - before["user_bias_init"]).mean()
    torch.testing.assert_close(model.user_init.detach(), user)
    torch.testing.assert_close(model.user_bias_init.detach(), bias)
    assert torch.equal(model.offset.detach(), before["offset"])
    tasks = batch.support.task_ids()
    for item in range(NUM_ITEMS):
        adapted = {}  # what the item became, by task
        for entry in (batch.support.items == item).nonzero().squeeze(1).tolist():
            adapted[int(tasks[entry])] = fast.items.rows[entry]
        row = before["item_embedding.weight"][item]
        if adapted:
            row = row + epsilon * (torch.stack(list(adapted.values())) - row).mean(0)
        torch.testing.assert_close(model.item_embedding.weight[item].detach(), row)


def test_reptile_of_one_task_with_rate_one_ends_where_the_task_does():
    model = make_model()
    batch = TaskBatch(make_batch(support=(6,), query=(1,)).support)
    learner = Reptile(model, inner_lr=0.05, inner_steps=4)
    fast = learner.fast_weights(batch)
    learner(batch).backward()
    torch.optim.SGD(learner.parameters(), lr=1.0).step()
    torch.testing.assert_close(model.user_init.detach(), fast.user[0])
    torch.testing.assert_close(model.item_embedding.weight[batch.support.items].detach(), fast.items.rows)
    torch.testing.assert_close(model.item_bias.weight[batch.support.items, 0].detach(), fast.items.biases)


def test_reptile_returns_the_support_loss_after_adaptation_and_ignores_the_query():
    model, batch = make_model(), make_batch(support=(3, 2, 5))
    learner = Reptile(model)
    own = TaskBatch(batch.support, batch.support)
    errors = (learner.predict(own) - own.query.targets).square().split(own.query.sizes().tolist())
    loss, grads = gradients(learner, batch)
    torch.testing.assert_close(loss, torch.stack([error.mean() for error in errors]).mean())
    same_loss, same = gradients(learner, TaskBatch(batch.support))
    assert torch.equal(loss, same_loss)
    assert all(torch.equal(grads[name], same[name]) for name in grads)


def test_reptile_on_the_user_side_leaves_items_alone():
    _, grads = gradients(Reptile(make_model(), adapt="user"), make_batch())
    assert not grads["model.item_embedding.weight"].any()
    assert grads["model.user_init"].any()


@pytest.mark.parametrize("algorithm", ALL)
def test_catalogue_scores_agree_with_predictions(algorithm):
    learner, batch = algorithm(make_model()), make_batch()
    scores = learner.score_catalogue(batch)
    assert scores.shape == (3, NUM_ITEMS)
    torch.testing.assert_close(scores[batch.query.task_ids(), batch.query.items], learner.predict(batch))


@pytest.mark.parametrize("algorithm", ALL)
@pytest.mark.parametrize(
    ("sparse", "make_optimizers"),
    [
        (False, lambda learner: [torch.optim.Adam(learner.parameters(), lr=0.01)]),
        (False, lambda learner: [torch.optim.SGD(learner.parameters(), lr=0.01)]),
        (True, lambda learner: [torch.optim.SGD(learner.parameters(), lr=0.01)]),
        (True, lambda learner: learner.default_optimizers(0.001)),
        (False, lambda learner: learner.default_optimizers(0.001)),
    ],
)
def test_the_loss_falls_under_other_peoples_optimisers(algorithm, sparse, make_optimizers):
    learner, batch = algorithm(make_model(sparse=sparse), inner_lr=0.02), make_batch()
    optimizers = make_optimizers(learner)
    first = learner(batch).item()
    for _ in range(15):
        for optimizer in optimizers:
            optimizer.zero_grad()
        learner(batch).backward()
        if not sparse:
            torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
    assert learner(batch).item() < first


def test_sparse_tables_are_trained_by_sparse_adam_and_only_where_the_batch_touched_them():
    learner, batch = MAMLR(make_model(sparse=True)), make_batch()
    optimizers = learner.default_optimizers()
    assert [type(optimizer) for optimizer in optimizers] == [torch.optim.Adam, SparseAdam]
    before = learner.model.item_embedding.weight.detach().clone()
    learner(batch).backward()
    for optimizer in optimizers:
        optimizer.step()
    touched = torch.zeros(NUM_ITEMS, dtype=torch.bool)
    touched[batch.localize()[0]] = True
    changed = (learner.model.item_embedding.weight.detach() != before).any(1)
    assert torch.equal(changed, touched)
    assert not touched.all()


def dense_of(grads):
    return {name: gradient.to_dense() for name, gradient in grads.items()}


def assert_same_gradients(actual, expected, factor=1.0):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], factor * gradient, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("algorithm", ALL)
@pytest.mark.parametrize("adapt", ["user", "all"])
def test_sparse_gradients_are_the_dense_ones(algorithm, adapt):
    if adapt == "all" and algorithm in (MetaSGD, MAMLR):
        algorithm = MAML
    batch = make_batch(query=(2, 0, 4))
    weights = torch.tensor([1.0, 5.0, 3.0], dtype=torch.float64)
    entry_weights = Draw(0).uniform(len(batch.support)) + 1
    support = Entries(batch.support.items, batch.support.targets, batch.support.offsets, entry_weights)
    for each in (batch, TaskBatch(support, batch.query, weights=weights)):
        results = [gradients(algorithm(make_model(sparse=sparse), adapt=adapt), each) for sparse in (False, True)]
        (loss, dense), (same_loss, sparse) = results
        torch.testing.assert_close(same_loss, loss)
        assert_same_gradients(dense_of(sparse), dense)
        assert sparse["model.item_embedding.weight"].is_sparse
        assert sparse["model.item_bias.weight"].is_sparse


def test_sparse_gradients_are_the_rows_of_meta_step_one_per_entry():
    model, batch = make_model(sparse=True), make_batch()
    _, grads = gradients(MAML(model, inner_lr=0.05), batch)
    table, item_bias = (value.detach() for value in model.tables())
    result = F.meta_step(
        model.user_init.detach(), table, item_bias, batch, user_bias_init=model.user_bias_init.detach(),
        offset=model.offset.detach(), inner_lr=0.05,
    )  # fmt: skip
    gradient = grads["model.item_embedding.weight"]
    assert torch.equal(gradient._indices()[0], torch.cat([batch.support.items, batch.query.items]))
    assert torch.equal(gradient._values(), result.grads["item_table"].rows)
    assert not gradient.is_coalesced()


def test_sparse_gradients_come_from_the_reference_where_no_binary_loads(monkeypatch):
    _, expected = gradients(MAMLR(make_model(sparse=True)), make_batch())
    expected = dense_of(expected)
    monkeypatch.setattr("metarec_fast._library.loaded_for", lambda tensor: False)
    _, grads = gradients(MAMLR(make_model(sparse=True)), make_batch())
    assert grads["model.item_embedding.weight"].is_sparse
    assert_same_gradients(dense_of(grads), expected)


@pytest.mark.parametrize("algorithm", [MAML, MetaSGD, MAMLR])
def test_sparse_gradients_are_scaled_and_accumulate(algorithm):
    batches = make_batch(0), make_batch(1)
    found = []
    for sparse in (False, True):
        learner = algorithm(make_model(sparse=sparse))
        for batch in batches:
            (learner(batch) / 2).backward()
        (3 * learner(batches[0]) - learner(batches[1]).square()).backward()
        found.append({name: parameter.grad.to_dense() for name, parameter in learner.named_parameters()})
    assert_same_gradients(found[1], found[0])


def test_clipping_sparse_gradients_is_clipping_dense_ones():
    found = []
    for sparse in (False, True):
        learner = MAMLR(make_model(sparse=sparse))
        learner(make_batch()).backward()
        norm = clip_grad_norm_(learner.parameters(), 0.1)
        found.append({name: parameter.grad.to_dense() for name, parameter in learner.named_parameters()})
        found[-1]["norm"] = norm
    assert_same_gradients(found[1], found[0])


def test_sparse_tables_that_are_frozen_get_no_gradient():
    learner = MAML(make_model(sparse=True))
    learner.model.item_embedding.weight.requires_grad_(False)
    _, grads = gradients(learner, make_batch())
    assert grads["model.item_embedding.weight"] is None
    assert grads["model.item_bias.weight"].is_sparse
    assert grads["model.user_init"].any()


def test_embeddings_that_do_more_than_look_up_are_asked_themselves():
    seen = []
    learner = MAML(make_model(sparse=True))
    _, expected = gradients(learner, make_batch())
    expected = dense_of(expected)
    learner.model.item_embedding.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    _, grads = gradients(learner, make_batch())
    assert seen
    assert_same_gradients(dense_of(grads), expected)


def test_a_table_of_another_kind_is_looked_up_as_it_wants_to_be():
    class Doubled(torch.nn.Module):
        def __init__(self, embedding):
            super().__init__()
            self.weight = embedding.weight

        def forward(self, items):
            return 2 * self.weight[items]

    learner, own = MAML(make_model()), MAML(make_model())
    with torch.no_grad():
        learner.model.item_embedding.weight.mul_(2)
    own.model.item_embedding = Doubled(own.model.item_embedding)
    loss, expected = gradients(learner, make_batch())
    for find in (gradients, deposited):
        found, grads = find(own, make_batch())
        torch.testing.assert_close(found, loss)
        table = "model.item_embedding.weight"
        torch.testing.assert_close(grads[table], 2 * expected[table])


def test_the_rows_of_a_loss_are_given_away_once():
    learner = MAML(make_model(sparse=True))
    loss = learner(make_batch())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="meta_step: an earlier backward has given the rows of this loss away"):
        loss.backward()


def test_clipping_bounds_the_norm_of_the_gradient():
    learner, batch = MAML(make_model()), make_batch()
    learner(batch).backward()
    torch.nn.utils.clip_grad_norm_(learner.parameters(), 0.01)
    norm = torch.stack([parameter.grad.norm() for parameter in learner.parameters()]).norm()
    assert float(norm) == pytest.approx(0.01, rel=1e-4)


def test_parameter_groups_hold_every_parameter_once():
    for algorithm in ALL:
        learner = algorithm(make_model())
        held = [parameter for group in learner.parameter_groups() for parameter in group["params"]]
        assert sorted(map(id, held)) == sorted(map(id, learner.parameters()))


def test_float32_batches_fit_a_float64_model():
    learner = MAML(make_model())
    narrow, wide = make_batch(dtype=torch.float32), make_batch()
    torch.testing.assert_close(learner(narrow), learner(wide))


@pytest.mark.parametrize("algorithm", ALL)
def test_empty_batches_have_a_loss_of_zero_and_no_gradient(algorithm):
    loss, grads = gradients(algorithm(make_model()), make_batch(support=(), query=()))
    assert float(loss) == 0
    assert not any(bool(gradient.any()) for gradient in grads.values())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MAML("model"), TypeError, "model: expected a DotRecommender or any nn.Module, got str"),
        (lambda: MAML(make_model(), inner_lr=0.0), ValueError, "inner_lr: expected a number > 0, got 0.0"),
        (lambda: MAML(make_model(), inner_steps=-1), ValueError, "inner_steps: must be ≥ 0, got -1"),
        (lambda: MAML(make_model(), inner_steps=2.5), TypeError, "inner_steps: expected an int or 'exact'"),
        (lambda: MAML(make_model(), adapt="items"), ValueError, "adapt: expected 'user' or 'all', got 'items'"),
        (lambda: MAML(make_model(), outer_loss="hinge"), ValueError, "outer_loss: expected one of"),
        (lambda: MAML(make_model(), inner_steps="exact"), ValueError, "inner_steps='exact' cannot .* prior_pull=0"),
        (lambda: MetaSGD(make_model(), adapt="all"), ValueError, "adapt='all' cannot .* preconditioner"),
        (lambda: MAMLR(make_model(), momentum=1.0), ValueError, r"momentum: must be in \[0, 1\), got 1.0"),
        (lambda: MAMLR(make_model(), extra_count=-1.0), ValueError, "extra_count: expected a number ≥ 0, got -1"),
        (lambda: MAML(make_model()).parameter_groups(-1.0), ValueError, "outer_lr: must be > 0 and finite, got -1"),
    ],
)
def test_bad_settings_are_named_at_once(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_bad_batches_are_named():
    learner, batch = MAML(make_model()), make_batch()
    with pytest.raises(TypeError, match="batch: expected a TaskBatch, got tuple"):
        learner((batch.support, batch.query))
    with pytest.raises(ValueError, match=r"batch.query: expected Entries, got None"):
        learner(TaskBatch(batch.support))
    unknown = Entries(torch.tensor([0, NUM_ITEMS]), torch.ones(2).double(), torch.tensor([0, 2]))
    with pytest.raises(IndexError, match=rf"support.items: ids must be in \[0, {NUM_ITEMS}\), got {NUM_ITEMS} at"):
        learner(TaskBatch(unknown, unknown))
    unrated = Entries(batch.query.items, None, batch.query.offsets)
    with pytest.raises(ValueError, match=r"query.targets: expected a tensor"):
        learner(TaskBatch(batch.support, unrated))
    assert learner.predict(TaskBatch(batch.support, unrated)).shape == (len(unrated),)


def test_a_second_differentiation_is_refused():
    for algorithm, sparse, message in (
        (MAML, False, "meta_step"), (MAML, True, "meta_step"), (MAMLR, True, "meta_step"), (Reptile, False, "Reptile"),
    ):  # fmt: skip
        learner = algorithm(make_model(sparse=sparse))
        first = torch.autograd.grad(learner(make_batch()), learner.model.user_init, create_graph=True)[0]
        with pytest.raises(RuntimeError, match=f"{message} cannot be differentiated twice"):
            first.sum().backward()


def test_a_second_differentiation_of_sparse_rows_is_refused():
    learner = MAML(make_model(sparse=True))
    table = learner.model.item_embedding.weight
    rows = torch.autograd.grad(learner(make_batch()), table, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="meta_step cannot be differentiated twice"):
        (rows.to_dense() * table).sum().backward()
