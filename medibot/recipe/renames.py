"""Names that do not stand in a recipe, by where an author may know them from."""

from typing import Any


def each(names: str, value: Any) -> dict[str, Any]:
    """Return the same value under several names."""
    return dict.fromkeys(names.split(), value)


HARDWARE = "hardware stands in accelerate_configs/"
THE_RUN = "the run decides it"
DATA_FIRST = "it needs a pass over the data first, which nobody makes"
# (section, why): names
REFUSED_NAMES = {
    ("model", HARDWARE): "device_map max_memory offload_folder tp_plan",
    ("model", "no secrets in recipes: `hf auth login`, or HF_TOKEN"): "token use_auth_token",
    ("model", "it has a section of its own: quantization"): "quantization_config",
    ("model", "always on: pickled weights can run code"): "use_safetensors",
    ("lora", "always LoRA for CAUSAL_LM"): "task_type peft_type auto_mapping",
    ("lora", "section model says it"): "base_model_name_or_path revision",
    ("lora", THE_RUN): "inference_mode peft_version runtime_config",
    ("lora", "MediBot trains one plain adapter"): "megatron_config megatron_core arrow_config use_bdlora",
    ("lora", DATA_FIRST): "eva_config corda_config lora_ga_config",
    ("lora", "it crashes upstream on models with tied embeddings"): "trainable_token_indices",
    ("training", f"{THE_RUN}: outputs/<run>/, RUN=name"): "output_dir run_name logging_dir",
    ("training", "section tracking"): "report_to project trackio_space_id trackio_bucket_id trackio_static_space_id",
    ("training", "the machine decides it; the weights' own type is model.dtype"): (
        "use_cpu no_cuda bf16 fp16 bf16_full_eval fp16_full_eval tf32"
    ),
    ("training", HARDWARE): "deepspeed fsdp fsdp_config accelerator_config parallelism_config ddp_backend local_rank",
    ("training", "nothing leaves this machine while it trains"): (
        "push_to_hub push_to_hub_token hub_token hub_private_repo hub_model_id hub_strategy hub_always_push"
        " hub_revision"
    ),
    ("training", "the same command resumes an unfinished run"): "resume_from_checkpoint",
    ("training", "MediBot saves a whole checkpoint on a signal itself"): "enable_jit_checkpoint",
    ("training", "the command decides it"): "do_train do_eval do_predict",
    ("training", "it has a section of its own: model"): "model_init_kwargs trust_remote_code",
    ("training", "skip_prepare_dataset would switch off the check of the loss mask"): "dataset_kwargs",
    ("training", "rows are conversations: data.prompt and data.completion"): "dataset_text_field",
    ("training", "the tokenizer's own tokens are used"): "eos_token pad_token",
    ("training", "deprecated upstream: write model.use_kernels: true"): "use_liger_kernel liger_kernel_config",
    ("tracking", THE_RUN): (
        "dir id resume resume_from fork_from config config_include_keys config_exclude_keys reinit save_code force"
        " settings allow_val_change monitor_gym sync_tensorboard tensorboard anonymous"
    ),
    ("evaluation.generate", "write evaluation.max_new_tokens"): "max_new_tokens max_length",
    ("evaluation.generate", "the tokenizer decides it"): "eos_token_id pad_token_id bos_token_id",
    ("evaluation.generate", "one plain answer is compared for each question"): (
        "num_return_sequences return_dict_in_generate output_scores output_logits output_attentions"
        " output_hidden_states"
    ),
}
REFUSED = {f"{section}.{name}": reason for (section, reason), names in REFUSED_NAMES.items() for name in names.split()}
# What upstream accepts and what would spoil the run
REFUSED_VALUES = (
    ("training.completion_only_loss", False, "the loss covers exactly the answer: leave it out"),
    ("training.assistant_only_loss", True, "the loss covers exactly the answer already: leave it out"),
    ("training.logging_nan_inf_filter", True, "it hides NaN losses: write false"),
    ("training.truncation_mode", "keep_end", "it cuts the question away, and trl removes it: write keep_start"),
    *(("lora.init_lora_weights", method, DATA_FIRST) for method in ("eva", "corda", "lora_ga")),
)
# What upstream called a setting before
RENAMED = {
    "max_seq_length": "training.max_length",
    "warmup_ratio": "training.warmup_steps, where a number below 1 is a ratio",
    "evaluation_strategy": "training.eval_strategy",
    "group_by_length": "training.train_sampling_strategy: group_by_length",
    "gradient_checkpointing": "training.activation_checkpointing",
    "gradient_checkpointing_kwargs": "training.activation_checkpointing_kwargs",
    "per_gpu_train_batch_size": "training.per_device_train_batch_size",
    "per_gpu_eval_batch_size": "training.per_device_eval_batch_size",
    "torch_dtype": "model.dtype",
    "use_flash_attention_2": "model.attn_implementation: flash_attention_2",
}
# What axolotl, LLaMA-Factory, unsloth and habit call these
ALIASES = {
    **each("lr learningrate", "training.learning_rate"),
    **each("sequence_len seq_length seq_len cutoff_len max_tokens model_max_length", "training.max_length"),
    **each("micro_batch_size batch_size train_batch_size", "training.per_device_train_batch_size"),
    **each("eval_batch_size", "training.per_device_eval_batch_size"),
    **each("num_epochs epochs n_epochs max_epochs", "training.num_train_epochs"),
    **each("optimizer", "training.optim"),
    **each("lr_scheduler scheduler", "training.lr_scheduler_type"),
    **each("sample_packing neat_packing", "training.packing"),
    **each("eval_every", "training.eval_steps"),
    **each("gradient_clipping grad_clip", "training.max_grad_norm"),
    **each("use_gradient_checkpointing", "training.activation_checkpointing"),
    **each("lora_r lora_rank rank", "lora.r"),
    **each("alpha", "lora.lora_alpha"),
    **each("dropout", "lora.lora_dropout"),
    **each("lora_target lora_target_modules lora_target_linear", "lora.target_modules"),
    **each("base_model model_name_or_path model_name model_id", "model.pretrained_model_name_or_path"),
    **each("flash_attention flash_attn attn_impl", "model.attn_implementation"),
    **each("model_revision", "model.revision"),
    **each("quant_type", "quantization.bnb_4bit_quant_type"),
    **each("compute_dtype", "quantization.bnb_4bit_compute_dtype"),
    **each("double_quant use_nested_quant double_quantization", "quantization.bnb_4bit_use_double_quant"),
    **each("dataset_name dataset_path dataset datasets", "data.path"),
    **each("question instruction field_instruction", "data.prompt"),
    **each("answer response field_output", "data.completion"),
    **each("system_prompt default_system", "data.system"),
    **each("val_set_size val_size validation_split test_split_size", "data.validation"),
    **each("max_samples max_train_samples num_of_sequences", "data.limit"),
    **each("wandb_project", "tracking.project"),
    **each("wandb_entity", "tracking.entity"),
    **each("wandb_name", "tracking.name"),
}
SECTION_ALIASES = {
    **each("peft adapter lora_config peft_config", "lora"),
    **each("sft trainer train training_args training_arguments sft_config", "training"),
    **each("dataset datasets", "data"),
    **each("wandb logging tracker", "tracking"),
    **each("bnb bitsandbytes bnb_config qlora quantization_config", "quantization"),
    **each("eval generation evaluate", "evaluation"),
}
