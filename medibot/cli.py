"""The verbs: arguments in, one call, exit code out. An author's mistake is one line and exit code 2."""

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from medibot.errors import RecipeError, Stopped
from medibot.recipe import diff_recipes, list_recipes, load_recipe

# A signal stopped it, and a whole checkpoint is there to go on from (EX_TEMPFAIL of sysexits.h)
STOPPED = 75
app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False, no_args_is_help=True)
RecipeName = Annotated[str, typer.Argument(help="A name of recipes/, or a path.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...")]
TrainedRun = Annotated[str, typer.Option(help="A trained run of outputs/.")]
Accelerate = Annotated[str | None, typer.Option(help="A file of accelerate_configs/, by name or path.")]
Launch = Annotated[str, typer.Option(help="More arguments for accelerate launch.")]
Longest = Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")]


@app.callback()
def describe() -> None:
    """MediBot: recipes that turn a chat model into a medical question-answering assistant."""


def show(result: Any) -> None:
    """Print a result; it says itself what its tables are."""
    from rich.console import Console

    # A path that is cut into lines cannot be copied
    Console(markup=False, highlight=False).print(result, crop=False)


@app.command("list")
def list_() -> None:
    """List the recipes, and what each is for."""
    for name, purpose in list_recipes():
        print(f"{name:24} {purpose}")


@app.command()
def validate(recipes: Annotated[list[str] | None, typer.Argument()] = None) -> None:
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
    from rich.table import Column, Table
    from rich.text import Text

    # Text such as `[topic]` would be read as rich's markup
    table = Table("key", Column(Text(a)), Column(Text(b)))
    for row in diff_recipes(load_recipe(a), load_recipe(b)):
        table.add_row(*(Text(str(cell)) for cell in row))
    show(table if table.row_count else f"{a} and {b} say the same")


@app.command()
def rules(name: Annotated[str | None, typer.Argument(help="A name for several, such as medquad.")] = None) -> None:
    """List the cleaning rules."""
    from medibot.cleaning import describe_rules

    for rule, purpose in describe_rules(name):
        print(f"{rule:36} {purpose}")


@app.command()
def inspect(
    recipe: RecipeName = "quickstart",
    overrides: Overrides = None,
    html: Annotated[Path | None, typer.Option(help="Write the painted page here, too.")] = None,
    row: Annotated[int | None, typer.Option(help="Paint this row of the training split as well.")] = None,
) -> None:
    """Show ledger, leak report, loss-mask report and painted examples; load no weights."""
    checked = load_recipe(recipe, overrides or [])
    if html:
        require_folder(html, "--html")
    from medibot.training.inspection import inspect_recipe

    found = inspect_recipe(checked, row)
    show(found)
    if html:
        html.write_text(found.html(), encoding="utf-8")
        print(f"\nwritten: {html}")
    found.refuse_faults()


@app.command()
def plan(
    recipe: RecipeName = "quickstart",
    overrides: Overrides = None,
    gpu: Annotated[str | None, typer.Option(help="24GB, or a name such as L4; default: this machine.")] = None,
    accelerate: Accelerate = None,
    launch: Launch = "",
) -> None:
    """Plan memory, largest micro-batch, steps, time and disk of a training; load no weights."""
    from medibot.planning.hardware import read_hardware
    from medibot.run import outputs_folder
    from medibot.training.launch import hardware_config, launched_processes, split_launch

    checked = load_recipe(recipe, overrides or [])
    hardware = read_hardware(hardware_config(accelerate))
    processes = launched_processes(hardware, split_launch(launch))
    from medibot.planning.plan import plan_recipe

    show(plan_recipe(checked, gpu, hardware, processes))
    print(f"written: {outputs_folder() / 'plans' / checked.name}.json")


@app.command()
def train(
    recipe: RecipeName = "quickstart",
    overrides: Overrides = None,
    run: Annotated[str | None, typer.Option(help="Name of the outputs folder; default: the recipe's.")] = None,
    accelerate: Accelerate = None,
    launch: Launch = "",
    anyway: Annotated[bool, typer.Option("--anyway", help="Start even what by its plan cannot fit.")] = False,
) -> None:
    """Train a recipe through accelerate launch; the same command again goes on, or says that it is done."""
    from medibot.training import launch as launching

    if not launching.is_launched():
        options = (["--run", run] if run else []) + (["--anyway"] if anyway else [])
        more = launching.split_launch(launch)
        sys.exit(launching.launch(recipe, overrides or [], options, accelerate, more))
    # Until there is something to save, a signal just ends it, without Python's traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    checked = load_recipe(recipe, overrides or [])
    from medibot.run import open_run
    from medibot.training.session import print_next_steps
    from medibot.training.session import train as train_recipe

    name = run or checked.name
    finished = open_run(name).record().get("status") == "finished"
    trained = train_recipe(checked, name, anyway)
    if not finished and os.environ.get("RANK", "0") == "0":
        print_next_steps(trained)


@app.command()
def ask(
    run: TrainedRun = "quickstart",
    question: Annotated[str, typer.Option("--question", "-q")] = "What is anemia?",
    max_new_tokens: Longest = 256,
) -> None:
    """Ask a run one question: print the base model's answer and the tuned one's."""
    from medibot.serving.chat import ask as ask_run

    ask_run(run, question, max_new_tokens)


@app.command()
def chat(
    run: TrainedRun = "quickstart",
    max_new_tokens: Longest = 256,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0: greedy; default: as the run was evaluated.")
    ] = None,
) -> None:
    """Talk with a run at the terminal, or answer each line of a pipe."""
    from medibot.serving.assistant import Decoding
    from medibot.serving.chat import chat as talk

    talk(run, Decoding(max_new_tokens, temperature))


@app.command()
def serve(
    run: TrainedRun = "quickstart",
    port: Annotated[int, typer.Option(min=0, max=65535, help="On 127.0.0.1; 0 is any free one.")] = 8000,
) -> None:
    """Serve a web page and an OpenAI-style endpoint on this machine: base and tuned model, until Ctrl-C."""
    from medibot.serving.server import serve as serve_run

    serve_run(run, port)


@app.command("eval")
def eval_(
    run: TrainedRun = "quickstart",
    rows: Annotated[int | None, typer.Option(min=1, help="Only so many rows: a quick look.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="A file in the schema of the recipe's data; default: the test split.")
    ] = None,
) -> None:
    """Compare base and tuned model on held-out questions, with intervals, a page, and one verdict."""
    from medibot.evaluation.evaluate import evaluate

    show(evaluate(run, rows, data))


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="Evaluated runs of outputs/.")],
    baseline: Annotated[str, typer.Option(help="What each is compared with: base, or one of them.")] = "base",
) -> None:
    """Compare runs: recipes, curves, test metrics with paired intervals, cost, and which one wins."""
    from medibot.evaluation.compare import compare as compare_runs

    show(compare_runs(runs, baseline))


@app.command()
def benchmark(
    tasks: Annotated[
        list[str] | None, typer.Argument(help="Of benchmarks/tasks, or lm-eval's own; default: medical.")
    ] = None,
    run: TrainedRun = "quickstart",
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many questions of each task.")] = None,
) -> None:
    """Ask base and tuned model multiple-choice questions by lm-eval: did the fine-tune cost knowledge?"""
    from medibot.evaluation.benchmark import benchmark as run_benchmark

    show(run_benchmark(run, tasks or [], limit))


@app.command()
def sweep(
    name: Annotated[str, typer.Argument(help="A file of recipes/sweeps/, by name or path.")],
    rows: Annotated[int | None, typer.Option(min=1, help="Evaluate each training on only so many rows.")] = None,
) -> None:
    """Train a grid: as a W&B sweep where this machine is logged in, else here in sequence, then compared."""
    from medibot.evaluation.sweep import sweep as run_sweep

    if comparison := run_sweep(name, rows):
        show(comparison)


@app.command()
def dashboard(project: Annotated[str, typer.Option(help="The W&B project.")] = "medibot") -> None:
    """Show recipes side by side in W&B; without a key, in the terminal."""
    from medibot.tracking import dashboard as open_dashboard

    open_dashboard(project)


@app.command()
def merge(run: TrainedRun = "quickstart") -> None:
    """Merge base and adapter into whole weights, proven to answer as the trained model does."""
    from medibot.export.merge import merge as merge_run

    show(merge_run(run))


@app.command("export-gguf")
def export_gguf(run: TrainedRun = "quickstart") -> None:
    """Write one GGUF file and Ollama's Modelfile, checked against the merged weights."""
    from medibot.export.gguf import export_gguf as export

    show(export(run))


@app.command()
def card(
    run: TrainedRun = "quickstart",
    html: Annotated[Path | None, typer.Option(help="Write the card as a page here, too.")] = None,
) -> None:
    """Write the run's model card into each of its folders that can be shared."""
    if html:
        require_folder(html, "--html")
    from medibot.export.card import write_cards

    print("written: " + ", ".join(map(str, write_cards(run, html))))


@app.command()
def push(
    run: TrainedRun = "quickstart",
    repo: Annotated[str, typer.Option(help="Where to on the hub: owner/name.")] = "",
    folder: Annotated[str, typer.Option(help="merged, model or gguf; default: merged if it is there.")] = "",
    public: Annotated[bool, typer.Option("--public", help="A public repository; private otherwise.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Send it; without, only say what would go out.")] = False,
) -> None:
    """Show what would go to the hub, and with --yes send it there, into a private repository."""
    from medibot.export.push import push as push_run

    show(push_run(run, repo, folder, public, yes))


@app.command()
def schema() -> None:
    """Write recipes/recipe.schema.json, which editors check recipes with."""
    from medibot.recipe.schema import write_schema

    path = Path("recipes/recipe.schema.json")
    require_folder(path, "schema")
    write_schema(path)


@app.command("convert-gguf")
def convert_gguf(file: Path, folder: Path) -> None:
    """Turn a GGUF file into a model folder that recipes can name."""
    from medibot.model.convert import convert_gguf as convert

    convert(file, folder)


def require_folder(file: Path, subject: str) -> None:
    """Raise RecipeError, before any work, for a file that could not be written afterwards."""
    if file.is_dir():
        raise RecipeError.of(subject, f"{file} is a folder", "name a file")
    if not file.parent.is_dir():
        raise RecipeError.of(subject, f"folder {file.parent} not found", "make it, or go to where it is")


def fail(code: int, message: str) -> NoReturn:
    """Print why, once on each machine, and exit."""
    from medibot.training.launch import leave_exit_code

    if leave_exit_code(code):
        print(message, file=sys.stderr, flush=True)
    # torchrun kills the other processes when one fails, and stopping is no failure
    sys.exit(0 if code == STOPPED and "MEDIBOT_EXIT" in os.environ else code)


def main() -> None:
    """Run the command line: private by default, and one line for an author's mistake."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    # It advises a package from the hub that nothing here needs
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app()
    except RecipeError as error:
        fail(2, str(error))
    except Stopped as stopped:
        fail(STOPPED, str(stopped))
