"""Item vectors from elsewhere, parts of other learners, and learners that go on with another catalogue."""

import numpy as np
import pytest
import torch
from problems import Draw
from test_freezing import ALL, fit, make_learner, make_log, values_of

import metarec_fast as mf

pytestmark = pytest.mark.filterwarnings("ignore:an MLP tower runs on its PyTorch reference on cuda")

NUM_ITEMS = 20


class Mine(torch.nn.Module):
    def __init__(self, num_items):
        super().__init__()
        self.num_items = num_items
        self.items = torch.nn.Embedding(num_items, 3)
        self.head = torch.nn.Linear(3, 1)

    def forward(self, items):
        return self.head(self.items(items)).squeeze(-1)


def log_of(items, seed=0, num_users=30, level=3.0):
    """Ratings around `level`, by a taste of rank one, of some of the items with these ids."""
    rng = np.random.default_rng(seed)
    users = np.repeat(np.arange(num_users), 8)
    chosen = np.concatenate([rng.choice(items, 8, replace=False) for _ in range(num_users)])
    kind = np.sin(np.asarray(chosen, float))
    ratings = level + kind * rng.normal(size=num_users)[users] + 0.1 * rng.normal(size=len(users))
    return mf.Interactions.from_arrays(users, chosen, ratings)


def nobody():
    """One task without support."""
    items = torch.empty(0, dtype=torch.int64)
    return mf.TaskBatch(mf.Entries(items, items.float(), torch.zeros(2, dtype=torch.int64)))


def trained(algorithm=mf.MAML, items=range(20), kind="dense", seed=0):
    learner = make_learner(algorithm, kind, len(items))
    learner.fit(log_of(list(items), seed), epochs=2, progress=False)
    return learner


@pytest.mark.parametrize("kind", ["dense", "sparse", "features", "tower"])
@pytest.mark.parametrize("algorithm", ALL)
def test_vectors_are_matched_by_id_and_stay_when_frozen(algorithm, kind):
    log = make_log()
    learner = make_learner(algorithm, kind)
    learner.item_ids = log.item_ids
    ids = [19, 3, 77, 0]
    vectors, biases = torch.randn(4, 3), torch.randn(4)
    assert learner.load_items(ids, vectors, biases) == 3
    learner.freeze("item_*")
    others = [row for row in range(NUM_ITEMS) if row not in ids]
    before = item_tables(learner)[0][others].clone()
    fit(learner)
    rows, levels = item_tables(learner)
    for place, row in ((0, 19), (1, 3), (3, 0)):
        assert torch.equal(rows[row], vectors[place])
        assert torch.equal(levels[row], biases[place])
    assert torch.equal(rows[others], before)
    if kind == "tower":
        assert levels[others].any()  # of these it found the averages


def item_tables(learner):
    if isinstance(learner.model, mf.DotRecommender):
        return learner.model.tables()
    tower = learner.model.module
    return tower.item_part(torch.arange(NUM_ITEMS)), tower.item_average


@pytest.mark.parametrize("algorithm", ALL)
def test_vectors_without_biases_start_there_and_are_trained_with_averages_as_biases(algorithm):
    log = make_log()
    plain, learner = make_learner(mf.MAML), make_learner(algorithm)
    plain.initialize(log)
    learner.item_ids = log.item_ids
    vectors = np.random.default_rng(0).normal(size=(NUM_ITEMS, 3))
    learner.load_items(np.arange(NUM_ITEMS), vectors)
    learner.initialize(log)
    expected = torch.from_numpy(vectors).to(learner.model.offset)
    assert torch.equal(learner.model.item_embedding.weight, expected)
    torch.testing.assert_close(learner.model.item_bias.weight, plain.model.item_bias.weight)
    fit(learner)
    assert not torch.equal(learner.model.item_embedding.weight, expected)


def test_with_vectors_from_elsewhere_maml_r_takes_steps_that_suit_them():
    """The same vectors in other units give the same predictions after a step, as with rates that know them."""
    log, predictions = make_log(), []
    batch = next(iter(mf.TaskSampler(log, 6, "rest", 40)))
    for scale in (1.0, 30.0):
        learner = make_learner(mf.MAMLR)
        learner = mf.MAMLR(learner.model, pull=False, inner_steps=3)
        learner.item_ids = log.item_ids
        learner.load_items(np.arange(NUM_ITEMS), scale * Draw(1, torch.float32).normal(NUM_ITEMS, 3))
        learner.initialize(log)
        predictions.append(learner.predict(batch))
    assert predictions[1].isfinite().all()
    assert (predictions[0] - predictions[1]).abs().max() < 0.5
    assert predictions[1].abs().max() < 8


def test_vectors_of_a_saved_learner_can_be_taken_and_features_are_not_counted_twice(tmp_path):
    source = trained(mf.MAMLR, kind="features")
    source.save(tmp_path)
    vectors, biases = mf.load(tmp_path).model.tables()
    learner = trained(mf.MAML, kind="features", seed=1)
    assert learner.model.item_encoder.weight.any()
    learner.load_items(source.item_ids, vectors, biases)
    for found, expected in zip(learner.model.tables(), (vectors, biases), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("parameters", ["tower.*", ["item_embedding.*", "item_average"], "*"])
def test_parts_of_a_saved_tower_are_taken_by_name_and_items_by_id(tmp_path, parameters):
    source = trained(items=range(5, 25), kind="tower")
    source.save(tmp_path)
    learner = make_learner(mf.MetaSGD, "tower")
    learner.item_ids = np.arange(20)
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    taken = learner.load_from(tmp_path, parameters)
    assert taken
    after, given = learner.state_dict(), source.state_dict()
    for short in taken:
        name = f"model.module.{short}" if f"model.module.{short}" in after else f"model.{short}"
        if name.endswith(("item_embedding.weight", "item_average")):
            assert torch.equal(after[name][5:], given[name][:15])
            assert torch.equal(after[name][:5], before[name][:5])
        else:
            assert torch.equal(after[name], given[name])
    for name, value in after.items():
        if name.removeprefix("model.").removeprefix("module.") not in taken:
            assert torch.equal(value, before[name]), name
    learner.initialize(log_of(list(range(20)), seed=3))
    for short in taken:
        if "item" not in short:  # of items, those that were not taken got averages
            name = f"model.module.{short}" if f"model.module.{short}" in after else f"model.{short}"
            assert torch.equal(learner.state_dict()[name], given[name])


@pytest.mark.parametrize("kind", ["dense", "sparse", "features", "tower"])
@pytest.mark.parametrize("algorithm", ALL)
def test_after_a_transfer_items_of_both_catalogues_are_scored_as_before(algorithm, kind):
    source = trained(algorithm, range(15), kind)
    log = log_of(list(range(5, 20)), seed=1)
    learner = source.transfer(log)
    assert type(learner) is algorithm
    assert learner.item_ids.tolist() == list(range(5, 20))
    shared = log.align_items(range(5, 15))[0]
    batches = [
        next(iter(mf.TaskSampler(shared.align_items(ids)[0], 4, "rest", 30))) for ids in (range(15), range(5, 20))
    ]
    torch.testing.assert_close(learner.predict(batches[1]), source.predict(batches[0]))
    assert learner.hyperparameters == source.hyperparameters

    fit(learner, log=log)
    assert all(value.isfinite().all() for value in values_of(learner).values())


@pytest.mark.parametrize("kind", ["dense", "features", "tower"])
def test_new_items_start_as_unknown_ones_are_scored_but_at_the_level_of_the_log(kind):
    source = trained(mf.MAML, range(10), kind)
    log = log_of(list(range(5, 20)), seed=1, num_users=400, level=4.5)
    learner = source.transfer(log)
    rows, _ = item_tables(learner) if kind != "tower" else (learner.model.module.item_part(torch.arange(15)), None)
    if kind == "tower":
        own = source.model.module.item_embedding.weight.mean(0)
        assert torch.equal(learner.model.module.item_embedding.weight[5:], own.expand(10, -1))
    else:
        torch.testing.assert_close(rows[5:], source.model.unknown_items(np.arange(10, 20))[0])
    nobody = mf.TaskBatch(
        mf.Entries(torch.empty(0, dtype=torch.int64), torch.empty(0), torch.zeros(2, dtype=torch.int64))
    )
    scores = learner.score_catalogue(nobody)[0, 5:]
    means = torch.tensor([log.ratings[log.items == row].mean() for row in range(5, 15)])
    assert (scores - means).abs().max() < 0.05


def test_without_ratings_new_items_are_scored_exactly_as_unknown_ones():
    source = trained(mf.MAMLR, range(10), "features")
    learner = source.transfer(log_of(list(range(5, 20))).select_rows(np.zeros(240, bool)))
    items, ratings = [5, 6, 7], [5.0, 1.0, 3.0]
    np.testing.assert_allclose(
        learner.adapt(items, ratings).predict([5, 12, 19]), source.adapt(items, ratings).predict([5, 12, 19]), rtol=1e-5
    )


@pytest.mark.parametrize("loss", ["logistic", "bpr"])
def test_levels_of_new_items_fit_the_loss(loss):
    rng = np.random.default_rng(0)
    users, items = np.nonzero(rng.random((300, 12)) < np.linspace(0.1, 0.9, 12))
    ratings = (rng.random(len(users)) < np.linspace(0.1, 0.9, 12)[items]).astype(float)
    log = mf.Interactions.from_arrays(users, items, ratings)
    old = log.align_items(range(6))[0]
    source = mf.MAML(mf.DotRecommender(6, 3, loss=loss))
    source.fit(old, epochs=1, progress=False)
    learner = source.transfer(log)
    nobody = mf.TaskBatch(
        mf.Entries(torch.empty(0, dtype=torch.int64), torch.empty(0), torch.zeros(2, dtype=torch.int64))
    )
    scores = learner.score_catalogue(nobody)[0]
    assert (scores[6:].diff() > 0).all()
    if loss == "logistic":
        rates = torch.tensor([ratings[items == item].mean() for item in range(6, 12)])
        torch.testing.assert_close(scores[6:].sigmoid(), rates.float(), atol=0.02, rtol=0)


def test_a_module_of_ones_own_is_given_for_the_new_catalogue():
    source = mf.MAML(Mine(10), adapt=["head.*"])
    source.fit(log_of(list(range(10))), epochs=1, progress=False)
    log = log_of(list(range(5, 20)), seed=1)
    with pytest.raises(ValueError, match="module: expected a Mine for 15 items, which only you can make, got None"):
        source.transfer(log)
    learner = source.transfer(log, module=Mine(15))
    assert torch.equal(learner.model.module.head.weight, source.model.module.head.weight)
    assert torch.equal(learner.model.module.items.weight[:5], source.model.module.items.weight[5:])
    assert torch.equal(learner.model.offset, source.model.offset)
    with pytest.raises(TypeError, match="model: Mine has item vectors of its own making"):
        learner.load_items([5], torch.zeros(1, 3))


def test_what_does_not_fit_is_refused_by_name():
    learner, source = make_learner(mf.MAML), trained(kind="features")
    with pytest.raises(ValueError, match="item_ids: not known yet"):
        learner.load_items([0], torch.zeros(1, 3))
    learner.item_ids = np.arange(20)
    for arguments, message in (
        (([0], torch.zeros(1, 5)), r"vectors: expected shape \(1, 3\), got \(1, 5\); reduce them first"),
        (([0], torch.full((1, 3), torch.nan)), "vectors: expected finite numbers, got 3 that are not"),
        (([0], torch.zeros(1, 3), torch.zeros(2)), r"biases: expected shape \(1,\), got \(2,\)"),
        (
            (["0"], torch.zeros(1, 3)),
            r"ids: none is an item of the learner, .* such as \[0\]; got such as \['0'",
        ),
        (([0, 0], torch.zeros(2, 3)), "ids: each id must come once"),
    ):
        with pytest.raises(ValueError, match=message):
            learner.load_items(*arguments)
    with pytest.raises(ValueError, match="parameters: expected names of what both learners have .* got 'tower"):
        learner.load_from(source, "tower.*")
    other = mf.MAML(mf.DotRecommender(20, 5))
    other.item_ids = np.arange(20)
    with pytest.raises(ValueError, match=r"user_init: expected shape \(5,\), as this learner has it, got \(3,\)"):
        other.load_from(source)
    with pytest.raises(ValueError, match="learner: expected one that is initialised or trained, got a new one"):
        learner.transfer(make_log())
    with torch.device("cpu"):
        strange = mf.Features.from_frame({"id": list(range(20)), "kind": ["x", "y", "z", "w"] * 5})
    with pytest.raises(ValueError, match="item_features: expected the columns, values and scales of the source"):
        source.transfer(make_log(), item_features=strange)
