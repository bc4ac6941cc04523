"""Attention over blocks of keys in C++, compiled on the machine that runs it; nothing is compiled by importing this."""
