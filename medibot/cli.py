"""The verbs: arguments in, one call, exit code out. An author's mistake is one line and exit code 2."""

import gc
import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import medibot
from medibot.errors import RecipeError, Stopped
from medibot.recipe import find_differences, list_recipes, load_recipe, names_data

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: a signal stopped it, and the same command goes on
PRIVATE = {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "WANDB_ERROR_REPORTING": "false"}
ABOUT = "MediBot: recipes that turn a chat model into a medical question-answering assistant."
app = typer.Typer(
    help=ABOUT, rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False, no_args_is_help=True
)


def require_folder(file: Path | None) -> Any:
    """Raise RecipeError, before any work, for a file that could not be written afterwards."""
    if file and (file.is_dir() or not file.parent.is_dir()):
        raise RecipeError.of(str(file), "cannot be written here", "name a file in a folder that is there")
    return file


Name = Annotated[str, typer.Argument(help="A name of recipes/, or a path.")]
Recipes = Annotated[list[str] | None, typer.Argument(help="Names of recipes/, or paths; default: all.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...")]
RuleList = Annotated[str | None, typer.Argument(help="A name for several, such as medquad.")]
Page = Annotated[Path | None, typer.Option("--html", callback=require_folder, help="Write it as a page here, too.")]
Row = Annotated[int | None, typer.Option(help="Paint this row of the training split as well.")]
Gpu = Annotated[str | None, typer.Option(help="24GB, or a name such as L4; default: this machine.")]
Config = Annotated[str | None, typer.Option(help="A file of accelerate_configs/, by name or path.")]
Launch = Annotated[str, typer.Option(help="More arguments for accelerate launch.")]
NewRun = Annotated[str | None, typer.Option(help="Name of the outputs folder; default: the recipe's.")]
Anyway = Annotated[bool, typer.Option("--anyway", help="Start even what by its plan cannot fit.")]
TrainedRun = Annotated[str, typer.Option(help="A trained run of outputs/.")]
Question = Annotated[str, typer.Option("--question", "-q")]
Longest = Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")]
Temperature = Annotated[float | None, typer.Option(min=0, help="0: greedy; default: as the run was evaluated.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="On 127.0.0.1; 0 is any free one.")]
Rows = Annotated[int | None, typer.Option(min=1, help="Evaluate only so many rows: a quick look.")]
HeldOut = Annotated[Path | None, typer.Option(help="A file like the recipe's data; default: the test split.")]
Runs = Annotated[list[str], typer.Argument(help="Evaluated runs of outputs/.")]
Baseline = Annotated[str, typer.Option(help="What each is compared with: base, or one of them.")]
Tasks = Annotated[list[str] | None, typer.Argument(help="Of benchmarks/tasks, or lm-eval's own; default: medical.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only so many questions of each task.")]
Sweep = Annotated[str, typer.Argument(help="A file of recipes/sweeps/, by name or path.")]
Project = Annotated[str, typer.Option(help="The W&B project.")]
Repo = Annotated[str, typer.Option(help="Where to on the hub: owner/name.")]
Folder = Annotated[str, typer.Option(help="merged, model or gguf; default: merged if it is there.")]
Public = Annotated[bool, typer.Option("--public", help="A public repository; private otherwise.")]
Yes = Annotated[bool, typer.Option("--yes", help="Send it; without, only say what would go out.")]


def show(result: Any) -> None:
    """Print a result; it says itself what its tables are."""
    from rich.console import Console

    # Text such as `[topic]` is no markup, and a path that is cut into lines cannot be copied
    Console(markup=False, emoji=False, highlight=False).print(result, crop=False)


@app.command("list")
def list_() -> None:
    """List the recipes, and what each is for."""
    print("\n".join(f"{name:24} {purpose}" for name, purpose in list_recipes()))


@app.command()
def validate(recipes: Recipes = None) -> None:
    """Check recipes (all of them by default) without loading data or weights."""
    problems = []
    for name in recipes or [name for name, _ in list_recipes()]:
        try:
            load_recipe(name)
            print(f"{name}: good")
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)


@app.command()
def diff(a: str, b: str) -> None:
    """Show what differs between two recipes, key by key."""
    from rich.table import Table

    table = Table("key", a, b)
    for row in find_differences(load_recipe(a).as_dict(), load_recipe(b).as_dict()):
        table.add_row(*map(str, row))
    show(table if table.row_count else f"{a} and {b} say the same")


@app.command()
def rules(name: RuleList = None) -> None:
    """List the cleaning rules."""
    from medibot.cleaning import describe_rules

    print("\n".join(f"{rule:36} {purpose}" for rule, purpose in describe_rules(name)))


@app.command()
def inspect(recipe: Name = "quickstart", overrides: Overrides = None, html: Page = None, row: Row = None) -> None:
    """Show ledger, leak report, loss mask and painted examples; of a data file, what it is and how to write it."""
    if names_data(recipe):
        from medibot.training.preview import preview_file

        show(preview_file(recipe, bare=not overrides and html is None and row is None))
        return
    checked = load_recipe(recipe, overrides or [])
    from medibot.training.inspection import inspect_recipe

    found = inspect_recipe(checked, row)
    show(found)
    if html:
        html.write_text(found.html(), encoding="utf-8")
        print(f"\nwritten: {html}")
    for audit in found.audits:
        audit.refuse_faults()


@app.command()
def plan(
    recipe: Name = "quickstart",
    overrides: Overrides = None,
    gpu: Gpu = None,
    accelerate: Config = None,
    launch: Launch = "",
) -> None:
    """Plan memory, largest micro-batch, steps, time and disk of a training; load no weights."""
    from medibot.run import outputs_folder
    from medibot.training.launch import choose_hardware, fit_processes, parse_launch

    checked = load_recipe(recipe, overrides or [])
    _, hardware = choose_hardware(accelerate)
    words, processes, _ = parse_launch(launch, hardware)
    from medibot.planning.plan import plan_recipe

    show(plan_recipe(checked, gpu, hardware, fit_processes(checked, hardware, processes, words)))
    print(f"written: {outputs_folder() / 'plans' / checked.name}.json")


@app.command()
def train(
    recipe: Name = "quickstart",
    overrides: Overrides = None,
    run: NewRun = None,
    accelerate: Config = None,
    launch: Launch = "",
    anyway: Anyway = False,
) -> None:
    """Train a recipe through accelerate launch; the same command again goes on, or says that it is done."""
    from medibot.training import launch as launching

    # Every accelerate launcher sets this one
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        options = (["--run", run] if run else []) + (["--anyway"] if anyway else [])
        sys.exit(launching.launch(recipe, overrides or [], options, accelerate, launch))
    os.environ.update(launching.HIDDEN if os.environ.get("ACCELERATE_USE_CPU") == "True" else {})
    # Until there is something to save, a signal just ends it, without Python's traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    checked = load_recipe(recipe, overrides or [])
    medibot.train(checked, run or checked.name, anyway)


@app.command()
def ask(run: TrainedRun = "quickstart", question: Question = "What is anemia?", max_new_tokens: Longest = 256) -> None:
    """Ask a run one question: print the base model's answer and the tuned one's."""
    from medibot.serving.chat import ask as ask_run

    ask_run(run, question, max_new_tokens)


@app.command()
def chat(run: TrainedRun = "quickstart", max_new_tokens: Longest = 256, temperature: Temperature = None) -> None:
    """Talk with a run at the terminal, or answer each line of a pipe."""
    from medibot.serving.assistant import Decoding
    from medibot.serving.chat import chat as talk

    talk(run, Decoding(max_new_tokens, temperature))


@app.command()
def serve(run: TrainedRun = "quickstart", port: Port = 8000) -> None:
    """Serve a web page and an OpenAI-style endpoint on this machine: base and tuned model, until Ctrl-C."""
    from medibot.serving.server import serve as serve_run

    serve_run(run, port)


@app.command("eval")
def eval_(run: TrainedRun = "quickstart", rows: Rows = None, data: HeldOut = None) -> None:
    """Compare base and tuned model on held-out questions, with intervals, a page, and one verdict."""
    show(medibot.evaluate(run, rows, data))


@app.command()
def compare(runs: Runs, baseline: Baseline = "base") -> None:
    """Compare runs: recipes, curves, test metrics with paired intervals, cost, and which one wins."""
    show(medibot.compare(runs, baseline))


@app.command()
def benchmark(tasks: Tasks = None, run: TrainedRun = "quickstart", limit: Limit = None) -> None:
    """Ask base and tuned model multiple-choice questions by lm-eval: did the fine-tune cost knowledge?"""
    from medibot.evaluation.benchmark import benchmark as run_benchmark

    show(run_benchmark(run, tasks or [], limit))


@app.command()
def sweep(name: Sweep, rows: Rows = None) -> None:
    """Train a grid: as a W&B sweep where this machine is logged in, else here in sequence, then compared."""
    from medibot.evaluation.sweep import sweep as run_sweep

    if comparison := run_sweep(name, rows):
        show(comparison)


@app.command()
def dashboard(project: Project = "medibot") -> None:
    """Show recipes side by side in W&B; without a key, in the terminal."""
    from medibot.tracking import dashboard as open_dashboard

    open_dashboard(project)


@app.command()
def merge(run: TrainedRun = "quickstart") -> None:
    """Merge base and adapter into whole weights, proven to answer as the trained model does."""
    show(medibot.merge(run))


@app.command("export-gguf")
def export_gguf(run: TrainedRun = "quickstart") -> None:
    """Write one GGUF file and Ollama's Modelfile, checked against the merged weights."""
    from medibot.export.gguf import export_gguf as export

    show(export(run))


@app.command()
def card(run: TrainedRun = "quickstart", html: Page = None) -> None:
    """Write the run's model card into each of its folders that can be shared."""
    from medibot.export.card import write_cards

    print("written: " + ", ".join(map(str, write_cards(run, html))))


@app.command()
def push(
    run: TrainedRun = "quickstart", repo: Repo = "", folder: Folder = "", public: Public = False, yes: Yes = False
) -> None:
    """Show what would go to the hub, and with --yes send it there, into a private repository."""
    from medibot.export.push import push as push_run

    show(push_run(run, repo, folder, public, yes))


@app.command()
def schema() -> None:
    """Write recipes/recipe.schema.json, which editors check recipes with."""
    from medibot.recipe.schema import json_schema

    file = require_folder(Path("recipes/recipe.schema.json"))
    file.write_text(json.dumps(json_schema(), indent=1, sort_keys=True) + "\n", encoding="utf-8")


@app.command("convert-gguf")
def convert_gguf(file: Path, folder: Path) -> None:
    """Turn a GGUF file into a model folder that recipes can name."""
    from medibot.model.convert import convert_gguf as convert

    convert(file, folder)


def main() -> None:
    """Run the command line: private by default, and one line for an author's mistake."""
    # Imports make a million objects and next to no garbage: Python's 700 search them through for a second
    gc.set_threshold(10_000)
    os.environ.update(PRIVATE | ({} if sys.stderr.isatty() else {"TQDM_DISABLE": "1"}) | os.environ)
    try:
        if sys.platform == "win32":
            raise RecipeError.of("Windows", "is not supported", "run it in WSL 2 or a container")
        app()
    except (RecipeError, Stopped) as error:
        from medibot.training.launch import leave_exit_code

        code = 2 if isinstance(error, RecipeError) else STOPPED
        if leave_exit_code(code):
            print(error, file=sys.stderr, flush=True)
        # torchrun kills the other processes when one fails, and stopping is no failure
        sys.exit(0 if code == STOPPED and "MEDIBOT_EXIT" in os.environ else code)
