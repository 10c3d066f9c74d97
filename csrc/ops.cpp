// torch.ops.lbg: schemas, argument checks, and the CPU and CUDA kernels, on LibTorch's stable ABI.
//
// The checks here and those of src/lbg/_checks.py (for fake tensors) are one list in two languages, with the same
// texts; tests hold them together. All of them come before anything is allocated, launched or written.
#include "ops.h"

#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "lbg.h"

namespace lbg {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = torch::headeronly::IntHeaderOnlyArrayRef;

[[noreturn]] void fail(const std::string& text) { throw std::runtime_error("lbg::fused: " + text); }

std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::ComplexHalf:
      return "complex32";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default: {  // the others are PyTorch's names in other letters: Float8_e4m3fn, UInt16
      std::string name = torch::headeronly::toString(dtype);
      for (char& letter : name) letter = letter >= 'A' && letter <= 'Z' ? letter - 'A' + 'a' : letter;
      return name;
    }
  }
}

template <typename Sizes>
std::string text(const Sizes& sizes) {
  std::string out = "[";
  for (size_t i = 0; i < sizes.size(); ++i) out += (i ? ", " : "") + std::to_string(sizes[i]);
  return out + "]";
}

std::string text(const torch::stable::Device& device) {
  if (device.is_cpu()) return "cpu";
  if (device.is_cuda()) return "cuda:" + std::to_string(device.index());
  if (device.type() == torch::headeronly::DeviceType::Meta) return "meta";
  return "device type " + std::to_string(static_cast<int>(device.type()));
}

bool is_16_bit(ScalarType dtype) { return dtype == ScalarType::Half || dtype == ScalarType::BFloat16; }

DType to_dtype(ScalarType dtype) {
  return dtype == ScalarType::Half ? DType::f16 : dtype == ScalarType::BFloat16 ? DType::bf16 : DType::f32;
}

// The product a call asks for, once its arguments are known to be good.
struct Call {
  const Tensor &x, &weight, &scale, &shift;
  ScalarType out_dtype;
  bool fp16_accumulate;
  std::vector<int64_t> out_sizes;
};

void check_vector(const char* name, const Tensor& vector, const Tensor& x, int64_t n) {
  if (vector.device() != x.device()) {
    fail(std::string(name) + " must be on x's device; got x on " + text(x.device()) + " and " + name + " on " +
         text(vector.device()));
  }
  if (vector.scalar_type() != ScalarType::Float) {
    fail(std::string(name) + " must be float32; got " + dtype_name(vector.scalar_type()));
  }
  if (vector.dim() != 1 || vector.size(0) != n) {
    fail(std::string(name) + " must have shape [" + std::to_string(n) + "], one value a row of weight; got " +
         text(vector.sizes()));
  }
}

Call check(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
           std::optional<ScalarType> out_dtype, bool fp16_accumulate) {
  const ScalarType x_dtype = x.scalar_type(), weight_dtype = weight.scalar_type();
  if (x.dim() < 1) fail("x must have at least 1 dimension, [..., K]; got shape []");
  if (weight.dim() != 2) fail("weight must have 2 dimensions, [N, K]; got shape " + text(weight.sizes()));
  if (weight.device() != x.device()) {
    fail("weight must be on x's device; got x on " + text(x.device()) + " and weight on " + text(weight.device()));
  }
  if (!is_16_bit(x_dtype) && x_dtype != ScalarType::Float) {
    fail("x must be float16, bfloat16 or float32; got " + dtype_name(x_dtype));
  }
  if (!is_16_bit(weight_dtype)) fail("weight must be float16 or bfloat16; got " + dtype_name(weight_dtype));
  if (is_16_bit(x_dtype) && x_dtype != weight_dtype) {
    fail("x and weight must have the same 16-bit dtype; got x " + dtype_name(x_dtype) + " and weight " +
         dtype_name(weight_dtype));
  }
  const Shape sizes = x.sizes();
  if (sizes[sizes.size() - 1] != weight.size(1)) {
    fail("x [..., K] and weight [N, K] must have the same K; got x of shape " + text(sizes) + " and weight of shape " +
         text(weight.sizes()));
  }
  const int64_t n = weight.size(0);
  check_vector("scale", scale, x, n);
  check_vector("shift", shift, x, n);
  const ScalarType result = out_dtype.value_or(x_dtype);
  if (result != ScalarType::Float && result != weight_dtype) {
    fail("out_dtype must be float32 or weight's " + dtype_name(weight_dtype) + "; got " + dtype_name(result));
  }
  if (fp16_accumulate && weight_dtype != ScalarType::Half) {
    fail("fp16_accumulate needs a float16 weight; got " + dtype_name(weight_dtype));
  }
  std::vector<int64_t> out_sizes(sizes.begin(), sizes.end());
  out_sizes.back() = n;
  return {x, weight, scale, shift, result, fp16_accumulate, std::move(out_sizes)};
}

// Bytes [first, last) that a tensor's elements lie in.
std::tuple<uintptr_t, uintptr_t> span(const Tensor& tensor) {
  const auto first = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  if (tensor.numel() == 0) return {first, first};
  const Shape sizes = tensor.sizes(), strides = tensor.strides();
  int64_t last = 1;
  for (size_t i = 0; i < sizes.size(); ++i) last += (sizes[i] - 1) * strides[i];
  return {first, first + last * tensor.element_size()};
}

// Whether two tensors may share an element: their spans meet, and they are not column windows of one matrix.
bool may_overlap(const Tensor& a, const Tensor& b) {
  const auto [a_first, a_last] = span(a);
  const auto [b_first, b_last] = span(b);
  if (a_last <= b_first || b_last <= a_first || a_first == a_last || b_first == b_last) return false;
  if (a.dim() != 2 || b.dim() != 2 || a.stride(1) != 1 || b.stride(1) != 1) return true;
  const int64_t pitch = a.stride(0) * static_cast<int64_t>(a.element_size());
  if (pitch <= 0 || b.stride(0) * static_cast<int64_t>(b.element_size()) != pitch) return true;
  const int64_t a_width = a.size(1) * a.element_size(), b_width = b.size(1) * b.element_size();
  const int64_t gap = ((static_cast<int64_t>(b_first - a_first) % pitch) + pitch) % pitch;  // from a's column to b's
  return a_width > gap || b_width > pitch - gap;
}

// Whether two elements of a tensor may share memory: a dimension's stride lies inside what the smaller ones span.
bool may_overlap_itself(const Tensor& tensor) {
  const Shape sizes = tensor.sizes(), strides = tensor.strides();
  std::vector<std::tuple<int64_t, int64_t>> dims;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0) return false;
    if (sizes[i] > 1) dims.emplace_back(strides[i], sizes[i]);
  }
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;
  for (const auto& [stride, size] : dims) {
    if (stride <= reach) return true;
    reach += stride * (size - 1);
  }
  return false;
}

void check_out(const Call& call, const Tensor& out) {
  if (out.device() != call.x.device()) {
    fail("out must be on x's device; got x on " + text(call.x.device()) + " and out on " + text(out.device()));
  }
  const Shape sizes = out.sizes();
  if (!std::equal(sizes.begin(), sizes.end(), call.out_sizes.begin(), call.out_sizes.end())) {
    fail("out must have shape " + text(call.out_sizes) + "; got " + text(sizes));
  }
  if (may_overlap_itself(out)) fail("out must not overlap itself; got strides " + text(out.strides()));
  const std::array<std::tuple<const char*, const Tensor*>, 4> inputs{
      {{"x", &call.x}, {"weight", &call.weight}, {"scale", &call.scale}, {"shift", &call.shift}}};
  for (const auto& [name, input] : inputs) {
    if (may_overlap(out, *input)) fail(std::string("out must not overlap ") + name + " in memory");
  }
}

Call check_out_call(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
                    bool fp16_accumulate, const Tensor& out) {
  // out's dtype is the result's, and a bad one is told as out's.
  const ScalarType dtype = out.scalar_type();
  Call call = check(x, weight, scale, shift, ScalarType::Float, fp16_accumulate);
  if (dtype != ScalarType::Float && dtype != weight.scalar_type()) {
    fail("out must be float32 or weight's " + dtype_name(weight.scalar_type()) + "; got " + dtype_name(dtype));
  }
  call.out_dtype = dtype;
  check_out(call, out);
  return call;
}

Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  const int32_t shim_dtype = dtype == ScalarType::Half       ? aoti_torch_dtype_float16()
                             : dtype == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                                                             : aoti_torch_dtype_float32();
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), shim_dtype, device_type,
                                                         like.get_device_index(), &handle));
  return Tensor(handle);
}

// ---- CUDA

void* current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  // libtorch_cuda is not among our libraries, so that one wheel serves CPU builds too; it is in the process if x is on
  // a GPU. RTLD_DEFAULT would not see it: Python opens extensions with RTLD_LOCAL.
  static const auto get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_NOW);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  if (!get) fail("this build of torch has no CUDA (libtorch_cuda.so is not loaded)");
  void* stream = nullptr;
  if (get(device, &stream) != AOTI_TORCH_SUCCESS) {
    fail("torch gave no current stream for cuda:" + std::to_string(device));
  }
  return stream;
}

struct Axis {
  int64_t size, stride_x, stride_out;
};

// x's leading dimensions as few axes as their strides allow, the longest last: that one is the rows of a launch.
std::vector<Axis> row_axes(const Tensor& x, const Tensor& out) {
  const Shape sizes = x.sizes(), strides = x.strides(), out_strides = out.strides();
  std::vector<Axis> axes;
  for (size_t i = 0; i + 1 < sizes.size(); ++i) {
    const Axis axis{sizes[i], strides[i], out_strides[i]};
    if (axis.size == 1) continue;
    if (!axes.empty() && axes.back().stride_x == axis.stride_x * axis.size &&
        axes.back().stride_out == axis.stride_out * axis.size) {
      axes.back() = {axes.back().size * axis.size, axis.stride_x, axis.stride_out};
    } else {
      axes.push_back(axis);
    }
  }
  if (axes.empty()) axes.push_back({1, 0, 0});
  std::stable_sort(axes.begin(), axes.end(), [](const Axis& a, const Axis& b) { return a.size < b.size; });
  return axes;
}

// One launch, or one for each index of the outer axes where x's rows do not lie at one stride.
void launch(const Call& call, const Tensor& out) {
  if (out.numel() == 0) return;
  const int32_t device = call.x.get_device_index();
  void* stream = current_stream(device);
  const int64_t last = call.x.dim() - 1;
  const std::vector<Axis> axes = row_axes(call.x, out);
  const Axis rows = axes.back();
  const Problem problem{to_dtype(call.x.scalar_type()),
                        to_dtype(call.weight.scalar_type()),
                        to_dtype(call.out_dtype),
                        call.fp16_accumulate,
                        rows.size,
                        call.weight.size(0),
                        call.weight.size(1),
                        rows.stride_x,
                        call.x.stride(last),
                        call.weight.stride(0),
                        call.weight.stride(1),
                        call.scale.stride(0),
                        call.shift.stride(0),
                        rows.stride_out,
                        out.stride(last)};
  const auto* x = static_cast<const char*>(call.x.data_ptr());
  auto* y = static_cast<char*>(out.data_ptr());
  const int64_t x_bytes = call.x.element_size(), y_bytes = out.element_size();
  std::vector<int64_t> index(axes.size() - 1, 0);
  for (;;) {
    int64_t x_offset = 0, y_offset = 0;
    for (size_t i = 0; i < index.size(); ++i) {
      x_offset += index[i] * axes[i].stride_x;
      y_offset += index[i] * axes[i].stride_out;
    }
    const Operands operands{x + x_offset * x_bytes, call.weight.data_ptr(), call.scale.data_ptr(),
                            call.shift.data_ptr(), y + y_offset * y_bytes};
    const Status status = run(problem, operands, device, stream);
    if (!status.ok()) fail(status.text);
    size_t axis = 0;
    while (axis < index.size() && ++index[axis] == axes[axis].size) index[axis++] = 0;
    if (axis == index.size()) return;
  }
}

Tensor fused_cuda(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
                  std::optional<ScalarType> out_dtype, bool fp16_accumulate) {
  const Call call = check(x, weight, scale, shift, out_dtype, fp16_accumulate);
  Tensor out = empty(call.out_sizes, call.out_dtype, x);
  launch(call, out);
  return out;
}

Tensor fused_out_cuda(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
                      bool fp16_accumulate, const Tensor& out) {
  launch(check_out_call(x, weight, scale, shift, fp16_accumulate, out), out);
  return out;
}

// ---- CPU and fold: PyTorch's own operators through the dispatcher

template <typename... Args>
Tensor call_aten(const char* op, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor cast(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

// aten::add takes a Scalar, which the stable ABI cannot pass; subtract has a wrapper for it.
Tensor add(const Tensor& a, const Tensor& b) { return torch::stable::subtract(a, b, -1.0); }

// The contract in float32, which holds every product of 16-bit values: fp16_accumulate permits less, never demands it.
Tensor compute_cpu(const Call& call) {
  const Tensor x = cast(cast(call.x, call.weight.scalar_type()), ScalarType::Float);
  const Tensor weight = cast(call.weight, ScalarType::Float);
  Tensor v = torch::stable::matmul(x, torch::stable::transpose(weight, 0, 1));
  v = call_aten("aten::mul", "Tensor", v, call.scale);
  v = add(v, call.shift);
  // relu(gelu(v)) = r * Phi(r) with r = relu(v), which is right at the infinities: PyTorch's vectorised gelu gives NaN.
  v = call_aten("aten::relu", "", v);
  v = call_aten("aten::mul", "Tensor", v, call_aten("aten::special_ndtr", "", v));
  return cast(v, call.out_dtype);
}

Tensor fused_cpu(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
                 std::optional<ScalarType> out_dtype, bool fp16_accumulate) {
  return compute_cpu(check(x, weight, scale, shift, out_dtype, fp16_accumulate));
}

Tensor fused_out_cpu(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
                     bool fp16_accumulate, const Tensor& out) {
  Tensor result = out;
  torch::stable::copy_(result, compute_cpu(check_out_call(x, weight, scale, shift, fp16_accumulate, out)));
  return out;
}

void check_fold(const char* name, const std::optional<Tensor>& vector, const Tensor& mean) {
  const auto fail_fold = [&](const std::string& what) {
    throw std::runtime_error(std::string("lbg::fold: ") + name + " must " + what);
  };
  if (!vector) return;
  if (mean.dim() != 1) fail_fold("have one dimension; got shape " + text(mean.sizes()));  // its own check comes first
  if (vector->dim() != 1 || vector->size(0) != mean.numel()) {
    fail_fold("have running_mean's shape " + text(mean.sizes()) + ", one dimension; got " + text(vector->sizes()));
  }
  const ScalarType dtype = vector->scalar_type();
  if (!is_16_bit(dtype) && dtype != ScalarType::Float && dtype != ScalarType::Double) {
    fail_fold("be floating point; got " + dtype_name(dtype));
  }
  if (vector->device() != mean.device()) {
    fail_fold("be on running_mean's device " + text(mean.device()) + "; got " + text(vector->device()));
  }
}

// In float64, rounded once: shift is a difference of products, where float32 would cancel.
std::tuple<Tensor, Tensor> fold(std::optional<Tensor> bias, const Tensor& running_mean, const Tensor& running_var,
                                std::optional<Tensor> gamma, std::optional<Tensor> beta, double eps) {
  check_fold("running_mean", running_mean, running_mean);
  check_fold("running_var", running_var, running_mean);
  check_fold("bias", bias, running_mean);
  check_fold("gamma", gamma, running_mean);
  check_fold("beta", beta, running_mean);
  const auto wide = [](const Tensor& tensor) { return cast(tensor, ScalarType::Double); };
  const Tensor mean = wide(running_mean);
  const Tensor epsilon = torch::stable::full({}, eps, ScalarType::Double, std::nullopt, mean.device());
  Tensor scale = call_aten("aten::rsqrt", "", add(wide(running_var), epsilon));
  if (gamma) scale = call_aten("aten::mul", "Tensor", wide(*gamma), scale);
  Tensor shift = bias ? torch::stable::subtract(wide(*bias), mean) : call_aten("aten::neg", "", mean);
  shift = call_aten("aten::mul", "Tensor", shift, scale);
  if (beta) shift = add(shift, wide(*beta));
  return {cast(scale, ScalarType::Float), cast(shift, ScalarType::Float)};
}

// ---- registration

// Not STABLE_TORCH_LIBRARY: where the namespace is taken already (a second copy of lbg in the process), that macro
// crashes; this leaves the first copy in charge and keeps the reason for whoever imports the second.
class Registration {
 public:
  Registration() {
    AOTITorchError code = aoti_torch_library_init_def("lbg", "lbg/ops.cpp", 0, &library_);
    if (code != AOTI_TORCH_SUCCESS) {
      error_ = "torch.ops.lbg is registered already by another copy of lbg in this process";
      return;
    }
    def("fused(Tensor x, Tensor weight, Tensor scale, Tensor shift, *, ScalarType? out_dtype=None, "
        "bool fp16_accumulate=False) -> Tensor");
    def("fused.out(Tensor x, Tensor weight, Tensor scale, Tensor shift, *, bool fp16_accumulate=False, "
        "Tensor(a!) out) -> Tensor(a!)");
    def("fold(Tensor? bias, Tensor running_mean, Tensor running_var, Tensor? gamma, Tensor? beta, float eps) "
        "-> (Tensor scale, Tensor shift)");
    impl("CUDA", {{"fused", TORCH_BOX(&fused_cuda)}, {"fused.out", TORCH_BOX(&fused_out_cuda)}});
    impl("CPU", {{"fused", TORCH_BOX(&fused_cpu)}, {"fused.out", TORCH_BOX(&fused_out_cpu)}});
    impl("CompositeImplicitAutograd", {{"fold", TORCH_BOX(&fold)}});
  }
  const std::string& error() const { return error_; }

 private:
  using Boxed = void (*)(StableIValue*, uint64_t, uint64_t);

  void require(AOTITorchError code, const char* what) {
    if (code != AOTI_TORCH_SUCCESS && error_.empty()) error_ = std::string("torch did not accept ") + what;
  }
  void def(const char* schema) { require(aoti_torch_library_def(library_, schema), schema); }
  void impl(const char* key, std::initializer_list<std::pair<const char*, Boxed>> kernels) {
    TorchLibraryHandle library = nullptr;  // never deleted: the operators live as long as the process
    require(aoti_torch_library_init_impl("lbg", key, "lbg/ops.cpp", 0, &library), key);
    for (const auto& [name, boxed] : kernels) {
      if (library) require(torch_library_impl(library, name, boxed, TORCH_ABI_VERSION), name);
    }
  }

  TorchLibraryHandle library_ = nullptr;
  std::string error_;
};

const Registration g_registration;

}  // namespace

const std::string& registration_error() { return g_registration.error(); }

}  // namespace lbg
