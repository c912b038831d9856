"""Token elision inside causal and multimodal language models of transformers.

`gates.py` replaces the forward methods of one model, `attention.py` bounds attention among kept
tokens, `empty_image.py` runs the vision tower where there is no image, and `support.py` refuses
models that elision would compute wrongly. These files may import torch and transformers, but not
DeepSpeed or Megatron. Start at `attach_model` in `gates.py`.
"""
