"""Token elision inside causal and multimodal language models of transformers.

`gates.py` replaces the forward methods of one model. What its layers are given instead of the
host's arguments is in `layer_inputs.py`, their masks in `attention.py`, image features that are
added between layers in `deepstack.py`, and the MLP branch alone in `mlp.py`. `empty_image.py` runs
the vision tower where there is no image. `support.py` refuses models, and `calls.py` calls, that
elision would compute wrongly. These files may import torch and transformers, but not DeepSpeed or
Megatron. Start at `attach_model` in `gates.py`.
"""
