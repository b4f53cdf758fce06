"""Prepare TinyShakespeare, 1.1 MB of Shakespeare's plays, as characters.

python prepare/tinyshakespeare.py                       downloads it
python prepare/tinyshakespeare.py --input FILE          without a network
"""

if __name__ == "__main__":
    import gpt_arc.startup  # noqa: F401


import hashlib
import sys
import urllib.error
import urllib.request
from pathlib import Path

from pydantic.dataclasses import dataclass

from gpt_arc.data.documents import Text, read_text
from gpt_arc.data.prepare import CorpusSettings, prepare_documents
from gpt_arc.errors import UserError, entry_point
from gpt_arc.files import command
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass(frozen=True, config=STRICT)
class Options:
    input: Path | None = None
    """A file with the text. None: download it."""
    overwrite: bool = False
    """Replace data/tinyshakespeare."""


def download() -> str:
    try:
        with urllib.request.urlopen(URL, timeout=30) as response:
            return response.read().decode("utf-8")
    except (urllib.error.URLError, OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"TinyShakespeare can't be downloaded ({reason}): give the file with "
            f"`{command('prepare/tinyshakespeare.py', '--input', 'FILE')}`, or train on the Python manual, which needs "
            f"no download: `{command('train.py', 'configs/quickstart.toml')}`"
        ) from None


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    text = read_text(options.input) if options.input else download()
    digest = hashlib.sha256(text.encode()).hexdigest()
    if digest != SHA256:
        raise UserError(
            f"{options.input or URL} is not TinyShakespeare: its SHA-256 is {digest[:12]}..., not {SHA256[:12]}...; "
            f"prepare other texts with `{command('prepare/text.py')}`"
        )
    settings = CorpusSettings(tokenizer="char", overwrite=options.overwrite)
    prepare_documents(Text(text, "TinyShakespeare"), settings, "tinyshakespeare")


if __name__ == "__main__":
    entry_point(main)()
