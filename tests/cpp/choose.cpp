// What a choice costs: the nanoseconds of choose() over the shipped table, best and median of batches, and those of a
// cycle of this machine, on standard output. Linked to csrc/dispatch.cpp and the generated table alone; nothing is
// launched.
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

// Of additions that wait for one another, which take a cycle each; the best of some batches.
double cycle_ns() {
  constexpr int kCount = 100000, kUnrolled = 8;
  double best = 1e9;
  for (int batch = 0; batch < 50; ++batch) {
    uint64_t sum = 0;
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < kUnrolled; ++j) {
        sum += 3;
        asm volatile("" : "+r"(sum));
      }
    }
    const std::chrono::duration<double, std::nano> time = std::chrono::steady_clock::now() - start;
    best = std::min(best, time.count() / (kCount * kUnrolled));
  }
  return best;
}

}  // namespace

int main() {
  const std::vector<Question> asked = questions(4096);
  std::vector<double> batches_ns;
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
  }
  std::sort(batches_ns.begin(), batches_ns.end());
  std::printf("%.1f %.1f %.3f\n", batches_ns.front(), batches_ns[batches_ns.size() / 2], cycle_ns());
}
