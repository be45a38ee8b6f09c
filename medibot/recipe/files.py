"""Find files that MediBot ships (recipes, their data, accelerate configs): the current folder's own come first."""

import difflib
from pathlib import Path
from typing import Any

import yaml

from medibot.errors import RecipeError

PACKAGE = Path(__file__).resolve().parents[1]


def search_folders(name: str, root: Path | None = None) -> list[Path]:
    """Return where files of `name`, such as "recipes", are: in `root`, or here and then in what MediBot came with."""
    if root is not None:
        return [root / name]
    clone = PACKAGE.parent / name
    # A wheel carries the folders inside the package; a clone has them beside it
    shipped = clone if (PACKAGE.parent / "pyproject.toml").is_file() else PACKAGE / name
    return [Path(name), shipped]


def find_file(path: str) -> Path:
    """Return the file or folder of a relative path, seen from here or else among the shipped ones; it may be neither."""
    written = Path(path).expanduser()
    if written.exists() or written.is_absolute() or not written.parts:
        return written
    folder, *rest = written.parts
    shipped = search_folders(folder)[1].joinpath(*rest)
    return shipped if shipped.exists() else written


def names_data(name: str) -> bool:
    """Tell whether what may name a recipe names data: a file, a folder, a pattern or a URL, and no recipe."""
    ends = (".yaml", ".yml")
    if name.endswith(ends) or any((at / f"{name}{end}").is_file() for at in search_folders("recipes") for end in ends):
        return False
    # A name such as qwen2.5-3b has no suffix, a file that is not there has one
    return "*" in name or "://" in name or Path(name).suffix[1:].isalpha() or (name != "" and find_file(name).exists())


def find_by_name(subject: str, name: str, folders: list[Path]) -> Path:
    """Return the YAML file of that name in `folders`, or of that path; raise RecipeError, which says what there is."""
    ends = (".yaml", ".yml")
    paths = [Path(name)] if name.endswith(ends) else [folder / f"{name}{end}" for folder in folders for end in ends]
    for path in paths:
        if path.is_file():
            return path
    known = sorted({file.stem for folder in folders for file in folder.glob("*.y*ml")})
    close = difflib.get_close_matches(Path(name).stem, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    raise RecipeError.of(subject, f"{name} not found", f"{hint}there are: {', '.join(known) or 'none'}")


def read_data(module: str, name: str) -> Any:
    """Return what the YAML file `name` beside the `module`'s file holds."""
    return yaml.safe_load(Path(module).with_name(name).read_text(encoding="utf-8"))
