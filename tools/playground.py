"""Try models in the browser, and serve them by OpenAI's API.

    python tools/playground.py out/quickstart          prints the address of a page, for this machine alone
    python tools/playground.py out/sft gpt2            two models, side by side

The server has /v1/completions, /v1/chat/completions and /v1/models for OpenAI's clients, with the token as API key.
Requests are computed together as they come. A model is a run folder, a model directory, or the name of published
weights.
"""

if __name__ == "__main__":
    import gpt_arc.startup  # noqa: F401


# Modules that need torch are imported in functions: --help needs none.

import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Le, MinLen
from pydantic.dataclasses import dataclass

from gpt_arc.errors import entry_point
from gpt_arc.extras import import_extra
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT, Count, Positional

if TYPE_CHECKING:
    from gpt_arc.serving.server import Model


@dataclass(frozen=True, config=STRICT)
class Options:
    models: Positional[Annotated[tuple[str, ...], MinLen(1)]]
    """The models: run folders, model directories, or gpt2, gpt2-medium, gpt2-large, gpt2-xl, openai-gpt,
    hf:OWNER/NAME."""
    port: Annotated[int, Ge(0), Le(65535)] = 8000
    """Port on this machine. 0: any free one."""
    token: str | None = None
    """What clients send as API key. None: a new random one."""
    batch_size: Count = 16
    """Most continuations of a model that are computed at the same time; others wait."""
    max_new_tokens: Count = 4096
    """Most tokens that a request may ask for."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu), or any torch device."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights. auto: bfloat16 if the hardware multiplies it natively and the model isn't tiny."""
    threads: Count | Literal["auto"] = "auto"
    """CPU threads. auto: OMP_NUM_THREADS or, if that isn't set, more than one only where they pay."""


def load(name: str, options: Options) -> "Model":
    """Loads a model. Raises UserError if it can't write text."""
    from gpt_arc.chat.format import load_chat
    from gpt_arc.decoding.images import load_encoder
    from gpt_arc.decoding.load import load_decoder, set_decoding_threads
    from gpt_arc.decoding.settings import SampleConfig
    from gpt_arc.serving.server import Model
    from gpt_arc.weights.directory import check_causal, load_config, of_one_checkpoint, reads_images

    config = SampleConfig(device=options.device, dtype=options.dtype, compile=False)

    @of_one_checkpoint
    def read(directory: Path) -> tuple:
        check_causal(name, load_config(directory))
        decoder, tokenizer = load_decoder(directory, config, options.batch_size, 0)
        vision = load_encoder(directory, decoder) if reads_images(directory) else None
        return decoder, tokenizer, load_chat(directory, tokenizer, decoder.model.config.vocab_size), vision

    decoder, tokenizer, chat, vision = read(name)
    set_decoding_threads(decoder, options.threads, options.batch_size)
    return Model(name, decoder, tokenizer, chat, options.batch_size, options.max_new_tokens, vision)


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    for package in ("starlette", "uvicorn"):
        import_extra(package)
    from gpt_arc.serving.server import HOST, Playground, listen, server_of

    socket = listen(options.port)
    port = socket.getsockname()[1]
    models = [load(name, options) for name in dict.fromkeys(options.models)]
    playground = Playground(models, options.token or secrets.token_urlsafe(24), port)
    print(f"page    http://{HOST}:{port}/#token={playground.token}")
    print(f"API     http://{HOST}:{port}/v1, with the API key {playground.token}", flush=True)
    server_of(playground).run(sockets=[socket])


if __name__ == "__main__":
    entry_point(main)()
