// What operators share: which instructions the processor has, and work for torch's threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <initializer_list>
#include <string>

namespace dsv3 {

// Whether there are registers of matrices (AMX); Linux lends a process their memory when asked.
inline bool has_matrices() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  constexpr int ASK = 0x1023, FOR_MATRICES = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool lent = __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, ASK, FOR_MATRICES) == 0;
  return lent;
#else
  return false;
#endif
}

inline bool supported(const char* name) {
  if (!std::strcmp(name, "portable")) return true;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  if (!std::strcmp(name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool long_vectors = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!std::strcmp(name, "avx512")) return long_vectors;
  bool half = long_vectors && __builtin_cpu_supports("avx512bf16");
  return half && (!std::strcmp(name, "avx512_bf16") || has_matrices());
#else
  return false;
#endif
}

// The passes for these instructions, "": for the best of those that the processor has; `all` lists the best first.
template <class Kernels>
const Kernels& among(std::initializer_list<const Kernels*> all, const std::string& instructions) {
  for (const Kernels* kernels : all)
    if (supported(kernels->name) && (instructions.empty() || instructions == kernels->name)) return *kernels;
  TORCH_CHECK_VALUE(false, "instructions='", instructions, "': this processor lacks them; leave it empty for the best");
}

template <class Kernels>
std::string names_of(std::initializer_list<const Kernels*> all) {
  std::string names;
  for (const Kernels* kernels : all)
    if (supported(kernels->name)) names += (names.empty() ? "" : " ") + std::string(kernels->name);
  return names;
}

inline int64_t pieces(int64_t total, int64_t size) { return (total + size - 1) / size; }

// Scratch memory of `room` bytes for each thread that does one of `count` things, taken from torch so that whoever
// measures memory sees it.
inline at::Tensor scratch_for(int64_t count, int64_t room, int64_t threads = at::get_num_threads()) {
  return at::empty({std::min(threads, count), (room + 63) / 64 * 64}, at::kByte);
}

// Every number below `count` once, by whichever of the threads is free; each has a row of the scratch memory.
template <class Work>
void shared_out(int64_t count, const at::Tensor& scratch, const Work& work) {
  char* memory = (char*)scratch.data_ptr();
  int64_t stride = scratch.size(1);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min(scratch.size(0), count), 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin)
      for (int64_t i; (i = next.fetch_add(1)) < count;) work(i, memory + begin * stride);
  });
}
template <class Work>
void shared_out(int64_t count, int64_t room, const Work& work, int64_t threads = at::get_num_threads()) {
  shared_out(count, scratch_for(count, room, threads), work);
}

}  // namespace dsv3
