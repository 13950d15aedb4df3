// Stands in for torch's threads: at::parallel_for on std::thread, which ThreadSanitizer understands.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace at {

// To be set while no pass runs.
inline int64_t threads_allowed = 1;
inline int get_num_threads() { return static_cast<int>(threads_allowed); }
// Beside the calling one, since the beginning.
inline int64_t threads_started = 0;

// f(begin, end) on equal parts of [begin, end), at least `grain` each, as torch divides them.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  const int64_t n = end - begin;
  const int64_t parts = std::clamp<int64_t>((n + grain - 1) / grain, 1, threads_allowed);
  const int64_t size = (n + parts - 1) / parts;
  std::vector<std::thread> threads;
  for (int64_t at = begin + size; at < end; at += size)
    threads.emplace_back([&f, at, size, end] { f(at, std::min(at + size, end)); });
  threads_started += static_cast<int64_t>(threads.size());
  f(begin, std::min(begin + size, end));
  for (std::thread& thread : threads) thread.join();
}

}  // namespace at
