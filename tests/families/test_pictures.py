"""What rankings read of pictures, against plain computations in loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from regate_ds.families.attention import measuring_attention
from regate_ds.families.pictures import pictures_of
from regate_ds.families.table import family_of
from tests.support.tiny_students import (
    CLIP,
    MROPE,
    TEXT,
    make_image,
    make_llava,
    make_qwen2_vl,
)

IMAGES = [make_image(24, 24, seed=1), make_image(16, 24, seed=2), make_image(48, 40, seed=3)]


def llava_inputs() -> dict[str, torch.Tensor]:
    return make_llava().vision.pixels(IMAGES)


def qwen_inputs() -> dict[str, torch.Tensor]:
    return make_qwen2_vl().vision.pixels(IMAGES)


def make_siglip_llava() -> Any:
    vision = {**CLIP, "model_type": "siglip_vision_model"}
    config = LlavaConfig(
        vision_config=vision,
        text_config=make_llava().model.config.text_config.to_dict(),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config)


def make_qwen2_5_vl() -> Any:
    """Windows of 2 x 2 merged tokens; the second of three layers attends to whole images."""
    vision = {"depth": 3, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32}
    vision |= {"intermediate_size": 32, "window_size": 16, "fullatt_block_indexes": [1]}
    text = {**TEXT, "rope_parameters": MROPE, "vocab_size": 40}
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    )


MODELS = {
    "llava": (lambda: make_llava().model, llava_inputs, [9, 9, 9]),
    "llava-siglip": (make_siglip_llava, llava_inputs, [9, 9, 9]),
    "qwen2-vl": (lambda: make_qwen2_vl().model, qwen_inputs, [9, 6, 6]),
    "qwen2.5-vl": (make_qwen2_5_vl, qwen_inputs, [9, 6, 6]),
}


@pytest.fixture(params=MODELS)
def case(request) -> tuple[Any, dict[str, torch.Tensor], list[int]]:
    make, inputs, sizes = MODELS[request.param]
    found = inputs()
    if "image_grid_thw" in found:
        sizes = (found["image_grid_thw"].prod(1) // 4).tolist()
        assert len(set(sizes)) > 1
    return make(), found, sizes


def is_attention(module: torch.nn.Module) -> bool:
    return hasattr(module, "qkv") or hasattr(module, "q_proj")


def queries_and_keys(module: Any, call: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, S, h, D] each, after rotation."""
    x = call["hidden_states"]
    if hasattr(module, "q_proj"):
        heads = (*x.shape[:2], module.num_heads, -1)
        return module.q_proj(x).view(heads), module.k_proj(x).view(heads)
    q, k, _ = module.qkv(x).reshape(len(x), 3, module.num_heads, -1).unbind(1)
    cos, sin = (part[:, None] for part in call["position_embeddings"])
    half = q.shape[-1] // 2

    def rotated(y: torch.Tensor) -> torch.Tensor:
        return y * cos + torch.cat([-y[..., half:], y[..., :half]], dim=-1) * sin

    return rotated(q)[None], rotated(k)[None]


def received(q: torch.Tensor, k: torch.Tensor, spans: list[tuple[int, int]]) -> torch.Tensor:
    """[S] of one sequence, whose positions attend within their span."""
    num_positions, num_heads, width = q.shape
    total = torch.zeros(num_positions, dtype=torch.float64)
    for start, end in spans:
        for query in range(start, end):
            for head in range(num_heads):
                scores = [float(q[query, head] @ k[key, head]) for key in range(start, end)]
                powers = [math.exp(score / math.sqrt(width)) for score in scores]
                for key, power in zip(range(start, end), powers, strict=True):
                    total[key] += power / sum(powers) / num_heads
    return total


def calls_of(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[list[Any], torch.Tensor | None]:
    """Each attention layer with its arguments, and the embedded patches in reading order."""
    calls, embedded = [], []

    def note(module, args, kwargs):
        names = ("hidden_states", "cu_seqlens")
        calls.append((module, {**dict(zip(names, args)), **kwargs}))

    tower = family_of(model).tower_of(model)
    hooks = [
        m.register_forward_pre_hook(note, with_kwargs=True)
        for m in tower.modules()
        if is_attention(m)
    ]
    if hasattr(tower, "patch_embed"):
        hooks += [tower.patch_embed.register_forward_hook(lambda m, a, out: embedded.append(out))]
    with torch.no_grad():
        model.eval().get_image_features(**inputs)
    for hook in hooks:
        hook.remove()
    return calls, embedded[0] if embedded else None


def plain_attention(model: Any, inputs: dict[str, torch.Tensor], sizes: list[int]):
    """[L, n] of each image, in loops."""
    calls, embedded = calls_of(model, inputs)
    if embedded is None:
        num_cut = int(model.config.vision_feature_select_strategy == "default")
        images = []
        for image in range(len(sizes)):
            layers = []
            for module, call in calls:
                q, k = (part[image] for part in queries_and_keys(module, call))
                layers.append(received(q, k, [(0, len(q))])[num_cut:])
            images.append(torch.stack(layers))
        return images
    # Where a patch went is read off its embedding, which the first layer's norm takes.
    tower, place = family_of(model).tower_of(model), list(range(len(embedded)))
    first = tower.blocks[0].norm1(embedded)
    for position, row in enumerate(calls[0][1]["hidden_states"]):
        (place[position],) = (first - row).abs().amax(1).lt(1e-6).nonzero().flatten().tolist()
    layers = []
    for module, call in calls:
        q, k = (part[0] for part in queries_and_keys(module, call))
        ends = call["cu_seqlens"].tolist()
        by_position = received(q, k, list(zip(ends, ends[1:])))
        by_patch = torch.empty_like(by_position)
        by_patch[torch.tensor(place)] = by_position
        layers.append(torch.stack([by_patch[i : i + 4].sum() for i in range(0, len(place), 4)]))
    return list(torch.stack(layers).split(sizes, dim=1))


def test_the_attention_of_a_token_is_what_its_patches_receive(case):
    model, inputs, sizes = case
    with torch.no_grad():
        plain = plain_attention(model, inputs, sizes)
    found = pictures_of(model, inputs, sizes, "attention")
    for picture, expected_Ln in zip(found, plain, strict=True):
        assert picture.attention_Ln.dtype == torch.float32
        assert picture.features_nF is picture.pixels_nP is None
        torch.testing.assert_close(picture.attention_Ln.double(), expected_Ln, rtol=1e-4, atol=1e-5)


def test_the_layers_of_windowed_attention_are_told_apart():
    """Else the test above would not see whether windows are followed."""
    calls, _ = calls_of(make_qwen2_5_vl(), qwen_inputs())
    assert [len(call["cu_seqlens"]) for _, call in calls] == [9, 4, 9]


def test_measuring_changes_neither_the_features_nor_the_tower(case):
    model, inputs, _ = case
    model.train()
    model.model.get_decoder().eval()
    tower = family_of(model).tower_of(model)
    before = tower.config._attn_implementation
    with torch.no_grad():
        expected = model.get_image_features(**inputs).pooler_output
        with measuring_attention(tower):
            measured = model.get_image_features(**inputs).pooler_output
    for one, other in zip(measured, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    pictures_of(model, inputs, [len(one) for one in expected], "attention")
    assert tower.config._attn_implementation == before
    assert tower.training
    assert not model.model.get_decoder().training


def test_features_are_what_the_projector_gives(case):
    model, inputs, sizes = case
    with torch.no_grad():
        expected = model.eval().get_image_features(**inputs).pooler_output
    found = pictures_of(model, inputs, sizes, "features")
    for picture, features_nF in zip(found, expected, strict=True):
        assert torch.equal(picture.features_nF, features_nF)


def test_the_pixels_of_a_llava_token_are_its_patch():
    inputs = llava_inputs()
    found = pictures_of(make_llava().model, inputs, [9, 9, 9], "pixels")
    for picture, image_3HW in zip(found, inputs["pixel_values"], strict=True):
        for token in range(9):
            top, left = 8 * (token // 3), 8 * (token % 3)
            patch = image_3HW[:, top : top + 8, left : left + 8].flatten()
            assert torch.equal(picture.pixels_nP[token], patch)


def test_the_pixels_of_a_qwen2_vl_token_are_those_of_a_square_of_the_image():
    """Two by two patches of 4 x 4: 8 x 8 pixels, each twice in time."""
    inputs = qwen_inputs()
    sizes = (inputs["image_grid_thw"].prod(1) // 4).tolist()
    picture = pictures_of(make_qwen2_vl().model, inputs, sizes, "pixels")[0]
    pixels = torch.tensor(list(IMAGES[0].convert("RGB").getdata()), dtype=torch.float32)
    image_HW3 = pixels.view(24, 24, 3) / 255
    processor = make_qwen2_vl().vision.processor
    image_HW3 = (image_HW3 - torch.tensor(processor.image_mean)) / torch.tensor(processor.image_std)
    for token in range(sizes[0]):
        top, left = 8 * (token // 3), 8 * (token % 3)
        square = image_HW3[top : top + 8, left : left + 8].flatten().repeat(2).sort().values
        found = picture.pixels_nP[token].sort().values
        torch.testing.assert_close(found, square, rtol=1e-4, atol=1e-5)


def test_a_class_token_among_the_image_tokens_has_no_pixels():
    model = make_llava().model
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(ValueError, match="has 10 tokens, but 9 patches: with vision_feature_sel"):
        pictures_of(model, llava_inputs(), [10, 10, 10], "pixels")
    assert len(pictures_of(model, llava_inputs(), [10] * 3, "attention")[0].attention_Ln[0]) == 10


@pytest.mark.parametrize("reads", ["pixels", "features", "attention"])
def test_another_number_of_placeholders_than_tokens_is_refused(reads):
    with pytest.raises(ValueError, match=r"makes \[9, 9, 9\] tokens of images that have \[9, 9, 7"):
        pictures_of(make_siglip_llava(), llava_inputs(), [9, 9, 7], reads)
