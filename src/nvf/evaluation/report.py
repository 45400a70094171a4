"""What a run prints: the table, and a warning with a remedy for each thing that went wrong."""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from nvf.statistics import METRICS, in_percent, p_text, percent, two_digits

NAMES = {
    "exact": "exact search",
    "old": "old model",
    "anew": "embedded anew",
    "aligned": "aligned",
    "oracle": "oracle",
    "words": "words alone",
    "hybrid": "words + exact",
    "attention": "stage 1",
    "pipeline": "pipeline",
}
IMPORTANT = ("top1", "recall", "mrr10", "top5", "ndcg10")  # as many as there is room for are shown
MARGIN, CELL, NAMED, WIDTH = 14, 17, 26, 100  # columns: of a method's name, of a figure, of another name, of a log
STYLES = {"best": "\033[1;32m", "ceiling": "\033[2m"}  # bold green; dim
Figures = Mapping[str, Any]


def table(results: Figures, queries: int, *, width: int = WIDTH, colour: bool = False) -> str:
    """Return the run's table: a row for each method, in percent with 95% intervals, then the other figures by name.

    A `width` of less than 98 columns has room for fewer metrics. `colour`, for terminals, marks what `standings` says.
    """
    figures, titles = results["test"], {**METRICS, "recall": f"Recall@{results['config']['k']}"}
    shown = [metric for metric in METRICS if metric in IMPORTANT[: max(1, (width - MARGIN + 1) // CELL)]]
    lines = [("", "".ljust(MARGIN) + "".join(titles[metric].ljust(CELL) for metric in shown))]
    for method, standing in standings(figures).items():
        cells = [in_percent(figures[method][metric]).replace("100.0", "100").split() for metric in shown]
        row = "".join(f"{value:>4} {ends}".ljust(CELL) for value, ends in cells)
        lines.append((standing, NAMES[method].ljust(MARGIN) + row))
    for name, text in entries(results):
        parts = textwrap.wrap(text, max(width, WIDTH // 2) - NAMED, break_long_words=False, break_on_hyphens=False)
        lines.append(("ceiling" if name == "coverage" else "", name.ljust(NAMED) + f"\n{'':{NAMED}}".join(parts)))
    styled = [f"{STYLES[s]}{line.rstrip()}\033[0m" if colour and s else line.rstrip() for s, line in lines]
    return "\n".join([f"test queries: {queries:,}; percent (95% interval)", *styled])


def standings(figures: Figures) -> dict[str, str]:
    """Return the methods that there are, in the table's order, each with `best`, `ceiling` or nothing.

    Ceilings know what no search does: the oracle, exact search where that is the oracle, a memory embedded anew. Best
    are all others with the highest Top-1.
    """
    top1 = {method: figures[method]["top1"]["value"] for method in NAMES if figures.get(method) is not None}
    ceilings = {"oracle", "anew", "exact" if figures["exact"] == figures["oracle"] else ""}
    best = max(share for method, share in top1.items() if method not in ceilings)
    return {m: "ceiling" if m in ceilings else "best" if share == best else "" for m, share in top1.items()}


def entries(results: Figures) -> Iterator[tuple[str, str]]:
    """Yield what the table says beside the methods' figures: names, which may be empty, and texts."""
    yield from _figures(results)
    yield from _origin(results)


def _figures(results: Figures) -> Iterator[tuple[str, str]]:
    """Yield the figures that belong to no single method, each with its name."""
    figures, errors = results["test"], results["test"]["calibration_error"]
    if (distance := results.get("collection_distance")) is not None:
        yield "exact search", f"by cosine, which is not what the collection does: it searches by {distance}"
    yield "coverage", f"{in_percent(figures['coverage'])}  target among the candidates"
    if figures["rerank_given_coverage"] is not None:
        yield "reranker given coverage", in_percent(figures["rerank_given_coverage"])
    if figures["pipeline"] is not None:
        (name, value), closed = ceiling(figures), figures["gap_closed_interval"]
        told = f"{in_percent(closed)}  of" if closed else f"{'-':>5}  no clear gap from"
        yield "gap closed", f"{told} stage 1 to {name} {percent(value)}"
    if (recovery := figures.get("recovery")) is not None:
        yield "recovery", f"{in_percent(recovery)}  of the Top-10 of everything embedded anew"
    if (aligned := results.get("aligned")) is not None:
        by = " and ".join(aligned["by"])
        how = "whitened" if aligned["shrinkage"] < 1 else "as they are"
        yield "rows are aligned", f"with queries of another model, {how}, by {by}, ridge {aligned['strength']:g}"
        yield "against aligned search", _won_and_lost(results["against_aligned"])
    else:
        yield "against exact search", _won_and_lost(results["against_exact"])
    yield "calibration error", ", ".join(f"{NAMES[method]} {in_percent(errors[method]).strip()}" for method in errors)
    if (index := results.get("index")) is not None:
        k, rates = results["config"]["k"], index["queries_per_second"]
        recall, top1 = (in_percent(index[name]).strip() for name in ("recall", "top1"))
        yield f"index {index['kind']}", f"recall of the exact {k} candidates {recall}, pipeline Top-1 {top1}"
        yield "", f"{two_digits(rates['index'])} queries/s, searched exactly {two_digits(rates['exact'])}"
    if (joint := results.get("joint")) is not None:
        before, kept = joint["before"], joint["kept"]
        coverage, error = (percent(of["value"]) for of in (before["coverage"], before["calibration_error"]["pipeline"]))
        told = _top1({method: before[method] for method in ("attention", "pipeline")})
        yield "before joint training", f"{told}; coverage {coverage}, calibration error {error}"
        told = _won_and_lost(joint["against"]) if kept else "not clearly better on validation, so not kept"
        yield "joint training", told
    for group, name in (("seen_rows", "items in the log"), ("unseen_rows", "items not in the log")):
        if (found := next(filter(None, (figures.get(group) or {}).values()), None)) is not None:
            yield name, f"{_top1(figures[group])} ({found['queries']:,} queries)"


def _origin(results: Figures) -> Iterator[tuple[str, str]]:
    """Yield what limits have cut, where stage 1 comes from, and what it was chosen among."""
    for stage, cut in results.get("cut", {}).items():
        yield f"{'stage 1' if stage == 'attention' else 'joint training'} was cut", f"to {cut_in_words(cut)}"
    if (by := results.get("attention_fitted_by")) is not None:
        yield "stage 1", f"reused, as {by['folder']} fitted it in {by['seconds']:.0f} s"
    tried = results.get("selection", [])
    for variant in sorted(tried, key=lambda variant: not variant["chosen"]) if len(tried) > 1 else []:
        score = variant["val_top1"] if variant.get("val_ndcg10") is None else variant["val_ndcg10"]
        told = "exact search" if results.get("aligned") is None else "aligned search"
        if epochs := variant["epochs"]:
            several = "s" * (epochs > 1)
            told = f"{variant['transform']} transform, {variant['keys']} keys, {epochs} epoch{several}"
        if variant["keys"] == "moved":
            told += (
                f", keys moved by {variant['key_strength']:g}" if variant["key_strength"] else ", no move of keys helps"
            )
        told += f", {variant['hub_share']:g} of the hubness subtracted" if variant["hub_share"] else ""
        yield "stage 1, by validation" if variant["chosen"] else "", f"{percent(score):>5}  {told}"


def ceiling(figures: Figures) -> tuple[str, float]:
    """Return the name and value of what bounds the pipeline's Top-1: coverage, or the oracle's Top-1 if lower."""
    coverage, oracle = figures["coverage"]["value"], figures["oracle"]
    if oracle is not None and oracle["top1"]["value"] < coverage:
        return "oracle", oracle["top1"]["value"]
    return "coverage", coverage


def remarks(results: Figures) -> list[str]:
    """Return a line, with a remedy, for each thing that went wrong; test figures decide nothing."""
    figures, lines = results["val"], []
    alone = "try reranker=residual or a lower reranker.lr, or keep stage 1 alone, stage=attention"
    other = "try attention=linear or attention=residual, or a lower attention.lr"
    first = "exact" if figures["exact"] is not None else "aligned"
    for method, bound, remedy in (("pipeline", "attention", alone), ("attention", first, other)):
        if figures[method] is None or figures["oracle"] == figures[bound]:
            continue
        found, least = figures[method]["top1"], figures[bound]["top1"]["value"]
        if found["high"] < least:
            below = f"{NAMES[method]} ({percent(found['value'])}) is below {NAMES[bound]} ({percent(least)})"
            lines.append(f"On validation queries, {below}: {remedy}.")
    if (law := results.get("log")) and law["ignored"]:
        reason = "the log spreads queries over items more evenly than chance, so past counts say nothing of future ones"
        lines.append(f"The reranker ignores {', '.join(law['ignored'])}: {reason}.")
    if gradients := results.get("gradients"):
        lines += [] if gradients["finite"] else ["A gradient is not finite: lower the learning rates."]
        for stage, summary in gradients["training"].items():
            for part, found in summary.items():
                if part != "steps" and found["not_finite"]:
                    share = f"{found['not_finite']} of {summary['steps']} steps"
                    lines.append(f"{stage}: the gradient on the {part} was not finite in {share}.")
        if names := ", ".join(gradients["vanished"]):
            reason = "a layer behind is zero, as in an untrained start, or no answer depends on it, as with k=1"
            lines.append(f"No gradient reaches {names}: {reason}; a lower learning rate may help.")
    return lines


def _won_and_lost(against: Figures) -> str:
    return f"{against['wins']} queries won, {against['losses']} lost (McNemar p {p_text(against['p'])})"


def _top1(figures: Figures) -> str:
    shares = [f"{NAMES[m]} {percent(found['top1']['value'])}" for m, found in figures.items() if found is not None]
    return f"Top-1 of {', '.join(shares)}"


def cut_in_words(cut: Figures) -> str:
    """Return what a limit has cut, in words."""
    parts = [f"{cut['kept'][what] or 'no'} of {asked} {what}" for what, asked in cut["asked"].items() if asked]
    return f"{', '.join(parts)}, by {cut['by']}"
