"""Adapters put the method into a user's framework, which the code calls the host.

A folder serves one kind of host: `huggingface/` changes a model, `torch/` serves training loops of
the user's own around it, `deepspeed/` its pipelines, `trainers/` Trainer classes, `megatron/`
Megatron-core (without a GPU: `megatron_on_cpu/`), and the files beside this one are shared by these
folders. An adapter may import its framework, `session.py`, the rooms below that and an adapter it
builds on, but never `recipe/`. Start at `torch/attach.py` or `megatron/attach.py`, which hold the
function that a user calls.
"""
