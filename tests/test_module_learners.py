"""Learners on any nn.Module: equal to autograd task by task, in every algorithm; and what is refused."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

import metarec_fast as mf

NUM_ITEMS = 12


class Tower(nn.Module):
    """Item embeddings into a small network, whose weights adapt."""

    num_items = NUM_ITEMS

    def __init__(self, width=3, user_width=0):
        super().__init__()
        self.items = nn.Embedding(NUM_ITEMS, width)
        self.tower = nn.Sequential(nn.Linear(width + user_width, 4), nn.GELU(), nn.Linear(4, 1))

    def forward(self, items, user=None):
        x = self.items(items)
        if user is not None:
            x = torch.cat([x, user.expand(*x.shape[:-1], -1)], -1)
        return self.tower(x).squeeze(-1)


def make_batch(seed=0, sizes=((3, 2), (0, 2), (5, 1), (1, 3)), weights=False, negatives=0):
    generator = torch.Generator().manual_seed(seed)

    def entries(counts):
        n = sum(counts)
        offsets = torch.tensor([0, *np.cumsum(counts)])
        return mf.Entries(
            torch.randint(0, NUM_ITEMS, (n,), generator=generator),
            torch.rand(n, generator=generator, dtype=torch.float64),
            offsets,
            torch.rand(n, generator=generator, dtype=torch.float64) + 0.5 if weights else None,
            torch.randint(0, NUM_ITEMS, (n, negatives), generator=generator) if negatives else None,
        )

    support, query = (entries([size[part] for size in sizes]) for part in (0, 1))
    task_weights = torch.rand(len(sizes), generator=generator, dtype=torch.float64) if weights else None
    return mf.TaskBatch(support, query, weights=task_weights)


def make_learner(algorithm=mf.MAML, adapt=("tower.*",), loss="squared", chunk_size=64, **arguments):
    torch.manual_seed(0)
    model = mf.ModuleRecommender(Tower().double(), loss=loss, chunk_size=chunk_size)
    model.offset.fill_(0.3)
    return algorithm(model, adapt=list(adapt), **arguments)


def task_by_task(learner, batch, first_order=False, rates=None):
    """The outer loss, by a loop over tasks and autograd through the steps of each."""
    module, names = learner.model.module, learner.tasks.names
    losses, counts = [], []
    for t in range(batch.num_tasks):
        support, query = (
            (
                part.items[a:b],
                part.targets[a:b],
                torch.ones(b - a).double() if part.weights is None else part.weights[a:b],
            )
            for part in (batch.support, batch.query)
            for a, b in [part.offsets[t : t + 2].tolist()]
        )
        fast = dict(module.named_parameters())
        for step in range(learner.inner_steps):
            scores = learner.model.offset + functional_call(module, fast, (support[0],))
            loss = (support[2] * error(learner.model.loss, scores, support[1])).sum() / max(len(support[0]), 1)
            slopes = torch.autograd.grad(
                loss, [fast[name] for name in names], create_graph=not first_order, allow_unused=True
            )
            for name, slope in zip(names, slopes, strict=True):
                if slope is not None:
                    scale = learner.inner_lr if rates is None else rates[name]
                    scale = scale[step] if getattr(learner, "rates_of", None) == "step" else scale
                    fast = {**fast, name: fast[name] - scale * slope}
        scores = learner.model.offset + functional_call(module, fast, (query[0],))
        losses.append((query[2] * error(learner.model.loss, scores, query[1])).sum() / query[2].sum())
        counts.append(1.0 if batch.weights is None else batch.weights[t])
    counts = torch.stack([torch.as_tensor(count).double() for count in counts])
    return (torch.stack(losses) * counts).sum() / counts.sum()


def entries_of(part, begin, end):
    weights = torch.ones(end - begin).double() if part.weights is None else part.weights[begin:end]
    return part.items[begin:end], part.targets[begin:end], weights


def error(loss, scores, targets):
    return (scores - targets) ** 2 if loss == "squared" else nn.functional.softplus(scores) - targets * scores


def gradients(learner):
    return {name: value.grad for name, value in learner.named_parameters()}


@pytest.mark.parametrize("chunk_size", [1, 3, 64])
@pytest.mark.parametrize("loss", ["squared", "logistic"])
@pytest.mark.parametrize("weights", [False, True])
def test_loss_and_gradients_are_those_of_autograd_task_by_task(chunk_size, loss, weights):
    learner, batch = make_learner(loss=loss, chunk_size=chunk_size, inner_steps=3), make_batch(weights=weights)
    value = learner(batch)
    value.backward()
    found = gradients(learner)
    learner.zero_grad()
    expected = task_by_task(learner, batch)
    expected.backward()
    torch.testing.assert_close(value, expected)
    for name, gradient in gradients(learner).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
        assert gradient.any(), name
    with torch.no_grad():
        torch.testing.assert_close(learner(batch), expected)


def test_first_order_leaves_second_derivatives_out():
    learner, batch = make_learner(mf.FOMAML, inner_steps=3), make_batch()
    learner(batch).backward()
    found = gradients(learner)
    learner.zero_grad()
    task_by_task(learner, batch, first_order=True).backward()
    second = make_learner(inner_steps=3)
    second(batch).backward()
    for name, gradient in gradients(learner).items():
        torch.testing.assert_close(found[name], gradient, msg=name)
    assert not torch.allclose(found["model.module.tower.0.weight"], gradients(second)["model.module.tower.0.weight"])


def test_meta_sgd_learns_a_rate_for_every_weight():
    learner, batch = make_learner(mf.MetaSGD, inner_steps=2), make_batch()
    learner(batch).backward()
    found = gradients(learner)
    learner.zero_grad()
    task_by_task(learner, batch, rates=learner.rates).backward()
    for name, gradient in gradients(learner).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
        assert gradient.any(), name


def test_reptile_moves_the_start_to_where_tasks_end_up():
    learner, batch = make_learner(mf.Reptile, inner_steps=2), make_batch()
    fast = learner.fast_parameters(batch)
    learner(batch).backward()
    for name, value in learner.model.module.named_parameters():
        if name in fast:
            torch.testing.assert_close(value.grad, (value - fast[name]).mean(0).detach(), msg=name)
        else:
            assert value.grad is None, name


@pytest.mark.parametrize("loss", ["bpr", "softmax"])
def test_losses_that_compare_items_equal_those_of_the_dot_product_model(loss):
    """A module that is a dot product, all of whose user side adapts, against the operator for it."""

    class Dot(nn.Module):
        num_items = NUM_ITEMS

        def __init__(self, model):
            super().__init__()
            self.table = nn.Parameter(model.item_embedding.weight.detach().clone())
            self.bias = nn.Parameter(model.item_bias.weight[:, 0].detach().clone())
            self.user = nn.Parameter(model.user_init.detach().clone())
            self.user_bias = nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, items):
            return self.bias[items] + self.user_bias + self.table[items] @ self.user

    torch.manual_seed(0)
    model = mf.DotRecommender(NUM_ITEMS, 3, loss=loss).double()
    nn.init.normal_(model.user_init)
    dot, module = mf.MAML(model), mf.MAML(mf.ModuleRecommender(Dot(model), loss=loss), adapt=["user", "user_bias"])
    batch = make_batch(negatives=2)
    losses = [learner(batch) for learner in (dot, module)]
    torch.testing.assert_close(*losses)
    for value in losses:
        value.backward()
    torch.testing.assert_close(dot.model.item_embedding.weight.grad, module.model.module.table.grad)
    torch.testing.assert_close(dot.model.user_init.grad, module.model.module.user.grad)
    torch.testing.assert_close(dot.predict(batch), module.predict(batch))
    torch.testing.assert_close(dot.score_catalogue(batch), module.score_catalogue(batch))


def make_log(num_users=60, clicks=False):
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(num_users), 8)
    items = np.concatenate([rng.choice(NUM_ITEMS, 8, replace=False) for _ in range(num_users)])
    taste, kind = rng.normal(size=num_users), rng.normal(size=NUM_ITEMS)
    ratings = 3 + taste[users] * kind[items] + 0.1 * rng.normal(size=len(users))
    return mf.Interactions.from_arrays(users, [f"i{item:02}" for item in items], ratings > 3 if clicks else ratings)


@pytest.mark.parametrize("algorithm", [mf.MAML, mf.FOMAML, mf.MetaSGD, mf.MAMLR, mf.Reptile])
def test_a_module_is_fitted_evaluated_served_and_saved_like_any_model(algorithm, tmp_path):
    log = make_log()
    split = mf.split_users(log, seed=0)
    torch.manual_seed(0)
    learner = algorithm(Tower(), adapt=["tower.*"])
    history = learner.fit(split.train, split.valid, support=(2, 5), epochs=20, patience=None, progress=False)
    assert history.epochs[-1].train_loss < history.epochs[1].train_loss
    assert history.best < history.epochs[0].valid
    report = mf.evaluate(learner, split.test, support=4, k=3, baselines=split.train)
    assert set(report.results) >= {learner.name, "bias"}

    user = learner.adapt(["i01", "i02"], [5.0, 1.0])
    assert user.predict(["i03", "nothing"]).shape == (2,)
    ids, scores = user.recommend(3)
    assert len(set(ids) | {"i01", "i02"}) == 5
    assert np.allclose(user.predict(ids), scores)
    assert len(user.recommend(NUM_ITEMS)[0]) == NUM_ITEMS - 2

    learner.save(tmp_path)
    loaded = mf.load(tmp_path, module=Tower())
    for batch in mf.TaskSampler(split.test, support=4, shuffle=False):
        torch.testing.assert_close(loaded.predict(batch), learner.predict(batch))
    with pytest.raises(ValueError, match="module: expected the nn.Module that this learner was saved with"):
        mf.load(tmp_path)


def test_a_module_gets_what_is_known_of_the_user():
    log = make_log()
    users = mf.Features.from_frame({"id": np.arange(60), "age": np.arange(60) + 0.5})
    torch.manual_seed(0)
    learner = mf.MAML(mf.ModuleRecommender(Tower(user_width=1), user_features=users), adapt=["tower.*"])
    learner.item_ids = log.item_ids
    sampler = mf.TaskSampler(log, support=4, batch_size=5, shuffle=False)
    batch = sampler.batch(0)
    one = learner.adapt([], [], user=3).predict(["i01"])
    assert np.allclose(one, learner.adapt([], [], {"age": 3.5}).predict(["i01"]))
    assert not np.allclose(one, learner.adapt([], []).predict(["i01"]))
    nobody = mf.TaskBatch(batch.support, batch.query)
    assert not torch.allclose(learner.predict(batch), learner.predict(nobody))
    given = learner.model.users(batch.user_ids, 5)
    found = learner.fast_parameters(batch)
    for chunk_size in (64, 2):
        learner.model.chunk_size = chunk_size
        for name, value in learner.fast_parameters(nobody, given).items():
            torch.testing.assert_close(value, found[name])


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_tower_is_a_tower_on_the_parts_of_user_and_item(activation):
    torch.manual_seed(0)
    log, users = make_log(), mf.Features.from_frame({"id": np.arange(60), "age": np.arange(60) + 0.5})
    items = mf.Features.from_frame({"id": [f"i{item:02}" for item in range(NUM_ITEMS)], "genre": list("abc" * 4)})
    model = mf.MLPRecommender(NUM_ITEMS, 2, (5, 3), activation, user_features=users, item_features=items)
    for weight in (model.user_init, model.user_weight, model.item_weight):
        nn.init.normal_(weight)
    learner = mf.MAML(model, inner_steps=0)
    assert learner.tasks.names == [name for name, _ in model.named_parameters() if name.startswith("tower")]
    learner.item_ids = log.item_ids
    batch = mf.TaskSampler(log, support=2, query=3, batch_size=4, shuffle=False).batch(0)
    scores = learner.predict(batch)
    act = torch.relu if activation == "relu" else nn.functional.gelu
    for place, (item, task) in enumerate(zip(batch.query.items.tolist(), batch.query.task_ids().tolist(), strict=True)):
        z = (items.matrix @ torch.eye(3))[item]
        x = (users.matrix @ torch.eye(1))[int(batch.users[task])]
        hidden = torch.cat(
            [model.user_init + x @ model.user_weight, model.item_embedding.weight[item] + z @ model.item_weight]
        )
        for layer in (model.tower[0], model.tower[2]):
            hidden = act(layer.weight @ hidden + layer.bias)
        expected = model.tower[4].weight[0] @ hidden + model.tower[4].bias[0]
        torch.testing.assert_close(scores[place], expected.detach())


FUSED = [
    (mf.MAML, "squared", {}),
    (mf.FOMAML, "squared", {"outer_loss": {"squared": 0.4, "absolute": 0.6}}),
    (mf.MAML, "logistic", {}),
    (mf.MAML, "bpr", {}),
    (mf.MAML, "softmax", {"outer_loss": "bpr"}),
    (mf.MAML, "squared", {"adapt": ["tower.4.*"]}),
    (mf.MAML, "squared", {"extra_count": 2.5}),
    (mf.MAML, "squared", {"adapt": ["tower.*.bias", "tower.0.*"]}),
    (mf.MetaSGD, "squared", {"rates": "tensor"}),
    (mf.MetaSGD, "logistic", {"rates": "step"}),
    (mf.MetaSGD, "squared", {"rates": "step", "adapt": ["tower.4.*"], "first_order": True}),
]


@pytest.mark.parametrize(("algorithm", "loss", "arguments"), FUSED)
def test_the_operators_of_a_tower_give_what_any_module_gets(algorithm, loss, arguments, monkeypatch):
    log = make_log(clicks=loss == "logistic")
    users = mf.Features.from_frame({"id": np.arange(60), "age": np.arange(60) + 0.5})
    items = mf.Features.from_frame({"id": [f"i{item:02}" for item in range(NUM_ITEMS)], "genre": list("abc" * 4)})
    found, negatives = [], 2 if loss in ("bpr", "softmax") else 0
    for fused in (True, False):
        torch.manual_seed(0)
        model = mf.MLPRecommender(NUM_ITEMS, 3, (5, 4), "gelu", loss, user_features=users, item_features=items).double()
        for weight in (model.user_init, model.user_weight, model.item_weight):
            nn.init.normal_(weight)
        learner = algorithm(model, inner_steps=3, **arguments)
        learner.initialize(log)
        model.item_average.copy_(torch.linspace(-1, 1, NUM_ITEMS))
        sampler = mf.TaskSampler(log, support=(1, 4), query=3, batch_size=7, negatives=negatives)
        batch = next(iter(sampler)).to("cpu", torch.float64)
        assert learner.tasks.is_fused(learner.inner_loop(batch.support))
        if not fused:
            monkeypatch.setattr(learner.tasks, "is_fused", lambda loop: False)
        batch = batch.with_weights(torch.arange(7).double())
        value = learner(batch)
        value.backward()
        with torch.no_grad():
            torch.testing.assert_close(learner(batch), value.detach())
        found.append((value.detach(), learner.predict(batch), gradients(learner)))
    (value, scores, slopes), (expected_value, expected_scores, expected) = found
    torch.testing.assert_close(value, expected_value, rtol=1e-9, atol=0)
    torch.testing.assert_close(scores, expected_scores, rtol=1e-9, atol=1e-12)
    for name, slope in slopes.items():
        torch.testing.assert_close(slope, expected[name], rtol=1e-9, atol=1e-12, msg=name)
        assert slope.any() or (negatives and "tower.4.bias" in name), name  # which differences do not see


@pytest.mark.parametrize("arguments", [{}, {"extra_count": 1.5}, {"adapt": ["tower.0.*", "tower.4.bias"]}])
@pytest.mark.parametrize("weights", [False, True])
def test_reptile_on_a_tower_goes_by_its_operators(weights, arguments, monkeypatch):
    torch.manual_seed(0)
    model = mf.MLPRecommender(NUM_ITEMS, 3, (5, 4), "gelu").double()
    nn.init.normal_(model.user_init)
    batch = make_batch(weights=weights)
    learner = mf.Reptile(model, inner_steps=3, **{"adapt": "user", **arguments})
    assert learner.tasks.is_fused(learner.inner_loop(batch.support))
    loss, found, moves = learner.tasks.reptile_gradients(batch)
    monkeypatch.setattr(learner.tasks, "is_fused", lambda loop: False)
    expected_loss, expected, expected_moves = learner.tasks.reptile_gradients(batch)
    torch.testing.assert_close(loss.detach(), expected_loss.detach(), rtol=1e-9, atol=0)
    assert [id(parameter) for parameter in found] == [id(parameter) for parameter in expected]
    for move, right in zip(moves, expected_moves, strict=True):
        torch.testing.assert_close(move.detach(), right.detach(), rtol=1e-9, atol=1e-12)
        assert move.any()


def test_what_the_operators_of_a_tower_do_not_know_goes_the_way_of_any_module():
    for learner in (
        mf.MetaSGD(mf.MLPRecommender(NUM_ITEMS, 3)),
        mf.MAMLR(mf.MLPRecommender(NUM_ITEMS, 3)),
        mf.MAML(mf.MLPRecommender(NUM_ITEMS, 3), adapt=["tower.*", "user_init"]),
    ):
        assert not learner.tasks.is_fused(learner.inner_loop(make_batch().support))


@pytest.mark.parametrize("rates", ["tensor", "step"])
def test_meta_sgd_may_learn_a_rate_for_every_tensor(rates):
    learner, batch = make_learner(mf.MetaSGD, inner_steps=2, rates=rates), make_batch()
    assert all(rate.shape == (() if rates == "tensor" else (2,)) for rate in learner.rates.values())
    learner(batch).backward()
    found = gradients(learner)
    learner.zero_grad()
    task_by_task(learner, batch, rates=learner.rates).backward()
    for name, gradient in gradients(learner).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
        assert gradient.any(), name


def test_rates_are_those_that_the_model_may_have():
    with pytest.raises(ValueError, match="^rates: expected one of weight of a DotRecommender, got 'tensor'"):
        mf.MetaSGD(mf.DotRecommender(NUM_ITEMS, 3), rates="tensor")
    with pytest.raises(ValueError, match="^rates: expected one of weight, tensor, step of a module, got 'layer'"):
        mf.MetaSGD(mf.MLPRecommender(NUM_ITEMS, 3), rates="layer")


def test_data_parallel_training_does_not_send_what_every_process_reads_for_itself():
    items = mf.Features.from_frame({"id": [f"i{item:02}" for item in range(NUM_ITEMS)], "genre": list("abc" * 4)})
    learner = mf.MAML(mf.MLPRecommender(NUM_ITEMS, 3, item_features=items))
    ignored = set(learner._ddp_params_and_buffers_to_ignore)
    assert ignored == {f"model.module.{name}" for name in ("item_average", "item_inputs")}
    assert ignored < {name for name, _ in learner.named_buffers()}


def test_a_tower_comes_back_from_the_disk_by_itself(tmp_path):
    log = make_log()
    items = mf.Features.from_frame({"id": [f"i{item:02}" for item in range(NUM_ITEMS)], "genre": list("abc" * 4)})
    learner = mf.MAML(mf.MLPRecommender(NUM_ITEMS, 2, (4,), "gelu", item_features=items))
    learner.fit(log, epochs=1, progress=False)
    learner.save(tmp_path)
    loaded = mf.load(tmp_path)
    assert loaded.model.hyperparameters == learner.model.hyperparameters
    assert np.allclose(loaded.adapt(["i01"], [5]).predict(["i02"]), learner.adapt(["i01"], [5]).predict(["i02"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim: must be ≥ 1, got 0"),
        ({"hidden": (4, 0)}, "hidden: must be ≥ 1, got 0"),
        ({"activation": "sine"}, "activation: expected one of relu, gelu, got 'sine'"),
        ({"loss": "hinge"}, "loss: expected one of squared, logistic, bpr, softmax, got 'hinge'"),
    ],
)
def test_arguments_of_a_tower_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        mf.MLPRecommender(**{"num_items": 3, "dim": 2, **arguments})


def test_what_a_module_cannot_do_is_refused_by_name():
    class Normalised(Tower):
        def __init__(self):
            super().__init__()
            self.tower = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    with pytest.raises(ValueError, match=r"model: tower.1 is a BatchNorm1d that keeps running statistics"):
        mf.MAML(Normalised(), adapt=["tower.*"])
    with pytest.raises(
        ValueError, match=r"adapt: expected names of .* got 'user'; they are items.weight, tower.0.weight"
    ):
        mf.MAML(Tower())
    with pytest.raises(ValueError, match="num_items: expected the size of the catalogue"):
        mf.MAML(nn.Linear(2, 1), adapt="all")
    with pytest.raises(TypeError, match=r"model: expected a DotRecommender or any nn.Module, got int"):
        mf.MAML(3, adapt="all")
    with pytest.raises(ValueError, match=r"inner_steps: a module needs a whole number ≥ 0, got 'exact'"):
        mf.MAML(Tower(), adapt="all", inner_steps="exact")

    class Branching(Tower):
        def forward(self, items):
            return super().forward(items) if float(items.sum()) > 0 else super().forward(items) * 0

    with pytest.raises(RuntimeError, match=r"Branching cannot run for many users at once \(torch.func.vmap\)"):
        mf.MAML(Branching(), adapt="all")(make_batch().to("cpu", torch.float32))

    class Wide(Tower):
        def forward(self, items):
            return self.tower(self.items(items))

    with pytest.raises(ValueError, match=r"module: expected scores of shape \[5\], got \[5, 1\]"):
        mf.MAML(Wide(), adapt="all")(make_batch().to("cpu", torch.float32))


def test_no_task_is_a_loss_of_zero():
    learner = make_learner()
    nothing = torch.empty(0, dtype=torch.int64)
    entries = mf.Entries(nothing, nothing.double(), torch.tensor([0]))
    loss = learner(mf.TaskBatch(entries, entries))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(not gradient.any() for gradient in gradients(learner).values())
