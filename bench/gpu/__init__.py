"""Everything on one GPU: conformance first, then ops against floors, then whole steps.

    python -m bench.gpu                    everything, in nine minutes
    python -m bench.gpu --budget 240       as much as fits, the most wanted figures first
    python -m bench.gpu --dry-run          what would be done, and by which plans; needs no GPU
    python -m bench.gpu --rehearse         all of the timing at tiny shapes on this CPU

1. The conformance suites on the device, for every GPU backend. One that fails gets no numbers.
2. Floors measured in this run: copy bandwidth, cuBLAS in bf16, the bare generator.
3. Every op of every backend against its floor, the larger of bytes over bandwidth and noise over
   the generator's rate (a product: or FLOPs over cuBLAS's rate).
4. Whole steps in bf16 with random weights: ours on every backend, as they are and as a CUDA graph,
   MeZO's loop (the better of two spellings) and two plain forwards (inference mode, eager and as a
   graph), and the peak of the allocator against a plain forward of the stacked batch.

``machine`` what is asked of a device, CUDA's answer and a CPU's for rehearsals; ``floors``, ``ops``
and ``steps`` what is timed; ``session`` in which order, within a budget; ``checks`` building,
conformance and the sanitizer; ``warm`` what Triton compiles ahead; ``choice`` which backend was
faster; ``report`` tables, files, plots.
"""
