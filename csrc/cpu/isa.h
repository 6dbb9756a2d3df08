// What this processor can do and which kernel table runs.
#pragma once
#include <string>
#include <vector>

namespace apportion {

struct IsaState {
  std::string name;
  bool available;
  std::string reason;  // why not, or what was found
};

// Every compiled set from slowest to fastest.
const std::vector<IsaState>& isa_states();

// Choose the table: "" takes the fastest available set; a name pins it. Throws std::invalid_argument naming what lacks.
void select_isa(const std::string& name);

const char* selected_isa();

}  // namespace apportion
