"""Corpora of the Hugging Face hub, shared by the scripts that prepare them."""

from pathlib import Path

from pydantic.dataclasses import dataclass

from gpt_arc.data.documents import Documents, Files, HubDocuments, find_files
from gpt_arc.data.prepare import CorpusSettings, prepare_documents
from gpt_arc.errors import UserError
from gpt_arc.settings import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HubSettings(CorpusSettings):
    """Which rows of a dataset become a corpus."""

    dataset: str
    """OWNER/NAME of a dataset of texts on the Hugging Face hub, or a folder laid out like one."""
    name: str | None = None
    """Name of the dataset, written to data/NAME. None: as on the hub, without the owner."""
    config: str | None = None
    """Its configuration, also called subset. None: the only one, or its default."""
    hub_split: str = "train"
    """Which of its splits to stream."""
    field: str = "text"
    """Column with the text."""
    branch: str | None = None
    """Branch, tag or commit. None: the main branch, at the commit that it has when the preparation begins."""
    input: tuple[str, ...] = ()
    """Its parquet files, or folders of them, instead of the hub. Empty: stream it."""

    def documents(self) -> Documents:
        if self.input:
            self._refuse("--input names files", hub_split="train", branch=None)
            return Files(find_files(self.input), self.field)
        if Path(self.dataset).is_dir():
            self._refuse(f"{self.dataset} is a folder", branch=None)
        options = {} if self.config is None else {"name": self.config}
        return HubDocuments(self.dataset, self.field, self.hub_split, self.branch, **options)

    def _refuse(self, reason: str, **defaults: str | None) -> None:
        """Raises UserError for settings that would be ignored."""
        for name, default in defaults.items():
            if getattr(self, name) != default:
                raise UserError(f"{reason}, so there is nothing to choose with --{name}: leave it out")


def prepare_from_hub(settings: HubSettings) -> str:
    """Writes data/NAME from a corpus of the hub, and returns NAME."""
    name = settings.name or settings.dataset.rstrip("/").split("/")[-1]
    prepare_documents(settings.documents(), settings, name)
    return name
