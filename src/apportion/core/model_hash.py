"""What a model is, as one number: measurements of it are tied to that. Plain Python."""

from __future__ import annotations

import hashlib
from pathlib import Path


def model_hash(folder: Path) -> str:
    """blake2b over the files that make a model answer as it does: config, tokenizer, weights; names and contents, in order of names."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.jinja"), *folder.glob("*.model"), *folder.glob("*.safetensors")]):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
