"""Write the model card of a run, in the hub's format, from what the run itself recorded."""

import re
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HTTPError
from markdown_it import MarkdownIt

from medibot.data.sources import is_hub_id
from medibot.errors import one_line
from medibot.model.loading import method_name
from medibot.recipe import Recipe, load_recipe
from medibot.run import Run, find_finished_run, read_json

# A card is no HTML: the page around it escapes for itself
TEMPLATES = jinja2.Environment(loader=jinja2.PackageLoader("medibot"), trim_blocks=True, lstrip_blocks=True)


def write_cards(name: str, html: Path | None = None) -> list[Path]:
    """Write README.md into each shareable folder of the run (model/, merged/, gguf/), and a page to `html`."""
    run = find_finished_run(name)
    recipe = load_recipe(str(run.recipe))
    written = [folder / "README.md" for folder in (run.weights, run.merged, run.gguf) if folder.is_dir()]
    for file in written:
        Run(file.parent).write(file.name, render_card(run, recipe, file.parent))
    if html:
        # The whole weights are what most readers want
        card = ModelCard.load((run.merged if run.merged.is_dir() else run.weights) / "README.md")
        # HTML in its text is shown, not read
        body = MarkdownIt("commonmark", {"html": False}).enable("table").render(card.text)
        body = body.replace("<table>", '<div class="wide" tabindex="0"><table>').replace("</table>", "</table></div>")
        values = {"title": f"{name}: model card", "front": card.data.to_yaml()}
        values["body"] = body.replace("<pre>", '<pre tabindex="0">')
        html.write_text(TEMPLATES.get_template("card.html.j2").render(values), encoding="utf-8")
        written.append(html)
    return written


def render_card(run: Run, recipe: Recipe, folder: Path) -> str:
    """Return front matter and text of the card that belongs into `folder`."""
    path, record = recipe.model["pretrained_model_name_or_path"], run.record()
    base, data = without_folders(path), " + ".join(map(without_folders, recipe.data.paths))
    try:
        source = path if "hub" in record["parts"]["base"] else Path(path).expanduser() / "README.md"
        base_card = ModelCard.load(source, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, HTTPError) as error:
        print(f"warning: the base model's card cannot be read: {one_line(error)}")
        base_card = {}
    files = {name: run.folder / f"{name}.json" for name in ("ledger", "split", "audit", "environment")}
    files |= {"results": run.folder / "eval" / "results.json", "merge": folder / "merge.json"}
    facts = {name: read_json(file) for name, file in files.items() if file.is_file()}
    facts |= {"run": run.name, "kind": folder.name, "method": method_name(recipe), "recipe": recipe, "record": record}
    facts |= {"base": base, "base_card": base_card, "data": data}
    facts["adapter"] = folder == run.weights and recipe.lora is not None
    facts["written"] = yaml.safe_dump(without_folders(recipe.as_dict()), sort_keys=False, allow_unicode=True, width=120)
    text = re.sub(r"\n{3,}", "\n\n", TEMPLATES.get_template("card.md.j2").render(facts))
    # Results name files by their whole path
    text = f"---\n{front_matter(facts).to_yaml()}\n---\n\n{text}"
    for long in (*recipe.data.paths, path):
        text = text.replace(long, without_folders(long))
    return text


def front_matter(facts: dict[str, Any]) -> ModelCardData:
    """Return what the hub reads: licence, base, data, language, library, and each metric of the tuned model."""
    base, base_card = facts["record"]["parts"]["base"].get("hub"), facts["base_card"]
    adapter, paths = facts["adapter"], facts["recipe"].data.paths
    on_hub = [path for path in paths if is_hub_id(path)]
    about: dict[str, Any] = {
        "task_type": "text-generation",
        "dataset_type": on_hub[0] if len(paths) == len(on_hub) == 1 else "held-out",
    }
    about |= {"dataset_name": facts["data"], "dataset_split": "test"}
    measured = [
        EvalResult(metric_type=key, metric_name=found["label"], metric_value=found["value"], **about)
        for key, found in facts.get("results", {"metrics": {}})["metrics"].items()
    ]
    relation, library = ("adapter", "peft") if adapter else ("finetune", "transformers")
    return ModelCardData(
        license=base_card.get("license") or "unknown",
        license_name=base_card.get("license_name"),
        license_link=base_card.get("license_link"),
        base_model=base,
        base_model_relation=relation if base else None,
        datasets=on_hub or None,
        language=facts["recipe"].data.language,
        library_name="gguf" if facts["kind"] == "gguf" else library,
        pipeline_tag="text-generation",
        tags=["medibot", "medical", "question-answering", "sft", *(["lora"] if adapter else [])],
        model_name=facts["run"] if measured else None,
        eval_results=measured or None,
    )


def without_folders(value: Any) -> Any:
    """Return `value` without the folders of this machine: of an absolute path only the last part is left."""
    if isinstance(value, dict):
        return {key: without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_folders(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value
