// Which kernel runs a problem: predicates first, then the lowest predicted time. Pure functions over the table.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "lbg.h"

namespace lbg {

const char* name(DType dtype) {
  switch (dtype) {
    case DType::f16:
      return "float16";
    case DType::bf16:
      return "bfloat16";
    case DType::f32:
      return "float32";
  }
  return "?";
}

Problem normalised(Problem p) {
  if (p.m <= 1) p.stride_xm = p.stride_om = 0;
  if (p.n <= 1) p.stride_wn = 0, p.stride_on = p.stride_scale = p.stride_shift = 1;
  if (p.k <= 1) p.stride_xk = p.stride_wk = 1;
  return p;
}

Alignment alignment(const Operands& o) {
  const auto starts = [](const void* data) { return reinterpret_cast<uintptr_t>(data); };
  const auto loads = starts(o.x) | starts(o.weight) | starts(o.scale) | starts(o.shift);
  return {loads % 16 == 0, starts(o.out) % 16 == 0};
}

namespace {

std::atomic<const Config*> g_override{nullptr};

constexpr int64_t kInt32 = std::numeric_limits<int32_t>::max();
constexpr int64_t kLarge = kInt32 / 2;           // sizes up to here leave room for a tile, and for some K steps
constexpr int64_t kShiftedK = int64_t{1} << 26;  // shifted loads count a row's bits in 32 of their own

// Sizes that matter fit 32 bits, whose division takes a third of the time on many CPUs.
int64_t div(int64_t a, int64_t b) {
  return a <= kInt32 && b <= kInt32 ? static_cast<uint32_t>(a) / static_cast<uint32_t>(b) : a / b;
}

int64_t ceil_div(int64_t a, int64_t b) { return a <= b ? a > 0 : div(a + b - 1, b); }

int64_t bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

bool on_16_bytes(int64_t stride, DType dtype) { return stride % (dtype == DType::f32 ? 4 : 8) == 0; }

// Every row of x and weight starts on as many bytes as this is a multiple of, if the first does.
int64_t row_bytes(const Problem& p) { return p.stride_xm * bytes(p.x) | p.stride_wn * bytes(p.weight); }

// Sizes of tiles are powers of two, and a choice has no time for divisions.
int64_t tiles_of(int64_t size, int32_t tile) { return (size + tile - 1) >> __builtin_ctz(static_cast<uint32_t>(tile)); }

// The promises of a call that kernels may rely on: why each is broken, nullptr if it is kept. They depend on no config,
// so that choose() looks once. aot/compile.py's hints() is the other side.
struct Broken {
  const char *strides, *loads, *out, *map;
  bool large;  // a size may be more than some kernel can take
};

Broken broken(const Problem& p, Alignment pointers) {
  Broken why{};
  why.large = std::max(p.m, p.n) > kLarge || p.k >= kShiftedK || p.m * p.n > kLarge;
  if (p.stride_xk != 1 || p.stride_wk != 1 || p.stride_on != 1) {
    why.strides = "an inner stride is not 1";
  } else if (p.stride_scale != 1 || p.stride_shift != 1) {
    why.strides = "scale or shift is not contiguous";
  }
  if (!pointers.loads) {
    why.loads = "a pointer is not 16-byte aligned";
  } else if (why.strides) {
    why.loads = why.strides;
  } else if (p.k % 8) {
    why.loads = "K is not a multiple of 8";
  } else if (!on_16_bytes(p.stride_xm, p.x) || !on_16_bytes(p.stride_wn, p.weight)) {
    why.loads = "a row stride is not a multiple of 16 bytes";
  }
  if (!pointers.out) {
    why.out = "the result is not 16-byte aligned";
  } else if (p.n % 8) {
    why.out = "N is not a multiple of 8";
  } else if (!on_16_bytes(p.stride_om, p.out)) {
    why.out = "the result's row stride is not a multiple of 16 bytes";
  }
  // What a tensor map can hold.
  if (p.k == 0) {
    why.map = "K is 0";
  } else if ((p.m > 1 && p.stride_xm < p.k) || (p.n > 1 && p.stride_wn < p.k) || (p.m > 1 && p.stride_om < p.n)) {
    why.map = "rows overlap";
  } else if (std::max({p.stride_xm, p.stride_wn, p.stride_om}) >= int64_t{1} << 38) {
    why.map = "a row stride needs 40 bits";
  }
  return why;
}

// why_not() of a config that is of the problem's class.
[[gnu::always_inline]] inline const char* why_not_in_class(const Config& c, const Problem& p, const Broken& why) {
  if (why.large && tiles(c, p) > kInt32) return "more tiles than a grid holds";
  if (c.out_aligned && why.out) return why.out;
  if (!c.row_major) return nullptr;
  if (const char* loads = c.aligned ? why.loads : why.strides) return loads;
  // Loops look some K steps ahead.
  const int64_t most_k = c.aligned ? kInt32 - 32 * c.tile_k : kShiftedK - 1;
  if (why.large && (p.m > kInt32 - c.tile_m || p.n > kInt32 - c.tile_n || p.k > most_k)) {
    return "a size needs 64 bits";
  }
  return c.tma ? why.map : nullptr;
}

// fp16_accumulate permits what would gain nothing where accumulation in float32 is as fast; an override may ask for it.
Class rows_of(const Problem& p, const Chip& chip) {
  const auto x = static_cast<uint32_t>(p.x), weight = static_cast<uint32_t>(p.weight),
             out = static_cast<uint32_t>(p.out);
  if (std::max({x, weight, out}) > static_cast<uint32_t>(DType::f32)) return {};  // lbg_run takes any number
  const bool fp16_accumulate = p.fp16_accumulate && (!chip.full_rate || g_override);
  for (int32_t i = 0; i < kArchCount; ++i) {
    if (kArchs[i].arch == chip.arch) return kArchs[i].classes[x][weight][out][fp16_accumulate];
  }
  return {};
}

}  // namespace

int64_t tiles(const Config& c, const Problem& p) { return tiles_of(p.m, c.tile_m) * tiles_of(p.n, c.tile_n); }

namespace {

// SMs, or clusters of them, that have tiles of their own.
int64_t places(const Config& c, int32_t sm_count) {
  return c.cluster == 1 ? sm_count : std::max(1, sm_count / c.cluster);
}

// Into how many pieces the tiles of a last wave are cut: aot/hopper.py's Tiling.cut().
int64_t cut(const Config& c, int64_t last, int64_t at_once) {
  int64_t pieces = c.pieces;
  while (pieces > 1 && pieces * last > at_once) pieces /= 2;
  return pieces;
}

}  // namespace

int64_t grid(const Config& c, const Problem& p, int32_t sm_count) {
  const int64_t count = tiles(c, p);
  if (!c.persistent) return c.cluster * count;
  const int64_t at_once = places(c, sm_count) * c.ctas_per_sm;
  return c.cluster * std::min(count * cut(c, count, at_once), at_once);
}

uint32_t box_rows(int64_t rows, uint32_t most) {
  const auto few = static_cast<uint32_t>(std::min<int64_t>(rows, most));
  if (few > 4) return (few + 7) / 8 * 8;
  return few == 3 ? 4 : few;
}

bool early(const Config& c, const Problem& p, int32_t sm_count) {
  if (!c.tma) return false;
  const bool shares_l2 = !c.persistent && c.tile_m <= 64 && p.m > 2 * c.tile_m && 2 * tiles(c, p) > sm_count;
  return !shares_l2 || p.k <= 1024;
}

const char* why_not(const Config& c, const Problem& p, Alignment pointers, const Chip& chip) {
  if (c.arch != chip.arch) return "built for another GPU";
  if (c.x != p.x || c.weight != p.weight || c.out != p.out) return "other dtypes";
  const Class rows = rows_of(p, chip);
  if (&c < kConfigs + rows.begins[0] || &c >= kConfigs + rows.begins[4]) return "other accumulation mode";
  return why_not_in_class(c, p, broken(p, pointers));
}

namespace {

// Rows of tiles in a group, and of a persistent kernel whose rows have few tiles: aot/rules.py's.
constexpr int64_t kGroup = 8, kFewColumns = 16, kFewColumnsGroup = 4;

// What of a problem predicted times depend on, whatever the kernel: choose() looks once.
struct Work {
  double m, x_bytes, weight_bytes, out_bytes;
  bool off32, off64, off128;  // whether rows start off so many bytes
};

Work work(const Problem& p) {
  const auto m = static_cast<double>(p.m), n = static_cast<double>(p.n), k = static_cast<double>(p.k);
  const auto size = [](DType dtype) { return static_cast<double>(bytes(dtype)); };
  const int64_t row = row_bytes(p);
  return {
      m, m * k * size(p.x), n * k * size(p.weight), m * n * size(p.out), row % 32 != 0, row % 64 != 0, row % 128 != 0};
}

// Bytes to and from DRAM of `at_once` tiles on the GPU: lbg.h's "reads".
double dram_bytes(const Config& c, const Problem& p, const Work& w, int64_t at_once, int32_t sm_count) {
  const double held = static_cast<double>(sm_count) * c.l2_bytes_per_sm;
  if (w.x_bytes + w.weight_bytes <= held) return w.x_bytes + w.weight_bytes + w.out_bytes;
  const int64_t tiles_m = tiles_of(p.m, c.tile_m), tiles_n = tiles_of(p.n, c.tile_n);
  int64_t group = c.persistent && tiles_n <= kFewColumns ? kFewColumnsGroup : kGroup;
  group = c.tma && !c.persistent ? tiles_m : std::min(group, tiles_m);
  const int64_t rows = group * c.tile_m;
  const double group_x = rows < p.m ? w.x_bytes * static_cast<double>(rows) / w.m : w.x_bytes;
  int64_t x_reads = 1, weight_reads = 1;
  if (group_x > held) x_reads = ceil_div(tiles_n, std::max<int64_t>(1, div(at_once, group)));
  if (w.weight_bytes + group_x > held) weight_reads = ceil_div(tiles_m, std::max(group, div(at_once, tiles_n)));
  return static_cast<double>(x_reads) * w.x_bytes + static_cast<double>(weight_reads) * w.weight_bytes + w.out_bytes;
}

// lbg.h's "loaded".
double loaded(const Config& c, const Problem& p) {
  if (!c.tma || c.persistent || (p.m >= c.tile_m && p.n >= c.tile_n)) return 1;
  const auto step = [&](int64_t rows, int64_t columns) {
    return static_cast<double>(rows * bytes(c.x) + columns * bytes(c.weight));
  };
  return step(std::min<int64_t>(p.m, c.tile_m), std::min<int64_t>(p.n, c.tile_n)) / step(c.tile_m, c.tile_n);
}

// Of a wave of whole tiles, what one of 1, 2 or 4 pieces takes.
constexpr double kShare[] = {0, 1, kShared + (1 - kShared) / 2, 0, kShared + (1 - kShared) / 4};

// predicted_us(), or something from `enough` on where that is so long: more need not be known then. Inlined into
// choose()'s loop, as why_not_in_class() is.
[[gnu::always_inline]] inline double predicted_us(const Config& c, const Problem& p, const Work& w, const Chip& chip,
                                                  double enough) {
  const Cost& cost = chip.full_rate ? c.full_rate_cost : c.cost;
  const int64_t sms = places(c, chip.sm_count), at_once = sms * c.ctas_per_sm;
  const int64_t count = tiles(c, p), whole = div(count, at_once), rest = count - whole * at_once;
  const int64_t pieces = cut(c, rest, at_once), last = pieces * rest;
  const auto steps = static_cast<double>(tiles_of(p.k, c.tile_k));
  double crowd_us = cost.crowd_us;
  if (w.off128) {
    crowd_us += loaded(c, p) * (cost.off128_us + (w.off64 ? cost.off64_us : 0) + (w.off32 ? cost.off32_us : 0));
  }
  const auto wave_us = [&](int64_t fullest, double per_sm) {
    const double step_us = std::max(static_cast<double>(fullest) * cost.step_us, cost.latency_us);
    return cost.wave_us + steps * (step_us + per_sm * crowd_us);
  };
  double busy = static_cast<double>(whole) * wave_us(c.ctas_per_sm, c.ctas_per_sm);
  if (rest) {
    const double us = wave_us(ceil_div(last, sms), static_cast<double>(last) / static_cast<double>(sms));
    busy += kShare[pieces] * us;
  }
  double once = cost.launch_us;
  if (c.tma && !early(c, p, chip.sm_count)) once += kLateUs;
  if (c.tma && 2 * (whole ? at_once : last) > at_once) once += kNoRoomUs;
  if (once + busy >= enough) return once + busy;
  const double memory = dram_bytes(c, p, w, at_once, chip.sm_count) / (chip.sm_count * cost.dram_bytes_per_us);
  const auto squared = [](double value) { return value * value; };
  const double both = squared(squared(busy)) + squared(squared(memory));
  if (both >= squared(squared(enough - once))) return enough;  // without the roots, which take long
  return once + std::sqrt(std::sqrt(both));
}

}  // namespace

double predicted_us(const Config& c, const Problem& p, const Chip& chip) {
  return predicted_us(c, p, work(p), chip, std::numeric_limits<double>::infinity());
}

Status set_override(const std::string& symbol) {
  if (symbol.empty()) {
    g_override = nullptr;
    return {};
  }
  for (int32_t i = 0; i < kConfigCount; ++i) {
    if (symbol == kConfigs[i].symbol) {
      g_override = &kConfigs[i];
      return {};
    }
  }
  return {"no kernel named '" + symbol + "' is shipped; lbg.configs() lists those that are"};
}

std::string get_override() {
  const Config* forced = g_override;
  return forced ? forced->symbol : "";
}

const Config* choose(const Problem& p, Alignment pointers, const Chip& chip) {
  const Class rows = rows_of(p, chip);
  const Broken why = broken(p, pointers);
  if (const Config* forced = g_override) {
    for (const Config* c = kConfigs + rows.begins[0]; c != kConfigs + rows.begins[4]; ++c) {
      // The arch's own kernel of that name: another arch may ship one too.
      if (std::strcmp(forced->symbol, c->symbol) == 0) return why_not_in_class(*c, p, why) ? nullptr : c;
    }
    return nullptr;
  }
  const Work w = work(p);
  // What relies on more than the call has is passed over at once; of the rest few calls break anything.
  const bool rarely = why.large || why.map;
  for (int reliance = why.strides ? 3 : why.loads ? 2 : why.out ? 1 : 0; reliance < 4; ++reliance) {
    const Config* best = nullptr;
    double best_us = std::numeric_limits<double>::infinity();
    for (const Config* c = kConfigs + rows.begins[reliance]; c != kConfigs + rows.begins[reliance + 1]; ++c) {
      if (rarely && why_not_in_class(*c, p, why)) continue;
      const double us = predicted_us(*c, p, w, chip, best_us);
      if (us < best_us) best = c, best_us = us;
    }
    // What relies on less has masks, shifts or narrow accesses that these do without.
    if (best) return best;
  }
  return nullptr;
}

std::string shipped_archs() {
  std::string text;
  for (int32_t i = 0; i < kArchCount; ++i) text += (i ? ", sm_" : "sm_") + std::to_string(kArchs[i].arch);
  return text;
}

std::string describe(const Problem& p) {
  const auto size = [](const char* label, int64_t value) { return label + std::to_string(value); };
  std::string text = size("M=", p.m) + size(", N=", p.n) + size(", K=", p.k);
  text += std::string(", x ") + name(p.x) + ", weight " + name(p.weight) + ", result " + name(p.out);
  return p.fp16_accumulate ? text + ", fp16_accumulate" : text;
}

}  // namespace lbg
