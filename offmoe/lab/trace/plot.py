"""Statistics of a trace as one figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from offmoe.app.terminal import clean
from offmoe.lab.report.plots import INK, METHODS, PALE, figure, png, set_titles
from offmoe.lab.trace.info import LAGS, WINDOWS, Array, Classification, Facts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_EXPERTS = 24  # in the last panel


def draw(facts: Facts) -> bytes:
    """Return a PNG of six panels: load, its unevenness, reuse, working set, information, and specialised experts."""
    with figure(16, 9.6) as (fig, only):
        only.remove()
        panels = fig.subplots(2, 3)
        meta = facts.meta
        fig.suptitle(
            clean(
                f"{meta['model']} · {meta['layers']} layers of {meta['experts']} experts, top {meta['top_k']} · "
                f"{facts.tokens:,} decoded tokens in {facts.sequences} sequences"
            ),
            x=0.01,
            ha="left",
            fontsize=14,
            fontweight="bold",
        )
        load(fig, panels[0, 0], facts)
        unevenness(panels[0, 1], facts)
        reuse(panels[0, 2], facts)
        working_set(panels[1, 0], facts)
        information(panels[1, 1], facts)
        specialists(fig, panels[1, 2], facts)
        return png(fig)


def load(fig: Any, axes: Axes, facts: Facts) -> None:
    """Plot the load of every layer's experts, the hottest first."""
    ordered = -np.sort(-facts.load, axis=1)
    most = float(np.quantile(ordered, 0.99))
    image = axes.imshow(ordered, aspect="auto", cmap="magma_r", vmin=0, vmax=max(2.0, most), interpolation="nearest")
    axes.set(xlabel="experts, the hottest first", ylabel="layer")
    axes.grid(visible=False)
    fig.colorbar(image, ax=axes, pad=0.02).outline.set_visible(False)
    set_titles(axes, "Load of the experts", "uses, as a multiple of an even share")


def unevenness(axes: Axes, facts: Facts) -> None:
    layers = np.arange(len(facts.hottest))
    axes.plot(layers, 100 * facts.hottest, "o-", ms=4, lw=1.6, color=METHODS[0], label="uses of the hottest quarter")
    axes.plot(layers, 100 * facts.entropy, "o-", ms=4, lw=1.6, color=METHODS[2], label="entropy of the load")
    axes.plot(
        layers,
        100 * facts.dead / facts.meta["experts"],
        "o-",
        ms=4,
        lw=1.6,
        color=METHODS[1],
        label="experts never used",
    )
    axes.axhline(25, color=PALE, lw=1, ls="--", zorder=1)
    axes.annotate("an even load: 25 %", (0, 25), (0, -5), textcoords="offset points", color=PALE, fontsize=9, va="top")
    axes.set(xlabel="layer", ylabel="%", ylim=(-2, 104))
    axes.legend(loc="center right", bbox_to_anchor=(1, 0.72))
    set_titles(axes, "How uneven the layers are", "shares of all uses, of log2(experts), of all experts")


def reuse(axes: Axes, facts: Facts) -> None:
    spread(axes, LAGS, 100 * facts.reuse, METHODS[0])
    popular = 100 * float(facts.popular.mean())
    lines = (popular, "by popularity alone", 3, "bottom"), (100 * facts.uniform, "at random", -4, "top")
    for value, text, dy, va in lines:
        axes.axhline(value, color=INK, lw=1, ls="--", zorder=1)
        axes.annotate(
            f"{text}: {value:.1f} %",
            (LAGS[0], value),
            (0, dy),
            textcoords="offset points",
            va=va,
            color=PALE,
            fontsize=9,
        )
    axes.set(xlabel="tokens later", ylabel="%")
    axes.set_ylim(0, None)
    set_titles(
        axes, "How stable routing is", "share of a token's experts that a later token uses too; single layers are pale"
    )


def working_set(axes: Axes, facts: Facts) -> None:
    spread(axes, WINDOWS, facts.working, METHODS[2])
    experts = facts.meta["experts"]
    axes.axhline(experts, color=INK, lw=1, ls="--", zorder=1)
    axes.annotate(
        f"all {experts}", (WINDOWS[0], experts), (0, -4), textcoords="offset points", color=PALE, fontsize=9, va="top"
    )
    axes.set(xlabel="window, tokens", ylabel="different experts per layer")
    axes.set_ylim(0, experts * 1.05)
    set_titles(axes, "Working set", "different experts in a window of one sequence; single layers are pale")


def spread(axes: Axes, steps: tuple[int, ...], values: Array, colour: str) -> None:
    """Plot values [steps, layers]: single layers pale, the mean strong.

    Steps longer than all sequences are left out.
    """
    reached = ~np.isnan(values).any(axis=1)
    positions = np.array(steps)[reached]
    axes.plot(positions, values[reached], color=colour, lw=0.8, alpha=0.25)
    axes.plot(positions, values[reached].mean(1), "o-", color=colour, lw=2.2, ms=5)
    axes.set_xscale("log", base=2)
    axes.set_xticks(positions, [str(step) for step in positions])


def information(axes: Axes, facts: Facts) -> None:
    layers = np.arange(len(facts.hottest))
    for classification, colour in zip(facts.classifications, METHODS, strict=False):
        axes.plot(
            layers,
            classification.information,
            "o-",
            ms=4,
            lw=1.6,
            color=colour,
            label=f"{classification.name}: {classification.known.mean():.1%} of {classification.entropy:.2f} bits",
        )
        axes.plot(layers, classification.control, color=colour, lw=1.2, ls=":")
    axes.plot([], [], color=PALE, lw=1.2, ls=":", label="the same, classes shuffled")
    axes.set(xlabel="layer", ylabel="bits")
    most = max(float(np.nanmax(classification.information)) for classification in facts.classifications)
    axes.set_ylim(0, 1.45 * most or 1)
    axes.legend(loc="upper left")
    set_titles(
        axes, "Do experts specialise?", "information that one of a token's experts gives about the token's class"
    )


def specialists(fig: Any, axes: Axes, facts: Facts) -> None:
    """Plot the layer with the most information, for the classes about which the experts tell most."""
    classification = max(facts.classifications, key=lambda classification: float(classification.known.max()))
    layer = int(classification.known.argmax())
    lift, experts = most_specialised(classification, layer)
    image = axes.imshow(
        np.log2(np.maximum(lift, 1 / 16)), aspect="auto", cmap="RdBu_r", vmin=-3, vmax=3, interpolation="nearest"
    )
    axes.set_xticks(range(len(experts)), [str(expert) for expert in experts], fontsize=8, rotation=90)
    axes.set_yticks(range(len(classification.labels)), [clean(label)[:24] for label in classification.labels])
    axes.grid(visible=False)
    axes.set(xlabel=f"experts of layer {layer}, sorted by class")
    bar = fig.colorbar(image, ax=axes, pad=0.02, ticks=[-3, -2, -1, 0, 1, 2, 3])
    bar.ax.set_yticklabels(["⅛", "¼", "½", "1", "2", "4", "8"])
    bar.outline.set_visible(False)
    set_titles(
        axes,
        f"Specialised experts, by {classification.name}",
        "share of the class among an expert's tokens, relative to all tokens",
    )


def most_specialised(classification: Classification, layer: int) -> tuple[Array, list[int]]:
    """Return lifts [classes, experts] of the most specialised experts, sorted by their class."""
    lift = classification.lift[layer]
    experts = np.argsort(-np.abs(np.log2(np.maximum(lift, 1 / 16))).max(1), kind="stable")[:MAX_EXPERTS]
    order = experts[np.lexsort((-lift[experts].max(1), lift[experts].argmax(1)))]
    return lift[order].T, order.tolist()
