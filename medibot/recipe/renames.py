"""Read names.yaml: names that do not stand in a recipe, by where an author may know them from."""

from pathlib import Path
from typing import Any

import yaml


def each(names: str, value: Any) -> dict[str, Any]:
    """Return the same value under several names."""
    return dict.fromkeys(names.split(), value)


NAMES = yaml.safe_load(Path(__file__).with_name("names.yaml").read_text(encoding="utf-8"))
REFUSED: dict[str, str] = {
    f"{section}.{name}": why
    for section, reasons in NAMES["refused"].items()
    for why, names in reasons.items()
    for name in names.split()
}
REFUSED_VALUES: list[tuple[str, str | bool, str]] = NAMES["refused_values"]
RENAMED: dict[str, str] = NAMES["renamed"]
ALIASES, SECTION_ALIASES = (
    {name: meant for meant, names in NAMES[kind].items() for name in names.split()}
    for kind in ("aliases", "section_aliases")
)
