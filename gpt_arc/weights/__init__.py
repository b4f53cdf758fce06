"""Model directories, and the weights of other libraries."""

from gpt_arc.weights.directory import load_model, save_model

__all__ = ["load_model", "save_model"]
