"""The recipe loader: every mistake is named with its place and its remedy, and only mistakes are refused."""

import json
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medibot import cli
from medibot.errors import RecipeError
from medibot.recipe import ABSENT, find_differences, list_recipes, load_recipe
from medibot.recipe.renames import ALIASES, REFUSED_VALUES, RENAMED, SECTION_ALIASES
from medibot.recipe.schema import (
    GENERATION_TYPES,
    LORA_TYPES,
    NULL_IS_A_VALUE,
    QUANTIZATION_TYPES,
    SECTIONS,
    TRAINING_TYPES,
    json_schema,
    section_models,
)

ROOT = Path(__file__).resolve().parents[2]

GOOD = """\
# yaml-language-server: $schema=recipe.schema.json
# A small recipe for the tests.
model:
  pretrained_model_name_or_path: org/model
  revision: 0123456789abcdef0123456789abcdef01234567
data:
  path: rows.jsonl
  prompt: question
  completion: answer
training:
  learning_rate: 2e-4
  num_train_epochs: 3
  max_length: 512
"""
END_OF = {"model": 5, "data": 9, "training": 13}  # the line after which a section of GOOD can grow
QLORA = "quantization: {load_in_4bit: true, bnb_4bit_quant_type: nf4}\n"


@pytest.fixture
def write(tmp_path):
    def write_recipe(text: str | bytes) -> str:
        path = tmp_path / "mine.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write_recipe


def grown(section: str, line: str) -> tuple[str, tuple[int, int]]:
    """GOOD with one more setting, and the place of that setting."""
    lines = GOOD.splitlines()
    if section not in END_OF:
        return GOOD + f"{section}:\n  {line}\n", (len(lines) + 2, 3)
    lines.insert(END_OF[section], f"  {line}")
    return "\n".join(lines) + "\n", (END_OF[section] + 1, 3)


def only_problem(path: str, overrides=()):
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert len(caught.value.problems) == 1, str(caught.value)
    return caught.value.problems[0]


# section, the line added to GOOD, the key it must be blamed on (None: the line's own), what the message must hold
SETTINGS = [
    ("model", "torch_dtype: bfloat16", "no such setting (renamed: dtype)"),
    ("model", "device_map: auto", "accelerate_configs/"),
    ("model", "token: abc", "HF_TOKEN"),
    ("model", "load_in_4bit: true", "it stands in section quantization"),
    ("model", "load_in_8bit: true", "it stands in section quantization"),
    ("model", "quantization_config: {}", "section of its own: quantization"),
    ("model", "use_safetensors: false", "always on"),
    ("model", "dtype: bf16", "must be auto, float32, bfloat16, float16, not the text 'bf16'"),
    ("model", "dtype: bfloat61", "did you mean bfloat16?"),
    ("model", "attn_implementation: flash_attention", "did you mean flash_attention"),
    ("model", "attn_implementation: a/b/c", "org/repo[@revision][:function]"),
    ("model", "trust_remote_code: yes", "must be true or false, not the text 'yes' (write true or false)"),
    ("model", "trust_remote_cod: true", "did you mean trust_remote_code?"),
    ("model", "Subfolder: x", "did you mean subfolder?"),
    ("model", "subfolder: ''", "must not be empty"),
    ("model", "subfolder: 5", "must be text, not 5"),
    ("data", "systm: x", "did you mean system?"),
    ("data", "system_prompt: x", "did you mean system?"),
    ("data", "split: [train]", "must be text, not a list"),
    ("data", "validation: 0.6", "must be at most 0.5, not 0.6"),
    ("data", "validation: -0.1", "must be at least 0"),
    ("data", "validation: '0.1'", "leave the quotes out"),
    ("data", "limit: 0", "must be at least 1, not 0"),
    ("data", "limit: many", "must be a whole number or a mapping, not the text 'many'"),
    ("data", "limit: 1.5", "must be a whole number or a mapping, not 1.5"),
    ("data", "too_long: cut", "must be error, drop"),
    ("data", "group_by: document", "must be a list, not the text 'document'"),
    ("data", "clean: drop_unanswered", "must be a list"),
    ("data", "seed: true", "must be a whole number, not true"),
    ("data", "name:", None),
    ("data", "streaming: true", "does not stand in a recipe (all rows are read before the first step"),
    ("training", "max_seq_length: 512", "no such setting (renamed: max_length)"),
    ("training", "warmup_ratio: 0.03", "renamed: warmup_steps, where a number below 1 is a ratio"),
    ("training", "evaluation_strategy: steps", "renamed: eval_strategy"),
    ("training", "group_by_length: true", "renamed: train_sampling_strategy: group_by_length"),
    ("training", "gradient_checkpointing: true", "renamed: activation_checkpointing"),
    ("training", "gradient_checkpointing_kwargs: {}", "renamed: activation_checkpointing_kwargs"),
    ("training", "per_gpu_train_batch_size: 2", "renamed: per_device_train_batch_size"),
    ("training", "torch_dtype: float32", "renamed: model.dtype"),
    ("training", "num_of_sequences: 4", "did you mean data.limit?"),
    ("training", "gradient-accumulation-steps: 4", "did you mean gradient_accumulation_steps?"),
    ("training", "lr: 1e-4", "did you mean learning_rate?"),
    ("training", "micro_batch_size: 2", "did you mean per_device_train_batch_size?"),
    ("training", "num_epochs: 2", "did you mean num_train_epochs?"),
    ("training", "sequence_len: 2", "did you mean max_length?"),
    ("training", "cutoff_len: 2", "did you mean max_length?"),
    ("training", "lora_r: 2", "did you mean lora.r?"),
    ("training", "lora_alpha: 2", "it stands in section lora"),
    ("training", "load_in_4bit: true", "it stands in section quantization"),
    ("training", "weight_decy: 0.1", "did you mean weight_decay?"),
    ("training", "zzz: 1", "training.zzz: no such setting"),
    ("training", "output_dir: out", "does not stand in a recipe (the run decides it"),
    ("training", "run_name: x", "the run decides it"),
    ("training", "report_to: wandb", "section tracking"),
    ("training", "bf16: true", "the machine decides it"),
    ("training", "use-cpu: true", "the machine decides it"),
    ("training", "push_to_hub: true", "while it trains"),
    ("training", "hub_model_id: a/b", "while it trains"),
    ("training", "resume_from_checkpoint: x", "the same command resumes"),
    ("training", "deepspeed: ds.json", "accelerate_configs/"),
    ("training", "fsdp_config: {}", "accelerate_configs/"),
    ("training", "accelerator_config: {}", "accelerate_configs/"),
    ("training", "model_init_kwargs: {}", "section of its own: model"),
    ("training", "dataset_kwargs: {skip_prepare_dataset: true}", "switch off the check of the loss mask"),
    ("training", "completion_only_loss: false", "cannot be false (the loss covers exactly the answer"),
    ("training", "assistant_only_loss: true", "cannot be true"),
    ("training", "chat_template_path: org/other", "must be a .jinja or .j2 file"),
    ("training", "eos_token: x", "the tokenizer's own tokens"),
    ("training", "dataset_text_field: text", "data.prompt and data.completion"),
    ("training", "use_liger_kernel: true", "model.use_kernels"),
    ("training", "logging_nan_inf_filter: true", "it hides NaN losses"),
    ("training", "local_rank: 0", "accelerate_configs/"),
    ("training", "project: x", "section tracking"),
    ("training", "trackio_space_id: x", "section tracking"),
    ("training", "enable_jit_checkpoint: true", "MediBot saves a whole checkpoint"),
    ("training", "truncation_mode: keep_end", "write keep_start"),
    ("training", "trainable_token_indices: [1]", "no such setting"),
    ("training", "label_smoothing_factor: 0.1", "second forward pass"),
    ("training", "adam_beta2: '0.95'", "must be a number, not the text '0.95' (leave the quotes out)"),
    ("training", "packing: 'false'", "must be true or false, not the text 'false' (leave the quotes out)"),
    ("training", "packing: on", "write true or false"),
    ("training", "packing: 1", "must be true or false, not 1"),
    ("training", "weight_decay: true", "must be a number, not true"),
    ("training", "weight_decay: -1", "must be at least 0, not -1"),
    ("training", "per_device_train_batch_size: 0", "must be at least 1"),
    ("training", "per_device_train_batch_size: 4.0", "must be a whole number, not 4.0"),
    ("training", "max_steps: 0", "must be at least 1"),
    ("training", "warmup_steps: 2.5", "must be a whole number, or below 1"),
    ("training", "save_total_limit: 0", "must be at least 1"),
    ("training", "seed: -1", "must be at least 0"),
    ("training", "lr_scheduler_type: cosin", "one of 12 choices, not the text 'cosin' (did you mean cosine?)"),
    ("training", "optim: adamw_torhc", "choices, not the text 'adamw_torhc' (did you mean adamw_torch?)"),
    ("training", "optim: adamw", "did you mean adamw_torch?"),
    ("training", "eval_strategy: false", "must be no, steps, epoch, not false"),
    ("training", "save_strategy: step", "did you mean steps?"),
    ("training", "logging_strategy: 5", "must be no, steps, epoch"),
    ("training", "loss_type: chunked_nll", "must be nll, dft"),
    ("training", "packing_strategy: ffd", "did you mean bfd?"),
    ("training", "train_sampling_strategy: length", "must be random, sequential, group_by_length, batch_rebalance"),
    ("training", "pad_to_multiple_of: 0", "must be at least 1"),
    ("training", "optim_args: {a: 1}", "must be text, not a mapping"),
    ("training", "lr_scheduler_kwargs: '{}'", "must be a mapping, not the text '{}'"),
    ("training", "padding_free: true", "packing: true, or max_length: null"),
    ("training", "load_best_model_at_end: true", "requires the save and eval strategy to match"),
    ("training", "lr_scheduler_type: greedy", "requires an eval strategy"),
    ("training", "dataloader_prefetch_factor: 2", "dataloader_num_workers"),
    ("training", "activation_checkpointing_kwargs: {use_reentrant: false}", "activation_checkpointing: true"),
    ("training", "adam_epsilon: 1e999", "must be a finite number"),
    ("training", "adam_epsilon: .nan", "must be a finite number"),
    ("training", "max_steps: " + "9" * 50, "is too long for a number"),
    ("training", 'optim_args: "a\\0b"', "holds a character that is not text"),
    ("training", "<<: {seed: 1}", "merge keys are not read"),
    ("lora", "task_type: CAUSAL_LM", "always LoRA for CAUSAL_LM"),
    ("lora", "rank: 8", "did you mean r?"),
    ("lora", "lora_target: all-linear", "did you mean target_modules?"),
    ("lora", "target_module: all-linear", "did you mean target_modules?"),
    ("lora", "learning_rate: 1e-4", "it stands in section training"),
    ("lora", "r: 0", "must be at least 1"),
    ("lora", "r: 8.0", "must be a whole number"),
    ("lora", "lora_dropout: 1", "must be below 1"),
    ("lora", "bias: some", "must be none, all, lora_only"),
    ("lora", "target_modules: []", "must not be empty"),
    ("lora", "target_modules: [q_proj, lm_head]", "lora.modules_to_save: [lm_head]"),
    ("lora", "target_modules: all_linear", "did you mean all-linear?"),
    ("lora", "init_lora_weights: pisa", "did you mean pissa?"),
    ("lora", "init_lora_weights: pissa_niter_x", "pissa_niter_<steps>"),
    ("lora", "init_lora_weights: eva", "a pass over the data first"),
    ("lora", "init_lora_weights: loftq", "loftq_config must be specified"),
    ("lora", "trainable_token_indices: [1]", "tied embeddings"),
    ("quantization", "load_in_4bt: true", "did you mean load_in_4bit?"),
    ("quantization", "load_in_4bit: 'true'", "must be true or false"),
    ("quantization", "bnb_4bit_quant_type: nf5", "must be fp4, nf4"),
    ("quantization", "bnb_4bit_compute_dtype: bf16", "must be float32, bfloat16, float16"),
    ("quantization", "bnb_4bit_quant_storage: int4", "did you mean int8?"),
    ("quantization", "double_quant: true", "did you mean bnb_4bit_use_double_quant?"),
    ("evaluation", "question: []", "did you mean"),
    ("evaluation", "max_new_tokens: 0", "must be at least 1"),
    ("evaluation", "generate: [1]", "must be a mapping, not a list"),
    ("tracking", "dir: x", "the run decides it"),
    ("tracking", "id: x", "the run decides it"),
    ("tracking", "resume: allow", "the run decides it"),
    ("tracking", "reinit: true", "the run decides it"),
    ("tracking", "save_code: true", "the run decides it"),
    ("tracking", "projct: x", "did you mean project?"),
    ("tracking", "mode: off", "must be online, offline, disabled, shared"),
    ("tracking", "tags: a", "must be a list"),
    ("tracking", "entity: 0123456789abcdef0123456789abcdef01234567", "looks like an API key"),
    ("tracking", "notes: hf_ABCDEFghijklmnopqrstuv", "looks like an API key"),
]


@pytest.mark.parametrize(("section", "line", "fragment"), SETTINGS, ids=[f"{s}.{line}"[:60] for s, line, _ in SETTINGS])
def test_wrong_setting_is_named_with_its_place_and_remedy(write, section, line, fragment):
    text, place = grown(section, line)
    if fragment is None:
        load_recipe(write(text))
        return
    problem = only_problem(write(text))
    assert (problem.line, problem.column) == place
    assert problem.key == f"{section}.{line.split(':')[0]}"
    assert fragment in str(problem)


# text, line, column, key, what the message must hold
FILES = [
    ("", 1, 1, "", "holds nothing"),
    ("# only a comment\n", 1, 1, "", "holds nothing"),
    ("just text\n", 1, 1, "", "must be a mapping, not the text 'just text'"),
    ("- a\n", 1, 1, "", "must be a mapping, not a list"),
    (GOOD + "---\na: 1\n", 14, 1, "", "a recipe is one document"),
    (GOOD + "\tseed: 1\n", 14, 1, "", "a tab cannot indent (use spaces)"),
    (GOOD + "  notes: a: b\n", 14, 11, "", "a second `:` in one line"),
    (GOOD + "  optim: [a\n", 15, 1, "", "never closed"),
    (GOOD + "  optim: 'a\n", 15, 1, "", "never closed"),
    (GOOD + "evaluation: {questions: [Why?]}\n", 14, 29, "", "put questions in quotes"),
    (GOOD + " seed: 1\n", 14, 2, "", "is not YAML"),
    (GOOD + '  optim: "\\UFFFFFFFF"\n', 14, 13, "", "escape is no character"),
    (GOOD + "  optim: a\0b\n", 14, 11, "", "control character U+0000"),
    (GOOD.encode() + b"  optim: \xff\n", 14, 10, "", "is not UTF-8 text (save it as UTF-8)"),
    (GOOD.encode("utf-16"), 1, 1, "", "is not UTF-8"),
    (GOOD + "  optim: &a sgd\n", 14, 10, "", "anchors and aliases are not read"),
    (GOOD + "  optim: *a\n", 14, 10, "", "anchors and aliases are not read"),
    (GOOD + "  optim: !!str sgd\n", 14, 10, "", "tags are not read"),
    (GOOD + "  optim: !mine sgd\n", 14, 10, "", "tags are not read"),
    (GOOD + "  optim: " + "[" * 5000, 14, 28, "", ": is nested too deep"),
    (GOOD + "  seed: 1\n  seed: 2\n", 15, 3, "training.seed", "is repeated (first on line 14)"),
    (GOOD + "lora:\n  rank_pattern: {a: 1, a: 2}\n", 15, 24, "lora.rank_pattern.a", "is repeated"),
    (GOOD + "training:\n  seed: 1\n", 14, 1, "training", "is repeated (first on line 10)"),
    (GOOD + "  5: 1\n", 14, 3, "training", "a key must be text (put it in quotes)"),
    (GOOD + "  [a]: 1\n", 14, 3, "training", "a key must be text"),
    (GOOD + "peft: {r: 8}\n", 14, 1, "peft", "no such section (did you mean lora?)"),
    (GOOD + "sft: {}\n", 14, 1, "sft", "did you mean training?"),
    (GOOD + "dataset: {}\n", 14, 1, "dataset", "did you mean data?"),
    (GOOD + "wandb: {}\n", 14, 1, "wandb", "did you mean tracking?"),
    (GOOD + "trackin: {}\n", 14, 1, "trackin", "did you mean tracking?"),
    (GOOD + "learning_rate: 1\n", 14, 1, "learning_rate", "it stands in section training"),
    (GOOD + "training.chat_template_path: 5\n", 14, 1, "training.chat_template_path", "no such section"),
    (GOOD + "lora:\n", 14, 1, "lora", "is empty (leave it out, or write {}"),
    (GOOD + "lora: true\n", 14, 1, "lora", "must be a mapping, not true"),
    ("model: {pretrained_model_name_or_path: a}\ntraining: {}\n", 1, 1, "data", "is required (add a section data)"),
    (GOOD.replace("  prompt: question\n", ""), 6, 1, "data.prompt", "is required"),
    (
        GOOD.replace("  pretrained_model_name_or_path: org/model\n", ""),
        3,
        1,
        "model.pretrained_model_name_or_path",
        "is",
    ),
    (GOOD.replace("2e-4", '"2e-4"'), 11, 3, "training.learning_rate", "not the text '2e-4' (leave the quotes out)"),
    (GOOD.replace("2e-4", "2e4"), 11, 3, "training.learning_rate", "must be at most 1"),
    (GOOD.replace("2e-4", "0"), 11, 3, "training.learning_rate", "must be above 0"),
    (GOOD.replace("512", "0"), 13, 3, "training.max_length", "must be at least 1"),
    (GOOD.replace("512", "null\n  packing: true"), 14, 3, "training.packing", "give training.max_length a number"),
    (GOOD + "evaluation: {generate: {temprature: 1}}\n", 14, 25, "evaluation.generate.temprature", "temperature?"),
    (GOOD + "evaluation: {generate: {temperature: 1}}\n", 14, 25, "evaluation.generate.temperature", "do_sample: true"),
    (GOOD + "evaluation: {generate: {do_sample: 1}}\n", 14, 25, "evaluation.generate.do_sample", "true or false"),
    (GOOD + "evaluation: {generate: {max_length: 1}}\n", 14, 25, "evaluation.generate.max_length", "max_new_tokens"),
    (GOOD + "evaluation: {questions: [a, 1]}\n", 14, 29, "evaluation.questions[1]", "must be text, not 1"),
    (GOOD + "tracking:\n  tags:\n    - a\n    - 1.0\n", 17, 7, "tracking.tags[1]", "must be text, not 1.0"),
    (GOOD + "lora: {rank_pattern: {q: 0}}\n", 14, 23, "lora.rank_pattern.q", "must be at least 1"),
    (GOOD + "lora: {rank_pattern: {q: x}}\n", 14, 23, "lora.rank_pattern.q", "must be a whole number"),
    (
        GOOD + "lora: {target_modules: all-linear, layers_to_transform: 1}\n",
        14,
        36,
        "lora.layers_to_transform",
        "when target_modules is a str",
    ),
    (GOOD + "lora: {lora_bias: true, use_dora: true}\n", 14, 8, "lora.lora_bias", "DoRA"),
    (GOOD + "lora: {r: 3, init_lora_weights: orthogonal}\n", 14, 8, "lora.r", "must be even"),
    (GOOD + QLORA, 14, 1, "quantization", "cannot be trained themselves (add a section lora)"),
    (GOOD + "quantization: {}\nlora: {}\n", 14, 1, "quantization", "quantizes nothing"),
    (GOOD + "quantization: {load_in_4bit: true}\nlora: {}\n", 14, 16, "quantization.load_in_4bit", "nf4, or fp4"),
    (
        GOOD + QLORA.replace("}", ", load_in_8bit: true}") + "lora: {}\n",
        14,
        16,
        "quantization.load_in_4bit",
        "only one can be used at the same time",
    ),
    *[
        (GOOD + QLORA + f"lora: {{init_lora_weights: {start}}}\n", 15, 8, "lora.init_lora_weights", "4-bit weights")
        for start in ("pissa", "pissa_niter_4", "mica", "orthogonal", "loftq, loftq_config: {loftq_bits: 4}")
    ],
    (
        GOOD + "  eval_strategy: steps\n  load_best_model_at_end: true\n  save_strategy: epoch\n",
        15,
        3,
        "training.load_best_model_at_end",
        "Save strategy: SaveStrategy.EPOCH",
    ),
    (
        GOOD + "  eval_strategy: steps\n  load_best_model_at_end: true\n  eval_steps: 30\n  save_steps: 100\n",
        15,
        3,
        "training.load_best_model_at_end",
        "found 100, which is not a round multiple of 30",
    ),
    (
        GOOD + "  eval_strategy: steps\n  load_best_model_at_end: true\n  eval_steps: 0.1\n",
        15,
        3,
        "training.load_best_model_at_end",
        "mixing ratio and absolute steps",
    ),
    (
        GOOD + "  activation_checkpointing: true\n  activation_checkpointing_kwargs: {offload: true}\n",
        15,
        3,
        "training.activation_checkpointing_kwargs",
        "add use_reentrant: false",
    ),
    (
        GOOD
        + "  activation_checkpointing: true\n"
        + "  activation_checkpointing_kwargs: {use_reentrant: false, selective: true}\n"
        "lora: {}\n",
        15,
        3,
        "training.activation_checkpointing_kwargs",
        "selective checkpointing crashes",
    ),
    (
        GOOD.replace("answer\n", "answer\n  validation: 0\n") + "  eval_strategy: epoch\n",
        15,
        3,
        "training.eval_strategy",
        "data.validation is 0",
    ),
    (GOOD.replace("answer\n", "answer\n  validation: 0.5\n  test: 0.5\n"), 11, 3, "data.test", "below 1"),
    (GOOD.replace("answer\n", "answer\n  limit: {trian: 5}\n"), 10, 11, "data.limit.trian", "train, validation"),
    (GOOD.replace("answer\n", "answer\n  limit: {train: 0}\n"), 10, 11, "data.limit.train", "at least 1"),
    (GOOD.replace("answer\n", "answer\n  clean: [drop_unanswerd]\n"), 10, 11, "data.clean[0]", "drop_unanswered"),
    (
        GOOD.replace("answer\n", "answer\n  clean:\n    - drop_unanswered\n    - {drop_short: {mn: 1}}\n"),
        12,
        7,
        "data.clean[1]",
        "min_words",
    ),
    (GOOD.replace("answer\n", "answer\n  clean: [5]\n"), 10, 11, "data.clean[0]", "must be text or a mapping, not 5"),
]


@pytest.mark.parametrize(("text", "line", "column", "key", "fragment"), FILES, ids=[str(n) for n in range(len(FILES))])
def test_wrong_file_is_one_problem_at_its_place(write, text, line, column, key, fragment):
    problem = only_problem(write(text))
    assert (problem.line, problem.column, problem.key) == (line, column, key)
    assert fragment in str(problem)
    assert "\n" not in str(problem)


OVERRIDES = [
    ("training.lr=1e-4", "training.lr", "no such setting (did you mean learning_rate?)"),
    ("training.learning_rate='2e-4'", "training.learning_rate", "leave the quotes out"),
    ("learning_rate 3", "", "is not an override (write section.key=value)"),
    ("=3", "", "is not an override"),
    ("training.=3", "", "is not an override"),
    ("peft.r=3", "peft", "did you mean lora?"),
    ("training.learning_rate.x=3", "training.learning_rate.x", "training.learning_rate is not a mapping"),
    ("training.seed=[1", "training.seed", "never closed"),
    ("training.seed=[&a 1]", "training.seed", "anchors and aliases"),
    ("lora={r: 8, r: 9}", "lora.r", "is repeated"),
    ("training.adam_beta1=.inf", "training.adam_beta1", "must be a finite number"),
    ("training.seed=null", "training.seed", "is not in the recipe"),
    ("training.learning_rat=", "training.learning_rat", "is not in the recipe"),
    ("data=null", "data", "is required"),
    ("lora.target_modules=[q_proj, lm_head]", "lora.target_modules", "modules_to_save"),
]


@pytest.mark.parametrize(("override", "key", "fragment"), OVERRIDES, ids=[o for o, _, _ in OVERRIDES])
def test_wrong_override_is_named_by_its_text(write, override, key, fragment):
    problem = only_problem(write(GOOD), [override])
    assert problem.key == key
    assert fragment in str(problem)
    if override != "data=null":  # what is missing afterwards is missing from the file
        assert str(problem).startswith(f"{override}: {key}" if key else f"{override}: ")


def test_all_mistakes_are_reported_at_once_in_order(write):
    text = GOOD.replace("revision:", "revison:").replace("prompt:", "promt:").replace("2e-4", "fast")
    text += "  max_seq_length: 4\npeft: {}\ntracking: {dir: x}\nevaluation: {max_new_tokens: many}\n"
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(text), ["training.bf16=true", "what"])
    assert [(problem.line, problem.key) for problem in caught.value.problems] == [
        (5, "model.revison"),
        (6, "data.prompt"),
        (8, "data.promt"),
        (11, "training.learning_rate"),
        (14, "training.max_seq_length"),
        (15, "peft"),
        (16, "tracking.dir"),
        (17, "evaluation.max_new_tokens"),
        (0, "training.bf16"),
        (0, ""),
    ]
    assert str(caught.value).count("\n") == 9


def test_good_recipe_says_exactly_what_was_written(write):
    recipe = load_recipe(write(GOOD))
    assert recipe.name == "mine"
    assert recipe.training == {"num_train_epochs": 3.0, "learning_rate": 2e-4, "max_length": 512}
    assert recipe.model["pretrained_model_name_or_path"] == "org/model"
    assert (recipe.data.split, recipe.data.validation, recipe.data.clean) == ("train", 0.05, [])
    assert (recipe.lora, recipe.quantization, recipe.tracking) == (None, None, None)
    assert recipe.evaluation.max_new_tokens == 256
    assert list(recipe.as_dict()) == ["model", "data", "training"]
    assert recipe.as_dict()["data"] == {"path": "rows.jsonl", "prompt": "question", "completion": "answer"}
    assert recipe.places["training.learning_rate"][1:] == (11, 3)


GOOD_ADDITIONS = [
    QLORA + "lora: {target_modules: all-linear, use_dora: true}\n",
    QLORA + "lora: {init_lora_weights: olora}\n",
    "quantization: {load_in_8bit: true}\nlora: {}\n",
    "lora: {init_lora_weights: pissa_niter_16, target_modules: [q_proj], layers_to_transform: [0], use_dora: true}\n",
    "lora: {modules_to_save: [lm_head], rank_pattern: {q.proj: 4}, layer_replication: [[0, 4], [2, 5]]}\n",
    "  packing: true\n  packing_strategy: bfd_split\n  max_steps: 20\n  warmup_steps: 0.03\n",
    "  eval_strategy: steps\n  eval_steps: 0.1\n  save_steps: 0.3\n  load_best_model_at_end: true\n",
    "  eval_strategy: epoch\n  save_strategy: best\n  load_best_model_at_end: true\n",
    "  eval_strategy: no\n  completion_only_loss: true\n  neftune_noise_alpha: 5\n  chat_template_path: t.jinja\n",
    "  activation_checkpointing: true\n  activation_checkpointing_kwargs: {use_reentrant: false}\n  optim: sgd\n",
    "  include_num_input_tokens_seen: non_padding\n  ddp_find_unused_parameters: false\n  pad_to_multiple_of: 8\n",
    "evaluation: {questions: ['Why?'], generate: {do_sample: true, temperature: 0.5, num_beams: 2}}\n",
    "tracking: {project: p, tags: [a, b], mode: offline, notes: 'yes'}\n",
    "tracking: {}\n",
]


@pytest.mark.parametrize("addition", GOOD_ADDITIONS)
def test_good_recipe_passes(write, addition):
    load_recipe(write(GOOD + addition))


@pytest.mark.parametrize(
    "line",
    [
        "attn_implementation: flash_attention_3",
        "attn_implementation: kernels-community/flash-attn2@v1.0:fn",
        "dtype: auto",
        "use_kernels: true",
    ],
)
def test_good_model_setting_passes(write, line):
    load_recipe(write(grown("model", line)[0]))


@pytest.mark.parametrize(
    "line", ["limit: 100", "limit: {train: 100, validation: 5}", "system: null", "clean: [drop_unanswered]", "test: 0"]
)
def test_good_data_setting_passes(write, line):
    load_recipe(write(grown("data", line)[0]))


def test_sections_are_accepted_by_the_constructors_they_go_to(write, tmp_path):
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig

    recipe = load_recipe(
        write(GOOD + QLORA + "lora: {r: 4, target_modules: all-linear}\n"), ["training.eval_strategy=no"]
    )
    SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **recipe.training)
    LoraConfig(task_type="CAUSAL_LM", **recipe.lora)
    assert BitsAndBytesConfig(**recipe.quantization).bnb_4bit_quant_type == "nf4"


def test_every_refused_or_suggested_name_is_meant_for_a_place_that_exists():
    models = section_models()
    for target in (*RENAMED.values(), *ALIASES.values()):
        section, _, name = target.partition(",")[0].partition(":")[0].partition(".")
        assert name in models[section].model_fields, target
    assert set(SECTION_ALIASES.values()) <= set(SECTIONS)
    for key, _, _ in REFUSED_VALUES:
        section, name = key.split(".")
        assert name in models[section].model_fields, key


def test_hand_written_types_are_for_settings_that_upstream_has():
    models = section_models()
    for section, known in (("training", TRAINING_TYPES), ("lora", LORA_TYPES)):
        assert set(known) <= set(models[section].model_fields)
    assert set(QUANTIZATION_TYPES) == set(models["quantization"].model_fields)
    assert set(GENERATION_TYPES) <= set(models["evaluation.generate"].model_fields)


def test_null_differs_from_absent_only_where_an_override_keeps_it():
    nullable = {
        f"{section}.{name}"
        for section, model in section_models().items()
        for name, field in model.model_fields.items()
        if type(None) in typing.get_args(field.annotation) and field.default is not None and not field.is_required()
    }
    assert nullable == NULL_IS_A_VALUE


@pytest.mark.parametrize(
    ("override", "section", "expected"),
    [
        (
            "training.learning_rate=1e-4",
            "training",
            {"num_train_epochs": 3.0, "learning_rate": 1e-4, "max_length": 512},
        ),
        ("training.max_length=null", "training", {"num_train_epochs": 3.0, "learning_rate": 2e-4, "max_length": None}),
        ("training.max_length=", "training", {"num_train_epochs": 3.0, "learning_rate": 2e-4}),
        ("training={learning_rate: 1}", "training", {"learning_rate": 1.0}),
        ("lora.r=4", "lora", {"r": 4}),
        ("lora={}", "lora", {}),
        ("lora.rank_pattern.q_proj=4", "lora", {"rank_pattern": {"q_proj": 4}}),
        ("lora.target_modules=[q_proj, v_proj]", "lora", {"target_modules": ["q_proj", "v_proj"]}),
        ("lora=null", "lora", None),
        ("quantization=", "quantization", None),
        ("tracking.notes=Careful: a=b #1", "tracking", {"notes": "Careful: a=b #1"}),
        ('tracking.notes="no"', "tracking", {"notes": "no"}),
    ],
)
def test_override(write, override, section, expected):
    assert load_recipe(write(GOOD), [override]).as_dict().get(section) == expected


def test_overrides_apply_in_order_and_repair_the_file(write):
    path = write(GOOD.replace("2e-4", "fast") + QLORA)
    recipe = load_recipe(path, ["training.learning_rate=1e-3", "training.learning_rate=1e-4", "quantization=null"])
    assert recipe.training["learning_rate"] == 1e-4
    assert recipe.quantization is None
    assert str(recipe.error("training.learning_rate", "is odd", "try 3")) == (
        "training.learning_rate=1e-4: training.learning_rate: is odd (try 3)"
    )
    assert str(recipe.error("data.path", "is odd")) == f"{path}:7:3: data.path: is odd"
    assert str(recipe.error("data.limit", "is odd")) == f"{path}:6:1: data.limit: is odd"


def test_a_secret_is_never_repeated(write):
    key = "0123456789abcdef0123456789abcdef01234567"
    assert key not in str(only_problem(write(GOOD), [f"tracking.entity={key}"]))
    assert key not in str(only_problem(write(grown("training", f"weight_decay: '{key}'")[0])))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4), ("1e-4", 1e-4), ("1.", 1.0), (".5", 0.5), ("+1.5E3", 1500.0), ("12", 12), ("-3", -3),
        ("010", 10), ("0o17", 15), ("0x1F", 31), ("1_000", "1_000"), ("60:30", "60:30"), ("2001-01-01", "2001-01-01"),
        ("no", "no"), ("yes", "yes"), ("on", "on"), ("off", "off"), ("y", "y"), ("true", True), ("False", False),
        ("TRUE", True), ("tRue", "tRue"), ("null", None), ("~", None), ("e4", "e4"), ("1e", "1e"), ("=", "="),
    ],
)  # fmt: skip
def test_scalars_are_yaml_1_2(write, text, value):
    key = "lr_scheduler_kwargs"
    recipe = load_recipe(write(GOOD + f"  {key}: {{a: {text}}}\n"))
    found = recipe.training[key]["a"]
    assert (type(found), found) == (type(value), value)


def test_names_and_paths(tmp_path, monkeypatch):
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "quickstart.yaml").write_text(GOOD)
    (folder / "other.yml").write_text("lora: {}\n# too late\n")
    assert load_recipe("quickstart", root=tmp_path).path == folder / "quickstart.yaml"
    monkeypatch.chdir(tmp_path)
    assert load_recipe("quickstart").path == Path("recipes/quickstart.yaml")
    assert list_recipes(tmp_path) == [("other", ""), ("quickstart", "A small recipe for the tests.")]
    assert list_recipes(tmp_path / "recipes") == []
    for name in ("quikstart", "quickstart.yaml", "quick\0start", "recipes"):
        with pytest.raises(RecipeError, match=r"not found .*there are: .*other, quickstart"):
            load_recipe(name)
    with pytest.raises(RecipeError, match=r"did you mean quickstart\?"):
        load_recipe("quikstart")
    (folder / "big.yaml").write_text("#" * 1_000_001)
    with pytest.raises(RecipeError, match="larger than"):
        load_recipe("big")


def test_as_dict_does_not_depend_on_the_order_of_writing(write):
    swapped = GOOD.replace(
        "  learning_rate: 2e-4\n  num_train_epochs: 3\n", "  num_train_epochs: 3.0\n  learning_rate: 0.0002\n"
    )
    first = load_recipe(write(GOOD)).as_dict()
    second = load_recipe(write(swapped)).as_dict()
    assert json.dumps(first) == json.dumps(second)
    first["training"]["seed"] = 1
    assert "seed" not in second["training"]


def test_resolved_recipe_loads_again(write):
    recipe = load_recipe(write(GOOD + QLORA + "lora: {r: 4}\nevaluation: {questions: ['Why?']}\n"))
    again = load_recipe(write(yaml.safe_dump(recipe.as_dict(), sort_keys=False)))
    assert again.as_dict() == recipe.as_dict()


def test_diff(write):
    a = load_recipe(write(GOOD + "lora: {r: 4, rank_pattern: {q: 1}}\n"))
    b = load_recipe(write(GOOD.replace("2e-4", "1e-4") + "tracking: {}\n"))
    assert find_differences(a.as_dict(), b.as_dict()) == [
        ("lora.r", 4, ABSENT),
        ("lora.rank_pattern.q", 1, ABSENT),
        ("training.learning_rate", 2e-4, 1e-4),
        ("tracking", ABSENT, {}),
    ]
    assert find_differences(a.as_dict(), a.as_dict()) == []
    assert str(ABSENT) == "absent"


def test_error_without_a_place():
    assert str(RecipeError.of("data.path", "no such file", "check it")) == "data.path: no such file (check it)"
    assert str(RecipeError.of("a\x1b[31m", "is odd\nvery")) == "a\\x1b[31m: is odd\\nvery"


def unordered(value):
    """Lists as sorted: typing caches equal unions and literals, so what was imported first decides their order."""
    if isinstance(value, dict):
        return {key: unordered(item) for key, item in value.items()}
    return sorted(map(unordered, value), key=json.dumps) if isinstance(value, list) else value


def test_json_schema_is_current():
    path = ROOT / "recipes" / "recipe.schema.json"
    assert unordered(json.loads(path.read_text(encoding="utf-8"))) == unordered(json_schema()), "stale: run make schema"


def test_json_schema_is_closed_and_can_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    cli.schema()
    written = json.loads((tmp_path / "recipes" / "recipe.schema.json").read_text())
    assert written["required"] == ["model", "data", "training"]
    assert list(written["properties"]) and set(written["properties"]) == set(SECTIONS)
    assert all(part["additionalProperties"] is False for part in [written, *written["$defs"].values()])
    training = written["$defs"]["TrainingSection"]["properties"]
    assert "output_dir" not in training
    assert "cosine" in training["lr_scheduler_type"]["enum"]


def test_what_needs_no_library_imports_none(tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "broken.yaml").write_text("a: [1\n")
    program = """
import sys
from medibot.errors import RecipeError
from medibot.recipe import list_recipes, load_recipe
assert list_recipes() == [("broken", "")]
for name in ("broken", "brokn"):
    try:
        load_recipe(name)
    except RecipeError as error:
        print(error)
print(sorted({"torch", "trl", "transformers", "peft", "wandb", "datasets", "numpy"} & set(sys.modules)))
"""
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    lines = run.stdout.splitlines()
    assert lines[0].startswith("recipes/broken.yaml:2:1: a bracket"), run.stderr
    assert lines[-1] == "[]"


PIECES = st.sampled_from(
    [*GOOD.splitlines(keepends=True), "lora:", "{", "}", "[", "]", ": ", "- ", "  ", "\n", "null", "&a ", "*a", "!!x ",
     "'", '"', "|\n", "? ", "<<: ", "1e-4", ".nan", "\t", "\0", "#", "%YAML 1.1\n", "---\n", "...\n", "\\x", "é",
     "\u2028",     "  r: 8\n", "quantization: {load_in_4bit: true}\n", "  clean: [{a: {b: 1}}]\n",
     "evaluation:\n  generate: {a: 1}\n"]
)  # fmt: skip
MUTATED = st.tuples(st.integers(0, len(GOOD)), st.integers(0, 30), st.lists(PIECES, max_size=4)).map(
    lambda cut: GOOD[: cut[0]] + "".join(cut[2]) + GOOD[cut[0] + cut[1] :]
)
FUZZ = settings(
    max_examples=250, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(st.one_of(MUTATED, st.lists(PIECES, max_size=25).map("".join), st.text(max_size=80), st.binary(max_size=60)))
def test_any_text_is_a_recipe_or_a_recipe_error(write, text):
    path = write(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    try:
        json.dumps(load_recipe(path).as_dict(), allow_nan=False)
    except RecipeError as error:
        assert str(error).splitlines()
        assert all(str(problem).startswith(path) for problem in error.problems)


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


@FUZZ
@given(st.data())
def test_any_value_of_a_known_setting_is_accepted_or_a_recipe_error(write, data):
    models = section_models()
    section = data.draw(st.sampled_from(SECTIONS))
    key = data.draw(st.sampled_from(sorted(models[section].model_fields)))
    override = f"{section}.{key}={json.dumps(data.draw(VALUE))}"
    try:
        json.dumps(load_recipe(write(GOOD), [override]).as_dict(), allow_nan=False)
    except RecipeError as error:
        assert error.problems


@FUZZ
@given(st.text(max_size=40))
def test_any_override_is_applied_or_a_recipe_error(write, override):
    try:
        load_recipe(write(GOOD), [override])
    except RecipeError as error:
        assert error.problems


@pytest.mark.parametrize("written", ["{}", '"{}"', "'{}'", "[a, {}]"])
def test_an_api_key_in_an_override_is_not_shown(written):
    key = "hf_ABCDEFghijklmnopqrstuv"
    with pytest.raises(RecipeError, match=r"tracking\.\w+=…: .*looks like an API key") as caught:
        load_recipe(
            "quickstart", [f"tracking.{'tags' if '[' in written else 'notes'}={written.format(key)}"], root=ROOT
        )
    assert key not in str(caught.value)
