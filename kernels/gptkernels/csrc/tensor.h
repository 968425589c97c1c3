// Tensors through PyTorch's stable C++ interface, and nothing else of PyTorch. One binary then runs under every PyTorch from
// TORCH_TARGET_VERSION on, and a file compiles in a third of the time that ATen's tensor headers take.
#pragma once

#include "csrc/vec.h"  // before TORCH_TARGET_VERSION: at::vec is header-only, but refuses to be included after it

#define TORCH_TARGET_VERSION 0x020b000000000000  // PyTorch 2.11, the oldest that the project supports
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <vector>

namespace gptkernels {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = torch::headeronly::IntHeaderOnlyArrayRef;

// Throws Error with a message joined from `parts` unless `condition` holds. Python raises std::out_of_range as IndexError,
// std::invalid_argument as ValueError and std::runtime_error as RuntimeError.
template <typename Error, typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw Error(message.str());
}

inline int64_t num_threads() { return torch::stable::get_num_threads(); }

// The dtype of a C++ type.
template <typename T>
constexpr ScalarType dtype_of = std::is_same_v<T, float> ? ScalarType::Float
    : std::is_same_v<T, BFloat16>                        ? ScalarType::BFloat16
                                                         : ScalarType::Half;

inline std::vector<int64_t> contiguous_strides(Shape shape) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0; stride *= std::max<int64_t>(shape[d], 1)) strides[d] = stride;
  return strides;
}

// New, uninitialised tensors. These functions do not go through PyTorch's dispatcher, which would cost 1 to 2 us a call.
inline Tensor empty_strided(Shape shape, Shape strides, ScalarType dtype) {
  AtenTensorHandle handle;
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides.data(), code, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}
inline Tensor empty(Shape shape, ScalarType dtype) { return empty_strided(shape, contiguous_strides(shape), dtype); }
inline Tensor empty_floats(Shape shape) { return empty(shape, ScalarType::Float); }
// Contiguous, with x's shape and dtype.
inline Tensor result_like(const Tensor& x) { return empty(x.sizes(), x.scalar_type()); }
inline Tensor none_like(const Tensor& x) { return empty({0}, x.scalar_type()); }

inline Tensor zeroed(Tensor x) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(x.get()));
  return x;
}

inline Tensor as_contiguous(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }
// x as a contiguous tensor of `dtype`: x itself if it is one already.
inline Tensor converted(const Tensor& x, ScalarType dtype) {
  return as_contiguous(x.scalar_type() == dtype ? x : torch::stable::to(x, dtype));
}

// A matrix in memory as a tensor without autograd history. The tensor does not own the memory.
template <typename T>
Tensor borrowed(const T* data, int64_t rows, int64_t columns, int64_t stride_rows, int64_t stride_columns) {
  const int64_t shape[] = {rows, columns}, strides[] = {stride_rows, stride_columns};
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(const_cast<T*>(data), Shape(shape, 2), Shape(strides, 2), cpu, dtype_of<T>);
}

}  // namespace gptkernels
