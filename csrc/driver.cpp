// Opens libcuda and checks that it is new enough for the cubins.
#include "driver.h"

#include <dlfcn.h>

#include <atomic>
#include <mutex>

namespace lbg {
namespace {

// cuLibraryLoadData, and with it context-independent loading, came with CUDA 12.0 (driver 525).
constexpr int kMinimumVersion = 12000;

std::string dotted(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

std::atomic<const Driver*> g_driver{nullptr};
std::mutex g_mutex;

Status open(Driver* out) {
  const std::string needed =
      std::string("; lbg needs an NVIDIA driver for CUDA ") + kMinimumDriver + " or newer (525+)";
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  if (!library) {
    const char* why = dlerror();
    return {std::string("no NVIDIA driver found: ") + (why ? why : "libcuda.so.1 did not open") + needed};
  }
  const auto find = [library](const char* symbol) { return dlsym(library, symbol); };
  auto* get_version = reinterpret_cast<CUresult (*)(int*)>(find("cuDriverGetVersion"));
  if (!get_version) return {"libcuda.so.1 lacks cuDriverGetVersion" + needed};
  int version = 0;
  if (const CUresult code = get_version(&version); code != CUDA_SUCCESS) {
    return {"libcuda.so.1 tells no version: cuDriverGetVersion failed (" + std::to_string(code) + ")" + needed};
  }
  if (version < kMinimumVersion) return {"the NVIDIA driver is for CUDA " + dotted(version) + needed};
  Driver found{};
  found.version = version;
#define LBG_RESOLVE(function, parameters)                                                  \
  found.function = reinterpret_cast<CUresult(*) parameters>(find(#function));              \
  if (!found.function) {                                                                   \
    return {"the NVIDIA driver (CUDA " + dotted(version) + ") lacks " #function + needed}; \
  }
  LBG_DRIVER_FUNCTIONS(LBG_RESOLVE)
#undef LBG_RESOLVE
  LBG_DRIVER_CALL(found, cuInit, 0);
  *out = found;
  return {};
}

}  // namespace

Status failure(const Driver& driver, const char* function, CUresult code) {
  const char* name = nullptr;
  const char* text = nullptr;
  if (driver.cuGetErrorName(code, &name) != CUDA_SUCCESS || !name) name = "unknown CUresult";
  if (driver.cuGetErrorString(code, &text) != CUDA_SUCCESS || !text) text = "no description";
  return {std::string(function) + " failed: " + name + " (" + std::to_string(code) + "): " + text};
}

Status driver(const Driver** out) {
  if (const Driver* ready = g_driver.load(std::memory_order_acquire)) {
    *out = ready;
    return {};
  }
  static Driver storage;
  std::lock_guard<std::mutex> lock(g_mutex);
  if (!g_driver.load(std::memory_order_relaxed)) {
    Status status = open(&storage);
    if (!status.ok()) return status;
    g_driver.store(&storage, std::memory_order_release);
  }
  *out = &storage;
  return {};
}

}  // namespace lbg
