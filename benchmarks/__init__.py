"""The benchmark suite: workloads, peers, floors; `python -m benchmarks.run` compares and times them."""
