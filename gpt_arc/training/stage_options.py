"""The settings of each training stage. Nothing here imports torch."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge
from pydantic.dataclasses import dataclass

from gpt_arc.extras import names_function
from gpt_arc.nn.names import ContrastiveLoss, TaskKind
from gpt_arc.settings import (
    STRICT,
    Count,
    Natural,
    NonNegative,
    Positional,
    Positive,
    PositiveShare,
    Seed,
    Share,
    UnitInterval,
)
from gpt_arc.training.config import TrainingConfig, check_batch
from gpt_arc.training.options import ChatOptions, DividedOptions, ExampleOptions
from gpt_arc.training.schedule import PublishedRate, warmup_linear

LEAST_TOKENS = 8  # that a sequence may be cut to: three special ones, and something of each text


@dataclass(frozen=True, config=STRICT)
class SFTOptions(ChatOptions):
    template: str = "markers"
    """Markers around turns: markers (<|user|>...<|assistant|>...<|end|>), chatml, plain, or a .toml file with a text
    for each role. A model that has a template keeps it."""
    epochs: Count = 16
    """Passes over the conversations (InstructGPT's 16)."""
    packing: bool = True
    """Pack several conversations into a row, isolated from each other: less padding, equal losses."""
    residual_dropout: Share | None = 0.2
    """Dropout on each sublayer's output (InstructGPT's .2). None: the model's."""
    learning_rate: Positive | None = None
    """Peak learning rate. None: InstructGPT's 1e-5 for 1.2B parameters without embeddings; for fewer, times sqrt(1.2B /
    parameters), up to 0.01."""
    image_encoder: str | None = None
    """Encoder to add to a text model so that it reads images: a run of stages/pretrain_encoder.py, a ViT, CLIP or
    SigLIP saved by transformers, or a .toml file with the settings of a new one."""
    projector_layers: Literal[1, 2] = 2
    """Layers of a new projector: 1 is a linear map, 2 have a GELU between them (LLaVA-1.5)."""
    pixel_shuffle: Count = 1
    """A new projector makes one embedding of squares of this many patches a side."""
    prefix_attention: bool = False
    """In a model with a new image_encoder, the tokens of an image see each other both ways (PaliGemma)."""
    text_rate: NonNegative = 1.0
    """Learning rate of the text model of a model that reads images, as a multiple of learning_rate. 0: not trained."""
    encoder_rate: NonNegative = 1.0
    """The same of the image encoder."""
    projector_rate: NonNegative = 1.0
    """The same of the projector."""

    PATHS = (*ChatOptions.PATHS, "image_encoder")
    PUBLISHED = PublishedRate(1e-5, 1.2e9)  # arXiv:2203.02155

    @property
    def rates(self) -> dict[str, float]:
        return {"text": self.text_rate, "encoder": self.encoder_rate, "projector": self.projector_rate}


@dataclass(frozen=True, config=STRICT)
class RewardOptions(ChatOptions):
    demonstrations: Path | None = None
    """Conversations whose last responses should score 0 on average; sets the head's bias. None: the bias stays 0."""
    epochs: Count = 1
    """Passes over the rankings; a second one overfits quickly (InstructGPT's 1)."""
    residual_dropout: Share | None = None
    """Dropout on each sublayer's output. None: the model's."""
    gradient_accumulation_steps: Count = 8
    learning_rate: Positive | None = None
    """Peak learning rate. None: InstructGPT's 9e-6 for 6.4B parameters without embeddings; for fewer, times sqrt(6.4B /
    parameters), up to 0.01."""

    PUBLISHED = PublishedRate(9e-6, 6.4e9)  # arXiv:2203.02155


@dataclass(frozen=True, config=STRICT)
class DPOOptions(ChatOptions):
    beta: Positive = 0.1
    """The reward is beta times the log-ratio to the reference; a larger beta keeps the model closer to it."""
    gradient_accumulation_steps: Count = 8
    learning_rate: Positive | None = None
    """Peak learning rate. None: the paper's 1e-6 for 2.5B parameters without embeddings; for fewer, times sqrt(2.5B /
    parameters), up to 0.01."""
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    min_lr: NonNegative | None = 0.0
    warmup: Share = 0.1

    PUBLISHED = PublishedRate(1e-6, 2.5e9)  # arXiv:2305.18290


@dataclass(frozen=True, config=STRICT)
class PPOOptions(DividedOptions):
    prompts: Path | None = None
    """Prompts (.jsonl, .json, .csv, .tsv, .parquet): rows as for stages/sft.py, whose last response isn't read."""
    columns: tuple[str, ...] = ()
    """Columns of prompts that have other names than ours: prompt=question."""
    reward: str | None = None
    """A reward model's directory, or a Python function of rows and responses, as module:function."""
    monitor: str | None = None
    """Another reward, logged but not learned from. torchrun has a --monitor too: write -- before the script's name."""
    episodes: Count = 256_000
    """Total number of responses (InstructGPT's 256,000)."""
    gradient_accumulation_steps: Count = 8
    minibatches: Count = 8
    """Updates per iteration; an iteration has batch_size x gradient_accumulation_steps x minibatches responses
    (InstructGPT's 512)."""
    inner_epochs: Count = 1
    """Passes over an iteration's responses (4 in lm-human-preferences)."""
    max_new_tokens: Count = 64
    """Maximum tokens in a response."""
    temperature: Positive = 1.0
    """Sampling temperature of the policy, also applied to the reference."""
    rollout_batch_size: Count = 128
    """Maximum number of responses that a process generates at once."""
    compile: bool | Literal["auto"] = "auto"
    """Compile what computes a token of all responses, on a GPU. auto: if the run is long enough for it to pay off."""
    kl_coef: NonNegative = 0.02
    """Penalty per nat of KL to the reference (InstructGPT's beta)."""
    kl_target: Positive | None = None
    """Adapt kl_coef to reach this KL per response, in nats. None: fixed."""
    kl_horizon: Positive = 10_000
    """Episodes over which kl_coef may change by about a fifth."""
    no_end_reward: float | None = None
    """Score of a response without an end token (-1 in lm-human-preferences). None: its score from the reward."""
    value_network: Literal["reward", "policy", "shared"] | None = None
    """Network that predicts returns: a copy of the reward model, a copy of the policy, or a head on the policy itself.
    None: the reward model if there is one, else a copy of the policy."""
    gamma: UnitInterval = 1.0
    """Discount of later rewards."""
    gae_lambda: UnitInterval = 0.95
    """Weight of longer estimates of an advantage (arXiv:1506.02438)."""
    clip: Positive = 0.2
    """Range around 1 for the probability ratio to the policy that generated the response."""
    value_clip: Positive = 0.2
    """Range around the old value for a new value."""
    value_coef: NonNegative = 0.1
    """Weight of the value loss."""
    whiten_rewards: bool = True
    """Divide rewards by their root mean square over an iteration."""
    whiten_advantages: bool = True
    """Normalize advantages to mean 0 and standard deviation 1 over an iteration."""
    pretraining_dataset: str | None = None
    """A prepared dataset whose language-model loss is added: InstructGPT's PPO-ptx. None: plain PPO."""
    pretraining_coef: NonNegative = 27.8
    """Weight of that loss, in nats per token."""
    pretraining_batch_size: Count = 64
    """Windows of that dataset per update."""
    ema_decay: Share | None = None
    """Save a moving average of the weights as the model, with this decay; InstructGPT has .992. None: no average, the
    weights themselves."""
    save_interval: Count = 20
    """Iterations between checkpoints."""
    learning_rate: Positive | None = None
    """Peak learning rate. None: InstructGPT's 9e-6 for 1.2B parameters without embeddings; for fewer, times sqrt(1.2B /
    parameters), up to 0.01."""
    schedule: Literal["cosine", "linear", "constant"] = "constant"
    adam_eps: Positive = 1e-5

    FIRST: ClassVar[tuple[str, ...]] = (
        "prompts",
        "reward",
        "episodes",
        "max_new_tokens",
        "kl_coef",
        *DividedOptions.FIRST,
    )
    PATHS: ClassVar[tuple[str, ...]] = ("model", "reward", "monitor")
    PUBLISHED = PublishedRate(9e-6, 1.2e9)  # arXiv:2203.02155

    def __post_init__(self):
        super().__post_init__()
        check_batch("minibatches x batch_size x gradient_accumulation_steps", self.episodes_per_iteration)
        check_batch("pretraining_batch_size", self.pretraining_batch_size)
        if self.kl_target is not None and not self.kl_coef:
            raise ValueError("kl_coef = 0 must be more than 0, for kl_target to adapt it")

    @property
    def code(self) -> dict[str, str]:
        return {name: value for name in ("reward", "monitor") if names_function(value := getattr(self, name))}

    @property
    def episodes_per_iteration(self) -> int:
        return self.examples_per_update * self.minibatches


@dataclass(frozen=True, config=STRICT)
class FinetuneOptions(DividedOptions, ExampleOptions):
    model: Positional[str | None] = None
    """The model to fine-tune: a run folder, a model directory, or a published model: gpt2, openai-gpt, hf:OWNER/NAME.
    Or a fine-tuned model: to measure it, to predict with it, or to fine-tune it on another task."""
    val: Path | None = None
    """Examples that choose the best epoch. None: val_fraction of the training examples."""
    val_fraction: Share = 0.1
    """Share of the training examples that is held out if there is no val. 0: none, and the last epoch counts."""
    test: Path | None = None
    """Examples to measure the best epoch on."""
    predict: Path | None = None
    """Examples to predict labels of; labels that they have are not looked at."""
    output: Path | None = None
    """The file of the predictions. None: NAME.predictions.jsonl in the current folder, NAME being that of predict."""
    classify: tuple[str, ...] = ()
    """The texts of one example, to print its prediction: a text; two texts; or a context and its options."""
    task: TaskKind = "classification"
    """classification: a text has a class. entailment: a pair of texts, in this order, has one. similarity: a pair in
    either order. multiple_choice: one of the options goes with the context."""
    text_a: str | None = None
    """Column of the text, premise, first text or context. None: text, premise, text_a or context, by task."""
    text_b: str | None = None
    """Column of the hypothesis or second text, or of a question after the context. None: hypothesis, text_b, none."""
    options: tuple[str, ...] = ()
    """Columns of the options; or one column with a list of them. None: options."""
    label: str | None = None
    """Column of the label. Of an option: its number from 0, letter from A, column or text. None: label."""
    numbers: bool = False
    """Labels are numbers on a scale, to be predicted by least squares, and not names of classes. The head learns them
    standardised by the mean and standard deviation of the training labels, and starts at their mean."""
    max_tokens: Annotated[int, Ge(LEAST_TOKENS)] | None = None
    """Longer sequences are cut to this, the longest text first. None: the model's context."""
    batch_size: Count = 32
    """Examples at a time."""
    epochs: Count = 3
    """Passes over the training examples."""
    learning_rate: Positive | None = None
    """Peak learning rate. None: GPT-1's 6.25e-5 for 85M parameters without embeddings; for fewer, times sqrt(85M /
    parameters), up to 0.01."""
    schedule: Literal["gpt1", "cosine", "linear", "constant"] = "gpt1"
    """gpt1: falls linearly to 0 over all updates and rises over the warmup at the same time, as in GPT-1's code. The
    others: shape of the learning rate after the warmup, down to min_lr."""
    warmup: PositiveShare = 0.002
    """Share of the updates over which the learning rate rises."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay, on tensors of two or more dimensions."""
    beta2: Share = 0.999
    """Adam's decay rate of the second moment."""
    seed: Seed = 42
    """The source of all randomness: new weights, the order of examples, dropout."""
    language_weight: NonNegative | None = None
    """Weight (lambda) of the language-model loss on the texts beside the task's loss. None: GPT-1's .5, which helps on
    large sets there; on the four small ones of docs/results/gpt1_arc.md it costs .2 to 2.3 points against 0. A
    bidirectional model has no such loss, nor has freeze_trunk."""
    classifier_dropout: Share = 0.1
    """Dropout of the state that the head reads."""
    dropout: Share | None = None
    """Dropout everywhere in the model. None: as the model has it."""
    group_by_length: bool = True
    """Put examples of like length into a batch, which saves padding."""
    freeze_trunk: bool = False
    """Train the head alone, on the hidden states as they are; the new tokens keep their random embeddings."""
    transfer_blocks: Natural | None = None
    """Keep the embeddings and this many of the first blocks, and draw the rest anew. None: keep the model."""
    from_scratch: bool = False
    """Draw all weights anew: the architecture without its pre-training."""
    lora_rank: Natural = 0
    """Train low-rank adapters of this rank beside the blocks' frozen matrices, and the embeddings of the new tokens;
    they are merged in what is saved. 0: train all weights."""
    lora_alpha: Positive = 16.0
    """Adapters count alpha / rank times."""
    lstm: bool = False
    """Put an LSTM of as many weights in the Transformer's place, drawn anew."""
    lstm_dataset: str | None = None
    """A prepared dataset on which the LSTM is trained as a language model first."""
    lstm_iters: Natural = 0
    """Updates of that, with batches of 32 windows and a learning rate of 1e-3 that falls to 1e-4."""

    FIRST: ClassVar[tuple[str, ...]] = (
        *("train", "val", "test", "predict", "classify", "task", "numbers"),
        *("epochs", "learning_rate", "batch_size", "out_dir", "resume"),
    )
    PUBLISHED = PublishedRate(6.25e-5, 85e6)

    def __post_init__(self):
        super().__post_init__()
        ways = ("freeze_trunk", "from_scratch", "lora_rank", "lstm")
        chosen = [name for name in ways if getattr(self, name)]
        chosen += ["transfer_blocks"] * (self.transfer_blocks is not None)
        if len(chosen) > 1:
            raise ValueError(f"{chosen[0]} and {chosen[1]} exclude each other: choose one")
        if self.numbers and self.task == "multiple_choice":
            raise ValueError("numbers = True is for labels on a scale; multiple_choice has options")
        if (self.lstm_dataset is None) != (self.lstm_iters == 0) or self.lstm_iters and not self.lstm:
            raise ValueError("lstm_dataset and lstm_iters go together, with lstm = True")

    def training(self, updates: int) -> TrainingConfig:
        """Settings of the optimizer and of the learning rate over `updates` updates."""
        if self.schedule == "gpt1":  # `rate` computes it
            return dataclasses.replace(self, schedule="linear").training(updates)
        return super().training(updates)

    def rate(self, update: int, training: TrainingConfig) -> float:
        """Returns the learning rate of an update, counted from 0, by the settings that `training` returned."""
        if self.schedule == "gpt1":
            return training.learning_rate * warmup_linear(update / training.max_iters, self.warmup)
        return super().rate(update, training)


@dataclass(frozen=True, config=STRICT)
class TranslationOptions(ExampleOptions):
    model: Positional[str | None] = None
    """A model of this stage to train further. None: a new one, of the sizes below."""
    tokenizer: str | None = None
    """The tokenizer of a new model: gpt2, or a prepared dataset's, tokenizer's or model's name. None: characters."""
    n_layer: Count | None = None
    """Blocks of the decoder of a new model. None: 3."""
    encoder_layers: Count | None = None
    """Blocks of its encoder. None: 3."""
    n_head: Count | None = None
    """Heads of each attention. None: 4."""
    n_embd: Count | None = None
    """Width. None: 128."""
    block_size: Count | None = None
    """Most tokens of a source or target. None: the longest of the examples."""
    norm_position: Literal["pre", "post"] | None = None
    """post: norm(x + f(x)), as in the paper. pre: x + f(norm(x)), with which deep models train more easily. None:
    post."""
    dropout: Share | None = None
    """Dropout everywhere. None: the model's, 0.1 in a new one."""
    label_smoothing: Share = 0.1
    """Share of each target's probability that is spread over the vocabulary."""
    batch_size: Count = 64
    """Pairs at a time."""
    epochs: Count = 10
    """Passes over the pairs."""
    learning_rate: Positive = 1e-3
    """Peak learning rate."""
    schedule: Literal["inverse_sqrt", "cosine", "linear", "constant"] = "inverse_sqrt"
    """Shape of the learning rate after the warmup. inverse_sqrt: over the square root of the step, as in the paper."""
    warmup: Share = 0.1
    """Share of the updates in which the learning rate rises."""
    beta2: Share = 0.98
    """Adam's decay of the mean of squared gradients."""
    adam_eps: Positive = 1e-9
    """Adam's epsilon."""
    weight_decay: NonNegative = 0.0
    """Of tensors of two dimensions or more, decoupled from the gradient."""

    FIRST: ClassVar[tuple[str, ...]] = (
        *("train", "val", "epochs", "learning_rate", "batch_size", "n_layer", "encoder_layers", "n_embd", "n_head"),
        *("out_dir", "resume"),
    )
    NEW: ClassVar[dict[str, Any]] = {  # a new model's settings where they are None
        "n_layer": 3, "encoder_layers": 3, "n_head": 4, "n_embd": 128, "norm_position": "post", "dropout": 0.1
    }  # fmt: skip

    @property
    def architecture(self) -> dict[str, Any]:
        """The settings of the architecture that aren't None."""
        values = {name: getattr(self, name) for name in (*self.NEW, "block_size")}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, config=STRICT)
class EncoderOptions(ExampleOptions):
    model: Positional[str | None] = None
    """The encoder to train further: a run of this stage, or a ViT, CLIP or SigLIP saved by transformers."""
    image_encoder: str | None = None
    """Instead, a .toml file with the settings of a new encoder (`gpt_arc/vision/encoder.py`)."""
    labels: tuple[str, ...] = ("label",)
    """Columns of the labels to learn. An image may lack some of them."""
    text_model: str | None = None
    """Learn which caption belongs to which image of a batch, instead of classes: the text model that reads captions, a
    run or a model directory, which is trained too. A caption is the image's labels with spaces between."""
    contrastive_loss: ContrastiveLoss = "clip"
    """With a text_model. clip: a choice among the batch's captions, and among its images (arXiv:2103.00020). siglip: of
    each pair, whether it belongs together (arXiv:2303.15343)."""
    epochs: Count = 10
    """Passes over the images."""
    batch_size: Count = 64
    """Images that a process reads at a time, at most; with a text_model, those of all processes are told apart."""
    learning_rate: Positive | None = None
    """Peak learning rate. None: ViT-B/16's 8e-4 for 86M parameters without embeddings; for fewer, times sqrt(86M /
    parameters), up to 0.01."""
    warmup: Share = 0.05
    """Share of the updates in which the learning rate rises."""
    weight_decay: NonNegative = 0.05
    """Of tensors of two dimensions or more, decoupled from the gradient."""

    PATHS = (*ExampleOptions.PATHS, "image_encoder", "text_model")
    PUBLISHED = PublishedRate(8e-4, 86e6)  # ViT-B/16 (arXiv:2010.11929)

    @property
    def start(self) -> str | None:
        return self.model or self.image_encoder

    def __post_init__(self):
        super().__post_init__()
        if self.model and self.image_encoder:
            raise ValueError(
                "image_encoder is for a new encoder, and model names one to train further: name one of them"
            )
        if not self.labels or len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels = {', '.join(self.labels) or 'nothing'}: name one or more columns, each once")
        if self.text_model is None and self.contrastive_loss != EncoderOptions.contrastive_loss:
            raise ValueError(
                f"contrastive_loss = {self.contrastive_loss} is for captions: name the text_model that reads them"
            )
        if self.text_model is not None and self.batch_size < 2:
            raise ValueError("batch_size = 1 leaves no other captions to tell an image's from: 2 is the least")
