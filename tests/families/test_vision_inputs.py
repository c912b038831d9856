import pickle

import pytest
import torch
from transformers import CLIPImageProcessorPil, LlavaConfig, ViTImageProcessorPil

from regate_ds.families.internvl import InternVLVision
from regate_ds.families.qwen_vl import Qwen2VLVision
from regate_ds.recipe.students.llava import LlavaVision, clip_processor
from regate_ds.recipe.students.qwen2_vl import qwen2_vl_processor
from tests.support.tiny_students import (
    STUDENTS,
    make_image,
    make_internvl,
    make_llava,
    make_qwen2_vl,
)

SIZES = [(24, 24), (20, 31), (64, 40)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("make", STUDENTS.values(), ids=STUDENTS.keys())
def test_an_image_has_as_many_placeholders_as_the_model_makes_features(make, size):
    student = make()
    images = [make_image(*size), make_image(24, 24)]
    with torch.no_grad():
        features = student.model.get_image_features(**student.vision.pixels(images)).pooler_output
    assert [len(f) for f in features] == [student.vision.num_tokens(i.size) for i in images]


def test_the_class_token_counts_only_when_the_model_keeps_it():
    config = LlavaConfig(**make_llava().model.config.to_dict())
    config.vision_feature_select_strategy = "full"
    assert LlavaVision.of(config, clip_processor(24)).num_image_tokens == 9 + 1


def test_a_tower_without_a_class_token_is_counted_right():
    tower = {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16}
    tower |= {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 24, "patch_size": 8}
    text = make_llava().model.config.text_config.to_dict()
    config = LlavaConfig(
        vision_config=tower, text_config=text, vision_feature_select_strategy="full"
    )
    assert LlavaVision.of(config, clip_processor(24)).num_image_tokens == 9


@pytest.mark.parametrize("make", [make_llava, make_qwen2_vl, make_internvl])
def test_vision_inputs_survive_the_way_to_a_loader_worker(make):
    vision = make().vision
    copy = pickle.loads(pickle.dumps(vision))
    images = [make_image(30, 20)]
    assert copy.num_tokens((30, 20)) == vision.num_tokens((30, 20))
    for name, value in vision.pixels(images).items():
        assert torch.equal(copy.pixels(images)[name], value)


def test_images_keep_their_order():
    vision = make_qwen2_vl().vision
    images = [make_image(24, 24), make_image(16, 24)]
    together = vision.pixels(images)
    apart = [vision.pixels([image]) for image in images]
    for name, value in together.items():
        assert torch.equal(value, torch.cat([one[name] for one in apart]))


def test_only_micro_batches_with_images_are_marked_for_multimodal_positions():
    vision = make_qwen2_vl().vision
    ids_BT = torch.tensor([[0, 3, 8]])
    marked = vision.extra_inputs(ids_BT, ids_BT == 3)
    assert marked["mm_token_type_ids"].tolist() == [[0, 1, 0]]
    assert vision.extra_inputs(ids_BT, ids_BT == 99) == {}
    assert make_llava().vision.extra_inputs(ids_BT, ids_BT == 3) == {}


def test_a_processor_without_one_image_size_is_refused_for_llava():
    processor = CLIPImageProcessorPil(size={"shortest_edge": 24}, do_center_crop=False)
    with pytest.raises(ValueError, match="need a processor with one crop size"):
        LlavaVision.of(make_llava().model.config, processor)


def test_a_foreign_processor_is_refused_for_qwen2_vl():
    with pytest.raises(ValueError, match="ViTImageProcessorPil does not fit a qwen2_vl model"):
        Qwen2VLVision.of(make_qwen2_vl().model.config, ViTImageProcessorPil())


def test_a_pixel_limit_below_one_token_is_refused():
    with pytest.raises(ValueError, match="max_pixels=63: must be at least 64, one merged patch"):
        qwen2_vl_processor(make_qwen2_vl().model.config.vision_config, max_pixels=63)


def test_a_processor_that_makes_tiles_is_refused_for_internvl():
    student = make_internvl()
    assert student.vision.num_tokens((32, 32)) == student.vision.num_tokens((64, 8)) == 4
    student.vision.processor.crop_to_patches = True
    cause = "GotOcr2ImageProcessorPil has crop_to_patches=true.* or set data.template=null where"
    with pytest.raises(ValueError, match=cause):
        InternVLVision.of(student.model.config, student.vision.processor)
