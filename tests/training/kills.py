"""Kill a training at random moments, while checkpoints are written included, until it has finished; compare the weights.

    .venv/bin/python tests/kills.py --kills 100

Each attempt is a process of its own, ended by SIGKILL; every other one in the middle of a checkpoint. Nothing may be
lost, and the weights and the record must be those of a training that nobody touched.
"""

import argparse
import gc
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

# As the verbs: imports leave no garbage
gc.set_threshold(10_000)

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import CHATML, SAMPLE  # noqa: E402

from medibot.recipe import load_recipe  # noqa: E402
from medibot.run import Run, open_run, read_lines  # noqa: E402
from medibot.training.session import train  # noqa: E402

TIMING = ("seconds", "runtime", "per_second", "peak_memory", "train_loss")


def tiny_model(folder: Path) -> None:
    """A random Llama that knows bytes and ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=4096, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).chat_template


def start(name: str, overrides: list[str]) -> int:
    """Train in a process of its own; returns its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            train(load_recipe("quickstart", overrides, root=ROOT), name)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            sys.stdout.flush()
            os._exit(code)
    return child


def ended(child: int) -> bool:
    found, status = os.waitpid(child, os.WNOHANG)
    if found and os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"a training failed by itself: {Path('log.txt').read_text()[-3000:]}")
    return bool(found)


def kill_somewhere(child: int, name: str, draw: random.Random, in_checkpoint: bool) -> bool:
    """Wait for a random moment after the training's first step and kill it there; False if it had finished before."""
    this = open_run(name)
    seen, until = len(read_lines(this.metrics)), None
    # Checkpoints and logged lines to let pass before
    passed, begun = draw.randrange(3), set()
    while True:
        if ended(child):
            return False
        if in_checkpoint and until is None and new_checkpoint(this, begun, passed):
            until = time.monotonic() + draw.uniform(0, 0.02)
        elif not in_checkpoint and until is None and len(read_lines(this.metrics)) > seen + passed:
            until = time.monotonic() + draw.uniform(0, 0.4)
        if until and time.monotonic() >= until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return True
        # A checkpoint is written in a few milliseconds; logged lines are read anew on each look
        time.sleep(0.001 if in_checkpoint else 0.02)


def new_checkpoint(this: Run, begun: set[str], passed: int) -> bool:
    """Whether this attempt is writing a checkpoint, after `passed` others; `begun` collects their names."""
    now = {folder.name for folder in this.writing.glob("checkpoint-*") if any(folder.iterdir())}
    begun |= now
    return bool(now) and len(begun) > passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        os.environ.update(MEDIBOT_OUTPUTS="outputs", MEDIBOT_CACHE="cache", TQDM_DISABLE="1")
        tiny_model(Path("model"))
        overrides = [
            "model.pretrained_model_name_or_path=./model",
            f"data.path={SAMPLE}",
            "data.limit={train: 40, validation: 4}",
            "data.too_long=drop",
            "quantization=null",
            "lora.lora_dropout=0.1",
            "tracking=null",
            f"training.max_steps={28 + 4 * given.kills}",
            "training.max_length=2048",
            "training.per_device_train_batch_size=1",
            "training.gradient_accumulation_steps=2",
            "training.logging_steps=3",
            "training.eval_strategy=steps",
            "training.eval_steps=6",
            "training.save_steps=2",
            "training.save_total_limit=2",
            "training.load_best_model_at_end=false",
            "evaluation.questions=['What is anemia?']",
            "evaluation.max_new_tokens=2",
        ]
        child = start("whole", overrides)
        while not ended(child):
            time.sleep(0.1)
        draw, kills, torn = random.Random(given.seed), 0, 0
        while kills < given.kills:
            child = start("killed", overrides)
            if not kill_somewhere(child, "killed", draw, in_checkpoint=kills % 2 == 0):
                raise SystemExit(f"finished after {kills} kills already: give it more steps")
            kills += 1
            torn += any(open_run("killed").writing.glob("checkpoint-*"))
            last = open_run("killed").last_checkpoint()
            print(f"kill {kills}: last whole checkpoint {last.name if last else 'none'}", flush=True)
        child = start("killed", overrides)
        while not ended(child):
            time.sleep(0.1)
        whole, killed = (
            load_file(open_run(name).weights / "adapter_model.safetensors") for name in ("whole", "killed")
        )
        same = whole.keys() == killed.keys() and all(torch.equal(whole[key], killed[key]) for key in whole)
        records = []
        for name in ("whole", "killed"):
            for file in ("metrics.jsonl", "answers.jsonl"):
                lines = read_lines(open_run(name).folder / file)
                records.append([{k: v for k, v in line.items() if not any(t in k for t in TIMING)} for line in lines])
        record = records[:2] == records[2:]
        if not record:
            for a, b in zip(records[0], records[2], strict=False):
                if a != b:
                    print(f"record differs:\n{a}\n{b}")
                    break
        print(f"{kills} kills, {torn} of them inside a checkpoint; weights equal: {same}; record equal: {record}")
        sys.exit(not (same and record))


if __name__ == "__main__":
    main()
