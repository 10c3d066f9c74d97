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

// What dispatch's predicted time is made of: measured, or modelled on the arch's chip (aot/costs.py).
struct Cost {
  double launch_us;          // once: the launch, and what a persistent kernel does but once
  double wave_us;            // of each wave of CTAs: to fill the pipeline, and the epilogue
  double step_us;            // of one CTA's K step in matrix pipe or L2: what CTAs on one SM add up
  double latency_us;         // least time between two K steps of a CTA, however few share its SM
  double crowd_us;           // what a K step takes more when every SM is at it: they share L2 and power
  double off32_us;           // as crowd_us, where rows of x or weight start off 32 bytes: each needs a sector more
  double off64_us;           // the same, off 64 bytes: most lie in two lines of L2
  double off128_us;          // the same, off 128 bytes: some do
  double dram_bytes_per_us;  // one SM's share of the memory's bandwidth
};

// What dispatch has to know of a GPU.
struct Chip {
  int32_t arch, sm_count;
  bool full_rate;  // sm_89: accumulates in float32 as fast as in float16, which no GeForce does; on other arches false
};

// One compiled kernel. The rows are generated from aot/configs.py; `launch` packs this cubin's own parameter list.
struct Config {
  const char* symbol;
  int32_t compiled_arch;  // the arch whose PTX this is, as sm_XY
  int32_t arch;           // the arch the cubin runs on; another one only in a verification build
  DType x, weight, out;
  bool fp16_accumulate;
  bool row_major;    // relies on inner strides of 1
  bool aligned;      // relies on aligned loads too (see Alignment)
  bool out_aligned;  // relies on aligned stores
  bool tma;          // its operands come through tensor maps; it waits by itself for what the stream ran before it
  bool persistent;   // its CTAs, or clusters of them, walk the tiles
  int32_t tile_m, tile_n, tile_k, warps, stages;
  int32_t cluster;  // CTAs that share a tile, each on an SM of its own
  int32_t pieces;   // most that a tile of a last wave is cut into, 1 of a kernel that cuts none: 2, or 4
  int32_t shared_bytes, registers, ctas_per_sm;
  int32_t l2_bytes_per_sm;  // one SM's share of what L2 holds
  Cost cost, full_rate_cost;
  const unsigned char* cubin;
  size_t cubin_bytes;
  Status (*launch)(const LaunchSite&, const Problem&, const Operands&);
};

// Sorted by arch, then by class; in a class by how much they rely on, the kernel that takes any strides last; and then
// from large M to small.
extern const Config kConfigs[];
extern const int32_t kConfigCount;
// The rows of a class: which is the first that relies on all of row_major, aligned and out_aligned, on two of them, on
// one, and on none; and the one after the last.
struct Class {
  int32_t begins[5];
};
// Of each arch, by the values of DType.
struct Arch {
  int32_t arch;
  Class classes[3][3][3][2];  // x, weight, out, fp16_accumulate
};
extern const Arch kArchs[];
extern const int32_t kArchCount;
extern const char* const kVersion;
extern const char* const kMinimumDriver;  // the CUDA version that loads these cubins, as "12.0"

// Strides of dimensions that hold one element never address anything: give them the value every kernel accepts.
Problem normalised(Problem problem);

// Which operands start on 16 bytes: those that are loaded (x, weight, scale, shift), and the result.
struct Alignment {
  bool loads, out;
};
Alignment alignment(const Operands& operands);

// Why `config` cannot run `problem` on `chip`; nullptr if it can.
const char* why_not(const Config& config, const Problem& problem, Alignment pointers, const Chip& chip);

// Microseconds, from how the tiles fall on the SMs:
//
//   loaded       = bytes that a K step loads, over a whole tile's: less than 1 of a matrix smaller than a tile, in a
//                  kernel whose boxes are as small
//   crowd        = crowd_us + loaded * (off32_us, off64_us, off128_us, each if rows of x or weight start off so many
//                  bytes)
//   step(c)      = max(q * step_us, latency_us) + c / SMs * crowd
//                  of a wave of c tiles, q of them on the fullest of the SMs, or of the clusters of SMs that share a
//                  tile
//   busy         = the sum over all waves, the last one partial, of wave_us + K steps * step(c); of a last one whose
//                  tiles are cut into pieces, kShared + (1 - kShared) / pieces of that (what it saves that last columns
//                  are computed as pieces is left out: choices were no better for it)
//   memory       = (x reads * bytes of x + weight reads * bytes of weight + bytes of the result)
//                  / (sm_count * dram_bytes_per_us)
//   predicted_us = launch_us + (busy^4 + memory^4)^(1/4)
//                  + (if it loads through tensor maps: kLateUs, if early() says no; kNoRoomUs, if the tiles of two such
//                     launches are not on the GPU at once)
//
// CTAs walk tiles in groups of 8 tile rows (of 4, if they are persistent and a row has up to 16 tiles), down a group's
// rows, then on to its next columns. x is read once if L2 holds a group's, else once for each set of columns in flight;
// weight once if L2 holds it beside a group's x, else once for each group, or set of groups in flight. Those that load
// through tensor maps and are not persistent go through all of the smaller operand, then on along the larger one, which
// is read once; the smaller one, too, if L2 holds it, else once for each set of the larger one's rows in flight.
//
// A persistent kernel's CTAs take tiles in waves all the same, so one formula serves both. Memory and work overlap but
// not wholly: where both take as long, they take 1.19 times that. It also ranks kernels where memory bounds them all. A
// family's memory grows with its SMs (an RTX 4060 to an RTX 4090, within a factor of 1.5), so the bandwidth is that of
// an SM's share.
double predicted_us(const Config& config, const Problem& problem, const Chip& chip);

// Of what a wave of whole tiles takes, what one of as many pieces takes that are narrow at will: each loads its rows of
// x whole. Of 0.1 to 0.5 the one with which an H100's times are fitted best, and with which choices among the times of
// 200 random shapes are; no command here makes it again.
constexpr double kShared = 0.4;

// What a launch takes that might have begun early: an estimate from an H100's times, which no command here makes again.
constexpr double kLateUs = 1.3;

// What an early launch takes more of whose CTAs none, or not all, find room beside those of one like it: they begin as
// those end. Of 0.3, 0.45 and 0.6 the one by which choices among an H100's times of 400 shapes, half of them held out,
// were best; no command here makes it again.
constexpr double kNoRoomUs = 0.45;

int64_t tiles(const Config& config, const Problem& problem);

// CTAs of a launch: one a tile, or a cluster. If they are persistent, one a piece that its tiles may be cut into, and
// no more than fit on the GPU at once: which of them have work the kernel knows (aot/hopper.py's Tiling).
int64_t grid(const Config& config, const Problem& problem, int32_t sm_count);

// Rows of a box of up to `most` over a matrix of so many: rounded up to 1, 2, 4 or a multiple of 8, so that the TMA
// unit has few rows to fill in with zeros, which takes it longer than to read them.
uint32_t box_rows(int64_t rows, uint32_t most);

// Whether to launch it while what the stream ran before still runs, if it waits for that by itself: the launch then
// costs 1 to 2 us less (on an H100 13.8 to 11.5 us at 16x4096x4096). But its CTAs all begin at once, and where those of
// 64 rows fill the GPU and share rows of the weight, L2 bounds them, and that costs the more the longer K is (16.9
// to 19.4 us at 256x4096x4096).
bool early(const Config& config, const Problem& problem, int32_t sm_count);

// The config of the problem's class with the lowest predicted time among those that can run and rely on most of what
// the call has, the earlier row on a tie; nullptr if none can. Allocates nothing
// and takes no lock.
const Config* choose(const Problem& problem, Alignment pointers, const Chip& chip);

// A choice forced by name, for tests and measurements; empty for none. Process-wide. Fails on an unknown symbol.
Status set_override(const std::string& symbol);
std::string get_override();

std::string shipped_archs();           // "sm_89, sm_90"
std::string describe(const Problem&);  // "M=.., N=.., K=.., x float16, weight ..."

// runtime.cpp
struct Gpu : Chip {
  std::string name;
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
