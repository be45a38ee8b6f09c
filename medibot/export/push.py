"""One folder of a run to the hub: shown first, private unless asked otherwise, never without card and licence.

medibot push --run quickstart --repo me/medibot-quickstart --yes
"""

from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from medibot.errors import RecipeError
from medibot.recipe import Recipe, load_recipe
from medibot.run import Run, find_finished_run

# Pickled arguments of the training: they hold this machine's paths, and loading them runs code
KEPT_BACK = ("training_args.bin",)


def push(name: str, repo: str, what: str = "", public: bool = False, yes: bool = False) -> None:
    """Print what of the run `name` would go to `repo`, and send it if `yes`.

    `what` is merged, model or gguf; merged by default where it is there. Refuses with a RecipeError: no card, data or a
    base of no known licence, a public repository that was not asked for.
    """
    this = find_finished_run(name)
    recipe = load_recipe(str(this.recipe))
    require_target(repo)
    folder = chosen(this, what)
    require_licensed(this, recipe)
    require_card(this, folder)
    if folder == this.weights and recipe.lora and "hub" not in this.record()["parts"]["base"]:
        what = "the adapter names a base model of this machine, which nobody else can load"
        raise RecipeError.of("push", what, f"push whole weights: make merge RUN={name}, make card RUN={name}")
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name not in KEPT_BACK)
    show(this, recipe, folder, files, repo, public)
    if yes:
        send(folder, files, repo, public, f"{name}, {folder.name}, by MediBot")
    else:
        print("Nothing was sent. To send it, the same again with --yes (make push … YES=1)")


def require_target(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise RecipeError.of("REPO", f"{repo!r} is no repository of the hub", "write owner/name") from error
    if repo.count("/") != 1:
        raise RecipeError.of("REPO", f"{repo!r} names no owner", "write owner/name")


def chosen(this: Run, what: str) -> Path:
    folders = {"merged": this.merged, "model": this.weights, "gguf": this.gguf}
    if what and what not in folders:
        raise RecipeError.of("FOLDER", f"no folder {what!r} can be shared", f"there are: {', '.join(folders)}")
    folder = folders[what or ("merged" if this.merged.is_dir() else "model")]
    if not folder.is_dir():
        verb = {"merged": "merge", "gguf": "export-gguf"}[folder.name]
        raise RecipeError.of("push", f"there is no {folder}", f"run: make {verb} RUN={this.name}")
    return folder


def require_licensed(this: Run, recipe: Recipe) -> None:
    if recipe.data.license is None:
        what = f"the licence of {recipe.data.path} is not known"
        remedy = f"if you may share what is made of it, write data.license (and data.attribution) into {this.recipe}"
        raise RecipeError.of("push", what, remedy)
    if recipe.data.license.startswith("cc-by") and recipe.data.attribution is None:
        what = f"{recipe.data.license} asks for the names of the data's authors"
        raise RecipeError.of("push", what, f"write data.attribution into {this.recipe}")


def require_card(this: Run, folder: Path) -> None:
    """Refuse a folder without the run's card; what upstream leaves there is a form that nobody filled in."""
    file = folder / "README.md"
    if not file.is_file() or "medibot" not in (ModelCard.load(file, ignore_metadata_errors=True).data.tags or []):
        raise RecipeError.of("push", f"{folder} has no model card", f"run: make card RUN={this.name}")
    if ModelCard.load(file).data.license == "unknown":
        what = "the card does not know the base model's licence"
        raise RecipeError.of("push", what, f"write it into {file}, as the hub writes it, if it lets you share this")


def show(this: Run, recipe: Recipe, folder: Path, files: list[Path], repo: str, public: bool) -> None:
    """What goes out, to whom, under which licences."""
    print(f"{folder} -> {repo} ({'PUBLIC' if public else 'private'})")
    for file in files:
        print(f"  {file.stat().st_size / 1e6:10.2f} MB  {file.name}")
    print(f"  {sum(file.stat().st_size for file in files) / 1e6:10.2f} MB  in all")
    kept = [name for name in KEPT_BACK if (folder / name).is_file()]
    if kept:
        print(f"kept back: {', '.join(kept)}")
    print(f"licence of the weights: {ModelCard.load(folder / 'README.md').data.license}")
    print(f"data: {recipe.data.path}, {recipe.data.license}; {recipe.data.attribution or 'no attribution'}")
    if not (this.folder / "eval" / "results.json").is_file():
        print(f"warning: not evaluated, so the card holds no metrics (make eval RUN={this.name})")


def send(folder: Path, files: list[Path], repo: str, public: bool, message: str) -> None:
    """Make the repository if need be, see that it is as private as asked for, and upload `files` in one commit."""
    api = HfApi()
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        if not public and not api.model_info(repo).private:
            raise RecipeError.of("push", f"{repo} is public", "name another repository, or say --public (PUBLIC=1)")
        done = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=[file.name for file in files],
            commit_message=message,
        )
    except RepositoryNotFoundError as error:
        raise RecipeError.of("push", f"no access to {repo}", "log in: hf auth login") from error
    except (HTTPError, OSError) as error:
        raise RecipeError.of(
            "push", f"the hub says: {' '.join(str(error).split())}", "log in: hf auth login"
        ) from error
    print(f"sent: {done.commit_url}")
