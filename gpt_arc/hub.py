"""The Hugging Face hub: short names of published models, and the files of theirs that are used."""

from pathlib import Path

from gpt_arc.errors import UserError, first_line

PREFIX = "hf:"  # any other repository: hf:OWNER/NAME
NAMES = {name: f"openai-community/{name}" for name in ("openai-gpt", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
CONFIG = ("config.json",)
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt")
WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")


def is_name(name: str) -> bool:
    """Whether `name` means a model on the hub: a short name of NAMES, or hf:OWNER/NAME."""
    return name in NAMES or name.startswith(PREFIX)


def download(name: str, files: tuple[str, ...]) -> Path:
    """The folder that holds those of `files` (patterns) that the hub's model has, downloaded once, then kept.

    Raises UserError if the hub doesn't know the model or can't be reached.
    """
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    repository = NAMES.get(name) or name.removeprefix(PREFIX)
    try:
        folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(files)))
    except GatedRepoError:
        raise UserError(f"{repository} asks for its licence to be accepted: at huggingface.co/{repository}") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(f"the Hugging Face hub has no public model {repository}") from None
    except Exception as error:  # every library between here and the network raises its own
        raise UserError(
            f"{repository} can't be downloaded: connect once, or name a folder that holds its files "
            f"({type(error).__name__}: {first_line(error)})"
        ) from None
    if set(WEIGHTS) <= set(files) and not any(folder.glob("*.safetensors")):  # offline, it may be a part
        raise UserError(f"no safetensors of {repository} are here: connect once, if it has its weights in that form")
    return folder
