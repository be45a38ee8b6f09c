"""Draw self-contained HTML pages: tables, SVG plots and answers side by side; no script, nothing from outside."""

import io
import itertools
import random
from typing import Any

import jinja2
from markupsafe import Markup

# Okabe and Ito's colours, told apart by every kind of colour vision
BASE, TUNED, PLAIN = "#0072b2", "#d55e00", "#57606a"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
# Rows of each kind that the page shows whole
SHOWN = 5
TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("medibot"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


def evaluation_page(results: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return the page of one evaluation, from results.json and rows.jsonl; the same input gives the same bytes."""
    gains = "How much lower the negative log-likelihood of each reference is after training, row by row: "
    words = "Words of the answers and of the references, as the share of rows that are at most so long."
    plots = [(gains + "right of the line the tuned model is better.", gains_plot(rows)), (words, length_plot(rows))]
    for column, parts in results["by"].items():
        text = f"Difference in nats a token for each {column.replace('_', ' ')}, with 95 % intervals (number of rows "
        most_first = sorted(parts.items(), key=lambda part: -part[1]["rows"])
        # A dollar sign would begin a formula
        names = [f"{name[:40]} ({part['rows']})".replace("$", r"\$") for name, part in most_first]
        drawn = intervals_plot(
            names, [part["metrics"]["nll"] for _, part in most_first], "tuned minus base (nats a token)"
        )
        plots.append((text + "behind it): left of the line the tuned model is better.", drawn))
    template = TEMPLATES.get_template("evaluation.html.j2")
    return template.render(r=results, plots=plots, chosen=side_by_side(rows))


def comparison_page(comparison: dict[str, Any], cost: list[list[str]]) -> str:
    """Return the page of a comparison, from comparison.json and the cost table's rows."""
    primary, unit = ("bits_per_byte", "bits a byte") if comparison["left_out"] else ("nll", "nats a token")
    found = {name: metrics[primary] for name, metrics in comparison["metrics"].items()}
    baseline = comparison["baseline"]
    differs = f"Difference from {baseline} on the test rows with 95 % intervals: left of the line is better."
    losses = "Training loss (thin) and validation loss (dots) by supervised tokens and by wall time."
    brought = f"What the training steps took, and what they brought against {baseline}, with 95 % intervals: "
    plots = [
        (differs, intervals_plot(list(found), list(found.values()), f"difference ({unit})")),
        (losses, curves_plot(comparison["curves"])),
        (brought + "low and left is best.", cost_plot(found, comparison["cost"], f"difference ({unit})")),
    ]
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


def new_figure(height: float, panels: int = 1) -> tuple[Any, list[Any]]:
    """Return a figure of the page's width, and its axes."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.hashsalt": "medibot", "svg.fonttype": "none", "font.family": "sans-serif"})
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = list(figure.subplots(1, panels, sharey=True, squeeze=False)[0])
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def as_svg(figure: Any) -> Markup:
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


def draw_interval(
    axes: Any, found: dict[str, Any], place: float, across: bool = True, color: str = TUNED, **style: Any
) -> None:
    """Draw a difference as a dot on its interval; hollow where one group gives no interval."""
    known = found["low"] is not None
    points = [(found["difference"], place)] + [(found[end], place) for end in ("low", "high") if known]
    (dot, *ends) = points if across else [(y, x) for x, y in points]
    axes.plot(*zip(*ends, strict=True) if ends else (), color=color, linewidth=2)
    axes.plot(*dot, "o", color=color if known else "none", markeredgecolor=color, **style)


def intervals_plot(names: list[str], metrics: list[dict[str, Any]], label: str) -> Markup:
    """Draw a difference a line, the first at the top."""
    figure, (axes,) = new_figure(1 + 0.3 * len(names))
    for place, found in enumerate(metrics):
        draw_interval(axes, found, place)
    axes.axvline(0, color=PLAIN, linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.set(ylim=(len(names) - 0.5, -0.5), xlabel=label)
    return as_svg(figure)


def cost_plot(found: dict[str, dict[str, Any]], cost: dict[str, dict[str, float]], label: str) -> Markup:
    """Draw each run's difference over the time that its steps took."""
    figure, (axes,) = new_figure(3.4)
    for (name, metric), colour in zip(found.items(), itertools.cycle(COLOURS), strict=False):
        draw_interval(axes, metric, cost[name]["training_seconds"] / 60, across=False, color=colour, label=name)
    axes.axhline(0, color=PLAIN, linewidth=1)
    axes.set(xlim=(0, None), xlabel="training steps (minutes)", ylabel=label)
    axes.legend(frameon=False)
    return as_svg(figure)


def curves_plot(curves: dict[str, dict[str, list[list[float]]]]) -> Markup:
    """Draw both losses of each run over tokens and over time."""
    figure, panels = new_figure(3.6, panels=2)
    for axes, column, scale, label in zip(panels, (0, 1), (1, 60), ("supervised tokens", "minutes"), strict=True):
        for (name, curve), colour in zip(curves.items(), itertools.cycle(COLOURS), strict=False):
            for kind, style in (
                ("train", {"linewidth": 0.8, "alpha": 0.6}),
                ("validation", {"marker": "o", "label": name}),
            ):
                x, y = [point[column] / scale for point in curve[kind]], [point[2] for point in curve[kind]]
                axes.plot(x, y, color=colour, **style)
        axes.set_xlabel(label)
    panels[0].set_ylabel("loss (nats a token)")
    panels[1].legend(frameon=False)
    return as_svg(figure)
