"""Load the teacher's model and tokenizer from a Hugging Face folder or a GGUF file."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

GGUF = ".gguf"

_ADAPTERS = "adapter_config.json"

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")

_GGUF_PACKAGES = ("gguf", "accelerate")
"""Packages that transformers needs to read a GGUF file."""

_GGUF_ERRORS = (
    ArithmeticError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
    struct.error,
)
"""Errors of transformers for a file that is damaged or of an architecture that it cannot read."""

_DAMAGED = (json.JSONDecodeError, StrictDataclassError, UnicodeDecodeError)
"""Errors for a file of a model's folder that is damaged; they do not name it."""

_TELLING = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""What makes transformers return the names of weights that it could not load, in place of a table
in the log."""


def load_teacher(path: Path) -> PreTrainedModel:
    """Load the causal language model at ``path``. ValueError, naming the path, if there is none."""
    if path.suffix == GGUF:
        return _load_gguf(path)
    _require_causal_lm(path)
    return load_weights(AutoModelForCausalLM, path).eval()


def load_teacher_config(path: Path) -> Any:
    """Load the configuration of the model at ``path``, without its weights. ValueError as above."""
    if path.suffix == GGUF:
        _require_gguf(path)
        config = _read_gguf(path, AutoConfig)
        _require_causal_config(config, path)
        _require_tensors(config, path)
        return config
    _require_causal_lm(path)
    return read_files(AutoConfig, path)


def load_teacher_tokenizer(path: Path) -> Any:
    """Load the tokenizer of the model at ``path``. ValueError if there is none."""
    if path.suffix == GGUF:
        _require_gguf(path)
        return _read_gguf(path, AutoTokenizer)
    _require_causal_lm(path)
    if not any(file for form in _TOKENIZER_FILES for file in path.glob(form)):
        # For some models, transformers would make a tokenizer without a vocabulary.
        raise ValueError(
            f"teacher.path={path}: holds no tokenizer; put the tokenizer's files beside the weights"
        )
    return read_files(AutoTokenizer, path)


def read_files(reader: Any, folder: Path, **options: Any) -> Any:
    """Return a folder's configuration, tokenizer or processor, as a class of transformers reads it.

    ValueError, naming the folder, for files that are damaged.
    """
    try:
        return reader.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:
        if not isinstance(error, _DAMAGED) and not _is_of_tokenizers(error):
            raise
        raise ValueError(
            f"{folder}: cannot be read by {reader.__name__} ({_cause(error)}); copy its files "
            "again, or correct them"
        ) from error


def _is_of_tokenizers(error: Exception) -> bool:
    """Return whether the error is of the library of tokenizers, whose errors have no type."""
    return type(error) is Exception


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _load_gguf(path: Path) -> PreTrainedModel:
    """Load a GGUF file and unpack its weights, so that they can be sharded and run anywhere."""
    load_teacher_config(path)
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        # Since transformers 5.24, weights otherwise stay packed if a kernel for them is installed.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model, told = _read_gguf(path, AutoModelForCausalLM, **_TELLING, **options)
    require_all_weights(told, path)
    # The unpacked model is a plain one: its name follows from its weights, and it can be saved.
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)
    return model.eval()


def _read_gguf(path: Path, reader: Any, **options: Any) -> Any:
    try:
        return reader.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True, **options
        )
    except Exception as error:
        if not isinstance(error, _GGUF_ERRORS) and not _is_of_tokenizers(error):
            raise
        raise ValueError(
            f"teacher.path={path}: cannot be read ({_cause(error)}); copy or download it again, or "
            "give a model of another architecture"
        ) from error


def _require_tensors(config: Any, path: Path) -> None:
    """Refuse, by ValueError, a header of more layers than tensors: they would be made first."""
    with path.open("rb") as file:
        (num_tensors,) = struct.unpack("<8xQ", file.read(16))
    if config.num_hidden_layers > num_tensors:
        raise ValueError(
            f"teacher.path={path}: tells of {config.num_hidden_layers} layers but of {num_tensors} "
            "tensors; copy or download it again"
        )


def _require_gguf(path: Path) -> None:
    """Refuse a file that is not there, and name packages that are missing to read it."""
    if not path.is_file():
        raise ValueError(f"teacher.path={path}: no such file; give the path of a GGUF file")
    missing = [name for name in _GGUF_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"teacher.path={path}: GGUF files need {' and '.join(missing)}; install them with "
            "pip install 'regate-ds[gguf]'"
        )


def refuse_adapters(folder: Path) -> None:
    """Refuse, by ValueError, a folder of adapters of PEFT, alone or beside a whole model.

    transformers would put them into the model, and then tell nothing of weights that this lacks.
    """
    if (folder / _ADAPTERS).is_file():
        raise ValueError(
            f"{folder} holds adapters of PEFT ({_ADAPTERS}), which are not read; merge them into "
            "their model (merge_and_unload, then save_pretrained) and give its folder, or move "
            "them out of this one"
        )


def _require_causal_lm(path: Path) -> None:
    refuse_adapters(path)
    if not (path / "config.json").is_file():
        found = ", ".join(sorted(file.name for file in path.glob(f"*{GGUF}")))
        raise ValueError(
            f"teacher.path={path}: holds no config.json; give the folder of a causal language "
            f"model, a GGUF file{found and f' ({found} is here)'}, or null for the student's own "
            "text backbone"
        )
    _require_causal_config(read_files(AutoConfig, path), path)


def _require_causal_config(config: Any, path: Path) -> None:
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"teacher.path={path}: is a {config.model_type} model, not a causal language model; "
            "give one, or null for the student's own text backbone"
        )


def load_weights(model_class: Any, folder: Path, **options: Any) -> Any:
    """Load a model with all of its weights.

    ValueError names a folder whose weights are damaged, which no error below does, or that lacks
    some of the model's, which transformers draws at random.
    """
    try:
        model, told = model_class.from_pretrained(
            folder, local_files_only=True, **_TELLING, **options
        )
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(
            f"the weights in {folder} cannot be read ({error}); copy or download them again"
        ) from error
    require_all_weights(told, folder)
    return model


def require_all_weights(told: Mapping[str, Any], path: Path) -> None:
    """Refuse, by ValueError, a model of whose weights some were not in the file, or of other sizes.

    told: what ``from_pretrained(**_TELLING)`` returns beside the model.
    """
    missing, others = sorted(told["missing_keys"]), sorted(told["mismatched_keys"])
    if missing:
        raise ValueError(
            f"the weights in {path} lack {_some(missing)} of the model, which would be random; "
            "copy or download it again, or save the whole model"
        )
    if others:
        sizes = [f"{name} {list(found)} for {list(asked)}" for name, found, asked in others]
        raise ValueError(
            f"the weights in {path} do not fit its config, such as {_some(sizes)}; copy or "
            "download it again, or correct its config"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
