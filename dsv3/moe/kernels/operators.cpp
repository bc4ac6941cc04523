// torch.ops.dsv3_experts: a layer of SwiGLU experts on a CPU, forward and backward, over the passes of one instruction
// set.
//
// Experts are taken by whichever thread is free; what several experts add to one token is added by columns instead, each
// by one thread and in the order of the experts, so that the number of threads changes no bit.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "problem.h"
#include "work.h"

namespace dsv3::experts {
namespace {

using at::Tensor;

std::initializer_list<const Kernels*> every() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  static const std::initializer_list<const Kernels*> all = {&amx_bf16, &avx512_bf16, &avx512, &avx2, &portable};
#else
  static const std::initializer_list<const Kernels*> all = {&portable};
#endif
  return all;
}

std::string names() { return names_of(every()); }

struct Call {
  Problem p{};
  std::vector<Tensor> kept;

  template <class T = char>
  T* keep(const Tensor& x) {
    kept.push_back(x.contiguous());
    return (T*)kept.back().data_ptr();
  }
};

void check(const Tensor& x, const Tensor& weight, const Tensor& gate_up, const Tensor& down, const Tensor& token,
           const Tensor& counts) {
  auto type = x.scalar_type();
  TORCH_CHECK_VALUE(type == at::kFloat || type == at::kBFloat16, "dtype=", type, ": must be float32 or bfloat16");
  TORCH_CHECK_VALUE(type == gate_up.scalar_type() && type == down.scalar_type(), "dtypes: must be one");
  bool shaped = x.dim() == 2 && gate_up.dim() == 3 && down.dim() == 3 && counts.dim() == 1 && token.dim() == 1;
  TORCH_CHECK_VALUE(shaped, "x, gate_up, down: must be [N, D], [E, D, 2F] and [E, F, D]");
  int64_t d = x.size(1), f = down.size(1), e = counts.size(0);
  bool fits = gate_up.size(0) == e && gate_up.size(1) == d && gate_up.size(2) == 2 * f && down.size(0) == e &&
              down.size(2) == d && weight.sizes() == token.sizes();
  TORCH_CHECK_VALUE(fits, "x, gate_up, down: must be [N, D], [E, D, 2F] and [E, F, D], with a weight for each row");
  TORCH_CHECK_VALUE(d % 16 == 0 && f % 16 == 0, "widths=", d, ", ", f, ": must be multiples of 16");
  bool whole = token.scalar_type() == at::kLong && counts.scalar_type() == at::kLong;
  TORCH_CHECK_VALUE(whole, "token, counts: must be int64");
}

Call prepared(const Tensor& x, const Tensor& weight, const Tensor& gate_up, const Tensor& down, const Tensor& token,
              const Tensor& counts) {
  check(x, weight, gate_up, down, token, counts);
  Call call;
  Problem& p = call.p;
  p.experts = counts.size(0), p.hidden = x.size(1), p.inner = down.size(1), p.half = x.scalar_type() == at::kBFloat16;
  int64_t* start = call.keep<int64_t>(at::zeros({p.experts + 1}, at::kLong));
  const int64_t* count = call.keep<int64_t>(counts);
  for (int64_t e = 0; e < p.experts; ++e) {
    TORCH_CHECK_VALUE(count[e] >= 0, "counts=", count[e], ": must not be negative");
    start[e + 1] = start[e] + count[e];
    p.longest = std::max(p.longest, count[e]);
  }
  TORCH_CHECK_VALUE(start[p.experts] <= token.size(0), "counts: must add up to at most ", token.size(0), " rows");
  p.start = start, p.token = call.keep<int64_t>(token);
  for (int64_t i = 0; i < start[p.experts]; ++i)
    TORCH_CHECK_VALUE(0 <= p.token[i] && p.token[i] < x.size(0), "token=", p.token[i], ": must be a row of x");
  p.weight = call.keep<float>(weight.to(at::kFloat));
  p.x = call.keep(x), p.gate_up = call.keep(gate_up), p.down = call.keep(down);
  return call;
}

// Columns in as many pieces as there are threads, in steps of the widest panel.
int64_t columns_at_once(const Problem& p) {
  int64_t wide = (pieces(p.hidden, at::get_num_threads()) + 63) / 64 * 64;
  return std::min(wide, p.hidden);
}

template <class Work>
void by_columns(const Problem& p, const Tensor& memory, const Work& work) {
  int64_t wide = columns_at_once(p);
  shared_out(pieces(p.hidden, wide), memory, [&](int64_t i, char* scratch) {
    work(i * wide, std::min(wide, p.hidden - i * wide), scratch);
  });
}

// For a pass over experts and, when that is done, one over columns.
Tensor memory_for(const Problem& p, int64_t by_expert, int64_t by_columns) {
  return scratch_for(std::max(p.experts, pieces(p.hidden, columns_at_once(p))), std::max(by_expert, by_columns));
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const Tensor& gate_up, const Tensor& down,
                                   const Tensor& token, const Tensor& counts, std::string_view instructions) {
  const Kernels& kernels = among(every(), std::string(instructions));
  Call call = prepared(x, weight, gate_up, down, token, counts);
  Problem& p = call.p;
  Tensor h = at::empty({token.size(0), 2 * p.inner}, x.options());
  Tensor a = at::empty({token.size(0), p.inner}, x.options());
  Tensor y = at::zeros(x.sizes(), x.options().dtype(at::kFloat));
  p.h = (char*)h.data_ptr(), p.a = (char*)a.data_ptr(), p.y = y.data_ptr<float>();
  Rooms rooms = kernels.rooms(p, columns_at_once(p));
  Tensor memory = memory_for(p, rooms.hidden, rooms.out);
  shared_out(p.experts, memory, [&](int64_t e, char* scratch) { kernels.hidden(p, e, scratch); });
  by_columns(p, memory,
             [&](int64_t column, int64_t columns, char* scratch) { kernels.out(p, column, columns, scratch); });
  return {y.to(x.scalar_type()), h};
}

std::tuple<Tensor, Tensor> backward_into(const Tensor& grad, const Tensor& h, const Tensor& x, const Tensor& weight,
                                         const Tensor& gate_up, const Tensor& down, const Tensor& token,
                                         const Tensor& counts, Tensor dgate_up, Tensor ddown,
                                         std::string_view instructions) {
  const Kernels& kernels = among(every(), std::string(instructions));
  Call call = prepared(x, weight, gate_up, down, token, counts);
  Problem& p = call.p;
  auto like = [&](const Tensor& one, const Tensor& other) {
    return one.sizes() == other.sizes() && one.is_contiguous() && one.scalar_type() == x.scalar_type();
  };
  TORCH_CHECK_VALUE(like(dgate_up, gate_up) && like(ddown, down), "dgate_up, ddown: must be like the weights");
  TORCH_CHECK_VALUE(h.dim() == 2 && h.size(0) == token.size(0) && h.size(1) == 2 * p.inner &&
                        h.scalar_type() == x.scalar_type() && grad.sizes() == x.sizes(),
                    "grad, h: must be [N, D] and [M, 2F]");
  Tensor dh = at::empty(h.sizes(), x.options());
  Tensor dx = at::zeros(x.sizes(), x.options().dtype(at::kFloat)), dweight = at::zeros(weight.sizes(), at::kFloat);
  p.h = call.keep(h), p.dy = call.keep(grad.to(x.scalar_type())), p.dh = (char*)dh.data_ptr();
  p.dx = dx.data_ptr<float>(), p.dweight = dweight.data_ptr<float>();
  p.dgate_up = (char*)dgate_up.data_ptr(), p.ddown = (char*)ddown.data_ptr();
  Rooms rooms = kernels.rooms(p, columns_at_once(p));
  Tensor memory = memory_for(p, rooms.weights, rooms.inputs);
  shared_out(p.experts, memory, [&](int64_t e, char* scratch) { kernels.weights(p, e, scratch); });
  by_columns(p, memory,
             [&](int64_t column, int64_t columns, char* scratch) { kernels.inputs(p, column, columns, scratch); });
  return {dx, dweight};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& h, const Tensor& x,
                                                    const Tensor& weight, const Tensor& gate_up, const Tensor& down,
                                                    const Tensor& token, const Tensor& counts,
                                                    std::string_view instructions) {
  Tensor dgate_up = at::empty(gate_up.sizes(), x.options()), ddown = at::empty(down.sizes(), x.options());
  auto [dx, dweight] = backward_into(grad, h, x, weight, gate_up, down, token, counts, dgate_up, ddown, instructions);
  return {dx, dweight, dgate_up, ddown};
}

}  // namespace
}  // namespace dsv3::experts

TORCH_LIBRARY(dsv3_experts, m) {
  m.def(
      "forward(Tensor x, Tensor weight, Tensor gate_up, Tensor down, Tensor token, Tensor counts, str instructions) -> "
      "(Tensor, Tensor)");
  m.def(
      "backward(Tensor grad, Tensor h, Tensor x, Tensor weight, Tensor gate_up, Tensor down, Tensor token, Tensor "
      "counts, str instructions) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "backward_into(Tensor grad, Tensor h, Tensor x, Tensor weight, Tensor gate_up, Tensor down, Tensor token, Tensor "
      "counts, Tensor(a!) dgate_up, Tensor(b!) ddown, str instructions) -> (Tensor, Tensor)");
  m.def("instructions() -> str", dsv3::experts::names);
}

TORCH_LIBRARY_IMPL(dsv3_experts, CPU, m) {
  m.impl("forward", dsv3::experts::forward);
  m.impl("backward", dsv3::experts::backward);
  m.impl("backward_into", dsv3::experts::backward_into);
}
