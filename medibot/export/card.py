"""The model card of a run, in the hub's format, from what the run itself recorded.

medibot card --run quickstart --html card.html
"""

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HTTPError
from jinja2 import Environment

from medibot.data.sources import SUFFIXES
from medibot.evaluation.page import document_page
from medibot.model.loading import method_name
from medibot.recipe import Recipe, load_recipe
from medibot.run import Run, find_finished_run, read_json

LIBRARY = {"model": "peft", "merged": "transformers", "gguf": "gguf"}


CARD = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True).from_string(
    """# {{ run }}

> **Not a medical device.** This model gives general health information and can be wrong. It does not diagnose, does not replace a professional,
> and no figure below measures whether an answer is medically right.

{{ method }} of {{ base.name }} on {{ data.name }}, trained with MediBot {{ environment.versions.medibot }}.
{% if results %}
{{ results.verdict }}
{% endif %}

## How to load

{% if kind == "gguf" %}
```sh
ollama create {{ run }} -f Modelfile && ollama run {{ run }}
llama-server -m {{ run }}.gguf --jinja
```
{% else %}
```python
{% if kind == "model" and recipe.lora %}
from peft import PeftModel
{% endif %}
from transformers import AutoModelForCausalLM, AutoTokenizer{{ ", BitsAndBytesConfig" if kind == "model" and recipe.quantization else "" }}

folder = "."  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(folder)
{% if kind == "model" and recipe.lora %}
{% if recipe.quantization %}
quantized = BitsAndBytesConfig({% for key, value in recipe.quantization.items() %}{{ key }}={{ value.__repr__() }}{{ ", " if not loop.last }}{% endfor %})
{% endif %}
base = AutoModelForCausalLM.from_pretrained("{{ base.name }}"{{ ", quantization_config=quantized" if recipe.quantization }})
model = PeftModel.from_pretrained(base, folder)
{% else %}
model = AutoModelForCausalLM.from_pretrained(folder)
{% endif %}
messages = [{% if recipe.data.system %}{"role": "system", "content": {{ recipe.data.system.__repr__() }}}, {% endif %}{"role": "user", "content": "What is anemia?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"{% for key, value in recipe.data.chat_template_kwargs.items() %}, {{ key }}={{ value.__repr__() }}{% endfor %})
output = model.generate(**inputs)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```
{% endif %}

Ask it with the system message and the chat template that it was trained with, as above.

## Base model

{{ base.name }}, licence: {{ base.licence or "not stated where the base lies: find it out before sharing" }}. {% if identity.hub %}Commit {{ identity.commit }}.{% else %}Its files:
{% for name, hash in identity.items() %}
- `{{ name }}` sha256 `{{ hash }}`
{% endfor %}{% endif %}

{% if merge %}
## Merge

Base and adapter were merged and read back from the disk, and compared with base and adapter on {{ merge.tokens }} tokens of {{ merge.questions }} questions ({{ merge.asked }}). Kept: {{ merge.kept }}, in {{ merge.dtype }}.

| merged into | same greedy token | largest logit difference | Kullback-Leibler divergence (nats a token) |
|---|---|---|---|
{% for mode, found in merge.modes.items() %}
| {{ mode }} | {{ "%.1f %%" | format(100 * found.greedy_agreement) }} | {{ "%.4f" | format(found.max_logit_difference) }} | {{ "%.2e" | format(found.mean_kl) }} |
{% endfor %}

{% endif %}
## Data

{{ data.name }}. Licence: {% if recipe.data.license %}{{ recipe.data.license }}{% else %}not stated in the recipe: find it out before sharing{% endif %}.
{% if recipe.data.attribution %}Attribution: {{ recipe.data.attribution }}. The rows were changed as the ledger says.{% endif %}


| rule | rows in | dropped | changed | added | rows out |
|---|---|---|---|---|---|
{% for line in ledger %}
| {{ line.rule }} | {{ line.rows_in }} | {{ line.dropped }} | {{ line.changed }} | {{ line.added }} | {{ line.rows_out }} |
{% endfor %}

Split by {{ recipe.data.group_by | join(", ") or "row" }}: {% for name, rows in split.rows.items() %}{{ rows }} {{ name }}{{ ", " if not loop.last }}{% endfor %} rows, fingerprint `{{ split.fingerprint[:16] }}`.
Rows of one side that share something with the other; the last line is what a random split of the same rows would have leaked:

| | {% for key in leaks.random_split %}{{ key }} | {% endfor %}

|---|{% for key in leaks.random_split %}---|{% endfor %}

{% for name, found in leaks.items() %}
| {{ name | replace("_", " ") }} | {% for value in found.values() %}{{ value }} | {% endfor %}

{% endfor %}

{% for part in audit %}
The loss covers {{ part.supervised }} of {{ part.tokens }} {{ part.split }} tokens: each answer and its stop token, checked on every row.
{% endfor %}

## Metrics

{% if results %}
{{ results.verdict }}

{{ results.rows }} of {{ results.of }} rows of the {{ results.data }}, {{ results.groups }} groups; decoding: {% for key, value in results.decoding.items() %}{{ key }} {{ value }}{{ ", " if not loop.last }}{% endfor %}; {{ results.precision }}.
Paired bootstrap over groups, {{ results.resamples }} resamples, seed {{ results.seed }}.

| metric | base | tuned | difference | 95 % interval | verdict |
|---|---|---|---|---|---|
{% for m in results.metrics.values() %}
| {{ m.label }} | {{ "%.4g" | format(m.baseline) }} | {{ "%.4g" | format(m.value) }} | {{ "%+.4f" | format(m.difference) }} | {% if m.low is none %}too few groups{% else %}{{ "%+.4f" | format(m.low) }} to {{ "%+.4f" | format(m.high) }}{% endif %} | {{ m.verdict }} |
{% endfor %}
{% else %}
Not evaluated.
{% endif %}

## Limits

{% for limit in limits %}
- {{ limit }}
{% endfor %}

## Training

{{ summary.steps }} steps of {{ environment.global_batch_size }} rows, {{ summary.cost.supervised_tokens }} supervised tokens, {{ "%.1f" | format(summary.cost.training_seconds / 60) }} minutes ({{ summary.cost.supervised_tokens_per_second }} supervised tokens a second);
{{ "{:,}".format(environment.trainable_parameters) }} of {{ "{:,}".format(environment.parameters) }} parameters trained, in {{ environment.dtype }}; peak memory {{ "%.1f" | format(summary.cost.peak_memory_bytes / 1e9) }} GB.
{% if summary.eval_loss_first is defined %}Validation loss {{ "%.4f" | format(summary.eval_loss_first) }} before, {{ "%.4f" | format(summary.eval_loss_last) }} after.
{% endif %}
Hardware: {{ environment.device }}, {{ environment.cpus }} CPU cores, {{ environment.processes }} process{{ "es" if environment.processes > 1 }}. Emissions: not measured.

Versions: Python {{ environment.python }}{% for name, version in environment.versions.items() %}, {{ name }} {{ version }}{% endfor %}; MediBot's commit {{ environment.commit or "not known" }}{{ " with uncommitted changes" if environment.uncommitted }}. Run fingerprint `{{ fingerprint[:16] }}`.

## Recipe

````yaml
{{ written }}````
"""
)


def card(name: str, html: Path | None = None) -> list[Path]:
    """Write README.md into each shareable folder of the run `name` (model/, merged/, gguf/), and a page; returns them."""
    this = find_finished_run(name)
    recipe = load_recipe(str(this.recipe))
    written = []
    for folder in filter(Path.is_dir, (this.weights, this.merged, this.gguf)):
        text = card_text(this, recipe, folder)
        Run(folder).write("README.md", text.rstrip("\n"))
        written.append(folder / "README.md")
    if html:
        # The whole weights are what most readers want
        shown = (this.merged if this.merged.is_dir() else this.weights) / "README.md"
        front, body = parts(shown)
        html.write_text(document_page(f"{name}: model card", front, body), encoding="utf-8")
        written.append(html)
    print("written: " + ", ".join(map(str, written)))
    return written


def parts(file: Path) -> tuple[str, str]:
    """(front matter, text) of a card."""
    loaded = ModelCard.load(file)
    return str(loaded.data.to_yaml()), loaded.text


def card_text(this: Run, recipe: Recipe, folder: Path) -> str:
    """Front matter and text of the card that belongs into `folder`."""
    record, environment = this.record(), read_json(this.folder / "environment.json")
    ledger = read_json(this.folder / "ledger.json")
    results = optional(this.folder / "eval" / "results.json")
    base, data = base_facts(recipe, record["parts"]["base"]), data_facts(recipe)
    text = CARD.render(
        run=this.name,
        kind=folder.name,
        method=method_name(recipe),
        recipe=recipe,
        base=base,
        identity=record["parts"]["base"],
        data=data,
        merge=optional(folder / "merge.json"),
        ledger=ledger["ledger"],
        leaks=ledger["leaks"],
        split=read_json(this.folder / "split.json"),
        audit=read_json(this.folder / "audit.json"),
        results=results,
        limits=limits(results),
        environment=environment,
        summary=record["summary"],
        fingerprint=record["fingerprint"],
        written=yaml.safe_dump(public(recipe.as_dict()), sort_keys=False, allow_unicode=True, width=120),
    )
    front = front_matter(this, recipe, folder, base, data, results)
    text = f"---\n{front.to_yaml()}\n---\n\n" + re.sub(r"\n{3,}", "\n\n", text)
    # Results name the file where it lay
    return text.replace(recipe.data.path, data["name"]).replace(
        recipe.model["pretrained_model_name_or_path"], base["name"]
    )


def front_matter(
    this: Run, recipe: Recipe, folder: Path, base: dict[str, Any], data: dict[str, Any], results: dict[str, Any] | None
) -> ModelCardData:
    """What the hub reads: licence, base, data, language, library, and each metric of the tuned model."""
    measured = [
        EvalResult(
            task_type="text-generation",
            dataset_type=data["hub"] or "held-out",
            dataset_name=data["name"],
            dataset_split="test",
            metric_type=key,
            metric_name=metric["label"],
            metric_value=metric["value"],
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
        model_name=this.name if measured else None,
        eval_results=measured or None,
    )


def base_facts(recipe: Recipe, identity: dict[str, str]) -> dict[str, Any]:
    """Name, hub id (None for a local folder) and licence of the base model, from its own card where that can be read."""
    path = recipe.model["pretrained_model_name_or_path"]
    file = Path(path).expanduser() / "README.md"
    data: dict[str, Any] = {}
    try:
        if "hub" in identity or file.is_file():
            data = ModelCard.load(path if "hub" in identity else file, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, HTTPError) as error:
        print(f"warning: the base model's card cannot be read: {str(error).splitlines()[0]}")
    found = {f"licence{end}": data.get(f"license{end}") for end in ("", "_name", "_link")}
    return {"name": public(path), "hub": identity.get("hub")} | found


def data_facts(recipe: Recipe) -> dict[str, Any]:
    """Name and hub id (None for local files) of the data."""
    path = recipe.data.path
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", path) and Path(path).suffix not in SUFFIXES and not Path(path).exists()
    return {"name": public(path), "hub": path if on_hub else None}


def limits(results: dict[str, Any] | None) -> list[str]:
    """What a reader must not conclude."""
    found = [
        "Nobody with clinical training has reviewed its answers; doses, numbers and names can be invented.",
        "It was trained on single questions: longer conversations are untested.",
        "MediBot's emergency notices are rules outside the model, and do not come with these weights.",
        "What its base model and its data got wrong, or leave out, it can have learned.",
        "One training with one seed.",
    ]
    if results is None:
        return [*found, "It has not been evaluated."]
    asked = f"The metrics are of {results['rows']} questions from the source that it was trained on, and say nothing about others."
    quick = f"Only {results['rows']} of {results['of']} held-out rows were asked: a quick look."
    return [*found, asked, *([quick] if results["rows"] < results["of"] else [])]


def public(value: Any) -> Any:
    """`value` without the folders of the machine: of an absolute path only the last part is left."""
    if isinstance(value, dict):
        return {key: public(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [public(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def optional(file: Path) -> dict[str, Any] | None:
    return read_json(file) if file.is_file() else None
