"""How many questions in people's own words the evidence of MedQuAD calls close; minutes, on a local copy of the data:

.venv/bin/python tests/serving/asked.py medquad.parquet
"""

import re
import sys
from pathlib import Path

from medibot.data.prepared import prepare
from medibot.model.tokenizer import load_tokenizer
from medibot.recipe import load_recipe
from medibot.serving.evidence import Evidence, build_evidence


def main(data: str) -> None:
    recipe = load_recipe("medquad-smollm2-135m", [f"data.path={data}", "data.limit=null", "training.max_length=1024"])
    record = build_evidence(recipe, prepare(recipe, load_tokenizer(recipe)))
    print(f"threshold {record['threshold']}, {len(record['rows']):,} training questions; {record['measured']}")
    found = Evidence(record["rows"], record["threshold"])
    text = (Path(__file__).parent / "asked.txt").read_text(encoding="utf-8")
    for part in re.split(r"^## ", text, flags=re.M)[1:]:
        name, *questions = part.splitlines()
        close = [question for question in questions if found.find([question])["close"]]
        wrong = set(questions) - set(close) if name == "trained" else close
        print(f"{name}: {len(close)} of {len(questions)} close", *wrong, sep="\n  ")


if __name__ == "__main__":
    main(*sys.argv[1:])
