// Which kernel runs a problem: predicates first, then the lowest predicted time. Pure functions over the table.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
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
  const char *strides, *loads, *k, *out, *map;
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
  } else if (!on_16_bytes(p.stride_xm, p.x) || !on_16_bytes(p.stride_wn, p.weight)) {
    why.loads = "a row stride is not a multiple of 16 bytes";
  }
  if (p.k % 8) why.k = "K is not a multiple of 8";
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
  if (c.aligned && !c.tma && why.k) return why.k;  // a tensor map ends anywhere
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

// Whether it waits by itself for what the stream ran before it, but is better off if it need not: lbg.h's early(). All
// of it is looked at, as predicted_us() has no use for branches.
bool late(const Config& c, const Problem& p, int32_t sm_count) {
  const int64_t count = tiles(c, p);
  return c.tma & !c.persistent & (c.tile_m <= 64) & (p.m > 2 * c.tile_m) & (2 * count > sm_count) & (p.k > 1024);
}

}  // namespace

int64_t grid(const Config& c, const Problem& p, int32_t sm_count) {
  if (!c.persistent) return c.cluster * tiles(c, p);
  return c.cluster * std::min(c.pieces * tiles(c, p), places(c, sm_count) * c.ctas_per_sm);
}

uint32_t box_rows(int64_t rows, uint32_t most) {
  const auto few = static_cast<uint32_t>(std::min<int64_t>(rows, most));
  if (few > 4) return (few + 7) / 8 * 8;
  return few == 3 ? 4 : few;
}

bool early(const Config& c, const Problem& p, int32_t sm_count) { return c.tma && !late(c, p, sm_count); }

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
  double x_bytes, weight_bytes, out_bytes;
  double off32, off64, off128;  // 1 if rows start off so many bytes, else 0
};

Work work(const Problem& p) {
  const auto m = static_cast<double>(p.m), n = static_cast<double>(p.n), k = static_cast<double>(p.k);
  const auto size = [](DType dtype) { return static_cast<double>(bytes(dtype)); };
  const auto off = [row = row_bytes(p)](int64_t boundary) { return row % boundary ? 1.0 : 0.0; };
  return {m * k * size(p.x), n * k * size(p.weight), m * n * size(p.out), off(32), off(64), off(128)};
}

// Bytes to and from DRAM of `at_once` tiles on the GPU: lbg.h's "reads".
double dram_bytes(const Config& c, const Problem& p, const Work& w, int64_t at_once, int32_t sm_count) {
  const double held = static_cast<double>(sm_count) * c.l2_bytes_per_sm;
  const int64_t tiles_m = tiles_of(p.m, c.tile_m), tiles_n = tiles_of(p.n, c.tile_n);
  if (c.tma && !c.persistent) {
    const bool x_is_larger = w.x_bytes > w.weight_bytes;
    const double larger = std::max(w.x_bytes, w.weight_bytes), smaller = std::min(w.x_bytes, w.weight_bytes);
    const int64_t along = x_is_larger ? tiles_m : tiles_n, across = x_is_larger ? tiles_n : tiles_m;
    const int64_t reads = smaller > held ? ceil_div(along, std::max<int64_t>(1, div(at_once, across))) : 1;
    return larger + static_cast<double>(reads) * smaller + w.out_bytes;
  }
  const int64_t group = std::min(c.persistent && tiles_n <= kFewColumns ? kFewColumnsGroup : kGroup, tiles_m);
  const int64_t rows = group * c.tile_m;
  const double group_x = rows < p.m ? w.x_bytes * static_cast<double>(rows) / static_cast<double>(p.m) : w.x_bytes;
  int64_t x_reads = 1, weight_reads = 1;
  if (group_x > held) x_reads = ceil_div(tiles_n, std::max<int64_t>(1, div(at_once, group)));
  if (tiles_n && w.weight_bytes + group_x > held) {
    weight_reads = ceil_div(tiles_m, std::max(group, div(at_once, tiles_n)));
  }
  return static_cast<double>(x_reads) * w.x_bytes + static_cast<double>(weight_reads) * w.weight_bytes + w.out_bytes;
}

// A number of each of two kernels: as many as every CPU's vectors hold.
using Pair = double __attribute__((vector_size(16)));

Pair both(double value) { return Pair{value, value}; }
Pair min(Pair a, Pair b) { return b < a ? b : a; }
Pair max(Pair a, Pair b) { return a < b ? b : a; }

// Into how many pieces, up to `most`, the tiles of a last wave are cut: aot/hopper.py's Tiling.cut().
Pair cut(Pair most, Pair last, Pair at_once) {
  const Pair room = 4 * last <= at_once ? both(4) : 2 * last <= at_once ? both(2) : both(1);
  return min(room, most);
}

// Quotients to whole numbers, which all doubles from 2^52 on are: a sum there is rounded to the nearest. For divisors
// up to 2^16.
constexpr double kAlmostHalf = 0.5 - 0x1p-17, kWholes = 0x1.8p52;
Pair up(Pair quotient) { return quotient + kAlmostHalf + kWholes - kWholes; }
Pair down(Pair quotient) { return quotient - kAlmostHalf + kWholes - kWholes; }

// predicted_us() of two kernels, without branches that go one way for one kernel and the other way for the next: a CPU
// foresees few of those, and each that it does not costs a choice about as much as half a kernel's formula.
[[gnu::always_inline]] inline Pair predicted_us(const Config& a, const Config& b, const Problem& p, const Work& w,
                                                const Chip& chip) {
  const auto each = [&](auto of) {
    return Pair{static_cast<double>(std::invoke(of, a)), static_cast<double>(std::invoke(of, b))};
  };
  const Cost &cost_a = chip.full_rate ? a.full_rate_cost : a.cost, &cost_b = chip.full_rate ? b.full_rate_cost : b.cost;
  const auto cost = [&](double Cost::* of) { return Pair{cost_a.*of, cost_b.*of}; };
  const auto m = static_cast<double>(p.m), n = static_cast<double>(p.n), sm_count = static_cast<double>(chip.sm_count);

  const Pair sms = each([&](const Config& c) { return places(c, chip.sm_count); });
  const Pair ctas = each(&Config::ctas_per_sm), at_once = sms * ctas;
  const Pair count = each([&](const Config& c) { return tiles(c, p); });
  const Pair steps = each([&](const Config& c) { return tiles_of(p.k, c.tile_k); });
  const Pair whole = down(count / at_once), rest = count - whole * at_once;
  Pair last = rest, share = both(1), loaded = both(1), once = cost(&Cost::launch_us);
  if (a.tma || b.tma) {
    const Pair pieces = cut(each(&Config::pieces), rest, at_once);
    last = pieces * rest;
    share = kShared + (1 - kShared) / pieces;
    const Pair tma = each(&Config::tma), small_boxes = tma * (1 - each(&Config::persistent));
    const Pair tile_m = each(&Config::tile_m), tile_n = each(&Config::tile_n);
    const auto step = [x = static_cast<double>(bytes(p.x)), weight = static_cast<double>(bytes(p.weight))](
                          Pair rows, Pair columns) { return rows * x + columns * weight; };
    const Pair box = step(min(both(m), tile_m), min(both(n), tile_n));
    loaded = small_boxes > 0 ? box / step(tile_m, tile_n) : loaded;
    once += kLateUs * each([&](const Config& c) { return late(c, p, chip.sm_count); });
    once += 2 * (whole > 0 ? at_once : last) > at_once ? kNoRoomUs * tma : both(0);
  }
  const Pair off_us =
      w.off128 * cost(&Cost::off128_us) + w.off64 * cost(&Cost::off64_us) + w.off32 * cost(&Cost::off32_us);
  const Pair crowd_us = cost(&Cost::crowd_us) + loaded * off_us;
  const auto wave_us = [&](Pair fullest, Pair per_sm) {
    const Pair step_us = max(fullest * cost(&Cost::step_us), cost(&Cost::latency_us));
    return cost(&Cost::wave_us) + steps * (step_us + per_sm * crowd_us);
  };
  const Pair per_sm = last / sms;
  const Pair busy = whole * wave_us(ctas, ctas) + (rest > 0 ? share * wave_us(up(per_sm), per_sm) : both(0));

  const double held = sm_count * a.l2_bytes_per_sm;  // b is of the same arch
  Pair moved = both(w.x_bytes + w.weight_bytes + w.out_bytes);
  if (w.x_bytes + w.weight_bytes > held) {
    const auto bytes = [&](const Config& c, double most) {
      return dram_bytes(c, p, w, static_cast<int64_t>(most), chip.sm_count);
    };
    moved = Pair{bytes(a, at_once[0]), bytes(b, at_once[1])};
  }
  const Pair memory = moved / (sm_count * cost(&Cost::dram_bytes_per_us));
  const auto squared = [](Pair value) { return value * value; };
  const Pair sum = squared(squared(busy)) + squared(squared(memory));
  return once + Pair{std::sqrt(std::sqrt(sum[0])), std::sqrt(std::sqrt(sum[1]))};
}

}  // namespace

double predicted_us(const Config& c, const Problem& p, const Chip& chip) {
  return predicted_us(c, c, p, work(p), chip)[0];
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
  const bool rarely = why.large || why.map || why.k;
  for (int reliance = why.strides ? 3 : why.loads ? 2 : why.out ? 1 : 0; reliance < 4; ++reliance) {
    const Config* const end = kConfigs + rows.begins[reliance + 1];
    const auto able = [&](const Config* c) {  // the first from here on that can run
      while (rarely && c != end && why_not_in_class(*c, p, why)) ++c;
      return c;
    };
    const Config* best = nullptr;
    double best_us = std::numeric_limits<double>::infinity();
    for (const Config* c = able(kConfigs + rows.begins[reliance]); c != end;) {
      const Config* next = able(c + 1);
      if (next == end) next = c;
      const Pair us = predicted_us(*c, *next, p, w, chip);
      // Compilers make selections of these, not branches.
      if (us[0] < best_us) best = c, best_us = us[0];
      if (us[1] < best_us) best = next, best_us = us[1];
      c = able(next + 1);
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
