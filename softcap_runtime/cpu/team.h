// The threads of a call.
#pragma once

#include <cstdint>

namespace softcap {

// A call of one thread keeps out of OpenMP, where a team of one costs a system call at the end of every loop.
class Team {
 public:
  explicit Team(int64_t threads) : threads_(int(threads)) {}

  // Every thread runs `body`, in which all of them come to the same loops in the same order.
  template <class F>
  void run(const F& body) const {
    if (threads_ == 1) return body();
#pragma omp parallel num_threads(threads_)
    body();
  }

  // f(0), ..., f(count - 1): a thread takes the next one when it has done its last.
  template <class F>
  void each(int64_t count, const F& f) const {
    if (threads_ == 1) return all(count, f);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; i++) f(i);
  }

  // The same for short work, dealt out beforehand.
  template <class F>
  void deal(int64_t count, const F& f) const {
    if (threads_ == 1) return all(count, f);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; i++) f(i);
  }

  // Until all threads are here.
  void wait() const {
    if (threads_ == 1) return;
#pragma omp barrier
  }

 private:
  template <class F>
  static void all(int64_t count, const F& f) {
    for (int64_t i = 0; i < count; i++) f(i);
  }
  int threads_;
};

}  // namespace softcap
