"""Read names.yaml: names that do not stand in a recipe, by where an author may know them from."""

from medibot.recipe.files import read_data

NAMES = read_data(__file__, "names.yaml")
REFUSED: dict[str, str] = {
    f"{section}.{name}": why
    for section, reasons in NAMES["refused"].items()
    for why, names in reasons.items()
    for name in names.split()
}
REFUSED_VALUES: list[tuple[str, str | bool, str]] = NAMES["refused_values"]
NEEDS: list[tuple[str, list[str], str, str]] = [
    (key, others.split(), what, remedy) for keys, others, what, remedy in NAMES["needs"] for key in keys.split()
]
RENAMED: dict[str, str] = NAMES["renamed"]
ALIASES, SECTION_ALIASES = (
    {name: meant for meant, names in NAMES[kind].items() for name in names.split()}
    for kind in ("aliases", "section_aliases")
)
