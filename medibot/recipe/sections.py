"""The sections of a recipe that are MediBot's own words, or a choice of upstream's."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from medibot.cleaning import rule_problem

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=0.5)]
# A number of steps, or below 1 a share of the run
Steps = Annotated[int | float, Field(gt=0)]


def known_rule(rule: Any) -> Any:
    """Check that a cleaning rule exists and has the settings that it is given."""
    if problem := rule_problem(rule):
        raise ValueError(problem)
    return rule


# What text must look like, and how an error says it
PATTERNS = {
    r"^[\w.-]+/[\w.-]+(@[\w.-]+)?(:[\w.-]+)?$": "a hub kernel (org/repo[@revision][:function])",
    r"^pissa_niter_\d+$": "pissa_niter_<steps>",
    r"^[a-z]{2,3}$": "a language as ISO 639 writes it, such as en",
    r"^[a-z0-9][a-z0-9.+-]*$": "a licence as the hub writes it, such as cc-by-4.0",
}
HUB_KERNEL, PISSA_STEPS, LANGUAGE, LICENCE = PATTERNS


class Section(BaseModel):
    """Nothing is converted and nothing unknown passes: what the recipe says is what the constructor gets."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModelSection(Section):
    """Keyword arguments of AutoModelForCausalLM.from_pretrained."""

    pretrained_model_name_or_path: Text
    """Hub id or local folder of the base model."""
    revision: Text | None = None
    """Commit, tag or branch on the hub; a commit makes the run repeatable."""
    subfolder: Text | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Absent: the machine decides, and the resolved recipe says what it chose."""
    attn_implementation: (
        Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention"]
        | Annotated[str, Field(pattern=HUB_KERNEL)]
        | None
    ) = None
    trust_remote_code: bool = False
    use_kernels: bool = False
    local_files_only: bool = False
    cache_dir: Text | None = None
    variant: Text | None = None


class SystemColumn(Section):
    """A system message of each row's own."""

    column: Text


class SourceSection(Section):
    """Where rows come from, and which of their columns make a conversation."""

    path: Text | None = None
    """Hub id, or local or remote files: a path, a folder, a pattern with *, or a URL such as s3://…"""
    name: Text | None = None
    """Configuration of the hub data set; of a local source, how ledger and results call it."""
    revision: Text | None = None
    """Commit, tag or branch of the hub data set."""
    split: Text = "train"
    """The split of a hub data set to read."""
    prompt: Text | None = None
    """Column that holds the question, or a template over columns: "{instruction}\n\n{input}"."""
    completion: Text | None = None
    """Column or template of the answer: the loss covers it and nothing else."""
    messages: Text | None = None
    """Column that holds whole conversations, as OpenAI (role, content) or ShareGPT (from, value) write them."""
    thinking: Text | None = None
    """Column that holds what the model shall think before the answer."""
    system: Text | SystemColumn | None = None
    """System message put before every conversation that has none, or {column: name} for one a row; null for none."""
    turns: Literal["all", "last"] = "all"
    """Which assistant turns of a conversation are learned from."""
    malformed: Literal["error", "drop", "merge"] = "error"
    """What happens to a conversation without regular turns; merge joins two turns of one role and drops the rest."""
    clean: list[Annotated[str | dict[str, Any], AfterValidator(known_rule)]] = []
    """Cleaning rules in order: a rule's name, the name with its arguments, or file:function of your own."""


class MixedSection(SourceSection):
    """One of several sources; what it leaves out of system, turns and malformed is as section data says."""

    path: Text
    weight: Positive | None = None
    """This source's part of the training rows, relative to the others' weights; absent: all its rows."""


class DataSection(SourceSection):
    """Where the rows come from and how they become conversations."""

    sources: list[MixedSection] = []
    """Several sources in the place of path and columns; clean then runs over the rows of all of them."""
    chat_template_kwargs: dict[str, Any] = {}
    """Arguments for the model's chat template, such as enable_thinking: false for a reasoning model."""
    group_by: list[Text] = []
    """Columns whose equal values must never fall into different splits."""
    validation: Share | SourceSection = 0.05
    """Share of the groups kept for choosing checkpoints, or where its rows come from: {path: …} or {split: …}."""
    test: Share | SourceSection = 0.05
    """Share of the groups that only `evaluate` opens, or where its rows come from."""
    limit: Count | dict[Literal["train", "validation"], Count] | None = None
    """Use at most so many rows, of the training split or of each one named."""
    too_long: Literal["error", "drop"] = "error"
    """What happens to a conversation longer than training.max_length."""
    seed: Natural = 0
    """Decides the order of the rows and which groups are held out."""
    license: Annotated[str, Field(pattern=LICENCE)] | None = None
    """The data's licence, as the hub writes it (cc-by-4.0); without one, nothing made of the data is pushed."""
    language: Annotated[str, Field(pattern=LANGUAGE)] | None = None
    """Language of questions and answers, for the model card."""
    attribution: Text | None = None
    """Who made the data and where it is from, in the words that its licence asks for."""

    @property
    def paths(self) -> list[str]:
        """Return where all rows come from."""
        held_out = [held.path for held in (self.validation, self.test) if isinstance(held, SourceSection)]
        paths = [self.path, *(source.path for source in self.sources), *held_out]
        return list(dict.fromkeys(path for path in paths if path))

    @property
    def described(self) -> str:
        """Return the path of the rows that are learned from, or those of all sources."""
        return self.path or " + ".join(source.path for source in self.sources)

    @property
    def common_system(self) -> str | None:
        """Return the system message that every conversation has unless it brings its own: what answers are asked with."""
        return self.system if isinstance(self.system, str) else None


class EvaluationSection(Section):
    """What is asked during and after training."""

    questions: list[Text] = []
    """Fixed questions, answered at every evaluation."""
    generate: dict[str, Any] = {}
    """Settings of transformers.GenerationConfig; greedy unless do_sample is true."""
    max_new_tokens: Count = 256
    """The longest answer, in tokens."""
    by: list[Text] = []
    """Columns of the data whose values get figures of their own in an evaluation."""
    evidence: dict[Literal["topic", "source", "document", "url"], Text] = {}
    """Columns of the data that say what a training question is about and where it comes from, shown under answers."""
    caveat: Text | None = None
    """What people who read answers are told about the data, after the notice that this is no medical device."""
    emergency_notice: bool = True
    """Whether a question that describes an emergency is answered with where to call first."""


class TrackingSection(Section):
    """Keyword arguments of wandb.init that an author may choose."""

    project: Text | None = None
    entity: Text | None = None
    group: Text | None = None
    job_type: Text | None = None
    name: Text | None = None
    notes: Text | None = None
    tags: list[Text] | None = None
    mode: Literal["online", "offline", "disabled", "shared"] | None = None
