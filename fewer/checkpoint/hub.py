"""Models of the Hugging Face hub, through huggingface_hub: cached there, resumed there, usable without a network."""

from __future__ import annotations

from pathlib import Path

from fewer.checkpoint.store import Progress, Silent
from fewer.errors import CheckpointError, DownloadError

WANTED = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]  # never a pickle


def download(name: str, progress: Progress | None = None) -> Path:
    """The folder of the hub's snapshot of `name`; files that are cached are not asked for again.

    Raises DownloadError without a network (and nothing cached), CheckpointError for a repository without safetensors.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    shown = progress or Silent()
    shown.start(f"fetching {name} from the hub", 0)
    try:
        folder = Path(snapshot_download(name, allow_patterns=WANTED))
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"the hub has no model '{name}', or it needs a login: check the name, or set HF_TOKEN"
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as fault:
        raise DownloadError(
            f"'{name}' is not cached and the hub cannot be reached ({type(fault).__name__}): check the network and run "
            "the same command again, or give a local folder"
        ) from None
    finally:
        shown.finish()
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"'{name}' has no safetensors files: choose a repository that has them (never pickle)")
    return folder
