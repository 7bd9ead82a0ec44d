// The six ops on the CPU: tensors -> views -> kernels, through PyTorch's stable ABI. Schemas: sparsekern/ops.py.
//
// Inputs may have any strides: what a kernel cannot read in place is made contiguous here. Public functions have
// checked shapes with friendlier words; the checks here are the last guard before raw pointers.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bsr.h"
#include "cpu/dispatch.h"
#include "host.h"

using sk::parallel;
using sk::scratch;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

namespace {

sk::Plan read_plan(const Tensor& plan, int64_t rows, int64_t ks, const Tensor& values) {
  sk::Plan view;
  STD_TORCH_CHECK(plan.scalar_type() == ScalarType::Int && plan.dim() == 1 && plan.is_contiguous() &&
                      sk::Plan::read(plan.const_data_ptr<int32_t>(), plan.numel(), view),
                  "plan is not a plan of this version of sparsekern");
  STD_TORCH_CHECK(view.rows == rows && view.ks == ks, "plan does not belong to these tensors: it is for ", view.rows,
                  " rows and ", view.ks, " ks, they have ", rows, " and ", ks);
  STD_TORCH_CHECK(values.dim() == 3 && values.numel() == view.size && values.size(1) == view.block[0] &&
                      values.size(2) == view.block[1],
                  "plan does not belong to these values: it is for ", view.size, " numbers in blocks of ",
                  view.block[0], " x ", view.block[1]);
  return view;
}

void check_pair(const Tensor& a, const char* a_name, const Tensor& b, const char* b_name) {
  const ScalarType t = a.scalar_type();
  STD_TORCH_CHECK(t == ScalarType::Float || t == ScalarType::Double, a_name, " must be float32 or float64");
  STD_TORCH_CHECK(b.scalar_type() == t, b_name, " must have the dtype of ", a_name);
}

// Asked first: a call through the dispatcher would cost a microsecond even where there is nothing to do.
Tensor packed(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

bool is_channels_last(const Tensor& t) {
  return t.stride(1) == 1 && t.stride(3) == t.size(1) && t.stride(2) == t.size(1) * t.size(3) &&
         t.stride(0) == t.size(1) * t.size(3) * t.size(2);
}

// The tensor, made contiguous in one of the two memory formats if it is in neither.
Tensor image_layout(const Tensor& t, bool& channels_last) {
  channels_last = !t.is_contiguous() && is_channels_last(t);
  return channels_last ? t : packed(t);
}

// torch::stable::new_empty without looking the op up by its name, boxing and unboxing: a microsecond less. The shim is
// what torch 2.9's new_empty calls, so part of the stable ABI.
Tensor empty_output(const Tensor& like, const Ints& sizes) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), sizes.data(), static_cast<int64_t>(sizes.size()),
                                                          nullptr, nullptr, nullptr, 0, nullptr, &handle));
  return Tensor(handle);
}

Tensor new_image(const Tensor& like, const Ints& sizes, bool channels_last) {
  if (!channels_last) return empty_output(like, sizes);
  return torch::stable::empty(sizes, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              MemoryFormat::ChannelsLast);
}

sk::Images image_view(const Tensor& t, bool channels_last) {
  return {t.size(0), t.size(1), t.size(2), t.size(3), channels_last};
}

constexpr sk::Window kPixel = {{1, 1}, {1, 1}, {0, 0}, {1, 1}, {1, 1}, false};

sk::Window window(const Ints& kernel, const Ints& stride, const Ints& padding, const Ints& dilation,
                  const sk::Images& grid) {
  return {{kernel[0], kernel[1]},     {stride[0], stride[1]},    {padding[0], padding[1]},
          {dilation[0], dilation[1]}, {grid.height, grid.width}, false};
}

enum class Kind { kForward, kConvDgrad };

template <class T>
void run_product(Kind kind, const sk::Plan& plan, const Tensor& values, const Tensor* bias, const Tensor& x, Tensor& y,
                 const sk::Images& in, const sk::Images& out, const sk::Window& window) {
  const T* b = bias ? bias->const_data_ptr<T>() : nullptr;
  const sk::Product<T> product = {
      plan,   values.const_data_ptr<T>(), b, x.const_data_ptr<T>(), y.mutable_data_ptr<T>(), in, out, window, parallel,
      scratch};
  const sk::Kernels& k = sk::kernels();
  if constexpr (sizeof(T) == 4)
    (kind == Kind::kForward ? k.forward32 : k.conv_dgrad32)(product);
  else
    (kind == Kind::kForward ? k.forward64 : k.conv_dgrad64)(product);
}

void product(Kind kind, const sk::Plan& plan, const Tensor& values, const Tensor* bias, const Tensor& x, Tensor& y,
             const sk::Images& in, const sk::Images& out, const sk::Window& window) {
  auto* run = x.scalar_type() == ScalarType::Float ? run_product<float> : run_product<double>;
  run(kind, plan, values, bias, x, y, in, out, window);
}

using Gradients = std::tuple<Tensor, Tensor>;  // of the values, and of the bias (empty when not asked for)

template <class T>
void run_wgrad(const sk::Plan& plan, const Tensor& grad, const Tensor& x, Gradients& to, const sk::Images& in,
               const sk::Images& out, const sk::Window& window) {
  T* bias = std::get<1>(to).numel() ? std::get<1>(to).mutable_data_ptr<T>() : nullptr;
  const sk::WeightGrad<T> wgrad = {plan,
                                   grad.const_data_ptr<T>(),
                                   x.const_data_ptr<T>(),
                                   std::get<0>(to).mutable_data_ptr<T>(),
                                   bias,
                                   in,
                                   out,
                                   window,
                                   parallel,
                                   scratch};
  if constexpr (sizeof(T) == 4)
    sk::kernels().wgrad32(wgrad);
  else
    sk::kernels().wgrad64(wgrad);
}

Gradients wgrad(const Tensor& plan, int64_t blocks, const Ints& blocksize, bool bias, const Tensor& grad,
                const Tensor& x, const sk::Images& in, const sk::Images& out, const sk::Window& window) {
  Gradients to = {empty_output(x, {blocks, blocksize[0], blocksize[1]}), empty_output(x, {bias ? out.channels : 0})};
  const sk::Plan view = read_plan(plan, out.channels, window.taps() * in.channels, std::get<0>(to));
  auto* run = x.scalar_type() == ScalarType::Float ? run_wgrad<float> : run_wgrad<double>;
  run(view, grad, x, to, in, out, window);
  return to;
}

// Linear: every leading dimension is batch, every sample an image of one pixel.
Ints leading(const Tensor& t, int64_t last) {
  Ints sizes(t.sizes().begin(), t.sizes().end());
  STD_TORCH_CHECK(!sizes.empty(), "expected at least one dimension");
  sizes.back() = last;
  return sizes;
}

sk::Images samples(const Tensor& t) {
  int64_t n = 1;
  for (int64_t d = 0; d < t.dim() - 1; d++) n *= t.size(d);
  return {n, t.size(t.dim() - 1), 1, 1, true};
}

Tensor linear_product(const Tensor& x, const Tensor& values, const Tensor* bias, const Tensor& plan, int64_t rows) {
  check_pair(x, "input", values, "values");
  const Tensor xc = packed(x), vc = packed(values);
  Tensor y = empty_output(x, leading(x, rows));
  const sk::Images in = samples(xc), out = samples(y);
  product(Kind::kForward, read_plan(plan, rows, in.channels, vc), vc, bias, xc, y, in, out, kPixel);
  return y;
}

std::optional<Tensor> contiguous_bias(const std::optional<Tensor>& bias, const Tensor& x, int64_t rows) {
  if (!bias) return std::nullopt;
  check_pair(x, "input", *bias, "bias");
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == rows, "bias must have ", rows, " entries");
  return packed(*bias);
}

Tensor bsr_linear(const Tensor& input, const Tensor& values, const std::optional<Tensor>& bias, const Tensor&,
                  const Tensor&, const Tensor& plan, int64_t out_features) {
  const auto b = contiguous_bias(bias, input, out_features);
  return linear_product(input, values, b ? &*b : nullptr, plan, out_features);
}

Tensor bsr_linear_dgrad(const Tensor& grad_output, const Tensor& values, const Tensor&, const Tensor&,
                        const Tensor& plan, int64_t in_features) {
  return linear_product(grad_output, values, nullptr, plan, in_features);
}

Gradients bsr_linear_wgrad(const Tensor& grad_output, const Tensor& input, const Tensor&, const Tensor& col_indices,
                           const Tensor& plan, const Ints& blocksize, bool bias) {
  check_pair(input, "input", grad_output, "grad_output");
  const Tensor xc = packed(input), gc = packed(grad_output);
  const sk::Images in = samples(xc), out = samples(gc);
  STD_TORCH_CHECK(in.images == out.images, "input and grad_output must have one batch size, got ", in.images, " and ",
                  out.images);
  return wgrad(plan, col_indices.numel(), blocksize, bias, gc, xc, in, out, kPixel);
}

int64_t out_size(int64_t n, int64_t k, int64_t s, int64_t p, int64_t d) {
  return (n + 2 * p - d * (k - 1) - 1) / s + 1;
}

// Before output sizes are worked out: their division is meant for numbers that are not negative.
void check_fits(const sk::Images& in, const Ints& kernel, const Ints& padding, const Ints& dilation) {
  STD_TORCH_CHECK(in.height > 0 && in.width > 0 && in.height + 2 * padding[0] > dilation[0] * (kernel[0] - 1) &&
                      in.width + 2 * padding[1] > dilation[1] * (kernel[1] - 1),
                  "input is too small for the kernel");
}

void check_conv(const sk::Images& in, const sk::Images& out, const Ints& kernel, const Ints& stride,
                const Ints& padding, const Ints& dilation) {
  STD_TORCH_CHECK(in.images == out.images &&
                      out.height == out_size(in.height, kernel[0], stride[0], padding[0], dilation[0]) &&
                      out.width == out_size(in.width, kernel[1], stride[1], padding[1], dilation[1]),
                  "sizes of input and output of the convolution do not fit together");
}

Tensor bsr_conv2d(const Tensor& input, const Tensor& values, const std::optional<Tensor>& bias, const Tensor&,
                  const Tensor&, const Tensor& plan, int64_t out_channels, const Ints& kernel_size, const Ints& stride,
                  const Ints& padding, const Ints& dilation, int64_t, bool channels_last) {
  STD_TORCH_CHECK(input.dim() == 4, "input must be 4-D");
  check_pair(input, "input", values, "values");
  const auto b = contiguous_bias(bias, input, out_channels);
  bool x_last;
  const Tensor xc = image_layout(input, x_last), vc = packed(values);
  const sk::Images in = image_view(xc, x_last);
  check_fits(in, kernel_size, padding, dilation);
  Tensor y =
      new_image(input,
                {in.images, out_channels, out_size(in.height, kernel_size[0], stride[0], padding[0], dilation[0]),
                 out_size(in.width, kernel_size[1], stride[1], padding[1], dilation[1])},
                channels_last);
  const sk::Images out = image_view(y, channels_last);
  const sk::Window w = window(kernel_size, stride, padding, dilation, out);
  product(Kind::kForward, read_plan(plan, out_channels, w.taps() * in.channels, vc), vc, b ? &*b : nullptr, xc, y, in,
          out, w);
  return y;
}

Tensor bsr_conv2d_dgrad(const Tensor& grad_output, const Tensor& values, const Tensor&, const Tensor&,
                        const Tensor& plan, int64_t in_channels, const Ints& input_size, const Ints& kernel_size,
                        const Ints& stride, const Ints& padding, const Ints& dilation, int64_t, bool channels_last) {
  STD_TORCH_CHECK(grad_output.dim() == 4, "grad_output must be 4-D");
  check_pair(grad_output, "grad_output", values, "values");
  bool g_last;
  const Tensor gc = image_layout(grad_output, g_last), vc = packed(values);
  const sk::Images in = image_view(gc, g_last);
  Tensor y = new_image(grad_output, {in.images, in_channels, input_size[0], input_size[1]}, channels_last);
  const sk::Images out = image_view(y, channels_last);
  check_conv(out, in, kernel_size, stride, padding, dilation);
  const sk::Window w = window(kernel_size, stride, padding, dilation, in);
  const sk::Plan view = read_plan(plan, in_channels, w.taps() * in.channels, vc);
  product(Kind::kConvDgrad, view, vc, nullptr, gc, y, in, out, w);
  return y;
}

Gradients bsr_conv2d_wgrad(const Tensor& grad_output, const Tensor& input, const Tensor&, const Tensor& col_indices,
                           const Tensor& plan, const Ints& blocksize, const Ints& kernel_size, const Ints& stride,
                           const Ints& padding, const Ints& dilation, int64_t, bool bias) {
  STD_TORCH_CHECK(grad_output.dim() == 4 && input.dim() == 4, "grad_output and input must be 4-D");
  check_pair(input, "input", grad_output, "grad_output");
  bool x_last, g_last;
  const Tensor xc = image_layout(input, x_last), gc = image_layout(grad_output, g_last);
  const sk::Images in = image_view(xc, x_last), out = image_view(gc, g_last);
  check_conv(in, out, kernel_size, stride, padding, dilation);
  const sk::Window w = window(kernel_size, stride, padding, dilation, out);
  return wgrad(plan, col_indices.numel(), blocksize, bias, gc, xc, in, out, w);
}

// The set in use.
std::string cpu_isa() { return sk::kernels().name; }

// Those compiled in, the best first: names, whether this CPU has them, whether they are chosen automatically.
std::tuple<std::vector<std::string>, Ints, Ints> cpu_isas() {
  std::tuple<std::vector<std::string>, Ints, Ints> to;
  for (const sk::InstructionSet* set = sk::instruction_sets(); set->name; set++) {
    std::get<0>(to).push_back(set->name);
    std::get<1>(to).push_back(set->supported());
    std::get<2>(to).push_back(set->automatic);
  }
  return to;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparsekern, m) {
  m.def("cpu_isa() -> str");
  m.def("cpu_isas() -> (str[], int[], int[])");
}

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_isas", TORCH_BOX(&cpu_isas));
}

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) {
  if (!sk::has_kernels()) return;
  m.impl("bsr_linear", TORCH_BOX(&bsr_linear));
  m.impl("bsr_linear_dgrad", TORCH_BOX(&bsr_linear_dgrad));
  m.impl("bsr_linear_wgrad", TORCH_BOX(&bsr_linear_wgrad));
  m.impl("bsr_conv2d", TORCH_BOX(&bsr_conv2d));
  m.impl("bsr_conv2d_dgrad", TORCH_BOX(&bsr_conv2d_dgrad));
  m.impl("bsr_conv2d_wgrad", TORCH_BOX(&bsr_conv2d_wgrad));
}
