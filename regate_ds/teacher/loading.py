"""The teacher's model and tokenizer: a Hugging Face folder or a GGUF file, as they lie."""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

GGUF = ".gguf"

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")

_GGUF_PACKAGES = ("gguf", "accelerate")
"""What transformers reads such a file with."""

_GGUF_ERRORS = (ValueError, KeyError, IndexError, OSError, struct.error, NotImplementedError)
"""What a file ends in that is damaged, or of an architecture that transformers does not read."""


def load_teacher(path: Path) -> PreTrainedModel:
    """The causal language model at ``path``; ValueError if there is none, naming the path."""
    if path.suffix == GGUF:
        return _load_gguf(path)
    _require_causal_lm(path)
    with readable_weights(path):
        teacher = AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    return teacher.eval()


def load_teacher_config(path: Path) -> Any:
    """The configuration of the model at ``path``, without its weights; errors as of loading it."""
    if path.suffix == GGUF:
        _require_gguf(path)
        config = _read_gguf(path, AutoConfig)
        _require_causal_config(config, path)
        return config
    _require_causal_lm(path)
    return AutoConfig.from_pretrained(path, local_files_only=True)


def load_teacher_tokenizer(path: Path) -> Any:
    """The tokenizer that belongs to the model at ``path``; ValueError if there is none."""
    if path.suffix == GGUF:
        _require_gguf(path)
        return _read_gguf(path, AutoTokenizer)
    _require_causal_lm(path)
    if not any(file for form in _TOKENIZER_FILES for file in path.glob(form)):
        # For some models transformers would make one without a vocabulary.
        raise ValueError(
            f"teacher.path={path}: holds no tokenizer; put the tokenizer's files beside the weights"
        )
    return AutoTokenizer.from_pretrained(path, local_files_only=True)


def _load_gguf(path: Path) -> PreTrainedModel:
    """Weights unpacked, so that they may be sharded and run on any device."""
    load_teacher_config(path)
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        # Since transformers 5.24 they otherwise stay packed where a kernel for it is installed.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = _read_gguf(path, AutoModelForCausalLM, **options)
    # What is unpacked is a plain model: its name follows from its weights, and it can be saved.
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)
    return model.eval()


def _read_gguf(path: Path, reader: Any, **options: Any) -> Any:
    try:
        return reader.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True, **options
        )
    except _GGUF_ERRORS as error:
        raise ValueError(
            f"teacher.path={path}: cannot be read ({type(error).__name__}: {error}); copy or "
            "download it again, or give a model of another architecture"
        ) from error


def _require_gguf(path: Path) -> None:
    """The file is there, and so is what reads it."""
    if not path.is_file():
        raise ValueError(f"teacher.path={path}: no such file")
    missing = [name for name in _GGUF_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"teacher.path={path}: GGUF files need {' and '.join(missing)}; install them with "
            "pip install 'regate-ds[gguf]'"
        )


def _require_causal_lm(path: Path) -> None:
    if not (path / "config.json").is_file():
        found = ", ".join(sorted(file.name for file in path.glob(f"*{GGUF}")))
        raise ValueError(
            f"teacher.path={path}: holds no config.json; give the folder of a causal language "
            f"model, a GGUF file{found and f' ({found} is here)'}, or null for the student's own "
            "text backbone"
        )
    _require_causal_config(AutoConfig.from_pretrained(path, local_files_only=True), path)


def _require_causal_config(config: Any, path: Path) -> None:
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"teacher.path={path}: is a {config.model_type} model, not a causal language model; "
            "give one, or null for the student's own text backbone"
        )


@contextmanager
def readable_weights(folder: Path) -> Iterator[None]:
    """Name the folder whose weights are damaged: safetensors' own error names no file."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"the weights in {folder} cannot be read ({error}); copy or download them again"
        ) from error
