"""Comparing runs: held against the same figures by hand."""

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image
from scipy import stats
from torch.utils.tensorboard import SummaryWriter

from conftest import command
from nvf.errors import InputError
from nvf.runs.comparison.figure import draw_curves, write
from nvf.runs.comparison.table import compare
from nvf.runs.curves import CHART, FOLDER


def share(value: float) -> dict[str, float]:
    """An interval of two points on either side, but for the ends."""
    return {"value": value, "low": max(0.0, value - 0.02), "high": min(1.0, value + 0.02)}


def figures(top1: float | None) -> dict[str, Any] | None:
    return top1 if top1 is None else {"top1": share(top1), "mrr10": share(top1 / 2)}


def put(
    folder: Path,
    config: dict[str, Any],
    *,
    val: float,
    test: float | None = None,
    pipeline: bool = True,
    oracle: float | None = None,
    answered: np.ndarray | None = None,
    queries: str | None = "sha256:q",
) -> Path:
    """A run's results.json, and answered.npy beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    if answered is not None and answered.dtype == bool:
        test = float(answered.mean())
    test = val if test is None else test
    splits = {
        name: {
            "exact": figures(0.5),
            "oracle": figures(oracle),
            "attention": figures(max(0.0, top1 - 0.1) if pipeline else top1),
            "pipeline": figures(top1) if pipeline else None,
            "coverage": share(min(1.0, top1 + 0.03)),
        }
        for name, top1 in (("val", val), ("test", test))
    }
    results = {**splits, "config": config, "memory": "sha256:m", **({"queries": queries} if queries else {})}
    (folder / "results.json").write_text(json.dumps(results))
    if answered is not None:
        np.save(folder / "answered.npy", answered)
    return folder / "results.json"


def test_seeds_are_means_with_t_intervals_and_pairs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tests = {k: 0.8 + 0.03 * rng.standard_normal(4) for k in (1, 5)}
    for k, values in tests.items():
        for seed in (3, 1, 2, 0):
            config = {"seed": seed, "k": k, "attention": {"seed": seed}, "threads": seed, "cache": f"c{seed}"}
            put(tmp_path / f"{k}" / f"{seed}", config, val=1 - values.mean(), test=values[seed])
    found = compare([tmp_path])
    assert found.columns == ("k",)
    worse, better = sorted(tests, key=lambda k: tests[k].mean())
    assert [row.value("k") for row in found.rows] == [worse, better]  # by validation, whatever the test says
    for row, values in zip(found.rows, (tests[worse], tests[better]), strict=True):
        reach = stats.t.ppf(0.975, 3) * np.sqrt(values.var(ddof=1) / 4)
        mean = values.mean()
        assert row.figures["test"] == pytest.approx({"value": mean, "low": mean - reach, "high": mean + reach})
        assert row.figures["oracle"] is None
    assert found.rows[0].p is None
    assert found.rows[1].p == pytest.approx(stats.ttest_rel(tests[1], tests[5]).pvalue)
    assert found.rows[1].p_test == "paired t-test"


def test_equal_differences_prove_nothing_and_certain_shares_have_no_nan(tmp_path: Path) -> None:
    for seed in range(3):
        put(tmp_path / f"a{seed}", {"seed": seed, "k": 1}, val=0.99, test=(1.0, 1.0, 0.9)[seed])
        put(tmp_path / f"b{seed}", {"seed": seed, "k": 2}, val=0.98, test=(1.0, 1.0, 0.9)[seed])
        put(tmp_path / f"c{seed}", {"seed": seed, "k": 3}, val=0.97, test=(0.9, 0.9, 0.8)[seed])
    found = compare([tmp_path])
    assert [row.p for row in found.rows] == [None, None, None]
    assert found.rows[0].figures["test"]["high"] == 1.0  # type: ignore[index]
    assert "nan" not in found.csv()


@pytest.mark.filterwarnings("error")
def test_seeds_that_change_nothing_are_held_against_the_queries(tmp_path: Path) -> None:
    right = {1: np.arange(40) < 40, 2: np.arange(40) < 38}
    for k, answered in right.items():
        for seed in range(3):
            put(tmp_path / f"{k}{seed}", {"seed": seed, "k": k}, val=1 / k, answered=answered)
    found = compare([tmp_path])
    assert [row.p for row in found.rows] == [None, 0.5]  # two queries lost, and none won
    assert found.rows[1].p_test == "exact McNemar"
    assert [row.figures["test"] for row in found.rows] == [share(1.0), share(0.95)]  # a run's own


def test_few_seeds_are_held_against_the_same_queries(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    answers = {k: rng.random((2, 300)) < p for k, p in ((1, 0.6), (2, 0.7))}
    for k, both in answers.items():
        for seed in (0, 1):
            put(tmp_path / f"{k}{seed}", {"seed": seed, "k": k}, val=k / 4, answered=both[seed], queries=f"q{seed}")
    wins, losses = (
        sum(int((a & ~b).sum()) for a, b in zip(answers[x], answers[y], strict=True)) for x, y in ((1, 2), (2, 1))
    )
    n, fewer = wins + losses, min(wins, losses)
    row = compare([tmp_path]).rows[1]
    assert row.p == pytest.approx(min(1.0, 2 * sum(stats.binom.pmf(i, n, 0.5) for i in range(fewer + 1))))
    assert row.p_test == "exact McNemar"
    assert compare([tmp_path], "mrr10").rows[1].p is None  # which is no matter of right or wrong

    # Queries that two seeds share count once.
    for k, both in answers.items():
        for seed in (0, 1):
            put(tmp_path / f"{k}{seed}", {"seed": seed, "k": k}, val=k / 4, answered=both[seed], queries="q")
    first = [int((answers[x][0] & ~answers[y][0]).sum()) for x, y in ((1, 2), (2, 1))]
    assert compare([tmp_path]).rows[1].p == pytest.approx(stats.binomtest(first[0], sum(first)).pvalue)


@pytest.mark.parametrize(
    "spoil", ["other queries", "no fingerprint", "other length", "no bools", "pickle", "other seed"]
)
def test_without_the_same_queries_there_is_no_p(tmp_path: Path, spoil: str) -> None:
    right = np.ones(9, bool)
    put(tmp_path / "a", {"seed": 0, "k": 1}, val=0.9, answered=right)
    assert put(tmp_path / "b", {"seed": 0, "k": 2}, val=0.8, answered=~right)
    assert compare([tmp_path]).rows[1].p == pytest.approx(2 * 0.5**9)
    wrong = {"other length": np.ones(8, bool), "no bools": np.ones(9), "pickle": np.array([{}], dtype=object)}
    queries = {"other queries": "sha256:other", "no fingerprint": None}.get(spoil, "sha256:q")
    config = {"seed": int(spoil == "other seed"), "k": 2}
    put(tmp_path / "b", config, val=0.8, answered=wrong.get(spoil, ~right), queries=queries)
    found = compare([tmp_path])
    assert (found.rows[1].p, found.rows[1].p_test) == (None, None)
    assert found.text().splitlines()[3].endswith("- |")


def test_what_was_fitted_last_is_compared_and_shown(tmp_path: Path) -> None:
    put(tmp_path / "a", {"seed": 0, "stage": {"name": "attention"}}, val=0.7, test=0.6, pipeline=False)
    put(tmp_path / "b", {"seed": 0, "stage": {"name": "reranker"}}, val=0.8, test=0.75, oracle=0.9)
    found = compare([tmp_path])
    lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in found.text().splitlines()[:4])
    head, _, best, other = lines
    assert head[1] == "stage.name"
    assert best == ["*", "reranker", "1", "80.0", "75.0 (73.0-77.0)", "65.0", "78.0", "50.0", "90.0", "-"]
    assert other == ["", "attention", "1", "70.0", "60.0 (58.0-62.0)", "60.0", "63.0", "50.0", "-", "-"]

    table = list(csv.DictReader(io.StringIO(found.csv())))
    assert [row["stage.name"] for row in table] == ["reranker", "attention"]
    assert (float(table[0]["test_value"]), float(table[0]["test_low"]), table[0]["best"]) == (0.75, 0.73, "true")
    assert (table[1]["oracle_value"], table[1]["p"], table[1]["n"]) == ("", "", "1")


LINEAR, MLP = ({"transform": name, "hidden": width} for name, width in (("linear", None), ("mlp", 64)))


@pytest.mark.parametrize(
    ("runs", "shown"),
    [
        # a setting that another one follows
        ([(["k=1"], {"k": 1, "n": 2}), (["k=2"], {"k": 2, "n": 4})], {"k": [1, 2]}),
        # a choice that brings its own settings along, named or not
        (
            [(["+attention=linear"], {"attention": LINEAR}), (["attention=mlp"], {"attention": MLP})],
            {"attention": ["linear", "mlp"]},
        ),
        # what says how a run is made, and seeds, are none
        ([(["k=1", "threads=1", "seed=1"], {"k": 1}), (["k=2", "threads=2", "seed=2"], {"k": 2})], {"k": [1, 2]}),
        # a value that needs quotes in YAML and in Hydra's grammar
        ([(["data.dir='1e3'"], {"data": {"dir": "1e3"}}), (["data.dir=a"], {"data": {"dir": "a"}})], None),
        # where the named ones do not tell the runs apart, all that differ do
        (
            [(["k=1"], {"k": 1, "n": 2}), (["k=1"], {"k": 1, "n": 3}), (["k=2"], {"k": 2, "n": 3})],
            {"k": [1, 1, 2], "n": [2, 3, 3]},
        ),
        ([([], {"k": 1, "n": 2}), ([], {"k": 2, "n": 3})], {"k": [1, 2], "n": [2, 3]}),
        # numbers are equal however they are written; true is none
        ([([], {"k": 1}), ([], {"k": 1.0, "seed": 1})], {}),
        ([([], {"k": 1}), ([], {"k": True})], {"k": [1, True]}),
        ([([], {"k": 1}), ([], {})], {"k": [1, None]}),
    ],
)
def test_columns_are_what_the_commands_named(
    tmp_path: Path,
    runs: list[tuple[list[str], dict[str, Any]]],
    shown: dict[str, list[Any]] | None,
) -> None:
    for i, (words, config) in enumerate(runs):
        put(tmp_path / str(i), {"seed": 0, **config}, val=0.9 - i / 10)
        (tmp_path / str(i) / ".hydra").mkdir()
        OmegaConf.save(OmegaConf.create(words), tmp_path / str(i) / ".hydra" / "overrides.yaml")
    shown = {"data.dir": ["1e3", "a"]} if shown is None else shown
    found = compare([tmp_path])
    assert {name: [row.value(name) for row in found.rows] for name in found.columns} == shown


def test_a_damaged_record_of_words_is_none(tmp_path: Path) -> None:
    for k in (1, 2):
        put(tmp_path / str(k), {"seed": 0, "k": k}, val=k / 4)
        (tmp_path / str(k) / ".hydra").mkdir()
        (tmp_path / str(k) / ".hydra" / "overrides.yaml").write_bytes(b"- k=\xff\x00\x1b[31m\n- &a [*a, *a]\n- '=\n")
    assert compare([tmp_path]).columns == ("k",)


def test_the_newest_of_equal_runs_is_kept_and_broken_ones_are_named(tmp_path: Path) -> None:
    old = put(tmp_path / "z", {"seed": 0, "k": 5}, val=0.9)
    new = put(tmp_path / "a", {"seed": 0, "k": 5.0, "resume": True}, val=0.8)
    os.utime(old, (1, 1))
    broken = {
        "cut": new.read_text()[:300],
        "empty": "",
        "other": "[1]",
        "deep": "[" * 100_000,
        "nan": new.read_text().replace("0.8,", "NaN,", 1),
        "huge": new.read_text().replace("0.8,", "9e999,"),
        "none": '{"config": {}, "test": {}, "val": {}}',
        "bytes": b"\xff\xfe\x00",
    }
    for name, text in broken.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    found = compare([tmp_path, tmp_path / "a"])  # a file that is found twice is one run
    assert [row.figures["validation"] for row in found.rows] == [share(0.8)]
    assert len(found.rows[0].runs) == 1
    notes = "\n".join(found.notes)
    for name in broken:
        assert f"{tmp_path / name}/results.json is left out" in notes
        assert "delete it, or run its setting again" in notes
    assert "1 older runs of the same setting and seed are left out" in notes


def test_nothing_to_compare_names_the_remedy(tmp_path: Path) -> None:
    for folders in ([], [tmp_path], [tmp_path / "none"]):
        with pytest.raises(InputError, match=r"no results.json of a run; give folders"):
            compare(folders)
    with pytest.raises(InputError, match="metric=top2 is not known"):
        compare([tmp_path], "top2")
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(InputError, match=r"results.json is left out"):
        compare([tmp_path])


SWEEPS: dict[str, list[dict[str, Any]]] = {
    "one": [{}],
    "numbers": [{"data": {"rows": 10**i}} for i in range(3, 6)],
    "grid": [{"k": k, "attention": {"transform": t}} for k in (1, 2) for t in ("mlp", "a|b $x$\x1b[31m")],
    "random": [{"a": {"lr": 10**-i}, "b": {"lr": (7 * i) % 10 + 0.5}} for i in range(1, 15)],
    "means": [{"k": k, "m": m, "z": z} for k in (1, 2, 3, 4) for m in (1, 2, 3) for z in (None, "x", [1, 2])],
    "many": [{f"s{i}": int(i == j) for i in range(8)} for j in range(9)],
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("sweep", SWEEPS)
def test_every_sweep_has_its_files(tmp_path: Path, sweep: str) -> None:
    for i, settings in enumerate(SWEEPS[sweep]):
        for seed in range(2):
            put(tmp_path / f"{i}-{seed}", {"seed": seed, **settings}, val=0.9 - 0.01 * i + 0.004 * seed)
    comparison = compare([tmp_path])
    assert write(comparison, tmp_path) == f"written to {tmp_path}: comparison.md, .csv, .png"
    files = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert files == {f"comparison.{ending}" for ending in ("md", "csv", "png")}
    assert "\x1b" not in comparison.text()
    with Image.open(tmp_path / "comparison.png") as image:
        assert image.size[0] >= 1000
        assert len(image.convert("RGB").resize((300, 200)).getcolors(1 << 16) or []) > 5  # not blank


def test_each_setting_has_the_curve_of_its_seeds_in_a_band(tmp_path: Path) -> None:
    found = {1: ([0.1, 0.5], [0.3, 0.7]), 2: ([0.2, 0.9], [0.2, 0.9])}  # of two seeds, at the steps 0 and 10
    for k, seeds in found.items():
        for seed, shares in enumerate(seeds):
            folder = put(tmp_path / f"{k}{seed}", {"seed": seed, "k": k}, val=k / 4).parent
            first = 7 * seed  # the other seed reused its stage 1
            for line, points in (("stage-1", [0.1] * seed), ("pipeline", shares)):
                with SummaryWriter(str(folder / FOLDER / line)) as writer:
                    for place, share in enumerate(points):
                        writer.add_scalar(CHART, share, first * (line == "pipeline") + 10 * place)
    (axes,) = draw_curves(compare([tmp_path])).axes
    lines = {str(line.get_label()): line.get_xydata() for line in axes.get_lines()}
    assert lines["k=1"] == pytest.approx(np.array([[0, 20], [10, 60]]))
    assert lines["k=2"] == pytest.approx(np.array([[0, 20], [10, 90]]))
    low, high = (getattr(axes.collections[1].get_paths()[0].vertices[:, 1], end)() for end in ("min", "max"))
    assert (low, high) == (pytest.approx(10), pytest.approx(70))  # k=1, which is not the best
    figure = draw_curves(compare([put(tmp_path / "none" / "0", {"seed": 0}, val=0.5).parent]))
    assert not figure.axes[0].get_lines()  # a run without curves


def test_the_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    for k in (1, 2, 40):
        put(tmp_path / "runs" / f"{k}", {"seed": 0, "k": k}, val=0.5 + k / 100)
    for folder in ("a", "b"):
        write(compare([tmp_path / "runs"]), tmp_path / folder)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_the_command_needs_no_torch_and_prints_the_table_alone(tmp_path: Path) -> None:
    for name in ("torch", "lightning", "hydra", "omegaconf"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')")
    put(tmp_path / "k=1", {"seed": 0, "k": 1}, val=0.5)
    put(tmp_path / "k=2", {"seed": 0, "k": 2}, val=0.6)
    (tmp_path / "k=2" / "worse").mkdir()
    (tmp_path / "k=2" / "worse" / "results.json").write_text("{")
    words = ("k=1", "format=csv", "k=2", "output=made/here")
    done = command(*words, cwd=tmp_path, module="nvf.compare", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert [row["k"] for row in csv.DictReader(io.StringIO(done.stdout))] == ["2", "1"]
    assert "k=2/worse/results.json is left out" in done.stderr
    assert len(list((tmp_path / "made" / "here").iterdir())) == 3

    for wrong, message in (
        ("fromat=csv", "'fromat=csv' is not name=value"),
        ("format=xml", "give one of text, csv"),
    ):
        done = command("k=1", wrong, cwd=tmp_path, module="nvf.compare", PYTHONPATH=str(tmp_path))
        assert (done.returncode, done.stdout) == (1, "")
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_what_a_setting_holds_does_not_reach_the_terminal(tmp_path: Path) -> None:
    for name, value in (("a", "red\x1b[31m\u202e|\n"), ("b", "blue")):
        put(tmp_path / name, {"seed": 0, "k\x1b": value}, val=0.5)
    found = compare([tmp_path])
    assert found.text().count("\\|") == 1
    for text in (found.text(), found.csv()):
        assert "red" in text
        assert not {"\x1b", "\u202e"} & set(text)


def test_only_what_a_file_holds_is_escaped_so_that_a_terminal_shows_the_rest_as_it_is(tmp_path: Path) -> None:
    right = np.ones(20, bool)
    put(tmp_path / "a", {"seed": 0, "k": "<b>`[x]"}, val=0.9, answered=right)
    put(tmp_path / "b", {"seed": 0, "k": "<!--"}, val=0.8, answered=~right)
    (tmp_path / "<i>*").mkdir()
    (tmp_path / "<i>*" / "results.json").write_text("{")
    text = compare([tmp_path]).text()
    for escaped in (r"\<b>\`\[x]", r"\<!--", r"\<i>\*"):
        assert escaped in text
        text = text.replace(escaped, "")
    assert " <0.001 |" in text
    assert "\\" not in text


@pytest.mark.parametrize("depth", [25, 900, 10**6])
def test_deep_settings_are_compared_or_left_out(tmp_path: Path, depth: int) -> None:
    put(tmp_path / "good", {"seed": 0, "k": 1}, val=0.5)
    deep = put(tmp_path / "deep", {"seed": 0, "k": "HERE"}, val=0.5)
    for left, right in (("[", "]"), ('{"a":', "}")):
        deep.write_text(deep.read_text().replace('"HERE"', depth * left + "1" + depth * right))
        found = compare([tmp_path])
        assert len(found.rows) + len(found.notes) == 2
        assert all([found.text(), found.csv()])
        put(tmp_path / "deep", {"seed": 0, "k": "HERE"}, val=0.5)
