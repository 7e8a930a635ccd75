// Bi-WKV4 of one channel in float64 with a running maximum. It computes float64 tensors, and channels whose w or u is
// beyond the bound of the fast scan.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "../shared/accumulators.h"
#include "strip.h"
#include "vector.h"

namespace biwkv {

template <class Number>
class ExactScan {
 public:
  ExactScan(const Strip<Number>& strip, double w, double u) : s(strip), w(w), u(u), rows(s.length) {
    // Keys are relative to the largest. Otherwise the decay would be lost beside keys of -1e30.
    double top = read(s.k);
    for (int64_t t = 1; t < s.length; ++t) top = std::max(top, read(s.k + t * s.k_time));
    Running sum = nothing();
    for (int64_t t = s.length - 1; t >= 0; --t) {
      Row& row = rows[t];
      row.key = read(s.k + t * s.k_time) - top, row.v = read(s.v + t * s.v_time), row.after = sum;
      sum = running_push(sum, w, row.key, row.v, 1.0);
    }
  }

  void forward() {
    Running before = nothing();
    for (int64_t t = 0; t < s.length; ++t) {
      const Row& row = rows[t];
      write(running_output(before, row.after, u + row.key, row.v).y, s.y + t * s.out_time);
      before = running_push(before, w, row.key, row.v, 1.0);
    }
  }

  void backward(double& grad_w, double& grad_u) {
    grad_w = grad_u = 0;
    Running before = nothing(), earlier = nothing();
    for (int64_t t = 0; t < s.length; ++t) {
      Row& row = rows[t];
      const RunningOutput out = running_output(before, row.after, u + row.key, row.v);
      const double grad = read(s.grad_y + t * s.grad_y_time), own = out.own * grad;
      row.m = -out.m, row.a = grad / out.d, row.b = row.a * out.y;
      row.grad_k = own * out.off, row.grad_v = own;
      grad_u += own * out.off;
      add(row, earlier);
      grad_w -= crossing(row.after, earlier);
      row.before = before;
      before = running_push(before, w, row.key, row.v, 1.0);
      earlier = running_push(earlier, w, row.m, row.a, row.b);
    }
    Running later = nothing();
    for (int64_t t = s.length - 1; t >= 0; --t) {
      Row& row = rows[t];
      add(row, later);
      grad_w -= crossing(row.before, later);
      write(row.grad_k, s.grad_k + t * s.out_time);
      write(row.grad_v, s.grad_v + t * s.out_time);
      later = running_push(later, w, row.m, row.a, row.b);
    }
  }

 private:
  struct Row {
    double key, v;
    Running before, after;  // sums over keys
    double m, a, b;                 // what the row adds to the sums over gradients
    double grad_k, grad_v;
  };

  // Below any key that matters, but finite, so that the difference of two of them is zero, not NaN.
  static Running nothing() { return {0, 0, -1e300}; }

  static double read(const Number* p) {
    if constexpr (std::is_same_v<Number, double>) return *p;
    else return load(p, 1)[0];
  }
  static void write(double x, Number* p) {
    if constexpr (std::is_same_v<Number, double>) *p = x;
    else store(Floats{static_cast<float>(x)}, p, 1);
  }

  static void add(Row& row, const Running& gradients) {
    const double weight = exponential(row.key + gradients.m);
    row.grad_v += gradients.n * weight;
    row.grad_k += (row.v * gradients.n - gradients.d) * weight;
  }

  // The factor e^-w is inside the exponent, because the product may overflow without it.
  double crossing(const Running& keys, const Running& gradients) const {
    return exponential(keys.m + gradients.m - w) * (keys.n * gradients.n - keys.d * gradients.d);
  }

  const Strip<Number> s;
  const double w, u;
  std::vector<Row> rows;
};

}  // namespace biwkv
