"""Runs side by side: only what was asked the same is compared, and the winner is the one with the evidence."""

import io
import json

import pytest
from rich.console import Console

from medibot.errors import RecipeError
from medibot.evaluation.compare import compare
from medibot.evaluation.evaluate import evaluate
from medibot.run import open_run, read_json

pytestmark = pytest.mark.slow


@pytest.fixture
def evaluated(trained):
    """evaluated(name, *overrides): a run in miniature, trained and evaluated."""

    def make(name: str, *overrides: str, rows: int | None = None):
        trained(name, "quantization=null", *overrides)
        evaluate(name, rows)
        return open_run(name)

    return make


def rewrite(name: str, change) -> None:
    """Give a run other scores for the same rows."""
    file = open_run(name).folder / "eval" / "rows.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        row["tuned"] = change(row)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_comparison_shows_what_differs_and_against_base_what_evaluation_found(evaluated, workplace):
    evaluated("one")
    evaluated("two", "lora.r=4", "training.max_steps=3")
    comparison = compare(["one", "two"])
    found = comparison.results
    assert [row[0] for row in found["differences"]] == ["lora.r", "training.max_steps"]
    assert found["differences"][0][1:] == ["16", "4"]
    for name in ("one", "two"):
        metrics = read_json(open_run(name).folder / "eval" / "results.json")["metrics"]
        for key, metric in found["metrics"][name].items():
            assert metric["value"] == pytest.approx(metrics[key]["value"])
            assert metric["low"] == pytest.approx(metrics[key]["low"])
        assert found["curves"][name]["train"] and found["cost"][name]["supervised_tokens"] > 0
    assert found["cost"]["one"]["weights_bytes"] > found["cost"]["two"]["weights_bytes"]
    folder = workplace / "outputs" / "comparisons" / "one-two"
    assert read_json(folder / "comparison.json")["sentence"] == comparison.verdict
    shown = io.StringIO()
    Console(file=shown, width=80).print(comparison)
    assert shown.getvalue().split(":")[0] in comparison.verdict and "written: " in shown.getvalue()
    assert all(len(line) <= 80 for line in shown.getvalue().splitlines())
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 3 and "lora.r" in page and "<script" not in page


def test_winner_is_named_only_with_evidence(evaluated):
    for name in ("one", "two", "three"):
        evaluated(name, rows=12)
    assert compare(["one", "two", "three"]).verdict.startswith("The data cannot tell")
    rewrite("two", lambda row: row["tuned"] | {"nll": row["tuned"]["nll"] - 0.5 * row["tuned"]["tokens"]})
    found = compare(["one", "two", "three"], baseline="one").results
    assert found["sentence"].startswith("two predicts the reference answers best, -0.5000 nats a token")
    assert found["metrics"]["two"]["nll"]["verdict"] == "better"
    assert found["metrics"]["three"]["nll"]["difference"] == 0.0 and "one" not in found["metrics"]


def test_other_rows_or_decoding_are_refused_with_both_fingerprints(evaluated):
    evaluated("one", rows=6)
    evaluated("two", rows=7)
    marks = [read_json(open_run(n).folder / "eval" / "results.json")["fingerprint"][:16] for n in ("one", "two")]
    with pytest.raises(RecipeError, match=rf"one \({marks[0]}\) and two \({marks[1]}\)"):
        compare(["one", "two"])
    evaluated("three", "evaluation.max_new_tokens=4", rows=6)
    with pytest.raises(RecipeError, match="same rows with the same decoding"):
        compare(["one", "three"])


def test_metrics_by_token_are_left_out_between_tokenizers_and_bases_are_not_mixed(evaluated, make_model):
    evaluated("one", rows=6)
    weights = f"model.pretrained_model_name_or_path={make_model('qwen')}"
    evaluated("two", weights, rows=6)
    with pytest.raises(RecipeError, match=r"different base models .*BASELINE=one"):
        compare(["one", "two"])
    found = compare(["one", "two"], baseline="one").results
    assert found["left_out"] == ["nll", "perplexity", "token_accuracy"] and "bits a byte" in found["sentence"]
    assert not set(found["left_out"]) & set(found["metrics"]["two"])


def test_what_cannot_be_compared_is_said_in_a_line(evaluated, trained):
    evaluated("one", rows=4)
    trained("bare", "quantization=null")
    for names, baseline, said in (
        (["one"], "base", "two or more"),
        (["one", "one"], "base", "two or more"),
        (["one", "bare"], "base", "make eval RUN=bare"),
        (["one", "none"], "base", "run 'none' not found"),
        (["one", "bare"], "three", "BASELINE"),
    ):
        with pytest.raises(RecipeError, match=said):
            compare(names, baseline)


def test_thinking_is_compared_where_every_run_tells_of_it_and_between_tokenizers_left_out(evaluated, say):
    longer = "evaluation.max_new_tokens=64"
    say(tuned="<think>\nHm.\n</think>\nRest.", base="Rest.")
    evaluated("one", longer, rows=4)
    say(tuned="<think>\nHm, and hm again.\n</think>\nRest.", base="Rest.")
    evaluated("two", longer, "lora.r=4", rows=4)
    found = compare(["one", "two"], baseline="one").results
    thought = found["metrics"]["two"]["thinking_tokens"]
    assert thought["difference"] > 0 and thought["verdict"] == "differs" and found["left_out"] == []
    file = open_run("two").folder / "eval" / "results.json"
    whole = read_json(file)
    file.write_text(json.dumps(whole | {"tokenizer": "another"}))
    assert "thinking_tokens" in compare(["one", "two"], baseline="one").results["left_out"]
    # Nothing of it in one of them: that is no matter of tokenizers
    whole["metrics"].pop("thinking_tokens")
    file.write_text(json.dumps(whole))
    found = compare(["one", "two"], baseline="one").results
    assert "thinking_tokens" not in found["metrics"]["two"] and found["left_out"] == []
