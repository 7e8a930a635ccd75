// Bi-WKV4 on the CPU with a running maximum, in the manner of the public kernels (chunk summaries, then each chunk
// again from its neighbours' sums). In doubles it serves float64 tensors and the channels whose w or u lie beyond the
// bound of the fast kernels; in floats it is the benchmark's point of comparison.
#pragma once

#include <atomic>

#include "biwkv4_tasks.h"

#include "biwkv4_arithmetic.h"  // after the vector, whose `exponential` and `larger` it calls

namespace biwkv {

template <class V, class Number>
class RunningScan {
 public:
  static constexpr int kChunk = 32;
  using State = Running<V>;

  RunningScan(const Strip<Number>& strip, V w, V u, State* states) : s(strip), w(w), u(u) {
    chunks = chunks_of(strip.length);
    // Keys count from the largest, or those of -1e30 would swallow the decay.
    top = load<V>(s.k, s.lanes);
    for (int64_t t = 1; t < s.length; ++t) top = larger(load<V>(s.k + t * s.k_time, s.lanes), top);
    prefix = states, suffix = states + chunks, grad_prefix = states + 2 * chunks, grad_suffix = states + 3 * chunks;
  }

  static int64_t chunks_of(int64_t length) { return (length + kChunk - 1) / kChunk; }
  static int64_t states_of(int64_t length, bool backward) { return chunks_of(length) * (backward ? 4 : 2); }

  void forward() {
    sum_chunks();
    for (int64_t c = 0; c < chunks; ++c) {
      State after[kChunk], before = prefix[c];
      scan_back(c, after);
      for (int64_t t = begin(c); t < end(c); ++t) {
        const V key = load_k(t), v = load_v(t);
        store(running_output(before, after[t - begin(c)], u + key, v).y, s.y + t * s.out_time, s.lanes);
        before = running_push(before, w, key, v, one());
      }
    }
  }

  void backward(V& grad_w, V& grad_u) {
    sum_chunks();
    for (int64_t c = 0; c < chunks; ++c) sum_gradients(c);
    join_chunks(grad_prefix, grad_suffix);
    grad_w = grad_u = V{};
    for (int64_t c = 0; c < chunks; ++c) finish(c, grad_w, grad_u);
  }

 private:
  // What a chunk's forward walk leaves for its gradients.
  struct Row {
    State before, after;
    RunningOutput<V> out;
    V key, v, grad;
  };

  static V one() { return splat<V>(1); }
  // Lower than any key that matters, yet finite: the difference of two of them is zero, not NaN.
  static State nothing() { return {V{}, V{}, splat<V>(sizeof(one()[0]) == 8 ? -1e300 : -1e30)}; }
  int64_t begin(int64_t c) const { return c * kChunk; }
  int64_t end(int64_t c) const { return c + 1 < chunks ? (c + 1) * kChunk : s.length; }
  V load_k(int64_t t) const { return load<V>(s.k + t * s.k_time, s.lanes) - top; }
  V load_v(int64_t t) const { return load<V>(s.v + t * s.v_time, s.lanes); }

  void scan_back(int64_t c, State* after) const {
    State sum = suffix[c];
    for (int64_t t = end(c) - 1; t >= begin(c); --t) {
      after[t - begin(c)] = sum;
      sum = running_push(sum, w, load_k(t), load_v(t), one());
    }
  }

  void sum_chunks() {
    for (int64_t c = 0; c < chunks; ++c) {
      State forth = nothing(), back = nothing();
      for (int64_t t = begin(c); t < end(c); ++t) forth = running_push(forth, w, load_k(t), load_v(t), one());
      for (int64_t t = end(c) - 1; t >= begin(c); --t) back = running_push(back, w, load_k(t), load_v(t), one());
      prefix[c] = forth, suffix[c] = back;
    }
    join_chunks(prefix, suffix);
  }

  // Turns each chunk's own sums into the sums of all that comes before (after) it.
  void join_chunks(State* forth, State* back) {
    const auto pass_on = [this](int64_t c, State& sum, State& chunk) {
      const State aged = {sum.n, sum.d, sum.m - w * (typename Lanes<V>::scalar)(end(c) - begin(c))};
      const State joined = running_join(aged, chunk);
      chunk = sum, sum = joined;
    };
    State before = nothing(), after = nothing();
    for (int64_t c = 0; c < chunks; ++c) pass_on(c, before, forth[c]);
    for (int64_t c = chunks - 1; c >= 0; --c) pass_on(c, after, back[c]);
  }

  void walk(int64_t c, Row* rows) const {
    State after[kChunk], before = prefix[c];
    scan_back(c, after);
    for (int64_t t = begin(c); t < end(c); ++t) {
      Row& row = rows[t - begin(c)];
      row.key = load_k(t), row.v = load_v(t), row.grad = load<V>(s.grad_y + t * s.grad_y_time, s.lanes);
      row.before = before, row.after = after[t - begin(c)];
      row.out = running_output(before, row.after, u + row.key, row.v);
      before = running_push(before, w, row.key, row.v, one());
    }
  }

  State push_gradient(const State& sum, const Row& row) const {
    const V a = row.grad / row.out.d;
    return running_push(sum, w, -row.out.m, a, a * row.out.y);
  }

  void sum_gradients(int64_t c) {
    Row rows[kChunk];
    walk(c, rows);
    const int64_t size = end(c) - begin(c);
    State forth = nothing(), back = nothing();
    for (int64_t i = 0; i < size; ++i) forth = push_gradient(forth, rows[i]);
    for (int64_t i = size - 1; i >= 0; --i) back = push_gradient(back, rows[i]);
    grad_prefix[c] = forth, grad_suffix[c] = back;
  }

  void finish(int64_t c, V& grad_w, V& grad_u) const {
    Row rows[kChunk];
    State later[kChunk];
    walk(c, rows);
    State sum = grad_suffix[c];
    for (int64_t i = end(c) - begin(c) - 1; i >= 0; --i) {
      later[i] = sum;
      sum = push_gradient(sum, rows[i]);
    }
    State earlier = grad_prefix[c];
    for (int64_t t = begin(c); t < end(c); ++t) {
      const Row& row = rows[t - begin(c)];
      const State& after = later[t - begin(c)];
      const V from_before = exponential(row.key + earlier.m), from_after = exponential(row.key + after.m);
      const V own = row.out.own * row.grad, a = earlier.n * from_before + after.n * from_after;
      const V b = earlier.d * from_before + after.d * from_after;
      store(a + own, s.grad_v + t * s.out_time, s.lanes);
      store(row.v * a - b + own * row.out.off, s.grad_k + t * s.out_time, s.lanes);
      grad_u += own * row.out.off;
      // The step e^{-w} joins inside the exponent: without it the product may overflow.
      grad_w -= exponential(row.before.m + after.m - w) * (row.before.n * after.n - row.before.d * after.d);
      grad_w -= exponential(row.after.m + earlier.m - w) * (row.after.n * earlier.n - row.after.d * earlier.d);
      earlier = push_gradient(earlier, row);
    }
  }

  Strip<Number> s;
  V w, u, top;
  int64_t chunks;
  State *prefix, *suffix, *grad_prefix, *grad_suffix;
};

// ---- over whole tensors, a strip a task ---------------------------------------------------------------------------

// Channels [channel, channel + lanes) of sequence b with a running maximum; w_at and u_at are null in the forward pass.
template <class V, class Number, class Parameter>
void run_strip(const BiwkvCall& call, int64_t b, int64_t channel, int lanes, double* w_at, double* u_at) {
  using Scan = RunningScan<V, Number>;
  std::vector<typename Scan::State> states(Scan::states_of(call.length, w_at != nullptr));
  const V w = load<V>(static_cast<const Parameter*>(call.w) + channel, lanes);
  const V u = load<V>(static_cast<const Parameter*>(call.u) + channel, lanes);
  Scan scan(strip_at<Number>(call, b, channel, lanes), w, u, states.data());
  if (!w_at) return scan.forward();
  V grad_w, grad_u;
  scan.backward(grad_w, grad_u);
  store(grad_w, w_at, lanes);
  store(grad_u, u_at, lanes);
}

template <class V, class Number, class Parameter>
void running(const BiwkvCall& call, bool backward) {
  constexpr int width = Lanes<V>::count;
  const int64_t strips = (call.channels + width - 1) / width;
  ParameterGradients gradients(call, strips, 1, width);
  std::atomic<bool> full{false};
  run_tasks(call, call.batch * strips, [&](int64_t task) {
    const int64_t b = task / strips, strip = task % strips;
    try {
      run_strip<V, Number, Parameter>(call, b, strip * width, lanes_at(call, strip * width, width),
                                      backward ? gradients.w_at(b, strip, 0) : nullptr, gradients.u_at(b, strip, 0));
    } catch (const std::bad_alloc&) {
      full = true;
    }
  });
  if (full) throw std::bad_alloc();
  if (backward) gradients.finish<Parameter>();
}

}  // namespace biwkv
