// The fast CPU kernels over whole tensors: strips, segments of time, the last channels, and what lies beyond the bound.
#pragma once

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "biwkv4_running.h"
#include "biwkv4_shifted_backward.h"
#include "biwkv4_shifted_forward.h"

namespace biwkv {

// The channels beyond the last full strip, copied to and from strips of their own, so that the fast kernels see whole
// vectors only.
template <class Number>
class Tail {
 public:
  static constexpr int kWidth = Lanes<Wide>::count;

  Tail(const BiwkvCall& call, bool backward) : call(call), lanes(call.channels % kWidth) {
    if (!lanes) return;
    of_one = call.length * kWidth;
    tensors = backward ? 5 : 3;
    memory = static_cast<Number*>(buffer.at_least(tensors * call.batch * of_one * sizeof(Number)));
  }

  // Sends the strip's pointers to its copies.
  void redirect(Strip<Number>& s, int64_t b) {
    Number* at = memory + b * tensors * of_one;
    s.k_time = s.v_time = s.grad_y_time = s.out_time = kWidth, s.past_cache = false;
    s.k = at, s.v = at + of_one;
    (tensors == 5 ? s.grad_k : s.y) = at + 2 * of_one;
    if (tensors == 5) s.grad_v = at + 3 * of_one, s.grad_y = at + 4 * of_one;
  }

  void copy_in() {
    each_sequence([this](Strip<Number> from, Strip<Number> to) {
      copy(from.k, from.k_time, const_cast<Number*>(to.k), kWidth);
      copy(from.v, from.v_time, const_cast<Number*>(to.v), kWidth);
      if (call.grad_y) copy(from.grad_y, from.grad_y_time, const_cast<Number*>(to.grad_y), kWidth);
    });
  }

  void copy_out() {
    each_sequence([this](Strip<Number> to, Strip<Number> from) {
      if (call.y) copy(from.y, kWidth, to.y, to.out_time);
      if (call.grad_k) copy(from.grad_k, kWidth, to.grad_k, to.out_time);
      if (call.grad_v) copy(from.grad_v, kWidth, to.grad_v, to.out_time);
    });
  }

 private:
  template <class Work>
  void each_sequence(const Work& work) {
    if (!lanes) return;
    run_tasks(call, call.batch, [&](int64_t b) {
      const Strip<Number> own = strip_at<Number>(call, b, call.channels - lanes, lanes);
      Strip<Number> copy = own;
      redirect(copy, b);
      work(own, copy);
    });
  }

  void copy(const Number* from, int64_t from_time, Number* to, int64_t to_time) const {
    const int written = to_time == kWidth ? kWidth : lanes;
    for (int64_t t = 0; t < call.length; ++t, from += from_time, to += to_time) {
      for (int i = 0; i < written; ++i) to[i] = i < lanes ? from[i] : Number{};
    }
  }

  const BiwkvCall& call;
  int lanes, tensors = 0;
  int64_t of_one = 0;
  Buffer buffer;
  Number* memory = nullptr;
};

// The fast kernels over a whole call. A strip goes through all phases before its thread takes another: it comes from
// memory once, and from the caches after that.
template <class Number, bool backward>
class Shifted {
 public:
  static constexpr int kWidth = Lanes<Wide>::count, kSegment = 32;  // a segment is 32 chunks
  static constexpr int64_t kKept = 2048;                            // longest sequence whose weights are kept
  static constexpr int64_t kEnough = 4;                             // strips, to be tasks whole

  explicit Shifted(const BiwkvCall& call)
      : call(call),
        strips((call.channels + kWidth - 1) / kWidth),
        chunks(chunks_of(call.length)),
        segments(call.length <= kKept ? 1 : (chunks + kSegment - 1) / kSegment),
        parameters(call, strips, segments, kWidth),
        tail(call, backward) {
    const int64_t all = call.batch * strips;
    const size_t of_frames = all * sizeof(Frame), of_chunks = all * chunks * sizeof(Chunk);
    const size_t of_gradients = backward ? all * chunks * sizeof(GradientChunk) : 0;
    char* memory = static_cast<char*>(buffer.at_least(of_frames + of_chunks + of_gradients));
    frames = reinterpret_cast<Frame*>(memory);
    links = reinterpret_cast<Chunk*>(memory + of_frames);
    gradient_links = reinterpret_cast<GradientChunk*>(memory + of_frames + of_chunks);
  }

  void run() {
    tail.copy_in();
    segments == 1 ? run_kept() : run_segments();
    tail.copy_out();
    run_beyond_bound();
    if (full) throw std::bad_alloc();
    if (backward) parameters.template finish<float>();
  }

 private:
  using Scan = std::conditional_t<backward, ShiftedBackward<Number>, ShiftedForward<Number>>;

  void run_kept() {
    run_tasks(call, call.batch * strips, [this](int64_t task) {
      const int64_t b = task / strips, strip = task % strips;
      Scan scan;
      if (!open(scan, b, strip)) return;
      try {
        thread_local Buffer kept;
        void* memory = kept.at_least(Scan::kept_bytes(call.length));
        if constexpr (backward) {
          scan.run(memory, parameters.w_at(b, strip, 0), parameters.u_at(b, strip, 0));
        } else {
          scan.run(memory);
        }
        finish_past_cache();
      } catch (const std::bad_alloc&) {
        full = true;
      }
    });
  }

  // Strips are tasks where there are enough of them; else they take turns, each cut into segments that are tasks.
  void run_segments() {
    const auto here = [](int64_t tasks, const auto& task) {
      for (int64_t i = 0; i < tasks; ++i) task(i);
    };
    const auto on_threads = [this](int64_t tasks, const auto& task) { run_tasks(call, tasks, task); };
    const int64_t all = call.batch * strips;
    if (all >= kEnough) {
      on_threads(all, [&](int64_t at) { run_phases(at / strips, at % strips, here); });
    } else {
      here(all, [&](int64_t at) { run_phases(at / strips, at % strips, on_threads); });
    }
  }

  // All phases of a strip; each(tasks, task) runs the tasks of a phase.
  template <class Each>
  void run_phases(int64_t b, int64_t strip, const Each& each) {
    const auto each_chunk = [&](const auto& phase) {
      each(segments, [&](int64_t segment) {
        Scan scan;
        if (!open(scan, b, strip)) return;
        double *to_w = parameters.w_at(b, strip, segment), *to_u = parameters.u_at(b, strip, segment);
        for (int64_t c = segment * kSegment, end = std::min(chunks, c + kSegment); c < end; ++c) {
          scan.look_ahead((c + 1) * kRows, 0);
          phase(scan, c, to_w, to_u);
        }
        finish_past_cache();
      });
    };
    const auto once = [&](const auto& phase) {
      each(1, [&](int64_t) {
        Scan scan;
        if (open(scan, b, strip)) phase(scan);
      });
    };
    each_chunk([](Scan& scan, int64_t c, double*, double*) { scan.sum_keys(c); });
    once([](Scan& scan) { scan.join_keys(); });
    if constexpr (backward) {
      each_chunk([](Scan& scan, int64_t c, double*, double*) { scan.sum_gradients(c); });
      once([](Scan& scan) { scan.join_gradients(); });
      each_chunk([](Scan& scan, int64_t c, double* to_w, double* to_u) { scan.write_gradients(c, to_w, to_u); });
    } else {
      each_chunk([](Scan& scan, int64_t c, double*, double*) { scan.write_output(c); });
    }
  }

  // False where the strip lies beyond the fast kernels' bound.
  bool open(Scan& scan, int64_t b, int64_t strip) {
    const int64_t channel = strip * kWidth, at = b * strips + strip;
    const int lanes = lanes_at(call, channel, kWidth);
    float w[kWidth] = {}, u[kWidth] = {};
    std::copy_n(static_cast<const float*>(call.w) + channel, lanes, w);
    std::copy_n(static_cast<const float*>(call.u) + channel, lanes, u);
    if (!all_within_bound(w, u, lanes, call.length)) return false;
    Strip<Number> s = strip_at<Number>(call, b, channel, kWidth);
    s.past_cache = call.batch * call.length * call.channels * sizeof(Number) >= kLarge && whole_lines();
    if (lanes < kWidth) tail.redirect(s, b);
    scan.open(s, widen_two(w), widen_two(u), &frames[at], &links[at * chunks]);
    if constexpr (backward) scan.attach(&gradient_links[at * chunks]);
    return true;
  }

  bool whole_lines() const {
    const auto misaligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 != 0; };
    return call.channels * sizeof(Number) % 64 == 0 && !misaligned(call.y) && !misaligned(call.grad_k) &&
           !misaligned(call.grad_v);
  }

  // The strips that the fast kernels leave.
  void run_beyond_bound() {
    const float *all_w = static_cast<const float*>(call.w), *all_u = static_cast<const float*>(call.u);
    if (all_within_bound(all_w, all_u, call.channels, call.length)) return;
    constexpr int half = Lanes<Doubles>::count;
    run_tasks(call, call.batch * strips, [this](int64_t task) {
      const int64_t b = task / strips, strip = task % strips;
      const float *w = static_cast<const float*>(call.w) + strip * kWidth;
      const float *u = static_cast<const float*>(call.u) + strip * kWidth;
      if (all_within_bound(w, u, lanes_at(call, strip * kWidth, kWidth), call.length)) return;
      for (int64_t at = 0; at < kWidth && strip * kWidth + at < call.channels; at += half) {
        const int64_t channel = strip * kWidth + at;
        try {
          run_strip<Doubles, Number, float>(call, b, channel, lanes_at(call, channel, half),
                                            backward ? parameters.w_at(b, strip, 0) + at : nullptr,
                                            backward ? parameters.u_at(b, strip, 0) + at : nullptr);
        } catch (const std::bad_alloc&) {
          full = true;
        }
      }
    });
  }

  const BiwkvCall& call;
  int64_t strips, chunks, segments;
  ParameterGradients parameters;
  Tail<Number> tail;
  Buffer buffer;
  Frame* frames;
  Chunk* links;
  GradientChunk* gradient_links;
  std::atomic<bool> full{false};
};

}  // namespace biwkv
