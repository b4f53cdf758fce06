"""The Hugging Face hub: short names of published models, and downloads of the files that we read."""

from pathlib import Path

from gpt_arc.errors import UserError, first_line

PREFIX = "hf:"  # any other repository: hf:OWNER/NAME
NAMES = {name: f"openai-community/{name}" for name in ("openai-gpt", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
CONFIG = ("config.json",)
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json")
TOKENIZER += ("special_tokens_map.json", "generation_config.json", "chat_template.jinja")
WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")


def is_name(name: str) -> bool:
    """Whether `name` is a model on the hub: one of NAMES, or hf:OWNER/NAME."""
    return name in NAMES or name.startswith(PREFIX)


def download(name: str, files: tuple[str, ...]) -> Path:
    """Download the model's files that match the patterns `files`, unless cached, and return their folder.

    Raises UserError if the hub has no such model or can't be reached.
    """
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    repository = NAMES.get(name) or name.removeprefix(PREFIX)
    try:
        folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(files)))
    except GatedRepoError:
        raise UserError(f"{repository} requires you to accept its licence: visit huggingface.co/{repository}") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(f"the Hugging Face hub has no public model {repository}") from None
    except Exception as error:  # each library between here and the network raises its own type
        raise UserError(
            f"{repository} can't be downloaded: connect once, or name a folder that holds its files "
            f"({type(error).__name__}: {first_line(error)})"
        ) from None
    if set(WEIGHTS) <= set(files) and not any(folder.glob("*.safetensors")):  # offline, a part
        raise UserError(f"no safetensors of {repository} are cached: connect once to download them, if there are any")
    return folder
