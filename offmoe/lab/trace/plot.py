"""A trace's facts as one figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from offmoe.app.terminal import clean
from offmoe.lab.report.plots import INK, METHODS, PALE, figure, png, titled
from offmoe.lab.trace.info import LAGS, WINDOWS, Array, Classing, Facts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST = 24  # experts in the last panel


def draw(facts: Facts) -> bytes:
    """A PNG of six panels: load, its unevenness, reuse, working set, information, and who works for whom."""
    with figure(16, 9.6) as (drawn, only):
        only.remove()
        panels = drawn.subplots(2, 3)
        meta = facts.meta
        drawn.suptitle(
            clean(
                f"{meta['model']} · {meta['layers']} layers of {meta['experts']} experts, top {meta['top_k']} · "
                f"{facts.tokens:,} decoded tokens in {facts.sequences} sequences"
            ),
            x=0.01,
            ha="left",
            fontsize=14,
            fontweight="bold",
        )
        load(drawn, panels[0, 0], facts)
        unevenness(panels[0, 1], facts)
        reuse(panels[0, 2], facts)
        working(panels[1, 0], facts)
        knowledge(panels[1, 1], facts)
        specialists(drawn, panels[1, 2], facts)
        return png(drawn)


def load(drawn: Any, axes: Axes, facts: Facts) -> None:
    """Every layer's experts, the hottest first."""
    ordered = -np.sort(-facts.load, axis=1)
    most = float(np.quantile(ordered, 0.99))
    image = axes.imshow(ordered, aspect="auto", cmap="magma_r", vmin=0, vmax=max(2.0, most), interpolation="nearest")
    axes.set(xlabel="experts, the hottest first", ylabel="layer")
    axes.grid(visible=False)
    drawn.colorbar(image, ax=axes, pad=0.02).outline.set_visible(False)
    titled(axes, "Who is asked for", "uses, × an even share")


def unevenness(axes: Axes, facts: Facts) -> None:
    layers = np.arange(len(facts.hottest))
    axes.plot(layers, 100 * facts.hottest, "o-", ms=4, lw=1.6, color=METHODS[0], label="uses of the hottest quarter")
    axes.plot(layers, 100 * facts.entropy, "o-", ms=4, lw=1.6, color=METHODS[2], label="entropy of the load")
    axes.plot(layers, 100 * facts.dead / facts.meta["experts"], "o-", ms=4, lw=1.6, color=METHODS[1],
              label="experts never used")  # fmt: skip
    axes.axhline(25, color=PALE, lw=1, ls="--", zorder=1)
    axes.annotate("an even load: 25 %", (0, 25), (0, -5), textcoords="offset points", color=PALE, fontsize=9, va="top")
    axes.set(xlabel="layer", ylabel="%", ylim=(-2, 104))
    axes.legend(loc="center right", bbox_to_anchor=(1, 0.72))
    titled(axes, "How uneven the layers are", "shares of all uses, of log2(experts), of all experts")


def reuse(axes: Axes, facts: Facts) -> None:
    spread(axes, LAGS, 100 * facts.reuse, METHODS[0])
    popular = 100 * float(facts.popular.mean())
    lines = (popular, "by popularity alone", 3, "bottom"), (100 * facts.uniform, "with dice", -4, "top")
    for value, text, dy, va in lines:
        axes.axhline(value, color=INK, lw=1, ls="--", zorder=1)
        axes.annotate(f"{text}: {value:.1f} %", (LAGS[0], value), (0, dy), textcoords="offset points", va=va,
                      color=PALE, fontsize=9)  # fmt: skip
    axes.set(xlabel="tokens later", ylabel="%")
    axes.set_ylim(0, None)
    titled(axes, "How stable routing is", "of a token's experts, what a later token asks for too; each layer pale")


def working(axes: Axes, facts: Facts) -> None:
    spread(axes, WINDOWS, facts.working, METHODS[2])
    experts = facts.meta["experts"]
    axes.axhline(experts, color=INK, lw=1, ls="--", zorder=1)
    axes.annotate(f"all {experts}", (WINDOWS[0], experts), (0, -4), textcoords="offset points", color=PALE, fontsize=9,
                  va="top")  # fmt: skip
    axes.set(xlabel="window, tokens", ylabel="different experts a layer")
    axes.set_ylim(0, experts * 1.05)
    titled(axes, "What a while of text needs", "different experts in a window of one sequence; each layer pale")


def spread(axes: Axes, steps: tuple[int, ...], values: Array, colour: str) -> None:
    """[steps, layers]: each layer pale, the mean strong; steps that no sequence reaches are left out."""
    there = ~np.isnan(values).any(axis=1)
    at = np.array(steps)[there]
    axes.plot(at, values[there], color=colour, lw=0.8, alpha=0.25)
    axes.plot(at, values[there].mean(1), "o-", color=colour, lw=2.2, ms=5)
    axes.set_xscale("log", base=2)
    axes.set_xticks(at, [str(step) for step in at])


def knowledge(axes: Axes, facts: Facts) -> None:
    layers = np.arange(len(facts.hottest))
    for way, colour in zip(facts.classings, METHODS, strict=False):
        axes.plot(layers, way.information, "o-", ms=4, lw=1.6, color=colour,
                  label=f"{way.name}: {way.known.mean():.1%} of {way.entropy:.2f} bits")  # fmt: skip
        axes.plot(layers, way.control, color=colour, lw=1.2, ls=":")
    axes.plot([], [], color=PALE, lw=1.2, ls=":", label="the same, classes shuffled")
    axes.set(xlabel="layer", ylabel="bits")
    most = max(float(np.nanmax(way.information)) for way in facts.classings)
    axes.set_ylim(0, 1.45 * most or 1)
    axes.legend(loc="upper left")
    titled(axes, "Do experts specialise?", "what one of a token's experts tells of the class of the token")


def specialists(drawn: Any, axes: Axes, facts: Facts) -> None:
    """The layer that knows most, by the way of dividing tokens of which most is known."""
    way = max(facts.classings, key=lambda way: float(way.known.max()))
    layer = int(way.known.argmax())
    lift, experts = strongest(way, layer)
    image = axes.imshow(np.log2(np.maximum(lift, 1 / 16)), aspect="auto", cmap="RdBu_r", vmin=-3, vmax=3,
                        interpolation="nearest")  # fmt: skip
    axes.set_xticks(range(len(experts)), [str(expert) for expert in experts], fontsize=8, rotation=90)
    axes.set_yticks(range(len(way.labels)), [clean(label)[:24] for label in way.labels])
    axes.grid(visible=False)
    axes.set(xlabel=f"experts of layer {layer}, each beside those of its class")
    bar = drawn.colorbar(image, ax=axes, pad=0.02, ticks=[-3, -2, -1, 0, 1, 2, 3])
    bar.ax.set_yticklabels(["⅛", "¼", "½", "1", "2", "4", "8"])
    bar.outline.set_visible(False)
    titled(axes, f"Who works for whom: by {way.name}", "the class among an expert's tokens, × its share of all")


def strongest(way: Classing, layer: int) -> tuple[Array, list[int]]:
    """[classes, experts] lifts of the experts that are least indifferent, sorted by the class that they prefer."""
    lift = way.lift[layer]
    experts = np.argsort(-np.abs(np.log2(np.maximum(lift, 1 / 16))).max(1), kind="stable")[:MOST]
    order = experts[np.lexsort((-lift[experts].max(1), lift[experts].argmax(1)))]
    return lift[order].T, order.tolist()
