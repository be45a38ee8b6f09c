"""Write the model card of a run, in the hub's format, from what the run itself recorded."""

import re
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HTTPError
from markdown_it import MarkdownIt
from markupsafe import Markup

from medibot.data.sources import SUFFIXES
from medibot.model.loading import method_name
from medibot.recipe import Recipe, load_recipe
from medibot.run import Run, find_finished_run, read_json

LIBRARY = {"model": "peft", "merged": "transformers", "gguf": "gguf"}
TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("medibot"),
    autoescape=jinja2.select_autoescape(["html.j2"]),
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def write_cards(name: str, html: Path | None = None) -> list[Path]:
    """Write README.md into each shareable folder of the run (model/, merged/, gguf/), and a page to `html`."""
    run = find_finished_run(name)
    recipe = load_recipe(str(run.recipe))
    folders = [folder for folder in (run.weights, run.merged, run.gguf) if folder.is_dir()]
    for folder in folders:
        Run(folder).write("README.md", render_card(run, recipe, folder).rstrip("\n"))
    written = [folder / "README.md" for folder in folders]
    if html:
        # The whole weights are what most readers want
        card = ModelCard.load((run.merged if run.merged.is_dir() else run.weights) / "README.md")
        html.write_text(render_page(f"{name}: model card", card), encoding="utf-8")
        written.append(html)
    return written


def render_page(title: str, card: ModelCard) -> str:
    """Return a card as a page; HTML in its text is shown, not read."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(card.text)
    body = body.replace("<table>", '<div class="wide" tabindex="0"><table>').replace("</table>", "</table></div>")
    body = body.replace("<pre>", '<pre tabindex="0">')
    return TEMPLATES.get_template("card.html.j2").render(title=title, front=card.data.to_yaml(), body=Markup(body))


def render_card(run: Run, recipe: Recipe, folder: Path) -> str:
    """Return front matter and text of the card that belongs into `folder`."""
    record = run.record()
    identity = record["parts"]["base"]
    names = ("ledger.json", "split.json", "audit.json", "environment.json", "eval/results.json")
    files: dict[str, Any] = {Path(name).stem: read_if_there(run.folder / name) for name in names}
    base, data = base_facts(recipe, identity), data_facts(recipe)
    text = TEMPLATES.get_template("card.md.j2").render(
        files | files["ledger"],
        run=run.name,
        kind=folder.name,
        method=method_name(recipe),
        recipe=recipe,
        base=base,
        identity=identity,
        data=data,
        merge=read_if_there(folder / "merge.json"),
        summary=record["summary"],
        fingerprint=record["fingerprint"],
        written=yaml.safe_dump(without_folders(recipe.as_dict()), sort_keys=False, allow_unicode=True, width=120),
    )
    front = front_matter(run, recipe, folder, base, data, files["results"])
    text = f"---\n{front.to_yaml()}\n---\n\n" + re.sub(r"\n{3,}", "\n\n", text)
    # Results name files by their whole path
    text = text.replace(recipe.data.path, data["name"])
    return text.replace(recipe.model["pretrained_model_name_or_path"], base["name"])


def front_matter(
    run: Run, recipe: Recipe, folder: Path, base: dict[str, Any], data: dict[str, Any], results: dict[str, Any] | None
) -> ModelCardData:
    """Return what the hub reads: licence, base, data, language, library, and each metric of the tuned model."""
    measured = [
        EvalResult(
            task_type="text-generation",
            metric_type=key,
            metric_name=metric["label"],
            metric_value=metric["value"],
            dataset_type=data["hub"] or "held-out",
            dataset_name=data["name"],
            dataset_split="test",
        )
        for key, metric in (results["metrics"] if results else {}).items()
    ]
    adapter = folder.name == "model" and recipe.lora is not None
    return ModelCardData(
        license=base["licence"] or "unknown",
        license_name=base["licence_name"],
        license_link=base["licence_link"],
        base_model=base["hub"],
        base_model_relation=("adapter" if adapter else "finetune") if base["hub"] else None,
        datasets=[data["hub"]] if data["hub"] else None,
        language=recipe.data.language,
        library_name=LIBRARY[folder.name] if adapter or folder.name != "model" else "transformers",
        pipeline_tag="text-generation",
        tags=["medibot", "medical", "question-answering", "sft", *(["lora"] if adapter else [])],
        model_name=run.name if measured else None,
        eval_results=measured or None,
    )


def base_facts(recipe: Recipe, identity: dict[str, str]) -> dict[str, Any]:
    """Return name, hub id (None for a local folder) and licence of the base model, from its own card if readable."""
    path = recipe.model["pretrained_model_name_or_path"]
    file = Path(path).expanduser() / "README.md"
    data: dict[str, Any] = {}
    try:
        if "hub" in identity or file.is_file():
            data = ModelCard.load(path if "hub" in identity else file, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, HTTPError) as error:
        print(f"warning: the base model's card cannot be read: {str(error).splitlines()[0]}")
    licence = {f"licence{end}": data.get(f"license{end}") for end in ("", "_name", "_link")}
    return {"name": without_folders(path), "hub": identity.get("hub")} | licence


def data_facts(recipe: Recipe) -> dict[str, Any]:
    """Return name and hub id (None for local files) of the data."""
    path = recipe.data.path
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", path) and Path(path).suffix not in SUFFIXES and not Path(path).exists()
    return {"name": without_folders(path), "hub": path if on_hub else None}


def without_folders(value: Any) -> Any:
    """Return `value` without the folders of this machine: of an absolute path only the last part is left."""
    if isinstance(value, dict):
        return {key: without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_folders(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def read_if_there(file: Path) -> dict[str, Any] | None:
    """Return the JSON in `file`, None without the file."""
    return read_json(file) if file.is_file() else None
