"""Rows of run.py to tables: means over models, intervals over seeds, and ECMFQ against the best baseline item by item.

    python benchmarks/methods/table.py --split test --json benchmarks/results/DATE-methods-test.json --markdown docs/results.md

Average retention is the mean of two ratios to the same floating-point model: VQA accuracy, and mean recall by embedding, the mean of
R@1, R@5 and R@10 both ways. P(yes) has a column of its own and no part in it: in floating point these models are near chance there.
All of it was fixed before the first run on the test split. With ``--markdown`` the tables replace what stands between the page's lines
``<!-- tables: MARK -->`` and ``<!-- end of tables -->``; ``--by-model`` does the same to a page with one table a model and form.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from variants import ABLATIONS, METHODS, OURS, STRESSES  # noqa: E402

# 97.5% quantiles of Student's t by degrees of freedom.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}

COLUMNS = {
    "retention": "average retention %",
    "vqa": "VQA accuracy retention %",
    "recall": "mean recall %",
    "i2t@1": "i→t R@1", "i2t@5": "i→t R@5", "i2t@10": "i→t R@10",
    "t2i@1": "t→i R@1", "t2i@5": "t→i R@5", "t2i@10": "t→i R@10",
    "p_yes": "P(yes) mean recall %",
    "kl": "final-logit KL ×10⁻³",
    "kl_geometric": "KL, geometric mean ×10⁻³",
    "bytes": "bytes of quantized layers %",
}  # fmt: skip
"""Columns of the tables."""

RESAMPLES = 10_000


def load_rows(directory: Path, settings: str) -> list[dict[str, Any]]:
    """Rows of one split; `settings` is the file names' part for settings of every run (empty: none)."""
    rows = []
    for path in sorted(directory.glob("*/*.json")):
        row = json.loads(path.read_text(encoding="utf-8"))
        middle = path.name.removesuffix(f".seed{row['seed']}.json")
        if row["variant"] == "float" or middle.partition(".")[2] == settings:
            rows.append(row)
    return rows


def figures(row: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """One run's figures, in the units of COLUMNS; `reference` is the floating-point model's row."""
    ours, theirs = row["headlines"], reference["headlines"]
    ratios = [ours[key] / theirs[key] for key in ("vqa.accuracy", "embedding.mean")]
    out = {"retention": 100 * sum(ratios) / len(ratios), "vqa": 100 * ratios[0], "recall": 100 * ours["embedding.mean"],
           "p_yes": 100 * ours["p_yes.mean"], "kl": 1000 * ours.get("kl.answers", 0.0),
           "kl_geometric": 1000 * ours.get("kl.answers", 0.0),
           "bytes": 100 * row["quantized_bytes"] / row["quantized_bytes_in_16_bits"] if "quantized_bytes" in row else 100.0}
    for short, way in (("i2t", "image_to_text"), ("t2i", "text_to_image")):
        for k in (1, 5, 10):
            out[f"{short}@{k}"] = 100 * ours[f"embedding.{way}_r@{k}"]
    return out


def summarize(rows: Iterable[dict[str, Any]], forms: Iterable[str]) -> dict[str, dict[str, Any]]:
    """By variant: mean over models and forms of each figure, seed by seed, then mean and 95% t-interval over seeds."""
    forms = set(forms)
    rows = [row for row in rows if row["stress"] in forms]
    run = {(row["model"], row["stress"]) for row in rows if row["variant"] != "float"}
    rows = [row for row in rows if (row["model"], row["stress"]) in run]
    references = {(r["model"], r["stress"]): r for r in rows if r["variant"] == "float"}
    found: dict[str, dict[int, dict[tuple[str, str], dict[str, float]]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        place = (row["model"], row["stress"])
        found[row["variant"]][row["seed"]][place] = figures(row, references[place])
    out = {}
    for variant, by_seed in found.items():
        complete = {seed: list(places.values()) for seed, places in by_seed.items() if len(places) == len(references)}
        if not complete:
            continue
        values = {key: [mean_over_forms(key, [place[key] for place in places]) for places in complete.values()] for key in COLUMNS}
        out[variant] = {"seeds": sorted(complete), "model_forms": len(references),
                        **{key: {"mean": float(np.mean(v)), "half_width": half_width(v)} for key, v in values.items()}}
    return out


def mean_over_forms(key: str, values: list[float]) -> float:
    """Arithmetic, or geometric for the column that says so: a KL of stressed models outweighs that of plain ones a hundred times."""
    if key == "kl_geometric":
        return math.exp(sum(map(math.log, values)) / len(values)) if min(values) > 0.0 else 0.0
    return float(np.mean(values))


def half_width(values: list[float]) -> float | None:
    """Half of the 95% t-interval of the mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    return _T[len(values) - 1] * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def item_scores(row: dict[str, Any]) -> dict[str, np.ndarray]:
    """Per-item scores whose mean is the headline: VQA hits, and for each pair the mean of six recall hits."""
    items = row["items"]
    image, text = (np.asarray(items["embedding"][key]) for key in ("image_ranks", "text_ranks"))
    hits = sum((ranks <= k).astype(float) for ranks in (image, text) for k in (1, 5, 10)) / 6.0
    return {"vqa": np.asarray(items["answers"]["correct"], float), "recall": hits}


def against(rows: list[dict[str, Any]], ours: str, other: str, forms: Iterable[str]) -> dict[str, dict[str, float]]:
    """``ours - other`` in points, averaged over models, forms and seeds, with a paired bootstrap over items.

    Items are drawn once a draw and model: every form and seed of a model is judged on the same ones.
    """
    forms = set(forms)
    by_place: dict[str, dict[str, dict[str, list[np.ndarray]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        if row["variant"] in (ours, other) and row["stress"] in forms:
            for metric, scores in item_scores(row).items():
                by_place[row["model"]][metric][row["variant"] + "/" + row["stress"]].append(scores)
    out = {}
    for metric in ("vqa", "recall"):
        deltas = []
        for metrics in by_place.values():
            sides = []
            for variant in (ours, other):
                means = [np.mean(v, axis=0) for k, v in metrics[metric].items() if k.startswith(variant + "/")]
                sides.append(np.mean(means, axis=0))
            deltas.append(sides[0] - sides[1])
        generator = np.random.default_rng(0)
        draws = np.mean([d[generator.integers(0, len(d), (RESAMPLES, len(d)))].mean(axis=1) for d in deltas], axis=0)
        low, high = np.quantile(draws, [0.025, 0.975])
        out[metric] = {"difference": 100 * float(np.mean([d.mean() for d in deltas])), "low": 100 * float(low), "high": 100 * float(high)}
    return out


def markdown(summary: dict[str, dict[str, Any]], names: Iterable[str], columns: Iterable[str]) -> str:
    """A table of `columns`, best of each among the quantized in bold."""
    columns, names = list(columns), [name for name in names if name in summary]
    lines = ["| | " + " | ".join(COLUMNS[c] for c in columns) + " |", "|---|" + "---|" * len(columns)]
    best = {}
    for c in columns:
        values = [summary[n][c]["mean"] for n in names if n != "float"]
        best[c] = (min if c in ("kl", "kl_geometric", "bytes") else max)(values) if values else None
    for name in names:
        cells = []
        for c in columns:
            value, half = summary[name][c]["mean"], summary[name][c]["half_width"]
            text = f"{value:.2f}" + (f" ± {half:.2f}" if half is not None else "")
            cells.append(f"**{text}**" if name != "float" and value == best[c] and c != "bytes" else text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=HERE / "out" / "rows")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--settings", default="", help="as in the rows' file names, e.g. attention-w4a8")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--markdown", type=Path, help="a page whose tables are replaced, see above")
    parser.add_argument("--by-model", type=Path, help="a page that gets a table for each model and form")
    parser.add_argument("--mark", default="methods", help="which of a page's tables")
    parser.add_argument("--columns", nargs="+", default=list(COLUMNS), choices=list(COLUMNS))
    args = parser.parse_args()
    rows = load_rows(args.rows / args.split, args.settings)
    result = {"split": args.split, "settings": args.settings, "mark": args.mark, "columns": args.columns, **tabulate(rows)}
    text = page(result, args.columns)
    print(text)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.markdown:
        replace_tables(args.markdown, args.mark, text)
    if args.by_model:
        replace_tables(args.by_model, args.mark, page_by_model(result, args.columns))


def tabulate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Summaries by group of forms and of each model and form, and ours against the best baselines of each group."""
    places = sorted({(row["model"], row["stress"]) for row in rows if row["variant"] != "float"})
    present = {stress for _, stress in places}
    groups = {"all": STRESSES, "plain": STRESSES[:1], "stressed": STRESSES[1:], **{s: (s,) for s in STRESSES[1:]}}
    result: dict[str, Any] = {"groups": {}, "against": {}, "models": {
        f"{model}, {stress}": summarize([row for row in rows if row["model"] == model], [stress]) for model, stress in places}}
    shown: set[frozenset[str]] = set()
    for group, given in groups.items():
        forms = frozenset(given) & present
        if not forms or forms in shown:
            continue
        shown.add(forms)
        summary = result["groups"][group] = summarize(rows, forms)
        baselines = [name for name in METHODS if name != OURS and name in summary]
        if OURS not in summary or not baselines:
            continue
        best = {key: max(baselines, key=lambda name, key=key: summary[name][key]["mean"]) for key in ("retention", "recall")}
        best["kl_geometric"] = min(baselines, key=lambda name: summary[name]["kl_geometric"]["mean"])
        result["against"][group] = {"best": best, "paired": {name: against(rows, OURS, name, forms) for name in sorted(set(best.values()))}}
    return result


def page(result: dict[str, Any], columns: Iterable[str]) -> str:
    """A table a group, each followed by ours against the best baselines."""
    parts, columns = [], list(columns)
    for group, summary in result["groups"].items():
        counts = next(iter(summary.values()))
        parts.append(f"### {group}: {counts['model_forms']} checkpoints\n")
        parts.append(markdown(summary, ("float", *METHODS, *ABLATIONS), columns) + "\n")
        found = result["against"].get(group)
        for name, metrics in (found or {"paired": {}})["paired"].items():
            chosen = ", ".join(COLUMNS[key] for key, best in found["best"].items() if best == name)
            figures_ = "; ".join(f"{label} {m['difference']:+.2f} points [{m['low']:+.2f}, {m['high']:+.2f}]"
                                 for label, m in (("VQA accuracy", metrics["vqa"]), ("mean recall", metrics["recall"])))
            parts.append(f"{OURS} - {name} (best baseline by {chosen}), 95% paired bootstrap over items: {figures_}\n")
    return "\n".join(parts)


def page_by_model(result: dict[str, Any], columns: Iterable[str]) -> str:
    """A table for each model and form; means over one checkpoint have no geometric mean of their own."""
    columns = [column for column in columns if column != "kl_geometric"]
    return "\n".join(f"### {place}\n\n{markdown(summary, ('float', *METHODS, *ABLATIONS), columns)}\n"
                     for place, summary in result["models"].items())


def replace_tables(path: Path, mark: str, text: str) -> None:
    """Put `text` between a page's two marks.

    Raises:
        SystemExit: the page lacks the marks.
    """
    page_text = path.read_text(encoding="utf-8")
    start, end = f"<!-- tables: {mark} -->", "<!-- end of tables -->"
    first = page_text.find(start)
    last = page_text.find(end, first)
    if first < 0 or last < 0:
        raise SystemExit(f"{path} has no lines '{start}' and '{end}'")
    path.write_text(page_text[: first + len(start)] + "\n" + text + page_text[last:], encoding="utf-8")


if __name__ == "__main__":
    main()
