// Whether the other threads are worth their wait, learnt from the rounds themselves. Torch-free.
//
// On a quiet machine two threads halve a round. Where other processes want the same cores, a
// parallel region ends when the scheduler has let its last thread run, which can take ten
// milliseconds: now and then, so that a mean tells and a median does not. Results do not depend on
// the number of threads, so a round may choose.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <map>
#include <mutex>
#include <tuple>

namespace srn {

// Of one kind of round: whether the next one runs in parallel, given how long those before took.
class Pace {
 public:
  // The first round finds everything cold and does not count.
  bool parallel() const {
    if (rounds_ < kFirst) return rounds_ % 2 == 0;
    return parallel_ ? since_ % kLasting != kLasting - 1 : wait_ <= 0;
  }

  void took(double seconds) {
    const bool was_parallel = parallel();
    if (rounds_++ == 0) return;
    if (rounds_ <= kFirst) {
      learn(was_parallel, seconds);
      return;
    }
    if (parallel_) {
      learn(was_parallel, seconds);
      if (++since_ == kLasting) interval_ = kShortest;
      if (mean_[1] > kMargin * mean_[0]) {
        parallel_ = false;
        wait_ = interval_;
      }
    } else if (was_parallel) {  // a trial: several rounds, since a delay comes now and then
      trial_ += seconds;
      if (++trials_ < kTrials && trial_ < kTrials * mean_[0]) return;
      mean_[1] = trial_ / kTrials;
      parallel_ = kMargin * mean_[1] < mean_[0];
      interval_ = std::min(2 * interval_, kLongest);
      wait_ = interval_;
      since_ = trials_ = 0;
      trial_ = 0.0;
    } else {
      learn(false, seconds);
      --wait_;
    }
  }

 private:
  static constexpr int kFirst = 5;       // rounds that run in turn
  static constexpr int kTrials = 4;      // rounds of a trial
  static constexpr int kShortest = 16;   // rounds until a trial: doubled by each,
  static constexpr int kLongest = 2048;  // up to this,
  // Rounds in parallel that went well; after each so many, one runs on one thread.
  static constexpr int kLasting = 256;
  static constexpr double kWeight = 0.125;  // of the latest round
  static constexpr double kMargin = 1.1;

  void learn(bool parallel, double seconds) {
    double& mean = mean_[parallel];
    mean = mean == 0.0 ? seconds : mean + kWeight * (seconds - mean);
  }

  double mean_[2] = {0.0, 0.0};  // seconds of a round on one thread, and in parallel
  double trial_ = 0.0;
  int64_t rounds_ = 0;
  int wait_ = 0, interval_ = kShortest, since_ = 0, trials_ = 0;
  bool parallel_ = true;
};

// The paces of all kinds of rounds in this process.
class Paces {
 public:
  using Kind = std::tuple<int64_t, int64_t, int64_t>;  // layers, bytes, threads

  bool parallel(const Kind& kind) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (paces_.size() >= kMost && !paces_.count(kind)) paces_.clear();
    return paces_[kind].parallel();
  }
  void took(const Kind& kind, double seconds) {
    std::lock_guard<std::mutex> lock(mutex_);
    paces_[kind].took(seconds);
  }

 private:
  static constexpr size_t kMost = 256;
  std::mutex mutex_;
  std::map<Kind, Pace> paces_;
};

class Stopwatch {
 public:
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace srn
