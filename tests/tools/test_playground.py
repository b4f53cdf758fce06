"""tools/playground.py: what it loads, prints and refuses. tests/serving has the server and its page."""

import re
import sys
from pathlib import Path

import pytest
import torch

from gpt_arc.errors import entry_point
from gpt_arc.serving import server
from gpt_arc.vision.encoder import EncoderConfig, ImageEncoder
from gpt_arc.vision.model import VisionGPT, save_vision
from gpt_arc.vision.projector import Projector, ProjectorConfig
from gpt_arc.weights.directory import load_model, save_model
from helpers import ROOT, randomised
from model import GPT
from ranked_texts import CHAT, LETTERS, tiny_config
from tools import playground as tool

main = entry_point(tool.main)


@pytest.fixture
def models(tmp_path, monkeypatch):
    """The model directories plain and chat."""
    monkeypatch.chdir(tmp_path)
    for name in ("plain", "chat"):
        save_model(randomised(GPT(tiny_config(n_layer=1))), LETTERS, name)
    CHAT.save("chat")


def test_it_serves_the_models_and_prints_their_address(models, output_of, monkeypatch):
    served = []

    class Server:
        def __init__(self, playground):
            self.playground = playground

        def run(self, sockets):
            served.append((self.playground, [each.getsockname() for each in sockets]))
            sockets[0].close()

    monkeypatch.setattr(server, "server_of", Server)
    flags = ["--port=0", "--batch_size=3", "--max_new_tokens=7", "--device=cpu"]
    output = output_of(main, "playground.py", "plain", "chat", "plain", *flags)
    ((playground, sockets),) = served
    assert sockets == [("127.0.0.1", playground.port)] and len(playground.token) >= 32
    address, token = f"http://127.0.0.1:{playground.port}", playground.token
    expected = [f"page    {address}/#token={token}", f"API     {address}/v1, with the API key {token}"]
    assert output.splitlines() == expected
    about = [model.describe() for model in playground.models.values()]
    shown = [(each["id"], each["chat"], each["max_tokens"], each["context"]) for each in about]
    assert shown == [("plain", False, 7, 16), ("chat", True, 7, 16)]
    assert playground.models["chat"].chat == CHAT and playground.models["plain"].rows == 3
    output_of(main, "playground.py", "plain", "--port=0")
    assert served[1][0].token != token
    assert "#token=key\n" in output_of(main, "playground.py", "plain", "--port=0", "--token=key")


def test_a_model_that_sees_is_loaded_with_its_encoder(models):
    encoder = ImageEncoder(EncoderConfig(image_size=8, patch_size=4, n_layer=1, n_head=2, n_embd=8))
    text = load_model("chat")[0]
    vision = VisionGPT(text, encoder, Projector(ProjectorConfig(), 8, text.config.n_embd))
    save_vision(randomised(vision), Path("chat"))
    sees, reads = (tool.load(name, tool.Options((name,), device="cpu")) for name in ("chat", "plain"))
    assert [model.describe()["images"] for model in (sees, reads)] == [True, False]
    image = torch.rand(1, 3, 8, 8)
    assert sees.vision is not None and sees.vision.text is sees.decoder.model
    torch.testing.assert_close(sees.vision.embed_images(image), vision.embed_images(image))


def test_what_can_t_be_served_is_refused(models, output_of, monkeypatch):
    for name, settings in (("translator", {"encoder_layers": 1}), ("bert", {"attention": "bidirectional"})):
        save_model(GPT(tiny_config(n_layer=1, **settings)), LETTERS, name)
        assert re.search(f"{name} .*: .*sample.py", output_of(main, "playground.py", name, "--port=0"))
    assert "missing" in output_of(main, "playground.py", "missing", "--port=0")
    assert "models" in output_of(main, "playground.py")
    listening = server.listen(0)
    port = listening.getsockname()[1]
    assert re.search(f"port {port} can't be used .*--port", output_of(main, "playground.py", "plain", f"--port={port}"))
    listening.close()
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert f"pip install -e '{ROOT}[serve]'" in output_of(main, "playground.py", "plain")
