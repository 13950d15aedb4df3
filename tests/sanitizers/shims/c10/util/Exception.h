// Stands in for torch's checks: they throw.
#pragma once

#include <sstream>
#include <stdexcept>

#define TORCH_CHECK(condition, ...) \
  if (!(condition)) throw std::runtime_error(c10::message(__VA_ARGS__))

namespace c10 {

template <class... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

}  // namespace c10
