// What the operators share: the passes to compute with, and work for torch's threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <string>

#include "problem.h"

namespace dsv3 {

const Kernels& chosen(const std::string& instructions);

inline int64_t pieces(int64_t total, int64_t size) { return (total + size - 1) / size; }

// Every number below `count` once, by whichever of the threads is free. Each has `room` bytes of scratch memory, taken
// from torch so that whoever measures memory sees it.
template <class Work>
void shared_out(int64_t count, int64_t room, const Work& work, int64_t threads = at::get_num_threads()) {
  threads = std::min(threads, count);
  int64_t stride = (room + 63) / 64 * 64;
  at::Tensor scratch = at::empty({threads * stride}, at::kByte);
  char* memory = (char*)scratch.data_ptr();
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin)
      for (int64_t i; (i = next.fetch_add(1)) < count;) work(i, memory + begin * stride);
  });
}

}  // namespace dsv3
