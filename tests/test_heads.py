"""Several heads that share the user: equal to autograd task by task, in every algorithm, and of use to each other."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from problems import Draw

import metarec_fast as mf
from metarec_fast.reference import SMOOTH_ABSOLUTE_WIDTH

NUM_ITEMS = 8
RATING, CLICK = mf.Head(), mf.Head("logistic", weight=0.4, outer_weight=0.7)
PAIRS = {
    "squared": {"rating": RATING, "other": mf.Head(weight=0.3)},
    "logistic": {"click": CLICK, "buy": mf.Head("logistic", weight=2.0)},
    "mixed": {"rating": RATING, "click": CLICK},
    "three": {"rating": RATING, "click": CLICK, "other": mf.Head(weight=0.2)},
}
ALGORITHMS = {
    "maml": (mf.MAML, {}),
    "fomaml": (mf.FOMAML, {}),
    "meta-sgd": (mf.MetaSGD, {}),
    "maml-r": (mf.MAMLR, {"inner_steps": 4}),
}


def make_learner(heads, algorithm=mf.MAML, **arguments):
    torch.manual_seed(0)
    model = mf.MultiTaskRecommender(NUM_ITEMS, 3, heads, sparse=arguments.pop("sparse", False))
    learner = algorithm(model, **arguments).double()
    for parameter in learner.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return learner


def make_batch(num_heads, sizes=((3, 2), (0, 2), (6, 1), (1, 4)), weights=True):
    draw = Draw()

    def entries(counts):
        n = sum(counts)
        items = draw.integers(0, num_heads * NUM_ITEMS, n)
        return mf.Entries(items, draw.uniform(n), torch.tensor([0, *np.cumsum(counts)]))

    support, query = (entries([size[part] for size in sizes]) for part in (0, 1))
    return mf.TaskBatch(support, query, weights=draw.uniform(4) if weights else None)


def loss_of(head, score, target):
    return (score - target) ** 2 if head.loss == "squared" else torch.log1p(score.exp()) - target * score


def score_of(model, item, user, bias):
    """p_hi = m_h + b_hi + c_h + u·(s_h ∘ e_i), and where choices move it c"""
    head, row = divmod(int(item), NUM_ITEMS)
    own = (user[:3] * model.head_scale[head] * model.item_embedding.weight[row]).sum() + user[3 + head]
    return model.head_offset[head] + model.item_bias.weight[item, 0] + bias + own


def by_heads(learner, items, targets, user, bias, weight_of, extra=0.0, trust=None, losses=None):
    """Σ_h α_h Σ_{s∈h} ℓ_s / (|S_h| + n0), and Σ_h α_h over heads with entries."""
    total, alphas = 0 * user.sum(), 0.0
    for number, head in enumerate(learner.model.heads.values()):
        own = [place for place, item in enumerate(items.tolist()) if item // NUM_ITEMS == number]
        if own and weight_of(head) > 0:
            errors = 0 * bias
            for place in own:
                score = score_of(learner.model, items[place], user, bias)
                error = loss_of(head, score, targets[place])
                if losses is not None and len(set(losses)) > 1:
                    small = torch.nn.functional.smooth_l1_loss(score, targets[place], beta=SMOOTH_ABSOLUTE_WIDTH)
                    error = 0.5 * error + 0.5 * small
                errors = errors + error * (1 if trust is None else trust[items[place]])
            total = total + weight_of(head) * errors / (len(own) + extra)
            alphas += weight_of(head)
    return total, alphas


def task_by_task(learner, batch):
    """The outer loss, by a loop over tasks and autograd through the steps of each."""
    losses, counts = [], []
    loop = learner.inner_loop(batch.support)
    at = lambda value, step: value[step] if isinstance(value, torch.Tensor) and value.dim() else value  # noqa: E731
    extra, momentum, scale = loop.get("extra_count", 0.0), loop.get("momentum", 0.0), loop.get("preconditioner")
    rates = 1.0 if scale is None else scale[:-1]
    trust = None if getattr(learner, "log_weight", None) is None else learner.log_weight.weight[:, 0].exp()
    for task in range(batch.num_tasks):
        part = slice(int(batch.support.offsets[task]), int(batch.support.offsets[task + 1]))
        items, targets = batch.support.items[part], batch.support.targets[part]
        user, bias = learner.start_of(mf.Entries(items, targets, torch.tensor([0, len(items)])))
        now = before = start = user.reshape(-1)
        bias = bias.reshape(())
        pull = loop.get("prior_pull", 0.0)
        pull = pull[task] if isinstance(pull, torch.Tensor) else pull
        for step in range(loop["inner_steps"]):
            inner, _ = by_heads(learner, items, targets, now, bias, lambda head: head.weight, extra, trust)
            slope = torch.autograd.grad(inner, now, create_graph=True)[0]
            slope = slope.detach() if loop["first_order"] else slope
            moved = now - at(loop["inner_lr"], step) * rates * (slope + pull * (now - start))
            now, before = moved + at(momentum, step) * (now - before), now
        part = slice(int(batch.query.offsets[task]), int(batch.query.offsets[task + 1]))
        outer, alphas = by_heads(
            learner, batch.query.items[part], batch.query.targets[part], now, bias,
            lambda head: head.query_weight, losses=learner.outer_loss,
        )  # fmt: skip
        if alphas:
            losses.append(outer / alphas)
            counts.append(1.0 if batch.weights is None else batch.weights[task])
    return sum(count * loss for count, loss in zip(counts, losses, strict=True)) / sum(counts)


@pytest.mark.parametrize("heads", PAIRS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_loss_and_gradients_are_those_of_autograd_task_by_task(algorithm, heads):
    cls, arguments = ALGORITHMS[algorithm]
    learner = make_learner(PAIRS[heads], cls, **arguments)
    batch = make_batch(len(PAIRS[heads]))
    expected = task_by_task(learner, batch)
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in learner.named_parameters()}
    learner.zero_grad()
    loss = learner(batch)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(learner(batch), expected.detach(), rtol=1e-9, atol=1e-12)
    loss.backward()
    for name, parameter in learner.named_parameters():
        assert gradients[name] is not None, name
        difference = (parameter.grad - gradients[name]).abs().max()
        assert difference <= 1e-9 * gradients[name].abs().max().clamp(min=1e-6), name


def test_sparse_embeddings_get_the_same_gradients():
    batch, gradients = make_batch(2), []
    for sparse in (False, True):
        learner = make_learner(PAIRS["mixed"], mf.MAMLR, sparse=sparse)
        learner(batch).backward()
        gradients.append({name: parameter.grad.to_dense() for name, parameter in learner.named_parameters()})
        layout = torch.sparse_coo if sparse else torch.strided
        assert learner.model.item_embedding.weight.grad.layout == layout
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", ["squared", "logistic"])
def test_a_head_of_weight_0_changes_nothing(loss):
    nothing = mf.Head(loss, weight=0.0)
    learner = make_learner({"rating": RATING, "other": nothing})
    batch = make_batch(2)
    alone = make_learner({"rating": RATING, "other": mf.Head(weight=1.0)})
    alone.load_state_dict(learner.state_dict())

    def of_rating(entries):
        kept = entries.items < NUM_ITEMS
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), kept.cumsum(0)])[entries.offsets]
        return mf.Entries(entries.items[kept], entries.targets[kept], offsets)

    only = mf.TaskBatch(of_rating(batch.support), of_rating(batch.query), weights=batch.weights)
    losses = [learner(batch), alone(only)]
    torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-12)
    for each in losses:
        each.backward()
    for (name, one), other in zip(learner.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-12, msg=name)
    predictions = learner.predict(batch), alone.predict(mf.TaskBatch(of_rating(batch.support), batch.query))
    torch.testing.assert_close(*predictions, rtol=1e-9, atol=1e-12)
    assert len(predictions[0]) == len(batch.query)


def test_an_outer_weight_of_0_judges_by_the_other_head_alone():
    heads = {"rating": RATING, "click": mf.Head("logistic", weight=1.0, outer_weight=0.0)}
    learner, batch = make_learner(heads), make_batch(2, weights=False)
    scores = learner.predict(batch)
    rating = batch.query.items < NUM_ITEMS
    errors = (scores - batch.query.targets).square()
    tasks = batch.query.task_ids()
    means = [errors[rating & (tasks == task)].mean() for task in range(4) if (rating & (tasks == task)).any()]
    torch.testing.assert_close(learner(batch).detach(), torch.stack(means).mean())


def world(seed, num_users=300, num_items=30, num_clicks=14, num_ratings=8):
    """Ratings, and clicks that come from the same user vectors."""
    rng = np.random.default_rng(seed)
    users, items = rng.normal(size=(num_users, 2)), rng.normal(size=(num_items, 2))
    truth = users @ items.T
    columns = {"rating": ([], [], []), "click": ([], [], [])}
    for user in range(num_users):
        for name, count in (("rating", num_ratings), ("click", num_clicks)):
            chosen = rng.choice(num_items, count, replace=False)
            score = truth[user, chosen]
            targets = 3 + score + 0.3 * rng.normal(size=count)
            if name == "click":
                targets = rng.random(count) < 1 / (1 + np.exp(-3 * score))
            for column, values in zip(columns[name], ([user] * count, chosen, targets), strict=True):
                column.extend(values)
    return mf.join_heads({name: mf.Interactions.from_arrays(*values) for name, values in columns.items()})


@pytest.fixture(scope="module")
def trained():
    log = world(0)
    split = mf.split_users(log, valid=0.1, test=0.3)
    torch.manual_seed(0)
    model = mf.MultiTaskRecommender(log.num_items // 2, 4, {"rating": RATING, "click": mf.Head("logistic")})
    learner = mf.MetaSGD(model, inner_lr=0.2, inner_steps=5)
    history = learner.fit(split.train, split.valid, epochs=60, patience=None, outer_lr=0.03, progress=False)
    assert history.metric == "outer_loss"
    return learner, split


def test_clicks_alone_tell_what_somebody_rates(trained):
    learner, split = trained
    by_clicks = mf.evaluate_heads(learner, split.test, 12, adapt_on=["click"])["rating"]
    by_all = mf.evaluate_heads(learner, split.test, 12)["rating"]
    by_ratings = mf.evaluate_heads(learner, split.test, 12, adapt_on=["rating"])["rating"]
    test = split.test
    ratings = test.ratings[test.items < test.num_items // 2]
    average = np.std(ratings)  # of somebody of whom nothing is known
    errors = [report.results["meta-sgd"]["rmse"] for report in (by_all, by_clicks, by_ratings)]
    assert errors[1] < 0.9 * average
    assert errors[0] < errors[1]
    assert errors[0] < errors[2]


def test_heads_are_judged_apart_and_clicks_rank_better_than_by_chance(trained):
    learner, split = trained
    reports = mf.evaluate_heads(learner, split.test, 12, k=3)
    assert list(reports) == ["rating", "click"]
    assert "rmse" in reports["rating"].results["meta-sgd"]
    assert "rmse" not in reports["click"].results["meta-sgd"]
    assert reports["click"].results["meta-sgd"]["ndcg@3"] > reports["click"].chance["ndcg@3"] + 0.05


def test_supports_can_be_drawn_head_by_head(trained):
    learner, split = trained
    known, seen = {"rating": 3, "click": "rest"}, []
    predict = learner.predict
    try:
        learner.predict = lambda batch: (seen.append(batch), predict(batch))[1]
        reports = mf.evaluate_heads(learner, split.test, known)
    finally:
        del learner.predict
    assert list(reports) == ["rating"]  # of clicks nothing is left to predict
    for batch in seen:
        counts = torch.stack([batch.support.items < 30, batch.support.items >= 30]).long()
        for begin, end in pairwise(batch.support.offsets.tolist()):
            assert counts[:, begin:end].sum(1).tolist() == [3, 14]
        assert (batch.query.sizes() == 5).all()
        assert (batch.query.items < 30).all()


def test_a_new_user_of_both_heads_is_served_and_saved(trained, tmp_path):
    learner, _ = trained
    learner.save(tmp_path)
    again = mf.load(tmp_path)
    assert again.model.heads == learner.model.heads
    assert again.item_ids.tolist() == learner.item_ids.tolist()
    items, values = [("rating", 3), ("click", 5), ("click", 7)], [5.0, 1.0, 0.0]
    user, same = learner.adapt(items, values), again.adapt(items, values)
    for head in ("rating", "click"):
        best, scores = user.recommend(5, head=head)
        assert not {3, 5, 7} & set(best.tolist())
        np.testing.assert_array_equal(user.predict(best, head), user.predict([(head, item) for item in best.tolist()]))
        np.testing.assert_allclose(user.predict(best, head), scores, rtol=1e-5)
        np.testing.assert_array_equal(same.recommend(5, head=head)[1], scores)
        everything = user.predict(np.arange(30), head)
        assert user.recommend(1, exclude_seen=False, head=head)[1] == everything.max()
        np.testing.assert_allclose(user.predict([999], head), everything.mean(), rtol=1e-5)
    assert len(user.recommend(30, head="click")[0]) == 27
    batch = mf.TaskBatch(mf.Entries(torch.tensor([3, 35]), torch.tensor([5.0, 1.0]), torch.tensor([0, 2])))
    np.testing.assert_allclose(
        learner.score_catalogue(batch)[0, 30:], learner.adapt(items[:2], values[:2]).predict(np.arange(30), "click"),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip


def test_each_head_starts_at_its_own_averages():
    log = world(1)
    model = mf.MultiTaskRecommender(30, 2, {"rating": RATING, "click": mf.Head("logistic")})
    model.initialize(log)
    clicks = log.ratings[log.items >= 30]
    assert model.head_offset[0].item() == pytest.approx(log.ratings[log.items < 30].mean(), rel=1e-5)
    assert model.head_offset[1].sigmoid().item() == pytest.approx(clicks.mean(), rel=1e-5)
    assert model.item_bias.weight[30:].std() > 0.1


def test_user_features_move_where_users_start_under_all_heads():
    with torch.device("cpu"):
        users = mf.Features.from_frame({"id": [0, 1, 2], "kind": ["a", "b", "a"]})
    model = mf.MultiTaskRecommender(NUM_ITEMS, 3, PAIRS["mixed"], user_features=users)
    learner = mf.MAML(model)
    torch.nn.init.normal_(model.user_encoder.weight)
    nothing = torch.empty(0, dtype=torch.int64)
    support = mf.Entries(nothing, nothing.float(), torch.zeros(3, dtype=torch.int64))
    scores = learner.score_catalogue(mf.TaskBatch(support, user_ids=[0, 1]))
    assert (scores[0, :NUM_ITEMS] - scores[1, :NUM_ITEMS]).abs().min() > 0
    assert (scores[0, NUM_ITEMS:] - scores[1, NUM_ITEMS:]).abs().min() > 0


def test_joined_logs_have_all_users_and_all_pairs_in_order_of_time():
    ratings = mf.Interactions.from_arrays(["u", "u", "v"], [5, 7, 5], [1.0, 2.0, 3.0], [10, 30, 10])
    clicks = mf.Interactions.from_arrays(["w", "u"], ["x", 7], [1.0, 0.0], [5, 20])
    log = mf.join_heads({"rating": ratings, "click": clicks})
    assert log.user_ids.tolist() == ["u", "v", "w"]
    items = [5, 7, "x"]
    assert log.item_ids.tolist() == [(head, item) for head in ("rating", "click") for item in items]
    assert log.item_ids[log.items[log.rows(0)]].tolist() == [("rating", 5), ("click", 7), ("rating", 7)]
    assert log.ratings.tolist() == [1.0, 0.0, 2.0, 3.0, 1.0]
    learner = mf.MAML(mf.MultiTaskRecommender(3, 2, {"rating": RATING, "click": mf.Head("logistic")}))
    learner.fit(log, epochs=0, progress=False)
    best, _ = learner.adapt([("click", "x")], [1.0]).recommend(2, head="click")
    assert sorted(best.tolist()) == [5, 7]  # ids of several kinds stay what they are

    without = mf.join_heads({"rating": ratings, "click": mf.Interactions.from_arrays(["u"], [7])})
    assert without.times is None


def test_frozen_parts_and_rates_hold_with_heads_too():
    log = world(2, num_users=40)
    for sparse in (False, True):
        model = mf.MultiTaskRecommender(30, 2, {"rating": RATING, "click": mf.Head("logistic")}, sparse=sparse)
        learner = mf.MAMLR(model)
        learner.freeze("item_embedding.*")
        held = [parameter for group in learner.parameter_groups() for parameter in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in learner.parameters() if p.requires_grad}
        before = {name: value.clone() for name, value in learner.state_dict().items()}
        learner.fit(log, epochs=1, progress=False)
        for name in ("model.item_embedding.weight", "model.offset"):
            assert torch.equal(before[name], learner.state_dict()[name])
        assert not torch.equal(before["model.head_scale"], model.head_scale)


def test_reptile_adapts_users_of_heads_with_one_loss():
    log = mf.join_heads({name: mf.Interactions.from_arrays([0, 0, 1, 1], [0, 1, 0, 1], [1, 2, 3, 4]) for name in "ab"})
    learner = mf.Reptile(mf.MultiTaskRecommender(2, 2, {"a": RATING, "b": RATING}), adapt="user")
    learner.initialize(log)
    batch = next(iter(mf.TaskSampler(log, 4, None)))
    learner(batch).backward()
    fast = learner.fast_weights(batch)
    torch.testing.assert_close(learner.model.user_init.grad, learner.model.user_init - fast.user.mean(0))


def test_what_does_not_fit_is_refused_by_name():
    heads = PAIRS["mixed"]
    for arguments, message in (
        ({"loss": "bpr"}, "loss: expected one of squared, logistic, got 'bpr'"),
        ({"weight": -1.0}, "weight: must be finite and ≥ 0, got -1"),
        ({"outer_weight": float("nan")}, "outer_weight: must be finite and ≥ 0, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            mf.Head(**arguments)
    with pytest.raises(ValueError, match="heads: expected at least one Head by name, got {}"):
        mf.MultiTaskRecommender(3, 2, {})
    with pytest.raises(TypeError, match="heads: expected Heads by name, got 'a': 'squared'"):
        mf.MultiTaskRecommender(3, 2, {"a": "squared"})
    model = mf.MultiTaskRecommender(30, 2, heads)
    for cls, arguments, message in (
        (mf.MAML, {"adapt": "all"}, "adapt: heads share their items, so that only \"user\" adapts, got 'all'"),
        (mf.MAML, {"outer_loss": "squared"}, "outer_loss: heads of different losses are judged by their own, got"),
        (mf.MAMLR, {"inner_steps": "exact"}, "inner_steps: expected a number of steps for a model with heads"),
    ):
        with pytest.raises(ValueError, match=message):
            cls(model, **arguments)
    learner, log = mf.MAML(model), world(0, num_users=20)
    with pytest.raises(ValueError, match=r"log: expected 2 · 30 items, a log of join_heads, got 2"):
        learner.fit(mf.Interactions.from_arrays([0, 0], [0, 1]))
    with pytest.raises(ValueError, match=r"item_ids: expected pairs \(head, item\), as of a log of join_heads, got 0"):
        learner.item_ids = np.arange(60)
    other = mf.join_heads({name: log.align_items([("rating", n) for n in range(30)])[0] for name in ("a", "b")})
    with pytest.raises(ValueError, match="item_ids: expected pairs .* of the heads 'rating', 'click' in this order"):
        learner.item_ids = other.item_ids
    learner.fit(log, epochs=0, progress=False)
    user = learner.adapt([("rating", 1)], [4.0])
    for call in (lambda: user.recommend(3, head="like"), lambda: user.predict([1], "like")):
        with pytest.raises(ValueError, match="head: expected one of 'rating', 'click', got 'like'"):
            call()
    with pytest.raises(ValueError, match=r"k: must be in \[1, 30\], got 31"):
        user.recommend(31)
    with pytest.raises(ValueError, match=r"ratings: the logistic loss needs .* got 4.0 at position 1"):
        learner.adapt([("rating", 1), ("click", 2)], [5.0, 4.0])
    with pytest.raises(TypeError, match="model: parts are not moved between models with several heads"):
        learner.transfer(log)
    with pytest.raises(TypeError, match="learner: expected one whose model has heads, got a DotRecommender"):
        mf.evaluate_heads(mf.MAML(mf.DotRecommender(3, 2)), log)
    with pytest.raises(ValueError, match="logs: expected at least one, by the name of its head, got none"):
        mf.join_heads({})
    with pytest.raises(TypeError, match=r"logs\['a'\]: expected Interactions, got int"):
        mf.join_heads({"a": 3})
    mixed = mf.Reptile(model, adapt="user")
    with pytest.raises(ValueError, match="model: Reptile needs heads of one loss, got different ones"):
        mixed(next(iter(mf.TaskSampler(log, 4, None))))
