// A libcuda.so.1 without a GPU: keeps the state that lbg's launcher layer changes, refuses what a real driver would
// refuse, and writes every call as one line of JSON. It is steered by environment variables, read on each call:
//
//   LBG_STAND_IN_LOG      the file that the calls are appended to
//   LBG_STAND_IN_GPUS     "NVIDIA GeForce RTX 4090:89:128,NVIDIA H100:90:132": name, compute capability, SM count
//   LBG_STAND_IN_VERSION  what cuDriverGetVersion tells, 12080 unless set
//   LBG_STAND_IN_FAIL     "cuLaunchKernelEx:700": that function returns that CUresult
//   LBG_STAND_IN_OPTIN    the most shared memory a block can opt in to, instead of the arch's
#include <elf.h>
#include <fcntl.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "driver.h"

struct lbg::CUctx_st {
  int device;
};
struct lbg::CUlib_st {
  int arch;
  std::string image;
};
struct lbg::CUkern_st {
  std::string symbol;
  int arch;
  std::map<int, int> shared_limit;  // by device
};

using namespace lbg;

namespace {

std::mutex g_mutex;  // of the log and of all that a driver shares between threads
std::map<int, CUctx_st> g_primary;
thread_local std::vector<CUcontext> t_contexts;
thread_local int t_capture_mode = 0;  // global

const char* setting(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value ? value : otherwise;
}

struct StandIn {
  std::string name;
  int arch, sm_count;
};

std::vector<StandIn> gpus() {
  std::vector<StandIn> found;
  std::stringstream rows(setting("LBG_STAND_IN_GPUS", "NVIDIA GeForce RTX 4090:89:128"));
  for (std::string row; std::getline(rows, row, ',');) {
    const size_t last = row.rfind(':'), middle = row.rfind(':', last - 1);
    found.push_back({row.substr(0, middle), std::stoi(row.substr(middle + 1)), std::stoi(row.substr(last + 1))});
  }
  return found;
}

// One call: its fields as JSON, written with its result when it ends.
class Call {
 public:
  explicit Call(const char* function) : function_(function) {
    text_ << "{\"call\": \"" << function << "\"";
    add("thread", static_cast<int64_t>(std::hash<std::thread::id>{}(std::this_thread::get_id()) >> 8));
    add("context", t_contexts.empty() ? -1 : t_contexts.back()->device);
  }
  Call& add(const char* name, int64_t value) {
    text_ << ", \"" << name << "\": " << value;
    return *this;
  }
  Call& add(const char* name, const std::string& value) {
    text_ << ", \"" << name << "\": \"" << value << "\"";
    return *this;
  }
  Call& add(const char* name, const std::vector<int64_t>& values) {
    text_ << ", \"" << name << "\": [";
    for (size_t i = 0; i < values.size(); ++i) text_ << (i ? ", " : "") << values[i];
    text_ << "]";
    return *this;
  }
  // What LBG_STAND_IN_FAIL asks of this function: CUDA_SUCCESS if nothing.
  CUresult failure() const {
    const std::string wanted = setting("LBG_STAND_IN_FAIL", "");
    const size_t colon = wanted.find(':');
    return colon != std::string::npos && wanted.substr(0, colon) == function_ ? std::stoi(wanted.substr(colon + 1)) : 0;
  }
  CUresult end(CUresult result) {
    add("result", result);
    text_ << "}\n";
    std::lock_guard<std::mutex> lock(g_mutex);
    const int file = open(setting("LBG_STAND_IN_LOG", "/dev/null"), O_WRONLY | O_APPEND | O_CREAT, 0600);
    const std::string line = text_.str();
    if (file < 0 || write(file, line.data(), line.size()) != static_cast<ssize_t>(line.size())) std::abort();
    close(file);
    return result;
  }
  // `work` runs unless this function is to fail.
  template <typename Work>
  CUresult run(Work work) {
    const CUresult failed = failure();
    return end(failed ? failed : work());
  }

 private:
  std::string function_;
  std::ostringstream text_;
};

constexpr CUresult kInvalidValue = 1, kInvalidContext = 201, kNoBinary = 209, kInvalidDevice = 101, kNotFound = 500,
                   kCaptureUnsupported = 900;
const std::map<CUresult, std::pair<const char*, const char*>> kErrors{
    {1, {"CUDA_ERROR_INVALID_VALUE", "invalid argument"}},
    {2, {"CUDA_ERROR_OUT_OF_MEMORY", "out of memory"}},
    {100, {"CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"}},
    {101, {"CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"}},
    {201, {"CUDA_ERROR_INVALID_CONTEXT", "invalid device context"}},
    {209, {"CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"}},
    {500, {"CUDA_ERROR_NOT_FOUND", "named symbol not found"}},
    {700, {"CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"}},
    {900, {"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"}}};

// The cubin's length, which its ELF header tells, and the arch it is for; nothing if it is no cubin.
size_t cubin_bytes(const void* image, int* arch) {
  Elf64_Ehdr header;
  std::memcpy(&header, image, sizeof header);
  if (std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0 || header.e_machine != EM_CUDA) return 0;
  *arch = header.e_flags & 0xff;
  if (*arch == 0) *arch = (header.e_flags >> 8) & 0xff;
  const size_t sections = header.e_shoff + size_t{header.e_shnum} * header.e_shentsize;
  return std::max(sections, size_t{header.e_phoff} + size_t{header.e_phnum} * header.e_phentsize);
}

// The layouts of the compiled kernels, a letter a parameter: (p)ointer or 64-bit, (i)nt32. Five pointers, three sizes,
// the strides that are not promised to be 1, two scratch pointers; of _ws, _pp and _ring kernels a tensor map (its
// first word, the address here), shape and strides in place of a matrix's pointer, and of the strides only the
// result's; the result of some has its pointer all the same.
std::vector<int64_t> values(const std::string& symbol, void** params) {
  const auto is = [&](const std::string& kind) {
    return symbol.size() > kind.size() && symbol.compare(symbol.size() - kind.size(), kind.size(), kind) == 0;
  };
  const std::string vectors = "pp", sizes = "iii", scratch = "pp", map = "piipp";
  std::string layout = "ppppp" + sizes + "ppp";
  if (is("_ws") || is("_ws_anyout")) {
    layout = map + map + map + vectors + (is("_ws") ? map : "p") + sizes + "p";  // weight in two boxes
  } else if (is("_pp") || is("_pp_anyout")) {
    layout = map + map + vectors + (is("_pp") ? map : "p") + sizes + "p";
  } else if (is("_ring") || is("_ring_anyout")) {
    layout = map + map + vectors + "p" + sizes + "ppp";  // the weight's pointer and stride last
  } else if (is("_any")) {
    layout = "ppppp" + std::string("ppp") + "pppppppp";
  }
  layout += scratch;
  std::vector<int64_t> found;
  for (size_t i = 0; i < layout.size(); ++i) {
    found.push_back(layout[i] == 'i' ? *static_cast<int32_t*>(params[i]) : *static_cast<int64_t*>(params[i]));
  }
  return found;
}

}  // namespace

extern "C" {

CUresult cuInit(unsigned) {
  return Call("cuInit").run([] { return CUDA_SUCCESS; });
}

CUresult cuDriverGetVersion(int* version) {
  return Call("cuDriverGetVersion").run([&] {
    *version = std::atoi(setting("LBG_STAND_IN_VERSION", "12080"));
    return CUDA_SUCCESS;
  });
}

CUresult cuGetErrorName(CUresult code, const char** text) {
  return Call("cuGetErrorName").run([&] {
    const auto found = kErrors.find(code);
    *text = found == kErrors.end() ? nullptr : found->second.first;
    return *text ? CUDA_SUCCESS : kInvalidValue;
  });
}

CUresult cuGetErrorString(CUresult code, const char** text) {
  return Call("cuGetErrorString").run([&] {
    const auto found = kErrors.find(code);
    *text = found == kErrors.end() ? nullptr : found->second.second;
    return *text ? CUDA_SUCCESS : kInvalidValue;
  });
}

CUresult cuDeviceGetCount(int* count) {
  return Call("cuDeviceGetCount").run([&] {
    *count = static_cast<int>(gpus().size());
    return CUDA_SUCCESS;
  });
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  return Call("cuDeviceGet").add("device", ordinal).run([&] {
    *device = ordinal;
    return ordinal >= 0 && ordinal < static_cast<int>(gpus().size()) ? CUDA_SUCCESS : kInvalidDevice;
  });
}

CUresult cuDeviceGetName(char* text, int bytes, CUdevice device) {
  return Call("cuDeviceGetName").add("device", device).run([&] {
    std::strncpy(text, gpus()[device].name.c_str(), bytes - 1);
    return CUDA_SUCCESS;
  });
}

CUresult cuDeviceGetAttribute(int* value, int attribute, CUdevice device) {
  return Call("cuDeviceGetAttribute").add("device", device).add("attribute", attribute).run([&] {
    const StandIn gpu = gpus()[device];
    if (attribute == 16) return *value = gpu.sm_count, CUDA_SUCCESS;
    if (attribute == 75) return *value = gpu.arch / 10, CUDA_SUCCESS;
    if (attribute == 76) return *value = gpu.arch % 10, CUDA_SUCCESS;
    if (attribute != 97) return kInvalidValue;
    *value = std::atoi(setting("LBG_STAND_IN_OPTIN", gpu.arch == 90 ? "232448" : "101376"));
    return CUDA_SUCCESS;
  });
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return Call("cuDevicePrimaryCtxRetain").add("device", device).run([&] {
    std::lock_guard<std::mutex> lock(g_mutex);
    *context = &g_primary[device];
    (*context)->device = device;
    return CUDA_SUCCESS;
  });
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  return Call("cuCtxGetCurrent").run([&] {
    *context = t_contexts.empty() ? nullptr : t_contexts.back();
    return CUDA_SUCCESS;
  });
}

CUresult cuCtxPushCurrent_v2(CUcontext context) {
  return Call("cuCtxPushCurrent_v2").add("device", context->device).run([&] {
    t_contexts.push_back(context);
    return CUDA_SUCCESS;
  });
}

CUresult cuCtxPopCurrent_v2(CUcontext* context) {
  return Call("cuCtxPopCurrent_v2").run([&] {
    if (t_contexts.empty()) return kInvalidContext;
    *context = t_contexts.back();
    t_contexts.pop_back();
    return CUDA_SUCCESS;
  });
}

CUresult cuThreadExchangeStreamCaptureMode(int* mode) {
  return Call("cuThreadExchangeStreamCaptureMode").add("from", t_capture_mode).add("to", *mode).run([&] {
    std::swap(*mode, t_capture_mode);
    return CUDA_SUCCESS;
  });
}

CUresult cuLibraryLoadData(CUlibrary* library, const void* image, int*, void**, unsigned, int*, void**, unsigned) {
  std::this_thread::sleep_for(std::chrono::milliseconds(2));  // a race for the first load is then a real one
  int arch = 0;
  const size_t bytes = cubin_bytes(image, &arch);
  return Call("cuLibraryLoadData").add("arch", arch).add("bytes", static_cast<int64_t>(bytes)).run([&] {
    if (!bytes) return kInvalidValue;
    if (t_capture_mode != CU_STREAM_CAPTURE_MODE_RELAXED) return kCaptureUnsupported;
    *library = new CUlib_st{arch, std::string(static_cast<const char*>(image), bytes)};
    return CUDA_SUCCESS;
  });
}

CUresult cuLibraryUnload(CUlibrary library) {
  return Call("cuLibraryUnload").run([&] {
    delete library;
    return CUDA_SUCCESS;
  });
}

CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* symbol) {
  return Call("cuLibraryGetKernel").add("symbol", symbol).run([&] {
    if (library->image.find(std::string(symbol) + '\0') == std::string::npos) return kNotFound;
    *kernel = new CUkern_st{symbol, library->arch, {}};
    return CUDA_SUCCESS;
  });
}

CUresult cuKernelSetAttribute(int attribute, int value, CUkernel kernel, CUdevice device) {
  Call call("cuKernelSetAttribute");
  return call.add("symbol", kernel->symbol)
      .add("attribute", attribute)
      .add("value", value)
      .add("device", device)
      .run([&] {
        std::lock_guard<std::mutex> lock(g_mutex);
        kernel->shared_limit[device] = value;
        return CUDA_SUCCESS;
      });
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, int dtype, unsigned rank, void* data, const uint64_t* sizes,
                                const uint64_t* strides, const unsigned* box, const unsigned* element_strides,
                                int interleave, int swizzle, int l2_promotion, int oob_fill) {
  const auto list = [&](auto* first, size_t count) { return std::vector<int64_t>(first, first + count); };
  Call call("cuTensorMapEncodeTiled");
  call.add("dtype", dtype).add("data", reinterpret_cast<int64_t>(data)).add("sizes", list(sizes, rank));
  call.add("strides", list(strides, rank - 1)).add("box", list(box, rank));
  call.add("element_strides", list(element_strides, rank));
  call.add("modes", std::vector<int64_t>{interleave, swizzle, l2_promotion, oob_fill});
  return call.run([&] {
    // what the driver's manual asks of a tiled map without interleaving
    const unsigned bytes = dtype == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2, swizzle_bytes = 16u << swizzle;
    bool legal = reinterpret_cast<uintptr_t>(map) % 64 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
    legal = legal && box[0] * bytes % 16 == 0 && box[0] * bytes <= swizzle_bytes;
    for (unsigned i = 0; i < rank; ++i)
      legal = legal && sizes[i] && sizes[i] <= (1ull << 32) && box[i] && box[i] <= 256;
    for (unsigned i = 0; i + 1 < rank; ++i) {
      legal = legal && strides[i] % 16 == 0 && strides[i] < (1ull << 40) && strides[i] >= sizes[i] * bytes;
    }
    if (!legal) return kInvalidValue;
    (*map)[0] = reinterpret_cast<uint64_t>(data);
    return CUDA_SUCCESS;
  });
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUkernel kernel, void** params, void**) {
  const CUlaunchConfig& c = *config;
  bool early = false, legal = true;
  std::vector<int64_t> cluster{1, 1, 1};
  for (unsigned i = 0; i < c.attribute_count; ++i) {
    const auto& value = c.attributes[i].value;
    if (c.attributes[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION) {
      early = value.programmatic_stream_serialization_allowed == 1;
    } else if (c.attributes[i].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) {
      cluster.assign(value.cluster, value.cluster + 3);
      legal = legal && c.grid_x % cluster[0] == 0 && c.grid_y % cluster[1] == 0 && c.grid_z % cluster[2] == 0;
    } else {
      legal = false;
    }
  }
  Call call("cuLaunchKernelEx");
  call.add("symbol", kernel->symbol).add("grid", std::vector<int64_t>{c.grid_x, c.grid_y, c.grid_z});
  call.add("block", std::vector<int64_t>{c.block_x, c.block_y, c.block_z}).add("shared_bytes", c.shared_bytes);
  call.add("stream", reinterpret_cast<int64_t>(c.stream)).add("params", values(kernel->symbol, params));
  call.add("early", static_cast<int>(early)).add("cluster", cluster);
  return call.run([&] {
    if (t_contexts.empty()) return kInvalidContext;
    if (!legal) return kInvalidValue;
    const int device = t_contexts.back()->device;
    if (gpus()[device].arch != kernel->arch) return kNoBinary;
    std::lock_guard<std::mutex> lock(g_mutex);
    const auto limit = kernel->shared_limit.find(device);
    const unsigned allowed = limit == kernel->shared_limit.end() ? 48 * 1024 : limit->second;
    return c.shared_bytes <= allowed ? CUDA_SUCCESS : kInvalidValue;
  });
}

}  // extern "C"

// A function that lbg comes to use and that is not here, or here with other parameters, does not compile.
#define LBG_SAME(function, parameters) static_assert(std::is_same_v<decltype(&::function), CUresult(*) parameters>);
LBG_DRIVER_FUNCTIONS(LBG_SAME)
