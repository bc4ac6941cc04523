"""What rooms with C++ of their own share: building it, products of small matrices in registers, work for threads."""
