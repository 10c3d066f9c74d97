// Which kernel runs a problem: predicates first, then the lowest predicted time. Pure functions over the table.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <set>

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

bool aligned16(const Operands& o) {
  const auto bits = reinterpret_cast<uintptr_t>(o.x) | reinterpret_cast<uintptr_t>(o.weight) |
                    reinterpret_cast<uintptr_t>(o.scale) | reinterpret_cast<uintptr_t>(o.shift) |
                    reinterpret_cast<uintptr_t>(o.out);
  return bits % 16 == 0;
}

int64_t tiles(const Config& c, const Problem& p) {
  return ((p.m + c.tile_m - 1) / c.tile_m) * ((p.n + c.tile_n - 1) / c.tile_n);
}

int64_t grid(const Config& c, const Problem& p, int32_t sm_count) {
  return c.tma ? std::min(tiles(c, p), int64_t{sm_count} * c.ctas_per_sm) : tiles(c, p);
}

const char* why_not(const Config& c, const Problem& p, bool aligned_pointers, int32_t arch) {
  constexpr int64_t kInt32 = std::numeric_limits<int32_t>::max();
  if (c.arch != arch) return "built for another GPU";
  if (c.x != p.x || c.weight != p.weight || c.out != p.out) return "other dtypes";
  if (c.fp16_accumulate != p.fp16_accumulate) return "other accumulation mode";
  if (tiles(c, p) > kInt32) return "more tiles than a grid holds";
  if (!c.aligned) return nullptr;
  // What the aligned kernels were compiled to rely on (aot/configs.py, ALIGNED_HINTS).
  if (!aligned_pointers) return "a pointer is not 16-byte aligned";
  if (p.stride_xk != 1 || p.stride_wk != 1 || p.stride_on != 1) return "an inner stride is not 1";
  if (p.stride_scale != 1 || p.stride_shift != 1) return "scale or shift is not contiguous";
  if (p.stride_xm % 16 || p.stride_wn % 16 || p.stride_om % 16) return "a row stride is not a multiple of 16";
  if (p.n % 16 || p.k % 16) return "N or K is not a multiple of 16";
  if (p.m > kInt32 - c.tile_m || p.n > kInt32 - c.tile_n || p.k > kInt32 - c.tile_k) return "a size needs 64 bits";
  if (!c.tma) return nullptr;
  // What a tensor map can hold.
  if (p.k == 0) return "K is 0";
  if (p.n % 16) return "N is not a multiple of 16";
  if (p.stride_xm < p.k || p.stride_wn < p.k || p.stride_om < p.n) return "rows overlap";
  if (std::max({p.stride_xm, p.stride_wn, p.stride_om}) >= int64_t{1} << 38) return "a row stride needs 40 bits";
  return nullptr;
}

double predicted_us(const Config& c, const Problem& p, int32_t sm_count) {
  const int64_t ctas = tiles(c, p), slots = int64_t{sm_count} * c.ctas_per_sm;
  const auto a_sm = static_cast<double>((ctas + sm_count - 1) / sm_count);
  const auto waves = static_cast<double>((ctas + slots - 1) / slots);
  const auto steps = static_cast<double>((p.k + c.tile_k - 1) / c.tile_k);
  return (c.tma ? 1 : waves) * c.fixed_us + steps * std::max(a_sm * c.step_us, waves * c.latency_us);
}

namespace {
std::atomic<const Config*> g_override{nullptr};
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

const Config* choose(const Problem& p, bool aligned_pointers, int32_t arch, int32_t sm_count) {
  const char* forced = nullptr;
  if (const Config* config = g_override) forced = config->symbol;
  const Config* best = nullptr;
  double best_us = std::numeric_limits<double>::infinity();
  for (int32_t i = 0; i < kConfigCount; ++i) {
    const Config& config = kConfigs[i];
    if (why_not(config, p, aligned_pointers, arch)) continue;
    if (forced && std::strcmp(forced, config.symbol) != 0) continue;
    const double us = predicted_us(config, p, sm_count);
    if (us < best_us) best = &config, best_us = us;
  }
  return best;
}

std::string shipped_archs() {
  std::set<int32_t> archs;
  for (int32_t i = 0; i < kConfigCount; ++i) archs.insert(kConfigs[i].arch);
  std::string text;
  for (int32_t arch : archs) text += (text.empty() ? "sm_" : ", sm_") + std::to_string(arch);
  return text;
}

std::string describe(const Problem& p) {
  const auto size = [](const char* label, int64_t value) { return label + std::to_string(value); };
  std::string text = size("M=", p.m) + size(", N=", p.n) + size(", K=", p.k);
  text += std::string(", x ") + name(p.x) + ", weight " + name(p.weight) + ", result " + name(p.out);
  return p.fp16_accumulate ? text + ", fp16_accumulate" : text;
}

}  // namespace lbg
