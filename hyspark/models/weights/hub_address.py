"""Addresses on the Hugging Face Hub: hf://OWNER/NAME is downloaded to its cache, by its own library."""

import re
from pathlib import Path
from typing import Any

from hyspark.utils.text import first_line

ADDRESS = re.compile(
    r"hf:/{1,2}(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/@]+))?(?:/(?P<file>[^@]+))?"
)
"""One slash will do, since a Path has lost the other."""
FIRST_READ = ("README.md", "config.json", "*.safetensors", "*.safetensors.index.json")
THEN_READ = ("*.bin", "*.bin.index.json", "*.pth", "*.pt", "*.ckpt")
"""Names of files to download: first those that cannot execute anything, with the model card, which states the licence;
others where the first ones hold no weights.
"""
IN_FOLDERS = "*/*"
"""Files in folders of a repository: parts of other programs, copies in other precisions."""


def local_path(source: str | Path, **options: Any) -> Path:
    """Return the path on this machine of a file or folder, or of an address on the Hub.

    Args:
        source: a path, or hf://OWNER/NAME[@REVISION], or hf://OWNER/NAME[@REVISION]/FILE. A revision is a branch, a tag
            or a commit.
        **options: those of huggingface_hub.snapshot_download, for an address: token, cache_dir and others.

    Returns:
        The path itself; for a repository the folder of its files in the cache of huggingface_hub.

    Raises:
        FileNotFoundError: there is no such repository, revision or file; or there is no network, and the cache does not
            hold it.
        PermissionError: the repository is gated.
        OSError: the download failed.
        ValueError: it is an address of another form.
    """
    if not is_address(source):
        return Path(source)
    shown = f"hf://{str(source).removeprefix('hf:').lstrip('/')}"
    found = ADDRESS.fullmatch(str(source))
    if not found or ".." in str(source).split("/"):
        raise ValueError(f"{shown}: expected hf://OWNER/NAME or hf://OWNER/NAME@REVISION, a file may follow as /FILE")
    repo, file = found["repo"], found["file"]
    options["revision"] = found["revision"] or options.get("revision")
    if file:
        parts = file.replace(".index.json", "-*") if file.endswith(".index.json") else file
        path = download(repo, shown, (file, parts), (), **options) / file
        if not path.is_file():
            raise FileNotFoundError(f"{shown}: no such file in the repository; see https://huggingface.co/{repo}/tree")
        return path
    folder = download(repo, shown, FIRST_READ, (IN_FOLDERS,), **options)
    if not any(folder.glob("*.safetensors")):
        folder = download(repo, shown, (*FIRST_READ, *THEN_READ), (IN_FOLDERS,), **options)
    return folder


def is_address(source: str | Path) -> bool:
    """Whether a source is an address on the Hub."""
    return str(source).startswith("hf:/")


def download(repo: str, shown: str, patterns: tuple[str, ...], ignored: tuple[str, ...], **options: Any) -> Path:
    """Download files of a repository, or find them in the cache; errors as for `local_path`.

    Args:
        repo: OWNER/NAME.
        shown: what messages call it.
        patterns: names of the files.
        ignored: names of files among them that are not read.
        **options: see `local_path`.

    Returns:
        The folder of the files.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        found: str = huggingface_hub.snapshot_download(
            repo, allow_patterns=[*patterns], ignore_patterns=[*ignored], **options
        )
        return Path(found)
    except errors.HFValidationError as error:
        raise ValueError(f"{shown}: expected hf://OWNER/NAME ({first_line(error)})") from error
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{shown}: the repository is gated; accept its terms at https://huggingface.co/{repo}, then `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{shown}: no such repository on the Hub, or a private one; check the name, or `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{shown}: the repository has no revision {options.get('revision')}; its branches, tags and commits are at "
            f"https://huggingface.co/{repo}/tree/main"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        offline = huggingface_hub.constants.HF_HUB_OFFLINE or options.get("local_files_only")
        why = "downloads are off (HF_HUB_OFFLINE or local_files_only)" if offline else "the Hub cannot be reached"
        revision = f" (revision {options['revision']})" if options.get("revision") else ""
        raise FileNotFoundError(
            f"{shown}: not in the cache of huggingface_hub, and {why}; run `hf download {repo}`{revision} where there "
            "is a network, or give a folder with its files"
        ) from error
    except OSError as error:  # the server's answer, a full disk
        raise OSError(f"{shown}: the download failed: {first_line(error)}") from error
