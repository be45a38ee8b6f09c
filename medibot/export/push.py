"""Send one folder of a run to the hub: shown first, private unless asked otherwise, never without card and licence."""

from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from medibot.errors import Problem, RecipeError, one_line
from medibot.recipe import Recipe, load_recipe
from medibot.run import Run, find_finished_run

# Pickled arguments of the training: they hold this machine's paths, and loading them runs code
KEPT_BACK = "training_args.bin"


def push(name: str, repo: str, what: str = "", public: bool = False, yes: bool = False) -> str:
    """Return what of the run `name` would go to `repo`, under which licences; with `yes`, send it.

    `what` is merged, model or gguf; merged by default where it is there. Raises RecipeError without a card, for data or
    a base of no known licence, and for a public repository that was not asked for.
    """
    run = find_finished_run(name)
    recipe = load_recipe(str(run.recipe))
    try:
        # The hub also takes names without an owner
        validate_repo_id(repo if "/" in repo else "")
    except HFValidationError as error:
        raise RecipeError.of("REPO", f"{repo!r} is not a repository name of the hub", "write owner/name") from error
    folders = {"merged": run.merged, "model": run.weights, "gguf": run.gguf}
    folder = folders.get(what or ("merged" if run.merged.is_dir() else "model"))
    if folder is None:
        raise RecipeError.of("FOLDER", f"{what!r} cannot be shared", f"there are: {', '.join(folders)}")
    if not folder.is_dir():
        verb = {"merged": "merge", "gguf": "export-gguf"}[folder.name]
        raise RecipeError.of("push", f"{folder} not found", f"run: make {verb} RUN={name}")
    if obstacles := [Problem("", 0, 0, "push", *obstacle) for obstacle in find_obstacles(run, recipe, folder)]:
        raise RecipeError(obstacles)
    sizes = {file.name: file.stat().st_size / 1e6 for file in sorted(folder.iterdir()) if file.is_file()}
    kept_back = [f"kept back: {KEPT_BACK}"] if sizes.pop(KEPT_BACK, None) else []
    lines = [f"{folder} -> {repo} ({'PUBLIC' if public else 'private'})"]
    lines += [f"  {size:10.2f} MB  {file}" for file, size in (sizes | {"in all": sum(sizes.values())}).items()]
    lines += [*kept_back, f"licence of the weights: {ModelCard.load(folder / 'README.md').data.license}"]
    lines.append(f"data: {recipe.data.described}, {recipe.data.license}; {recipe.data.attribution or 'no attribution'}")
    if not (run.folder / "eval" / "results.json").is_file():
        lines.append(f"warning: not evaluated, so the card holds no metrics (make eval RUN={name})")
    if not yes:
        return "\n".join([*lines, "nothing was sent; to send it, the same again with --yes (make push … YES=1)"])
    api, message = HfApi(), f"{name}, {folder.name}, by MediBot"
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        # One that was there before may be public, whatever was asked for
        if not public and not api.model_info(repo).private:
            raise RecipeError.of("push", f"{repo} is public", "name another repository, or say --public (PUBLIC=1)")
        done = api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=[*sizes], commit_message=message)
    except (HTTPError, OSError) as error:
        raise RecipeError.of("push", f"the hub refused: {one_line(error)}", "log in: hf auth login") from error
    return "\n".join([*lines, f"sent: {done.commit_url}"])


def find_obstacles(run: Run, recipe: Recipe, folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (what, remedy) of each reason why `folder` cannot be shared as it is."""
    data, file = recipe.data, folder / "README.md"
    if data.license is None:
        remedy = f"if you may share what is made of it, write data.license (and data.attribution) into {run.recipe}"
        yield f"the licence of {data.described} is not known", remedy
    elif data.license.startswith("cc-by") and data.attribution is None:
        yield f"{data.license} asks for the names of the data's authors", f"write data.attribution into {run.recipe}"
    card = ModelCard.load(file, ignore_metadata_errors=True).data if file.is_file() else None
    # Upstream leaves a form there that nobody filled in
    if card is None or "medibot" not in (card.tags or []):
        yield f"{folder} has no model card", f"run: make card RUN={run.name}"
    elif card.license == "unknown":
        remedy = f"write it into {file}, as the hub writes it, if it lets you share this"
        yield "the card does not know the base model's licence", remedy
    if folder == run.weights and recipe.lora and "hub" not in run.record()["parts"]["base"]:
        remedy = f"push whole weights: make merge RUN={run.name}, make card RUN={run.name}"
        yield "the adapter names a base model of this machine, which nobody else can load", remedy
