// libcuda, opened on first use: the few entry points lbg calls, declared by hand so that no CUDA toolkit is needed.
// Signatures and values are those of the CUDA driver API, stable since CUDA 12.0.
#pragma once

#include <cstddef>

#include "lbg.h"

namespace lbg {

using CUresult = int;
using CUdevice = int;
using CUcontext = struct CUctx_st*;
using CUlibrary = struct CUlib_st*;
using CUkernel = struct CUkern_st*;
using CUstream = struct CUstream_st*;
using CUtensorMap = uint64_t[16];  // 64-byte aligned

struct alignas(8) CUlaunchAttribute {
  int id;
  char pad[4];
  union {
    char bytes[64];
    int programmatic_stream_serialization_allowed;
    unsigned cluster[3];  // CTAs of a cluster along x, y, z
  } value;
};
struct CUlaunchConfig {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
  CUstream stream;
  CUlaunchAttribute* attributes;
  unsigned attribute_count;
};

constexpr CUresult CUDA_SUCCESS = 0;
constexpr int CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16;
constexpr int CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75;
constexpr int CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76;
constexpr int CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97;
constexpr int CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8;
constexpr int CU_STREAM_CAPTURE_MODE_RELAXED = 2;
constexpr int CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION = 4;
constexpr int CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6;
constexpr int CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6;
constexpr int CU_TENSOR_MAP_DATA_TYPE_FLOAT32 = 7;
constexpr int CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9;
constexpr int CU_TENSOR_MAP_INTERLEAVE_NONE = 0;
constexpr int CU_TENSOR_MAP_L2_PROMOTION_L2_128B = 2;
constexpr int CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0;

// name, parameters: what follows the function's own name in the driver's headers
#define LBG_DRIVER_FUNCTIONS(F)                                                                              \
  F(cuInit, (unsigned flags))                                                                                \
  F(cuDriverGetVersion, (int* version))                                                                      \
  F(cuGetErrorName, (CUresult code, const char** text))                                                      \
  F(cuGetErrorString, (CUresult code, const char** text))                                                    \
  F(cuDeviceGetCount, (int* count))                                                                          \
  F(cuDeviceGet, (CUdevice * device, int ordinal))                                                           \
  F(cuDeviceGetName, (char* text, int bytes, CUdevice device))                                               \
  F(cuDeviceGetAttribute, (int* value, int attribute, CUdevice device))                                      \
  F(cuDevicePrimaryCtxRetain, (CUcontext * context, CUdevice device))                                        \
  F(cuCtxGetCurrent, (CUcontext * context))                                                                  \
  F(cuCtxPushCurrent_v2, (CUcontext context))                                                                \
  F(cuCtxPopCurrent_v2, (CUcontext * context))                                                               \
  F(cuThreadExchangeStreamCaptureMode, (int* mode))                                                          \
  F(cuLibraryLoadData, (CUlibrary * library, const void* image, int* jit_options, void** jit_values,         \
                        unsigned jit_count, int* options, void** values, unsigned count))                    \
  F(cuLibraryUnload, (CUlibrary library))                                                                    \
  F(cuLibraryGetKernel, (CUkernel * kernel, CUlibrary library, const char* symbol))                          \
  F(cuKernelSetAttribute, (int attribute, int value, CUkernel kernel, CUdevice device))                      \
  F(cuTensorMapEncodeTiled, (CUtensorMap * map, int dtype, unsigned rank, void* data, const uint64_t* sizes, \
                             const uint64_t* strides, const unsigned* box, const unsigned* element_strides,  \
                             int interleave, int swizzle, int l2_promotion, int oob_fill))                   \
  F(cuLaunchKernelEx, (const CUlaunchConfig* config, CUkernel kernel, void** params, void** extra))

struct Driver {
  int version;  // of CUDA, as 12030 for 12.3
#define LBG_MEMBER(function, parameters) CUresult(*function) parameters;
  LBG_DRIVER_FUNCTIONS(LBG_MEMBER)
#undef LBG_MEMBER
};

// The driver, opened and initialised; a failure is reported and tried again by the next call.
Status driver(const Driver** out);

// "cuLaunchKernel failed: CUDA_ERROR_INVALID_VALUE (1): invalid argument"
Status failure(const Driver& driver, const char* function, CUresult code);

// Calls a driver function and returns its failure from the enclosing function.
#define LBG_DRIVER_CALL(driver, function, ...)                                         \
  do {                                                                                 \
    const ::lbg::CUresult code_ = (driver).function(__VA_ARGS__);                      \
    if (code_ != ::lbg::CUDA_SUCCESS) return ::lbg::failure(driver, #function, code_); \
  } while (0)

}  // namespace lbg
