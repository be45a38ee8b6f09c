"""Files that MediBot ships (recipes, their data, accelerate configs): the current folder's own come first."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def search_folders(name: str) -> list[Path]:
    """Return where to look for files of `name`, such as "recipes": the current folder, then what MediBot came with."""
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
