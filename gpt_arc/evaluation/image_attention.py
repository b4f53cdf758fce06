"""Where a model that reads images looks while it answers.

reader = load_image_reader("out/sft")
answers = ask(reader, ["What is this?"], [Path("cat.png")])
image, shares = attention_to(reader, "What is this?", Path("cat.png"), answers[0])
draw_attention(axes, image, shares)       # with matplotlib
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt_arc.chat.format import load_text_with_chat, require_chat
from gpt_arc.errors import UserError
from gpt_arc.evaluation.reader import Reader
from gpt_arc.evaluation.tasks import Task
from gpt_arc.next_steps import reads_text_alone
from gpt_arc.nn.attention_maps import attention_maps
from gpt_arc.vision.data import load_pixels
from gpt_arc.vision.model import VisionGPT, load_vision
from gpt_arc.weights.directory import of_one_checkpoint, reads_images

BATCH_TOKENS = 8192  # read at once
ANSWER = Task("question", "Answer a question about an image", "generate", answer="{answer}", image="image")


@torch.no_grad()
def patch_attention(model: VisionGPT, prompt: Sequence[int], response: Sequence[int], pixels: Tensor) -> Tensor:
    """Returns the share of attention (N, rows, columns) that each embedding of the images (N, 3, H, W) gets.

    It is the mean over blocks, heads and the positions that predict the response's tokens. `prompt` has placeholders
    from -1 on for the images.
    """
    grid = model.encoder.grid(pixels.to(model.encoder.patches.weight))
    maps = attention_maps(model.text, [*prompt, *response[:-1]], model.projector(grid).flatten(0, 1))
    asking = maps[:, :, len(prompt) - 1 :].mean((0, 1, 2))  # (T,)
    placeholders = {-1 - token: place for place, token in enumerate(prompt) if token < 0}
    shares = asking[[placeholders[i] for i in range(len(placeholders))]]
    side = model.projector.config.pixel_shuffle
    return shares.view(len(grid), grid.size(1) // side, grid.size(2) // side).cpu()


@of_one_checkpoint
def load_image_reader(path: Path | str) -> Reader:
    """Loads a model that reads images. Raises UserError for another."""
    directory, model, tokenizer, chat = load_text_with_chat(path)
    if not reads_images(directory):
        raise reads_text_alone(path)
    if model.config.mixer == "lstm":
        raise UserError(f"{path} has no attention to show, for its mixer is an lstm: name another model")
    vision = load_vision(directory, model).eval()
    return Reader(vision.text, tokenizer, BATCH_TOKENS, require_chat(path, chat), vision)


def ask(reader: Reader, questions: Sequence[str], images: Sequence[Path]) -> list[str]:
    """Returns the reader's greedy answers to questions about images. Raises UserError."""
    return reader.answers(questions, ANSWER, 0, images)


def attention_to(reader: Reader, question: str, path: Path, answer: str) -> tuple[Tensor, Tensor]:
    """Returns an image and the `patch_attention` (rows, columns) to it while the reader gives an answer.

    The image (H, W, 3) is what the encoder sees, between 0 and 1. Raises UserError.
    """
    prompt = reader.encode_image_prompt(question, reader.model.config.block_size)
    assert reader.vision is not None and reader.chat is not None  # `encode_image_prompt` saw to it
    preprocessing = reader.vision.preprocessing
    pixels = load_pixels([path], preprocessing, reader.vision.image_size)
    mean, std = (torch.tensor(each)[:, None, None] for each in (preprocessing.mean, preprocessing.std))
    shares = patch_attention(reader.vision, prompt, reader.chat.response(answer), pixels)
    return (pixels[0] * std + mean).clamp(0, 1).permute(1, 2, 0), shares[0]


def draw_attention(axes: Any, image: Tensor, shares: Tensor) -> None:
    """Draws an image (H, W, 3) in matplotlib's axes; patches with little attention are covered by grey."""
    height, width = image.shape[:2]
    cover = torch.zeros(*shares.shape, 4) + 0.5
    cover[..., 3] = 0.9 * (1 - shares / shares.max())
    axes.imshow(image.numpy(), extent=(0, width, height, 0))
    axes.imshow(cover.numpy(), extent=(0, width, height, 0), interpolation="nearest")
    axes.set_axis_off()
