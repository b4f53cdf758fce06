"""A server of tiny models, for the tests of the API and of the page."""

import contextlib
import threading
import time

from gpt_arc.chat.format import TEMPLATES, ChatFormat
from gpt_arc.data.tokenizer import BPETokenizer
from gpt_arc.serving.server import Playground, listen, server_of
from helpers import randomised
from model import GPT, GPTConfig

TOKEN = "secret"
BYTES = BPETokenizer({bytes([byte]): byte for byte in range(256)}, {"<|endoftext|>": 256})
CHAT = ChatFormat.new(TEMPLATES["markers"], BYTES, 257)


def gpt(vocab_size, scale=0.3, **change):
    settings = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64, "vocab_size": vocab_size} | change
    return randomised(GPT(GPTConfig(**settings)), scale=scale)


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
