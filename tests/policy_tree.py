"""A tree of responses whose optimal policy is known, and chat models to train on it."""

import hashlib
import inspect
import math
from pathlib import Path

import torch
from safetensors.torch import load_file

from gpt_arc.chat.format import TEMPLATES, ChatFormat, Turn, load_chat_model
from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.weights.directory import save_model
from helpers import write
from model import GPT, GPTConfig


def save_chat_model(model, chat, directory):
    save_model(model, chat.tokenizer, directory)
    chat.save(directory)


def weights_of(folder):
    return load_file(Path(folder) / "model.safetensors")


TREE = CharTokenizer("\nab")


PLAIN = ChatFormat.new(TEMPLATES["plain"], TREE, 3)  # vocabulary: newline, a, b, and the end of a response


DEPTH = 3  # most tokens of a response: 1 + 3 + 9 + 27 outcomes


def hash_utility(text):
    """A number in [-1, 1), drawn by the text's hash."""
    return 2 * int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32 - 1


@torch.no_grad()
def distribution(directory):
    """Log-probabilities of all outcomes, by enumeration, in float64."""
    model, _, chat = load_chat_model(directory)
    prompt, ended, beginnings = chat.prompt([Turn("user", "a")]), {}, {(): 0.0}
    for _ in range(DEPTH):
        logits = model.eval()(torch.tensor([[*prompt, *tokens] for tokens in beginnings]))[:, -1]
        following = {}
        for (tokens, log), row in zip(beginnings.items(), logits.double().log_softmax(-1).tolist()):
            for token, step_log in enumerate(row):
                (ended if token == chat.end else following)[*tokens, token] = log + step_log
        beginnings = following
    return ended | beginnings


def total_variation(p, q):
    return 0.5 * sum(abs(math.exp(p[outcome]) - math.exp(q[outcome])) for outcome in p)


def optimum(reference, beta):
    tilted = {outcome: log + hash_utility(PLAIN.decode(outcome)) / beta for outcome, log in reference.items()}
    z = math.log(sum(map(math.exp, tilted.values())))
    return {outcome: log - z for outcome, log in tilted.items()}


def make_tree():
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, len(PLAIN.ids) + 3, 1, 2, 32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    save_chat_model(model, PLAIN, "tree")
    write("tree.jsonl", [{"prompt": "a"}] * 512)
    Path("utility_of_tree.py").write_text(
        f"import hashlib\n{inspect.getsource(hash_utility)}"
        "def utilities(rows, responses): return [hash_utility(text) for text in responses]\n"
    )
