"""Conversations with images: rows of files, examples and batches.

A row of `gpt_arc/chat/files.py` may have an `image`, or a list of `images`: paths relative to the file, in its folder
or below. Each <image> in the user's turns stands for one of them, in order; where there is none, all of them come
before the first user turn. Rows without images are text as ever.

    {"image": "pictures/cat.png", "prompt": "What is this?", "response": "A cat."}
    {"images": ["a.jpg", "b.webp"], "prompt": "<image> is older than <image>?", "response": "No."}
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from os import cpu_count
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from gpt_arc.chat.batches import EncodedConversation, EncodedConversations, conversation_batch, encode_conversations
from gpt_arc.chat.files import Conversation, read_conversations
from gpt_arc.chat.format import IMAGE, ChatFormat, Turn
from gpt_arc.errors import UserError
from gpt_arc.tables import counted
from gpt_arc.vision.images import Preprocessing, image_path, read_image

THREADS = min(8, cpu_count() or 1)  # that decode images; Pillow lets several run at once


class ImageConversation(NamedTuple):
    """A conversation whose turns have the ids of its images' embeddings: -1, -2 and so on."""

    turns: tuple[Turn, ...]
    place: str
    row: dict[str, Any]
    images: tuple[Path, ...]
    checksums: tuple[str, ...]  # of the images' files


class ImageExample(NamedTuple):
    """An encoded conversation and its images."""

    tokens: list[int]
    scored: list[bool]
    images: tuple[str, ...]
    checksums: tuple[str, ...]

    @property
    def count(self) -> int:
        """Number of tokens that the loss counts."""
        return sum(self.scored)


def read_image_conversations(path: Path, columns: Sequence[str], embeddings: int) -> list[ImageConversation]:
    """Reads training conversations whose images have `embeddings` embeddings each. Decodes every image once.

    Raises UserError naming the first row whose image is broken, missing or elsewhere.
    """
    conversations = read_conversations(path, columns)
    images = [_images_of(conversation, path.parent) for conversation in conversations]
    places: dict[Path, str] = {}
    for conversation, paths in zip(conversations, images):
        for image in paths:
            places.setdefault(image, conversation.place)
    checksums = checksums_of(places)
    return [
        ImageConversation(
            with_images(conversation, len(paths), embeddings),
            conversation.place,
            conversation.row,
            tuple(paths),
            tuple(checksums[image] for image in paths),
        )
        for conversation, paths in zip(conversations, images)
    ]


def _images_of(conversation: Conversation, folder: Path) -> list[Path]:
    """Returns the paths of a row's images. Raises UserError naming the row."""
    row = conversation.row
    names = row.get("images")
    if row.get("image") is not None:
        if names is not None:
            raise UserError(f"{conversation.place}: the columns image and images can't stand side by side")
        names = [row["image"]]
    if not isinstance(names, list | None):
        raise UserError(f"{conversation.place}: images is not a list of names of files")
    try:
        return [image_path(folder, name) for name in names or ()]
    except ValueError as error:
        raise UserError(f"{conversation.place}: {error}") from None


def checksums_of(places: Mapping[Path, str]) -> dict[Path, str]:
    """Decodes images, and returns the checksums of their files.

    `places` are the rows that name them. Raises UserError naming the first row whose image can't be decoded.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            return dict(zip(places, pool.map(_checksum, places, places.values())))
        except UserError:
            pool.shutdown(cancel_futures=True)
            raise


def _checksum(path: Path, place: str) -> str:
    """Returns the checksum of an image's file. Raises UserError naming `place` if it can't be decoded."""
    try:
        read_image(path)
        return xxhash.xxh3_64_hexdigest(path.read_bytes())
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def with_images(conversation: Conversation, count: int, embeddings: int, first: int = 0) -> tuple[Turn, ...]:
    """Returns the turns with `count` images of `embeddings` embeddings each; `first` embeddings came before.

    Raises UserError naming the row unless the users' turns have an <image> for each, or none.
    """
    turns = list(conversation.turns)
    marks = sum(turn.content.count(IMAGE) for turn in turns if turn.role == "user")
    user = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if count and not marks and user is not None:
        turns[user] = turns[user]._replace(content=IMAGE * count + turns[user].content)
    elif marks != count:
        raise UserError(
            f"{conversation.place}: the user's turns have {marks} {IMAGE} for {counted(count, 'image')}: "
            "there must be one for each, or none"
        )
    starts = iter(range(first, first + count * embeddings, embeddings))
    for i, turn in enumerate(turns):
        if turn.role == "user" and count:
            ids = [
                range(-1 - start, -1 - start - embeddings, -1)
                for _, start in zip(range(turn.content.count(IMAGE)), starts)
            ]
            turns[i] = turn._replace(images=tuple(ids))
    return tuple(turns)


def encode_image_conversations(
    conversations: Sequence[ImageConversation], chat: ChatFormat, context: int
) -> EncodedConversations[ImageExample]:
    """`encode_conversations` with `ImageExample`s. A conversation that is cut loses the images of its end."""
    examples, cut, dropped = [], 0, 0
    for conversation in conversations:
        encoded = encode_conversations([Conversation(*conversation[:3])], chat, context)
        cut, dropped = cut + encoded.cut, dropped + encoded.dropped
        for tokens, scored in encoded.examples:
            lowest = min(tokens)
            kept = sum(ids[-1] >= lowest for turn in conversation.turns for ids in turn.images)
            paths = tuple(str(path) for path in conversation.images[:kept])
            examples.append(ImageExample(tokens, scored, paths, conversation.checksums[:kept]))
    return EncodedConversations(examples, cut, dropped)


def identity(example: ImageExample) -> list[Any]:
    """Returns what an example teaches, wherever its images are: for a fingerprint."""
    return [example.tokens, example.scored, example.checksums]


def image_batch(
    examples: Sequence[ImageExample], context: int | None, preprocessing: Preprocessing, size: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """`conversation_batch` and the images (N, 3, size, size), renumbered through the batch.

    Raises UserError for an image that can't be read any more.
    """
    renumbered, first = [], 0
    for example in examples:
        tokens = [token - first if token < 0 else token for token in example.tokens]
        renumbered.append(EncodedConversation(tokens, example.scored))
        first += sum(token < 0 for token in example.tokens)
    paths = [Path(path) for example in examples for path in example.images]
    return *conversation_batch(renumbered, context), load_pixels(paths, preprocessing, size)


def load_pixels(paths: Sequence[Path], preprocessing: Preprocessing, size: int) -> Tensor:
    """Returns the pixels (N, 3, size, size) of image files. Raises UserError."""
    images: Iterator[Tensor] = _readers().map(lambda path: preprocessing.pixels(read_image(path), size), paths)
    return torch.stack([torch.zeros(3, size, size), *images])[1:]


@cache
def _readers() -> ThreadPoolExecutor:
    """The threads that read images of batch after batch."""
    return ThreadPoolExecutor(THREADS)
