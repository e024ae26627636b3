"""Figures of a report, each a function that returns the bytes of a PNG, in one style."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from offmoe.errors import OffmoeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from offmoe.lab.live.results import Configuration
    from offmoe.lab.report.curves import Curve
    from offmoe.lab.report.numbers import Summary
    from offmoe.lab.report.predictors import Predictions

INK, PALE, GRID = "#1f2430", "#6b7280", "#e5e7eb"
METHODS = ("#2563eb", "#e8590c", "#0d9488", "#9333ea", "#b45309", "#db2777", "#4d7c0f", "#475569")
MARKERS = "osD^vPX*"
SHADES = ("#93b4f5", "#6090ee", "#2f66d8", "#1b3f94", "#0f2557")  # of budgets, smallest first
PARTS = {"attention": "#3b82f6", "router": "#93c5fd", "experts": "#14b8a6", "everything hits": "#14b8a6",
         "page-in": "#f97316", "stall": "#f97316", "predictor": "#a855f7", "rest": "#cbd5e1"}  # fmt: skip
STYLE: dict[str, Any] = {
    "font.size": 10, "axes.edgecolor": PALE, "axes.labelcolor": INK, "text.color": INK, "xtick.color": PALE,
    "ytick.color": PALE, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GRID,
    "axes.axisbelow": True, "legend.frameon": False, "figure.dpi": 110, "axes.titlesize": 12,
    "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 26,
}  # fmt: skip


@contextmanager
def figure(width: float = 8.0, height: float = 4.8) -> Iterator[tuple[Figure, Axes]]:
    """Yield a figure and axes in our style, without a display."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise OffmoeError("plots need matplotlib: pip install 'offmoe[lab]'") from None
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(fig)
        yield fig, fig.add_subplot()


def png(fig: Figure) -> bytes:
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png")
    return buffer.getvalue()


def set_titles(axes: Axes, title: str, subtitle: str) -> None:
    axes.set_title(title)
    axes.text(0, 1.025, subtitle, transform=axes.transAxes, color=PALE, fontsize=9)


def method_styles(summaries: list[Summary]) -> dict[str, tuple[str, str]]:
    """Return a colour and a marker for every method, the same in all figures."""
    methods = list(dict.fromkeys(summary.configuration.method for summary in summaries))
    return {method: (METHODS[i % len(METHODS)], MARKERS[i % len(MARKERS)]) for i, method in enumerate(methods)}


def latency(summaries: list[Summary], bandwidths: dict[str, float], record_bytes: float) -> bytes:
    """Plot hit rate against ms per token, with single rounds as pale dots and the roof as a lower bound."""
    top = 1.6 * max(summary.ms for summary in summaries)  # slower rounds are drawn at the edge
    with figure() as (fig, axes):
        for method, (colour, marker) in method_styles(summaries).items():
            mine = sorted((s for s in summaries if s.configuration.method == method), key=lambda s: s.mean("hit_rate"))
            hits = [100 * s.mean("hit_rate") for s in mine]
            axes.plot(hits, [s.ms for s in mine], color=colour, marker=marker, ms=7, lw=1.4, mec="white", label=method)
            rounds = [measured for summary in mine for measured in summary.rounds]
            for shape, some in (".", [m for m in rounds if m.ms <= top]), ("^", [m for m in rounds if m.ms > top]):
                axes.plot(
                    [100 * m.hit_rate for m in some],
                    [min(m.ms, top) for m in some],
                    shape,
                    ms=3.5,
                    color=colour,
                    alpha=0.35,
                )
        low = min(m.hit_rate for s in summaries for m in s.rounds)
        xs = [100 * (low + (1 - low) * i / 100) for i in range(101)]
        roof = [roof_ms(summaries, bandwidths, record_bytes, 1 - x / 100) for x in xs]
        axes.plot(xs, roof, color=INK, lw=1.2, ls="--", label="roof")
        axes.fill_between(xs, 0, roof, color=GRID, alpha=0.5, lw=0)
        axes.annotate(
            "no token is faster than this",
            (xs[50], roof[50]),
            (0, -6),
            textcoords="offset points",
            va="top",
            ha="center",
            color=PALE,
            fontsize=9,
        )
        label_budgets(axes, summaries)
        axes.set(xlabel="hit rate, %", ylabel="ms per token", ylim=(0, 1.05 * top))
        set_titles(axes, "What a hit is worth here", "median round; dots: single rounds, triangles: slower than shown")
        axes.legend(loc="upper right")
        return png(fig)


def label_budgets(axes: Axes, summaries: list[Summary]) -> None:
    """Write the budget above each group of points."""
    for budget in dict.fromkeys(s.configuration.budget for s in summaries):
        group = [s for s in summaries if s.configuration.budget == budget]
        position = 100 * sum(s.mean("hit_rate") for s in group) / len(group), max(s.ms for s in group)
        axes.annotate(
            budget,
            position,
            (0, 12),
            textcoords="offset points",
            ha="center",
            color=INK,
            fontsize=9,
            fontweight="bold",
            bbox={"fc": "white", "ec": "none", "alpha": 0.7, "pad": 1},
        )


def roof_ms(summaries: list[Summary], bandwidths: dict[str, float], record_bytes: float, missed: float) -> float:
    """Return the time of a token on the slowest resource, ms, as in offmoe.stats.roof, for a share `missed`."""
    first = summaries[0].rounds[0]
    floor = min(m.floor_ms for s in summaries for m in s.rounds)
    slots = first.token_bytes / bandwidths["slots"] * 1e3
    return max(floor, slots, missed * first.routed * record_bytes / bandwidths["link"] * 1e3)


def stack(summaries: list[Summary]) -> bytes:
    """Plot the parts of a token's time, one bar per configuration, grouped by budget."""
    budgets = list(dict.fromkeys(summary.configuration.vram for summary in summaries))
    rows = [index + 0.7 * budgets.index(summary.configuration.vram) for index, summary in enumerate(summaries)]
    longest = max(summary.ms for summary in summaries)
    with figure(height=1.7 + 0.3 * (rows[-1] + 1)) as (fig, axes):
        left = [0.0] * len(summaries)
        for part in dict.fromkeys(name for summary in summaries for name in summary.typical.parts):
            widths = [max(0.0, summary.typical.parts.get(part, 0.0)) for summary in summaries]
            axes.barh(rows, widths, left=left, color=PARTS[part], label=part, height=0.8)
            for row, start, width in zip(rows, left, widths, strict=True):
                if width > 0.06 * longest:
                    axes.text(
                        start + width / 2,
                        row,
                        f"{width:.1f}",
                        ha="center",
                        va="center",
                        fontsize=8,
                        color=INK if part in ("router", "rest") else "white",
                    )
            left = [start + width for start, width in zip(left, widths, strict=True)]
        for row, end in zip(rows, left, strict=True):
            axes.text(end, row, f" {end:.1f}", va="center", fontweight="bold", fontsize=9)
        axes.set_yticks(rows, [str(summary.configuration) for summary in summaries])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.set(xlabel="ms per token", xlim=(0, 1.08 * max(left)))
        axes.tick_params(axis="y", colors=INK, length=0)
        set_titles(axes, "Where a token's time goes", "of the round with the median time, ms")
        fig.legend(loc="outside lower center", ncols=6)
        return png(fig)


def layers(summaries: list[Summary], baselines: list[Configuration]) -> bytes:
    """Plot the hit rate by layer: a line for the baseline of each budget, a band for all its methods."""
    with figure() as (fig, axes):
        shown = [b for b in baselines if any(s.configuration == b and s.hits_by_layer for s in summaries)]
        for index, baseline in enumerate(shown):
            group = [s.hits_by_layer for s in summaries if s.configuration.vram == baseline.vram and s.hits_by_layer]
            line = next(s.hits_by_layer for s in summaries if s.configuration == baseline)
            shade = METHODS[0] if len(shown) == 1 else SHADES[index * (len(SHADES) - 1) // (len(shown) - 1)]
            xs = range(len(line))
            axes.plot(xs, [100 * hit for hit in line], color=shade, lw=1.8, marker="o", ms=3)
            low, high = ([100 * edge(values) for values in zip(*group, strict=True)] for edge in (min, max))
            axes.fill_between(xs, low, high, color=shade, alpha=0.18, lw=0)
            axes.annotate(
                baseline.budget,
                (len(line) - 1, 100 * line[-1]),
                (8, 0),
                textcoords="offset points",
                va="center",
                color=shade,
                fontweight="bold",
            )
        axes.set(xlabel="layer", ylabel="hit rate, %", ylim=(0, 104))
        subtitle = f"line: {shown[0].method}; band: all methods at that budget" if shown else "not measured"
        set_titles(axes, "Hit rate by layer", subtitle)
        return png(fig)


def miss_curves(curves: list[Curve], budgets: dict[str, float], styles: dict[str, tuple[str, str]]) -> bytes:
    """Plot misses per token over cache size, with Belady's bounds. `budgets` are shares of all experts."""
    with figure() as (fig, axes):
        for curve in curves:
            share = [100 * slots / curve.slots[-1] for slots in curve.slots]
            bound = curve.policy.startswith("belady")
            colour, marker = (INK, "") if bound else styles.get(curve.policy, (PALE, "."))
            axes.plot(
                share,
                curve.misses,
                color=colour,
                marker=marker,
                ms=5,
                lw=1.5,
                mec="white",
                ls={"belady": "--", "belady-bypass": ":"}.get(curve.policy, "-"),
                label=curve.policy,
            )
        bound_line = next(curve for curve in curves if curve.policy == "belady-bypass")
        share = [100 * slots / bound_line.slots[-1] for slots in bound_line.slots]
        axes.fill_between(share, 0, bound_line.misses, color=GRID, alpha=0.5, lw=0)
        for name, budget in budgets.items():
            axes.axvline(100 * budget, color=PALE, lw=0.8, ls=(0, (2, 3)))
            axes.annotate(
                name,
                (100 * budget, 1),
                (2, -2),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                va="top",
                color=PALE,
                fontsize=8,
            )
        axes.set(xlabel="experts with a slot, %", ylabel="misses per token", ylim=(0, None))
        set_titles(
            axes, "Misses over cache size", "replay of this run's routing from an empty cache, decoded tokens only"
        )
        axes.legend(loc="upper right", bbox_to_anchor=(1, 0.95))
        return png(fig)


def prefetch(predictions: Predictions) -> bytes:
    """Plot coverage of the misses against precision; lines join the thresholds of a predictor, controls are grey."""
    families = {one.family: one.control for one in predictions.entries}
    colours = dict(zip([family for family, control in families.items() if not control], METHODS, strict=False))
    markers = dict(zip(families, MARKERS, strict=False))
    with figure() as (fig, axes):
        for family, control in families.items():
            mine = [one for one in predictions.entries if one.family == family and one.precision is not None]
            if not mine:
                continue
            axes.plot(
                [100 * (one.coverage or 0) for one in mine],
                [100 * (one.precision or 0) for one in mine],
                color=PALE if control else colours[family],
                marker=markers[family],
                ms=7,
                lw=1.4,
                ls=":" if control else "-",
                mfc="white" if control else None,
                mec=PALE if control else "white",
                label=f"{family} (control)" if control else family,
            )
            gates = [one for one in mine if one.name.startswith("gate:d=1,")]
            for one in [one for one in gates if (one.coverage or 0) > 0.05]:  # labels of the others would overlap
                least = one.name.partition("p=")[2].partition(",")[0]
                axes.annotate(
                    f"p ≥ {least}",
                    (100 * (one.coverage or 0), 100 * (one.precision or 0)),
                    (0, 7),
                    textcoords="offset points",
                    color=PALE,
                    fontsize=7,
                )
        silent = [one.family for one in predictions.entries if one.precision is None]
        subtitle = (
            f"replay at {predictions.budget}, {predictions.policy}, with this machine's link; one point per threshold"
        )
        set_titles(axes, "Prefetching: coverage and precision", subtitle)
        if silent:
            axes.text(
                0.01,
                0.02,
                f"fetched nothing: {', '.join(dict.fromkeys(silent))}",
                transform=axes.transAxes,
                color=PALE,
                fontsize=9,
            )
        axes.set(
            xlabel="coverage: misses that became hits, %",
            ylabel="precision: fetched experts that were used, %",
            xlim=(-2, 102),
            ylim=(0, 106),
        )
        axes.legend(loc="lower right")
        return png(fig)
