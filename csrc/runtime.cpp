// Devices, loaded kernels and the launch itself. A kernel is loaded when it is first chosen, once per process, and
// readied once per device; after that a launch takes no lock.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <memory>
#include <mutex>
#include <vector>

#include "driver.h"
#include "lbg.h"

namespace lbg {
namespace {

struct Device {
  Gpu gpu;
  CUdevice handle = 0;
  CUcontext context = nullptr;  // the primary context, retained for the life of the process
  int shared_limit_bytes = 0;
  std::unique_ptr<std::atomic<CUkernel>[]> ready;  // one per config: set once the kernel may be launched here
};

std::mutex g_mutex;                                       // guards every first time
std::vector<std::unique_ptr<Device>> g_owned;             // under g_mutex
std::unique_ptr<std::atomic<const Device*>[]> g_devices;  // published under g_mutex
std::atomic<int32_t> g_device_count{-1};
std::vector<CUkernel> g_kernels;  // under g_mutex: one per config, null until loaded

// Makes `context` current for a scope, if it is not: the primary one in a thread that has none, or another device's.
class ContextGuard {
 public:
  ContextGuard(const Driver& driver, CUcontext context) : driver_(driver) {
    CUcontext current = nullptr;
    code_ = driver.cuCtxGetCurrent(&current);
    if (code_ == CUDA_SUCCESS && current != context) {
      function_ = "cuCtxPushCurrent";
      code_ = driver.cuCtxPushCurrent_v2(context);
      pushed_ = code_ == CUDA_SUCCESS;
    }
  }
  ~ContextGuard() {
    CUcontext popped = nullptr;
    if (pushed_) driver_.cuCtxPopCurrent_v2(&popped);
  }
  ContextGuard(const ContextGuard&) = delete;
  ContextGuard& operator=(const ContextGuard&) = delete;
  Status status() const { return code_ == CUDA_SUCCESS ? Status{} : failure(driver_, function_, code_); }

 private:
  const Driver& driver_;
  const char* function_ = "cuCtxGetCurrent";
  CUresult code_;
  bool pushed_ = false;
};

// Loading allocates, which a thread whose stream is being captured into a graph may do only in relaxed mode.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(const Driver& driver) : driver_(driver) {
    code_ = driver.cuThreadExchangeStreamCaptureMode(&mode_);
  }
  ~RelaxedCapture() {
    if (code_ == CUDA_SUCCESS) driver_.cuThreadExchangeStreamCaptureMode(&mode_);
  }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;
  Status status() const {
    return code_ == CUDA_SUCCESS ? Status{} : failure(driver_, "cuThreadExchangeStreamCaptureMode", code_);
  }

 private:
  const Driver& driver_;
  CUresult code_;
  int mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;
};

Status open_device(const Driver& driver, int32_t ordinal, Device* device) {
  LBG_DRIVER_CALL(driver, cuDeviceGet, &device->handle, ordinal);
  char name[256] = "";
  LBG_DRIVER_CALL(driver, cuDeviceGetName, name, sizeof name, device->handle);
  device->gpu.name = name;
  int major = 0, minor = 0;
  const auto read = [&](int attribute, int* value) {
    return driver.cuDeviceGetAttribute(value, attribute, device->handle);
  };
  CUresult code = read(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, &major);
  if (code == CUDA_SUCCESS) code = read(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, &minor);
  if (code == CUDA_SUCCESS) code = read(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, &device->gpu.sm_count);
  if (code == CUDA_SUCCESS) {
    code = read(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, &device->shared_limit_bytes);
  }
  if (code != CUDA_SUCCESS) return failure(driver, "cuDeviceGetAttribute", code);
  device->gpu.arch = major * 10 + minor;
  device->gpu.full_rate = device->gpu.arch == 89 && device->gpu.name.find("GeForce") == std::string::npos;
  const bool served =
      std::any_of(kArchs, kArchs + kArchCount, [&](const Arch& shipped) { return shipped.arch == device->gpu.arch; });
  if (!served) {
    return {"cuda:" + std::to_string(ordinal) + " is a " + device->gpu.name + " (compute capability " +
            std::to_string(major) + "." + std::to_string(minor) + "); this build of lbg ships kernels for " +
            shipped_archs() + " only"};
  }
  LBG_DRIVER_CALL(driver, cuDevicePrimaryCtxRetain, &device->context, device->handle);
  device->ready = std::make_unique<std::atomic<CUkernel>[]>(kConfigCount);
  for (int32_t i = 0; i < kConfigCount; ++i) device->ready[i] = nullptr;
  return {};
}

Status find_device(const Driver& driver, int32_t ordinal, const Device** out) {
  const int32_t known = g_device_count.load(std::memory_order_acquire);
  if (ordinal >= 0 && ordinal < known) {
    if (const Device* device = g_devices[ordinal].load(std::memory_order_acquire)) {
      *out = device;
      return {};
    }
  }
  std::lock_guard<std::mutex> lock(g_mutex);
  if (g_device_count.load(std::memory_order_relaxed) < 0) {
    int count = 0;
    LBG_DRIVER_CALL(driver, cuDeviceGetCount, &count);
    g_devices = std::make_unique<std::atomic<const Device*>[]>(count);
    for (int i = 0; i < count; ++i) g_devices[i] = nullptr;
    g_device_count.store(count, std::memory_order_release);
  }
  const int32_t count = g_device_count.load(std::memory_order_relaxed);
  if (ordinal < 0 || ordinal >= count) {
    return {"there is no cuda:" + std::to_string(ordinal) + "; the driver shows " + std::to_string(count) + " GPU(s)"};
  }
  if (!g_devices[ordinal].load(std::memory_order_relaxed)) {
    auto device = std::make_unique<Device>();
    Status status = open_device(driver, ordinal, device.get());
    if (!status.ok()) return status;
    g_devices[ordinal].store(device.get(), std::memory_order_release);
    g_owned.push_back(std::move(device));
  }
  *out = g_devices[ordinal].load(std::memory_order_relaxed);
  return {};
}

// Loads a config's cubin into the process. Under g_mutex.
Status load(const Driver& driver, const Config& config, CUkernel* out) {
  if (g_kernels.empty()) g_kernels.resize(kConfigCount, nullptr);
  CUkernel& kernel = g_kernels[&config - kConfigs];
  if (!kernel) {
    CUlibrary library = nullptr;
    LBG_DRIVER_CALL(driver, cuLibraryLoadData, &library, config.cubin, nullptr, nullptr, 0, nullptr, nullptr, 0);
    CUkernel found = nullptr;
    const CUresult code = driver.cuLibraryGetKernel(&found, library, config.symbol);
    if (code != CUDA_SUCCESS) {
      driver.cuLibraryUnload(library);
      return failure(driver, "cuLibraryGetKernel", code);
    }
    kernel = found;
  }
  *out = kernel;
  return {};
}

Status ready_kernel(const Driver& driver, const Device& device, const Config& config, CUkernel* out) {
  std::atomic<CUkernel>& slot = device.ready[&config - kConfigs];
  *out = slot.load(std::memory_order_acquire);
  if (*out) return {};
  std::lock_guard<std::mutex> lock(g_mutex);
  *out = slot.load(std::memory_order_relaxed);
  if (*out) return {};
  if (config.shared_bytes > device.shared_limit_bytes) {
    return {"it needs " + std::to_string(config.shared_bytes) + " bytes of shared memory a block and " +
            device.gpu.name + " allows " + std::to_string(device.shared_limit_bytes)};
  }
  RelaxedCapture relaxed(driver);
  CUkernel kernel = nullptr;
  Status status = relaxed.status();
  if (status.ok()) status = load(driver, config, &kernel);
  if (!status.ok()) return status;
  if (config.shared_bytes > 48 * 1024) {  // up to 48 KB needs no opt-in
    LBG_DRIVER_CALL(driver, cuKernelSetAttribute, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, config.shared_bytes,
                    kernel, device.handle);
  }
  slot.store(kernel, std::memory_order_release);
  *out = kernel;
  return {};
}

Status in_kernel(const Config& config, const Problem& problem, const Status& status) {
  return {std::string("kernel ") + config.symbol + " (" + describe(problem) + "): " + status.text};
}

}  // namespace

struct LaunchSite {
  const Driver& driver;
  CUkernel kernel;
  CUstream stream;
  uint32_t grid, cluster;
  bool early;  // dispatch.cpp's
};

namespace {

bool operator==(const Matrix& a, const Matrix& b) {
  return a.data == b.data && a.dtype == b.dtype && a.rows == b.rows && a.columns == b.columns && a.stride == b.stride;
}
bool operator==(const Box& a, const Box& b) {
  return a.rows == b.rows && a.columns == b.columns && a.swizzle == b.swizzle;
}

// A tensor map says where a matrix lies and not what it holds, so a map made once for the same place is never stale:
// weights keep theirs, and x and the result mostly, as torch hands out the same memory again.
struct KnownMap {
  Matrix matrix{};
  Box box{};
  Descriptor descriptor{};
};

KnownMap& known_map(const Matrix& matrix, const Box& box) {
  thread_local KnownMap known[64];
  uint64_t hash = reinterpret_cast<uintptr_t>(matrix.data) / 512;  // torch's allocations start on 512 bytes
  hash = (hash * 31 + static_cast<uint64_t>(matrix.rows)) * 31 + box.rows;
  return known[hash * 0x9E3779B97F4A7C15u >> 58];
}

}  // namespace

// The values are those of triton's own launcher; sizes, strides and box go innermost dimension first, strides in bytes.
Status encode(const LaunchSite& site, const Matrix& matrix, const Box& box, Descriptor* descriptor) {
  KnownMap& known = known_map(matrix, box);
  if (known.matrix == matrix && known.box == box) {
    *descriptor = known.descriptor;
    return {};
  }
  constexpr struct {
    int type;
    uint64_t bytes;
  } kElements[] = {{CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2},
                   {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2},
                   {CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4}};
  const auto& element = kElements[static_cast<int32_t>(matrix.dtype)];
  // The stride of a single row addresses nothing, but has to be one that a map can hold.
  const uint64_t row_bytes = matrix.columns * element.bytes;
  const uint64_t stride_bytes = matrix.rows > 1 ? matrix.stride * element.bytes : (row_bytes + 15) / 16 * 16;
  const uint64_t sizes[] = {static_cast<uint64_t>(matrix.columns), static_cast<uint64_t>(matrix.rows)};
  const uint64_t strides[] = {stride_bytes};
  const unsigned box_sizes[] = {box.columns, box.rows}, element_strides[] = {1, 1};
  LBG_DRIVER_CALL(site.driver, cuTensorMapEncodeTiled, &descriptor->map, element.type, 2,
                  const_cast<void*>(matrix.data), sizes, strides, box_sizes, element_strides,
                  CU_TENSOR_MAP_INTERLEAVE_NONE, box.swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  descriptor->shape[0] = static_cast<int32_t>(matrix.rows);
  descriptor->shape[1] = static_cast<int32_t>(matrix.columns);
  descriptor->strides[0] = matrix.stride;
  descriptor->strides[1] = 1;
  known = {matrix, box, *descriptor};
  return {};
}

// From CUDA 12.3 on a graph that captures an early launch keeps it as one.
constexpr int kEarlyVersion = 12030;

Status submit(const LaunchSite& site, const Launch& launch) {
  CUlaunchAttribute attributes[2]{};
  unsigned count = 0;
  if (site.cluster > 1) {
    attributes[count].id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    for (unsigned& ctas : attributes[count].value.cluster) ctas = 1;
    attributes[count++].value.cluster[0] = site.cluster;
  }
  if (site.early && site.driver.version >= kEarlyVersion) {
    attributes[count].id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attributes[count++].value.programmatic_stream_serialization_allowed = 1;
  }
  const CUlaunchConfig config{site.grid, 1, 1, launch.block, 1, 1, launch.shared_bytes, site.stream, attributes, count};
  LBG_DRIVER_CALL(site.driver, cuLaunchKernelEx, &config, site.kernel, launch.params, nullptr);
  return {};
}

Status gpu(int32_t ordinal, Gpu* out) {
  const Driver* driver = nullptr;
  const Device* device = nullptr;
  Status status = lbg::driver(&driver);
  if (status.ok()) status = find_device(*driver, ordinal, &device);
  if (status.ok()) *out = device->gpu;
  return status;
}

Status warmup(int32_t ordinal, int32_t* kernels_loaded) {
  const Driver* driver = nullptr;
  const Device* device = nullptr;
  Status status = lbg::driver(&driver);
  if (status.ok()) status = find_device(*driver, ordinal, &device);
  if (!status.ok()) return status;
  ContextGuard guard(*driver, device->context);
  if (!(status = guard.status()).ok()) return status;
  *kernels_loaded = 0;
  for (int32_t i = 0; i < kConfigCount; ++i) {
    if (kConfigs[i].arch != device->gpu.arch) continue;
    CUkernel kernel = nullptr;
    status = ready_kernel(*driver, *device, kConfigs[i], &kernel);
    if (!status.ok()) return {std::string("kernel ") + kConfigs[i].symbol + ": " + status.text};
    ++*kernels_loaded;
  }
  return {};
}

Status run(const Problem& given, const Operands& operands, int32_t ordinal, void* stream) {
  if (given.m == 0 || given.n == 0) return {};
  const Driver* driver = nullptr;
  const Device* device = nullptr;
  Status status = lbg::driver(&driver);
  if (status.ok()) status = find_device(*driver, ordinal, &device);
  if (!status.ok()) return status;
  const Problem problem = normalised(given);
  const Config* config = choose(problem, alignment(operands), device->gpu);
  if (!config) {
    const std::string forced = get_override();
    return {(forced.empty() ? "no shipped kernel" : "the overriding kernel " + forced + " cannot run, so nothing") +
            " runs " + describe(problem) + " on sm_" + std::to_string(device->gpu.arch)};
  }
  ContextGuard guard(*driver, device->context);
  if (!(status = guard.status()).ok()) return status;
  CUkernel kernel = nullptr;
  status = ready_kernel(*driver, *device, *config, &kernel);
  if (status.ok()) {
    const int32_t sm_count = device->gpu.sm_count;
    const LaunchSite site{*driver,
                          kernel,
                          static_cast<CUstream>(stream),
                          static_cast<uint32_t>(grid(*config, problem, sm_count)),
                          static_cast<uint32_t>(config->cluster),
                          early(*config, problem, sm_count)};
    status = config->launch(site, problem, operands);
  }
  return status.ok() ? status : in_kernel(*config, problem, status);
}

}  // namespace lbg

extern "C" __attribute__((visibility("default"))) int lbg_run(int32_t x_dtype, int32_t weight_dtype, int32_t out_dtype,
                                                              int32_t fp16_accumulate, const int64_t* sizes,
                                                              const int64_t* strides, const void* x, const void* weight,
                                                              const void* scale, const void* shift, void* out,
                                                              int32_t device, void* stream, char* text,
                                                              size_t text_bytes) {
  const lbg::Problem problem{static_cast<lbg::DType>(x_dtype),
                             static_cast<lbg::DType>(weight_dtype),
                             static_cast<lbg::DType>(out_dtype),
                             fp16_accumulate != 0,
                             sizes[0],
                             sizes[1],
                             sizes[2],
                             strides[0],
                             strides[1],
                             strides[2],
                             strides[3],
                             strides[4],
                             strides[5],
                             strides[6],
                             strides[7]};
  const lbg::Status status = lbg::run(problem, {x, weight, scale, shift, out}, device, stream);
  std::snprintf(text, text_bytes, "%s", status.text.c_str());
  return status.ok() ? 0 : 1;
}
