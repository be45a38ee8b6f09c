"""Write the model card of a run, in the hub's format, from what the run itself recorded."""

import re
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HTTPError

from medibot.data.sources import SUFFIXES
from medibot.errors import one_line
from medibot.model.loading import method_name
from medibot.recipe import Recipe, load_recipe
from medibot.run import Run, find_finished_run, read_json

TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("medibot"),
    autoescape=jinja2.select_autoescape(["html.j2"]),
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_cards(name: str, html: Path | None = None) -> list[Path]:
    """Write README.md into each shareable folder of the run (model/, merged/, gguf/), and a page to `html`."""
    run = find_finished_run(name)
    recipe = load_recipe(str(run.recipe))
    folders = [folder for folder in (run.weights, run.merged, run.gguf) if folder.is_dir()]
    for folder in folders:
        Run(folder).write("README.md", render_card(run, recipe, folder))
    written = [folder / "README.md" for folder in folders]
    if html:
        # The whole weights are what most readers want
        card = ModelCard.load((run.merged if run.merged.is_dir() else run.weights) / "README.md")
        html.write_text(render_page(f"{name}: model card", card), encoding="utf-8")
        written.append(html)
    return written


def render_page(title: str, card: ModelCard) -> str:
    """Return a card as a page; HTML in its text is shown, not read."""
    from markdown_it import MarkdownIt
    from markupsafe import Markup

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(card.text)
    body = body.replace("<table>", '<div class="wide" tabindex="0"><table>').replace("</table>", "</table></div>")
    body = body.replace("<pre>", '<pre tabindex="0">')
    front = card.data.to_yaml()
    return TEMPLATES.get_template("card.html.j2").render(title=title, front=front, body=Markup(body))


def render_card(run: Run, recipe: Recipe, folder: Path) -> str:
    """Return front matter and text of the card that belongs into `folder`."""
    path = recipe.model["pretrained_model_name_or_path"]
    record, base, data = run.record(), without_folders(path), without_folders(recipe.data.path)
    facts = {name: read_json(run.folder / f"{name}.json") for name in ("ledger", "split", "audit", "environment")}
    results, merge = run.folder / "eval" / "results.json", folder / "merge.json"
    facts |= {
        "run": run.name,
        "kind": folder.name,
        "adapter": folder == run.weights and recipe.lora is not None,
        "method": method_name(recipe),
        "recipe": recipe,
        "base": base,
        "record": record,
        "base_card": read_base_card(path, "hub" in record["parts"]["base"]),
        "data": data,
        "merge": read_json(merge) if merge.is_file() else None,
        "results": read_json(results) if results.is_file() else None,
        "written": yaml.safe_dump(without_folders(recipe.as_dict()), sort_keys=False, allow_unicode=True, width=120),
    }
    text = re.sub(r"\n{3,}", "\n\n", TEMPLATES.get_template("card.md.j2").render(facts))
    # Results name files by their whole path
    text = f"---\n{front_matter(facts).to_yaml()}\n---\n\n{text}".replace(recipe.data.path, data)
    return text.replace(path, base)


def front_matter(facts: dict[str, Any]) -> ModelCardData:
    """Return what the hub reads: licence, base, data, language, library, and each metric of the tuned model."""
    base, recipe = facts["record"]["parts"]["base"].get("hub"), facts["recipe"]
    path = recipe.data.path
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", path) and Path(path).suffix not in SUFFIXES and not Path(path).exists()
    measured = [
        EvalResult(
            task_type="text-generation",
            metric_type=key,
            metric_name=metric["label"],
            metric_value=metric["value"],
            dataset_type=path if on_hub else "held-out",
            dataset_name=facts["data"],
            dataset_split="test",
        )
        for key, metric in (facts["results"] or {"metrics": {}})["metrics"].items()
    ]
    kind = "adapter" if facts["adapter"] else "finetune"
    library = "peft" if facts["adapter"] else "transformers"
    return ModelCardData(
        license=facts["base_card"].get("license") or "unknown",
        license_name=facts["base_card"].get("license_name"),
        license_link=facts["base_card"].get("license_link"),
        base_model=base,
        base_model_relation=kind if base else None,
        datasets=[path] if on_hub else None,
        language=recipe.data.language,
        library_name="gguf" if facts["kind"] == "gguf" else library,
        pipeline_tag="text-generation",
        tags=["medibot", "medical", "question-answering", "sft", *(["lora"] if facts["adapter"] else [])],
        model_name=facts["run"] if measured else None,
        eval_results=measured or None,
    )


def read_base_card(path: str, on_hub: bool) -> dict[str, Any]:
    """Return the front matter of the base model's own card; empty, with a warning, where it cannot be read."""
    try:
        source = path if on_hub else Path(path).expanduser() / "README.md"
        return ModelCard.load(source, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, HTTPError) as error:
        print(f"warning: the base model's card cannot be read: {one_line(error)}")
        return {}


def without_folders(value: Any) -> Any:
    """Return `value` without the folders of this machine: of an absolute path only the last part is left."""
    if isinstance(value, dict):
        return {key: without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_folders(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value
