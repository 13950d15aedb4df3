// torch's own threads, and none of them in a forked child.
#pragma once

#include <ATen/Parallel.h>

#if defined(REGFUSED_GOMP)
#include <functional>
#elif !defined(_OPENMP)
#error "without -fopenmp at::parallel_for runs one thread and does not say so"
#endif

namespace regfused {

// Below this many elements a pass over float32 arrays runs on the calling thread: waking others costs more.
constexpr int64_t kSerialElements = 65536;

// The threads of an OpenMP pool do not survive fork(): waiting for them would hang the child.
bool in_forked_child();

#if defined(REGFUSED_GOMP)
// at::parallel_for for clang, which compiles "omp parallel" for LLVM's runtime, while torch brings GNU's. f throws
// nothing.
void parallel_by_gomp(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& f);
#endif

// f(begin, end) on disjoint parts of [0, n), at least `grain` each; all of it here where n <= grain.
template <class F>
void parallel(int64_t n, int64_t grain, const F& f) {
  if (n <= grain || in_forked_child()) {
    if (n > 0) f(int64_t(0), n);
  } else {
#if defined(REGFUSED_GOMP)
    parallel_by_gomp(n, grain, std::cref(f));
#else
    at::parallel_for(0, n, grain, f);
#endif
  }
}

}  // namespace regfused
