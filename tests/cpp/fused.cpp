// torch.ops.lbg from C++ alone: opens the extension in a process that has no Python, and calls lbg::fused on the CPU.
//
//   fused M N K LIBRARY [LIBRARY...]   reads x [M, K], weight [N, K] (float16), scale [N], shift [N] (float32) from
//                                      standard input, writes the result [M, N] (float32) to standard output
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <vector>

namespace {

[[noreturn]] void fail(const char* text) {
  std::fprintf(stderr, "%s\n", text);
  std::exit(1);
}

torch::stable::Tensor read(std::vector<int64_t> sizes, int32_t dtype, size_t element_bytes,
                           std::vector<char>& storage) {
  std::vector<int64_t> strides(sizes.size(), 1);
  if (sizes.size() == 2) strides[0] = sizes[1];
  size_t count = 1;
  for (int64_t size : sizes) count *= size;
  storage.resize(count * element_bytes);
  if (std::fread(storage.data(), element_bytes, count, stdin) != count) fail("standard input is too short");
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
      storage.data(), sizes.size(), sizes.data(), strides.data(), 0, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return torch::stable::Tensor(handle);
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 5) fail("usage: fused M N K LIBRARY [LIBRARY...]");
  for (int i = 4; i < count; ++i) {
    if (!dlopen(arguments[i], RTLD_LAZY)) fail(dlerror());
  }
  if (dlsym(RTLD_DEFAULT, "Py_IsInitialized")) fail("Python is in this process");
  const int64_t m = std::atoll(arguments[1]), n = std::atoll(arguments[2]), k = std::atoll(arguments[3]);
  std::array<std::vector<char>, 4> storage;
  const auto x = read({m, k}, aoti_torch_dtype_float16(), 2, storage[0]);
  const auto weight = read({n, k}, aoti_torch_dtype_float16(), 2, storage[1]);
  const auto scale = read({n}, aoti_torch_dtype_float32(), 4, storage[2]);
  const auto shift = read({n}, aoti_torch_dtype_float32(), 4, storage[3]);
  using torch::stable::detail::from;
  const std::optional<torch::headeronly::ScalarType> out_dtype = torch::headeronly::ScalarType::Float;
  std::array<StableIValue, 6> stack{from(x), from(weight), from(scale), from(shift), from(out_dtype), from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("lbg::fused", "", stack.data(), TORCH_ABI_VERSION));
  const auto result = torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
  if (std::fwrite(result.data_ptr(), 4, m * n, stdout) != static_cast<size_t>(m * n)) fail("no room for the result");
  return 0;
}
