"""A server of tiny models, for the tests of the API and of the page."""

import contextlib
import threading
import time

from gpt_arc.chat.format import TEMPLATES, ChatFormat
from gpt_arc.data.tokenizer import BPETokenizer
from gpt_arc.decoding.decoder import Decoder
from gpt_arc.serving.server import Model, Playground, listen, server_of
from gpt_arc.vision.encoder import EncoderConfig, ImageEncoder
from gpt_arc.vision.model import VisionGPT
from gpt_arc.vision.projector import Projector, ProjectorConfig
from helpers import randomised
from model import GPT, GPTConfig

TOKEN = "secret"
BYTES = BPETokenizer({bytes([byte]): byte for byte in range(256)}, {"<|endoftext|>": 256})
CHAT = ChatFormat.new(TEMPLATES["markers"], BYTES, 257)


def gpt(vocab_size, scale=0.3, **change):
    settings = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64, "vocab_size": vocab_size} | change
    return randomised(GPT(GPTConfig(**settings)), scale=scale)


def seeing(name="sees"):
    """A served model that reads images of 4 embeddings."""
    encoder = ImageEncoder(EncoderConfig(image_size=8, patch_size=4, n_layer=1, n_head=2, n_embd=8))
    model = VisionGPT(gpt(CHAT.vocab_size, block_size=256), encoder, Projector(ProjectorConfig(), 8, 32))
    model = randomised(model, seed=5, scale=0.4)
    return Model(name, Decoder(model.text), BYTES, CHAT, 4, 500, model)


@contextlib.contextmanager
def serving(*models):
    """Runs the block with a server of models in a thread. Yields the playground."""
    listening = listen(0)
    playground = Playground(models, TOKEN, listening.getsockname()[1])
    server = server_of(playground)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield playground
    finally:
        server.should_exit = True
        thread.join()


def idle(playground):
    """Waits until no engine has work. Returns whether that came within ten seconds."""
    end = time.monotonic() + 10
    while time.monotonic() < end and not all(engine.idle for engine in playground.engines.values()):
        time.sleep(0.01)
    return all(engine.idle for engine in playground.engines.values())
