// torch's own threads, and none of them in a forked child.
#include "parallel.h"

#include <pthread.h>

namespace regfused {

namespace {

bool forked = false;
const int fork_watch = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

bool in_forked_child() { return forked; }

}  // namespace regfused
