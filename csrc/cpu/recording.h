// What the operators of one team were asked to do, in order, to be done again with the same arguments: a step without Python.
#pragma once
#include <nanobind/nanobind.h>

#include <functional>
#include <utility>
#include <vector>

#include "thread_team.h"

namespace apportion {

class Recording {
 public:
  explicit Recording(ThreadTeam& team) : team_(team) {}

  Recording& start() {
    calls_.clear();
    team_.recording = this;
    return *this;
  }
  void stop() { team_.recording = nullptr; }
  void keep(std::function<void()> call) { calls_.push_back(std::move(call)); }
  size_t size() const { return calls_.size(); }

  void replay() const {
    nanobind::gil_scoped_release release;
    for (const auto& call : calls_) call();
  }

 private:
  ThreadTeam& team_;
  std::vector<std::function<void()>> calls_;
};

// The entry of every operator: `call` is made without the GIL, and kept while its team is recorded. It holds its arguments by value;
// who records keeps alive what they point to.
template <typename F>
void perform(ThreadTeam& team, F&& call) {
  nanobind::gil_scoped_release release;
  call();
  if (team.recording != nullptr) team.recording->keep(std::forward<F>(call));
}

}  // namespace apportion
