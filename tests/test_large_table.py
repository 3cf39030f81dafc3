"""examples/large_table.py: the same as lstsq, in any parts; bad tables are refused."""

import decimal
import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
sys.path.append(str(EXAMPLES))

import large_table  # noqa: E402
from table.reading import TableError, open_table, read_blocks  # noqa: E402

read_moments = large_table.read_moments


def write(path, columns, rows_per_group=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=rows_per_group)


def made(rows=1000, seed=0):
    """Columns of one scale, and a target that depends on each."""
    draw = np.random.default_rng(seed)
    a, b, c = draw.normal(size=(3, rows))
    b += a / 2
    return {"a": a, "b": b, "c": c, "y": a - 2 * b + 3 * c + draw.normal(size=rows)}


def in_files(folder, columns, cuts=(300, 301, 730)):
    rows = len(columns["y"])
    edges = zip((0, *cuts), (*cuts, rows), strict=True)
    for number, (begin, end) in enumerate(edges):
        part = {name: column[begin:end] for name, column in columns.items()}
        write(folder / f"part-{number}.parquet", part)
    return open_table(folder, "y")


def covariance(moments, frame):
    """In the columns' own units, with the mean: what doesn't depend on the frame."""
    mean = moments.sums / moments.n
    products = moments.products / moments.n - np.outer(mean, mean)
    scale = np.outer(frame.unit, frame.unit)
    return products * scale, frame.origin + frame.unit * mean


def assert_same(ours, theirs):
    assert ours[0].n == theirs[0].n
    for a, b in zip(covariance(*ours), covariance(*theirs), strict=True):
        # Of sums of 1000 float32 products in two orders: the square root of 1000 eps.
        np.testing.assert_allclose(a, b, rtol=4e-6, atol=4e-6 * abs(b).max())


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(60, 700),
    scales=st.lists(st.integers(-150, 150), min_size=4, max_size=4),
    offsets=st.lists(st.floats(-1e6, 1e6), min_size=4, max_size=4),
    sort=st.booleans(),
)
def test_it_is_least_squares(tmp_path_factory, seed, rows, scales, offsets, sort):
    """Whatever the columns' scales are, and however far from zero they are."""
    columns = made(rows, seed)
    plain = np.stack(list(columns.values()))
    if sort:
        plain = plain[:, np.argsort(plain[0])]
    scales = 10.0 ** np.array(scales)
    given = scales[:, None] * (plain + np.array(offsets)[:, None])
    folder = tmp_path_factory.mktemp("table")
    table = in_files(folder, dict(zip(columns, given, strict=True)), cuts=(20,))
    fit = large_table.fit(table.columns, *read_moments(table, size=64))

    # The same in units where lstsq loses nothing; the offsets cost float64 six digits.
    x = np.column_stack([*plain[:-1], np.ones(rows)])
    exact = np.linalg.lstsq(x, plain[-1])[0]
    ours = fit.coefficients * scales[:-1] / scales[-1]
    np.testing.assert_allclose(ours, exact[:-1], rtol=1e-4)
    predicted = fit.coefficients @ given[:-1].mean(axis=1) + fit.intercept
    error = (predicted - given[-1].mean()) / scales[-1]
    assert abs(error) < 1e-4 + 1e-14 * 1e6  # of a deviation; and what float64 has there


def test_float32_keeps_what_varies(tmp_path):
    draw = np.random.default_rng(0)
    year = 2000 + draw.integers(-5, 6, 5000).astype(np.int32)
    income = 1e6 + draw.normal(0, 10, 5000)
    y = 3e6 + 2 * year + 5 * income + draw.normal(size=5000)
    table = in_files(tmp_path, {"year": year, "income": income, "y": y})
    fit = large_table.fit(table.columns, *read_moments(table))
    x = np.column_stack([year - 2000, income - 1e6, np.ones(5000)])
    exact = np.linalg.lstsq(x, y - 3e6)[0]
    np.testing.assert_allclose(fit.coefficients, exact[:2], rtol=1e-4)


@pytest.mark.parametrize("size", [1, 7, 300, 5000])
def test_blocks_of_any_size(tmp_path, size):
    table = in_files(tmp_path, made())
    assert_same(read_moments(table, size), read_moments(table, 128))


def test_the_parts_add_up(tmp_path):
    columns = made()
    halves = []
    for name, part in (("first", slice(None, 600)), ("second", slice(600, None))):
        half = {k: v[part] + 100 * (name == "second") for k, v in columns.items()}
        write(tmp_path / name / "part.parquet", half)
        halves.append(read_moments(open_table(tmp_path / name, "y")))
    (one, frame), (two, other) = halves
    moved = large_table.moved(two, *large_table.between(other, frame))
    total = jax.tree.map(lambda a, b: a + b, one, moved)
    assert_same((total, frame), read_moments(open_table(tmp_path, "y")))


def test_one_device_and_eight(tmp_path):
    assert len(jax.devices()) == 8
    table = in_files(tmp_path, made())
    one = read_moments(table, 100, devices=jax.devices()[:1])
    assert_same(read_moments(table, 100, devices=jax.devices()), one)
    assert_same(read_moments(table, 2000, devices=jax.devices()[3:6]), one)


def test_all_kinds_of_numbers(tmp_path):
    draw = np.random.default_rng(0)
    whole = draw.integers(0, 100, 500)
    kinds = {
        "bool": pa.array(whole % 2 == 1),
        "int8": pa.array(whole.astype(np.int8)),
        "uint64": pa.array(whole.astype(np.uint64) + (1 << 50)),
        "float16": pa.array((whole / 4).astype(np.float16)),
        "decimal": pa.array([decimal.Decimal(int(v)) / 4 for v in whole]),
        "dictionary": pa.array(whole).dictionary_encode(),
    }
    y = whole + draw.normal(size=500)
    for name, kind in kinds.items():
        write(tmp_path / name / "part.parquet", {name: kind, "y": y})
        table = open_table(tmp_path / name, "y")
        fit = large_table.fit(table.columns, *read_moments(table))
        as_float = {"bool": whole % 2, "float16": whole / 4, "decimal": whole / 4}
        x = np.column_stack([as_float.get(name, whole), np.ones(500)])
        exact = np.linalg.lstsq(x, y)[0]
        np.testing.assert_allclose(fit.coefficients, exact[:1], rtol=1e-4)


def test_memory_is_that_of_a_few_blocks(tmp_path):
    """Arrow's own count of what was read ahead, and of the blocks."""
    peaks = []
    for rows in (20_000, 200_000):
        write(tmp_path / str(rows) / "part.parquet", made(rows), rows_per_group=1000)
        table = open_table(tmp_path / str(rows), "y")
        before, peak = pa.total_allocated_bytes(), 0
        for block in read_blocks(table.files, table.columns, 500, np.float32):
            assert block.rows == 500
            time.sleep(1e-3)  # for what reads ahead
            peak = max(peak, pa.total_allocated_bytes() - before)
        peaks.append(peak)
    # All rows would be 6.4 MB, and a row group is 32 kB.
    assert 0 < peaks[1] < 5e5
    assert peaks[1] < 2 * peaks[0]


def test_the_bar(tmp_path, capfd):
    table = in_files(tmp_path, made())
    read_moments(table)
    assert capfd.readouterr() == ("", "")
    read_moments(table, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "1000/1000 rows" in err
    assert "a second" in err


def spoiled(value, row=5):
    columns = made(400)
    columns["b"][row] = value
    return columns


def text_at(row):
    columns = made(400)
    columns["b"] = [str(value) for value in columns["b"]]
    if row is not None:
        columns["b"][row] = "n/a"
    return columns


def with_null(row):
    columns = made(400)
    return columns | {
        "b": [None if i == row else v for i, v in enumerate(columns["b"])]
    }


def without(name):
    return {key: column for key, column in made(400).items() if key != name}


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("second", "words"),
    [
        (spoiled(np.nan, 301), ["part-1.parquet, row 301, column `b`", "nan"]),
        (spoiled(-np.inf, 7), ["part-1.parquet, row 7, column `b`", "infinite"]),
        (spoiled(1e300), ["part-1.parquet, row 5, column `b`", "far beyond"]),
        (with_null(350), ["part-1.parquet, row 350, column `b`", "null"]),
        (text_at(17), ["part-1.parquet, row 17, column `b`: 'n/a'", "--without b"]),
        (text_at(None), ["part-1.parquet, column `b`: numbers, written as"]),
        (without("b"), ["part-1.parquet: column `b` is absent, and double in"]),
        (without("y"), ["part-1.parquet: column `y` is absent"]),
        (made(400) | {"z": np.ones(400)}, ["part-1.parquet: column `z` is double"]),
        (made(400) | {"b": np.arange(400)}, ["part-1.parquet: column `b` is int64"]),
        (
            made(400) | {"b": np.arange(400).astype("datetime64[s]")},
            ["part-1.parquet, row 0, column `b`: datetime", "is no number (timestamp"],
        ),
    ],
    ids=lambda value: value[0][:50] if isinstance(value, list) else "",
)
@pytest.mark.parametrize("size", [64, 8192])
def test_a_bad_column_is_named(tmp_path, second, words, size):
    write(tmp_path / "part-0.parquet", made(400))
    write(tmp_path / "part-1.parquet", second)
    with pytest.raises(TableError) as error:
        read_moments(open_table(tmp_path, "y"), size)
    for word in words:
        assert word in str(error.value)


@pytest.mark.bad_input
@pytest.mark.parametrize("row", range(0, 400, 57))
def test_a_row_is_counted_in_its_file(tmp_path, row):
    write(tmp_path / "part-0.parquet", made(390))  # 50 is no part of it
    write(tmp_path / "part-1.parquet", spoiled(np.nan, row))
    with pytest.raises(TableError, match=rf"part-1.parquet, row {row}, column `b`"):
        read_moments(open_table(tmp_path, "y"), 50)


@pytest.mark.bad_input
def test_a_file_cut_short_is_named(tmp_path):
    table = in_files(tmp_path, made())
    path = tmp_path / "part-2.parquet"
    whole = path.read_bytes()
    for length in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(TableError, match=r"part-2.parquet: cut short or damaged\?"):
            open_table(tmp_path, "y")
    path.write_bytes(whole[:500] + bytes(len(whole) - 900) + whole[-400:])
    with pytest.raises(TableError, match=r"part-2.parquet.*: cut short or damaged\?"):
        read_moments(open_table(tmp_path, "y"), 64)
    path.unlink()
    with pytest.raises(TableError, match=r"part-2.parquet.*: cut short or damaged\?"):
        read_moments(table, 64)


@pytest.mark.bad_input
def test_a_table_that_determines_no_fit(tmp_path):
    columns = made()
    columns["twice"] = columns["a"] + columns["c"]
    columns["same"] = np.full(1000, 0.1)
    in_files(tmp_path, columns)

    def fitted(*left_out, target="y"):
        table = open_table(tmp_path, target, left_out)
        moments, frame = read_moments(table, 64)
        return large_table.fit(table.columns, moments, frame)

    with pytest.raises(TableError, match=r"`same` is 0.1 in every row.*--without same"):
        fitted("twice")
    with pytest.raises(TableError, match=r"columns a, c, twice: one follows from"):
        fitted("same")
    with pytest.raises(TableError, match=r"no column `z`: there are a, b, c, y"):
        fitted("same", "twice", target="z")
    with pytest.raises(TableError, match=r"1000 rows of 1 columns are too few"):
        fitted("same", "twice", "a", "b", "c")
    assert fitted("same", "twice").r_squared > 0.8


def test_columns_close_to_each_other_need_float64(tmp_path):
    columns = made()
    columns["a"] = columns["b"] + made(seed=1)["a"] / 20
    table = in_files(tmp_path, columns)
    with pytest.raises(TableError, match=r"columns a, b.*or try --float64"):
        large_table.fit(table.columns, *read_moments(table))
    wide = read_moments(table, dtype=np.float64)
    fit = large_table.fit(table.columns, *wide, dtype=np.float64)
    x = np.column_stack([*list(columns.values())[:-1], np.ones(1000)])
    exact = np.linalg.lstsq(x, columns["y"])[0]
    np.testing.assert_allclose(fit.coefficients, exact[:-1], rtol=1e-6)


@pytest.mark.bad_input
def test_the_command_says_it_in_one_line(tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["large_table.py", *map(str, arguments)])
        large_table.main()

    with pytest.raises(SystemExit, match=r"large_table.py: .*no .parquet file in it"):
        run(tmp_path, "--target", "y")
    run(tmp_path / "made", "--make", 3000)
    before = [path.read_bytes() for path in (tmp_path / "made").iterdir()]
    with pytest.raises(SystemExit, match="it isn't empty; nothing was written"):
        run(tmp_path / "made", "--make", 10)
    assert [path.read_bytes() for path in (tmp_path / "made").iterdir()] == before
    with pytest.raises(SystemExit):
        run(tmp_path / "made")
    capsys.readouterr()
    run(tmp_path / "made", "--target", "spend", "--without", "fee", "--float64")
    out = capsys.readouterr().out
    assert "3,000 rows in 1 files" in out
    assert "stars" in out
    assert "fee" not in out


def test_a_full_disk_leaves_no_half_a_file(tmp_path, monkeypatch):
    def full(table, path, **options):
        pathlib.Path(path).write_bytes(b"PAR1")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(pq, "write_table", full)
    monkeypatch.setattr(sys, "argv", ["large_table.py", str(tmp_path), "--make", "10"])
    with pytest.raises(SystemExit, match="No space left on device"):
        large_table.main()
    assert list(tmp_path.iterdir()) == []


def in_two_processes(good, bad):
    """What each prints for a good table, and how it ends on a bad one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    code = (
        "import sys; import large_table; script, good, bad, *rest = sys.argv\n"
        "sys.argv = [script, good, '--target', 'y', '--distributed', *rest]\n"
        "large_table.main()\n"
        "sys.argv = [script, bad, '--target', 'y']\n"
        "large_table.main()"
    )
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    paths = [str(EXAMPLES), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"}
    running = [
        subprocess.Popen(
            [
                sys.executable,
                "-W",
                "error",
                "-c",
                code,
                good,
                bad,
                address,
                "2",
                str(i),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment | {"PYTHONIOENCODING": "utf-8"},
        )
        for i in range(2)
    ]
    try:
        return [(*run.communicate(timeout=100), run.returncode) for run in running]
    finally:
        for run in running:
            run.kill()


def test_two_processes_read_half_each(tmp_path):
    columns = made()
    table = in_files(tmp_path / "good", columns)
    alone = large_table.fit(table.columns, *read_moments(table))
    columns["b"][400] = np.nan  # in part 2, which process 0 reads
    in_files(tmp_path / "bad", columns)

    (out, err, code), (silent, also, other) = in_two_processes(
        tmp_path / "good", tmp_path / "bad"
    )
    printed = [float(line.split()[1]) for line in out.splitlines()[-4:]]
    expected = [*alone.coefficients, alone.intercept]
    np.testing.assert_allclose(printed, expected, rtol=1e-5, atol=1e-7, err_msg=err)
    assert "coefficient" not in silent
    assert code == other == 1
    for text in (err, also):
        assert "part-2.parquet, row 99, column `b`: it is nan" in text
