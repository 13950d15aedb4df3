// torch's own threads, and none of them in a forked child.
#include "parallel.h"

#include <pthread.h>

#include <algorithm>

namespace regfused {

namespace {

bool forked = false;
const int fork_watch = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

bool in_forked_child() { return forked; }

#if defined(REGFUSED_GOMP)

// What gcc makes of "omp parallel". libgomp.so keeps it: programs that gcc compiled call it.
extern "C" {
void GOMP_parallel(void (*region)(void*), void* data, unsigned threads, unsigned flags);
int omp_get_num_threads();
int omp_get_thread_num();
}

namespace {

struct Region {
  const std::function<void(int64_t, int64_t)>& f;
  int64_t n, grain;

  // What each thread of the region does.
  static void run(void* data) noexcept {
    const auto& [f, n, grain] = *static_cast<const Region*>(data);
    const int64_t parts = std::min<int64_t>(omp_get_num_threads(), at::divup(n, grain));
    const int64_t size = at::divup(n, parts), begin = omp_get_thread_num() * size;
    if (begin < n) f(begin, std::min(n, begin + size));
  }
};

}  // namespace

void parallel_by_gomp(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& f) {
  at::internal::lazy_init_num_threads();
  if (at::in_parallel_region() || at::get_num_threads() == 1) return f(0, n);
  Region region{f, n, grain};
  GOMP_parallel(Region::run, &region, 0, 0);
}

#endif

}  // namespace regfused
