"""What a step costs before it is run: FLOPs of a model's shape, and samples divided by cost.

`shape.py` reads a model's sizes, `flops.py` turns them and a plan into FLOPs, `balance.py` divides
the samples of a global batch over ranks and micro-batches, `sampler.py` is that for a loader. The
benchmarks, `regate estimate`, the metrics of a run and users' loops read the same numbers.
"""
