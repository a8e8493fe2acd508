"""Each published format is read from a small file in exactly that form and from its unpacked folder; feedback is filtered."""

from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from mme.data.dataset import PreparedDataset
from mme.errors import UserError
from mme.prepare.pipeline import add_events, prepare

SHARED = Path(__file__).parents[3] / "shared" / "data"


def read(folder: Path) -> dict[Any, list[tuple[Any, int]]]:
    """User → (raw item, timestamp) in order."""
    items = pq.read_table(folder / "items.parquet")["item_id"].to_pylist()
    return {
        row["user_id"]: [(items[index], time) for index, time in zip(row["item_ids"], row["timestamps"], strict=True)]
        for row in pq.read_table(folder / "part-00000.parquet").to_pylist()
    }


def write(path: Path, *lines: str) -> Path:
    """Writes a text file, compressed if its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(f"{line}\n" for line in lines).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".bz2":
        content = bz2.compress(content)
    path.write_bytes(content)
    return path


MOVIELENS_CSV = [
    "userId,movieId,rating,timestamp",
    "1,296,5.0,1147880044",
    "1,306,3.5,1147868817",
    "1,5952,4,1147868828",
]
MOVIELENS_READ = {1: [(306, 1147868817), (5952, 1147868828), (296, 1147880044)]}

KUAIRAND_HEADER = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab"
)
KUAIRAND_ROWS = [
    "0,3411,20220408,200,1649354454131,1,0,0,0,0,0,0,2500,60000,0,0,0,0,1",
    "0,7,20220408,200,1649354460999,0,0,0,0,0,0,0,0,60000,0,0,0,0,1",
    "0,3412,20220408,200,1649354400000,1,1,0,0,0,0,1,59000,60000,0,0,0,0,1",
    "0,3413,20220408,200,1649354500001,1,0,0,0,0,0,1,30000,60000,0,0,0,0,1",
]
KUAIRAND_READ = {0: [(3412, 1649354400), (3411, 1649354454), (3413, 1649354500)]}

KUAIREC = [
    "user_id,video_id,play_duration,video_duration,time,date,timestamp,watch_ratio",
    "14,148,4381,6067,2020-07-05 05:27:48.378,20200705,1593898068.378,0.722103",
    "14,183,11635,6100,2020-07-05 05:28:00.057,20200705,1593898080.057,1.907377",
    "14,3649,22422,10867,,,,2.063311",
    "14,5262,4479,7908,2020-07-05 05:27:10.5,20200705,1593898030.5,0.566388",
]
KUAIREC_READ = {14: [(5262, 1593898030), (148, 1593898068), (183, 1593898080)]}

REVIEW_2014 = {
    "reviewerID": "A1YJEY40YUW4SE", "asin": "7806397051", "reviewerName": "Andrea", "helpful": [3, 4],
    "reviewText": "Very oily, \"creamy\".", "overall": 1.0, "summary": "Don't", "unixReviewTime": 1391040000,
    "reviewTime": "01 30, 2014",
}  # fmt: skip
REVIEW_2018 = {
    "overall": 5.0, "vote": "2", "verified": True, "reviewTime": "10 19, 2014", "reviewerID": "A1YJEY40YUW4SE",
    "asin": "B00004Y2UT", "style": {"Size:": " 86"}, "reviewerName": "N", "reviewText": "ok",
    "unixReviewTime": 1413676800, "image": ["https://example.org/a.jpg"],
}  # fmt: skip
REVIEW_2023 = {
    "rating": 5.0, "title": "Such a lovely scent", "text": "Nice", "images": [{"small_image_url": "x"}],
    "asin": "B00YQ6X8EO", "parent_asin": "B00YQ6X8EP", "user_id": "AGKHLEW2SOWHNMFQIJGBECAF7INQ",
    "timestamp": 1588687728923, "helpful_vote": 0, "verified_purchase": True,
}  # fmt: skip


def reviews(review: dict[str, Any], item: str, time: str, step: int) -> list[str]:
    """Three reviews of one user for different items, the newest first."""
    return [json.dumps({**review, item: f"{review[item]}{n}", time: review[time] - n * step}) for n in range(3)]


CASES: dict[str, tuple[str, str, list[str], dict[Any, Any]]] = {
    "MovieLens 1M": (
        "movielens-1m",
        "ml-1m/ratings.dat",
        ["1::1193::5::978300760", "1::661::3::978302109", "1::914::3::978301968"],
        {1: [(1193, 978300760), (914, 978301968), (661, 978302109)]},
    ),
    "MovieLens 20M": ("movielens-20m", "ml-20m/ratings.csv", MOVIELENS_CSV, MOVIELENS_READ),
    "MovieLens 25M": ("movielens-25m", "ml-25m/ratings.csv", MOVIELENS_CSV, MOVIELENS_READ),
    "MovieLens 32M": ("movielens-32m", "ml-32m/ratings.csv", MOVIELENS_CSV, MOVIELENS_READ),
    "KuaiRand Pure": (
        "kuairand",
        "KuaiRand-Pure/data/log_standard_4_08_to_4_21_pure.csv",
        [KUAIRAND_HEADER, *KUAIRAND_ROWS],
        KUAIRAND_READ,
    ),
    "KuaiRec": ("kuairec", "KuaiRec/data/big_matrix.csv", KUAIREC, KUAIREC_READ),
    "Amazon 2014, ratings only": (
        "amazon",
        "ratings_Beauty.csv",
        ["A39HTATAQ9V7YF,0205616461,5.0,1369699200", "A39HTATAQ9V7YF,0558925278,3.0,1355443200",
         "A39HTATAQ9V7YF,0733001998,4.0,1382572800"],
        {"A39HTATAQ9V7YF": [("0558925278", 1355443200), ("0205616461", 1369699200), ("0733001998", 1382572800)]},
    ),
    "Amazon 2014, 5-core": (
        "amazon-2014",
        "reviews_Beauty_5.json.gz",
        reviews(REVIEW_2014, "asin", "unixReviewTime", 86400),
        {"A1YJEY40YUW4SE": [(f"7806397051{n}", 1391040000 - n * 86400) for n in (2, 1, 0)]},
    ),
    "Amazon 2018, ratings only": (
        "amazon",
        "All_Beauty.csv",
        [f"B0000530H{n},A3CIUOJXQ5VDQ2,5.0,{1413763200 - n}" for n in range(3)],
        {"A3CIUOJXQ5VDQ2": [(f"B0000530H{n}", 1413763200 - n) for n in (2, 1, 0)]},
    ),
    "Amazon 2018, 5-core": (
        "amazon-2018",
        "All_Beauty_5.json.gz",
        reviews(REVIEW_2018, "asin", "unixReviewTime", 86400),
        {"A1YJEY40YUW4SE": [(f"B00004Y2UT{n}", 1413676800 - n * 86400) for n in (2, 1, 0)]},
    ),
    "Amazon 2023, ratings": (
        "amazon",
        "All_Beauty.csv.gz",
        ["user_id,parent_asin,rating,timestamp",
         *(f"AGKHLEW2SOWHNMFQIJGBECAF7INQ,B00YQ6X8E{n},5.0,{1588687728923 - 1000 * n}" for n in range(3))],
        {"AGKHLEW2SOWHNMFQIJGBECAF7INQ": [(f"B00YQ6X8E{n}", 1588687728 - n) for n in (2, 1, 0)]},
    ),
    "Amazon 2023, reviews": (
        "amazon-2023",
        "All_Beauty.jsonl.gz",
        reviews(REVIEW_2023, "parent_asin", "timestamp", 1000),
        {"AGKHLEW2SOWHNMFQIJGBECAF7INQ": [(f"B00YQ6X8EP{n}", 1588687728 - n) for n in (2, 1, 0)]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("auto", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_as_published(tmp_path: Path, case: str, auto: bool) -> None:
    format, name, lines, expected = CASES[case]
    file = write(tmp_path / "in" / name, *lines)
    info = prepare([file], "auto" if auto else format, tmp_path / "out")
    assert read(tmp_path / "out") == expected
    assert info["malformed_rows"] == 0


@pytest.mark.parametrize("size", ["pure", "1k", "27k"])
def test_kuairand_folder(tmp_path: Path, size: str) -> None:
    """All parts of the standard log are read in order, but not the random log or the tables of features."""
    folder = tmp_path / f"KuaiRand-{size}" / "data"
    parts = ["_part1", "_part2"] if size == "27k" else [""]
    names = [f"log_standard_{days}_{size}{part}.csv" for days in ("4_08_to_4_21", "4_22_to_5_08") for part in parts]
    for n, name in enumerate(names):  # all at the same time, so the order is that of the files
        write(folder / name, KUAIRAND_HEADER, f"5,{90 - n},20220408,200,1649354454131,1" + ",0" * 13)
    write(folder / f"log_random_4_22_to_5_08_{size}.csv", KUAIRAND_HEADER, KUAIRAND_ROWS[0])
    write(folder / f"user_features_{size}.csv", "user_id,user_active_degree", "5,full_active")
    for format in (f"kuairand-{size}", "auto"):
        prepare([folder.parent], format, tmp_path / format, min_user_events=1)
        assert read(tmp_path / format) == {5: [(90 - n, 1649354454) for n in range(len(names))]}


def test_other_folders_and_patterns(tmp_path: Path) -> None:
    write(tmp_path / "ml-1m" / "users.dat", "1::F::1::10::48067")
    write(tmp_path / "ml-1m" / "ratings.dat", *CASES["MovieLens 1M"][2])
    prepare([tmp_path / "ml-1m"], "auto", tmp_path / "a")
    assert read(tmp_path / "a") == CASES["MovieLens 1M"][3]
    write(tmp_path / "KuaiRec" / "data" / "big_matrix.csv", *KUAIREC)
    write(tmp_path / "KuaiRec" / "data" / "small_matrix.csv", KUAIREC[0])
    prepare([tmp_path / "KuaiRec"], "kuairec", tmp_path / "b")
    assert read(tmp_path / "b") == KUAIREC_READ
    for day, row in enumerate(["1,5,30", "1,6,20", "1,7,10"]):
        write(tmp_path / "log" / f"2024-01-0{day}.csv.gz", "user_id,item_id,ts", row)
    write(tmp_path / "log" / "_SUCCESS.csv", "nothing")
    for name, source in (("c", tmp_path / "log"), ("d", tmp_path / "log" / "2024-*.gz")):
        info = prepare([source], "csv", tmp_path / name)
        assert read(tmp_path / name) == {1: [(7, 10), (6, 20), (5, 30)]}
        assert [file["name"] for file in info["source"]["files"]] == [f"2024-01-0{day}.csv.gz" for day in range(3)]
    with pytest.raises(UserError, match=r"x-\*: no file matches"):
        prepare([tmp_path / "x-*"], "csv", tmp_path / "e")
    with pytest.raises(UserError, match=r"log: no file of interactions in this folder, expected \*.parquet, \*.pq"):
        prepare([tmp_path / "log"], "parquet", tmp_path / "e")


def test_any_names_in_json_lines(tmp_path: Path) -> None:
    """A broken line, a line without a time and a line with an id of another type are counted, each with its number."""
    rows = [{"who": f"u{n % 2}", "what": n, "when": n, "extra": [n]} for n in range(1, 8)]
    lines = [json.dumps(row) for row in rows]
    lines[2:2] = ['{"who": "u0", "what"', '{"who": "u0", "what": 3}', '{"who": "u0", "what": "x", "when": 1}']
    file = write(tmp_path / "log.jsonl.bz2", *lines)
    names: dict[str, str | None] = {"user": "who", "item": "what", "timestamp": "when"}
    info = prepare([file], "json", tmp_path / "out", columns=names, max_malformed_share=0.5)
    assert read(tmp_path / "out") == {"u0": [(2, 2), (4, 4), (6, 6)], "u1": [(1, 1), (3, 3), (5, 5), (7, 7)]}
    assert info["malformed"] == {
        "not a whole number in what": {"rows": 1, "first": ["log.jsonl.bz2 line 5: 'x'"]},
        "no value in when": {"rows": 1, "first": ["log.jsonl.bz2 line 4"]},
        "not a JSON object with each key once": {"rows": 1, "first": ["log.jsonl.bz2 line 3"]},
    }


@pytest.mark.parametrize(("ending", "codec"), [("gz", "gzip"), ("bz2", "bz2"), ("zst", "zstd"), ("lz4", "lz4")])
def test_compressed(tmp_path: Path, ending: str, codec: str) -> None:
    """The kinds are in two files, which their names distinguish."""
    for name, rows in (("a", ["1,5,30", "1,6,20"]), ("b", ["1,7,10"])):
        with pa.CompressedOutputStream(str(tmp_path / f"{name}.csv.{ending}"), codec) as stream:
            stream.write("".join(f"{line}\n" for line in ["user_id,item_id,ts", *rows]).encode())
    prepare([tmp_path / f"*.csv.{ending}"], "auto", tmp_path / "out")
    assert read(tmp_path / "out") == {1: [(7, 10), (6, 20), (5, 30)]}


@pytest.mark.parametrize("unit", [1, 10**3, 10**6])
def test_the_size_of_times_tells_their_unit(tmp_path: Path, unit: int) -> None:
    rows = [f"1,{n},{(1_600_000_000 + n) * unit + unit // 3}" for n in range(4)]
    prepare([write(tmp_path / "a.csv", "user,item,time", *rows)], "csv", tmp_path / "out")
    assert read(tmp_path / "out") == {1: [(n, 1_600_000_000 + n) for n in range(4)]}


def test_times_that_can_not_be(tmp_path: Path) -> None:
    rows = ["1,2,-5", "1,3,1600000000", "1,4,1600000001", "1,5,1600000002", "1,6,1600000003000"]
    file = write(tmp_path / "a.csv", "user,item,time", *rows)
    info = prepare([file], "csv", tmp_path / "out", max_malformed_share=0.4)
    assert read(tmp_path / "out") == {1: [(n + 3, 1_600_000_000 + n) for n in range(3)]}
    assert info["malformed"] == {
        "negative time in time": {"rows": 1, "first": ["a.csv line 2: '-5'"]},
        "time out of range in time": {"rows": 1, "first": ["a.csv line 6: '1600000003000'"]},
    }
    with pytest.raises(
        UserError, match=r"2 of 5 rows are malformed.*negative time in time: 1 \(first: a.csv line 2: '-5'\)"
    ):
        prepare([file], "csv", tmp_path / "out")


def test_feedback_filters(tmp_path: Path) -> None:
    def kept(format: str, lines: list[str], **options: Any) -> tuple[list[int], dict[str, int]]:
        file = write(tmp_path / "log.csv", *lines)
        info = prepare([file], format, tmp_path / "out", min_user_events=1, **options)
        assert info["unwanted_rows"] == sum(info["unwanted"].values())
        return sorted(item for events in read(tmp_path / "out").values() for item, _ in events), info["unwanted"]

    kuairand = [KUAIRAND_HEADER, *KUAIRAND_ROWS]
    assert kept("kuairand", kuairand) == ([3411, 3412, 3413], {"not clicked": 1})
    assert kept("kuairand", kuairand, clicks_only=False) == ([7, 3411, 3412, 3413], {})
    assert kept("kuairand", kuairand, min_watch_time=30) == (
        [3412, 3413],
        {"not clicked": 1, "watched less than 30 s": 1},
    )
    assert kept("movielens-20m", MOVIELENS_CSV, min_rating=4) == ([296, 5952], {"rating below 4": 1})
    unwanted = {"no time": 1, "watch ratio below 0.7": 1}
    assert kept("kuairec", KUAIREC, min_watch_ratio=0.7) == ([148, 183], unwanted)
    unwanted = {"no time": 1, "watched less than 5 s": 2}
    assert kept("kuairec", KUAIREC, min_watch_time=5) == ([183], unwanted)
    named: dict[str, Any] = {"columns": {"rating": "grade", "click": "opened"}, "clicks_only": True, "min_rating": 2}
    rows = ["user,item,time,grade,opened", "1,1,1,3,true", "1,2,1,1,true", "1,3,1,9,false", "1,4,1,x,true", "1,5,1,2,1"]
    found = kept("csv", rows, max_malformed_share=0.5, **named)
    assert found == ([1, 5], {"rating below 2": 1, "not clicked": 1})


def test_feedback_of_parquet_and_json(tmp_path: Path) -> None:
    table = pa.table({"user": [1] * 4, "item": [1, 2, 3, 4], "time": [1] * 4, "click": [True, False, None, True]})
    pq.write_table(table, tmp_path / "a.parquet")
    options: dict[str, Any] = {"min_user_events": 1, "max_malformed_share": 0.5}
    info = prepare([tmp_path / "a.parquet"], "parquet", tmp_path / "a", clicks_only=True, **options)
    assert read(tmp_path / "a") == {1: [(1, 1), (4, 1)]}
    assert info["malformed"] == {"no number in click": {"rows": 1, "first": ["a.parquet row 2"]}}
    lines = [json.dumps({"user": 1, "item": n, "time": n, "overall": rating}) for n, rating in enumerate([5, 4.5, 4])]
    prepare([write(tmp_path / "b.jsonl", *lines)], "json", tmp_path / "b", min_rating=4.5, **options)
    assert read(tmp_path / "b") == {1: [(0, 0), (1, 1)]}


def test_feedback_that_is_not_there(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "user,item,time,text", "1,2,3,good")
    with pytest.raises(UserError, match=r"a.csv: no column 'rating' \(found: .*\); name it by --rating-column"):
        prepare([file], "csv", tmp_path / "out", min_rating=4)
    beauty = write(tmp_path / "ratings.csv", "A39HTATAQ9V7YF,0205616461,5.0,1369699200")
    with pytest.raises(UserError, match=r"ratings.csv: has no click, only user, item, rating and time"):
        prepare([beauty], "amazon", tmp_path / "out", clicks_only=True)
    unclicked = write(tmp_path / "log.csv", KUAIRAND_HEADER, KUAIRAND_ROWS[1])
    with pytest.raises(UserError, match=r"log.csv: no row of 1 has the feedback asked for \(not clicked: 1\)"):
        prepare([unclicked], "auto", tmp_path / "out")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data, real interactions beside the checkout")
def test_real_kuairand(tmp_path: Path) -> None:
    file = SHARED / "kuairand_pure_std_0425_0508.parquet"
    if "is_click" not in pq.read_schema(file).names:
        pytest.skip("the file has no feedback")
    clicked = pq.read_table(file, columns=["is_click"])["is_click"].to_pylist().count(1)
    names: dict[str, str | None] = {"item": "item_id", "timestamp": "timestamp"}
    info = prepare([file], "parquet", tmp_path / "out", columns=names, clicks_only=True, min_user_events=1)
    assert info["num_events"] + info["duplicate_rows"] == clicked
    assert info["unwanted"] == {"not clicked": info["rows_read"] - clicked}


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data, real interactions beside the checkout")
def test_real_days_added_one_by_one(tmp_path: Path) -> None:
    """A week of KuaiRand that is added day by day equals the week in one run, also through the reader of training sets."""
    log = pq.read_table(SHARED / "kuairand_pure_std_0425_0508.parquet")
    day = pc.floor(pc.divide(log["time_ms"].cast(pa.float64()), 86_400_000.0))
    days = []
    for number, value in enumerate(sorted(set(day.to_pylist()))[:7]):
        days.append(tmp_path / f"{number}.parquet")
        pq.write_table(log.filter(pc.equal(day, value)), days[-1])
    options: dict[str, Any] = {"columns": {"item": "item_id"}, "min_user_events": 3, "min_item_events": 4}
    prepare(days[:4], "kuairand", tmp_path / "grown", **options)
    for file in days[4:]:
        add_events([file], tmp_path / "grown")
    prepare(days, "kuairand", tmp_path / "whole", **options)
    grown, whole = (PreparedDataset.open(tmp_path / name) for name in ("grown", "whole"))
    assert grown.info["statistics"] == whole.info["statistics"]
    assert grown.num_items == whole.num_items > 100 and grown.num_users == whole.num_users > 1000
    assert read(tmp_path / "grown") == read(tmp_path / "whole")


def test_a_compressed_file_that_is_cut_off(tmp_path: Path) -> None:
    rows = [f"{n % 97},{n * 7919 % 10007},{1_600_000_000 + n * 31 % 99991}" for n in range(100_000)]
    file = write(tmp_path / "a.csv.gz", "user,item,time", *rows)
    file.write_bytes(file.read_bytes()[:-20_000])
    with pytest.raises(UserError, match=r"a.csv.gz: can't be read to its end: ") as raised:
        prepare([file], "csv", tmp_path / "out")
    assert "\n" not in str(raised.value)
    lines = [json.dumps({"user": n % 97, "item": n, "time": n}) for n in range(100_000)]
    file = write(tmp_path / "b.jsonl.gz", *lines)
    file.write_bytes(file.read_bytes()[:-20_000])
    with pytest.raises(UserError, match=r"b.jsonl.gz: can't be read to its end: "):
        prepare([file], "json", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv.gz", "b.jsonl.gz"]
