// What the operations share: dispatch by dtype, tensors as rows, scratch memory, and threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <new>

#include "csrc/tensor.h"

namespace gptkernels {

// Calls f with a value of the C++ type that belongs to `dtype`.
template <typename F>
void dispatch(ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(BFloat16{});
    case ScalarType::Half: return f(Half{});
    default: check<std::runtime_error>(false, "dtype: got ", dtype, "; accepted are float32, bfloat16 and float16");
  }
}

// Calls f with the types of a branch and of the residual stream that it is added to. Both have the same type, or the branch
// is 16-bit and the stream float.
template <typename F>
void dispatch_stream(ScalarType branch, ScalarType stream, F f) {
  dispatch(branch, [&](auto t) {
    if (stream == branch) return f(t, t);
    check<std::runtime_error>(
        stream == ScalarType::Float, "residual: got dtype ", stream, "; accepted are x's, ", branch, ", and float32");
    if constexpr (!std::is_same_v<decltype(t), float>) f(t, float{});
  });
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// A tensor as rows of its last dimension. Reads it in place if one stride leads from each row to the next, else copies it.
struct Rows {
  Tensor tensor;
  int64_t rows, columns, stride;

  explicit Rows(const Tensor& x) : tensor(x) {
    if (!described()) tensor = as_contiguous(x), stride = columns;
    data_ = tensor.data_ptr();
  }
  // Cuts a contiguous x into rows of another length.
  Rows(const Tensor& x, int64_t length)
      : tensor(x), rows(x.numel() / length), columns(length), stride(length), data_(x.data_ptr()) {}
  template <typename T>
  T* data() const { return static_cast<T*>(data_); }

 private:
  void* data_;

  // Counts the rows and finds their stride. Returns false if there is no such stride.
  bool described() {
    const Shape sizes = tensor.sizes(), strides = tensor.strides();
    const auto last = static_cast<int64_t>(sizes.size()) - 1;
    columns = sizes[last], rows = 1, stride = columns;
    bool one_stride = columns <= 1 || strides[last] == 1;
    for (int64_t d = last - 1; d >= 0; --d) {
      if (sizes[d] == 1) continue;
      if (rows == 1) stride = strides[d];
      else one_stride = one_stride && strides[d] == stride * rows;
      rows *= sizes[d];
    }
    return one_stride;
  }
};

// A parameter of a norm or an activation as contiguous floats; null if it is absent.
struct Parameter {
  OptionalTensor tensor;
  const float* data = nullptr;

  explicit Parameter(const OptionalTensor& p) {
    if (p) tensor = converted(*p, ScalarType::Float), data = tensor->const_data_ptr<float>();
  }
};

// Bytes of the last-level cache, as Linux reports it (sysconf is wrong on AMD CPUs); 32 MiB if unknown.
inline int64_t last_cache() {
  int64_t kibibytes = 0;
  std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> kibibytes;
  return (kibibytes > 0 ? kibibytes : 32768) << 10;
}

// Whether to write a result with non-temporal stores, which bypass the caches. That pays when the result fills a good part of
// the last-level cache: the next reader would find little of it there anyway.
inline bool goes_past_caches(const Tensor& out) {
  static const int64_t most = std::min<int64_t>(last_cache() / 4, 32 << 20);
  const auto itemsize = static_cast<int64_t>(out.element_size());
  const int64_t bytes = out.numel() * itemsize, row = out.dim() ? out.size(-1) * itemsize : 0;
  return bytes >= most && row % 64 == 0 && reinterpret_cast<uintptr_t>(out.data_ptr()) % 64 == 0;
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

// Shares units of work among the threads of PyTorch's pool. A thread takes the next unit whenever it is free, so f(unit) must
// not depend on which thread runs it. `make` creates what a thread keeps between units (its scratch), f's second argument.
template <typename Make, typename F>
void parallel_units(int64_t units, Make make, F f) {
  std::atomic<int64_t> next{0};
  auto work = [&] {
    auto state = make();
    for (int64_t unit = next++; unit < units; unit = next++) f(unit, state);
  };
  const int64_t threads = std::min(num_threads(), units);
  if (threads <= 1) return work();
  parallel_for(0, threads, 1, [&](int64_t, int64_t) { work(); });
}

// Sums over rows are cut into blocks by the shape alone, never by the number of threads, so that results do not depend on it.
inline int64_t sum_blocks(int64_t rows) { return std::clamp<int64_t>(ceil_div(rows, 16), 1, 64); }

// out[j] = sum over blocks of partial[block][j], in order.
inline void add_blocks(const float* partial, int64_t blocks, int64_t stride, int64_t columns, float* out) {
  parallel_for(0, ceil_div(columns, kLanes), 64, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v) {
      const int64_t j = v * kLanes, count = std::min(kLanes, columns - j);
      Vec total(0.f);
      for (int64_t block = 0; block < blocks; ++block) total = total + load(partial + block * stride + j, count);
      store(out + j, total, count);
    }
  });
}

}  // namespace gptkernels
