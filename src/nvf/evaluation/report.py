"""What a run prints: the table, and a plain line for each thing that is not as it should be."""

from collections.abc import Mapping
from typing import Any

from nvf.evaluation.evaluate import ceiling
from nvf.evaluation.gradients import failures, part_of
from nvf.statistics import METRICS, in_percent, p_text, percent, two_digits

NAMES = {"exact": "exact search", "oracle": "oracle", "attention": "stage 1", "pipeline": "pipeline"}


def table(results: Mapping[str, Any], queries: int) -> str:
    """A row a method, in percent with 95% intervals, and below it what bounds the pipeline and what it rests on."""
    figures, against = results["test"], results["against_exact"]
    titles = {**METRICS, "recall": f"Recall@{results['config']['k']}"}
    lines = [
        f"test queries: {queries:,}; percent (95% interval)",
        "".ljust(14) + "".join(title.ljust(20) for title in titles.values()).rstrip(),
    ]
    for method, name in NAMES.items():
        if figures[method] is not None:
            lines.append(name.ljust(14) + "".join(in_percent(figures[method][m]).ljust(20) for m in METRICS).rstrip())
    if (distance := results.get("collection_distance")) is not None:
        lines.append(
            _entry("exact search", f"by cosine, which is not what the collection does: it searches by {distance}")
        )
    lines.append(_entry("coverage", in_percent(figures["coverage"]) + "  target among the candidates"))
    if figures["rerank_given_coverage"] is not None:
        lines.append(_entry("reranker given coverage", in_percent(figures["rerank_given_coverage"])))
    if figures["pipeline"] is not None:
        (name, value), closed = ceiling(figures), figures["gap_closed_interval"]
        told = f"{in_percent(closed)}  of" if closed else f"{'-':>5}  no clear gap from"
        lines.append(_entry("gap closed", f"{told} stage 1 to {name} {percent(value)}"))
    lines.append(_entry("against exact search", _won_and_lost(against)))
    errors = figures["calibration_error"]
    shown = ", ".join(f"{NAMES[method]} {in_percent(errors[method]).strip()}" for method in errors)
    lines.append(_entry("calibration error", shown))
    if (index := results.get("index")) is not None:
        lines += _index(index, results["config"]["k"])
    if (joint := results.get("joint")) is not None:
        lines.append(_entry("before joint training", _before(joint["before"])))
        done = _won_and_lost(joint["against"]) if joint["kept"] else "not clearly better on validation, so not kept"
        lines.append(_entry("joint training", done))
    for group, name in (("seen_rows", "items in the log"), ("unseen_rows", "items not in the log")):
        if figures.get(group) and figures[group]["exact"] is not None:
            lines.append(_entry(name, _by_method(figures[group])))
    for stage, cut in results.get("cut", {}).items():
        name = "stage 1" if stage == "attention" else "joint training"
        lines.append(_entry(f"{name} was cut", f"to {cut_in_words(cut)}"))
    if (by := results.get("attention_fitted_by")) is not None:
        lines.append(_entry("stage 1", f"reused, as {by['folder']} fitted it in {by['seconds']:.0f} s"))
    tried = results.get("selection", [])
    for variant in sorted(tried, key=lambda variant: not variant["chosen"]) if len(tried) > 1 else []:
        name = "stage 1, by validation" if variant["chosen"] else ""
        score = variant["val_top1"] if variant.get("val_ndcg10") is None else variant["val_ndcg10"]  # what chose
        lines.append(_entry(name, f"{percent(score):>5}  {_describe(variant)}"))
    return "\n".join(lines)


def remarks(results: Mapping[str, Any]) -> list[str]:
    """One plain line for each thing that is not as it should be, with what to try; test figures decide none."""
    figures, lines = results["val"], []
    if below := _below(figures, "pipeline", "attention"):
        remedy = "try reranker=residual or a lower reranker.lr, or keep stage 1 alone, stage=attention."
        lines.append(f"{below}: {remedy}")
    if below := _below(figures, "attention", "exact"):
        remedy = (
            "exact search is the oracle of these queries, so no method can be better in expectation."
            if figures["oracle"] == figures["exact"]
            else "try attention=linear or attention=residual, which start at exact search, or a lower attention.lr."
        )
        lines.append(f"{below}: {remedy}")
    if (law := results.get("log")) and law["ignored"]:
        lines.append(
            "Queries are spread over items more evenly than by chance, which has 1 or more (dispersion "
            f"{law['dispersion']:.2f}, asked again {law['asked_again']:.2f}): how often an item is in the log tells "
            "how the queries were dealt, not what will be asked. "
            f"The reranker ignores {', '.join(law['ignored'])}."
        )
    gradients = results.get("gradients")
    if gradients and not gradients["finite"]:
        lines.append("A gradient is not finite: lower the learning rates.")
    lines += failures(gradients["training"] if gradients else {})
    if gradients:
        # Where a whole part has no gradient, no layer of its own holds it up.
        idle = [name for name in gradients["vanished"] if gradients[part_of(name)] == 0]
        blocked = [name for name in gradients["vanished"] if name not in idle]
        for names, reason in (
            (idle, "no audited answer depends on it, as with k=1, or all are certain to float32's last digit"),
            (
                blocked,
                "the layer behind is zero, as in an untrained start, or the units died; try a lower learning rate",
            ),
        ):
            if names:
                lines.append(f"No gradient reaches {', '.join(names)}: {reason}.")
    return lines


def _below(figures: Mapping[str, Any], method: str, reference: str) -> str | None:
    """That a method's validation Top-1 is below another's, where its interval is."""
    if figures[method] is None or figures[method]["top1"]["high"] >= figures[reference]["top1"]["value"]:
        return None
    one, other = (f"{NAMES[name]} ({percent(figures[name]['top1']['value'])})" for name in (method, reference))
    return f"On validation queries, {one} is below {other}"


def _index(index: Mapping[str, Any], k: int) -> list[str]:
    """What searching with an index finds, and how fast."""
    recall, top1 = (in_percent(index[name]).strip() for name in ("recall", "top1"))
    rates = {name: two_digits(rate) for name, rate in index["queries_per_second"].items()}
    return [
        _entry(f"index {index['kind']}", f"recall of the exact {k} candidates {recall}, pipeline Top-1 {top1}"),
        _entry("", f"{rates['index']} queries/s, searched exactly {rates['exact']}"),
    ]


def _won_and_lost(against: Mapping[str, Any]) -> str:
    return f"{against['wins']} queries won, {against['losses']} lost (McNemar p {p_text(against['p'])})"


def _before(figures: Mapping[str, Any]) -> str:
    """What separate training had reached."""
    shares = [f"{NAMES[method]} {percent(figures[method]['top1']['value'])}" for method in ("attention", "pipeline")]
    coverage, error = figures["coverage"]["value"], figures["calibration_error"]["pipeline"]["value"]
    return f"Top-1 of {', '.join(shares)}; coverage {percent(coverage)}, calibration error {percent(error)}"


def _entry(name: str, text: str) -> str:
    return name.ljust(26) + text


def _by_method(group: Mapping[str, Any]) -> str:
    """Top-1 of every method on some of the queries."""
    shares = [f"{NAMES[m]} {percent(found['top1']['value'])}" for m, found in group.items() if found is not None]
    return f"Top-1 of {', '.join(shares)} ({group['exact']['queries']:,} queries)"


def _describe(variant: Mapping[str, Any]) -> str:
    if variant["epochs"]:
        name = f"{variant['transform']} transform, {variant['keys']} keys, {variant['epochs']} epochs"
    else:
        name = "exact search"
    return f"{name}, {variant['hub_share']:g} of the hubness subtracted" if variant["hub_share"] else name


def cut_in_words(cut: Mapping[str, Any]) -> str:
    """What a limit has cut, in words."""
    parts = [f"{cut['kept'][what] or 'no'} of {asked} {what}" for what, asked in cut["asked"].items() if asked]
    return f"{', '.join(parts)}, by {cut['by']}"
