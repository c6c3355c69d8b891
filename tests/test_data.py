"""Interactions from arrays and files, what they refuse, and their split by users."""

import sys

import numpy as np
import pytest

import metarec_fast as mf


def small():
    return mf.Interactions.from_arrays(["b", "a", "b", "c"], [7, 5, 5, 9], [1.0, 2.0, 3.0, 4.0], times=[9, 1, 3, 0])


def test_ids_are_kept_and_rows_are_grouped_by_user_and_sorted_by_time():
    log = small()
    assert (log.num_users, log.num_items, len(log)) == (3, 3, 4)
    assert log.user_ids.tolist() == ["a", "b", "c"]
    assert log.item_ids.tolist() == [5, 7, 9]
    assert log.offsets.tolist() == [0, 1, 3, 4]
    assert log.items[log.rows(1)].tolist() == [0, 1]  # at time 3, then 9
    assert log.ratings.tolist() == [2.0, 3.0, 1.0, 4.0]
    assert log.item_index([9, 8, 5]).tolist() == [2, -1, 0]


def test_of_equal_pairs_the_latest_is_kept_and_the_others_are_counted():
    log = mf.Interactions.from_arrays([1, 1, 1], [2, 2, 3], [1.0, 5.0, 2.0], times=[8, 4, 1])
    assert log.num_duplicates == 1
    assert dict(zip(log.items.tolist(), log.ratings.tolist(), strict=True)) == {0: 1.0, 1: 2.0}


def test_the_mapping_does_not_depend_on_the_order_of_rows_and_inputs_stay_as_they_are():
    users, items, ratings = np.array([3, 1, 2, 1]), np.array([9, 8, 9, 7]), np.array([1.0, 2.0, 3.0, 4.0])
    before = users.copy(), items.copy(), ratings.copy()
    log = mf.Interactions.from_arrays(users, items, ratings)
    turned = mf.Interactions.from_arrays(users[::-1], items[::-1], ratings[::-1])
    assert log.user_ids.tolist() == turned.user_ids.tolist()
    assert log.item_ids.tolist() == turned.item_ids.tolist()
    for now, then in zip((users, items, ratings), before, strict=True):
        assert np.array_equal(now, then)


def test_another_catalogue_keeps_what_it_knows_by_original_id():
    aligned, dropped = small().align_items([9, 100, 5])
    assert dropped == 1
    assert aligned.item_ids.tolist() == [9, 100, 5]
    assert len(aligned) == 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1, 2], [1], [1.0, 2.0]), ValueError, "items: expected 2 rows, like users, got 1"),
        (([1, 2], [1, 2], [1.0, float("nan")]), ValueError, "ratings: must be finite, got nan at row 1"),
        (([1, 2], [1, 2], [float("inf"), 1.0]), ValueError, "ratings: must be finite, got inf at row 0"),
        (([1], [2], ["good"]), TypeError, "ratings: expected numbers"),
        (([1], [2], [1.0], [float("nan")]), ValueError, "times"),
    ],
)
def test_bad_columns_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        mf.Interactions.from_arrays(*arguments)


@pytest.fixture(params=["with Polars", "without Polars"])
def reader(request, monkeypatch):
    if request.param == "without Polars":
        monkeypatch.setitem(sys.modules, "polars", None)  # import polars now fails


COLUMNS = {"user": "user", "item": "item", "rating": "stars"}


def write(tmp_path, text):
    path = tmp_path / "log.csv"
    path.write_text(text)
    return path


@pytest.mark.usefixtures("reader")
def test_csv_gives_what_its_arrays_give(tmp_path):
    path = write(tmp_path, 'user,when,item,stars\nu1,3,"a, b",4\nu2,1,c,2.5\nu1,2,c,1\n')
    log = mf.Interactions.from_csv(path, **COLUMNS, time="when")
    same = mf.Interactions.from_arrays(["u1", "u2", "u1"], ["a, b", "c", "c"], [4, 2.5, 1], times=[3, 1, 2])
    for name in ("user_ids", "item_ids", "offsets", "items", "ratings", "times"):
        assert getattr(log, name).tolist() == getattr(same, name).tolist()


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user,item,stars\n1,2,3\n1,3,good\n", "log.csv:3"),
        ("user,item,stars\n1,2,3\n1,3\n", "log.csv:3"),
        ("user,item,rating\n1,2,3\n", "has no column 'stars'; its columns are"),
        ("user,item,stars\n", "log.csv"),
        ("", "log.csv"),
        ("user,item,stars\n1,2,3\n1,3,nan\n", "nan|finite|number"),
    ],
)
def test_broken_files_are_named_with_the_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        mf.Interactions.from_csv(write(tmp_path, text), **COLUMNS)


def test_missing_files_and_extras_are_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere.csv"):
        mf.Interactions.from_csv(tmp_path / "nowhere.csv", **COLUMNS)
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(ImportError, match="reading Parquet needs Polars: pip install 'metarec-fast"):
        mf.Interactions.from_parquet(tmp_path / "log.parquet", **COLUMNS)


def test_parquet_gives_what_its_arrays_give(tmp_path):
    import polars

    polars.DataFrame({"user": [2, 1], "item": ["x", "y"], "stars": [1.0, 2.0]}).write_parquet(tmp_path / "log.parquet")
    log = mf.Interactions.from_parquet(tmp_path / "log.parquet", **COLUMNS)
    assert log.user_ids.tolist() == [1, 2]
    assert log.ratings.tolist() == [2.0, 1.0]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ratings.csv", "userId,movieId,rating,timestamp\n1,31,2.5,1260759144\n7,10,3.0,851868750\n"),
        ("ratings.dat", "1::31::2.5::1260759144\n7::10::3::851868750\n"),
        ("u.data", "1\t31\t2.5\t1260759144\n7\t10\t3\t851868750\n"),
    ],
)
def test_the_movielens_layouts_are_recognised_by_file_or_folder(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    for path in (tmp_path, tmp_path / name):
        log = mf.Interactions.from_movielens(path)
        assert log.user_ids.tolist() == [1, 7]
        assert log.item_ids.tolist() == [10, 31]
        assert log.ratings.tolist() == [2.5, 3.0]
        assert log.times.tolist() == [1260759144, 851868750]


def test_movielens_small_is_there_whole_with_titles():
    log = mf.load_movielens_small()
    assert len(log) == 100_004 - log.num_duplicates
    assert "Toy Story" in log.item_titles[1]


def many_users(count=100):
    users = np.repeat(np.arange(count), 3)
    return mf.Interactions.from_arrays(users, np.tile(np.arange(3), count), np.ones(3 * count))


def test_a_split_has_disjoint_users_one_mapping_and_depends_on_its_seed_alone():
    log = many_users()
    split, again, other = (mf.split_users(log, valid=0.1, test=0.2, seed=seed) for seed in (0, 0, 1))
    parts = [set(part.user_ids.tolist()) for part in (split.train, split.valid, split.test)]
    assert [len(part) for part in parts] == [70, 10, 20]
    assert set.union(*parts) == set(range(100))
    assert all(part.item_ids.tolist() == log.item_ids.tolist() for part in (split.train, split.valid, split.test))
    assert split.test.user_ids.tolist() == again.test.user_ids.tolist()
    assert split.test.user_ids.tolist() != other.test.user_ids.tolist()


def test_leakage_between_the_parts_is_refused():
    log = many_users(4)
    with pytest.raises(ValueError, match="user 1 is in both train and test"):
        mf.UserSplit(log.select_users([0, 1]), log.select_users([2]), log.select_users([1, 3]))


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"test": 1.5}, r"test: a fraction of the users must be in \[0, 1\), got 1.5"),
        ({"test": -1}, "test: a number of users must be ≥ 0, got -1"),
        ({"test": 0.6, "valid": 0.4}, "leave none to train on"),
    ],
)
def test_impossible_splits_are_named(shares, message):
    with pytest.raises(ValueError, match=message):
        mf.split_users(many_users(), **shares)
