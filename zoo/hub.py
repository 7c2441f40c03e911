"""The Hugging Face hub, through huggingface_hub: only what a model needs is downloaded, and only that is
uploaded.

HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE work as everywhere. Code, pickles and sub-folders of a
repository are never fetched.
"""

from collections.abc import Sequence
from pathlib import Path

from zoo.files import read_json
from zoo.progress import download_bars

FACTS = ["*.json", "merges.txt", "*.tiktoken", "*.jinja"]  # of a model and its tokenizer, without weights
WANTED = ["*.safetensors", *FACTS, "LICENSE*"]


def download(name: str, revision: str | None = None, wanted: Sequence[str] = WANTED) -> Path:
    """The folder of a hub id, or id@revision, in the hub's cache. Raises FileNotFoundError in one line."""
    from huggingface_hub import snapshot_download

    repo, _, pinned = name.partition("@")
    if pinned and revision and pinned != revision:
        raise ValueError(f"two revisions of {repo}: {pinned} and {revision}")
    revision = revision or pinned or None
    try:
        folder = snapshot_download(repo, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*"],
                                   tqdm_class=download_bars())  # fmt: skip
    except Exception as error:  # of the network, the hub, its client or the disk: many kinds
        what = f"{name} at revision {revision}" if revision else name
        raise FileNotFoundError(f"cannot get {what} from the hub: {one_line(error)}") from None
    read_json(Path(folder) / "config.json")
    return Path(folder)


def push_to_hub(folder: str | Path, repo_id: str, *, private: bool = True,
                message: str = "Upload model") -> str:  # fmt: skip
    """Upload a model folder as one commit and return its address. It is verified first; optimiser states
    stay here.

    The repository is created if need be, private unless asked otherwise. Raises ValueError or OSError in
    one line.
    """
    from huggingface_hub import HfApi

    from zoo.checkpoint import entries

    folder = Path(folder)
    read_json(folder / "config.json")
    entries(folder)
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=[*WANTED, "README.md"],
                                   commit_message=message,
                                   ignore_patterns=["*/*", "state*", "not-finite*"])  # fmt: skip
    except Exception as error:  # as above
        raise OSError(f"cannot upload {folder} to {repo_id}: {one_line(error)}") from None
    return str(commit.commit_url)


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."
