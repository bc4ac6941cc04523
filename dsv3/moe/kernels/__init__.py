"""The C++ kernel of a layer of experts, on a CPU; what plain PyTorch does in its place is `dsv3.moe.looped`."""
