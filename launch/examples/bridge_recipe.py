"""A recipe for Megatron-Bridge that needs no download: a tiny Qwen3-VL on images made up.

    python launch/examples/bridge_recipe.py FOLDER

computes the teacher's losses of its data set, and writes FOLDER/regate.yaml for megatron_bridge.py.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.bridge.data.base import DatasetBuildContext, DatasetProvider
from megatron.bridge.data.datasets.direct_sft import DirectSFTDataset
from megatron.bridge.models.qwen_vl.qwen3_vl_provider import Qwen3VLModelProvider
from megatron.bridge.recipes.common import _pretrain_common
from megatron.bridge.training.config import ConfigContainer, TokenizerConfig
from megatron.bridge.training.utils.visual_inputs import GenericVisualInputs
from torch import Tensor
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig

from regate_ds import Keyed, Teacher, score_dataset
from regate_ds.adapters.megatron.samples import TeacherItems, teacher_batch

WORDS, LENGTH, NUM_SAMPLES, PATCHES = 64, 32, 64, 16
IMAGE, VIDEO, START = 61, 62, 63
STEPS, ROWS, BATCH = 4, 2, 8


def collate(examples: list[dict[str, Any]], processor: None) -> dict[str, Any]:
    """Make a batch: an image of four tokens, a prompt, and an answer that repeats the prompt."""
    rows = [_row(example["seed"]) for example in examples]
    texts = torch.stack([text for text, _, _ in rows])
    grid = torch.tensor([[1, 4, 4]] * len(rows))
    pixels = torch.cat([pixels for _, _, pixels in rows])
    return {
        "input_ids": texts[:, :-1].contiguous(),
        "labels": texts[:, 1:].contiguous(),
        "loss_mask": torch.stack([mask for _, mask, _ in rows]),
        "position_ids": torch.arange(LENGTH).expand(len(rows), -1).contiguous(),
        "visual_inputs": GenericVisualInputs(pixel_values=pixels, image_grid_thw=grid),
    }


def _row(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = int(torch.randint(3, 12, (), generator=generator))
    prompt = torch.randint(1, IMAGE, (size,), generator=generator)
    text = torch.cat([torch.tensor([START, *[IMAGE] * 4]), prompt.repeat(2)])
    mask = torch.zeros(LENGTH)
    mask[4 + size : 4 + 2 * size] = 1.0
    padded = torch.nn.functional.pad(text, (0, LENGTH + 1 - len(text)))
    return padded, mask, torch.randn(PATCHES, 12, generator=generator)


@dataclass
class Repetitions(DatasetProvider):
    """A data set by Bridge's contract; it says its own collate function, as Bridge's own do."""

    seq_length: int = LENGTH
    dataloader_type: Any = "single"
    num_workers: int = 0
    persistent_workers: bool = False
    pin_memory: bool = False

    def build_datasets(self, context: DatasetBuildContext | None) -> tuple[Any, None, None]:
        examples = [{"seed": number} for number in range(NUM_SAMPLES)]
        return DirectSFTDataset(examples, NUM_SAMPLES, None, collate_impl=collate), None, None


def tiny() -> ConfigContainer:
    config = _pretrain_common()
    tower = Qwen3VLVisionConfig(
        depth=2,
        hidden_size=16,
        intermediate_size=24,
        num_heads=2,
        patch_size=2,
        temporal_patch_size=1,
        out_hidden_size=32,
        num_position_embeddings=16,
        deepstack_visual_indexes=[0, 1],
    )
    config.model = Qwen3VLModelProvider(
        num_layers=6,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=WORDS,
        seq_length=LENGTH,
        normalization="RMSNorm",
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        mrope_section=[2, 1, 1],
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_config=tower,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=not torch.cuda.is_available(),
    )
    config.dataset = Repetitions()
    config.tokenizer = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=WORDS)
    config.train.train_iters, config.train.global_batch_size = STEPS, BATCH
    config.train.micro_batch_size = ROWS
    config.validation.eval_iters, config.validation.eval_interval = 0, None
    config.scheduler.lr_warmup_iters, config.logger.log_interval = 0, 1
    config.logger.tensorboard_dir = config.checkpoint.save = config.checkpoint.load = None
    return without_fusions(config)


def without_fusions(config: ConfigContainer) -> ConfigContainer:
    """Return the configuration as it runs on CPUs, too: fp32, gloo, nothing fused or overlapped."""
    for name in ("masked_softmax", "bias_activation", "bias_dropout", "gradient_accumulation"):
        setattr(config.model, f"{name}_fusion", False)
    config.model.cross_entropy_loss_fusion = config.model.persist_layer_norm = False
    config.model.batch_p2p_comm = False
    config.mixed_precision = None
    for section in (config.optimizer, config.ddp):
        section.use_distributed_optimizer = section.overlap_param_gather = False
    config.optimizer.bf16 = config.optimizer.use_precision_aware_optimizer = False
    config.ddp.overlap_grad_reduce = False
    config.dist.use_gloo_process_groups = False
    if not torch.cuda.is_available():
        config.dist.distributed_backend = "gloo"
    return config


def score(folder: Path) -> None:
    """Compute the teacher's losses. It should be the student's text model; this one is random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, num_hidden_layers=1, **sizes))
    dataset, _, _ = Repetitions().build_datasets(None)
    teacher = Teacher(model=model, pad_id=0, image_token_id=IMAGE)
    score_dataset(Keyed(TeacherItems(dataset), "train"), teacher_batch, teacher, folder / "store")
    (folder / "regate.yaml").write_text(
        "elision: {schedule: {warmup: 1}, images: {keep_share: 0.5}}\n"
        f"reference: {folder / 'store'}\n"
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: bridge_recipe.py FOLDER")
    score(Path(sys.argv[1]))
