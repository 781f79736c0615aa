// The keys and values of a step of decoding, and of the next one, which is fetched meanwhile.
#pragma once

#include <cstdint>

namespace softcap {

// Keys of a long step, and bytes of a short one's keys.
constexpr int64_t DECODE_STEP = 64, STEP_BYTES = 8192;

// How long a step is, and into which cache it is fetched.
enum Fetch : int64_t { LONG_TO_SECOND = 0, SHORT_TO_FIRST = 1, SHORT_TO_SECOND = 2, FETCHES = 3 };

// Where the rows of a step's keys or values begin, of the first of the heads that are taken together.
struct Rows {
  const char* starts[DECODE_STEP];
  int64_t count;
};

// Those of one of these heads, whose rows begin `offset` bytes later.
struct HeadRows {
  const Rows& step;
  int64_t offset;
  int64_t count() const { return step.count; }
  template <class T>
  const T* at(int64_t row) const {
    return reinterpret_cast<const T*>(step.starts[row] + offset);
  }
};

// Rows of a step to come, `heads` pieces of `bytes` bytes each, fetched bit by bit in the order in which they lie.
class Ahead {
 public:
  Ahead() = default;  // of nothing
  // From piece `begin` on; heads lie `step` bytes apart. Into the first cache, or the second.
  Ahead(const Rows& rows, int64_t heads, int64_t bytes, int64_t step, int64_t begin, bool first)
      : rows_(&rows), heads_(heads), bytes_(bytes), step_(step), row_(begin / heads), head_(begin % heads),
        first_(first) {
    find();
  }
  // The next `bytes` bytes, or what is left of a piece. Inlined by force: GCC takes a function that only fetches for
  // one without effects, and drops its calls.
  __attribute__((always_inline)) void fetch(int64_t bytes) {
    if (left_ <= 0) return;
    if (first_)
      for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(at_ + byte, 0, 3);
    else
      for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(at_ + byte, 0, 2);
    at_ += bytes;
    if ((left_ -= bytes) > 0) return;
    if (++head_ == heads_) head_ = 0, row_++;
    find();
  }

 private:
  void find() {
    left_ = row_ < rows_->count ? bytes_ : 0;
    if (left_) at_ = rows_->starts[row_] + head_ * step_;
  }
  const Rows* rows_ = nullptr;
  int64_t heads_ = 0, bytes_ = 0, step_ = 0, row_ = 0, head_ = 0;
  const char* at_ = nullptr;
  int64_t left_ = 0;
  bool first_ = false;
};

}  // namespace softcap
