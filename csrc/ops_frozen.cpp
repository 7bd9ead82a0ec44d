// frozen, the op that runs a frozen network on the CPU, through PyTorch's stable ABI. Schema: sparsekern/freeze.
//
// Python has checked the input with friendlier words; the program is trusted beyond its header, which is why the op is
// private.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstring>
#include <vector>

#include "frozen.h"
#include "host.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

template <class T>
void run(const Tensor& x, const Tensor& program, const Tensor& constants, Tensor& y) {
  const sk::Frozen<T> frozen = {program.const_data_ptr<int32_t>(),
                                constants.const_data_ptr<T>(),
                                x.const_data_ptr<T>(),
                                y.mutable_data_ptr<T>(),
                                x.size(0),
                                sk::parallel,
                                sk::scratch};
  if constexpr (sizeof(T) == 4)
    sk::kernels().frozen32(frozen);
  else
    sk::kernels().frozen64(frozen);
}

Tensor frozen(const Tensor& input, const Tensor& program, const Tensor& constants, std::vector<int64_t> shape) {
  const ScalarType t = input.scalar_type();
  STD_TORCH_CHECK(t == ScalarType::Float || t == ScalarType::Double, "input must be float32 or float64");
  STD_TORCH_CHECK(constants.scalar_type() == t && constants.is_contiguous(), "constants must have the dtype of input");
  STD_TORCH_CHECK(program.scalar_type() == ScalarType::Int && program.is_contiguous() &&
                      program.numel() * sizeof(int32_t) >= sizeof(sk::FrozenHeader),
                  "program is no frozen network of this version of sparsekern");
  sk::FrozenHeader head;
  std::memcpy(&head, program.const_data_ptr<int32_t>(), sizeof head);
  STD_TORCH_CHECK(head.magic == sk::FrozenHeader::kMagic,
                  "program is no frozen network of this version of sparsekern: freeze the model again");
  const int lanes = sk::kernels().vector_bytes / (t == ScalarType::Float ? 4 : 8);
  STD_TORCH_CHECK(head.lanes == lanes, "this network was frozen for vectors of ", head.lanes,
                  " numbers, but the kernels chosen here (", sk::kernels().name, ") have ", lanes,
                  ": freeze the model again");
  const int64_t batch = input.dim() > 0 ? input.size(0) : 0;
  int64_t outputs = 1;
  for (int64_t n : shape) outputs *= n;
  STD_TORCH_CHECK(input.dim() > 0 && input.numel() == batch * head.inputs && outputs == head.outputs, "input has ",
                  input.numel(), " numbers, expected ", head.inputs, " per sample");
  const Tensor x = input.is_contiguous() ? input : torch::stable::contiguous(input);
  shape.insert(shape.begin(), batch);
  Tensor y = torch::stable::new_empty(x, shape);
  (t == ScalarType::Float ? run<float> : run<double>)(x, program, constants, y);
  return y;
}

int64_t cpu_vector_bytes() { return sk::kernels().vector_bytes; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparsekern, m) {
  m.def("cpu_vector_bytes() -> int");
  m.def("frozen(Tensor input, Tensor program, Tensor constants, SymInt[] shape) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CompositeExplicitAutograd, m) {
  m.impl("cpu_vector_bytes", TORCH_BOX(&cpu_vector_bytes));
}

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("frozen", TORCH_BOX(&frozen)); }
