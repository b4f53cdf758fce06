"""Images in a dialogue: read, embedded, and kept for the decoder.

images = Images(load_vision(directory, decoder.model), decoder)
images.show(Path("cat.png"))                            # the next question is about it
dialogue.ask("What is this?", images=images.take())
"""

from pathlib import Path

import torch

from gpt_arc.decoding.decoder import Decoder
from gpt_arc.next_steps import reads_text_alone
from gpt_arc.vision.images import read_image
from gpt_arc.vision.model import VisionGPT, load_vision
from gpt_arc.weights.directory import reads_images


class Images:
    """The images that a decoder has been shown, whose embeddings become `decoder.images`."""

    def __init__(self, model: VisionGPT, decoder: Decoder):
        self.model, self.decoder = model, decoder
        self._waiting: list[range] = []  # ids of the embeddings of images that no question has shown yet

    def show(self, path: Path) -> None:
        """Adds an image to the next question. Raises UserError if it can't be read."""
        embeddings, known = self.model.see(read_image(path)), self.decoder.images
        first = 0 if known is None else len(known)
        self.decoder.images = embeddings if known is None else torch.cat((known, embeddings))
        self._waiting.append(range(-1 - first, -1 - first - len(embeddings), -1))

    def take(self) -> tuple[range, ...]:
        """Returns, once, the ids of the images for the next question."""
        waiting, self._waiting = tuple(self._waiting), []
        return waiting


def load_images(directory: Path, decoder: Decoder) -> Images:
    """Returns the images of a decoder whose model is that of `directory`. Raises UserError if it has no encoder."""
    if not reads_images(directory):
        raise reads_text_alone(directory)
    return Images(load_encoder(directory, decoder), decoder)


def load_encoder(directory: Path, decoder: Decoder) -> VisionGPT:
    """Returns the model that reads images whose text model, that of `directory`, is the decoder's."""
    weight = decoder.model.token_embedding.weight
    model = load_vision(directory, decoder.model, weight.dtype)
    for part in (model.encoder, model.projector):
        part.to(weight.device).eval()
    return model
