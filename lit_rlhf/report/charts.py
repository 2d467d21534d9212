"""The charts of the report as Vega-Lite specifications, which the browser draws and which are saved as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from lit_rlhf.report.panels import COST, SECTIONS, Panel, panels_of
from lit_rlhf.report.run import Run, thinned
from lit_rlhf.report.summary import WIN_RATE, phases

MOST_ROWS = 1000
"""The maximum number of iterations, and of validations, that the charts show for all runs together.

Each run has an equal share, which is at least 20, so that the report of many runs may exceed this maximum.
"""
SMOOTHED_FROM = 60
"""If the longest run has at least this number of iterations, curves are drawn pale, each with its moving mean."""
LIGHT = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#999933", "#333333")
DARK = ("#56B4E9", "#FF9E4A", "#2BD4A0", "#EE99CC", "#F0E442", "#DDDDDD")
"""The colours of runs on light and dark pages, which colour-blind readers can tell apart; after Okabe and Ito 2008."""
PHASES = ("#44AA99", "#DDCC77", "#CC6677", "#88CCEE", "#AA4499")
"""The colours of the phases of an iteration; source: Tol 2021, "muted"."""
WIDTH, HEIGHT = 420, 220


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart; its data, the rows of the report's `Table`, are stored once for all charts."""

    name: str  # of the PNG file, without its extension
    section: str
    spec: dict[str, Any]


class Table:
    """The metrics of all runs as one list of rows, with short names for the columns.

    Args:
        runs: The runs. If a run has more iterations or more validations than its share of ``MOST_ROWS``, only evenly
            spaced ones are kept.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.names: dict[str, str] = {}
        self.rows: list[dict[str, Any]] = []
        self.left_out = 0
        for run in runs:
            for held_out in (False, True):
                part = [row for row in run.rows if any(name.startswith("val/") for name in row) == held_out]
                kept = thinned(part, max(20, MOST_ROWS // len(runs)))
                self.left_out += len(part) - len(kept)
                self.rows += [self._row(run, row) for row in kept]

    def field(self, metric: str) -> str:
        """Return the short name of a metric, which is the name of its column."""
        return self.names.setdefault(metric, f"m{len(self.names)}")

    def _row(self, run: Run, row: dict[str, float]) -> dict[str, Any]:
        short = {self.field(name): float(f"{value:.5g}") for name, value in row.items()}
        return {"run": run.name, "iteration": int(row.get("progress/iteration", 0))} | short


def make_charts(runs: Sequence[Run], table: Table) -> list[Chart]:
    """Return the charts for which the runs have numbers, in the order in which the page shows them."""
    charts = []
    for section, panels in panels_of(runs).items():
        for panel in panels:
            charts.append(_chart(panel.title, section, runs, _curve(panel, runs, table), panel_note(panel, runs)))
            if panel.title == "KL to the reference" and any("objective/score" in run.columns for run in runs):
                held = any("val/score" in run.columns for run in runs)
                layers = _frontier(table, ("objective/", "val/") if held else ("objective/",))
                note = "small points: each iteration" + ("; large points: held-out data" if held else "")
                charts.append(_chart("Score against KL", section, runs, layers, note))
    for run in [run for run in runs if phases(run)]:
        title = "Time by phase" + (f": {run.name}" if len(runs) > 1 else "")
        stack = alt.layer(_time(run, table), data=alt.NamedData(name="rows")).properties(title=title)
        charts.append(Chart(_file_name(title), "Time and memory", _finished(stack)))
    return sorted(charts, key=lambda chart: list(SECTIONS).index(chart.section))


def panel_note(panel: Panel, runs: Sequence[Run]) -> str:
    """Return the explanation of a panel's lines and points, which is shown under the title of the panel."""
    window = _window(runs)
    trained = any(panel.trained in run.columns for run in runs)
    held_out = any(panel.held_out in run.columns for run in runs)
    line = f"pale: each iteration; line: mean of {2 * window + 1} points" if window else "line: each iteration"
    point = "points: held-out data" if panel not in COST else ""
    return "; ".join(text for text, shown in ((line, trained), (point, held_out)) if shown)


def theme(dark: bool) -> dict[str, Any]:
    """Return the colours and fonts of all charts, as a Vega-Lite configuration."""
    ink, pale, grid = ("#d7dce2", "#98a2ae", "#323a44") if dark else ("#22272e", "#5b6570", "#e3e7eb")
    text = {
        "labelColor": pale,
        "titleColor": pale,
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
    }
    return {
        "background": "transparent" if dark else "white",
        "font": "system-ui, -apple-system, Segoe UI, Liberation Sans, Arial, sans-serif",
        "view": {"stroke": None},
        "axis": {**text, "gridColor": grid, "domainColor": grid, "tickColor": grid, "labelOverlap": True},
        "legend": {**text, "title": None, "orient": "bottom", "symbolOpacity": 1},
        "title": {
            "color": ink,
            "subtitleColor": pale,
            "fontSize": 14,
            "subtitleFontSize": 11,
            "anchor": "start",
            "offset": 12,
        },
        "range": {"category": list(DARK if dark else LIGHT)},
    }


def _window(runs: Sequence[Run]) -> int:
    """Return the number of rows by which the moving mean extends to each side; 0 if the runs are too short for it."""
    longest = max((len(run.values("progress/iteration")) for run in runs), default=0)
    return min(longest, MOST_ROWS // len(runs)) // 40 if longest >= SMOOTHED_FROM else 0


def _chart(title: str, section: str, runs: Sequence[Run], layers: list[alt.Chart], note: str) -> Chart:
    domain = [run.name for run in runs]
    legend = alt.Legend() if len(runs) > 1 else None
    color = alt.Color("run", type="nominal", scale=alt.Scale(domain=domain), legend=legend)
    colored = [layer.encode(color=color) for layer in layers]
    chart = alt.layer(*colored, data=alt.NamedData(name="rows")).properties(title=alt.Title(title, subtitle=note))
    return Chart(_file_name(title), section, _finished(chart))


def _finished(chart: Any) -> dict[str, Any]:
    return chart.properties(width=WIDTH, height=HEIGHT).to_dict(validate=False)  # validating takes most of the time


def _curve(panel: Panel, runs: Sequence[Run], table: Table) -> list[alt.Chart]:
    found = {name for run in runs for name in run.columns}
    x = alt.X("iteration", type="quantitative", title="iteration", axis=alt.Axis(format=",d", tickMinStep=1))
    axis = alt.Axis(tickCount=5, **_axis_format(panel, runs))
    scale = _scale(panel, runs)
    layers = []
    for name in [name for name in panel.columns if name in found]:
        field = table.field(name)
        y = alt.Y(field, type="quantitative", title=panel.unit, axis=axis, scale=scale)
        tooltip = [
            alt.Tooltip("run", type="nominal"),
            alt.Tooltip("iteration", type="quantitative", format=",d"),
            alt.Tooltip(field, type="quantitative", title=name, format=".3~p" if panel.percent else ".4~g"),
        ]
        base = alt.Chart().transform_filter(f"isValid(datum.{field})").encode(x=x, y=y, tooltip=tooltip)
        if name == panel.held_out:
            layers += [
                base.mark_line(strokeDash=[4, 3], tooltip=False),
                base.mark_point(filled=True, size=55, opacity=1),
            ]
            if name in WIN_RATE and found.issuperset(WIN_RATE):
                low, high = (table.field(bound) for bound in WIN_RATE[1:])
                layers.append(base.mark_rule().encode(y=alt.Y(low, type="quantitative", scale=scale), y2=high))
        elif window := _window(runs):
            mean: Any = {"op": "mean", "field": field, "as": "mean"}
            smooth = (
                alt.Chart()
                .transform_filter(f"isValid(datum.{field})")
                .transform_window([mean], frame=[-window, window], groupby=["run"], sort=[alt.SortField("iteration")])
            )
            layers += [
                base.mark_line(opacity=0.3, strokeWidth=1),
                smooth.mark_line(strokeWidth=2).encode(x=x, y=alt.Y("mean", type="quantitative", scale=scale)),
            ]
        else:
            layers += [base.mark_line(point={"size": 14, "opacity": 1}, strokeWidth=2)]
    return layers


def _scale(panel: Panel, runs: Sequence[Run]) -> alt.Scale:
    """Return the scale of a panel's y-axis.

    If a value is below the panel's floor, the axis begins at the floor, and smaller values are drawn there. Otherwise,
    if the largest value of a fraction is 0, the axis shows 0 to 100 %. Otherwise, the axis of a fraction includes 0,
    except for the win rate, and the axis of any other metric shows only the range of its values.
    """
    values = [value for run in runs for name in panel.columns for value in run.values(name)]
    if panel.floor is not None and min(values) < panel.floor:
        return alt.Scale(zero=False, domainMin=panel.floor, clamp=True)
    if panel.percent and max(values) == 0:
        return alt.Scale(domain=[0, 1])
    return alt.Scale(zero=panel.percent and panel.held_out != WIN_RATE[0])


def _axis_format(panel: Panel, runs: Sequence[Run]) -> dict[str, Any]:
    largest = max(abs(value) for run in runs for name in panel.columns for value in run.values(name))
    return {"format": ".3~p"} if panel.percent else {"format": ".1e"} if 0 < largest < 1e-3 else {}


def _frontier(table: Table, prefixes: tuple[str, ...]) -> list[alt.Chart]:
    """Return the layers of the chart of the score against √KL, which shows the gain from leaving the reference.

    Args:
        table: The table that the chart reads.
        prefixes: The beginnings of the metrics' names: ``objective/`` for iterations, ``val/`` for validations.
    """
    layers = []
    for prefix in prefixes:
        score, kl = table.field(f"{prefix}score"), table.field(f"{prefix}kl_to_ref")
        base = (
            alt.Chart()
            .transform_filter(f"isValid(datum.{score}) && isValid(datum.{kl})")
            .transform_calculate(root=f"sqrt(max(0, datum.{kl}))")
            .encode(
                x=alt.X("root", type="quantitative", title="√KL to the reference, in √nats per response"),
                y=alt.Y(
                    score, type="quantitative", title="score", scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=5)
                ),
                order=alt.Order("iteration", type="quantitative"),
                tooltip=[
                    alt.Tooltip("run", type="nominal"),
                    alt.Tooltip("iteration", type="quantitative", format=",d"),
                    alt.Tooltip(score, type="quantitative", title="score", format=".4~g"),
                    alt.Tooltip(kl, type="quantitative", title="KL (nats)", format=".4~g"),
                ],
            )
        )
        if prefix == "val/":
            layers += [
                base.mark_line(strokeDash=[4, 3], tooltip=False),
                base.mark_point(filled=True, size=55, opacity=1),
            ]
        else:
            layers += [base.mark_line(opacity=0.35, strokeWidth=1), base.mark_point(filled=True, size=10, opacity=0.5)]
    return layers


def _time(run: Run, table: Table) -> alt.Chart:
    """Return a stacked chart of the seconds that each phase of each iteration takes."""
    names = phases(run)
    fields = {table.field(name): name.partition("/")[2] for name in names}
    label = " : ".join([*(f"datum.key == '{field}' ? '{name}'" for field, name in fields.items()), "''"])
    base = (
        alt.Chart()
        .transform_filter(f"datum.run == {_quoted(run.name)}")
        .transform_filter(f"isValid(datum.{next(iter(fields))})")
        .transform_fold(list(fields), as_=["key", "seconds"])
        .transform_calculate(phase=label)
    )
    few = len(run.values(names[0])) < SMOOTHED_FROM
    mark = base.mark_bar() if few else base.mark_area()
    axis = alt.Axis(format=",d", tickMinStep=1, grid=False, labelAngle=0)
    return mark.encode(
        x=alt.X("iteration", type="ordinal" if few else "quantitative", title="iteration", axis=axis),
        y=alt.Y("seconds", type="quantitative", title="seconds per iteration", axis=alt.Axis(tickCount=5)),
        color=alt.Color(
            "phase",
            type="nominal",
            scale=alt.Scale(domain=list(fields.values()), range=list(PHASES[: len(fields)])),
            legend=alt.Legend(),
        ),
        tooltip=[
            alt.Tooltip("iteration", type="quantitative", format=",d"),
            alt.Tooltip("phase", type="nominal"),
            alt.Tooltip("seconds", type="quantitative", format=".3~g"),
        ],
    )


def _file_name(title: str) -> str:
    return "_".join("".join(c if c.isalnum() else " " for c in title.lower()).split())


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
