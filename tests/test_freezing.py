"""Parts of a learner that stay to the bit, or are trained at a rate of their own, through fit and on disk."""

import numpy as np
import pytest
import torch

import metarec_fast as mf

pytestmark = pytest.mark.filterwarnings("ignore:an MLP tower runs on its PyTorch reference on cuda")

NUM_ITEMS = 20
ALL = [mf.MAML, mf.FOMAML, mf.Reptile, mf.MetaSGD, mf.MAMLR]


def make_log(num_users=40, seed=0):
    rng = np.random.default_rng(seed)
    users = np.repeat(np.arange(num_users), 12)
    items = np.concatenate([rng.choice(NUM_ITEMS, 12, replace=False) for _ in range(num_users)])
    return mf.Interactions.from_arrays(users, items, rng.integers(1, 6, len(users)))


def make_features(rows=30, seed=0):
    rng = np.random.default_rng(seed)
    with torch.device("cpu"):  # where tables are, whatever the default
        return mf.Features.from_frame({"id": list(range(rows)), "kind": rng.choice(["a", "b", "c"], rows).tolist()})


def make_learner(algorithm, kind="dense", num_items=NUM_ITEMS):
    torch.manual_seed(0)
    if kind == "tower":
        adapt = {} if algorithm is not mf.Reptile else {"adapt": "user"}
        return algorithm(mf.MLPRecommender(num_items, 3, hidden=(4,), item_features=make_features()), **adapt)
    features = make_features() if kind == "features" else None
    return algorithm(mf.DotRecommender(num_items, 3, sparse=kind == "sparse", item_features=features))


def fit(learner, epochs=2, log=None, **arguments):
    rate = 0.5 if isinstance(learner, mf.Reptile) else 0.05
    learner.fit(make_log() if log is None else log, epochs=epochs, outer_lr=rate, progress=False, **arguments)


def values_of(learner):
    return {name: value.detach().clone() for name, value in learner.named_parameters()}


@pytest.mark.parametrize("kind", ["dense", "sparse", "features", "tower"])
@pytest.mark.parametrize("algorithm", ALL)
def test_what_is_frozen_stays_to_the_bit_and_the_rest_is_trained(algorithm, kind):
    learner = make_learner(algorithm, kind)
    learner.freeze("item_*")
    before = values_of(learner)
    fit(learner)
    after = values_of(learner)
    frozen = {name for name in before if name.removeprefix("model.").removeprefix("module.").startswith("item_")}
    assert frozen
    for name in frozen:
        assert torch.equal(before[name], after[name]), name
    assert any(not torch.equal(before[name], after[name]) for name in before if name not in frozen)


def test_a_frozen_part_survives_an_optimiser_with_everything_and_a_start_that_would_set_it():
    learner = make_learner(mf.MAML)
    learner.freeze("item_bias.weight")
    optimizer = torch.optim.AdamW(learner.parameters(), lr=0.1, weight_decay=0.1)
    learner.fit(make_log(), epochs=2, optimizer=optimizer, progress=False)
    assert not learner.model.item_bias.weight.any()  # initialising alone would have made it averages
    assert learner.model.offset != 0


def test_gradients_of_all_else_are_those_without_freezing():
    log = make_log()
    for kind in ("dense", "sparse"):
        gradients = []
        for names in ([], ["item_embedding.weight"]):
            learner = make_learner(mf.MAMLR, kind)
            learner.initialize(log)
            learner.freeze(names)
            learner(next(iter(mf.TaskSampler(log, 5, "rest", 16)))).backward()
            gradients.append({name: p.grad for name, p in learner.named_parameters()})
        assert gradients[1].pop("model.item_embedding.weight") is None
        for name, gradient in gradients[1].items():
            torch.testing.assert_close(gradient.to_dense(), gradients[0][name].to_dense(), rtol=0, atol=0)


def test_a_factor_scales_the_rate_of_its_part_alone():
    learner = make_learner(mf.MAMLR)
    rates = {p: group["lr"] for group in learner.parameter_groups(1e-3) for p in group["params"]}
    learner.scale_lr("item_*", 0.1)
    learner.scale_lr("log_steps", 2)
    learner.freeze("offset")
    scaled = {p: group["lr"] for group in learner.parameter_groups(1e-3) for p in group["params"]}
    for name, parameter in learner.named_parameters():
        if name == "model.offset":
            assert parameter not in scaled
            continue
        factor = 0.1 if name.startswith("model.item_") else 2 if name == "log_steps" else 1
        assert scaled[parameter] == pytest.approx(factor * rates[parameter]), name


def test_with_reptile_a_factor_is_the_size_of_the_step():
    log, moves = make_log(), []
    for factor in (1, 0.25):
        learner = make_learner(mf.Reptile)
        learner.initialize(log)
        learner.scale_lr("item_embedding.weight", factor)
        (optimizer,) = learner.default_optimizers()
        before = values_of(learner)
        learner(next(iter(mf.TaskSampler(log, 8, None, 40)))).backward()
        optimizer.step()
        moves.append({name: value - before[name] for name, value in values_of(learner).items()})
    for name, move in moves[0].items():
        factor = 0.25 if name == "model.item_embedding.weight" else 1
        torch.testing.assert_close(moves[1][name], factor * move, rtol=1e-5, atol=1e-7)


def test_factors_survive_the_disk_and_tuning(tmp_path):
    pytest.importorskip("optuna")
    learner = make_learner(mf.MAMLR, "sparse")
    learner.freeze(["item_embedding.*", "choice.weight"])
    learner.scale_lr("item_bias.*", 0.5)
    before = values_of(learner)
    learner.fit(make_log(), make_log(seed=1), tune=2, epochs=1, progress=False)
    for name in ("model.item_embedding.weight", "choice.weight"):
        assert torch.equal(before[name], learner.get_parameter(name)), name
    learner.save(tmp_path)
    again = mf.load(tmp_path)
    frozen = {name for name, parameter in again.named_parameters() if not parameter.requires_grad}
    assert frozen == {"model.item_embedding.weight", "choice.weight"}
    rates = [[group["lr"] for group in each.parameter_groups()] for each in (learner, again)]
    assert rates[0] == rates[1]
    assert min(rates[1]) == 0.5 * learner.default_outer_lr
    again.scale_lr("*", 1)
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_a_run_is_not_continued_with_other_parts_frozen(tmp_path):
    learner = make_learner(mf.MAML)
    learner.freeze("item_bias.*")
    fit(learner, epochs=1, checkpoint=tmp_path)
    other = make_learner(mf.MAML)
    other.freeze("user_init")
    with pytest.raises(ValueError, match="lr_factors: the checkpoint .* was made with"):
        fit(other, epochs=1, checkpoint=tmp_path, resume=True)


def test_errors_name_what_is_wrong():
    learner = make_learner(mf.MAML)
    with pytest.raises(ValueError, match=r"parameters: expected names of the learner's .* got 'itens'; they are"):
        learner.freeze("itens")
    for factor in (0, -1, float("nan"), "1", True):
        with pytest.raises(ValueError, match=r"factor: expected a number > 0 \(`freeze` is for 0\), got"):
            learner.scale_lr("item_*", factor)
    learner.freeze("*")
    for algorithm in (learner, make_learner(mf.Reptile)):
        algorithm.freeze("*")
        with pytest.raises(ValueError, match="learner: every parameter is frozen, so that nothing is left to train"):
            fit(algorithm)
