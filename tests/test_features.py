"""Features: what columns become, as a matrix and against its rows written out, and the files that they come from."""

import datetime
import decimal
import math

import numpy as np
import pandas
import polars
import pytest
import torch

import metarec_fast as mf
from metarec_fast._feature_values import parse_text
from metarec_fast.feature_matrix import FeatureMatrix, only_numbers

FRAME = {
    "id": ["a", "b", "c", "d"],
    "gender": ["f", "m", None, "m"],
    "age": [31.5, 20.0, math.nan, 60.5],
    "genres": [["x", "y"], ["y"], [], None],
    "text": [[1.0, 2.0], [3.0, 2.0], [5.0, 2.0], None],
}


HEADER, FLAGS = "movieId,title,genres\n", "0|" * 18


def written_out(features):
    """X [R, F], from the frame's values by what the documentation says."""
    rows = []
    for row in range(len(FRAME["id"])):
        gender, bag, text = FRAME["gender"][row], FRAME["genres"][row], FRAME["text"][row]
        x = [0.0, 0.0] if gender is None else [(gender == "f") - 1 / 3, (gender == "m") - 2 / 3]
        bags = [[1 / math.sqrt(2), 1 / math.sqrt(2)], [0, 1], [0, 0]]
        x += [0.0, 0.0] if bag is None else list(np.array(bags[row]) - np.mean(bags, 0))
        ages = np.array([31.5, 20, 60.5])
        x += [0.0 if math.isnan(FRAME["age"][row]) else (FRAME["age"][row] - ages.mean()) / ages.std()]
        x += [0.0, 0.0] if text is None else [(text[0] - 3) / np.std([1, 3, 5]), 0.0]
        rows.append(x)
    return torch.tensor(rows, dtype=torch.float64)


def random_matrix(seed=0, rows=7):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(0, 4, (rows,), generator=generator)
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    n = int(offsets[-1])
    return FeatureMatrix(
        torch.randint(0, 6, (n,), generator=generator), torch.rand(n, generator=generator), offsets,
        torch.randint(0, 2, (rows, 2), generator=generator).float(), torch.randn(rows, 3, generator=generator),
        torch.tensor([0, 0, 1, 1, 1, 1]), torch.rand(6, generator=generator),
    )  # fmt: skip


def dense(matrix):
    rows = torch.zeros(matrix.num_rows, matrix.width)
    for row in range(matrix.num_rows):
        for place in range(int(matrix.offsets[row]), int(matrix.offsets[row + 1])):
            rows[row, matrix.values[place]] += matrix.weights[place]
        for value, column in enumerate(matrix.column_of.tolist()):
            rows[row, value] -= matrix.known[row, column] * matrix.means[value]
        rows[row, matrix.means.numel() :] = matrix.dense[row]
    return rows


# ---- columns -----------------------------------------------------------------------------------------------------


def test_types_of_values_decide_what_a_column_is():
    features = mf.Features.from_frame(FRAME)
    kinds = {column.name: (column.kind, column.size) for column in features.columns}
    assert kinds == {"gender": ("category", 2), "age": ("number", 1), "genres": ("bag", 2), "text": ("vector", 2)}
    assert repr(features) == (
        "Features(4 rows; gender: category of 2, age: number, genres: bag of 2, text: vector of 2)"
    )


def test_rows_are_what_the_documentation_says():
    features = mf.Features.from_frame(FRAME)
    rows = features.matrix @ torch.eye(features.width, dtype=torch.float64)
    torch.testing.assert_close(rows, written_out(features), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [pandas.DataFrame, polars.DataFrame])
def test_frames_give_what_a_dict_of_columns_gives(kind):
    features, same = mf.Features.from_frame(kind(FRAME)), mf.Features.from_frame(FRAME)
    assert repr(features) == repr(same)
    for name, part in vars(same.matrix).items():
        assert torch.equal(getattr(features.matrix, name), part), name


def test_whole_numbers_of_few_values_are_codes_and_others_quantities():
    frame = {"id": range(200), "occupation": [i % 21 for i in range(200)], "year": list(range(1800, 2000))}
    features = mf.Features.from_frame(frame)
    assert [(c.kind, c.size) for c in features.columns] == [("category", 21), ("number", 1)]
    features = mf.Features.from_frame(frame, kinds={"occupation": "number"}, columns=["occupation"])
    assert [(c.name, c.kind) for c in features.columns] == [("occupation", "number")]


def test_dates_are_days_and_arrays_are_vectors():
    days = [datetime.date(2000, 1, 1), datetime.date(2000, 1, 3), datetime.date(2000, 1, 5)]
    features = mf.Features.from_frame({"id": [1, 2, 3], "day": days, "image": np.arange(6.0).reshape(3, 2)})
    assert [column.kind for column in features.columns] == ["number", "vector"]
    expected = torch.tensor([-1.0, 0, 1]) * math.sqrt(1.5)
    torch.testing.assert_close(features.matrix.dense, expected[:, None].expand(3, 3).contiguous())


def test_times_are_days_whatever_they_are_kept_in():
    days = ["2000-01-01", "NaT", "2000-01-03"]
    expected = mf.Features.from_frame({"id": [1, 2, 3], "day": np.array(days, "datetime64[D]")}).matrix.dense
    torch.testing.assert_close(expected[:, 0], torch.tensor([-1.0, 0, 1]))
    for column in (
        np.array(days, "datetime64[ns]"),
        pandas.Series(pandas.to_datetime(days)),
        pandas.Series(pandas.to_datetime(days, utc=True)),
        polars.Series([datetime.date(2000, 1, 1), None, datetime.date(2000, 1, 3)]),
        [datetime.date(2000, 1, 1), None, datetime.datetime(2000, 1, 3)],
    ):
        features = mf.Features.from_frame({"id": [1, 2, 3], "day": column})
        assert torch.equal(features.matrix.dense, expected)
        for time in (datetime.date(2000, 1, 2), np.datetime64("2000-01-02T00", "ns"), pandas.Timestamp("2000-01-02")):
            assert not features.encode({"day": time}).dense.any()


@pytest.mark.parametrize(
    ("column", "kind", "values"),
    [
        (pandas.Series([1, None, 2], dtype="Int64"), "category", (1, 2)),
        (pandas.Series([True, None, False], dtype="boolean"), "category", (False, True)),
        (pandas.Series(["a", None, "b"], dtype="category"), "category", ("a", "b")),
        (polars.Series([["a", "b"], None, ["a", None]]), "bag", ("a", "b")),
        ([["a", None], [None], ["a", math.nan, np.str_("b")]], "bag", ("a", "b")),
        ([[np.int64(3)], [4, 3], []], "bag", (3, 4)),
        ([[np.float32(1), np.float32(2)], None, [0.5, 1]], "vector", ()),
        ([decimal.Decimal("1.5"), None, decimal.Decimal(2)], "number", ()),
        ([None, None, math.nan], "category", ()),
    ],
)
def test_what_is_missing_has_no_value_in_columns_of_any_type(column, kind, values):
    features = mf.Features.from_frame({"id": [1, 2, 3], "x": column})
    assert [(column.kind, column.values) for column in features.columns] == [(kind, values)]


def test_vectors_may_be_arrays_tensors_or_lists_and_missing_where_all_of_them_is():
    rows = np.array([[1.0, 2.0], [np.nan, np.nan], [3.0, 0.0]])
    lists = [[1.0, 2.0], None, [3.0, 0.0]]
    expected = mf.Features.from_frame({"id": [1, 2, 3], "text": lists}).matrix.dense
    assert not expected[1].any()
    columns = [rows, torch.from_numpy(rows).bfloat16(), list(rows), [rows[0], None, [3.0, 0]], rows.astype(np.float32)]
    columns += [pandas.Series(list(rows)), polars.Series(lists)]
    columns += [polars.Series(lists, dtype=polars.Array(polars.Float32, 2))]
    for column in columns:
        features = mf.Features.from_frame({"id": [1, 2, 3], "text": column})
        assert [column.kind for column in features.columns] == ["vector"]
        assert torch.equal(features.matrix.dense, expected)
        assert torch.equal(features.encode({"text": rows[0]}).dense, expected[:1])
    bags = mf.Features.from_frame({"id": [1, 2, 3], "tags": rows}, kinds={"tags": "bag"})
    assert bags.columns[0].values == (0, 1, 2, 3)
    with pytest.raises(ValueError, match="text: expected finite numbers, got nan"):
        mf.Features.from_frame({"id": [1, 2], "text": np.array([[1.0, np.nan], [1.0, 2.0]])})


def test_columns_that_a_frame_calls_categories_are_categories():
    frame = pandas.DataFrame({"id": range(120), "shop": pandas.Categorical(list(range(60)) * 2)})
    assert repr(mf.Features.from_frame(frame, min_count=1)) == "Features(120 rows; shop: category of 60)"


def test_columns_that_do_not_vary_say_nothing_and_columns_without_values_are_left_out():
    features = mf.Features.from_frame({"id": [1, 2, 3], "price": [0.1] * 3, "x": [None] * 3}, kinds={"x": "vector"})
    assert features.matrix.dense.abs().max() < 1e-6
    assert repr(features) == "Features(3 rows; price: number; left out: x)"


def test_tables_may_be_empty():
    nobody = mf.Features.from_frame({"id": [], "gender": []})
    assert (len(nobody), nobody.width) == (0, 0)
    assert nobody.matrix.select(nobody.find([7, 8])).num_rows == 2
    nothing = mf.Features.from_frame({"id": [1, 2]})
    joined = nothing.join(mf.Features.from_frame({"id": [2, 3], "x": ["a", "b"]}))
    assert joined.matrix.select(torch.tensor([0])).values.numel() == 0


def test_codes_of_further_rows_are_found_as_text_too():
    features = mf.Features.from_frame({"id": [1, 2, 3], "age": ["18", "18-24", "25"], "tags": [[1], [2, 1], [1]]})
    row = mf.Features.from_frame({"id": [4], "age": [25]})
    assert row.columns[0].values == (25,)
    assert features.encode({"age": 25}).values.tolist() == features.encode({"age": "25"}).values.tolist()
    assert features.encode({"tags": ["2"]}).values.tolist() == features.encode({"tags": [2]}).values.tolist()


def test_values_of_few_rows_are_left_out_unless_the_table_is_small():
    frame = {"id": range(120), "title": [f"film {i}" for i in range(120)], "colour": ["red"] * 116 + ["blue"] * 4}
    features = mf.Features.from_frame(frame)
    assert [(column.name, column.values) for column in features.columns] == [("title", ()), ("colour", ("red",))]
    assert repr(features) == "Features(120 rows; colour: category of 1; left out: title)"
    assert mf.Features.from_frame(frame, min_count=4).columns[1].values == ("blue", "red")
    assert mf.Features.from_frame(frame, min_count=1, max_values=1).columns[1].values == ("red",)


def test_numbers_far_off_are_cut_at_four_deviations():
    features = mf.Features.from_frame({"id": range(1000), "income": [0.5] * 999 + [1e9]})
    assert float(features.matrix.dense.max()) == 4.0


def test_a_further_row_is_encoded_as_the_table_was():
    features = mf.Features.from_frame(FRAME)
    row = {name: FRAME[name][0] for name in FRAME if name != "id"}
    identity = torch.eye(features.width)
    assert torch.equal(features.encode(row) @ identity, features.matrix.select(torch.tensor([0])) @ identity)
    assert not (features.encode({}) @ identity).any()
    unknown = features.encode({"gender": "x"}) @ identity  # known to be neither
    torch.testing.assert_close(unknown[0, :2], torch.tensor([-1 / 3, -2 / 3]))


def test_a_table_can_be_extended_by_rows_and_rows_replaced():
    features = mf.Features.from_frame(FRAME)
    more = features.extended({"id": ["b", "e"], "gender": ["f", "f"], "genres": ["x", ["y"]], "shoe size": [1, 2]})
    assert more.ids.tolist() == ["a", "b", "c", "d", "e"]
    identity = torch.eye(features.width)
    rows, before = more.matrix @ identity, features.matrix @ identity
    torch.testing.assert_close(rows[[0, 2, 3]], before[[0, 2, 3]])
    torch.testing.assert_close(rows[1], (features.encode({"gender": "f", "genres": ["x"]}) @ identity)[0])
    torch.testing.assert_close(rows[4:], features.encode({"gender": "f", "genres": ["y"]}) @ identity)


def test_tables_are_joined_by_id():
    left = mf.Features.from_frame({"id": [1, 2], "colour": ["red", "blue"], "size": [1.5, 2.5]})
    right = mf.Features.from_frame({"id": [3, 2], "genres": [["x"], ["y", "x"]], "year": [1.5, 3.5]})
    both = left.join(right)
    assert both.ids.tolist() == [1, 2, 3]
    rows = both.matrix @ torch.eye(both.width)
    parts = [table.matrix.select(table.find([1, 2, 3])) @ torch.eye(table.width) for table in (left, right)]
    expected = torch.cat([parts[0][:, :2], parts[1][:, :2], parts[0][:, 2:], parts[1][:, 2:]], 1)
    torch.testing.assert_close(rows, expected)
    with pytest.raises(ValueError, match="other: columns of both tables need other names, got colour, size in both"):
        left.join(left)


# ---- the matrix --------------------------------------------------------------------------------------------------


def test_products_equal_those_of_the_rows_written_out():
    matrix = random_matrix()
    rows, weight, other = dense(matrix), torch.randn(matrix.width, 5), torch.randn(matrix.num_rows, 5)
    torch.testing.assert_close(matrix @ weight, rows @ weight)
    torch.testing.assert_close(matrix.transposed_product(other), rows.T @ other)
    torch.testing.assert_close(matrix.gram(), rows.T @ rows)
    more = torch.randn(matrix.num_rows, 2)
    torch.testing.assert_close(dense(matrix.with_dense(more)), torch.cat([rows, more], 1))
    torch.testing.assert_close(only_numbers(more) @ weight[:2], more @ weight[:2])


def test_selected_rows_are_the_rows_and_minus_one_is_zero():
    matrix = random_matrix()
    rows = dense(matrix)
    chosen = matrix.select(torch.tensor([3, -1, 0, 3]))
    torch.testing.assert_close(dense(chosen), torch.stack([rows[3], torch.zeros_like(rows[0]), rows[0], rows[3]]))
    assert matrix.select(torch.empty(0, dtype=torch.int64)).num_rows == 0


def test_products_are_differentiable_in_the_weight():
    matrix = random_matrix()
    weight = torch.randn(matrix.width, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: matrix @ w, (weight,))


# ---- files -------------------------------------------------------------------------------------------------------


def test_text_becomes_numbers_bags_or_strings():
    assert parse_text(["3", "", " 7"], "|") == [3, None, 7]
    assert parse_text(["3.5", "", "7"], "|") == [3.5, None, 7.0]
    assert parse_text(["02460", "94043"], "|") == ["02460", "94043"]
    assert parse_text(["a|b", "", "c"], "|") == [["a", "b"], None, ["c"]]
    assert parse_text(["a|b", "c"], None) == ["a|b", "c"]
    assert parse_text(["3", "NA", "null"], "|") == [3, None, None]  # as other programs write into numbers
    assert parse_text(["DE", "NA"], "|") == ["DE", "NA"]


def test_a_csv_file_gives_ids_of_the_kind_that_a_log_has(tmp_path):
    path = tmp_path / "items.csv"
    path.write_text('item,genres,year\n10,Action|Comedy,1995\n2,"Drama",\n')
    features = mf.Features.from_csv(path, id="item")
    assert features.ids.tolist() == [10, 2]
    assert repr(features) == "Features(2 rows; genres: bag of 3, year: category of 1)"


def test_a_csv_file_may_come_from_other_programs(tmp_path):
    path = tmp_path / "items.csv"
    path.write_bytes(b'\xef\xbb\xbf,item, about,year\r\n0,a,"Two\r\nlines; ""quoted"", both",1995\r\n1,b,x,\r\n\r\n')
    features = mf.Features.from_csv(path, id="item")
    assert features.ids.tolist() == ["a", "b"]
    assert [column.name for column in features.columns] == ["about", "year"]  # not the row numbers of pandas
    assert features.columns[0].values == ('Two\r\nlines; "quoted", both', "x")


def test_a_parquet_file_keeps_its_types(tmp_path):
    polars.DataFrame({"id": ["a", "b"], "tags": [["x"], ["x", "y"]]}).write_parquet(tmp_path / "items.parquet")
    features = mf.Features.from_parquet(tmp_path / "items.parquet")
    assert repr(features) == "Features(2 rows; tags: bag of 2)"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("u.user", "1|24|M|writer|85711\n2|53|F|other|94043\n", ["age", "gender", "occupation", "zip_code"]),
        ("users.dat", "1::M::24::10::48067\n2::F::56::16::70072\n", ["age", "gender", "occupation", "zip_code"]),
        ("movies.dat", "1::Été (1995)::Animation|Comedy\n2::Heat (1995)::Action\n", ["year", "genres"]),
        ("movies.csv", f'{HEADER}1,"Heat, (1995)",Action|Crime\n2,X,(no genres listed)\n', ["year", "genres"]),
        ("u.item", f"1|Heat (1995)|01-Jan-1995||u|{FLAGS}1\n2|X (1990)|||u|{FLAGS}0\n", ["year", "genres"]),
    ],
)  # fmt: skip
def test_tables_of_movielens_are_read(tmp_path, name, text, expected):
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    features = mf.Features.from_movielens(tmp_path / name)
    assert features.ids.tolist() == [1, 2]
    assert [column.name for column in features.columns] == expected
    if "genres" in expected:
        genres = {column.name: column for column in features.columns}["genres"]
        assert genres.kind == "bag"
        assert set(genres.values) <= {"Animation", "Comedy", "Action", "Crime", "Western"}
        assert genres.values


def test_letters_that_are_line_ends_elsewhere_do_not_divide_a_film(tmp_path):
    (tmp_path / "movies.dat").write_bytes(b"1::Wait\x85 (1995)::Drama\r\n\r\n2::Heat (1995)::Action|Crime\r\n")
    features = mf.Features.from_movielens(tmp_path / "movies.dat")
    assert features.ids.tolist() == [1, 2]
    assert repr(features) == "Features(2 rows; year: category of 1, genres: bag of 3)"
    (tmp_path / "ratings.dat").write_text("1::1::5::0\n1::2::4::1\n")
    assert mf.Interactions.from_movielens(tmp_path).item_titles == {1: "Wait\x85 (1995)", 2: "Heat (1995)"}


# ---- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"id": "who"}, ValueError, r"id: the frame has no column 'who'; its columns are 'id', 'gender'"),
        ({"columns": ["height"]}, ValueError, r"columns: the frame has no column 'height'"),
        ({"kinds": {"age": "wave"}}, ValueError, r"kinds\['age'\]: expected one of category, bag, .*, got 'wave'"),
        ({"kinds": {"gender": "number"}}, TypeError, r"gender: expected numbers, got 'f'"),
        ({"kinds": {"text": "category"}}, TypeError, r"text: expected strings, numbers or truth values .* got list"),
        ({"columns": "age"}, TypeError, "columns: expected several names, got the string 'age'"),
        ({"min_count": 0}, ValueError, "min_count: must be ≥ 1, got 0"),
        ({"max_values": 2.5}, TypeError, "max_values: expected an int, got float 2.5"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        mf.Features.from_frame(FRAME, **arguments)


@pytest.mark.parametrize(
    ("frame", "error", "message"),
    [
        ({"id": [1, 1], "x": [1, 2]}, ValueError, "id: each id must come once, got 1 different ones among 2"),
        ({"id": [1, None], "x": [1, 2]}, ValueError, "id: an id is missing, got None at row 1"),
        ({"id": pandas.Series([1, None], dtype="Int64")}, ValueError, "id: an id is missing, got nan at row 1"),
        (pandas.DataFrame([[1, 2, 3]], columns=["id", "x", "x"]), ValueError, "frame: .* once, 'x' comes more often"),
        ([1, 2], TypeError, "frame: expected a pandas or Polars frame or a dict of columns, got list"),
        ({"id": [1, 2], "x": [[["a"]], ["b"]]}, TypeError, r"x: expected strings, .* or bag, got list"),
        ({"id": range(60), "x": [10**400 + i for i in range(60)]}, ValueError, "x: expected numbers that fit float64"),
        ({"id": [1, 2], "x": [1e300, -1.5]}, ValueError, r"x: expected numbers of finite variance, got 1e\+300"),
        ({"id": [1, 2], "x": [1]}, ValueError, "x: expected 2 rows, one per id, got 1"),
        ({"id": [1, 2], "x": [1.5, math.inf]}, ValueError, "x: expected finite numbers, got inf"),
        ({"id": [1, 2], "x": [{"a": 1}, {}]}, TypeError, "x: expected strings, numbers, dates or lists .*, got dict"),
        ({"id": [1, 2], "x": "ab"}, TypeError, "x: expected a column of values, got str"),
    ],
)  # fmt: skip
def test_frames_that_do_not_fit_are_refused_by_name(frame, error, message):
    with pytest.raises(error, match=message):
        mf.Features.from_frame(frame)


def test_vectors_of_other_lengths_and_unknown_columns_are_refused():
    features = mf.Features.from_frame(FRAME)
    with pytest.raises(ValueError, match="text: expected vectors of 2 numbers, got 3"):
        features.encode({"text": [1.0, 2.0, 3.0]})
    with pytest.raises(ValueError, match=r"features: there is no column 'height'; the columns are 'gender', 'age'"):
        features.encode({"height": 3})
    with pytest.raises(TypeError, match="features: expected values by column, got list"):
        features.encode(["gender"])
    with pytest.raises(TypeError, match=r"gender: expected strings, .* got list \['f'\]"):
        features.encode({"gender": ["f"]})
    with pytest.raises(ValueError, match="id: the frame has no column 'id'; its columns are 'who'"):
        features.extended({"who": ["z"]})
    with pytest.raises(ValueError, match="text: expected vectors of one length, got 1, 2"):
        mf.Features.from_frame({"id": [1, 2], "text": [[1.0], [1.0, 2.0]]}, kinds={"text": "vector"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("item,genres\n1,a\n\n2\n", r"items\.csv:4: expected 2 fields, got 1"),
        ('item,about\n1,"a\nb"\n2,"c\nd"\n3\n', r"items\.csv:6: expected 2 fields, got 1"),
        ("item,genres\n1,a\n,b\n", r"items\.csv:3: expected an id, got none"),
        ("item;genres\n1;a\n", "expected fields separated by ',', got the header 'item;genres'"),
        ("item,x,x\n1,2,3\n", "each column must come once, 'x' comes more often"),
        ("film,genres\n1,a\n", "id: .* has no column 'item'; its columns are 'film', 'genres'"),
    ],
)
def test_broken_files_are_named(tmp_path, text, message):
    path = tmp_path / "items.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        mf.Features.from_csv(path, id="item")
    assert "items.csv" in str(raised.value)
    with pytest.raises(FileNotFoundError, match=r"nothing\.csv"):
        mf.Features.from_csv(tmp_path / "nothing.csv")
    with pytest.raises(ValueError, match=r"expected the name of a MovieLens table"):
        mf.Features.from_movielens(path)
    with pytest.raises(ValueError, match="sep: expected one character, got '::'"):
        mf.Features.from_csv(path, sep="::")
    (tmp_path / "users.dat").write_text("1::M::24::10::48067\n2::F::56\n")
    with pytest.raises(ValueError, match=r"users\.dat:2: expected 5 fields separated by '::', got 3"):
        mf.Features.from_movielens(tmp_path / "users.dat")
    (tmp_path / "movies.csv").write_text("movieId,title\n1,Heat\n")
    with pytest.raises(
        ValueError, match=r"movies\.csv: expected the columns movieId, title, genres, got movieId, title"
    ):
        mf.Features.from_movielens(tmp_path / "movies.csv")
