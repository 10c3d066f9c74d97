// The records of the product and the pure functions that join them: Problem -> Config -> predicted time.
// Plain C++17: nothing of torch, of CUDA or of Python is needed to read or to test this layer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace lbg {

enum class DType : int32_t { f16 = 0, bf16 = 1, f32 = 2 };
const char* name(DType dtype);

// Empty text is success. The layers below the op return it; only the op boundary throws.
struct Status {
  std::string text;
  bool ok() const { return text.empty(); }
};

// One product as the caller poses it: sizes and strides in elements.
struct Problem {
  DType x, weight, out;
  bool fp16_accumulate;
  int64_t m, n, k;
  int64_t stride_xm, stride_xk, stride_wn, stride_wk, stride_scale, stride_shift, stride_om, stride_on;
};

struct Operands {
  const void* x;
  const void* weight;
  const void* scale;
  const void* shift;
  void* out;
};

struct Launch {
  uint32_t block, shared_bytes;
  void** params;
};

struct LaunchSite;  // runtime.cpp: the kernel, the stream and the grid that a launcher hands its parameters to
Status submit(const LaunchSite& site, const Launch& launch);

// A row-major matrix, in elements, and how a kernel's TMA unit goes through it: a box at a time.
struct Matrix {
  const void* data;
  DType dtype;
  int64_t rows, columns, stride;
};
struct Box {
  uint32_t rows, columns;
  int32_t swizzle;  // CUtensorMapSwizzle
};
// What triton's kernels take for such a matrix.
struct Descriptor {
  alignas(64) uint64_t map[16];  // CUtensorMap
  int32_t shape[2];
  int64_t strides[2];
};
Status encode(const LaunchSite& site, const Matrix& matrix, const Box& box, Descriptor* descriptor);

// One compiled kernel. The rows are generated from aot/configs.py; `launch` packs this cubin's own parameter list.
struct Config {
  const char* symbol;
  int32_t compiled_arch;  // the arch whose PTX this is, as sm_XY
  int32_t arch;           // the arch the cubin runs on; another one only in a verification build
  DType x, weight, out;
  bool fp16_accumulate, aligned;
  bool tma;  // persistent, its operands behind tensor maps
  int32_t tile_m, tile_n, tile_k, warps, stages;
  int32_t shared_bytes, registers, ctas_per_sm;
  double fixed_us, step_us, latency_us;  // predicted_us's constants
  const unsigned char* cubin;
  size_t cubin_bytes;
  Status (*launch)(const LaunchSite&, const Problem&, const Operands&);
};

extern const Config kConfigs[];
extern const int32_t kConfigCount;
extern const char* const kVersion;
extern const char* const kMinimumDriver;  // the CUDA version that loads these cubins, as "12.0"

// Strides of dimensions that hold one element never address anything: give them the value every kernel accepts.
Problem normalised(Problem problem);

bool aligned16(const Operands& operands);

// Why `config` cannot run `problem` on `arch`; nullptr if it can.
const char* why_not(const Config& config, const Problem& problem, bool aligned_pointers, int32_t arch);

// Microseconds: every wave of CTAs pays its fixed cost; each K step takes the work of all CTAs that share an SM, or the
// latency that a CTA cannot hide once a wave, whichever is longer. A persistent kernel pays the fixed cost once: it
// loads for the next tile while it finishes one.
double predicted_us(const Config& config, const Problem& problem, int32_t sm_count);

int64_t tiles(const Config& config, const Problem& problem);

// CTAs of a launch: one a tile, and no more than fit on the GPU at once if they are persistent.
int64_t grid(const Config& config, const Problem& problem, int32_t sm_count);

// The config with the lowest predicted time among those that can run, the earlier row on a tie; nullptr if none can.
const Config* choose(const Problem& problem, bool aligned_pointers, int32_t arch, int32_t sm_count);

// A choice forced by name, for tests and measurements; empty for none. Process-wide. Fails on an unknown symbol.
Status set_override(const std::string& symbol);
std::string get_override();

std::string shipped_archs();           // "sm_89, sm_90"
std::string describe(const Problem&);  // "M=.., N=.., K=.., x float16, weight ..."

// runtime.cpp
struct Gpu {
  std::string name;
  int32_t arch, sm_count;
};
Status gpu(int32_t device, Gpu* out);
Status warmup(int32_t device, int32_t* kernels_loaded);
Status run(const Problem& problem, const Operands& operands, int32_t device, void* stream);

}  // namespace lbg

// The launcher layer behind a C interface: how tests drive it against a stand-in libcuda, and how a C++ program that
// has no torch can. sizes: m, n, k; strides: the eight of Problem in its order. 0 on success, else `text` is filled.
extern "C" int lbg_run(int32_t x_dtype, int32_t weight_dtype, int32_t out_dtype, int32_t fp16_accumulate,
                       const int64_t* sizes, const int64_t* strides, const void* x, const void* weight,
                       const void* scale, const void* shift, void* out, int32_t device, void* stream, char* text,
                       size_t text_bytes);
