#include "thread_team.h"

#include <bit>
#include <chrono>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace apportion {

namespace {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The upper half of state_ (the generation) as a 32-bit word to sleep on.
uint32_t* futex_word(std::atomic<uint64_t>& state) { return reinterpret_cast<uint32_t*>(&state) + (std::endian::native == std::endian::little ? 1 : 0); }

void futex_sleep(std::atomic<uint64_t>& state, uint32_t expected) {
#if defined(__linux__)
  syscall(SYS_futex, futex_word(state), FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
#else
  if (uint32_t(state.load() >> 32) == expected) std::this_thread::sleep_for(std::chrono::microseconds(50));
#endif
}

void futex_wake_all(std::atomic<uint64_t>& state) {
#if defined(__linux__)
  syscall(SYS_futex, futex_word(state), FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
#else
  (void)state;
#endif
}

std::atomic<int64_t> run_ns{0};

struct RunTimer {
  std::chrono::steady_clock::time_point start = std::chrono::steady_clock::now();
  ~RunTimer() { run_ns.fetch_add((std::chrono::steady_clock::now() - start).count(), std::memory_order_relaxed); }
};

bool pin(std::thread& thread, int core) {
#if defined(__linux__)
  if (core < 0 || core >= CPU_SETSIZE) return false;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  return pthread_setaffinity_np(thread.native_handle(), sizeof(set), &set) == 0;
#else
  (void)thread, (void)core;
  return true;
#endif
}

}  // namespace

constexpr size_t HUGE_PAGE = size_t(1) << 21;

std::byte* ThreadTeam::Scratch::grow(size_t bytes) {
  std::free(data);
  const size_t page = bytes < HUGE_PAGE / 2 ? 4096 : HUGE_PAGE;
  capacity = (bytes + bytes / 2 + page - 1) / page * page;
  data = static_cast<std::byte*>(std::aligned_alloc(page, capacity));
  if (data == nullptr) {
    capacity = 0;
    throw std::bad_alloc();
  }
#if defined(__linux__)
  if (page == HUGE_PAGE) madvise(data, capacity, MADV_HUGEPAGE);  // advice: where it is refused nothing is lost
#endif
  return data;
}

ThreadTeam::Scratch::~Scratch() { std::free(data); }

ThreadTeam::ThreadTeam(int num_threads, std::vector<int> cores)
    : num_threads_(num_threads),
      cores_(std::move(cores)),
      local_(num_threads > 0 ? num_threads : 0),
      shares_(num_threads > 0 ? num_threads : 0) {
  if (num_threads < 1) throw std::invalid_argument("num_threads is " + std::to_string(num_threads) + "; a team needs at least 1.");
  if (!cores_.empty() && int(cores_.size()) < num_threads)
    throw std::invalid_argument("a team of " + std::to_string(num_threads) + " threads got only " + std::to_string(cores_.size()) + " cores.");
  for (int thread = 1; thread < num_threads; ++thread) {
    workers_.emplace_back([this, thread] { worker(thread); });
    if (!cores_.empty() && !pin(workers_.back(), cores_[thread])) {
      stop();
      throw std::invalid_argument("a thread cannot be kept on core " + std::to_string(cores_[thread]) + ": this process may not use it.");
    }
  }
}

ThreadTeam::~ThreadTeam() { stop(); }

void ThreadTeam::stop() {
  stop_.store(true, std::memory_order_release);
  state_.fetch_add(uint64_t(1) << 32, std::memory_order_seq_cst);
  futex_wake_all(state_);
  for (std::thread& thread : workers_) thread.join();
}

double ThreadTeam::run_seconds() { return double(run_ns.load(std::memory_order_relaxed)) * 1e-9; }

void ThreadTeam::take_items(int thread) {
  for (int turn = 0; turn < num_threads_; ++turn) {
    Share& share = shares_[(thread + turn) % num_threads_];
    for (int64_t item; (item = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) work_(context_, item, thread);
  }
}

void ThreadTeam::run(int64_t num_items, Work work, void* context) {
  if (num_items <= 0) return;
  std::lock_guard<std::mutex> one_at_a_time(caller_);
  RunTimer timer;
  if (num_items == 1 || num_threads_ == 1) {
    for (int64_t item = 0; item < num_items; ++item) work(context, item, 0);
    return;
  }
  work_ = work;
  context_ = context;
  for (int thread = 0; thread < num_threads_; ++thread) {
    shares_[thread].next.store(num_items * thread / num_threads_, std::memory_order_relaxed);
    shares_[thread].end = num_items * (thread + 1) / num_threads_;
  }
  const uint64_t generation = (state_.load(std::memory_order_relaxed) >> 32) + 1;
  // Sequentially consistent with `sleeping_`: either the worker sees this generation before it sleeps or we see it sleeping.
  state_.store(generation << 32 | OPEN, std::memory_order_seq_cst);
  if (sleeping_.load(std::memory_order_seq_cst) > 0) futex_wake_all(state_);
  take_items(0);
  uint64_t inside = state_.fetch_and(~OPEN, std::memory_order_acq_rel) & (OPEN - 1);
  for (int spins = 0; inside != 0; inside = state_.load(std::memory_order_acquire) & (OPEN - 1)) {
    if (++spins < 256) relax();
    else sched_yield();  // the worker is inside an item but has lost its core
  }
}

// Returns when the generation is no longer `seen`.
bool ThreadTeam::wait_for_work(uint32_t seen) {
  const auto moved = [&] { return uint32_t(state_.load(std::memory_order_acquire) >> 32) != seen; };
  const auto start = std::chrono::steady_clock::now();
  do {
    for (int i = 0; i < 64; ++i) {
      if (moved()) return !stop_.load(std::memory_order_acquire);
      relax();
    }
  } while (std::chrono::steady_clock::now() - start < std::chrono::microseconds(SPIN_US));
  sleeping_.fetch_add(1, std::memory_order_seq_cst);
  while (uint32_t(state_.load(std::memory_order_seq_cst) >> 32) == seen) futex_sleep(state_, seen);
  sleeping_.fetch_sub(1, std::memory_order_relaxed);
  return !stop_.load(std::memory_order_acquire);
}

void ThreadTeam::worker(int thread) {
  uint32_t seen = 0;
  while (wait_for_work(seen)) {
    uint64_t state = state_.load(std::memory_order_acquire);
    bool entered = false;
    while ((state & OPEN) && !(entered = state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel))) {
    }
    seen = uint32_t(state >> 32);
    if (!entered) continue;
    take_items(thread);
    state_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace apportion
