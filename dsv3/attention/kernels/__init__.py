"""Attention over blocks of keys, in C++ for a CPU and in Triton for a GPU, compiled on the machine that runs it;
importing this compiles nothing.
"""
