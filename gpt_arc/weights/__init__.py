"""Model directories, models in the format of transformers, and models derived from others."""

from gpt_arc.weights.directory import load_model, save_model

__all__ = ["load_model", "save_model"]
