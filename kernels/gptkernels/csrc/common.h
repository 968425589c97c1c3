// What the operators share: dtypes, rows, scratch memory, and threads that never change a result.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <new>
#include <optional>
#include <tuple>

#include "vec.h"

namespace gptkernels {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Calls f with a value of the C++ type behind a dtype.
template <typename F>
void dispatch(at::ScalarType dtype, F f) {
  switch (dtype) {
    case at::kFloat: return f(float{});
    case at::kBFloat16: return f(BFloat16{});
    case at::kHalf: return f(Half{});
    default: TORCH_CHECK_TYPE(false, "dtype: got ", dtype, "; accepted are float32, bfloat16 and float16");
  }
}

// Calls f with the types of a branch and of the stream it joins: the same, or a float stream beside a 16-bit branch.
template <typename F>
void dispatch_stream(at::ScalarType branch, at::ScalarType stream, F f) {
  dispatch(branch, [&](auto t) {
    if (stream == branch) return f(t, t);
    TORCH_CHECK_TYPE(stream == at::kFloat, "residual: got dtype ", stream, "; accepted are x's, ", branch, ", and float32");
    if constexpr (!std::is_same_v<decltype(t), float>) f(t, float{});
  });
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// A tensor as rows of its last dimension: in place where one stride describes the rows, else a copy.
struct Rows {
  Tensor tensor;
  int64_t rows, columns, stride;

  explicit Rows(const Tensor& x) : tensor(x.reshape({-1, x.size(-1)})) {
    if (tensor.size(1) > 1 && tensor.stride(1) != 1) tensor = tensor.contiguous();
    rows = tensor.size(0), columns = tensor.size(1), stride = tensor.stride(0);
  }
  template <typename T>
  T* data() const { return static_cast<T*>(tensor.data_ptr()); }
};

// A parameter of a norm or an activation as adjacent floats; null when absent.
struct Parameter {
  Tensor tensor;
  const float* data = nullptr;

  explicit Parameter(const OptionalTensor& p) {
    if (p.has_value()) tensor = p->to(at::kFloat).contiguous(), data = tensor.const_data_ptr<float>();
  }
};

inline Tensor empty_floats(at::IntArrayRef shape) { return at::empty(shape, at::kFloat); }

// Bytes of the last cache that this CPU's cores share, as Linux knows it (sysconf is wrong on AMD's); 32 MiB where unknown.
inline int64_t last_cache() {
  int64_t kibibytes = 0;
  std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> kibibytes;
  return (kibibytes > 0 ? kibibytes : 32768) << 10;
}

// Whether a result's rows are better written past the caches: when it fills a good part of the last one, whoever comes next
// finds little of it there anyway.
inline bool goes_past_caches(const Tensor& out) {
  static const int64_t most = std::min<int64_t>(last_cache() / 4, 32 << 20);
  const int64_t bytes = out.numel() * out.element_size(), row = out.dim() ? out.size(-1) * out.element_size() : 0;
  return bytes >= most && row % 64 == 0 && reinterpret_cast<uintptr_t>(out.const_data_ptr()) % 64 == 0;
}

// Uninitialised memory, aligned for any vector.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(::operator new(std::max<int64_t>(count, 1) * sizeof(T), std::align_val_t{64}))) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t{64}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }
  operator T*() const { return data_; }

 private:
  T* data_;
};

// Work shared by the threads of PyTorch's pool, each unit taken when a thread is free: f(unit) must not depend on which
// thread runs it. `make` makes what a thread keeps from unit to unit (its scratch), given to f as second argument.
template <typename Make, typename F>
void parallel_units(int64_t units, Make make, F f) {
  std::atomic<int64_t> next{0};
  auto work = [&] {
    auto state = make();
    for (int64_t unit = next++; unit < units; unit = next++) f(unit, state);
  };
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), units);
  if (threads <= 1 || at::in_parallel_region()) return work();
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) { work(); });
}

// Rows are summed in blocks that depend on the shape alone, never on the number of threads: same bits on every machine.
inline int64_t sum_blocks(int64_t rows) { return std::clamp<int64_t>(ceil_div(rows, 16), 1, 64); }

// out[j] = sum over blocks of partial[block][j], in order.
inline void add_blocks(const float* partial, int64_t blocks, int64_t stride, int64_t columns, float* out) {
  at::parallel_for(0, ceil_div(columns, kLanes), 64, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v) {
      const int64_t j = v * kLanes, count = std::min(kLanes, columns - j);
      Vec total(0.f);
      for (int64_t block = 0; block < blocks; ++block) total = total + load(partial + block * stride + j, count);
      store(out + j, total, count);
    }
  });
}

}  // namespace gptkernels
