"""The kernels of a layer of experts: C++ on a CPU, Triton on a GPU; `dsv3.moe.looped` is what PyTorch does instead."""
