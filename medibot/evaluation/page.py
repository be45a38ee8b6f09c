"""Draw self-contained HTML pages: tables, SVG plots and answers side by side; no script, nothing from outside."""

import io
import itertools
import random
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by every kind of colour vision
BASE, TUNED, PLAIN = "#0072b2", "#d55e00", "#57606a"
COLOURS = (BASE, TUNED, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
# The hash's salt makes the same input the same bytes
STYLE: dict[Any, Any] = {"svg.hashsalt": "medibot", "svg.fonttype": "none", "legend.frameon": False}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False}
# Rows of each kind that the page shows whole
SHOWN = 5
TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("medibot"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
Plots = list[tuple[str, Markup]]


def evaluation_page(results: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return the page of one evaluation, from results.json and rows.jsonl; the same input gives the same bytes."""
    plots: Plots = []
    text = "Base minus tuned negative log-likelihood of each reference: right of the line the tuned model is better."
    with plot(plots, text, 3) as (axes,):
        axes.hist([gain(row) for row in rows], bins=30, color=TUNED, edgecolor="white", linewidth=0.5)
        axes.axvline(0, color=PLAIN, linewidth=1)
        axes.set(xlabel="base minus tuned (nats a token)", ylabel="rows")
    with plot(plots, "Words of the answers and of the references, as the share of rows at most so long.", 3) as (axes,):
        axes.ecdf([row["base"]["reference_words"] for row in rows], label="reference", color=PLAIN, linestyle="--")
        for which, colour in (("base", BASE), ("tuned", TUNED)):
            axes.ecdf([row[which]["answer_words"] for row in rows], label=which, color=colour)
        axes.set(xlabel="words", ylabel="share of rows", xlim=(0, None))
    for column, parts in results["by"].items():
        text = f"Difference in nats a token for each {column.replace('_', ' ')}, with 95 % intervals (number of rows "
        text += "behind it): left of the line the tuned model is better."
        most_first = sorted(parts.items(), key=lambda part: -part[1]["rows"])
        # A dollar sign would begin a formula
        found = [(f"{n[:40]} ({p['rows']})".replace("$", r"\$"), p["metrics"]["nll"]) for n, p in most_first]
        plot_intervals(plots, text, found, "tuned minus base (nats a token)")
    return TEMPLATES.get_template("evaluation.html.j2").render(r=results, plots=plots, chosen=side_by_side(rows))


def comparison_page(comparison: dict[str, Any], cost: list[list[str]]) -> str:
    """Return the page of a comparison, from comparison.json and the cost table's rows."""
    primary, unit = ("bits_per_byte", "bits a byte") if comparison["left_out"] else ("nll", "nats a token")
    found = [(name, metrics[primary]) for name, metrics in comparison["metrics"].items()]
    baseline, label, plots = comparison["baseline"], f"difference ({unit})", []
    text = f"Difference from {baseline} on the test rows with 95 % intervals: left of the line is better."
    plot_intervals(plots, text, found, label)
    text = "Training loss (thin) and validation loss (dots) by supervised tokens and by wall time."
    with plot(plots, text, 3.6, panels=2) as panels:
        for column, (scale, xlabel) in enumerate(((1, "supervised tokens"), (60, "minutes"))):
            for (name, curve), colour in zip(comparison["curves"].items(), itertools.cycle(COLOURS), strict=False):
                thin, dots = {"linewidth": 0.8, "alpha": 0.6}, {"marker": "o", "label": name}
                for kind, style in (("train", thin), ("validation", dots)):
                    x = [point[column] / scale for point in curve[kind]]
                    panels[column].plot(x, [point[2] for point in curve[kind]], color=colour, **style)
            panels[column].set_xlabel(xlabel)
        panels[0].set_ylabel("loss (nats a token)")
    text = f"What the training steps took, and what they brought against {baseline}, with 95 % intervals: "
    minutes = [comparison["cost"][name]["training_seconds"] / 60 for name, _ in found]
    plot_intervals(plots, text + "low and left is best.", found, label, minutes)
    return TEMPLATES.get_template("comparison.html.j2").render(c=comparison, plots=plots, cost=cost)


def side_by_side(rows: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the largest gains and losses in nats a token, and a draw that is the same each time."""
    ordered, drawn = sorted(rows, key=gain), random.Random(0).sample(rows, min(SHOWN, len(rows)))
    wins = [row for row in reversed(ordered) if gain(row) > 0][:SHOWN]
    losses = [row for row in ordered if gain(row) < 0][:SHOWN]
    titled = [("Largest gains", wins), ("Largest losses", losses), ("Drawn at random", drawn)]
    return [(title, chosen) for title, chosen in titled if chosen]


def gain(row: dict[str, Any]) -> float:
    """Return base minus tuned, in nats a token of the reference."""
    return row["base"]["nll"] / row["base"]["tokens"] - row["tuned"]["nll"] / row["tuned"]["tokens"]


@contextmanager
def plot(plots: Plots, caption: str, height: float, panels: int = 1) -> Generator[list[Any]]:
    """Give axes to draw on, and add (caption, SVG element) to `plots`; what has a label gets a legend."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, height), layout="constrained")
        axes = list(figure.subplots(1, panels, sharey=True, squeeze=False)[0])
        yield axes
        if axes[-1].get_legend_handles_labels()[1]:
            axes[-1].legend()
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    plots.append((caption, Markup(buffer.getvalue()[buffer.getvalue().index("<svg") :])))


def plot_intervals(
    plots: Plots, caption: str, found: list[tuple[str, dict[str, Any]]], label: str, minutes: list[float] | None = None
) -> None:
    """Draw each difference as a dot on its interval, if it has one: a line each, or at the `minutes` it took."""
    with plot(plots, caption, 3.4 if minutes else 1 + 0.3 * len(found)) as (axes,):
        places, colours = minutes or range(len(found)), itertools.cycle(COLOURS if minutes else [TUNED])
        for (name, metric), place, colour in zip(found, places, colours, strict=False):
            axes.plot([metric["low"], metric["high"]], [place, place], color=colour, linewidth=2)
            axes.plot(metric["difference"], place, "o", color=colour, label=name if minutes else None)
        axes.axvline(0, color=PLAIN, linewidth=1)
        axes.set_xlabel(label)
        if minutes:
            axes.set(ylim=(0, 1.2 * max(minutes)), ylabel="training steps (minutes)")
        else:
            axes.set(yticks=places, yticklabels=[name for name, _ in found], ylim=(len(found) - 0.5, -0.5))
