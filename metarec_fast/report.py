"""What an evaluation found, as numbers, as a table, as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from metarec_fast._bootstrap import Comparison, paired_bootstrap
from metarec_fast._columns import as_int

if TYPE_CHECKING:
    from metarec_fast.cold_start import ColdStartCurve
    from metarec_fast.history import History

LOWER_IS_BETTER = ("rmse", "mae", "mae_user")
_METAREC = (
    "Protocol metarec, as in papers after MeLU: a user's query items are ranked among themselves, not in a catalogue.\n"
    "The user chose and rated all of them, so that ranking them at random (chance) already gets most of the gain."
)
_SAMPLED = (
    "sampled_…: a relevant item among itself and {} unrated ones drawn at random, not among the catalogue.\n"
    "Such figures are biased, and may order predictors otherwise than the catalogue does (Krichene and Rendle 2020)."
)


@dataclass(frozen=True, eq=False)
class Report:
    """What `evaluate` found. Printing it gives a table.

    Attributes:
        results: Figures by predictor and metric. Metrics that mean nothing for a predictor are absent.
        chance: What ranking at random gives on average, for the ranking metrics.
        per_user: Metrics of every user that was evaluated, by predictor, [U] in the order of `user_ids`, for paired
            comparisons: `mse`, `mae_user` and the ranking metrics; NaN where a user does not count.
        user_ids: Original ids of these users, [U].
        query_sizes: How many ratings were predicted for each, in all draws together, [U].
        settings: How it was evaluated.
        spread: The standard deviation of the figures over the draws of the support, by predictor and metric; empty for
            one draw.
    """

    results: dict[str, dict[str, float]]
    chance: dict[str, float]
    per_user: dict[str, dict[str, NDArray[np.float64]]]
    user_ids: NDArray[Any]
    query_sizes: NDArray[np.int64]
    settings: dict[str, Any]
    spread: dict[str, dict[str, float]] = field(default_factory=dict)

    def table(self, metrics: Sequence[str] | None = None) -> str:
        """The results as text: a row for each predictor, a column for each metric, the best marked by a star.

        Args:
            metrics: The columns; by default errors, and ranking metrics for the longest list, in the protocol for all.

        Raises:
            ValueError: There is no such metric.
        """
        columns = self.columns(metrics)
        rows = self.results | ({"chance": self.chance} if self.chance else {})

        body = [["", *(name.removeprefix("catalogue_") for name in columns)]]
        for label, figures in rows.items():
            body.append([label, *(self.cell(label, figures, name) for name in columns)])
        lines, widths = align(body)
        return "\n".join([*_headings(columns, widths), *map(str.rstrip, lines), "", self.caption()])

    def compare(
        self, name: str, baseline: str, metric: str = "rmse", resamples: int = 2000, seed: int = 0
    ) -> Comparison:
        """The difference of two predictors in one figure, name − baseline, and how sure it is: a bootstrap over users.

        Args:
            name, baseline: Predictors of this report.
            metric: Any that both have but coverage, which is no mean over users. rmse and mae weigh users by their
                ratings, as in `results`.
            resamples: How often the users are drawn with replacement.
            seed: Which draws.

        Returns:
            `(difference, low, high, p_value)`, with the bounds of the 95% interval. What training and the split might
            do differently another time is not in it: that takes several of them (`comparison.differences`).

        Raises:
            ValueError: There is no such predictor or metric; those known are listed.
        """
        for argument, predictor in (("name", name), ("baseline", baseline)):
            if predictor not in self.results:
                raise ValueError(f"{argument}: expected one of {', '.join(self.results)}, got {predictor!r}")
            known = [own for own in self.results[predictor] if not own.startswith("coverage")]
            if metric not in known:
                raise ValueError(f"metric: expected one of those of {predictor}, {', '.join(known)}, got {metric!r}")
        if as_int("resamples", resamples) < 1:
            raise ValueError(f"resamples: must be ≥ 1, got {resamples}")

        per_user = {"rmse": "mse", "mae": "mae_user"}.get(metric, metric)
        values = np.stack([self.per_user[predictor][per_user] for predictor in (name, baseline)])
        counted = ~np.isnan(values).any(0)
        sizes = self.query_sizes[counted] if metric in ("rmse", "mae") else np.ones(counted.sum())
        return paired_bootstrap(
            values[:, counted],
            sizes.astype(np.float64),
            root=metric == "rmse",
            resamples=resamples,
            seed=as_int("seed", seed),
        )

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Results, chance level, settings and, of several draws, spread as JSON; in a file too where one is named."""
        content = {"results": self.results, "chance": self.chance, "settings": self.settings}
        text = json.dumps(content | ({"spread": self.spread} if self.spread else {}), indent=2)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def to_html(
        self,
        path: str | os.PathLike[str],
        *,
        history: History | None = None,
        curve: ColdStartCurve | None = None,
    ) -> None:
        """One HTML page with everything inside, as `metarec_fast.html_report.write_html` says."""
        from metarec_fast.html_report import write_html

        write_html(path, self, history=history, curve=curve)

    def __str__(self) -> str:
        return self.table()

    def columns(self, metrics: Sequence[str] | None = None) -> list[str]:
        """The metrics that a table shows: those asked for, or those that `table` shows by default."""
        known = known_metrics([self])
        check_metrics(metrics or (), known)
        shown = "" if self.settings.get("protocol") else f"@{max(self.settings['k'])}"
        return list(metrics or (name for name in known if "@" not in name or name.endswith(shown)))

    def cell(self, label: str, figures: Mapping[str, float], metric: str) -> str:
        """A figure as text, "*" behind the best of its column, else " "; "– " where there is none."""
        if metric not in figures:
            return "– "
        values = [other[metric] for other in self.results.values() if metric in other]
        best = min(values) if metric in LOWER_IS_BETTER else max(values)
        # Covering the catalogue is no merit by itself: recommending at random does it best.
        marked = label in self.results and figures[metric] == best and not metric.startswith("coverage")
        deviation = format_deviation(self.spread.get(label, {}).get(metric)) if self.spread else ""
        return f"{figures[metric]:.4f}{deviation}{'*' if marked else ' '}"

    def caption(self) -> str:
        """What was judged, and how, in a line."""
        told = ", ".join(f"{name} {self.settings[name]}" for name in ("support", "query", "order", "seed"))
        draws = f"; mean ± standard deviation over {self.settings['draws']} draws of the support" if self.spread else ""
        caption = f"{len(self.user_ids)} users, {int(self.query_sizes.sum())} ratings to predict; {told}{draws}"
        notes = [_METAREC] if self.settings.get("protocol") == "metarec" else []
        if self.settings.get("sampled_negatives"):
            notes.append(_SAMPLED.format(self.settings["sampled_negatives"]))
        return "\n".join([caption, *notes])


def known_metrics(reports: Iterable[Report]) -> list[str]:
    """The metrics that somebody has, chance included."""
    figures = [figures for report in reports for figures in (*report.results.values(), report.chance)]
    return list(dict.fromkeys(name for row in figures for name in row))


def check_metrics(metrics: Iterable[str], known: Sequence[str]) -> None:
    for name in metrics:
        if name not in known:
            raise ValueError(f"metrics: expected some of {', '.join(known)}, got {name!r}")


def format_deviation(deviation: float | None) -> str:
    """A standard deviation behind its figure, as wide where there is none."""
    return " " * 8 if deviation is None else f" ±{deviation:.4f}"


def align(rows: Sequence[Sequence[str]]) -> tuple[list[str], list[int]]:
    """Rows of cells as lines, the first column to the left, the others to the right; and the columns' widths."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows], widths


def _headings(columns: Sequence[str], widths: Sequence[int]) -> list[str]:
    """The line above the names of metrics that says what was ranked, if the catalogue was."""
    first = next((i for i, name in enumerate(columns) if name.startswith(("catalogue", "coverage"))), None)
    if first is None:
        return []
    ranked = next((i for i in range(first) if columns[i].startswith("ndcg")), first)
    begin, middle = (sum(widths[: i + 1]) + 2 * (i + 1) for i in (ranked, first))
    line = " " * begin + ("ranking the query set" if ranked < first else "")
    return [line.ljust(middle - 2) + "  ranking the catalogue"]
