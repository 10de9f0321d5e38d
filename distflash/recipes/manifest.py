"""`manifest.json`: the digest of every file of a checkpoint, checked before any of them is read.

It detects damage: changed, truncated or missing files, and files of another checkpoint. It is no signature: whoever can
write the files can write their digests. So checkpoints are never unpickled without restrictions.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from distflash.recipes.together import gather, on_lead, together

NAME = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """writer: the program that wrote it. step: steps done. files: relative path -> SHA-256."""

    format: int
    writer: str
    step: int
    files: dict[str, str]


def seal(folder: Path, writer: str, step: int) -> None:
    """Write the manifest of a complete folder. All ranks call, and each hashes a share of the files."""
    names = gather(listing(folder))[0]
    manifest = Manifest(FORMAT, writer, step, digests(folder, names))
    on_lead(lambda: (folder / NAME).write_text(json.dumps(asdict(manifest), indent=1)))


def check(folder: Path) -> Manifest:
    """Check all files against the manifest, and return it. All ranks call, and each hashes a share of the files.

    Raises:
        Refused: on every rank, with the file that is damaged, missing or not listed.
    """
    manifest, names = together(lambda: (read(folder), listing(folder)))[0]
    together(lambda: compare_names(folder, manifest, names))
    found = digests(folder, names)
    together(lambda: compare_digests(folder, manifest, found))
    return manifest


def read(folder: Path) -> Manifest:
    """Read the manifest. Raises a ValueError that names the file if it is missing, invalid or of another format."""
    path = folder / NAME
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: the checkpoint is incomplete, or of an earlier version, whose checkpoints are pickles "
            "and are not read"
        )
    try:
        manifest = Manifest(**read_json(path))
    except TypeError as error:
        raise ValueError(f"{path} is damaged: it is no manifest ({error})") from error
    files = manifest.files if isinstance(manifest.files, dict) else {"": None}
    types = isinstance(manifest.writer, str) and type(manifest.step) is int
    if not types or not all(isinstance(digest, str) for digest in files.values()):
        raise ValueError(f"{path} is damaged: a field has the wrong type")
    if manifest.format != FORMAT:
        raise ValueError(f"{path} has format {manifest.format}, but this version reads format {FORMAT}")
    if folder.name != f"step-{manifest.step:08d}" and not folder.name.startswith("."):
        raise ValueError(f"{path} belongs to step {manifest.step}: the folder was renamed, or the file copied")
    return manifest


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises a ValueError that names the file if it is invalid."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is no JSON ({error})") from error


def compare_names(folder: Path, manifest: Manifest, names: list[str]) -> None:
    if missing := sorted(manifest.files.keys() - set(names)):
        raise ValueError(f"{folder / missing[0]} is missing")
    if extra := sorted(set(names) - manifest.files.keys()):
        raise ValueError(f"{folder / extra[0]} does not belong to the checkpoint: {NAME} does not list it; remove it")


def compare_digests(folder: Path, manifest: Manifest, found: dict[str, str]) -> None:
    for name, digest in found.items():
        if digest != manifest.files[name]:
            raise ValueError(f"{folder / name} is damaged: its SHA-256 is not the one in {NAME}")


def listing(folder: Path) -> list[str]:
    """The relative paths of all files below a folder, except its manifest."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return sorted(str(path) for path in files if str(path) != NAME)


def digests(folder: Path, names: list[str]) -> dict[str, str]:
    """The SHA-256 of each file. Ranks read the files round-robin."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    parts = together(lambda: {name: sha256(folder / name) for name in names[rank::world]})
    found = {name: digest for part in parts for name, digest in part.items()}
    return {name: found[name] for name in names}


def sha256(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path} is no regular file")
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
