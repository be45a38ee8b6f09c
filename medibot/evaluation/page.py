"""Self-contained HTML pages: tables, SVG plots and answers side by side; no script, nothing from outside."""

import io
import itertools
import random
from typing import Any

from jinja2 import Environment
from markdown_it import MarkdownIt
from markupsafe import Markup

BASE, TUNED, PLAIN = "#0072b2", "#d55e00", "#57606a"


SHOWN = 5


STYLE = Markup("""
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; color: #1b1f24; overflow-wrap: anywhere; }
.verdict { font-size: 1.35rem; line-height: 1.4; } .facts, figcaption, .small { color: #57606a; font-size: .9rem; }
.warning { border-left: 4px solid #d55e00; background: #fff4ec; padding: .5rem 1rem; }
.wide { overflow-x: auto; overflow-wrap: normal; } table { border-collapse: collapse; width: 100%; }
th, td { padding: .3rem .75rem; text-align: right; border-bottom: 1px solid #d8dee4; white-space: nowrap; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; } td.better { color: #005a8f; font-weight: 600; } td.worse { color: #b34700; font-weight: 600; }
figure { margin: 1.5rem 0; } svg { max-width: 100%; height: auto; }
.answers { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 1rem; } .answers p { white-space: pre-wrap; margin: .25rem 0; }
.answers > div { background: #f6f8fa; border-radius: 6px; padding: .75rem; } .answers h4 { margin: 0; }
@media (max-width: 45rem) { .answers { grid-template-columns: 1fr; } }
""")


PAGE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ r.run }}: base against tuned</title><style>{{ style }}</style></head><body>
<h1>{{ r.run }}: base against tuned</h1>
<p class="facts">Not a medical device: answers here are a model's output and can be wrong. No figure on this page measures whether an answer is medically right.</p>
<p class="verdict">{{ r.verdict }}</p>
{% if r.rows < r.of %}<p class="warning">A quick look: {{ r.rows }} of {{ r.of }} rows were asked.</p>{% endif %}
{% if r.found_in_training %}<p class="warning">{{ r.found_in_training | length }} rows stand in the training split and flatter the tuned model: {{ r.found_in_training | join(", ") }}.</p>{% endif %}
<p class="facts">{{ r.method }} of {{ r.model }} on {{ r.data }}: {{ r.rows }} rows of {{ r.groups }} groups, each asked once of both models in {{ r.precision }};
decoding {% for key, value in r.decoding.items() %}{{ key }} {{ value }}{{ ", " if not loop.last }}{% endfor %}.
Rows and decoding: <span title="{{ r.fingerprint }}">{{ r.fingerprint[:16] }}</span>.</p>
<h2>Metrics</h2>
<div class="wide" tabindex="0"><table><tr><th>metric</th><th>base</th><th>tuned</th><th>difference</th><th>95 % interval</th><th>verdict</th></tr>
{% for m in r.metrics.values() %}<tr><td>{{ m.label }}</td><td>{{ "%.4g" | format(m.baseline) }}</td><td>{{ "%.4g" | format(m.value) }}</td>
<td>{{ "%+.4f" | format(m.difference) }}</td><td>{% if m.low is none %}too few groups{% else %}{{ "%+.4f" | format(m.low) }} to {{ "%+.4f" | format(m.high) }}{% endif %}</td>
<td class="{{ m.verdict }}">{{ m.verdict }}</td></tr>
{% endfor %}</table></div>
<p class="small">Paired bootstrap over groups, {{ r.resamples }} resamples, seed {{ r.seed }}; a verdict for each metric by itself, so that of twenty true zeros one will look like a difference.</p>
<details><summary>What each metric is</summary><dl>{% for m in r.metrics.values() %}<dt>{{ m.label }}</dt><dd>{{ m.definition }}</dd>{% endfor %}</dl></details>
<h2>Plots</h2>
{% for caption, drawn in plots %}<figure role="img" aria-label="{{ caption }}">{{ drawn }}<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
<h2>Answers side by side</h2>
{% for title, lines in chosen %}<h3>{{ title }}</h3>
{% for line in lines %}<section><p><strong>{{ line.question }}</strong> <span class="small">row {{ line.row }}{% if line.document_source %}, {{ line.document_source }}{% endif %}</span></p>
<div class="answers"><div><h4>reference</h4><p>{{ line.reference }}</p></div>
{% for which in ("base", "tuned") %}<div><h4>{{ which }}</h4><p>{{ line[which].text }}</p>
<p class="small">{{ "%.3f" | format(line[which].nll / line[which].tokens) }} nats a token for the reference; {{ "stopped by itself" if line[which].stopped else "cut at %d tokens" | format(line[which].answer_tokens) }}</p></div>
{% endfor %}</div></section>
{% endfor %}{% endfor %}
</body></html>
"""
)


COMPARISON = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ c.runs | join(", ") }}</title><style>{{ style }}</style></head><body>
<h1>{{ c.runs | join(", ") }}</h1>
<p class="verdict">{{ c.sentence }}</p>
{% if c.rows < c.of %}<p class="warning">A quick look: {{ c.rows }} of {{ c.of }} rows were asked.</p>{% endif %}
{% if c.left_out %}<p class="warning">Left out, since the tokenizers differ: {{ c.left_out | join(", ") }}.</p>{% endif %}
<p class="facts">{{ c.rows }} rows of {{ c.groups }} groups, the same for all; baseline: {{ c.baseline }}.
Rows and decoding: <span title="{{ c.fingerprint }}">{{ c.fingerprint[:16] }}</span>. No figure here measures whether an answer is medically right.</p>
{% macro table(title, header, rows) %}<h2>{{ title }}</h2><div class="wide" tabindex="0"><table><tr>{% for h in header %}<th>{{ h }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>{% endmacro %}
{{ table("What differs in the recipes", ["key"] + c.runs, c.differences) }}
<h2>Test metrics</h2><div class="wide" tabindex="0"><table><tr><th>metric</th><th>{{ c.baseline }}</th>{% for name in c.metrics %}<th>{{ name }}</th>{% endfor %}</tr>
{% for key, metric in (c.metrics.values() | first).items() %}<tr><td>{{ metric.label }}</td><td>{{ "%.4g" | format(metric.baseline) }}</td>
{% for found in c.metrics.values() %}{% set m = found[key] %}<td class="{{ m.verdict }}">{{ "%.4g" | format(m.value) }}<br><span class="small">{{ m.verdict }}{% if m.low is not none %}, {{ "%+.4f" | format(m.difference) }}<br>({{ "%+.4f" | format(m.low) }} to {{ "%+.4f" | format(m.high) }}){% endif %}</span></td>{% endfor %}</tr>
{% endfor %}</table></div>
<h2>Plots</h2>
{% for caption, drawn in plots %}<figure role="img" aria-label="{{ caption }}">{{ drawn }}<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
{{ table("Cost", ["training"] + c.runs, cost) }}
</body></html>
"""
)


DOCUMENT = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>{{ style }}
td, th { text-align: left; } td { white-space: normal; } pre { background: #f6f8fa; border-radius: 6px; padding: .75rem; overflow-x: auto; overflow-wrap: normal; }
blockquote { border-left: 4px solid #d55e00; background: #fff4ec; margin: 0; padding: .25rem 1rem; }
</style></head><body>
{{ body }}
<details><summary>What the hub reads</summary><pre tabindex="0">{{ front }}</pre></details>
</body></html>
"""
)


# Okabe and Ito's colours, told apart by every kind of colour vision
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def evaluation_page(results: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The page of one evaluation, from what results.json and rows.jsonl hold; the same input gives the same bytes."""
    plots = [
        (
            "How much lower the negative log-likelihood of each reference is after training, row by row: right of the line the tuned model is better.",
            gains_plot(rows),
        ),
        (
            "Words of the answers and of the references, as the share of rows that are at most so long.",
            length_plot(rows),
        ),
    ]
    for column, parts in results["by"].items():
        plots.append(
            (
                f"Difference in nats a token for each {column.replace('_', ' ')}, with 95 % intervals (number of rows behind it): left of the line the tuned model is better.",
                parts_plot(parts),
            )
        )
    return PAGE.render(style=STYLE, r=results, plots=plots, chosen=side_by_side(rows))


def comparison_page(comparison: dict[str, Any], cost: list[list[str]]) -> str:
    """The page of a comparison, from what comparison.json holds and the cost table's rows."""
    primary = "bits_per_byte" if comparison["left_out"] else "nll"
    unit = "bits a byte" if comparison["left_out"] else "nats a token"
    plots = [
        (
            f"Difference from {comparison['baseline']} on the test rows with 95 % intervals: left of the line is better.",
            runs_plot({name: found[primary] for name, found in comparison["metrics"].items()}, unit),
        ),
        (
            "Training loss (thin) and validation loss (dots) by supervised tokens and by wall time.",
            curves_plot(comparison["curves"]),
        ),
        (
            f"What the training steps took, and what they brought against {comparison['baseline']}, with 95 % intervals: low and left is best.",
            cost_plot(
                {name: found[primary] for name, found in comparison["metrics"].items()}, comparison["cost"], unit
            ),
        ),
    ]
    return COMPARISON.render(style=STYLE, c=comparison, plots=plots, cost=cost)


def document_page(title: str, front: str, text: str) -> str:
    """A model card (`front` matter and Markdown `text`) as a page; HTML that stands in it is shown, not read."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    body = body.replace("<table>", '<div class="wide" tabindex="0"><table>').replace("</table>", "</table></div>")
    body = body.replace("<pre>", '<pre tabindex="0">')
    return DOCUMENT.render(title=title, style=STYLE, front=front, body=Markup(body))


def side_by_side(rows: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The largest gains and losses in nats a token, and a draw that is the same each time."""
    ordered = sorted(rows, key=gain)
    wins = [row for row in reversed(ordered) if gain(row) > 0][:SHOWN]
    losses = [row for row in ordered if gain(row) < 0][:SHOWN]
    drawn = random.Random(0).sample(rows, min(SHOWN, len(rows)))
    titled = [("Largest gains", wins), ("Largest losses", losses), ("Drawn at random", drawn)]
    return [(title, chosen) for title, chosen in titled if chosen]


def gain(row: dict[str, Any]) -> float:
    """Base minus tuned, in nats a token of the reference."""
    return row["base"]["nll"] / row["base"]["tokens"] - row["tuned"]["nll"] / row["tuned"]["tokens"]


def figure(height: float) -> tuple[Any, Any]:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.hashsalt": "medibot", "svg.fonttype": "none", "font.family": "sans-serif"})
    drawn = Figure(figsize=(9, height), layout="constrained")
    axes = drawn.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return drawn, axes


def svg(drawn: Any) -> Markup:
    """The figure as an SVG element, the same bytes each time."""
    buffer = io.StringIO()
    drawn.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :])


def gains_plot(rows: list[dict[str, Any]]) -> Markup:
    drawn, axes = figure(3)
    gains = [gain(row) for row in rows]
    axes.hist(gains, bins=min(40, max(5, len(rows) // 5)), color=TUNED, edgecolor="white", linewidth=0.5)
    axes.axvline(0, color=PLAIN, linewidth=1)
    axes.set(xlabel="base minus tuned (nats a token)", ylabel="rows")
    return svg(drawn)


def length_plot(rows: list[dict[str, Any]]) -> Markup:
    drawn, axes = figure(3)
    lengths = {
        "reference": ([row["base"]["reference_words"] for row in rows], PLAIN, "--"),
        "base": ([row["base"]["answer_words"] for row in rows], BASE, "-"),
        "tuned": ([row["tuned"]["answer_words"] for row in rows], TUNED, "-"),
    }
    for name, (words, colour, style) in lengths.items():
        axes.ecdf(words, label=name, color=colour, linestyle=style)
    axes.set(xlabel="words", ylabel="share of rows", xlim=(0, None))
    axes.legend(frameon=False)
    return svg(drawn)


def parts_plot(parts: dict[str, Any]) -> Markup:
    """One line for each value of a column, the most rows first; without an interval where there is one group."""
    ordered = sorted(parts.items(), key=lambda part: part[1]["rows"])
    drawn, axes = figure(1 + 0.3 * len(ordered))
    for place, (_, part) in enumerate(ordered):
        nll = part["metrics"]["nll"]
        if nll["low"] is not None:
            axes.plot([nll["low"], nll["high"]], [place, place], color=TUNED, linewidth=2)
        axes.plot(
            nll["difference"], place, "o", color=TUNED if nll["low"] is not None else "none", markeredgecolor=TUNED
        )
    axes.axvline(0, color=PLAIN, linewidth=1)
    # A dollar sign would begin a formula
    names = [f"{name[:40]} ({part['rows']})".replace("$", r"\$") for name, part in ordered]
    axes.set_yticks(range(len(ordered)), names)
    axes.set_xlabel("tuned minus base (nats a token)")
    return svg(drawn)


def runs_plot(found: dict[str, dict[str, Any]], unit: str) -> Markup:
    drawn, axes = figure(1 + 0.4 * len(found))
    for place, metric in enumerate(found.values()):
        if metric["low"] is not None:
            axes.plot([metric["low"], metric["high"]], [place, place], color=TUNED, linewidth=2)
        axes.plot(metric["difference"], place, "o", color=TUNED)
    axes.axvline(0, color=PLAIN, linewidth=1)
    axes.set_yticks(range(len(found)), list(found))
    axes.set(ylim=(len(found) - 0.5, -0.5), xlabel=f"difference ({unit})")
    return svg(drawn)


def cost_plot(found: dict[str, dict[str, Any]], cost: dict[str, dict[str, float]], unit: str) -> Markup:
    drawn, axes = figure(3.4)
    for (name, metric), colour in zip(found.items(), itertools.cycle(COLOURS), strict=False):
        minutes = cost[name]["training_seconds"] / 60
        if metric["low"] is not None:
            axes.plot([minutes, minutes], [metric["low"], metric["high"]], color=colour, linewidth=2)
        axes.plot(minutes, metric["difference"], "o", color=colour, label=name)
    axes.axhline(0, color=PLAIN, linewidth=1)
    axes.set(xlim=(0, None), xlabel="training steps (minutes)", ylabel=f"difference ({unit})")
    axes.legend(frameon=False)
    return svg(drawn)


def curves_plot(curves: dict[str, dict[str, list[list[float]]]]) -> Markup:
    """Both losses of each run on two x-axes that share the y-axis."""
    drawn, _ = figure(3.6)
    drawn.clear()
    panels = drawn.subplots(1, 2, sharey=True)
    for axes, column, scale, label in zip(panels, (0, 1), (1, 60), ("supervised tokens", "minutes"), strict=True):
        for (name, curve), colour in zip(curves.items(), itertools.cycle(COLOURS), strict=False):
            for kind, style in (("train", {"linewidth": 0.8, "alpha": 0.6}), ("validation", {"marker": "o"})):
                points = curve[kind]
                x, y = [point[column] / scale for point in points], [point[2] for point in points]
                axes.plot(x, y, color=colour, label=name if kind == "validation" else None, **style)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel(label)
    panels[0].set_ylabel("loss (nats a token)")
    panels[1].legend(frameon=False)
    return svg(drawn)
