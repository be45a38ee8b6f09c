"""Choose the dtype that the machine computes in, and build the configs of quantization and LoRA."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import BitsAndBytesConfig

from medibot.recipe import Recipe

if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass(frozen=True)
class Precision:
    """The dtype that the machine computes in, and why."""

    dtype: torch.dtype
    reason: str

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def training(self) -> dict[str, bool]:
        """Return SFTConfig's switches that say the same."""
        half = {"bf16": self.dtype == torch.bfloat16, "fp16": self.dtype == torch.float16}
        return {"use_cpu": not torch.cuda.is_available(), **half}


def choose_precision(written: str | None = None) -> Precision:
    """Return bfloat16 where the device computes in it natively, float16 on older GPUs, else float32; `written` wins."""
    if written and written != "auto":
        return Precision(getattr(torch, written), "the recipe's model.dtype")
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision(torch.bfloat16, f"native on {gpu}")
        return Precision(torch.float16, f"{gpu} has no native bfloat16")
    if torch.backends.mps.is_available():
        return Precision(torch.float32, "on the CPU: Apple's GPU (MPS) is not used")
    if torch.cpu._is_amx_tile_supported():
        return Precision(torch.bfloat16, "native on this CPU (AMX)")
    # AVX512-BF16 alone is no matrix unit: torch's bfloat16 products ran 8 times slower than float32 there
    return Precision(torch.float32, "this CPU has no native bfloat16 matrix unit")


def make_quantization_config(recipe: Recipe, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return bitsandbytes' config, which computes in the machine's dtype unless the recipe writes another."""
    if recipe.quantization is None:
        return None
    compute = {"bnb_4bit_compute_dtype": dtype} if recipe.quantization.get("load_in_4bit") else {}
    return BitsAndBytesConfig(**(compute | recipe.quantization))


def make_lora_config(recipe: Recipe) -> "LoraConfig | None":
    """Return peft's config; None for full fine-tuning."""
    # Late, as wherever preparing rows passes by: it takes seconds, and bitsandbytes comes with it
    from peft import LoraConfig

    return None if recipe.lora is None else LoraConfig(task_type="CAUSAL_LM", **recipe.lora)
