"""Interactions from arrays and frames, selection, alignment, and the split by users."""

import numpy as np
import pandas
import polars
import pytest
import torch

from metarec_fast import _grouping, _ids
from metarec_fast.data import Interactions, UserSplit, split_users


def as_dict(log):
    """{(user, item): (rating, time)} by original ids."""
    users = np.repeat(log.user_ids, log.sizes()).tolist()
    items = log.item_ids[log.items].tolist()
    times = [None] * len(log) if log.times is None else log.times.tolist()
    return dict(zip(zip(users, items, strict=True), zip(log.ratings.tolist(), times, strict=True), strict=True))


def assert_same_log(actual, expected):
    for name in ("offsets", "items", "ratings", "times", "user_ids", "item_ids"):
        left, right = getattr(actual, name), getattr(expected, name)
        assert (left is None) == (right is None), name
        if left is not None:
            assert left.dtype == right.dtype, name
            assert left.tolist() == right.tolist(), name


def random_columns(n=3000, seed=0):
    rng = np.random.default_rng(seed)
    users, items = rng.integers(0, 90, n), rng.integers(0, 50, n)
    return users, items, rng.integers(1, 11, n) / 2, rng.integers(0, 40, n)


# ---- from_arrays -------------------------------------------------------------------------------------------------


def test_rows_are_grouped_by_user_and_sorted_by_time():
    log = Interactions.from_arrays([7, 3, 7, 3, 7], [10, 10, 30, 20, 20], [1, 2, 3, 4, 5], [50, 20, 40, 10, 60])
    assert log.user_ids.tolist() == [3, 7]
    assert log.item_ids.tolist() == [10, 20, 30]
    assert log.offsets.tolist() == [0, 2, 5]
    assert log.item_ids[log.items].tolist() == [20, 10, 30, 10, 20]
    assert log.ratings.tolist() == [4, 2, 3, 1, 5]
    assert log.times.tolist() == [10, 20, 40, 50, 60]
    assert (log.num_users, log.num_items, len(log), log.num_duplicates) == (2, 3, 5, 0)
    assert log.sizes().tolist() == [2, 3]
    assert log.ratings[log.rows(1)].tolist() == [3, 1, 5]


def test_arrays_have_the_documented_types():
    log = Interactions.from_arrays([1], [2], [3], [4])
    assert [log.offsets.dtype, log.items.dtype, log.ratings.dtype, log.times.dtype] == [
        np.int64, np.int32, np.float32, np.int64,
    ]  # fmt: skip
    assert Interactions.from_arrays([1], [2], [3], [4.5]).times.dtype == np.float64


def test_without_times_the_order_of_the_input_stays():
    log = Interactions.from_arrays([1, 2, 1, 2, 1], [5, 5, 4, 4, 3], [1, 2, 3, 4, 5])
    assert log.times is None
    assert log.ratings.tolist() == [1, 3, 5, 2, 4]


def test_equal_times_keep_the_order_of_the_input():
    log = Interactions.from_arrays([1] * 4, [4, 3, 2, 1], [1, 2, 3, 4], [7, 7, 6, 7])
    assert log.ratings.tolist() == [3, 1, 2, 4]


def test_without_ratings_each_counts_one():
    assert Interactions.from_arrays([1, 1], [2, 3]).ratings.tolist() == [1, 1]


def test_numbering_does_not_depend_on_the_order_of_rows():
    users, items, ratings, _ = random_columns()
    keep = np.unique(users * 50 + items, return_index=True)[1]  # no duplicates
    times = np.arange(len(users))
    order = np.random.default_rng(1).permutation(keep)
    assert_same_log(
        Interactions.from_arrays(*(column[keep] for column in (users, items, ratings, times))),
        Interactions.from_arrays(*(column[order] for column in (users, items, ratings, times))),
    )


@pytest.mark.parametrize("with_times", [True, False])
def test_the_last_of_equal_items_is_kept_and_the_others_are_counted(with_times):
    users, items, ratings, times = random_columns()
    log = Interactions.from_arrays(users, items, ratings, times if with_times else None)
    rows = zip(users.tolist(), items.tolist(), ratings.tolist(), times.tolist(), strict=True)
    expected = {}
    for user, item, rating, time in rows:
        if not with_times:
            expected[user, item] = (rating, None)
        elif (user, item) not in expected or expected[user, item][1] <= time:
            expected[user, item] = (rating, time)
    assert as_dict(log) == expected
    assert log.num_duplicates == len(users) - len(expected) > 0


def test_blocks_of_users_change_nothing(monkeypatch):
    columns = random_columns()
    whole = Interactions.from_arrays(*columns)
    monkeypatch.setattr(_grouping, "CHUNK", 1)
    monkeypatch.setattr(_ids, "CHUNK", 7)
    pieces = Interactions.from_arrays(*columns)
    assert_same_log(pieces, whole)
    assert pieces.num_duplicates == whole.num_duplicates


@pytest.mark.parametrize(
    "times", [np.array([-(2**62), 2**62, 0, 5]), np.array([0.5, 0.25, -3.0, 0.75])], ids=["wide", "real"]
)
def test_times_of_any_range_sort(times):
    log = Interactions.from_arrays([1, 1, 1, 1], [1, 2, 3, 4], times=times)
    assert log.times.tolist() == sorted(times.tolist())


def test_datetimes_become_microseconds():
    times = np.array(["1970-01-01T00:00:02", "1970-01-01T00:00:01"], "datetime64[s]")
    log = Interactions.from_arrays([1, 1], [1, 2], times=times)
    assert log.times.tolist() == [1_000_000, 2_000_000]
    frame = pandas.DataFrame({"user": [1, 1], "item": [1, 2], "time": pandas.to_datetime(times)})
    assert_same_log(Interactions.from_frame(frame, rating=None, time="time"), log)


def test_no_rows_give_an_empty_log():
    log = Interactions.from_arrays([], [], [])
    assert (len(log), log.num_users, log.num_items) == (0, 0, 0)
    assert log.offsets.tolist() == [0]


def test_arguments_are_not_changed():
    columns = random_columns()
    before = [column.copy() for column in columns]
    Interactions.from_arrays(*columns)
    for column, copy in zip(columns, before, strict=True):
        assert (column == copy).all()


def test_results_do_not_share_memory_with_arguments():
    ratings = np.ones(2, np.float32)
    log = Interactions.from_arrays(np.array([1, 2]), np.array([1, 2]), ratings)
    ratings[:] = 5
    assert log.ratings.tolist() == [1, 1]


# ---- ids ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "users",
    [
        np.array([30, 10, 20]),
        np.array([30, 10, 20], np.uint8),
        np.array([2**63 - 1, -(2**63), 0]),
        np.array([2**64 - 1, 2**64 - 3, 2**64 - 2], np.uint64),
        [30, 10, 20],
        (30, 10, 20),
        ["c", "a", "b"],
        np.array(["c", "a", "b"]),
        np.array(["c", "a", "b"], object),
        [2**80, 1, 2],
        [(2, 1), (1, 1), (1, 2)],
        [2.5, 0.5, 1.5],
        [b"c", b"a", b"b"],
        ["x\0", "x", "x\0\0"],
    ],
    ids=repr,
)
def test_ids_are_kept_and_sorted(users):
    log = Interactions.from_arrays(users, [1, 1, 1], [0, 1, 2])
    original = users.tolist() if isinstance(users, np.ndarray) else list(users)
    assert log.user_ids.tolist() == sorted(original)
    assert [log.user_ids.tolist()[u] for u in log.user_index(users)] == original
    assert log.ratings.tolist() == [float(original.index(user)) for user in sorted(original)]


def test_integer_ids_keep_their_dtype():
    assert Interactions.from_arrays(np.array([3], np.int16), [1]).user_ids.dtype == np.int16


def test_ids_of_several_kinds_stand_as_they_first_appear():
    log = Interactions.from_arrays(["b", 1, "b", 2.5], [1, 2, 3, 4])
    assert log.user_ids.tolist() == ["b", 1, 2.5]


def test_numbers_as_strings_stay_strings():
    log = Interactions.from_arrays(["007", "7"], [1, 1])
    assert log.user_ids.tolist() == ["007", "7"]
    assert log.user_index([7, "7", "007"]).tolist() == [-1, 1, 0]


def test_columns_of_many_kinds_give_the_same_log():
    users, items, ratings, times = random_columns(200)
    expected = Interactions.from_arrays(users, items, ratings, times)
    for convert in (list, tuple, pandas.Series, polars.Series, torch.from_numpy, np.ndarray.tolist):
        assert_same_log(Interactions.from_arrays(*(convert(c) for c in (users, items, ratings, times))), expected)


def test_strings_of_polars_and_pandas_frames_agree_with_lists():
    rng = np.random.default_rng(0)
    users = [f"user {k}" for k in rng.integers(0, 30, 200)]
    items = ["ä" * int(k) + "x" for k in rng.integers(0, 30, 200)]
    ratings = rng.integers(1, 6, 200)
    expected = Interactions.from_arrays(users, items, ratings)
    columns = {"user": users, "item": items, "rating": ratings}
    for frame in (columns, pandas.DataFrame(columns), polars.DataFrame(columns)):
        assert_same_log(Interactions.from_frame(frame), expected)


def test_item_index_gives_minus_one_for_unknown_ids():
    log = Interactions.from_arrays([1, 1, 1], [10, 30, 20])
    index = log.item_index([30, 5, 10, 99, 20])
    assert index.dtype == np.int64
    assert index.tolist() == [2, -1, 0, -1, 1]
    assert log.item_index([]).tolist() == []
    assert log.item_index(["30"]).tolist() == [-1]
    assert Interactions.from_arrays([], []).item_index([1]).tolist() == [-1]


# ---- bad columns -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        (([1, 2], [1], [1, 1]), ValueError, r"items: expected 2 rows, like users, got 1"),
        (([1, 2], [1, 2], [1]), ValueError, r"ratings: expected 2 rows, like users, got 1"),
        (([1, 2], [1, 2], [1, 1], [1]), ValueError, r"times: expected 2 rows, like users, got 1"),
        (([1, 2], [1, 2], [1, np.nan]), ValueError, r"ratings: must be finite, got nan at row 1"),
        (([1, 2], [1, 2], [np.inf, 1]), ValueError, r"ratings: must be finite, got inf at row 0"),
        (([1, 2], [1, 2], [1, 1e60]), ValueError, r"ratings: must be finite, got 1e\+60 at row 1"),
        (([1, 2], [1, 2], [1, None]), ValueError, r"ratings: must be finite, got nan at row 1"),
        (([1, 2], [1, 2], ["1", "good"]), TypeError, r"ratings: expected numbers, got <U4 such as '1'"),
        (([1, 2], [1, 2], [1, 1], [1.0, np.nan]), ValueError, r"times: must be finite, got nan at row 1"),
        (([1, 2], [1, 2], [1, 1], ["a", "b"]), TypeError, r"times: expected numbers, got <U1"),
        (
            ([1, 2], [1, 2], [1, 1], np.array(["NaT", "2020-01-01"], "datetime64[D]")),
            ValueError,
            r"times: a time is missing at row 0",
        ),
        (
            ([1, 2], [1, 2], np.array(["2020-01-01"] * 2, "datetime64[D]")),
            TypeError,
            r"ratings: expected numbers, got datetimes",
        ),
        (([1, None], [1, 2]), ValueError, r"users: an id is missing, got None at row 1"),
        (([1, 2], ["a", None]), ValueError, r"items: an id is missing, got None at row 1"),
        (([1.0, np.nan], [1, 2]), ValueError, r"users: an id is missing, got nan at row 1"),
        ((pandas.Series([1, None], dtype="Int64"), [1, 2]), ValueError, r"users: an id is missing, got .* at row 1"),
        ((polars.Series([1, None]), [1, 2]), ValueError, r"users: an id is missing, got nan at row 1"),
        (([1, [2]], [1, 2]), TypeError, r"users: ids must be hashable, got a list at row 1"),
        ((np.ones((2, 2), int), [1, 2]), ValueError, r"users: expected one dimension, got shape \(2, 2\)"),
        (([1, 2], [1, 2], np.ones((2, 1))), ValueError, r"ratings: expected one dimension, got shape \(2, 1\)"),
        (("ab", [1, 2]), TypeError, r"users: expected an array, list or column, got str"),
        ((5, [1]), TypeError, r"users: expected an array, list or column, got int"),
        (({1, 2}, [1, 2]), TypeError, r"users: expected an array, list or column, got set"),
    ],
)
def test_bad_columns_are_named_with_the_row(columns, error, message):
    with pytest.raises(error, match=message):
        Interactions.from_arrays(*columns)


def test_a_missing_id_among_polars_strings_is_named():
    frame = polars.DataFrame({"user": ["a", None], "item": [1, 2]})
    with pytest.raises(ValueError, match=r"users: an id is missing, got None at row 1"):
        Interactions.from_frame(frame, rating=None)


def test_a_missing_column_is_named_with_those_that_are_there():
    frame = pandas.DataFrame({"userId": [1], "movieId": [2]})
    with pytest.raises(ValueError, match=r"item: frame has no column 'item'; its columns are 'userId', 'movieId'"):
        Interactions.from_frame(frame, user="userId", rating=None)
    with pytest.raises(ValueError, match=r"rating: frame has no column 'rating'"):
        Interactions.from_frame({"user": [1], "item": [1]})


def make_log(**changes):
    arguments = {
        "offsets": np.array([0, 1, 2]),
        "items": np.array([0, 1], np.int32),
        "ratings": np.ones(2, np.float32),
        "times": None,
        "user_ids": np.array([5, 6]),
        "item_ids": np.array([7, 8]),
    }
    return Interactions(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"offsets": np.array([0, 1])}, ValueError, r"offsets: expected shape \(3,\), got \(2,\)"),
        ({"offsets": np.array([0, 1, 3])}, ValueError, r"offsets: must run from 0 to 2"),
        ({"offsets": np.array([0, 3, 2])}, ValueError, r"offsets: must run from 0 to 2.* never decrease"),
        ({"offsets": [0, 1, 2]}, TypeError, r"offsets: expected an array of int64, got list"),
        ({"items": np.array([0, 1])}, TypeError, r"items: expected an array of int32, got int64"),
        ({"items": np.array([0, 2], np.int32)}, IndexError, r"items: must be in \[0, 2\), got 0 to 2"),
        ({"ratings": np.ones(3, np.float32)}, ValueError, r"ratings: expected shape \(2,\), got \(3,\)"),
        ({"times": np.ones(2, np.int8)}, TypeError, r"times: expected an array of int64 or float64, got int8"),
    ],
)
def test_a_log_from_parts_is_checked(changes, error, message):
    assert len(make_log()) == 2
    with pytest.raises(error, match=message):
        make_log(**changes)


# ---- selection and alignment -------------------------------------------------------------------------------------


def test_select_users_keeps_the_order_given_and_the_items():
    log = Interactions.from_arrays(*random_columns())
    part = log.select_users([5, 2, 80])
    assert part.user_ids.tolist() == log.user_ids[[5, 2, 80]].tolist()
    assert part.item_ids is log.item_ids
    for place, user in enumerate((5, 2, 80)):
        for name in ("items", "ratings", "times"):
            assert (getattr(part, name)[part.rows(place)] == getattr(log, name)[log.rows(user)]).all()
    assert len(log.select_users([])) == 0
    assert_same_log(log.select_users(np.arange(log.num_users)), log)


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([0, 2], IndexError, r"indices: must be in \[0, 2\), got 2 at position 1"),
        ([-1], IndexError, r"indices: must be in \[0, 2\), got -1 at position 0"),
        ([1, 1], ValueError, r"indices: a user comes twice"),
        ([0.0], TypeError, r"indices: expected integers \[k\], got float64"),
        ([True, False], TypeError, r"indices: expected integers \[k\], got bool"),
    ],
)
def test_bad_selections_are_named(indices, error, message):
    with pytest.raises(error, match=message):
        make_log().select_users(indices)


def test_align_items_maps_by_original_id_and_counts_what_it_drops():
    log = Interactions.from_arrays([1, 1, 2, 3], ["a", "b", "c", "a"], [1, 2, 3, 4], [4, 3, 2, 1])
    aligned, dropped = log.align_items(np.array(["z", "c", "a"]))
    assert dropped == 1
    assert aligned.item_ids.tolist() == ["z", "c", "a"]
    assert aligned.user_ids.tolist() == [1, 2, 3]
    assert as_dict(aligned) == {key: value for key, value in as_dict(log).items() if key[1] != "b"}
    assert aligned.items.dtype == np.int32


def test_align_items_keeps_users_who_lose_everything():
    log = Interactions.from_arrays([1, 2], [10, 20])
    aligned, dropped = log.align_items([20])
    assert (dropped, aligned.num_users, aligned.sizes().tolist()) == (1, 2, [0, 1])


def test_align_items_to_its_own_catalogue_changes_nothing():
    log = Interactions.from_arrays(*random_columns())
    assert log.align_items(log.item_ids) == (log, 0)
    aligned, dropped = log.align_items(log.item_ids.copy())
    assert dropped == 0
    assert_same_log(aligned, log)


def test_align_items_refuses_a_catalogue_with_an_id_twice():
    with pytest.raises(ValueError, match=r"item_ids: each id must come once, got 7 again"):
        make_log().align_items([7, 8, 7])


def test_rows_of_a_user_who_is_not_there_are_refused():
    with pytest.raises(IndexError, match=r"user: must be in \[0, 2\), got 2"):
        make_log().rows(2)


def test_its_description_says_how_large_it_is():
    assert repr(make_log()) == "Interactions(ratings=2, users=2, items=2, times=no)"


# ---- split_users -------------------------------------------------------------------------------------------------


def test_split_users_gives_disjoint_users_and_all_of_them():
    log = Interactions.from_arrays(*random_columns())
    split = split_users(log, valid=0.1, test=0.2, seed=3)
    parts = [set(part.user_ids.tolist()) for part in (split.train, split.valid, split.test)]
    assert [len(part) for part in parts] == [63, 9, 18]
    assert set.union(*parts) == set(log.user_ids.tolist())
    assert sum(len(part) for part in (split.train, split.valid, split.test)) == len(log)
    merged = as_dict(split.train) | as_dict(split.valid) | as_dict(split.test)
    assert merged == as_dict(log)
    for part in (split.train, split.valid, split.test):
        assert part.item_ids is log.item_ids
        assert part.user_ids.tolist() == sorted(part.user_ids.tolist())


def test_the_seed_decides_the_split():
    log = Interactions.from_arrays(*random_columns())
    tests = [split_users(log, seed=seed).test.user_ids.tolist() for seed in (0, 0, 1)]
    assert tests[0] == tests[1]
    assert tests[0] != tests[2]


def test_the_split_is_the_same_on_every_machine():
    log = Interactions.from_arrays(np.arange(20), np.zeros(20, int))
    assert split_users(log, valid=3, test=4, seed=0).test.user_ids.tolist() == [0, 2, 15, 17]


def test_numbers_of_users_and_zero_are_allowed():
    log = Interactions.from_arrays(np.arange(20), np.zeros(20, int))
    split = split_users(log, valid=0, test=5)
    assert [part.num_users for part in (split.train, split.valid, split.test)] == [15, 0, 5]
    tiny = split_users(log, valid=0.001, test=0.001)
    assert [part.num_users for part in (tiny.train, tiny.valid, tiny.test)] == [18, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"valid": -0.1}, ValueError, r"valid: a fraction of the users must be in \[0, 1\), got -0.1"),
        ({"test": 1.0}, ValueError, r"test: a fraction of the users must be in \[0, 1\), got 1.0"),
        ({"test": float("nan")}, ValueError, r"test: a fraction of the users must be in \[0, 1\), got nan"),
        ({"valid": -1}, ValueError, r"valid: a number of users must be ≥ 0, got -1"),
        ({"valid": "10%"}, TypeError, r"valid: expected an int, got str '10%'"),
        ({"valid": True}, TypeError, r"valid: expected an int, got bool True"),
        ({"valid": 1, "test": 1}, ValueError, r"valid and test: 1 and 1 of 2 users leave none to train on"),
        ({"seed": 0.5}, TypeError, r"seed: expected an int, got float 0.5"),
    ],
)
def test_bad_splits_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        split_users(make_log(), **({"valid": 0, "test": 0} | arguments))


def test_a_split_with_a_user_on_both_sides_is_refused():
    log = Interactions.from_arrays([1, 2, 3], [1, 1, 1])
    train, test = log.select_users([0, 1]), log.select_users([1, 2])
    with pytest.raises(ValueError, match=r"user 2 is in both train and test"):
        UserSplit(train, log.select_users([]), test)


def test_a_split_with_two_numberings_of_items_is_refused():
    first, second = Interactions.from_arrays([1], [10]), Interactions.from_arrays([2], [20])
    with pytest.raises(ValueError, match=r"test: its items are numbered differently from those of train"):
        UserSplit(first, first.select_users([]), second)


def test_rows_can_be_chosen_and_users_stay():
    log = Interactions.from_arrays([1, 1, 2, 3], ["a", "b", "a", "c"], [1.0, 2.0, 3.0, 4.0], [5, 6, 7, 8])
    chosen = log.select_rows(np.array([False, True, False, True]))
    assert chosen.user_ids.tolist() == [1, 2, 3]
    assert chosen.offsets.tolist() == [0, 1, 1, 2]
    assert chosen.item_ids[chosen.items].tolist() == ["b", "c"]
    assert (chosen.ratings.tolist(), chosen.times.tolist()) == ([2.0, 4.0], [6, 8])
    assert log.item_keys().tolist() == [0, 1, 3, 8]
    with pytest.raises(TypeError, match="chosen: expected bools, got int64"):
        log.select_rows(np.array([0, 1]))
    with pytest.raises(ValueError, match=r"chosen: expected shape \(4,\), got \(1,\)"):
        log.select_rows(np.array([True]))
