"""Draw self-contained HTML pages: tables, SVG plots and answers side by side; no script, nothing from outside."""

import io
import itertools
import random
from typing import Any

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by every kind of colour vision
BASE, TUNED, PLAIN = "#0072b2", "#d55e00", "#57606a"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
CURVES: dict[str, dict[str, Any]] = {"train": {"linewidth": 0.8, "alpha": 0.6}, "validation": {"marker": "o"}}
# Rows of each kind that the page shows whole
SHOWN = 5
TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("medibot"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
matplotlib.rcParams.update({"svg.hashsalt": "medibot", "svg.fonttype": "none", "font.family": "sans-serif"})


def evaluation_page(results: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return the page of one evaluation, from results.json and rows.jsonl; the same input gives the same bytes."""
    plots: dict[str, Any] = {"gains": gains_plot(rows), "lengths": length_plot(rows), "by": {}}
    for column, parts in results["by"].items():
        most_first = sorted(parts.items(), key=lambda part: -part[1]["rows"])
        # A dollar sign would begin a formula
        names = [f"{name[:40]} ({part['rows']})".replace("$", r"\$") for name, part in most_first]
        found = [part["metrics"]["nll"] for _, part in most_first]
        plots["by"][column] = intervals_plot(names, found, "tuned minus base (nats a token)")
    return TEMPLATES.get_template("evaluation.html.j2").render(r=results, plots=plots, chosen=side_by_side(rows))


def comparison_page(comparison: dict[str, Any], cost: list[list[str]]) -> str:
    """Return the page of a comparison, from comparison.json and the cost table's rows."""
    primary, unit = ("bits_per_byte", "bits a byte") if comparison["left_out"] else ("nll", "nats a token")
    found = {name: metrics[primary] for name, metrics in comparison["metrics"].items()}
    plots = {
        "intervals": intervals_plot(list(found), list(found.values()), f"difference ({unit})"),
        "curves": curves_plot(comparison["curves"]),
        "cost": cost_plot(found, comparison["cost"], f"difference ({unit})"),
    }
    return TEMPLATES.get_template("comparison.html.j2").render(c=comparison, plots=plots, cost=cost)


def side_by_side(rows: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the largest gains and losses in nats a token, and a draw that is the same each time."""
    ordered = sorted(rows, key=gain)
    wins = [row for row in reversed(ordered) if gain(row) > 0][:SHOWN]
    losses = [row for row in ordered if gain(row) < 0][:SHOWN]
    drawn = random.Random(0).sample(rows, min(SHOWN, len(rows)))
    titled = [("Largest gains", wins), ("Largest losses", losses), ("Drawn at random", drawn)]
    return [(title, chosen) for title, chosen in titled if chosen]


def gain(row: dict[str, Any]) -> float:
    """Return base minus tuned, in nats a token of the reference."""
    return row["base"]["nll"] / row["base"]["tokens"] - row["tuned"]["nll"] / row["tuned"]["tokens"]


def new_figure(height: float, panels: int = 1) -> tuple[Figure, list[Any]]:
    """Return a figure of the page's width, and its axes."""
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = list(figure.subplots(1, panels, sharey=True, squeeze=False)[0])
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def as_svg(figure: Figure) -> Markup:
    """Return the figure as an SVG element, the same bytes each time."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return Markup(buffer.getvalue()[buffer.getvalue().index("<svg") :])


def gains_plot(rows: list[dict[str, Any]]) -> Markup:
    figure, (axes,) = new_figure(3)
    bins = min(40, max(5, len(rows) // 5))
    axes.hist([gain(row) for row in rows], bins=bins, color=TUNED, edgecolor="white", linewidth=0.5)
    axes.axvline(0, color=PLAIN, linewidth=1)
    axes.set(xlabel="base minus tuned (nats a token)", ylabel="rows")
    return as_svg(figure)


def length_plot(rows: list[dict[str, Any]]) -> Markup:
    figure, (axes,) = new_figure(3)
    axes.ecdf([row["base"]["reference_words"] for row in rows], label="reference", color=PLAIN, linestyle="--")
    for which, colour in (("base", BASE), ("tuned", TUNED)):
        axes.ecdf([row[which]["answer_words"] for row in rows], label=which, color=colour)
    axes.set(xlabel="words", ylabel="share of rows", xlim=(0, None))
    axes.legend(frameon=False)
    return as_svg(figure)


def intervals_plot(names: list[str], metrics: list[dict[str, Any]], label: str) -> Markup:
    """Draw a difference a line, the first at the top; hollow where one group gives no interval."""
    figure, (axes,) = new_figure(1 + 0.3 * len(names))
    for place, found in enumerate(metrics):
        fill = "none" if found["low"] is None else "full"
        axes.plot([found["low"], found["high"]], [place, place], color=TUNED, linewidth=2)
        axes.plot(found["difference"], place, "o", color=TUNED, fillstyle=fill)
    axes.axvline(0, color=PLAIN, linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.set(ylim=(len(names) - 0.5, -0.5), xlabel=label)
    return as_svg(figure)


def cost_plot(metrics: dict[str, dict[str, Any]], cost: dict[str, dict[str, float]], label: str) -> Markup:
    """Draw each run's difference over the time that its steps took."""
    figure, (axes,) = new_figure(3.4)
    for (name, found), colour in zip(metrics.items(), itertools.cycle(COLOURS), strict=False):
        fill, minutes = "none" if found["low"] is None else "full", cost[name]["training_seconds"] / 60
        axes.plot([minutes, minutes], [found["low"], found["high"]], color=colour, linewidth=2)
        axes.plot(minutes, found["difference"], "o", color=colour, fillstyle=fill, label=name)
    axes.axhline(0, color=PLAIN, linewidth=1)
    axes.set(xlim=(0, None), xlabel="training steps (minutes)", ylabel=label)
    axes.legend(frameon=False)
    return as_svg(figure)


def curves_plot(curves: dict[str, dict[str, list[list[float]]]]) -> Markup:
    """Draw both losses of each run over tokens and over time."""
    figure, panels = new_figure(3.6, panels=2)
    for axes, column, scale, label in zip(panels, (0, 1), (1, 60), ("supervised tokens", "minutes"), strict=True):
        for (name, curve), colour in zip(curves.items(), itertools.cycle(COLOURS), strict=False):
            for kind, style in CURVES.items():
                points = np.reshape(curve[kind], (-1, 3))
                shown = name if kind == "validation" else None
                axes.plot(points[:, column] / scale, points[:, 2], color=colour, label=shown, **style)
        axes.set_xlabel(label)
    panels[0].set_ylabel("loss (nats a token)")
    panels[1].legend(frameon=False)
    return as_svg(figure)
