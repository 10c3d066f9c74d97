// What a choice costs: the nanoseconds of choose() over the shipped table, best and median of batches, and how many
// additions the core does meanwhile, on standard output. Linked to csrc/dispatch.cpp and the generated table alone;
// nothing is launched.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "lbg.h"

namespace lbg {
// The generated launchers refer to these.
Status submit(const LaunchSite&, const Launch&) { return {}; }
Status encode(const LaunchSite&, const Matrix&, const Box&, Descriptor*) { return {}; }
}  // namespace lbg

namespace {

struct Question {
  lbg::Problem problem;
  lbg::Alignment pointers;
  lbg::Chip chip;
};

// Of every class in turn: sizes log-uniform in 1 to 16384, rounded to 8 in three cases of four.
std::vector<Question> questions(size_t count) {
  std::mt19937 random(0);
  std::uniform_real_distribution<double> exponent(0, 14);
  std::vector<Question> found;
  while (found.size() < count) {
    const lbg::Config& row = lbg::kConfigs[found.size() % lbg::kConfigCount];
    const int64_t unit = found.size() % 4 ? 8 : 1;
    const auto size = [&](int64_t step) {
      return (static_cast<int64_t>(std::exp2(exponent(random))) + step - 1) / step * step;
    };
    const int64_t m = size(1), n = size(unit), k = size(unit);
    const lbg::Problem problem{row.x, row.weight, row.out, row.fp16_accumulate, m, n, k, k, 1, k, 1, 1, 1, n, 1};
    const int32_t sm_counts[] = {20, 58, 72, 128, 132, 142, 200};
    const lbg::Chip chip{row.arch, sm_counts[found.size() % 7], row.arch == 89 && found.size() % 2};
    found.push_back({problem, {true, true}, chip});
  }
  return found;
}

// Nanoseconds of an addition among others that do not wait for it: what a core gets done beside whatever else it runs.
double addition_ns() {
  constexpr int kCount = 10000, kAtOnce = 16;
  uint64_t a = 0, b = 0, c = 0, d = 0;
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kAtOnce / 4; ++j) {
      a += 3, b += 3, c += 3, d += 3;
      asm volatile("" : "+r"(a), "+r"(b), "+r"(c), "+r"(d));
    }
  }
  const std::chrono::duration<double, std::nano> time = std::chrono::steady_clock::now() - start;
  return time.count() / (kCount * kAtOnce);
}

}  // namespace

int main() {
  const std::vector<Question> asked = questions(4096);
  std::vector<double> batches_ns, additions;
  for (int batch = 0; batch < 200; ++batch) {
    size_t none = 0;
    const auto start = std::chrono::steady_clock::now();
    for (const Question& q : asked) none += !lbg::choose(q.problem, q.pointers, q.chip);
    const std::chrono::duration<double, std::nano> time = std::chrono::steady_clock::now() - start;
    if (none) {
      std::fprintf(stderr, "no kernel for %zu of %zu problems\n", none, asked.size());
      return 1;
    }
    batches_ns.push_back(time.count() / static_cast<double>(asked.size()));
    additions.push_back(batches_ns.back() / addition_ns());
  }
  std::sort(batches_ns.begin(), batches_ns.end());
  std::sort(additions.begin(), additions.end());
  std::printf("%.1f %.1f %.0f\n", batches_ns.front(), batches_ns[batches_ns.size() / 2],
              additions[additions.size() / 2]);
}
