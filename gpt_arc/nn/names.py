"""Names that settings choose among. Nothing here imports torch."""

from typing import Literal

Activation = Literal["gelu_tanh", "gelu", "quick_gelu", "relu", "relu_squared", "swiglu"]
GATED = ("swiglu",)  # these multiply values by gates, so the MLP's first layer is twice as wide
Stretch = Literal["linear", "ntk", "dynamic", "yarn", "llama3"]  # of rotary positions
Checkpointing = bool | Literal["selective"]  # of activations
ContrastiveLoss = Literal["clip", "siglip"]
TaskKind = Literal["classification", "entailment", "similarity", "multiple_choice"]
