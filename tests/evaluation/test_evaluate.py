"""Base against tuned on tiny models: what is scored, that nothing else decides it, and what must be refused."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import SAMPLE, wandb_records
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from medibot.data.prepared import prepare
from medibot.errors import RecipeError
from medibot.evaluation import scores
from medibot.evaluation.evaluate import compare_lines, describe_rows, evaluate, summarize_thinking
from medibot.evaluation.metrics import MEASURES, METRICS, name_references, score_answer
from medibot.evaluation.questions import Questions, question, reference, tokenize_rows
from medibot.evaluation.scores import likelihood
from medibot.model.loading import load_tuned
from medibot.recipe import load_recipe
from medibot.run import open_run, read_json, read_lines
from medibot.training.session import train

pytestmark = pytest.mark.slow


def results(name: str, folder: str = "eval"):
    return read_json(open_run(name).folder / folder / "results.json")


@pytest.mark.parametrize(
    "method", [[], ["quantization=null"], ["lora=null", "quantization=null"]], ids=["nf4", "lora", "full"]
)
def test_evaluation_writes_results_rows_and_page(method, trained):
    this = trained("mine", *method)
    evaluate("mine")
    found, lines = results("mine"), read_lines(this.folder / "eval" / "rows.jsonl")
    assert found["rows"] == found["of"] == len(lines) == read_json(this.folder / "split.json")["rows"]["test"]
    assert all(math.isfinite(value[key]) for value in found["metrics"].values() for key in ("baseline", "value"))
    assert found["metrics"]["nll"]["difference"] != 0
    assert set(found["by"]) == {"question_type", "document_source"}
    assert sum(part["rows"] for part in found["by"]["question_type"].values()) == len(lines)
    page = (this.folder / "eval" / "report.html").read_text()
    assert found["verdict"] in page.replace("&gt;", ">") and "Not a medical device" in page
    total = sum(line["tuned"]["nll"] for line in lines) / sum(line["tuned"]["tokens"] for line in lines)
    assert found["metrics"]["nll"]["value"] == pytest.approx(total)


def test_a_mixed_run_is_broken_down_by_source_and_asked_its_earlier_turns(miniature):
    recipe = miniature("medquad-everyday", "data.test=0.1")
    train(recipe, "mixed")
    evaluate("mixed", rows=12)
    found, lines = results("mixed"), read_lines(open_run("mixed").folder / "eval" / "rows.jsonl")
    assert set(found["by"]["source"]) == {SAMPLE.stem, "everyday"} == {line["source"] for line in lines}
    assert sum(part["rows"] for part in found["by"]["source"].values()) == len(lines) == 12


def test_likelihood_is_upstreams_loss_and_independent_of_the_batch(trained):
    this = trained("mine", "quantization=null")
    recipe = load_recipe(str(this.recipe))
    tokenizer = AutoTokenizer.from_pretrained(this.weights)
    rows = prepare(recipe).load("test")
    tokens = tokenize_rows(tokenizer, rows).to_list()
    weights = load_tuned(recipe, this.weights, torch.float32)
    together = likelihood(weights, tokens)
    alone = [likelihood(weights, [row])[0] for row in tokens]
    for row, one, many in zip(tokens, alone, together, strict=True):
        ids = {key: torch.tensor([row[key]]) for key in ("input_ids", "labels")}
        with torch.inference_mode():
            oracle = weights(**ids).loss.item()
        assert one["tokens"] == sum(label != -100 for label in row["labels"])
        assert one["nll"] / one["tokens"] == pytest.approx(oracle, rel=1e-5)
        assert many["nll"] == pytest.approx(one["nll"], rel=1e-5) and many["tokens"] == one["tokens"]


def test_what_is_scored_is_the_answer_and_its_stop_token(trained):
    this = trained("mine")
    tokenizer = AutoTokenizer.from_pretrained(this.weights)
    recipe = load_recipe(str(this.recipe))
    rows = prepare(recipe).load("test")
    for row, tokens in zip(rows, tokenize_rows(tokenizer, rows), strict=True):
        text = tokenizer.decode([label for label in tokens["labels"] if label != -100])
        assert text == reference(row) + "<|im_end|>\n"


def test_untrained_adapter_gives_no_evidence_and_exactly_no_difference(trained):
    file = trained("idle").weights / "adapter_model.safetensors"
    tensors = load_file(file)
    # As an adapter is before step 1: nothing is added to the base
    save_file({k: t.zero_() if "lora_B" in k else t for k, t in tensors.items()}, file, metadata={"format": "pt"})
    for metric in evaluate("idle").results["metrics"].values():
        assert metric["difference"] == metric["low"] == metric["high"] == 0.0
        assert metric["verdict"] == "no evidence"


def test_interrupted_evaluation_goes_on_and_gives_the_same(trained, monkeypatch, workplace):
    trained("mine", "quantization=null")
    whole = evaluate("mine")
    calls, real = [], likelihood

    def counted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(scores, "likelihood", counted)
    evaluate("mine")
    assert not calls, "what is known was computed again"
    for file in (workplace / "cache" / "scores").glob("*.jsonl"):
        file.unlink()
    with pytest.raises(KeyboardInterrupt):
        evaluate("mine")
    half = next((workplace / "cache" / "scores").glob("*.jsonl"))
    assert len(read_lines(half)) == 2
    with half.open("a") as stream:
        stream.write('{"batch": ["likelihood", 3], "sco')
    again = evaluate("mine")
    assert again.results["metrics"] == whole.results["metrics"]


def test_second_recipe_takes_the_bases_scores_from_the_first(trained, capsys):
    trained("one", "quantization=null")
    trained("two", "quantization=null", "lora.r=4")
    first = evaluate("one").results
    capsys.readouterr()
    second = evaluate("two").results
    said = capsys.readouterr().out
    known = [line for line in said.splitlines() if "known already" in line]
    assert len(known) == 1 and known[0].startswith("base: ")
    assert first["fingerprint"] == second["fingerprint"]
    for name, metric in first["metrics"].items():
        assert metric["baseline"] == second["metrics"][name]["baseline"]


def test_quick_look_says_so_and_asks_the_same_rows_each_time(trained):
    this = trained("mine")
    assert evaluate("mine", rows=5).__rich__().renderables[1].startswith("A quick look: 5 of")
    found = results("mine")
    assert found["rows"] == 5 < found["of"]
    five = {line["row"] for line in read_lines(this.folder / "eval" / "rows.jsonl")}
    evaluate("mine", rows=7)
    assert five < {line["row"] for line in read_lines(this.folder / "eval" / "rows.jsonl")}


def test_changed_data_is_refused(trained, make_model, tmp_path):
    copy = tmp_path / "copy.jsonl"
    copy.write_text(SAMPLE.read_text())
    trained("mine", f"data.path={copy}")
    copy.write_text("\n".join(SAMPLE.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(RecipeError, match="not what the run was split from"):
        evaluate("mine")
    assert not (open_run("mine").folder / "eval").exists()


def test_other_file_is_asked_and_rows_known_from_training_are_named(trained, tmp_path, capsys):
    this = trained("mine")
    known = prepare(load_recipe(str(this.recipe))).load("train")[0]
    rows = [
        {"question": "What is a made-up ailment?", "answer": "It is an ailment that nobody has, made up for a test."},
        {"question": question(known), "answer": "Something else altogether."},
        {"question": "Who is not answered?", "answer": ""},
    ]
    file = tmp_path / "my rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate("mine", data=file)
    said = capsys.readouterr().out
    assert "warning: row 1 of my rows.jsonl is in the training split" in said
    assert "1 rows dropped by drop_unanswered" in said
    assert results("mine", "eval-my rows")["found_in_training"] == [1]
    assert not (this.folder / "eval").exists()


def test_missing_file_and_missing_test_split_are_said_in_a_line(trained, tmp_path):
    trained("mine", "data.test=0.0")
    with pytest.raises(RecipeError, match=r"none\.jsonl. not found"):
        evaluate("mine", data=tmp_path / "none.jsonl")
    with pytest.raises(RecipeError, match="no test split"):
        evaluate("mine")


def test_full_fine_tunes_base_is_the_model_it_began_as(trained, make_model):
    this = trained("full", "lora=null", "quantization=null")
    trained("lora", "quantization=null")
    full, lora = evaluate("full").results, evaluate("lora").results
    assert full["metrics"]["nll"]["baseline"] == lora["metrics"]["nll"]["baseline"]
    assert AutoModelForCausalLM.from_pretrained(this.weights).num_parameters() > 0
    assert full["metrics"]["nll"]["value"] != full["metrics"]["nll"]["baseline"]


def test_evaluation_is_a_wandb_run_of_its_own_in_the_same_group(trained):
    this = trained("mine", "tracking={project: medibot}")
    evaluate("mine", rows=4)
    files = sorted((this.folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    content = [wandb_records(file) for file in files]
    assert sum("mine-eval" in text for text in content) == 1
    assert sum("test/answers" in text for text in content) == 1
    split = read_json(this.folder / "split.json")["fingerprint"]
    group = f"{Path(load_recipe(str(this.recipe)).data.path).stem}-{split[:8]}"
    assert all(group in text for text in content)
    assert sum("evaluation" in text and "mine-adapter" in text and "report.html" in text for text in content) == 1


def test_a_file_name_with_a_space_names_an_artifact_that_wandb_takes(trained, tmp_path, capfd):
    this = trained("mine", "tracking={project: medibot}")
    file = tmp_path / "my questions.jsonl"
    file.write_text("".join(SAMPLE.open().readlines()[:3]))
    evaluate("mine", data=file)
    logs = [wandb_records(log) for log in (this.folder / "wandb").glob("offline-run-*/run-*.wandb")]
    assert sum("mine-eval-my-questions" in log for log in logs) == 1 and "no more tables" not in capfd.readouterr().out


LONGER = ("quantization=null", "evaluation.max_new_tokens=64")


def test_an_answer_is_scored_without_what_was_thought_before_it(trained, say):
    this = trained("mine", *LONGER)
    tokenizer = AutoTokenizer.from_pretrained(this.weights)
    say(tuned="Take 7 mg with water.", base="<think>\nHm.\n\n5 mg  or 6?\n</think>\n\nTake 7 mg with water.")
    report = evaluate("mine", rows=4)
    lines, found = read_lines(report.folder / "rows.jsonl"), report.results["metrics"]
    for line in lines:
        assert line["base"]["text"] == line["tuned"]["text"] == "Take 7 mg with water."
        assert (line["base"]["thinking"], line["tuned"]["thinking"]) == ("Hm.\n\n5 mg  or 6?", "")
        # What was thought costs tokens, and no more
        assert line["base"]["answer_tokens"] > line["tuned"]["answer_tokens"] + line["base"]["thinking_tokens"]
        assert {key: line["base"][key] for key in score_answer("", "")} == score_answer(
            "Take 7 mg with water.", line["reference"]
        )
    for name in ("rouge_l", "chrf", "length_ratio", "repetition", "foreign_numbers", "foreign_doses", "stop_rate"):
        assert found[name]["difference"] == 0.0, name
    thought = len(tokenizer("Hm.\n\n5 mg  or 6?", add_special_tokens=False)["input_ids"])
    assert found["thinking_tokens"]["baseline"] == thought and found["thinking_tokens"]["value"] == 0
    assert found["thinking_tokens"]["verdict"] == "differs" and list(found) == [metric.name for metric in MEASURES]
    assert report.results["reference_thinking_tokens"] == 0 and "reference answers better" in report.verdict
    page = (report.folder / "report.html").read_text()
    assert "<details><summary>Thinking (5 words)</summary><p>Hm.\n\n5 mg  or 6?</p></details>" in page


def test_an_answer_cut_while_it_thinks_is_empty(trained, say):
    trained("mine", *LONGER)
    say(tuned="<think>\n" + "Take 7 mg. " * 40)
    report = evaluate("mine", rows=2)
    found, (line, _) = report.results["metrics"], read_lines(report.folder / "rows.jsonl")
    assert line["tuned"]["text"] == "" and line["tuned"]["thinking"].startswith("Take 7 mg. Take 7 mg.")
    assert found["rouge_l"]["value"] == found["stop_rate"]["value"] == found["foreign_doses"]["value"] == 0
    assert found["thinking_tokens"]["value"] > 40


def test_without_thinking_nothing_tells_of_it(trained, say):
    trained("mine", *LONGER)
    say(tuned="The mark <think> opens a trace and </think> closes it.")
    report = evaluate("mine", rows=2)
    (line, _) = read_lines(report.folder / "rows.jsonl")
    assert line["tuned"]["text"] == "The mark <think> opens a trace and </think> closes it."
    assert list(report.results["metrics"]) == [metric.name for metric in METRICS]
    assert not [key for key in [*line, *line["tuned"], *report.results] if "thinking" in key]
    assert "<summary>Thinking" not in (report.folder / "report.html").read_text()


def thinking_questions(tokenizer) -> Questions:
    """Three questions; the first's reference does not think, the last's stands in its answer."""
    parts = [("Rest.", None), ("Water, 2 l.", "é  7?"), ("<think>\nHm.\n</think>\n\nRest.", None)]
    rows = [
        {
            "row": place,
            "group": f"g{place}",
            "prompt": [{"role": "user", "content": "What helps?"}],
            "completion": [{"role": "assistant", "content": content, "reasoning_content": thinking}],
            "chat_template_kwargs": {},
        }
        for place, (content, thinking) in enumerate(parts)
    ]
    found = Dataset.from_list(rows)
    return Questions(found, found, 3, "three rows", [], tokenizer, None)


def test_a_references_thinking_is_in_the_likelihood_and_in_no_comparison_of_texts(make_tokenizer):
    tokenizer = make_tokenizer("thinking")
    questions = thinking_questions(tokenizer)
    labels = [[label for label in row["labels"] if label != -100] for row in tokenize_rows(tokenizer, questions.rows)]
    assert tokenizer.decode(labels[1]) == "<think>\né  7?\n</think>\n\nWater, 2 l.<|im_end|>\n"
    said = {"nll": 3.0, "tokens": 4, "correct": 1, "answer_tokens": 9, "stopped": True}
    scored = [said | {"text": text} for text in ("Rest.", "Hm.\n</think>\nWater, 2 l. or 7.", "</think>Rest.")]
    lines = describe_rows(questions, {"base": scored, "tuned": scored}, opened=True)
    assert [line["tuned"]["bytes"] for line in lines] == [5, len("é  7?Water, 2 l.".encode()), 8]
    assert [line["reference"] for line in lines] == ["Rest.", "Water, 2 l.", "Rest."]
    assert [line["reference_thinking"] for line in lines] == ["", "é  7?", "Hm."]
    # A prompt that opens the trace: what is never closed is all thought
    assert [line["tuned"]["thinking"] for line in lines] == ["Rest.", "Hm.", ""]
    # A number of the reference's thinking is foreign to its answer
    assert lines[1]["tuned"]["foreign_numbers"] == 1 and lines[1]["tuned"]["reference_words"] == 3
    found = compare_lines(lines)["metrics"]
    assert found["bits_per_byte"]["value"] == pytest.approx(9 / math.log(2) / (5 + 17 + 8))
    counts = [len(tokenizer(text)["input_ids"]) for text in ("é  7?", "Rest.", "Hm.")]
    assert summarize_thinking(lines) == {"reference_thinking_tokens": (counts[0] + counts[2]) / 3}
    assert found["thinking_tokens"]["value"] == (counts[1] + counts[2]) / 3
    assert name_references(lines) == "reference answers with their thinking"
    assert name_references(lines[:1]) == "reference answers"
    assert "thinking" in found["nll"]["definition"] and "thinking" in found["bits_per_byte"]["definition"]
