"""Learners that know features: their gradients, where they start from, items and users that are new, the disk."""

import copy
import dataclasses
import datetime
import pickle
import shutil
import warnings

import numpy as np
import pytest
import torch

import metarec_fast as mf
from metarec_fast import functional, warm_start
from metarec_fast.dot_tasks import mean_task_loss
from metarec_fast.evaluation import evaluate

ALGORITHMS = [mf.MAML, mf.FOMAML, mf.MetaSGD, mf.MAMLR, mf.Reptile]
NUM_ITEMS = 40


def make_world(seed=0, num_users=300, num_rated=20):
    """A log whose users and items are what their features say, and a little more."""
    rng = np.random.default_rng(seed)
    gender, genres = rng.integers(0, 2, num_users), rng.integers(0, 2, (NUM_ITEMS, 3))
    taste = np.array([[0.8, -0.8, 0], [-0.8, 0.8, 0]])[gender] + 0.2 * rng.normal(size=(num_users, 3))
    scores = 3 + 0.5 * genres[:, 2] + 0.2 * rng.normal(size=NUM_ITEMS) + taste @ (genres - 0.5).T
    rows = [(user, item) for user in range(num_users) for item in rng.choice(NUM_ITEMS, num_rated, replace=False)]
    users, items = np.array(rows).T
    ratings = scores[users, items] + 0.3 * rng.normal(size=len(users))
    log = mf.Interactions.from_arrays(users + 1000, [f"i{item:02}" for item in items], ratings)
    user_table = {"id": np.arange(num_users) + 1000, "gender": np.array(["f", "m"])[gender]}
    bags = [[name for name, flag in zip("abc", row, strict=True) if flag] for row in genres]
    item_table = {"id": [f"i{item:02}" for item in range(NUM_ITEMS)], "genres": bags}
    return log, mf.Features.from_frame(user_table), mf.Features.from_frame(item_table), scores


def make_learner(algorithm, users, items, log, **arguments):
    torch.manual_seed(0)
    model = mf.DotRecommender(log.num_items, 3, user_features=users, item_features=items, **arguments).double()
    learner = algorithm(model)
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    learner.item_ids = log.item_ids
    return learner


def a_batch(log, **arguments):
    return next(iter(mf.TaskSampler(log, support=(3, 8), query=5, batch_size=6, **arguments)))


@pytest.mark.parametrize("algorithm", ALGORITHMS[:-1])
@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_are_those_of_autograd_through_vectors_made_of_features(algorithm, sparse):
    log, users, items, _ = make_world()
    learner = make_learner(algorithm, users, items, log, sparse=sparse)
    batch = a_batch(log).to("cpu", torch.float64)
    learner(batch).backward()

    model = learner.model
    weights = {name: encoder.weight.grad.clone() for name, encoder in encoders(model).items()}
    table = model.item_embedding.weight.grad
    table = table.to_dense() if sparse else table.clone()
    learner.zero_grad(set_to_none=True)

    x = users.matrix.select(users.find(batch.user_ids)) @ torch.eye(users.width, dtype=torch.float64)
    z = items.matrix.select(items.find(log.item_ids)) @ torch.eye(items.width, dtype=torch.float64)
    vectors = torch.cat([model.item_embedding.weight, model.item_bias.weight], 1) + z @ model.item_encoder.weight
    moved = x @ model.user_encoder.weight
    support = learner.weigh(batch.support, batch.support.items)
    user, bias = mf.MAML.start_of(learner, support)
    if algorithm is mf.MAMLR:
        user, bias = learner.start_of(support)
    scores = functional.adapt_and_score(
        user + moved[:, :-1], vectors[:, :-1], vectors[:, -1], batch.with_entries(support, batch.query),
        user_bias_init=bias + moved[:, -1], offset=model.offset, **learner.inner_loop(support),
    )  # fmt: skip
    mean_task_loss(learner.outer_loss, scores, batch.query, None).backward()
    for name, encoder in encoders(model).items():
        torch.testing.assert_close(weights[name], encoder.weight.grad, msg=name)
        assert weights[name].any()
    gradient = model.item_embedding.weight.grad
    torch.testing.assert_close(table, gradient.to_dense() if sparse else gradient)


def encoders(model):
    return {"users": model.user_encoder, "items": model.item_encoder}


@pytest.mark.parametrize(("adapt", "loss"), [("user", "squared"), ("all", "squared"), ("user", "bpr")])
def test_what_is_served_is_what_tables_with_features_in_them_would_give(adapt, loss):
    log, _, items, _ = make_world(num_users=60)
    learner = make_learner(lambda model: mf.MAML(model, adapt=adapt), None, items, log, loss=loss)
    plain = make_learner(lambda model: mf.MAML(model, adapt=adapt), None, None, log, loss=loss)
    weights = learner.state_dict()
    del weights["model.item_encoder.weight"]
    plain.load_state_dict(weights)
    with torch.no_grad():
        table, bias = learner.model.tables()
        plain.model.item_embedding.weight.copy_(table)
        plain.model.item_bias.weight.copy_(bias[:, None])
    batch = a_batch(log, negatives=2 if loss == "bpr" else 0).to("cpu", torch.float64)
    for call in (lambda learner: learner.predict(batch), lambda learner: learner.score_catalogue(batch)):
        torch.testing.assert_close(call(learner), call(plain))
    users = []
    for each in (learner, plain):
        torch.manual_seed(0)  # of the negatives
        users.append(each.adapt(["i03", "i07", "i03"], [5, 1, 4]))
    np.testing.assert_allclose(*(user.predict(["i07", "i09", "i03"]) for user in users))
    for exclude in (False, True):
        (ids, scores), (expected_ids, expected) = (user.recommend(40, exclude_seen=exclude) for user in users)
        assert ids.tolist() == expected_ids.tolist()
        np.testing.assert_allclose(scores, expected)


def test_reptile_moves_features_too():
    log, users, items, _ = make_world()
    learner = make_learner(mf.Reptile, users, items, log)
    batch = a_batch(log).to("cpu", torch.float64)
    learner(batch).backward()
    model = learner.model
    x = users.matrix.select(users.find(batch.user_ids)) @ torch.eye(users.width, dtype=torch.float64)
    z = items.matrix.select(items.find(log.item_ids)) @ torch.eye(items.width, dtype=torch.float64)
    table, item_bias = model.tables()
    user, bias = model.start(users.matrix.select(users.find(batch.user_ids)))
    moves = functional.reptile_step(
        user, table, item_bias, batch.support, user_bias_init=bias, offset=model.offset, inner_lr=learner.inner_lr,
        inner_steps=learner.inner_steps,
    ).grads  # fmt: skip
    torch.testing.assert_close(
        model.user_encoder.weight.grad, x.T @ torch.cat([moves["user_init"], moves["user_bias_init"][:, None]], 1)
    )
    # A row moves by its mean over the tasks that hold it, and W by the mean over the rows that move: by their sum, an
    # item would move as often as others have its values.
    rows = functional.sum_rows(moves["item_table"], NUM_ITEMS)
    torch.testing.assert_close(model.item_embedding.weight.grad, rows)
    count = len(batch.support.items.unique())
    torch.testing.assert_close(model.item_encoder.weight.grad[:, :-1], z.T @ rows / count)


def test_reptile_does_not_diverge_where_many_items_are_alike():
    rng = np.random.default_rng(0)
    users, items = (
        np.repeat(np.arange(60), 100),
        np.concatenate([rng.choice(2000, 100, replace=False) for _ in range(60)]),
    )
    log = mf.Interactions.from_arrays(users, items, rng.integers(1, 6, len(items)) + 0.0)
    alike = mf.Features.from_frame({"id": range(2000), "letter": ["a", "b"] * 1000, "size": rng.normal(size=2000)})
    split = mf.split_users(log, seed=0)
    learner = mf.Reptile(mf.DotRecommender(log.num_items, 3, item_features=alike))
    history = learner.fit(split.train, split.valid, epochs=10, patience=None, progress=False)
    assert history.epochs[-1].valid < 1.1 * history.epochs[0].valid


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_learners_with_features_train_and_come_back_from_the_disk(algorithm, tmp_path):
    log, users, items, _ = make_world(num_users=60)
    split = mf.split_users(log, seed=0)
    learner = algorithm(mf.DotRecommender(log.num_items, 3, user_features=users, item_features=items))
    learner.fit(split.train, split.valid, epochs=2, progress=False)
    learner.save(tmp_path)
    loaded = mf.load(tmp_path)
    for batch in mf.TaskSampler(split.test, support=5, shuffle=False):
        assert torch.equal(loaded.predict(batch), learner.predict(batch))
    again = loaded.adapt(["i03", "i07"], [5, 1], {"gender": "f"})
    assert np.array_equal(
        again.predict(["i01"]), learner.adapt(["i03", "i07"], [5, 1], {"gender": "f"}).predict(["i01"])
    )
    (tmp_path / "features.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="features.safetensors"):
        mf.load(tmp_path)


def test_files_of_another_learner_are_refused(tmp_path):
    log, users, items, _ = make_world(num_users=60)
    others = mf.Features.from_frame({"id": users.ids, "gender": ["f", "m"] * 30})
    folders = [tmp_path / "one", tmp_path / "other", tmp_path / "none"]
    for folder, table in zip(folders, (users, others, None), strict=True):
        make_learner(mf.MAML, table, items, log).save(folder)
    for folder, message in (
        ("other", "the user features of this learner: expected 60 rows"),
        ("none", "'user.values'"),
    ):
        shutil.copy(tmp_path / folder / "features.safetensors", folders[0])
        with pytest.raises(ValueError, match=f"one/features.safetensors: does not hold .*{message}"):
            mf.load(folders[0])


def test_training_goes_on_only_with_the_same_features(tmp_path):
    log, users, items, _ = make_world(num_users=60)
    split = mf.split_users(log, seed=0)

    def train(users, items, **arguments):
        torch.manual_seed(0)
        learner = mf.MAML(mf.DotRecommender(log.num_items, 3, user_features=users, item_features=items))
        history = learner.fit(split.train, split.valid, epochs=2, patience=None, progress=False, **arguments)
        return history.epochs[-1].train_loss

    expected = train(users, items, checkpoint=tmp_path)
    assert train(users, items, checkpoint=tmp_path, resume=True) == expected
    others = mf.Features.from_frame({"id": users.ids, "gender": ["f", "m"] * 30})
    for name, tables in {"user_features": [others, items], "item_features": [users, None]}.items():
        with pytest.raises(ValueError, match=f"{name}: the checkpoint .* was made with '[46]0 rows of [23] numbers"):
            train(*tables, checkpoint=tmp_path, resume=True)


def test_every_value_of_a_column_comes_back_from_the_disk(tmp_path):
    log, users, _, _ = make_world(num_users=60)
    frame = {"id": users.ids, "on": [True, None] * 30, "size": [1.0, 2.0, None] * 20, "tags": [["ä", 3], [2.5]] * 30}
    frame["day"] = np.array(["2000-01-01", "NaT", "2001-01-01"] * 20, "datetime64[ns]")
    learner = make_learner(mf.MAML, mf.Features.from_frame(frame), None, log)
    learner.save(tmp_path)
    for value in ({"on": False}, {"size": 2}, {"tags": [3, "ä"]}, {"day": datetime.date(2000, 5, 1)}):
        expected = learner.adapt([], [], value).vector
        assert torch.equal(mf.load(tmp_path).adapt([], [], value).vector, expected)
        assert not torch.equal(expected, learner.adapt([], []).vector)


def test_the_warm_start_learns_what_features_say():
    log, users, items, _ = make_world()
    split = mf.split_users(log, seed=0)
    errors = {}
    for name, given in (("none", {}), ("both", {"user_features": users, "item_features": items})):
        learner = mf.MAMLR(mf.DotRecommender(log.num_items, 3, **given))
        learner.initialize(split.train)
        errors[name] = {
            known: evaluate(learner, split.test, support=known, catalogue=False).results["maml-r"]["rmse"]
            for known in (0, 2)
        }
    assert errors["both"][0] < 0.75 * errors["none"][0]  # taste is in the gender
    assert errors["both"][2] < errors["none"][2]


def test_features_that_say_nothing_are_found_out():
    log, users, _, _ = make_world()
    rng = np.random.default_rng(1)
    noise = mf.Features.from_frame(
        {"id": users.ids, "sign": rng.integers(0, 12, len(users)), "z": rng.normal(size=len(users))}
    )
    factors = warm_start.variational(log, dim=3, user_features=users.join(noise))
    said = factors.user_weights.square().sum(1).sqrt()
    assert said[:2].min() > 10 * said[2:].max()


def test_the_start_is_the_factor_model_with_its_features():
    log, users, items, _ = make_world()
    factors = warm_start.variational(log, dim=3, user_features=users, item_features=items)
    learner = mf.MAMLR(
        mf.DotRecommender(log.num_items, 3, user_features=users, item_features=items), inner_steps="exact"
    )
    learner.start_from(factors, log)
    batch = a_batch(log)
    known = users.matrix.select(users.find(batch.user_ids))
    user, bias = factors.fold_in(batch, known)
    scores = (user[batch.query.task_ids()] * factors.item_table[batch.query.items]).sum(1)
    expected = factors.offset + factors.item_bias[batch.query.items] + bias[batch.query.task_ids()] + scores
    # Pulls differ: the learner's grows with the support, by 0.008 of it for each rating.
    torch.testing.assert_close(learner.predict(batch), expected, rtol=0, atol=0.02)


def test_a_factor_model_of_other_features_is_refused():
    log, users, items, _ = make_world(num_users=60)
    learner = mf.MAMLR(mf.DotRecommender(log.num_items, 3, user_features=users, item_features=items))
    for given, name in (({"user_features": items}, "user"), ({"item_features": users}, "item")):
        factors = warm_start.variational(log, dim=3, sweeps=1, **given)
        with pytest.raises(
            ValueError, match=rf"factors.{name}_weights: expected shape \[F, D \+ 1\] = \([23], 4\), as"
        ):
            learner.start_from(factors, log)
    learner.start_from(warm_start.variational(log, dim=3, sweeps=1), log)  # without any they start at 0
    assert not learner.model.user_encoder.weight.any()


def test_an_item_that_nobody_rated_gets_what_its_features_say():
    log, _, items, scores = make_world()
    hidden = ["i00", "i01", "i02", "i03", "i04", "i05"]
    keep = np.flatnonzero(~np.isin(log.item_ids[log.items], hidden))
    user_ids = np.repeat(log.user_ids, log.sizes())[keep]
    known = mf.Interactions.from_arrays(user_ids, log.item_ids[log.items][keep], log.ratings[keep])
    with_items, _ = known.align_items(log.item_ids)  # in the catalogue, unrated
    for train, what in ((known, "outside the catalogue"), (with_items, "in the catalogue")):
        learner = mf.MAMLR(mf.DotRecommender(train.num_items, 3, item_features=items))
        learner.initialize(train)
        rows = known.rows(0)
        user = learner.adapt(known.item_ids[known.items[rows]], known.ratings[rows])
        predicted = user.predict(hidden)
        assert np.corrcoef(predicted, scores[0, :6])[0, 1] > 0.8, what
        assert np.ptp(predicted) > 0.3, what


def test_a_new_user_may_bring_features_or_an_id():
    log, users, items, _ = make_world()
    learner = make_learner(mf.MAML, users, items, log)
    model = learner.model
    nobody = learner.adapt([], [])
    her = learner.adapt([], [], {"gender": "f"})
    moved = model.user_encoder(users.encode({"gender": "f"}))
    torch.testing.assert_close(her.vector - nobody.vector, moved[0, :-1].detach())
    torch.testing.assert_close(her.bias - nobody.bias, moved[0, -1].detach())
    first = learner.adapt([], [], user=1000)
    found = model.user_encoder(users.matrix.select(users.find([1000])))
    torch.testing.assert_close(first.vector - nobody.vector, found[0, :-1].detach())
    assert torch.equal(learner.adapt([], [], user=5).vector, nobody.vector)
    with pytest.raises(ValueError, match="features and user: expected one of them, got both"):
        learner.adapt([], [], {"gender": "f"}, user=1000)
    with pytest.raises(ValueError, match="features: the learner's model has no user features"):
        make_learner(mf.MAML, None, None, log).adapt([], [], {"gender": "f"})


def test_newcomers_can_be_added_to_the_table_of_users():
    log, users, items, _ = make_world()
    learner = make_learner(mf.MAML, users, items, log)
    encoder = learner.model.user_encoder
    encoder.features = encoder.features.extended({"id": [5], "gender": ["m"]})
    assert torch.equal(learner.adapt([], [], user=5).vector, learner.adapt([], [], {"gender": "m"}).vector)
    with pytest.raises(ValueError, match="features: expected 2 numbers a row, got 3"):
        encoder.features = items


def test_a_table_of_items_can_be_extended_too_and_must_mean_the_same():
    log, users, _, _ = make_world(num_users=60)
    letters = ["a", "b"] * 20
    ids = [f"i{item:02}" for item in range(NUM_ITEMS)]
    half = mf.Features.from_frame({"id": ids[:20], "letter": letters[:20]})
    learner = make_learner(mf.MAML, users, half, log)
    learner.model.item_encoder.features = half.extended({"id": ids[20:], "letter": letters[20:]})
    whole = make_learner(mf.MAML, users, mf.Features.from_frame({"id": ids, "letter": letters}), log)
    assert torch.equal(learner.predict(a_batch(log)), whole.predict(a_batch(log)))
    assert torch.equal(learner.score_catalogue(a_batch(log)), whole.score_catalogue(a_batch(log)))
    for other in ({"size": letters}, {"letter": ["a", "b", "b", "b"] * 10}):  # other columns, other means
        with pytest.raises(ValueError, match="features: expected the columns, values and scales of the present table"):
            learner.model.item_encoder.features = mf.Features.from_frame({"id": ids, **other})


def test_tables_are_made_anew_when_anything_in_them_has_changed():
    log, users, items, _ = make_world(num_users=60)
    learner = make_learner(mf.MAML, users, items, log)
    model = learner.model

    @torch.no_grad()
    def changed():
        """Whether the tables are other ones than last time; they are right in any case."""
        more = model.of_features()
        expected = model.item_embedding.weight + more[:, :-1], model.item_bias.weight[:, 0] + more[:, -1]
        now, before[0] = model.tables(), before[0]
        assert all(map(torch.equal, now, expected))
        was, before[0] = before[0], now
        return was is None or was[0] is not now[0]

    before = [None]
    assert changed()
    assert not changed()
    optimizer = torch.optim.Adam(learner.parameters(), fused=True)  # which counts no versions
    learner(a_batch(log)).backward()
    optimizer.step()
    assert changed()
    assert not changed()
    for parameter in (model.item_encoder.weight, model.item_embedding.weight, model.item_bias.weight):
        parameter.data[0, 0] += 1
        assert changed()
    learner.item_ids = log.item_ids[::-1]
    assert changed()
    model.item_encoder.features = items.extended({"id": ["i00"], "genres": [["b"]]})
    assert changed()
    before[0][0].add_(1)  # not what one should do
    assert changed()
    learner.float()
    assert changed()
    assert model.tables()[0].requires_grad
    with torch.inference_mode():
        model.item_encoder.weight.data[0, 0] += 1
        model.tables()
    assert changed()
    assert torch.equal(copy.deepcopy(learner).score_catalogue(a_batch(log)), learner.score_catalogue(a_batch(log)))
    assert len(pickle.dumps(model._kept_tables)) < 100


def test_only_the_items_of_a_batch_get_their_features_added():
    log, users, items, _ = make_world(num_users=60)
    learner = make_learner(mf.MAML, users, items, log)
    batch, nobody = a_batch(log), learner.adapt([], [])
    learner.model.tables = learner.model.of_features = None
    assert learner.predict(batch).isfinite().all()
    assert learner.adapt(["i00"], [5.0]).predict(["i03"]).shape == nobody.predict(["i03"]).shape


def test_every_parameter_gets_a_gradient_whatever_is_in_a_batch():
    """DistributedDataParallel waits for all of them in each process."""
    log, users, items, _ = make_world(num_users=60)
    batch = a_batch(log)
    for algorithm in ALGORITHMS:
        learner = make_learner(algorithm, users, items, log).float()
        for tasks in (
            mf.TaskBatch(batch.support, batch.query),
            mf.TaskBatch(batch.support, batch.query, user_ids=[0] * 6),
        ):
            learner.zero_grad(set_to_none=True)
            learner(tasks).backward()
            missing = [name for name, each in learner.named_parameters() if each.grad is None]
            assert not missing, algorithm.name
            assert not learner.model.user_encoder.weight.grad.any()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("loss", ["squared", "logistic", "softmax"])
def test_tables_without_any_column_or_row_change_nothing(algorithm, loss, tmp_path):
    if algorithm is mf.Reptile and loss == "softmax":
        return
    log, _, items, _ = make_world(num_users=60)
    if loss == "logistic":
        log = dataclasses.replace(log, ratings=(log.ratings > 3).astype(np.float32))
    split = mf.split_users(log, seed=0)
    nobody = mf.Features.from_frame({"id": [], "gender": []})
    empty = mf.Features.from_frame({"id": items.ids, "genres": [None] * len(items)})
    scores = []
    for given in ({}, {"user_features": nobody, "item_features": empty}):
        torch.manual_seed(0)
        learner = algorithm(mf.DotRecommender(log.num_items, 3, loss, **given))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # nothing is known of any user
            learner.fit(split.train, split.valid, epochs=1, progress=False)
            learner.save(tmp_path)
            learner = mf.load(tmp_path)
        torch.manual_seed(0)
        batch = next(iter(mf.TaskSampler(split.test, support=5, shuffle=False)))
        scores.append(learner.score_catalogue(batch))
        learner.adapt(["i01"], [1.0], user=1000).recommend(3)
    torch.testing.assert_close(*scores)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler does it
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # and this
def test_a_compiled_learner_gives_the_same_losses():
    log, users, items, _ = make_world(num_users=60)
    torch.compiler.reset()
    learner = make_learner(mf.MAML, users, items, log)
    compiled = torch.compile(learner, backend="aot_eager")
    for batch in mf.TaskSampler(log, support=(3, 8), query=5, batch_size=20):
        batch = batch.to("cpu", torch.float64)
        losses = []
        for run in (learner, compiled):
            learner.zero_grad(set_to_none=True)
            loss = run(batch)
            loss.backward()
            losses += [loss.detach(), learner.model.item_encoder.weight.grad.clone()]
        torch.testing.assert_close(losses[:2], losses[2:])


def test_features_keep_their_precision_under_autocast_and_beside_narrow_tables():
    log, users, items, _ = make_world(num_users=60)
    learner = make_learner(mf.MAML, users, items, log).float()
    batch = a_batch(log)
    expected = learner.predict(batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(learner.predict(batch), expected)
    learner.model.item_embedding.bfloat16()
    learner(batch).backward()
    assert learner.model.item_encoder.weight.grad.dtype is torch.float32
    # Vectors of about 0.1 rounded to 8 bits, in products of a few of them with a user of about 1.
    torch.testing.assert_close(learner.predict(batch), expected, rtol=0, atol=5e-3)


def test_users_without_features_and_batches_without_users_count_as_average():
    log, users, items, _ = make_world()
    learner = make_learner(mf.MAML, users, items, log)
    batch = a_batch(log)
    nameless = mf.TaskBatch(batch.support, batch.query)
    strangers = mf.TaskBatch(batch.support, batch.query, user_ids=np.arange(6))
    average = learner.predict(nameless)
    assert torch.equal(learner.predict(strangers), average)
    assert not torch.allclose(learner.predict(batch), average)
    with pytest.raises(ValueError, match="user_ids: expected 6, one per task, got 2"):
        mf.TaskBatch(batch.support, batch.query, user_ids=[1, 2])
    for wrong in ("abcdef", 3):
        with pytest.raises(TypeError, match="user_ids: expected an array, list or column, got"):
            mf.TaskBatch(batch.support, user_ids=wrong)
    with pytest.raises(TypeError, match="user: expected an id, got list"):
        learner.adapt([], [], user=[1000])


def test_ids_of_another_kind_are_told():
    log, *_ = make_world(num_users=60)
    wrong = mf.Features.from_frame({"id": np.arange(NUM_ITEMS), "x": np.arange(NUM_ITEMS) % 2})
    learner = mf.MAML(mf.DotRecommender(NUM_ITEMS, 2, item_features=wrong))
    with pytest.warns(UserWarning, match="item_features: none of the 40 ids is in the table, which has ids such as 0"):
        learner.item_ids = log.item_ids
    strangers = mf.Features.from_frame({"id": ["a", "b"], "x": ["u", "v"]})
    learner = mf.MAML(mf.DotRecommender(NUM_ITEMS, 2, user_features=strangers))
    with pytest.warns(UserWarning, match="user_features: none of the 60 ids is in the table, .* they are such as 1000"):
        learner.fit(log, epochs=1, progress=False)


def test_features_of_items_need_their_ids():
    log, _, items, _ = make_world()
    learner = mf.MAML(mf.DotRecommender(NUM_ITEMS, 2, item_features=items))
    with pytest.raises(ValueError, match="item_ids: features of items are found by them"):
        learner(a_batch(log))
    with pytest.raises(TypeError, match="user_features: expected Features, got dict"):
        mf.DotRecommender(3, 2, user_features={})


def test_copies_do_not_share_their_weights():
    log, users, items, _ = make_world()
    learner = make_learner(mf.MAML, users, items, log)
    other = copy.deepcopy(learner)
    before = learner.predict(a_batch(log))
    with torch.no_grad():
        other.model.user_encoder.weight.add_(1)
    assert torch.equal(learner.predict(a_batch(log)), before)
    assert not torch.equal(other.predict(a_batch(log)), before)
