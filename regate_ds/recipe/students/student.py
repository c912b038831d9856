"""The student: a multimodal model with its tokenizer and image processor, in one folder.

``LlavaForConditionalGeneration`` (any vision tower with one image size, any Llama-like decoder)
and ``Qwen2VLForConditionalGeneration`` (multimodal rotary positions), loaded from a local folder
or made small from two dicts. ``text_backbone`` is the default teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from regate_ds.recipe.students.vision_inputs import (
    LlavaVision,
    Qwen2VLVision,
    clip_processor,
    qwen2_vl_processor,
    vision_of,
)

_MODEL_CLASSES: dict[str, type[PreTrainedModel]] = {
    "llava": LlavaForConditionalGeneration,
    "qwen2_vl": Qwen2VLForConditionalGeneration,
}

_ONLY_MROPE = {"architectures", "mrope_section", "model_type", "transformers_version"}
"""Keys of a Qwen2-VL text config that its plain-position view does not take over."""


@dataclass(frozen=True)
class Student:
    """A model and what turns records into its inputs."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    vision: LlavaVision | Qwen2VLVision

    @property
    def image_token(self) -> str:
        """The token that stands at each image position."""
        return str(self.tokenizer.convert_ids_to_tokens(self.model.config.image_token_id))

    @property
    def pad_id(self) -> int:
        """Right padding is never seen, so any id will do where the tokenizer has no pad."""
        tokenizer: Any = self.tokenizer
        pad_id = tokenizer.pad_token_id
        return tokenizer.eos_token_id if pad_id is None else pad_id


def build_llava(
    tokenizer: PreTrainedTokenizerFast,
    *,
    text: Mapping[str, Any],
    vision: Mapping[str, Any],
    seed: int | None,
    image_token: str = "<image>",
) -> Student:
    """Make a LLaVA with fresh weights; the last layer's patch features go to the projector.

    With ``seed`` None the model is on "meta": it can be asked, but not run.
    ``text`` and ``vision`` are config dicts with their ``model_type`` (``llama``, ``qwen2``;
    ``clip_vision_model``); vocabulary and special ids come from the tokenizer.
    """
    _require_size("model.vision", vision, "image_size")
    config = LlavaConfig(
        text_config={**text, **_vocabulary(tokenizer)},
        vision_config=dict(vision),
        image_token_index=_token_id(tokenizer, image_token),
        vision_feature_layer=-1,
        tie_word_embeddings=bool(text.get("tie_word_embeddings", False)),
    )
    inputs = LlavaVision.of(config, clip_processor(vision["image_size"]))
    config.image_seq_length = inputs.num_image_tokens
    return Student(_fresh_model(LlavaForConditionalGeneration, config, seed), tokenizer, inputs)


def build_qwen2_vl(
    tokenizer: PreTrainedTokenizerFast,
    *,
    text: Mapping[str, Any],
    vision: Mapping[str, Any],
    seed: int | None,
    image_token: str = "<image>",
) -> Student:
    """Make a Qwen2-VL with fresh weights; ``vision["max_pixels"]`` bounds an image's tokens.

    With ``seed`` None the model is on "meta": it can be asked, but not run.
    ``text["rope_parameters"]`` needs an ``mrope_section`` that sums to half the head size.
    """
    _require_size("model.vision", vision, "max_pixels")
    _require_size("model.text", text, "hidden_size")
    vision = dict(vision)
    max_pixels = int(vision.pop("max_pixels"))
    config = Qwen2VLConfig(
        text_config={**text, **_vocabulary(tokenizer)},
        vision_config={**vision, "hidden_size": text["hidden_size"]},
        image_token_id=_token_id(tokenizer, image_token),
        tie_word_embeddings=bool(text.get("tie_word_embeddings", False)),
    )
    inputs = Qwen2VLVision(qwen2_vl_processor(config.vision_config, max_pixels=max_pixels))
    return Student(_fresh_model(Qwen2VLForConditionalGeneration, config, seed), tokenizer, inputs)


def save_student(student: Student, folder: Path) -> None:
    """Write config, weights (safetensors), tokenizer and image processor into ``folder``."""
    student.model.save_pretrained(folder)
    student.tokenizer.save_pretrained(folder)
    student.vision.processor.save_pretrained(folder)


def load_student(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    weights: bool = True,
) -> Student:
    """Load what ``save_student`` or the model's publisher wrote; nothing is downloaded.

    Without ``weights`` the model is on "meta": it can be asked, but not run.

    Raises:
        ValueError: not a folder with a model, or a model of an unsupported type.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json; give the folder of a saved model")
    config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type not in _MODEL_CLASSES:
        raise ValueError(
            f"{folder} is a {config.model_type} model; students are one of {sorted(_MODEL_CLASSES)}"
        )
    model_class = _MODEL_CLASSES[config.model_type]
    if weights:
        with readable_weights(folder):
            model = model_class.from_pretrained(
                folder, dtype=dtype, attn_implementation=attention, local_files_only=True
            )
    else:
        model = _fresh_model(model_class, config, seed=None)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
    return Student(model, tokenizer, vision_of(config, processor))


@contextmanager
def readable_weights(folder: Path) -> Iterator[None]:
    """Name the folder whose weights are damaged: safetensors' own error names no file."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"the weights in {folder} cannot be read ({error}); copy or download them again"
        ) from error


def vision_tower(model: PreTrainedModel) -> nn.Module:
    """The part that turns pixels into features; a Qwen2-VL's holds its projector as well."""
    inner: Any = model.model
    return inner.visual if model.config.model_type == "qwen2_vl" else inner.vision_tower


def text_backbone(model: PreTrainedModel) -> PreTrainedModel:
    """View the student's decoder and head as a causal LM, without copying a weight.

    The parameters are new objects on the same storage: freezing the view does not freeze the
    student, training the student changes the view. On text it gives the student's logits. For a
    Qwen2-VL it counts plain positions, to which three equal axes amount.
    """
    config = _text_config(model)
    with torch.device("meta"):
        view = AutoModelForCausalLM.from_config(
            config, attn_implementation=model.config._attn_implementation
        )
    decoder = model.model.language_model
    weights = {f"model.{name}": value for name, value in decoder.state_dict().items()}
    weights["lm_head.weight"] = model.lm_head.weight.detach()
    view.load_state_dict(weights, strict=True, assign=True)
    # Where head and embedding are one parameter, an optimiser must see one.
    view.tie_weights()
    # The rotary table is no weight: it is computed from the config, and was left on "meta".
    view.model.rotary_emb = type(view.model.rotary_emb)(config=config).to(model.device)
    return view.eval()


def _text_config(model: PreTrainedModel) -> PreTrainedConfig:
    config = model.config.get_text_config()
    fields = config.to_dict()
    if isinstance(model.config, Qwen2VLConfig):
        fields = {name: value for name, value in fields.items() if name not in _ONLY_MROPE}
        rope = fields["rope_parameters"]
        fields["rope_parameters"] = {k: v for k, v in rope.items() if k not in _ONLY_MROPE}
        config_class = Qwen2Config
    else:
        config_class = type(config)
    fields["tie_word_embeddings"] = model.config.tie_word_embeddings
    return config_class(**{**fields, "dtype": model.dtype})


def _fresh_model(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, seed: int | None
) -> PreTrainedModel:
    """Initialise from ``seed`` alone, leaving the caller's random state as it was."""
    if seed is None:
        with torch.device("meta"):
            return model_class(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config)


def _vocabulary(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """Look up one token.

    Raises:
        ValueError: the tokenizer does not know it.
    """
    if token not in tokenizer.get_vocab():
        raise ValueError(f"the tokenizer has no token {token!r}; add it, or name another")
    return tokenizer.get_vocab()[token]


def _require_size(name: str, given: Mapping[str, Any], key: str) -> None:
    """Look at a size that we read ourselves.

    Raises:
        ValueError: it is missing, or not a whole number above 0.
    """
    if key not in given:
        raise ValueError(f"{name}.{key} is missing; it has no default")
    value = given[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}.{key}={value!r}: must be a whole number above 0")
