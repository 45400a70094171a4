"""The page of a run, and that of a sweep: complete, safe and legible."""

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from torch.utils.tensorboard import SummaryWriter

from conftest import SMALL, SMALL_STEPS, command, compose_config
from nvf.dashboards.page import run_page
from nvf.errors import InputError
from nvf.report import report
from nvf.runs.comparison.table import TESTS
from nvf.runs.curves import CHART
from nvf.train import train

HOSTILE = (
    "</b></style></script><script>alert(1)</script><img src=x onerror=alert(2)>\" onload='x' {{ 7*7 }} \u202e\x1b[2J"
)
CHANCES = {"attention": 0.25, "pipeline": 0.5}


def examples(text: str) -> dict[str, Any]:
    """An examples.json of three queries, every text of which is `text`."""
    candidate = {"row": 3, "id": text, "text": text, "right": True, "probabilities": CHANCES, "words": [text]}
    plain = {**candidate, "right": False, "id": None, "text": None, "words": []}
    ranks = {"won": (1, 1234), "lost": (2, 1), "same": (1, 1)}
    reliability = {
        "error": 0.031,
        "confidence": [0.1, None, 0.9],
        "share_right": [0.2, None, 0.8],
        "queries": [4, 0, 9],
    }
    queries = [
        {
            "query": number,
            "text": text if number else None,
            "ranks": {"pipeline": after, "attention": before},
            "verdict": verdict,
            "candidates": [candidate, plain],
        }
        for number, (verdict, (after, before)) in enumerate(ranks.items())
    ]
    return {
        "compared": ["pipeline", "attention"],
        "queries": queries,
        "reliability": dict.fromkeys(CHANCES, reliability),
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, which tests copy before they change it."""
    folder = tmp_path_factory.mktemp("made") / "run"
    folder.mkdir()
    config = compose_config("cache=off", "dashboards=none", *SMALL, *SMALL_STEPS)
    config["trainer"]["enable_progress_bar"] = False
    train(config, folder, started=0.0)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "a run's"))


class Seen(HTMLParser):
    """What a browser would make of a page: its elements with their attributes, and its words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


def test_a_run_leaves_a_page_of_its_figures_and_how_to_use_it(folder: Path) -> None:
    (folder / "examples.json").write_text(json.dumps(examples("where is <it>?")))
    done = command(str(folder), module="nvf.report", cwd=folder)
    assert (done.returncode, done.stdout) == (0, f"{folder / 'report.html'}\n")
    seen = Seen((folder / "report.html").read_text(encoding="utf-8"))
    results = json.loads((folder / "results.json").read_text())
    top1 = results["test"]["pipeline"]["top1"]["value"]
    for words in (
        f"{100 * top1:.1f}% of test queries",
        "Recall@5",
        "where is <it>?",
        "rank 1,234 → 1",
        "off by 3.1",
        "12 steps in all",
    ):
        assert words in seen.words
    assert f"'pipeline={folder}/pipeline'".replace("run's", "run'\"'\"'s") in seen.words  # as a shell reads it
    assert f'Pipeline.load("{folder}/pipeline")' in seen.words  # as Python does
    assert "attention.epochs" in seen.words
    assert "data.memory._target_" in seen.words
    lines = [made for tag, made in seen.elements if tag == "path" and made.get("class") in ("attention", "reranker")]
    assert [len(re.findall("[ML]", line["d"])) for line in lines] == [2, 3]  # its epochs, and the start of stage 2
    levels = [made for tag, made in seen.elements if tag == "path" and "level" in made.get("class", "")]
    assert len(levels) == 3  # coverage, exact search that is the oracle too, and the diagonal
    assert [made for tag, made in seen.elements if tag == "details" and "open" in made]


def test_nothing_from_a_file_becomes_markup(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    results["config"][HOSTILE] = {HOSTILE: HOSTILE}
    results["versions"][HOSTILE] = HOSTILE
    results["memory"] = HOSTILE
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "examples.json").write_text(json.dumps(examples(HOSTILE)))
    place = folder.rename(folder.with_name("<script>alert(3)<!--"))
    text = run_page(place)
    seen = Seen(text)
    assert {tag for tag, _ in seen.elements} & {
        "script",
        "img",
        "iframe",
        "object",
        "link",
        "a",
        "base",
        "form",
    } == set()
    named = {name for _, attributes in seen.elements for name in attributes}
    assert not {name for name in named if name.startswith("on") or name in ("src", "href", "srcset", "action")}
    assert "default-src 'none'" in text
    assert seen.words.count("<script>alert(1)</script>") > 10
    assert "{{ 7*7 }}" in seen.words
    assert "alert(3)" in seen.words
    assert not {"\u202e", "\x1b"} & set(text)


def test_every_colour_of_letters_is_legible_on_every_ground(made: Path) -> None:
    """WCAG AA: letters have a contrast of 4.5 at least, and what is drawn one of 3."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    style = re.search("<style>(.*)</style>", run_page(made), re.DOTALL)[1]
    light, dark = style.split("prefers-color-scheme: dark", 1)
    for scheme in (light, dark.split("}", 1)[0]):
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", scheme))
        assert len(colours) == 12
        for ground in ("page", "card", "wash"):
            for ink in ("ink", "muted", "grey", "blue", "orange", "purple", "green", "red"):
                dim, bright = sorted((luminance(colours[ink]), luminance(colours[ground])))
                assert (bright + 0.05) / (dim + 0.05) >= 4.5, (ink, ground)
    assert not re.search("color: *(#|rgb)|fill: *#|stroke: *#", style.split("}", 3)[3])  # there are no others


def test_an_older_run_has_a_page_without_examples(folder: Path) -> None:
    assert "probability of the answer" in Seen(run_page(folder)).words  # what a run leaves by itself is shown
    (folder / "examples.json").unlink()
    words = Seen(run_page(folder)).words
    assert "no examples.json" in words
    assert "probability of the answer" not in words


def test_a_stage_that_was_not_fitted_takes_no_room_beside_those_that_were(folder: Path) -> None:
    shutil.rmtree(folder / "curves/stage-1")
    with SummaryWriter(str(folder / "curves/stage-1")) as writer:
        for step in (0, 12):
            writer.add_scalar(CHART, 0.5, step)
    page = run_page(folder)
    assert re.findall(r'<span style="width:([-\d.]+)%">(stage \d)', page) == [("100.00", "stage 2")]
    (line,) = re.findall(r'<path class="attention" d="M0.00 ([\d.]+)L100.00 ([\d.]+)"', page)
    assert line[0] == line[1]


def test_damaged_curves_are_left_out(folder: Path) -> None:
    def lines() -> list[str]:
        return re.findall(r'<path class="(attention|reranker)', run_page(folder))

    assert lines() == ["attention", "reranker"]
    for file in (folder / "curves/pipeline").glob("events.out.tfevents.*"):
        file.write_bytes(file.read_bytes()[:99])
    (folder / "curves/stage-1/events.out.tfevents.1").write_bytes(b"\x00garbage" * 99)
    assert lines() == ["attention"]


def spoil(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def _spoil(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(change(json.loads(path.read_text()) if path.is_file() else examples("x"))))

    return _spoil


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "results.json").unlink(), "to finish it: python"),
        (lambda folder: (folder / "results.json").write_text("{"), "results.json"),
        (spoil("results.json", lambda found: {**found, "test": {}}), "results.json.*; make the run again"),
        (spoil("results.json", lambda found: {**found, "config": []}), "results.json"),
        (lambda folder: (folder / "examples.json").write_text("[]"), "examples.json"),
        (spoil("examples.json", lambda found: {**found, "queries": [{}]}), "examples.json"),
        (
            spoil("examples.json", lambda found: {**found, "reliability": {"pipeline": {"error": "much"}}}),
            "examples.json",
        ),
        (lambda folder: [(folder / name).unlink() for name in ("results.json", "run.json")], "no results.json"),
    ],
)
def test_what_is_unfinished_or_damaged_is_refused_and_no_page_is_left(
    folder: Path, damage: Callable[[Path], Any], message: str
) -> None:
    damage(folder)
    with pytest.raises(InputError, match=message):
        report([folder])
    assert not list(folder.glob("*report.html*"))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_one_folder_is_asked_for(tmp_path: Path, count: int) -> None:
    with pytest.raises(InputError, match="one folder"):
        report([tmp_path / "none", tmp_path][:count])


def test_a_sweep_has_a_page_that_leads_to_its_runs(made: Path, tmp_path: Path) -> None:
    results = json.loads((made / "results.json").read_text())
    for name, k, top1 in (("0", 3, 0.5), ("k=5,<b>", 5, 0.75), ("2", 5, None)):
        (tmp_path / name / ".hydra").mkdir(parents=True)
        (tmp_path / name / ".hydra/overrides.yaml").write_text(f"- k={k}\n")
        if top1 is not None:
            share = {"value": top1, "low": top1 - 0.1, "high": top1 + 0.1}
            fitted = {"pipeline": {**results["val"]["pipeline"], "top1": share}}
            changed = {name: {**results[name], **fitted} for name in ("val", "test")}
            text = json.dumps({**results, **changed, "config": {**results["config"], "k": k}})
            (tmp_path / name / "results.json").write_text(text)
    path = report([tmp_path])
    assert path == str(tmp_path / "report.html")
    seen = Seen(Path(path).read_text(encoding="utf-8"))
    links = [made["href"] for tag, made in seen.elements if tag == "a"]
    assert links == ["./k%3D5%2C%3Cb%3E/", "./0/", "./2/"]  # the best first, and last what has no results
    assert "Without results" in seen.words
    assert "2 settings compared" in seen.words
    assert seen.words.index("75.0") < seen.words.index("50.0")


def test_runs_of_many_settings_are_told_apart_by_their_folders_and_tested(made: Path, tmp_path: Path) -> None:
    results, names = json.loads((made / "results.json").read_text()), [f"s{i}" for i in range(5)]
    for run in ("one", "other"):
        (tmp_path / run).mkdir()
        shutil.copy(made / "answered.npy", tmp_path / run)
        own = {**results, "config": {"seed": 0, **dict.fromkeys(names, run)}, "memory": "m", "queries": "q"}
        (tmp_path / run / "results.json").write_text(json.dumps(own))
    page = Path(report([tmp_path])).read_text(encoding="utf-8")
    assert sorted(re.findall(r'<div class="bar wide(?: top)?"><span>(\w+)</span>', page)) == ["one", "other"]
    assert "s0 = " not in page
    assert TESTS in page
    (tmp_path / "one/answered.npy").unlink()
    assert TESTS not in Path(report([tmp_path])).read_text(encoding="utf-8")
