// csrc/lbg.h's predicted_us of one kernel and shape, given as numbers: what aot/model.py must come to, too.
//
// predict x_bytes weight_bytes out_bytes tile_m tile_n tile_k ctas_per_sm (the nine constants of Cost) m n k
// sms tma persistent l2_bytes_per_sm cluster pieces
#include <cstdio>
#include <cstdlib>

#include "lbg.h"

namespace lbg {
extern const Config kConfigs[] = {{}};
extern const int32_t kConfigCount = 0;
extern const Arch kArchs[] = {{}};
extern const int32_t kArchCount = 0;
}  // namespace lbg

int main(int count, char** texts) {
  using lbg::DType;
  for (char** text = texts + 1; text + 25 <= texts + count; text += 25) {
    const auto whole = [&](int i) { return static_cast<int32_t>(std::atoi(text[i])); };
    const auto real = [&](int i) { return std::atof(text[7 + i]); };
    const auto dtype = [&](int i) { return whole(i) == 4 ? DType::f32 : DType::f16; };
    lbg::Config c{};
    c.x = dtype(0), c.weight = dtype(1), c.out = dtype(2);
    c.tile_m = whole(3), c.tile_n = whole(4), c.tile_k = whole(5), c.ctas_per_sm = whole(6);
    c.cost = {real(0), real(1), real(2), real(3), real(4), real(5), real(6), real(7), real(8)};
    c.tma = whole(20), c.persistent = whole(21), c.l2_bytes_per_sm = whole(22);
    c.cluster = whole(23), c.pieces = whole(24);
    lbg::Problem p{};
    p.x = c.x, p.weight = c.weight, p.out = c.out;
    p.m = whole(16), p.n = whole(17), p.k = whole(18);
    p.stride_xm = p.stride_wn = p.k, p.stride_om = p.n;
    p.stride_xk = p.stride_wk = p.stride_scale = p.stride_shift = p.stride_on = 1;
    std::printf("%.9g\n", lbg::predicted_us(c, lbg::normalised(p), {89, whole(19), false}));
  }
}
