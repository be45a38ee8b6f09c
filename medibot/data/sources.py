"""Find where a recipe's rows come from: hub data sets, and files here or far away.

fsspec finds and opens files, so that a path may hold `*` or be a URL.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import fsspec

from medibot.data.files import COMPRESSED, READERS, Placed, read_files, suffix
from medibot.errors import RecipeError, one_line
from medibot.recipe import Recipe
from medibot.recipe.files import find_file
from medibot.recipe.sections import DataSection, SourceSection

# Files of a folder that are about its rows: what `save_to_disk` and the hub write
NO_ROWS = {"state.json", "dataset_info.json", "dataset_dict.json", "dataset_infos.json"}
SPLIT_NAMES = {"train": "train", "validation": "validation|valid|val|dev", "test": "test|eval"}

COLUMNS = {"prompt", "completion", "messages", "thinking"}


@dataclass(frozen=True)
class Source:
    """Rows that a recipe's `section` at `key` names: a hash of their bytes, and a function that reads them.

    `held_out` is the split that they are, None where MediBot makes the splits.
    """

    key: str
    name: str
    section: SourceSection
    digest: str
    read: Callable[[], Iterator[Placed]]
    held_out: str | None = None
    files: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    """Files of rows in the same folder that are of no split, or of another one, and are not read."""


def open_sources(recipe: Recipe) -> list[Source]:
    """Return all sources of a recipe, each under a name of its own; those of validation and test come last."""
    opened = []
    for key, section, held_out in source_sections(recipe.data):
        source = open_source(recipe, key, section, held_out)
        name = f"{source.name}/{held_out}" if held_out else source.name
        while any(name == other.name for other in opened):
            name += "+"
        opened.append(replace(source, name=name))
    return opened


def source_sections(data: DataSection) -> Iterator[tuple[str, SourceSection, str | None]]:
    """Yield (key in the recipe, what it says with what it leaves to section data, the split that it is)."""
    own = {name: vars(data)[name] for name in data.model_fields_set & SourceSection.model_fields.keys() - {"clean"}}
    common = {name: own[name] for name in own.keys() & {"system", "turns", "malformed"}}
    if not data.sources:
        yield "data", SourceSection(**own), None
    for place, source in enumerate(data.sources):
        written = {name: vars(source)[name] for name in source.model_fields_set & SourceSection.model_fields.keys()}
        yield f"data.sources[{place}]", SourceSection(**(common | written)), None
    for split in ("validation", "test"):
        held = vars(data)[split]
        if isinstance(held, SourceSection):
            written = {name: vars(held)[name] for name in held.model_fields_set}
            # Columns of its own take the place of the others, a path of its own that of the hub's names
            gone = COLUMNS if written.keys() & COLUMNS else set()
            gone = gone | ({"name", "revision", "split"} if "path" in written else set())
            left = {name: value for name, value in own.items() if name not in gone}
            yield f"data.{split}", SourceSection(**(left | written)), split


def open_source(recipe: Recipe, key: str, section: SourceSection, held_out: str | None = None) -> Source:
    """Return a source whose bytes are hashed, and whose rows are parsed only when they are read."""
    path = str(section.path)
    name = section.name or Path(path.rstrip("/")).name.partition(".")[0]
    where = str(find_file(path))
    if is_hub_id(path):
        return open_hub(recipe, key, section, held_out)
    if "*" not in path and "://" not in path and not Path(where).exists():
        raise recipe.error(f"{key}.path", f"no file or folder {path!r}", "check the path, seen from here")
    try:
        files, beside = find_files(recipe, f"{key}.path", path, where, section.split)
        digest = hashlib.sha256()
        for file in files:
            digest.update(Path(file).name.encode() + b"\0")
            with fsspec.open(file) as opened:
                while chunk := opened.read(1 << 20):
                    digest.update(chunk)
    except RecipeError:
        raise
    except Exception as error:  # a network's libraries have exceptions of their own
        what = f"{path!r} cannot be read: {one_line(error) or type(error).__name__}"
        raise recipe.error(f"{key}.path", what, "check path, network and access") from error
    read = partial(read_files, recipe, f"{key}.path", files)
    return Source(key, name, section, digest.hexdigest(), read, held_out, tuple(files), tuple(beside))


def open_hub(recipe: Recipe, key: str, section: SourceSection, held_out: str | None) -> Source:
    """Return a split of a hub data set as a source."""
    # Seconds of imports that files do without
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    path = str(section.path)
    try:
        rows: Any = load_dataset(path, section.name, revision=section.revision, split=section.split)
    except (OSError, ValueError, DatasetsError) as error:
        what = f"cannot load {path!r} from the hub: {str(error).strip().splitlines()[0]}"
        remedy = "check name, revision and network; or point data.path to a local file"
        raise recipe.error(f"{key}.path", what, remedy) from error
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, default=str).encode())

    def read() -> Iterator[Placed]:
        for number, row in enumerate(rows):
            yield f"{path}: row {number}", row

    return Source(key, path, section, digest.hexdigest(), read, held_out)


def is_hub_id(path: str) -> bool:
    """Tell whether a path names a data set on the hub: it has one slash, and there is no such file."""
    named = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) and suffix(path) not in READERS
    return bool(named) and not find_file(path).exists()


def find_files(recipe: Recipe, key: str, path: str, where: str, split: str) -> tuple[list[str], list[str]]:
    """Return (the files of a path, a folder, a pattern or a URL, those beside them that are not read).

    Of a folder with a file for each split those of the split are read.
    """
    system, root = fsspec.core.url_to_fs(path if "://" in path else where)
    folder = "*" not in root and system.isdir(root)
    found = system.glob(root) if "*" in root else system.ls(root, detail=False) if folder else [root]
    files = sorted(file for file in found if suffix(file) in READERS and Path(file).name not in NO_ROWS)
    if not files:
        kinds = ", ".join(READERS)
        what = f"cannot read {suffix(path) or 'a file without suffix'}"
        if folder or "*" in root:
            what = f"{'folder ' if folder else ''}{path} holds no {kinds} file"
        raise recipe.error(key, what, f"use {kinds}, also with {', '.join(COMPRESSED)}")
    found = [system.unstrip_protocol(file) for file in files]
    named = {
        name: [file for file in found if re.match(rf"({words})(?![a-z])", Path(file).name, re.IGNORECASE)]
        for name, words in SPLIT_NAMES.items()
    }
    read = named.get(split, []) if folder and (split != "train" or any(named.values())) else found
    if not read:
        what = f"{path} has no file for split {split!r}"
        raise recipe.error(key, what, f"name one {split}.jsonl, or give the path of the file")
    return read, [file for file in found if file not in read]
