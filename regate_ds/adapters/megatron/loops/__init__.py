"""ReGATE in training loops around Megatron-core that the user does not edit.

`deferred.py` attaches at the first training step; `megatron_lm.py` and `megatron_bridge.py` put it
into the loop of Megatron-LM and of Megatron-Bridge. These files may import the adapter in
`megatron/`; they import the host's training package only inside a function, when it is needed.
Start at `installed` in `megatron_lm.py`.
"""
