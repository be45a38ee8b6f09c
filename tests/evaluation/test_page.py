"""The page of an evaluation: whole, escaped, the same each time, and readable in a real browser."""

import random
import re
import shutil

import pytest

from medibot.evaluation.metrics import METRICS, score_answer
from medibot.evaluation.page import comparison_page, evaluation_page, gain, side_by_side
from medibot.evaluation.statistics import compare_scores

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
AWKWARD = ["<script>alert(1)</script>", "[bold]$5 & $6[/bold]", "x" * 300, "", "é 漢字 🙂", "line\n\n- one\n- two"]


def lines(count: int) -> list[dict]:
    draw, rows = random.Random(0), []
    for index in range(count):
        reference = " ".join(draw.choices(["rest", "water", "doctor", "fever", "7 days"], k=draw.randint(5, 60)))
        line = {"row": index, "group": f"g{index // 2}", "question": f"What is {AWKWARD[index % 6]}?"}
        line |= {"reference": reference, "document_source": "A & B", "question_type": f"type {index % 3} $"}
        for which, mean in (("base", 2.4), ("tuned", 2.1)):
            answer = AWKWARD[index % 6] + " ".join(draw.choices(["rest", "water", "fever"], k=draw.randint(0, 90)))
            tokens = draw.randint(20, 200)
            nll = tokens * draw.gauss(mean, 0.3)
            counted = {"nll": nll, "tokens": tokens, "correct": tokens // 2, "bits": nll * 1.44, "bytes": 4 * tokens}
            said = {"text": answer, "stopped": draw.random() < 0.6, "answer_tokens": 30}
            line[which] = counted | said | score_answer(answer, reference)
        rows.append(line)
    return rows


def differences(rows: list[dict]) -> dict[str, dict]:
    base, tuned, group = ([row[key] for row in rows] for key in ("base", "tuned", "group"))
    found = compare_scores(base, tuned, group)
    return {m.name: {"label": m.label, "definition": m.definition, "better": m.better} | found[m.name] for m in METRICS}


def results(rows: list[dict], **changes) -> dict:
    kinds = sorted({row["question_type"] for row in rows})
    parts = {kind: [row for row in rows if row["question_type"] == kind] for kind in kinds}
    parts["a kind with one group"] = rows[:1]
    by = {kind: {"rows": len(part), "groups": 1, "metrics": differences(part)} for kind, part in parts.items()}
    found = {"run": "mine <b>", "verdict": "mine answers better: 2.40 -> 2.10.", "model": "a/b", "method": "LoRA"}
    found |= {"data": "test split of a/b", "rows": len(rows), "of": len(rows), "groups": 60, "fingerprint": "f" * 64}
    found |= {"decoding": {"max_new_tokens": 64, "do_sample": False}, "precision": "float32", "seed": 0}
    found |= {"resamples": 200, "metrics": differences(rows), "by": {"question_type": by}, "found_in_training": []}
    return found | changes


def test_page_is_one_file_that_loads_nothing_and_runs_nothing():
    rows = lines(60)
    page = evaluation_page(results(rows), rows)
    assert "<script" not in page and "&lt;script&gt;" in page and "mine <b>" not in page
    assert not re.findall(r"""(?:src|href|@import|url)\s*[=(]\s*["']?\s*(?:https?:)?//""", page)
    assert page.count("<svg") == 3 and "Not a medical device" in page


def test_same_results_give_the_same_bytes():
    rows = lines(30)
    assert evaluation_page(results(rows), rows) == evaluation_page(results(rows), rows)


def test_gains_losses_and_draw_are_those_of_the_rows():
    rows = lines(60)
    titled = dict(side_by_side(rows))
    assert titled["Largest gains"][0] is max(rows, key=gain) and titled["Largest losses"][0] is min(rows, key=gain)
    assert titled["Drawn at random"] == dict(side_by_side(rows))["Drawn at random"]
    same = [row | {"tuned": row["base"]} for row in rows]
    assert set(dict(side_by_side(same))) == {"Drawn at random"}


def test_warnings_stand_only_where_there_is_something_to_warn_of():
    rows = lines(12)
    plain = evaluation_page(results(rows), rows)
    assert "A quick look" not in plain and "flatter the tuned model" not in plain
    warned = evaluation_page(results(rows, of=500, found_in_training=[3, 17]), rows)
    assert "A quick look: 12 of 500" in warned and "2 rows stand in the training split" in warned and "3, 17" in warned


def comparison(rows: list[dict], **changes) -> dict:
    curve = {
        "train": [[100 * i, 5.0 * i, 3 - 0.1 * i] for i in range(1, 9)],
        "validation": [[0, 1, 3.0], [800, 45, 2.1]],
    }
    found = {
        "baseline": "base",
        "runs": ["one", "two <b>"],
        "sentence": "The data cannot tell.",
        "fingerprint": "f" * 64,
    }
    found |= {"rows": 60, "of": 60, "groups": 30, "left_out": [], "differences": [["lora.r", "16", "4"]]}
    found |= {"metrics": {name: differences(rows) for name in ("one", "two <b>")}}
    cost = {"one": {"training_seconds": 60.0}, "two <b>": {"training_seconds": 90.0}}
    return found | {"curves": dict.fromkeys(["one", "two <b>"], curve), "cost": cost} | changes


def test_comparison_is_escaped_whole_and_the_same_each_time():
    found = comparison(lines(60))
    page = comparison_page(found, [["supervised tokens", "800", "800"]])
    assert page == comparison_page(found, [["supervised tokens", "800", "800"]])
    assert page.count("<svg") == 3 and "two <b>" not in page and "supervised tokens" in page
    assert "A quick look" not in page and "Left out" not in page
    partial = comparison_page(comparison(lines(60), of=99, left_out=["nll"]), [])
    assert "A quick look: 60 of 99" in partial and "Left out, since the tokenizers differ: nll" in partial


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("kind", ["evaluation", "comparison"])
def test_page_fits_a_phone_and_a_screen_in_a_real_browser(kind, width, tmp_path):
    from playwright.sync_api import sync_playwright

    rows = lines(60)
    file = tmp_path / "report.html"
    drawn = evaluation_page(results(rows), rows) if kind == "evaluation" else comparison_page(comparison(rows), [])
    file.write_text(drawn)
    said, asked = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": width, "height": 900})
        tab.on("console", lambda message: said.append(message.text))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(file.as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        boxes = tab.evaluate("[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().width)")
        assert len(boxes) == drawn.count("<svg") > 1 and all(200 < box <= width for box in boxes)
        assert tab.locator("td.better").first.is_visible()
        browser.close()
    assert said == [] and asked == [file.as_uri()]
