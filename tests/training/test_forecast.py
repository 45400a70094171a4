"""A forecast is a function of the sizes, and near what the runs in README.md took."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import compose_config, write_folder
from nvf.training.build import build
from nvf.training.plan import forecast, in_words, plan, steps_of_epoch


@pytest.mark.parametrize(("words", "seconds"), [((), (10, 30)), (("stage=joint",), (20, 60))])
def test_a_default_run_takes_what_the_readme_says(words: tuple[str, ...], seconds: tuple[int, int]) -> None:
    built = build(compose_config("cache=off", *words))
    line = forecast(built, built.variants, None)
    assert line.startswith("stage 1, then stage 2")
    assert ("both together" in line) == bool(words)
    assert "generated queries, 1,000 rows of 128 dimensions" in line
    assert seconds[0] <= int(re.search(r"about (\d+) seconds", line)[1]) <= seconds[1]


def test_what_is_fitted_is_named_and_costs_the_most(tmp_path: Path) -> None:
    write_folder(tmp_path / "f", queries=100)
    built = build(compose_config("data=embeddings", f"data.dir={tmp_path / 'f'}"))
    variants, folds, _ = plan(built.variants, 3, built.config["data"])
    line = forecast(built, variants, folds)
    first, sizes = line.splitlines()
    assert first == "4 variants of stage 1, then stage 2 with 3 folds: about 7 seconds on two cores"
    assert sizes == "80 queries, 50 rows of 8 dimensions"
    assert forecast(built, [], folds).startswith("stage 2 with 3 folds: about")
    assert forecast(replace(built, reranker=None), [], None).startswith("nothing to fit: about")
    assert steps_of_epoch(variants[-1]) == len(variants[-1].data.train_dataloader())
    part = {**built.config, "data": {**built.config["data"], "plan": {"sample": 8192, "bank": None}}}
    assert (
        forecast(replace(built, config=part), variants, folds).splitlines()[2]
        == "of these a part is taken: sample=8,192"
    )


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (4, "4 seconds"),
        (44, "40 seconds"),
        (89, "90 seconds"),
        (100, "2 minutes"),
        (4e3, "70 minutes"),
        (4e4, "10 hours"),
    ],
)
def test_times_are_rounded_coarsely(seconds: float, expected: str) -> None:
    assert in_words(seconds) == expected
    assert in_words(86_400 * 1234) == "1,000 days"
