// A team of persistent threads that shares out the items of one piece of work after another.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace apportion {

class Recording;

// The caller of run() is thread 0 and works too. Each thread walks its own contiguous share of the items in order (so a stream
// of weights stays a stream, and meets the same core again in the next step), then helps with the shares of the others; every
// share is handed out by an atomic counter, so any item may run on any thread: results must not depend on who did it. Several
// teams may live in one process, one per lane. A team runs one piece of work at a time (a second caller waits), but its scratch
// belongs to one caller: operators are called by the lane's thread alone. An idle worker spins for `SPIN_US`, so that the gaps
// between the operators of one step do not put it to sleep, then sleeps on a futex. A worker that wakes late does not hold the
// caller up: the caller waits only for those that took part.
class ThreadTeam {
 public:
  using Work = void (*)(void* context, int64_t item, int thread);
  static constexpr int SPIN_US = 50;

  // cores: where to pin thread 1, 2, ... and, at index 0, thread 0 (the constructing thread is left alone: its owner pins it).
  // Empty pins nobody.
  explicit ThreadTeam(int num_threads, std::vector<int> cores = {});
  ~ThreadTeam();
  ThreadTeam(const ThreadTeam&) = delete;
  ThreadTeam& operator=(const ThreadTeam&) = delete;

  int num_threads() const { return num_threads_; }
  const std::vector<int>& cores() const { return cores_; }

  // Call work(context, item, thread) for every item of [0, num_items); returns when all are done. Work must not throw.
  void run(int64_t num_items, Work work, void* context);

  template <typename F>
  void run(int64_t num_items, F&& f) {
    using Function = std::remove_reference_t<F>;
    run(num_items, [](void* context, int64_t item, int thread) { (*static_cast<Function*>(context))(item, thread); },
        const_cast<void*>(static_cast<const void*>(&f)));
  }

  Recording* recording = nullptr;  // where the operators of this team keep what they are asked to do (recording.h), or null

  // Seconds that callers have spent inside run(), over all teams of the process: what of a step is kernels (bench).
  static double run_seconds();

  // Memory of the team, 64-byte aligned, kept between calls and grown as needed; its content is lost when it grows. `shared`
  // belongs to the caller of run (call it before run, not inside an item); `local` to one thread inside an item.
  std::byte* shared(size_t bytes) { return shared_.get(bytes); }
  std::byte* local(int thread, size_t bytes) { return local_[thread].get(bytes); }

 private:
  struct alignas(64) Scratch {
    std::byte* data = nullptr;
    size_t capacity = 0;
    std::byte* get(size_t bytes) { return bytes <= capacity ? data : grow(bytes); }
    std::byte* grow(size_t bytes);
    ~Scratch();
  };

  void worker(int thread);
  void stop();
  void take_items(int thread);
  bool wait_for_work(uint32_t seen);

  // state_ = generation << 32 | OPEN | threads inside. A worker enters by a compare-and-swap that succeeds only while the
  // generation is open; the caller closes it when the counters have run out and waits for those inside to leave.
  static constexpr uint64_t OPEN = uint64_t(1) << 31;
  alignas(64) std::atomic<uint64_t> state_{0};
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  alignas(64) std::atomic<int> sleeping_{0};
  alignas(64) Work work_ = nullptr;
  void* context_ = nullptr;
  std::atomic<bool> stop_{false};
  int num_threads_;
  std::vector<int> cores_;
  std::mutex caller_;
  Scratch shared_;
  std::vector<Scratch> local_;
  std::vector<Share> shares_;
  std::vector<std::thread> workers_;
};

}  // namespace apportion
