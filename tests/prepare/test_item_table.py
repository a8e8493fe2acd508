"""`mme prepare --items`: titles and attributes of items, from any kind of file, and what is wrong with such a file."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mme.cli import main
from mme.data.numbering import read_item_labels, read_titles
from mme.errors import UserError
from mme.prepare.item_table import ItemOptions
from mme.prepare.pipeline import add_events, prepare
from tests.object_store import ObjectStore

MOVIES = 'movieId,title,genres\n30,"Big, the ""sequel""",Comedy\n10, Alien ,Horror\n99,Unseen,\n20,,Drama\n'


def write_log(path: Path, items: list[object], day: int = 1) -> Path:
    rows = [f"{user},{item},{day * 86400 + place}\n" for user in (1, 2, 3) for place, item in enumerate(items)]
    path.write_text("user_id,item_id,timestamp\n" + "".join(rows))
    return path


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return write_log(tmp_path / "log.csv", [10, 20, 30, 40])


def rows(folder: Path) -> list[dict[str, object]]:
    return pq.read_table(folder / "items.parquet").drop_columns(["item_index", "count"]).to_pylist()


def test_titles_and_attributes_are_kept(tmp_path: Path, log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "movies.csv").write_text(MOVIES)
    options = ["--items", str(tmp_path / "movies.csv"), "--item-attributes", "genres"]
    assert main(["prepare", str(log), *options, "--output", str(tmp_path / "set")]) == 0
    assert rows(tmp_path / "set") == [
        {"item_id": 10, "title": "Alien", "attribute_genres": "Horror"},
        {"item_id": 20, "title": None, "attribute_genres": "Drama"},
        {"item_id": 30, "title": 'Big, the "sequel"', "attribute_genres": "Comedy"},
        {"item_id": 40, "title": None, "attribute_genres": None},
    ]
    assert read_item_labels(tmp_path / "set").to_pylist() == ["Alien", "20", 'Big, the "sequel"', "40"]
    (run,) = json.loads((tmp_path / "set" / "dataset.json").read_text())["runs"]
    assert {
        key: run["items"][key] for key in ("name", "rows", "items_without_row", "unknown_ids", "first_unknown")
    } == {
        "name": "movies.csv",
        "rows": 4,
        "items_without_row": 1,
        "unknown_ids": 1,
        "first_unknown": ["99"],
    }
    printed = " ".join(capsys.readouterr().out.split())
    assert "items without a row in the file of items │ 1 │" in printed
    assert "rows of other items in that file (first: 99) │ 1 │" in printed


def test_every_kind_of_file_says_the_same(tmp_path: Path, object_store: ObjectStore) -> None:
    log = write_log(tmp_path / "log.csv", [2**63 + 5, 7, 8])
    values = {"id": [7, 2**63 + 5], "name": ["seven", "large"], "year": [1999.0, None]}
    pq.write_table(pa.table({**values, "id": pa.array(values["id"], pa.uint64())}), tmp_path / "items.parquet")
    text = f'{{"id": 7, "name": "seven", "year": 1999}}\n{{"id": {2**63 + 5}, "name": "large"}}\n'
    (tmp_path / "items.jsonl").write_text(text)
    (tmp_path / "items.tsv").write_text(f"id\tname\tyear\n7\tseven\t1999\n{2**63 + 5}\tlarge\t\n")
    url = object_store.put("items.parquet", (tmp_path / "items.parquet").read_bytes())
    found = []
    for path in (tmp_path / "items.parquet", tmp_path / "items.jsonl", tmp_path / "items.tsv", url):
        prepare([log], "auto", tmp_path / "set", items=ItemOptions(str(path), "id", "2", ["year"]))
        found.append(rows(tmp_path / "set"))
    assert (
        found
        == [
            [
                {"item_id": 7, "title": "seven", "attribute_year": "1999"},
                {"item_id": 8, "title": None, "attribute_year": None},
                {"item_id": 2**63 + 5, "title": "large", "attribute_year": None},
            ]
        ]
        * 4
    )


def test_text_ids(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", ["007", "b", "c"])
    (tmp_path / "items.csv").write_text("item_id,title\n007,Bond\n7,Seven\n")
    prepare([log], "auto", tmp_path / "set", items=ItemOptions(str(tmp_path / "items.csv")))
    assert read_item_labels(tmp_path / "set").to_pylist() == ["Bond", "b", "c"]


def test_titles_stay_when_days_are_added(tmp_path: Path, log: Path) -> None:
    (tmp_path / "1.csv").write_text("item_id,title,brand\n10,ten,x\n20,twenty,y\n")
    prepare([log], "auto", tmp_path / "set", items=ItemOptions(str(tmp_path / "1.csv"), attributes=["brand"]))
    add_events([write_log(tmp_path / "day2.csv", [5, 10, 50], 2)], tmp_path / "set")
    expected = {10: "ten", 20: "twenty", 30: None, 40: None, 5: None, 50: None}
    assert {row["item_id"]: row["title"] for row in rows(tmp_path / "set")} == expected
    (tmp_path / "2.csv").write_text("item_id,title\n10,TEN\n50,fifty\n")
    day3 = write_log(tmp_path / "day3.csv", [50, 60, 70], 3)
    add_events([day3], tmp_path / "set", items=ItemOptions(str(tmp_path / "2.csv")))
    assert {row["item_id"]: row["title"] for row in rows(tmp_path / "set")} == {
        **expected,
        10: "TEN",
        50: "fifty",
        60: None,
        70: None,
    }
    assert [row["attribute_brand"] for row in rows(tmp_path / "set")][:2] == ["x", "y"]


def test_a_set_without_titles(tmp_path: Path, log: Path) -> None:
    prepare([log], "auto", tmp_path / "set")
    assert read_titles(tmp_path / "set") is None
    assert read_item_labels(tmp_path / "set").to_pylist() == ["10", "20", "30", "40"]


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("item_id,title\n10,a\n20,b\n10,c\n", [], "row 2: item 10 is also in row 0 (from 0): expected each item once"),
        ("item_id,title\n10,a\n,b\n", [], "line 3: no value in item_id (''): expected the id of an item"),
        (
            "item_id,title\n10,a\n20,b\nx,c\n",
            [],
            "line 4: not a whole number in item_id ('x'): expected the id of an item",
        ),
        ("item_id,title\nx,a\ny,b\n", [], "column 'item_id' holds string ('x'), the item ids of the training set are "),
        ("item_id,title\n10,a\n20,b,c\n", [], "line 3: wrong number of fields, expected 2"),
        ("item_id,title\n", [], "no rows: expected one item per row"),
        ("", [], "empty file: expected interactions"),
        ("key,title\n1,a\n", [], "no column 'item_id' (found: key, title); name it by --item-id-column"),
        ("item_id,text\n1,a\n", [], "no column 'title' (found: item_id, text); name it by --title-column"),
        ("item_id,title\n1,a\n", ["--item-attributes", "brand"], "no column 'brand' (found: item_id, title)"),
        ("item_id,title\n1,a\n", ["--title-column", "name"], "no column 'name' (found: item_id, title)"),
    ],
)
def test_a_wrong_file_is_named_in_one_line(
    tmp_path: Path, log: Path, capsys: pytest.CaptureFixture[str], text: str, more: list[str], message: str
) -> None:
    (tmp_path / "items.csv").write_text(text)
    output = ["--output", str(tmp_path / "set")]
    assert main(["prepare", str(log), "--items", str(tmp_path / "items.csv"), *more, *output]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {tmp_path / 'items.csv'}: {message}") and err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["items.csv", "log.csv"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--title-column", "name"], "--title-column does not go with a command without --items"),
        (["--items", "none.csv"], "none.csv: no such file"),
        (["--items", "s3://bucket/none.csv"], "s3://bucket/none.csv: no such file"),
    ],
)
def test_options_of_items(
    tmp_path: Path,
    log: Path,
    capsys: pytest.CaptureFixture[str],
    object_store: ObjectStore,
    options: list[str],
    message: str,
) -> None:
    assert main(["prepare", str(log), *options, "--output", str(tmp_path / "set")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_items_of_the_generator_are_a_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["prepare", "--synthetic", "quickstart", "--output", str(tmp_path / "set")]
    assert main([*command, "--items", "movies.csv"]) == 2
    assert (
        capsys.readouterr().err == "error: --items movies.csv: expected with --synthetic the number of items, from 1\n"
    )
    assert main([*command, "--items", "40", "--users", "5"]) == 0
    assert pq.read_metadata(tmp_path / "set" / "items.parquet").num_rows == 40


def test_unreadable_titles_are_named(tmp_path: Path, log: Path) -> None:
    prepare([log], "auto", tmp_path / "set")
    table = pq.read_table(tmp_path / "set" / "items.parquet")
    pq.write_table(table.append_column("title", pa.array([1, 2, 3, 4])), tmp_path / "set" / "items.parquet")
    with pytest.raises(UserError, match=r"items.parquet: column 'title' holds int64, expected text"):
        read_titles(tmp_path / "set")


@pytest.mark.parametrize(("id_of_set", "id_of_file"), [(-1, 2**64 - 1), (2**64 - 1, -1)])
def test_a_number_of_the_other_64_bit_type_is_another_item(tmp_path: Path, id_of_set: int, id_of_file: int) -> None:
    log = write_log(tmp_path / "log.csv", [5, 6, id_of_set])
    (tmp_path / "items.csv").write_text(f"item_id,title\n{id_of_file},wrong\n5,five\n")
    info = prepare([log], "auto", tmp_path / "set", items=ItemOptions(str(tmp_path / "items.csv")))
    assert {row["item_id"]: row["title"] for row in rows(tmp_path / "set")} == {5: "five", 6: None, id_of_set: None}
    found = info["runs"][0]["items"]
    assert found["unknown_ids"] == 1 and found["first_unknown"] == [str(id_of_file)]


def test_a_float_beyond_64_bits_stays_what_it_is(tmp_path: Path, log: Path) -> None:
    pq.write_table(pa.table({"item_id": [10, 20], "title": [1e300, 3.0]}), tmp_path / "items.parquet")
    prepare([log], "auto", tmp_path / "set", items=ItemOptions(str(tmp_path / "items.parquet")))
    assert [row["title"] for row in rows(tmp_path / "set")] == ["1e+300", "3", None, None]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("10,ten\n20,twenty\n", "line 1: '10,ten': no header: expected a line with the names of the columns"),
        ('{"id": 10, "title": ["a"]}\n', "'title' holds a list or an object in JSON, expected text or numbers"),
        ('{"id": 10, "title": "a"}\n{"id": 20,\n', "line 2: expected a JSON object with each key once"),
    ],
)
def test_columns_that_would_be_lost_are_named(tmp_path: Path, log: Path, text: str, message: str) -> None:
    (tmp_path / "items").write_text(text)
    with pytest.raises(UserError) as error:
        prepare([log], "auto", tmp_path / "set", items=ItemOptions(str(tmp_path / "items"), "1", "2"))
    assert str(error.value) == f"{tmp_path / 'items'}: {message}"
