"""Send one folder of a run to the hub: shown first, private unless asked otherwise, never without card and licence."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from medibot.errors import RecipeError
from medibot.recipe import Recipe, load_recipe
from medibot.run import Run, find_finished_run

# Pickled arguments of the training: they hold this machine's paths, and loading them runs code
KEPT_BACK = ("training_args.bin",)


@dataclass(frozen=True)
class Push:
    """The files that go to `repo`, and under which licences; `url` is the commit that took them, None before."""

    run: Run
    recipe: Recipe
    folder: Path
    files: list[Path]
    repo: str
    public: bool
    url: str | None = None

    def __rich__(self) -> str:
        """Return what goes out, to whom, under which licences."""
        sizes = [(file.stat().st_size / 1e6, file.name) for file in self.files]
        total = sum(size for size, _ in sizes)
        kept = [name for name in KEPT_BACK if (self.folder / name).is_file()]
        data = self.recipe.data
        lines = [
            f"{self.folder} -> {self.repo} ({'PUBLIC' if self.public else 'private'})",
            *(f"  {size:10.2f} MB  {name}" for size, name in [*sizes, (total, "in all")]),
            *([f"kept back: {', '.join(kept)}"] if kept else []),
            f"licence of the weights: {ModelCard.load(self.folder / 'README.md').data.license}",
            f"data: {data.path}, {data.license}; {data.attribution or 'no attribution'}",
        ]
        if not (self.run.folder / "eval" / "results.json").is_file():
            lines.append(f"warning: not evaluated, so the card holds no metrics (make eval RUN={self.run.name})")
        nothing = "nothing was sent; to send it, the same again with --yes (make push … YES=1)"
        return "\n".join([*lines, f"sent: {self.url}" if self.url else nothing])


def push(name: str, repo: str, what: str = "", public: bool = False, yes: bool = False) -> Push:
    """Return what of the run `name` would go to `repo`; with `yes`, send it.

    `what` is merged, model or gguf; merged by default where it is there. Raises RecipeError without a card, for data or
    a base of no known licence, and for a public repository that was not asked for.
    """
    run = find_finished_run(name)
    recipe = load_recipe(str(run.recipe))
    folder = choose_folder(run, what)
    for subject, wrong, remedy in find_obstacles(run, recipe, folder, repo):
        raise RecipeError.of(subject, wrong, remedy)
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name not in KEPT_BACK)
    url = send(folder, files, repo, public, f"{name}, {folder.name}, by MediBot") if yes else None
    return Push(run, recipe, folder, files, repo, public, url)


def choose_folder(run: Run, what: str) -> Path:
    """Return the folder called `what`, or merged/ if it is there and model/ if not."""
    folders = {"merged": run.merged, "model": run.weights, "gguf": run.gguf}
    if what and what not in folders:
        raise RecipeError.of("FOLDER", f"{what!r} cannot be shared", f"there are: {', '.join(folders)}")
    folder = folders[what or ("merged" if run.merged.is_dir() else "model")]
    if not folder.is_dir():
        verb = {"merged": "merge", "gguf": "export-gguf"}[folder.name]
        raise RecipeError.of("push", f"{folder} not found", f"run: make {verb} RUN={run.name}")
    return folder


def find_obstacles(run: Run, recipe: Recipe, folder: Path, repo: str) -> Iterator[tuple[str, str, str]]:
    """Yield why `folder` cannot be shared as `repo`: (what the user typed, what is wrong, what to do)."""
    try:
        validate_repo_id(repo)
    except HFValidationError:
        yield "REPO", f"{repo!r} is not a repository name of the hub", "write owner/name"
    if repo.count("/") != 1:
        yield "REPO", f"{repo!r} names no owner", "write owner/name"
    data, file = recipe.data, folder / "README.md"
    if data.license is None:
        remedy = f"if you may share what is made of it, write data.license (and data.attribution) into {run.recipe}"
        yield "push", f"the licence of {data.path} is not known", remedy
    elif data.license.startswith("cc-by") and data.attribution is None:
        what = f"{data.license} asks for the names of the data's authors"
        yield "push", what, f"write data.attribution into {run.recipe}"
    card = ModelCard.load(file, ignore_metadata_errors=True).data if file.is_file() else None
    # Upstream leaves a form there that nobody filled in
    if card is None or "medibot" not in (card.tags or []):
        yield "push", f"{folder} has no model card", f"run: make card RUN={run.name}"
    elif card.license == "unknown":
        what = "the card does not know the base model's licence"
        yield "push", what, f"write it into {file}, as the hub writes it, if it lets you share this"
    if folder == run.weights and recipe.lora and "hub" not in run.record()["parts"]["base"]:
        what = "the adapter names a base model of this machine, which nobody else can load"
        yield "push", what, f"push whole weights: make merge RUN={run.name}, make card RUN={run.name}"


def send(folder: Path, files: list[Path], repo: str, public: bool, message: str) -> str:
    """Upload `files` in one commit to a repository that is as private as asked for; return the commit's URL."""
    api = HfApi()
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        # One that was there before may be public, whatever was asked for
        if not public and not api.model_info(repo).private:
            raise RecipeError.of("push", f"{repo} is public", "name another repository, or say --public (PUBLIC=1)")
        names = [file.name for file in files]
        done = api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=names, commit_message=message)
    except RepositoryNotFoundError as error:
        raise RecipeError.of("push", f"no access to {repo}", "log in: hf auth login") from error
    except (HTTPError, OSError) as error:
        what = f"the hub refused: {' '.join(str(error).split())}"
        raise RecipeError.of("push", what, "log in: hf auth login") from error
    return done.commit_url
