// Sums in fp32 of what keys get from queries, one key-value head at a time: the gradients themselves where their rows are
// whole vectors, else rows in memory of the caller's.
#pragma once

#include <algorithm>

#include "problem.h"

namespace dsv3 {

struct KeySums {
  const Problem& p;
  int64_t width = (p.width + 15) / 16 * 16, value = (p.value + 15) / 16 * 16;
  bool direct = !p.half && p.width == width && p.value == value;
  int64_t bytes = direct ? 0 : p.keys * (width + value) * sizeof(float);

  float* of_k(int64_t group, char* room) const {
    return direct ? (float*)p.grad_k.data + group * p.keys * width : (float*)room;
  }
  float* of_v(int64_t group, char* room) const {
    return direct ? (float*)p.grad_v.data + group * p.keys * value : (float*)room + p.keys * width;
  }
  // of the keys from one to another
  void clear(int64_t group, int64_t from, int64_t to, char* room) const {
    std::fill(of_k(group, room) + from * width, of_k(group, room) + to * width, 0.0f);
    std::fill(of_v(group, room) + from * value, of_v(group, room) + to * value, 0.0f);
  }
  void store(const Kernels& kernels, int64_t group, int64_t from, int64_t to, char* room) const {
    int64_t b = group / p.groups, g = group % p.groups;
    kernels.store(p, of_k(group, room) + from * width, width, p.grad_k, b, g, from, to - from, p.width, p.scale);
    kernels.store(p, of_v(group, room) + from * value, value, p.grad_v, b, g, from, to - from, p.value, 1.0f);
  }
};

}  // namespace dsv3
